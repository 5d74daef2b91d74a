"""The plumbing of the evaluations: which models on which images, features on disk, and the table."""

import argparse
import concurrent.futures
import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluation
import images as image_sets
from backbones import build_backbone
from checkpoint import load_checkpoint
from cplearn_head import CPLearnHead
from evaluation import extract_all, extract_features, open_images, open_models, report, short_names
from images import FolderImages
from pictures import but_what_was_opened, write_class_folders
from pretrained import PretrainedModel
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
        saved = {"format": "cplearn 2", "teacher": state | head, "student": state | head, "args": args}
        torch.save(saved, folder / name / "checkpoint.pth")
    torch.manual_seed(7)
    states = {
        "student": {f"module.backbone.{k}": v for k, v in vit().items()},
        "teacher": {f"backbone.{k}": v for k, v in vit().items()},
    }
    torch.save(states | {"args": argparse.Namespace(arch="vit_tiny", patch_size=8)}, folder / "dino.pth")
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
    models = open_models(args, CPU)
    return models, open_images(models, "val")


def test_each_model_sees_the_images_as_it_was_trained(folder):
    models, images = both(folder)
    assert [evaluated.name for evaluated in models] == ["a", "b"]
    for (evaluated, (features, codes)), size in zip(extract_all(models, images), (16, 24), strict=True):
        assert evaluated.args.img_size == size
        x = [evaluation.data.resize_and_center_crop(images.load(i), size) for i in range(len(images))]
        x = (torch.stack(x).float() / 255 - 0.5) / (size / 100)
        with torch.no_grad():
            torch.testing.assert_close(features, evaluated.model(x), atol=1e-5, rtol=1e-5)
        assert torch.equal(codes, evaluated.model.assign(x))


def test_one_of_several_models_in_a_file_and_baselines(folder):
    given = {"dataset": "imagefolder", "img_size": 16, "baselines": True, "seed": 3}
    args = parsed(folder, "dino.pth:student", "dino.pth", **given)
    pixels, untrained, student, teacher = open_models(args, CPU)
    assert [s.name for s in (pixels, untrained)] == ["raw pixels", "random weights"]
    assert (student.model.settings["checkpoint_key"], teacher.model.settings["checkpoint_key"]) == (
        "student",
        "teacher",
    )
    images = open_images([teacher], "val")
    found = [features for _, (features, _) in extract_all([pixels, untrained, student, teacher], images)]
    assert [x.shape for x in found] == [(27, 768), (27, 192), (27, 192), (27, 192)]
    assert all(not torch.equal(found[i], found[j]) for i, j in ((1, 2), (1, 3), (2, 3)))
    again = open_models(args, CPU)[1]
    assert evaluation.fingerprint(again.model) == evaluation.fingerprint(untrained.model)


def test_a_colon_in_a_file_s_own_name(folder):
    name = "a/checkpoint:student.pth"
    os.link(folder / "a" / "checkpoint.pth", folder / name)
    (evaluated,) = open_models(parsed(folder, name, checkpoint_key="student"), CPU)
    assert evaluated.model.settings["checkpoint_key"] == "student"
    assert evaluation.split_key("lost:file.pth", None) == ("lost:file.pth", None)


@pytest.mark.parametrize("sizes", [(1, 128), (27, 5)])
def test_batch_size_changes_no_feature(folder, sizes):
    (one, *_), images = both(folder, batch_size=sizes[0])
    (other, *_), _ = both(folder, batch_size=sizes[1])
    torch.testing.assert_close(one.extract(images)[0], other.extract(images)[0], atol=1e-6, rtol=1e-5)
    assert torch.equal(one.extract(images)[1], other.extract(images)[1])


# ---- features on disk ------------------------------------------------------------------------------------------------


def key(evaluated, images):
    return evaluation.cache_key(evaluated.meaning(images))


