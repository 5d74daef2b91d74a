"""Hadamard blocks against their definition, and fast passes over them against dense ones in float64."""

import pytest
import torch
from scipy import linalg

from dictionary import HadamardDictionary, block_signs, hadamard_matrix, rademacher_codes
from fused_loss import hadamard_transforms, make_engine, tiles
from fused_loss.hadamard_transforms import HadamardTransforms
from fused_loss.tiles import Slope, Tiles

ORDERS = sorted({base * 2**m for base in (1, 12, 20, 28) for m in range(11) if base * 2**m <= 1024})
KNOWN_FIRST = [1, -1, 1, 1, 1, 1, 1, 1, 1, 1, -1, -1]  # of seed 7 and width 12, by the hash in Python's integers
KNOWN_LAST = [1, -1, 1, -1, 1, 1, 1, -1, 1, 1, 1, 1]
PRIOR_SLOPES = {  # d prior / d pbar_k, for the means in float64
    "kl": lambda mean, num_codes: (num_codes * mean).clamp_min(1e-300).log() + 1,
    "ce": lambda mean, num_codes: -1 / (num_codes * mean),
}


def dictionary(dim, num_codes, seed=3):
    """(signs, W in float64 as its definition writes it)"""
    signs = block_signs(dim, -(-num_codes // dim), seed)
    matrix = hadamard_matrix(dim).double()
    return signs, torch.cat([s[:, None] * matrix for s in signs], dim=1)[:, :num_codes]


def close(got, want, tolerance):
    """Largest error of an entry is within tolerance of the largest entry."""
    assert got.shape == want.shape
    return bool((got.double() - want).abs().max() <= tolerance * want.abs().max())


# ---- the matrix ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
def test_rows_are_orthogonal_signs_and_the_first_is_ones(order):
    matrix = hadamard_matrix(order)
    assert matrix.dtype == torch.int8 and matrix.shape == (order, order)
    assert set(matrix.unique().tolist()) <= {-1, 1}
    exact = matrix.float()  # sums of at most 1024 signs
    assert torch.equal(exact @ exact.T, order * torch.eye(order))
    assert (matrix[0] == 1).all()


@pytest.mark.parametrize("order", [2**m for m in range(11)])
def test_powers_of_two_are_sylvesters(order):
    assert torch.equal(hadamard_matrix(order), torch.from_numpy(linalg.hadamard(order)).to(torch.int8))


@pytest.mark.parametrize(("order", "near"), [(100, "96 and 112"), (3, "2 and 4"), (36, "32 and 40"), (0, "1 and 1")])
def test_other_orders_name_the_nearest(order, near):
    with pytest.raises(ValueError, match=f"order {order} here; the nearest orders are {near}"):
        hadamard_matrix(order)


def test_codes_of_a_block_are_orthogonal_and_blocks_differ():
    dim = 48
    _, codes = dictionary(dim, 3 * dim)
    for block in codes.split(dim, dim=1):
        assert torch.equal(block.T @ block, dim * torch.eye(dim).double())
    between = codes[:, :dim].T @ codes[:, dim:]
    assert between.abs().max() < dim and between.square().mean() == pytest.approx(dim)  # as for independent codes


def test_signs_are_known_and_of_any_block_alone():
    signs = block_signs(12, 40, seed=7)
    assert signs.dtype == torch.int8 and signs.shape == (40, 12)
    assert signs[0].tolist() == KNOWN_FIRST and signs[39].tolist() == KNOWN_LAST
    assert torch.equal(block_signs(12, 5, seed=7, first_block=33), signs[33:38])
    assert not torch.equal(signs, block_signs(12, 40, seed=8))
    assert not torch.equal(signs, rademacher_codes(12, 40, seed=7).T)


# ---- the dictionary --------------------------------------------------------------------------------------------------


def test_dictionary_holds_the_blocks_and_shards_are_parts_of_it():
    whole = HadamardDictionary(24, 480, seed=3)
    _, codes = dictionary(24, 480)
    assert torch.equal(whole.dense().double(), codes) and whole.num_bytes() == 480
    assert torch.equal(whole.tile(30, 100).double(), codes[:, 30:100])
    index = torch.tensor([0, 95, 23, 24, 24])
    assert torch.equal(whole.columns(index).double(), codes[:, index])
    shards = [HadamardDictionary(24, 480, seed=3, shard=(i, 5)) for i in range(5)]
    assert torch.equal(torch.cat([shard.dense() for shard in shards], dim=1).double(), codes)


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"dim": 100}, "96 and 112"), ({"storage": "bits"}, "storage is 'bits'"), ({"shard": (0, 3)}, "multiple of 72")],
)
def test_what_cannot_be_is_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        HadamardDictionary(**{"dim": 24, "num_codes": 480} | settings)


