"""What a ViT looks at: its CLS token's attention in the last block, and its patch features as colours.

    python visualize_attention.py --checkpoint runs/x/checkpoint.pth --image_path photo.jpg --output_dir attention
    python visualize_attention.py --checkpoint dino_deitsmall8_pretrain.pth --image_path photos --image_size 480 480

Flags and files as in DINO's script: img.png, attn-head0.png, mask_th0.6_head0.png, ... Beside them pca.png and
overview.png, all in one figure. A folder of images gets a folder for each, and contact_sheet.png with all of them.

Shapes: H heads, h x w pixels, r x c patches, D width.
"""

import dataclasses
import math
import os
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch

import augmentation
import data
import evaluation
import images
import monitor
import pretrained
import utils
import vision_transformer
from images.decoding import known_endings
from images.folders import Walk
from utils import UserError

MOST_PIXELS = 480 * 640  # of an image at its own size: attention takes memory with the square of the patches
ROWS_PER_SHEET = 6
FILES = ("img.png", "pca.png", "overview.png")  # of an image, beside its heads' pictures
CLIPPED = 1  # percent of the patches at either end of a principal component


def get_args_parser():
    parser = utils.ArgumentParser("visualize_attention.py", "Attention maps and patch features of a ViT, as pictures.")
    pretrained.add_checkpoint_arguments(parser)
    parser.set_defaults(in_chans=None, mean=None, std=None)  # the checkpoint's
    add = parser.add_argument
    add(
        "--image_path", required=True, metavar="PATH",
        help="an image, or a folder of images with the folders below it; their patch features stay in memory",
    )  # fmt: skip
    add(
        "--image_size", type=utils.positive(int), nargs="+", default=None, metavar="PX",
        help="height and width, or one number for both, rounded to whole patches (default: the image's own size, "
        f"reduced to at most {MOST_PIXELS} pixels)",
    )  # fmt: skip
    add(
        "--threshold", type=utils.Number(float, least=0, most=1), default=0.6,
        help="masks: share of a head's attention, from 0 to 1, that the fewest patches hold together",
    )  # fmt: skip
    add(
        "--pca", choices=("joint", "each"), default="joint",
        help="principal components of all images' patches together, so that a colour means the same in all of them, or "
        "of each image alone",
    )  # fmt: skip
    add("--output_dir", default=".", help="folder for the pictures")
    return parser


@utils.command_line
def main(argv=None):
    args = get_args_parser().parse_args(argv)
    check_flags(args)
    device = utils.init_distributed(args.device)
    if utils.rank() > 0:
        return  # a few pictures are the work of one process
    folders = image_folders(args.image_path, Path(args.output_dir))
    model = open_vit(args, device)
    utils.make_folder(args.output_dir)
    seen = see_all(model.backbone, folders, args, device)
    colours, variance = pca_colours([image.tokens for image in seen], args.pca)
    for image, picture in zip(seen, colours, strict=True):
        utils.make_folder(folders[image.path])
        save_pictures(image, picture, args.threshold, folders[image.path])
        plot_overview(image, picture, args.threshold, folders[image.path] / "overview.png")
    if os.path.isdir(args.image_path):
        plot_contact_sheets(seen, colours, Path(args.output_dir))
    print(f"{args.output_dir}: {len(seen)} of {len(folders)} images; colours show {variance:.0f} % of the variance")


def check_flags(args):
    if args.image_size is not None and len(args.image_size) > 2:
        raise UserError(f"--image_size {args.image_size}: expected height and width in pixels, or one number for both")
    image, folder = Path(args.image_path).resolve(), Path(args.output_dir).resolve()
    if image in (folder, *folder.parents) or image in (folder / name for name in FILES):
        raise UserError(f"--output_dir {args.output_dir}: its pictures would mix with --image_path {args.image_path}")


