"""The projector that most systems put between backbone and loss, and the objective that is a projector and a loss."""

import itertools

import torch
from torch import nn

from batch_norm import SyncBatchNorm
from objective import Objective

NORMS = ("view", "resolution", "all")


class Projector(nn.Module):
    """Linear, batch norm and activation for each hidden width, and a last linear layer; all with biases.

    widths: of input, hidden layers and output: [D, 2048, 2048, 128].
    norm: what batch norm has its statistics of, over all processes: each "view", the views of one "resolution" (the
        global ones, the local ones), or "all" views together.
    activation: makes a module.
    Runs in the parameters' dtype, outside autocast.
    """

    def __init__(self, widths, norm="view", activation=nn.ReLU):
        super().__init__()
        if norm not in NORMS:
            raise ValueError(f"norm is {norm!r}; expected one of {NORMS}")
        self.widths, self.norm = list(widths), norm
        layers = []
        for before, after in itertools.pairwise(widths[:-1]):
            layers += [nn.Linear(before, after), SyncBatchNorm(after), activation()]
        self.mlp = nn.Sequential(*layers, nn.Linear(*widths[-2:]))

    def forward(self, views, num_global=2):
        """V x (B, D), the first `num_global` of them global crops -> V x (B, P)."""
        with torch.autocast(views[0].device.type, enabled=False):
            return [z for group in self._normed_together(views, num_global) for z in self._project(group)]

    def _normed_together(self, views, num_global):
        if self.norm == "view":
            return [[view] for view in views]
        if self.norm == "all":
            return [views]
        return [group for group in (views[:num_global], views[num_global:]) if group]

    def _project(self, group):
        joined = torch.cat(group).to(self.mlp[0].weight.dtype)
        return self.mlp(joined).split([len(view) for view in group])

    def __str__(self):
        names = {"view": "each view", "resolution": "the views of a resolution", "all": "all views"}
        return f"{'-'.join(map(str, self.widths))}, batch norm over {names[self.norm]}"


class ProjectorObjective(Objective):
    """An objective whose head is a `Projector`, with neither codes nor a teacher; a subclass has `loss`."""

    norm = "view"  # of the Projector

    def __init__(self, head, num_global=2):
        super().__init__()
        self.head, self.num_global = head, num_global

    @classmethod
    def projector(cls, args, backbone):
        return Projector([backbone.embed_dim, args.hidden_dim, args.hidden_dim, args.proj_dim], cls.norm)

    def loss(self, views, generator):
        """V x (n, P) -> loss of the joint batch, terms."""
        raise NotImplementedError

    def forward(self, rows, kept=(), generator=None):
        with torch.autocast(rows[0].device.type, enabled=False):
            return self.loss(self.head(rows, self.num_global), generator)

    def describe(self):
        return [f"head: {self.head}"]
