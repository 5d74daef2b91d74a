"""The page of one run, and of several beside one another: read runs -> HTML.

The page is one file: pictures and numbers are in it, its only script is charts.js, named to the browser by its hash,
and nothing in it comes from or leads outside. What runs left is shown as text, never as markup.
"""

import math
import shlex
from pathlib import Path

import numpy as np

from evaluation.page import html_page
from monitor import panels_for
from report import pictures
from report.charts import ALL_POINTS, MOST_POINTS, Chart, Series, Span, figure
from report.compare import comparison
from report.folder import Run, duration, number_or, seconds_of_lines
from report.html import facts, note, printable, section, table, text_of
from report.words import BASELINES, headline

SCRIPT = Path(__file__).with_name("charts.js")
STYLE = Path(__file__).with_name("page.css")


def report_page(runs, refresh=None):
    """HTML of one run or several.  refresh: seconds after which a browser reads the file again."""
    names = names_of(runs)
    charts = charts_of(runs, names)
    most = max(20, min(MOST_POINTS, ALL_POINTS // max(1, sum(len(chart.series) for chart in charts))))
    drawn = "".join(figure(chart, most) for chart in charts) or "<p>No line has been logged yet.</p>"
    smoothing = '<label>Smoothing <input id="smoothing" type="range" min="0" max="0.98" step="0.02" value="0"></label>'
    several = len(runs) > 1
    curves = section("Curves", f"<p>{smoothing}{key_of(charts)}</p><div class=charts>{drawn}</div>")
    return html_page(
        f"{len(runs)} runs of {printable(runs[0].folder.absolute().parent)}" if several else names[0],
        "".join(verdict(run, name if several else "") for run, name in zip(runs, names, strict=True)),
        comparison(runs, names) + curves if several else curves + sections_of(runs[0]),
        STYLE.read_text(encoding="utf-8"),
        script=SCRIPT.read_text(encoding="utf-8"),
        refresh=refresh,
    )


def names_of(runs):
    """The last parts of the folders' paths, as many as tell them apart."""
    parts = [run.folder.absolute().parts for run in runs]
    depth = 1
    while depth < max(map(len, parts)) and len({part[-depth:] for part in parts}) < len(set(parts)):
        depth += 1
    return [printable("/".join(part[-depth:])) for part in parts]


def verdict(run, name):
    kind, sentence = headline(run)
    begin = f"<b>{text_of(name)}</b>: " if name else ""
    progress = f"step {run.step:,}" + (f" of {run.total_steps:,}" if run.total_steps else "")
    state = f"{run.state} ({run.why})" if run.why else run.state
    missing = "".join(f"<li>{text_of(text)}</li>" for text in run.missing)
    told = f'<p class="verdict {kind}">{begin}{text_of(sentence)} <span>{text_of(state)}, {progress}</span></p>\n'
    return told + (f"<ul class=missing>{missing}</ul>\n" if missing else "")


# ---- curves ----------------------------------------------------------------------------------------------------------


def charts_of(runs, names):
    """A chart for each panel of a run; of several runs one for each curve, with a line for each run."""
    charts, alone = {}, len(runs) == 1
    for run, name in zip(runs, names, strict=True):
        for panel, least, label, points in curves_of(run):
            title = panel if alone or label in panel else f"{panel}: {label}"
            chart = charts.setdefault(title, Chart(title, [], log=least == "log", least=0 if least == 0 else None))
            chart.series.append(Series(label if alone else name, *points))
    for chart in charts.values() if alone else ():
        chart.spans = spans_of(runs[0])
    return [*charts.values(), *spectra(runs, names)]


def curves_of(run):
    """Yields (panel, least value shown or "log", curve, (steps, values)) of what the run has numbers for."""
    for panel, (least, curves) in (panels_for(run.steps) | OWN_PANELS).items():
        for label, value_of in curves.items():
            points = points_of(run, value_of)
            if points is not None:
                yield panel, least, label, points
    for name, label in (("knn_top1", "k-NN"), ("linear_top1", "linear probe")):
        if name in run.epochs:
            yield "accuracy while training (%)", None, label, (run.epochs["step"], run.epochs[name])


OWN_PANELS = {  # as monitor.PANELS
    "speed (images/s)": (0, {"images/s": lambda line: line["images_per_s"]}),
    "time spent waiting for data (share)": (0, {"waiting": lambda line: line["data_wait"]}),
}


def points_of(run, value_of):
    """(steps, values) of a curve of monitor.PANELS, or None where the run has no such numbers."""
    if "step" not in run.steps:
        return None
    try:
        values = np.broadcast_to(value_of(run.steps), run.steps["step"].shape)
    except (KeyError, TypeError):
        return None
    return (run.steps["step"], values) if np.isfinite(values).any() else None


def key_of(charts):
    """What the marks on the curves mean, of those that there are."""
    kinds = {span.kind for chart in charts for span in chart.spans}
    meanings = {"restart": "vertical line: the run was started again", "warning": "shaded: looked like a collapse"}
    return "".join(f' <span class="key {kind}">{text}</span>' for kind, text in meanings.items() if kind in kinds)


def spans_of(run):
    warned = [Span(w.first, w.last, f"steps {w.first:,} to {w.last:,}: {w.sentence}", "warning") for w in run.warnings]
    again = [
        Span(start["step"], start["step"], f"started again at step {start['step']:,}", "restart")
        for start in run.starts[1:]
    ]
    return warned + again


def spectra(runs, names):
    """Eigenvalues of the features' covariance, as eval_collapse.py has kept them."""
    series = []
    for run, name in zip(runs, names, strict=True):
        curves = run.results.get("collapse", {}).get("curves")
        for model, kept in (curves if isinstance(curves, dict) else {}).items():
            values = kept.get("spectrum") if isinstance(kept, dict) else None
            if isinstance(values, list) and values:
                y = np.array([number_or(value, math.nan) for value in values], np.float64)
                label = model if model in BASELINES else "trained" if len(runs) == 1 else name
                series.append(Series(label, np.arange(1, len(y) + 1), np.where(y > 0, y, math.nan)))
    title = "spectrum of the features (eigenvalues of their covariance)"
    return [Chart(title, series, log=True, xlabel="rank")] if series else []


# ---- one run ---------------------------------------------------------------------------------------------------------


def sections_of(run):
    return "".join([
        section("Evaluations", evaluations(run)),
        *(section(title, body) for title, body in pictures.shown(run.folder)),
        section("Cost", facts(cost_of(run))),
        section("How it was made", facts(origin_of(run)) + flags_table(run)),
    ])  # fmt: skip


def evaluations(run):
    return "".join(f"<h3>{text_of(name)}</h3>\n{table_of(run, name)}" for name in run.results)


def table_of(run, name):
    """The table that the evaluation printed, and its notes and command, as results_<name>.md has them."""
    try:
        text = (run.folder / f"results_{name}.md").read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        return note(f"results_{name}.md cannot be read ({error.strerror})")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    head, *rows = [line.strip("|").split("|") for line in lines if line.startswith("|")] or [[]]
    rows = [[cell.strip() for cell in row] for row in rows[1:] if len(row) == len(head)]
    notes = [line for line in lines if not line.startswith("|")] + chance(run, name)
    return (table([cell.strip() for cell in head], rows, name) if rows else "") + "".join(map(note, notes))


def chance(run, name):
    """The accuracy of guessing, where the table tells how many classes there are."""
    found = [row["per_class"] for row in run.results[name]["rows"] if isinstance(row.get("per_class"), dict)]
    classes = len(found[0]) if found else 0
    return [f"By chance: {100 / classes:.3g} % ({classes} classes)."] if classes else []


def cost_of(run: Run):
    """Pairs of words: what the run took so far."""
    steps, images = run.steps, number_or(run.stored.get("effective_batch"), 0)
    speed, wait, memory = (steps.get(name) for name in ("images_per_s", "data_wait", "memory_mb"))
    ended = [start["end"]["time"] - start["time"] for start in run.starts if has_times(start)]
    yield "images seen", f"{run.step * images:,.0f} ({run.step:,} steps of {images:,.0f})" if images else None
    yield "time in logged steps", duration(seconds_of_lines(run).sum())
    yield "time of its starts", f"{duration(sum(ended))}, of {len(ended)} that told their end" if ended else None
    yield "started", f"{len(run.starts)} times" if len(run.starts) > 1 else "once" if run.starts else None
    yield "images/s, median", f"{np.nanmedian(speed):,.0f}" if speed is not None else None
    yield "share of the time spent waiting for data, median", f"{np.nanmedian(wait):.1%}" if wait is not None else None
    yield "peak memory", f"{np.nanmax(memory) / 1000:.2f} GB" if memory is not None else None
    yield "checkpoint", f"{run.stored['size_mib']:.1f} MiB" if "size_mib" in run.stored else None


def has_times(start):
    return all(isinstance(part.get("time"), int | float) for part in (start, start.get("end", {})))


def origin_of(run):
    """Pairs of words: what made the run, and of what."""
    start = run.starts[-1] if run.starts else {}
    command = start.get("command")
    yield "command", shlex.join(["python", *map(str, command)]) if isinstance(command, list) else None
    yield "commit", ", ".join(dict.fromkeys(str(s.get("commit")) for s in run.starts)) or run.stored.get("commit")
    yield "versions", ", ".join(f"{name} {start[name]}" for name in ("python", "torch") if name in start)
    yield "machine", ", ".join(f"{s.get('processes')} x {s.get('device')} on {s.get('host')}" for s in run.starts[-1:])
    yield "seed", run.args.get("seed")
    yield "weights (fingerprint)", run.stored.get("weights")
    yield "images (fingerprint)", run.stored.get("fingerprint")


def flags_table(run):
    """Flags that were not the defaults, as the run's last start has written them down; else all of the checkpoint's."""
    given = next((start["flags"] for start in reversed(run.starts) if isinstance(start.get("flags"), dict)), None)
    if given is None:
        rows = [(f"--{name}", value) for name, value in sorted(run.args.items())]
        return f"<h3>Flags</h3>\n{table(('flag', 'value'), rows, 'flags')}" if rows else ""
    pairs = {name: pair for name, pair in given.items() if isinstance(pair, list) and len(pair) == 2}
    rows = [(f"--{name}", *pair) for name, pair in sorted(pairs.items()) if name != "output_dir"]
    return f"<h3>Flags that are not the defaults</h3>\n{table(('flag', 'value', 'default'), rows, 'flags')}"
