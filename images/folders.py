"""Which files are the images of a split, in a folder or in a list of files, and what is left out.

    found = find_images("imagenet", "train")             # .root, .names, .labels, .classes, .remarks

What a folder is, is told by what stands beside it, never by its name alone, and all that is not read is remarked.
N: images.
"""

import contextlib
import contextvars
import dataclasses
import itertools
import os
import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
from PIL import Image

from images.decoding import known_endings, known_formats, late_endings
from utils import UserError, one_line


@dataclasses.dataclass
class Found:
    """place: the folder or the list.  root: folder.  names: bytes, relative to root or absolute.  labels: int64 (N,),
    which count the names in classes, or None.  remarks: what was left out or assumed, a few words each."""

    place: Path
    root: Path
    names: list
    labels: np.ndarray | None = None
    classes: list | None = None
    remarks: list = dataclasses.field(default_factory=list)


class NoSplit(UserError):
    """There are images, and none of the split that is asked for."""


def find_images(data_path, split):
    """data_path: a folder, or a text file that lists images.  split: "train" or "val". Returns `Found`."""
    if data_path is None:
        raise UserError(
            "--dataset imagefolder needs --data_path: a folder of images, or a text file with one path per line"
        )
    path = Path(data_path)
    try:
        is_file = path.is_file()
    except (OSError, ValueError) as error:  # too long, or with a zero byte
        raise UserError(f"--data_path {data_path} is no path: {error}") from None
    if not is_file:
        with looking_for(known_endings() if holds_images(path) else late_endings()):
            return read_folder(*folder_of_split(path, split))
    check_is_list(path)
    if split == "val":
        path = validation_beside(path)
    if path is None:
        raise NoSplit(
            f"--data_path {data_path} is a list of images, without a validation part: give a folder, or put val.txt "
            "beside train.txt"
        )
    return read_list(path)


# Splits ---------------------------------------------------------------------------------------------------------------

