"""LeJEPA: views of an image are near their mean, and embeddings, seen along random directions, are Gaussian (SIGReg).

Balestriero, LeCun, "LeJEPA: Provable and Scalable Self-Supervised Learning Without the Heuristics" (arXiv 2511.08544).

    n images of this process, N of all, V views of each     P width of the embeddings, A directions, T knots
"""

import torch

from baselines.joint import check_views, joint_mean, num_joint_rows, unit_directions
from baselines.projector import ProjectorObjective
from utils import Number, positive

LAST_KNOT, NUM_KNOTS = 3.0, 17  # as in the authors' code


def lejepa_loss(views, directions, lamb=0.02):
    """LeJEPA's loss on the joint batch of all processes:

        loss       = lamb * mean over views of SIGReg(z_v)  +  (1 - lamb) * invariance
        invariance = mean over views, images, columns of (z_v - mean of all views)^2

    views: list of V tensors (n, P), float32 or float64.
    directions: (P, A), columns of length 1; the same on all processes.
    Returns (loss, {"sigreg", "invariance"}), unweighted.
    Raises ValueError for shapes that do not fit.
    Source: arXiv 2511.08544 and the authors' example, whose centre is the mean of all views.
    """
    check_views(views)
    z = torch.stack(list(views))  # (V, n, P)
    terms = {"sigreg": sigreg(z, directions), "invariance": (z - z.mean(dim=0)).square().mean()}
    return lamb * terms["sigreg"] + (1 - lamb) * terms["invariance"], terms


def sigreg(z, directions):
    """How far embeddings along directions are from a standard Gaussian, by the test of Epps and Pulley:

        x = z a                                                                      for each direction a
        T = N * sum_t w_t [ (mean cos(t x) - exp(-t^2 / 2))^2 + (mean sin(t x))^2 ]     means over the joint batch

    t: 17 knots from 0 to 3.  w_t: dt exp(-t^2 / 2), dt = 3 / 16 at both ends and twice that between, as the integrand
    is even.
    z: (..., n, P), views may stand in front.  directions: (P, A), columns of length 1.
    Returns the mean over directions and views. `sigreg_bounds` says what values to expect.
    """
    knots, weights = knots_and_weights(z)
    angles = (z @ directions).unsqueeze(-3) * knots.view(-1, 1, 1)  # (..., T, n, A)
    gaussian = (-knots.square() / 2).exp().view(-1, 1, 1)
    error = (joint_mean(angles.cos()) - gaussian).square() + joint_mean(angles.sin()).square()  # (..., T, 1, A)
    return num_joint_rows(z) * (weights.view(-1, 1, 1) * error).sum(dim=-3).mean()


def knots_and_weights(like):
    """(T,) each, of the device and type of the tensor `like`."""
    knots = torch.linspace(0, LAST_KNOT, NUM_KNOTS, dtype=like.dtype, device=like.device)
    steps = torch.full_like(knots, 2 * LAST_KNOT / (NUM_KNOTS - 1))
    steps[0] = steps[-1] = LAST_KNOT / (NUM_KNOTS - 1)
    return knots, steps * (-knots.square() / 2).exp()


def sigreg_bounds(num_images):
    """(value expected of N independent Gaussian samples, value of N embeddings that are all 0).

    The variances of cos(t x) and sin(t x) add up to 1 - exp(-t^2), and N cancels: the first is 1.0525 at every N. The
    second is .402 N."""
    knots, weights = knots_and_weights(torch.empty((), dtype=torch.float64))
    gaussian = (-knots.square() / 2).exp()
    return float((weights * (1 - gaussian.square())).sum()), num_images * float((weights * (1 - gaussian) ** 2).sum())


class LeJEPA(ProjectorObjective):
    norm = "all"
    flags = {"proj_dim": 64, "hidden_dim": 2048, "lamb": 0.02, "num_directions": 256}
    advice = {
        "representation": "all images get one feature: raise --lamb, or lower --lr",
        "dimensional": "features span few directions: raise --lamb or --proj_dim, or train longer",
    }

    def __init__(self, head, lamb=0.02, num_directions=256, num_global=2):
        super().__init__(head, num_global)
        self.lamb, self.num_directions = lamb, num_directions

    @classmethod
    def from_args(cls, args, backbone, course):
        return cls(cls.projector(args, backbone), args.lamb, args.num_directions)

    @staticmethod
    def add_arguments(parser):
        add = parser.add_argument_group("--objective lejepa").add_argument
        add("--lamb", type=Number(float, least=0, most=1), help="weight of the regulariser; agreement has 1 - lamb")
        add("--num_directions", type=positive(int), help="along which embeddings are seen, drawn anew in each step")

    def loss(self, views, generator):
        return lejepa_loss(views, unit_directions(views[0], self.num_directions, generator), self.lamb)

    def statistics(self, features, averages):
        """sigreg_of_gaussians     what train_sigreg cannot stay below, if embeddings are independent
        sigreg_of_one_point     what it is where they are all 0"""
        gaussians, one_point = sigreg_bounds(len(features))
        return {"sigreg_of_gaussians": gaussians, "sigreg_of_one_point": one_point}

    def describe(self):
        gaussians, one_point = sigreg_bounds(1)
        return [
            *super().describe(),
            f"loss: LeJEPA, lamb {self.lamb:g}, {self.num_directions} directions; float32",
            f"SIGReg: {gaussians:.4f} is expected of Gaussian samples, {one_point:.3f} per image of embeddings all 0",
        ]
