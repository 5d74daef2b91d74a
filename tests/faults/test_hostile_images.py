"""Images, lists, IDX files and logs that are damaged or lie, through everything that reads them.

    python -m pytest tests/faults/test_hostile_images.py                # a few of the images
    python -m pytest tests/faults/test_hostile_images.py -m slow        # all

An image is uint8 (C, H, W) or a BadImage of one line. Nothing crashes the interpreter, runs a program, or takes memory
or time without bound.
"""

import gzip
import io
import json
import os
import shutil
import struct
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hostile import RUBBISH, assert_no_faults, canary_command, drawn, mutants, survey
from PIL import Image

import data
import main_cplearn
import visualize_attention
from images import BadImage, load_image, open_dataset
from images.decoding import known_formats
from monitor import drop_lines_after, read_log
from pictures import folder_args, picture
from test_arrays import LIARS, dicom, npy, npz, tiff, values
from utils import UserError
from vision_transformer import vit_tiny

MUTANTS_PER_FILE = 34  # of 20 files: 680 in all
MOST_MEMORY_MB = 1300  # PIL's limit of 89 million pixels, decoded, converted and copied: four times 3 bytes each
HEADER = 0.15  # most of the damage is done to the first part of a file, where sizes and types are


some_and_all = pytest.mark.parametrize("most", [30, pytest.param(2000, marks=pytest.mark.slow)])


@some_and_all
def test_an_image_is_an_image_or_a_bad_one(tmp_path, most):
    """Damaged files of every kind, and files that say they are far larger than they are; see also the canary."""
    always = originals() | oddities()
    names = [*always, *drawn(images().keys() - always.keys(), most)]
    assert most < 2000 or len(names) > 500
    cases = [(str(tmp_path), name, 1 if number % 4 == 0 else 3) for number, name in enumerate(names)]
    verdicts = survey(load, cases, seconds=30)
    worked = [verdict for verdict in verdicts if verdict.outcome == "worked"]
    slowest, largest = max(v.seconds for v in verdicts), max(v.memory_mb for v in verdicts)
    print(f"{len(verdicts)} decoded, {len(worked)} are images; at most {slowest:.1f} s and {largest:.0f} MB")
    assert_no_faults(verdicts, MOST_MEMORY_MB)
    whole = {verdict.case[1] for verdict in worked} & set(originals())
    assert whole == set(originals()), "files that nobody damaged"


def load(case):
    """In a child process."""
    root, name, channels = case
    path, canary = Path(root) / "image.jpg", plant_ghostscript(Path(root))
    path.write_bytes(images()[name])
    try:
        pixels = load_image(path, channels)
    except BadImage as error:
        raise UserError(error) from error  # what the judge takes for a refusal
    finally:
        ran = canary.exists()
        canary.unlink(missing_ok=True)
        assert not ran, "decoding ran a program"
    assert pixels.dtype == torch.uint8 and pixels.ndim == 3 and len(pixels) == channels and pixels.numel() > 0
    return tuple(pixels.shape)


def plant_ghostscript(root):
    """PIL has `gs` draw PostScript, whatever the file is called: here a program that leaves a trace."""
    canary, program = root / "canary", root / "bin" / "gs"
    if not program.exists():
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/sh\n{canary_command(canary)}\n")
        program.chmod(0o755)
        os.environ["PATH"] = f"{program.parent}{os.pathsep}{os.environ['PATH']}"
    return canary


# ---- the images ------------------------------------------------------------------------------------------------------


@cache
def images():
    """{name: content}: whole, damaged and lying files."""
    found = dict(originals())
    regions = ((0.0, HEADER), (0.0, 1.0), (0.0, HEADER / 3))
    for name, content in originals().items():
        found |= {f"{name}: {damage}": bad for damage, bad in mutants(content, MUTANTS_PER_FILE, name, regions)}
    found |= {f"rubbish {number}": content for number, content in enumerate(RUBBISH)}
    return found | giants() | oddities()


