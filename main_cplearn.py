"""Pretrain a backbone without labels by CPLearn (arXiv 2410.04959).

    python main_cplearn.py --arch vit_tiny --patch_size 7 --output_dir runs/try            # Fashion-MNIST, one process
    torchrun --nproc_per_node=8 main_cplearn.py --arch vit_small --out_dim 131072 \\
        --dataset imagefolder --data_path /data/imagenet --class_list imagenet100_classes.txt --output_dir runs/in100

Two views of each image go through the backbone and the head; the head's frozen dictionary of K bipolar codes turns each
embedding into a distribution p over codes; the loss asks the views of an image to agree and all images together to use
all codes alike. No teacher, no stop-gradient, no centering. The equation is `cplearn_loss` in cplearn_head.py.

The loop knows of a method what objective.py says, so that --objective trains the systems CPLearn is compared with, and
--accum_steps M takes the batch in M parts. The same command again goes on where the run was, bit for bit.

    B images of a micro-batch, V views of each (G = 2 global crops, then local ones), M micro-batches of each process,
    D backbone width, N = B x M x processes
"""

import argparse
import contextlib
import io
import math
import signal
import sys
import time
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist
from torch import nn

import augmentation
import data
from accumulation import (
    Ahead,
    FirstHalf,
    backward_of_joint_batch,
    pass_through,
    refuse_batch_norm,
    wrap,
)
from backbones import (
    add_backbone_arguments,
    check_crop_sizes,
    compile_backbone,
    lay_out,
    new_backbone,
    resolve_backbone_defaults,
)
from batch_norm import convert_sync_batchnorm
from checkpoint import (
    add_checkpoint_arguments,
    buffers_before_step,
    checkpoint_path,
    copy_is_due,
    find_earlier,
    keep_copy,
    losing_nothing,
    refuse_differences,
    resume,
    save,
    save_last_whole_step,
    share_of_batch,
)
from cplearn_head import CPLearn, CPLearnHead
from evaluation.probes import add_probe_arguments, due, open_probe_images, probe
from fused_loss import choose_loss
from images import open_dataset
from images.levels import fill_in_levels
from monitor import ALIKE, Clock, Recorder, RunLog, diagnose, feature_tensors, memory_mb, read_together
from objective import NUM_GLOBAL, Course, add_objective_arguments, resolve_objective
from optimizer import (
    add_optimizer_arguments,
    add_tuning_arguments,
    build_optimizer,
    default_lr,
    describe_tuning,
    peak_lr,
    set_modes,
    set_schedules,
    warmup_steps,
)
from pretrained import OBJECTIVES, load_backbone
from report.replay import args_of_run, replay
from running.files import lock_folder
from running.loggers import add_logger_arguments, require
from running.watch import Watch
from running.writer import Writer
from utils import (
    PRECISIONS,
    Agreement,
    ArgumentParser,
    Number,
    RunFailed,
    Stopped,
    UserError,
    all_gather_rows,
    choose_precision,
    command_line,
    commit,
    init_distributed,
    make_folder,
    not_negative,
    on_rank_zero,
    positive,
    rank,
    seed_everything,
    world_size,
)

GO_ON, SAVE, STOP = 0, 1, 2  # what the processes vote on after each step; STOP: save, then end by the signal
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)  # SLURM's launchers send USR2 before a job's time is over


# flags of DINO's training that have no meaning here, and what to do instead
DINO_ONLY = {
    "--use_fp16": "use --precision bf16, fp16 or fp32",
    "--batch_size": "use --batch_size_per_gpu",
}


def get_args_parser(objectives=OBJECTIVES):
    parser = ArgumentParser(
        "main_cplearn.py",
        "Pretrain a backbone without labels by CPLearn, or by one of the systems it is compared with.",
        DINO_ONLY,
        resolve=lambda args: resolve_objective(resolve_backbone_defaults(args), objectives),
    )
    data.add_dataset_arguments(parser)
    data.add_loader_arguments(parser)
    augmentation.add_augmentation_arguments(parser)
    add_backbone_arguments(parser)
    add_objective_arguments(parser, objectives)
    add_step_arguments(parser)
    add_optimizer_arguments(parser)
    add_tuning_arguments(parser)
    add_run_arguments(parser)
    add_checkpoint_arguments(parser)
    return parser


