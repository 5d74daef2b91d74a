"""What one training step costs: time, images/s, memory; which part takes what; what its matrix products take alone.

    python -m benchmarks.step                 # a ViT-S of 2 x 224 px: 256 images on a GPU in all FORMS, 8 on a CPU
    python -m benchmarks.step --arch vit_tiny vit_small vit_base --batch_size 4 --local_crops 8 --out_dim 16384
    python -m benchmarks.step --arch vit_large --batch_size 2 -- --grad_checkpointing --accum_steps 2

Flags after -- are main_cplearn.py's, for every row. One batch of random pictures stays in memory and is augmented anew
in each step, as in training; nothing is saved. Prints tables in markdown.

memory: the most that the run had at once; on a CPU resident memory above what the process had before its first run.
gpu waits: 1 - busy / step, the share of the step in which no kernel runs; it waits for Python to launch the next one.
floor: the matrix products (and convolutions, fused attention) of backbone, head and loss, forward and backward, called
once more alone, with random numbers of the shapes, strides and dtypes that they have in the step; on a GPU, how long
their kernels run. gflop: their floating-point operations. Triton's kernels are none of PyTorch's and left out of both.

Parts are timed in steps whose batches come from the data workers. A share is of the GPU's time; on a CPU of the
process's CPU time, which other processes change least (with OMP_NUM_THREADS=1: nothing in it waits). On a GPU a part
lasts from when the GPU comes to it until it comes to the next: data wait is then what the GPU waits, and augmentation
what the training waits for views, which are made on a stream of their own. Operations are calls of PyTorch's kernels,
on any device, without views and without what kernels call.
"""

import argparse
import contextlib
import dataclasses
import functools
import gc
import itertools
import os
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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import main_cplearn
from benchmarks.head import save_record
from benchmarks.recipes import count_flops, is_product
from monitor import RunLog, memory_mb
from running.watch import Watch
from utils import PRECISIONS, positive

FORMS = {
    "plain": ["--no-compile"],
    "compiled": ["--compile"],
    "tiled": ["--head_impl", "tiled"],
    "triton": ["--head_impl", "triton"],
    "triton, 1M codes as bits": ["--head_impl", "triton", "--out_dim", "1048576", "--codes_storage", "bits"],
}
COLUMNS = {"step_ms": ".2f", "images_per_s": ".1f", "augment_ms": ".2f", "memory_mb": ".0f", "gflop": ".0f"}
COLUMNS |= {"floor_ms": ".2f"}
ON_GPU = {"gpu_ms": ".2f", "gpu_waits": ".1%", "launches": ".0f"}  # columns
PROFILED = 3  # steps
PARTS = ["data wait", "transfer", "augmentation", "teacher, samples", "backbone forward", "head and loss", "backward"]
PARTS += ["clip and update", "rest"]
LOADING = PARTS[:3]
FLOOR = "floor: matrix products alone"
END = "end of a part"  # its name among the profiler's events


def get_parser():
    parser = argparse.ArgumentParser("benchmarks.step", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), help="(default: cuda where there is one)")
    add("--arch", nargs="+", default=["vit_small"], metavar="NAME", help="a row each (default vit_small)")
    add("--batch_size", type=positive(int), help="images (default: 8 on a CPU, 256 on a GPU)")
    add("--local_crops", type=int, default=0, help="of 96 px, beside two of 224 px (default 0)")
    add("--out_dim", type=positive(int), default=65536, help="codes K (default 65536)")
    add("--precision", choices=PRECISIONS, default="bf16", help="(default bf16)")
    add("--forms", nargs="+", choices=FORMS, help="a row each (default: plain on a CPU, all on a GPU)")
    add(
        "--repeats", type=positive(int), help="timed steps, after half as many and 3 (default: 5 on a CPU, 30 on a GPU)"
    )
    add("--output", type=Path, help="JSON file (default: none)")
    add("words", nargs="*", help="flags of main_cplearn.py, after --")
    return parser


