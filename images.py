"""Where images come from and how they are decoded: small sets in memory, folders and lists of files.

    images = open_dataset(args, split)                   # .labels, .classes, len(); pixels on demand
    load_image("cat.jpg")                                # uint8 (3, H, W), upright

Shapes: N images of a set, C channels, H x W px.
"""

import fcntl
import functools
import gzip
import hashlib
import io
import os
import stat
import warnings
import zlib
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image, ImageOps, UnidentifiedImageError
from torchvision.io import ImageReadMode, decode_jpeg

from augmentation import match_channels
from utils import UserError

# Flags ----------------------------------------------------------------------------------------------------------------

# img_size, mean and std of the training images on the [0, 1] scale; imagefolder takes ImageNet's
DATASETS = {
    "imagefolder": {"img_size": 224, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)},
    "fashion_mnist": {"img_size": 28, "mean": (0.2860,), "std": (0.3530,)},
    "cifar10": {"img_size": 32, "mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616)},
    "cifar100": {"img_size": 32, "mean": (0.5071, 0.4865, 0.4409), "std": (0.2673, 0.2564, 0.2762)},
    "svhn": {"img_size": 32, "mean": (0.4377, 0.4438, 0.4728), "std": (0.1980, 0.2010, 0.1970)},
}


# Data sets ------------------------------------------------------------------------------------------------------------


def open_dataset(args, split="train"):
    """The images that --dataset, --data_path and --class_list name.

    split: "train", or "val" for those to evaluate on: the test set of the small sets, the folder val/ (or test/) beside
    train/. Returns FolderImages or ArrayImages. Raises UserError if they cannot be found or read, with where they were
    looked for.
    """
    if split not in ("train", "val"):
        raise ValueError(f"split is {split!r}, expected 'train' or 'val'")
    if args.dataset == "imagefolder":
        images = open_folder(args.data_path, split)
    else:
        images = open_small_set(args.dataset, args.data_path, split)
    return keep_classes(images, args.class_list) if args.class_list else images


class FolderImages:
    """Image files on disk, read when they are needed.

    len(); .labels int64 (N,) or None; .classes names or None; .channels; .fingerprint of the names in their order and
    of some files' sizes;
    .name(i); .load(i, channels) -> uint8 (channels, H, W), raises BadImage.
    The names are one array of bytes: a list of 1.3 million str would be copied into every worker, page by page, as
    soon as its reference counts change.
    """

    channels = 3

    def __init__(self, root, names, labels=None, classes=None):
        """root: folder. names: list of bytes, relative to root or absolute."""
        self.root, self.labels, self.classes = os.fsencode(root), labels, classes
        self.ends = np.cumsum([len(name) for name in names])
        self.bytes = np.frombuffer(b"".join(names), np.uint8)

    @functools.cached_property
    def fingerprint(self):
        digest = hashlib.sha256(np.insert(self.bytes, self.ends[:-1], 0))  # the names with a zero between two
        for status in self.look_at_some():
            digest.update(b"%d " % (status.st_size if status else -1))
        return digest.hexdigest()[:16]

    def look_at_some(self, most=1000):
        """os.stat of `most` files, evenly spread; None for one that is not there, which is named when it is read."""
        for index in np.unique(np.linspace(0, len(self) - 1, most).astype(int)):
            try:
                yield os.stat(os.path.join(self.root, self.relative_name(index)))
            except OSError:
                yield None

    def __len__(self):
        return len(self.ends)

    def relative_name(self, index):
        return self.bytes[self.ends[index - 1] if index else 0 : self.ends[index]].tobytes()

    def name(self, index):
        return os.path.join(self.root, self.relative_name(index)).decode("utf-8", "backslashreplace")

    def load(self, index, channels=3):
        return load_image(os.fsdecode(os.path.join(self.root, self.relative_name(index))), channels)


class ArrayImages:
    """A small set in memory. data: uint8 tensor (N, C, H, W); the rest as in FolderImages."""

    def __init__(self, name, data, labels=None, classes=None):
        self.set_name, self.data, self.labels, self.classes = name, data.contiguous(), labels, classes
        self.channels = data.shape[1]
        self.fingerprint = hashlib.sha256(self.data.numpy()).hexdigest()[:16]

    def __len__(self):
        return len(self.data)

    def name(self, index):
        return f"{self.set_name}[{index}]"

    def load(self, index, channels=3):
        return match_channels(self.data[index : index + 1], channels)[0]


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
    if len(kept) == 0:
        raise UserError(f"--class_list {class_list}: the folders of its {len(names)} classes hold no images")
    if isinstance(images, FolderImages):
        return FolderImages(
            os.fsdecode(images.root), [images.relative_name(index) for index in kept], new_label[kept], classes
        )
    return ArrayImages(images.set_name, images.data[torch.from_numpy(kept)], new_label[kept], classes)


def read_text(path, flag):
    try:
        return Path(path).read_text(encoding="utf-8", errors="surrogateescape")
    except OSError as error:
        raise UserError(f"{flag} {path} cannot be read: {error.strerror}") from error


# Folders --------------------------------------------------------------------------------------------------------------

# torchvision's, without .gif-like rarities; a text file may name any file of FORMATS
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


