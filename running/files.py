"""Files that are whole or not there, and folders that one process holds.

    with replace_file(path) as file: ...      write_whole(path, content)      append_whole(path, content)
    with new_folder(folder) as aside: ...      lock = lock_folder(folder)

What was saved before is lost neither to a full disk nor to a kill: it is replaced by what is whole, or it stays.
"""

import contextlib
import errno
import fcntl
import os
import shutil
import socket
import uuid
from pathlib import Path

from utils import UserError


def append_whole(path, content):
    """Append bytes to a file, all of them or none. Raises OSError."""
    with open(path, "ab", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        if content and file.write(content) < len(content):  # a disk that fills up takes a part
            file.truncate(end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def write_whole(path, content):
    """Write bytes or text (UTF-8) in place of what `path` holds. Raises OSError."""
    with replace_file(path) as file:
        file.write(content if isinstance(content, bytes) else content.encode("utf-8", "surrogateescape"))


@contextlib.contextmanager
def replace_file(path, alone=False):
    """Yields a binary file beside `path`, which takes its place, forced to disk, if nothing is raised: at any moment
    `path` is the old file or the new one, whole.

    alone: no other process writes `path`, as in a folder that is locked: what a kill leaves beside it is written over
    by the next attempt. Otherwise the file beside it has a name of its own, a link's file is the one that is replaced,
    and what is no file, such as /dev/stdout, is written to."""
    path = Path(path)
    if not alone and path.exists() and not path.is_file():
        with open(path, "wb") as file:
            yield file
        return
    path = path if alone else path.resolve()
    aside = path.with_name(f".{path.name}.tmp" if alone else _name_of_its_own(path))
    try:
        with open(aside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        _fsync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise


@contextlib.contextmanager
def new_folder(folder):
    """Yields a folder beside `folder`, this process's own, which takes its place if nothing is raised: a folder that is
    there has all its files. What kill -9 leaves, .NAME.*.tmp, stands in nobody's way and may be deleted. Raises
    OSError, also where another process has written `folder` meanwhile."""
    folder = Path(folder)
    aside = folder.with_name(_name_of_its_own(folder))
    try:
        aside.mkdir(parents=True)
        yield aside
        os.replace(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _name_of_its_own(path):
    return f".{path.name}.{uuid.uuid4().hex[:8]}.tmp"


def _fsync_folder(folder):
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock_folder(folder, flag="--output_dir"):
    """Hold `folder` for this process alone: returns an open file, and the lock lasts until it is closed.

    A POSIX record lock: the kernel drops it when its holder dies, however it dies, children do not inherit it, and
    NFS and Lustre carry it between nodes. Raises UserError if another process holds it or the folder is read-only."""
    path = Path(folder) / ".lock"
    try:
        file = open(path, "a+")  # noqa: SIM115 (closing it would let the lock go)
    except OSError as error:
        raise UserError(f"{flag} {folder}: cannot be written to ({error.strerror})") from None
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # EAGAIN or EACCES
        file.seek(0)
        raise UserError(
            f"{flag} {folder}: another run is writing to it ({file.read(200).strip()}); wait for its end or give "
            "another folder"
        ) from None
    except OSError as error:
        print(f"warning: {folder} is on a file system without locks ({error.strerror}); start no second run on it")
    file.truncate(0)
    job = os.environ.get("SLURM_JOB_ID")
    file.write(f"host {socket.gethostname()}, process {os.getpid()}{f', job {job}' if job else ''}\n")
    file.flush()
    return file
