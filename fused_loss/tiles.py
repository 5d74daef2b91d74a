"""The two passes of `fused_loss` over a dictionary, by matrix products on tiles of codes.

On a CPU a tile of codes and its logits stay in a core's cache, torch.compile compiles what stands between the products
where it finds a compiler, and each thread takes a share of the codes. On other devices tiles are as large as memory
allows: each operation there costs a launch, whatever its size.

    G views of B images to weigh, R rows of any images      F head width, K codes, T codes in a tile
"""

import functools
import math
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch

from dictionary import codes_in_tile

LARGE = 2**21  # logits in all, from which compiling (seconds, once a process) and threads pay


class Slope(NamedTuple):
    """scale times the derivative of a prior in each pbar_k: log(K pbar) + 1 for "kl", -1 / (K pbar) for "ce".

    num_codes: K of the whole dictionary, also where a pass sees only a part of it.
    Where a float has lost the probability: the derivative at the smallest number for "kl", and 0 for "ce".
    """

    prior: str
    num_codes: int
    scale: float

    def __call__(self, mean):
        smallest = 2 * torch.finfo(mean.dtype).tiny  # 1 / (K pbar) must not overflow
        if self.prior == "kl":
            return self.scale * (mean.clamp_min(smallest).log() + (math.log(self.num_codes) + 1))
        return torch.where(mean > smallest, -self.scale / (self.num_codes * mean.clamp_min(smallest)), 0.0)


