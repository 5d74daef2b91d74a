"""Self-Classifier: labels and representation in one step, by a cross-entropy that asserts a uniform prior over classes.

Amrani, Karlinsky, Bronstein, "Self-Supervised Classification Network", ECCV 2022 (arXiv 2103.10994).

    n images of this process, N of all, V views of each, the first G are global crops
    D backbone width, P embedding width, K classes
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

from baselines.joint import check_views, joint_logsumexp, joint_mean, num_joint_rows
from baselines.projector import Projector
from cplearn_head import CPLearn, CPLearnHead
from objective import CodesObjective
from utils import UserError, positive

NUM_GLOBAL = 2
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


class SelfClassifierHead(nn.Module):
    """The published head: D-H-P with LeakyReLU to unit length, then the cosine with each of K classes times its gain.

    One batch norm over all views of a step. Weights from a normal of std .02, truncated at 2; biases 0; gains 1, which
    are trained, and decayed.
    `classifier.weight_g` (K, 1) and `classifier.weight_v` (K, P) are torch's names in a weight norm. Runs in the
    parameters' dtype, outside autocast."""

    def __init__(self, in_dim, out_dim=1000, proj_dim=128, hidden_dim=4096):
        super().__init__()
        self.projector = Projector([in_dim, hidden_dim, proj_dim], norm="all", activation=nn.LeakyReLU)
        self.classifier = nn.Module()
        self.classifier.weight_g = nn.Parameter(torch.ones(out_dim, 1))
        self.classifier.weight_v = nn.Parameter(torch.empty(out_dim, proj_dim))
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim == 2 and parameter is not self.classifier.weight_g:
                nn.init.trunc_normal_(parameter, std=0.02, a=-2.0, b=2.0)

    @property
    def num_codes(self):
        return len(self.classifier.weight_v)

    def forward(self, views):
        """V x (n, D) -> scores, V x (n, K)."""
        with torch.autocast(views[0].device.type, enabled=False):
            classes = F.normalize(self.classifier.weight_v, dim=1) * self.classifier.weight_g
            return [F.normalize(z, dim=1) @ classes.T for z in self.projector(views)]

    @torch.no_grad()
    def assign(self, x):
        """Backbone features (n, D) -> the class of each (n,) int64, by batch norm's running statistics."""
        was_training = self.training
        codes = self.eval()([x])[0].argmax(dim=1)
        self.train(was_training)
        return codes

    @classmethod
    def from_state_dict(cls, in_dim, state):
        """A head of the sizes that a state dict tells; the weights are not loaded."""
        names = ("classifier.weight_v", "projector.mlp.3.weight", "projector.mlp.0.weight")
        return cls(in_dim, *(len(state[name]) for name in names))

    def __str__(self):
        return f"{self.projector}, l2; {self.num_codes} classes with trained gains"


class SelfClassifier(CodesObjective):
    """Self-Classifier as the training loop's objective, on its published head or on CPLearn's with frozen codes.

    head: a SelfClassifierHead; or a CPLearnHead, whose logits times `CODES_SCALE` are the scores."""

    flags = {
        "head": "mlp",
        "out_dim": 1000,
        "proj_dim": None,
        "hidden_dim": 4096,
        "row_temp": 0.1,
        "col_temp": 0.05,
        "activation": "l2",
        "dictionary": "rademacher",
        "codes_storage": "int8",
    }
    unused = {"mlp": ("activation", "dictionary", "codes_storage"), "frozen_codes": ("hidden_dim",)}
    advice = {
        "saddle": "predictions are uniform: lower --col_temp or --row_temp, or raise --lr",
        "representation": "all images get one feature: lower --lr or --col_temp",
        "dimensional": "features span few directions: raise --out_dim or --proj_dim, or train longer",
        "cluster": "few classes are used: raise --row_temp, or use more images per step",
        "intracluster": "images that share a class are alike: raise --out_dim",
    }

    def __init__(self, head, row_temp=0.1, col_temp=0.05, num_global=NUM_GLOBAL):
        super().__init__(head.num_codes)
        self.head, self.row_temp, self.col_temp, self.num_global = head, row_temp, col_temp, num_global
        self.frozen_codes = isinstance(head, CPLearnHead)

    @classmethod
    def from_args(cls, args, backbone, course):
        for name in cls.unused[args.head]:
            if getattr(args, name) != cls.flags[name]:
                raise UserError(f"--{name} {getattr(args, name)}: --head {args.head} has no such flag; leave it out")
        build = build_head if args.head == "mlp" else build_frozen_codes
        return cls(build(args, backbone.embed_dim, course), args.row_temp, args.col_temp)

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

    def forward(self, rows, kept=(), generator=None):
        scores = self._scores(rows)
        with torch.autocast(rows[0].device.type, enabled=False):
            loss, terms = self_classifier_loss(scores, self.row_temp, self.col_temp, num_global=self.num_global)
        self.remember_logits(scores[0] / self.row_temp)
        return loss, terms

    def _scores(self, rows):
        if self.frozen_codes:
            return [self.head.logits(self.head(x)) * CODES_SCALE for x in rows]
        return self.head(rows)

    def statistics(self, features, averages):
        """entropy_share   entropy of a prediction over log K: 1 where it is uniform
        gap_share       loss over log K: 1 in the trivial states
        """
        log_k = math.log(self.num_codes)
        return super().statistics(features, averages) | {
            "entropy_share": averages["entropy"] / log_k,
            "gap_share": averages["loss"] / log_k,
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
        return [
            head,
            f"loss: Self-Classifier, row_temp {self.row_temp:g}, col_temp {self.col_temp:g}, over the joint batch; "
            f"log K = {math.log(self.num_codes):.4f} nats in the trivial states",
            "note: one classifier; its authors' recipe has four (1000 to 8000 classes), their losses averaged, and "
            "replaces view 0 by its nearest neighbour among 262,144 past images: not here",
        ]


def build_head(args, in_dim, course):
    return SelfClassifierHead(in_dim, args.out_dim, args.proj_dim or 128, args.hidden_dim)


def build_frozen_codes(args, in_dim, course):
    return CPLearnHead(
        in_dim,
        args.out_dim,
        args.proj_dim,
        args.activation,
        course.batch_size,
        args.seed,
        args.dictionary,
        args.codes_storage,
    )
