"""A checkpoint's backbone as a folder that timm and the Hugging Face hub open.

    python export_backbone.py --checkpoint runs/x/checkpoint.pth --output_dir exported
    python export_backbone.py --checkpoint runs/x/checkpoint.pth --output_dir exported \\
        --results runs/x/results_knn.json runs/x/results_linear.json

    exported/model.safetensors    the backbone's tensors under timm's names, without the head
    exported/config.json          from which timm builds the model, and which images it takes
    exported/README.md            the model card: data, flags of the training, results

    timm.create_model("local-dir:exported", pretrained=True)     # timm >= 1.0.20; "hf-hub:..." once it is uploaded
    pretrained.load_pretrained("exported/model.safetensors")       # here, and for our ResNets, which timm does not have

Before the folder is there, timm has opened it and given the features that the checkpoint gives.
"""

import argparse
import json
import math
import os
import shutil
from pathlib import Path

import safetensors.torch
import timm
import torch

import backbones
import data
import evaluation
import images
import pretrained
import utils
from checkpoint import load_checkpoint
from cplearn_head import CPLearnHead
from utils import UserError
from vision_transformer import VisionTransformer


def get_args_parser():
    parser = utils.ArgumentParser("export_backbone.py", "A checkpoint's backbone, for timm and the Hugging Face hub.")
    add = parser.add_argument
    add(
        "--checkpoint", "--pretrained_weights", dest="checkpoint", required=True, metavar="FILE",
        help="whatever the evaluations open: ours, or weights that others released",
    )  # fmt: skip
    add("--checkpoint_key", default=None, metavar="KEY", help="default: teacher, or the only one there is")
    add("--arch", default=None, metavar="NAME", help="backbone (default: as the file says)")
    add("--patch_size", type=utils.positive(int), default=None, help="pixels (default: as the file says)")
    add("--num_heads", type=utils.positive(int), default=None, help="of a ViT (default: as the file says)")
    add(
        "--device", default="auto", choices=("auto", "cuda", "mps", "cpu"),
        help="on which timm's features are compared with ours; default: cuda, else mps, else cpu",
    )  # fmt: skip
    add(
        "--results", nargs="+", default=[], metavar="FILE",
        help="results_*.json that evaluations of this checkpoint wrote, for the model card",
    )  # fmt: skip
    add("--output_dir", required=True, help="folder to make; one that holds something is refused")
    return parser


@utils.command_line
def main(argv=None):
    args = get_args_parser().parse_args(argv)
    device = utils.init_distributed(args.device)
    if utils.rank() > 0:
        return  # one process writes
    folder = Path(args.output_dir).resolve()
    check_folder(folder)
    model = pretrained.load_pretrained(
        args.checkpoint, args.checkpoint_key, args.arch, args.patch_size, num_heads=args.num_heads
    )
    config = timm_config(model)
    checkpoint = {} if args.checkpoint.endswith(".safetensors") else load_checkpoint(args.checkpoint)
    tables = {
        Path(path).stem.removeprefix("results_"): results_table(path, args.checkpoint, model) for path in args.results
    }
    card = model_card(model, config, checkpoint, tables, folder.name)
    write_export(folder, model, config, card, device, args.checkpoint)
    print(f"{folder}: {config['architecture']}, {len(model.backbone.state_dict())} tensors")


def check_folder(folder):
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"--output_dir {folder}: is there already; nothing is overwritten, name another or remove it")


# ---- config.json -----------------------------------------------------------------------------------------------------


def timm_config(model):
    """What config.json holds, in the layout of timm's exports to the hub; `dataset` is ours."""
    settings, architecture = model.settings, timm_name(model)
    known = timm.models.get_pretrained_cfg(architecture) if is_timm_s(model) else None
    in_chans, img_size = settings["in_chans"] or 3, settings["img_size"] or 224
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
            "first_conv": known and known.first_conv,
            "classifier": known and known.classifier,
        },
        "model_args": model_args,
        "dataset": settings["dataset"],
    }


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


# ---- README.md -------------------------------------------------------------------------------------------------------


def model_card(model, config, checkpoint, tables, name):
    """Markdown with the front matter that the hub reads. tables: {title: table}; name: of the folder."""
    library = "timm" if is_timm_s(model) else "pytorch"
    trained = trained_by(model, checkpoint)
    images = config["pretrained_cfg"]
    channels, height, width = images["input_size"]
    parameters = sum(p.numel() for p in model.backbone.parameters())
    stated = "" if model.settings["mean"] else " (assumed, the checkpoint does not say)"
    sections = [
        f"---\nlibrary_name: {library}\npipeline_tag: image-feature-extraction\n"
        f"tags:\n- image-feature-extraction\n- self-supervised-learning\n- {library}\n---",
        f"# {name}",
        f"{model.settings['arch']}, {trained}. {parameters / 1e6:.1f} M parameters, an image becomes "
        f"{model.embed_dim} features. No classifier, no projection head.",
        f"Images: {width} x {height} pixels, {channels} channel{'s' * (channels > 1)}, "
        f"mean {listed(images['mean'])} and standard deviation {listed(images['std'])} on the [0, 1] scale{stated}.",
        f"## Use\n\n{usage(model, name)}",
        f"## Pretraining\n\n{flags_table(checkpoint)}",
    ]
    if tables:
        scales = "Accuracies in percent; NMI, AMI and ARI in [0, 1]."
        results = "\n\n".join(f"### {title}\n\n{table}" for title, table in tables.items())
        sections.append(f"## Results\n\n{scales}\n\n{results}")
    return "\n\n".join(sections) + "\n"


