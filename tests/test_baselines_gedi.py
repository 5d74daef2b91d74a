"""GEDI, with and without its generative term: equations written out, known values, and virtual processes."""

import argparse
import contextlib
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from baselines.gedi import GEDI, GEDIHead, GEDINoGen, Sampling, evaluating, gedi_no_gen_loss, sgld
from cplearn_head import cplearn_loss
from joint_steps import assert_near, over_processes, steps_in_float64
from objective import Course
from runs import assert_a_checkpoints_head_is_rebuilt, flags, write_pictures
from utils import UserError, all_gather_rows, all_reduce_mean, rank, world_size

B, D, K, VIEWS = 6, 10, 24, 3
SIDE = 5
F64 = torch.float64


def known_logits(num_views=4):
    g = torch.Generator().manual_seed(11)
    common = torch.randn(12, 24, generator=g, dtype=F64)
    return list(10 * (0.3 * common + 0.1 * torch.randn(4, 12, 24, generator=g, dtype=F64)))[:num_views]


def test_known_values():
    loss, _ = gedi_no_gen_loss(known_logits(2))
    assert loss.item() == pytest.approx(2.1639926142791377, abs=1e-12)
    loss, _ = gedi_no_gen_loss(known_logits(2), beta=0.1, authors_form=True)
    assert loss.item() == pytest.approx(43.397548305896535, abs=1e-11)


@pytest.mark.parametrize("prior", ["kl", "ce"])
@pytest.mark.parametrize("num_views", [2, 4])
def test_the_papers_form_is_cplearns_loss_on_these_logits(prior, num_views):
    logits = [s.requires_grad_() for s in known_logits(num_views)]
    loss, terms = gedi_no_gen_loss(logits, 0.4, prior)
    expected, expected_terms = cplearn_loss(logits, torch.eye(24, dtype=F64), 1.0, 0.4, prior)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for name in terms:
        torch.testing.assert_close(terms[name], expected_terms[name], rtol=1e-12, atol=0)
    for got, want in zip(torch.autograd.grad(loss, logits), torch.autograd.grad(expected, logits), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-15)


