"""A step whose loss or gradient is not finite, once more, with every tensor looked at: main_cplearn.py --replay FOLDER.

    replay(run, step, train_one_step)      # run: as it was built, and resumed at `step`; nothing is written

Order, views and noise are functions of the step: from the last checkpoint on the run is the same run again, up to the
step that fails. That step is then done in the run's precision, in float32 and in float64; of each it is said which
module gave the first output that is not finite, or in which module the first gradient was lost.
"""

import argparse
import contextlib
import copy
import math
import tempfile
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from accumulation import backward_of_joint_batch
from checkpoint import load_checkpoint
from optimizer import set_modes
from utils import UserError, world_size

TRIES = {"fp32": torch.float32, "fp64": torch.float64}


def args_of_run(args):
    """The flags of the run in the folder --replay, of its checkpoint; the command's flags where there is none yet."""
    path = Path(args.replay) / "checkpoint.pth"
    if world_size() > 1:
        raise UserError(f"--replay with {world_size()} processes: expected one, which makes the batch of all of them")
    if not Path(args.replay).is_dir():
        raise UserError(f"--replay {args.replay}: no such folder; expected the --output_dir of a run")
    own = dict(load_checkpoint(path)["args"]) if path.exists() else {}
    if not own:
        print(f"note: {path} is not there yet: the run begins at step 0, with the flags of this command")
    kept = {"replay": args.replay, "output_dir": args.replay, "device": args.device, "num_workers": args.num_workers}
    kept |= {"knn_every": 0, "linear_every": 0, "probe_data": None, "no_resume": False, "compile": False}
    return argparse.Namespace(**vars(args) | own | kept)


class Quiet:
    """In the place of a run's log: nothing is written."""

    first_step = -1  # no step checks its second pass

    def print(self, text):
        print(text, flush=True)

    def advance(self):
        pass

    def going_on(self, what):
        return contextlib.suppress(Exception)


class Still:
    """In the place of its watch."""

    step = 0

    def progress(self, step):
        pass


def replay(run, step, train_one_step):
    """Raises UserError where all steps up to the end are finite."""
    with tempfile.TemporaryDirectory() as run.args.output_dir:  # the first step draws views.png
        run.log, run.watch = Quiet(), Still()
        go_on_from(run, step, train_one_step)


def go_on_from(run, step, train_one_step):
    bad = bad_tensors(run.model.named_parameters())
    if bad:
        print(f"step {step}: the checkpoint's own weights are not finite: {', '.join(bad)}")
        return
    print(f"from the checkpoint at step {step} on", flush=True)
    while step < run.total_steps:
        epoch, first = divmod(step, run.loader.steps_per_epoch)
        set_modes(run, step)
        for batches in run.loader.steps(epoch, first, run.total_steps):
            kept = {name: tensor.detach().clone() for name, tensor in unlearned(run.model)}
            scaler = copy.deepcopy(run.scaler.state_dict())
            train_one_step(run, batches, step)
            numbers = taken(run)
            step += 1
            if not all(map(math.isfinite, numbers.values())):
                put_back(run, kept, scaler)
                say_step(step, numbers)
                return explain(run, batches, step - 1)
            if step % 100 == 0:
                print(f"step {step}: loss {numbers['loss']:.4g}, finite", flush=True)
            if step % run.loader.steps_per_epoch == 0 or step == run.total_steps:
                break
    raise UserError(f"--replay: {step} steps, and all of them are finite here; expected a run that met a loss that is "
                    "not, on the same device and torch")  # fmt: skip


def taken(run):
    """Numbers of the step that was recorded last, on this process."""
    _, row = run.recorder.pending.pop()
    return dict(zip(run.recorder.names, row.tolist(), strict=True))


def unlearned(model):
    """(name, tensor) of what a step changes although its update is not taken: buffers, and a teacher's parameters."""
    yield from model.named_buffers()
    yield from ((name, parameter) for name, parameter in model.named_parameters() if not parameter.requires_grad)


