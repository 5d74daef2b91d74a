"""Several roots as one set: how often an epoch draws from each, what their labels mean, how a run of them goes on."""

import itertools
import os
from functools import partial

import numpy as np
import pytest
import torch

import data
from images import open_dataset
from images.sets import MixedImages
from pictures import folder_args, make_args, picture, write
from runs import assert_same_checkpoint, flags, kill_at, launch, run_to_end, write_pictures
from utils import UserError


def write_root(root, classes, count, seed=0):
    for label, name in enumerate(classes):
        for number in range(count):
            write(root / name / f"{number:02}.png", picture(20 + number, 24, seed=100 * seed + 10 * label + number))
    return root


@pytest.fixture
def two_roots(tmp_path):
    """10 images of ant and cat, 18 of bee and cat."""
    return write_root(tmp_path / "a", ("ant", "cat"), 5, 1), write_root(tmp_path / "b", ("bee", "cat"), 9, 2)


@pytest.mark.parametrize("draws", [((10, 10),), ((10, 10), (7, 3)), ((6, 15), (9, 4)), ((5, 0), (8, 8), (3, 10))])
def test_an_epoch_draws_exactly_so_many_of_each_root(draws):
    """Counted: of a root no image is ever drawn more than once more often than another."""
    total = sum(count for count, _ in draws)
    starts = np.cumsum([0, *(count for count, _ in draws)])
    counts, seen = np.zeros(total, int), set()
    for epoch in range(30):
        keys = data.drawn_in_epoch(3, epoch, draws)
        assert len(set(keys)) == len(keys) == sum(drawn for _, drawn in draws)
        of_epoch = np.bincount(keys % total, minlength=total)
        for (start, end), (count, drawn) in zip(itertools.pairwise(starts), draws, strict=True):
            assert of_epoch[start:end].sum() == drawn and np.ptp(of_epoch[start:end]) <= (drawn % count > 0)
        counts += of_epoch
        assert all(np.ptp(counts[start:end]) <= 1 for start, end in itertools.pairwise(starts))
        seen.add(tuple(keys))
        assert np.array_equal(keys, data.drawn_in_epoch(3, epoch, draws))
    assert len(seen) == 30, "epochs of one order"


def test_one_root_is_drawn_as_it_always_was():
    """Bit for bit: runs that are under way go on."""
    for count, epoch in ((1, 0), (10, 0), (1000, 7)):
        assert np.array_equal(data.drawn_in_epoch(5, epoch, ((count, count),)), data.epoch_order(5, epoch, count))


def test_roots_are_one_set_whose_classes_go_by_name(two_roots):
    a, b = two_roots
    images = open_dataset(make_args("--dataset", "imagefolder", "--data_path", a, f"{b}:0.5"))
    assert images.classes == ["ant", "bee", "cat"] and len(images) == 28 and images.draws == ((10, 10), (18, 9))
    assert [images.classes[label] for label in images.labels] == [
        os.path.basename(os.path.dirname(images.name(i))) for i in range(28)
    ]
    alone = open_dataset(folder_args(b))
    assert images.name(10) == alone.name(0) and torch.equal(images.load(27), alone.load(17))
    assert "10 images in 2 classes" in images.summary and "an epoch draws 9" in images.summary
    one, other = (
        open_dataset(make_args("--dataset", "imagefolder", "--data_path", a, f"{b}{w}")) for w in ("", ":0.5")
    )
    assert len({images.fingerprint, one.fingerprint}) == 2 and images.fingerprint == other.fingerprint


def test_classes_are_kept_in_every_root(two_roots, tmp_path):
    (tmp_path / "list").write_text("cat bee")
    args = make_args("--dataset", "imagefolder", "--data_path", *two_roots, "--class_list", tmp_path / "list")
    images = open_dataset(args)
    assert images.classes == ["bee", "cat"] and images.labels.tolist() == [1] * 5 + [0] * 9 + [1] * 9
    assert all("ant" not in images.name(i) for i in range(len(images)))
    (tmp_path / "list").write_text("bee")
    images = open_dataset(args)
    assert len(images) == 9 and images.draws == ((9, 9),)


