"""Linear classification as a command: its scores by hand, DINO's files and order of features, and interrupted runs."""

import json
import math

import numpy as np
import pytest
import sklearn.linear_model
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as tv
from PIL import Image

import augmentation
import checkpoint
import data
import eval_linear
import evaluation
import images as images_module
import pretrained
from backbones import build_backbone
from evaluation import linear_probe
from images import ArrayImages, open_dataset
from pictures import make_args, photographs
from refusals import error_of

NUM_CLASSES, TRAIN, VAL = 6, 10, 4  # images per class


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of 16 px in classes that their colours tell apart, not always; a ResNet-8 and a ViT, untrained."""
    root = tmp_path_factory.mktemp("linear")
    for split, count in (("train", TRAIN), ("val", VAL)):
        for label in range(NUM_CLASSES):
            (root / split / f"class{label}").mkdir(parents=True)
            for i in range(count):
                rng = np.random.default_rng((label, i, count))
                pixels = rng.integers(0, 60, (16, 16, 3)) + 20 * label + rng.integers(0, 40, 3)
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / f"class{label}" / f"{i}.png")
    save_model(root / "resnet.pth", "resnet8", width=8)
    save_model(root / "vit.pth", "vit_tiny", patch_size=8, img_size=16)
    return root


def save_model(path, arch, **sizes):
    torch.manual_seed(0)
    backbone = build_backbone(arch, **sizes)
    args = {"arch": arch, "img_size": 16, "in_chans": 3, "mean": [0.5] * 3, "std": [0.25] * 3, "dataset": "imagefolder"}
    state = {f"backbone.{name}": tensor for name, tensor in backbone.state_dict().items()}
    torch.save({"format": "cplearn 2", "teacher": state, "args": args | {"patch_size": sizes.get("patch_size")}}, path)


def flags(folder, *more, model="resnet.pth"):
    first = ["--checkpoint", folder / model, "--data_path", folder, "--device", "cpu", "--num_workers", 0]
    return [str(flag) for flag in (*first, *more)]


def dino(folder, output_dir, *more, **kwargs):
    return flags(folder, "--protocol", "dino", "--batch_size_per_gpu", 20, "--lr", 0.5, "--output_dir", output_dir,
                 *more, **kwargs)  # fmt: skip


def results(output_dir, name="linear"):
    return json.loads((output_dir / f"results_{name}.json").read_text())["rows"]


def pixels(folder, split):
    """All images of a split as the network gets them, made here: (N, 3, 16, 16), and labels."""
    paths = sorted((folder / split).rglob("*.png"))
    images = []
    for path in paths:  # the shorter side to 16 * 256 / 224 px, then the centre
        x = torch.from_numpy(np.array(Image.open(path).resize((18, 18), Image.BICUBIC))).permute(2, 0, 1)
        images.append(x[:, 1:17, 1:17].float() / 255)
    return (torch.stack(images) - 0.5) / 0.25, torch.tensor([int(path.parent.name[-1]) for path in paths])


def model_of(folder, name="resnet.pth"):
    return pretrained.load_pretrained(folder / name, img_size=16)


# ---- on matrices of features -----------------------------------------------------------------------------------------


@torch.no_grad()
def test_fast_scores_by_hand(folder, tmp_path, capsys):
    eval_linear.main(flags(folder, "--output_dir", tmp_path, "--lrs", 0.1, 1, "--weight_decays", 0))
    (row,) = results(tmp_path)
    (train, labels), (val, val_labels) = (pixels(folder, split) for split in ("train", "val"))
    model = model_of(folder)
    fit = linear_probe.fit_selected(model(train), labels, NUM_CLASSES, [0.1, 1], [0])
    logits = F.linear(model(val), *fit.classifier)
    hits = logits.argmax(1) == val_labels
    assert row["top1"] == pytest.approx(100 * hits.double().mean().item())
    top5 = 1 - (logits.argmin(1) == val_labels).double().mean().item()  # of six classes, all but the last
    assert row["top5"] == pytest.approx(100 * top5)
    by_class = {f"class{c}": 100 * hits[val_labels == c].double().mean().item() for c in range(NUM_CLASSES)}
    assert row["per_class"] == pytest.approx(by_class)
    assert 40 < row["top1"] < 100
    assert row["lr"] == fit.settings["lr"]
    (figure,) = tmp_path.glob("confusion_*resnet.png")
    assert Image.open(figure).size[0] > 400
    shown = capsys.readouterr().out
    assert f"{row['top1']:.2f}" in shown
    assert f"| {row['lr']:>9g} |" in shown
    assert "worst: " in shown


def test_test_labels_choose_nothing(folder, tmp_path, monkeypatch):
    eval_linear.main(flags(folder, "--output_dir", tmp_path / "a"))
    (true,) = results(tmp_path / "a")
    opened = open_dataset

    def permuted(args, split):
        images = opened(args, split)
        if split == "val":
            images.labels = np.random.default_rng(0).permutation(images.labels)
        return images

    monkeypatch.setattr(images_module, "open_dataset", permuted)
    eval_linear.main(flags(folder, "--output_dir", tmp_path / "b"))
    (wrong,) = results(tmp_path / "b")
    assert {name: value for name, value in wrong.items() if name not in ("top1", "top5", "per_class")} == {
        name: value for name, value in true.items() if name not in ("top1", "top5", "per_class")
    }
    assert wrong["top1"] < true["top1"]


def test_adam_and_several_models_in_one_table(folder, tmp_path):
    both = flags(folder, "--protocol", "adam", "--epochs", 20, "--output_dir", tmp_path, "--baselines")
    both.insert(1, str(folder / "vit.pth"))
    eval_linear.main(both)
    rows = results(tmp_path)
    assert [row["checkpoint"] for row in rows] == ["raw pixels", "random weights", "vit.pth", "resnet.pth"]
    assert [row["num_features"] for row in rows] == [16 * 16 * 3, 192, 192, 8]
    assert all(row["epochs"] == 20 and row["lr"] == 0.01 for row in rows)
    (train, labels), (val, val_labels) = (pixels(folder, split) for split in ("train", "val"))
    fit = linear_probe.fit_adam(train.flatten(1), labels, NUM_CLASSES, epochs=20)
    top1 = (linear_probe.predict(val.flatten(1), fit.classifier)[:, 0] == val_labels).double().mean().item()
    assert rows[0]["top1"] == pytest.approx(100 * top1)
    assert len(list(tmp_path.glob("confusion_*.png"))) == 4


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")  # scikit-learn's own, called by this test
def test_few_labels_by_hand_beside_another_protocol_s_files(folder, tmp_path, capsys):
    eval_linear.main(flags(folder, "--epochs", 1, "--output_dir", tmp_path))
    fast = {path: path.read_bytes() for path in tmp_path.iterdir()}
    capsys.readouterr()
    given = ["--protocol", "few", "--labels_per_class", 4, "--draws", 3, "--seed", 5, "--baselines"]
    eval_linear.main(flags(folder, *given, "--output_dir", tmp_path, "--features_dir", tmp_path / "features"))
    rows, shown = results(tmp_path, "few"), capsys.readouterr().out
    assert [row["checkpoint"] for row in rows][:2] == ["raw pixels", "random weights"]
    (train, labels), (val, val_labels) = (pixels(folder, split) for split in ("train", "val"))
    for row, network in ((rows[0], torch.nn.Flatten()), (rows[2], model_of(folder))):
        every = by_scikit_learn(network(train), labels.numpy(), network(val), per_class=4, draws=3, seed=5)
        hits = every == val_labels.numpy()  # (draws, M)
        top1 = 100 * hits.mean(axis=1)
        assert row["top1_of_draws"] == pytest.approx(top1)
        assert row["top1"] == pytest.approx(top1.sum() / 3)
        assert row["top1_std"] == pytest.approx(math.sqrt(((top1 - top1.sum() / 3) ** 2).sum() / 3))
        by_class = {f"class{c}": 100 * hits[:, val_labels == c].mean() for c in range(NUM_CLASSES)}
        assert row["per_class"] == pytest.approx(by_class)
        assert (row["labels_per_class"], row["draws"]) == (4, 3)
        assert 20 < row["top1"] < 100
        assert row["top1_std"] > 0
        assert f"| {row['top1_std']:.2f} |".replace(" ", "") in shown.replace(" ", "")
    assert len(fast) == 3
    assert fast == {path: path.read_bytes() for path in fast}
    assert len(list(tmp_path.glob("confusion_few_*.png"))) == 3
    assert "raw pixels: logistic regression ended before it converged (at most 200 iterations) in " in shown


def by_scikit_learn(train, labels, val, per_class, draws, seed):
    """Predicted classes (draws, M): the few labels' rows drawn and fitted here."""
    rng, mean, found = np.random.default_rng(seed), train.mean(0), []
    scale = (train - mean).square().mean().sqrt()
    for _ in range(draws):
        rows = [rng.choice(np.flatnonzero(labels == c), per_class, replace=False) for c in range(NUM_CLASSES)]
        rows = np.concatenate(rows)
        model = sklearn.linear_model.LogisticRegression(C=0.1, max_iter=200)
        model.fit(((train[rows] - mean) / scale).numpy(), labels[rows])
        found.append(model.predict(((val - mean) / scale).numpy()))
    return np.stack(found)


