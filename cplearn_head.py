"""CPLearn's head and loss: projector, frozen bipolar dictionary, invariance and prior terms, and Lemma 1's certificate.

Sansone, Lebailly, Tuytelaars, "Collapse-Proof Non-Contrastive Self-Supervised Learning", ICML 2025 (arXiv 2410.04959).

    B images per process, V views of each, the first G are global crops     D backbone width, F head width, K codes
    n images per process that the temperature is made for (fixed when the head is built)     losses in nats
"""

import argparse
import math

import torch
from torch import nn
from torch.nn import functional as F

from batch_norm import SyncBatchNorm
from dictionary import (  # noqa: F401 (some are imported from here)
    STORAGES,
    Dictionary,
    HadamardDictionary,
    nearest_code,
    pack_codes,
    rademacher_codes,
    unpack_codes,
)
from objective import CodesObjective
from utils import (
    Number,
    UserError,
    all_gather_rows,
    all_reduce_mean,
    not_negative,
    positive,
    rank,
    world_size,
)

ACTIVATIONS = ("l2", "tanh")
PRIORS = ("kl", "ce")
DICTIONARIES = {"rademacher": Dictionary, "hadamard": HadamardDictionary}
HEAD_IMPLS = ("auto", "dense", "tiled", "triton")
# least probability of Lemma 1, as in the paper's footnote 2 and the authors' code (the paper's Algorithm 1 prints 1e-6)
EPS = 1e-8


def cplearn_loss(views, codes, tau, beta=0.25, prior="kl", num_global=2, reduce_mean=None):
    """CPLearn's loss, symmetric over views:

        p_v     = softmax(h_v W / tau)                                            (B, K)
        pbar_a  = mean of p_a over the batch of all processes                     (K,)
        loss    = beta * mean over pairs (a, v), a < G, v != a of CE(p_a, p_v)  +  mean over a < G of prior(pbar_a)
        CE(p_a, p_v) = -mean_i sum_k p_a[i,k] log p_v[i,k]                        invariance
        prior "kl"   = sum_k pbar_k log(K pbar_k)            in [0, log K]        (Appendix N; needed for ViTs)
        prior "ce"   = -(1/K) sum_k log pbar_k               >= log K             (Eq. 2)

    Gradients flow through both sides of every term. This is the definition that every faster form is tested against.

    views: list of V tensors (B, F), float32 or float64, global crops first.
    codes: (F, K) of -1 and +1, any dtype, or a Dictionary of all codes.
    reduce_mean: maps this process's mean (K,) to the mean over all processes, differentiably; None: this process alone.
    Returns (loss, {"invariance", "prior", "entropy", "assignments"}): scalars in nats, the terms unweighted; entropy is
        the mean of H(p_a) over images and a < G, without gradient: invariance - entropy is how much the views disagree.
        assignments: the likeliest code of each image by its first view, (B,) int64.
    Raises ValueError for shapes that do not fit, fewer than two views, or an unknown prior.
    Source: Eq. 2 and Appendix N of arXiv 2410.04959, made symmetric over views as the authors' code is.
    """
    check_loss_inputs(views, codes, prior, num_global)
    codes = (codes.dense() if isinstance(codes, Dictionary) else codes).to(views[0].dtype)
    log_probs = [F.log_softmax(h @ codes / tau, dim=1) for h in views]  # V x (B, K)
    probs = [log_p.exp() for log_p in log_probs[:num_global]]
    pairs = [(a, v) for a in range(len(probs)) for v in range(len(views)) if v != a]
    invariance = sum(-(probs[a] * log_probs[v]).sum(dim=1).mean() for a, v in pairs) / len(pairs)
    means = [p.mean(dim=0) for p in probs]
    if reduce_mean is not None:
        means = [reduce_mean(mean) for mean in means]
    prior_term = sum(prior_loss(mean, prior) for mean in means) / len(means)
    with torch.no_grad():
        entropy = sum(-(p * log_p).sum(dim=1).mean() for p, log_p in zip(probs, log_probs, strict=False)) / len(probs)
        terms = {"entropy": entropy, "assignments": log_probs[0].argmax(dim=1)}
    return beta * invariance + prior_term, {"invariance": invariance, "prior": prior_term, **terms}


def prior_loss(mean_probs, prior, num_codes=None):
    """Distance of the mean prediction (K,) from uniform: KL(pbar || uniform) or CE(uniform, pbar), in nats.

    num_codes: K, where mean_probs is only a part of the mean prediction; then the part's share of the distance."""
    num_codes = num_codes or mean_probs.numel()
    # float32 probabilities underflow to 0 with tanh's unbounded logits; log of the smallest normal number stands in
    log_mean = mean_probs.clamp_min(torch.finfo(mean_probs.dtype).tiny).log()
    if prior == "kl":
        return (mean_probs * (log_mean + math.log(num_codes))).sum()
    return -log_mean.sum() / num_codes