def open_folder(data_path, split):
    if data_path is None:
        raise UserError(
            "--dataset imagefolder needs --data_path: a folder of images, or a text file with one path per line"
        )
    root = Path(data_path)
    try:
        is_list = root.is_file()
    except (OSError, ValueError) as error:  # too long, or with a zero byte
        raise UserError(f"--data_path {data_path} is no path: {error}") from None
    if is_list:
        if split == "val":
            raise UserError(f"--data_path {data_path} is a list of images, without a validation part: give a folder")
        return open_list(root)
    root = split_folder(root, split)
    names, folders = scan(os.fsencode(root))
    if not names:
        raise UserError(f"no images in {root}: looked in it and the folders below for {' '.join(EXTENSIONS)}")
    tops = [name.split(b"/", 1)[0] if b"/" in name else None for name in names]
    if None in tops or len(set(tops)) < 2:  # images beside folders, or all in one folder: not classes
        return FolderImages(root, names)
    label = {folder: number for number, folder in enumerate(folders)}
    return FolderImages(
        root, names, np.array([label[top] for top in tops], np.int64), [os.fsdecode(folder) for folder in folders]
    )


def open_list(path):
    """One path per line, relative to the list's own folder or absolute."""
    names = [os.fsencode(line.strip()) for line in read_text(path, "--data_path").splitlines() if line.strip()]
    if not names:
        raise UserError(f"--data_path {path} names no image: expected one path per line")
    return FolderImages(path.parent, names)


def split_folder(root, split):
    """root/train or root itself; root/val, root/test, or those beside a root that is itself called train."""
    if split == "train":
        return root / "train" if (root / "train").is_dir() else root
    parent = root.parent if root.name == "train" and not (root / "val").is_dir() else root
    tried = [parent / "val", parent / "test"]
    for folder in tried:
        if folder.is_dir():
            return folder
    raise UserError(f"no validation images for --data_path {root}: looked for {' and '.join(map(str, tried))}")


def leads_to_folder(entry):
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself: a bad image, if it is named as one
        return False


def scan(root):
    """(names of all images below root, relative to it, names of the folders in root), sorted, as bytes.

    Links are followed, but not one that leads back to a folder it is in. A broken link counts as an image, a bad one:
    dropping it would be silent. Hidden files and folders are passed over.
    """
    names, top_folders = [], []

    def visit(folder, prefix, ancestors):
        try:
            identity = os.stat(folder)
            with os.scandir(folder) as entries:
                shown = [entry for entry in entries if not entry.name.startswith(b".")]
                entries = sorted((entry.name, leads_to_folder(entry)) for entry in shown)
        except OSError as error:
            raise UserError(
                f"folder {os.fsdecode(folder)} cannot be read: {error.strerror}; see --data_path"
            ) from error
        identity = (identity.st_dev, identity.st_ino)
        if identity in ancestors:
            return
        for name, is_folder in entries:
            if is_folder:
                if not prefix:
                    top_folders.append(name)
                visit(os.path.join(folder, name), prefix + name + b"/", ancestors | {identity})
            elif os.path.splitext(name)[1].lower().decode("ascii", "replace") in EXTENSIONS:
                names.append(prefix + name)

    visit(root, b"", frozenset())
    return names, top_folders


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


LARGEST_IDX = 2**26  # bytes, inflated; the training images are 47 million


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


# Decoding -------------------------------------------------------------------------------------------------------------


def load_image(path, channels=3):
    """A file -> uint8 (channels, H, W), upright; channels 3 (RGB) or 1 (luma).

    JPEG, PNG, WebP, TIFF, BMP, PPM, GIF and the rest of FORMATS, of any colour mode; 16-bit gray is scaled to 8 bits,
    not clipped; alpha is dropped, as in DINO; EXIF orientation is applied; of an animation the first frame.
    Raises BadImage if the file is missing, damaged, truncated or declares more pixels than PIL thinks safe.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata: it does not change the pixels
            return decode(read_file(path), channels)
    except BadImage:
        raise
    except UnidentifiedImageError as error:  # PIL's own words name an object in memory
        raise BadImage(f"not an image of any known format ({', '.join(FORMATS)})") from error
    except Exception as error:  # decoders raise nearly every type there is on a damaged file
        raise BadImage(f"{type(error).__name__}: {first_line(error)}") from error


def read_file(path):
    """The content of a regular file: a pipe would wait for ever, a device has no end."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise BadImage("not a regular file but a directory, pipe or device")
    return Path(path).read_bytes()


# whatever a file is called. Not all that PIL knows: for PostScript it starts the program gs
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "DIB", "PPM", "GIF", "JPEG2000", "TGA", "ICO")


def decode(data, channels):
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        width, height = image.size
        if width * height > Image.MAX_IMAGE_PIXELS:
            raise BadImage(
                f"declares {width} x {height} px, more than PIL's limit of {Image.MAX_IMAGE_PIXELS} px in all"
            )
        if image.format in ("JPEG", "MPO") and image.mode in ("L", "RGB"):  # 3 times faster than PIL
            mode = ImageReadMode.RGB if channels == 3 else ImageReadMode.GRAY
            return decode_jpeg(
                torch.from_numpy(np.frombuffer(data, np.uint8).copy()), mode=mode, apply_exif_orientation=True
            )
        pixels = np.array(convert(ImageOps.exif_transpose(image), "RGB" if channels == 3 else "L"))
    return torch.from_numpy(pixels).reshape(*pixels.shape[:2], channels).permute(2, 0, 1)


EIGHT_BITS = np.rint(np.arange(65536) / 257).astype(np.uint8)  # a table: float64 would take 8 bytes a pixel


def convert(image, mode):
    if image.mode == "F":
        raise BadImage("32-bit float pixels: their range is not known")
    if image.mode.startswith("I"):  # 16-bit gray, which PIL would clip at 255
        image = Image.fromarray(EIGHT_BITS[np.asarray(image).clip(0, 65535)])
    elif image.mode in ("P", "PA", "LA", "La", "RGBa"):
        image = image.convert("RGBA")
    return image.convert(mode)


class BadImage(Exception):
    """A file that is not a whole, readable image."""


def first_line(error):
    return str(error).strip().partition("\n")[0] or type(error).__name__
