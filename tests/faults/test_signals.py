"""Signals and standstill: a run that is asked to stop saves first, one that hangs says where and ends."""

import random
import re
import signal
import threading
from functools import partial

import pytest
from injection import at_call, hang, in_turn, replace, send

from checkpoint import load_checkpoint
from runs import NUM_IMAGES, STEPS, assert_same_run, flags, run_to_end
from utils import UNFINISHED

pytestmark = pytest.mark.slow

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
STEP = "main_cplearn.update_weights"
PLACES = (STEP, "main_cplearn.train_one_step", "torch.Tensor.backward")
ONLY_WHEN_ASKED = {"save_every_minutes": 1000}


def saved_by_signal(output, folder):
    """The step that was said, which is the checkpoint's."""
    step = int(re.search(r"stopped by a signal at step (\d+); the same command goes on from", output)[1])
    assert load_checkpoint(folder / "checkpoint.pth")["step"] == step
    return step


@pytest.mark.parametrize("processes", [1, 2])
def test_stopped_by_twelve_signals_equals_undisturbed(folder, undisturbed, launch, tmp_path, processes):
    """To one of the processes, anywhere in a step, the first of all steps included."""
    words = flags(folder, tmp_path / "cut", processes, **ONLY_WHEN_ASKED)
    rng, steps = random.Random(processes), [0]
    for number in SIGNALS * 4:
        rank, place = (
            rng.randrange(processes),
            rng.choice([STEP, "main_cplearn.train_one_step", "torch.Tensor.backward"]),
        )
        fault = partial(at_call, place, rng.randint(1, 3), partial(send, number))
        job = launch(words, processes=processes, faults={rank: fault})
        assert job.wait() == [128 + number] * processes, job.output()
        steps.append(saved_by_signal(job.output(), tmp_path / "cut"))
        assert "Traceback" not in job.output()
    assert steps == sorted(set(steps)) and steps[-1] < STEPS, steps
    run_to_end(words, tmp_path, processes)
    assert_same_run(tmp_path / "cut", undisturbed(processes))


