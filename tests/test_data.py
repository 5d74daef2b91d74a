"""data.py against PIL and torchvision, and against itself with other workers, processes and starting points."""

import multiprocessing
import os
import pickle
import shlex
import subprocess
import sys
import tempfile

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms.v2 import functional as tv

import data
import pictures
from images import DATASETS, ArrayImages, FolderImages, open_dataset
from images.workers import Workers, hand_over, start_worker
from pictures import array_loader, folder_args, make_args, picture, write
from utils import RunFailed, UserError


@pytest.fixture(scope="module")
def photographs():
    return pictures.photographs()


# Loader


def test_order_of_an_epoch_is_a_permutation_that_changes():
    first, second = data.epoch_order(0, 0, 1000), data.epoch_order(0, 1, 1000)
    assert sorted(first) == list(range(1000))
    assert (first == second).sum() < 10 and (first == np.arange(1000)).sum() < 10


def read_epoch(args, batch_size, epoch=0, first_step=0, **options):
    images = open_dataset(args)
    return list(data.TrainLoader(images, args, batch_size, **options).epoch(epoch, first_step))


def same(a, b):
    return np.array_equal(a.indices, b.indices) and all(map(torch.equal, a.crops, b.crops)) and a.bad == b.bad


@pytest.fixture
def some_bad(tmp_path):
    """40 PNGs, four of them truncated."""
    for number in range(40):
        path = write(tmp_path / f"{number:02}.png", picture(40, 40, seed=number))
        if number % 10 == 3:
            truncate(path)
    return tmp_path


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_bad_files_are_replaced_named_once_and_alike_with_any_number_of_workers(some_bad, capsys):
    epochs = {}
    for workers in (0, 1, 3):
        args = folder_args(some_bad, "--max_bad_images", 0.1)
        args.num_workers = workers
        images = open_dataset(args)
        loader = data.TrainLoader(images, args, 8)
        epochs[workers] = [batch for epoch in (0, 1) for batch in loader.epoch(epoch)]
        bad_names = {os.path.basename(name) for name in loader.bad_images}
        assert bad_names == {"03.png", "13.png", "23.png", "33.png"}
        assert loader.num_bad_images == 4
        loader.check_bad_images()
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("cannot read")]
        assert len(lines) == 4 and all(sum(name in line for line in lines) == 1 for name in bad_names)
    for workers in (1, 3):
        assert all(same(a, b) for a, b in zip(epochs[0], epochs[workers], strict=True))
    for batch in epochs[0]:
        assert not set(batch.indices) & {3, 13, 23, 33}
        assert all(image.float().std() > 1 for crop in batch.crops for image in crop)


def test_too_many_bad_files_end_the_run(some_bad):
    args = folder_args(some_bad)
    loader = data.TrainLoader(open_dataset(args), args, 8)
    list(loader.epoch(0))
    with pytest.raises(UserError, match=r"4 of 40 images .*--max_bad_images allows 0.01.*\.png"):
        loader.check_bad_images()
    loader.check_bad_images(total_bad=0)
    with pytest.raises(UserError):
        loader.check_bad_images(total_bad=1)


@pytest.mark.parametrize("workers", [0, 1])
def test_when_nothing_can_be_read_the_run_ends(tmp_path, workers):
    for number in range(8):
        (tmp_path / f"{number}.jpg").write_text("?")
    args = folder_args(tmp_path)
    args.num_workers = workers
    with pytest.raises(UserError, match="in a row") as error:
        list(data.TrainLoader(open_dataset(args), args, 4).epoch(0))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_equals_uninterrupted(class_folders, workers):
    args = folder_args(class_folders)
    args.num_workers = workers
    loader = data.TrainLoader(open_dataset(args), args, 4)
    next(iter(loader.epoch(0)))  # leaves the epoch half-way
    whole, resumed = list(loader.epoch(7)), list(loader.epoch(7, first_step=3))
    assert len(whole) == loader.steps_per_epoch == 6 and len(resumed) == 3
    assert all(same(a, b) for a, b in zip(whole[3:], resumed, strict=True))
    for a, b in zip(whole[3:], resumed, strict=True):
        assert all(map(torch.equal, loader.augment(a, "cpu"), loader.augment(b, "cpu")))
    assert list(loader.epoch(7, first_step=6)) == []


