"""What one training step costs: milliseconds, images/s, launches, the GPU's busy time; and which part takes what.

    python -m benchmarks.step --device cuda                        # a ViT-S, 256 images, in the forms of FORMS
    python -m benchmarks.step --repeats 2 --forms plain -- --arch vit_tiny --img_size 64 --batch_size_per_gpu 8

Flags after -- are main_cplearn.py's, for every form. One batch of random pictures stays in memory and is augmented anew
in each step, as in training; nothing is saved. Launches and the GPU's busy time are 0 on a CPU; where the GPU is busy
for much less than the step takes, the step waits for Python to launch kernels. Prints tables in markdown.

Parts are timed in steps whose batches come from the data workers. On a GPU a part lasts from when the GPU comes to it
until it comes to the next: data wait is then what the GPU waits. Operations are calls of PyTorch's kernels, on any
device, without views and without what kernels call.
"""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch.profiler import ProfilerActivity, profile, record_function

import main_cplearn
from benchmarks.head import machine
from monitor import RunLog, memory_mb
from watch import Watch

MODEL = ["--arch", "vit_small", "--batch_size_per_gpu", "256", "--precision", "bf16", "--num_workers", "4"]
FORMS = {
    "plain": [],
    "compiled": ["--compile"],
    "tiled": ["--head_impl", "tiled"],
    "triton": ["--head_impl", "triton"],
    "triton, 1M codes as bits": ["--head_impl", "triton", "--out_dim", "1048576", "--codes_storage", "bits"],
}
COLUMNS = {"step_ms": ".2f", "images_per_s": ".0f", "augment_ms": ".2f", "launches": ".0f", "gpu_ms": ".2f"}
COLUMNS |= {"memory_mb": ".0f"}
PROFILED = 3  # steps
PARTS = ["data wait", "transfer", "augmentation", "teacher, samples", "backbone forward", "head and loss", "backward"]
PARTS += ["clip and update", "rest"]
END = "end of a part"  # its name among the profiler's events


