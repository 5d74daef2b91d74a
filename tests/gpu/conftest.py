"""Tests to run when a GPU is there: `make gpu`. With CPLEARN_TEST_DEVICE=cpu the same bodies run on the CPU, as CI runs
them, so that they are known to work before a GPU is met; elsewhere they are skipped."""

import contextlib
import os
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import runs
from runs import flags, run_to_end

DEVICE = os.environ.get("CPLEARN_TEST_DEVICE", "cuda")


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def device():
    """The name of the device under test."""
    if DEVICE == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA here; CPLEARN_TEST_DEVICE=cpu runs this test on the CPU")
    return DEVICE


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A folder with train and val, each of 96 pictures in three classes."""
    root = tmp_path_factory.mktemp("pictures")
    for split in ("train", "val"):
        runs.write_pictures(root / split)
    return root


@pytest.fixture(scope="session")
def trained(device, pictures, tmp_path_factory):
    """trained(**changes): the folder of a small run on the device, in fp32 unless said otherwise; each is made once."""
    known = {}

    def train(**changes):
        key = tuple(sorted((name, str(value)) for name, value in changes.items()))
        if key not in known:
            known[key] = tmp_path_factory.mktemp("run")
            words = flags(pictures, known[key], **{"device": device, "epochs": 2} | changes)
            run_to_end(words, tmp_path_factory.mktemp("output"))
        return known[key]

    return train


class Waits(TorchDispatchMode):
    """On the CPU, stands in for CUDA's own watch: operations whose result must be known to the host are an error."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "bincount")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        masks = [x for x in args[1] if x is not None] if name == "index" else []
        assert name not in self.NAMES and not any(x.dtype == torch.bool for x in masks), f"{name} waits for the device"
        return function(*args, **(kwargs or {}))


@pytest.fixture
def no_waits(device):
    """no_waits(): a context in which waiting for the device is an error."""

    @contextlib.contextmanager
    def watched():
        if device == "cpu":
            with Waits():
                yield
            return
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return watched