def test_skipped_steps_are_not_read(class_folders, monkeypatch):
    args, read = folder_args(class_folders), []
    load = FolderImages.load
    monkeypatch.setattr(FolderImages, "load", lambda self, index, c: read.append(index) or load(self, index, c))
    list(data.TrainLoader(open_dataset(args), args, 4).epoch(0, first_step=4))
    assert len(read) == 8


def test_two_processes_equal_one_on_the_joined_batch(class_folders, photographs):
    args = folder_args(class_folders)
    one = read_epoch(args, 8)
    two = [read_epoch(args, 4, rank=rank, world_size=2) for rank in (0, 1)]
    assert len(one) == 3
    for joined, *parts in zip(one, *two, strict=True):
        assert np.array_equal(joined.indices, np.concatenate([part.indices for part in parts]))
        views, *halves = [batch.crops[0].unflatten(0, (2, -1)) for batch in (joined, *parts)]  # (views, B, C, h, w)
        assert torch.equal(views, torch.cat(halves, 1))
    one = array_loader(photographs, "--augmentation", "dino", batch_size=16)
    two = [array_loader(photographs, "--augmentation", "dino", batch_size=8, rank=r, world_size=2) for r in (0, 1)]
    for joined, *parts in zip(one.epoch(2), *[loader.epoch(2) for loader in two], strict=True):
        parts = [loader.augment(part, "cpu") for loader, part in zip(two, parts, strict=True)]
        for view, *halves in zip(one.augment(joined, "cpu"), *parts, strict=True):
            torch.testing.assert_close(view, torch.cat(halves), atol=1e-5, rtol=0)


def test_an_epoch_visits_each_image_once_and_epochs_differ(photographs):
    loader = array_loader(photographs, batch_size=8)
    first, second = ([batch.indices for batch in loader.epoch(epoch)] for epoch in (0, 1))
    assert sorted(np.concatenate(first)) == list(range(64)) == sorted(np.concatenate(second))
    assert not np.array_equal(first, second)
    assert loader.steps_per_epoch == 8 and array_loader(photographs, batch_size=9).steps_per_epoch == 7


def test_next_epochs_first_batches_are_asked_for_before_the_last_ones_are_used(class_folders, monkeypatch):
    """Two workers, asked for two batches each ahead: the pipeline does not run empty between epochs."""
    args, asked, micro_batches = folder_args(class_folders), [], data.Plan.micro_batches

    def traced(plan, first, end):
        for item in micro_batches(plan, first, end):
            asked.append(item[0])
            yield item

    monkeypatch.setattr(data.Plan, "micro_batches", traced)
    args.num_workers = 2
    loader = data.TrainLoader(open_dataset(args), args, 4)
    expected = [batch for epoch in range(3) for batch in loader.epoch(epoch)][:14]
    assert asked == [epoch for epoch in range(3) for _ in range(6)]
    asked.clear()
    batches, ahead = [], []
    for epoch in range(3):
        batches += loader.epoch(epoch, end=14)
        ahead.append(len(asked) - len(batches))
    assert all(same(a, b) for a, b in zip(batches, expected, strict=True))
    assert ahead == [4, 2, 0] and asked == [0] * 6 + [1] * 6 + [2] * 2  # none after the end of the run
    resumed = [batch for epoch, first in ((1, 4), (2, 0)) for batch in loader.epoch(epoch, first, end=14)]
    assert all(same(a, b) for a, b in zip(resumed, expected[10:], strict=True))


def test_batches_for_a_cpu_are_not_pinned_where_a_gpu_is(class_folders, photographs, monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: pinned.append(x) or x)
    images, args = open_dataset(folder_args(class_folders)), folder_args(class_folders)
    for device in ("cpu", "cuda"):
        loader = array_loader(photographs, device=device)
        next(iter(loader.epoch(0)))
        data.eval_batch_in_memory(loader.images, np.arange(4), 32, 3, loader.device)
        pins = data.TrainLoader(images, args, 4, device=device).workers.loader.pin_memory
        assert (len(pinned), pins) == ((0, False) if device == "cpu" else (2, True))


