"""A checkpoint's backbone as a folder that timm, transformers, an ONNX runtime or torch alone opens.

    python export_backbone.py --checkpoint runs/x/checkpoint.pth --output_dir exported
    python export_backbone.py --checkpoint runs/x/checkpoint.pth --output_dir exported --format onnx

    --format timm     model.safetensors, config.json          timm.create_model("local-dir:exported", pretrained=True)
             hf       model.safetensors, config.json, ...      transformers.AutoModel.from_pretrained("exported")
             onnx     model.onnx, config.json                 onnxruntime.InferenceSession("exported/model.onnx")
             torch    model.pt2, config.json                  torch.export.load("exported/model.pt2").module()

The first two are also for pretrained.load_pretrained("exported/model.safetensors") and for our ResNets, which timm does
not have, the first. README.md is the model card: data, flags of the training, results of the evaluations.

Before the folder is there, its program has opened it and given the features that the checkpoint gives, to 1e-4.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import evaluation
import exports
import pretrained
import utils
from checkpoint import load_checkpoint
from cplearn_head import CPLearnHead
from exports.graphs import Onnx, TorchExport
from exports.hugging_face import HuggingFace
from exports.timm_folder import TimmFolder, timm_config
from utils import UserError

FORMATS = {"timm": TimmFolder, "hf": HuggingFace, "onnx": Onnx, "torch": TorchExport}


def get_args_parser():
    parser = utils.ArgumentParser("export_backbone.py", "A checkpoint's backbone, for other programs.")
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
        "--format", default="timm", choices=FORMATS,
        help="timm: a folder for timm and the hub; hf: a folder for transformers' AutoModel; onnx: model.onnx; torch: "
        "model.pt2, of torch.export (default: %(default)s)",
    )  # fmt: skip
    add(
        "--device", default="auto", choices=("auto", "cuda", "mps", "cpu"),
        help="on which timm's or transformers' features are compared with ours; default: cuda, else mps, else cpu",
    )  # fmt: skip
    add(
        "--results", nargs="+", default=[], metavar="FILE",
        help="results_*.json that evaluations of this checkpoint wrote, for the model card (default: those "
        "in its folder)",
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
    exports.check_packages(FORMATS[args.format], f"--format {args.format}")
    form = FORMATS[args.format](model, config)
    checkpoint = {} if args.checkpoint.endswith(".safetensors") else load_checkpoint(args.checkpoint)
    card = model_card(model, config, checkpoint, find_results(args, model), form, folder.name)
    exports.write_checked(folder, form, card, model, device if form.on_device else "cpu", args.checkpoint)
    print(f"{folder}: {config['architecture']}, {len(model.backbone.state_dict())} tensors")


def check_folder(folder):
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"--output_dir {folder}: is there already; nothing is overwritten, name another or remove it")


# ---- README.md -------------------------------------------------------------------------------------------------------


def model_card(model, config, checkpoint, tables, form, name):
    """Markdown with the front matter that the hub reads. tables: {title: its text}; form: see `exports`; name: of the
    folder."""
    trained = trained_by(model, checkpoint)
    images = config["pretrained_cfg"]
    channels, height, width = images["input_size"]
    parameters = sum(p.numel() for p in model.backbone.parameters())
    low_high = model.settings.get("value_range")
    scale = f", on which {low_high[0]:g} is 0 and {low_high[1]:g} is 1" if low_high else ""
    stated = "" if model.settings["mean"] else " (assumed, the checkpoint does not say)"
    sections = [
        f"---\nlibrary_name: {form.library}\npipeline_tag: image-feature-extraction\n"
        f"tags:\n- image-feature-extraction\n- self-supervised-learning\n- {form.library}\n---",
        f"# {name}",
        f"{model.settings['arch']}, {trained}. {parameters / 1e6:.1f} M parameters, an image becomes "
        f"{model.embed_dim} features. No classifier, no projection head.",
        f"Images: {width} x {height} pixels, {channels} channel{'s' * (channels > 1)}, "
        f"mean {listed(images['mean'])} and standard deviation {listed(images['std'])} "
        f"on the [0, 1] scale{scale}{stated}.",
        f"## Use\n\n{form.usage(name)}",
        f"## Pretraining\n\n{flags_table(checkpoint)}",
    ]
    return "\n\n".join([*sections, f"## Results\n\n{results_section(tables)}"]) + "\n"


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


# ---- results of the evaluations --------------------------------------------------------------------------------------

PROTOCOLS = {  # by the name of their files
    "knn": "weighted vote of the nearest neighbours on frozen features",
    "cluster": "codes and k-means of frozen features against the labels",
    "collapse": "statistics of frozen features, no score",
    "dense": "segmentation from frozen patch features",
}


def results_section(tables):
    if not tables:
        return "There are none: no evaluation of these weights was in the run's folder."
    scales = "Accuracies in percent; NMI, AMI and ARI in [0, 1]."
    return "\n\n".join([scales, *(f"### {title}\n\n{text}" for title, text in tables.items())])


def find_results(args, model):
    """{title: text} of the files of --results; by default of those in the checkpoint's folder that are of this model,
    and a line says which are not."""
    paths, found = args.results or sorted(Path(args.checkpoint).parent.glob("results_*.json")), {}
    for path in paths:
        try:
            found[Path(path).stem.removeprefix("results_")] = results_text(path, args.checkpoint, model)
        except UserError as error:
            if args.results:
                raise
            print(f"left out of the card: {str(error).removeprefix('--results ')}", file=sys.stderr)
    return found


def results_text(path, checkpoint, model):
    """Data set, protocol and rows of an evaluation as Markdown; raises UserError where this model is not among them."""
    try:
        content = json.loads(Path(path).read_text())
        rows, own = content["rows"], evaluation.fingerprint(model)
        names = [name for name, settings in content["models"].items() if settings["weights"] == own]
        measured = how_measured(content, Path(path).stem.removeprefix("results_"), content["models"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"--results {path}: not the JSON of an evaluation here ({error!r})") from error
    if not names:
        raise UserError(
            f"--results {path}: measured on {listed(list(content['models']))}, whose weights are not those of "
            f"{checkpoint}, {model.settings['checkpoint_key']}; evaluate it again"
        )
    rows = [row | {"checkpoint": "this model"} if row.get("checkpoint") in names else row for row in rows]
    keys = dict.fromkeys(key for row in rows for key, value in row.items() if not isinstance(value, dict | list))
    table = evaluation.markdown_table(rows, {key: (key, number_format(key, rows)) for key in keys})
    return f"{measured}\n\n{table}"


def how_measured(content, name, models):
    """One sentence: data set, number of images, protocol."""
    settings = content.get("settings", {})
    dataset = settings.get("dataset") or next(
        (m["dataset"] for m in models.values() if m.get("dataset")), "imagefolder"
    )
    roots = settings.get("data_path") or []
    folder = "".join(f" {Path(root).name}" for root in (roots if isinstance(roots, list) else [roots]))
    numbers = [
        f"{content[key]:,} {split} images" for key, split in NUMBERS.items() if isinstance(content.get(key), int)
    ]
    protocol = settings.get("protocol") or PROTOCOLS.get(name, name)
    return f"Data set: {dataset}{folder}{''.join(f', {each}' for each in numbers)}. Protocol: {protocol}."


NUMBERS = {"num_train": "training", "num_test": "test", "num_images": "evaluated"}


def number_format(key, rows):
    return ".6g" if any(isinstance(row.get(key), float) for row in rows) else ""


if __name__ == "__main__":
    main()