def add_step_arguments(parser):
    add = parser.add_argument_group("steps").add_argument
    add("--batch_size_per_gpu", type=positive(int), default=64, help="images at once; also fixes tau for tanh")
    add(
        "--accum_steps",
        type=positive(int),
        default=1,
        help="micro-batches of --batch_size_per_gpu images that make one step, exactly the step on all of them "
        "together; costs up to one more forward pass",
    )
    add("--epochs", type=positive(int), default=100, help="passes over the images; the paper: 100 on ImageNet-100")
    add("--max_steps", type=positive(int), default=None, help="end (and anneal) after so many steps, for trying things")
    add("--clip_grad", type=not_negative(float), default=3.0, help="largest global gradient norm; 0: no clipping")
    add(
        "--precision",
        choices=("auto", *PRECISIONS),
        default="auto",
        help="of the backbone, and with bf16 of the matrix products of --head_impl tiled and triton; all else in the "
        "loss is fp32. auto: bf16 where the hardware has it, else fp32",
    )
    add(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="torch.compile the backbone, block by block where it has blocks, at the start (default: on CUDA; on a CPU "
        "a minute of compiling buys a few percent)",
    )


def add_run_arguments(parser):
    add = parser.add_argument_group("run").add_argument
    add("--output_dir", default="runs/cplearn", help="checkpoint, log and figures; the same folder resumes")
    add("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto", help="auto: cuda, else mps, else cpu")
    add(
        "--seed",
        type=Number(int, least=0, below=2**63),
        default=0,
        help="of weights, dictionary, order and augmentation",
    )
    add(
        "--save_every_minutes",
        type=not_negative(float),
        default=10,
        help="at most this much work is ever lost; 0: none, a step waits for the disk",
    )
    add(
        "--watchdog_s",
        type=not_negative(float),
        default=600,
        help="seconds without a step after which a process shows where it hangs and ends with exit code 75, so that "
        "the launcher starts the run again: 10 or more; 0: never",
    )
    add("--log_every", type=positive(int), default=50, help="steps per logged line, which waits for the device")
    add(
        "--on_collapse",
        choices=("warn", "stop"),
        default="warn",
        help=f"stop: where {ALIKE} logged lines one after the other look like the same collapse, save and end with "
        "exit code 1, not to be started again",
    )
    add("--replay", default=None, metavar="OUTPUT_DIR", help="do the step again at which the run of this folder met a "
        "loss that is not finite, and name the first tensor that is not; nothing is written")  # fmt: skip
    add_probe_arguments(parser)
    add_logger_arguments(parser)


@dataclass
class Run:
    """What a run is made of; `step`, the number of steps done, is passed from hand to hand."""

    args: argparse.Namespace
    device: torch.device
    batch_size: int  # images per micro-batch
    accum_steps: int  # micro-batches of this process in a step
    loader: data.TrainLoader
    model: "Model"
    first_half: nn.Module  # backbone -> rows of one micro-batch; wrapped for several processes
    second_half: nn.Module  # the objective: rows of the joint batch -> loss; wrapped for several processes
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    total_steps: int
    probe_images: tuple | None  # labelled (train, val), for k-NN and the linear probe
    lock: io.IOBase | None  # rank 0's, on the output folder; held until it is closed
    earlier: dict | None  # the checkpoint to go on from, until it is loaded
    compiled: str  # what the run says of it
    ahead: Ahead  # makes views
    recorder: Recorder = field(default_factory=Recorder)
    agreement: Agreement = field(default_factory=Agreement)
    log: RunLog = None
    watch: Watch = None
    writer: Writer = field(default_factory=Writer)  # of checkpoints; rank 0's
    buffers_before_step: tuple | None = None  # (step, buffers) from a step's end to the next change of the weights
    saved_at: float = field(default_factory=time.monotonic)

    @property
    def effective_batch(self):
        """Images per step, over all micro-batches and processes."""
        return self.batch_size * self.accum_steps * world_size()

    def default_flags(self, objective):
        """{flag: value} of a command that gives no other flag."""
        return vars(get_args_parser().parse_args(["--objective", objective]))

    @property
    def may_overflow(self):
        """Names of recorded numbers that need not be finite."""
        return ("grad_norm",) if self.scaler.is_enabled() else ()


