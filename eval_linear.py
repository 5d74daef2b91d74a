"""Linear classification on frozen features, by one of four protocols; or fine-tuning, which is a fifth.

    python eval_linear.py --checkpoint runs/a/checkpoint.pth runs/b/checkpoint.pth --output_dir results
    python eval_linear.py --checkpoint runs/a/checkpoint.pth --protocol adam
    python eval_linear.py --checkpoint runs/a/checkpoint.pth --protocol few --baselines
    torchrun --nproc_per_node=8 eval_linear.py --protocol dino --checkpoint dino_deitsmall16_pretrain.pth \\
        --dataset imagefolder --data_path /data/imagenet --output_dir results
    python eval_linear.py --protocol dino --checkpoint dino_deitsmall16_pretrain.pth \\
        --linear_weights dino_deitsmall16_linearweights.pth --dataset imagefolder --data_path /data/imagenet
    torchrun --nproc_per_node=8 eval_linear.py --protocol finetune --checkpoint dino_deitsmall16_pretrain.pth \\
        --dataset imagefolder --data_path /data/imagenet --output_dir results

fast    features of each image once; a grid of learning rates and weight decays is trained at once, and one of them
        chosen by a tenth of the training images
adam    the same features; the CPLearn paper's protocol for small sets (Appendix I)
few     the same features; logistic regression on a few labelled training images of each class. Scores are means over
        several draws of these images, alike for all models, with the standard deviation over the draws
dino    as DINO's eval_linear.py: a new random crop of each training image in every epoch, SGD, features of the last
        four blocks. Its head, optimizer and log are kept after each epoch, and the same command goes on there
finetune  the backbone learns too: AdamW, layer decay, mixup and cutmix (evaluation/finetune.py); resumable as dino is

No protocol chooses anything by the test images: the score is that of the fitted classifier, or of the last epoch.
Prints top-1 and top-5 accuracy in percent of the validation images, and the classes that go best and worst. With
--output_dir: results_linear.md, results_linear.json (also the accuracy of each class) and confusion_<model>.png; of
few and finetune results_<protocol>.md, results_<protocol>.json and confusion_<protocol>_<model>.png, which leave
another protocol's files alone.

Shapes: B images per process, N validation images, D features, C classes.
"""

import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import checkpoint
import evaluation
import utils
from evaluation.classifier_runs import ClassifierRun, crop_loader, folder_of, mean_loss, score_images
from evaluation.finetune import DEFAULTS, add_finetune_arguments, check_finetune_arguments, finetune
from evaluation.linear_probe import (
    EPOCHS,
    LRS,
    WEIGHT_DECAYS,
    confusion_matrix,
    draw_labelled,
    fit_adam,
    fit_few,
    fit_selected,
    predict,
    scores,
)
from utils import UserError
from vision_transformer import VisionTransformer

# what each protocol takes, and its defaults
PROTOCOLS = {
    "fast": {"lrs": LRS, "weight_decays": WEIGHT_DECAYS, "epochs": EPOCHS},
    "adam": {"epochs": 100, "lr": 1e-2},
    "few": {"labels_per_class": 10, "draws": 10},
    "dino": {"epochs": 100, "lr": 1e-3, "val_freq": 1, "num_labels": None, "evaluate": False, "linear_weights": None,
             "max_bad_images": 0.01},
    "finetune": DEFAULTS,
}  # fmt: skip
COLUMNS = {
    "checkpoint": ("checkpoint", ""),
    "num_features": ("features", "d"),
    "top1": ("top-1 %", ".2f"),
    "top5": ("top-5 %", ".2f"),
}
OWN_COLUMNS = {
    "fast": {
        "lr": ("chosen lr", "g"),
        "weight_decay": ("chosen weight decay", "g"),
        "held_out_top1": ("held-out top-1 %", ".2f"),
    },
    "adam": {"epochs": ("epochs", "d"), "lr": ("lr", "g")},
    "few": {
        "top1_std": ("top-1 % std over draws", ".2f"),
        "labels_per_class": ("labels per class", "d"),
        "draws": ("draws", "d"),
    },
    "dino": {"epochs": ("epochs", "d"), "best_test_top1": ("best epoch on the test images, top-1 %", ".2f")},
    "finetune": {
        "epochs": ("epochs", "d"),
        "lr": ("lr", "g"),
        "layer_decay": ("layer decay", "g"),
        "best_test_top1": ("best epoch on the test images, top-1 %", ".2f"),
    },
}
KEPT = "checkpoint.pth.tar"  # DINO's name: its script goes on from ours, and ours from its
LOG = "log_linear.txt"  # where DINO has log.txt, which beside a checkpoint of ours is the training run's


