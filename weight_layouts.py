"""Which tensors of a file are which of a backbone's: names in released files -> our names, which are DINO's and timm's;
what a file says of itself beside them; and weights in the shapes of other images.

    networks = find_networks(checkpoint)          # every backbone in the file, wherever its names begin
    network.state                                 # {our name: tensor}
    vit_settings(network)                         # what names and shapes say of a ViT

Wrappers (DDP, FSDP, torch.compile, Lightning, averaged weights) put words before and into a tensor's name. Here those
words are not listed: a backbone begins wherever a tensor stands that every backbone of its layout has.

Nothing is built here; a file in none of these layouts is compared with the names of the backbone that --arch tells.
"""

import argparse
import functools
import itertools
import json
import math
import re
import reprlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from timm.layers import resample_patch_embed

from cplearn_head import ACTIVATIONS
from images.reading import PAGES
from utils import UserError

WRAPPERS = re.compile(  # parts of a name that wrap a module without being one of its own
    r"(^|(?<=\.))(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\."
)
MOST_TENSORS = 10**6  # a few bytes may describe a dict that holds itself a million times
MOST_LEVELS = 4  # of dicts in dicts above a file's tensors


@dataclass(frozen=True)
class Layout:
    """A family of names. anchor: a tensor that each of its backbones has.  renames: pairs for re.sub, in order."""

    anchor: str
    renames: tuple = ()
    finish: Callable = dict  # what renaming alone cannot do: {name: tensor} -> {name: tensor}
    norm_eps: float | None = None  # of a ViT without LayerScale; None: 1e-6, as nearly everywhere


def _join_qkv(state):
    """Queries, keys and values in one tensor, as timm has them. Keys may have no bias, which is a bias of 0; where
    anything else is missing, the tensors stay as they are, so that they are named as tensors that do not fit."""
    joined = dict(state)
    for name in state:
        if ".attn.query." in name:
            query, key, value = (name.replace(".query.", f".{part}.") for part in ("query", "key", "value"))
            no_bias = torch.zeros_like(state[query]) if key.endswith(".bias") else None
            parts = state[query], state.get(key, no_bias), state.get(value)
            if all(part is not None for part in parts):
                joined[name.replace(".query.", ".qkv.")] = torch.cat(parts)
                for part in (query, key, value):
                    joined.pop(part, None)
    return joined


