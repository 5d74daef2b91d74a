"""A run that starts from a file: the features of its first step are the original network's, whatever the file's layout;
other patches and channels by their rules; and what the run says of it."""

import argparse

import pytest
import torch
import torch.nn.functional as F
import torchvision

import main_cplearn
from backbones import build_backbone
from checkpoint import load_checkpoint
from pictures import picture, write
from pretrained import load_pretrained
from runs import write_pictures
from test_pretrained import TheirHead, prefixed
from test_weight_layouts import (
    WRAPPED,
    by_meta,
    chunked,
    images,
    moco,
    released,
    timm_model,
    transformers_forward,
    transformers_state,
)
from weight_layouts import fit_shapes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """48 images of 32 px in 3 classes for training, 24 others for validation."""
    root = tmp_path_factory.mktemp("images")
    write_pictures(root / "train", 48)
    for i in range(24):
        write(root / "val" / f"class{i % 3}" / f"{i}.png", picture(32, 32, seed=i))
    return root


def words_of(folder, output_dir, **changes):
    values = {
        "dataset": "imagefolder", "data_path": folder, "img_size": 32, "out_dim": 64, "batch_size_per_gpu": 8,
        "epochs": 1, "warmup_epochs": 0, "precision": "fp32", "device": "cpu", "num_workers": 0, "log_every": 5,
        "saveckp_freq": 0, "drop_path_rate": 0, "output_dir": output_dir,
    } | changes  # fmt: skip
    return [word for name, value in values.items() if value is not None for word in (f"--{name}", *str(value).split())]


def args_of(*args, **changes):
    return main_cplearn.get_args_parser().parse_args(words_of(*args, **changes))


def started(*args, **changes):
    """The backbone of a run before its first step, in evaluation mode."""
    run = main_cplearn.build_run(args_of(*args, **changes))
    run.lock.close()
    return run.model.backbone.eval()


# ---- each layout -----------------------------------------------------------------------------------------------------


def torchvision_resnet(seed=0):
    torch.manual_seed(seed)
    model = torchvision.models.resnet34(weights=None).eval()
    state = dict(model.state_dict())
    model.fc = torch.nn.Identity()
    return state, model


def torchvision_vit():
    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(32, 8, 12, 3, 192, 768, num_classes=7).eval()
    state = dict(model.state_dict())
    model.heads = torch.nn.Identity()
    return state, model


def ours():
    backbone = build_backbone("vit_mini", 32, 8).eval()
    state = prefixed("backbone.", backbone.state_dict())
    args = {"arch": "vit_mini", "patch_size": 8, "img_size": 32, "in_chans": 3, "dataset": "imagefolder"}
    return {"format": "cplearn 2", "student": state, "teacher": state, "args": args}, backbone


def dino():
    student, teacher = (build_backbone("vit_mini", 32, 8).eval() for _ in range(2))
    head = prefixed("head.", TheirHead(False, 3, in_dim=128).state_dict())
    content = {"student": prefixed("module.", prefixed("backbone.", student.state_dict()) | head)}
    content |= {"teacher": prefixed("backbone.", teacher.state_dict()) | head, "epoch": 3}
    return content | {"args": argparse.Namespace(arch="vit_mini", patch_size=8)}, student, teacher


def wrapped(kind):
    models = [timm_model("vit_tiny_patch16_224", seed, img_size=32) for seed in (0, 1)]
    return WRAPPED[kind](*(model.state_dict() for model in models)), *models


def dinov2(registers=False):
    arch = "vit_small_patch14_reg4_dinov2" if registers else "vit_small_patch14_dinov2"
    return timm_model(arch, img_size=56, dynamic_img_size=True)


def dinov3(names):
    model = timm_model("vit_small_patch16_dinov3", global_pool="token" if names == "meta" else "avg")
    return by_meta(model) if names == "meta" else model.state_dict(), model


def moco_v3():
    base, momentum = (timm_model("vit_small_patch16_224", seed, img_size=64, num_heads=12) for seed in (0, 1))
    return moco(base, momentum), base, momentum


def mae():
    model = timm_model("vit_tiny_patch16_224", img_size=64)
    beside = {"mask_token": torch.zeros(1, 1, 8), "decoder_pos_embed": torch.zeros(1, 17, 8)}
    return {"model": model.state_dict() | beside | {"decoder_embed.weight": torch.zeros(8, 8)}}, model


def ibot():
    model = timm_model("vit_tiny_patch16_224", img_size=64)
    teacher = prefixed("backbone.", model.state_dict() | {"masked_embed": torch.zeros(1, 192)})
    return {"student": prefixed("module.", teacher), "teacher": teacher}, model


