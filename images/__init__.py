"""Where images come from: small sets in memory, folders and lists of files.

    images = open_dataset(args, split)                   # .labels, .classes, len(), .summary; pixels on demand
    images = open_folder("imagenet", "train")            # the same without flags
    load_image("cat.jpg")                                # uint8 (3, H, W), upright: decoding.py

Shapes: N images of a set, C channels, H x W px.
"""

import fcntl
import functools
import gzip
import hashlib
import os
import sys
import zlib
from pathlib import Path

import numpy as np
import torch
import torchvision

import utils
from augmentation import match_channels
from images.decoding import BadImage, first_line, load_image, used_range
from images.folders import enumeration, find_images, read_text
from utils import UserError

__all__ = ["BadImage", "first_line", "load_image"]

# Flags ----------------------------------------------------------------------------------------------------------------

# img_size, mean and std of the training images on the [0, 1] scale; imagefolder takes ImageNet's
DATASETS = {
    "imagefolder": {"img_size": 224, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)},
    "fashion_mnist": {"img_size": 28, "mean": (0.2860,), "std": (0.3530,)},
    "cifar10": {"img_size": 32, "mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616)},
    "cifar100": {"img_size": 32, "mean": (0.5071, 0.4865, 0.4409), "std": (0.2673, 0.2564, 0.2762)},
    "svhn": {"img_size": 32, "mean": (0.4377, 0.4438, 0.4728), "std": (0.1980, 0.2010, 0.1970)},
}


def add_image_arguments(parser):
    parser.add_argument(
        "--value_range",
        type=utils.Number(float),
        nargs=2,
        default=None,
        metavar=("LOW", "HIGH"),
        help="raw values that become black and white in images of more than 8 bits, such as 0 4095 for 12 bits kept in "
        "16; floats, 32-bit and signed integers need it. Default: 0 65535 for 16 bits",
    )


# Data sets ------------------------------------------------------------------------------------------------------------


def open_dataset(args, split="train"):
    """The images that --dataset, --data_path and --class_list name; the first process says in one line what they are.

    split: "train", or "val" for those to evaluate on: the test set of the small sets, the folder val/ (or test/) beside
    train/. Returns FolderImages or ArrayImages. Raises UserError if they cannot be found or read, with where they were
    looked for.
    """
    if split not in ("train", "val"):
        raise ValueError(f"split is {split!r}, expected 'train' or 'val'")
    if args.dataset == "imagefolder":
        images = open_folder(args.data_path, split, check_range(getattr(args, "value_range", None)))
    else:
        images = open_small_set(args.dataset, args.data_path, split)
    if args.class_list:
        images = keep_classes(images, args.class_list)
    if utils.rank() == 0:
        print("\n".join([f"{split}: {images.summary}", *images.notes()]), file=sys.stderr)  # stdout is for tables
    return images


def open_folder(path, split="train", value_range=None):
    """FolderImages of a split of a folder, or of a text file that lists images; see folders.py and `load_image`."""
    found = find_images(path, split)
    remarks = [f"of {found.place}", *found.remarks]
    images = FolderImages(found.root, found.names, found.labels, found.classes, value_range, remarks)
    if not any(images.look_at_some(20)):
        raise UserError(f"--data_path {path}: none of its images is there, such as {images.name(0)}")
    return images


def check_range(value_range):
    """--value_range as a tuple, or None. Raises UserError."""
    if value_range is None:
        return None
    low, high = value_range
    if not (low < high):
        raise UserError(f"--value_range {low:g} {high:g}: expected two numbers, the lower one first")
    return low, high


def check_same_classes(train_images, val_images):
    """Raises UserError where labels of two sets do not mean the same: they count the classes of each set."""
    train, val = train_images.classes, val_images.classes
    if train == val:
        return
    only = {"train": sorted(set(train or ()) - set(val or ())), "val": sorted(set(val or ()) - set(train or ()))}
    differ = [f"only in {split}: {enumeration(names)}" for split, names in only.items() if names]
    raise UserError(
        f"train and val have different class folders, {len(train or ())} and {len(val or ())} ({'; '.join(differ)}): "
        "see --data_path, and --class_list, which keeps those that both have"
    )


