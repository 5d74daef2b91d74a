"""--log_to: what loggers get is what log.txt has, and nothing of theirs reaches a run."""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest

from running import loggers
from running.loggers import Forwarder, require
from utils import UserError

ROOT = Path(loggers.__file__).resolve().parent.parent


@pytest.fixture
def fake(monkeypatch):
    """A logger that keeps what it gets, in the place of wandb; `fake.log` may be replaced."""
    kept = types.SimpleNamespace(lines=[], begun=[], ended=0, log=lambda numbers, step: None)

    @contextlib.contextmanager
    def begin(module, output_dir, flags, name):
        kept.begun.append((flags, name))
        yield lambda numbers, step: (kept.log(numbers, step), kept.lines.append((step, numbers)))
        kept.ended += 1

    monkeypatch.setattr(loggers, "into_wandb", begin)
    monkeypatch.setattr(loggers, "require", lambda name: None)
    monkeypatch.setattr(loggers, "CLOSE_S", 10.0)
    return kept


def line(step, **numbers):
    return {"kind": "step", "step": step, "epoch": 0} | numbers


def test_numbers_arrive_in_order_under_one_name_for_all_starts(fake, tmp_path):
    for first in (10, 40):
        forwarder = Forwarder("wandb", tmp_path, {"lr": 1.0})
        for step in range(first, first + 30, 10):
            forwarder.send(line(step, train_loss=1 / step, gap=None, said="text", flag=True))
        forwarder.close()
    assert [step for step, _ in fake.lines] == [10, 20, 30, 40, 50, 60] and fake.ended == 2
    assert fake.lines[1][1] == {"step/epoch": 0, "step/train_loss": 1 / 20}
    assert fake.begun[0] == fake.begun[1] and fake.begun[0][0] == {"lr": 1.0}
    Forwarder("wandb", tmp_path / "other", {}).close()  # a folder that is not there: a name of its own, nothing raised
    assert fake.begun[2][1] != fake.begun[0][1]


@pytest.mark.parametrize("content", ["{", "3", "[1, 2]"])
def test_a_name_that_cannot_be_read_is_another_run_which_a_line_says(fake, tmp_path, content):
    (tmp_path / ".log_to.json").write_text(content)
    said = []
    for _ in range(2):
        Forwarder("wandb", tmp_path, {}, say=said.append).close()
    assert len(said) == 1 and "cannot be read" in said[0] and "begins anew" in said[0]
    assert fake.begun[0] == fake.begun[1]


@pytest.mark.parametrize("error", [RuntimeError("no network"), SystemExit(3), KeyboardInterrupt()])
def test_a_logger_that_fails_is_one_warning(fake, tmp_path, error):
    def fail(numbers, step):
        if step == 20:
            raise error

    fake.log, said = fail, []
    forwarder = Forwarder("wandb", tmp_path, {}, said.append)
    for step in range(10, 100, 10):
        forwarder.send(line(step, x=1.0))
        time.sleep(0.01)
    forwarder.close()
    assert [step for step, _ in fake.lines] == [10] and len(said) == 1 and "--log_to wandb failed" in said[0]


def test_a_logger_that_hangs_costs_no_step_and_the_end_waits_a_while_only(fake, tmp_path, monkeypatch):
    monkeypatch.setattr(loggers, "WAITING", 5)
    monkeypatch.setattr(loggers, "CLOSE_S", 0.2)
    hung = threading.Event()
    fake.log, said = (lambda numbers, step: hung.wait(30)), []
    forwarder = Forwarder("wandb", tmp_path, {}, said.append)
    before = time.monotonic()
    for step in range(1, 1001):
        forwarder.send(line(step, x=1.0))
    forwarder.close()
    assert time.monotonic() - before < 5 and len(said) == 2 and "left alone" in said[0]
    assert 990 <= int(said[1].split("too slow, ")[1].split()[0]) <= 995
    hung.set()


def test_a_package_that_is_missing_is_named_before_the_run(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(UserError, match="pip install mlflow-skinny"):
        require("mlflow")


READ = {
    "wandb": """
import glob, struct, sys
from wandb.proto import wandb_internal_pb2
def records(content, at=7, whole=b""):  # LevelDB's log format behind seven bytes of wandb's own
    while at < len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, size, kind = struct.unpack_from("<IHB", content, at)
        whole += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            yield whole
            whole = b""
losses = []
for path in sorted(glob.glob(sys.argv[1] + "/wandb/offline-run-*/*.wandb")):
    for content in records(open(path, "rb").read()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(content)
        items = [(item.key or item.nested_key[0], item.value_json) for item in record.history.item]
        losses += [value for key, value in items if key == "step/train_loss"]
print(float(losses[-1]))
""",
    "mlflow": """
import os, sys, pathlib
os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
from mlflow import MlflowClient
client = MlflowClient((pathlib.Path(sys.argv[1]) / "mlruns").resolve().as_uri())
runs = client.search_runs([client.get_experiment_by_name("cplearn").experiment_id])
assert len(runs) == 1 and runs[0].info.status == "FINISHED"
print(client.get_metric_history(runs[0].info.run_id, "step/train_loss")[-1].value)
""",
    "trackio": """
import os, sqlite3
base = sqlite3.connect(os.path.join(os.environ["TRACKIO_DIR"], "cplearn.db"))
import json
rows = [json.loads(row[0]) for row in base.execute("select metrics from metrics order by step")]
print([row["step/train_loss"] for row in rows if "step/train_loss" in row][-1])
""",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", loggers.LOGGERS)
def test_the_real_logger_has_the_last_loss_of_a_run_that_was_started_twice(name, tmp_path):
    """The package is installed beside ours, for it brings many others along."""
    site, output = tmp_path / "site", tmp_path / "run"
    package = loggers.PACKAGES.get(name, name)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--target", str(site), package]
    done = subprocess.run(pip, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    environment = os.environ | {
        "PYTHONPATH": str(site),
        "TRACKIO_DIR": str(tmp_path / "trackio"),
        "OMP_NUM_THREADS": "1",
    }
    words = [
        "--dataset",
        "fashion_mnist",
        "--arch",
        "resnet8",
        "--width",
        "4",
        "--out_dim",
        "16",
        "--batch_size_per_gpu",
    ]
    words += ["8", "--log_every", "2", "--num_workers", "0", "--output_dir", str(output), "--log_to", name]
    for steps in ("4", "8"):
        command = [sys.executable, "main_cplearn.py", *words, "--max_steps", steps, "--allow_changed_flags"]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0 and "warning: --log_to" not in done.stdout, done.stdout + done.stderr
    told = subprocess.run(
        [sys.executable, "-c", READ[name], str(output)], env=environment, capture_output=True, text=True
    )
    lines = [json.loads(text) for text in (output / "log.txt").read_text().splitlines()]
    loss = [one["train_loss"] for one in lines if one["kind"] == "step"][-1]
    assert float(told.stdout.split()[-1]) == pytest.approx(loss, rel=1e-12), told.stderr
