"""A file -> an image as the rest of the program holds it: (C, H, W), levels from 0, black, to 255, white.

    load_image("cat.jpg")                                # uint8 (3, H, W)
    load_image("field.tif", 5, (-1000, 1000))            # float32 (5, H, W)

uint8 where 256 levels are enough, as they are for photographs; float32, with all that lies between two levels, where
they are not. What makes levels of values is here; the files are in decoding.py (Pillow, 8 bits) and arrays.py.

Shapes: C channels, H x W px.
"""

import contextlib
import os
import re
import warnings
from typing import NamedTuple

import numpy as np
import torch
from PIL import UnidentifiedImageError

from augmentation import match_channels
from images.arrays import check_size, count_pages, is_picture, is_tiff, map_npy, open_source, read_raw
from images.decoding import (
    BadImage,
    check_regular,
    decode,
    first_line,
    known_formats,
    read_file,
    turn_upright,
    without_harm,
)

PAGES = ("first", "channels", "images")


class Reading(NamedTuple):
    """How files become images. value_range: values that become black and white.  pages: one of PAGES, None: the first
    for 1 and 3 channels, channels for others.  floats: whether all levels are kept; None: not for 1 and 3 channels.
    channels: of the images; 3 stands for 1 too, as these are made of each other."""

    value_range: tuple | None = None
    pages: str | None = None
    floats: bool | None = None
    channels: int = 3

    def settled(self):
        """The same, with what None stands for."""
        pages, floats = defaults(self.channels, self.pages, self.floats)
        return self._replace(pages=pages, floats=floats)

    def describe(self):
        """As flags, all that `settled` says."""
        _, pages, floats, channels = self.settled()
        span = "no --value_range" if self.value_range is None else "--value_range {:g} {:g}".format(*self.value_range)
        kind = "--float_pixels" if floats else "--no-float_pixels"
        return f"{'1 or 3' if channels == 3 else channels} channels, {span} --pages {pages} {kind}"

    def levels(self, channels):
        """In words, what an image of so many channels can hold."""
        return "float32" if defaults(channels, self.pages, self.floats)[1] else "256 levels"

    def load(self, content, channels):
        """`load_image` in this way. content: path or bytes."""
        return load_image(content, channels, self.value_range, self.pages, self.floats)


PLAIN = Reading()


def load_image(path, channels=3, value_range=None, pages=None, floats=None):
    """A file, or its content as bytes -> (channels, H, W), upright, levels 0..255: uint8, or float32 with `floats`.

    JPEG, PNG, WebP, TIFF, BMP, PPM, GIF and the rest of FORMATS, .npy, .npz and DICOM, whatever the file is called.
    channels 3 (RGB) or 1 (luma): of any colour mode; gray is repeated; alpha is dropped, as in DINO. Other numbers:
    the file has as many. Orientation is what PIL reads. What stands beside the pixels (text, profiles, EXIF) may be
    damaged or huge.
    value_range: (low, high), the values that become 0 and 255 in an image of more than 8 bits, linearly; what lies
    outside is clipped. None: 16-bit values are scaled from 0 to 65535; floats, signed and 32-bit ones are refused.
    pages, floats: see `Reading`; "images": the path ends in # and the number of the page.
    Raises BadImage if the file is missing, damaged, truncated, of other channels, or declares too many pixels.
    """
    with naming_damage():
        path, page = split_page(path) if pages == "images" else (path, 0)
        return image_of(read_content(path), channels, value_range, *defaults(channels, pages, floats), page)


