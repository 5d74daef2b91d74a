"""What a shard holds: the common form in which every kind of shard is listed, and the limits on what is read of one.

A shard is a file of many images: tar, zip, Parquet, Arrow, HDF5. Its names are text and never become paths.
"""

import array
import dataclasses
import json
import os
from collections import Counter

import numpy as np

from images.decoding import known_endings, late_endings
from images.folders import ending_of, is_hidden

LARGEST = 2**29  # bytes of one image, as it is stored and inflated: 16 bits of PIL's limit of pixels, three channels
LARGEST_LABEL = 2**16  # bytes of a file with a label
LONGEST_NAME = 4096  # bytes


class Broken(Exception):
    """A shard that cannot be read, or not to its end."""


@dataclasses.dataclass
class Listing:
    """The images of a shard, in its own order.

    width: how many integers say where an image lies; places: so many for each image.
    names: bytes.  labels: a text for each image, or None.  captions: whether labels are whole texts, which may be
    captions rather than classes.  passed: what is no image, counted.  fault: where the shard is broken, or "".
    """

    width: int
    names: list = dataclasses.field(default_factory=list)
    places: array.array = dataclasses.field(default_factory=lambda: array.array("q"))
    labels: list = dataclasses.field(default_factory=list)
    captions: bool = False
    passed: Counter = dataclasses.field(default_factory=Counter)
    fault: str = ""

    def __len__(self):
        return len(self.names)

    def add(self, name, place, label=None):
        self.names.append(name)
        self.places.extend(place)
        self.labels.append(label)

    def as_json(self):
        names = list(map(os.fsdecode, self.names))
        return json.dumps(vars(self) | {"places": self.places.tolist(), "names": names})

    @classmethod
    def from_json(cls, text):
        fields = json.loads(text)
        fields["places"] = array.array("q", fields["places"])
        fields["names"] = list(map(os.fsencode, fields["names"]))
        return cls(**fields | {"passed": Counter(fields["passed"])})

    def table(self):
        """int64 (N, width) of the places."""
        return np.array(self.places, np.int64).reshape(-1, self.width)


def clean(name):
    """A member's name as a folder would give it, without "/" at its start and without "."; None where it is hidden or
    leads upwards."""
    parts = [part for part in name.split(b"/") if part not in (b"", b".")]
    if not parts or any(map(is_hidden, parts)):  # ".." begins as a hidden name does
        return None
    return b"/".join(parts)


def kind_of_member(name):
    """ "image", or what the tally of the members that are passed over calls it."""
    cleaned = clean(name)
    if cleaned is None:
        return "with .. in its name" if b".." in name.split(b"/") else "hidden"
    if len(cleaned) > LONGEST_NAME:
        return "of a name too long"
    ending = ending_of(cleaned)
    return "image" if ending in known_endings() | late_endings() else ending or "without ending"


# Labels of WebDataset: files beside the image, of its name up to the first dot ----------------------------------------

LABEL_ENDINGS = (".cls", ".json", ".txt")  # the first that an image has
KEYS = ("label", "cls", "class", "class_name", "target")  # of .json


def key_of(name):
    """ "a.b/001.seg.png" -> "a.b/001" """
    folder, slash, base = name.rpartition(b"/")
    return folder + slash + base.partition(b".")[0]


def label_in(ending, content):
    """The label that a file holds, as text of one line, or None."""
    try:
        text = content.decode()
        if ending == ".json":
            fields = json.loads(text)
            text = next((fields[key] for key in KEYS if type(fields.get(key)) in (int, str)), None)
    except (ValueError, AttributeError, RecursionError):
        return None
    return label_text(text)


def label_text(value):
    """A label of any kind of shard as text; None for what is none."""
    if value is None:
        return None
    text = os.fsdecode(value) if isinstance(value, bytes) else str(value)
    text = text.strip()
    return text if text.isprintable() and 0 < len(text) <= 200 else None