def get_args_parser():
    parser = evaluation.evaluation_parser("eval_linear.py", "Linear classification on frozen features.")
    add = parser.add_argument
    add(
        "--protocol",
        choices=list(PROTOCOLS),
        default="fast",
        help="fast: features once, best of a grid; adam: the paper's, for small sets; few: few labels per class, mean "
        "over draws; dino: with augmentation, --batch_size_per_gpu images per step and process; finetune: so too, and "
        "the backbone learns",
    )
    add(
        "--n_last_blocks", type=utils.positive(int), default=None,
        help="features: CLS tokens of the last n blocks of a ViT (default: 1; 4 with dino, as DINO has it for ViT-S)",
    )  # fmt: skip
    add(
        "--avgpool_patchtokens", type=utils.boolean, nargs="?", const=True, default=False, metavar="BOOL",
        help="and the mean of the last block's patch tokens; DINO's ViT-B: this and --n_last_blocks 1",
    )  # fmt: skip
    add(
        "--lrs", type=utils.positive(float), nargs="+", default=None,
        help=f"fast: learning rates of the grid, per 256 images of a step (default: {listed(LRS)})",
    )  # fmt: skip
    add(
        "--weight_decays", type=utils.not_negative(float), nargs="+", default=None,
        help=f"fast: weight decays of the grid (default: {listed(WEIGHT_DECAYS)})",
    )  # fmt: skip
    add(
        "--epochs", type=utils.positive(int), default=None,
        help=f"passes over the training images (default: fast {EPOCHS}; adam, dino and finetune 100)",
    )  # fmt: skip
    add(
        "--lr", type=utils.positive(float), default=None,
        help="learning rate (default: adam 1e-2; per 256 images of a step, falling to 0 by a cosine, dino 1e-3 and "
        "finetune 5e-4)",
    )  # fmt: skip
    add(
        "--labels_per_class", type=utils.positive(int), default=None,
        help="few: labelled training images of each class in a draw (default: 10)",
    )  # fmt: skip
    add(
        "--draws", type=utils.positive(int), default=None,
        help="few: draws of labelled images, seeded by --seed; the first of 20 are those of 10 (default: 10)",
    )  # fmt: skip
    add(
        "--val_freq", type=utils.positive(int), default=None,
        help="dino, finetune: epochs from one test to the next (default: 1)",
    )  # fmt: skip
    add(
        "--max_bad_images", type=utils.Number(float, least=0, most=1), default=None,
        help="dino, finetune: ends when more than this fraction of the training images cannot be read (default: 0.01); "
        "until then others take their places",
    )  # fmt: skip
    add(
        "--num_labels", type=utils.positive(int), default=None,
        help="dino: classes of the head (default: the classes of the images)",
    )  # fmt: skip
    add("--evaluate", action="store_true", help="dino: only test a head, --linear_weights or the --output_dir's")
    add(
        "--linear_weights", default=None, metavar="FILE",
        help=f"dino: only test this head, one that DINO released or a {KEPT}",
    )  # fmt: skip
    add_finetune_arguments(parser)
    return parser


def listed(values):
    return " ".join(f"{value:g}" for value in values)


@utils.command_line
def main(argv=None):
    args = resolve_protocol(get_args_parser().parse_args(argv))
    device = utils.init_distributed(args.device)
    models = evaluation.open_models(args, device)
    for evaluated in models if args.protocol != "finetune" else ():
        choose_features(evaluated)
    if args.evaluate:
        val_images = evaluation.open_images(models, "val", "a linear classifier")
        found = [score_head(evaluated, val_images, models) for evaluated in models]
    else:
        train_images, val_images = evaluation.open_train_and_val(models, "a linear classifier")
        if args.protocol in ("dino", "finetune"):
            learn = train_with_crops if args.protocol == "dino" else finetune
            found = [learn(evaluated, train_images, val_images, models) for evaluated in models]
        elif args.protocol == "few":
            drawn = (train_images.classes, args.labels_per_class, args.draws, args.seed)
            draws = draw_labelled(train_images.labels, *drawn)  # first: it may end here
            matrices = evaluation.extract_all(models, train_images, val_images)
            found = [fit_to_draws(*each, train_images.labels, val_images, draws) for each in matrices]
        else:
            matrices = evaluation.extract_all(models, train_images, val_images)
            found = [fit_to_features(*each, train_images) for each in matrices]
    if utils.rank() == 0:
        show(found, models, val_images, args)


