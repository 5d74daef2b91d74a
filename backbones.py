"""One function from a name to a backbone: images (B, C, h, w) -> features (B, D), with D in `.embed_dim`.

    build_backbone("vit_small", img_size=224, patch_size=16)
    build_backbone("resnet8", img_size=32, width=256)         # the paper's CIFAR-100 backbone
    build_backbone("convnext_tiny")                           # any name that `timm.list_models()` prints

No weights are loaded or downloaded here; `pretrained.load_pretrained` reads files.
"""

import argparse
import difflib
import functools
import re
from collections.abc import Callable

import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import vision_transformer
from utils import Number, UserError, all_gather_rows, one_line, positive

ARCHS = (*vision_transformer.ARCHS, "resnet8", "resnet18")
ARCH, PATCH_SIZE = "vit_small", 16  # of a run that names none
RESNET8_WIDTH = 128  # Table 5 of arXiv 2410.04959 leaves it open: 128 in its runs, 256 for CIFAR-100
VIT_DROP_PATH_RATE = 0.1  # DINO's


def add_backbone_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that `build_backbone` takes; names and defaults are DINO's."""
    parser.add_argument(
        "--arch",
        default=None,
        metavar="NAME",
        help=f"backbone: {', '.join(ARCHS)}, or any timm name. vit_mini, resnet8 and resnet18 are for images of about "
        "32 px. A backbone with a parameter that gets no gradient cannot be trained with several processes (default: "
        f"{ARCH}, or that of --init_from)",
    )
    parser.add_argument(
        "--init_from",
        "--pretrained",
        dest="init_from",
        default=None,
        metavar="FILE[:KEY]",
        help="start from the backbone in this file, of any kind that the evaluations open; KEY, such as teacher or "
        "student, chooses among several. The file tells --arch and --patch_size; another --patch_size or --in_chans "
        "is made from the file's, and said. A run that goes on does not read it (default: start from random weights)",
    )
    parser.add_argument(
        "--num_heads",
        type=positive(int),
        default=None,
        help="attention heads of a ViT (default: those of --arch, or of --init_from)",
    )
    parser.add_argument(
        "--patch_size",
        type=Number(int, least=1, most=2**15),
        default=None,
        help="side of a ViT's patches in pixels; 8 is better and about 5 times slower; for 32 px images use 4 "
        f"(default: {PATCH_SIZE}, or that of --init_from)",
    )
    parser.add_argument(
        "--drop_path_rate",
        type=Number(float, least=0, below=1),
        default=None,
        help=f"stochastic depth; lower it for short runs (default: {VIT_DROP_PATH_RATE} for the ViTs, else 0)",
    )
    parser.add_argument(
        "--width",
        type=positive(int),
        default=None,
        help=f"channels of resnet8 (default: {RESNET8_WIDTH}; the paper's CIFAR-100 runs: 256)",
    )
    parser.add_argument(
        "--grad_checkpointing",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="recompute activations in the backward pass: much less memory for about a third more time",
    )


def resolve_backbone_defaults(args: argparse.Namespace) -> argparse.Namespace:
    """Fills in, in place, --arch and --patch_size that were not given, unless the file of --init_from will tell them;
    returns args."""
    if args.init_from is None:
        args.arch = ARCH if args.arch is None else args.arch
        args.patch_size = PATCH_SIZE if args.patch_size is None else args.patch_size
    return args


def new_backbone(args: argparse.Namespace) -> nn.Module:
    """The backbone that the flags of a training tell, with random weights."""
    return build_backbone(
        args.arch,
        args.img_size,
        args.patch_size,
        args.in_chans,
        args.drop_path_rate,
        args.width,
        args.grad_checkpointing,
        args.num_heads,
    )


