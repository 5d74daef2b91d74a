"""From any checkpoint file to a frozen model.

    model = load_pretrained("runs/checkpoint.pth")            # ours, DINO's, or a bare state dict of DINO's or timm's
    features = model(images)                                  # (B, D); model.assign(images): codes (B,), or None

The file says what it holds: our checkpoints and DINO's carry their settings, timm's safetensors have a config.json
beside them, for a bare ViT they are read off the tensors' shapes. Nothing is downloaded, nothing in a file is executed,
and every tensor must find its place.

Shapes: B images per batch, D backbone width, K codes.
"""

import argparse
import json
import math
import os
import re
import reprlib
import sys
from pathlib import Path

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

import utils
from backbones import build_backbone
from checkpoint import load_checkpoint
from cplearn_head import ACTIVATIONS, CPLearnHead
from utils import PRECISIONS, UserError, choose_precision
from vision_transformer import VisionTransformer

FROM_CHECKPOINT = ("img_size", "in_chans", "mean", "std")  # what evaluations take over from the file


def add_checkpoint_arguments(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """Adds the flags that name a model, or, with `several`, the models to compare."""
    parser.add_argument(
        "--checkpoint",
        "--pretrained_weights",
        dest="checkpoint",
        required=True,
        metavar="FILE",
        nargs="+" if several else None,
        help="our checkpoint.pth, DINO's, or a backbone's state dict (.pth or .safetensors) of DINO's or timm's"
        + ("; several are compared in one table. FILE:KEY names the --checkpoint_key of one" if several else ""),
    )
    parser.add_argument(
        "--checkpoint_key",
        default=None,
        metavar="KEY",
        help="which of the models in the file, such as teacher or student (default: teacher, or the only one there is)",
    )
    parser.add_argument("--arch", default=None, metavar="NAME", help="backbone (default: as the file says)")
    parser.add_argument("--patch_size", type=int, default=None, help="pixels (default: as the file says)")
    parser.add_argument(
        "--device", default="auto", choices=("auto", "cuda", "mps", "cpu"), help="default: cuda, else mps, else cpu"
    )
    parser.add_argument(
        "--precision",
        default="fp32",
        choices=("auto", *PRECISIONS),
        help="of the backbone's forward pass. auto: bf16 where the hardware has it, which changes scores by about 0.1 "
        "point (default: fp32)",
    )


def open_model(args: argparse.Namespace, device: torch.device) -> "PretrainedModel":
    """The model that an evaluation's flags name, on `device`.

    Flags about images that were not given (`FROM_CHECKPOINT`) are set in `args` to what the checkpoint was trained
    with, where it says so; what is still open is for `data.resolve_dataset_defaults`.
    """
    args.precision = choose_precision(args.precision, device)
    given = {name: getattr(args, name, None) for name in ("arch", "patch_size", "img_size", "in_chans")}
    model = load_pretrained(args.checkpoint, args.checkpoint_key, **given)
    for name in FROM_CHECKPOINT:
        if hasattr(args, name) and getattr(args, name) is None:
            setattr(args, name, model.settings[name])
    return model.to(device)


def choose_dataset(args: argparse.Namespace, models: list["PretrainedModel"]) -> str:
    """The data set that args.dataset names; else the one that the models were trained on, as far as they say; else, as
    in DINO, whose files do not, the image folder args.data_path. Raises UserError where that is not one data set."""
    said = {model.settings["dataset"] for model in models} - {None}
    if args.dataset is not None:
        return args.dataset
    if len(said) > 1:
        names = ", ".join(sorted(said))
        raise UserError(f"the checkpoints were trained on different data sets, {names}: name one with --dataset")
    if not said and args.data_path is None:
        files = args.checkpoint if isinstance(args.checkpoint, str) else ", ".join(args.checkpoint)
        raise UserError(f"{files} does not say what it was trained on; name the images with --data_path")
    return said.pop() if said else "imagefolder"


# ---- a file -> a model -----------------------------------------------------------------------------------------------


def load_pretrained(
    path, checkpoint_key=None, arch=None, patch_size=None, img_size=None, in_chans=None, random_weights=False
):
    """The frozen model in a file: a `PretrainedModel` on CPU, in eval mode.

    path: a file of one of these kinds; a folder, a URL or a model's name is refused, and nothing is ever downloaded.
        Ours, written by main_cplearn.py.   DINO's training checkpoint.   {name: state dict}, as MoCo and MAE save.
        A flat state dict, with or without the prefixes `module.` and `backbone.`, as .pth or .safetensors; timm's
        config.json in the same folder is read for the backbone's name, mean and std.
    checkpoint_key: which state dict of a file that holds several; by default `teacher`, or the only one.
    arch, patch_size, in_chans: by default what the file says, or what the tensors' shapes say of a ViT.
    img_size: side in pixels of the images to come, not of those in training. A ViT's position embedding keeps the
        size it has in the file and is interpolated where the images differ.
    random_weights: leave the backbone as torch's generator made it, without a head: the baseline of any evaluation.
    Raises UserError, in one line, where the file cannot be read, holds no such key, or holds tensors that are too many,
    too few or of another shape than the backbone's; the message says how many of how many fit.
    """
    try:
        return _load(path, checkpoint_key, arch, patch_size, img_size, in_chans, random_weights)
    except UserError as error:
        raise error if str(path) in str(error) else UserError(f"{path}: {error}") from None
    except (ArithmeticError, LookupError, MemoryError, RuntimeError, TypeError, ValueError) as error:
        # the file's numbers go into constructors that check little
        reason = utils.one_line(error) or type(error).__name__
        raise UserError(f"{path}: its settings and tensors do not fit together: {reason}") from error


def _load(path, checkpoint_key, arch, patch_size, img_size, in_chans, random_weights):
    checkpoint = _read(path)
    state, checkpoint_key = _choose_state(checkpoint, checkpoint_key, path)
    backbone_state, head_state = _split_state(state)
    shapes = _vit_settings(backbone_state)
    saved = _saved_settings(checkpoint, path)
    given = {"arch": arch, "patch_size": patch_size, "img_size": img_size, "in_chans": in_chans}
    is_our_vit = "cls_token" in backbone_state and all(map(VIT_PARTS.fullmatch, backbone_state))
    settings = _first_known(given, shapes if is_our_vit else {}, saved, shapes)
    if settings["arch"] is None:
        raise UserError(f"{path}: neither its settings nor its shapes tell the backbone; name it with --arch")

    with torch.device("meta"):  # takes no memory: a small file may name a large backbone
        skeleton = _build(settings, shapes, backbone_state)
    settings["patch_size"] = _patch_size(skeleton)
    _check_img_size(settings)
    if random_weights:
        return PretrainedModel(_build(settings, shapes, backbone_state), None, settings)
    _drop_classifier(skeleton, backbone_state, path)
    _check_fits(skeleton, backbone_state, f"{path}: {settings['arch']}")
    backbone = _build(settings, shapes, backbone_state)
    backbone.load_state_dict(backbone_state)
    head = _build_head(backbone.embed_dim, head_state, saved.get("activation"), path)
    settings |= {
        "checkpoint_key": checkpoint_key,
        "epoch": checkpoint.get("epoch") if isinstance(checkpoint.get("epoch"), int) else None,
    }
    return PretrainedModel(backbone, head, settings)


class PretrainedModel(nn.Module):
    """A frozen backbone, and its head where the file has CPLearn's or DINO's.

    .embed_dim: D.  .settings: dict with arch, img_size, patch_size, in_chans, mean, std, dataset, beta, prior,
    checkpoint_key and epoch; None where the file does not say.
    """

    def __init__(self, backbone, head=None, settings=None):
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.settings = settings or {}
        self.embed_dim = backbone.embed_dim
        self.eval().requires_grad_(False)

    def forward(self, images):
        """Images (B, C, h, w), normalised as in training -> features (B, D)."""
        return self.backbone(images)

    def assign(self, images):
        """Images (B, C, h, w) -> the code of each (B,) int64, or None without a head."""
        return self.assign_features(self(images))

    def assign_features(self, features):
        """Features (B, D) -> the code of each (B,) int64 (of DINO's head: the prototype), or None without a head."""
        return None if self.head is None else self.head.assign(features)

    def with_last_blocks(self, n_last_blocks=1, avgpool_patchtokens=False):
        """The model whose features are those of DINO's linear probe, see `LastBlocks`; without the head."""
        chosen = {"n_last_blocks": n_last_blocks, "avgpool_patchtokens": avgpool_patchtokens}
        return PretrainedModel(LastBlocks(self.backbone, **chosen), settings=self.settings | chosen)


class LastBlocks(nn.Module):
    """CLS tokens of a ViT's last n blocks, oldest first, each through the final norm: (B, n D).

    avgpool_patchtokens: the mean of the last block's patch tokens beside them: (B, n D + D). With n = 1 the two are
    interleaved (c0, p0, c1, p1, ...), the order of the linear heads that DINO released.
    Raises UserError for other backbones, which have one feature (n = 1, no average), and for n outside [1, depth].
    """

    def __init__(self, backbone, n_last_blocks=1, avgpool_patchtokens=False):
        super().__init__()
        self.backbone, self.n_last_blocks, self.avgpool_patchtokens = backbone, n_last_blocks, avgpool_patchtokens
        self.embed_dim = backbone.embed_dim * (n_last_blocks + avgpool_patchtokens)
        self.plain = (n_last_blocks, avgpool_patchtokens) == (1, False)
        if not self.plain and not isinstance(backbone, VisionTransformer):
            raise UserError(
                "--n_last_blocks and --avgpool_patchtokens are for ViTs; this backbone has one feature: use "
                "--n_last_blocks 1 --no-avgpool_patchtokens"
            )
        if not self.plain and not 1 <= n_last_blocks <= len(backbone.blocks):
            raise UserError(f"--n_last_blocks {n_last_blocks}: expected from 1 to {len(backbone.blocks)}, the blocks")

    def forward(self, images):
        if self.plain:
            return self.backbone(images)
        blocks = self.backbone.get_intermediate_layers(images, self.n_last_blocks)  # n x (B, 1 + patches, D)
        cls_tokens = torch.cat([tokens[:, 0] for tokens in blocks], dim=1)  # (B, n D)
        if not self.avgpool_patchtokens:
            return cls_tokens
        patch_mean = blocks[-1][:, 1:].mean(dim=1)  # (B, D)
        if self.n_last_blocks == 1:
            return torch.stack([cls_tokens, patch_mean], dim=2).flatten(1)
        return torch.cat([cls_tokens, patch_mean], dim=1)


class DINOHead(nn.Module):
    """DINO's projection head for features of width `in_dim`, of the sizes that a state dict has.

    Linear layers with GELU between (and batch norm, where it was trained with), unit length, then the cosine with each
    of K prototypes times its gain. Source: Caron et al. 2021, arXiv 2104.14294, in evaluation mode.
    """

    def __init__(self, in_dim, state):
        super().__init__()
        norms, layers = "mlp.1.running_mean" in state, []
        for weight in _matrices("mlp.", state):
            layers += [nn.Linear(in_dim, len(weight)), *([nn.BatchNorm1d(len(weight))] * norms), nn.GELU()]
            in_dim = len(weight)
        del layers[-2 if norms else -1 :]  # nothing follows the last linear layer
        self.mlp = nn.Sequential(*layers) if "mlp.weight" not in state else layers[0]
        self.last_layer = nn.Module()
        num_prototypes = len(state["last_layer.weight_v"])
        self.last_layer.weight_g = nn.Parameter(torch.empty(num_prototypes, 1))
        self.last_layer.weight_v = nn.Parameter(torch.empty(num_prototypes, in_dim))

    def forward(self, x):
        """Backbone features (B, D) -> logits (B, K)."""
        prototypes = F.normalize(self.last_layer.weight_v, dim=1) * self.last_layer.weight_g
        return F.normalize(self.mlp(x), dim=1) @ prototypes.T

    @torch.no_grad()
    def assign(self, x):
        """Backbone features (B, D) -> the prototype of each (B,) int64."""
        return self(x).argmax(dim=1)


def _read(path):
    if os.path.isdir(path):
        raise UserError(f"{path} is a folder; expected a file, such as {os.path.join(path, 'checkpoint.pth')}")
    if not str(path).endswith(".safetensors"):
        checkpoint = load_checkpoint(path)
    elif not os.path.isfile(path):
        raise UserError(f"{path}: no such file; expected a checkpoint (nothing is ever downloaded)")
    else:
        try:
            checkpoint = safetensors.torch.load_file(path)
        except safetensors.SafetensorError as error:
            raise UserError(f"{path}: cannot be read ({error})") from error
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path}: holds a {type(checkpoint).__name__}, expected a dict of tensors")
    return checkpoint


