"""Barlow Twins, VICReg, LeJEPA, VISReg: known values, formulas written out, and the joint batch of two processes."""

import argparse
import copy
import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import main_cplearn
from baselines import BASELINES
from baselines.barlow_twins import BarlowTwins, barlow_twins_loss
from baselines.joint import unit_directions
from baselines.lejepa import LeJEPA, lejepa_loss, sigreg, sigreg_bounds
from baselines.projector import Projector
from baselines.vicreg import VICReg, vicreg_loss
from baselines.visreg import VISReg, least_shape, visreg, visreg_loss
from monitor import read_log
from objective import Course, resolve_objective
from runs import flags, write_pictures

SYSTEMS = {"barlow_twins": BarlowTwins, "vicreg": VICReg, "lejepa": LeJEPA, "visreg": VISReg}
N, P, A = 12, 16, 64


def known_views():
    """The inputs whose losses the systems' own public codes gave, in float64."""
    g = torch.Generator().manual_seed(7)
    common = torch.randn(N, P, generator=g, dtype=torch.float64)
    return list(common + 0.5 * torch.randn(4, N, P, generator=g, dtype=torch.float64))


def known_directions():
    a = torch.randn(P, A, generator=torch.Generator().manual_seed(31), dtype=torch.float64)
    return a / a.norm(dim=0)


LOSSES = {
    "barlow_twins": barlow_twins_loss,
    "vicreg": vicreg_loss,
    "lejepa": lambda views: lejepa_loss(views, known_directions()),
    "visreg": lambda views: visreg_loss(views, known_directions()),
}


def test_known_values_of_the_public_codes():
    views = known_views()[:2]
    assert barlow_twins_loss(views, scale=1)[0].item() == pytest.approx(1.016427445083087, abs=1e-12)
    assert vicreg_loss(views)[0].item() == pytest.approx(22.6924831993947, abs=1e-12)
    assert lejepa_loss(views, known_directions())[0].item() == pytest.approx(0.16912824109640795, abs=1e-12)
    regulariser = sum(visreg(z, known_directions()) for z in views) / 2
    assert regulariser.item() == pytest.approx(0.25146538816028247, abs=1e-9)
    loss, terms = visreg_loss(views, known_directions(), lamb=1)
    assert loss.item() == pytest.approx(regulariser.item(), rel=1e-12)
    assert terms["invariance"].item() == pytest.approx((views[0] - views[1]).square().mean().item() / 4, rel=1e-12)


# ---- the formulas, entry by entry --------------------------------------------------------------------------------


def mean_over_pairs(function, views):
    pairs = [(a, v) for a in range(2) for v in range(len(views)) if v != a]
    return sum(function(views[a], views[v]) for a, v in pairs) / len(pairs)


def barlow_by_hand(views):
    def of_pair(x, y):
        loss = 0.0
        for i in range(P):
            for j in range(P):
                s, t = x[:, i], y[:, j]
                s, t = ((c - c.mean()) / (((c - c.mean()) ** 2).mean() + 1e-5).sqrt() for c in (s, t))
                c = (s * t).mean()
                loss = loss + ((c - 1) ** 2 if i == j else 0.0051 * c**2)
        return 0.1 * loss

    return mean_over_pairs(of_pair, views)


def vicreg_by_hand(views):
    def hinge(z):
        return sum(torch.relu(1 - (z[:, j].var() + 1e-4).sqrt()) for j in range(P)) / P

    def off(z):
        cov = torch.cov(z.T)
        return sum(cov[i, j] ** 2 for i in range(P) for j in range(P) if i != j) / P

    def of_pair(x, y):
        return 25 * torch.nn.functional.mse_loss(x, y) + 25 * (hinge(x) / 2 + hinge(y) / 2) + off(x) + off(y)

    return mean_over_pairs(of_pair, views)


def lejepa_by_hand(views):
    """The integral over both signs of t, by the trapezoidal rule on all 33 knots, with complex numbers."""
    t = torch.arange(-16, 17, dtype=torch.float64) * 3 / 16
    total = 0.0
    for z in views:
        for a in known_directions().T:
            characteristic = torch.exp(1j * t[:, None] * (z @ a)[None]).mean(dim=1)
            error = (characteristic - torch.exp(-(t**2) / 2)).abs() ** 2
            total = total + N * torch.trapezoid(error * torch.exp(-(t**2) / 2), t)
    centre = sum(views) / len(views)
    invariance = sum(((z - centre) ** 2).mean() for z in views) / len(views)
    return 0.02 * total / (A * len(views)) + 0.98 * invariance