def check_crop_sizes(args, backbone):
    """A ViT takes sizes that its patches divide, others have rules of their own: try one image of each size."""
    sizes = {"img_size": args.img_size}
    if args.local_crops_number:
        sizes["local_crops_size"] = args.local_crops_size
    backbone.eval()
    for flag, size in sizes.items():
        try:
            with torch.no_grad():
                backbone(torch.zeros(1, args.in_chans, size, size))
        except (AssertionError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"--{flag} {size}: --arch {args.arch} cannot take such images: {reason}") from None
    backbone.train()


def lay_out(model: nn.Module, device: torch.device) -> torch.memory_format:
    """Channels last, in place, for convolutional backbones: those with a convolution whose windows do not lie side by
    side, as a ViT's do. Returns how views should lie in memory. The model may hold copies of its backbone, a teacher's.

    CUDA: cuDNN then also tries its kernels at the first step, as sizes do not change.
    CPU: forward and backward take 0.71 of the CPU time (resnet8 of width 64, 256 images of 32 px, bf16), of resnet18
    0.89; features alone 0.71 and 0.95 (python -m benchmarks.layouts). A backbone with grouped convolutions stays as it
    is there: in bf16 efficientnet_b0 would take 1.11.
    """
    convolutions = [part for part in model.modules() if isinstance(part, nn.Conv2d)]
    is_convolutional = any(part.kernel_size != part.stride for part in convolutions)
    if not is_convolutional or (device.type == "cpu" and any(part.groups > 1 for part in convolutions)):
        return torch.contiguous_format
    torch.backends.cudnn.benchmark |= device.type == "cuda"
    model.to(memory_format=torch.channels_last)
    return torch.channels_last


def compile_backbone(backbone: nn.Module, try_it: Callable[[], None]) -> str:
    """torch.compile, in place: of each block where the backbone is a row of blocks of one class, so that what is
    compiled for one serves all; else of the whole. Names of parameters stay.

    try_it: takes the backbone through a forward and a backward pass on images of the sizes that will come.
    Returns how, in words. Where that fails on some process, say for want of a compiler, the backbone is on all of them
    as it was, and the words say why.
    """
    blocks = getattr(backbone, "blocks", None)
    kinds = set(map(type, blocks)) if isinstance(blocks, nn.Sequential) else set()
    in_a_row = len(kinds) == 1 and nn.Sequential not in kinds  # a stage of blocks is unlike the next
    parts = list(blocks) if in_a_row else [backbone]
    # stochastic depth differs from block to block: above torch's own limit of 8 forms blocks would stay as they are
    torch._dynamo.config.recompile_limit = 64
    for part in parts:
        part.compile(dynamic=None if in_a_row else False)  # torch 2.14 fails on a ConvNeXt for any size at once
    failure = failure_of(try_it, backbone)
    if all_gather_rows(torch.tensor([failure is None])).all():
        return "compiled block by block" if in_a_row else "compiled"
    for part in parts:
        part._compiled_call_impl = None  # torch has no public way back
    return f"not compiled, and slower: {failure or 'another process cannot'}"


def failure_of(try_it, backbone):
    """None where it works, else why not, in a line; the backbone's gradients and buffers stay as they were."""
    buffers = [buffer.clone() for buffer in backbone.buffers()]
    try:
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
            try_it()
    except Exception as error:
        return one_line(f"{type(error).__name__}: {error}")
    finally:
        backbone.zero_grad()
        for buffer, before in zip(backbone.buffers(), buffers, strict=True):  # batch norm's
            buffer.data.copy_(before)


