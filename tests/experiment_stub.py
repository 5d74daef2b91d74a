"""A script that stands for a training and for an evaluation in tests of run_experiments.py, and takes no time.

As a training it writes down each start and each signal, and what its flags are; as an evaluation of that it gives
scores that are a formula: top1 = 50 - 10 |log10(lr) + 2| - weight, highest at lr = 0.01."""

import argparse
import json
import math
import os
import shutil
import signal
import sys
import time
from pathlib import Path


def get_args_parser():
    from utils import ArgumentParser  # torch: not in each process

    return add_flags(ArgumentParser("experiment_stub.py", "no training"))


def add_flags(parser):
    for name in ("output_dir", "device", "data_path", "dataset", "checkpoint", "features_dir", "scores", "wait_for"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--weight", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--exit", type=int, default=0, help="end with this code; -9: killed")
    parser.add_argument("--img_size", type=int)
    for name in ("mean", "std"):
        parser.add_argument(f"--{name}", type=float, nargs=3)
    return parser


def main():
    args = add_flags(argparse.ArgumentParser()).parse_args()
    folder = Path(args.output_dir)
    if args.exit:
        print("error: as asked", file=sys.stderr, flush=True)
        if args.exit < 0:
            os.kill(os.getpid(), -args.exit)
        sys.exit(args.exit)
    train(args, folder) if args.checkpoint is None else evaluate(args, folder)


def train(args, folder):
    def end(number, _):
        note(folder, f"signal {number}")
        time.sleep(0.3)  # another one may come
        sys.exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
        signal.signal(number, end)
    note(folder, "train")
    deadline = time.monotonic() + 200  # of a test that has failed, nothing stays
    while args.wait_for and not Path(args.wait_for).exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    (folder / "flags.json").write_text(json.dumps(vars(args)))
    shutil.copy("empty.pth", folder / "checkpoint.pth")
    lines = [{"kind": "step", "step": step, "loss": args.lr / step} for step in (1, 2)]
    (folder / "log.txt").write_text("".join(json.dumps(line) + "\n" for line in lines))


def evaluate(args, folder):
    note(folder, f"evaluate {args.scores}")
    trained = json.loads((folder / "flags.json").read_text())
    top1 = 50 - 10 * abs(math.log10(trained["lr"]) + 2) - trained["weight"]
    results = {"rows": [{"checkpoint": args.checkpoint, "top1": top1}], "versions": {"stub": "1"}}
    (folder / f"results_{args.scores}.json").write_text(json.dumps(results))


def note(folder, what):
    with open(folder / "what_came.txt", "a") as file:
        file.write(f"{what}\n")


if __name__ == "__main__":
    main()
