"""Fine-tuning as a command: the recipe written out, interrupted runs, several processes, and what it leaves."""

import json
import multiprocessing

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.layers import DropPath

import augmentation
import checkpoint
import data
import eval_linear
from backbones import build_backbone
from evaluation import finetune, summary
from images import open_dataset
from pictures import make_args, write
from pretrained import load_pretrained
from test_eval_linear import NUM_CLASSES, assert_one_line, flags, flattened, folder, main_in_group, results  # noqa: F401

PLAIN = ["--mixup", 0, "--cutmix", 0, "--label_smoothing", 0.2, "--drop_path_rate", 0]


@pytest.fixture(scope="module")
def small(folder):  # noqa: F811
    """A ViT of 4 blocks beside the images."""
    torch.manual_seed(0)
    state = build_backbone("vit_mini", 16, 8).state_dict()
    args = {"arch": "vit_mini", "patch_size": 8, "img_size": 16, "in_chans": 3, "dataset": "imagefolder"}
    torch.save({"model": state, "args": args | {"mean": [0.5] * 3, "std": [0.25] * 3}}, folder / "mini.pth")
    return folder


def words(small, output_dir, *more, epochs=2, batch=20):
    own = ["--protocol", "finetune", "--batch_size_per_gpu", batch, "--epochs", epochs, "--output_dir", output_dir]
    return flags(small, *own, *more, model="mini.pth")