# ---- the two passes --------------------------------------------------------------------------------------------------


def test_hadamard_cpp_compiles_here():
    """The tests below need it, and fail without a C++ compiler rather than pass unseen."""
    assert hadamard_transforms._library() is not None


# (dim, codes, images): groups of 8 or 16 images and the last block are whole, cut, or all there is
SIZES = [(64, 640, 32), (32, 70, 8), (24, 500, 17), (40, 40, 5), (28, 31, 3), (512, 700, 9), (1, 7, 2)]
KINDS = ("random", "peaked", "unbounded")
KINDS_AND_PRIORS = [(kind, prior) for kind in KINDS for prior in ("kl", "ce", "given")]
KINDS_AND_PRIORS.remove(("unbounded", "ce"))  # 1 / pbar of means too small for a float


def rows_of(kind, codes, num_images):
    """(2, B, F) float32 in float64: logits are those of the method's start, of its end, and of no bound."""
    dim, generator = len(codes), torch.Generator().manual_seed(11)
    rows = torch.randn(2, num_images, dim, generator=generator)
    if kind == "peaked":  # some images of both views near the same code
        rows = 0.3 * rows + codes[:, torch.arange(num_images) // 2 % codes.shape[1]].T
    length = {"random": 18.0, "peaked": 18.0, "unbounded": 600.0}[kind] / dim**0.5
    return (torch.nn.functional.normalize(rows, dim=2) * length).float().double()


def tolerance_of(kind):
    """Logits of several hundred are known to 3e-5 in float32, and so is log p."""
    return 2e-4 if kind == "unbounded" else 4e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_statistics(kind, size):
    dim, num_codes, num_images = size
    signs, codes = dictionary(dim, num_codes)
    rows = rows_of(kind, codes, num_images).flatten(0, 1)
    top, total, centers, best = hadamard_transforms.statistics(rows.float(), signs, num_codes)
    expected = rows @ codes
    tolerance = tolerance_of(kind)
    assert close(top, expected.amax(dim=1), tolerance)
    assert close(top.double() + total.double().log(), expected.logsumexp(dim=1), tolerance)
    assert close(centers.double() / total.double()[:, None], expected.softmax(dim=1) @ codes.T, tolerance)
    assert best.dtype == torch.int64
    assert close(expected.gather(1, best[:, None]), expected.amax(dim=1, keepdim=True), tolerance)


@pytest.mark.parametrize("local", [False, True], ids=["two views", "local views"])
@pytest.mark.parametrize(("kind", "prior"), KINDS_AND_PRIORS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_means_and_gradient(kind, prior, local, size):
    dim, num_codes, num_images = size
    signs, codes = dictionary(dim, num_codes)
    rows = rows_of(kind, codes, num_images)
    generator = torch.Generator().manual_seed(12)
    extra = torch.randn(num_images, dim, generator=generator).double() / dim**0.5 if local else None
    offset = torch.randn(2, num_images, generator=generator).double()
    probs, s = (rows @ codes).softmax(dim=2), rows @ codes
    means, scale, all_codes = probs.mean(dim=1), 0.7, 2 * num_codes
    if prior == "given":
        slope = prior_slope = torch.randn(2, num_codes, generator=generator).double()
    else:
        slope, prior_slope = Slope(prior, all_codes, scale), scale * PRIOR_SLOPES[prior](means, all_codes)
    others = s.flip(0) + (extra @ codes if local else 0)
    weights = probs * (prior_slope[:, None] - 0.3 * others - offset[:, :, None])

    top, total = s.amax(dim=2), (s - s.amax(dim=2, keepdim=True)).exp().sum(dim=2)
    inputs = [x.float() if torch.is_tensor(x) else x for x in (top, total, offset, slope)]
    views = rows if extra is None else torch.cat([rows, extra[None]])
    got = hadamard_transforms.gradient(views.float(), signs, num_codes, *inputs, 0.3)
    magnitude = weights.abs().sum(dim=2).max()  # sums of numbers of both signs err relative to these
    assert close(got[0], means, tolerance_of(kind))
    for result, expected in zip(got[1:], (weights @ codes.T, weights.sum(dim=2)), strict=True):
        assert result.shape == expected.shape
        assert (result - expected).abs().max() <= tolerance_of(kind) * magnitude


def test_means_alone_and_parts_of_the_blocks():
    """Processes or threads that hold some blocks each: what they find adds up."""
    dim, num_codes, num_images = 24, 200, 10
    signs, codes = dictionary(dim, num_codes)
    rows = rows_of("random", codes, num_images)
    top, total, centers, _ = hadamard_transforms.statistics(rows.flatten(0, 1).float(), signs, num_codes)
    parts = [
        hadamard_transforms.statistics(rows.flatten(0, 1).float(), *part)
        for part in ((signs[:4], 96), (signs[4:], 104))
    ]
    joined = sum(center.double() * (part_top - top).double().exp()[:, None] for part_top, _, center, _ in parts)
    assert close(joined, centers.double(), 1e-5)
    settings = [x.view(2, num_images) for x in (top, total, torch.zeros_like(top))]
    slope = torch.linspace(-1, 1, 2 * num_codes, dtype=torch.float32).view(2, num_codes)
    whole = hadamard_transforms.gradient(rows.float(), signs, num_codes, *settings, slope, 0.0)
    first = hadamard_transforms.gradient(rows.float(), signs[:4], 96, *settings, slope[:, :96], 0.0)
    second = hadamard_transforms.gradient(rows.float(), signs[4:], 104, *settings, slope[:, 96:], 0.0)
    means, *nothing = hadamard_transforms.gradient(rows.float(), signs, num_codes, *settings, None, 0.0)
    assert nothing == [None, None] and torch.equal(means, whole[0])
    assert close(torch.cat([first[0], second[0]], dim=1), whole[0].double(), 1e-6)
    for one, other, both in zip(first[1:], second[1:], whole[1:], strict=True):
        assert close(one + other, both.double(), 1e-5)


def test_nan_stays_nan_and_with_its_image():
    signs, codes = dictionary(64, 128)
    rows = rows_of("random", codes, 10).float()
    rows[0, 3, 5] = torch.nan
    top, total, centers, _ = hadamard_transforms.statistics(rows.flatten(0, 1), signs, 128)
    assert total.isnan().nonzero().tolist() == [[3]] and centers.isnan().all(dim=1).nonzero().tolist() == [[3]]
    top = torch.where(top.isfinite(), top, 0)
    settings = [x.view(2, 10) for x in (top, total, torch.zeros_like(top))]
    means, product, _ = hadamard_transforms.gradient(rows, signs, 128, *settings, Slope("kl", 128, 1.0), 0.1)
    assert means[0].isnan().all() and not means[1].isnan().any()
    assert product[:, 3].isnan().all() and not product[1, :3].isnan().any()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("num_codes", [480, 500])
def test_transforms_and_products_with_the_written_out_blocks_agree(threads, num_codes, monkeypatch):
    monkeypatch.setattr(tiles, "LARGE", 0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        codes = HadamardDictionary(24, num_codes)
        rows = rows_of("random", codes.dense(), 10)  # whose likeliest codes are anywhere
        slopes = Slope("kl", num_codes, 0.5), torch.linspace(-1, 1, 2 * num_codes).view(2, num_codes)
        engine = HadamardTransforms(codes, 20)
        assert HadamardTransforms.can_run(codes, torch.float32) and len(engine.shares) == threads
        results = []
        for each, dtype in ((engine, torch.float32), (Tiles(codes, torch.float64, 20, 48), torch.float64)):
            top, total, centers, best = each.statistics(rows.flatten(0, 1).to(dtype))
            settings = [x.view(2, 10) for x in (top, total)]
            offset, local = torch.full((2, 10), 0.1, dtype=dtype), rows[0].to(dtype)
            results.append([top, total, centers, best])
            for slope in slopes:
                slope = slope.to(dtype) if torch.is_tensor(slope) else slope
                results[-1] += each.gradient(rows.to(dtype), *settings, slope, 0.3, offset, local)
        for got, want in zip(*results, strict=True):
            assert close(got, want.double(), 1e-5)
    finally:
        torch.set_num_threads(before)


def test_without_a_compiler_it_says_so_and_goes_on(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(
        hadamard_transforms, "_library", hadamard_transforms.functools.cache(hadamard_transforms._library.__wrapped__)
    )
    with pytest.warns(UserWarning, match="slower: no-such-compiler failed"):
        assert not HadamardTransforms.can_run(HadamardDictionary(24, 48), torch.float32)
    assert type(make_engine(HadamardDictionary(24, 48), "tiled", torch.float32, 4)) is Tiles
