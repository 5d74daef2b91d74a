"""What an exact step of M micro-batches costs: time beside the same images in one batch, and peak memory at fixed B.

    OMP_NUM_THREADS=1 python -m benchmarks.accumulation --output benchmarks/accumulation.json
    python -m benchmarks.accumulation --images 32 --batch 8 --parts 1 4 -- --arch resnet8 --width 16

Flags after -- are main_cplearn.py's. Times are CPU seconds, all forms in turn in one process, the median of --repeats;
memory is the peak of a step in a process of its own, above what the process holds between steps. Images are noise. By
arithmetic, a backward pass being two forward passes, M micro-batches cost 1 + (M - 1) / (3 M) of one batch.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import main_cplearn
from benchmarks.head import save_record
from monitor import RunLog
from running.watch import Watch

MODEL = (
    "--arch vit_tiny --patch_size 7 --img_size 28 --out_dim 16384 --head_impl tiled --precision fp32 --num_workers 0"
)


def get_parser():
    parser = argparse.ArgumentParser("benchmarks.accumulation", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--images", type=int, default=64, help="of a timed step (default 64)")
    add("--batch", type=int, default=32, help="images of a micro-batch where memory is measured (default 32)")
    add("--parts", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="M (default 1 2 4 8 16)")
    add("--repeats", type=int, default=5, help="timed steps of each M (default 5)")
    add("--memory_of", type=int, help="only the peak memory of this M, in this process, in MB")
    add("--output", type=Path, help="JSON file (default: none)")
    add("words", nargs="*", help="flags of main_cplearn.py, after --")
    return parser


def main(args):
    if args.memory_of:
        print(f"{peak_mb(args, args.memory_of):.1f}")
        return
    seconds = times(args)
    rows = {}
    print(
        f"| M | CPU s, {args.images} images | to M 1 | by arithmetic | peak MB, B {args.batch} |\n|---|---|---|---|---|"
    )
    for parts in args.parts:
        median = statistics.median(seconds[parts])
        ratio = statistics.median(a / b for a, b in zip(seconds[parts], seconds[args.parts[0]], strict=True))
        peak = float(in_own_process(args, parts))
        expected = (1 + (parts - 1) / (3 * parts)) / (1 + (args.parts[0] - 1) / (3 * args.parts[0]))
        rows[parts] = {"cpu_s": median, "ratio": ratio, "expected": expected, "peak_mb": peak}
        print(f"| {parts} | {median:.3f} | {ratio:.2f} | {expected:.2f} | {peak:.0f} |", flush=True)
    if args.output:
        save_record(args.output, results=rows)


def times(args):
    """{M: seconds of each step}; the forms take turns, so that a noisy neighbour meets all of them alike."""
    seconds = {parts: [] for parts in args.parts}
    with tempfile.TemporaryDirectory() as folder:
        runs = {parts: start(args, args.images // parts, parts, Path(folder) / str(parts)) for parts in args.parts}
        for step in range(args.repeats + 1):
            for parts, (run, batches) in runs.items():
                begin = time.process_time()
                main_cplearn.train_one_step(run, batches, step)
                seconds[parts].append(time.process_time() - begin)
        for run, _ in runs.values():
            main_cplearn.close(run)
    return {parts: every[1:] for parts, every in seconds.items()}


def in_own_process(args, parts):
    words = [sys.executable, "-m", "benchmarks.accumulation", "--memory_of", str(parts), "--batch", str(args.batch)]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # else holes in glibc's heap count as used
    done = subprocess.run([*words, "--", *args.words], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[-1]


def peak_mb(args, parts):
    """Of a step, above what the process holds before it. The first step compiles, and makes AdamW's moments."""
    with tempfile.TemporaryDirectory() as folder:
        run, batches = start(args, args.batch, parts, Path(folder) / "run")
        for step in range(2):
            main_cplearn.train_one_step(run, batches, step)
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = memory("VmRSS")
        main_cplearn.train_one_step(run, batches, 2)
        main_cplearn.close(run)
    return memory("VmHWM") - before


def memory(what):
    """MB of this process, by the kernel's name for it."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) * 1024 / 1e6


def start(args, batch, parts, folder):
    """A run, and the micro-batches of its first step."""
    words = [*MODEL.split(), "--batch_size_per_gpu", str(batch), "--accum_steps", str(parts), "--device", "cpu"]
    words += ["--num_workers", "0"]
    words += ["--dataset", "imagefolder", "--data_path", str(write_noise(folder / "pictures", batch * parts))]
    words += ["--output_dir", str(folder / "run"), *args.words]
    torch.manual_seed(0)
    run = main_cplearn.build_run(main_cplearn.get_args_parser().parse_args(words))
    run.log, run.watch = RunLog(run.args.output_dir, 1, run.total_steps), Watch(())
    run.model.train()
    return run, next(run.loader.steps(0))


def write_noise(folder, count):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{i:05d}.png")
    return folder


if __name__ == "__main__":
    main(get_parser().parse_args())
