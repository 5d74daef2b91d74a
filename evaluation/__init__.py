"""What the evaluations share: their flags, the models they compare, the features of each, and one table of results.

    parser = evaluation_parser("eval_x.py", "...")
    models = open_models(args, device)                         # one for each --checkpoint, and the --baselines
    images = open_images(models, "val", labels_for="k-NN")       # the same images for all of them
    for evaluated, (features, codes) in extract_all(models, images):    # on the first process; the others are done
        rows.append({"checkpoint": evaluated.name, ...})
    report("x", rows, {"top1": ("top-1 %", ".2f")}, args, models)     # terminal, results_x.md, results_x.json

Shapes: N images, D features.
"""

import argparse
import contextlib
import copy
import functools
import hashlib
import json
import os
import platform
import re
import shlex
import sys
import time
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

import data
import images as image_sets
import monitor
import pretrained
import utils
from backbones import lay_out
from monitor import PALETTE, pyplot  # noqa: F401 (the figures of all evaluations)
from pretrained import PretrainedModel, split_key
from running.files import new_folder, replace_file, write_whole
from running.watch import Watch
from utils import UserError

PATIENCE_S = 600  # a process that waits longer than that for one batch shows where and ends
RANKED = 5  # classes that a prediction names, for top-5
MAX_STATS = 200_000  # files whose size and times are looked at: 2 s on a disk, a minute over a slow network

# flags of DINO's evaluations that have no meaning here, and what to do instead
DINO_ONLY = {
    "--dump_features": "use --features_dir, which keeps features and finds them again",
    "--load_features": "use --features_dir, which keeps features and finds them again",
    "--use_cuda": "use --device",
}


def evaluation_parser(prog, description):
    """A parser with the flags that every evaluation takes."""
    parser = utils.ArgumentParser(prog, description, DINO_ONLY)
    data.add_dataset_arguments(parser)
    parser.set_defaults(dataset=None)  # the checkpoint's
    pretrained.add_checkpoint_arguments(parser, several=True)
    add = parser.add_argument
    add(
        "--baselines",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="also evaluate raw pixels, and the first checkpoint's backbone with random weights: what training must "
        "beat",
    )
    add(
        "--batch_size_per_gpu", "--batch_size", dest="batch_size", type=utils.positive(int), default=128,
        help="images per forward pass and process; changes no score, except where eval_linear.py trains with it (dino)",
    )  # fmt: skip
    add(
        "--features_dir",
        default=None,
        help="folder in which features are kept: the next evaluation of the same model on the same images reads them, "
        "and says so",
    )
    add("--output_dir", default=None, help="folder for tables and figures (default: the table is only printed)")
    add("--seed", type=utils.Number(int, least=0, below=2**31), default=0, help="of everything that is drawn at random")
    return parser


# ---- the models under comparison -------------------------------------------------------------------------------------


class EvaluatedModel:
    """One of the models under comparison.

    .name: what tells its path from the others'.  .stem: the name as part of file names.
    .model: `pretrained.PretrainedModel`.  .args: the evaluation's flags, with those about images as this model was
    trained.  .extract(images): its features.
    """

    def __init__(self, name, model, args, device):
        self.name, self.model, self.args, self.device = name, model, args, device

    def extract(self, images):
        """(features (N, D) float32, codes (N,) int64 or None) of all images, on every process, on CPU; read from
        --features_dir where they are there, and then mapped into memory, not loaded. Processes call it together."""
        if self.args.features_dir is None:
            return self._compute(images)
        meaning = from_first(self.meaning(images) if utils.rank() == 0 else None)  # before a picture is read
        folder = Path(self.args.features_dir) / cache_key(meaning)
        whose = f"{self.name}: features of {len(images)} images"
        if from_first(folder.is_dir()):
            note(f"{whose} read from {folder}, of {date_of(folder)}")
        else:
            utils.on_rank_zero(utils.make_folder, self.args.features_dir, "--features_dir")
            utils.on_rank_zero(store_features, folder, *self._compute(images), meaning)
            note(f"{whose} written to {folder}")
        return load_features(folder)

    def describe(self):
        """What tells this model from any other: its settings, and a fingerprint of its weights."""
        return self.model.settings | {"weights": fingerprint(self.model)}

    def on_device(self):
        """The model, in place where it is to run, and on CPUs in the faster layout. On CUDA it stays contiguous: which
        kernels cuDNN takes after trying is another run's rounding."""
        model = self.model.to(self.device)
        if self.device.type == "cpu":
            lay_out(model, self.device)
        return model

    def batches(self, images, **which):
        """`data.eval_batches` of images as this model was trained to see them. which: rank and world_size, whose share
        they are, or indices; by default all."""
        args = self.args
        return data.eval_batches(
            images, args.img_size, args.in_chans, args.mean, args.std, args.batch_size, num_workers=args.num_workers,
            device=self.device, **which,
        )  # fmt: skip

    def _compute(self, images):
        batches = self.batches(images, rank=utils.rank(), world_size=utils.world_size())
        model = self.on_device()
        with Watch((), PATIENCE_S, unit="batch") as watch:
            batches = watch.over(batches)
            found = extract_features(model, batches, len(images), self.device, self.args.precision, self.name)
        self.model.cpu()  # room for the next one
        return found

    def meaning(self, images):
        """Everything that features depend on."""
        image_flags = {name: getattr(self.args, name) for name in ("img_size", "in_chans", "mean", "std", "precision")}
        return {
            "model": self.describe(),
            "images": images.fingerprint,
            "files": None if images.data is not None else files_fingerprint(images),
            "num_images": len(images),
            **image_flags,
        }


