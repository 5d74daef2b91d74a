"""Clustering scores against scikit-learn, scipy, formulas in plain Python, brute force, and what must not matter."""

import contextlib
import csv
import io
import itertools
import json
import math
import os
import sys
from collections import Counter
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import sklearn.metrics
import torch
from PIL import Image
from pyarrow import parquet
from sklearn.cluster import AgglomerativeClustering, KMeans
from sklearn.metrics.cluster import contingency_matrix

import eval_cluster
import evaluation
from backbones import build_backbone
from cplearn_head import CPLearnHead
from evaluation import clustering
from evaluation.clustering import clustering_scores, expected_mutual_information, kmeans, mean_features, merge
from images import ArrayImages
from refusals import error_of
from utils import UserError


def noisy_codes(num=600, num_classes=6, num_codes=20, seed=0):
    """Labels of unequal frequency, and codes that follow them three times out of four."""
    draw = np.random.default_rng(seed)
    labels = draw.choice(num_classes, num, p=np.arange(1, num_classes + 1) / sum(range(num_classes + 1)))
    codes = np.where(draw.random(num) < 0.75, 3 * labels + draw.integers(0, 3, num), draw.integers(0, num_codes, num))
    return labels, codes


@pytest.mark.parametrize(("num", "num_classes", "num_codes"), [(600, 6, 20), (500, 7, 7), (300, 20, 200), (50, 2, 3)])
def test_scikit_learn_agrees(num, num_classes, num_codes):
    labels, codes = noisy_codes(num, num_classes, num_codes)
    scores = clustering_scores(labels, codes)
    for name, theirs in (("nmi", "normalized_mutual_info"), ("ami", "adjusted_mutual_info"), ("ari", "adjusted_rand")):
        assert scores[name] == pytest.approx(getattr(sklearn.metrics, f"{theirs}_score")(labels, codes), abs=1e-10)


def test_expected_information_is_scikit_learn_s_and_the_mean_over_permutations():
    for num, num_classes, num_codes in ((700, 5, 60), (400, 400, 90), (900, 2, 2)):
        labels, codes = noisy_codes(num, num_classes, num_codes, seed=num)
        table = contingency_matrix(labels, codes, sparse=True)
        sizes = [np.unique(x, return_counts=True)[1] for x in (labels, codes)]
        theirs = sklearn.metrics.cluster.expected_mutual_information(table, num)
        assert expected_mutual_information(*sizes) == pytest.approx(theirs, rel=1e-9)
    scores = clustering_scores(labels, codes, num_permutations=400)
    by_formula = theirs / sum(clustering.entropy(x) / 2 for x in sizes)
    assert scores["nmi_chance"] == pytest.approx(by_formula, abs=5 * scores["nmi_chance_std"] / math.sqrt(400))


def test_expected_information_by_exact_enumeration():
    """All 8! orders of the labels, weighted equally, in fractions but for the logarithm."""
    labels, codes = (0, 0, 0, 0, 1, 1, 1, 2), (5, 5, 5, 6, 6, 6, 6, 9)
    seen = Counter(tuple(sorted(Counter(zip(order, codes, strict=True)).items()))
                   for order in itertools.permutations(labels))  # fmt: skip
    a, b = Counter(labels), Counter(codes)
    expected = sum(
        Fraction(times * n, 8 * math.factorial(8)) * math.log(8 * n / (a[label] * b[code]))
        for table, times in seen.items()
        for (label, code), n in table
    )
    assert expected_mutual_information(np.array([4, 3, 1]), np.array([3, 4, 1])) == pytest.approx(expected, rel=1e-12)


def test_terms_left_out_are_negligible():
    """scikit-learn adds up all n, to 1000 and to half a million in these tables."""
    for table in ([[1, 999], [999, 998_001]], [[300_000, 200_000], [100_000, 400_000]], [[5, 95], [0, 999_900]]):
        sizes = [np.sum(table, axis=axis) for axis in (1, 0)]
        theirs = sklearn.metrics.cluster.expected_mutual_information(np.array(table), 1_000_000)
        assert expected_mutual_information(*sizes) == pytest.approx(theirs, rel=1e-6)
    # for large counts it is one degree of freedom, 1 / (2 N)
    assert expected_mutual_information(np.array([400_000, 600_000]), np.array([500_000] * 2)) == pytest.approx(
        1 / 2_000_000, rel=1e-4
    )


