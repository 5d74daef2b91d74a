"""Which parameters learn, how fast, and from when on: groups with and without weight decay, a smaller rate for early
layers, a backbone that rests at first, and the optimizer of all of them.

    optimizer = build_optimizer(args, model)
    set_schedules(run, step)                          # before each step: the rates, times each group's "lr_scale"
    set_modes(run, step)                              # what rests is in evaluation mode
"""

import re

import torch
from timm.optim import Lars

from utils import Number, UserError, cosine_schedule, not_negative, positive

# ---- rates -----------------------------------------------------------------------------------------------------------

SMALL = 64  # px


def add_optimizer_arguments(parser):
    add = parser.add_argument_group("optimizer").add_argument
    add("--optimizer", choices=("adamw", "sgd", "lars"), default="adamw", help="lars for large batches")
    add("--lr", type=positive(float), help="per 256 images, after the warm-up (default: 5e-4; images up to 64 px 1e-3)")
    add("--min_lr", type=not_negative(float), default=1e-6, help="learning rate at the end; not scaled")
    add("--warmup_epochs", type=not_negative(float), default=10, help="linear warm-up of the learning rate")
    add("--weight_decay", type=not_negative(float), default=0.04, help="not on biases, norms, cls_token and pos_embed")
    add("--weight_decay_end", type=not_negative(float), default=0.4, help="weight decay at the end of its cosine")


def default_lr(img_size):
    """Per 256 images. DINO's 5e-4; on small images 1e-3: with AdamW, at 28 and 32 px, of four rates from 2.5e-4 to
    1.6e-2 the one that is never far from a system's best (the comparison's grids, by tests/test_results.py)."""
    return 1e-3 if img_size <= SMALL else 5e-4


def set_schedules(run, step):
    args = run.args
    lr = cosine_schedule(step, run.total_steps, peak_lr(run), args.min_lr, warmup_steps(run))
    weight_decay = cosine_schedule(step, run.total_steps, args.weight_decay, args.weight_decay_end)
    for group in run.optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
        if group["decayed"]:
            group["weight_decay"] = weight_decay


def peak_lr(run):
    return run.args.lr * run.effective_batch / 256


def warmup_steps(run):
    """A run shorter than its warm-up (or nearly) warms up for a tenth of its steps."""
    asked = round(run.args.warmup_epochs * run.loader.steps_per_epoch)
    return asked if asked < run.total_steps else run.total_steps // 10


# ---- a backbone that rests -------------------------------------------------------------------------------------------


def add_tuning_arguments(parser):
    """Flags for a run that starts from trained weights, whose backbone should not be lost at once."""
    add = parser.add_argument_group("starting from weights (--init_from)").add_argument
    add(
        "--freeze_backbone_epochs",
        type=not_negative(int),
        default=0,
        help="epochs in which the head learns alone: the backbone is in evaluation mode (no dropped paths, batch norm "
        "keeps its running statistics), without gradient, and the optimizer does not touch it; lr and weight decay go "
        "on meanwhile as they always do",
    )
    add(
        "--layer_decay",
        type=Number(float, above=0, most=1),
        default=1.0,
        help="each block of the backbone learns at this fraction of the rate of the block above it; 0.65 to 0.9 keeps "
        "early layers, 1 is one rate for all",
    )


def steps_at_rest(run):
    return run.args.freeze_backbone_epochs * run.loader.steps_per_epoch


def rests(run, step):
    return step < steps_at_rest(run)


def set_modes(run, step):
    """All in training mode, but for a backbone that rests, and a teacher's copy of it."""
    run.model.train()
    if rests(run, step):
        for name, part in run.model.named_modules():
            if name.split(".")[-1] == "backbone":
                part.eval()


