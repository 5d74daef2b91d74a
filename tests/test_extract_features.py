"""Features in files against the model itself; killed and parallel runs against one that was not disturbed."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image

import data
import extract_features
from backbones import build_backbone
from cplearn_head import CPLearnHead
from evaluation import feature_files
from evaluation.patches import WithPatches
from images import FolderImages
from pictures import picture, write
from pretrained import load_pretrained
from refusals import error_of

SCRIPT = extract_features.__file__


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    for number in range(23):
        write(root / f"{number:02d}.png", picture(30 + number, 40 - number // 2, seed=number))
    return root


def checkpoint(path, arch="vit_mini", **sizes):
    """As main_cplearn.py writes it."""
    torch.manual_seed(0)
    sizes = sizes or {"img_size": 16, "patch_size": 8}
    backbone = build_backbone(arch, **sizes)
    for parameter in backbone.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    state = {f"backbone.{k}": v for k, v in backbone.state_dict().items()}
    head = CPLearnHead(backbone.embed_dim, 64, activation="l2")
    state |= {f"head.{k}": v for k, v in head.state_dict().items()}
    args = {"arch": arch, "dataset": "imagefolder", "img_size": 16, "in_chans": 3, "activation": "l2"}
    args |= {"mean": [0.4] * 3, "std": [0.3] * 3} | sizes
    torch.save({"format": "cplearn 2", "student": state, "teacher": state, "args": args}, path)
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("weights") / "checkpoint.pth")


def words(weights, photos, out, *flags):
    given = {"--checkpoint": weights, "--data_path": photos, "--output_dir": out, "--device": "cpu", "--batch_size": 4}
    given |= {"--num_workers": 0}
    return [str(word) for pair in given.items() if pair[0] not in flags for word in pair] + [str(f) for f in flags]


def extract(*arguments):
    extract_features.main(words(*arguments))


def pixels(photos, size):
    names = [name.encode() for name in sorted(os.listdir(photos))]
    return next(data.eval_batches(FolderImages(photos, names), size, 3, [0.4] * 3, [0.3] * 3, batch_size=100))[1]


def content(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def parquet_column(folder, name):
    column = pyarrow.parquet.read_table(folder / "features.parquet")[name].to_pylist()
    return np.array(column)


ALL = ("--features", "codes", "cls", "patches", "average", "embeddings")


@torch.no_grad()
@pytest.mark.parametrize("size", [16, 32])
def test_every_kind_is_what_the_model_gives(size, weights, photos, tmp_path, capsys):
    """At its own size, and at one to which the positions are interpolated."""
    extract(weights, photos, tmp_path / "npy", *ALL, "--img_size", size)
    extract(weights, photos, tmp_path / "parquet", *ALL, "--img_size", size, "--format", "parquet")
    model, x = load_pretrained(weights), pixels(photos, size)
    tokens = model.backbone.get_intermediate_layers(x)[0]
    features = model(x)
    side = size // 8
    expected = {
        "cls": features,
        "patches": tokens[:, 1:].reshape(23, side, side, 128),
        "average": tokens[:, 1:].mean(dim=1),
        "embeddings": model.head(features),
        "codes": model.assign(x),
    }
    for name, values in expected.items():
        found = np.load(tmp_path / "npy" / f"{name}.npy", mmap_mode="r")
        assert found.dtype == (np.int64 if name == "codes" else np.float32)
        np.testing.assert_allclose(found, values, rtol=0, atol=2e-5)
        np.testing.assert_array_equal(parquet_column(tmp_path / "parquet", name).astype(found.dtype), found)
    names = [str(photos / f"{number:02d}.png") for number in range(23)]
    assert (tmp_path / "npy" / "names.txt").read_text().splitlines() == names
    assert parquet_column(tmp_path / "parquet", "name").tolist() == names
    assert sorted(p.name for p in (tmp_path / "npy").iterdir()) == sorted(
        [*(f"{name}.npy" for name in expected), "meaning.json", "names.txt"]
    )
    assert f"patches (23, {side}, {side}, 128)" in capsys.readouterr().out


@torch.no_grad()
@pytest.mark.parametrize(
    ("arch", "grid"),
    [("resnet8", (8, 8)), ("resnet18", (4, 4)), ("test_convnext", (1, 1)), ("test_vit2", (2, 2)), ("vit_mini", (4, 4))],
)
def test_patches_are_what_the_feature_is_made_of(arch, grid):
    """Their mean, in networks that pool them so; the feature itself is the backbone's in all."""
    torch.manual_seed(0)
    backbone = build_backbone(arch, img_size=32, patch_size=8).eval()
    x = torch.randn(2, 3, 32, 32)
    features, patches = WithPatches(backbone)(x)
    assert patches.shape == (2, *grid, patches.shape[-1])
    torch.testing.assert_close(features, backbone(x), rtol=1e-5, atol=1e-5)
    if arch.startswith("resnet"):
        torch.testing.assert_close(patches.mean(dim=(1, 2)), features, rtol=1e-5, atol=1e-6)


