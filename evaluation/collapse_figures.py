"""The figures of eval_collapse.py: spectra, entropies, code usage, cosines, and per model its matrices and t-SNE.

Shapes: N images, D features or F embedding features, K codes, n rows of a picture.
"""

import math
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

import evaluation

ADJACENCY_ROWS = 1000  # images of the adjacency matrix: about two pixels each
DICTIONARY_COLUMNS = 256  # codes of the picture of W^T W
MOST_FEATURES = 512  # of the picture of a covariance
ISOTROPIC = 0.5 * math.log(2 * math.pi * math.e)  # nats per dimension of a Gaussian of unit variance
LEAST_SHOWN = 1e-9  # of the mean singular value: below it is float32's rounding
POINTS = {"s": 6, "linewidths": 0}
LINE_STYLES = ("-", "--", ":", "-.")  # a colour comes again with another one, and print has no colours


def draw_all(folder, curves, pictures, images):
    """Write collapse_*.png to a folder.

    curves: {model: {"spectrum", "cosine_density", "mixtures", and where there are "usage", "embedding_spectrum"}}.
    pictures: {model: {"rows", "vectors", "of", "codes", "moment", and where there are "dictionary", "tsne"}}.
    images: the set that `pictures`' rows count; labels, where there are, order and colour what codes do not.
    """
    plt = evaluation.pyplot()
    figures = {"spectrum": draw_spectra(plt, curves), "cosine": draw_cosines(plt, curves)}
    if any(c["mixtures"] for c in curves.values()):
        figures["entropy"] = draw_entropies(plt, curves)
    if any("usage" in c for c in curves.values()):
        figures["usage"] = draw_usage(plt, curves)
    for stem, (name, of_model) in zip(evaluation.file_stems(pictures), pictures.items(), strict=True):
        figures[f"matrices_{stem}"] = draw_matrices(plt, name, of_model, images)
        if "tsne" in of_model:
            figures[f"tsne_{stem}"] = draw_tsne(plt, name, of_model, images)
    for name, figure in figures.items():
        evaluation.save_figure(figure, Path(folder) / f"collapse_{name}.png")


# ---- one figure for all models ---------------------------------------------------------------------------------------


def draw_spectra(plt, curves):
    kinds = [("spectrum", "backbone features"), ("embedding_spectrum", "embeddings h")]
    kinds = [(key, title) for key, title in kinds if any(key in c for c in curves.values())]
    figure, axes = plt.subplots(1, len(kinds), figsize=(4.2 * len(kinds), 3.4), squeeze=False, sharey=True)
    for axis, (key, title) in zip(axes.flat, kinds, strict=True):
        for values, style in lines(curves, key):
            values = np.array(values)
            values = np.maximum(values / max(values.mean(), np.finfo(float).tiny), LEAST_SHOWN)
            axis.plot(np.arange(1, len(values) + 1), values, **style)
        axis.set(title=title, yscale="log", xlabel="rank")
        widths = [len(line.get_xdata()) for line in axis.lines]
        if max(widths) > 2 * min(widths):
            axis.set_xscale("log")
            plain_numbers(axis.xaxis)
    axes.flat[0].set_ylabel("singular value of the covariance\nover their mean")
    return name_models(figure, axes.flat[0], curves)


def draw_entropies(plt, curves):
    figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.4))
    units = {
        "entropy": "nats (moves with the scale of features)",
        "entropy_per_dimension": "nats per dimension, at unit variance",
    }
    for axis, (key, unit) in zip(axes, units.items(), strict=True):
        for mixtures, style in lines(curves, "mixtures"):
            axis.plot([m["components"] for m in mixtures], [m[key] for m in mixtures], marker="o", ms=4, **style)
        axis.set(xscale="log", xlabel="mixture components", ylabel=unit, title="entropy of a Gaussian mixture")
        plain_numbers(axis.xaxis)
    axes[1].axhline(ISOTROPIC, color="black", lw=0.8)
    axes[1].annotate(
        "isotropic Gaussian", (0.98, ISOTROPIC), xycoords=("axes fraction", "data"), ha="right", va="bottom",
        xytext=(0, 1), textcoords="offset points", fontsize=8,
    )  # fmt: skip
    return name_models(figure, axes[0], curves)


def draw_usage(plt, curves):
    figure, axis = plt.subplots(figsize=(4.8, 3.4))
    for counts, style in lines(curves, "usage"):
        axis.plot(np.arange(1, len(counts) + 1), counts, drawstyle="steps-mid", **style)
    axis.set(xscale="log", yscale="log", xlabel="codes, most used first", ylabel="images of the code")
    plain_numbers(axis.xaxis)
    plain_numbers(axis.yaxis)
    return name_models(figure, axis, curves)


def draw_cosines(plt, curves):
    figure, axis = plt.subplots(figsize=(4.8, 3.4))
    for density, style in lines(curves, "cosine_density"):
        axis.stairs(density, np.linspace(-1, 1, len(density) + 1), **style, lw=1.3)
    axis.set(xlabel="cosine between two images' features", ylabel="density", xlim=(-1, 1), yscale="log")
    axis.set_ylim(bottom=1e-3)
    return name_models(figure, axis, curves)


def plain_numbers(axis):
    """Ticks of a logarithmic axis of counts: 1, 10, 1,000; where it spans less than two decades, 2, 5 and 20 too."""
    low, high = axis.get_view_interval()
    named = "25" if high < 100 * low else ""
    axis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    axis.set_minor_formatter(lambda value, _: f"{value:,.10g}" if f"{value:e}"[0] in named else "")