def test_features_are_computed_once_and_then_mapped(folder, tmp_path, monkeypatch, capsys):
    models, images = both(folder, features_dir=tmp_path)
    fresh = [evaluated._compute(images) for evaluated in models]
    stored = [evaluated.extract(images) for evaluated in models]
    written = [f"{tmp_path}/{key(evaluated, images)}" for evaluated in models]
    lines = [f"note: {name}: features of 27 images written to {path}" for name, path in zip("ab", written, strict=True)]
    assert but_what_was_opened(capsys.readouterr().err).splitlines() == lines
    for path in written:
        os.utime(path, (0, 86400))
    monkeypatch.setattr(evaluation, "extract_features", None)  # would fail
    again, images = both(folder, features_dir=tmp_path, batch_size=3)
    for expected, first, evaluated in zip(fresh, stored, again, strict=True):
        for x, y, z in zip(expected, first, evaluated.extract(images), strict=True):
            assert torch.equal(x, y)
            assert torch.equal(x, z)
    lines = but_what_was_opened(capsys.readouterr().err).splitlines()
    assert [line[: line.index("1970-01-0")] for line in lines] == [  # the day is the time zone's
        f"note: {name}: features of 27 images read from {path}, of " for name, path in zip("ab", written, strict=True)
    ]
    found, _ = again[0].extract(images)
    maps = Path("/proc/self/maps").read_text()
    assert f"{tmp_path}/{key(again[0], images)}/features.npy" in maps  # not read into memory
    found[0] = 0  # a probe may scribble on them
    assert torch.equal(again[0].extract(images)[0], fresh[0][0])


def test_whatever_changes_features_changes_their_name(folder, tmp_path):
    (evaluated, other), images = both(folder)
    keys = {key(evaluated, images), key(other, images)}
    for name, value in {
        "img_size": 32,
        "mean": [0.1] * 3,
        "std": [1.0] * 3,
        "in_chans": 1,
        "precision": "bf16",
    }.items():
        changed = both(folder)[0][0]
        setattr(changed.args, name, value)
        keys.add(key(changed, images))
    changed = both(folder)[0][0]
    changed.model.backbone.block1.conv1.bias[0] += 1e-6
    keys.add(key(changed, images))
    write_class_folders(tmp_path / "val")  # the same names and pictures in another folder
    evaluated.args.data_path = str(tmp_path)
    keys.add(key(evaluated, open_images([evaluated], "val")))
    Image.new("RGB", (20, 20)).save(tmp_path / "val" / "ant" / "0.jpg")  # made anew
    keys.add(key(evaluated, open_images([evaluated], "val")))
    (tmp_path / "val" / "ant" / "0.jpg").rename(tmp_path / "val" / "ant" / "00.jpg")
    keys.add(key(evaluated, open_images([evaluated], "val")))
    assert len(keys) == 11
    assert key(evaluated, open_images([evaluated], "val")) in keys


@pytest.mark.parametrize("change", ["one of many", "same size and date"])
def test_a_picture_replaced_under_its_old_name_is_seen(change, tmp_path):
    """One of 1,500 files."""
    names = [b"%04d.png" % i for i in range(1500)]
    for name in names:
        (tmp_path / name.decode()).write_bytes(b"picture")
    before = evaluation.files_fingerprint(FolderImages(tmp_path, names))
    path = tmp_path / "1498.png"
    dates = path.stat().st_atime_ns, path.stat().st_mtime_ns
    path.write_bytes(b"another" if change == "same size and date" else b"another picture")
    os.utime(path, ns=dates)
    assert evaluation.files_fingerprint(FolderImages(tmp_path, names)) != before


def test_where_not_all_files_are_looked_at_a_line_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluation, "MAX_STATS", 10)
    evaluation.files_fingerprint(FolderImages(tmp_path, [b"lost"] * 10))
    assert but_what_was_opened(capsys.readouterr().err) == ""
    evaluation.files_fingerprint(FolderImages(tmp_path, [b"lost"] * 11))
    assert "note: --features_dir: 11 files; size and times of 10 of them tell" in capsys.readouterr().err


def test_two_evaluations_with_one_folder_of_features(tmp_path, monkeypatch):
    """Each is in the middle of writing when the other is; both end well, and one whole folder is there."""
    matrix, codes, both_write = torch.randn(5, 3), torch.arange(5), threading.Barrier(2, timeout=20)
    save = np.save

    def save_together(path, array):
        both_write.wait()
        save(path, array)
        both_write.wait()

    monkeypatch.setattr(np, "save", save_together)
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        args = (tmp_path / "key", matrix, codes, {"model": "a"})
        for future in [threads.submit(evaluation.store_features, *args) for _ in range(2)]:
            future.result()
    assert [path.name for path in tmp_path.iterdir()] == ["key"]
    assert sorted(path.name for path in (tmp_path / "key").iterdir()) == ["codes.npy", "features.npy", "meaning.json"]
    assert all(map(torch.equal, evaluation.load_features(tmp_path / "key"), (matrix, codes)))


