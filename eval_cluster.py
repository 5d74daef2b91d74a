"""Clustering scores that can be believed: each NMI beside its chance level, and methods compared at equal k.

    python eval_cluster.py --checkpoint runs/cplearn/checkpoint.pth --output_dir runs/cplearn/eval
    python eval_cluster.py --checkpoint a.pth b.pth --baselines --match_k 10 100 --kmeans 10 100
    python eval_cluster.py --checkpoint a.pth --output_dir out --gallery --export out/codes.csv
    torchrun --nproc_per_node=8 eval_cluster.py --checkpoint a.pth --dataset imagefolder --data_path /data/imagenet

Scores three kinds of clusters on the validation images: a model's codes (argmax of its head), the same codes merged to
k clusters, and k-means on its features. NMI rises with the number of clusters by itself: 131,072 random codes on 5,000
images of 100 classes reach 0.70. So the table has NMI of the same codes under permuted labels (chance), AMI and ARI,
which are 0 at chance, and words beneath it where NMI is chance. All scores lie in [0, 1] and are 1 for codes that equal
the classes; AMI and ARI may fall a little below 0.

--export writes the cluster of each image as CSV or Parquet, --gallery shows the images of some clusters (gallery.py).

Shapes: N images, D features, C classes, M codes in use, K codes of a head, k clusters.
"""

import argparse
import csv
import sys
from pathlib import Path

import numpy as np

import evaluation
import gallery
import utils
from utils import UserError

MAX_LINKED = 10_000  # vectors that Ward's linkage takes: 8 bytes for each pair, twice, 0.8 GB
MAX_GALLERY_CODES = 100
EXPORTS = (".csv", ".parquet")

USAGE_COLUMNS = {
    "checkpoint": ("checkpoint", ""),
    "method": ("clusters", ""),
    "num_used": ("in use", "d"),
    "perplexity": ("perplexity", ".1f"),
    "largest_share": ("largest share", ".4f"),
}
SCORE_COLUMNS = {
    "nmi": ("NMI", ".3f"),
    "nmi_chance": ("NMI by chance", ".3f"),
    "nmi_chance_std": ("+-", ".3f"),
    "ami": ("AMI", ".3f"),
    "ari": ("ARI", ".3f"),
    "purity": ("purity", ".3f"),
    "hungarian": ("Hungarian", ".3f"),
}


def get_args_parser():
    parser = evaluation.evaluation_parser("eval_cluster.py", "Clustering scores of codes and of k-means on features.")
    add = parser.add_argument
    add("--split", default="val", choices=("val", "train"), help="images to cluster")
    add(
        "--kmeans", type=int, nargs="+", default=None, metavar="K",
        help="k-means on the features with these numbers of clusters; 0: none (default: the number of classes)",
    )  # fmt: skip
    add("--kmeans_restarts", type=int, default=5, help="of k-means, from other centres; the tightest clusters are kept")
    add(
        "--spherical", action=argparse.BooleanOptionalAction, default=False,
        help="k-means by cosine: features and centres of length 1",
    )  # fmt: skip
    add(
        "--match_k", type=int, nargs="+", default=[], metavar="K",
        help="also merge a model's codes to K clusters (Ward's linkage), to compare with k-means at K (default: none)",
    )  # fmt: skip
    add(
        "--match_on", default="features", choices=("features", "codes"),
        help="merge codes by the mean feature of their images, or by their vectors in the dictionary",
    )  # fmt: skip
    add("--num_permutations", type=int, default=10, help="of the labels, for the chance level of NMI; 2 or more")
    add(
        "--export", default=None, metavar="FILE",
        help="write name, label, class and clusters of each image, as .csv or .parquet",
    )  # fmt: skip
    add(
        "--gallery", action=argparse.BooleanOptionalAction, default=False,
        help="draw images of some clusters, gallery_*.png and a page gallery_*.html in --output_dir",
    )  # fmt: skip
    add("--gallery_codes", type=int, default=12, help="clusters in the gallery: half the fullest, half at random")
    return parser


