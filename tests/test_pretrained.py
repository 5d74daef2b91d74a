"""Files of every kind a user may have, made here: what opens gives the right features, what does not says why."""

import argparse
import functools
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch

from backbones import build_backbone
from cplearn_head import CPLearnHead
from pretrained import (
    PretrainedModel,
    add_checkpoint_arguments,
    choose_dataset,
    load_pretrained,
    open_model,
)
from utils import UserError

IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@functools.cache
def vit(seed, patch_size=8, in_chans=3):
    torch.manual_seed(seed)
    return build_backbone("vit_tiny", img_size=32, patch_size=patch_size, in_chans=in_chans).eval()


def prefixed(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


def dino_head():
    shapes = {"mlp.0.weight": (32, 192), "mlp.2.weight": (32, 32), "mlp.4.weight": (32, 32)}
    shapes |= {f"mlp.{i}.bias": (32,) for i in (0, 2, 4)}
    shapes |= {"last_layer.weight_g": (100, 1), "last_layer.weight_v": (100, 32)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    """(path of a training checkpoint as DINO writes it, its student, its teacher)."""
    path = tmp_path_factory.mktemp("dino") / "checkpoint.pth"
    student, teacher = vit(0), vit(1)
    args = argparse.Namespace(arch="vit_tiny", patch_size=8, lr=np.float64(5e-4), output_dir=Path("/somewhere"), seed=0)
    checkpoint = {
        "student": prefixed("module.backbone.", student.state_dict()) | prefixed("module.head.", dino_head()),
        "teacher": prefixed("backbone.", teacher.state_dict()) | prefixed("head.", dino_head()),
        "optimizer": {"state": {}, "param_groups": [{"lr": np.float64(1e-3), "weight_decay": np.float64(0.04)}]},
        "epoch": 17,
        "args": args,
        "dino_loss": {"center": torch.zeros(1, 100)},
    }
    torch.save(checkpoint, path)
    return path, student, teacher


@pytest.mark.parametrize("key", [None, "teacher", "student"])
def test_dino_s_training_checkpoint(dino, key):
    path, student, teacher = dino
    model = load_pretrained(path, checkpoint_key=key)
    source = student if key == "student" else teacher
    with torch.no_grad():
        assert torch.equal(model(IMAGES), source(IMAGES))
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    expected = {"arch": "vit_tiny", "patch_size": 8, "img_size": 32, "in_chans": 3, "epoch": 17, "mean": None}
    assert model.settings | expected == model.settings
    assert model.settings["checkpoint_key"] == (key or "teacher")


@pytest.mark.parametrize(("activation", "seed"), [("l2", 3), ("tanh", 4)])
def test_our_checkpoint_gives_features_and_codes(tmp_path, activation, seed):
    torch.manual_seed(0)
    backbone = build_backbone("resnet8", width=24).eval()
    head = CPLearnHead(24, out_dim=1001, proj_dim=20, activation=activation, batch_size=512, seed=seed)
    head(torch.randn(50, 24))  # moves the running statistics
    state = prefixed("backbone.", backbone.state_dict()) | prefixed("head.", head.state_dict())
    args = {
        "arch": "resnet8",
        "img_size": 32,
        "patch_size": 16,
        "in_chans": 3,
        "mean": [0.1, 0.2, 0.3],
        "std": [1.0] * 3,
    }
    args |= {"activation": activation, "dataset": "cifar10", "out_dim": 1001, "proj_dim": 20, "width": 24}
    torch.save(
        {"format": "cplearn 2", "student": state, "teacher": state, "epoch": 3, "args": args}, tmp_path / "c.pth"
    )

    model = load_pretrained(tmp_path / "c.pth")
    with torch.no_grad():
        features = backbone(IMAGES)
        expected = head.eval().logits(head(features)).argmax(dim=1)
        assert torch.equal(model(IMAGES), features)
    assert torch.equal(model.assign(IMAGES), expected)
    assert model.assign(IMAGES).dtype == torch.int64
    assert model.head.tau == head.tau  # of a batch of 512
    assert model.settings["mean"] == [0.1, 0.2, 0.3]
    assert model.settings["dataset"] == "cifar10"
    assert model.settings["patch_size"] is None  # a ResNet has none, whatever the flags said


FLAT_FILES = {
    "released by DINO": lambda state: state,
    "with prefixes": lambda state: prefixed("module.backbone.", state),
    "compiled": lambda state: prefixed("_orig_mod.", state),
    "half precision": lambda state: {name: tensor.half() for name, tensor in state.items()},
    "under one key": lambda state: {"model": state},
    "with DINO's head": lambda state: prefixed("backbone.", state) | prefixed("head.", dino_head()),
}


@pytest.mark.parametrize("kind", FLAT_FILES)
def test_flat_files_are_known_by_their_shapes(tmp_path, kind):
    backbone = vit(0)
    torch.save(FLAT_FILES[kind](backbone.state_dict()), tmp_path / "weights.pth")
    model = load_pretrained(tmp_path / "weights.pth")
    tolerance = 0.05 if kind == "half precision" else 0
    with torch.no_grad():
        torch.testing.assert_close(model(IMAGES), backbone(IMAGES), atol=tolerance, rtol=0)
    assert model.settings["arch"] == "vit_tiny"
    assert (model.settings["img_size"], model.settings["patch_size"]) == (32, 8)


def test_safetensors(tmp_path):
    backbone = vit(6, patch_size=16, in_chans=1)
    safetensors.torch.save_file(backbone.state_dict(), tmp_path / "weights.safetensors")
    model = load_pretrained(str(tmp_path / "weights.safetensors"))
    with torch.no_grad():
        assert torch.equal(model(IMAGES[:, :1]), backbone(IMAGES[:, :1]))
    assert (model.settings["in_chans"], model.settings["patch_size"]) == (1, 16)


def test_timm_s_classifier_is_left_out_and_said_so(tmp_path, capsys):
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=1000).eval()
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    model = load_pretrained(tmp_path / "timm.pth")
    assert "left out: head (2 tensors)" in capsys.readouterr().err
    with torch.no_grad():
        torch.testing.assert_close(model(IMAGES), theirs.forward_features(IMAGES)[:, 0], atol=1e-5, rtol=1e-5)


def test_a_timm_backbone_and_its_classifier(tmp_path):
    theirs = timm.create_model("test_resnet", num_classes=10).eval()
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    model = load_pretrained(tmp_path / "timm.pth", arch="test_resnet")
    with torch.no_grad():
        torch.testing.assert_close(model(IMAGES), theirs.forward_head(theirs.forward_features(IMAGES), pre_logits=True))


def test_another_image_size_interpolates(dino):
    path, _, teacher = dino
    model = load_pretrained(path, img_size=48)
    x = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        assert torch.equal(model(x), teacher(x))
    assert model.settings["img_size"] == 48


def test_a_name_of_dino_s_that_timm_does_not_know(tmp_path):
    state = {"teacher": prefixed("backbone.", vit(0).state_dict())}
    torch.save(state | {"args": argparse.Namespace(arch="deit_tiny", patch_size=8)}, tmp_path / "old.pth")
    assert load_pretrained(tmp_path / "old.pth").settings["arch"] == "vit_tiny"


def test_timm_s_config_stands_beside_its_safetensors(tmp_path):
    theirs = timm.create_model("test_resnet", num_classes=0, in_chans=1).eval()
    safetensors.torch.save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="name it with --arch"):
        load_pretrained(tmp_path / "model.safetensors")
    images = {"mean": [0.1], "std": [0.2], "input_size": [1, 48, 48]}
    config = {"architecture": "test_resnet", "num_classes": 0, "pretrained_cfg": images}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = load_pretrained(tmp_path / "model.safetensors")
    expected = {"arch": "test_resnet", "mean": [0.1], "std": [0.2], "in_chans": 1, "img_size": 48}
    assert model.settings | expected == model.settings
    with torch.no_grad():
        torch.testing.assert_close(model(IMAGES[:, :1]), theirs(IMAGES[:, :1]))
    for damaged in ("{", "[]", '{"pretrained_cfg": {"input_size": 3}}'):
        (tmp_path / "config.json").write_text(damaged)
        assert "not a config.json as timm writes it" in refusal(tmp_path / "model.safetensors")


