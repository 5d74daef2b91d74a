"""Statistics of the joint batch: of the rows that all processes hold together, with gradient.

In tensors (..., n, d) the rows, images, are the last dimension but one: n of them here, N = n x processes in all. Views
stacked in front cost no more collectives than one. Every process's loss depends on all N rows, so the gradient of a row
is the sum over processes; DDP's average makes of it that of one process on the joint batch.
"""

import torch

from utils import all_gather_rows, all_reduce_mean, rank, world_size


def num_joint_rows(x):
    """N, the same on all processes."""
    return x.shape[-2] * world_size()


def joint_mean(x):
    """Mean over the joint rows: (..., n, d) -> (..., 1, d)."""
    return all_reduce_mean(x.mean(dim=-2, keepdim=True))


def joint_variance(centered):
    """Biased variance (divided by N) of rows whose `joint_mean` has been taken off: (..., n, d) -> (..., 1, d)."""
    return joint_mean(centered.square())


def joint_product(a, b):
    """Mean over the joint rows i of the outer products a_i b_i^T: (..., n, d), (..., n, e) -> (..., d, e)."""
    return all_reduce_mean(a.mT @ b / a.shape[-2])


def joint_logsumexp(x):
    """log sum exp over the joint rows, of each column: (..., n, d) -> (..., 1, d)."""
    largest = all_gather_rows(x.amax(dim=-2)[None]).amax(dim=0).unsqueeze(-2)  # cancels, and so needs no gradient
    return (joint_mean((x - largest).exp()) * num_joint_rows(x)).log() + largest


def joint_rows(x):
    """The rows of all processes, in rank order: (..., n, d) -> (..., N, d)."""
    if world_size() == 1:
        return x
    shares = x.new_zeros(*x.shape[:-2], world_size(), *x.shape[-2:])
    shares[..., rank(), :, :] = x
    return (all_reduce_mean(shares) * world_size()).flatten(-3, -2)


def check_views(views, num_global=1):
    """Raises ValueError unless there are at least two views, of one shape (n, d), and `num_global` of them."""
    shapes = [tuple(view.shape) for view in views]
    if len(views) < 2 or not 1 <= num_global <= len(views) or len(set(shapes)) > 1 or len(shapes[0]) != 2:
        raise ValueError(f"views have shapes {shapes}, {num_global} global; expected at least 2 of one shape (n, d)")


def ordered_pairs(num_views, num_global=2):
    """(a, v) with a < num_global and v != a: of which the losses take the mean."""
    return [(a, v) for a in range(num_global) for v in range(num_views) if v != a]


def unit_directions(z, num_directions, generator):
    """Columns of length 1, uniform on the sphere: (P, num_directions) for rows z (..., n, P), of their device and type.

    generator: one that is the same on all processes; drawn on its device, in float32 whatever z is."""
    directions = torch.randn(z.shape[-1], num_directions, generator=generator, device=generator.device).to(z)
    return directions / directions.norm(dim=0)
