"""What a recipe needs on A100s: batch, learning rate, memory, time, disk. Computed on a CPU in a minute.

    python -m benchmarks.recipes                                   # the tables of docs/recipes.md
    python -m benchmarks.recipes --arch vit_base --images 1281167 --epochs 300 --effective_batch 1024 --gpus 8 16
    python -m benchmarks.recipes --grad_checkpointing --out_dim 1048576 --json recipes.json
    python -m benchmarks.recipes --budget --arch vit_large vit_huge_patch14_224       # where the memory goes; FSDP2?
    python -m benchmarks.recipes --measured step.json          # how far off it is, on what benchmarks.step measured

A training step of the real loop runs on tensors without contents (FakeTensorMode). Of each operation its floating-point
operations (torch.utils.flop_counter) and the bytes of its inputs and outputs are counted; the bytes of the tensors that
are alive are summed. Where a step's images do not fit on the card, the quickest of --accum_steps and
--grad_checkpointing that does is chosen.

    GPU time of a step = sum over operations of max(FLOP / peak, bytes / bandwidth, LAUNCH) / REACHED
    step = max(GPU time + all-reduce (R > 1), images / loader's rate)            s; R GPUs
    hours = epochs * floor(images / effective batch) * step / 3600
    memory = (alive at the peak + the augmentation's peak + 8 P of AdamW + 4 P of DDP's buckets if R > 1) * FRAGMENTS
             + CONTEXT      P parameters; two sets of views are alive: one trains while the next is made
    checkpoint = 12 P + F K / 8 + 8 K      bytes: weights, two moments; the dictionary's bits; usage and counts of codes
"""

import argparse
import functools
import itertools
import json
import sys
import weakref
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

import main_cplearn
import vision_transformer
from accumulation import FirstHalf, backward_of_joint_batch
from augmentation import make_recipe, make_views
from backbones import build_backbone
from benchmarks import sharding
from cplearn_head import CPLearn, CPLearnHead, cplearn_loss
from data import resolve_dataset_defaults
from dictionary import Dictionary
from fused_loss import MANY_ON_GPU
from running.files import write_whole
from utils import UserError

IMAGENET100, IMAGENET = 126_689, 1_281_167  # training images
CARDS = (40, 80)  # GB of an A100


@dataclass(frozen=True)
class Gpu:
    tensor: float  # FLOP/s of bf16 products
    single: float  # FLOP/s of float32 products, without TF32, which nothing here turns on
    bandwidth: float  # bytes/s


A100 = Gpu(312e12, 19.5e12, 1555e9)  # NVIDIA's data sheet, 40 GB; the 80 GB card has 1935 to 2039e9 bytes/s
RTX_3090 = Gpu(71e12, 35.6e12, 936e9)  # NVIDIA's GA102 whitepaper, sums in float32
MEASURED_ON = {"NVIDIA H200": Gpu(989e12, 67e12, 4.8e12)}  # PyTorch's name of the card; its data sheet, no sparsity
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
# of the caching allocator, assumed, but fits a CPU's heap (docs/recipes.md); bytes of CUDA, nccl, cuBLAS: assumed
FRAGMENTS, CONTEXT = 1.1, 1.5e9
SIZES = (32, 64)  # images of a batch, through whose memory the line for other batches goes
LIBRARIES = 0.1e9  # bytes that a run on a CPU adds beside its tensors; fitted, as is seen in docs/recipes.md
DISK = 1e9  # bytes/s of writing a checkpoint (assumed)


