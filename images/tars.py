"""Tar shards, as WebDataset writes them, read in place: an index says at which byte of the shard each image begins.

    Tar.look("train-000.tar")                            # Listing, from the index or from a pass over the headers
    Tar("train-000.tar").read((offset, size))            # bytes

The index is made once. It lies beside the shard, or in a cache folder where that cannot be written to, and holds for a
shard of its size and time of change only.
"""

import hashlib
import os
import stat
from collections import Counter
from contextlib import suppress

from images.listing import (
    LABEL_ENDINGS,
    LARGEST,
    LARGEST_LABEL,
    Broken,
    Listing,
    clean,
    key_of,
    kind_of_member,
    label_in,
)
from running.files import write_whole

BLOCK = 512
REGULAR = (b"0", b"\0", b"7")
EXTENDING = (b"x", b"L", b"K", b"g")  # headers of their own length that say something of the next member
BARE = tuple(b"%d" % digit for digit in range(1, 7))  # links, devices, folders, pipes: no content follows
OTHERS = {b"1": "link", b"2": "link", b"3": "device", b"4": "device", b"5": "", b"6": "pipe", b"g": "", b"S": "sparse"}
LONGEST_EXTRA = 2**20  # bytes of a header that extends the next one


class Tar:
    """An open shard; only `look` reads more of it than one image at a time."""

    has_folders, size_column = True, 1

    def __init__(self, path):
        self.file = open_regular(path)

    def read(self, place):
        offset, size = map(int, place)
        return read_exactly(self.file.fileno(), size, offset)

    def close(self):
        self.file.close()

    @staticmethod
    def look(path):
        """(Listing, what is to be said of its index)"""
        return indexed(path, scan)


def open_regular(path):
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    file = open(descriptor, "rb", buffering=0)  # noqa: SIM115 (who reads closes it)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        file.close()
        raise Broken("not a regular file")
    return file


def read_exactly(descriptor, size, offset):
    if size > LARGEST:
        raise Broken(f"a member of {size} bytes, more than {LARGEST}")
    content = os.pread(descriptor, size, offset)
    if len(content) < size:
        raise Broken(f"cut off at byte {offset + len(content)}")
    return content


# One pass over the headers --------------------------------------------------------------------------------------------


def scan(path):
    """Listing of a tar file; one that is damaged or cut off is listed as far as it can be read."""
    listing, beside = Listing(width=2), {}
    with open_regular(path) as file:
        try:
            for name, kind, offset, size in members(file.fileno()):
                note_member(listing, beside, name, kind, offset, size)
        except Broken as error:
            listing.fault = str(error)
        add_labels(listing, beside, file.fileno())
    return listing


def note_member(listing, beside, name, kind, offset, size):
    what = OTHERS.get(kind, "of unknown type") if kind not in REGULAR else kind_of_member(name)
    if what in LABEL_ENDINGS and size <= LARGEST_LABEL:
        beside.setdefault(key_of(clean(name)), {})[what] = offset, size
    elif what == "image" and size <= LARGEST:
        listing.add(clean(name), (offset, size))
    elif what:
        listing.passed[f"larger than {LARGEST} bytes" if what == "image" else what] += 1


def add_labels(listing, beside, descriptor):
    """beside: {key: {ending: (offset, size)}} of the files that may be labels of the images with their key."""
    used = set()
    for number, name in enumerate(listing.names):
        files = beside.get(key_of(name), {})
        for ending in LABEL_ENDINGS:
            if ending in files:
                offset, size = files[ending]
                listing.labels[number] = label_in(ending, os.pread(descriptor, size, offset))
                listing.captions |= ending == ".txt"
                used.add((key_of(name), ending))
                break
    unused = Counter(ending for key, files in beside.items() for ending in files if (key, ending) not in used)
    listing.passed.update(unused)


def length_of(kind, size, extra):
    """Bytes of content behind a header that says `size`, after headers that have said `extra`."""
    if kind in BARE:
        return 0
    return size if kind in EXTENDING else int(extra.get("size", size))


