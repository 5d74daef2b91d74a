"""One SLURM for all tests in this folder, and only for them."""

import os
from unittest import mock

import pytest
from cluster import CannotRun, cluster


@pytest.fixture(scope="session")
def slurm(tmp_path_factory):
    """A real SLURM whose commands this process finds; the tests are skipped where there can be none."""
    try:
        with cluster(tmp_path_factory.mktemp("slurm")) as env, mock.patch.dict(os.environ, env):
            os.environ["OMP_NUM_THREADS"] = "1"
            yield
    except CannotRun as reason:
        pytest.skip(f"no SLURM: {reason}")