def lines(curves, key):
    """(values, how to draw them) of each model that has them; a model looks the same in all figures."""
    for i, (name, of_model) in enumerate(curves.items()):
        if of_model.get(key):
            colour = evaluation.PALETTE[i % len(evaluation.PALETTE)]
            yield of_model[key], {"color": colour, "ls": LINE_STYLES[i % len(LINE_STYLES)], "label": name}


def name_models(figure, axis, curves):
    """In one legend above, where several are compared."""
    if len(curves) > 1:
        handles, labels = axis.get_legend_handles_labels()
        width = 0.6 + 0.07 * max(map(len, labels))  # inches of one
        columns = max(1, int(figure.get_figwidth() / width))
        figure.legend(handles, labels, loc="outside upper center", ncols=min(columns, len(labels)))
    else:
        figure.suptitle(next(iter(curves)))
    return figure


# ---- one figure for each model ---------------------------------------------------------------------------------------


def draw_matrices(plt, name, of_model, images):
    """Covariance and adjacency (Fig. 4, 8, 9); with a dictionary, W^T W and the histogram of its elements (Fig. 3)."""
    dictionary = of_model.get("dictionary")
    figure, axes = plt.subplots(1 if dictionary is None else 2, 2, figsize=(8, 3.6 if dictionary is None else 7))
    axes = axes.flat
    moment = to_unit_diagonal(of_model["moment"])
    title = "correlation of features" if dictionary is None else "$H^T H$ of embeddings, unit diagonal"
    what = "feature" if len(moment) <= MOST_FEATURES else f"feature (of {len(moment)} in all)"
    draw_matrix(figure, axes[0], moment[:MOST_FEATURES, :MOST_FEATURES], title, what)
    order, sorted_by = picture_order(of_model, images)
    vectors = F.normalize(of_model["vectors"][order], dim=1)
    title = f"cosines of {of_model['of']}{sorted_by}"
    draw_matrix(figure, axes[1], vectors @ vectors.T, title, "image")
    if dictionary is not None:
        gram = dictionary.T @ dictionary / len(dictionary)
        draw_matrix(figure, axes[2], gram, "$W^T W / F$ of the dictionary", "code")
        draw_off_diagonal(axes[3], gram, len(dictionary))
    figure.suptitle(name)
    return figure


def draw_matrix(figure, axis, matrix, title, of):
    picture = axis.imshow(matrix.numpy(), cmap="PuOr_r", vmin=-1, vmax=1, interpolation="antialiased")
    axis.set(title=title, xlabel=of, ylabel=of)
    axis.grid(False)
    figure.colorbar(picture, ax=axis, shrink=0.8)


def draw_off_diagonal(axis, gram, dim):
    values = gram[~torch.eye(len(gram), dtype=torch.bool)]
    step = 2 / dim  # elements are m / F, m of F's parity
    edges = np.arange(-1 - step / 2, 1 + step, step)
    axis.hist(values, bins=edges, density=True, color=evaluation.PALETTE[0], label="off the diagonal")
    x = np.linspace(-1, 1, 401)
    normal = np.exp(-(x**2) * dim / 2) * math.sqrt(dim / (2 * math.pi))
    axis.plot(x, normal, color=evaluation.PALETTE[1], lw=1, label="normal, variance 1 / F")
    width = min(1, 6 / math.sqrt(dim))
    axis.set(title="elements of $W^T W / F$", xlabel="cosine between two codes", ylabel="density", xlim=(-width, width))
    axis.set_ylim(top=1.35 * axis.get_ylim()[1])  # the legend's place
    axis.legend(loc="upper right", fontsize=8)


def picture_order(of_model, images):
    """Rows of the picture sorted by code, the most used first; else by class; else as they are. And how, in words."""
    if of_model["codes"] is not None:
        keys, by = of_model["codes"], ", sorted by code"
    elif images.labels is not None:
        keys, by = torch.as_tensor(images.labels)[of_model["rows"]], ", sorted by class"
    else:
        return torch.arange(len(of_model["vectors"])), ""
    counts = torch.bincount(keys)[keys]
    return torch.from_numpy(np.lexsort((keys.numpy(), -counts.numpy()))), by


def to_unit_diagonal(moment):
    length = moment.diagonal().clamp_min(torch.finfo(moment.dtype).tiny).sqrt()
    return moment / length / length[:, None]


def draw_tsne(plt, name, of_model, images):
    """Coloured by class; without labels by code, if there are codes."""
    positions, rows, codes = of_model["tsne"]
    figure, axis = plt.subplots(figsize=(5.6, 4.6))
    if images.labels is not None:
        draw_classes(figure, axis, positions, np.asarray(images.labels)[rows.numpy()], images.classes)
    elif codes is not None:
        draw_points(figure, axis, positions, codes.numpy(), "code")
    else:
        axis.scatter(*positions.T, color=evaluation.PALETTE[0], **POINTS)
    axis.set(title=f"t-SNE of the features of {len(rows)} images\n{name}", xticks=[], yticks=[])
    axis.spines[:].set_visible(False)
    return figure


def draw_classes(figure, axis, positions, labels, classes):
    """Up to ten classes by colour and a legend; more by their number on a colour bar."""
    if len(classes) > 10:
        draw_points(figure, axis, positions, labels, "class number")
        return
    colours = [*evaluation.PALETTE, "#999999", "#7F3C8D"]
    for label, class_name in enumerate(classes):
        axis.scatter(*positions[labels == label].T, color=colours[label], label=str(class_name), **POINTS)
    figure.legend(loc="outside right upper", markerscale=3, fontsize=8)


def draw_points(figure, axis, positions, numbers, meaning):
    points = axis.scatter(*positions.T, c=numbers, cmap="viridis", **POINTS)
    figure.colorbar(points, ax=axis, label=meaning)
