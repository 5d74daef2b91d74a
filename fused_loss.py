"""CPLearn's loss without a B x K array: value and gradients of `cplearn_head.cplearn_loss`, by tiles of codes.

The algebra is that of attention with the frozen codes as keys and values: what one stream over the codes must remember
is, per image, a logarithm of a sum and one vector of width F.

    stream 1, all views      lse_v[i] = log sum_k exp s_v[i,k]        m_v[i] = sum_k p_v[i,k] w_k     s_v = h_v W / tau
                             CE(p_a, p_v)_i = lse_v[i] - h_v[i] . m_a[i] / tau
    stream 2, global views   pbar_a[k] = mean_i exp(s_a[i,k] - lse_a[i])
    stream 3, global views   sum_k A[i,k] (w_k - m_a[i]),  A = p_a r,  r the loss's slope in p_a     (targets' dH_a)

A tile of codes holds every image of this process, so without other processes its pbar is final when it is computed:
then streams 2 and 3 are one. Matrix work for two views, in units of 2 B F K multiply-adds: 4 then, 5 with other
processes, 2 in the plain form. Extra memory: O(V B F + K + B x tile).

    B images, V views of each, the first G are global crops     F head width, K codes, T codes in a tile
"""

import functools
import math

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

PRIORS = ("kl", "ce")
TILE_ELEMENTS = 2**18  # of a tile's logits: with its codes they stay in a core's second-level cache
MAX_TILE = 4096
SHIFT_ROWS = 16  # one does the work; the others keep products aligned


def fused_cplearn_loss(
    views, codes, tau, beta=0.25, prior="kl", num_global=2, reduce_mean=None, compute_dtype=None, tile=None
):
    """`cplearn_head.cplearn_loss`, same value and same gradients, in O(V B F + K + B x tile) extra memory.

    views, codes, tau, beta, prior, num_global, reduce_mean: as there. `reduce_mean` is called once per global view, on
    a (K,) tensor, as there; its backward runs in the backward pass, once per global view, in the order of the views.
    compute_dtype: of the matrix products; torch.bfloat16 rounds what enters and leaves them, and keeps sums over tiles,
        maxima and exponentials in float32. None: the views' dtype. float64 views take no other.
    tile: T, codes in a tile; None: chosen from the number of images and views.
    Returns (loss, {"invariance", "prior"}): scalars in nats; unlike there, the terms carry no gradient.
    Raises ValueError as there, and for a compute_dtype or tile that cannot be.
    Differentiable once. Without processes besides this one the gradient is found in the forward pass, if anything
    needs it; otherwise in the backward pass, because it needs the other processes' means.
    """
    _check(views, codes, prior, num_global, compute_dtype, tile)
    streams = _Streams(views, codes, tau, beta, prior, num_global, compute_dtype or views[0].dtype, tile)
    wanted = torch.is_grad_enabled() and any(h.requires_grad for h in views)
    loss, invariance, prior_term = _FusedLoss.apply(streams, reduce_mean, wanted, *views)
    return loss, {"invariance": invariance, "prior": prior_term}


