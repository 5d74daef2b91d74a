"""Batch norm over processes against torch's on the joined batch; on CUDA, by formulas for its kernels."""

import numpy as np
import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import batch_norm
from batch_norm import SyncBatchNorm, convert_sync_batchnorm
from utils import all_reduce_mean


def network():
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5), nn.BatchNorm1d(5)
    )
    layers(torch.randn(4, 3, 6, 6))
    return layers.double()


def loss_of(outputs):
    return (outputs * torch.arange(5)).sin().mean()


def train_on_a_share(rank, images):
    model = convert_sync_batchnorm(network())
    outputs = model(torch.from_numpy(images)[rank * 6 : rank * 6 + 6])
    all_reduce_mean(loss_of(outputs)).backward()
    for parameter in model.parameters():  # what DDP does; the loss above is the global one on every rank
        parameter.grad = all_reduce_mean(parameter.grad)
    model.eval()
    after = model(torch.from_numpy(images))
    return outputs.detach().numpy(), after.detach().numpy(), [p.grad.numpy() for p in model.parameters()]


def by_formulas_for_the_kernels(rank, images):
    """`train_on_a_share`, with the path of CUDA on the CPU."""
    for name, formula in FORMULAS.items():
        setattr(torch, name, formula)
    SyncBatchNorm._normalise = SyncBatchNorm._by_kernels
    return train_on_a_share(rank, images)


def stats(x, eps):
    rows = x.transpose(0, 1).flatten(1)  # (C, n)
    return rows.mean(1), (rows.var(1, correction=0) + eps).rsqrt()


def gather_stats(x, means, inverse_stds, running_mean, running_var, momentum, eps, counts):
    share, total = (counts / counts.sum())[:, None], counts.sum()
    mean = (share * means).sum(0)
    variance = (share * (inverse_stds**-2 - eps + (means - mean) ** 2)).sum(0)
    running_mean.lerp_(mean, momentum)
    running_var.lerp_(variance * total / (total - 1), momentum)
    return mean, (variance + eps).rsqrt()


def elemt(x, weight, bias, mean, inverse_std, eps):
    mean, inverse_std, weight, bias = (per_channel(v, x) for v in (mean, inverse_std, weight, bias))
    return (x - mean) * inverse_std * weight + bias


def backward_reduce(grad, x, mean, inverse_std, weight, *wanted):
    grad, centered = (v.transpose(0, 1).flatten(1) for v in (grad, x - per_channel(mean, x)))
    sum_dy, sum_dy_xmu = grad.sum(1), (grad * centered).sum(1)
    return sum_dy, sum_dy_xmu, sum_dy_xmu * inverse_std, sum_dy


def backward_elemt(grad, x, mean, inverse_std, weight, sum_dy, sum_dy_xmu, counts):
    mean, inverse_std, weight, sum_dy, sum_dy_xmu = (
        per_channel(v, x) for v in (mean, inverse_std, weight, sum_dy, sum_dy_xmu)
    )
    projected = sum_dy + (x - mean) * inverse_std**2 * sum_dy_xmu
    return (grad - projected / counts.sum()) * inverse_std * weight


def per_channel(values, x):
    return values.view(1, -1, *[1] * (x.dim() - 2))


FORMULAS = {
    "batch_norm_stats": stats,
    "batch_norm_gather_stats_with_counts": gather_stats,
    "batch_norm_elemt": elemt,
    "batch_norm_backward_reduce": backward_reduce,
    "batch_norm_backward_elemt": backward_elemt,
}


@pytest.mark.parametrize("train", [train_on_a_share, by_formulas_for_the_kernels])
def test_sync_batchnorm_is_torchs_batchnorm_on_the_joined_batch(run_in_processes, train):
    images = np.random.default_rng(0).normal(size=(12, 3, 6, 6))
    reference = network()
    outputs = reference(torch.from_numpy(images))
    loss_of(outputs).backward()
    reference.eval()
    after = reference(torch.from_numpy(images)).detach().numpy()  # running statistics
    shares = run_in_processes(train, images)
    np.testing.assert_allclose(np.concatenate([s[0] for s in shares]), outputs.detach().numpy(), rtol=1e-12, atol=1e-12)
    for _, after_share, grads in shares:
        np.testing.assert_allclose(after_share, after, rtol=1e-12, atol=1e-12)
        for got, parameter in zip(grads, reference.parameters(), strict=True):
            np.testing.assert_allclose(got, parameter.grad.numpy(), rtol=1e-10, atol=1e-13)


def test_conversion_keeps_names_types_and_timms_activation():
    reference, converted = network(), convert_sync_batchnorm(network())
    assert reference.state_dict().keys() == converted.state_dict().keys()
    assert converted[1].weight.dtype == torch.float64
    timms = BatchNormAct2d(3, act_layer=nn.SiLU)
    images = torch.randn(2, 3, 4, 4)
    expected = timms(images)
    torch.testing.assert_close(convert_sync_batchnorm(nn.Sequential(timms))(images), expected)


def test_on_a_gpu_the_kernels_run_and_on_a_cpu_plain_operations(monkeypatch):
    called = []
    monkeypatch.setattr(SyncBatchNorm, "_by_kernels", lambda self, x: called.append("kernels") or x)
    monkeypatch.setattr(SyncBatchNorm, "_normalise", lambda self, x: called.append("by hand") or x)
    monkeypatch.setattr(batch_norm, "world_size", lambda: 2)
    norm = convert_sync_batchnorm(nn.BatchNorm2d(3))
    with FakeTensorMode():
        for device in ("cuda", "cpu"):
            norm(torch.empty(2, 3, 4, 4, device=device))
    assert called == ["kernels", "by hand"]
