"""The paper's claims, one by one: numbers from the committed results of our experiments, and a verdict.

    CLAIMS["beta"](results)          # Markdown, for a block <!-- claim beta --> of docs/results.md

Verdicts: confirmed; not seen at this budget (the numbers go neither way, or too few runs have ended); refuted; not
run. A claim whose runs have not all ended says how many have. A difference counts where it is larger than two standard
errors of itself: the runs of two rows are taken as two samples.
"""

import math
import statistics

from scipy.stats import spearmanr

from evaluation import markdown_table
from experiments import ROOT, epochs_of, read_experiment, score_of
from experiments.tables import command_of, describe

CONFIRMED, NOT_SEEN, REFUTED, NOT_RUN = "confirmed", "not seen at this budget", "refuted", "not run"
COLLAPSES = ("representation", "dimensional", "cluster", "intracluster")
SIZES = (128, 1024, 16384)
CPLEARN = [f"CPLearn, {kind}, K = {k}" for kind in ("l2", "tanh", "Hadamard") for k in SIZES]
CLAIMS = {}


def claim(name, of, says):
    """A function from folder of results to (verdict, sentences and tables) is a claim of the page under this name. It
    is asked once runs of the experiment `of` have ended."""

    def add(function):
        def told(results):
            experiment = read_experiment(ROOT / f"{of}.toml", "short", results=results)
            places = [(row, column) for row in experiment.rows() for column in experiment.columns()]
            ended = sum(done(result) for place in places for result in experiment.finals(*place))
            asked = sum(len(experiment.seeds(row)) for row, _ in places)
            if not ended:
                return f"**{says}** Verdict: **{NOT_RUN}**. {command_of(experiment)}"
            verdict, text = function(results)
            so_far = "" if ended == asked else f" So far {ended} of {asked} runs: {command_of(experiment)}"
            return f"**{says}** Verdict: **{verdict}**.{so_far}\n\n{text}"

        CLAIMS[name] = told
        return function

    return add


# ---- more codes ------------------------------------------------------------------------------------------------------


@claim("features", "comparison", "Larger dictionaries give better features (Table 1, Fig. 5).")
def larger_k_features(results):
    scores = {"20-NN": "knn.top1", "linear": "linear.top1", "10 labels per class": "few.top1"}
    return by_size(results, scores, ".1f")


@claim(
    "clusters",
    "comparison",
    "Larger dictionaries give better clusters (Table 1, Fig. 5): here after the correction for chance.",
)
def larger_k_clusters(results):
    scores = {"codes, AMI": "cluster[codes].ami", "k-means of features, AMI": "cluster[k-means 10].ami"}
    verdict, text = by_size(results, scores, ".3f")
    raw = {"codes, NMI": "cluster[codes].nmi", "NMI, labels permuted": "cluster[codes].nmi_chance"}
    return verdict, text + "\n\nWithout the correction, the paper's score:\n\n" + by_size(results, raw, ".3f")[1]


def by_size(results, scores, form):
    """(verdict, sentence and table) of CPLearn, l2, over K: does the largest K beat the smallest?"""
    experiment, lines, changes = comparison(results), [], {}
    for column in experiment.columns():
        for title, score in scores.items():
            samples = [values(experiment, f"CPLearn, l2, K = {k}", column, score) for k in SIZES]
            change = difference(samples[-1], samples[0])
            changes.setdefault(column["name"], []).append(change)
            texts = {f"K = {k}": mean_and_spread(sample, form) for k, sample in zip(SIZES, samples, strict=True)}
            lines.append({"": f"{column['name']}, {title}"} | texts | {"last - first": told(change, form)})
    counts = "; ".join(f"{name}: {ups_and_downs(of_column)}" for name, of_column in changes.items())
    every = [change for of_column in changes.values() for change in of_column]
    return judge(every), f"From K = {SIZES[0]} to {SIZES[-1]}: {counts}.\n\n{as_table(lines)}"


