"""Whole training steps in float64, as processes and micro-batches make them, for comparison with the joint batch."""

import math

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

import main_cplearn
from accumulation import FirstHalf, wrap
from monitor import RunLog
from running.watch import Watch
from utils import all_gather_rows, all_reduce_mean, rank, world_size


def steps_in_float64(rank, words, count=2):
    """Run `count` steps of `main_cplearn.py words`; in a process group, or alone.

    Returns one dict per step, of float64 arrays: "loss", "term NAME", "gradient NAME" (averaged over processes, before
    clipping; of zeros where there is none) and "state NAME": buffers, and parameters outside the optimizer."""
    torch.set_num_threads(1)
    run = main_cplearn.build_run(main_cplearn.get_args_parser().parse_args(list(map(str, words))))
    try:
        return list(_steps(run, count))
    finally:
        main_cplearn.close(run)


def train_on_rows(objective, rows_of_step, steps, first=0):
    """Steps of an objective alone, on this process's share of rows_of_step(step); returns all that must not depend on
    the number of processes, as arrays."""
    several = world_size() > 1
    wrapped = DistributedDataParallel(objective, broadcast_buffers=False) if several else objective
    found = []
    for step in range(first, steps):
        rows = [x.chunk(world_size())[rank()].clone().requires_grad_() for x in rows_of_step(step)]
        objective.before_step(step, None)
        loss, terms = wrapped(rows)
        loss.backward()
        objective.before_update(step, None)
        found += [all_reduce_mean(t.detach()) for t in (loss, *terms.values())]
        found += [all_gather_rows(x.grad) / world_size() for x in rows]
        for parameter in objective.parameters():
            if parameter.grad is not None:
                found.append(parameter.grad.clone())
                parameter.data -= 0.5 * parameter.grad
                parameter.grad = None
        objective.after_step(step, None)
        found += [b.clone().double() for b in objective.buffers()]
    return [t.numpy() for t in [*found, *(p.detach() for p in objective.parameters())]]


def over_processes(results):
    """Steps of several processes as one: terms are means over processes; all else must be equal on all of them."""
    joined = []
    for steps in zip(*results, strict=True):
        for name in steps[0]:
            if not name.startswith("term"):
                assert all(np.array_equal(step[name], steps[0][name]) for step in steps), name
        joined.append({name: np.mean([step[name] for step in steps], axis=0) for name in steps[0]})
    return joined


def assert_near(found, expected, tolerance=1e-10, but=()):
    """Relative: of gradients to the length of all of them, of anything else to its largest entry or 1."""
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        gradients = [name for name in ours if name.startswith("gradient")]
        size = math.sqrt(sum(np.square(theirs[name]).sum() for name in gradients))
        assert size > 1e-3
        for name in ours.keys() - set(but):
            scale = size if name in gradients else max(1.0, np.abs(theirs[name]).max(initial=0))
            assert np.abs(ours[name] - theirs[name]).max(initial=0) <= tolerance * scale, name


def _steps(run, count):
    run.model.double().train()
    run.optimizer = main_cplearn.build_optimizer(run.args, run.model)
    run.first_half = wrap(FirstHalf(run.model.backbone, run.model.objective, "fp32"), run.device)
    run.second_half = wrap(run.model.objective, run.device)
    if hasattr(getattr(run.model.objective, "loss_function", None), "keywords"):
        run.model.objective.loss_function.keywords["compute_dtype"] = torch.float64
    run.log, run.watch = RunLog(run.args.output_dir, 0, run.total_steps), Watch(())
    augment, update = run.loader.augment, main_cplearn.update_weights
    run.loader.augment = lambda *given: [view.double() for view in augment(*given)]
    found = {}

    def update_and_note(run, step):
        for name, p in run.model.named_parameters():
            if p.requires_grad:
                found[f"gradient {name}"] = torch.zeros_like(p) if p.grad is None else p.grad.clone()
        norm = update(run, step)
        found["norm"] = norm
        return norm

    record = run.recorder.record

    def record_and_note(step, **numbers):
        found.update({f"term {name}": value for name, value in numbers.items() if name not in ("bad_images",)})
        return record(step, **numbers)

    run.recorder.record = record_and_note
    main_cplearn.update_weights = update_and_note
    try:
        batches = (batches for epoch in range(count) for batches in run.loader.steps(epoch))
        for step in range(count):
            found.clear()
            main_cplearn.train_one_step(run, next(batches), step)
            run.model.objective.share_statistics()
            state = {name: b for name, b in run.model.named_buffers() if b.dtype not in (torch.int8, torch.uint8)}
            state |= {name: p for name, p in run.model.named_parameters() if not p.requires_grad}
            found |= {f"state {name}": value for name, value in state.items()}
            yield {name: value.detach().double().clone().numpy() for name, value in found.items()}
    finally:
        main_cplearn.update_weights = update
