"""What the training loop asks of a method."""

from torch import nn


class Objective(nn.Module):
    """What the training loop knows of a method: features of each view in, a loss and its named terms out.

    forward(features: list of V tensors (B, D), global crops first) -> (loss: scalar, terms: dict of scalars), float32.
    The hooks below do nothing unless a method needs them (a teacher, a queue, a sampler, statistics of its codes).
    """

    advice = {}  # what to change, in words, for each kind that `monitor.diagnose` may find

    def before_step(self, step):
        """Called before the forward pass of global step `step`."""

    def after_step(self, step):
        """Called after the optimizer's step."""

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
