"""On a real SLURM: whatever happens to a job, it comes back and ends as if nothing had happened.

    python -m pytest -m slurm tests/slurm          # about five minutes on two cores; needs root, see cluster.py

Each story is a job with two processes and something that happens to it. Most of their time is waiting, so several are
told at once; what each must end in is the undisturbed job's checkpoint, bit for bit.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import run_with_submitit
from runs import assert_same_checkpoint, flags, logged, write_pictures

pytestmark = pytest.mark.slurm

TIMEOUT = 300  # seconds for what takes 20 on a quiet machine
AT_ONCE = 3
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY")


class Job:
    """A submitted job. Nothing here waits for ever: what takes too long shows the job's logs."""

    def __init__(self, script_words, output_dir, *words):
        self.folder, self.jobs = Path(output_dir), Path(output_dir) / "slurm"
        run_with_submitit.main(["--signal_delay_s", "30", *map(str, words), *script_words])
        (submission,) = self.jobs.glob("*_submission.sh")
        self.id = submission.name.split("_")[0]

    def field(self, name):
        return re.search(rf"\b{name}=(\S+)", command("scontrol", "show", "job", self.id)).group(1)

    def wait(self):
        """-> the state in which it ended."""
        self.until(lambda: self.field("JobState") in ENDED, "the job's end")
        return self.field("JobState")

    def wait_for_step(self):
        began = "step 5/"
        self.until(lambda: began in self.logs("*_0_log.out") or self.field("JobState") in ENDED, began)
        assert began in self.logs("*_0_log.out"), self.logs()

    def until(self, condition, what):
        deadline = time.monotonic() + TIMEOUT
        while not condition():
            assert time.monotonic() < deadline, f"{what} did not come in {TIMEOUT} s:\n{self.logs()}"
            time.sleep(0.1)

    def logs(self, pattern="*.[!ps]*"):
        return "\n".join(f"{p.name}:\n{p.read_text(errors='replace')}" for p in sorted(self.jobs.glob(pattern)))

    def decisions(self):
        """What the end of the batch script has noted."""
        return "".join(path.read_text() for path in self.jobs.glob("*_requeues.txt"))

    def send(self, number, rank):
        """To that process alone, behind SLURM's back."""
        for environ in Path("/proc").glob("[0-9]*/environ"):
            try:
                env, words = environ.read_bytes(), environ.with_name("cmdline").read_bytes()
            except (OSError, ProcessLookupError):
                continue
            is_ours = f"SLURM_JOB_ID={self.id}\0".encode() in env and f"SLURM_PROCID={rank}\0".encode() in env
            if is_ours and words.startswith(sys.executable.encode()) and b"submitit" in words:
                return os.kill(int(environ.parent.name), number)
        raise AssertionError(f"rank {rank} of job {self.id} is not there:\n{self.logs()}")


def command(*words):
    return subprocess.run(words, capture_output=True, text=True, check=True, timeout=60).stdout


# ---- stories: what happens to a job after its fifth step -------------------------------------------------------------


def nothing(job):
    pass


def signalled(job):
    command("scancel", "--signal=USR2", job.id)


def requeued(job):
    command("scontrol", "requeue", job.id)


def out_of_time(job):
    """Held still until then, so that the speed of the machine is no matter: SLURM sends SIGCONT with its signal."""
    for rank in (0, 1):
        job.send(signal.SIGSTOP, rank)


def preempted(job):
    command("sbatch", "--partition=high", "--nodes=2", "--gres=gpu:2", "--output=/dev/null", "--wrap=sleep 1")


def killed(job):
    job.send(signal.SIGKILL, rank=1)


def signalled_while_blocked(job):
    job.send(signal.SIGSTOP, rank=1)
    time.sleep(1)  # rank 0 now waits for it in a collective
    signalled(job)


def hung(job):
    job.send(signal.SIGSTOP, rank=1)


# per story: the launcher's flags, the script's changes, what is noted at the job's end
NODES_1x2, NODES_2x1 = ("--nodes", 1, "--ngpus", 2), ("--nodes", 2, "--ngpus", 1)
STORIES = {
    nothing: (NODES_1x2, {}, "exit code 0: done"),
    # SLURM looks at its clock every 30 s and in time: the signal comes in the third minute
    out_of_time: ((*NODES_1x2, "--timeout", 3), {}, "requeued, saved on SIGUSR2"),
    signalled: (NODES_2x1, {}, "requeued, saved on SIGUSR2"),
    requeued: (NODES_2x1, {}, "exit code 0: done"),
    preempted: ((*NODES_2x1, "--partition", "low", "--gres", "gpu:2"), {}, "requeued, saved on SIGUSR2"),
    killed: (NODES_2x1, {}, "requeued, failure 1 of at most 5, rank 1"),
    signalled_while_blocked: (NODES_2x1, {}, "requeued, saved on SIGUSR2"),
    hung: (NODES_1x2, {"watchdog_s": 20}, "requeued, failure 1 of at most 5, rank 0"),
}