@utils.command_line
def main(argv=None):
    args = get_args_parser().parse_args(argv)
    check_flags(args)
    device = utils.init_distributed(args.device)
    subjects = evaluation.open_subjects(args, device)
    images = evaluation.open_images(subjects, args.split, "a clustering score", required=False)
    args.kmeans = resolve_kmeans(args.kmeans, images)
    check_heads(args, subjects)
    rows, notes, found = [], [], {}  # found: {(checkpoint, method): clusters (N,)}, those of the table's rows
    for subject, (features, codes) in evaluation.extract_all(subjects, images):
        for method, clusters in all_clusterings(subject, features.numpy(), codes, args, notes):
            scores = scores_of(images.labels, clusters, args)
            rows.append({"checkpoint": subject.name, "method": method, **scores})
            found[subject.name, method] = clusters
    if utils.rank() > 0:
        return
    report(rows, notes, args, subjects, images)
    if args.export:
        export(args.export, images, found)
    if args.gallery:
        draw_galleries(args, subjects, images, found)


def check_flags(args):
    at_least = {"kmeans": 0, "kmeans_restarts": 1, "match_k": 1, "num_permutations": 2, "gallery_codes": 1}
    for name, least in at_least.items():
        for value in np.atleast_1d(getattr(args, name) if getattr(args, name) is not None else []):
            if value < least:
                raise UserError(f"--{name} {int(value)}: expected {least} or more")
    if args.gallery_codes > MAX_GALLERY_CODES:
        raise UserError(f"--gallery_codes {args.gallery_codes}: expected at most {MAX_GALLERY_CODES}")
    if args.gallery and args.output_dir is None:
        raise UserError("--gallery needs --output_dir, the folder to draw in")
    if args.export and Path(args.export).suffix not in EXPORTS:
        raise UserError(f"--export {args.export}: expected a name that ends in {' or '.join(EXPORTS)}")
    if args.export:
        evaluation.make_folder(Path(args.export).parent, "--export")


def resolve_kmeans(ks, images):
    """The numbers of clusters to make; by default the number of classes, none without labels."""
    if ks is None:
        ks = [] if images.labels is None else [len(np.unique(images.labels))]
    ks = sorted(set(ks) - {0})
    if ks and ks[-1] > len(images):
        raise UserError(f"--kmeans {ks[-1]}: there are {len(images)} images; expected no more clusters than that")
    return ks


def check_heads(args, subjects):
    """Before hours of features: that there is something to score, and something to merge."""
    heads = {subject.name: subject.model.head for subject in subjects if subject.model.head is not None}
    if not heads and not args.kmeans:
        raise UserError(f"{subjects[-1].name}: no head, so no codes, and no k-means asked for: give --kmeans K")
    without = [name for name, head in heads.items() if not hasattr(head, "dictionary")]
    if args.match_k and args.match_on == "codes" and without:
        raise UserError(f"--match_on codes: the head of {without[0]} has no dictionary; use --match_on features")


# ---- clusters --------------------------------------------------------------------------------------------------------


def all_clusterings(subject, features, codes, args, notes):
    """Yields (method, clusters (N,)): a subject's codes, merged codes and k-means, as far as the flags ask for them.

    notes: list of sentences, to which goes why one is not there."""
    if codes is None:
        notes.append(f"{subject.name}: no head, so no codes; k-means only")
    else:
        codes = codes.numpy()
        yield "codes", codes
        yield from merged_clusterings(subject, features, codes, args, notes)
    for k in args.kmeans:
        yield f"k-means {k}", kmeans(features, k, args.kmeans_restarts, args.spherical, args.seed)


def merged_clusterings(subject, features, codes, args, notes):
    used, codes = np.unique(codes, return_inverse=True)
    possible = [k for k in sorted(set(args.match_k)) if k <= len(used)]
    notes += [
        f"{subject.name}: {len(used)} codes in use, they cannot be merged to {k}"
        for k in sorted(set(args.match_k) - set(possible))
    ]
    if not possible:
        return
    if len(used) > MAX_LINKED:
        notes.append(f"{subject.name}: its {len(used)} codes in use were put in {MAX_LINKED} groups before linkage")
    on_features = args.match_on == "features"
    vectors = mean_features(features, codes) if on_features else dictionary_vectors(subject, used)
    groups = merge(vectors, np.bincount(codes), possible, args.seed)
    for k, group in zip(possible, groups.T, strict=True):
        yield f"codes merged to {k}", group[codes]


def mean_features(features, codes):
    """Features (N, D) and codes (N,) from 0 to M - 1, all in use -> mean feature of each code (M, D)."""
    from scipy.sparse import csr_array

    ones = np.ones(len(codes), features.dtype)  # of another type, scipy would copy the features
    members = csr_array((ones, (codes, np.arange(len(codes)))))  # (M, N)
    return members @ features / np.bincount(codes)[:, None]


