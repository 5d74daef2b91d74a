"""Several processes of one run: what is saved once, and processes that do not see or want the same."""

import itertools
import os
import re
import time
from functools import partial

import pytest
from injection import at_call, replace

import main_cplearn
from runs import flags, launch, run_to_end


def count_saves():
    def wrap(save):
        def counted(run, step, *args, **kwargs):
            if main_cplearn.rank() == 0:
                print(f"saved at {step}/", flush=True)
            return save(run, step, *args, **kwargs)

        return counted

    replace("main_cplearn.save", wrap)
    replace("main_cplearn.time.monotonic", lambda _: clock_of_steps)


def clock_of_steps(counter=[1e9]):  # noqa: B006 (its state; later than the real clock, by which the run was made)
    counter[0] += 0.01
    return counter[0]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_save_that_is_due_is_made_once(folder, tmp_path, processes):
    words = flags(folder, tmp_path / "run", processes, save_every_minutes=0.005, epochs=2)  # 0.3 of that clock
    said = run_to_end(words, tmp_path, processes, faults=dict.fromkeys(range(processes), count_saves))
    *steps, end = [int(step) for step in re.findall(r"saved at (\d+)/", said)]  # the end is saved whatever the clock
    assert end == 24 and len(steps) >= 3 and all(b - a > 1 for a, b in itertools.pairwise(steps)), steps


def draw_slowly():
    def wrap(plot_log):
        def slow(*args):
            time.sleep(2)
            plot_log(*args)
            print("rank 0 has drawn", flush=True)

        return slow

    replace("monitor.plot_log", wrap)


def say(text):
    print(text, flush=True)


def test_no_process_leaves_while_rank_zero_works(folder, tmp_path):
    """SLURM may end all processes some time after the first has ended."""
    faults = {0: draw_slowly, 1: partial(at_call, "main_cplearn.close", 1, partial(say, "rank 1 leaves"))}
    said = run_to_end(flags(folder, tmp_path / "run", 2, max_steps=2), tmp_path, 2, faults=faults)
    assert said.index("rank 0 has drawn") < said.index("rank 1 leaves")


def see_fewer_files():
    def wrap(open_dataset):
        def opened(args, split="train"):
            images = open_dataset(args, split)
            return type(images)(os.fsdecode(images.root), [images.names[i] for i in range(len(images) - 2)])

        return opened

    replace("main_cplearn.open_dataset", wrap)


@pytest.mark.parametrize("difference", ["files", "flags"])
def test_processes_that_see_different_things_stop_before_the_first_step(folder, tmp_path, difference):
    words = flags(folder, tmp_path / "run", 2)
    fault = see_fewer_files if difference == "files" else partial(setattr_of, "beta", 0.75)
    job = launch(words, tmp_path, processes=2, faults={1: fault})
    assert job.wait() == [2, 2], job.output()
    expected = "images 96 and 94" if difference == "files" else "--beta 0.25 and 0.75"
    assert f"rank 0 and rank 1 differ: {expected}" in job.output() and "Traceback" not in job.output()


def setattr_of(name, value):
    def wrap(check_arguments):
        def checked(args, device):
            setattr(args, name, value)
            return check_arguments(args, device)

        return checked

    replace("main_cplearn.check_arguments", wrap)
