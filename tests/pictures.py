"""What the tests of data.py and augmentation.py share: flags, loaders, small pictures and files of them."""

import numpy as np
import scipy.ndimage
import torch
from PIL import Image

import augmentation
import data
from images import ArrayImages
from utils import ArgumentParser


def make_args(*flags, **changes):
    parser = ArgumentParser("test.py", "")
    parser.add_argument("--patch_size", type=int, default=16)  # backbones.py's
    data.add_dataset_arguments(parser)
    data.add_loader_arguments(parser)
    augmentation.add_augmentation_arguments(parser)
    args = parser.parse_args([str(flag) for flag in flags])
    vars(args).update(seed=0, **changes)
    return data.resolve_dataset_defaults(args)


def folder_args(path, *flags):
    return make_args("--dataset", "imagefolder", "--data_path", path, "--img_size", 32, "--num_workers", 0, *flags)


def array_loader(images, *flags, batch_size=16, **options):
    args = make_args("--dataset", "cifar10", *flags)
    return data.TrainLoader(ArrayImages("some", images), args, batch_size, **options)


def photographs():
    """uint8 (64, 3, 32, 32)"""
    return torch.stack([torch.from_numpy(picture(32, 32, seed=seed)).permute(2, 0, 1) for seed in range(64)])


def but_what_was_opened(said):
    """The lines of stderr that do not say which images were opened, and what values they hold."""
    lines = [line for line in said.splitlines(keepends=True) if not line.startswith(("train: ", "val: "))]
    return "".join(line for line in lines if " images looked at have " not in line)


def write_class_folders(root):
    """Three classes of 8, 9, 10 JPEGs of various sizes. Returns root."""
    for label, name in enumerate(("ant", "bee", "cat")):
        for number in range(8 + label):
            write(root / name / f"{number}.jpg", picture(40 + number, 60 - 2 * number, seed=10 * label + number))
    return root


def write(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def picture(height, width, channels=3, seed=0):
    """Smooth and colourful, like a photograph: uint8 (height, width, channels), or (height, width) for one channel."""
    noise = np.random.default_rng(seed).random((height, width, channels))
    smooth = scipy.ndimage.gaussian_filter(noise, (4, 4, 0), mode="wrap")
    smooth = (smooth - smooth.min()) / np.ptp(smooth)
    return np.rint(255 * smooth).astype(np.uint8).squeeze()