def ups_and_downs(changes):
    rise, fall = (sum(sign * by > 2 * error for by, error in filter(None, changes)) for sign in (1, -1))
    return f"{rise} of {len(changes)} scores rise, {fall} fall"


# ---- beta ------------------------------------------------------------------------------------------------------------


@claim("beta", "beta", "Too large a beta is a cliff (Table 9: 1.0 is best, 1.25 chance level).")
def cliff(results):
    lines, near_one = [], []
    for column, k, cells in runs_of_beta(results):
        if not cells:
            continue
        holds = max((beta for beta, result in cells if not gives_way(result, k)), default=0)
        falls = min((beta for beta, result in cells if gives_way(result, k)), default=math.inf)
        few_codes = min((beta for beta, result in cells if collapsed(result)), default=None)
        near_one.append(holds >= 0.75 and falls <= 1.5)
        lines.append(
            {"": f"{column}, K = {k}", "runs": len(cells), "largest beta whose prior holds": holds,
             "smallest beta whose prior gives way": falls, "20-NN there": f"{knn_at(cells, holds)} → "
             f"{knn_at(cells, falls)}", f"at beta {cells[-1][0]}": knn_at(cells, cells[-1][0]),
             "smallest beta that eval_collapse calls collapsed": few_codes}
        )  # fmt: skip
    told = (
        "A prior gives way where K exp(-prior) of the last line is below K / 2. The verdict of eval_collapse, by which "
        "the cliff was to be found, stands in the last column: it also names runs whose prior holds, with p so soft "
        "that few codes are ever the likeliest."
    )
    return (CONFIRMED if all(near_one) else NOT_SEEN if any(near_one) else REFUTED), f"{told}\n\n{as_table(lines)}"


def gives_way(result, k):
    return result["lines"]["batch_perplexity"][-1] < k / 2


def knn_at(cells, beta):
    return mean_and_spread([score_of(r, "knn.top1") for b, r in cells if b == beta], ".1f") or "-"


