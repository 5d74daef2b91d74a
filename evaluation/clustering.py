"""Clusters of images and how well they agree with classes: k-means, merged codes, and scores beside their chance level.

Shapes: N images, D features, C classes, M codes in use, k clusters.
"""

import warnings

import numpy as np

import evaluation
from utils import UserError

MAX_LINKED = 10_000  # vectors that Ward's linkage takes: 8 bytes for each pair, twice, 0.8 GB


def mean_features(features, codes):
    """Features (N, D) and codes (N,) from 0 to M - 1, all in use -> mean feature of each code (M, D)."""
    from scipy.sparse import csr_array

    ones = np.ones(len(codes), features.dtype)  # of another type, scipy would copy the features
    members = csr_array((ones, (codes, np.arange(len(codes)))))  # (M, N)
    return members @ features / np.bincount(codes)[:, None]


def merge(vectors, sizes, ks, seed=0):
    """Merges M vectors to k groups by Ward's linkage, for rising k: vectors (M, D) -> groups (M, len(ks)).

    Each vector counts once, however many images it stands for. Above `MAX_LINKED` vectors, k-means weighted by
    sizes (M,) first makes that many groups of them: linkage takes 8 M^2 bytes. 10,000 vectors of 384 take 26 s, and
    41,506 take 5 min, on one core.
    """
    from scipy.cluster.hierarchy import cut_tree, linkage

    if len(vectors) > MAX_LINKED:
        group = kmeans(vectors, MAX_LINKED, iterations=10, seed=seed, weights=sizes)
        group = np.unique(group, return_inverse=True)[1]
        return merge(mean_features(vectors, group), None, ks)[group]
    if len(vectors) == 1:
        return np.zeros((1, len(ks)), np.int64)
    return cut_tree(linkage(vectors, "ward"), ks[::-1])[:, ::-1]  # scipy puts the groups of k = M into the first column


def kmeans(features, k, restarts=1, spherical=False, seed=0, weights=None, iterations=50):
    """k-means of features (N, D) -> cluster of each (N,), in 0 ... k - 1. By faiss, on all its GPUs if it sees any;
    where faiss is not installed by scikit-learn, which a line says, and spherical raises UserError.

    spherical: by cosine, features and centres of length 1.  weights: (N,) of the rows.
    The centres of the restart with the least summed squared distance (largest cosine, if spherical) are kept."""
    faiss = evaluation.find_faiss("k-means is scikit-learn's")
    if faiss is None:
        if spherical:
            raise UserError("--spherical needs faiss, which is not installed or does not load; see requirements.txt")
        return kmeans_of_scikit_learn(features, k, restarts, seed, weights, iterations)
    x = np.ascontiguousarray(features, np.float32)
    if spherical:
        x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    model = faiss.Kmeans(
        x.shape[1], k, niter=iterations, nredo=restarts, spherical=spherical, seed=seed,
        gpu=faiss.get_num_gpus() > 0, min_points_per_centroid=1, max_points_per_centroid=len(x),  # all points
    )  # fmt: skip
    model.train(x, weights=None if weights is None else weights.astype(np.float32))
    return model.index.search(x, 1)[1].ravel()


