"""CPLearn's head and loss: projector, frozen bipolar dictionary, invariance and prior terms, and Lemma 1's certificate.

Sansone, Lebailly, Tuytelaars, "Collapse-Proof Non-Contrastive Self-Supervised Learning", ICML 2025 (arXiv 2410.04959).

    B images per process, V views of each, the first G are global crops     D backbone width, F head width, K codes
    n images per process that the temperature is made for (fixed when the head is built)     losses in nats
"""

import math
from functools import partial

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from fused_loss import fused_cplearn_loss
from utils import Objective, SyncBatchNorm, UserError, all_gather_rows, all_reduce_mean, world_size

ACTIVATIONS = ("l2", "tanh")
PRIORS = ("kl", "ce")
HEAD_IMPLS = ("auto", "dense", "tiled")


def cplearn_loss(views, codes, tau, beta=0.25, prior="kl", num_global=2, reduce_mean=None):
    """CPLearn's loss, symmetric over views:

        p_v     = softmax(h_v W / tau)                                            (B, K)
        pbar_a  = mean of p_a over the batch of all processes                     (K,)
        loss    = beta * mean over pairs (a, v), a < G, v != a of CE(p_a, p_v)  +  mean over a < G of prior(pbar_a)
        CE(p_a, p_v) = -mean_i sum_k p_a[i,k] log p_v[i,k]                        invariance
        prior "kl"   = sum_k pbar_k log(K pbar_k)            in [0, log K]        (Appendix N; needed for ViTs)
        prior "ce"   = -(1/K) sum_k log pbar_k               >= log K             (Eq. 2)

    Gradients flow through both sides of every term. This is the definition that every faster form is tested against.

    views: list of V tensors (B, F), float32 or float64, global crops first.  codes: (F, K) of -1 and +1, any dtype.
    reduce_mean: maps this process's mean (K,) to the mean over all processes, differentiably; None: this process alone.
    Returns (loss, {"invariance", "prior"}): scalars in nats, the terms unweighted.
    Raises ValueError for shapes that do not fit, fewer than two views, or an unknown prior.
    Source: Eq. 2 and Appendix N of arXiv 2410.04959, made symmetric over views as the authors' code is.
    """
    _check_loss_inputs(views, codes, prior, num_global)
    codes = codes.to(views[0].dtype)
    log_probs = [F.log_softmax(h @ codes / tau, dim=1) for h in views]  # V x (B, K)
    probs = [log_p.exp() for log_p in log_probs[:num_global]]
    pairs = [(a, v) for a in range(len(probs)) for v in range(len(views)) if v != a]
    invariance = sum(-(probs[a] * log_probs[v]).sum(dim=1).mean() for a, v in pairs) / len(pairs)
    means = [p.mean(dim=0) for p in probs]
    if reduce_mean is not None:
        means = [reduce_mean(mean) for mean in means]
    prior_term = sum(prior_loss(mean, prior) for mean in means) / len(means)
    return beta * invariance + prior_term, {"invariance": invariance, "prior": prior_term}


def prior_loss(mean_probs, prior):
    """Distance of the mean prediction (K,) from uniform: KL(pbar || uniform) or CE(uniform, pbar), in nats."""
    num_codes = mean_probs.numel()
    # float32 probabilities underflow to 0 with tanh's unbounded logits; log of the smallest normal number stands in
    log_mean = mean_probs.clamp_min(torch.finfo(mean_probs.dtype).tiny).log()
    if prior == "kl":
        return (mean_probs * (log_mean + math.log(num_codes))).sum()
    return -log_mean.mean()


def _check_loss_inputs(views, codes, prior, num_global):
    if prior not in PRIORS:
        raise ValueError(f"prior is {prior!r}; expected one of {PRIORS}")
    if len(views) < 2 or not 1 <= num_global <= len(views):
        raise ValueError(f"{len(views)} views with {num_global} global; expected at least 2 views, 1 of them global")
    for h in views:
        if h.shape != views[0].shape or h.shape[1] != codes.shape[0]:
            raise ValueError(f"views have shapes {[tuple(h.shape) for h in views]}, codes {tuple(codes.shape)}; "
                             "expected (B, F) each, and codes (F, K)")  # fmt: skip


