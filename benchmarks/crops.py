"""What crops of two sizes in one pass, and stochastic depth that skips images, cost beside the plain forms: CPU time.

    OMP_NUM_THREADS=1 python -m benchmarks.crops --output benchmarks/crops.json

Forward and backward of the backbone alone, CPU seconds of one thread, all forms in turn in one process. A ratio is the
median over repeats of a form's time to that of the form it stands against. Images are noise.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch

import vision_transformer
from benchmarks.head import save_record
from utils import PRECISIONS


def get_parser():
    parser = argparse.ArgumentParser("benchmarks.crops", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--arch", default="vit_small", choices=vision_transformer.ARCHS)
    add("--batch", type=int, nargs="+", default=[4, 8], help="images (default 4 8)")
    add("--global_size", type=int, default=224, help="of 2 crops, pixels (default 224)")
    add("--local_size", type=int, default=96, help="of the others, pixels (default 96)")
    add("--local_crops", type=int, default=8, help="(default 8)")
    add("--rates", type=float, nargs="+", default=[0.1, 0.3], help="of stochastic depth (default 0.1 0.3)")
    add("--precision", default="bf16", choices=PRECISIONS)
    add("--repeats", type=int, default=7, help="timed passes of each form (default 7)")
    add("--output", type=Path, help="JSON file (default: none)")
    return parser


def main(args):
    torch.set_num_threads(1)
    rows = []
    print("| B | form | CPU s | against | ratio |\n|---|---|---|---|---|")
    for batch in args.batch:
        for row in measure(args, batch):
            rows.append(row)
            print("| {batch} | {form} | {cpu_s:.3f} | {against} | {ratio:.3f} |".format(**row), flush=True)
    if args.output:
        save_record(args.output, results=rows)


def measure(args, batch):
    """A row for each form. Stochastic depth is timed in one pass per size, the global crops alone and all."""
    crops = [torch.randn(2 * batch, 3, args.global_size, args.global_size)]
    crops.append(torch.randn(args.local_crops * batch, 3, args.local_size, args.local_size))
    plain, one, apart = build(args, 0.0), [crops[:1]], [[crop] for crop in crops]
    forms = {"one pass per size": (plain, apart, None), "one pass": (plain, [crops], "one pass per size")}
    for rate in args.rates:
        skipping, weighting = build(args, rate), masked(build(args, rate))
        forms[f"p {rate}, 2 crops, weights"] = (weighting, one, None)
        forms[f"p {rate}, 2 crops, skipping"] = (skipping, one, f"p {rate}, 2 crops, weights")
        forms[f"p {rate}, all crops, weights"] = (weighting, apart, None)
        forms[f"p {rate}, all crops, skipping"] = (skipping, apart, f"p {rate}, all crops, weights")
    seconds = times(args, forms)
    return [
        {
            "batch": batch,
            "form": name,
            "cpu_s": statistics.median(seconds[name]),
            "against": against or "",
            "ratio": statistics.median(a / b for a, b in zip(seconds[name], seconds[against or name], strict=True)),
        }
        for name, (_, _, against) in forms.items()
    ]


def build(args, rate):
    torch.manual_seed(0)
    return getattr(vision_transformer, args.arch)(drop_path_rate=rate).train()


def masked(model):
    """timm's stochastic depth: every image goes through every branch, and what is dropped is multiplied by 0."""
    for block in model.blocks:
        block.forward = lambda x, block=block, **_: masked_block(block, x)
    return model


def masked_block(block, x):
    x = x + block.drop_path1(block.ls1(block.attn(block.norm1(x))))
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


def times(args, forms):
    """{form: seconds of each pass}; the forms take turns, so that a noisy neighbour meets all of them alike."""
    seconds = {name: [] for name in forms}
    for _ in range(args.repeats + 1):
        for name, (model, passes, _) in forms.items():
            begin = time.process_time()
            step(args, model, passes)
            seconds[name].append(time.process_time() - begin)
    return {name: every[1:] for name, every in seconds.items()}


def step(args, model, passes):
    dtype = PRECISIONS[args.precision]
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        features = torch.cat([model(images) for images in passes])
    features.float().square().sum().backward()
    model.zero_grad()


if __name__ == "__main__":
    main(get_parser().parse_args())