def main(args):
    fit_to_device(args)
    columns = COLUMNS | (ON_GPU if args.device == "cuda" else {})
    print("| " + " | ".join(["form", *columns]) + " |\n|" + "---|" * (1 + len(columns)))
    rows, before = {}, memory_mb(torch.device(args.device))
    for arch, form in itertools.product(args.arch, args.forms):
        if args.device == "cpu" and "triton" in form:
            continue
        with tempfile.TemporaryDirectory() as folder:
            row = measure(args, ["--arch", arch, *FORMS[form]], Path(folder))
        row["memory_mb"] -= before
        name = f"{row['flags']['arch']}, {form}"
        rows[name] = row
        print(
            "| " + " | ".join([name, *(format(row[key], digits) for key, digits in columns.items())]) + " |", flush=True
        )
    for name, row in rows.items():
        print_parts(name, row["parts"], row["floor"])
    if args.output:
        save_record(args.output, device=args.device, results=rows)


def fit_to_device(args):
    """Fill in the defaults that depend on the device: on a laptop's CPU the table takes a minute or two."""
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    on_cpu = args.device == "cpu"
    args.batch_size = args.batch_size or (8 if on_cpu else 256)
    args.repeats = args.repeats or (5 if on_cpu else 30)
    args.forms = args.forms or (["plain"] if on_cpu else list(FORMS))


def measure(args, form, folder):
    """{figure: number} of one form of the step; its parts: {part: {figure: number}}; its flags."""
    forget_peak(args.device)
    torch._dynamo.reset()  # the form before has watched its products: see below
    run = started(args, form, folder)
    loaded = itertools.chain.from_iterable(run.loader.steps(epoch, 0, sys.maxsize) for epoch in itertools.count())
    batches = next(loaded)
    untimed = 3 + args.repeats // 2
    try:
        timed(run, lambda step: main_cplearn.train_one_step(run, batches, step), untimed)
        seconds = timed(run, lambda step: main_cplearn.train_one_step(run, batches, step), args.repeats)
        memory = memory_mb(run.device)
        augmenting = timed(run, lambda step: run.loader.augment(batches[0], run.device), args.repeats)
        counts, busy = profiled(run, itertools.repeat(batches))
        timed(run, lambda step: main_cplearn.train_one_step(run, next(loaded), step), untimed)
        times = timed_parts(run, loaded, args.repeats)
        # last: torch 2.11 takes compiled code no more once a dispatch mode has watched a step, until dynamo is reset
        floor, gflop = timed_products(run, products(run, batches), args.repeats)
    finally:
        run.loader.close()
        main_cplearn.close(run)
        dist.destroy_process_group()
    parts = {part: times[part] | counts[part] for part in PARTS}
    launches = sum(figures["launches"] for figures in parts.values())
    found = {"step_ms": 1e3 * seconds, "images_per_s": run.effective_batch / seconds, "augment_ms": 1e3 * augmenting}
    found |= {
        "memory_mb": memory,
        "gflop": gflop,
        "floor_ms": floor.get("wall_ms", floor.get("gpu_ms")),
        "launches": launches,
    }
    found |= {"gpu_ms": busy, "gpu_waits": 1 - busy / (1e3 * seconds)}
    return found | {"parts": parts, "floor": floor, "flags": vars(run.args)}


def forget_peak(device):
    """From here on `memory_mb` tells the most since."""
    gc.collect()  # the row before
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():  # Linux; elsewhere the peak of earlier rows stays
        Path("/proc/self/clear_refs").write_text("5")


