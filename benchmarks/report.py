"""What the page of a long run costs: CPU seconds and bytes of make_report.py on a log.txt of many lines.

    OMP_NUM_THREADS=1 python -m benchmarks.report --lines 1000000

The log has the numbers of CPLearn's lines, made of noise; 0.7 GB for a million of them. The CPU's time, without that of
importing torch.
"""

import argparse
import json
import random
import tempfile
import time
from pathlib import Path

from report import read_run, report_page


def get_parser():
    parser = argparse.ArgumentParser("benchmarks.report", description=__doc__.split("\n")[0])
    parser.add_argument("--lines", type=int, default=100_000, help="logged lines (default 100000)")
    return parser


NAMES = ["train_loss", "train_prior", "train_invariance", "train_entropy", "train_grad_norm", "train_wd"]
NAMES += ["feature_mean", "feature_std", "spread", "within_code", "least_hard_prior", "entropy_share"]
NAMES += ["gap", "gap_share", "information", "data_wait", "images_per_s", "memory_mb"]


def main(args):
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.txt"
        with open(log, "w") as file:
            for step in range(10, 10 * args.lines + 1, 10):
                file.write(json.dumps(a_line(step)) + "\n")
        began = time.process_time()
        run = read_run(folder)
        read = time.process_time() - began
        page = report_page([run])
        made = time.process_time() - began - read
    size = len(page.encode()) / 1e6
    print(f"{args.lines:,} lines: read in {read:.1f} CPU-s, page made in {made:.1f} CPU-s, {size:.2f} MB")


def a_line(step):
    """As a run logs it; no two alike."""
    counts = {"rankme": 60.0, "rankme_max": 128, "num_codes": 1024, "codes_used": 500, "images_counted": 4096}
    counts |= {
        "perplexity": 480.0,
        "batch_perplexity": 90.0,
        "images_per_mean": 128,
        "bad_images": 0,
        "train_lr": 1 / step,
    }
    return {"kind": "step", "step": step, "epoch": 0} | counts | {name: 0.2 + 0.6 * random.random() for name in NAMES}


if __name__ == "__main__":
    main(get_parser().parse_args())
