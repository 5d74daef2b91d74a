"""Gradients of one step, exactly the joint batch's, however many micro-batches it comes in.

    rows_m = first half of micro-batch m (each image by itself)     loss = second half of all rows (the joint batch)
    d loss / d backbone = sum over m of (d rows_m / d backbone)^T (d loss / d rows_m)      for any loss; nothing is
                                                                                           divided by M anywhere
    work of M micro-batches, a backward pass being two forward passes: 3 + (M - 1) / M instead of 3
    memory: the graph of one micro-batch, the rows of all, the second half on them

Micro-batch m of rank r draws what process r M + m of a run without micro-batches would draw: M micro-batches on one
process are M processes, with drop path, pixel noise and all. `run` is main_cplearn's Run.
"""

import contextlib
import itertools
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from monitor import plot_views
from objective import features_of_views
from optimizer import rests, steps_at_rest
from utils import (
    RunFailed,
    UserError,
    autocast,
    rank,
    reaching_peers,
    seed_everything,
    world_size,
)

# places of draws that no seed of (seed, step, rank) has: numpy pads with zeros, (seed, step) is (seed, step, 0)
JOINT, OWN_DRAWS = 2**32, 1


def backward_of_joint_batch(run, batches, step):
    """Leaves the gradients of a step, averaged over processes and scaled by run.scaler; returns (loss, terms, rows).

    The last micro-batch keeps its graph while the second half runs; those before it go through the backbone once
    without a graph, and once more with it. batches: a list of M. rows: the objective's, of all of them."""
    passes = [first_pass(run, batches, step, m) for m in range(len(batches))]
    rows, kept = zip(*passes, strict=True)
    again = 0 if rests(run, step) else len(batches) - 1
    for row in itertools.chain(*rows[:again]):
        row.requires_grad_()
    joint = join(rows)
    loss, terms = run.second_half(joint, join(kept), draws(run, step, JOINT))
    run.scaler.scale(loss).backward()
    for m in range(again):
        second_pass(run, batches, step, m, rows[m], kept[m])
    return loss, terms, joint


def first_pass(run, batches, step, m):
    """Rows of micro-batch m, and what the objective prepared for it."""
    run.watch.progress(run.watch.step)
    with_graph = m == len(batches) - 1 and not rests(run, step)
    views = views_of(run, batches, step, m)
    if step == m == 0 and rank() == 0:
        with run.log.going_on("views.png"):
            plot_views(views, run.args.mean, run.args.std, Path(run.args.output_dir) / "views.png")
    with torch.no_grad(), autocast(views[0].device, run.args.precision):
        generator = draws(run, step, rank() * len(batches) + m)
        kept = run.model.objective.prepare(run.model.backbone, views, generator)
    with torch.set_grad_enabled(with_graph), averaging(run.first_half, len(batches) == 1):
        return run.first_half(views, kept), kept


def second_pass(run, batches, step, m, rows, kept):
    """The backbone's gradient for micro-batch m, whose rows have theirs; the last of these averages over processes."""
    run.watch.progress(run.watch.step)
    with averaging(run.first_half, m == len(batches) - 2):
        again = run.first_half(views_of(run, batches, step, m), kept)
        if step == max(run.log.first_step, steps_at_rest(run)):
            check_repeated(rows, again)
        pairs = [(new, old.grad) for new, old in zip(again, rows, strict=True) if old.grad is not None]
        torch.autograd.backward(*zip(*pairs, strict=True))


def views_of(run, batches, step, m):
    """V x (B, C, h, w) of micro-batch m, which draws as process rank * M + m of a run without micro-batches would."""
    # drop path and pixel noise: functions of the step, not histories
    seed_everything(run.args.seed, step, rank() * len(batches) + m)
    return run.ahead(lambda: run.loader.augment(batches[m], run.device))