def test_training_is_adamw_with_layer_decay_written_out(small, tmp_path):
    settings = ["--lr", 0.02, "--layer_decay", 0.5, "--warmup_epochs", 0, "--weight_decay", 0.1]
    eval_linear.main(words(small, tmp_path, *PLAIN, *settings))
    args = make_args("--dataset", "imagefolder", "--data_path", small, "--img_size", 16, "--mean", *[0.5] * 3,
                     "--std", *[0.25] * 3, "--num_workers", 0)  # fmt: skip
    images, backbone = open_dataset(args), load_pretrained(small / "mini.pth").backbone.requires_grad_(True).train()
    loader = data.TrainLoader(images, args, 20, recipe=augmentation.make_crop_recipe(args))
    torch.manual_seed(0)
    head = finetune.Classifier(backbone, NUM_CLASSES, "fp32").head
    moments = {}
    for step, batch in enumerate(b for epoch in range(2) for b in loader.epoch(epoch)):
        (x,) = loader.augment(batch, "cpu")
        target = F.one_hot(torch.from_numpy(images.labels[batch.indices]), NUM_CLASSES) * 0.8 + 0.2 / NUM_CLASSES
        loss = -(target * head(backbone(x)).log_softmax(1)).sum(1).mean()
        named = {**dict(backbone.named_parameters()), "head.weight": head.weight, "head.bias": head.bias}
        gradients = torch.autograd.grad(loss, list(named.values()))
        rate = 1e-6 + (0.02 * 20 / 256 - 1e-6) * (1 + np.cos(np.pi * step / 6)) / 2
        for (name, p), g in zip(named.items(), gradients, strict=True):
            at = 5 if name.startswith(("head", "norm")) else int(name.split(".")[1]) + 1 if "blocks" in name else 0
            m, v = moments.get(name, (0, 0))
            m, v = moments[name] = (0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2)
            decay = 0.1 if p.ndim > 1 and name not in ("cls_token", "pos_embed") else 0
            own = rate * 0.5 ** (5 - at)
            update = (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
            with torch.no_grad():
                p.copy_(p * (1 - own * decay) - own * update)
    kept = checkpoint.load_checkpoint(tmp_path / "finetuned.pth")["model"]
    expected = {f"backbone.{k}": v for k, v in backbone.state_dict().items()}
    expected |= {f"head.{k}": v for k, v in head.state_dict().items()}
    assert kept.keys() == expected.keys()
    for name, value in kept.items():
        # of a parameter without gradient (keys' bias) Adam takes the sign of rounding errors
        rows = slice(None) if not name.endswith("qkv.bias") else slice(256, None)
        torch.testing.assert_close(value[rows], expected[name].detach()[rows], atol=2e-4, rtol=1e-3, msg=name)


def test_the_default_rates_are_those_of_mae_s_recipe(small, monkeypatch):
    """Of every parameter at every step of 60 epochs: 5 of linear warm-up, then a cosine; 0.75 per layer; weight decay
    of matrices alone. Adam's settings are Table 9's."""
    rates, adam = [], []

    def record(run, loader, labels):
        adam[:] = [run.optimizer.defaults["betas"], run.args.drop_path_rate, run.mix, run.args.label_smoothing]
        for step in range(run.epoch * loader.steps_per_epoch, (run.epoch + 1) * loader.steps_per_epoch):
            run.set_schedule(step)
            groups = run.optimizer.param_groups
            rates.append({name: (g["lr"], g["weight_decay"]) for g in groups for name in g["names"]})
        return {"train_loss": 0.0, "train_lr": run.lr()}

    monkeypatch.setattr(finetune, "train_one_epoch", record)
    given = ["--protocol", "finetune", "--batch_size_per_gpu", 20, "--epochs", 60, "--val_freq", 60]
    eval_linear.main(flags(small, *given, model="mini.pth"))
    steps, warmup, peak = 180, 15, 5e-4 * 20 / 256
    assert len(rates) == steps
    for step, found in enumerate(rates):
        after = 1e-6 + (peak - 1e-6) * (1 + np.cos(np.pi * (step - warmup) / (steps - warmup))) / 2
        rate = peak * step / (warmup - 1) if step < warmup else after
        for name, (lr, weight_decay) in found.items():
            name = name.removeprefix("backbone.")
            layer = 5 if name.startswith(("head.", "norm.")) else int(name.split(".")[1]) + 1 if "blocks" in name else 0
            assert lr == pytest.approx(rate * 0.75 ** (5 - layer), rel=1e-9, abs=1e-15)
            is_matrix = name.endswith("weight") and "norm" not in name
            assert weight_decay == (0.05 if is_matrix else 0.0), name
    names = {f"backbone.{n}" for n, _ in build_backbone("vit_mini", 16, 8).named_parameters()}
    assert set(rates[0]) == names | {"head.weight", "head.bias"}
    betas, drop_path, mix, smoothing = adam
    assert (betas, drop_path, smoothing) == ((0.9, 0.999), None, 0.1)
    assert (mix.mixup_alpha, mix.cutmix_alpha, mix.label_smoothing, mix.mix_prob) == (0.8, 1.0, 0.1, 1.0)


@pytest.mark.slow
def test_fine_tuning_learns_what_a_linear_probe_of_the_same_weights_cannot(tmp_path):
    """Stripes of any phase, upright or lying: no pixel alone tells the class, and of a random network few features."""
    for split, count in (("train", 640), ("val", 160)):
        for i in range(count):
            rng = np.random.default_rng((count, i))
            waves = np.sin(2 * np.pi * (np.arange(16) / rng.uniform(3, 6) + rng.random()))
            stripes = np.broadcast_to(waves[:, None] if i % 2 else waves, (16, 16))
            pixels = 128 + 40 * stripes[..., None] + rng.normal(0, 70, (16, 16, 3))
            write(tmp_path / "images" / split / f"class{i % 2}" / f"{i}.png", pixels.clip(0, 255).astype(np.uint8))
    torch.manual_seed(0)
    args = {"arch": "vit_mini", "patch_size": 8, "img_size": 16, "in_chans": 3, "dataset": "imagefolder"}
    args |= {"mean": [0.5] * 3, "std": [0.25] * 3}
    torch.save(
        {"model": build_backbone("vit_mini", 16, 8).state_dict(), "args": args}, tmp_path / "images" / "mini.pth"
    )
    eval_linear.main(flags(tmp_path / "images", "--output_dir", tmp_path / "linear", model="mini.pth"))
    eval_linear.main(words(tmp_path / "images", tmp_path / "tuned", "--lr", 0.01, epochs=25, batch=32))
    (probe,), (tuned,) = results(tmp_path / "linear"), results(tmp_path / "tuned", "finetune")
    print(f"linear {probe['top1']:.1f} %, fine-tuned {tuned['top1']:.1f} %")
    assert probe["top1"] + 10 < tuned["top1"] > 90


def test_a_resumed_run_is_the_undisturbed_one(small, tmp_path, monkeypatch):
    """With mixup, cutmix and dropped paths, which are drawn."""
    given = ["--lr", 0.01]
    eval_linear.main(words(small, tmp_path / "whole", *given, epochs=3))
    step, calls = finetune.train_one_epoch, []

    def killed(run, loader, labels):
        calls.append(run.epoch)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return step(run, loader, labels)

    monkeypatch.setattr(finetune, "train_one_epoch", killed)
    with pytest.raises(SystemExit, match="130"):
        eval_linear.main(words(small, tmp_path / "parts", *given, epochs=3))
    eval_linear.main(words(small, tmp_path / "parts", *given, epochs=3))
    assert calls == [0, 1, 1, 2]
    whole, parts = (checkpoint.load_checkpoint(tmp_path / name / "finetuned.pth") for name in ("whole", "parts"))
    assert repr(flattened(whole)) == repr(flattened(parts))
    logs = [(tmp_path / name / "log_finetune.txt").read_text() for name in ("whole", "parts")]
    assert logs[0] == logs[1] and logs[0].count("\n") == 3
    assert results(tmp_path / "whole", "finetune") == results(tmp_path / "parts", "finetune")
    (row,) = results(tmp_path / "whole", "finetune")
    assert row["top1"] == json.loads(logs[0].splitlines()[-1])["test_acc1"] and row["layer_decay"] == 0.75
    assert "fine-tuned %" in summary.summary(tmp_path / "whole")
    features = load_pretrained(tmp_path / "whole" / "finetuned.pth").backbone.state_dict()
    assert all(torch.equal(value, whole["model"][f"backbone.{name}"]) for name, value in features.items())
    described = json.loads((tmp_path / "whole" / "results_finetune.json").read_text())["models"]
    assert [model["weights"] for model in described.values()] == [whole["settings"]["backbone"]]  # not the fine-tuned


def test_how_images_were_read_stays_with_the_weights(small, tmp_path):
    """As the flags had it, not as the file that was fine-tuned says."""
    given = ["--value_range", 0, 4095, "--float_pixels", "--img_size", 24, "--std", 0.3, 0.3, 0.3]
    eval_linear.main(words(small, tmp_path, *given, epochs=1))
    settings = load_pretrained(tmp_path / "finetuned.pth").settings
    found = [settings[name] for name in ("value_range", "float_pixels", "img_size", "std", "mean", "arch")]
    assert found == [[0, 4095], True, 24, [0.3] * 3, [0.5] * 3, "vit_mini"]


@pytest.mark.parametrize(("protocol", "module"), [("finetune", finetune), ("dino", eval_linear)])
def test_data_workers_end_with_the_run_though_an_error_s_traceback_holds_them(small, monkeypatch, protocol, module):
    original = module.train_one_epoch

    def fails(run, loader, labels):
        original(run, loader, labels)
        assert multiprocessing.active_children()
        raise ZeroDivisionError

    monkeypatch.setattr(module, "train_one_epoch", fails)
    given = ["--protocol", protocol, "--batch_size_per_gpu", 20, "--epochs", 2, "--num_workers", 2]
    with pytest.raises(ZeroDivisionError) as held:
        eval_linear.main(flags(small, *given, model="mini.pth"))
    assert held.tb and multiprocessing.active_children() == []


@pytest.mark.slow
def test_two_processes_are_one_with_their_joined_batch(small, tmp_path, run_in_processes):
    eval_linear.main(words(small, tmp_path / "one", *PLAIN))
    run_in_processes(main_in_group, words(small, tmp_path / "two", *PLAIN, batch=10))
    one, two = (checkpoint.load_checkpoint(tmp_path / name / "finetuned.pth") for name in ("one", "two"))
    for first, second in zip(one["log"], two["log"], strict=True):
        assert first == pytest.approx(second, rel=1e-4)
    for name, value in one["model"].items():
        torch.testing.assert_close(value, two["model"][name], atol=2e-4, rtol=1e-3, msg=name)


def test_paths_are_dropped_from_the_first_block_to_the_last():
    backbone = finetune.set_drop_path(build_backbone("vit_mini", 16, 8), 0.3)
    rates = [getattr(block.drop_path1, "drop_prob", 0) for block in backbone.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3])
    assert isinstance(backbone.blocks[3].drop_path2, DropPath)
    assert not any(isinstance(part, DropPath) for part in finetune.set_drop_path(backbone, 0.0).modules())
    resnet = build_backbone("resnet8", width=8)
    assert finetune.set_drop_path(resnet, None) is resnet


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--lrs", 1], "--lrs means nothing to --protocol finetune: it belongs to --protocol fast"),
        (["--n_last_blocks", 4], "--n_last_blocks and --avgpool_patchtokens mean nothing to --protocol finetune"),
        (["--layer_decay", 0], "--layer_decay 0: expected a number above 0 and of at most 1"),
        (["--label_smoothing", 1], "--label_smoothing 1: expected a number of at least 0 and below 1"),
        (["--mixup", -1], "--mixup -1: expected a number of at least 0"),
        (["--cutmix", "x"], "--cutmix x: expected a number of at least 0"),
        (["--warmup_epochs", -1], "--warmup_epochs -1: expected a number of at least 0"),
        (["--weight_decay", "nan"], "--weight_decay nan: expected a number of at least 0"),
        (["--drop_path_rate", 1], "--drop_path_rate 1: expected a number of at least 0 and below 1"),
        (["--batch_size", 15], "--batch_size_per_gpu 15: mixup and cutmix take images in pairs"),
        (["--precision", "fp16"], "--precision fp16: --protocol finetune does not scale its loss"),
        (["--evaluate"], "--evaluate means nothing to --protocol finetune: it belongs to --protocol dino"),
        (
            ["--protocol", "dino", "--mixup", 1],
            "--mixup means nothing to --protocol dino: it belongs to --protocol fine",
        ),
    ],
)
def test_what_cannot_be_is_one_line(small, tmp_path, given, message, capsys):
    assert_one_line(words(small, tmp_path, *given), message, capsys)


def test_a_backbone_without_such_blocks_and_another_run_s_folder_are_refused(small, tmp_path, capsys):
    given = ["--protocol", "finetune", "--batch_size_per_gpu", 20, "--epochs", 1, "--output_dir", tmp_path]
    message = "--drop_path_rate 0.1: this backbone has no blocks as ViTs have; leave it at 0"
    assert_one_line(flags(small, *given, "--drop_path_rate", 0.1), message, capsys)
    eval_linear.main(flags(small, *given))
    assert_one_line(flags(small, *given, "--lr", 1), "trained with lr 0.0005, this run has 1.0: take the same", capsys)