def test_few_labels_are_refused_before_a_picture_is_read(folder, capsys, monkeypatch):
    monkeypatch.setattr(evaluation, "extract_all", None)
    message = "--labels_per_class 11: class0, the smallest class, has 10 training images; expected at most 10"
    assert_one_line(flags(folder, "--protocol", "few", "--labels_per_class", 11), message, capsys)


# ---- DINO's protocol -------------------------------------------------------------------------------------------------


def test_a_view_is_a_crop_that_pil_resizes():
    images = photographs()
    args = make_args("--dataset", "cifar10")
    loader = data.TrainLoader(ArrayImages("some", images), args, 64, recipe=augmentation.make_crop_recipe(args))
    (batch,) = loader.epoch(3)
    (view,) = loader.augment(batch, "cpu")
    assert loader.num_views == 1
    draws = augmentation.uniform(0, 3, batch.indices, 0, augmentation.NUM_DRAWS)
    boxes = augmentation.resized_crop_boxes(draws, 32, 32, (0.08, 1.0), (3 / 4, 4 / 3))
    flip = draws[:, augmentation.FLIP] < 0.5
    mean, std = ([*values] for values in (args.mean, args.std))
    for i in range(64):
        image, (top, left, h, w) = images[batch.indices[i]], boxes[i].tolist()
        pil = Image.fromarray(image[:, top : top + h, left : left + w].permute(1, 2, 0).numpy())
        x = torch.from_numpy(np.array(pil.resize((32, 32), Image.Resampling.BILINEAR))).permute(2, 0, 1)
        x = x.flip(-1) if flip[i] else x
        (of_file,) = augmentation.crop_image(image, draws[i : i + 1], loader.recipe.global_views, loader.recipe)
        assert torch.equal(of_file, x)
        x = tv.normalize(x.float() / 255, mean, std)
        assert (view[i] - x).abs().max() < 2.5 / 255 / min(std)  # rounded twice
    assert 20 < flip.sum() < 44


