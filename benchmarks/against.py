"""CPU seconds of a training step of this code against another commit's, measured side by side.

    OMP_NUM_THREADS=1 python -m benchmarks.against --commit 32031cd    # ViT-S, 2 x 224, batch 8, K 65536
    OMP_NUM_THREADS=1 python -m benchmarks.against --steps 20 -- --arch vit_tiny --batch_size_per_gpu 16

Flags after -- are main_cplearn.py's. Each side is a process of its own that makes its steps, on one batch that stays in
memory, when it is told to: they take turns, so that whatever else the machine does meets both. The other commit is
checked out in a temporary folder; HEAD is the last commit, against which a change in the working tree is measured.
Prints medians and their ratio, and JSON by --output.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import main_cplearn
from benchmarks import step
from benchmarks.head import save_record

REFERENCE = ["--arch", "vit_small", "--batch_size_per_gpu", "8", "--out_dim", "65536", "--precision", "bf16"]
UNTIMED = 3  # steps before the first that counts: memory is taken, tiles are compiled
SIDE = """
import resource, sys, time
import main_cplearn, torch
from monitor import RunLog
from running.watch import Watch

run = main_cplearn.build_run(main_cplearn.get_args_parser().parse_args(sys.argv[1:]))
run.log, run.watch = RunLog(run.args.output_dir, 0, run.total_steps), Watch((), 0, lambda: None)
run.model.train()
batches = next(run.loader.steps(0, 0, sys.maxsize))
for step, _ in enumerate(sys.stdin, 1):  # step 0 would draw a picture
    start, faults = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    main_cplearn.train_one_step(run, batches, step)
    seconds, used = time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF)
    print("step took", seconds, used.ru_minflt - faults, used.ru_maxrss // 1024, flush=True)
"""


def get_parser():
    parser = argparse.ArgumentParser("benchmarks.against", description=__doc__.split("\n")[0])
    parser.add_argument("--commit", default="HEAD", help="the other side (default: HEAD)")
    parser.add_argument("--steps", type=int, default=15, help="timed steps of each side (default 15)")
    parser.add_argument("--output", type=Path, help="JSON file (default: none)")
    parser.add_argument("words", nargs="*", help="flags of main_cplearn.py, after --")
    return parser


def main(args):
    with tempfile.TemporaryDirectory() as folder:
        other = Path(folder) / "other"
        try:
            git("worktree", "add", "--detach", str(other), args.commit)
        except subprocess.CalledProcessError as error:
            get_parser().error(f"--commit {args.commit}: {error.stderr.decode().strip()}")
        try:
            found = take_turns(args, {args.commit: other, "this code": Path.cwd()}, Path(folder))
        finally:
            git("worktree", "remove", "--force", str(other))
    print("| side | CPU seconds of a step, median | least | pages taken | peak memory, MB |\n|---|---|---|---|---|")
    for name, steps in found.items():
        seconds, pages, memory = zip(*steps, strict=True)
        cells = (
            f"{statistics.median(seconds):.3f} | {min(seconds):.3f} | {statistics.median(pages):.0f} | {max(memory)}"
        )
        print(f"| {name} | {cells} |")
    theirs, ours = (statistics.median(seconds for seconds, *_ in steps) for steps in found.values())
    print(f"\nthis code to {args.commit}: {ours / theirs:.3f}")
    if args.output:
        save_record(args.output, ratio=ours / theirs, steps=found)


def git(*words):
    subprocess.run(["git", *words], check=True, capture_output=True)


def take_turns(args, checkouts, folder):
    """{side: [(CPU seconds, pages taken, MB at most so far) of each timed step]}."""
    write_pictures(folder / "pictures", args.words)
    sides = {}
    for number, (name, checkout) in enumerate(checkouts.items()):
        words = [*REFERENCE, *args.words, "--device", "cpu", "--num_workers", "0", "--dataset", "imagefolder"]
        words += ["--data_path", str(folder / "pictures"), "--output_dir", str(folder / f"run{number}")]
        environment = os.environ | {"PYTHONPATH": str(checkout)}
        sides[name] = subprocess.Popen(
            [sys.executable, "-c", SIDE, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            cwd=checkout, env=environment,
        )  # fmt: skip
    found = {name: [] for name in sides}
    try:
        for turn in range(UNTIMED + args.steps):
            for name, side in sides.items():
                took = one_step(side)
                if turn >= UNTIMED:
                    found[name].append(took)
    finally:
        for side in sides.values():
            side.kill()
            side.wait()
    return found


def one_step(side):
    side.stdin.write("go\n")
    side.stdin.flush()
    for line in side.stdout:
        if line.startswith("step took"):
            seconds, pages, memory = line.split()[2:]
            return float(seconds), int(pages), int(memory)
    raise SystemExit("a side ended before its steps; what it said stands above")


def write_pictures(folder, words):
    settings = main_cplearn.get_args_parser().parse_args([*REFERENCE, *words])
    step.write_pictures(folder, settings.batch_size_per_gpu * settings.accum_steps)


if __name__ == "__main__":
    main(get_parser().parse_args())