@claim("warning", "beta", "(Ours.) K exp(-prior) < min(K, N) / 4 in a logged line tells a collapse of clusters.")
def warning(results):
    runs = [
        (first_warning(result, k), collapsed(result), gives_way(result, k), result["lines"]["step"][-1])
        for _, k, cells in runs_of_beta(results)
        for _, result in cells
    ]
    told = [(said, few) for said, few, _, _ in runs if said is not None]
    missed = sum(few and said is None for said, few, _, _ in runs)
    false = sum(not few for _, few in told)
    given_way = [said for said, _, gone, _ in runs if gone]
    held = [said for said, _, gone, _ in runs if not gone]
    when = f", in the median at step {statistics.median(said for said, _ in told):.0f} of {runs[0][3]}" if told else ""
    text = (
        f"{len(runs)} runs of `experiments/beta.toml`, on backbones that the limit was not chosen on. {len(told)} were "
        f"told{when}. Of {sum(few for _, few, _, _ in runs)} that eval_collapse calls collapsed {missed} were not "
        f"told, and {false} were of those that it does not. What is told is the prior: of {len(given_way)} whose prior "
        f"had given way by the last line {sum(said is not None for said in given_way)} were told, of {len(held)} whose "
        f"prior held {sum(said is not None for said in held)}."
    )
    return (CONFIRMED if missed + false <= len(runs) // 20 else REFUTED), text


def runs_of_beta(results):
    """Yields (column, K, [(beta, result)]) of the experiment beta."""
    experiment = read_experiment(ROOT / "beta.toml", "short", results=results)
    for column in experiment.columns():
        for k in sorted({row["flags"]["out_dim"] for row in experiment.rows()}):
            rows = [row for row in experiment.rows() if row["flags"]["out_dim"] == k]
            cells = [(row["flags"]["beta"], r) for row in rows for r in experiment.finals(row, column) if done(r)]
            yield column["name"], k, cells


def collapsed(result):
    return any(kind in score_of(result, "collapse.verdict") for kind in ("cluster", "representation"))


def first_warning(result, k):
    """The step of the first logged line that says so, or None; as in a run, none before the rate has begun to fall."""
    lines = result["lines"]
    warm = lines["step"][lines["train_lr"].index(max(lines["train_lr"]))]
    for step, perplexity, images in zip(
        lines["step"], lines["batch_perplexity"], lines["images_per_mean"], strict=True
    ):
        if step >= warm and perplexity < min(k, images) / 4:
            return step
    return None


# ---- collapse --------------------------------------------------------------------------------------------------------


@claim("collapse", "comparison", "CPLearn suffers none of the four collapses, its rivals do (Fig. 6, 13 to 15).")
def no_collapse(results):
    experiment, lines = comparison(results), []
    for row in experiment.rows():
        found = [r for column in experiment.columns() for r in experiment.finals(row, column) if done(r)]
        if row.get("take") or row["name"] in ("Untrained", "Supervised") or not found:
            continue
        verdicts = [score_of(r, "collapse.verdict") for r in found]
        counts = {kind: sum(kind in verdict.split(", ") for verdict in verdicts) for kind in COLLAPSES}
        lines.append({"": row["name"], "runs": len(found)} | counts)
    own = [line for line in lines if line[""] in CPLEARN]
    rivals = [line for line in lines if line[""] not in CPLEARN]
    ours, theirs = (sum(line[kind] for line in part for kind in COLLAPSES) for part in (own, rivals))
    verdict = REFUTED if ours else CONFIRMED if theirs else NOT_SEEN
    return verdict, as_table(lines)


# ---- longer runs -----------------------------------------------------------------------------------------------------


@claim("longer", "longer", "(Ours.) The order after 800 steps holds after 3200.")
def longer(results):
    experiment, short, lines = read_experiment(ROOT / "longer.toml", "short", results=results), comparison(results), []
    scores = {"20-NN": "knn.top1", "linear": "linear.top1", "k-means AMI": "cluster[k-means 10].ami"}
    kept = []
    for column in experiment.columns():
        for title, score in scores.items():
            form = ".3f" if title.endswith("AMI") else ".1f"
            before, after = (
                {row["name"]: values(part, row["name"], column, score) for row in experiment.rows()}
                for part in (short, experiment)
            )
            if all(before.values()) and all(after.values()):
                orders = [sorted(of, key=lambda name: -statistics.fmean(of[name])) for of in (before, after)]
                kept.append(orders[0] == orders[1])
            texts = {
                name: f"{mean_and_spread(before[name], form) or '-'} → {mean_and_spread(after[name], form) or '-'}"
                for name in after
            }
            lines.append({"": f"{column['name']}, {title}"} | texts)
    if len(kept) < len(lines):
        return NOT_SEEN, as_table(lines)
    text = f"The order of the three is the same by {sum(kept)} of {len(kept)} scores."
    return (CONFIRMED if all(kept) else REFUTED if not any(kept) else NOT_SEEN), f"{text}\n\n{as_table(lines)}"


@claim("convergence", "longer", "CPLearn converges faster than its rivals (Fig. 16).")
def convergence(results):
    experiment, lines, ahead, behind = read_experiment(ROOT / "longer.toml", "short", results=results), [], [], []
    for column in experiment.columns():
        curves = {}
        for row in experiment.rows():
            for result in [r for r in experiment.finals(row, column) if done(r)][:1]:
                epochs = epochs_of(result, "linear")
                curves[row["name"]] = {epoch: score_of(result, "linear.top1", name) for epoch, name in epochs.items()}
        lines += [{"": f"{column['name']}, {name}"} | {f"epoch {epoch}": f"{top1:.1f}" for epoch, top1 in curve.items()}
                  for name, curve in curves.items()]  # fmt: skip
        if len(curves) == len(experiment.rows()):
            own, *rivals = (list(curve.values()) for curve in curves.values())
            early = range((len(own) + 1) // 2)  # the first half: at the end all have converged
            ahead.append(all(own[i] > max(rival[i] for rival in rivals) for i in early))
            behind.append(all(own[i] < max(rival[i] for rival in rivals) for i in early))
    if not ahead:
        return NOT_SEEN, as_table(lines)
    return (CONFIRMED if all(ahead) else REFUTED if all(behind) else NOT_SEEN), as_table(lines)


# ---- activations -----------------------------------------------------------------------------------------------------


@claim("activation", "comparison", "tanh and l2 end equal (Table 4).")
def tanh_and_l2(results):
    experiment, lines, changes = comparison(results), [], []
    scores = {
        "20-NN": ("knn.top1", ".1f"),
        "linear": ("linear.top1", ".1f"),
        "codes, AMI": ("cluster[codes].ami", ".3f"),
    }
    for column in experiment.columns():
        for k in SIZES:
            line = {"": f"{column['name']}, K = {k}, tanh - l2"}
            for title, (score, form) in scores.items():
                samples = [values(experiment, f"CPLearn, {kind}, K = {k}", column, score) for kind in ("tanh", "l2")]
                change = difference(*samples)
                changes.append(change)
                line[title] = told(change, form)
            lines.append(line)
    if any(change is None for change in changes):
        return NOT_SEEN, as_table(lines)
    larger = sum(abs(by) > 2 * error for by, error in changes)
    return (CONFIRMED if not larger else REFUTED), (
        f"{larger} of {len(changes)} differences are larger than two standard errors.\n\n{as_table(lines)}"
    )


# ---- the projector's layers ------------------------------------------------------------------------------------------


@claim(
    "layers",
    "bare_head",
    "Linear and batch norm layers in the projector keep mean and variance of the features (Fig. 7).",
)
def layers_of_projector(results):
    experiment, lines, kept = read_experiment(ROOT / "bare_head.toml", "short", results=results), [], []
    for column in experiment.columns():
        for kind in ("tanh", "l2"):
            line = {"": f"{column['name']}, {kind}"}
            growth = []
            for name in ("linear and batch norm", "bare"):
                sizes = values(experiment, f"{kind}, {name}", column, "collapse.feature_std")
                means = values(experiment, f"{kind}, {name}", column, "collapse.feature_mean")
                if sizes:
                    growth.append(statistics.fmean(math.hypot(*pair) for pair in zip(means, sizes, strict=True)))
                line |= {
                    f"deviation, {name}": mean_and_spread(sizes, ".3g"),
                    f"mean, {name}": mean_and_spread(means, ".3g"),
                }
            lines.append(line)
            kept += [growth[0] < growth[1]] if len(growth) == 2 else []
    if len(kept) < len(lines):
        return NOT_SEEN, as_table(lines)
    verdict = CONFIRMED if all(kept) else REFUTED if not any(kept) else NOT_SEEN
    text = f"Features with the layers are smaller (root of mean^2 + variance) in {sum(kept)} of {len(kept)} pairs."
    return verdict, f"{text}\n\n{as_table(lines)}"


# ---- Theorem 1 -------------------------------------------------------------------------------------------------------

REACHED = 0.05  # nats between I and log K; fixed before the runs
RANKED = {"I": ("information", 1), "small gap": ("gap", -1), "small gap / trivial": ("gap_share", -1)}


@claim("theorem1", "theorem1", "The certificate gets small with all codes in use (Theorem 1, K = F, Hadamard codes), "
       "and such features are better.")  # fmt: skip
def theorem1(results):
    experiment, lines, reached, of_k = read_experiment(ROOT / "theorem1.toml", "short", results=results), [], {}, {}
    for column in experiment.columns():
        for row in experiment.rows():
            found = [r for r in experiment.finals(row, column) if done(r)]
            if not found:
                continue
            k = row["flags"]["out_dim"]
            short = [math.log(k) - score_of(r, "collapse.information") for r in found]
            used = [score_of(r, "collapse.codes_used") for r in found]
            good = sum(by < REACHED and codes == k for by, codes in zip(short, used, strict=True))
            reached.setdefault(column["name"], {}).setdefault(k, []).append(good / len(found))
            if column["name"] != "Planted":
                of_k.setdefault(k, []).extend(found)
            scores = {"gap": ".3f", "gap_share": ".2f", "alignment": ".3f", "off_diagonal_mass": ".3f"}
            line = {"": f"{column['name']}, {row['name']}", "log K - I (nats)": mean_and_spread(short, ".3f")}
            line["codes in use"] = mean_and_spread(used, ".1f")
            for name, form in scores.items():
                sample = [score_of(r, f"collapse.{name}") for r in found]
                line[name.replace("_", " ")] = mean_and_spread(sample, form)
            lines.append(line | {"20-NN": mean_and_spread([score_of(r, "knn.top1") for r in found], ".1f")})
    told = [f"{column}: {reaching(sizes)}" for column, sizes in reached.items()]
    ranked = {name: ranks_as_knn([r for found in of_k.values() for r in found], name) for name in RANKED}
    if None not in ranked.values():
        told.append(ranking(ranked, of_k))
    small = [max(shares) > 0.5 for column, sizes in reached.items() if column != "Planted" for shares in sizes.values()]
    verdict = REFUTED if small and not any(small) else NOT_SEEN
    if small and all(small) and (ranked["small gap / trivial"] or 0) > 0.8:
        verdict = CONFIRMED
    return verdict, f"{'. '.join(told)}.\n\n{as_table(lines)}"


def ranks_as_knn(found, name):
    score, sign = RANKED[name]
    return rank_correlation([(sign * score_of(r, f"collapse.{score}"), score_of(r, "knn.top1")) for r in found])


def ranking(ranked, of_k):
    """In words; ranked: the correlation of each of RANKED over all runs; of_k: for each K its runs."""
    within = [by for found in of_k.values() if (by := ranks_as_knn(found, "small gap / trivial")) is not None]
    return (
        f"Spearman's rank correlation with 20-NN over the {sum(map(len, of_k.values()))} runs on real images: "
        + ", ".join(f"{name} {value:.2f}" for name, value in ranked.items())
        + (f"; the last among the runs of one K, in the mean: {statistics.fmean(within):.2f}" if within else "")
    )


def reaching(sizes):
    """In words; sizes: for each K the share of runs, at each beta, that reach all of it with all codes in use."""
    told = [
        f"{often} for K = {', '.join(of)}"
        for often, of in {
            "in every run of some beta": [str(k) for k, shares in sizes.items() if max(shares) == 1],
            "in some runs": [str(k) for k, shares in sizes.items() if 0 < max(shares) < 1],
        }.items()
        if of
    ]
    return (
        f"log K - I below {REACHED} nats with all K codes in use {' and '.join(told) or 'in no run'}, of K = "
        f"{', '.join(map(str, sizes))}"
    )


# ---- choosing without labels -----------------------------------------------------------------------------------------

WITHOUT_LABELS = {  # score, and the sign in which more of it should be better
    "loss": ("log.train_loss", -1),
    "gap": ("collapse.gap", -1),
    "gap / trivial": ("collapse.gap_share", -1),
    "information": ("collapse.information", 1),
    "RankMe": ("collapse.rankme", 1),
    "alpha-ReQ": ("collapse.alpha", -1),
    "codes in use": ("collapse.codes_used", 1),
    "perplexity of codes": ("collapse.perplexity", 1),
}
OWN_ROWS, ALL_SYSTEMS = "CPLearn's rows", "all systems"
FEWEST_RUNS = 5  # that a rank correlation is made of
WITH_LABELS = {"20-NN": "knn.top1", "linear": "linear.top1", "k-means AMI": "cluster[k-means 10].ami"}


@claim("choice", "comparison", "(Ours.) What needs no labels ranks runs as scores with labels do.")
def choice(results):
    lines, found_by = [], {}
    for column, system, found in runs_by_system(results):
        line = {"": f"{column}, {system}", "runs": len(found)}
        group = system if system in (OWN_ROWS, ALL_SYSTEMS) else "the runs of one system's grid"
        for name, (free, sign) in WITHOUT_LABELS.items():
            ranked = []
            for score in WITH_LABELS.values():
                pairs = [(sign * x, y) for r in found if None not in (x := score_of(r, free), y := score_of(r, score))]
                ranked.append(rank_correlation(pairs))
            found_by.setdefault(group, {}).setdefault(name, []).extend(v for v in ranked if v is not None)
            line[name] = " / ".join("-" if value is None else f"{value:.2f}" for value in ranked)
        lines += [line] if len(found) >= FEWEST_RUNS else []
    means = {group: {name: statistics.fmean(v) for name, v in of.items() if v} for group, of in found_by.items()}
    means = {group: dict(sorted(of.items(), key=lambda item: -item[1])) for group, of in means.items() if of}
    if not means:
        return NOT_SEEN, as_table(lines)
    told = [f"- over {group}: {', '.join(f'{name} {v:.2f}' for name, v in of.items())}" for group, of in means.items()]
    good = [max(of.values()) > 0.8 for of in means.values()]
    verdict = CONFIRMED if all(good) else NOT_SEEN if any(good) else REFUTED
    return verdict, "\n".join([
        "Spearman's rank correlation, mean over data sets, grids and scores, each over the runs that have it: codes in "
        "use and perplexity over those with codes, gap, gap / trivial and information over CPLearn's alone.",
        "", *told, "",
        f"In the table: the correlation with {' / '.join(WITH_LABELS)}.", "", as_table(lines),
    ])  # fmt: skip


def runs_by_system(results):
    """Yields (column, whose runs, results): the runs of each grid, and of the rows; only runs of equal length together,
    for a longer one is better and has everything else different too."""
    experiment = comparison(results)
    for column in experiment.columns():
        rows = [row for row in experiment.rows() if "objective" in row["flags"]]
        for row in rows:
            if "tune" in row:
                tried, _ = experiment.search(row, column)
                found = {cell.name: r for cell in tried if (r := experiment.read(cell)) is not None and done(r)}
                yield column["name"], f"grid of {row['name']}", list(found.values())
        finals = [r for row in rows for r in experiment.finals(row, column) if done(r)]
        yield column["name"], OWN_ROWS, [r for r in finals if r["row"] in CPLEARN]
        yield column["name"], ALL_SYSTEMS, finals


def rank_correlation(pairs):
    """Spearman's, or None where it has no meaning."""
    if len(pairs) < FEWEST_RUNS or len({x for x, _ in pairs}) < 2 or len({y for _, y in pairs}) < 2:
        return None
    return float(spearmanr(*zip(*pairs, strict=True)).statistic)


# ---- what they share -------------------------------------------------------------------------------------------------


def comparison(results):
    return read_experiment(ROOT / "comparison.toml", "short", results=results)


def done(result):
    return result["status"] == "done"


def values(experiment, name, column, score):
    """One number per seed of the row of this name."""
    row = next(row for row in experiment.rows() if row["name"] == name)
    found = [score_of(result, score, row.get("take", "trained")) for result in experiment.finals(row, column)]
    return [value for value in found if value is not None]


def difference(these, those):
    """(mean of these - mean of those, its standard error); None where one has fewer than two."""
    if min(len(these), len(those)) < 2:
        return None
    error = math.sqrt(sum(statistics.variance(sample) / len(sample) for sample in (these, those)))
    return statistics.fmean(these) - statistics.fmean(those), error


def judge(changes):
    """Confirmed where all rise by more than two standard errors, refuted where more fall than rise."""
    if any(change is None for change in changes):
        return NOT_SEEN
    rise = sum(by > 2 * error for by, error in changes)
    fall = sum(by < -2 * error for by, error in changes)
    return CONFIRMED if rise == len(changes) else REFUTED if fall > rise else NOT_SEEN


def told(change, form):
    return None if change is None else f"{change[0]:+{form}} ± {change[1]:{form}}"


def mean_and_spread(sample, form):
    return describe(sample, form) if sample else None


def as_table(lines):
    titles = dict.fromkeys(key for line in lines for key in line)
    return markdown_table([{k: None if v is None else str(v) for k, v in line.items()} for line in lines],
                          {title: (title, "") for title in titles})  # fmt: skip
