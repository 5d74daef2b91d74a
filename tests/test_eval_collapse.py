"""The command on images with planted collapses: its table, verdicts, files and one-line errors."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

import eval_collapse
import evaluation
from backbones import build_backbone
from cplearn_head import CPLearnHead, code_temperature, cplearn_loss, loss_lower_bound
from evaluation import collapse_figures
from monitor import rankme, within_code_variance
from refusals import error_of

ARGS = {
    "arch": "resnet8", "img_size": 16, "in_chans": 3, "mean": [0.5] * 3, "std": [0.25] * 3, "dataset": "imagefolder",
    "activation": "l2", "beta": 0.4, "prior": "ce",
}  # fmt: skip


def make_head(**options):
    """Of 32 codes; its statistics are those of features as resnet8 gives them."""
    torch.manual_seed(1)
    return CPLearnHead(8, 32, **options)


def write_checkpoint(path, head=None, backbone=None, **changes):
    torch.manual_seed(0)
    backbone = backbone or build_backbone("resnet8", width=8)
    state = {f"backbone.{k}": v for k, v in backbone.state_dict().items()}
    if head is not None:
        state |= {f"head.{k}": v for k, v in head.state_dict().items()}
    torch.save({"format": "cplearn 2", "student": state, "teacher": state, "args": ARGS | changes}, path)
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """60 random images in three classes, 8 without classes, and checkpoints."""
    folder = tmp_path_factory.mktemp("collapse")
    for i in range(60):
        path = folder / "images" / "val" / f"class{i % 3}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3)) // 2 + np.array([0, 40, 80])[i % 3]
        Image.fromarray(pixels.astype(np.uint8)).save(path)
        if i < 8:
            (folder / "few" / "val").mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / "few" / "val" / f"{i}.png")
    write_checkpoint(folder / "cplearn.pth", make_head())
    write_checkpoint(folder / "bare.pth")
    return folder


@pytest.fixture
def run(folder, capsys):
    """run(*flags): its output on the fixture's images; a checkpoint is named by the file's name."""

    def run(*checkpoints, flags=(), data="images"):
        paths = [str(folder / name) for name in checkpoints]
        common = ["--data_path", str(folder / data), "--device", "cpu", "--num_workers", "0"]
        eval_collapse.main(["--checkpoint", *paths, *common, *map(str, flags)])
        return capsys.readouterr()

    return run


def features_of(tmp_path):
    """(features, codes) as the run kept them."""
    (kept,) = (tmp_path / "kept").iterdir()
    return torch.from_numpy(np.load(kept / "features.npy")), torch.from_numpy(np.load(kept / "codes.npy"))


def test_command_writes_numbers_that_a_reader_can_check(run, folder, tmp_path):
    out = tmp_path / "deep" / "out"
    flags = ["--output_dir", out, "--features_dir", tmp_path / "kept", "--gmm_components", 2, 6, 7]
    printed = run("cplearn.pth", flags=[*flags, "--tsne_samples", 40])
    results = json.loads((out / "results_collapse.json").read_text(), parse_constant=pytest.fail)
    (row,), (curves,) = results["rows"], results["curves"].values()
    features, codes = features_of(tmp_path)
    assert results["num_images"] == len(features) == 60

    assert row["rankme"] == pytest.approx(rankme(features)) and row["width"] == 8
    eigenvalues = np.linalg.eigvalsh(np.cov(features.double().numpy(), rowvar=False))[::-1]
    np.testing.assert_allclose(curves["spectrum"], eigenvalues, rtol=1e-6, atol=1e-12)
    assert row["codes_used"] == len(codes.unique()) and sum(curves["usage"]) == 60 and row["num_codes"] == 32
    assert row["within_code"] == pytest.approx(within_code_variance(features, codes))
    assert [mixture["components"] for mixture in curves["mixtures"]] == [2, 6]
    assert row["mixture_entropy"] == curves["mixtures"][1]["entropy"]
    assert "--gmm_components 7 left out: more than a tenth of 60 images" in printed.err

    head = make_head().eval().requires_grad_(False)
    h = head(features).double()
    loss, terms = cplearn_loss([h, h], head.codes, head.tau, 0.4, "ce")
    assert (row["beta"], row["prior_form"]) == (0.4, "ce")  # as in the checkpoint, beside the prior's value
    assert row["prior"] == pytest.approx(float(terms["prior"]), rel=1e-5)
    assert row["gap"] == pytest.approx(float(loss) - loss_lower_bound(32, 0.4, "ce"), rel=1e-5)
    p = torch.softmax(h @ head.codes.double() / head.tau, dim=1)
    entropies = [float(torch.special.entr(x).sum()) for x in (p.mean(dim=0), p)]
    assert row["entropy"] == pytest.approx(entropies[1] / 60, rel=1e-5)
    assert row["information"] == pytest.approx(entropies[0] - entropies[1] / 60, rel=1e-3)
    assert row["gap_share"] == pytest.approx(row["gap"] / (0.4 * math.log(32)))
    assert "does not say" not in printed.err
    cosines = torch.cosine_similarity(h, head.codes.T[codes].double())
    assert row["alignment"] == pytest.approx(float(cosines.mean()), rel=1e-5)
    assert len(curves["embedding_spectrum"]) == 8

    assert f"gap to Lemma 1 {row['gap']:.3f} nats" in printed.out
    assert all(f"{kind} collapse" in printed.out for kind in row["verdicts"])
    names = {path.name for path in out.iterdir() if path.read_bytes().startswith(b"\x89PNG")}
    shared = {f"collapse_{kind}.png" for kind in ("spectrum", "cosine", "entropy", "usage")}
    assert shared < names
    assert {name.split("_")[1] for name in names - shared} == {"matrices", "tsne"} and len(names) == 6


@pytest.mark.parametrize("name", ["beta", "prior_form", "rankme", "perplexity"])
def test_a_number_that_would_cover_another_is_refused(run, monkeypatch, name):
    certificate = eval_collapse.collapse.certificate
    monkeypatch.setattr(
        eval_collapse.collapse, "certificate", lambda *args, **more: {name: 1} | certificate(*args, **more)
    )
    with pytest.raises(TypeError, match=f"'{name}'"):
        run("cplearn.pth", flags=["--gmm_components"])


def test_without_an_output_folder_nothing_is_drawn(run, monkeypatch):
    monkeypatch.setattr(evaluation, "pyplot", lambda: pytest.fail("drawn"))
    monkeypatch.setattr(eval_collapse.collapse, "tsne", lambda *_: pytest.fail("t-SNE made"))
    assert "representation collapse no" in run("cplearn.pth", flags=["--gmm_components", 2]).out


def test_several_models_and_baselines_in_one_table(run, tmp_path):
    flags = ["--baselines", "--gmm_components", "--tsne_samples", 0, "--output_dir", tmp_path]
    run("cplearn.pth", "bare.pth", flags=flags)
    rows = {row["checkpoint"]: row for row in json.loads((tmp_path / "results_collapse.json").read_text())["rows"]}
    assert list(rows) == ["raw pixels", "random weights", "cplearn.pth", "bare.pth"]
    assert rows["raw pixels"]["width"] == 768 and "alignment" not in rows["bare.pth"]
    assert rows["bare.pth"]["rankme"] == pytest.approx(rows["cplearn.pth"]["rankme"])  # the same backbone
    assert all(rows[name]["verdicts"]["cluster"] == "not known; no codes" for name in rows if name != "cplearn.pth")
    assert rows["bare.pth"]["verdicts"]["intracluster"].startswith("not known")  # neither codes nor k-means groups
    assert rows["cplearn.pth"]["verdicts"]["intracluster"].startswith("no;")  # by its codes alone
    drawn = {path.name for path in tmp_path.glob("*.png")}
    assert {f"collapse_matrices_{name}.png" for name in ("raw_pixels", "random_weights", "cplearn", "bare")} < drawn
    assert not any("tsne" in name or "entropy" in name for name in drawn)


def test_the_highest_rank_is_named_where_several_of_cplearns_can_be_compared(run, folder, tmp_path):
    torch.manual_seed(3)
    backbone = build_backbone("resnet8", width=8)
    other = write_checkpoint(tmp_path / "other.pth", make_head(), backbone)
    narrow = write_checkpoint(tmp_path / "narrow.pth", CPLearnHead(4, 32), build_backbone("resnet8", width=4))
    few = ["--gmm_components", "--tsne_samples", 0, "--output_dir", tmp_path]
    told = run("cplearn.pth", other, flags=few).out
    rows = json.loads((tmp_path / "results_collapse.json").read_text())["rows"]
    best = max(rows, key=lambda row: row["rankme"])["checkpoint"]
    assert f"the highest RankMe of CPLearn's is that of {best}." in told
    frozen = write_checkpoint(tmp_path / "frozen.pth", make_head(), backbone, objective="self_classifier")
    for alone in (("bare.pth", other), (narrow, other), (frozen, other)):
        assert "highest RankMe" not in run(*alone, flags=few).out


def test_wide_features_are_left_out_with_a_note(run, monkeypatch):
    monkeypatch.setattr(eval_collapse, "MAX_COVARIANCE", 100)
    printed = run("bare.pth", flags=["--baselines", "--gmm_components"])
    assert "note: raw pixels left out: 768 features" in printed.err
    assert "raw pixels" not in printed.out and "random weights" in printed.out


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [0.0, 0.7])
def test_a_dead_backbone_is_representation_collapse(run, folder, tmp_path, value):
    backbone = build_backbone("resnet8", width=8)
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            parameter.zero_()
            if name.endswith("shortcut.bias") or (name.endswith("bias") and value):
                parameter.fill_(value)
    write_checkpoint(folder / "dead.pth", make_head(), backbone)
    printed = run("dead.pth", flags=["--gmm_components", 2, "--output_dir", tmp_path])
    (row,) = json.loads((tmp_path / "results_collapse.json").read_text(), parse_constant=pytest.fail)["rows"]
    assert row["verdict"] == "representation"
    assert row["verdicts"]["cluster"].startswith("part of representation collapse; 1 of 32 codes in use")
    assert "representation collapse YES; features differ by" in printed.out


def test_one_code_for_all_is_cluster_collapse(run, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(eval_collapse.collapse_figures, "draw_all", lambda *_: None)  # the longest part
    head = make_head()
    with torch.no_grad():
        head.linear.weight.zero_()
    write_checkpoint(folder / "one.pth", head)
    run("one.pth", flags=["--gmm_components", 2, "--output_dir", tmp_path, "--tsne_samples", 0])
    (row,) = json.loads((tmp_path / "results_collapse.json").read_text())["rows"]
    assert row["codes_used"] == 1 and row["within_code"] == pytest.approx(1)
    assert row["verdicts"]["cluster"].startswith("YES; 1 of 32 codes in use")
    assert row["verdicts"]["intracluster"].startswith("no;") and "cluster" in row["verdict"]


def test_a_checkpoint_that_does_not_say_beta_is_noted(run, folder):
    write_checkpoint(folder / "silent.pth", make_head(), beta=None)
    printed = run("silent.pth", flags=["--gmm_components"])
    assert "does not say its beta and prior: the gap is for {'beta': 0.25, 'prior': 'ce'}" in printed.err


@pytest.mark.parametrize("eps", [1e-8, 1e-5])
@pytest.mark.parametrize("activation", ["l2", "tanh"])
def test_lemma_1_s_eps_is_found_in_the_temperature(eps, activation):
    head = make_head(activation=activation, batch_size=100, proj_dim=20)
    head.tau = code_temperature(head.dictionary.num_codes, 20, 100, eps)  # as older heads may have it
    restored = CPLearnHead.from_state_dict(8, head.state_dict(), activation)
    restored.load_state_dict(head.state_dict())
    assert eval_collapse.smallest_probability(restored) == pytest.approx(eps, rel=1e-6)


def test_without_labels_codes_order_and_colour_pictures(run, monkeypatch, tmp_path):
    monkeypatch.setattr(eval_collapse, "MIN_IMAGES", 8)
    coloured = []
    monkeypatch.setattr(collapse_figures, "draw_points", lambda *args: coloured.append(args))
    flags = ["--gmm_components", "--output_dir", tmp_path, "--tsne_samples", 8, "--features_dir", tmp_path / "kept"]
    run("cplearn.pth", flags=flags, data="few")
    (_, _, positions, numbers, meaning) = coloured.pop()
    assert meaning == "code" and len(positions) == 8
    np.testing.assert_array_equal(numbers, features_of(tmp_path)[1])
    run("bare.pth", flags=flags, data="few")
    assert not coloured and len(list(tmp_path.glob("collapse_tsne_*.png"))) == 2


def test_pictures_are_sorted_by_usage_then_code():
    of_model = {"codes": torch.tensor([5, 2, 9, 2, 9, 9, 1]), "vectors": torch.zeros(7, 1)}
    order, by = collapse_figures.picture_order(of_model, None)
    assert of_model["codes"][order].tolist() == [9, 9, 9, 2, 2, 1, 5] and by == ", sorted by code"


def in_two_processes(rank, arguments):
    eval_collapse.main.__wrapped__(arguments)  # the group outlives it


@pytest.mark.slow
def test_two_processes_write_what_one_does(run, run_in_processes, folder, tmp_path):
    flags = ["--gmm_components", "2", "--tsne_samples", "0", "--data_path", str(folder / "images"), "--device", "cpu"]
    flags += ["--num_workers", "0", "--checkpoint", str(folder / "cplearn.pth")]
    rows = []
    run("cplearn.pth", flags=["--gmm_components", 2, "--tsne_samples", 0, "--output_dir", tmp_path / "one"])
    run_in_processes(in_two_processes, [*flags, "--output_dir", str(tmp_path / "two")])
    for name in ("one", "two"):
        (row,) = json.loads((tmp_path / name / "results_collapse.json").read_text())["rows"]
        rows.append(row)
    assert rows[0].keys() == rows[1].keys() and rows[0]["verdicts"].keys() == rows[1]["verdicts"].keys()
    for name in ("rankme", "alignment", "information", "gap_share", "mixture_entropy", "codes_used"):
        assert math.isclose(rows[0][name], rows[1][name], rel_tol=1e-4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gmm_samples", "3"], "--gmm_samples 3: expected a whole number of at least 10"),
        (["--tsne_samples", "-1"], "--tsne_samples -1: expected a whole number of at least 0"),
        (["--gmm_components", "5", "0"], "--gmm_components 0: expected a whole number of at least 1"),
        (["--data_path", "{folder}/few"], "--split val has 8 images; expected at least 10"),
        (["--split", "test"], "--split"),
        (["--checkpoint", "{folder}/nan.pth"], "nan.pth hold NaN or infinity"),
    ],
)
def test_command_stops_with_one_line(folder, flags, message, capsys):
    broken = build_backbone("resnet8", width=8)
    with torch.no_grad():
        next(broken.parameters()).fill_(math.nan)
    write_checkpoint(folder / "nan.pth", backbone=broken)
    first = ["--checkpoint", folder / "bare.pth", "--data_path", folder / "images", "--num_workers", "0"]
    words = [*map(str, first), *(flag.format(folder=folder) for flag in flags)]
    assert message in error_of(capsys, eval_collapse.main, words, alone=True)


def test_a_beta_of_zero_is_not_taken_for_one_that_is_not_told():
    assert eval_collapse.loss_settings({"beta": 0.0, "prior": "ce"}) == {"beta": 0.0, "prior": "ce"}
    assert eval_collapse.loss_settings({"beta": None}) == eval_collapse.ASSUMED