class Tiles:
    """Both passes over the codes that this process holds.

    codes: a Dictionary.  compute_dtype: of the products; torch.bfloat16 rounds what enters and leaves them.
    num_rows: R of the larger pass, from which the default of tile is chosen.
    """

    def __init__(self, codes, compute_dtype, num_rows, tile=None):
        self.codes, self.compute_dtype, self.products = codes, compute_dtype, {}
        self.tile = min(tile or default_tile(num_rows, codes.shape[0], compute_dtype, codes.device), codes.shape[1])
        large = codes.device.type == "cpu" and num_rows * codes.shape[1] >= LARGE
        self.shares = self._shares(torch.get_num_threads() if large else 1)
        self.compiled = large

    def round(self, rows):
        """Rows (.., F) rounded as both passes round them, in their own dtype."""
        return rows.to(self.compute_dtype).to(rows.dtype)

    def statistics(self, rows):
        """What the loss must know of each row's logits s = rows @ W, from one pass with an online maximum.

        rows: (R, F), temperature included, as `round` gives them.
        Returns top = max_k s (R,), total = sum_k exp(s - top) (R,), centers = sum_k exp(s - top) w_k (R, F) and
        best = argmax_k s (R,) int64.
        """
        return merge(self._in_threads(self._statistics_of_share, rows))

    def gradient(self, rows, top, total, slope=None, agreement=0.0, offset=None, local=None):
        """Mean probabilities, and the targets' side of the gradient.

            p[a,i,k] = exp(s_a[i,k] - top[a,i]) / total[a,i]                pbar_a[k] = mean_i p[a,i,k]
            A[a,i,k] = p[a,i,k] (slope_a[k] - agreement * (sum over v != a of s_v[i,k]) - offset[a,i])

        rows: (G, B, F).  local: (B, F), the local views' sum, which counts among the views v; or None.
        top, total: (G, B), of the whole dictionary.
        slope: (G, K); or a `Slope`, taken at the pbar just found; or None: pbar alone.
        offset: (G, B). It changes nothing in sum_k A (w_k - m), but with a guess of the mean of the rest under p both
            parts of that stay small, and so their rounding errors.
        Returns pbar (G, K), sum_k A w_k (G, B, F), sum_k A (G, B); the last two are None without a slope.
        """
        rows = rows if local is None else torch.cat([rows, local[None]])
        per_row = [x[..., None] for x in (top, total, torch.zeros_like(top) if offset is None else offset)]
        parts = self._in_threads(self._gradient_of_share, rows, *per_row, slope, agreement)
        means = torch.cat([part[0] for part in parts], dim=1)
        if slope is None:
            return means, None, None
        product, mass = (functools.reduce(torch.add, column) for column in list(zip(*parts, strict=True))[1:])
        return means, product.T.reshape(*top.shape, -1).contiguous(), mass  # collectives want it so

    def _in_threads(self, work, *args):
        """[work(share, *args)] of all shares of the codes, one thread each."""
        if len(self.shares) == 1:
            return [work(self.shares[0], *args)]
        return list(workers(len(self.shares)).map(lambda share: work(share, *args), self.shares))

    def _shares(self, num_threads):
        starts = range(0, self.codes.shape[1], self.tile)
        num_shares = min(num_threads, len(starts))
        return [starts[i * len(starts) // num_shares : (i + 1) * len(starts) // num_shares] for i in range(num_shares)]

    @torch.no_grad()
    def _statistics_of_share(self, starts, rows):
        products = self._products(starts).take(rows)
        top = rows.new_full((len(rows), 1), -math.inf)
        total, centers = torch.zeros_like(top), torch.zeros_like(rows.T)
        best = torch.zeros_like(top, dtype=torch.int64)
        shift = torch.zeros_like(top)
        for start in starts:
            raw = products.logits(start, shift)
            e, sum_e, new_top, highest, where, of_highest = self._run(
                softmax_tile, raw, shift, rows, products.codes, top
            )
            best = torch.where(highest > top, start + where, best)
            shrink = (top - new_top).exp_()
            total = total.mul_(shrink).add_(sum_e)
            products.add_product(centers.mul_(shrink.T), e)
            centers += of_highest
            top = new_top
            shift = products.shift(top)
        return top.squeeze(1), total.squeeze(1), centers.T.contiguous(), best.squeeze(1)

    @torch.no_grad()
    def _gradient_of_share(self, starts, rows, top, total, offset, slope, agreement):
        products = self._products(starts).take(rows.flatten(0, 1))
        stop = min(starts[-1] + self.tile, self.codes.shape[1])
        means = rows.new_empty(len(top), stop - starts[0])
        product, mass = rows.new_zeros(rows.shape[2], top.numel()), torch.zeros_like(top).squeeze(2)
        shift = products.shift(torch.cat([top, top.new_zeros(len(rows) - len(top), *top.shape[1:])]).flatten(0, 1))
        for start in starts:
            raw = products.logits(start, shift)
            codes, first = products.codes, start - starts[0]
            given = slope[:, start : start + codes.shape[1]] if torch.is_tensor(slope) else slope
            mean, *of_tile = self._run(gradient_tile, raw, shift, codes, top, total, offset, given, agreement)
            means[:, first : first + codes.shape[1]] = mean
            if slope is not None:
                weights, sum_weights, of_likeliest = of_tile
                products.add_product(product, weights)
                product += of_likeliest
                mass += sum_weights
        return means, product, mass

    def _products(self, starts):
        """The `Products` of one share of the codes."""
        if starts[0] not in self.products:
            kind = Bfloat16Products if self.compute_dtype == torch.bfloat16 else Products
            self.products[starts[0]] = kind(self.codes, self.compute_dtype, self.tile)
        return self.products[starts[0]]

    def _run(self, body, raw, *args):
        if self.compiled and raw.shape[1] == self.tile:  # the last tile may have another shape
            return run_compiled(body, raw, *args)
        return body(raw, *args)


def default_tile(num_rows, dim, dtype, device):
    """Codes in a tile: with 2 views of 64 images, F 384 and bfloat16 4096 on a CPU, 1048576 on a GPU."""
    numbers = dim + 2 * num_rows  # a code; its logits and weights, which are in float32 once
    return codes_in_tile(numbers * dtype.itemsize + 4 * num_rows, device)


def merge(parts):
    """[(top, total, centers, best)] of parts of the codes -> (top, total, centers, best) of all codes."""
    if len(parts) == 1:
        return parts[0]
    tops, totals, centers, bests = (torch.stack(x) for x in zip(*parts, strict=True))
    top, of_part = tops.max(dim=0)
    scale = (tops - top).exp_()
    best = bests.gather(0, of_part[None])[0]
    return top, (totals * scale).sum(dim=0), (centers * scale[..., None]).sum(dim=0), best


# ---- between the products --------------------------------------------------------------------------------------------


# A peaked p, as late in training, is nearly all one code, and gradients are small differences between such p. So the
# likeliest code of a tile stays out of its product, which may round to bfloat16, and is added for itself.


def softmax_tile(raw, shift, rows, codes, top):
    """One tile of an online softmax: logits raw (R, T), codes (F, T), top (R, 1) so far.

    Returns exp(s - new top) in codes' dtype (R, T), 0 at the highest; its sum with the highest, the new top, the tile's
    highest logit (taken exactly), its place: (R, 1); and what its code adds to the centers (F, R).
    """
    s = raw.to(rows.dtype) + shift
    where = argmax(s)
    code = codes[:, where.squeeze(1)].to(rows.dtype)
    highest = (rows * code.T).sum(dim=1, keepdim=True)
    new_top = torch.maximum(top, highest)
    e = without(exp(s - new_top), where).to(codes.dtype)
    of_highest = (highest - new_top).exp()
    sum_e = e.sum(dim=1, keepdim=True, dtype=rows.dtype) + of_highest
    return e, sum_e, new_top, highest, where, code * of_highest.T


def gradient_tile(raw, shift, codes, top, total, offset, slope, agreement):
    """One tile of `Tiles.gradient`: logits raw of G views, or G and one more.

    Returns pbar (G, T); A (G B, T) in codes' dtype, 0 at the likeliest code; its sums with the likeliest (G, B); and
    what the likeliest code adds to the product (F, G B).
    """
    s = raw.to(top.dtype) + shift
    s = s.view(-1, top.shape[1], s.shape[1])  # (G, B, T), or G + 1
    p = exp(s[: len(top)] - top) / total
    mean = p.mean(dim=1)
    if slope is None:
        return (mean,)
    slope = slope if isinstance(slope, torch.Tensor) else slope(mean)
    others = s.sum(dim=0) - s[: len(top)]
    weights = (p * (slope[:, None] - agreement * others - offset)).flatten(0, 1).to(codes.dtype)
    where = argmax(s[: len(top)].flatten(0, 1))
    of_likeliest = weights.gather(1, where).to(top.dtype)
    weights = without(weights, where)
    sums = weights.sum(dim=1, keepdim=True, dtype=top.dtype) + of_likeliest
    return mean, weights, sums.view(top.shape[:2]), codes[:, where.squeeze(1)].to(top.dtype) * of_likeliest.T


def without(x, where):
    """x (R, T), 0 in each row's column where (R, 1)."""
    column = torch.arange(x.shape[1], device=x.device, dtype=torch.int32)  # int64 is compared at half the speed
    return torch.where(column == where.to(torch.int32), 0, x)


def argmax(s):
    """argmax of each row of s (R, T), (R, 1) int64; first the best of T / 64 columns at a time, which vectorises."""
    if s.shape[1] % 64:
        return s.argmax(dim=1, keepdim=True)
    grouped = s.unflatten(1, (64, -1))  # column j + i T / 64 at (i, j)
    j = grouped.amax(dim=1).argmax(dim=1)
    i = grouped[torch.arange(len(s), device=s.device), :, j].argmax(dim=1)
    return (i * grouped.shape[2] + j)[:, None]


def exp(x):
    """exp, but nothing subnormal, which is slow, and of which a product with a small number might be one."""
    return x.clamp(min=0.9 * math.log(torch.finfo(x.dtype).tiny)).exp()


def run_compiled(body, raw, *args):
    """body(raw, *args), compiled for this dtype and shape; as it is where that fails, say for want of a compiler."""
    kind = body, raw.dtype, raw.shape
    if kind not in _bodies:
        with _compiling:  # without the lock every thread would compile the body that all threads need
            if kind not in _bodies:
                _bodies[kind] = _compile(body, raw, *args)
    return _bodies[kind](raw, *args)


_compiling, _bodies = threading.Lock(), {}


def _compile(body, *example):
    # threads share the codes, not a tile
    compiled = torch.compile(body, dynamic=False, options={"cpp.threads": 1})
    try:
        compiled(*example)
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        warnings.warn(f"the tiled loss runs uncompiled, and slower: {reason}", stacklevel=2)
        return body
    return compiled


@functools.cache
def workers(num_threads):
    """Threads whose operations use one core each: many small operations shared among cores wait for one another."""
    mine = torch.get_num_threads()
    pool = ThreadPoolExecutor(num_threads, "tiles", initializer=torch.set_num_threads, initargs=(1,))
    list(pool.map(lambda _: torch.zeros(1), range(num_threads)))
    torch.set_num_threads(mine)  # the initialiser's number would hold for every thread made after it
    return pool


# ---- products with a tile of codes -----------------------------------------------------------------------------------


class Products:
    """rows (R, F) times one tile of codes after another, in float32 or float64.

    Both passes share their memory: memory given back and taken anew leaves holes as large."""

    def __init__(self, codes, dtype, tile):
        self.dictionary, self.tile = codes, tile
        self.buffer = torch.empty(codes.shape[0], tile, dtype=dtype, device=codes.device)
        self.raw = self.buffer.new_empty(0)

    def take(self, rows):
        """Set the rows that `logits` multiplies; returns self."""
        self.rows = rows.to(self.buffer.dtype)
        if len(self.raw) != len(rows):
            self.raw = self.buffer.new_empty(len(rows), self.tile)
        return self

    def shift(self, top):
        """What `logits` subtracts from rows whose highest logit, so far, is top (R, 1)."""
        return torch.zeros_like(top)

    def logits(self, start, shift):
        """The logits of the tile that begins at code `start`, less shift (R, 1): (R, T)."""
        codes = self.load(start)
        return torch.mm(self.rows, codes, out=self.raw[:, : codes.shape[1]])

    def load(self, start):
        """codes (F, T) <- the tile that begins at code `start`."""
        codes = self.dictionary.tile(start, min(start + self.tile, self.dictionary.shape[1]))
        self.codes = self.buffer[: len(codes), : codes.shape[1]].copy_(codes)
        return self.codes

    def add_product(self, total, weights):
        """total (F, n) += codes @ weights (n, T)^T, a product of bfloat16 to a float32 total."""
        if self.codes.dtype == total.dtype:
            total.addmm_(self.codes, weights.T)
        else:
            total += self.codes @ weights.T


class Bfloat16Products(Products):
    """A product rounds its result to 8 bits: of s - shift, which is small where p is large, and not of s.

    The product subtracts by itself: rows have -shift beside them, and codes have ones below them."""

    SHIFT_ROWS = 16  # one does the work, the others keep the product aligned

    def __init__(self, codes, dtype, tile):
        super().__init__(codes, dtype, tile)
        self.buffer = self.buffer.new_ones(codes.shape[0] + self.SHIFT_ROWS, tile)

    def take(self, rows):
        return super().take(torch.cat([rows, rows.new_zeros(len(rows), self.SHIFT_ROWS)], dim=1))

    def shift(self, top):
        return top.to(self.rows.dtype).to(top.dtype)

    def logits(self, start, shift):
        codes = self.load(start)
        self.rows[:, len(codes)] = -shift.squeeze(1)
        return torch.mm(self.rows, self.buffer[:, : codes.shape[1]], out=self.raw[:, : codes.shape[1]])
