"""HDF5 files: a data set `images` of arrays or of encoded files, with `labels`, `names` and `classes` where there are.

They stand at the top, or in groups called as splits are, such as train and val.
"""

import io
import os

import numpy as np

from images.folders import KIND_OF_WORD
from images.listing import LARGEST, Broken, Listing, label_text
from utils import UserError

LEAST = 2**23  # bytes of labels, names or classes that any file may have: they may be compressed
IMAGES, LABELS, NAMES, CLASSES = ("images", "image"), ("labels", "label"), ("names", "paths"), ("classes",)


def h5py():
    try:
        import h5py
    except ImportError as error:
        raise UserError("an HDF5 file is read by h5py, which is not installed: pip install h5py") from error
    return h5py


class HDF5:
    """place: number of the group, row in it. The file is opened by each process that reads it."""

    has_folders, size_column = True, None

    def __init__(self, path):
        self.file = h5py().File(path, "r")
        self.groups = groups_of(self.file)
        self.images = [images_of(group) for _, group in self.groups]

    def read(self, place):
        """The bytes of an encoded image; an array as the bytes of an .npy file."""
        group, row = map(int, place)
        value = self.images[group][row]
        if self.images[group].ndim == 1:
            return bytes(value) if isinstance(value, bytes) else np.asarray(value, np.uint8).tobytes()
        content = io.BytesIO()
        np.lib.format.write_array(content, value, allow_pickle=False)
        return content.getvalue()

    def close(self):
        self.file.close()

    @staticmethod
    def look(path):
        shard, listing = HDF5(path), Listing(width=2)
        try:
            for number, (split, group) in enumerate(shard.groups):
                list_group(listing, number, split, group, shard.images[number], path)
        finally:
            shard.close()
        return listing, ""


def groups_of(file):
    """[("", file)], or [("train", group), ...]"""
    if find(file, IMAGES) is not None:
        return [("", file)]
    splits = [name for name in file if name.lower() in KIND_OF_WORD and is_own(file, name, h5py().Group)]
    found = [(name, file[name]) for name in splits if find(file[name], IMAGES) is not None]
    if not found:
        there = ", ".join(f"{name} {shape_of(file, name)}".strip() for name in list(file)[:8])
        raise Broken(f"it holds {there or 'nothing'}; expected a data set images, or groups train and val with one")
    return found


def shape_of(group, name):
    return group[name].shape if is_own(group, name, h5py().Dataset) else ""


def is_own(group, name, kind):
    """Whether it lies in this file: a link may lead to any other."""
    return isinstance(group.get(name, getlink=True), h5py().HardLink) and group.get(name, getclass=True) is kind


def find(group, names):
    return next((group[name] for name in names if is_own(group, name, h5py().Dataset)), None)


def images_of(group):
    """The data set of images. Raises Broken for one that is not what it can be, or larger than it is allowed to be."""
    images, lib = find(group, IMAGES), h5py()
    if images.is_virtual or images.external:
        raise Broken("its images lie in other files, which are not read")
    if images.ndim == 1:
        kind = lib.check_vlen_dtype(images.dtype)
        if not (kind == np.uint8 or images.dtype.kind in "SV" or lib.check_string_dtype(images.dtype)):
            raise Broken(f"images of type {images.dtype}; expected arrays, or encoded files as bytes")
    elif images.ndim not in (3, 4) or images.dtype.kind not in "uif":
        raise Broken(f"images of shape {images.shape} and type {images.dtype}; expected (N, H, W, C), or encoded files")
    one = int(np.prod(images.shape[1:], dtype=np.float64)) * images.dtype.itemsize
    chunk = int(np.prod(images.chunks or (1,), dtype=np.float64)) * images.dtype.itemsize
    if max(one, chunk) > LARGEST:
        raise Broken(f"images or pieces of {max(one, chunk)} bytes, more than {LARGEST}")
    return images


def list_group(listing, number, split, group, images, path):
    count = len(images)
    if count > os.path.getsize(path):
        raise Broken(f"says that it holds {count} images in {os.path.getsize(path)} bytes")
    labels, names = texts(group, LABELS, count, path), texts(group, NAMES, count, path)
    classes = class_names(group, path)
    prefix = f"{split}/" if split else ""
    stem = os.path.splitext(os.path.basename(path))[0]
    for row in range(count):
        label = labels[row] if labels else None
        if classes and isinstance(label, int):
            label = classes[label] if 0 <= label < len(classes) else None
        name = os.fsencode(label_text(names[row]) or "") if names else b""
        name = name.replace(b"..", b"").strip(b"/") or f"{stem}-{row:012d}".encode()
        listing.add(prefix.encode() + name, (number, row), label_text(label))


def texts(group, names, count, path):
    """The values of a data set of one number or text for each image; None where there is none."""
    found = find(group, names)
    if found is None:
        return None
    if found.shape[:1] != (count,) or np.prod(found.shape) != count:
        raise Broken(f"{found.name.rsplit('/', 1)[-1]} of shape {found.shape} beside {count} images")
    return read_whole(found, path).reshape(-1).tolist()


def class_names(group, path):
    """Names of the numbers in labels: a data set or an attribute `classes`."""
    found = find(group, CLASSES)
    values = group.attrs.get("classes") if found is None else read_whole(found, path)
    return None if values is None else [label_text(value) for value in np.asarray(values).reshape(-1).tolist()]


def read_whole(found, path):
    """All values of a data set. Raises Broken where it says that it has more than the file can hold: what was never
    written is a number or a text nevertheless."""
    size = int(np.prod(found.shape, dtype=np.float64)) * found.dtype.itemsize
    if size > max(LEAST, os.path.getsize(path)):
        raise Broken(f"{found.name.rsplit('/', 1)[-1]} of shape {found.shape} and type {found.dtype}: {size} bytes")
    return found[()]
