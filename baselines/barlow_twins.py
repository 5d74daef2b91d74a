"""Barlow Twins: the cross-correlation of two views' embeddings should be the identity.

Zbontar, Jing, Misra, LeCun, Deny, "Barlow Twins: Self-Supervised Learning via Redundancy Reduction", ICML 2021
(arXiv 2103.03230).

    n images of this process, N of all, V views of each, the first G global     P width of the embeddings
"""

import torch

from baselines.joint import check_views, joint_mean, joint_product, joint_variance
from baselines.projector import ProjectorObjective
from utils import not_negative, positive

EPS = 1e-5  # torch's of a batch norm, by which the authors standardise


def barlow_twins_loss(views, lambd=0.0051, scale=0.1, num_global=2):
    """Barlow Twins' loss on the joint batch of all processes:

        s_v  = (z_v - mean) / sqrt(biased variance + 1e-5)      of each column
        C    = s_a^T s_v / N                                    (P, P)
        loss = scale * mean over pairs (a, v), a < G, v != a, of [ sum_i (C_ii - 1)^2 + lambd sum_{i != j} C_ij^2 ]

    views: list of V tensors (n, P), float32 or float64, global crops first.
    Returns (loss, {"on_diagonal", "off_diagonal", "correlation"}): the two sums, unweighted; and the mean of C_ii, in
        [-1, 1], without gradient.
    Raises ValueError for shapes that do not fit.
    Source: Eq. 1, with the authors' code's scale. That C is of all processes' images, with gradient, and the mean over
    the pairs of more than two views, are our own choices.
    """
    check_views(views, num_global)
    z = torch.stack(list(views))  # (V, n, P)
    centered = z - joint_mean(z)
    s = centered / (joint_variance(centered) + EPS).sqrt()
    # C of (v, a) is C of (a, v) transposed: pairs of global views are taken once and count twice
    pairs = [(a, v) for a in range(num_global) for v in range(a + 1, len(views))]
    counts = [2 if v < num_global else 1 for _, v in pairs]
    parts = zip(*(parts_of(joint_product(s[a], s[v])) for a, v in pairs), strict=True)
    on_diagonal, off_diagonal, correlation = (
        sum(count * part for count, part in zip(counts, of_pairs, strict=True)) / sum(counts) for of_pairs in parts
    )
    terms = {"on_diagonal": on_diagonal, "off_diagonal": off_diagonal, "correlation": correlation.detach()}
    return scale * (on_diagonal + lambd * off_diagonal), terms


def parts_of(correlations):
    """C (P, P) -> sum_i (C_ii - 1)^2, sum_{i != j} C_ij^2, mean of C_ii."""
    diagonal = correlations.diagonal()
    # not as a difference of two sums, which cancel where the diagonal is all there is
    off_diagonal = (correlations - diagonal.diag()).square().sum()
    return (diagonal - 1).square().sum(), off_diagonal, diagonal.mean()


class BarlowTwins(ProjectorObjective):
    flags = {"proj_dim": 2048, "hidden_dim": 2048, "lambd": 0.0051, "scale": 0.1}
    advice = {
        "representation": "all images get one feature: lower --lr, or use more images per step",
        "dimensional": "features span few directions: raise --lambd or --proj_dim, or train longer",
    }

    def __init__(self, head, lambd=0.0051, scale=0.1, num_global=2):
        super().__init__(head, num_global)
        self.lambd, self.scale = lambd, scale

    @classmethod
    def from_args(cls, args, backbone, course):
        return cls(cls.projector(args, backbone), args.lambd, args.scale)

    @staticmethod
    def add_arguments(parser):
        add = parser.add_argument_group("--objective barlow_twins").add_argument
        add("--hidden_dim", type=positive(int), help="width of the projector's hidden layers")
        add("--lambd", type=not_negative(float), help="weight of what is off the diagonal of the cross-correlation")
        add("--scale", type=positive(float), help="of the whole loss; the original has 1")

    def loss(self, views, generator):
        return barlow_twins_loss(views, self.lambd, self.scale, self.num_global)

    def statistics(self, features, averages):
        """off_diagonal_rms     of the cross-correlations of different columns; beside train_correlation, the mean of
        a column's products with itself"""
        dim = self.head.widths[-1]
        return {"off_diagonal_rms": (averages["off_diagonal"] / max(1, dim * (dim - 1))) ** 0.5}

    def describe(self):
        return [
            *super().describe(),
            f"loss: Barlow Twins, lambd {self.lambd:g}, scale {self.scale:g}; float32",
            "note: cross-correlations are those of all processes' images, and the loss is the mean over pairs of a "
            "global crop and another view; the original has two views",
        ]
