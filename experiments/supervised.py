"""The supervised upper line of a comparison: main_cplearn.py's run, with labels in the place of the objective.

    python -m experiments.supervised --arch resnet8 --dataset cifar10 --output_dir runs/supervised

Loader, order, crops, schedules, optimizer, log, checkpoint and resuming are main_cplearn.py's own, with its flags: a
run sees the crops that a self-supervised run of the same seed sees, and starts from the same backbone. A linear
classifier of the features learns the labels by cross-entropy, on all views of each image, and is left out of what
evaluations read of the checkpoint: the frozen backbone.

    B images of a micro-batch, M micro-batches of this process, V views of each image, D features, C classes
"""

import contextlib
import io
import sys
from pathlib import Path

if not __package__:  # python experiments/supervised.py
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from torch import nn

import main_cplearn
from data import Plan
from images import open_dataset
from objective import Objective
from pretrained import OBJECTIVES
from utils import UserError, command_line, rank, world_size

NAME = "supervised"


@command_line
def main(argv=None):
    OBJECTIVES[NAME] = Supervised  # in this process alone: main_cplearn.py itself trains without labels
    args = get_args_parser().parse_args(argv)
    check_arguments(args)
    main_cplearn.train(args)


def get_args_parser():
    parser = main_cplearn.get_args_parser(OBJECTIVES | {NAME: Supervised})
    parser.prog = "experiments/supervised.py"
    parser.description = "Train a backbone with a linear classifier on labels, as main_cplearn.py trains without."
    parser.set_defaults(objective=NAME, max_bad_images=0.0)
    return parser


def check_arguments(args):
    if args.objective != NAME:
        raise UserError(f"--objective {args.objective}: this script trains on labels; use main_cplearn.py")
    if args.max_bad_images > 0:
        raise UserError(
            f"--max_bad_images {args.max_bad_images:g}: expected 0, since another image takes a bad one's place, under "
            "the bad one's label"
        )


class Supervised(Objective):
    """Cross-entropy of a linear classifier.

    The loader carries no labels, and need not: which images a step takes is a function of the step, data.Plan.

    The classifier is no `head`: a checkpoint's head would name codes."""

    def __init__(self, classifier, labels, plan):
        """classifier: D -> C.  labels: int64 (N,) of the training images.  plan: the loader's."""
        super().__init__()
        self.classifier, self.labels, self.plan = classifier, labels, plan
        self.coming = None  # (epoch, indices) of the next micro-batches

    @classmethod
    def from_args(cls, args, backbone, course):
        labels, classes, draws = read_labels(args)
        plan = Plan(args.seed, draws, course.batch_size, course.accum_steps, rank(), world_size())
        return cls(nn.Linear(backbone.embed_dim, len(classes)), labels, plan)

    def before_step(self, step, backbone):
        if self.coming is None:  # the steps of a process follow one another
            self.coming = self.plan.micro_batches(step * self.plan.accum_steps, sys.maxsize)

    def prepare(self, backbone, views, generator):
        """Labels (B,) of the micro-batch."""
        _, keys = next(self.coming)
        return [self.labels[torch.from_numpy(keys % len(self.labels))].to(views[0].device)]

    def forward(self, rows, kept, generator):
        """V features (M B, D), and labels (M B,) -> cross-entropy in nats, top-1 in percent; means over all views."""
        targets = kept[0].repeat(len(rows))
        logits = self.classifier(torch.cat(rows))  # (V M B, C)
        top1 = 100 * (logits.argmax(dim=1) == targets).float().mean()
        return nn.functional.cross_entropy(logits, targets), {"top1": top1}

    def describe(self):
        return [
            f"labels: cross-entropy of a linear classifier, {self.classifier.in_features} features, "
            f"{self.classifier.out_features} classes, on all views; evaluations read the backbone alone"
        ]


def read_labels(args):
    """Of the training images the labels int64 (N,), the names of the classes, and how many an epoch draws of each root.
    Raises UserError where there are no labels."""
    with contextlib.redirect_stderr(io.StringIO()):  # the run has said which images they are
        images = open_dataset(args, "train")
    if images.labels is None:
        raise UserError(f"the images in {args.data_path} have no labels; expected class folders, see --data_path")
    return torch.as_tensor(images.labels), images.classes, images.draws


if __name__ == "__main__":
    main()
