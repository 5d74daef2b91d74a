"""A classifier that learns from images, epoch by epoch: what is kept after each, how it goes on, how it is tested.

    loader = crop_loader(evaluated, train_images)
    run = SomeRun(evaluated, folder, ...)       # a ClassifierRun: .settings are what must be the same to go on
    run.resume()                                # where the folder's run was, if there is one
    ranked = run.train(loader, labels, images, train_one_epoch)     # each epoch is printed, logged and kept
    ranked, loss = score_images(evaluated, classify, num_labels, images)

Shapes: N images, b of a batch.
"""

import json
import reprlib
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

import checkpoint
import data
import utils
from augmentation import make_crop_recipe
from evaluation import RANKED, fingerprint
from evaluation.linear_probe import rank_classes, scores
from running.files import write_whole
from utils import UserError


class ClassifierRun:
    """.epoch (those done), .log (a dict for each of them), .settings, and .folder, where they are kept, or None.

    A subclass names the files, KEPT and LOG, and has .optimizer, score(images), state_dict() and load_state(kept)."""

    def __init__(self, evaluated, folder, names, num_labels, images):
        """names: of the flags that must be the same to go on.  images: fingerprint of the training images."""
        self.args, self.evaluated, self.folder = evaluated.args, evaluated, folder
        self.epoch, self.log = 0, []
        self.images_per_step = self.args.batch_size * utils.world_size()
        self.settings = {name: getattr(self.args, name) for name in names} | {
            "images per step": self.images_per_step, "num_labels": num_labels, "images": images,
            "backbone": fingerprint(evaluated.model),
        }  # fmt: skip

    def lr(self):
        return self.optimizer.param_groups[0]["lr"]

    def is_tested(self):
        """Whether the epoch that is about to be finished is one of those that --val_freq asks for."""
        return (self.epoch + 1) % self.args.val_freq == 0

    def train(self, loader, labels, images, train_one_epoch):
        """The epochs that are left. train_one_epoch(run, loader, labels): what the log says of an epoch, a dict.
        Returns the ranked classes of `images` after the last one."""
        ranked = None
        with loader:
            while self.epoch < self.args.epochs:
                line = {"epoch": self.epoch} | train_one_epoch(self, loader, labels)
                if self.is_tested() or self.epoch == self.args.epochs - 1:
                    ranked, loss = self.score(images)
                    line |= log_scores(ranked, loss, images)
                self.finish_epoch(line)
        return self.score(images)[0] if ranked is None else ranked  # None: nothing was left to train

    def best(self):
        """Highest top-1 of any epoch, in percent: a choice by the test images."""
        return max((float(line["test_acc1"]) for line in self.log if "test_acc1" in line), default=None)

    def finish_epoch(self, line):
        self.epoch += 1
        self.log.append(line)
        if utils.rank() != 0:
            return
        tested = f"  test top-1 {line['test_acc1']:6.2f} %" if "test_acc1" in line else ""
        print(f"epoch {self.epoch:3d}/{self.args.epochs}  loss {line['train_loss']:.4f}{tested}", flush=True)
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            checkpoint.save_checkpoint(self.state_dict(), self.folder / self.KEPT, alone=False)
            write_whole(self.folder / self.LOG, "".join(json.dumps(line) + "\n" for line in self.log))

    def resume(self):
        """Go on where the folder's run was, if there is one. Raises UserError where it is of other settings."""
        if self.folder is None or not (self.folder / self.KEPT).exists():
            return
        path = self.folder / self.KEPT
        kept = checkpoint.load_checkpoint(path)
        try:
            self.check_same_run(kept, path)
            if type(kept["epoch"]) is not int or not 0 <= kept["epoch"] <= self.args.epochs:
                raise ValueError(f"its epoch is {reprlib.repr(kept['epoch'])} of {self.args.epochs}")
            self.load_state(kept, path)
            self.epoch, self.log = kept["epoch"], [dict(line) for line in kept.get("log", [])]
            json.dumps([self.log, self.best()])  # as they will be written
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(f"{path}: cannot be gone on from: {type(error).__name__} {error}") from None
        if utils.rank() == 0:
            print(f"{path}: {self.epoch} of {self.args.epochs} epochs are done", flush=True)

    def check_same_run(self, kept, path):
        for name, value in kept.get("settings", {}).items():
            if self.settings.get(name) != value:
                raise UserError(
                    f"{path}: trained with {name} {reprlib.repr(value)}, this run has {self.settings.get(name)}: take "
                    "the same settings, or another --output_dir"
                )


def folder_of(evaluated, models):
    """--output_dir, or with several models a folder in it for each; None without."""
    output_dir = evaluated.args.output_dir
    own = evaluated.stem if len(models) > 1 else ""
    return None if output_dir is None else Path(output_dir) / own


def crop_loader(evaluated, images):
    """This process's share of new crops of the images in every epoch; bad images are replaced and counted."""
    args, device = evaluated.args, evaluated.device
    recipe = make_crop_recipe(args)
    return data.TrainLoader(images, args, args.batch_size, utils.rank(), utils.world_size(), recipe, device)


def mean_loss(loader, total):
    """The mean loss of an epoch's images over all processes, in nats; total: summed over this process's steps. Raises
    UserError where too many of the images were bad."""
    num_bad = torch.tensor(loader.num_bad_images)
    dist.all_reduce(num_bad)
    loader.check_bad_images(int(num_bad))
    return float(utils.all_reduce_mean(total / loader.steps_per_epoch))


@torch.no_grad()
def score_images(evaluated, classify, num_labels, images):
    """Every image once, over all processes. classify: images (b, C, h, w) on the device -> logits (b, num_labels).
    Returns ranked classes (N, min(5, C)) int64 and the mean loss in nats."""
    labels = torch.as_tensor(images.labels)
    ranked = torch.zeros(len(images), min(RANKED, num_labels), dtype=torch.int64)
    total = torch.zeros((), dtype=torch.float64)
    for indices, x in evaluated.batches(images, rank=utils.rank(), world_size=utils.world_size()):
        logits = classify(x).float().cpu()
        ranked[indices] = rank_classes(logits)
        total += F.cross_entropy(logits, labels[indices], reduction="sum")
    dist.all_reduce(ranked)  # each image is one process's, and zero on the others
    dist.all_reduce(total)
    return ranked, float(total) / len(images)


def log_scores(ranked, loss, images):
    found = scores(ranked, images.labels, len(images.classes))
    return {"test_loss": loss, "test_acc1": found["top1"], "test_acc5": found["top5"]}
