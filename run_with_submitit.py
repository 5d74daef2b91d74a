"""Run any script of this repository on a SLURM cluster: one process per GPU, and back again after every interruption.

    python run_with_submitit.py --nodes 2 --ngpus 8 --arch vit_small --data_path /data/in1k --output_dir /shared/in1k
    python run_with_submitit.py --script eval_linear --checkpoint runs/in1k/checkpoint.pth --output_dir runs/in1k
    python run_with_submitit.py --array lr 1e-4 3e-4 1e-3 --output_dir /shared/runs/sweep    # sweep/lr_1e-4, ...

Flags that are not this program's go to the script, and are checked before anything is submitted. Job files (logs, the
batch script, why a job was started again) are in OUTPUT_DIR/slurm.

Whether a job comes back is decided in one place, the end of its batch script: COME_BACK below.
"""

import contextlib
import importlib
import io
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from utils import (
    RESTART_COUNT,
    ArgumentParser,
    Number,
    UserError,
    command_line,
    not_negative,
    number_of_environment,
    positive,
)

ROOT = Path(__file__).resolve().parent
SCRIPTS = (
    "main_cplearn", "eval_knn", "eval_linear", "eval_cluster", "eval_collapse", "visualize_attention",
    "export_backbone", "run_experiments",
)  # fmt: skip

MEMORY_TYPES = ("tmpfs", "ramfs", "overlay")  # of file systems: seen by one machine only
DISK_TYPES = (
    "ext2",
    "ext3",
    "ext4",
    "xfs",
    "btrfs",
    "zfs",
    "f2fs",
)  # and these, unless they are exported to the others
TEMPORARY = ("/tmp", "/var/tmp", "/dev/shm")

# Each process is started by these lines of shell, which outlive it: even one that was killed leaves its exit code.
# JOB is what all files of the job begin with. Logs are appended to, so each start is marked in them.
PROCESS = """\
trap : INT TERM USR2
rank=${SUBMITIT_LOCAL_GLOBALID:-$SLURM_PROCID}
echo "--- start ${SLURM_RESTART_COUNT:-0} on $HOSTNAME" >&2
"$0" "$@"
code=$?
[ $code = 0 ] || echo "$code $rank" > "${JOB}_${rank}_end.txt"
exit $code"""

# Lines of the batch script before srun.
PREPARE = """\
export JOB={folder}/${{SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}}${{SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}}
MAX_REQUEUES={max_requeues}
LINES_BEFORE=$(cat "$JOB"_0_log.err 2>/dev/null | wc -l)
rm -f "$JOB"_*_end.txt "$JOB"_*_result.pkl  # of an earlier start"""

# And after srun, whose own exit code is not enough: when one process ends, SLURM ends the others by SIGTERM, and the
# highest code wins. 0: done; 1, 2: an error of its own, unless a process was killed first, which the others may have
# met as an error; 130, 143: stopped by SIGINT, SIGTERM; 140: saved because of SIGUSR2 (time limit, preemption), or with
# bash's words for it: died of it, nothing was saved; 75: ended through no fault of its own; 134 to 139: killed, or
# crashed. Where no process left a code, none began, and srun says why.
COME_BACK = """\
code=$?
said() {  # what rank $1 said last in this start
  awk '/^--- start/ {last = err = ""} !/^srun: / {last = $0} /^error/ {err = $0} END {print err ? err : last}' \
    "$JOB"_$1_log.err
}
saved() {  # whether a rank ended with 140 by itself
  grep -hs "^140 " "$JOB"_*_end.txt | while read -r _ rank; do said $rank; done | grep -qv "User defined signal"
}
state=$(scontrol show job "$SLURM_JOB_ID")
failures=$(cat "$JOB"_requeues.txt 2>/dev/null | grep -c "requeued, failure")
own=$(cat "$JOB"_*_end.txt 2>/dev/null | grep "^[12] " | head -n 1)
first=$(cat "$(ls -tr "$JOB"_*_end.txt 2>/dev/null | head -n 1)" 2>/dev/null)  # the one whose end ended the others
again=
if [ $code = 0 ]; then why="done"
elif [[ $own && ! ${first% *} =~ ^13[4-9]$ ]]; then
  code=${own% *}; why="an error of its own, rank ${own#* }: $(said ${own#* })"
elif [[ $state == *JobState=* && $state != *JobState=RUNNING* ]]; then why="cancelled, or requeued by SLURM itself"
elif saved; then again=1; why="saved on SIGUSR2"
elif [[ $state =~ PreemptTime=[0-9] ]]; then again=1; why="preempted"
elif [[ " $code ${first% *} " =~ " "(75|13[4-9]|140)" " ]]; then
  why="failure $((failures + 1)) of at most $MAX_REQUEUES${first:+, rank ${first#* }: $(said ${first#* })}"
  [ $failures -ge $MAX_REQUEUES ] || again=1
else why="stopped${first:+, rank ${first#* }}"; fi
[ $code = 0 ] || [ "$first" ] || srun=$(tail -n +$((LINES_BEFORE + 1)) "$JOB"_0_log.err 2>/dev/null | tail -n 1)
why=$why${srun:+: $srun}
echo "$(date +%FT%T) exit code $code: ${again:+requeued, }$why" >> "$JOB"_requeues.txt
if [ $again ]; then  # while slurmctld is away, try for ten minutes
  for _ in {1..60}; do scontrol requeue "$SLURM_JOB_ID" && break; sleep 10; done
fi
exit $code"""


