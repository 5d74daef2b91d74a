"""Released files as their authors lay them out, with random numbers: the features are those of the authors' network.

The networks are timm's and torchvision's; of transformers' ViTs the forward pass is written out below.
"""

import argparse
import fractions
import json
import math
import re

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
import torchvision
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer

import main_cplearn
from backbones import build_backbone
from objective import Course
from pictures import picture, write
from pretrained import load_backbone, load_pretrained
from test_pretrained import TheirHead, prefixed
from utils import UserError
from visualize_attention import attention_and_tokens
from weight_layouts import find_networks, shape_settings


def timm_model(arch, seed=0, **options):
    """One of timm's networks, every parameter far from its initial value."""
    torch.manual_seed(seed)
    model = timm.create_model(arch, num_classes=0, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def images(size=56, channels=3):
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(size))


def line(capsys):
    """What loading said, without the path."""
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said.partition(".pth: ")[2].strip()


def assert_same_features(path, theirs, size=56, **options):
    model = load_pretrained(path, **options)
    with torch.no_grad():
        torch.testing.assert_close(model(images(size)), theirs(images(size)), atol=1e-5, rtol=1e-5)
    return model


# ---- DINOv2 and DINOv3 -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dinov2():
    return timm_model("vit_small_patch14_dinov2", img_size=56, dynamic_img_size=True)


@pytest.fixture(scope="module")
def with_registers():
    return timm_model("vit_small_patch14_reg4_dinov2", img_size=56, dynamic_img_size=True)


def released(model):
    """As DINOv2's files have it: a mask token, a position for the CLS token and none for the registers."""
    state = dict(model.state_dict()) | {"mask_token": torch.randn(1, 384)}
    if "reg_token" in state:
        own = torch.randn(1, 1, 384)
        state["register_tokens"] = state.pop("reg_token")
        state["cls_token"] = state["cls_token"] - own
        state["pos_embed"] = torch.cat([own, state["pos_embed"]], dim=1)
    return state


