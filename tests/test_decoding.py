"""images/decoding.py against PIL, numpy and what was written."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from images import BadImage, decoding, load_image
from pictures import picture, write

RGB, GRAY = picture(40, 56), picture(40, 56, 1)
ALPHA = np.dstack([RGB, picture(40, 56, 1, seed=1)])


@pytest.mark.parametrize(
    ("name", "image", "options", "tolerance"),
    [
        ("rgb.jpg", Image.fromarray(RGB), {"quality": 95}, 12),
        ("gray.jpg", Image.fromarray(GRAY), {"quality": 95}, 12),
        ("progressive.jpg", Image.fromarray(RGB), {"quality": 95, "progressive": True}, 12),
        ("cmyk.jpg", Image.fromarray(RGB).convert("CMYK"), {"quality": 95}, 20),
        ("rgb.png", Image.fromarray(RGB), {}, 0),
        ("gray.png", Image.fromarray(GRAY), {}, 0),
        ("alpha.png", Image.fromarray(ALPHA), {}, 0),
        ("gray_alpha.png", Image.fromarray(np.dstack([GRAY, GRAY]), "LA"), {}, 0),
        ("bits.png", Image.fromarray(GRAY).convert("1"), {}, None),
        ("palette.png", Image.fromarray(RGB).quantize(64), {}, None),
        ("palette_clear.png", Image.fromarray(RGB).quantize(64), {"transparency": bytes(range(64))}, None),
        ("sixteen.png", Image.fromarray(GRAY.astype(np.uint16) * 257), {}, 0),
        ("sixteen.tif", Image.fromarray(GRAY.astype(np.uint16) * 257), {}, 0),
        ("sixteen.pgm", Image.fromarray(GRAY.astype(np.uint16) * 257), {}, 0),
        ("lossless.webp", Image.fromarray(RGB), {"lossless": True}, 0),
        ("alpha.webp", Image.fromarray(ALPHA), {"lossless": True, "exact": True}, 0),
        ("cmyk.tif", Image.fromarray(RGB).convert("CMYK"), {}, 0),
        ("rgb.bmp", Image.fromarray(RGB), {}, 0),
        ("rgb.ppm", Image.fromarray(RGB), {}, 0),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_format_comes_out_as_rgb(tmp_path, name, image, options, tolerance):
    """Equal to what was written, within the loss of the format; tolerance None: to PIL's own conversion."""
    image.save(tmp_path / name, **options)
    source = RGB if image.mode in ("RGB", "RGBA", "CMYK") else np.dstack([GRAY] * 3)
    reference = np.asarray(image.convert("RGB")) if tolerance is None else source
    loaded = load_image(tmp_path / name)
    assert loaded.dtype == torch.uint8 and tuple(loaded.shape) == (3, 40, 56)
    assert np.abs(loaded.permute(1, 2, 0).numpy().astype(int) - reference).max() <= (tolerance or 0)
    if "sixteen" not in name:
        pil = np.asarray(Image.open(tmp_path / name).convert("RGB"))
        assert np.abs(loaded.permute(1, 2, 0).numpy().astype(int) - pil).max() <= 2
    luma = load_image(tmp_path / name, channels=1)
    assert tuple(luma.shape) == (1, 40, 56)
    expected = np.asarray(Image.fromarray(loaded.permute(1, 2, 0).numpy()).convert("L")).astype(int)
    assert np.abs(luma[0].numpy() - expected).max() <= 3


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    levels = np.linspace(0, 65535, 40 * 56).round().astype(np.uint16).reshape(40, 56)
    Image.fromarray(levels).save(tmp_path / "ramp.png")
    assert np.array_equal(load_image(tmp_path / "ramp.png", 1)[0].numpy(), np.rint(levels / 257).astype(np.uint8))


@pytest.mark.parametrize(
    "name", ["a.jpg", "gray.jpg", "progressive.jpg", "cmyk.jpg", "a.png", "a.webp", "a.bmp", "a.tif"]
)
@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.9])
def test_a_truncated_file_is_a_bad_image(tmp_path, name, kept):
    pixels = Image.fromarray(picture(120, 160)).convert({"gray.jpg": "L", "cmyk.jpg": "CMYK"}.get(name, "RGB"))
    pixels.save(tmp_path / name, **({"progressive": True} if name == "progressive.jpg" else {}))
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(BadImage):
        load_image(tmp_path / name)


