"""Mean and standard deviation of a set's channels, measured: --mean auto, --std auto.

    fill_in_levels(args, images, earlier)                # args.mean and args.std are numbers from here on

Shapes: C channels, H x W px.
"""

import sys

import numpy as np
import torch.distributed as dist

import utils
from images.decoding import BadImage
from images.sets import evenly
from utils import UserError

AUTO = "auto"
SAMPLE = 1000  # images


def is_auto(values):
    return list(values) == [AUTO]


def fill_in_levels(args, images, earlier=None):
    """Puts numbers in args where --mean or --std is auto: the checkpoint's, from which the run goes on, or else the
    numbers of a sample of images, which the first process measures and says. All processes call it together."""
    asked = [name for name in ("mean", "std") if is_auto(getattr(args, name))]
    if not asked:
        return
    then = (earlier or {}).get("args", {})
    if all(len(then.get(name) or ()) == args.in_chans for name in asked):
        found = {name: tuple(then[name]) for name in asked}
    else:
        told = [utils.on_rank_zero(measure_and_say, images, args.in_chans, asked)]
        if utils.world_size() > 1:
            dist.broadcast_object_list(told)
        found = told[0]
    vars(args).update({name: found[name] for name in asked})


def measure_and_say(images, channels, asked):
    mean, std, count, bad = measure(images, channels)
    found = {"mean": mean, "std": std}
    words = " ".join(f"--{name} {' '.join(f'{value:.4f}' for value in found[name])}" for name in found)
    passed = f"; {bad} more cannot be read" if bad else ""
    print(f"measured on {count} of {len(images)} images: {words}{passed}", file=sys.stderr)
    if "std" in asked and min(std) <= 0:
        which = std.index(min(std))
        raise UserError(
            f"--std auto: channel {which + 1} of {channels} is {mean[which]:g} in all images looked at; give --std, or "
            "images without that channel"
        )
    return found


def measure(images, channels, most=SAMPLE):
    """(mean, std, images measured, images that cannot be read) of at most so many images, evenly spread over the set.

    mean, std: of levels on [0, 1], C each, in float64; each image counts alike, whatever its size, and each pixel
    of an image. Raises UserError where no image can be read."""
    means, variances, bad, reason = [], [], 0, None
    for index in evenly(len(images), most):
        try:
            levels = images.load(index, channels).numpy().reshape(channels, -1)
        except BadImage as error:
            bad, reason = bad + 1, f"{images.name(index)}: {error}"
            continue
        levels = levels.astype(np.float64) / 255
        means.append(levels.mean(axis=1))
        variances.append(levels.var(axis=1))
    if not means:
        raise UserError(f"--mean auto: none of {bad} images can be read, such as {reason}")
    std = np.sqrt(np.mean(variances, axis=0) + np.var(means, axis=0))
    return tuple(np.mean(means, axis=0).tolist()), tuple(std.tolist()), len(means), bad
