"""Images of any number of channels, from files to a run, its evaluations and its export; --mean auto; --rotate90."""

import copy
import dataclasses
import json

import numpy as np
import pytest
import tifffile
import torch

import augmentation
import data
import eval_knn
import eval_linear
import export_backbone
import main_cplearn
from backbones import build_backbone
from checkpoint import load_checkpoint
from images import ArrayImages, open_dataset
from images.levels import fill_in_levels, measure
from monitor import as_picture, plot_views, read_log
from pictures import folder_args, make_args, photographs, picture, write
from pretrained import load_pretrained
from runs import assert_same_checkpoint, logged, stopping_at
from utils import UserError

NOTHING = ("--flip", 0, "--jitter", 0, "--grayscale", 0, "--blur", 0, "--solarize", 0)


def write_fields(root, count=24, size=24):
    """root/train and root/val: signed 16-bit TIFFs of 5 pages, -2000 to 3000, in 2 classes that differ in one."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for number in range(count):
            field = rng.integers(-2000, 1500, (5, size, size + number % 3)).astype(np.int16)
            field[3] += 100 * (number % 2)
            path = root / split / f"class{number % 2}" / f"{number:02d}.tif"
            path.parent.mkdir(parents=True, exist_ok=True)
            tifffile.imwrite(path, field, photometric="minisblack", compression="zlib" if number % 2 else None)
    return root


@pytest.fixture(scope="module")
def fields(tmp_path_factory):
    return write_fields(tmp_path_factory.mktemp("fields"))


def recipe_of(*flags):
    return augmentation.make_recipe(make_args("--dataset", "imagefolder", *flags))


# Whole runs


def run(fields, output_dir, **changes):
    values = {
        "dataset": "imagefolder", "data_path": fields, "in_chans": 5, "img_size": 32, "arch": "vit_mini",
        "patch_size": 8, "mean": "auto", "std": "auto", "out_dim": 64, "batch_size_per_gpu": 8, "epochs": 2,
        "warmup_epochs": 0, "precision": "fp32", "device": "cpu", "num_workers": 0, "knn_every": 2, "log_every": 2,
        "saveckp_freq": 0, "drop_path_rate": 0, "output_dir": output_dir,
    } | changes  # fmt: skip
    words = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    main_cplearn.main([*words, "--value_range", "-2000", "3000", "--rotate90", "--no-compile"])


def test_signed_images_of_5_channels_train_resume_evaluate_and_export(fields, tmp_path, capsys):
    run(fields, tmp_path / "whole")
    said = capsys.readouterr()
    assert "turns by 90 degrees 0.75, brightness and contrast of each channel 0.8, blur 1/0.1;" in said.out
    assert "channels: 5 of float32" in said.out
    assert "measured on 24 of 24 images: --mean 0." in said.err
    with stopping_at(4):
        run(fields, tmp_path / "cut")
    run(fields, tmp_path / "cut", num_workers=2)
    assert_same_checkpoint(tmp_path / "whole" / "checkpoint.pth", tmp_path / "cut" / "checkpoint.pth")
    assert logged(tmp_path / "whole") == logged(tmp_path / "cut")

    path = tmp_path / "whole" / "checkpoint.pth"
    saved, settings = load_checkpoint(path)["args"], load_pretrained(path).settings
    mean, std = of_numpy(fields / "train")
    assert np.allclose(saved["mean"], mean, rtol=0, atol=1e-7) and np.allclose(saved["std"], std, rtol=0, atol=1e-7)
    assert settings["mean"] == saved["mean"] and settings["value_range"] == [-2000, 3000]
    common = ["--checkpoint", str(path), "--data_path", str(fields), "--device", "cpu", "--num_workers", "0"]
    eval_knn.main([*common, "--output_dir", str(tmp_path / "knn"), "--nb_knn", "20", "--baselines"])
    linear = ["--output_dir", str(tmp_path / "linear"), "--epochs", "1", "--lrs", "0.1", "--weight_decays", "0"]
    eval_linear.main([*common, *linear])
    rows = json.loads((tmp_path / "knn" / "results_knn.json").read_text())["rows"]
    in_training = read_log(tmp_path / "whole" / "log.txt")[-1]["knn_top1"]
    assert [row["top1"] for row in rows if row["checkpoint"] == str(path)] == pytest.approx([in_training])
    assert (tmp_path / "linear" / "results_linear.json").exists()
    export_backbone.main(["--checkpoint", str(path), "--output_dir", str(tmp_path / "out"), "--device", "cpu"])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["pretrained_cfg"]["input_size"] == [5, 32, 32]
    x = torch.randn(2, 5, 32, 32)
    assert torch.equal(load_pretrained(tmp_path / "out" / "model.safetensors")(x), load_pretrained(path)(x))


def of_numpy(folder):
    """Mean and std of each channel on [0, 1], in float64, each image alike."""
    found = [tifffile.imread(path) for path in sorted(folder.rglob("*.tif"))]
    found = [(field.astype(np.float64).reshape(5, -1) + 2000) / 5000 for field in found]
    mean = np.mean([field.mean(axis=1) for field in found], axis=0)
    squares = np.mean([(field**2).mean(axis=1) for field in found], axis=0)
    return mean, np.sqrt(squares - mean**2)


@pytest.mark.parametrize("arch", ["vit_mini", "resnet8", "resnet18", "convnext_atto", "vit_tiny_patch16_224"])
@pytest.mark.parametrize("channels", [2, 5])
def test_backbones_take_any_number_of_channels(arch, channels):
    size = 224 if arch.startswith("vit_tiny_") else 32
    backbone = build_backbone(arch, size, 8, in_chans=channels).eval()
    assert backbone(torch.zeros(1, channels, size, size)).shape == (1, backbone.embed_dim)


def test_evaluations_see_every_level(fields):
    """Of the middle of an image that need not be resized: numpy's formula."""
    args = folder_args(fields, "--in_chans", 5, "--value_range", -2000, 3000, "--mean", *[0.5] * 5, "--std", *[0.2] * 5)
    images = open_dataset(args, "val")
    _, x = next(data.eval_batches(images, 21, 5, args.mean, args.std, batch_size=2))  # 21 * 256 / 224 = 24
    field = tifffile.imread(images.name(0)).astype(np.float64)
    height, width = (side // 2 for side in field.shape[1:])
    expected = ((field[:, height - 10 : height + 10, width - 10 : width + 10] + 2000) / 5000 - 0.5) / 0.2
    assert images.channels == 5 and x.dtype == torch.float32
    places = [(a, b) for a in (0, 1) for b in (0, 1)]  # the crop's corner lies at half a pixel, or does not
    assert min(np.abs(x[0, :, a : a + 20, b : b + 20].numpy() - expected).max() for a, b in places) < 1e-5


def test_training_sees_every_level(fields):
    levels = ("--mean", *[0.5] * 5, "--std", *[0.2] * 5)
    for more, kind in (((), torch.float32), (("--no-float_pixels",), torch.uint8)):
        args = folder_args(fields, "--in_chans", 5, "--value_range", -2000, 3000, *levels, *more)
        batch = next(iter(data.TrainLoader(open_dataset(args), args, batch_size=4).epoch(0)))
        assert [crops.dtype for crops in batch.crops] == [kind] and batch.bad == {}
        assert torch.equal(batch.crops[0], batch.crops[0].round()) == (kind == torch.uint8)


# Views


def views_of(recipe, images):
    """(2, n, C, h, w) on [0, 1]: two views, all of whose crops are the whole image."""
    recipe = dataclasses.replace(recipe, mean=(0,) * recipe.in_chans, std=(1,) * recipe.in_chans)
    crops = [images.repeat(2, 1, 1, 1)]
    return torch.stack(augmentation.make_views(recipe, 0, np.arange(len(images)), "cpu", crops=crops))


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_rotate90_is_torchs_rot90(channels):
    recipe = recipe_of("--in_chans", channels, "--img_size", 32, "--rotate90", *NOTHING)
    images = torch.randint(256, (48, channels, 32, 32), dtype=torch.uint8)
    turns = [0] * 4
    for view in views_of(recipe, images):
        for image, seen in zip(images.float() / 255, view, strict=True):
            (turn,) = [k for k in range(4) if torch.equal(seen, torch.rot90(image, k, (1, 2)))]
            turns[turn] += 1
    assert min(turns) > 10


def test_rotations_leave_all_other_draws_as_they_are():
    flags = ("--dataset", "cifar10", "--augmentation", "dino", "--flip", 0, "--blur", 0)
    images = photographs()[:16]
    recipe = augmentation.make_recipe(make_args(*flags))
    plain, turned = (
        torch.stack(augmentation.make_views(which, 0, np.arange(16), "cpu", images))
        for which in (recipe, dataclasses.replace(recipe, rotate90=True))
    )
    for one, other in zip(plain.flatten(0, 1), turned.flatten(0, 1), strict=True):
        assert min((torch.rot90(one, k, (1, 2)) - other).abs().max() for k in range(4)) < 1e-5  # means in other orders


def test_brightness_and_contrast_of_each_channel_by_hand():
    """Formulas of torchvision's functions for one gray image, in float64, with the factors that were drawn."""
    recipe = recipe_of("--in_chans", 5, "--img_size", 32, *NOTHING, "--jitter", 1)
    images = torch.randint(256, (24, 5, 32, 32), dtype=torch.uint8)
    draws = augmentation.view_draws(recipe, 0, np.arange(24), (0,))
    assert draws.shape == (24, augmentation.NUM_DRAWS + 10)
    factors = 0.6 + 0.8 * draws[:, augmentation.NUM_DRAWS :]
    assert len(np.unique(factors)) == 240
    for n, seen in enumerate(views_of(recipe, images)[0]):
        for channel in range(5):
            x = images[n, channel].double().numpy() / 255
            brightness, contrast = factors[n, channel], factors[n, 5 + channel]
            for operation in ("bc", "cb")[int(2 * draws[n, augmentation.ORDER])]:
                x = brightness * x if operation == "b" else contrast * x + (1 - contrast) * x.mean()
                x = x.clip(0, 1)
            assert np.abs(seen[channel].numpy() - x).max() < 1e-5


def test_colours_are_changed_of_3_channels_only():
    flags = ("--img_size", 32, "--flip", 0, "--jitter", 0, "--blur", 0, "--grayscale", 1, "--solarize", 1)
    images = torch.randint(256, (8, 5, 32, 32), dtype=torch.uint8)
    recipe = recipe_of("--in_chans", 5, *flags)
    assert torch.equal(views_of(recipe, images)[0], images / 255)
    assert recipe.describe(5) == "views: crops; channels: 5"
    colour = recipe_of("--in_chans", 3, *flags)
    assert not torch.equal(views_of(colour, images[:, :3])[0], images[:, :3] / 255)
    assert colour.describe(3) == "views: crops, grayscale 1, solarisation 1/1; channels: 3"
    assert colour.describe(1) == "views: crops, solarisation 1/1; channels: 1"


def test_crops_of_floats_are_those_of_bytes_before_rounding(fields):
    image = torch.from_numpy(picture(40, 56)).permute(2, 0, 1).contiguous()
    recipe = recipe_of("--img_size", 32)
    draws = augmentation.view_draws(recipe, 0, [0, 1, 2], (0,))
    both = (augmentation.crop_image(x, draws, recipe.global_views, recipe) for x in (image, image.float()))
    for whole, exact in zip(*both, strict=True):
        assert exact.dtype == torch.float32 and not torch.equal(exact, exact.round())
        assert (whole - exact).abs().max() < 1.6  # bytes are rounded after each axis, their weights to 1/2^k
    black_and_white = 255.0 * (torch.rand(1, 20, 20) > 0.5)
    resized = augmentation.resize(black_and_white, (64, 64))
    assert resized.min() == 0 and resized.max() == 255  # where bicubic goes beyond


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_pictures_for_people_have_3_channels(tmp_path, channels):
    x = torch.rand(4, channels, 16, 16)
    shown = as_picture(x)
    assert shown.shape == (4, 3, 16, 16) and torch.equal(shown[:, 0], x[:, 0])
    assert torch.equal(shown[:, 2], x[:, 2 if channels > 2 else 0])
    plot_views([x, x], (0.5,) * channels, (0.2,) * channels, tmp_path / "views.png")


# Mean and std


def test_measured_levels_are_numpys(fields):
    args = folder_args(fields, "--in_chans", 5, "--value_range", -2000, 3000)
    assert args.mean == args.std == ["auto"]
    mean, std, count, bad = measure(open_dataset(args), 5)
    expected = of_numpy(fields / "train")
    assert (count, bad) == (24, 0)
    assert np.abs(np.array([mean, std]) - expected).max() < 1e-7  # levels are float32
    pixels = photographs()
    mean, std, *_ = measure(ArrayImages("some", pixels), 3)
    flat = pixels.permute(1, 0, 2, 3).reshape(3, -1).numpy() / 255
    assert np.abs(np.array([mean, std]) - [flat.mean(1), flat.std(1)]).max() < 1e-12


def test_a_sample_is_spread_over_the_set_and_bad_images_are_counted(tmp_path):
    for number in range(10):
        write(tmp_path / f"{number}.png", np.full((4, 4, 3), 10 * number, np.uint8))
    (tmp_path / "9.png").write_bytes(b"no image")
    images = open_dataset(folder_args(tmp_path))
    mean, _, count, bad = measure(images, 3, most=4)  # 0, 3, 6, 9
    assert (count, bad) == (3, 1) and mean == pytest.approx([30 / 255] * 3)


def test_auto_gives_way_to_a_checkpoints_numbers_and_is_said(tmp_path, capsys):
    write(tmp_path / "a.png", picture(8, 8))
    args = folder_args(tmp_path, "--mean", "auto", "--std", 0.2, 0.2, 0.2)
    images = open_dataset(args)
    resumed = copy.copy(args)
    fill_in_levels(resumed, images, {"args": {"mean": [0.1, 0.2, 0.3], "std": [0.4] * 3}})
    assert resumed.mean == (0.1, 0.2, 0.3) and tuple(resumed.std) == (0.2, 0.2, 0.2)
    fill_in_levels(args, images)
    assert args.mean == pytest.approx(picture(8, 8).mean((0, 1)) / 255)
    assert f"measured on 1 of 1 images: --mean {args.mean[0]:.4f} " in capsys.readouterr().err


def test_auto_where_it_has_no_meaning_is_one_line(tmp_path):
    write(tmp_path / "a.png", np.full((4, 4, 3), 51, np.uint8))
    args = folder_args(tmp_path, "--std", "auto")
    with pytest.raises(UserError, match=r"--std auto: channel 1 of 3 is 0.2 in all"):
        fill_in_levels(args, open_dataset(args))
    with pytest.raises(UserError, match="--mean auto: stands alone, and in training"):
        make_args("--mean", "auto", 0.5, 0.5, "--in_chans", 3)
    args = eval_knn.get_args_parser().parse_args(["--checkpoint", "x", "--dataset", "cifar10", "--mean", "auto"])
    with pytest.raises(UserError, match="--mean auto: stands alone, and in training"):
        data.resolve_dataset_defaults(args)
