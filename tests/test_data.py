"""data.py against PIL and torchvision, and against itself with other workers, processes and starting points."""

import os

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torchvision.transforms.v2 import functional as tv

import data
import pictures
from images import DATASETS, ArrayImages, FolderImages, open_dataset
from pictures import array_loader, folder_args, make_args, picture, write
from utils import UserError


@pytest.fixture(scope="module")
def class_folders(tmp_path_factory):
    return pictures.write_class_folders(tmp_path_factory.mktemp("classes"))


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
        for crop, *halves in zip(joined.crops, *[part.crops for part in parts], strict=True):
            assert torch.equal(crop, torch.cat(halves))
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


# Evaluation


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
        (("--std", 0), "--std 0: expected a number above 0 and of at most 1, where black is 0 and white 1"),
        (("--std", 58.4), "--std 58.4"),
        (("--mean", 123.7), "--mean 123.7: expected a number of at least 0 and of at most 1, where black is 0"),
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
    loader = array_loader(four, "--in_chans", 4, "--augmentation", "dino")
    assert loader.augment(next(iter(loader.epoch(0))), "cpu")[0].shape == (16, 4, 32, 32)
    with pytest.raises(UserError, match=r"--in_chans 3: these images have 4 channels; expected 4$"):
        array_loader(four, "--in_chans", 3)
