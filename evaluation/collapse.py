"""Has a representation collapsed? The analyses of arXiv 2410.04959 (Fig. 3, 4, 6, 12, 13), tensors in, numbers out.

    verdicts = judge(feature_statistics(x), eigenvalues, tightness, usage)     # each of the four collapses, in words

The first half needs only features, the second CPLearn's embeddings and dictionary: what Theorem 1, its corollaries and
Lemma 1 promise at the optimum, and how far off a model is.

Shapes: N images, D backbone width, F head width, K codes, C groups or mixture components, b images at a time.
"""

import math
import warnings

import torch
from torch.nn import functional as F

from cplearn_head import least_hard_prior, loss_lower_bound, prior_loss, trivial_gap
from dictionary import nearest_code
from evaluation.clustering import kmeans_of_scikit_learn
from monitor import diagnose

POWER_LAW_RANKS = (12, 100)  # first and last rank of the fit, as in alpha-ReQ's code
ENTROPY_SAMPLES = 10_000  # of the Monte Carlo estimate, as in section 4 of the paper
LOGITS_AT_ONCE = 2**24  # b x K: 64 MB in float32
LEAST_VARIANCE = 1e-6  # of a mixture's component, over that of all features
TIGHT_PART = 0.1  # collapse of "some clusters" (section 2): the clusters of a tenth of the images are some
ROUNDING = 1e-12  # eigenvalues below this part of the largest


# ---- features: spectrum ----------------------------------------------------------------------------------------------


def covariance(x, rows=8192):
    """Covariance of x (N, D) about its mean, divided by N - 1: (D, D) float64."""
    mean = x.mean(dim=0, dtype=torch.float64)
    total = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    for part in x.split(rows):
        centred = part.double() - mean
        total.addmm_(centred.T, centred)
    return total / max(1, len(x) - 1)


def covariance_eigenvalues(x):
    """Of x (N, D): the singular values of its covariance, largest first, (D,) float64 (Fig. 6a and 13a)."""
    return torch.linalg.eigvalsh(covariance(x)).flip(0).clamp_min(0)


def effective_rank(eigenvalues):
    """RankMe of the centred features, from the eigenvalues of their covariance: in [1, D]; NaN where all are zero."""
    values = eigenvalues.sqrt()
    return float(torch.special.entr(values / values.sum()).sum().exp())


def power_law_exponent(eigenvalues):
    """alpha of eigenvalue_j ~ j^-alpha: a fit of logarithms, weighted by 1 / j, over `POWER_LAW_RANKS`.

    Of a narrower model the last ten ranks stay out: the tail falls faster. None where fewer than ten ranks are left.
    1 is the boundary of smooth representations; features that are equally strong in all directions have 0.
    Agrawal et al., "alpha-ReQ", NeurIPS 2022; weights and range are its code's.
    """
    first, last = POWER_LAW_RANKS
    there = int((eigenvalues > ROUNDING * eigenvalues[0]).sum())
    last = min(last, len(eigenvalues) - 10, there)
    if last - first < 9:
        return None
    ranks = torch.arange(first, last + 1, dtype=torch.float64)
    x, y = ranks.log(), eigenvalues[ranks.long() - 1].log()
    x, y = (v - (v / ranks).sum() / (1 / ranks).sum() for v in (x, y))
    return -float((x * y / ranks).sum() / (x * x / ranks).sum())


def cosines(x, seed=0, rows=2000, bins=100):
    """Cosines between pairs of features x (N, D), of at most `rows` of them: mean, standard deviation, and their
    density in `bins` equal intervals of [-1, 1]."""
    x = F.normalize(some_rows(x, rows, seed).double(), dim=1)
    i, j = torch.triu_indices(len(x), len(x), offset=1)
    values = (x @ x.T)[i, j].clamp(-1, 1)
    counts = torch.histc(values, bins, -1, 1)
    return {
        "mean": float(values.mean()),
        "std": float(values.std()),
        "density": (counts / counts.sum() * bins / 2).tolist(),
    }


def some_rows(x, most, seed):
    """At most `most` rows of x, drawn without replacement, in their order."""
    return x[some_indices(len(x), most, seed)]


def some_indices(count, most, seed):
    if count <= most:
        return torch.arange(count)
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:most].sort().values


# ---- features: clusters ----------------------------------------------------------------------------------------------