def _check(views, codes, prior, num_global, compute_dtype, tile):
    if prior not in PRIORS:
        raise ValueError(f"prior is {prior!r}; expected one of {PRIORS}")
    if len(views) < 2 or not 1 <= num_global <= len(views):
        raise ValueError(f"{len(views)} views with {num_global} global; expected at least 2 views, 1 of them global")
    for h in views:
        if h.shape != views[0].shape or h.shape[1] != codes.shape[0]:
            raise ValueError(f"views have shapes {[tuple(h.shape) for h in views]}, codes {tuple(codes.shape)}; "
                             "expected (B, F) each, and (F, K)")  # fmt: skip
        if h.dtype not in (torch.float32, torch.float64) or h.dtype != views[0].dtype:
            raise ValueError(f"views are {[h.dtype for h in views]}; expected all float32 or all float64")
    allowed = [torch.float64] if views[0].dtype == torch.float64 else [torch.float32, torch.bfloat16]
    if compute_dtype not in (None, *allowed):
        raise ValueError(f"compute_dtype is {compute_dtype} for {views[0].dtype} views; expected one of {allowed}")
    if tile is not None and tile < 1:
        raise ValueError(f"tile is {tile}; expected at least 1")


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, streams, reduce_mean, wanted, *views):
        streams.statistics()
        # other processes' means are unknown while this one streams
        at_once = wanted and (reduce_mean is None or not dist.is_initialized() or dist.get_world_size() == 1)
        local_means, grad = streams.means_and_gradient(streams.slope if at_once else None)
        means = leaves = local_means
        if reduce_mean is not None:
            with torch.set_grad_enabled(wanted):
                leaves = [mean.detach().requires_grad_(wanted) for mean in local_means]
                means = [reduce_mean(mean) for mean in leaves]
            at_once = at_once and all(mean is leaf for mean, leaf in zip(means, leaves, strict=True))
        if at_once:
            ctx.save_for_backward(grad)
        elif wanted:
            ctx.streams, ctx.means, ctx.leaves = streams, means, leaves
        invariance = streams.invariance()
        prior_term = sum(streams.prior_loss(mean.detach()) for mean in means) / streams.num_global
        ctx.mark_non_differentiable(invariance, prior_term)
        return streams.beta * invariance + prior_term, invariance, prior_term

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, *_):
        if ctx.saved_tensors:
            grad = ctx.saved_tensors[0] * grad_loss
        else:
            slopes = [
                _grad_through(mean, leaf, grad_loss * ctx.streams.slope(mean.detach()))
                for mean, leaf in zip(ctx.means, ctx.leaves, strict=True)
            ]
            _, grad = ctx.streams.means_and_gradient(slopes, grad_loss)
        return None, None, None, *grad.unbind()


def _grad_through(y, x, grad_y):
    """dL/dx where y is a function of x and dL/dy is given."""
    if not y.requires_grad:
        return torch.zeros_like(x)
    return torch.autograd.grad(y, x, grad_y, retain_graph=True)[0]


def _outside_autocast(method):
    """Products are taken in compute_dtype, whatever autocast would have them in."""

    @functools.wraps(method)
    def run(self, *args):
        with torch.autocast(self.codes.device.type, enabled=False):
            return method(self, *args)

    return run


