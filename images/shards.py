"""Images in shards: tar, zip, Parquet, Arrow and HDF5 files, read in place, as if their members lay in a folder.

    images = open_shards(["shards"], "train")            # ShardImages; None where no shards are there

A folder of shards is one set, and so are shards named one by one. The order is that of a folder of class folders: by
(class, name), names as text and compared part by part; so the same images in any of these forms are the same run.
N: images.
"""

import collections
import functools
import os
import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from images.decoding import BadImage, first_line, known_endings, late_endings
from images.folders import (
    MOST_WRAPPERS,
    NoSplit,
    ending_of,
    enumeration,
    families,
    family_and_kind,
    folder_of_split,
    folders_in,
    holds_images,
    is_hidden,
    look_into,
    looking_for,
    names_of,
    splits_inside,
    tally,
    validation_beside,
    why_no_classes,
)
from images.hdf5 import HDF5
from images.listing import Broken
from images.reading import PLAIN
from images.sets import ImageSet, Names, evenly
from images.tables import Arrow, Parquet
from images.tars import Tar
from images.zips import Zip
from utils import UserError

KINDS = {".tar": Tar, ".zip": Zip, ".parquet": Parquet, ".arrow": Arrow, ".h5": HDF5, ".hdf5": HDF5}
MOST_OPEN = 32  # shards that one process holds open


def open_shards(paths, split, reading=PLAIN):
    """ShardImages of a split of one folder of shards, or of files; None where it is neither."""
    if paths[0] is None:
        return None
    first = os.fspath(paths[0])
    if first.startswith("hf://"):
        return arranged(gather(hub_files(first.removeprefix("hf://"), split)), reading, [f"of {first}"])
    found = files_of(paths, split)
    if found is None:
        return None
    if reading.pages == "images":
        raise UserError(
            f"--pages images: {first} holds shards, each of whose files is one image: leave it out, or unpack them"
        )
    files, place, is_split = found
    chosen = files if is_split else by_words(files, split)
    gathered = gather(chosen or files)
    remarks = unwrap(gathered, None if chosen else split)
    if remarks is None and not chosen and split == "val":
        return open_beside(paths, place, reading)
    left_out = [os.path.basename(file) for file in files if file not in (chosen or files)]
    said = [f"left out: {enumeration(left_out)}"] if left_out else []
    beside = no_shards_beside(files) if os.path.isdir(first) else Counter()
    said += [f"passed over beside them: {tally(beside)}"] if beside else []
    return arranged(gathered, reading, [f"of {place}", *(remarks or []), *said])


# Which files ----------------------------------------------------------------------------------------------------------


def kind_of(path):
    return KINDS.get(os.path.splitext(path)[1].lower())


def is_shard(path):
    return kind_of(path) is not None and os.path.isfile(path)


def files_of(paths, split):
    """(files, place, whether they are of this split already), or None where these are no shards."""
    if is_shard(paths[0]):
        return list(map(os.fspath, paths)), enumeration(list(map(str, paths))), False
    root = Path(paths[0])
    with looking_for(known_endings() | late_endings()):
        if not os.path.isdir(root) or holds_images(root):
            return None
    files = shards_in(root)
    if files:
        return files, root, False
    if not any(shards_in(root / name) for name in folders_in(root)):
        return None
    folder, _ = folder_of_split(root, split)
    files = shards_in(folder)
    return (files, folder, True) if files else None


def shards_in(folder):
    """The shards in a folder, or in the only folder of it, and so on; all of one kind. Raises UserError."""
    for _ in range(MOST_WRAPPERS):
        try:
            entries = look_into(os.fsencode(folder))
        except OSError:
            return []
        names = [os.fsdecode(name) for name, is_folder in entries if not is_folder and not is_hidden(name)]
        files = saved_by_datasets(names) or [name for name in names if kind_of(name)]
        if files:
            kinds = Counter(os.path.splitext(name)[1].lower() for name in files)
            if len({KINDS[ending] for ending in kinds}) > 1:
                raise UserError(f"{folder} holds shards of several kinds ({tally(kinds)}): give those of one kind")
            return [os.path.join(folder, name) for name in files]
        inner = folders_in(folder)
        if len(inner) != 1:
            return []
        folder = Path(folder) / inner[0]
    return []


