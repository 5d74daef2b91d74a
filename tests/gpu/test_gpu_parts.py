"""Parts on the device against float64 on the CPU, against the CPU, or against torch's own."""

import functools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import batch_norm
import utils
from accumulation import Ahead
from cplearn_head import code_temperature, cplearn_loss
from dictionary import STORAGES, Dictionary, HadamardDictionary
from fused_loss import fused_cplearn_loss
from pictures import array_loader, photographs

B, DIM, K = 24, 64, 768
FORMS = {"dense": None, "tiled": "tiled", "triton": "triton"}
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # of value and gradient, relative to the largest entry


def embeddings(num_views):
    generator = torch.Generator().manual_seed(0)
    return [F.normalize(torch.randn(B, DIM, generator=generator)) * math.sqrt(DIM / B) for _ in range(num_views)]


def value_and_gradients(loss, views, codes, **settings):
    views = [h.clone().requires_grad_() for h in views]
    value, _ = loss(views, codes, code_temperature(K, DIM, B), 0.3, "kl", **settings)
    value.backward()
    return value.detach().cpu().double(), torch.cat([h.grad.cpu().double() for h in views])


@pytest.mark.parametrize("num_views", [2, 4])
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize(
    ("form", "kind", "storage"),
    [(form, Dictionary, storage) for form in FORMS for storage in STORAGES]
    + [(form, HadamardDictionary, "int8") for form in ("dense", "tiled")],
)
def test_every_form_of_the_loss_equals_float64(device, form, kind, storage, dtype, num_views):
    if (device, form) == ("cpu", "triton"):
        pytest.skip("Triton's kernels need a GPU; its interpreter is tests/test_triton_kernels.py")
    if dtype == torch.bfloat16 and (form == "dense" or kind is HadamardDictionary):
        pytest.skip("this form of the loss is float32")
    views = embeddings(num_views)
    exact = kind(DIM, K, seed=3).dense().double()
    want, want_gradient = value_and_gradients(cplearn_loss, [h.double() for h in views], exact)
    codes = kind(DIM, K, seed=3, storage=storage).to(device)
    loss, settings = (cplearn_loss, {}) if form == "dense" else (fused_cplearn_loss, {"impl": form})
    if form != "dense":
        settings["compute_dtype"] = dtype
    got, gradient = value_and_gradients(loss, [h.to(device) for h in views], codes, **settings)
    assert abs(got - want) / abs(want) < LIMITS[dtype]
    assert (gradient - want_gradient).abs().max() / want_gradient.abs().max() < LIMITS[dtype]


@pytest.mark.parametrize("recipe", ["dino", "small"])
def test_augmentation_is_the_cpu_s(device, no_waits, recipe):
    loader = array_loader(photographs(), "--augmentation", recipe, "--local_crops_number", 2)
    object.__setattr__(loader.recipe, "noise_std", 0.0)  # noise is a function of seed and device
    batch = next(iter(loader.epoch(0)))
    expected = loader.augment(batch, "cpu")
    with no_waits():
        views = loader.augment(batch, device)
    for view, on_cpu in zip(views, expected, strict=True):
        torch.testing.assert_close(view.cpu(), on_cpu, atol=0.05, rtol=0)  # a level of 255 may be rounded otherwise


@pytest.mark.parametrize("recipe", ["dino", "small"])
def test_views_made_ahead_are_the_views(device, recipe):
    """Over 50 steps in which the GPU is behind the host: pixel noise is drawn in order, nothing is overwritten."""
    device = torch.device(device)
    loader = array_loader(photographs(), "--augmentation", recipe, "--local_crops_number", 2)
    ahead, batches = Ahead(device), [next(iter(loader.epoch(epoch))) for epoch in range(50)]
    side = 2048 if device.type == "cuda" else 2
    square = torch.ones(side, side, device=device)

    def sums(make):
        found = []
        for step, batch in enumerate(batches):
            utils.seed_everything(0, step)
            views = make(functools.partial(loader.augment, batch, device))
            delay = sum((square @ square).mean() for _ in range(20)) * 0
            found.append(torch.stack([view.double().square().sum() for view in views]) + delay)
        return torch.stack(found).cpu()

    assert torch.equal(sums(ahead), sums(lambda make: make()))


def test_batch_norm_over_processes_is_torch_s(device, run_in_processes):
    """torch's own takes CUDA tensors alone: on the CPU the reference is batch norm of the joined batch."""
    for *found, reference in run_in_processes(batch_norms, device):
        for got, want in ((g, w) for ours in found for g, w in zip(ours, reference, strict=True)):
            torch.testing.assert_close(torch.tensor(got), torch.tensor(want), atol=2e-5, rtol=1e-4)


def batch_norms(rank, device):
    """(outputs, gradients, running statistics) of ours, of ours in the form for CPUs, and of the reference, for this
    process's half of a batch."""
    x = torch.randn(12, 5, 3, 3, generator=torch.Generator().manual_seed(0)).to(device) * 3 + 1
    mine = slice(6 * rank, 6 * rank + 6)
    ours = batch_norm.convert_sync_batchnorm(nn.BatchNorm2d(5).to(device))
    by_hand = batch_norm.convert_sync_batchnorm(nn.BatchNorm2d(5).to(device))
    by_hand.forward = by_hand._normalise
    found = passes(ours, x[mine]), passes(by_hand, x[mine])
    if device == "cpu":
        joined = passes(nn.BatchNorm2d(5), x)
        return *found, [joined[0][mine.start : mine.stop], joined[1][mine.start : mine.stop], *joined[2:]]
    return *found, passes(nn.SyncBatchNorm(5).to(device), x[mine])


def passes(norm, x):
    x = x.clone().requires_grad_()
    y = norm(x)
    y.square().mul(torch.linspace(0, 1, y[0].numel(), device=x.device).view_as(y[0])).sum().backward()
    return [t.detach().cpu().tolist() for t in (y, x.grad, norm.running_mean, norm.running_var)]
