"""docs/results.md: every number in it comes from a committed JSON file; and what tables and claims make of cells."""

import json
import math
import re
import statistics
from pathlib import Path

import pytest
from scipy import stats

import main_cplearn
from experiments import RESULTS, ROOT, Experiment, claims, pages, read_experiment, tables, words_of
from optimizer import default_lr
from utils import UserError

PAGE = pages.PAGES[0]


@pytest.mark.parametrize("page", pages.PAGES, ids=lambda page: page.name)
def test_the_page_is_what_the_results_come_to(page):
    text = page.read_text()
    assert pages.refreshed(text) == text, "python -m experiments.pages writes it anew"
    assert len(pages.BLOCK.findall(text)) == text.count("<!-- end -->") > 0


def test_outside_of_blocks_the_page_has_no_result():
    """Numbers in its prose are sizes and settings, named here; scores stand in blocks alone."""
    prose = re.sub(r"!\[.*?\]\(.*?\)", "", pages.BLOCK.sub("", PAGE.read_text()))
    numbers = {word.strip(".,;:()%") for word in prose.split() if any(c.isdigit() for c in word)}
    names = {"l2", "20-NN", "CIFAR-10", "cifar10=FOLDER`"}
    assert numbers - names <= {"28", "32", "0.07", "0.8", "800", "1", "75"}, "say it in a block"


def test_committed_cells_tell_what_they_were():
    for path in sorted(RESULTS.rglob("*.json")):
        text, cell = path.read_text(), json.loads(path.read_text())
        assert path.is_relative_to(RESULTS / cell["experiment"] / cell["budget"]), path
        assert cell["status"] in ("done", "failed") and cell["commit"] and "dirty" not in cell["commit"], path
        assert "/tmp" not in text and str(Path.home()) not in text, path
        if cell["status"] == "done":
            assert cell["cpu_s"]["train"] > 0 and cell["scores"] and cell["versions"]["torch"], path


def grids(flag):
    """(row, column, values of other flags) -> {value of this one: top-1 of a linear probe on held-out training images};
    of the comparison's grids, systems without labels."""
    found = {}
    for path in (RESULTS / "comparison" / "short" / "grid").glob("*.json"):
        cell = json.loads(path.read_text())
        if cell["row"] != "Supervised" and flag in cell["chosen"]:
            (linear,) = cell["scores"]["linear"]
            rest = {name: value for name, value in cell["chosen"].items() if name != flag}
            grid = found.setdefault((cell["row"], cell["column"], json.dumps(rest)), {})
            grid[cell["chosen"][flag]] = linear["held_out_top1"]
    return found


def test_the_default_rate_of_small_images_is_never_far_from_a_system_s_best():
    whole = [grid for grid in grids("lr").values() if len(grid) == 4]
    assert len(whole) >= 15
    below = {lr: [max(grid.values()) - grid[lr] for grid in whole] for lr in whole[0]}
    own = below.pop(default_lr(28))
    assert default_lr(28) == default_lr(32) != default_lr(224) and max(own) < 2.5  # points
    assert all(statistics.mean(own) < statistics.mean(other) and max(own) < max(other) for other in below.values())


def test_the_default_beta_is_near_the_best_of_every_grid():
    whole = [grid for (row, *_), grid in grids("beta").items() if len(grid) == 3 and row.startswith("CPLearn")]
    assert len(whole) >= 6
    nearest = min(whole[0], key=lambda beta: abs(beta - main_cplearn.get_args_parser().parse_args([]).beta))
    below = {beta: [max(grid.values()) - grid[beta] for grid in whole] for beta in whole[0]}
    assert nearest == 0.3 and max(below[nearest]) < 1.5  # points
    assert max(below[nearest]) == min(max(points) for points in below.values())


# ---- a table, by hand ------------------------------------------------------------------------------------------------


SPEC = {
    "budget": {"short": {"seeds": [0, 1, 2]}},
    "column": [{"name": "C"}],
    "row": [{"name": "A", "paper": {"C": {"linear": "0.65 ± 0.00"}}}, {"name": "B"}],
    "evaluate": {"linear": {}, "cluster": {}},
    "score": [
        {"name": "linear", "from": "linear.top1", "format": ".1f"},
        {"name": "codes NMI", "from": "cluster[codes].nmi", "chance": "cluster[codes].nmi_chance", "format": ".2f"},
        {"name": "collapse", "from": "linear.verdict"},
    ],
}


@pytest.fixture
def experiment(tmp_path):
    return Experiment("mine", SPEC, "short", results=tmp_path)


