"""Signals and standstill, seen by a thread of their own even while the main thread waits inside a collective.

    with Watch((signal.SIGTERM, signal.SIGINT), patience=600, last_resort=save_what_is_whole) as watch:
        for batch in batches:
            train_one_step(batch)
            watch.progress(step)
            if watch.signals:                      # the ordinary way: save, and end at a step's end
                ...

    with Watch((), patience=600, unit="batch") as watch:    # standstill alone
        for batch in watch.over(batches):
            ...

Python runs signal handlers between two bytecodes of the main thread, so a process that is blocked in a C call, waiting
for a peer that hangs, would never hear that its time is up. The interpreter's wake-up descriptor is written at once.
"""

import contextlib
import faulthandler
import select
import signal
import socket
import sys
import threading
import time

from utils import UNFINISHED, leave, rank

GRACE_S = 20.0  # from a signal (or the last step after it) to the last resort; SLURM's KillWait and torchrun allow 30 s
FAREWELL_S = 3.0  # the first rank to leave ends the job: time for all others to print where they are


class Watch:
    """Collects signals instead of dying from them, and ends a process whose main thread makes no progress.

    numbers:      the signals to collect, into `.signals`, in the order of their arrival. A second SIGINT interrupts the
                  main thread at once: the user has waited long enough. In another thread than the main one Python
                  cannot collect signals: then none are, and a line says so.
    patience:     seconds without `progress(step)` after which the process prints the stack of every thread and ends
                  with exit code UNFINISHED; 0: never. The way to the first step counts too.
    unit:         the name of what `progress` counts.
    last_resort:  called in a thread, for GRACE_S at most, before the process is ended by this or because the main
                  thread did nothing about a signal for GRACE_S (exit code 128 + its number).

    Earlier handlers are restored at the end.
    """

    def __init__(self, numbers, patience=0.0, last_resort=lambda: None, unit="step"):
        self.numbers, self.patience, self.last_resort, self.unit = numbers, patience, last_resort, unit
        self.signals, self.interrupts = [], 0
        self.moved_at = self.signalled_at = None  # seconds of time.monotonic(), which nobody sets back
        self.step = None
        self.resting = 0

    def progress(self, step):
        self.step, self.moved_at = step, time.monotonic()

    def over(self, batches):
        """Yields them; each is progress. Once the last has come, nothing is overdue any more."""
        for number, batch in enumerate(batches, 1):
            self.progress(number)
            yield batch
        self.moved_at = None

    def each(self, batches, step):
        """Yields them; each is progress at this step."""
        for batch in batches:
            self.progress(step)
            yield batch

    @contextlib.contextmanager
    def paused(self):
        """Inside, nothing is overdue: writing a file or an evaluation takes the time it takes."""
        self.resting += 1
        try:
            yield
        finally:
            self.resting -= 1
            if self.moved_at is not None:
                self.progress(self.step)

    def __enter__(self):
        self.receiver, self.sender = socket.socketpair()
        self.sender.setblocking(False)  # the interpreter writes to it from inside a signal handler
        if self.numbers and threading.current_thread() is not threading.main_thread():
            print("note: not in the main thread, so that a signal will end this process without saving", flush=True)
            self.numbers = ()
        self.handlers = {number: signal.signal(number, self._interrupt) for number in self.numbers}
        if self.numbers:
            self.wakeup = signal.set_wakeup_fd(self.sender.fileno(), warn_on_full_buffer=False)
        self.progress(None)
        self.thread = threading.Thread(target=self._watch, name="watch", daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *error):
        if self.numbers:
            signal.set_wakeup_fd(self.wakeup)
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.sender.shutdown(socket.SHUT_WR)  # the thread reads the end; to close would not do, workers have copies
        self.thread.join()
        self.sender.close()
        self.receiver.close()

    def _interrupt(self, number, frame):
        self.interrupts += number == signal.SIGINT
        if self.interrupts > 1:
            raise KeyboardInterrupt

    def _watch(self):
        while True:
            if select.select([self.receiver], [], [], self._time_left())[0]:
                arrived = self.receiver.recv(64)
                if not arrived:
                    return
                self.signals += [number for number in arrived if number in self.numbers]
                self.signalled_at = self.signalled_at or (time.monotonic() if self.signals else None)
            elif self._time_left() == 0:
                self._end()

    def _time_left(self):
        """Seconds until the main thread is overdue, or None where there is no such moment now."""
        if self.resting:
            return 1.0  # look again: whoever ends the pause does not wake this thread
        ends = []
        if self.signalled_at is not None:
            ends.append(max(self.signalled_at, self.moved_at or 0) + GRACE_S)
        if self.patience and self.moved_at is not None:
            ends.append(self.moved_at + self.patience)
        return max(0.0, min(ends) - time.monotonic()) if ends else 1.0

    def _end(self):
        if self.signals:
            code = 128 + self.signals[0]
            why = f"{signal.Signals(self.signals[0]).name} came and no {self.unit} has ended since"
        else:
            at = f"before the first {self.unit}" if self.step is None else f"at {self.unit} {self.step}"
            code, why = UNFINISHED, f"no progress for {self.patience:g} s {at}"
        try:
            print(f"error (rank {rank()}): {why}; every thread of this process:", file=sys.stderr, flush=True)
            faulthandler.dump_traceback(sys.__stderr__)
            resort = threading.Thread(target=self.last_resort, daemon=True)  # what hangs may be the disk
            resort.start()
            resort.join(GRACE_S)
            time.sleep(FAREWELL_S)
        finally:
            leave(code)  # the main thread is stuck: nothing gentler reaches it
