"""Entry points as torch.hub calls them, from a process that holds other modules of the same names."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hubconf
from backbones import build_backbone
from cplearn_head import CPLearnHead
from pretrained import PretrainedModel, load_pretrained

HERE = str(Path(hubconf.__file__).parent)
IMAGES = torch.randn(3, 1, 16, 16, generator=torch.Generator().manual_seed(0))


def load(name, **kwargs):
    return torch.hub.load(HERE, name, source="local", **kwargs)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("hub") / "checkpoint.pth"
    torch.manual_seed(0)
    backbone, head = build_backbone("resnet8", in_chans=1, width=12), CPLearnHead(12, 64, activation="l2")
    state = {f"backbone.{k}": v for k, v in backbone.state_dict().items()}
    state |= {f"head.{k}": v for k, v in head.state_dict().items()}
    args = {"arch": "resnet8", "img_size": 16, "in_chans": 1, "mean": [0.5], "std": [0.25], "activation": "l2"}
    torch.save({"student": state, "teacher": state, "args": args}, path)
    return str(path)


def test_a_checkpoint_s_model_is_frozen_and_the_same(checkpoint):
    model, expected = load("cplearn", checkpoint=checkpoint), load_pretrained(checkpoint)
    assert isinstance(model, PretrainedModel)  # of the modules imported already, not of a second copy
    assert torch.equal(model(IMAGES), expected(IMAGES))
    assert torch.equal(model.assign(IMAGES), expected.assign(IMAGES))
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert model.settings == load("cplearn", checkpoint=checkpoint, checkpoint_key="teacher").settings


def test_a_backbone_can_be_trained_on(checkpoint):
    backbone = load("cplearn_backbone", checkpoint=checkpoint, checkpoint_key="student", in_chans=1)
    assert torch.equal(backbone(IMAGES), load_pretrained(checkpoint)(IMAGES))
    backbone(IMAGES).sum().backward()
    assert all(p.grad is not None for p in backbone.parameters())


@pytest.mark.parametrize(
    ("name", "settings", "images", "width"),
    [
        ("vit_mini", {"patch_size": 4, "img_size": 8}, torch.randn(1, 3, 8, 8), 128),
        ("vit_tiny", {"patch_size": 8, "img_size": 16, "in_chans": 1}, IMAGES, 192),
        ("vit_small", {"patch_size": 8, "img_size": 16}, torch.randn(1, 3, 16, 16), 384),
        ("resnet8", {"in_chans": 1, "width": 20}, IMAGES, 20),
        ("resnet18", {"in_chans": 1}, IMAGES, 512),
    ],
)
def test_untrained_backbones(name, settings, images, width):
    torch.manual_seed(0)
    features = load(name, **settings).eval()(images)
    torch.manual_seed(0)
    assert torch.equal(features, build_backbone(name, **settings).eval()(images))
    assert features.shape == (len(images), width)


@pytest.mark.parametrize("name", ["vit_base", "vit_large"])
def test_large_backbones(name):
    with torch.device("meta"):
        assert load(name, patch_size=32).embed_dim == {"vit_base": 768, "vit_large": 1024}[name]


def test_weights_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="vit_small: there are no released weights"):
        load("vit_small", pretrained=True)


def test_only_entry_points_are_public():
    """What torch.hub.list shows is every callable, and torch.hub.help its docstring."""
    entries = {name for name, value in vars(hubconf).items() if callable(value) and not name.startswith("_")}
    models = {"vit_mini", "vit_tiny", "vit_small", "vit_base", "vit_large", "resnet8", "resnet18"}
    assert entries == models | {"cplearn", "cplearn_backbone"}
    assert all(inspect.getdoc(getattr(hubconf, name)) for name in entries)


def test_modules_of_the_same_name_do_not_disturb(checkpoint, tmp_path):
    """DINO's repository has a utils.py and a vision_transformer.py; here they hold nothing that ours have. Nor does a
    package images, with a folders of its own."""
    (tmp_path / "images").mkdir()
    for name in ("utils", "vision_transformer", "images/__init__", "images/folders"):
        (tmp_path / f"{name}.py").write_text("theirs = True\n")
    program = (
        "import sys, torch, utils, vision_transformer, images.folders\n"
        f"for _ in range(2): model = torch.hub.load({HERE!r}, 'cplearn', source='local', checkpoint={checkpoint!r})\n"
        f"torch.hub.load({HERE!r}, 'vit_tiny', source='local')\n"
        "assert sys.modules['utils'] is utils and sys.modules['vision_transformer'].theirs\n"
        "assert sys.modules['images'] is images and sys.modules['images.folders'].theirs\n"
        "assert sys.modules['pretrained'].images.DATASETS and 'images.decoding' not in sys.modules\n"
        "print(model.embed_dim)\n"
    )
    (tmp_path / "program.py").write_text(program)
    done = subprocess.run([sys.executable, "program.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "12\n", done.stderr
