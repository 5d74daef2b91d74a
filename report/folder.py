"""What a run's folder tells, whatever state it is in: read_run(folder) -> Run.

Nothing here raises for what a run has left, or has not: what is missing or damaged is a sentence in `Run.missing`.
"""

import fcntl
import hashlib
import itertools
import json
import math
import operator
import os
import struct
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from checkpoint import load_checkpoint
from monitor import diagnose
from utils import UserError, one_line

CHUNK = 4096  # lines of log.txt that are held as text; a long log has a million
SILENT_S = 1800  # a run that writes no line for so long, or for 20 times what a line of it takes, hangs
STORED = ("step", "epoch", "commit", "world_size", "batch_size", "effective_batch", "fingerprint", "format")


@dataclass
class Run:
    folder: Path
    steps: dict = field(default_factory=dict)  # {name: (T,) float64, NaN where a line has no such number}, of "step"
    epochs: dict = field(default_factory=dict)  # {name: (T,) float64} of "epoch" lines, and of "start"
    warnings: list = field(default_factory=list)  # spans of lines that look like a collapse
    starts: list = field(default_factory=list)  # of the present run, in order; "end" is a line that says how it ended
    args: dict = field(default_factory=dict)  # of the checkpoint
    stored: dict = field(default_factory=dict)  # STORED, of the checkpoint
    results: dict = field(default_factory=dict)  # {"knn": JSON of results_knn.json}
    state: str = "stale"
    why: str = ""  # a sentence beside the state
    missing: list = field(default_factory=list)

    @property
    def step(self):
        steps = self.steps.get("step", ())
        return int(steps[-1]) if len(steps) else int(number_or(self.stored.get("step"), 0))

    @property
    def total_steps(self):
        """None where nothing tells."""
        told = [start["of"] for start in reversed(self.starts) if isinstance(start.get("of"), int)]
        return (told or [number_or(self.args.get("max_steps"), None) or None])[0]


@dataclass
class Warned:
    """Logged lines from step `first` to `last` that looked alike."""

    kind: str
    first: int
    last: int
    sentence: str


def is_run(folder):
    return any((Path(folder) / name).is_file() for name in ("log.txt", "checkpoint.pth", "starts.txt"))


def runs_below(folder):
    """Folders of runs at and below `folder`, by name; links to folders are not followed."""
    return sorted(Path(path) for path, _, _ in os.walk(folder) if is_run(path))


