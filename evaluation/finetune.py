"""Fine-tuning: a backbone and a linear classifier of its features learn labels together, by the recipe usual for ViTs.

    row, ranked = finetune(evaluated, train_images, val_images, models)

The recipe is that of Table 9 of MAE (arXiv 2111.06377) without RandAugment: AdamW (0.9, 0.999), weight decay 0.05 (not
of biases, norms, positions), a rate for each block, linear warm-up and cosine by the step, label smoothing, stochastic
depth, and one of mixup and cutmix for each batch (timm's Mixup: 0.8 and 1.0). Crops are `--protocol dino`'s crops.

Everything drawn is a function of (seed, step, process): a run that was stopped goes on bit for bit on a CPU.

Shapes: B images per process, C classes.
"""

import copy
import math

import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.layers import DropPath
from torch import nn

import evaluation
import utils
from accumulation import wrap
from batch_norm import convert_sync_batchnorm
from evaluation.classifier_runs import ClassifierRun, crop_loader, folder_of, mean_loss, score_images
from optimizer import lr_scales, parameter_groups
from pretrained import FROM_CHECKPOINT
from utils import RunFailed, UserError

DEFAULTS = {
    "epochs": 100, "lr": 5e-4, "weight_decay": 0.05, "layer_decay": 0.75, "warmup_epochs": 5.0,
    "label_smoothing": 0.1, "drop_path_rate": None, "mixup": 0.8, "cutmix": 1.0, "val_freq": 1, "max_bad_images": 0.01,
}  # fmt: skip
MIN_LR = 1e-6
VIT_DROP_PATH_RATE = 0.1  # where blocks can be dropped


def add_finetune_arguments(parser):
    """Flags of this protocol alone; None: the default."""
    add = parser.add_argument
    rate, share = utils.not_negative(float), utils.Number(float, least=0, below=1)
    add("--weight_decay", type=rate, default=None, help="finetune: of weights (default: 0.05)")
    add(
        "--layer_decay", type=utils.Number(float, above=0, most=1), default=None,
        help="finetune: rate of a block, as a share of that of the block above it; higher for small models (default: "
        "0.75)",
    )  # fmt: skip
    add("--warmup_epochs", type=rate, default=None, help="finetune: of the learning rate, linear (default: 5)")
    add("--label_smoothing", type=share, default=None, help="finetune: share of a label for all classes (default: 0.1)")
    add(
        "--drop_path_rate", type=share, default=None,
        help=f"finetune: stochastic depth of the last block (default: {VIT_DROP_PATH_RATE} for ViTs, else 0)",
    )  # fmt: skip
    add("--mixup", type=rate, default=None, help="finetune: alpha of mixup; 0: none (default: 0.8)")
    add("--cutmix", type=rate, default=None, help="finetune: alpha of cutmix; 0: none (default: 1)")


def check_finetune_arguments(args):
    """Raises UserError for what does not go together, before a picture is read."""
    if (args.n_last_blocks, args.avgpool_patchtokens) != (None, False):
        raise UserError(
            "--n_last_blocks and --avgpool_patchtokens mean nothing to --protocol finetune: it takes the backbone's "
            "feature"
        )
    if args.precision == "fp16":
        raise UserError("--precision fp16: --protocol finetune does not scale its loss; use bf16 or fp32")
    if (args.mixup or args.cutmix) and args.batch_size % 2:
        raise UserError(
            f"--batch_size_per_gpu {args.batch_size}: mixup and cutmix take images in pairs; expected an even number, "
            "or --mixup 0 --cutmix 0"
        )


def finetune(evaluated, train_images, val_images, models):
    """Returns a row of the table, and the ranked classes of the validation images, of the last epoch.

    All processes take part; gradients, and batch norms, are of the joint batch. With --output_dir all is kept after
    every epoch (FinetuneRun.KEPT, which load_pretrained opens) and the same command goes on there."""
    loader = crop_loader(evaluated, train_images)
    run = FinetuneRun(
        evaluated, folder_of(evaluated, models), len(val_images.classes), train_images.fingerprint, loader
    )
    run.resume()
    ranked = run.train(loader, torch.as_tensor(train_images.labels), val_images, train_one_epoch)
    names = ("epochs", "lr", "layer_decay")
    row = {name: getattr(run.args, name) for name in names} | {"best_test_top1": run.best()}
    return row | {"num_features": run.model.head.in_features}, ranked


def train_one_epoch(run, loader, labels):
    """Returns {"train_loss": `mean_loss`, "train_lr"}. Raises RunFailed for a loss that is not finite."""
    args, device, total = run.args, run.evaluated.device, 0.0
    run.model.train()
    step = run.epoch * loader.steps_per_epoch
    for batch in loader.epoch(run.epoch, end=args.epochs * loader.steps_per_epoch):
        run.set_schedule(step)
        utils.seed_everything(args.seed, step, utils.rank())  # of mixup and of dropped paths
        (images,) = loader.augment(batch, device)  # (B, channels, h, w)
        loss = run.loss(images, labels[torch.from_numpy(batch.indices)].to(device))
        run.optimizer.zero_grad()
        loss.backward()
        run.optimizer.step()
        total, step = total + loss.detach(), step + 1
    mean = mean_loss(loader, total)
    if not math.isfinite(mean):
        raise RunFailed(f"epoch {run.epoch}: the loss is {mean}; lower --lr, or try --precision fp32")
    return {"train_loss": mean, "train_lr": run.lr()}


