"""What a user may get wrong is one line and exit code 2 in each script that opens a checkpoint; nothing is run."""

import importlib
import pickle

import pytest
import torch

from backbones import build_backbone
from pictures import picture, write

SCRIPTS = ("eval_knn", "eval_linear", "eval_cluster", "eval_collapse", "visualize_attention", "export_backbone")
EVALUATIONS = SCRIPTS[:4]


class Malicious:
    """Unpickled by a careless program, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Checkpoints good and bad, and folders of images: labelled, without labels, of one class, empty."""
    folder = tmp_path_factory.mktemp("inputs")
    torch.manual_seed(0)
    state = {f"backbone.{k}": v for k, v in build_backbone("vit_tiny", img_size=16, patch_size=8).state_dict().items()}
    args = {"arch": "vit_tiny", "img_size": 16, "in_chans": 3, "patch_size": 8, "mean": [0.5] * 3, "std": [0.25] * 3}
    args |= {"dataset": "imagefolder"}
    torch.save({"student": state, "teacher": state, "args": args}, folder / "good.pth")
    torch.save({"teacher": state, "args": args | {"more": Malicious(folder / "executed")}}, folder / "malicious.pth")
    (folder / "plain.pth").write_bytes(pickle.dumps(Malicious(folder / "executed")))
    (folder / "cut.pth").write_bytes((folder / "good.pth").read_bytes()[:100_000])
    for split in ("train", "val"):
        for number in range(6):
            pixels = picture(20, 24, seed=number)
            write(folder / "labelled" / split / f"class{number % 3}" / f"{number}.png", pixels)
            write(folder / "flat" / split / f"{number}.png", pixels)
            write(folder / "single" / split / "class0" / f"{number}.png", pixels)
        (folder / "single" / split / "class1").mkdir()
        (folder / "empty" / split).mkdir(parents=True)
    (folder / "one.txt").write_text("class1")
    return folder


def command(script, folder, images="labelled", checkpoint="good.pth"):
    flags = ["--checkpoint", str(folder / checkpoint), "--device", "cpu"]
    if script in EVALUATIONS:
        flags += ["--data_path", str(folder / images), "--num_workers", "0"]
    if script == "visualize_attention":
        flags += ["--image_path", str(folder / images / "val")]
    if script not in EVALUATIONS:
        flags += ["--output_dir", str(folder / script)]
    return flags


def refusal(script, flags, capsys):
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(script).main(flags)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    ("checkpoint", "flags", "message"),
    [
        ("lost.pth", [], "lost.pth: no such file"),
        (
            "good.pth",
            ["--checkpoint_key", "techer"],
            "no state dict under --checkpoint_key techer; the file has: student",
        ),
        ("good.pth", ["--arch", "vit_small"], "of 150 tensors match, so nothing was loaded"),
        ("good.pth", ["--arch", "resnet8"], "match, so nothing was loaded; missing: block1"),
        ("good.pth", ["--arch", "vit_smal"], "--arch vit_smal is unknown"),
        ("malicious.pth", [], "refused, it holds more than plain data"),
        ("plain.pth", [], "refused, it holds more than plain data"),
        ("cut.pth", [], "cannot be read"),
    ],
)
def test_checkpoints_that_do_not_open(folder, script, checkpoint, flags, message, capsys):
    error = refusal(script, [*command(script, folder, checkpoint=checkpoint), *flags], capsys)
    assert message in error
    assert not (folder / "executed").exists()


@pytest.mark.parametrize(
    ("script", "images", "flags", "message"),
    [
        *[(script, "empty", [], "no image") for script in SCRIPTS[:5]],
        *[(script, "lost", [], "/lost") for script in SCRIPTS[:5]],
        *[(script, "flat", [], "have no labels") for script in ("eval_knn", "eval_linear")],
        *[(script, "single", [], "needs two class folders or more") for script in ("eval_knn", "eval_linear")],
        *[(script, "labelled", ["--class_list", "one.txt"], "are of one class") for script in EVALUATIONS[:3]],
        ("eval_knn", "labelled", ["--nb_knn", "7"], "--nb_knn 7: expected from 1 to 6"),
        ("eval_cluster", "labelled", ["--kmeans", "7"], "--kmeans 7: there are 6 images"),
        ("eval_linear", "labelled", ["--n_last_blocks", "13"], "--n_last_blocks 13: expected from 1 to 12"),
    ],
)
def test_images_that_cannot_be_scored(folder, script, images, flags, message, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    assert message in refusal(script, [*command(script, folder, images), *flags], capsys)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_quick_and_needs_nothing(script, capsys, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", None)
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(script).main(["--help"])
    assert stop.value.code == 0
    assert "--checkpoint" in capsys.readouterr().out