def test_a_batch_is_handed_over_as_one_tensor_for_each_size(class_folders, monkeypatch):
    args = folder_args(class_folders, "--local_crops_number", 6)
    batch = next(data.TrainLoader(open_dataset(args), args, 4).epoch(0))
    assert [tuple(crops.shape) for crops in batch.crops] == [(8, 3, 32, 32), (24, 3, 16, 16)]
    shared, share = [], torch.UntypedStorage._share_fd_cpu_
    monkeypatch.setattr(torch.UntypedStorage, "_share_fd_cpu_", lambda s: shared.append(s) or share(s))
    assert same(pickle.loads(pickle.dumps(hand_over(batch))), batch)
    assert len(shared) == 2


# Workers


def test_what_workers_are_given_can_be_sent_to_them(class_folders):
    """As spawn and forkserver do."""
    args = folder_args(class_folders)
    loader, step = data.TrainLoader(open_dataset(args), args, 4), (0, np.arange(4))
    options = loader.workers.start.keywords
    sent = pickle.loads(pickle.dumps((*loader.workers.start.args, options["collate_fn"], options["worker_init_fn"])))
    assert same(sent[0].__getitems__(step), loader.workers.loader.dataset.__getitems__(step))
    dataset = data.EvalDataset(loader.images, 32, 3)
    assert torch.equal(pickle.loads(pickle.dumps(dataset)).__getitems__(step[1]), dataset.__getitems__(step[1]))
    assert sent[1:] == (options["collate_fn"], start_worker)


@pytest.fixture(params=["fork", "spawn", "forkserver"])
def start_method(request):
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method(request.param, force=True)
    yield request.param
    multiprocessing.set_start_method(before, force=True)


@pytest.mark.slow
def test_batches_are_the_same_by_any_start_method_and_after_a_death(class_folders, start_method, capsys):
    """In training and in evaluation."""
    args = folder_args(class_folders)
    images = open_dataset(args)
    expected = list(data.TrainLoader(images, args, 4).epoch(3))
    args.num_workers = 2
    found = with_a_death(data.TrainLoader(images, args, 4).epoch(3))
    assert all(same(a, b) for a, b in zip(found, expected, strict=True))
    settings = (images, 32, 3, (0.5,) * 3, (0.2,) * 3, 2)
    expected = list(data.eval_batches(*settings))
    found = with_a_death(data.eval_batches(*settings, num_workers=2))
    assert all(torch.equal(a[1], b[1]) for a, b in zip(found, expected, strict=True))
    assert capsys.readouterr().out.count("a data worker died") == 2


def with_a_death(batches):
    """All batches; one worker is killed after the first."""
    first = next(batches)
    multiprocessing.active_children()[0].kill()
    return [first, *batches]


