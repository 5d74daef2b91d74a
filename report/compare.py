"""Several runs beside one another: flags that differ, scores over seeds, and what needs no labels."""

import re
import statistics
from pathlib import Path

import numpy as np

from report.folder import number_or
from report.html import note, section, table
from report.words import BASELINES, headline, plain

RESULTS_PAGE = Path(__file__).resolve().parent.parent / "docs" / "results.md"
SCORES = (  # title, evaluation, the rows that count, key, format
    ("k-NN top-1 %", "knn", None, "top1", ".2f"),
    ("few labels top-1 %", "few", None, "top1", ".1f"),
    ("linear top-1 %", "linear", None, "top1", ".2f"),
    ("codes, AMI", "cluster", "codes", "ami", ".3f"),
    ("codes, NMI", "cluster", "codes", "nmi", ".3f"),
    ("codes, NMI by chance", "cluster", "codes", "nmi_chance", ".3f"),
    ("k-means, AMI", "cluster", "k-means", "ami", ".3f"),
    ("RankMe", "collapse", None, "rankme", ".1f"),
)
WITHOUT_LABELS = (  # title, key of the last logged line, whether more of it should be better
    ("loss", "train_loss", False),
    ("gap / trivial", "gap_share", False),
    ("RankMe", "rankme", True),
    ("codes in use", "codes_used", True),
    ("perplexity of codes", "perplexity", True),
)


def comparison(runs, names):
    return "".join([
        section("Runs", overview(runs, names)),
        section("Scores", scores(runs, names)),
        section("Flags that differ", flags(runs, names)),
        section("Without labels", without_labels(runs, names)),
    ])  # fmt: skip


def overview(runs, names):
    rows = [
        (name, run.state, f"{run.step:,}", headline(run)[1], *(last_of(run, key) for key in ("train_loss", "rankme")))
        for run, name in zip(runs, names, strict=True)
    ]
    return table(("run", "state", "step", "health", "loss", "RankMe"), rows, "runs")


def last_of(run, key):
    values = run.steps.get(key)
    return f"{values[-1]:.4g}" if values is not None and np.isfinite(values[-1]) else "-"


def flags(runs, names):
    every = sorted({name for run in runs for name in run.args} - {"output_dir"})
    rows = [(f"--{name}", *(plain(run.args.get(name, "-")) for run in runs)) for name in every]
    rows = [row for row in rows if any(value != row[1] for value in row[2:])]
    return table(("flag", *names), rows, "flags that differ") if rows else note("None but --output_dir.")


# ---- scores ----------------------------------------------------------------------------------------------------------


def scores(runs, names):
    """A line for each group of runs that differ in nothing but their seed: mean ± standard deviation over its runs."""
    groups = {}
    for run, name in zip(runs, names, strict=True):
        groups.setdefault(group_of(run, name), []).append((name, run))
    found = [title for title in SCORES if any(score_of(run, title) is not None for run in runs)]
    if not found:
        return note("None of the runs has been evaluated with --output_dir in its folder.")
    rows = []
    for members in groups.values():
        samples = [[v for _, run in members if (v := score_of(run, title)) is not None] for title in found]
        label = (
            members[0][0] if len(members) == 1 else f"{len(members)} seeds: {', '.join(name for name, _ in members)}"
        )
        rows.append((label, *(told(sample, title[-1]) for sample, title in zip(samples, found, strict=True))))
    return table(("runs", *(title for title, *_ in found)), rows, "scores") + note(
        "Runs that differ in nothing but --seed are one line: mean ± standard deviation over them."
    )


def group_of(run, name):
    if not run.args:
        return name  # its flags are not known
    return repr(sorted((key, plain(value)) for key, value in run.args.items() if key not in ("seed", "output_dir")))


def score_of(run, title):
    """A number of the trained model's row, or None."""
    _, evaluation, method, key, _ = title
    for row in run.results.get(evaluation, {}).get("rows", []):
        fits = method is None or (str(row.get("method", "")).split(" ")[0] == method and "merged" not in row["method"])
        if row.get("checkpoint") not in BASELINES and fits and number_or(row.get(key), None) is not None:
            return row[key]
    return None


def told(sample, form):
    if not sample:
        return "-"
    mean = format(statistics.fmean(sample), form)
    return f"{mean} ± {statistics.stdev(sample):{form}} (n = {len(sample)})" if len(sample) > 1 else mean


# ---- what needs no labels --------------------------------------------------------------------------------------------


def without_labels(runs, names):
    """The last logged line's numbers, each with the run's place by it, and what such places were worth."""
    columns = []
    for title, key, more in WITHOUT_LABELS:
        values = [float(run.steps[key][-1]) if key in run.steps else np.nan for run in runs]
        if np.isfinite(values).all():
            order = sorted(values, reverse=more)
            columns.append((title, [f"{value:.4g} ({order.index(value) + 1}.)" for value in values]))
    if not columns:
        return ""
    rows = list(zip(names, *(cells for _, cells in columns), strict=True))
    worth = worth_of_choice()
    return table(("run", *(title for title, _ in columns)), rows, "without labels") + note(
        "Of the last logged line; in brackets the run's place. Losses of other objectives, and of other K or beta, are "
        "not comparable." + (f" What it is worth, from docs/results.md: {worth}" if worth else "")
    )


def worth_of_choice():
    """The sentence of docs/results.md on choosing without labels; "" where the page is not at hand."""
    try:
        page = RESULTS_PAGE.read_text(encoding="utf-8")
    except OSError:
        return ""
    found = re.search(r"<!-- claim choice -->\n.*?\n\n(.*?)\n\n", page, re.DOTALL)
    return found[1].replace("\n", " ") if found and "Not run" not in found[1] else ""