@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_is_heard_where_each_epoch_is_one_step(folder, undisturbed, launch, tmp_path, processes):
    one_step = {"batch_size_per_gpu": NUM_IMAGES // processes, "epochs": 8}
    words = flags(folder, tmp_path / "cut", processes, **one_step, **ONLY_WHEN_ASKED)
    job = launch(words, processes=processes, faults={processes - 1: partial(at_call, STEP, 3, partial(send, 15))})
    assert job.wait() == [128 + signal.SIGTERM] * processes, job.output()
    assert saved_by_signal(job.output(), tmp_path / "cut") == 2 + processes  # several hear a step later
    run_to_end(words, tmp_path, processes)
    assert_same_run(tmp_path / "cut", undisturbed(processes, **one_step))


def test_a_second_signal_while_saving_changes_nothing(folder, undisturbed, launch, tmp_path):
    """SIGTERM first; others come before the file is written, while it is, and before its rename."""
    words, steps = flags(folder, tmp_path / "cut", **ONLY_WHEN_ASKED), [0]
    places = ("os.replace", "checkpoint.checkpoint_state", "torch.save")
    for place, number in zip(places, SIGNALS, strict=True):
        first = partial(at_call, STEP, 3, partial(send, signal.SIGTERM))
        job = launch(words, faults={0: partial(in_turn, first, partial(at_call, place, 1, partial(send, number)))})
        assert job.wait() == [128 + signal.SIGTERM], job.output()
        steps.append(saved_by_signal(job.output(), tmp_path / "cut"))
    assert steps == sorted(set(steps)) and steps[-1] < STEPS
    run_to_end(words, tmp_path)
    assert_same_run(tmp_path / "cut", undisturbed())


def test_an_impatient_second_interrupt_leaves_the_old_checkpoint(folder, undisturbed, launch, tmp_path):
    """Ctrl-C, and again while the file is written: it ends at once, with what was saved before."""
    words, interrupt = flags(folder, tmp_path / "cut"), partial(send, signal.SIGINT)
    asked = partial(at_call, STEP, 4, interrupt)
    job = launch(words, faults={0: partial(in_turn, asked, partial(at_call, "os.fsync", 10, interrupt))})
    assert job.wait() == [128 + signal.SIGINT], job.output()
    assert "Traceback" not in job.output() and not list((tmp_path / "cut").glob(".*.tmp"))
    assert load_checkpoint(tmp_path / "cut" / "checkpoint.pth")["step"] in (3, 4)
    run_to_end(words, tmp_path)
    assert_same_run(tmp_path / "cut", undisturbed())


def test_a_signal_during_start_up_harms_nothing(folder, undisturbed, launch, tmp_path):
    words = flags(folder, tmp_path / "cut")
    job = launch(words, faults={0: partial(at_call, STEP, 4, partial(send, signal.SIGTERM))})
    job.wait()
    before = (tmp_path / "cut" / "checkpoint.pth").read_bytes()
    for place in ("build_optimizer", "describe"):
        for number in SIGNALS:
            job = launch(words, faults={0: partial(at_call, f"main_cplearn.{place}", 1, partial(send, number))})
            assert job.wait() in ([-number], [128 + number]), f"{place}, {number}:\n{job.output()}"
            assert "Traceback" not in job.output(), f"{place}, {number}:\n{job.output()}"
            assert (tmp_path / "cut" / "checkpoint.pth").read_bytes() == before
    run_to_end(words, tmp_path)
    assert_same_run(tmp_path / "cut", undisturbed())


@pytest.mark.parametrize(
    ("place", "number"), [("finish_epoch", n) for n in SIGNALS] + [("close", signal.SIGTERM), ("close", signal.SIGINT)]
)
def test_a_signal_after_the_last_step_leaves_the_run_done(folder, undisturbed, launch, tmp_path, place, number):
    words = flags(folder, tmp_path / "cut", epochs=1)
    job = launch(words, faults={0: partial(at_call, f"main_cplearn.{place}", 1, partial(send, number))})
    assert job.wait() in ([0], [128 + number], [-number]), job.output()
    assert_same_run(tmp_path / "cut", undisturbed(epochs=1))
    run_to_end(words, tmp_path)
    assert_same_run(tmp_path / "cut", undisturbed(epochs=1))


# ---- standstill ------------------------------------------------------------------------------------------------------

PATIENCE = 10  # seconds of --watchdog_s


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_that_hangs_ends_and_shows_where(folder, undisturbed, launch, tmp_path, processes):
    words = flags(folder, tmp_path / "cut", processes, watchdog_s=PATIENCE)
    last = processes - 1
    job = launch(words, processes=processes, faults={last: partial(at_call, STEP, 17, hang)})
    assert job.wait(120) == [UNFINISHED] * processes, job.output()
    for rank in range(processes):
        assert f"error (rank {rank}): no progress for {PATIENCE} s" in job.output()
    assert job.output().count("in train_one_epoch") == processes  # each one's stack
    assert "in hang" in job.output()
    run_to_end(words, tmp_path, processes)
    assert_same_run(tmp_path / "cut", undisturbed(processes), rank_lost=processes > 1)


def test_a_rank_that_is_frozen_ends_the_others(folder, undisturbed, launch, tmp_path):
    words = flags(folder, tmp_path / "cut", 2, watchdog_s=PATIENCE)
    job = launch(words, processes=2, faults={1: partial(at_call, STEP, 9, partial(send, signal.SIGSTOP))})
    job.wait_for(f"error (rank 0): no progress for {PATIENCE} s", timeout=120)
    job.workers[0].join(60)
    assert job.workers[0].exitcode == UNFINISHED, job.output()
    assert "in train_one_epoch" in job.output()
    job.kill()
    run_to_end(words, tmp_path, processes=2)
    assert_same_run(tmp_path / "cut", undisturbed(2), rank_lost=True)


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
def test_a_signal_is_heard_while_a_collective_blocks(folder, undisturbed, launch, tmp_path, number):
    """Rank 1 hangs in step 8, so rank 0 waits for it in step 9: it saves step 8 by itself, and ends."""
    words = flags(folder, tmp_path / "cut", 2, **ONLY_WHEN_ASKED)
    job = launch(words, processes=2, faults={1: partial(at_call, STEP, 8, say_and_hang)})
    job.wait_for("hangs now")
    job.signal(number)
    job.workers[0].join(90)
    assert job.workers[0].exitcode == 128 + number, job.output()
    assert load_checkpoint(tmp_path / "cut" / "checkpoint.pth")["step"] == 8, job.output()
    assert "in train_one_epoch" in job.output()
    job.kill()
    run_to_end(words, tmp_path, processes=2)
    assert_same_run(tmp_path / "cut", undisturbed(2), rank_lost=True)


def say_and_hang():
    print("hangs now", flush=True)
    hang()


# ---- not the main thread ---------------------------------------------------------------------------------------------


def in_a_thread():
    def wrap(train):
        def wrapped(args):
            thread = threading.Thread(target=train, args=(args,))
            thread.start()
            thread.join()

        return wrapped

    replace("main_cplearn.train", wrap)


def test_a_run_in_a_thread_goes_on_without_signals(folder, undisturbed, tmp_path):
    said = run_to_end(flags(folder, tmp_path / "cut"), tmp_path, faults={0: in_a_thread})
    assert "note: not in the main thread" in said and "Traceback" not in said
    assert_same_run(tmp_path / "cut", undisturbed())
