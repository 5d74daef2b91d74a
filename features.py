"""From a checkpoint file to a frozen model, and from a frozen model to a feature matrix.

    model = load_pretrained("runs/checkpoint.pth")            # ours, DINO's, or a bare state dict of DINO's or timm's
    features, codes = extract_features(model, batches, num_samples, device)      # (N, D) float32, (N,) int64 or None

The file says what it holds: our checkpoints and DINO's carry their settings, for a bare ViT they are read off the
tensors' shapes. Nothing is downloaded, nothing in a file is executed, and every tensor must find its place.

Shapes: B images per batch, N images in all, D backbone width, K codes.
"""

import argparse
import math
import os
import re
import sys

import safetensors
import safetensors.torch
import torch
import torch.distributed as dist
from torch import nn

import utils
from backbones import build_backbone
from cplearn_head import CPLearnHead
from utils import UserError

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
FROM_CHECKPOINT = ("dataset", "img_size", "in_chans", "mean", "std")  # what evaluations take over from the file


def add_checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags with which every evaluation names a model."""
    parser.add_argument(
        "--checkpoint",
        "--pretrained_weights",
        dest="checkpoint",
        required=True,
        metavar="FILE",
        help="our checkpoint.pth, DINO's, or a backbone's state dict (.pth or .safetensors) of DINO's or timm's",
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
    if getattr(args, "dataset", "") is None:
        raise UserError(f"{args.checkpoint} does not say what it was trained on; name the images with --dataset")
    return model.to(device)


def choose_precision(precision, device):
    """ "auto" becomes bf16 where the device multiplies it in hardware, else fp32; other names stay."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported() else "fp32"


# ---- a file -> a model -----------------------------------------------------------------------------------------------


def load_pretrained(
    path, checkpoint_key=None, arch=None, patch_size=None, img_size=None, in_chans=None, random_weights=False
):
    """The frozen model in a file: a `PretrainedModel` on CPU, in eval mode.

    path: a file of one of these kinds; a folder, a URL or a model's name is refused, and nothing is ever downloaded.
        Ours, written by main_cplearn.py.   DINO's training checkpoint.   {name: state dict}, as MoCo and MAE save.
        A flat state dict, with or without the prefixes `module.` and `backbone.`, as .pth or .safetensors.
    checkpoint_key: which state dict of a file that holds several; by default `teacher`, or the only one.
    arch, patch_size, in_chans: by default what the file says, or what the tensors' shapes say of a ViT.
    img_size: side in pixels of the images to come, not of those in training. A ViT's position embedding keeps the
        size it has in the file and is interpolated where the images differ.
    random_weights: leave the backbone as torch's generator made it, without a head: the baseline of any evaluation.
    Raises UserError, in one line, where the file cannot be read, holds no such key, or holds tensors that are too many,
    too few or of another shape than the backbone's; the message says how many of how many fit.
    """
    checkpoint = _read(path)
    state, checkpoint_key = _choose_state(checkpoint, checkpoint_key, path)
    backbone_state, head_state = _split_state(state)
    shapes = _vit_settings(backbone_state)
    saved = _saved_settings(checkpoint)
    given = {"arch": arch, "patch_size": patch_size, "img_size": img_size, "in_chans": in_chans}
    settings = _first_known(given, saved, shapes)
    if settings["arch"] is None:
        raise UserError(f"{path}: neither its settings nor its shapes tell the backbone; name it with --arch")

    backbone = _build(settings, shapes, backbone_state)
    settings["patch_size"] = _patch_size(backbone)
    _check_img_size(settings)
    if random_weights:
        return PretrainedModel(backbone, None, settings)
    _drop_classifier(backbone, backbone_state, path)
    _load_strictly(backbone, backbone_state, f"{path}: {settings['arch']}")
    head = _build_head(backbone.embed_dim, head_state, saved["activation"], path)
    settings |= {
        "checkpoint_key": checkpoint_key,
        "epoch": checkpoint.get("epoch") if isinstance(checkpoint.get("epoch"), int) else None,
    }
    return PretrainedModel(backbone, head, settings)


class PretrainedModel(nn.Module):
    """A frozen backbone, and CPLearn's head where the file has one.

    .embed_dim: D.  .settings: dict with arch, img_size, patch_size, in_chans, mean, std, dataset, checkpoint_key and
    epoch; None where the file does not say.
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
        """Images (B, C, h, w) -> the code of each (B,) int64, or None without CPLearn's head."""
        return self.assign_features(self(images))

    def assign_features(self, features):
        """Features (B, D) -> the code of each (B,) int64, or None without CPLearn's head."""
        return None if self.head is None else self.head.assign(features)


def _read(path):
    if os.path.isdir(path):
        raise UserError(f"{path} is a folder; expected a file, such as {os.path.join(path, 'checkpoint.pth')}")
    if not str(path).endswith(".safetensors"):
        checkpoint = utils.load_checkpoint(path)
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
    state = {re.sub(r"^((module|_orig_mod)\.)+", "", name): tensor for name, tensor in state.items()}
    backbone = _below("backbone.", state)
    return (backbone, _below("head.", state)) if backbone else (state, {})


