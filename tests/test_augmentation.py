"""augmentation.py against PIL, torchvision and scipy: draws, crops, colours, whole views."""

import dataclasses
import itertools
import random

import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
import torch
import torchvision
from PIL import Image, ImageFilter, ImageOps
from torchvision.transforms.v2 import functional as tv

import augmentation
import data
import pictures
from images import DATASETS, ArrayImages, open_dataset
from pictures import array_loader, folder_args, make_args, write_class_folders
from utils import UserError


@pytest.fixture(scope="module")
def photographs():
    return pictures.photographs()


# Random numbers


def test_scramble_is_splitmix64():
    # first outputs of the published generator for seed 1234567
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    states = np.uint64(1234567) + np.arange(1, 6, dtype=np.uint64) * augmentation.GOLDEN
    assert augmentation.scramble(states).tolist() == known
    assert splitmix(1234567) == known[0]


def test_uniform_known_answers_and_scalar_reference():
    mask, golden = (1 << 64) - 1, 0x9E3779B97F4A7C15
    for seed, epoch, index, view in ((0, 0, 0, 0), (1, 2, 3, 4), (2**40, 999, 1281166, 9)):
        word = 0
        for coordinate in (seed, epoch, index, view):
            word = splitmix((word + coordinate * golden) & mask)
        expected = [(splitmix((word + k * golden) & mask) >> 11) / 2**53 for k in range(5)]
        assert augmentation.uniform(seed, epoch, [index], view, 5)[0].tolist() == expected
    assert augmentation.uniform(0, 0, [0], 0, 2).tolist() == KNOWN_DRAWS


KNOWN_DRAWS = [[0.47141042966848024, 0.7247520786262142]]


def splitmix(state):
    """Reference in Python integers, from the published C code."""
    mask = (1 << 64) - 1
    state = (state + 0x9E3779B97F4A7C15) & mask
    z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def test_uniform_is_uniform_and_coordinates_do_not_share_draws():
    u = augmentation.uniform(3, 5, np.arange(20000), 1, 8)
    assert u.shape == (20000, 8) and u.min() >= 0 and u.max() < 1
    for column in u.T:
        assert scipy.stats.kstest(column, "uniform").pvalue > 1e-3
    others = [augmentation.uniform(*key, 8) for key in ((4, 5, np.arange(20000), 1), (3, 6, np.arange(20000), 1))]
    others += [
        augmentation.uniform(3, 5, np.arange(20000), 2, 8),
        augmentation.uniform(3, 5, np.arange(1, 20001), 1, 8),
    ]
    for other in [*others, np.roll(u, 1, axis=1)]:
        assert abs(np.corrcoef(u.ravel(), other.ravel())[0, 1]) < 0.01
    assert np.array_equal(u[:, :3], augmentation.uniform(3, 5, np.arange(20000), 1, 3))


# Crops


@pytest.mark.parametrize(
    ("height", "width", "scale"), [(300, 500, (0.4, 1.0)), (32, 32, (0.4, 1.0)), (40, 400, (0.05, 0.4))]
)
def test_crop_boxes_are_distributed_as_torchvisions(height, width, scale):
    count = 4000
    draws = augmentation.uniform(0, 0, np.arange(count), 0, augmentation.NUM_DRAWS)
    ours = augmentation.resized_crop_boxes(draws, height, width, scale)
    torch.manual_seed(0)
    image = torch.empty(1, height, width)
    get_params = torchvision.transforms.RandomResizedCrop.get_params
    theirs = np.array([get_params(image, scale, (3 / 4, 4 / 3)) for _ in range(count)])
    assert (ours[:, :2] >= 0).all() and (ours[:, :2] + ours[:, 2:] <= (height, width)).all() and (ours[:, 2:] > 0).all()
    statistics = [lambda b: b[:, 0], lambda b: b[:, 1], lambda b: b[:, 2], lambda b: b[:, 3]]
    statistics += [lambda b: b[:, 2] * b[:, 3], lambda b: b[:, 2] / b[:, 3]]
    statistics += [lambda b: b[:, 0] + b[:, 2], lambda b: b[:, 1] + b[:, 3]]
    for statistic in statistics:
        assert scipy.stats.ks_2samp(statistic(ours), statistic(theirs)).pvalue > 1e-3


