"""Where images come from: small sets in memory, folders and lists of files.

    images = open_dataset(args, split)                   # .labels, .classes, len(), .summary; pixels on demand
    images = open_folder("imagenet", "train")            # a folder, without flags
    load_image("cat.jpg")                                # uint8 (3, H, W), upright: reading.py

What a set of images is to those who read it: sets.py.
"""

import argparse
import os
import re
import sys

import numpy as np

import utils
from images.arrays import MOST_PAGES
from images.decoding import BadImage, first_line
from images.folders import NoSplit, enumeration, find_images, read_text
from images.reading import PAGES, PLAIN, Reading, load_image, number_of_pages
from images.sets import ArrayImages, FolderImages, ImageSet, mix
from images.shards import is_shard, kind_of, open_shards
from images.small_sets import open_small_set
from utils import UserError

__all__ = ["ArrayImages", "BadImage", "FolderImages", "ImageSet", "first_line", "load_image"]

# Flags ----------------------------------------------------------------------------------------------------------------

# img_size, mean and std of the training images on the [0, 1] scale; imagefolder takes ImageNet's
DATASETS = {
    "imagefolder": {"img_size": 224, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)},
    "fashion_mnist": {"img_size": 28, "mean": (0.2860,), "std": (0.3530,)},
    "cifar10": {"img_size": 32, "mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616)},
    "cifar100": {"img_size": 32, "mean": (0.5071, 0.4865, 0.4409), "std": (0.2673, 0.2564, 0.2762)},
    "svhn": {"img_size": 32, "mean": (0.4377, 0.4438, 0.4728), "std": (0.1980, 0.2010, 0.1970)},
}


class OneOrSeveral(argparse.Action):
    """Of nargs="+": a single value stays itself."""

    def __call__(self, parser, args, values, option_string=None):
        setattr(args, self.dest, values if len(values) > 1 else values[0])


def add_image_arguments(parser):
    """Adds the flags that say which images are read, and how their files become pixels."""
    add = parser.add_argument
    add(
        "--dataset",
        default="fashion_mnist",
        choices=sorted(DATASETS),
        help="imagefolder: your own images, whatever --data_path holds; the others: small known sets, kept in memory",
    )
    add(
        "--data_path",
        nargs="+",
        action=OneOrSeveral,
        default=None,
        metavar="PATH[:WEIGHT]",
        help="imagefolder: a folder of class folders, a folder of images without labels (flat or nested), a text file "
        "with one path per line, or shards (.tar, .zip, .parquet, .arrow, .h5) or a folder of these; train/ and val/ "
        "(or test/) in it are found; hf://NAME asks Hugging Face's hub. Several of them are one set: of A B:0.5 an "
        "epoch draws each image of A once and every second of B. Other data sets: where their files are, or where to "
        "download them to",
    )
    add(
        "--class_list",
        default=None,
        metavar="FILE",
        help="keep only the classes named in this file, one per line or separated by blanks; imagenet100_classes.txt "
        "makes ImageNet-100 out of ImageNet",
    )
    add(
        "--value_range",
        type=utils.Number(float),
        nargs=2,
        default=None,
        metavar=("LOW", "HIGH"),
        help="raw values that become black and white in images of more than 8 bits, such as 0 4095 for 12 bits kept in "
        "16; floats, 32-bit and signed integers need it. Default: 0 65535 for 16 bits",
    )
    add(
        "--pages",
        choices=PAGES,
        default=None,
        help="of a TIFF or DICOM file of several: the first page is the image, or each page is one of its channels, or "
        "each is an image of its own (of an .npy then the first axis counts images). Default: first for 1 and 3 "
        "channels, else channels",
    )
    add(
        "--float_pixels",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="keep what images have beyond 256 levels, as float32, four times the bytes between workers and device. "
        "Default: not for 1 and 3 channels, whose 16-bit images are rounded to 256 levels",
    )


def reading_of(args):
    """How --value_range, --pages, --float_pixels and --in_chans say that files are read."""
    pages, floats = (getattr(args, name, None) for name in ("pages", "float_pixels"))
    channels = 3 if args.in_chans == 1 else args.in_chans
    return Reading(check_range(getattr(args, "value_range", None)), pages, floats, channels)


# Data sets ------------------------------------------------------------------------------------------------------------