def mixture_entropy(x, num_components, seed=0):
    """Differential entropy of a Gaussian mixture with diagonal covariances fitted to x (N, D), in nats (Fig. 6b, 13b).

    Fitted by scikit-learn from k-means, in units of x's overall standard deviation, each variance at least 1e-6 of its
    square; then Monte Carlo over `ENTROPY_SAMPLES`, in float64. The entropy moves by D log s when x is multiplied
    by s, so models of unlike scale are compared by `entropy_per_dimension`. Both fall with the number of components
    where N is not much larger, so compare at equal N.

    Returns ({"components", "entropy" (nats), "entropy_per_dimension" (nats, of x at unit overall variance: at most
    1.42, an isotropic Gaussian's)}, the k-means cluster of each row (N,) int64).
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    dim = x.shape[1]
    x = x.double()
    x = x - x.mean(dim=0)
    scale = float(x.square().mean().sqrt())
    x = x / scale
    clusters = torch.from_numpy(kmeans_of_scikit_learn(x, num_components, restarts=1, seed=seed, iterations=20))
    mixture = GaussianMixture(
        num_components, covariance_type="diag", tol=1e-2, reg_covar=LEAST_VARIANCE, random_state=seed,
        **moments(x, clusters, num_components),
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # 100 steps are enough for a number of this precision
        mixture.fit(x.numpy())
    samples, _ = mixture.sample(ENTROPY_SAMPLES)
    entropy = -float(mixture.score_samples(samples).mean())
    numbers = {
        "components": num_components,
        "entropy": entropy + dim * math.log(scale),
        "entropy_per_dimension": entropy / dim,
    }
    return numbers, clusters


def moments(x, clusters, count):
    """The mixture of x's clusters (N,) among `count`, from which scikit-learn's starts; an empty one stands at 0."""
    sizes, means, squares = group_sums(x, clusters, count)
    filled = sizes.clamp_min(1)[:, None]
    means = means / filled
    variances = (squares / filled - means.square()).clamp_min(0) + LEAST_VARIANCE
    weights = sizes + torch.finfo(sizes.dtype).eps  # its logarithm is taken
    return {
        "weights_init": (weights / weights.sum()).numpy(),
        "means_init": means.numpy(),
        "precisions_init": (1 / variances).numpy(),
    }


def group_sums(x, groups, count):
    """Rows per group (C,), sum of rows and sum of squares (C, D) of x (N, D), in float64."""
    x = x.double()
    sizes = torch.bincount(groups, minlength=count).double()
    sums, squares = (torch.zeros(count, x.shape[1], dtype=torch.float64).index_add_(0, groups, v) for v in (x, x * x))
    return sizes, sums, squares


def tightness(x, groups, eigenvalues=None):
    """How tight groups (N,) of x (N, D) are, relative to how tight groups of a Gaussian can be.

        v_c = variance within group c / D(H)

    D(H) is the least mean squared distance to anything that tells H nats about a Gaussian with x's covariance
    (`gaussian_distortion`), H the entropy of the groups. So whatever the covariance, v is about 1 or more for Gaussian
    features, also when they span few directions, and falls to 0 when the points of a group coincide.

    Returns the value that a tenth of the images have or stay below, each image with its group's v; NaN where no two
    images share a group. The limit is `monitor.diagnose`'s.
    """
    eigenvalues = covariance_eigenvalues(x) if eigenvalues is None else eigenvalues
    _, groups = groups.unique(return_inverse=True)
    x = x.double() - x.mean(dim=0, dtype=torch.float64)  # small numbers: their squares are subtracted
    sizes, sums, _ = group_sums(x, groups, int(groups.max()) + 1)
    usage = sizes / sizes.sum()
    least = gaussian_distortion(eigenvalues, float(torch.special.entr(usage).sum()))
    residual = x - (sums / sizes[:, None])[groups]
    within = torch.zeros_like(sizes).index_add_(0, groups, residual.square().sum(dim=1)) / (sizes - 1)
    of_image = within[groups][sizes[groups] > 1] / least
    return float(of_image.quantile(TIGHT_PART)) if len(of_image) > 0 and least > 0 else math.nan


def gaussian_distortion(eigenvalues, rate):
    """Least mean squared error of a Gaussian with these covariance eigenvalues (D,), largest first, after `rate` nats.

    Reverse water-filling: sum_i min(theta, lambda_i) with sum_i max(0, log(lambda_i / theta) / 2) = rate.
    Cover and Thomas, "Elements of Information Theory", theorem 10.3.3.
    """
    values = eigenvalues[eigenvalues > ROUNDING * eigenvalues[0]]
    if len(values) == 0:
        return 0.0
    active = torch.arange(1, len(values) + 1, dtype=values.dtype)
    level = ((values.log().cumsum(0) - 2 * rate) / active).exp()  # theta if the first i are above the water
    below = torch.cat([values[1:], values.new_zeros(1)])
    i = int((below <= level).nonzero()[0])
    return float(active[i] * level[i] + values[i + 1 :].sum())


def code_usage(codes, num_codes):
    """Of codes (N,) among K: number used, perplexity exp H of their frequencies, the largest one's share of the images,
    and the images of each used code, most first."""
    counts = torch.bincount(codes, minlength=num_codes).sort(descending=True).values
    share = counts.double() / len(codes)
    return {
        "num_codes": num_codes,
        "codes_used": int((counts > 0).sum()),
        "perplexity": float(torch.special.entr(share).sum().exp()),
        "largest_share": float(share[0]),
        "counts": counts[counts > 0].tolist(),
    }


def tsne(x, most, seed=0):
    """Positions of at most `most` rows of x (N, D) by t-SNE, and which rows: (n, 2) and (n,). Perplexity 30, begun at
    the first two principal components; wider features go to 50 components first, as van der Maaten and Hinton did."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    rows = some_indices(len(x), most, seed)
    x = x[rows].double().numpy()
    if x.shape[1] > 50 < len(x):
        x = PCA(50, random_state=seed).fit_transform(x)
    positions = TSNE(perplexity=min(30, len(x) / 4), init="pca", random_state=seed).fit_transform(x)
    return positions, rows


