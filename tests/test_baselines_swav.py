"""SwAV against its equations written out on the joint batch, known values, and one process against two."""

import argparse
import math

import numpy as np
import pytest
import torch

from baselines.swav import SwAV, SwAVHead, sinkhorn, swav_loss
from joint_steps import train_on_rows
from objective import Course
from runs import assert_a_checkpoints_head_is_rebuilt

N, D, P, K, VIEWS = 12, 10, 8, 24, 4
F64 = torch.float64


def unit(x):
    return x / x.norm(dim=1, keepdim=True)


def known_scores(num_views=4):
    g = torch.Generator().manual_seed(7)
    common = torch.randn(12, 16, generator=g, dtype=F64)
    z = common + 0.5 * torch.randn(4, 12, 16, generator=g, dtype=F64)
    prototypes = torch.randn(24, 16, generator=torch.Generator().manual_seed(13), dtype=F64)
    return [unit(x) @ unit(prototypes).T for x in z[:num_views]]


def sinkhorn_as_written(scores, epsilon, iterations):
    """Algorithm in the paper's appendix: a K x n matrix of sum 1, rows then columns."""
    q = (scores / epsilon).exp().T
    q = q / q.sum()
    for _ in range(iterations):
        q = q / q.sum(1, keepdim=True) / q.shape[0]
        q = q / q.sum(0, keepdim=True) / q.shape[1]
    return (q * q.shape[1]).T


def loss_as_written(scores, temperature=0.1, epsilon=0.05, iterations=3, num_global=2, queue=None):
    total, pairs = 0.0, 0
    for a in range(num_global):
        rows = scores[a] if queue is None else torch.cat([queue[a], scores[a]])
        q = sinkhorn_as_written(rows.detach(), epsilon, iterations)[-len(scores[a]) :]
        for v in range(len(scores)):
            if v != a:
                p = (scores[v] / temperature).exp()
                total -= (q * (p / p.sum(1, keepdim=True)).log()).sum() / len(q)
                pairs += 1
    return total / pairs


def test_known_value():
    loss, _ = swav_loss(known_scores(2))
    assert loss.item() == pytest.approx(2.519434422025672, abs=1e-12)


@pytest.mark.parametrize(("num_views", "queued"), [(2, 0), (4, 0), (4, 7)])
def test_loss_and_gradient_equal_the_equations(num_views, queued):
    scores = [s.requires_grad_() for s in known_scores(num_views)]
    queue = [0.3 * torch.randn(queued, 24, dtype=F64) for _ in range(2)] if queued else None
    loss, terms = swav_loss(scores, 0.2, 0.1, num_iterations=4, queue_scores=queue)
    expected = loss_as_written(scores, 0.2, 0.1, 4, queue=queue)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for got, want in zip(torch.autograd.grad(loss, scores), torch.autograd.grad(expected, scores), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-14)
    assert 0 < terms["target_entropy"] < terms["entropy"] < math.log(24)


def test_images_have_sum_1_and_prototypes_tend_to_equal_shares():
    scores = known_scores()[0]
    assert (sinkhorn(scores).sum(dim=1) - 1).abs().max() < 1e-14
    shares = sinkhorn(scores, num_iterations=2000).sum(dim=0)
    torch.testing.assert_close(shares, torch.full_like(shares, 12 / 24), rtol=1e-6, atol=0)


def test_targets_ignore_a_prototypes_offset_and_no_epsilon_overflows():
    scores = known_scores()[0]
    many = 500  # each prototype's division takes off what is common to all images
    shifted = sinkhorn(scores + 0.1 * torch.randn(24, dtype=F64), num_iterations=many)
    torch.testing.assert_close(shifted, sinkhorn(scores, num_iterations=many), rtol=1e-5, atol=1e-8)
    hard = sinkhorn(scores.float(), epsilon=1e-3)
    assert torch.isfinite(hard).all() and (hard.sum(dim=1) - 1).abs().max() < 1e-5


def test_local_crops_are_predicted_but_never_targets():
    a, b, c, d = known_scores()
    loss = swav_loss([a, b, c, d])[0]
    torch.testing.assert_close(loss, swav_loss([b, a, d, c])[0])
    assert (loss - swav_loss([a, c, b, d])[0]).abs() > 1e-6


@pytest.mark.parametrize("bad", ["shape", "one view"])
def test_wrong_input_is_refused(bad):
    scores = known_scores()
    with pytest.raises(ValueError, match="expected"):
        swav_loss(scores[:1] if bad == "one view" else [*scores, scores[0][:5]])


# ---- the objective ---------------------------------------------------------------------------------------------------

ARGS = argparse.Namespace(**SwAV.flags | {"out_dim": K, "proj_dim": P, "hidden_dim": 14})


def build(steps_per_epoch=1, **changes):
    torch.manual_seed(3)
    args = argparse.Namespace(**vars(ARGS) | changes)
    course = Course(torch.device("cpu"), N, 1, steps_per_epoch, 10)
    return SwAV.from_args(args, argparse.Namespace(embed_dim=D), course).double()


def rows_of_step(step):
    g = torch.Generator().manual_seed(step)
    return [torch.randn(2 * N, D, generator=g, dtype=F64) for _ in range(VIEWS)]


QUEUES = {"none": {}, "long": {"queue_length": 60, "epoch_queue_starts": 1}, "short": {"queue_length": 10}}


