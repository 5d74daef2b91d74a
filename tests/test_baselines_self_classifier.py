"""Self-Classifier against its equations written out on the joint batch, a known value, and one process against two."""

import argparse
import math

import numpy as np
import pytest
import torch

from baselines.self_classifier import SelfClassifier, SelfClassifierHead, nearest_neighbours, self_classifier_loss
from joint_steps import train_on_rows
from objective import Course
from runs import assert_a_checkpoints_head_is_rebuilt
from utils import UserError

N, D, P, K, VIEWS = 12, 10, 8, 24, 4
F64 = torch.float64


def known_scores(num_views=4):
    g = torch.Generator().manual_seed(11)
    common = torch.randn(12, 24, generator=g, dtype=F64)
    return list(0.3 * common + 0.1 * torch.randn(4, 12, 24, generator=g, dtype=F64))[:num_views]


def loss_as_written(scores, row_temp=0.1, col_temp=0.05, eps=1e-12, num_global=2):
    losses = []
    for i, target in enumerate(scores):
        for j, predicted in enumerate(scores):
            if i == j or (i >= num_global and j >= num_global):
                continue
            t = (target / col_temp).exp()
            t = t / t.sum(0)
            t = t / t.sum(1, keepdim=True)
            p = (predicted / row_temp).exp()
            p = p / p.sum(1, keepdim=True)
            p = p / p.sum(0) * p.shape[0] / p.shape[1]
            losses.append(-(t * (p + eps).log()).sum() / len(t))
    assert len(losses) in (2, 6, 10)
    return sum(losses) / len(losses)


def test_known_value():
    loss, _ = self_classifier_loss(known_scores(2))
    assert loss.item() == pytest.approx(1.8474971144024708, abs=1e-12)


@pytest.mark.parametrize("num_views", [2, 3, 4])
def test_loss_and_gradient_equal_the_equations(num_views):
    scores = [s.requires_grad_() for s in known_scores(num_views)]
    loss, terms = self_classifier_loss(scores, 0.2, 0.1, 1e-3)
    expected = loss_as_written(scores, 0.2, 0.1, 1e-3)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for got, want in zip(torch.autograd.grad(loss, scores), torch.autograd.grad(expected, scores), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-14)
    assert 0 < terms["entropy"] < math.log(24) and 0 < terms["target_entropy"] < math.log(24)


def test_trivial_states_have_loss_log_k():
    """The paper's claim: neither one class for all images, nor uniform predictions, lowers the loss."""
    uniform = [torch.zeros(12, 24, dtype=F64) for _ in range(2)]
    one_class = [0.5 * torch.eye(24, dtype=F64)[3].expand(12, 24) for _ in range(2)]
    for scores in (uniform, one_class):
        assert self_classifier_loss(scores)[0].item() == pytest.approx(math.log(24), rel=1e-6)


def test_classes_that_share_images_evenly_have_loss_0():
    scores = [5 * torch.eye(4, dtype=F64).repeat(3, 1) for _ in range(2)]
    assert self_classifier_loss(scores)[0].abs() < 1e-9


def test_targets_ignore_what_all_images_share():
    """A class's offset cancels in the softmax over images; predictions do feel it."""
    a, b = known_scores(2)
    offset = 0.1 * torch.randn(24, dtype=F64)
    _, terms = self_classifier_loss([a, b])
    _, shifted = self_classifier_loss([a + offset, b + offset])
    torch.testing.assert_close(shifted["target_entropy"], terms["target_entropy"])
    assert (shifted["entropy"] - terms["entropy"]).abs() > 1e-3


def test_scores_far_apart_stay_finite():
    scores = [(100 * s.float()).requires_grad_() for s in known_scores()]
    loss, _ = self_classifier_loss(scores)
    assert all(torch.isfinite(t).all() for t in [loss, *torch.autograd.grad(loss, scores)])


@pytest.mark.parametrize("bad", ["shape", "one view"])
def test_wrong_input_is_refused(bad):
    scores = known_scores()
    with pytest.raises(ValueError, match="expected"):
        self_classifier_loss(scores[:1] if bad == "one view" else [*scores, scores[0][:5]])


# ---- the objective ---------------------------------------------------------------------------------------------------


def build(batch_size=N, **changes):
    torch.manual_seed(3)
    args = argparse.Namespace(**SelfClassifier.flags | {"out_dim": K, "proj_dim": P, "seed": 0} | changes)
    if args.head == "mlp" and "hidden_dim" not in changes:
        args.hidden_dim = 14
    course = Course(torch.device("cpu"), batch_size, 1, 10, 10)
    return SelfClassifier.from_args(args, argparse.Namespace(embed_dim=D), course).double()


def rows_of_step(step):
    g = torch.Generator().manual_seed(step)
    return [torch.randn(2 * N, D, generator=g, dtype=F64) for _ in range(VIEWS)]


RECIPE = {"more_classes": [30, 7], "nn_queue": 60}  # full after three steps of 24 images
FORMS = {
    "mlp": {},
    "frozen_codes": {"head": "frozen_codes"},
    "recipe": RECIPE,
    "short queue": {"nn_queue": 10},
}


