"""How a view is made from pixels: random crops and flips, then colours, blur, solarisation, noise, normalisation.

    recipe = make_recipe(args)                                            # of a preset: dino, small or cifar
    views = make_views(recipe, epoch, indices, device, images=images)     # a set in memory: everything on the device

    for group in recipe.view_groups():                                    # files: one image, in a worker process
        crops = crop_image(image, view_draws(recipe, epoch, [index], group.views), group, recipe)
    views = make_views(recipe, epoch, indices, device, crops=crops)       # its crops, batched: the rest on the device

Nothing here has a generator with a past. Everything drawn about a view is a function of (seed, epoch, image index,
view), see `uniform`; so a run resumed at any step, with any number of workers or processes, sees the same views. The
one exception, the pixel noise of the `small` recipe, comes from torch's generator, which the training loop reseeds
every step from (seed, step, rank).

Shapes: B images, V views, C channels, H x W image, h x w crop, n = views of one size x B.
"""

import argparse
import dataclasses
import functools
import itertools
import math

import numpy as np
import torch
import torch.nn.functional as F

from utils import Number, UserError

# Flags ----------------------------------------------------------------------------------------------------------------

# Of each preset: the area of global crops; whether an image that is not larger than --img_size is padded and shifted
# instead; the probabilities of a `Recipe`; its largest jitter; its noise.
PRESETS = {
    "dino": {  # DataAugmentationDINO in main_dino.py
        "global_crops_scale": (0.4, 1.0),
        "pad_crop": False,
        "jitter": 0.8,
        "jitter_strength": (0.4, 0.4, 0.2, 0.1),
        "grayscale": 0.2,
        "blur": (1.0, 0.1, 0.5),
        "solarize": (0.0, 0.2, 0.0),
        "noise_std": 0.0,
    },
    # What Table 6 of the CPLearn paper leaves open is as in its authors' utils/data.py (github.com/emsansone/CPLearn)
    "small": {
        "global_crops_scale": (0.4, 1.0),
        "pad_crop": True,
        "jitter": 0.1,
        "jitter_strength": (0.4, 0.4, 0.4, 0.1),
        "grayscale": 0.1,
        "blur": (0.0, 0.0, 0.0),
        "solarize": (0.0, 0.0, 0.0),
        "noise_std": 0.03,
    },
    "cifar": {  # of no one paper: common practice of public self-supervised recipes for CIFAR
        "global_crops_scale": (0.2, 1.0),
        "pad_crop": False,
        "jitter": 0.8,
        "jitter_strength": (0.4, 0.4, 0.4, 0.1),
        "grayscale": 0.2,
        "blur": (0.0, 0.0, 0.0),
        "solarize": (0.0, 0.0, 0.0),
        "noise_std": 0.0,
    },
}


def add_augmentation_arguments(parser):
    """Adds the flags that say how views are made in training; None: see `resolve_augmentation_defaults`."""
    add = parser.add_argument
    add(
        "--augmentation",
        default=None,
        choices=list(PRESETS),
        help="dino: random resized crop, flip, colour jitter, grayscale, blur, solarisation, for photographs. small: "
        "Table 6 of the CPLearn paper: padded crop, flip (not for svhn), rare jitter and grayscale, pixel noise. "
        "cifar: dino without blur and solarisation, which blot out small colour images. Default: dino for imagefolder, "
        "small for the others; choose small or cifar for folders of tiny images",
    )
    add_probability_arguments(parser)
    add(
        "--global_crops_scale",
        type=Number(float, above=0, most=1),
        nargs=2,
        default=None,
        metavar=("MIN", "MAX"),
        help="area of a global crop, as a fraction of the image; a lower MIN makes views differ more. Default: 0.4 1, "
        "with cifar 0.2 1. DINO takes 0.25 1 when it adds local crops",
    )
    add(
        "--local_crops_number",
        type=Number(int, least=0, most=100),
        default=0,
        help="small crops besides the two global ones; 0 is the paper. More cost time and memory per step and may need "
        "fewer epochs",
    )
    add(
        "--local_crops_scale",
        type=Number(float, above=0, most=1),
        nargs=2,
        default=(0.05, 0.4),
        metavar=("MIN", "MAX"),
        help="area of a local crop, as a fraction of the image",
    )
    add(
        "--local_crops_size",
        type=Number(int, least=1, most=2**15),
        default=None,
        help="side of the local crops in pixels; default 96 at --img_size 224, else in that proportion, to a multiple "
        "of --patch_size",
    )