def _below(prefix, state):
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _saved_settings(checkpoint):
    """What the file's `args` say (a dict in ours, an argparse.Namespace in DINO's), None where they do not."""
    args = checkpoint.get("args", {})
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    args = args if isinstance(args, dict) else {}
    names = ("arch", "img_size", "patch_size", "in_chans", "mean", "std", "dataset", "activation")
    return {name: args.get(name) for name in names}


def _vit_settings(state):
    """What the shapes of a ViT's tensors say; empty for any other backbone."""
    patches, positions = state.get("patch_embed.proj.weight"), state.get("pos_embed")
    if "cls_token" not in state or patches is None or positions is None or (patches.ndim, positions.ndim) != (4, 3):
        return {}
    embed_dim, in_chans, patch_size, _ = patches.shape
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    archs = {(192, 12): "vit_tiny", (384, 12): "vit_small", (768, 12): "vit_base", (1024, 24): "vit_large"}
    grid = math.isqrt(positions.shape[1] - 1)
    return {
        "arch": archs.get((embed_dim, depth)),
        "img_size": grid * patch_size,
        "patch_size": patch_size,
        "in_chans": in_chans,
    }


def _first_known(given, saved, shapes):
    names = ("arch", "img_size", "patch_size", "in_chans", "mean", "std", "dataset")
    sources = (given, saved, shapes)
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


def _load_strictly(module, state, what):
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
    module.load_state_dict(state)


def _shape(tensor):
    return "x".join(map(str, tensor.shape)) or "scalar"


def _listed(names, most=8):
    more = f" and {len(names) - most} more, {len(names)} in all" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _build_head(in_dim, state, activation, path):
    """CPLearn's head, or None for a file without it: a bare backbone, or one trained with another method's head."""
    if activation is None or not {"linear.weight", "seed", "scale"} <= state.keys():
        return None
    head = CPLearnHead.of_state(in_dim, state, activation)
    _load_strictly(head, state, f"{path}: CPLearn's head")
    return head.eval()


# ---- a model -> a feature matrix -------------------------------------------------------------------------------------


@torch.no_grad()
def extract_features(model, batches, num_samples, device, precision="fp32"):
    """Features of every image, each counted once, in the data set's order.

    model: maps images (B, C, h, w) on `device` to (B, D); put in eval mode for the duration. A `PretrainedModel` with
        CPLearn's head gives codes too. `torch.nn.Flatten()` gives the raw pixels, the baseline that needs no model.
    batches: yields (indices (B,), images (B, C, h, w)); under several processes, this process's share of them. An index
        that comes twice, as when shares are padded to equal length, counts once.
    num_samples: N; the indices are those from 0 to N - 1, in any order.
    precision: "fp32", "bf16" or "fp16", of the forward pass.
    Returns (features (N, D) float32, codes (N,) int64 or None), on CPU, all of them on every process.
    Raises ValueError where an index never comes. Memory: N x D x 4 bytes per process.
    """
    dtype = PRECISIONS[precision]
    has_codes = isinstance(model, PretrainedModel) and model.head is not None
    codes = torch.zeros(num_samples, dtype=torch.int64) if has_codes else None
    features = torch.zeros(num_samples, 0)  # D is known with the first batch
    owner = torch.full((num_samples,), utils.world_size())  # rank of the process that has the image; no such rank yet
    was_training = model.training
    model.eval()
    for indices, images in batches:
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            outputs = model(images.to(device, non_blocking=True))
        outputs = outputs.float()
        if features.shape[1] == 0:
            features = torch.zeros(num_samples, outputs.shape[1])
        indices = torch.as_tensor(indices)
        features[indices] = outputs.cpu()
        owner[indices] = utils.rank()
        if has_codes:
            codes[indices] = model.assign_features(outputs).cpu()
    model.train(was_training)
    return _gather(features, codes, owner)


def _gather(features, codes, owner):
    """Rows of all processes in one matrix, by a sum: each row has one owner, the lowest rank that saw the image."""
    if utils.world_size() > 1:
        dist.all_reduce(owner, op=dist.ReduceOp.MIN)
    missing = (owner == utils.world_size()).nonzero()
    if len(missing):
        raise ValueError(f"{len(missing)} of {len(owner)} images never came, the first has index {int(missing[0])}")
    if utils.world_size() > 1:
        width = torch.tensor(features.shape[1])
        dist.all_reduce(width, op=dist.ReduceOp.MAX)
        if features.shape[1] == 0:  # fewer images than processes
            features = torch.zeros(len(owner), int(width))
        features[owner != utils.rank()] = 0
        for rows in features.split(65536):  # bounds the buffers of the process group
            dist.all_reduce(rows)
        if codes is not None:
            codes[owner != utils.rank()] = 0
            dist.all_reduce(codes)
    return features, codes
