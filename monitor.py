"""What a run shows and writes down: logged lines, log.txt, TensorBoard events, loss.png, and warnings in words.

Recorder    each step's numbers, kept on the device and read once per logged line
RunLog      where they go: terminal, log.txt (JSON lines), TensorBoard; rank 0 only
feature_statistics, rankme, diagnose, plot_log
"""

import contextlib
import copy
import json
import math
import operator
import os
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch.nn import functional as F
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from running.files import append_whole, replace_file
from running.loggers import Forwarder
from utils import UNREADABLE, RunFailed, all_reduce_mean, one_line, rank

MAX_FEATURE_ROWS = 1024  # rows of a logged line's RankMe
SECONDS_PER_DRAWING = 300
ALIKE = 2  # lines that look like the same collapse: one may be an accident
DRAW = "import sys; from monitor import plot_log; plot_log(*sys.argv[1:])"


class NonFiniteLoss(RunFailed):
    """The same command again would meet the same number."""


class Recorder:
    """Averages of each step's numbers, over the steps since the last logged line and over the epoch.

    `state_dict()` holds what a resumed run needs to log what the undisturbed run would have logged.
    """

    def __init__(self):
        self.pending = []  # (step, tensor of its numbers) since the last read, on the device
        self.line, self.epoch = Averages(), Averages()

    def record(self, step, **numbers):
        """Keep scalars of global step `step`; no wait for the device."""
        self.names = list(numbers)
        self.pending.append((step, torch.stack([x.detach().float() for x in numbers.values()])))

    def read(self, may_overflow=()):
        """Fetch what was recorded, averaged over processes, which call it together: the one wait for the device.

        Raises NonFiniteLoss, on all of them, naming the first step and term that is not finite; `may_overflow` names
        those that may be (fp16's gradient norm).
        """
        if self.pending:
            steps, rows = zip(*self.pending, strict=True)
            means = all_reduce_mean(torch.stack(rows)).tolist()
            self.pending = []
            self._add(steps, means, may_overflow)

    def read_alone(self, may_overflow=()):
        """A copy that has read what this process recorded, for when the others do not answer. Raises NonFiniteLoss."""
        alone = copy.deepcopy(self)
        alone._add([step for step, _ in self.pending], [row.tolist() for _, row in self.pending], may_overflow)
        return alone

    def _add(self, steps, rows, may_overflow):
        for step, row in zip(steps, rows, strict=True):
            numbers = dict(zip(self.names, row, strict=True))
            # the loss is the sum of its terms: the term is the name that helps
            for name in sorted(numbers, key=lambda n: n == "loss"):
                if not math.isfinite(numbers[name]) and name not in may_overflow:
                    raise NonFiniteLoss(
                        f"step {step}: {name} is {numbers[name]}; the optimizer's step was not taken and the last "
                        "checkpoint is good; lower --lr, or try --precision fp32"
                    )
            self.line.add(numbers)
            self.epoch.add(numbers)

    def state_dict(self):
        return {"line": vars(self.line).copy(), "epoch": vars(self.epoch).copy()}

    def load_state_dict(self, state):
        for averages, kept in ((self.line, state["line"]), (self.epoch, state["epoch"])):
            averages.count, averages.sums = int(kept["count"]), {k: float(v) for k, v in kept["sums"].items()}


class Averages:
    """Running means of named numbers."""

    def __init__(self):
        self.count, self.sums = 0, {}

    def add(self, numbers):
        self.count += 1
        self.sums = {name: self.sums.get(name, 0.0) + value for name, value in numbers.items()}

    def take(self):
        """The means so far; the next ones begin anew."""
        means = {name: value / self.count for name, value in self.sums.items()}
        self.count, self.sums = 0, {}
        return means