def run_by_hand(folder, epochs, batch_size=20, lr=0.5):
    """SGD and cosine written out, in float64: weights, biases and the mean loss of each epoch."""
    args = make_args("--dataset", "imagefolder", "--data_path", folder, "--img_size", 16, "--mean", *[0.5] * 3,
                     "--std", *[0.25] * 3, "--num_workers", 0)  # fmt: skip
    images, model = open_dataset(args), model_of(folder)
    loader = data.TrainLoader(images, args, batch_size, recipe=augmentation.make_crop_recipe(args))
    torch.manual_seed(0)
    head = torch.nn.Linear(8, NUM_CLASSES)
    torch.manual_seed(0)
    weight = (0.01 * torch.randn(head.weight.shape)).double()
    bias, velocity, losses = torch.zeros(NUM_CLASSES).double(), [0, 0], []
    for epoch in range(epochs):
        rate, total = lr * batch_size / 256 * (1 + math.cos(math.pi * epoch / epochs)) / 2, 0
        for batch in loader.epoch(epoch):
            with torch.no_grad():
                x = model(loader.augment(batch, "cpu")[0]).double()
            target = F.one_hot(torch.from_numpy(images.labels[batch.indices]), NUM_CLASSES)
            probs = (x @ weight.T + bias).softmax(1)
            total -= (target * probs.log()).sum(1).mean()
            gradient = (probs - target) / batch_size
            for i, (parameter, g) in enumerate(((weight, gradient.T @ x), (bias, gradient.sum(0)))):
                velocity[i] = 0.9 * velocity[i] + g
                parameter -= rate * velocity[i]
        losses.append(float(total) / 3)
    return weight, bias, losses


