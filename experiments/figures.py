"""The figures of an experiment, from what was kept of its cells.

    python -m experiments.figures experiments/table1.toml --budget short     # experiments/results/table1/short/*.png

A [[figure]] of the experiment's file has a `kind`:

    curve       `scores` (names of the file's) against `x`, a flag of the rows; a line for each column, the paper's
                values hollow, the score's chance dotted
    lines       `keys`: what was kept of evaluations, NAME.KEY; a list of numbers, or with `x` of {x: ..., key: ...};
                `relative`: a list's numbers as shares of its first, for features have no scale of their own
    log         `keys`: what was kept of each logged line, against the step
    epochs      `scores` of each epoch that --saveckp_freq has kept; needs an evaluation of `checkpoints = "all"`
    pictures    `file`: what an evaluation has drawn of each row's first seed, such as "collapse_matrices_*.png";
                `crop`: this part of it, left, top, right, bottom, as fractions

and `name`, `paper` (such as "Figure 5"), `rows` (patterns) and `columns` (only these), `about` (a line below the name),
`axes`: what matplotlib's Axes.set takes. In lines, log and epochs a panel is a column and key, and a line is a row.
Shown are the mean over seeds and, as a band, the range from the lowest seed to the highest. A row that has not been run
or that failed is left out, and said.
"""

import math
import statistics
import textwrap

import numpy as np

import evaluation
from evaluation.collapse_figures import plain_numbers
from experiments import RESULTS, epochs_of, is_in, read_experiment, score_of, slug
from utils import ArgumentParser, UserError, command_line, one_line

LINE_STYLES = ("-", "--", ":", "-.")  # a colour comes again with another one
PANEL = (4.2, 3.2)  # inches


def get_args_parser():
    parser = ArgumentParser("python -m experiments.figures", "Figures of an experiment, from what was kept of it.")
    add = parser.add_argument
    add("experiment", metavar="FILE", help="experiments/NAME.toml")
    add("--budget", default="short", help="of that experiment")
    add("--results_dir", default=str(RESULTS), help="default: experiments/results")
    return parser


@command_line
def main(argv=None):
    args = get_args_parser().parse_args(argv)
    experiment = read_experiment(args.experiment, args.budget, results=args.results_dir)
    figures = experiment.spec.get("figure", [])
    if not figures:
        raise UserError(f"{args.experiment} has no [[figure]]")
    plt = evaluation.pyplot()
    for figure in figures:
        draw(plt, experiment, figure)


def draw(plt, experiment, figure):
    """Write a figure's file, and say which, or why there is none."""
    if figure["kind"] not in KINDS:
        raise UserError(f"{experiment.name}: figure kind {figure['kind']}; expected one of {', '.join(KINDS)}")
    drawn = KINDS[figure["kind"]](plt, experiment, figure)
    title = figure.get("paper", figure["name"])
    if drawn is None:
        print(f"{title}: nothing to show yet")
        return
    letters = int(12 * drawn.get_figwidth())  # of 9 points in a line
    told = [textwrap.fill(figure[key], letters) for key in ("name", "about") if key in figure]
    drawn.suptitle("\n".join(told), fontsize=9)
    path = experiment.results / f"{slug(title)}.png"
    evaluation.save_figure(drawn, path)
    print(path)


def shown(experiment, figure):
    """[(row, column, results of its seeds)] of the cells that a figure shows; says what is not there."""
    found = [
        (row, column, [r for r in experiment.finals(row, column) if r["status"] == "done"])
        for column in experiment.columns()
        for row in experiment.rows()
        if is_in(figure, row["name"], column["name"])
    ]
    if absent := [f"{row['name']}, {column['name']}" for row, column, results in found if not results]:
        print(f"{figure.get('paper', figure['name'])}: without {'; '.join(absent)}: not run, or failed")
    return [part for part in found if part[2]]


# ---- a score against a flag -----------------------------------------------------------------------------------------