@pytest.mark.parametrize("arch", ["test_vit", "test_vit2", "test_vit3", "test_vit4"])  # registers, norms, averages
def test_a_vit_with_other_parts_than_ours_is_timm_s(tmp_path, arch):
    theirs = timm.create_model(arch, num_classes=0).eval()
    safetensors.torch.save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": arch}))
    model = load_pretrained(tmp_path / "model.safetensors")
    images = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        torch.testing.assert_close(model(images), theirs(images))


# ---- DINO's head, and DINO's features for a linear probe -------------------------------------------------------------


class TheirHead(torch.nn.Module):
    """DINO's head as its paper describes it, with torch's own weight norm."""

    def __init__(self, norms, layers, in_dim=192, hidden=24, bottleneck=10, num_prototypes=50):
        super().__init__()
        widths = [in_dim, *[hidden] * (layers - 1), bottleneck]
        parts = []
        for i in range(layers):
            norm = [torch.nn.BatchNorm1d(widths[i + 1])] if norms else []
            parts += [torch.nn.Linear(widths[i], widths[i + 1]), *norm, torch.nn.GELU()]
        parts = parts[: -2 if norms else -1]
        self.mlp = torch.nn.Sequential(*parts) if layers > 1 else parts[0]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the form whose names are in DINO's files
            self.last_layer = torch.nn.utils.weight_norm(torch.nn.Linear(bottleneck, num_prototypes, bias=False))

    def forward(self, x):
        return self.last_layer(torch.nn.functional.normalize(self.mlp(x), dim=-1))


