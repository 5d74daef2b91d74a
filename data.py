"""Images in, batches out: loaders of training and evaluation, and the flags that say what the network is given.

    images = images.open_dataset(args)                   # names, labels if there are any, pixels on demand
    loader = TrainLoader(images, args, batch_size, rank, world_size, device=device)
    for batch in loader.epoch(epoch, first_step):        # levels 0..255, decoded and cropped by worker processes
        views = loader.augment(batch, device)            # V float32 tensors (B, C, h, w), normalised, on the device

    # each image exactly once
    for indices, x in eval_batches(images, img_size, in_chans, mean, std, batch_size, device=device):

How a view is made from an image is in augmentation.py. Nothing in either file has a generator with a past: the order of
an epoch is a function of (seed, epoch), the replacement of a bad file of (seed, epoch, image index).

Shapes: N images of a set, B of a batch (b where the last may be short), V views, C channels, H x W image, h x w crop.
"""

import argparse
import contextlib
import dataclasses
import itertools
import os

import numpy as np
import torch

from augmentation import (
    crop_image,
    make_recipe,
    make_views,
    match_channels,
    normalize,
    resize,
    resize_batch,
    resolve_augmentation_defaults,
    uniform,
    view_draws,
)
from images import DATASETS, BadImage, add_image_arguments
from images.levels import AUTO, is_auto
from images.workers import Workers
from utils import UNREADABLE, Number, UserError, leaves_at_once, number_of_environment


# Flags ----------------------------------------------------------------------------------------------------------------
class Level(Number):
    """argparse's `type=` of a brightness: a number in a range, on the scale where black is 0 and white 1; or auto."""

    def __call__(self, text):
        return AUTO if text == AUTO else super().__call__(text)

    def __str__(self):
        return f"auto, or {super().__str__()}, where black is 0 and white 1"


MEAN, STD = Level(float, least=0, most=1), Level(float, above=0, most=1)


def add_dataset_arguments(parser):
    """Adds the flags that say which images are read and in what form the network gets them.

    None stands for "depends on the data set", see `resolve_dataset_defaults`.
    """
    add_image_arguments(parser)
    add = parser.add_argument
    add(
        "--img_size",
        type=Number(int, least=1, most=2**15),
        default=None,
        help="side of the global crops in pixels; default 224 for imagefolder, else the data set's own. Lower it when "
        "your images are smaller; must suit --patch_size",
    )
    add(
        "--in_chans",
        type=Number(int, least=1, most=1024),
        default=None,
        help="default: the data set's. For 3, gray images are repeated; for 1, colour images turned to gray: use that "
        "when colour means nothing in your images; for any other number images have as many",
    )
    add(
        "--mean",
        type=MEAN,
        nargs="+",
        default=None,
        help="per channel, or auto, in training: measured on a sample of the images and kept in the checkpoint. "
        "Default: the data set's, for imagefolder of 1 or 3 channels ImageNet's, else auto. Give auto or your own for "
        "images that look unlike photographs",
    )
    add("--std", type=STD, nargs="+", default=None, help="per channel, or auto; see --mean")
    add(
        "--num_workers",
        type=Number(int, least=0, most=256),
        default=None,
        help="processes that decode and crop, per training process; default 10, or this process's share of the cpus if "
        "that is less. Raise it when the log shows time spent waiting for data; 0 decodes in the training process. "
        "Sets in memory need none",
    )


def add_loader_arguments(parser):
    """Adds the flags of a `TrainLoader` that evaluations do without."""
    add = parser.add_argument
    add(
        "--max_bad_images",
        type=Number(float, least=0, most=1),
        default=0.01,
        help="the run ends when more than this fraction of the images cannot be read; until then another image takes "
        "the place of a bad one. 0 tolerates none; raise it only if you know why they are bad",
    )


