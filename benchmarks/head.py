"""Time, memory and accuracy of CPLearn's loss, forward and backward, in each form it is written in.

    python -m benchmarks.head                                     # B = 64, F = 384, K = 131072
    python -m benchmarks.head --num_codes 16384 131072 1048576 --plot head.png --output head.json
    python -m benchmarks.head --device cuda --forms dense triton  # on a GPU, with Triton's kernels

Times are medians of interleaved repeats in one process; ratios are of CPU time on a CPU, of wall time on a GPU. Extra
memory is the peak above what embeddings and dictionary take: on a CPU of a process of its own for each form, on a GPU
of PyTorch's allocator. Gradient errors are against float64: the largest error of an entry, relative to the largest
entry; "peaked" embeddings lie near a code, as late in training. Prints a table in markdown, and below it what each form
said that could not run.
"""

import argparse
import contextlib
import ctypes
import gc
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import matplotlib
import torch
from torch.nn import functional as F

from cplearn_head import code_temperature, cplearn_loss, prior_loss
from dictionary import STORAGES, Dictionary, HadamardDictionary, base_order
from fused_loss import fused_cplearn_loss
from monitor import save_figure
from running.files import write_whole

matplotlib.use("Agg")
from matplotlib import pyplot

BASELINE = "authors' form, fp32"


def get_parser():
    parser = argparse.ArgumentParser("benchmarks.head", description=__doc__.split("\n")[0])
    parser.add_argument("--batch_size", type=int, default=64, help="images (default 64)")
    parser.add_argument("--dim", type=int, default=384, help="head width F (default 384)")
    parser.add_argument("--num_codes", type=int, nargs="+", default=[131072], help="K, one or more (default 131072)")
    parser.add_argument("--views", type=int, default=2, help="views, the first two global; the authors' form knows 2")
    parser.add_argument("--prior", default="kl", choices=("kl", "ce"))
    parser.add_argument("--tile", type=int, help="codes in a tile (default: chosen by the loss)")
    parser.add_argument("--repeats", type=int, default=9, help="timed rounds over all forms, after one untimed")
    parser.add_argument("--threads", type=int, default=1, help="more than 1 makes CPU time a sum over threads")
    parser.add_argument("--forms", nargs="+", help="part of the forms' names; default all")
    parser.add_argument("--errors", action=argparse.BooleanOptionalAction, default=True, help="against float64")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--output", type=Path, help="JSON file (default: none)")
    parser.add_argument("--plot", type=Path, help="PNG of time and memory against K (default: none)")
    parser.add_argument("--memory_of", help=argparse.SUPPRESS)  # the process that measures one form's memory
    return parser


def main(args):
    torch.set_num_threads(args.threads)
    if args.memory_of:
        print(json.dumps(peak_of_process(*form_and_inputs(args, args.num_codes[0], args.memory_of))))
        return
    results = {num_codes: measure(args, num_codes) for num_codes in args.num_codes}
    if args.output:
        settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k != "memory_of"}
        save_record(args.output, settings=settings, results=results)
    if args.plot:
        plot(results, args.plot, args.device)


def measure(args, num_codes):
    """{form: {figure: number}}, printed as a table; "failed" is what a form said that could not run."""
    forms = chosen_forms(args)
    rows = {name: {} for name in forms}
    measure_memory(args, num_codes, rows)
    measure_times(args, num_codes, forms, rows)
    if args.errors:
        for kind in ("random", "peaked"):
            measure_errors(args, num_codes, kind, forms, rows)
    time_of, _ = shown_time(args.device)
    for row in rows.values():
        if time_of in row and time_of in rows.get(BASELINE, {}):
            row["ratio"] = row[time_of] / rows[BASELINE][time_of]
    print(f"B {args.batch_size}, {args.views} views, F {args.dim}, K {num_codes}\n\n{table(rows)}\n", flush=True)
    for name, row in rows.items():
        if "failed" in row:
            print(f"{name} failed: {row['failed']}", flush=True)
    return rows


@contextlib.contextmanager
def noting_failure(row):
    """A form that fails says so in its row, and the others go on."""
    try:
        yield
    except Exception as error:
        row["failed"] = f"{type(error).__name__}: {str(error).strip()}"


def shown_time(device):
    """(figure, what it is): the time that is compared and drawn."""
    return ("cpu_ms", "CPU time, ms") if device == "cpu" else ("wall_ms", "time on the GPU, ms")


# ---- the forms: each maps (views, codes, tau) to the loss ------------------------------------------------------------


def chosen_forms(args):
    forms = all_forms(args)
    if args.views != 2:
        del forms[BASELINE]
    return {n: form for n, form in forms.items() if not args.forms or any(part in n for part in args.forms)}