def train(args):
    """Pretrain from start (or from the run's checkpoint) to end; returns the number of steps done.

    Raises UserError for flags and files that cannot work, NonFiniteLoss, and SystemExit after a signal."""
    run = build_run(args)
    step = resume(run)
    # an earlier start that ended inside its k-NN has saved the epoch's numbers, and not yet the epoch's line
    ended = step % run.loader.steps_per_epoch == 0 or step == run.total_steps
    epoch_is_open = ended and run.recorder.epoch.count > 0
    run.log = RunLog(args.output_dir, step, run.total_steps, epoch_is_open)
    run.log.forward_to(args.log_to, vars(args))
    describe(run, step)
    run.watch = Watch(SIGNALS, args.watchdog_s, lambda: save_last_whole_step(run))
    with run.lock or contextlib.nullcontext(), run.watch, losing_nothing(run), run.loader:
        if epoch_is_open:
            set_schedules(run, step - 1)
            finish_epoch(run, step)
        keep_copy(run, step)  # the earlier start may have ended before it could
        if step == 0 and run.probe_images:  # what the run starts from, so that later lines show what it forgets
            run.log.write({"kind": "start", "step": 0} | probe(run, step, due(args, 0, last=True)))
        while step < run.total_steps:
            step = train_one_epoch(run, step)
            finish_epoch(run, step)
            if step < run.total_steps:
                heed_votes(run, step)
        run.agreement.settle()
        dist.barrier()  # SLURM may end all processes some time after the first: not while rank 0 writes
        run.log.print(f"done: {step} steps; {checkpoint_path(args)}")
        close(run)
    return step


def train_one_epoch(run, step):
    """From global step `step` to the end of its epoch (or of the run); returns the step reached."""
    epoch, first = divmod(step, run.loader.steps_per_epoch)
    last = min((epoch + 1) * run.loader.steps_per_epoch, run.total_steps)
    set_modes(run, step)
    run.buffers_before_step = buffers_before_step(run, step)
    clock = Clock()
    for batches in clock.waiting(run.loader.steps(epoch, first, run.total_steps)):
        features = train_one_step(run, batches, step)
        step += 1
        run.watch.progress(step)
        if step % run.args.log_every == 0 or step == last:
            log_step(run, step, features, clock)
        if step == last:
            break  # the epoch's own line and checkpoint follow, as one, and then the vote
        heed_votes(run, step)
    return step


def train_one_step(run, batches, step):
    """One step of the optimizer on the M micro-batches of all processes; returns this process's features of the global
    crops, (2 M B, D)."""
    objective, backbone = run.model.objective, run.model.backbone
    set_schedules(run, step)
    objective.before_step(step, backbone)
    loss, terms, rows = backward_of_joint_batch(run, batches, step)
    grad_norm = update_weights(run, step)
    objective.after_step(step, backbone)
    bad_images = loss.new_full((), sum(batch.num_failed for batch in batches))
    run.recorder.record(step, loss=loss, **terms, grad_norm=grad_norm, bad_images=bad_images)
    run.log.advance()
    return torch.cat(rows[:NUM_GLOBAL]).detach()


class Model(nn.Module):
    """All that is trained and saved."""

    def __init__(self, backbone, objective):
        super().__init__()
        self.backbone, self.objective = backbone, objective