def chunked(state):
    """blocks.7 -> blocks.1.7, as DINOv2 trains them in chunks."""
    parts = {name: name.split(".") for name in state}
    for name in parts:
        if name.startswith("blocks."):
            parts[name].insert(1, str(int(parts[name][1]) // 4))
    return {".".join(words): state[name] for name, words in parts.items()}


def test_dinov2_as_released(dinov2, tmp_path, capsys):
    torch.save(released(dinov2), tmp_path / "dinov2.pth")
    model = assert_same_features(tmp_path / "dinov2.pth", dinov2)
    assert line(capsys) == (
        "vit_small, 6 heads, patches of 14 px, LayerScale, positions of 56 px, interpolated for other sizes, DINOv2's "
        "layout, its number of heads is assumed, as the shapes do not tell (--num_heads), for images of 56 px, as "
        "DINOv2 evaluates; left out: mask_token"
    )
    with torch.no_grad():  # images of another size: as timm interpolates
        torch.testing.assert_close(model(images(84)), dinov2(images(84)), atol=1e-5, rtol=1e-5)


def test_dinov2_with_registers(with_registers, tmp_path, capsys):
    torch.save(released(with_registers), tmp_path / "reg.pth")
    model = assert_same_features(tmp_path / "reg.pth", with_registers)
    assert "4 registers" in line(capsys)
    with torch.no_grad():
        tokens = with_registers.forward_features(images())
        attention, patches = attention_and_tokens(model.backbone, images())
        last = model.with_last_blocks(1, avgpool_patchtokens=True)(images())
    torch.testing.assert_close(patches.flatten(1, 2), tokens[:, 5:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(last[:, 1::2], tokens[:, 5:].mean(dim=1), atol=1e-5, rtol=1e-5)
    assert attention.shape == (2, 6, 4, 4)


def test_dinov2_is_evaluated_at_224_pixels(dinov2, tmp_path):
    state = released(dinov2) | {"pos_embed": torch.zeros(1, 1 + 37 * 37, 384)}  # 518 px, as released
    torch.save(state, tmp_path / "dinov2.pth")
    sizes = [load_pretrained(tmp_path / "dinov2.pth", img_size=size).settings["img_size"] for size in (None, 518)]
    assert sizes == [224, 518]


@pytest.mark.parametrize("nested", [False, True])
def test_dinov2_s_training_files(dinov2, nested, tmp_path, capsys):
    torch.manual_seed(0)
    head = TheirHead(False, 3, in_dim=384).eval()
    teacher = prefixed("backbone.", chunked(released(dinov2))) | prefixed("dino_head.", head.state_dict())
    teacher |= prefixed("ibot_head.", head.state_dict())
    student = {name: torch.zeros_like(tensor) for name, tensor in teacher.items() if "ibot" not in name}
    content = {"teacher": teacher}
    if nested:
        content = {"model": prefixed("teacher.", teacher) | prefixed("student.", student), "iteration": 3}
    torch.save(content, tmp_path / "teacher.pth")
    model = assert_same_features(tmp_path / "teacher.pth", dinov2)
    with torch.no_grad():
        codes = head(dinov2(images())).argmax(dim=1)
    assert torch.equal(model.assign(images()), codes)
    said = line(capsys)
    assert said.endswith(f"left out: mask_token, ibot_head ({len(head.state_dict())} tensors)")
    assert said.startswith("teacher, not student (--checkpoint_key); ") is nested


@pytest.mark.slow
def test_dinov2_giant_has_timm_s_names_and_shapes():
    for arch in ("vit_giant_patch14_dinov2", "vit_giant_patch14_reg4_dinov2"):
        with torch.device("meta"):
            own = timm.create_model(arch, num_classes=0).state_dict()
            state = {name.replace("fc1", "w12").replace("fc2", "w3"): t for name, t in own.items()}
            if "reg_token" in state:
                state["register_tokens"] = state.pop("reg_token")
                state["pos_embed"] = torch.zeros(1, 1 + 37 * 37, 1536)
            (network,) = find_networks(state)
            settings = shape_settings(network)
            assert settings["arch"] == arch
            built = build_backbone(arch, 518, 14, **settings["parts"]).state_dict()
        assert {n: t.shape for n, t in network.state.items()} == {n: t.shape for n, t in built.items()}


def by_meta(model):
    """DINOv3's state dict as its authors' files have it."""
    state = {}
    for name, tensor in model.state_dict().items():
        name = name.replace("reg_token", "storage_tokens")
        for number in "12":
            name = name.replace(f"gamma_{number}", f"ls{number}.gamma")
        state[name] = tensor
    for block in range(12):
        q, v = (state.pop(f"blocks.{block}.attn.{part}_bias", torch.zeros(384)) for part in "qv")
        state[f"blocks.{block}.attn.qkv.bias"] = torch.cat([q, torch.zeros(384), v])
        state[f"blocks.{block}.attn.qkv.bias_mask"] = torch.cat([torch.ones(384), torch.zeros(384), torch.ones(384)])
    return state | {"mask_token": torch.zeros(1, 384), "rope_embed.periods": torch.ones(16)}


@pytest.mark.parametrize("arch", ["vit_small_patch16_dinov3", "vit_small_patch16_dinov3_qkvb"])
def test_dinov3_under_meta_s_names(arch, tmp_path, capsys):
    model = timm_model(arch, global_pool="token")
    torch.save(by_meta(model), tmp_path / "dinov3.pth")
    assert_same_features(tmp_path / "dinov3.pth", model, size=64)
    assert "mask_token" in (said := line(capsys))
    assert said.startswith(f"{arch}, 6 heads, patches of 16 px, DINOv3's layout")


@pytest.mark.parametrize(
    "arch", ["vit_small_patch16_dinov3", pytest.param("vit_small_plus_patch16_dinov3", marks=pytest.mark.slow)]
)
def test_dinov3_under_timm_s_names(arch, tmp_path):
    model = timm_model(arch)
    torch.save(model.state_dict(), tmp_path / "dinov3.pth")
    assert_same_features(tmp_path / "dinov3.pth", model, size=64)


def by_hugging_face(model):
    """The same as transformers has it, whose keys have no bias."""
    state = {}
    for name, tensor in by_meta(model).items():
        name = re.sub(r"^(cls_token|mask_token)$", r"embeddings.\1", name)
        name = name.replace("storage_tokens", "embeddings.register_tokens").replace("blocks.", "layer.")
        name = name.replace("patch_embed.proj.", "embeddings.patch_embeddings.")
        name = re.sub(r"\.ls([12])\.gamma", r".layer_scale\1.lambda1", name).replace("attn.proj.", "attention.o_proj.")
        for ours, theirs in (("fc1_g", "gate_proj"), ("fc1_x", "up_proj"), ("fc1", "up_proj"), ("fc2", "down_proj")):
            name = name.replace(f"mlp.{ours}.", f"mlp.{theirs}.")
        if ".attn.qkv." in name:
            parts = {
                name.replace("attn.qkv", f"attention.{part}_proj"): t
                for part, t in zip("qkv", tensor.chunk(3), strict=True)
            }
            state |= {part: t for part, t in parts.items() if "k_proj.bias" not in part}
        else:
            state[name] = tensor
    return {name: t for name, t in state.items() if not name.endswith(("periods", "bias_mask"))}


@pytest.mark.parametrize(
    "arch",
    [
        "vit_small_patch16_dinov3",
        pytest.param("vit_small_patch16_dinov3_qkvb", marks=pytest.mark.slow),
        "vit_small_plus_patch16_dinov3",
    ],
)
def test_dinov3_under_transformers_names(arch, tmp_path, capsys):
    model = timm_model(arch, global_pool="token")
    torch.save(by_hugging_face(model), tmp_path / "model.pth")
    assert_same_features(tmp_path / "model.pth", model, size=64)
    assert line(capsys).startswith(f"{arch}, 6 heads, patches of 16 px, DINOv3's layout; left out: mask_token")


def test_other_networks_of_transformers_are_named_by_their_tensors(tmp_path):
    """BEiT's keys have no bias, and its positions are in every block."""
    state = {name: t for name, t in transformers_state(False).items() if not name.endswith("key.bias")}
    del state["embeddings.position_embeddings"]
    torch.save(state, tmp_path / "beit.pth")
    with pytest.raises(UserError, match=r"name it with --arch; its tensors: cls_token, patch_embed.proj.weight, "):
        load_pretrained(tmp_path / "beit.pth")


def test_a_projection_that_is_missing_is_no_zero(tmp_path):
    state = transformers_state(False)
    del state[next(name for name in state if name.endswith("key.weight"))]
    torch.save(state, tmp_path / "damaged.pth")
    with pytest.raises(UserError, match=r"blocks\.0\.attn\.(qkv|query)"):
        load_pretrained(tmp_path / "damaged.pth", arch="vit_tiny")


# ---- MoCo-v3, MAE, iBOT, DINO's ResNet -------------------------------------------------------------------------------


def moco(base, momentum):
    mlp = {
        "head.0.weight": torch.randn(8, 384),
        "head.1.running_mean": torch.zeros(8),
        "head.3.weight": torch.ones(4, 8),
    }
    state = prefixed("module.base_encoder.", base.state_dict() | mlp)
    state |= prefixed("module.momentum_encoder.", momentum.state_dict() | mlp)
    return {"epoch": 300, "arch": "vit_small", "state_dict": state | {"module.predictor.0.weight": torch.randn(4, 4)}}


def test_moco_v3_has_12_heads(tmp_path, capsys):
    base, momentum = (timm_model("vit_small_patch16_224", seed, img_size=64, num_heads=12) for seed in (0, 1))
    torch.save(moco(base, momentum), tmp_path / "moco.pth")
    assert_same_features(tmp_path / "moco.pth", base, size=64)
    assert line(capsys) == (
        "base_encoder, not momentum_encoder (--checkpoint_key); vit_small, 12 heads, patches of 16 px, positions of "
        "64 px, interpolated for other sizes, MoCo-v3's layout; left out: head (3 tensors), predictor"
    )
    model = assert_same_features(tmp_path / "moco.pth", momentum, size=64, checkpoint_key="momentum_encoder")
    assert model.settings["checkpoint_key"] == "momentum_encoder"


def test_heads_are_told_where_shapes_do_not(tmp_path, capsys):
    theirs = timm_model("vit_tiny_patch16_224", img_size=32, num_heads=6)
    torch.save(theirs.state_dict(), tmp_path / "flat.pth")
    assert_same_features(tmp_path / "flat.pth", theirs, size=32, num_heads=6)
    assert "assumed" not in line(capsys)
    assert load_pretrained(tmp_path / "flat.pth").settings["num_heads"] == 3
    assert "3 heads" in (said := line(capsys))
    assert "its number of heads is assumed, as the shapes do not tell (--num_heads)" in said
    with pytest.raises(UserError, match="--num_heads 7 does not divide the width of vit_tiny, 192"):
        load_pretrained(tmp_path / "flat.pth", num_heads=7)


def test_the_smallest_vit_is_told_by_its_shapes(tmp_path):
    backbone = build_backbone("vit_mini", img_size=32, patch_size=4).eval()
    torch.save(backbone.state_dict(), tmp_path / "flat.pth")
    model = load_pretrained(tmp_path / "flat.pth")
    assert [model.settings[name] for name in ("arch", "num_heads", "patch_size")] == ["vit_mini", 4, 4]
    with torch.no_grad():
        assert torch.equal(model(images(32)), backbone(images(32)))


@pytest.mark.parametrize("decoder", [False, True])
def test_mae(decoder, tmp_path, capsys):
    model = timm_model("vit_tiny_patch16_224", img_size=64)
    state = dict(model.state_dict())
    if decoder:
        state |= {"mask_token": torch.zeros(1, 1, 8), "decoder_pos_embed": torch.zeros(1, 17, 8)}
        state |= {f"decoder_{name}": torch.zeros(8, 8) for name in ("embed.weight", "blocks.0.mlp.fc1.weight")}
    torch.save({"model": state, "args": argparse.Namespace(model="mae_vit_tiny")}, tmp_path / "mae.pth")
    model = assert_same_features(tmp_path / "mae.pth", model, size=64)
    assert ("left out: mask_token, decoder_pos_embed, decoder_embed, decoder_blocks" in line(capsys)) == decoder


def test_mae_fine_tuned_averages_patches(tmp_path, capsys):
    model = timm_model("vit_tiny_patch16_224", img_size=64, global_pool="avg")
    torch.save({"model": model.state_dict() | {"head.weight": torch.ones(9, 192)}}, tmp_path / "mae.pth")
    assert_same_features(tmp_path / "mae.pth", model, size=64)
    assert "features: mean of the patches (fc_norm)" in line(capsys)


def test_ibot(tmp_path):
    model = timm_model("vit_tiny_patch16_224", img_size=64)
    head = TheirHead(False, 3)
    teacher = prefixed("backbone.", model.state_dict() | {"masked_embed": torch.zeros(1, 192)})
    teacher |= prefixed("head.", head.state_dict()) | {"head.last_layer2.weight_g": torch.ones(50, 1)}
    torch.save({"student": prefixed("module.", teacher), "teacher": teacher}, tmp_path / "ibot.pth")
    loaded = assert_same_features(tmp_path / "ibot.pth", model, size=64)
    assert loaded.head.last_layer.weight_g.shape == (50, 1)
    torch.save({"state_dict": model.state_dict() | {"masked_embed": torch.zeros(1, 192)}}, tmp_path / "released.pth")
    assert_same_features(tmp_path / "released.pth", model, size=64)


def test_dino_s_head_under_torch_s_newer_names(tmp_path):
    torch.manual_seed(0)
    head = TheirHead(False, 3)
    head.last_layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(10, 50, bias=False))
    backbone = build_backbone("vit_tiny", img_size=32)
    state = prefixed("backbone.", backbone.state_dict()) | prefixed("head.", head.state_dict())
    torch.save({"teacher": state}, tmp_path / "dino.pth")
    features = torch.randn(20, 192)
    with torch.no_grad():
        torch.testing.assert_close(load_pretrained(tmp_path / "dino.pth").head(features), head(features))


@pytest.mark.parametrize("arch", ["resnet18", pytest.param("resnet34", marks=pytest.mark.slow), "resnet50"])
def test_resnets_of_dino_and_torchvision(arch, tmp_path, capsys):
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, arch)(weights=None).eval()
    state = theirs.state_dict()
    theirs.fc = torch.nn.Identity()
    torch.save({"teacher": prefixed("module.", state)}, tmp_path / "resnet.pth")
    assert_same_features(tmp_path / "resnet.pth", theirs, size=64)
    arch = {"resnet18": "resnet18.tv_in1k"}.get(arch, arch)  # resnet18 is ours, for small images
    assert line(capsys) == f"{arch}; left out: fc (2 tensors)"


def test_a_wide_resnet_is_no_resnet50(tmp_path):
    with torch.device("meta"):
        state = torchvision.models.wide_resnet50_2(weights=None).state_dict()
    few = {name: torch.zeros(tensor.shape) for name, tensor in state.items() if not name.startswith("fc.")}
    torch.save(few, tmp_path / "wide.pth")
    with pytest.raises(UserError, match="name it with --arch"):
        load_pretrained(tmp_path / "wide.pth")
    assert load_pretrained(tmp_path / "wide.pth", arch="wide_resnet50_2").embed_dim == 2048


# ---- torchvision and transformers ------------------------------------------------------------------------------------


def test_torchvision_s_vits(tmp_path, capsys):
    torch.manual_seed(0)
    theirs = torchvision.models.VisionTransformer(32, 8, 12, 3, 192, 768, num_classes=7).eval()
    for parameter in theirs.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    torch.save(theirs.state_dict(), tmp_path / "vit.pth")
    theirs.heads = torch.nn.Identity()
    assert_same_features(tmp_path / "vit.pth", theirs, size=32)
    assert line(capsys).endswith("left out: heads (2 tensors)")


def transformers_state(dinov2, dim=192, tokens=1 + 16):
    """Names and shapes of transformers' ViTModel, or Dinov2Model."""
    torch.manual_seed(0)
    dense = {"embeddings.patch_embeddings.projection": (dim, 3, 8, 8)}
    norms = ["layernorm"]
    scales = []
    for block in range(12):
        prefix = f"encoder.layer.{block}."
        dense |= {f"{prefix}attention.attention.{part}": (dim, dim) for part in ("query", "key", "value")}
        dense[f"{prefix}attention.output.dense"] = (dim, dim)
        first, second = ("mlp.fc1", "mlp.fc2") if dinov2 else ("intermediate.dense", "output.dense")
        dense |= {prefix + first: (4 * dim, dim), prefix + second: (dim, 4 * dim)}
        norms += [prefix + name for name in (("norm1", "norm2") if dinov2 else ("layernorm_before", "layernorm_after"))]
        scales += [f"{prefix}layer_scale{number}.lambda1" for number in (1, 2)] if dinov2 else []
    state = {"embeddings.cls_token": (1, 1, dim), "embeddings.position_embeddings": (1, tokens, dim)}
    for name, shape in dense.items():
        state |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    state |= {f"{name}.{part}": (dim,) for name in norms for part in ("weight", "bias")} | dict.fromkeys(scales, (dim,))
    small = 0.001 if not dinov2 else 1  # so that the norms' epsilon, 1e-12 for a ViTModel, is seen
    return {name: (small if "embeddings" in name else 1) * 0.2 * torch.randn(shape) for name, shape in state.items()}


def transformers_forward(state, x, eps, heads=3):
    """What their documentation says: embeddings, pre-norm blocks, the CLS token after the last norm."""

    def linear(name, x):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(name, x):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

    name = "embeddings.patch_embeddings.projection"
    x = F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], stride=8).flatten(2).mT
    x = (
        torch.cat([state["embeddings.cls_token"].expand(len(x), -1, -1), x], dim=1)
        + state["embeddings.position_embeddings"]
    )
    for block in range(12):
        prefix = f"encoder.layer.{block}."
        is_vit = f"{prefix}layernorm_before.weight" in state
        names = ("layernorm_before", "layernorm_after") if is_vit else ("norm1", "norm2")
        first, second = ("intermediate.dense", "output.dense") if is_vit else ("mlp.fc1", "mlp.fc2")
        scale = [state.get(f"{prefix}layer_scale{number}.lambda1", 1) for number in (1, 2)]
        h = norm(prefix + names[0], x)
        q, k, v = (
            linear(f"{prefix}attention.attention.{part}", h).unflatten(-1, (heads, -1)).transpose(1, 2)
            for part in ("query", "key", "value")
        )
        mixed = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v
        x = x + scale[0] * linear(f"{prefix}attention.output.dense", mixed.transpose(1, 2).flatten(2))
        h = norm(prefix + names[1], x)
        x = x + scale[1] * linear(prefix + second, F.gelu(linear(prefix + first, h)))
    return norm("layernorm", x)[:, 0]