def get_parser():
    parser = argparse.ArgumentParser("benchmarks.step", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--device", default="cpu", choices=("cpu", "cuda"))
    add("--forms", nargs="+", choices=FORMS, default=list(FORMS), help="(default: all; triton on a GPU alone)")
    add("--repeats", type=int, default=30, help="timed steps, after half as many and 3 (default 30)")
    add("--output", type=Path, help="JSON file (default: none)")
    add("words", nargs="*", help="flags of main_cplearn.py, after --")
    return parser


def main(args):
    rows = {}
    print("| " + " | ".join(["form", *COLUMNS]) + " |\n|" + "---|" * (1 + len(COLUMNS)))
    for name in args.forms:
        if args.device == "cpu" and "triton" in name:
            continue
        with tempfile.TemporaryDirectory() as folder:
            rows[name] = measure(args, FORMS[name], Path(folder))
        cells = [format(rows[name][key], digits) for key, digits in COLUMNS.items()]
        print("| " + " | ".join([name, *cells]) + " |", flush=True)
    for name, row in rows.items():
        print_parts(name, row["parts"])
    if args.output:
        record = {"command": sys.orig_argv[1:], "machine": machine(), "results": rows}
        args.output.write_text(json.dumps(record, indent=1) + "\n")


def measure(args, form, folder):
    """{figure: number} of one form of the step; its parts: {part: {figure: number}}."""
    run = started(args, form, folder)
    loaded = itertools.chain.from_iterable(run.loader.steps(epoch, 0, sys.maxsize) for epoch in itertools.count())
    batches = next(loaded)
    untimed = 3 + args.repeats // 2
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()  # of the form before
    try:
        timed(run, lambda step: main_cplearn.train_one_step(run, batches, step), untimed)
        seconds = timed(run, lambda step: main_cplearn.train_one_step(run, batches, step), args.repeats)
        augmenting = timed(run, lambda step: run.loader.augment(batches[0], run.device), args.repeats)
        counts, busy = profiled(run, itertools.repeat(batches))
        timed(run, lambda step: main_cplearn.train_one_step(run, next(loaded), step), untimed)
        times = timed_parts(run, loaded, args.repeats)
    finally:
        main_cplearn.close(run)
        dist.destroy_process_group()
    parts = {part: times[part] | counts[part] for part in PARTS}
    launches = sum(figures["launches"] for figures in parts.values())
    found = {"step_ms": 1e3 * seconds, "augment_ms": 1e3 * augmenting, "gpu_ms": busy, "launches": launches}
    found |= {"images_per_s": run.effective_batch / seconds, "memory_mb": memory_mb(run.device)}
    return found | {"parts": parts}


def started(args, form, folder):
    """A run before its first step."""
    words = [*MODEL, *args.words, *form, "--device", args.device, "--dataset", "imagefolder"]
    words += ["--data_path", str(folder / "pictures"), "--output_dir", str(folder / "run")]
    settings = main_cplearn.get_args_parser().parse_args(words)
    write_pictures(folder / "pictures", settings.batch_size_per_gpu * settings.accum_steps)
    run = main_cplearn.build_run(settings)
    run.log, run.watch = RunLog(settings.output_dir, 0, run.total_steps), Watch((), 0, lambda: None)
    run.model.train()
    return run


def timed(run, function, repeats):
    """Seconds of one call."""
    wait_for(run.device)
    start = time.perf_counter()
    for step in range(1, repeats + 1):  # step 0 draws a picture of the views
        function(step)
    wait_for(run.device)
    return (time.perf_counter() - start) / repeats


def wait_for(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


# ---- the parts of a step ---------------------------------------------------------------------------------------------


class Parts:
    """Training steps in parts: what passes is of the part that was entered last and not yet left.

    read: called where a part ends.  ended, readings: which did, and what `read` returned."""

    def __init__(self, run, read):
        self.run, self.read, self.entered, self.ended, self.readings = run, read, ["rest"], [], []

    def steps(self, batches, count):
        """So many steps, on what the iterator `batches` gives."""
        with contextlib.ExitStack() as stack:
            for place in self.places():
                stack.enter_context(mock.patch.object(*place))
            for step in range(1, count + 1):
                with self.inside("data wait"):
                    loaded = next(batches)
                main_cplearn.train_one_step(self.run, loaded, step)
            self.end("rest")

    def places(self):
        """(owner, name, what stands there during the steps) of the functions that are a part."""
        run, objective = self.run, self.run.model.objective
        functions = {"backbone forward": [(run.first_half, "forward")], "head and loss": [(run.second_half, "forward")]}
        functions["teacher, samples"] = [(objective, name) for name in ("before_step", "prepare", "after_step")]
        functions["backward"] = [(torch.autograd, "backward")]  # Tensor.backward calls it
        functions["clip and update"] = [(main_cplearn, "update_weights")]
        for part, owners in functions.items():
            yield from ((owner, name, self.inside(part)(getattr(owner, name))) for owner, name in owners)
        augment = self.inside("augmentation")(run.loader.augment)
        transfer = self.inside("transfer")(transferred)  # pictures come as crops, to be moved first
        yield run.loader, "augment", lambda batch, device: augment(transfer(batch, device), device)

    @contextlib.contextmanager
    def inside(self, part):
        self.end(self.entered[-1])
        self.entered.append(part)
        try:
            yield
        finally:
            self.end(self.entered.pop())

    def end(self, part):
        self.ended.append(PARTS.index(part))
        self.readings.append(self.read())

    def means(self, totals, columns, steps):
        """{part: {column: mean}}. totals: for each end of a part numbers that only grow, one for each column."""
        passed = np.zeros((len(PARTS), len(columns)))
        np.add.at(passed, self.ended[1:], np.diff(totals, axis=0) / steps)
        return {part: dict(zip(columns, row, strict=True)) for part, row in zip(PARTS, passed.tolist(), strict=True)}


def transferred(batch, device):
    """The batch with its crops on the device, where the augmentation would else take them."""
    return dataclasses.replace(batch, crops=[crops.to(device, non_blocking=True) for crops in batch.crops])


def timed_parts(run, batches, steps):
    """{part: milliseconds of a step}."""
    if run.device.type == "cpu":
        parts = Parts(run, lambda: (time.perf_counter(), time.process_time()))
        parts.steps(batches, steps)
        return parts.means(1e3 * np.array(parts.readings), ["wall_ms", "cpu_ms"], steps)
    parts = Parts(run, lambda: torch.cuda.current_stream().record_event(torch.cuda.Event(enable_timing=True)))
    parts.steps(batches, steps)
    wait_for(run.device)
    return parts.means([[parts.readings[0].elapsed_time(event)] for event in parts.readings], ["gpu_ms"], steps)


def profiled(run, batches):
    """{part: launches and operations of a step}, and the milliseconds for which the GPU is busy in it."""
    on_gpu = [ProfilerActivity.CUDA] * (run.device.type == "cuda")
    parts = Parts(run, lambda: record_function(END).__enter__().__exit__(None, None, None))
    with profile(activities=[ProfilerActivity.CPU, *on_gpu]) as profiler:
        parts.steps(batches, PROFILED)
        wait_for(run.device)
    on_device, events = [], []  # of all threads: on a GPU the backward pass has its own
    for event in profiler.events():
        (on_device if event.device_type == torch.autograd.DeviceType.CUDA else events).append(event)
    busy = sum(event.self_device_time_total for event in on_device if not event.is_user_annotation)
    ends, *starts = (
        np.sort([event.time_range.start for event in events if chosen(event)])
        for chosen in (lambda event: event.name == END, lambda event: "LaunchKernel" in event.name, is_operation)
    )
    totals = np.stack([np.searchsorted(times, ends) for times in starts], axis=1)
    return parts.means(totals, ["launches", "operations"], PROFILED), busy / 1e3 / PROFILED


def is_operation(event):
    """Whether an event of the profiler is a kernel of PyTorch's that no other kernel called."""
    outer = event.cpu_parent
    while outer is not None and not is_kernel(outer.name):
        outer = outer.cpu_parent
    return outer is None and is_kernel(event.name)


@functools.cache
def is_kernel(name):
    """Whether it names an operation of PyTorch's that is no view and is not made of others, as aten::linear is."""
    space, _, name = name.partition("::")
    packet = getattr(torch.ops.aten, name, None) if space == "aten" else None
    overloads = [getattr(packet, overload) for overload in packet.overloads()] if packet else []
    made = torch._C._dispatch_get_registrations_for_dispatch_key("CompositeImplicitAutograd")
    known = set(torch._C._dispatch_get_all_op_names()).difference(made)
    return any(op.name() in known and not op.is_view and not op.name().endswith("out") for op in overloads)


def print_parts(form, parts):
    """A share is of the first column, which is time."""
    columns = list(parts["rest"])
    total = {column: sum(figures[column] for figures in parts.values()) for column in columns}
    print("\n| " + " | ".join([f"{form}: part", "share", *columns]) + " |\n|" + "---|" * (2 + len(columns)))
    for part, figures in (parts | {"step": total}).items():
        cells = [format(figures[column], ".2f" if column.endswith("_ms") else ".0f") for column in columns]
        print("| " + " | ".join([part, f"{figures[columns[0]] / total[columns[0]]:.1%}", *cells]) + " |")


def write_pictures(folder, count):
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        small = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(small).resize((400, 320), Image.Resampling.BICUBIC).save(folder / f"{i:04d}.jpg", quality=90)


if __name__ == "__main__":
    main(get_parser().parse_args())