# ---- the theory: embeddings and dictionary ---------------------------------------------------------------------------


@torch.no_grad()
def embed(head, features, device, rows=8192):
    """Embeddings h (N, F) of features (N, D), with the head's running statistics, on CPU."""
    head = head.eval().to(device)
    return torch.cat([head(part.to(device)).cpu() for part in features.split(rows)])


def alignment(h, codes, dictionary, seed=0):
    """Cosine between embeddings h (N, F) and the code of each (N,): 1 in Corollary 1. Its mean, its 5 % quantile, and
    `chance`, the mean for random directions, which is far from 0: they too have a nearest of K codes."""
    cosine = code_cosines(h, codes, dictionary)
    random = torch.randn(1000, h.shape[1], generator=torch.Generator().manual_seed(seed)).to(dictionary.device)
    chance = code_cosines(random, nearest_code(random, dictionary), dictionary)
    return {"mean": float(cosine.mean()), "quantile_5": float(cosine.quantile(0.05)), "chance": float(chance.mean())}


def code_cosines(h, codes, dictionary, rows=8192):
    parts = zip(h.split(rows), codes.split(rows), strict=True)
    return torch.cat([
        F.cosine_similarity(part.double().cpu(), dictionary.columns(k.to(dictionary.device)).T.double().cpu())
        for part, k in parts
    ])  # fmt: skip


def second_moment(h):
    """H^T H of h (N, F), scaled to a mean diagonal of 1: the identity in Corollary 2. (F, F) float64."""
    moment = torch.zeros(h.shape[1], h.shape[1], dtype=torch.float64)
    for part in h.split(8192):
        moment.addmm_(part.double().T, part.double())
    return moment / moment.diagonal().mean()


def off_diagonal_mass(moment):
    """Part of the squares of a second moment (F, F), scaled to a diagonal of ones, that is off the diagonal.

    0 for Corollary 2's identity, about F / N for N independent embeddings, 1 - 1 / F where all features are one.
    """
    length = moment.diagonal().clamp_min(torch.finfo(moment.dtype).tiny).sqrt()
    squares = (moment / length / length[:, None]).square()
    return float(1 - squares.diagonal().sum() / squares.sum())


def block_cosines(h, codes, seed=0, most=10_000, rows=1000):
    """Mean |cosine| of pairs of embeddings h (N, F) that share a code (N,), and of pairs that do not: 1 and 0 where
    H H^T is block-diagonal (Corollary 3). Of at most `most` rows; None where there is no such pair."""
    chosen = some_indices(len(h), most, seed)
    h, codes = F.normalize(h[chosen], dim=1), codes[chosen]
    total, count = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for part, own in zip(h.split(rows), codes.split(rows), strict=True):
        cosine, same = (part @ h.T).abs(), own[:, None] == codes
        of_same = torch.where(same, cosine, 0).sum(dtype=torch.float64)
        total += torch.stack([of_same, cosine.sum(dtype=torch.float64) - of_same])
        count += torch.stack([same.sum(), (~same).sum()])
    total[0] -= len(h)  # each with itself
    count[0] -= len(h)
    within, between = (float(t / c) if c > 0 else None for t, c in zip(total, count, strict=True))
    return {"within": within, "between": between, "chance": math.sqrt(2 / (math.pi * h.shape[1]))}