def test_purity_hungarian_and_usage_by_hand():
    labels = np.array([0, 0, 0, 1, 1, 2, 2, 2])
    codes = np.array([7, 7, 4, 4, 4, 4, 4, 9])
    # code 7: 0, 0    code 4: 0, 1, 1, 2, 2    code 9: 2
    scores = clustering_scores(labels, codes)
    assert scores["purity"] == pytest.approx(5 / 8)
    best = max(
        sum(labels == [order[{7: 0, 4: 1, 9: 2}[code]] for code in codes]) for order in itertools.permutations(range(3))
    )
    assert scores["hungarian"] == pytest.approx(best / 8)
    assert (scores["num_used"], scores["largest_share"]) == (3, 5 / 8)
    assert scores["perplexity"] == pytest.approx(4 ** (2 / 8) * (8 / 5) ** (5 / 8) * 8 ** (1 / 8))
    assert clustering_scores(labels, np.arange(8))["hungarian"] is None  # more codes than classes
    two = clustering_scores(labels, np.minimum(codes, 7))  # 7: 0, 0, 2, so that a class is without a code
    assert two["hungarian"] == pytest.approx(4 / 8)


def test_perfect_codes_score_one():
    labels = noisy_codes()[0]
    scores = clustering_scores(labels, 40 - 3 * labels)
    for name in ("nmi", "ami", "ari", "purity", "hungarian"):
        assert scores[name] == pytest.approx(1, abs=1e-12)
    assert scores["nmi_chance"] < 0.05


def test_random_codes_are_chance_and_the_report_says_so():
    """The size of ImageNet-100's validation set: an NMI of 0.70 that says nothing."""
    codes = np.random.default_rng(1).integers(0, 131072, 5000)
    scores = clustering_scores(np.arange(5000) % 100, codes)
    assert scores["nmi"] == pytest.approx(0.70, abs=0.005)
    assert abs(scores["nmi"] - scores["nmi_chance"]) < 1e-3
    assert abs(scores["ami"]) < 0.005
    note = eval_cluster.chance_note({"checkpoint": "a", "method": "codes"} | scores)
    assert note.startswith("a, codes: NMI 0.699 is chance: the same codes give 0.699 +- 0.000 with permuted labels")


def test_the_note_tells_chance_from_mostly_chance_from_neither():
    labels, codes = noisy_codes()
    row = {"checkpoint": "a", "method": "codes"}
    assert eval_cluster.chance_note(row | clustering_scores(labels, codes)) is None
    collapsed = clustering_scores(labels, np.zeros(600))
    assert (collapsed["nmi"], collapsed["ami"], collapsed["num_used"]) == (0, 0, 1)
    assert "NMI 0.000 is chance" in eval_cluster.chance_note(row | collapsed)
    # with nearly as many codes as images, most of the NMI is there for any labels
    many = np.where(np.arange(600) % 3 == 0, labels, np.arange(600) + 100)
    assert "is mostly chance" in eval_cluster.chance_note(row | clustering_scores(labels, many))


def test_false_alarms_are_rare():
    """Codes that are chance are said to be so for 40 seeds of them."""
    labels = np.arange(400) % 5
    for seed in range(40):
        codes = np.random.default_rng(seed).integers(0, 8, 400)
        scores = clustering_scores(labels, codes, seed=100 + seed)
        assert "is chance" in (eval_cluster.chance_note({"checkpoint": "", "method": ""} | scores) or "")


def test_names_and_order_change_nothing():
    labels, codes = noisy_codes()
    order = np.random.default_rng(0).permutation(len(labels))
    names = np.random.default_rng(1).permutation(1000)
    expected = clustering_scores(labels, codes, seed=3)
    del expected["hungarian"]  # None
    for other in ((labels[order], codes[order]), (names[labels], codes), (labels, names[codes]), (labels, codes - 50)):
        scores = clustering_scores(*other, seed=3)
        assert {name: scores[name] for name in expected} == pytest.approx(expected, rel=1e-12)
    other = clustering_scores(labels, codes, seed=4)
    assert other["nmi_chance"] != expected["nmi_chance"]
    assert other["nmi"] == expected["nmi"]


def test_permuted_labels_are_what_chance_means():
    """nmi_chance and its spread, against scikit-learn's NMI of labels that are permuted here."""
    labels, codes = noisy_codes(200, 4, 12)
    draw = np.random.default_rng(5)
    theirs = [sklearn.metrics.normalized_mutual_info_score(draw.permutation(labels), codes) for _ in range(300)]
    scores = clustering_scores(labels, codes, num_permutations=300)
    assert scores["nmi_chance"] == pytest.approx(np.mean(theirs), abs=6 * np.std(theirs) / math.sqrt(300))
    assert scores["nmi_chance_std"] == pytest.approx(np.std(theirs), rel=0.25)


