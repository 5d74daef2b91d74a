"""What the training loop asks of a method, in two halves, so that any number of micro-batches make one exact step.

    rows = objective.embed(backbone, views, kept)        each image by itself: the backbone; one micro-batch at a time
    loss, terms = objective(rows of all, ...)            the joint batch: head, batch statistics, loss

No row of the first half depends on a second image, so the gradient of the backbone is the sum over micro-batches m of
(d rows_m / d weights)^T (d loss / d rows_m), for any loss: accumulation.py.

    B images of a micro-batch, M micro-batches of each of P processes: a step takes B M P images.  V views
"""

import itertools
import math
from dataclasses import dataclass

import torch
from torch import nn

from monitor import within_code_variance
from utils import UserError, all_gather_rows, all_reduce_mean

NUM_GLOBAL = 2  # global crops, as in DINO and the paper
WINDOW = (2**12, 2**20)  # codes in use are counted over the last K images, but at least and at most over so many


@dataclass(frozen=True)
class Course:
    """What an objective may know of the run that it is built for."""

    device: torch.device
    batch_size: int  # images per micro-batch
    accum_steps: int  # micro-batches of a process in a step
    steps_per_epoch: int
    total_steps: int


class Objective(nn.Module):
    """What the training loop knows of a method.

    `prepare` and `embed` see one micro-batch and change no state; `forward` sees the joint batch once and is the only
    place that changes buffers; parameters outside the optimizer move in `after_step`. The objective's trained
    parameters get their gradient in `forward` only, the backbone's through rows only. The backbone is an argument of
    the hooks, never an attribute: it would be saved twice.

    `head` is saved with the backbone, as a checkpoint's student; modules named in `entries` under their own names, such
    as `teacher`, with `backbone` and `head` in it; what is left, as `objective`.
    """

    entries = ()
    flags = {}  # {flag's name: its default under this objective}: the flags that it reads
    advice = {}  # what to change, in words, for each kind that `monitor.diagnose` may find

    @classmethod
    def from_args(cls, args, backbone, course):
        """The objective of a run. args: resolved flags.  backbone: on the CPU, not to be kept.  course: a Course."""
        raise NotImplementedError

    @classmethod
    def head_from_state_dict(cls, in_dim, state, settings):
        """A head of the sizes that a checkpoint's state dict tells, whose `assign` names one of `num_codes` codes; the
        weights are not loaded. None for objectives without codes and for what is no such head.

        in_dim: D.  settings: the checkpoint's flags."""
        return None

    @staticmethod
    def add_arguments(parser):
        """Adds a group with the flags of `flags` that no objective before it has added; their default is None."""

    def prepare(self, backbone, views, generator):
        """Once per micro-batch and step, without gradient: a teacher's features, samples, noisy images.

        views: V x (B, C, h, w), global crops first.  generator: for all that is drawn here; on the views' device.
        Returns a list of tensors of B rows, or of a multiple of B, handed to `embed` and, joined, to `forward`."""
        return []

    def embed(self, backbone, views, kept):
        """First half: float rows, a list whose first V are the features (B, D) of the views. With several
        micro-batches it is called twice with equal arguments, and must give equal rows."""
        return features_of_views(backbone, views)

    def forward(self, rows, kept, generator):
        """Second half: rows of all micro-batches of this process, each (M B, ...) -> loss, terms.

        generator: the same on all processes.  Returns (scalar, dict of scalars), in float32 or
        float64, outside autocast: such that averaged over processes, as DDP averages the gradients, they are loss and
        terms of the joint batch of all processes."""
        raise NotImplementedError

    def before_step(self, step, backbone):
        """Before global step `step`: schedules of the objective's own. Changes no parameter."""

    def before_update(self, step, backbone):
        """Gradients are there, unscaled and not yet clipped: some may be dropped (`.grad = None`)."""

    def clip_gradients(self, parameters, max_norm):
        """Clips in place; returns the global norm from before, on the device, without waiting for it."""
        return nn.utils.clip_grad_norm_(parameters, max_norm)

    def after_step(self, step, backbone):
        """After the optimizer's step: a teacher follows, prototypes get their length again."""

    def share_statistics(self):
        """Called on all processes before the first of them writes a checkpoint or reads `statistics`."""

    def statistics(self, features, averages):
        """Named numbers for a logged line, on the first process: floats, None, or tensors of one number, which the
        caller reads together. features: (N, D), the first view of this step's images; averages: {name: mean} of the
        loss and its terms since the last line."""
        return {}

    def describe(self):
        """Lines for the start of a run: what was derived from the flags."""
        return []

    def translate(self, run, state):
        """A training checkpoint that the method's authors' code wrote, to go on from -> the entries of one of ours.

        run: main_cplearn's, just built.  state: the file's content, its `path` in it."""
        raise UserError(
            f"{state['path']}: not a checkpoint of this program; evaluations read others, --resume does not, except "
            "DINO's under --objective dino"
        )