def update_weights(run, step):
    """Clip and step, unless the gradient is not finite; returns its global norm, on the device."""
    optimizer, scaler, objective = run.optimizer, run.scaler, run.model.objective
    run.buffers_before_step = None
    scaler.unscale_(optimizer)
    objective.before_update(step, run.model.backbone)
    grad_norm = objective.clip_gradients(run.model.parameters(), run.args.clip_grad or math.inf)
    finite = torch.isfinite(grad_norm)  # the same on all processes: DDP has averaged the gradients
    if scaler.is_enabled():
        scaler.step(optimizer)  # skips an overflow and lowers the scale
        scaler.update()
    elif run.args.optimizer != "lars":
        optimizer.found_inf = (~finite).float()  # fused kernels then leave the weights alone, and nobody waits
        optimizer.step()
    elif finite:  # lars has no such switch: one wait per step
        optimizer.step()
    optimizer.zero_grad()
    return grad_norm


# ---- what a run shows ------------------------------------------------------------------------------------------------


def log_step(run, step, features, clock):
    """Averages since the last line, and what this step's features look like: two waits for the device,
    and on a GPU a third, of the routine that finds RankMe's eigenvalues."""
    run.recorder.read(may_overflow=run.may_overflow)
    averages = run.recorder.line.take()
    images = run.effective_batch
    features = all_gather_rows(features).unflatten(0, (world_size(), NUM_GLOBAL, -1))
    run.model.objective.share_statistics()
    bad_images = count_bad_images(run)
    if rank() == 0:
        line = dict(  # refuses a name that comes twice
            **log_head("step", run, step, averages),
            **feature_tensors(features.flatten(0, 2)),
            **run.model.objective.statistics(features[:, 0].flatten(0, 1), averages),
            bad_images=bad_images,
            images_per_s=clock.steps * images / clock.elapsed(),
            data_wait=clock.waited / clock.elapsed(),  # share of the time
            memory_mb=memory_mb(run.device),
        )
        line = read_together(line)
        run.log.write(line)
        if step > warmup_steps(run):  # before that, p is near uniform in every run
            run.log.warn(diagnose(line), run.model.objective.advice)
    clock.restart()


def log_head(kind, run, step, averages):
    """What both kinds of lines in log.txt begin with, under DINO's names."""
    return {
        "kind": kind,
        "step": step,
        "epoch": (step - 1) // run.loader.steps_per_epoch,
        **{f"train_{name}": value for name, value in averages.items() if name != "bad_images"},
        "train_lr": run.optimizer.param_groups[0]["lr"],
        "train_wd": run.optimizer.param_groups[0]["weight_decay"],
    }


def count_bad_images(run):
    """Files that could not be read in this epoch, over all processes. Raises UserError above --max_bad_images."""
    total = round(run.recorder.epoch.sums["bad_images"] * world_size())  # the recorder's numbers are means over these
    run.loader.check_bad_images(total)
    return total


