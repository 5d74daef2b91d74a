"""The loss by tiles of codes against its definition, in the dtype it runs in, and what it promises not to do."""

import contextlib
import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cplearn_head import code_temperature, cplearn_loss, describe_loss, nearest_code, rademacher_codes
from dictionary import Dictionary
from fused_loss import choose_loss, fused_cplearn_loss
from fused_loss.tiles import default_tile
from utils import UserError, all_reduce_mean

B, DIM, K, TILE = 12, 24, 1001, 64  # 15 whole tiles and one of 41 codes
BFLOAT16 = torch.bfloat16


def embeddings(kind, num_views=2, batch_size=B, dim=DIM, num_codes=K):
    """(views in float64, codes, tau): as a head gives them at the start, late in training, and with tanh."""
    generator = torch.Generator().manual_seed(5)
    codes = rademacher_codes(dim, num_codes)
    tau = code_temperature(num_codes, dim, batch_size)
    radius = math.sqrt(dim / batch_size)
    noise = [torch.randn(batch_size, dim, generator=generator) for _ in range(num_views)]
    if kind == "random":
        views = [F.normalize(h, dim=1) * radius for h in noise]
    elif kind == "peaked":  # near a code, the same one for a pair of images
        near = codes[:, torch.arange(batch_size) // 2 * 7].float().T
        views = [F.normalize(near + 0.5 * h, dim=1) * radius for h in noise]
    else:
        views = [torch.tanh(noise[0] + 0.3 * h) for h in noise]
    if kind == "unbounded":
        tau = 0.05  # logits of several hundred
    return [h.double() for h in views], codes, tau  # float32 holds them exactly


def value_and_gradients(loss_function, views, dtype, *args, **kwargs):
    """(loss, [gradients]), both float64, of a loss computed from views of `dtype`; upstream gradient 1.7."""
    views = [h.to(dtype).requires_grad_() for h in views]
    loss, _ = loss_function(views, *args, **kwargs)
    return loss.detach().double(), [g.double() for g in torch.autograd.grad(1.7 * loss, views)]


def dense_bf16(views, codes, tau, **kwargs):
    """The plain loss, bfloat16 only in its matrix products; autocast, which divides by tau in bfloat16, errs more."""

    class Rounded:  # h @ codes.to(h.dtype) in cplearn_loss
        shape = codes.shape

        def to(self, dtype):
            return self

        def __rmatmul__(self, h):
            return (h.to(BFLOAT16) @ codes.to(BFLOAT16)).to(h.dtype)

    return cplearn_loss(views, Rounded(), tau, **kwargs)


def error(got, want):
    """Largest error of any entry, relative to the largest entry."""
    return max((g - w).abs().max() for g, w in zip(got, want, strict=True)) / max(w.abs().max() for w in want)


def halfway(mean):
    """A mean over processes that is not this process's own, with a gradient that is not one."""
    return 0.6 * mean + 0.4 / mean.numel()


@pytest.mark.parametrize("reduce_mean", [None, lambda mean: mean, halfway], ids=["alone", "identity", "mixed"])
@pytest.mark.parametrize("num_views", [2, 4])
@pytest.mark.parametrize("prior", ["kl", "ce"])
@pytest.mark.parametrize("kind", ["random", "peaked", "tanh", "unbounded"])
def test_value_and_gradients_equal_the_definition_in_float64(kind, prior, num_views, reduce_mean):
    views, codes, tau = embeddings(kind, num_views)
    settings = {"beta": 0.3, "prior": prior, "reduce_mean": reduce_mean}
    expected, expected_grads = value_and_gradients(cplearn_loss, views, torch.float64, codes, tau, **settings)
    for tile in (TILE, None):
        loss, grads = value_and_gradients(fused_cplearn_loss, views, torch.float64, codes, tau, tile=tile, **settings)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-10)
        assert error(grads, expected_grads) < 1e-10


@pytest.mark.parametrize("tile", [1, 7, K - 1, K, 10 * K])
def test_any_tile(tile):
    views, codes, tau = embeddings("tanh")
    expected, expected_grads = value_and_gradients(cplearn_loss, views, torch.float64, codes, tau)
    loss, grads = value_and_gradients(fused_cplearn_loss, views, torch.float64, codes, tau, tile=tile)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-10)
    assert error(grads, expected_grads) < 1e-10


