"""The supervised upper line: main_cplearn.py's run, with labels."""

import functools
import json
import signal
import subprocess
import sys

import numpy as np
import pytest
import sklearn.linear_model
import torch
from PIL import Image

import accumulation
import data
import eval_knn
import main_cplearn
import runs
from checkpoint import load_checkpoint
from experiments import supervised
from images import open_folder
from monitor import read_log
from pretrained import OBJECTIVES, load_pretrained
from runs import ROOT, assert_same_run, run_to_end, write_pictures

PLAIN = {"jitter": 0, "grayscale": 0, "blur": 0, "solarize": 0}
flags = functools.partial(runs.flags, out_dim=None)
run_to_end = functools.partial(run_to_end, script="experiments.supervised")


@pytest.fixture
def known(monkeypatch):
    """`main` makes the objective known to its process, which is the other tests' too."""
    monkeypatch.setitem(OBJECTIVES, "supervised", supervised.Supervised)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"))


def write_stripes(root, count=256):
    """Noisy PNGs in train/ and val/: stripes that lie or stand, reddish or bluish, and the class is whether exactly one
    of lying and reddish holds, which no linear function of the two tells. Returns root."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for i in range(count):
            lying, reddish = i % 2, i // 2 % 2
            wave = 110 + 25 * np.sign(np.sin(np.arange(32) * 2 * np.pi / 8 + rng.uniform(0, 7)))
            pixels = rng.normal(0, 60, (32, 32, 3)) + (wave[:, None] if lying else wave)[..., None]
            pixels[..., 0 if reddish else 2] += 25
            path = root / split / f"class{lying ^ reddish}" / f"{i:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
    return root


def test_a_linear_probe_and_knn_read_the_labels_it_learned(known, tmp_path, capsys):
    folder, file = write_stripes(tmp_path / "stripes"), tmp_path / "run" / "checkpoint.pth"
    supervised.main(flags(folder, file.parent, **PLAIN, batch_size_per_gpu=32, epochs=10, lr=4e-2, log_every=20))
    assert "done: 80 steps" in capsys.readouterr().out
    last = read_log(file.parent / "log.txt")[-1]
    assert last["train_top1"] > 90 and last["train_loss"] < 0.4

    words = ["--checkpoint", str(file), "--data_path", str(folder), "--baselines", "--nb_knn", "20"]
    eval_knn.main([*words, "--device", "cpu", "--output_dir", str(tmp_path)])
    assert "left out" not in capsys.readouterr().err
    rows = json.loads((tmp_path / "results_knn.json").read_text())["rows"]
    top1 = {row["checkpoint"]: row["top1"] for row in rows}  # raw pixels 91, random weights 71, this one 100
    assert top1[str(file)] > max(95, top1["random weights"] + 15)
    assert probe(file, folder) > 95 and probe(file, folder, random_weights=True) < 75  # 100 and 62


def probe(file, folder, **options):
    """Top-1 in percent of logistic regression on frozen features."""
    model, found = load_pretrained(file, **options), []
    known = [model.settings[name] for name in ("img_size", "in_chans", "mean", "std")]
    assert model.head is None and model.settings["objective"] in (None, "supervised")
    for split in ("train", "val"):
        images = open_folder(str(folder), split)
        ((_, x),) = data.eval_batches(images, *known, len(images))
        found.append((model(x).numpy(), images.labels))
    return 100 * sklearn.linear_model.LogisticRegression(C=1e3, max_iter=10000).fit(*found[0]).score(*found[1])


def test_it_sees_the_views_of_a_run_without_labels_each_beside_its_label(known, folder, tmp_path, monkeypatch):
    """An image's label is its brightest channel, which the augmentation here leaves so."""
    steps = {**PLAIN, "max_steps": 14, "seed": 3, "batch_size_per_gpu": 4, "accum_steps": 2}
    views, labels = recorded(monkeypatch, main_cplearn.main, flags(folder, tmp_path / "cplearn", **steps))
    same, labels = recorded(monkeypatch, supervised.main, flags(folder, tmp_path / "run", **steps))
    assert torch.equal(views, same) and len(views) == 14 * 8 and len(views.unique(dim=0)) > 90
    brightest = views.double().mean(dim=(3, 4)).argmax(dim=2)  # (images, V)
    assert torch.equal(brightest, labels[:, None].expand(-1, 2)) and labels.unique().tolist() == [0, 1, 2]