def _choose_state(checkpoint, key, path):
    """The state dict to load, and the key it was found under (None for a flat file)."""
    if _is_state(checkpoint):
        if key is not None:
            raise UserError(
                f"{path}: --checkpoint_key {key}: the file is one flat state dict without keys; leave it out"
            )
        return checkpoint, None
    keys = [name for name, value in checkpoint.items() if _is_state(value)]
    if not keys:
        raise UserError(f"{path}: holds no state dict; its keys: {_listed([str(name) for name in checkpoint])}")
    if key is None:
        key = "teacher" if "teacher" in keys or len(keys) != 1 else keys[0]
    if key not in keys:
        raise UserError(f"{path}: no state dict under --checkpoint_key {key}; the file has: {_listed(keys)}")
    return checkpoint[key], key


def _is_state(value):
    """Whether this is a module's state dict; DINO's {"center": tensor} is not."""
    if not isinstance(value, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in value.values()):
        return False
    return any(str(name).endswith("weight") for name in value)


def _split_state(state):
    """State dict -> (backbone's, head's), without prefixes; a file without `backbone.` is a backbone throughout."""
    state = {re.sub(r"^((module|_orig_mod)\.)+", "", str(name)): tensor for name, tensor in state.items()}
    backbone = _below("backbone.", state)
    return (backbone, _below("head.", state)) if backbone else (state, {})


