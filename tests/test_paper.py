"""The paper's tables and figures as experiments: which there are, what they run, and figures of what was kept."""

import json
import re

import numpy as np
import pytest
import torch

import main_cplearn
import run_experiments
from experiments import ROOT, Experiment, figures, read_experiment, words_of
from utils import UserError

FILES = ("table1", "table2", "table3", "table4", "table9", "fig3", "fig7")
BETA = {10: 0.5, 128: 0.5, 256: 0.25, 512: 0.25, 1024: 0.1, 2048: 0.1, 4096: 0.1, 8192: 0.05, 16384: 0.05}  # Table 7


def paper(name, budget="paper"):
    return read_experiment(ROOT / f"{name}.toml", budget)


def test_each_table_and_figure_of_the_paper_is_one_files():
    named = []
    for name in FILES:
        spec = paper(name).spec
        named += spec["paper"] + sorted(
            {re.sub("[a-z]$", "", f["paper"]) for f in spec.get("figure", []) if "paper" in f}
        )
    tables = [f"Table {n}" for n in (1, 2, 3, 4, 8, 9)]
    assert sorted(named) == sorted([*tables, *(f"Figure {n}" for n in range(3, 17))])


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("budget", ["paper", "short", "smoke"])
def test_every_row_is_a_command_whose_flags_its_objective_reads(name, budget):
    experiment, parser = paper(name, budget), main_cplearn.get_args_parser()
    for column in experiment.columns():
        for row in experiment.rows():
            parser.parse_args(words_of(experiment.flags(row, column)))  # which ends the process for one it refuses
    assert len({cell.name for cell in experiment.plan()}) == len(experiment.plan()) > 0


def test_settings_are_the_papers():
    experiment = paper("table1")
    columns = {column["name"]: column for column in experiment.columns()}
    for row in experiment.rows():
        for name, column in columns.items():
            flags = experiment.flags(row, column)
            assert flags["lr"] * flags["batch_size_per_gpu"] / 256 == pytest.approx(1e-4)  # Table 6
            assert flags["epochs"] == (20 if name == "SVHN" else 200) and flags["augmentation"] == "small"
            assert flags["width"] == (256 if name == "CIFAR-100" else 128) and flags["weight_decay"] == 0
            if flags["objective"] == "cplearn":
                assert flags["beta"] == BETA[flags["out_dim"]] and flags["activation"] == "tanh"
            if "(c = k)" in row["name"]:
                assert flags["out_dim"] == (100 if name == "CIFAR-100" else 10)
        assert len(experiment.seeds(row)) == 5
    row = {row["name"]: row for row in experiment.rows()}["Barlow"]
    assert "out_dim" not in experiment.flags(row, columns["SVHN"])  # it has no codes
    betas = [
        experiment.flags(row, column)["beta"] for column in paper("table4").columns() for row in paper("table4").rows()
    ]
    assert betas == [0.5, 0.5, 0.5, 0.5, 0.05, 0.05] * 2 + [0.5, 0.5, 0.25, 0.25, 0.05, 0.05]


def test_where_two_tables_print_one_run_their_values_agree():
    """But for the linear probe of 16384 codes on CIFAR-10, which the paper has in two ways, as table4.toml tells."""
    first, fourth = ({row["name"]: row.get("paper") for row in paper(name).rows()} for name in ("table1", "table4"))
    for column in ("SVHN", "CIFAR-10", "CIFAR-100"):
        full = "CPLearn, K = 256" if column == "CIFAR-100" else "CPLearn, K = 128"
        for ours, theirs in (("CPLearn, K = 10", "10"), (full, "f"), ("CPLearn, K = 16384", "16384")):
            a, b = first[ours][column], fourth[f"c = {theirs}, Tanh"][column]
            assert a["codes NMI"] == b["codes NMI"]
            assert a["linear"] == b["linear"] or (column, theirs) == ("CIFAR-10", "16384")
    second = {row["name"]: row["paper"]["CIFAR-10"]["linear"] for row in paper("table2").rows() if "paper" in row}
    ninth = {row["name"]: row["paper"]["CIFAR-10"]["linear"] for row in paper("table9").rows() if "paper" in row}
    assert second["CPLearn (c = f)"] == ninth["beta = 1"]  # from which table9 takes its number of codes


# ---- figures ---------------------------------------------------------------------------------------------------------

