"""What passes between two epochs, in parts, beside a step; and what a step loses while a checkpoint is written.

    OMP_NUM_THREADS=1 python -m benchmarks.border          # a ViT-S with K = 16,384 on 96 px
    python -m benchmarks.border --device cuda --img_size 224 --batch_size_per_gpu 256

Takes main_cplearn.py's flags. Every epoch ends with a checkpoint here, without k-NN. Prints tables in markdown;
milliseconds of wall time, medians without the first epoch.
"""

import collections
import contextlib
import statistics
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch

import checkpoint
import data
import main_cplearn
import monitor
from benchmarks.step import wait_for, write_pictures
from running.writer import HostCopy, Writer

STEPS = 6  # of an epoch
PLACES = {  # what is called between two steps
    "logged lines": [(main_cplearn, "log_step"), (monitor.RunLog, "write"), (monitor.Recorder, "read")],
    "loader": [(data.TrainLoader, "batch")],
    "checkpoint: copy": [(HostCopy, "of")],
    "checkpoint: rest": [(main_cplearn, "save")],
}


def get_parser():
    parser = main_cplearn.get_args_parser()
    parser.set_defaults(arch="vit_small", out_dim=16384, img_size=96, batch_size_per_gpu=8, precision="bf16", epochs=6)
    parser.set_defaults(dataset="imagefolder", num_workers=1, device="cpu", log_every=10**6, saveckp_freq=1)
    return parser


def main(args):
    with tempfile.TemporaryDirectory() as folder:
        args.data_path, args.output_dir = f"{folder}/pictures", f"{folder}/run"
        write_pictures(Path(args.data_path), args.batch_size_per_gpu * args.accum_steps * STEPS)
        times = Times()
        with times.measuring():
            main_cplearn.train(args)
        print_border(times, seconds_to_start_drawing(args.output_dir))
        print_writing(times, checkpoint.load_checkpoint(checkpoint.checkpoint_path(args)), Path(folder, "again"))


def seconds_to_start_drawing(folder):
    """loss.png is then drawn by another process."""
    log = monitor.RunLog(folder, step=10**9, total_steps=10**9)
    log.drawn_at = -monitor.SECONDS_PER_DRAWING
    seconds = seconds_of(log.draw)
    log.drawing.wait()
    return seconds


def seconds_of(function, *args):
    start = time.perf_counter()
    function(*args)
    return time.perf_counter() - start


class Times:
    """Seconds. gaps: [{part: time}] before each step; steps: [(time, whether a checkpoint was being written)]; written:
    [time of a write], in the writer's thread but for the last one."""

    def __init__(self):
        self.gaps, self.steps, self.written = [], [], []
        self.entered, self.passed, self.since = ["rest"], collections.Counter(), time.perf_counter()

    @contextlib.contextmanager
    def measuring(self):
        step, write = main_cplearn.train_one_step, checkpoint.save_checkpoint
        places = [(main_cplearn, "train_one_step", lambda *args: self.timed_step(step, *args))]
        places += [(*place, self.inside(part)(getattr(*place))) for part in PLACES for place in PLACES[part]]
        places += [(checkpoint, "save_checkpoint", lambda *args: self.written.append(seconds_of(write, *args)))]
        with contextlib.ExitStack() as stack:
            for place in places:
                stack.enter_context(mock.patch.object(*place))
            yield

    @contextlib.contextmanager
    def inside(self, part):
        self.switch()
        self.entered.append(part)
        yield
        self.switch()
        self.entered.pop()

    def switch(self):
        now = time.perf_counter()
        self.passed[self.entered[-1]] += now - self.since
        self.since = now

    def timed_step(self, function, run, batches, step):
        self.switch()
        self.gaps.append(self.passed)
        writing = not run.writer.join(0)
        features = function(run, batches, step)
        wait_for(run.device)
        self.steps.append((time.perf_counter() - self.since, writing))
        self.passed, self.since = collections.Counter(), time.perf_counter()
        return features

    def step(self, writing):  # the median; NaN where there is none
        return statistics.median([s for s, one_was in self.steps[STEPS:] if one_was == writing] or [float("nan")])


def print_border(times, figure):
    rows = {part: statistics.median(gap[part] for gap in times.gaps[2 * STEPS :: STEPS]) for part in (*PLACES, "rest")}
    whole = sum(rows.values())
    rows["**a border**"] = whole - rows["checkpoint: copy"] - rows["checkpoint: rest"]
    rows |= {"**with a checkpoint**": whole, "figure, where one is due: start": figure}
    print("\n| between two epochs | ms | steps |\n|---|---|---|")
    for name, seconds in rows.items():
        print(f"| {name} | {1e3 * seconds:.1f} | {seconds / times.step(writing=False):.3f} |")


def print_writing(times, state, path):
    """A loop of small operations needs Python's lock all the time, as one that feeds a GPU, and loses what it can."""
    x, host, (*in_thread, in_step) = torch.zeros(4), HostCopy(), times.written
    copying, end = [seconds_of(host.of, state, torch.device("cpu")) for _ in range(4)], 1 + time.perf_counter()
    alone, losses = calls_a_second(x, lambda: time.perf_counter() < end), []
    for _ in range(5):
        writer, start = Writer(), time.perf_counter()
        writer.start(checkpoint.save_checkpoint, state, path)
        beside = calls_a_second(x, lambda writer=writer: not writer.join(0))
        losses.append((time.perf_counter() - start) * (1 - beside / alone))
    rows = {
        "a step": times.step(writing=False),
        "a step that begins while a checkpoint is written": times.step(writing=True),
        f"to write a checkpoint of {path.stat().st_size / 1e6:.0f} MB, in the thread": statistics.median(in_thread),
        "to write it while training waits": in_step,
        "what a loop of small operations loses to a write": statistics.median(losses),
        "to copy the state into new memory": copying[0],
        "to copy it into the memory of the copy before": statistics.median(copying[1:]),
    }
    print("\n| while a checkpoint is written | ms |\n|---|---|")
    for name, seconds in rows.items():
        print(f"| {name} | {1e3 * seconds:.0f} |")


def calls_a_second(x, goes_on):
    start, count = time.perf_counter(), 0
    while goes_on():
        x.add_(1)
        count += 1
    return count / (time.perf_counter() - start)


if __name__ == "__main__":
    main(get_parser().parse_args())
