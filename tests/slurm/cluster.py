"""A real SLURM on this machine: munge, slurmctld and two nodes with two pretended GPUs each, all in one folder.

    python tests/slurm/cluster.py DIR      # starts it, says what to `source`, and stops it at Ctrl-C

Needs root (Debian's packages are installed where they are missing), no systemd, no cgroups, no database. Outside of
DIR it writes two lines into /etc/hosts, and takes them out again. Daemons die with the process that started them.

Partitions: main; high preempts low, which gives its jobs 20 s and SIGUSR2 first.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

PACKAGES = ["munge", "slurmctld", "slurmd", "slurm-client"]
NODES = ["node1", "node2"]
HOSTS = Path("/etc/hosts")
HOSTS_MARK = "# CPLearn's test cluster"

SLURM_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# cred_expire: how long a requeued job waits before it may start again (120 s where nothing is said)
AuthInfo=socket={dir}/munge.socket,cred_expire=5
StateSaveLocation={dir}/state
SlurmctldPidFile={dir}/slurmctld.pid
SlurmdPidFile={dir}/slurmd.%n.pid
SlurmdSpoolDir={dir}/spool.%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
# nodes claim more CPUs than there are
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,sched_min_interval=0
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
# seconds between SIGTERM and SIGKILL
KillWait=5
# seconds for which a job that has ended is known
MinJobAge=3600
# job ids are never handed out twice, also not by the next cluster
FirstJobId={first_job}
GresTypes=gpu
{nodes}
PartitionName=main Nodes=ALL Default=YES PriorityTier=5 PreemptMode=OFF
PartitionName=low Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF
"""

# submitit asks sacct, which would need a database; squeue knows as much about recent jobs
SACCT = """#!/bin/bash
echo 'JobID|State|NodeList'
while [ $# -gt 0 ]; do
  if [ "$1" = -j ]; then squeue -h -a -r --states=all -j "$2" -o '%i|%T|%N'; shift; fi
  shift
done
"""


class CannotRun(Exception):
    """Why there can be no SLURM here."""


@contextlib.contextmanager
def cluster(folder):
    """Start it in `folder`, yield the environment of those who use it, and stop exactly what was started.

    Raises CannotRun where it cannot be installed, RuntimeError with the end of the log where it does not start."""
    install()
    write_files(folder)
    env = os.environ | {"SLURM_CONF": f"{folder}/slurm.conf", "PATH": f"{folder}/bin:{os.environ['PATH']}"}
    with contextlib.ExitStack() as stack:
        stack.enter_context(host_names())
        socket_flag = f"--socket={folder}/munge.socket"
        munged = ["munged", "--foreground", "--force", socket_flag, f"--key-file={folder}/munge.key"]
        munged += [f"--{name}-file={folder}/munged.{name}" for name in ("pid", "log", "seed")]
        stack.enter_context(daemon(folder, env, *munged))
        wait_for("munged", folder, ["munge", socket_flag, "-n"], env)
        stack.enter_context(daemon(folder, env, "slurmctld", "-D"))
        wait_for("slurmctld", folder, ["scontrol", "ping"], env)
        for node in NODES:
            stack.enter_context(daemon(folder, env, "slurmd", "-D", "-N", node, log=f"slurmd.{node}"))
        stack.callback(cancel_all_jobs, env)
        ready = f"[ $(sinfo -h -N -p main -o %t | grep -c idle) = {len(NODES)} ]"
        wait_for("slurmd.node1", folder, ["bash", "-c", ready], env)
        yield env