def add_probability_arguments(parser):
    """Adds a flag for each operation's probability; None: the preset's."""
    operations = {
        "flip": "a mirrored view; 0 where left and right differ, as in letters. Default: 0.5, for svhn 0",
        "jitter": "changed brightness, contrast, saturation and hue; with other than 1 or 3 channels brightness and "
        "contrast of each channel alone. Default: 0.8, with small 0.1",
        "grayscale": "a view without colours; 0 where colour tells images apart. Default: 0.2, with small 0.1",
        "blur": "a blurred view, by 0.1 to 2 px, less in crops below 96 px. Default: 0, with dino 1, 0.1 and 0.5 for "
        "the first, the second and the local views",
        "solarize": "inverted highlights. Default: 0, with dino 0.2 for the second view",
    }
    for name, text in operations.items():
        text = f"probability, in every view, of {text}"
        parser.add_argument(f"--{name}", type=Number(float, least=0, most=1), default=None, help=text)
    parser.add_argument(
        "--rotate90",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="turn each view by 0, 90, 180 or 270 degrees, as likely each, for images without an up: cells, satellites",
    )


def resolve_augmentation_defaults(args):
    """Fills in, in place, every flag of this file that is None, and checks the values.

    args: a namespace with the flags of `add_augmentation_arguments`, `dataset`, `patch_size`, the resolved `img_size`.
    Raises UserError for a value that makes no sense.
    """
    if args.augmentation is None:
        args.augmentation = "dino" if args.dataset == "imagefolder" else "small"
    if args.global_crops_scale is None:
        args.global_crops_scale = PRESETS[args.augmentation]["global_crops_scale"]
    if args.local_crops_size is None:
        patch_size = args.patch_size or 16  # of --init_from's file, which is not read yet
        args.local_crops_size = patch_size * max(1, round(args.img_size * 96 / 224 / patch_size))
    for name in ("global_crops_scale", "local_crops_scale"):
        low, high = getattr(args, name)
        if low > high:
            raise UserError(f"--{name} {low:g} {high:g}: expected MIN <= MAX")
    if args.augmentation == "small" and args.img_size <= PADDING:
        raise UserError(
            f"--img_size {args.img_size} is too small for --augmentation small, which pads by {PADDING} px: take dino"
        )


# Recipe ---------------------------------------------------------------------------------------------------------------

BLUR_SIGMA = (0.1, 2.0)  # px, of crops of BLUR_SIZE px and more; of smaller ones that share of their side
BLUR_SIZE = 96  # px: DINO's smallest crops
SOLARIZE_THRESHOLD = 128 / 255
PADDING = 4  # px on each side


def make_recipe(args):
    """The preset --augmentation, with the probabilities that flags give instead of its own.

    dino: DINO's, for photographs: resized crops of 40 to 100 % of the area, bicubic; flip 0.5; colour jitter 0.8 of
        brightness 0.4, contrast 0.4, saturation 0.2, hue 0.1; grayscale 0.2; Gaussian blur 1 and 0.1 in the two global
        views, 0.5 in local ones, of 0.1 to 2 px, or less in crops below 96 px, in proportion (DINO has none; at 28 px
        the whole blur would leave no picture); solarisation 0.2 in the second.
    small: the CPLearn paper's for small images: 4 px of the image mirrored around it, then a crop of its own size (an
        image larger than --img_size gets dino's resized crop instead, and so do local crops); flip 0.5; jitter 0.1 of
        0.4, 0.4, 0.4, 0.1; grayscale 0.1; noise of 0.03 after normalisation.
    cifar: common practice of public self-supervised recipes for small colour images, of no one paper: resized crops of
        20 to 100 %; flip 0.5; jitter 0.8 of 0.4, 0.4, 0.4, 0.1; grayscale 0.2; no blur, no solarisation.
    SVHN's digits are not flipped.
    """
    preset = PRESETS[args.augmentation]
    given = {name: getattr(args, name) for name in ("jitter", "grayscale", "blur", "solarize")}
    chosen = preset | {name: value for name, value in given.items() if value is not None}
    own_flip = 0.0 if args.dataset == "svhn" else 0.5
    return Recipe(
        seed=args.seed,
        in_chans=args.in_chans,
        mean=tuple(args.mean),
        std=tuple(args.std),
        global_views=ViewGroup((0, 1), args.img_size, tuple(args.global_crops_scale), preset["pad_crop"]),
        local_views=ViewGroup(
            tuple(range(2, 2 + args.local_crops_number)), args.local_crops_size, tuple(args.local_crops_scale), False
        ),
        flip=own_flip if args.flip is None else args.flip,
        jitter=chosen["jitter"],
        jitter_strength=preset["jitter_strength"],
        grayscale=chosen["grayscale"],
        blur=tuple(np.broadcast_to(chosen["blur"], 3).tolist()),  # a flag's is of every view
        solarize=tuple(np.broadcast_to(chosen["solarize"], 3).tolist()),
        noise_std=preset["noise_std"],
        rotate90=args.rotate90,
    )


