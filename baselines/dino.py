"""DINO: a student predicts what a teacher, a moving average of it, says of another crop; targets centred and sharpened.

Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", ICCV 2021 (arXiv 2104.14294). Flags, their
defaults, names of tensors and files are its authors' (dino_files.py: their training checkpoints).

    B images per process, V views of each, the first G are global crops     D backbone width, P bottleneck, K prototypes
"""

import copy
import math
import re

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from baselines import dino_files
from baselines.joint import joint_mean, ordered_pairs
from batch_norm import SyncBatchNorm
from objective import CodesObjective, features_of_views
from utils import Number, boolean, cosine_schedule, not_negative, positive

STUDENT_TEMP, CENTER_MOMENTUM = 0.1, 0.9  # of the paper, as in its code no flags
LAST_LAYER = ("last_layer.weight_g", "last_layer.weight_v")


def dino_loss(student, teacher, center, student_temp=0.1, teacher_temp=0.04):
    """DINO's loss, the mean over pairs of a teacher's global view and another view of the student's:

        t_a  = softmax((teacher_a - center) / teacher_temp)                              (B, K), without gradient
        loss = mean over pairs (a, v), a < G, v != a of CE(t_a, softmax(student_v / student_temp))
        CE(t, s) = -mean_i sum_k t[i,k] log s[i,k]

    student: list of V tensors (B, K), global views first.  teacher: list of G tensors (B, K).  center: (1, K).
    Returns (loss, {"entropy"}): scalars in nats; entropy is the mean of H(t_a) over images and a, the part of the loss
        that is not disagreement: near log K the targets are uniform, near 0 they are one prototype each.
    Source: equations 1 to 3 of arXiv 2104.14294.
    """
    targets = [((scores.detach() - center) / teacher_temp).softmax(dim=1) for scores in teacher]
    log_probs = [F.log_softmax(scores / student_temp, dim=1) for scores in student]
    pairs = ordered_pairs(len(log_probs), len(targets))
    loss = sum(-(targets[a] * log_probs[v]).sum(dim=1).mean() for a, v in pairs) / len(pairs)
    entropy = sum(torch.special.entr(target).sum(dim=1).mean() for target in targets) / len(targets)
    return loss, {"entropy": entropy}


def next_center(center, teacher, momentum=0.9):
    """center (1, K) moved towards the mean of the teacher's raw scores, a list of G tensors (B, K) -> (1, K).

    Equation 4 of arXiv 2104.14294."""
    return center * momentum + torch.cat(teacher).mean(dim=0, keepdim=True) * (1 - momentum)


class Prototypes(nn.Module):
    """K prototypes of length g in the directions v: rows g v / ||v||, (K, P).

    torch.nn.utils.weight_norm under its names; what that function makes cannot be copied (torch 2.14)."""

    def __init__(self, dim, num_prototypes):
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(num_prototypes, 1))
        self.weight_v = nn.Parameter(nn.Linear(dim, num_prototypes, bias=False).weight.detach())  # drawn as torch does

    def forward(self):
        return F.normalize(self.weight_v, dim=1) * self.weight_g


class DINOHead(nn.Module):
    """DINO's projection head: (B, D) -> linear layers with GELU between -> unit length -> scores (B, K), the product
    with each of K prototypes.

    widths: of the linear layers; the last one is the bottleneck P.  norm_last_layer: prototypes keep length 1.
    use_bn: batch norm, synchronised, between the linear layers. Parameters are float32 and all is computed in it.
    Weights are drawn from a normal of deviation 0.02, cut at +-2, biases are 0; prototypes as torch draws a layer's.
    """

    def __init__(self, in_dim, out_dim=65536, widths=(2048, 2048, 256), norm_last_layer=True, use_bn=False):
        super().__init__()
        layers = []
        for width in widths:
            linear = nn.Linear(in_dim, width)
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
            layers += [linear, *([SyncBatchNorm(width)] if use_bn else []), nn.GELU()]
            in_dim = width
        del layers[-2 if use_bn else -1 :]  # nothing follows the last linear layer
        self.mlp = nn.Sequential(*layers) if len(layers) > 1 else layers[0]
        self.last_layer = Prototypes(in_dim, out_dim)
        self.last_layer.weight_g.requires_grad_(not norm_last_layer)

    @classmethod
    def from_state_dict(cls, in_dim, state):
        """A head of the sizes that a state dict has; the weights are not loaded."""
        names = sorted((name for name in state if re.fullmatch(r"mlp\.(\d+\.)?weight", name)), key=layer_number)
        widths = [len(state[name]) for name in names if state[name].ndim == 2]  # a batch norm's has one dimension
        return cls(in_dim, len(state["last_layer.weight_v"]), widths, use_bn="mlp.1.running_mean" in state)

    @property
    def num_codes(self):
        return len(self.last_layer.weight_v)

    def forward(self, x):
        """Backbone features (B, D) -> scores (B, K). In training all views in one call: they share the batch norm."""
        with torch.autocast(x.device.type, enabled=False):
            z = F.normalize(self.mlp(x.to(self.last_layer.weight_v.dtype)), dim=1)  # (B, P)
            return z @ self.last_layer().T

    @torch.no_grad()
    def assign(self, x):
        """Backbone features (B, D) -> the prototype of each (B,) int64."""
        was_training = self.training
        codes = self.eval()(x).argmax(dim=1)
        self.train(was_training)
        return codes


