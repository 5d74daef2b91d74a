"""What several scripts share and what stays the same with another method, backbone or data set:
errors and flags, the process group, collectives, seeds, schedules, precision."""

import argparse
import contextlib
import ctypes
import functools
import math
import multiprocessing
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
import traceback
import uuid
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

UNFINISHED = 75  # exit code: no fault of this program's, start it again (EX_TEMPFAIL of sysexits.h)
UNREADABLE = (AttributeError, OSError, ValueError)  # of a stream that is absent or closed, or that nobody reads


class UserError(Exception):
    """Something the user typed or gave us is wrong: shown as one line, no traceback."""

    exit_code = 2

    def __init__(self, message):
        super().__init__(one_line(message, 600))


def one_line(message, most=200):
    """What stands in a file or a flag may be long, of many lines, or steer a terminal."""
    text = "".join(c if c.isprintable() else "?" for c in " ".join(str(message).split()))
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 + 5 :]}"


class RunFailed(UserError):
    """Nothing was mistyped, and the run cannot go on: one line as well."""

    exit_code = 1


class TryAgain(RunFailed):
    """Another start may cure it, as that of a job that comes back does."""

    exit_code = UNFINISHED


class Stopped(SystemExit):
    """By a signal, after saving: nothing is left to be done. code: 128 + the signal's number."""


class _HelpFormatter(argparse.HelpFormatter):
    def _get_help_string(self, action):
        told = action.default in (None, False, argparse.SUPPRESS) or "default" in action.help
        facts = [str(action.type)] if isinstance(action.type, Number) else []
        facts += [] if told else ["default: %(default)s"]
        return f"{action.help} ({'; '.join(facts)})" if facts else action.help


class Number:
    """argparse's `type=` of a flag that is a finite number in a range: --help tells the range, and a number outside it
    is one line.

    kind: int or float.  least, most: the range, both ends in it.  above, below: the range without its ends.
    """

    def __init__(self, kind, least=None, most=None, above=None, below=None):
        self.kind, self.least, self.most, self.above, self.below = kind, least, most, above, below

    def __call__(self, text):
        try:
            value = self.kind(text)
        except ValueError:
            value = math.nan
        if not (
            (abs(value) < 2**63 if self.kind is int else math.isfinite(value))  # no tensor is larger
            and (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        ):
            raise argparse.ArgumentTypeError(f"{one_line(text, 40)}: expected {self}")
        return value

    def __str__(self):
        limits = {"of at least": self.least, "above": self.above, "of at most": self.most, "below": self.below}
        limits = [f"{words} {limit:g}" for words, limit in limits.items() if limit is not None]
        return " ".join(["a whole number" if self.kind is int else "a number", " and ".join(limits)]).strip()


def positive(kind):
    """argparse's `type=`: a number above 0."""
    return Number(kind, least=1) if kind is int else Number(kind, above=0)


def not_negative(kind):
    """argparse's `type=`: a number of at least 0."""
    return Number(kind, least=0)


# what torch.distributed.launch and DINO's scripts are given; torchrun says the same in the environment
LAUNCH_FLAGS = {
    "--dist_url": "use torchrun, which sets MASTER_ADDR and MASTER_PORT",
    "--local_rank": "use torchrun, which sets LOCAL_RANK",
    "--local-rank": "use torchrun, which sets LOCAL_RANK",
}


class ArgumentParser(argparse.ArgumentParser):
    """argparse that shows every default, takes no abbreviations, and reports a mistake as one UserError line.

    instead: {flag: what to do instead}, for flags of DINO's that have no meaning here.
    resolve: called with the namespace, returns it with what depends on several flags filled in."""

    def __init__(self, prog, description, instead=None, resolve=None):
        super().__init__(prog, description=description, allow_abbrev=False, formatter_class=_HelpFormatter)
        self.instead, self.resolve = LAUNCH_FLAGS | (instead or {}), resolve or (lambda args: args)

    def parse_args(self, args=None, namespace=None):
        for word in sys.argv[1:] if args is None else args:
            flag, _, value = word.partition("=")
            if value == "--":  # argparse takes it for the end of the flags and gives an empty list
                raise UserError(f"{flag} has no value; see {self.prog} --help")
            if flag in self.instead:
                raise UserError(f"{flag} has no meaning here: {self.instead[flag]}")
        return self.resolve(super().parse_args(args, namespace))

    def error(self, message):
        flag_first = re.sub(r"^argument ([^ :]+): ", r"\1 ", message)
        raise UserError(f"{flag_first}; see {self.prog} --help")


def boolean(text):
    """argparse's `type=`, with nargs="?" and const=True: --x, and DINO's spelling, --x true and --x false."""
    answers = {"true": True, "1": True, "on": True, "false": False, "0": False, "off": False}
    if text.lower() not in answers:
        raise argparse.ArgumentTypeError(f"{one_line(text, 40)}: expected true or false")
    return answers[text.lower()]


def command_line(main):
    """Decorate a script's `main`: a UserError becomes one line on stderr and its exit code, a lost peer UNFINISHED.

    An error of one process of several is everybody's: it is printed before all else, and the process leaves without
    taking the process group apart, for nccl's end waits for peers, who wait in a collective for this process. The
    launcher sees the exit code and ends the peers."""

    @functools.wraps(main)
    def run(*args, **kwargs):
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):  # a file's name may hold what the terminal's encoding has no sign for
                stream.reconfigure(errors="backslashreplace", line_buffering=True)
        try:
            result = main(*args, **kwargs)
        except BaseException as error:
            error = RunFailed(why) if (why := lost_stdout(error)) else error
            if leaves_at_once(error):
                leave(tell(error))
            close_group()
            if isinstance(error, UserError | KeyboardInterrupt):
                sys.exit(tell(error))
            raise
        several = world_size() > 1
        close_group()
        if several and not args:  # a script: gloo's threads outlive the group, and may meet the interpreter's end
            leave(0)
        return result

    return run


