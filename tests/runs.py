"""What the tests of whole runs share: pictures, a small run's flags, processes that run it, and how two runs compare.

    job = launch(flags(folder, output_dir, epochs=4), tmp_path, processes=2, faults={1: partial(faults.kill_at, ...)})
    job.wait_for("step 5/")
    assert job.wait() == [75, -signal.SIGKILL], job.output()

Processes are forked from one that has torch and main_cplearn in memory: importing them takes seven seconds each time.
"""

import contextlib
import importlib
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import main_cplearn
from checkpoint import load_checkpoint
from monitor import read_log
from pretrained import load_pretrained

ROOT = Path(main_cplearn.__file__).resolve().parent
NUM_IMAGES, BATCH, STEPS = 96, 8, 48  # a small run: 4 epochs of 12 steps, about 2 s
TIMEOUT = 240  # seconds for what takes a few on a quiet machine


def write_pictures(root, count=NUM_IMAGES):
    """`count` noisy PNGs of 32 px in 3 class folders, each class with a colour of its own; returns root."""
    rng = np.random.default_rng(0)
    for i in range(count):
        path = Path(root) / f"class{i % 3}" / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 120, (32, 32, 3))
        pixels[..., i % 3] += 100
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    return root


def kill_at(step):
    """A fault for `launch`: the process is killed before this step."""
    original = main_cplearn.train_one_step

    def killed(run, batches, at):
        if at == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(run, batches, at)

    main_cplearn.train_one_step = killed


@contextlib.contextmanager
def stopping_at(step):
    """Inside, main_cplearn.main of this process saves before this step and ends as by Ctrl-C."""
    original = main_cplearn.train_one_step

    def stop(run, batches, at):
        if at == step:
            main_cplearn.save(run, at)
            raise KeyboardInterrupt
        return original(run, batches, at)

    with pytest.MonkeyPatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(main_cplearn, "train_one_step", stop)
        yield


def flags(folder, output_dir, processes=1, **changes):
    """A small run on a ResNet-8, saved after every step, as words of the command line."""
    values = {
        "dataset": "imagefolder", "data_path": folder, "img_size": 32, "arch": "resnet8", "width": 16,
        "out_dim": 64, "batch_size_per_gpu": BATCH // processes, "epochs": 4, "warmup_epochs": 1, "precision": "fp32",
        "device": "cpu", "num_workers": 0, "log_every": 5, "saveckp_freq": 0, "save_every_minutes": 0,
        "output_dir": output_dir, "no-compile": True,
    } | changes  # fmt: skip
    words = []
    for name, value in values.items():
        if value is None:  # without this flag
            continue
        words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words


def launch(words, where, processes=1, faults=None, start_method="fork", script="main_cplearn"):
    """Run main(words) of `script` in `processes` processes; returns the Job.

    where: folder for what they print. faults: {rank: function called in that process before main}.
    start_method: of the data workers; on Linux Python's own is fork before 3.14, and forkserver from then on."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "main_cplearn", "matplotlib.pyplot"])
    output = Path(where) / f"output_{time.monotonic_ns()}.txt"
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as server:
        port = server.getsockname()[1]
    group = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    workers = []
    for rank in range(processes):
        env = group | {"RANK": rank, "LOCAL_RANK": rank} if processes > 1 else {}
        fault = (faults or {}).get(rank)
        command = (script, list(map(str, words)), env, str(output), fault, start_method)
        workers.append(context.Process(target=_run, args=command))
        workers[-1].start()
    return Job(workers, output)


def _run(script, words, env, output, fault, start_method):
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that starts tests with `&` has it ignored
    multiprocessing.set_start_method(start_method, force=True)
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update({name: str(value) for name, value in env.items()})
    torch.set_num_threads(1)
    if fault is not None:
        fault()
    print(f"process {os.getpid()} begins", flush=True)
    importlib.import_module(script).main(words)


class Job:
    """Processes of one run. Nothing here waits for ever: what takes too long is killed, and its output shown."""

    def __init__(self, workers, path):
        self.workers, self.path = workers, path

    def output(self):
        return self.path.read_text(errors="replace") if self.path.exists() else ""

    def wait(self, timeout=TIMEOUT):
        """The exit codes by rank; a process that died of signal n has -n."""
        deadline = time.monotonic() + timeout
        for worker in self.workers:
            worker.join(max(0.0, deadline - time.monotonic()))
        codes = [worker.exitcode for worker in self.workers]
        self.kill()  # the data workers of those that were killed
        assert None not in codes, f"exit codes {codes} after {timeout} s:\n{self.output()}"
        return codes

    def wait_for(self, text, timeout=TIMEOUT, times=1):
        """Return when `text` has been printed so often."""
        deadline = time.monotonic() + timeout
        while self.output().count(text) < times:
            over = not any(worker.is_alive() for worker in self.workers)
            if time.monotonic() > deadline or (over and self.output().count(text) < times):
                self.kill()
                raise AssertionError(f"{text!r} was not printed {times} times:\n{self.output()}")
            time.sleep(0.01)

    def signal(self, number, rank=0):
        os.kill(self.workers[rank].pid, number)

    def kill(self):
        for worker in self.workers:
            for kill in (os.killpg, os.kill):
                with contextlib.suppress(ProcessLookupError):
                    if kill is os.killpg or worker.exitcode is None:
                        kill(worker.pid, signal.SIGKILL)
            worker.join()


def run_to_end(words, where, processes=1, **options):
    """Returns what was printed by a run that must end well. options: `launch`'s."""
    job = launch(words, where, processes, **options)
    codes = job.wait()
    assert codes == [0] * processes, job.output()
    return job.output()


