"""Linear classifiers against scikit-learn, autograd in float64, plain torch loops and counts made by hand."""

import numpy as np
import pytest
import sklearn.linear_model
import sklearn.metrics
import torch
import torch.nn.functional as F

from data import epoch_order
from evaluation import linear_probe
from evaluation.linear_probe import draw_labelled, fit_adam, fit_few, fit_grid, fit_selected, hold_out, predict, scores
from utils import UserError

NUM_CLASSES = 7


def correlated(num, seed, dim=12):
    """Overlapping classes in correlated features of unequal scale and with offsets; one feature is constant."""
    generator = torch.Generator().manual_seed(seed)
    fixed = torch.Generator().manual_seed(99)
    centres, mixing = torch.randn(NUM_CLASSES, dim, generator=fixed), torch.randn(dim, dim, generator=fixed)
    labels = torch.randint(NUM_CLASSES, (num,), generator=generator)
    x = (centres[labels] + 1.4 * torch.randn(num, dim, generator=generator)) @ mixing
    x = x * torch.logspace(-2, 1, dim) + torch.linspace(-5, 5, dim)
    x[:, 3] = 2.5
    return x, labels


def standardised(x, train):
    x, train = x.double().numpy(), train.double().numpy()
    deviation = train.std(axis=0)
    return (x - train.mean(axis=0)) / np.where(deviation > 1e-6, deviation, 1)


def test_scikit_learn_s_optimum_is_reached():
    (train, labels), (test, test_labels) = correlated(1500, 0), correlated(1000, 1)
    classifier = fit_selected(train, labels, NUM_CLASSES, [0.3], [0.0]).classifier
    theirs = sklearn.linear_model.LogisticRegression(C=1e4, tol=1e-8, max_iter=20_000)
    theirs.fit(standardised(train, train), labels)
    expected = 100 * theirs.score(standardised(test, train), test_labels)
    assert 60 < expected < 95  # neither trivial nor chance
    assert scores(predict(test, classifier), test_labels, NUM_CLASSES)["top1"] == pytest.approx(expected, abs=0.5)
    least = sklearn.metrics.log_loss(labels, theirs.predict_proba(standardised(train, train)))
    assert least < F.cross_entropy(F.linear(train, *classifier), labels) < 1.05 * least


def test_a_grid_is_sgd_written_out():
    """Autograd, torch's optimizer and its scheduler, in float64, on features whitened by a Cholesky factor: another
    basis of the same space, which changes no logit, as neither SGD nor the penalty prefers a direction."""
    x, labels = correlated(640, 2)
    labels = torch.where(labels > 2, 0, labels)  # unequal classes: their biases matter, and have no penalty
    pairs, chosen = [(0.5, 0.0), (0.02, 0.3)], torch.arange(0, 640, 2)
    ours = fit_grid(x, labels, NUM_CLASSES, pairs, chosen, epochs=2, seed=4)
    z = standardised(x, x)
    factor = np.linalg.cholesky(np.linalg.inv(z.T @ z / len(z) + linear_probe.RIDGE * np.eye(12)))
    z = torch.from_numpy(z @ factor)
    for (lr, weight_decay), classifier in zip(pairs, ours, strict=True):
        layer = torch.nn.Linear(12, NUM_CLASSES, dtype=torch.float64)
        for parameter in layer.parameters():
            torch.nn.init.zeros_(parameter)
        groups = [{"params": [layer.weight], "weight_decay": weight_decay}, {"params": [layer.bias]}]
        batch_size = 6  # a fiftieth of 320
        optimizer = torch.optim.SGD(groups, lr * batch_size / 256, momentum=0.9)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=2 * 54)
        for epoch in range(2):
            for rows in chosen[epoch_order(4, epoch, 320)].split(batch_size):
                optimizer.zero_grad()
                F.cross_entropy(layer(z[rows]), labels[rows]).backward()
                optimizer.step()
                cosine.step()
        torch.testing.assert_close(F.linear(x, *classifier), layer(z).float(), rtol=1e-3, atol=1e-3)
        assert layer(z).std() > 0.03


