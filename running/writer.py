"""Files written while training goes on: a thread that writes, and a copy on the host of what it writes.

writer = Writer()
writer.wait()                                              # the copy before is being written until then
writer.start(write, writer.copy.of(state, device), path)   # `state` may change from here on
writer.wait()                                              # raises what `write` has raised
"""

import threading

import torch

from utils import print_error


class Writer:
    """Calls one function at a time in a thread of its own, and the caller goes on meanwhile.

    What the function raises is said at once, and raised in the caller's thread by its next `wait` or `raise_failure`.
    The end of the process does not wait for the thread: `join` does.

    copy: a HostCopy of what is being written."""

    def __init__(self):
        self.copy, self.thread, self.failure = HostCopy(), None, None

    def start(self, function, *args):
        self.wait()
        self.thread = threading.Thread(target=self._call, args=(function, *args), name="writer", daemon=True)
        self.thread.start()

    def _call(self, function, *args):
        try:
            function(*args)
        except BaseException as error:  # whatever it is, it must not end with this thread
            print_error(f"in the writer's thread: {type(error).__name__}: {error}")
            self.failure = error

    def wait(self):
        """Return once nothing is being written."""
        self.join()
        self.raise_failure()

    def join(self, seconds=None):
        """Whether, so many seconds later at most, nothing is being written any more."""
        if self.thread is not None:
            self.thread.join(seconds)
        return self.thread is None or not self.thread.is_alive()

    def raise_failure(self):
        failure, self.failure = self.failure, None
        if failure is not None:
            raise failure


class HostCopy:
    """Copies plain data to the host, its tensors into the memory of the copy before, if that copy was of these tensors.

    To touch new memory takes several times as long as the copy itself (benchmarks/border.py), and pinned memory,
    to which a GPU writes at the speed of its bus, is slow to get."""

    def __init__(self):
        self.tensors = {}

    def of(self, state, device):
        """A copy that nothing changes before the next call. What is shared in `state` is shared in its copy.

        device: the run's; it is waited for once."""
        self.earlier, self.tensors = self.tensors, {}
        copy = self._copied(state)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self.earlier = None
        return copy

    def _copied(self, value):
        if isinstance(value, torch.Tensor):
            return self._copied_tensor(value)
        if isinstance(value, dict):
            return {key: self._copied(part) for key, part in value.items()}
        return type(value)(map(self._copied, value)) if isinstance(value, list | tuple) else value

    def _copied_tensor(self, value):
        key = value.device, value.data_ptr(), value.dtype, value.shape, value.stride()
        if key not in self.tensors:
            kept = self.earlier.get(key)
            if kept is None:
                kept = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
            self.tensors[key] = kept.copy_(value, non_blocking=value.is_cuda)
        return self.tensors[key]
