"""Images in, batches out: loaders of training and evaluation, and the flags that say what the network is given.

    images = images.open_dataset(args)                   # names, labels if there are any, pixels on demand
    loader = TrainLoader(images, args, batch_size, rank, world_size)
    for batch in loader.epoch(epoch, first_step):        # uint8, decoded and cropped by worker processes
        views = loader.augment(batch, device)            # V float32 tensors (B, C, h, w), normalised, on the device

    for indices, x in eval_batches(images, img_size, in_chans, mean, std, batch_size):       # each image exactly once

How a view is made from an image is in augmentation.py. As there, nothing here has a generator with a past: the order of
an epoch is a function of (seed, epoch), the replacement of a bad file of (seed, epoch, image index).

Shapes: N images of a set, B of a batch (b where the last may be short), V views, C channels, H x W image, h x w crop.
"""

import argparse
import dataclasses
import functools
import itertools
import os
import signal
import threading

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
from images import DATASETS, BadImage, FolderImages, add_image_arguments, first_line
from utils import Number, RunFailed, UserError


# Flags ----------------------------------------------------------------------------------------------------------------
class Level(Number):
    """argparse's `type=` of a brightness: a number in a range, on the scale where black is 0 and white 1."""

    def __str__(self):
        return f"{super().__str__()}, where black is 0 and white 1"


MEAN, STD = Level(float, least=0, most=1), Level(float, above=0, most=1)


def add_dataset_arguments(parser):
    """Adds the flags that say which images are read and in what form the network gets them.

    None stands for "depends on the data set", see `resolve_dataset_defaults`.
    """
    add = parser.add_argument
    add(
        "--dataset",
        default="fashion_mnist",
        choices=sorted(DATASETS),
        help="imagefolder: your own images, whatever --data_path holds; the others: small known sets, kept in memory",
    )
    add(
        "--data_path",
        default=None,
        help="imagefolder: a folder of class folders, a folder of images without labels (flat or nested), or a text "
        "file with one path per line; train/ and val/ (or test/) in it are found. Other data sets: where their files "
        "are, or where to download them to",
    )
    add_image_arguments(parser)
    add(
        "--class_list",
        default=None,
        metavar="FILE",
        help="keep only the classes named in this file, one per line or separated by blanks; imagenet100_classes.txt "
        "makes ImageNet-100 out of ImageNet",
    )
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
        help="1 or 3; default: the data set's. Gray images are repeated to 3 channels, colour images turned to gray "
        "for 1: use that when colour means nothing in your images",
    )
    add(
        "--mean",
        type=MEAN,
        nargs="+",
        default=None,
        help="per channel; default: the data set's, ImageNet's for imagefolder. Give your own for images that look "
        "unlike photographs",
    )
    add("--std", type=STD, nargs="+", default=None, help="per channel; see --mean")
    add(
        "--num_workers",
        type=Number(int, least=0, most=256),
        default=None,
        help="processes that decode and crop, per training process; default 10, or this process's share of the cpus if "
        "that is less. Raise it when the log shows time spent waiting for data; 0 decodes in the training process. "
        "Sets in memory need none",
    )


