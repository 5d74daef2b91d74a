"""What one training step costs once its images are there: milliseconds, images/s, kernel launches, the GPU's busy time.

    python -m benchmarks.step --device cuda                        # a ViT-S, 256 images, in the forms of FORMS
    python -m benchmarks.step --repeats 2 --forms plain -- --arch vit_tiny --img_size 64 --batch_size_per_gpu 8

Flags after -- are main_cplearn.py's, for every form. One batch of random pictures stays in memory and is augmented anew
in each step, as in training; nothing is loaded or saved. Launches and the GPU's busy time are 0 on a CPU; where the GPU
is busy for much less than the step takes, the step waits for Python to launch kernels. Prints a table in markdown.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch.profiler import ProfilerActivity, profile

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
    if args.output:
        record = {"command": sys.orig_argv[1:], "machine": machine(), "results": rows}
        args.output.write_text(json.dumps(record, indent=1) + "\n")


def measure(args, form, folder):
    """{figure: number} of one form of the step."""
    words = [*MODEL, *args.words, *form, "--device", args.device, "--dataset", "imagefolder"]
    words += ["--data_path", str(folder / "pictures"), "--output_dir", str(folder / "run")]
    settings = main_cplearn.get_args_parser().parse_args(words)
    write_pictures(folder / "pictures", settings.batch_size_per_gpu)
    run = main_cplearn.build_run(settings)
    run.log, run.watch = RunLog(settings.output_dir, 0, run.total_steps), Watch((), 0, lambda: None)
    run.model.train()
    batches = next(run.loader.steps(0))
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()  # of the form before
    try:
        timed(run, lambda step: main_cplearn.train_one_step(run, batches, step), 3 + args.repeats // 2)
        seconds = timed(run, lambda step: main_cplearn.train_one_step(run, batches, step), args.repeats)
        augmenting = timed(run, lambda step: run.loader.augment(batches[0], run.device), args.repeats)
        launches, busy = profiled(run, batches)
    finally:
        main_cplearn.close(run)
        dist.destroy_process_group()
    times = {"step_ms": 1e3 * seconds, "augment_ms": 1e3 * augmenting, "gpu_ms": busy}
    return times | {"images_per_s": run.effective_batch / seconds, "launches": launches, "memory_mb": memory_mb()}


def timed(run, function, repeats):
    """Seconds of one call."""
    wait_for(run.device)
    start = time.perf_counter()
    for step in range(repeats):
        function(step)
    wait_for(run.device)
    return (time.perf_counter() - start) / repeats


def wait_for(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def profiled(run, batches):
    """Kernel launches, and milliseconds for which the GPU is busy, of one step."""
    on_gpu = [ProfilerActivity.CUDA] * (run.device.type == "cuda")
    with profile(activities=[ProfilerActivity.CPU, *on_gpu]) as profiler:
        for step in range(PROFILED):
            main_cplearn.train_one_step(run, batches, step)
        wait_for(run.device)
    events = profiler.key_averages()
    launches = sum(event.count for event in events if "LaunchKernel" in event.key)
    busy = sum(event.self_device_time_total for event in events if event.device_type == torch.autograd.DeviceType.CUDA)
    return launches / PROFILED, busy / 1e3 / PROFILED


def write_pictures(folder, count):
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        small = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(small).resize((400, 320), Image.Resampling.BICUBIC).save(folder / f"{i:04d}.jpg", quality=90)


if __name__ == "__main__":
    main(get_parser().parse_args())