@pytest.mark.parametrize(("height", "width"), [(10, 400), (400, 10), (1, 1)])
def test_fallback_box_is_torchvisions(height, width):
    draws = np.zeros((1, augmentation.NUM_DRAWS))
    draws[:, augmentation.AREA] = 1 - 1e-9  # the whole area in a shape that does not fit
    expected = torchvision.transforms.RandomResizedCrop.get_params(
        torch.empty(1, height, width), (1, 1), (3 / 4, 4 / 3)
    )
    assert augmentation.resized_crop_boxes(draws, height, width, (1.0, 1.0)).tolist() == [list(expected)]


@pytest.mark.parametrize("size", [32, 12, 48])
def test_batched_crops_equal_torchvisions_resized_crop(photographs, size):
    loader = array_loader(photographs, "--augmentation", "dino", "--img_size", size)
    group = loader.recipe.global_views
    draws = augmentation.view_draws(loader.recipe, 0, np.arange(64), group.views)
    ours = augmentation.crop_batch(photographs, draws, group, loader.recipe)
    boxes = augmentation.resized_crop_boxes(draws, 32, 32, group.scale).tolist()
    flips = draws[:, augmentation.FLIP] < 0.5
    assert 40 < flips.sum() < 88
    differences = []
    for crop, image, box, flip in zip(ours, photographs.repeat(2, 1, 1, 1), boxes, flips, strict=True):
        expected = tv.resized_crop(image, *box, [size, size], tv.InterpolationMode.BICUBIC, antialias=True)
        differences.append((crop - (tv.horizontal_flip(expected) if flip else expected)).abs())
    differences = torch.stack(differences)  # torchvision's weights have 8 to 16 bits
    assert differences.max() <= 2 and (differences > 1).float().mean() < 1e-4 and differences.mean() < 0.01


def test_worker_crops_equal_torchvisions_and_pils_resized_crop(tmp_path):
    args = folder_args(write_class_folders(tmp_path), "--local_crops_number", 2, "--local_crops_size", 16)
    images = open_dataset(args)
    loader = data.TrainLoader(images, args, 4)
    batch = next(iter(loader.epoch(3)))
    assert [tuple(crops.shape) for crops in batch.crops] == [(8, 3, 32, 32), (8, 3, 16, 16)]
    views = [view for crops in batch.crops for view in crops.chunk(2)]
    for row, index in enumerate(batch.indices):
        image = images.load(index)
        for view, crop in enumerate(views):
            size, scale = (32, args.global_crops_scale) if view < 2 else (16, args.local_crops_scale)
            draws = augmentation.uniform(0, 3, [index], view, augmentation.NUM_DRAWS)
            top, left, h, w = augmentation.resized_crop_boxes(draws, *image.shape[1:], scale)[0].tolist()
            expected = tv.resized_crop(image, top, left, h, w, [size] * 2, tv.InterpolationMode.BICUBIC, antialias=True)
            pil = Image.fromarray(image.permute(1, 2, 0).numpy()).crop((left, top, left + w, top + h))
            pil = pil.resize((size, size), Image.Resampling.BICUBIC)
            if draws[0, augmentation.FLIP] < 0.5:
                expected, pil = tv.horizontal_flip(expected), ImageOps.mirror(pil)
            assert torch.equal(crop[row], expected)
            assert np.abs(crop[row].permute(1, 2, 0).numpy().astype(int) - np.asarray(pil)).max() <= 1


