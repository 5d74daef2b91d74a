"""A file -> an array of its own dtype: TIFF of any bits and pages, NumPy's .npy and .npz, DICOM, and what Pillow opens.

    read_raw(content, 5, "channels")                     # RawImage: values (5, H, W), int16 as they were written
    count_pages(content, 10)                             # 10 or fewer

Sizes are read and compared with a limit before any pixel is; nothing in a file is executed.

Shapes: C channels, H x W px, P pages.
"""

import dataclasses
import io
import logging
import math
import zipfile
import zlib

import numpy as np
import torch
from PIL import Image, ImageSequence
from torchvision.io import ImageReadMode, decode_png

from images.decoding import BadImage, decode, first_line, has_deep_colour, open_header, orientation, without_harm

MOST_VALUES = Image.MAX_IMAGE_PIXELS  # 89 million, of all channels together: 4 bytes each as float32
MOST_PAGES = 10_000
LONGEST_HEADER = 2**16  # bytes of an .npy's, which NumPy reads to its end before it looks at it


@dataclasses.dataclass
class RawImage:
    """values: (C, H, W) as they stand in the file.  black_white: the values that are black and white where the file or
    its dtype says so, or None.  inverted: whether black is the higher one.  turn: EXIF's orientation.  has_alpha:
    whether the last channel is no colour."""

    values: np.ndarray
    black_white: tuple | None = None
    inverted: bool = False
    turn: int = 1
    has_alpha: bool = False

    def __post_init__(self):
        if self.values.dtype.kind not in "buif":
            raise BadImage(f"values of type {self.values.dtype}: expected whole numbers or floats")
        own = {"u1": (0, 255), "u2": (0, 65535), "b1": (0, 1)}
        self.black_white = self.black_white or own.get(self.values.dtype.str[1:])

    @property
    def fills_a_byte(self):
        return self.values.dtype == np.uint8 and self.black_white == (0, 255)


def read_raw(content, channels, pages="first", page=0):
    """A RawImage. content: bytes of a file, or an array that is mapped into memory.

    channels: how many are expected: it tells (H, W, C) from (C, H, W) in arrays, and how many pages are looked at.
    pages: "first" of the file, "images": number `page`, or "channels": all, one after the other.
    Raises BadImage, and whatever a decoder raises."""
    source = open_source(content, channels, pages == "images")
    if pages != "channels":
        return source.read(page)
    count = source.count(channels + 1)
    if count > channels:
        raise BadImage(f"has more than {channels} pages, --in_chans is {channels}; see --pages")
    return joined([source.read(number) for number in range(count)])


def joined(raws):
    first, *others = raws
    for raw in others:
        if raw.values.shape[1:] != first.values.shape[1:] or raw.values.dtype != first.values.dtype:
            raise BadImage("its pages differ in size or type, so that they are no channels; see --pages")
    return dataclasses.replace(first, values=np.concatenate([raw.values for raw in raws])) if others else first


def count_pages(content, most=MOST_PAGES + 1):
    """Pages of a file, or `most` where it has more."""
    return open_source(content, 1, True).count(most)


def open_source(content, channels, pages_are_images):
    """What has .count(most) pages and .read(number) -> RawImage. Told by the content, whatever a file is called."""
    if isinstance(content, np.ndarray):
        return NumpyArray(content, channels, pages_are_images)
    if content.startswith(b"\x93NUMPY"):
        return NumpyArray(read_npy(io.BytesIO(content)), channels, pages_are_images)
    if content.startswith(b"PK\x03\x04"):
        return NumpyArray(read_npz(content), channels, pages_are_images)
    if is_dicom(content):
        return Dicom(content)
    tiff = Tiff.opened(content) if is_tiff(content) else None
    return tiff or Picture(content, channels)


def is_picture(content):
    """Whether it is of Pillow's kinds."""
    is_array = isinstance(content, np.ndarray) or content.startswith((b"\x93NUMPY", b"PK\x03\x04"))
    return not is_array and not is_dicom(content)


def is_tiff(content):
    return isinstance(content, bytes) and content.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"))


def check_size(*shape):
    if math.prod(shape) > MOST_VALUES:
        raise BadImage(f"declares {' x '.join(map(str, shape))} values, more than the limit of {MOST_VALUES} in all")
    if math.prod(shape) < 1:
        raise BadImage(f"declares {' x '.join(map(str, shape))} values")


# NumPy ----------------------------------------------------------------------------------------------------------------