def get_parser():
    parser = argparse.ArgumentParser("benchmarks.recipes", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--arch", nargs="+", default=["vit_small"], help="of main_cplearn.py; images have 224 px (default vit_small)")
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
    add("--grad_checkpointing", action="store_true", help="in any case, not where it is quicker than --accum_steps")
    add("--card", type=float, default=max(CARDS), help="GB of a GPU's memory (default %(default)s)")
    add("--budget", action="store_true", help="where the memory goes, what saves some, and when FSDP2 is needed")
    add(
        "--measured",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="of benchmarks.step --output: how far this is off there",
    )
    add("--json", type=Path, help="write all numbers here too")
    return parser


def main(args):
    if args.measured:
        print(table(list(compare(args.measured))))
        return
    sets = [(IMAGENET100, args.effective_batch), (IMAGENET, 2 * args.effective_batch)]
    if args.images:
        sets = [(args.images, args.effective_batch)]
    models = [(arch, num_codes) for arch in args.arch for num_codes in args.out_dim]
    if args.budget:
        budgets = [budget(args, *model) for model in models]
        ways = [row for model in models for row in savings(args, *model)]
        print(f"Computed, not run.\n\n{table(budgets)}\n\n{table(ways)}")
        return
    kinds = [describe_model(args, *model) for model in models]
    runs = [plan(args, *model, *images, gpus) for model in models for images in sets for gpus in args.gpus]
    print(f"Computed, not run.\n\n{table(kinds)}\n\n{table(runs)}")
    if args.json:
        settings = {name: str(value) if name == "json" else value for name, value in vars(args).items()}
        write_whole(args.json, json.dumps({"settings": settings, "models": kinds, "runs": runs}, indent=1) + "\n")


def plan(args, arch, num_codes, images, effective_batch, num_gpus):
    """One run, as a row: {column: value}."""
    step, batch, parts = arrange(args, arch, num_codes, effective_batch // num_gpus, num_gpus)
    if batch * parts * num_codes >= MANY_ON_GPU:
        print(f"note: K {num_codes:,}, {num_gpus} GPUs: computed is dense; auto would take tiles", file=sys.stderr)
    seconds = [step.seconds(batch, num_gpus, reached, parts=parts) for reached in reversed(REACHED)]
    loader = batch * parts / (CORES * LOADED[args.local_crops_number > 0])
    hours = [args.epochs * (images // effective_batch) * max(s, loader) / 3600 for s in seconds]
    return {
        "model": arch,
        "K": num_codes,
        "images": images,
        "epochs": args.epochs,
        "GPUs": num_gpus,
        "batch per GPU": batch,
        "accum_steps": parts,
        "lr at peak": args.lr * effective_batch / 256,
        "recomputed": "yes" if step.recomputes else "no",
        "GB per GPU": round(step.memory(batch, num_gpus, parts) / 1e9, 1),
        "images/s": round(effective_batch / max(seconds[1], loader)),
        "hours": round(hours[1], 1),
        "least": round(hours[0], 1),
        "most": round(hours[2], 1),
        "all-reduce, ms": round(1e3 * step.all_reduce(batch * parts, num_gpus), 1),
        "cores per GPU": round(batch * parts / seconds[1] / LOADED[args.local_crops_number > 0], 1),
        "limit": "loader" if loader > seconds[1] else "GPU",
        "evidence": "computed",
    }


def arrange(args, arch, num_codes, images, num_gpus):
    """The quickest (step, batch, micro-batches) whose memory a GPU has, for its share of a step's images.

    Raises UserError where there is none."""
    fitting = []
    for recomputes in dict.fromkeys((args.grad_checkpointing, True)):
        step = Step(arch, num_codes, args.local_crops_number, recomputes)
        for parts in (m for m in range(1, images // 2 + 1) if images % m == 0):
            batch = images // parts
            if all(step.memory(batch, num_gpus, m) <= 1e9 * args.card for m in (1, parts)):  # one is counted quickly
                fitting.append((step.seconds(batch, num_gpus, parts=parts), step, batch, parts))
                break  # smaller micro-batches cost more
        if fitting and fitting[0][-1] == 1:
            break  # nor is recomputing quicker
    if not fitting:
        raise UserError(f"--card {args.card:g}: not even two images of {arch} at once fit on it; see --budget")
    return min(fitting, key=lambda found: found[0])[1:]


def describe_model(args, arch, num_codes):
    """What holds for a model on any number of GPUs, as a row."""
    plain, checkpointed = (Step(arch, num_codes, args.local_crops_number, again) for again in (False, True))
    flops = plain.counted(64)[0][:, :2].sum() / 64
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


def budget(args, arch, num_codes):
    """Where the memory of one of several GPUs goes whatever the batch, GB, and what each image adds, as a row."""
    plain, checkpointed = (Step(arch, num_codes, args.local_crops_number, again) for again in (False, True))
    billions = plain.parameters / 1e9
    least = checkpointed.memory(2, num_gpus=8) / 1e9  # batch norm takes no single image
    return {
        "model": arch,
        "parameters, M": round(1e3 * billions),
        "weights": round(4 * billions, 2),
        "gradients (DDP's buckets)": round(4 * billions, 2),
        "AdamW's moments": round(8 * billions, 2),
        "codes": round(plain.dim * num_codes / 1e9, 2),
        "GB with two images": round(least, 1),
        "of it FSDP2 on 8 GPUs saves": round(FRAGMENTS * 16 * billions * 7 / 8, 1),
        "MB per image": round(plain.slope / 1e6),
        "recomputed": round(checkpointed.slope / 1e6),
        f"needs FSDP2 on {args.card:g} GB": "yes" if least > args.card else "no",
    }


def savings(args, arch, num_codes, images=64, parts=4):
    """What --grad_checkpointing and --accum_steps give on one of 8 GPUs, as a row each; time: to the plain step's."""
    plain = Step(arch, num_codes, args.local_crops_number).seconds(images, 8)
    for recomputes, m in itertools.product((False, True), (1, parts)):
        step = Step(arch, num_codes, args.local_crops_number, recomputes)
        memory = step.memory(images // m, 8, m) / 1e9
        yield {
            "model": arch,
            "images": images,
            "flags": " ".join(["--grad_checkpointing"] * recomputes + [f"--accum_steps {m}"] * (m > 1)) or "none",
            "GB": round(memory, 1),
            f"fits on {args.card:g} GB": "yes" if memory <= args.card else "no",
            "time": round(step.seconds(images // m, 8, parts=m) / plain, 2),
            "images at once that fit": step.largest_batch(1e9 * args.card),
        }


def compare(paths):
    """Each row of benchmarks.step's files beside what is computed for it, as a row; times are to the first row's.

    Computed is the dense loss: rows of other forms are passed over, and named."""
    first = None
    for record in (json.loads(path.read_text()) for path in paths):
        on_gpu, gpu = record["device"] == "cuda", MEASURED_ON.get(record["machine"].get("gpu"))
        for name, row in record["results"].items():
            flags = row["flags"]
            if flags["head_impl"] not in ("dense", "auto"):
                print(f"passed over: {name}: --head_impl {flags['head_impl']}; dense is computed", file=sys.stderr)
                continue
            step = Step(
                flags["arch"], flags["out_dim"], flags["local_crops_number"], flags["grad_checkpointing"], on_gpu
            )
            operations, alive, parameters, _ = step.counted(flags["batch_size_per_gpu"], flags["accum_steps"])
            computed = alive + 8 * parameters
            if not on_gpu:  # resident memory; on a GPU benchmarks.step tells what PyTorch has given out
                computed = FRAGMENTS * computed + LIBRARIES
            gflop = operations[:, :2].sum() / 1e9
            milliseconds = row["step_ms"] if on_gpu else sum(part["cpu_ms"] for part in row["parts"].values())
            first = first or (milliseconds, gflop)
            bound = 1e3 * step.seconds(flags["batch_size_per_gpu"], 1, 1, gpu, flags["accum_steps"]) if gpu else None
            yield {
                "model": name,
                "batch": flags["batch_size_per_gpu"],
                "local crops": flags["local_crops_number"],
                "accum_steps": flags["accum_steps"],
                "recomputed": "yes" if flags["grad_checkpointing"] else "no",
                "MB measured": round(row["memory_mb"]),
                "computed": round(computed / 1e6),
                "off by": f"{computed / 1e6 / row['memory_mb'] - 1:+.0%}",
                "GFLOP measured": round(row["gflop"]),
                "GFLOP computed": round(gflop),
                "time measured": round(milliseconds / first[0], 2),
                "time by GFLOP": round(gflop / first[1], 2),
                "ms": round(milliseconds, 1),
                "bound": "" if bound is None else round(bound, 1),
                "share reached": "" if bound is None else round(bound / milliseconds, 2),
            }


def checkpoint_bytes(parameters, dim, num_codes):
    """Weights and AdamW's two moments; the dictionary's bits; usage and counts of codes."""
    return 12 * parameters + dim * num_codes // 8 + 8 * num_codes


def loss_flops(dim, num_codes, num_views):
    """FLOP per image of the dense loss, which --head_impl auto takes on a GPU below MANY_ON_GPU logits: per view one
    product with the codes and, as they are frozen, one in the backward pass; 2 F K each, in float32. Without B x K
    arrays (tiled, triton) two views take 4 or, with other processes, 5, in bf16 (fused_loss)."""
    return 2 * num_views * 2 * dim * num_codes


def table(rows):
    """Rows of equal keys -> markdown."""
    lines = [list(rows[0]), ["---"] * len(rows[0])]
    lines += [[f"{x:,}" if isinstance(x, int) else f"{x:g}" if isinstance(x, float) else x for x in row.values()]
              for row in rows]  # fmt: skip
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# ---- one training step -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """A step of `parts` micro-batches of `batch` images: what it computes, what is alive at its peak."""

    arch: str
    num_codes: int
    local_crops: int = 0
    recomputes: bool = False  # --grad_checkpointing
    on_gpu: bool = True  # attention by one kernel, views made while the batch before trains

    def counted(self, batch, parts=1):
        """(operations (n, 3), bytes alive at the peak without the optimizer's, parameters, width of the backbone)"""
        return count_step(self.arch, self.num_codes, self.local_crops, self.recomputes, batch, parts, self.on_gpu)

    @property
    def parameters(self):
        return self.counted(SIZES[0])[2]

    @property
    def dim(self):
        return self.counted(SIZES[0])[3]

    @property
    def slope(self):
        """Bytes per image."""
        first, second = (self.counted(size)[1] for size in SIZES)
        return (second - first) / (SIZES[1] - SIZES[0]) + count_augmentation(self.local_crops)[1]

    def memory(self, batch, num_gpus=1, parts=1):
        held = (8 if num_gpus == 1 else 12) * self.parameters
        augmenting = count_augmentation(self.local_crops)[1] * batch  # on a stream, and so from memory, of its own
        return FRAGMENTS * (self.counted(batch, parts)[1] + augmenting + held) + CONTEXT

    def largest_batch(self, card):
        """Multiple of 8."""
        room = card - self.memory(SIZES[1], num_gpus=8)
        return max(0, int(SIZES[1] + room / (FRAGMENTS * self.slope)) // 8 * 8)

    def seconds(self, batch, num_gpus, reached=REACHED[1], gpu=A100, parts=1):
        """GPU time; the all-reduce, which hides behind the backward pass at best, is added in full."""
        bound = least_seconds(self.counted(batch, parts)[0], gpu)
        augmenting = least_seconds(count_augmentation(self.local_crops)[0] * batch, gpu)
        bound += (2 * parts - 1) * augmenting  # all but the last micro-batch are augmented twice
        return bound / reached + self.all_reduce(batch * parts, num_gpus)

    def all_reduce(self, images, num_gpus):
        """Seconds for gradients and mean predictions, in float32."""
        moved = 2 * (num_gpus - 1) / num_gpus * 4 * self.parameters + self.loss_moves(images, num_gpus)
        return moved / NETWORK[1 if num_gpus <= 8 else 2]

    def loss_moves(self, images, num_gpus):
        sizes = argparse.Namespace(batch_size=images, dim=self.dim, views=2 + self.local_crops)
        return sharding.whole(sizes, num_gpus, self.num_codes)[2]


def least_seconds(operations, gpu):
    tensor, single, moved = operations.T
    compute = tensor / gpu.tensor + single / gpu.single
    return np.maximum(np.maximum(compute, moved / gpu.bandwidth), LAUNCH).sum()


@functools.cache
def count_step(arch, num_codes, local_crops, grad_checkpointing, batch, parts=1, on_gpu=True):
    """A step of main_cplearn's loop in bf16 with the dense loss; no tensor has contents. See `Step.counted`."""
    with torch.device("meta"):
        backbone = build_backbone(arch, drop_path_rate=None, grad_checkpointing=grad_checkpointing)
    with fused_attention() if on_gpu else nullcontext(), FakeTensorMode(allow_non_fake_inputs=True):
        head = CPLearnHead(backbone.embed_dim, num_codes, storage="seed")
        head.dictionary = Dictionary.of(torch.empty(backbone.embed_dim, num_codes, dtype=torch.int8))
        objective = CPLearn(head, loss_function=cplearn_loss)
        model = main_cplearn.Model(backbone.to_empty(device="cpu"), objective)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        run = loop_without_data(model, [(batch, 3, size, size) for size in [224] * 2 + [96] * local_crops], on_gpu)
        with Counter() as counter:
            counter.hold([*model.parameters(), *model.buffers(), head.dictionary.data])
            run.ahead(run.loader.augment)  # of the step before
            backward_of_joint_batch(run, [None] * parts, step=1)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 3.0)
        with Counter() as update:
            optimizer.step()
    parameters = sum(p.numel() for p in model.parameters())
    return np.array(counter.operations + update.operations), counter.peak, parameters, backbone.embed_dim


def loop_without_data(model, shapes, on_gpu):
    """What of a main_cplearn.Run a step needs that is not logged, with views of these shapes."""
    return SimpleNamespace(
        args=SimpleNamespace(seed=0, precision="bf16", freeze_backbone_epochs=0),
        device=torch.device("cpu"),
        model=model,
        first_half=FirstHalf(model.backbone, model.objective, "bf16"),
        second_half=model.objective,
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        loader=SimpleNamespace(
            steps_per_epoch=1, augment=lambda batch=None, device=None: [torch.empty(shape) for shape in shapes]
        ),
        ahead=TwoSets() if on_gpu else lambda make: make(),
        log=SimpleNamespace(first_step=0),
        watch=SimpleNamespace(step=0, progress=lambda step: None),
    )


class TwoSets:
    """accumulation.Ahead's memory: the views that train, and those that are made meanwhile."""

    def __init__(self):
        self.sets = [None, None]

    def __call__(self, make):
        self.sets = [self.sets[1], make()]
        return self.sets[1]


def fused_attention():
    """Attention by one kernel, as on a GPU, though the tensors are a CPU's."""
    return mock.patch.object(vision_transformer, "_on_cpu", lambda x: False)


@functools.cache
def count_augmentation(local_crops, batch=16):
    """(operations, bytes alive at the peak) of the device's part of the augmentation, for one image: really run, on
    random crops."""
    flags = ["--dataset", "imagefolder", "--local_crops_number", str(local_crops)]
    args = resolve_dataset_defaults(main_cplearn.get_args_parser().parse_args(flags))
    views = [(2, 224), (local_crops, 96)]
    crops = [torch.randint(256, (n * batch, 3, size, size), dtype=torch.uint8) for n, size in views]
    with Counter() as counter:
        make_views(make_recipe(args), 0, np.arange(batch), "cpu", crops=crops)
    return np.array(counter.operations) / batch, counter.peak / batch


class Counter(TorchDispatchMode):
    """operations: [(FLOP in bf16, FLOP in float32, bytes)], views and allocations left out.

    alive, peak: bytes of tensors that were made here or given to `hold`, and are not yet freed; the most of them."""

    def __init__(self):
        super().__init__()
        self.operations, self.alive, self.peak, self.held = [], 0, 0, WeakIdKeyDictionary()

    def hold(self, tensors):
        for storage in (tensor.untyped_storage() for tensor in tensors):
            if storage not in self.held:
                self.held[storage] = size = storage.nbytes()
                self.alive += size
                self.peak = max(self.peak, self.alive)
                weakref.finalize(storage, self.free, size)

    def free(self, size):
        self.alive -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given, made = ([x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)] for tree in ((args, kwargs), out))
        known = {x.untyped_storage()._cdata for x in given}
        new = [x for x in made if x.untyped_storage()._cdata not in known]
        self.hold(new)
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
    return flop_registry[packet(function)](*args, **kwargs, out_val=out) if is_product(function) else 0


def is_product(function):
    """Whether an operation of PyTorch's is a product of matrices, a convolution or fused attention."""
    return packet(function) in flop_registry


def packet(function):
    return ATTENTION.get(function.overloadpacket, function.overloadpacket)


if __name__ == "__main__":
    main(get_parser().parse_args())
