"""Images in, batches out: data sets, files and their decoding, loaders for training and evaluation.

    images = open_dataset(args)                          # names, labels if there are any, pixels on demand
    loader = TrainLoader(images, args, batch_size, rank, world_size)
    for batch in loader.epoch(epoch, first_step):        # uint8, decoded and cropped by worker processes
        views = loader.augment(batch, device)            # V float32 tensors (B, C, h, w), normalised, on the device

    for indices, x in eval_batches(images, img_size, in_chans, mean, std, batch_size):       # each image exactly once

How a view is made from an image is in augmentation.py. As there, nothing here has a generator with a past: the order of
an epoch is a function of (seed, epoch), the replacement of a bad file of (seed, epoch, image index).

Shapes: N images of a set, B of a batch (b where the last may be short), V views, C channels, H x W image, h x w crop.
"""

import dataclasses
import fcntl
import functools
import gzip
import hashlib
import io
import itertools
import math
import os
import signal
import stat
import warnings
import zlib
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image, ImageOps, UnidentifiedImageError
from torchvision.io import ImageReadMode, decode_jpeg

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
from utils import RunFailed, UserError

# Flags ----------------------------------------------------------------------------------------------------------------

# img_size, mean and std of the training images on the [0, 1] scale; imagefolder takes ImageNet's
DATASETS = {
    "imagefolder": {"img_size": 224, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)},
    "fashion_mnist": {"img_size": 28, "mean": (0.2860,), "std": (0.3530,)},
    "cifar10": {"img_size": 32, "mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616)},
    "cifar100": {"img_size": 32, "mean": (0.5071, 0.4865, 0.4409), "std": (0.2673, 0.2564, 0.2762)},
    "svhn": {"img_size": 32, "mean": (0.4377, 0.4438, 0.4728), "std": (0.1980, 0.2010, 0.1970)},
}


