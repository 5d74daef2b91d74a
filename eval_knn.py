"""k-nearest-neighbour classification on frozen features: no training, nothing to tune.

    python eval_knn.py --checkpoint runs/cplearn/checkpoint.pth
    torchrun --nproc_per_node=8 eval_knn.py --checkpoint dino_deitsmall16_pretrain.pth \\
        --dataset imagefolder --data_path /data/imagenet

Each process extracts the features of its share of the images, then the first one classifies. Prints top-1 and top-5
accuracy in percent of the validation images and, with --output_dir, writes results_knn.json.

Shapes: N training images, M test images, D features, C classes, k neighbours, b test images at a time.
"""

import argparse
import json
import platform
from pathlib import Path

import numpy
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import data
import utils
from features import add_checkpoint_arguments, extract_features, load_pretrained, open_model
from utils import UserError

MEMORY_MB = 1024  # what the similarities and votes of one chunk of test images may take
RANKED = 5  # classes that a prediction names, for top-5


def get_args_parser():
    parser = utils.ArgumentParser("eval_knn.py", description="k-NN classification on frozen features.")
    data.add_dataset_arguments(parser)
    parser.set_defaults(dataset=None)  # the checkpoint's
    add_checkpoint_arguments(parser)
    add = parser.add_argument
    add("--nb_knn", type=int, nargs="+", default=[10, 20, 100, 200], help="numbers of neighbours; 20 is usually best")
    add(
        "--temperature", type=float, default=0.07, help="votes weigh exp(similarity / temperature); lower: nearest ones"
    )
    add("--batch_size", type=int, default=128, help="images per forward pass and process; any value, same result")
    add(
        "--baselines",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="also classify raw pixels, and features of the same backbone with random weights: what training must beat",
    )
    add("--output_dir", default=None, help="folder for results_knn.json (default: only printed)")
    return parser


@utils.command_line
def main(argv=None):
    args = get_args_parser().parse_args(argv)
    device = utils.init_distributed(args.device)
    output_dir = make_output_dir(args.output_dir)
    model = open_model(args, device)
    data.resolve_dataset_defaults(args)
    train_images, test_images = (open_labelled(args, split) for split in ("train", "val"))
    if train_images.classes != test_images.classes:  # labels count the folders of a split
        raise UserError(f"--data_path {args.data_path}: train and val have different class folders; see --class_list")
    check_knn(args.nb_knn, args.temperature, len(train_images))
    models = {"checkpoint": model}
    if args.baselines:
        torch.manual_seed(0)
        models = {"raw pixels": nn.Flatten(), "random weights": random_backbone(args).to(device), **models}
    labels = [torch.as_tensor(images.labels) for images in (train_images, test_images)]
    accuracy = {}
    for name, each in models.items():
        accuracy[name] = evaluate(each, train_images, test_images, labels, args, device)
        for k, scores in (accuracy[name] or {}).items():
            print(f"{name:14s}  {k:4d}-NN  top-1 {scores['top1']:6.2f} %  top-5 {scores['top5']:6.2f} %", flush=True)
    if output_dir and utils.rank() == 0:
        results = {"accuracy": accuracy.pop("checkpoint"), "baselines": accuracy}
        results |= {"num_train": len(train_images), "num_test": len(test_images)}
        write_results(output_dir / "results_knn.json", results, args, model)


def evaluate(model, train_images, test_images, labels, args, device):
    """{k: {"top1", "top5"}} on rank 0; None on the others, which only extract features."""
    train_features = features_of(train_images, model, args, device)
    test_features = features_of(test_images, model, args, device)
    if utils.rank() > 0:
        return None
    return knn_accuracy(train_features.to(device), labels[0], test_features, labels[1], args.nb_knn, args.temperature)


def random_backbone(args):
    """The checkpoint's backbone as it was made, before any training."""
    names = ("arch", "patch_size", "img_size", "in_chans")
    return load_pretrained(
        args.checkpoint, args.checkpoint_key, **{n: getattr(args, n) for n in names}, random_weights=True
    )


def make_output_dir(path):
    """The folder, made if need be, before the work begins rather than after it; None stays None."""
    try:
        if path is not None:
            Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir {path}: {error.strerror}") from error
    return None if path is None else Path(path)


def open_labelled(args, split):
    images = data.open_dataset(args, split)
    if images.labels is None:
        raise UserError(
            f"--data_path {args.data_path}: its {split} images have no labels; k-NN needs a folder per class"
        )
    return images


def features_of(images, model, args, device):
    """All features (N, D) of a data set, on every process; each process computes its share."""
    batches = data.eval_batches(
        images, args.img_size, args.in_chans, args.mean, args.std, args.batch_size,
        rank=utils.rank(), world_size=utils.world_size(), num_workers=args.num_workers,
    )  # fmt: skip
    return extract_features(model, batches, len(images), device, args.precision)[0]


def write_results(path, results, args, model):
    versions = {module.__name__: module.__version__ for module in (torch, torchvision, timm, numpy)}
    results |= {
        "settings": vars(args),
        "model": model.settings,
        "versions": versions | {"python": platform.python_version()},
    }
    path.write_text(json.dumps(results, indent=2) + "\n")