def test_patches_lie_where_they_lie_in_the_image():
    """A picture that changes in its upper right corner: of a network without attention, only that patch."""
    torch.manual_seed(0)
    backbone = build_backbone("vit_mini", img_size=24, patch_size=8).eval()
    for block in backbone.blocks:
        torch.nn.init.zeros_(block.attn.proj.weight)
    x = torch.randn(1, 3, 16, 24)
    y = x.clone()
    y[..., :8, 16:] += 1
    changed = (WithPatches(backbone)(x)[1] != WithPatches(backbone)(y)[1]).any(dim=-1)[0]
    assert changed.tolist() == [[False, False, True], [False, False, False]]


@pytest.mark.parametrize("kind", ["npy", "parquet"])
def test_a_run_that_failed_midway_goes_on_to_the_same_bytes(kind, weights, photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(extract_features, "BLOCK_BATCHES", 2)
    flags = ("--features", "cls", "patches", "codes", "--format", kind)
    extract(weights, photos, tmp_path / "whole", *flags)
    whole, calls = extract_features.Maker.__call__, []

    def fails_at_the_fifth(self, images):
        calls.append(len(images))
        if len(calls) == 5 + 1:  # the first finds out the shapes
            raise KeyboardInterrupt
        return whole(self, images)

    monkeypatch.setattr(extract_features.Maker, "__call__", fails_at_the_fifth)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        extract(weights, photos, tmp_path / "killed", *flags)
    begun = content(tmp_path / "killed")
    assert begun["done"] == b"\1\1\0" and all(
        ".part" in n for n in begun if n.endswith(("npy", "parquet")) and "/" not in n
    )
    monkeypatch.setattr(extract_features.Maker, "__call__", whole)
    capsys.readouterr()
    extract(weights, photos, tmp_path / "killed", *flags)
    assert "2 of 3 blocks are there already" in capsys.readouterr().err
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


@pytest.mark.slow
def test_processes_share_the_blocks_and_write_the_same_bytes(weights, photos, tmp_path, run_in_processes):
    extract_features.BLOCK_BATCHES, usual = 1, extract_features.BLOCK_BATCHES
    try:
        torch.set_num_threads(1)
        extract(weights, photos, tmp_path / "one", "--features", "cls", "patches")
        shares = run_in_processes(extract_in_group, weights, photos, tmp_path / "two")
    finally:
        extract_features.BLOCK_BATCHES = usual
    assert shares == [[0, 2, 4], [1, 3, 5]]
    assert content(tmp_path / "two") == content(tmp_path / "one")


def extract_in_group(rank, weights, photos, out):
    extract_features.BLOCK_BATCHES, own = 1, []
    extract_features.utils.init_distributed = lambda device: torch.device("cpu")  # the group is there already
    write_rows = feature_files.NpyFiles.write_rows

    def write_and_count(self, rows, arrays):
        own.append(rows[0] // self.block_size)
        write_rows(self, rows, arrays)

    feature_files.NpyFiles.write_rows = write_and_count
    extract_features.main.__wrapped__(words(weights, photos, out, "--features", "cls", "patches"))
    return own


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["npy", "parquet"])
def test_a_killed_run_of_two_processes_goes_on_to_the_same_bytes(kind, weights, tmp_path):
    """SIGKILL of one process, then two go on: 10,000 images, and what any of these processes ever held."""
    root = tmp_path / "photos"
    for number in range(10_000):
        write(root / f"{number:05d}.png", np.full((8, 8, 3), number % 251, np.uint8))
    (tmp_path / "measured.py").write_text(MEASURED)
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(SCRIPT).parent), "PEAKS": str(tmp_path)}

    def command(out, *launcher):
        flags = words(
            weights, root, tmp_path / out, "--features", "cls", "patches", "--format", kind, "--batch_size", 8
        )
        return [sys.executable, *launcher, str(tmp_path / "measured.py"), *flags]

    two = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    subprocess.run(command("whole", *two), env=env, check=True)
    process = subprocess.Popen(command("killed"), env=env)
    while process.poll() is None and count_done(tmp_path / "killed") < 30:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 30 <= count_done(tmp_path / "killed") < 79  # blocks of 128
    subprocess.run(command("killed", *two), env=env, check=True)
    assert content(tmp_path / "killed") == content(tmp_path / "whole")
    peaks = [int(path.read_text()) for path in tmp_path.glob("peak_*")]
    assert len(peaks) == 4 and max(peaks) < 1.5e6  # kB


