"""What the writer's thread raises is never lost, and what it writes is a copy that nothing changes."""

import copy
import gc
import multiprocessing
import threading

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from checkpoint import load_checkpoint, save_checkpoint
from running.writer import HostCopy, Writer

CPU = torch.device("cpu")


@pytest.mark.parametrize("error", [ValueError("odd"), MemoryError("none"), SystemExit(3), KeyboardInterrupt()])
def test_what_the_thread_raises_is_said_at_once_and_raised_by_the_next_wait(capsys, error):
    def fail():
        raise error

    writer = Writer()
    writer.start(fail)
    assert writer.join(20) and type(error).__name__ in capsys.readouterr().err
    for call in (writer.wait, writer.raise_failure, lambda: writer.start(print)):
        writer.failure = error
        with pytest.raises(type(error)):
            call()
    writer.wait()  # it was raised: once is enough


def test_one_function_at_a_time_and_waiting_may_be_bounded():
    writer, held, done = Writer(), threading.Event(), []
    writer.start(lambda: (held.wait(20), done.append("first")))
    assert not writer.join(0.05) and done == []
    threading.Timer(0.1, held.set).start()
    writer.start(done.append, "second")
    writer.wait()
    assert done == ["first", "second"] and writer.join(0)


def some_state():
    weight, codes = torch.randn(7, 5), torch.randint(-1, 1, (3, 8), dtype=torch.int8)
    student = {"weight": weight, "convolution": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)}
    return {
        "student": student,
        "teacher": student,
        "tied": weight.detach(),
        "part": weight[2:4],
        "every other": weight[:, ::2],
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "groups": [{"betas": (0.9, 0.95), "names": ["a"]}]},
        "objective": {"codes": codes, "empty": torch.empty(0), "nothing": None, "seed": 5},
    }


def flat(value, prefix=""):
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else None
    if items is None:
        return {prefix: value}
    return {name: leaf for key, part in items for name, leaf in flat(part, f"{prefix}.{key}").items()}


def test_a_copy_is_equal_and_its_own():
    state = some_state()
    leaves, expected = flat(state), flat(copy.deepcopy(state))
    copied = HostCopy().of(state, CPU)
    for leaf in leaves.values():
        if torch.is_tensor(leaf):
            leaf.zero_()
    state["optimizer"]["groups"][0]["names"].append("b")
    assert list(flat(copied)) == list(expected) and type(copied["optimizer"]["groups"][0]["betas"]) is tuple
    for name, leaf in flat(copied).items():
        assert torch.equal(leaf, expected[name]) if torch.is_tensor(leaf) else leaf == expected[name], name
        assert not torch.is_tensor(leaf) or leaf.dtype == expected[name].dtype
    assert copied["student"]["convolution"].is_contiguous(memory_format=torch.channels_last)


def test_what_is_shared_stays_shared_and_the_memory_is_used_again():
    state, host = some_state(), HostCopy()
    first = host.of(state, CPU)
    weights = [first["student"]["weight"], first["teacher"]["weight"], first["tied"]]
    assert len({weight.data_ptr() for weight in weights}) == 1
    before = {name: leaf.data_ptr() for name, leaf in flat(first).items() if torch.is_tensor(leaf)}
    state["student"]["weight"].fill_(2)
    state["objective"]["codes"] = torch.ones(3, 9)  # another tensor than before
    second = host.of(state, CPU)
    after = {name: leaf.data_ptr() for name, leaf in flat(second).items() if torch.is_tensor(leaf)}
    assert [name for name in after if after[name] != before[name]] == [".objective.codes"]
    assert second["teacher"]["weight"].eq(2).all() and second["objective"]["codes"].shape == (3, 9)
    assert {kept.data_ptr() for kept in host.tensors.values()} == set(after.values())  # nothing else is kept


def test_what_is_shared_is_stored_once(tmp_path):
    state = {"student": {"w": torch.randn(1000)}, "teacher": {}}
    state["teacher"]["w"] = state["student"]["w"].detach()
    save_checkpoint(HostCopy().of(state, CPU), tmp_path / "checkpoint.pth")
    assert (tmp_path / "checkpoint.pth").stat().st_size < 1.5 * 4000
    loaded = load_checkpoint(tmp_path / "checkpoint.pth")
    assert torch.equal(loaded["teacher"]["w"], state["student"]["w"])


class Copies(TorchDispatchMode):
    """(size, target's device, non_blocking) of every copy."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.copy_.default:
            self.seen.append((args[1].numel(), args[1].device.type, args[0].device.type, *args[2:]))
        return function(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_on_a_gpu_without_one_nothing_waits_but_the_end(monkeypatch):
    waits, made = [], []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: waits.append(len(copies.seen)))
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: (made.append(k["pin_memory"]), empty_like(*a, **k))[1])
    with FakeTensorMode():
        weight, bits, codes = torch.empty(5, device="cuda"), torch.empty(7), torch.empty(6, device="cuda")
        with Copies() as copies:
            HostCopy().of({"weight": weight, "bits": bits, "codes": codes}, torch.device("cuda"))
    assert sorted(copies.seen) == [(5, "cuda", "cpu", True), (6, "cuda", "cpu", True), (7, "cpu", "cpu")]
    assert waits == [3] and made == [True, False, True]


def test_a_worker_that_begins_meanwhile_does_not_write_into_the_file(tmp_path, monkeypatch):
    def save_in_two_parts(state, file):
        file.write(b"a" * 5)  # too few to leave Python's buffer, which the forked process has too
        begun.set()
        held.wait(20)
        file.write(b"b" * 5)

    writer, begun, held = Writer(), threading.Event(), threading.Event()
    monkeypatch.setattr(torch, "save", save_in_two_parts)
    writer.start(save_checkpoint, {}, tmp_path / "checkpoint.pth")
    assert begun.wait(20)
    worker = multiprocessing.get_context("fork").Process(target=gc.collect)
    worker.start()
    worker.join()
    held.set()
    writer.wait()
    assert (tmp_path / "checkpoint.pth").read_bytes() == b"aaaaabbbbb" and worker.exitcode == 0