def image_folders(image_path, output_dir):
    """{image file: folder of its pictures}: output_dir for one image; for a folder, one below it by the image's name,
    with its ending where two images differ in nothing else."""
    if not os.path.isdir(image_path):
        return {image_path: output_dir}
    names = [os.fsdecode(name) for name in Walk(image_path).names()]
    if not names:
        raise UserError(f"--image_path {image_path}: no image in it; looked for {' '.join(sorted(known_endings()))}")
    stems = [os.path.splitext(name)[0] for name in names]
    count = Counter(stems)
    return {
        os.path.join(image_path, name): output_dir / (stem if count[stem] == 1 else name)
        for name, stem in zip(names, stems, strict=True)
    }


def open_vit(args, device):
    """The model that the flags name; fills in args.in_chans, .mean, .std and how images are read."""
    args.value_range = args.pages = args.float_pixels = None
    model = pretrained.open_model(args, device)
    arch, dataset = model.settings["arch"], model.settings["dataset"]
    if not isinstance(model.backbone, vision_transformer.VisionTransformer):
        raise UserError(
            f"{args.checkpoint}: {arch} shows no attention; expected one of {', '.join(vision_transformer.ARCHS)}, "
            "without rotary positions or SwiGLU"
        )
    dataset = dataset if dataset in images.DATASETS else "imagefolder"
    pretrained.say_assumed_pixels(args, [model], dataset)
    known = images.DATASETS[dataset]
    for name in ("mean", "std"):
        if getattr(args, name) is None:
            setattr(args, name, data.fit_channels(known[name], args.in_chans))
    return model


# ---- an image -> what the model makes of it --------------------------------------------------------------------------


@dataclasses.dataclass
class SeenImage:
    """path; pixels: uint8 (h, w, 3), as the model got them; attention: float32 (H, r, c), what CLS gives to each patch
    of its attention, which sums to 1 with what it gives to itself and to registers; tokens: float32 (r, c, D)."""

    path: str
    pixels: np.ndarray
    attention: np.ndarray
    tokens: torch.Tensor


def see_all(backbone, paths, args, device):
    """A `SeenImage` of each image that can be read; bad ones are named. Raises UserError where none can be read."""
    seen = []
    for path in paths:
        try:
            image = images.reading_of(args).load(path, args.in_chans)
        except images.BadImage as error:
            if len(paths) == 1:
                raise UserError(f"--image_path {path}: {error}; expected an image") from error
            print(f"skipped {path}: {error}", file=sys.stderr)
        else:
            seen.append(see(backbone, path, image, args, device))
    if not seen:
        raise UserError(f"--image_path {args.image_path}: none of its {len(paths)} images can be read")
    return seen


def see(backbone, path, image, args, device):
    """image: levels (C, H, W) of any size."""
    size = size_in_patches(image.shape[1:], backbone.patch_size, args.image_size)
    image = augmentation.resize(image, size)
    x = augmentation.normalize(image[None].to(device) / 255, args.mean, args.std)
    with utils.autocast(device, args.precision):
        attention, tokens = attention_and_tokens(backbone, x)
    pixels = monitor.as_picture(image).permute(1, 2, 0).round().byte().numpy()
    return SeenImage(path, pixels, attention[0].float().cpu().numpy(), tokens[0].float().cpu())


def size_in_patches(own, patch_size, wanted=None):
    """(height, width) in pixels, the multiples of patch_size nearest to `wanted` (one or two numbers); None: to the
    image's `own` size, reduced to `MOST_PIXELS`, its aspect kept."""
    height, width = own if wanted is None else (wanted[0], wanted[-1])
    scale = 1 if wanted else min(1, math.sqrt(MOST_PIXELS / (height * width)))
    return tuple(max(1, round(scale * side / patch_size)) * patch_size for side in (height, width))


