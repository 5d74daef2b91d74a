"""Self-Classifier: labels and representation in one step, by a cross-entropy that asserts a uniform prior over classes.

Amrani, Karlinsky, Bronstein, "Self-Supervised Classification Network", ECCV 2022 (arXiv 2103.10994).

    n images of this process, N of all, V views of each, the first G are global crops
    D backbone width, P embedding width, K classes, L rows of the queue
"""

import math
import re

import torch
from torch import nn
from torch.nn import functional as F

from baselines.joint import check_views, joint_logsumexp, joint_mean, num_joint_rows
from baselines.projector import Projector
from cplearn_head import CPLearn, CPLearnHead
from objective import NUM_GLOBAL, CodesObjective
from utils import Number, UserError, all_gather_rows, not_negative, positive, world_size

HEADS = ("mlp", "frozen_codes")
CODES_SCALE = 0.1  # scores of CPLearn's head are 0.1 of its logits: softmax(scores / 0.1) is CPLearn's p


def self_classifier_loss(scores, row_temp=0.1, col_temp=0.05, eps=1e-12, num_global=2):
    """Self-Classifier's loss, symmetric over views:

        target_i = softmax over the N images of s_i / col_temp, then each row divided by its sum over classes
        pred_j   = softmax over the K classes of s_j / row_temp, then each column times N / K / its sum over images
        loss     = mean over ordered pairs (i, j), i != j, not both local, of
                   -mean over images of sum_k target_i log(pred_j + eps)

    Gradients flow through both sides. Sums that divide are at least eps. Images that are all alike, and predictions
    that are uniform, have loss log K.

    scores: list of V tensors (n, K), global crops first.
    Returns (loss, {"entropy", "target_entropy"}), in nats, without gradient: mean over images and global views of the
        entropy of softmax(s / row_temp) and of the targets.
    Raises ValueError for shapes that do not fit.
    Source: Eqs. 2 to 6 of arXiv 2103.10994 and the authors' code, whose eps this is in training.
    """
    check_views(scores, num_global)
    views = torch.stack(scores)  # (V, n, K)
    probs = F.softmax(views / row_temp, dim=-1)
    targets = softmax_over_images(views / col_temp, eps)
    log_preds = (balanced_over_images(probs, eps) + eps).log()
    pairs = [(i, j) for i in range(len(views)) for j in range(len(views)) if i != j and min(i, j) < num_global]
    loss = sum(-(targets[i] * log_preds[j]).sum(dim=1).mean() for i, j in pairs) / len(pairs)
    entropy, target_entropy = (torch.special.entr(p[:num_global].detach()).sum(-1).mean() for p in (probs, targets))
    return loss, {"entropy": entropy, "target_entropy": target_entropy}


def softmax_over_images(logits, eps):
    """(V, n, K) -> each class's softmax over the joint batch, rows divided by their sum."""
    of_class = (logits - joint_logsumexp(logits)).exp()
    return of_class / of_class.sum(dim=-1, keepdim=True).clamp_min(eps)


def balanced_over_images(probs, eps):
    """(V, n, K) -> each class's column divided by its sum over the joint batch, times N / K."""
    num_images = num_joint_rows(probs)
    column_sums = joint_mean(probs) * num_images
    return probs / column_sums.clamp_min(eps) * (num_images / probs.shape[-1])


@torch.no_grad()
def nearest_neighbours(z, queue):
    """Rows z (n, P) and a queue (L, P), of unit length -> each row's nearest of the queue (n, P), its cosine (n,)."""
    parts = [(part @ queue.T).max(dim=1) for part in z.split(256)]  # L cosines of 256 rows at once
    cosines, places = (torch.cat(of_parts) for of_parts in zip(*parts, strict=True))
    return queue[places], cosines


