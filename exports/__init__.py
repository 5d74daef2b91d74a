"""A frozen model in the forms that other programs open: timm_folder.py, hugging_face.py, graphs.py.

    form = HuggingFace(model, config)                   # UserError where the form has no place for the model
    write_checked(folder, form, card, device, path)     # the folder is there, whole, only if its program agrees with us

A form has .library (its name on the hub), .needs (packages that open it), .sizes ([(height, width)] at which it is
compared), .write(folder), .open(folder, device) -> a function of images (B, C, h, w) to features (B, D), .usage(name)
(Markdown: how it is opened), .program (who opens it, in words), .on_device (whether it is compared on a GPU too).
"""

import importlib

import torch

from running.files import new_folder
from utils import UserError, one_line

TOLERANCE = 1e-4  # of a feature, in float32
BATCH_SIZES = (1, 3)  # neither is the batch that a graph is made from


def check_packages(form, flag):
    """Raises UserError where a package that opens the form is not installed."""
    for package in form.needs:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise UserError(f"{flag} needs {package} ({error}): pip install {' '.join(form.needs)}") from error


def write_checked(folder, form, card, model, device, checkpoint):
    """Everything beside `folder`, opened once by the form's program, then renamed: a folder that is there is whole."""
    try:
        with new_folder(folder) as aside:
            (aside / "README.md").write_text(card, encoding="utf-8")
            write(aside, form, folder)
            check(aside, form, model.to(device), device, checkpoint)
    except OSError as error:
        raise UserError(f"--output_dir {folder}: cannot be written: {error.strerror or error}") from error


def write(aside, form, folder):
    """Raises OSError, and UserError for what the programs that write have instead of it."""
    try:
        form.write(aside)
    except OSError:
        raise
    except Exception as error:  # of torch's, safetensors' and ONNX's writers
        raise UserError(
            f"--output_dir {folder}: the file for {form.program} cannot be written: {one_line(error)}; nothing was "
            "exported"
        ) from error


@torch.no_grad()
def check(folder, form, model, device, checkpoint):
    """Raises UserError where the form's program gives other features than the model, on random images."""
    try:
        features_of = form.open(folder, device)
        differences = [difference(features_of, model, shape, device) for shape in shapes(form, model)]
    except Exception as error:  # a program of others may raise anything at a damaged file
        raise UserError(
            f"{checkpoint}: {form.program} cannot open what was written: {one_line(error)}; nothing was exported"
        ) from error
    if not max(differences) <= TOLERANCE:  # NaN is no agreement either
        raise UserError(
            f"{checkpoint}: {form.program} builds another model from the export, whose features differ by "
            f"{max(differences):.2g}, or the weights are not finite; nothing was exported"
        )


def shapes(form, model):
    """Each batch size at each size, the largest batch first: (B, C, h, w)."""
    return [(batch, input_channels(model.backbone), *size) for batch in BATCH_SIZES[::-1] for size in form.sizes]


def difference(features_of, model, shape, device):
    """The largest of any feature, infinite where the two have not the same features."""
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    expected, found = model(images).cpu(), torch.as_tensor(features_of(images)).cpu()
    if expected.shape != found.shape:
        return float("inf")
    largest = float((expected - found).abs().max())
    return largest if largest == largest else float("inf")


def input_channels(backbone):
    """Of the images that it takes, as its first convolution has it."""
    return next(part.in_channels for part in backbone.modules() if isinstance(part, torch.nn.Conv2d))
