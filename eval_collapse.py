"""Has a representation collapsed? Spectra, entropies, code usage and what the theory promises, of one model or several.

    python eval_collapse.py --checkpoint runs/cplearn/checkpoint.pth --output_dir runs/cplearn
    python eval_collapse.py --checkpoint runs/a/checkpoint.pth runs/b/checkpoint.pth --baselines --output_dir runs/ab

The analyses of arXiv 2410.04959 on the images of one split, without augmentation: singular values of the covariance
(Fig. 6a, 13a), entropy of Gaussian mixtures (Fig. 6b, 13b), embedding covariance, adjacency and W^T W (Fig. 3, 4, 8,
9), t-SNE (Fig. 12), the gap to Lemma 1's bound; and in words which of the four collapses of section 2 has happened.
Prints a table and the verdicts; with --output_dir writes results_collapse.json, with all curves, and the figures.

Shapes: N images, D backbone width, F head width, K codes.
"""

import math

import torch

import evaluation
import utils
from cplearn_head import CPLearnHead
from evaluation import collapse, collapse_figures
from monitor import feature_statistics, rankme, within_code_variance
from utils import UserError

RANKME_ROWS = 25_600  # as in RankMe's paper, section 3.1
TIGHTNESS_ROWS = 100_000  # some of which must share a code; bounds the memory, three copies in float64
MAX_COVARIANCE = 4096  # D: the covariance of wider features (raw pixels of photographs) takes minutes and gigabytes
MIN_IMAGES = 10
SAME = 1e-6  # spread of features that differ by no more than float32's rounding
ASSUMED = {"beta": 0.25, "prior": "kl"}  # main_cplearn.py's defaults, for a checkpoint that does not say

COLUMNS = {
    "checkpoint": ("checkpoint", ""),
    "rankme": ("RankMe", ".1f"),
    "width": ("of D", "d"),
    "alpha": ("alpha", ".2f"),
    "cosine_mean": ("mean cosine", ".3f"),
    "mixture_entropy": ("mixture entropy (nats)", ".1f"),
    "codes_used": ("codes used", "d"),
    "perplexity": ("perplexity", ".1f"),
    "within_code": ("variance in codes", ".3f"),
    "alignment": ("alignment", ".3f"),
    "information": ("information (nats)", ".2f"),
    "gap_share": ("gap / trivial", ".2f"),
    "verdict": ("collapse", ""),
}


def get_args_parser():
    parser = evaluation.evaluation_parser("eval_collapse.py", "Which collapses has a representation suffered?")
    add = parser.add_argument
    add("--split", default="val", choices=("train", "val"), help="images to analyse")
    add(
        "--gmm_components", type=utils.positive(int), nargs="*", default=[10, 20, 50, 100, 200, 500, 1000], metavar="C",
        help="sizes of the Gaussian mixtures whose entropy is estimated, and numbers of k-means groups in which "
        "intracluster collapse is looked for; those above a tenth of the images are left out; none: no mixtures",
    )  # fmt: skip
    add(
        "--gmm_samples", type=utils.Number(int, least=MIN_IMAGES), default=10_000, metavar="N",
        help="images that mixtures are fitted to, drawn at random; time grows with it, and entropies with few samples "
        "per component are too low",
    )  # fmt: skip
    add(
        "--tsne_samples", type=utils.not_negative(int), default=2000, metavar="N",
        help="images drawn at random for t-SNE, which is made with --output_dir only; 0: none",
    )  # fmt: skip
    return parser


@utils.command_line
def main(argv=None):
    args = get_args_parser().parse_args(argv)
    device = utils.init_distributed(args.device)
    models = [evaluated for evaluated in evaluation.open_models(args, device) if narrow_enough(evaluated)]
    images = evaluation.open_images(models, args.split)
    if len(images) < MIN_IMAGES:
        raise UserError(f"--split {args.split} has {len(images)} images; expected at least {MIN_IMAGES}")
    rows, curves, pictures = [], {}, {}
    for evaluated, (features, codes) in evaluation.extract_all(models, images):
        row, curves[evaluated.name], pictures[evaluated.name] = analyse(evaluated, features, codes, args)
        rows.append({"checkpoint": evaluated.name} | row)
    if not rows:
        return  # not the first process
    report(rows, curves, args, models, num_images=len(images))
    if args.output_dir is not None:
        collapse_figures.draw_all(args.output_dir, curves, pictures, images)