@pytest.mark.parametrize(("norms", "layers"), [(False, 3), (True, 3), (False, 1), (False, 2)])
def test_dino_s_prototypes_are_codes(tmp_path, norms, layers):
    torch.manual_seed(0)
    theirs = TheirHead(norms, layers)
    theirs(torch.randn(40, 192) + 1)  # moves running statistics
    theirs.eval()
    with torch.no_grad():
        theirs.last_layer.weight_g.uniform_(0.5, 2)  # trained, as without --norm_last_layer
    state = prefixed("backbone.", vit(0).state_dict()) | prefixed("head.", theirs.state_dict())
    torch.save({"teacher": state}, tmp_path / "dino.pth")
    model = load_pretrained(tmp_path / "dino.pth")
    features = torch.randn(200, 192)
    with torch.no_grad():
        torch.testing.assert_close(model.head(features), theirs(features), atol=1e-5, rtol=1e-5)
    assert torch.equal(model.assign_features(features), theirs(features).argmax(dim=1))
    assert torch.equal(model.assign(IMAGES), model.assign_features(model(IMAGES)))


def test_a_head_of_another_width_is_refused(tmp_path):
    state = prefixed("backbone.", vit(0).state_dict()) | prefixed("head.", TheirHead(False, 3, in_dim=384).state_dict())
    torch.save({"teacher": state}, tmp_path / "dino.pth")
    assert "DINOHead: 7 of 8 tensors match" in (message := refusal(tmp_path / "dino.pth"))
    assert "mlp.0.weight 24x384 instead of 24x192" in message