@torch.no_grad()
def attention_and_tokens(backbone, x):
    """Images (B, C, h, w) -> (B, H, r, c) and (B, r, c, D), in one pass.

    The first is row 0 of `get_last_selfattention` without CLS and registers, and without the memory of the other rows;
    the second are the patch tokens after the final norm.
    """
    grid = [side // backbone.patch_size for side in x.shape[2:]]
    last, inputs = backbone.blocks[-1].attn, []
    hook = last.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    tokens = backbone.get_intermediate_layers(x)[0]
    hook.remove()
    q, k, _ = last.project(inputs[0])
    attention, first = last.weights(q[:, :, :1], k), backbone.num_prefix_tokens  # (B, H, 1, P + N)
    return attention[:, :, 0, first:].unflatten(-1, grid), tokens[:, first:].unflatten(1, grid)


# ---- numbers -> colours ----------------------------------------------------------------------------------------------


def attention_mask(attention, threshold):
    """The fewest patches of each head that together hold the share `threshold` of its attention to patches, as DINO.

    attention: (H, r, c), not negative.  threshold: in [0, 1].  Returns bool (H, r, c).
    """
    flat = attention.reshape(len(attention), -1).astype(np.float64)
    order = flat.argsort(axis=1, kind="stable")
    rising = np.take_along_axis(flat, order, 1)
    mass = rising.cumsum(axis=1)  # from the faintest patch on
    kept = mass > (1 - threshold) * mass[:, -1:] * (1 + 1e-12)  # rounding does not let one more in
    mask = np.zeros_like(kept)
    np.put_along_axis(mask, order, kept, axis=1)
    return mask.reshape(attention.shape)


def pca_colours(tokens, how):
    """The first three principal components of patch features as red, green and blue.

    tokens: list of (r, c, D), of several images.  how: "joint" over all patches of all images, or "each" image alone.
    Each component runs from 0 to 1 between its percentiles `CLIPPED` and 100 - `CLIPPED`; one that does not vary is
    0.5. A component's sign, which PCA leaves open, makes its largest loading positive.
    Returns ([float64 (r, c, 3) in [0, 1], one per image], percent of the variance that the components hold).
    """
    groups = [tokens] if how == "joint" else [[each] for each in tokens]
    colours, shares = [], []
    for group in groups:
        scores, share = principal_components(torch.cat([each.flatten(0, 1) for each in group]))
        ends = np.cumsum([each.shape[0] * each.shape[1] for each in group])
        parts = np.split(to_unit_range(scores), ends[:-1])
        colours += [part.reshape(*each.shape[:2], 3) for part, each in zip(parts, group, strict=True)]
        shares.append(100 * share)
    return colours, float(np.mean(shares))


def principal_components(x, num=3):
    """(N, D) -> float64 (N, num), scores on the first components, and the share of the variance that they hold."""
    x = x.double() - x.double().mean(dim=0)
    variances, directions = torch.linalg.eigh(x.T @ x)  # rising
    directions = directions[:, -num:].flip(1)  # (D, num)
    largest = directions.gather(0, directions.abs().argmax(dim=0, keepdim=True))  # (1, num)
    share = variances[-num:].sum() / variances.sum().clamp_min(torch.finfo(x.dtype).tiny)
    return (x @ (directions * largest.sign())).numpy(), float(share)


def to_unit_range(scores):
    low, high = np.percentile(scores, [CLIPPED, 100 - CLIPPED], axis=0)
    varies = high - low > 1e-6 * np.abs(scores).max()  # what rounding leaves is not a signal
    return np.where(varies, ((scores - low) / np.where(varies, high - low, 1)).clip(0, 1), 0.5)


# ---- pictures --------------------------------------------------------------------------------------------------------


def save_pictures(image, colours, threshold, folder):
    """DINO's files and pca.png, each h x w pixels. A map is violet at its minimum and yellow at its maximum."""
    evaluation.save_picture(folder / "img.png", np.ascontiguousarray(image.pixels))
    evaluation.save_picture(folder / "pca.png", enlarged(colours, image))
    masks = attention_mask(image.attention, threshold)
    for head, (attention, mask) in enumerate(zip(image.attention, masks, strict=True)):
        evaluation.save_picture(folder / f"attn-head{head}.png", enlarged(attention, image))
        evaluation.save_picture(folder / f"mask_th{threshold:g}_head{head}.png", painted(image, {head: mask}))


def enlarged(patches, image):
    """(r, c, ...) -> (h, w, ...), every patch a square of one colour."""
    side = len(image.pixels) // len(patches)
    return patches.repeat(side, axis=0).repeat(side, axis=1)


def painted(image, masks):
    """The image in gray where no mask is set, and in the head's colour where one is; where several are, in that of the
    head with most of its attention there. masks: {head: bool (r, c)}. Returns uint8 (h, w, 3)."""
    plt = evaluation.pyplot()
    gray = np.repeat(image.pixels.mean(axis=2, keepdims=True) / 255, 3, axis=2)
    strength = np.stack([np.where(mask, image.attention[head], 0) for head, mask in masks.items()])
    colours = np.array([plt.matplotlib.colors.to_rgb(head_colour(head)) for head in masks])
    colour = enlarged(colours[strength.argmax(axis=0)], image)
    covered = enlarged(np.any(list(masks.values()), axis=0), image)[..., None]
    return np.rint(255 * np.where(covered, 0.4 * gray + 0.6 * colour, 0.6 * gray + 0.4)).astype(np.uint8)


def head_colour(head):
    return evaluation.PALETTE[head % len(evaluation.PALETTE)]


def plot_overview(image, colours, threshold, path):
    """One figure: image, mean attention, masks of all heads, patch features, then every head, framed in its colour."""
    plt = evaluation.pyplot()
    masks, mean = attention_mask(image.attention, threshold), image.attention.mean(axis=0)
    panels = [
        (short_name(image.path, 32), image.pixels),
        (f"mean of heads, {attention_range(mean)}", mean),
        (f"{100 * threshold:g} % of each head's attention", painted(image, dict(enumerate(masks)))),
        ("patch features, 3 components", colours),
        *((f"head {head}, {attention_range(attention)}", attention) for head, attention in enumerate(image.attention)),
    ]
    columns = 5 if len(panels) % 5 == 0 else 4
    rows = math.ceil(len(panels) / columns)
    height, width = image.pixels.shape[:2]
    figure, axes = plt.subplots(rows, columns, figsize=(2.6 * columns, rows * (2.6 * height / width + 0.3)))
    for axis, (title, picture) in zip(axes.flat, panels, strict=False):
        draw(axis, picture, title)
    for head, axis in enumerate(axes.flat[4 : len(panels)]):
        axis.spines[:].set(visible=True, color=head_colour(head), linewidth=3)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    evaluation.save_figure(figure, path)


def attention_range(attention):
    """What the colours of a map stand for."""
    return f"{100 * attention.min():.2f} to {100 * attention.max():.2f} %"


def short_name(path, most):
    """Of a file: its end, as much as fits above a panel."""
    name = os.path.basename(path)
    return name if len(name) <= most else f"...{name[3 - most :]}"


def draw(axis, picture, title=None):
    axis.imshow(picture, interpolation="nearest", cmap="viridis")
    axis.set_title(title, fontsize=8)
    axis.set(xticks=[], yticks=[])
    axis.grid(False)
    axis.spines[:].set_visible(False)


def plot_contact_sheets(seen, colours, folder):
    """A row for each image: itself, the mean of its heads' attention, its patch features; a file for every
    `ROWS_PER_SHEET` of them."""
    plt = evaluation.pyplot()
    rows = list(zip(seen, colours, strict=True))
    for sheet, start in enumerate(range(0, len(rows), ROWS_PER_SHEET)):
        chosen = rows[start : start + ROWS_PER_SHEET]
        heights = [2.2 * len(image.pixels) / image.pixels.shape[1] for image, _ in chosen]
        figure, axes = plt.subplots(
            len(chosen), 3, squeeze=False, figsize=(7, sum(heights) + 0.25 * len(chosen)), height_ratios=heights
        )
        for line, (image, picture) in zip(axes, chosen, strict=True):
            mean = image.attention.mean(axis=0)
            draw(line[0], image.pixels, short_name(image.path, 34))
            draw(line[1], mean, f"attention, {attention_range(mean)}")
            draw(line[2], picture, "patch features")
        evaluation.save_figure(figure, folder / f"contact_sheet{f'_{sheet + 1}' if sheet else ''}.png")


if __name__ == "__main__":
    main()
