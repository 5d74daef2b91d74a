"""Pictures of clusters: some images of the fullest codes and of codes at random, as a PNG and as a page.

    files = write_gallery("out/gallery", "run a", images, codes)          # out/gallery.png, out/gallery.html

The page is one file, with thumbnails inside it: no script, font or link leads out of it.

Shapes: N images, C channels, H x W px; n images that are shown of a code.
"""

import os
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

import evaluation
from evaluation.page import SMALL, html_page, inlined
from images import BadImage
from monitor import as_picture
from running.files import write_whole
from utils import UserError

THUMBNAIL = 96  # px, the longer side
SHOWN = 12  # images of a code


def write_gallery(stem, title, images, codes, num_codes=12, seed=0, word="code"):
    """Writes <stem>.png and <stem>.html; returns their paths.

    images: what `images.open_dataset` returns.  codes: (N,) integers.  title: one line.
    word: what one is called, "code" or "cluster".
    num_codes: how many codes to show (those in use, if they are fewer): half of them the fullest, half drawn from the
        others. Of each, `SHOWN` images drawn at random: the first would be of one class, as folders are sorted.
    Size: the page takes at most 14 kB for an image, 2 MB with the defaults.
    Raises UserError for an image that cannot be read, or where the files cannot be written.
    """
    codes = np.asarray(codes)
    groups = [describe(images, codes, code, seed) for code in choose_codes(codes, num_codes, seed)]
    for group in groups:
        group["thumbnails"], group["word"] = [thumbnail(images, index) for index in group["indices"]], word
    stem = Path(stem)
    paths = stem.with_name(f"{stem.name}.png"), stem.with_name(f"{stem.name}.html")
    draw(paths[0], printable(title), groups)
    with evaluation.written(paths[1]):
        write_whole(paths[1], page(printable(title), groups))
    return paths


