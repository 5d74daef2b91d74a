"""The launcher without a cluster: its batch script run by bash with pretended SLURM commands, its refusals, its plans.

What needs a real SLURM is in tests/slurm.
"""

import importlib
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import types
from pathlib import Path

import pytest

import run_with_submitit
from runs import flags, write_pictures
from utils import UserError

HERE = socket.gethostname().partition(".")[0]


def launch(*words):
    """-> exit code."""
    try:
        run_with_submitit.main([str(word) for word in words])
    except SystemExit as end:
        return end.code
    return 0


def pretend(folder, **commands):
    """Shell scripts of these names, first in PATH."""
    (folder / "bin").mkdir(exist_ok=True)
    for name, text in commands.items():
        (folder / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / "bin" / name).chmod(0o755)
    return f"{folder}/bin:{os.environ['PATH']}"


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """slurm(sinfo=..., sbatch=...): a cluster of nothing but its commands, whose nodes are this machine."""

    def start(**commands):
        usual = {"sinfo": f"echo main {HERE}; echo gpu {HERE}", "sbatch": "echo Submitted batch job 77", "srun": ""}
        monkeypatch.setenv("PATH", pretend(tmp_path, **(usual | commands)))

    return start


# ---- what is submitted -----------------------------------------------------------------------------------------------


def batch_script(capsys, *words):
    pytest.importorskip("submitit")
    assert launch("--dry_run", *words) == 0
    return capsys.readouterr().out


def test_nothing_is_passed_to_sbatch_that_was_not_given(tmp_path, capsys):
    said = batch_script(capsys, "--ngpus", 1, "--output_dir", tmp_path / "run")
    assert re.findall(r"#SBATCH --([a-z-]+)", said) == [
        "error", "gpus-per-node", "job-name", "nodes", "ntasks-per-node", "open-mode", "output", "requeue", "signal"
    ]  # fmt: skip
    assert said.endswith(f"{sys.executable} main_cplearn.py --output_dir {tmp_path / 'run'} --device cuda\n")
    assert list(tmp_path.iterdir()) == []  # a dry run writes nothing


def test_what_was_given_is_passed(tmp_path, capsys):
    words = shlex.split(
        "--nodes 2 --ngpus 4 --timeout 60 --partition gpu --account me --qos high --constraint a100 --exclude n7 "
        "--comment why --gres gpu:a100:4 --cpus_per_task 6 --mem_gb 100 --job_name it --signal_delay_s 90"
    )
    said = batch_script(capsys, *words, "--output_dir", tmp_path)
    for line in (
        "nodes=2", "ntasks-per-node=4", "time=60", "partition=gpu", "account=me", "qos=high", "constraint=a100",
        "exclude=n7", "comment=why", "gres=gpu:a100:4", "cpus-per-task=6", "mem=100G", "job-name=it", "signal=USR2@90",
    ):  # fmt: skip
        assert f"#SBATCH --{line}\n" in said
    assert "gpus-per-node" not in said  # --gres says it
    srun = next(line for line in said.splitlines() if line.startswith("srun")).split()
    assert {"--cpus-per-task=6", "--kill-on-bad-exit=1", "--wait=0"} <= set(srun)  # rank 0 may end minutes later
    assert said.endswith("--num_workers 6 --device cuda\n")


def test_a_cpu_run_asks_for_no_gpu_and_setup_comes_first(tmp_path, capsys):
    setup = ("--setup", "module load cuda", "source env/bin/activate")
    said = batch_script(capsys, "--device", "cpu", "--ngpus", 2, *setup, "--output_dir", tmp_path)
    assert "gpus" not in said.split("# setup")[0]
    lines = said.split("# setup\n")[1].splitlines()
    assert lines[:2] == ["module load cuda", "source env/bin/activate"]
    assert lines[2].startswith("export PYTHONPATH=") and lines[3] == "export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}"


def test_the_number_of_workers_is_the_users_where_given(tmp_path, capsys):
    said = batch_script(capsys, "--cpus_per_task", 6, "--num_workers", 2, "--output_dir", tmp_path)
    assert said.endswith(f"--num_workers 2 --output_dir {tmp_path} --device cuda\n")