def check_loss_inputs(views, codes, prior, num_global):
    """Raises ValueError for views and codes that no form of the loss can take."""
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

    in_dim: D.  out_dim: K, fewer than 1 / EPS.  proj_dim: F, by default D.
    bare: b = x, without the linear layer and batch norm, as in the comparison of Fig. 7; then F = D.
    batch_size: n, the images in one process's batch; it sets tau once, tau is stored with the weights, and no later
    batch size changes a logit. With l2, n cancels.
    seed, dictionary, storage, shard: of the codes, see dictionary.py.
    Everything runs in the parameters' dtype (float32), outside autocast; a bare head, which has none, in
    float32 at least.
    The state dict holds the dictionary's kind and seed, and its F * K / 8 bytes of bits where they are stored here.
    Raises UserError for sizes that cannot be.
    """

    def __init__(
        self,
        in_dim,
        out_dim=131072,
        proj_dim=None,
        activation="l2",
        batch_size=64,
        seed=0,
        dictionary="rademacher",
        storage="int8",
        shard=(0, 1),
        bare=False,
    ):
        super().__init__()
        proj_dim = proj_dim or in_dim
        if bare and proj_dim != in_dim:
            raise UserError(
                f"proj_dim {proj_dim}: a bare head has the backbone's width, {in_dim}; leave --proj_dim out"
            )
        if activation not in ACTIVATIONS:
            raise UserError(f"activation {activation!r}: expected one of {ACTIVATIONS}")
        self.activation = activation
        self.tau = code_temperature(out_dim, proj_dim, batch_size)
        self.radius = math.sqrt(proj_dim / batch_size)  # length of h with l2
        self.bare = bare
        if not bare:
            self.linear = nn.Linear(in_dim, proj_dim)
            self.bn = SyncBatchNorm(proj_dim)
        try:
            self.dictionary = DICTIONARIES[dictionary](proj_dim, out_dim, seed, storage, shard)
        except ValueError as error:
            raise UserError(f"dictionary {dictionary}: {error}") from None

    @property
    def num_codes(self):
        return self.dictionary.num_codes

    @property
    def codes(self):
        """(F, K) int8 of -1 and +1: those that this process holds."""
        return self.dictionary.dense()

    def forward(self, x):
        """Backbone features (B, D) -> embeddings h (B, F). In training mode, call it once per view."""
        with torch.autocast(x.device.type, enabled=False):
            b = self._project(x)
            return b.tanh() if self.activation == "tanh" else F.normalize(b, dim=1) * self.radius

    def _project(self, x):
        if self.bare:
            return x.to(torch.promote_types(x.dtype, torch.float32))
        return self.bn(self.linear(x.to(self.linear.weight.dtype)))

    def logits(self, h):
        """Embeddings (B, F) -> logits (B, K); int8 codes are cast here and nowhere kept as floats."""
        with torch.autocast(h.device.type, enabled=False):
            return h @ self.codes.to(h.dtype) / self.tau

    @torch.no_grad()
    def assign(self, x):
        """Backbone features (B, D) -> the code of each image (B,) int64, with the running statistics of batch norm."""
        was_training = self.training
        with torch.autocast(x.device.type, enabled=False):
            assignments = nearest_code(self.eval()(x), self.dictionary)
        self.train(was_training)
        return assignments

    def extra_repr(self):
        return f"activation={self.activation}, tau={self.tau:.4g}"

    # the dictionary travels as bits or as its seed, and with it what the logits depend on

    @classmethod
    def from_args(cls, args, in_dim, course, shard=(0, 1), bare=False):
        """The head of a run: resolved flags, D, a Course, and what only CPLearn's own objective asks for."""
        sizes = in_dim, args.out_dim, args.proj_dim
        codes = args.seed, args.dictionary, args.codes_storage, shard
        return cls(*sizes, args.activation, course.batch_size, *codes, bare=bare)

    @classmethod
    def from_state_dict(cls, in_dim, state, activation, bare=False):
        """A head for a state dict, of the sizes and with the dictionary that it tells; the weights are not loaded."""
        num_codes, kind = int(state["scale"][2]), list(DICTIONARIES)[int(state["seed"][0])]
        proj_dim = in_dim if bare else len(state["linear.weight"])
        stored = state.get("codes")
        if stored is not None and tuple(stored.shape) != (proj_dim, math.ceil(num_codes / 8)):
            raise UserError(f"its dictionary is {tuple(stored.shape)}, expected the bits of {num_codes} codes")
        storage = "seed" if kind == Dictionary.kind and stored is None else "int8"
        return cls(in_dim, num_codes, proj_dim, activation, dictionary=kind, storage=storage, bare=bare)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        scale = [self.tau, self.radius, float(self.dictionary.num_codes)]
        destination[prefix + "scale"] = torch.tensor(scale, dtype=torch.float64)
        kind = list(DICTIONARIES).index(self.dictionary.kind)
        destination[prefix + "seed"] = torch.tensor([kind, self.dictionary.seed])
        packed = self.dictionary.packed()
        if packed is not None:
            destination[prefix + "codes"] = packed

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        own = [prefix + name for name in ("scale", "seed", "codes")]
        scale, seed, packed = map(state_dict.get, own)
        rest = {k: v for k, v in state_dict.items() if k not in own}
        super()._load_from_state_dict(rest, prefix, metadata, strict, missing, unexpected, errors)
        missing += [name for name, value in zip(own, (scale, seed), strict=False) if value is None]
        if scale is None or seed is None:
            return
        self.tau, self.radius, num_codes = scale.tolist()
        kind, seed = seed.tolist()
        here = self.dictionary
        expected = (here.shape[0], math.ceil(here.num_codes / 8))
        if (int(num_codes), list(DICTIONARIES)[kind]) != (here.num_codes, here.kind) or (
            packed is not None and tuple(packed.shape) != expected
        ):
            errors.append(f"{prefix}codes: {list(DICTIONARIES)[kind]}, K {int(num_codes)} in the file; "
                          f"{here.kind}, F {here.shape[0]}, K {here.num_codes} here")  # fmt: skip
            return
        here.seed = seed
        here.fill(packed)


