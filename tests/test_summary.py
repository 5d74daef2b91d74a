"""One table of several evaluations' results."""

import json

import pytest

from evaluation.summary import summary
from utils import UserError


def write(folder, name, rows):
    (folder / f"results_{name}.json").write_text(json.dumps({"rows": rows}))


def test_a_line_per_model_and_a_column_per_score_in_the_order_of_the_evaluations(tmp_path):
    write(tmp_path, "cluster", [{"checkpoint": "a", "method": "codes", "ami": 0.5}])
    write(tmp_path, "few", [{"checkpoint": "a", "labels_per_class": 10, "top1": 70.04, "top1_std": 1.26}])
    write(tmp_path, "knn", [{"checkpoint": c, "k": k, "top1": t} for c, k, t in (("a", 20, 81.5), ("b", 20, 60.0))])
    lines = [[part.strip() for part in line.strip("|").split("|")] for line in summary(tmp_path).splitlines()]
    assert lines[0] == ["features", "20-NN %", "10 labels per class %", "codes, AMI"]
    assert lines[2:] == [["a", "81.50", "70.0 ± 1.3", "0.500"], ["b", "60.00", "-", "-"]]


def test_segmentations_have_a_column_each(tmp_path):
    write(
        tmp_path, "dense", [{"checkpoint": "a", "method": m, "miou": v} for m, v in (("k-NN", 50.0), ("linear", 61.5))]
    )
    lines = summary(tmp_path).splitlines()
    assert "k-NN segmentation, mean IoU %" in lines[0] and "50.00" in lines[2] and "61.50" in lines[2]


def test_a_folder_without_results_is_one_line(tmp_path):
    with pytest.raises(UserError, match="no results"):
        summary(tmp_path)


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "results_knn.json").write_text('{"rows": [')
    with pytest.raises(UserError, match=r"results_knn\.json: damaged"):
        summary(tmp_path)