@contextlib.contextmanager
def naming_damage():
    """Whatever a decoder raises becomes BadImage, of one line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata: it does not change the pixels
            yield
    except BadImage:
        raise
    except UnidentifiedImageError as error:  # PIL's own words name an object in memory
        raise BadImage(f"not an image of any known format ({', '.join(known_formats())}, NPY, NPZ, DICOM)") from error
    except Exception as error:  # decoders raise nearly every type there is on a damaged file
        raise BadImage(f"{type(error).__name__}: {first_line(error)}") from error


def read_content(path):
    """The bytes of a file, or the array of an .npy, mapped into memory. Content itself stays."""
    if isinstance(path, bytes):
        return path
    if not os.fspath(path).endswith(".npy"):
        return read_file(path)
    check_regular(path)
    with open(path, "rb") as file:
        is_array = file.read(6) == b"\x93NUMPY"
    return map_npy(path) if is_array else read_file(path)


def image_of(content, channels, value_range, pages, floats, page):
    is_ranged_tiff = value_range is not None and is_tiff(content)  # of its deep colours Pillow reads 8 bits
    if not floats and pages == "first" and channels in (1, 3) and is_picture(content) and not is_ranged_tiff:
        return without_harm(lambda content: decode(content, channels, value_range), content)
    raw = read_raw(content, channels, pages, page)
    return to_levels(raw, channels, value_range, floats)


def defaults(channels, pages, floats):
    """Both, where they are None as they are for so many channels."""
    plain = channels in (1, 3)
    return pages or ("first" if plain else "channels"), not plain if floats is None else floats


# Levels ---------------------------------------------------------------------------------------------------------------


def to_levels(raw, channels, value_range=None, floats=True):
    """A RawImage -> (channels, H, W), float32 on 0..255, or rounded to uint8.  value_range: see `load_image`."""
    values = without_alpha(raw, channels)
    if len(values) != channels and not (channels in (1, 3) and len(values) in (1, 3)):
        raise BadImage(f"has {len(values)} channel{'s' * (len(values) != 1)}, --in_chans is {channels}")
    check_size(channels, *values.shape[1:])
    black_white = raw.black_white if raw.fills_a_byte else value_range or raw.black_white
    if black_white is None:
        raise BadImage(f"{values.dtype} values, whose range is not known: give it by --value_range LOW HIGH")
    levels = torch.from_numpy(np.array(values) if raw.fills_a_byte else scaled(values, *black_white))
    levels = 255 - levels if raw.inverted else levels
    levels = levels.float() if floats else levels.round().to(torch.uint8)
    return match_channels(turn_upright(levels, raw.turn)[None], channels)[0].contiguous()


def without_alpha(raw, channels):
    return raw.values[:-1] if raw.has_alpha and channels in (1, 3) else raw.values


ROWS_AT_ONCE = 2**20  # values in float64


def scaled(values, low, high):
    """low..high -> 0..255 in float64, then float32; what lies outside is clipped, what is no number becomes 0."""
    levels = np.empty(values.shape, np.float32)
    step = max(1, ROWS_AT_ONCE // values.shape[2])
    for plane, target in zip(values, levels, strict=True):
        for row in range(0, len(plane), step):
            block = (plane[row : row + step].astype(np.float64) - low) * (255 / (high - low))
            target[row : row + step] = np.nan_to_num(block, posinf=255).clip(0, 255)
    return levels


# What is looked at before a run ---------------------------------------------------------------------------------------


def open_range(path, reading):
    """(lowest, highest) value of an image whose range only --value_range can tell; None for others and bad ones."""
    try:
        with naming_damage():
            file, page = split_page(path) if reading.pages == "images" else (path, 0)
            pages, _ = defaults(reading.channels, reading.pages, reading.floats)
            raw = read_raw(read_content(file), reading.channels, pages, page)
            finite = raw.values[np.isfinite(raw.values)]
            return (finite.min().item(), finite.max().item()) if raw.black_white is None and finite.size else None
    except BadImage:  # who reads the image names the reason
        return None


def used_range(path, reading):
    """((lowest, highest), (black, white)) of an image's values; None for bad ones and where only --value_range can tell
    what is black and white."""
    try:
        with naming_damage():
            file, page = split_page(path) if reading.pages == "images" else (path, 0)
            pages, _ = defaults(reading.channels, reading.pages, reading.floats)
            raw = read_raw(read_content(file), reading.channels, pages, page)
            values = without_alpha(raw, reading.channels)
            return raw.black_white and ((values.min().item(), values.max().item()), raw.black_white)
    except BadImage:
        return None


def has_pages(path, reading):
    """Whether more is in a file than the page that is read of it. Of an array all is read, or nothing."""
    try:
        with naming_damage():
            pages, _ = defaults(reading.channels, reading.pages, reading.floats)
            return pages == "first" and open_source(read_content(path), reading.channels, False).count(2) > 1
    except BadImage:
        return False


def number_of_pages(path):
    """Of a file; MOST_PAGES + 1 where it has more, 1 where it is bad: who reads that page names the reason."""
    try:
        with naming_damage():
            return count_pages(read_content(path))
    except BadImage:
        return 1


def split_page(path):
    """ "scan.tif#12" -> ("scan.tif", 12)"""
    found = not isinstance(path, bytes) and re.fullmatch(r"(.*)#(\d+)", os.fspath(path), re.DOTALL)
    return (found[1], int(found[2])) if found else (path, 0)
