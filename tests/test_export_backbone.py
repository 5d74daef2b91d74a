"""What was exported, opened by timm without a network, against the checkpoint's own features."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import safetensors
import timm
import torch
import yaml
from PIL import Image

import data
import export_backbone
import utils
from backbones import build_backbone
from cplearn_head import CPLearnHead
from evaluation import fingerprint
from images import FolderImages
from pictures import picture, write
from pretrained import load_pretrained
from refusals import error_of

pytestmark = pytest.mark.usefixtures("no_network")


def prefixed(prefix, module):
    return {prefix + name: tensor for name, tensor in module.state_dict().items()}


def ours(path, arch, dataset="imagefolder", seed=0, **sizes):
    """Writes a checkpoint as main_cplearn.py does; returns (its path, the backbone)."""
    torch.manual_seed(seed)
    backbone = build_backbone(arch, **sizes).eval()
    for parameter in backbone.parameters():  # initial biases are 0 and norms 1: agreement must not rest on that
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    channels = sizes.get("in_chans", 3)
    args = {"arch": arch, "dataset": dataset, "img_size": 32, "in_chans": 3, "activation": "l2", "lr": 5e-4}
    args |= {
        "mean": [0.4] * channels,
        "std": [0.3] * channels,
        "data_path": "/home/me/images",
        "class_list": None,
    } | sizes
    state = prefixed("backbone.", backbone) | prefixed("head.", CPLearnHead(backbone.embed_dim, 64, activation="l2"))
    checkpoint = {"format": "cplearn 2", "student": state, "teacher": state, "args": args, "epoch": 7, "step": 123}
    torch.save(checkpoint, path)
    return str(path), backbone


def export(checkpoint, folder, *flags):
    export_backbone.main(
        ["--checkpoint", str(checkpoint), "--output_dir", str(folder), "--device", "cpu", *map(str, flags)]
    )
    return json.loads((folder / "config.json").read_text())


def images(channels, size, batch=2):
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(size))


def in_timm(folder, **options):
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **options).eval()


SIZES = {
    "patch 16": {"img_size": 64, "patch_size": 16},
    "patch 7, gray": {"img_size": 28, "patch_size": 7, "in_chans": 1},
    "patch 16 at 224": {"img_size": 224, "patch_size": 16},
}


@torch.no_grad()
@pytest.mark.parametrize("arch", ["vit_mini", "vit_tiny"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_timm_gives_our_features(sizes, arch, tmp_path):
    path, backbone = ours(tmp_path / "checkpoint.pth", arch, **sizes)
    export(path, tmp_path / "out")
    model, channels = in_timm(tmp_path / "out"), sizes.get("in_chans", 3)
    for size in (sizes["img_size"], 2 * sizes["patch_size"]):  # its own size, and another
        x = images(channels, size)
        torch.testing.assert_close(model(x), backbone(x), rtol=1e-5, atol=1e-5)
    reloaded = load_pretrained(tmp_path / "out" / "model.safetensors")
    assert torch.equal(reloaded(x), backbone(x))
    kept = {name: reloaded.settings[name] for name in ("arch", "img_size", "patch_size", "in_chans", "mean", "std")}
    assert kept == {"arch": arch, "in_chans": channels, "mean": [0.4] * channels, "std": [0.3] * channels} | sizes


@pytest.mark.parametrize("img_size", [32, 48, 224])
def test_timm_s_images_are_those_of_the_evaluations(img_size, tmp_path):
    path, _ = ours(tmp_path / "checkpoint.pth", "vit_tiny", img_size=img_size, patch_size=16)
    settings = export(path, tmp_path / "out")["pretrained_cfg"]
    file = write(tmp_path / "images" / "a.png", picture(150, 190))
    files = FolderImages(tmp_path / "images", [b"a.png"])
    _, expected = next(data.eval_batches(files, img_size, 3, [0.4] * 3, [0.3] * 3, batch_size=1))
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(in_timm(tmp_path / "out")))
    with Image.open(file) as image:
        torch.testing.assert_close(transform(image)[None], expected, rtol=0, atol=2.01 / 255 / 0.3)  # levels
    assert settings["crop_pct"] == {32: 0.8648, 48: 0.8727, 224: 0.875}[img_size]


def test_small_sets_are_not_cropped(tmp_path):
    path, _ = ours(tmp_path / "checkpoint.pth", "resnet8", "cifar10", width=4)
    assert export(path, tmp_path / "out")["pretrained_cfg"]["crop_pct"] == 1


def test_timm_adds_a_classifier_for_fine_tuning(tmp_path):
    path, backbone = ours(tmp_path / "checkpoint.pth", "vit_tiny", img_size=32, patch_size=8)
    export(path, tmp_path / "out")
    model = in_timm(tmp_path / "out", num_classes=10)
    x = images(3, 32)
    assert model(x).shape == (2, 10)
    torch.testing.assert_close(model.forward_features(x)[:, 0], backbone(x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("key", [None, "student"])
def test_dino_s_checkpoint(key, tmp_path):
    torch.manual_seed(0)
    models = {name: build_backbone("vit_tiny", img_size=32, patch_size=8).eval() for name in ("student", "teacher")}
    args = argparse.Namespace(arch="vit_tiny", patch_size=8, lr=np.float64(5e-4), output_dir=Path("/somewhere"))
    states = {name: prefixed("module.backbone.", model) for name, model in models.items()}
    torch.save(states | {"args": args, "dino_loss": {"center": torch.zeros(1, 9)}, "epoch": 3}, tmp_path / "dino.pth")
    export(tmp_path / "dino.pth", tmp_path / "out", *(["--checkpoint_key", key] if key else []))
    x = images(3, 32)
    torch.testing.assert_close(in_timm(tmp_path / "out")(x), models[key or "teacher"](x), rtol=1e-5, atol=1e-5)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "by [DINO]" in card
    assert "assumed, the checkpoint does not say" in card
    assert "0.0005" in card
    assert "somewhere" not in card


@torch.no_grad()
@pytest.mark.parametrize("arch", ["test_convnext", "test_efficientnet", "test_vit2"])
def test_timm_s_own_models(arch, tmp_path):
    path, backbone = ours(tmp_path / "checkpoint.pth", arch, img_size=160, in_chans=1)
    config = export(path, tmp_path / "out")
    x = images(1, 160)
    torch.testing.assert_close(in_timm(tmp_path / "out")(x), backbone(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(load_pretrained(tmp_path / "out" / "model.safetensors")(x), backbone(x))
    assert config["architecture"] == arch


@torch.no_grad()
@pytest.mark.parametrize(("arch", "sizes"), [("resnet8", {"width": 12}), ("resnet18", {})])
def test_our_resnets_open_here_only(arch, sizes, tmp_path):
    path, backbone = ours(tmp_path / "checkpoint.pth", arch, "cifar10", **sizes)
    export(path, tmp_path / "out")
    model = load_pretrained(tmp_path / "out" / "model.safetensors")
    assert torch.equal(model(images(3, 32)), backbone(images(3, 32)))
    assert (model.settings["arch"], model.settings["img_size"]) == (arch, 32)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "timm has no such model" in card
    assert "create_model" not in card
    with pytest.raises(RuntimeError):  # rather than another ResNet-18
        in_timm(tmp_path / "out")


def results(folder, name, weights, rows):
    path = folder / "results_knn.json"
    path.write_text(json.dumps({"rows": rows, "models": {name: {"weights": weights}}}))
    return path


def test_the_card_holds_settings_results_and_commands_that_run(tmp_path, monkeypatch):
    path, backbone = ours(tmp_path / "checkpoint.pth", "vit_tiny", img_size=32, patch_size=8)
    rows = [
        {"checkpoint": "raw pixels", "k": 20, "top1": 41.256789},
        {"checkpoint": path, "k": 20, "top1": 81.5, "num_train": 60000, "per_class": [1, 2]},
    ]
    scores = results(tmp_path, path, fingerprint(load_pretrained(path)), rows)
    export(path, tmp_path / "mine", "--results", scores)
    card = (tmp_path / "mine" / "README.md").read_text()

    front = yaml.safe_load(card.split("---\n")[1])
    assert front["library_name"] == "timm"
    assert front["pipeline_tag"] == "image-feature-extraction"
    assert "### knn" in card
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in card.splitlines() if line.startswith("|")]
    assert ["checkpoint", "k", "top1", "num_train"] in cells
    assert ["raw pixels", "20", "41.2568", "-"] in cells
    assert ["this model", "20", "81.5", "60000"] in cells
    assert ["--lr", "0.0005"] in cells
    assert ["--img_size", "32"] in cells
    assert "123 steps" in card
    assert str(tmp_path) not in card  # nothing of the machine
    assert "/home/me" not in card

    commands = [line.strip() for line in card.splitlines() if line.startswith("    ")]
    repository = str(Path(export_backbone.__file__).parent)
    monkeypatch.chdir(tmp_path)
    image = Image.fromarray(picture(40, 50))
    names = {"timm": timm, "torch": torch, "image": image, "load_pretrained": load_pretrained}
    for command in commands:
        exec(command.replace('load(".",', f'load("{repository}",'), names)
        torch.testing.assert_close(names["model"](images(3, 32)), backbone(images(3, 32)), rtol=1e-5, atol=1e-5)
    assert len(commands) == 5
    assert names["features"].shape == (1, 192)


def test_the_files_are_whole_and_open(tmp_path):
    path, _ = ours(tmp_path / "checkpoint.pth", "vit_tiny", img_size=32, patch_size=8)
    (tmp_path / "below" / ".out.0a1b2c3d.tmp").mkdir(parents=True)  # of another export, killed or still at work
    export(path, tmp_path / "below" / "out")
    assert sorted(p.name for p in (tmp_path / "below").iterdir()) == [".out.0a1b2c3d.tmp", "out"]
    assert sorted(p.name for p in (tmp_path / "below" / "out").iterdir()) == [
        "README.md", "config.json", "model.safetensors",
    ]  # fmt: skip
    with safetensors.safe_open(tmp_path / "below" / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict())
    (tmp_path / "empty").mkdir()
    export(path, tmp_path / "empty")  # a folder without anything in it may be there


def test_one_process_of_several_writes(tmp_path, monkeypatch):
    path, _ = ours(tmp_path / "checkpoint.pth", "resnet8", width=4)
    monkeypatch.setattr(utils, "rank", lambda: 1)
    export_backbone.main(["--checkpoint", path, "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_nothing_is_left_of_an_export_that_timm_reads_differently(tmp_path, monkeypatch, capsys):
    path, _ = ours(tmp_path / "checkpoint.pth", "vit_tiny", img_size=32, patch_size=8)
    other = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, patch_size=8)
    monkeypatch.setattr(timm, "create_model", lambda *args, **kwargs: other)
    with pytest.raises(SystemExit):
        export(path, tmp_path / "out")
    assert "builds another model" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pth"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--output_dir", "{folder}/full"], "full: is there already; nothing is overwritten"),
        (["--output_dir", "{folder}/checkpoint.pth"], "checkpoint.pth: is there already"),
        (["--output_dir", "{folder}/checkpoint.pth/below"], "cannot be written"),
        (["--checkpoint", "{folder}/missing.pth"], "missing.pth: no such file"),
        (["--checkpoint_key", "techer"], "no state dict under --checkpoint_key techer"),
        (["--results", "{folder}/missing.json"], "--results {folder}/missing.json: not the JSON of an evaluation"),
        (["--results", "{folder}/checkpoint.pth"], "not the JSON of an evaluation"),
        (["--results", "{folder}/list.json"], "not the JSON of an evaluation"),
        (["--results", "{folder}/old/results_knn.json"], "whose weights are not those of {folder}/checkpoint.pth"),
    ],
)
def test_command_stops_with_one_line(flags, message, tmp_path, capsys):
    path, _ = ours(tmp_path / "checkpoint.pth", "resnet8", width=4)
    for name in ("full/keep", "old"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "list.json").write_text("[1]")
    results(tmp_path / "old", path, "0123456789abcdef", [{"checkpoint": path}])
    given = {"--checkpoint": path, "--output_dir": str(tmp_path / "out")}
    words = [flag.format(folder=tmp_path) for flag in flags]
    words = [*(word for pair in given.items() if pair[0] not in words for word in pair), *words]
    assert message.format(folder=tmp_path) in error_of(capsys, export_backbone.main, words, alone=True)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "full" / "keep").exists()
