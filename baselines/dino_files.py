"""Training checkpoints that DINO's own code wrote -> the state of a run of ours, which goes on from it.

    checkpoint.pth of main_dino.py: student ("module.backbone.*", "module.head.*"), teacher, optimizer with two groups,
    epoch (the next one), args (a Namespace), dino_loss {"center": (1, K)}, and fp16_scaler where it was used

The other direction needs nothing: our checkpoints hold `student`, `teacher` and `dino_loss` under the same names.
"""

import argparse
from itertools import chain

import torch

from checkpoint import FREE_FLAGS, checkpoint_args, checkpoint_state
from utils import UserError, one_line, rank

ENTRIES = ("student", "teacher", "optimizer", "epoch", "args", "dino_loss")
MOMENTS = {"step", "exp_avg", "exp_avg_sq"}  # what AdamW keeps of a parameter
OF_NO_WEIGHT = FREE_FLAGS | {"seed", "precision"}  # draws differ anyway; DINO says --use_fp16


def translate(run, state):
    """DINO's training checkpoint in the form of ours, at the same epoch; says in one line what was taken over.

    Raises UserError for what cannot be: entries that are not there, other sizes, moments of another optimizer."""
    missing = [name for name in ENTRIES if name not in state]
    if missing:
        raise UserError(f"{state['path']}: neither a checkpoint of this program nor DINO's: it has no {missing[0]}")
    student, teacher = (without_wrapper(state[key]) for key in ("student", "teacher"))
    differences = changed_flags(run, state["args"])
    check_sizes(run, student, state["path"], differences)
    moments = moments_by_name(run, state, list(student))
    numbers = enumerate(name for group in run.optimizer.param_groups for name in group["names"])
    kept = {number: moments[name] for number, name in numbers if name in moments}
    if type(state["epoch"]) is not int:
        raise ValueError(f"its epoch is {one_line(state['epoch'], 60)}")
    step = state["epoch"] * run.loader.steps_per_epoch
    if rank() == 0:
        said = f"flags that differ: {'; '.join(differences)}" if differences else "all flags in common are the same"
        print(f"{state['path']}: DINO's checkpoint: student, teacher, centre and AdamW's moments of {len(kept)} "
              f"parameters; goes on at epoch {state['epoch']}, step {step}; {said}")  # fmt: skip
    return checkpoint_state(run, step) | {
        "student": student,
        "teacher": teacher,
        "dino_loss": state["dino_loss"],
        "optimizer": {"state": kept},
        "fp16_scaler": state.get("fp16_scaler") or run.scaler.state_dict(),
    }


def without_wrapper(weights):
    return {name.removeprefix("module."): tensor for name, tensor in weights.items()}


def changed_flags(run, args):
    """In words: flags that the file and this run have and that differ; the effective batch where the file says it."""
    then, now = vars(args) if isinstance(args, argparse.Namespace) else dict(args), checkpoint_args(run.args)
    then = {name: list(value) if isinstance(value, tuple) else value for name, value in then.items()}
    both = sorted(then.keys() & now.keys() - OF_NO_WEIGHT)
    # None here is a default that depends on other flags
    changes = [f"--{n} {one_line(then[n], 60)} -> {now[n]}" for n in both if now[n] is not None and then[n] != now[n]]
    if {"batch_size_per_gpu", "world_size"} <= then.keys():
        total = then["batch_size_per_gpu"] * then["world_size"]
        changes += [f"effective batch {total} -> {run.effective_batch}"] if total != run.effective_batch else []
    return changes


def check_sizes(run, student, path, differences):
    """Raises UserError, naming the flags that differ, where a tensor of the student has another shape or no place."""
    own = checkpoint_state(run, 0)["student"]
    wrong = [
        f"{name} {shape_of(student, name)} in the file, {shape_of(own, name)} here"
        for name in sorted(own.keys() | student.keys())
        if shape_of(student, name) != shape_of(own, name)
    ]
    if wrong:
        more = f" and {len(wrong) - 2} more" if len(wrong) > 2 else ""
        raise UserError(f"{path}: DINO's checkpoint is of another model: {'; '.join(wrong[:2])}{more}; flags that "
                        f"differ: {'; '.join(differences) or 'none'}")  # fmt: skip


def shape_of(weights, name):
    return "x".join(map(str, weights[name].shape)) or "a scalar" if name in weights else "missing"


def moments_by_name(run, state, names):
    """{our name of a parameter: what AdamW keeps of it}; the frozen last layer of the first epochs has nothing yet.

    DINO numbers parameters in the order of the student's, `names`, first those with decay (more than one dimension and
    no bias), then the rest."""
    parameters = {name.removeprefix("objective."): (name, p) for name, p in run.model.named_parameters()}
    trained = [name for name in names if name in parameters and parameters[name][1].requires_grad]
    decayed = [name for name in trained if parameters[name][1].ndim > 1 and not name.endswith(".bias")]
    groups = [decayed, [name for name in trained if name not in decayed]]
    optimizer, kind = state["optimizer"], getattr(state["args"], "optimizer", "adamw")
    other = next((set(kept) for kept in optimizer["state"].values() if set(kept) != MOMENTS), None)
    if run.args.optimizer != "adamw" or other is not None:
        kind = f"{kind}, which keeps {', '.join(sorted(other))}" if other else kind
        raise UserError(f"{state['path']}: its optimizer is {kind}, this run's {run.args.optimizer}; to go on from "
                        "DINO's checkpoint both must be adamw")  # fmt: skip
    theirs = [group["params"] for group in optimizer["param_groups"]]
    if [len(group) for group in theirs] != [len(group) for group in groups]:
        numbers, expected = (" + ".join(str(len(group)) for group in lists) for lists in (theirs, groups))
        raise UserError(f"{state['path']}: its optimizer has {numbers} parameters, this model {expected}; look at "
                        "--norm_last_layer")  # fmt: skip
    numbers = dict(zip(chain(*groups), chain(*theirs), strict=True))
    return {
        parameters[name][0]: optimizer["state"][number] | {"step": as_step(optimizer["state"][number]["step"])}
        for name, number in numbers.items()
        if number in optimizer["state"]
    }


def as_step(value):
    """A tensor; torch before 1.12 kept an int."""
    return torch.as_tensor(value, dtype=torch.float32)