# ---- the classifier --------------------------------------------------------------------------------------------------


def knn_accuracy(train_features, train_labels, test_features, test_labels, ks=(20,), temperature=0.07):
    """Accuracy of `knn_classify`: {k: {"top1": percent, "top5": percent}}.

    Arguments as there; test_labels: (M,) integers. Local to the calling process: nothing is exchanged.
    A class without any vote is never a hit; DINO's script fills the five up with classes in arbitrary order.
    """
    predictions = knn_classify(train_features, train_labels, test_features, ks, temperature)
    test_labels = torch.as_tensor(test_labels).cpu()
    check_labels(test_labels, len(test_features), "test")
    accuracy = {}
    for k, ranked in predictions.items():
        hits = ranked == test_labels[:, None]  # (M, 5)
        accuracy[k] = {
            "top1": 100 * hits[:, 0].double().mean().item(),
            "top5": 100 * hits.any(dim=1).double().mean().item(),
        }
    return accuracy


@torch.no_grad()
def knn_classify(
    train_features,
    train_labels,
    test_features,
    k=(10, 20, 100, 200),
    temperature=0.07,
    num_classes=None,
    chunk_size=None,
):
    """Weighted vote of the k most similar training images, for one or several k:

        class of x = argmax_c  sum over the k nearest i with label c of exp(cos(x, x_i) / temperature)

    train_features: (N, D) float, on the device that computes.  test_features: (M, D), on any device. Both are
        normalised here; flattened pixels will do.
    train_labels: (N,) integers from 0.  num_classes: C, at least the largest label + 1, which is the default.
    chunk_size: b; by default as many as `MEMORY_MB` allow, beside one normalised copy of train_features. It changes the
        memory used, not the result.
    Returns {k: (M, 5) int64 on CPU}: classes by falling vote, -1 where fewer than five have one.
    Raises UserError for k outside [1, N], a temperature that is not positive, missing labels, or features that are not
    finite.
    Source: Wu et al. 2018 (arXiv 1805.01978), as in DINO, which takes at most 1000 classes in (b, k, C) arrays.
    """
    ks = [k] if isinstance(k, int) else list(k)
    train_labels = torch.as_tensor(train_labels).cpu()
    check_knn(ks, temperature, len(train_features))
    check_labels(train_labels, len(train_features), "training")
    check_finite(train_features, "training")
    check_finite(test_features, "test")
    num_classes = num_classes or int(train_labels.max()) + 1
    chunk_size = chunk_size or rows_in_memory(len(train_features), num_classes, max(ks))
    train = F.normalize(train_features.float(), dim=1)
    ranked = {k: [] for k in ks}
    for chunk in test_features.split(chunk_size):
        test = F.normalize(chunk.to(train).float(), dim=1)
        similarity, neighbours = (
            t.cpu() for t in (test @ train.T).topk(max(ks), dim=1)
        )  # (b, max k) each, nearest first
        # relative to the nearest: the same order of classes, and no overflow at a small temperature
        weights = ((similarity - similarity[:, :1]).double() / temperature).exp()
        labels = train_labels[neighbours].long()
        for k in ks:
            ranked[k].append(rank_classes(labels[:, :k], weights[:, :k], num_classes))
    return {k: torch.cat(parts) for k, parts in ranked.items()}


def rank_classes(labels, weights, num_classes):
    """Labels and weights (b, k) of the neighbours -> (b, 5) classes by falling vote, -1 for those without any."""
    votes = torch.zeros(len(labels), num_classes, dtype=weights.dtype).scatter_add_(1, labels, weights)  # (b, C)
    votes, classes = votes.topk(min(RANKED, num_classes), dim=1)
    classes[votes == 0] = -1
    return F.pad(classes, (0, RANKED - classes.shape[1]), value=-1)


def rows_in_memory(num_train, num_classes, k):
    """Test images whose similarities (4 N bytes), neighbours and votes (8 C bytes) fit in `MEMORY_MB`; at least 1."""
    bytes_per_row = 4 * num_train + 8 * num_classes + 48 * k
    return max(1, MEMORY_MB * 2**20 // bytes_per_row)


def check_knn(ks, temperature, num_train):
    wrong = [k for k in ks if not 1 <= k <= num_train]
    if wrong or not ks:
        raise UserError(
            f"--nb_knn {wrong[0] if wrong else ks}: expected from 1 to {num_train}, the number of training images"
        )
    if not temperature > 0:
        raise UserError(f"--temperature {temperature}: expected a positive number")


def check_labels(labels, num_images, which):
    if len(labels) != num_images:
        raise ValueError(f"{len(labels)} labels for {num_images} {which} images")
    if (labels < 0).any():
        raise UserError(
            f"{int((labels < 0).sum())} of {num_images} {which} images have no label; k-NN needs one for each"
        )


def check_finite(features, which):
    if not torch.isfinite(features).all():
        raise UserError(
            f"the {which} features hold NaN or infinity: did the model's training diverge? try --precision fp32"
        )


if __name__ == "__main__":
    main()
