"""What a set of images is to those who read it: names, labels if there are any, pixels on demand.

Shapes: N images of a set, C channels, H x W px.
"""

import functools
import hashlib
import os

import numpy as np

from augmentation import match_channels
from images.decoding import load_image, used_range
from images.folders import enumeration


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
