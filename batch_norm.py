"""Batch norm over the joined batch of all processes, on any device."""

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.function import once_differentiable

from utils import all_gather_rows, all_reduce_mean, world_size


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over the joined batch of all processes, for any (B, C, ...) input.

    nn.SyncBatchNorm refuses CPU tensors, DistributedDataParallel every subclass of it on a CPU, and on CUDA its forward
    pass waits for the device, to sort out processes whose batch is empty. Here equal batch sizes on all processes are
    assumed (loaders drop the last short batch). Parameter and buffer names are torch's.
    """

    def _check_input_dim(self, x):
        if x.dim() < 2:
            raise ValueError(f"expected (B, C, ...), got shape {tuple(x.shape)}")

    def forward(self, x):
        if not self.training or world_size() == 1:
            x = super().forward(x)
        else:
            x = self._by_kernels(x) if x.is_cuda else self._normalise(x)
        # timm's BatchNormAct2d carries what follows the norm
        return self.act(self.drop(x)) if hasattr(self, "act") else x

    def _by_kernels(self, x):
        self.num_batches_tracked += 1
        statistics = self.running_mean, self.running_var, self.momentum, self.eps
        return _KernelsOfCUDA.apply(_dense(x), self.weight, self.bias, *statistics)

    def _normalise(self, x):
        dims = [0, *range(2, x.dim())]
        shape = (1, -1, *[1] * (x.dim() - 2))
        wide = x.to(self.running_mean.dtype)  # statistics in float32 under autocast
        mean = all_reduce_mean(wide.mean(dims))
        centered = wide - mean.view(shape)
        variance = all_reduce_mean(centered.square().mean(dims))
        self._update_running_statistics(mean.detach(), variance.detach(), wide.numel() // wide.shape[1] * world_size())
        normalised = centered * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            normalised = normalised * self.weight.view(shape) + self.bias.view(shape)
        return normalised.to(x.dtype)

    @torch.no_grad()
    def _update_running_statistics(self, mean, variance, count):
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance * count / (count - 1), self.momentum)  # torch keeps the unbiased variance


class _KernelsOfCUDA(torch.autograd.Function):
    """The kernels that nn.SyncBatchNorm is made of: one collective forward, one backward."""

    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, momentum, eps):
        mean, inverse_std = torch.batch_norm_stats(x, eps)
        count = mean.new_full((1,), x.numel() // x.shape[1])
        rows = all_gather_rows(torch.cat([mean, inverse_std, count])[None])  # of each process
        means, inverse_stds, counts = rows.split([len(mean), len(mean), 1], dim=1)
        mean, inverse_std = torch.batch_norm_gather_stats_with_counts(
            x, means, inverse_stds, running_mean, running_var, momentum, eps, counts.flatten()
        )
        ctx.save_for_backward(x, weight, mean, inverse_std, counts.to(torch.int32))
        return torch.batch_norm_elemt(x, weight, bias, mean, inverse_std, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, mean, inverse_std, counts = ctx.saved_tensors
        grad = _dense(grad)
        *sums, grad_weight, grad_bias = torch.batch_norm_backward_reduce(
            grad, x, mean, inverse_std, weight, True, weight is not None, weight is not None
        )
        sums = torch.cat(sums)
        dist.all_reduce(sums)  # gradients of weight and bias are averaged by DDP
        grad_x = torch.batch_norm_backward_elemt(grad, x, mean, inverse_std, weight, *sums.chunk(2), counts)
        return grad_x, grad_weight, grad_bias, None, None, None, None


def _dense(x):
    """The kernels take two orders of the numbers in memory."""
    is_channels_last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return x if is_channels_last else x.contiguous()


def convert_sync_batchnorm(module):
    """Make every batch norm in `module` a SyncBatchNorm, in place, parameters and buffers kept; returns the module."""
    for norm in module.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.__class__ = SyncBatchNorm
    return module