DINO_AND_TIMM = Layout(
    "patch_embed.proj.weight",
    (
        (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),  # DINOv2's training keeps blocks in chunks
        (r"^register_tokens$", "reg_token"),
        (r"\.mlp\.w12\.", ".mlp.fc1."),  # SwiGLU, whose two halves both have in one matrix
        (r"\.mlp\.w3\.", ".mlp.fc2."),
    ),
)
TORCHVISION = Layout(
    "conv_proj.weight",
    (
        (r"^class_token$", "cls_token"),
        (r"^conv_proj\.", "patch_embed.proj."),
        (r"^encoder\.pos_embedding$", "pos_embed"),
        (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
        (r"\.ln_([12])\.", r".norm\1."),
        (r"\.self_attention\.in_proj_", ".attn.qkv."),
        (r"\.self_attention\.out_proj\.", ".attn.proj."),
        (r"\.mlp\.(linear_1|0)\.", ".mlp.fc1."),
        (r"\.mlp\.(linear_2|3)\.", ".mlp.fc2."),
        (r"^encoder\.ln\.", "norm."),
    ),
)
HUGGING_FACE = Layout(
    "embeddings.patch_embeddings.projection.weight",
    (
        (r"^embeddings\.(cls_token|mask_token)$", r"\1"),
        (r"^embeddings\.register_tokens$", "reg_token"),
        (r"^embeddings\.position_embeddings$", "pos_embed"),
        (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
        (r"^encoder\.layer\.(\d+)\.", r"blocks.\1."),
        (r"\.attention\.attention\.", ".attn."),
        (r"\.attention\.output\.dense\.", ".attn.proj."),
        (r"\.intermediate\.dense\.", ".mlp.fc1."),
        (r"\.output\.dense\.", ".mlp.fc2."),
        (r"\.mlp\.weights_in\.", ".mlp.fc1."),
        (r"\.mlp\.weights_out\.", ".mlp.fc2."),
        (r"\.layernorm_before\.", ".norm1."),
        (r"\.layernorm_after\.", ".norm2."),
        (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
        (r"^layernorm\.", "norm."),
    ),
    _join_qkv,
    norm_eps=1e-12,
)


def _as_meta(state):
    """Queries, keys and values joined, and the feed-forward part under its names in Meta's files."""
    gated = any(".mlp.gate_proj." in name for name in state)
    own = {"gate_proj": "w1", "up_proj": "w2", "down_proj": "w3"} if gated else {"up_proj": "fc1", "down_proj": "fc2"}
    names = {name: re.sub(r"\.mlp\.(\w+_proj)\.", lambda found: f".mlp.{own[found[1]]}.", name) for name in state}
    return _join_qkv({names[name]: tensor for name, tensor in state.items()})


HUGGING_FACE_DINOV3 = Layout(  # to Meta's names, from which timm converts
    "embeddings.patch_embeddings.weight",
    (
        (r"^embeddings\.(cls_token|mask_token)$", r"\1"),
        (r"^embeddings\.register_tokens$", "storage_tokens"),
        (r"^embeddings\.patch_embeddings\.", "patch_embed.proj."),
        (r"^(model\.)?layer\.(\d+)\.", r"blocks.\2."),
        (r"\.attention\.q_proj\.", ".attn.query."),
        (r"\.attention\.k_proj\.", ".attn.key."),
        (r"\.attention\.v_proj\.", ".attn.value."),
        (r"\.attention\.o_proj\.", ".attn.proj."),
        (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    ),
    _as_meta,
)
RESNET = Layout("layer1.0.conv1.weight")
LAYOUTS = (DINO_AND_TIMM, TORCHVISION, HUGGING_FACE, HUGGING_FACE_DINOV3, RESNET)

# what stands beside a backbone and is no part of it: heads, decoders, what only pretraining reads
BESIDE = re.compile(
    r"(mask_token|masked_embed|(dino_|ibot_|bottleneck|decoder_|projection_)?heads?|decoder\w*|fc|classifier|pooler"
    r"|projectors?|predictors?|prototypes?|n_averaged|norm_pix_loss)(\..*)?"
)


@dataclass
class Network:
    """A backbone in a file. path: the dicts' keys and the parts of its names above it, without wrappers.
    state: {our name: tensor}.  siblings: {name from its parent on: tensor}, of what stands beside it in its dict."""

    path: tuple
    depth: int  # how many of `path` are keys of dicts
    layout: Layout | None
    state: dict
    siblings: dict

    def words(self):
        """The parts of its path, and what they are made of: student_backbone -> student_backbone, student, backbone."""
        return {*self.path, *(word for part in self.path for word in part.split("_"))}


# ---- what a file says of itself --------------------------------------------------------------------------------------


def saved_settings(checkpoint, path):
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


def _is_eps(value):
    return type(value) is float and 0 < value < 1


# parts of a ViT that neither names nor shapes tell: our checkpoints keep them in their settings
UNTOLD = {
    "norm_eps": _is_eps,
    "global_pool": lambda value: value in ("avg", "token"),
}


def _are_untold(value):
    return isinstance(value, dict) and all(name in UNTOLD and UNTOLD[name](each) for name, each in value.items())


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
    "norm_eps": (_is_eps, "a small number"),
    "mean": (_are_numbers, "a number per channel"),
    "std": (_are_numbers, "a number per channel"),
    "value_range": (_are_numbers, "two numbers"),
    "pages": (lambda value: value in PAGES, f"one of {PAGES}"),
    "float_pixels": (lambda value: isinstance(value, bool), "true or false"),
    "backbone_parts": (_are_untold, f"a dict of {', '.join(UNTOLD)}"),
}


def _config_beside(path):
    """The config.json in the file's folder, timm's or transformers', under our names; empty without one. `dataset` and
    how images are read are export_backbone's. transformers keeps mean and std in a second file."""
    names = ("config.json", "preprocessor_config.json")
    config, pixels = (_json_beside(path, name) for name in names)
    if not config and not pixels:
        return {}
    source = " and ".join(name for name, content in zip(names, (config, pixels), strict=True) if content)
    try:
        cfg = config.get("pretrained_cfg", {})
        size = cfg.get("input_size", (config.get("num_channels"), config.get("image_size")))
        heads = config.get("model_args", {}).get("num_heads", config.get("num_attention_heads"))
        return {"arch": config.get("architecture"), "in_chans": size[0], "img_size": size[-1], "num_heads": heads,
                "mean": cfg.get("mean", pixels.get("image_mean")), "std": cfg.get("std", pixels.get("image_std")),
                "norm_eps": config.get("layer_norm_eps"), "source": source,
                **{name: config.get(name) for name in ("dataset", "value_range", "pages", "float_pixels")}}  # fmt: skip
    except (AttributeError, LookupError, TypeError) as error:
        file = Path(path).with_name("config.json")
        raise UserError(f"{file}: not a config.json as timm writes it ({error})") from error


def _json_beside(path, name):
    file = Path(path).with_name(name)
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text("utf-8"))
        content.keys()
        return content
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{file}: not a {name} as timm writes it ({error})") from error


# ---- a file -> its networks ------------------------------------------------------------------------------------------


def find_networks(checkpoint, own_names=()):
    """The `Network`s in a checkpoint (nested dicts of tensors), in the file's order.

    own_names: names of a backbone's tensors; where no layout fits, networks are found by them."""
    found = []
    for path, state in tensor_dicts(checkpoint).items():
        places = {}
        for name in state:
            for layout in LAYOUTS:
                if name == layout.anchor or name.endswith(f".{layout.anchor}"):
                    places[name.removesuffix(layout.anchor)] = layout
        if not places and own_names:
            places = dict.fromkeys(_prefixes_by_names(state, own_names))
        found += [_cut_out(path, state, prefix, layout, places) for prefix, layout in places.items()]
    return found


def tensor_dicts(checkpoint):
    """{keys that lead to a dict: {name without wrappers: tensor}}, of every dict that holds weights."""
    found, todo, count = {}, [((), checkpoint)], 0
    while todo:
        path, content = todo.pop()
        tensors = {str(name): value for name, value in content.items() if isinstance(value, torch.Tensor)}
        count += len(content)
        if count > MOST_TENSORS:
            raise UserError(f"holds more than {MOST_TENSORS} values, expected a network's")
        if any(name.endswith(("weight", "weight_v")) for name in tensors):  # DINO's {"center": tensor} is no network
            found[path] = unwrapped_names(tensors)
        if len(path) < MOST_LEVELS:
            below = [((*path, str(key)), value) for key, value in content.items() if isinstance(value, dict)]
            todo += reversed(below)
    return found


def unwrapped_names(names):
    """A dict under names without wrappers; where two would have one name, they keep their own."""
    count = Counter(WRAPPERS.sub("", name) for name in names)
    short = {name: WRAPPERS.sub("", name) for name in names}
    return {short[name] if count[short[name]] == 1 else name: value for name, value in names.items()}


def _prefixes_by_names(state, own_names):
    """Where a backbone of these names begins: wherever at least half of them follow, else where most do; where none
    does, behind what all names of the file share."""
    own, count = set(own_names), Counter()
    for name in state:
        starts = [0, *(match.end() for match in re.finditer(r"\.", name))]
        count.update(name[:start] for start in starts if name[start:] in own)
    if count:
        return [prefix for prefix, number in count.items() if number >= min(len(own) / 2, max(count.values()))]
    modules = [name.split(".")[:-1] for name in state]
    shared = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(min(modules), max(modules), strict=False))
    return ["".join(f"{part}." for part, _ in shared)]  # its authors' names: timm may convert them


def _cut_out(path, state, prefix, layout, places):
    inside = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    others = [place for place in places if place != prefix and place.startswith(prefix)]  # such as an encoder's copy
    inside = {name: t for name, t in inside.items() if not any((prefix + name).startswith(o) for o in others)}
    parent = re.sub(r"[^.]+\.$", "", prefix)
    taken = [place for place in places if place]
    beside = {
        name.removeprefix(parent): tensor
        for name, tensor in state.items()
        if not (name.startswith(prefix) or any(name.startswith(place) for place in taken))
    }
    keys = tuple(part for part in path if not WRAPPERS.fullmatch(f"{part}."))
    words = tuple(prefix.split(".")[:-1])
    return Network((*keys, *words), len(keys), layout, renamed(inside, layout) if layout else inside, beside)


def renamed(state, layout):
    """A network's tensors under our names."""
    return _fold_position(layout.finish({_rename(name, layout): tensor for name, tensor in state.items()}))


def _rename(name, layout):
    return functools.reduce(lambda text, rename: re.sub(*rename, text), layout.renames, name)


def _fold_position(state):
    """DINOv2's position embedding has a place for the CLS token and none for registers. As timm, add that place to the
    CLS token, which is the same network."""
    cls, registers, positions = (state.get(name) for name in ("cls_token", "reg_token", "pos_embed"))
    if cls is None or registers is None or getattr(positions, "ndim", 0) != 3:
        return state
    if math.isqrt(positions.shape[1] - 1) ** 2 != positions.shape[1] - 1:
        return state
    return state | {"cls_token": cls + positions[:, :1], "pos_embed": positions[:, 1:]}


# ---- which of the networks -------------------------------------------------------------------------------------------


def labels(networks):
    """What tells a file's networks apart: the first part of their paths in which they differ; for a single one the
    key that it stands under, None in a flat file."""
    if len(networks) == 1:
        return [networks[0].path[0] if networks[0].depth else None]
    depth = 0
    while len({network.path[: depth + 1] for network in networks}) == 1:
        depth += 1
    return [".".join(network.path[depth : depth + 1]) or ".".join(network.path) or "unnamed" for network in networks]


def choose_network(networks, key):
    """(the network that --checkpoint_key names, its label); without a key, by `_preference`."""
    names = labels(networks)
    for fits in (lambda network: key in network.path, lambda network: key in network.words()):
        found = [pair for pair in zip(networks, names, strict=True) if key is not None and fits(pair[0])]
        if found:
            return found[0][0], key
    if key is None:
        return min(zip(networks, names, strict=True), key=lambda pair: _preference(pair[0]))
    if names == [None]:
        raise UserError(f"--checkpoint_key {key}: the file is one flat state dict without keys; leave it out")
    raise UserError(f"no state dict under --checkpoint_key {key}; the file has: {', '.join(names)}")


def _preference(network):
    """DINO evaluates the teacher, timm the averaged weights, MoCo, BYOL and those after them the network itself."""
    words = network.words()
    if "teacher" in words:
        return 0
    if words & {"ema", "averaged"}:
        return 1
    return 3 if words & {"student", "momentum", "target", "k"} else 2


# ---- what names and shapes say ---------------------------------------------------------------------------------------

VIT_PARTS = re.compile(  # of the ViTs that vision_transformer.py can build; timm has ViTs with more
    r"cls_token|reg_token|pos_embed|patch_embed\.proj\.\w+|(fc_)?norm\.\w+"
    r"|blocks\.\d+\.(norm[12]|attn\.(qkv|proj)|mlp\.fc[12]|ls[12])\.\w+"
)
VITS = {
    (128, 4): "vit_mini", (192, 12): "vit_tiny", (384, 12): "vit_small", (768, 12): "vit_base",
    (1024, 24): "vit_large",
}  # fmt: skip
TIMM_VITS = {(1280, 32, 14): "vit_huge_patch14_224"}  # MAE's
RESNETS = {  # blocks of the four stages, convolutions in a block
    (2, 2, 2, 2, 2): "resnet18.tv_in1k",  # with a first convolution for photographs; ours has one for small images
    (3, 4, 6, 3, 2): "resnet34", (3, 4, 6, 3, 3): "resnet50",
    (3, 4, 23, 3, 3): "resnet101", (3, 8, 36, 3, 3): "resnet152",
}  # fmt: skip


def is_our_vit(state):
    """Whether vision_transformer.py has every part of it. What stands beside a backbone does not count."""
    shape = getattr(state.get("blocks.0.mlp.fc1.weight"), "shape", (0, 0))
    is_plain = len(shape) == 2 and shape[0] == 4 * shape[1]  # no SwiGLU
    parts = [name for name in state if not BESIDE.fullmatch(name)]
    return is_plain and "cls_token" in state and all(map(VIT_PARTS.fullmatch, parts))


def shape_settings(network):
    """What names and shapes say of a ViT or a ResNet: arch, patch_size, in_chans, pos_size (pixels, of the position
    embedding), parts (arguments of the constructor). Empty for any other backbone."""
    state = network.state
    patches, positions = state.get("patch_embed.proj.weight"), state.get("pos_embed")
    if network.layout is RESNET:
        return {"arch": _resnet(state)}
    if patches is None or patches.ndim != 4:
        return {}
    if positions is None:
        return _dinov3_settings(state, patches.shape)
    if positions.ndim != 3:
        return {}
    embed_dim, in_chans, patch_size, _ = patches.shape
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    grid = math.isqrt(positions.shape[1])  # of patches; the few other tokens make no whole row more
    return {
        "arch": _vit_arch(state, embed_dim, depth, patch_size),
        "patch_size": patch_size,
        "in_chans": in_chans,
        "pos_size": grid * patch_size,
        "parts": _vit_parts(network, positions.shape[1] == grid**2),
    }


def _vit_arch(state, embed_dim, depth, patch_size):
    if (embed_dim, depth, patch_size) == (1536, 40, 14):  # DINOv2's, with SwiGLU
        return "vit_giant_patch14_reg4_dinov2" if "reg_token" in state else "vit_giant_patch14_dinov2"
    return VITS.get((embed_dim, depth)) or TIMM_VITS.get((embed_dim, depth, patch_size))


def _vit_parts(network, patches_only):
    """patches_only: the position embedding has no place for other tokens."""
    state, parts = network.state, {}
    has_layer_scale = "blocks.0.ls1.gamma" in state
    if has_layer_scale:
        parts["init_values"] = 1e-5  # the file's values take its place
    if "reg_token" in state:
        parts["reg_tokens"] = state["reg_token"].shape[1]
    if patches_only:
        parts["no_embed_class"] = True
    if "fc_norm.weight" in state and "norm.weight" not in state:
        parts["global_pool"] = "avg"
    if "blocks.0.attn.qkv.bias" not in state:
        parts["qkv_bias"] = False
    if network.layout.norm_eps and not has_layer_scale:
        parts["norm_eps"] = network.layout.norm_eps
    return parts


def _dinov3_settings(state, patches):
    """A ViT with rotary position embedding: under Meta's names (storage_tokens) or timm's."""
    if patches[0] not in (384, 768, 1024, 1280, 4096) or not {"storage_tokens", "reg_token"} & state.keys():
        return {}
    size = {384: "small", 768: "base", 1024: "large", 1280: "huge_plus", 4096: "7b"}[patches[0]]
    has_gates = {"blocks.0.mlp.w1.weight", "blocks.0.mlp.fc1_g.weight"} & state.keys()
    size += "_plus" if size == "small" and has_gates else ""
    is_biased = any(_has_bias(state, name) for name in state if name.endswith("attn.qkv.bias"))
    biased = "_qkvb" if is_biased or "blocks.0.attn.q_bias" in state else ""
    parts = {"global_pool": "token"} if "storage_tokens" in state else {}  # Meta's feature is the CLS token
    settings = {"arch": f"vit_{size}_patch16_dinov3{biased}", "patch_size": patches[2], "in_chans": patches[1]}
    return settings | {"parts": parts}


def _has_bias(state, name):
    """Whether queries or values have one; that of the keys is masked in DINOv3."""
    queries, _, values = state[name].chunk(3)
    return bool(queries.any() or values.any())


def _resnet(state):
    stages = [{name.split(".")[1] for name in state if name.startswith(f"layer{stage}.")} for stage in (1, 2, 3, 4)]
    convolutions = sum(f"layer1.0.conv{number}.weight" in state for number in (1, 2, 3))
    first = getattr(state.get("conv1.weight"), "shape", ())
    is_plain = first[2:] == (7, 7) and len(state["layer1.0.conv1.weight"]) == 64  # there are wide and grouped ones
    return RESNETS.get((*map(len, stages), convolutions)) if is_plain else None


# ---- what is known of a released network beside its tensors ----------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """name; is_by: whether a network (and its arch) is this method's; what its files do not say."""

    name: str
    is_by: Callable
    num_heads: int | None = None
    img_size: int | None = None  # pixels, at which its authors evaluate


DINOV2 = {"blocks.0.ls1.gamma", "mask_token", "pos_embed"}
METHODS = (
    Method("DINOv2", lambda net, arch: net.state.keys() >= DINOV2, img_size=224),
    Method("DINOv3", lambda net, arch: "dinov3" in arch),
    Method("MoCo-v3", lambda net, arch: arch == "vit_small" and _is_moco(net), num_heads=12),
    Method("MoCo", lambda net, arch: _is_moco(net)),
    Method("MAE", lambda net, arch: any(name.startswith("decoder_") for name in net.state)),
)


def _is_moco(network):
    return bool({"base_encoder", "momentum_encoder"} & set(network.path))


def method_of(network, arch):
    """The `Method` that made a network, or None where its names do not tell."""
    return next((method for method in METHODS if method.is_by(network, str(arch))), None)


# ---- whether a network's tensors are a backbone's --------------------------------------------------------------------


def check_fits(module, state, what):
    own = module.state_dict()
    missing = [name for name in own if name not in state]
    unexpected = [name for name in state if name not in own]
    misshaped = [name for name in own if name in state and own[name].shape != state[name].shape]
    if missing or unexpected or misshaped:
        matched = len(own) - len(missing) - len(misshaped)
        shapes = [f"{name} {shape_of(state[name])} instead of {shape_of(own[name])}" for name in misshaped]
        problems = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
        details = "; ".join(f"{kind}: {listed(names)}" for kind, names in problems.items() if names)
        raise UserError(
            f"{what}: {matched} of {len(own)} tensors match, so nothing was loaded; {details}; "
            "look at --checkpoint_key, --arch and --patch_size"
        )


def shape_of(tensor):
    return "x".join(map(str, tensor.shape)) or "scalar"


def few(names):
    return listed(list(names), most=4)


def listed(names, most=8):
    more = f" and {len(names) - most} more, {len(names)} in all" if len(names) > most else ""
    return ", ".join(names[:most]) + more


# ---- a network's weights for another form of images ------------------------------------------------------------------


def fit_shapes(state, own):
    """(the state dict, its weights in the shapes of `own`; what was changed, in words, one entry per tensor).

    own: a state dict under the same names, of a network that reads other patches or other channels.
    Channels: the mean over the file's, for each of C', times C / C': an image whose channels are alike gives what it
        gave before, so that one gray channel is the same as that channel three times.
    Patches: w' = pinv(B^T) w, where B resizes a patch (bicubic, antialiased). Of a larger patch the token is exactly
        that of the small one it was enlarged from, of a smaller one nearly so, in the mean over patches of white noise.
        Resizing w itself would change a token's length with the number of pixels. FlexiViT, arXiv 2212.08013."""
    fitted, changed = {}, []
    for name, weight in state.items():
        shape, why = own[name].shape, []
        if weight.ndim == 4 == len(shape) and weight.shape[1] != shape[1]:
            why.append(f"the mean of {weight.shape[1]} channels x {weight.shape[1]}/{shape[1]}")
            weight = weight.mean(1, keepdim=True).mul(weight.shape[1] / shape[1]).repeat(1, shape[1], 1, 1)
        if weight.ndim == 4 == len(shape) and weight.shape[2:] != shape[2:]:
            why.append("the pseudo-inverse of bicubic resizing (FlexiViT)")
            weight = resample_patch_embed(weight.float(), list(shape[2:]))
        if why:
            changed.append(f"{name} {shape_of(state[name])} -> {shape_of(weight)} by {', then '.join(why)}")
        fitted[name] = weight
    return fitted, changed


def channels_read(state, build):
    """The channels of the images that a network's tensors read, by the layers whose shape depends on them; None where
    the names are not ours. build: in_chans=... -> a network."""
    one, two = (build(in_chans=number).state_dict() for number in (1, 2))
    readers = {name for name in one if one[name].shape != two[name].shape} & state.keys()
    found = {state[name].shape[1] for name in readers if state[name].ndim == 4}
    return found.pop() if len(found) == 1 else None
