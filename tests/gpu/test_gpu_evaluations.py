"""Evaluations on the device score what they score on the CPU."""

import importlib
import json
import os
from unittest import mock

import pytest

SCRIPTS = {
    "knn": ["--nb_knn", "1", "10", "--baselines"],
    "linear": ["--protocol", "fast", "--epochs", "3"],
    "cluster": ["--match_k", "3"],
}


def scores(name, checkpoint, pictures, device, output_dir, *more):
    words = ["--checkpoint", checkpoint, "--data_path", pictures, "--device", device, "--precision", "fp32"]
    words += ["--num_workers", 0, "--output_dir", output_dir, *more]
    with mock.patch.dict(os.environ):  # --device cpu hides the GPUs
        importlib.import_module(f"eval_{name}").main([str(word) for word in words])
    rows = json.loads((output_dir / f"results_{name}.json").read_text())["rows"]
    return [{key: value for key, value in row.items() if isinstance(value, int | float)} for row in rows]


@pytest.mark.parametrize("name", SCRIPTS)
def test_scores_are_the_cpu_s(trained, device, pictures, tmp_path, name):
    checkpoint = trained() / "checkpoint.pth"
    found = scores(name, checkpoint, pictures, device, tmp_path / "device", *SCRIPTS[name])
    expected = scores(name, checkpoint, pictures, "cpu", tmp_path / "cpu", *SCRIPTS[name])
    assert len(found) == len(expected) > 0
    for row, on_cpu in zip(found, expected, strict=True):
        assert row == pytest.approx(on_cpu, rel=0.03, abs=3.2), name  # three of 96 images near a border, in percent


def test_dino_s_linear_protocol_runs(trained, device, pictures, tmp_path):
    checkpoint = trained(arch="vit_tiny", patch_size=8, width=None, max_steps=5, warmup_epochs=0) / "checkpoint.pth"
    words = ("--protocol", "dino", "--epochs", 2, "--n_last_blocks", 2, "--batch_size", 32)
    (row,) = scores("linear", checkpoint, pictures, device, tmp_path, *words)
    assert row["top1"] > 100 / 3 - 15