def saved_by_datasets(names):
    """The files of a data set that Hugging Face's save_to_disk wrote; caches of others lie beside them."""
    return [name for name in names if re.fullmatch(r"data-\d+-of-\d+\.arrow", name)] if "state.json" in names else []


def no_shards_beside(files):
    """By their endings, the files in a folder of shards that are neither shards nor indices of shards."""
    names = [name for name, is_folder in look_into(os.fsencode(os.path.dirname(files[0]))) if not is_folder]
    endings = [ending_of(name) for name in names if not is_hidden(name)]
    return Counter(ending or "without ending" for ending in endings if ending not in (*KINDS, ".index"))


def by_words(files, split):
    """The files of a split, by a word such as train in their names; None where the names tell no splits apart."""
    kinds = defaultdict(list)
    for file in files:
        kinds[split_in(file)].append(file)
    if len(kinds.keys() - {None, "rest"}) < 2:
        return None
    found = names_of(kinds, split)
    if not found:
        raise NoSplit(f"no {split} shards among {enumeration(list(map(os.path.basename, files)))}; see --data_path")
    return found


def split_in(file):
    """ "train-000.tar" -> "train" """
    return family_and_kind(re.sub(r"\d+", "0", os.path.splitext(os.path.basename(file))[0]))[1]


def open_beside(paths, place, reading):
    """The validation shards beside the training ones: val/ beside train/, val-*.tar beside train-*.tar."""
    folder = Path(os.path.abspath(paths[0]))
    if os.path.isdir(folder):
        beside = validation_beside(folder)
        files = shards_in(beside) if beside else []
    else:
        files = [path for path in shards_in(folder.parent) if kind_of(path) is kind_of(paths[0])]
        files = (by_words(files, "val") or []) if split_in(paths[0]) == "train" else []
    if not files:
        raise NoSplit(
            f"no validation images for --data_path {place}: looked for folders called train and val in the shards, for "
            "such words in their names, and beside them"
        )
    gathered = gather(files)
    unwrap(gathered, None)
    return arranged(gathered, reading, [f"of {enumeration(files)}"])


def hub_files(name, split):
    """The Arrow files of a split of a data set of Hugging Face's hub, downloaded where they are not there yet."""
    try:
        import datasets
    except ImportError as error:
        raise UserError("hf:// is read by datasets, which is not installed: pip install datasets") from error
    try:
        splits = datasets.load_dataset(name)
    except Exception as error:  # network, name, licence, script: all end in the same advice
        raise UserError(f"--data_path hf://{name} cannot be read from the hub: {first_line(error)}") from error
    kinds = defaultdict(list)
    for split_name in splits:
        kinds[family_and_kind(split_name)[1]].append(split_name)
    found = names_of(kinds, split)
    if not found:
        raise NoSplit(f"--data_path hf://{name} has the splits {enumeration(list(splits))}, and none called {split}")
    return [file["filename"] for file in splits[found[0]].cache_files]


# All shards as one ----------------------------------------------------------------------------------------------------


class Gathered:
    """What all shards hold, shard by shard. names: list; shards, places: int arrays (N,), (N, width); remarks."""

    def __init__(self, kind, files, listings, remarks):
        self.kind, self.files, self.remarks = kind, files, remarks
        self.names = [name for listing in listings for name in listing.names]
        self.labels = [label for listing in listings for label in listing.labels]
        self.captions = any(listing.captions for listing in listings)
        self.shards = np.repeat(np.arange(len(files), dtype=np.int32), [len(listing) for listing in listings])
        self.places = np.concatenate([listing.table() for listing in listings])

    def take(self, indices, names):
        self.names, self.labels = names, [self.labels[index] for index in indices]
        self.shards, self.places = self.shards[indices], self.places[indices]

    def drop_late(self):
        """Leave arrays (.npy and its like) where there are pictures, as in a folder; returns what was left."""
        late = [ending_of(name) in late_endings() for name in self.names]
        if not any(late) or all(late):
            return Counter()
        dropped = Counter(ending_of(name) for name, is_late in zip(self.names, late, strict=True) if is_late)
        kept = np.flatnonzero(~np.array(late))
        self.take(kept, [self.names[index] for index in kept])
        return dropped