def transformers(is_dinov2):
    state = transformers_state(is_dinov2)
    return prefixed("vit.", state), lambda x: transformers_forward(state, x, eps=1e-6 if is_dinov2 else 1e-12)


# name: () -> (what the file holds, its network), side of the images, FILE's :KEY
LAYOUTS = {
    "ours": (ours, 32, ""),
    "dino, teacher": (lambda: dino()[::2], 32, ""),
    "dino, student": (lambda: dino()[:2], 32, ":student"),
    "dinov2": (lambda: (released(m := dinov2()), m), 56, ""),
    "dinov2, registers": (lambda: (released(m := dinov2(True)), m), 56, ""),
    "dinov2, training": (lambda: ({"teacher": prefixed("backbone.", chunked(released(m := dinov2())))}, m), 56, ""),
    "dinov3": (lambda: dinov3("meta"), 64, ""),
    "dinov3, timm": (lambda: dinov3("timm"), 64, ""),
    "moco-v3": (lambda: moco_v3()[:2], 64, ""),
    "moco-v3, momentum": (lambda: moco_v3()[::2], 64, ":momentum_encoder"),
    "mae": (mae, 64, ""),
    "ibot": (ibot, 64, ":teacher"),
    "timm": (lambda: (m := timm_model("vit_tiny_patch16_224", img_size=32)) and (m.state_dict(), m), 32, ""),
    "torchvision, vit": (torchvision_vit, 32, ""),
    "torchvision, resnet": (torchvision_resnet, 64, ""),
    "transformers": (lambda: transformers(False), 32, ""),
    "transformers, dinov2": (lambda: transformers(True), 32, ""),
    **{kind: (lambda kind=kind: wrapped(kind)[:2], 32, "") for kind in ("lightning", "fsdp", "compiled inside", "ema")},
    "student's": (lambda: wrapped("student and teacher")[::2], 32, ":student"),
}
OFTEN = ("ours", "dino, student", "dinov2, registers", "moco-v3, momentum", "transformers", "lightning")


@pytest.mark.parametrize("name", [n if n in OFTEN else pytest.param(n, marks=pytest.mark.slow) for n in LAYOUTS])
def test_a_run_starts_with_the_original_s_features(name, folder, tmp_path, capsys):
    make, size, key = LAYOUTS[name]
    content, network = make()
    torch.save(content, tmp_path / "weights.pth")
    x = images(size)
    backbone = started(folder, tmp_path / "run", init_from=f"{tmp_path}/weights.pth{key}", img_size=size)
    if isinstance(network, torchvision.models.ResNet):  # laid out otherwise in memory, it is rounded otherwise
        backbone, network, x = backbone.double(), network.double(), x.double()
    with torch.no_grad():
        torch.testing.assert_close(backbone(x), network(x), atol=1e-5, rtol=1e-5)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("--init_from")]
    assert [line.split(": ")[1] for line in said if "weights.pth" not in line] == ["not taken", "changed"]
    assert f": taken: {len(backbone.state_dict())} of {len(backbone.state_dict())} tensors" in said[0]


@pytest.mark.slow
def test_eval_s_features_of_a_run_s_checkpoint_are_the_original_s(folder, tmp_path):
    """What shapes do not tell (the norms' epsilon, where the feature is taken) is in our checkpoint too."""
    for name, (content, network), size in (
        ("eps", transformers(False), 32),
        ("meta", dinov3("meta"), 64),
    ):
        torch.save(content, tmp_path / f"{name}.pth")
        still = {"max_steps": 1, "lr": 1e-30, "min_lr": 0, "weight_decay": 0, "weight_decay_end": 0}
        output_dir = tmp_path / f"run_{name}"
        main_cplearn.train(
            args_of(
                folder, output_dir, init_from=tmp_path / f"{name}.pth", img_size=size, batch_size_per_gpu=2, **still
            )
        )
        model = load_pretrained(output_dir / "checkpoint.pth")
        with torch.no_grad():
            torch.testing.assert_close(model(images(size)), network(images(size)), atol=1e-5, rtol=1e-5)
    assert model.settings["arch"] == "vit_small_patch16_dinov3"


# ---- other patches, channels and sizes -------------------------------------------------------------------------------


def resize(patches, size):
    return F.interpolate(patches, (size, size), mode="bicubic", antialias=True)


def embed(patches, weight):
    """Tokens of single patches (B, C, p, p)."""
    return torch.einsum("bcij,dcij->bd", patches.double(), weight.double())