@pytest.mark.parametrize("dinov2", [False, True])
def test_transformers_vits(dinov2, tmp_path):
    state = transformers_state(dinov2)
    beside = {"pooler.dense.weight": torch.ones(4, 4)} | {"embeddings.mask_token": torch.zeros(1, 192)}
    folder = tmp_path / "hub"
    folder.mkdir()
    safetensors.torch.save_file(prefixed("vit.", state | beside), folder / "model.safetensors")
    config = {"model_type": "vit", "num_attention_heads": 3, "image_size": 32, "num_channels": 3, "patch_size": 8}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}))
    model = load_pretrained(folder / "model.safetensors")
    expected = transformers_forward(state, images(32), eps=1e-6 if dinov2 else 1e-12)
    torch.testing.assert_close(model(images(32)), expected, atol=1e-5, rtol=1e-5)
    assert (model.settings["mean"], model.settings["std"]) == ([0.5] * 3, [0.25] * 3)


# ---- wrappers, and several networks in one file ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def small():
    """Two of timm's tiny ViTs."""
    return [timm_model("vit_tiny_patch16_224", seed, img_size=32) for seed in (0, 1)]


def in_blocks(words, state):
    return {name.replace("blocks.3.", f"blocks.3.{words}."): tensor for name, tensor in state.items()}