def _below(prefix, state):
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _saved_settings(checkpoint, path):
    """What the file says: its `args` (a dict in ours, an argparse.Namespace in DINO's), or timm's config.json."""
    args = _timm_config(path) if str(path).endswith(".safetensors") else checkpoint.get("args", {})
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    args = args if isinstance(args, dict) else {}
    for name, (is_plausible, expected) in PLAUSIBLE.items():
        if args.get(name) is not None and not is_plausible(args[name]):
            raise UserError(f"{path}: its {name} is {reprlib.repr(args[name])}, expected {expected}")
    return args


def _is_side(value):
    return type(value) is int and 0 < value < 2**15


def _are_numbers(values):
    return isinstance(values, list | tuple) and all(type(v) in (int, float) and math.isfinite(v) for v in values)


# what a file may say of itself
PLAUSIBLE = {
    "arch": (lambda value: isinstance(value, str), "a name"),
    "dataset": (lambda value: isinstance(value, str), "a name"),
    "activation": (lambda value: value in ACTIVATIONS, f"one of {ACTIVATIONS}"),
    "patch_size": (_is_side, "pixels"),
    "img_size": (_is_side, "pixels"),
    "in_chans": (_is_side, "a number of channels"),
    "mean": (_are_numbers, "a number per channel"),
    "std": (_are_numbers, "a number per channel"),
}