def get_args_parser():
    parser = ArgumentParser("run_with_submitit.py", "Run a script of this repository on SLURM.")
    add = parser.add_argument_group("what").add_argument
    add("--script", choices=SCRIPTS, default="main_cplearn", help="all other flags are this script's: SCRIPT.py --help")
    add("--array", nargs="+", metavar=("NAME", "VALUE"), help="a job per value of this flag, in OUTPUT_DIR/NAME_VALUE")
    add("--cluster", choices=("slurm", "local", "debug"), default="slurm",
        help="local: on this machine, and wait for it; debug: one process, in this one")  # fmt: skip
    add("--dry_run", action="store_true", help="print the batch script and the script's command line; write nothing")
    add = parser.add_argument_group("where").add_argument
    add("--nodes", type=positive(int), default=1, help="number of machines")
    add("--ngpus", type=positive(int), default=8,
        help="processes per node, one GPU each; none is asked for with --device cpu")  # fmt: skip
    add("--timeout", type=positive(int), default=None, metavar="MIN",
        help="time limit of each start (default: the partition's)")  # fmt: skip
    for flag in ("--partition", "--account", "--qos", "--constraint", "--exclude", "--comment"):
        add(flag, default=None, help="as in sbatch")
    add("--gres", default=None, help="as in sbatch; replaces the request of --ngpus GPUs per node")
    add(
        "--cpus_per_task",
        type=positive(int),
        default=None,
        help="also the number of data workers, unless that is given",
    )
    add("--mem_gb", type=positive(int), default=None, help="per node")
    add("--job_name", default=None, help="(default: the script's name)")
    add("--setup", nargs="+", default=[], metavar="LINE", help="shell lines before all else: 'module load cuda'")
    add = parser.add_argument_group("coming back").add_argument
    add("--signal_delay_s", type=Number(int, least=30), default=120,
        help="save and requeue so long before the time limit; SLURM's clock is coarse")  # fmt: skip
    add("--max_requeues", type=not_negative(int), default=5,
        help="starts after a failure; time limits and preemptions do not count")  # fmt: skip
    parser.epilog = "All flags of the script are taken too: python main_cplearn.py --help."
    return parser


@command_line
def main(argv=None):
    args, words = get_args_parser().parse_known_args(argv)
    check_flags(args)
    folder, tasks, runs = plan(args, words)
    if args.dry_run:
        print(describe(args, folder, tasks, runs))
    elif args.cluster == "debug":
        for task in tasks:
            run_script(task)
    elif args.cluster == "local":
        sys.exit(max(run_locally(args, folder, *job) for job in zip(tasks, runs, strict=True)))
    else:
        check_slurm(args, folder)
        need_submitit()
        report(folder, submit(args, folder, tasks, runs), tasks)


def check_flags(args):
    if args.timeout and args.signal_delay_s >= 60 * args.timeout:
        raise UserError(
            f"--signal_delay_s {args.signal_delay_s}: expected less than --timeout's {args.timeout} minutes"
        )
    if args.cluster != "slurm" and args.nodes > 1:
        raise UserError(f"--nodes {args.nodes}: --cluster {args.cluster} is this machine alone; expected 1")


def need_submitit():
    """Imported where it is used: --help, every check of flags, and --cluster debug do without. Raises UserError."""
    try:
        import submitit
    except ModuleNotFoundError as error:
        raise UserError(f"{error}; it hands jobs to SLURM: pip install -r requirements.txt") from None
    return submitit


# ---- what is to run --------------------------------------------------------------------------------------------------