def visreg_by_hand(views):
    quantiles = torch.tensor([NormalDist().inv_cdf(i / (N + 1)) for i in range(1, N + 1)], dtype=torch.float64)
    regulariser = 0.0
    for z in views:
        sd = z.var(0, unbiased=False).sqrt() + 1e-6
        x = (z - z.mean(0)) / sd.detach()
        shape = sum(((x @ a)[(x @ a).argsort()] - quantiles).pow(2).mean() for a in known_directions().T) / A
        regulariser = regulariser + z.mean(0).pow(2).mean() + (sd - 1).pow(2).mean() + shape
    centre = (views[0] + views[1]) / 2
    invariance = sum(((z - centre) ** 2).mean() for z in views) / len(views)
    return 0.6 * regulariser / len(views) + 0.4 * invariance


BY_HAND = {"barlow_twins": barlow_by_hand, "vicreg": vicreg_by_hand, "lejepa": lejepa_by_hand, "visreg": visreg_by_hand}


@pytest.mark.parametrize("num_views", [2, 4])
@pytest.mark.parametrize("name", SYSTEMS)
def test_loss_and_gradients_equal_the_formulas(name, num_views):
    views = [(0.7 * z).requires_grad_() for z in known_views()[:num_views]]  # small: the hinge of VICReg is active
    loss, terms = LOSSES[name](views)
    expected = BY_HAND[name](views)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12 if name != "visreg" else 1e-9)
    for got, want in zip(torch.autograd.grad(loss, views), torch.autograd.grad(expected, views), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)
    assert all(value.ndim == 0 for value in terms.values())


@pytest.mark.parametrize("name", ["barlow_twins", "vicreg", "lejepa"])  # VISReg stops a gradient on purpose
def test_gradients_equal_finite_differences(name):
    views = [z[:6].clone().requires_grad_() for z in known_views()[:3]]
    assert torch.autograd.gradcheck(lambda *views: LOSSES[name](views)[0], views)


def test_terms_are_what_the_weights_weigh():
    views = known_views()
    loss, terms = barlow_twins_loss(views, 0.3, 0.7)
    assert loss.item() == pytest.approx(0.7 * (terms["on_diagonal"] + 0.3 * terms["off_diagonal"]).item())
    loss, terms = vicreg_loss(views, 2, 3, 4)
    assert loss.item() == pytest.approx(
        (2 * terms["invariance"] + 3 * terms["variance"] + 4 * terms["covariance"]).item()
    )
    assert terms["deviation"].item() == pytest.approx(sum(z.std(0).mean() for z in views).item() / 4)
    loss, terms = lejepa_loss(views, known_directions(), 0.3)
    assert loss.item() == pytest.approx((0.3 * terms["sigreg"] + 0.7 * terms["invariance"]).item())
    loss, terms = visreg_loss(views, known_directions(), 0.3)
    regulariser = terms["center"] + terms["scale"] + terms["shape"]
    assert loss.item() == pytest.approx((0.3 * regulariser + 0.7 * terms["invariance"]).item())


# ---- invariances and collapse ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_order_of_images_says_nothing(name):
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    views = known_views()
    assert LOSSES[name]([z[order] for z in views])[0].item() == pytest.approx(LOSSES[name](views)[0].item(), rel=1e-12)


def test_what_each_loss_does_not_see():
    views, directions = known_views(), known_directions()
    stretched = [z * torch.linspace(50, 900, P) + 3 for z in views]
    wide = [900 * z for z in views]
    assert barlow_twins_loss(stretched)[0].item() == pytest.approx(barlow_twins_loss(wide)[0].item(), rel=1e-6)
    shifted = [z + torch.arange(P) for z in views]
    assert vicreg_loss(shifted)[0].item() == pytest.approx(vicreg_loss(views)[0].item(), rel=1e-9)
    rotation = torch.linalg.qr(torch.randn(P, P, generator=torch.Generator().manual_seed(2), dtype=torch.float64)).Q
    rotated = sigreg(views[0] @ rotation, rotation.T @ directions)
    assert rotated.item() == pytest.approx(sigreg(views[0], directions).item(), rel=1e-12)


@pytest.mark.parametrize("name", SYSTEMS)
@pytest.mark.parametrize("value", [0.0, 1.7])
def test_a_collapsed_batch_has_finite_gradients(name, value):
    views = [torch.full((N, P), value, requires_grad=True) for _ in range(2)]
    loss, _ = LOSSES[name](views) if name in ("barlow_twins", "vicreg") else (
        {"lejepa": lejepa_loss, "visreg": visreg_loss}[name](views, known_directions().float())
    )  # fmt: skip
    assert loss.isfinite() and all(grad.isfinite().all() for grad in torch.autograd.grad(loss, views))