def make_crop_recipe(args):
    """One view per image, as linear classifiers are trained on (eval_linear.py of DINO): a random resized crop of 8 to
    100 % of the area, bilinear, flipped with probability 1/2 (not svhn), and nothing else. args: resolved flags of the
    data, and args.seed."""
    nothing = (0.0, 0.0, 0.0)
    return Recipe(
        seed=args.seed,
        in_chans=args.in_chans,
        mean=tuple(args.mean),
        std=tuple(args.std),
        global_views=ViewGroup((0,), args.img_size, (0.08, 1.0), pad_crop=False),
        local_views=ViewGroup((), args.img_size, (0.08, 1.0), pad_crop=False),
        flip=0.0 if args.dataset == "svhn" else 0.5,
        jitter=0.0,
        jitter_strength=(0.0, *nothing),
        grayscale=0.0,
        blur=nothing,
        solarize=nothing,
        noise_std=0.0,
        interpolation="bilinear",
    )


@dataclasses.dataclass(frozen=True)
class ViewGroup:
    """The views of one size: they go through every operation together."""

    views: tuple  # 0 and 1 are the global ones
    size: int  # px
    scale: tuple  # area of the crop, fraction of the image
    pad_crop: bool  # a shifted image instead of a resized crop, where the image is not larger than `size`


@dataclasses.dataclass(frozen=True)
class Recipe:
    """An augmentation's parameters. Probabilities that depend on the view: (global 1, global 2, every local one)."""

    seed: int
    in_chans: int
    mean: tuple
    std: tuple
    global_views: ViewGroup
    local_views: ViewGroup
    flip: float
    jitter: float
    jitter_strength: tuple  # largest change of brightness, contrast, saturation (factors), hue (turns of the wheel)
    grayscale: float
    blur: tuple
    solarize: tuple
    noise_std: float  # in units of the normalised image
    interpolation: str = "bicubic"  # of resized crops; or "bilinear"
    rotate90: bool = False

    def describe(self, channels):
        """The operations that change images of so many channels, and their probabilities (of noise its size)."""
        jitter = {1: "brightness and contrast", 3: "brightness, contrast, saturation and hue"}
        chances = {
            "flip": self.flip,
            "turns by 90 degrees": 0.75 * self.rotate90,
            jitter.get(channels, "brightness and contrast of each channel"): self.jitter,
            "grayscale": self.grayscale * (channels == 3),
            "blur": self.blur[: 3 if self.local_views.views else 2],
            "solarisation": self.solarize[: 3 if self.local_views.views else 2] if channels in (1, 3) else 0,
            "noise": self.noise_std,
        }
        run = [f"{name} {'/'.join(f'{chance:g}' for chance in np.atleast_1d(chances))}"
               for name, chances in chances.items() if np.any(chances)]  # fmt: skip
        return f"views: {', '.join(['crops', *run])}; channels: {channels}"

    def view_groups(self):
        return [group for group in (self.global_views, self.local_views) if group.views]