def test_a_grid_is_each_fitted_alone():
    x, labels = correlated(600, 4)
    pairs, chosen = [(1.0, 0.0), (0.1, 1e-2), (0.01, 1e-4)], torch.arange(500)
    together = fit_grid(x, labels, NUM_CLASSES, pairs, chosen, epochs=3)
    for pair, classifier in zip(pairs, together, strict=True):
        (alone,) = fit_grid(x, labels, NUM_CLASSES, [pair], chosen, epochs=3)
        for ours, theirs in zip(classifier, alone, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


def test_the_choice_is_by_held_out_images_and_the_last_fit_by_all():
    x, labels = correlated(800, 5)
    found = fit_selected(x, labels, NUM_CLASSES, [1e-3, 1e-1], [0.0, 3.0], epochs=2, seed=3)
    held_out = hold_out(labels, seed=3)
    seen = (~held_out).nonzero()[:, 0]
    pairs = [(entry["lr"], entry["weight_decay"]) for entry in found.settings["grid"]]
    assert pairs == [(1e-3, 3.0), (1e-3, 0.0), (1e-1, 3.0), (1e-1, 0.0)]
    wrong = torch.where(held_out, (labels + 1) % NUM_CLASSES, labels)  # held-out labels are not trained on
    classifiers = fit_grid(x, wrong, NUM_CLASSES, pairs, seen, epochs=2, seed=3)
    for entry, (weight, bias) in zip(found.settings["grid"], classifiers, strict=True):
        right = (x[held_out] @ weight.T + bias).argmax(dim=1) == labels[held_out]
        assert entry["held_out_top1"] == pytest.approx(100 * right.double().mean().item())
    best = max(found.settings["grid"], key=lambda entry: entry["held_out_top1"])
    assert {name: found.settings[name] for name in best} == best
    pair = (best["lr"], best["weight_decay"])
    (last,) = fit_grid(x, labels, NUM_CLASSES, [pair], torch.arange(800), epochs=2, seed=3)
    assert all(map(torch.equal, found.classifier, last))


def test_pieces_change_nothing(monkeypatch):
    x, labels = correlated(500, 3)
    found = []
    for rows in (8192, 64):
        monkeypatch.setattr(linear_probe, "ROWS", rows)
        fit = fit_selected(x, labels, NUM_CLASSES, [0.1], [0.0], epochs=2)
        found.append((F.linear(x, *fit.classifier), predict(x, fit.classifier)))
    torch.testing.assert_close(*(logits for logits, _ in found), rtol=1e-3, atol=1e-3)
    assert torch.equal(*(ranked for _, ranked in found))


def test_a_tenth_of_each_class_is_held_out():
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 3, 4], [100, 37, 2, 1]))
    held_out = hold_out(labels, seed=0).numpy()
    assert np.bincount(labels[held_out], minlength=5).tolist() == [10, 4, 0, 1, 0]
    assert np.array_equal(held_out, hold_out(labels, seed=0).numpy())
    assert not np.array_equal(held_out, hold_out(labels, seed=1).numpy())
    frequency = np.mean([hold_out(labels, seed).numpy() for seed in range(300)], axis=0)[labels == 0]
    assert 0.02 < frequency.min() <= frequency.max() < 0.2  # no image is special


def test_units_of_the_features_change_nothing():
    (train, labels), (test, _) = correlated(700, 6), correlated(200, 7)
    scale, offset = torch.logspace(1, -1, 12), torch.linspace(-0.3, 0.3, 12)
    ours = fit_selected(train, labels, NUM_CLASSES, [0.1], [1e-2]).classifier
    others = fit_selected(train * scale + offset, labels, NUM_CLASSES, [0.1], [1e-2]).classifier
    logits, other_logits = (F.linear(x, *c) for x, c in ((test, ours), (test * scale + offset, others)))
    torch.testing.assert_close(logits.softmax(1), other_logits.softmax(1), rtol=0, atol=5e-3)


def test_reads_a_matrix_that_is_mapped_from_a_file(tmp_path):
    x, labels = correlated(300, 8)
    np.save(tmp_path / "x.npy", x.numpy())
    mapped = torch.from_numpy(np.load(tmp_path / "x.npy", mmap_mode="c"))
    for fit in (
        lambda m: fit_selected(m, labels, NUM_CLASSES, [0.1], epochs=2),
        lambda m: fit_adam(m, labels, NUM_CLASSES, 2),
    ):
        assert all(torch.equal(a, b) for a, b in zip(fit(mapped).classifier, fit(x).classifier, strict=True))