SPEC = {
    "budget": {"b": {"seeds": [0, 1]}},
    "column": [{"name": "A"}],
    "row": [
        {"name": "K = 4", "flags": {"out_dim": 4}, "paper": {"A": {"linear": "60 ± 2"}}},
        {"name": "K = 16", "flags": {"out_dim": 16}},
    ],
    "score": [{"name": "linear", "from": "linear.top1", "chance": "linear.chance", "times": 10}],
    "evaluate": {"linear": {}},
}


@pytest.fixture
def kept(tmp_path):
    """An experiment of two rows and two seeds with what was kept of its cells."""
    experiment = Experiment("some", SPEC, "b", results=tmp_path)
    for cell in experiment.plan():
        better = cell.seed + cell.flags["out_dim"]
        rows = [{"checkpoint": name, "top1": top1 + better, "chance": 1.0}
                for name, top1 in (("trained", 2), ("checkpoint0001.pth", 1))]  # fmt: skip
        mixtures = [{"components": 2, "entropy": better}, {"components": 5, "entropy": 2 * better}]
        result = {"status": "done", "seed": cell.seed, "scores": {"linear": rows}, "log": {"epoch": 2}}
        result["kept"] = {"collapse": {"curves.spectrum": [3.0, 1.0], "curves.mixtures": mixtures}}
        result["lines"] = {"step": [1, 2, 3], "loss": [3.0, None, 1.0]}
        experiment.path(cell).parent.mkdir(parents=True, exist_ok=True)
        experiment.path(cell).write_text(json.dumps(result))
    return experiment


@pytest.fixture(scope="module")
def plt():
    import evaluation

    return evaluation.pyplot()


def lines_of(axis):
    return {line.get_label(): np.array(line.get_xydata()).tolist() for line in axis.lines}


def test_a_curve_is_the_mean_over_seeds_with_chance_and_the_papers_value(plt, kept):
    drawn = figures.draw_curve(plt, kept, {"name": "", "x": "out_dim", "scores": ["linear"]})
    found = lines_of(drawn.axes[0])
    assert found["A"] == [[4, 65], [16, 185]]  # 10 (2 + K + the mean seed)
    assert found["A: chance"] == [[4, 1], [16, 1]]
    (of_paper,) = drawn.axes[0].containers
    assert of_paper.lines[0].get_xydata().tolist() == [[4, 60]] and of_paper.has_yerr
    band = drawn.axes[0].collections[0].get_paths()[0].vertices
    assert {60, 70} == set(band[band[:, 0] == 4, 1])  # the seeds of the first point


def test_a_curve_is_drawn_of_the_seeds_that_have_been_run(plt, kept):
    kept.path(next(cell for cell in kept.plan() if cell.seed and cell.flags["out_dim"] == 16)).unlink()
    drawn = figures.draw_curve(plt, kept, {"name": "", "x": "out_dim", "scores": ["linear"]})
    assert lines_of(drawn.axes[0])["A"] == [[4, 65], [16, 180]]  # two seeds, and the first


def test_lines_have_a_panel_for_each_key_and_a_line_for_each_row(plt, kept):
    spectrum = {"name": "", "kind": "lines", "keys": ["collapse.curves.spectrum"]}
    assert lines_of(figures.draw_lines(plt, kept, spectrum).axes[0])["K = 16"] == [[1, 3], [2, 1]]
    as_shares = lines_of(figures.draw_lines(plt, kept, spectrum | {"relative": True}).axes[0])["K = 16"]
    assert as_shares == [[1, 1], [2, 1 / 3]]
    mixtures = {"name": "", "kind": "lines", "keys": ["collapse.curves.mixtures.entropy"], "x": "components"}
    assert lines_of(figures.draw_lines(plt, kept, mixtures).axes[0])["K = 4"] == [[2, 4.5], [5, 9]]
    log = {"name": "", "kind": "log", "keys": ["loss"], "rows": ["K = 1*"]}
    assert lines_of(figures.draw_lines(plt, kept, log).axes[0]) == {"K = 16": [[1, 3], [3, 1]]}
    epochs = {"name": "", "kind": "epochs", "scores": ["linear"], "rows": ["K = 4"]}
    assert lines_of(figures.draw_lines(plt, kept, epochs).axes[0]) == {"K = 4": [[1, 55], [3, 65]]}