def test_one_permutation_has_no_spread():
    with pytest.raises(ValueError, match="num_permutations is 1"):
        clustering_scores([0, 1], [0, 1], num_permutations=1)


@pytest.mark.slow
def test_the_size_of_imagenet_is_feasible():
    draw = np.random.default_rng(0)
    labels, codes = draw.integers(0, 1000, 1_280_000), draw.integers(0, 131072, 1_280_000)
    assert abs(clustering_scores(labels, codes, num_permutations=2)["ami"]) < 1e-3


# ---- clusters --------------------------------------------------------------------------------------------------------


def blobs(num=400, num_blobs=5, dim=8, seed=0, noise=0.3):
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, num_blobs, num)
    centres = 3 * np.random.default_rng(9).normal(size=(num_blobs, dim))
    return (centres[labels] + noise * draw.normal(size=(num, dim))).astype(np.float32), labels


def inertia(x, clusters):
    return sum(((x[clusters == k] - x[clusters == k].mean(axis=0)) ** 2).sum() for k in np.unique(clusters))


def test_kmeans_finds_blobs_and_does_no_worse_than_scikit_learn():
    x, labels = blobs()
    assert sklearn.metrics.adjusted_rand_score(labels, kmeans(x, 5, restarts=5)) == 1
    x, _ = blobs(noise=3)
    theirs = KMeans(6, n_init=5, random_state=0).fit(x).inertia_
    assert inertia(x, kmeans(x, 6, restarts=5)) < 1.02 * theirs


def test_kmeans_is_a_function_of_its_seed():
    x, _ = blobs(noise=3)
    first = kmeans(x, 7, seed=1)
    np.testing.assert_array_equal(first, kmeans(x, 7, seed=1))
    assert (first != kmeans(x, 7, seed=2)).any()
    assert inertia(x, kmeans(x, 7, restarts=10, seed=1)) <= inertia(x, first)


def test_kmeans_ends_where_each_image_is_nearest_to_the_mean_of_its_cluster():
    """Of all images: faiss by itself would take 256 for each centre."""
    x, _ = blobs(num=4000, noise=1.5)
    clusters = kmeans(x, 5)
    means = np.stack([x[clusters == k].mean(axis=0) for k in range(5)])
    np.testing.assert_array_equal(clusters, ((x[:, None] - means) ** 2).sum(axis=2).argmin(axis=1))


def test_kmeans_without_faiss_is_as_good_and_a_line_says_so(monkeypatch, capsys):
    x, labels = blobs()
    monkeypatch.setitem(sys.modules, "faiss", None)
    evaluation.note_once.cache_clear()
    clusters = kmeans(x, 5, restarts=3)
    assert clusters.dtype == np.int64 and sklearn.metrics.adjusted_rand_score(labels, clusters) == 1
    x, weights = np.array([[0.0], [1.0], [10.0], [12.0]]), np.array([1, 1, 1000, 1000])
    assert sorted(np.bincount(kmeans(x, 2, restarts=9))) == [2, 2]
    assert sorted(np.bincount(kmeans(x, 2, restarts=9, weights=weights))) == [1, 3]  # the heavy two lie apart
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("note: without faiss (") and line.endswith(") k-means is scikit-learn's")
    with pytest.raises(UserError, match="--spherical needs faiss"):
        kmeans(x, 5, spherical=True)


def test_spherical_kmeans_sees_directions_only():
    x, _ = blobs(noise=3)
    lengths = np.exp2(np.random.default_rng(0).integers(-3, 4, (400, 1))).astype(np.float32)
    first = kmeans(x, 5, spherical=True)
    np.testing.assert_array_equal(first, kmeans(x * lengths, 5, spherical=True))
    assert (kmeans(x, 5) != kmeans(x * lengths, 5)).any()
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    centres = np.stack([unit[first == k].sum(axis=0) for k in range(5)])
    cosines = unit @ (centres / np.linalg.norm(centres, axis=1, keepdims=True)).T
    assert (cosines.argmax(axis=1) == first).mean() > 0.99


