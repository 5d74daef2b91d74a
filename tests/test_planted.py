"""Planted images: two views share their kind, all of it, and nothing else."""

import itertools
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import data
from experiments import planted
from images import open_folder
from pictures import make_args
from runs import ROOT

COLOURS_LEFT_ALONE = ("--jitter", "0", "--grayscale", "0", "--solarize", "0")


def write(folder, kinds, images, img_size=16, seed=0):
    settings = {"kinds": kinds, "images": images, "img_size": img_size, "seed": seed}
    planted.main([str(folder), *itertools.chain(*((f"--{name}", str(value)) for name, value in settings.items()))])
    return folder


def views_of(folder, *flags):
    """The first and the second view (N, 3, 16, 16) of the images of an epoch, normalised, and the kind (N,) of each."""
    args = make_args("--dataset", "imagefolder", "--data_path", folder, "--img_size", 16, "--num_workers", 0, *flags)
    images = open_folder(str(folder), "train")
    loader = data.TrainLoader(images, args, batch_size=32)
    views, kinds = zip(*((loader.augment(b, "cpu"), images.labels[b.indices]) for b in loader.epoch(0)), strict=True)
    return *(torch.cat(view) for view in zip(*views, strict=True)), torch.as_tensor(np.concatenate(kinds))


@pytest.mark.parametrize("augmentation", ["small", "dino", "cifar"])
def test_the_other_view_tells_the_kind_and_nothing_else(tmp_path, augmentation):
    """Counted: the kind that the nearest mean names in the one view, against the kind named in the other, has log K
    nats. What is left of a view without its kind's colour is nothing, or noise that its other view does not have."""
    kinds = 64
    folder = write(tmp_path / "planted", kinds, 3 * kinds)
    first, second, kind = views_of(folder, "--augmentation", augmentation, *COLOURS_LEFT_ALONE)
    assert kind.bincount().tolist() == [3] * kinds  # equally frequent
    means = torch.stack([first[kind == each].mean(dim=(0, 2, 3)) for each in range(kinds)])  # a colour each
    named = [torch.cdist(view.mean(dim=(2, 3)), means).argmin(dim=1) for view in (first, second)]
    joint = np.histogram2d(*named, bins=kinds)[0] / len(kind)
    independent = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0)
    nats = (joint[joint > 0] * np.log(joint[joint > 0] / independent[joint > 0])).sum()
    assert nats == pytest.approx(math.log(kinds), abs=1e-9)

    a, b = ((view - means[kind][:, :, None, None]).flatten(1).double() for view in (first, second))
    if augmentation == "small":
        assert a.std().item() == pytest.approx(0.03, abs=0.001)
        products = (a * b).mean(dim=1) / 0.03**2
        assert products.abs().max() < 5 / math.sqrt(a.shape[1])  # of independent noise: 0 up to 1 / sqrt(pixels)
    else:
        assert max(a.abs().max(), b.abs().max()) < 1e-5


def test_images_of_a_kind_are_equal_files_and_kinds_differ(tmp_path):
    folder = write(tmp_path / "planted", kinds=9, images=90)
    for split, count in (("train", 10), ("val", 1)):
        images = open_folder(str(folder), split)
        assert np.bincount(images.labels).tolist() == [count] * 9
        pixels = torch.stack([images.load(i) for i in range(len(images))])
        assert len(pixels.flatten(1).unique(dim=0)) == 9 and len(pixels.flatten(2).unique(dim=2)[0, 0]) == 1
        for each in range(9):
            assert len(pixels[torch.from_numpy(images.labels == each)].flatten(1).unique(dim=0)) == 1


def test_the_seed_chooses_the_colours_and_at_k_4096_they_are_16_levels_apart():
    assert not np.array_equal(planted.colours(16, 0), planted.colours(16, 1))
    np.testing.assert_array_equal(planted.colours(16, 1), planted.colours(16, 1))
    for kinds, apart in ((2, 255), (8, 255), (27, 127), (64, 85), (4096, 17)):
        found = planted.colours(kinds, 0).astype(int)
        distances = np.abs(found[:64, None] - found[None]).max(axis=2)
        assert distances[distances > 0].min() >= apart and (distances == 0).sum() == min(64, kinds)


def test_the_same_settings_keep_the_folder_and_others_are_refused(tmp_path, capsys):
    folder = write(tmp_path / "new" / "planted", kinds=4, images=40)
    assert (
        "written; 4 kinds, log 4 = 1.3863 nats; 10 images of 16 px of each kind in train/, 1" in capsys.readouterr().out
    )
    (folder / "train" / "kind0000" / "000000.png").unlink()
    write(folder, kinds=4, images=40)
    assert "kept as it is" in capsys.readouterr().out
    (tmp_path / "mine").mkdir()
    for what, kinds, images, said in (
        (folder, 4, 80, "holds"),
        (tmp_path / "mine", 4, 40, "exists, without a planted.json"),
        (tmp_path / "odd", 4, 42, "--images 42: expected a multiple of --kinds 4"),
    ):
        with pytest.raises(SystemExit):
            write(what, kinds, images)
        assert said in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "new"]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["planted"]


def test_of_two_that_write_one_folder_at_once_both_end_well(tmp_path, monkeypatch, capsys):
    """As two cells of one experiment do: the second is whole before the first is."""
    folder, write_kinds = tmp_path / "planted", planted.write_kinds
    words = ["--kinds", "2", "--images", "20", "--img_size", "4", str(folder)]

    def second_ends_first(*args, **settings):
        monkeypatch.setattr(planted, "write_kinds", write_kinds)
        planted.main(words)
        write_kinds(*args, **settings)

    monkeypatch.setattr(planted, "write_kinds", second_ends_first)
    planted.main(words)
    first, second = capsys.readouterr().out.splitlines()
    assert ": written;" in first and ": kept as it is, of the same settings;" in second
    assert sum(1 for _ in folder.glob("train/*/*.png")) == 20 and os.listdir(tmp_path) == ["planted"]


def test_what_fails_halfway_leaves_nothing(tmp_path, monkeypatch, capsys):
    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(planted, "flat_png", fail)
    with pytest.raises(SystemExit):
        write(tmp_path / "planted", kinds=4, images=40)
    assert "cannot be written (No space left on device)" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_it_starts_as_a_file_too():
    command = [sys.executable, str(ROOT / "experiments" / "planted.py"), "--help"]
    assert "--kinds" in subprocess.run(command, cwd="/", capture_output=True, text=True, check=True).stdout
