"""Features of all images of a set, in files: of any model, at any size, of any number of images.

    python extract_features.py --checkpoint runs/x/checkpoint.pth --output_dir out
    python extract_features.py --checkpoint dinov2.pth --data_path photos --img_size 518 --features cls patches \\
        --format parquet --output_dir out
    torchrun --nproc_per_node=8 extract_features.py --checkpoint dino.pth --data_path /data/imagenet --output_dir out
    python extract_features.py --checkpoint dino.pth --data_path photos --output_dir out --similar cat.jpg

    out/cls.npy (N, D), which np.load(..., mmap_mode="r") maps, and out/names.txt, a line per row

The last command finds the features that the first has written, and prints and draws the images nearest to one. A run
that was killed goes on when it is started again, with any number of processes, and ends with the same bytes: batches
are cut by the place of an image alone. Memory does not grow with the number of images. See evaluation/feature_files.py.

Shapes: N images, B of a batch, D features, r x c patches, F width of the head, k neighbours.
"""

import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import data
import evaluation
import pretrained
import utils
from cplearn_head import CPLearnHead
from evaluation import feature_files, gallery
from evaluation.knn import choose_search, largest
from evaluation.patches import WithPatches
from images import BadImage
from running.watch import Watch
from utils import UserError

KINDS = ("cls", "patches", "average", "embeddings", "codes")
BLOCK_BYTES, BLOCK_BATCHES = 2**26, 16  # a block is written at once: so many batches, or as many as these bytes hold
SHOW_S = 10  # seconds between two lines of progress


def get_args_parser():
    parser = utils.ArgumentParser("extract_features.py", "Features of all images of a set, in files.")
    data.add_dataset_arguments(parser)
    pretrained.add_checkpoint_arguments(parser)
    parser.set_defaults(dataset=None, baselines=False, seed=0, features_dir=None)  # for evaluation.open_models
    add = parser.add_argument
    add(
        "--features", nargs="+", choices=KINDS, default=["cls"],
        help="cls: what the evaluations use, of a ViT its CLS token, of other networks their pooled features; patches: "
        "of a ViT its patch tokens, else the last map, (r, c, D) of each image; average: the mean of the patches; "
        "embeddings: CPLearn's head; codes: the head's code of each image (default: cls)",
    )  # fmt: skip
    add(
        "--split", default="train", choices=("train", "val"), help="images, where --data_path has both (default: train)"
    )
    add(
        "--format", default="npy", choices=feature_files.FORMATS,
        help="npy: a file for each kind, and names.txt; parquet: one table in parts, with names (default: npy)",
    )  # fmt: skip
    add(
        "--batch_size_per_gpu", "--batch_size", dest="batch_size", type=utils.positive(int), default=128,
        help="images per forward pass and process",
    )  # fmt: skip
    add(
        "--output_dir", required=True,
        help="folder to make; one in which the same command has begun is gone on with, any other is refused",
    )  # fmt: skip
    add(
        "--similar", default=None, metavar="IMAGE",
        help="then print the images whose cls is nearest to this image's, by cosine, and draw them: "
        "similar_IMAGE.png in --output_dir",
    )  # fmt: skip
    add("--nearest", type=utils.Number(int, least=1, most=1000), default=12, help="images that --similar finds")
    return parser


@utils.command_line
def main(argv=None):
    args = get_args_parser().parse_args(argv)
    args.features = [kind for kind in KINDS if kind in args.features]  # in one order, each once
    check_flags(args)
    device = utils.init_distributed(args.device)
    args.checkpoint, own_dir, args.output_dir = [args.checkpoint], args.output_dir, None
    [evaluated] = evaluation.open_models(args, device)
    images = evaluation.open_images([evaluated], args.split)
    maker = Maker(evaluated, args.features)
    folder = open_together(own_dir, maker, images, args)
    extract(folder, maker)
    if args.similar and utils.rank() == 0:
        show_similar(folder, maker, args)


