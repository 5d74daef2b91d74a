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
import math
import os
import re
import sys
from collections import Counter
from dataclasses import dataclass
from functools import partial

import safetensors
import safetensors.torch
import timm
import torch
from torch import nn

import images
import utils
from backbones import build_backbone
from baselines import BASELINES
from checkpoint import load_checkpoint, refuse_other_kinds
from cplearn_head import CPLearn
from utils import PRECISIONS, UserError, choose_precision, positive
from vision_transformer import ARCHS, VisionTransformer
from weight_layouts import (
    BESIDE,
    UNTOLD,
    channels_read,
    check_fits,
    choose_network,
    few,
    find_networks,
    fit_shapes,
    is_our_vit,
    labels,
    listed,
    method_of,
    saved_settings,
    shape_settings,
    tensor_dicts,
    unwrapped_names,
)

OBJECTIVES = {"cplearn": CPLearn} | BASELINES  # --objective -> its class
# what evaluations take over from the file
FROM_CHECKPOINT = ("img_size", "in_chans", "mean", "std", "value_range", "pages", "float_pixels")


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
    num_heads: of a ViT; by default what the file says or is known of its method, else its arch's: shapes do not tell,
        and another number is another network.
    random_weights: leave the backbone as torch's generator made it, without a head: the baseline of any evaluation.
    training: drop_path_rate and grad_checkpointing, for a backbone that will be trained.
    One line on stderr says what was read, what was assumed and what was left out.
    Raises UserError, in one line, where the file cannot be read, holds no such key, or holds tensors that are too many,
    too few or of another shape than the backbone's; the message says how many of how many fit.
    """
    given = {"arch": arch, "patch_size": patch_size, "img_size": img_size, "in_chans": in_chans, "num_heads": num_heads}
    with _naming(path):
        model, found = _load(path, checkpoint_key, given, random_weights, training)
    if found and (not found.is_ours or found.left_out):  # ours says all of it, and holds one model
        _say(path, model.settings, found)
    return model


@contextlib.contextmanager
def _naming(path):
    """Inside, what fails is the file's fault, and said in one line that names it."""
    try:
        yield
    except UserError as error:
        raise error if str(path) in str(error) else UserError(f"{path}: {error}") from None
    except (ArithmeticError, LookupError, MemoryError, RuntimeError, TypeError, ValueError) as error:
        # the file's numbers go into constructors that check little
        reason = utils.one_line(error) or type(error).__name__
        raise UserError(f"{path}: its settings and tensors do not fit together: {reason}") from error


def load_backbone(args: argparse.Namespace, earlier: dict | None = None) -> nn.Module:
    """The backbone in the file args.init_from, to be trained on; args: resolved flags of a run. Of a run that goes on
    from the checkpoint `earlier` the backbone is that checkpoint's, and args.init_from is not read.

    Sets args.arch, .patch_size and .num_heads to the file's, and .backbone_parts to what neither names nor shapes tell,
    so that a checkpoint says what it holds. --arch and --num_heads that were given must fit the file; for another
    --patch_size or --in_chans weights are made from the file's (`weight_layouts.fit_shapes`). Three printed lines say
    what was taken, what was not, and what was changed."""
    path, key = split_key(args.init_from, None) if earlier is None else (earlier["path"], None)
    given = {"arch": args.arch, "patch_size": None, "img_size": None, "in_chans": None, "num_heads": args.num_heads}
    training = {"drop_path_rate": args.drop_path_rate, "grad_checkpointing": args.grad_checkpointing}
    wanted = {"patch_size": args.patch_size, "in_chans": args.in_chans, "width": args.width}
    try:
        with _naming(path):
            model, found = _load(path, key, given, False, training, wanted)
    except UserError as error:
        raise UserError(str(error).replace("--checkpoint_key", "--init_from FILE:KEY")) from None
    for name in ("arch", "patch_size", "num_heads"):
        setattr(args, name, model.settings[name] or getattr(args, name))
    if found.parts:
        args.backbone_parts = found.parts
    if utils.rank() == 0:
        for line in _start(args, path, model, found) if earlier is None else [_not_read(args, path)]:
            print(utils.one_line(line, 600), flush=True)
    return model.backbone.requires_grad_(True).train()