def open_dataset(args, split="train"):
    """The images that --dataset, --data_path and --class_list name; the first process says in one line what they are.

    split: "train", or "val" for those to evaluate on: the test set of the small sets, the folder val/ (or test/) beside
    train/. Returns an ImageSet, see sets.py. Raises UserError if they cannot be found or read, with where they were
    looked for.
    """
    if split not in ("train", "val"):
        raise ValueError(f"split is {split!r}, expected 'train' or 'val'")
    if args.dataset == "imagefolder":
        images = open_roots(args.data_path, split, reading_of(args))
    elif isinstance(args.data_path, list):
        raise UserError(f"--data_path has {len(args.data_path)} values; --dataset {args.dataset} has one place")
    else:
        images = open_small_set(args.dataset, args.data_path, split)
    if args.class_list:
        images = keep_classes(images, args.class_list)
    if images.data is None:
        images.check_range_is_known()
    if utils.rank() == 0:
        print("\n".join([f"{split}: {images.summary}", *images.notes()]), file=sys.stderr)  # stdout is for tables
    return images


def open_roots(data_path, split="train", reading=PLAIN):
    """The images of one root, or of several as one set, see MixedImages. data_path: PATH[:WEIGHT], or several."""
    opened, without = [], []
    for path, weight in roots_of(data_path if isinstance(data_path, list) else [data_path]):
        try:
            opened.append((open_folder(path, split, reading), weight if split == "train" else 1.0))
        except NoSplit as error:
            if split == "train":
                raise
            without.append(error)
    if not opened:
        raise without[0]
    if len(opened) == 1 and opened[0][1] == 1.0:
        return opened[0][0]
    return mix(*zip(*opened, strict=True), [f"none in {len(without)} roots: {without[0]}"] if without else [])


def roots_of(texts):
    """[(path or list of shards, weight), ...]: shards of one kind that are named one after the other are one root."""
    roots = []
    for path, weight in map(path_and_weight, texts):
        together = len(texts) > 1 and weight == 1.0 and is_shard(path)
        before = roots[-1][0] if roots else None
        if together and isinstance(before, list) and kind_of(before[0]) is kind_of(path):
            before.append(path)
        else:
            roots.append(([path] if together else path, weight))
    return roots


def path_and_weight(text):
    """ "B:0.5" -> ("B", 0.5); what is there under its whole name has no weight."""
    path, _, weight = (text or "").rpartition(":")
    if not path or os.path.lexists(text) or not re.fullmatch(r"[0-9.]+(e-?[0-9]+)?", weight):
        return text, 1.0
    try:
        weight = utils.Number(float, above=0, most=1000)(weight)
    except argparse.ArgumentTypeError as error:
        raise UserError(f"--data_path {text}: the weight after the colon: {error}") from None
    return path, weight


def open_folder(path, split="train", reading=PLAIN):
    """A split of a folder, of a text file that lists images (folders.py), or of shards (shards.py)."""
    in_shards = (
        None if path is None else open_shards([path] if isinstance(path, (str, os.PathLike)) else path, split, reading)
    )
    if in_shards is not None:
        return in_shards
    found = find_images(path, split)
    remarks, names, labels = [f"of {found.place}", *found.remarks], found.names, found.labels
    if reading.pages == "images":
        names, labels, said = page_by_page(found)
        remarks += said
    images = FolderImages(found.root, names, labels, found.classes, reading, remarks)
    if not any(images.look_at_some(20)):
        raise UserError(f"--data_path {path}: none of its images is there, such as {images.name(0)}")
    return images


def page_by_page(found):
    """(names of pages, labels or None, remarks) of the files in a `Found`: scan.tif#0, scan.tif#1, ..."""
    counts = [number_of_pages(os.path.join(found.root, os.fsdecode(name))) for name in found.names]
    remarks = [f"each page of {len(counts)} files"]
    if too_many := sum(count > MOST_PAGES for count in counts):
        remarks.append(f"of {too_many} with more than {MOST_PAGES:,} pages the first page alone: split them")
    counts = [count if count <= MOST_PAGES else 1 for count in counts]
    names = [b"%s#%d" % (name, page) for name, count in zip(found.names, counts, strict=True) for page in range(count)]
    return names, None if found.labels is None else np.repeat(found.labels, counts), remarks


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
    left_out = f"{len(images.classes) - len(classes)} classes left out by --class_list {class_list}"
    return images.kept(kept, new_label[kept], classes, left_out)
