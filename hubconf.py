"""Entry points for torch.hub: a checkpoint's frozen model, and the backbones untrained.

    model = torch.hub.load("path/to/this/folder", "cplearn", source="local", checkpoint="runs/x/checkpoint.pth")
    features = model(images)        # (B, C, h, w), normalised with model.settings["mean"] and ["std"] -> (B, D)
    codes = model.assign(images)    # (B,) int64, None for a file without a head

    backbone = torch.hub.load("path/to/this/folder", "vit_small", source="local", patch_size=8)

There are no released weights, and nothing is downloaded.
"""

import importlib as _importlib
import pathlib as _pathlib
import sys as _sys

dependencies = ["torch", "torchvision", "timm", "numpy", "PIL", "safetensors", "tqdm"]


def cplearn(checkpoint, checkpoint_key=None, **kwargs):
    """The frozen model of a checkpoint, in eval mode, on CPU: images (B, C, h, w) -> features (B, D).

    checkpoint: a file of ours, or weights that others released.  checkpoint_key: which model of the file; default
    teacher, or the only one.  kwargs: arch, patch_size, img_size, in_chans, num_heads, where the file does not say.
    """
    return _pretrained.load_pretrained(checkpoint, checkpoint_key, **kwargs)


def cplearn_backbone(checkpoint, checkpoint_key=None, **kwargs):
    """The backbone alone of the same model, such as for fine-tuning: its parameters can be trained."""
    return cplearn(checkpoint, checkpoint_key, **kwargs).backbone.requires_grad_(True)


def vit_mini(pretrained=False, **kwargs):
    """A ViT for images of about 32 px, D = 128, 4 blocks, untrained. kwargs as for vit_tiny."""
    return _untrained("vit_mini", pretrained, kwargs)


def vit_tiny(pretrained=False, **kwargs):
    """ViT-T/16, D = 192, untrained. kwargs: patch_size, img_size, in_chans, drop_path_rate, grad_checkpointing."""
    return _untrained("vit_tiny", pretrained, kwargs)


def vit_small(pretrained=False, **kwargs):
    """ViT-S/16, D = 384, untrained. kwargs as for vit_tiny."""
    return _untrained("vit_small", pretrained, kwargs)


def vit_base(pretrained=False, **kwargs):
    """ViT-B/16, D = 768, untrained. kwargs as for vit_tiny."""
    return _untrained("vit_base", pretrained, kwargs)


def vit_large(pretrained=False, **kwargs):
    """ViT-L/16, D = 1024, untrained. kwargs as for vit_tiny."""
    return _untrained("vit_large", pretrained, kwargs)


def resnet8(pretrained=False, **kwargs):
    """The paper's ResNet-8 for images of about 32 px, D = width = 128, untrained. kwargs: in_chans, width."""
    return _untrained("resnet8", pretrained, kwargs)


def resnet18(pretrained=False, **kwargs):
    """ResNet-18 for images of about 32 px, D = 512, untrained. kwargs: in_chans."""
    return _untrained("resnet18", pretrained, kwargs)


def _untrained(arch, pretrained, kwargs):
    if pretrained:
        raise ValueError(f"{arch}: there are no released weights; load your own with the entry point cplearn")
    return _backbones.build_backbone(arch, **kwargs)


def _import_ours(*names):
    """Modules and packages of this folder, whatever else has their names: DINO's repository has a utils and a
    vision_transformer too, and whoever loads both by torch.hub would get the first one's."""
    here = _pathlib.Path(__file__).resolve().parent
    ours = {path.stem: str(path) for path in here.glob("*.py")}
    ours |= {path.parent.name: str(path) for path in here.glob("*/__init__.py")}
    taken = {name for name in ours.keys() & _sys.modules.keys() if not _is_at(_sys.modules[name], ours[name])}
    theirs = _pop_modules(taken)
    try:
        return [_importlib.import_module(name) for name in names]
    finally:
        _pop_modules(taken)
        _sys.modules.update(theirs)


def _is_at(module, path):
    return getattr(module, "__file__", None) == path


def _pop_modules(names):
    """The modules of these names, with what packages among them hold."""
    return {name: _sys.modules.pop(name) for name in list(_sys.modules) if name.split(".")[0] in names}


_pretrained, _backbones = _import_ours("pretrained", "backbones")