def split_key(path, checkpoint_key):
    """ "dino.pth:student" -> ("dino.pth", "student"); any other path -> (path, checkpoint_key)."""
    file, _, key = path.rpartition(":")
    return (file, key) if file and not os.path.exists(path) and os.path.exists(file) else (path, checkpoint_key)


@dataclass
class _Found:
    """What loading found beside the model: what is said of it."""

    is_ours: bool
    others: list  # labels of the file's other networks
    notes: list
    left_out: list  # names of tensors
    changed: list  # weights that were made from the file's, in words
    parts: dict  # arguments of the constructor that neither names nor shapes tell


def _load(path, checkpoint_key, given, random_weights, training, wanted=None):
    """(model, what was found beside it; None for random weights). wanted: what the network is to become."""
    checkpoint = _read(path)
    saved = saved_settings(checkpoint, path)
    networks = _find_networks(checkpoint, given["arch"] or saved.get("arch"))
    network, label = choose_network(networks, checkpoint_key)
    shapes = shape_settings(network)
    settings, options, notes = _settings(network, shapes, given, saved)
    if wanted is not None and settings["in_chans"] is None:
        options["in_chans"] = settings["in_chans"] = channels_read(network.state, partial(_on_meta, options))
    skeleton = _on_meta(options)
    settings |= {"patch_size": _patch_size(skeleton), "num_heads": _num_heads(skeleton)}
    _check_img_size(settings)
    if random_weights:
        return PretrainedModel(build_backbone(**options), None, settings | {"objective": None}), None
    state, left_out = _fit(skeleton, network.state)
    told = shapes.get("arch") or saved.get("arch")
    is_other = told not in (None, settings["arch"])
    other = f"--arch {settings['arch']} does not fit, the file's is {told}: " if is_other else ""
    check_fits(skeleton, state, f"{path}: {other}{'.'.join([*network.path, ''])}{settings['arch']}")
    changed = []
    if wanted is not None:
        options = _as_wanted(options, settings, wanted)
        state, changed = fit_shapes(state, _on_meta(options).state_dict())
    backbone = build_backbone(**options, **training)
    backbone.load_state_dict(state)
    head, of_head = _build_head(backbone.embed_dim, network.siblings, saved, path)
    epoch = checkpoint.get("epoch")
    settings |= {"checkpoint_key": label, "epoch": epoch if isinstance(epoch, int) else None}
    settings["patch_size"] = _patch_size(backbone)
    others = [name for each, name in zip(networks, labels(networks), strict=True) if each is not network]
    left_out += [name for name in network.siblings if name not in of_head and name.split(".")[0] not in others]
    is_ours = str(checkpoint.get("format")).startswith("cplearn")
    parts = {name: options[name] for name in UNTOLD if name in options}
    notes = [*_facts(backbone), *notes]
    return PretrainedModel(backbone, head, settings), _Found(is_ours, others, notes, left_out, changed, parts)


def _on_meta(options, **others):
    with torch.device("meta"):  # takes no memory: a small file may name a large backbone
        return build_backbone(**options | others)


def _as_wanted(options, settings, wanted):
    """Arguments of `build_backbone` for other patches and channels; the position embedding keeps its grid."""
    patch_size, in_chans, width = (wanted[name] for name in ("patch_size", "in_chans", "width"))
    options = options | {"in_chans": in_chans}
    if width is not None and width != options.get("width", width):
        raise UserError(f"--width {width}: the file's backbone has {options['width']}; leave it out")
    before = settings["patch_size"]
    if before is None or patch_size in (None, before):
        return options
    if settings["arch"] not in ARCHS:
        raise UserError(
            f"--patch_size {patch_size}: {settings['arch']} has patches of {before} px by its name; of the ViTs "
            f"{', '.join(ARCHS)} others can be made"
        )
    return options | {"patch_size": patch_size, "img_size": options["img_size"] // before * patch_size}


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
    parts |= saved.get("backbone_parts") or {}
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

    .embed_dim: D.  .settings: dict with arch, img_size, patch_size, in_chans, mean, std, value_range, pages,
    float_pixels, dataset, objective, beta, prior, checkpoint_key and epoch; None where the file does not say.
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
        """The model whose features are what DINO's linear probe takes, see `LastBlocks`; without the head."""
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
            refuse_other_kinds(path)
            raise UserError(f"{path}: cannot be read ({error})") from error
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path}: holds a {type(checkpoint).__name__}, expected a dict of tensors")
    return checkpoint


