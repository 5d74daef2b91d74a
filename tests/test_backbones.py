"""Backbones by name: shapes, the paper's table, and one-line errors."""

import argparse
import copy

import pytest
import torch
import torch.nn.functional as F

import vision_transformer
from backbones import add_backbone_arguments, build_backbone, compile_backbone, lay_out, resolve_backbone_defaults
from utils import UserError


@pytest.mark.parametrize("arch", ["vit_mini", "vit_tiny", "resnet8", "resnet18", "test_vit", "test_resnet"])
@torch.no_grad()
def test_every_backbone_maps_images_to_embed_dim_numbers(arch):
    model = build_backbone(arch, img_size=32, patch_size=8, in_chans=1).eval()
    features = model(torch.randn(3, 1, 32, 32))
    assert features.shape == (3, model.embed_dim)
    assert features.std(dim=0).max() > 0


@torch.no_grad()
def test_resnet8_is_table_5():
    torch.manual_seed(0)
    model, x = build_backbone("resnet8", width=12), torch.randn(2, 3, 32, 32)
    convolutions = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    assert sorted((c.in_channels, c.out_channels, *c.kernel_size) for c in convolutions) == sorted(
        [(3, 12, 3, 3), (3, 12, 1, 1)] + 7 * [(12, 12, 3, 3)]
    )
    assert {(c.stride, c.padding) for c in convolutions} == {((1, 1), (1, 1)), ((1, 1), (0, 0))}

    def conv(x, layer, padding=1):
        return F.conv2d(x, layer.weight, layer.bias, padding=padding)

    def lrelu(x):
        return torch.maximum(x, 0.2 * x)

    def halve(x):
        return (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4

    b1, b2, b3, b4 = model.block1, model.block2, model.block3, model.block4
    h = halve(conv(lrelu(conv(x, b1.conv1)), b1.conv2)) + conv(halve(x), b1.shortcut, padding=0)
    h = halve(conv(lrelu(conv(lrelu(h), b2.conv1)), b2.conv2)) + halve(h)
    h = conv(lrelu(conv(lrelu(h), b3.conv1)), b3.conv2) + h
    h = conv(lrelu(conv(lrelu(h), b4.conv1)), b4.conv2) + h
    torch.testing.assert_close(model(x), h.flatten(2).mean(dim=2), atol=1e-5, rtol=1e-5)


def test_resnet8_widths_of_the_paper():
    assert build_backbone("resnet8").embed_dim == 128
    assert build_backbone("resnet8", width=256).embed_dim == 256
    # 3 -> F by 3x3 and 1x1, then seven F -> F by 3x3, each with a bias
    expected = (9 * 3 + 1) * 128 + (3 + 1) * 128 + 7 * (9 * 128 + 1) * 128
    assert sum(p.numel() for p in build_backbone("resnet8").parameters()) == expected


@torch.no_grad()
def test_resnet18_is_the_cifar_variant():
    model = build_backbone("resnet18").eval()
    assert sum(p.numel() for p in model.parameters()) == 11_173_962 - 5130  # the usual count, less a 10-class layer
    last_map = []
    model.layer4.register_forward_hook(lambda module, inputs, output: last_map.append(output.shape))
    model(torch.randn(1, 3, 32, 32))
    assert last_map == [(1, 512, 4, 4)]  # ImageNet's stem would leave 1 x 1


def test_drop_path_default_is_dino_s_for_vits_and_nothing_elsewhere():
    assert build_backbone("vit_tiny", drop_path_rate=None).blocks[-1].drop_path1.drop_prob == pytest.approx(0.1)
    build_backbone("resnet8", drop_path_rate=None)
    assert build_backbone("test_vit", drop_path_rate=0.3).blocks[-1].drop_path1.drop_prob == pytest.approx(0.3)


def test_gradient_checkpointing_reaches_the_backbone():
    assert build_backbone("vit_tiny", grad_checkpointing=True).grad_checkpointing
    assert build_backbone("test_vit", grad_checkpointing=True).grad_checkpointing


@pytest.mark.parametrize(
    ("arch", "options", "message"),
    [
        ("vit_smal", {}, "--arch vit_smal is unknown; close: vit_small"),
        ("hf-hub:timm/resnet18", {}, "is unknown"),  # would ask the network
        ("vit_small", {"img_size": 100}, "--img_size 100 is not a multiple of --patch_size 16"),
        ("vit_small", {"patch_size": 0}, "--patch_size 0"),
        ("vit_small", {"width": 64}, "--width 64 is for --arch resnet8"),
        ("vit_small", {"drop_path_rate": 1.0}, "--drop_path_rate 1.0 is not in"),
        ("resnet8", {"width": 0}, "--width 0"),
        ("resnet8", {"drop_path_rate": 0.1}, "resnet8 has no stochastic depth"),
        ("resnet18", {"grad_checkpointing": True}, "--grad_checkpointing: resnet18 does not offer it"),
        ("vgg11", {"drop_path_rate": 0.1}, "--drop_path_rate 0.1: vgg11 does not take it"),
        ("densenet121", {"drop_path_rate": 0.1}, "--drop_path_rate 0.1: densenet121"),
    ],
)
def test_what_cannot_be_is_one_line(arch, options, message):
    with torch.device("meta"), pytest.raises(UserError) as error:
        build_backbone(arch, **options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_flags_build_the_default_backbone():
    parser = argparse.ArgumentParser()
    add_backbone_arguments(parser)
    args = resolve_backbone_defaults(parser.parse_args([]))
    assert (args.arch, args.patch_size, args.drop_path_rate) == ("vit_small", 16, None)
    with torch.device("meta"):
        assert args.init_from is None
        del args.init_from  # `pretrained.load_backbone` reads it
        assert build_backbone(**vars(args)).embed_dim == 384
    assert "vit_small" in parser.format_help()


# ---- compiled --------------------------------------------------------------------------------------------------------


@pytest.fixture
def counting(monkeypatch):
    """[shape of the input] of each call of what torch.compile has compiled, which here leaves it as it is."""
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **kwargs: noting(function, compiled))
    return compiled


def noting(function, compiled):
    def run(*args, **kwargs):
        compiled.append(args[0].shape)
        return function(*args, **kwargs)

    return run


@pytest.mark.parametrize(
    ("arch", "said", "times"), [("vit_tiny", "compiled block by block", 12), ("test_vit", "block by block", 6),
    ("test_convnext", "compiled", 1), ("resnet18", "compiled", 1), ("test_efficientnet", "compiled", 1)],
)  # fmt: skip
def test_a_backbone_is_compiled_by_blocks_or_whole(counting, arch, said, times):
    model = build_backbone(arch, 32, 8, in_chans=3).train()
    names, buffers = list(model.state_dict()), [buffer.clone() for buffer in model.buffers()]
    x = torch.randn(4, 3, 32, 32)
    expected = copy.deepcopy(model)(x)
    assert compile_backbone(model, lambda: model(x).sum().backward()).endswith(said)
    assert len(counting) == times and list(model.state_dict()) == names
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(buffer, before) for buffer, before in zip(model.buffers(), buffers, strict=True))
    assert torch.equal(model(x), expected) and len(counting) == 2 * times


