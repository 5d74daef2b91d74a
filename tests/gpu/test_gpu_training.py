"""Whole runs on the device: they learn, come back, compile, and several processes are one."""

import functools
import math
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

import main_cplearn
from checkpoint import load_checkpoint
from monitor import RunLog, read_log
from running.watch import Watch
from runs import ROOT, assert_same_checkpoint, flags, launch, run_to_end, tensors

SIGUSR2 = 12
VIT = {"arch": "vit_tiny", "patch_size": 8, "width": None}
FEW = {"max_steps": 10, "warmup_epochs": 0, "log_every": 1, "drop_path_rate": 0}


def losses(folder):
    return [line["train_loss"] for line in read_log(folder / "log.txt") if line["kind"] == "step"]


def assert_near(folder, other, rel):
    assert losses(folder) == pytest.approx(losses(other), rel=rel)


@pytest.mark.parametrize("backbone", [{}, VIT], ids=["resnet8", "vit_tiny"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_run_learns(trained, device, backbone, precision):
    if (device, precision) == ("cpu", "fp16"):
        pytest.skip("fp16 is refused on a CPU")
    crops = {"local_crops_number": 2, "local_crops_size": 16}
    folder = trained(precision=precision, lr=0.03, warmup_epochs=0, **crops, **backbone)
    first, *_, last = losses(folder)
    assert math.isfinite(last) and last < first
    steps = [line for line in read_log(folder / "log.txt") if line["kind"] == "step"]
    assert all(line["memory_mb"] > 0 for line in steps)


def test_a_run_in_bf16_is_near_the_one_in_fp32(trained):
    assert_near(trained(precision="bf16", **FEW), trained(precision="fp32", **FEW), 0.05)


def test_the_device_computes_what_the_cpu_computes(trained):
    assert_near(trained(**FEW), trained(device="cpu", **FEW), 2e-3)


@pytest.mark.parametrize("head_impl", ["dense", "tiled", "triton"])
@pytest.mark.parametrize("codes_storage", ["int8", "bits", "seed"])
def test_every_form_of_the_head_trains_alike(trained, device, head_impl, codes_storage):
    if (device, head_impl) == ("cpu", "triton"):
        pytest.skip("Triton's kernels need a GPU; its interpreter is tests/test_triton_kernels.py")
    of_the_head = {"head_impl": head_impl, "codes_storage": codes_storage}
    assert_near(trained(**FEW, **of_the_head), trained(device="cpu", head_impl="dense", **FEW), 5e-3)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_stopped_run_goes_on_as_if_nothing_had_been(trained, device, pictures, tmp_path, precision):
    optimizer = "adamw" if device == "cpu" else "sgd"  # AdamW makes full steps of gradients that are 0 up to rounding
    settings = {"device": device, "precision": precision, "optimizer": optimizer, "num_workers": 2, "epochs": 2}
    undisturbed = trained(**settings)
    words = flags(pictures, tmp_path / "run", **settings)
    job = launch(words, tmp_path)
    job.wait_for("step 10/")
    job.signal(SIGUSR2)
    assert job.wait() == [128 + SIGUSR2], job.output()
    assert "resuming at step" in run_to_end(words, tmp_path)
    if device == "cpu":
        assert_same_checkpoint(tmp_path / "run" / "checkpoint.pth", undisturbed / "checkpoint.pth")
        return
    ours, theirs = (tensors(load_checkpoint(folder / "checkpoint.pth")) for folder in (tmp_path / "run", undisturbed))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():  # as far as the GPU's kernels are deterministic
        torch.testing.assert_close(value, theirs[name], rtol=1e-2, atol=1e-2, msg=name)
    assert losses(tmp_path / "run")[-1] == pytest.approx(losses(undisturbed)[-1], rel=1e-2)


@pytest.mark.parametrize("backbone", [{}, VIT, VIT | {"grad_checkpointing": True}], ids=["resnet8", "blocks", "again"])
def test_a_compiled_run_is_near_the_plain_one(trained, device, backbone):
    if device == "cpu" and backbone:
        pytest.skip("takes minutes on a CPU; tests/test_backbones.py has smaller ones")
    settings = FEW | backbone | {"local_crops_number": 2, "local_crops_size": 16}
    assert_near(trained(compile=True, **settings), trained(**settings), 5e-3)


def test_on_a_gpu_backbones_are_compiled(device, pictures, tmp_path):
    words = flags(pictures, tmp_path / "run", device=device, **FEW | VIT | {"no-compile": None, "max_steps": 2})
    assert ("compiled block by block" in run_to_end(words, tmp_path)) == (device == "cuda")


@pytest.mark.parametrize("head_impl", ["dense", "triton"])
def test_two_processes_on_one_device_are_one(trained, device, pictures, tmp_path, head_impl):
    if (device, head_impl) == ("cpu", "triton"):
        head_impl = "tiled"
    words = flags(pictures, tmp_path / "two", processes=2, device=device, head_impl=head_impl, **FEW)
    join = dict.fromkeys((0, 1), share_one_gpu_by_gloo)  # nccl refuses one GPU twice
    run_to_end(words, tmp_path, processes=2, faults=join if device == "cuda" else None)
    assert_near(tmp_path / "two", trained(head_impl=head_impl, **FEW), 5e-3)


def share_one_gpu_by_gloo():
    os.environ["LOCAL_RANK"] = "0"
    join = dist.init_process_group
    dist.init_process_group = lambda backend, **given: join("gloo", **given)


@pytest.mark.parametrize("head_impl", ["dense", "tiled", "triton"])
def test_a_step_never_waits_for_the_device(device, pictures, tmp_path, no_waits, head_impl):
    if (device, head_impl) == ("cpu", "triton"):
        pytest.skip("Triton's kernels need a GPU")
    words = flags(pictures, tmp_path / "run", device=device, head_impl=head_impl, precision="bf16", **VIT)
    run = main_cplearn.build_run(main_cplearn.get_args_parser().parse_args(words))
    run.log, run.watch = RunLog(tmp_path / "run", 0, run.total_steps), Watch((), 0, lambda: None)
    run.model.train()
    try:
        step = functools.partial(main_cplearn.train_one_step, run, next(run.loader.steps(0)))
        for number in range(3):  # the first steps fill caches and draw views.png
            step(number)
        with no_waits():
            step(3)
            step(4)
    finally:
        main_cplearn.close(run)
        dist.destroy_process_group()


ON_THE_CPU = """
import os, sys, torch, main_cplearn, eval_knn, eval_cluster
sys.argv, script = sys.argv[:1] + sys.argv[2:], sys.argv[1]
touched = []
there = torch.cuda.is_available()
if not there:  # a machine that says it has a GPU, and notes who makes a context on it
    torch.cuda.is_available = lambda: os.environ.get("CUDA_VISIBLE_DEVICES") != ""
    torch.cuda.is_initialized = lambda: bool(touched)
    torch.cuda._lazy_init = lambda: touched.append("lazy_init")
    torch.accelerator.current_stream = lambda *device: touched.append("current_stream") or torch.Stream("cpu")
    torch.Tensor.pin_memory = lambda tensor: touched.append("pin_memory") or tensor
sys.modules[script].main.__wrapped__(sys.argv[1:])
print("touched" if torch.cuda.is_initialized() or there and torch.cuda.memory_allocated() else "left alone", touched)
"""


@pytest.mark.parametrize("script", ["main_cplearn", "eval_knn", "eval_cluster"])
def test_device_cpu_leaves_the_gpu_alone(trained, pictures, tmp_path, script):
    words = flags(pictures, tmp_path, device="cpu", num_workers=2, knn_every=1, epochs=1)
    if script != "main_cplearn":
        checkpoint = trained(**FEW) / "checkpoint.pth"
        words = f"--checkpoint {checkpoint} --data_path {pictures} --device cpu --num_workers 2".split()
        words += ["--nb_knn", "5"] if script == "eval_knn" else []
    done = subprocess.run(
        [sys.executable, "-c", ON_THE_CPU, script, *words], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "left alone" in done.stdout, done.stdout
