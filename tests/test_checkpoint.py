"""Files are written whole or not at all, and nothing in a file is executed."""

import argparse
import copy
import os
import pickle
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoint
import main_cplearn
from checkpoint import load_checkpoint, save_checkpoint, wait_for_same_file
from monitor import RunLog, read_log
from runs import flags, tensors, write_pictures
from utils import UserError


def look_at_two_nodes(rank, root, seconds):
    """Each node has its own view of the folder; rank 1's gets the file late, or never."""
    mine = Path(root) / str(rank) / "checkpoint.pth"
    try:
        wait_for_same_file(mine, seconds)
        return "seen"
    except UserError as error:
        return str(error)


def test_all_processes_wait_for_the_file_that_rank_zero_sees(run_in_processes, tmp_path):
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
    (tmp_path / "0" / "checkpoint.pth").write_text("step 5")
    answers = run_in_processes(look_at_two_nodes, str(tmp_path), 2)
    assert answers[0] == "seen" and "all nodes share" in answers[1]
    os.link(tmp_path / "0" / "checkpoint.pth", tmp_path / "1" / "checkpoint.pth")
    assert run_in_processes(look_at_two_nodes, str(tmp_path), 2) == ["seen"] * 2


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def test_failed_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pth"
    save_checkpoint({"step": 1}, path)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="could not be written"):
        save_checkpoint({"step": 2}, path)
    assert load_checkpoint(path) == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pth"]


def test_file_is_on_disk_before_it_is_renamed(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("rename"), replace(a, b)))
    save_checkpoint({"step": 1}, tmp_path / "checkpoint.pth")
    assert [Path(name).name for name in done] == [".checkpoint.pth.tmp", "rename", tmp_path.name]


def test_dinos_harmless_types_are_admitted(tmp_path):
    state = {
        "args": argparse.Namespace(arch="vit_small", path=Path("/data")),
        "loss": np.float64(2.5),
        "epoch": np.int64(3),
    }
    torch.save(state, tmp_path / "dino.pth")
    loaded = load_checkpoint(tmp_path / "dino.pth")
    assert loaded["args"].arch == "vit_small" and loaded["loss"] == 2.5 and loaded["epoch"] == 3


class Attack:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.parametrize("kind", ["zip", "legacy", "bare pickle"])
def test_code_in_a_file_is_never_run(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "evil.pth"
    if kind == "bare pickle":
        path.write_bytes(pickle.dumps({"student": Attack()}))
    else:
        torch.save({"student": Attack()}, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(UserError, match=r"refused|cannot be read") as caught:
        load_checkpoint(path)
    assert not (tmp_path / "executed").exists() and "\n" not in str(caught.value)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_truncated_files_are_refused(tmp_path, share):
    path = tmp_path / "checkpoint.pth"
    save_checkpoint({"weight": torch.randn(100, 100)}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(UserError, match=r"checkpoint\.pth: cannot be read"):
        load_checkpoint(path)


# ---- written while training goes on ----------------------------------------------------------------------------------


class Held:
    """In the place of save_checkpoint: the first write waits until it is let go."""

    def __init__(self, monkeypatch):
        self.begun, self.let_go = threading.Event(), threading.Event()
        monkeypatch.setattr(checkpoint, "save_checkpoint", self)

    def __call__(self, state, path):
        self.begun.set()
        assert self.let_go.wait(60)
        save_checkpoint(state, path)


def train_with(monkeypatch, folder, output_dir, words=(), **at_steps):
    """A small run that calls at_steps["stepN"](run) before the step N (from 0)."""
    original = main_cplearn.train_one_step

    def train_one_step(run, batches, step):
        at_steps.get(f"step{step}", lambda run: None)(run)
        return original(run, batches, step)

    monkeypatch.setattr(main_cplearn, "train_one_step", train_one_step)
    monkeypatch.setattr(RunLog, "draw", lambda *args: None)
    given = flags(folder, output_dir, epochs=1, save_every_minutes=1000) + list(words)
    main_cplearn.train(main_cplearn.get_args_parser().parse_args(given))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("images"))


@pytest.mark.parametrize("damage", ["truncated", "pickle", "empty"])
def test_damaged_checkpoint_is_refused_and_runs_nothing(folder, tmp_path, damage):
    path, flag = tmp_path / "checkpoint.pth", tmp_path / "executed"
    words = flags(folder, tmp_path, max_steps=1)
    if damage == "pickle":

        class Attack:
            def __reduce__(self):
                return os.system, (f"touch {flag}",)

        torch.save({"format": "cplearn 2", "student": Attack()}, path)
    else:
        main_cplearn.train(main_cplearn.get_args_parser().parse_args(words))
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2] if damage == "truncated" else b"")
    before = path.read_bytes()
    with pytest.raises(UserError, match="plain data" if damage == "pickle" else "cannot be read"):
        main_cplearn.train(main_cplearn.get_args_parser().parse_args(words))
    assert not flag.exists() and path.read_bytes() == before