def train_in_process(_, form):
    return train_on_rows(build(**FORMS[form]), rows_of_step, 5)


@pytest.mark.parametrize("form", FORMS)
def test_two_processes_equal_one_on_the_joined_batch(run_in_processes, form):
    expected = train_in_process(0, form)
    for found in run_in_processes(train_in_process, form):
        for got, want in zip(found, expected, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12)


def test_a_resumed_run_is_the_undisturbed_one_bit_for_bit():
    expected = train_on_rows(build(**RECIPE), rows_of_step, 6)
    first = build(**RECIPE)
    train_on_rows(first, rows_of_step, 2)
    resumed = build(**RECIPE)
    resumed.load_state_dict(first.state_dict())  # the queue is not full yet
    got = train_on_rows(resumed, rows_of_step, 6, first=2)
    for a, b in zip(got, expected[-len(got) :], strict=True):
        assert (a == b).all()


def scores_by_hand(z, classifier):
    gains = classifier.weight_g[:, 0]
    return [torch.nn.functional.cosine_similarity(x[:, None], classifier.weight_v[None], dim=2) * gains for x in z]


def draw_gains(objective):
    for classifier in (objective.head.classifier, *objective.head.more_classifiers):
        classifier.weight_g.data.uniform_(0.5, 2)


def assert_same_gradients(got, want, inputs):
    torch.testing.assert_close(got, want, rtol=1e-10, atol=0)
    for ours, theirs in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(want, inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-12)


def test_loss_is_the_mean_over_classifiers_and_codes_are_the_first_ones():
    objective = build(more_classes=[30, 7])
    draw_gains(objective)
    rows = [x.requires_grad_() for x in rows_of_step(0)]
    loss, terms = objective(rows)
    z = objective.head(rows)
    first, second, third = (scores_by_hand(z, c) for c in (objective.head.classifier, *objective.head.more_classifiers))
    expected = (loss_as_written(first) + loss_as_written(second) + loss_as_written(third)) / 3
    assert_same_gradients(loss, expected, [*rows, *objective.parameters()])
    assert (objective.assignments == first[0].argmax(dim=1)).all() and objective.usage.shape == (K,)
    torch.testing.assert_close(terms["entropy"], self_classifier_loss(first)[1]["entropy"])
    assert objective.trivial_loss == pytest.approx((math.log(K) + math.log(30) + math.log(7)) / 3)


def test_view_0_is_its_nearest_neighbour_in_the_queue_once_that_is_full():
    """Steps 0, 1, 2 of 24 images fill a queue of 60; step 3 is the first with neighbours."""
    objective, past = build(**RECIPE), []
    draw_gains(objective)
    for step in range(5):
        rows = [x.requires_grad_() for x in rows_of_step(step)]
        loss, terms = objective(rows)
        z = objective.head(rows)
        own, cosines = z[0], [max([float(x @ y) for y in past[:60]], default=0.0) for x in z[0].detach()]
        if len(past) >= 60:
            z[0] = torch.stack([max(past[:60], key=lambda y, x=x: float(x @ y)) for x in own.detach()])
            assert terms["neighbour_cosine"].item() == pytest.approx(sum(cosines) / 24, rel=1e-12)
        assert (len(past) >= 60) == (step >= 3) and z[0].requires_grad == (step < 3)
        classifiers = objective.head.classifier, *objective.head.more_classifiers
        expected = sum(loss_as_written(scores_by_hand(z, c)) for c in classifiers) / 3
        assert_same_gradients(loss, expected, [*rows, *objective.parameters()])
        assert (objective.assignments == scores_by_hand([own], classifiers[0])[0].argmax(dim=1)).all()
        past = [*own.detach(), *past]
        assert objective.queued == 24 * (step + 1)
    torch.testing.assert_close(objective.queue, torch.stack(past[:60]))


def test_neighbours_of_more_rows_than_are_looked_up_at_once():
    g = torch.Generator().manual_seed(0)
    z, queue = (torch.nn.functional.normalize(torch.randn(n, 5, generator=g, dtype=F64)) for n in (600, 70))
    found, cosines = nearest_neighbours(z, queue)
    assert torch.equal(found, queue[torch.cdist(z, queue).argmin(dim=1)])
    torch.testing.assert_close(cosines, (z * found).sum(dim=1))


def test_on_frozen_codes_the_softmax_over_classes_is_cplearns_p():
    objective = build(head="frozen_codes")
    rows = rows_of_step(0)
    scores = [objective.head.logits(objective.head(x)) / 10 for x in rows]
    p = objective.head.logits(objective.head(rows[0])).softmax(dim=1)
    torch.testing.assert_close((scores[0] / 0.1).softmax(dim=1), p, rtol=1e-12, atol=0)
    torch.testing.assert_close(objective(rows)[0], loss_as_written(scores), rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("head", "changes"),
    [
        ("mlp", {"out_dim": 30, "proj_dim": 9, "hidden_dim": 15, "row_temp": 0.2, "col_temp": 0.1,
                 "more_classes": [30], "nn_queue": 10}),
        ("frozen_codes", {"out_dim": 30, "proj_dim": 9, "row_temp": 0.2, "col_temp": 0.1, "activation": "tanh",
                          "dictionary": "hadamard"}),
    ],
)  # fmt: skip
def test_every_flag_does_something(head, changes):
    changes = {"nothing": {}} | {name: {name: value} for name, value in changes.items()}
    losses = set()
    for change in changes.values():
        objective = build(head=head, **change)
        losses.add(sum(objective(rows_of_step(step))[0].item() for step in range(2)))  # a queue is full after the first
    assert len(losses) == len(changes)