EXTRA = torch.ones(3)
WRAPPED = {  # a: the state dict to read, b: another
    "compiled inside": lambda a, b: prefixed("backbone._orig_mod.", a),
    "lightning": lambda a, b: {"state_dict": prefixed("model.backbone.", a), "hparams": {"lr": 1}},
    "stable-pretraining": lambda a, b: {"state_dict": prefixed("backbone.model.", a) | {"projector.weight": EXTRA}},
    "fsdp": lambda a, b: prefixed("_fsdp_wrapped_module.", in_blocks("_fsdp_wrapped_module", a)),
    "activation checkpointing": lambda a, b: in_blocks("_checkpoint_wrapped_module", a),
    "averaged": lambda a, b: prefixed("module.", a) | {"n_averaged": torch.tensor(3)},
    "ddp of compiled": lambda a, b: {"network": prefixed("module._orig_mod.encoder.", a)},
    "ema": lambda a, b: {"model": b, "model_ema": a},
    "ema in a module": lambda a, b: {"net": b, "ema": {"module": prefixed("module.", a)}},
    "timm's ema": lambda a, b: {"state_dict": b, "state_dict_ema": a, "optimizer": {"state": {0: {"exp": EXTRA}}}},
    "student and teacher": lambda a, b: prefixed("student_backbone.", b) | prefixed("teacher_backbone.", a),
    "solo-learn": lambda a, b: {"state_dict": prefixed("momentum_backbone.", b) | prefixed("backbone.", a)},
    "byol": lambda a, b: prefixed("target_network.net.", b) | prefixed("online_network.net.", a),
    "ijepa": lambda a, b: {"target_encoder": prefixed("module.", b), "encoder": prefixed("module.", a)},
}  # fmt: skip


