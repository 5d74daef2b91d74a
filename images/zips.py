"""Zip archives, read in place: the central directory says where each image lies, stored or deflated."""

import os
import stat
import struct
import zipfile
import zlib

from images.decoding import first_line
from images.listing import LARGEST, Broken, Listing, clean, kind_of_member
from images.tars import open_regular, read_exactly

METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
MOST_ENTRIES = 2**23


class Zip:
    has_folders, size_column = True, 2

    def __init__(self, path):
        self.file = open_regular(path)

    def read(self, place):
        """place: offset of the local header, bytes stored, bytes inflated, method, checksum."""
        start, stored, size, method, checksum = map(int, place)
        header = read_exactly(self.file.fileno(), 30, start)
        name_length, extra_length = struct.unpack("<HH", header[26:30])
        content = read_exactly(self.file.fileno(), stored, start + 30 + name_length + extra_length)
        if method == zipfile.ZIP_DEFLATED:
            content = inflate(content, size)
        if len(content) != size or zlib.crc32(content) != checksum:
            raise Broken("its content is not what the archive's directory says: damaged")
        return content

    def close(self):
        self.file.close()

    @staticmethod
    def look(path):
        listing = Listing(width=5)
        open_regular(path).close()
        try:
            with zipfile.ZipFile(path) as archive:
                entries = archive.infolist()
        except Exception as error:  # zipfile raises many types on a damaged directory
            raise Broken(f"no whole zip archive: {first_line(error)}") from error
        if len(entries) > MOST_ENTRIES:
            raise Broken(f"{len(entries)} members, more than {MOST_ENTRIES}: make several archives of it")
        for entry in entries:
            what = kind_of_entry(entry)
            if what == "image":
                place = entry.header_offset, entry.compress_size, entry.file_size, entry.compress_type, entry.CRC
                listing.add(clean(os.fsencode(entry.filename)), place)
            elif what:
                listing.passed[what] += 1
        return listing, ""


def kind_of_entry(entry):
    """ "image", "" for a folder, or why it is passed over."""
    what = "" if entry.filename.endswith("/") else kind_of_member(os.fsencode(entry.filename))
    if what != "image":
        return what
    if stat.S_ISLNK(entry.external_attr >> 16):
        return "link"
    if entry.flag_bits & 0x41:
        return "encrypted"
    if entry.compress_type not in METHODS:
        return f"of compression {zipfile.compressor_names.get(entry.compress_type, entry.compress_type)}"
    return f"larger than {LARGEST} bytes" if max(entry.file_size, entry.compress_size) > LARGEST else "image"


def inflate(content, size):
    """At most `size` bytes and one more."""
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        return inflater.decompress(content, size + 1)
    except zlib.error as error:
        raise Broken(f"damaged: {error}") from error