class RunLog:
    """Terminal, log.txt and TensorBoard of one run, continued at `step`. Silent on every rank but 0.

    A disk that is full or read-only for a while costs no line of log.txt: they wait in memory."""

    def __init__(self, output_dir, step, total_steps, epoch_is_open=False):
        self.folder, self.total_steps = Path(output_dir), total_steps
        self.step = self.first_step = step
        self.started = time.monotonic()
        self.writer = self.bar = None
        self.warned, self.alike, self.collapse = set(), {}, None
        self.waiting = ""  # lines that are not in log.txt yet
        self.drawing, self.drawn_at = None, self.started
        self.forwarder = None  # --log_to
        if rank() == 0:
            threading.excepthook = keep_tensorboard_quiet
            drop_lines_after(self.folder / "log.txt", step, epoch_is_open)
            if sys.stderr.isatty():
                self.bar = tqdm(total=total_steps, initial=step, unit="step", dynamic_ncols=True)

    def print(self, text):
        """One line for people, above the progress bar."""
        if rank() == 0:
            try:
                tqdm.write(text, file=sys.stdout)
                sys.stdout.flush()
            except UNREADABLE as error:
                with contextlib.suppress(*UNREADABLE):  # or the interpreter's end fails of what is left to be written
                    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                    print(f"warning: stdout cannot be written ({error}); log.txt has the figures", file=sys.stderr)

    def warn(self, found, advice):
        """Say in words what `diagnose` found, each kind once until it is gone again."""
        for kind, sentence in found:
            if kind not in self.warned:
                self.print(
                    f"warning: step {self.step}: this looks like {sentence}; {advice.get(kind, 'see the README')}"
                )
        self.warned = {kind for kind, _ in found}
        self.alike = {kind: self.alike.get(kind, 0) + 1 for kind in self.warned}  # lines one after the other
        lasting = [sentence for kind, sentence in found if self.alike[kind] >= ALIKE and kind != "saddle"]
        self.collapse = lasting[0] if lasting else None

    def advance(self):
        if self.bar is not None:
            self.bar.update()

    def write(self, line):
        """Append a dict of numbers with "kind" ("start", "step", "epoch") and "step"; what is not finite is null."""
        self.step = line["step"]
        if rank() != 0:
            return
        line = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        self.waiting += json.dumps(line) + "\n"
        self.flush()
        if self.forwarder is not None:
            self.forwarder.send(line)
        with self.going_on("TensorBoard's events"):
            self._add_events(line)
        if line["kind"] == "step":
            self._show(line)

    def draw(self, last=False):
        """loss.png, every `SECONDS_PER_DRAWING` by another process, so that training goes on; at the end here."""
        if rank() != 0 or not (last or time.monotonic() > self.drawn_at + SECONDS_PER_DRAWING):
            return
        self.drawn_at = time.monotonic()
        with self.going_on("loss.png"):
            self.stop_drawing()
            paths = [(self.folder / name).resolve() for name in ("log.txt", "loss.png")]
            if last:
                plot_log(*paths)
            else:
                self.drawing = subprocess.Popen(
                    [sys.executable, "-c", DRAW, *map(str, paths)], cwd=Path(__file__).resolve().parent,
                    env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, start_new_session=True,  # signals are the run's
                    stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                )  # fmt: skip

    def stop_drawing(self):
        """Raises RuntimeError where the figure before could not be drawn. One that takes so long is given up."""
        drawing, self.drawing = self.drawing, None
        if drawing is not None:
            unfinished = drawing.poll() is None
            drawing.kill()
            _, said = drawing.communicate()
            if drawing.returncode and not unfinished:
                raise RuntimeError(said.strip().splitlines()[-1] if said.strip() else f"exit code {drawing.returncode}")

    def _add_events(self, line):
        writer, self.writer = self.writer, None  # one that has failed once always fails: the next line gets a new one
        writer = writer or SummaryWriter(str(self.folder), purge_step=line["step"])
        for name, value in line.items():
            if isinstance(value, int | float) and name not in ("step", "epoch"):
                writer.add_scalar(f"{line['kind']}/{name}", value, line["step"])
        self.writer = writer

    def flush(self):
        """Write the lines that wait."""
        if rank() == 0:
            with self.going_on("log.txt"):
                append_whole(self.folder / "log.txt", self.waiting.encode())
                self.waiting = ""

    def force_to_disk(self):
        """Force there what was written, before a checkpoint that says it is; in any thread, while lines are added."""
        with self.going_on("log.txt"), open(self.folder / "log.txt", "ab") as file:
            os.fsync(file.fileno())

    @contextlib.contextmanager
    def going_on(self, what, failed="could not be written"):
        """What cannot be written, or drawn, is a warning: the run goes on, and the disk may be mended meanwhile."""
        try:
            yield
        except Exception as error:  # of a disk, or whatever a library of figures raises: never worth a run
            reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {one_line(error)}"
            self.print(f"warning: step {self.step}: {what} {failed}: {reason}; going on")

    def _show(self, line):
        speed = f"{line['images_per_s']:.0f} images/s"
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {line['train_loss']:.4f}, {speed}", refresh=False)
            return
        if is_cplearns(line):  # terms whose sum is the loss
            line = line | {"beta x invariance": line["train_loss"] - line["train_prior"]}
            terms = ("beta x invariance", "train_prior")
        else:
            terms = terms_of(line)
        names = ("train_loss", *terms, "train_lr", "codes_used", "rankme")
        shown = [f"{n.removeprefix('train_')} {line[n]:.4g}" for n in names if line.get(n) is not None]
        left = (time.monotonic() - self.started) / (line["step"] - self.first_step) * (self.total_steps - line["step"])
        self.print(f"step {line['step']}/{self.total_steps}  {'  '.join(shown)}  {speed}  {hours(left)} left")

    def forward_to(self, name, flags):
        """Lines go to the logger of --log_to too, from now on."""
        if name is not None and rank() == 0:
            self.forwarder = Forwarder(name, self.folder, flags, self.print)

    def close(self):
        self.flush()
        if self.forwarder is not None:
            self.forwarder.close()
        for open_one in (self.bar, self.writer):
            if open_one is not None:
                with self.going_on("TensorBoard's events"):
                    open_one.close()


