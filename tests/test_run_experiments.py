"""run_experiments.py: which cells there are, what a cell leaves, and that what happens to a run costs no more than it
must. The commands of most tests are experiment_stub.py's."""

import contextlib
import json
import multiprocessing as mp
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import images
import run_experiments
from experiments import ROOT as EXPERIMENTS
from experiments import Experiment, best_of, read_experiment, score_of, slug, tomllib, words_of
from run_experiments import ROOT

FILES = sorted(EXPERIMENTS.glob("*.toml"))
STUB = "tests/experiment_stub.py"
TABLE = f"""
title = "a stub"
flags = {{ lr = 0.1 }}
[budget.few]
seeds = [0, 1]
[[column]]
name = "One"
flags = {{ weight = 1.0 }}
[evaluate.knn]
script = "{STUB}"
scores = "knn"
[[row]]
name = "Plain"
script = "{STUB}"
"""
GRID = f"""
[tune]
first = [["lr", [0.1, 0.01]]]
flags = {{ dataset = "part" }}
evaluate = ["knn"]
score = "knn.top1"
[[row]]
name = "Tuned"
script = "{STUB}"
flags = {{ weight = 2.0 }}
tune = [["weight", [3.0, 2.0]]]
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Relative paths are below tmp_path, and another start is looked at again soon."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_experiments, "LOOK_AGAIN_S", 0.1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.save({"student": {"weight": torch.zeros(2**18)}}, "empty.pth")  # of 1 MiB: what the stub leaves


def run(text=TABLE, *words):
    """-> exit code of a run in this process."""
    try:
        run_experiments.main(words_for(text, *words))
    except SystemExit as end:
        return end.code
    return 0


def words_for(text, *words):
    Path("table.toml").write_text(text)
    return ["table.toml", "--budget", "few", "--output_dir", "runs", "--results_dir", "results", *words]


def results():
    """{name: what was kept}."""
    folder = Path("results/table/few")
    return {str(path.relative_to(folder))[:-5]: json.loads(path.read_text()) for path in folder.rglob("*.json")}


def came(cell):
    """What its stub has noted."""
    path = Path("runs/table/few", cell, "what_came.txt")
    return path.read_text().split("\n")[:-1] if path.exists() else []


class Start:
    """A start of the runner in a process of its own, with a process group of its own."""

    def __init__(self, text, *words):
        self.said = Path(f"said_{time.monotonic_ns()}.txt")
        self.process = mp.get_context("fork").Process(target=self._run, args=(words_for(text, *words),), daemon=True)
        self.process.start()

    def _run(self, words):
        os.setsid()
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where the tests are run under nohup
        output = os.open(self.said, os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
        run_experiments.main(words)

    def end(self, number=None, group=False):
        """-> exit code, after a signal."""
        if number is not None:
            (os.killpg if group else os.kill)(self.process.pid, number)
        self.process.join(60)
        return self.process.exitcode


def until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# ---- which cells -----------------------------------------------------------------------------------------------------


def experiment(text, **options):
    Path("table.toml").write_text(text)
    return read_experiment("table.toml", "few", results="results", **options)


def keep(cell, top1):
    """As if the cell had come to this score; None: as if it had failed."""
    found = {"status": "failed"} if top1 is None else {"status": "done"}
    path = Path("results/table/few", f"{cell.name}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found | {"scores": {"knn": [{"checkpoint": "trained", "top1": top1}]}}))


def test_a_grid_is_searched_flag_after_flag_and_what_it_chose_is_trained():
    table = experiment(TABLE + GRID)

    def names():
        return [cell.name for cell in table.plan()]

    first = [f"grid/Tuned,One,lr={lr},weight=2.0,seed0" for lr in (0.1, 0.01)]
    plain = ["Plain,One,seed0", "Plain,One,seed1"]
    assert names() == [*first, *plain]
    for cell, top1 in zip(table.plan()[:2], (40.0, 40.5), strict=True):
        assert cell.flags == {"lr": cell.chosen["lr"], "weight": 2.0, "dataset": "part"} and cell.seed == 0
        keep(cell, top1)
    second = [f"grid/Tuned,One,lr=0.01,weight={weight},seed0" for weight in (3.0, 2.0)]
    assert names() == [*first, second[0], *plain]  # its other value has been run
    keep(table.plan()[2], 40.5)  # as good: the first of the list wins
    cells = table.plan()
    assert [cell.name for cell in cells[3:]] == [plain[0], "Tuned,One,seed0", plain[1], "Tuned,One,seed1"]
    assert cells[4].flags == {"lr": 0.01, "weight": 3.0} and cells[4].chosen == cells[4].flags


def test_a_row_takes_the_choice_of_the_row_that_it_is_like():
    table = experiment(
        f'{TABLE}{GRID}[[row]]\nname = "Alike"\nscript = "{STUB}"\nlike = "Tuned"\nflags = {{ exit = 1 }}'
    )
    for top1 in (50.0, 40.0):
        for cell in [cell for cell in table.plan() if cell.in_grid and table.read(cell) is None]:
            assert cell.row == "Tuned"
            keep(cell, top1)
    alike = [cell for cell in table.plan() if cell.row == "Alike"]
    assert alike[0].flags == {"lr": 0.1, "weight": 2.0, "exit": 1}


def test_the_best_is_the_highest_of_those_that_have_a_score():
    def scored(value):
        return {"status": "done", "scores": {"knn": [{"checkpoint": "trained", "top1": value}]}}

    failed = {"status": "failed"}
    results = [failed, scored(float("nan")), scored(-8.0), scored(-3.0), scored(-3.0)]
    assert best_of("abcde", results, "knn.top1") == "d"
    assert best_of("ab", [failed, scored(None)], "knn.top1") is None


def test_a_score_is_found_by_its_name():
    rows = [{"checkpoint": of, "method": method, "ami": len(of) + n} for of in ("trained", "raw pixels")
            for n, method in enumerate(["codes", "k-means 10"])]  # fmt: skip
    result = {"status": "done", "scores": {"cluster": rows}, "cpu_s": {"train": 3.5}}
    assert score_of(result, "cluster[k-means 10].ami") == 8
    assert score_of(result, "cluster[codes].ami", "raw pixels") == 10
    assert score_of(result, "cpu_s.train") == 3.5
    assert score_of(result, "knn.top1") is None and score_of(result | {"status": "failed"}, "cpu_s.train") is None


def test_later_flags_win():
    spec = {
        "flags": dict.fromkeys("abcdefg", "file"),
        "budget": {"few": {"seeds": [0], "flags": dict.fromkeys("bcdefg", "budget")}},
        "column": [{"name": "c", "flags": dict.fromkeys("cdefg", "column"),
                    "budget": {"few": dict.fromkeys("defg", "column at budget")}}],
        "row": [{"name": "r", "flags": dict.fromkeys("efg", "row"),
                 "budget": {"few": dict.fromkeys("fg", "row at budget"), "other": {"a": 0}}}],
    }  # fmt: skip
    (cell,) = Experiment("t", spec, "few", {"g": "--set", "b": ""}, "results").plan()
    assert cell.flags == {"a": "file", "c": "column", "d": "column at budget", "e": "row", "f": "row at budget",
                          "g": "--set"}  # fmt: skip


def test_flags_as_words():
    flags = {"lr": 0.1, "compile": False, "no_resume": True, "scale": [0.2, 1], "gmm_components": []}
    assert shlex.join(words_of(flags)) == "--lr 0.1 --no-compile --no_resume --scale 0.2 1 --gmm_components"
    assert slug("CPLearn, K = 1024 / l2") == "CPLearn_K=1024_l2"


def budgets():
    return [(file, budget) for file in FILES for budget in tomllib.loads(file.read_text())["budget"]]


@pytest.mark.parametrize(("file", "budget"), budgets(), ids=lambda part: getattr(part, "stem", part))
def test_every_experiment_has_commands_that_its_scripts_take_and_names_of_their_own(file, budget):
    args = run_experiments.get_args_parser().parse_args([str(file), "--budget", budget, "--results_dir", "none"])
    table = read_experiment(file, budget, results="none")
    run_experiments.Runner(table, args).check()
    commands = {}
    for cell in [*table.plan(), *table.every()]:
        commands.setdefault(cell.name.casefold(), set()).add(str(cell))
        assert len(cell.name.encode()) < 240 and re.fullmatch(r"[\w.=+,/-]+", cell.name), cell.name
    assert {name for name, cells in commands.items() if len(cells) > 1} == set()


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words", "said"),
    [
        ("colour = 1\n" + TABLE, [], "table.toml: colour means nothing"),
        (TABLE.replace("weight", "wieght"), [], "row Plain, column One: unrecognized arguments: --wieght 1.0"),
        (TABLE.replace('scores = "knn"', 'socres = "knn"'), [], "unrecognized arguments: --socres knn"),
        (TABLE + "flag = {}", [], "[row] Plain: flag means nothing"),
        (TABLE.replace("seeds", "sedes"), [], "[budget]: sedes means nothing"),
        (TABLE.replace(STUB, "evil_knn.py"), [], "evil_knn.py: no such script"),
        (TABLE + 'like = "Tuned"', [], "row Plain is like Tuned"),
        (TABLE + f'[[row]]\nname = "Plain,"\nscript = "{STUB}"', [], "no two alike"),
        (TABLE + GRID.replace('"knn.top1"', '"top1"'), [], "score top1: expected NAME.KEY"),
        (TABLE + GRID.replace("flags = { weight = 2.0 }", ""), [], "row Tuned tunes weight"),
        (TABLE + GRID, ["--set", "weight=3"], "--set weight: row Tuned has a grid of it"),
        (TABLE, ["--set", "lr"], "--set lr: expected NAME=VALUE"),
        (TABLE, ["--set", "lr=fast"], "--lr invalid float value: 'fast'"),
        (TABLE, ["--column", "Two"], "no column Two; it has One"),
        (TABLE, ["--cell", "Plain"], "Plain: no such cell"),
        (TABLE, ["--again", "Plain"], "Plain: no such cell"),
        (TABLE, ["--data", "cifar11=x"], "--data cifar11: no small set"),
        (TABLE, ["--budget", "huge"], "no budget huge; it has few"),
        ("title = ", [], "table.toml: cannot be read"),
    ],
)
def test_what_means_nothing_is_refused_before_anything_is_begun(text, words, said, capfd):
    assert run(text, *words) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and said in error, error
    assert not Path("runs").exists()


# ---- what a cell leaves ----------------------------------------------------------------------------------------------


def test_each_cell_leaves_one_json_and_is_passed_over_from_then_on(capfd):
    assert run() == 0
    assert set(results()) == {"Plain,One,seed0", "Plain,One,seed1"}
    kept = results()["Plain,One,seed1"]
    assert kept["train"] == f"python {STUB} --lr 0.1 --weight 1.0 --seed 1 --output_dir runs/table/few/Plain,One,seed1"
    assert kept["scores"] == {"knn": [{"checkpoint": "trained", "top1": 39.0}]}
    assert kept["log"] == {"kind": "step", "step": 2, "loss": 0.05} and kept["versions"] == {"stub": "1"}
    assert kept["sizes"]["state_dict_mib"] == 1.0
    assert (
        kept["starts"] == {"train": 1, "knn": 1} and kept["uncounted_starts"] == {} and kept["OMP_NUM_THREADS"] == "1"
    )
    assert 0 <= kept["cpu_s"]["train"] <= 5 and kept["commit"] == run_experiments.commit()
    text = json.dumps(results())
    assert not [path for path in (sys.executable, str(ROOT), os.getcwd(), os.environ["HOME"] + "/") if path in text]
    assert run() == 0 and came("Plain,One,seed1") == ["train", "evaluate knn"]
    assert "2 cells done, 0 failed, 0 open" in capfd.readouterr().out.splitlines()[-1]


def test_a_grid_is_run_to_its_end_and_so_are_the_cells_that_it_chose():
    assert run(TABLE + GRID, "--jobs", "3", "--column", "One") == 0
    kept = results()
    assert len(kept) == 3 + 4  # the last run of the grid is one of its first ones
    assert kept["Tuned,One,seed0"]["chosen"] == {"lr": 0.01, "weight": 2.0}
    assert kept["Tuned,One,seed0"]["scores"]["knn"][0]["top1"] == 48.0


def test_where_all_of_a_grid_fails_the_other_rows_are_run(capfd):
    assert run(TABLE + GRID.replace('dataset = "part"', "exit = 1")) == 1
    states = {name: kept["status"] for name, kept in results().items()}
    grid = {f"grid/Tuned,One,lr={lr},weight=2.0,seed0": "failed" for lr in (0.1, 0.01)}
    assert states == grid | {"Plain,One,seed0": "done", "Plain,One,seed1": "done"}
    assert "Tuned, One: not run, every run of its grid has failed" in capfd.readouterr().out


def test_a_command_that_fails_is_kept_as_failed_until_it_is_run_again(capfd):
    text = TABLE.replace("[evaluate.knn]", f'[evaluate.few]\nscript = "{STUB}"\nscores = "few"\n[evaluate.knn]')
    broken = text.replace('scores = "knn"', 'scores = "knn"\nexit = 2')
    assert run(broken) == 1 and set(results()) == {"Plain,One,seed0", "Plain,One,seed1"}
    kept = results()["Plain,One,seed0"]
    assert kept["status"] == "failed" and kept["error"] == "error: as asked" and "--exit 2" in kept["failed"]
    assert run(text) == 1 and came("Plain,One,seed0") == ["train", "evaluate few"]  # not by itself
    assert run(text, "--again", "failed") == 0 and results()["Plain,One,seed0"]["status"] == "done"
    assert came("Plain,One,seed0") == ["train", "evaluate few", "evaluate knn"]  # what was good has stayed


def test_again_begins_a_cell_anew():
    assert run() == 0
    left = Path("runs/table/few/Plain,One,seed0/left.txt")
    left.touch()
    assert run(TABLE, "--again", "Plain,One,seed0") == 0
    assert came("Plain,One,seed0") == ["train", "evaluate knn"] and results()["Plain,One,seed0"]["status"] == "done"
    assert not left.exists()


@pytest.mark.parametrize("code", [75, 143, -signal.SIGKILL])
def test_a_command_that_is_ended_from_outside_leaves_its_cell_open(code, capfd):
    text = TABLE.replace("flags = { weight = 1.0 }", f"flags = {{ weight = 1.0, exit = {code} }}")
    assert run(text) == 75 and results() == {}
    assert f"train ended by exit code {code if code > 0 else 128 - code}" in capfd.readouterr().out
    assert run(text.replace(str(code), "0")) == 0  # another command: that too is said, and the training begins anew
    assert "begins anew" in capfd.readouterr().out
    assert {tuple(kept["starts"].values()) for kept in results().values()} == {(1, 1)}


def test_a_result_of_another_command_is_not_taken_for_this_ones(capfd):
    assert run() == 0
    assert run(TABLE, "--set", "lr=0.2") == 2
    error = capfd.readouterr().err
    assert "made by `python" in error and "--lr 0.2 --weight 1.0 --seed 0 " in error and "is asked for now" in error
    assert run(TABLE, "--set", "lr=0.2", "--again", "Plain,One,seed0", "Plain,One,seed1") == 0
    assert results()["Plain,One,seed0"]["train"].startswith(f"python {STUB} --lr 0.2 ")


def test_an_evaluation_that_the_file_has_got_since_is_made_and_a_changed_one_refused(capfd):
    assert run() == 0
    more = TABLE.replace("[[row]]", f'[evaluate.linear]\nscript = "{STUB}"\nscores = "linear"\n[[row]]')
    assert run(more) == 0 and set(results()["Plain,One,seed0"]["scores"]) == {"knn", "linear"}
    assert came("Plain,One,seed0") == ["train", "evaluate knn", "evaluate linear"]  # what was done was not done again
    assert run(more.replace('scores = "knn"', 'scores = "knn"\nweight = 3.0')) == 2
    assert "--scores knn" in capfd.readouterr().err


@pytest.mark.parametrize(
    "path", ["results/table/few/Plain,One,seed0.json", "runs/table/few/Plain,One,seed0/train.json"]
)
def test_a_damaged_file_is_named(path, capfd):
    Path(path).parent.mkdir(parents=True)
    Path(path).write_text('{"status": "do')
    assert run() == 2
    assert capfd.readouterr().err.startswith(f"error: {path}: cannot be read")


def test_small_images_come_from_a_folder_where_data_says_so():
    table = TABLE.replace("weight = 1.0", 'dataset = "cifar10"')
    assert run(table, "--data", "cifar10=pictures", "--set", "img_size=16", "--device", "cpu") == 0
    words = results()["Plain,One,seed0"]["train"].split()
    flags = dict(zip(words[words.index("--mean") + 4 :: 2], words[words.index("--mean") + 5 :: 2], strict=True))
    assert "--img_size 16 --mean 0." in " ".join(words) and flags["--std"].startswith("0.") is True
    evaluation = results()["Plain,One,seed0"]["evaluations"]["knn"]
    assert "--data_path pictures --device cpu" in evaluation


def test_the_list_says_what_became_of_each_cell(capfd):
    assert run(TABLE, "--cell", "Plain,One,seed1") == 0
    capfd.readouterr()
    assert run(TABLE, "--list") == 0
    said = capfd.readouterr().out.splitlines()
    assert said == ["open   Plain,One,seed0", "done   Plain,One,seed1", "2 cells by now: 1 done, 0 failed, 1 open"]


# ---- what happens to a run -------------------------------------------------------------------------------------------

WAITS = TABLE.replace("[0, 1]", "[0]").replace("weight = 1.0", 'wait_for = "go"')
CELL = "Plain,One,seed0"


def test_a_training_that_outlives_a_killed_runner_is_waited_for_and_not_called_a_failure():
    first = Start(WAITS)
    until(lambda: came(CELL) == ["train"])
    assert first.end(signal.SIGKILL) == -signal.SIGKILL
    second = Start(WAITS)
    until(lambda: second.said.exists() and f"{CELL}: host" in second.said.read_text())
    assert "is at it; waiting for its end" in second.said.read_text() and came(CELL) == ["train"]
    Path("go").touch()
    assert second.end() == 0, second.said.read_text()
    kept = results()[CELL]
    assert kept["status"] == "done" and kept["starts"] == {"train": 2, "knn": 1}
    assert kept["uncounted_starts"] == {"train": 1}  # whose time nobody knows


def test_two_starts_share_the_cells():
    text = WAITS.replace("[0]", "[0, 1, 2, 3]")
    starts = [Start(text), Start(text)]
    until(lambda: sum(bool(came(f"Plain,One,seed{seed}")) for seed in range(4)) == 2)
    Path("go").touch()
    assert [start.end() for start in starts] == [0, 0], [start.said.read_text() for start in starts]
    assert [came(f"Plain,One,seed{seed}") for seed in range(4)] == [["train", "evaluate knn"]] * 4
    done = [start.said.read_text().count(": done in") for start in starts]
    assert sum(done) == 4 and min(done) > 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP])
def test_a_signal_reaches_the_training_and_the_same_command_goes_on(number):
    start = Start(WAITS)
    until(lambda: came(CELL) == ["train"])
    assert start.end(number, group=number == signal.SIGINT) == 128 + number  # Ctrl-C: the terminal tells all of them
    told = came(CELL)[1:]  # each once: a second one would not save; the runner's may come after its end
    assert came(CELL)[0] == "train" and results() == {} and len(set(told)) == len(told)
    own = [f"signal {signal.SIGTERM.value}"]
    assert told == own if number != signal.SIGINT else "signal 2" in told and set(told) <= {"signal 2", *own}
    assert "the same command goes on" in start.said.read_text()
    Path("go").touch()
    assert run(WAITS) == 0
    assert results()[CELL]["starts"] == {"train": 2, "knn": 1} and results()[CELL]["uncounted_starts"] == {}


def test_the_cause_of_torchruns_end_is_its_workers(tmp_path):
    said = b"exitcode  : 2 (pid: 1)\n"  # of an earlier start
    Path("train.txt").write_bytes(said + b"  exitcode  : -9 (pid: 7)\nRoot Cause\n  exitcode  : 75 (pid: 8)\n")
    assert run_experiments.code_of_worker("train.txt", len(said)) == 75
    assert run_experiments.code_of_worker("train.txt", 10_000) == 1


# ---- on SLURM --------------------------------------------------------------------------------------------------------


def test_a_job_for_each_open_cell_is_this_program_with_that_cell(capfd):
    pytest.importorskip("submitit")
    assert run(TABLE + GRID, "--cell", CELL) == 0
    capfd.readouterr()
    flags = "--dry_run --partition gpu"
    assert run(TABLE + GRID, "--set", "exit=0", "--submit", flags, "--nproc", "2") == 2  # the done cell had no --exit
    capfd.readouterr()
    assert run(TABLE + GRID, "--submit", flags) == 0
    said = capfd.readouterr().out
    assert "#SBATCH --array=0-2%3" in said and "#SBATCH --partition=gpu" in said
    own = "run_experiments.py table.toml --budget few --nproc 1 --output_dir runs --results_dir results --device cuda"
    names = ["grid/Tuned,One,lr=0.1,weight=2.0,seed0", "grid/Tuned,One,lr=0.01,weight=2.0,seed0", "Plain,One,seed1"]
    assert re.findall(r"run_experiments\.py .*", said) == [f"{own} --cell {name}" for name in names]


def test_submitted_jobs_run_their_cells(capfd):
    assert run(TABLE, "--submit=--cluster debug", "--device", "cpu") == 0
    assert {name: kept["status"] for name, kept in results().items()} == {CELL: "done", "Plain,One,seed1": "done"}
    assert run(TABLE, "--submit=--cluster debug", "--device", "cpu") == 0
    assert "nothing to submit" in capfd.readouterr().out


def test_a_flag_may_name_another_one_and_images_may_be_prepared():
    experiment = read_experiment(EXPERIMENTS / "theorem1.toml", "short")
    cell = next(cell for cell in experiment.plan() if cell.name == "K=16_beta=0.5,Planted,seed1")
    assert cell.flags["proj_dim"] == "16" and cell.flags["data_path"] == "runs/planted/16"
    assert (
        cell.prepare[0] == "experiments/planted.py"
        and cell.prepare[2] == "16"
        and cell.prepare[-1] == "runs/planted/16"
    )
    assert cell.steps == ["prepare", "train", "knn", "cluster", "collapse"]
    other = next(cell for cell in experiment.plan() if cell.name == "K=16_beta=0.5,Fashion-MNIST,seed1")
    assert other.steps[0] == "train"


# ---- the experiments themselves --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_sets(tmp_path_factory):
    """A folder of noise on ten colours, in place of the small data sets."""
    root = tmp_path_factory.mktemp("small")
    rng = np.random.default_rng(0)
    for split, count in (("train", 40), ("test", 10)):
        for label in range(10):
            folder = root / split / str(label)
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 100, (32, 32, 3)) + 15 * label * np.array([1, label % 2, label % 3 / 2])
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.png")
    return root


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_experiment_ends_well_although_killed_and_a_cells_commands_give_its_numbers_again(file, small_sets):
    """`--budget smoke`, killed with all that it has started. A cell is then made again by hand, from its JSON alone."""
    rng = random.Random(file.stem)
    words = [file, "--budget", "smoke", "--jobs", 2, "--device", "cpu", "--output_dir", "runs"]
    words += ["--results_dir", "results", "--data"]
    words += [f"{name}={small_sets}" for name in sorted(set(images.DATASETS) - {"imagefolder"})]
    overrides = {}
    cells = read_experiment(file, "smoke", results="none").plan()
    if any(cell.flags["dataset"] == "imagefolder" and not cell.prepare for cell in cells):
        overrides = {"data_path": str(small_sets)}
        words += ["--set", f"data_path={small_sets}"]
    words = list(map(str, words))
    command = [sys.executable, str(ROOT / "run_experiments.py"), *words]
    with open("said.txt", "w") as said:
        first = subprocess.Popen(command, stdout=said, stderr=said, start_new_session=True)
        with contextlib.suppress(subprocess.TimeoutExpired):
            first.wait(rng.uniform(8, 25))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(first.pid, signal.SIGKILL)
        first.wait()
        code = subprocess.run(command, stdout=said, stderr=said, timeout=1200).returncode
    assert code == 0, Path("said.txt").read_text()
    table = read_experiment(file, "smoke", overrides, results="results")
    kept = {cell.name: table.read(cell) for cell in table.plan()}
    assert {name: result["status"] for name, result in kept.items()} == dict.fromkeys(kept, "done")
    assert len(list(table.results.rglob("*.json"))) == len(kept) > 0
    name = rng.choice(sorted(kept))
    assert_made_again(kept[name], Path("runs", file.stem, "smoke", name), rng)


def assert_made_again(kept, folder, rng):
    """The training, and one of its evaluations."""
    anew, evaluation = Path("anew"), rng.choice(sorted(kept["evaluations"]))
    for line in (kept["train"], kept["evaluations"][evaluation]):
        words = shlex.split(line.replace(str(folder), str(anew)))
        assert words[0] == "python"
        environment = os.environ | {"OMP_NUM_THREADS": kept["OMP_NUM_THREADS"], "PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, str(ROOT / words[1]), *words[2:]], check=True, env=environment)
    log = [json.loads(line) for line in (anew / "log.txt").read_text().splitlines()]
    last = [line for line in log if line["kind"] == "step"][-1]
    assert without_times(last) == without_times(kept["log"]) and "train_loss" in last
    again = json.loads((anew / f"results_{evaluation}.json").read_text())["rows"]
    again = [row for row in again if Path(row["checkpoint"]).name == "checkpoint.pth"]
    ours = [row for row in kept["scores"][evaluation] if row["checkpoint"] == "trained"]
    assert ours and [without_times(row, row_of) for row, row_of in zip(again, ours, strict=True)] == ours


def without_times(numbers, like=None):
    """What two runs share: no times, memory or names of files; of a row, the keys that `like` has."""
    if like is None:
        return {key: value for key, value in numbers.items() if not re.search("time|wait|per_s|memory", key)}
    return {key: like[key] if key == "checkpoint" else numbers.get(key) for key in like}
