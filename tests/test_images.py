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

import data
import images
import pictures
import utils
from images import ArrayImages, FolderImages, check_same_classes, open_dataset, small_sets
from images.small_sets import DEBIAN_FASHION_MNIST
from images.workers import as_it_is
from pictures import folder_args, make_args, picture, write
from utils import UserError


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


def test_what_a_class_list_leaves_out_of_a_small_set_is_said(tmp_path, monkeypatch):
    pixels = torch.arange(6 * 3, dtype=torch.uint8).view(6, 3, 1, 1)
    whole = ArrayImages("cifar10/train", pixels, np.arange(6) % 3, ["ant", "bee", "cat"])
    monkeypatch.setattr(images, "open_small_set", lambda *args: whole)
    (tmp_path / "list").write_text("ant cat")
    found = open_dataset(make_args("--dataset", "cifar10", "--class_list", tmp_path / "list"))
    assert found.labels.tolist() == [0, 1, 0, 1] and torch.equal(found.data, pixels[[0, 2, 3, 5]])
    left_out = f"1 classes left out by --class_list {tmp_path / 'list'}"
    assert found.summary == f"4 images in 2 classes (ant, cat) of cifar10/train; {left_out}"


def test_class_names_with_blanks(tmp_path):
    for name in ("golden retriever", "pug", "retriever"):
        write(tmp_path / "images" / name / "a.png", picture(8, 8))
    (tmp_path / "list").write_text("golden retriever\npug\n")
    images = open_dataset(folder_args(tmp_path / "images", "--class_list", tmp_path / "list"))
    assert images.classes == ["golden retriever", "pug"]


def test_imagenet100_is_a_hundred_wordnet_ids():
    names = (Path(data.__file__).parent / "imagenet100_classes.txt").read_text().split()
    assert len(names) == len(set(names)) == 100 and all(len(n) == 9 and n[0] == "n" and n[1:].isdigit() for n in names)


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
        collate_fn=as_it_is,
    )  # fmt: skip
    expected = data.EvalDataset(images, 32, 3)
    assert all(map(torch.equal, batches, map(expected.__getitems__, ([0, 5], [26]))))


def test_names_take_little_memory():
    names = [b"n%08d/n%08d_%d.JPEG" % (i % 1000, i % 1000, i) for i in range(100_000)]
    images = FolderImages("/data", names)
    assert images.names.bytes.nbytes + images.names.ends.nbytes < 40 * len(names)
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
    monkeypatch.setattr(small_sets, "DEBIAN_FASHION_MNIST", str(tmp_path / "debian"))
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


def test_what_was_opened_is_said_once_by_the_first_process(class_folders, capsys, monkeypatch):
    open_dataset(folder_args(class_folders))
    assert capsys.readouterr().err == f"train: 27 images in 3 classes (ant, bee, cat) of {class_folders}\n"
    monkeypatch.setattr(utils, "rank", lambda: 1)
    open_dataset(folder_args(class_folders))
    assert capsys.readouterr() == ("", "")


def test_sets_of_other_classes_are_refused_by_the_names_that_differ():
    one, two = torch.zeros(2, 3, 8, 8), np.array([0, 1])
    sets = {names: ArrayImages("some", one.byte(), two, names.split()) for names in ("a b", "a c", "a b c")}
    check_same_classes(sets["a b"], sets["a b"])
    for train, val, message in (
        ("a b", "a c", r"only in train: b; only in val: c\)"),
        ("a b c", "a b", r"3 and 2 \(only in train: c\)"),
    ):
        with pytest.raises(UserError, match=message):
            check_same_classes(sets[train], sets[val])


def test_a_note_where_sixteen_bits_are_hardly_used(tmp_path, capsys):
    def opened(highest, *flags):
        for number in range(3):
            write(tmp_path / f"{number}.png", (np.arange(64).reshape(8, 8) * highest // 63).astype(np.uint16))
        images = open_dataset(folder_args(tmp_path, *flags))
        return images, capsys.readouterr().err

    images, said = opened(4095)
    assert "note: 3 of 3 images" in said and "--value_range 0 4095" in said and images.load(0).max() == 16
    ranged, said = opened(4095, "--value_range", 0, 4095)
    assert "note:" not in said and ranged.load(0).max() == 255 and ranged.fingerprint != images.fingerprint
    assert "note:" not in opened(60000)[1]
    write(tmp_path / "3.png", picture(8, 8))
    assert "note: 3 of 4 images" in opened(300)[1]


@pytest.mark.parametrize("values", [("5", "5"), ("9", "1"), ("nan", "1"), ("0", "inf"), ("0",)])
def test_ranges_without_meaning_are_refused(class_folders, values):
    with pytest.raises((UserError, SystemExit)):
        open_dataset(folder_args(class_folders, "--value_range", *values))
