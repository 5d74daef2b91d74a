"""All evaluations alike: what a user may get wrong is one line and exit code 2, a file's code never runs, and neither
processes, batches nor the order of images change a score."""

import importlib
import json
import pickle

import pytest
import torch

from backbones import build_backbone
from cplearn_head import CPLearnHead
from pictures import picture, write
from refusals import error_of
from utils import init_distributed

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
    ours = {"format": "cplearn 2", "student": state, "teacher": state, "args": args}
    torch.save(ours, folder / "good.pth")
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
    return error_of(capsys, importlib.import_module(script).main, flags, alone=True)


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
def test_flags_of_dino_s_launcher_say_what_to_do(script, folder, capsys):
    error = refusal(script, [*command(script, folder), "--local-rank=0"], capsys)
    assert "--local-rank has no meaning here: use torchrun" in error


@pytest.mark.parametrize("script", EVALUATIONS)
def test_flags_of_dino_s_scripts_say_what_to_do(script, folder, capsys):
    assert "use --features_dir" in refusal(script, [*command(script, folder), "--dump_features", "x"], capsys)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_quick_and_needs_nothing(script, capsys, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", None)
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(script).main(["--help"])
    assert stop.value.code == 0
    assert "--checkpoint" in capsys.readouterr().out


# ---- what must not change a score ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """Two checkpoints with heads, and 60 images in three classes: not a multiple of any batch here."""
    folder = tmp_path_factory.mktemp("several")
    for name, seed in (("a", 1), ("b", 2)):
        torch.manual_seed(seed)
        backbone, head = build_backbone("resnet8", width=12), CPLearnHead(12, out_dim=40)
        head(torch.randn(64, 12))
        state = {f"backbone.{k}": v for k, v in backbone.state_dict().items()}
        state |= {f"head.{k}": v for k, v in head.state_dict().items()}
        args = {"arch": "resnet8", "img_size": 16, "in_chans": 3, "mean": [0.5] * 3, "std": [0.25] * 3}
        args |= {"dataset": "imagefolder", "activation": "l2", "beta": 0.25, "prior": "kl"}
        torch.save({"format": "cplearn 2", "teacher": state, "args": args}, folder / f"{name}.pth")
    for split in ("train", "val"):
        for number in range(60):
            pixels = picture(20, 24, seed=1000 * (split == "val") + number)
            pixels[..., number % 3] //= 2
            write(folder / split / f"class{number % 3}" / f"{number:02d}.png", pixels)
    return folder


OWN_FLAGS = {
    "eval_knn": ["--nb_knn", "1", "20"],
    "eval_linear": ["--epochs", "3"],
    "eval_cluster": ["--kmeans", "0", "--match_k", "3"],
    "eval_collapse": ["--gmm_components", "4", "--tsne_samples", "0"],
}


def run_all(rank, folder, output_dir, batch_size):
    """Every evaluation, in the process group that there is."""
    flags = ["--checkpoint", f"{folder}/a.pth", f"{folder}/b.pth", "--data_path", str(folder), "--num_workers", "0"]
    flags += ["--device", "cpu", "--output_dir", str(output_dir), "--batch_size", str(batch_size), "--baselines"]
    for script, own in OWN_FLAGS.items():
        importlib.import_module(script).main.__wrapped__([*flags, *own])  # without the end of the process group


def rows(output_dir):
    found = {}
    for script in OWN_FLAGS:
        name = script.removeprefix("eval_")
        found[name] = json.loads((output_dir / f"results_{name}.json").read_text())["rows"]
    return found


def test_processes_and_batches_change_no_score(several, tmp_path, run_in_processes):
    init_distributed("cpu")
    try:
        run_all(0, several, tmp_path / "one", 128)
    finally:
        torch.distributed.destroy_process_group()
    run_in_processes(run_all, several, tmp_path / "two", 7)
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert [row["checkpoint"] for row in one["knn"][::2]] == ["raw pixels", "random weights", "a.pth", "b.pth"]
    assert one["knn"] == two["knn"]
    assert one["cluster"] == two["cluster"]
    assert {row["method"] for row in one["cluster"]} == {"codes", "codes merged to 3"}
    for name in ("linear", "collapse"):  # sums of floats in another order
        for row, other in zip(one[name], two[name], strict=True):
            numbers = {key: value for key, value in row.items() if isinstance(value, int | float)}
            assert numbers == pytest.approx({key: other[key] for key in numbers}, rel=2e-3, abs=1e-4), name
    scores = {(row["checkpoint"], row["k"]): row["top1"] for row in one["knn"]}
    assert scores["a.pth", 20] > 40  # not chance


def test_names_and_order_of_files_change_no_score(several, tmp_path):
    for path in several.glob("*/class*/*.png"):  # classes and files in the opposite order
        _, split, label, name = path.relative_to(several.parent).parts
        new = tmp_path / split / f"class{9 - int(label[-1])}" / f"{99 - int(name[:2]):02d}.png"
        new.parent.mkdir(parents=True, exist_ok=True)
        new.write_bytes(path.read_bytes())
    found = []
    for folder in (several, tmp_path):
        flags = ["--checkpoint", str(several / "a.pth"), "--data_path", str(folder), "--num_workers", "0"]
        flags += ["--device", "cpu", "--output_dir", str(tmp_path / "out")]
        for script in ("eval_knn", "eval_cluster"):
            importlib.import_module(script).main([*flags, *OWN_FLAGS[script]])
        scores = [json.loads((tmp_path / "out" / f"results_{name}.json").read_text()) for name in ("knn", "cluster")]
        found.append([row for result in scores for row in result["rows"]])
    for row, other in zip(*found, strict=True):
        numbers = {key: value for key, value in row.items() if isinstance(value, int | float)}
        assert numbers == pytest.approx({key: other[key] for key in numbers}, abs=1e-9)