def draw_curve(plt, experiment, figure):
    cells = shown(experiment, figure)
    if not cells:
        return None
    scores = [score_named(experiment, name) for name in figure["scores"]]
    drawn, axes = panels(plt, len(scores))
    columns = list(dict.fromkeys(column["name"] for _, column, _ in cells))
    for axis, score in zip(axes, scores, strict=False):
        for i, name in enumerate(columns):
            colour = evaluation.PALETTE[i % len(evaluation.PALETTE)]
            of_column = [cell for cell in cells if cell[1]["name"] == name]
            draw_score(axis, experiment, figure, score, of_column, {"color": colour, "label": name})
        dress(axis, {"xlabel": figure["x"], "ylabel": score["name"]} | figure.get("axes", {}))
    return name_lines(drawn, axes)


def draw_score(axis, experiment, figure, score, cells, style):
    points, chance, of_paper = [], [], []
    for row, column, results in cells:
        x = float(experiment.flags(row, column)[figure["x"]])
        points.append((x, [value(result, score["from"]) * score.get("times", 1) for result in results]))
        if "chance" in score:
            chance.append((x, statistics.fmean(value(result, score["chance"]) for result in results)))
        if (printed := row.get("paper", {}).get(column["name"], {}).get(score["name"])) is not None:
            of_paper.append((x, *number_and_spread(printed)))
    draw_means(axis, *zip(*sorted(points), strict=True), style)
    if chance:
        axis.plot(
            *zip(*sorted(chance), strict=True), ":", color=style["color"], lw=1, label=f"{style['label']}: chance"
        )
    if of_paper:
        x, y, spread = zip(*sorted(of_paper), strict=True)
        hollow = {"fmt": "s", "ms": 5, "mfc": "none", "lw": 1, "color": style["color"]}
        axis.errorbar(x, y, spread, **hollow, label=f"{style['label']}: the paper")


def value(result, score, take="trained"):
    """A number, or nan where there is none."""
    found = score_of(result, score, take)
    return math.nan if found is None else found


def number_and_spread(printed):
    """0.35 -> (0.35, 0.0); "0.35 ± 0.01" -> (0.35, 0.01)."""
    number, *spread = [float(part) for part in str(printed).split("±")]
    return number, sum(spread)


def score_named(experiment, name):
    for score in experiment.spec["score"]:
        if score["name"] == name:
            return score
    raise UserError(f"{experiment.name}: a figure shows {name}, which is none of the [[score]]s")


# ---- lines: one for each row, a panel for each column and key --------------------------------------------------------


def draw_lines(plt, experiment, figure):
    cells = shown(experiment, figure)
    keys = figure.get("keys") or figure["scores"]
    places = [(column, key) for column in dict.fromkeys(column["name"] for _, column, _ in cells) for key in keys]
    rows = list(dict.fromkeys(row["name"] for row, _, _ in cells))
    drawn, axes = panels(plt, len(places)) if cells else (None, ())
    for axis, (column_name, key) in zip(axes, places, strict=False):
        for row, column, results in cells:
            if column["name"] == column_name:
                found = [SERIES[figure["kind"]](experiment, figure, result, key) for result in results]
                draw_series(axis, [series for series in found if series[0]], style_of(rows.index(row["name"]), row))
        named = key if figure["kind"] == "epochs" else key.split(".")[-1]
        named += " / its largest" if figure.get("relative") else ""
        labels = {"title": column_name, "ylabel": named, "xlabel": X_OF.get(figure["kind"], figure.get("x", "rank"))}
        dress(axis, labels | figure.get("axes", {}))
    return name_lines(drawn, axes) if cells else None