@torch.no_grad()
def certificate(h, codes, tau, beta, prior, eps):
    """Lemma 1 on a whole data set: how far the loss is above the least value it can have, all in nats.

    Both views of an image are the image itself, without augmentation, so that invariance is the mean entropy of p; the
    prior is that of the mean p over all N images.
    entropy: H(p), the mean over images.
    information: H(mean p) - H(p), the nats per image that p tells; with prior "kl" log K - prior - H(p).
    gap: loss - Lemma 1's bound. At 0 neither representation nor cluster collapse has happened.
    gap_share: gap / `trivial_gap`: 0 at the bound, 1 in a trivial state; None for beta 0.
    least_hard_prior: the least prior that N images with one code each can have; where p spreads over codes it can be
    less.
    mean_perplexity: exp H(mean p).

    h: (N, F).  codes: (F, K) of -1 and +1, on the device that computes; cast to h's dtype once (4 F K bytes).
    Never an N x K array: b x K at a time, sums in float64.
    """
    num_codes = codes.shape[1]
    codes = codes.to(h.dtype)
    total, entropy = torch.zeros(num_codes, dtype=torch.float64, device=codes.device), 0.0
    for part in h.split(max(1, LOGITS_AT_ONCE // num_codes)):
        log_p = F.log_softmax(part.to(codes.device) @ codes / tau, dim=1)
        p = log_p.exp()
        total += p.sum(dim=0, dtype=torch.float64)
        entropy -= float(log_p.mul_(p).sum(dtype=torch.float64))
    mean = total / len(h)
    entropy, prior_term = entropy / len(h), float(prior_loss(mean, prior))
    entropy_of_mean = float(torch.special.entr(mean).sum())
    loss = beta * entropy + prior_term
    gap = loss - loss_lower_bound(num_codes, beta, prior, eps)
    return {
        "loss": loss,
        "entropy": entropy,
        "prior": prior_term,
        "information": entropy_of_mean - entropy,
        "gap": gap,
        "gap_share": gap / trivial_gap(num_codes, beta, prior) if beta else None,
        "least_hard_prior": least_hard_prior(num_codes, len(h), prior),
        "mean_perplexity": math.exp(entropy_of_mean),
    }


# ---- in words --------------------------------------------------------------------------------------------------------


def judge(statistics, eigenvalues, tightness, usage=None, num_images=None, entropy=None):
    """A sentence for each of the four collapses (section 2 and Fig. 1), by the limits of `monitor.diagnose`.

    representation  features differ by less than 1 % of their length
    dimensional     effective rank of the centred features below 2 % of what it could be (at least 2)
    cluster         codes in use, or their perplexity, below 2 % of what they could be; not known without codes
    intracluster    `tightness` below 1e-3: a tenth of the images are in groups that all but coincide

    Representation collapse is all four at once, and is named alone. Few groups that coincide also span few directions:
    C points span C - 1; both collapses have then happened and both are named. No other implies another.

    statistics: `monitor.feature_statistics`.  eigenvalues: (D,) of the features' covariance.
    tightness: `tightness`, the least of several groupings.  usage: `code_usage`, or None.  num_images: N.
    entropy: `certificate`'s H(p), in nats; near log K no code is preferred to another, a saddle and not a collapse.
    Returns ({kind: sentence}, [kinds that have happened]).
    """
    rank, most = effective_rank(eigenvalues), min(len(eigenvalues), num_images or len(eigenvalues))
    line = {"spread": statistics["spread"], "rankme": rank, "rankme_max": most, "within_code": tightness}
    if usage is not None:
        line |= {name: usage[name] for name in ("num_codes", "codes_used", "perplexity")}
        line |= {} if num_images is None else {"images_counted": num_images}
        line |= {} if entropy is None else {"entropy_share": entropy / math.log(usage["num_codes"])}
    found = [kind for kind, _ in diagnose(line)]
    if "representation" in found:
        found = ["representation"]
    evidence = {
        "representation": f"features differ by {100 * statistics['spread']:.3g} % of their length",
        "dimensional": f"effective rank {rank:.1f} of {most}",
        "cluster": "no codes" if usage is None else describe_usage(usage),
        "intracluster": describe_tightness(tightness),
    }
    if "saddle" in found:
        evidence["saddle"] = f"p is uniform: its entropy is {100 * line['entropy_share']:.1f} % of log K"
    unknown = {"cluster"} if usage is None else set()
    unknown |= {"intracluster"} if math.isnan(tightness) else set()
    return {kind: f"{answer(kind, found, unknown)}; {text}" for kind, text in evidence.items()}, found


def answer(kind, found, unknown):
    if kind in found:
        return "YES"
    if "representation" in found:
        return "part of representation collapse"
    return "not known" if kind in unknown else "no"


def describe_usage(usage):
    return (
        f"{usage['codes_used']} of {usage['num_codes']} codes in use, perplexity {usage['perplexity']:.1f}, "
        f"the largest holds {100 * usage['largest_share']:.1f} % of the images"
    )


def describe_tightness(tightness):
    if math.isnan(tightness):
        return "no two images share a group"
    return (
        f"a tenth of the images are in groups with at most {tightness:.2g} of the variance that a Gaussian's would have"
    )
