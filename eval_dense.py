"""Segmentation from frozen patch features: is what a patch shows in its feature?

    python eval_dense.py --checkpoint dino.pth --data_path VOCdevkit/VOC2012 --img_size 448 --baselines --output_dir out

--data_path has Pascal VOC's layout: JPEGImages, SegmentationClass with a PNG for each image whose values are classes,
255 ignored, and ImageSets/Segmentation with train.txt and val.txt. Each image is squeezed to a square of --img_size.
Of the training images, patches are drawn, each with the class of most of its pixels; k-NN and a linear classifier are
made from them. Both name the class of each patch of the validation images, each pixel has its patch's class, and is
compared with the mask at the mask's own size. Nothing is interpolated, so borders are as coarse as the patches: numbers
lie below the scores of papers that interpolate the classifier's output.

Writes results_dense.json (with the IoU of each class), results_dense.md and dense_<model>.png: images, masks, both
segmentations, and k-means of the patch features, which needs no label. It works in one process; others end at once.

Shapes: M training patches, B images, r x c patches, D features.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import evaluation
import utils
from evaluation import dense
from evaluation.clustering import kmeans
from evaluation.gallery import label_text, thumbnail
from evaluation.knn import choose_search, knn_classify
from evaluation.linear_probe import fit_selected
from evaluation.patches import WithPatches
from images import reading_of
from running.watch import Watch
from utils import UserError

COLUMNS = {
    "checkpoint": ("checkpoint", ""),
    "method": ("method", ""),
    "miou": ("mean IoU %", ".2f"),
    "accuracy": ("pixels %", ".2f"),
    "num_classes": ("classes", "d"),
}
LARGEST_SIDE = 16  # of a patch of raw pixels, in the baseline: larger ones are averaged to it


def get_args_parser():
    parser = evaluation.evaluation_parser("eval_dense.py", "Segmentation from frozen patch features.")
    parser.set_defaults(dataset="imagefolder", batch_size=16)
    add = parser.add_argument
    add("--nb_knn", type=utils.positive(int), default=20, help="nearest training patches that vote")
    add(
        "--temperature", type=utils.positive(float), default=0.07,
        help="votes weigh exp(similarity / temperature)",
    )  # fmt: skip
    add(
        "--num_patches", type=utils.positive(int), default=100_000,
        help="training patches, as many of each image, drawn by --seed; they stay in memory",
    )  # fmt: skip
    add(
        "--kmeans", type=utils.Number(int, least=2, most=20), default=6,
        help="clusters of the patch features in the pictures",
    )  # fmt: skip
    add("--pictures", type=utils.Number(int, least=0, most=64), default=6, help="validation images that are drawn")
    return parser


@utils.command_line
def main(argv=None):
    args = get_args_parser().parse_args(argv)
    check_flags(args)
    device = utils.init_distributed(args.device)
    if utils.world_size() > 1:
        evaluation.note("eval_dense.py works in one process")
    if utils.rank() > 0:
        return
    models = evaluation.open_models(args, device)
    sets = [dense.open_masked(args.data_path, split, reading_of(models[0].args)) for split in ("train", "val")]
    rows = []
    for evaluated, seer in zip(models, seers(models, args), strict=True):
        rows += evaluate(evaluated, seer.to(device), *sets, args)
        seer.cpu()
    counts = {"num_train": len(sets[0]), "num_test": len(sets[1])}
    evaluation.report("dense", rows, COLUMNS, args, models, **counts)


def check_flags(args):
    if args.dataset != "imagefolder":
        raise UserError(f"--dataset {args.dataset}: has no masks; give a folder in Pascal VOC's layout as --data_path")
    if not isinstance(args.data_path, str):
        raise UserError("--data_path: expected one folder in Pascal VOC's layout")
    for name in ("features_dir", "class_list"):
        if getattr(args, name) is not None:
            raise UserError(f"--{name} {getattr(args, name)}: has no meaning in eval_dense.py; leave it out")


# ---- patch features --------------------------------------------------------------------------------------------------


def seers(models, args):
    """For each model what makes (features, patches (B, r, c, D)) of images."""
    own = models[-len(args.checkpoint) :]
    found = [WithPatches(each.model.backbone).eval() for each in own]
    if args.baselines:
        _, untrained = models[:2]
        grid = grid_of(found[0], own[0].args)
        found = [PixelPatches(grid).eval(), WithPatches(untrained.model.backbone).eval(), *found]
    for evaluated, seer in zip(models, found, strict=True):
        grid_of(seer, evaluated.args)  # before an image is read
    return found


@torch.no_grad()
def grid_of(seer, args):
    """(r, c); raises UserError where the network takes no images of this size."""
    with evaluation.trying_size(args.img_size, "has no patches of such images"):
        return seer(torch.zeros(1, args.in_chans, args.img_size, args.img_size))[1].shape[1:3]


class PixelPatches(nn.Module):
    """The baseline that needs no network: a patch's own pixels."""

    def __init__(self, grid):
        super().__init__()
        self.grid = grid

    def forward(self, images):
        rows, columns = self.grid
        side = min(LARGEST_SIDE, images.shape[2] // rows, images.shape[3] // columns)
        x = F.adaptive_avg_pool2d(images, (side * rows, side * columns))
        x = x.unflatten(2, (rows, side)).unflatten(4, (columns, side))  # (B, C, r, side, c, side)
        return None, x.permute(0, 2, 4, 1, 3, 5).flatten(3)


# ---- segmentation ----------------------------------------------------------------------------------------------------


def evaluate(evaluated, seer, train, val, args):
    """Rows of the table: a dict for each method. Draws the pictures."""
    features, labels = draw_patches(seer, train, evaluated, args)
    evaluation.note(
        f"{evaluated.name}: {len(labels):,} training patches of {len(train)} images, {len(labels.unique())} classes"
    )
    methods = {
        "k-NN": by_neighbours(features, labels, evaluated.device, args),
        "linear": by_classifier(features, labels, evaluated.device, args),
    }
    counts = {name: np.zeros((dense.VALUES, dense.VALUES), np.int64) for name in methods}
    for _, pixels, masks in watched_batches(val, evaluated):
        patches = patches_of(seer, pixels, evaluated.device, args.precision)
        for name, classify in methods.items():
            for grid, mask in zip(segment(patches, classify), masks, strict=True):
                counts[name] += dense.confusion(mask, dense.spread(grid, mask.shape))
    if not counts["k-NN"].any():
        raise UserError(f"--data_path {args.data_path}: the validation masks have no pixel that is not ignored")
    if args.output_dir is not None and args.pictures:
        draw(evaluated, seer, val, methods, args)
    scores = {name: dense.scores_of(count) for name, count in counts.items()}
    return [
        {"checkpoint": evaluated.name, "method": name, **score, "num_classes": len(score["iou"])}
        for name, score in scores.items()
    ]


def draw_patches(seer, images, evaluated, args):
    """(features (M, D), labels (M,)) of training patches: as many patches of each image, as far as it has labels."""
    most, features, labels = max(1, args.num_patches // len(images)), [], []
    for rows, pixels, masks in watched_batches(images, evaluated):
        for row, mask, patches in zip(
            rows, masks, patches_of(seer, pixels, evaluated.device, args.precision), strict=True
        ):
            of_patches = dense.patch_labels(mask, *patches.shape[:2]).ravel()
            known = np.flatnonzero(of_patches != dense.IGNORED)
            drawn = np.sort(np.random.default_rng((args.seed, row)).permutation(known)[:most])
            features.append(patches.flatten(0, 1)[drawn])
            labels.append(of_patches[drawn])
    features, labels = torch.cat(features), torch.from_numpy(np.concatenate(labels))
    if len(labels) == 0 or len(labels.unique()) < 2:
        raise UserError(
            f"--data_path {args.data_path}: the training masks have {len(labels.unique())} classes; expected 2"
        )
    return features, labels


@torch.no_grad()
def patches_of(seer, images, device, precision):
    """float32 (B, r, c, D), on CPU."""
    with utils.autocast(device, precision):
        patches = seer(images)[1]
    patches = patches.float().cpu()
    evaluation.check_finite(torch.isfinite(patches), "the patch features")
    return patches


def watched_batches(images, evaluated, indices=None):
    with Watch((), evaluation.PATIENCE_S, unit="batch") as watch:
        yield from watch.over(dense.batches_of(images, evaluated.args, evaluated.device, indices))


def segment(patches, classify):
    """(B, r, c, D) -> int64 (B, r, c)"""
    return classify(patches.flatten(0, 2)).reshape(patches.shape[:3]).numpy()


def by_neighbours(features, labels, device, args):
    k = min(args.nb_knn, len(features))
    if k < args.nb_knn:
        evaluation.note(f"--nb_knn {k}: there are {k} training patches")
    nearest = choose_search(device)(features)  # once, not for each batch

    def classify(patches):
        found = knn_classify(features, labels, patches, (k,), (args.temperature,), search=lambda train: nearest)
        return found[k, args.temperature][:, 0]

    return classify


def by_classifier(features, labels, device, args):
    """The best of a grid by held-out patches, as eval_linear.py's fast protocol has it."""
    present, numbers = labels.unique(return_inverse=True)  # a number that no mask has is no class
    weight, bias = fit_selected(features, numbers, len(present), seed=args.seed, device=device).classifier
    weight, bias = weight.cpu(), bias.cpu()
    return lambda patches: present[(patches @ weight.T + bias).argmax(dim=1)]


# ---- pictures --------------------------------------------------------------------------------------------------------


def draw(evaluated, seer, val, methods, args):
    """dense_<model>.png: a row for each image."""
    plt = evaluation.pyplot()
    indices = np.unique(np.linspace(0, len(val) - 1, args.pictures).astype(int))
    batches = [(masks, patches_of(seer, pixels, evaluated.device, args.precision))
               for _, pixels, masks in watched_batches(val, evaluated, indices)]  # fmt: skip
    masks, patches = [mask for some, _ in batches for mask in some], torch.cat([some for _, some in batches])
    k = min(args.kmeans, patches.shape[:3].numel())
    clusters = kmeans(patches.flatten(0, 2), k, seed=args.seed).reshape(patches.shape[:3])
    segmented = {name: segment(patches, classify) for name, classify in methods.items()}
    titles = ["image", "mask", *methods, f"k-means, {k} clusters"]
    figure, axes = plt.subplots(len(indices), len(titles), squeeze=False, figsize=(2 * len(titles), 1.9 * len(indices)))
    for row, index in enumerate(indices):
        shape = masks[row].shape
        grids = [segmented[name][row] for name in methods]
        pictures = [thumbnail(val, index), colours_of(masks[row])]
        pictures += [colours_of(dense.spread(grid, shape)) for grid in [*grids, clusters[row] + 1]]
        for axis, picture, title in zip(axes[row], pictures, titles, strict=True):
            axis.imshow(picture, extent=(0, shape[1], shape[0], 0))
            axis.set_axis_off()
            if row == 0:
                axis.set_title(title, fontsize=9)
    figure.suptitle(label_text(evaluated.name, 100), fontsize=9)
    evaluation.save_figure(figure, f"{args.output_dir}/dense_{evaluated.stem}.png", bbox_inches="tight")


def colours_of(labels):
    """(H, W) -> uint8 (H, W, 3), in Pascal VOC's colours: the bits of a number, spread over red, green and blue."""
    numbers = np.arange(dense.VALUES)
    table = np.zeros((dense.VALUES, 3), np.uint8)
    for bit in range(3):
        for channel in range(3):
            table[:, channel] |= (((numbers >> (3 * bit + channel)) & 1) << (7 - bit)).astype(np.uint8)
    return table[labels]


if __name__ == "__main__":
    main()