def started(args, form, folder):
    """A run before its first step."""
    words = [
        "--batch_size_per_gpu",
        args.batch_size,
        "--local_crops_number",
        args.local_crops,
        "--out_dim",
        args.out_dim,
    ]
    words += ["--precision", args.precision, "--num_workers", max(1, (os.cpu_count() or 1) - 1)]
    words += ["--dataset", "imagefolder", "--data_path", folder / "pictures", "--output_dir", folder / "run"]
    words = [*map(str, words), *form, *args.words, "--device", args.device]
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
        yield (
            run,
            "ahead",
            self.inside("augmentation")(run.ahead),
        )  # makes the views, and has the training wait for them
        augment, transfer = run.loader.augment, self.inside("transfer")(transferred)  # crops, to be moved first
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
        parts = Parts(run, lambda: (time.process_time(), time.perf_counter()))
        parts.steps(batches, steps)
        return parts.means(1e3 * np.array(parts.readings), ["cpu_ms", "wall_ms"], steps)
    training = torch.cuda.current_stream()  # views are made on another
    parts = Parts(run, lambda: training.record_event(torch.cuda.Event(enable_timing=True)))
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
    # of all threads: on a GPU the backward pass has its own
    events = [event for event in profiler.events() if event.device_type != torch.autograd.DeviceType.CUDA]
    ends, *starts = (
        np.sort([event.time_range.start for event in events if chosen(event)])
        for chosen in (lambda event: event.name == END, lambda event: "LaunchKernel" in event.name, is_operation)
    )
    totals = np.stack([np.searchsorted(times, ends) for times in starts], axis=1)
    return parts.means(totals, ["launches", "operations"], PROFILED), busy_ms(profiler) / PROFILED


def busy_ms(profiler):
    """How long kernels ran on the GPU."""
    on_gpu = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return sum(event.self_device_time_total for event in on_gpu if not event.is_user_annotation) / 1e3


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


def print_parts(form, parts, floor):
    """A share is of the first column, which is time."""
    columns = list(parts["rest"])
    total = {column: sum(figures[column] for figures in parts.values()) for column in columns}
    print("\n| " + " | ".join([f"{form}: part", "share", *columns]) + " |\n|" + "---|" * (2 + len(columns)))
    for part, figures in (parts | {"step": total, FLOOR: floor}).items():
        cells = [format(figures[column], ".2f" if column.endswith("_ms") else ".0f") for column in columns]
        print("| " + " | ".join([part, f"{figures[columns[0]] / total[columns[0]]:.1%}", *cells]) + " |")


# ---- what the matrix products take alone ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Sketch:
    """All of a tensor that its product's time depends on."""

    shape: tuple
    strides: tuple
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor):
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)

    def tensor(self):
        """With random numbers, where the strides say."""
        size = 1 + sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))
        numbers = torch.randn(max(size, 0), device=self.device).to(self.dtype)
        return numbers.as_strided(self.shape, self.strides) if size > 0 else numbers.view(self.shape)


class Products(TorchDispatchMode):
    """calls: [(function, args, kwargs)] of products while `now()`, with sketches in the place of tensors.

    flop: floating-point operations of them all."""

    def __init__(self, now):
        super().__init__()
        self.now, self.calls, self.flop = now, [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if is_product(function) and self.now():
            self.calls.append((function, *tree_map_only(torch.Tensor, Sketch.of, (args, kwargs or {}))))
            self.flop += count_flops(function, args, kwargs or {}, out)
        return out


def products(run, batches):
    """The Products of one step, without the augmentation's."""
    parts = Parts(run, lambda: None)
    with Products(lambda: parts.entered[-1] not in LOADING) as found:
        parts.steps(itertools.repeat(batches), 1)
    return found


@torch.no_grad()
def timed_products(run, found, repeats):
    """({figure: number} of the products alone, their GFLOP)."""
    tensors = functools.cache(Sketch.tensor)
    calls = [(function, *tree_map_only(Sketch, tensors, given)) for function, *given in found.calls]

    def multiply(step):
        for function, args, kwargs in calls:
            function(*args, **kwargs)

    timed(run, multiply, 1)
    if run.device.type == "cpu":
        start = time.process_time()
        wall_ms = 1e3 * timed(run, multiply, repeats)
        times = {"cpu_ms": 1e3 * (time.process_time() - start) / repeats, "wall_ms": wall_ms}
    else:
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            timed(run, multiply, repeats)
        times = {"gpu_ms": busy_ms(profiler) / repeats}
    return times | {"launches": 0, "operations": len(calls)}, found.flop / 1e9


def write_pictures(folder, count):
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        small = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(small).resize((400, 320), Image.Resampling.BICUBIC).save(folder / f"{i:04d}.jpg", quality=90)


if __name__ == "__main__":
    main(get_parser().parse_args())
