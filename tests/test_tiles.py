"""The passes by tiles against float64, with each kind of product, compiled or not, in threads or not."""

import math

import pytest
import torch

from cplearn_head import prior_loss
from dictionary import STORAGES, Dictionary
from fused_loss import tiles
from fused_loss.tiles import Slope, Tiles, merge

DIM, K, TILE, VIEWS, BATCH = 48, 1000, 128, 2, 6
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-3}


def rows_of(dtype, num_views=VIEWS, scale=1.5):
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(num_views, BATCH, DIM, generator=generator, dtype=torch.float64) * scale / math.sqrt(DIM)
    return rows.to(torch.float64 if dtype == torch.float64 else torch.float32)


def exact(rows, codes, slope, agreement, offset, local):
    """Everything that both passes return, in float64 with B x K arrays."""
    rows, codes = rows.double(), codes.dense().double()
    s = rows @ codes
    p = s.softmax(dim=2)
    mean = p.mean(dim=1)
    slope = slope(mean) if callable(slope) else slope.double()
    others = s.sum(dim=0) - s + (0 if local is None else local.double() @ codes)
    a = p * (slope[:, None] - agreement * others - offset.double()[..., None])
    lse, centers = s.logsumexp(dim=2), p @ codes.T
    return lse, centers, s.argmax(dim=2), mean, a @ codes.T, a.sum(dim=2)


def by_tiles(engine, rows, slope, agreement, offset, local):
    top, total, centers, best = engine.statistics(rows.flatten(0, 1))
    lse, centers = top + total.log(), centers / total[:, None]
    shape = rows.shape[:2]
    mean, product, mass = engine.gradient(rows, top.view(shape), total.view(shape), slope, agreement, offset, local)
    return lse.view(shape), centers.view(rows.shape), best.view(shape), mean, product, mass


def assert_same(got, want, tolerance):
    for name, x, y in zip(("lse", "centers", "best", "mean", "product", "mass"), got, want, strict=True):
        if name == "best":
            assert (x == y).all()
        else:
            assert (x.double() - y).abs().max() <= tolerance * y.abs().max(), name


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("prior", ["kl", "ce", "given"])
@pytest.mark.parametrize("with_local", [False, True])
def test_both_passes_equal_float64(dtype, prior, with_local):
    codes = Dictionary(DIM, K)
    engine = Tiles(codes, dtype, VIEWS * BATCH, TILE)
    rows = engine.round(rows_of(dtype))
    slope = torch.randn(VIEWS, K, dtype=rows.dtype) if prior == "given" else Slope(prior, K, 0.3)
    offset = torch.randn(VIEWS, BATCH, dtype=rows.dtype)
    local = engine.round(rows_of(dtype, 3)).sum(dim=0) if with_local else None
    arguments = rows, slope, 0.2, offset, local
    assert_same(by_tiles(engine, *arguments), exact(rows, codes, *arguments[1:]), TOLERANCE[dtype])


def test_bfloat16_rounds_the_distance_to_the_highest_logit():
    """Logits of standard deviation 10, rounded as they are, make errors of 2e-2 in the centers and 6e-2 in the rest."""
    codes = Dictionary(DIM, K)
    engine = Tiles(codes, torch.bfloat16, VIEWS * BATCH, TILE)
    rows = engine.round(rows_of(torch.bfloat16, scale=10))
    arguments = rows, Slope("kl", K, 0.3), 0.2, torch.zeros(VIEWS, BATCH), None
    assert_same(by_tiles(engine, *arguments), exact(rows, codes, *arguments[1:]), 1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("storage", STORAGES)
def test_compiled_tiles_in_threads(dtype, storage, monkeypatch):
    """A dictionary large enough; 2 threads with 3 and 4 tiles each, the last one short."""
    monkeypatch.setattr(tiles, "LARGE", 0)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        codes = Dictionary(DIM, 7 * 128 - 24, storage=storage)
        engine = Tiles(codes, dtype, VIEWS * BATCH, 128)
        assert engine.compiled and [len(share) for share in engine.shares] == [3, 4]
        rows = engine.round(rows_of(dtype))
        arguments = rows, Slope("kl", codes.num_codes, 0.3), 0.2, torch.zeros(VIEWS, BATCH), None
        assert_same(by_tiles(engine, *arguments), exact(rows, codes, *arguments[1:]), TOLERANCE[dtype])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_where_compiling_fails_the_tiles_run_uncompiled(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no compiler found")

    monkeypatch.setattr(tiles, "LARGE", 0)
    monkeypatch.setattr(tiles, "_bodies", {})
    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: fail)
    codes = Dictionary(DIM, K)
    rows = rows_of(torch.float32).flatten(0, 1)
    with pytest.warns(UserWarning, match="uncompiled, and slower: no compiler found"):
        top, *_ = Tiles(codes, torch.float32, len(rows), TILE).statistics(rows)
    torch.testing.assert_close(top, (rows @ codes.dense().float()).amax(dim=1))


def test_columns_of_the_maximum_are_found_in_groups():
    x = torch.randn(5, 640)
    x[3, 639] = x[4, 0] = 10
    assert torch.equal(tiles.argmax(x)[:, 0], x.argmax(dim=1))
    assert torch.equal(tiles.argmax(x[:, :601])[:, 0], x[:, :601].argmax(dim=1))


def test_statistics_of_parts_are_merged():
    codes = Dictionary(DIM, K)
    rows = rows_of(torch.float64, scale=20).flatten(0, 1)
    whole = Tiles(codes, torch.float64, len(rows)).statistics(rows)
    engine = Tiles(codes, torch.float64, len(rows), 100)
    parts = [engine._statistics_of_share(range(i, K, 300), rows) for i in (0, 100, 200)]
    for got, want in zip(merge(parts), whole, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_slopes_are_those_of_the_priors():
    mean = torch.rand(K, dtype=torch.float64).requires_grad_()
    for prior in ("kl", "ce"):
        (expected,) = torch.autograd.grad(prior_loss(mean, prior), mean)
        torch.testing.assert_close(Slope(prior, K, 0.7)(mean.detach()), 0.7 * expected, rtol=1e-12, atol=0)
