"""Time, memory and accuracy of CPLearn's loss, forward and backward, in each form it is written in.

    python -m benchmarks.head                                     # B = 64, F = 384, K = 131072
    python -m benchmarks.head --num_codes 1048576 --repeats 3

Times are medians of interleaved repeats in one process, ratios are of those medians. Peak extra memory is measured in a
process of its own for each form, above what embeddings and dictionary take. Gradient errors are against float64: the
largest error of an entry, relative to the largest entry; "peaked" embeddings lie near a code, as late in training.
Prints a table in markdown and writes everything, with versions, as JSON.
"""

import argparse
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional as F

from cplearn_head import code_temperature, cplearn_loss, prior_loss
from fused_loss import fused_cplearn_loss

BASELINE = "authors' form, fp32"


def get_parser():
    parser = argparse.ArgumentParser("benchmarks.head", description=__doc__.split("\n")[0])
    parser.add_argument("--batch_size", type=int, default=64, help="images (default 64)")
    parser.add_argument("--dim", type=int, default=384, help="head width F (default 384)")
    parser.add_argument("--num_codes", type=int, default=131072, help="K (default 131072)")
    parser.add_argument("--views", type=int, default=2, help="views, the first two global; the authors' form knows 2")
    parser.add_argument("--prior", default="kl", choices=("kl", "ce"))
    parser.add_argument("--tile", type=int, help="codes in a tile (default: chosen by the loss)")
    parser.add_argument("--repeats", type=int, default=9, help="timed rounds over all forms, after one untimed")
    parser.add_argument("--threads", type=int, default=1, help="more than 1 makes CPU time a sum over threads")
    parser.add_argument("--forms", nargs="+", help="part of the forms' names; default all")
    parser.add_argument("--errors", action=argparse.BooleanOptionalAction, default=True, help="against float64")
    parser.add_argument("--output", type=Path, help="JSON file (default: none)")
    parser.add_argument("--memory_of", help=argparse.SUPPRESS)  # the process that measures one form's memory
    return parser


def main(args):
    torch.set_num_threads(args.threads)
    if args.memory_of:
        print(json.dumps(peak_extra_memory(args)))
        return
    rows = {name: {} for name in chosen_forms(args)}
    for name in rows:
        rows[name]["extra_mb"] = memory_in_own_process(name)
    for name, times in measure_times(args).items():
        rows[name] |= times
    if args.errors:
        for kind in ("random", "peaked"):
            for name, error in gradient_errors(args, kind).items():
                rows[name][f"error_{kind}"] = error
    for row in rows.values():
        if BASELINE in rows:
            row["ratio"] = row["cpu_ms"] / rows[BASELINE]["cpu_ms"]
    print(table(rows))
    if args.output:
        settings = {k: v for k, v in vars(args).items() if k not in ("output", "memory_of")}
        record = {"command": sys.orig_argv[1:], "settings": settings, "machine": machine(), "forms": rows}
        args.output.write_text(json.dumps(record, indent=1) + "\n")


# ---- the forms: each maps (views, codes int8, tau) to the loss -------------------------------------------------------


def chosen_forms(args):
    forms = all_forms(args)
    if args.views != 2:
        del forms[BASELINE]
    return {n: form for n, form in forms.items() if not args.forms or any(part in n for part in args.forms)}


def all_forms(args):
    tiled = partial(tiled_loss, prior=args.prior, tile=args.tile)
    return {
        BASELINE: partial(authors_loss, prior=args.prior),
        "dense, fp32": partial(dense_loss, prior=args.prior),
        "dense, bf16 autocast": partial(autocast_loss, prior=args.prior),
        "dense, bf16 products": partial(bf16_products_loss, prior=args.prior),
        "tiled, fp32": partial(tiled, compute_dtype=torch.float32),
        "tiled, bf16": partial(tiled, compute_dtype=torch.bfloat16),
        "tiled, bf16, several processes": partial(tiled, compute_dtype=torch.bfloat16, reduce_mean=as_if_reduced),
    }


def authors_loss(views, codes, tau, prior, beta=0.25):
    """As the authors wrote it: a float32 dictionary, the loss once in each direction, a softmax wherever it is used."""
    codes = float_dictionary(codes)
    z1, z2 = (h @ codes / tau for h in views)

    def one_direction(z_target, z):
        priors = [prior_loss(s.softmax(dim=1).mean(dim=0), prior) for s in (z_target, z)]
        invariance = -(z_target.softmax(dim=1) * z.log_softmax(dim=1)).sum(dim=1).mean()
        return sum(priors) / 2 + beta * invariance

    return (one_direction(z1, z2) + one_direction(z2, z1)) / 2


_float_dictionaries = {}


def float_dictionary(codes):
    """The dictionary as floats, made once: it is part of that model, not work or memory of its loss."""
    key = (codes.data_ptr(), codes.shape)
    if key not in _float_dictionaries:
        _float_dictionaries.clear()
        _float_dictionaries[key] = codes.float()
    return _float_dictionaries[key]