def cache_key(meaning):
    """Name of a folder of features, 16 hexadecimal digits, a function of all that features depend on."""
    return hashlib.sha256(json.dumps(meaning, sort_keys=True).encode()).hexdigest()[:16]


def fingerprint(model):
    """Of a model's tensors, their names and values: 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def files_fingerprint(images):
    """Of the folder of images, and of size and times of change of `MAX_STATS` files in it: another folder with the same
    names in it, or images made anew, are other images. The second time is the kernel's own: a copy that keeps the date
    of the original changes it too. 16 hexadecimal digits."""
    if images.num_files > MAX_STATS:
        note(
            f"--features_dir: {images.num_files} files; size and times of {MAX_STATS} of them tell whether "
            "images have changed; where others have, remove the folder of features"
        )
    digest = hashlib.sha256(b"".join(map(os.path.realpath, images.roots)))
    for status in images.look_at_some(MAX_STATS):
        digest.update(f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}".encode() if status else b"none")
    return digest.hexdigest()[:16]


def open_models(args, device):
    """An `EvaluatedModel` for each --checkpoint, after the models of --baselines.

    All see the same images: the data set that the flags name, or else the one that the checkpoints were trained on,
    which then must agree. Raises UserError for a file that cannot be read and for an --output_dir that cannot be made.
    """
    if args.output_dir is not None:
        utils.make_folder(args.output_dir)
    args.precision = utils.choose_precision(args.precision, device)
    models = []
    for path, name in zip(args.checkpoint, short_names(args.checkpoint), strict=True):
        own = copy.copy(args)
        own.checkpoint, own.checkpoint_key = split_key(path, args.checkpoint_key)
        models.append(EvaluatedModel(name, pretrained.open_model(own, torch.device("cpu")), own, device))
    dataset = pretrained.choose_dataset(args, [evaluated.model for evaluated in models])
    for evaluated in models:
        evaluated.args.dataset = dataset
        data.resolve_dataset_defaults(evaluated.args)
    check_read_alike(models, dataset)
    models = (baselines(models[0]) if args.baselines else []) + models
    for evaluated, stem in zip(models, file_stems([evaluated.name for evaluated in models]), strict=True):
        evaluated.stem = stem
    return models


def check_read_alike(models, dataset):
    """Raises UserError where files would become levels in another way for one model than for another: all see the same
    images, and which of the ways is meant nobody can tell."""
    readings = [image_sets.reading_of(evaluated.args).settled() for evaluated in models]
    for evaluated, reading in zip(models, readings, strict=True) if dataset == "imagefolder" else ():
        if reading != readings[0]:
            raise UserError(
                f"{models[0].name} and {evaluated.name} read images in different ways ({readings[0].describe()}; "
                f"{reading.describe()}): give the flag in which they differ, which then holds for all models, or "
                "evaluate them one by one"
            )


def baselines(evaluated):
    """Raw pixels, and the model's backbone as it was made, before any training (torch's generator, --seed)."""
    args, settings = evaluated.args, evaluated.model.settings
    names = ("arch", "patch_size", "img_size", "in_chans", "num_heads")
    given = {name: getattr(args, name) if name in ("img_size", "in_chans") else settings[name] for name in names}
    torch.manual_seed(args.seed)
    untrained = pretrained.load_pretrained(args.checkpoint, args.checkpoint_key, **given, random_weights=True)
    pixels = nn.Flatten()
    pixels.embed_dim = args.in_chans * args.img_size**2
    pixels = pretrained.PretrainedModel(pixels, settings={"arch": "raw pixels"})
    return [
        EvaluatedModel("raw pixels", pixels, copy.copy(args), evaluated.device),
        EvaluatedModel("random weights", untrained, copy.copy(args), evaluated.device),
    ]


def short_names(paths):
    """The parts of each path in which it differs from the others: runs/a/checkpoint.pth, runs/b/... -> a, b."""
    if len(set(paths)) < len(paths):
        raise UserError(f"--checkpoint names the same file twice: {' '.join(paths)}")
    if len(paths) == 1:
        return [paths[0]]
    parts = [Path(path).parts or (".",) for path in paths]
    while len({p[-1] for p in parts}) == 1 and min(map(len, parts)) > 1:
        parts = [p[:-1] for p in parts]
    while len({p[0] for p in parts}) == 1 and min(map(len, parts)) > 1:
        parts = [p[1:] for p in parts]
    return [str(Path(*p)) for p in parts]


def file_stems(names):
    """Names of models as parts of file names, no two alike: runs/a/checkpoint.pth -> runs_a_checkpoint."""
    stems = []
    for name in names:
        name = re.sub(r"\.(pth|pt|safetensors)$", "", name)
        stem = re.sub(r"[^\w.-]+", "_", name, flags=re.ASCII).strip("_.")[-80:] or "model"
        stems.append(f"{stem}_{len(stems)}" if stem in stems else stem)
    return stems


def open_images(models, split, labels_for=None, required=True):
    """The images that all models see. split: "train" or "val".

    labels_for: what needs their labels, such as "k-NN"; None: nothing.  required: whether images without labels will
    not do. Raises UserError where images cannot be found, and where labels are needed and absent, or all of one class.
    """
    args = models[0].args
    images = image_sets.open_dataset(args, split)
    if labels_for is not None:
        if images.labels is None and required:
            raise UserError(
                f"--data_path {args.data_path}: its {split} images have no labels; {labels_for} needs two class "
                "folders or more"
            )
        if images.labels is not None and len(np.unique(images.labels)) < 2:
            raise UserError(
                f"--data_path {args.data_path}: its {split} images are of one class; {labels_for} needs two"
            )
    return images


def open_train_and_val(models, labels_for):
    """Both splits, labelled, of the same classes."""
    train_images, val_images = (open_images(models, split, labels_for) for split in ("train", "val"))
    image_sets.check_same_classes(train_images, val_images)
    return train_images, val_images


def extract_all(models, *image_sets):
    """Features of every model on every set of images, by all processes together.

    Returns [(evaluated, (features, codes) of the first set, of the second, ...)] on the first process. On the others an
    empty list: they have done their share and may end, rather than wait for the first one until a time-out.
    """
    found = [(evaluated, *map(evaluated.extract, image_sets)) for evaluated in models]
    return found if utils.rank() == 0 else []


# ---- features on disk ------------------------------------------------------------------------------------------------


def store_features(folder, matrix, codes, meaning):
    """Write a folder of features, whole or not at all, which `load_features` and numpy read. Where another evaluation
    has written it meanwhile, its features stay: they are equal."""
    try:
        with new_folder(folder) as aside:
            np.save(aside / "features.npy", matrix.numpy())
            if codes is not None:
                np.save(aside / "codes.npy", codes.numpy())
            (aside / "meaning.json").write_text(json.dumps(meaning, indent=2) + "\n")
    except OSError as error:
        if not folder.is_dir():
            raise UserError(f"--features_dir {folder.parent}: cannot be written: {error.strerror}") from error


def date_of(folder):
    """When a folder of features was written, in local time."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(folder.stat().st_mtime))