def kmeans_of_scikit_learn(features, k, restarts, seed, weights=None, iterations=50):
    """k-means of features (N, D) on CPUs -> cluster of each (N,) int64. It begins with k-means++,
    where faiss begins with k rows at random: slower, and better where clusters are few."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct points than clusters
        found = KMeans(k, n_init=restarts, max_iter=iterations, random_state=seed)
        return found.fit(np.asarray(features, np.float32), sample_weight=weights).labels_.astype(np.int64)


def clustering_scores(labels, codes, num_permutations=10, seed=0):
    """How well codes (N,) agree with labels (N,), both integers. Natural logs, all in float64:

        nmi = I(labels; codes) / ((H(labels) + H(codes)) / 2)                        [0, 1], not corrected for chance
        nmi_chance, nmi_chance_std: mean and standard deviation of the NMI of the same codes under `num_permutations`
            (2 or more) random permutations of the labels; they depend on the seed and the sizes of classes and codes
        ami = (I - E[I]) / ((H(labels) + H(codes)) / 2 - E[I])                       at most 1, 0 by chance
        ari = adjusted Rand index                                                    [-0.5, 1], 0 by chance
        purity = images that are of the most frequent class of their code, over N    [0, 1], rises with more codes
        hungarian = accuracy of the best one-to-one map of codes to classes          [0, 1]; None if more codes are in
                                                                                     use than there are classes
        num_used, perplexity = exp H(codes), largest_share = of N                    of the codes

    Memory: O(N). 1.28 million images, 1,000 classes and 131,072 codes take about ten seconds.
    Returns a dict with these names. Raises ValueError for lengths that differ or num_permutations below 2.
    Source: Vinh et al., "Information theoretic measures for clusterings comparison", JMLR 2010, as in scikit-learn.
    """
    from sklearn.metrics.cluster import adjusted_rand_score, contingency_matrix

    if num_permutations < 2:
        raise ValueError(f"num_permutations is {num_permutations}, expected 2 or more for a spread")
    labels, codes = np.asarray(labels), np.asarray(codes)
    table = contingency_matrix(labels, codes, sparse=True)  # (C, M)
    class_sizes, code_sizes = (np.sort(np.asarray(table.sum(axis=axis)).ravel()) for axis in (1, 0))
    mean_entropy = (entropy(class_sizes) + entropy(code_sizes)) / 2
    information = mutual_information(table)
    expected = expected_mutual_information(class_sizes, code_sizes)
    by_chance = permuted_information(class_sizes, code_sizes, num_permutations, seed)
    return {
        "nmi": ratio(information, mean_entropy),
        "nmi_chance": ratio(by_chance.mean(), mean_entropy),
        "nmi_chance_std": ratio(by_chance.std(ddof=1), mean_entropy),
        "ami": ratio(information - expected, mean_entropy - expected),
        "ari": float(adjusted_rand_score(labels, codes)),
        "purity": float(table.max(axis=0).sum() / len(codes)),
        "hungarian": matched_accuracy(table),
        **usage(code_sizes),
    }


def usage(code_sizes):
    return {
        "num_used": len(code_sizes),
        "perplexity": float(np.exp(entropy(code_sizes))),
        "largest_share": float(code_sizes.max() / code_sizes.sum()),
    }


def ratio(numerator, denominator):
    """0 where both vanish: a single class or a single code tells nothing."""
    return float(numerator / denominator) if denominator > 1e-12 else 0.0


def matched_accuracy(table):
    from scipy.optimize import linear_sum_assignment

    if table.shape[1] > table.shape[0]:
        return None
    matched = linear_sum_assignment(table.toarray(), maximize=True)
    return float(np.asarray(table[matched]).sum() / table.sum())


def mutual_information(table):
    from sklearn.metrics import mutual_info_score

    return mutual_info_score(None, None, contingency=table)


def entropy(sizes):
    """Of the distribution sizes / sum(sizes), in nats."""
    share = sizes / sizes.sum()
    return float(-(share * np.log(share)).sum())


def permuted_information(class_sizes, code_sizes, num_permutations, seed):
    """Mutual information of codes of these sizes with randomly permuted labels, (num_permutations,)."""
    from sklearn.metrics.cluster import contingency_matrix

    generator = np.random.default_rng(seed)
    labels, codes = (np.repeat(np.arange(len(sizes)), sizes) for sizes in (class_sizes, code_sizes))
    return np.array([
        mutual_information(contingency_matrix(generator.permutation(labels), codes, sparse=True))
        for _ in range(num_permutations)
    ])  # fmt: skip


def expected_mutual_information(class_sizes, code_sizes):
    """Mean mutual information over all permutations of the labels, in nats:

        E[I] = sum over classes a, codes b, n >= 1 of  n / N  log(N n / (a b))  P(n),   n ~ hypergeometric(N, a, b)

    for classes of sizes a (C,) and codes of sizes b (M,), both summing to N. Equal sizes give equal terms, which are
    computed once: there are at most sqrt(2 N) different sizes. scikit-learn computes each pair, an hour where this
    takes a second. Terms with n > e^2 a b / N + 60 are left out: the chance of such n is below e^-60 (Hoeffding 1963).
    Source: Vinh et al., JMLR 2010, Eq. 24a.
    """
    from scipy.special import gammaln

    total = int(class_sizes.sum())
    log_factorial = gammaln(np.arange(total + 1) + 1.0)
    b, b_times = np.unique(code_sizes, return_counts=True)
    expected = 0.0
    for a, a_times in zip(*np.unique(class_sizes, return_counts=True), strict=True):
        first = np.maximum(1, a + b - total)
        last = np.minimum(np.minimum(a, b), np.ceil(np.e**2 * a * b / total + 60).astype(np.int64))
        lengths = last - first + 1
        n = np.arange(lengths.sum()) + np.repeat(first - (lengths.cumsum() - lengths), lengths)
        each_b = np.repeat(b, lengths)
        inside = log_factorial[a] - log_factorial[n] - log_factorial[a - n]
        outside = log_factorial[total - a] - log_factorial[each_b - n] - log_factorial[total - a - each_b + n]
        ways = log_factorial[total] - log_factorial[each_b] - log_factorial[total - each_b]
        terms = n / total * np.log(total * n / (a * each_b)) * np.exp(inside + outside - ways)
        expected += a_times * (np.repeat(b_times, lengths) * terms).sum()
    return float(expected)