@torch.no_grad()
def put_back(run, kept, scaler):
    run.scaler.load_state_dict(scaler)
    run.optimizer.zero_grad()
    for name, tensor in unlearned(run.model):
        tensor.copy_(kept[name])


def say_step(step, numbers):
    bad = [name for name, value in numbers.items() if not math.isfinite(value)]
    print(f"step {step}: {', '.join(f'{name} is {numbers[name]}' for name in bad)}")


def explain(run, batches, step):
    """One line for each precision: what was the first tensor that is not finite."""
    as_run = run.args.precision
    make_views, weights = run.ahead, {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    for precision, dtype in {as_run: torch.float32, **TRIES}.items():
        run.args.precision = run.first_half.precision = "fp32" if precision == "fp64" else precision
        run.model.to(dtype).load_state_dict(weights)
        run.ahead = lambda make, dtype=dtype: [view.to(dtype) for view in make_views(make)]
        print(f"in {precision}: {first_bad_tensor(run, batches, step)}", flush=True)
        run.optimizer.zero_grad()


def first_bad_tensor(run, batches, step):
    """A sentence."""
    found = Found()
    with watching(run.model, found), Operations(found):
        loss, _, _ = backward_of_joint_batch(run, batches, step)
    if found.output is None and not torch.isfinite(loss):
        found.output = f"the loss is {float(loss)}, after modules whose outputs are finite"
    if found.output:
        return found.output + (f"; first operation with finite inputs: {found.operation}" if found.operation else "")
    if found.gradient:
        return f"all outputs are finite, loss {float(loss):.4g}; {found.gradient}"
    bad = bad_tensors((name, p.grad) for name, p in run.model.named_parameters() if p.grad is not None)
    if bad:
        return f"loss {float(loss):.4g}; the gradient of {bad[0]} is not finite"
    return f"everything is finite, loss {float(loss):.4g}"


class Found:
    output = gradient = operation = None


@contextlib.contextmanager
def watching(model, found):
    """Inside, the first module to give an output, and the first to get a gradient, that is not finite is found."""
    handles = [
        module.register_forward_hook(looking_at(name, module, found))
        for name, module in model.named_modules()
        if name and not list(module.children())  # the innermost ones are the first to end
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def looking_at(name, module, found):
    def hook(_, inputs, output):
        for tensor in tensors_in(output):
            if found.output is None and not is_finite(tensor):
                largest = max((float(x.detach().abs().max()) for x in tensors_in(inputs)), default=math.nan)
                found.output = (f"{name} ({type(module).__name__}) gives {describe(tensor)}; the largest of its inputs "
                                f"is {largest:.3g}")  # fmt: skip
            if tensor.requires_grad and tensor.grad_fn is not None:
                tensor.register_hook(gradient_hook)

    def gradient_hook(gradient):
        if found.gradient is None and not is_finite(gradient):
            found.gradient = f"the gradient that comes to the output of {name} has {describe(gradient)}"

    return hook


class Operations(TorchDispatchMode):
    """Finds the first operation that makes a NaN or an infinity of finite numbers, until a module's output shows it."""

    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        output = function(*arguments, **(keywords or {}))
        if self.found.operation is None and self.found.output is None:
            made = [x for x in tensors_in(output) if not is_finite(x)]
            if made and all(map(is_finite, tensors_in(arguments))):
                self.found.operation = f"{function} gives {describe(made[0])}"
        return output


def tensors_in(value):
    """Floating tensors of a nest of tuples and lists."""
    if torch.is_tensor(value):
        return [value] if value.is_floating_point() else []
    return [x for part in value for x in tensors_in(part)] if isinstance(value, tuple | list) else []


def is_finite(tensor):
    return bool(torch.isfinite(tensor.detach()).all())


def describe(tensor):
    bad = int((~torch.isfinite(tensor)).sum())
    return f"{bad} of {tensor.numel()} numbers that are not finite, shape {tuple(tensor.shape)}, {tensor.dtype}"


def bad_tensors(pairs):
    return [name for name, tensor in pairs if tensor.is_floating_point() and not is_finite(tensor)]