def test_sigreg_of_gaussians_and_of_one_point():
    generator = torch.Generator().manual_seed(3)
    for num_images in (16, 256):
        gaussians, one_point = sigreg_bounds(num_images)
        z = torch.randn(100, num_images, P, generator=generator)
        drawn = sigreg(z, unit_directions(z, A, generator))
        assert gaussians == pytest.approx(1.0525, abs=1e-4) and drawn.item() == pytest.approx(gaussians, rel=0.03)
        zeros = sigreg(torch.zeros(num_images, P), unit_directions(z, A, generator))
        assert zeros.item() == pytest.approx(one_point, rel=1e-5)
        assert one_point == pytest.approx(0.402 * num_images, rel=1e-3)


def test_least_shape_is_that_of_gaussians():
    z = torch.randn(50, 256, 128, generator=torch.Generator().manual_seed(4))
    terms = visreg_loss(list(z), unit_directions(z, 64, torch.Generator().manual_seed(5)))[1]
    assert least_shape(256, 128, 64) == pytest.approx(terms["shape"].item(), rel=0.05)


# ---- the objectives --------------------------------------------------------------------------------------------------

D = 10


def build(name, **changes):
    """The objective as a run builds it, small, in float64."""
    torch.manual_seed(5)
    parser = argparse.ArgumentParser()
    main_cplearn.add_objective_arguments(parser, main_cplearn.OBJECTIVES)
    values = {"objective": name, "proj_dim": 6, "hidden_dim": 7} | changes
    words = [str(word) for key, value in values.items() for word in (f"--{key}", value)]
    args = resolve_objective(parser.parse_args(words), main_cplearn.OBJECTIVES)
    backbone = argparse.Namespace(embed_dim=D)
    return BASELINES[name].from_args(args, backbone, Course(torch.device("cpu"), N, 1, 10, 100)).double()


def rows_of_step(step, num_views=4):
    generator = torch.Generator().manual_seed(100 + step)
    return list(torch.randn(num_views, N, D, generator=generator, dtype=torch.float64))


def generator_of_step(step):
    return torch.Generator().manual_seed(step)


def train_three_steps(name, first, last):
    """Losses, gradients of rows and head, and the state after three steps, of the images [first, last)."""
    objective = build(name)
    whole = DistributedDataParallel(objective, broadcast_buffers=False) if last - first < N else objective
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.1)
    shared, of_rows = [], []
    for step in range(3):
        rows = [x[first:last].clone().requires_grad_() for x in rows_of_step(step)]
        loss, terms = whole(rows, [], generator_of_step(step))
        optimizer.zero_grad()
        loss.backward()
        shared += [loss, *terms.values(), *(p.grad.clone() for p in objective.parameters())]
        of_rows += [torch.stack([x.grad for x in rows])]
        optimizer.step()
    shared += objective.state_dict().values()
    return [x.detach().double().numpy() for x in shared], torch.stack(of_rows).numpy()