class CPLearnHead(nn.Module):
    """Projector of Eq. 1 and its frozen dictionary.

        u = Linear(x)                                   (B, F)
        b = BatchNorm(u)                                per view, synchronised over processes
        h = b / ||b|| * sqrt(F / n)   "l2" (Eq. 1)      or   tanh(b)   "tanh" (section 3.3; the paper's experiments)
        s = h W / tau                                   (B, K) logits, W in {-1, +1}^(F x K)

    in_dim: D.  out_dim: K, fewer than 1 / eps.  proj_dim: F, by default D.
    batch_size: n, the images in one process's batch; it sets tau once, tau is stored with the weights, and no later
    batch size changes a logit. With l2, n cancels.
    seed: of the dictionary. Everything runs in the parameters' dtype (float32), outside autocast.
    The state dict holds the dictionary as bits: F * K / 8 bytes.
    Raises UserError for sizes that cannot be.
    """

    def __init__(self, in_dim, out_dim=131072, proj_dim=None, activation="l2", batch_size=64, eps=1e-8, seed=0):
        super().__init__()
        proj_dim = proj_dim or in_dim
        if activation not in ACTIVATIONS:
            raise UserError(f"activation {activation!r}: expected one of {ACTIVATIONS}")
        self.activation = activation
        self.tau = code_temperature(out_dim, proj_dim, batch_size, eps)
        self.radius = math.sqrt(proj_dim / batch_size)  # length of h with l2
        self.eps = eps
        self.linear = nn.Linear(in_dim, proj_dim)
        self.bn = SyncBatchNorm(proj_dim)
        self.register_buffer("codes", rademacher_codes(proj_dim, out_dim, seed), persistent=False)

    def forward(self, x):
        """Backbone features (B, D) -> embeddings h (B, F). In training mode, call it once per view."""
        with torch.autocast(x.device.type, enabled=False):
            b = self.bn(self.linear(x.to(self.linear.weight.dtype)))
            return b.tanh() if self.activation == "tanh" else F.normalize(b, dim=1) * self.radius

    def logits(self, h):
        """Embeddings (B, F) -> logits (B, K); int8 codes are cast here and nowhere kept as floats."""
        with torch.autocast(h.device.type, enabled=False):
            return h @ self.codes.to(h.dtype) / self.tau

    @torch.no_grad()
    def assign(self, x):
        """Backbone features (B, D) -> the code of each image (B,) int64, with the running statistics of batch norm."""
        was_training = self.training
        codes = nearest_code(self.eval()(x), self.codes)
        self.train(was_training)
        return codes

    def extra_repr(self):
        dim, num_codes = self.codes.shape
        return f"F={dim}, K={num_codes}, activation={self.activation}, tau={self.tau:.4g}"

    # the dictionary travels as bits, and with it what the logits depend on

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "codes"] = pack_codes(self.codes)
        scale = [self.tau, self.radius, float(self.codes.shape[1])]
        destination[prefix + "scale"] = torch.tensor(scale, dtype=torch.float64)

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        stored = {name: state_dict.get(prefix + name) for name in ("codes", "scale")}
        missing += [prefix + name for name, value in stored.items() if value is None]
        rest = {k: v for k, v in state_dict.items() if k not in (prefix + "codes", prefix + "scale")}
        super()._load_from_state_dict(rest, prefix, metadata, strict, missing, unexpected, errors)
        if stored["codes"] is None or stored["scale"] is None:
            return
        tau, radius, num_codes = stored["scale"].tolist()
        dim, expected = self.codes.shape
        if int(num_codes) != expected or tuple(stored["codes"].shape) != (dim, math.ceil(expected / 8)):
            errors.append(
                f"{prefix}codes: {stored['codes'].shape[0]} x {int(num_codes)} in the file, {dim} x {expected} here"
            )
            return
        self.tau, self.radius = tau, radius
        self.codes.copy_(unpack_codes(stored["codes"], expected))


