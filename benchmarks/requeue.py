"""From SLURM's signal to a saved checkpoint and a requeued job: seconds, on an existing SLURM.

    python -m benchmarks.requeue --output_dir /shared/runs/requeue                  # a ViT-S with K = 131,072, CPU
    python -m benchmarks.requeue --repeats 1 --output_dir /shared/x -- --device cuda --partition gpu --dataset ...

Submits a run of two processes by run_with_submitit.py; as soon as it trains, sends SIGUSR2 as SLURM does before a time
limit, and watches the checkpoint and the job's state. The last start is cancelled.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RUN = shlex.split(
    "--nodes 1 --ngpus 2 --dataset fashion_mnist --img_size 28 --arch vit_small --patch_size 7 --out_dim 131072 "
    "--batch_size_per_gpu 8 --precision fp32 --device cpu --num_workers 0 --log_every 1 --save_every_minutes 1000"
)


def get_parser():
    parser = argparse.ArgumentParser("benchmarks.requeue", description=__doc__.split("\n")[0])
    parser.add_argument("--output_dir", type=Path, required=True, help="on a file system that all nodes share; new")
    parser.add_argument("--repeats", type=int, default=5, help="signals (default 5)")
    parser.add_argument("words", nargs="*", help="further flags of run_with_submitit.py, after --")
    return parser


def main(args):
    submit = [sys.executable, ROOT / "run_with_submitit.py", *RUN, *args.words, "--output_dir", args.output_dir]
    subprocess.run(submit, check=True)
    (submission,) = (args.output_dir / "slurm").glob("*_submission.sh")
    job = submission.name.split("_")[0]
    times = []
    try:
        for start in range(args.repeats):
            wait_for(lambda start=start: trained(args.output_dir, job, start), seconds=3600)
            times.append(signal_and_watch(args.output_dir, job, restarts=start))
            print(json.dumps(times[-1]), flush=True)
    finally:
        subprocess.run(["scancel", job], check=True)
    for name in times[0]:
        values = [t[name] for t in times]
        print(f"{name}: median {statistics.median(values):.1f} s, {min(values):.1f} to {max(values):.1f}")


def trained(folder, job, start):
    """Whether this start (0: the first) has logged a step of its own."""
    said = (folder / "slurm" / f"{job}_0_log.out").read_text() if (folder / "slurm").exists() else ""
    return said.count("run folder") > start and "images/s" in said.rpartition("run folder")[2]


def signal_and_watch(folder, job, restarts):
    """Seconds from the signal until the new checkpoint is in place, and until the job waits for its next start."""
    checkpoint = folder / "checkpoint.pth"
    before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
    began = time.monotonic()
    subprocess.run(["scancel", "--signal=USR2", job], check=True)
    wait_for(lambda: checkpoint.exists() and checkpoint.stat().st_mtime_ns > before)
    saved = time.monotonic() - began
    wait_for(lambda: f"Restarts={restarts + 1}" in subprocess.getoutput(f"scontrol show job {job}"))
    return {"saved_s": round(saved, 2), "requeued_s": round(time.monotonic() - began, 2)}


def wait_for(condition, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"nothing in {seconds} s; see OUTPUT_DIR/slurm")
        time.sleep(0.05)


if __name__ == "__main__":
    main(get_parser().parse_args())
