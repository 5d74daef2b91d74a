"""What each --objective costs beside the backbone: time and memory of head and loss, and what of a head is kept.

    OMP_NUM_THREADS=1 python -m benchmarks.objectives --output benchmarks/objectives.json     # B 64, D 384, two views
    python -m benchmarks.objectives --device cuda --num_codes 131072 --forms cplearn dino     # on a GPU: never run

A step here is the objective's: from features that want a gradient, through head and loss, backward, and what the
objective does after an update (DINO's teacher's head follows, SwAV's prototypes get their length again). AdamW's step
is not in it, nor what needs the backbone: DINO's teacher's features (a forward pass of the global views), GEDI's chain
(20 forward and backward passes, through the head too) and its features of noisy images and samples. Objectives are
built as main_cplearn.py builds them, in float32, on one thread.

ms: CPU time on a CPU, median of --repeats rounds in which all forms take turns; ratios are medians of rounds, to
"cplearn, tiled" at the same K, and for a form without codes, at the middle one of --num_codes. step MB: peak of a
step, gradients of the head included, above what is there before it; on a CPU of another process. trained MB: the head's
trained parameters. held MB: those three times (AdamW), codes, buffers, and DINO's teacher's head. checkpoint MB: what
of all that is saved.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn

import data
import main_cplearn
from benchmarks.head import (
    output_of,
    process_memory,
    release_memory,
    save_record,
    shown_time,
    synchronize,
    three_digits,
)
from objective import Course

FORMS = {  # name: flags of main_cplearn.py, --out_dim aside
    "cplearn, dense": "--objective cplearn --head_impl dense",
    "cplearn, tiled": "--objective cplearn --head_impl tiled",
    "cplearn, hadamard": "--objective cplearn --head_impl tiled --dictionary hadamard",
    "self_classifier, frozen codes": "--objective self_classifier --head frozen_codes",
    "self_classifier, mlp": "--objective self_classifier --head mlp",
    "swav": "--objective swav",
    "dino": "--objective dino",
    "gedi_no_gen": "--objective gedi_no_gen",
    "gedi": "--objective gedi",
    "barlow_twins, 2048 wide": "--objective barlow_twins --hidden_dim 2048 --proj_dim 2048",
    "barlow_twins, 8192 wide": "--objective barlow_twins --hidden_dim 8192 --proj_dim 8192",
    "vicreg, 2048 wide": "--objective vicreg --hidden_dim 2048 --proj_dim 2048",
    "lejepa": "--objective lejepa",
    "visreg": "--objective visreg",
}
BASELINE = "cplearn, tiled"
MOST_CODES = {"gedi": 16384}  # its chain, which is not in the figures, goes 20 times through a head of 2048 K weights
RUN = "--dataset imagefolder --data_path . --img_size 32 --precision fp32"
EPOCH, STEP, LAST = 10, 50, 100  # a step in the middle of a run: nothing is frozen any more


def get_parser():
    parser = argparse.ArgumentParser("benchmarks.objectives", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--batch_size", type=int, default=64, help="images (default 64)")
    add("--dim", type=int, default=384, help="width D of the backbone's features (default 384)")
    add("--num_codes", type=int, nargs="+", default=[2048, 16384, 131072], help="K (default 2048 16384 131072)")
    add("--repeats", type=int, default=5, help="timed rounds over all forms, after one untimed (default 5)")
    add("--forms", nargs="+", default=[""], help="part of the forms' names; default all")
    add("--device", default="cpu", choices=("cpu", "cuda"))
    add("--output", type=Path, help="JSON file (default: none)")
    add("--memory_only", action="store_true", help=argparse.SUPPRESS)  # the process that measures memory
    return parser


def main(args):
    torch.set_num_threads(1)
    if args.memory_only:
        print(json.dumps({name: peak_of_process(Step(args, name, args.num_codes[0])) for name in args.forms}))
        return
    results = {num_codes: measure(args, num_codes) for num_codes in args.num_codes}
    print(table(results, args.device))
    if args.output:
        settings = {k: v for k, v in vars(args).items() if k not in ("output", "memory_only")}
        save_record(args.output, settings=settings, results=results)


def measure(args, num_codes):
    """{form: {figure: number}} of the forms with K codes; beside the middle K, also of those without."""
    names = chosen_forms(args, num_codes)
    steps = {name: Step(args, name, num_codes) for name in names}
    rows = {name: sizes_mb(step.objective) for name, step in steps.items()}
    times = interleaved_times(steps, args.repeats)
    on_gpu = args.device == "cuda"
    peaks = {name: peak_on_gpu(step) for name, step in steps.items()} if on_gpu else peaks_mb(args, names, num_codes)
    for name, row in rows.items():
        row["ms"] = statistics.median(times[name])
        row["ratio"] = statistics.median(a / b for a, b in zip(times[name], times[BASELINE], strict=True))
        row["step_mb"] = peaks[name]
    return rows


def chosen_forms(args, num_codes):
    middle = statistics.median_low(args.num_codes)
    return [
        name
        for name in FORMS
        if (name == BASELINE or any(part in name for part in args.forms))
        and (has_codes(name) or num_codes == middle)
        and num_codes <= MOST_CODES.get(name, num_codes)
    ]


def has_codes(name):
    return "out_dim" in main_cplearn.OBJECTIVES[FORMS[name].split()[1]].flags


class Step:
    """An objective, and inputs for its half of a training step."""

    def __init__(self, args, name, num_codes):
        torch.manual_seed(0)
        words = [*RUN.split(), *FORMS[name].split(), "--batch_size_per_gpu", str(args.batch_size)]
        words += ["--out_dim", str(num_codes)] if has_codes(name) else []
        flags = data.resolve_dataset_defaults(main_cplearn.get_args_parser().parse_args(words))
        self.device = torch.device(args.device)
        course = Course(self.device, args.batch_size, accum_steps=1, steps_per_epoch=EPOCH, total_steps=LAST)
        self.backbone = StandIn(flags, args.dim).to(self.device)
        self.objective = build(flags, self.backbone, course).to(self.device).train()
        self.rows, self.kept = self.first_half(flags, args.batch_size)

    def first_half(self, flags, num_images):
        """What the objective asks of the backbone: features, a teacher's features, samples."""
        shape = (num_images, flags.in_chans, flags.img_size, flags.img_size)
        views = [torch.randn(shape, device=self.device) for _ in range(main_cplearn.NUM_GLOBAL)]
        self.objective.before_step(STEP, self.backbone)
        with torch.no_grad():
            kept = self.objective.prepare(self.backbone, views, self.generator())
            return [row.clone() for row in self.objective.embed(self.backbone, views, kept)], kept

    def generator(self):
        return torch.Generator(self.device).manual_seed(0)

    def __call__(self):
        rows = [row.requires_grad_() for row in self.rows]
        self.objective.before_step(STEP, self.backbone)
        loss, _ = self.objective(rows, self.kept, self.generator())
        loss.backward()
        self.objective.before_update(STEP, self.backbone)
        self.objective.after_step(STEP, self.backbone)

    def forget_gradients(self):
        """As the optimizer does after its step."""
        for tensor in (*self.rows, *self.objective.parameters()):
            tensor.grad = None


