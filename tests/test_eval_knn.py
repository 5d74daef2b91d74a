"""k-NN against a transcription of its formula in float64, scikit-learn, and numbers worked out by hand."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier

import eval_knn
import evaluation
from backbones import build_backbone
from evaluation import knn
from evaluation.knn import knn_accuracy, knn_classify
from pictures import but_what_was_opened
from refusals import error_of
from utils import UserError


def clusters(num, seed, num_classes=7, dim=12):
    """Features around class centres, so near that the classes overlap, and labels."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(num_classes, dim, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(num_classes, (num,), generator=generator)
    return centres[labels] + 1.5 * torch.randn(num, dim, generator=generator), labels


def vote_in_float64(train, labels, test, k, temperature, num_classes):
    """The definition, image by image and neighbour by neighbour: (M, C) votes."""
    train, test = (x.numpy().astype(np.float64) for x in (train, test))
    votes = np.zeros((len(test), num_classes))
    for row, x in enumerate(test):
        cosine = np.array([x @ y / np.sqrt((x @ x) * (y @ y)) for y in train])
        for i in np.argsort(-cosine)[:k]:
            votes[row, labels[i]] += np.exp(cosine[i] / temperature)
    return votes


def test_votes_are_those_of_the_formula():
    train, labels = clusters(300, seed=0)
    test, test_labels = clusters(80, seed=1)
    grid = {"ks": (1, 5, 20, 200), "temperatures": (0.07, 0.5)}
    predictions = knn_classify(train, labels, test, **grid)
    accuracy = knn_accuracy(train, labels, test, test_labels, **grid)
    assert predictions.keys() == {(k, t) for k in grid["ks"] for t in grid["temperatures"]}
    for k, temperature in predictions:
        votes = vote_in_float64(train, labels, test, k, temperature, num_classes=7)
        ranked = np.argsort(-votes, axis=1)[:, :5]
        ranked[np.take_along_axis(votes, ranked, 1) == 0] = -1
        np.testing.assert_array_equal(predictions[k, temperature].numpy(), ranked)
        hits = ranked == test_labels.numpy()[:, None]
        assert accuracy[k, temperature]["top1"] == pytest.approx(100 * hits[:, 0].mean())
        assert accuracy[k, temperature]["top5"] == pytest.approx(100 * hits.any(axis=1).mean())
    assert 30 < accuracy[20, 0.07]["top1"] < 95  # neither trivial nor chance


def test_scikit_learn_agrees():
    train, labels = clusters(400, seed=2, num_classes=30)
    test, _ = clusters(100, seed=3, num_classes=30)
    for k in (1, 15):
        theirs = KNeighborsClassifier(k, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07), algorithm="brute")
        theirs.fit(train.double().numpy(), labels.numpy())
        expected = theirs.predict(test.double().numpy())
        np.testing.assert_array_equal(knn_classify(train, labels, test, (k,))[k, 0.07][:, 0], expected)


@pytest.mark.parametrize("block", [40, 4096, 2**26])
def test_search_by_torch_finds_what_faiss_and_numpy_find(block, monkeypatch):
    """In one block of training images or in many, also of fewer rows than neighbours."""
    monkeypatch.setattr(knn, "PRODUCTS", block)
    monkeypatch.setattr(knn, "TEST_ROWS", 16)
    train, test = clusters(300, seed=6)[0], torch.nn.functional.normalize(clusters(41, seed=7)[0], dim=1)
    found, theirs = (search(train)(test, 17) for search in (knn.search_by_torch, knn.search_by_faiss))
    cosine = test.double().numpy() @ (train / train.norm(dim=1, keepdim=True)).double().numpy().T
    np.testing.assert_array_equal(found[1], np.argsort(-cosine, axis=1)[:, :17])
    assert torch.equal(found[1], theirs[1])
    torch.testing.assert_close(found[0], theirs[0], rtol=0, atol=1e-6)


def test_search_by_torch_stays_within_the_stated_memory(monkeypatch):
    monkeypatch.setattr(knn, "PRODUCTS", 2**14)
    sizes = []
    topk = torch.Tensor.topk
    monkeypatch.setattr(torch.Tensor, "topk", lambda x, *a, **kw: sizes.append(x.numel()) or topk(x, *a, **kw))
    knn.search_by_torch(torch.randn(3000, 4))(torch.randn(2500, 4), 5)
    assert max(sizes) == 2**14 and len(sizes) > 3000 * 2500 / 2**14


