"""What tests of several modules share: a run of a function in several gloo processes."""

import os

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
        for _ in workers:
            rank, value, error = results.get(timeout=120)
            assert error is None, error
            gathered[rank] = value
        for worker in workers:
            worker.join(timeout=30)
        return [gathered[r] for r in range(world_size)]

    return run