def choose_codes(codes, num_codes, seed=0):
    """The fullest half (by falling size, then by number) and others at random, of those in use."""
    used, sizes = np.unique(codes, return_counts=True)
    by_size = used[np.lexsort((used, -sizes))]
    num_codes = min(num_codes, len(used))
    fullest, others = np.split(by_size, [(num_codes + 1) // 2])
    drawn = np.random.default_rng(seed).choice(others, num_codes - len(fullest), replace=False)
    return [*fullest.tolist(), *sorted(drawn.tolist())]


def describe(images, codes, code, seed=0):
    """What the gallery says of a code: its number, size, share, majority class and purity, and some of its images."""
    members = np.flatnonzero(codes == code)
    drawn = np.random.default_rng((seed, code)).permutation(members)[:SHOWN]
    group = {"code": code, "size": len(members), "share": len(members) / len(codes), "indices": drawn.tolist()}
    group["names"] = [printable(os.path.basename(images.name(index))) for index in group["indices"]]
    if images.labels is not None:
        counts = np.bincount(images.labels[members])
        group["majority"] = printable(images.classes[counts.argmax()])
        group["purity"] = counts.max() / len(members)
        group["classes"] = [printable(images.classes[images.labels[index]]) for index in group["indices"]]
    return group


def thumbnail(images, index):
    """The image, made smaller where it is larger than `THUMBNAIL`."""
    try:
        return as_thumbnail(images.load(index, images.channels))
    except BadImage as error:
        raise UserError(f"cannot read {images.name(index)}: {error}; see --data_path") from error


def as_thumbnail(pixels):
    """Levels (C, H, W) as a PIL image."""
    image = Image.fromarray(as_picture(pixels).permute(1, 2, 0).round().byte().numpy())
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    return image


def printable(name):
    """File names that are not UTF-8 come with lone surrogates, which no file format takes."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def summary(group):
    """("1,234 images, 12 % of all", "84 % Sneaker"); the second is empty without labels."""
    count = f"{group['size']:,} image{'s' if group['size'] > 1 else ''}, {100 * group['share']:.3g} % of all"
    return count, f"{100 * group['purity']:.0f} % {group['majority']}" if "majority" in group else ""


# ---- the figure ------------------------------------------------------------------------------------------------------


def draw(path, title, groups):
    """A row of images for each code, in one array of pixels: a thousand matplotlib axes would take a minute."""
    plt = evaluation.pyplot()
    cell = THUMBNAIL + 6
    mosaic = np.full((cell * len(groups), cell * SHOWN, 3), 255, np.uint8)
    for row, group in enumerate(groups):
        for column, image in enumerate(group["thumbnails"]):
            put(mosaic[row * cell : (row + 1) * cell, column * cell : (column + 1) * cell], image)
    figure, axis = plt.subplots(figsize=(11, 0.9 + 0.72 * len(groups)))
    axis.imshow(mosaic, interpolation="lanczos")
    axis.set_yticks([cell * (row + 0.5) for row in range(len(groups))], [label(group) for group in groups], fontsize=8)
    axis.set_xticks([])
    axis.tick_params(length=0)
    axis.grid(False)
    axis.spines[:].set_visible(False)
    order = f"fullest {groups[0]['word']}s first, then some at random; images at random"
    figure.suptitle(f"{label_text(title, 110)}\n{order}", fontsize=9)
    evaluation.save_figure(figure, path, bbox_inches="tight")


def put(square, image):
    """Draw an image in the middle of a square of pixels, enlarged by a whole factor where it is small."""
    factor = max(1, THUMBNAIL // max(image.size))
    pixels = np.asarray(image.convert("RGB")).repeat(factor, axis=0).repeat(factor, axis=1)
    top, left = ((side - length) // 2 for side, length in zip(square.shape, pixels.shape[:2], strict=False))
    square[top : top + pixels.shape[0], left : left + pixels.shape[1]] = pixels


def label(group):
    """Text beside a row."""
    return "\n".join(label_text(line, 34) for line in [f"{group['word']} {group['code']}", *summary(group)] if line)


def label_text(text, most):
    """On one line, not too long, and without formulas, which a dollar sign would begin."""
    text = " ".join(text.split())
    return (text if len(text) <= most else text[: most - 3] + "...").replace("$", r"\$")


# ---- the page --------------------------------------------------------------------------------------------------------

STYLE = """
nav ul { padding: 0; margin: 0; list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1rem; }
section { border-top: 1px solid var(--line); padding: .8rem 0; break-inside: avoid; }
section ul { padding: 0; margin: 0; list-style: none; display: grid; gap: .5rem .3rem; justify-content: start;
             grid-template-columns: repeat(12, minmax(0, 96px)); }  /* 12 divides by 6, 4 and 3: no row is ragged */
@media (max-width: 60rem) { section ul { grid-template-columns: repeat(6, minmax(0, 96px)); } }
@media (max-width: 30rem) { section ul { grid-template-columns: repeat(4, minmax(0, 96px)); } }
nav { margin-bottom: 1rem; }
figure { margin: 0; }
img { display: block; width: 100%; aspect-ratio: 1; object-fit: contain; }
img.small { image-rendering: pixelated; }
figcaption { color: var(--soft); font-size: .75rem; line-height: 1.25; overflow: hidden; text-overflow: ellipsis;
             white-space: nowrap; }
"""


def page(title, groups):
    """The HTML of a gallery."""
    word = groups[0]["word"]
    links = "".join(f'<li><a href="#code-{g["code"]}">{word} {g["code"]}</a> ({g["size"]:,})</li>' for g in groups)
    header = (
        f"<p>The fullest {word}s, then some at random; of each up to {SHOWN} images, drawn at random.</p>\n"
        f'<nav aria-label="{word.capitalize()}s"><ul>{links}</ul></nav>'
    )
    return html_page(title, header, "".join(map(section, groups)), STYLE)


def section(group):
    facts = "; ".join(filter(None, summary(group)))
    items = "".join(f"<li>{picture(group, i)}</li>\n" for i in range(len(group["indices"])))
    code, name = f"code-{group['code']}", f"{group['word'].capitalize()} {group['code']}"
    return (
        f'<section id="{code}" aria-labelledby="h-{code}">\n'
        f'<h2 id="h-{code}">{name} <span>{escape(facts)}</span></h2>\n<ul>\n{items}</ul>\n</section>\n'
    )


def picture(group, i):
    """One image with its class and file name, which is also what a screen reader says of it."""
    name, image = group["names"][i], group["thumbnails"][i]
    caption = group["classes"][i] if "classes" in group else name
    said = f"{caption}, {name}" if "classes" in group else name
    small = ' class="small"' if max(image.size) <= SMALL else ""
    return (
        f'<figure title="{escape(said)}"><img{small} alt="{escape(said)}" src="{inlined(image)}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )
