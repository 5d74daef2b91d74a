"""Exports for transformers, ONNX runtimes and torch alone, opened by these, against the checkpoint's features."""

import json
import resource

import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers
from PIL import Image

import data
import export_backbone
import exports
from exports.graphs import Onnx, TorchExport, resizing
from exports.hugging_face import HuggingFace
from exports.timm_folder import TimmFolder
from images import FolderImages
from pictures import picture, write
from pretrained import PretrainedModel, load_pretrained
from refusals import error_of
from test_export_backbone import export, fingerprint, images, ours, results
from utils import UserError

pytestmark = pytest.mark.usefixtures("no_network")


def vit(path, **parts):
    return ours(path, "vit_mini", **{"img_size": 24, "patch_size": 8} | parts)


# ---- transformers ----------------------------------------------------------------------------------------------------

KINDS = {
    "plain": ({}, "ViTModel"),
    "5 channels, no bias of q, k, v": ({"in_chans": 5, "qkv_bias": False}, "ViTModel"),
    "positions without CLS": ({"no_embed_class": True}, "ViTModel"),
    "LayerScale": ({"init_values": 0.5}, "Dinov2Model"),
    "registers": ({"init_values": 0.5, "reg_tokens": 3, "no_embed_class": True}, "Dinov2WithRegistersModel"),
    "registers alone": ({"reg_tokens": 3, "no_embed_class": True, "in_chans": 1}, "Dinov2WithRegistersModel"),
}