MEASURED = """
import os, re, sys
import extract_features
extract_features.main(sys.argv[1:])
with open("/proc/self/status") as status, open(f"{os.environ['PEAKS']}/peak_{os.getpid()}", "w") as file:
    file.write(re.search(r"VmHWM:\\s+(\\d+) kB", status.read())[1])
os._exit(0)  # gloo's threads outlive the group
"""


def count_done(folder):
    try:
        return sum((folder / "done").read_bytes())
    except OSError:
        return 0


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_images(weights, tmp_path):
    """2 GB of patches of 16,000 tiny images; the peak of all that the process ever held. The network itself, whose
    memory does not depend on the number of images, is left out: it would take minutes."""
    root = tmp_path / "photos"
    for number in range(16_000):
        write(root / f"{number:05d}.png", np.full((8, 8, 3), number % 251, np.uint8))
    flags = ["--features", "cls", "patches", "--batch_size", "64"]
    program = (
        "import sys, numpy, extract_features\n"
        "maker, extract_features.SHOW_S = extract_features.Maker, 1\n"
        "maker.__call__ = lambda self, x: {'cls': numpy.zeros((len(x), 128), 'f'),\n"
        "                                  'patches': numpy.ones((len(x), 16, 16, 128), 'f')}\n"
        "extract_features.main(sys.argv[1:])\n"
        "print(open('/proc/self/status').read())\n"  # getrusage counts what the parent held before exec
    )
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-c", program, *words(weights, root, out, *flags)],
        cwd=Path(SCRIPT).parent, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert (out / "patches.npy").stat().st_size > 2e9
    assert int(re.search(r"VmHWM:\s+(\d+) kB", done.stdout)[1]) < 1.5e6  # kB
    assert re.search(r"of 16,000 images, \d+\.\d a second, \d\d:\d\d:\d\d left", done.stderr)


# ---- the nearest images ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["npy", "parquet"])
@pytest.mark.parametrize("by", ["faiss", "torch"])
def test_the_nearest_images_are_those_of_the_cosine(by, kind, weights, photos, tmp_path, capsys, monkeypatch):
    if by == "torch":
        monkeypatch.setitem(sys.modules, "faiss", None)
    monkeypatch.setattr(feature_files, "READ_BYTES", 7 * 512)  # 7 rows
    monkeypatch.setattr(extract_features, "BLOCK_BATCHES", 1)
    query = photos / "05.png"
    extract(weights, photos, tmp_path / "out", "--similar", query, "--nearest", 9, "--format", kind)
    out = capsys.readouterr().out
    features = load_pretrained(weights)(pixels(photos, 16)).double()
    features = features / features.norm(dim=1, keepdim=True)
    cosines, rows = (features @ features[5]).sort(descending=True)
    printed = re.findall(r"\| +\d+ \| +(\S+) \| (\S+) +\|", out)
    assert [name for _, name in printed] == [str(photos / f"{int(row):02d}.png") for row in rows[:9]]
    np.testing.assert_allclose([float(cosine) for cosine, _ in printed], cosines[:9], atol=1e-4)
    with Image.open(tmp_path / "out" / "similar_05.png") as drawn:
        assert drawn.size[0] > 300


