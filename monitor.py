"""What a run shows and writes down: logged lines, log.txt, TensorBoard events, loss.png, and warnings in words.

Recorder    each step's numbers, kept on the device and read once per logged line
RunLog      where they go: terminal, log.txt (JSON lines), TensorBoard; rank 0 only
feature_statistics, rankme, diagnose, plot_log
"""

import contextlib
import copy
import errno
import json
import math
import os
import resource
import sys
import threading
import time
from pathlib import Path

import torch
import torchvision
from torch.nn import functional as F
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from checkpoint import replace_file
from utils import RunFailed, all_reduce_mean, rank

MAX_FEATURE_ROWS = 1024  # rows of a logged line's RankMe: its singular values take about 0.1 s on a CPU at D = 384


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
        self.__init__()
        return means


class RunLog:
    """Terminal, log.txt and TensorBoard of one run, continued at `step`. Silent on every rank but 0.

    A disk that is full or read-only for a while costs no line of log.txt: they wait in memory."""

    def __init__(self, output_dir, step, total_steps):
        self.folder, self.total_steps = Path(output_dir), total_steps
        self.step = self.first_step = step
        self.started = time.monotonic()
        self.writer = self.bar = None
        self.warned = set()
        self.waiting = ""  # lines that are not in log.txt yet
        if rank() == 0:
            threading.excepthook = keep_tensorboard_quiet
            drop_lines_after(self.folder / "log.txt", step)
            if sys.stderr.isatty():
                self.bar = tqdm(total=total_steps, initial=step, unit="step", dynamic_ncols=True)

    def print(self, text):
        """One line for people, above the progress bar."""
        if rank() == 0:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def warn(self, found, advice):
        """Say in words what `diagnose` found, each kind once until it is gone again."""
        for kind, sentence in found:
            if kind not in self.warned:
                self.print(
                    f"warning: step {self.step}: this looks like {sentence}; {advice.get(kind, 'see the README')}"
                )
        self.warned = {kind for kind, _ in found}

    def advance(self):
        if self.bar is not None:
            self.bar.update()

    def write(self, line):
        """Append a dict of numbers with "kind" ("step" or "epoch") and "step"; what is not finite becomes null."""
        self.step = line["step"]
        if rank() != 0:
            return
        line = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        self.waiting += json.dumps(line) + "\n"
        self.flush()
        with self.going_on("TensorBoard's events"):
            self._add_events(line)
        if line["kind"] == "step":
            self._show(line)
        else:
            with self.going_on("loss.png"):
                plot_log(self.folder / "log.txt", self.folder / "loss.png")

    def _add_events(self, line):
        writer, self.writer = self.writer, None  # one that has failed once always fails: the next line gets a new one
        writer = writer or SummaryWriter(str(self.folder), purge_step=line["step"])
        for name, value in line.items():
            if isinstance(value, int | float) and name not in ("step", "epoch"):
                writer.add_scalar(f"{line['kind']}/{name}", value, line["step"])
        self.writer = writer

    def flush(self, to_disk=False):
        """Write the lines that wait; `to_disk`: and force them there, before a checkpoint that says they are."""
        if rank() == 0:
            with self.going_on("log.txt"):
                append_whole(self.folder / "log.txt", self.waiting.encode(), to_disk)
                self.waiting = ""

    @contextlib.contextmanager
    def going_on(self, what):
        """A file that cannot be written is a warning: the run goes on, and the disk may be mended meanwhile."""
        try:
            yield
        except OSError as error:
            reason = error.strerror or error
            self.print(f"warning: step {self.step}: {what} could not be written: {reason}; going on")

    def _show(self, line):
        speed = f"{line['images_per_s']:.0f} images/s"
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {line['train_loss']:.4f}, {speed}", refresh=False)
            return
        names = ("train_loss", "train_invariance", "train_prior", "train_lr", "codes_used", "rankme")
        shown = [f"{n.removeprefix('train_')} {line[n]:.4g}" for n in names if line.get(n) is not None]
        left = (time.monotonic() - self.started) / (line["step"] - self.first_step) * (self.total_steps - line["step"])
        self.print(f"step {line['step']}/{self.total_steps}  {'  '.join(shown)}  {speed}  {hours(left)} left")

    def close(self):
        self.flush()
        for open_one in (self.bar, self.writer):
            if open_one is not None:
                with self.going_on("TensorBoard's events"):
                    open_one.close()


