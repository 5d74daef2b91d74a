"""What a set of images is to those who read it: names, labels if there are any, pixels on demand.

Shapes: N images of a set, C channels, H x W px.
"""

import bisect
import functools
import hashlib
import math
import os

import numpy as np
import torch

from augmentation import match_channels
from images.folders import enumeration
from images.reading import PLAIN, Reading, has_pages, open_range, split_page, used_range
from utils import UserError


class ImageSet:
    """N images in a fixed order. A kind of set says how it has each of these:

    len(); .labels int64 (N,) or None; .classes names or None; .channels;
    .data uint8 (N, C, H, W) of a set in memory, None where pixels are read when they are needed;
    .fingerprint 16 hexadecimal digits, of what is there and of its order; .summary one line;
    .name(i) for people; .content(i) path or content of an image's file; .reading, a `Reading`: how it is read;
    .load(i, channels) -> (channels, H, W), uint8 or float32 as `load_image` has it, raises BadImage;
    .kept(indices, labels, classes, remark) the set of these images alone;
    .roots folders or files that it lies in; .num_files; .look_at_some(most) os.stat of some of them.
    """

    data, reading = None, PLAIN
    roots, num_files = (), 0
    remarks = ()

    @property
    def channels(self):
        return self.reading.channels

    @property
    def draws(self):
        """((images, how many of them an epoch draws), ...) of each root, in the order of the images."""
        return ((len(self), len(self)),)

    @property
    def summary(self):
        return f"{count(self)} {'; '.join(self.remarks)}"

    def notes(self, most=16):
        """Says whether some images have pages that are not read, and whether images of more than 8 bits leave most of
        their range unused."""
        chosen = evenly(len(self), most)
        paged = sum(has_pages(self.content(index), self.reading) for index in chosen) if not self.reading.pages else 0
        said = [
            f"note: {paged} of {len(chosen)} images looked at have several pages, of which the first is read: --pages "
            "channels or images reads them all"
        ] * (paged > 0)
        return said + self.narrow_ranges(chosen)

    def narrow_ranges(self, chosen):
        """Words on each range, such as that of 16 bits, of which these images use less than a tenth."""
        ranges = [used_range(self.content(index), self.reading) for index in chosen]
        said = []
        for black, white in sorted({found[1] for found in ranges if found} - {(0, 1)}):
            used = [found[0] for found in ranges if found and found[1] == (black, white)]
            low, high = min(low for low, _ in used), max(high for _, high in used)
            settable, bits = white != 255, math.ceil(math.log2(white + 1))
            if (settable and self.reading.value_range) or not 0 < high - low < (white - black) / 10:
                continue
            advice = f"--value_range {low} {high} spreads such values from black to white"
            advice = advice if settable else "are they masks or classes? If they are images, spread them over 0 to 255"
            said.append(
                f"note: {len(used)} of {len(chosen)} images looked at have {bits} bits, with values from {low} to "
                f"{high} only, which become nearly uniform: {advice}"
            )
        return said

    def check_range_is_known(self, most=16):
        """Raises UserError, with the values found in some, where all of these have values whose range is not known."""
        if self.reading.value_range:
            return
        ranges = []
        for index in evenly(len(self), most):
            ranges.append(open_range(self.content(index), self.reading))
            if ranges[-1] is None:
                return
        raise UserError(
            f"--value_range LOW HIGH is needed: images such as {self.name(0)} have floats, signed or 32-bit integers, "
            f"from {min(ranges)[0]:g} to {max(high for _, high in ranges):g} in {len(ranges)} of them; give the values "
            "that are black and white"
        )


def evenly(count, most):
    """Indices below `count`, at most so many, evenly spread."""
    return np.unique(np.linspace(0, count - 1, most).astype(int))


def count(images):
    """ "60 images in 2 classes (cat, dog)" """
    number = f"{len(images)} image{'s' * (len(images) != 1)}"
    if images.classes is None:
        return f"{number} without labels"
    names = f" ({enumeration(images.classes)})" if len(images.classes) <= 5 else ""
    return f"{number} in {len(images.classes)} class{'es' * (len(images.classes) != 1)}{names}"


class Names:
    """Names as one array of bytes: a list of 1.3 million str would be copied into every worker, page by page, as soon
    as its reference counts change."""

    def __init__(self, names):
        """names: list of bytes."""
        self.ends = np.cumsum(np.array([len(name) for name in names], np.int64))
        self.bytes = np.frombuffer(b"".join(names), np.uint8)

    def __len__(self):
        return len(self.ends)

    def __getitem__(self, index):
        return self.bytes[self.ends[index - 1] if index else 0 : self.ends[index]].tobytes()

    def fingerprint(self, sizes, reading):
        """Of the names with a zero between two, of some sizes in bytes, -1 for a file that is not there, and of how
        files are read."""
        digest = hashlib.sha256(np.insert(self.bytes, self.ends[:-1], 0))
        for size in sizes:
            digest.update(b"%d " % size)
        for how in (reading.value_range, (reading.pages, reading.floats)):
            if how not in (None, (None, None)):
                digest.update(b"%r" % (how,))
        return digest.hexdigest()[:16]