@torch.no_grad()
def test_last_blocks_in_dino_s_order(dino):
    path, _, teacher = dino
    model = load_pretrained(path)
    tokens = teacher._pos_embed(teacher.patch_embed(IMAGES))
    cls_tokens = []
    for block in teacher.blocks:
        tokens = block(tokens)
        cls_tokens.append(teacher.norm(tokens)[:, 0])
    mean = teacher.norm(tokens)[:, 1:].mean(dim=1)

    four = model.with_last_blocks(4)
    torch.testing.assert_close(four(IMAGES), torch.cat(cls_tokens[-4:], dim=1))
    assert four.embed_dim == 4 * 192
    assert (four.settings["n_last_blocks"], four.head) == (4, None)
    averaged = model.with_last_blocks(2, avgpool_patchtokens=True)
    torch.testing.assert_close(averaged(IMAGES), torch.cat([*cls_tokens[-2:], mean], dim=1))
    released = model.with_last_blocks(1, avgpool_patchtokens=True)(IMAGES)  # c0, p0, c1, p1, ...
    torch.testing.assert_close(released[:, 0::2], cls_tokens[-1])
    torch.testing.assert_close(released[:, 1::2], mean)
    assert torch.equal(model.with_last_blocks()(IMAGES), model(IMAGES))


def test_last_blocks_that_are_not_there(dino):
    with pytest.raises(UserError, match="--n_last_blocks 13: expected from 1 to 12"):
        load_pretrained(dino[0]).with_last_blocks(13)
    plain = PretrainedModel(build_backbone("resnet8", width=6))
    assert plain.with_last_blocks().embed_dim == 6
    with pytest.raises(UserError, match="are for ViTs"):
        plain.with_last_blocks(1, avgpool_patchtokens=True)


# ---- what does not open ----------------------------------------------------------------------------------------------