DEAD = [
    RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
    RuntimeError("DataLoader worker (pid 7) exited unexpectedly with exit code 1. Details are lost"),
    RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly"),
    RuntimeError("Pin memory thread exited unexpectedly"),
    EOFError(),
    ConnectionResetError(104, "Connection reset by peer"),
    ConnectionRefusedError(111, "Connection refused"),
    FileNotFoundError(2, "No such file or directory"),  # the worker's socket
    OSError("got end of file during message"),
    ConnectionResetError("Caught ConnectionResetError in pin memory thread for device 0.\nOriginal Traceback"),
    EOFError("Caught EOFError in pin memory thread for device 0.\nOriginal Traceback"),
]
NOT_DEAD = [
    OSError("Caught OSError in DataLoader worker process 0.\nOriginal Traceback"),
    EOFError("Caught EOFError in DataLoader worker process 0.\nOriginal Traceback ... in pin memory thread"),
    RuntimeError("Caught RuntimeError in DataLoader worker process 1.\nOriginal Traceback"),
    RuntimeError("Caught RuntimeError in pin memory thread for device 0.\nOriginal Traceback: CUDA error"),
    RuntimeError("CUDA error: out of memory"),
]
SHORT = [
    (OSError("AF_UNIX path too long"), "TMPDIR"),
    (OSError(24, "Too many open files"), "ulimit -n"),
    (RuntimeError("Too many open files. Communication with the workers is no longer possible."), "ulimit -n"),
    (OSError(28, "No space left on device"), "--shm-size"),
    (RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: Success (0)"), "--shm-size"),
    (BlockingIOError(11, "Resource temporarily unavailable"), "lower --num_workers"),
]


def failing_once(error):
    """Workers whose loader fails at first; a new one goes through its steps."""
    workers = Workers(data.EvalDataset(None, 8, 3), 0, torch.device("cpu"))
    workers.start, workers.loader = lambda: workers.steps, failing(error)
    return workers.batches(lambda done: ["a", "b"][done:])


class failing:
    def __init__(self, error):
        self.error = error

    def __iter__(self):
        raise self.error
        yield


@pytest.mark.parametrize("error", DEAD, ids=str)
def test_dead_workers_are_known_by_what_pytorch_says(error, capsys):
    assert list(failing_once(error)) == ["a", "b"]
    assert "a data worker died" in capsys.readouterr().out


@pytest.mark.parametrize("error", NOT_DEAD, ids=str)
def test_what_a_worker_raised_is_raised(error):
    with pytest.raises(type(error)) as raised:
        list(failing_once(error))
    assert raised.value is error


@pytest.mark.parametrize(("error", "remedy"), SHORT[:3] + SHORT[5:], ids=str)
def test_what_is_short_in_this_process_is_one_line(error, remedy):
    with pytest.raises(RunFailed, match=remedy):
        list(failing_once(error))


@pytest.mark.parametrize(("error", "remedy"), SHORT, ids=str)
@pytest.mark.parametrize("workers", ["training", "evaluation"])
def test_a_worker_that_cannot_hand_over_its_batch_is_one_line(class_folders, monkeypatch, error, remedy, workers):
    """PyTorch fails when it shares a tensor; by itself it would print that, and the training process would wait."""

    def fail(storage):
        raise error

    args = folder_args(class_folders)
    args.num_workers, images = 1, open_dataset(args)
    loader = data.TrainLoader(images, args, 4).epoch(0)
    if workers == "evaluation":
        loader = data.eval_batches(images, 32, 3, (0.5,) * 3, (0.2,) * 3, 4, num_workers=1)
    monkeypatch.setattr(torch.UntypedStorage, "_share_fd_cpu_", fail)
    with pytest.raises(RunFailed, match=remedy) as raised:
        next(loader)
    assert "\n" not in str(raised.value) and raised.value.exit_code == 1


def test_a_long_tmpdir_is_one_line(class_folders, monkeypatch, tmp_path):
    (tmp_path / ("x" * 100)).mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / ("x" * 100)))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.delitem(multiprocessing.current_process()._config, "tempdir", raising=False)
    args = folder_args(class_folders)
    args.num_workers = 1
    with pytest.raises(RunFailed, match=r"AF_UNIX path too long; .*TMPDIR"):
        next(data.TrainLoader(open_dataset(args), args, 4).epoch(0))


SMALL_SHM = """
import sys
sys.path[:0] = {path!r}
import data, pictures
from images import open_dataset
from utils import RunFailed
args = pictures.folder_args({folder!r}, "--img_size", 256)
args.num_workers, images = 2, open_dataset(args)
evaluation = data.eval_batches(images, 256, 3, (0.5,) * 3, (0.2,) * 3, 16, num_workers=2)
for batches in (data.TrainLoader(images, args, 16).epoch(0), evaluation):
    try:
        list(batches)
    except RunFailed as error:
        print(error)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounts /dev/shm: needs root")
def test_a_small_dev_shm_is_one_line(class_folders):
    """Of 1 MB, seen by one process: a container's default is 64."""
    code = SMALL_SHM.format(path=sys.path, folder=str(class_folders))
    mounted = "mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "
    command = ["unshare", "-m", "sh", "-c", mounted + shlex.join([sys.executable, "-c", code])]
    said = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True).stdout.splitlines()
    assert len(said) == 2 and all("shared memory (/dev/shm) is short" in line for line in said)


# Evaluation