def gather(files):
    """Gathered of all shards that can be read. Raises UserError where none of them holds an image."""
    kind, whole, listings, faults, indexed = kind_of(files[0]), [], [], [], Counter()
    for file in files:
        try:
            listing, remark = kind.look(file)
        except UserError:
            raise
        except Exception as error:  # libraries raise nearly every type there is on a damaged file
            faults.append(f"{os.path.basename(file)}: {first_line(error)}")
            continue
        faults += [f"{os.path.basename(file)}: {listing.fault}; {len(listing)} images read"] if listing.fault else []
        indexed.update([remark] if remark else [])
        whole.append(file)
        listings.append(listing)
    passed = sum((listing.passed for listing in listings), Counter())
    broken = [f"{len(faults)} of {len(files)} shards broken: {'; '.join(faults[:3])}"] if faults else []
    if not any(map(len, listings)):
        why = ([f"passed over: {tally(passed)}"] if passed else []) + broken
        raise UserError("; ".join([f"no images in {enumeration(files)}", *why]))
    gathered = Gathered(kind, whole, listings, [f"index of {n} shards {remark}" for remark, n in indexed.items()])
    passed += gathered.drop_late()
    gathered.remarks += [f"passed over: {tally(passed)}"] if passed else []
    gathered.remarks += broken
    return gathered


def unwrap(gathered, split):
    """Take the names out of the folders that hold all images. split: also keep the images of a split alone, told by
    folders in the shards as in a folder; None: the shards are of one. Returns remarks, or None where no splits are."""
    if not gathered.kind.has_folders:
        return None
    prefix, kept, remarks = b"", np.arange(len(gathered.names)), None
    for _ in range(MOST_WRAPPERS):
        tops = Counter(top_of(gathered.names[index], prefix) for index in kept)
        folders = [os.fsdecode(top) for top in tops if top is not None]
        kinds = splits_among(folders) if split and remarks is None else {}
        if kinds:
            found = names_of(kinds, split)
            if len(found) != 1:
                raise NoSplit(f"the shards hold {enumeration(folders)}: which of them are the {split} images?")
            left_out = [name for name in folders if name not in names_of(kinds, "train") + names_of(kinds, "val")]
            left_out += ["images beside them"] * (None in tops)
            remarks = [f"left out: {enumeration(left_out)}"] if left_out else []
            prefix += os.fsencode(found[0]) + b"/"
            kept = np.array([index for index in kept if gathered.names[index].startswith(prefix)])
        elif len(tops) == 1 and None not in tops:
            prefix += os.fsencode(folders[0]) + b"/"
        else:
            break
    if split != "val" or remarks is not None:
        gathered.take(kept, [gathered.names[index][len(prefix) :] for index in kept])
    return remarks


def top_of(name, prefix):
    """The folder that a member is in, below the prefix; None beside folders."""
    top, slash, _ = name[len(prefix) :].partition(b"/")
    return top if slash else None


def splits_among(folders):
    """{kind: names} where folders are splits of one another; see `folders.splits_in`."""
    found = families(folders)
    if len(found) > 1 and "*" not in found:
        raise UserError(f"the shards hold several sets of splits: {enumeration(folders)}")
    return found.get("*") or next(iter(found.values()), {})


# Classes and order ----------------------------------------------------------------------------------------------------


def arranged(gathered, reading, remarks):
    """ShardImages in the order of (class, name)."""
    labels, said = labels_of(gathered)
    names = gathered.names
    if labels is not None:
        folders = [os.fsencode(label) + b"/" for label in labels]
        pairs = zip(folders, names, strict=True)
        names = [name if name.startswith(folder) else folder + name for folder, name in pairs]
    keys = [name.replace(b"/", b"\0") for name in names]  # so that names are compared part by part
    if labels is not None:
        keys = [(os.fsencode(label), key) for label, key in zip(labels, keys, strict=True)]
    order = np.array(sorted(range(len(keys)), key=keys.__getitem__))
    classes = None if labels is None else sorted(set(labels), key=os.fsencode)
    number = {name: number for number, name in enumerate(classes or [])}
    numbers = None if labels is None else np.array([number[labels[index]] for index in order], np.int64)
    return ShardImages(
        gathered.kind,
        gathered.files,
        [names[index] for index in order],
        gathered.shards[order],
        gathered.places[order],
        numbers,
        classes,
        reading,
        [*remarks, *said, *gathered.remarks],
    )