def dense_loss(views, codes, tau, prior):
    return cplearn_loss(views, codes, tau, prior=prior)[0]


def autocast_loss(views, codes, tau, prior):
    with torch.autocast("cpu", torch.bfloat16):
        return dense_loss(views, codes, tau, prior)


def bf16_products_loss(views, codes, tau, prior, beta=0.25):
    """The plain form with nothing but its products in bfloat16."""
    codes = codes.to(torch.bfloat16)
    log_probs = [((h.to(torch.bfloat16) @ codes).float() / tau).log_softmax(dim=1) for h in views]
    probs = [log_p.exp() for log_p in log_probs[:2]]
    pairs = [(a, v) for a in range(2) for v in range(len(views)) if v != a]
    invariance = sum(-(probs[a] * log_probs[v]).sum(dim=1).mean() for a, v in pairs) / len(pairs)
    return beta * invariance + sum(prior_loss(p.mean(dim=0), prior) for p in probs) / 2


def tiled_loss(views, codes, tau, **settings):
    return fused_cplearn_loss(views, codes, tau, **settings)[0]


def as_if_reduced(mean):
    """Not the same tensor, as after an all-reduce: the gradient then takes a stream of its own."""
    return mean * 1.0


# ---- measurements ----------------------------------------------------------------------------------------------------


def make_inputs(args, kind, num_codes=None):
    """(views of unit-normalised embeddings as with "l2", codes int8, tau)"""
    num_codes = num_codes or args.num_codes
    torch.manual_seed(0)
    # in place: nothing but the dictionary itself is ever allocated
    codes = torch.randint(0, 2, (args.dim, num_codes), dtype=torch.int8).mul_(2).sub_(1)
    views = [torch.randn(args.batch_size, args.dim) for _ in range(args.views)]
    if kind == "peaked":
        near = codes[:, : args.batch_size].float().T
        views = [near[: len(h)] + 0.5 * h for h in views]
    radius = math.sqrt(args.dim / args.batch_size)
    views = [(F.normalize(h, dim=1) * radius).requires_grad_() for h in views]
    return views, codes, code_temperature(num_codes, args.dim, args.batch_size)


def gradients(form, views, codes, tau):
    return torch.autograd.grad(form(views, codes, tau), views)


def measure_times(args):
    inputs = make_inputs(args, "random")
    forms = chosen_forms(args)
    cpu, wall = {n: [] for n in forms}, {n: [] for n in forms}
    for repeat in range(args.repeats + 1):
        for name, form in forms.items():
            start = time.process_time(), time.perf_counter()
            gradients(form, *inputs)
            if repeat > 0:
                cpu[name].append(1000 * (time.process_time() - start[0]))
                wall[name].append(1000 * (time.perf_counter() - start[1]))
    return {
        n: {"cpu_ms": statistics.median(cpu[n]), "cpu_ms_min": min(cpu[n]), "wall_ms": statistics.median(wall[n])}
        for n in forms
    }


def memory_in_own_process(name):
    command = [sys.executable, "-m", "benchmarks.head", *sys.argv[1:], "--memory_of", name]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def peak_extra_memory(args):
    """MB that one forward and backward adds to the process at its peak; Linux."""
    form = all_forms(args)[args.memory_of]
    gradients(form, *make_inputs(args, "random", num_codes=8192))  # libraries take their memory
    inputs = make_inputs(args, "random")
    if args.memory_of == BASELINE:
        float_dictionary(inputs[1])
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = process_memory("VmRSS")
    gradients(form, *inputs)
    return process_memory("VmHWM") - before


def process_memory(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) * 1024 / 1e6


def gradient_errors(args, kind):
    views, codes, tau = make_inputs(args, kind)
    exact = [h.detach().double().requires_grad_() for h in views]
    expected = gradients(partial(dense_loss, prior=args.prior), exact, codes, tau)
    scale = max(g.abs().max() for g in expected)
    return {
        name: max(
            float((g - want).abs().max() / scale)
            for g, want in zip(gradients(form, views, codes, tau), expected, strict=True)
        )
        for name, form in chosen_forms(args).items()
    }


def table(rows):
    head = ["form", "CPU ms", "wall ms", "to authors'", "extra MB", "error, random", "error, peaked"]
    keys = [("cpu_ms", ".0f"), ("wall_ms", ".0f"), ("ratio", ".3f"), ("extra_mb", ".1f")]
    keys += [("error_random", ".1e"), ("error_peaked", ".1e")]
    lines = [head, ["---"] * len(head)]
    lines += [[name, *(format(row[k], f) if k in row else "" for k, f in keys)] for name, row in rows.items()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def machine():
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": models[0].split(":")[1].strip() if models else platform.processor(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
    }


if __name__ == "__main__":
    main(get_parser().parse_args())