class CodesObjective(Objective):
    """An objective whose logits name a code (prototype, class) for each image; it remembers which are in use.

    Buffers about the last W images, whatever the epoch, W = K between the limits of `WINDOW`:
    usage   (K,)  mean prediction, weighted by exp(-age / W), age in images; of sharded codes those held here
    recent  (W,)  int32, the likeliest code of each of the last W images, a ring      seen: images so far
    """

    def __init__(self, num_codes):
        super().__init__()
        self.num_codes = num_codes
        self.window = min(max(num_codes, WINDOW[0]), WINDOW[1])
        self.register_buffer("usage", torch.zeros(num_codes))
        self.register_buffer("recent", torch.zeros(self.window, dtype=torch.int32))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.assignments = None  # (N,) likeliest codes of this step's images, first view, all processes

    @torch.no_grad()
    def remember(self, assignments, mean, first=0):
        """Take this step's images into the window; no wait for the device.

        assignments: (M B,) of this process's images, or (N,) of all processes'.  mean: mean prediction over all
        processes of the codes [first, first + len(mean))."""
        self.assignments = assignments
        held = slice(first, first + len(mean))
        self.usage[held].lerp_(mean.to(self.usage.dtype), 1 - math.exp(-len(assignments) / self.window))
        codes = assignments[-self.window :]
        places = (self.seen + torch.arange(len(codes), device=codes.device)) % self.window
        self.recent.scatter_(0, places, codes.to(torch.int32))
        self.seen += len(codes)

    @torch.no_grad()
    def remember_logits(self, logits):
        """`remember` for objectives whose logits (M B, K) of the first view are at hand, with their temperature."""
        self.remember(all_gather_rows(logits.argmax(dim=1)), all_reduce_mean(logits.softmax(dim=1).mean(dim=0)))

    @torch.no_grad()
    def statistics(self, features, averages):
        """codes_used      codes that were the likeliest of some image of the window; images_counted: how many it has
        perplexity      of the mean prediction over the window, in codes
        within_code     variance of features among images that share a code, over all variance (0: collapse in codes)
        """
        counted = torch.arange(self.window, device=self.seen.device) < self.seen
        used = torch.zeros(self.num_codes + 1, dtype=torch.bool, device=self.seen.device)
        used[torch.where(counted, self.recent.long(), self.num_codes)] = True
        return {
            "num_codes": self.num_codes,
            "codes_used": used[:-1].sum(),
            "images_counted": counted.sum(),
            "perplexity": torch.special.entr(self.usage / self.usage.sum()).sum().exp(),
            "within_code": within_code_variance(features, self.assignments),
        }


def features_of_views(backbone, views):
    """V x (B, C, h, w) -> V x (B, D). Crops of one size stand together; one pass per size, or one for all where the
    backbone says that it `joins_sizes`."""
    sizes = [list(group) for _, group in itertools.groupby(views, key=lambda view: view.shape[-2:])]
    images = [torch.cat(group) for group in sizes]
    passes = [images] if len(sizes) > 1 and getattr(backbone, "joins_sizes", False) else images
    return list(torch.cat([backbone(each) for each in passes]).split([len(view) for view in views]))


# ---- flags -----------------------------------------------------------------------------------------------------------


def add_objective_arguments(parser, objectives):
    """--objective, and the flags of all objectives {name: class}; what each default is under which of them is told by
    --help, and filled in by `resolve_objective`."""
    group = parser.add_argument_group("objective")
    group.add_argument("--objective", choices=list(objectives), default="cplearn", help="whose head and loss")
    for name, objective in objectives.items():
        objective.add_arguments(parser)
        own = ", ".join(f"--{flag}" for flag in objective.flags)
        group_of(parser, f"--objective {name}").description = f"reads {own}"
    for action in parser._actions:
        defaults = {name: objective.flags[action.dest] for name, objective in objectives.items()
                    if action.dest in objective.flags}  # fmt: skip
        if defaults:
            action.help += f" (default of {', '.join(f'{name}: {value}' for name, value in defaults.items())})"


def group_of(parser, title):
    found = [group for group in parser._action_groups if group.title == title]
    return found[0] if found else parser.add_argument_group(title)


def resolve_objective(args, objectives):
    """Fills in, in place, the flags of the chosen objective that are None. Raises UserError for another one's."""
    own = objectives[args.objective].flags
    for name in sorted({name for objective in objectives.values() for name in objective.flags}):
        value = getattr(args, name)
        if name in own and value is None:
            setattr(args, name, own[name])
        elif name not in own and value is not None:
            owners = " and ".join(other for other, objective in objectives.items() if name in objective.flags)
            raise UserError(f"--{name} {value}: --objective {args.objective} has no such flag; it belongs to {owners}")
    return args
