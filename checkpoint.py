"""What of a run is on disk: what a checkpoint holds, how it is written, and how a run goes on from it.

    save(run, step)                      checkpoint.pth, whole or not at all, from rank 0, while training goes on
    keep_copy(run, step)                 checkpoint0020.pth, ...
    find_earlier(args), resume(run)      the checkpoint to go on from; what must be the same then, is compared
    save_last_whole_step(run)            the last resort of a run that is stuck
    losing_nothing(run)                  around the steps: what is being written outlives what ends the run; starts.txt
                                         says when it began, and how it ended

`run` is main_cplearn's Run. A run that goes on is the undisturbed run, bit for bit on a CPU: order, augmentation and
noise are functions of the step, so that the state at a step's end is all there is.
"""

import argparse
import contextlib
import importlib
import itertools
import json
import math
import os
import pickle
import platform
import reprlib
import shutil
import socket
import sys
import time
import warnings
import zipfile
from pathlib import Path, PosixPath, PurePosixPath

import numpy as np
import torch
import torch.distributed as dist

from running.files import append_whole, replace_file
from running.watch import GRACE_S
from utils import (
    RunFailed,
    Stopped,
    UserError,
    commit,
    is_lost_peer,
    is_restart,
    not_negative,
    on_rank_zero,
    one_line,
    rank,
    world_size,
)

FORMAT = "cplearn 2"


def add_checkpoint_arguments(parser):
    add = parser.add_argument_group("checkpoints, and going on from them").add_argument
    add("--resume", default=None, metavar="PATH", help="where the output_dir has no checkpoint, go on from this one")
    add("--no-resume", dest="no_resume", action="store_true",
        help="set the output_dir's earlier run aside, and start anew")  # fmt: skip
    add("--allow_changed_flags", action=argparse.BooleanOptionalAction, default=False,
        help="go on although flags that change the result differ from the checkpoint's")  # fmt: skip
    add("--saveckp_freq", type=not_negative(int), default=20,
        help="keep checkpoint0020.pth, ... every so many epochs; 0: none")  # fmt: skip


def checkpoint_path(args):
    return Path(args.output_dir) / "checkpoint.pth"


def save(run, step, stopping=False):
    """Copy the state to rank 0's host, and write checkpoint.pth from the copy in a thread, while training goes on; from
    the first save on, the copy takes as much memory there as the state. A write that is still on its way is waited for.

    A run that cannot write says so and goes on, the next save may succeed. Two kinds of runs write here, without copy
    and thread: one with --save_every_minutes 0, which may lose no step; and one that is `stopping`, which raises
    RunFailed where it cannot write."""
    run.recorder.read(run.may_overflow)  # on all processes: a loss that is not finite is never saved
    run.saved_at = time.monotonic()
    run.model.objective.share_statistics()
    if rank() != 0:
        return
    with run.watch.paused():
        run.writer.wait()
        run.log.flush()
        state = checkpoint_state(run, step)
        if stopping:
            write_or_fail(run, step, state)
        elif run.args.save_every_minutes:
            run.writer.start(write_or_warn, run, step, run.writer.copy.of(state, run.device))
        else:
            write_or_warn(run, step, state)


def write_or_fail(run, step, state):
    try:
        write(run, step, state)
    except OSError as error:
        raise RunFailed(f"step {step}: {error}") from None


def write_or_warn(run, step, state):
    try:
        write(run, step, state)
    except OSError as error:
        run.log.print(f"warning: step {step}: {error}; going on, the earlier checkpoint is whole")


def write(run, step, state):
    """The checkpoint, once the log that it belongs to is on disk; then the copy of it that is kept. Raises OSError."""
    run.log.force_to_disk()
    save_checkpoint(state, checkpoint_path(run.args))
    keep_copy(run, step)