def lost_stdout(error):
    """Words on an error that is that of a stdout which cannot be written, such as a pipe to `head`; else None."""
    if not isinstance(error, OSError) or error.filename is not None:
        return None
    try:
        print(flush=True)  # an empty line does no harm where it can be written
        return None
    except OSError as again:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter's end fails of it as well
        return f"stdout cannot be written: {again.strerror}; what was printed is lost"


def leaves_at_once(error):
    """Whether a script that this error ends has no time to take anything apart."""
    return world_size() > 1 or isinstance(error, Stopped)


def tell(error):
    """Print what has ended this process; returns its exit code."""
    if isinstance(error, SystemExit) and not isinstance(error.code, str):
        return error.code or 0
    if isinstance(error, UserError):
        print_error(error)
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        print_error("interrupted")
        return 128 + signal.SIGINT
    if is_lost_peer(error):
        print_error(f"a peer is lost: {one_line(error)}; its own log says why; start again")
        return UNFINISHED
    with contextlib.suppress(*UNREADABLE):
        traceback.print_exception(error)
    print_error(f"{type(error).__name__}: {one_line(error, 400)}")  # one line for who reads logs of many processes
    return 1


def close_group():
    if dist.is_initialized():
        dist.destroy_process_group()


def leave(code):
    """End this process here and now: to take torch apart costs seconds that a scheduler may not give."""
    for child in multiprocessing.active_children():
        child.kill()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(*UNREADABLE):
            stream.flush()
    os._exit(code)


def print_error(error):
    # every rank meets the same bad flag; only a multi-process run needs to know which one speaks
    own_rank = os.environ.get("RANK", "?") if os.environ.get("WORLD_SIZE", "1") != "1" else None
    own_rank = rank() if world_size() > 1 else own_rank
    who = "" if own_rank is None else f" (rank {one_line(own_rank, 20)})"
    with contextlib.suppress(*UNREADABLE):
        print(f"error{who}: {error}", file=sys.stderr, flush=True)


def make_folder(folder, flag="--output_dir"):
    """Before the work begins rather than after it. Raises UserError where it cannot be made or written to."""
    try:
        str(folder).encode()
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{flag} {folder}: cannot be made ({error.strerror})") from None
    except ValueError:  # not UTF-8, or with a zero byte
        raise UserError(f"{flag} {str(folder)!a}: is no path") from None
    if not os.access(folder, os.W_OK):
        raise UserError(f"{flag} {folder}: cannot be written to")


# ---- processes -------------------------------------------------------------------------------------------------------


COLLECTIVE_TIMEOUT = timedelta(minutes=30)  # a peer that never comes is then an error; --watchdog_s is earlier


