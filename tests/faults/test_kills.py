"""Processes that die without a word, anywhere: the same command again ends where the undisturbed run ends."""

import os
import random
import signal
import subprocess
import time
from functools import partial

import pytest
from injection import at_call, cut_power, die, die_while_writing, replace, set_clock_back, watch_fsync

from checkpoint import load_checkpoint
from runs import STEPS, TIMEOUT, assert_same_run, flags, logged, run_to_end, torchrun
from utils import UNFINISHED

pytestmark = pytest.mark.slow

DEATHS = {
    "in a step": lambda n: partial(at_call, "main_cplearn.update_weights", n, die),
    "half the checkpoint written": lambda n: partial(die_while_writing, ".checkpoint.pth.tmp", 40 * n, 7),
    "before fsync": lambda n: partial(at_call, "os.fsync", n, die),
    "before rename": lambda n: partial(at_call, "os.replace", n, die),
    "after rename": lambda n: partial(at_call, "os.replace", n, die, after=True),
    "half a log line written": lambda n: partial(die_while_writing, "log.txt", n, 20),
}
WRITING = set(DEATHS) - {"in a step"}  # rank 0's alone
PAUSES = "at any time"  # killed from outside


def moments(count, processes, seed):
    """(kind, rank, n), as many of each kind as can be, in random order."""
    rng = random.Random(seed)
    kinds = [[*DEATHS, PAUSES][i % (len(DEATHS) + 1)] for i in range(count)]
    rng.shuffle(kinds)
    return [(kind, 0 if kind in WRITING else rng.randrange(processes), rng.randint(1, 3)) for kind in kinds]


def kill_after_a_while(job, rank, n):
    job.wait_for("images/s")
    time.sleep(0.07 * n)
    job.signal(signal.SIGKILL, rank)


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_at_twenty_moments_equals_undisturbed(folder, undisturbed, launch, tmp_path, processes):
    words = flags(folder, tmp_path / "cut", processes, log_every=1)
    steps, deaths = [0], moments(20, processes, seed=processes)
    for kind, rank, n in deaths:
        faults = {rank: DEATHS[kind](n)} if kind in DEATHS else None
        job = launch(words, processes=processes, faults=faults)
        if faults is None:
            kill_after_a_while(job, rank, n)
        codes = job.wait()
        assert codes[rank] == -signal.SIGKILL, f"{kind}, {n}: {codes}\n{job.output()}"
        assert all(codes[r] == UNFINISHED for r in range(processes) if r != rank), f"{kind}: {codes}\n{job.output()}"
        steps.append(whole_checkpoint(tmp_path / "cut"))
    assert steps == sorted(steps) and 0 < steps[-1] < STEPS, steps
    run_to_end(words, tmp_path, processes)
    assert_same_run(tmp_path / "cut", undisturbed(processes, log_every=1), rank_lost=processes > 1)


def whole_checkpoint(folder):
    """Its step; 0 where there is none."""
    path = folder / "checkpoint.pth"
    return load_checkpoint(path)["step"] if path.exists() else 0


POWER_CUTS = {
    "in a step": ("main_cplearn.update_weights", False),
    "before fsync": ("os.fsync", False),
    "before rename": ("os.replace", False),
    "after rename": ("os.replace", True),
}


def prepare_power_cut(folder, name, n, after):
    watch_fsync(folder)
    at_call(name, n, partial(cut_power, folder), after)


def test_a_power_cut_loses_no_checkpoint(folder, undisturbed, launch, tmp_path):
    """What was not forced to disk is gone with the process: a rename before fsync would leave an empty checkpoint."""
    words, steps = flags(folder, tmp_path / "cut", log_every=1), [0]
    for name, after in POWER_CUTS.values():
        for n in (2, 3):
            job = launch(words, faults={0: partial(prepare_power_cut, tmp_path / "cut", name, n, after)})
            assert job.wait() == [-signal.SIGKILL], job.output()
            steps.append(whole_checkpoint(tmp_path / "cut"))
    assert steps == sorted(steps) and steps[-1] > 0, steps
    run_to_end(words, tmp_path)
    assert_same_run(tmp_path / "cut", undisturbed(log_every=1))


def test_a_clock_set_back_changes_nothing(folder, undisturbed, tmp_path):
    words = flags(folder, tmp_path / "cut", save_every_minutes=1e-6)
    saves = tmp_path / "saves"
    run_to_end(words, tmp_path, faults={0: partial(set_clock_back_and_count_saves, saves)})
    assert saves.stat().st_size >= STEPS - 4  # after every step; the last of an epoch has its own
    assert_same_run(tmp_path / "cut", undisturbed())


def set_clock_back_and_count_saves(path):
    set_clock_back(400 * 86400)

    def wrap(save):
        def counted(*args):
            with open(path, "a") as file:
                file.write(".")
            return save(*args)

        return counted

    replace("checkpoint.save_checkpoint", wrap)


# ---- torchrun --------------------------------------------------------------------------------------------------------


def workers(pid):
    """The processes that torchrun started, by rank."""

    def environment(child):
        with open(f"/proc/{child}/environ", "rb") as file:
            return dict(entry.partition(b"=")[::2] for entry in file.read().split(b"\0"))

    children = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout.split()
    return {int(environment(child)[b"RANK"]): int(child) for child in children if b"RANK" in environment(child)}


def wait_until(condition, path, what):
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {TIMEOUT} s:\n{path.read_text()}"
        time.sleep(0.05)


def last_step(folder):
    return max((line["step"] for line in logged(folder)), default=0)


def test_torchrun_restarts_a_run_whose_ranks_are_killed(folder, undisturbed, tmp_path):
    """Each of the two once: torchrun starts both anew, and they go on. One restart is to spare."""
    epochs, path = 8, tmp_path / "output.txt"
    words = flags(folder, tmp_path / "cut", processes=2, epochs=epochs)
    with torchrun(words, path, restarts=3) as process:
        for attempt, rank in enumerate((0, 1)):
            reached = last_step(tmp_path / "cut")
            wait_until(lambda reached=reached: last_step(tmp_path / "cut") >= reached + 10, path, "the next 10 steps")
            os.kill(workers(process.pid)[rank], signal.SIGKILL)
            wait_until(lambda n=attempt: path.read_text().count("resuming at step") > n, path, "the restart")
        assert process.wait(TIMEOUT) == 0, path.read_text()
    assert_same_run(tmp_path / "cut", undisturbed(2, epochs=epochs), rank_lost=True)


@pytest.mark.parametrize("rank", [0, 1])
def test_torchrun_without_restarts_ends_and_the_same_command_goes_on(folder, undisturbed, tmp_path, rank):
    path = tmp_path / "output.txt"
    words = flags(folder, tmp_path / "cut", processes=2)
    with torchrun(words, path, restarts=0) as process:
        wait_until(lambda: last_step(tmp_path / "cut") >= 5, path, "5 steps")
        os.kill(workers(process.pid)[rank], signal.SIGKILL)
        assert process.wait(60) != 0, path.read_text()
    assert 0 < load_checkpoint(tmp_path / "cut" / "checkpoint.pth")["step"] < STEPS
    run_to_end(words, tmp_path, processes=2)
    assert_same_run(tmp_path / "cut", undisturbed(2), rank_lost=True)