def style_of(i, row):
    colour = evaluation.PALETTE[i % len(evaluation.PALETTE)]
    return {"color": colour, "ls": LINE_STYLES[i // len(evaluation.PALETTE) % 4], "label": row["name"]}


def draw_series(axis, series, style):
    """series: (x, y) of each seed; what all seeds have is shown."""
    if series:
        length = min(len(x) for x, _ in series)
        draw_means(axis, series[0][0][:length], list(zip(*(y[:length] for _, y in series), strict=True)), style)


def draw_means(axis, x, values, style):
    """values: of each x the values of the seeds that have been run."""
    axis.plot(x, [np.mean(of_x) for of_x in values], **{"marker": "o" if len(x) < 30 else None, "ms": 4} | style)
    if any(len(of_x) > 1 for of_x in values):
        lowest, highest = ([end(of_x) for of_x in values] for end in (np.min, np.max))
        axis.fill_between(x, lowest, highest, color=style["color"], alpha=0.2, lw=0)


def kept_series(experiment, figure, result, key):
    name, _, path = key.partition(".")
    kept = result.get("kept", {}).get(name, {})
    whole = next((k for k in kept if path == k or path.startswith(k + ".")), None)
    items = kept.get(whole) or []
    if whole == path:
        items = [item / (items[0] or math.nan) for item in items] if figure.get("relative") else items
        return list(range(1, len(items) + 1)), items
    return [item[figure["x"]] for item in items], [item[path[len(whole) + 1 :]] for item in items] if whole else []


def log_series(experiment, figure, result, key):
    lines = result.get("lines", {})
    points = [point for point in zip(lines.get("step", []), lines.get(key, []), strict=False) if None not in point]
    return [x for x, _ in points], [y for _, y in points]


def epoch_series(experiment, figure, result, key):
    score = score_named(experiment, key)
    epochs = epochs_of(result, score["from"].split(".")[0].split("[")[0])
    return list(epochs), [value(result, score["from"], name) * score.get("times", 1) for name in epochs.values()]


SERIES = {"lines": kept_series, "log": log_series, "epochs": epoch_series}
X_OF = {"log": "step", "epochs": "epoch"}


# ---- pictures --------------------------------------------------------------------------------------------------------


def draw_pictures(plt, experiment, figure):
    """A row of pictures for each column of the experiment."""
    places = []
    for row, column, _ in shown(experiment, figure):
        first = experiment.final_cells(row, column)[0]
        places.append((f"{row['name']}\n{column['name']}", experiment.picture(first.name, figure["file"])))
    for title, path in places:
        if not path.exists():
            print(f"{path}: not drawn for {one_line(title)}")
    places = [(title, path) for title, path in places if path.exists()]
    if not places:
        return None
    pictures = [cropped(plt.imread(path), figure.get("crop", (0, 0, 1, 1))) for _, path in places]
    height, width = pictures[0].shape[:2]
    drawn, axes = panels(plt, len(places), (PANEL[0], PANEL[0] * height / width + 0.4))
    for axis, (title, _), picture in zip(axes, places, pictures, strict=False):
        axis.imshow(picture, interpolation="antialiased")
        axis.set_title(title, fontsize=8)
        axis.axis("off")
    return drawn


def cropped(picture, part):
    height, width = picture.shape[:2]
    left, top, right, bottom = part
    return picture[round(top * height) : round(bottom * height), round(left * width) : round(right * width)]


# ---- what figures share ----------------------------------------------------------------------------------------------


def panels(plt, count, size=PANEL):
    """(figure, its axes in order), up to three beside one another."""
    across = 2 if count == 4 else min(3, count)
    size = (1.3 * size[0], 1.3 * size[1]) if count == 1 else size
    down = -(-count // across)
    drawn, axes = plt.subplots(down, across, figsize=(size[0] * across, size[1] * down), squeeze=False)
    for axis in axes.flat[count:]:
        axis.axis("off")
    return drawn, list(axes.flat[:count])


def dress(axis, settings):
    """Axes.set; a logarithmic axis of counts has plain numbers."""
    axis.set(**settings)
    if settings.get("xscale") == "log":
        plain_numbers(axis.xaxis)


def name_lines(drawn, axes):
    """One legend below all panels."""
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    width = 0.6 + 0.07 * max(map(len, handles), default=1)  # inches of one
    columns = max(1, int(drawn.get_figwidth() / width))
    drawn.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, fontsize=8)
    return drawn


KINDS = {"curve": draw_curve, "lines": draw_lines, "log": draw_lines, "epochs": draw_lines, "pictures": draw_pictures}

if __name__ == "__main__":
    main()