def test_a_byte_of_each_level_goes_to_the_device(class_folders, photographs):
    """Onto PyTorch's device without memory: what is copied there."""
    sent = []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.is_meta and not args[0].is_meta:
                sent.append((args[0].dtype, args[0].numel()))
            return out

    for images in (open_dataset(folder_args(class_folders)), ArrayImages("some", photographs)):
        with Copies():
            _, x = next(data.eval_batches(images, 32, 3, (0.5,) * 3, (0.2,) * 3, 4, device="meta"))
        assert x.is_meta and x.dtype == torch.float32
        assert sorted(sent, key=str) == [(torch.float32, 3), (torch.float32, 3), (torch.uint8, 4 * 3 * 32 * 32)]
        sent.clear()


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_counts_each_image_once(class_folders, workers):
    images = open_dataset(folder_args(class_folders))
    options = {"batch_size": 4, "num_workers": workers}
    ranks = [
        list(data.eval_batches(images, 32, 3, (0.5,) * 3, (0.2,) * 3, rank=r, world_size=2, **options)) for r in (0, 1)
    ]
    assert [len(batch[0]) for batch in ranks[0]] == [4, 4, 4, 2]
    assert sorted(np.concatenate([indices for rank in ranks for indices, _ in rank])) == list(range(27))
    chosen = list(data.eval_batches(images, 32, 3, (0.5,) * 3, (0.2,) * 3, indices=[5, 3, 20], **options))
    assert chosen[0][0].tolist() == [5, 3, 20] and chosen[0][1].dtype == torch.float32


def test_evaluation_transform_is_dinos(class_folders):
    images = open_dataset(folder_args(class_folders))
    mean, std = DATASETS["imagefolder"]["mean"], DATASETS["imagefolder"]["std"]
    t = torchvision.transforms
    transform = t.Compose([t.Resize(37, interpolation=3), t.CenterCrop(32), t.ToTensor(), t.Normalize(mean, std)])
    for indices, x in data.eval_batches(images, 32, 3, mean, std, 8):
        for index, image in zip(indices, x, strict=True):
            expected = transform(Image.open(images.name(index)))
            assert (image - expected).abs().max() * 0.229 * 255 < 2.1


def dinos_evaluation_transform(image, size):
    """Of an uint8 (C, H, W), as torchvision has it; the whole image is resized."""
    resized = tv.resize(image, [round(size * 256 / 224)], tv.InterpolationMode.BICUBIC, antialias=True)
    return tv.center_crop(resized, [size, size])


@pytest.mark.parametrize("shape", [(40, 40), (300, 41), (33, 250), (1, 1), (1, 8), (500, 375), (90, 12)])
def test_images_of_ordinary_shapes_are_resized_whole(shape):
    image = torch.from_numpy(picture(*shape)).reshape(*shape, 3).permute(2, 0, 1)
    for size in (20, 32, 57):
        assert torch.equal(data.resize_and_center_crop(image, size), dinos_evaluation_transform(image, size))


@pytest.mark.parametrize("shape", [(4, 403), (400, 3), (5, 91), (1, 61)])
def test_only_the_middle_of_a_strip_is_resized(shape):
    image = torch.from_numpy(picture(*shape)).reshape(*shape, 3).permute(2, 0, 1)
    cropped, whole = data.resize_and_center_crop(image, 32), dinos_evaluation_transform(image, 32)
    assert (cropped.float() - whole.float()).abs().mean() < 3  # the long side is rounded to whole pixels elsewhere


@pytest.mark.parametrize("shape", [(1, 20_000), (20_001, 1), (3, 70_000)])
def test_a_strip_takes_no_more_memory_than_a_picture(shape, monkeypatch, tmp_path):
    """In evaluation and in training: what is made by resizing is counted."""
    made, interpolate = [], torch.nn.functional.interpolate
    monkeypatch.setattr(
        torch.nn.functional, "interpolate", lambda *a, **k: made.append(interpolate(*a, **k)) or made[-1]
    )
    write(tmp_path / "strip.png", np.arange(np.prod(shape) * 3, dtype=np.uint8).reshape(*shape, 3))
    args = folder_args(tmp_path, "--img_size", 224, "--local_crops_number", 4)
    images = open_dataset(args)
    assert data.resize_and_center_crop(images.load(0), 224).shape == (3, 224, 224)
    next(data.TrainLoader(images, args, 1).epoch(0))
    assert len(made) == 7 and max(x.numel() for x in made) <= 3 * 256 * (8 * 256 + 256)


