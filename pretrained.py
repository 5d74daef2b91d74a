"""From any checkpoint file to a frozen model.

    model = load_pretrained("runs/checkpoint.pth")            # ours, or weights that others released
    features = model(images)                                  # (B, D); model.assign(images): codes (B,), or None

The file says what it holds: our checkpoints and DINO's carry their settings, timm's and transformers' have a
config.json beside them, for a bare ViT they are read off the tensors' names and shapes (weight_layouts.py). Nothing is
downloaded, nothing in a file is executed, every tensor of the backbone must find its place, and what is no part of it
is named.

Shapes: B images per batch, D backbone width, K codes.
"""

import argparse
import contextlib
import io
import json
import math
import os
import re
import reprlib
import sys
from collections import Counter
from pathlib import Path

import safetensors
import safetensors.torch
import timm
import torch
from torch import nn

import images
import utils
from backbones import add_backbone_arguments, build_backbone
from baselines import BASELINES
from checkpoint import load_checkpoint
from cplearn_head import ACTIVATIONS, CPLearn
from utils import PRECISIONS, UserError, choose_precision, positive
from vision_transformer import ARCHS, VisionTransformer
from weight_layouts import (
    BESIDE,
    check_fits,
    choose_network,
    few,
    find_networks,
    is_our_vit,
    labels,
    listed,
    method_of,
    shape_settings,
    tensor_dicts,
    unwrapped_names,
)

OBJECTIVES = {"cplearn": CPLearn} | BASELINES  # --objective -> its class
FROM_CHECKPOINT = ("img_size", "in_chans", "mean", "std", "value_range")  # what evaluations take over from the file