@cache
def originals():
    rgb, exif = Image.fromarray(picture(20, 24)), Image.Exif()
    exif[0x0112] = 6  # orientation: a quarter turn
    gray16 = Image.fromarray((np.arange(480).reshape(20, 24) * 130).astype(np.uint16))
    kinds = {
        "jpeg": (rgb, {"format": "JPEG"}),
        "progressive jpeg": (rgb, {"format": "JPEG", "progressive": True}),
        "gray jpeg": (rgb.convert("L"), {"format": "JPEG"}),
        "cmyk jpeg": (rgb.convert("CMYK"), {"format": "JPEG"}),
        "exif jpeg": (rgb, {"format": "JPEG", "exif": exif}),
        "png": (rgb, {"format": "PNG"}),
        "palette png": (rgb.convert("P"), {"format": "PNG", "transparency": 3}),
        "16-bit png": (gray16, {"format": "PNG"}),
        "alpha png": (rgb.convert("RGBA"), {"format": "PNG", "exif": exif}),
        "bit png": (rgb.convert("1"), {"format": "PNG"}),
        "webp": (rgb, {"format": "WEBP"}),
        "lossless webp": (rgb.convert("RGBA"), {"format": "WEBP", "lossless": True}),
        "tiff": (rgb, {"format": "TIFF"}),
        "lzw tiff": (rgb, {"format": "TIFF", "compression": "tiff_lzw"}),
        "jpeg tiff": (rgb, {"format": "TIFF", "compression": "jpeg"}),
        "bmp": (rgb, {"format": "BMP"}),
        "gif": (rgb.convert("P"), {"format": "GIF", "save_all": True, "append_images": [rgb.convert("P")]}),
        "ppm": (rgb, {"format": "PPM"}),
        "jpeg 2000": (rgb, {"format": "JPEG2000"}),
        "avif": (rgb, {"format": "AVIF"}),
    }
    kinds = {name: kind for name, kind in kinds.items() if kind[1]["format"] in known_formats()}
    return {name: encoded(image, **options) for name, (image, options) in kinds.items()}


def encoded(image, **options):
    written = io.BytesIO()
    image.save(written, **options)
    return written.getvalue()


