"""Small known sets, kept in memory: Fashion-MNIST, CIFAR, SVHN."""

import fcntl
import gzip
import os
import zlib
from pathlib import Path

import numpy as np
import torch
import torchvision

from images.decoding import first_line
from images.sets import ArrayImages
from utils import UserError

DOWNLOADS = "datasets"


def open_small_set(dataset, data_path, split):
    train = split == "train"
    if dataset == "fashion_mnist":
        return open_fashion_mnist(data_path, train)
    root, sets = data_path or DOWNLOADS, torchvision.datasets
    if dataset == "svhn":
        found = torchvision_set(
            lambda download: sets.SVHN(root, split="train" if train else "test", download=download), dataset, root
        )
        data, labels, classes = torch.from_numpy(found.data), found.labels, [str(digit) for digit in range(10)]
    else:
        cifar = sets.CIFAR10 if dataset == "cifar10" else sets.CIFAR100
        found = torchvision_set(lambda download: cifar(root, train=train, download=download), dataset, root)
        data, labels, classes = torch.from_numpy(found.data).permute(0, 3, 1, 2), found.targets, list(found.classes)
    return ArrayImages(f"{dataset}/{split}", data, np.array(labels, np.int64), classes)


DEBIAN_FASHION_MNIST = "/usr/share/datasets/fashion-mnist"  # package dataset-fashion-mnist
FASHION_CLASSES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"]
FASHION_CLASSES += ["Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]


def open_fashion_mnist(data_path, train):
    """70,000 gray images of 28 x 28 px: from --data_path, Debian's package, or the network, in this order."""
    part, root = "train" if train else "t10k", Path(data_path or DOWNLOADS)
    downloaded = root / "FashionMNIST" / "raw"  # where torchvision puts it
    for folder in (root, downloaded, Path(DEBIAN_FASHION_MNIST)):
        paths = [find_idx(folder / f"{part}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1")]
        if all(paths):
            break
    else:
        torchvision_set(
            lambda download: torchvision.datasets.FashionMNIST(root, train, download=download),
            "fashion_mnist",
            root,
            ", or install Debian's package dataset-fashion-mnist, or let a machine with a network download it",
        )
        paths = [find_idx(downloaded / f"{part}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1")]
    data, labels = (torch.from_numpy(read_idx(path)) for path in paths)
    if data.shape[1:] != (28, 28) or labels.shape != data.shape[:1] or (labels >= len(FASHION_CLASSES)).any():
        raise UserError(
            f"{paths[0]} and {paths[1].name} hold arrays of {tuple(data.shape)} and {tuple(labels.shape)}; expected N "
            f"images of 28 x 28 px and N labels below {len(FASHION_CLASSES)}; get them again"
        )
    return ArrayImages(
        f"fashion_mnist/{'train' if train else 'val'}", data[:, None], labels.numpy().astype(np.int64), FASHION_CLASSES
    )


def find_idx(path):
    return next((found for found in (path, path.with_name(path.name + ".gz")) if found.is_file()), None)


LARGEST_IDX = 2**26  # bytes: a damaged .gz may inflate without end; the training images are 47 million


def read_idx(path):
    """A file of MNIST's format: two zeros, type 8 (bytes), number of dimensions, sizes (big-endian), values."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            content = file.read(LARGEST_IDX + 1)
        if len(content) > LARGEST_IDX:
            raise ValueError(f"more than {LARGEST_IDX} bytes")
        if content[:3] != b"\0\0\x08":
            raise ValueError("does not begin as an IDX file of bytes does")
        start = 4 + 4 * content[3]
        return np.frombuffer(content, np.uint8, offset=start).reshape(np.frombuffer(content[4:start], ">u4")).copy()
    except (OSError, EOFError, ValueError, IndexError, zlib.error) as error:
        raise UserError(f"{path} is damaged: {error}; remove it, or get it again") from error


def torchvision_set(open_set, dataset, root, other_ways=""):
    """open_set(download=False), or open_set(download=True) if that fails; one process of a machine at a time."""
    try:
        return open_set(False)
    except (RuntimeError, OSError):  # torchvision's way to say: not there, or not whole
        pass
    try:
        os.makedirs(root, exist_ok=True)
        with open(os.path.join(root, ".download.lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            return open_set(True)
    except Exception as error:  # network, proxy, certificate, disk, archive: all end in the same advice
        raise UserError(
            f"{dataset} is not in {root} and cannot be downloaded ({first_line(error)}): "
            f"give the folder of its files as --data_path{other_ways}"
        ) from error