def test_the_authors_form_written_out():
    logits = [s.requires_grad_() for s in known_logits(2)]
    loss, terms = gedi_no_gen_loss(logits, 0.3, authors_form=True)
    p0, p1 = (s.exp() / s.exp().sum(1, keepdim=True) for s in logits)
    expected = -p0.mean(0).log().sum() / 2 - 0.3 * (p1 * p0.log()).sum() / len(p0) / 2
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(loss, (terms["prior"] + 0.3 * terms["invariance"]) / 2)
    for got, want in zip(torch.autograd.grad(loss, logits), torch.autograd.grad(expected, logits), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("bad", ["shape", "one view", "prior", "four views in the authors' form"])
def test_wrong_input_is_refused(bad):
    logits = known_logits()
    views = {"shape": [*logits, logits[0][:5]], "one view": logits[:1]}.get(bad, logits)
    with pytest.raises(ValueError, match="expected"):
        gedi_no_gen_loss(views, prior="reverse" if bad == "prior" else "kl", authors_form=bad.startswith("four"))


# ---- sampling --------------------------------------------------------------------------------------------------------


def test_chains_follow_the_gradient_written_out():
    """f = -a |x - c|^2 / 2: each step is x + step (-a (x - c)) + std noise."""
    start = torch.randn(4, 1, 3, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    ends = sgld(lambda x: -0.3 * (x - 2).square().flatten(1).sum(1) / 2, start, 5, 0.5, 0.1,
                torch.Generator().manual_seed(1))  # fmt: skip
    x, g = start.clone(), torch.Generator().manual_seed(1)
    for _ in range(5):
        x = x - 0.5 * 0.3 * (x - 2) + 0.1 * torch.randn(x.shape, generator=g, dtype=F64)
    torch.testing.assert_close(ends, x, rtol=1e-12, atol=1e-14)
    assert not ends.requires_grad and not start.requires_grad


def test_chains_come_to_their_stationary_distribution():
    """x <- (1 - s) x + std noise has variance std^2 / (1 - (1 - s)^2)."""
    g = torch.Generator().manual_seed(2)
    ends = sgld(lambda x: -x.square().flatten(1).sum(1) / 2, torch.zeros(2000, 1, 2, 2), 60, 0.1, 0.4, g)
    assert ends.mean().abs() < 0.05
    assert ends.var().item() == pytest.approx(0.16 / (1 - 0.81), rel=0.05)


# ---- the objectives --------------------------------------------------------------------------------------------------


class Backbone(nn.Module):
    """Convolution with batch norm and dropout: evaluation mode is another function."""

    embed_dim = D

    def __init__(self, norm=False):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4) if norm else nn.Identity()
        self.drop = nn.Dropout(0.5 if norm else 0)
        self.out = nn.Linear(4 * SIDE * SIDE, D)

    def forward(self, x):
        return self.out(self.drop(self.norm(self.conv(x)).tanh()).flatten(1))


SMALL = {
    "out_dim": K, "hidden_dim": 14, "img_size": SIDE, "in_chans": 2, "mean": (0.4, 0.5), "std": (0.2, 0.3),
    "local_crops_number": 0, "grad_checkpointing": False, "replay_size": 64, "sgld_steps": 3, "sgld_step_size": 0.5,
}  # fmt: skip


def build(kind=GEDI, accum_steps=1, batch_size=B, **changes):
    torch.manual_seed(3)
    args = argparse.Namespace(**kind.flags | SMALL | changes)
    course = Course(torch.device("cpu"), batch_size, accum_steps, 1, 10)
    return kind.from_args(args, argparse.Namespace(embed_dim=D), course).double()


def views_of(step, place):
    g = torch.Generator().manual_seed(1000 * step + place)
    return [torch.randn(B, 2, SIDE, SIDE, generator=g, dtype=F64) for _ in range(VIEWS)]


def halves_of_step(objective, wrapped, backbone, step, parts):
    """Both halves of a step of this process's `parts` micro-batches; returns loss, terms, rows and what is prepared."""
    objective.before_step(step, backbone)
    rows, kept = [], []
    for place in range(rank() * parts, (rank() + 1) * parts):
        views = views_of(step, place)
        with torch.no_grad():
            kept.append(objective.prepare(backbone, views, torch.Generator().manual_seed(10**6 + 1000 * step + place)))
        rows.append(objective.embed(backbone, views, kept[-1]))
    rows, kept = ([torch.cat(part) for part in zip(*parts, strict=True)] for parts in (rows, kept))
    for row in rows:
        row.retain_grad()
    return *wrapped(rows, kept), rows, kept


def train(kind, parts, steps, **changes):
    """All that must not depend on how 2 virtual processes are shared."""
    objective = build(kind, parts, **changes)
    torch.manual_seed(4)
    backbone = Backbone().double()
    several = world_size() > 1
    wrapped = DistributedDataParallel(objective, broadcast_buffers=False) if several else objective
    found = []
    for step in range(steps):
        loss, terms, rows, kept = halves_of_step(objective, wrapped, backbone, step, parts)
        loss.backward()
        found += [all_reduce_mean(t.detach()) for t in (loss, *terms.values())]
        found += [all_gather_rows(row.grad) / world_size() for row in rows] + [all_gather_rows(k) for k in kept]
        for parameter in backbone.parameters():
            parameter.grad = all_reduce_mean(parameter.grad)
        for parameter in [*objective.parameters(), *backbone.parameters()]:
            found.append(parameter.grad.clone())
            parameter.data -= 0.1 * parameter.grad
            parameter.grad = None
        found += [b.clone().double() for b in objective.buffers()]
    return [t.numpy() for t in [*found, *(p.detach() for p in objective.parameters())]]


KINDS = {
    "gedi": (GEDI, {"replay_size": 20, "reinit": 0.3}),
    "no gen, ce, two layers": (GEDINoGen, {"prior": "ce", "hidden_layers": 2}),
}


def train_in_process(_, name):
    kind, changes = KINDS[name]
    return train(kind, 2 // world_size(), 4, **changes)


@pytest.mark.parametrize("name", KINDS)
def test_two_processes_equal_one_with_two_micro_batches(run_in_processes, name):
    expected = train_in_process(0, name)
    for found in run_in_processes(train_in_process, name):
        for got, want in zip(found, expected, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12)


def test_in_the_training_loop_two_processes_of_two_micro_batches_are_four(tmp_path, run_in_processes):
    folder = write_pictures(tmp_path / "pictures", 48)
    small = {"objective": "gedi", "hidden_dim": 32, "replay_size": 40, "sgld_steps": 2, "num_workers": 0,
             "optimizer": "sgd", "lr": 1.0, "warmup_epochs": 0, "batch_size_per_gpu": 4}  # fmt: skip
    expected = steps_in_float64(0, flags(folder, tmp_path / "one", accum_steps=4, **small), 4)
    found = run_in_processes(steps_in_float64, flags(folder, tmp_path / "two", accum_steps=2, **small), 4)
    assert_near(over_processes(found), expected, but=["state objective.usage"])  # usage is summed in another order


def test_micro_batches_never_meet_in_a_slot_and_chains_go_on():
    objective, backbone = build(accum_steps=3, replay_size=3 * B + 2, reinit=0.0, sgld_steps=1), Backbone().double()
    for step in range(3):
        before = objective.replay.clone()
        _, _, _, (_, samples, slots) = halves_of_step(objective, objective, backbone, step, 3)
        assert len(set(slots.tolist())) == 3 * B
        assert [int(s) // B for s in slots] == [0] * B + [1] * B + [2] * B
        torch.testing.assert_close(objective.replay[slots], samples)
        moved = samples - before[slots]
        assert 0 < moved.abs().mean() < 0.2  # one step from where the chain was: far less than between images
        assert torch.equal(objective.replay[3 * B :], before[3 * B :])


def test_preparing_leaves_model_and_gradients_alone():
    objective, backbone = build(), Backbone(norm=True).double()
    backbone.conv.eval()  # each part goes back to its own mode
    modes = [m.training for m in [*backbone.modules(), *objective.modules()]]
    state = {k: v.clone() for k, v in (backbone.state_dict() | objective.state_dict()).items()}
    views = views_of(0, 0)
    prepared = [objective.prepare(backbone, views, torch.Generator().manual_seed(5)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*prepared, strict=True))
    assert modes == [m.training for m in [*backbone.modules(), *objective.modules()]]
    for name, value in (backbone.state_dict() | objective.state_dict()).items():
        assert torch.equal(value, state[name]), name
    assert all(p.grad is None for p in [*backbone.parameters(), *objective.parameters()])
    assert not any(t.requires_grad for t in [*prepared[0], *views])


def test_modes_come_back_after_an_error():
    backbone = Backbone()
    with contextlib.suppress(ZeroDivisionError), evaluating(backbone):
        assert not backbone.drop.training
        raise ZeroDivisionError
    assert all(m.training for m in backbone.modules())


def test_samples_and_noise_are_those_of_images_in_minus_1_to_1():
    """Chains of the whole model in evaluation mode, from slots of the replay buffer, written out."""
    objective, backbone = build(reinit=0.0, sgld_noise=0.0), Backbone(norm=True).double()
    views = views_of(0, 0)
    noisy, samples, slots = objective.prepare(backbone, views, torch.Generator().manual_seed(5))
    mean, std = (torch.tensor(SMALL[name]).view(2, 1, 1) for name in ("mean", "std"))
    real = (views[0] * std + mean) * 2 - 1
    noise = torch.randn(real.shape, generator=torch.Generator().manual_seed(5), dtype=F64)
    torch.testing.assert_close(noisy, real + 0.03 * noise)
    still, x = build().head.eval(), objective.replay[slots].clone()
    backbone.eval()
    for _ in range(3):
        x.requires_grad_()
        scores = still([backbone(((x + 1) / 2 - mean) / std)])[0]
        (gradient,) = torch.autograd.grad(scores.exp().sum(1).log().sum(), x)
        x = (x + 0.5 * gradient).detach()
    torch.testing.assert_close(samples, x, rtol=1e-10, atol=1e-12)


def test_the_generative_term_is_of_one_function_and_raises_real_images_above_samples():
    objective, backbone = build(weight_gen=2.0), Backbone(norm=True).double()
    alone = build(GEDINoGen, beta=1.0)
    loss, terms, rows, (noisy, samples, _) = halves_of_step(objective, objective, backbone, 0, 1)
    expected, _ = alone(rows[:VIEWS])
    torch.testing.assert_close(loss, expected + 2 * terms["generative"], rtol=1e-12, atol=0)
    with evaluating(backbone):
        again = [backbone(objective._to_views(images)) for images in (noisy, samples)]
    for features, row in zip(again, rows[VIEWS:], strict=True):
        torch.testing.assert_close(features, row, rtol=1e-12, atol=1e-14)
    for name in ("running_mean", "running_var"):  # views alone move the running statistics
        torch.testing.assert_close(getattr(objective.head.mlp[1], name), getattr(alone.head.mlp[1], name))
    frozen = alone.head.eval()
    of_noisy, of_samples = (frozen([x])[0].exp().sum(1).log().mean() for x in rows[VIEWS:])
    torch.testing.assert_close(terms["generative"], of_samples - of_noisy, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(terms["log_density"], of_noisy, rtol=1e-12, atol=0)
    got = torch.autograd.grad(loss, [*rows, *objective.head.parameters()])
    want = torch.autograd.grad(expected + 2 * (of_samples - of_noisy), [*rows, *frozen.parameters()])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


def test_chains_begin_anew_as_often_as_asked():
    objective = build(batch_size=400, replay_size=400, reinit=0.25)
    objective.replay.fill_(7)
    like = torch.zeros(400, 2, SIDE, SIDE, dtype=F64)
    starts = objective._starts(torch.arange(400), like, torch.Generator().manual_seed(0))
    anew = starts[:, 0, 0, 0] != 7
    assert anew.double().mean().item() == pytest.approx(0.25, abs=0.06)
    assert starts[anew].abs().max() <= 1 and starts[anew].var().item() == pytest.approx(1 / 3, rel=0.05)
    assert (starts[~anew] == 7).all()


def test_every_flag_does_something():
    same = {"local_crops_number": 0}
    changes = {
        "out_dim": 30, "hidden_dim": 15, "hidden_layers": 2, "head_temp": 0.2, "beta": 0.5, "prior": "ce",
        "weight_gen": 2.0, "sgld_steps": 2, "sgld_step_size": 1.0, "sgld_noise": 0.1, "replay_size": 80, "reinit": 0.9,
    }  # fmt: skip
    assert changes.keys() | {"authors_form"} == GEDI.flags.keys()
    changes = {"nothing": same} | {name: {name: value} for name, value in changes.items()}
    backbone = Backbone().double()
    losses = {halves_of_step(o, o, backbone, 0, 1)[0].item() for o in (build(**c) for c in changes.values())}
    assert len(losses) == len(changes)
    features = [torch.randn(B, D, dtype=F64) for _ in range(2)]
    assert build(GEDINoGen)(features)[0] != build(GEDINoGen, authors_form=True)(features)[0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"img_size": 96}, "--img_size 96: .* at most 64 px"),
        ({"replay_size": B - 1}, f"--replay_size {B - 1}: expected at least {B}"),
        ({"grad_checkpointing": True}, "--grad_checkpointing: .*leave it out"),
        ({"authors_form": True, "local_crops_number": 2}, "--local_crops_number 2: .*expected 0"),
    ],
)
def test_what_cannot_be_is_one_line(changes, words):
    with pytest.raises(UserError, match=words):
        build(**changes)


def test_head_is_rebuilt_from_its_state():
    for layers in (1, 2):
        head = GEDIHead(D, K, 14, layers).double()
        assert len([p for p in head.parameters() if p.ndim == 2]) == layers + 1
        again = GEDIHead.from_state_dict(D, head.state_dict()).double()
        again.load_state_dict(head.state_dict())
        x = torch.randn(5, D, dtype=F64)
        assert (again.assign(x) == head.assign(x)).all() and again.training
        assert (head.eval()([x])[0].argmax(1) == again.assign(x)).all()


def test_statistics_and_description():
    objective = build()
    loss, terms, rows, _ = halves_of_step(objective, objective, Backbone().double(), 0, 1)
    averages = {"loss": loss.item()} | {name: value.item() for name, value in terms.items()}
    line = objective.statistics(rows[0].detach(), averages)
    assert 1 <= line["batch_perplexity"] <= K and 0 < line["entropy_share"] <= 1 and 0 <= line["outside"] < 0.5
    assert line["information"] == pytest.approx(math.log(K) - averages["prior"] - averages["entropy"])
    text = " ".join(objective.describe())
    assert "no public source" in text and "--beta 1: from 1 on" in text
    assert "from 1 on" not in " ".join(build(GEDINoGen).describe())
    objective.authors_form = True
    assert "batch_perplexity" not in objective.statistics(rows[0].detach(), averages)
    assert "0.042 in units of the paper's" in " ".join(objective.describe())
    assert objective.sampling == Sampling(3, 0.5)


def test_a_few_steps_keep_the_sampler_in_bounds():
    """Chains of noise: real images of one grey are told from samples, and nothing runs away."""
    torch.manual_seed(0)
    objective, backbone = build(replay_size=64, sgld_steps=5), Backbone().double()
    optimizer = torch.optim.AdamW([*objective.parameters(), *backbone.parameters()], lr=1e-3)
    for step in range(60):
        loss, terms, _, _ = halves_of_step(objective, objective, backbone, step, 1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.isfinite(loss) and terms["generative"].abs() < 5 and objective.replay.abs().max() < 5


@pytest.mark.parametrize("objective", ["gedi_no_gen", "gedi"])
def test_a_checkpoints_head_names_the_same_codes(tmp_path, objective):
    assert_a_checkpoints_head_is_rebuilt(tmp_path, objective=objective, max_steps=1, hidden_dim=32, hidden_layers=2)