def refusal(*args, **kwargs):
    with pytest.raises(UserError) as error:
        load_pretrained(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_wrong_key_lists_the_keys_there_are(dino):
    message = refusal(dino[0], checkpoint_key="model")
    assert message.endswith("no state dict under --checkpoint_key model; the file has: student, teacher")


def test_a_key_for_a_file_without_keys(tmp_path):
    torch.save(vit(0).state_dict(), tmp_path / "flat.pth")
    assert "--checkpoint_key teacher: the file is one flat state dict" in refusal(tmp_path / "flat.pth", "teacher")


def test_partial_matches_are_counted_and_listed(tmp_path):
    state = vit(0).state_dict()
    kept = {name: tensor for name, tensor in state.items() if not name.startswith("blocks.11.")}
    torch.save(kept | {"extra.weight": torch.ones(1)}, tmp_path / "partial.pth")
    message = refusal(tmp_path / "partial.pth", arch="vit_tiny")
    torch.save(state | {"extra.weight": torch.ones(1)}, tmp_path / "more.pth")
    assert "150 of 150 tensors match" in refusal(tmp_path / "more.pth")
    del state["norm.weight"]
    torch.save(state, tmp_path / "fewer.pth")
    assert "149 of 150 tensors match, so nothing was loaded; missing: norm.weight;" in refusal(tmp_path / "fewer.pth")
    assert "138 of 150 tensors match" in message
    assert "missing: blocks.11.norm1.weight, " in message
    assert "and 4 more, 12 in all" in message
    assert "unexpected: extra.weight;" in message


def test_shapes_that_differ_are_listed(dino):
    message = refusal(dino[0], patch_size=16)
    assert "148 of 150 tensors match" in message
    assert "pos_embed 1x17x192 instead of 1x5x192" in message
    assert "patch_embed.proj.weight 192x3x8x8 instead of 192x3x16x16" in message


def test_another_architecture(dino):
    assert "vit_small: " in (message := refusal(dino[0], arch="vit_small"))
    assert "of 150 tensors match" in message


def test_a_file_that_does_not_name_its_backbone(tmp_path):
    torch.save(build_backbone("resnet8", width=8).state_dict(), tmp_path / "flat.pth")
    assert "name it with --arch" in refusal(tmp_path / "flat.pth")
    assert load_pretrained(tmp_path / "flat.pth", arch="resnet8").embed_dim == 8


def test_names_folders_and_missing_files_are_no_checkpoints(tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise AssertionError("a download was tried")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", no_network)
    monkeypatch.setattr("socket.socket.connect", no_network)
    for name in (
        "vit_small",
        "dino_vits16",
        "https://example.org/dino.pth",
        "hf-hub:timm/vit_tiny",
        "lost.safetensors",
    ):
        assert "no such file" in refusal(name)
    assert "is a folder; expected a file, such as" in refusal(tmp_path)


def test_files_that_hold_something_else(tmp_path):
    for name, content in {"list": [1, 2], "center": {"center": torch.zeros(3)}, "step": {"step": 3}}.items():
        torch.save(content, tmp_path / name)
        assert "holds a list" in refusal(tmp_path / name) or name != "list"
        assert "holds no state dict; its keys: " in refusal(tmp_path / name) or name == "list"
    (tmp_path / "broken.safetensors").write_bytes(b"12345678901234567890")
    assert "cannot be read" in refusal(tmp_path / "broken.safetensors")


def test_image_size_must_suit_the_patches(dino):
    assert "--img_size 30 is not a multiple of the model's patch size 8" in refusal(dino[0], img_size=30)


def test_flags_not_given_are_the_checkpoint_s(dino):
    parser = argparse.ArgumentParser()
    add_checkpoint_arguments(parser)
    args = parser.parse_args(["--pretrained_weights", str(dino[0])])
    args.img_size, args.in_chans, args.mean, args.std = None, None, [0.5] * 3, None
    assert open_model(args, torch.device("cpu")).embed_dim == 192
    assert (args.img_size, args.in_chans, args.mean, args.std) == (32, 3, [0.5] * 3, None)


def test_the_data_set_is_given_or_the_checkpoints_or_a_folder():
    silent, small, other = (PretrainedModel(vit(0), settings={"dataset": d}) for d in (None, "cifar10", "svhn"))
    args = argparse.Namespace(dataset=None, data_path=None, checkpoint=["a.pth", "b.pth"])
    assert choose_dataset(args, [silent, small]) == "cifar10"
    with pytest.raises(UserError, match="different data sets, cifar10, svhn: name one with --dataset"):
        choose_dataset(args, [small, other])
    with pytest.raises(UserError, match=r"a.pth, b.pth does not say what it was trained on; .* --data_path"):
        choose_dataset(args, [silent, silent])
    args.data_path = "/data/imagenet"
    assert choose_dataset(args, [silent]) == "imagefolder"  # as in DINO's own commands
    assert choose_dataset(args, [silent, small]) == "cifar10"
    args.dataset = "svhn"
    assert choose_dataset(args, [small, other]) == "svhn"


# ---- extraction ------------------------------------------------------------------------------------------------------

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer of Git LFS.*git lfs pull"),
        (b"\n<!DOCTYPE html><html>", "a page of HTML.*download it again"),
        (b'{"weight_map": {}}', "a text in JSON"),
        (b"", "an empty file"),
    ],
)
@pytest.mark.parametrize("name", ["weights.pth", "model.safetensors", "model.safetensors.index.json"])
def test_what_lies_where_weights_should_is_named(name, content, said, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name}: cannot be read: it is {said}"):
        load_pretrained(tmp_path / name)


@pytest.mark.parametrize("length", [0x7B20, 0x3C20])
def test_a_header_whose_length_looks_like_text_is_a_header(length, tmp_path):
    """Its eight bytes begin with b" {" or b" <"."""
    torch.manual_seed(0)
    model = build_backbone("vit_tiny", patch_size=16, img_size=32)
    content = safetensors.torch.save(model.state_dict())
    size = int.from_bytes(content[:8], "little")
    assert size <= length
    header = content[8 : 8 + size].rstrip() + b" " * (length - len(content[8 : 8 + size].rstrip()))
    (tmp_path / "model.safetensors").write_bytes(length.to_bytes(8, "little") + header + content[8 + size :])
    loaded = load_pretrained(tmp_path / "model.safetensors", arch="vit_tiny", patch_size=16, img_size=32)
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), model.eval()(images))