@pytest.mark.parametrize("side", [32, 20])
def test_small_recipe_shifts_the_mirrored_image(side, photographs, tmp_path):
    """In memory and in workers alike; an image smaller than --img_size is enlarged first."""
    photographs = photographs[:, :, :side, :side]
    loader = array_loader(photographs, "--augmentation", "small", "--img_size", 32)
    group = loader.recipe.global_views
    draws = augmentation.view_draws(loader.recipe, 0, np.arange(64), group.views)
    ours = augmentation.crop_batch(photographs, draws, group, loader.recipe)
    seen = set()
    for n, (crop, image, draw) in enumerate(zip(ours, photographs.repeat(2, 1, 1, 1), draws, strict=True)):
        enlarged = tv.resize(image, [32, 32], tv.InterpolationMode.BICUBIC, antialias=True)
        padded = np.pad(enlarged.numpy(), ((0, 0), (4, 4), (4, 4)), mode="reflect")
        top, left = int(draw[augmentation.TOP] * 9), int(draw[augmentation.LEFT] * 9)
        expected = padded[:, top : top + 32, left : left + 32]
        expected = expected[:, :, ::-1] if draw[augmentation.FLIP] < 0.5 else expected
        assert np.abs(crop.numpy() - expected).max() <= 2 * (side != 32)
        worker = next(augmentation.crop_image(image, draws[n : n + 1], group, loader.recipe))
        assert np.array_equal(worker.numpy(), expected)
        seen |= {top, left}
    assert seen == set(range(9))


def test_small_recipe_crops_images_that_are_larger(photographs):
    loader = array_loader(photographs, "--augmentation", "small", "--img_size", 16)
    group = loader.recipe.global_views
    draws = augmentation.view_draws(loader.recipe, 0, np.arange(64), group.views)
    dino = dataclasses.replace(group, pad_crop=False)
    assert torch.equal(
        augmentation.crop_batch(photographs, draws, group, loader.recipe),
        augmentation.crop_batch(photographs, draws, dino, loader.recipe),
    )


def test_svhn_is_never_flipped():
    for recipe in ("small", "dino"):
        assert augmentation.make_recipe(make_args("--dataset", "svhn", "--augmentation", recipe)).flip == 0
        assert augmentation.make_recipe(make_args("--dataset", "cifar10", "--augmentation", recipe)).flip == 0.5


# Colours


@pytest.mark.parametrize(
    ("ours", "theirs", "factors"),
    [
        (augmentation.adjust_brightness, tv.adjust_brightness, (0.6, 1.0, 1.4)),
        (augmentation.adjust_contrast, tv.adjust_contrast, (0.6, 1.0, 1.4)),
        (augmentation.adjust_saturation, tv.adjust_saturation, (0.8, 1.0, 1.2)),
        (augmentation.adjust_hue, tv.adjust_hue, (-0.1, 0.0, 0.1, 0.5)),
    ],
)
def test_colour_operations_are_torchvisions(photographs, ours, theirs, factors):
    x = torch.rand(len(factors), 3, 16, 16)
    x[:, :, 0] = x[:, :1, 0]  # gray pixels have no hue
    x[:, :, 1, :2] = torch.tensor([0.0, 1.0])
    expected = torch.stack([theirs(image, factor) for image, factor in zip(x, factors, strict=True)])
    result = ours(x.clone(), torch.tensor(factors)[:, None, None, None])
    assert (result - expected).abs().max() < 1e-3  # torchvision rounds the weights of luma to 4 digits
    neutral = factors.index(0.0 if 0.0 in factors else 1.0)
    torch.testing.assert_close(result[neutral], x[neutral])


def test_grayscale_and_solarize_are_torchvisions():
    x = torch.rand(4, 3, 16, 16)
    assert (augmentation.grayscale(x) - tv.rgb_to_grayscale(x, 3)).abs().max() < 1e-3
    assert torch.equal(augmentation.solarize(x), tv.solarize(x, augmentation.SOLARIZE_THRESHOLD))
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    pil = np.asarray(ImageOps.solarize(Image.fromarray(levels[0, 0].numpy())))
    assert np.array_equal((augmentation.solarize(levels / 255) * 255).round()[0, 0].numpy(), pil)


@pytest.mark.parametrize("shape", [(28, 28), (12, 40), (6, 6)])
def test_blur_is_scipys_gaussian(shape):
    x = torch.rand(5, 2, *shape)
    sigma = torch.tensor([0.1, 0.5, 1.0, 1.5, 2.0])
    result = augmentation.gaussian_blur(x, sigma[:, None, None, None])
    for image, blurred, s in zip(x, result, sigma.tolist(), strict=True):
        for channel, out in zip(image, blurred, strict=True):
            expected = scipy.ndimage.gaussian_filter(channel.double().numpy(), s, mode="nearest", radius=8)
            assert np.abs(out.numpy() - expected).max() < 1e-5