def init_distributed(device="auto"):
    """Join the process group and return this process's torch.device.

    One process without torchrun is a group of size one, so that there is one path. Under torchrun or SLURM the usual
    RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT are read. CUDA tensors go by nccl, CPU tensors by gloo.

    device: "auto" (cuda, else mps, else cpu), "cuda", "mps" or "cpu". Raises UserError for a device that is not there
    and for variables that do not fit together, RunFailed where the processes cannot reach each other.
    """
    own_rank, size = place_in_group()
    device = choose_device(device)
    if device.type == "cpu":
        keep_freed_memory()
    if dist.is_initialized():
        return device
    if size > 1 and device.type == "mps":
        raise UserError(f"--device mps: {size} processes were started, Apple's GPU serves one; use --device cpu")
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if not os.environ.get("RANK"):
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        return device
    with reaching_peers():
        store, _, _ = next(rendezvous("env://", timeout=COLLECTIVE_TIMEOUT))
        store = dist.PrefixStore(name_of_this_start(store, own_rank, size), store)
        dist.init_process_group(backend, store=store, rank=own_rank, world_size=size, timeout=COLLECTIVE_TIMEOUT)
    return device


PLACE = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun and run_with_submitit.py set


def place_in_group():
    """This process's rank and the number of processes, by the environment: 0 and 1 where it says neither."""
    there = [name for name in PLACE if os.environ.get(name)]
    if "RANK" not in there and "WORLD_SIZE" not in there:
        return 0, 1
    if len(there) < len(PLACE):
        raise UserError(
            f"the environment has {', '.join(there)} and no {', '.join(n for n in PLACE if n not in there)}: start "
            "several processes by torchrun, which sets all of them; for one process: unset RANK WORLD_SIZE"
        )
    size = number_of_environment("WORLD_SIZE", least=1)
    number_of_environment("MASTER_PORT", least=1, most=65535)
    return number_of_environment("RANK", most=size - 1), size


def number_of_environment(name, default="0", least=0, most=None):
    """The variable's value, or the default where it is empty or not there. Raises UserError."""
    try:
        return Number(int, least=least, most=most)(os.environ.get(name) or default)
    except argparse.ArgumentTypeError as error:
        raise UserError(f"{name}={error}; torchrun sets it; left over from another program? then unset it") from None


@contextlib.contextmanager
def reaching_peers():
    """Inside, processes meet for the first time. What fails then is the network or its settings, as a rule: to start
    again would not help, unless it is a port that another program has for now."""
    try:
        yield
    except RuntimeError as error:
        if "EADDRINUSE" in str(error):
            port = os.environ.get("MASTER_PORT")
            raise TryAgain(f"MASTER_PORT {port}: the port is in use on {socket.gethostname()}; give another") from None
        if "Duplicate GPU" in str(error):  # nccl's word; a process that sees one GPU cannot know who else does
            raise UserError(
                f"LOCAL_RANK {os.environ.get('LOCAL_RANK', 0)}: several processes have one GPU of "
                f"{socket.gethostname()}; start one for each GPU of a node: --nproc_per_node of torchrun, --ngpus of "
                "run_with_submitit.py"
            ) from None
        if not is_lost_peer(error):
            raise
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise RunFailed(
            f"the processes do not reach each other at the start: {one_line(error, 160)}; if none of them has ended by "
            f"itself, see that {address} can be reached, and name the interface between the nodes (`ip -brief address` "
            "lists them) by GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
        ) from None


def name_of_this_start(store, own_rank, size):
    """A name that all processes share, and no earlier start of theirs.

    torchrun's store outlives a restart, with the addresses of the dead in it, and its count of restarts may differ
    between nodes. So rank 0 makes the name up, and each process takes it once its own word is in the answer."""
    word, deadline = uuid.uuid4().hex, time.monotonic() + COLLECTIVE_TIMEOUT.total_seconds()
    others = range(1, size)
    if own_rank:
        store.set(f"hello/{own_rank}", word)
    while time.monotonic() < deadline:
        if own_rank == 0:
            store.set("welcome", ",".join([word, *(store.get(f"hello/{r}").decode() for r in others)]))
            if all(store.check([f"thanks/{word}/{r}"]) for r in others):
                return word
        else:
            name, *words = store.get("welcome").decode().split(",")
            if word in words:
                store.set(f"thanks/{name}/{own_rank}", "")
                return name
        time.sleep(0.05)
    raise dist.DistStoreError("not all processes have come")