def _timm_config(path):
    """The config.json beside a safetensors file, under our names; empty without one. `dataset` is export_backbone's."""
    config = Path(path).with_name("config.json")
    if not config.is_file():
        return {}
    try:
        content = json.loads(config.read_text())
        images = content.get("pretrained_cfg", {})
        size = images.get("input_size", (None, None))
        return {"arch": content.get("architecture"), "mean": images.get("mean"), "std": images.get("std"),
                "in_chans": size[0], "img_size": size[-1], "dataset": content.get("dataset")}  # fmt: skip
    except (OSError, ValueError, AttributeError, LookupError, TypeError, RecursionError) as error:
        raise UserError(f"{config}: not a config.json as timm writes it ({error})") from error


VIT_PARTS = re.compile(  # of DINO's ViTs and ours; timm has ViTs with more
    r"cls_token|pos_embed|patch_embed\.proj\.\w+|norm\.\w+|head\.\w+"
    r"|blocks\.\d+\.(norm[12]|attn\.(qkv|proj)|mlp\.fc[12])\.\w+"
)


def _vit_settings(state):
    """What the shapes of a ViT's tensors say; empty for any other backbone."""
    patches, positions = state.get("patch_embed.proj.weight"), state.get("pos_embed")
    if patches is None or positions is None or (patches.ndim, positions.ndim) != (4, 3):
        return {}
    embed_dim, in_chans, patch_size, _ = patches.shape
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    archs = {(192, 12): "vit_tiny", (384, 12): "vit_small", (768, 12): "vit_base", (1024, 24): "vit_large"}
    grid = math.isqrt(positions.shape[1])  # of patches; the few other tokens make no whole row more
    return {
        "arch": archs.get((embed_dim, depth)),
        "img_size": grid * patch_size,
        "patch_size": patch_size,
        "in_chans": in_chans,
    }


