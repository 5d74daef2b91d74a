"""An error of one process of several: it is seen, it ends all of them, and the launcher knows that it is an error."""

import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from injection import at_call, close_the_group_slowly, fail, in_turn

from runs import ROOT, flags, torchrun
from utils import UNFINISHED, RunFailed, UserError

STEP = "main_cplearn.update_weights"
OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nThe rest of its advice")
SECONDS = 30  # in which all must have ended, from the message on; the group's own end takes 60


def failing(place, count, error):
    return partial(in_turn, close_the_group_slowly, partial(at_call, place, count, partial(fail, error)))


def end(job, rank, says):
    """The exit codes of a job in which `rank` fails and says so."""
    job.wait_for(says)
    codes = job.wait(SECONDS)
    assert codes[1 - rank] == UNFINISHED, job.output()  # gloo tells the other one
    return codes[rank]


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_in_a_step_is_shown_and_ends_all(folder, launch, tmp_path, rank):
    words = flags(folder, tmp_path / "run", 2)
    job = launch(words, processes=2, faults={rank: failing(STEP, 3, OUT_OF_MEMORY)})
    said = "OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 GiB. The rest of its advice"
    assert end(job, rank, f"error (rank {rank}): {said}") == 1
    assert "Traceback" in job.output() and "in train_one_step" in job.output()


CASES = {
    "a mistake": (STEP, UserError("its disk is gone"), 2, "its disk is gone"),
    "a failure": (STEP, RunFailed("workers died"), 1, "workers died"),
    "an interrupt": (STEP, KeyboardInterrupt(), 128 + signal.SIGINT, "interrupted"),
    "an exit": (STEP, SystemExit(3), 3, ""),
    "an exit with words": (STEP, SystemExit("no more"), 1, "SystemExit: no more"),
    "before the first step": ("main_cplearn.build_model", OUT_OF_MEMORY, 1, "OutOfMemoryError: CUDA out of memory."),
    "in the method": ("cplearn_head.CPLearn.forward", ValueError("shapes"), 1, "ValueError: shapes"),
    "while saving": ("checkpoint.checkpoint_state", MemoryError("no memory"), 1, "MemoryError: no memory"),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "case, rank", [(case, rank) for case in CASES for rank in (0, 1) if (case, rank) != ("while saving", 1)]
)  # rank 0 saves
def test_other_ends_of_one_rank(folder, launch, tmp_path, case, rank):
    place, error, code, says = CASES[case]
    fault = failing(place, 2 if place == STEP else 1, error)
    job = launch(flags(folder, tmp_path / "run", 2), processes=2, faults={rank: fault})
    assert end(job, rank, f"error (rank {rank}): {says}" if says else "a peer is lost") == code
    assert ("Traceback" in job.output()) == (code == 1 and not isinstance(error, RunFailed)), job.output()


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_one_rank_in_an_evaluation(folder, undisturbed, launch, tmp_path, rank):
    (tmp_path / "sets").mkdir()
    for split in ("train", "val"):
        (tmp_path / "sets" / split).symlink_to(folder)
    words = ["--checkpoint", undisturbed() / "checkpoint.pth", "--data_path", tmp_path / "sets", "--device", "cpu"]
    words += ["--num_workers", 0, "--nb_knn", 5, "--batch_size", 8]
    fault = failing("pretrained.PretrainedModel.forward", 2, OUT_OF_MEMORY)
    job = launch(words, processes=2, faults={rank: fault}, script="eval_knn")
    assert end(job, rank, f"error (rank {rank}): OutOfMemoryError") == 1


SCRIPT = """
import os, sys
sys.path[:0] = {path!r}
from functools import partial
import torch
import main_cplearn
from injection import at_call, close_the_group_slowly, fail
if os.environ["RANK"] == "{rank}":
    close_the_group_slowly()
    at_call("main_cplearn.update_weights", 3, partial(fail, torch.OutOfMemoryError("CUDA out of memory")))
main_cplearn.main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_torchrun_ends_with_the_error_of_one_rank(folder, tmp_path, rank):
    script, path = tmp_path / "script.py", tmp_path / "output.txt"
    script.write_text(SCRIPT.format(path=[str(ROOT), str(Path(__file__).parent)], rank=rank))
    with torchrun(flags(folder, tmp_path / "run", 2), path, script=script) as process:
        assert process.wait(120) == 1, path.read_text()
    assert f"error (rank {rank}): OutOfMemoryError: CUDA out of memory" in path.read_text()
    assert "in update_weights" in path.read_text() or "in train_one_step" in path.read_text()