class FolderImages(ImageSet):
    """Image files on disk, read when they are needed."""

    def __init__(self, root, names, labels=None, classes=None, reading=PLAIN, remarks=()):
        """root: folder. names: list of bytes, relative to root or absolute. remarks: for the summary, first where the
        images are."""
        self.root, self.labels, self.classes = os.fsencode(root), labels, classes
        self.reading, self.remarks = reading, list(remarks)
        self.names = Names(names)
        self.roots, self.num_files = (self.root,), len(names)

    @functools.cached_property
    def fingerprint(self):
        sizes = (status.st_size if status else -1 for status in self.look_at_some())
        return self.names.fingerprint(sizes, self.reading)

    def look_at_some(self, most=1000):
        """os.stat of `most` files, evenly spread; None for one that is not there, which is named when it is read."""
        for index in evenly(len(self), most):
            try:
                path = self.content(index)
                yield os.stat(split_page(path)[0] if self.reading.pages == "images" else path)
            except OSError:
                yield None

    def __len__(self):
        return len(self.names)

    def name(self, index):
        return os.path.join(self.root, self.names[index]).decode("utf-8", "backslashreplace")

    def content(self, index):
        return os.fsdecode(os.path.join(self.root, self.names[index]))

    def load(self, index, channels=3):
        return self.reading.load(self.content(index), channels)

    def kept(self, indices, labels, classes, remark):
        names = [self.names[index] for index in indices]
        return FolderImages(self.root, names, labels, classes, self.reading, [*self.remarks, remark])


class ArrayImages(ImageSet):
    """A small set in memory. data: uint8 tensor (N, C, H, W)."""

    def __init__(self, name, data, labels=None, classes=None):
        self.set_name, self.data, self.labels, self.classes = name, data.contiguous(), labels, classes
        self.remarks = [f"of {name}"]
        self.reading = Reading(channels=data.shape[1])
        self.fingerprint = hashlib.sha256(self.data.numpy()).hexdigest()[:16]

    def __len__(self):
        return len(self.data)

    def notes(self):
        return []

    def name(self, index):
        return f"{self.set_name}[{index}]"

    def load(self, index, channels=3):
        return match_channels(self.data[index : index + 1], channels)[0]

    def kept(self, indices, labels, classes, remark):
        found = ArrayImages(self.set_name, self.data[torch.from_numpy(indices)], labels, classes)
        found.remarks = [*self.remarks, remark]
        return found


class MixedImages(ImageSet):
    """The images of several roots, one root after the other.

    parts: sets.  weights: how often an epoch draws each image of a part: 1 once, 0.5 every second image, 2 twice.
    labels, classes: of all images together, or None."""

    def __init__(self, parts, weights, labels=None, classes=None, remarks=()):
        self.parts, self.weights, self.labels, self.classes = parts, weights, labels, classes
        self.remarks = list(remarks)
        self.ends = np.cumsum([len(part) for part in parts]).tolist()
        self.reading = parts[0].reading
        self.roots = tuple(root for part in parts for root in part.roots)
        self.num_files = sum(part.num_files for part in parts)

    @property
    def draws(self):
        pairs = zip(self.parts, self.weights, strict=True)
        return tuple((len(part), round(weight * len(part))) for part, weight in pairs)

    @functools.cached_property
    def fingerprint(self):
        text = " ".join(f"{part.fingerprint} {n}" for part, (_, n) in zip(self.parts, self.draws, strict=True))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def summary(self):
        each = [
            f"{part.summary}{f'; an epoch draws {drawn}' * (drawn != len(part))}"
            for part, (_, drawn) in zip(self.parts, self.draws, strict=True)
        ]
        return f"{count(self)} in {len(self.parts)} roots: {' | '.join([*each, *self.remarks])}"

    def notes(self):
        return [note for part in self.parts for note in part.notes()]

    def look_at_some(self, most=1000):
        for part in self.parts:
            yield from part.look_at_some(max(1, most * part.num_files // self.num_files))

    def __len__(self):
        return self.ends[-1]

    def part_of(self, index):
        """(the part, the index in it)"""
        number = bisect.bisect_right(self.ends, index)
        return self.parts[number], index - (self.ends[number - 1] if number else 0)

    def name(self, index):
        part, own = self.part_of(index)
        return part.name(own)

    def content(self, index):
        part, own = self.part_of(index)
        return part.content(own)

    def load(self, index, channels=3):
        part, own = self.part_of(index)
        return part.load(own, channels)

    def kept(self, indices, labels, classes, remark):
        parts, weights, start = [], [], 0
        for part, weight, end in zip(self.parts, self.weights, self.ends, strict=True):
            here = (indices >= start) & (indices < end)
            if here.any():
                parts.append(part.kept(indices[here] - start, labels[here], classes, remark))
                weights.append(weight)
            start = end
        return MixedImages(parts, weights, labels, classes, self.remarks)


def mix(parts, weights, remarks=()):
    """MixedImages, whose classes are the classes of all parts, by name; without labels where a part has none."""
    if any(part.labels is None for part in parts):
        bare = sum(part.labels is None for part in parts)
        said = [f"no labels, as {bare} of {len(parts)} roots have none"] if bare < len(parts) else []
        return MixedImages(parts, weights, remarks=[*remarks, *said])
    classes = sorted({name for part in parts for name in part.classes}, key=os.fsencode)
    number = {name: number for number, name in enumerate(classes)}
    labels = [np.array([number[name] for name in part.classes])[part.labels] for part in parts]
    return MixedImages(parts, weights, np.concatenate(labels).astype(np.int64), classes, remarks)
