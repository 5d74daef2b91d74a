"""The form of timm's exports: model.safetensors under timm's names and a config.json, which the hub opens too.

Our ResNets, which timm does not have, get the same two files, and are opened by `pretrained.load_pretrained`.
"""

import contextlib
import io
import json
import math

import safetensors.torch
import timm

import backbones
import data
import images
import pretrained
from exports import input_channels
from vision_transformer import VisionTransformer


class TimmFolder:
    """See `exports`."""

    needs = ("timm",)
    on_device = True

    def __init__(self, model, config):
        self.model, self.config = model, config
        self.library = "timm" if is_timm_s(model) else "pytorch"
        self.program = f"timm {timm.__version__}" if is_timm_s(model) else "load_pretrained"
        self.sizes = [tuple(config["pretrained_cfg"]["input_size"][1:])]

    def write(self, folder):
        tensors = {name: tensor.contiguous() for name, tensor in self.model.backbone.state_dict().items()}
        (folder / "model.safetensors").write_bytes(safetensors.torch.save(tensors, {"format": "pt"}))
        write_config(folder, self.config)

    def open(self, folder, device):
        if is_timm_s(self.model):
            return timm.create_model(f"local-dir:{folder}", pretrained=True).eval().to(device)
        with contextlib.redirect_stderr(io.StringIO()):  # it says what it reads, from a folder that will be renamed
            return pretrained.load_pretrained(folder / "model.safetensors").to(device)

    def usage(self, name):
        if not is_timm_s(self.model):
            return f"timm has no such model. {usage_here(name)}"
        return (
            f'With timm 1.0.20 or later; once uploaded, `"hf-hub:<user>/{name}"`:\n\n'
            f'    model = timm.create_model("local-dir:{name}", pretrained=True).eval()\n'
            f"    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))\n"
            f"    features = model(transform(image).unsqueeze(0))    # (1, {self.model.embed_dim})\n\n"
            f"{usage_here(name)}"
        )


def usage_here(name):
    """How this code opens a folder with a model.safetensors."""
    return (
        f'With the code that it was exported by:\n\n    model = load_pretrained("{name}/model.safetensors")    '
        "# from pretrained import load_pretrained\n\n"
        f'    model = torch.hub.load(".", "cplearn", source="local", checkpoint="{name}/model.safetensors")'
    )


def write_config(folder, config):
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def timm_config(model):
    """What config.json holds, in the layout of timm's exports to the hub; `dataset` and `how_read` are ours."""
    settings, architecture = model.settings, timm_name(model)
    known = timm.models.get_pretrained_cfg(architecture) if is_timm_s(model) else None
    in_chans, img_size = input_channels(model.backbone), settings["img_size"] or 224
    known_images = images.DATASETS.get(settings["dataset"], images.DATASETS["imagefolder"])
    model_args = timm_arguments(model.backbone)
    return {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": model.embed_dim,
        "pretrained_cfg": {
            "input_size": [in_chans, img_size, img_size],
            "fixed_input_size": "img_size" in model_args and "dynamic_img_size" not in model_args,
            "interpolation": "bicubic",
            "crop_pct": crop_pct(img_size, settings["dataset"]),
            "crop_mode": "center",
            "mean": settings["mean"] or data.fit_channels(known_images["mean"], in_chans),
            "std": settings["std"] or data.fit_channels(known_images["std"], in_chans),
            "num_classes": 0,
            "pool_size": None,
            # timm before 1.0.31 takes the weights of a named one for those of 3 channels, and makes others of them
            "first_conv": known.first_conv if known and in_chans in (1, 3) else None,
            "classifier": known and known.classifier,
        },
        "model_args": model_args,
        "dataset": settings["dataset"],
        **how_read(settings),
    }


def how_read(settings):
    """What the file says of how images become levels, under our names; other programs pass it over."""
    names = ("value_range", "pages", "float_pixels")
    return {name: settings[name] for name in names if settings.get(name) is not None}


def crop_pct(img_size, dataset):
    """Of data.eval_batches: sets in memory are taken whole; of others the shorter side becomes img_size * 256 / 224 px,
    rounded, which timm makes floor(img_size / crop_pct)."""
    if dataset not in (None, "imagefolder"):
        return 1.0
    return math.floor(10_000 * img_size / round(img_size * 256 / 224)) / 10_000


def is_timm_s(model):
    """Whether timm has a name for it."""
    return isinstance(model.backbone, VisionTransformer) or model.settings["arch"] not in backbones.ARCHS


def timm_name(model):
    """Our ViTs are timm's of patch size 16 with other arguments: timm has no names for most patch sizes, and none for
    vit_mini."""
    arch = model.settings["arch"]
    if not isinstance(model.backbone, VisionTransformer):
        return arch
    return name if timm.is_model(name := f"{arch}_patch16_224") else "vit_tiny_patch16_224"


def timm_arguments(backbone):
    """With which timm's constructor makes this backbone, beside the channels; img_size is the position embedding's."""
    arguments = {}
    embedded = getattr(getattr(backbone, "patch_embed", None), "img_size", None)
    if embedded is not None:
        arguments["img_size"] = embedded[0]
    if getattr(backbone, "dynamic_img_size", False):
        arguments["dynamic_img_size"] = True
    if isinstance(backbone, VisionTransformer):
        arguments["patch_size"] = backbone.patch_size
        arguments["embed_dim"], arguments["depth"] = backbone.embed_dim, len(backbone.blocks)
        arguments["num_heads"] = backbone.blocks[0].attn.num_heads
        arguments |= backbone.parts
    return arguments