def test_features_that_cannot_be_kept_are_one_line_before_any_work(folder, monkeypatch):
    (evaluated, _), images = both(folder, features_dir="/proc/no")
    monkeypatch.setattr(evaluation, "extract_features", None)  # would fail
    with pytest.raises(UserError, match="--features_dir /proc/no: cannot be made"):
        evaluated.extract(images)


def test_damaged_features_are_named(folder, tmp_path):
    (evaluated, _), images = both(folder, features_dir=tmp_path)
    evaluated.extract(images)
    path = tmp_path / key(evaluated, images) / "features.npy"
    os.truncate(path, 200)
    with pytest.raises(UserError, match=r"damaged .* remove the folder"):
        evaluated.extract(images)


def store_in_two(rank, folder, features_dir):
    (evaluated, _), images = both(folder, features_dir=features_dir)
    return [x.tolist() for x in evaluated.extract(images)], len(extract_all([evaluated], images))


def test_two_processes_share_the_work_and_the_file(folder, tmp_path, run_in_processes):
    (first, listed), (second, silent) = run_in_processes(store_in_two, folder, str(tmp_path / "cache"))
    assert first == second
    assert (listed, silent) == (1, 0)  # scores are computed once
    (evaluated, _), images = both(folder)
    features, codes = evaluated.extract(images)
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
    ],
)
def test_models_that_cannot_be_compared(folder, checkpoints, flags, message):
    with pytest.raises(UserError, match=message):
        open_models(parsed(folder, *checkpoints, **flags), CPU)


def test_models_whose_images_are_read_in_different_ways_are_not_compared(folder, tmp_path):
    """All would see them as the first one does; a flag is for all, and a model that says nothing is of the defaults."""
    for name, saved in (("range", {"value_range": [0, 4095]}), ("floats", {"float_pixels": True}), ("none", {})):
        content = load_checkpoint(folder / "a" / "checkpoint.pth")
        torch.save(content | {"args": content["args"] | saved}, tmp_path / f"{name}.pth")
    for one, other, ways, flag in (
        ("none", "range", r"no --value_range .*; .*--value_range 0 4095", ["--value_range", "0", "4095"]),
        ("floats", "none", r"--pages first --float_pixels; .*--pages first --no-float_pixels", ["--no-float_pixels"]),
    ):
        args = parsed(folder, tmp_path / f"{one}.pth", tmp_path / f"{other}.pth")
        with pytest.raises(UserError, match=f"^{one}.pth and {other}.pth read images in different ways .*{ways}"):
            open_models(args, CPU)
        words = ["--checkpoint", *args.checkpoint, "--data_path", args.data_path, "--device", "cpu", *flag]
        args = evaluation.evaluation_parser("eval_some.py", "An evaluation.").parse_args(words)
        models = open_models(args, CPU)
        assert len({image_sets.reading_of(evaluated.args).settled() for evaluated in models}) == 1
    explicit = parsed(folder, tmp_path / "none.pth", "dino.pth", pages="first")
    assert len(open_models(explicit, CPU)) == 2


def test_images_without_labels_or_of_one_class(folder, tmp_path):
    (evaluated, _), _ = both(folder)
    for name, classes in (("flat", ["."]), ("single", ["a", "b"])):
        for label in classes:
            (tmp_path / name / "val" / label).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20)).save(tmp_path / name / "val" / classes[0] / "x.png")
    Image.new("RGB", (20, 20)).save(tmp_path / "flat" / "val" / "y.png")
    evaluated.args.data_path = str(tmp_path / "flat")
    assert len(open_images([evaluated], "val")) == 2
    assert open_images([evaluated], "val", labels_for="purity", required=False).labels is None
    with pytest.raises(UserError, match="its val images have no labels; purity needs two class folders"):
        open_images([evaluated], "val", labels_for="purity")
    (tmp_path / "empty" / "val").mkdir(parents=True)
    evaluated.args.data_path = str(tmp_path / "empty")
    with pytest.raises(UserError, match="no validation images"):
        open_images([evaluated], "val")
    one = FolderImages("x", [b"a", b"b"], np.array([1, 1]), ["c", "d"])
    evaluated.args.data_path = "one"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation.image_sets, "open_dataset", lambda args, split: one)
        for required in (True, False):
            with pytest.raises(UserError, match="are of one class; purity needs two"):
                open_images([evaluated], "val", labels_for="purity", required=required)


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
    models, _ = both(folder, output_dir=tmp_path / "out")
    rows = [{"checkpoint": "a", "score": 1.25, "extra": [1]}, {"checkpoint": "longer name", "score": None}]
    columns = {"checkpoint": ("checkpoint", ""), "score": ("NMI", ".1f")}
    report("some", rows, columns, models[0].args, models, ["A note."], num_images=27)
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