def choose_device(name):
    """ "auto", "cuda", "mps" or "cpu" -> torch.device, on CUDA this process's own. Raises UserError."""
    if name == "cpu":  # torch's optimizers and loaders ask a GPU that they see, which makes a context on it
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        return torch.device(name)
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(n for n, there in available.items() if there)
        if name == "cpu":
            refuse_unused_gpu()
    if not available[name]:
        raise UserError(f"--device {name}: not available here; available: {[n for n, ok in available.items() if ok]}")
    if name != "cuda":
        return torch.device(name)
    device = torch.device("cuda", own_gpu(torch.cuda.device_count()))
    torch.cuda.set_device(device)
    return device


def keep_freed_memory():
    """Memory that a step frees stays with this process for the next step, as torch keeps a GPU's.

    glibc gives large blocks back to the system at once, and each page of theirs that is taken anew is an exception and
    filled with zeros first: 90,000 in a step of a ViT-S, about 6 % of its time. Holes between blocks may take 15 % more
    memory (benchmarks.against, and again with MALLOC_TRIM_THRESHOLD_=131072 in the environment, which turns this off).
    Whoever has set one of malloc's own variables is left alone; so are other allocators, and systems without glibc."""
    if any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)  # large blocks, too, come from the heap,
        mallopt(M_TRIM_THRESHOLD, -1)  # whose end is never given back


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def own_gpu(count):
    """The index of this process's GPU among the `count` that it sees."""
    local_rank, processes = (number_of_environment(f"LOCAL_{name}") for name in ("RANK", "WORLD_SIZE"))
    if count == 1 and processes > 1:  # clusters may show each process its own GPU only
        return 0
    if local_rank >= count:
        raise UserError(
            f"LOCAL_RANK {local_rank}: this process sees {count} GPUs (CUDA_VISIBLE_DEVICES="
            f"{os.environ.get('CUDA_VISIBLE_DEVICES', '')}); start fewer processes on this node (--nproc_per_node)"
        )
    return local_rank


NVIDIA_DRIVER, DEVICES = Path("/proc/driver/nvidia"), Path("/dev")  # containers may see the first without a GPU


def refuse_unused_gpu():
    """Hours on a CPU, beside a GPU that torch cannot use, are nobody's wish. Raises UserError."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1", "NoDevFiles")
    if hidden or not NVIDIA_DRIVER.exists() or not any(DEVICES.glob("nvidia[0-9]*")):
        return
    built = torch.version.cuda
    why = f"is built for CUDA {built}: is the driver older?" if built else "is built for CPUs only"
    raise UserError(
        f"--device auto: this machine has an NVIDIA GPU that torch cannot use; torch {torch.__version__} {why} "
        "`nvidia-smi` shows the driver's CUDA; install that wheel of the same torch or a newer driver, or go on by "
        "--device cpu"
    )


def is_lost_peer(error):
    """Whether a collective failed because another process is gone: nccl's errors have types, gloo's only a text."""
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)


def on_rank_zero(function, *args):
    """Call it on rank 0 alone; returns None elsewhere. What it raises ends all processes with one exit code: nobody
    waits for rank 0, or takes it for lost. An OSError is one line."""
    result, failure, told = None, None, [None]
    if rank() == 0:
        try:
            result = function(*args)
        except Exception as error:
            failure = RunFailed(error) if isinstance(error, OSError) else error
            told = [(getattr(failure, "exit_code", 1), str(failure) if isinstance(failure, UserError) else
                     f"rank 0: {type(failure).__name__}: {failure}")]  # fmt: skip
    if world_size() > 1:
        dist.broadcast_object_list(told)
    if failure is not None:
        raise failure
    if told[0] is not None:
        code, line = told[0]
        failure = UserError(line)
        failure.exit_code = code
        raise failure
    return result


# run_with_submitit.py sets it in the processes of its jobs. SLURM_RESTART_COUNT itself is also seen by whatever is
# started from a shell of a job that was requeued, another job's first start included.
RESTART_COUNT = "CPLEARN_RESTART_COUNT"


def is_restart():
    """Whether torchrun or run_with_submitit.py has started this command again, so that it means to go on."""
    names = (RESTART_COUNT, "TORCHELASTIC_RESTART_COUNT") if os.environ.get("RANK") else (RESTART_COUNT,)
    return any(number_of_environment(name) for name in names)


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


class _AllReduceSum(torch.autograd.Function):
    """y = sum over processes of x. Every process's loss depends on y, so dL/dx is the sum of all dL/dy.

    By hand, for torch.distributed.nn.functional.all_reduce is deprecated from torch 2.14 on, and what it names instead
    is private."""

    @staticmethod
    def forward(ctx, x):
        y = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(y)
        return y

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad


def all_reduce_mean(x):
    """Mean of x over processes, differentiable: together with DDP's averaged gradients, N processes descend the loss of
    one process on the joined batch. (A plain `dist.all_reduce` here makes the gradient wrong by 64 %.)"""
    return x if world_size() == 1 else _AllReduceSum.apply(x) / world_size()


def all_gather_rows(x):
    """(n, ...) on each process, equal n -> (n * world_size, ...) in rank order, without gradient."""
    if world_size() == 1:
        return x.detach()
    rows = x.new_empty(world_size(), *x.shape)
    # into views of one tensor: all_gather_into_tensor is deprecated from torch 2.14 on, its successor newer than 2.11
    dist.all_gather(list(rows.unbind()), x.detach().contiguous())
    return rows.flatten(0, 1)


class Agreement:
    """All processes act at the same step on what one of them has seen (a signal, a clock), without stopping the GPU.

    `vote(choice)` returns the largest choice of any process at the *previous* call: the tiny all-reduce runs on CPU
    tensors while the step is computed, and nobody waits for it.
    """

    def __init__(self):
        self.pending = None

    def vote(self, choice):
        if world_size() == 1:
            return choice
        previous = self.settle()
        value = torch.tensor(choice)
        self.pending = (dist.all_reduce(value, op=dist.ReduceOp.MAX, async_op=True), value)
        return previous

    def settle(self):
        """Wait for the last call's answer (0 where there is none)."""
        if self.pending is None:
            return 0
        work, value = self.pending
        self.pending = None
        work.wait()
        return int(value)