def layer_number(name):
    return int(re.sub(r"\D", "", name) or 0)


class DINO(CodesObjective):
    """Two heads, the teacher and its schedules as the training loop's objective.

    teacher: a copy of the student that no gradient reaches, in eval mode except for batch norms, which normalise by the
    batch as the student's do; its parameters follow the student's, its buffers are its own.
    dino_loss: holds the centre, the mean of the teacher's scores over all processes, under DINO's name.
    args: resolved flags, with all names of `flags`.
    """

    entries = ("teacher", "dino_loss")
    flags = {
        "out_dim": 65536,
        "hidden_dim": 2048,
        "proj_dim": 256,
        "norm_last_layer": True,
        "use_bn_in_head": False,
        "momentum_teacher": 0.996,
        "warmup_teacher_temp": 0.04,
        "teacher_temp": 0.04,
        "warmup_teacher_temp_epochs": 0,
        "freeze_last_layer": 1,
    }
    advice = {
        "saddle": "the teacher's targets are uniform: lower --warmup_teacher_temp and --teacher_temp",
        "representation": "all images get one feature: lower --lr, or raise --momentum_teacher or --freeze_last_layer",
        "dimensional": "features span few directions: raise --out_dim or --teacher_temp, or train longer",
        "cluster": "few prototypes are used: raise --teacher_temp (over --warmup_teacher_temp_epochs) or "
        "--momentum_teacher",
        "intracluster": "images that share a prototype are alike: raise --out_dim or --teacher_temp",
    }

    def __init__(self, head, backbone, args, course, num_global=2):
        super().__init__(head.num_codes)
        self.head, self.args, self.course, self.num_global = head, args, course, num_global
        self.teacher = nn.ModuleDict({"backbone": copy.deepcopy(backbone), "head": copy.deepcopy(head)})
        self.teacher.requires_grad_(False)
        self.dino_loss = nn.Module()
        self.dino_loss.register_buffer("center", torch.zeros(1, head.num_codes))
        self.before_step(0, backbone)
        self.train()

    @classmethod
    def from_args(cls, args, backbone, course):
        widths = (args.hidden_dim, args.hidden_dim, args.proj_dim)
        head = DINOHead(backbone.embed_dim, args.out_dim, widths, args.norm_last_layer, args.use_bn_in_head)
        return cls(head, backbone, args, course)

    @classmethod
    def head_from_state_dict(cls, in_dim, state, settings):
        return DINOHead.from_state_dict(in_dim, state) if state.keys() >= set(LAST_LAYER) else None

    @staticmethod
    def add_arguments(parser):
        add_dino_arguments(parser)

    def train(self, mode=True):
        super().train(mode)
        self.teacher.eval()  # no dropped paths
        for module in self.teacher.modules():
            if isinstance(module, _BatchNorm):
                module.train(mode)
        return self

    def prepare(self, backbone, views, generator):
        """The teacher's features of the global views, G x (B, D): far fewer numbers than K scores for each."""
        return features_of_views(self.teacher.backbone, views[: self.num_global])

    def forward(self, rows, kept, generator=None):
        student = self.head(torch.cat(rows)).chunk(len(rows))
        with torch.no_grad():
            teacher = self.teacher.head(torch.cat(kept)).chunk(len(kept))
        center = self.dino_loss.center
        loss, terms = dino_loss(student, teacher, center, STUDENT_TEMP, self.teacher_temp)
        with torch.no_grad():
            center.copy_(next_center(center, [joint_mean(torch.cat(teacher))], CENTER_MOMENTUM))
        self.remember_logits(student[0] / STUDENT_TEMP)
        return loss, terms

    def before_step(self, step, backbone):
        """The teacher's temperature: linear over the first epochs, one value for each."""
        args, epoch = self.args, step // self.course.steps_per_epoch
        rising = epoch < args.warmup_teacher_temp_epochs
        share = epoch / max(1, args.warmup_teacher_temp_epochs - 1) if rising else 1.0
        self.teacher_temp = args.warmup_teacher_temp + share * (args.teacher_temp - args.warmup_teacher_temp)

    def before_update(self, step, backbone):
        """In the first epochs the last layer is neither moved nor decayed."""
        if step < self.args.freeze_last_layer * self.course.steps_per_epoch:
            for parameter in self.head.last_layer.parameters():
                parameter.grad = None

    @torch.no_grad()
    def clip_gradients(self, parameters, max_norm):
        """Each parameter's gradient by its own norm, as DINO's code does."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norms = torch._foreach_norm(gradients)
        torch._foreach_mul_(gradients, [(max_norm / (norm + 1e-6)).clamp(max=1) for norm in norms])
        return torch.linalg.vector_norm(torch.stack(norms))

    @torch.no_grad()
    def after_step(self, step, backbone):
        """teacher <- m teacher + (1 - m) student, m from --momentum_teacher to 1; lerp leaves alone what is equal."""
        momentum = cosine_schedule(step, self.course.total_steps, self.args.momentum_teacher, 1.0)
        for teacher, student in ((self.teacher.backbone, backbone), (self.teacher.head, self.head)):
            torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - momentum)

    @torch.no_grad()
    def statistics(self, features, averages):
        """What a line of the log says of prototypes (`CodesObjective`, by the student's predictions) and of the loss:

        entropy_share   entropy of the teacher's targets, of log K: near 1 they are uniform, near 0 all one prototype
        kl              loss - entropy, in nats: how far the student is from the targets
        center_norm     length of the centre
        """
        return super().statistics(features, averages) | {
            "entropy_share": averages["entropy"] / math.log(self.num_codes),
            "kl": averages["loss"] - averages["entropy"],
            "center_norm": self.dino_loss.center.norm(),
        }

    def describe(self):
        args = self.args
        gain = "of length 1" if args.norm_last_layer else "of trained length"
        norm = " with batch norm over all views" if args.use_bn_in_head else ""
        warmup = f"{args.warmup_teacher_temp:g} -> {args.teacher_temp:g} over {args.warmup_teacher_temp_epochs} epochs"
        return [
            f"head: {args.hidden_dim}-{args.hidden_dim}-{args.proj_dim}{norm}, K {self.num_codes} prototypes {gain}, "
            f"frozen for {args.freeze_last_layer} epochs",
            f"loss: cross-entropy, dense, float32; student's temperature {STUDENT_TEMP}, teacher's {warmup}, momentum "
            f"of the centre {CENTER_MOMENTUM}",
            f"teacher: momentum {args.momentum_teacher:g} -> 1; k-NN and evaluations take it, not the student",
            "note: --clip_grad is per parameter tensor, as in DINO; cls_token and pos_embed are not decayed, which "
            "DINO decays; the head is never in half precision",
        ]

    def translate(self, run, state):
        return dino_files.translate(run, state)


# ---- flags -----------------------------------------------------------------------------------------------------------


def add_dino_arguments(parser):
    add = parser.add_argument_group("--objective dino").add_argument  # defaults: DINO.flags
    switch = {"type": boolean, "nargs": "?", "const": True}  # DINO writes --norm_last_layer false
    add("--norm_last_layer", **switch, help="prototypes keep length 1; false: trained, better for small ViTs")
    add("--use_bn_in_head", **switch, help="batch norm between the head's layers")
    add(
        "--momentum_teacher",
        type=Number(float, least=0, most=1),
        help="of the teacher, at the start of a cosine to 1; 0.9995 for batches of 256",
    )
    add(
        "--warmup_teacher_temp",
        type=positive(float),
        help="temperature of the teacher at the start; lower if the loss does not fall",
    )
    add("--teacher_temp", type=positive(float), help="temperature of the teacher after that; above 0.07 is unstable")
    add(
        "--warmup_teacher_temp_epochs",
        type=not_negative(int),
        help="epochs in which the teacher's temperature rises; 30 for 0.04 -> 0.07",
    )
    add(
        "--freeze_last_layer",
        type=not_negative(int),
        help="epochs in which the prototypes rest; more if the loss does not fall",
    )
