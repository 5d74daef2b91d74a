"""Images on which two views share exactly log K nats: K kinds, equally frequent, and nothing else.

    python -m experiments.planted --kinds 16 --images 6400 --img_size 16 --seed 0 /tmp/planted16
    python main_cplearn.py --dataset imagefolder --data_path /tmp/planted16 --img_size 16 --augmentation small \\
        --jitter 0 --grayscale 0 --arch resnet8 --dictionary hadamard --out_dim 16 --proj_dim 16 --beta 1

An image is flat, of its kind's colour. Any crop, resizing, flip or blur of it is the same flat image, so that a view is
its kind z, plus noise that is drawn anew for every view (--augmentation small), or none. Then

    I(view; other view) <= H(z) = log K      z alone connects them, and K kinds are equally frequent
    I(view; other view) >= I(z; z) = log K   as any view tells z; with noise of 0.03 errors are beyond counting

Flags that change colours take some of it away: give --jitter 0 --grayscale 0 --solarize 0. A pattern or noise in the
file would add to it, for two crops of one image share a part of that. The images of a kind are equal files, so that the
data are K points; what limits a run on them is the objective, never the images.
"""

import io
import itertools
import json
import math
import sys
from pathlib import Path

if not __package__:  # python experiments/planted.py
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
from PIL import Image

from running.files import new_folder
from utils import ArgumentParser, Number, UserError, command_line, make_folder

SETTINGS = "planted.json"
SHARE_OF_VAL = 10  # training images for one of validation


@command_line
def main(argv=None):
    args = get_args_parser().parse_args(argv)
    if args.images % args.kinds:
        raise UserError(f"--images {args.images}: expected a multiple of --kinds {args.kinds}, for equal frequencies")
    settings = {name: getattr(args, name) for name in ("kinds", "images", "img_size", "seed")}
    told = describe_folder(args.output_dir, settings) or write_folder(args.output_dir, settings)
    per_kind = args.images // args.kinds
    print(
        f"{args.output_dir}: {told}; {args.kinds} kinds, log {args.kinds} = {math.log(args.kinds):.4f} "
        f"nats; {per_kind} images of {args.img_size} px of each kind in train/, {num_val(per_kind)} in val/"
    )


def get_args_parser():
    parser = ArgumentParser("experiments/planted.py", "Write images on which two views share exactly log K nats.")
    add = parser.add_argument
    add("output_dir", help="folder to write; one of the same settings is kept")
    add("--kinds", type=Number(int, least=2, most=4096), default=16, help="K")
    add("--images", type=Number(int, least=2), default=6400, help="in train/; val/ gets a tenth of it beside")
    add("--img_size", type=Number(int, least=1, most=2**10), default=16, help="side in pixels")
    add("--seed", type=Number(int, least=0, below=2**63), default=0, help="of the colours")
    return parser


def describe_folder(folder, settings):
    """None where there is nothing yet. Raises UserError where there is anything else than what `settings` write."""
    folder = Path(folder)
    if not folder.exists():
        return None
    try:
        there = json.loads((folder / SETTINGS).read_text())
    except (OSError, ValueError):
        raise UserError(f"{folder}: exists, without a {SETTINGS} of this program; expected a new folder") from None
    if there != settings:
        raise UserError(f"{folder}: holds {there}, asked for were {settings}; expected another folder")
    return "kept as it is, of the same settings"


def write_folder(folder, settings):
    """Beside its place first, so that a folder of that name is whole; where another process has written it meanwhile,
    its folder stays. Returns a word on it. Raises UserError where it cannot be written, or is of other settings."""
    folder = Path(folder)
    make_folder(folder.parent)
    try:
        with new_folder(folder) as aside:
            write_kinds(aside, **settings)
            (aside / SETTINGS).write_text(json.dumps(settings) + "\n")
        return "written"
    except OSError as error:
        if described := describe_folder(folder, settings):
            return described
        raise UserError(f"{folder}: cannot be written ({error.strerror})") from error


def write_kinds(folder, kinds, images, img_size, seed):
    per_kind = images // kinds
    for kind, colour in enumerate(colours(kinds, seed)):
        content = flat_png(colour, img_size)
        for split, count in (("train", per_kind), ("val", num_val(per_kind))):
            place = folder / split / f"kind{kind:04d}"
            place.mkdir(parents=True)
            for number in range(count):
                (place / f"{number:06d}.png").write_bytes(content)


def num_val(per_kind):
    return max(1, per_kind // SHARE_OF_VAL)


def colours(kinds, seed):
    """uint8 (K, 3): K points, drawn without repetition, of the coarsest cubic grid in RGB that has so many."""
    levels = next(n for n in itertools.count(2) if n**3 >= kinds)
    grid = np.array(list(itertools.product(np.linspace(0, 255, levels).round(), repeat=3)), np.uint8)
    return np.random.default_rng(seed).permutation(grid)[:kinds]


def flat_png(colour, img_size):
    file = io.BytesIO()
    Image.new("RGB", (img_size, img_size), tuple(colour.tolist())).save(file, "PNG")
    return file.getvalue()


if __name__ == "__main__":
    main()