@functools.cache
def commit():
    """The commit of this code, "-dirty" where files differ from it; "unknown" outside a git checkout.

    `experiments/results` is no code: a runner that writes its second cell there has not become another version.
    """
    git = ["git", "--no-optional-locks", "-C", str(Path(__file__).resolve().parent)]
    code = ["--", ".", ":(exclude)experiments/results"]
    try:
        name, changed = (
            subprocess.run([*git, *words], capture_output=True, text=True, check=True, timeout=10).stdout.strip()
            for words in (["describe", "--always", "--abbrev=12"], ["status", "--porcelain", "-uno", *code])
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return f"{name}-dirty" if changed else name


# ---- randomness and schedules: functions, not histories --------------------------------------------------------------


def seed_everything(*numbers):
    """Seed torch, numpy and random from a tuple such as (seed, step, rank); torch's seeds all devices."""
    words = np.random.SeedSequence([int(n) for n in numbers]).generate_state(2, np.uint64)
    torch.manual_seed(int(words[0] >> np.uint64(1)))
    np.random.seed(int(words[1] & np.uint64(0xFFFFFFFF)))
    random.seed(int(words[1]))


def cosine_schedule(step, total_steps, base, final, warmup_steps=0):
    """Value at `step`: linear from 0 to `base` during the warm-up, then half a cosine from `base` to `final`.

    DINO's schedule, as a function of the step so that a resumed run needs one integer.
    """
    if step < warmup_steps:
        return base * step / max(1, warmup_steps - 1)
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return final + 0.5 * (base - final) * (1 + math.cos(math.pi * progress))


# ---- precision -------------------------------------------------------------------------------------------------------


PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_precision(precision, device):
    """ "auto" becomes bf16 where the device multiplies it in hardware, else fp32; other names stay."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if device.type == "cpu" and cpu_has_bf16() else "fp32"


def autocast(device, precision):
    """The context in which a network's forward pass has the precision, a name of `PRECISIONS`; fp32: as it is."""
    dtype = PRECISIONS[precision]
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def cpu_has_bf16():
    """Whether oneDNN multiplies bf16 on this CPU. Its operator is private: builds without oneDNN do not have it."""
    ask = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None) if torch.backends.mkldnn.is_available() else None
    return ask is not None and ask()
