"""What a recipe needs on A100s: batch, learning rate, memory, time, disk. Computed on a CPU in a minute, never run.

    python -m benchmarks.recipes                                   # the tables of docs/recipes.md
    python -m benchmarks.recipes --arch vit_base --images 1281167 --epochs 300 --effective_batch 1024 --gpus 8 16
    python -m benchmarks.recipes --grad_checkpointing --out_dim 1048576 --json recipes.json

A training step of the real model runs on tensors without contents (FakeTensorMode), at two batch sizes. Of each
operation its floating-point operations (torch.utils.flop_counter) and the bytes of its inputs and outputs are counted;
torch's MemTracker counts the bytes that are alive. Other batch sizes lie on the line through the two.

    GPU time of a step = sum over operations of max(FLOP / peak, bytes / bandwidth, LAUNCH) / REACHED
    step = max(GPU time + all-reduce (R > 1), images / loader's rate)            s; R GPUs
    hours = epochs * floor(images / effective batch) * step / 3600
    memory = (alive at the peak + 8 P of AdamW + 4 P of DDP's buckets if R > 1) * FRAGMENTS + CONTEXT   P parameters
    checkpoint = 12 P + F K / 8 + 8 K      bytes: weights, two moments; the dictionary's bits; usage and counts of codes
"""

import argparse
import functools
import json
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import main_cplearn
import vision_transformer
from accumulation import FirstHalf
from augmentation import make_recipe, make_views
from backbones import build_backbone
from benchmarks import sharding
from cplearn_head import CPLearn, CPLearnHead, cplearn_loss
from data import resolve_dataset_defaults
from dictionary import Dictionary

IMAGENET100, IMAGENET = 126_689, 1_281_167  # training images
CARDS = (40, 80)  # GB of an A100


@dataclass(frozen=True)
class Gpu:
    tensor: float  # FLOP/s of bf16 products
    single: float  # FLOP/s of float32 products, without TF32, which nothing here turns on
    bandwidth: float  # bytes/s


A100 = Gpu(312e12, 19.5e12, 1555e9)  # NVIDIA's data sheet, 40 GB; the 80 GB card has 1935 to 2039e9 bytes/s
RTX_3090 = Gpu(71e12, 35.6e12, 936e9)  # NVIDIA's GA102 whitepaper, sums in float32
LAUNCH = 5e-6  # s; the host needs about as long for one operation, so nothing is quicker (assumed)

# Share of that bound which is reached: least, middle, most; assumed for A100s. timm's published training speeds on an
# RTX 3090 (results/benchmark-train-amp-nhwc-pt112-cu113-rtx3090.csv) reach 0.58 (vit_tiny), 0.72 and 0.81 (vit_base);
# PLSC's of ViT-B/16 on 8 A100s, with a loader (3583 images/s, its task/classification/vit), 0.32
REACHED = (0.35, 0.6, 0.75)

# images/s of one core that decodes JPEGs of ImageNet's size and crops them, without and with 8 local crops: 600 and 395
# were measured on a Zen 5 core; the CPUs beside A100s are taken as half as fast
LOADED = {False: 300, True: 200}
CORES = 16  # per GPU: a DGX A100 has 128 for 8
NETWORK = {1: 200e9, 2: 25e9}  # bytes/s of one GPU: within a node by NVLink, between nodes 200 Gbit/s
FRAGMENTS, CONTEXT = 1.1, 1.5e9  # of the caching allocator; bytes of CUDA, nccl, cuBLAS: both assumed
DISK = 1e9  # bytes/s of writing a checkpoint (assumed)