def add_checkpoint_arguments(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """Adds the flags that name a model, or, with `several`, the models to compare."""
    parser.add_argument(
        "--checkpoint",
        "--pretrained_weights",
        dest="checkpoint",
        required=True,
        metavar="FILE",
        nargs="+" if several else None,
        help="our checkpoint.pth, or weights (.pth or .safetensors) of DINO, DINOv2, DINOv3, iBOT, MoCo-v3, MAE, timm, "
        "torchvision or transformers"
        + ("; several are compared in one table. FILE:KEY names the --checkpoint_key of one" if several else ""),
    )
    parser.add_argument(
        "--checkpoint_key",
        default=None,
        metavar="KEY",
        help="which of the models in the file, such as teacher, student or momentum_encoder: a part of its tensors' "
        "names (default: teacher, else averaged weights, else the one that is no student and no copy)",
    )
    parser.add_argument("--arch", default=None, metavar="NAME", help="backbone (default: as the file says)")
    parser.add_argument("--patch_size", type=positive(int), default=None, help="pixels (default: as the file says)")
    parser.add_argument(
        "--num_heads",
        type=positive(int),
        default=None,
        help="attention heads of a ViT, which the shapes of its weights do not tell (default: as the file says or its "
        "method is known to have, else those of --arch)",
    )
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
    given = {name: getattr(args, name, None) for name in ("arch", "patch_size", "img_size", "in_chans", "num_heads")}
    model = load_pretrained(args.checkpoint, args.checkpoint_key, **given)
    for name in FROM_CHECKPOINT:
        if hasattr(args, name) and getattr(args, name) is None:
            setattr(args, name, model.settings[name])
    return model.to(device)


def choose_dataset(args: argparse.Namespace, models: list["PretrainedModel"]) -> str:
    """The data set that args.dataset names; else the one that the models were trained on, as far as they say; else, as
    in DINO, whose files do not, the image folder args.data_path. Raises UserError where that is not one data set."""
    dataset = _dataset_of(args, models)
    say_assumed_pixels(args, models, dataset)
    return dataset


def _dataset_of(args, models):
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


def say_assumed_pixels(args: argparse.Namespace, models: list["PretrainedModel"], dataset: str) -> None:
    """One line where neither a flag nor a model's file says which mean and std the model was trained with."""
    silent = getattr(args, "mean", None) is None and any(model.settings.get("mean") is None for model in models)
    if silent and utils.rank() == 0:
        known = {name: " ".join(f"{value:g}" for value in images.DATASETS[dataset][name]) for name in ("mean", "std")}
        print(
            f"the checkpoint does not say the mean and std of its pixels: those of {dataset} are assumed, "
            f"--mean {known['mean']} --std {known['std']}",
            file=sys.stderr,
        )


# ---- a file -> a model -----------------------------------------------------------------------------------------------


def load_pretrained(
    path,
    checkpoint_key=None,
    arch=None,
    patch_size=None,
    img_size=None,
    in_chans=None,
    num_heads=None,
    random_weights=False,
    **training,
):
    """The frozen model in a file: a `PretrainedModel` on CPU, in eval mode.

    path: a file of one of these kinds; a folder, a URL or a model's name is refused, and nothing is ever downloaded.
        Ours, written by main_cplearn.py.   A training checkpoint or released backbone of DINO, DINOv2, DINOv3, iBOT,
        MoCo-v3 or MAE.   Any dict, or dict of dicts, of a ViT's tensors under the names of DINO, timm, torchvision or
        Hugging Face's transformers, whatever its wrappers put before and into the names; .pth or .safetensors. The
        config.json beside it is read for what the tensors do not say.
    checkpoint_key: a part of the names before the backbone's own, such as teacher or momentum_encoder, in a file that
        holds several; by default the teacher, else averaged weights, else the one that is no student and no copy.
    arch, patch_size, in_chans: by default what the file says, or what the tensors' shapes say of a ViT.
    img_size: side in pixels of the images to come, not of those in training. A ViT's position embedding keeps the
        size it has in the file and is interpolated where the images differ (bicubic, with antialiasing).
    num_heads: of a ViT; by default what the file says or is known of its method, else those of its arch: shapes do not
        tell, and another number is another network.
    random_weights: leave the backbone as torch's generator made it, without a head: the baseline of any evaluation.
    training: drop_path_rate and grad_checkpointing, for a backbone that will be trained.
    One line on stderr says what was read, what was assumed and what was left out.
    Raises UserError, in one line, where the file cannot be read, holds no such key, or holds tensors that are too many,
    too few or of another shape than the backbone's; the message says how many of how many fit.
    """
    given = {"arch": arch, "patch_size": patch_size, "img_size": img_size, "in_chans": in_chans, "num_heads": num_heads}
    try:
        return _load(path, checkpoint_key, given, random_weights, training)
    except UserError as error:
        raise error if str(path) in str(error) else UserError(f"{path}: {error}") from None
    except (ArithmeticError, LookupError, MemoryError, RuntimeError, TypeError, ValueError) as error:
        # the file's numbers go into constructors that check little
        reason = utils.one_line(error) or type(error).__name__
        raise UserError(f"{path}: its settings and tensors do not fit together: {reason}") from error


def load_backbone(args: argparse.Namespace) -> nn.Module:
    """The backbone in the file args.pretrained, to be trained on; args: the flags of `add_backbone_arguments`.

    Sets args.arch, .patch_size and .num_heads to the file's, so that a checkpoint says what it holds. The default
    --arch and --patch_size give way to the file; others must fit it."""
    parser = argparse.ArgumentParser()
    add_backbone_arguments(parser)
    typed = {name: getattr(args, name) for name in ("arch", "patch_size")}
    given = {name: value for name, value in typed.items() if value != parser.get_default(name)}
    training = {"drop_path_rate": args.drop_path_rate, "grad_checkpointing": args.grad_checkpointing}
    model = load_pretrained(args.pretrained, in_chans=args.in_chans, num_heads=args.num_heads, **given, **training)
    for name in ("arch", "patch_size", "num_heads"):
        setattr(args, name, model.settings[name] or getattr(args, name))
    return model.backbone.requires_grad_(True).train()


def _load(path, checkpoint_key, given, random_weights, training):
    checkpoint = _read(path)
    saved = _saved_settings(checkpoint, path)
    networks = _find_networks(checkpoint, given["arch"] or saved.get("arch"))
    network, label = choose_network(networks, checkpoint_key)
    shapes = shape_settings(network)
    settings, options, notes = _settings(network, shapes, given, saved)
    with torch.device("meta"):  # takes no memory: a small file may name a large backbone
        skeleton = build_backbone(**options)
    settings |= {"patch_size": _patch_size(skeleton), "num_heads": _num_heads(skeleton)}
    _check_img_size(settings)
    if random_weights:
        return PretrainedModel(build_backbone(**options), None, settings | {"objective": None})
    state, left_out = _fit(skeleton, network.state)
    check_fits(skeleton, state, f"{path}: {'.'.join([*network.path, ''])}{settings['arch']}")
    backbone = build_backbone(**options, **training)
    backbone.load_state_dict(state)
    head, of_head = _build_head(backbone.embed_dim, network.siblings, saved, path)
    epoch = checkpoint.get("epoch")
    settings |= {"checkpoint_key": label, "epoch": epoch if isinstance(epoch, int) else None}
    others = [name for each, name in zip(networks, labels(networks), strict=True) if each is not network]
    left_out += [name for name in network.siblings if name not in of_head and name.split(".")[0] not in others]
    if not str(checkpoint.get("format")).startswith("cplearn") or left_out:  # ours says all of it, and holds one model
        _say(path, settings, others, [*_facts(backbone), *notes], left_out)
    return PretrainedModel(backbone, head, settings)


def _find_networks(checkpoint, arch):
    """Raises UserError where there is none."""
    networks = find_networks(checkpoint)
    if not networks and arch is not None:
        with torch.device("meta"):
            networks = find_networks(checkpoint, unwrapped_names(build_backbone(arch).state_dict()))
    if networks:
        return networks
    names = [name for tensors in tensor_dicts(checkpoint).values() for name in tensors]
    if not names:
        raise UserError(f"holds no state dict; its keys: {listed([str(name) for name in checkpoint])}")
    raise UserError(_unknown_backbone(names))


def _unknown_backbone(names):
    return f"neither its settings nor its shapes tell the backbone; name it with --arch; its tensors: {few(names)}"


def _settings(network, shapes, given, saved):
    """(settings of the model, arguments of `build_backbone`, what to say of them)."""
    method = method_of(network, shapes.get("arch"))
    certain = shapes if is_our_vit(network.state) else {}
    settings = _first_known(given, certain, saved, shapes | {"img_size": shapes.get("pos_size")})
    if settings["arch"] is None:
        raise UserError(_unknown_backbone(network.state))
    notes = [f"{method.name}'s layout"] if method else []
    parts = dict(shapes.get("parts", {})) if settings["arch"] == shapes.get("arch") else {}
    if parts and saved.get("norm_eps"):
        parts["norm_eps"] = saved["norm_eps"]
    heads = _known_heads(settings["arch"], given, saved, method)
    if heads is not None:
        parts["num_heads"] = heads
    elif certain and settings["arch"] not in (given["arch"], saved.get("arch")):
        notes.append("its number of heads is assumed, as the shapes do not tell (--num_heads)")
    if method and method.img_size and settings["img_size"] == shapes.get("pos_size") and not given["img_size"]:
        settings["img_size"] = min(method.img_size, settings["img_size"])
        notes.append(f"for images of {settings['img_size']} px, as {method.name} evaluates")
    if saved.get("source"):
        notes.append(f"settings of {saved['source']}, mean {saved.get('mean')}")
    first = network.state.get("block1.conv1.weight")  # resnet8: its width is that of its first convolution
    options = {
        "arch": settings["arch"],
        "img_size": shapes.get("pos_size") or settings["img_size"],  # the position embedding's own size
        "patch_size": settings["patch_size"],
        "in_chans": settings["in_chans"],
        "width": len(first) if settings["arch"] == "resnet8" and first is not None else None,
    }
    return settings, {name: value for name, value in (options | parts).items() if value is not None}, notes


class PretrainedModel(nn.Module):
    """A frozen backbone, and its head where the file has one that names codes: of an objective of ours, or DINO's.

    .embed_dim: D.  .settings: dict with arch, img_size, patch_size, in_chans, mean, std, value_range, dataset,
    objective, beta, prior, checkpoint_key and epoch; None where the file does not say.
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
        blocks = self.backbone.get_intermediate_layers(images, self.n_last_blocks)  # n x (B, tokens, D)
        cls_tokens = torch.cat([tokens[:, 0] for tokens in blocks], dim=1)  # (B, n D)
        if not self.avgpool_patchtokens:
            return cls_tokens
        patch_mean = blocks[-1][:, self.backbone.num_prefix_tokens :].mean(dim=1)  # (B, D)
        if self.n_last_blocks == 1:
            return torch.stack([cls_tokens, patch_mean], dim=2).flatten(1)
        return torch.cat([cls_tokens, patch_mean], dim=1)


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


def _saved_settings(checkpoint, path):
    """What the file says: its `args` (a dict in ours, an argparse.Namespace in DINO's), else the config.json beside."""
    args = checkpoint.get("args")
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    args = args if isinstance(args, dict) else _config_beside(path)
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
    "objective": (lambda value: isinstance(value, str), "a name"),
    "activation": (lambda value: value in ACTIVATIONS, f"one of {ACTIVATIONS}"),
    "bare_head": (lambda value: isinstance(value, bool), "true or false"),
    "patch_size": (_is_side, "pixels"),
    "img_size": (_is_side, "pixels"),
    "in_chans": (_is_side, "a number of channels"),
    "num_heads": (_is_side, "a number of heads"),
    "norm_eps": (lambda value: type(value) is float and 0 < value < 1, "a small number"),
    "mean": (_are_numbers, "a number per channel"),
    "std": (_are_numbers, "a number per channel"),
    "value_range": (_are_numbers, "two numbers"),
}


def _config_beside(path):
    """The config.json in the file's folder, timm's or transformers', under our names; empty without one. `dataset` is
    export_backbone's. transformers keeps mean and std in a second file."""
    config = _json_beside(path, "config.json")
    if not config:
        return {}
    pixels = _json_beside(path, "preprocessor_config.json")
    try:
        cfg = config.get("pretrained_cfg", {})
        size = cfg.get("input_size", (config.get("num_channels"), config.get("image_size")))
        heads = config.get("model_args", {}).get("num_heads", config.get("num_attention_heads"))
        return {"arch": config.get("architecture"), "in_chans": size[0], "img_size": size[-1], "num_heads": heads,
                "mean": cfg.get("mean", pixels.get("image_mean")), "std": cfg.get("std", pixels.get("image_std")),
                "norm_eps": config.get("layer_norm_eps"), "dataset": config.get("dataset"),
                "source": "config.json"}  # fmt: skip
    except (AttributeError, LookupError, TypeError) as error:
        file = Path(path).with_name("config.json")
        raise UserError(f"{file}: not a config.json as timm writes it ({error})") from error


def _json_beside(path, name):
    file = Path(path).with_name(name)
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text())
        content.keys()
        return content
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{file}: not a {name} as timm writes it ({error})") from error


