"""Files and workers that fail while a run reads its images, and images that are others than before."""

import os
import random
import shutil
import signal
from functools import partial

import numpy as np
import pytest
from injection import at_call, die, in_turn, kill_data_worker
from PIL import Image

from images import load_image
from runs import NUM_IMAGES, assert_same_run, flags, run_to_end, write_pictures

pytestmark = pytest.mark.slow

STEP = "main_cplearn.update_weights"


def test_data_workers_that_die_are_replaced(folder, undisturbed, tmp_path):
    """In a step, as an epoch begins (its first batch is then on its way), in its last step."""
    deaths = [partial(at_call, STEP, step, kill_data_worker) for step in (2, 24, 25)]
    deaths.append(partial(at_call, "main_cplearn.buffers_before_step", 14, kill_data_worker))  # between epochs 1 and 2
    words = flags(folder, tmp_path / "cut", num_workers=2)
    said = run_to_end(words, tmp_path, faults={0: partial(in_turn, *deaths)})
    assert said.count("a data worker died") >= 3
    assert_same_run(tmp_path / "cut", undisturbed())


# ---- bad files -------------------------------------------------------------------------------------------------------


def truncated(path, pixels):
    Image.fromarray(pixels).save(path, "JPEG")
    path.write_bytes(path.read_bytes()[:400])


def empty(path, pixels):
    path.write_bytes(b"")


def text(path, pixels):
    path.write_text("this is no picture\n")


def bomb(path, pixels):
    """A PNG's header that declares 60,000 x 60,000 px."""
    Image.fromarray(pixels).save(path, "PNG")
    content = bytearray(path.read_bytes())
    content[16:24] = np.array([60000, 60000], ">u4").tobytes()
    path.write_bytes(content)


def loop(path, pixels):
    os.symlink(path.name, path)


def dangling(path, pixels):
    os.symlink("nowhere", path)


BAD = {"truncated.jpg": truncated, "empty.jpg": empty, "text.jpg": text, "bomb.png": bomb, "loop.jpg": loop,
       "dangling.png": dangling}  # fmt: skip


def cmyk(path, pixels):
    ink = np.concatenate([255 - pixels, np.zeros_like(pixels[..., :1])], axis=-1)
    Image.fromarray(ink, "CMYK").save(path, "TIFF")
    return pixels


def deep(path, pixels):
    """16-bit gray."""
    gray = pixels[..., 0]
    Image.fromarray(gray.astype(np.uint16) * 257).save(path, "PNG")
    return np.stack([gray] * 3, axis=-1)


def animated(path, pixels):
    Image.fromarray(pixels).save(path, "PNG", save_all=True, append_images=[Image.fromarray(255 - pixels)])
    return pixels


def broken_exif(path, pixels):
    Image.fromarray(pixels).save(path, "JPEG")
    plain = load_image(path).permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(path, "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff broken")
    return plain


ODD = {"cmyk.tif": cmyk, "deep.png": deep, "animated.png": animated, "exif.jpg": broken_exif}


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """96 images: 30 bad ones of six kinds, 8 odd ones of four kinds, good ones; and the odd ones' pixels by name."""
    root = write_pictures(tmp_path_factory.mktemp("damaged"))
    names, pixels = sorted(root.rglob("*.png")), {}
    random.Random(0).shuffle(names)
    for number, (kind, make) in enumerate([*BAD.items()] * 5 + [*ODD.items()] * 2):
        old = names[number]
        content = np.array(Image.open(old))
        old.unlink()
        path = old.with_name(f"{number:03d}_{kind}")
        pixels[path] = make(path, content)
    (root / "class0" / "folder.jpg").mkdir()  # is no image, nor counted as one
    return root, {path: value for path, value in pixels.items() if value is not None}


def test_odd_files_have_the_right_pixels(damaged):
    assert len(damaged[1]) == 8
    for path, pixels in damaged[1].items():
        assert np.array_equal(load_image(path).permute(1, 2, 0).numpy(), pixels), path


def is_bad(path):
    return path.name.partition("_")[2] in BAD


def test_a_third_of_the_files_bad_and_killed_on_the_way(damaged, undisturbed, launch, tmp_path):
    root = damaged[0]
    bad = [path for folder in root.iterdir() for path in folder.iterdir() if is_bad(path)]
    assert len(bad) == 30 and len(bad) / NUM_IMAGES > 0.3
    whole = undisturbed(folder=root, max_bad_images=0.5)
    words = flags(root, tmp_path / "cut", max_bad_images=0.5)
    for attempt, step in enumerate((4, 10, 9)):
        job = launch([*words, "--num_workers", 2 * (attempt % 2)], faults={0: partial(at_call, STEP, step, die)})
        assert job.wait() == [-signal.SIGKILL], job.output()
    run_to_end([*words, "--num_workers", 2], tmp_path)
    assert_same_run(tmp_path / "cut", whole)


def test_each_bad_file_is_named_once(damaged, tmp_path):
    said = run_to_end(flags(damaged[0], tmp_path / "cut", epochs=2, max_bad_images=0.5), tmp_path)
    named = [line.split("cannot read ")[1].split(": ")[0] for line in said.splitlines() if "cannot read" in line]
    assert len(named) == len(set(named)) == 30 and all("_" in name for name in named)


def test_too_many_bad_files_are_one_line(damaged, launch, tmp_path):
    job = launch(flags(damaged[0], tmp_path / "cut"))
    assert job.wait() == [2], job.output()
    last = job.output().splitlines()[-1]
    assert last.startswith("error: ") and "--max_bad_images" in last and "Traceback" not in job.output()


# ---- other images than before ----------------------------------------------------------------------------------------


def add(root):
    shutil.copy(root / "class0" / "000.png", root / "class0" / "more.png")


def remove(root):
    (root / "class0" / "000.png").unlink()


def rename(root):
    (root / "class0" / "000.png").rename(root / "class0" / "other.png")


def test_a_data_set_that_changed_is_said(folder, launch, tmp_path):
    root = shutil.copytree(folder, tmp_path / "images")
    words = flags(root, tmp_path / "cut", epochs=1)
    run_to_end(words, tmp_path)
    before = (tmp_path / "cut" / "checkpoint.pth").read_bytes()
    for change in (add, remove, rename):
        shutil.rmtree(root)
        shutil.copytree(folder, root)
        change(root)
        job = launch([*words, "--epochs", 2])
        assert job.wait() == [2], f"{change.__name__}: {job.output()}"
        last = job.output().splitlines()[-1]
        assert last.startswith("error: ") and "the data set" in last, f"{change.__name__}: {job.output()}"
        assert (tmp_path / "cut" / "checkpoint.pth").read_bytes() == before