def test_codes_storage_is_the_heads():
    assert build(head="frozen_codes", codes_storage="bits").head.dictionary.storage == "bits"


@pytest.mark.parametrize(
    ("head", "flag"),
    [
        ("mlp", {"dictionary": "hadamard"}),
        ("frozen_codes", {"hidden_dim": 99}),
        ("frozen_codes", {"more_classes": [9]}),
        ("frozen_codes", {"nn_queue": 9}),
    ],
)
def test_flags_of_the_other_head_are_refused(head, flag):
    with pytest.raises(UserError, match=f"--{next(iter(flag))} .*--head {head} has no such flag"):
        build(head=head, **flag)


def test_a_queue_longer_than_an_epoch_is_refused():
    assert len(build(nn_queue=120).queue) == 120
    with pytest.raises(UserError, match="--nn_queue 121: an epoch has 120 images"):
        build(nn_queue=121)


def test_widths_where_none_is_given():
    assert build(proj_dim=None).head.classifier.weight_v.shape == (K, 128)
    assert build(head="frozen_codes", proj_dim=None).head.dictionary.shape == (D, K)


def test_head_of_the_public_sizes_is_rebuilt_from_its_state():
    torch.manual_seed(0)
    head = SelfClassifierHead(384)
    matrices = [p for p in head.parameters() if p.ndim == 2]
    assert sorted(tuple(p.shape) for p in matrices) == [(128, 4096), (1000, 1), (1000, 128), (4096, 384)]
    assert head.classifier.weight_g.eq(1).all() and head.classifier.weight_g.requires_grad
    assert all(m.std().item() == pytest.approx(0.02, rel=0.02) for m in matrices if m.shape[1] > 1)
    assert all(p.eq(0).all() for name, p in head.named_parameters() if name.endswith("bias"))
    x = torch.randn(5, D, dtype=F64)
    for more in (None, [30], list(range(2, 14))):
        small = build(more_classes=more).head
        again = SelfClassifierHead.from_state_dict(D, small.state_dict()).double()
        again.load_state_dict(small.state_dict())
        assert again.more_classes == (more or [])
        assert (again.assign(x) == small.assign(x)).all() and again.training
        assert (small.scores(small.eval()([x]))[0][0].argmax(1) == again.assign(x)).all()


def test_more_classifiers_leave_the_first_as_it_is():
    alone, several = build().state_dict(), build(**RECIPE).state_dict()
    assert all(torch.equal(several[name], value) for name, value in alone.items())
    assert several.keys() - alone.keys() == {"queue", "queued"} | {
        f"head.more_classifiers.{i}.weight_{part}" for i in (0, 1) for part in "gv"
    }


def test_scores_are_cosines_times_gains_after_one_batch_norm_over_all_views():
    head, views = build().head, rows_of_step(0)
    (together,) = head([torch.cat(views)])
    assert torch.equal(torch.cat(head(views)), together)
    torch.testing.assert_close(together, torch.nn.functional.normalize(head.projector([torch.cat(views)])[0]))
    (scores,) = head.scores([together])[0]
    torch.testing.assert_close(scores, scores_by_hand([together], head.classifier)[0])
    head.classifier.weight_g.data *= 3
    torch.testing.assert_close(head.scores([together])[0][0], 3 * scores)


@pytest.mark.parametrize("form", ["mlp", "frozen_codes", "recipe"])
def test_statistics_and_description(form):
    objective = build(**FORMS[form])
    loss, terms = objective(rows_of_step(0))
    averages = {"loss": loss.item()} | {k: v.item() for k, v in terms.items()}
    line = objective.statistics(rows_of_step(0)[0], averages)
    assert 0 < line["entropy_share"] <= 1 and line["gap_share"] > 0 and line["images_counted"] == 24
    assert line["queued"] == (24 if form == "recipe" else None)
    text = " ".join(objective.describe())
    assert ("CPLearn's p" in text) == (form == "frozen_codes") and ("--nn_queue" in text) == (form != "recipe")
    assert ("among 60 past images" in text) == (", and 30 beside them, and 7" in text) == (form == "recipe")


@pytest.mark.parametrize("changes", [{"hidden_dim": 32}, {"hidden_dim": 32, "nn_queue": 16}, {"head": "frozen_codes"}])
def test_a_checkpoints_head_names_the_same_codes(tmp_path, changes):
    more = ["--more_classes", "30", "7"] if "nn_queue" in changes else []
    assert_a_checkpoints_head_is_rebuilt(tmp_path, *more, objective="self_classifier", max_steps=2, **changes)