def test_an_array_is_one_job_per_value_with_folders_named_as_typed(tmp_path, capsys):
    said = batch_script(capsys, "--array", "lr", "1e-4", "3e-4", "--seed", "5", "--output_dir", tmp_path)
    assert "#SBATCH --array=0-1%2\n" in said
    runs = said.splitlines()[-2:]
    for run, value in zip(runs, ("1e-4", "3e-4"), strict=True):
        args = importlib.import_module("main_cplearn").get_args_parser().parse_args(shlex.split(run)[2:])
        assert (args.lr, args.seed, args.output_dir) == (float(value), 5, str(tmp_path / f"lr_{value}"))


def test_an_array_may_be_over_a_flag_that_must_be_given(tmp_path, capsys):
    words = ("--script", "eval_knn", "--array", "checkpoint", "a/c.pth", "b/c.pth")
    said = batch_script(capsys, *words, "--output_dir", tmp_path).splitlines()
    assert said[-2].endswith(f"eval_knn.py --output_dir {tmp_path} --device cuda --checkpoint a/c.pth "
                             f"--output_dir {tmp_path}/checkpoint_a_c.pth")  # fmt: skip


@pytest.mark.parametrize("script", run_with_submitit.SCRIPTS)
def test_no_flag_of_the_launcher_is_a_scripts(script):
    def names(module):
        return {name for a in importlib.import_module(module).get_args_parser()._actions for name in a.option_strings}

    assert names("run_with_submitit") & names(script) == {"-h", "--help"}
    assert "--output_dir" in names(script)


def test_what_a_user_is_told(slurm, tmp_path, capsys):
    pytest.importorskip("submitit")
    slurm()
    assert launch("--ngpus", 1, "--output_dir", tmp_path / "run") == 0
    said = capsys.readouterr().out
    log = tmp_path / "run" / "slurm" / "77_0_log.out"
    assert f"job 77: main_cplearn --output_dir {tmp_path / 'run'}" in said
    assert f"squeue -j 77; tail -f {log}" in said and "scancel 77" in said
    assert {path.name for path in log.parent.glob("[!.]*")} == {"77_submission.sh", "77_submitted.pkl"}


