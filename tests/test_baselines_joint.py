"""Statistics of the joint batch and the projector: two processes against plain operations on all rows at once."""

import numpy as np
import pytest
import torch
from torch import nn

from baselines.joint import (
    check_views,
    joint_logsumexp,
    joint_mean,
    joint_product,
    joint_rows,
    joint_variance,
    num_joint_rows,
    ordered_pairs,
    unit_directions,
)
from baselines.projector import Projector

V, N, D = 3, 8, 5

JOINT = {
    "mean": joint_mean,
    "variance": lambda x: joint_variance(x - joint_mean(x)),
    "product": lambda x: joint_product(x, x[..., :2] ** 2),
    "logsumexp": lambda x: joint_logsumexp(400 * x),
    "rows": joint_rows,
}
PLAIN = {
    "mean": lambda x: x.mean(1, keepdim=True),
    "variance": lambda x: x.var(1, unbiased=False, keepdim=True),
    "product": lambda x: torch.einsum("vni,vnj->vij", x, x[..., :2] ** 2) / N,
    "logsumexp": lambda x: (400 * x).logsumexp(1, keepdim=True),
    "rows": lambda x: x,
}


def all_images():
    torch.manual_seed(0)
    return torch.randn(V, N, D, dtype=torch.float64)


def loss_of(statistic, own, weight):
    """Each process weighs the statistic in its own way, and has a part of its own rows."""
    return (weight * statistic).sin().sum() + own.square().mean()


def own_gradients(rank, names):
    own = all_images()[:, rank * N // 2 : (rank + 1) * N // 2].clone().requires_grad_()
    found = {"count": num_joint_rows(own)}
    for name in names:
        statistic = JOINT[name](own)
        (grad,) = torch.autograd.grad(loss_of(statistic, own, rank + 1), own)
        found[name] = statistic.detach().numpy(), grad.numpy()
    return found


def test_statistics_of_two_processes_are_those_of_all_rows_with_their_gradients(run_in_processes):
    x = all_images().requires_grad_()
    both = run_in_processes(own_gradients, list(JOINT))
    for name, plain in PLAIN.items():
        statistic = plain(x)
        loss = sum(loss_of(statistic, part, r + 1) for r, part in enumerate(x.chunk(2, dim=1)))
        (grad,) = torch.autograd.grad(loss, x)
        for found in both:
            np.testing.assert_allclose(found[name][0], statistic.detach().numpy(), rtol=1e-12, atol=1e-12)
        joined = np.concatenate([found[name][1] for found in both], axis=1)
        np.testing.assert_allclose(joined, grad.numpy(), rtol=1e-11, atol=1e-11, err_msg=name)
        # one process, where nothing is reduced
        np.testing.assert_allclose(JOINT[name](x).detach().numpy(), statistic.detach().numpy(), rtol=1e-12, atol=1e-12)
    for found in both:
        assert found["count"] == N


def test_logsumexp_of_one_process_has_the_gradient_of_torchs():
    x = (300 * all_images()).requires_grad_()
    got, want = (torch.autograd.grad(f.square().sum(), x)[0] for f in (joint_logsumexp(x), x.logsumexp(1)))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_directions_are_of_length_1_and_follow_the_generator():
    z = torch.zeros(V, N, D, dtype=torch.float64)
    first, again, other = (unit_directions(z, 64, torch.Generator().manual_seed(s)) for s in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    torch.testing.assert_close(first.norm(dim=0), torch.ones(64, dtype=torch.float64), rtol=1e-15, atol=1e-15)
    narrow = unit_directions(z.float(), 64, torch.Generator().manual_seed(3))
    torch.testing.assert_close(narrow.double(), first, rtol=1e-6, atol=1e-6)


def test_pairs_have_a_global_view_first():
    assert ordered_pairs(2) == [(0, 1), (1, 0)]
    assert ordered_pairs(3) == [(0, 1), (0, 2), (1, 0), (1, 2)]


@pytest.mark.parametrize("shapes", [[(4, 3)], [(4, 3), (4, 2)], [(4,), (4,)]])
def test_views_of_no_loss_are_refused(shapes):
    with pytest.raises(ValueError, match="at least 2 of one shape"):
        check_views([torch.zeros(shape) for shape in shapes])
    with pytest.raises(ValueError, match="3 global"):
        check_views([torch.zeros(4, 3)] * 2, num_global=3)


def by_hand(layers, x):
    """Batch statistics of all rows of x."""
    for layer in layers:
        if isinstance(layer, nn.Linear):
            x = x @ layer.weight.T + layer.bias
        elif hasattr(layer, "running_mean"):
            x = (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt() * layer.weight + layer.bias
        else:
            x = x.clamp(min=0)
    return x


GROUPS = {"view": [[0], [1], [2], [3]], "resolution": [[0, 1], [2, 3]], "all": [[0, 1, 2, 3]]}


@pytest.mark.parametrize(("norm", "groups"), GROUPS.items())
def test_projector_by_hand(norm, groups):
    torch.manual_seed(1)
    views = list(torch.randn(4, N, D, dtype=torch.float64))
    projector = Projector([D, 7, 6, 4], norm).double()
    got = projector(views)
    want = [by_hand(projector.mlp, torch.cat([views[v] for v in group])).split(N) for group in groups]
    for z, expected in zip(got, [z for group in want for z in group], strict=True):
        torch.testing.assert_close(z, expected, rtol=1e-12, atol=1e-12)
    assert [tuple(z.shape) for z in projector(views[:2])] == [(N, 4)] * 2  # without local crops


def test_projector_is_float32_under_autocast_and_refuses_an_unknown_norm():
    with torch.autocast("cpu", torch.bfloat16):
        assert Projector([D, 7, 4])([torch.randn(N, D, dtype=torch.bfloat16)])[0].dtype == torch.float32
    with pytest.raises(ValueError, match="norm is 'batch'"):
        Projector([D, 7, 4], "batch")