def train_in_process(_, name):
    return train_on_rows(build(freeze_prototypes_epochs=1, **QUEUES[name]), rows_of_step, 5)


@pytest.mark.parametrize("name", QUEUES)
def test_two_processes_equal_one_on_the_joined_batch(run_in_processes, name):
    expected = train_in_process(0, name)
    for found in run_in_processes(train_in_process, name):
        for got, want in zip(found, expected, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12)


def test_queue_counts_once_it_is_full_and_holds_the_latest_images():
    """Steps 1, 2, 3 of 24 images fill a queue of 60; step 4 is the first with it in Sinkhorn."""
    objective = build(queue_length=60, epoch_queue_starts=1)
    past = torch.zeros(0, 2, P, dtype=F64)
    for step in range(6):
        objective.before_step(step, None)
        loss, _ = objective(rows_of_step(step))
        with torch.no_grad():
            views = objective.head(rows_of_step(step))
        scores = [objective.head.scores(z) for z in views]
        full = [objective.head.scores(past[:60, a]) for a in range(2)] if len(past) >= 60 else None
        torch.testing.assert_close(loss, loss_as_written(scores, queue=full), rtol=1e-10, atol=0)
        assert (full is not None) == (step >= 4)
        if step >= 1:
            past = torch.cat([torch.stack(views[:2], dim=1), past])
    torch.testing.assert_close(objective.queue, past[:60])


def test_a_resumed_run_is_the_undisturbed_one_bit_for_bit():
    through = build(queue_length=60)
    expected = train_on_rows(through, rows_of_step, 6)
    first = build(queue_length=60)
    train_on_rows(first, rows_of_step, 2)
    resumed = build(queue_length=60)
    resumed.load_state_dict(first.state_dict())  # the queue is not full yet
    got = train_on_rows(resumed, rows_of_step, 6, first=2)
    for a, b in zip(got, expected[-len(got) :], strict=True):
        assert (a == b).all()


def test_prototypes_are_frozen_then_move_and_keep_length_1():
    objective = build(steps_per_epoch=2, freeze_prototypes_epochs=1)
    objective.head.normalise_prototypes()  # in float64
    drawn = objective.head.prototypes.weight.detach().clone()
    torch.testing.assert_close(drawn.norm(dim=1), torch.ones(K, dtype=F64))
    train_on_rows(objective, rows_of_step, 2)
    torch.testing.assert_close(objective.head.prototypes.weight.detach(), drawn, rtol=1e-14, atol=1e-15)
    train_on_rows(objective, rows_of_step, 4, first=2)
    moved = objective.head.prototypes.weight.detach()
    assert (moved - drawn).abs().max() > 1e-4
    torch.testing.assert_close(moved.norm(dim=1), torch.ones(K, dtype=F64))


def test_every_flag_does_something():
    changes = {
        "out_dim": 30, "proj_dim": 9, "hidden_dim": 15, "temperature": 0.2, "epsilon": 0.1, "sinkhorn_iterations": 1,
        "queue_length": 10, "freeze_prototypes_epochs": 3,
    }  # fmt: skip
    changes = {"nothing": {}} | {name: {name: value} for name, value in changes.items()}
    changes["epoch_queue_starts"] = {"queue_length": 10, "epoch_queue_starts": 0}
    ends = {name: train_on_rows(build(**change), rows_of_step, 3)[-7:] for name, change in changes.items()}
    weights = {name: b"".join(t.tobytes() for t in end) for name, end in ends.items()}
    assert set(SwAV.flags) <= weights.keys()
    assert weights.pop("queue_length") == weights["nothing"]  # it begins in epoch 15
    assert len(set(weights.values())) == len(weights)


def test_head_of_the_public_sizes_is_rebuilt_from_its_state():
    head = SwAVHead(384)
    sizes = {name: tuple(p.shape) for name, p in head.named_parameters()}
    assert [s for s in sizes.values() if len(s) == 2] == [(2048, 384), (128, 2048), (3000, 128)]
    assert "prototypes.bias" not in sizes and sizes["projector.mlp.3.bias"] == (128,)
    small = build().head
    again = SwAVHead.from_state_dict(D, small.state_dict()).double()
    again.load_state_dict(small.state_dict())
    x = torch.randn(5, D, dtype=F64)
    assert (again.assign(x) == small.assign(x)).all() and again.training
    assert (small.eval().scores(small([x])[0]).argmax(1) == again.assign(x)).all()


def test_one_batch_norm_over_all_views():
    head = build().head
    views = rows_of_step(0)
    assert torch.equal(torch.cat(head(views)), torch.cat(head([torch.cat(views)])))


def test_statistics_and_description():
    objective = build(queue_length=60, epoch_queue_starts=0)
    objective.before_step(0, None)
    loss, terms = objective(rows_of_step(0))
    line = objective.statistics(rows_of_step(0)[0], {"loss": loss.item()} | {k: v.item() for k, v in terms.items()})
    assert line["disagreement"] > 0 and 0 < line["entropy_share"] <= 1 and line["queued"] == 24
    assert line["images_counted"] == 24
    assert "60 past images" in " ".join(objective.describe())


def test_a_checkpoints_head_names_the_same_codes(tmp_path):
    assert_a_checkpoints_head_is_rebuilt(tmp_path, objective="swav", max_steps=1, hidden_dim=32, queue_length=40)