def pixels(num):
    return torch.randn(num, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def batched(images, order, size):
    """(indices, images) as data.eval_batches yields them."""
    return ((np.array(order[i : i + size]), images[order[i : i + size]]) for i in range(0, len(order), size))


@torch.no_grad()
def test_features_stand_in_the_data_set_s_order():
    images, backbone = pixels(11), build_backbone("resnet8", width=6)
    model = PretrainedModel(backbone, CPLearnHead(6, out_dim=64))
    order = [7, 0, 3, 10, 1, 9, 2, 8, 4, 6, 5, 7, 3]  # a short last batch, and two images come twice
    features, codes = extract_features(model, batched(images, order, 4), 11, CPU)
    torch.testing.assert_close(features, backbone(images), atol=1e-6, rtol=1e-5)
    assert torch.equal(codes, model.assign(images))
    assert features.dtype == torch.float32
    half, _ = extract_features(model, batched(images, order, 4), 11, CPU, precision="bf16")
    torch.testing.assert_close(half, features, atol=0.02 * features.abs().max().item(), rtol=0)
    assert half.dtype == torch.float32
    assert not torch.equal(half, features)


def test_a_missing_image_is_an_error():
    with pytest.raises(ValueError, match="1 of 5 images never came, the first has index 3"):
        extract_features(torch.nn.Flatten(), batched(pixels(5), [0, 1, 2, 4], 2), 5, CPU)


def test_extraction_is_in_eval_mode_and_leaves_the_mode_as_it_was():
    backbone = build_backbone("resnet18").train()
    before = backbone.bn1.running_mean.clone()
    features, codes = extract_features(backbone, batched(pixels(4), range(4), 2), 4, CPU)
    one_by_one, _ = extract_features(backbone, batched(pixels(4), range(4), 1), 4, CPU)
    torch.testing.assert_close(features, one_by_one, atol=1e-5, rtol=1e-5)  # batch statistics would differ
    assert backbone.training
    assert torch.equal(backbone.bn1.running_mean, before)
    assert codes is None
    features @ torch.ones(512, 1, requires_grad=True)  # a probe may be trained on them


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_features_that_are_not_finite_are_named(value):
    images = pixels(5)
    images[3, 1, 2, 2] = value
    with pytest.raises(UserError, match=r"the features of a\.pth hold NaN or infinity: did its training diverge"):
        extract_features(torch.nn.Flatten(), batched(images, range(5), 2), 5, CPU, title="a.pth")


def test_raw_pixels_need_no_model():
    features, codes = extract_features(torch.nn.Flatten(), batched(pixels(5), range(5), 2), 5, CPU)
    assert torch.equal(features, pixels(5).flatten(1))
    assert codes is None


def extract_in_two(rank, folder):
    torch.manual_seed(0)
    model = PretrainedModel(build_backbone("resnet8", width=6), CPLearnHead(6, out_dim=64))
    results = {}
    for num, padding in ((7, []), (7, [0, 1, 2]), (1, [])):
        order = [*range(num), *padding]  # padded as samplers do, so that some images are seen by both
        shares = batched(pixels(num), order[rank::2], 2)
        results[num, len(padding)] = extract_features(model, shares, num, CPU)
    torch.save(results, f"{folder}/{rank}.pth")
    with pytest.raises(ValueError, match="1 of 3 images never came"):
        extract_features(model, batched(pixels(3), [rank], 2), 3, CPU)


@torch.no_grad()
def test_two_processes_have_every_image_exactly_once(tmp_path, run_in_processes):
    run_in_processes(extract_in_two, str(tmp_path))
    torch.manual_seed(0)
    model = PretrainedModel(build_backbone("resnet8", width=6), CPLearnHead(6, out_dim=64))
    for rank in range(2):
        results = load_checkpoint(tmp_path / f"{rank}.pth")
        assert results.keys() == {(7, 0), (7, 3), (1, 0)}
        for (num, _), (features, codes) in results.items():
            torch.testing.assert_close(features, model(pixels(num)), atol=1e-6, rtol=1e-5)
            assert torch.equal(codes, model.assign(pixels(num)))