class CPLearn(CodesObjective):
    """Head and loss as the training loop's objective: features of V views, (M B, D) each -> (loss, terms).

    prior_scope "global": the prior's mean runs over the batch of all processes, so that N processes descend the loss of
    one process on the joined batch; "local": over each group of `batch_size` images, a process's or a micro-batch's,
    as over each process's in the authors' code.
    loss_function: `cplearn_loss`, or another form of it as `fused_loss.choose_loss` gives.
    batch_size: images per micro-batch; None: all that a process has.
    """

    flags = {
        "out_dim": 131072,
        "proj_dim": None,
        "bare_head": False,
        "activation": "l2",
        "beta": 0.25,
        "prior": "kl",
        "prior_scope": "global",
        "head_impl": "auto",
        "dictionary": "rademacher",
        "codes_storage": "int8",
        "shard_codes": False,
    }
    advice = {
        "saddle": "the loss rests where every p is uniform: raise --beta or --lr, or use --activation l2",
        "representation": "all images get one feature: lower --lr or --beta",
        "dimensional": "features span few directions: raise --out_dim, use --activation l2, or train longer",
        "cluster": "few codes are used: lower --beta, or use more images per step",
        "intracluster": "images that share a code are alike: raise --out_dim, or lower --beta",
    }

    def __init__(
        self,
        head,
        beta=0.25,
        prior="kl",
        num_global=2,
        prior_scope="global",
        loss_function=cplearn_loss,
        batch_size=None,
    ):
        super().__init__(head.dictionary.num_codes)
        self.head, self.loss_function, self.batch_size = head, loss_function, batch_size
        self.beta, self.prior, self.num_global, self.prior_scope = beta, prior, num_global, prior_scope

    @classmethod
    def head_from_state_dict(cls, in_dim, state, settings):
        activation, bare = settings.get("activation"), bool(settings.get("bare_head"))
        needed = {"scale", "seed"} if bare else {"scale", "seed", "linear.weight"}
        if activation is None or not needed <= state.keys():
            return None
        return CPLearnHead.from_state_dict(in_dim, state, activation, bare)

    @staticmethod
    def add_arguments(parser):
        add_method_arguments(parser)

    def forward(self, rows, kept=(), generator=None):
        views = [self.head(x) for x in rows]
        means = []  # pbar of each global view, of each group where the prior is local

        def reduce_mean(local_mean):
            means.append(self._mean_over_processes(local_mean))
            return means[-1]

        groups = zip(*(h.split(self._images_per_prior(len(h))) for h in views), strict=True)
        with torch.autocast(rows[0].device.type, enabled=False):
            parts = [self._loss(list(group), reduce_mean) for group in groups]
        with torch.no_grad():
            found = [terms.pop("assignments", None) for _, terms in parts]  # where the loss has found them
            assignments = self._nearest_of_all(views[0]) if found[0] is None else all_gather_rows(torch.cat(found))
            first = self.head.dictionary.first
            self.remember(assignments, torch.stack(means).mean(dim=0), first)
        terms = {name: mean_of([terms[name] for _, terms in parts]) for name in parts[0][1]}
        return mean_of([loss for loss, _ in parts]), terms

    def _images_per_prior(self, num_images):
        return num_images if self.prior_scope == "global" or self.batch_size is None else self.batch_size

    def _loss(self, views, reduce_mean):
        return self.loss_function(
            views, self.head.dictionary, self.head.tau, self.beta, self.prior, self.num_global, reduce_mean
        )

    def _mean_over_processes(self, local_mean):
        if self.prior_scope == "local" or self.head.dictionary.sharded:  # sharded: of the joined batch already
            return local_mean
        return all_reduce_mean(local_mean)

    def _nearest_of_all(self, h):
        """argmax_k of the logits of all processes' images, (N,): one more product of B x F x K."""
        if self.head.dictionary.sharded:
            return nearest_code(all_gather_rows(h), self.head.dictionary)
        return all_gather_rows(nearest_code(h, self.head.dictionary))

    def share_statistics(self):
        """With sharded codes each process has the usage of its own codes, until now."""
        if self.head.dictionary.sharded:
            self.usage.copy_(all_gather_rows(self.usage.view(world_size(), -1)[rank()]))

    @torch.no_grad()
    def statistics(self, features, averages):
        """What a line of the log says of codes (`CodesObjective`) and of the loss, in nats unless said otherwise.

        batch_perplexity    K exp(-prior): of one batch's mean prediction, in codes, at most about N if p is hard ("kl")
        least_hard_prior    the least prior of a batch of N images whose p are hard; soft p, of some entropy, have less
        information     I = log K - prior - H(p): per image, what the views agree on, beyond what is true of all images
        gap, gap_share  of the loss to Lemma 1's bound; as a share of the trivial states' gap: 0 at the bound, 1 at the
                        better one of uniform p and a single code
        """
        log_k = math.log(self.num_codes)
        gap = averages["loss"] - loss_lower_bound(self.num_codes, self.beta, self.prior)
        line = super().statistics(features, averages) | {
            "least_hard_prior": least_hard_prior(self.num_codes, len(features), self.prior),
            "entropy_share": averages["entropy"] / log_k,
            "gap": gap,
            "gap_share": gap / trivial_gap(self.num_codes, self.beta, self.prior) if self.beta else None,
        }
        if self.prior == "kl":
            line["batch_perplexity"] = self.num_codes * math.exp(-averages["prior"])
            line["images_per_mean"] = self._images_per_prior(len(features))
            line["information"] = log_k - averages["prior"] - averages["entropy"]
        return line

    def describe(self):
        dictionary, dim = self.head.dictionary, self.head.dictionary.shape[0]
        packed = dim * math.ceil(self.num_codes / 8) if dictionary.travels_as_bits() else 0
        shard = f", {dictionary.shape[1]} codes in each of {world_size()} processes" if dictionary.sharded else ""
        lines = [
            f"head: F {dim}, K {self.num_codes}, {self.head.activation}, tau {self.head.tau:.4g}, beta {self.beta:g}"
            + (", bare: the activation of the features themselves" if self.head.bare else ""),
            f"dictionary: {dictionary.kind}, {dictionary.num_bytes() / 2**20:.2f} MiB in memory "
            f"({dictionary.storage}){shard}, {packed / 2**20:.2f} MiB in a checkpoint",
            f"loss: {describe_loss(self.loss_function)}",
            f"Lemma 1: the loss cannot fall below {loss_lower_bound(self.num_codes, self.beta, self.prior):.4f} nats",
        ]
        if self.beta > 1:
            lines.append(
                f"note: --beta {self.beta:g}: above 1, one code for all images has a lower loss than uniform p, so "
                "collapse lies downhill from the start; 1 or less is safer"
            )
        return lines

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        if prefix + "counts" in state_dict:  # of an epoch, as older checkpoints have it: the window begins anew
            names = ("usage", "recent", "seen")
            state_dict = {k: v for k, v in state_dict.items() if k != prefix + "counts"}
            state_dict |= {prefix + name: torch.zeros_like(getattr(self, name)) for name in names}
        super()._load_from_state_dict(state_dict, prefix, *rest)