# Views ----------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def make_views(recipe, epoch, indices, device, images=None, crops=None):
    """Views of a batch, ready for the network.

    indices: (B,) int64, the images in the batch.
    images:  uint8 (B, C, H, W), whole images of one size, cropped here; or
    crops:   of each size a tensor (n, C, h, w), levels 0..255, uint8 or float32, cropped and flipped already by
             `crop_image`: all images of the size's first view, then all of the second, ...
    Returns V float32 tensors (B, in_chans, h, w) on `device`, normalised: the two global ones, then the local ones.
    The chain runs in float32 on [0, 1] and is not rounded to 255 levels between the operations, as PIL's is. Nothing
    here waits for the device.
    """
    device, views = torch.device(device), []
    with torch.autocast(device.type, enabled=False):
        if images is not None:  # gray stays one channel until the end
            images = images.to(device, non_blocking=True)
            images = match_channels(images, min(recipe.in_chans, images.shape[1]))
        for number, group in enumerate(recipe.view_groups()):
            draws = view_draws(recipe, epoch, indices, group.views)  # (n, NUM_DRAWS), on the host
            if images is not None:
                x = crop_batch(images, draws, group, recipe)
            else:
                x = crops[number].to(device, non_blocking=True).float()
            x = photometric(x.div_(255), draws, group, recipe)  # (n, C, h, w)
            x = normalize(match_channels(x, recipe.in_chans), recipe.mean, recipe.std)
            if recipe.noise_std:
                x.add_(torch.randn_like(x), alpha=recipe.noise_std)
            views += x.chunk(len(group.views))
    return views


def view_draws(recipe, epoch, indices, views):
    """(n, NUM_DRAWS), and more where each channel has its own brightness and contrast: all images of the first view,
    then all of the second, ..."""
    num_draws = NUM_DRAWS + (0 if recipe.in_chans in (1, 3) else 2 * recipe.in_chans)
    return uniform(recipe.seed, epoch, np.tile(indices, len(views)), np.repeat(views, len(indices)), num_draws)


# Random numbers -------------------------------------------------------------------------------------------------------

# Columns of a view's draws. Ten attempts at a crop, as torchvision makes them.
AREA, ASPECT = slice(0, 10), slice(10, 20)
TOP, LEFT, FLIP, JITTER, ORDER, BRIGHTNESS, CONTRAST, SATURATION, HUE, GRAY, BLUR, SIGMA, SOLARIZE, TURN = range(20, 34)
NUM_DRAWS = 34


def uniform(seed, epoch, indices, view, num_draws):
    """Independent uniform numbers as a function of their coordinates.

    seed, epoch: ints. indices, view: ints or integer arrays of one shape (n,), or of shapes that broadcast to it.
    Returns float64 (n, num_draws) in [0, 1). Column k does not depend on num_draws.
    Each coordinate is added to a word which the finaliser of SplitMix64 (Steele, Lea, Flood 2014) then scrambles.
    """
    word = np.zeros(1, np.uint64)
    for coordinate in (seed, epoch, indices, view):
        word = scramble(word + np.atleast_1d(np.asarray(coordinate)).astype(np.int64).view(np.uint64) * GOLDEN + GOLDEN)
    word = scramble(word[:, None] + np.arange(1, num_draws + 1, dtype=np.uint64) * GOLDEN)
    return (word >> np.uint64(11)) * 2.0**-53


GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def scramble(word):
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))


# Crop, resize, flip ---------------------------------------------------------------------------------------------------


def crop_image(image, draws, group, recipe):
    """Levels (C, H, W), uint8 or float32, draws (V, NUM_DRAWS) -> V crops (C, size, size)."""
    height, width = image.shape[1:]
    shifted = group.pad_crop and max(height, width) <= group.size
    if shifted:
        image = F.pad(resize(image, (group.size, group.size)), [PADDING] * 4, mode="reflect")
        corners = shifts(draws) + PADDING
        boxes = np.concatenate([corners, np.full_like(corners, group.size)], axis=1)
    else:
        boxes = resized_crop_boxes(draws, height, width, group.scale)
    for (top, left, h, w), flip in zip(boxes.tolist(), draws[:, FLIP] < recipe.flip, strict=True):
        crop = resize(image[:, top : top + h, left : left + w], (group.size, group.size), recipe.interpolation)
        yield crop.flip(-1) if flip else crop


