"""Linear classifiers on frozen features that lie in a matrix: a grid of them by SGD, one by Adam, or one for each draw
of a few labelled images; and their scores.

    fit = fit_selected(features, labels, num_classes, lrs, weight_decays)     # of a grid, what held-out images prefer
    fit = fit_adam(features, labels, num_classes, epochs=100, lr=1e-2)
    fits = fit_few(features, labels, draw_labelled(labels, classes, per_class=10, draws=10))
    scores(predict(features, fit.classifier, device), labels, num_classes)

The matrix stays where it is, mapped into memory if it comes from a file, and is read a batch at a time.

Shapes: N images, D features, C classes, G classifiers of a grid, b images at a time.
A classifier is (weight (C, D), bias (C,)), float32.
"""

import dataclasses
import itertools
import math
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from data import epoch_order
from evaluation import RANKED, count_hits, top1_and_top5
from utils import UserError, cosine_schedule

ROWS = 8192  # images at a time where nothing is trained
LRS = (1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0)  # per 256 images of a step
WEIGHT_DECAYS = (0.0, 1e-5, 1e-3)
EPOCHS = 30
GRID_BATCH = 1024  # images of a step, but no more than a fiftieth of all: small sets need steps as well
HELD_OUT = 0.1  # of the training images of each class, to choose by
RIDGE = 1e-5
MAX_WHITENED = 8192  # D whose correlations (8 D^2 bytes) and their eigenvectors are still computed
ADAM_BATCH = 256  # images
FEW_C = 0.1  # 1 / weight of the penalty, fixed before any score was seen
FEW_ITERATIONS = 200  # of L-BFGS, at most


@dataclasses.dataclass
class Fit:
    """classifier: (weight, bias).  settings: numbers that belong in a table.  warnings: what a reader must know."""

    classifier: tuple
    settings: dict
    warnings: list = dataclasses.field(default_factory=list)


# ---- a grid of classifiers at once -----------------------------------------------------------------------------------


def fit_selected(
    features, labels, num_classes, lrs=LRS, weight_decays=WEIGHT_DECAYS, epochs=EPOCHS, seed=0, device="cpu"
):
    """A linear classifier whose learning rate and weight decay are the pair of a grid that held-out images prefer.

    All of the grid are trained at once (`fit_grid`) on 90 % of the images, class by class, and scored on the other
    10 %. The highest top-1 wins, among equals the lower learning rate, then the stronger weight decay; with these one
    is trained on all images.
    features: (N, D) float32.  labels: (N,) integers from 0 to C - 1.  seed: of what is held out, and of the order.
    Returns a `Fit`; settings: lr, weight_decay, held_out_top1 (percent), and the grid with an entry for each pair. It
    warns where the choice is at the edge of the grid.
    Raises UserError for features wider than `MAX_WHITENED` and where no class has two images.
    """
    labels = torch.as_tensor(labels)
    if features.shape[1] > MAX_WHITENED:
        raise UserError(
            f"{features.shape[1]} features, --protocol fast takes {MAX_WHITENED} at most: use --protocol adam"
        )
    held_out = hold_out(labels, seed)
    pairs = list(itertools.product(sorted(set(lrs)), sorted(set(weight_decays), reverse=True)))
    training = {"features": features, "labels": labels, "num_classes": num_classes, "epochs": epochs, "seed": seed}
    classifiers = fit_grid(**training, pairs=pairs, chosen=(~held_out).nonzero()[:, 0], device=device)
    unseen, grid = features[held_out], []
    for (lr, weight_decay), classifier in zip(pairs, classifiers, strict=True):
        top1 = scores(predict(unseen, classifier, device), labels[held_out], num_classes)["top1"]
        grid.append({"lr": lr, "weight_decay": weight_decay, "held_out_top1": top1})
    best = max(grid, key=lambda entry: entry["held_out_top1"])
    pair = (best["lr"], best["weight_decay"])
    (classifier,) = fit_grid(**training, pairs=[pair], chosen=torch.arange(len(labels)), device=device)
    return Fit(classifier, best | {"epochs": epochs, "grid": grid}, warnings_of(grid, best))