class Classifier(nn.Module):
    """A backbone and a linear layer on its features; in training batch norms are of all processes' images."""

    def __init__(self, backbone, num_labels, precision):
        super().__init__()
        self.backbone, self.precision = backbone.requires_grad_(True), precision
        self.head = nn.Linear(backbone.embed_dim, num_labels)
        nn.init.trunc_normal_(self.head.weight, std=2e-5)  # MAE's: the first gradients are the labels'
        nn.init.zeros_(self.head.bias)

    def forward(self, images):
        with utils.autocast(images.device, self.precision):
            features = self.backbone(images)
        return self.head(features.float())  # (B, C)


class FinetuneRun(ClassifierRun):
    """.model: Classifier.  .wrapped: that model, with gradients averaged over processes.  .optimizer"""

    KEPT, LOG = "finetuned.pth", "log_finetune.txt"

    def __init__(self, evaluated, folder, num_labels, images, loader):
        free = ("val_freq", "max_bad_images")
        names = ("seed", "precision", "img_size", "in_chans", *(name for name in DEFAULTS if name not in free))
        super().__init__(evaluated, folder, names, num_labels, images)
        args, device = self.args, evaluated.device
        self.steps_per_epoch, self.total_steps = loader.steps_per_epoch, args.epochs * loader.steps_per_epoch
        asked, tenth = round(args.warmup_epochs * self.steps_per_epoch), self.total_steps // 10
        self.warmup_steps = min(asked, tenth)
        torch.manual_seed(args.seed)  # the same head on all processes
        backbone = set_drop_path(copy.deepcopy(evaluated.model.backbone), args.drop_path_rate)
        self.model = convert_sync_batchnorm(Classifier(backbone, num_labels, args.precision)).to(device)
        if asked > tenth:
            evaluation.note_once(f"--warmup_epochs {args.warmup_epochs:g} is shortened to a tenth of the run")
        scales = lr_scales(backbone, args.layer_decay) if args.layer_decay < 1 else None
        self.optimizer = torch.optim.AdamW(parameter_groups(self.model, scales), lr=0.0)
        self.wrapped = wrap(self.model, device)
        mixes = {"mixup_alpha": args.mixup, "cutmix_alpha": args.cutmix, "label_smoothing": args.label_smoothing}
        self.mix = Mixup(**mixes, num_classes=num_labels) if args.mixup or args.cutmix else None

    def loss(self, images, labels):
        """Cross-entropy in nats."""
        if self.mix is not None:
            images, labels = self.mix(images, labels)  # the labels' shares, smoothed: (B, C)
            return F.cross_entropy(self.wrapped(images), labels)
        return F.cross_entropy(self.wrapped(images), labels, label_smoothing=self.args.label_smoothing)

    def set_schedule(self, step):
        args = self.args
        peak = args.lr * self.images_per_step / 256
        lr = utils.cosine_schedule(step, self.total_steps, peak, MIN_LR, self.warmup_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
            if group["decayed"]:
                group["weight_decay"] = args.weight_decay

    @torch.no_grad()
    def score(self, images):
        return score_images(self.evaluated, self.model.eval(), self.model.head.out_features, images)

    def state_dict(self):
        """What load_pretrained needs to open the backbone, and what the run needs to go on."""
        return {
            "epoch": self.epoch,
            "model": self.model.state_dict(),
            "args": {name: self.evaluated.model.settings[name] for name in OF_A_BACKBONE}
            | {name: getattr(self.args, name) for name in FROM_CHECKPOINT},
            "optimizer": self.optimizer.state_dict(),
            "log": self.log,
            "settings": self.settings,
        }

    def load_state(self, kept, path):
        """Of the optimizer the moments alone: its settings follow from flags and step. Raises what Python raises."""
        self.model.load_state_dict(kept["model"])
        settings = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": kept["optimizer"]["state"], "param_groups": settings})
        for parameter, moments in self.optimizer.state.items():
            if any(moments[name].shape != parameter.shape for name in ("exp_avg", "exp_avg_sq")):
                raise ValueError(f"its moments are not of the shape {tuple(parameter.shape)}")


OF_A_BACKBONE = ("arch", "patch_size", "num_heads", "dataset")


def set_drop_path(backbone, rate):
    """Stochastic depth, in place, rising linearly from 0 at the first block to `rate` at the last; None: the default.
    Raises UserError for a backbone without blocks of that kind."""
    blocks = [part for part in backbone.modules() if hasattr(part, "drop_path1") and hasattr(part, "drop_path2")]
    if rate and not blocks:
        raise UserError(f"--drop_path_rate {rate:g}: this backbone has no blocks as ViTs have; leave it at 0")
    rate = VIT_DROP_PATH_RATE if rate is None else rate
    for number, block in enumerate(blocks):
        own = rate * number / max(1, len(blocks) - 1)
        block.drop_path1, block.drop_path2 = (DropPath(own) if own else nn.Identity() for _ in range(2))
    return backbone