@contextlib.contextmanager
def losing_nothing(run):
    """Inside are the steps. starts.txt says when they began, and how they ended. Who has lost a peer saves the last
    whole step; and whatever ends the run, a checkpoint that is being written is waited for, GRACE_S at most."""
    remember_start(run)
    how = "finished"
    try:
        yield
    except BaseException as error:
        how = f"stopped by signal {error.code - 128}" if isinstance(error, Stopped) else f"failed: {one_line(error)}"
        if isinstance(error, RuntimeError) and is_lost_peer(error):
            save_last_whole_step(run)
        raise
    finally:
        with run.watch.paused():
            run.writer.join(GRACE_S)
        remember(run, "end", how=how)


def remember_start(run):
    """What a reader of the run wants to know of this start, and what no later checkpoint tells: each has its own."""
    afresh = bool(run.args.no_resume and not is_restart())  # the lines before are of a run that this one replaces
    device = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else str(run.device)
    machine = {"device": device, "host": socket.gethostname(), "job": os.environ.get("SLURM_JOB_ID")}
    versions = {"commit": commit(), "torch": torch.__version__, "python": platform.python_version()}
    defaults, flags = checkpoint_args(run.default_flags(run.args.objective)), checkpoint_args(run.args)
    flags = {name: [value, defaults.get(name)] for name, value in flags.items() if value != defaults.get(name)}
    remember(run, "start", of=run.total_steps, afresh=afresh, processes=world_size(), **machine, **versions,
             command=[Path(sys.argv[0]).name, *sys.argv[1:]], flags=flags)  # fmt: skip


def remember(run, kind, **facts):
    """Append a line of JSON to starts.txt."""
    if rank() == 0:
        line = {"kind": kind, "step": run.log.step, "time": time.time()} | facts
        with run.log.going_on("starts.txt"):
            append_whole(Path(run.args.output_dir) / "starts.txt", json.dumps(line).encode() + b"\n")


def buffers_before_step(run, step):
    """What the next step's forward pass will change before the optimizer changes the weights: the buffers.

    With it the state at `step` can still be saved when that pass is stuck. Only on a CPU: the host of a GPU is steps
    ahead of it. Not with sharded codes: gathering their usage takes all processes."""
    if run.device.type != "cpu" or run.args.shard_codes:
        return None
    frozen = (torch.int8, torch.uint8)  # the dictionary's
    return step, {k: v.clone() for k, v in run.model.named_buffers() if v.dtype not in frozen}


def save_last_whole_step(run):
    """The last resort of a run that is stuck in a collective or has lost a peer: save without asking the others, after
    what is being written."""
    with run.watch.paused():
        if not run.writer.join(GRACE_S):
            run.log.print(f"warning: a checkpoint is still being written after {GRACE_S:g} s; no later one is saved")
            return
        if rank() != 0 or run.buffers_before_step is None:
            return
        step, buffers = run.buffers_before_step
        recorder = run.recorder.read_alone(run.may_overflow)
        run.log.flush()
        run.log.force_to_disk()
        try:
            save_checkpoint(checkpoint_state(run, step, buffers, recorder), checkpoint_path(run.args))
        except OSError as error:  # why the run ends, and with which code, is not the disk's business
            run.log.print(f"warning: step {step}: {error}; the earlier checkpoint is whole")
            return
    run.log.print(f"saved the last whole step, {step}, to {checkpoint_path(run.args)}")


def checkpoint_state(run, step, buffers=None, recorder=None):
    """Plain data, opened by DINO's scripts as it is: without a teacher `student` and `teacher` name the same tensors,
    stored once.

    buffers, recorder: instead of the present ones."""
    model = run.model.state_dict()
    model |= {name: value for name, value in (buffers or {}).items() if name in model}
    backbone = {k: v for k, v in model.items() if k.startswith("backbone.")}
    objective = {k.removeprefix("objective."): v for k, v in model.items() if k not in backbone}
    head, entries, rest = split_state(objective, run.model.objective.entries)
    student = backbone | head
    return {
        "format": FORMAT,
        "student": student,
        "teacher": student,
        **entries,
        "objective": rest,
        "optimizer": run.optimizer.state_dict(),
        "fp16_scaler": run.scaler.state_dict(),
        "recorder": (recorder or run.recorder).state_dict(),
        "epoch": step // run.loader.steps_per_epoch,  # the one to go on with, as in DINO's files
        "step": step,
        "args": checkpoint_args(run.args),
        "world_size": world_size(),
        "batch_size": run.batch_size,
        "effective_batch": run.effective_batch,
        "fingerprint": run.loader.images.fingerprint,
        "commit": commit(),
    }


