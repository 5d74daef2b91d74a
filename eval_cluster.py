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

--export writes the cluster of each image as CSV or Parquet, --gallery shows images of some (evaluation/gallery.py).

Shapes: N images, D features, C classes, M codes in use, K codes of a head, k clusters.
"""

import argparse
import csv
import io
import sys
from pathlib import Path

import numpy as np

import evaluation
import utils
from evaluation import gallery
from evaluation.clustering import MAX_LINKED, clustering_scores, kmeans, mean_features, merge, usage
from running.files import replace_file, write_whole
from utils import UserError

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
        "--kmeans", type=utils.not_negative(int), nargs="+", default=None, metavar="K",
        help="k-means on the features with these numbers of clusters; 0: none (default: the number of classes)",
    )  # fmt: skip
    add(
        "--kmeans_restarts", type=utils.positive(int), default=5,
        help="of k-means, from other centres; the tightest clusters are kept",
    )  # fmt: skip
    add(
        "--spherical", action=argparse.BooleanOptionalAction, default=False,
        help="k-means by cosine: features and centres of length 1",
    )  # fmt: skip
    add(
        "--match_k", type=utils.positive(int), nargs="+", default=[], metavar="K",
        help="also merge a model's codes to K clusters (Ward's linkage), to compare with k-means at K (default: none)",
    )  # fmt: skip
    add(
        "--match_on", default="features", choices=("features", "codes"),
        help="merge codes by the mean feature of their images, or by their vectors in the dictionary",
    )  # fmt: skip
    add(
        "--num_permutations", type=utils.Number(int, least=2), default=10,
        help="of the labels, for the chance level of NMI",
    )  # fmt: skip
    add(
        "--export", default=None, metavar="FILE",
        help="write name, label, class and clusters of each image, as .csv or .parquet",
    )  # fmt: skip
    add(
        "--gallery", action=argparse.BooleanOptionalAction, default=False,
        help="draw images of some clusters, gallery_*.png and a page gallery_*.html in --output_dir",
    )  # fmt: skip
    add(
        "--gallery_codes", type=utils.Number(int, least=1, most=100), default=12,
        help="clusters in the gallery: half the fullest, half at random",
    )  # fmt: skip
    return parser


@utils.command_line
def main(argv=None):
    args = get_args_parser().parse_args(argv)
    check_flags(args)
    device = utils.init_distributed(args.device)
    models = evaluation.open_models(args, device)
    images = evaluation.open_images(models, args.split, "a clustering score", required=False)
    args.kmeans = resolve_kmeans(args.kmeans, images)
    check_heads(args, models)
    rows, notes, found = [], [], {}  # found: {(checkpoint, method): clusters (N,)} of the table's rows
    for evaluated, (features, codes) in evaluation.extract_all(models, images):
        for method, clusters in all_clusterings(evaluated, features.numpy(), codes, args, notes):
            scores = scores_of(images.labels, clusters, args)
            rows.append({"checkpoint": evaluated.name, "method": method, **scores})
            found[evaluated.name, method] = clusters
    if utils.rank() > 0:
        return
    report(rows, notes, args, models, images)
    if args.export:
        export(args.export, images, found)
    if args.gallery:
        draw_galleries(args, models, images, found)


def check_flags(args):
    if args.gallery and args.output_dir is None:
        raise UserError("--gallery needs --output_dir, the folder to draw in")
    if args.export and Path(args.export).suffix not in EXPORTS:
        raise UserError(f"--export {args.export}: expected a name that ends in {' or '.join(EXPORTS)}")
    if args.export:
        utils.make_folder(Path(args.export).parent, "--export")


def resolve_kmeans(ks, images):
    """The numbers of clusters to make; by default the number of classes, none without labels."""
    if ks is None:
        ks = [] if images.labels is None else [len(np.unique(images.labels))]
    ks = sorted(set(ks) - {0})
    if ks and ks[-1] > len(images):
        raise UserError(f"--kmeans {ks[-1]}: there are {len(images)} images; expected no more clusters than that")
    return ks


def check_heads(args, models):
    """Before hours of features: that there is something to score, and something to merge."""
    heads = {evaluated.name: evaluated.model.head for evaluated in models if evaluated.model.head is not None}
    if not heads and not args.kmeans:
        raise UserError(f"{why_no_codes(models[-1])}, and no k-means asked for: give --kmeans K")
    without = [name for name, head in heads.items() if not hasattr(head, "dictionary")]
    if args.match_k and args.match_on == "codes" and without:
        raise UserError(f"--match_on codes: the head of {without[0]} has no dictionary; use --match_on features")


# ---- clusters --------------------------------------------------------------------------------------------------------


def all_clusterings(evaluated, features, codes, args, notes):
    """Yields (method, clusters (N,)): a model's codes, merged codes and k-means, as far as the flags ask for them.

    notes: list of sentences, to which goes why one is not there."""
    if codes is None:
        notes.append(f"{why_no_codes(evaluated)}; k-means only")
    else:
        codes = codes.numpy()
        yield "codes", codes
        yield from merged_clusterings(evaluated, features, codes, args, notes)
    for k in args.kmeans:
        yield f"k-means {k}", kmeans(features, k, args.kmeans_restarts, args.spherical, args.seed)


def why_no_codes(evaluated):
    objective = evaluated.model.settings.get("objective")
    if objective in (None, "cplearn"):
        return f"{evaluated.name}: no head, so no codes"
    return f"{evaluated.name}: no head that names codes; it was trained by --objective {objective}"


def merged_clusterings(evaluated, features, codes, args, notes):
    used, codes = np.unique(codes, return_inverse=True)
    possible = [k for k in sorted(set(args.match_k)) if k <= len(used)]
    notes += [
        f"{evaluated.name}: {len(used)} codes in use, they cannot be merged to {k}"
        for k in sorted(set(args.match_k) - set(possible))
    ]
    if not possible:
        return
    if len(used) > MAX_LINKED:
        notes.append(f"{evaluated.name}: its {len(used)} codes in use were put in {MAX_LINKED} groups before linkage")
    on_features = args.match_on == "features"
    vectors = mean_features(features, codes) if on_features else dictionary_vectors(evaluated, used)
    groups = merge(vectors, np.bincount(codes), possible, args.seed)
    for k, group in zip(possible, groups.T, strict=True):
        yield f"codes merged to {k}", group[codes]


def dictionary_vectors(evaluated, used):
    """Vectors of the codes in use (M, F)."""
    return evaluated.model.head.codes[:, used].T.double().cpu().numpy()


# ---- scores ----------------------------------------------------------------------------------------------------------


def scores_of(labels, clusters, args):
    if labels is None:
        return usage(np.unique(clusters, return_counts=True)[1])
    return clustering_scores(labels, clusters, args.num_permutations, args.seed)


# ---- what is written -------------------------------------------------------------------------------------------------


def report(rows, notes, args, models, images):
    columns = USAGE_COLUMNS
    if images.labels is None:
        notes = [*notes, f"the {args.split} images have no labels: no scores, and k-means only where --kmeans asks"]
    else:
        first = ("checkpoint", "method")
        columns = {name: columns[name] for name in first} | SCORE_COLUMNS | columns
        notes = [note for row in rows if (note := chance_note(row))] + notes
    evaluation.report("cluster", rows, columns, args, models, notes=notes, num_images=len(images))


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
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    write_whole(path, text.getvalue())


def write_parquet(path, columns):
    import pyarrow
    from pyarrow import parquet

    with replace_file(path) as file:
        parquet.write_table(pyarrow.table(columns), file)


def draw_galleries(args, models, images, found):
    """A gallery for each model: of its codes, or else of its first k-means."""
    for evaluated in models:
        methods = [method for name, method in found if name == evaluated.name]
        if not methods:
            continue
        title = f"{evaluated.name}: {methods[0]} of {len(images)} {args.split} images"
        clusters, stem = found[evaluated.name, methods[0]], Path(args.output_dir) / f"gallery_{evaluated.stem}"
        word = "code" if methods[0] == "codes" else "cluster"
        written = gallery.write_gallery(stem, title, images, clusters, args.gallery_codes, args.seed, word)
        print(f"wrote {' and '.join(map(str, written))}", file=sys.stderr)


if __name__ == "__main__":
    main()
