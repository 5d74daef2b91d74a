"""Drop path against timm's law, against a loop over images by hand, and by what goes through the matrix products."""

import itertools
import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import vision_transformer
from vision_transformer import VisionTransformer, add_branch, draw_paths

DRAWS = 4000  # of a path, two for each block: 5 standard deviations of a share are below 0.04


@pytest.fixture(params=["skipped", "weighted"])
def form(request, monkeypatch):
    least = 0 if request.param == "skipped" else 1
    monkeypatch.setattr(vision_transformer, "least_spared", lambda x: least)
    return request.param


def make(depth=3, rate=0.4, **parts):
    torch.manual_seed(0)
    model = VisionTransformer(
        patch_size=8, img_size=32, embed_dim=24, depth=depth, num_heads=3, drop_path_rate=rate, **parts
    )
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms are not 0 and 1
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.double()


def crops(*counts_and_sizes):
    g = torch.Generator().manual_seed(1)
    return [torch.randn(count, 3, size, size, generator=g, dtype=torch.float64) for count, size in counts_and_sizes]


def weight_of_rows(path, x):
    """(len(x),) what each row's branch counts, 0 for those that do not go through."""
    weights = path.weights.flatten()
    return weights if path.rows is None else torch.zeros(len(x), dtype=x.dtype).index_add(0, path.rows, weights)


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.5, 0.85])
@pytest.mark.parametrize("shapes", [None, ((6, 5), (7, 2))], ids=["one size", "two sizes"])
def test_each_image_is_kept_in_the_share_that_timm_keeps(form, shapes, rate):
    torch.manual_seed(0)
    x = torch.zeros((7, 4, 3) if shapes is None else (44, 3), dtype=torch.float64)
    paths = [path for pair in draw_paths(DRAWS // 2 * [rate], x, shapes) for path in pair]
    assert all((path.rows is None) == (form == "weighted") for path in paths)
    weights = torch.stack([weight_of_rows(path, x) for path in paths])  # (draws, rows)
    for batch, tokens in shapes or ((7, 1),):
        images, weights = weights[:, : batch * tokens].unflatten(1, (batch, tokens)), weights[:, batch * tokens :]
        assert (images == images[:, :, :1]).all()  # an image's tokens share its fate
        kept = images[:, :, 0] > 0
        torch.testing.assert_close(images[:, :, 0], kept.double() / (1 - rate), rtol=1e-12, atol=0)
        torch.testing.assert_close(
            kept.double().mean(dim=0), torch.full((batch,), 1 - rate).double(), atol=0.04, rtol=0
        )
        counts = set(kept.sum(dim=1).tolist())
        assert counts == {math.floor(batch * (1 - rate)), math.ceil(batch * (1 - rate))}  # never further off


def test_attention_s_and_mlp_s_draws_of_all_blocks_differ(form):
    paths = [path for pair in draw_paths(20 * [0.5], torch.zeros(16, 2, 3)) for path in pair]
    assert len({tuple(weight_of_rows(path, torch.zeros(16)).tolist()) for path in paths}) == 40


def test_the_mean_over_draws_is_the_branch_without_drop_path(form):
    torch.manual_seed(0)
    x, mix = torch.randn(6, 5, 4, dtype=torch.float64), torch.randn(4, 4, dtype=torch.float64)
    pairs = draw_paths(DRAWS * [0.3], x)
    mean = sum(add_branch(x, lambda x, shapes: x @ mix, None, path) for path, _ in pairs) / DRAWS
    deviation = (x @ mix).abs() * math.sqrt(0.3 / 0.7 / DRAWS)
    assert ((mean - (x + x @ mix)).abs() < 5 * deviation).all()


@pytest.mark.parametrize("parts", [{}, {"init_values": 0.5, "reg_tokens": 2}], ids=["plain", "LayerScale, registers"])
@pytest.mark.parametrize("sizes", [[(7, 32)], [(4, 32), (9, 16)]], ids=["one size", "two sizes"])
def test_features_and_gradients_are_those_of_each_image_by_itself(form, sizes, parts, monkeypatch):
    """Given the draws, by hand: x + w f(x) for one image after the other, with its own two weights in each block."""
    drawn = []
    monkeypatch.setattr(
        vision_transformer,
        "draw_paths",
        lambda *args, **k: drawn.append((args, draw_paths(*args, **k))) or drawn[-1][1],
    )
    model, images = make(**parts), crops(*sizes)
    found = model(images)
    target = torch.randn(found.shape, dtype=torch.float64)
    gradients = torch.autograd.grad((found * target).sum(), list(model.parameters()))
    ((_, x, shapes), pairs), ((_, cls), last) = drawn  # the last block has an own row for each image

    weights = [pair[0] and [weight_of_rows(path, x) for path in pair] for pair in pairs]
    tokens = [1] * len(x) if shapes is None else [tokens for batch, tokens in shapes for _ in range(batch)]
    firsts = itertools.accumulate(tokens, initial=0)
    weights = [
        [each and (each[0][first], each[1][first]) for each in weights] for first in itertools.islice(firsts, len(cls))
    ]
    of_last = [weight_of_rows(path, cls) for path in last[0]]
    weights = [[*others, (of_last[0][image], of_last[1][image])] for image, others in enumerate(weights)]
    every_image = [image for each in images for image in each]
    expected = torch.cat([by_hand(model, image[None], own) for image, own in zip(every_image, weights, strict=True)])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    by_autograd = torch.autograd.grad((expected * target).sum(), list(model.parameters()))
    for (name, _), gradient, other in zip(model.named_parameters(), gradients, by_autograd, strict=True):
        tolerance = 1e-6 if name == "pos_embed" else 1e-10  # timm interpolates it in float32
        torch.testing.assert_close(gradient, other, rtol=tolerance, atol=tolerance)
    assert len({float(w) for own in weights for pair in own[1:] for w in pair}) > 2  # something was dropped


def by_hand(model, image, weights):
    """weights: of each block a pair, of attention and MLP; None: 1."""
    x = model._pos_embed(model.patch_embed(image))
    for block, of_block in zip(model.blocks, weights, strict=True):
        attention, mlp = of_block or (1, 1)
        x = x + attention * block.ls1(block.attn(block.norm1(x)))
        x = x + mlp * block.ls2(block.mlp(block.norm2(x)))
    return model.norm(x)[:, 0]


def test_nothing_is_drawn_without_drop_path_or_in_evaluation():
    for model in (make(rate=0.0).train(), make(rate=0.4).eval()):
        before = torch.get_rng_state()
        model(crops((4, 32), (4, 16)))
        model.get_intermediate_layers(crops((4, 32))[0])
        assert torch.equal(torch.get_rng_state(), before)
    model.train()(crops((4, 32)))
    assert not torch.equal(torch.get_rng_state(), before)


def test_rows_that_are_skipped_do_not_reach_the_matrix_products():
    model, images = make(rate=0.4), crops((10, 32), (20, 16))  # rates 0, 0.2, 0.4; 17 and 5 tokens
    rows = {"qkv": [], "fc1": []}
    for block in model.blocks:
        for name, layer in (("qkv", block.attn.qkv), ("fc1", block.mlp.fc1)):
            layer.register_forward_hook(
                lambda layer, inputs, output, name=name: rows[name].append(inputs[0].numel() // 24)
            )
    model(images)
    # the last block keeps all; of its MLP's results CLS alone is asked for
    assert rows == {"qkv": [270, 8 * 17 + 16 * 5, 270], "fc1": [270, 8 * 17 + 16 * 5, 30]}


def test_few_skipped_images_are_not_worth_their_copies():
    x = torch.zeros(100, 2, 3)
    assert draw_paths([0.019], x)[0][0].rows is None
    assert len(draw_paths([0.021], x)[0][0].rows) == 98
    off_the_cpu = x.to("meta")
    assert draw_paths([0.099], off_the_cpu)[0][0].rows is None
    assert len(draw_paths([0.11], off_the_cpu)[0][0].rows) == 89


@pytest.mark.parametrize("sizes", [[(8, 32)], [(4, 32), (8, 16)]], ids=["one size", "two sizes"])
def test_checkpointing_sees_the_same_draws(form, sizes):
    gradients = []
    for checkpointing in (False, True):
        model = make(grad_checkpointing=checkpointing)
        torch.manual_seed(3)
        model(crops(*sizes)).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_equal_seeds_give_equal_features_and_others_do_not():
    model, images = make(), crops((8, 32), (8, 16))
    features = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        features.append(model(images))
    assert torch.equal(features[0], features[1])
    assert not torch.allclose(features[0], features[2])


def test_blocks_that_are_called_alone_draw_for_themselves():
    model, x = make(), crops((50, 32))[0]
    block, tokens = model.blocks[2], torch.randn(50, 17, 24, dtype=torch.float64)
    unchanged = (block(tokens) == tokens).flatten(1).all(dim=1)
    assert 0 < unchanged.sum() < 30  # 0.4^2 of 50: neither attention nor MLP
    for call in (model.forward_features, model.forward_intermediates, model.get_intermediate_layers):
        call(x)


def test_a_gpu_is_not_waited_for():
    """Fake tensors hold no values: whatever asks for one raises."""
    model = make().float()
    with FakeTensorMode():
        weights = {name: torch.empty(p.shape, device="cuda") for name, p in model.named_parameters()}
        images = [torch.empty(6, 3, 32, 32, device="cuda"), torch.empty(24, 3, 16, 16, device="cuda")]
        features = torch.func.functional_call(model, weights, (images,))
    assert features.device.type == "cuda"
    assert features.shape == (30, 24)


def test_one_graph_whatever_is_drawn(form):
    model, images = make(), crops((8, 32), (16, 16))
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, backend=count, fullgraph=True)
    for seed in (3, 4):
        torch.manual_seed(seed)
        found = compiled(images)
        torch.manual_seed(seed)
        torch.testing.assert_close(found, model(images), rtol=1e-12, atol=1e-12)
    assert len(graphs) == 1