def put(experiment, row, seed, **scores):
    (column,) = experiment.columns()
    row = next(r for r in experiment.rows() if r["name"] == row)
    cell = experiment.cell(row, column, seed, {})
    path = experiment.path(cell)
    path.parent.mkdir(parents=True, exist_ok=True)
    linear = {"checkpoint": "trained", "top1": scores.get("top1"), "verdict": scores.get("verdict", "none")}
    cluster = [{"checkpoint": "trained", "method": "k-means 10", "nmi": 0.9, "nmi_chance": 0.0},
               {"checkpoint": "trained", "method": "codes", "nmi": 0.5, "nmi_chance": 0.25}]  # fmt: skip
    kept = {"status": scores.get("status", "done"), "row": row["name"], "column": "C", "seed": seed, "commit": "abc",
            "cpu_s": {"train": 3600.0}, "scores": {"linear": [linear], "cluster": cluster}}  # fmt: skip
    path.write_text(json.dumps(kept))


def lines_of(text):
    rows = [[part.strip() for part in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]


def test_mean_and_sample_deviation_over_seeds(experiment):
    for seed, top1 in enumerate((50.0, 51.0, 53.0)):
        put(experiment, "A", seed, top1=top1)
    first, second = lines_of(tables.table(experiment, experiment.columns()[0]))
    assert first["linear"] == f"{154 / 3:.1f} ± {math.sqrt(7 / 3):.1f}"
    assert first["linear, paper"] == "0.65 ± 0.00" and first["codes NMI"] == "0.50 ± 0.00 (0.25)"
    assert set(second.values()) == {"B", "-"}


def test_what_is_missing_or_failed_is_said(experiment):
    put(experiment, "A", 0, top1=50.0, verdict="cluster")
    put(experiment, "A", 1, top1=52.0)
    put(experiment, "B", 0, status="failed")
    first, second = lines_of(tables.table(experiment, experiment.columns()[0]))
    assert first["linear"] == "51.0 ± 1.4 (n = 2)" and first["collapse"] == "cluster (1 of 2); none (1 of 2) (n = 2)"
    assert second["linear"] == "failed (1 of 1)"


@pytest.mark.parametrize(
    "name, level", [("comparison", "the same codes under permuted labels"), ("theorem1", "codes in random directions")]
)
def test_a_level_of_chance_is_named_for_what_it_is(name, level):
    of = read_experiment(ROOT / f"{name}.toml", "short")
    assert f"In brackets: {level}." in tables.table(of, of.columns()[1])


def test_what_has_not_been_run_is_no_table_of_dashes(experiment):
    command = "`python run_experiments.py experiments/mine.toml --budget short`"
    assert tables.table(experiment, experiment.columns()[0]) == f"C: not run yet. {command}"
    assert tables.summary(experiment, ["linear"]) == f"Not run yet. {command}"


def test_a_summary_has_the_scores_that_are_named_of_the_data_sets_that_have_any(experiment):
    put(experiment, "A", 0, top1=50.0)
    put(experiment, "A", 1, top1=52.0)
    experiment.spec["column"].append({"name": "not run"})
    text = tables.summary(experiment, ["linear"])
    assert lines_of(text) == [{"": "A", "C, linear": "51.0 ± 1.4 (n = 2)"}, {"": "B", "C, linear": "-"}]
    assert "2 cells, 2.0 CPU-hours" in text and "brackets" not in text
    text = tables.summary(experiment, ["linear", "codes NMI"])
    assert "C, codes NMI" in text and "In brackets" in text


def test_a_block_that_means_nothing_is_one_line():
    with pytest.raises(UserError, match="nonsense"):
        pages.refreshed("<!-- claim nonsense -->\n<!-- end -->")


# ---- claims ----------------------------------------------------------------------------------------------------------


def test_a_difference_and_its_error_are_welchs():
    these, those = [50.0, 51.0, 53.5], [48.0, 49.5, 49.0]
    by, error = claims.difference(these, those)
    assert by / error == pytest.approx(stats.ttest_ind(these, those, equal_var=False).statistic)
    assert claims.difference([1.0], those) is None


@pytest.mark.parametrize(
    "changes, verdict",
    [
        ([(2.0, 0.5), (1.0, 0.4)], claims.CONFIRMED),
        ([(2.0, 0.5), (1.0, 0.6)], claims.NOT_SEEN),
        ([(-2.0, 0.5), (0.1, 0.6)], claims.REFUTED),
        ([(2.0, 0.5), None], claims.NOT_SEEN),
    ],
)
def test_a_verdict_needs_two_standard_errors_everywhere(changes, verdict):
    assert claims.judge(changes) == verdict


def test_scores_that_rise_and_fall_are_counted_by_the_same_rule():
    assert claims.ups_and_downs([(2.0, 0.5), (1.0, 0.6), (-2.0, 0.5), None]) == "1 of 4 scores rise, 1 fall"


def test_rank_correlation_by_hand():
    pairs = list(zip((1, 2, 3, 4, 5), (2, 1, 4, 3, 5), strict=True))
    assert claims.rank_correlation(pairs) == pytest.approx(1 - 6 * 4 / (5 * 24))
    assert claims.rank_correlation(pairs[:4]) is None and claims.rank_correlation([(1, y) for _, y in pairs]) is None


def test_the_first_warning_is_the_first_line_below_a_quarter_after_the_warm_up():
    lines = {"step": [40, 80, 100, 110], "batch_perplexity": [1, 33, 31, 2], "images_per_mean": [128] * 4}
    result = {"lines": lines | {"train_lr": [1e-3, 2e-3, 1.9e-3, 1.5e-3]}}
    assert claims.first_warning(result, 1024) == 100  # 128 / 4 = 32
    assert claims.first_warning(result, 16) == 110  # 16 / 4


def plant_betas(results, last, few):
    """One seed of every beta of K = 128: K exp(-prior) of its last line, and whether few codes were in use."""
    experiment = read_experiment(ROOT / "beta.toml", "short", results=results)
    for row in [row for row in experiment.rows() if row["flags"]["out_dim"] == 128]:
        beta, path = row["flags"]["beta"], experiment.path(experiment.cell(row, experiment.columns()[0], 0, {}))
        scores = {"collapse": [{"checkpoint": "trained", "verdict": "cluster" if few(beta) else "none"}],
                  "knn": [{"checkpoint": "trained", "top1": 50 - beta}]}  # fmt: skip
        lines = {"step": [10, 20], "train_lr": [2.0, 1.0], "batch_perplexity": [128, last(beta)]}
        path.parent.mkdir(parents=True, exist_ok=True)
        lines["images_per_mean"] = [128, 128]
        path.write_text(json.dumps({"status": "done", "row": row["name"], "scores": scores, "lines": lines}))


@pytest.mark.parametrize(
    "cliff, verdict, holds, falls", [(1.0, claims.CONFIRMED, "1.0", "1.1"), (0.5, claims.REFUTED, "0.5", "0.75")]
)
def test_the_cliff_is_where_the_prior_gives_way(tmp_path, cliff, verdict, holds, falls):
    plant_betas(tmp_path, last=lambda beta: 64 if beta <= cliff else 63, few=lambda beta: beta > 1.5)
    told = claims.CLAIMS["beta"](tmp_path)
    (line,) = lines_of(told)
    assert f"Verdict: **{verdict}**" in told and list(line.values())[2:4] == [holds, falls]
    assert list(line.values())[-1] == "2.0" and line["20-NN there"] == f"{50 - cliff:.1f} → {50 - float(falls):.1f}"


@pytest.mark.parametrize("last, verdict", [(31, claims.CONFIRMED), (33, claims.REFUTED)])
def test_the_warning_is_judged_by_the_verdict_of_the_evaluation(tmp_path, last, verdict):
    plant_betas(tmp_path, last=lambda beta: last if beta > 1 else 100, few=lambda beta: beta > 1)
    told = claims.CLAIMS["warning"](tmp_path)
    number = {31: 4, 33: 0}[last]  # betas 1.1, 1.25, 1.5, 2.0
    assert f"Verdict: **{verdict}**" in told and "7 runs of" in told and f" {number} were told" in told
    assert f"of 4 whose prior had given way by the last line {number} were told, of 3 whose prior held 0." in told


def test_every_claim_says_so_where_nothing_has_been_run(tmp_path):
    for name, told in claims.CLAIMS.items():
        assert f"Verdict: **{claims.NOT_RUN}**. `python run_experiments.py" in told(tmp_path), name


def plant(results, name, accuracies):
    """A cell for each row and its accuracies of epochs; its 20-NN and AMI are the last of them."""
    experiment = read_experiment(ROOT / f"{name}.toml", "short", results=results)
    for row in (row for row in experiment.rows() if row["name"] in accuracies):
        *early, last = accuracies[row["name"]]
        linear = [{"checkpoint": f"checkpoint{epoch:04}.pth", "top1": top1} for epoch, top1 in enumerate(early, 1)]
        scores = {
            "linear": [*linear, {"checkpoint": "trained", "top1": last}],
            "knn": [{"checkpoint": "trained", "top1": last}],
            "cluster": [{"checkpoint": "trained", "method": "k-means 10", "ami": last / 100}],
        }
        path = experiment.path(experiment.cell(row, experiment.columns()[0], 0, {}))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"status": "done", "row": row["name"], "scores": scores, "log": {"epoch": 3}}))