def _first_known(given, certain, saved, shapes):
    """Settings by the first source that has them. Shapes give our name to a ViT of many names (deit_small,
    vit_small_patch16_224); they do not tell the size of images, only that of the position embedding."""
    names = ("arch", "patch_size", "in_chans", "img_size", "mean", "std", "dataset", "beta", "prior")
    sources = (given, {k: v for k, v in certain.items() if k != "img_size"}, saved, shapes)
    return {name: next((s[name] for s in sources if s.get(name) is not None), None) for name in names}


def _build(settings, shapes, state):
    first = state.get("block1.conv1.weight")  # resnet8: its width is that of its first convolution
    known = {
        "img_size": shapes.get("img_size") or settings["img_size"],  # the position embedding's own size
        "patch_size": settings["patch_size"],
        "in_chans": settings["in_chans"],
        "width": len(first) if settings["arch"] == "resnet8" and first is not None else None,
    }
    return build_backbone(settings["arch"], **{name: value for name, value in known.items() if value is not None})


def _patch_size(backbone):
    """Pixels, or None for a backbone without patches (DINO's files name a patch size beside a ResNet too)."""
    patch_embed = getattr(backbone, "patch_embed", None)  # timm's name, and so ours
    patch_size = getattr(patch_embed, "patch_size", None)
    return patch_size[0] if isinstance(patch_size, tuple) else patch_size


def _check_img_size(settings):
    img_size, patch_size = settings["img_size"], settings["patch_size"]
    if img_size is not None and patch_size is not None and img_size % patch_size:
        raise UserError(f"--img_size {img_size} is not a multiple of the model's patch size {patch_size}")


def _drop_classifier(backbone, state, path):
    """Removes a linear classifier on the features, in place; our backbones end before it."""
    own = backbone.state_dict()
    for name in ("head", "head.fc", "fc", "classifier"):  # timm's and torchvision's names for it
        weight = state.get(f"{name}.weight")
        if weight is not None and f"{name}.weight" not in own and weight.shape[1:] == (backbone.embed_dim,):
            del state[f"{name}.weight"]
            state.pop(f"{name}.bias", None)
            if utils.rank() == 0:
                print(f"{path}: left out its classifier {name} ({len(weight)} classes)", file=sys.stderr)


def _matrices(prefix, state):
    """The weights of linear layers below a prefix, in the order of their numbers."""
    found = {name: tensor for name, tensor in state.items() if name.startswith(prefix) and name.endswith("weight")}
    ordered = sorted(found, key=lambda name: [int(number) for number in re.findall(r"\d+", name)])
    return [found[name] for name in ordered if found[name].ndim == 2]


def _check_fits(module, state, what):
    own = module.state_dict()
    missing = [name for name in own if name not in state]
    unexpected = [name for name in state if name not in own]
    misshaped = [name for name in own if name in state and own[name].shape != state[name].shape]
    if missing or unexpected or misshaped:
        matched = len(own) - len(missing) - len(misshaped)
        shapes = [f"{name} {_shape(state[name])} instead of {_shape(own[name])}" for name in misshaped]
        problems = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
        details = "; ".join(f"{kind}: {_listed(names)}" for kind, names in problems.items() if names)
        raise UserError(
            f"{what}: {matched} of {len(own)} tensors match, so nothing was loaded; {details}; "
            "look at --checkpoint_key, --arch and --patch_size"
        )


def _shape(tensor):
    return "x".join(map(str, tensor.shape)) or "scalar"


def _listed(names, most=8):
    more = f" and {len(names) - most} more, {len(names)} in all" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _load_strictly(module, state, what):
    _check_fits(module, state, what)
    module.load_state_dict(state)


def _build_head(in_dim, state, activation, path):
    """CPLearn's head, DINO's, or None: for a bare backbone, or one trained with another method's head."""
    if activation is not None and {"linear.weight", "seed", "scale"} <= state.keys():
        head = CPLearnHead.from_state_dict(in_dim, state, activation)
    elif {"last_layer.weight_g", "last_layer.weight_v"} <= state.keys():
        head = DINOHead(in_dim, state)
    else:
        return None
    _load_strictly(head, state, f"{path}: {type(head).__name__}")
    return head.eval()