def describe_tuning(run):
    """Lines for the start of a run, where --freeze_backbone_epochs and --layer_decay are given."""
    args, lines = run.args, []
    if steps := steps_at_rest(run):
        lines.append(f"the backbone rests for {steps} steps, in evaluation mode and without gradient")
        if steps >= run.total_steps:
            lines.append("note: these are all steps of the run: the backbone will not learn")
        elif steps >= warmup_steps(run):
            lines.append(
                f"note: the backbone begins after the warm-up of {warmup_steps(run)} steps, at a high learning rate: "
                "raise --warmup_epochs, or lower --lr"
            )
    if args.layer_decay < 1:
        lines.append(f"layer decay {args.layer_decay:g}: lr x {describe_groups(run.optimizer.param_groups)}")
    return lines


def describe_groups(groups):
    """ "1 norm, objective; 0.75 blocks.11; 0.562 blocks.10; ...", of the groups of an optimizer."""
    parts = {}
    for group in groups:
        names = [name.removeprefix("backbone.") for name in group["names"]]
        found = [match[0].rstrip(".") if (match := BLOCK.match(name)) else name.split(".")[0] for name in names]
        parts.setdefault(group["lr_scale"], {}).update(dict.fromkeys(found))
    return "; ".join(f"{factor:.3g} {', '.join(names)}" for factor, names in parts.items())


# ---- what moves the parameters by their gradients --------------------------------------------------------------------


BLOCK = re.compile(r"((blocks|stages|layers|layer\d|block\d)(\.\d+)*\.)+")  # of ViTs, ResNets, ConvNeXts, Swins, ...


def lr_scales(backbone, decay, prefix="backbone."):
    """{name: decay ** (layers above)} of a backbone's parameters: the last block has one layer above it, the head's;
    what stands before the first block (patches, positions, stem) is the lowest layer, what stands after the last (a
    norm) is of the head's layer. As in BEiT (arXiv 2106.08254) and MAE; a residual block of a ResNet is a block."""
    names, blocks, layer = [name for name, _ in backbone.named_parameters()], [], {}
    for name in names:
        block = (match := BLOCK.match(name)) and match[0]
        if block and block not in blocks:
            blocks.append(block)
        layer[name] = blocks.index(block) + 1 if block else None if blocks else 0
    top = len(blocks) + 1
    return {prefix + name: decay ** (top - (top if layer[name] is None else layer[name])) for name in names}


def build_optimizer(args, model):
    """Raises UserError where nothing would learn while the backbone rests."""
    if args.freeze_backbone_epochs and not any(p.requires_grad for p in model.objective.parameters()):
        raise UserError(
            f"--freeze_backbone_epochs {args.freeze_backbone_epochs}: --objective {args.objective} with these flags "
            "has no parameters beside the backbone's; use 0"
        )
    groups = parameter_groups(model, lr_scales(model.backbone, args.layer_decay) if args.layer_decay < 1 else None)
    if args.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, fused=True)
    if args.optimizer == "lars":
        return Lars(groups, lr=0.0, momentum=0.9)
    optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.9, fused=True)
    for parameter in (p for group in groups for p in group["params"]):
        # else a first step that is skipped leaves the momentum as the memory happened to be (torch 2.14)
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def parameter_groups(module, lr_scales=None):
    """Groups for the optimizer, two for each factor of the learning rate, the largest first: decayed weights; and
    biases, norms, `cls_token`, `pos_embed`, without weight decay.

    lr_scales: {name of a parameter: factor}; all others, and without it all, have 1.
    Each group carries `lr_scale` and `names`, the parameters' names in order."""
    scales = lr_scales or {}
    factors = sorted({1.0, *scales.values()}, reverse=True)
    groups = {(factor, decayed): {} for factor in factors for decayed in (True, False)}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            no_decay = parameter.ndim <= 1 or name.endswith(("cls_token", "pos_embed", "reg_token"))
            groups[scales.get(name, 1.0), not no_decay][name] = parameter
    return [
        {"params": list(found.values()), "names": list(found), "decayed": decayed, "lr_scale": factor}
        | ({} if decayed else {"weight_decay": 0.0})
        for (factor, decayed), found in groups.items()
        if found or factor == 1
    ]