def test_without_faiss_the_scores_are_the_same_and_one_line_says_so(monkeypatch, capsys):
    (train, labels), (test, test_labels) = clusters(400, seed=8), clusters(90, seed=9)
    expected = knn_accuracy(train, labels, test, test_labels, ks=(1, 20))
    assert capsys.readouterr().err == ""
    monkeypatch.setitem(sys.modules, "faiss", None)
    evaluation.note_once.cache_clear()
    for _ in range(2):
        assert knn_accuracy(train, labels, test, test_labels, ks=(1, 20)) == expected
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("note: without faiss (")
    assert line.endswith(") neighbours are searched by torch, exactly, on cpu")
    assert "faiss" not in evaluation.versions()


def knn_in_two(rank):
    rows, search = [], knn.search_by_torch

    def counting(train):
        nearest = search(train)
        return lambda test, k: rows.append(len(test)) or nearest(test, k)

    sys.modules["faiss"] = None  # must not be asked for
    (train, labels), (test, test_labels) = clusters(300, seed=0), clusters(81, seed=1)
    given = {"ks": (1, 20), "search": counting, "over_processes": True}
    one = knn_accuracy(train, labels, test[:1], test_labels[:1], **given)  # fewer images than processes
    return sum(rows), knn_accuracy(train, labels, test, test_labels, **given), sum(rows), one


def test_two_processes_search_each_row_once_and_have_the_accuracy_of_all(run_in_processes):
    (train, labels), (test, test_labels) = clusters(300, seed=0), clusters(81, seed=1)
    both = run_in_processes(knn_in_two)
    assert sum(before for before, *_ in both) == 1 and sum(after for *_, after, _ in both) == 1 + 81
    for _, accuracy, _, one in both:
        assert accuracy == knn_accuracy(train, labels, test, test_labels, ks=(1, 20))
        assert one == knn_accuracy(train, labels, test[:1], test_labels[:1], ks=(1, 20))


def test_a_case_by_hand():
    train = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, -0.8]])  # cosines with (2, 0): 1, 0.6, 0.6
    labels, test = torch.tensor([4, 2, 2]), torch.tensor([[2.0, 0.0]])
    # class 4 gets e^(1/T), class 2 gets 2 e^(0.6/T): equal at T = 0.4 / ln 2 = 0.577
    assert knn_classify(train, labels, test, (3,), (0.5,))[3, 0.5].tolist() == [[4, 2, -1, -1, -1]]
    assert knn_classify(train, labels, test, (3,), (0.7,))[3, 0.7].tolist() == [[2, 4, -1, -1, -1]]
    assert knn_classify(train, labels, test, (3,), (1e-3,))[3, 1e-3][0, 0] == 4  # e^1000 does not overflow
    # wrong, second, absent
    assert knn_accuracy(train, labels, test, [3], (3,)) == {(3, 0.07): {"top1": 0.0, "top5": 0.0}}
    assert knn_accuracy(train, labels, test, [2], (3,)) == {(3, 0.07): {"top1": 0.0, "top5": 100.0}}


def test_chunks_order_and_scale_change_nothing():
    train, labels = clusters(500, seed=4)
    test, _ = clusters(101, seed=5)
    expected = knn_classify(train, labels, test)
    shuffled = torch.randperm(500, generator=torch.Generator().manual_seed(0))
    scales = torch.rand(500, 1, generator=torch.Generator().manual_seed(1)) + 0.1
    others = [
        knn_classify(train, labels, test, chunk_size=1),
        knn_classify(train, labels, test, chunk_size=17),
        knn_classify(train, labels, test, ks=(200, 10, 100, 20)),
        knn_classify((scales * train)[shuffled], labels[shuffled], 30 * test),
        {k: ranked.flip(0) for k, ranked in knn_classify(train, labels, test.flip(0)).items()},
    ]
    for other in others:
        assert other.keys() == expected.keys()
        assert all(torch.equal(other[k], expected[k]) for k in expected)


def test_more_than_a_thousand_classes():
    features, labels = torch.eye(3000)[:, :2000], torch.arange(3000).clamp_max(1999)
    assert knn_accuracy(features[:2000], labels[:2000], features[:2000], labels[:2000], (1,))[1, 0.07]["top1"] == 100