def crop_batch(images, draws, group, recipe):
    """uint8 (B, C, H, W), draws (n, NUM_DRAWS) -> float32 (n, C, size, size), levels 0..255: crop, resize, flip.

    One matrix per axis and image does it: crop = down @ image @ right^T, rounded after each product, as PIL rounds.
    """
    size = group.size
    shifted = group.pad_crop and max(images.shape[2:]) <= size
    if shifted:
        images = resize_batch(images, size)
        boxes = shifts(draws)
    else:
        boxes = resized_crop_boxes(draws, *images.shape[2:], group.scale)
    flip = draws[:, FLIP] < recipe.flip
    *box, flip = send(np.concatenate([boxes, flip[:, None]], axis=1).astype(np.float32), images.device).unbind(1)
    if shifted:
        down, right = (shift_matrix(start, size) for start in box)
    else:
        lines = zip(box[:2], box[2:], images.shape[2:], strict=True)
        down, right = (resize_matrix(*line, size, recipe.interpolation) for line in lines)
    right = torch.where(flip[:, None, None] > 0, right.flip(1), right)
    x = images.float().repeat(len(group.views), 1, 1, 1)  # (n, C, H, W)
    n, channels, height, width = x.shape
    x = torch.bmm(x.reshape(n, channels * height, width), right.transpose(1, 2)).round_().clamp_(0, 255)
    return torch.matmul(down[:, None], x.reshape(n, channels, height, size)).round_().clamp_(0, 255)