def recorded(monkeypatch, main, words):
    """Views (images, V, C, H, W) that the first halves of a run were given in turn, and what the objective kept."""
    seen = []
    original = accumulation.first_pass

    def first_pass(run, *rest):
        rows, kept = original(run, *rest)
        seen.append((torch.stack(run.ahead.last, dim=1), *kept))
        return rows, kept

    def ahead(self, make):
        self.last = make()
        return self.last

    monkeypatch.setattr(accumulation, "first_pass", first_pass)
    monkeypatch.setattr(accumulation.Ahead, "__call__", ahead)
    main(words)
    monkeypatch.undo()
    monkeypatch.setitem(OBJECTIVES, "supervised", supervised.Supervised)
    views, *labels = (torch.cat(parts) for parts in zip(*seen, strict=True))
    return views, labels[0] if labels else None


def test_the_loss_is_the_mean_over_views_written_out(known):
    rows = [torch.randn(5, 6, dtype=torch.float64) for _ in range(3)]
    objective = supervised.Supervised(torch.nn.Linear(6, 4).double(), None, None)
    labels = torch.tensor([3, 0, 1, 1, 2])
    loss, terms = objective(rows, [labels], None)
    weight, bias = objective.classifier.weight, objective.classifier.bias
    losses, hits = [], []
    for row in rows:
        for x, label in zip(row, labels, strict=True):
            logits = weight @ x + bias
            losses.append(logits.exp().sum().log() - logits[label])
            hits.append(100.0 * (logits.argmax() == label))
    assert loss.item() == pytest.approx(sum(losses).item() / 15, rel=1e-12)
    assert terms["top1"].item() == pytest.approx(sum(hits).item() / 15)


@pytest.mark.slow
def test_the_seed_decides_all_and_a_killed_run_goes_on(folder, tmp_path):
    steps = {"epochs": 2, "batch_size_per_gpu": 4, "accum_steps": 2}
    run_to_end(flags(folder, tmp_path / "whole", **steps), tmp_path)
    run_to_end(flags(folder, tmp_path / "other", **steps, seed=1), tmp_path)
    words = flags(folder, tmp_path / "cut", **steps)
    fault = functools.partial(runs.kill_at, 17)
    job = runs.launch(words, tmp_path, faults={0: fault}, script="experiments.supervised")
    assert job.wait() == [-signal.SIGKILL], job.output()
    assert "resuming at step 17" in run_to_end(words, tmp_path)
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    a, b = (load_checkpoint(tmp_path / name / "checkpoint.pth")["student"] for name in ("whole", "other"))
    assert not any(torch.equal(a[name], b[name]) for name in a if name.endswith("weight") and a[name].ndim > 1)
    assert "resuming at step 24: 24 steps" in run_to_end(words, tmp_path)  # and it is done


@pytest.mark.slow
def test_two_processes_descend_the_loss_of_one(folder, tmp_path):
    """With one process per half of the batch the labels are those of the half."""
    for processes in (1, 2):
        words = flags(folder, tmp_path / f"{processes}", processes, lr=4e-2, weight_decay=0, optimizer="sgd")
        run_to_end(words, tmp_path, processes)
    one, two = (read_log(tmp_path / f"{processes}" / "log.txt")[-1] for processes in (1, 2))
    assert two["train_loss"] == pytest.approx(one["train_loss"], rel=1e-4)
    assert two["train_top1"] == pytest.approx(one["train_top1"], rel=1e-4) and one["train_top1"] > 60


@pytest.mark.parametrize(
    "words, said",
    [
        (["--objective", "swav"], "--objective swav: this script trains on labels; use main_cplearn.py"),
        (["--max_bad_images", "0.1"], "--max_bad_images 0.1: expected 0"),
        (["--beta", "1"], "--beta 1.0: --objective supervised has no such flag"),
        (["--data_path", "FLAT"], "have no labels; expected class folders"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(known, tmp_path, capsys, words, said):
    write_pictures(tmp_path / "pictures", 16)
    words = [str(tmp_path / "pictures" / "class0") if word == "FLAT" else word for word in words]
    with pytest.raises(SystemExit) as ended:
        supervised.main([*flags(tmp_path / "pictures", tmp_path / "run", batch_size_per_gpu=4), *words])
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert ended.value.code == 2 and len(errors) == 1 and said in errors[0]


def test_it_starts_as_a_file_too():
    command = [sys.executable, str(ROOT / "experiments" / "supervised.py"), "--help"]
    said = subprocess.run(command, cwd="/", capture_output=True, text=True, check=True).stdout
    assert "usage: experiments/supervised.py" in said and "--global_crops_scale" in said