class Ahead:
    """Makes views on a stream of their own: the host is ahead of the GPU, which so makes the views of the next
    micro-batch while it still trains on the last one. Elsewhere than on CUDA views are made when they are asked for.

    Two sets of views are kept, in turn, so that a host far ahead needs no more memory. Whatever uses a set must have
    been started before the next one is asked for: a micro-batch's backward pass before the next micro-batch."""

    def __init__(self, device, memory_format=torch.contiguous_format):
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.memory_format, self.sets, self.trained = memory_format, [None, None], None

    def __call__(self, make):
        if self.stream is None:
            return [view.contiguous(memory_format=self.memory_format) for view in make()]
        training = torch.cuda.current_stream()
        trained_before, self.trained = self.trained, training.record_event()
        with torch.cuda.stream(self.stream):
            made, views = make(), self.sets.pop(0)
            if trained_before is None or views is None:  # the first two times
                views = [torch.empty_like(view, memory_format=self.memory_format) for view in made]
            else:
                self.stream.wait_event(trained_before)  # on what is to be written over
            for view, new in zip(views, made, strict=True):
                view.copy_(new)
            ready = self.stream.record_event()
        training.wait_event(ready)
        self.sets.append(views)
        return views


def draws(run, step, place):
    """The generator of an objective's own draws: of a micro-batch, by its number over all processes, or JOINT."""
    words = np.random.SeedSequence([run.args.seed, step, place, OWN_DRAWS]).generate_state(1)
    return torch.Generator(run.device).manual_seed(int(words[0]))


def join(parts):
    """Lists of tensors, one list per micro-batch -> one list of their rows together."""
    return list(parts[0]) if len(parts) == 1 else [torch.cat(rows) for rows in zip(*parts, strict=True)]


def averaging(half, now):
    """Around forward and backward of a half: DDP averages its gradients over processes here, or leaves them be."""
    return contextlib.nullcontext() if now or world_size() == 1 else half.no_sync()


def check_repeated(rows, again):
    """The second pass must give the rows of the first. Raises RunFailed for a backbone with draws of its own."""
    for old, new in zip(rows, again, strict=True):
        difference = float((old - new).detach().norm() / old.detach().norm().clamp_min(1e-30))
        if difference > 0.05:  # rounding in bf16 is below 0.01, a dropped path changes a tenth and more
            raise RunFailed(
                f"--accum_steps: a second pass through the backbone changed its features by {difference:.0%}: it draws "
                "from a generator of its own, or one image depends on another; use --accum_steps 1"
            )


class FirstHalf(nn.Module):
    """Backbone and the objective's `embed` as one module for DDP, in the backbone's precision.

    The bound method is no submodule: the objective's parameters belong to the other half."""

    def __init__(self, backbone, objective, precision):
        super().__init__()
        self.backbone, self.embed, self.precision = backbone, objective.embed, precision

    def forward(self, views, kept=()):
        """Views V x (B, C, h, w) and what `prepare` gave -> the objective's rows, in float32 at least."""
        with autocast(views[0].device, self.precision):
            rows = self.embed(self.backbone, views, kept)
        return [row.to(torch.promote_types(row.dtype, torch.float32)) for row in rows]


def wrap(half, device):
    """A half of the model, wrapped so that its gradients are averaged over processes."""
    if world_size() == 1 or not any(p.requires_grad for p in half.parameters()):
        return half
    # gloo's processes have met, nccl's meet here
    meeting = reaching_peers() if device.type == "cuda" else contextlib.nullcontext()
    with warnings.catch_warnings(), meeting:
        warnings.simplefilter("ignore", FutureWarning)  # its successor would overwrite the shards of a dictionary
        return DistributedDataParallel(
            half,
            device_ids=[device.index] if device.type == "cuda" else None,
            broadcast_buffers=False,  # batch norm is synchronised, and the dictionary never changes
            gradient_as_bucket_view=True,
        )


def pass_through(backbone, args, recipe, batch_size, memory_format, device):
    """One forward and backward pass on black views, of the sizes and in the precision of a micro-batch."""
    views = [
        torch.zeros(batch_size, args.in_chans, group.size, group.size, device=device).to(memory_format=memory_format)
        for group in recipe.view_groups()
        for _ in group.views
    ]
    with autocast(views[0].device, args.precision):
        features = features_of_views(backbone, views)
    torch.stack(features).sum().backward()


def refuse_batch_norm(args, backbone, accum_steps):
    for name, module in backbone.named_modules():
        if getattr(module, "running_var", None) is not None:
            raise UserError(
                f"--accum_steps {accum_steps}: {name} of --arch {args.arch} is a batch norm, which would see each "
                "micro-batch alone; take a backbone without (vit_*, resnet8, convnext_*) or --accum_steps 1"
            )