def build_backbone(
    arch: str,
    img_size: int = 224,
    patch_size: int = 16,
    in_chans: int = 3,
    drop_path_rate: float | None = 0.0,
    width: int | None = None,
    grad_checkpointing: bool = False,
    num_heads: int | None = None,
    **parts: object,
) -> nn.Module:
    """A randomly initialised backbone whose forward maps images (B, in_chans, img_size, img_size) to (B, embed_dim).

    arch: one of `ARCHS`, or any timm model name. `resnet18` is the CIFAR variant below, not timm's.
    img_size: pixels; ViTs take other multiples of patch_size too, with interpolated position embeddings.
    patch_size: pixels; read by the ViTs of `ARCHS` only, a timm name holds its own.
    drop_path_rate: stochastic depth in [0, 1); None means 0.1 for the ViTs of `ARCHS` and 0 for the others.
    width: channels of resnet8, its embed_dim; None means 128.
    grad_checkpointing: recompute activations in the backward pass.
    num_heads: attention heads of a ViT; None means the number that goes with its name.
    parts: other arguments of a ViT's constructor, see `vision_transformer.VisionTransformer`.
    Raises UserError for an unknown name (with the close ones) and for a setting that the backbone has no use for.
    """
    if drop_path_rate is None:
        drop_path_rate = VIT_DROP_PATH_RATE if arch in vision_transformer.ARCHS else 0.0
    if not 0 <= drop_path_rate < 1:
        raise UserError(f"--drop_path_rate {drop_path_rate} is not in [0, 1)")
    if width is not None and arch != "resnet8":
        raise UserError(f"--width {width} is for --arch resnet8; {arch} has its own")
    if width is not None and width < 1:
        raise UserError(f"--width {width} is not a number of channels")
    if num_heads is not None:
        parts["num_heads"] = num_heads
    if arch in vision_transformer.ARCHS:
        return _build_vit(arch, img_size, patch_size, in_chans, drop_path_rate, grad_checkpointing, parts)
    if arch in ("resnet8", "resnet18"):
        if parts:
            raise UserError(f"--{', --'.join(parts)}: {arch} is no ViT")
        if drop_path_rate:
            raise UserError(f"--drop_path_rate {drop_path_rate}: {arch} has no stochastic depth, leave it at 0")
        if grad_checkpointing:
            raise UserError(f"--grad_checkpointing: {arch} does not offer it")
        return ResNet8(in_chans, width or RESNET8_WIDTH) if arch == "resnet8" else resnet18(in_chans)
    return _build_timm(arch, img_size, in_chans, drop_path_rate, grad_checkpointing, parts)


def _build_vit(arch, img_size, patch_size, in_chans, drop_path_rate, grad_checkpointing, parts):
    if patch_size < 1 or img_size % patch_size:
        raise UserError(f"--img_size {img_size} is not a multiple of --patch_size {patch_size}")
    width = vision_transformer.WIDTHS[arch]
    if width % parts.get("num_heads", 1):
        raise UserError(f"--num_heads {parts['num_heads']} does not divide the width of {arch}, {width}")
    return getattr(vision_transformer, arch)(
        patch_size=patch_size,
        img_size=img_size,
        in_chans=in_chans,
        drop_path_rate=drop_path_rate,
        grad_checkpointing=grad_checkpointing,
        **parts,
    )


class ResNet8(nn.Module):
    """The paper's ResNet-8 (Table 5 of arXiv 2410.04959): four residual blocks of two 3x3 convolutions, no batch norm.

    in_chans -> F at half the resolution; F -> F at a quarter; twice F -> F; mean over all pixels. Every convolution
    has stride 1, padding 1 and a bias. embed_dim = F. 1 037 184 parameters at F = 128 and 3 channels.

    The table lists layers, not how they are wired. Chosen, after the SNGAN discriminator (Miyato et al. 2018), whose
    layers these are: the 1x1 convolution of the first block is its shortcut, on the average-pooled image; the other
    shortcuts have no parameters, and the second block's is average-pooled as its main path is. The table prints no
    activation before the final pooling (SNGAN has one), so there is none. Initialisation is PyTorch's.
    """

    def __init__(self, in_chans: int = 3, width: int = RESNET8_WIDTH):
        super().__init__()
        self.embed_dim = width
        self.block1 = ImageBlock(in_chans, width)
        self.block2 = ResidualBlock(width, pool=True)
        self.block3 = ResidualBlock(width)
        self.block4 = ResidualBlock(width)

    def forward(self, x):
        """Images (B, C, h, w), h and w at least 4, -> (B, F)."""
        x = self.block2(self.block1(x))  # (B, F, h/4, w/4)
        return self.block4(self.block3(x)).mean(dim=(2, 3))