def test_merged_codes_are_scikit_learn_s_ward_clusters():
    x, _ = blobs(num=80, noise=2)
    ks = (1, 2, 7, 79, 80)
    for k, groups in zip(ks, merge(x, np.ones(80), ks).T, strict=True):
        theirs = AgglomerativeClustering(k, linkage="ward").fit_predict(x)
        assert sklearn.metrics.adjusted_rand_score(groups, theirs) == 1
    assert merge(x[:1], np.ones(1), (1, 1)).tolist() == [[0, 0]]


@pytest.mark.parametrize("match_on", ["features", "codes"])
def test_codes_are_merged_by_what_the_flag_names(match_on):
    """Features, or the dictionary, tell which of 30 codes belong together; the other of the two is noise."""
    x, labels = blobs()
    names = np.random.default_rng(3).permutation(51)
    codes = names[labels + 5 * np.random.default_rng(1).integers(0, 6, len(labels))]
    noise = np.random.default_rng(2).normal(size=(400, 8))
    vectors = np.empty((51, 8))  # (K, F)
    vectors[names] = x[[np.flatnonzero(labels == i % 5)[0] for i in range(51)]]
    head = SimpleNamespace(codes=torch.from_numpy(vectors.T if match_on == "codes" else noise[:51].T))
    evaluated = SimpleNamespace(name="a", model=SimpleNamespace(head=head))
    args, notes = SimpleNamespace(match_k=[31, 5], match_on=match_on, seed=0), []
    features = x if match_on == "features" else noise.astype(np.float32)
    ((method, clusters),) = eval_cluster.merged_clusterings(evaluated, features, codes, args, notes)
    assert method == "codes merged to 5"
    assert sklearn.metrics.adjusted_rand_score(labels, clusters) == 1
    assert notes == ["a: 30 codes in use, they cannot be merged to 31"]


def test_more_codes_than_linkage_takes(monkeypatch):
    x, labels = blobs(num=300)
    monkeypatch.setattr(eval_cluster, "MAX_LINKED", 40)
    assert sklearn.metrics.adjusted_rand_score(labels, merge(x, np.ones(300, int), [5])[:, 0]) == 1


def test_mean_features():
    x, codes = blobs(num=50)
    expected = np.stack([x[codes == k].astype(np.float64).mean(axis=0) for k in range(5)])
    np.testing.assert_allclose(mean_features(x, codes), expected, rtol=1e-5, atol=1e-6)


# ---- the command -----------------------------------------------------------------------------------------------------