@pytest.mark.parametrize("num_global", [1, 3])
def test_any_number_of_global_views(num_global):
    views, codes, tau = embeddings("peaked", 3)
    settings = {"num_global": num_global}
    expected, expected_grads = value_and_gradients(cplearn_loss, views, torch.float64, codes, tau, **settings)
    loss, grads = value_and_gradients(fused_cplearn_loss, views, torch.float64, codes, tau, tile=TILE, **settings)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-10)
    assert error(grads, expected_grads) < 1e-10


def test_gradcheck():
    views = [h.requires_grad_() for h in embeddings("random", 3, 4, 6, 9)[0]]
    codes = rademacher_codes(6, 9)
    for prior in ("kl", "ce"):
        assert torch.autograd.gradcheck(
            lambda *v, p=prior: fused_cplearn_loss(v, codes, 1.3, 0.7, p, tile=4)[0], views, nondet_tol=1e-12
        )


def test_terms_are_those_of_the_definition_and_carry_no_gradient():
    views, codes, tau = embeddings("peaked", 4)
    views = [h.requires_grad_() for h in views]
    _, expected = cplearn_loss(views, codes, tau)
    _, terms = fused_cplearn_loss(views, codes, tau, tile=TILE)
    assert terms.keys() == expected.keys()
    assert torch.equal(expected["assignments"], (views[0].detach() @ codes.double()).argmax(dim=1))
    for name, value in expected.items():
        term = terms[name]
        assert not term.requires_grad
        torch.testing.assert_close(term, value, rtol=1e-10, atol=0)


# ---- float32 and bfloat16 --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prior", ["kl", "ce"])
@pytest.mark.parametrize("kind", ["random", "peaked", "tanh"])
@pytest.mark.parametrize("passes", ["two", "three"])
def test_float32_errs_no_more_than_the_plain_form(kind, prior, passes):
    views, codes, tau = embeddings(kind, 2, 32, 96, 8191)
    settings = {"prior": prior, "reduce_mean": None if passes == "two" else lambda mean: mean * 1.0}
    expected, expected_grads = value_and_gradients(cplearn_loss, views, torch.float64, codes, tau, **settings)
    dense, dense_grads = value_and_gradients(cplearn_loss, views, torch.float32, codes, tau, **settings)
    loss, grads = value_and_gradients(fused_cplearn_loss, views, torch.float32, codes, tau, tile=512, **settings)
    allowed = error(dense_grads, expected_grads) if kind == "peaked" else 1e-5
    assert error(grads, expected_grads) <= allowed
    assert abs(loss - expected) <= max(abs(dense - expected), 1e-6 * abs(expected))


@pytest.mark.parametrize("kind", ["random", "peaked", "tanh"])
@pytest.mark.parametrize("passes", ["two", "three"])
def test_bfloat16_errs_no_more_than_the_plain_form(kind, passes):
    views, codes, tau = embeddings(kind, 2, 32, 96, 8191)
    settings = {"reduce_mean": None if passes == "two" else lambda mean: mean * 1.0}
    expected, expected_grads = value_and_gradients(cplearn_loss, views, torch.float64, codes, tau, **settings)
    _, dense_grads = value_and_gradients(dense_bf16, views, torch.float32, codes, tau, **settings)
    loss, grads = value_and_gradients(
        fused_cplearn_loss, views, torch.float32, codes, tau, tile=512, compute_dtype=BFLOAT16, **settings
    )
    assert error(grads, expected_grads) <= error(dense_grads, expected_grads)
    assert loss.item() == pytest.approx(expected.item(), rel=5e-3)


@pytest.mark.parametrize("compute_dtype", [torch.float32, BFLOAT16])
def test_logits_of_thousands_stay_finite(compute_dtype):
    views = [torch.full((3, DIM), 500.0, requires_grad=True) for _ in range(2)]
    for prior in ("kl", "ce"):
        loss, _ = fused_cplearn_loss(
            views, rademacher_codes(DIM, K), 0.1, prior=prior, tile=TILE, compute_dtype=compute_dtype
        )
        assert torch.isfinite(loss)
        assert all(torch.isfinite(g).all() for g in torch.autograd.grad(loss, views))


def test_autocast_changes_nothing():
    views, codes, tau = embeddings("random")
    expected, expected_grads = value_and_gradients(fused_cplearn_loss, views, torch.float32, codes, tau)
    with torch.autocast("cpu", BFLOAT16):
        loss, grads = value_and_gradients(fused_cplearn_loss, views, torch.float32, codes, tau)
    assert loss == expected
    assert error(grads, expected_grads) == 0


# ---- several processes -----------------------------------------------------------------------------------------------