def keep_tensorboard_quiet(args):
    """Its thread prints an error that the next call raises again, where it becomes one line."""
    if not type(args.thread).__module__.startswith("tensorboard"):
        threading.__excepthook__(args)


def append_whole(path, content, to_disk=False):
    """Append bytes to a file, all of them or none. Raises OSError."""
    with open(path, "ab", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        if content and file.write(content) < len(content):  # a disk that fills up takes a part
            file.truncate(end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if to_disk:
            os.fsync(file.fileno())


def hours(seconds):
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def read_log(path):
    """The lines of a log.txt as dicts; what a killed run left half written, or damage, is passed over."""
    lines = []
    with contextlib.suppress(FileNotFoundError), open(path, errors="replace") as file:
        for text in file:
            with contextlib.suppress(ValueError, RecursionError):
                lines.append(json.loads(text))
    return [line for line in lines if isinstance(line, dict) and isinstance(line.get("step"), int) and "kind" in line]


def drop_lines_after(path, step):
    """Remove what a killed run logged after its last checkpoint: the resumed run writes it again."""
    if path.exists():
        kept = [line for line in read_log(path) if line["step"] <= step]
        with replace_file(path) as file:
            file.write("".join(json.dumps(line) + "\n" for line in kept).encode())


# ---- what features look like -----------------------------------------------------------------------------------------


def feature_statistics(features):
    """Of backbone features (N, D): mean and standard deviation (Fig. 7 of arXiv 2410.04959: the first over all entries,
    the second over images, averaged over features), `spread` = rms distance from the mean feature over rms length, in
    [0, 1], and RankMe of at most 1024 rows with that many rows beside it. Waits for the device."""
    features = features.float()
    centered = features - features.mean(dim=0)
    numbers = torch.stack([
        features.mean(),
        centered.square().sum(dim=0).div(len(features) - 1).sqrt().mean(),
        (centered.square().sum() / features.square().sum().clamp(min=torch.finfo(torch.float32).tiny)).sqrt(),
    ])  # fmt: skip
    mean, std, spread = numbers.tolist()
    rows = features[:MAX_FEATURE_ROWS]
    return {
        "feature_mean": mean,
        "feature_std": std,
        "spread": spread,
        "rankme": rankme(rows),
        "rankme_max": min(rows.shape),
    }


def rankme(features):
    """Effective rank of features (N, D): exp of the entropy of their singular values, in [1, min(N, D)].

    Garrido et al., "RankMe", ICML 2023, Eq. 1; NaN where features are all zero or not finite."""
    if not torch.isfinite(features).all() or not features.any():
        return math.nan
    values = torch.linalg.svdvals(features.float().cpu())
    return float(torch.special.entr(values / values.sum()).sum().exp())


def diagnose(line):
    """What the numbers of a logged line look like: list of (kind, sentence); empty for a healthy run.

    Kinds: the four collapses of section 1 and Fig. 1 of arXiv 2410.04959, and the saddle where every p is uniform.
    The limits are rules of thumb, far from what runs that learn show.
    """
    found = []
    possible = min(line.get("num_codes", math.inf), line.get("images_in_epoch", math.inf))
    used = min(line.get("codes_used", math.inf), line.get("perplexity", math.inf))
    if line["spread"] < 0.01:
        found.append(
            ("representation", f"representation collapse: features differ by {line['spread']:.2%} of their length")
        )
    elif line["rankme"] < max(2.0, 0.02 * line["rankme_max"]):
        found.append(
            ("dimensional", f"dimensional collapse: RankMe {line['rankme']:.1f} of at most {line['rankme_max']}")
        )
    if abs(line.get("uniformity", 0.0) - 1) < 0.02:
        found.append(("saddle", f"the saddle of uniform p: invariance is {line['uniformity']:.1%} of log K"))
    elif used < max(2.5, 0.02 * possible):
        found.append(("cluster", f"cluster collapse: {used:.0f} codes in use where {possible} could be"))
    if line.get("within_code", 1.0) < 1e-3:
        found.append(
            ("intracluster", f"intracluster collapse: {line['within_code']:.2%} of the variance is within codes")
        )
    return found


def plot_views(views, mean, std, path, num_images=8):
    """Draw what the network sees: a row of images for each view, V x (B, C, h, w) normalised; local crops enlarged."""
    size = views[0].shape[-2:]
    mean, std = (torch.tensor(x).view(-1, 1, 1) for x in (mean, std))
    rows = [F.interpolate(view[:num_images].float().cpu() * std + mean, size) for view in views]
    grid = torchvision.utils.make_grid(torch.cat(rows).clamp(0, 1), nrow=len(rows[0]), padding=2, pad_value=1)
    torchvision.utils.save_image(F.interpolate(grid[None], scale_factor=max(1, 128 // size[0])), path)


def memory_mb():
    """Peak memory of this process in MB (10^6 bytes): of the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def plot_log(log_path, figure_path):
    """Draw loss, terms, code usage and rank of a log.txt against the step."""
    import matplotlib  # here: half a second that --help does not wait for

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    steps = [line for line in read_log(log_path) if line["kind"] == "step"]
    panels = [
        ("loss and its terms (nats)", ["train_loss", "train_invariance", "train_prior", "prior_floor"]),
        ("codes in use", ["codes_used", "perplexity"]),
        ("features", ["rankme", "feature_std", "spread"]),
        ("optimisation", ["train_lr", "train_grad_norm"]),
    ]
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), sharex=True)
    for axis, (title, names) in zip(axes.flat, panels, strict=True):
        for name in names:
            points = [(line["step"], line[name]) for line in steps if line.get(name) is not None]
            if points:
                axis.plot(
                    *zip(*points, strict=True), label=name.removeprefix("train_").replace("_", " "), linewidth=1.3
                )
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=8)
        if title != "loss and its terms (nats)":
            axis.set_yscale("log")
    for axis in axes[1]:
        axis.set_xlabel("step")
    figure.tight_layout()
    figure.savefig(figure_path, dpi=120)
    plt.close(figure)


class Clock:
    """Time since the last logged line, and the share of it spent waiting for data. Seconds."""

    def __init__(self):
        self.restart()

    def restart(self):
        self.start, self.waited = time.monotonic(), 0.0

    def elapsed(self):
        return time.monotonic() - self.start

    def waiting(self, iterator):
        """Pass items through and count the time until each is there."""
        iterator = iter(iterator)
        while True:
            before = time.monotonic()
            try:
                item = next(iterator)
            except StopIteration:
                return
            self.waited += time.monotonic() - before
            yield item


def within_code_variance(features, codes):
    """Variance of features (N, D) among rows that share a code (N,), over the variance among all rows; float.

    Both unbiased, so 1 means that codes say nothing about features and 0 that a code's images coincide. NaN where no
    two rows share a code."""
    _, group, count = codes.unique(return_inverse=True, return_counts=True)
    features = features.float()
    sums = torch.zeros(len(count), features.shape[1], device=features.device).index_add_(0, group, features)
    within = (features - (sums / count[:, None])[group]).square().sum()
    total = (features - features.mean(dim=0)).square().sum()
    freedom = len(features) - len(count)
    return float(within / freedom / (total / (len(features) - 1))) if freedom > 0 and total > 0 else math.nan