SPELLINGS = {
    "train": ("train", "training", "trainval", "tr"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
    "rest": ("unlabeled", "unlabelled", "extra"),
}
KIND_OF_WORD = {word: kind for kind, words in SPELLINGS.items() for word in words}
KINDS_OF_SPLIT = {"train": ("train",), "val": ("val", "test")}  # the first that is there


def family_and_kind(name):
    """A name without its word for a split, and the split: "train2017" -> ("*2017", "train"), "cat" -> ("cat", None)."""
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[^A-Za-z]+", name)
    places = [place for place, word in enumerate(words) if word.lower() in KIND_OF_WORD]
    if len(places) != 1:
        return name, None
    kind = KIND_OF_WORD[words[places[0]].lower()]
    words[places[0]] = "*"
    return "".join(words), kind


def families(names):
    """Names that differ in their word for a split only: {"*2017": {"train": ["train2017"], "val": ["val2017"]}}.

    A family has training images and images to test on: one that has not is none, its names are names of classes."""
    found = defaultdict(lambda: defaultdict(list))
    for name in names:
        family, kind = family_and_kind(name)
        if kind:
            found[family][kind].append(name)
    return {family: kinds for family, kinds in found.items() if len(kinds.keys() - {"rest"}) >= 2}


def folder_of_split(root, split):
    """(folder with the images of a split, remarks on what is left out beside it).

    Splits are in root, or in the only folder of root that holds images, and so on; those to validate on also beside
    root. Where there are none, root itself is the training set. Raises UserError where it cannot be told.
    """
    place, kinds = find_splits(root)
    if kinds:
        chosen = pick(place, kinds, split)
        used = names_of(kinds, "train") + names_of(kinds, "val")
        left_out = [name for name in folders_in(place) if name not in used] + ["images beside them"] * is_flat(place)
        return innermost(chosen), [f"left out: {enumeration(left_out)}"] if left_out else []
    if split == "train":
        return root, []
    beside = validation_beside(root)
    if beside is None:
        raise NoSplit(
            f"no validation images for --data_path {root}: looked for a folder called "
            f"{', '.join(SPELLINGS['val'] + SPELLINGS['test'])} in it, and beside it if it is called train; in it are "
            f"{enumeration(folders_in(root)) or 'no folders'}"
        )
    return beside, []


def find_splits(root):
    """(folder, {kind: names of folders in it}) of the splits in root, however deep they stand alone; (root, {})."""
    place = root
    for _ in range(MOST_WRAPPERS):
        kinds = splits_in(place)
        if kinds:
            return place, kinds
        only = only_folder(place)
        if only is None:
            break
        kind = family_and_kind(only)[1]
        if kind:
            return place, {kind: [only]}
        place = place / only
    return root, {}


MOST_WRAPPERS = 8  # a link may lead in a circle


def splits_in(place):
    """{kind: names} of the splits in a folder; {}: its folders are no splits. Raises UserError if that is not clear."""
    names = folders_in(place)
    found = families(names)
    if not found:
        refuse_splits_only(place, names)
        return {}
    if len(found) > 1 and "*" not in found:
        several = enumeration(members_of(found))
        raise UserError(f"{place} holds several sets of splits ({several}): give the training one as --data_path")
    kinds = found.get("*") or next(iter(found.values()))
    members = [name for names in kinds.values() for name in names]
    others = [name for name in names if family_and_kind(name)[1] is None]
    if is_flat(place / members[0]) and any(is_flat(place / name) for name in others):
        if family_of(place):
            return {}  # the splits are one level up, so that these are classes
        raise UserError(
            f"{place} holds {enumeration(members)} beside {enumeration(others)}: splits or classes? Give "
            "the training split as --data_path, or a text file with lines 'path label'"
        )
    return kinds


def refuse_splits_only(place, names):
    """Folders that are all called as splits, and are no splits of each other, such as train and val2017."""
    called = [name for name in names if family_and_kind(name)[1]]
    if len(called) > 1 and not any(holds_images(place / name) for name in names if name not in called):
        raise UserError(f"{place} holds {enumeration(called)}: splits of what? Give one of them as --data_path")


def names_of(kinds, split):
    return next((kinds[kind] for kind in KINDS_OF_SPLIT[split] if kind in kinds), [])


def pick(place, kinds, split):
    found = names_of(kinds, split)
    if len(found) > 1:
        raise UserError(f"{place} holds {enumeration(found)}, two names of one split: move those that are not meant")
    if not found:
        there = enumeration([name for names in kinds.values() for name in names])
        advice = "give their folder itself as --data_path" if split == "train" else "expected a folder called val"
        raise NoSplit(f"{place} holds {there}, and no {split} images: {advice}")
    return place / found[0]


def innermost(chosen):
    """train/train, where a split holds nothing but itself once more."""
    for _ in range(MOST_WRAPPERS):
        only = only_folder(chosen)
        if only is None or family_and_kind(only)[1] != family_and_kind(chosen.name)[1]:
            break
        chosen = chosen / only
    return chosen


def family_of(path):
    """{kind: names} of a folder or list and what stands beside it; {} where nothing beside it is another split."""
    path = Path(os.path.abspath(path))
    try:
        beside = os.listdir(path.parent)
    except OSError:
        return {}
    return families(beside).get(family_and_kind(path.name)[0], {})


def validation_beside(path):
    """val/ beside train/, val.txt beside train.txt; None where there is none."""
    path = path if family_and_kind(path.name)[1] else Path(os.path.abspath(path))
    if family_and_kind(path.name)[1] != "train":
        return None
    kinds = family_of(path)
    return pick(path.parent, kinds, "val") if kinds else None


def enumeration(names, most=5):
    shown = ", ".join(one_line(name, 60) for name in names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown


# One look into a folder -----------------------------------------------------------------------------------------------

# of network storage, of archives, of disks; hidden ones such as .AppleDouble are passed over by their dot
SYSTEM_FOLDERS = {b"@eadir", b"@recycle", b"#recycle", b"$recycle.bin", b"__macosx", b"lost+found"}
SYSTEM_FOLDERS |= {b"system volume information", b"recycler", b"found.000", b"@tmp", b"@sharebin"}
SYSTEM_FOLDERS |= {b"#snapshot", b"~snapshot", b"@recently-snapshot"}


def is_hidden(name):
    return name.startswith(b".") or name.lower() in SYSTEM_FOLDERS


def ending_of(name):
    return os.path.splitext(name)[1].lower().decode("ascii", "replace")


SOUGHT = contextvars.ContextVar("SOUGHT")  # endings of the files that are images in the folder that is being read


@contextlib.contextmanager
def looking_for(endings):
    token = SOUGHT.set(endings)
    try:
        yield
    finally:
        SOUGHT.reset(token)


def is_image(name):
    return ending_of(name) in SOUGHT.get(known_endings()) and not is_hidden(name)


def leads_to_folder(entry):
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself: a bad image, if it is named as one
        return False


def look_into(folder):
    """Sorted (name, whether it is a folder) of all that is in it. folder: bytes. Raises OSError."""
    with os.scandir(folder) as entries:
        return sorted((entry.name, leads_to_folder(entry)) for entry in entries)


def folders_in(folder):
    """Names of the folders in it that are not hidden; none where it cannot be read."""
    try:
        entries = look_into(os.fsencode(folder))
    except OSError:
        return []
    return [os.fsdecode(name) for name, is_folder in entries if is_folder and not is_hidden(name)]


def is_flat(folder):
    """Whether images stand in it, not in its folders."""
    try:
        with os.scandir(os.fsencode(folder)) as entries:
            return any(is_image(entry.name) and not leads_to_folder(entry) for entry in entries)
    except OSError:
        return False


def holds_images(folder):
    try:
        return next(Walk(folder).names(), None) is not None
    except UserError:  # it cannot be read: who reads all images says so
        return True


def only_folder(folder):
    """The name of the only folder in it that holds images; None if images stand beside folders, or in several."""
    if is_flat(folder):
        return None
    found = (name for name in folders_in(folder) if holds_images(os.path.join(folder, name)))
    first = next(found, None)
    return first if next(found, None) is None else None


# All images of a folder -----------------------------------------------------------------------------------------------


def read_folder(root, remarks):
    walk = Walk(root)
    names = list(walk.names())
    if not names:
        looked_for = (
            f"looked for {' '.join(sorted(known_endings() | late_endings()))} in it and its folders, and for shards"
        )
        raise UserError("; ".join([f"no images in {root}", *walk.remarks(), looked_for]))
    tops = [name.split(b"/", 1)[0] if b"/" in name else None for name in names]
    folders = dict.fromkeys(top for top in tops if top is not None)
    if None not in tops:
        walk.refuse_unreadable_classes()
    if None in tops or len(folders) < 2:
        return Found(root, root, names, remarks=why_no_classes(tops, folders, names) + walk.remarks() + remarks)
    number = {folder: number for number, folder in enumerate(folders)}
    labels = np.array([number[top] for top in tops], np.int64)
    empty = walk.without_images(folders)
    no_class = [f"no classes, as they hold no images: {enumeration(empty)}"] if empty else []
    classes = [os.fsdecode(folder) for folder in folders]
    return Found(root, root, names, labels, classes, no_class + splits_inside(names) + walk.remarks() + remarks)


def splits_inside(names):
    """Words on folders below the classes that are called as splits of each other, and are read as one: cat/train beside
    cat/test, or all of another data set in one class."""
    below = defaultdict(dict)
    for folder in dict.fromkeys(name.rpartition(b"/")[0] for name in names):
        parts = os.fsdecode(folder).split("/")
        for depth in range(1, len(parts)):
            below["/".join(parts[:depth])][parts[depth]] = None
    found = [f"{place}/{name}" for place, inside in below.items() for name in members_of(families(inside))]
    return [f"read as one, though called as splits: {enumeration(found)}"] if found else []


def members_of(found):
    """The names in what `families` returns."""
    return [name for kinds in found.values() for names in kinds.values() for name in names]


def why_no_classes(tops, folders, names):
    if not folders:
        return []
    if None in tops:
        return [f"{tops.count(None)} of them beside its folders, so that these are no classes"]
    branches = [os.fsdecode(folder) for folder in first_branches(names)]
    return [f"all of them in its folder {enumeration(branches)}"]


def first_branches(names):
    """The folder that all are in or, where they are in several folders of it, these, such as photographs and masks."""
    folders = [name.split(b"/")[:-1] for name in names]
    pairs = zip(min(folders), max(folders), strict=False)
    shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    return list(dict.fromkeys(b"/".join(folder[: shared + 1]) for folder in folders))


class Walk:
    """The images below a folder, and a tally of what is passed over.

    Links are followed, but not one that leads back to a folder it is in. A broken link counts as an image, a bad one.
    """

    def __init__(self, root):
        self.root = os.fsencode(root)
        self.top_folders, self.unreadable = [], []
        self.passed_files = defaultdict(Counter)  # by the folder in root that they are in
        self.passed_folders = Counter()

    def names(self):
        """Yields names relative to root, sorted folder by folder. Raises UserError where root cannot be read."""
        yield from self.visit(b"", frozenset())

    def visit(self, prefix, ancestors):
        try:
            status = os.stat(os.path.join(self.root, prefix))
            entries = look_into(os.path.join(self.root, prefix))
        except OSError as error:
            if prefix and isinstance(error, PermissionError):
                self.unreadable.append(prefix)
                return
            folder = os.fsdecode(os.path.join(self.root, prefix).rstrip(b"/"))
            raise UserError(f"folder {folder} cannot be read: {error.strerror}; see --data_path") from error
        identity = (status.st_dev, status.st_ino)
        if identity in ancestors:
            self.passed_folders[b"link to a folder above"] += 1
            return
        for name, is_folder in entries:
            if is_folder and is_hidden(name):
                self.passed_folders[name] += 1
            elif is_folder:
                self.top_folders += [] if prefix else [name]
                yield from self.visit(prefix + name + b"/", ancestors | {identity})
            elif is_image(name):
                yield prefix + name
            else:
                kind = "hidden" if is_hidden(name) else ending_of(name) or "without ending"
                self.passed_files[prefix.split(b"/")[0]][kind] += 1

    def refuse_unreadable_classes(self):
        classes = [prefix for prefix in self.unreadable if prefix.count(b"/") == 1]
        if classes:
            folder = os.fsdecode(os.path.join(self.root, classes[0]))
            raise UserError(f"class folder {folder} cannot be read: Permission denied; make it readable, or move it")

    def without_images(self, classes):
        """Words on each folder in root that is not one of `classes`."""
        return [
            " ".join([os.fsdecode(name), *([f"({tally(self.passed_files[name])})"] if self.passed_files[name] else [])])
            for name in self.top_folders
            if name not in classes
        ]

    def remarks(self):
        files = sum(self.passed_files.values(), Counter())
        unreadable = [os.fsdecode(prefix) for prefix in self.unreadable]
        said = {
            "passed over": tally(files, 12),
            "HEIC": without_reader(files),
            "folders passed over": tally(self.passed_folders),
            "folders that cannot be read": enumeration(unreadable),
        }
        return [f"{what}: {which}" for what, which in said.items() if which]


def without_reader(endings):
    """The remedy, where pictures of a kind that this Pillow does not read are among what was passed over."""
    if not {".heic", ".heif", ".hif"} & endings.keys() or "HEIF" in known_formats():
        return ""
    return "convert it, or pip install pillow-heif"


def tally(counter, most=6):
    """ ".txt 12, .xml 3" """
    return enumeration([f"{os.fsdecode(name)} {count}" for name, count in counter.most_common()], most)


# Lists ----------------------------------------------------------------------------------------------------------------

KNOWN_STARTS = {
    b"PK\x03\x04": "a zip archive, or a file that torch.save wrote",
    b"\x1f\x8b": "a gzip archive",
    b"BZh": "a bzip2 archive",
    b"\xfd7zXZ": "an xz archive",
    b"\x28\xb5\x2f\xfd": "a zstd archive",
    b"7z\xbc\xaf": "a 7z archive",
    b"Rar!": "a rar archive",
    b"\x89HDF": "an HDF5 file",
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
    b"\x93NUMPY": "a NumPy array",
    b"SQLite": "an SQLite data base",
    b"%PDF": "a PDF document",
    b"\xff\xfe": "text in UTF-16",
    b"\xfe\xff": "text in UTF-16",
}


CONTROL_BYTES = {*range(32)} - {*b"\a\b\t\n\f\r\x1b"}  # that no text has


def check_is_list(path):
    """Raises UserError, which says what it is, for a file that is no text."""
    try:
        with open(path, "rb") as file:
            head = file.read(4096)
    except OSError as error:
        raise UserError(f"--data_path {path} cannot be read: {error.strerror}") from error
    what = next((what for start, what in KNOWN_STARTS.items() if head.startswith(start)), None)
    if head[257:262] == b"ustar":
        what = "a tar archive"
    what = what or image_kind(path) or ("a binary file" if CONTROL_BYTES & {*head} else None)
    if what:
        raise UserError(
            f"--data_path {path} is {what}, which is not read as a data set under this name (.tar, .zip, .parquet, "
            ".arrow, .h5 are): unpack or convert it, or give a text file (UTF-8) with one path per line"
        )


def image_kind(path):
    try:
        with Image.open(path, formats=known_formats()) as image:
            return f"one image ({image.format})"
    except Exception:  # whatever a decoder raises: it is no image
        return None


def read_list(path):
    """One path per line, relative to the list's own folder or absolute, each with a label after it or none with one.

    A label is what follows the ending of the image and a comma, tab or blank: a number or a name."""
    rows = [split_label(line.strip()) for line in read_text(path, "--data_path").split("\n") if line.strip()]
    if not rows:
        raise UserError(f"--data_path {path} names no image: expected one path per line")
    remarks = []
    if len(rows) > 1 and rows[0][1] is None and all(label is not None for _, label in rows[1:]):
        remarks = [f"first line passed over: {one_line(rows[0][0], 60)}"]
        del rows[0]
    names = [os.fsencode(name) for name, _ in rows]
    labels = [label for _, label in rows]
    if all(label is None for label in labels):
        return Found(path, path.parent, names, remarks=remarks)
    if None in labels:
        name = one_line(rows[labels.index(None)][0])
        raise UserError(f"--data_path {path}: {labels.count(None)} of {len(rows)} images have no label, such as {name}")
    as_numbers = all(re.fullmatch(r"[0-9]{1,18}", label) for label in labels)
    labels = [str(int(label)) for label in labels] if as_numbers else labels
    classes = sorted(set(labels), key=int if as_numbers else None)
    number = {name: number for number, name in enumerate(classes)}
    return Found(path, path.parent, names, np.array([number[label] for label in labels], np.int64), classes, remarks)


def split_label(line):
    """ "cats/a b.jpg,tabby cat" -> ("cats/a b.jpg", "tabby cat"); a line that ends as an image does has no label."""
    endings = known_endings() | late_endings()
    if ending_of(os.fsencode(line)) in endings:
        return line, None
    for end in re.finditer(r"(\.\w+)[,;\s]\s*", line):
        if end[1].lower() in endings:
            return line[: end.end(1)], line[end.end() :] or None
    return line, None


def read_text(path, flag):
    """Without a byte order mark; bytes that are not UTF-8 stay as they are in names of files."""
    try:
        return Path(path).read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise UserError(f"{flag} {path} cannot be read: {error.strerror}") from error