def get_parser():
    parser = argparse.ArgumentParser("benchmarks.recipes", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--arch", nargs="+", default=["vit_small"], choices=vision_transformer.ARCHS)
    add("--out_dim", type=int, nargs="+", default=[131072], help="codes K (default 131072)")
    add("--gpus", type=int, nargs="+", default=[1, 8, 16], help="8 in a node")
    add("--images", type=int, help="of the data set (default: the ImageNet-100 and the ImageNet-1k recipe)")
    add("--epochs", type=int, default=100)
    add(
        "--effective_batch",
        type=int,
        default=512,
        help="images of all GPUs in a step; twice as many in the ImageNet-1k recipe (default 512)",
    )
    add("--lr", type=float, default=5e-4, help="per 256 images (default 5e-4)")
    add("--local_crops_number", type=int, default=0, help="of 96 px, beside two of 224 px")
    add("--grad_checkpointing", action="store_true")
    add("--json", type=Path, help="write all numbers here too")
    return parser


def main(args):
    sets = [(IMAGENET100, args.effective_batch), (IMAGENET, 2 * args.effective_batch)]
    if args.images:
        sets = [(args.images, args.effective_batch)]
    models = [(arch, num_codes) for arch in args.arch for num_codes in args.out_dim]
    kinds = [describe_model(args, *model) for model in models]
    runs = [plan(args, *model, *images, gpus) for model in models for images in sets for gpus in args.gpus]
    print(f"Computed, not run.\n\n{table(kinds)}\n\n{table(runs)}")
    if args.json:
        settings = {name: str(value) if name == "json" else value for name, value in vars(args).items()}
        args.json.write_text(json.dumps({"settings": settings, "models": kinds, "runs": runs}, indent=1) + "\n")


def plan(args, arch, num_codes, images, effective_batch, num_gpus):
    """One run, as a row: {column: value}."""
    batch = effective_batch // num_gpus
    step = Step.of(arch, num_codes, args.local_crops_number, args.grad_checkpointing)
    if step.memory(batch, num_gpus) > 1e9 * max(CARDS):
        step = Step.of(arch, num_codes, args.local_crops_number, True)
    seconds = [step.seconds(batch, num_gpus, reached) for reached in reversed(REACHED)]
    loader = batch / (CORES * LOADED[args.local_crops_number > 0])
    hours = [args.epochs * (images // effective_batch) * max(s, loader) / 3600 for s in seconds]
    return {
        "model": arch,
        "K": num_codes,
        "images": images,
        "epochs": args.epochs,
        "GPUs": num_gpus,
        "batch per GPU": batch,
        "lr at peak": args.lr * effective_batch / 256,
        "recomputed": "yes" if step.recomputes else "no",
        "GB per GPU": round(step.memory(batch, num_gpus) / 1e9, 1),
        "images/s": round(effective_batch / max(seconds[1], loader)),
        "hours": round(hours[1], 1),
        "least": round(hours[0], 1),
        "most": round(hours[2], 1),
        "all-reduce, ms": round(1e3 * step.all_reduce(batch, num_gpus), 1),
        "cores per GPU": round(batch / seconds[1] / LOADED[args.local_crops_number > 0], 1),
        "limit": "loader" if loader > seconds[1] else "GPU",
        "evidence": "computed",
    }


def describe_model(args, arch, num_codes):
    """What holds for a model on any number of GPUs, as a row."""
    plain, checkpointed = (Step.of(arch, num_codes, args.local_crops_number, again) for again in (False, True))
    flops = plain.operations(64)[:, :2].sum() / 64
    size = checkpoint_bytes(plain.parameters, plain.dim, num_codes)
    row = {
        "model": arch,
        "K": num_codes,
        "parameters, M": round(plain.parameters / 1e6, 1),
        "GFLOP per image": round(flops / 1e9, 1),
        "of it the loss": round(loss_flops(plain.dim, num_codes, 2 + args.local_crops_number) / 1e9, 2),
        "MB per image": round(plain.slope / 1e6, 1),
    }
    for name, step in (("largest batch", plain), ("with --grad_checkpointing", checkpointed)):
        row[name] = " / ".join(f"{step.largest_batch(1e9 * card)} ({card} GB)" for card in CARDS)
    return row | {"checkpoint, MB": round(size / 1e6), "s to save": round(size / DISK, 1)}


def checkpoint_bytes(parameters, dim, num_codes):
    """Weights and AdamW's two moments; the dictionary's bits; usage and counts of codes."""
    return 12 * parameters + dim * num_codes // 8 + 8 * num_codes


def loss_flops(dim, num_codes, num_views):
    """FLOP per image of the dense loss, which --head_impl auto takes on a GPU: per view one product with the codes and,
    as they are frozen, one in the backward pass, and one for the images' codes; 2 F K each, in float32. Without B x K
    arrays (tiled, triton) two views take 4 or, with other processes, 5, in bf16 (fused_loss.py)."""
    return (2 * num_views + 1) * 2 * dim * num_codes


def table(rows):
    """Rows of equal keys -> markdown."""
    lines = [list(rows[0]), ["---"] * len(rows[0])]
    lines += [[f"{x:,}" if isinstance(x, int) else f"{x:g}" if isinstance(x, float) else x for x in row.values()]
              for row in rows]  # fmt: skip
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# ---- one training step -----------------------------------------------------------------------------------------------


@dataclass
class Step:
    """A step's operations (FLOP in bf16, FLOP in float32, bytes) and bytes alive, at two batch sizes."""

    sizes: tuple
    counted: tuple  # (operations, 3) at each size
    alive: tuple  # bytes at the peak, without the optimizer's
    augmenting: np.ndarray  # operations for one image
    dim: int
    num_codes: int
    num_views: int
    parameters: int
    recomputes: bool

    @classmethod
    @functools.cache
    def of(cls, arch, num_codes, local_crops, grad_checkpointing, sizes=(32, 64)):
        counted, alive, models = zip(
            *(count_step(arch, num_codes, local_crops, grad_checkpointing, batch) for batch in sizes), strict=True
        )
        dim, parameters = models[0].backbone.embed_dim, sum(p.numel() for p in models[0].parameters())
        augmenting = count_augmentation(local_crops)
        return cls(sizes, counted, alive, augmenting, dim, num_codes, 2 + local_crops, parameters, grad_checkpointing)

    def at(self, pair, batch):
        share = (batch - self.sizes[0]) / (self.sizes[1] - self.sizes[0])
        return pair[0] + (pair[1] - pair[0]) * share

    def operations(self, batch):
        return self.at(self.counted, batch)

    @property
    def slope(self):
        """Bytes per image."""
        return (self.alive[1] - self.alive[0]) / (self.sizes[1] - self.sizes[0])

    def memory(self, batch, num_gpus=1):
        held = (8 if num_gpus == 1 else 12) * self.parameters
        return FRAGMENTS * (self.at(self.alive, batch) + held) + CONTEXT

    def largest_batch(self, card):
        """Multiple of 8."""
        room = card - self.memory(0, num_gpus=8)
        return max(0, int(room / (FRAGMENTS * self.slope)) // 8 * 8)

    def seconds(self, batch, num_gpus, reached=REACHED[1], gpu=A100):
        """GPU time; the all-reduce, which hides behind the backward pass at best, is added in full."""
        bound = least_seconds(self.operations(batch), gpu) + least_seconds(self.augmenting * batch, gpu)
        return bound / reached + self.all_reduce(batch, num_gpus)

    def all_reduce(self, batch, num_gpus):
        """Seconds for gradients and mean predictions, in float32."""
        moved = 2 * (num_gpus - 1) / num_gpus * 4 * self.parameters + self.loss_moves(batch, num_gpus)
        return moved / NETWORK[1 if num_gpus <= 8 else 2]

    def loss_moves(self, batch, num_gpus):
        sizes = argparse.Namespace(batch_size=batch, dim=self.dim, views=self.num_views)
        return sharding.whole(sizes, num_gpus, self.num_codes)[2]


def least_seconds(operations, gpu):
    tensor, single, moved = operations.T
    compute = tensor / gpu.tensor + single / gpu.single
    return np.maximum(np.maximum(compute, moved / gpu.bandwidth), LAUNCH).sum()


def count_step(arch, num_codes, local_crops, grad_checkpointing, batch):
    """(operations, bytes alive at the peak, model) of a step in bf16 with the dense loss; no tensor has contents."""
    with torch.device("meta"):
        backbone = build_backbone(arch, drop_path_rate=None, grad_checkpointing=grad_checkpointing)
    with fused_attention(), FakeTensorMode(allow_non_fake_inputs=True):
        head = CPLearnHead(backbone.embed_dim, num_codes, storage="seed")
        head.dictionary = Dictionary.of(torch.empty(backbone.embed_dim, num_codes, dtype=torch.int8))
        objective = CPLearn(head, loss_function=cplearn_loss)
        model = main_cplearn.Model(backbone.to_empty(device="cpu"), objective)
        first_half = FirstHalf(model.backbone, objective, "bf16")
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        views = [torch.empty(batch, 3, size, size) for size in [224] * 2 + [96] * local_crops]
        tracker = MemTracker()
        tracker.track_external(model, *views, head.dictionary.data)
        with tracker, Counter() as counter:
            objective(first_half(views))[0].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 3.0)
        with Counter() as update:
            optimizer.step()
        alive = max(snapshot["Total"] for snapshot in tracker.get_tracker_snapshot("peak").values())
    return np.array(counter.operations + update.operations), alive, model


def fused_attention():
    """Attention by one kernel, as on a GPU, though the tensors are a CPU's."""
    return mock.patch.object(vision_transformer, "_on_cpu", lambda x: False)


@functools.cache
def count_augmentation(local_crops, batch=16):
    """The device's part of the augmentation, for one image: really run, on random crops."""
    flags = ["--dataset", "imagefolder", "--local_crops_number", str(local_crops)]
    args = resolve_dataset_defaults(main_cplearn.get_args_parser().parse_args(flags))
    views = [(2, 224), (local_crops, 96)]
    crops = [torch.randint(256, (n * batch, 3, size, size), dtype=torch.uint8) for n, size in views]
    with Counter() as counter:
        make_views(make_recipe(args), 0, np.arange(batch), "cpu", crops=crops)
    return np.array(counter.operations) / batch


class Counter(TorchDispatchMode):
    """operations: [(FLOP in bf16, FLOP in float32, bytes)], views and allocations left out."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given, made = ([x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)] for tree in ((args, kwargs), out))
        known = {x.untyped_storage()._cdata for x in given}
        new = [x for x in made if x.untyped_storage()._cdata not in known]
        if (new or function._schema.is_mutable) and "empty" not in function.__name__:
            moved = sum(min(x.nbytes, x.untyped_storage().nbytes()) for x in given + made)
            flops = count_flops(function, args, kwargs or {}, out)
            half = given and given[0].dtype == torch.bfloat16
            self.operations.append((flops, 0, moved) if half else (0, flops, moved))
        return out


ATTENTION = {  # the CPU's fused kernels -> those whose formulas torch has
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: torch.ops.aten._scaled_dot_product_flash_attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        torch.ops.aten._scaled_dot_product_flash_attention_backward
    ),
}


def count_flops(function, args, kwargs, out):
    formula = flop_registry.get(ATTENTION.get(function.overloadpacket, function.overloadpacket))
    return formula(*args, **kwargs, out_val=out) if formula else 0


if __name__ == "__main__":
    main(get_parser().parse_args())