@torch.no_grad()
@pytest.mark.parametrize(("parts", "kind"), KINDS.values(), ids=KINDS)
def test_transformers_gives_our_features(parts, kind, tmp_path):
    path, backbone = vit(tmp_path / "checkpoint.pth", **parts)
    config = export(path, tmp_path / "out", "--format", "hf")
    options = {"add_pooling_layer": False} if kind == "ViTModel" else {}
    model, loaded = transformers.AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True, **options)
    assert not any(loaded[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert (type(model).__name__, config["architectures"]) == (kind, [kind])
    channels = parts.get("in_chans", 3)
    x = images(channels, 24, batch=4)
    torch.testing.assert_close(model(x).last_hidden_state[:, 0], backbone(x), rtol=0, atol=1e-5)
    assert (tmp_path / "out" / "preprocessor_config.json").exists() == (channels == 3)
    again = load_pretrained(tmp_path / "out" / "model.safetensors")
    torch.testing.assert_close(again(x), backbone(x), rtol=0, atol=1e-4)


def test_transformers_s_images_are_those_of_the_evaluations(tmp_path):
    """Where the margins are even: transformers rounds an odd one's half the other way."""
    path, _ = vit(tmp_path / "checkpoint.pth", img_size=56)
    export(path, tmp_path / "out", "--format", "hf")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    file = write(tmp_path / "images" / "a.png", picture(90, 110))
    with Image.open(file) as image:
        found = processor(image, return_tensors="pt")["pixel_values"]
    files = FolderImages(tmp_path / "images", [b"a.png"])
    _, expected = next(data.eval_batches(files, 56, 3, [0.4] * 3, [0.3] * 3, batch_size=1))
    torch.testing.assert_close(found, expected, rtol=0, atol=1.01 / 255 / 0.3)  # a level


@pytest.mark.parametrize("kind", ["timm", "hf"])
def test_how_images_are_read_stays_with_the_weights(kind, tmp_path):
    """Of signed values in 5 channels: the numbers are in the card, and in the settings of who opens the file here."""
    path, _ = vit(tmp_path / "checkpoint.pth", in_chans=5)
    content = torch.load(path)
    content["args"] |= {"value_range": [-500, 500], "pages": "channels", "float_pixels": True}
    torch.save(content, path)
    export(path, tmp_path / "out", "--format", kind)
    assert "-500 is 0 and 500 is 1" in (tmp_path / "out" / "README.md").read_text()
    settings = load_pretrained(tmp_path / "out" / "model.safetensors").settings
    assert (settings["value_range"], settings["pages"], settings["float_pixels"]) == ([-500, 500], "channels", True)
    assert (settings["in_chans"], settings["mean"], settings["std"]) == (5, [0.4] * 5, [0.3] * 5)


@pytest.mark.parametrize(
    ("arch", "sizes", "reason"),
    [
        ("resnet8", {"width": 4}, "only a plain ViT"),
        ("test_convnext", {"img_size": 64}, "only a plain ViT"),
        ("vit_mini", {"img_size": 16, "patch_size": 8, "global_pool": "avg"}, "no token but a mean of the patches"),
    ],
)
def test_what_transformers_has_no_class_for_is_refused(arch, sizes, reason, tmp_path, capsys):
    path, _ = ours(tmp_path / "checkpoint.pth", arch, **sizes)
    line = error_of(capsys, export, path, tmp_path / "out", "--format", "hf")
    assert f"has no class for this {arch}" in line and reason in line and "timm, onnx or torch take it" in line
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pth"]


# ---- graphs ----------------------------------------------------------------------------------------------------------


def opened(folder):
    """What a user opens: a function of images."""
    if (folder / "model.pt2").exists():
        return torch.export.load(folder / "model.pt2").module()
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(["features"], {"images": x.numpy()})[0])


REGISTERS = {"img_size": 24, "patch_size": 8, "reg_tokens": 2, "no_embed_class": True}
GRAPHS = {
    "ViT, onnx": ("onnx", "vit_mini", {"img_size": 24, "patch_size": 8, "in_chans": 5}, (40, 16)),
    "ViT with registers, torch": pytest.param("torch", "vit_mini", REGISTERS, (16, 48), marks=pytest.mark.slow),
    "ResNet-8, onnx": ("onnx", "resnet8", {"img_size": 16, "width": 4}, (24, 30)),
    "ResNet-8, torch": ("torch", "resnet8", {"img_size": 16, "width": 4}, (24, 30)),
}


@torch.no_grad()
@pytest.mark.parametrize(("kind", "arch", "sizes", "other"), GRAPHS.values(), ids=GRAPHS)
def test_graphs_take_any_batch_and_any_size(kind, arch, sizes, other, tmp_path, capsys):
    path, backbone = ours(tmp_path / "checkpoint.pth", arch, **sizes)
    config = export(path, tmp_path / "out", "--format", kind)
    features_of, channels = opened(tmp_path / "out"), sizes.get("in_chans", 3)
    free = arch != "resnet8" or not torch.__version__.startswith("2.11.")  # that torch fixes the size of a ResNet-8
    own = (sizes["img_size"],) * 2
    for shape in ((1, channels, *own), (5, channels, *(other if free else own))):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(features_of(x), backbone(x), rtol=0, atol=1e-4)
    assert config["pretrained_cfg"]["mean"] == [0.4] * channels
    assert ("px only" not in capsys.readouterr().err) == free
    assert ("no other size" not in (tmp_path / "out" / "README.md").read_text()) == free


@torch.no_grad()
def test_a_graph_of_one_size_says_so(capsys):
    model = PretrainedModel(OneSize(), settings={})
    form = TorchExport(model, {"pretrained_cfg": {"input_size": [3, 8, 8]}})
    assert "images of 8 x 8 px only" in capsys.readouterr().err
    assert form.sizes == [(8, 8)] and "no other size" in form.usage("out")
    x = images(3, 8, batch=5)
    torch.testing.assert_close(form.graph.module()(x), model(x), rtol=0, atol=1e-5)


class OneSize(torch.nn.Module):
    """A linear layer on all pixels has no other size."""

    embed_dim = 4

    def __init__(self):
        super().__init__()
        self.stem, self.linear = torch.nn.Conv2d(3, 2, 1), torch.nn.Linear(128, 4)

    def forward(self, x):
        return self.linear(self.stem(x).flatten(1))


@pytest.mark.parametrize(("height", "width"), [(7, 9), (14, 13), (3, 4), (1, 20)])
def test_positions_are_resized_as_torch_resizes_images(height, width):
    grid = torch.randn(1, 5, 7, 9, generator=torch.Generator().manual_seed(0))
    expected = F.interpolate(grid, size=(height, width), mode="bicubic", antialias=True)
    torch.testing.assert_close(resizing(7, height) @ grid @ resizing(9, width).T, expected, rtol=0, atol=5e-6)


# ---- the command checks ----------------------------------------------------------------------------------------------


def change_safetensors(folder):
    file = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    max(tensors.values(), key=torch.Tensor.numel)[0, 0] += 1
    safetensors.torch.save_file(tensors, file, {"format": "pt"})


def change_onnx(folder):
    model = onnx.load(folder / "model.onnx")
    largest = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    largest.raw_data = np.flip(np.frombuffer(largest.raw_data, np.float32)).tobytes()
    onnx.save(model, folder / "model.onnx")


def change_pt2(folder):
    program = torch.export.load(folder / "model.pt2")
    max(program.state_dict.values(), key=torch.Tensor.numel).data[0, 0] += 1
    torch.export.save(program, folder / "model.pt2")


CHANGES = {
    "timm": (TimmFolder, change_safetensors),
    "hf": (HuggingFace, change_safetensors),
    "onnx": (Onnx, change_onnx),
    "torch": (TorchExport, change_pt2),
}


def cut_in_half(folder):
    file = max(folder.iterdir(), key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize("kind", CHANGES)
def test_a_damaged_export_is_noticed_and_nothing_of_it_left(kind, tmp_path, monkeypatch, capsys):
    path, _ = (
        vit(tmp_path / "checkpoint.pth") if kind == "hf" else ours(tmp_path / "checkpoint.pth", "resnet8", width=4)
    )
    (tmp_path / "before").mkdir()
    form, change = CHANGES[kind]
    whole = form.write
    for damage, said in ((change, "builds another model"), (cut_in_half, "cannot open what was written")):

        def write_damaged(self, folder, damage=damage):
            whole(self, folder)
            damage(folder)

        monkeypatch.setattr(form, "write", write_damaged)
        line = error_of(capsys, export, path, tmp_path / "out", "--format", kind)
        assert said in line and line.endswith("nothing was exported")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["before", "checkpoint.pth"]


@pytest.mark.parametrize("kind", ["timm", "hf", *(pytest.param(k, marks=pytest.mark.slow) for k in ("onnx", "torch"))])
def test_a_disk_that_is_full_is_one_line_and_nothing_is_left(kind, tmp_path, capsys):
    path, _ = vit(tmp_path / "checkpoint.pth")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        line = error_of(capsys, export, path, tmp_path / "out", "--format", kind)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert line == f"error: --output_dir {tmp_path / 'out'}: cannot be written: File too large"
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pth"]


def test_of_two_exports_at_once_one_is_kept_whole_and_the_other_says_so(tmp_path, monkeypatch, capsys):
    path, _ = vit(tmp_path / "checkpoint.pth")
    check, kept = exports.check, {}

    def another_ends_first(*args):
        check(*args)
        if not kept:
            kept["begun"] = None
            export(path, tmp_path / "out")
            kept.update({p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()})

    monkeypatch.setattr(exports, "check", another_ends_first)
    assert "out: cannot be written: Directory not empty" in error_of(capsys, export, path, tmp_path / "out")
    assert len(kept) > 2 and {"begun": None} | {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == kept
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint.pth", "out"]


@pytest.mark.parametrize("kind", CHANGES)
def test_an_export_that_is_there_already_is_kept(kind, tmp_path, capsys):
    """Whatever would become of the new one."""
    path, _ = vit(tmp_path / "checkpoint.pth")
    export(path, tmp_path / "out")
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    (tmp_path / "other.pth").write_bytes(b"no checkpoint")
    for checkpoint in (path, tmp_path / "other.pth"):
        assert "is there already" in error_of(capsys, export, checkpoint, tmp_path / "out", "--format", kind)
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint.pth", "other.pth", "out"]


def test_a_backbone_of_which_torch_makes_no_graph_is_one_line(tmp_path):
    backbone = OneSize()
    backbone.forward = lambda x: OneSize.forward(backbone, x) * (1 if x.sum().item() > 0 else 2)
    with pytest.raises(UserError, match=r"^torch\.export makes no graph of this backbone .*--format timm takes it$"):
        TorchExport(PretrainedModel(backbone, settings={}), {"pretrained_cfg": {"input_size": [3, 8, 8]}})


def test_resnets_are_opened_again_too(tmp_path, monkeypatch, capsys):
    path, _ = ours(tmp_path / "checkpoint.pth", "resnet8", width=4)
    whole = TimmFolder.write
    monkeypatch.setattr(TimmFolder, "write", lambda self, folder: (whole(self, folder), change_safetensors(folder)))
    assert "load_pretrained builds another model" in error_of(capsys, export, path, tmp_path / "out")


def test_weights_that_are_no_numbers_are_no_agreement(tmp_path, capsys):
    path, _ = ours(tmp_path / "checkpoint.pth", "resnet8", width=4)
    content = torch.load(path)
    for state in (content["student"], content["teacher"]):
        state["backbone.block4.conv2.bias"].fill_(float("nan"))
    torch.save(content, path)
    assert "not finite" in error_of(capsys, export, path, tmp_path / "out")


@pytest.mark.parametrize(("kind", "package"), [("hf", "transformers"), ("onnx", "onnxruntime"), ("onnx", "onnxscript")])
def test_a_missing_package_is_named_before_anything_is_written(kind, package, tmp_path, monkeypatch, capsys):
    path, _ = vit(tmp_path / "checkpoint.pth")
    monkeypatch.setitem(__import__("sys").modules, package, None)
    line = error_of(capsys, export, path, tmp_path / "out", "--format", kind)
    assert f"--format {kind} needs {package}" in line and "pip install" in line
    assert not (tmp_path / "out").exists()


def test_two_batch_sizes_are_compared():
    assert len(set(exports.BATCH_SIZES)) == 2


# ---- the card --------------------------------------------------------------------------------------------------------


def test_the_card_has_the_results_of_the_run_s_folder(tmp_path, capsys):
    path, _ = ours(tmp_path / "checkpoint.pth", "resnet8", width=4)
    rows = [{"checkpoint": path, "k": 20, "top1": 81.5}]
    file = results(tmp_path, path, fingerprint(load_pretrained(path)), rows)
    content = json.loads(file.read_text()) | {"num_train": 6000, "num_test": 1000}
    content["settings"] = {"dataset": "imagefolder", "data_path": "/home/me/birds", "protocol": None}
    file.write_text(json.dumps(content))
    (tmp_path / "results_linear.json").write_text(json.dumps({"rows": rows, "models": {"b": {"weights": "other"}}}))
    export(path, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    measured = (
        "Data set: imagefolder birds, 6,000 training images, 1,000 test images. Protocol: weighted vote of the nearest"
    )
    assert measured in card and "this model" in card and "81.5" in card and "/home" not in card
    assert "### linear" not in card
    assert "left out of the card" in capsys.readouterr().err
    file.unlink()
    export(path, tmp_path / "without")
    assert "There are none" in (tmp_path / "without" / "README.md").read_text()


def test_formats_are_listed_by_help(capsys):
    with pytest.raises(SystemExit):
        export_backbone.main(["--format", "keras", "--checkpoint", "a", "--output_dir", "b"])
    assert "--format" in capsys.readouterr().err
