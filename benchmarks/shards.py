"""What reading images out of shards costs beside a folder of the same files: CPU time per image.

    OMP_NUM_THREADS=1 python -m benchmarks.shards

Every form holds the same noisy JPEGs. Images are read and decoded in a random order, a block of each form in turn, in
one process; a ratio is the median over the blocks of a form's CPU time to the folder's on the same images. They
are in the page cache: what a disk or a network adds is not seen.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

import shards
from images import open_folder


def get_parser():
    parser = argparse.ArgumentParser("benchmarks.shards", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--images", type=int, default=400, help="(default 400)")
    add("--side", type=int, default=256, help="of an image, pixels (default 256)")
    add("--rows", type=int, nargs="+", default=[16, 100], help="of a row group of Parquet (default 16 100)")
    add("--block", type=int, default=50, help="images that are timed together (default 50)")
    add("--repeats", type=int, default=7, help="timed blocks of each form (default 7)")
    return parser


def main(args):
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = write_images(args, Path(folder) / "images")
        paths = {"folder": root}
        for name, write in forms(args).items():
            paths[name] = write(root, Path(folder) / name)
        sets = {name: open_folder(path) for name, path in paths.items()}
        seconds = times(args, sets)
    print("| form | ms per image | to the folder |\n|---|---|---|")
    for name, found in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(found, seconds["folder"], strict=True))
        print(f"| {name} | {1000 * statistics.median(found) / args.block:.2f} | {ratio:.2f} |")


def write_images(args, root):
    draws = np.random.default_rng(0)
    for number in range(args.images):
        path = root / f"class{number % 10}" / f"{number:06}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(draws.integers(0, 256, (32, 32, 3), np.uint8))
        coarse.resize((args.side, args.side), Image.Resampling.BICUBIC).save(path, quality=90)
    return root


def forms(args):
    found = {name: write for name, write in shards.FORMS.items() if name != "parquet"}
    for rows in args.rows:
        found[f"parquet, row groups of {rows}"] = lambda root, out, rows=rows: shards.parquet(root, out, rows)
    return found


def times(args, sets):
    """{form: seconds of each block}; the forms take turns, so that a noisy neighbour meets all of them alike."""
    seconds, draws = {name: [] for name in sets}, np.random.default_rng(1)
    for _ in range(args.repeats + 1):
        block = draws.permutation(args.images)[: args.block]
        for name, images in sets.items():
            begin = time.process_time()
            for index in block:
                images.load(index)
            seconds[name].append(time.process_time() - begin)
    return {name: found[1:] for name, found in seconds.items()}


if __name__ == "__main__":
    main(get_parser().parse_args())