def png(width, height, depth, colour, pixels, *more):
    """A PNG with any header; pixels: rows with their filter bytes, not yet deflated."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = [(b"IHDR", header), *more, (b"IDAT", zlib.compress(pixels, 9)), (b"IEND", b"")]
    parts = [struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
             for kind, body in chunks]  # fmt: skip
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def replaced(name, old, new):
    content = originals()[name]
    assert content.count(old) >= 1, f"{old} is not in {name}"
    return content.replace(old, new, 1)


def giants():
    """Files that declare far more pixels than they have, or have them in very few bytes."""
    side, bomb = 9400, zlib.compress(bytes(2**28), 9)  # just below PIL's limit of pixels
    tag = b"\x00\x01\x04\x00\x01\x00\x00\x00"  # TIFF: width, one integer of 4 bytes
    little, big = struct.Struct("<H").pack, struct.Struct(">H").pack
    return {
        "jpeg of 65535 x 65535": replaced("jpeg", big(20) + big(24), b"\xff\xff\xff\xff"),
        "jpeg of 9400 x 9400": replaced("jpeg", big(20) + big(24), big(side) * 2),
        "jpeg of 0 x 24": replaced("jpeg", big(20) + big(24), big(0) + big(24)),
        "progressive jpeg of 9400 x 9400": replaced("progressive jpeg", big(20) + big(24), big(side) * 2),
        "gif of 65535 x 65535": replaced("gif", little(24) + little(20), b"\xff\xff\xff\xff"),
        "gif of 9400 x 9400": replaced("gif", little(24) + little(20), little(side) * 2),
        "bmp of 2^31": replaced("bmp", struct.pack("<ii", 24, 20), struct.pack("<ii", 2**31 - 1, 2**31 - 1)),
        "bmp of -2^31": replaced("bmp", struct.pack("<ii", 24, 20), struct.pack("<ii", 24, -(2**31))),
        "bmp of 9400 x 9400": replaced("bmp", struct.pack("<ii", 24, 20), struct.pack("<ii", side, side)),
        "ppm of 10^9 x 10^9": replaced("ppm", b"24 20", b"1000000000 1000000000"),
        "ppm of 9400 x 9400": replaced("ppm", b"24 20", b"9400 9400"),
        "ppm of -1 x -1": replaced("ppm", b"24 20", b"-1 -1"),
        "ppm of 10^4000": replaced("ppm", b"24 20", b"1" * 4000 + b" 20"),
        "text ppm": b"P3 9400 9400 255\n" + b"1 " * 1000,
        "tiff of 2^32": replaced("tiff", tag + struct.pack("<I", 24), tag + struct.pack("<I", 2**32 - 1)),
        "tiff of 60000 x 20": replaced("tiff", tag + struct.pack("<I", 24), tag + struct.pack("<I", 60000)),
        "png of 2^31": png(2**31 - 1, 2**31 - 1, 8, 2, b"\0"),
        "png of 0 x 0": png(0, 0, 8, 2, b"\0"),
        "png of 9400 x 9400, gray": png(side, side, 8, 0, bytes(side * (side + 1))),
        "png of 9400 x 9400, 16 bits": png(side, side, 16, 0, bytes(side * (2 * side + 1))),
        "png of 9400 x 9400, bits": png(side, side, 1, 0, bytes(side * (side // 8 + 1))),
        "png of 9400 x 9400, one row": png(side, side, 8, 2, bytes(3 * side + 1)),
        "png with a profile of 256 MB": png(8, 8, 8, 0, bytes(72), (b"iCCP", b"a\0\0" + bomb)),
        "png with a text of 256 MB": png(8, 8, 8, 0, bytes(72), (b"zTXt", b"a\0\0" + bomb)),
        "png of 10 x 8 with pixels for 16000 rows": png(8, 8, 8, 0, bytes(2**24)),
        "png of a million pixels in a row": png(10**6, 1, 8, 2, bytes(3 * 10**6 + 1)),
    }  # fmt: skip


def oddities():
    """Other kinds that PIL opens, whatever a file is called, and metadata that leads astray."""
    exif = encoded(Image.new("RGB", (8, 8)), format="JPEG", exif=b"Exif\0\0" + b"II*\0" + b"\xff" * 400)
    loop = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x69\x87\x04\0\x01\0\0\0\x08\0\0\0\x08\0\0\0"  # the directory is in itself
    profile = encoded(Image.new("RGB", (8, 8)), format="JPEG", icc_profile=b"\xff" * 3000)
    return {
        "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(x) print\nshowpage\n%%EOF\n",
        "exif rubbish": exif,
        "exif loop": encoded(Image.new("RGB", (8, 8)), format="JPEG", exif=loop),
        "profile rubbish": profile,
        "float tiff": encoded(Image.fromarray(np.ones((8, 8), np.float32)), format="TIFF"),
        "32-bit tiff": encoded(Image.fromarray(np.full((8, 8), -5, np.int32)), format="TIFF"),
        "ico": encoded(Image.new("RGB", (16, 16)), format="ICO"),
        "tga": encoded(Image.new("RGB", (16, 16)), format="TGA"),
        "svg": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='/etc/passwd'/></svg>",
        "xbm": b"#define x_width 9000\n#define x_height 9000\nstatic char x_bits[] = {\n0x00 };\n",
        "fli": bytes(4) + b"\x11\xaf" + b"\xff" * 122,
        "pcx": b"\x0a\x05\x01\x08" + b"\0\0\0\0\xff\x20\xff\x20" + bytes(116) + b"\xff" * 40,
        "psd": b"8BPS\0\x01" + bytes(6) + b"\0\x03" + struct.pack(">II", 9000, 9000) + b"\0\x08\0\x03" + bytes(30),
        "sgi": b"\x01\xda\x01\x01\0\x03" + b"\x20\x00\x20\x00\0\x03" + bytes(500),
        "dds": b"DDS " + struct.pack("<IIII", 124, 0x1007, 9000, 9000) + b"\xff" * 108,
        "im": b"Image type: RGB\r\nImage size (x*y): 9000*9000\r\n" + bytes(600),
        "jpeg 2000 rubbish": b"\0\0\0\x0cjP  \r\n\x87\n" + b"\xff" * 100,
    }


# ---- arrays ----------------------------------------------------------------------------------------------------------


@some_and_all
def test_an_array_is_an_image_or_a_bad_one(tmp_path, most):
    """.npy, .npz, TIFF of 5 pages and DICOM, damaged, or lying about what they hold."""
    names = [*WHOLE_ARRAYS, *LIARS, *drawn(arrays().keys() - WHOLE_ARRAYS.keys() - LIARS.keys(), most)]
    verdicts = survey(load_array, [(str(tmp_path), name) for name in names], seconds=30)
    assert_no_faults(verdicts, MOST_MEMORY_MB)
    worked = {verdict.case[1] for verdict in verdicts if verdict.outcome == "worked"}
    assert worked >= WHOLE_ARRAYS.keys() and not worked & LIARS.keys()


def load_array(case):
    """In a child process: by its path, mapped where it can be, and as bytes."""
    root, name = case
    path = Path(root) / ("image.npy" if "npy" in name else "image.jpg")
    path.write_bytes(arrays()[name])
    try:
        pixels = [load_image(content, 5, (-100, 100), "channels") for content in (path, path.read_bytes())]
    except BadImage as error:
        raise UserError(error) from error
    assert torch.equal(*pixels) and pixels[0].dtype == torch.float32 and len(pixels[0]) == 5
    assert pixels[0].min() >= 0 and pixels[0].max() <= 255


WHOLE_ARRAYS = {
    "npy": lambda: npy(values("int16")),
    "npz": lambda: npz(image=values("float32")),
    "pages": lambda: tiff(values("int16"), photometric="minisblack"),
    "deflated tiles": lambda: tiff(values("float32"), photometric="minisblack", tile=(16, 16), compression="zlib"),
    "planes": lambda: tiff(values("uint8"), photometric="minisblack", planarconfig="separate"),
    "dicom": lambda: dicom(values("int16")),
}


@cache
def arrays():
    found = {name: make() for name, make in (WHOLE_ARRAYS | LIARS).items()}
    for name in WHOLE_ARRAYS:
        for damage, bad in mutants(found[name], MUTANTS_PER_FILE, name, ((0.0, HEADER), (0.0, 1.0))):
            found[f"{name}: {damage}"] = bad
    return found


# ---- one image, given by hand ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_attention_maps_of_hostile_images(tmp_path):
    torch.manual_seed(0)
    torch.save(vit_tiny(patch_size=16, img_size=32).state_dict(), tmp_path / "vit.pth")
    names = [*drawn(images(), 50), "png of a million pixels in a row", "jpeg of 65535 x 65535", "exif loop"]
    assert_no_faults(survey(look, [(str(tmp_path), name) for name in names]), MOST_MEMORY_MB)


def look(case):
    root, name = case
    folder = Path(root) / "look"
    folder.mkdir(exist_ok=True)
    (folder / "image.jpg").write_bytes(images()[name])
    try:
        visualize_attention.main.__wrapped__([
            "--checkpoint", f"{root}/vit.pth", "--image_path", f"{folder}/image.jpg", "--image_size", "32",
            "--output_dir", f"{folder}/out", "--device", "cpu",
        ])  # fmt: skip
    finally:
        shutil.rmtree(folder)


# ---- files that name or hold images ----------------------------------------------------------------------------------

LISTS = {
    **{f"rubbish {number}": content for number, content in enumerate(RUBBISH)},
    "every byte": bytes(range(256)) * 40,
    "a line of 10 MB": b"x" * 10**7,
    "two million lines": b"\n" * 2_000_000 + b"a.jpg",
    "null in a name": b"a\0b.jpg\n" * 20,
    "folders": b".\n..\n/\n/dev\n" * 20,
    "itself": b"list.txt\n" * 20,
    "devices": b"/dev/zero\n/dev/full\n/dev/random\n/dev/stdin\n" * 5,
    "pipe": b"pipe\n" * 20,
    "utf-16": "a.jpg\n".encode("utf-16") * 20,
}


@pytest.mark.parametrize("reader", ["list", "class_list"])
def test_lists_of_rubbish(tmp_path, reader):
    assert_no_faults(survey(read_list, [(str(tmp_path), reader, name) for name in LISTS], seconds=30))


def read_list(case):
    """Open it and read a batch: nothing in it is an image."""
    root, reader, name = case
    path = Path(root) / "list.txt"
    path.write_bytes(LISTS[name])
    if not (Path(root) / "pipe").exists():
        os.mkfifo(Path(root) / "pipe")
    if reader == "list":
        args = folder_args(path)
        loader = data.TrainLoader(open_dataset(args), args, batch_size=1)
        return next(iter(loader.epoch(0)))
    for number in range(2):
        image = Path(root) / "images" / f"class{number}" / "a.png"
        image.parent.mkdir(parents=True, exist_ok=True)
        image.write_bytes(originals()["png"])
    return len(open_dataset(folder_args(Path(root) / "images", "--class_list", path)))


def idx(sizes, content, kind=8):
    return struct.pack(f">HBB{len(sizes)}I", 0, kind, len(sizes), *sizes) + content


def idx_files():
    """{name: (file name, content)}: images or labels, some of them compressed."""
    images_file, labels_file = idx((12, 28, 28), bytes(12 * 784)), idx((12,), bytes(range(10)) + b"\0\1")
    found = {}
    for base, content in (("train-images-idx3-ubyte", images_file), ("train-labels-idx1-ubyte", labels_file)):
        regions = ((0.0, 20 / len(content)), (0.0, 1.0))
        for name, bad in mutants(content, 42, base, regions):
            found[f"{base} {name}"] = base, bad
        for name, bad in mutants(gzip.compress(content, mtime=0), 42, base):
            found[f"{base}.gz {name}"] = f"{base}.gz", bad
        for number, sizes in enumerate(((), (0,), (0, 28, 28), (12, 0, 0), (2**32 - 1,) * 3, (12,) * 255, (12, 784),
                                        (12, 28, 28, 1), (11, 28, 28), (11,), (12, 1))):  # fmt: skip
            found[f"{base} sizes {number}"] = base, idx(sizes, content[4 + 4 * content[3] :])
        found |= {f"{base} type {kind}": (base, idx((12,), content[4:], kind)) for kind in (0, 9, 13, 255)}
        found[f"{base} of label 200"] = base, idx((12,), b"\xc8" * 12)
        found[f"{base}.gz bomb"] = f"{base}.gz", gzip.compress(bytes(2**24), 1, mtime=0) * 64
    return found


@some_and_all
def test_damaged_fashion_mnist(tmp_path, most):
    assert_no_faults(survey(read_idx, [(str(tmp_path), name) for name in drawn(idx_files(), most // 2)]))


def read_idx(case):
    root, name = case
    folder = Path(root) / "idx"
    file_name, content = cached_idx_files()[name]
    files = {"train-images-idx3-ubyte": idx((12, 28, 28), bytes(12 * 784)),
             "train-labels-idx1-ubyte": idx((12,), bytes(12))}  # fmt: skip
    del files[file_name.removesuffix(".gz")]
    try:
        for other, whole in (files | {file_name: content}).items():
            folder.mkdir(exist_ok=True)
            (folder / other).write_bytes(whole)
        words = ["--dataset", "fashion_mnist", "--data_path", str(folder), "--arch", "resnet8", "--width", "8",
                 "--out_dim", "16", "--batch_size_per_gpu", "4", "--max_steps", "1", "--device", "cpu",
                 "--output_dir", f"{folder}/run"]  # fmt: skip
        args = main_cplearn.get_args_parser().parse_args(words)
        data.resolve_dataset_defaults(args)
        found = open_dataset(args)
        assert len(found) == len(found.labels) and found.data.shape[1:] == (1, 28, 28), "not what the loader says it is"
        assert found.labels.max() < len(found.classes)
    finally:
        shutil.rmtree(folder)


cached_idx_files = cache(idx_files)


# ---- log.txt ---------------------------------------------------------------------------------------------------------

LINE = json.dumps({"kind": "step", "step": 1, "epoch": 0, "train_loss": 1.0}).encode() + b"\n"
LOGS = {
    **{f"rubbish {number}": content for number, content in enumerate(RUBBISH)},
    "torn": LINE + LINE[:20],
    "torn, and gone on after": LINE + LINE[:20] + LINE,
    "not dicts": b"1\n[]\nnull\n\"text\"\n" + LINE,
    "no step": b"{}\n" + LINE,
    "step of text": b'{"kind": "step", "step": "1"}\n' + LINE,
    "step of null": b'{"kind": "step", "step": null}\n' + LINE,
    "no kind": b'{"step": 1}\n' + LINE,
    "deep": b"[" * 200_000 + b"\n" + LINE,
    "long number": b"1" * 10_000 + b"\n" + LINE,
    "nulls": bytes(5000) + LINE,
    "not utf-8": b"\xff\xfe\n" + LINE,
    "surrogates": b'{"kind": "step", "step": 1, "x": "\\ud800"}\n' + LINE,
    "utf-16": LINE.decode().encode("utf-16"),
}  # fmt: skip


def test_a_damaged_log_does_not_stop_a_run(tmp_path):
    verdicts = survey(go_on, [(str(tmp_path), name) for name in LOGS])
    assert_no_faults(verdicts)
    assert {verdict.case[1]: verdict.text for verdict in verdicts if verdict.outcome == "refused"} == {}


def go_on(case):
    """What a run does with the log it finds: drop what comes after its checkpoint, then add to it and draw it."""
    root, name = case
    folder = Path(root) / "log"
    folder.mkdir(exist_ok=True)
    (folder / "log.txt").write_bytes(LOGS[name])
    drop_lines_after(folder / "log.txt", 1)
    with open(folder / "log.txt", "ab") as file:
        file.write(LINE)
    return read_log(folder / "log.txt")[-1]["step"]