def resolve_dataset_defaults(args):
    """Fills in, in place, every flag of the data set that is None, and checks the values.

    args: a namespace with the flags of `add_dataset_arguments`; those of augmentation.py are resolved too if the caller
    has them. Returns args. Raises UserError for a value that makes no sense.
    """
    known = DATASETS[args.dataset]
    if args.img_size is None:
        args.img_size = known["img_size"]
    if args.in_chans is None:
        args.in_chans = len(known["mean"])
    for name, kind in (("mean", MEAN), ("std", STD)):
        if getattr(args, name) is None:
            setattr(args, name, fit_channels(known[name], args.in_chans))
        check_levels(f"--{name}", getattr(args, name), kind, args.in_chans)
    if args.num_workers is None:
        args.num_workers = max(1, min(10, available_cpus() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    if hasattr(args, "augmentation"):
        resolve_augmentation_defaults(args)
    return args


def check_levels(flag, values, kind, channels):
    """One per channel and in the range of `kind`: they may come from a checkpoint as well as from the flag."""
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

    indices: (B,) int64, the images in the batch. A bad file's place holds the index of its replacement.
    crops:   V uint8 tensors (B, C, h, w), cropped and flipped; None when `images` is set.
    images:  uint8 (B, C, H, W), whole images of a set in memory, cropped later; None when `crops` is set.
    bad:     {index: reason} for the files that could not be read.
    """

    epoch: int
    indices: np.ndarray
    crops: list | None = None
    images: torch.Tensor | None = None
    bad: dict = dataclasses.field(default_factory=dict)
    num_failed: int = 0  # requested images that were bad, without bad replacements

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
    batch_size: per process. Step s of an epoch takes images [s G, (s + 1) G) of the epoch's order, with
    G = batch_size * world_size, and rank r the r-th contiguous slice of these; so the order does not depend on the
    number of processes at equal G. What is left over at the end of an epoch is dropped.
    recipe: of the views; by default the one that the flags of augmentation.py name.
    Raises UserError if there are fewer images than one batch, or args.in_chans cannot be made from the images.

    .steps_per_epoch, .num_views; .bad_images {name: reason} of the files this process could not read so far;
    .num_bad_images how many of them it met in the current epoch.
    """

    def __init__(self, images, args, batch_size, rank=0, world_size=1, recipe=None):
        self.images, self.batch_size, self.rank, self.world_size = images, batch_size, rank, world_size
        self.seed, self.max_bad_images = args.seed, args.max_bad_images
        self.recipe = recipe or make_recipe(args)
        self.num_views = sum(len(group.views) for group in self.recipe.view_groups())
        self.steps_per_epoch = len(images) // (batch_size * world_size)
        self.bad_images, self.num_bad_images = {}, 0
        check_channels(images, args.in_chans)
        if self.steps_per_epoch == 0:
            raise UserError(
                f"{len(images)} images do not fill one batch of {batch_size * world_size} ({batch_size} on each of "
                f"{world_size} processes): lower the batch size or add images"
            )
        if isinstance(images, FolderImages):
            self.plan = EpochPlan()
            self.start_workers = functools.partial(
                worker_loader,
                CropDataset(images, self.recipe),
                self.plan,
                args.num_workers,
                persistent_workers=args.num_workers > 0,
                pin_memory=torch.cuda.is_available(),
            )
            self.workers = self.start_workers()  # for all epochs: they keep no state, what to do comes with the item

    def epoch(self, epoch, first_step=0):
        """Iterates over the Batches of one epoch from step `first_step` on; those before it are not read."""
        global_batch = self.batch_size * self.world_size
        order = epoch_order(self.seed, epoch, len(self.images))[: self.steps_per_epoch * global_batch]
        mine = order.reshape(self.steps_per_epoch, self.world_size, self.batch_size)[first_step:, self.rank]
        self.num_bad_images = 0
        if isinstance(self.images, FolderImages):
            batches = self.batches_of_files(epoch, mine)
        else:
            batches = (self.batch_in_memory(epoch, indices) for indices in mine)
        for batch in batches:
            self.note_bad_images(batch)
            yield batch

    def batches_of_files(self, epoch, steps):
        """What the workers make. If one dies, all are replaced and go on: a batch is a function of its items."""
        done = deaths = 0
        while done < len(steps):
            self.plan.epoch, self.plan.steps = epoch, steps[done:]
            try:
                batches = iter(self.workers)  # hears of one that died since the last epoch
                hear_of_dead_workers_in_next_only()
                for batch in batches:
                    yield batch
                    done, deaths = done + 1, 0
            except (RuntimeError, OSError, EOFError) as error:
                if not is_of_dead_worker(error):
                    raise
                deaths += 1
                if deaths > MAX_DEATHS:
                    raise RunFailed(
                        f"data workers died {deaths} times without making one batch; if memory was short, lower "
                        "--num_workers"
                    ) from None
                print(f"a data worker died ({first_line(error)}); starting new ones", flush=True)
                self.workers = self.start_workers()

    def batch_in_memory(self, epoch, indices):
        batch = Batch(epoch, indices, images=self.images.data[torch.from_numpy(indices)])
        return batch.pin_memory() if torch.cuda.is_available() else batch

    def augment(self, batch, device):
        """Views of a batch: V float32 tensors (B, in_chans, h, w) on `device`, normalised; see `make_views`."""
        return make_views(self.recipe, batch.epoch, batch.indices, device, batch.images, batch.crops)

    def note_bad_images(self, batch):
        """Names each bad file once, counts it, and ends the run if no replacement could be read either."""
        self.num_bad_images += batch.num_failed
        for index, reason in batch.bad.items():
            name = self.images.name(index)
            if name not in self.bad_images:
                self.bad_images[name] = reason
                print(f"cannot read {name}: {reason}; another image takes its place", flush=True)
        if batch.crops is None and batch.images is None:
            raise UserError(
                f"{len(batch.bad)} images in a row cannot be read, the last: {name}: {reason}; is the disk still there?"
            )

    def check_bad_images(self, total_bad=None):
        """Raises UserError if more than --max_bad_images of the images are bad.

        total_bad: the sum of `num_bad_images` over all processes; None if there is one process. An epoch visits each
        image once, over all processes, so the sum counts no file twice; sums of len(bad_images) would, after the first
        epoch.
        """
        total_bad = self.num_bad_images if total_bad is None else total_bad
        if total_bad > self.max_bad_images * len(self.images):
            examples = "; ".join(f"{name}: {reason}" for name, reason in itertools.islice(self.bad_images.items(), 3))
            raise UserError(
                f"{total_bad} of {len(self.images)} images cannot be read, --max_bad_images allows "
                f"{self.max_bad_images:g} of them; {examples or 'named in the logs of the other processes'}"
            )


# "views" of things that are not views
ORDER_OF_EPOCH, REPLACEMENT = 1 << 32, (1 << 32) + 1


def epoch_order(seed, epoch, count):
    """A permutation of range(count), int64 (count,)."""
    return np.argsort(uniform(seed, epoch, np.arange(count), ORDER_OF_EPOCH, 1)[:, 0], kind="stable")


MAX_DEATHS = 3  # of workers, in a row


def hear_of_dead_workers_in_next_only():
    """PyTorch's handler of SIGCHLD raises its error wherever the main thread happens to be, in the middle of an update
    of the weights too. Without it `next(batches)` notices within five seconds."""
    if threading.current_thread() is threading.main_thread():  # elsewhere PyTorch has set none
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def is_of_dead_worker(error):
    """PyTorch's own error, or that of the connection by which a tensor was to come; but not what a worker raised."""
    if isinstance(error, RuntimeError):
        return str(error).startswith("DataLoader worker (pid")
    return not str(error).startswith("Caught ")


class EpochPlan:
    """The DataLoader's batch sampler. It lives in the training process: workers see its items (epoch, index) only."""

    epoch, steps = 0, ()

    def __iter__(self):
        return ([(self.epoch, index) for index in step.tolist()] for step in self.steps)


class CropDataset(torch.utils.data.Dataset):
    """Items (epoch, index) of one batch -> Batch, a pure function."""

    MAX_ATTEMPTS = 100  # at --max_bad_images 0.5, chance leaves no good replacement once in 10^30

    def __init__(self, images, recipe):
        self.images, self.recipe = images, recipe

    def __getitems__(self, items):
        recipe, batch = self.recipe, Batch(items[0][0], np.array([index for _, index in items]))
        groups = recipe.view_groups()
        crops = [
            torch.empty((len(items), recipe.in_chans, group.size, group.size), dtype=torch.uint8)
            for group in groups
            for _ in group.views
        ]
        for row, (epoch, index) in enumerate(items):
            image = self.load_or_replace(batch, row, epoch, index)
            if image is None:
                return batch
            for group in groups:
                draws = view_draws(recipe, epoch, batch.indices[row : row + 1], group.views)
                for view, crop in zip(group.views, crop_image(image, draws, group, recipe), strict=True):
                    crops[view][row] = crop
        batch.crops = crops
        return batch

    def load_or_replace(self, batch, row, epoch, index):
        """The image, or the first readable one of a list that is a function of (seed, epoch, index), or None."""
        candidates = [index]
        for attempt in range(self.MAX_ATTEMPTS):
            try:
                image = self.images.load(candidates[attempt], self.recipe.in_chans)
                batch.indices[row] = candidates[attempt]
                return image
            except BadImage as error:
                batch.bad[candidates[attempt]] = str(error)
                if attempt == 0:
                    batch.num_failed += 1
                    draws = uniform(self.recipe.seed, epoch, index, REPLACEMENT, self.MAX_ATTEMPTS)[0]
                    candidates += (draws * len(self.images)).astype(int).tolist()
        return None


# Evaluation -----------------------------------------------------------------------------------------------------------


def eval_batches(images, img_size, in_chans, mean, std, batch_size, rank=0, world_size=1, num_workers=0, indices=None):
    """Every image once, without augmentation: DINO's evaluation transform for folders, whole images of sets in memory.

    Folders: the shorter side is resized to img_size * 256 / 224 px, bicubic, then the centre is cropped. Sets in
    memory are resized to img_size if they have another size.
    indices: int (M,) of the images to take, in this order; default all. This process gets indices[rank::world_size];
    the last batch may be short.
    Yields (indices int64 numpy (b,), float32 (b, in_chans, img_size, img_size), normalised, on the CPU).
    Raises UserError naming the file if one cannot be read: a score must count every image.
    """
    check_channels(images, in_chans)
    mine = np.asarray(np.arange(len(images)) if indices is None else indices, np.int64)[rank::world_size]
    steps = [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]
    if isinstance(images, FolderImages):
        batches = worker_loader(EvalDataset(images, img_size, in_chans), steps, num_workers)
    else:
        batches = (eval_batch_in_memory(images, step, img_size, in_chans) for step in steps)
    for step, x in zip(steps, batches, strict=True):
        if isinstance(x, str):
            raise UserError(x)
        yield step, normalize(x.float() / 255, mean, std)


def eval_batch_in_memory(images, indices, img_size, in_chans):
    return match_channels(resize_batch(images.data[torch.from_numpy(indices)], img_size), in_chans)


class EvalDataset(torch.utils.data.Dataset):
    """Indices of one batch -> uint8 (b, C, img_size, img_size), or a line that says which file is bad."""

    def __init__(self, images, img_size, in_chans):
        self.images, self.img_size, self.in_chans = images, img_size, in_chans

    def __getitems__(self, indices):
        x = torch.empty((len(indices), self.in_chans, self.img_size, self.img_size), dtype=torch.uint8)
        for row, index in enumerate(indices):
            try:
                x[row] = resize_and_center_crop(self.images.load(index, self.in_chans), self.img_size)
            except BadImage as error:
                return f"cannot read {self.images.name(index)}: {error}; a score counts all images: repair or remove it"
        return x


def resize_and_center_crop(image, size):
    height, width = image.shape[1:]
    shorter = round(size * 256 / 224)
    if height <= width:
        height, width = shorter, int(shorter * width / height)
    else:
        height, width = int(shorter * height / width), shorter
    top, left = round((height - size) / 2), round((width - size) / 2)
    return resize(image, (height, width))[:, top : top + size, left : left + size]


# Both loaders ---------------------------------------------------------------------------------------------------------


def check_channels(images, in_chans):
    possible = (1, 3) if images.channels in (1, 3) else (images.channels,)
    if in_chans not in possible:
        raise UserError(
            f"--in_chans {in_chans}: these images have {images.channels} channels; expected "
            + " or ".join(map(str, possible))
        )


def worker_loader(dataset, batch_sampler, num_workers, **options):
    """A DataLoader whose `dataset` makes whole batches."""
    return torch.utils.data.DataLoader(
        dataset,
        batch_sampler=batch_sampler,
        num_workers=num_workers,
        collate_fn=already_collated,
        worker_init_fn=start_worker,
        **options,
    )


def already_collated(batch):
    return batch


def start_worker(worker_id):
    torch.set_num_threads(1)
    # signals to the whole process group are the training process's business, which ends its workers
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGINT, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