class NumpyArray:
    """(H, W), (H, W, C) or (C, H, W), told by which end has as many as there are channels; the last one, if both have.
    Where pages are images, the first axis counts them."""

    def __init__(self, array, channels, pages_are_images):
        self.pages, self.channels = array if pages_are_images else array[None], channels

    def count(self, most):
        return min(len(self.pages), most)

    def read(self, number):
        shape = self.pages.shape[1:]
        check_size(*shape)
        for channels in (self.channels, *((1, 3) if self.channels in (1, 3) else ())):
            if len(shape) == 2 or (len(shape) == 3 and channels in (shape[0], shape[2])):
                page = self.pages[number]
                return RawImage(page[None] if page.ndim == 2 else channels_first(page, shape[2] == channels))
        raise BadImage(
            f"is an array of {' x '.join(map(str, shape))}, expected H x W, or H x W x C or C x H x W with "
            f"{self.channels} channels (--in_chans)"
        )


def channels_first(page, last):
    return page.transpose(2, 0, 1) if last else page


def read_npy(file):
    """An array, of a stream that begins with a header: what that declares is checked before room is made for it."""
    major, _ = np.lib.format.read_magic(file)
    header = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}.get(major)
    if header is None:
        raise BadImage(f"NumPy's format {major}, expected 1 or 2")
    size = int.from_bytes(file.read(2 * major), "little")
    if size > LONGEST_HEADER:
        raise BadImage(f"declares a header of {size} bytes, more than {LONGEST_HEADER}")
    file.seek(np.lib.format.MAGIC_LEN)
    shape, _, dtype = header(file)
    if dtype.kind not in "buif":
        raise BadImage(f"values of type {dtype}: expected whole numbers or floats")
    check_size(*shape)
    file.seek(0)
    return np.lib.format.read_array(file, allow_pickle=False)


def map_npy(path):
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise BadImage(f"no whole array of numbers: {first_line(error)}") from error


