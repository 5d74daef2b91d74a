"""Checkpoints of every objective in every evaluation: codes where it has some, and one line where it has none."""

import json

import numpy as np
import pytest
import torch

import eval_cluster
import eval_collapse
import eval_knn
import main_cplearn
import runs
import visualize_attention
from baselines import BASELINES
from checkpoint import load_checkpoint
from objective import CodesObjective
from pretrained import load_pretrained

VIT = {"arch": "vit_tiny", "width": None, "patch_size": 16, "drop_path_rate": 0}
SIZES = {"out_dim": 24, "hidden_dim": 16, "proj_dim": 8, "num_directions": 16, "sgld_steps": 1, "hidden_layers": 2}
CASES = {name: {"objective": name} for name in BASELINES}
CASES["self_classifier, frozen codes"] = {"objective": "self_classifier", "head": "frozen_codes", "hidden_dim": None}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("evaluations")
    for split in ("train", "val"):
        runs.write_pictures(root / split, 24)
    return root


def train(folder, output, **changes):
    """A run of two steps; returns its checkpoint."""
    sizes = {name: value for name, value in SIZES.items() if name in BASELINES[changes["objective"]].flags}
    values = {"max_steps": 2, "out_dim": None, "width": 8, "save_every_minutes": 60} | sizes | changes
    main_cplearn.main(runs.flags(folder, output, **values))
    return output / "checkpoint.pth"


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES)
def trained(folder, tmp_path_factory, request):
    """(checkpoint, its objective)"""
    return train(folder, tmp_path_factory.mktemp("run"), **request.param), request.param["objective"]


def common(trained, folder):
    return ["--checkpoint", str(trained[0]), "--data_path", str(folder), "--device", "cpu", "--num_workers", "0"]


def test_codes_are_those_of_the_trained_head(trained, capsys):
    path, name = trained
    model, state = load_pretrained(path), load_checkpoint(path)
    said = capsys.readouterr().err
    assert model.settings["objective"] == name
    kept = {k.removeprefix("head."): v for k, v in state["teacher"].items() if k.startswith("head.")}
    if not issubclass(BASELINES[name], CodesObjective):
        assert model.head is None and f"left out: head ({len(kept)} tensors)" in said and said.count("\n") == 1
        return
    assert said == ""  # all of the file was taken
    assert model.head.num_codes == 24 and all(torch.equal(v, kept[k]) for k, v in model.head.state_dict().items())
    args = main_cplearn.argparse.Namespace(**state["args"])
    course = main_cplearn.Course(torch.device("cpu"), 8, 1, 3, 2)
    objective = BASELINES[name].from_args(args, model.backbone, course)
    objective.head.load_state_dict(kept)
    x = torch.randn(40, model.embed_dim, generator=torch.Generator().manual_seed(0))
    codes = model.assign_features(x)
    assert torch.equal(codes, objective.head.assign(x)) and codes.dtype == torch.int64 and len(codes.unique()) > 1


def test_every_evaluation_takes_it(trained, folder, tmp_path, capsys):
    name = trained[1]
    has_codes = issubclass(BASELINES[name], CodesObjective)
    eval_cluster.main([*common(trained, folder), "--output_dir", str(tmp_path)])
    results = json.loads((tmp_path / "results_cluster.json").read_text())
    methods = [row["method"] for row in results["rows"]]
    assert methods == (["codes", "k-means 3"] if has_codes else ["k-means 3"])
    assert any(f"trained by --objective {name}; k-means only" in note for note in results["notes"]) != has_codes
    capsys.readouterr()

    eval_collapse.main([*common(trained, folder), "--gmm_components", "2"])
    said = capsys.readouterr()
    for kind in ("representation", "dimensional", "cluster", "intracluster"):
        assert f"    {kind} collapse" in said.out
    assert ("of 24 codes in use" in said.out) == has_codes
    assert "Lemma 1" not in said.out
    assert said.err.count(f"trained by --objective {name}: what is measured against CPLearn's dictionary") == 1

    eval_knn.main([*common(trained, folder), "--nb_knn", "3"])
    assert "top-1 %" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_attention_of_every_objective_can_be_drawn(folder, tmp_path, changes):
    path = train(folder, tmp_path, **(VIT | changes))
    picture = str(folder / "val" / "class0" / "000.png")
    visualize_attention.main(["--checkpoint", str(path), "--image_path", picture, "--device", "cpu", "--output_dir",
                              str(tmp_path)])  # fmt: skip
    assert list(tmp_path.glob("attn*.png"))


def test_without_codes_and_k_means_nothing_is_left_to_score(folder, tmp_path, capsys):
    trained = train(folder, tmp_path / "run", objective="vicreg"), "vicreg"
    with pytest.raises(SystemExit) as caught:
        eval_cluster.main([*common(trained, folder), "--kmeans", "0"])
    line = capsys.readouterr().err.splitlines()[-1]
    assert caught.value.code == 2
    assert "trained by --objective vicreg, and no k-means asked for: give --kmeans K" in line
    # a random backbone beside it was trained by nothing
    eval_cluster.main([*common(trained, folder), "--baselines", "--output_dir", str(tmp_path)])
    notes = json.loads((tmp_path / "results_cluster.json").read_text())["notes"]
    assert np.sum(["no head, so no codes; k-means only" in note for note in notes]) == 2  # pixels, and it
