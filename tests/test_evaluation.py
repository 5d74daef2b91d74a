"""The plumbing of the evaluations: which models on which images, features on disk, and the table."""

import argparse
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluation
from backbones import build_backbone
from cplearn_head import CPLearnHead
from evaluation import extract_all, open_images, open_subjects, report, short_names
from pictures import write_class_folders
from utils import UserError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two of our checkpoints, of other image settings, one of a ViT as DINO writes it, and labelled images."""
    folder = tmp_path_factory.mktemp("evaluation")
    for name, size, width in (("a", 16, 6), ("b", 24, 8)):
        torch.manual_seed(size)
        head = {f"head.{k}": v for k, v in CPLearnHead(width, out_dim=32).state_dict().items()}
        state = {f"backbone.{k}": v for k, v in build_backbone("resnet8", width=width).state_dict().items()}
        args = {"arch": "resnet8", "img_size": size, "in_chans": 3, "mean": [0.5] * 3, "std": [size / 100] * 3}
        args |= {"dataset": "imagefolder" if name == "a" else "cifar10", "activation": "l2", "beta": 0.5}
        (folder / name).mkdir()
        torch.save({"teacher": state | head, "student": state | head, "args": args}, folder / name / "checkpoint.pth")
    torch.manual_seed(7)
    models = {
        "student": {f"module.backbone.{k}": v for k, v in vit().items()},
        "teacher": {f"backbone.{k}": v for k, v in vit().items()},
    }
    torch.save(models | {"args": argparse.Namespace(arch="vit_tiny", patch_size=8)}, folder / "dino.pth")
    write_class_folders(folder / "images" / "val")
    return folder


def vit():
    return build_backbone("vit_tiny", img_size=16, patch_size=8).state_dict()


def parsed(folder, *checkpoints, **flags):
    paths = [str(folder / path) for path in checkpoints]
    argv = ["--checkpoint", *paths, "--data_path", str(folder / "images"), "--device", "cpu", "--num_workers", "0"]
    for name, value in flags.items():
        argv += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return evaluation.evaluation_parser("eval_some.py", "An evaluation.").parse_args(argv)


def both(folder, **flags):
    args = parsed(folder, "a/checkpoint.pth", "b/checkpoint.pth", dataset="imagefolder", **flags)
    subjects = open_subjects(args, CPU)
    return subjects, open_images(subjects, "val")


def test_each_model_sees_the_images_as_it_was_trained(folder):
    subjects, images = both(folder)
    assert [subject.name for subject in subjects] == ["a", "b"]
    for (subject, (features, codes)), size in zip(extract_all(subjects, images), (16, 24), strict=True):
        assert subject.args.img_size == size
        x = [evaluation.data.resize_and_center_crop(images.load(i), size) for i in range(len(images))]
        x = (torch.stack(x).float() / 255 - 0.5) / (size / 100)
        with torch.no_grad():
            torch.testing.assert_close(features, subject.model(x), atol=1e-5, rtol=1e-5)
        assert torch.equal(codes, subject.model.assign(x))


def test_one_of_several_models_in_a_file_and_baselines(folder):
    given = {"dataset": "imagefolder", "img_size": 16, "baselines": True, "seed": 3}
    args = parsed(folder, "dino.pth:student", "dino.pth", **given)
    pixels, untrained, student, teacher = open_subjects(args, CPU)
    assert [s.name for s in (pixels, untrained)] == ["raw pixels", "random weights"]
    assert (student.model.settings["checkpoint_key"], teacher.model.settings["checkpoint_key"]) == (
        "student",
        "teacher",
    )
    images = open_images([teacher], "val")
    found = [features for _, (features, _) in extract_all([pixels, untrained, student, teacher], images)]
    assert [x.shape for x in found] == [(27, 768), (27, 192), (27, 192), (27, 192)]
    assert all(not torch.equal(found[i], found[j]) for i, j in ((1, 2), (1, 3), (2, 3)))
    again = open_subjects(args, CPU)[1]
    assert evaluation.fingerprint(again.model) == evaluation.fingerprint(untrained.model)


def test_a_colon_in_a_file_s_own_name(folder):
    name = "a/checkpoint:student.pth"
    os.link(folder / "a" / "checkpoint.pth", folder / name)
    (subject,) = open_subjects(parsed(folder, name, checkpoint_key="student"), CPU)
    assert subject.model.settings["checkpoint_key"] == "student"
    assert evaluation.split_key("lost:file.pth", None) == ("lost:file.pth", None)


@pytest.mark.parametrize("sizes", [(1, 128), (27, 5)])
def test_batch_size_changes_no_feature(folder, sizes):
    (one, *_), images = both(folder, batch_size=sizes[0])
    (other, *_), _ = both(folder, batch_size=sizes[1])
    torch.testing.assert_close(one.extract(images)[0], other.extract(images)[0], atol=1e-6, rtol=1e-5)
    assert torch.equal(one.extract(images)[1], other.extract(images)[1])


# ---- features on disk ------------------------------------------------------------------------------------------------


def test_features_are_computed_once_and_then_mapped(folder, tmp_path, monkeypatch):
    subjects, images = both(folder, features_dir=tmp_path)
    fresh = [subject._compute(images) for subject in subjects]
    stored = [subject.extract(images) for subject in subjects]
    monkeypatch.setattr(evaluation.features, "extract_features", None)  # would fail
    again, images = both(folder, features_dir=tmp_path, batch_size=3)
    for expected, first, subject in zip(fresh, stored, again, strict=True):
        for x, y, z in zip(expected, first, subject.extract(images), strict=True):
            assert torch.equal(x, y)
            assert torch.equal(x, z)
    found, _ = again[0].extract(images)
    maps = Path("/proc/self/maps").read_text()
    assert f"{tmp_path}/{again[0]._cache_key(images)}/features.npy" in maps  # not read into memory
    found[0] = 0  # a probe may scribble on them
    assert torch.equal(again[0].extract(images)[0], fresh[0][0])


def test_whatever_changes_features_changes_their_name(folder, tmp_path):
    (subject, other), images = both(folder)
    keys = {subject._cache_key(images), other._cache_key(images)}
    for name, value in {
        "img_size": 32,
        "mean": [0.1] * 3,
        "std": [1.0] * 3,
        "in_chans": 1,
        "precision": "bf16",
    }.items():
        changed = both(folder)[0][0]
        setattr(changed.args, name, value)
        keys.add(changed._cache_key(images))
    changed = both(folder)[0][0]
    changed.model.backbone.block1.conv1.bias[0] += 1e-6
    keys.add(changed._cache_key(images))
    write_class_folders(tmp_path / "val")  # the same names and pictures in another folder
    subject.args.data_path = str(tmp_path)
    keys.add(subject._cache_key(open_images([subject], "val")))
    Image.new("RGB", (20, 20)).save(tmp_path / "val" / "ant" / "0.jpg")  # made anew
    keys.add(subject._cache_key(open_images([subject], "val")))
    (tmp_path / "val" / "ant" / "0.jpg").rename(tmp_path / "val" / "ant" / "00.jpg")
    keys.add(subject._cache_key(open_images([subject], "val")))
    assert len(keys) == 11
    assert subject._cache_key(open_images([subject], "val")) in keys


def test_damaged_features_are_named(folder, tmp_path):
    (subject, _), images = both(folder, features_dir=tmp_path)
    subject.extract(images)
    path = tmp_path / subject._cache_key(images) / "features.npy"
    os.truncate(path, 200)
    with pytest.raises(UserError, match=r"damaged .* remove the folder"):
        subject.extract(images)


def store_in_two(rank, folder, features_dir):
    (subject, _), images = both(folder, features_dir=features_dir)
    return [x.tolist() for x in subject.extract(images)], len(extract_all([subject], images))


def test_two_processes_share_the_work_and_the_file(folder, tmp_path, run_in_processes):
    (first, listed), (second, silent) = run_in_processes(store_in_two, folder, str(tmp_path / "cache"))
    assert first == second
    assert (listed, silent) == (1, 0)  # scores are computed once
    (subject, _), images = both(folder)
    features, codes = subject.extract(images)
    torch.testing.assert_close(torch.tensor(first[0]), features, atol=1e-6, rtol=1e-5)
    assert first[1] == codes.tolist()
    assert len(os.listdir(tmp_path / "cache")) == 1


# ---- what stops ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("checkpoints", "flags", "message"),
    [
        (["a/checkpoint.pth", "b/checkpoint.pth"], {}, "trained on different data sets"),
        (["a/checkpoint.pth", "a/checkpoint.pth"], {}, "names the same file twice"),
        (["dino.pth:techer"], {}, "no state dict under --checkpoint_key techer; the file has: student, teacher"),
        (["lost.pth"], {}, "no such file"),
        (["lost.pth:student"], {}, "no such file"),
        (["a/checkpoint.pth"], {"output_dir": "/proc/no"}, "--output_dir /proc/no"),
        (["a/checkpoint.pth"], {"features_dir": "/proc/no"}, "--features_dir /proc/no"),
    ],
)
def test_models_that_cannot_be_compared(folder, checkpoints, flags, message):
    with pytest.raises(UserError, match=message):
        open_subjects(parsed(folder, *checkpoints, **flags), CPU)


def test_images_without_labels_or_of_one_class(folder, tmp_path):
    (subject, _), _ = both(folder)
    for name, classes in (("flat", ["."]), ("single", ["a", "b"])):
        for label in classes:
            (tmp_path / name / "val" / label).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20)).save(tmp_path / name / "val" / classes[0] / "x.png")
    Image.new("RGB", (20, 20)).save(tmp_path / "flat" / "val" / "y.png")
    subject.args.data_path = str(tmp_path / "flat")
    assert len(open_images([subject], "val")) == 2
    assert open_images([subject], "val", labels_for="purity", required=False).labels is None
    with pytest.raises(UserError, match="its val images have no labels; purity needs two class folders"):
        open_images([subject], "val", labels_for="purity")
    (tmp_path / "empty" / "val").mkdir(parents=True)
    subject.args.data_path = str(tmp_path / "empty")
    with pytest.raises(UserError, match="no images in"):
        open_images([subject], "val")
    one = evaluation.data.FolderImages("x", [b"a", b"b"], np.array([1, 1]), ["c", "d"])
    subject.args.data_path = "one"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation.data, "open_dataset", lambda args, split: one)
        for required in (True, False):
            with pytest.raises(UserError, match="are of one class; purity needs two"):
                open_images([subject], "val", labels_for="purity", required=required)


# ---- the table -------------------------------------------------------------------------------------------------------


def test_short_names():
    assert short_names(["x/run.pth"]) == ["x/run.pth"]
    assert short_names(["runs/a/checkpoint.pth", "runs/b/checkpoint.pth"]) == ["a", "b"]
    assert short_names(["runs/a/c1.pth", "runs/a/c2.pth", "dino.pth"]) == ["runs/a/c1.pth", "runs/a/c2.pth", "dino.pth"]
    assert short_names(["/m/a.pth", "/m/a.pth:student"]) == ["a.pth", "a.pth:student"]
    assert short_names(["a/b/c.pth", "b/c.pth"]) == ["a/b", "b"]


def test_names_of_files():
    names = ["runs/a/checkpoint.pth", "../x y:teacher", "../../etc/x y", "...", "é" * 500, "x/y", "x y", "a.pt"]
    stems = ["runs_a_checkpoint", "x_y_teacher", "etc_x_y", "model", "model_4", "x_y", "x_y_6", "a"]
    assert evaluation.file_stems(names) == stems
    assert len(evaluation.file_stems(["z" * 300])[0]) == 80
    assert short_names(["/m/a.pth", "b/c.pth"]) == ["/m/a.pth", "b/c.pth"]


def test_report_writes_a_table_that_both_people_and_programs_read(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/somewhere/eval_some.py", "--data_path", "my images"])
    subjects, _ = both(folder, output_dir=tmp_path / "out")
    rows = [{"checkpoint": "a", "score": 1.25, "extra": [1]}, {"checkpoint": "longer name", "score": None}]
    columns = {"checkpoint": ("checkpoint", ""), "score": ("NMI", ".1f")}
    report("some", rows, columns, subjects[0].args, subjects, ["A note."], num_images=27)
    table = capsys.readouterr().out
    assert table.splitlines() == [
        "| checkpoint  | NMI |",
        "|-------------|----:|",
        "| a           | 1.2 |",
        "| longer name |   - |",
        "",
        "A note.",
    ]
    text = (tmp_path / "out" / "results_some.md").read_text()
    assert text == table + "\n    python eval_some.py --data_path 'my images'\n"
    results = json.loads((tmp_path / "out" / "results_some.json").read_text())
    assert (results["rows"], results["notes"]) == (rows, ["A note."])
    assert (results["num_images"], results["settings"]["seed"]) == (27, 0)
    assert results["models"]["b"]["beta"] == 0.5
    assert {"python", "torch", "numpy", "scikit-learn"} <= results["versions"].keys()