def write_checkpoint(path, with_head=True, seed=0):
    torch.manual_seed(seed)
    backbone = build_backbone("resnet8", width=8)
    state = {f"backbone.{name}": tensor for name, tensor in backbone.state_dict().items()}
    if with_head:
        head = CPLearnHead(8, 32, proj_dim=16, activation="tanh", seed=seed)
        state |= {f"head.{name}": tensor for name, tensor in head.state_dict().items()}
    args = {"arch": "resnet8", "img_size": 16, "in_chans": 3, "mean": [0.5] * 3, "std": [0.25] * 3}
    args |= {"dataset": "imagefolder", "activation": "tanh"}
    torch.save({"format": "cplearn 2", "student": state, "teacher": state, "args": args}, path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Checkpoints with and without a head, and images whose colour is their class: labelled, flat, of one class."""
    folder = tmp_path_factory.mktemp("cluster")
    for name in ("images/train/{}", "images/val/{}", "flat/val"):
        for label, i in itertools.product(range(4), range(6)):
            path = folder / name.format(f"class{label}") / f"{label}_{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            colour = np.random.default_rng((label, i)).integers(0, 20, (20, 16, 3)) + 60 * label
            Image.fromarray(colour.astype(np.uint8)).save(path)
    (folder / "one.txt").write_text("class1\n")
    write_checkpoint(folder / "a.pth")
    write_checkpoint(folder / "b.pth", seed=1)
    write_checkpoint(folder / "headless.pth", with_head=False)
    return folder


def command(folder, *flags, checkpoints=("a.pth",), images="images"):
    first = ["--checkpoint", *(str(folder / name) for name in checkpoints), "--data_path", str(folder / images)]
    eval_cluster.main([*first, "--device", "cpu", "--num_workers", "0", *map(str, flags)])


def read_results(out):
    return json.loads((out / "results_cluster.json").read_text())


def test_command_writes_a_row_for_each_kind_of_cluster(folder, tmp_path, capsys):
    flags = ("--match_k", 2, 30, "--kmeans", 4, 3, "--baselines", "--output_dir", tmp_path)
    command(folder, *flags, checkpoints=("a.pth", "b.pth"))
    results, printed = read_results(tmp_path), capsys.readouterr().out
    rows = [(row["checkpoint"], row["method"]) for row in results["rows"]]
    of_features, of_codes = ["k-means 3", "k-means 4"], ["codes", "codes merged to 2"]
    assert rows == [
        *itertools.product(("raw pixels", "random weights"), of_features),
        *itertools.product(("a.pth", "b.pth"), of_codes + of_features),
    ]
    by_row = dict(zip(rows, results["rows"], strict=True))
    assert by_row["raw pixels", "k-means 4"]["nmi"] == pytest.approx(1)  # colours are the classes
    assert by_row["raw pixels", "k-means 4"]["hungarian"] == 1
    assert by_row["a.pth", "codes merged to 2"]["num_used"] == 2
    used = by_row["a.pth", "codes"]["num_used"]
    assert f"a.pth: {used} codes in use, they cannot be merged to 30" in results["notes"]
    assert any("raw pixels: no head" in note for note in results["notes"])
    assert all(note in printed and note in (tmp_path / "results_cluster.md").read_text() for note in results["notes"])
    assert "| NMI | NMI by chance | " in " ".join(printed.split())
    assert (results["num_images"], results["settings"]["kmeans"]) == (24, [3, 4])


def test_by_default_as_many_clusters_as_classes(folder, tmp_path):
    command(folder, "--output_dir", tmp_path, checkpoints=("headless.pth",))
    (row,) = read_results(tmp_path)["rows"]
    assert (row["method"], row["num_used"]) == ("k-means 4", 4)
    command(folder, "--kmeans", 0, "--output_dir", tmp_path)
    assert [row["method"] for row in read_results(tmp_path)["rows"]] == ["codes"]


def test_export_keeps_the_order_of_images(tmp_path):
    images = ArrayImages("x", torch.zeros(3, 1, 2, 2, dtype=torch.uint8), np.array([1, 0, 1]), ["ant", "bee"])
    eval_cluster.export(f"{tmp_path}/x.csv", images, {("a.pth", "codes"): np.array([5, 3, 9])})
    assert (tmp_path / "x.csv").read_text().split() == [
        "image,label,class,codes", "x[0],1,bee,5", "x[1],0,ant,3", "x[2],1,bee,9",
    ]  # fmt: skip


def test_exported_clusters_give_the_scores_of_the_table(folder, tmp_path):
    for name in ("codes.csv", "new/codes.parquet"):
        flags = ("--match_k", 2, "--match_on", "codes", "--export", tmp_path / name, "--output_dir", tmp_path)
        command(folder, *flags, checkpoints=("a.pth", "b.pth"))
    with open(tmp_path / "codes.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    table = parquet.read_table(tmp_path / "new" / "codes.parquet").to_pylist()
    assert [{name: str(value) for name, value in row.items()} for row in table] == rows
    assert rows[7]["image"] == str(folder / "images" / "val" / "class1" / "1_1.png")
    assert (rows[7]["label"], rows[7]["class"]) == ("1", "class1")
    labels = [row["label"] for row in table]
    for row in read_results(tmp_path)["rows"]:
        clusters = [line[f"{row['checkpoint']}: {row['method']}"] for line in table]
        assert sklearn.metrics.normalized_mutual_info_score(labels, clusters) == pytest.approx(row["nmi"])


def test_names_that_are_not_utf8_are_exported(tmp_path):
    for name in (b'\xff,"x"\n', b"b"):
        path = os.path.join(os.fsencode(tmp_path), b"images", b"val", name)
        os.makedirs(path)
        Image.new("RGB", (16, 16)).save(os.path.join(path, b"i.png").decode(errors="surrogateescape"))
    write_checkpoint(tmp_path / "a.pth")
    for name in ("x.csv", "x.parquet"):
        command(tmp_path, "--kmeans", 2, "--export", tmp_path / name)
    with open(tmp_path / "x.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == ["b", '\\udcff,"x"\n']
    assert parquet.read_table(tmp_path / "x.parquet")["class"].to_pylist() == [row["class"] for row in rows]


def test_images_without_labels_have_usage_gallery_and_export_but_no_scores(folder, tmp_path, capsys):
    flags = ("--kmeans", 3, "--gallery", "--export", tmp_path / "x.csv", "--output_dir", tmp_path)
    command(folder, *flags, images="flat")
    results, printed = read_results(tmp_path), capsys.readouterr().out
    assert [row["method"] for row in results["rows"]] == ["codes", "k-means 3"]
    assert results["rows"][1].keys() == {"checkpoint", "method", "num_used", "perplexity", "largest_share"}
    assert "NMI" not in printed
    assert "the val images have no labels: no scores" in printed
    assert (tmp_path / "x.csv").read_text().startswith("image,codes,k-means 3\n")
    assert len(list(tmp_path.glob("gallery_*.html"))) == 1


def test_a_gallery_for_each_checkpoint(folder, tmp_path):
    command(folder, "--gallery", "--baselines", "--output_dir", tmp_path, checkpoints=("a.pth", "b.pth"))
    pages = {path.name: path.read_text() for path in tmp_path.glob("gallery_*.html")}
    assert len(pages) == len(list(tmp_path.glob("gallery_*.png"))) == 4
    assert "<h1>raw pixels: k-means 4 of 24 val images</h1>" in pages["gallery_raw_pixels.html"]
    assert "<h1>b.pth: codes of 24 val images</h1>" in pages["gallery_b.html"]
    assert "Cluster 0 <span>" in pages["gallery_raw_pixels.html"] and "Code " not in pages["gallery_raw_pixels.html"]
    assert "Code " in pages["gallery_b.html"] and "luster " not in pages["gallery_b.html"]


def test_batches_and_stored_features_change_nothing(folder, tmp_path):
    outputs = [tmp_path / name for name in ("one", "batches", "stored", "read")]
    flags = ([], ["--batch_size", 7], *[["--features_dir", tmp_path / "features"]] * 2)
    for out, more in zip(outputs, flags, strict=True):
        command(folder, "--match_k", 2, "--output_dir", out, *more)
    rows = [read_results(out)["rows"] for out in outputs]
    assert rows[0] == rows[1] == rows[2] == rows[3]


def main_in_process(rank, flags):
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        eval_cluster.main.__wrapped__(flags)
    return printed.getvalue()


def test_processes_change_nothing(folder, tmp_path, run_in_processes):
    command(folder, "--match_k", 2, "--output_dir", tmp_path / "one")
    flags = ["--checkpoint", f"{folder}/a.pth", "--data_path", f"{folder}/images", "--device", "cpu"]
    flags += ["--num_workers", "0", "--match_k", "2", "--output_dir", str(tmp_path / "two")]
    first, second = run_in_processes(main_in_process, flags)
    assert "codes merged to 2" in first
    assert second == ""
    assert read_results(tmp_path / "one")["rows"] == read_results(tmp_path / "two")["rows"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--kmeans", "25"], "--kmeans 25: there are 24 images"),
        (["--kmeans", "-1"], "--kmeans -1: expected a whole number of at least 0"),
        (["--kmeans_restarts", "0"], "--kmeans_restarts 0: expected a whole number of at least 1"),
        (["--match_k", "0"], "--match_k 0"),
        (["--num_permutations", "1"], "--num_permutations 1: expected a whole number of at least 2"),
        (["--gallery_codes", "101"], "--gallery_codes 101: expected a whole number of at least 1 and of at most 100"),
        (["--gallery"], "--gallery needs --output_dir"),
        (["--export", "codes.txt"], "--export codes.txt: expected a name that ends in .csv or .parquet"),
        (["--export", "{folder}/a.pth/x.csv"], "--export {folder}/a.pth"),
        (["--class_list", "{folder}/one.txt"], "its val images are of one class; a clustering score needs two"),
        (["--checkpoint", "{folder}/headless.pth", "--kmeans", "0"], "no head, so no codes, and no k-means"),
        (["--split", "test"], "invalid choice: 'test'"),
    ],
)
def test_command_stops_with_one_line(folder, flags, message, capsys):
    flags = [flag.format(folder=folder) for flag in flags]
    assert message.format(folder=folder) in error_of(capsys, command, folder, *flags, alone=True)


def test_a_diverged_model_is_named(folder, tmp_path):
    checkpoint = torch.load(folder / "a.pth", weights_only=True)
    checkpoint["teacher"]["backbone.block1.conv1.weight"].fill_(torch.nan)
    torch.save(checkpoint, folder / "nan.pth")
    with pytest.raises(UserError, match=r"nan\.pth hold NaN or infinity"):
        first = ["--checkpoint", str(folder / "nan.pth"), "--data_path", str(folder / "images"), "--device", "cpu"]
        eval_cluster.main.__wrapped__([*first, "--num_workers", "0"])