def dictionary_vectors(subject, used):
    """Vectors of the codes in use (M, F)."""
    return subject.model.head.codes[:, used].T.double().cpu().numpy()


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
    return cut_tree(linkage(vectors, "ward"), ks[::-1])[:, ::-1]  # scipy puts those of k = M into the first column


def kmeans(features, k, restarts=1, spherical=False, seed=0, weights=None, iterations=50):
    """k-means by faiss, on all its GPUs if it sees any: features (N, D) -> cluster of each (N,), in 0 ... k - 1.

    The centres of the restart with the least summed squared distance (largest cosine, if spherical) are kept."""
    import faiss

    x = np.ascontiguousarray(features, np.float32)
    if spherical:
        x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    model = faiss.Kmeans(
        x.shape[1], k, niter=iterations, nredo=restarts, spherical=spherical, seed=seed,
        gpu=faiss.get_num_gpus() > 0, min_points_per_centroid=1, max_points_per_centroid=len(x),  # all points
    )  # fmt: skip
    model.train(x, weights=None if weights is None else weights.astype(np.float32))
    return model.index.search(x, 1)[1].ravel()


# ---- scores ----------------------------------------------------------------------------------------------------------


def scores_of(labels, clusters, args):
    if labels is None:
        return usage(np.unique(clusters, return_counts=True)[1])
    return clustering_scores(labels, clusters, args.num_permutations, args.seed)


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


# ---- what is written -------------------------------------------------------------------------------------------------


def report(rows, notes, args, subjects, images):
    columns = USAGE_COLUMNS
    if images.labels is None:
        notes = [*notes, f"the {args.split} images have no labels: no scores, and k-means only where --kmeans asks"]
    else:
        first = ("checkpoint", "method")
        columns = {name: columns[name] for name in first} | SCORE_COLUMNS | columns
        notes = [note for row in rows if (note := chance_note(row))] + notes
    evaluation.report("cluster", rows, columns, args, subjects, notes=notes, num_images=len(images))


def chance_note(row):
    """A sentence where NMI is chance, or where more than half of it is; else None.

    It is chance within four standard deviations (of ten permutations, they are known to a quarter), and also where it
    covers less than 0.5 % of the way from chance to 1, which many images tell from 0 but which is of no use.
    """
    told = f"{row['nmi_chance']:.3f} +- {row['nmi_chance_std']:.3f}"
    words = f"the same codes give {told} with permuted labels; AMI {row['ami']:.3f}"
    if row["ami"] < 0.005 or row["nmi"] <= row["nmi_chance"] + 4 * row["nmi_chance_std"]:
        return f"{row['checkpoint']}, {row['method']}: NMI {row['nmi']:.3f} is chance: {words}"
    if row["nmi_chance"] > row["nmi"] / 2:
        return f"{row['checkpoint']}, {row['method']}: NMI {row['nmi']:.3f} is mostly chance: {words}"
    return None


def export(path, images, found):
    """One row per image: image, label and class where there are labels, and the clusters of each row of the table."""
    columns = {"image": [gallery.printable(images.name(i)) for i in range(len(images))]}
    if images.labels is not None:
        names = [gallery.printable(name) for name in images.classes]
        columns |= {"label": images.labels.tolist(), "class": [names[label] for label in images.labels]}
    several = len({name for name, _ in found}) > 1
    for (name, method), clusters in found.items():
        columns[f"{name}: {method}" if several else method] = clusters.tolist()
    write = write_csv if path.endswith(".csv") else write_parquet
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write(path, columns)
    except OSError as error:
        raise UserError(f"--export {path}: cannot be written: {error.strerror or error}") from error


def write_csv(path, columns):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))


def write_parquet(path, columns):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), path)


def draw_galleries(args, subjects, images, found):
    """One for each subject: of its codes, or else of its first k-means."""
    for subject in subjects:
        methods = [method for name, method in found if name == subject.name]
        if not methods:
            continue
        title = f"{subject.name}: {methods[0]} of {len(images)} {args.split} images"
        clusters, stem = found[subject.name, methods[0]], Path(args.output_dir) / f"gallery_{subject.stem}"
        written = gallery.write_gallery(stem, title, images, clusters, args.gallery_codes, args.seed)
        print(f"wrote {' and '.join(map(str, written))}", file=sys.stderr)


if __name__ == "__main__":
    main()
