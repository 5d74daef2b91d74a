"""Our ViTs against timm's, against PyTorch's attention kernel, and against themselves taken apart."""

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer

import vision_transformer
from objective import features_of_views
from vision_transformer import VisionTransformer, vit_base, vit_large, vit_mini, vit_small, vit_tiny

BUILDERS = {"tiny": vit_tiny, "small": vit_small, "base": vit_base}


@pytest.fixture(scope="module")
def small_vit():
    torch.manual_seed(0)
    return VisionTransformer(patch_size=8, img_size=32, embed_dim=48, depth=5, num_heads=3).eval()


def images(size, channels=3, batch=2):
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(size))


@pytest.mark.parametrize(("name", "num_parameters"), [("tiny", 5_524_416), ("small", 21_665_664), ("base", 85_798_656)])
def test_parameters_are_those_of_timm_and_dino(name, num_parameters):
    with torch.device("meta"):
        ours = BUILDERS[name]()
        theirs = timm.create_model(f"vit_{name}_patch16_224", num_classes=0)
    assert sum(p.numel() for p in ours.parameters()) == num_parameters
    shapes = {key: tensor.shape for key, tensor in ours.state_dict().items()}
    assert shapes == {key: tensor.shape for key, tensor in theirs.state_dict().items()}


def test_large_has_timm_s_shapes():
    with torch.device("meta"):
        ours, theirs = vit_large(), timm.create_model("vit_large_patch16_224", num_classes=0)
    assert [p.shape for p in ours.parameters()] == [p.shape for p in theirs.parameters()]


def test_timm_weights_give_timm_features_at_any_size():
    torch.manual_seed(0)
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=0, dynamic_img_size=True).eval()
    check_timm_s_features(vit_tiny(), theirs, 224, 96)


def test_mini_is_timm_s_of_the_same_sizes():
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 4}
    theirs = TimmVisionTransformer(
        **sizes, embed_dim=128, depth=4, num_heads=4, mlp_ratio=4, num_classes=0, dynamic_img_size=True
    ).eval()
    check_timm_s_features(vit_mini(**sizes), theirs, 32, 20)


@torch.no_grad()
def check_timm_s_features(ours, theirs, *sizes):
    """Whether ours, with the weights of theirs, gives the features of theirs for images of these sizes."""
    for parameter in theirs.parameters():  # timm's initial biases are 0 and norms 1: agreement must not rest on that
        parameter.add_(0.02 * torch.randn_like(parameter))
    ours.eval().load_state_dict(theirs.state_dict())
    for size in sizes:
        torch.testing.assert_close(ours(images(size)), theirs(images(size)), atol=1e-5, rtol=1e-5)


def test_fused_attention_equals_plain(small_vit, monkeypatch):
    x = images(32)
    results = {}
    for form in ("plain", "fused"):
        monkeypatch.setattr(vision_transformer, "_on_cpu", lambda x, form=form: form == "plain")
        small_vit.zero_grad()
        features = small_vit(x)
        features.square().sum().backward()
        results[form] = (features.detach(), small_vit.blocks[0].attn.qkv.weight.grad.clone())
    torch.testing.assert_close(results["fused"], results["plain"], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_input_s_device_chooses_the_attention_form(device, monkeypatch):
    calls = []
    kernel = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *args: calls.append(args) or kernel(*args))
    model = VisionTransformer(patch_size=8, img_size=16, depth=2).to(device)  # moved after it was built
    model(images(16).to(device))
    assert len(calls) == (0 if device == "cpu" else 2)