def terms_of(line):
    """Names of the loss's terms in a logged line; entropy is none where a panel sets it against the prior."""
    others = {"train_loss", "train_lr", "train_wd", "train_grad_norm"}
    others |= {"train_entropy"} if "information" in line or is_cplearns(line) else set()
    return [name for name in line if name.startswith("train_") and name not in others]


def is_cplearns(line):
    """Whether a logged line is of CPLearn's loss, which is beta x invariance + prior and has a bound."""
    return "gap" in line


def keep_tensorboard_quiet(args):
    """Its thread prints an error that the next call raises again, where it becomes one line."""
    if not type(args.thread).__module__.startswith("tensorboard"):
        threading.__excepthook__(args)


def hours(seconds):
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def read_log(path):
    """The lines of a log.txt as dicts; what a killed run left half written, or damage, is passed over."""
    lines = []
    with contextlib.suppress(FileNotFoundError), open(path, encoding="utf-8", errors="replace") as file:
        for text in file:
            with contextlib.suppress(ValueError, RecursionError):
                lines.append(json.loads(text))
    return [line for line in lines if isinstance(line, dict) and isinstance(line.get("step"), int) and "kind" in line]


def drop_lines_after(path, step, epoch_is_open=False):
    """Remove what a killed run logged after its last checkpoint: the resumed run writes it again. epoch_is_open: the
    checkpoint is of an epoch's end, and the epoch's own line comes after it."""
    if path.exists():
        kept = [line for line in read_log(path) if step and line["step"] <= step]
        if epoch_is_open:
            kept = [line for line in kept if (line["kind"], line["step"]) != ("epoch", step)]
        with replace_file(path, alone=True) as file:
            file.write("".join(json.dumps(line) + "\n" for line in kept).encode())


# ---- what features look like -----------------------------------------------------------------------------------------


def feature_statistics(features):
    """`feature_tensors` as floats: one wait for the device."""
    return read_together(feature_tensors(features))


