"""images/arrays.py and reading.py: what was written comes back, value by value, whatever kind of file holds it."""

import io
import re
import sys
import tracemalloc
import warnings
import zipfile

import numpy as np
import pydicom
import pytest
import tifffile
import torch
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from images import BadImage, arrays, decoding, load_image, open_dataset, reading
from images.arrays import read_raw
from pictures import folder_args, picture, write
from test_decoding import sixteen_bit_colour
from utils import UserError

H, W = 12, 17


def values(dtype, channels=5, seed=0):
    """(C, H, W), of the dtype's whole range or of -3..5 for floats."""
    rng = np.random.default_rng(seed)
    if np.dtype(dtype).kind == "f":
        return rng.uniform(-3, 5, (channels, H, W)).astype(dtype)
    limits = np.iinfo(dtype)
    return rng.integers(limits.min, limits.max, (channels, H, W), dtype, endpoint=True)


def tiff(array, **options):
    written = io.BytesIO()
    tifffile.imwrite(written, array, **options)
    return written.getvalue()


def npy(array, **options):
    written = io.BytesIO()
    np.save(written, array, **options)
    return written.getvalue()


def npz(**named):
    written = io.BytesIO()
    np.savez_compressed(written, **named)
    return written.getvalue()


def dicom(frames, kind="MONOCHROME2", **tags):
    """frames: uint16 or int16 (P, H, W), or uint8 (P, H, W, 3)."""
    file, written = Dataset(), io.BytesIO()
    file.file_meta = FileMetaDataset()
    file.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    file.file_meta.MediaStorageSOPClassUID = file.SOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
    file.file_meta.MediaStorageSOPInstanceUID = file.SOPInstanceUID = "1.2.3"
    bits = 8 * frames.dtype.itemsize
    file.Rows, file.Columns, file.NumberOfFrames = *frames.shape[1:3], len(frames)
    file.SamplesPerPixel, file.PhotometricInterpretation = (3 if frames.ndim == 4 else 1), kind
    file.PlanarConfiguration = 0
    file.BitsAllocated, file.BitsStored, file.HighBit = bits, bits, bits - 1
    file.PixelRepresentation = int(frames.dtype.kind == "i")
    file.PixelData = frames.tobytes()
    for name, value in tags.items():
        setattr(file, name, value)
    pydicom.dcmwrite(written, file, enforce_file_format=True)
    return written.getvalue()