def read_npz(content):
    """Its only array, or the one called image. What an archive declares is all that is ever unpacked of it."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        names = archive.namelist()
        name = names[0] if len(names) == 1 else "image.npy"
        if name not in names or not name.endswith(".npy"):
            raise BadImage("a zip archive with other than one array (.npy), and none of them called image")
        with archive.open(name) as file:
            return read_npy(file)


# DICOM ----------------------------------------------------------------------------------------------------------------

DEFLATED = b"1.2.840.10008.1.2.1.99"  # the whole file is compressed, and would be unpacked without a limit


def is_dicom(content):
    return content[128:132] == b"DICM"


class Dicom:
    """Frames are pages. Values are stored values times RescaleSlope plus RescaleIntercept; MONOCHROME1 is inverted."""

    def __init__(self, content):
        try:
            import pydicom
        except ImportError:
            raise BadImage("DICOM needs pydicom: pip install pydicom") from None
        if DEFLATED in content:
            raise BadImage("DICOM that is deflated as a whole is not read: decompress it (dcmconv)")
        self.file = pydicom.dcmread(io.BytesIO(content))
        self.kind = str(self.file.get("PhotometricInterpretation", "")).upper()
        if not self.kind.startswith(("MONOCHROME", "RGB", "YBR")):
            raise BadImage(f"DICOM of colours {self.kind or 'that it does not name'}: expected gray, RGB or YBR")
        check_size(self.file.Rows, self.file.Columns, int(self.file.get("SamplesPerPixel", 1)))

    def count(self, most):
        return min(int(self.file.get("NumberOfFrames") or 1), most)

    def read(self, number):
        from pydicom.pixels import pixel_array

        file = self.file
        values = pixel_array(file, index=number)
        values = values[None] if values.ndim == 2 else values.transpose(2, 0, 1)
        slope, intercept = (float(file.get(name, default)) for name, default in
                            (("RescaleSlope", 1), ("RescaleIntercept", 0)))  # fmt: skip
        inverted = self.kind == "MONOCHROME1"
        if (slope, intercept) != (1, 0):
            return RawImage(values * slope + intercept, inverted=inverted)
        unsigned = values.dtype.kind == "u"
        return RawImage(values, (0, 2 ** int(file.BitsStored) - 1) if unsigned else None, inverted)


# TIFF -----------------------------------------------------------------------------------------------------------------

WHITE_IS_ZERO, BLACK_IS_ZERO, RGB = 0, 1, 2
DEFLATE = (8, 32946)
COMPRESSIONS = (1, 5, *DEFLATE, 32773)  # none, LZW, deflate, PackBits: what tifffile unpacks in bounded memory
LARGE_SEGMENT = 2**17  # bytes that deflate may unpack to 1,032 times as many


class Tiff:
    """Pages as tifffile reads them: any number of channels, any whole or float type."""

    def __init__(self, file):
        self.pages = file.pages

    @classmethod
    def opened(cls, content):
        """None where that is left to Pillow: no tifffile, or palettes, odd bits and compressions of its own."""
        try:
            import tifffile
        except ImportError:
            return None
        tifffile.logger().setLevel(logging.CRITICAL)  # what it prints of damage, BadImage says or is harmless
        opened = cls(tifffile.TiffFile(io.BytesIO(content)))
        first = opened.pages[0]
        fits = first.photometric in (WHITE_IS_ZERO, BLACK_IS_ZERO, RGB) and first.compression in COMPRESSIONS
        fits &= first.bitspersample in (8, 16, 32, 64) and first.compression in tifffile.TIFF.DECOMPRESSORS
        return opened if fits else None

    def count(self, most):
        try:
            self.pages[most - 1]
            return most
        except IndexError:
            self.check_end()
            return len(self.pages)

    def check_end(self):
        """Raises BadImage where the last page leads to another, which is not there."""
        file = self.pages.parent.filehandle
        file.seek(self.pages.next_page_offset)
        if any(file.read(self.pages.parent.tiff.offsetsize)):
            raise BadImage("is cut off: its last page leads to one that is not in the file")

    def read(self, number):
        page = self.pages[number]
        check_size(*page.shape)
        if page.axes not in ("YX", "YXS", "SYX") or page.compression not in COMPRESSIONS:
            raise BadImage(f"a TIFF page of axes {page.axes}, compression {page.compression}: expected plain pixels")
        if page.compression in DEFLATE:
            check_inflation(page)
        values = page.asarray(maxworkers=1)
        values = values[None] if values.ndim == 2 else channels_first(values, page.axes == "YXS")
        turn = page.tags.get(274)
        return RawImage(
            values,
            inverted=page.photometric == WHITE_IS_ZERO,
            turn=turn.value if turn is not None else 1,
            has_alpha=len(page.extrasamples) == 1 and page.extrasamples[0] in (1, 2),
        )


def check_inflation(page):
    """Raises BadImage where a segment of a page holds more than the page declares."""
    declared = math.prod(page.chunks) * page.dtype.itemsize
    file = page.parent.filehandle
    for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True):
        if count > LARGE_SEGMENT:
            file.seek(offset)
            if len(zlib.decompressobj().decompress(file.read(count), declared + 1)) > declared:
                raise BadImage("a segment of it unpacks to more pixels than it declares")


# Pillow ---------------------------------------------------------------------------------------------------------------


class Picture:
    """What Pillow opens, of the formats of decoding.py. Of 8 bits: for 1 and 3 channels as `decode` has it; for others
    the channels that Pillow has, of a palette its colours."""

    def __init__(self, content, channels):
        self.content, self.channels = content, channels

    def count(self, most):
        with open_header(self.content) as image:
            if image.format != "TIFF":
                return 1
            return sum(1 for _, _ in zip(range(most), ImageSequence.Iterator(image), strict=False))

    def read(self, number):
        return without_harm(lambda content: self.read_page(content, number), self.content)

    def read_page(self, content, number):
        with open_header(content) as image:
            if number:
                image.seek(number)
            check_size(*image.size, len(image.getbands()))
            deep = deep_values(image, content)
            if deep is not None:
                black_white = (0, 65535) if (image.format, image.mode) == ("PPM", "I") else None
                return RawImage(deep, black_white, turn=orientation(image), has_alpha=len(deep) in (2, 4))
            if self.channels in (1, 3) and not number:
                return RawImage(decode(content, self.channels, None).numpy())
            return RawImage(bands(image, self.channels), turn=orientation(image))


def deep_values(image, content):
    """(C, H, W) of an image of more than 8 bits; None for others."""
    if has_deep_colour(image):
        if image.format != "PNG":
            raise BadImage(f"16-bit colour in {image.format}, of which Pillow reads 8 bits (tifffile reads all)")
        pixels = torch.from_numpy(np.frombuffer(content, np.uint8).copy())
        return decode_png(pixels, ImageReadMode.UNCHANGED).numpy()
    if image.mode.startswith("I") or image.mode == "F":
        return np.array(image)[None]
    return None


def bands(image, channels):
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA" if image.mode == "PA" or "transparency" in image.info else "RGB")
    if channels in (1, 3):
        image = image.convert("RGB" if channels == 3 else "L")
    elif image.mode == "1":
        image = image.convert("L")
    values = np.array(image)
    return values[None] if values.ndim == 2 else values.transpose(2, 0, 1)