def test_other_bad_files_are_bad_images(tmp_path):
    (tmp_path / "text.jpg").write_text("not an image")
    (tmp_path / "folder.jpg").mkdir()
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "float.tif")
    pgm = b"P5 %d 10000 255 "
    (tmp_path / "large.pgm").write_bytes(pgm % 10000)  # above PIL's limit
    (tmp_path / "bomb.pgm").write_bytes(pgm % 20000)  # above twice the limit, where PIL itself refuses
    reasons = {
        "text.jpg": "not an image",
        "folder.jpg": "directory",
        "missing.jpg": "No such file",
        "float.tif": "float",
    }
    for name, reason in (*reasons.items(), ("large.pgm", "10000 x 10000 px"), ("bomb.pgm", "bomb")):
        with pytest.raises(BadImage, match=reason) as error:
            load_image(tmp_path / name)
        assert "\n" not in str(error.value)


def test_damaged_bytes_never_raise_anything_else(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("a.jpg", "a.png", "a.webp", "a.tif", "a.bmp"):
        path = write(tmp_path / name, picture(40, 56))
        whole = np.frombuffer(path.read_bytes(), np.uint8)
        for _ in range(60):
            damaged = whole.copy()
            places = rng.integers(0, min(len(whole), 400), 4)
            damaged[places] = rng.integers(0, 256, 4)
            path.write_bytes(damaged.tobytes())
            try:
                assert load_image(path).shape[0] == 3
            except BadImage as error:
                assert "\n" not in str(error)


# Orientation

WRITTEN_AS = {  # ending: options
    "jpg": {"quality": 95},
    "mpo": {"quality": 95, "save_all": True, "append_images": [Image.fromarray(255 - RGB)]},
    "png": {},
    "webp": {"lossless": True},
    "tif": {},
    "tiff": {"compression": "tiff_lzw"},
    "avif": {},
}


@pytest.mark.parametrize("ending", WRITTEN_AS)
@pytest.mark.parametrize("number", range(1, 9))
def test_orientation_is_applied(tmp_path, number, ending):
    if f".{ending}" not in decoding.known_endings():
        pytest.skip(f"this PIL reads no {ending}")
    exif, path = Image.Exif(), tmp_path / f"turned.{ending}"
    exif[0x0112] = number
    Image.fromarray(RGB).save(path, exif=exif, **WRITTEN_AS[ending])
    assert_like_pil(path, (40, 56) if number < 5 else (56, 40))


def assert_like_pil(path, shape):
    expected = np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB")).astype(int)
    loaded = load_image(path).permute(1, 2, 0).numpy()
    assert loaded.shape == expected.shape == (*shape, 3)
    assert np.abs(loaded - expected).max() <= 2


def exif_segment(order, kind="H"):
    """APP1 of a JPEG: a quarter turn, in either byte order and as a short or long number."""
    value = struct.pack(order + kind, 6).ljust(4, b"\0")
    entry = struct.pack(order + "HHI", 0x0112, 3 if kind == "H" else 4, 1) + value
    head = b"II*\0" if order == "<" else b"MM\0*"
    return segment(0xE1, b"Exif\0\0" + head + struct.pack(order + "IH", 8, 1) + entry + bytes(4))


def segment(number, content):
    return bytes([0xFF, number]) + struct.pack(">H", len(content) + 2) + content


XMP = b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta xmlns:x='adobe:ns:meta/'>%s</x:xmpmeta>"
SEGMENTS = {
    "little": exif_segment("<"),
    "big": exif_segment(">"),
    "long": exif_segment("<", "I"),
    "xmp first": segment(0xE1, XMP % b"") + exif_segment("<"),
    "icc first": segment(0xE2, b"ICC_PROFILE\0\x01\x01" + bytes(200)) + exif_segment(">"),
    "photoshop first": segment(0xED, b"Photoshop 3.0\0" + bytes(50)) + exif_segment("<"),
    "comment first": segment(0xFE, b"made by hand") + exif_segment("<"),
    "xmp alone": segment(0xE1, XMP % b' tiff:Orientation="6" '),
}


@pytest.mark.parametrize("kind", SEGMENTS)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_orientation_wherever_a_jpeg_has_it(tmp_path, kind, mode):
    jpeg = encoded(Image.fromarray(RGB).convert(mode), "JPEG", quality=95)
    (tmp_path / "a.jpg").write_bytes(jpeg[:2] + SEGMENTS[kind] + jpeg[2:])
    assert_like_pil(tmp_path / "a.jpg", (56, 40))


def encoded(image, kind, **options):
    written = io.BytesIO()
    image.save(written, kind, **options)
    return written.getvalue()


# What stands beside the pixels

JUNK = {
    "exif": [b"Exif\0\0garbage!!!", b"Exif\0\0II*\0" + b"\xff" * 400, b"Exif\0\0", b"\xff" * 50],
    "icc_profile": [b"\xff" * 3000, b"x"],
    "xmp": [b"\xff" * 500, b'tiff:Orientation="9"'],
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("what", JUNK)
def test_pixels_do_not_depend_on_damaged_metadata(tmp_path, kind, what):
    options = {"lossless": True} if kind == "WEBP" else {}
    (tmp_path / "plain").write_bytes(encoded(Image.fromarray(RGB), kind, **options))
    for junk in JUNK[what]:
        (tmp_path / "odd").write_bytes(encoded(Image.fromarray(RGB), kind, **{what: junk}, **options))
        assert torch.equal(load_image(tmp_path / "odd"), load_image(tmp_path / "plain"))


def png_with(name, body, checksum=None, image=None, **options):
    """RGB, or `image`, as PNG, with one more chunk before its pixels."""
    chunk = struct.pack(">I", len(body)) + name + body
    chunk += struct.pack(">I", zlib.crc32(name + body) if checksum is None else checksum)
    content = encoded(image or Image.fromarray(RGB), "PNG", **options)
    place = content.index(b"IDAT") - 4
    return content[:place] + chunk + content[place:]


LARGE = zlib.compress(bytes(3_000_000), 9)
BESIDE = {  # name: (chunk, content, its checksum if that is wrong)
    "text": (b"zTXt", b"workflow\0\0" + LARGE),
    "international text": (b"iTXt", b"prompt\0\1\0\0\0" + LARGE),
    "xmp": (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + LARGE),
    "profile": (b"iCCP", b"profile\0\0" + LARGE),
    "checksum of a text": (b"tEXt", b"a\0b", 0),
    "checksum of gamma": (b"gAMA", b"", 7),
    "checksum of exif": (b"eXIf", b"garbage", 7),
    "unknown": (b"vpAg", b"?" * 9, 1),
}


@pytest.mark.parametrize("name", BESIDE)
def test_pixels_of_a_png_do_not_depend_on_what_stands_beside_them(tmp_path, name):
    (tmp_path / "a.png").write_bytes(png_with(*BESIDE[name]))
    assert np.array_equal(load_image(tmp_path / "a.png").permute(1, 2, 0).numpy(), RGB)


def test_what_the_pixels_of_a_png_depend_on_is_kept(tmp_path):
    palette, exif, clear = Image.fromarray(RGB).quantize(64), Image.Exif(), bytes(range(64))
    exif[0x0112] = 3
    (tmp_path / "a.png").write_bytes(png_with(*BESIDE["text"], image=palette, transparency=clear, exif=exif))
    palette.save(tmp_path / "plain.png", transparency=clear)
    assert torch.equal(load_image(tmp_path / "a.png"), load_image(tmp_path / "plain.png").flip(1, 2))


def test_a_damaged_checksum_of_pixels_is_a_bad_image(tmp_path):
    content = encoded(Image.fromarray(RGB), "PNG")
    (tmp_path / "a.png").write_bytes(content[:60] + bytes([content[60] ^ 1]) + content[61:])
    with pytest.raises(BadImage):
        load_image(tmp_path / "a.png")


# More than 8 bits

TWELVE = (np.linspace(0, 1, 40 * 56).reshape(40, 56) * 4095).round()


@pytest.mark.parametrize(
    ("name", "values", "value_range"),
    [
        ("a.png", TWELVE.astype(np.uint16), (0, 4095)),
        ("a.tif", TWELVE.astype(np.uint16), (1000, 3000)),
        ("int.tif", (TWELVE - 1024).astype(np.int32), (-1024, 3071)),
        ("large.tif", (TWELVE * 1000).astype(np.int32), (0, 4_095_000)),
        ("float.tif", (TWELVE / 4095).astype(np.float32), (0, 1)),
        ("a.pfm", (TWELVE / 100 - 20).astype(np.float32), (-20, 20.95)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_raw_values_become_black_to_white_over_the_range(tmp_path, name, values, value_range):
    Image.fromarray(values).save(tmp_path / name)
    low, high = value_range
    expected = np.rint(((values.astype(float) - low) / (high - low)).clip(0, 1) * 255)
    loaded = load_image(tmp_path / name, 1, value_range)[0].numpy().astype(int)
    assert np.abs(loaded - expected).max() <= 1 and (loaded != expected).mean() < 0.01  # float32 at a half
    assert torch.equal(load_image(tmp_path / name, 3, value_range)[2], load_image(tmp_path / name, 1, value_range)[0])


def sixteen_bit_colour(pixels):
    """A PNG, which PIL cannot write."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 16, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    parts = [struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
             for name, body in chunks]  # fmt: skip
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_range_of_colours_of_sixteen_bits(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 4096, (9, 7, 3))
    (tmp_path / "a.png").write_bytes(sixteen_bit_colour(pixels))
    loaded = load_image(tmp_path / "a.png", 3, (0, 4095)).permute(1, 2, 0).numpy()
    assert np.abs(loaded - pixels / 4095 * 255).max() <= 0.51
    assert load_image(tmp_path / "a.png").max() == 15  # the upper 8 of 16 bits


def test_eight_bits_have_no_use_for_a_range(tmp_path):
    write(tmp_path / "a.png", RGB)
    assert torch.equal(load_image(tmp_path / "a.png", 3, (0, 10)), load_image(tmp_path / "a.png"))


@pytest.mark.parametrize(("value", "kind"), [(-5, np.int32), (9, np.int32), (1, np.float32)])
def test_values_without_a_range_are_refused_and_the_flag_is_named(tmp_path, value, kind):
    Image.fromarray(np.full((4, 4), value, kind)).save(tmp_path / "a.tif")
    with pytest.raises(BadImage, match="--value_range LOW HIGH"):
        load_image(tmp_path / "a.tif")


def test_a_float_that_is_no_number_is_black(tmp_path):
    values = np.array([[np.nan, np.inf, -np.inf, 0.5]], np.float32)
    Image.fromarray(values).save(tmp_path / "a.tif")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what a float that is no number becomes depends on the processor
        decoding.to_eight_bits(values, (0, 1))
    assert load_image(tmp_path / "a.tif", 1, (0, 1))[0].tolist() == [[0, 255, 0, 128]]


# Formats


def test_programs_are_never_started():
    assert not {".eps", ".ps", ".pdf", ".wmf"} & decoding.known_endings()


@pytest.mark.parametrize("ending", ["jfif", "jpe", "jp2", "j2k", "gif", "avif", "apng", "tga", "ico"])
def test_endings_beyond_the_usual(tmp_path, ending):
    if f".{ending}" not in decoding.known_endings():
        pytest.skip(f"this PIL reads no {ending}")
    Image.fromarray(RGB[:32, :32]).save(tmp_path / f"a.{ending}")
    loaded = load_image(tmp_path / f"a.{ending}").permute(1, 2, 0).numpy().astype(int)
    assert np.abs(loaded - RGB[:32, :32]).mean() < 12


def test_a_strip_of_one_pixel(tmp_path):
    write(tmp_path / "a.png", np.zeros((1, 20_000, 3), np.uint8))
    assert load_image(tmp_path / "a.png").shape == (3, 1, 20_000)


@pytest.mark.parametrize(
    ("marker", "content"),
    [
        (0xEE, b"Adobe"),
        (0xE0, b"JFIF\0"),
        (0xE2, b"MPF\0junkjunk"),
        (0xE2, b"ICC_PROFILE\0"),
        (0xED, b"Photoshop 3.0\x008BIM"),
    ],
)
@pytest.mark.parametrize("turn", [1, 6])
def test_a_jpeg_s_pixels_are_read_whatever_stands_beside_them(marker, content, turn, tmp_path):
    exif = Image.Exif()
    exif[0x112] = turn
    write(tmp_path / "a.jpg", RGB, exif=exif)
    whole = (tmp_path / "a.jpg").read_bytes()
    segment = bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content
    (tmp_path / "b.jpg").write_bytes(whole[:2] + segment + whole[2:])
    for channels in (1, 3):
        assert torch.equal(load_image(tmp_path / "b.jpg", channels), load_image(tmp_path / "a.jpg", channels))