@pytest.mark.parametrize("kind", WRAPPED)
def test_names_begin_anywhere(kind, small, tmp_path, capsys):
    torch.save(WRAPPED[kind](*(model.state_dict() for model in small)), tmp_path / "wrapped.pth")
    assert_same_features(tmp_path / "wrapped.pth", small[0], size=32)
    assert line(capsys)


def test_the_key_chooses_and_the_others_are_named(small, tmp_path, capsys):
    torch.save(WRAPPED["student and teacher"](*(model.state_dict() for model in small)), tmp_path / "both.pth")
    assert_same_features(tmp_path / "both.pth", small[1], size=32, checkpoint_key="student")
    assert line(capsys).startswith("student, not teacher_backbone (--checkpoint_key); vit_tiny")
    with pytest.raises(UserError, match="under --checkpoint_key x; the file has: student_backbone, teacher_backbone"):
        load_pretrained(tmp_path / "both.pth", "x")


def test_a_file_of_nothing_known_shows_its_tensors(tmp_path):
    torch.save({"stem.0.weight": torch.ones(3), "stem.0.bias": torch.ones(3)}, tmp_path / "odd.pth")
    with pytest.raises(UserError, match=r"name it with --arch; its tensors: stem\.0\.weight, stem\.0\.bias"):
        load_pretrained(tmp_path / "odd.pth")
    with pytest.raises(UserError, match=r"stem\.0\.vit_tiny: 0 of 150 tensors match.*unexpected: weight"):
        load_pretrained(tmp_path / "odd.pth", arch="vit_tiny")