def test_a_chunk_stays_within_the_stated_memory(monkeypatch):
    monkeypatch.setattr(knn, "MEMORY_MB", 1)
    votes = []
    topk = torch.Tensor.topk
    monkeypatch.setattr(torch.Tensor, "topk", lambda x, *a, **kw: votes.append(x.nbytes) or topk(x, *a, **kw))
    knn_classify(torch.randn(6000, 4), torch.arange(6000) % 3000, torch.randn(120, 4), ks=(10,))
    assert max(votes) <= 2**20
    assert len(votes) == 3  # as many rows at a time as fit, not one


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ks": (11,)}, "--nb_knn 11: expected from 1 to 10, the number of training images"),
        ({"ks": (5, 0)}, "--nb_knn 0"),
        ({"train_labels": torch.tensor([0] * 9 + [-1])}, "1 of 10 training images have no label"),
    ],
)
def test_what_cannot_be_is_one_line(change, message):
    train, test = torch.randn(10, 3), torch.randn(4, 3)
    arguments = {"train_features": train, "train_labels": torch.zeros(10), "test_features": test, "ks": (5,)} | change
    with pytest.raises(UserError, match=message):
        knn_classify(**arguments)


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A checkpoint and a folder of images whose colour is their class: (folder, the command's first flags)."""
    folder = tmp_path_factory.mktemp("knn")
    for split, per_class in (("train", 5), ("val", 3)):
        for label in range(6):
            (folder / split / f"class{label}").mkdir(parents=True)
            for i in range(per_class):
                colour = np.random.default_rng((label, i)).integers(0, 20, (20, 16, 3)) + 40 * label
                Image.fromarray(colour.astype(np.uint8)).save(folder / split / f"class{label}" / f"{i}.png")
    args = {"arch": "resnet8", "img_size": 16, "in_chans": 3, "mean": [0.5] * 3, "std": [0.25] * 3}
    args["dataset"] = "imagefolder"
    torch.manual_seed(0)
    teacher = {f"backbone.{k}": v for k, v in build_backbone("resnet8", width=8).state_dict().items()}
    torch.save({"format": "cplearn 2", "student": teacher, "teacher": teacher, "args": args}, folder / "checkpoint.pth")
    return folder, ["--checkpoint", str(folder / "checkpoint.pth"), "--data_path", str(folder), "--device", "cpu"]


def test_command_writes_its_scores(run, capsys):
    folder, flags = run
    eval_knn.main([*flags, "--nb_knn", "1", "5", "--num_workers", "0", "--output_dir", str(folder / "out" / "knn")])
    results = json.loads((folder / "out" / "knn" / "results_knn.json").read_text())
    assert (results["num_train"], results["num_test"]) == (30, 18)
    assert [row["k"] for row in results["rows"]] == [1, 5]
    assert results["rows"][0]["top1"] > 60  # colours tell the classes apart
    (model,) = results["models"].values()
    assert (model["arch"], model["img_size"]) == ("resnet8", 16)
    assert torch.__version__.startswith(results["versions"]["torch"])
    table = capsys.readouterr().out
    assert f" {results['rows'][0]['top1']:.2f} | " in table
    assert (folder / "out" / "knn" / "results_knn.md").read_text().startswith(table)


def test_of_the_usual_numbers_of_neighbours_those_that_there_are_images_for(run, tmp_path, capsys):
    eval_knn.main([*run[1], "--num_workers", "0", "--output_dir", str(tmp_path)])
    assert [row["k"] for row in json.loads((tmp_path / "results_knn.json").read_text())["rows"]] == [10, 20]
    said = but_what_was_opened(capsys.readouterr().err)
    assert said == "note: --nb_knn 10 20: there are 30 training images\n"
    assert eval_knn.choose_ks(None, 3) == [3]
    assert eval_knn.choose_ks(None, 200) == [10, 20, 100, 200]
    assert capsys.readouterr().err == "note: --nb_knn 3: there are 3 training images\n"


def test_dino_s_spelling_and_batch_size_change_nothing(run, capsys):
    _, flags = run
    outputs = []
    for first, batch_size in (("--checkpoint", "128"), ("--pretrained_weights", "7")):
        eval_knn.main([first, *flags[1:], "--nb_knn", "3", "--num_workers", "0", "--batch_size", batch_size])
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] != ""


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--nb_knn", "31"], "--nb_knn 31: expected from 1 to 30"),
        (["--nb_knn", "5", "0"], "--nb_knn 0: expected a whole number of at least 1"),
        (["--temperature", "0.0"], "--temperature 0.0: expected a number above 0"),
        (["--checkpoint_key", "techer"], "no state dict under --checkpoint_key techer; the file has: student, teacher"),
        (["--data_path", "{folder}/flat"], "its train images have no labels"),
        (["--data_path", "{folder}/odd"], "different class folders"),
        (["--output_dir", "{folder}/checkpoint.pth"], "--output_dir"),
    ],
)
def test_command_stops_with_one_line(run, flags, message, capsys):
    folder, first = run
    for name in ("flat/train", "flat/val", "odd/train/a", "odd/train/b", "odd/val/b", "odd/val/c"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16)).save(folder / name / "x.png")
    words = [*first, "--num_workers", "0", *(flag.format(folder=folder) for flag in flags)]
    assert message in error_of(capsys, eval_knn.main, words, alone=True)