DTYPES = ["uint8", "uint16", "int16", "uint32", "int32", "float16", "float32", "float64"]
LAYOUTS = {
    "pages": lambda a: tiff(a, photometric="minisblack"),
    "deflated pages": lambda a: tiff(a, photometric="minisblack", compression="zlib", predictor=a.dtype.kind != "f"),
    "interleaved": lambda a: tiff(a.transpose(1, 2, 0), photometric="minisblack", planarconfig="contig"),
    "planes": lambda a: tiff(a, photometric="minisblack", planarconfig="separate"),
    "tiles": lambda a: tiff(a, photometric="minisblack", tile=(16, 16), compression="zlib"),
    "big-endian": lambda a: tiff(a, photometric="minisblack", byteorder=">"),
    "bigtiff": lambda a: tiff(a, photometric="minisblack", bigtiff=True),
    "npy, channels first": npy,
    "npy, channels last": lambda a: npy(np.asfortranarray(a.transpose(1, 2, 0))),
    "npz": lambda a: npz(anything=a),
    "npz of several": lambda a: npz(image=a, mask=a[0]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_come_back_as_they_were_written(layout, dtype):
    written = values(dtype)
    raw = read_raw(LAYOUTS[layout](written), 5, "channels")
    assert raw.values.dtype.newbyteorder("=") == dtype and np.array_equal(raw.values, written) and not raw.inverted


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_pages_come_back_without_tifffile_too(monkeypatch, dtype):
    monkeypatch.setitem(sys.modules, "tifffile", None)
    written = values(dtype)
    assert np.array_equal(read_raw(LAYOUTS["pages"](written), 5, "channels").values, written)


def test_sixteen_bit_pngs_come_back():
    gray, colour = values("uint16", 1), values("uint16", 3)
    written = io.BytesIO()
    Image.fromarray(gray[0]).save(written, "PNG")
    assert np.array_equal(read_raw(written.getvalue(), 1).values, gray)
    assert np.array_equal(read_raw(sixteen_bit_colour(colour.transpose(1, 2, 0)), 3).values, colour)


def test_an_npy_is_mapped_into_memory(tmp_path):
    written = values("int16")
    np.save(tmp_path / "a.npy", written)
    content = reading.read_content(tmp_path / "a.npy")
    assert isinstance(content, np.memmap) and np.array_equal(read_raw(content, 5).values, written)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16"])
def test_dicom(dtype):
    frames = values(dtype, 2)
    raw = read_raw(dicom(frames), 1)
    assert np.array_equal(raw.values, frames[:1])
    assert raw.black_white == (None if dtype == "int16" else (0, np.iinfo(dtype).max))
    assert np.array_equal(read_raw(dicom(frames), 2, "channels").values, frames)
    assert np.array_equal(read_raw(dicom(frames), 1, "images", 1).values, frames[1:])


def test_dicom_in_colour():
    rgb = values("uint8", 3).transpose(1, 2, 0)[None]
    assert np.array_equal(load(dicom(np.ascontiguousarray(rgb), "RGB")).permute(1, 2, 0).numpy(), rgb[0])


def test_dicoms_rescaled_values_and_its_inverted_gray():
    """Hounsfield units by the formula of the standard (PS3.3 C.11.1), white and black changed for MONOCHROME1."""
    frames = np.random.default_rng(0).integers(0, 4096, (1, H, W), dtype=np.uint16)
    content = dicom(frames, "MONOCHROME1", RescaleSlope="2.5", RescaleIntercept="-1024", BitsStored=12, HighBit=11)
    raw = read_raw(content, 1)
    units = frames * 2.5 - 1024
    assert raw.inverted and raw.black_white is None and np.array_equal(raw.values, units)
    expected = 1 - ((units - -500) / 2000).clip(0, 1)
    assert np.allclose(load(content, 1, (-500, 1500), floats=True).numpy() / 255, expected, atol=1e-6)
    plain = dicom(frames, BitsStored=12, HighBit=11)
    assert np.allclose(load(plain, 1, floats=True).numpy() / 255, frames / 4095, atol=1e-6)  # 12 bits are stored


def load(content, channels=3, value_range=None, pages=None, floats=None):
    return load_image(content, channels, value_range, pages, floats)


# Levels


@pytest.mark.parametrize(
    ("dtype", "value_range"),
    [("uint16", (0, 65535)), ("uint16", (100, 40000)), ("int16", (-1024, 3071)), ("float32", (-2, 4)),
     ("float64", (-2.5, 0.1)), ("uint32", (5, 4e9)), ("uint8", (0, 255))],
)  # fmt: skip
def test_levels_are_those_of_float64(dtype, value_range):
    written, (low, high) = values(dtype), value_range
    loaded = load(npy(written), 5, value_range)
    assert loaded.dtype == torch.float32 and loaded.shape == (5, H, W)
    expected = ((written.astype(np.float64) - low) / (high - low)).clip(0, 1)
    assert np.abs(loaded.numpy() / 255 - expected).max() < 1e-6
    assert torch.equal(load(npy(written), 5, value_range, floats=False), loaded.round().to(torch.uint8))


def test_ranges_that_need_no_flag(tmp_path):
    sixteen, bits = values("uint16"), values("uint8") > 128
    assert np.allclose(load(npy(sixteen), 5).numpy(), sixteen / 257.0, atol=1e-4)
    assert torch.equal(load(npy(bits), 5), 255.0 * torch.from_numpy(bits))
    assert np.array_equal(load(npy(values("uint8")), 5, (0, 10)).numpy(), values("uint8"))  # 8 bits are as they are
    for dtype in ("int16", "uint32", "float32"):
        with pytest.raises(BadImage, match=f"{dtype} values, whose range is not known.*--value_range LOW HIGH"):
            load(npy(values(dtype)), 5)


def test_values_that_are_no_numbers():
    odd = np.array([[[np.nan, np.inf, -np.inf, 0.5]]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load(npy(odd), 1, (0, 1), floats=True)[0].tolist() == [[0, 255, 0, 127.5]]


def test_white_is_zero_and_orientation_in_tiff():
    written = values("uint16", 1)[0]
    inverted = tiff(written, photometric="miniswhite", extratags=[(274, 3, 1, 3, True)])
    assert np.allclose(load(inverted, 1, floats=True)[0].numpy(), 255 - written[::-1, ::-1] / 257.0, atol=1e-4)


# Channels


def test_gray_and_colour_in_arrays_become_each_other():
    gray, colour = values("uint8", 1), values("uint8", 3)
    assert np.array_equal(load(npy(gray[0])).numpy(), np.repeat(gray, 3, axis=0))
    luma = (0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]).round()
    assert np.abs(load(npy(colour), 1)[0].numpy() - luma).max() <= 1
    alpha = tiff(values("uint16", 4).transpose(1, 2, 0), photometric="rgb", extrasamples=["unassalpha"])
    assert np.allclose(load(alpha, 3, floats=True).numpy(), values("uint16", 4)[:3] / 257.0, atol=1e-4)


@pytest.mark.parametrize("kind", ["a.png", "a.jpg", "palette.png", "la.png"])
@pytest.mark.parametrize("channels", [1, 3])
def test_float_pixels_of_pictures_are_those_of_today(tmp_path, kind, channels):
    image = Image.fromarray(picture(H, W))
    image = {"palette.png": image.quantize(16), "la.png": image.convert("LA")}.get(kind, image)
    image.save(tmp_path / kind)
    floats = load_image(tmp_path / kind, channels, floats=True)
    assert floats.dtype == torch.float32 and torch.equal(floats, load_image(tmp_path / kind, channels).float())


def test_pictures_with_other_channels(tmp_path):
    rgba = np.dstack([picture(H, W), picture(H, W, 1)])
    write(tmp_path / "a.png", rgba)
    assert np.array_equal(load_image(tmp_path / "a.png", 4).permute(1, 2, 0).numpy(), rgba)
    Image.fromarray(rgba[..., 2:], "LA").save(tmp_path / "la.png")
    assert np.array_equal(load_image(tmp_path / "la.png", 2).permute(1, 2, 0).numpy(), rgba[..., 2:])
    for channels, has in ((5, 4), (2, 4)):
        with pytest.raises(BadImage, match=f"has {has} channels, --in_chans is {channels}"):
            load_image(tmp_path / "a.png", channels)


def test_other_channels_are_refused():
    for content, channels in ((tiff(values("uint16"), photometric="minisblack"), 4), (npy(values("uint16")), 3)):
        with pytest.raises(BadImage, match="--in_chans"):
            load(content, channels, pages="channels")
    mixed = io.BytesIO()
    with tifffile.TiffWriter(mixed) as writer:
        for dtype in ("uint8", "uint16"):
            writer.write(values(dtype, 1)[0])
    with pytest.raises(BadImage, match="pages differ"):
        load(mixed.getvalue(), 2)


# Pages


def test_pages_are_channels_or_images(tmp_path):
    written = values("uint8", 3)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.tif").write_bytes(tiff(written, photometric="minisblack"))
    write(tmp_path / "images" / "b.png", written[0])
    content = (tmp_path / "images" / "a.tif").read_bytes()
    assert torch.equal(load(content), load(npy(written[0])))  # the first page, as gray
    assert np.array_equal(load(content, pages="channels").numpy(), written)
    pages = open_dataset(folder_args(tmp_path / "images", "--pages", "images", "--in_chans", 1))
    assert len(pages) == 4 and "each page of 2 files" in pages.summary and pages.name(2).endswith("a.tif#2")
    for index, expected in enumerate([*written, written[0]]):
        assert np.array_equal(pages.load(index, 1)[0].numpy(), expected)
    others = {open_dataset(folder_args(tmp_path / "images", "--pages", how)).fingerprint for how in reading.PAGES}
    assert len(others) == 3 and open_dataset(folder_args(tmp_path / "images")).fingerprint not in others


def test_the_first_axis_of_an_npy_counts_images(tmp_path):
    for name, seed in (("a", 0), ("b", 1)):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "x.npy", np.stack([values("int16", seed=seed), values("int16", seed=2)]))
    args = folder_args(tmp_path, "--pages", "images", "--in_chans", 5, "--value_range", -32768, 32767)
    images = open_dataset(args)
    assert len(images) == 4 and images.labels.tolist() == [0, 0, 1, 1]
    expected = (values("int16", seed=1) + 32768.0) / 257
    assert np.allclose(images.load(2, 5).numpy(), expected, atol=1e-4)


def test_a_file_of_more_pages_than_are_read_is_said(tmp_path):
    np.save(tmp_path / "many.npy", np.zeros((arrays.MOST_PAGES + 1, 1, 1), np.uint8))
    np.save(tmp_path / "two.npy", np.zeros((2, 1, 1), np.uint8))
    found = open_dataset(folder_args(tmp_path, "--pages", "images", "--in_chans", 1))
    assert [found.name(index)[-10:] for index in range(len(found))] == ["many.npy#0", "/two.npy#0", "/two.npy#1"]
    assert "of 1 with more than 10,000 pages the first page alone" in found.summary
    (tmp_path / "many.npy").unlink()
    assert "more than" not in open_dataset(folder_args(tmp_path, "--pages", "images", "--in_chans", 1)).summary


# Folders


def test_arrays_beside_pictures_are_no_images(tmp_path):
    for number in range(3):
        write(tmp_path / f"{number}.png", picture(H, W))
        np.save(tmp_path / f"{number}.npy", picture(H, W))
    images = open_dataset(folder_args(tmp_path))
    assert len(images) == 3 and ".npy 3" in images.summary
    for number in range(3):
        (tmp_path / f"{number}.png").unlink()
    assert len(open_dataset(folder_args(tmp_path))) == 3


def test_a_range_that_is_needed_is_asked_for_with_the_values_found(tmp_path):
    for number in range(3):
        np.save(tmp_path / f"{number}.npy", np.full((5, H, W), number - 1.5))
    with pytest.raises(UserError, match=re.escape("from -1.5 to 0.5 in 3 of them")) as error:
        open_dataset(folder_args(tmp_path, "--in_chans", 5))
    assert "--value_range LOW HIGH is needed" in str(error.value) and "\n" not in str(error.value)
    assert len(open_dataset(folder_args(tmp_path, "--in_chans", 5, "--value_range", -2, 2))) == 3


# Files that lie


class Harmful:
    def __reduce__(self):
        return exec, ("raise SystemExit('executed')",)


def lying_npy(shape, dtype="<f4", body=b"", kind=1):
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (63 - (len(header) + 10) % 64) + b"\n"
    return b"\x93NUMPY" + bytes([kind, 0]) + len(header).to_bytes(2, "little") + header + body


def zip_of(name, content, claimed=None):
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    data = written.getvalue()
    return data if claimed is None else data.replace(len(content).to_bytes(4, "little"), claimed.to_bytes(4, "little"))


def deflate_bomb():
    """A TIFF of 64 x 64 px whose only strip unpacks to 256 MB."""
    content = bytearray(tiff(np.zeros((64, 64), np.uint16), compression="zlib"))
    page = tifffile.TiffFile(io.BytesIO(content)).pages[0]
    bomb = zipfile.zlib.compress(bytes(2**28), 9)
    for name, value in (("StripOffsets", len(content)), ("StripByteCounts", len(bomb))):
        tag = page.tags[name]
        content[tag.offset + 2 : tag.offset + 12] = b"\x04\0\x01\0\0\0" + value.to_bytes(4, "little")
    return bytes(content) + bomb


def many_pages(count):
    """A TIFF whose pages are one directory each, of one pixel, 40 bytes; the last leads to none."""
    entries = [(256, 1), (257, 1), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1), (278, 1), (279, 1)]
    one = len(entries).to_bytes(2, "little") + b"".join(
        tag.to_bytes(2, "little") + b"\x03\0\x01\0\0\0" + value.to_bytes(4, "little") for tag, value in entries
    )
    offsets = [8 + (len(one) + 4) * (number + 1) for number in range(count)]
    offsets[-1] = 0
    return b"II*\0\x08\0\0\0" + b"".join(one + offset.to_bytes(4, "little") for offset in offsets)


def giant_dicom():
    content = dicom(values("uint16", 1))
    for name in (0x0010, 0x0011):  # Rows, Columns
        place = content.index(b"\x28\0" + name.to_bytes(2, "little") + b"US")
        content = content[: place + 8] + b"\xff\xff" + content[place + 10 :]
    return content


LIARS = {
    "pickled npy": lambda: npy(np.array([Harmful()], object), allow_pickle=True),
    "pickled npz": lambda: npz(image=np.array([Harmful()], object)),
    "npy of 10^12": lambda: lying_npy((1000, 10**6, 1000)),
    "npy of -1": lambda: lying_npy((5, -1, 12)),
    "npy of 0": lambda: lying_npy((5, 0, 12)),
    "npy of dates": lambda: lying_npy((4, 4), "<M8[s]", bytes(128)),
    "npy of complex": lambda: npy(np.ones((4, 4), complex)),
    "npy that is cut off": lambda: npy(values("float64"))[:-9],
    "npy whose header is code": lambda: lying_npy("__import__('os').abort()"),
    "npz bomb": lambda: zip_of("a.npy", lying_npy((1, 2**14, 2**14), "|u1", bytes(2**28))),
    "npz that lies of its size": lambda: zip_of("a.npy", npy(np.zeros((512, 512))), 1000),
    "npz with a header of 2 GB": lambda: zip_of("a.npy", b"\x93NUMPY\2\0\0\0\0\x80" + bytes(2**26)),
    "npy whose header is deep": lambda: lying_npy("(" * 400 + ")" * 400),
    "npz of another thing": lambda: zip_of("a.txt", b"hello"),
    "npz that is cut off": lambda: npz(image=values("int16"))[:-40],
    "tiff of 10^6 pages": lambda: many_pages(10**6),
    "tiff whose pages go round": lambda: many_pages(3)[:-4] + b"\x08\0\0\0",
    "tiff bomb": deflate_bomb,
    "tiff that is cut off": lambda: tiff(values("int16"), photometric="minisblack")[:700],
    "dicom of 65535 x 65535": giant_dicom,
    "deflated dicom": lambda: dicom(values("uint16", 1)).replace(b"1.2.840.10008.1.2.1\0", arrays.DEFLATED),
    "dicom that is cut off": lambda: dicom(values("uint16", 1))[:-20],
    "dicom that ends": lambda: dicom(values("uint16", 1))[:140],
    "heic": lambda: b"\0\0\0\x18ftypheic" + bytes(100),
}


@pytest.mark.parametrize("name", LIARS)
@pytest.mark.parametrize("as_bytes", [False, True])
def test_a_file_that_lies_is_a_bad_image(tmp_path, name, as_bytes):
    content = LIARS[name]()
    name = "a.npy" if "npy" in name else "a"
    (tmp_path / name).write_bytes(content)
    for channels in (1, 5):
        with pytest.raises(BadImage) as error:
            if as_bytes:
                load(content, channels, (0, 1), "channels")
            else:
                load_image(tmp_path / name, channels, (0, 1), "channels")
        assert "\n" not in str(error.value) and len(str(error.value)) < 300


@pytest.mark.parametrize(
    "name", ["npz bomb", "npz with a header of 2 GB", "tiff bomb", "npy of 10^12", "dicom of 65535 x 65535"]
)
def test_what_a_file_declares_is_refused_before_room_is_made_for_it(name):
    content = LIARS[name]()
    tracemalloc.start()
    with pytest.raises(BadImage):
        load(content, 1, (0, 1), "channels")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**24


def test_pages_are_counted_up_to_a_limit():
    assert arrays.count_pages(many_pages(30)) == 30 and arrays.count_pages(many_pages(10**5)) == arrays.MOST_PAGES + 1


def test_dicom_without_pydicom_names_it(monkeypatch):
    content = dicom(values("uint16", 1))
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(BadImage, match="pip install pydicom"):
        load(content, 1)


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_a_kind_without_a_reader_is_named(monkeypatch, channels):
    formats = tuple(set(decoding.known_formats()) - {"HEIF", "AVIF"})
    monkeypatch.setattr(decoding, "known_formats", lambda: formats)
    for brand, said in ((b"heic", "HEIC.*pillow-heif"), (b"avif", "AVIF.*newer Pillow")):
        with pytest.raises(BadImage, match=said):
            load(b"\0\0\0\x18ftyp" + brand + bytes(100), channels)


def test_pages_that_are_not_read_are_said(tmp_path, capsys):
    for number in range(2):
        (tmp_path / f"{number}.tif").write_bytes(tiff(values("uint8"), photometric="minisblack"))
    assert not open_dataset(folder_args(tmp_path, "--pages", "images")).notes()
    (note,) = open_dataset(folder_args(tmp_path)).notes()
    assert note.startswith("note: 2 of 2 images looked at have several pages, of which the first is read: --pages ")


def twelve_bits(channels=1):
    return values("uint16", channels) // 16


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.png", sixteen_bit_colour(twelve_bits(3).transpose(1, 2, 0))),
        ("a.tif", tiff(twelve_bits()[0], photometric="minisblack")),
        ("a.tif", tiff(twelve_bits(3).transpose(1, 2, 0), photometric="rgb")),
        ("a.npy", npy(twelve_bits()[0])),
        ("a.npz", npz(image=twelve_bits(3))),
        ("a.dcm", dicom(twelve_bits())),
    ],
)
def test_a_range_that_is_hardly_used_is_said_of_any_kind_of_file(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    notes = open_dataset(folder_args(tmp_path)).notes()
    found = [
        re.search(r"1 of 1 images .* 16 bits, with values from (\d+) to (\d+) only, .*--value_range", note)
        for note in notes
    ]
    assert len(found) == 1 and 0 <= int(found[0][1]) < 100 and 4000 < int(found[0][2]) < 4096
    assert not open_dataset(folder_args(tmp_path, "--value_range", "0", "4095")).notes()
    loaded = load_image(tmp_path / name, 3, (0, 4095))
    assert loaded.dtype == torch.uint8 and loaded.min() < 8 and loaded.max() > 247


def test_masks_are_hardly_used_bytes(tmp_path):
    write(tmp_path / "a.png", picture(9, 9) // 50)
    (note,) = open_dataset(folder_args(tmp_path)).notes()
    assert re.search("8 bits, with values from 0 to 5 only, .*are they masks", note)
    write(tmp_path / "a.png", picture(9, 9))
    assert not open_dataset(folder_args(tmp_path)).notes()
    Image.fromarray(np.eye(9, dtype=bool)).save(tmp_path / "a.png")  # one bit: black and white
    assert not open_dataset(folder_args(tmp_path)).notes()