def test_a_pickle_with_more_than_data_is_refused_with_what_to_do(small, tmp_path):
    torch.save({"teacher": small[0].state_dict(), "args": fractions.Fraction(1, 3)}, tmp_path / "unsafe.pth")
    with pytest.raises(UserError) as error:
        load_pretrained(tmp_path / "unsafe.pth")
    assert "global: GLOBAL fractions.Fraction was not an allowed global by default; save it anew" in str(error.value)
    assert "torch.save(model.state_dict(), FILE)" in str(error.value)
    assert "add_safe_globals" not in str(error.value)


def test_timm_converts_what_it_has_a_conversion_for(tmp_path):
    """ConvNeXt under its authors' names."""
    theirs = timm.create_model("convnext_atto", num_classes=0).eval()
    state = {}
    for name, tensor in theirs.state_dict().items():
        name = name.replace("stem.", "downsample_layers.0.").replace(".blocks.", ".").replace("head.norm.", "norm.")
        name = name.replace("stages.", "stages.").replace("conv_dw", "dwconv").replace("mlp.fc", "pwconv")
        for stage in (1, 2, 3):
            name = name.replace(f"stages.{stage}.downsample.", f"downsample_layers.{stage}.")
        state[name] = tensor.flatten() if "grn" in name else tensor
    torch.save({"model": state}, tmp_path / "convnext.pth")
    assert_same_features(tmp_path / "convnext.pth", theirs, size=64, arch="convnext_atto")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_becomes_float32(dtype, small, tmp_path):
    torch.save({name: tensor.to(dtype) for name, tensor in small[0].state_dict().items()}, tmp_path / "half.pth")
    rounded = timm_model("vit_tiny_patch16_224", img_size=32).to(dtype).float()
    assert_same_features(tmp_path / "half.pth", rounded, size=32)