# ---- what stops it ---------------------------------------------------------------------------------------------------


def test_another_run_s_output_is_left_alone(weights, photos, tmp_path, capsys):
    extract(weights, photos, tmp_path / "out")
    before = content(tmp_path / "out")
    assert "differ in features" in error_of(
        capsys, extract, weights, photos, tmp_path / "out", "--features", "cls", "average"
    )
    assert "differ in img_size" in error_of(capsys, extract, weights, photos, tmp_path / "out", "--img_size", 32)
    other = checkpoint(tmp_path / "other.pth", img_size=16, patch_size=4)
    assert "differ in model" in error_of(capsys, extract, other, photos, tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("text")
    assert "holds something else" in error_of(capsys, extract, weights, photos, tmp_path / "mine")
    assert content(tmp_path / "out") == before and os.listdir(tmp_path / "mine") == ["thesis.tex"]
    assert sorted(os.listdir(tmp_path)) == ["mine", "other.pth", "out"]


def test_a_damaged_output_is_no_start(weights, photos, tmp_path, capsys):
    extract(weights, photos, tmp_path / "out")
    np.save(tmp_path / "out" / "cls.npy", np.zeros((3, 4)))
    assert "damaged (cls.npy is float64 (3, 4))" in error_of(capsys, extract, weights, photos, tmp_path / "out")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--features", "tokens"], "--features"),
        (["--format", "csv"], "--format"),
        (["--nearest", "0"], "--nearest"),
        (["--img_size", "17"], "--img_size 17"),
        (["--features", "average", "--similar", "a.png"], "--similar a.png: searches in cls"),
        (["--similar", "missing.png"], "--similar missing.png: cannot be read"),
        (["--output_dir", "{photos}/00.png/below"], "--output_dir {photos}/00.png/below"),
        (["--data_path", "{photos}/missing"], "{photos}/missing"),
    ],
)
def test_bad_input_is_one_line(flags, message, weights, photos, tmp_path, capsys):
    flags = [flag.format(photos=photos) for flag in flags]
    assert message.format(photos=photos) in error_of(capsys, extract, weights, photos, tmp_path / "out", *flags)


def test_kinds_that_a_model_has_not_are_refused(photos, tmp_path, capsys):
    torch.save(build_backbone("vit_mini", img_size=16, patch_size=8).state_dict(), tmp_path / "bare.pth")
    for kind in ("embeddings", "codes"):
        line = error_of(capsys, extract, tmp_path / "bare.pth", photos, tmp_path / "out", "--features", kind)
        assert f"--features {kind}" in line and "has no head" in line
    assert not (tmp_path / "out").exists()


def test_images_of_a_set_in_memory(tmp_path, weights, monkeypatch, capsys):
    """The query is then taken whole, as they are."""
    images = extract_features.evaluation.image_sets.ArrayImages(
        "cifar10/train", (torch.arange(5)[:, None, None, None] * 50 + torch.zeros(5, 3, 16, 16)).byte()
    )
    monkeypatch.setattr(extract_features.evaluation, "open_images", lambda *args: images)
    query = write(tmp_path / "q.png", images.data[3].permute(1, 2, 0).numpy())
    extract(weights, "x", tmp_path / "out", "--similar", query, "--dataset", "cifar10", "--nearest", 1)
    assert "cifar10/train[3]" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "meaning.json").read_text())["num_images"] == 5