# rank 0 saved without the other: the next logged averages hold some of its own numbers, not those of both
SAVED_ALONE = (killed, signalled_while_blocked, hung)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    write_pictures(root / "val", 24)
    write_pictures(root / "train")
    return root


@pytest.fixture(scope="module")
def told(slurm, pictures, tmp_path_factory, request):
    """{story: its future}: the jobs of all selected tests, several at once."""
    wanted = [item.callspec.params.get("story") for item in request.session.items if hasattr(item, "callspec")]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield {
            story: pool.submit(tell, story, pictures, tmp_path_factory.mktemp(story.__name__))
            for story in STORIES
            if story in (nothing, *wanted)
        }


def tell(story, pictures, output_dir):
    words, changes, _ = STORIES[story]
    job = Job(run_flags(pictures, output_dir, **changes), output_dir, *words)
    job.wait_for_step()
    story(job)
    assert job.wait() == "COMPLETED", job.logs()
    return job


def run_flags(pictures, output_dir, processes=2, **changes):
    return flags(pictures, output_dir, processes, **({"epochs": 10, "save_every_minutes": 0.01} | changes))


@pytest.mark.parametrize("story", list(STORIES), ids=lambda story: story.__name__)
def test_a_job_ends_as_if_nothing_had_happened(told, story):
    job, undisturbed = told[story].result(), told[nothing].result()
    assert STORIES[story][2] in job.decisions(), job.logs()
    restarts = int(job.field("Restarts"))
    assert restarts == 0 if story is nothing else restarts >= 1
    if story is not nothing:
        assert "resuming at step" in job.logs("*_0_log.out")
        assert_same_checkpoint(job.folder / "checkpoint.pth", undisturbed.folder / "checkpoint.pth")
        if story not in SAVED_ALONE:
            assert logged(job.folder) == logged(undisturbed.folder)


# ---- jobs that must not come back ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, code, reason",
    [
        ({"lr": 1e30, "clip_grad": 0}, "1:0", "is nan"),
        ({"arch": "vit_tiny"}, "2:0", "--width 16 is for --arch resnet8"),
    ],
)
def test_an_error_of_its_own_is_not_tried_again(slurm, pictures, tmp_path, changes, code, reason):
    job = Job(run_flags(pictures, tmp_path, **changes), tmp_path, *NODES_1x2)
    assert job.wait() == "FAILED", job.logs()
    assert job.field("ExitCode") == code and job.field("Restarts") == "0"
    assert "an error of its own, rank" in job.decisions() and reason in job.decisions()


def test_a_cancelled_job_stays_cancelled(slurm, pictures, tmp_path):
    job = Job(run_flags(pictures, tmp_path, epochs=1000), tmp_path, *NODES_2x1)
    job.wait_for_step()
    command("scancel", job.id)
    assert job.wait() == "CANCELLED", job.logs()
    time.sleep(8)  # a requeued job would be waiting or running by now
    assert job.field("JobState") == "CANCELLED" and "requeued," not in job.decisions()


def test_a_job_that_always_fails_ends(slurm, pictures, tmp_path):
    """The second process is killed as soon as it lives."""
    hook = tmp_path / "hook" / "sitecustomize.py"
    hook.parent.mkdir()
    hook.write_text("import os\nif os.environ.get('SLURM_PROCID') == '1':\n    os.kill(os.getpid(), 9)\n")
    setup = ("--max_requeues", 2, "--setup", f"export PYTHONPATH={hook.parent}")
    job = Job(run_flags(pictures, tmp_path), tmp_path, *NODES_1x2, *setup)
    assert job.wait() == "FAILED", job.logs()
    assert job.field("Restarts") == "2"
    noted = job.decisions().splitlines()
    assert ["requeued" in line for line in noted] == [True, True, False], noted


def test_an_evaluation_without_time_is_not_started_for_ever(slurm, pictures, told, tmp_path):
    words = evaluation_flags(told, pictures, tmp_path)
    job = Job(words, tmp_path, *NODES_1x2, "--max_requeues", 0, "--script", "eval_knn")
    job.until(lambda: "Loading pickle" in job.logs("*_0_log.out"), "the evaluation's start")
    signalled(job)
    assert job.wait() == "FAILED", job.logs()
    assert "failure 1 of at most 0" in job.decisions()


# ---- other jobs ------------------------------------------------------------------------------------------------------