def test_evaluation_of_sets_in_memory(photographs):
    images = ArrayImages("some", photographs)
    indices, x = zip(*data.eval_batches(images, 32, 3, (0.5,) * 3, (0.25,) * 3, 24), strict=True)
    assert [len(i) for i in indices] == [24, 24, 16]
    torch.testing.assert_close(torch.cat(x), (photographs / 255 - 0.5) / 0.25)
    resized = torch.cat([x for _, x in data.eval_batches(images, 20, 3, (0,) * 3, (1,) * 3, 24)]) * 255
    expected = tv.resize(photographs, [20, 20], tv.InterpolationMode.BICUBIC, antialias=True)
    assert (resized - expected).abs().max() <= 1.001
    assert next(data.eval_batches(images, 32, 1, (0,), (1,), 24))[1].shape == (24, 1, 32, 32)


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_stops_at_a_bad_file(some_bad, workers):
    images = open_dataset(folder_args(some_bad))
    with pytest.raises(UserError, match=r"03\.png") as error:
        list(data.eval_batches(images, 32, 3, (0,) * 3, (1,) * 3, 8, num_workers=workers))
    assert "\n" not in str(error.value)


# Flags


def test_defaults_follow_the_data_set():
    expected = {
        "fashion_mnist": (28, 1, "small", 16),
        "cifar10": (32, 3, "small", 16),
        "cifar100": (32, 3, "small", 16),
        "svhn": (32, 3, "small", 16),
        "imagefolder": (224, 3, "dino", 96),
    }
    for name, values in expected.items():
        args = make_args("--dataset", name)
        assert (args.img_size, args.in_chans, args.augmentation, args.local_crops_size) == values
        assert len(args.mean) == len(args.std) == args.in_chans and 0 < args.num_workers <= 10
    assert make_args("--patch_size", 7).local_crops_size == 14 and make_args("--patch_size", 4).local_crops_size == 12
    assert make_args().dataset == "fashion_mnist" and tuple(make_args().global_crops_scale) == (0.4, 1.0)
    assert make_args("--in_chans", 3).mean == (0.2860,) * 3
    assert make_args("--mean", 0.1, "--std", 0.2).mean == [0.1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--img_size", 0), "img_size"),
        (("--num_workers", -1), "num_workers"),
        (("--mean", 0.1, 0.2), "2 values, --in_chans is 1"),
        (("--num_workers", 257), "at most 256"),
        (("--std", 0), "--std 0: expected auto, or a number above 0 and of at most 1, where black is 0 and white 1"),
        (("--std", 58.4), "--std 58.4"),
        (
            ("--mean", 123.7),
            "--mean 123.7: expected auto, or a number of at least 0 and of at most 1, where black is 0",
        ),
        (("--mean", -0.1), "of at least 0"),
        (("--mean", "nan"), "--mean nan"),
        (("--in_chans", 0), "in_chans"),
    ],
)
def test_values_without_meaning_are_one_line(flags, message):
    with pytest.raises(UserError, match=message) as error:
        make_args(*flags)
    assert "\n" not in str(error.value)


def test_mean_and_std_from_a_file_have_the_flags_ranges():
    """A checkpoint or a config.json gives them without argparse."""
    for name, values, message in (
        ("mean", [123.7], "--mean 123.7"),
        ("std", [0.0], "--std 0"),
        ("std", [], "0 values"),
    ):
        args = make_args()
        setattr(args, name, values)
        with pytest.raises(UserError, match=message):
            data.resolve_dataset_defaults(args)


def test_channels_that_cannot_be_made(photographs):
    with pytest.raises(UserError, match="--in_chans 2: these images have 3 channels"):
        array_loader(photographs, "--in_chans", 2)
    four = torch.cat([photographs, photographs[:, :1]], 1)
    levels = ("--mean", *[0.5] * 4, "--std", *[0.2] * 4)
    loader = array_loader(four, "--in_chans", 4, "--augmentation", "dino", *levels)
    assert loader.augment(next(iter(loader.epoch(0))), "cpu")[0].shape == (16, 4, 32, 32)
    with pytest.raises(UserError, match=r"--in_chans 3: these images have 4 channels; expected 4$"):
        array_loader(four, "--in_chans", 3)


@pytest.mark.parametrize("value", ["0", "-1", "two"])
def test_a_number_of_processes_that_is_none_is_one_line(value, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", value)
    with pytest.raises(UserError, match=f"LOCAL_WORLD_SIZE={value}: expected a whole number of at least 1"):
        make_args("--dataset", "cifar10")


def test_processes_share_the_cpus(monkeypatch):
    monkeypatch.setattr(data, "available_cpus", lambda: 12)
    for value, workers in (("", 10), ("1", 10), ("4", 3), ("100", 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", value)
        assert make_args("--dataset", "cifar10").num_workers == workers