def analyse(evaluated, features, codes, args):
    """(row of the table, curves for JSON and figures, arrays for pictures) of one model. Parts of a row are joined by
    `dict`, which refuses a name that is there already: one of two numbers would be lost."""
    head = evaluated.model.head
    row, curves, tightness = analyse_features(features, args)
    sample = collapse.some_indices(len(features), collapse_figures.ADJACENCY_ROWS, args.seed)
    pictures = {"rows": sample, "vectors": features[sample], "of": "features", "codes": None}
    usage = entropy = None
    if codes is not None:
        usage = collapse.code_usage(codes, head.num_codes)
        curves["usage"] = usage.pop("counts")
        within_code = float(within_code_variance(features, codes))
        row = dict(**row, **usage, within_code=finite(within_code))
        some = collapse.some_indices(len(features), TIGHTNESS_ROWS, args.seed)
        tightness.append(collapse.tightness(features[some], codes[some]))
        pictures["codes"] = codes[sample]
    objective = objective_of(evaluated)
    if is_cplearns(evaluated):
        device = evaluated.device if evaluated.device.type == "cuda" else torch.device("cpu")  # mps has no float64
        h = collapse.embed(head, features, device)
        of_theory, curves["embedding_spectrum"], of_pictures = analyse_embeddings(h, codes, evaluated, args, device)
        row = dict(**row, **of_theory)
        entropy = row["entropy"]
        pictures |= of_pictures | {"vectors": h[sample], "of": "embeddings h"}
    else:
        pictures["moment"] = collapse.covariance(features)
        if objective != "cplearn":
            evaluation.note(f"{evaluated.name}: trained by --objective {objective}: what is measured against CPLearn's "
                            "dictionary, and the gap to Lemma 1, is left out")  # fmt: skip
    if args.output_dir is not None and args.tsne_samples and row["spread"] > SAME:
        positions, rows = collapse.tsne(features, args.tsne_samples, args.seed)
        pictures["tsne"] = positions, rows, None if codes is None else codes[rows]
    told = verdicts(row, curves["spectrum"], tightness, usage, len(features), entropy)
    return dict(**row, **told), curves, pictures


def objective_of(evaluated):
    return evaluated.model.settings.get("objective") or "cplearn"  # older files do not say it


def is_cplearns(evaluated):
    return isinstance(evaluated.model.head, CPLearnHead) and objective_of(evaluated) == "cplearn"


def analyse_features(features, args):
    """(row, curves, how tight k-means groups are at each --gmm_components) of features (N, D)."""
    statistics = feature_statistics(features)
    eigenvalues = collapse.covariance_eigenvalues(features)
    cosine = collapse.cosines(features, args.seed)
    row = {name: statistics[name] for name in ("feature_mean", "feature_std", "spread")} | {
        "rankme": finite(rankme(collapse.some_rows(features, RANKME_ROWS, args.seed))),
        "width": features.shape[1],
        "effective_rank": finite(collapse.effective_rank(eigenvalues)),
        "alpha": collapse.power_law_exponent(eigenvalues),
        "cosine_mean": cosine["mean"],
        "cosine_std": cosine["std"],
    }
    mixtures, tightness = [], []
    sample = collapse.some_rows(features, args.gmm_samples, args.seed)
    for components in chosen_components(args, len(sample)) if row["spread"] > SAME else []:
        numbers, groups = collapse.mixture_entropy(sample, components, args.seed)
        tightness.append(collapse.tightness(sample, groups, eigenvalues))
        mixtures.append(numbers)
    if mixtures:
        components, *entropies = mixtures[-1].items()  # of the most components
        row |= dict([components]) | {f"mixture_{name}": value for name, value in entropies}
    curves = {"spectrum": eigenvalues.tolist(), "cosine_density": cosine["density"], "mixtures": mixtures}
    return row, curves, tightness


def analyse_embeddings(h, codes, evaluated, args, device):
    """(row, eigenvalues of the covariance of h, arrays for pictures): what the theory says of h (N, F)."""
    head = evaluated.model.head
    aligned = collapse.alignment(h, codes, head.dictionary, args.seed)
    moment = collapse.second_moment(h)
    blocks = collapse.block_cosines(h, codes, args.seed)
    settings = loss_settings(evaluated.model.settings)
    if any(evaluated.model.settings.get(name) is None for name in ASSUMED):
        evaluation.note(f"{evaluated.name} does not say its beta and prior: the gap is for {settings}")
    of_loss = collapse.certificate(h, head.codes.to(device), head.tau, **settings, eps=smallest_probability(head))
    row = dict(
        alignment=aligned["mean"],
        alignment_quantile_5=aligned["quantile_5"],
        alignment_chance=aligned["chance"],
        off_diagonal_mass=collapse.off_diagonal_mass(moment),
        **{f"block_cosine_{name}": value for name, value in blocks.items()},
        beta=settings["beta"],
        prior_form=settings["prior"],  # "prior" is the term's value, in nats
        **of_loss,
        embedding_rankme=finite(rankme(collapse.some_rows(h, RANKME_ROWS, args.seed))),
    )
    shown = collapse.some_indices(head.dictionary.num_codes, collapse_figures.DICTIONARY_COLUMNS, args.seed)
    columns = head.dictionary.columns(shown.to(device)).float().cpu()
    return row, collapse.covariance_eigenvalues(h).tolist(), {"moment": moment, "dictionary": columns}