def check_flags(args):
    if args.similar and "cls" not in args.features:
        raise UserError(f"--similar {args.similar}: searches in cls; give it among --features")
    if args.format == "parquet":
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError as error:
            raise UserError(f"--format parquet needs pyarrow ({error}): pip install pyarrow") from error


def open_together(path, maker, images, args):
    """The folder of features; the first process makes or checks it."""
    columns = maker.columns()
    row_bytes = sum(np.dtype(dtype).itemsize * int(np.prod(shape)) for shape, dtype in columns.values())
    batches = max(1, min(BLOCK_BATCHES, BLOCK_BYTES // (row_bytes * args.batch_size)))
    folder = feature_files.FORMATS[args.format](Path(path), columns, images, batches * args.batch_size)
    meaning = None
    if utils.rank() == 0:
        meaning = maker.evaluated.meaning(images) | {
            "features": args.features, "format": args.format, "batch_size": args.batch_size, "torch": torch.__version__,
        }  # fmt: skip
    utils.on_rank_zero(feature_files.make_or_check, folder, meaning)
    return folder


class Maker:
    """Images -> their features of each kind."""

    def __init__(self, evaluated, kinds):
        self.evaluated, self.kinds = evaluated, kinds
        self.model, self.args, self.device = evaluated.on_device(), evaluated.args, evaluated.device
        head, name = self.model.head, evaluated.args.checkpoint
        if "embeddings" in kinds and not isinstance(head, CPLearnHead):
            raise UserError(f"--features embeddings: {name} has no head of CPLearn's")
        if "codes" in kinds and head is None:
            raise UserError(f"--features codes: {name} has no head that names codes")
        self.seer = WithPatches(self.model.backbone) if {"patches", "average"} & set(kinds) else None

    def columns(self):
        """{kind: (shape of an image's, dtype)}; raises UserError where the network takes no images of this size."""
        size = self.args.img_size
        with evaluation.trying_size(size, "takes no such images"):
            made = self(torch.zeros(1, self.args.in_chans, size, size, device=self.device))
        return {kind: (array.shape[1:], array.dtype) for kind, array in made.items()}

    @torch.no_grad()
    def __call__(self, images):
        """{kind: array (B, ...)}"""
        with utils.autocast(self.device, self.args.precision):
            cls, patches = (self.model(images), None) if self.seer is None else self.seer(images)
        made = {"cls": cls.float()}
        if patches is not None:
            made |= {"patches": patches.float(), "average": patches.float().mean(dim=(1, 2))}
        if "embeddings" in self.kinds:
            made["embeddings"] = self.model.head(made["cls"]).float()
        if "codes" in self.kinds:
            made["codes"] = self.model.assign_features(made["cls"])
        for kind in self.kinds:
            evaluation.check_finite(torch.isfinite(made[kind]), "the features")
        return {kind: made[kind].cpu().numpy() for kind in self.kinds}


# ---- all images ------------------------------------------------------------------------------------------------------


def extract(folder, maker):
    """Writes what is not written yet; each process its share of the blocks."""
    todo = evaluation.from_first(folder.todo() if utils.rank() == 0 else None)
    begun, images = folder.num_blocks - len(todo), folder.images
    if begun:
        evaluation.note(f"{folder.path}: {begun} of {folder.num_blocks} blocks are there already")
    mine = todo[utils.rank() :: utils.world_size()]
    progress = Progress(sum(len(folder.rows_of(block)) for block in mine) * utils.world_size())
    indices = np.concatenate([np.zeros(0, np.int64), *(np.asarray(folder.rows_of(block)) for block in mine)])
    with Watch((), evaluation.PATIENCE_S, unit="batch") as watch:
        made = []
        for rows, pixels in watch.over(maker.evaluated.batches(images, indices=indices)):
            made.append(maker(pixels))
            block = rows[-1] // folder.block_size
            if rows[-1] == folder.rows_of(block)[-1]:
                folder.write(block, {kind: np.concatenate([each[kind] for each in made]) for kind in folder.columns})
                made = []
            progress.show(len(rows) * utils.world_size())
    if utils.world_size() > 1:
        dist.barrier()
    utils.on_rank_zero(folder.finish)
    if utils.rank() == 0:
        shapes = ", ".join(f"{kind} {(len(images), *shape)}" for kind, (shape, _) in folder.columns.items())
        print(f"{folder.path}: {shapes}", flush=True)


class Progress:
    """A line every SHOW_S seconds, by the first process, which counts for all."""

    def __init__(self, total):
        self.total, self.done, self.began = total, 0, time.monotonic()
        self.shown = self.began

    def show(self, number):
        self.done, now = min(self.total, self.done + number), time.monotonic()
        if utils.rank() == 0 and now - self.shown >= SHOW_S:
            self.shown, rate = now, self.done / (now - self.began)
            left = time.strftime("%H:%M:%S", time.gmtime((self.total - self.done) / rate))
            print(f"{self.done:,} of {self.total:,} images, {rate:.1f} a second, {left} left", file=sys.stderr)


# ---- the nearest images ----------------------------------------------------------------------------------------------


def show_similar(folder, maker, args):
    query = embed_file(args.similar, folder.images, maker)
    cosines, rows = nearest(folder, query, min(args.nearest, len(folder.images)), choose_search(maker.device))
    names = [folder.images.name(row) for row in rows]
    table = [{"rank": rank, "cosine": cosine, "name": gallery.printable(name)}
             for rank, (cosine, name) in enumerate(zip(cosines, names, strict=True), 1)]  # fmt: skip
    print(evaluation.markdown_table(table, {"rank": ("", "d"), "cosine": ("cosine", ".4f"), "name": ("image", "")}))
    path = folder.path / f"similar_{evaluation.file_stems([Path(args.similar).stem])[0]}.png"
    draw_similar(path, args.similar, folder.images, rows, cosines, maker)
    print(path)


def embed_file(file, images, maker):
    """(1, D) of length 1, from pixels that are resized and cropped as the images of the set."""
    args, pixels = maker.args, load_query(file, images, maker)
    whole = images.data is not None
    pixels = (
        data.resize_batch(pixels[None], args.img_size)
        if whole
        else data.resize_and_center_crop(pixels, args.img_size)[None]
    )
    cls = maker(data.normalize(pixels.to(maker.device).float() / 255, args.mean, args.std))["cls"]
    return torch.nn.functional.normalize(torch.from_numpy(cls), dim=1)


def load_query(file, images, maker):
    """Raises UserError where it is no image."""
    try:
        return images.reading.load(file, maker.args.in_chans)
    except (BadImage, OSError) as error:
        raise UserError(f"--similar {file}: cannot be read: {error}") from error


def nearest(folder, query, k, search):
    """([cosines], [rows]) of the k nearest images, largest first; exact, by as many rows at a time as `read` gives."""
    cosines, rows = torch.empty(1, 0), torch.empty(1, 0, dtype=torch.int64)
    for first, features in folder.read("cls"):
        found, places = search(torch.from_numpy(features.copy()))(query, min(k, len(features)))
        cosines, rows = largest(cosines, rows, found, places + first, k)
    return cosines[0].tolist(), rows[0].tolist()


def draw_similar(path, file, images, rows, cosines, maker):
    plt = evaluation.pyplot()
    shown = [("asked for", gallery.as_thumbnail(load_query(file, images, maker)))]
    shown += [(f"{cosine:.3f}", gallery.thumbnail(images, row)) for row, cosine in zip(rows, cosines, strict=True)]
    columns = min(len(shown), 6)
    figure, axes = plt.subplots(-(-len(shown) // columns), columns, squeeze=False, figsize=(1.6 * columns, 9))
    figure.set_figheight(1.8 * len(axes))
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, (title, picture) in zip(axes.flat, shown, strict=False):
        axis.imshow(picture, cmap="gray")
        axis.set_title(title, fontsize=8)
    evaluation.save_figure(figure, path, bbox_inches="tight")


if __name__ == "__main__":
    main()
