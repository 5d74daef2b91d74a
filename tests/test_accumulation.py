"""M micro-batches make the step of the joint batch: value, gradients, statistics, order, draws, in spite of signals."""

import contextlib
import functools
import itertools
import math
import signal

import pytest
import torch

import accumulation
import main_cplearn
import runs
from benchmarks import accumulation as accumulation_benchmark
from checkpoint import load_checkpoint
from joint_steps import assert_near, over_processes, steps_in_float64
from runs import assert_same_checkpoint, launch, write_pictures
from utils import RunFailed, UserError

TOTAL = 16  # images of a step


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"), 48)


def words(folder, output, batch, parts, processes=1, **changes):
    assert batch * parts * processes == TOTAL
    values = {"num_workers": 0, "max_steps": 6, "warmup_epochs": 0, "optimizer": "sgd", "lr": 1.0, "clip_grad": 0.5}
    values |= {"batch_size_per_gpu": batch, "accum_steps": parts, "head_impl": "dense", "save_every_minutes": 60}
    return runs.flags(folder, output, **(values | changes))


VIT = {"arch": "vit_tiny", "width": None, "patch_size": 16, "drop_path_rate": 0}
CROPS = {"local_crops_number": 2, "local_crops_size": 16}
SETTINGS = {
    "ResNet-8": {},
    "ViT, multi-crop": VIT | CROPS,
    "tanh, ce": {"activation": "tanh", "prior": "ce"},  # tanh's tau follows from B: fixed in the test
    "tiled, multi-crop": {"head_impl": "tiled"} | CROPS,
    "Hadamard": {"head_impl": "tiled", "dictionary": "hadamard", "proj_dim": 32},
    "bare head": {"bare_head": True},
}


