"""CPLearn's loss without a B x K array: value and gradients of `cplearn_head.cplearn_loss`.

The algebra is that of attention with the frozen codes as keys and values: what one pass over the codes must remember
is, per image, a logarithm of a sum and one vector of width F.

    pass 1, all views      lse_v[i] = log sum_k exp s_v[i,k]        m_v[i] = sum_k p_v[i,k] w_k     s_v = h_v W / tau
                             CE(p_a, p_v)_i = lse_v[i] - h_v[i] . m_a[i] / tau
    pass 2, global views   pbar_a[k] = mean_i exp(s_a[i,k] - lse_a[i])
    pass 3, global views   sum_k A[i,k] (w_k - m_a[i]),  A = p_a r,  r the loss's slope in p_a     (targets' dH_a)

An engine runs the passes: `tiles.Tiles` (matrix products of torch), `triton_kernels` (CUDA) or `hadamard_transforms`.
Where pbar needs no other process, passes 2 and 3 are one. Matrix work for two views, in units of 2 B F K multiply-adds:
4 without other processes, 5 with them, 2 in the plain form. A local view adds 1, in the plain form too, and all local
views together add another half. Extra memory: O(V B F + K + B x tile).

With codes sharded over R processes each process holds K / R codes and sees all images: h is gathered, the results of
all processes are summed per image, and pbar needs no other process.

    B images here, N with a pbar in common, V views of each, the first G are global crops     F head width, K codes
"""

import math
from functools import partial

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from cplearn_head import check_loss_inputs, cplearn_loss, prior_loss
from dictionary import Dictionary, HadamardDictionary, highest_over_processes
from fused_loss.hadamard_transforms import HadamardTransforms
from fused_loss.tiles import Slope, Tiles
from utils import UserError, all_gather_rows, rank, world_size


def fused_cplearn_loss(
    views,
    codes,
    tau,
    beta=0.25,
    prior="kl",
    num_global=2,
    reduce_mean=None,
    impl="tiled",
    compute_dtype=None,
    tile=None,
):
    """`cplearn_head.cplearn_loss`, same value and same gradients, in O(V B F + K + B x tile) extra memory.

    views, tau, beta, prior, num_global: what `cplearn_loss` takes.
    codes: (F, K) of -1 and +1, or a Dictionary. Of a sharded one each process holds a part; the loss is then the
        joined batch's, and the mean over processes of the gradients is the gradient of that loss.
    reduce_mean: maps this process's mean (K,) to the mean over all processes; None: this process alone. It is called
        once per global view in the order of the views, and so is its backward in the backward pass. With sharded codes
        it is given this process's part of pbar, already the mean over all processes, and must return it.
    impl: "tiled", or "triton" (CUDA). A Hadamard dictionary has transforms of its own, in float32.
    compute_dtype: of the matrix products. None: the views' dtype, float32 or float64. float32 views also take
        torch.bfloat16, which rounds what enters and, tiled, what leaves them. Sums over tiles, maxima and exponentials
        stay in float32.
    tile: T, codes in a tile; None: chosen from the number of images and views.
    Returns (loss, terms): scalars in nats. The terms carry no gradient here, and where the passes found them there is a
        fourth, "assignments": argmax_k of the first view's logits, (B,) int64.
    Raises ValueError for the inputs that `cplearn_loss` refuses, and for a compute_dtype or tile that cannot be.
    Differentiable once. Where pbar needs no other process the gradient is found in the forward pass, if anything needs
    it; otherwise in the backward pass, because it needs the other processes' means.
    """
    codes = Dictionary.of(codes)
    check_loss_inputs(views, codes, prior, num_global)
    _check_precision(views, compute_dtype, tile)
    loss = _Loss(views, codes, tau, beta, prior, num_global, impl, compute_dtype, tile)
    wanted = torch.is_grad_enabled() and any(h.requires_grad for h in views)
    value, invariance, prior_term, assignments = _FusedLoss.apply(loss, reduce_mean, wanted, *views)
    terms = {"invariance": invariance, "prior": prior_term, "entropy": loss.entropy()}
    return value, terms | ({} if assignments is None else {"assignments": assignments})