def feature_tensors(features):
    """Of backbone features (N, D): mean and standard deviation (Fig. 7 of arXiv 2410.04959: the first over all entries,
    the second over images, averaged over features), `spread` = rms distance from the mean feature over rms length, in
    [0, 1], and RankMe of at most 1024 rows with the largest that it could be. Tensors of one number, not waited for,
    but for the eigenvalues in RankMe: on a GPU their routine waits by itself."""
    features = features.float()
    centered = features - features.mean(dim=0)
    rows = features[:MAX_FEATURE_ROWS]
    return {
        "feature_mean": features.mean(),
        "feature_std": centered.square().sum(dim=0).div(len(features) - 1).sqrt().mean(),
        "spread": (centered.square().sum() / features.square().sum().clamp(min=torch.finfo(torch.float32).tiny)).sqrt(),
        "rankme": rankme_tensor(rows),
        "rankme_max": min(rows.shape),
    }


def read_together(line):
    """A line whose tensors of one number have become numbers of their kind: one wait for the device."""
    names = [name for name, value in line.items() if torch.is_tensor(value)]
    if not names:
        return line
    values = torch.stack([line[name].detach().float() for name in names]).tolist()
    whole = {name: not line[name].is_floating_point() for name in names}
    return line | {name: int(v) if whole[name] else v for name, v in zip(names, values, strict=True)}


def rankme(features):
    """Effective rank of features (N, D): exp of the entropy of their singular values, in [1, min(N, D)].

    Garrido et al., "RankMe", ICML 2023, Eq. 1; NaN where features are all zero or not finite."""
    return float(rankme_tensor(features))


def rankme_tensor(features):
    """`rankme` as a tensor. The singular values are the roots of the Gram matrix's eigenvalues, in float64."""
    if features.device.type == "mps":  # it has no float64
        features = features.cpu()
    x = features.double()
    valid = torch.isfinite(x).all() & x.any()
    x = torch.nan_to_num(x, 0, 0, 0)
    gram = x @ x.T if len(x) < x.shape[1] else x.T @ x
    values = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    rank_of = torch.special.entr(values / values.sum()).sum().exp()
    return torch.where(valid, rank_of, math.nan)


def diagnose(line):
    """What the numbers of a logged line look like: list of (kind, sentence); empty for a healthy run.

    Kinds: the four collapses of section 1 and Fig. 1 of arXiv 2410.04959, and the saddle where every p is uniform.
    Numbers that a line does not have are not judged. The limits are rules of thumb, far from what runs that learn show:
    the cross-entropy of two views passes log K on its way down, so the saddle is told by the entropy of p; and clusters
    have collapsed where a batch's mean prediction has less than a quarter of the perplexity that is possible.
    """
    found = []
    if line["spread"] < 0.01:
        found.append(
            ("representation", f"representation collapse: features differ by {line['spread']:.2%} of their length")
        )
    elif line["rankme"] < max(2.0, 0.02 * line["rankme_max"]):
        found.append(
            ("dimensional", f"dimensional collapse: RankMe {line['rankme']:.1f} of at most {line['rankme_max']}")
        )
    if line.get("entropy_share", 0.0) > 0.98:
        found.append(("saddle", f"the saddle of uniform p: the entropy of p is {line['entropy_share']:.1%} of log K"))
    elif (cluster := describe_cluster_collapse(line)) is not None:
        found.append(("cluster", f"cluster collapse: {cluster}"))
    if line.get("within_code", 1.0) < 1e-3:
        found.append(
            ("intracluster", f"intracluster collapse: {line['within_code']:.2%} of the variance is within codes")
        )
    return found


def describe_cluster_collapse(line):
    """Words for few codes in a batch, or in the window of images, where many could be in use; else None."""
    num_codes = line.get("num_codes", math.inf)
    in_batch, possible = line.get("batch_perplexity", math.inf), min(num_codes, line.get("images_per_mean", math.inf))
    if in_batch < possible / 4:
        return f"the mean prediction of a batch has perplexity {in_batch:.1f} where {possible} is possible"
    used = min(line.get("codes_used", math.inf), line.get("perplexity", math.inf))
    possible = min(num_codes, line.get("images_counted", math.inf))
    if used < min(max(2.5, 0.02 * possible), possible / 2):
        return f"{used:.0f} codes in use where {possible} could be"
    return None