def mean_of(scalars):
    return sum(scalars[1:], scalars[0]) / len(scalars)


def describe_loss(loss_function):
    if loss_function is cplearn_loss:
        return "dense, float32"
    settings = loss_function.keywords
    return f"{settings['impl']}, products in {str(settings['compute_dtype']).removeprefix('torch.')}, sums in float32"


# ---- constants of the method -----------------------------------------------------------------------------------------


def code_temperature(num_codes, dim, batch_size, eps=EPS):
    """tau = F / (sqrt(n) log((1 - eps (K - 1)) / eps)): an embedding that equals a code gets p = 1 - eps (K - 1).

    num_codes: K, with eps (K - 1) < 1.  dim: F.  batch_size: n, images in one process's batch.
    Raises UserError where K is too large for eps.
    """
    if num_codes < 2 or eps * (num_codes - 1) >= 1:
        raise UserError(
            f"out_dim {num_codes}: expected 2 <= out_dim < 1 / eps = {1 / eps:.3g} (Lemma 1 needs eps (K - 1) < 1)"
        )
    return dim / (math.sqrt(batch_size) * math.log((1 - eps * (num_codes - 1)) / eps))


def loss_lower_bound(num_codes, beta, prior="kl", eps=EPS):
    """Lemma 1: the least value of `cplearn_loss` on a whole data set, in nats, when every p is at least eps.

    -beta [ (1 - e) log(1 - e) + e log eps ] with e = eps (K - 1), plus 0 for "kl" or log K for "ce". A loss that
    reaches it certifies that neither representation nor cluster collapse has happened.
    """
    rest = eps * (num_codes - 1)
    entropy = -((1 - rest) * math.log1p(-rest) + rest * math.log(eps))
    return beta * entropy + (math.log(num_codes) if prior == "ce" else 0.0)