@dataclass
class Task:
    """What every process of a job runs. Plain data: it is pickled."""

    script: str
    words: list

    def __call__(self):
        env = need_submitit().JobEnvironment()
        os.environ.update(rendezvous(env))
        # submitit's handlers; until training has its own, and in evaluations, there is nothing to save
        for number in (signal.SIGUSR2, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        run_script(self)


def run_script(task):
    return importlib.import_module(task.script).main(task.words)


def rendezvous(env):
    """What torchrun would have set, and a port that no earlier start of this job has used (nor the job beside it).

    env: submitit's description of the job. Ports: 10000 to 29999, below those that Linux hands out by itself."""
    restarts = number_of_environment("SLURM_RESTART_COUNT")
    return {
        "RANK": str(env.global_rank),
        "WORLD_SIZE": str(env.num_tasks),
        "LOCAL_RANK": str(env.local_rank),
        "LOCAL_WORLD_SIZE": str(env.num_tasks // env.num_nodes),
        "MASTER_ADDR": env.hostnames[0],
        "MASTER_PORT": str(10_000 + (101 * int(env.raw_job_id) + restarts) % 20_000),
        RESTART_COUNT: str(restarts),
    }


def plan(args, words):
    """-> folder of the job files, the tasks (one per value of a sweep), their flags as the script itself reads them.

    A job that asks for GPUs must use them: where no --device was given it is cuda, not auto."""
    parser = importlib.import_module(args.script).get_args_parser()
    known = {name for action in parser._actions for name in action.option_strings}
    if args.cpus_per_task and "--num_workers" in known and not any(w.startswith("--num_workers") for w in words):
        words = [*words, "--num_workers", str(args.cpus_per_task)]
    if args.cluster == "slurm" and not any(w.partition("=")[0] == "--device" for w in words):
        words = [*words, "--device", "cuda"]
    every = sweep(args, words, known) if args.array else [words]
    folder = parser.parse_args(every[0]).output_dir
    if folder is None:
        raise UserError("--output_dir: expected a folder; the job's logs go to OUTPUT_DIR/slurm")
    if args.array and args.script != "run_experiments":  # its cells have folders of their own
        every = [[*w, "--output_dir", str(Path(folder, run_name(*w[-2:])))] for w in every]
    if len({tuple(w) for w in every}) < len(every):
        raise UserError(f"--array {shlex.join(args.array)}: a value is there twice")
    runs = [parser.parse_args(w) for w in every]
    return Path(folder).absolute() / "slurm", [Task(args.script, w) for w in every], runs


def sweep(args, words, known):
    name, *values = args.array
    flag = f"--{name.lstrip('-')}"
    if flag not in known - {"--output_dir"} or not values:
        raise UserError(f"--array {shlex.join(args.array)}: expected a flag of {args.script}.py and its values")
    return [[*words, flag, value] for value in values]


def run_name(flag, value):
    return f"{flag[2:]}_{value.replace('/', '_')}"


# ---- starting it -----------------------------------------------------------------------------------------------------


def submit(args, folder, tasks, runs):
    """-> submitit's jobs: one, or a job array's."""
    submitit = need_submitit()
    failures = (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError)
    executor = submitit.SlurmExecutor(folder, python=python_command())
    executor.update_parameters(**batch_parameters(args, folder, runs[0]))
    try:
        with without_this_job(), contextlib.redirect_stderr(io.StringIO()):  # submitit prints what it raises
            return executor.submit_array(tasks)
    except failures as error:
        raise UserError(f"nothing was submitted: {' '.join(str(error).split())}") from None


@contextlib.contextmanager
def without_this_job():
    """The environment without the variables of a job in which the launcher itself may be: sbatch hands all of them on,
    and SLURM takes another job's memory, CPUs or restarts for the new job's. What a user sets stays."""
    kept = {name: value for name, value in os.environ.items() if name == "SLURM_CONF" or name.startswith("SBATCH_")}
    with need_submitit().helpers.clean_env(extra_names=(RESTART_COUNT, "TORCHELASTIC_RESTART_COUNT")):
        os.environ.update(kept)
        yield


def batch_parameters(args, folder, run):
    """What submitit writes into the batch script; nothing that was not asked for."""
    names = ("partition", "account", "qos", "constraint", "exclude", "comment", "gres", "cpus_per_task")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.mem_gb:
        given["mem"] = f"{args.mem_gb}G"
    # since SLURM 22.05 srun does not take sbatch's number of CPUs
    cpus = [f"--cpus-per-task={args.cpus_per_task}"] if args.cpus_per_task else []
    quoted = shlex.quote(str(folder))
    return {
        "job_name": args.job_name or args.script,
        "time": args.timeout,
        "nodes": args.nodes,
        "ntasks_per_node": args.ngpus,
        "gpus_per_node": None if args.gres else num_gpus(args, run) or None,
        "signal_delay_s": args.signal_delay_s,
        "setup": setup_lines(args) + PREPARE.format(folder=quoted, max_requeues=args.max_requeues).splitlines(),
        # --wait=0: rank 0 of an evaluation works on when the others have ended, for longer than a site's WaitTime
        "srun_args": ["--kill-on-bad-exit=1", "--wait=0", *cpus],
        "teardown": COME_BACK.splitlines(),
        "additional_parameters": {"requeue": True, **given},
        "wckey": None,  # submitit's own, which some clusters refuse
    }


def num_gpus(args, run):
    return 0 if run.device == "cpu" else args.ngpus


def python_command():
    return shlex.join(["bash", "-c", PROCESS, sys.executable])


def setup_lines(args):
    """The user's, then: where the pickled Task finds its code, and one thread per process, as torchrun has it."""
    path = f"export PYTHONPATH={shlex.quote(str(ROOT))}${{PYTHONPATH:+:$PYTHONPATH}}"
    threads = ["export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}"] if args.ngpus > 1 else []
    return [*args.setup, path, *threads]


def run_locally(args, folder, task, run):
    """Run it on this machine, wait for its end; returns the highest exit code of its processes."""
    executor = need_submitit().LocalExecutor(folder, python=python_command())
    executor.update_parameters(
        tasks_per_node=args.ngpus,
        gpus_per_node=num_gpus(args, run),
        timeout_min=args.timeout or 60 * 24 * 365,
        signal_delay_s=args.signal_delay_s,
        setup=[*setup_lines(args), f"export JOB={shlex.quote(str(folder))}/$$"],
    )
    job = executor.submit(task)
    print(f"local job {job.job_id}; output: {job.paths.stdout}, {job.paths.stderr}", flush=True)
    job.wait()
    codes = [local_exit_code(folder, job.job_id, rank) for rank in range(args.ngpus)]
    print(f"local job {job.job_id} ended; exit codes {codes}")
    return max(codes)


def local_exit_code(folder, job_id, rank):
    end = folder / f"{job_id}_{rank}_end.txt"
    if end.exists():
        return int(end.read_text().split()[0])
    return 0 if (folder / f"{job_id}_{rank}_result.pkl").exists() else 128 + signal.SIGKILL


def describe(args, folder, tasks, runs):
    lines = [shlex.join([sys.executable, f"{task.script}.py", *task.words]) for task in tasks]
    if args.cluster == "slurm":
        command = f"{python_command()} -u -m submitit.core._submit {shlex.quote(str(folder))}"
        count = len(tasks) if len(tasks) > 1 else None
        parameters = batch_parameters(args, folder, runs[0])
        script = need_submitit().slurm.slurm._make_sbatch_string(command, folder, map_count=count, **parameters)
        lines.insert(0, script + "\n")
    return "\n".join(lines)


def report(folder, jobs, tasks):
    for job, task in zip(jobs, tasks, strict=True):
        print(f"job {job.job_id}: {shlex.join([task.script, *task.words])}")
        print(f"  logs: {job.paths.stdout} and {job.paths.stderr}; of rank R: {job.job_id}_R_log.out")
    first = jobs[0].job_id.split("_")[0]
    print(f"watch:  squeue -j {first}; tail -f {jobs[0].paths.stdout}\ncancel: scancel {first}")
    print(f"why a job was started again: {folder}/*_requeues.txt")


# ---- what cannot work is refused -------------------------------------------------------------------------------------


def check_slurm(args, folder):
    for command in ("sbatch", "srun", "sinfo"):
        if not shutil.which(command):
            raise UserError(f"{command}: not found; is this a SLURM cluster's login node? Else --cluster local")
    partitions, hosts = ask_slurm()
    if args.partition and not set(args.partition.split(",")) <= partitions:
        raise UserError(f"--partition {args.partition}: no such partition; there are {', '.join(sorted(partitions))}")
    if hosts != {short_name(socket.gethostname())}:
        check_shared(folder.parent)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir {folder.parent}: cannot be made ({error.strerror})") from None


def ask_slurm():
    """-> names of the partitions, and of the machines that the nodes are."""
    command = ["sinfo", "--all", "--noheader", "--Node", "--format", "%R %n"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        raise UserError("SLURM does not answer within 60 s; try `sinfo`") from None
    if answer.returncode:
        raise UserError(f"SLURM does not answer: {' '.join(answer.stderr.split())}; try `sinfo`")
    pairs = [line.split() for line in answer.stdout.splitlines()]
    return {partition for partition, _ in pairs}, {short_name(host) for _, host in pairs}


def short_name(host):
    return host.partition(".")[0]


def check_shared(folder):
    """Raises UserError for a folder that other nodes certainly cannot see; says so where it is only likely."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    command = ["findmnt", "--noheadings", "--output", "FSTYPE", "--target", str(there)]
    kind = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    under_tmp = any(folder.is_relative_to(path) for path in TEMPORARY)
    if kind in MEMORY_TYPES or (kind in DISK_TYPES and under_tmp):
        raise UserError(f"--output_dir {folder}: on this machine's own {kind}; expected a folder that all nodes share")
    if kind in DISK_TYPES:
        print(f"note: {folder} is on {kind}, a disk of this machine; the nodes must see it too, under the same path")


if __name__ == "__main__":
    # by its name: a pickle that said __main__ would not find Task in the job
    importlib.import_module("run_with_submitit").main()
