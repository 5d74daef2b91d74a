"""Run this repository's commands, in processes that have imported torch already.

    with Commands({"OMP_NUM_THREADS": "1"}) as commands:
        command = commands.start(["eval_knn.py", "--checkpoint", ...], output)     # output: an open file
        os.kill(command.pid, signal.SIGTERM)
        code, cpu_s, memory_mb = command.wait()

Half of a short command is the import of torch and of what stands on it. A server process imports them once and makes a
copy of itself (fork) for each command, which then runs the script as `python SCRIPT.py` would: as __main__, from its
first line. Nothing of one command reaches another, and a command outlives the server and who asked for it.
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

from utils import UserError

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("main_cplearn.py", "eval_linear.py", "eval_knn.py", "eval_cluster.py", "eval_collapse.py")  # from the server


class Commands:
    """Several threads may start commands at once. The server begins with the first one that it is for."""

    def __init__(self, environment=None):
        """environment: variables of the commands, where they are not set already."""
        paths = [str(ROOT), os.environ.get("PYTHONPATH")]
        self.environment = (environment or {}) | os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
        self.server = self.channel = None
        self.mutex = threading.Lock()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.server is not None:
            self.channel.close()  # the server ends, commands that run go on
            self.server.wait()

    def start(self, words, output, *inherited, launcher=()):
        """words: script and flags.  output: an open file, for what it prints.  inherited: open files that it holds for
        as long as it lives.  launcher: words of Python before the script, such as -m torch.distributed.run."""
        if words[0] not in SCRIPTS or launcher:
            return Alone(
                [sys.executable, *launcher, str(ROOT / words[0]), *words[1:]], output, inherited, self.environment
            )
        ours, theirs = socket.socketpair()
        files = [file.fileno() for file in (theirs, output, *inherited)]
        with self.mutex:
            try:
                socket.send_fds(self.connected(), [json.dumps(words).encode()], files)
            except OSError as error:
                raise UserError(f"the server of commands has ended ({error}); the same command goes on") from None
        theirs.close()
        return Served(ours)

    def connected(self):
        if self.server is None:
            self.channel, theirs = socket.socketpair()
            words = [sys.executable, "-m", "experiments.commands", str(theirs.fileno())]
            self.server = subprocess.Popen(words, env=self.environment, pass_fds=[theirs.fileno()])
            theirs.close()
        return self.channel


class Served:
    """A command that runs in a copy of the server. .pid: of its process."""

    def __init__(self, connection):
        self.lines = connection.makefile("r")
        connection.close()  # the file keeps it
        self.pid = int(self.told())

    def wait(self):
        """[exit code, CPU seconds, MB of its largest process] when it has ended; a signal's is 128 + its number."""
        found = json.loads(self.told())
        self.lines.close()
        return found

    def told(self):
        line = self.lines.readline()
        if not line:
            raise UserError("what waits for a command was killed, and its end is not known; the same command goes on")
        return line


class Alone:
    """A command in a process that imports everything itself; as `Served`."""

    def __init__(self, command, output, inherited, environment):
        self.process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, pass_fds=[f.fileno() for f in inherited]
        )
        self.pid = self.process.pid

    def wait(self):
        found = end_of(self.pid)
        self.process.returncode = found[0]
        return found


def end_of(pid):
    """Wait for a child: [exit code, CPU seconds, MB], of it and its children."""
    _, status, usage = os.wait4(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    return [code if code >= 0 else 128 - code, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024]


# ---- the server ------------------------------------------------------------------------------------------------------


def serve(channel):
    """Answers requests until the other end is closed. Returns the words of a command, in the process that is to run it;
    None in the server."""
    for script in SCRIPTS:
        importlib.import_module(script.removesuffix(".py"))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal; the runner hands it on
    while True:
        request, files, _, _ = socket.recv_fds(channel, 2**20, 8)
        if not request:
            return None
        if os.fork() == 0:
            channel.close()
            return keep(json.loads(request), *files)
        for file in files:
            os.close(file)
        os.wait()


def keep(words, answer, output, *_inherited):
    """Fork twice: the first process leaves, so that nobody need wait for the second, the keeper, which waits for the
    third and tells its end. Returns in the third one, the command's; the files it inherits stay open."""
    if os.fork() > 0:
        os._exit(0)
    if pid := os.fork():
        os.close(output)
        os.write(answer, f"{pid}\n".encode())
        with contextlib.suppress(BrokenPipeError):  # who asked has been killed
            os.write(answer, f"{json.dumps(end_of(pid))}\n".encode())
        os._exit(0)
    os.close(answer)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.close(output)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return words


if __name__ == "__main__":
    words = serve(socket.socket(fileno=int(sys.argv[1])))
    if words is not None:
        sys.argv = words
        sys.path[0] = str((ROOT / words[0]).parent)
        runpy.run_path(str(ROOT / words[0]), run_name="__main__")