def resized_crop_boxes(draws, height, width, scale, ratio=(3 / 4, 4 / 3)):
    """Boxes of torchvision's RandomResizedCrop: of ten attempts the first that fits in the image, else the centre.

    draws: (n, NUM_DRAWS). height, width: px, of one image or (n,). scale: range of the box's share of the area.
    Returns int64 (n, 4): top, left, height, width in px.
    """
    height, width = (np.broadcast_to(size, len(draws)).astype(np.float64) for size in (height, width))
    area = (height * width)[:, None] * (scale[0] + (scale[1] - scale[0]) * draws[:, AREA])
    aspect = np.exp(np.log(ratio[0]) + np.log(ratio[1] / ratio[0]) * draws[:, ASPECT])
    h, w = np.rint(np.sqrt(area / aspect)), np.rint(np.sqrt(area * aspect))
    fits = (h > 0) & (w > 0) & (h <= height[:, None]) & (w <= width[:, None])
    first = fits.argmax(1), np.arange(len(draws))
    found = fits.any(1)
    h = np.where(found, h.T[first], np.minimum(height, np.rint(width / ratio[0])))
    w = np.where(found, w.T[first], np.minimum(width, np.rint(height * ratio[1])))
    top = np.where(found, np.floor(draws[:, TOP] * (height - h + 1)), (height - h) // 2)
    left = np.where(found, np.floor(draws[:, LEFT] * (width - w + 1)), (width - w) // 2)
    return np.stack([top, left, h, w], axis=1).astype(np.int64)


def shifts(draws):
    """Where a crop of the image's own size begins in it, int64 (n, 2): down, right, from -PADDING to PADDING px."""
    return np.floor(draws[:, [TOP, LEFT]] * (2 * PADDING + 1)).astype(np.int64) - PADDING


def resize(image, size, interpolation="bicubic"):
    """Levels (C, H, W) -> (C, *size), with antialiasing, within 0..255: PIL's resize, and torchvision's."""
    if tuple(image.shape[1:]) == tuple(size):
        return image
    resized = F.interpolate(image[None], size=size, mode=interpolation, antialias=True)[0]
    return resized.clamp_(0, 255) if resized.is_floating_point() else resized


def resize_batch(images, size):
    """uint8 (B, C, H, W) -> uint8 (B, C, size, size). Deterministic, on any device."""
    if images.shape[2:] == (size, size):
        return images
    start = torch.zeros(1, device=images.device)
    down, right = (resize_matrix(start, start + length, length, size)[0] for length in images.shape[2:])
    x = (images.float() @ right.T).round_().clamp_(0, 255)
    return (down @ x).round_().clamp_(0, 255).to(torch.uint8)


def resize_matrix(start, length, in_size, out_size, interpolation="bicubic"):
    """Weights that resize pixels [start, start + length) of a line to out_size pixels, as PIL does with antialiasing.

    start, length: float32 (n,), px. Returns float32 (n, out_size, in_size); rows sum to 1.
    """
    pixel = torch.arange(in_size, device=start.device)
    scale = length / out_size
    centre = start[:, None] + scale[:, None] * (torch.arange(out_size, device=start.device) + 0.5)  # (n, out)
    distance = pixel + 0.5 - centre[:, :, None]  # (n, out, in)
    d = distance.div_(scale.clamp(min=1)[:, None, None]).abs_().clamp_(max=2)
    if interpolation == "bilinear":
        near, far = 1 - d, torch.zeros_like(d)
    else:
        near, far = (1.5 * d - 2.5) * d * d + 1, ((2.5 - 0.5 * d) * d - 4) * d + 2  # Keys, a = -1/2
    inside = (pixel >= start[:, None]) & (pixel < (start + length)[:, None])  # (n, in)
    weights = torch.where(d < 1, near, far).mul_(inside[:, None])
    return weights.div_(weights.sum(2, keepdim=True))


def shift_matrix(start, size):
    """float32 (n, size, size) that takes pixel start + i to i, mirrored at the edges, which are not repeated."""
    pixel = torch.arange(size, device=start.device)
    source = size - 1 - ((start[:, None] + pixel).abs() - (size - 1)).abs()  # (n, size)
    return (pixel == source[:, :, None]).float()


# Colours, blur, solarisation ------------------------------------------------------------------------------------------


def photometric(x, draws, group, recipe):
    """Changes x, float32 (n, C, h, w) on [0, 1], in place, as draws, (n, NUM_DRAWS) on the host, say. Returns it."""
    view = np.repeat(np.minimum(group.views, 2), len(draws) // len(group.views))  # 2: any local view
    blur_sigma = BLUR_SIGMA[0] + (BLUR_SIGMA[1] - BLUR_SIGMA[0]) * draws[:, SIGMA]
    blur_sigma *= min(1, group.size / BLUR_SIZE)
    channels = x.shape[1]
    changes = list(quarter_turns(draws)) if recipe.rotate90 else []
    changes += color_jitter(draws, draws[:, JITTER] < recipe.jitter, recipe.jitter_strength, channels)
    if channels == 3:
        changes.append((draws[:, GRAY] < recipe.grayscale, grayscale, None))
    changes.append((draws[:, BLUR] < np.array(recipe.blur)[view], gaussian_blur, blur_sigma))
    if channels in (1, 3):
        changes.append((draws[:, SOLARIZE] < np.array(recipe.solarize)[view], solarize, None))
    return change(x, changes)


def quarter_turns(draws):
    """0, 1, 2 or 3 of them, counter-clockwise, as likely each."""
    for turns in (1, 2, 3):
        yield np.floor(4 * draws[:, TURN]) == turns, functools.partial(torch.rot90, k=turns, dims=(2, 3)), None


def color_jitter(draws, chosen, strength, channels):
    """torchvision's ColorJitter: brightness, contrast, saturation, hue, in an order of its own for each image. Of 1
    channel the first two; of more than 3, or 2, the first two with a factor of its own for each channel."""
    operations = [(adjust_brightness, BRIGHTNESS), (adjust_contrast, CONTRAST)]
    if channels == 3:  # these leave gray as it is
        operations += [(adjust_saturation, SATURATION), (adjust_hue, HUE)]
    elif channels != 1:
        of_channel = np.arange(NUM_DRAWS, NUM_DRAWS + channels)
        operations = [(adjust_brightness, of_channel), (adjust_contrast, of_channel + channels)]
    orders = np.array(list(itertools.permutations(range(len(operations)))))
    order = orders[(draws[:, ORDER] * len(orders)).astype(int)]  # (n, operations)
    for position in range(len(operations)):
        for number, (operation, column) in enumerate(operations):
            middle = 0 if operation is adjust_hue else 1
            factor = middle + strength[number] * (2 * draws[:, column] - 1)
            yield chosen & (order[:, position] == number), operation, factor


def change(x, changes):
    """x[chosen] = operation(x[chosen], factor[chosen]) for each (chosen, operation, factor); returns x.

    chosen, (n,) bool, and factor, (n,), (n, C) or None, are on the host: lists of indices go to the device, all at
    once, and none comes back."""
    changes = [(np.flatnonzero(chosen), operation, factor) for chosen, operation, factor in changes if chosen.any()]
    if not changes:
        return x
    counts = [len(rows) for rows, *_ in changes]
    factors = [np.zeros(0) if factor is None else factor[rows].ravel() for rows, _, factor in changes]
    sizes = [len(factor) for factor in factors]
    factors = send(np.concatenate(factors).astype(np.float32), x.device).split(sizes)
    places = send(np.concatenate([rows for rows, *_ in changes]), x.device).split(counts)
    for (_, operation, given), rows, factor in zip(changes, places, factors, strict=True):
        factor = () if given is None else (factor.view(len(rows), -1, 1, 1),)
        if len(rows) == len(x):
            x.copy_(operation(x.clone(), *factor))
        else:
            x.index_copy_(0, rows, operation(x.index_select(0, rows), *factor))
    return x


# The operations below may overwrite their input. x: float32 (n, C, h, w) on [0, 1], factors (n, 1 or C, 1, 1).


def adjust_brightness(x, factor):
    return x.mul_(factor).clamp_(0, 1)


def adjust_contrast(x, factor):
    return blend(x, luma(x).mean(dim=(2, 3), keepdim=True), factor)


def adjust_saturation(x, factor):
    return blend(x, luma(x), factor)


def adjust_hue(x, turns):
    """Adds `turns` of the colour wheel to the hue of HSV."""
    high, low = x.amax(1), x.amin(1)
    chroma = high - low
    red, green, blue = ((high - channel) / chroma.clamp(min=1e-12) for channel in x.unbind(1))
    sixths = torch.where(high == x[:, 1], 2 + red - blue, 4 + green - red)  # of the wheel
    sixths = torch.where(high == x[:, 0], blue - green, sixths) + 6 * turns[:, 0]
    for channel, offset in enumerate((5, 3, 1)):  # HSV to RGB without its six cases
        k = (sixths + offset).remainder_(6)
        x[:, channel] = high - chroma * torch.minimum(k, 4 - k).clamp_(0, 1)
    return x


def blend(x, other, factor):
    return x.mul_(factor).add_((1 - factor) * other).clamp_(0, 1)


def grayscale(x):
    return luma(x).expand_as(x)


def solarize(x):
    return torch.where(x >= SOLARIZE_THRESHOLD, 1 - x, x)


def gaussian_blur(x, sigma):
    """Gaussian of `sigma` px, edges continued. A matrix per axis, as sigma differs between images."""
    down, right = (blur_matrix(sigma[:, :, 0, 0], size)[:, None] for size in x.shape[2:])
    return down @ (x @ right.transpose(2, 3))


def blur_matrix(sigma, size):
    """sigma (n, 1) px -> float32 (n, size, size): row i makes pixel i; what falls beyond an edge goes to the edge."""
    radius = math.ceil(4 * BLUR_SIGMA[1])
    offset = torch.arange(-radius, radius + 1, device=sigma.device)
    kernel = torch.exp(-0.5 * (offset / sigma) ** 2)  # (n, 2 radius + 1)
    kernel = F.pad(kernel / kernel.sum(1, keepdim=True), (0, size))  # (n, row of a padded Toeplitz matrix)
    toeplitz = kernel.repeat(1, size)[:, : size * (size + 2 * radius)].view(-1, size, size + 2 * radius)
    matrix = toeplitz[:, :, radius : radius + size].clone()
    matrix[:, :, 0] += toeplitz[:, :, :radius].sum(2)
    matrix[:, :, -1] += toeplitz[:, :, radius + size :].sum(2)
    return matrix


# Channels, normalisation ----------------------------------------------------------------------------------------------


def match_channels(x, channels):
    """(n, C, h, w) -> (n, channels, h, w): gray repeated, colour turned to gray (uint8 stays uint8)."""
    if x.shape[1] == channels:
        return x
    if x.shape[1] == 1:
        return x.expand(-1, channels, -1, -1)
    return luma(x.float()).round_().to(torch.uint8) if x.dtype == torch.uint8 else luma(x)


def luma(x):
    """(n, 3, h, w) -> (n, 1, h, w) by ITU-R 601-2, as PIL; other channel counts come back as they are."""
    return 0.299 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:] if x.shape[1] == 3 else x


def normalize(x, mean, std):
    """x on [0, 1] -> (x - mean) / std per channel; a new tensor."""
    mean, std = (send(np.array(values, np.float32), x.device)[:, None, None] for values in (mean, std))
    return (x - mean) / std


def send(array, device):
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