def train_on_a_share(rank, name):
    return train_three_steps(name, rank * N // 2, (rank + 1) * N // 2)


def train_all_on_a_share(rank):
    return {name: train_on_a_share(rank, name) for name in SYSTEMS}


def test_two_processes_equal_one_on_the_joined_batch(run_in_processes):
    both = run_in_processes(train_all_on_a_share)
    for name in SYSTEMS:
        shared, of_rows = train_three_steps(name, 0, N)
        ours, theirs = (found[name] for found in both)
        for got, other, want in zip(ours[0], theirs[0], shared, strict=True):
            mean = got if got.ndim else (got + other) / 2  # losses and terms are means over processes
            np.testing.assert_allclose(mean, want, rtol=1e-10, atol=1e-11, err_msg=name)
            if got.ndim:
                np.testing.assert_array_equal(got, other, err_msg=name)
        joined = np.concatenate([ours[1], theirs[1]], axis=2) / 2  # DDP divides by the number of processes
        np.testing.assert_allclose(joined, of_rows, rtol=1e-9, atol=1e-12, err_msg=name)


CHANGES = {
    "barlow_twins": {"lambd": 0.5, "scale": 1, "proj_dim": 5, "hidden_dim": 9},
    "vicreg": {"sim_coeff": 1, "std_coeff": 1, "cov_coeff": 9, "proj_dim": 5, "hidden_dim": 9},
    "lejepa": {"lamb": 0.5, "num_directions": 3, "proj_dim": 5, "hidden_dim": 9},
    "visreg": {"lamb": 0.9, "num_directions": 3, "proj_dim": 5, "hidden_dim": 9},
}


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_flag_does_something(name):
    def loss(**changes):
        return build(name, **changes)(rows_of_step(0), [], generator_of_step(0))[0].item()

    assert CHANGES[name].keys() == SYSTEMS[name].flags.keys()
    losses = [loss(), *(loss(**{flag: value}) for flag, value in CHANGES[name].items())]
    assert len(set(losses)) == len(losses)


def test_directions_are_drawn_anew_from_the_generator():
    for name in ("lejepa", "visreg"):
        losses = [copy.deepcopy(build(name))(rows_of_step(0), [], generator_of_step(s))[0].item() for s in (1, 1, 2)]
        assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize(("name", "norm"), [("barlow_twins", "view"), ("vicreg", "view"), ("lejepa", "all"),
                                            ("visreg", "resolution")])  # fmt: skip
def test_heads_are_those_of_the_recipes(name, norm):
    objective = build(name, hidden_dim=2048, proj_dim=SYSTEMS[name].flags["proj_dim"])
    assert objective.head.widths == [D, 2048, 2048, {"lejepa": 64, "visreg": 128}.get(name, 2048)]
    assert objective.head.norm == norm
    assert sum(p.numel() for p in objective.parameters() if p.ndim == 1) == 2048 * 6 + objective.head.widths[-1]


@pytest.mark.parametrize("name", SYSTEMS)
def test_loss_is_float32_under_autocast(name):
    objective = build(name).float()
    rows = [x.float() for x in rows_of_step(0)]
    expected = copy.deepcopy(objective)(rows, [], generator_of_step(0))[0]
    with torch.autocast("cpu", torch.bfloat16):
        loss = objective(rows, [], generator_of_step(0))[0]
    assert loss.dtype == torch.float32 and torch.equal(loss, expected)


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", SYSTEMS)
def test_no_operation_waits_for_the_device(name):
    with Operators() as ran:
        build(name)(rows_of_step(0), [], generator_of_step(0))[0].backward()
    waits = ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.equal", "aten._unique2")
    assert "aten.mm.default" in ran.names or "aten.addmm.default" in ran.names
    assert not [op for op in ran.names if op.startswith(waits)]


def test_statistics():
    objective = BarlowTwins(Projector([D, 7, P]))
    terms = barlow_twins_loss(known_views()[:2])[1]
    x, y = ((z - z.mean(0)) / (z.var(0, unbiased=False) + 1e-5).sqrt() for z in known_views()[:2])
    c = x.T @ y / N
    line = objective.statistics(torch.randn(N, D), {name: value.item() for name, value in terms.items()})
    off = c[~torch.eye(P, dtype=bool)]
    assert line["off_diagonal_rms"] == pytest.approx(off.square().mean().sqrt().item(), rel=1e-9)
    assert terms["correlation"].item() == pytest.approx(c.diagonal().mean().item(), rel=1e-12)
    line = build("lejepa").statistics(torch.randn(40, D), {})
    assert line == {"sigreg_of_gaussians": sigreg_bounds(40)[0], "sigreg_of_one_point": sigreg_bounds(40)[1]}
    assert build("visreg").statistics(torch.randn(N, D), {}) == {"shape_of_gaussians": least_shape(N, 6, 256)}


LOGGED = {
    "barlow_twins": ("train_on_diagonal", "train_off_diagonal", "train_correlation", "off_diagonal_rms"),
    "vicreg": ("train_invariance", "train_variance", "train_covariance", "train_deviation"),
    "lejepa": ("train_sigreg", "train_invariance", "sigreg_of_gaussians", "sigreg_of_one_point"),
    "visreg": ("train_center", "train_scale", "train_shape", "train_invariance", "shape_of_gaussians"),
}


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_run(name, tmp_path, capsys):
    """With local crops and micro-batches; the loss falls, and the log has what a user of the system looks at."""
    sizes = {"hidden_dim": 32, "proj_dim": 16, "out_dim": None, "batch_size_per_gpu": 16, "accum_steps": 2}
    crops = {"local_crops_number": 1, "local_crops_size": 16}
    changes = {"objective": name, "epochs": 6, "warmup_epochs": 0, "lr": 0.01} | sizes | crops
    words = flags(write_pictures(tmp_path / "pictures"), tmp_path / name, **changes)
    main_cplearn.train(main_cplearn.get_args_parser().parse_args(words))
    lines = [line for line in read_log(tmp_path / name / "log.txt") if line["kind"] == "step"]
    assert all(math.isfinite(line[key]) for line in lines for key in LOGGED[name])
    assert lines[-1]["train_loss"] < lines[0]["train_loss"]
    told = capsys.readouterr().out
    assert "-32-32-16, batch norm over" in told and "loss: " in told
