"""Files that are whole or not there, whoever writes them."""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest

import eval_cluster
import evaluation
from running.files import append_whole, replace_file, write_whole
from utils import UserError

ROOT = Path(__file__).resolve().parent.parent


@contextlib.contextmanager
def room_for(count):
    """Files may have `count` bytes: a disk that is full, as far as the writer can tell."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)


def write_results(folder):
    evaluation.report(
        "knn", [{"top1": 12.5}], {"top1": ("top-1", ".2f")}, types.SimpleNamespace(output_dir=str(folder)), []
    )


def write_figure(folder):
    figure, axis = evaluation.pyplot().subplots()
    axis.plot([1, 2])
    evaluation.save_figure(figure, folder / "figure.png", bbox_inches="tight")


def write_table(folder, write, name):
    write(str(folder / name), {"image": [f"{i}.png" for i in range(50)], "codes": list(range(50))})


WRITERS = {  # what an evaluation leaves, and how it is written
    "results_knn.json": write_results,
    "results_knn.md": write_results,
    "figure.png": write_figure,
    "clusters.csv": lambda folder: write_table(folder, eval_cluster.write_csv, "clusters.csv"),
    "clusters.parquet": lambda folder: write_table(folder, eval_cluster.write_parquet, "clusters.parquet"),
    "pca.png": lambda folder: evaluation.save_picture(folder / "pca.png", [[0.0, 1.0], [1.0, 0.5]]),
}


@pytest.mark.parametrize("name", WRITERS)
def test_what_an_earlier_evaluation_has_written_outlives_a_full_disk(name, tmp_path, capsys):
    WRITERS[name](tmp_path)
    earlier = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(earlier[name]) > 30
    with room_for(30), pytest.raises((OSError, UserError)):
        WRITERS[name](tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == earlier


def test_a_table_that_cannot_be_kept_is_shown_and_the_cause_is_one_line(tmp_path, capsys):
    with room_for(30), pytest.raises(UserError, match=r"results_knn.\* cannot be written \(File too large\)"):
        write_results(tmp_path)
    assert "12.50" in capsys.readouterr().out


def test_two_at_once_leave_one_file_that_is_whole(tmp_path):
    path = tmp_path / "results.json"
    with replace_file(path) as first, replace_file(path) as second:
        first.write(b"[1, ")
        second.write(b"[3, 4, 5]")
        first.write(b"2]")
    assert json.loads(path.read_text()) in ([1, 2], [3, 4, 5])
    assert os.listdir(tmp_path) == ["results.json"]


def test_what_a_kill_has_left_in_a_locked_folder_is_written_over(tmp_path):
    (tmp_path / ".log.txt.tmp").write_bytes(b"half")
    with replace_file(tmp_path / "log.txt", alone=True) as file:
        file.write(b"whole")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("log.txt", b"whole")]


def test_a_link_stays_one(tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "page.html").write_text("old")
    (tmp_path / "page.html").symlink_to("kept/page.html")
    write_whole(tmp_path / "page.html", "new")
    assert (tmp_path / "page.html").is_symlink() and (tmp_path / "kept" / "page.html").read_text() == "new"


@pytest.mark.parametrize("kind", ["fifo", "/dev/stdout"])
def test_what_is_no_file_is_written_to(kind, tmp_path):
    path = tmp_path / "fifo" if kind == "fifo" else kind
    code = f"from running.files import write_whole; write_whole({str(path)!r}, 'h\\xe9')"
    if kind == "fifo":
        os.mkfifo(path)
        with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT):
            assert path.read_bytes() == "hé".encode()
        assert path.is_fifo()
    else:
        assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).stdout == "hé".encode()
        assert Path(kind).is_symlink()


def test_names_that_are_no_utf8_come_out_as_they_are(tmp_path):
    write_whole(tmp_path / "a.txt", os.fsdecode(b"caf\xe9"))
    assert (tmp_path / "a.txt").read_bytes() == b"caf\xe9"


def test_a_line_is_appended_whole_or_not_at_all(tmp_path):
    append_whole(tmp_path / "log.txt", b"one\n")
    with room_for(6), pytest.raises(OSError):
        append_whole(tmp_path / "log.txt", b"two, which does not fit\n")
    assert (tmp_path / "log.txt").read_bytes() == b"one\n"