def loss_of_share(rank, prior, num_views):
    """This process's share of the joined batch: its loss and the gradients of it alone."""
    views, codes, tau = embeddings("peaked", num_views, 2 * B)
    views = [h[rank * B : (rank + 1) * B] for h in views]
    settings = {"beta": 0.3, "prior": prior, "reduce_mean": all_reduce_mean, "tile": TILE}
    loss, grads = value_and_gradients(fused_cplearn_loss, views, torch.float64, codes, tau, **settings)
    return loss.item(), [g.tolist() for g in grads]


@pytest.mark.parametrize(("prior", "num_views"), [("kl", 2), ("ce", 3)])
def test_two_processes_equal_one_on_the_joined_batch(run_in_processes, prior, num_views):
    views, codes, tau = embeddings("peaked", num_views, 2 * B)
    expected, expected_grads = value_and_gradients(
        cplearn_loss, views, torch.float64, codes, tau, beta=0.3, prior=prior
    )
    shares = run_in_processes(loss_of_share, prior, num_views)
    assert sum(loss for loss, _ in shares) / 2 == pytest.approx(expected.item(), rel=1e-10)
    # DDP averages the processes' gradients
    grads = [[row for _, share in shares for row in share[v]] for v in range(num_views)]
    grads = [torch.tensor(g, dtype=torch.float64) / 2 for g in grads]
    assert error(grads, expected_grads) < 1e-10


# ---- what it does not do ---------------------------------------------------------------------------------------------


class Watch(TorchDispatchMode):
    """Records the largest number of elements that any operation makes; counts matrix products, and all but views."""

    def __init__(self):
        super().__init__()
        self.largest, self.products, self.operations = 0, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.products += "mm" in function.__name__
        self.operations += not function.is_view
        made = [t for t in tree_leaves(result) if torch.is_tensor(t) and t.dtype != torch.int8]  # codes are given
        self.largest = max([self.largest, *(t.numel() for t in made)])
        return result


@pytest.mark.parametrize("compute_dtype", [torch.float32, BFLOAT16])
@pytest.mark.parametrize("reduce_mean", [None, halfway], ids=["two passes", "three"])
def test_no_tensor_of_images_times_codes(reduce_mean, compute_dtype):
    views, codes, tau = embeddings("random", 4, num_codes=40_000)
    views = [h.float().requires_grad_() for h in views]
    with Watch() as watch:
        loss, _ = fused_cplearn_loss(views, codes, tau, tile=1024, reduce_mean=reduce_mean, compute_dtype=compute_dtype)
        loss.backward()
    assert watch.largest == 2 * 40_000 < B * 40_000 / 4  # pbar of two views


@pytest.mark.parametrize("reduce_mean", [None, halfway], ids=["two passes", "three"])
def test_no_gradient_pass_unless_something_needs_it(reduce_mean):
    views, codes, tau = embeddings("random")
    forward_only = []
    for needed in ("no input", "no grad", "gradient"):
        inputs = [h.clone().requires_grad_(needed != "no input") for h in views]
        with Watch() as watch, torch.set_grad_enabled(needed != "no grad"):
            loss, _ = fused_cplearn_loss(inputs, codes, tau, tile=TILE, reduce_mean=reduce_mean)
            assert loss.requires_grad == (needed == "gradient")
            if needed == "gradient":
                loss.backward()
        forward_only.append(watch.products)
    tiles = math.ceil(K / TILE)
    assert forward_only[0] == forward_only[1] <= 4 * tiles  # logits, centers; logits, pbar
    assert forward_only[2] >= forward_only[0] + tiles


