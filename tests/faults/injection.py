"""Faults that a test lets happen inside a run: functions called in its process before main_cplearn.main.

launch(words, faults={0: partial(at_call, "os.replace", 3, die)})          # dies before it renames for the third time
"""

import builtins
import contextlib
import io
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch  # noqa: F401 (a home of functions that tests name)

import main_cplearn  # noqa: F401


def die():
    """What a node that fails, or the kernel out of memory, does to a process."""
    os.kill(os.getpid(), signal.SIGKILL)


def hang():
    """Never return, and hear no signal: Python's handlers wait for this call's end, as for a blocked collective's."""
    signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals) - {signal.SIGKILL})
    while True:
        time.sleep(3600)


def fail(error):
    raise error


def close_the_group_slowly():
    """As nccl's may: its end waits for peers, who wait in a collective."""
    replace("torch.distributed.destroy_process_group", lambda close: lambda *args: (time.sleep(60), close(*args)))


def send(number):
    os.kill(os.getpid(), number)


def in_turn(*faults):
    for fault in faults:
        fault()


def at_call(name, count, action, after=False):
    """Do `action` before (or after) the `count`-th call of the function with this full name."""
    calls = iter(range(1, sys.maxsize))

    def wrap(function):
        def wrapped(*args, **kwargs):
            due = next(calls) == count
            if due and not after:
                action()
            result = function(*args, **kwargs)
            if due and after:
                action()
            return result

        return wrapped

    replace(name, wrap)


def replace(name, wrap):
    """Put wrap(function) in the place of the function or method with this full name."""
    home, _, attribute = name.rpartition(".")
    module, *classes = home.split(".")
    owner = sys.modules.get(module) or __import__(module)
    for part in classes:
        owner = getattr(owner, part)
    setattr(owner, attribute, wrap(getattr(owner, attribute)))


def die_while_writing(file_name, num_writes, num_bytes=1):
    """Die in the middle of a file: when so much of it has been written by its `num_writes`-th write."""
    calls = iter(range(1, sys.maxsize))

    def wrap(write):
        def wrapped(data):
            if next(calls) < num_writes:
                return write(data)
            write(data[:num_bytes])
            die()

        return wrapped

    wrap_files(file_name, wrap)


def wrap_files(file_name, wrap):
    """Every file of this name that is opened for writing from now on writes by wrap(its own write)."""

    def wrap_open(original):
        def wrapped(path, *args, **kwargs):
            file = original(path, *args, **kwargs)
            if isinstance(path, str | os.PathLike) and Path(path).name == file_name and file.writable():
                return Proxy(file, wrap(unbuffered(file)))
            return file

        return wrapped

    builtins.open = wrap_open(builtins.open)
    io.open = wrap_open(io.open)  # pathlib's


def unbuffered(file):
    def write(data):
        count = file.write(data)
        file.flush()
        return count

    return write


class Proxy:
    """A file with another `write`."""

    def __init__(self, file, write):
        self.file, self.write = file, write

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return self.file.__exit__(*error)


def cut_power(folder):
    """Die, and take with it what was not forced to disk: call `watch_fsync` first."""
    for path in Path(folder).glob("*checkpoint*"):
        if identity(path) not in forced:
            os.truncate(path, 0)
    die()


forced = set()  # files, by device and inode, whose content has been forced to disk


def watch_fsync(folder):
    forced.update(identity(path) for path in Path(folder).glob("*"))  # an earlier process's

    def wrap(fsync):
        def wrapped(descriptor):
            fsync(descriptor)
            forced.add(identity(descriptor))

        return wrapped

    replace("os.fsync", wrap)


def identity(file):
    status = os.stat(file)
    return status.st_dev, status.st_ino


def set_clock_back(seconds):
    """From the tenth reading on, the time of day is so much earlier: daylight saving, or a server that sets it."""
    calls = iter(range(1, sys.maxsize))
    replace("time.time", lambda clock: lambda: clock() - seconds * (next(calls) > 10))


def fill_disk(folder):
    with contextlib.suppress(OSError), open(Path(folder) / "filler", "ab", buffering=0) as file:
        for size in (4096, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))


def free_disk(folder):
    (Path(folder) / "filler").unlink()


def make_read_only(folder):
    """A read-only view of it is mounted over it; what is open already stays writable."""
    subprocess.run(["mount", "--bind", folder, folder], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)


def make_writable(folder):
    subprocess.run(["umount", "-l", folder], check=True)


def kill_data_worker():
    multiprocessing.active_children()[0].kill()


def wait_for_file(path):
    deadline = time.monotonic() + 240
    while not Path(path).exists():
        assert time.monotonic() < deadline, f"{path} was never made"
        time.sleep(0.02)