def test_a_larger_patch_gives_the_small_one_s_token_and_a_smaller_one_nearly():
    weight, generator = torch.randn(9, 3, 8, 8), torch.Generator().manual_seed(0)
    patches = torch.randn(40, 3, 8, 8, generator=generator)
    larger, said = fit_shapes({"w": weight}, {"w": torch.empty(9, 3, 12, 12)})
    torch.testing.assert_close(embed(resize(patches, 12), larger["w"]), embed(patches, weight), atol=1e-4, rtol=1e-4)
    assert said == ["w 9x3x8x8 -> 9x3x12x12 by the pseudo-inverse of bicubic resizing (FlexiViT)"]
    smaller, _ = fit_shapes({"w": weight}, {"w": torch.empty(9, 3, 4, 4)})
    # least squares over all patches: the columns of the resizing's matrix are the resized unit patches
    units = resize(torch.eye(64).view(64, 1, 8, 8), 4).flatten(1).double()  # (64, 16)
    expected = torch.linalg.lstsq(units, weight.flatten(0, 1).flatten(1).T.double()).solution.T.view(9, 3, 4, 4)
    torch.testing.assert_close(smaller["w"].double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_an_image_whose_channels_are_alike_gives_what_it_gave(channels):
    weight, gray = torch.randn(7, 3, 4, 4), torch.randn(5, 1, 4, 4)
    fitted, said = fit_shapes(
        {"w": weight, "b": torch.ones(7)}, {"w": torch.empty(7, channels, 4, 4), "b": torch.ones(7)}
    )
    before, now = (embed(gray.expand(-1, n, -1, -1), w) for n, w in ((3, weight), (channels, fitted["w"])))
    torch.testing.assert_close(now, before, atol=1e-5, rtol=1e-5)
    assert said == [f"w 7x3x4x4 -> 7x{channels}x4x4 by the mean of 3 channels x 3/{channels}"]


def assembled(patches):
    """(2 * 16, 1, p, p) -> two images of 4 x 4 patches."""
    side = patches.shape[-1]
    return patches.view(2, 4, 4, side, side).permute(0, 1, 3, 2, 4).reshape(2, 1, 4 * side, 4 * side)


def test_a_run_on_gray_images_and_other_patches(folder, tmp_path, capsys):
    original = build_backbone("vit_mini", 32, 8).eval()
    torch.save(original.state_dict(), tmp_path / "vit.pth")
    changes = {"init_from": tmp_path / "vit.pth", "in_chans": 1, "patch_size": 16, "img_size": 64, "max_steps": 1}
    backbone = started(folder, tmp_path / "run", **changes)
    patches = torch.randn(2 * 16, 1, 8, 8)  # of two images, each enlarged by itself
    small, large = (assembled(p) for p in (patches, resize(patches, 16)))
    with torch.no_grad():
        expected = original(small.expand(-1, 3, -1, -1))
        torch.testing.assert_close(backbone(large), expected, atol=1e-4, rtol=1e-4)
    changed = next(line for line in capsys.readouterr().out.splitlines() if "changed" in line)
    assert "128x3x8x8 -> 128x1x16x16 by the mean of 3 channels x 3/1, then the pseudo-inverse" in changed
    main_cplearn.train(args_of(folder, tmp_path / "run", **changes))
    model = load_pretrained(tmp_path / "run" / "checkpoint.pth")
    assert [model.settings[name] for name in ("patch_size", "in_chans", "img_size")] == [16, 1, 64]


@pytest.mark.parametrize(("arch", "options"), [("resnet8", {"width": 8}), ("resnet18", {}), ("test_resnet", {})])
def test_channels_of_other_backbones_by_their_own_first_layers(arch, options, folder, tmp_path, capsys):
    original = build_backbone(arch, in_chans=1, **options).eval()
    torch.save(original.state_dict(), tmp_path / "weights.pth")
    backbone = started(folder, tmp_path / "run", init_from=tmp_path / "weights.pth", arch=arch, drop_path_rate=None)
    with torch.no_grad():
        gray = images(32, channels=1)
        torch.testing.assert_close(backbone(gray.expand(-1, 3, -1, -1)), original(gray), atol=1e-4, rtol=1e-4)
    assert "by the mean of 1 channels x 1/3" in capsys.readouterr().out


def test_positions_of_another_grid_are_said(folder, tmp_path, capsys):
    torch.save(build_backbone("vit_mini", 32, 8).state_dict(), tmp_path / "vit.pth")
    started(folder, tmp_path / "run", init_from=tmp_path / "vit.pth", img_size=64)
    assert "changed: positions of 4x4 patches, interpolated (bicubic) to 8x8 in each pass" in capsys.readouterr().out


@pytest.mark.parametrize(("given", "words"), [(None, "not given"), ("0 255", "0 255"), ("0 4095", None)])
def test_another_range_of_values_is_said(given, words, folder, tmp_path, capsys):
    content, _ = ours()
    torch.save(content | {"args": content["args"] | {"value_range": [0, 4095]}}, tmp_path / "ours.pth")
    started(folder, tmp_path / "run", init_from=tmp_path / "ours.pth", value_range=given)
    assert ("--value_range is" in (said := capsys.readouterr().out)) == (words is not None)
    assert words is None or f"--value_range is {words}, the file's 0 4095" in said


# ---- a run that goes on ----------------------------------------------------------------------------------------------


def test_a_stopped_run_goes_on_from_its_own_checkpoint(folder, tmp_path, capsys):
    torch.save(build_backbone("vit_mini", 32, 8, num_heads=2).state_dict(), tmp_path / "vit.pth")
    given = {"init_from": tmp_path / "vit.pth", "num_heads": 2, "epochs": 2}
    main_cplearn.train(args_of(folder, tmp_path / "whole", **given))
    ending = main_cplearn.finish_epoch

    def killed(run, step):
        ending(run, step)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(main_cplearn, "finish_epoch", killed)
        main_cplearn.train(args_of(folder, tmp_path / "parts", saveckp_freq=1, **given))
    (tmp_path / "vit.pth").unlink()
    capsys.readouterr()
    elsewhere = given | {"init_from": tmp_path / "gone.pth"}
    main_cplearn.train(args_of(folder, tmp_path / "parts", saveckp_freq=1, **elsewhere))
    path = tmp_path / "parts" / "checkpoint.pth"
    assert f"--init_from {tmp_path}/gone.pth: not read, the run goes on from {path}\n" in capsys.readouterr().out
    whole, parts = (load_checkpoint(tmp_path / name / "checkpoint.pth") for name in ("whole", "parts"))
    for entry in ("student", "optimizer"):
        ours, theirs = (list(flat(state[entry])) for state in (whole, parts))
        assert len(ours) == len(theirs) > 40
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def flat(state):
    for value in state.values() if isinstance(state, dict) else state if isinstance(state, list) else ():
        if isinstance(value, torch.Tensor):
            yield value
        else:
            yield from flat(value)


# ---- what cannot be --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--init_from {here}/none.pth", "none.pth: no such file"),
        ("--init_from {here}/none.pth:student", "none.pth:student: no such file"),
        ("--init_from {here}/both.pth:x", "no state dict under --init_from FILE:KEY x; the file has: student, teacher"),
        ("--init_from {here}/vit.pth:teacher", "the file is one flat state dict without keys; leave it out"),
        ("--init_from {here}/vit.pth --arch vit_base", "--arch vit_base does not fit, the file's is vit_mini: "),
        ("--init_from {here}/vit.pth --arch resnet18", "--arch resnet18 does not fit, the file's is vit_mini: "),
        ("--init_from {here}/resnet.pth", "name it with --arch"),
        ("--init_from {here}/resnet.pth --arch resnet8 --width 16", "--width 16: the file's backbone has 8; leave it"),
        ("--init_from {here}/dinov3.pth --patch_size 8", "vit_small_patch16_dinov3 has patches of 16 px by its name"),
        ("--init_from {here}/vit.pth --patch_size 7", "--img_size 32: --arch vit_mini cannot take such images"),
        ("--init_from {here}/list.pth", "list.pth: holds a list, expected a dict of tensors"),
        ("--init_from {here}", "is a folder; expected a file"),
        ("--init_from=", "no such file"),
    ],
)
def test_what_cannot_be_started_from_is_one_line(given, message, folder, odd_files, tmp_path, capsys):
    words = words_of(folder, tmp_path / "run") + given.format(here=odd_files).split()
    with pytest.raises(SystemExit) as stop:
        main_cplearn.main(words)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert stop.value.code == 2 and len(errors) == 1 and message in errors[0], errors
    assert not (tmp_path / "run" / "checkpoint.pth").exists()


@pytest.fixture(scope="module")
def odd_files(tmp_path_factory):
    here = tmp_path_factory.mktemp("odd")
    state = build_backbone("vit_mini", 32, 8).state_dict()
    torch.save(state, here / "vit.pth")
    torch.save({"student": prefixed("module.", state), "teacher": state}, here / "both.pth")
    torch.save(build_backbone("resnet8", width=8).state_dict(), here / "resnet.pth")
    torch.save(dinov3("meta")[0], here / "dinov3.pth")
    torch.save([1, 2], here / "list.pth")
    return here