def least_hard_prior(num_codes, num_images, prior="kl"):
    """Least prior of a batch of N images if each p is hard, one code: log(K / N) for "kl" while N < K; log K for "ce".

    Soft p spread over several codes each, so that the mean of a batch can be uniform although N < K: less is possible.
    """
    return math.log(num_codes) if prior == "ce" else max(0.0, math.log(num_codes / num_images))


def trivial_gap(num_codes, beta, prior="kl"):
    """Gap to Lemma 1's bound, in nats, of the better one of two states that know nothing of the images: every p uniform
    has beta log K; one code for all images has log K with "kl", and no bound with "ce"."""
    return (beta if prior == "ce" else min(beta, 1)) * math.log(num_codes)


# ---- flags -----------------------------------------------------------------------------------------------------------


def add_method_arguments(parser):
    add = parser.add_argument_group("--objective cplearn").add_argument  # defaults: CPLearn.flags
    add(
        "--out_dim",
        type=Number(int, least=2, below=1 / EPS),
        help="number of codes K (prototypes, classes); more codes mean finer clusters",
    )
    add("--proj_dim", type=positive(int), help="width of the embeddings; None: F is the backbone's")
    add(
        "--bare_head",
        action=argparse.BooleanOptionalAction,
        help="no linear layer and no batch norm: embeddings are the activation of the backbone's features, as in the "
        "comparison of the paper's Fig. 7",
    )
    add(
        "--activation",
        choices=ACTIVATIONS,
        help="l2 (Eq. 1) does not depend on the batch size and learns faster; tanh: the paper's experiments",
    )
    add("--beta", type=not_negative(float), help="weight of agreement; if code usage falls, lower it")
    add("--prior", choices=PRIORS, help="kl (Appendix N) is stable for ViTs; ce is Eq. 2")
    add(
        "--prior_scope",
        choices=("global", "local"),
        help="mean prediction over the batch of all processes, or of each group of --batch_size_per_gpu images, as in "
        "the authors' code",
    )
    add = parser.add_argument_group("--objective cplearn, for K of millions").add_argument
    add(
        "--head_impl",
        choices=HEAD_IMPLS,
        help="form of the loss: dense (with B x K arrays), or without such arrays tiled (by matrix products) or triton "
        "(CUDA kernels); auto: the one that wins, said at the start",
    )
    add(
        "--dictionary",
        choices=list(DICTIONARIES),
        help="random signs as in the paper; hadamard: orthogonal blocks of F codes, a fast transform on CPUs",
    )
    add(
        "--codes_storage",
        choices=STORAGES,
        help="of random signs: F K bytes of memory, an eighth as bits, or the seed alone, hashed where it is used",
    )
    add(
        "--shard_codes",
        action=argparse.BooleanOptionalAction,
        help="each process holds its share of the codes and sees all images: for K of millions",
    )