def warned(top1):
    """The warnings for a grid with these held-out scores: {(lr, weight decay): percent}."""
    grid = [{"lr": lr, "weight_decay": decay, "held_out_top1": value} for (lr, decay), value in top1.items()]
    return linear_probe.warnings_of(grid, max(grid, key=lambda entry: entry["held_out_top1"]))


def test_the_edge_of_the_grid_is_told():
    larger, smaller = ("the {} of the grid: a {} one may score higher; extend " .format(*words)
                       for words in (("largest", "larger"), ("smallest", "smaller")))  # fmt: skip
    assert warned({(0.1, 0): 70, (1, 0): 80}) == [f"lr 1 is {larger}--lrs"]
    assert warned({(0.1, 0): 80, (1, 0): 70}) == [f"lr 0.1 is {smaller}--lrs"]
    assert warned({(0.1, 0.3): 80, (0.1, 0): 70}) == [f"weight decay 0.3 is {larger}--weight_decays"]
    assert warned({(0.1, 0.3): 70, (0.1, 0.01): 80}) == [f"weight decay 0.01 is {smaller}--weight_decays"]
    assert warned({(1, 1): 80, (1, 0): 70, (0.1, 1): 70, (0.1, 0): 90}) == [f"lr 0.1 is {smaller}--lrs"]
    assert warned({(0.1, 0.3): 70, (0.1, 0): 80}) == []  # nothing is less than none
    assert warned({(0.1, 0): 70, (1, 0): 80, (10, 0): 75}) == []
    assert warned({(0.1, 0): 80}) == []  # nothing was to be chosen
    assert warned({(0.1, 0): 100, (1, 0): 100}) == []  # no better than its neighbour


def test_a_rate_that_diverges_is_not_chosen():
    x, labels = correlated(600, 11)
    settings = fit_selected(x, labels, NUM_CLASSES, [0.1], [0.0, 1e38]).settings
    assert (settings["lr"], settings["weight_decay"]) == (0.1, 0.0)


def test_adam_is_a_plain_loop():
    x, labels = correlated(600, 10)
    ours = fit_adam(x, labels, NUM_CLASSES, epochs=3, lr=0.02, seed=5)
    torch.manual_seed(5)
    layer = torch.nn.Linear(12, NUM_CLASSES)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    for epoch in range(3):
        order, losses = epoch_order(5, epoch, 600), []
        for batch in (order[:256], order[256:512], order[512:]):
            losses.append(F.cross_entropy(layer(x[batch]), labels[batch]))
            optimizer.zero_grad()
            losses[-1].backward()
            optimizer.step()
    torch.testing.assert_close(ours.classifier, (layer.weight.detach(), layer.bias.detach()), rtol=1e-6, atol=1e-7)
    expected = (256 * losses[0] + 256 * losses[1] + 88 * losses[2]) / 600
    assert ours.settings == {"epochs": 3, "lr": 0.02, "batch_size": 256, "loss": pytest.approx(expected.item())}


def test_scores_by_hand():
    ranked = torch.tensor([[0, 1, 2, 3, 4], [1, 0, 2, 3, 4], [5, 4, 3, 2, 0], [2, 1, 0, 3, 4]])
    found = scores(ranked, [0, 0, 1, 2], num_classes=6)
    assert found == {"top1": 50.0, "top5": 75.0, "per_class": [50.0, 0.0, 100.0, None, None, None]}


def test_confusion_is_scikit_learns():
    rng = np.random.default_rng(0)
    labels, ranked = rng.integers(0, 5, 200), torch.from_numpy(rng.integers(0, 7, (200, 5)))
    theirs = sklearn.metrics.confusion_matrix(labels, ranked[:, 0], labels=range(7), normalize="true")
    np.testing.assert_allclose(linear_probe.confusion_matrix(ranked, labels, 7), 100 * theirs)
    np.testing.assert_allclose(linear_probe.confusion_matrix(ranked, labels, 5), 100 * theirs[:5, :5])