def _first_known(given, certain, saved, shapes):
    """Settings by the first source that has them. Shapes give our name to a ViT of many names (deit_small,
    vit_small_patch16_224); they do not tell the size of images, only that of the position embedding."""
    names = ("arch", "patch_size", "in_chans", "img_size", "mean", "std", "value_range", "dataset")
    names += ("objective", "beta", "prior")
    sources = (given, certain, saved, shapes)
    return {name: next((s[name] for s in sources if s.get(name) is not None), None) for name in names}


def _known_heads(arch, given, saved, method):
    """Heads of a ViT as far as anything but the shapes says; None: those of its arch."""
    if given["num_heads"] or saved.get("num_heads"):
        return given["num_heads"] or saved["num_heads"]
    if method and method.num_heads:
        return method.num_heads
    if arch in ARCHS and saved.get("arch") not in (None, *ARCHS) and timm.is_model(saved["arch"]):
        with torch.device("meta"):
            return _num_heads(build_backbone(saved["arch"]))  # timm's name of a ViT that is built as ours
    return None


def _num_heads(backbone):
    """Of a ViT; None for other backbones, and for those whose blocks differ."""
    blocks = getattr(backbone, "blocks", None)
    attention = getattr(blocks[0], "attn", None) if isinstance(blocks, nn.Sequential | nn.ModuleList) else None
    return getattr(attention, "num_heads", None)