def test_four_processes_on_two_nodes(slurm, pictures, tmp_path):
    job = Job(run_flags(pictures, tmp_path, processes=4), tmp_path, "--nodes", 2, "--ngpus", 2)
    assert job.wait() == "COMPLETED", job.logs()
    assert "4 processes" in job.logs("*_0_log.out") and "done: 120 steps" in job.logs("*_0_log.out")


def test_an_array_of_three_gives_three_run_folders(slurm, pictures, tmp_path):
    """By the command itself, from another folder."""
    root = Path(run_with_submitit.__file__).parent
    words = [*run_flags(pictures, tmp_path, epochs=1), "--ngpus", "1", "--array", "lr", "1e-4", "3e-4", "1e-3"]
    said = subprocess.run(
        [sys.executable, root / "run_with_submitit.py", *words], cwd=tmp_path, capture_output=True, text=True
    )
    assert said.returncode == 0, said.stderr
    array = re.search(r"scancel (\d+)", said.stdout).group(1)
    deadline = time.monotonic() + TIMEOUT
    while command("squeue", "-h", "-j", array):
        assert time.monotonic() < deadline, f"the array has not ended:\n{said.stdout}"
        time.sleep(0.2)
    for i, lr in enumerate(("1e-4", "3e-4", "1e-3")):
        assert (tmp_path / f"lr_{lr}" / "checkpoint.pth").exists(), said.stdout
        assert "exit code 0: done" in (tmp_path / "slurm" / f"{array}_{i}_requeues.txt").read_text()


def test_an_evaluation_of_a_checkpoint(slurm, pictures, told, tmp_path):
    job = Job(evaluation_flags(told, pictures, tmp_path), tmp_path, *NODES_2x1, "--script", "eval_knn")
    assert job.wait() == "COMPLETED", job.logs()
    assert json.loads((tmp_path / "results_knn.json").read_text())


def evaluation_flags(told, pictures, output_dir):
    checkpoint = told[nothing].result().folder / "checkpoint.pth"
    words = ["--checkpoint", checkpoint, "--data_path", pictures, "--nb_knn", 10, "--device", "cpu"]
    return [*map(str, words), "--output_dir", str(output_dir)]


def test_an_experiments_cells_are_jobs_that_come_back(slurm, pictures, tmp_path):
    """Two cells; the signal of a time limit reaches the first one's training through run_experiments.py."""
    root = Path(run_with_submitit.__file__).parent
    flags_of_run = dict(zip(("data_path", "epochs", "save_every_minutes"), (str(pictures), 60, 10), strict=True))
    flags_of_run |= {"dataset": "imagefolder", "img_size": 32, "arch": "resnet8", "width": 16, "out_dim": 64}
    flags_of_run |= {"batch_size_per_gpu": 8, "log_every": 5, "num_workers": 0, "saveckp_freq": 0}
    lines = ["[flags]", *(f"{flag} = {json.dumps(value)}" for flag, value in flags_of_run.items())]
    lines += ["[budget.few]", "seeds = [0, 1]", "[[column]]", 'name = "C"', "[[row]]", 'name = "R"']
    (tmp_path / "table.toml").write_text("\n".join([*lines, "[evaluate.knn]", "nb_knn = [10]"]))
    words = ["table.toml", "--budget", "few", "--device", "cpu", "--output_dir", "runs", "--results_dir", "results"]
    words += ["--submit", "--signal_delay_s 30"]
    said = subprocess.run(
        [sys.executable, root / "run_experiments.py", *words], cwd=tmp_path, capture_output=True, text=True
    )
    assert said.returncode == 0, said.stderr
    array = re.search(r"scancel (\d+)", said.stdout).group(1)
    printed, deadline = tmp_path / "runs/table/few/R,C,seed0/train.txt", time.monotonic() + TIMEOUT
    while not printed.exists() or "step 5/" not in printed.read_text():
        assert time.monotonic() < deadline, said.stdout
        time.sleep(0.1)
    command("scancel", "--signal=USR2", f"{array}_0")
    while command("squeue", "-h", "-j", array):
        assert time.monotonic() < deadline, f"the array has not ended:\n{said.stdout}"
        time.sleep(0.2)
    decisions = [(tmp_path / "runs" / "slurm" / f"{array}_{i}_requeues.txt").read_text() for i in (0, 1)]
    kept = [json.loads((tmp_path / f"results/table/few/R,C,seed{seed}.json").read_text()) for seed in (0, 1)]
    assert "requeued, saved on SIGUSR2" in decisions[0] and "resuming at step" in printed.read_text(), decisions
    assert all("exit code 0: done" in text for text in decisions), decisions
    assert [cell["status"] for cell in kept] == ["done", "done"]
    assert [cell["starts"]["train"] for cell in kept] == [2, 1] and kept[0]["uncounted_starts"] == {}