@pytest.mark.parametrize("changes", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize(("batch", "parts"), [(4, 4), (8, 2)])
def test_micro_batches_are_the_joint_batch(folder, tmp_path, changes, batch, parts, monkeypatch):
    if "activation" in changes:
        monkeypatch.setattr("cplearn_head.code_temperature", lambda codes, dim, size: 5.0)
    expected = steps_in_float64(0, words(folder, tmp_path / "joint", 16, 1, **changes), 3)
    found = steps_in_float64(0, words(folder, tmp_path / "parts", batch, parts, **changes), 3)
    assert_near(found, expected)


SHARDED = {"head_impl": "tiled", "shard_codes": True} | CROPS
IN_TWO = {"dense": {}, "sharded": SHARDED, "sharded, bare head": SHARDED | {"bare_head": True}}


@pytest.mark.parametrize("changes", IN_TWO.values(), ids=IN_TWO)
def test_two_processes_of_micro_batches_are_the_joint_batch(folder, tmp_path, changes, run_in_processes):
    alone = {name: value for name, value in changes.items() if name != "shard_codes"}
    expected = steps_in_float64(0, words(folder, tmp_path / "joint", 16, 1, **alone), 3)
    found = run_in_processes(steps_in_float64, words(folder, tmp_path / "parts", 4, 2, 2, **changes), 3)
    assert_near(over_processes(found), expected)


DRAWING = {
    "drop path": VIT | {"drop_path_rate": 0.3},
    "pixel noise": {"augmentation": "small"},
    "local prior": {"prior_scope": "local"},
}


@pytest.mark.parametrize("changes", DRAWING.values(), ids=DRAWING)
def test_micro_batches_are_processes(folder, tmp_path, changes, run_in_processes):
    """Micro-batch m of rank r is process r M + m: what it draws, and what a local prior is the mean of."""
    two = run_in_processes(steps_in_float64, words(folder, tmp_path / "two", 8, 1, 2, **changes), 2)
    alone = steps_in_float64(0, words(folder, tmp_path / "one", 8, 2, **changes), 2)
    if "prior_scope" in changes:  # each process has its own idea of how codes are used: rank 0's is saved
        for step in itertools.chain(alone, *two):
            step.pop("state objective.usage")
    assert_near(alone, over_processes(two))
    joint = steps_in_float64(0, words(folder, tmp_path / "joint", 16, 1, **changes), 1)
    with pytest.raises(AssertionError):  # one process of all images draws otherwise, and has another prior
        assert_near(alone[:1], joint)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_precision_of_a_run(folder, tmp_path, precision):
    """One step of a whole run, float32 weights: the joint batch's to rounding."""
    for name, batch, parts in (("joint", 16, 1), ("parts", 4, 4)):
        changes = VIT | {"max_steps": 1, "precision": precision, "lr": 10.0}
        main_cplearn.train(
            main_cplearn.get_args_parser().parse_args(
                list(map(str, words(folder, tmp_path / name, batch, parts, **changes)))
            )
        )
    joint, parts = (load_checkpoint(tmp_path / name / "checkpoint.pth") for name in ("joint", "parts"))
    moments = [
        torch.cat([kept["momentum_buffer"].flatten() for kept in state["optimizer"]["state"].values()])
        for state in (joint, parts)
    ]
    error = float((moments[0] - moments[1]).norm() / moments[0].norm())
    assert error < {"fp32": 1e-5, "bf16": 1e-2}[precision]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_stopped_run_of_micro_batches_goes_on_as_if_nothing_had_been(folder, tmp_path, processes):
    settings = VIT | {"drop_path_rate": 0.2, "optimizer": "adamw", "lr": 1e-3, "max_steps": 12, "save_every_minutes": 0}
    parts = 4 // processes

    def start(name, **faults):
        return launch(words(folder, tmp_path / name, 4, parts, processes, **settings), tmp_path, processes, **faults)

    undisturbed = start("undisturbed")
    assert undisturbed.wait() == [0] * processes, undisturbed.output()
    assert (
        f"effective batch {parts} x 4 x {processes} = 16 images per step, exact; {parts - 1} of {parts} go through"
        in (undisturbed.output())
    )
    stopped = start("stopped", faults={0: functools.partial(signal_inside_a_micro_batch, 5)})
    assert stopped.wait() == [128 + signal.SIGUSR2] * processes, stopped.output()
    assert 0 < load_checkpoint(tmp_path / "stopped" / "checkpoint.pth")["step"] < 12
    again = start("stopped")
    assert again.wait() == [0] * processes, again.output()
    assert_same_checkpoint(*(tmp_path / name / "checkpoint.pth" for name in ("stopped", "undisturbed")))


def signal_inside_a_micro_batch(step):
    """SIGUSR2 to this process in the second pass of global step `step`."""
    again = accumulation.second_pass

    def signalled(run, batches, at, m, rows, kept):
        if at == step and m == 0:
            signal.raise_signal(signal.SIGUSR2)
        return again(run, batches, at, m, rows, kept)

    accumulation.second_pass = signalled


def test_a_run_goes_on_with_other_processes_and_micro_batches(folder, tmp_path):
    """2 x 2 x 4 cut in mid-epoch, the same command on one process: 4 micro-batches of 4, drop path and all."""
    settings = VIT | {"drop_path_rate": 0.2, "max_steps": 5, "lr": 0.05, "log_every": 1, "save_every_minutes": 0}
    whole = launch(words(folder, tmp_path / "whole", 4, 2, 2, **settings), tmp_path, processes=2)
    cut = launch(
        words(folder, tmp_path / "cut", 4, 2, 2, **settings),
        tmp_path,
        processes=2,
        faults={0: functools.partial(signal_inside_a_micro_batch, 1)},
    )
    assert whole.wait() == [0, 0] and cut.wait() == [128 + signal.SIGUSR2] * 2, cut.output()
    alone = launch(words(folder, tmp_path / "cut", 4, 2, 2, **settings), tmp_path)
    assert alone.wait() == [0], alone.output()
    assert "effective batch 4 x 4 x 1 = 16" in alone.output()
    assert "note: to keep the run's 16 images per step, --batch_size_per_gpu 4 --accum_steps 2 became 4 and 4" in (
        alone.output()
    )
    assert "note: to keep" not in whole.output()
    ours, theirs = (runs.logged(tmp_path / name) for name in ("cut", "whole"))
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["train_loss"] == pytest.approx(other["train_loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("then", "processes", "expected"),
    [
        ((64, 1, 4), 2, (64, 2)),  # B stays, M takes over
        ((64, 2, 2), 1, (64, 4)),
        ((64, 1, 2), 4, (32, 1)),
        ((64, 3, 1), 2, (48, 2)),
        ((64, 1, 4), 4, (64, 1)),
    ],
)
def test_shares_of_another_number_of_processes(then, processes, expected, monkeypatch):
    monkeypatch.setattr("checkpoint.world_size", lambda: processes)
    batch, parts, before = then
    args = main_cplearn.get_args_parser().parse_args(["--batch_size_per_gpu", str(batch), "--accum_steps", str(parts)])
    state = {"effective_batch": batch * parts * before, "world_size": before, "batch_size": batch, "args": vars(args)}
    state |= {"format": "cplearn 2", "path": "checkpoint.pth", "student": {"backbone.norm.weight": None}}
    assert main_cplearn.share_of_batch(args, state) == expected
    state["student"]["backbone.bn1.running_var"] = None  # its statistics are of all that one pass sees
    assert main_cplearn.share_of_batch(args, state) == (batch * parts * before // processes, 1)


def test_batch_norm_in_the_backbone_is_refused(folder, tmp_path):
    changes = {"arch": "resnet18", "width": None}
    with pytest.raises(UserError, match=r"--accum_steps 4: bn1 of --arch resnet18 is a batch norm") as caught:
        steps_in_float64(0, words(folder, tmp_path, 4, 4, **changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("scaled", [False, True])
def test_an_infinite_gradient_of_one_micro_batch_moves_nothing(folder, tmp_path, scaled):
    """With fp16's scaler, whose scale falls, or without; the next step is taken."""
    run = main_cplearn.build_run(
        main_cplearn.get_args_parser().parse_args(list(map(str, words(folder, tmp_path, 4, 4, optimizer="adamw"))))
    )
    run.log, run.watch = main_cplearn.RunLog(tmp_path, 0, 10), main_cplearn.Watch(())
    run.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
    before = {name: p.clone() for name, p in run.model.named_parameters()}
    batches, calls = next(run.loader.steps(0)), []

    def spoil(module, given, output):
        calls.append(output.requires_grad)
        if len(calls) == 6:  # four without and with a graph, then the second of the second passes
            output.register_hook(lambda gradient: gradient * math.inf)

    hook = run.model.backbone.register_forward_hook(spoil)
    main_cplearn.train_one_step(run, batches, 0)
    assert calls == [False] * 3 + [True] * 4
    assert all(torch.equal(p, before[name]) for name, p in run.model.named_parameters())
    assert run.scaler.get_scale() == (512.0 if scaled else 1.0)
    hook.remove()
    main_cplearn.train_one_step(run, batches, 1)
    assert not any(torch.equal(p, before[name]) for name, p in run.model.named_parameters() if p.ndim > 1)


def test_a_backbone_that_draws_by_itself_is_found(folder, tmp_path, monkeypatch):
    """A generator of its own gives the second pass other features: nobody would see it in the loss."""
    own = torch.Generator().manual_seed(0)
    embed = accumulation.FirstHalf.forward

    def drawing(self, views, kept=()):
        return [row * (torch.rand(len(row), 1, generator=own) > 0.1) for row in embed(self, views, kept)]

    monkeypatch.setattr(accumulation.FirstHalf, "forward", drawing)
    with pytest.raises(RunFailed, match=r"changed its features by \d+%"):
        steps_in_float64(0, words(folder, tmp_path, 4, 4))


def test_every_micro_batch_is_progress(folder, tmp_path):
    run = main_cplearn.build_run(
        main_cplearn.get_args_parser().parse_args(list(map(str, words(folder, tmp_path, 4, 4))))
    )
    run.log, run.watch, moved = main_cplearn.RunLog(tmp_path, 0, 10), main_cplearn.Watch(()), []
    run.watch.progress = moved.append
    main_cplearn.train_one_step(run, next(run.loader.steps(0)), 0)
    assert len(moved) == 4 + 3


def test_views_of_both_passes_and_of_the_joint_batch_are_equal(folder, tmp_path):
    """The joint batch's images, in its order, cropped alike."""
    found = {}
    for name, batch, parts in (("joint", 16, 1), ("parts", 4, 4)):
        run = main_cplearn.build_run(
            main_cplearn.get_args_parser().parse_args(list(map(str, words(folder, tmp_path / name, batch, parts))))
        )
        for step, batches in zip(range(4), (b for epoch in (0, 1) for b in run.loader.steps(epoch)), strict=False):
            views = [accumulation.views_of(run, batches, step, m) for m in range(parts) for _ in range(2)]
            assert all(torch.equal(a, b) for m in range(parts) for a, b in zip(*views[2 * m : 2 * m + 2], strict=True))
            found[name, step] = accumulation.join(views[::2])
    for step in range(4):
        assert all(torch.equal(a, b) for a, b in zip(found["joint", step], found["parts", step], strict=True))


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_micro_batches():
    """Eight times the images at equal B: the rows of all, and what the second half makes of them, are a small part."""
    args = accumulation_benchmark.get_parser().parse_args(["--batch", "16"])
    few, many = (float(accumulation_benchmark.in_own_process(args, parts)) for parts in (2, 16))
    assert many < 1.25 * few


# ---- views ahead of the GPU ------------------------------------------------------------------------------------------


class Streams:
    """torch.cuda's streams and events, which here note what is put on them; `run` then plays them in a given order."""

    def __init__(self):
        self.current, self.queues, self.done = "training", {"training": [], "ahead": []}, set()

    def put(self, work):
        self.queues[self.current].append(work)

    def play(self, first):
        """Run all that can be run of the stream `first`, then of the other, until both are empty."""
        order = [first, next(name for name in self.queues if name != first)]
        while any(self.queues.values()):
            name = next(n for n in order if self.queues[n] and self.queues[n][0][0] <= self.done)
            while self.queues[name] and self.queues[name][0][0] <= self.done:
                _, work = self.queues[name].pop(0)
                work()


class Stream:
    def __init__(self, streams, name):
        self.streams, self.name = streams, name

    def record_event(self):
        event = object()
        self.streams.queues[self.name].append((set(), lambda: self.streams.done.add(event)))
        return event

    def wait_event(self, event):
        self.streams.queues[self.name].append(({event}, lambda: None))


class LateTensor:
    """A tensor whose content changes when a stream comes to it."""

    def __init__(self, streams, value):
        self.streams, self.value = streams, value

    def copy_(self, other):
        self.streams.put((set(), lambda: setattr(self, "value", other.value)))


@pytest.mark.parametrize(
    ("first", "broken"), [("training", None), ("ahead", None), ("ahead", "trained"), ("training", "ready")]
)
def test_views_are_neither_read_too_early_nor_overwritten_too_early(monkeypatch, first, broken):
    """Whichever stream is faster; and without one of the two events, that is seen."""
    streams = Streams()
    training, own = Stream(streams, "training"), Stream(streams, "ahead")

    @contextlib.contextmanager
    def entered(stream):
        streams.current = stream.name
        yield
        streams.current = "training"

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: own)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: training)
    monkeypatch.setattr(torch.cuda, "stream", entered)
    monkeypatch.setattr(torch, "empty_like", lambda view, memory_format: LateTensor(streams, None))
    if broken:
        stream = {"trained": own, "ready": training}[broken]
        monkeypatch.setattr(stream, "wait_event", lambda event: None)
    ahead, read = accumulation.Ahead(torch.device("cuda")), []
    for number in range(8):
        views = ahead(lambda number=number: [LateTensor(streams, number)])
        streams.put((set(), lambda view=views[0]: read.append(view.value)))
    streams.play(first)
    assert (read == list(range(8))) == (broken is None)
