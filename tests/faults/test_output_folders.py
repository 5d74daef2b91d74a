"""An output folder that another run writes to, that holds another run's checkpoint, or that more or fewer processes
go on with."""

import argparse
import shutil
import signal
from functools import partial

import numpy as np
import pytest
import torch
from injection import at_call, send, wait_for_file

from checkpoint import load_checkpoint
from runs import STEPS, assert_same_run, flags, logged, run_to_end, tensors

pytestmark = pytest.mark.slow

STEP = "main_cplearn.update_weights"


def one_line(job, processes=1):
    """The error of a run that must end with exit code 2 and one line from each process."""
    assert job.wait() == [2] * processes, job.output()
    lines = [line for line in job.output().splitlines() if line.startswith("error")]
    assert len(lines) == processes and "Traceback" not in job.output(), job.output()
    return lines[0]


# ---- another checkpoint ----------------------------------------------------------------------------------------------


def test_another_methods_checkpoint_is_refused_and_kept(folder, launch, tmp_path):
    """A file as DINO's training writes it."""
    path = tmp_path / "cut" / "checkpoint.pth"
    path.parent.mkdir()
    weights = {"module.backbone.cls_token": torch.zeros(1, 1, 192)}
    args = argparse.Namespace(arch="vit_small", out_dim=65536)
    torch.save({"student": weights, "teacher": weights, "epoch": 3, "args": args, "dino_loss": {}}, path)
    before = path.read_bytes()
    assert "not a checkpoint of this program" in one_line(launch(flags(folder, path.parent)))
    assert path.read_bytes() == before


OTHERS = {
    "--dictionary": {"dictionary": "hadamard"},
    "--out_dim": {"out_dim": 128},
    "--seed": {"seed": 1},
    "--arch": {"arch": "vit_tiny", "patch_size": 16, "width": None},
    "--width": {"width": 32},
    "--img_size": {"img_size": 48},
}


def test_another_runs_checkpoint_is_refused_and_kept(folder, undisturbed, launch, tmp_path):
    whole = undisturbed()
    before = (whole / "checkpoint.pth").read_bytes()
    shutil.copytree(whole, tmp_path / "cut")
    for flag, changes in OTHERS.items():
        line = one_line(launch(flags(folder, tmp_path / "cut", **changes)))
        assert flag in line and "checkpoint.pth" in line
    assert (tmp_path / "cut" / "checkpoint.pth").read_bytes() == before
    assert logged(tmp_path / "cut") == logged(whole)


# ---- two runs, one folder --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [1, 2])
def test_a_second_run_is_refused_and_the_first_undisturbed(folder, undisturbed, launch, tmp_path, processes):
    words, go = flags(folder, tmp_path / "cut", processes), tmp_path / "go"
    first = launch(words, processes=processes, faults={0: partial(at_call, STEP, 7, partial(wait_for_file, go))})
    first.wait_for("step 5/")
    assert "another run is writing" in one_line(launch(words, processes=processes), processes)
    assert "another run is writing" in one_line(launch([*words, "--no-resume"], processes=processes), processes)
    go.touch()
    assert first.wait() == [0] * processes, first.output()
    assert_same_run(tmp_path / "cut", undisturbed(processes))


def test_a_killed_runs_folder_is_free_at_once(folder, undisturbed, launch, tmp_path):
    """Its data workers live on for seconds: they hold nothing."""
    words = flags(folder, tmp_path / "cut", num_workers=2)
    first = launch(words)
    first.wait_for("step 5/")
    first.signal(signal.SIGKILL)
    first.workers[0].join()
    run_to_end(words, tmp_path)
    assert_same_run(tmp_path / "cut", undisturbed())


# ---- another number of processes -------------------------------------------------------------------------------------


SGD = {"optimizer": "sgd", "lr": 0.3}  # AdamW divides by the gradient's size: where that is rounding alone, it decides


def test_two_then_one_then_four_processes_see_the_same_images(folder, undisturbed, launch, tmp_path):
    words = flags(folder, tmp_path / "cut", 2, log_every=1, **SGD)
    for processes in (2, 1, 4):
        job = launch(words, processes=processes, faults={0: partial(at_call, STEP, 9, partial(send, signal.SIGUSR2))})
        assert job.wait() == [128 + signal.SIGUSR2] * processes, job.output()
    assert "effective batch 8 = 2 x 4" in job.output()
    run_to_end(words, tmp_path)
    assert_close_run(tmp_path / "cut", undisturbed(2, log_every=1, **SGD))


def assert_close_run(folder, undisturbed):
    """The same up to the order in which sums are rounded."""
    losses = [[line["train_loss"] for line in logged(path)] for path in (folder, undisturbed)]
    assert len(losses[0]) == len(losses[1]) == STEPS + 4
    np.testing.assert_allclose(*losses, rtol=1e-4)
    ours, theirs = (tensors(load_checkpoint(path / "checkpoint.pth")["student"]) for path in (folder, undisturbed))
    assert ours.keys() == theirs.keys()
    different = [name for name in theirs if not torch.allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-4)]
    assert different == []


def test_three_processes_cannot_share_eight_images(folder, undisturbed, launch, tmp_path):
    shutil.copytree(undisturbed(2), tmp_path / "cut")
    before = (tmp_path / "cut" / "checkpoint.pth").read_bytes()
    line = one_line(launch(flags(folder, tmp_path / "cut", 2), processes=3), processes=3)
    assert "8 images per step" in line and "3 processes" in line
    assert (tmp_path / "cut" / "checkpoint.pth").read_bytes() == before