def members(descriptor):
    """(name, type, offset, size) of each member. Raises Broken where the file is cut off or is no tar file."""
    end, offset, extra = os.fstat(descriptor).st_size, 0, {}
    while offset < end:
        header = os.pread(descriptor, BLOCK, offset)
        if len(header) == BLOCK and not header.strip(b"\0"):
            return
        name, kind, size = parse(header, offset)
        size = length_of(kind, size, extra)
        data, offset = offset + BLOCK, offset + BLOCK + -(-size // BLOCK) * BLOCK
        if data + size > end:
            raise Broken(f"cut off: a member that begins at byte {data - BLOCK} goes on after the end of the file")
        if kind in (b"x", b"L", b"K"):
            extra |= extension(kind, descriptor, data, size)
            continue
        yield extra.get("path", name), kind, data, size
        extra = {}


def parse(header, offset):
    """(name, type, size) of a header. Raises Broken."""
    total, field = 8 * 32 + sum(header[:148]) + sum(header[156:]), header[148:156].strip(b" \0")
    try:
        if len(header) < BLOCK or int(field, 8) != total:
            raise ValueError
        size = number(header[124:136])
    except ValueError:
        what = "not a tar file" if offset == 0 else "damaged"
        raise Broken(f"{what}: no header at byte {offset}") from None
    name, prefix = (part.partition(b"\0")[0] for part in (header[:100], header[345:500]))
    is_posix = header[257:263] == b"ustar\0"
    return (prefix + b"/" + name if is_posix and prefix else name), header[156:157], size


def number(field):
    """Octal digits, or a binary number where the first bit is set. Raises ValueError."""
    if field[0] & 0x80:
        value = int.from_bytes(field[1:], "big")
        if field[0] != 0x80 or value >= 2**62:
            raise ValueError
        return value
    return int(field.strip(b" \0") or b"0", 8)


def extension(kind, descriptor, offset, size):
    """{"path": ..., "size": ...} of a header that says more of the next member: GNU's long names, and POSIX's."""
    if size > LONGEST_EXTRA:
        raise Broken(f"damaged: a name of {size} bytes at byte {offset}")
    content = os.pread(descriptor, size, offset)
    if kind != b"x":
        return {"path": content.partition(b"\0")[0]} if kind == b"L" else {}
    found = {}
    while content:
        length, _, _ = content.partition(b" ")
        if not length.isdigit() or not len(length) < int(length[:9]) <= len(content):
            raise Broken(f"damaged: an extended header at byte {offset}")
        key, _, value = content[len(length) + 1 : int(length) - 1].partition(b"=")
        found |= {"path": value} if key == b"path" else {}
        if key == b"size":
            if not value.isdigit() or len(value) > 18:
                raise Broken(f"damaged: an extended header at byte {offset}")
            found["size"] = int(value)
        content = content[int(length) :]
    return found


# The index ------------------------------------------------------------------------------------------------------------

MAGIC = b"cplearn index 1 "


def indexed(path, scan):
    """(Listing, remark): what the index of a shard says, or else scan(path), which is then kept."""
    found, remark = read_index(path)
    if found is not None:
        return found, ""
    status = os.stat(path)
    listing = scan(path)
    return listing, keep(path, status, listing, remark)


def places_of_index(path):
    """Beside the shard, and in the cache folder."""
    real = os.path.realpath(path)
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    name = f"{hashlib.sha256(os.fsencode(real)).hexdigest()[:16]}.index"
    return f"{os.fspath(path)}.index", os.path.join(cache, "cplearn", name)


def read_index(path):
    """(Listing, ""), or (None, why there is none)."""
    why = "made"
    for place in places_of_index(path):
        with suppress(OSError):
            descriptor = os.open(place, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            with open(descriptor, "rb") as file:
                try:
                    return parse_index(file, os.stat(path)), ""
                except Stale:
                    why = "made anew, as the shard has changed"
                except (ValueError, TypeError, KeyError, RecursionError, OverflowError):
                    why = "made anew, as it was damaged"
    return None, why


class Stale(Exception):
    """An index of another shard than the one that is there."""


def parse_index(file, status):
    """Raises Stale, and ValueError and its like for what is no whole index."""
    head = file.readline(200)
    longest = 8 * status.st_size + 2**20  # a member takes 512 bytes at least, its entry less than 8 times that
    if not head.startswith(MAGIC) or os.fstat(file.fileno()).st_size > longest:
        raise ValueError
    magic_and_digest, size, mtime = head.rsplit(b" ", 2)
    if (int(size), int(mtime)) != (status.st_size, status.st_mtime_ns):
        raise Stale
    body = file.read()
    if hashlib.sha256(body).hexdigest().encode() != magic_and_digest.removeprefix(MAGIC):
        raise ValueError
    return Listing.from_json(body)


def keep(path, status, listing, remark):
    """Write the index where that can be; returns what is to be said. At any moment a place has a whole index or none:
    other processes may make the same one."""
    body = listing.as_json().encode()
    head = MAGIC + f"{hashlib.sha256(body).hexdigest()} {status.st_size} {status.st_mtime_ns}\n".encode()
    beside, cached = places_of_index(path)
    for place in (beside, cached):
        with suppress(OSError):
            if place == cached:
                os.makedirs(os.path.dirname(place), exist_ok=True)
            write_whole(place, head + body)
            return f"{remark}, kept beside them" if place == beside else f"{remark}, kept in {os.path.dirname(place)}"
    return f"{remark}, not kept: neither their folder nor {os.path.dirname(cached)} can be written to"