class SelfClassifierHead(nn.Module):
    """The published head: D-H-P with LeakyReLU to unit length, then classifiers: `classifier`, whose K classes are the
    codes, and `more_classifiers` beside it.

    One batch norm over all views of a step. Weights from a normal of std .02, truncated at 2; biases 0. Runs in the
    parameters' dtype, outside autocast."""

    def __init__(self, in_dim, out_dim=1000, proj_dim=128, hidden_dim=4096, more_classes=()):
        super().__init__()
        self.projector = Projector([in_dim, hidden_dim, proj_dim], norm="all", activation=nn.LeakyReLU)
        self.classifier = Classifier(proj_dim, out_dim)
        self.more_classifiers = nn.ModuleList(Classifier(proj_dim, num_classes) for num_classes in more_classes)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim == 2 and not name.endswith("weight_g"):
                nn.init.trunc_normal_(parameter, std=0.02, a=-2.0, b=2.0)

    @property
    def num_codes(self):
        return len(self.classifier.weight_v)

    @property
    def more_classes(self):
        return [len(classifier.weight_v) for classifier in self.more_classifiers]

    def forward(self, views):
        """V x (n, D) -> embeddings, V x (n, P) of unit length."""
        with torch.autocast(views[0].device.type, enabled=False):
            return [F.normalize(z, dim=1) for z in self.projector(views)]

    def scores(self, views):
        """Embeddings V x (n, P) -> of each classifier V x (n, K), `classifier`'s first."""
        return [classifier(views) for classifier in (self.classifier, *self.more_classifiers)]

    @torch.no_grad()
    def assign(self, x):
        """Backbone features (n, D) -> the class of each (n,) int64, by batch norm's running statistics."""
        was_training = self.training
        codes = self.classifier(self.eval()([x]))[0].argmax(dim=1)
        self.train(was_training)
        return codes

    @classmethod
    def from_state_dict(cls, in_dim, state):
        """A head of the sizes that a state dict tells; the weights are not loaded."""
        names = ("classifier.weight_v", "projector.mlp.3.weight", "projector.mlp.0.weight")
        more = [len(v) for name, v in state.items() if re.fullmatch(r"more_classifiers\.\d+\.weight_v", name)]
        return cls(in_dim, *(len(state[name]) for name in names), more)

    def __str__(self):
        more = "".join(f", and {num_classes} beside them" for num_classes in self.more_classes)
        return f"{self.projector}, l2; {self.num_codes} classes, the codes{more}; with trained gains"


class Classifier(nn.Module):
    """The cosine with each of K classes times the class's gain; gains begin at 1, are trained, and decayed.

    `weight_g` (K, 1) and `weight_v` (K, P) are torch's names in a weight norm."""

    def __init__(self, proj_dim, num_classes):
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(num_classes, 1))
        self.weight_v = nn.Parameter(torch.empty(num_classes, proj_dim))

    def forward(self, views):
        """V x (n, P) of unit length -> V x (n, K)."""
        with torch.autocast(views[0].device.type, enabled=False):
            classes = F.normalize(self.weight_v, dim=1) * self.weight_g
            return [z @ classes.T for z in views]