def all_forms(args):
    """{name: (kind of dictionary, storage, loss)}"""
    dense = {
        "dense, fp32": partial(dense_loss, prior=args.prior),
        "dense, bf16 autocast": partial(autocast_loss, prior=args.prior),
        "dense, bf16 products": partial(bf16_products_loss, prior=args.prior),
        "dense, fp32, compiled": compiled(partial(dense_loss, prior=args.prior)),
        "dense, bf16 products, compiled": compiled(partial(bf16_products_loss, prior=args.prior)),
    }
    forms = {BASELINE: ("rademacher", "int8", partial(authors_loss, prior=args.prior))}
    forms |= {name: ("rademacher", "int8", loss) for name, loss in dense.items()}
    tiled = partial(fused_loss, prior=args.prior, tile=args.tile)
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        forms[f"tiled, {name}"] = ("rademacher", "int8", partial(tiled, compute_dtype=dtype))
    bf16 = partial(tiled, compute_dtype=torch.bfloat16)
    forms["tiled, bf16, several processes"] = ("rademacher", "int8", partial(bf16, reduce_mean=as_if_reduced))
    for storage in ("bits", "seed"):
        forms[f"tiled, bf16, codes as {storage}"] = ("rademacher", storage, bf16)
    if has_hadamard(args.dim):
        forms["hadamard, fp32"] = ("hadamard", "int8", tiled)
    if args.device == "cuda":
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            for storage in STORAGES:
                loss = partial(fused_loss, prior=args.prior, impl="triton", compute_dtype=dtype)
                forms[f"triton, {name}, codes as {storage}"] = ("rademacher", storage, loss)
    return forms


def has_hadamard(dim):
    try:
        base_order(dim)
    except ValueError:
        return False
    return True


def compiled(loss):
    """Without its warm-up: the untimed round compiles."""
    return torch.compile(loss, dynamic=False)


def authors_loss(views, codes, tau, prior, beta=0.25):
    """As the authors wrote it: a float32 dictionary, the loss once in each direction, a softmax wherever it is used."""
    codes = float_dictionary(codes.data)
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
    return cplearn_loss(views, codes.dense(), tau, prior=prior)[0]


def autocast_loss(views, codes, tau, prior):
    with torch.autocast(views[0].device.type, torch.bfloat16):
        return dense_loss(views, codes, tau, prior)


def bf16_products_loss(views, codes, tau, prior, beta=0.25):
    """The plain form with nothing but its products in bfloat16."""
    codes = codes.data.to(torch.bfloat16)
    log_probs = [((h.to(torch.bfloat16) @ codes).float() / tau).log_softmax(dim=1) for h in views]
    probs = [log_p.exp() for log_p in log_probs[:2]]
    pairs = [(a, v) for a in range(2) for v in range(len(views)) if v != a]
    invariance = sum(-(probs[a] * log_probs[v]).sum(dim=1).mean() for a, v in pairs) / len(pairs)
    return beta * invariance + sum(prior_loss(p.mean(dim=0), prior) for p in probs) / 2


def fused_loss(views, codes, tau, **settings):
    return fused_cplearn_loss(views, codes, tau, **settings)[0]


def as_if_reduced(mean):
    """Not the same tensor, as after an all-reduce: the gradient then takes a pass of its own."""
    return mean * 1.0


# ---- measurements ----------------------------------------------------------------------------------------------------


def make_inputs(args, num_codes, kind, dictionary=("rademacher", "int8")):
    """(views of unit-normalised embeddings as with "l2", codes, tau)"""
    torch.manual_seed(0)
    cls = HadamardDictionary if dictionary[0] == "hadamard" else Dictionary
    codes = cls(args.dim, num_codes, storage=dictionary[1]).to(args.device)
    views = [torch.randn(args.batch_size, args.dim) for _ in range(args.views)]
    if kind == "peaked":
        near = codes.columns(torch.arange(args.batch_size, device=args.device)).float().T.cpu()
        views = [near[: len(h)] + 0.5 * h for h in views]
    radius = math.sqrt(args.dim / args.batch_size)
    views = [(F.normalize(h, dim=1) * radius).to(args.device).requires_grad_() for h in views]
    return views, codes, code_temperature(num_codes, args.dim, args.batch_size)


def gradients(form, views, codes, tau):
    return torch.autograd.grad(form(views, codes, tau), views)


def measure_times(args, num_codes, forms, rows):
    inputs = {kind: make_inputs(args, num_codes, "random", kind) for kind in {form[:2] for form in forms.values()}}
    cpu, wall = {n: [] for n in forms}, {n: [] for n in forms}
    for repeat in range(args.repeats + 1):
        for name, (*kind, form) in forms.items():
            if "failed" in rows[name]:
                continue
            with noting_failure(rows[name]):
                times = time_once(args.device, form, inputs[tuple(kind)])
                if repeat > 0:
                    cpu[name].append(times[0])
                    wall[name].append(times[1])
    for name, row in rows.items():
        if "failed" not in row:
            row["cpu_ms"], row["cpu_ms_min"] = statistics.median(cpu[name]), min(cpu[name])
            row["wall_ms"] = statistics.median(wall[name])