def install():
    if all(shutil.which(name) for name in ("munged", "slurmctld", "slurmd", "sbatch", "srun")):
        if os.geteuid() != 0:
            raise CannotRun("SLURM's daemons are installed, starting them here needs root")
        return
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise CannotRun(f"needs {' '.join(PACKAGES)}: install them, or run as root where apt-get is")
    policy = Path("/usr/sbin/policy-rc.d")  # keeps dpkg from starting daemons
    made_policy = not policy.exists()
    if made_policy:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    get = "apt-get -y -qq -o Dpkg::Use-Pty=0 --no-install-recommends install " + " ".join(PACKAGES)
    command = ["bash", "-c", f"{get} || {{ apt-get -qq update; {get}; }}"]
    try:
        done = subprocess.run(command, env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"}, capture_output=True)
    finally:
        if made_policy:
            policy.unlink()
    if done.returncode:
        raise CannotRun(f"apt-get cannot install {' '.join(PACKAGES)}: {done.stderr.decode()[-200:]}")


def write_files(folder):
    for name in ("state", "bin", *(f"spool.{node}" for node in NODES)):
        (folder / name).mkdir(parents=True)
    folder.chmod(0o755)  # munge wants its socket to be reachable
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    port, *ports = free_ports(1 + len(NODES))
    node = "NodeName={} NodeHostname={} NodeAddr=127.0.0.1 Port={} CPUs=64 RealMemory=100000 Gres=gpu:2"
    nodes = [node.format(name, socket.gethostname(), p) for name, p in zip(NODES, ports, strict=True)]
    conf = SLURM_CONF.format(
        host=socket.gethostname(), port=port, dir=folder, nodes="\n".join(nodes),
        first_job=int(time.time()) % 60_000_000 + 1000,
    )  # fmt: skip
    (folder / "slurm.conf").write_text(conf)
    (folder / "cgroup.conf").touch()
    lines = []
    for name in NODES:
        for i in range(2):
            device = folder / f"{name}.gpu{i}"
            os.mknod(device, 0o20666, os.makedev(1, 3))  # like /dev/null: SLURM insists on devices
        lines.append(f"NodeName={name} Name=gpu File={folder}/{name}.gpu[0-1]\n")
    (folder / "gres.conf").write_text("".join(lines))
    (folder / "bin" / "sacct").write_text(SACCT)
    (folder / "bin" / "sacct").chmod(0o755)


def free_ports(count):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [s.getsockname()[1] for s in sockets]


@contextlib.contextmanager
def host_names():
    """node1 and node2 must have addresses: processes meet by their first node's name."""
    before = HOSTS.read_text()
    HOSTS.write_text(before + "".join(f"127.0.0.1 {node} {HOSTS_MARK}\n" for node in NODES))
    try:
        yield
    finally:
        # written in place: in containers the file is a mount
        kept = [line for line in HOSTS.read_text().splitlines(keepends=True) if HOSTS_MARK not in line]
        HOSTS.write_text("".join(kept))


@contextlib.contextmanager
def daemon(folder, env, *command, log=None):
    with open(folder / f"{log or command[0]}.log", "ab") as file:
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "TERM", *command], env=env, stdin=subprocess.DEVNULL, stdout=file,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()


def wait_for(name, folder, command, env, seconds=60):
    deadline = time.monotonic() + seconds
    while subprocess.run(command, env=env, capture_output=True).returncode:
        if time.monotonic() > deadline:
            raise RuntimeError(f"{name} does not answer:\n{(folder / f'{name}.log').read_text()[-2000:]}")
        time.sleep(0.1)


def cancel_all_jobs(env, seconds=30):
    """Otherwise a job's processes would outlive the daemons."""
    for state in ("PENDING", "RUNNING"):
        subprocess.run(["scancel", f"--state={state}"], env=env, capture_output=True, timeout=seconds)
    deadline = time.monotonic() + seconds
    while subprocess.run(["squeue", "-h"], env=env, capture_output=True).stdout and time.monotonic() < deadline:
        time.sleep(0.2)


def main():
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell's background jobs ignore SIGINT unless told
        signal.signal(number, signal.default_int_handler)
    folder = Path(sys.argv[1]).absolute()
    with contextlib.suppress(KeyboardInterrupt), cluster(folder) as env:
        (folder / "env.sh").write_text(f"export SLURM_CONF={env['SLURM_CONF']} PATH={folder}/bin:$PATH\n")
        print(f"ready: . {folder}/env.sh; Ctrl-C stops it", flush=True)
        signal.pause()


if __name__ == "__main__":
    main()