def _check_precision(views, compute_dtype, tile):
    dtype = views[0].dtype
    if any(h.dtype not in (torch.float32, torch.float64) or h.dtype != dtype for h in views):
        raise ValueError(f"views are {[h.dtype for h in views]}; expected all float32 or all float64")
    allowed = [torch.float64] if dtype == torch.float64 else [torch.float32, torch.bfloat16]
    if compute_dtype not in (None, *allowed):
        raise ValueError(f"compute_dtype is {compute_dtype} for {dtype} views; expected one of {allowed}")
    if tile is not None and tile < 1:
        raise ValueError(f"tile is {tile}; expected at least 1")


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss, reduce_mean, wanted, *views):
        with loss.outside_autocast():
            loss.pass_1()
            alone = reduce_mean is None or world_size() == 1 or loss.sharded
            local_means, grad = loss.passes_2_and_3(loss.slope if wanted and alone else None)
        means = leaves = local_means.unbind()
        if reduce_mean is not None:
            with torch.set_grad_enabled(wanted):
                leaves = [mean.detach().requires_grad_(wanted) for mean in leaves]
                means = [reduce_mean(mean) for mean in leaves]
        if grad is not None and all(mean is leaf for mean, leaf in zip(means, leaves, strict=True)):
            ctx.save_for_backward(grad)
        elif wanted:
            ctx.loss, ctx.means, ctx.leaves = loss, means, leaves
        invariance, prior_term = loss.invariance(), loss.prior_term([mean.detach() for mean in means])
        assignments = loss.assignments()
        ctx.mark_non_differentiable(invariance, prior_term, *([] if assignments is None else [assignments]))
        return loss.beta * invariance + prior_term, invariance, prior_term, assignments

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_value, *_):
        if ctx.saved_tensors:
            grad = ctx.saved_tensors[0]
        else:
            slopes = [
                _grad_through(mean, leaf, ctx.loss.slope(mean.detach()))
                for mean, leaf in zip(ctx.means, ctx.leaves, strict=True)
            ]
            with ctx.loss.outside_autocast():
                _, grad = ctx.loss.passes_2_and_3(torch.stack(slopes))
        return None, None, None, *(grad * grad_value).unbind()


def _grad_through(y, x, grad_y):
    """dL/dx where y is a function of x and dL/dy is given."""
    if not y.requires_grad:
        return torch.zeros_like(x)
    return torch.autograd.grad(y, x, grad_y, retain_graph=True)[0]


class _Loss:
    """One loss's inputs, and what pass 1 remembers of them."""

    def __init__(self, views, codes, tau, beta, prior, num_global, impl, compute_dtype, tile):
        self.tau, self.beta, self.prior, self.num_global = tau, beta, prior, num_global
        self.num_codes, self.first, self.sharded = codes.num_codes, codes.first, codes.sharded
        self.own_images = len(views[0])
        rows = torch.stack([h.detach() for h in views], dim=1) / tau  # (B, V, F)
        if self.sharded:
            rows = all_gather_rows(rows)
        self.num_images, self.num_views = rows.shape[:2]
        self.engine = make_engine(codes, impl, compute_dtype or rows.dtype, self.num_images * self.num_views, tile)
        self.rows = self.engine.round(rows.transpose(0, 1).contiguous())  # (V, N, F): rounded once, for all passes
        self.pairs = [(a, v) for a in range(num_global) for v in range(self.num_views) if v != a]
        self.slope = Slope(prior, self.num_codes, 1 / (num_global * self.num_images))

    def outside_autocast(self):
        return torch.autocast(self.rows.device.type, enabled=False)

    def pass_1(self):
        """top = max_k s, total = sum_k exp(s - top), lse (V, N); centers m (V, N, F); best = argmax_k s (V, N).

        p = exp(s - top) / total, not exp(s - lse): logits of several hundred would lose digits of lse."""
        top, total, centers, best = self.engine.statistics(self.rows.flatten(0, 1))
        if self.sharded:
            best = None if best is None else self.first + best
            top, total, centers, best = merge_over_processes(top, total, centers, best)
        shape = self.rows.shape[:2]
        self.top, self.total, self.lse = top.view(shape), total.view(shape), (top + total.log()).view(shape)
        self.centers = (centers / total[:, None]).view_as(self.rows)
        self.best = None if best is None else best.view(shape)

    def invariance(self):
        """Mean over pairs and images of CE(p_a, p_v), with h as it was rounded for lse."""
        terms = [(self.lse[v] - (self.rows[v] * self.centers[a]).sum(dim=1)).mean() for a, v in self.pairs]
        return sum(terms) / len(terms)

    def entropy(self):
        """Mean over global views and images of H(p_a)."""
        return (self.lse - (self.rows * self.centers).sum(dim=2))[: self.num_global].mean()

    def prior_term(self, means):
        prior = sum(prior_loss(mean, self.prior, self.num_codes) for mean in means) / self.num_global
        if self.sharded:
            dist.all_reduce(prior)
        return prior

    def assignments(self):
        return None if self.best is None else self.best[0, self.own()].clone()

    def own(self):
        """This process's images among the N."""
        first = rank() * self.own_images if self.sharded else 0
        return slice(first, first + self.own_images)

    def passes_2_and_3(self, slope):
        """(pbar of the codes held here (G, K), gradient (V, B, F)); without a slope (pbar, None).

        slope: of the prior term in pbar, (G, K), or the function of pbar."""
        views = slice(self.num_global)
        agreement = self.beta / (len(self.pairs) * self.num_images)
        local = self.rows[self.num_global :].sum(dim=0) if self.num_views > self.num_global else None
        offset = None if slope is None else self.likely_mean(agreement)
        means, product, mass = self.engine.gradient(
            self.rows[views], self.top[views], self.total[views], slope, agreement, offset, local
        )
        if slope is None:
            return means, None
        if self.sharded:
            dist.all_reduce(product)
            dist.all_reduce(mass)
        grad = torch.zeros_like(self.rows)  # in h / tau
        for a, v in self.pairs:  # through log p_v
            grad[v] += agreement * (self.centers[v] - self.centers[a])
        grad[views] += product - mass[..., None] * self.centers[views]  # through p_a
        # DDP will average the gradients of all processes, each of which has computed the whole loss
        return means, grad[:, self.own()] * ((world_size() if self.sharded else 1) / self.tau)

    def likely_mean(self, agreement):
        """A guess (G, N) of r's mean under p_a, exact but for the prior's slope at pbar, which is taken from p alone:
        an image adds p / N to pbar, and p is about exp(-entropy) where it is not small; pbar is about 1 / K elsewhere.
        """
        rows, centers = self.rows[: self.num_global], self.centers[: self.num_global]
        entropy = self.lse[: self.num_global] - (rows * centers).sum(dim=2)
        times_uniform = (math.log(self.num_codes / self.num_images) - entropy).clamp_min(0).exp()
        others = self.rows.sum(dim=0) - rows
        return self.slope(times_uniform / self.num_codes) - agreement * (others * centers).sum(dim=2)