MAX_WORKERS = 256  # per training process: more would only stop the machine


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
    add(
        "--class_list",
        default=None,
        metavar="FILE",
        help="keep only the classes named in this file, one per line or separated by blanks; imagenet100_classes.txt "
        "makes ImageNet-100 out of ImageNet",
    )
    add(
        "--img_size",
        type=int,
        default=None,
        help="side of the global crops in pixels; default 224 for imagefolder, else the data set's own. Lower it when "
        "your images are smaller; must suit --patch_size",
    )
    add(
        "--in_chans",
        type=int,
        default=None,
        help="1 or 3; default: the data set's. Gray images are repeated to 3 channels, colour images turned to gray "
        "for 1: use that when colour means nothing in your images",
    )
    add(
        "--mean",
        type=float,
        nargs="+",
        default=None,
        help="per channel, on the [0, 1] scale; default: the data set's, ImageNet's for imagefolder. Give your own for "
        "images that look unlike photographs",
    )
    add("--std", type=float, nargs="+", default=None, help="per channel, on the [0, 1] scale; see --mean")
    add(
        "--num_workers",
        type=int,
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
    if not 1 <= args.in_chans <= 1024:
        raise UserError(f"--in_chans {args.in_chans}: expected the images' number of channels, 1 or 3")
    for name in ("mean", "std"):
        if getattr(args, name) is None:
            setattr(args, name, fit_channels(known[name], args.in_chans))
        if len(getattr(args, name)) != args.in_chans:
            raise UserError(
                f"--{name} has {len(getattr(args, name))} values, --in_chans is {args.in_chans}: give one per channel"
            )
    if args.num_workers is None:
        args.num_workers = max(1, min(10, available_cpus() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    if not 1 <= args.img_size <= 2**15 or not 0 <= args.num_workers <= MAX_WORKERS:
        raise UserError(
            f"--img_size {args.img_size} must be from 1 to {2**15}, "
            f"--num_workers {args.num_workers} from 0 to {MAX_WORKERS}"
        )
    if not all(math.isfinite(m) for m in args.mean) or not all(0 < s < math.inf for s in args.std):
        raise UserError(f"--mean {args.mean} --std {args.std}: finite numbers, std above 0, on the [0, 1] scale")
    if hasattr(args, "augmentation"):
        resolve_augmentation_defaults(args)
    return args


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


# Data sets ------------------------------------------------------------------------------------------------------------


def open_dataset(args, split="train"):
    """The images that --dataset, --data_path and --class_list name.

    split: "train", or "val" for those to evaluate on: the test set of the small sets, the folder val/ (or test/) beside
    train/. Returns FolderImages or ArrayImages. Raises UserError if they cannot be found or read, with where they were
    looked for.
    """
    if split not in ("train", "val"):
        raise ValueError(f"split is {split!r}, expected 'train' or 'val'")
    if args.dataset == "imagefolder":
        images = open_folder(args.data_path, split)
    else:
        images = open_small_set(args.dataset, args.data_path, split)
    return keep_classes(images, args.class_list) if args.class_list else images


class FolderImages:
    """Image files on disk, read when they are needed.

    len(); .labels int64 (N,) or None; .classes names or None; .channels; .fingerprint of the names in their order and
    of some files' sizes;
    .name(i); .load(i, channels) -> uint8 (channels, H, W), raises BadImage.
    The names are one array of bytes: a list of 1.3 million str would be copied into every worker, page by page, as
    soon as its reference counts change.
    """

    channels = 3

    def __init__(self, root, names, labels=None, classes=None):
        """root: folder. names: list of bytes, relative to root or absolute."""
        self.root, self.labels, self.classes = os.fsencode(root), labels, classes
        self.ends = np.cumsum([len(name) for name in names])
        self.bytes = np.frombuffer(b"".join(names), np.uint8)
        self.names_digest = hashlib.sha256(b"\0".join(names))

    @functools.cached_property
    def fingerprint(self):
        digest = self.names_digest.copy()
        for status in self.look_at_some():
            digest.update(b"%d " % (status.st_size if status else -1))
        return digest.hexdigest()[:16]

    def look_at_some(self, most=1000):
        """os.stat of `most` files, evenly spread; None for one that is not there, which is named when it is read."""
        for index in np.unique(np.linspace(0, len(self) - 1, most).astype(int)):
            try:
                yield os.stat(os.path.join(self.root, self.relative_name(index)))
            except OSError:
                yield None

    def __len__(self):
        return len(self.ends)

    def relative_name(self, index):
        return self.bytes[self.ends[index - 1] if index else 0 : self.ends[index]].tobytes()

    def name(self, index):
        return os.path.join(self.root, self.relative_name(index)).decode("utf-8", "backslashreplace")

    def load(self, index, channels=3):
        return load_image(os.fsdecode(os.path.join(self.root, self.relative_name(index))), channels)


class ArrayImages:
    """A small set in memory. data: uint8 tensor (N, C, H, W); the rest as in FolderImages."""

    def __init__(self, name, data, labels=None, classes=None):
        self.set_name, self.data, self.labels, self.classes = name, data.contiguous(), labels, classes
        self.channels = data.shape[1]
        self.fingerprint = hashlib.sha256(self.data.numpy()).hexdigest()[:16]

    def __len__(self):
        return len(self.data)

    def name(self, index):
        return f"{self.set_name}[{index}]"

    def load(self, index, channels=3):
        return match_channels(self.data[index : index + 1], channels)[0]


def keep_classes(images, class_list):
    """The images of the classes named in the file class_list, labels counted anew in the order of the names."""
    if images.classes is None:
        raise UserError(f"--class_list {class_list} needs images in class folders; these have no classes")
    lines = read_text(class_list, "--class_list").splitlines()
    names = {name for line in lines for name in ([line.strip()] if line.strip() in images.classes else line.split())}
    missing = sorted(names - set(images.classes))
    if missing or not names:
        raise UserError(
            f"--class_list {class_list}: {len(missing)} of its {len(names)} classes are not in the data set, which has "
            f"{len(images.classes)}: {', '.join(missing[:3]) or 'the file is empty'}{', ...' if missing[3:] else ''}"
        )
    classes = [name for name in images.classes if name in names]
    new_label = np.array([classes.index(name) if name in names else -1 for name in images.classes])[images.labels]
    kept = np.flatnonzero(new_label >= 0)
    if len(kept) == 0:
        raise UserError(f"--class_list {class_list}: the folders of its {len(names)} classes hold no images")
    if isinstance(images, FolderImages):
        return FolderImages(
            os.fsdecode(images.root), [images.relative_name(index) for index in kept], new_label[kept], classes
        )
    return ArrayImages(images.set_name, images.data[torch.from_numpy(kept)], new_label[kept], classes)


def read_text(path, flag):
    try:
        return Path(path).read_text(encoding="utf-8", errors="surrogateescape")
    except OSError as error:
        raise UserError(f"{flag} {path} cannot be read: {error.strerror}") from error


# Folders --------------------------------------------------------------------------------------------------------------

# torchvision's, without .gif-like rarities; a text file may name any file of FORMATS
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


def open_folder(data_path, split):
    if data_path is None:
        raise UserError(
            "--dataset imagefolder needs --data_path: a folder of images, or a text file with one path per line"
        )
    root = Path(data_path)
    try:
        is_list = root.is_file()
    except (OSError, ValueError) as error:  # too long, or with a zero byte
        raise UserError(f"--data_path {data_path} is no path: {error}") from None
    if is_list:
        if split == "val":
            raise UserError(f"--data_path {data_path} is a list of images, without a validation part: give a folder")
        return open_list(root)
    root = split_folder(root, split)
    names, folders = scan(os.fsencode(root))
    if not names:
        raise UserError(f"no images in {root}: looked in it and the folders below for {' '.join(EXTENSIONS)}")
    tops = [name.split(b"/", 1)[0] if b"/" in name else None for name in names]
    if None in tops or len(set(tops)) < 2:  # images beside folders, or all in one folder: not classes
        return FolderImages(root, names)
    label = {folder: number for number, folder in enumerate(folders)}
    return FolderImages(
        root, names, np.array([label[top] for top in tops], np.int64), [os.fsdecode(folder) for folder in folders]
    )


def open_list(path):
    """One path per line, relative to the list's own folder or absolute."""
    names = [os.fsencode(line.strip()) for line in read_text(path, "--data_path").splitlines() if line.strip()]
    if not names:
        raise UserError(f"--data_path {path} names no image: expected one path per line")
    return FolderImages(path.parent, names)


def split_folder(root, split):
    """root/train or root itself; root/val, root/test, or those beside a root that is itself called train."""
    if split == "train":
        return root / "train" if (root / "train").is_dir() else root
    parent = root.parent if root.name == "train" and not (root / "val").is_dir() else root
    tried = [parent / "val", parent / "test"]
    for folder in tried:
        if folder.is_dir():
            return folder
    raise UserError(f"no validation images for --data_path {root}: looked for {' and '.join(map(str, tried))}")


def leads_to_folder(entry):
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself: a bad image, if it is named as one
        return False


def scan(root):
    """(names of all images below root, relative to it, names of the folders in root), sorted, as bytes.

    Links are followed, but not one that leads back to a folder it is in. A broken link counts as an image, a bad one:
    dropping it would be silent. Hidden files and folders are passed over.
    """
    names, top_folders = [], []

    def visit(folder, prefix, ancestors):
        try:
            identity = os.stat(folder)
            with os.scandir(folder) as entries:
                shown = [entry for entry in entries if not entry.name.startswith(b".")]
                entries = sorted((entry.name, leads_to_folder(entry)) for entry in shown)
        except OSError as error:
            raise UserError(
                f"folder {os.fsdecode(folder)} cannot be read: {error.strerror}; see --data_path"
            ) from error
        identity = (identity.st_dev, identity.st_ino)
        if identity in ancestors:
            return
        for name, is_folder in entries:
            if is_folder:
                if not prefix:
                    top_folders.append(name)
                visit(os.path.join(folder, name), prefix + name + b"/", ancestors | {identity})
            elif os.path.splitext(name)[1].lower().decode("ascii", "replace") in EXTENSIONS:
                names.append(prefix + name)

    visit(root, b"", frozenset())
    return names, top_folders


# Small sets -----------------------------------------------------------------------------------------------------------


def open_small_set(dataset, data_path, split):
    train = split == "train"
    if dataset == "fashion_mnist":
        return open_fashion_mnist(data_path, train)
    root, sets = data_path or "data", torchvision.datasets
    if dataset == "svhn":
        found = torchvision_set(
            lambda download: sets.SVHN(root, split="train" if train else "test", download=download), dataset, root
        )
        data, labels, classes = torch.from_numpy(found.data), found.labels, [str(digit) for digit in range(10)]
    else:
        cifar = sets.CIFAR10 if dataset == "cifar10" else sets.CIFAR100
        found = torchvision_set(lambda download: cifar(root, train=train, download=download), dataset, root)
        data, labels, classes = torch.from_numpy(found.data).permute(0, 3, 1, 2), found.targets, list(found.classes)
    return ArrayImages(f"{dataset}/{split}", data, np.array(labels, np.int64), classes)


DEBIAN_FASHION_MNIST = "/usr/share/datasets/fashion-mnist"  # package dataset-fashion-mnist
FASHION_CLASSES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"]
FASHION_CLASSES += ["Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]


def open_fashion_mnist(data_path, train):
    """70,000 gray images of 28 x 28 px: from --data_path, Debian's package, or the network, in this order."""
    part, root = "train" if train else "t10k", Path(data_path or "data")
    downloaded = root / "FashionMNIST" / "raw"  # where torchvision puts it
    for folder in (root, downloaded, Path(DEBIAN_FASHION_MNIST)):
        paths = [find_idx(folder / f"{part}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1")]
        if all(paths):
            break
    else:
        torchvision_set(
            lambda download: torchvision.datasets.FashionMNIST(root, train, download=download),
            "fashion_mnist",
            root,
            ", or install Debian's package dataset-fashion-mnist, or let a machine with a network download it",
        )
        paths = [find_idx(downloaded / f"{part}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1")]
    data, labels = (torch.from_numpy(read_idx(path)) for path in paths)
    if data.shape[1:] != (28, 28) or labels.shape != data.shape[:1] or (labels >= len(FASHION_CLASSES)).any():
        raise UserError(
            f"{paths[0]} and {paths[1].name} hold arrays of {tuple(data.shape)} and {tuple(labels.shape)}; expected N "
            f"images of 28 x 28 px and N labels below {len(FASHION_CLASSES)}; get them again"
        )
    return ArrayImages(
        f"fashion_mnist/{'train' if train else 'val'}", data[:, None], labels.numpy().astype(np.int64), FASHION_CLASSES
    )


def find_idx(path):
    return next((found for found in (path, path.with_name(path.name + ".gz")) if found.is_file()), None)


LARGEST_IDX = 2**26  # bytes, inflated; the training images are 47 million


def read_idx(path):
    """A file of MNIST's format: two zeros, type 8 (bytes), number of dimensions, sizes (big-endian), values."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            content = file.read(LARGEST_IDX + 1)
        if len(content) > LARGEST_IDX:
            raise ValueError(f"more than {LARGEST_IDX} bytes")
        if content[:3] != b"\0\0\x08":
            raise ValueError("does not begin as an IDX file of bytes does")
        start = 4 + 4 * content[3]
        return np.frombuffer(content, np.uint8, offset=start).reshape(np.frombuffer(content[4:start], ">u4")).copy()
    except (OSError, EOFError, ValueError, IndexError, zlib.error) as error:
        raise UserError(f"{path} is damaged: {error}; remove it, or get it again") from error


def torchvision_set(open_set, dataset, root, other_ways=""):
    """open_set(download=False), or open_set(download=True) if that fails; one process of a machine at a time."""
    try:
        return open_set(False)
    except (RuntimeError, OSError):  # torchvision's way to say: not there, or not whole
        pass
    try:
        os.makedirs(root, exist_ok=True)
        with open(os.path.join(root, ".download.lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            return open_set(True)
    except Exception as error:  # network, proxy, certificate, disk, archive: all end in the same advice
        raise UserError(
            f"{dataset} is not in {root} and cannot be downloaded ({first_line(error)}): "
            f"give the folder of its files as --data_path{other_ways}"
        ) from error


# Decoding -------------------------------------------------------------------------------------------------------------


def load_image(path, channels=3):
    """A file -> uint8 (channels, H, W), upright; channels 3 (RGB) or 1 (luma).

    JPEG, PNG, WebP, TIFF, BMP, PPM, GIF and the rest of FORMATS, of any colour mode; 16-bit gray is scaled to 8 bits,
    not clipped; alpha is dropped, as in DINO; EXIF orientation is applied; of an animation the first frame.
    Raises BadImage if the file is missing, damaged, truncated or declares more pixels than PIL thinks safe.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata: it does not change the pixels
            return decode(read_file(path), channels)
    except BadImage:
        raise
    except UnidentifiedImageError as error:  # PIL's own words name an object in memory
        raise BadImage(f"not an image of any known format ({', '.join(FORMATS)})") from error
    except Exception as error:  # decoders raise nearly every type there is on a damaged file
        raise BadImage(f"{type(error).__name__}: {first_line(error)}") from error


def read_file(path):
    """The content of a regular file: a pipe would wait for ever, a device has no end."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise BadImage("not a regular file but a directory, pipe or device")
    return Path(path).read_bytes()


# whatever a file is called. Not all that PIL knows: for PostScript it starts the program gs
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "DIB", "PPM", "GIF", "JPEG2000", "TGA", "ICO")


def decode(data, channels):
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        width, height = image.size
        if width * height > Image.MAX_IMAGE_PIXELS:
            raise BadImage(
                f"declares {width} x {height} px, more than PIL's limit of {Image.MAX_IMAGE_PIXELS} px in all"
            )
        if image.format in ("JPEG", "MPO") and image.mode in ("L", "RGB"):  # 3 times faster than PIL
            mode = ImageReadMode.RGB if channels == 3 else ImageReadMode.GRAY
            return decode_jpeg(
                torch.from_numpy(np.frombuffer(data, np.uint8).copy()), mode=mode, apply_exif_orientation=True
            )
        pixels = np.array(convert(ImageOps.exif_transpose(image), "RGB" if channels == 3 else "L"))
    return torch.from_numpy(pixels).reshape(*pixels.shape[:2], channels).permute(2, 0, 1)


EIGHT_BITS = np.rint(np.arange(65536) / 257).astype(np.uint8)  # a table: float64 would take 8 bytes a pixel


def convert(image, mode):
    if image.mode == "F":
        raise BadImage("32-bit float pixels: their range is not known")
    if image.mode.startswith("I"):  # 16-bit gray, which PIL would clip at 255
        image = Image.fromarray(EIGHT_BITS[np.asarray(image).clip(0, 65535)])
    elif image.mode in ("P", "PA", "LA", "La", "RGBa"):
        image = image.convert("RGBA")
    return image.convert(mode)


class BadImage(Exception):
    """A file that is not a whole, readable image."""


def first_line(error):
    return str(error).strip().partition("\n")[0] or type(error).__name__