def fit_grid(features, labels, num_classes, pairs, chosen, epochs=EPOCHS, seed=0, device="cpu"):
    """A classifier for each of G pairs (learning rate per 256 images, weight decay), trained side by side:

        min over W, b of  mean over images of CE(softmax(W z + b), label)  +  weight_decay / 2 |W|^2

    with z the whitened features (`whitening`, of all N images); SGD with momentum 0.9 from zero, the learning rate
    falling to 0 along a cosine. All see the same batches, whose order is a function of (seed, epoch).
    Without whitening, SGD needs many times the epochs where features are correlated, as they are.
    chosen: (n,) int64, the images to train on.  Returns G classifiers for features as they are.
    Memory on the device: 8 (D + 1) G C bytes, and 8 b G C of a step.
    """
    features, labels = place(features, device), labels.to(device)
    mean, basis = (moment.float().to(device) for moment in whitening(features, device))  # (D,), (D, D)
    rates, decays = torch.tensor(pairs, device=device).T[:, :, None, None]  # (G, 1, 1) each
    weights = torch.zeros(len(pairs), num_classes, len(mean) + 1, device=device)  # (G, C, D + 1), the biases last
    velocity = torch.zeros_like(weights)
    batch_size = max(1, min(GRID_BATCH, len(chosen) // 50))
    num_steps, step = epochs * math.ceil(len(chosen) / batch_size), 0
    for epoch in range(epochs):
        for rows in chosen[epoch_order(seed, epoch, len(chosen))].split(batch_size):
            z = (features[rows.to(features.device)].to(device) - mean) @ basis
            z = F.pad(z, (0, 1), value=1.0)  # (b, D + 1)
            residual = (weights.flatten(0, 1) @ z.T).unflatten(0, weights.shape[:2]).softmax(dim=1)  # (G, C, b)
            residual[:, labels[rows.to(device)], torch.arange(len(rows), device=device)] -= 1
            gradient = (residual.flatten(0, 1) @ z).view_as(weights) / len(rows)
            gradient[..., :-1] += decays * weights[..., :-1]
            velocity.mul_(0.9).add_(gradient)
            weights -= velocity * rates * (cosine_schedule(step, num_steps, 1.0, 0.0) * batch_size / 256)
            step += 1
    weight = weights[..., :-1].double() @ basis.double().T  # (G, C, D)
    bias = weights[..., -1].double() - weight @ mean.double()  # (G, C)
    return list(zip(weight.float().cpu(), bias.float().cpu(), strict=True))


def hold_out(labels, seed):
    """bool (N,): about 10 % of the images of each class, at least one of a class that has two."""
    labels = np.asarray(labels)
    draws = np.random.default_rng(seed).random(len(labels))
    order = np.lexsort((draws, labels))
    counts = np.bincount(labels)
    place = np.empty(len(labels), np.int64)  # of each image among the images of its class
    place[order] = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    share = np.where(counts > 1, np.maximum(1, np.rint(HELD_OUT * counts)), 0)
    if not share.any():
        raise UserError(
            "no class has two training images, so that none can be held out to choose by: use "
            "--protocol adam, or more images"
        )
    return torch.from_numpy(place < share[labels])


def warnings_of(grid, best):
    """In words, where a better choice may lie beyond the grid; no weight decay is less than none."""
    found = []
    for name, flag in (("lr", "--lrs"), ("weight_decay", "--weight_decays")):
        other = {"lr": "weight_decay", "weight_decay": "lr"}[name]
        line = sorted((e for e in grid if e[other] == best[other]), key=lambda entry: entry[name])
        at = line.index(best)
        if len(line) == 1 or 0 < at < len(line) - 1 or best[name] == 0:
            continue
        end, beyond, neighbour = ("smallest", "smaller", 1) if at == 0 else ("largest", "larger", -2)
        if best["held_out_top1"] > line[neighbour]["held_out_top1"]:
            found.append(
                f"{name.replace('_', ' ')} {best[name]:g} is the {end} of the grid: a {beyond} one may score higher; "
                f"extend {flag}"
            )
    return found


def place(features, device):
    """On a GPU where they take less than half of its free memory; else as they are, and each pass sends them anew."""
    device = torch.device(device)
    if device.type == "cuda" and features.nbytes < torch.cuda.mem_get_info(device)[0] / 2:
        return features.to(device)
    return features


def whitening(features, device):
    """(mean (D,), basis (D, D)), float64: (x - mean) @ basis has variance 1 and no correlations, except that directions
    with less than about `RIDGE` of a feature's variance, once each is standardised, are not blown up to 1."""
    mean = mean_of(features, device)
    shift = mean.float().to(device)
    covariance = sum(((x := rows.to(device) - shift).T @ x).cpu().double() for rows in features.split(ROWS))
    scale = (covariance.diagonal() / len(features)).sqrt()
    scale = torch.where(scale > 1e-6 * scale.max(), scale, 1.0)  # a constant feature stays at zero
    variances, directions = torch.linalg.eigh(covariance / len(features) / torch.outer(scale, scale))
    return mean, directions / scale[:, None] / (variances.clamp(min=0) + RIDGE).sqrt()


def mean_of(features, device):
    return sum(x.to(device).sum(dim=0).cpu().double() for x in features.split(ROWS)) / len(features)


# ---- Adam ------------------------------------------------------------------------------------------------------------


def fit_adam(features, labels, num_classes, epochs=100, lr=1e-2, seed=0, device="cpu"):
    """A linear classifier trained as in Appendix I of arXiv 2410.04959: Adam, learning rate 1e-2, 100 epochs.

    What the paper leaves open: batches of 256 images in an order drawn anew each epoch, the last one short, a constant
    learning rate, no weight decay, features as they are, torch's initialisation of a linear layer (seed).
    features: (N, D) float32.  labels: (N,) integers from 0 to C - 1.
    Returns a `Fit`, of the last epoch; settings: epochs, lr, batch_size and the last epoch's mean loss (nats).
    """
    features, labels = place(features, device), torch.as_tensor(labels).to(device)
    torch.manual_seed(seed)
    classifier = nn.Linear(features.shape[1], num_classes).to(device)
    optimizer = torch.optim.Adam(classifier.parameters(), lr)
    for epoch in range(epochs):
        total = 0.0
        for rows in torch.from_numpy(epoch_order(seed, epoch, len(features))).split(ADAM_BATCH):
            rows = rows.to(labels.device)
            x = features[rows.to(features.device)].to(device)
            loss = F.cross_entropy(classifier(x), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach() * len(rows)
    settings = {"epochs": epochs, "lr": lr, "batch_size": ADAM_BATCH, "loss": float(total) / len(features)}
    return Fit((classifier.weight.detach().cpu(), classifier.bias.detach().cpu()), settings)


# ---- few labels ------------------------------------------------------------------------------------------------------


def draw_labelled(labels, classes, per_class=10, draws=10, seed=0):
    """`draws` arrays of C x per_class images, class by class, each drawn without replacement.

    A function of labels, sizes and seed alone: all models see the same images, and the first 10 of 20 draws are the
    draws of 10. labels: (N,) integers.  classes: C names. Raises UserError where a class has fewer than `per_class`
    images.
    """
    counts = np.bincount(labels, minlength=len(classes))
    if (fewest := counts.min()) < per_class:
        raise UserError(
            f"--labels_per_class {per_class}: {classes[counts.argmin()]}, the smallest class, has {fewest} training "
            f"images; expected at most {fewest}"
        )
    of_class = np.split(np.argsort(labels, kind="stable"), counts.cumsum()[:-1])
    rng = np.random.default_rng(seed)
    return [np.concatenate([rng.choice(rows, per_class, replace=False) for rows in of_class]) for _ in range(draws)]


def fit_few(features, labels, draws, device="cpu"):
    """A `Fit` for each draw: scikit-learn's logistic regression with an L2 penalty, C = `FEW_C`, on the draw's images.

    Features are centred and scaled by one number, so that their overall variance over all N images, whose labels are
    not looked at, is 1. features: (N, D) float32.  labels: (N,).  draws: arrays of rows, as `draw_labelled` returns.
    A fit warns where L-BFGS ended before it converged.
    """
    mean = mean_of(features, device)
    shift = mean.float()
    square = sum((rows - shift).square().sum().double() for rows in features.split(ROWS))
    scale = float((square / features.numel()).sqrt()) or 1.0  # features that are all alike stay at zero
    labels = np.asarray(labels)
    return [fit_one_draw((features[rows] - shift) / scale, labels[rows], mean, scale) for rows in draws]


def fit_one_draw(z, labels, mean, scale):
    """z: (n, D), the draw's features less mean (D,), over scale. Returns a `Fit` for features as they are."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = LogisticRegression(C=FEW_C, max_iter=FEW_ITERATIONS).fit(z.numpy(), labels)
    weight, bias = torch.from_numpy(model.coef_).double() / scale, torch.from_numpy(model.intercept_).double()
    bias = bias - weight @ mean
    if len(weight) == 1:  # of two classes scikit-learn fits the second's logit, less the first's
        weight, bias = F.pad(weight, (0, 0, 1, 0)), F.pad(bias, (1, 0))
    ended = [warning for warning in caught if issubclass(warning.category, ConvergenceWarning)]
    told = [f"logistic regression ended before it converged (at most {FEW_ITERATIONS} iterations)"] if ended else []
    return Fit((weight.float(), bias.float()), {}, told)


# ---- scores ----------------------------------------------------------------------------------------------------------


def predict(features, classifier, device="cpu"):
    """Features (N, D) -> the five likeliest classes of each, (N, min(5, C)) int64 on CPU, the likeliest first."""
    weight, bias = (tensor.to(device) for tensor in classifier)
    return torch.cat([rank_classes(F.linear(rows.to(device), weight, bias)) for rows in features.split(ROWS)])


def rank_classes(logits):
    return logits.topk(min(RANKED, logits.shape[1]), dim=1).indices.cpu()


def scores(ranked, labels, num_classes):
    """top1 and top5 (percent of the images) and per_class (top-1 of the images of each class, percent; None without).

    ranked: (M, 5), as `predict` returns.  labels: (M,)."""
    labels = torch.as_tensor(labels)
    counts = torch.bincount(labels, minlength=num_classes)
    right = torch.bincount(labels[ranked[:, 0] == labels], minlength=num_classes)
    return {
        **top1_and_top5(count_hits(ranked, labels), len(labels)),
        "per_class": [100 * r / n if n else None for r, n in zip(right.tolist(), counts.tolist(), strict=True)],
    }


def confusion_matrix(ranked, labels, num_classes):
    """(C, C) float64 numpy: percent of the images of the row's class that were taken for the column's; 0 where a class
    has no images. A head may name classes beyond these C: they have no column."""
    labels, predicted = np.asarray(labels), ranked[:, 0].numpy()
    known = predicted < num_classes
    pairs = np.bincount(labels[known] * num_classes + predicted[known], minlength=num_classes**2)
    counts = np.bincount(labels, minlength=num_classes)
    return 100 * pairs.reshape(num_classes, num_classes) / np.maximum(1, counts)[:, None]
