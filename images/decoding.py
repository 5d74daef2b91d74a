"""What Pillow opens -> pixels: uint8, upright, in colour or gray.

    decode(content, 3, None)                             # uint8 (3, H, W), of the bytes of a file

Shapes: C channels, H x W px.
"""

import functools
import io
import re
import stat
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torchvision.io import ImageReadMode, decode_jpeg, decode_png

from utils import one_line


class BadImage(Exception):
    """A file that is not a whole, readable image."""


def read_file(path):
    """The content of a regular file."""
    check_regular(path)
    return Path(path).read_bytes()


def check_regular(path):
    """A pipe would wait for ever, a device has no end."""
    if not stat.S_ISREG(Path(path).stat().st_mode):
        raise BadImage("not a regular file but a directory, pipe or device")


# Formats --------------------------------------------------------------------------------------------------------------

# whatever a file is called. Not all that PIL knows: for PostScript it starts the program gs
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "DIB", "PPM", "GIF", "JPEG2000", "AVIF", "TGA", "ICO", "HEIF")


@functools.cache
def known_formats():
    """The FORMATS that PIL can read here: AVIF, WebP and JPEG 2000 depend on how it was built, HEIF on pillow-heif."""
    Image.init()
    try:
        import pillow_heif

        pillow_heif.register_heif_opener()
    except ImportError:
        pass
    return tuple(name for name in FORMATS if name in Image.OPEN)


@functools.cache
def known_endings():
    """Endings of the names of files in known_formats(), such as ".jpg"."""
    return endings_of({*known_formats(), "MPO"} - {"HEIF"})  # MPO: a JPEG file of several pictures, read as JPEG


@functools.cache
def late_endings():
    """Endings of the files that are images where no file has one of known_endings(): beside pictures such files are
    other things, masks and features."""
    return endings_of({"HEIF"} & {*known_formats()}) | {".npy", ".npz", ".dcm", ".dicom"}


def endings_of(formats):
    return frozenset(ending for ending, name in Image.registered_extensions().items() if name in formats)


def open_header(data):
    """A PIL image whose pixels are not yet read. Raises BadImage for more pixels than PIL's limit."""
    try:
        image = Image.open(io.BytesIO(data), formats=known_formats())
    except UnidentifiedImageError:
        check_has_reader(data)
        raise
    width, height = image.size
    if width * height > Image.MAX_IMAGE_PIXELS:
        raise BadImage(f"declares {width} x {height} px, more than PIL's limit of {Image.MAX_IMAGE_PIXELS} px in all")
    return image


def without_harm(decoder, data):
    """decoder(data); where that fails, of a PNG or JPEG without what stands beside its pixels."""
    try:
        return decoder(data)
    except BadImage:
        raise
    except Exception:
        bare = without_extras(data)
        if bare is None:
            raise
    return decoder(bare)


def check_has_reader(data):
    """Raises BadImage, with the remedy, for a picture whose kind is known, and which Pillow does not read here."""
    brand = re.match(rb"....ftyp(hei[cxms]|hev[cx]|mif1|avi[fs])", data[:16], re.DOTALL)
    if brand and brand[1].startswith(b"avi") and "AVIF" not in known_formats():
        raise BadImage("AVIF, not read by this Pillow: convert it, or install a newer Pillow")
    if brand and "HEIF" not in known_formats():
        raise BadImage("HEIC, not read by this Pillow: convert it, or pip install pillow-heif")


PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def without_extras(data):
    """A PNG or JPEG without the parts that pixels and orientation do not depend on; None for other files.

    PIL refuses the whole file for a text of more than a megabyte and for a damaged chunk of any kind."""
    if data.startswith(b"\xff\xd8\xff"):
        return jpeg_without_extras(data)
    if not data.startswith(PNG_SIGNATURE):
        return None
    kept, start, view = [PNG_SIGNATURE], len(PNG_SIGNATURE), memoryview(data)
    while start < len(data):
        length, kind = int.from_bytes(view[start : start + 4], "big"), bytes(view[start + 4 : start + 8])
        end = start + 12 + length
        whole = zlib.crc32(view[start + 4 : end - 4]) == int.from_bytes(view[end - 4 : end], "big")
        if kind[:1].isupper() or (kind in (b"tRNS", b"eXIf") and whole):  # upper case: without it there is no image
            kept.append(view[start:end])
        start = end
    return b"".join(kept)


