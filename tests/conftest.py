"""What tests of several modules share: a run of a function in several gloo processes, pictures, no network."""

import contextlib
import os
import queue
import socket

import pytest
import torch
import torch.multiprocessing as mp

from group import in_group

torch.set_num_threads(1)  # two OpenMP threads on a busy host are many times slower than one


@pytest.fixture
def run_in_processes(tmp_path):
    """run(function, *args, world_size=2): function(rank, *args) in gloo processes; returns the results by rank.

    Functions must be module-level and return plain data."""

    def run(function, *args, world_size=2):
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["torch", "main_cplearn"])  # imported once, not once per process
        results = context.Queue()
        store = tmp_path / f"store_{len(os.listdir(tmp_path))}"
        workers = [
            context.Process(target=in_group, args=(r, world_size, store, function, args, results))
            for r in range(world_size)
        ]
        for worker in workers:
            worker.start()
        gathered = {}
        try:
            for _ in workers:
                rank, value, error = next_result(results, workers)
                assert error is None, error
                gathered[rank] = value
            for worker in workers:
                worker.join(timeout=30)
        finally:
            for worker in workers:
                worker.kill()
        return [gathered[r] for r in range(world_size)]

    return run


@pytest.fixture(scope="session")
def class_folders(tmp_path_factory):
    """`pictures.write_class_folders`, which no test changes."""
    import pictures  # here: tests of the plan of the house need not wait for it

    return pictures.write_class_folders(tmp_path_factory.mktemp("classes"))


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def next_result(results, workers, seconds=120):
    """What the next process sends; one that ended without a word (`utils.leave`) is not waited for."""
    for _ in range(seconds):
        with contextlib.suppress(queue.Empty):
            return results.get(timeout=1)
        ended = [worker.exitcode for worker in workers]
        assert not any(ended), f"exit codes {ended}; what the process printed says why"
    raise AssertionError(f"no result within {seconds} s")