class _Streams:
    """One loss's inputs, and what stream 1 remembers of them."""

    def __init__(self, views, codes, tau, beta, prior, num_global, compute_dtype, tile):
        self.num_views, self.batch_size, self.num_codes = len(views), len(views[0]), codes.shape[1]
        self.codes, self.tau, self.beta, self.prior, self.num_global = codes, tau, beta, prior, num_global
        self.dtype, self.compute_dtype = views[0].dtype, compute_dtype
        self.pairs = [(a, v) for a in range(num_global) for v in range(self.num_views) if v != a]
        self.tile = tile or default_tile(self.num_views * self.batch_size)
        self.scaled = (torch.stack(views).detach() / tau).to(compute_dtype)  # (V, B, F): rounded once, for all streams
        self.rounds = compute_dtype != self.dtype
        self.smallest = 2 * torch.finfo(self.dtype).tiny
        # r is scaled by it so that p r is seldom subnormal, which is slow; 1 / (K pbar) must not overflow
        self.unit = min(1024.0, self.num_codes)

    def tiles(self):
        """(start, codes (F, T) in compute_dtype, the same with rows of ones below it where logits take a shift)."""
        dim, num_ones = self.codes.shape[0], SHIFT_ROWS if self.rounds else 0
        buffer = torch.ones(dim + num_ones, self.tile, dtype=self.compute_dtype, device=self.codes.device)
        for start in range(0, self.num_codes, self.tile):
            codes = self.codes[:, start : start + self.tile]
            extended = buffer[:, : codes.shape[1]]
            extended[:dim].copy_(codes)
            yield start, extended[:dim], extended

    def _extended(self, rows, shift):
        """rows (n, F), with what times rows of ones is -shift (n, 1). The product then rounds s - shift, not s."""
        return torch.cat([rows, -shift, rows.new_zeros(len(rows), SHIFT_ROWS - 1)], dim=1) if self.rounds else rows

    def _shift(self, rows, centers):
        """sum_k p s (.., 1): rounding is relative, so s - shift must be small where p is large."""
        if not self.rounds:
            return torch.zeros_like(rows[..., :1])
        return (rows * centers).sum(dim=-1, keepdim=True).to(self.compute_dtype)

    @_outside_autocast
    def statistics(self):
        """Stream 1: top = max_k s and lse (V, B, 1), best = argmax_k s (V, B), centers m (V, B, F).

        p = exp(s - top) best_prob, not exp(s - lse): logits of several hundred would lose digits of lse.
        The best code so far stays out of the products: a peaked p is one code and a small rest, and gradients are small
        differences between centers, which must not be rounded relative to that code.
        """
        rows = self.scaled.flatten(0, 1)  # (VB, F)
        exact = rows.to(self.dtype)
        top = exact.new_full((len(rows), 1), -math.inf)
        shift = torch.zeros_like(top).to(self.compute_dtype)
        rest = torch.zeros_like(top)  # sum of exp(s - top) over all codes but the best
        centers = torch.zeros_like(exact.T)  # (F, VB): that sum, times the codes
        best = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
        best_codes = torch.zeros_like(centers)
        for start, codes, extended in self.tiles():
            logits = (self._extended(rows, shift) @ extended).to(self.dtype)  # (VB, T): s - shift
            better = (logits.amax(dim=1) > (top - shift).squeeze(1)).nonzero().squeeze(1)  # few, but at first
            here = logits[better].argmax(dim=1)
            new_codes = codes[:, here].to(self.dtype)
            best_logits = (exact[better] * new_codes.T).sum(dim=1) if self.rounds else logits[better, here]
            new_top = top.index_copy(0, better, best_logits[:, None])
            e = self._exp_(logits.add_(shift - new_top))
            e[better, here] = 0
            shrink = (top - new_top).exp_()
            rest = rest * shrink + e.sum(dim=1, keepdim=True)
            centers.mul_(shrink.T)
            _add_product(centers, codes, e)
            # what was best belongs to the rest now; at the first tile shrink is 0
            rest[better] += shrink[better]
            centers[:, better] += best_codes[:, better] * shrink[better].T
            best[better] = start + here
            best_codes[:, better] = new_codes
            top = new_top
            shift = self._shift(exact, (centers + best_codes).T / (1 + rest))
        shape = (self.num_views, self.batch_size, -1)
        total = 1 + rest
        centers = (centers + best_codes) / total.T
        self.top, self.lse, self.best_prob = top.view(shape), (top + total.log()).view(shape), (1 / total).view(shape)
        self.centers, self.best, self.best_codes = centers.T.reshape(shape), best.view(shape[:2]), best_codes

    def invariance(self):
        """Mean over pairs and images of CE(p_a, p_v), with the same rounded h as in lse."""
        scaled = self.scaled.to(self.dtype)
        terms = [(self.lse[v] - (scaled[v] * self.centers[a]).sum(1, keepdim=True)).mean() for a, v in self.pairs]
        return sum(terms) / len(terms)

    def prior_loss(self, mean):
        log_mean = mean.clamp_min(torch.finfo(mean.dtype).tiny).log()
        if self.prior == "kl":
            return (mean * (log_mean + math.log(self.num_codes))).sum()
        return -log_mean.mean()

    def slope(self, mean):
        """d prior_loss / d mean, entry by entry; 0 where float32 has lost the probability, as in the plain form."""
        if self.prior == "kl":
            return mean.clamp_min(self.smallest).log() + (math.log(self.num_codes) + 1)
        return torch.where(mean > self.smallest, -1 / (self.num_codes * mean), 0)

    @_outside_autocast
    def means_and_gradient(self, slope, grad_loss=1.0):
        """Streams 2 and 3 in one: pbar (G, K), and the gradient (V, B, F) of grad_loss times the loss.

        slope: None: no gradient. A function: the prior's slope from a tile's pbar. (K,) per global view: that slope,
        times grad_loss.
        """
        means = self.lse.new_empty(self.num_global, self.num_codes)
        top, best_prob = self.top[: self.num_global], self.best_prob[: self.num_global]
        share = best_prob.transpose(1, 2) / self.batch_size  # (G, 1, B)
        rows, shift = self.scaled[: self.num_global], self._shift(self.scaled.to(self.dtype), self.centers)
        if slope is not None and self.num_views > self.num_global:
            # what local views predict enters the targets' slope by the sum of their logits
            rows, shift = self._with_local_sum(self.scaled), self._with_local_sum(shift)
        shift = shift[: len(rows)]
        if slope is not None:
            agreement = grad_loss * self.beta * self.num_global / len(self.pairs)
            offset = self._offset(slope, agreement, grad_loss, shift) * self.unit
            product = self.centers.new_zeros(rows.shape[2], self.num_global * self.batch_size)  # sum_k A w_k: (F, GB)
            mass = torch.zeros_like(offset)  # sum_k A: (G, B, 1)
        rows_and_shift = self._extended(rows.flatten(0, 1), shift.flatten(0, 1))
        to_top = shift[: self.num_global] - top
        for start, codes, extended in self.tiles():
            here = slice(start, start + codes.shape[1])
            logits = (rows_and_shift @ extended).to(self.dtype)  # s - shift
            logits = logits.view(len(rows), self.batch_size, -1)  # (G, B, T), or one more with local views
            e = self._exp_(logits[: self.num_global] + to_top)  # (G, B, T)
            means[:, here] = (share @ e).squeeze(1)
            if slope is None:
                continue
            for a in range(self.num_global):
                others = functools.reduce(torch.add, [logits[b] for b in range(len(rows)) if b != a])
                prior_slope = slope(means[a, here]) if callable(slope) else slope[a][here]
                r = torch.sub(prior_slope * self.unit, others, alpha=agreement * self.unit).sub_(offset[a])
                e[a].mul_(r)  # A, but for best_prob
            weights = e.to(self.compute_dtype)
            mass += weights.sum(dim=2, keepdim=True, dtype=self.dtype)
            _add_product(product, codes, weights.flatten(0, 1))
        if slope is None:
            return means, None
        grad = self._predicted_side(grad_loss)
        target = best_prob * (product.T.reshape(*offset.shape[:2], -1) - mass * self.centers[: self.num_global])
        grad[: self.num_global] += target / (self.unit * self.num_global * self.batch_size * self.tau)
        return means, grad

    def _with_local_sum(self, x):
        """(V, B, n) -> (G + 1, B, n): the global views' entries, and the sum of the local views'."""
        local = x[self.num_global :].to(self.dtype).sum(dim=0, keepdim=True)
        return torch.cat([x[: self.num_global], local.to(x.dtype)])

    def _offset(self, slope, agreement, grad_loss, shift):
        """A guess (G, B, 1) of r's mean under p_a. sum_k A (w_k - m_a) is the same for every number subtracted from r;
        but when p is peaked its two parts nearly cancel, so r less its mean makes rounding errors small."""
        offsets, scaled, shift = [], self.scaled.to(self.dtype), shift.to(self.dtype)
        for a in range(self.num_global):
            if callable(slope):
                codes = self.best_codes[:, a * self.batch_size : (a + 1) * self.batch_size]  # (F, B)
                e = self._exp_(scaled[a] @ codes - self.top[a])  # (B, B)
                best_slope = slope((e * self.best_prob[a]).mean(dim=0))[:, None]
            else:
                best_slope = slope[a][self.best[a]][:, None]
            uniform_slope = grad_loss if self.prior == "kl" else -grad_loss  # where pbar is 1 / K
            others, others_shift = scaled.sum(dim=0) - scaled[a], shift.sum(dim=0) - shift[a]
            predicted = (others * self.centers[a]).sum(dim=1, keepdim=True) - others_shift
            offsets.append(self.best_prob[a] * (best_slope - uniform_slope) + uniform_slope - agreement * predicted)
        return torch.stack(offsets)

    def _predicted_side(self, grad_loss):
        """Gradient (V, B, F) through log p_v of all pairs (a, v)."""
        grad = torch.zeros_like(self.centers)
        for a, v in self.pairs:
            grad[v] += self.centers[v] - self.centers[a]
        return grad * (grad_loss * self.beta / (len(self.pairs) * self.batch_size * self.tau))

    def _exp_(self, x):
        """exp in place; where it would be subnormal, which is slow, the smallest normal number."""
        return x.clamp_(min=math.log(torch.finfo(x.dtype).tiny) + 0.01).exp_()


def _add_product(total, codes, weights):
    """total (F, R) += codes (F, T) @ weights (R, T)^T; a product of bfloat16 is added to a float32 total."""
    if codes.dtype == total.dtype:
        total.addmm_(codes, weights.T)
    else:
        total += codes @ weights.to(codes.dtype).T


def default_tile(rows):
    """Codes in a tile for V B rows of logits: a power of two, 2048 for 2 views of 64 images."""
    return min(MAX_TILE, max(128, 2 ** round(math.log2(TILE_ELEMENTS / rows))))