def _patch_size(backbone):
    """Pixels, or None for a backbone without patches (DINO's files name a patch size beside a ResNet too)."""
    patch_embed = getattr(backbone, "patch_embed", None)  # timm's name, and so ours
    patch_size = getattr(patch_embed, "patch_size", None)
    return patch_size[0] if isinstance(patch_size, tuple) else patch_size


def _check_img_size(settings):
    img_size, patch_size = settings["img_size"], settings["patch_size"]
    if img_size is not None and patch_size is not None and img_size % patch_size:
        raise UserError(f"--img_size {img_size} is not a multiple of the model's patch size {patch_size}")


def _fit(backbone, state):
    """(the file's tensors under the backbone's names, names of those left out)."""
    own = backbone.state_dict()
    whole = unwrapped_names({name: name for name in own})  # timm has networks with a part named "module"
    state = {whole.get(name, name): tensor for name, tensor in state.items()}
    if not own.keys() <= state.keys():
        converted = _converted_by_timm(backbone, state)
        if own.keys() == converted.keys():
            kept = {tensor.data_ptr() for tensor in converted.values()}
            return converted, [name for name, tensor in state.items() if tensor.data_ptr() not in kept]
    left_out = [name for name in state if name not in own and BESIDE.fullmatch(name)]
    return {name: tensor for name, tensor in state.items() if name not in left_out}, left_out