class StandIn(nn.Module):
    """A backbone that costs next to nothing: features are a linear map of the pixels."""

    def __init__(self, flags, embed_dim):
        super().__init__()
        self.embed_dim = embed_dim
        self.linear = nn.Linear(flags.in_chans * flags.img_size**2, embed_dim)

    def forward(self, images):
        return self.linear(images.flatten(1))


def build(flags, backbone, course):
    if flags.objective == "cplearn":
        return main_cplearn.build_cplearn(flags, backbone, course)
    return main_cplearn.OBJECTIVES[flags.objective].from_args(flags, backbone, course)


# ---- measurements ----------------------------------------------------------------------------------------------------


def interleaved_times(steps, repeats):
    """{form: ms of each round}; the forms take turns, so that a noisy neighbour meets all of them alike."""
    times = {name: [] for name in steps}
    for _ in range(repeats + 1):
        for name, step in steps.items():
            times[name].append(time_once(step))
    return {name: every[1:] for name, every in times.items()}


def time_once(step):
    clock = time.process_time if step.device.type == "cpu" else time.perf_counter
    synchronize(step.device.type)
    start = clock()
    step()
    synchronize(step.device.type)
    elapsed = clock() - start
    step.forget_gradients()
    return 1000 * elapsed


def peaks_mb(args, names, num_codes):
    """{form: MB}, measured one after another by another process."""
    words = ["--num_codes", num_codes, "--batch_size", args.batch_size, "--dim", args.dim, "--forms", *names]
    command = [sys.executable, "-m", "benchmarks.objectives", "--memory_only", *map(str, words)]
    return json.loads(output_of(command))


def peak_of_process(step):
    """MB that a step adds to this process at its peak (Linux). The first step compiles and loads libraries."""
    step()
    step.forget_gradients()
    release_memory()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = process_memory("VmRSS")
    step()
    return process_memory("VmHWM") - before


def peak_on_gpu(step):
    """MB that a step adds to the GPU's allocator at its peak."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    peak = torch.cuda.max_memory_allocated() - before
    step.forget_gradients()
    return peak / 1e6


def sizes_mb(objective):
    """What lies still between steps. The teacher's backbone is not the head's."""
    own = [(n, t) for n, t in (*objective.named_parameters(), *objective.named_buffers()) if is_own(n)]
    trained = sum(p.nbytes for p in objective.parameters() if p.requires_grad)
    saved = sum(t.nbytes for n, t in objective.state_dict().items() if is_own(n))
    held = sum(t.nbytes for _, t in own)
    return {
        "trained_mb": trained / 1e6,
        "held_mb": (held + 2 * trained) / 1e6,  # AdamW's moments
        "checkpoint_mb": (saved + 2 * trained) / 1e6,
    }


def is_own(name):
    return not name.startswith("teacher.backbone.")


def table(results, device):
    head = ["objective", "K", shown_time(device)[1], "to tiled", "step MB", "trained MB", "held MB", "checkpoint MB"]
    lines = [head, ["---"] * len(head)]
    figures = [("ms", three_digits), ("ratio", three_digits)]
    figures += [(f"{name}_mb", "{:.1f}".format) for name in ("step", "trained", "held", "checkpoint")]
    for name in FORMS:
        for num_codes, rows in results.items():
            if name in rows:
                codes = f"{num_codes}" if has_codes(name) else ""
                lines.append([name, codes, *(write(rows[name][figure]) for figure, write in figures)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    main(get_parser().parse_args())