def load_features(folder):
    """(features, codes or None) as tensors that are mapped into memory; changes to them never reach the file."""
    try:
        arrays = [
            torch.from_numpy(np.load(folder / name, mmap_mode="c")) if (folder / name).exists() else None
            for name in ("features.npy", "codes.npy")
        ]
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{folder}: damaged ({error}); remove the folder, it is made anew") from error
    return tuple(arrays)


def from_first(value):
    """The first process's value, on all of them: a file may be seen by one process and not yet by another."""
    answer = [value]
    if utils.world_size() > 1:
        dist.broadcast_object_list(answer, src=0)
    return answer[0]


def note(text):
    """One line for the reader of the terminal, beside the table; by the first process."""
    if utils.rank() == 0:
        print(f"note: {text}", file=sys.stderr, flush=True)


note_once = functools.cache(note)  # the same words only once


# ---- one table of results --------------------------------------------------------------------------------------------


def report(name, rows, columns, args, models, notes=(), **more):
    """Print rows as a table; with --output_dir write results_<name>.md and results_<name>.json. First process only.

    rows: dicts, one per line of the table.  columns: {key: (title, format)} of what the table shows, in its order; a
    row without the key, or with None, shows a dash.  notes: sentences beneath the table. JSON gets all keys of the
    rows, and notes, settings, models, versions and `more`.
    """
    table = "\n".join([markdown_table(rows, columns), *[f"\n{note}" for note in notes]])
    if args.output_dir is None:
        print(table, flush=True)
        return
    folder = Path(args.output_dir)
    command = shlex.join([f"python {Path(sys.argv[0]).name}", *sys.argv[1:]]).replace("'", "", 2)
    results = {"rows": rows, "notes": list(notes)} | more | {
        "settings": vars(args),
        "models": {evaluated.name: evaluated.describe() for evaluated in models},
        "versions": versions(),
    }  # fmt: skip
    try:  # before the terminal, which may be a pipe that nobody reads any more
        write_whole(folder / f"results_{name}.md", f"{table}\n\n    {command}\n")
        write_whole(folder / f"results_{name}.json", json.dumps(results, indent=2) + "\n")
    except OSError as error:
        print(table, flush=True)
        raise UserError(
            f"--output_dir {folder}: results_{name}.* cannot be written ({error.strerror}); the table is above"
        ) from None
    print(table, flush=True)