def _converted_by_timm(backbone, state):
    """A state dict under the names of a network's authors, as timm converts it; empty where timm cannot."""
    convert = getattr(sys.modules[type(backbone).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return {}
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it looks for and does not find
            return {name: tensor for name, tensor in convert(dict(state), backbone).items() if tensor is not None}
    except Exception:  # it is written for the authors' own file; of any other, the names that differ are listed
        return {}


def _load_strictly(module, state, what):
    check_fits(module, state, what)
    module.load_state_dict(state)


def _build_head(in_dim, siblings, saved, path):
    """(head, or None: for a bare backbone, or one whose head names no codes; and the names of its tensors among the
    siblings). A file that names no objective is an older one of CPLearn, or of DINO and those that have its head."""
    prefix = "dino_head." if any(name.startswith("dino_head.") for name in siblings) else "head."
    state = {name.removeprefix(prefix): t for name, t in siblings.items() if name.startswith(prefix)}
    objective = saved.get("objective") or ("dino" if saved.get("activation") is None else "cplearn")
    used = list(state)
    if objective == "dino":
        used = [name for name in state if name.startswith(("mlp.", "last_layer."))]  # iBOT has a second head beside
        state = {re.sub(r"^last_layer\.\S+\.original", "original", name): state[name] for name in used}
        state = {WEIGHT_NORM.get(name, name): tensor for name, tensor in state.items()}
    known = objective in OBJECTIVES and state
    head = OBJECTIVES[objective].head_from_state_dict(in_dim, state, saved) if known else None
    if head is None:
        return None, []
    _load_strictly(head, state, f"{path}: {type(head).__name__}")
    return head.eval(), [prefix + name for name in used]


WEIGHT_NORM = {"original0": "last_layer.weight_g", "original1": "last_layer.weight_v"}  # torch's names since 2.0


# ---- what is said of it ----------------------------------------------------------------------------------------------


def _say(path, settings, others, notes, left_out):
    """The one line on what was read, assumed and left out."""
    if utils.rank() > 0:
        return
    key = [f"{settings['checkpoint_key']}, not {listed(others)} (--checkpoint_key)"] if others else []
    beside = Counter(name.split(".")[0] for name in left_out)
    left = [f"left out: {listed([_counted(*pair) for pair in beside.items()])}"] if beside else []
    line = f"{path}: " + "; ".join([*key, ", ".join([settings["arch"], *notes]), *left])
    print(utils.one_line(line, 600), file=sys.stderr)


def _counted(name, number):
    return name if number == 1 else f"{name} ({number} tensors)"


def _facts(backbone):
    """What tells a ViT from others of its name."""
    heads, patch_size = _num_heads(backbone), _patch_size(backbone)
    facts = [f"{heads} heads"] if heads else []
    facts += [f"patches of {patch_size} px"] if patch_size else []
    if isinstance(backbone, VisionTransformer):
        parts, side = backbone.parts, backbone.patch_embed.img_size[0]
        facts += ["LayerScale"] if parts.get("init_values") else []
        facts += [f"{parts['reg_tokens']} registers"] if parts.get("reg_tokens") else []
        facts += ["features: mean of the patches (fc_norm)"] if parts.get("global_pool") == "avg" else []
        facts += [f"positions of {side} px, interpolated for other sizes"]
    return facts