def resolve_protocol(args):
    """Fill in the protocol's defaults, in place; a flag of another protocol is an error, not silently unread."""
    own = PROTOCOLS[args.protocol]
    for name in dict.fromkeys(name for flags in PROTOCOLS.values() for name in flags):
        if name in own and getattr(args, name) is None:
            setattr(args, name, own[name])
        elif name not in own and getattr(args, name) is not None and getattr(args, name) is not False:
            others = " or ".join(protocol for protocol, flags in PROTOCOLS.items() if name in flags)
            raise UserError(f"--{name} means nothing to --protocol {args.protocol}: it belongs to --protocol {others}")
    if args.protocol == "finetune":
        check_finetune_arguments(args)
    args.evaluate = args.evaluate or args.linear_weights is not None
    if args.evaluate and args.linear_weights is None and args.output_dir is None:
        raise UserError(
            f"--evaluate tests a head: name its file with --linear_weights, or its folder ({KEPT}) with --output_dir"
        )
    return args


def choose_features(evaluated):
    """Make `evaluated.model` one that gives the features to classify."""
    args, model = evaluated.args, evaluated.model
    if args.n_last_blocks is None:
        is_vit = isinstance(model.backbone, VisionTransformer)
        args.n_last_blocks = 4 if args.protocol == "dino" and is_vit and not args.avgpool_patchtokens else 1
    if (args.n_last_blocks, args.avgpool_patchtokens) != (1, False):
        evaluated.model = model.with_last_blocks(args.n_last_blocks, args.avgpool_patchtokens)


# ---- fast, adam and few: classifiers on a matrix of features ---------------------------------------------------------


def fit_to_features(evaluated, train, val, train_images):
    """train, val: (features, codes). Returns a row of the table, and the ranked classes of the validation images."""
    args, num_classes = evaluated.args, len(train_images.classes)
    given = {"seed": args.seed, "device": evaluated.device}
    if args.protocol == "fast":
        fit = fit_selected(
            train[0], train_images.labels, num_classes, args.lrs, args.weight_decays, args.epochs, **given
        )
    else:
        fit = fit_adam(train[0], train_images.labels, num_classes, args.epochs, args.lr, **given)
    ranked = predict(val[0], fit.classifier, evaluated.device)
    return fit.settings | {"num_features": train[0].shape[1], "warnings": fit.warnings}, ranked


def fit_to_draws(evaluated, train, val, train_labels, val_images, draws):
    """draws: rows of train, as `draw_labelled` returns.
    Returns a row of the table, and the ranked classes of the validation images, once for each draw.
    """
    args, num_classes = evaluated.args, len(val_images.classes)
    fits = fit_few(train[0], train_labels, draws, evaluated.device)
    ranked = [predict(val[0], fit.classifier, evaluated.device) for fit in fits]
    top1 = [scores(each, val_images.labels, num_classes)["top1"] for each in ranked]
    told_by_draws = [warning for fit in fits for warning in fit.warnings]
    row = {
        "top1_std": float(np.std(top1)),
        "top1_of_draws": top1,
        "labels_per_class": args.labels_per_class,
        "draws": args.draws,
        "num_features": train[0].shape[1],
        "warnings": [f"{told} in {told_by_draws.count(told)} of {args.draws} draws" for told in set(told_by_draws)],
    }
    return row, torch.cat(ranked)


# ---- dino: a classifier on features of new crops in every epoch ------------------------------------------------------


def train_with_crops(evaluated, train_images, val_images, models):
    """DINO's protocol: SGD with momentum 0.9 and no weight decay on CE(head(features of a crop), label), the learning
    rate lr * (images per step) / 256, from epoch to epoch along a cosine to 0; the backbone does not learn.

    All processes take part. As in DINO: crops of 8 to 100 % of the image, flips; the head begins normal(0, 0.01), its
    biases at 0. Unlike DINO: the order and the crops are functions of (seed, epoch), and images that do not fill the
    last step of an epoch wait for another epoch.
    With --output_dir the head, the optimizer, the scheduler and the log are kept after every epoch, as DINO does.
    Raises UserError where the files that are there are of a run with other settings.
    Returns a row of the table, and the ranked classes of the validation images.
    """
    args = evaluated.args
    run = HeadRun(evaluated, folder_of(evaluated, models), count_labels(args, val_images), train_images.fingerprint)
    run.resume()
    loader = crop_loader(evaluated, train_images)
    evaluated.on_device()
    ranked = run.train(loader, torch.as_tensor(train_images.labels), val_images, train_one_epoch)
    evaluated.model.cpu()  # room for the next one
    row = {
        "num_features": evaluated.model.embed_dim,
        "epochs": args.epochs,
        "lr": args.lr,
        "best_test_top1": run.best(),
    }
    return row, ranked