@pytest.mark.parametrize("objective", ["cplearn", "dino"])
def test_training_on_does_not_reach_what_is_being_written(folder, tmp_path, monkeypatch, objective):
    held, then = Held(monkeypatch), {}

    def save(run):
        then["state"] = copy.deepcopy(checkpoint.checkpoint_state(run, 5))
        main_cplearn.save(run, 5)

    def compare(run):
        assert held.begun.is_set() and not (tmp_path / "checkpoint.pth").exists()
        now = tensors(checkpoint.checkpoint_state(run, 9))
        held.let_go.set()
        run.writer.wait()
        found, expected = load_checkpoint(tmp_path / "checkpoint.pth"), tensors(then["state"])
        assert found["step"] == 5 and found["recorder"] == then["state"]["recorder"]
        assert tensors(found).keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in tensors(found).items())
        trained = [name for name, value in expected.items() if not torch.equal(value, now[name])]
        assert {name.split(".")[1] for name in trained} >= {"student", "teacher", "optimizer"}
        weights = [next(iter(found[key].values())).data_ptr() for key in ("student", "teacher")]
        assert (weights[0] == weights[1]) == (objective == "cplearn")
        compared.append(True)

    compared = []
    train_with(monkeypatch, folder, tmp_path, ["--objective", objective], step5=save, step9=compare)
    assert compared == [True]


def test_an_epochs_copy_is_kept_although_training_goes_on(folder, tmp_path, monkeypatch):
    held = Held(monkeypatch)

    def look(run):
        assert held.begun.is_set() and not list(tmp_path.glob("*.pth"))
        held.let_go.set()

    train_with(monkeypatch, folder, tmp_path, ["--saveckp_freq", "1", "--epochs", "2"], step15=look)
    steps = [load_checkpoint(tmp_path / f"checkpoint{name}.pth")["step"] for name in ("0001", "0002", "")]
    assert steps == [12, 24, 24]


def test_what_ends_a_run_waits_for_the_write(folder, tmp_path, monkeypatch):
    held = Held(monkeypatch)

    def end(run):
        threading.Timer(0.5, held.let_go.set).start()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_with(monkeypatch, folder, tmp_path, step5=lambda run: main_cplearn.save(run, 5), step7=end)
    assert load_checkpoint(tmp_path / "checkpoint.pth")["step"] == 5


def test_the_last_resort_comes_after_the_write_on_its_way_and_not_beside_it(folder, tmp_path, monkeypatch, capsys):
    held = Held(monkeypatch)

    def stuck(run):
        monkeypatch.setattr(checkpoint, "GRACE_S", 0.1)
        checkpoint.save_last_whole_step(run)
        assert "still being written after 0.1 s; no later one is saved" in capsys.readouterr().out
        assert not list(tmp_path.glob("checkpoint.pth"))
        monkeypatch.setattr(checkpoint, "GRACE_S", 60)
        threading.Timer(0.5, held.let_go.set).start()
        checkpoint.save_last_whole_step(run)
        assert load_checkpoint(tmp_path / "checkpoint.pth")["step"] == 7
        assert "saved the last whole step, 7" in capsys.readouterr().out

    train_with(monkeypatch, folder, tmp_path, step5=lambda run: main_cplearn.save(run, 5), step7=stuck)


def failing_once(monkeypatch, error):
    failures = iter([error])

    def fail_first(state, path):
        for failure in failures:
            raise failure
        save_checkpoint(state, path)

    monkeypatch.setattr(checkpoint, "save_checkpoint", fail_first)


def test_a_disk_that_fails_is_a_warning_and_the_run_goes_on(folder, tmp_path, monkeypatch, capsys):
    failing_once(monkeypatch, OSError("checkpoint.pth: could not be written: it is gone"))
    train_with(monkeypatch, folder, tmp_path, step5=lambda run: (main_cplearn.save(run, 5), run.writer.wait()))
    said = capsys.readouterr().out
    warning = "warning: step 5: checkpoint.pth: could not be written: it is gone; going on, the earlier checkpoint is"
    assert said.count(warning) == 1 and said.index(warning) < said.index("step 10/12")
    assert load_checkpoint(tmp_path / "checkpoint.pth")["step"] == 12


def test_another_error_of_the_thread_ends_the_run_at_the_next_vote(folder, tmp_path, monkeypatch, capsys):
    failing_once(monkeypatch, ValueError("a mistake of ours"))
    reached = []
    steps = {f"step{n}": lambda run, n=n: reached.append(n) for n in range(6, 10)}
    save = lambda run: (main_cplearn.save(run, 5), run.writer.join())  # noqa: E731
    with pytest.raises(ValueError, match="a mistake of ours"):
        train_with(monkeypatch, folder, tmp_path, step5=save, **steps)
    assert reached == [] and "ValueError: a mistake of ours" in capsys.readouterr().err


def test_the_log_is_on_disk_before_the_checkpoint_that_says_so(folder, tmp_path, monkeypatch):
    done, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append(Path(os.readlink(f"/proc/self/fd/{fd}"))), fsync(fd)))
    logged = []

    def save(run):
        done.clear()  # of views.png
        main_cplearn.save(run, 5)
        run.writer.wait()
        logged.extend(line["step"] for line in read_log(tmp_path / "log.txt"))

    train_with(monkeypatch, folder, tmp_path, step5=save)
    assert [path.name for path in done[:3]] == ["log.txt", ".checkpoint.pth.tmp", tmp_path.name] and logged == [5]