@pytest.mark.parametrize(
    ("form", "batch_size", "num_codes", "most"),
    [
        ("dense", 64, 131_072, 100),
        ("tiled", 64, 131_072, 300),
        ("tiled", 512, 262_144, 300),
        ("tiled", 512, 2_097_152, 1600),
    ],
)
def test_a_step_on_a_gpu_takes_few_operations(form, batch_size, num_codes, most, monkeypatch):
    """Each costs a launch of about 5 us. Tensors on torch's meta device have no contents, and no cache to fit in."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())  # it knows no such device
    codes = Dictionary.of(torch.empty(384, num_codes, dtype=torch.int8, device="meta"))
    views = [torch.empty(batch_size, 384, device="meta", requires_grad=True) for _ in range(2)]
    loss_function = choose_loss(form, CUDA, batch_size, num_codes, bf16=True)
    with Watch() as watch:
        loss, terms = loss_function(views, codes, 0.1)
        loss.backward()
        if "assignments" not in terms:  # then the head searches for it, see CPLearn
            nearest_code(views[0].detach(), codes)
    assert watch.operations < most
    if form == "tiled":
        assert 4 * watch.largest <= 2**29


@pytest.mark.parametrize("num_global", [1, 2, 3])
@pytest.mark.parametrize("needed", [False, True])
def test_reduce_mean_is_called_once_for_each_global_view(num_global, needed):
    views, codes, tau = embeddings("peaked", 3)
    calls = []

    def count(mean):
        calls.append(mean.detach().clone())
        return mean * 1.0

    loss, _ = fused_cplearn_loss(
        [h.requires_grad_(needed) for h in views], codes, tau, num_global=num_global, reduce_mean=count, tile=TILE
    )
    if needed:
        loss.backward()
    assert len(calls) == num_global
    for h, mean in zip(views, calls, strict=False):
        torch.testing.assert_close(mean, (h.detach() @ codes.double() / tau).softmax(1).mean(0), rtol=1e-10, atol=0)


# ---- which form runs -------------------------------------------------------------------------------------------------

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (("dense", CPU, 2**10, 2**20), "dense, float32"),
        (("auto", CPU, 2**5 - 1, 2**15), "dense, float32"),
        (("auto", CPU, 2**5, 2**15), "tiled, products in float32, sums in float32"),
        (("auto", CPU, 2**5, 2**15, True), "tiled, products in bfloat16, sums in float32"),
        (("auto", CPU, 8, 2**14, True), "tiled, products in bfloat16, sums in float32"),
        (("auto", CPU, 8, 2**14 - 1, True), "dense, float32"),
        (("auto", CPU, 8, 2**14, True, "hadamard"), "dense, float32"),
        (("auto", CPU, 2**5, 2**15, True, "hadamard"), "tiled, products in float32, sums in float32"),
        (("auto", CUDA, 2**8, 2**20 - 1, True), "dense, float32"),
        (("auto", CUDA, 2**8, 2**20, True), "tiled, products in bfloat16, sums in float32"),
        (("auto", CUDA, 1, 1, True, "rademacher", True), "tiled, products in bfloat16, sums in float32"),
        (("triton", CUDA, 1, 1), "triton, products in float32, sums in float32"),
    ],
)
def test_the_form_that_runs_is_chosen_and_can_be_told(asked, said):
    assert describe_loss(choose_loss(*asked)) == said


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (("dense", CPU, 1, 1, False, "rademacher", True), "--shard_codes needs"),
        (("triton", CPU, 1, 1), "triton: on cpu with --dictionary rademacher; it needs a GPU"),
        (("triton", CUDA, 1, 1, False, "hadamard"), "on cuda with --dictionary hadamard"),
    ],
)
def test_a_form_that_cannot_run_is_refused(asked, said):
    with pytest.raises(UserError, match=said):
        choose_loss(*asked)


def test_default_tile():
    assert default_tile(2 * 64, 384, BFLOAT16, CPU) == 4096
    assert default_tile(2 * 64, 384, torch.float32, CPU) == 2048
    assert default_tile(2 * 256, 384, BFLOAT16, CPU) == 1024
    assert default_tile(10**7, 384, BFLOAT16, CPU) == 128
    assert default_tile(2 * 64, 384, torch.float32, CUDA) == 524288
    assert default_tile(2 * 512, 384, BFLOAT16, CUDA) == 131072
    assert default_tile(10**7, 384, BFLOAT16, CUDA) == 128
    assert math.ceil(2**24 / 8 / default_tile(2 * 8 * 64, 384, BFLOAT16, CUDA)) <= 20  # 16 million codes on 8 GPUs


@pytest.mark.parametrize("bad", ["prior", "shape", "one view", "half", "mixed", "bf16 of float64", "tile"])
def test_wrong_input_is_refused(bad):
    views, codes, tau = embeddings("random")
    settings = {}
    if bad == "prior":
        settings["prior"] = "reverse"
    if bad == "shape":
        views[1] = torch.randn(B, DIM + 1)
    if bad == "one view":
        views = views[:1]
    if bad == "half":
        views = [h.half() for h in views]
    if bad == "mixed":
        views[1] = views[1].float()
    if bad == "bf16 of float64":
        settings["compute_dtype"] = BFLOAT16
    if bad == "tile":
        settings["tile"] = 0
    with pytest.raises(ValueError, match="expected"):
        fused_cplearn_loss(views, codes, tau, **settings)
