"""--replay names the layer that loses a number, --on_collapse stop ends a collapsed run, probes are the evaluations."""

import json
import multiprocessing
import os
import signal
from functools import partial

import pytest
import torch

import eval_linear
import main_cplearn
from monitor import read_log
from runs import flags, kill_at, launch, write_pictures

LAYER = "backbone.blocks.1.mlp.fc1"


def plant_nan(at, layer=LAYER, gradient=False):
    """A fault for `launch`: from step `at` on, counted from 0, a layer gives a NaN, or gets one as its gradient."""
    original = main_cplearn.train_one_step

    def hook(module, inputs, output):
        if gradient:
            output.register_hook(lambda g: g * float("nan"))
            return output
        output.flatten()[3] = float("nan")
        return output

    def faulty(run, batches, step):
        if step == at:
            dict(run.model.named_modules())[layer].register_forward_hook(hook)
        return original(run, batches, step)

    main_cplearn.train_one_step = faulty


def plant_collapse():
    """A fault: lines 8, 16, 20 and later look like a collapse."""
    found = [("cluster", "cluster collapse: planted")]
    main_cplearn.diagnose = lambda line: found if line["step"] in (8, 16, 20, 24) else []


VIT = {"arch": "vit_mini", "patch_size": 8, "width": None, "drop_path_rate": 0.0}


@pytest.mark.parametrize(
    ("gradient", "at", "more"),
    [
        (False, 9, {}),
        (True, 9, {}),
        (False, 0, {}),  # before any checkpoint
        (False, 15, {"freeze_backbone_epochs": 1, "objective": "dino"}),  # modes, and a teacher that follows
    ],
    ids=["output", "gradient", "first step", "after a rest"],
)
def test_the_layer_of_a_planted_nan_is_named_and_nothing_is_written(tmp_path, gradient, at, more):
    words = flags(write_pictures(tmp_path / "pictures"), tmp_path / "run", epochs=2, **VIT | more)
    fault = {0: partial(plant_nan, at, gradient=gradient)}
    job = launch(words, tmp_path, faults=fault)
    assert job.wait() == [1] and "is nan" in job.output()
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.name != ".lock"}
    job = launch([*words, "--replay", tmp_path / "run"], tmp_path, faults=fault)
    assert job.wait() == [0], job.output()
    said = job.output()
    assert f"step {at + 1}: " in said and ("grad_norm is nan" in said if gradient else "loss is nan" in said)
    for precision in ("fp32", "fp64"):
        told = next(text for text in said.splitlines() if text.startswith(f"in {precision}: "))
        assert f"the output of {LAYER} has" in told if gradient else f": {LAYER} (Linear) gives 1 of" in told, told
    assert ("float64" in told) != gradient or gradient
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir() if p.name != ".lock"}


def test_a_replay_of_a_healthy_run_says_so_in_one_line(tmp_path):
    words = flags(write_pictures(tmp_path / "pictures"), tmp_path / "run", epochs=1)
    assert launch(words, tmp_path, faults={0: partial(kill_at, 4)}).wait() == [-signal.SIGKILL]
    job = launch(["--replay", tmp_path / "run"], tmp_path)
    assert job.wait() == [2] and "all of them are finite" in job.output()
    job = launch(["--replay", tmp_path / "none"], tmp_path)
    assert job.wait() == [2] and "no such folder" in job.output()


def test_a_replay_s_data_workers_end_with_it(tmp_path):
    words = flags(write_pictures(tmp_path / "pictures"), tmp_path / "run", epochs=1, num_workers=2)
    assert launch(words, tmp_path, faults={0: partial(kill_at, 4)}).wait() == [-signal.SIGKILL]
    with pytest.raises(SystemExit) as held:  # all is finite
        main_cplearn.main(["--replay", str(tmp_path / "run")])
    assert held.tb and multiprocessing.active_children() == []


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_that_collapsed_is_saved_and_ends_with_1_where_that_is_asked_for(tmp_path, processes):
    pictures = write_pictures(tmp_path / "pictures")
    words = flags(pictures, tmp_path / "run", processes, epochs=4, log_every=4, warmup_epochs=0, on_collapse="stop")
    job = launch(words, tmp_path, processes, dict.fromkeys(range(processes), plant_collapse))
    assert job.wait() == [1] * processes, job.output()
    assert "--on_collapse stop: this looks like" in job.output()
    lines = [line for line in read_log(tmp_path / "run" / "log.txt") if line["kind"] == "step"]
    state = torch.load(tmp_path / "run" / "checkpoint.pth", weights_only=True)
    assert 20 <= lines[-1]["step"] <= state["step"] <= 24  # 8 alone is an accident, 16 and 20 are not
    last = [json.loads(text) for text in (tmp_path / "run" / "starts.txt").read_text().splitlines()][-1]
    assert last["kind"] == "end" and "on_collapse" in last["how"]


def test_probes_while_training_are_what_the_evaluations_say(tmp_path, capsys):
    pictures = write_pictures(tmp_path / "train_on")
    labelled = write_pictures(tmp_path / "labelled", 60)
    for split in ("train", "val"):
        (labelled / split).mkdir()
        for kind in range(3):
            os.symlink(labelled / f"class{kind}", labelled / split / f"class{kind}")
    words = flags(pictures, tmp_path / "run", epochs=2, precision="fp32", linear_every=1, probe_data=labelled)
    main_cplearn.main(list(map(str, words)))
    found = [line["linear_top1"] for line in read_log(tmp_path / "run" / "log.txt") if "linear_top1" in line]
    assert len(found) == 3  # before the first step, and two epochs
    words = ["--checkpoint", tmp_path / "run" / "checkpoint.pth", "--data_path", labelled, "--output_dir", tmp_path]
    eval_linear.main([*map(str, words), "--precision", "fp32", "--device", "cpu", "--seed", "0"])
    rows = json.loads((tmp_path / "results_linear.json").read_text())["rows"]
    assert rows[-1]["top1"] == pytest.approx(found[-1])
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        main_cplearn.main([*map(str, flags(pictures, tmp_path / "b", epochs=1)), "--probe_data", str(labelled)])
    assert "--knn_every or --linear_every" in capsys.readouterr().err