def checkpoint_args(args):
    """{flag: value}, of a Namespace or a dict, with lists for tuples."""
    args = args if isinstance(args, dict) else vars(args)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in args.items()}


def split_state(state, names):
    """An objective's state dict -> its head's ("head.*"), {name: state dict} of its modules `names`, and the rest."""
    head = {k: v for k, v in state.items() if k.startswith("head.")}
    entries = {
        name: {k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")} for name in names
    }
    return head, entries, {k: v for k, v in state.items() if k.split(".")[0] not in ("head", *names)}


def keep_copy(run, step):
    """checkpoint0020.pth and so on by --saveckp_freq: a hard link where the file system has them, for a later
    checkpoint.pth is a new file."""
    if rank() != 0 or not copy_is_due(run, step):
        return
    path = checkpoint_path(run.args)
    name = f"checkpoint{math.ceil(step / run.loader.steps_per_epoch):04d}.pth"
    aside = path.with_name(f".{name}.tmp")
    with run.log.going_on(name):
        aside.unlink(missing_ok=True)
        try:
            os.link(path, aside)
        except OSError:
            shutil.copyfile(path, aside)
        os.replace(aside, path.with_name(name))


def copy_is_due(run, step):
    """Whether at `step` an epoch has ended that --saveckp_freq names, or the run."""
    epochs, rest = divmod(step, run.loader.steps_per_epoch)
    ended = step == run.total_steps or (rest == 0 and epochs % max(1, run.args.saveckp_freq) == 0)
    return bool(run.args.saveckp_freq) and step > 0 and ended


def find_earlier(args):
    """The output folder's checkpoint, or else --resume's, or None: what the run goes on from, as it is in the file.

    The folder's own comes first: the same command, with --resume in it, must go on when it is started again."""
    if args.no_resume and not is_restart():
        on_rank_zero(set_aside, Path(args.output_dir))
    own = checkpoint_path(args)
    wait_for_same_file(own)
    path = own if own.exists() else args.resume
    if path is None:
        return None
    state = load_checkpoint(path)
    if not isinstance(state, dict) or state.get("format", FORMAT) != FORMAT:
        raise UserError(
            f"{path}: not a checkpoint of this program ({FORMAT!r}); evaluations read others, --resume does not"
        )
    if path == own and not is_ours(state):
        raise UserError(
            f"{path}: not a checkpoint of this program, and it would be written over; move it, and give --resume FILE"
        )
    return state | {"path": path}


def is_ours(state):
    """Whether this program wrote the checkpoint, rather than the code of a method's authors."""
    return "format" in state


@contextlib.contextmanager
def fitting(state):
    """What fails while `state` is taken over, fails because the file is of another run or was changed."""
    try:
        yield
    except (AttributeError, KeyError, IndexError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{state['path']}: does not fit this run: {type(error).__name__} {reason}") from None


def resume(run):
    """Take over the earlier checkpoint, if there is one; returns the step to go on from."""
    state, run.earlier = run.earlier, None
    if state is None:
        return 0
    with fitting(state):
        if is_ours(state):
            check_same_run(run, state)
        else:
            state |= run.model.objective.translate(run, state)
        load_state(run, state)
        if type(state["step"]) is not int or not 0 <= state["step"] <= run.total_steps:
            raise ValueError(f"its step is {reprlib.repr(state['step'])} of {run.total_steps}")
        writer = state.get("commit")
        if writer != commit() and rank() == 0:  # another version may augment or log otherwise
            print(f"note: {state['path']} was written by commit {reprlib.repr(writer)}, this is {commit()!r}")
        return state["step"]


def share_of_batch(args, state):
    """Images per micro-batch and micro-batches per process: (B, M).

    The same command on another number of processes keeps the run's effective batch, so that every step sees the images
    that it would have seen: by other M, so that B, memory and random draws stay; or by a lower B where that cannot be,
    or by any B if the backbone has batch norm. Raises UserError where the batch cannot be divided."""
    asked = args.batch_size_per_gpu, args.accum_steps
    if state is None or args.allow_changed_flags or not is_ours(state):
        return asked
    with fitting(state):
        then = state["args"]
        total, before = state["effective_batch"], (then["batch_size_per_gpu"], then.get("accum_steps", 1))
        if type(total) is not int or not 0 < total < 2**31:
            raise ValueError(f"its effective batch is {reprlib.repr(total)}")
        if before != asked:
            return asked
        if total % world_size():
            raise UserError(
                f"{state['path']}: its run takes {total} images per step, which {world_size()} processes cannot share "
                f"evenly; start a number of processes that divides {total}"
            )
        share = total // world_size()
        if any(name.startswith("backbone.") and name.endswith("running_var") for name in state["student"]):
            return share, 1
        parts = next(m for m in range(1, share + 1) if share % m == 0 and share // m <= images_at_once(state))
        return share // parts, parts


def images_at_once(state):
    """Images per micro-batch of the run that wrote the checkpoint."""
    return state.get("batch_size", state["effective_batch"] // state["world_size"])


def load_state(run, state):
    weights = state["student"]
    backbone = {k.removeprefix("backbone."): v for k, v in weights.items() if k.startswith("backbone.")}
    head = {k: v for k, v in weights.items() if k.startswith("head.")}
    run.model.backbone.load_state_dict(backbone)
    entries = {f"{name}.{k}": v for name in run.model.objective.entries for k, v in state[name].items()}
    run.model.objective.load_state_dict(state["objective"] | head | entries)
    settings = run.optimizer.state_dict()["param_groups"]  # they follow from the flags and the step
    run.optimizer.load_state_dict({"state": state["optimizer"]["state"], "param_groups": settings})
    check_moments(run.optimizer)
    run.scaler.load_state_dict(state["fp16_scaler"])
    run.recorder.load_state_dict(state["recorder"])


def check_moments(optimizer):
    """load_state_dict looks at neither names nor shapes. Raises ValueError."""
    if len({frozenset(kept) for kept in optimizer.state.values()}) > 1:
        raise ValueError("the optimizer does not keep the same of all parameters")
    for parameter, kept in optimizer.state.items():
        for name, value in kept.items():
            if not torch.is_tensor(value) or value.shape not in ((), parameter.shape):
                raise ValueError(f"the optimizer's {name} is not of its parameter's shape {tuple(parameter.shape)}")


# flags that another machine or another mood may change without changing the result; the fingerprint knows of images,
# whatever --data_path and --class_list are called, and --head_impl auto may choose otherwise on other processes
FREE_FLAGS = {
    "class_list", "head_impl", "init_from",
    "output_dir", "data_path", "num_workers", "device", "resume", "no_resume", "allow_changed_flags",
    "save_every_minutes", "saveckp_freq", "watchdog_s", "log_every", "knn_every", "max_bad_images", "compile",
    "linear_every", "probe_data", "log_to", "on_collapse", "replay",
    "grad_checkpointing", "batch_size_per_gpu", "accum_steps", "codes_storage",
}  # fmt: skip


def check_same_run(run, state):
    """Raises UserError naming what would make the resumed run another run than the checkpoint's."""
    now = checkpoint_args(run.args)
    # a flag that the file does not know came later, and its default is what the program did before
    then = run.default_flags(state["args"].get("objective", "cplearn")) | state["args"]
    changed = [name for name in sorted(now.keys() - FREE_FLAGS) if then.get(name) != now[name]]
    changes = [f"--{name} {reprlib.repr(then.get(name))} -> {now[name]}" for name in changed]
    if state["effective_batch"] != run.effective_batch:
        changes.append(f"effective batch {state['effective_batch']} -> {run.effective_batch}")
    if run.args.prior_scope == "local" and images_at_once(state) != run.batch_size:
        changes.append(f"--prior_scope local over {images_at_once(state)} -> {run.batch_size} images")
    if state["fingerprint"] != run.loader.images.fingerprint:
        changes.append(f"the data set's content {state['fingerprint']} -> {run.loader.images.fingerprint}")
    if changes and not run.args.allow_changed_flags:
        raise UserError(
            f"{state['path']} is from a run with other settings: {'; '.join(changes)}; give the same flags, "
            "--allow_changed_flags to go on all the same, or another --output_dir"
        )


def refuse_differences(args, images):
    """Raises UserError, on all processes, where they were given other flags or see other images than rank 0: a folder
    may be listed late by a network file system, and the processes of several nodes may be started by hand."""
    own = {"images": len(images), "fingerprint of the images": images.fingerprint}
    own |= {f"--{name}": value for name, value in vars(args).items() if name not in ("data_path", "num_workers")}
    all_of_them = [None] * world_size()
    dist.all_gather_object(all_of_them, own)
    for other, theirs in enumerate(all_of_them):
        names = [name for name, value in all_of_them[0].items() if theirs.get(name) != value]
        if names:
            what = "; ".join(f"{name} {all_of_them[0][name]} and {theirs.get(name)}" for name in names)
            raise UserError(f"rank 0 and rank {other} differ: {what}; expected one command and one data set for all")


def set_aside(folder):
    """Rename an earlier run's files to *.old1, *.old2, ...: nothing already saved is ever lost."""
    names = [p.name for p in folder.glob("checkpoint*.pth")] + ["log.txt", "loss.png"]
    number = next(n for n in itertools.count(1) if not any((folder / f"{name}.old{n}").exists() for name in names))
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            os.rename(folder / name, folder / f"{name}.old{number}")


# ---- files: plain data, written whole or not at all ------------------------------------------------------------------


def save_checkpoint(state, path, alone=True):
    """Write `state` beside `path`, force it to disk, then rename: at any moment `path` is a whole checkpoint.

    Raises OSError when it cannot be written (disk full, read-only folder); what was at `path` is then untouched.
    alone: as in `replace_file`; a run holds its folder's lock.
    """
    try:
        with replace_file(path, alone) as file:
            torch.save(state, file)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        reason = error.strerror if isinstance(error, OSError) else "the write failed; is the disk full?"
        raise OSError(f"{path}: could not be written: {reason}") from error


def wait_for_same_file(path, seconds=90):
    """Return when all processes see the file at `path` that rank 0 sees, or none: a network file system may show it to
    another node a minute late. Raises UserError if that does not come."""
    if world_size() == 1:
        return
    theirs = [_size_and_time(path)]
    dist.broadcast_object_list(theirs)
    for _ in range(seconds):
        if _size_and_time(path) == theirs[0]:
            return
        time.sleep(1)
    raise UserError(f"{path}: rank 0 sees another file; expected a folder on a file system that all nodes share")


def _size_and_time(path):
    try:
        os.listdir(Path(path).parent)  # makes NFS look again
        status = os.stat(path)
    except FileNotFoundError:
        return None
    return status.st_size, status.st_mtime_ns


def load_checkpoint(path):
    """Load a checkpoint that holds plain data only; nothing in the file is ever executed.

    Besides tensors and plain Python, exactly the harmless types of DINO's training files are admitted:
    argparse.Namespace, numpy scalars and dtypes, pathlib paths. Returns the object on CPU.
    Raises UserError for a file that is missing, truncated, or holds anything else.
    """
    path = Path(path)
    try:
        is_file = path.is_file()
    except (OSError, ValueError):  # too long, not UTF-8
        is_file = False
    if not is_file:
        raise UserError(f"{path}: no such file; expected a checkpoint (nothing is ever downloaded)")
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_harmless_types()):
            warnings.simplefilter("ignore")  # of an unusual pickle: what is refused says so below
            check_archive(path)
            state = torch.load(path, map_location="cpu", weights_only=True)
            refuse_odd_tensors(state)
            return state
    except pickle.UnpicklingError as error:
        refuse_other_kinds(path)
        reason = " ".join(str(error).split())
        at, end = reason.find("Unsupported"), reason.find(" Please use")  # what follows is advice for programs
        reason = reason[max(0, at) : end if end > at else None][:160].rstrip(". ")
        raise UserError(
            f"{path}: refused, it holds more than plain data: {reason}; save it anew where it was made, "
            "torch.save(model.state_dict(), FILE)"
        ) from None
    except MemoryError:
        raise UserError(f"{path}: refused, it asks for more memory than there is; is it damaged?") from None
    except Exception as error:  # a damaged file fails in many ways, none of them ours to list
        refuse_other_kinds(path)
        reason = " ".join(str(error).split())[:160]
        whole = "" if zipfile.is_zipfile(path) else "; the file is truncated or no checkpoint"
        raise UserError(f"{path}: cannot be read ({type(error).__name__}: {reason}){whole}") from None


OTHER_KINDS = {
    b"version https://git-lfs": "a pointer of Git LFS, not the file itself: git lfs pull",
    b"<": "a page of HTML or XML, such as a server's error: download it again",
    b"{": "a text in JSON: give the file with the weights",
}


def refuse_other_kinds(path):
    """Of a file that does not load: raises UserError, with the remedy, for what often lies where weights should. Not
    before, as any bytes may begin a safetensors file: its header's length."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        head = file.read(64).lstrip()
        found = next((what for start, what in OTHER_KINDS.items() if head.startswith(start)), None)
        if found or not head:
            raise UserError(f"{path}: cannot be read: it is {found or 'an empty file: copy or download it again'}")


def check_archive(path):
    """torch.save stores: a compressed member may be a thousand times as large in memory as in the file. torch.load does
    not look at the checksums that torch.save writes: a flipped bit of a tensor would be trained on."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            packed = [member.filename for member in archive.infolist() if member.compress_type != zipfile.ZIP_STORED]
        if packed:
            raise pickle.UnpicklingError(f"Unsupported: {packed[0]} is compressed")
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # about 1 s per GB
        if damaged:
            raise ValueError(f"{damaged} is not what was written, by its checksum")


def refuse_odd_tensors(state):
    """A few bytes may describe a tensor of terabytes: by strides of 0, without data (meta), or sparsely."""
    todo, seen = [state], set()
    while todo:
        value = todo.pop()
        if id(value) in seen:  # a list may be in itself
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            if value.layout != torch.strided or value.is_meta or value.is_quantized or value.is_nested:
                raise pickle.UnpicklingError(f"Unsupported: a tensor of {value.layout} on {value.device}")
            if value.nbytes > value.untyped_storage().nbytes():
                raise pickle.UnpicklingError(f"Unsupported: a tensor of {value.nbytes} bytes where fewer are stored")
        value = vars(value) if isinstance(value, argparse.Namespace) else value
        todo += value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple | set) else ()


def _harmless_types():
    numpy_core = importlib.import_module("numpy._core.multiarray")
    dtypes = [type(np.dtype(t)) for t in (np.float64, np.float32, np.float16, np.int64, np.int32, np.bool_)]
    scalar = numpy_core.scalar
    named_by_numpy_1 = (scalar, "numpy.core.multiarray.scalar")
    return [argparse.Namespace, np.dtype, *dtypes, named_by_numpy_1, scalar, PosixPath, PurePosixPath]