@pytest.mark.parametrize(("size", "most"), [(224, 2), (96, 2), (48, 1), (12, 0.25)])
def test_blur_is_dinos_from_96_px_on_and_the_same_share_of_smaller_crops(size, most):
    """Of a point: what it becomes has sigma's variance."""
    args = make_args("--dataset", "cifar10", "--augmentation", "dino", "--img_size", size, "--jitter", 0)
    recipe = augmentation.make_recipe(args)
    draws = np.full((2, augmentation.NUM_DRAWS), 0.5)
    draws[:, augmentation.SIGMA] = (0, 1 - 1e-9)
    draws[:, augmentation.BLUR] = 0
    x = torch.zeros(2, 1, size, size)
    x[:, :, size // 2, size // 2] = 0.5
    blurred = augmentation.photometric(x, draws, dataclasses.replace(recipe.global_views, views=(0,)), recipe)
    offset = torch.arange(size) - size // 2
    variance = (blurred.sum((1, 2)) / 0.5 * offset**2).sum(1)
    expected = torch.exp(-0.5 * (offset / most) ** 2)
    assert variance[0] < 1e-6  # a tenth of a pixel, or less, leaves the point where it is
    assert abs(variance[1] - (expected * offset**2).sum() / expected.sum()) < 2e-3


def test_jitter_equals_torchvision_with_the_same_order_and_factors(photographs):
    x = photographs[:48] / 255
    draws = augmentation.uniform(0, 0, np.arange(48), 0, augmentation.NUM_DRAWS)
    draws[:, augmentation.ORDER] = (np.arange(48) % 24 + 0.5) / 24  # every order twice
    chosen = np.arange(48) % 5 > 0
    result = x.clone()
    augmentation.change(result, augmentation.color_jitter(draws, chosen, (0.4, 0.4, 0.2, 0.1), channels=3))
    operations = [tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue]
    orders = list(itertools.permutations(range(4)))
    for n in range(48):
        b, c, s, h = draws[
            n, [augmentation.BRIGHTNESS, augmentation.CONTRAST, augmentation.SATURATION, augmentation.HUE]
        ]
        factors = (0.6 + 0.8 * b, 0.6 + 0.8 * c, 0.8 + 0.4 * s, -0.1 + 0.2 * h)
        expected = x[n]
        for number in orders[n % 24] if chosen[n] else ():
            expected = operations[number](expected, factors[number])
        assert (result[n] - expected).abs().max() < 2e-3, n


# Views


def test_whole_chain_has_dinos_distribution(photographs):
    """1000 views of one image, by DINO's own transforms on PIL images and by ours: the same in five statistics."""
    count, mean, std = 1000, DATASETS["cifar10"]["mean"], DATASETS["cifar10"]["std"]
    image = photographs[5]
    pil = Image.fromarray(image.permute(1, 2, 0).numpy())
    t, bicubic = torchvision.transforms, torchvision.transforms.InterpolationMode.BICUBIC
    blur = t.Lambda(lambda x: x.filter(ImageFilter.GaussianBlur(float(torch.empty(1).uniform_(0.1, 2.0)) * 32 / 96)))
    first = [t.RandomResizedCrop(32, (0.4, 1.0), interpolation=bicubic), t.RandomHorizontalFlip()]
    first += [t.RandomApply([t.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8), t.RandomGrayscale(0.2)]
    last = [t.ToTensor(), t.Normalize(mean, std)]
    theirs = [t.Compose([*first, blur, *last])]
    theirs += [t.Compose([*first, t.RandomApply([blur], 0.1), t.RandomSolarize(128, 0.2), *last])]
    torch.manual_seed(0)
    loader = array_loader(image.expand(count, -1, -1, -1), "--augmentation", "dino", batch_size=count)
    ours = loader.augment(next(iter(loader.epoch(0))), "cpu")
    statistics = [
        lambda x: x.mean((1, 2, 3)),  # brightness
        lambda x: x.std((2, 3)).mean(1),  # contrast
        lambda x: x.std(1).mean((1, 2)),  # colour
        lambda x: x[:, 0].mean((1, 2)) - x[:, 2].mean((1, 2)),  # hue
        lambda x: x[..., 1:].sub(x[..., :-1]).abs().mean((1, 2, 3)),  # sharpness
    ]
    for view, transform in zip(ours, theirs, strict=True):
        expected = torch.stack([transform(pil) for _ in range(count)])
        for statistic in statistics:
            assert scipy.stats.ks_2samp(statistic(view).numpy(), statistic(expected).numpy()).pvalue > 1e-3


def test_shares_of_a_recipe():
    """How often each operation is drawn, from what changes in constant images with one known colour."""
    count = 2500
    colour = torch.tensor([200, 100, 60], dtype=torch.uint8)[:, None, None].expand(count, 3, 8, 8)
    for name, gray, jitter in (("dino", 0.2, 0.8), ("small", 0.1, 0.1), ("cifar", 0.2, 0.8)):
        flags = ("--img_size", 8, "--mean", 0, 0, 0, "--std", 1, 1, 1, "--augmentation", name)
        loader = array_loader(colour, *flags, batch_size=count)
        object.__setattr__(loader.recipe, "noise_std", 0.0)
        views = loader.augment(next(iter(loader.epoch(0))), "cpu")
        pixels = views[0][:, :, 0, 0]
        is_gray = (pixels.amax(1) - pixels.amin(1)) < 1e-6
        unchanged = (pixels * 255 - colour[0, :, 0, 0]).abs().amax(1) < 1e-2
        assert abs(is_gray.float().mean() - gray) < 0.02
        assert abs(unchanged.float().mean() - (1 - gray) * (1 - jitter)) < 0.025
    assert not torch.equal(views[0], views[1])


def test_presets_and_the_flags_that_change_them():
    def recipe(*flags):
        return augmentation.make_recipe(make_args("--dataset", "cifar10", *flags))

    cifar, dino = recipe("--augmentation", "cifar"), recipe("--augmentation", "dino")
    expected = {"flip": 0.5, "jitter": 0.8, "jitter_strength": (0.4, 0.4, 0.4, 0.1), "grayscale": 0.2, "noise_std": 0}
    expected |= {"blur": (0, 0, 0), "solarize": (0, 0, 0)}
    assert {name: getattr(cifar, name) for name in expected} == expected
    assert not cifar.global_views.pad_crop and cifar.global_views.scale == (0.2, 1)
    assert dino.blur == (1, 0.1, 0.5) and dino.solarize == (0, 0.2, 0) and dino.global_views.scale == (0.4, 1)
    assert recipe("--augmentation", "cifar", "--global_crops_scale", 0.4, 1).global_views.scale == (0.4, 1)
    for name in ("dino", "small", "cifar"):
        flags = ("--flip", 0, "--jitter", 0.3, "--grayscale", 1, "--blur", 0.25, "--solarize", 0.75)
        changed = recipe("--augmentation", name, *flags)
        assert (changed.flip, changed.jitter, changed.grayscale) == (0, 0.3, 1)
        assert changed.blur == (0.25,) * 3 and changed.solarize == (0.75,) * 3
        assert dataclasses.replace(
            recipe("--augmentation", name), flip=0, jitter=0.3, grayscale=1, blur=(0.25,) * 3, solarize=(0.75,) * 3
        ) == changed  # fmt: skip
    args = make_args("--dataset", "svhn", "--flip", 0.5)
    assert augmentation.make_recipe(args).flip == 0.5 and args.blur is None  # a checkpoint keeps what was typed


def test_noise_of_the_small_recipe():
    images = torch.full((256, 1, 28, 28), 100, dtype=torch.uint8)
    loader = data.TrainLoader(ArrayImages("gray", images), make_args(), 256)
    batch = next(iter(loader.epoch(0)))
    torch.manual_seed(0)
    view = loader.augment(batch, "cpu")[0]
    noise = view - view.mean((1, 2, 3), keepdim=True)
    assert abs(noise.std() - 0.03) < 5e-4 and scipy.stats.kstest(noise.ravel()[:5000] / 0.03, "norm").pvalue > 1e-3
    torch.manual_seed(0)
    assert torch.equal(loader.augment(batch, "cpu")[0], view)


def test_gray_images_for_three_channels_and_colour_images_for_one(photographs):
    gray = ArrayImages("gray", photographs[:, :1])
    one, three = (
        data.TrainLoader(gray, make_args("--in_chans", c, "--augmentation", "dino", "--img_size", 28), 16)
        for c in (1, 3)
    )
    batch = next(iter(one.epoch(0)))
    for a, b in zip(one.augment(batch, "cpu"), three.augment(batch, "cpu"), strict=True):
        assert a.shape == (16, 1, 28, 28) and torch.equal(a.expand(-1, 3, -1, -1), b)
    loader = array_loader(photographs, "--in_chans", 1)
    assert loader.augment(next(iter(loader.epoch(0))), "cpu")[1].shape == (16, 1, 32, 32)
    pil = np.stack([np.asarray(Image.fromarray(p.permute(1, 2, 0).numpy()).convert("L")) for p in photographs])
    assert np.abs(augmentation.match_channels(photographs, 1)[:, 0].numpy().astype(int) - pil).max() <= 1


def test_views_differ_and_change_with_seed_and_epoch(photographs):
    loader = array_loader(photographs, "--augmentation", "dino", "--local_crops_number", 3, batch_size=64)
    assert loader.num_views == 5
    batch = next(iter(loader.epoch(0)))
    views = loader.augment(batch, "cpu")
    assert [tuple(view.shape) for view in views] == [(64, 3, 32, 32)] * 2 + [(64, 3, 16, 16)] * 3
    assert all(view.dtype == torch.float32 and view.isfinite().all() for view in views)
    later = loader.augment(dataclasses.replace(batch, epoch=1), "cpu")
    assert (
        not torch.equal(views[0], views[1])
        and not torch.equal(views[0], later[0])
        and not torch.equal(views[2], views[3])
    )


def test_augmentation_does_not_touch_the_images_or_numpys_and_pythons_generators(photographs):
    copy, states = photographs.clone(), (np.random.get_state()[1].tolist(), random.getstate(), torch.get_rng_state())
    loader = array_loader(photographs, "--augmentation", "dino")
    for batch in loader.epoch(0):
        loader.augment(batch, "cpu")
    assert torch.equal(copy, photographs)
    assert np.random.get_state()[1].tolist() == states[0] and random.getstate() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("recipe", ["dino", "small"])
def test_augmentation_never_waits_for_the_gpu_and_equals_the_cpu(photographs, recipe):
    loader = array_loader(photographs, "--augmentation", recipe, "--local_crops_number", 2)
    object.__setattr__(loader.recipe, "noise_std", 0.0)
    batch = next(iter(loader.epoch(0)))
    torch.cuda.set_sync_debug_mode("error")
    try:
        views = loader.augment(batch, "cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for view, expected in zip(views, loader.augment(batch, "cpu"), strict=True):
        torch.testing.assert_close(view.cpu(), expected, atol=0.05, rtol=0)  # rounding to 255 levels may fall otherwise


# Flags


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--global_crops_scale", 0, 1), "--global_crops_scale 0: expected a number above 0"),
        (("--global_crops_scale", 0.5, 0.4), r"0\.5 0\.4"),
        (("--local_crops_scale", 0.5, 1.5), "local_crops_scale"),
        (("--local_crops_number", -1), "-1"),
        (("--local_crops_size", 0), "local_crops_size"),
        (("--img_size", 4), "too small"),
        (("--max_bad_images", 1.5), r"1\.5"),
        (("--blur", 1.5), "--blur 1.5: expected a number of at least 0 and of at most 1"),
        (("--flip", "nan"), "--flip nan"),
    ],
)
def test_values_without_meaning_are_one_line(flags, message):
    with pytest.raises(UserError, match=message) as error:
        make_args(*flags)
    assert "\n" not in str(error.value)
