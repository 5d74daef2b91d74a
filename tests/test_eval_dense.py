"""Segmentation from patch features against scikit-learn, brute force, and planted masks that any feature finds."""

import json
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.metrics import confusion_matrix, jaccard_score
from sklearn.neighbors import KNeighborsClassifier

import data
import eval_dense
from backbones import build_backbone
from evaluation import dense
from pretrained import load_pretrained
from refusals import error_of

COLOURS = np.array([[210, 20, 20], [20, 210, 20], [20, 20, 210]], np.uint8)
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CELL = 16  # px of an image, which are one patch of the model


def voc(root, num=(6, 4), cells=(4, 4), noise=0, seed=0):
    """Images of cells of three colours, and their masks, with a frame that is ignored around each second one."""
    rng = np.random.default_rng(seed)
    for folder in dense.FOLDERS:
        (root / folder).mkdir(parents=True)
    for split, count in zip(("train", "val"), num, strict=True):
        names = [f"{split}_{number}" for number in range(count)]
        (root / dense.FOLDERS[2] / f"{split}.txt").write_text("\n".join(names) + "\n")
        for number, name in enumerate(names):
            labels = rng.permutation(np.arange(cells[0] * cells[1]) % 3).reshape(cells)
            mask = labels.repeat(CELL, 0).repeat(CELL, 1).astype(np.uint8)
            pixels = COLOURS[mask].astype(int) + rng.integers(-noise, noise + 1, (*mask.shape, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / dense.FOLDERS[0] / f"{name}.png")
            if number % 2:
                mask[:3] = mask[-3:] = dense.IGNORED
            palette = Image.fromarray(mask, "P")
            palette.putpalette(list(range(256)) * 3)
            palette.save(root / dense.FOLDERS[1] / f"{name}.png")
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Of a ViT whose 4 x 4 patches see nothing of each other."""
    torch.manual_seed(0)
    backbone = build_backbone("vit_mini", img_size=32, patch_size=8)
    for block in backbone.blocks:
        torch.nn.init.zeros_(block.attn.proj.weight)
    path = tmp_path_factory.mktemp("weights") / "vit.pth"
    torch.save(backbone.state_dict(), path)
    return path


def words(weights, root, *flags):
    given = {"--checkpoint": weights, "--data_path": root, "--device": "cpu", "--num_workers": 0, "--img_size": 32}
    return [str(word) for pair in given.items() if pair[0] not in flags for word in pair] + [str(f) for f in flags]


def rows_of(weights, root, out, *flags):
    eval_dense.main(words(weights, root, "--output_dir", out, *flags))
    return json.loads((out / "results_dense.json").read_text())["rows"]


def test_planted_masks_are_found_exactly(weights, tmp_path):
    root = voc(tmp_path / "voc")
    rows = rows_of(weights, root, tmp_path / "out", "--baselines", "--nb_knn", 3, "--pictures", 2)
    found = {(row["checkpoint"], row["method"]): row for row in rows}
    assert {checkpoint for checkpoint, _ in found} == {"raw pixels", "random weights", str(weights)}
    for of_method in (
        ("raw pixels", "k-NN"),
        ("raw pixels", "linear"),
        (str(weights), "k-NN"),
        (str(weights), "linear"),
    ):
        row = found[of_method]
        assert (row["miou"], row["accuracy"], row["iou"]) == (100, 100, {"0": 100, "1": 100, "2": 100}), of_method
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {"results_dense.json", "results_dense.md", "dense_raw_pixels.png", "dense_random_weights.png"}
    assert "100.00" in (tmp_path / "out" / "results_dense.md").read_text()


@torch.no_grad()
def test_the_scores_are_scikit_learn_s(weights, tmp_path):
    """Neighbours, pixels and the confusion matrix by other code, of images that are no squares and of noisy colours."""
    root = voc(tmp_path / "voc", cells=(3, 5), noise=140)
    rows = rows_of(weights, root, tmp_path / "out", "--nb_knn", 5, "--temperature", 0.5, "--pictures", 0)
    model = load_pretrained(weights)
    features, labels, truth, predicted = [], [], [], []
    for split in ("train", "val"):
        for name in (root / dense.FOLDERS[2] / f"{split}.txt").read_text().split():
            mask = np.array(Image.open(root / dense.FOLDERS[1] / f"{name}.png"))
            pixels = torch.from_numpy(np.array(Image.open(root / dense.FOLDERS[0] / f"{name}.png"))).permute(2, 0, 1)
            x = data.resize(pixels, (32, 32))[None] / 255
            x = (x - torch.tensor(IMAGENET[0]).view(3, 1, 1)) / torch.tensor(IMAGENET[1]).view(3, 1, 1)
            patches = model.backbone.get_intermediate_layers(x)[0][0, 1:].double().numpy()
            if split == "train":
                features.append(patches)
                labels.append(brute_labels(mask, 4, 4).ravel())
                continue
            known = np.concatenate(labels) != 255
            knn = KNeighborsClassifier(5, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.5), algorithm="brute")
            knn.fit(np.concatenate(features)[known], np.concatenate(labels)[known])
            grid = torch.from_numpy(knn.predict(patches).reshape(1, 1, 4, 4)).double()
            pixels = F.interpolate(grid, size=mask.shape, mode="nearest-exact")[0, 0].long().numpy()
            truth.append(mask[mask != 255])
            predicted.append(pixels[mask != 255])
    truth, predicted = np.concatenate(truth), np.concatenate(predicted)
    expected = jaccard_score(truth, predicted, average=None) * 100
    [row] = [row for row in rows if row["method"] == "k-NN"]
    np.testing.assert_allclose([row["iou"][str(label)] for label in range(3)], expected, rtol=1e-12)
    assert row["miou"] == pytest.approx(expected.mean(), rel=1e-12) and 20 < row["miou"] < 95
    assert row["accuracy"] == pytest.approx(100 * (truth == predicted).mean(), rel=1e-12)


def brute_labels(mask, rows, columns):
    found = np.full((rows, columns), 255)
    for row in range(rows):
        for column in range(columns):
            inside = [
                mask[y, x] for y in range(mask.shape[0]) for x in range(mask.shape[1])
                if int((y + 0.5) * rows / mask.shape[0]) == row and int((x + 0.5) * columns / mask.shape[1]) == column
                and mask[y, x] != 255
            ]  # fmt: skip
            if inside:
                values, counts = np.unique(inside, return_counts=True)
                found[row, column] = values[counts.argmax()]
    return found


@pytest.mark.parametrize("shape", [(12, 12), (13, 9), (3, 17)])
def test_a_patch_is_what_most_of_its_pixels_are(shape):
    mask = np.random.default_rng(0).choice(np.array([0, 3, 254, 255], np.uint8), shape)
    mask[:5, :5] = 255
    np.testing.assert_array_equal(dense.patch_labels(mask, 4, 3), brute_labels(mask, 4, 3))


def test_counts_and_scores_are_scikit_learn_s():
    rng = np.random.default_rng(0)
    mask, predicted = (rng.choice(np.array(values, np.uint8), (40, 50)) for values in ([0, 1, 7, 255], [0, 1, 2, 7]))
    known = mask != 255
    counts = dense.confusion(mask, predicted)
    np.testing.assert_array_equal(
        counts[:255, :255], confusion_matrix(mask[known], predicted[known], labels=np.arange(255))
    )
    assert counts.sum() == known.sum()
    scores = dense.scores_of(counts)
    expected = jaccard_score(mask[known], predicted[known], labels=[0, 1, 2, 7], average=None)
    assert list(scores["iou"]) == ["0", "1", "2", "7"] and scores["iou"]["2"] == 0  # predicted, and never there
    np.testing.assert_allclose([*scores["iou"].values()], 100 * expected, rtol=1e-12)


def test_raw_patches_are_the_pixels_of_each_patch():
    x = torch.arange(2 * 3 * 8 * 12.0).view(2, 3, 8, 12)
    _, patches = eval_dense.PixelPatches((2, 3))(x)
    torch.testing.assert_close(patches[1, 1, 2], x[1, :, 4:, 8:].flatten())


def test_colours_are_pascal_voc_s():
    expected = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 8: (64, 0, 0), 15: (192, 128, 128), 255: (224, 224, 192)}
    for label, colour in expected.items():
        assert tuple(eval_dense.colours_of(np.array([[label]]))[0, 0]) == colour


def test_fewer_neighbours_than_asked_for_are_said(weights, tmp_path, capsys):
    root = voc(tmp_path / "voc", num=(3, 2))
    rows_of(weights, root, tmp_path / "out", "--num_patches", 6, "--nb_knn", 7, "--pictures", 0)
    assert "note: --nb_knn 6: there are 6 training patches" in capsys.readouterr().err


def test_of_several_processes_one_works(weights, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(eval_dense.utils, "rank", lambda: 1)
    monkeypatch.setattr(eval_dense.utils, "world_size", lambda: 2)
    eval_dense.main(words(weights, tmp_path / "missing"))
    assert capsys.readouterr().out == ""


FILES = {
    "a folder": (lambda root: os.rename(root / "SegmentationClass", root / "Masks"), "has no folder SegmentationClass"),
    "a mask": (lambda root: os.remove(root / "SegmentationClass/val_1.png"), "1 of 2 masks are missing"),
    "an image": (lambda root: os.remove(root / "JPEGImages/train_0.png"), "JPEGImages/train_0.jpg is missing"),
    "a colour mask": (
        lambda root: Image.new("RGB", (64, 64)).save(root / "SegmentationClass/train_0.png"), "a mask of mode RGB",
    ),
    "another size": (
        lambda root: Image.new("L", (64, 63)).save(root / "SegmentationClass/train_0.png"), "64 x 63 px, its image has",
    ),
    "no image": (
        lambda root: (root / "SegmentationClass/train_0.png").write_text("text"), "train_0.png: not a mask that can be",
    ),
    "an empty list": (lambda root: (root / "ImageSets/Segmentation/val.txt").write_text("\n"), "lists no image"),
    "a list of bytes": (
        lambda root: (root / "ImageSets/Segmentation/val.txt").write_bytes(b"\xff\xfe"), "val.txt cannot be read",
    ),
    "a way out": (lambda root: (root / "ImageSets/Segmentation/val.txt").write_text("../a\n"), "../a leads out"),
    "one class": (
        lambda root: [Image.new("L", (64, 64)).save(p) for p in (root / "SegmentationClass").glob("train*")],
        "the training masks have 1 classes",
    ),
    "all ignored": (
        lambda root: [Image.new("L", (64, 64), 255).save(p) for p in (root / "SegmentationClass").glob("val*")],
        "have no pixel that is not ignored",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), FILES.values(), ids=FILES)
def test_bad_files_are_one_line(damage, message, weights, tmp_path, capsys):
    root = voc(tmp_path / "voc", num=(3, 2))
    damage(root)
    assert message in error_of(capsys, eval_dense.main, words(weights, root))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dataset", "cifar10"], "--dataset cifar10: has no masks"),
        (["--features_dir", "kept"], "--features_dir kept: has no meaning"),
        (["--img_size", "33"], "33"),
        (["--kmeans", "1"], "--kmeans"),
        (["--num_patches", "0"], "--num_patches"),
        (["--pictures", "-1"], "--pictures"),
    ],
)
def test_bad_flags_are_one_line(flags, message, weights, tmp_path, capsys):
    assert message in error_of(capsys, eval_dense.main, words(weights, tmp_path, *flags))