def test_the_order_of_longer_runs_is_that_of_shorter_ones_or_not(tmp_path, monkeypatch):
    without_grid = read_experiment(ROOT / "comparison.toml", "short", results=tmp_path)
    without_grid.at_budget["tune"] = False
    monkeypatch.setattr(claims, "comparison", lambda results: without_grid)
    own, *rivals = (row["name"] for row in read_experiment(ROOT / "longer.toml", "short").rows())
    plant(tmp_path, "comparison", {own: [80.0], rivals[0]: [79.0], rivals[1]: [78.0]})
    for last, verdict in ((81.0, claims.CONFIRMED), (84.0, claims.REFUTED)):
        plant(tmp_path, "longer", {own: [70.0, 83.0], rivals[0]: [70.0, last], rivals[1]: [70.0, 80.5]})
        assert f"Verdict: **{verdict}**" in claims.CLAIMS["longer"](tmp_path)


@pytest.mark.parametrize(
    "own, verdict",
    [
        ([60, 70, 75, 75], claims.CONFIRMED),  # ahead in the first two of four epochs
        ([54, 59, 90, 90], claims.REFUTED),
        ([60, 60, 90, 90], claims.NOT_SEEN),
    ],
)
def test_convergence_is_judged_by_the_first_half_of_the_epochs(tmp_path, own, verdict):
    names = [row["name"] for row in read_experiment(ROOT / "longer.toml", "short").rows()]
    plant(tmp_path, "longer", dict(zip(names, (own, [55, 65, 80, 80], [50, 55, 60, 60]), strict=True)))
    told = claims.CLAIMS["convergence"](tmp_path)
    assert f"Verdict: **{verdict}**" in told
    assert lines_of(told)[0]["epoch 4"] == f"{own[-1]:.1f}"