def test_training_is_sgd_with_a_cosine_written_out(folder, tmp_path):
    eval_linear.main(dino(folder, tmp_path, "--epochs", 4))
    weight, bias, losses = run_by_hand(folder, epochs=4)
    kept = checkpoint.load_checkpoint(tmp_path / "checkpoint.pth.tar")
    torch.testing.assert_close(kept["state_dict"]["module.linear.weight"].double(), weight, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(kept["state_dict"]["module.linear.bias"].double(), bias, rtol=1e-4, atol=1e-6)
    log = [json.loads(line) for line in (tmp_path / "log_linear.txt").read_text().splitlines()]
    assert [line["train_loss"] for line in log] == pytest.approx(losses, rel=1e-5)
    expected = [0.5 * 20 / 256 * (1 + math.cos(math.pi * epoch / 4)) / 2 for epoch in range(4)]
    assert [line["train_lr"] for line in log] == pytest.approx(expected, rel=1e-6)
    assert [line["epoch"] for line in log] == [0, 1, 2, 3]
    assert not (tmp_path / "log.txt").exists()  # it would be that of the run whose folder it is


def test_the_score_is_the_last_epochs(folder, tmp_path):
    eval_linear.main(dino(folder, tmp_path, "--epochs", 7, "--val_freq", 3, "--lr", 8))
    (row,) = results(tmp_path)
    log = [json.loads(line) for line in (tmp_path / "log_linear.txt").read_text().splitlines()]
    assert [line["epoch"] for line in log if "test_acc1" in line] == [0, 3, 6]
    val, labels = pixels(folder, "val")
    state = checkpoint.load_checkpoint(tmp_path / "checkpoint.pth.tar")["state_dict"]
    with torch.no_grad():
        val = model_of(folder)(val)
    logits = F.linear(val, state["module.linear.weight"], state["module.linear.bias"])
    expected = 100 * (logits.argmax(1) == labels).double().mean().item()
    assert row["top1"] == log[-1]["test_acc1"] == pytest.approx(expected)
    assert log[-1]["test_loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-4)  # a level or so
    assert row["top5"] == log[-1]["test_acc5"]
    assert row["best_test_top1"] == max(line["test_acc1"] for line in log if "test_acc1" in line)


def test_a_resumed_run_is_the_undisturbed_one(folder, tmp_path, monkeypatch, capsys):
    eval_linear.main(dino(folder, tmp_path / "whole", "--epochs", 5))
    step, calls = eval_linear.train_one_epoch, []

    def killed(run, loader, labels):
        calls.append(run.epoch)
        if len(calls) in (2, 4):
            raise KeyboardInterrupt
        return step(run, loader, labels)

    monkeypatch.setattr(eval_linear, "train_one_epoch", killed)
    for _ in range(2):
        with pytest.raises(SystemExit, match="130"):
            eval_linear.main(dino(folder, tmp_path / "parts", "--epochs", 5))
    eval_linear.main(dino(folder, tmp_path / "parts", "--epochs", 5))
    assert calls == [0, 1, 1, 2, 2, 3, 4]
    whole, parts = (checkpoint.load_checkpoint(tmp_path / name / "checkpoint.pth.tar") for name in ("whole", "parts"))
    assert repr(flattened(whole)) == repr(flattened(parts))
    assert (tmp_path / "whole" / "log_linear.txt").read_text() == (tmp_path / "parts" / "log_linear.txt").read_text()
    assert results(tmp_path / "whole") == results(tmp_path / "parts")
    capsys.readouterr()
    eval_linear.main(dino(folder, tmp_path / "parts", "--epochs", 5))  # nothing is left to train
    assert "5 of 5 epochs are done" in capsys.readouterr().out
    assert len(calls) == 7
    assert results(tmp_path / "whole") == results(tmp_path / "parts")


def flattened(value):
    """Plain data with tensors as lists: every bit of a float32 shows in its repr."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {name: flattened(item) for name, item in value.items()}
    return [flattened(item) for item in value] if isinstance(value, list) else value


def test_dinos_script_opens_the_checkpoint_and_ours_opens_dinos(folder, tmp_path):
    eval_linear.main(dino(folder, tmp_path, "--epochs", 2))
    ours = checkpoint.load_checkpoint(tmp_path / "checkpoint.pth.tar")
    theirs = torch.nn.ModuleDict({"module": torch.nn.ModuleDict({"linear": torch.nn.Linear(8, NUM_CLASSES)})})
    optimizer = torch.optim.SGD(theirs.parameters(), 0.1, momentum=0.9, weight_decay=0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2, eta_min=0)
    for key, part in (("state_dict", theirs), ("optimizer", optimizer), ("scheduler", scheduler)):
        part.load_state_dict(ours[key])
    assert (ours["epoch"], scheduler.last_epoch) == (2, 2)
    assert ours["best_acc"] == max(line["test_acc1"] for line in ours["log"])
    kept = {"epoch": 1, "state_dict": theirs.state_dict(), "optimizer": optimizer.state_dict()}
    (tmp_path / "dino").mkdir()
    torch.save(kept | {"scheduler": scheduler.state_dict(), "best_acc": 7.0}, tmp_path / "dino/checkpoint.pth.tar")
    eval_linear.main(dino(folder, tmp_path / "dino", "--epochs", 2))
    assert [json.loads(line)["epoch"] for line in (tmp_path / "dino/log_linear.txt").read_text().splitlines()] == [1]


@torch.no_grad()
@pytest.mark.parametrize(("settings", "size"), [([], 4 * 192), (["--n_last_blocks", 1, "--avgpool_patchtokens"], 384)])
def test_a_released_head_gives_the_products_by_hand(folder, tmp_path, settings, size):
    generator = torch.Generator().manual_seed(1)
    weight, bias = torch.randn(9, size, generator=generator), torch.randn(9, generator=generator)
    torch.save({"state_dict": {"module.linear.weight": weight, "module.linear.bias": bias}}, tmp_path / "head.pth")
    eval_linear.main(flags(folder, "--protocol", "dino", "--linear_weights", tmp_path / "head.pth", "--num_labels", 9,
                           "--output_dir", tmp_path, *settings, model="vit.pth"))  # fmt: skip
    (row,), (val, labels) = results(tmp_path), pixels(folder, "val")
    tokens = model_of(folder, "vit.pth").backbone.get_intermediate_layers(val, 4)  # 4 x (N, 1 + 4, 192)
    if settings:  # DINO interleaves: c0, p0, c1, p1, ...
        cls_token, average = tokens[-1][:, 0], tokens[-1][:, 1:].mean(dim=1)
        logits = cls_token @ weight[:, 0::2].T + average @ weight[:, 1::2].T + bias
    else:  # the oldest block first
        parts = weight.split(192, dim=1)
        logits = sum(t[:, 0] @ w.T for t, w in zip(tokens, parts, strict=True)) + bias
    ranked = logits.argsort(dim=1, descending=True)[:, :5]
    assert row["top1"] == pytest.approx(100 * (ranked[:, 0] == labels).double().mean().item())
    assert row["top5"] == pytest.approx(100 * (ranked == labels[:, None]).any(1).double().mean().item())
    assert 0 < row["top5"] < 100
    assert not (tmp_path / "checkpoint.pth.tar").exists()


def test_evaluate_tests_the_folders_head(folder, tmp_path):
    eval_linear.main(dino(folder, tmp_path, "--epochs", 2))
    trained = results(tmp_path)
    kept = (tmp_path / "checkpoint.pth.tar").read_bytes()
    eval_linear.main(flags(folder, "--protocol", "dino", "--evaluate", "--output_dir", tmp_path))
    for score in ("top1", "top5", "per_class"):
        assert results(tmp_path)[0][score] == trained[0][score]
    assert (tmp_path / "checkpoint.pth.tar").read_bytes() == kept


def test_several_models_have_folders_of_their_own(folder, tmp_path):
    both = dino(folder, tmp_path, "--epochs", 1, "--n_last_blocks", 1)
    both.insert(1, str(folder / "vit.pth"))
    eval_linear.main(both)
    for name, width in (("vit", 192), ("resnet", 8)):
        state = checkpoint.load_checkpoint(tmp_path / name / "checkpoint.pth.tar")["state_dict"]
        assert state["module.linear.weight"].shape == (NUM_CLASSES, width)
        assert (tmp_path / f"confusion_{name}.png").exists()
    assert [row["checkpoint"] for row in results(tmp_path)] == ["vit.pth", "resnet.pth"]


def test_baselines_have_features_of_their_own(folder, tmp_path):
    eval_linear.main(dino(folder, tmp_path, "--epochs", 1, "--baselines", model="vit.pth"))
    found = [(row["checkpoint"].split("/")[-1], row["num_features"]) for row in results(tmp_path)]
    assert found == [("raw pixels", 16 * 16 * 3), ("random weights", 4 * 192), ("vit.pth", 4 * 192)]


def main_in_group(rank, argv):
    eval_linear.main.__wrapped__(argv)


def test_two_processes_are_one_with_their_joined_batch(folder, tmp_path, run_in_processes):
    eval_linear.main(dino(folder, tmp_path / "one", "--epochs", 3))
    run_in_processes(main_in_group, dino(folder, tmp_path / "two", "--epochs", 3, "--batch_size_per_gpu", 10))
    one, two = (checkpoint.load_checkpoint(tmp_path / name / "checkpoint.pth.tar") for name in ("one", "two"))
    for name in ("module.linear.weight", "module.linear.bias"):
        torch.testing.assert_close(one["state_dict"][name], two["state_dict"][name], rtol=1e-5, atol=1e-6)
    for first, second in zip(one["log"], two["log"], strict=True):
        assert first == pytest.approx(second, rel=1e-5)
    (one,), (two,) = results(tmp_path / "one"), results(tmp_path / "two")
    assert one == two
    assert one["top1"] > 40


# ---- what cannot be --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--lr", "0.1"], "--lr means nothing to --protocol fast: it belongs to --protocol adam or dino"),
        (["--draws", "3"], "--draws means nothing to --protocol fast: it belongs to --protocol few"),
        (["--protocol", "few", "--epochs", "3"], "--epochs means nothing to --protocol few"),
        (["--protocol", "few", "--draws", "0"], "--draws 0: expected a whole number of at least 1"),
        (["--evaluate"], "--evaluate means nothing to --protocol fast: it belongs to --protocol dino"),
        (["--protocol", "adam", "--weight_decays", "1"], "--weight_decays means nothing to --protocol adam"),
        (["--protocol", "adam", "--epochs", "0"], "--epochs 0: expected a whole number of at least 1"),
        (["--weight_decays", "0.1", "-1"], "--weight_decays -1: expected a number of at least 0"),
        (["--lrs", "inf"], "--lrs inf: expected a number above 0"),
        (["--max_bad_images", "0"], "--max_bad_images means nothing to --protocol fast"),
        (["--protocol", "dino", "--n_last_blocks", "0"], "--n_last_blocks 0: expected a whole number of at least 1"),
        (["--n_last_blocks", "4"], "are for ViTs"),
        (["--protocol", "dino", "--evaluate"], "name its file with --linear_weights"),
        (["--protocol", "dino", "--num_labels", "5"], "--num_labels 5: the images have 6 classes"),
        (["--protocol", "dino", "--linear_weights", "{folder}/none.pth"], "none.pth: no such file"),
        (["--protocol", "dino", "--linear_weights", "{folder}/resnet.pth"], "resnet.pth: expected a linear head"),
        (["--protocol", "dino", "--batch_size", "61"], "60 images do not fill one batch of 61"),
    ],
)
def test_command_stops_with_one_line(folder, given, message, capsys):
    assert_one_line(flags(folder, *(flag.format(folder=folder) for flag in given)), message, capsys)


@pytest.mark.parametrize(
    ("size", "settings", "message"),
    [
        ((6, 384), [], "for 384 features, these settings give 768; try --n_last_blocks 2 or --n_last_blocks 1 --avgp"),
        (
            (6, 768),
            ["--n_last_blocks", 2, "--avgpool_patchtokens"],
            "these settings give 576; try --n_last_blocks 4 or",
        ),
        ((6, 192), [], "try --n_last_blocks 1\n"),
        ((6, 500), [], "no settings fit, all give multiples of 192: is it another backbone's?"),
        ((1000, 768), [], "a head for 1000 classes, expected 6; see --num_labels"),
    ],
)
def test_a_head_of_another_size_names_the_settings_that_fit(folder, tmp_path, size, settings, message, capsys):
    state = {"module.linear.weight": torch.zeros(size), "module.linear.bias": torch.zeros(size[0])}
    torch.save({"state_dict": state}, tmp_path / "head.pth")
    given = ["--protocol", "dino", "--linear_weights", tmp_path / "head.pth", *settings]
    assert_one_line(flags(folder, *given, model="vit.pth"), message, capsys)


def test_another_runs_folder_is_refused(folder, tmp_path, capsys):
    eval_linear.main(dino(folder, tmp_path, "--epochs", 1))
    assert_one_line(dino(folder, tmp_path, "--epochs", 2), "trained with epochs 1, this run has 2", capsys)
    others = dino(folder, tmp_path, "--epochs", 1, "--n_last_blocks", 1, model="vit.pth")
    assert_one_line(others, "trained with backbone ", capsys)


def assert_one_line(argv, message, capsys):
    assert message in error_of(capsys, eval_linear.main, argv, alone=True) + "\n"  # which a message may end with
