"""Signals that are heard at once, and processes that do not hang: each in a process of its own."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from running.watch import Watch
from utils import UNFINISHED

ROOT = Path(__file__).parent.parent

# the main thread waits in C, as in a collective, where Python's signal handlers do not run
PROGRAM = """
import ctypes, signal, time
from running import watch
watch.GRACE_S, watch.FAREWELL_S = 1.0, 0.1
def stuck_here():
    print("stuck", flush=True)
    lock = ctypes.create_string_buffer(64)
    libc = ctypes.CDLL(None)
    libc.pthread_mutex_lock(lock)
    libc.pthread_mutex_lock(lock)  # waits for itself, whatever signals come
stopped = lambda: print("last resort", flush=True)
with watch.Watch((signal.SIGTERM, signal.SIGUSR2, signal.SIGINT), patience={patience}, last_resort={last}) as w:
    {body}
print("left in order", w.signals, flush=True)
"""


def start(body, patience=0, last="stopped"):
    program = PROGRAM.format(body=body, patience=patience, last=last)
    return subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def end(process):
    output, errors = process.communicate(timeout=60)
    return process.returncode, output, errors


def test_signals_are_collected_in_order_and_handlers_restored():
    before = signal.getsignal(signal.SIGTERM), signal.set_wakeup_fd(-1)
    with Watch((signal.SIGTERM, signal.SIGINT)) as watch:
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
            wait_until(lambda number=number: number in watch.signals)
        assert watch.signals == [signal.SIGTERM, signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert (signal.getsignal(signal.SIGTERM), signal.set_wakeup_fd(-1)) == before
    assert not watch.thread.is_alive()


def wait_until(true):
    for _ in range(200):
        if true():
            return
        time.sleep(0.05)
    pytest.fail("not within ten seconds")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_ends_a_process_that_is_stuck_in_c(number):
    process = start("w.progress(7); stuck_here()")
    assert process.stdout.readline() == "stuck\n"
    process.send_signal(number)
    code, output, errors = end(process)
    assert code == 128 + number and output == "last resort\n"
    assert f"{number.name} came" in errors and "in stuck_here" in errors and "left in order" not in output


def test_standstill_shows_the_stack_and_ends():
    code, output, errors = end(start("w.progress(7); stuck_here()", patience=1))
    assert code == UNFINISHED and "last resort" in output
    assert "no progress for 1 s at step 7" in errors and "in stuck_here" in errors


def test_standstill_before_the_first_step_ends_too():
    code, _, errors = end(start("stuck_here()", patience=1))
    assert code == UNFINISHED and "no progress for 1 s before the first step" in errors


STUCK_LOADER = """
import ctypes, time
from running import watch
watch.FAREWELL_S = 0.1
def batches():
    yield 1
    yield 2
    time.sleep({pause})
with watch.Watch((), patience=1, unit="batch") as w:
    for batch in w.over(batches()):
        pass
    time.sleep(1.5)
print("left in order")
"""


@pytest.mark.parametrize("pause, code", [(0, 0), (100, UNFINISHED)])
def test_a_loader_that_gives_no_batch_ends_an_evaluation(pause, code):
    done = subprocess.run(
        [sys.executable, "-c", STUCK_LOADER.format(pause=pause)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == code, done.stderr
    assert ("no progress for 1 s at batch 2" in done.stderr) == (pause > 0) != ("left in order" in done.stdout)


def test_a_watch_in_another_thread_leaves_signals_alone(capsys):
    before, seen = signal.getsignal(signal.SIGTERM), []

    def run():
        with Watch((signal.SIGTERM,), patience=60) as watch:
            seen.append((signal.getsignal(signal.SIGTERM), watch.signals))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(20)
    assert seen == [(before, [])] and "not in the main thread" in capsys.readouterr().out


def test_a_watch_without_signals_leaves_them_to_the_one_around_it():
    with Watch((signal.SIGUSR2,)) as outer, Watch((), patience=60):
        os.kill(os.getpid(), signal.SIGUSR2)
        wait_until(lambda: outer.signals == [signal.SIGUSR2])


def test_progress_and_a_pause_keep_a_process_alive():
    body = "time.sleep(0.5); w.progress(7); [(time.sleep(0.1), w.progress(7)) for _ in range(15)]"
    body += "\n    with w.paused(): time.sleep(2.5)\n    time.sleep(0.3)"
    code, output, errors = end(start(body, patience=1))
    assert code == 0 and output == "left in order []\n", errors


def test_a_signal_that_is_heeded_leaves_in_order():
    body = "print('stuck', flush=True)\n    while not w.signals: time.sleep(0.1)"
    process = start(body)
    process.stdout.readline()
    process.send_signal(signal.SIGUSR2)
    code, output, _ = end(process)
    assert code == 0 and output == f"left in order [{int(signal.SIGUSR2)}]\n"


@pytest.mark.parametrize("last", ["lambda: time.sleep(1000)", "lambda: 1 / 0"])
def test_a_last_resort_that_fails_or_hangs_does_not_keep_the_process(last):
    code, _, errors = end(start("w.progress(7); stuck_here()", patience=1, last=last))
    assert code == UNFINISHED
    assert ("ZeroDivisionError" in errors) == ("1 / 0" in last)