def test_a_root_without_labels_takes_all_labels_away(two_roots, tmp_path):
    write(tmp_path / "flat" / "1.png", picture(8, 8))
    images = open_dataset(make_args("--dataset", "imagefolder", "--data_path", two_roots[0], tmp_path / "flat"))
    assert images.labels is None and "no labels, as 1 of 2 roots have none" in images.summary


def test_validation_images_are_those_of_the_roots_that_have_some(two_roots, tmp_path):
    write_root(tmp_path / "c" / "train", ("ant", "cat"), 2)
    write_root(tmp_path / "c" / "val", ("ant", "cat"), 3)
    args = make_args("--dataset", "imagefolder", "--data_path", f"{tmp_path / 'c'}:3", two_roots[0])
    images = open_dataset(args, "val")
    assert len(images) == 6 and not isinstance(images, MixedImages) and open_dataset(args).draws == ((4, 12), (10, 10))
    with pytest.raises(UserError, match="no validation images"):
        open_dataset(make_args("--dataset", "imagefolder", "--data_path", *two_roots), "val")


def test_an_image_drawn_again_has_other_crops(two_roots):
    args = folder_args(f"{two_roots[0]}:2")
    loader = data.TrainLoader(open_dataset(args), args, 20)
    (batch,) = loader.epoch(0)
    assert sorted(batch.indices) == sorted([*range(10)] * 2) and sorted(batch.keys) == list(range(20))
    rows = {key: batch.crops[0][row] for row, key in enumerate(batch.keys)}
    assert all(not torch.equal(rows[key], rows[key + 10]) for key in range(10))
    batch.crops = [crops[:1].repeat(len(crops), 1, 1, 1) for crops in batch.crops]  # and colours
    rows = dict(zip(batch.keys, loader.augment(batch, "cpu")[0], strict=True))
    assert any(not torch.equal(rows[key], rows[key + 10]) for key in range(10))


@pytest.mark.parametrize("weight", ["0", "0.0", "1e9", "."])
def test_a_weight_that_is_none_is_one_line(two_roots, weight):
    with pytest.raises(UserError, match=r"the weight after the colon") as error:
        open_dataset(folder_args(f"{two_roots[0]}:{weight}"))
    assert "\n" not in str(error.value)


def test_a_folder_whose_name_ends_as_a_weight_is_a_folder(tmp_path):
    write_root(tmp_path / "b:0.5", ("ant", "bee"), 2)
    assert len(open_dataset(folder_args(tmp_path / "b:0.5"))) == 4
    assert open_dataset(folder_args(f"{tmp_path / 'b:0.5'}:0.5")).draws == ((4, 2),)


def test_sets_in_memory_have_one_place(two_roots):
    with pytest.raises(UserError, match="--dataset cifar10 has one place"):
        open_dataset(make_args("--dataset", "cifar10", "--data_path", *two_roots))


def test_a_loader_that_begins_later_gives_the_same_batches(two_roots):
    args = make_args("--dataset", "imagefolder", "--data_path", two_roots[0], f"{two_roots[1]}:1.3", "--num_workers", 0)
    loaders = [data.TrainLoader(open_dataset(args), args, 4) for _ in range(2)]
    assert loaders[0].steps_per_epoch == (10 + 23) // 4
    list(loaders[0].epoch(0))
    whole, later = list(loaders[0].epoch(1)), list(loaders[1].epoch(1, first_step=5))
    for a, b in zip(whole[5:], later, strict=True):
        assert np.array_equal(a.keys, b.keys) and all(map(torch.equal, a.crops, b.crops))


@pytest.mark.slow
def test_a_killed_run_of_two_roots_goes_on_bit_for_bit(tmp_path):
    a, b = write_pictures(tmp_path / "a", 30), write_pictures(tmp_path / "b", 45)
    words = {
        name: [*flags(a, tmp_path / name, data_path=None, epochs=3), "--data_path", str(a), f"{b}:0.7"]
        for name in ("whole", "killed")
    }
    run_to_end(words["whole"], tmp_path)
    assert launch(words["killed"], tmp_path, faults={0: partial(kill_at, 11)}).wait() == [-9]
    assert "resuming at step 11" in run_to_end(words["killed"], tmp_path)
    assert_same_checkpoint(tmp_path / "whole" / "checkpoint.pth", tmp_path / "killed" / "checkpoint.pth")
