"""GPU hours of an experiment at a budget, on A100s: benchmarks.recipes' arithmetic for each row's own step. Never run.

    python -m benchmarks.gpu_hours experiments/table2.toml
    python -m benchmarks.gpu_hours experiments/table3.toml --gpus 8

A step of each row, its own objective, backbone, batch and image size, runs once on tensors without contents; the time
of its operations is recipes' (`Step.seconds`, REACHED). Evaluations are left out, and so is decoding: sets of small
images are in memory. Steps of small images are bound by the launch of their many operations, 5e-6 s each by assumption,
and so are less certain than numbers of ViTs at 224 px. How far off both may be, the paper's own times tell: Table 8 has
357 minutes for CPLearn (c = f) of table2.toml where 150 are computed, and Table 3 says about 48 GPU hours a run where
12 are.
"""

import argparse
import functools
from types import SimpleNamespace

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import data
import main_cplearn
from accumulation import FirstHalf, backward_of_joint_batch
from benchmarks.recipes import (
    A100,
    IMAGENET100,
    NETWORK,
    REACHED,
    Counter,
    count_augmentation,
    fused_attention,
    least_seconds,
    table,
)
from experiments import read_experiment, words_of
from images import ArrayImages
from objective import Course

IMAGES = {"svhn": 73_257, "cifar10": 50_000, "cifar100": 50_000, "fashion_mnist": 60_000, "imagefolder": IMAGENET100}
LATE = 100  # steps and epochs in which nothing is frozen any more
UNCOUNTED = ("epochs", "max_steps", "class_list", "beta")  # flags that change no operation


def get_parser():
    parser = argparse.ArgumentParser("benchmarks.gpu_hours", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("experiment", help="experiments/NAME.toml")
    add("--budget", default="paper")
    add("--gpus", type=int, default=1, help="processes of each training")
    return parser


def main(args):
    experiment = read_experiment(args.experiment, args.budget)
    rows = [
        hours_of(experiment, row, column, args.gpus) for column in experiment.columns() for row in experiment.rows()
    ]
    print(f"Computed, not run.\n\n{table(rows)}\n")
    least, middle, most = (sum(row[name] for row in rows) for name in ("least", "GPU hours", "most"))
    print(f"{middle:.0f} GPU hours in all ({least:.0f} to {most:.0f})")


def hours_of(experiment, row, column, gpus):
    flags = experiment.flags(row, column)
    steps_per_epoch = IMAGES[flags["dataset"]] // (flags["batch_size_per_gpu"] * gpus)
    steps = min(flags.get("epochs", 100) * steps_per_epoch, flags.get("max_steps", float("inf")))
    seeds = len(experiment.seeds(row))
    settled = {name: value for name, value in flags.items() if name not in UNCOUNTED}
    operations, parameters = count_step(tuple(words_of(settled)))
    moved = 2 * (gpus - 1) / gpus * 4 * parameters / NETWORK[1]
    seconds = [least_seconds(operations, A100) / share + moved for share in reversed(REACHED)]
    least, middle, most = (seeds * gpus * steps * s / 3600 for s in seconds)
    return {
        "column": column["name"],
        "row": row["name"],
        "seeds": seeds,
        "steps": steps,
        "ms": round(float(1e3 * seconds[1]), 1),
        "GPU hours": round(float(middle), 1),
        "least": round(float(least), 1),
        "most": round(float(most), 1),
    }


@functools.cache
def count_step(words):
    """(operations (n, 3), parameters) of a training step with these flags, augmentation and optimizer included."""
    args = main_cplearn.get_args_parser().parse_args([*words, "--precision", "bf16", "--num_workers", "0"])
    if args.objective == "cplearn":
        args.head_impl = "dense"  # what auto takes on a GPU, below fused_loss.MANY_ON_GPU logits
    data.resolve_dataset_defaults(args)
    batch, device = args.batch_size_per_gpu, torch.device("cpu")
    model = main_cplearn.build_model(args, Course(device, batch, 1, steps_per_epoch=1, total_steps=2 * LATE)).train()
    augmenting, views = augmented(args, batch)
    with fused_attention(), FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        optimizer = main_cplearn.build_optimizer(args, model)
        run = SimpleNamespace(
            args=args,
            device=device,
            model=model,
            first_half=FirstHalf(model.backbone, model.objective, "bf16"),
            second_half=model.objective,
            scaler=torch.amp.GradScaler("cpu", enabled=False),
            loader=SimpleNamespace(
                steps_per_epoch=1, augment=lambda batch=None, device=None: [torch.empty(view) for view in views]
            ),
            ahead=lambda make: make(),
            log=SimpleNamespace(first_step=0),
            watch=SimpleNamespace(step=0, progress=lambda step: None),
        )
        with Counter() as counter:
            model.objective.before_step(LATE, model.backbone)
            backward_of_joint_batch(run, [None], step=LATE)
            if args.clip_grad:
                torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
            optimizer.step()
            model.objective.after_step(LATE, model.backbone)
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return np.array(augmenting + counter.operations), parameters


def augmented(args, batch):
    """(operations, shapes of the two views) of a batch's augmentation on the GPU, really run on images of noise. Images
    of folders are cropped by the data workers, and counted as recipes has them, at 224 px."""
    shape = (batch, args.in_chans, args.img_size, args.img_size)
    if args.dataset == "imagefolder":
        return [tuple(operation) for operation in count_augmentation(0)[0] * batch], [shape] * 2
    images = ArrayImages("noise", torch.randint(256, shape, dtype=torch.uint8))
    loader = data.TrainLoader(images, args, batch)
    with Counter() as counter:
        views = loader.augment(next(iter(loader.epoch(0))), torch.device("cpu"))
    return counter.operations, [tuple(view.shape) for view in views]


if __name__ == "__main__":
    main(get_parser().parse_args())
