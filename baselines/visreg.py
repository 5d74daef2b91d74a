"""VISReg: views of an image are near, columns have mean 0 and deviation 1, and a Gaussian's shape along directions.

Wu, Balestriero, Levine, "VISReg: Variance-Invariance-Sketching Regularization for JEPA training" (arXiv 2606.02572).

    n images of this process, N of all, V views of each, the first G global     P width of the embeddings, A directions
"""

import functools

import torch

from baselines.joint import check_views, joint_rows, unit_directions
from baselines.projector import ProjectorObjective

EPS = 1e-6  # added to a deviation


def visreg_loss(views, directions, lamb=0.6, num_global=2):
    """VISReg's loss on the joint batch of all processes:

        loss       = lamb * mean over views of [center + scale + shape]  +  (1 - lamb) * invariance
        invariance = mean over views, images, columns of (z_v - mean of the global views)^2

    views: list of V tensors (n, P), float32 or float64, global crops first.
    directions: (P, A), columns of length 1; the same on all processes.
    Returns (loss, {"center", "scale", "shape", "invariance"}), unweighted; the first three as in `visreg_parts`.
    Raises ValueError for shapes that do not fit.
    Source: arXiv 2606.02572. Sorting the rows of all processes together keeps N processes one batch: our own choice.
    """
    check_views(views, num_global)
    z = torch.stack(list(views))  # (V, n, P)
    terms = visreg_parts(joint_rows(z), directions)
    terms["invariance"] = (z - z[:num_global].mean(dim=0)).square().mean()
    regulariser = terms["center"] + terms["scale"] + terms["shape"]
    return lamb * regulariser + (1 - lamb) * terms["invariance"], terms


def visreg(z, directions):
    """The sum of `visreg_parts` of the joint batch. z: (n, P) of this process, or views of it in front."""
    return sum(visreg_parts(joint_rows(z), directions).values())


def visreg_parts(z, directions):
    """The regulariser's three parts, each the mean over columns, or directions, and over views:

        center = mean^2        scale = (sd - 1)^2, sd = sqrt(biased variance) + 1e-6
        shape  = mean over i of (i-th smallest of (z - mean) / stopgrad(sd) a  -  q_i)^2
        q_i    = standard normal quantile of i / (N + 1), i = 1 .. N

    z: (..., N, P), all rows, since sorting needs them: every process does it all.  directions: (P, A).
    """
    mean = z.mean(dim=-2, keepdim=True)
    centered = z - mean
    variance = centered.square().mean(dim=-2, keepdim=True)
    # the root has no slope at 0, where all rows are equal: NaN in place of a gradient
    deviation = variance.clamp_min(torch.finfo(z.dtype).tiny).sqrt() + EPS
    along = (centered / deviation.detach()) @ directions  # (..., N, A)
    shape = (along.sort(dim=-2).values - normal_quantiles(z).unsqueeze(-1)).square().mean()
    return {"center": mean.square().mean(), "scale": (deviation - 1).square().mean(), "shape": shape}


def normal_quantiles(z):
    """Of i / (N + 1), i = 1 .. N, for the rows of z (..., N, P): (N,), in its type."""
    count = z.shape[-2]
    return torch.special.ndtri(torch.arange(1, count + 1, dtype=z.dtype, device=z.device) / (count + 1))


@functools.cache
def least_shape(num_images, dim, num_directions, num_draws=4):
    """`shape` of N independent Gaussian embeddings, drawn: a floor that falls with N, .0079 at N 256 and P 128."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(num_draws, num_images, dim, generator=generator)
    return float(visreg_parts(z, unit_directions(z, num_directions, generator))["shape"])


class VISReg(ProjectorObjective):
    norm = "resolution"
    flags = {"proj_dim": 128, "hidden_dim": 2048, "lamb": 0.6, "num_directions": 256}
    advice = {
        "representation": "all images get one feature: raise --lamb, or lower --lr",
        "dimensional": "features span few directions: raise --lamb or --proj_dim, or train longer",
    }

    def __init__(self, head, lamb=0.6, num_directions=256, num_global=2):
        super().__init__(head, num_global)
        self.lamb, self.num_directions = lamb, num_directions

    @classmethod
    def from_args(cls, args, backbone, course):
        return cls(cls.projector(args, backbone), args.lamb, args.num_directions)

    def loss(self, views, generator):
        directions = unit_directions(views[0], self.num_directions, generator)
        return visreg_loss(views, directions, self.lamb, self.num_global)

    def statistics(self, features, averages):
        """shape_of_gaussians     what train_shape cannot stay below, if embeddings are independent"""
        return {"shape_of_gaussians": least_shape(len(features), self.head.widths[-1], self.num_directions)}

    def describe(self):
        return [
            *super().describe(),
            f"loss: VISReg, lamb {self.lamb:g}, {self.num_directions} directions; float32",
            "note: all processes sort the images of all of them, along the same directions",
        ]