@contextlib.contextmanager
def torchrun(words, path, restarts=0, script=ROOT / "main_cplearn.py"):
    """A real torchrun of two processes, whose output goes to `path`; whatever still runs at the end is killed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               f"--max-restarts={restarts}", str(script), *words]  # fmt: skip
    with open(path, "w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        yield process
    finally:
        for pid in [*descendants(process.pid), process.pid]:  # those of torchrun have sessions of their own
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def descendants(pid):
    children = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout.split()
    return [one for child in children for one in (*descendants(child), int(child))]


def tensors(state, prefix=""):
    if isinstance(state, torch.Tensor):
        return {prefix: state}
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, (list, tuple)) else ()
    return {k: v for name, value in items for k, v in tensors(value, f"{prefix}.{name}").items()}


def assert_same_checkpoint(a, b):
    a, b = load_checkpoint(a), load_checkpoint(b)
    assert a["step"] == b["step"] and a["recorder"] == b["recorder"]
    ours, theirs = tensors(a), tensors(b)
    assert ours.keys() == theirs.keys() and len(ours) > 80
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert different == []


SPEED = ("images_per_s", "data_wait", "memory_mb")  # what the machine decides
AVERAGES = (
    "train_loss",
    "train_invariance",
    "train_prior",
    "train_grad_norm",
    "train_entropy",
    "gap",
    "gap_share",
    "entropy_share",
    "information",
    "batch_perplexity",
)


def logged(folder, without=SPEED):
    """The lines of log.txt without what need not be the same."""
    return [{k: v for k, v in line.items() if k not in without} for line in read_log(Path(folder) / "log.txt")]


def assert_same_run(folder, undisturbed, rank_lost=False):
    """Bit for bit the same end, the same log, and nothing left lying about.

    rank_lost: rank 0 may have saved its last step alone, so that what the dead had to add to the means since the last
    logged line is missing from the next one."""
    assert_same_checkpoint(Path(folder) / "checkpoint.pth", Path(undisturbed) / "checkpoint.pth")
    without = SPEED + (AVERAGES if rank_lost else ())
    assert logged(folder, without) == logged(undisturbed, without)
    assert not list(Path(folder).glob(".*.tmp"))


def assert_a_checkpoints_head_is_rebuilt(where, *words, **changes):
    """A run of an objective with codes: its head comes out of the checkpoint as it went in, and assigns codes."""
    given = [*flags(write_pictures(where / "pictures", 16), where / "run", **changes), *words]
    main_cplearn.train(main_cplearn.get_args_parser().parse_args(given))
    state = load_checkpoint(where / "run" / "checkpoint.pth")
    model = load_pretrained(where / "run" / "checkpoint.pth")
    assert model.head.state_dict()
    for name, value in model.head.state_dict().items():
        assert torch.equal(value, state["student"]["head." + name])
    features = torch.randn(9, model.embed_dim)
    assert model.head.num_codes == 64 and model.assign_features(features).shape == (9,)