def test_predict_is_the_product_by_hand():
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    weight, bias = torch.tensor([[1.0, 0.0], [0.0, 5.0], [0.5, 0.5]]), torch.tensor([0.0, 0.0, 0.2])
    assert predict(x, (weight, bias)).tolist() == [[0, 2, 1], [1, 2, 0]]  # logits 1, 0, 0.7 and 0, 5, 0.7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": torch.zeros(10, 9000)}, "9000 features, --protocol fast takes 8192 at most"),
        ({"labels": np.arange(10)}, "no class has two training images"),
    ],
)
def test_what_cannot_be_is_one_line(change, message):
    given = {"features": torch.randn(10, 3), "labels": np.arange(10) % 2, "num_classes": 10} | change
    with pytest.raises(UserError, match=message):
        fit_selected(**given)


# ---- few labels ------------------------------------------------------------------------------------------------------


def few_by_hand(train, train_labels, test, test_labels, per_class, draws, seed, num_classes=NUM_CLASSES):
    """Top-1 in percent of each draw, by scikit-learn's own `predict` on features centred and scaled."""
    rng, mean = np.random.default_rng(seed), train.mean(0)
    scale = (train - mean).square().mean().sqrt()
    train, test, found = ((train - mean) / scale).numpy(), ((test - mean) / scale).numpy(), []
    for _ in range(draws):
        rows = [rng.choice(np.flatnonzero(train_labels == c), per_class, replace=False) for c in range(num_classes)]
        rows = np.concatenate(rows)
        model = sklearn.linear_model.LogisticRegression(C=0.1, max_iter=200).fit(train[rows], train_labels[rows])
        found.append(100 * (model.predict(test) == np.asarray(test_labels)).mean())
    return found


@pytest.mark.parametrize("num_classes", [2, NUM_CLASSES])
def test_few_labels_are_scikit_learn_s_on_the_same_rows(num_classes):
    (train, labels), (test, test_labels) = correlated(600, 0), correlated(400, 1)
    labels, test_labels = (of % num_classes for of in (labels, test_labels))
    draws = draw_labelled(labels.numpy(), range(num_classes), 5, 4, seed=3)
    fits = fit_few(train, labels, draws)
    found = [scores(predict(test, fit.classifier), test_labels, num_classes)["top1"] for fit in fits]
    expected = few_by_hand(train, labels, test, test_labels, 5, 4, 3, num_classes)
    assert found == pytest.approx(expected, abs=0.26)  # one image in 400, where two classes are equal to rounding
    assert len(set(found)) > 1
    assert max(found) > 1.2 * 100 / num_classes
    assert [fit.warnings for fit in fits] == [[]] * 4


def test_draws_begin_alike_and_hold_each_class_equally():
    labels = np.random.default_rng(0).integers(NUM_CLASSES, size=300)
    short, long = (draw_labelled(labels, range(NUM_CLASSES), 6, draws, seed=1) for draws in (3, 8))
    assert all(np.array_equal(a, b) for a, b in zip(short, long, strict=False))
    assert len({tuple(rows) for rows in long}) == 8
    for rows in long:
        assert np.array_equal(labels[rows], np.repeat(np.arange(NUM_CLASSES), 6))
        assert len(set(rows)) == len(rows)
    assert not np.array_equal(short[0], draw_labelled(labels, range(NUM_CLASSES), 6, 1, seed=2)[0])


def test_a_class_without_enough_images_is_named():
    with pytest.raises(UserError, match="--labels_per_class 3: bee, the smallest class, has 2 training images"):
        draw_labelled(np.array([0, 0, 0, 1, 1, 2, 2, 2]), ["ant", "bee", "cat"], 3)
    with pytest.raises(UserError, match="cat, the smallest class, has 0 training images"):
        draw_labelled(np.array([0, 0, 1, 1]), ["ant", "bee", "cat"], 1)


def test_features_that_are_all_alike_name_one_class():
    labels = torch.arange(6) % 3
    (fit,) = fit_few(torch.full((6, 4), 0.1), labels, draw_labelled(labels.numpy(), "abc", 2, 1))
    assert len(set(predict(torch.full((9, 4), 0.1), fit.classifier)[:, 0].tolist())) == 1


def test_a_fit_that_did_not_converge_says_so(monkeypatch, recwarn):
    monkeypatch.setattr(linear_probe, "FEW_ITERATIONS", 2)
    train, labels = correlated(200, 0)
    (fit,) = fit_few(train, labels, draw_labelled(labels.numpy(), range(NUM_CLASSES), 5, 1))
    assert fit.warnings == ["logistic regression ended before it converged (at most 2 iterations)"]
    assert not recwarn.list