def make_engine(codes, impl, compute_dtype, num_rows, tile=None):
    """What computes the passes: an object with `round`, `statistics` and `gradient` as `tiles.Tiles` has them."""
    if impl == "triton":
        from fused_loss.triton_kernels import TritonKernels

        return TritonKernels(codes, compute_dtype)
    if isinstance(codes, HadamardDictionary) and HadamardTransforms.can_run(codes, compute_dtype):
        return HadamardTransforms(codes, num_rows)
    return Tiles(codes, compute_dtype, num_rows, tile)


def merge_over_processes(top, total, centers, best):
    """Statistics of all rows over this process's codes -> over all codes: `tiles.merge` by all-reduce."""
    highest = top.clone()
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    scale = (top - highest).exp_()
    total, centers = total * scale, centers * scale[:, None]
    dist.all_reduce(total)
    dist.all_reduce(centers)
    return highest, total, centers, None if best is None else highest_over_processes(top, best)


MANY_ON_CPU, MANY_ON_GPU = 2**20, 2**28  # logits of one view, from which on "auto" takes tiles


def choose_loss(head_impl, device, num_images, num_codes, bf16=False, dictionary="rademacher", sharded=False):
    """The form of the loss that runs: a function with `cplearn_loss`'s arguments, which `describe_loss` names.

    head_impl: "dense"; "tiled"; "triton"; or "auto": tiled where codes are sharded, and on a CPU where one view has a
    million logits or more, which saves memory and, but for float32 near that size, time, or in bf16 from 16384 codes
    on, of which dense would make float32 numbers in each step (benchmarks/README.md). On a GPU tiled where one view has
    2^28 logits: an H200 was quickest with dense, up to 131072 codes, but it takes 30 bytes for a logit of each of two
    views, then 16 GB, and tiles 2. Else dense. The Triton kernels are taken only when asked for.
    num_images: in the joint batch of this process.
    bf16: matrix products of tiled and triton in bfloat16; everything else is float32.
    Raises UserError for a form that cannot run here.
    """
    compute_dtype = torch.bfloat16 if bf16 and dictionary == "rademacher" else torch.float32
    if head_impl == "auto":
        many = num_images * num_codes >= (MANY_ON_CPU if device.type == "cpu" else MANY_ON_GPU)
        many |= device.type == "cpu" and compute_dtype == torch.bfloat16 and num_codes >= 2**14
        head_impl = "tiled" if sharded or many else "dense"
    if head_impl == "dense" and sharded:
        raise UserError("--head_impl dense: --shard_codes needs tiled or triton")
    if head_impl == "triton" and (device.type != "cuda" or dictionary != "rademacher"):
        raise UserError(f"--head_impl triton: on {device.type} with --dictionary {dictionary}; "
                        "it needs a GPU and rademacher, use tiled")  # fmt: skip
    if head_impl == "dense":
        return cplearn_loss
    return partial(fused_cplearn_loss, impl=head_impl, compute_dtype=compute_dtype)