class CPLearn(Objective):
    """Head and loss as the training loop's objective: features of V views, (B, D) each -> (loss, terms).

    prior_scope "global": the prior's mean runs over the batch of all processes, so that N processes descend the loss of
    one process on the joined batch; "local": over each process's own batch, as in the authors' code.
    loss_function: `cplearn_loss`, or another form of it as `choose_loss` gives.
    """

    advice = {
        "saddle": "the loss rests where every p is uniform: raise --beta or --lr, or use --activation l2",
        "representation": "all images get one feature: lower --lr or --beta",
        "dimensional": "features span few directions: raise --out_dim, use --activation l2, or train longer",
        "cluster": "few codes are used: lower --beta, or use more images per step",
        "intracluster": "images that share a code are alike: raise --out_dim, or lower --beta",
    }

    def __init__(self, head, beta=0.25, prior="kl", num_global=2, prior_scope="global", loss_function=cplearn_loss):
        super().__init__()
        self.head, self.loss_function = head, loss_function
        self.beta, self.prior, self.num_global, self.prior_scope = beta, prior, num_global, prior_scope
        self.num_codes = head.codes.shape[1]
        # since the epoch began: p summed over images, and how many images had each code as their largest p
        self.register_buffer("usage", torch.zeros(self.num_codes))
        self.register_buffer("counts", torch.zeros(self.num_codes, dtype=torch.int32))

    def forward(self, features):
        views = [self.head(x) for x in features]
        self._count(views[0].detach())
        reduce_mean = partial(self._mean_over_processes, batch_size=len(features[0]))
        with torch.autocast(features[0].device.type, enabled=False):
            return self.loss_function(
                views, self.head.codes, self.head.tau, self.beta, self.prior, self.num_global, reduce_mean
            )

    def _mean_over_processes(self, local_mean, batch_size):
        if self.prior_scope == "global":
            mean, num_images = all_reduce_mean(local_mean), batch_size * world_size()
        else:
            mean, num_images = local_mean, batch_size
        self.usage += mean.detach() * (num_images / self.num_global)
        return mean

    def _count(self, h):
        codes = all_gather_rows(nearest_code(h, self.head.codes))  # (N,); one product of B x F x K, the loss takes 2V
        self.counts.scatter_add_(0, codes, torch.ones_like(codes, dtype=torch.int32))

    def start_epoch(self):
        self.usage.zero_()
        self.counts.zero_()

    @torch.no_grad()
    def statistics(self, features, averages):
        """Since the epoch began, codes_used: codes that were some image's first; perplexity of the mean prediction.
        prior_floor: the least prior that a batch of these N images can have; gap of the loss to Lemma 1's bound;
        within_code: variance of features among images that share a code, relative to all (0: collapse inside codes)."""
        distribution = self.usage / self.usage.sum()
        num_images = len(features)
        return {
            "num_codes": self.num_codes,
            "codes_used": int((self.counts > 0).sum()),
            "perplexity": float(torch.special.entr(distribution).sum().exp()),
            "prior_floor": prior_floor(self.num_codes, num_images, self.prior),
            "gap": averages["loss"] - loss_lower_bound(self.num_codes, self.beta, self.prior, self.head.eps),
            "uniformity": averages["invariance"] / math.log(self.num_codes),
            "within_code": within_code_variance(features, self.head.assign(features)),
        }

    def describe(self):
        dim = self.head.codes.shape[0]
        return [
            f"head: F {dim}, K {self.num_codes}, {self.head.activation}, tau {self.head.tau:.4g}, beta {self.beta:g}",
            f"dictionary: {self.head.codes.numel() / 2**20:.1f} MiB in memory (int8), "
            f"{dim * math.ceil(self.num_codes / 8) / 2**20:.2f} MiB in a checkpoint (bits)",
            f"Lemma 1: the loss cannot fall below "
            f"{loss_lower_bound(self.num_codes, self.beta, self.prior, self.head.eps):.4f} nats",
        ]


def choose_loss(head_impl, device, num_logits):
    """The form of the loss that runs, (name, function with `cplearn_loss`'s arguments); all are float32.

    head_impl: "dense", "tiled", or "auto": tiled on a CPU where one view has a million logits or more, which saves
    memory and some time (benchmarks/head.py). On a GPU the tiles were never run.
    """
    if head_impl == "auto":
        head_impl = "tiled" if device.type == "cpu" and num_logits >= 2**20 else "dense"
    return head_impl, {"dense": cplearn_loss, "tiled": fused_cplearn_loss}[head_impl]


@torch.no_grad()
def nearest_code(h, codes, tile=4096):
    """argmax_k of the logits of h (B, F) over codes (F, K), in tiles of codes: (B,) int64, O(B x tile) memory."""
    best = torch.full((len(h),), -math.inf, dtype=h.dtype, device=h.device)
    nearest = torch.zeros(len(h), dtype=torch.int64, device=h.device)
    for start in range(0, codes.shape[1], tile):
        with torch.autocast(h.device.type, enabled=False):
            score, k = (h @ codes[:, start : start + tile].to(h.dtype)).max(dim=1)
        nearest = torch.where(score > best, k + start, nearest)
        best = torch.maximum(score, best)
    return nearest