def test_preprocessor_config_is_read_alone(small, tmp_path, capsys):
    torch.save(small[0].state_dict(), tmp_path / "weights.pth")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}))
    settings = load_pretrained(tmp_path / "weights.pth").settings
    assert (settings["mean"], settings["std"]) == ([0.5] * 3, [0.25] * 3)
    assert "settings of preprocessor_config.json, mean [0.5, 0.5, 0.5]" in line(capsys)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pth"])
def test_config_json_is_read_beside_any_file(name, small, tmp_path, capsys):
    torch.save(small[0].state_dict(), tmp_path / name)
    config = {"architecture": "vit_tiny_patch16_224", "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_pretrained(tmp_path / name).settings["mean"] == [0.5] * 3
    said = capsys.readouterr().err
    assert "settings of config.json, mean [0.5, 0.5, 0.5]" in said
    assert "assumed" not in said


@pytest.mark.slow
def test_every_timm_vit_that_ours_would_be_built_for_is_the_same(tmp_path):
    """Names of ours and another forward pass: timm has no such ViT among its small ones."""
    own = set(build_backbone("vit_tiny", img_size=32).state_dict())
    for arch in timm.list_models("*tiny*"):
        with torch.device("meta"):
            if "vit" not in arch or set(timm.create_model(arch, num_classes=0).state_dict()) != own:
                continue
        theirs = timm_model(arch)
        assert isinstance(theirs, TimmVisionTransformer)
        torch.save(theirs.state_dict(), tmp_path / "vit.pth")
        assert_same_features(tmp_path / "vit.pth", theirs, size=theirs.patch_embed.img_size[0])


# ---- to start a run from ---------------------------------------------------------------------------------------------


def test_a_run_s_backbone_is_the_file_s(small, tmp_path):
    torch.save(small[0].state_dict(), tmp_path / "vit.pth")
    words = f"--dataset imagefolder --pretrained {tmp_path}/vit.pth --out_dim 64 --device cpu --drop_path_rate 0"
    args = main_cplearn.get_args_parser().parse_args(words.split())
    main_cplearn.check_arguments(args, torch.device("cpu"))
    model = main_cplearn.build_model(args, Course(torch.device("cpu"), 4, 1, 10, 10))
    torch.testing.assert_close(model.backbone(images(32)), small[0](images(32)), atol=1e-5, rtol=1e-5)
    assert args.arch == "vit_tiny"


@pytest.mark.slow
def test_a_run_starts_from_released_weights(tmp_path):
    base = timm_model("vit_tiny_patch16_224", img_size=32, num_heads=6, init_values=1e-5)
    torch.save(base.state_dict(), tmp_path / "vit.pth")
    for number in range(8):
        write(tmp_path / "images" / "train" / "a" / f"{number}.png", picture(40, 40))
    flags = (
        f"--dataset imagefolder --data_path {tmp_path}/images --img_size 32 --local_crops_number 0 --out_dim 64 "
        f"--pretrained {tmp_path}/vit.pth --num_heads 6 --batch_size_per_gpu 4 --max_steps 2 --lr 1e-30 --min_lr 0 "
        f"--weight_decay 0 --weight_decay_end 0 --num_workers 0 --device cpu --precision fp32 "
        f"--output_dir {tmp_path}/run"
    )
    args = main_cplearn.get_args_parser().parse_args(flags.split())
    assert main_cplearn.train(args) == 2
    model = load_pretrained(tmp_path / "run" / "checkpoint.pth")
    assert (model.settings["arch"], model.settings["num_heads"]) == ("vit_tiny", 6)
    assert_same_features(tmp_path / "run" / "checkpoint.pth", base, size=32)


def test_flags_that_are_not_the_file_s_are_refused(small, tmp_path):
    torch.save(small[0].state_dict(), tmp_path / "vit.pth")
    words = ["--init_from", str(tmp_path / "vit.pth"), "--drop_path_rate", "0.3"]
    parser = main_cplearn.get_args_parser()
    args = parser.parse_args(words)
    args.in_chans, args.img_size = 3, 32
    backbone = load_backbone(args)
    assert (args.arch, args.patch_size, args.num_heads) == ("vit_tiny", 16, 3)
    assert backbone.training and all(parameter.requires_grad for parameter in backbone.parameters())
    assert backbone.blocks[-1].drop_path1.drop_prob == pytest.approx(0.3)
    args = parser.parse_args([*words, "--arch", "vit_base"])
    args.in_chans = 3
    with pytest.raises(UserError, match="--arch vit_base does not fit, the file's is vit_tiny: vit_base: "):
        load_backbone(args)
