"""VICReg: embeddings of an image's views are near, of each column the deviation is at least 1, no columns covary.

Bardes, Ponce, LeCun, "VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised Learning", ICLR 2022
(arXiv 2105.04906).

    n images of this process, N of all, V views of each, the first G global     P width of the embeddings
"""

import torch

from baselines.joint import check_views, joint_mean, joint_product, num_joint_rows, ordered_pairs
from baselines.projector import ProjectorObjective
from utils import not_negative

EPS = 1e-4  # added to a variance, as in the authors' code


def vicreg_loss(views, sim=25.0, std=25.0, cov=1.0, num_global=2):
    """VICReg's loss on the joint batch of all processes, the mean over pairs (a, v), a < G, v != a, of

        sim * mean of (z_a - z_v)^2  +  std * [hinge(z_a) + hinge(z_v)] / 2  +  cov * [off(z_a) + off(z_v)]
        hinge(z) = mean over columns of relu(1 - sqrt(variance + 1e-4))
        off(z)   = sum_{i != j} Cov(z)_ij^2 / P                 variance and covariance are divided by N - 1

    views: list of V tensors (n, P), float32 or float64, global crops first.
    Returns (loss, {"invariance", "variance", "covariance", "deviation"}): what sim, std and cov weigh; and the mean
        over columns and views of the standard deviation, without gradient: what the hinge wants at 1.
    Raises ValueError for shapes that do not fit.
    Source: Eq. 6 as the authors' code has it, where the hinge is halved and the covariance is not; that code has two
    views, the mean over the pairs of more is our own choice.
    """
    check_views(views, num_global)
    pairs = ordered_pairs(len(views), num_global)
    z = torch.stack(list(views))  # (V, n, P)
    centered = z - joint_mean(z)
    count = num_joint_rows(z)
    covariances = joint_product(centered, centered) * (count / (count - 1))  # (V, P, P)
    variances = covariances.diagonal(dim1=1, dim2=2)  # (V, P)
    hinge = (1 - (variances + EPS).sqrt()).relu().mean(dim=1)
    off = (covariances - variances.diag_embed()).square().sum(dim=(1, 2)) / z.shape[2]
    terms = {
        "invariance": sum((z[a] - z[v]).square().mean() for a, v in pairs) / len(pairs),
        "variance": sum(hinge[a] + hinge[v] for a, v in pairs) / (2 * len(pairs)),
        "covariance": sum(off[a] + off[v] for a, v in pairs) / len(pairs),
    }
    loss = sim * terms["invariance"] + std * terms["variance"] + cov * terms["covariance"]
    return loss, terms | {"deviation": variances.detach().sqrt().mean()}


class VICReg(ProjectorObjective):
    flags = {"proj_dim": 2048, "hidden_dim": 2048, "sim_coeff": 25.0, "std_coeff": 25.0, "cov_coeff": 1.0}
    advice = {
        "representation": "all images get one feature: raise --std_coeff, or lower --sim_coeff or --lr",
        "dimensional": "features span few directions: raise --cov_coeff or --proj_dim, or train longer",
    }

    def __init__(self, head, sim=25.0, std=25.0, cov=1.0, num_global=2):
        super().__init__(head, num_global)
        self.sim, self.std, self.cov = sim, std, cov

    @classmethod
    def from_args(cls, args, backbone, course):
        return cls(cls.projector(args, backbone), args.sim_coeff, args.std_coeff, args.cov_coeff)

    @staticmethod
    def add_arguments(parser):
        add = parser.add_argument_group("--objective vicreg").add_argument
        add("--sim_coeff", type=not_negative(float), help="weight of the distance between the views of an image")
        add("--std_coeff", type=not_negative(float), help="weight of the hinge that keeps deviations at 1")
        add("--cov_coeff", type=not_negative(float), help="weight of the squared covariances of different columns")

    def loss(self, views, generator):
        return vicreg_loss(views, self.sim, self.std, self.cov, self.num_global)

    def describe(self):
        return [
            *super().describe(),
            f"loss: VICReg, sim {self.sim:g}, std {self.std:g}, cov {self.cov:g}; float32",
            "note: the loss is the mean over pairs of a global crop and another view; the original has two views",
        ]