def train_one_epoch(run, loader, labels):
    """Returns {"train_lr", "train_loss": `mean_loss`}."""
    device, total = run.evaluated.device, 0.0
    for batch in loader.epoch(run.epoch, end=run.args.epochs * loader.steps_per_epoch):
        (images,) = loader.augment(batch, device)  # (B, C, h, w)
        features = forward_frozen(run.evaluated, images)  # (B, D)
        loss = F.cross_entropy(run.head(features), labels[torch.from_numpy(batch.indices)].to(device))
        run.optimizer.zero_grad()
        loss.backward()
        for parameter in run.head.parameters():
            parameter.grad = utils.all_reduce_mean(parameter.grad)
        run.optimizer.step()
        total += loss.detach()
    return {"train_lr": run.lr(), "train_loss": mean_loss(loader, total)}


@torch.no_grad()
def forward_frozen(evaluated, images):
    with utils.autocast(images.device, evaluated.args.precision):
        return evaluated.model(images).float()


class HeadRun(ClassifierRun):
    """A linear head in training: .head, .optimizer, .scheduler, beside what a ClassifierRun has."""

    KEPT, LOG = KEPT, LOG

    def __init__(self, evaluated, folder, num_labels, images):
        names = ("epochs", "lr", "seed", "n_last_blocks", "avgpool_patchtokens", "precision", "img_size", "in_chans")
        super().__init__(evaluated, folder, names, num_labels, images)
        args = self.args
        self.head = new_head(evaluated.model.embed_dim, num_labels, args.seed).to(evaluated.device)
        self.optimizer = torch.optim.SGD(self.head.parameters(), args.lr * self.images_per_step / 256, momentum=0.9)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, args.epochs)

    def is_tested(self):
        return self.epoch % self.args.val_freq == 0  # the first, as DINO

    def score(self, images):
        return score_images(self.evaluated, head_on(self.evaluated, self.head), self.head.out_features, images)

    def finish_epoch(self, line):
        self.scheduler.step()
        super().finish_epoch(line)

    def state_dict(self):
        """What DINO's script keeps, under its names, and what it does not look at: log and settings."""
        return {
            "epoch": self.epoch,
            "state_dict": {f"module.linear.{name}": tensor for name, tensor in self.head.state_dict().items()},
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "best_acc": self.best() or 0.0,
            "log": self.log,
            "settings": self.settings,
        }

    def load_state(self, kept, path):
        """Of the optimizer only the momentum: its settings follow from the flags and the epoch, and a file that says
        otherwise is damaged. A file of DINO's has no settings that could differ."""
        load_head(self.head, kept, path, self.evaluated)
        settings = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": kept["optimizer"]["state"], "param_groups": settings})
        for parameter in self.head.parameters():
            if self.optimizer.state[parameter]["momentum_buffer"].shape != parameter.shape:
                raise ValueError(f"its momentum is not of the shape {tuple(parameter.shape)}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the optimizer made no steps
            for _ in range(kept["epoch"]):
                self.scheduler.step()


def head_on(evaluated, head):
    return lambda images: head(forward_frozen(evaluated, images))


def new_head(num_features, num_labels, seed):
    head = nn.Linear(num_features, num_labels)
    torch.manual_seed(seed)  # the same on all processes
    nn.init.normal_(head.weight, std=0.01)
    nn.init.zeros_(head.bias)
    return head


def count_labels(args, images):
    num_labels = args.num_labels or len(images.classes)
    if num_labels < len(images.classes):
        raise UserError(f"--num_labels {num_labels}: the images have {len(images.classes)} classes")
    return num_labels


# ---- dino: a head that is given --------------------------------------------------------------------------------------


def score_head(evaluated, val_images, models):
    """Test a head without training. Returns a row of the table, and the ranked classes of the validation images."""
    args, model = evaluated.args, evaluated.on_device()
    path = args.linear_weights or folder_of(evaluated, models) / KEPT
    head = new_head(model.embed_dim, count_labels(args, val_images), args.seed)
    load_head(head, checkpoint.load_checkpoint(path), path, evaluated)
    classify = head_on(evaluated, head.to(evaluated.device))
    ranked, _ = score_images(evaluated, classify, head.out_features, val_images)
    evaluated.model.cpu()
    return {"num_features": model.embed_dim, "linear_weights": str(path)}, ranked


def load_head(head, kept, path, evaluated):
    """Into `head`, in place, from {"state_dict": {"module.linear.weight": (C, D), "module.linear.bias": (C,)}}.

    Raises UserError for a file without them and for other sizes, with the settings that would fit."""
    state = kept.get("state_dict", kept) if isinstance(kept, dict) else {}
    state = state if isinstance(state, dict) else {}
    state = {str(name).removeprefix("module.").removeprefix("linear."): tensor for name, tensor in state.items()}
    weight, bias = state.get("weight"), state.get("bias")
    if not (torch.is_tensor(weight) and torch.is_tensor(bias) and weight.ndim == 2 and bias.shape == weight.shape[:1]):
        raise UserError(f"{path}: expected a linear head, state_dict with module.linear.weight and module.linear.bias")
    num_labels, num_features = weight.shape
    if num_features != head.in_features:
        args = evaluated.args
        width = head.in_features // (args.n_last_blocks + args.avgpool_patchtokens)
        raise UserError(
            f"{path}: a head for {num_features} features, these settings give {head.in_features}; "
            + fitting_settings(num_features, width)
        )
    if num_labels != head.out_features:
        raise UserError(f"{path}: a head for {num_labels} classes, expected {head.out_features}; see --num_labels")
    head.load_state_dict({"weight": weight, "bias": bias})


def fitting_settings(num_features, width):
    """In words, which features of a backbone of this width a head was made for."""
    blocks, rest = divmod(num_features, width)
    if rest or not blocks:
        return f"no settings fit, all give multiples of {width}: is it another backbone's?"
    averaged = f" or --n_last_blocks {blocks - 1} --avgpool_patchtokens" if blocks > 1 else ""
    return f"try --n_last_blocks {blocks}{averaged}"


# ---- what is shown ---------------------------------------------------------------------------------------------------


def show(found, models, val_images, args):
    """found: of each model a row, and the ranked classes of the validation images, once or as often as there are draws:
    what is shown is the mean over them."""
    classes, rows = val_images.classes, []
    labels = np.tile(val_images.labels, len(found[0][1]) // len(val_images))
    has_own_files = args.protocol in ("few", "finetune")
    name, stem = (args.protocol, f"confusion_{args.protocol}") if has_own_files else ("linear", "confusion")
    for evaluated, (row, ranked) in zip(models, found, strict=True):
        scored = scores(ranked, labels, len(classes))
        scored["per_class"] = dict(zip(classes, scored["per_class"], strict=True))
        rows.append(dict(checkpoint=evaluated.name, **scored, **row))
    columns = COLUMNS | {key: title for key, title in OWN_COLUMNS[args.protocol].items() if key in rows[0]}
    notes = [f"{row['checkpoint']}: {warning}" for row in rows for warning in row.get("warnings", ())]
    notes += [best_and_worst(row) for row in rows]
    evaluation.report(name, rows, columns, args, models, notes)
    if args.output_dir is not None:
        for evaluated, (_, ranked) in zip(models, found, strict=True):
            percent = confusion_matrix(ranked, labels, len(classes))
            draw_confusion(percent, classes, Path(args.output_dir) / f"{stem}_{evaluated.stem}.png")


def best_and_worst(row, most=3):
    known = {name: percent for name, percent in row["per_class"].items() if percent is not None}
    ordered = sorted(known, key=known.get)
    most = min(most, len(ordered) // 2)
    best, worst = (
        ", ".join(f"{name} {known[name]:.1f}" for name in names) for names in (ordered[::-1][:most], ordered[:most])
    )
    return f"{row['checkpoint']}: best classes (top-1 %): {best}; worst: {worst}"


def draw_confusion(percent, classes, path):
    """percent: (C, C), as `confusion_matrix` returns. Classes are named where they are at most 30."""
    plt = evaluation.pyplot()
    named = len(classes) <= 30
    side = 2.2 + 0.32 * len(classes) if named else 6
    figure, axis = plt.subplots(figsize=(side + 0.7, side))
    # the square root shows confusions of one percent beside diagonals of ninety
    image = axis.imshow(percent, cmap="Blues", norm=plt.matplotlib.colors.PowerNorm(0.5, 0, 100))
    figure.colorbar(image, label="share of the true class (%)", shrink=0.8, ticks=[0, 1, 5, 10, 25, 50, 100])
    axis.set(xlabel="predicted class", ylabel="true class")
    axis.grid(False)
    if named:
        axis.set_xticks(range(len(classes)), classes, rotation=90)
        axis.set_yticks(range(len(classes)), classes)
    if len(classes) <= 12:
        for row, column in np.argwhere(percent > 0.5):
            value = percent[row, column]
            colour = "white" if value > 30 else "black"
            axis.text(column, row, f"{value:.0f}", ha="center", va="center", color=colour, fontsize=7)
    evaluation.save_figure(figure, path)


if __name__ == "__main__":
    main()
