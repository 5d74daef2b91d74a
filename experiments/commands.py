"""Run one of this repository's commands, in a process that has imported torch already.

    with Commands(threads=1) as commands:
        command = commands.start(["eval_knn.py", "--checkpoint", ...], output)     # output: an open file
        code, cpu_s, memory_mb = command.wait()

Half of a short command is the import of torch and of what stands on it. A server process imports them once and makes a
copy of itself (fork) for each command, which then runs the script as `python SCRIPT.py` would: as __main__, from its
first line. Nothing of one command reaches another. The server has begun no thread, so that its copies are whole.
"""

import contextlib
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
IMPORTS = ("main_cplearn", "eval_linear", "eval_knn", "eval_cluster", "eval_collapse", "torch.utils.tensorboard")


class Commands:
    """A server of commands; several threads may start them at once."""

    def __init__(self, threads=1):
        """threads: of each command (OMP_NUM_THREADS)."""
        self.own, theirs = socket.socketpair()
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
        words = [sys.executable, "-m", "experiments.commands", str(theirs.fileno())]
        self.server = subprocess.Popen(words, env=environment, cwd=os.getcwd(), pass_fds=[theirs.fileno()])
        theirs.close()
        self.mutex = threading.Lock()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.own.close()  # the server ends, commands that run go on
        self.server.wait()

    def start(self, words, output):
        ours, theirs = socket.socketpair()
        with self.mutex:
            socket.send_fds(self.own, [json.dumps(words).encode()], [theirs.fileno(), output.fileno()])
        theirs.close()
        return Command(ours)


class Command:
    """A command that runs. .pid: of its process, which gets signals."""

    def __init__(self, connection):
        self.lines = connection.makefile("r")
        self.pid = int(self.lines.readline())

    def wait(self):
        """(exit code, CPU seconds, memory of its largest process in MB), when it has ended; a signal's is 128 + its
        number."""
        return json.loads(self.lines.readline())


# ---- the server ------------------------------------------------------------------------------------------------------


def serve(channel):
    """Answers requests on a socket until its other end is closed; returns the words of a command in the process that is
    to run it, and None in the server."""
    for name in IMPORTS:
        importlib.import_module(name)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal; the runner hands it on
    while True:
        request, files, _, _ = socket.recv_fds(channel, 2**20, 2)
        if not request:
            return None
        if (
            os.fork() == 0
        ):  # between the server and the command, to wait for it; an orphan, so that nobody waits for this
            words = keep(json.loads(request), *files)
            if words is not None:
                channel.close()
                return words
            os._exit(0)
        for file in files:
            os.close(file)
        os.wait()


def keep(words, answer, output):
    """In the command's process its words; in the keeper, when the command has ended and that is told, None."""
    if os.fork() > 0:
        return None
    pid = os.fork()
    if pid == 0:
        os.close(answer)
        for stream in (1, 2):
            os.dup2(output, stream)
        os.close(output)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        return words
    os.close(output)
    os.write(answer, f"{pid}\n".encode())
    _, status, usage = os.wait4(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    code = code if code >= 0 else 128 - code
    found = [code, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024]
    with contextlib.suppress(BrokenPipeError):  # the runner has been killed
        os.write(answer, f"{json.dumps(found)}\n".encode())
    return None


if __name__ == "__main__":
    words = serve(socket.socket(fileno=int(sys.argv[1])))
    if words is not None:
        sys.argv = words
        sys.path[0] = str((ROOT / words[0]).parent)
        runpy.run_path(str(ROOT / words[0]), run_name="__main__")