class SelfClassifier(CodesObjective):
    """Self-Classifier as the training loop's objective, on its published head or on CPLearn's with frozen codes.

    head: a SelfClassifierHead; or a CPLearnHead, whose logits times `CODES_SCALE` are the scores.
    nn_queue: L; 0: none. With a SelfClassifierHead only:
    queue   (L, P)  embeddings of view 0 of the latest images of all processes, newest first; the same on all processes
    queued  how many images there have been: from L on, view 0's embedding is replaced by its nearest of the queue
    """

    flags = {
        "head": "mlp",
        "out_dim": 1000,
        "proj_dim": None,
        "hidden_dim": 4096,
        "row_temp": 0.1,
        "col_temp": 0.05,
        "more_classes": None,
        "nn_queue": 0,
        "activation": "l2",
        "dictionary": "rademacher",
        "codes_storage": "int8",
    }
    unused = {
        "mlp": ("activation", "dictionary", "codes_storage"),
        "frozen_codes": ("hidden_dim", "more_classes", "nn_queue"),
    }
    advice = {
        "saddle": "predictions are uniform: lower --col_temp or --row_temp, or raise --lr",
        "representation": "all images get one feature: lower --lr or --col_temp",
        "dimensional": "features span few directions: raise --out_dim or --proj_dim, or train longer",
        "cluster": "few classes are used: raise --row_temp, or use more images per step",
        "intracluster": "images that share a class are alike: raise --out_dim",
    }

    def __init__(self, head, row_temp=0.1, col_temp=0.05, nn_queue=0, num_global=NUM_GLOBAL):
        super().__init__(head.num_codes)
        self.head, self.row_temp, self.col_temp, self.num_global = head, row_temp, col_temp, num_global
        self.frozen_codes = isinstance(head, CPLearnHead)
        sizes = [head.num_codes] if self.frozen_codes else [head.num_codes, *head.more_classes]
        self.trivial_loss = sum(map(math.log, sizes)) / len(sizes)  # nats
        self.nn_queue = nn_queue
        if nn_queue:
            self.register_buffer("queue", torch.zeros(nn_queue, head.classifier.weight_v.shape[1]))
            self.register_buffer("queued", torch.zeros((), dtype=torch.int64))

    @classmethod
    def from_args(cls, args, backbone, course):
        for name in cls.unused[args.head]:
            if getattr(args, name) != cls.flags[name]:
                raise UserError(f"--{name} {getattr(args, name)}: --head {args.head} has no such flag; leave it out")
        images = course.steps_per_epoch * course.batch_size * course.accum_steps * world_size()
        if args.nn_queue > images:
            raise UserError(
                f"--nn_queue {args.nn_queue}: an epoch has {images} images, so that most would find their own past as "
                f"their neighbour; expected at most {images}, better a fifth of them"
            )
        build = build_head if args.head == "mlp" else CPLearnHead.from_args
        return cls(build(args, backbone.embed_dim, course), args.row_temp, args.col_temp, args.nn_queue)

    @classmethod
    def head_from_state_dict(cls, in_dim, state, settings):
        if "classifier.weight_v" in state:
            return SelfClassifierHead.from_state_dict(in_dim, state)
        return CPLearn.head_from_state_dict(in_dim, state, settings)

    @staticmethod
    def add_arguments(parser):
        add = parser.add_argument_group("--objective self_classifier").add_argument
        add(
            "--head",
            choices=HEADS,
            help="mlp: as published, --proj_dim 128 unless given; frozen_codes: CPLearn's, with its flags",
        )
        add("--row_temp", type=positive(float), help="of the predictions, softmax over classes")
        add("--col_temp", type=positive(float), help="of the targets, softmax over images; lower: harder targets")
        add(
            "--more_classes",
            type=Number(int, least=2, below=10**8),  # as --out_dim
            nargs="+",
            metavar="K",
            help="classifiers beside that of --out_dim, their losses averaged; published: 2000 4000 8000",
        )
        add(
            "--nn_queue",
            type=not_negative(int),
            metavar="L",
            help="view 0 becomes its nearest neighbour among so many past images, once there are as many; 0: not. "
            "Published: 262144, a fifth of ImageNet",
        )

    def forward(self, rows, kept=(), generator=None):
        temperatures = self.row_temp, self.col_temp
        with torch.autocast(rows[0].device.type, enabled=False):
            scores, own, found = self._scores(rows)
            results = [self_classifier_loss(views, *temperatures, num_global=self.num_global) for views in scores]
        self.remember_logits(own / self.row_temp)
        return sum(loss for loss, _ in results) / len(results), results[0][1] | found

    def _scores(self, rows):
        """Of each classifier V x (n, K); the first one's of view 0 itself (n, K), for its codes; terms of the queue."""
        if self.frozen_codes:
            scores = [self.head.logits(self.head(x)) * CODES_SCALE for x in rows]
            return [scores], scores[0], {}
        first, *others = self.head(rows)
        replaced, found = self._neighbours_of(first) if self.nn_queue else (first, {})
        with torch.no_grad():
            (own,) = self.head.classifier([first])
        return self.head.scores([replaced, *others]), own, found

    def _neighbours_of(self, z):
        """z (n, P) of view 0 -> its nearest of the queue, without gradient; z as it is before the queue is full."""
        nearest, cosines = nearest_neighbours(z, self.queue)
        replaced = torch.where(self.queued < self.nn_queue, z, nearest)
        new = all_gather_rows(z)
        self.queue.copy_(torch.cat([new, self.queue])[: self.nn_queue])
        self.queued += len(new)
        return replaced, {"neighbour_cosine": cosines.mean()}

    def statistics(self, features, averages):
        """entropy_share   entropy of a prediction of the first classifier over log K: 1 where it is uniform
        gap_share       loss over log K, the mean over classifiers: 1 in the trivial states
        queued          images in the queue: neighbours count once they are L; None without one
        Beside the term neighbour_cosine, of view 0 and its nearest of the queue: near 1 where it is its own past.
        """
        return super().statistics(features, averages) | {
            "entropy_share": averages["entropy"] / math.log(self.num_codes),
            "gap_share": averages["loss"] / self.trivial_loss,
            "queued": self.queued.clamp(max=self.nn_queue) if self.nn_queue else None,
        }

    def describe(self):
        head = f"head: {self.head}"
        if self.frozen_codes:
            dictionary = self.head.dictionary
            head = (
                f"head: CPLearn's, F {dictionary.shape[0]}, K {self.num_codes}, {self.head.activation}, "
                f"{dictionary.kind} codes; scores are {CODES_SCALE:g} x its logits, so that at --row_temp 0.1 softmax "
                "over classes is CPLearn's p"
            )
        recipe = (
            "its authors' recipe has four classifiers (--more_classes 2000 4000 8000) and replaces view 0 by its "
            "nearest neighbour among 262,144 past images (--nn_queue)"
        )
        if self.nn_queue:
            recipe = (
                f"view 0 is replaced by its nearest neighbour among {self.nn_queue} past images, once there are so "
                "many; its authors leave out the image's own past, here it may be that neighbour"
            )
        return [
            head,
            f"loss: Self-Classifier, row_temp {self.row_temp:g}, col_temp {self.col_temp:g}, over the joint batch, "
            f"mean over classifiers; log K = {self.trivial_loss:.4f} nats in the trivial states",
            f"note: {recipe}",
        ]


def build_head(args, in_dim, course):
    return SelfClassifierHead(in_dim, args.out_dim, args.proj_dim or 128, args.hidden_dim, args.more_classes or ())