# ---- what is refused, with one line and exit code 2 ------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, said",
    [
        ("--out_dimm 5", "unrecognized arguments: --out_dimm 5"),
        ("--node 2", "unrecognized arguments: --node 2"),
        ("--lr fast", "fast"),
        ("--teacher_temp 0.04", "--objective cplearn has no such flag; it belongs to dino"),
        ("--array lr 1e-4 fast", "fast"),
        ("--array learning 1 2", "--array learning 1 2: expected a flag of main_cplearn.py"),
        ("--array output_dir a b", "expected a flag of main_cplearn.py"),
        ("--array lr", "expected a flag of main_cplearn.py and its values"),
        ("--array lr 1 1", "a value is there twice"),
        ("--script eval_knn --checkpoint c.pth", "--output_dir: expected a folder"),
        ("--script train", "invalid choice: 'train'"),
        ("--nodes 0", "--nodes 0: expected a whole number of at least 1"),
        ("--ngpus -1", "--ngpus -1: expected a whole number of at least 1"),
        ("--max_requeues -1", "at least 0"),
        ("--signal_delay_s 20", "--signal_delay_s 20: expected a whole number of at least 30"),
        ("--timeout 2", "--signal_delay_s 120: expected less than --timeout's 2 minutes"),
        ("--cluster local --nodes 2", "--nodes 2: --cluster local is this machine alone"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_submitted(slurm, tmp_path, monkeypatch, capsys, words, said):
    slurm(sbatch=f"touch {tmp_path}/submitted")
    monkeypatch.chdir(tmp_path)
    assert launch(*words.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and said in error
    assert {path.name for path in tmp_path.iterdir()} == {"bin"}


@pytest.mark.parametrize(
    "commands, words, said",
    [
        ({"sinfo": "echo slurm_load_partitions: Unable to contact >&2; exit 1"}, "", "SLURM does not answer: slurm_l"),
        ({}, "--partition learnfair", "--partition learnfair: no such partition; there are gpu, main"),
        (
            {"sbatch": "echo sbatch: error: Invalid qos >&2; exit 1"},
            "",
            "nothing was submitted: sbatch: error: Invalid qos",
        ),
        ({"sinfo": "echo main elsewhere"}, "", "a folder that all nodes share"),
    ],
)
def test_a_cluster_that_refuses_is_one_line(slurm, tmp_path, capsys, commands, words, said):
    pytest.importorskip("submitit")
    slurm(**commands)
    assert launch(*words.split(), "--output_dir", tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and said in error


def test_without_slurm_it_says_what_else_there_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert launch("--output_dir", tmp_path) == 2
    assert "sbatch: not found" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["nfs4", "lustre", "gpfs", "fuse.sshfs", "ext4", "overlay", "tmpfs"])
def test_a_folder_only_this_machine_sees(tmp_path, monkeypatch, capsys, kind):
    monkeypatch.setenv("PATH", pretend(tmp_path, findmnt=f"echo {kind}"))
    folder = Path("/shared/runs/x")
    if kind in ("overlay", "tmpfs"):
        with pytest.raises(UserError, match=kind):
            run_with_submitit.check_shared(folder)
    else:
        run_with_submitit.check_shared(folder)
        assert capsys.readouterr().out.startswith("note: ") == (kind == "ext4")


# ---- the batch script: does the job come back? -----------------------------------------------------------------------

RUNNING, CANCELLED = "JobState=RUNNING PreemptTime=None", "JobState=CANCELLED PreemptTime=None"
PREEMPTED = "JobState=RUNNING PreemptTime=2030-01-01T00:00:00"


@pytest.mark.parametrize(
    "code, ends, state, exit_code, decision",
    [
        (0, {}, RUNNING, 0, "done"),
        (0, {}, PREEMPTED, 0, "done"),
        (143, {1: "1 nan"}, RUNNING, 1, "an error of its own, rank 1: nan"),
        (143, {0: "75 peer", 1: "2 bad"}, PREEMPTED, 2, "an error of its own, rank 1: bad"),
        (1, {1: "137 Killed", 0: "1 unreached"}, RUNNING, 1, "requeued, failure 1 of at most 2, rank 1: Killed"),
        (1, {0: "1 bad", 1: "137 Killed"}, RUNNING, 1, "an error of its own, rank 0: bad"),
        (140, {0: "140 ", 1: "140 "}, RUNNING, 140, "requeued, saved on SIGUSR2"),
        (137, {0: "140 ", 1: "137 Killed"}, RUNNING, 137, "requeued, saved on SIGUSR2"),
        (140, {0: "140 User defined signal 2"}, RUNNING, 140, "requeued, failure 1 of at most 2, rank 0"),
        (143, {1: "137 Killed", 0: "143 "}, RUNNING, 143, "requeued, failure 1 of at most 2, rank 1"),
        (143, {1: "75 peer", 0: "143 "}, RUNNING, 143, "requeued, failure 1 of at most 2, rank 1"),
        (137, {}, RUNNING, 137, "requeued, failure 1 of at most 2"),
        (139, {}, RUNNING, 139, "requeued, failure 1 of at most 2"),
        (143, {0: "143 ", 1: "143 "}, RUNNING, 143, "stopped"),
        (130, {0: "130 "}, RUNNING, 130, "stopped"),
        (143, {0: "143 "}, PREEMPTED, 143, "requeued, preempted"),
        (137, {0: "137 Killed"}, CANCELLED, 137, "cancelled"),
        (140, {0: "140 "}, CANCELLED, 140, "cancelled"),
        (140, {0: "140 "}, "", 140, "requeued, saved on SIGUSR2"),  # slurmctld did not answer
    ],
)
def test_how_a_job_ends(tmp_path, capsys, code, ends, state, exit_code, decision):
    """ends: exit code and last words of each rank, in the order of their ends."""
    result, requeues, noted = end_batch(tmp_path, capsys, code, ends, state)
    assert result == exit_code
    assert f"exit code {exit_code}: {decision}" in noted
    assert requeues == (["requeue 5"] if decision.startswith("requeued") else [])


def test_failures_are_counted_and_what_was_saved_is_not(tmp_path, capsys):
    saved, killed = (140, {0: "140 "}), (137, {0: "137 Killed"})
    for start, (code, ends) in enumerate((saved, killed, saved, killed, saved), 1):
        _, requeues, _ = end_batch(tmp_path, capsys, code, ends, RUNNING)
        assert len(requeues) == start
    result, requeues, noted = end_batch(tmp_path, capsys, *killed, RUNNING)
    assert result == 137 and len(requeues) == 5
    assert noted.splitlines()[-1].endswith("exit code 137: failure 3 of at most 2, rank 0: Killed")


def test_what_an_earlier_start_left_is_not_taken_for_this_ones(tmp_path, capsys):
    jobs = tmp_path / "run" / "slurm"
    jobs.mkdir(parents=True)
    (jobs / "5_1_end.txt").write_text("1 1\n")
    (jobs / "5_1_result.pkl").write_text("")
    (jobs / "55_1_result.pkl").write_text("another job's")
    assert end_batch(tmp_path, capsys, 0, {}, RUNNING)[0] == 0
    assert {path.name for path in jobs.iterdir()} == {"5_requeues.txt", "55_1_result.pkl"}


def end_batch(tmp_path, capsys, code, ends, state, srun=""):
    """Run the batch script of job 5, and `srun` in it -> its exit code, the calls of `scontrol requeue` so far, and its
    notes."""
    jobs = tmp_path / "run" / "slurm"
    jobs.mkdir(parents=True, exist_ok=True)
    text = batch_script(capsys, "--max_requeues", 2, "--output_dir", tmp_path / "run").split("exit $code\n\n")[0]
    leave = []
    for rank, (number, _, words) in ((rank, end.partition(" ")) for rank, end in ends.items()):
        log = jobs / f"5_{rank}_log.err"
        lines = ["--- start 0 on n1", "error: of an earlier start", "--- start 1 on n1", words, "srun: error: 5.0"]
        log.write_text("\n".join(lines) + "\n")
        leave += [f"echo {number} {rank} > {jobs}/5_{rank}_end.txt", "sleep 0.02"]
    path = pretend(
        tmp_path,
        srun="\n".join([srun, *leave, f"exit {code}"]),
        scontrol=f'[ $1 = show ] && echo "{state}" || echo "$@" >> {tmp_path}/requeues',
    )
    batch = tmp_path / "batch.sh"
    batch.write_text(text + "exit $code\n")
    env = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")} | {"PATH": path, "SLURM_JOB_ID": "5"}
    done = subprocess.run(["bash", batch], env=env, capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    requeues = tmp_path / "requeues"
    return (
        done.returncode,
        requeues.read_text().splitlines() if requeues.exists() else [],
        (jobs / "5_requeues.txt").read_text(),
    )


def test_a_warning_after_the_error_is_not_taken_for_it(tmp_path, capsys):
    ends = {1: "75 error (rank 1): no progress for 20 s\n  File x, line 1"}
    assert end_batch(tmp_path, capsys, 143, ends, RUNNING)[2].endswith("rank 1: error (rank 1): no progress for 20 s\n")


@pytest.mark.parametrize("command, code", [("exit 3", 3), ("kill -9 $$", 137), ("kill -USR2 $PPID; exit 140", 140)])
def test_a_process_leaves_its_exit_code_even_when_it_is_killed(tmp_path, command, code):
    done = subprocess.run(
        ["bash", "-c", run_with_submitit.PROCESS, "bash", "-c", command],
        env=os.environ | {"JOB": f"{tmp_path}/5", "SLURM_PROCID": "1"}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == code
    assert (tmp_path / "5_1_end.txt").read_text() == f"{code} 1\n"
    assert done.stderr.startswith("--- start 0 on ")


# ---- the processes of a job ------------------------------------------------------------------------------------------


def environment(job=1234, restarts=0, **changes):
    values = {"global_rank": 5, "num_tasks": 8, "local_rank": 1, "num_nodes": 2, "hostnames": ["n3", "n4"]} | changes
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_RESTART_COUNT", str(restarts))
        return run_with_submitit.rendezvous(types.SimpleNamespace(raw_job_id=str(job), **values))


def test_processes_meet_at_the_first_node():
    env = environment()
    port = int(env.pop("MASTER_PORT"))
    assert env == {
        "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "n3",
        "CPLEARN_RESTART_COUNT": "0",
    }  # fmt: skip
    assert 1024 < port < 32768


def test_no_two_starts_of_neighbouring_jobs_share_a_port():
    ports = {environment(job, restarts)["MASTER_PORT"] for job in range(5000, 5100) for restarts in range(20)}
    assert len(ports) == 100 * 20


# ---- without a cluster -----------------------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path):
    return write_pictures(tmp_path / "pictures")


def test_debug_runs_in_this_process(pictures, tmp_path):
    words = flags(pictures, tmp_path / "run", max_steps=2)
    assert launch("--cluster", "debug", "--array", "seed", "1", "2", *words) == 0
    assert (tmp_path / "run" / "seed_1" / "checkpoint.pth").exists()
    assert (tmp_path / "run" / "seed_2" / "checkpoint.pth").exists()


@pytest.mark.slow
def test_local_runs_all_processes_and_passes_on_their_exit_code(pictures, tmp_path, capsys):
    pytest.importorskip("submitit")
    words = flags(pictures, tmp_path / "run", processes=2, max_steps=2)
    assert launch("--cluster", "local", "--ngpus", 2, *words) == 0
    said = capsys.readouterr().out
    log = Path(re.search(r"output: (\S+),", said).group(1))
    assert "2 processes" in log.read_text() and "done: 2 steps" in log.read_text()
    assert (tmp_path / "run" / "checkpoint.pth").exists()
    assert launch("--cluster", "local", "--ngpus", 1, *words, "--arch", "vit_tiny", "--patch_size", 7) == 2
    assert launch("--cluster", "local", "--ngpus", 1, *words, "--setup", f"kill -{signal.SIGKILL:d} $$") != 0


# ---- inside another job, and without submitit ------------------------------------------------------------------------


def test_a_job_submitted_from_a_job_is_not_told_of_it(slurm, tmp_path, monkeypatch):
    """sbatch hands its environment on; what a user has set for SLURM itself stays."""
    pytest.importorskip("submitit")
    others = {"SLURM_RESTART_COUNT": "2", "SLURM_MEM_PER_CPU": "1000", "SLURM_JOB_ID": "3", "RANK": "1",
              "WORLD_SIZE": "4", "TORCHELASTIC_RESTART_COUNT": "1", "CPLEARN_RESTART_COUNT": "1"}  # fmt: skip
    own = {"SLURM_CONF": "/etc/other.conf", "SBATCH_ACCOUNT": "mine"}
    for name, value in (others | own).items():
        monkeypatch.setenv(name, value)
    slurm(sbatch=f"env > {tmp_path}/seen; echo Submitted batch job 77")
    assert launch("--ngpus", 1, "--output_dir", tmp_path / "run") == 0
    seen = dict(line.partition("=")[::2] for line in (tmp_path / "seen").read_text().splitlines())
    assert not others.keys() & seen.keys() and own.items() <= seen.items()
    assert others.items() <= os.environ.items()


@pytest.mark.parametrize("script", ["main_cplearn", "eval_knn"])
def test_a_job_that_asks_for_gpus_uses_them(tmp_path, capsys, script):
    words = ["--script", script, "--output_dir", tmp_path, *(["--checkpoint", "c.pth"] if script == "eval_knn" else [])]
    assert batch_script(capsys, *words).endswith("--device cuda\n")
    for given in (["--device", "auto"], ["--device=auto"]):
        assert "cuda" not in batch_script(capsys, *words, *given)


def test_what_srun_said_is_noted_where_no_process_began(tmp_path, capsys):
    jobs = tmp_path / "run" / "slurm"
    jobs.mkdir(parents=True)
    log = jobs / "5_0_log.err"
    log.write_text("srun: of an earlier start\n")
    said = "srun: fatal: SLURM_MEM_PER_CPU and SLURM_MEM_PER_NODE are mutually exclusive."
    result, requeues, noted = end_batch(tmp_path, capsys, 1, {}, RUNNING, srun=f"echo '{said}' >> {log}")
    assert (result, requeues) == (1, []) and noted.endswith(f"exit code 1: stopped: {said}\n")
    assert end_batch(tmp_path, capsys, 1, {}, RUNNING)[2].endswith("exit code 1: stopped\n")


def test_without_submitit_flags_are_checked_and_one_line_says_what_is_missing(slurm, tmp_path, monkeypatch, capsys):
    slurm()
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert launch("--help") == 0
    capsys.readouterr()
    for more in ([], ["--dry_run"], ["--cluster", "local"]):
        assert launch("--output_dir", tmp_path / "run", *more) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "submitit" in error and "requirements.txt" in error
    assert launch("--dry_run", "--cluster", "debug", "--output_dir", tmp_path / "run") == 0
