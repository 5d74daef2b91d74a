"""Curves for a page: series of points, thinned so that a page stays small, and the HTML that charts.js draws.

    figure(Chart("RankMe", [Series("run a", steps, values)]))

Every chart is also a table, for readers without a pointer, a screen, or scripts: first, least, greatest and last value.
"""

import json
from dataclasses import dataclass, field
from html import escape

import numpy as np

MOST_POINTS = 2000  # of a series: more than a screen has pixels
ALL_POINTS = 200_000  # of a page: about 3 MB of numbers
COLORS = 8  # classes s0 to s7 of the style sheet
DASHES = ("", "6 3", "2 3", "8 3 2 3")  # a colour comes again with another one


@dataclass
class Series:
    label: str
    x: np.ndarray
    y: np.ndarray


@dataclass
class Span:
    """Steps that are marked: kind "warning" or "restart"."""

    first: float
    last: float
    text: str
    kind: str


@dataclass
class Chart:
    title: str
    series: list
    log: bool = False
    least: float | None = None  # the axis begins there, or below
    spans: list = field(default_factory=list)
    xlabel: str = "step"


def figure(chart, most=MOST_POINTS):
    """HTML of a chart; empty where no series has a point."""
    series = [thinned(one, most) for one in chart.series]
    series = [one for one in series if len(one.x)]
    if not series:
        return ""
    rows = "".join(
        f"<tr><th scope=row>{escape(one.label)}</th>"
        + "".join(f"<td>{number(value)}</td>" for value in (one.y[0], one.y.min(), one.y.max(), one.y[-1]))
        + "</tr>"
        for one in series
    )
    legend = "".join(
        f'<li><svg width="26" height="10" aria-hidden="true"><line class="s{color(i)}" x2="26" y1="5" y2="5" '
        f'stroke-dasharray="{dash(i)}"/></svg>{escape(one.label)} <output></output></li>'
        for i, one in enumerate(series)
    )
    marks = "".join(f"<li>{escape(span.text)}</li>" for span in chart.spans)
    return f"""<figure class="chart">
<figcaption><b>{escape(chart.title)}</b> <span class="at" aria-live="polite"></span>
<label><input type="checkbox"{" checked" if chart.log else ""}> log</label></figcaption>
<div class="plot" tabindex="0" role="group" aria-label="{escape(chart.title)}: arrow keys move along the curves"></div>
<ul class="legend">{legend}</ul>
<details><summary>As a table</summary><table><thead><tr><th scope=col>curve</th><th scope=col>first</th>
<th scope=col>least</th><th scope=col>greatest</th><th scope=col>last</th></tr></thead><tbody>{rows}</tbody></table>
{f"<ul>{marks}</ul>" if marks else ""}</details>
<script type="application/json">{embedded(data_of(chart, series))}</script>
</figure>
"""


def data_of(chart, series):
    drawn = [
        {"x": [rounded(x) for x in one.x], "y": [rounded(y) for y in one.y], "color": color(i), "dash": dash(i)}
        for i, one in enumerate(series)
    ]
    spans = [{"from": s.first, "to": s.last, "text": s.text, "kind": s.kind} for s in chart.spans]
    return {"series": drawn, "spans": spans, "least": chart.least, "xlabel": chart.xlabel}


def embedded(data):
    """JSON inside of HTML: no text in it can end the element."""
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c").replace("&", "\\u0026")


def thinned(series, most):
    """Finite points; where there are too many, the least and the greatest of each of most / 2 stretches, in order: no
    peak is lost. The first and the last point stay."""
    x, y = np.asarray(series.x, np.float64), np.asarray(series.y, np.float64)
    finite = np.isfinite(x) & np.isfinite(y)
    x, y = x[finite], y[finite]
    if len(x) > most:
        stretches = np.array_split(np.arange(len(x)), most // 2)
        chosen = {0, len(x) - 1}
        for part in stretches:
            chosen |= {int(part[y[part].argmin()]), int(part[y[part].argmax()])}
        chosen = sorted(chosen)
        x, y = x[chosen], y[chosen]
    return Series(series.label, x, y)


def rounded(value):
    """Six digits: no screen shows more."""
    value = float(f"{value:.6g}")
    return int(value) if value.is_integer() and abs(value) < 1e15 else value


def number(value):
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) < 1e9 else f"{value:.4g}"


def color(i):
    return i % COLORS


def dash(i):
    return DASHES[i // COLORS % len(DASHES)]