def read_run(folder, with_checkpoint=True):
    """Everything of one folder. Raises UserError only where there is no such folder, or it is no run's."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected the --output_dir of main_cplearn.py")
    if not is_run(folder):
        raise UserError(f"{folder}: no run's folder: it has no log.txt, checkpoint.pth or starts.txt")
    run = Run(folder)
    read_log_of(run)
    read_starts(run)
    read_results(run)
    if with_checkpoint:
        read_checkpoint(run)
    run.state, run.why = state_of(run)
    return run


# ---- log.txt ---------------------------------------------------------------------------------------------------------


def read_log_of(run):
    columns, spans, damaged = {"step": Columns(), "epoch": Columns()}, Spans(), 0
    try:
        with open(run.folder / "log.txt", "rb") as file:
            while texts := list(itertools.islice(file, CHUNK)):
                lines = [line for line in parsed_together(texts) if is_line(line)]
                damaged += len(texts) - len(lines)
                columns["step"].add([line for line in lines if line["kind"] == "step"])
                columns["epoch"].add([line for line in lines if line["kind"] != "step"])
                for line in lines:
                    if line["kind"] == "step":
                        spans.add(line)
    except OSError as error:
        run.missing.append(f"log.txt cannot be read ({error.strerror}): no curves")
    if damaged:
        run.missing.append(f"log.txt: {damaged} lines are damaged or not of a run, and passed over")
    run.steps, run.epochs = (part.joined() for part in columns.values())
    run.warnings = spans.after(end_of_warm_up(run.steps))


def is_line(line):
    return line is not None and line.get("kind") in ("start", "step", "epoch") and type(line.get("step")) is int


def parsed_together(texts):
    """What each line of JSON holds: dicts, and None for what is none. All at once where all are whole, which is faster,
    for names that come again are one string then."""
    try:
        found = json.loads(b"[" + b",".join(texts) + b"]")
        if len(found) == len(texts) and all(type(line) is dict for line in found):
            return found
    except (ValueError, RecursionError):
        pass
    return list(map(parsed, texts))


def parsed(text):
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) else None


class Columns:
    """Numbers of many lines, by name: a million dicts would take gigabytes."""

    def __init__(self):
        self.parts = []  # (number of lines, {name: their numbers})

    def add(self, lines):
        if lines:
            names = [name for name in dict.fromkeys(itertools.chain.from_iterable(lines)) if name != "kind"]
            self.parts.append((len(lines), dict(zip(names, numbers(names, lines), strict=True))))

    def joined(self):
        """{name: (T,) float64}, in the order of the steps; names that no line has a number for are left out."""
        names = dict.fromkeys(name for _, part in self.parts for name in part)
        found = {
            name: np.concatenate([part.get(name, np.full(count, math.nan)) for count, part in self.parts])
            for name in names
        }
        return {name: values for name, values in found.items() if np.isfinite(values).any()}


def numbers(names, lines):
    """(names, lines) float64; NaN for null, for what is no number, and where a line has no such name."""
    try:
        rows = list(map(operator.itemgetter(*names, "step"), lines))  # with one name more it always gives a tuple
        return np.array(rows, dtype=np.float64)[:, :-1].T
    except (KeyError, TypeError, ValueError, OverflowError):
        return np.array([[number_or(line.get(name), math.nan) for line in lines] for name in names], dtype=np.float64)


def number_or(value, otherwise):
    if isinstance(value, bool) or not isinstance(value, int | float) or (isinstance(value, int) and abs(value) > 2**63):
        return otherwise
    return value


class Spans:
    """Runs of lines that `diagnose` says the same kind of."""

    def __init__(self):
        self.open, self.closed = {}, []

    def add(self, line):
        try:
            found = dict(diagnose(line))
        except (KeyError, TypeError, ValueError, OverflowError):
            found = {}  # a line without the numbers that are judged
        for kind in [kind for kind in self.open if kind not in found]:
            self.closed.append(self.open.pop(kind))
        for kind, sentence in found.items():
            span = self.open.setdefault(kind, Warned(kind, line["step"], line["step"], sentence))
            span.last, span.sentence = line["step"], sentence

    def after(self, step):
        """Those that reach beyond `step`, by their first one: before a run has warmed up, p is near uniform in all."""
        spans = [span for span in [*self.closed, *self.open.values()] if span.last > step]
        for span in spans:
            span.first = max(span.first, step)
        return sorted(spans, key=lambda span: span.first)


def end_of_warm_up(steps):
    """The step of the highest learning rate."""
    rates = steps.get("train_lr")
    return int(steps["step"][np.nanargmax(rates)]) if rates is not None else 0


# ---- starts.txt and the state ----------------------------------------------------------------------------------------


def read_starts(run):
    """Starts of the present run: those after the last one that began afresh; each with the "end" that follows it."""
    try:
        text = (run.folder / "starts.txt").read_bytes()
    except FileNotFoundError:
        run.missing.append("no starts.txt: how often the run was started, and with what, is not known")
        return
    except OSError as error:
        run.missing.append(f"starts.txt cannot be read ({error.strerror})")
        return
    for line in filter(None, map(parsed, text.splitlines())):
        if line.get("kind") == "start" and isinstance(line.get("step"), int):
            run.starts = ([] if line.get("afresh") is True else run.starts) + [line]
        elif line.get("kind") == "end" and run.starts:
            run.starts[-1]["end"] = line


def state_of(run):
    """("running", "finished", "stopped", "failed" or "stale", why)."""
    log, lock = run.folder / "log.txt", run.folder / ".lock"
    silent = time.time() - log.stat().st_mtime if log.is_file() else 0.0
    if is_locked(lock):
        allowed = max(SILENT_S, 20 * seconds_per_line(run))
        if silent > allowed:
            return "stale", f"a process holds the folder, and has logged nothing for {duration(silent)}"
        return "running", f"the last line is {duration(silent)} old"
    end = run.starts[-1].get("end", {}) if run.starts else {}
    how = str(end.get("how", ""))
    if how.startswith("failed"):
        return "failed", how.removeprefix("failed: ")
    if how.startswith("stopped"):
        return "stopped", f"{how}; the same command goes on"
    if how == "finished" or (run.total_steps or math.inf) <= run.step:
        return "finished", ""
    if run.starts:
        return "stale", "it said nothing of its end: killed, or its machine went down; the same command goes on"
    return "stale", f"nobody writes here, and no starts.txt tells whether {run.step} steps were all"


def seconds_per_line(run):
    """Median time between logged lines, 0 where it is not known."""
    seconds = seconds_of_lines(run)
    return float(np.median(seconds)) if len(seconds) else 0.0


def seconds_of_lines(run):
    """Of each logged line whose speed is known: the time since the line before."""
    speed, steps = run.steps.get("images_per_s"), run.steps.get("step", ())
    images = number_or(run.stored.get("effective_batch"), 0)
    if speed is None or not images:
        return np.zeros(0)
    with np.errstate(all="ignore"):
        seconds = np.diff(steps, prepend=0) * images / speed
    return seconds[np.isfinite(seconds) & (seconds >= 0)]


def is_locked(path):
    """Whether a process holds the POSIX record lock of `path`; asks without taking it, which a run that starts at
    this moment would meet. False where the system or the file system cannot tell."""
    layout = "hhqqi4x" if sys.platform == "linux" else "qqihh"  # struct flock of 64-bit Linux; of BSD and macOS
    question = (fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0) if sys.platform == "linux" else (0, 0, 0, fcntl.F_WRLCK, 0)
    try:
        with open(path, "rb+") as file:
            answer = struct.unpack(layout, fcntl.fcntl(file, fcntl.F_GETLK, struct.pack(layout, *question)))
    except OSError:
        return False
    return answer[0 if sys.platform == "linux" else 3] != fcntl.F_UNLCK


def duration(seconds):
    """ "41 s", "12 min", "3.4 h", "2.1 days"."""
    for size, unit, form in ((86400, "days", ".1f"), (3600, "h", ".1f"), (60, "min", ".0f")):
        if seconds >= 2 * size:
            return f"{seconds / size:{form}} {unit}"
    return f"{seconds:.0f} s"


# ---- checkpoint and evaluations --------------------------------------------------------------------------------------


def read_checkpoint(run):
    path = run.folder / "checkpoint.pth"
    if not path.is_file():
        run.missing.append("no checkpoint.pth yet: flags and weights are not known")
        return
    try:
        state = load_checkpoint(path)
        run.args = dict(state["args"])
        run.stored = {name: state[name] for name in STORED if name in state}
        run.stored["size_mib"] = path.stat().st_size / 2**20
        run.stored["weights"] = weights_fingerprint(state["teacher"])
    except (UserError, OSError, KeyError, TypeError, ValueError) as error:
        run.missing.append(f"checkpoint.pth cannot be read: {one_line(error)}")


def weights_fingerprint(state):
    """Of a backbone's tensors as they are in the file: 16 hexadecimal digits, equal where the weights are."""
    digest = hashlib.sha256()
    for name, tensor in state.items():
        if name.removeprefix("module.").startswith("backbone."):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def read_results(run):
    for path in sorted(run.folder.glob("results_*.json")):
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            rows = [row for row in found["rows"] if isinstance(row, dict)]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            run.missing.append(f"{path.name} is damaged ({one_line(error)}): run that evaluation again")
            continue
        run.results[path.stem.removeprefix("results_")] = found | {"rows": rows}
    if not run.results:
        run.missing.append("no results_*.json: nothing has been evaluated with --output_dir here")
