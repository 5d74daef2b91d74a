"""What channels last costs a convolutional backbone on a CPU beside the contiguous layout: CPU time, in turn.

    OMP_NUM_THREADS=1 python -m benchmarks.layouts

Forward and backward, and features alone of images that lie contiguously, as the evaluations have them. A ratio is the
median over repeats of a pass's CPU time to that of the pass before it in the other layout. Images are noise.
"""

import argparse
import statistics
import time

import torch

from backbones import build_backbone
from utils import PRECISIONS

LAYOUTS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
SIZES = (  # arch, images, pixels, channels of resnet8
    ("resnet8", 256, 32, 32),
    ("resnet8", 256, 32, 64),
    ("resnet8", 64, 32, 128),
    ("resnet18", 64, 32, None),
    ("resnet10t", 64, 64, None),
    ("resnet50", 8, 96, None),
    ("vgg11", 8, 64, None),
    ("regnetx_002", 32, 64, None),  # this one and those below have convolutions with groups
    ("resnext50_32x4d", 8, 64, None),
    ("efficientnet_b0", 16, 64, None),
    ("convnext_atto", 16, 64, None),
)


def get_parser():
    parser = argparse.ArgumentParser("benchmarks.layouts", description=__doc__.split("\n")[0])
    parser.add_argument("--arch", nargs="+", help="rows to measure (default: all)")
    parser.add_argument("--repeats", type=int, default=7, help="timed passes of each layout (default 7)")
    return parser


def main(args):
    torch.set_num_threads(1)
    print("| backbone | images | px | precision | training s | ratio | features s | ratio |\n" + "|---" * 8 + "|")
    for arch, images, px, width in SIZES:
        for precision in ("bf16", "fp32"):
            if arch in (args.arch or [arch]):
                found = [measure(args, arch, images, px, width, precision, training) for training in (True, False)]
                cells = (f"{seconds:.3f} | {ratio:.2f}" for seconds, ratio in found)
                name = f"{arch}, width {width}" if width else arch
                print(f"| {name} | {images} | {px} | {precision} | {' | '.join(cells)} |", flush=True)


def measure(args, arch, images, px, width, precision, training):
    """CPU seconds of a contiguous pass, and the ratio of channels last to it."""
    models = {name: build_backbone(arch, px, width=width).to(memory_format=LAYOUTS[name]) for name in LAYOUTS}
    x, seconds = torch.randn(images, 3, px, px), {name: [] for name in LAYOUTS}
    for _ in range(args.repeats + 1):
        for name, model in models.items():
            views = x.contiguous(memory_format=LAYOUTS[name]) if training else x
            begin = time.process_time()
            passed(model.train(training), views, PRECISIONS[precision], training)
            seconds[name].append(time.process_time() - begin)
    before, after = (every[1:] for every in seconds.values())
    return statistics.median(before), statistics.median(b / a for a, b in zip(before, after, strict=True))


def passed(model, views, dtype, training):
    with torch.set_grad_enabled(training):
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            features = model(views)
        if training:
            features.float().square().sum().backward()
            model.zero_grad()


if __name__ == "__main__":
    main(get_parser().parse_args())