def loss_settings(told):
    """beta and prior as a checkpoint's settings tell them (beta may be 0), and `ASSUMED` where they do not."""
    return {name: value if told.get(name) is None else told[name] for name, value in ASSUMED.items()}


def smallest_probability(head):
    """Lemma 1's eps, from the temperature that it was made into (cplearn_head.code_temperature)."""
    dim, num_codes = head.dictionary.shape
    return 1 / (math.exp(head.radius * math.sqrt(dim) / head.tau) + num_codes - 1)


def verdicts(row, eigenvalues, tightness, usage, num_images, entropy):
    tightness = min((t for t in tightness if not math.isnan(t)), default=math.nan)  # the grouping that shows it best
    eigenvalues = torch.tensor(eigenvalues, dtype=torch.float64)
    sentences, found = collapse.judge(row, eigenvalues, tightness, usage, num_images, entropy)
    return {"tightness": finite(tightness), "verdict": ", ".join(found) or "none", "verdicts": sentences}


# ---- output ----------------------------------------------------------------------------------------------------------


def report(rows, curves, args, models, num_images):
    components = max((row.get("components", 0) for row in rows), default=0)
    columns = dict(COLUMNS)
    if components:
        columns["mixture_entropy"] = (f"entropy, {components} comp. (nats)", ".1f")
    else:
        del columns["mixture_entropy"]
    notes = ["\n".join([row["checkpoint"], "", *verdict_lines(row)]) for row in rows]
    notes += highest_rank(rows, models)
    evaluation.report("collapse", rows, columns, args, models, notes, curves=curves, num_images=num_images)


def highest_rank(rows, models):
    """A note on choosing without labels, where several of CPLearn's checkpoints have features of one width."""
    own = [row for row, evaluated in zip(rows, models, strict=True) if is_cplearns(evaluated)]
    if len(own) < 2 or len({row["width"] for row in own}) > 1 or None in (ranks := [row["rankme"] for row in own]):
        return []
    best = own[ranks.index(max(ranks))]
    return [
        f"Without labels: the highest RankMe of CPLearn's is that of {best['checkpoint']}. Of what was tried, RankMe "
        "ranks runs of other codes and activations as k-NN and linear accuracy do; within one setting it says little "
        "(docs/results.md, Choosing without labels)."
    ]


def verdict_lines(row):
    """Indented, so that Markdown keeps their columns."""
    told = {kind + " collapse" if kind != "saddle" else kind: text for kind, text in row["verdicts"].items()}
    if "gap" in row:
        told["theory"] = describe_theory(row)
    return [f"    {kind:24s}{text}" for kind, text in told.items()]


def describe_theory(row):
    share = "" if row["gap_share"] is None else f", {row['gap_share']:.2f} of a trivial state's"
    most = math.log(row["num_codes"])
    return (
        f"gap to Lemma 1 {row['gap']:.3f} nats{share} (0: no collapse, 1: trivial); "
        f"codes tell {row['information']:.2f} of log K = {most:.2f} nats about an image; "
        f"alignment {row['alignment']:.3f} (random directions {row['alignment_chance']:.3f}); "
        f"off-diagonal mass of H^T H {row['off_diagonal_mass']:.3f}"
    )


# ---- checks ----------------------------------------------------------------------------------------------------------


def chosen_components(args, num_samples):
    chosen = sorted(count for count in set(args.gmm_components) if count <= num_samples / 10)
    left_out = sorted(set(args.gmm_components) - set(chosen))
    if left_out:
        evaluation.note(
            f"--gmm_components {' '.join(map(str, left_out))} left out: more than a tenth of {num_samples} images"
        )
    return chosen


def narrow_enough(evaluated):
    width = evaluated.model.embed_dim
    if width > MAX_COVARIANCE:
        evaluation.note(f"{evaluated.name} left out: {width} features; these analyses take up to {MAX_COVARIANCE}")
    return width <= MAX_COVARIANCE


def finite(value):
    return value if math.isfinite(value) else None


if __name__ == "__main__":
    main()