def finish_epoch(run, step):
    """k-NN and the linear probe where they are asked for, the epoch's line, its checkpoint, and then the figure."""
    last, found = step == run.total_steps, {}
    if names := due(run.args, (step - 1) // run.loader.steps_per_epoch, last):
        save(run, step)  # with the epoch's numbers in it: a run that dies in here comes back to this line
        found = probe(run, step, names)
    run.recorder.read(may_overflow=run.may_overflow)
    run.log.write(log_head("epoch", run, step, run.recorder.epoch.take()) | found)
    if last or copy_is_due(run, step):  # else the clock decides
        save(run, step, stopping=last)
    run.log.draw(last)


def describe(run, step):
    """State what was derived from the flags, before the first step."""
    args, model, say = run.args, run.model, run.log.print
    counts = [(group["decayed"], sum(p.numel() for p in group["params"])) for group in run.optimizer.param_groups]
    decayed, plain = (sum(count for kind, count in counts if kind is decays) for decays in (True, False))
    say(f"commit {commit()}; torch {torch.__version__}; {run.device}, {world_size()} processes, {args.precision}")
    say(f"data: {len(run.loader.images)} images of {args.dataset}, {run.loader.steps_per_epoch} steps per epoch, "
        f"{run.loader.num_views} views, {args.augmentation} augmentation")  # fmt: skip
    say(f"backbone: {args.arch}, D = {model.backbone.embed_dim}, "
        f"{sum(p.numel() for p in model.backbone.parameters()) / 1e6:.2f} M parameters, {run.compiled}")  # fmt: skip
    for text in (run.loader.describe_views(), *model.objective.describe()):
        say(text)
    say(
        f"{describe_batch(run)}; lr {peak_lr(run):.3g} = {args.lr:g} x {run.effective_batch} / 256 after "
        f"{warmup_steps(run)} steps; {args.optimizer}, {decayed:,} parameters decayed, {plain:,} not"
    )
    for text in describe_tuning(run):
        say(text)
    if (run.batch_size, run.accum_steps) != (args.batch_size_per_gpu, args.accum_steps):
        say(
            f"note: to keep the run's {run.effective_batch} images per step, --batch_size_per_gpu "
            f"{args.batch_size_per_gpu} --accum_steps {args.accum_steps} became {run.batch_size} and {run.accum_steps}"
        )
    if warmup_steps(run) < round(args.warmup_epochs * run.loader.steps_per_epoch):
        say(f"note: --warmup_epochs {args.warmup_epochs:g} is shortened to a tenth of the run")
    start = f"resuming at step {step}" if step else "starting"
    say(f"{start}: {run.total_steps} steps in all; run folder {args.output_dir}")


def describe_batch(run):
    """Micro-batches x images at once x processes."""
    if run.accum_steps == 1:
        return f"effective batch {run.effective_batch} = {run.batch_size} x {world_size()}"
    return (f"effective batch {run.accum_steps} x {run.batch_size} x {world_size()} = {run.effective_batch} images per "
            f"step, exact; {run.accum_steps - 1} of {run.accum_steps} go through the backbone once more")  # fmt: skip


# ---- when to save and to stop (checkpoint.py: how) -------------------------------------------------------------------


def heed_votes(run, step):
    """After a step: save, or end, where a process has voted for it."""
    run.buffers_before_step = buffers_before_step(run, step)
    action = run.agreement.vote(own_vote(run))
    if action != GO_ON:
        save(run, step, stopping=action == STOP)
    if action == STOP:
        stop(run, step)


def own_vote(run):
    """What this process votes for: what all of them should do now."""
    run.writer.raise_failure()
    if run.watch.signals or (run.args.on_collapse == "stop" and run.log.collapse):
        return STOP
    if rank() != 0 or time.monotonic() - run.saved_at <= 60 * run.args.save_every_minutes:
        return GO_ON
    run.saved_at = time.monotonic()  # several processes save one step later: this vote is not cast twice
    return SAVE


def stop(run, step):
    """End after a signal that at least one process has got, or for a collapse: the checkpoint is written."""
    run.agreement.settle()
    number = torch.tensor(int(run.watch.signals[0]) if run.watch.signals else 0)
    # also a barrier: SLURM ends all processes when the first one leaves, and rank 0 may still be writing
    dist.all_reduce(number, dist.ReduceOp.MAX)
    if not number:
        close(run)
        found = run.log.collapse or "a collapse"
        raise RunFailed(f"step {step}: --on_collapse stop: this looks like {found}; saved in "
                        f"{checkpoint_path(run.args)}; --on_collapse warn goes on")  # fmt: skip
    run.log.print(f"stopped by a signal at step {step}; the same command goes on from {checkpoint_path(run.args)}")
    close(run)
    raise Stopped(128 + int(number))


def close(run):
    run.log.close()
    if run.lock:
        run.lock.close()


# ---- what a run is made of -------------------------------------------------------------------------------------------


def build_run(args):
    device = init_distributed(args.device)
    check_arguments(args, device)
    on_rank_zero(make_folder, args.output_dir)
    lock = on_rank_zero(lock_folder, args.output_dir)
    try:
        return assemble(args, device, lock)
    except BaseException:
        if lock:
            lock.close()
        raise


def assemble(args, device, lock):
    """The Run, in a folder that is there and locked; all processes together."""
    earlier = find_earlier(args)
    batch_size, accum_steps = share_of_batch(args, earlier)
    if batch_size * accum_steps * world_size() < 2:
        raise UserError("--batch_size_per_gpu 1: batch norm needs at least 2 images per step, over all processes")
    images = open_dataset(args, "train")
    probe_images = open_probe_images(args, images)
    refuse_differences(args, images)
    fill_in_levels(args, images, earlier)
    loader = data.TrainLoader(images, args, batch_size, rank(), world_size(), device=device, accum_steps=accum_steps)
    total_steps = min(args.epochs * loader.steps_per_epoch, args.max_steps or sys.maxsize)
    seed_everything(args.seed)
    model = build_model(args, Course(device, batch_size, accum_steps, loader.steps_per_epoch, total_steps), earlier)
    check_crop_sizes(args, model.backbone)
    if accum_steps > 1:
        refuse_batch_norm(args, model.backbone, accum_steps)
    model.to(device)
    memory_format = lay_out(model, device)
    try_it = partial(pass_through, model.train().backbone, args, loader.recipe, batch_size, memory_format, device)
    compiled = compile_backbone(model.backbone, try_it) if args.compile else "not compiled"
    return Run(
        args,
        device,
        batch_size,
        accum_steps,
        loader,
        model,
        first_half=wrap(FirstHalf(model.backbone, model.objective, args.precision), device),
        second_half=wrap(model.objective, device),
        optimizer=build_optimizer(args, model),
        scaler=torch.amp.GradScaler(device.type, enabled=args.precision == "fp16"),
        total_steps=total_steps,
        probe_images=probe_images,
        lock=lock,
        earlier=earlier,
        compiled=compiled,
        ahead=Ahead(device, memory_format),
    )


def build_model(args, course, earlier=None):
    backbone = new_backbone(args) if args.init_from is None else load_backbone(args, earlier)
    build = build_cplearn if args.objective == "cplearn" else OBJECTIVES[args.objective].from_args
    with fitting_in_memory(args):
        return convert_sync_batchnorm(Model(backbone, build(args, backbone, course)))


@contextlib.contextmanager
def fitting_in_memory(args):
    """Inside, sizes come from flags. Raises UserError where there is no such memory."""
    try:
        yield
    except RuntimeError as error:
        if "allocate memory" not in str(error) and "overflow" not in str(error):
            raise
        sizes = [f"--{name} {value}" for name in OBJECTIVES[args.objective].flags
                 if type(value := getattr(args, name)) is int and value > 1024]  # fmt: skip
        raise UserError(f"{' '.join(sizes)}: a head of these sizes does not fit in memory; lower them") from None


def build_cplearn(args, backbone, course):
    shard = (rank(), world_size()) if args.shard_codes else (0, 1)
    head = CPLearnHead.from_args(args, backbone.embed_dim, course, shard, args.bare_head)
    sizes = course.batch_size * course.accum_steps, args.out_dim
    loss_function = choose_loss(
        args.head_impl, course.device, *sizes, args.precision == "bf16", args.dictionary, args.shard_codes
    )
    return CPLearn(
        head, args.beta, args.prior, NUM_GLOBAL, args.prior_scope, loss_function, batch_size=course.batch_size
    )


def check_arguments(args, device):
    """Fill in what depends on the data set and the device, and refuse flags that do not go together."""
    data.resolve_dataset_defaults(args)
    args.lr = args.lr or default_lr(args.img_size)
    args.precision = choose_precision(args.precision, device)
    args.compile = device.type == "cuda" if args.compile is None else args.compile
    if args.log_to is not None:
        on_rank_zero(require, args.log_to)
    if args.shard_codes and args.prior_scope == "local":
        raise UserError("--prior_scope local: with --shard_codes every process sees all images; use global")
    if args.precision == "fp16" and device.type == "cpu":
        raise UserError("--precision fp16: a CPU has no use for it; use bf16 or fp32")
    if 0 < args.watchdog_s < 10:
        raise UserError(f"--watchdog_s {args.watchdog_s:g}: expected 0 (never) or at least 10; a step takes its time")


@command_line
def main(argv=None):
    args = get_args_parser().parse_args(argv)
    if args.replay is None:
        train(args)
        return
    run = build_run(args_of_run(args))
    with run.lock or contextlib.nullcontext(), run.loader:
        replay(run, resume(run), train_one_step)


if __name__ == "__main__":
    main()