def jpeg_without_extras(data):
    """Of the segments before the scan, those for programs and comments go. JFIF's and Adobe's, which tell the colours,
    stay where they are whole, as EXIF does."""
    kept, start = [data[:2]], 2
    while start + 4 <= len(data) and data[start] == 0xFF and data[start + 1] != 0xDA:  # 0xDA: the scan begins
        if data[start + 1] == 0xFF:  # padding
            start += 1
            continue
        end = start + 2 + int.from_bytes(data[start + 2 : start + 4], "big")
        segment = data[start:end]
        is_extra = 0xE0 <= segment[1] <= 0xEF or segment[1] == 0xFE
        told = {0xE0: (b"JFIF\0", 16), 0xE1: (b"Exif\0\0", 10), 0xEE: (b"Adobe", 14)}.get(segment[1])
        if not is_extra or (told and segment[4:].startswith(told[0]) and len(segment) >= told[1] + 2):
            kept.append(segment)
        start = max(end, start + 4)
    return b"".join([*kept, data[start:]])


# Pixels ---------------------------------------------------------------------------------------------------------------


def decode(data, channels, value_range):
    with open_header(data) as image:
        if image.format in ("JPEG", "MPO") and image.mode in ("L", "RGB"):  # 3 times faster than PIL
            mode = ImageReadMode.RGB if channels == 3 else ImageReadMode.GRAY
            pixels = decode_jpeg(torch.from_numpy(np.frombuffer(data, np.uint8).copy()), mode=mode)
        else:
            pixels = np.array(pixels_of(image, data, "RGB" if channels == 3 else "L", value_range))
            pixels = torch.from_numpy(pixels).reshape(*pixels.shape[:2], channels).permute(2, 0, 1)
        return turn_upright(pixels, orientation(image))


def pixels_of(image, data, mode, value_range):
    """A PIL image, which gets loaded: PIL then knows an orientation that follows the pixels, and has turned a TIFF.

    data: the content of its file."""
    deep = deep_colour(image, data) if value_range is not None and has_deep_colour(image) else None
    image.load()
    if deep is not None:
        return Image.fromarray(to_eight_bits(deep, value_range)).convert(mode)
    return convert(image, mode, value_range)


def orientation(image):
    """EXIF's number from 1 to 8, as PIL reads it: from EXIF, or from XMP if EXIF has none."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF: PIL raises nearly every type there is
        return 1


# EXIF's orientation: (whether rows and columns change places, the dimensions of (C, H, W) that are then mirrored)
TURNS = {
    2: (False, (2,)),
    3: (False, (1, 2)),
    4: (False, (1,)),
    5: (True, ()),
    6: (True, (2,)),
    7: (True, (1, 2)),
    8: (True, (1,)),
}


def turn_upright(pixels, number):
    transposed, mirrored = TURNS.get(number, (False, ()))
    pixels = pixels.transpose(1, 2) if transposed else pixels
    return (pixels.flip(mirrored) if mirrored else pixels).contiguous()


def convert(image, mode, value_range):
    """A loaded PIL image -> one of `mode`, 8 bits."""
    if image.mode.startswith("I;"):  # 16-bit gray, which PIL would clip at 255
        image = Image.fromarray(table_of_eight_bits(value_range or (0, 65535))[np.asarray(image)])
    elif image.mode in ("I", "F"):
        image = Image.fromarray(to_eight_bits(np.asarray(image), value_range or declared_range(image)))
    elif image.mode in ("P", "PA", "LA", "La", "RGBa"):
        image = image.convert("RGBA")
    return image.convert(mode)


# More than 8 bits -----------------------------------------------------------------------------------------------------


def declared_range(image):
    """PIL scales gray PPM of more than 8 bits to 16 bits; the values of other kinds have no range of their own."""
    if image.format == "PPM" and image.mode == "I":
        return 0, 65535
    kind = "float" if image.mode == "F" else "signed or 32-bit integer"
    raise BadImage(f"{kind} pixels, whose range is not known: give it by --value_range LOW HIGH")


@functools.cache
def table_of_eight_bits(value_range):
    """uint8 (65536,): a table, as float32 would take 4 bytes a pixel."""
    return to_eight_bits(np.arange(65536), value_range)


def to_eight_bits(values, value_range):
    """low..high -> 0..255, what lies outside is clipped; a float that is no number becomes 0."""
    low, high = value_range
    values = np.array(values, np.float32)
    values -= low
    values *= 255 / (high - low)
    np.nan_to_num(values, copy=False, posinf=255)
    return np.rint(values.clip(0, 255, out=values), out=values).astype(np.uint8)


def has_deep_colour(image):
    """Whether the colours of an image, not loaded yet, are of 16 bits, of which PIL keeps the upper 8."""
    return any(re.search(r"(RGB[AXa]?|LA|CMYK);16", str(tile[3])) for tile in image.tile)


def deep_colour(image, data):
    """uint16 (H, W, 3)"""
    if image.format != "PNG":
        raise BadImage(f"16-bit colour in {image.format}, of which 8 bits are read: --value_range takes it in PNG")
    pixels = decode_png(torch.from_numpy(np.frombuffer(data, np.uint8).copy()), ImageReadMode.RGB)
    return pixels.permute(1, 2, 0).numpy()


def first_line(error):
    return one_line(str(error).strip().partition("\n")[0]) or type(error).__name__
