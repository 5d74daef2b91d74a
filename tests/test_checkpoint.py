"""Files are written whole or not at all, and nothing in a file is executed."""

import argparse
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from checkpoint import load_checkpoint, save_checkpoint, wait_for_same_file
from utils import UserError


def look_at_two_nodes(rank, root, seconds):
    """Each node has its own view of the folder; rank 1's gets the file late, or never."""
    mine = Path(root) / str(rank) / "checkpoint.pth"
    try:
        wait_for_same_file(mine, seconds)
        return "seen"
    except UserError as error:
        return str(error)


def test_all_processes_wait_for_the_file_that_rank_zero_sees(run_in_processes, tmp_path):
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
    (tmp_path / "0" / "checkpoint.pth").write_text("step 5")
    answers = run_in_processes(look_at_two_nodes, str(tmp_path), 2)
    assert answers[0] == "seen" and "all nodes share" in answers[1]
    os.link(tmp_path / "0" / "checkpoint.pth", tmp_path / "1" / "checkpoint.pth")
    assert run_in_processes(look_at_two_nodes, str(tmp_path), 2) == ["seen"] * 2


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def test_failed_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pth"
    save_checkpoint({"step": 1}, path)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="could not be written"):
        save_checkpoint({"step": 2}, path)
    assert load_checkpoint(path) == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pth"]


def test_file_is_on_disk_before_it_is_renamed(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("rename"), replace(a, b)))
    save_checkpoint({"step": 1}, tmp_path / "checkpoint.pth")
    assert [Path(name).name for name in done] == [".checkpoint.pth.tmp", "rename", tmp_path.name]


def test_dinos_harmless_types_are_admitted(tmp_path):
    state = {
        "args": argparse.Namespace(arch="vit_small", path=Path("/data")),
        "loss": np.float64(2.5),
        "epoch": np.int64(3),
    }
    torch.save(state, tmp_path / "dino.pth")
    loaded = load_checkpoint(tmp_path / "dino.pth")
    assert loaded["args"].arch == "vit_small" and loaded["loss"] == 2.5 and loaded["epoch"] == 3


class Attack:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.parametrize("kind", ["zip", "legacy", "bare pickle"])
def test_code_in_a_file_is_never_run(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "evil.pth"
    if kind == "bare pickle":
        path.write_bytes(pickle.dumps({"student": Attack()}))
    else:
        torch.save({"student": Attack()}, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(UserError, match=r"refused|cannot be read") as caught:
        load_checkpoint(path)
    assert not (tmp_path / "executed").exists() and "\n" not in str(caught.value)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_truncated_files_are_refused(tmp_path, share):
    path = tmp_path / "checkpoint.pth"
    save_checkpoint({"weight": torch.randn(100, 100)}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(UserError, match=r"checkpoint\.pth: cannot be read"):
        load_checkpoint(path)
