"""A disk that fills up or becomes read-only for a while: the run goes on; no checkpoint and no line is lost."""

import shutil
import subprocess
from functools import partial
from pathlib import Path

import pytest
from injection import at_call, fill_disk, free_disk, in_turn, make_read_only, make_writable

from checkpoint import load_checkpoint
from runs import STEPS, assert_same_run, flags, launch, run_to_end

pytestmark = pytest.mark.slow

STEP = "main_cplearn.update_weights"
DISK_MB = 2  # a checkpoint has 0.24 MB


def mount(*words):
    result = subprocess.run(["mount", *map(str, words)], capture_output=True, text=True)
    if result.returncode:
        pytest.skip(f"mount {' '.join(map(str, words))}: {result.stderr.strip()}; these tests need root")


@pytest.fixture
def disk(tmp_path):
    """A file system of its own, of 2 MB."""
    path = tmp_path / "disk"
    path.mkdir()
    mount("-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", path)
    yield path
    subprocess.run(["umount", "-l", path], check=True)


@pytest.fixture
def folder_that_can_be_read_only(tmp_path):
    path = tmp_path / "cut"
    path.mkdir()
    mount("--bind", path, path)
    subprocess.run(["umount", path], check=True)
    yield path
    while subprocess.run(["umount", "-l", path], capture_output=True).returncode == 0:
        pass


def faults_at(*faults):
    """(step, function): called in that step."""
    return {0: partial(in_turn, *(partial(at_call, STEP, step, function) for step, function in faults))}


@pytest.mark.parametrize("begin", [1, 5])  # before the first checkpoint, and after it
def test_a_full_disk_is_waited_for(folder, undisturbed, disk, tmp_path, begin):
    full = partial(fill_disk, disk)
    faults = faults_at((begin, full), (10, full), (15, partial(keep, disk, tmp_path)), (20, partial(free_disk, disk)))
    said = run_to_end(flags(folder, disk / "cut"), tmp_path, faults=faults)
    assert "checkpoint.pth: could not be written" in said and "log.txt could not be written" in said
    assert "Traceback" not in said
    if begin > 1:
        assert load_checkpoint(tmp_path / "kept" / "checkpoint.pth")["step"] >= 3
    assert_same_run(disk / "cut", undisturbed())


def keep(folder, where):
    """A copy of the run's folder as a node that fails now would leave it."""
    shutil.copytree(Path(folder) / "cut", Path(where) / "kept")


def test_a_disk_still_full_at_the_end_is_an_error(folder, undisturbed, disk, tmp_path):
    words = flags(folder, disk / "cut")
    job = launch(words, tmp_path, faults=faults_at((30, partial(fill_disk, disk))))
    assert job.wait() == [1], job.output()
    assert "error: step 48:" in job.output() and "Traceback" not in job.output()
    assert 28 <= load_checkpoint(disk / "cut" / "checkpoint.pth")["step"] < STEPS
    free_disk(disk)
    run_to_end(words, tmp_path)
    assert_same_run(disk / "cut", undisturbed())


def test_a_folder_that_is_read_only_for_a_while(folder, undisturbed, folder_that_can_be_read_only, tmp_path):
    cut = folder_that_can_be_read_only
    faults = faults_at((5, partial(make_read_only, cut)), (20, partial(make_writable, cut)))
    said = run_to_end(flags(folder, cut), tmp_path, faults=faults)
    assert "checkpoint.pth: could not be written: Read-only file system" in said
    assert "log.txt could not be written: Read-only file system" in said and "Traceback" not in said
    assert_same_run(cut, undisturbed())


def test_a_run_on_a_read_only_folder_does_not_begin(folder, undisturbed, folder_that_can_be_read_only, tmp_path):
    cut = folder_that_can_be_read_only
    words = flags(folder, cut)
    job = launch(words, tmp_path, faults=faults_at((5, partial(make_read_only, cut))))
    assert job.wait() == [1], job.output()  # it was so to the end
    job = launch(words, tmp_path)
    assert job.wait() == [2] and "cannot be written to" in job.output(), job.output()
    make_writable(cut)
    run_to_end(words, tmp_path)
    assert_same_run(cut, undisturbed())