def time_once(device, form, inputs):
    """(CPU time, wall time) in ms."""
    synchronize(device)
    start = time.process_time(), time.perf_counter()
    gradients(form, *inputs)
    synchronize(device)
    return 1000 * (time.process_time() - start[0]), 1000 * (time.perf_counter() - start[1])


def synchronize(device):
    if device == "cuda":
        torch.cuda.synchronize()


def measure_memory(args, num_codes, rows):
    for name, row in rows.items():
        with noting_failure(row):
            if args.device == "cuda":
                row["extra_mb"] = peak_on_gpu(*form_and_inputs(args, num_codes, name))
            else:
                row["extra_mb"] = memory_in_own_process(name, num_codes)


def memory_in_own_process(name, num_codes):
    command = [sys.executable, "-m", "benchmarks.head", *sys.argv[1:]]
    return json.loads(output_of([*command, "--memory_of", name, "--num_codes", str(num_codes)]))


def output_of(command):
    """What a command prints. Raises RuntimeError with the end of what it said where it fails."""
    # arrays have pages of their own, which freeing gives back: what the form needs, without the holes that glibc leaves
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode != 0:
        raise RuntimeError(f"exit code {done.returncode}\n{done.stderr[-2000:]}")
    return done.stdout


def form_and_inputs(args, num_codes, name):
    """The form, and its inputs; libraries, the compiler and the authors' dictionary have taken their memory."""
    *kind, form = all_forms(args)[name]
    inputs = make_inputs(args, num_codes, "random", kind)
    gradients(form, *inputs)
    if name == BASELINE:
        float_dictionary(inputs[1].data)
    return form, inputs


def peak_on_gpu(form, inputs):
    """MB that one forward and backward adds to the GPU's allocator at its peak."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gradients(form, *inputs)
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def peak_of_process(form, inputs):
    """MB that one forward and backward adds to this process at its peak (Linux)."""
    release_memory()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = process_memory("VmRSS")
    gradients(form, *inputs)
    return process_memory("VmHWM") - before


def release_memory():
    """What was freed goes back to the system, so that using it again counts."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def process_memory(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) * 1024 / 1e6


def measure_errors(args, num_codes, kind, forms, rows):
    expected = {}
    for name, (*dictionary, form) in forms.items():
        if "failed" in rows[name]:
            continue
        with noting_failure(rows[name]):
            views, codes, tau = make_inputs(args, num_codes, kind, dictionary)
            if dictionary[0] not in expected:
                exact = [h.detach().double().requires_grad_() for h in views]
                expected[dictionary[0]] = gradients(partial(dense_loss, prior=args.prior), exact, codes, tau)
            rows[name][f"error_{kind}"] = error(gradients(form, views, codes, tau), expected[dictionary[0]])


def error(got, want):
    """Largest error of an entry, relative to the largest entry."""
    scale = max(g.abs().max() for g in want)
    return max(float((g - w).abs().max() / scale) for g, w in zip(got, want, strict=True))


def plot(results, path, device):
    """Time and memory of every form against K, on logarithmic axes."""
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    names = list(next(iter(results.values())))
    for axis, (key, label) in zip(axes, (shown_time(device), ("extra_mb", "peak extra memory, MB")), strict=True):
        for i, name in enumerate(names):
            style = {"color": pyplot.cm.viridis(i / len(names)), "marker": "osv^Dx*+P"[i % 9]}
            heights = [rows[name].get(key, math.nan) for rows in results.values()]  # nan: the form failed
            axis.plot(list(results), heights, label=name, **style)
        axis.set(xscale="log", yscale="log", xlabel="codes K", ylabel=f"{label} (forward and backward)")
        axis.set_xticks(list(results), [f"{num_codes:,}" for num_codes in results])
        axis.xaxis.minorticks_off()
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right", fontsize="small", frameon=False)
    save_figure(figure, path, dpi=120)


def table(rows):
    head = ["form", "CPU ms", "wall ms", "to authors'", "extra MB", "error, random", "error, peaked"]
    keys = [("cpu_ms", three_digits), ("wall_ms", three_digits), ("ratio", "{:.3f}".format)]
    keys += [("extra_mb", "{:.1f}".format), ("error_random", "{:.1e}".format), ("error_peaked", "{:.1e}".format)]
    lines = [head, ["---"] * len(head)]
    lines += [[name, *(write(row[k]) if k in row else "" for k, write in keys)] for name, row in rows.items()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def three_digits(x):
    """983.4 -> 983, 9.834 -> 9.83, 0.09834 -> 0.0983."""
    return f"{x:.{max(0, 2 - math.floor(math.log10(x)))}f}" if x > 0 else "0"


def machine():
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return gpu | {
        "cpu": models[0].split(":")[1].strip() if models else platform.processor(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
    }


def save_record(path, **found):
    """One JSON: a measurement, the command that made it and the machine."""
    record = {"command": sys.orig_argv[1:], "machine": machine()} | found
    write_whole(path, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main(get_parser().parse_args())