def test_where_compiling_fails_the_backbone_runs_as_it_is(tmp_path):
    """By a C++ compiler that is not there, found by torch's own compiler."""
    model = build_backbone("resnet8", in_chans=1, width=4).train()
    x = torch.randn(2, 1, 32, 32)
    expected = model(x)
    with torch._inductor.config.patch({"cpp.cxx": (str(tmp_path / "no-such-compiler"),), "force_disable_caches": True}):
        said = compile_backbone(model, lambda: model(x).sum().backward())
        assert said.startswith("not compiled, and slower: ") and "\n" not in said and len(said) < 300
        assert torch.equal(model(x), expected)
    assert all(p.grad is None for p in model.parameters())


def test_a_backbone_of_more_forms_than_torch_compiles_is_said(monkeypatch):
    model = build_backbone("test_vit", 32, in_chans=3).train()
    x = torch.randn(2, 3, 32, 32)

    def fail():
        raise torch._dynamo.exc.FailOnRecompileLimitHit("too many forms")

    assert compile_backbone(model, fail) == "not compiled, and slower: FailOnRecompileLimitHit: too many forms"
    assert model(x).shape == (2, model.embed_dim) and all(block._compiled_call_impl is None for block in model.blocks)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["blocks", "whole"])
def test_what_is_compiled_computes_the_same(kind):
    """Blocks with stochastic depth, crops of two sizes joined, recomputed in the backward pass; one pass per size."""
    torch.manual_seed(0)
    views = [torch.randn(4, 3, size, size) for size in (32, 64)]
    if kind == "blocks":
        sizes = {"patch_size": 8, "img_size": 32, "embed_dim": 64, "depth": 3, "num_heads": 2}
        model = vision_transformer.VisionTransformer(**sizes, drop_path_rate=0.3, grad_checkpointing=True).train()
    else:
        model = build_backbone("test_convnext", 32).train()

    def results():
        torch.manual_seed(1)
        features = model(views) if kind == "blocks" else torch.cat([model(x) for x in views])
        features.square().sum().backward()
        found = [features, *(p.grad.clone() for p in model.parameters())]
        model.zero_grad()
        return found

    expected = results()
    assert compile_backbone(model, results) == {"blocks": "compiled block by block", "whole": "compiled"}[kind]
    for found, wanted in zip(results(), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("arch", ["resnet8", "resnet18", "test_convnext", "vit_tiny"])
def test_convolutions_have_channels_last_and_compute_the_same(monkeypatch, arch, device):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    model, x = build_backbone(arch, 32, 8).eval(), torch.randn(2, 3, 32, 32)
    expected, weight = model(x), next(p for p in model.parameters() if p.dim() == 4 and p.shape[2] > 1)
    memory_format = lay_out(torch.nn.ModuleList([model, copy.deepcopy(model)]), torch.device(device))
    left = {"cpu": ("vit_tiny", "test_convnext"), "cuda": ("vit_tiny",)}[device]
    assert memory_format == (torch.contiguous_format if arch in left else torch.channels_last)
    assert torch.backends.cudnn.benchmark == (memory_format == torch.channels_last and device == "cuda")
    assert weight.is_contiguous(memory_format=memory_format)
    for images in (x, x.contiguous(memory_format=memory_format)):  # as the evaluations and as a training have them
        torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)