@torch.no_grad()
def test_last_selfattention_reproduces_the_last_block(small_vit):
    x, last = images(32), small_vit.blocks[-1]
    block_input = []
    hook = last.register_forward_pre_hook(lambda module, inputs: block_input.append(inputs[0]))
    features = small_vit(x)
    hook.remove()
    attention = small_vit.get_last_selfattention(x)
    assert attention.shape == (2, 3, 17, 17)
    torch.testing.assert_close(attention.sum(dim=-1), torch.ones(2, 3, 17))

    tokens = block_input[0]
    value = F.linear(last.norm1(tokens), last.attn.qkv.weight[2 * 48 :], last.attn.qkv.bias[2 * 48 :])
    value = value.reshape(2, 17, 3, 16)  # heads lie side by side in the width
    tokens = tokens + last.attn.proj(torch.einsum("bhij,bjhd->bihd", attention, value).reshape(2, 17, 48))
    tokens = tokens + last.mlp(last.norm2(tokens))
    torch.testing.assert_close(small_vit.norm(tokens)[:, 0], features, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_intermediate_layers_are_the_last_blocks_oldest_first(small_vit):
    x = images(32)
    outputs = []
    hooks = [block.register_forward_hook(lambda m, i, output: outputs.append(output)) for block in small_vit.blocks]
    layers = small_vit.get_intermediate_layers(x, n=4)
    for hook in hooks:
        hook.remove()
    assert [layer.shape for layer in layers] == 4 * [(2, 17, 48)]
    for layer, output in zip(layers, outputs[-4:], strict=True):
        assert torch.equal(layer, F.layer_norm(output, (48,), small_vit.norm.weight, small_vit.norm.bias, 1e-6))
    torch.testing.assert_close(small_vit.get_intermediate_layers(x)[0][:, 0], small_vit(x), atol=1e-5, rtol=1e-5)


def test_an_image_has_the_same_features_in_any_batch(small_vit):
    x = images(48, batch=5)
    torch.testing.assert_close(small_vit(x)[3:4], small_vit(x[3:4]), atol=1e-5, rtol=1e-5)


def test_initialisation_is_dino_s():
    torch.manual_seed(0)
    model = VisionTransformer(depth=4)
    for tensor in (model.cls_token, model.pos_embed, model.blocks[3].attn.qkv.weight, model.blocks[3].mlp.fc2.weight):
        assert abs(tensor.std().item() / 0.02 - 1) < 0.2
    assert all(block.attn.qkv.bias.abs().max() == 0 for block in model.blocks)


def test_stochastic_depth_rises_linearly():
    with torch.device("meta"):
        model = vit_tiny(drop_path_rate=0.11)
    rates = [getattr(block.drop_path1, "drop_prob", 0) for block in model.blocks]
    assert rates == pytest.approx([0.01 * i for i in range(12)])


def test_gradient_checkpointing_alters_no_gradient():
    x = images(16)
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = VisionTransformer(patch_size=8, img_size=16, depth=3, grad_checkpointing=checkpointing)
        model(x).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_images_that_do_not_fit_are_refused(small_vit):
    for method in (small_vit, small_vit.get_intermediate_layers, small_vit.get_last_selfattention):
        with pytest.raises(ValueError, match=r"30 x 30 pixels .* patches of 8"):
            method(images(30))
        with pytest.raises(ValueError, match="1 channels, the model takes 3"):
            method(images(32, channels=1))
    with pytest.raises(ValueError, match="img_size 100 is not a multiple of patch_size 16"):
        vit_tiny(img_size=100)


PARTS = {
    "plain": {},
    "released": {"init_values": 0.5, "reg_tokens": 4, "no_embed_class": True, "global_pool": "avg"},
    "checkpointing": {"grad_checkpointing": True},
}
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_one_pass_for_all_sizes_equals_one_per_size(parts, dtype, monkeypatch):
    torch.manual_seed(0)
    model = VisionTransformer(patch_size=8, img_size=32, embed_dim=48, depth=3, num_heads=3, **parts).to(dtype)
    views = [images(size, batch=3).to(dtype) * (1 + 0.1 * i) for i, size in enumerate(2 * [32] + 8 * [16])]
    weights, results = [i % 3 + 1 for i in range(10)], []
    calls = []
    model.register_forward_pre_hook(lambda module, inputs: calls.append(inputs[0]))
    for joins in (False, True):
        monkeypatch.setattr(VisionTransformer, "joins_sizes", joins)
        model.zero_grad()
        features = features_of_views(model, views)
        sum(weight * each.square().mean() for weight, each in zip(weights, features, strict=True)).backward()
        results.append((features, [p.grad for p in model.parameters() if p.grad is not None]))
    assert [isinstance(call, list) for call in calls] == [False, False, True]
    assert [each.shape for each in results[0][0]] == 10 * [(3, 48)]
    torch.testing.assert_close(results[1], results[0], rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    for view, found in zip(views, results[1][0], strict=True):  # each by itself: the order of the views
        torch.testing.assert_close(found, model(view), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@torch.no_grad()
def test_joined_sizes_give_timm_s_features():
    torch.manual_seed(0)
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=0, dynamic_img_size=True).eval().double()
    for parameter in theirs.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))
    ours = vit_tiny().double().eval()
    ours.load_state_dict(theirs.state_dict())
    sizes = [images(size, batch=batch).double() for size, batch in ((96, 2), (32, 3), (48, 1))]
    torch.testing.assert_close(ours(sizes), torch.cat([theirs(each) for each in sizes]), rtol=1e-10, atol=1e-10)


def test_sizes_are_joined_off_the_cpu_only():
    model = VisionTransformer(patch_size=8, img_size=16, depth=1)
    assert not model.joins_sizes
    calls = []
    model = model.to("meta")  # moved after it was built
    model.register_forward_pre_hook(lambda module, inputs: calls.append(inputs[0]))
    features = features_of_views(model, [images(size).to("meta") for size in (32, 32, 16)])
    assert [each.shape for each in features] == 3 * [(2, 384)]
    assert len(calls) == 1
    features_of_views(model, [images(32).to("meta")])
    assert isinstance(calls[1], torch.Tensor)  # one size needs no list


def test_other_backbones_get_one_pass_per_size():
    calls = []

    def backbone(x):
        calls.append(x)
        return x.mean(dim=(2, 3))

    views = [images(size) for size in (32, 32, 16)]
    features = features_of_views(backbone, views)
    assert [call.shape for call in calls] == [(4, 3, 32, 32), (2, 3, 16, 16)]
    torch.testing.assert_close(features, [view.mean(dim=(2, 3)) for view in views])