def resolve_dataset_defaults(args):
    """Fills in, in place, every flag of the data set that is None, and checks the values.

    args: a namespace with the flags of `add_dataset_arguments`; the flags of augmentation.py are resolved too if the
    caller has them. Returns args. Raises UserError for a value that makes no sense.
    """
    known = DATASETS[args.dataset]
    if args.img_size is None:
        args.img_size = known["img_size"]
    if args.in_chans is None:
        args.in_chans = len(known["mean"])
    training = hasattr(args, "augmentation")
    for name, kind in (("mean", MEAN), ("std", STD)):
        if getattr(args, name) is None:
            unknown = training and args.in_chans not in (1, 3)
            setattr(args, name, [AUTO] if unknown else fit_channels(known[name], args.in_chans))
        check_levels(f"--{name}", getattr(args, name), kind, args.in_chans, training)
    if args.num_workers is None:
        processes = number_of_environment("LOCAL_WORLD_SIZE", default="1", least=1)
        args.num_workers = max(1, min(10, available_cpus() // processes))
    if training:
        resolve_augmentation_defaults(args)
    return args


def check_levels(flag, values, kind, channels, training):
    """One per channel and in the range of `kind`: they may come from a checkpoint as well as from the flag."""
    if training and is_auto(values):
        return
    if AUTO in values:
        raise UserError(f"{flag} auto: stands alone, and in training: give numbers, one per channel")
    if len(values) != channels:
        raise UserError(f"{flag} has {len(values)} values, --in_chans is {channels}: give one per channel")
    try:
        for value in values:
            kind(value)
    except argparse.ArgumentTypeError as error:
        raise UserError(f"{flag} {error}") from None


def fit_channels(values, channels):
    """Per-channel numbers of a data set for another channel count: gray repeats, colour averages."""
    return tuple(values) if len(values) == channels else (sum(values) / len(values),) * channels


def available_cpus():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# Training -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Batch:
    """What one process trains on in one step, before the device's part of the augmentation.

    keys:    (B,) int64, of which the draws of an image's views are a function: its index; where an epoch draws it
             again, that plus N, plus 2 N, ... A bad file's place holds the index of its replacement.
    num_images: N, of the set.
    crops:   of each size a tensor (n, C, h, w) of levels, cropped and flipped: its first view of all images, then its
             second, ...; None when `images` is set.
    images:  uint8 (B, C, H, W), whole images of a set in memory, cropped later; None when `crops` is set.
    bad:     {index: reason} for the files that could not be read.
    """

    epoch: int
    keys: np.ndarray
    num_images: int
    crops: list | None = None
    images: torch.Tensor | None = None
    bad: dict = dataclasses.field(default_factory=dict)
    num_failed: int = 0  # requested images that were bad, without bad replacements

    @property
    def indices(self):
        """(B,) int64, the images in the batch."""
        return self.keys % self.num_images

    def pin_memory(self):
        """Called by the DataLoader's pinning thread, so that copies to the GPU do not block."""
        if self.crops is not None:
            self.crops = [crop.pin_memory() for crop in self.crops]
        elif self.images is not None:
            self.images = self.images.pin_memory()
        return self


class TrainLoader:
    """Batches of `images` for one of `world_size` processes, in an order that is a function of (seed, epoch).

    images: what `open_dataset` returned.        args: resolved flags, and args.seed.
    batch_size: B, of a micro-batch; accum_steps: M, micro-batches of a process in a step. Step s of an epoch takes
    images [s G, (s + 1) G) of the epoch's order, with G = B M world_size; micro-batch m of rank r takes the
    (r M + m)-th contiguous slice of these; so the order does not depend on the number of processes at equal G. What is
    left over at the end of an epoch is dropped.
    recipe: of the views; by default the one that the flags of augmentation.py name.
    device: where the views are made; batches for a CUDA device are pinned, so that copies to it do not block.
    Raises UserError if there are fewer images than one batch, or args.in_chans cannot be made from the images.

    .steps_per_epoch, .num_views; .bad_images {name: reason} of the files this process could not read so far;
    .num_bad_images how many of them it met in the current epoch.
    """

    def __init__(self, images, args, batch_size, rank=0, world_size=1, recipe=None, device="cpu", accum_steps=1):
        self.images, self.max_bad_images, self.device = images, args.max_bad_images, torch.device(device)
        self.accum_steps = accum_steps
        self.plan = Plan(args.seed, images.draws, batch_size, accum_steps, rank, world_size)
        self.steps_per_epoch = self.plan.steps_per_epoch
        self.recipe = recipe or make_recipe(args)
        self.num_views = sum(len(group.views) for group in self.recipe.view_groups())
        self.bad_images, self.num_bad_images = {}, 0
        check_channels(images, args.in_chans)
        if self.steps_per_epoch == 0:
            raise UserError(
                f"{self.plan.num_drawn} images do not fill one batch of {self.plan.images_per_step} "
                f"({batch_size * accum_steps} on each of {world_size} processes): lower the batch size or add images"
            )
        self.coming = None  # (number in the run, end of the run) of the micro-batch that `running` gives next
        if images.data is None:
            dataset = CropDataset(images, self.recipe)
            self.workers = Workers(dataset, args.num_workers, self.device, persistent=True, at_once=accum_steps)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, where):
        """Ends the workers, where they do not end with this process at once."""
        if error is None or not leaves_at_once(error):
            self.close()

    def close(self):
        """No batch comes any more."""
        if self.images.data is None:
            self.workers.close()

    def epoch(self, epoch, first_step=0, end=None):
        """Iterates over the Batches of one epoch from step `first_step` on, M for each; those before are not read.

        end: steps of the whole run, if more epochs follow: while the last batches of this epoch are used, the workers
        make the first ones of the next, and after the run's last batch none.
        """
        start, after = epoch * self.steps_per_epoch, (epoch + 1) * self.steps_per_epoch
        end = after if end is None else end
        self.num_bad_images = 0
        for number in range((start + first_step) * self.accum_steps, min(after, end) * self.accum_steps):
            batch = self.batch(number, end * self.accum_steps)
            self.note_bad_images(batch)
            yield batch

    def steps(self, epoch, first_step=0, end=None):
        """`epoch`, in lists: the M micro-batches of each step."""
        batches = self.epoch(epoch, first_step, end)
        while step := list(itertools.islice(batches, self.accum_steps)):
            yield step

    def batch(self, number, end):
        """The micro-batch of that number in the run, the next one of those on their way; or others begin at it."""
        if self.coming != (number, end):
            self.running = self.batches(number, end)
        self.coming = number + 1, end
        return next(self.running)

    def batches(self, number, end):
        plan, images, device = self.plan, self.images, self.device  # not self: a circle would keep the workers alive
        if images.data is None:
            return self.workers.batches(lambda done: plan.micro_batches(number + done, end))
        return (batch_in_memory(images, epoch, keys, device) for epoch, keys in plan.micro_batches(number, end))

    def augment(self, batch, device):
        """Views of a batch: V float32 tensors (B, in_chans, h, w) on `device`, normalised; see `make_views`."""
        return make_views(self.recipe, batch.epoch, batch.keys, device, batch.images, batch.crops)

    def describe_views(self):
        kind = "256 levels" if self.images.data is not None else self.images.reading.levels(self.recipe.in_chans)
        return f"{self.recipe.describe(min(self.recipe.in_chans, self.images.channels))} of {kind}"

    def note_bad_images(self, batch):
        """Names each bad file once, counts it, and ends the run if no replacement could be read either."""
        self.num_bad_images += batch.num_failed
        for index, reason in batch.bad.items():
            name = self.images.name(index)
            if name not in self.bad_images:
                self.bad_images[name] = reason
                with contextlib.suppress(*UNREADABLE):
                    print(f"cannot read {name}: {reason}; another image takes its place", flush=True)
        if batch.crops is None and batch.images is None:
            raise UserError(
                f"{len(batch.bad)} images in a row cannot be read, the last: {name}: {reason}; is the disk still there?"
            )

    def check_bad_images(self, total_bad=None):
        """Raises UserError if more than --max_bad_images of the images are bad.

        total_bad: the sum of `num_bad_images` over all processes; None if there is one process. Over all processes an
        epoch visits each image as often as it draws it, so the sum counts no file twice; sums of len(bad_images)
        would, after the first epoch.
        """
        total_bad = self.num_bad_images if total_bad is None else total_bad
        if total_bad > self.max_bad_images * self.plan.num_drawn:
            examples = "; ".join(f"{name}: {reason}" for name, reason in itertools.islice(self.bad_images.items(), 3))
            raise UserError(
                f"{total_bad} of {self.plan.num_drawn} images cannot be read, --max_bad_images allows "
                f"{self.max_bad_images:g} of them; {examples or 'named in the logs of the other processes'}"
            )


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which images a process takes in which step of the run: a function, without a past."""

    seed: int
    draws: tuple  # ((images of a root, how many of them an epoch draws), ...)
    batch_size: int  # of a micro-batch
    accum_steps: int  # micro-batches of a process in a step
    rank: int
    world_size: int

    @property
    def num_drawn(self):
        """Images of an epoch."""
        return sum(drawn for _, drawn in self.draws)

    @property
    def images_per_step(self):
        return self.batch_size * self.accum_steps * self.world_size

    @property
    def steps_per_epoch(self):
        return self.num_drawn // self.images_per_step

    def micro_batches(self, first, end):
        """(epoch, keys int64 (B,)) of each micro-batch of the run from number `first` to before `end`; see `Batch`."""
        per_epoch = self.steps_per_epoch * self.accum_steps
        while first < end:
            epoch, done = divmod(first, per_epoch)
            order = drawn_in_epoch(self.seed, epoch, self.draws)[: self.steps_per_epoch * self.images_per_step]
            mine = order.reshape(self.steps_per_epoch, self.world_size, -1)[:, self.rank]
            mine = mine.reshape(per_epoch, self.batch_size)[done:]
            for keys in mine[: end - first]:
                yield epoch, keys
            first += len(mine)


# "views" of things that are not views; that of a root is added to the last
ORDER_OF_EPOCH, REPLACEMENT, ORDER_OF_ROOT = 1 << 32, (1 << 32) + 1, 1 << 33


def drawn_in_epoch(seed, epoch, draws):
    """The keys of an epoch's images in its order, int64; see `Batch`. draws: see `Plan`.

    Of a root of n images that draws m = q n + r, all are drawn q times, and r more in turn: those that follow, in an
    order of the root's own, the r of the epoch before. So over the epochs none is drawn twice more than another."""
    keys, start, total = [], 0, sum(count for count, _ in draws)
    for root, (count, drawn) in enumerate(draws):
        times, rest = divmod(drawn, count)
        keys += [start + again * total + np.arange(count) for again in range(times)]
        if rest:
            in_turn = np.argsort(uniform(seed, 0, np.arange(count), ORDER_OF_ROOT + root, 1)[:, 0], kind="stable")
            keys.append(start + times * total + in_turn[(epoch * rest + np.arange(rest)) % count])
        start += count
    keys = np.concatenate(keys)
    return keys[epoch_order(seed, epoch, len(keys))]


def epoch_order(seed, epoch, count):
    """A permutation of range(count), int64 (count,)."""
    return np.argsort(uniform(seed, epoch, np.arange(count), ORDER_OF_EPOCH, 1)[:, 0], kind="stable")


def batch_in_memory(images, epoch, keys, device):
    batch = Batch(epoch, keys, len(images))
    batch.images = images.data[torch.from_numpy(batch.indices)]
    return batch.pin_memory() if device.type == "cuda" else batch


class CropDataset(torch.utils.data.Dataset):
    """(epoch, keys of one batch) -> Batch, a pure function."""

    MAX_ATTEMPTS = 100  # at --max_bad_images 0.5, chance leaves no good replacement once in 10^30

    def __init__(self, images, recipe):
        self.images, self.recipe = images, recipe

    def __getitems__(self, step):
        epoch, keys = step
        recipe, batch = self.recipe, Batch(epoch, keys.copy(), len(self.images))
        groups, crops = recipe.view_groups(), None
        for row in range(len(keys)):
            image = self.load_or_replace(batch, row)
            if image is None:
                return batch
            crops = crops or [
                image.new_empty((len(group.views), len(keys), len(image), group.size, group.size)) for group in groups
            ]
            for group, views in zip(groups, crops, strict=True):
                draws = view_draws(recipe, epoch, batch.keys[row : row + 1], group.views)
                for view, crop in enumerate(crop_image(image, draws, group, recipe)):
                    views[view, row] = crop
        batch.crops = [views.flatten(0, 1) for views in crops]
        return batch

    def load_or_replace(self, batch, row):
        """The image, or the first readable one of a list that is a function of (seed, epoch, index), or None."""
        candidates = [int(batch.keys[row])]
        for attempt in range(self.MAX_ATTEMPTS):
            try:
                image = self.images.load(candidates[attempt] % len(self.images), self.recipe.in_chans)
                batch.keys[row] = candidates[attempt]
                return image
            except BadImage as error:
                batch.bad[candidates[attempt] % len(self.images)] = str(error)
                if attempt == 0:
                    batch.num_failed += 1
                    draws = uniform(self.recipe.seed, batch.epoch, candidates[0], REPLACEMENT, self.MAX_ATTEMPTS)[0]
                    candidates += (draws * len(self.images)).astype(int).tolist()
        return None


# Evaluation -----------------------------------------------------------------------------------------------------------


def eval_batches(
    images, img_size, in_chans, mean, std, batch_size, rank=0, world_size=1, num_workers=0, indices=None, device="cpu"
):
    """Every image once, without augmentation: DINO's evaluation transform for folders, whole images of sets in memory.

    Folders: the shorter side is resized to img_size * 256 / 224 px, bicubic, then the centre is cropped. Sets in
    memory are resized to img_size if they have another size.
    indices: int (M,) of the images to take, in this order; default all. This process gets indices[rank::world_size];
    the last batch may be short.
    Yields (indices int64 numpy (b,), float32 (b, in_chans, img_size, img_size), normalised, on `device`).
    Raises UserError naming the file if one cannot be read: a score must count every image.
    """
    check_channels(images, in_chans)
    device = torch.device(device)
    mine = np.asarray(np.arange(len(images)) if indices is None else indices, np.int64)[rank::world_size]
    steps = [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]
    if images.data is None:
        workers = Workers(EvalDataset(images, img_size, in_chans), num_workers, device)
        batches = workers.batches(lambda done: steps[done:])
    else:
        batches = (eval_batch_in_memory(images, step, img_size, in_chans, device) for step in steps)
    for step, x in zip(steps, batches, strict=True):
        x = x.to(device, non_blocking=True)  # mostly a byte per level; floats are made there
        yield step, normalize(x.float() / 255, mean, std)


def eval_batch_in_memory(images, indices, img_size, in_chans, device):
    x = match_channels(resize_batch(images.data[torch.from_numpy(indices)], img_size), in_chans)
    return x.pin_memory() if device.type == "cuda" else x


class EvalDataset(torch.utils.data.Dataset):
    """Indices of one batch -> levels (b, C, img_size, img_size), or the UserError that says which file is bad."""

    def __init__(self, images, img_size, in_chans):
        self.images, self.img_size, self.in_chans = images, img_size, in_chans

    def __getitems__(self, indices):
        crops = []
        for index in indices:
            try:
                crops.append(resize_and_center_crop(self.images.load(index, self.in_chans), self.img_size))
            except BadImage as error:
                return UserError(
                    f"cannot read {self.images.name(index)}: {error}; a score counts all images: repair or remove it"
                )
        return torch.stack(crops)


LONGEST = 8  # times its shorter side: what is kept of a strip before it is resized


def resize_and_center_crop(image, size):
    """(C, H, W) -> (C, size, size): the shorter side becomes size * 256 / 224 px, then the centre is cropped.

    The ends of a strip would be enlarged and thrown away: a row of 20,000 px to 10 GB. They are cut off first."""
    image = middle(image, LONGEST * min(image.shape[1:]))
    height, width = image.shape[1:]
    shorter = round(size * 256 / 224)
    if height <= width:
        height, width = shorter, int(shorter * width / height)
    else:
        height, width = int(shorter * height / width), shorter
    top, left = round((height - size) / 2), round((width - size) / 2)
    return resize(image, (height, width))[:, top : top + size, left : left + size]


def middle(image, longest):
    """At most so many (or one more) rows and columns, with the same centre, to half a pixel."""
    top, left = (max(0, side - longest) // 2 for side in image.shape[1:])
    return image[:, top : image.shape[1] - top, left : image.shape[2] - left]


# Both loaders ---------------------------------------------------------------------------------------------------------


def check_channels(images, in_chans):
    possible = (1, 3) if images.channels in (1, 3) else (images.channels,)
    if in_chans not in possible:
        raise UserError(
            f"--in_chans {in_chans}: these images have {images.channels} channels; expected "
            + " or ".join(map(str, possible))
        )
