"""What a run measures of its backbone while it trains: k-NN and a linear probe, of labelled images.

    add_probe_arguments(parser)                            # --knn_every, --linear_every, --probe_data
    run.probe_images = open_probe_images(args, images)     # (training images, images to evaluate on), or None
    found = probe(run, step, due(args, epoch, last))       # {"knn_top1": percent, "linear_top1": percent}

`run` is main_cplearn's Run. All processes compute features, each of its share of the images; the linear classifiers are
trained by the first one alone.
"""

import contextlib
import copy
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import data
from evaluation import extract_features
from evaluation.knn import knn_accuracy, search_by_torch
from evaluation.linear_probe import fit_selected, predict, scores
from images import check_same_classes, open_dataset
from monitor import read_log
from utils import UserError, not_negative, rank, world_size

SAMPLE = 20_000  # training images of the linear probe, at most; drawn once, by --seed
NAMES = {"knn": "k-NN", "linear": "linear probe"}


def add_probe_arguments(parser):
    group = parser.add_argument_group("evaluation while training, for images with labels")
    add = group.add_argument
    add("--knn_every", type=not_negative(int), default=0, help="k-NN accuracy every so many epochs; 0: never")
    add(
        "--linear_every", type=not_negative(int), default=0,
        help="linear accuracy every so many epochs, eval_linear.py's fast protocol on at most "
        f"{SAMPLE} training images; each says how long it took; 0: never",
    )  # fmt: skip
    add(
        "--probe_data", default=None, metavar="PATH",
        help="a folder with train/ and val/ of classes, or one that is split by folders, to evaluate on instead of the "
        "images that the run trains on; --class_list does not apply to it",
    )  # fmt: skip


def open_probe_images(args, images):
    """(training images, images to evaluate on), or None where nothing is asked for. images: those that are trained on.
    Raises UserError where there are no labels."""
    asked = [f"--{name}_every {every}" for name in NAMES if (every := getattr(args, f"{name}_every"))]
    if not asked:
        if args.probe_data is not None:
            raise UserError(f"--probe_data {args.probe_data}: expected --knn_every or --linear_every with it")
        return None
    own = copy.copy(args)
    if args.probe_data is not None:
        own.dataset, own.data_path, own.class_list = "imagefolder", args.probe_data, None
        images = open_dataset(own, "train")
    val_images = open_dataset(own, "val")
    if images.labels is None or val_images.labels is None:
        raise UserError(f"{asked[0]}: the images in {own.data_path} have no labels; use 0, or --probe_data")
    check_same_classes(images, val_images)
    return images, val_images


def due(args, epoch, last):
    """Names of what is to be measured after an epoch, which counts from 0; all that is asked for after the last."""
    every = {name: getattr(args, f"{name}_every") for name in NAMES}
    return [name for name, epochs in every.items() if epochs and ((epoch + 1) % epochs == 0 or last)]


def probe(run, step, names):
    """{"knn_top1": percent} and so on of the backbone as it is, but for those that fail.

    What fails on one of several processes ends them all: the others are inside a collective."""
    found = {}
    for name in names:
        with run.log.going_on(NAMES[name], "failed") if world_size() == 1 else contextlib.nullcontext():
            began = time.monotonic()
            top1 = PROBES[name](run, step)
            found[f"{name}_top1"] = top1
            train, val = map(len, run.probe_images)
            sample = f", by {SAMPLE} of {train} training images" if name == "linear" and train > SAMPLE else ""
            run.log.print(
                f"{NAMES[name]} on {val} images{sample}: {top1:.2f} %{beside(run, name)}, "
                f"{time.monotonic() - began:.1f} s"
            )
    return found


def beside(run, name):
    """What the run began with, so that forgetting is seen."""
    lines = read_log(Path(run.args.output_dir) / "log.txt") if rank() == 0 else []
    first = [line.get(f"{name}_top1") for line in lines if line["kind"] == "start"]
    return f" (before the first step: {first[0]:.2f} %)" if first and first[0] is not None else ""


def knn(run, step):
    """k-NN accuracy (top-1, percent) of the frozen backbone, as eval_knn.py computes it."""
    train, val = run.probe_images
    matrices = [features_of(run, train, step), torch.as_tensor(train.labels)]
    matrices += [features_of(run, val, step), torch.as_tensor(val.labels)]
    search = partial(search_by_torch, device=run.device)  # faiss would bring its own CUDA and take memory beside torch
    with run.watch.paused():
        (accuracy,) = knn_accuracy(*matrices, ks=(min(20, len(train)),), search=search, over_processes=True).values()
    return accuracy["top1"]


def linear(run, step):
    """Accuracy (top-1, percent) of a linear classifier on the frozen backbone: eval_linear.py's fast protocol, of
    `SAMPLE` training images."""
    train, val = run.probe_images
    drawn = np.sort(np.random.default_rng(run.args.seed).permutation(len(train))[:SAMPLE])
    features, unseen = features_of(run, train, step, drawn), features_of(run, val, step)
    top1 = torch.zeros(1, dtype=torch.float64)
    with run.watch.paused():
        if rank() == 0:
            labels, classes = torch.as_tensor(train.labels)[drawn], len(train.classes)
            fit = fit_selected(features, labels, classes, seed=run.args.seed, device=run.device)
            ranked = predict(unseen, fit.classifier, run.device)
            top1[0] = scores(ranked, torch.as_tensor(val.labels), classes)["top1"]
        if world_size() > 1:  # the others wait here for the first
            top1 = top1.to(run.device, torch.float32)
            dist.broadcast(top1, src=0)
    return float(top1)


PROBES = {"knn": knn, "linear": linear}


def features_of(run, images, step, indices=None):
    """(N, D) of the images, or of the images of the indices, in increasing order, on every process."""
    args = run.args
    settings = {name: getattr(args, name) for name in ("img_size", "in_chans", "mean", "std", "num_workers")}
    settings |= {"rank": rank(), "world_size": world_size(), "batch_size": run.batch_size, "device": run.device}
    evaluated = getattr(run.model.objective, "teacher", run.model).backbone  # as in a checkpoint
    batches = run.watch.each(data.eval_batches(images, indices=indices, **settings), step)
    if indices is not None:
        batches = ((np.searchsorted(indices, chosen), pixels) for chosen, pixels in batches)
    count = len(images) if indices is None else len(indices)
    return extract_features(evaluated, batches, count, run.device, args.precision)[0]