def test_pictures_are_of_the_first_seed_and_what_is_missing_is_said(plt, kept, capsys):
    figure = {"name": "", "kind": "pictures", "file": "matrices_*.png", "crop": [0, 0.5, 1, 1]}
    kept.spec = SPEC | {"figure": [figure]}
    first, *_ = (cell for cell in kept.plan() if cell.row == "K = 4")
    assert [kept.pictures_of(cell) for cell in kept.plan() if cell.row == "K = 4"] == [["matrices_*.png"], []]
    halves = np.concatenate([np.zeros((4, 6, 3)), np.ones((4, 6, 3))])
    plt.imsave(kept.picture(first.name, "matrices_*.png"), halves)
    drawn = figures.draw_pictures(plt, kept, figure)
    (picture,) = [image for axis in drawn.axes for image in axis.images]
    assert picture.get_array().shape[:2] == (4, 6) and (picture.get_array() == 1).all()  # the lower half
    assert "not drawn for K = 16" in capsys.readouterr().out


def test_a_figure_of_nothing_is_said_and_one_of_another_kind_refused(plt, tmp_path, capsys):
    empty = Experiment("some", SPEC, "b", results=tmp_path)
    figures.draw(plt, empty, {"name": "N", "kind": "log", "keys": ["loss"]})
    assert capsys.readouterr().out == "N: without K = 4, A; K = 16, A: not run, or failed\nN: nothing to show yet\n"
    with pytest.raises(UserError, match="kind pie; expected one of curve"):
        figures.draw(plt, empty, {"name": "N", "kind": "pie"})


# ---- what of a cell is kept for them ---------------------------------------------------------------------------------


@pytest.fixture
def runner(tmp_path):
    spec = SPEC | {"figure": [{"name": "", "kind": "pictures", "file": "matrices_*.png"}]}
    spec["evaluate"] = {"linear": {"protocol": "adam", "checkpoints": "all"}}
    experiment = Experiment("some", spec, "b", results=tmp_path / "results")
    words = ["some.toml", "--output_dir", str(tmp_path / "runs")]
    return run_experiments.Runner(experiment, run_experiments.get_args_parser().parse_args(words))


def test_an_evaluation_of_all_checkpoints_names_each_state_once(runner):
    cell = runner.experiment.plan()[0]
    folder = runner.folder_of(cell)
    folder.mkdir(parents=True)
    for name in ("checkpoint.pth", "checkpoint0002.pth", "checkpoint0010.pth", "checkpoint0012.pth"):
        (folder / name).touch()  # the last of the copies is checkpoint.pth itself
    words = runner.evaluation(cell, "linear")
    files = [str(folder / name) for name in ("checkpoint.pth", "checkpoint0002.pth", "checkpoint0010.pth")]
    assert words[: words.index("--seed")] == ["eval_linear.py", "--checkpoint", *files]
    assert "--checkpoints" not in words
    rows = [{"checkpoint": name, "top1": i} for i, name in enumerate(("checkpoint.pth", "checkpoint0002.pth"))]
    (folder / "results_linear.json").write_text(json.dumps({"rows": rows}))
    assert [row["checkpoint"] for row in runner.rows_of(cell, "linear", folder)] == ["trained", "checkpoint0002.pth"]


def test_pictures_lie_beside_the_json_and_a_missing_one_is_no_error(runner):
    cell, other = runner.experiment.plan()[:2]
    for one in (cell, other):
        runner.folder_of(one).mkdir(parents=True)
    (runner.folder_of(cell) / "matrices_a_checkpoint.png").write_bytes(b"drawn")
    for one in (cell, other):
        runner.keep_pictures(one, runner.folder_of(one))
    assert [p.name for p in runner.experiment.results.iterdir()] == [f"{cell.name}.matrices.png"]


def test_sizes_are_of_the_file_and_of_its_weights(tmp_path):
    weights = {"backbone.w": torch.zeros(2**18), "head.codes": torch.zeros(2**19, dtype=torch.int8)}
    torch.save({"student": weights, "optimizer": torch.zeros(2**18)}, tmp_path / "checkpoint.pth")
    sizes = run_experiments.sizes_mib(tmp_path / "checkpoint.pth")
    assert sizes["state_dict_mib"] == 1.5 and sizes["checkpoint_mib"] == pytest.approx(2.5, abs=0.01)
