"""Where images come from and how they are decoded."""

import gzip
import hashlib
import os
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image, ImageOps

import data
import images as images_module
import pictures
from images import DEBIAN_FASHION_MNIST, ArrayImages, BadImage, FolderImages, load_image, open_dataset
from pictures import folder_args, make_args, picture, write
from utils import UserError


@pytest.fixture(scope="module")
def class_folders(tmp_path_factory):
    return pictures.write_class_folders(tmp_path_factory.mktemp("classes"))


# Files


def jpeg_with_orientation(path, pixels, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return write(path, pixels, exif=exif, quality=95)


RGB, GRAY = picture(40, 56), picture(40, 56, 1)
ALPHA = np.dstack([RGB, picture(40, 56, 1, seed=1)])


@pytest.mark.parametrize(
    ("name", "image", "options", "tolerance"),
    [
        ("rgb.jpg", Image.fromarray(RGB), {"quality": 95}, 12),
        ("gray.jpg", Image.fromarray(GRAY), {"quality": 95}, 12),
        ("progressive.jpg", Image.fromarray(RGB), {"quality": 95, "progressive": True}, 12),
        ("cmyk.jpg", Image.fromarray(RGB).convert("CMYK"), {"quality": 95}, 20),
        ("rgb.png", Image.fromarray(RGB), {}, 0),
        ("gray.png", Image.fromarray(GRAY), {}, 0),
        ("alpha.png", Image.fromarray(ALPHA), {}, 0),
        ("gray_alpha.png", Image.fromarray(np.dstack([GRAY, GRAY]), "LA"), {}, 0),
        ("bits.png", Image.fromarray(GRAY).convert("1"), {}, None),
        ("palette.png", Image.fromarray(RGB).quantize(64), {}, None),
        ("palette_clear.png", Image.fromarray(RGB).quantize(64), {"transparency": bytes(range(64))}, None),
        ("sixteen.png", Image.fromarray(GRAY.astype(np.uint16) * 257), {}, 0),
        ("sixteen.tif", Image.fromarray(GRAY.astype(np.uint16) * 257), {}, 0),
        ("sixteen.pgm", Image.fromarray(GRAY.astype(np.uint16) * 257), {}, 0),
        ("lossless.webp", Image.fromarray(RGB), {"lossless": True}, 0),
        ("alpha.webp", Image.fromarray(ALPHA), {"lossless": True, "exact": True}, 0),
        ("cmyk.tif", Image.fromarray(RGB).convert("CMYK"), {}, 0),
        ("rgb.bmp", Image.fromarray(RGB), {}, 0),
        ("rgb.ppm", Image.fromarray(RGB), {}, 0),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_format_comes_out_as_rgb(tmp_path, name, image, options, tolerance):
    """Equal to what was written, within the loss of the format; tolerance None: to PIL's own conversion."""
    image.save(tmp_path / name, **options)
    source = RGB if image.mode in ("RGB", "RGBA", "CMYK") else np.dstack([GRAY] * 3)
    reference = np.asarray(image.convert("RGB")) if tolerance is None else source
    loaded = load_image(tmp_path / name)
    assert loaded.dtype == torch.uint8 and tuple(loaded.shape) == (3, 40, 56)
    assert np.abs(loaded.permute(1, 2, 0).numpy().astype(int) - reference).max() <= (tolerance or 0)
    if "sixteen" not in name:
        pil = np.asarray(Image.open(tmp_path / name).convert("RGB"))
        assert np.abs(loaded.permute(1, 2, 0).numpy().astype(int) - pil).max() <= 2
    luma = load_image(tmp_path / name, channels=1)
    assert tuple(luma.shape) == (1, 40, 56)
    expected = np.asarray(Image.fromarray(loaded.permute(1, 2, 0).numpy()).convert("L")).astype(int)
    assert np.abs(luma[0].numpy() - expected).max() <= 3


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    levels = np.linspace(0, 65535, 40 * 56).round().astype(np.uint16).reshape(40, 56)
    Image.fromarray(levels).save(tmp_path / "ramp.png")
    assert np.array_equal(load_image(tmp_path / "ramp.png", 1)[0].numpy(), np.rint(levels / 257).astype(np.uint8))


@pytest.mark.parametrize("extension", ["jpg", "png", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation, extension):
    path = jpeg_with_orientation(tmp_path / f"turned.{extension}", RGB, orientation)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB")).astype(int)
    loaded = load_image(path).permute(1, 2, 0).numpy()
    assert loaded.shape == expected.shape == ((40, 56, 3) if orientation < 5 else (56, 40, 3))
    assert np.abs(loaded - expected).max() <= 2


@pytest.mark.parametrize(
    "name", ["a.jpg", "gray.jpg", "progressive.jpg", "cmyk.jpg", "a.png", "a.webp", "a.bmp", "a.tif"]
)
@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.9])
def test_a_truncated_file_is_a_bad_image(tmp_path, name, kept):
    pixels = Image.fromarray(picture(120, 160)).convert({"gray.jpg": "L", "cmyk.jpg": "CMYK"}.get(name, "RGB"))
    pixels.save(tmp_path / name, **({"progressive": True} if name == "progressive.jpg" else {}))
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(BadImage):
        load_image(tmp_path / name)


def test_other_bad_files_are_bad_images(tmp_path):
    (tmp_path / "text.jpg").write_text("not an image")
    (tmp_path / "folder.jpg").mkdir()
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "float.tif")
    pgm = b"P5 %d 10000 255 "
    (tmp_path / "large.pgm").write_bytes(pgm % 10000)  # above PIL's limit
    (tmp_path / "bomb.pgm").write_bytes(pgm % 20000)  # above twice the limit, where PIL itself refuses
    reasons = {
        "text.jpg": "not an image",
        "folder.jpg": "directory",
        "missing.jpg": "No such file",
        "float.tif": "float",
    }
    for name, reason in (*reasons.items(), ("large.pgm", "10000 x 10000 px"), ("bomb.pgm", "bomb")):
        with pytest.raises(BadImage, match=reason) as error:
            load_image(tmp_path / name)
        assert "\n" not in str(error.value)


def test_damaged_bytes_never_raise_anything_else(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("a.jpg", "a.png", "a.webp", "a.tif", "a.bmp"):
        path = write(tmp_path / name, picture(40, 56))
        whole = np.frombuffer(path.read_bytes(), np.uint8)
        for _ in range(60):
            damaged = whole.copy()
            places = rng.integers(0, min(len(whole), 400), 4)
            damaged[places] = rng.integers(0, 256, 4)
            path.write_bytes(damaged.tobytes())
            try:
                assert load_image(path).shape[0] == 3
            except BadImage as error:
                assert "\n" not in str(error)


# Data sets


def test_class_folders(class_folders):
    images = open_dataset(folder_args(class_folders))
    reference = torchvision.datasets.ImageFolder(class_folders)
    assert images.classes == reference.classes and images.labels.tolist() == reference.targets
    assert [images.name(i) for i in range(len(images))] == [path for path, _ in reference.samples]
    assert images.labels.dtype == np.int64 and images.channels == 3


def test_class_list(class_folders, tmp_path):
    listing = tmp_path / "list.txt"
    for text in ("cat ant", "ant\ncat\n", "\n cat\n\nant  "):
        listing.write_text(text)
        images = open_dataset(folder_args(class_folders, "--class_list", listing))
        assert images.classes == ["ant", "cat"] and images.labels.tolist() == [0] * 8 + [1] * 10
        assert all("bee" not in images.name(i) for i in range(18))
        assert images.load(17).shape == (3, 49, 42)
    for text, message in (("ant dog", "1 of its 2 classes are not in.*dog"), ("", "empty")):
        listing.write_text(text)
        with pytest.raises(UserError, match=message):
            open_dataset(folder_args(class_folders, "--class_list", listing))
    with pytest.raises(UserError, match="cannot be read"):
        open_dataset(folder_args(class_folders, "--class_list", tmp_path / "none.txt"))


def test_class_names_with_blanks(tmp_path):
    for name in ("golden retriever", "pug", "retriever"):
        write(tmp_path / "images" / name / "a.png", picture(8, 8))
    (tmp_path / "list").write_text("golden retriever\npug\n")
    images = open_dataset(folder_args(tmp_path / "images", "--class_list", tmp_path / "list"))
    assert images.classes == ["golden retriever", "pug"]


def test_imagenet100_is_a_hundred_wordnet_ids():
    names = (Path(data.__file__).parent / "imagenet100_classes.txt").read_text().split()
    assert len(names) == len(set(names)) == 100 and all(len(n) == 9 and n[0] == "n" and n[1:].isdigit() for n in names)


def test_unlabelled_flat_and_nested_folders(tmp_path):
    for name in ("b.png", "a.JPEG", "deep/er/c.webp", "notes.txt.png", ".hidden.png"):
        write(tmp_path / name, picture(8, 8))
    (tmp_path / "readme.txt").write_text("no image")
    images = open_dataset(folder_args(tmp_path))
    assert images.labels is None and images.classes is None
    assert names_below(tmp_path, images) == ["a.JPEG", "b.png", "deep/er/c.webp", "notes.txt.png"]
    below = open_dataset(folder_args(tmp_path / "deep"))
    assert len(below) == 1 and below.labels is None
    (tmp_path / "list").write_text("a.JPEG\n")
    with pytest.raises(UserError, match="class folders"):
        open_dataset(folder_args(tmp_path, "--class_list", tmp_path / "list"))


def names_below(root, images):
    return [os.path.relpath(images.name(index), root) for index in range(len(images))]


def test_text_file_of_paths(tmp_path):
    write(tmp_path / "images" / "b.png", picture(8, 8))
    elsewhere = write(tmp_path / "else where" / "ä a.png", picture(9, 8))
    listing = tmp_path / "list.txt"
    listing.write_text(f"images/b.png\n\n{elsewhere}\n")
    images = open_dataset(folder_args(listing))
    assert len(images) == 2 and images.labels is None
    assert images.load(0).shape == (3, 8, 8) and images.load(1).shape == (3, 9, 8)
    assert images.name(1) == str(elsewhere)
    with pytest.raises(UserError, match="list of images"):
        open_dataset(folder_args(listing), "val")
    listing.write_text("\n")
    with pytest.raises(UserError, match="names no image"):
        open_dataset(folder_args(listing))


def test_splits(tmp_path):
    for name in ("train/a/1.png", "train/b/1.png", "val/a/2.png", "val/b/2.png", "val/b/3.png"):
        write(tmp_path / name, picture(8, 8))
    for path in (tmp_path, tmp_path / "train"):
        assert len(open_dataset(folder_args(path))) == 2
        assert len(open_dataset(folder_args(path), "val")) == 3
    with pytest.raises(UserError, match=r"looked for .*train/a/val and .*train/a/test"):
        open_dataset(folder_args(tmp_path / "train" / "a"), "val")


def test_links_are_followed_but_loops_and_broken_ones_end_nothing(tmp_path):
    write(tmp_path / "a" / "x.png", picture(8, 8))
    write(tmp_path.parent / f"{tmp_path.name}_outside" / "y.png", picture(8, 8))
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    (tmp_path / "b").symlink_to(tmp_path.parent / f"{tmp_path.name}_outside")
    (tmp_path / "b" / "broken.png").symlink_to(tmp_path / "nothing")
    images = open_dataset(folder_args(tmp_path))
    assert names_below(tmp_path, images) == ["a/x.png", "b/broken.png", "b/y.png"]
    with pytest.raises(BadImage):
        images.load(1)


def test_file_names_that_are_not_utf8(tmp_path, capsys):
    write(tmp_path / "good.png", picture(8, 8))
    os.rename(tmp_path / "good.png", os.fsencode(tmp_path) + b"/caf\xe9.png")
    images = open_dataset(folder_args(tmp_path))
    assert images.name(0).endswith("caf\\xe9.png") and images.load(0).shape == (3, 8, 8)


def test_fingerprint_follows_names_and_pixels(class_folders, tmp_path):
    photographs = pictures.photographs()
    prints = [open_dataset(folder_args(class_folders)).fingerprint]
    (tmp_path / "list").write_text("ant bee")
    prints.append(open_dataset(folder_args(class_folders, "--class_list", tmp_path / "list")).fingerprint)
    prints += [ArrayImages("a", photographs).fingerprint, ArrayImages("a", photographs.flip(0)).fingerprint]
    assert len(set(prints)) == 4 and prints[2] == ArrayImages("b", photographs.clone()).fingerprint
    assert prints[0] == open_dataset(folder_args(class_folders)).fingerprint


def test_fingerprint_notices_images_made_anew_under_the_same_names(tmp_path):
    write(tmp_path / "a.png", picture(8, 8))
    first, again = (open_dataset(folder_args(tmp_path)).fingerprint for _ in range(2))
    write(tmp_path / "a.png", picture(9, 9))
    assert first == again != open_dataset(folder_args(tmp_path)).fingerprint


def test_fingerprint_is_of_the_names_joined_by_zeros_then_of_sizes(class_folders):
    """Checkpoints hold it: another way to count it would end all runs."""
    images = open_dataset(folder_args(class_folders))
    paths = [path for path, _ in torchvision.datasets.ImageFolder(class_folders).samples]
    names = "\0".join(os.path.relpath(path, class_folders) for path in paths)
    sizes = "".join(f"{os.path.getsize(path)} " for path in paths)
    assert images.fingerprint == hashlib.sha256((names + sizes).encode()).hexdigest()[:16]


def test_a_folder_of_images_goes_to_worker_processes(class_folders):
    images = open_dataset(folder_args(class_folders))
    again = pickle.loads(pickle.dumps(images))
    assert again.fingerprint == images.fingerprint and again.name(26) == images.name(26)
    assert torch.equal(again.load(26), images.load(26))


@pytest.mark.slow
@pytest.mark.parametrize("context", ["fork", "spawn", "forkserver"])
def test_workers_of_every_kind_read_a_folder(class_folders, context):
    images = open_dataset(folder_args(class_folders))
    batches = torch.utils.data.DataLoader(
        data.EvalDataset(images, 32, 3), batch_sampler=[[0, 5], [26]], num_workers=1, multiprocessing_context=context,
        collate_fn=data.already_collated,
    )  # fmt: skip
    expected = data.EvalDataset(images, 32, 3)
    assert all(map(torch.equal, batches, map(expected.__getitems__, ([0, 5], [26]))))


def test_names_take_little_memory():
    names = [b"n%08d/n%08d_%d.JPEG" % (i % 1000, i % 1000, i) for i in range(100_000)]
    images = FolderImages("/data", names)
    assert images.bytes.nbytes + images.ends.nbytes < 40 * len(names)
    assert images.name(99_999) == "/data/" + names[-1].decode() and images.name(0) == "/data/" + names[0].decode()


def idx(array):
    return b"\0\0\x08" + bytes([array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


@pytest.mark.parametrize("below", ["", "FashionMNIST/raw"])
@pytest.mark.parametrize("zipped", [False, True])
def test_fashion_mnist_files_in_data_path(tmp_path, below, zipped):
    rng, folder = np.random.default_rng(0), tmp_path / below
    folder.mkdir(parents=True, exist_ok=True)
    pixels, labels = rng.integers(0, 256, (10, 28, 28), np.uint8), np.arange(10, dtype=np.uint8)
    for name, array in (("train-images-idx3-ubyte", pixels), ("train-labels-idx1-ubyte", labels)):
        content = idx(array)
        (folder / (name + ".gz" * zipped)).write_bytes(gzip.compress(content) if zipped else content)
    images = open_dataset(make_args("--data_path", tmp_path))
    assert np.array_equal(images.data[:, 0].numpy(), pixels) and images.labels.tolist() == list(range(10))
    assert images.channels == 1 and len(images.classes) == 10 and images.name(3) == "fashion_mnist/train[3]"
    (folder / ("train-images-idx3-ubyte" + ".gz" * zipped)).write_bytes(
        b"\x1f\x8b rubbish" if zipped else idx(pixels)[:-5]
    )
    with pytest.raises(UserError, match="damaged"):
        open_dataset(make_args("--data_path", tmp_path))


def test_fashion_mnist_nowhere_is_one_line_with_three_ways(tmp_path, monkeypatch):
    monkeypatch.setattr(images_module, "DEBIAN_FASHION_MNIST", str(tmp_path / "debian"))
    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "mirrors", ["http://127.0.0.1:9/"])
    with pytest.raises(UserError, match=r"--data_path.*dataset-fashion-mnist.*network") as error:
        open_dataset(make_args("--data_path", tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.skipif(not os.path.isdir(DEBIAN_FASHION_MNIST), reason="needs Debian's package dataset-fashion-mnist")
def test_fashion_mnist_of_debian(tmp_path):
    for split, count in (("train", 60000), ("val", 10000)):
        images = open_dataset(make_args("--data_path", tmp_path), split)
        assert len(images) == count and np.bincount(images.labels).tolist() == [count // 10] * 10
    images = open_dataset(make_args())
    assert (
        abs(images.data.float().mean() / 255 - 0.2860) < 1e-3 and abs(images.data.float().std() / 255 - 0.3530) < 1e-3
    )


def test_cifar_and_svhn_from_torchvisions_files(tmp_path, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), np.uint8)
    names = [str(n) for n in range(10)]
    cifar = SimpleNamespace(data=pixels, targets=[3, 1, 2, 0, 5, 4], classes=names)
    svhn = SimpleNamespace(data=pixels.transpose(0, 3, 1, 2), labels=np.array([3, 1, 2, 0, 5, 4]))
    for name, found in (("CIFAR10", cifar), ("CIFAR100", cifar), ("SVHN", svhn)):
        monkeypatch.setattr(torchvision.datasets, name, lambda root, found=found, **options: found)
        images = open_dataset(make_args("--dataset", name.lower(), "--data_path", tmp_path))
        assert np.array_equal(images.data.permute(0, 2, 3, 1).numpy(), pixels) and images.labels.tolist() == [
            3,
            1,
            2,
            0,
            5,
            4,
        ]


def test_a_set_that_cannot_be_downloaded_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", "http://127.0.0.1:9/cifar.tar.gz")
    with pytest.raises(UserError, match=r"cifar10 is not in .* and cannot be downloaded") as error:
        open_dataset(make_args("--dataset", "cifar10", "--data_path", tmp_path))
    assert "\n" not in str(error.value)


def test_wrong_paths_are_one_line(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"no images in .*\.jpg"):
        open_dataset(folder_args(tmp_path))
    with pytest.raises(UserError, match="nowhere cannot be read: No such file"):
        open_dataset(folder_args(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="needs --data_path"):
        open_dataset(make_args("--dataset", "imagefolder"))
    write(tmp_path / "a.png", picture(8, 8))
    with pytest.raises(UserError, match="1 images do not fill one batch of 8"):
        args = folder_args(tmp_path)
        data.TrainLoader(open_dataset(args), args, 4, world_size=2)

    def refuse(folder):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match="cannot be read: Permission denied"):
        open_dataset(folder_args(tmp_path))