def as_picture(x):
    """(..., C, h, w) -> (..., 3, h, w), for people: colours and gray as they are, of other channels the first three, of
    two the first as gray."""
    channels = x.shape[-3]
    return x[..., :3, :, :] if channels >= 3 else x[..., :1, :, :].expand(*x.shape[:-3], 3, *x.shape[-2:])


def plot_views(views, mean, std, path, num_images=8):
    """Draw what the network sees: a row of images for each view, V x (B, C, h, w) normalised; local crops enlarged."""
    size = views[0].shape[-2:]
    mean, std = (torch.tensor(x).view(-1, 1, 1) for x in (mean, std))
    rows = [F.interpolate(as_picture(view[:num_images].float().cpu() * std + mean), size) for view in views]
    grid = torchvision.utils.make_grid(torch.cat(rows).clamp(0, 1), nrow=len(rows[0]), padding=2, pad_value=1)
    with replace_file(path, alone=True) as file:  # of a run, which holds its folder's lock
        torchvision.utils.save_image(F.interpolate(grid[None], scale_factor=max(1, 128 // size[0])), file, "png")


def memory_mb(device):
    """Peak memory in MB (10^6 bytes): of the GPU that is used, or resident memory of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


# Okabe and Ito's colours (jfly.uni-koeln.de/color), told apart with any kind of colour vision
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")


def pyplot():
    """matplotlib's pyplot without a screen, in the style of all our figures; imported late, --help need not wait."""
    os.environ["MPLBACKEND"] = "Agg"  # a notebook's, inherited, is an error where its package is missing
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({
        "axes.prop_cycle": plt.cycler(color=PALETTE),
        "axes.grid": True,
        "grid.alpha": 0.3,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "font.size": 9,
        "legend.frameon": False,
        "figure.constrained_layout.use": True,
        "savefig.dpi": 150,
    })  # fmt: skip
    return plt


def save_figure(figure, path, alone=False, **options):
    """A figure as PNG, in place of what `path` holds, and closed. alone: as in `replace_file`. options: savefig's.
    Raises OSError."""
    with replace_file(path, alone) as file:
        figure.savefig(file, format="png", **options)
    pyplot().close(figure)


# loss.png: title of a panel, least value shown (None: as it comes; "log": a logarithmic scale), and its curves
# {label: function of a line of log.txt}
PANELS = {
    "loss and what it is made of (nats)": (None, {
        "loss": lambda line: line["train_loss"],
        "beta x invariance": lambda line: line["train_loss"] - line["train_prior"],
        "prior": lambda line: line["train_prior"],
        "Lemma 1's bound": lambda line: line["train_loss"] - line["gap"],
    }),
    "information = log K - prior - entropy of p (nats per image)": (None, {
        "log K": lambda line: np.log(line["num_codes"]),
        "entropy of p": lambda line: line["train_entropy"],
        "information": lambda line: line["information"],
        "least prior of hard p": lambda line: line["least_hard_prior"],
        "prior": lambda line: line["train_prior"],
    }),
    "codes": (0, {
        "in use: likeliest of an image": lambda line: line["codes_used"],
        "perplexity of mean p": lambda line: line["perplexity"],
        "perplexity of a batch's mean p": lambda line: line["batch_perplexity"],
    }),
    "effective rank of the features (RankMe)": (0, {"RankMe": lambda line: line["rankme"]}),
    "spread of the features (0: all alike; at most 1)": (0, {"spread": lambda line: line["spread"]}),
    "optimisation": ("log", {
        "learning rate": lambda line: line["train_lr"],
        "gradient norm": lambda line: line["train_grad_norm"],
    }),
}  # fmt: skip


def panels_of(lines):
    """{title: (least, {label: points (step, value)})} of the panels that the lines have numbers for; all of them while
    there are no lines."""
    panels = panels_for(lines[-1] if lines else {})
    found = {title: (least, points_of(curves, lines)) for title, (least, curves) in panels.items()}
    return {title: panel for title, panel in found.items() if panel[1] or not lines}


def panels_for(line):
    """PANELS, by the names in a line; of another objective its loss and terms stand in place of CPLearn's, for how it
    weighs them is its own."""
    _, information_panel, *others = PANELS.items()
    if not line or is_cplearns(line):
        return PANELS
    terms = {name.removeprefix("train_"): operator.itemgetter(name) for name in terms_of(line)}
    panels = {"loss": (None, {"loss": operator.itemgetter("train_loss")})}
    panels |= {"terms of the loss, before they are weighed": (None, terms)}
    return panels | dict([information_panel] if "information" in line else []) | dict(others)


def points_of(curves, lines):
    """{label: [(step, value), ...]} of the curves that have any."""
    found = {
        label: [(line["step"], value_or_none(value_of, line)) for line in lines] for label, value_of in curves.items()
    }
    found = {label: [point for point in points if point[1] is not None] for label, points in found.items()}
    return {label: points for label, points in found.items() if points}


def plot_log(log_path, figure_path):
    """Draw loss, terms, code usage and rank of a log.txt against the step."""
    plt = pyplot()
    panels = panels_of([line for line in read_log(log_path) if line["kind"] == "step"])
    rows = -(-len(panels) // 3)
    figure, axes = plt.subplots(rows, 3, figsize=(14, 3.5 * rows), sharex=True, squeeze=False)
    for axis, (title, (least, curves)) in zip(axes.flat, panels.items(), strict=False):
        for label, points in curves.items():
            axis.plot(*zip(*points, strict=True), label=label, linewidth=1.3)
        name_curves(axis, title, curves)
        if least == "log" and axis.has_data():
            axis.set_yscale("log")
        elif least is not None:
            axis.set_ylim(bottom=least)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis in axes.flat[: len(panels)][-3:]:  # the lowest of each column
        axis.set_xlabel("step")
        axis.tick_params(labelbottom=True)
    save_figure(figure, figure_path, alone=True)  # of a run, which holds its folder's lock


def name_curves(axis, title, curves):
    """A panel's title, and below it, so that it hides no curve, the legend; none where the title names the only one."""
    names = [] if len(curves) == 1 and all(label in title for label in curves) else curves
    if names:
        axis.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, borderaxespad=0)
    axis.set_title(title, pad=6 + 14 * -(-len(names) // 2))  # points


def value_or_none(value_of, line):
    """A curve's value at a line; None where the line lacks a number of it: another method's, or NaN."""
    try:
        return value_of(line)
    except (KeyError, TypeError):
        return None


class Clock:
    """Time and steps since the last logged line, and the share of the time spent waiting for data. Seconds."""

    def __init__(self):
        self.restart()

    def restart(self):
        self.start, self.waited, self.steps = time.monotonic(), 0.0, 0

    def elapsed(self):
        return time.monotonic() - self.start

    def waiting(self, iterator):
        """Pass items through, one a step, and count the time until each is there."""
        iterator = iter(iterator)
        while True:
            before = time.monotonic()
            try:
                item = next(iterator)
            except StopIteration:
                return
            self.waited += time.monotonic() - before
            self.steps += 1
            yield item


def within_code_variance(features, assignments):
    """Variance of features (N, D) among rows that share a code, assignments (N,), over the variance among all rows: one
    number, a tensor, not waited for.

    Both unbiased, so 1 means that codes say nothing about features and 0 that a code's images coincide. NaN where no
    two rows share a code."""
    assignments, order = assignments.sort()
    features = features.float()[order]
    begins = torch.ones(len(assignments), dtype=torch.bool, device=assignments.device)
    begins[1:] = assignments[1:] != assignments[:-1]
    group = begins.cumsum(0) - 1  # (N,) from 0; how many there are is known on the device only
    ones = torch.ones_like(features[:, 0])
    count = torch.zeros_like(ones).index_add_(0, group, ones)
    sums = torch.zeros_like(features).index_add_(0, group, features)
    within = (features - (sums / count.clamp(min=1)[:, None])[group]).square().sum()
    total = (features - features.mean(dim=0)).square().sum()
    freedom = len(features) - begins.sum()
    return torch.where((freedom > 0) & (total > 0), within / freedom / (total / (len(features) - 1)), math.nan)