def _first_known(given, certain, saved, shapes):
    """Settings by the first source that has them. Shapes give our name to a ViT of many names (deit_small,
    vit_small_patch16_224); they do not tell the size of images, only that of the position embedding."""
    names = (*FROM_CHECKPOINT, "arch", "patch_size", "dataset", "objective", "beta", "prior")
    sources = (given, certain, saved, shapes)
    return {name: next((s[name] for s in sources if s.get(name) is not None), None) for name in names}


def _known_heads(arch, given, saved, method):
    """Heads of a ViT as far as anything but the shapes says; None: the heads of its arch."""
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
    check_fits(head, state, f"{path}: {type(head).__name__}")
    head.load_state_dict(state)
    return head.eval(), [prefix + name for name in used]


WEIGHT_NORM = {"original0": "last_layer.weight_g", "original1": "last_layer.weight_v"}  # torch's names since 2.0


# ---- what is said of it ----------------------------------------------------------------------------------------------


def _say(path, settings, found):
    """The one line on what was read, assumed and left out."""
    if utils.rank() > 0:
        return
    key = [f"{settings['checkpoint_key']}, not {listed(found.others)} (--checkpoint_key)"] if found.others else []
    left = [f"left out: {_beside(found.left_out)}"] if found.left_out else []
    line = f"{path}: " + "; ".join([*key, ", ".join([settings["arch"], *found.notes]), *left])
    print(utils.one_line(line, 600), file=sys.stderr)


def _start(args, path, model, found):
    """Three lines on a run that starts from the file."""
    settings, count = model.settings, len(model.backbone.state_dict())
    of_key = f" of its {settings['checkpoint_key']}" if settings["checkpoint_key"] else ""
    not_taken = [*found.others, *([_beside(found.left_out)] if found.left_out else [])]
    not_taken += ["the head"] if model.head is not None else []
    changed = found.changed + _other_positions(args, model.backbone) + _other_pixels(args, settings)
    return [
        f"--init_from {path}: taken: {count} of {count} tensors{of_key}; {', '.join([settings['arch'], *found.notes])}",
        f"--init_from: not taken: {'; '.join(not_taken) or 'nothing'}",
        f"--init_from: changed: {'; '.join(changed) or 'nothing'}",
    ]


def _not_read(args, path):
    return f"--init_from {args.init_from}: not read, the run goes on from {path}"


def _other_positions(args, backbone):
    """In words, where a ViT's position embedding is made for another number of patches than the run's images have."""
    positions, patch_size = getattr(backbone, "pos_embed", None), _patch_size(backbone)
    if getattr(positions, "ndim", 0) != 3 or not patch_size:
        return []
    own, now = math.isqrt(positions.shape[1]), args.img_size // patch_size
    return [f"positions of {own}x{own} patches, interpolated (bicubic) to {now}x{now} in each pass"] * (own != now)


def _other_pixels(args, settings):
    """In words, where the file says that its pixels were scaled or normalised otherwise than the run's."""
    then = [(name, settings[name], getattr(args, name) or ()) for name in ("mean", "std", "value_range")]
    differ = [(name, old, new) for name, old, new in then if old is not None and list(old) != list(new)]
    return [f"--{name} is {_numbers(new) or 'not given'}, the file's {_numbers(old)}" for name, old, new in differ]


def _numbers(values):
    return " ".join(f"{value:g}" for value in values)


def _beside(left_out):
    return listed([_counted(*pair) for pair in Counter(name.split(".")[0] for name in left_out).items()])


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