def labels_of(gathered):
    """(the class of each image, or None; remarks). Classes are what labels say, or else folders, as in a folder."""
    labels, names = gathered.labels, gathered.names
    missing = labels.count(None)
    if missing == 0:
        if gathered.captions and 2 * len(set(labels)) > len(labels):
            return None, [f"no classes: {len(set(labels))} texts beside {len(labels)} images are taken for captions"]
        return (labels, []) if len(set(labels)) > 1 else (None, [f"no classes: all have the label {labels[0]}"])
    if missing < len(labels):
        return None, [f"no classes: {missing} of {len(labels)} images have no label"]
    tops = [top_of(name, b"") for name in names]
    folders = dict.fromkeys(top for top in tops if top is not None)
    if None in tops or len(folders) < 2 or not gathered.kind.has_folders:
        return None, why_no_classes(tops, folders, names)
    return [os.fsdecode(top) for top in tops], splits_inside(names)


# The set --------------------------------------------------------------------------------------------------------------


class ShardImages(ImageSet):
    """Images in shards. Processes that get a copy open the shards for themselves, a few at a time."""

    def __init__(self, kind, files, names, shards, places, labels, classes, reading, remarks):
        """names: bytes, class/name.  shards: (N,) numbers of `files`.  places: (N, width), what `kind` reads by."""
        self.kind, self.files, self.shards, self.places = kind, files, shards, places
        self.names, self.labels, self.classes = Names(names), labels, classes
        self.reading, self.remarks = reading, list(remarks)
        self.roots, self.num_files = tuple(map(os.fsencode, files)), len(files)
        self.opened = Opened(kind, files)

    @functools.cached_property
    def fingerprint(self):
        """Where the sizes of images are known, the fingerprint of a folder of these names."""
        column = self.kind.size_column
        sizes = [status.st_size if status else -1 for status in self.look_at_some()]
        sizes = sizes if column is None else self.places[evenly(len(self), 1000), column].tolist()
        return self.names.fingerprint(sizes, self.reading)

    def look_at_some(self, most=1000):
        for number in evenly(len(self.files), most):
            try:
                yield os.stat(self.files[number])
            except OSError:
                yield None

    def __len__(self):
        return len(self.names)

    def name(self, index):
        name = self.names[index].decode("utf-8", "backslashreplace")
        return f"{self.files[self.shards[index]]}:{name}"

    def load(self, index, channels=3):
        return self.reading.load(self.read(index), channels)

    def read(self, index):
        """The bytes of an image's file. Raises BadImage."""
        try:
            return self.opened.shard(self.shards[index]).read(self.places[index])
        except (BadImage, UserError):
            raise
        except Broken as error:
            raise BadImage(str(error)) from error
        except Exception as error:  # of the disk, and of libraries that meet a damaged file
            raise BadImage(f"{type(error).__name__}: {first_line(error)}") from error

    def content(self, index):
        """The bytes of an image's file, none where they cannot be read: who loads the image names the reason."""
        try:
            return self.read(index)
        except BadImage:
            return b""

    def kept(self, indices, labels, classes, remark):
        names = [self.names[index] for index in indices]
        shards, places, remarks = self.shards[indices], self.places[indices], [*self.remarks, remark]
        return ShardImages(self.kind, self.files, names, shards, places, labels, classes, self.reading, remarks)


class Opened:
    """The shards that this process holds open: the shards it read last, unchanged since they were listed."""

    def __init__(self, kind, files):
        self.kind, self.files = kind, files
        self.seen = [identity(file) for file in files]
        self.shards, self.process = collections.OrderedDict(), os.getpid()

    def __getstate__(self):
        return self.__dict__ | {"shards": collections.OrderedDict()}

    def shard(self, number):
        if self.process != os.getpid():  # a process that was forked from the one that opened them
            self.of_parent, self.shards, self.process = self.shards, collections.OrderedDict(), os.getpid()
        if number in self.shards:
            self.shards.move_to_end(number)
            return self.shards[number]
        if identity(self.files[number]) != self.seen[number]:
            raise BadImage("its shard has changed since the run began")
        if len(self.shards) >= MOST_OPEN:
            self.shards.popitem(last=False)[1].close()
        self.shards[number] = self.kind(self.files[number])
        return self.shards[number]


def identity(file):
    status = os.stat(file)
    return status.st_size, status.st_mtime_ns