def test_statistics_of_the_table_are_sample_statistics():
    assert tables.describe([1.0, 2.0, 4.0], ".3f") == f"{7 / 3:.3f} ± {statistics.stdev([1.0, 2.0, 4.0]):.3f}"


def test_experiments_of_the_page_are_there():
    for name in ("comparison", "beta", "demo"):
        assert read_experiment(ROOT / f"{name}.toml", "short").rows()


def test_the_demo_of_the_page_is_the_demo_of_the_makefile():
    """Flags of `make demo` beside those of experiments/demo.toml, rate and beta as its grid chose them."""
    makefile = (ROOT.parent / "Makefile").read_text().replace("\\\n", " ")
    words = next(line for line in makefile.splitlines() if line.startswith("DEMO_FLAGS")).split(":=")[1].split()
    experiment = read_experiment(ROOT / "demo.toml", "short")
    (column,), row = experiment.columns(), experiment.rows()[-1]
    _, chosen = experiment.search(row, column)
    ours = main_cplearn.get_args_parser().parse_args(words_of(experiment.flags(row, column) | (chosen or {})))
    assert vars(main_cplearn.get_args_parser().parse_args(words)) == vars(ours)


def run_of_theorem1(information, gap_share, knn):
    scores = {
        "collapse": [{"checkpoint": "trained", "information": information, "gap_share": gap_share}],
        "knn": [{"checkpoint": "trained", "top1": knn}],
    }
    return {"status": "done", "scores": scores}


def test_theorem_1_says_what_ranks_runs_as_k_nn_does_over_all_and_within_one_k():
    gaps = [5, 3, 4, 2, 1]  # of runs in the order of their 20-NN: two neighbours are swapped
    of_k = {k: [run_of_theorem1(k + n, k + gap, k + n) for n, gap in enumerate(gaps)] for k in (10, 20)}
    found = [run for runs in of_k.values() for run in runs]
    assert claims.ranks_as_knn(found, "I") == pytest.approx(1)
    assert claims.ranks_as_knn(found, "small gap / trivial") < 0  # the larger K has the larger gaps
    assert claims.ranks_as_knn(of_k[10], "small gap / trivial") == pytest.approx(1 - 6 * 2 / (5 * 24))
    told = claims.ranking({"I": 1.0}, of_k)
    assert told.endswith("10 runs on real images: I 1.00; the last among the runs of one K, in the mean: 0.90")


def test_how_often_the_bound_is_reached_is_told_by_its_best_beta():
    told = claims.reaching({2: [1, 0.5], 4: [0, 0.5], 8: [0, 0]})
    assert told == (
        "log K - I below 0.05 nats with all K codes in use in every run of some beta for K = 2 and in some runs for "
        "K = 4, of K = 2, 4, 8"
    )
    assert "in use in no run, of K = 8" in claims.reaching({8: [0, 0]})
