"""Images with a mask each, in the layout of Pascal VOC, and what a segmentation of them is worth.

    images = open_masked(root, "val", reading)                # .mask(i): uint8 (H, W), 255 is ignored
    for rows, pixels, masks in batches_of(images, ...): ...
    labels = patch_labels(mask, 32, 32)                       # (r, c): what most pixels of each patch are
    counts += confusion(mask, spread(predicted, mask.shape))  # int64 (256, 256), truth by prediction
    scores = scores_of(counts)                                # miou, accuracy, iou of each class

Shapes: N images of H x W px, r x c patches.
"""

import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import data
from images import BadImage, FolderImages
from images.workers import Workers
from utils import UserError, one_line

IGNORED = 255
VALUES = 256  # of a mask's pixels
FOLDERS = ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation")
ENDINGS = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG")


# ---- images and masks ------------------------------------------------------------------------------------------------


class MaskedImages(FolderImages):
    """`FolderImages`, and the mask of each."""

    def __init__(self, root, names, masks, reading, remarks=()):
        super().__init__(root, names, None, None, reading, remarks)
        self.masks = masks

    def mask(self, index):
        """uint8 (H, W): numbers of classes, as a palette PNG has them. Raises UserError."""
        path = self.masks[index]
        try:
            with Image.open(path) as mask:
                if mask.mode not in ("P", "L", "1"):
                    raise UserError(f"{path}: a mask of mode {mask.mode}; expected a PNG with a palette, or gray")
                return np.array(mask).astype(np.uint8)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise UserError(f"{path}: not a mask that can be read ({one_line(error)})") from error


def open_masked(root, split, reading):
    """The images that ImageSets/Segmentation/<split>.txt lists. Raises UserError for what is not there."""
    root = Path(root)
    for folder in FOLDERS:
        if not (root / folder).is_dir():
            raise UserError(f"--data_path {root}: has no folder {folder}; expected {', '.join(FOLDERS)} in it")
    file = root / FOLDERS[2] / f"{split}.txt"
    try:
        lines = [line.split()[0] for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--data_path {root}: {file} cannot be read ({one_line(error)})") from error
    if not lines:
        raise UserError(f"--data_path {root}: {file} lists no image")
    names = [image_name(root, line, file) for line in lines]
    masks = [root / FOLDERS[1] / f"{line}.png" for line in lines]
    missing = [mask for mask in masks if not mask.is_file()]
    if missing:
        raise UserError(f"--data_path {root}: {len(missing)} of {len(masks)} masks are missing, such as {missing[0]}")
    images = MaskedImages(root, names, masks, reading, [f"of {file}"])
    images.check_range_is_known()
    return images


def image_name(root, line, file):
    if ".." in Path(line).parts or os.path.isabs(line):
        raise UserError(f"{file}: {line} leads out of the folder; expected the name of an image without its ending")
    for ending in ENDINGS:
        if (root / FOLDERS[0] / f"{line}{ending}").is_file():
            return os.fsencode(f"{FOLDERS[0]}/{line}{ending}")
    raise UserError(f"{file}: {root / FOLDERS[0] / line}.jpg is missing")


class WholeImages(torch.utils.data.Dataset):
    """Indices -> (pixels (b, C, size, size), masks): each image whole, squeezed to a square; or a UserError."""

    def __init__(self, images, in_chans, size):
        self.images, self.in_chans, self.size = images, in_chans, size

    def __getitems__(self, indices):
        try:
            pairs = [self.load(index) for index in indices]
        except UserError as error:
            return error
        return torch.stack([pixels for pixels, _ in pairs]), [mask for _, mask in pairs]

    def load(self, index):
        mask = self.images.mask(index)
        try:
            pixels = self.images.load(index, self.in_chans)
        except BadImage as error:
            raise UserError(f"cannot read {self.images.name(index)}: {error}") from error
        if mask.shape != tuple(pixels.shape[1:]):
            sizes = [f"{width} x {height}" for height, width in (mask.shape, pixels.shape[1:])]
            raise UserError(f"{self.images.masks[index]}: {sizes[0]} px, its image has {sizes[1]}")
        return data.resize(pixels, (self.size, self.size)), mask


def batches_of(images, args, device, indices=None):
    """Yields (indices, float32 (b, C, size, size) normalised, on `device`, [masks])."""
    indices = np.arange(len(images)) if indices is None else np.asarray(indices)
    steps = [indices[first : first + args.batch_size] for first in range(0, len(indices), args.batch_size)]
    workers = Workers(WholeImages(images, args.in_chans, args.img_size), args.num_workers, device)
    for step, (x, masks) in zip(steps, workers.batches(lambda done: steps[done:]), strict=True):
        yield step, data.normalize(x.to(device).float() / 255, args.mean, args.std), masks


# ---- pixels and patches ----------------------------------------------------------------------------------------------


def patches_of_pixels(shape, grid):
    """(row of patches of each row of pixels (H,), column of each column (W,)): that in which its centre lies."""
    return [
        ((np.arange(pixels) + 0.5) * patches / pixels).astype(np.int64)
        for pixels, patches in zip(shape, grid, strict=True)
    ]


def patch_labels(mask, rows, columns):
    """uint8 (H, W) -> int64 (r, c): the class of most of a patch's pixels, of equals the lowest; IGNORED if none."""
    down, across = patches_of_pixels(mask.shape, (rows, columns))
    patches = down[:, None] * columns + across
    known = mask != IGNORED
    counts = np.bincount(patches[known] * VALUES + mask[known], minlength=rows * columns * VALUES)
    counts = counts.reshape(rows, columns, VALUES)
    return np.where(counts.any(axis=2), counts.argmax(axis=2), IGNORED)


def spread(grid, shape):
    """(r, c) -> (H, W): each pixel has its patch's value."""
    down, across = patches_of_pixels(shape, grid.shape)
    return grid[down][:, across]


def confusion(mask, predicted):
    """int64 (256, 256): pixels of each class (rows) by what they are taken for (columns); none that is ignored."""
    known = mask != IGNORED
    pairs = mask[known].astype(np.int64) * VALUES + predicted[known]
    return np.bincount(pairs, minlength=VALUES**2).reshape(VALUES, VALUES)


def scores_of(counts):
    """miou: mean over the classes that are there or were predicted of |truth and prediction| / |truth or prediction|;
    accuracy of pixels; iou of each class, by its number. All in percent."""
    hits, truth, predicted = counts.diagonal(), counts.sum(axis=1), counts.sum(axis=0)
    union = truth + predicted - hits
    iou = {int(label): 100 * hits[label] / union[label] for label in np.flatnonzero(union)}
    return {
        "miou": float(np.mean([*iou.values()])),
        "accuracy": 100 * float(hits.sum() / counts.sum()),
        "iou": {str(label): float(value) for label, value in iou.items()},
    }