def within_code_variance(features, codes):
    """Variance of features (N, D) among rows that share a code (N,), over the variance among all rows; float.

    Both unbiased, so 1 means that codes say nothing about features and 0 that a code's images coincide. NaN where no
    two rows share a code."""
    _, group, count = codes.unique(return_inverse=True, return_counts=True)
    features = features.float()
    sums = torch.zeros(len(count), features.shape[1], device=features.device).index_add_(0, group, features)
    within = (features - (sums / count[:, None])[group]).square().sum()
    total = (features - features.mean(dim=0)).square().sum()
    freedom = len(features) - len(count)
    return float(within / freedom / (total / (len(features) - 1))) if freedom > 0 and total > 0 else math.nan


# ---- constants of the method -----------------------------------------------------------------------------------------


def code_temperature(num_codes, dim, batch_size, eps=1e-8):
    """tau = F / (sqrt(n) log((1 - eps (K - 1)) / eps)): an embedding that equals a code gets p = 1 - eps (K - 1).

    num_codes: K, with eps (K - 1) < 1.  dim: F.  batch_size: n, images in one process's batch.
    eps: 1e-8 as in the paper's footnote 2 and the authors' code (its Algorithm 1 prints 1e-6).
    Raises UserError where K is too large for eps.
    """
    if num_codes < 2 or eps * (num_codes - 1) >= 1:
        raise UserError(
            f"out_dim {num_codes}: expected 2 <= out_dim < 1 / eps = {1 / eps:.3g} (Lemma 1 needs eps (K - 1) < 1)"
        )
    return dim / (math.sqrt(batch_size) * math.log((1 - eps * (num_codes - 1)) / eps))


def loss_lower_bound(num_codes, beta, prior="kl", eps=1e-8):
    """Lemma 1: the least value of `cplearn_loss` on a whole data set, in nats, when every p is at least eps.

    -beta [ (1 - e) log(1 - e) + e log eps ] with e = eps (K - 1), plus 0 for "kl" or log K for "ce". A loss that
    reaches it certifies that neither representation nor cluster collapse has happened.
    """
    rest = eps * (num_codes - 1)
    entropy = -((1 - rest) * math.log1p(-rest) + rest * math.log(eps))
    return beta * entropy + (math.log(num_codes) if prior == "ce" else 0.0)


def prior_floor(num_codes, num_images, prior="kl"):
    """Least prior of one batch of N images with hard codes: log(K / N) for "kl" while N < K; log K for "ce"."""
    return math.log(num_codes) if prior == "ce" else max(0.0, math.log(num_codes / num_images))


# ---- the dictionary --------------------------------------------------------------------------------------------------


def rademacher_codes(dim, num_codes, seed=0):
    """Independent fair signs, (dim, num_codes) int8 of -1 and +1: a pure function of its arguments.

    Bit k % 32 of a 32-bit hash of (seed, row, k // 32), so that any part of the dictionary can be computed alone and
    the same on every device and version of torch.
    """
    row = torch.arange(dim, dtype=torch.int64)[:, None]
    word = torch.arange(math.ceil(num_codes / 32), dtype=torch.int64)[None, :]
    key = _hash32(_hash32(torch.tensor(seed % 2**32)) ^ row)  # (F, 1)
    hashed = _hash32(_hash32(key ^ word) + key)  # (F, ceil(K / 32)), values below 2^32
    packed = torch.from_numpy(hashed.numpy().astype("<u4").view(np.uint8))  # little-endian: bit k of the row is code k
    return unpack_codes(packed, num_codes)


def _hash32(x):
    """Finaliser of MurmurHash3 (Appleby, public domain) on int64 tensors taken modulo 2^32."""
    x = x & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return x ^ (x >> 16)


def pack_codes(codes):
    """(dim, num_codes) of -1 and +1 -> (dim, ceil(num_codes / 8)) uint8: bit k % 8 of byte k // 8 is 1 for +1."""
    return torch.from_numpy(np.packbits(codes.cpu().numpy() > 0, axis=1, bitorder="little"))


def unpack_codes(packed, num_codes):
    """Inverse of `pack_codes`: (dim, ceil(num_codes / 8)) uint8 -> (dim, num_codes) int8 of -1 and +1."""
    bits = np.unpackbits(packed.cpu().numpy(), axis=1, count=num_codes, bitorder="little").view(np.int8)
    bits *= 2
    bits -= 1
    return torch.from_numpy(bits)
