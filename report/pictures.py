"""Pictures that a run and its evaluations have left in its folder, inside a page."""

import base64
import io
from pathlib import Path

from PIL import Image

from report.html import note, text_of
from report.words import BASELINES
from utils import one_line

WIDEST = 1400  # px
MOST_BYTES = 300_000  # of a picture; a larger one becomes a JPEG
MOST_PICTURES = 6  # of a kind
MOST_PIXELS = 50_000_000

KINDS = (  # title, files, what makes them
    ("What the network sees", ("views.png",), ""),
    ("Codes and their images", ("gallery*.png",), "eval_cluster.py --gallery"),
    ("Attention and patches", ("overview*.png", "*/overview.png", "contact_sheet.png"), "visualize_attention.py"),
    ("Collapse", ("collapse_*.png",), "eval_collapse.py"),
    ("Confusion", ("confusion_*.png",), "eval_linear.py"),
)


def shown(folder):
    """Yields (title, HTML) of each kind; where there is none, the command that makes them is said."""
    for title, patterns, command in KINDS:
        found = {path for pattern in patterns for path in Path(folder).glob(pattern) if path.is_file()}
        paths = sorted(found, key=lambda path: (is_of_baseline(path), path))
        more = note(f"{len(paths) - MOST_PICTURES} more in the folder.") if len(paths) > MOST_PICTURES else ""
        none = note(f"None in the folder; {command} with --output_dir draws them there.") if command else ""
        yield title, "".join(map(picture, paths[:MOST_PICTURES])) + more or none


def is_of_baseline(path):
    return path.stem.endswith(tuple(name.replace(" ", "_") for name in BASELINES))


def picture(path):
    try:
        source, (width, height) = inside(path)
    except Exception as error:  # of a damaged or half-written file Pillow raises what it likes
        return note(f"{path.name} cannot be read: {one_line(error)}")
    return (f'<figure class=picture><img src="{source}" width="{width}" height="{height}" alt="{text_of(path.name)}">'
            f"<figcaption>{text_of(path.name)}</figcaption></figure>\n")  # fmt: skip


def inside(path):
    """(data URL, size in px) of a picture, made smaller where it is large."""
    content = path.read_bytes()
    with Image.open(io.BytesIO(content)) as image:
        if image.width * image.height > MOST_PIXELS:
            raise ValueError(f"{image.width} x {image.height} px are too many")
        image.load()
        if image.width <= WIDEST and len(content) <= MOST_BYTES and image.format == "PNG":
            return f"data:image/png;base64,{base64.b64encode(content).decode()}", image.size
        smaller = image.convert("RGB")
    smaller.thumbnail((WIDEST, 4 * WIDEST), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    smaller.save(buffer, "jpeg", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}", smaller.size
