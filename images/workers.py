"""Processes that make batches of a data set, in order, and what becomes of a run when one of them dies.

workers = Workers(dataset, num_workers, device)      # dataset.__getitems__(step) makes the batch of a step
for batch in workers.batches(lambda done: steps[done:]):
    ...
"""

import functools
import pickle
import signal
import threading
from multiprocessing.reduction import ForkingPickler

import torch

from images.decoding import first_line
from utils import RunFailed, UserError

MAX_DEATHS = 3  # of workers, in a row


class Workers:
    """Processes that make whole batches, in order. If one dies, all are replaced and go on.

    dataset: its __getitems__ makes a batch of a step, as a pure function; what it returns is a UserError if it cannot.
    num_workers: 0 makes the batches in this process.
    device: where the batches go; those for a CUDA device are pinned by a thread.
    persistent: the processes stay for the next call of `batches`.
    at_once: batches that are taken together.
    """

    def __init__(self, dataset, num_workers, device, persistent=False, at_once=1):
        self.steps = Steps()
        self.start = functools.partial(
            torch.utils.data.DataLoader,
            dataset,
            batch_sampler=self.steps,
            num_workers=num_workers,
            collate_fn=hand_over if num_workers else as_it_is,
            worker_init_fn=start_worker,
            persistent_workers=persistent and num_workers > 0,
            pin_memory=device.type == "cuda",
            prefetch_factor=max(2, -(-at_once // num_workers) + 1) if num_workers else None,
        )
        self.loader = self.start()

    def batches(self, steps_from):
        """The batches of the steps that steps_from(0) iterates over; steps_from(n): without the first n of them.

        Raises the UserError that a batch is, and RunFailed if no batch comes out of the workers."""
        done = deaths = 0
        while True:
            self.steps.coming, failure = steps_from(done), None
            try:
                for batch in self.begin():
                    if isinstance(batch, UserError):
                        failure = batch
                        break
                    done, deaths = done + 1, 0
                    yield batch
                else:
                    return
            except (RuntimeError, OSError, EOFError) as error:
                if is_of_resources(error):
                    failure = cannot_hand_over(error)
                elif not is_of_dead_worker(error):
                    raise
                reason, deaths = first_line(error), deaths + 1
            if deaths > MAX_DEATHS:
                failure = RunFailed(
                    f"data workers died {deaths} times without making one batch; if memory was short, lower "
                    "--num_workers"
                )
            self.loader = None  # ends the old workers before anything else: memory may be short
            if failure:
                raise failure
            print(f"a data worker died ({reason}); starting new ones", flush=True)
            self.loader = self.start()

    def close(self):
        """Ends the processes, whoever still holds them: a traceback, or a circle. Where pinned batches came from them
        PyTorch would else wait at the interpreter's end, up to five seconds for each, and nothing would tell them."""
        batches = getattr(self.loader, "_iterator", None)
        if batches is not None:
            batches._shutdown_workers()  # PyTorch has no public way
        self.loader = None

    def begin(self):
        batches = iter(self.loader)  # hears of one that died since the last call
        hear_of_dead_workers_in_next_only()
        return batches


class Steps:
    """The DataLoader's batch sampler; it stays in the training process."""

    coming = ()

    def __iter__(self):
        return iter(self.coming)


def as_it_is(batch):
    return batch


def hand_over(batch):
    """Pickle it here, in the worker's own thread, whose errors reach the training process.

    The thread of the DataLoader's queue would print the error and forget the batch: the training process would wait
    for it for ever."""
    try:
        return Pickled(ForkingPickler.dumps(batch))
    except (RuntimeError, OSError) as error:
        return cannot_hand_over(error)


class Pickled:
    """Comes out of the queue as what it was. content: bytes, without the tensors, which lie in shared memory."""

    def __init__(self, content):
        self.content = bytes(content)

    def __reduce__(self):
        return pickle.loads, (self.content,)


SHORT_OF_SHARED_MEMORY = "shared memory (/dev/shm) is short: lower --num_workers, or give it more (docker --shm-size)"
REMEDIES = {  # by a part of the message
    "AF_UNIX path too long": "the path of TMPDIR is too long for a socket: set TMPDIR to a shorter one",
    "Too many open files": "lower --num_workers, or raise the limit of open files (ulimit -n)",
    "shared memory": SHORT_OF_SHARED_MEMORY,
    "No space left": SHORT_OF_SHARED_MEMORY,
    "": "lower --num_workers",
}


def cannot_hand_over(error):
    remedy = next(text for part, text in REMEDIES.items() if part in str(error))
    return RunFailed(f"a data worker cannot start or hand over its batch: {first_line(error)}; {remedy}")


def is_of_resources(error):
    """Whether this process has too little of something to start workers, or to take what they hand over."""
    is_sockets = isinstance(error, OSError) and not is_of_lost_connection(error)
    return not str(error).startswith("Caught ") and (is_sockets or "Too many open files" in str(error))


def is_of_dead_worker(error):
    """PyTorch's own error, or that of the connection by which a tensor was to come; but not what a worker raised."""
    text = str(error)
    if text.startswith("Caught ") and " in pin memory thread" not in text.partition("\n")[0]:
        return False
    return is_of_lost_connection(error) or text.startswith(("DataLoader worker (pid", "Pin memory thread exited"))


def is_of_lost_connection(error):
    """EOFError, ...; an OSError of the module multiprocessing has no number."""
    lost = (EOFError, ConnectionError, FileNotFoundError)
    return isinstance(error, lost) or (isinstance(error, OSError) and "end of file" in str(error))


def hear_of_dead_workers_in_next_only():
    """PyTorch's handler of SIGCHLD raises its error wherever the main thread happens to be, in the middle of an update
    of the weights too. Without it `next(batches)` notices within five seconds."""
    if threading.current_thread() is threading.main_thread():  # elsewhere PyTorch has set none
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def start_worker(worker_id):
    torch.set_num_threads(1)
    # signals to the whole process group are the training process's business, which ends its workers
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGINT, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
