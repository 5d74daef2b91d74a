"""experiments/commands.py: a command from the server is the command as one would type it."""

import os
import signal
import subprocess
import sys

import pytest
import torch

from experiments.commands import Commands
from runs import ROOT, flags, write_pictures


@pytest.fixture(scope="module")
def commands():
    with Commands({"OMP_NUM_THREADS": "1"}) as server:
        yield server


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"))


def run(commands, path, words):
    """(exit code, output) of a command from the server."""
    with open(path, "w") as output:
        code, cpu_s, memory_mb = commands.start(words, output).wait()
    assert cpu_s > 0.05 and memory_mb > 50
    return code, path.read_text()


def typed(words):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / words[0]), *words[1:]]
    return subprocess.run(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def tensors(part, name=""):
    """{path of keys: tensor} of all that a checkpoint holds."""
    if isinstance(part, torch.Tensor):
        return {name: part}
    items = part.items() if isinstance(part, dict) else enumerate(part) if isinstance(part, list | tuple) else ()
    return {path: t for key, item in items for path, t in tensors(item, f"{name}/{key}").items()}


def test_a_training_is_the_same_bit_for_bit(commands, pictures, tmp_path):
    places = [tmp_path / "typed", tmp_path / "served"]
    words = [["main_cplearn.py", *flags(pictures, place, epochs=1, precision="auto")] for place in places]
    assert typed(words[0]).returncode == 0
    code, said = run(commands, tmp_path / "served.txt", words[1])
    assert code == 0 and "done: 12 steps" in said
    first, second = (tensors(torch.load(place / "checkpoint.pth", weights_only=True)) for place in places)
    assert first.keys() == second.keys() and len(first) > 30  # weights, moments, statistics
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_wrong_flag_is_the_same_line_and_exit_code(commands, tmp_path):
    words = ["eval_knn.py", "--checkpoint", "nowhere.pth"]
    plain = typed(words)
    assert run(commands, tmp_path / "output.txt", words) == (plain.returncode, plain.stdout) and plain.returncode == 2


def test_a_signal_reaches_the_command_and_its_end_is_told(commands, pictures, tmp_path):
    words = ["main_cplearn.py", *flags(pictures, tmp_path / "run", epochs=4000)]
    with open(tmp_path / "output.txt", "w") as output:
        command = commands.start(words, output)
        while "step 5/" not in (tmp_path / "output.txt").read_text():
            assert os.path.exists(f"/proc/{command.pid}"), (tmp_path / "output.txt").read_text()
        os.kill(command.pid, signal.SIGTERM)
        code, *_ = command.wait()
    assert code == 128 + signal.SIGTERM and "stopped by a signal" in (tmp_path / "output.txt").read_text()


def test_one_that_is_killed_leaves_the_others(commands, tmp_path):
    with open(tmp_path / "a", "w") as a, open(tmp_path / "b", "w") as b:
        first, second = (commands.start(["eval_knn.py", "--help"], output) for output in (a, b))
        os.kill(first.pid, signal.SIGKILL)
        assert first.wait()[0] == 128 + signal.SIGKILL and second.wait()[0] == 0
    assert "usage: eval_knn" in (tmp_path / "b").read_text()