class FolderImages:
    """Image files on disk, read when they are needed.

    len(); .labels int64 (N,) or None; .classes names or None; .channels; .fingerprint of the names in their order, of
    some files' sizes and of value_range; .summary one line; .notes() lines on what looks wrong;
    .name(i); .load(i, channels) -> uint8 (channels, H, W), raises BadImage.
    The names are one array of bytes: a list of 1.3 million str would be copied into every worker, page by page, as
    soon as its reference counts change.
    """

    channels = 3

    def __init__(self, root, names, labels=None, classes=None, value_range=None, remarks=()):
        """root: folder. names: list of bytes, relative to root or absolute. value_range: see `load_image`. remarks: for
        the summary, first where the images are."""
        self.root, self.labels, self.classes = os.fsencode(root), labels, classes
        self.value_range, self.remarks = value_range, list(remarks)
        self.ends = np.cumsum([len(name) for name in names])
        self.bytes = np.frombuffer(b"".join(names), np.uint8)

    @functools.cached_property
    def fingerprint(self):
        digest = hashlib.sha256(np.insert(self.bytes, self.ends[:-1], 0))  # the names with a zero between two
        for status in self.look_at_some():
            digest.update(b"%d " % (status.st_size if status else -1))
        if self.value_range:
            digest.update(b"%r" % (self.value_range,))
        return digest.hexdigest()[:16]

    def look_at_some(self, most=1000):
        """os.stat of `most` files, evenly spread; None for one that is not there, which is named when it is read."""
        for index in np.unique(np.linspace(0, len(self) - 1, most).astype(int)):
            try:
                yield os.stat(os.path.join(self.root, self.relative_name(index)))
            except OSError:
                yield None

    @property
    def summary(self):
        return f"{count(self)} {'; '.join(self.remarks)}"

    def notes(self, most=16):
        """Says whether the images of more than 8 bits, among some, leave most of their range unused."""
        chosen = np.unique(np.linspace(0, len(self) - 1, most).astype(int))
        ranges = [found for found in map(used_range, map(self.path, chosen)) if found]
        if self.value_range or not ranges:
            return []
        low, high = min(low for low, _ in ranges), max(high for _, high in ranges)
        if high - low >= 65535 / 10:
            return []
        return [
            f"note: {len(ranges)} of {len(chosen)} images looked at have 16 bits, with values from {low} to {high} "
            f"only, which become nearly uniform: --value_range {low} {high} spreads such values from black to white"
        ]

    def __len__(self):
        return len(self.ends)

    def relative_name(self, index):
        return self.bytes[self.ends[index - 1] if index else 0 : self.ends[index]].tobytes()

    def name(self, index):
        return os.path.join(self.root, self.relative_name(index)).decode("utf-8", "backslashreplace")

    def path(self, index):
        return os.fsdecode(os.path.join(self.root, self.relative_name(index)))

    def load(self, index, channels=3):
        return load_image(self.path(index), channels, self.value_range)


class ArrayImages:
    """A small set in memory. data: uint8 tensor (N, C, H, W); the rest as in FolderImages."""

    def __init__(self, name, data, labels=None, classes=None):
        self.set_name, self.data, self.labels, self.classes = name, data.contiguous(), labels, classes
        self.summary = f"{count(self)} of {name}"
        self.channels = data.shape[1]
        self.fingerprint = hashlib.sha256(self.data.numpy()).hexdigest()[:16]

    def __len__(self):
        return len(self.data)

    def notes(self):
        return []

    def name(self, index):
        return f"{self.set_name}[{index}]"

    def load(self, index, channels=3):
        return match_channels(self.data[index : index + 1], channels)[0]


def count(images):
    """ "60 images in 2 classes (cat, dog)" """
    number = f"{len(images)} image{'s' * (len(images) != 1)}"
    if images.classes is None:
        return f"{number} without labels"
    names = f" ({enumeration(images.classes)})" if len(images.classes) <= 5 else ""
    return f"{number} in {len(images.classes)} class{'es' * (len(images.classes) != 1)}{names}"


def keep_classes(images, class_list):
    """The images of the classes named in the file class_list, labels counted anew in the order of the names."""
    if images.classes is None:
        raise UserError(f"--class_list {class_list} needs images in class folders; these have no classes")
    lines = read_text(class_list, "--class_list").splitlines()
    names = {name for line in lines for name in ([line.strip()] if line.strip() in images.classes else line.split())}
    missing = sorted(names - set(images.classes))
    if missing or not names:
        raise UserError(
            f"--class_list {class_list}: {len(missing)} of its {len(names)} classes are not in the data set, which has "
            f"{len(images.classes)}: {', '.join(missing[:3]) or 'the file is empty'}{', ...' if missing[3:] else ''}"
        )
    classes = [name for name in images.classes if name in names]
    new_label = np.array([classes.index(name) if name in names else -1 for name in images.classes])[images.labels]
    kept = np.flatnonzero(new_label >= 0)
    if isinstance(images, FolderImages):
        root, paths = os.fsdecode(images.root), [images.relative_name(index) for index in kept]
        left_out = f"{len(images.classes) - len(classes)} classes left out by --class_list {class_list}"
        remarks = [*images.remarks, left_out]
        return FolderImages(root, paths, new_label[kept], classes, images.value_range, remarks)
    return ArrayImages(images.set_name, images.data[torch.from_numpy(kept)], new_label[kept], classes)


# Small sets -----------------------------------------------------------------------------------------------------------


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