class ImageBlock(nn.Module):
    """The first block: no activation before its first convolution, which reads pixels."""

    def __init__(self, in_chans, width):
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.shortcut = nn.Conv2d(in_chans, width, 1)

    def forward(self, x):
        main = self.conv2(F.leaky_relu(self.conv1(x), 0.2))
        return F.avg_pool2d(main, 2) + self.shortcut(F.avg_pool2d(x, 2))


class ResidualBlock(nn.Module):
    """Two convolutions, each after its activation, beside an identity; both average-pooled by 2 where `pool` is set."""

    def __init__(self, width, pool=False):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.pool = pool

    def forward(self, x):
        x = x + self.conv2(F.leaky_relu(self.conv1(F.leaky_relu(x, 0.2)), 0.2))
        return F.avg_pool2d(x, 2) if self.pool else x


def resnet18(in_chans: int = 3) -> nn.Module:
    """ResNet-18 for small images: torchvision's, its stem one 3x3 convolution of stride 1, no max pooling; D = 512."""
    model = torchvision.models.resnet18(weights=None)
    model.conv1 = nn.Conv2d(in_chans, 64, kernel_size=3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")  # as torchvision's other layers
    model.maxpool = nn.Identity()
    model.embed_dim = model.fc.in_features
    model.fc = nn.Identity()
    return model


def _build_timm(arch, img_size, in_chans, drop_path_rate, grad_checkpointing, parts):
    if not timm.is_model(arch):
        raise UserError(f"--arch {arch} is unknown; {_close_names(arch)}, or a name that timm.list_models() prints")
    model = _create_timm(arch, img_size, in_chans, drop_path_rate, parts)
    if drop_path_rate and not any(getattr(module, "drop_prob", None) for module in model.modules()):
        raise UserError(f"--drop_path_rate {drop_path_rate}: {arch} has no stochastic depth, leave it at 0")
    if grad_checkpointing:
        _enable_grad_checkpointing(model, arch)
    model.embed_dim = getattr(model, "head_hidden_size", model.num_features)  # width after the model's own pooling
    return model


def _create_timm(arch, img_size, in_chans, drop_path_rate, parts):
    if "norm_eps" in parts:
        parts = parts | {"norm_layer": functools.partial(nn.LayerNorm, eps=parts["norm_eps"]), "norm_eps": None}
    required = {"in_chans": in_chans, "drop_path_rate": drop_path_rate or None, **parts}  # timm drops what is None
    optional = {"img_size": img_size, "dynamic_img_size": True}  # only its constructor knows whether it takes them
    while True:
        try:
            return timm.create_model(arch, pretrained=False, num_classes=0, **required, **optional)
        except TypeError as error:
            refused = re.search(r"unexpected keyword argument '(\w+)'", str(error))
            if refused and refused[1] in optional:
                del optional[refused[1]]
            elif refused and refused[1] in required:
                raise UserError(f"--{refused[1]} {required[refused[1]]}: {arch} does not take it") from error
            else:
                raise
        except AssertionError as error:
            raise UserError(f"{arch} cannot be built for --img_size {img_size}: {error}") from error


def _enable_grad_checkpointing(model, arch):
    try:
        model.set_grad_checkpointing(True)
    except (AttributeError, AssertionError) as error:  # timm's ways of saying that a model has none
        raise UserError(f"--grad_checkpointing: {arch} does not offer it") from error


def _close_names(arch):
    names = [*ARCHS, *timm.list_models()]
    close = difflib.get_close_matches(arch, names, n=4, cutoff=0.6)
    return f"close: {', '.join(close)}" if close else f"ours: {', '.join(ARCHS)}"