def trained_by(model, checkpoint):
    """Method, data and duration, as far as the file says."""
    method = "a method that the checkpoint does not name"
    if isinstance(model.head, CPLearnHead):
        method = "[CPLearn](https://arxiv.org/abs/2410.04959)"
    elif "dino_loss" in checkpoint:
        method = "[DINO](https://arxiv.org/abs/2104.14294)"
    elif model.settings["objective"] is not None:
        method = f"`--objective {model.settings['objective']}`"
    on = f" on {model.settings['dataset']}" if model.settings["dataset"] else ""
    steps = checkpoint.get("step")
    return f"pretrained without labels by {method}{on}" + (f", {steps} steps" if isinstance(steps, int) else "")


def usage(model, name):
    ours = (
        f'With the code that it was exported by:\n\n    model = load_pretrained("{name}/model.safetensors")    '
        "# from pretrained import load_pretrained\n\n"
        f'    model = torch.hub.load(".", "cplearn", source="local", checkpoint="{name}/model.safetensors")'
    )
    if not is_timm_s(model):
        return f"timm has no such model. {ours}"
    return (
        f'With timm 1.0.20 or later; once uploaded, `"hf-hub:<user>/{name}"`:\n\n'
        f'    model = timm.create_model("local-dir:{name}", pretrained=True).eval()\n'
        f"    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))\n"
        f"    features = model(transform(image).unsqueeze(0))    # (1, {model.embed_dim})\n\n{ours}"
    )


def flags_table(checkpoint):
    """The training's flags, without those that name places on the machine it ran on."""
    args = checkpoint.get("args", {})
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    args = args if isinstance(args, dict) else {}
    rows = [
        {"flag": f"--{name}", "value": listed(value)}
        for name, value in args.items()
        if isinstance(value, str | int | float | list | tuple) and os.sep not in str(value)
    ]
    if not rows:
        return "The checkpoint does not say with which settings it was trained."
    return evaluation.markdown_table(rows, {"flag": ("flag", ""), "value": ("value", "")})


def listed(value):
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def results_table(path, checkpoint, model):
    """The rows of an evaluation's results as a Markdown table; raises UserError where this model is not among them."""
    try:
        content = json.loads(Path(path).read_text())
        rows, own = content["rows"], evaluation.fingerprint(model)
        names = [name for name, settings in content["models"].items() if settings["weights"] == own]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"--results {path}: not the JSON of an evaluation here ({error!r})") from error
    if not names:
        raise UserError(
            f"--results {path}: measured on {listed(list(content['models']))}, whose weights are not those of "
            f"{checkpoint}, {model.settings['checkpoint_key']}; evaluate it again"
        )
    rows = [row | {"checkpoint": "this model"} if row.get("checkpoint") in names else row for row in rows]
    keys = dict.fromkeys(key for row in rows for key, value in row.items() if not isinstance(value, dict | list))
    return evaluation.markdown_table(rows, {key: (key, number_format(key, rows)) for key in keys})


def number_format(key, rows):
    return ".6g" if any(isinstance(row.get(key), float) for row in rows) else ""


# ---- the folder ------------------------------------------------------------------------------------------------------


def write_export(folder, model, config, card, device, checkpoint):
    """Everything beside `folder`, opened once by timm, then renamed: a folder that is there is whole."""
    aside = folder.with_name(f".{folder.name}.tmp")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        tensors = {name: tensor.contiguous() for name, tensor in model.backbone.state_dict().items()}
        (aside / "model.safetensors").write_bytes(safetensors.torch.save(tensors, {"format": "pt"}))
        (aside / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        (aside / "README.md").write_text(card)
        if is_timm_s(model):
            check_in_timm(aside, model.to(device), config, device, checkpoint)
        os.replace(aside, folder)
    except OSError as error:
        raise UserError(f"--output_dir {folder}: cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@torch.no_grad()
def check_in_timm(folder, model, config, device, checkpoint):
    """Raises UserError where timm's model gives other features than ours."""
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval().to(device)
    views = torch.randn(2, *config["pretrained_cfg"]["input_size"], generator=torch.Generator().manual_seed(0))
    views = views.to(device)
    expected, found = model(views), theirs(views)
    if expected.shape != found.shape or not torch.allclose(expected, found, rtol=1e-3, atol=1e-4):
        raise UserError(
            f"{checkpoint}: timm {timm.__version__} builds another model from {config}, or the weights are not finite; "
            "nothing was exported"
        )


if __name__ == "__main__":
    main()