def save_picture(path, pixels):
    """Pixels (H, W) or (H, W, 3) as PNG, in place of what `path` holds."""
    with written(path), replace_file(path) as file:
        pyplot().imsave(file, pixels, format="png")


def save_figure(figure, path, **options):
    """A figure as PNG, in place of what `path` holds, and closed. options: savefig's."""
    with written(path):
        monitor.save_figure(figure, path, **options)


@contextlib.contextmanager
def written(path):
    """Raises UserError where `path` cannot be written inside."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from None


def count_hits(ranked, labels):
    """int64 (2,): of M images, those whose class is the first and those whose class is among the first five of
    ranked (M, 5), the likeliest classes of each.  labels: (M,)."""
    hits = ranked == labels[:, None]
    return torch.stack([hits[:, 0].sum(), hits.any(dim=1).sum()])


def top1_and_top5(hits, num_images):
    """What `count_hits` counted, in percent of the images."""
    return {name: 100 * count / num_images for name, count in zip(("top1", "top5"), hits.tolist(), strict=True)}


def markdown_table(rows, columns):
    """Aligned, so that a terminal shows it as well."""
    cells = [[title for title, _ in columns.values()]]
    for row in rows:
        values = {key: row.get(key) for key in columns}
        cells.append(["-" if v is None else format(v, columns[key][1]) for key, v in values.items()])
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    numeric = [any(isinstance(row.get(key), int | float) for row in rows) for key in columns]
    lines = [
        "| " + " | ".join(c.rjust(w) if n else c.ljust(w) for c, w, n in zip(line, widths, numeric, strict=True)) + " |"
        for line in cells
    ]
    rule = "|" + "|".join("-" * (w + 1) + (":" if n else "-") for w, n in zip(widths, numeric, strict=True)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def versions():
    """Of Python and of the packages whose code a score depends on; of faiss where it has been used."""
    found = {"python": platform.python_version()}
    for package in ("torch", "torchvision", "timm", "numpy", "scipy", "scikit-learn"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    faiss = sys.modules.get("faiss")
    return found | ({"faiss": faiss.__version__} if faiss else {})


def find_faiss(instead):
    """faiss, or None where it is not installed or does not load, and then a line. instead: what does its work, in
    words."""
    try:
        import faiss  # here: most evaluations need not wait for it
    except ImportError as error:
        note_once(f"without faiss ({error}) {instead}")
        return None
    return faiss


# ---- a model -> a feature matrix -------------------------------------------------------------------------------------


@torch.no_grad()
def extract_features(model, batches, num_samples, device, precision="fp32", title=None):
    """Features of every image, each counted once, in the data set's order.

    model: maps images (B, C, h, w) on `device` to (B, D); put in eval mode for the duration. A `PretrainedModel` with
        CPLearn's head gives codes too. `torch.nn.Flatten()` gives the raw pixels, the baseline that needs no model.
    batches: yields (indices (B,), images (B, C, h, w)); under several processes, this process's share of them. An index
        that comes twice, as when shares are padded to equal length, counts once.
    num_samples: N; the indices are those from 0 to N - 1, in any order.
    precision: "fp32", "bf16" or "fp16", of the forward pass.
    title: the model's name, for messages and for a progress bar on the first process of a terminal; None: no bar.
    Returns (features (N, D) float32, codes (N,) int64 or None), on CPU, all of them on every process.
    Raises ValueError where an index never comes, UserError where a feature is NaN or infinite.
    Memory: N x D x 4 bytes per process.
    """
    has_codes = isinstance(model, PretrainedModel) and model.head is not None
    codes = torch.zeros(num_samples, dtype=torch.int64) if has_codes else None
    features = torch.zeros(num_samples, 0)  # D is known with the first batch
    owner = torch.full((num_samples,), utils.world_size())  # rank of the process that has the image; no such rank yet
    was_training = model.training
    model.eval()
    shown = title is not None and utils.rank() == 0 and sys.stderr.isatty()
    progress = tqdm(total=num_samples, desc=title, unit="image", disable=not shown, leave=False)
    for indices, images in batches:
        with utils.autocast(device, precision):
            outputs = model(images.to(device, non_blocking=True))
        outputs = outputs.float()
        if features.shape[1] == 0:
            features = torch.zeros(num_samples, outputs.shape[1])
        indices = torch.as_tensor(indices)
        features[indices] = outputs.cpu()
        owner[indices] = utils.rank()
        if has_codes:
            codes[indices] = model.assign_features(outputs).cpu()
        progress.update(len(indices) * utils.world_size())
    progress.close()
    model.train(was_training)
    features, codes = _gather(features, codes, owner)
    # a row's sum is finite only if all of it is; isfinite(features) would make a second copy of them
    check_finite(torch.isfinite(features.sum(dim=1)), f"the features of {title}" if title else "the features")
    return features, codes


def check_finite(finite, whose):
    """finite: bool tensor.  whose: the subject of the sentence. Raises UserError where not all are."""
    if not finite.all():
        raise UserError(f"{whose} hold NaN or infinity: did its training diverge? try --precision fp32")


@contextlib.contextmanager
def trying_size(img_size, refusal):
    """Inside a network sees an image of a size for the first time: what it raises becomes a UserError. refusal: what
    the sentence says of the network."""
    try:
        yield
    except (AssertionError, AttributeError, RuntimeError, ValueError) as error:
        raise UserError(f"--img_size {img_size}: the network {refusal}: {utils.one_line(error)}") from error


def _gather(features, codes, owner):
    """Rows of all processes in one matrix, by a sum: each row has one owner, the lowest rank that saw the image."""
    if utils.world_size() > 1:
        dist.all_reduce(owner, op=dist.ReduceOp.MIN)
    missing = (owner == utils.world_size()).nonzero()
    if len(missing):
        raise ValueError(f"{len(missing)} of {len(owner)} images never came, the first has index {int(missing[0])}")
    if utils.world_size() > 1:
        width = torch.tensor(features.shape[1])
        dist.all_reduce(width, op=dist.ReduceOp.MAX)
        if features.shape[1] == 0:  # fewer images than processes
            features = torch.zeros(len(owner), int(width))
        features[owner != utils.rank()] = 0
        for rows in features.split(65536):  # bounds the buffers of the process group
            dist.all_reduce(rows)
        if codes is not None:
            codes[owner != utils.rank()] = 0
            dist.all_reduce(codes)
    return features, codes
