"""Quality of what is learned with a Rademacher and with a Hadamard dictionary, from the same runs with several seeds.

    python -m benchmarks.dictionaries --data cifar10="--dataset cifar10 --data_path data" \\
        fashion_mnist="--dataset fashion_mnist --data_path /usr/share/datasets/fashion-mnist"

--data: a name, and the flags of main_cplearn.py that choose the images. Flags after "--" replace RUN_FLAGS. Every run
is evaluated on the test images: accuracy of 20-NN on the frozen features; AMI of hard codes and labels, which is 0 for
codes that know nothing of labels; and the number of codes in use. Prints a table (mean and standard deviation over
seeds) and writes every run's figures as JSON. A run that is finished is not trained again.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from sklearn.metrics import adjusted_mutual_info_score

import data
from evaluation import extract_features
from evaluation.knn import knn_accuracy
from images import open_dataset
from pretrained import load_pretrained
from running.files import write_whole

RUN_FLAGS = shlex.split(
    "--augmentation dino --arch resnet8 --width 64 --out_dim 1024 --beta 0.5 --batch_size_per_gpu 64 --lr 4e-3 "
    "--warmup_epochs 0.2 --max_steps 300 --saveckp_freq 0"
)
FIGURES = {"knn_top1": "20-NN top-1, %", "ami": "AMI of codes", "codes_used": "codes in use", "loss": "last loss"}


def get_parser():
    parser = argparse.ArgumentParser("benchmarks.dictionaries", description=__doc__.split("\n")[0])
    parser.add_argument("--data", nargs="+", required=True, metavar="NAME=FLAGS", help="see the docstring")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--dictionaries", nargs="+", default=["rademacher", "hadamard"])
    parser.add_argument("--output_dir", type=Path, default=Path("runs/dictionaries"), help="runs and results.json")
    parser.add_argument("flags", nargs="*", default=RUN_FLAGS, help="of main_cplearn.py")
    return parser


def main(args):
    results = []
    for seed in args.seeds:
        for name, flags in (item.split("=", 1) for item in args.data):
            for dictionary in args.dictionaries:
                results.append(one_run(args, name, shlex.split(flags), dictionary, seed))
                write_whole(args.output_dir / "results.json", json.dumps(results, indent=1) + "\n")
    print(table(results))


def one_run(args, name, data_flags, dictionary, seed):
    """Train (or find the finished run) and evaluate."""
    folder = args.output_dir / f"{name}_{dictionary}_{seed}"
    flags = [*data_flags, *args.flags, "--dictionary", dictionary, "--seed", str(seed)]
    command = [sys.executable, "main_cplearn.py", *flags, "--output_dir", str(folder)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    log = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    last = next(line for line in reversed(log) if line["kind"] == "step")
    figures = {"loss": last["train_loss"], **evaluate(folder / "checkpoint.pth", data_flags)}
    return {"data": name, "dictionary": dictionary, "seed": seed, **figures, "flags": args.flags}


def evaluate(checkpoint, data_flags):
    """20-NN accuracy (percent), AMI of codes and labels, and codes in use, of the test images."""
    parser = argparse.ArgumentParser()
    data.add_dataset_arguments(parser)
    args = parser.parse_args(data_flags)
    data.resolve_dataset_defaults(args)
    model = load_pretrained(checkpoint).eval()
    matrices = []
    for split in ("train", "val"):
        images = open_dataset(args, split)
        batches = data.eval_batches(images, args.img_size, args.in_chans, args.mean, args.std, 256)
        features, codes = extract_features(model, batches, len(images), torch.device("cpu"), "bf16")
        matrices += [features, torch.as_tensor(images.labels)]
    top1 = knn_accuracy(*matrices, ks=(20,))[20, 0.07]["top1"]
    ami = adjusted_mutual_info_score(matrices[3].numpy(), codes.numpy())
    return {"knn_top1": top1, "ami": float(ami), "codes_used": len(codes.unique())}


def table(results):
    lines = [["data", "dictionary", *FIGURES.values()]]
    lines.append(["---"] * len(lines[0]))
    for data_name, dictionary in dict.fromkeys((r["data"], r["dictionary"]) for r in results):
        runs = [r for r in results if (r["data"], r["dictionary"]) == (data_name, dictionary)]
        cells = []
        for figure in FIGURES:
            values = [run[figure] for run in runs]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.4g} ± {spread:.2g}")
        lines.append([data_name, dictionary, *cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    main(get_parser().parse_args())
