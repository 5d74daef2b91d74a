"""A run that starts from trained weights: a backbone at rest, layers at rates of their own, k-NN before the start."""

import copy

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay

import eval_knn
import main_cplearn
from backbones import build_backbone
from checkpoint import load_checkpoint
from monitor import read_log
from optimizer import describe_groups, lr_scales, parameter_groups
from runs import assert_same_checkpoint, flags, logged, run_to_end, write_pictures


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """48 images in 3 classes for training, 24 others for validation."""
    root = tmp_path_factory.mktemp("images")
    write_pictures(root / "train", 48)
    write_pictures(root / "val", 24)
    return root


def parsed(*args, **changes):
    return main_cplearn.get_args_parser().parse_args([str(word) for word in flags(*args, **changes)])


VIT = {"arch": "vit_mini", "patch_size": 8, "width": None, "drop_path_rate": 0.3}
NORMED = {"arch": "test_resnet", "width": None}  # batch norm


# ---- a backbone that rests -------------------------------------------------------------------------------------------


def parts_of(path):
    state = load_checkpoint(path)["student"]
    return [{k: v for k, v in state.items() if k.startswith(part)} for part in ("backbone.", "head.")]


@pytest.mark.parametrize(
    ("objective", "changes"),
    [
        ("cplearn", NORMED),
        ("cplearn", VIT | {"accum_steps": 2}),
        pytest.param("cplearn", VIT, marks=pytest.mark.slow),
        pytest.param("dino", NORMED, marks=pytest.mark.slow),
    ],
)
def test_a_backbone_rests_and_the_head_learns(objective, changes, folder, tmp_path, monkeypatch):
    given = changes | {"objective": objective, "freeze_backbone_epochs": 1, "epochs": 2, "save_every_minutes": 10}
    if objective == "dino":
        given |= {"hidden_dim": 32, "proj_dim": 16, "freeze_last_layer": 0}
    args = parsed(folder, tmp_path, **given)
    seen, ending = [], main_cplearn.finish_epoch

    def note(run, step):
        backbone, teacher = run.model.backbone, getattr(run.model.objective, "teacher", run.model).backbone
        head = [p for p in run.model.objective.parameters() if p.requires_grad]
        seen.append([copy.deepcopy(part.state_dict()) for part in (backbone, teacher)] + [[p.clone() for p in head]])
        seen[-1].append(len([p for p in backbone.parameters() if p in run.optimizer.state]))
        ending(run, step)

    monkeypatch.setattr(main_cplearn, "finish_epoch", note)
    torch.manual_seed(0)
    run = main_cplearn.build_run(args)
    before = copy.deepcopy(run.model.backbone.state_dict())
    heads = [p.clone() for p in run.model.objective.parameters() if p.requires_grad]
    run.lock.close()
    main_cplearn.train(parsed(folder, tmp_path, **given))
    (rested, teacher, head, moments), (learned, _, _, later) = seen
    assert all(torch.equal(before[name], value) for name, value in rested.items())  # batch norm's statistics too
    assert all(torch.equal(before[name], value) for name, value in teacher.items())
    assert any(not torch.equal(a, b) for a, b in zip(heads, head, strict=True))
    assert any(not torch.equal(before[name], value) for name, value in learned.items())
    assert moments == 0 and later == len(list(run.model.backbone.parameters()))


def test_features_at_rest_are_those_of_evaluation_and_have_no_graph(folder, tmp_path, monkeypatch):
    run = main_cplearn.build_run(parsed(folder, tmp_path, freeze_backbone_epochs=1, **VIT))
    run.lock.close()
    run.log, run.watch = main_cplearn.RunLog(tmp_path, 0, 3), main_cplearn.Watch(())
    main_cplearn.set_modes(run, 0)
    frozen, calls = copy.deepcopy(run.model.backbone).eval(), []
    run.first_half.register_forward_hook(lambda half, given, rows: calls.append((given[0], rows)))
    main_cplearn.train_one_step(run, next(run.loader.steps(0)), 0)
    ((views, rows),) = calls
    with torch.no_grad():
        for view, row in zip(views, rows, strict=True):
            torch.testing.assert_close(row, frozen(view))
            assert row.grad_fn is None
    assert all(p.grad is None for p in run.model.backbone.parameters())


@pytest.mark.parametrize(
    "optimizer", ["adamw", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sgd", "lars"))]
)
def test_a_run_stopped_while_the_backbone_rests_is_the_undisturbed_one(optimizer, folder, tmp_path, monkeypatch):
    given = {"freeze_backbone_epochs": 1, "epochs": 2, "optimizer": optimizer, "layer_decay": 0.5} | VIT
    main_cplearn.train(parsed(folder, tmp_path / "whole", **given))
    step = main_cplearn.train_one_step
    for at in (3, 8):  # in the first epoch, of 6 steps, and in the second

        def killed(run, batches, number, at=at):
            if number == at:
                raise KeyboardInterrupt
            return step(run, batches, number)

        monkeypatch.setattr(main_cplearn, "train_one_step", killed)
        with pytest.raises(KeyboardInterrupt):
            main_cplearn.train(parsed(folder, tmp_path / "parts", **given))
    monkeypatch.undo()
    main_cplearn.train(parsed(folder, tmp_path / "parts", **given))
    whole, parts = (tmp_path / name / "checkpoint.pth" for name in ("whole", "parts"))
    assert_same_checkpoint(whole, parts)
    assert logged(tmp_path / "whole") == logged(tmp_path / "parts")


@pytest.mark.slow
def test_two_processes_with_a_resting_backbone_are_two_micro_batches(folder, tmp_path):
    given = {"freeze_backbone_epochs": 1, "epochs": 2, "optimizer": "sgd", "lr": 1, "warmup_epochs": 0} | VIT
    for processes in (1, 2):
        shared = {"batch_size_per_gpu": 4, "accum_steps": 2 // processes}
        run_to_end(flags(folder, tmp_path / str(processes), **given, **shared), tmp_path, processes)
    one, two = (parts_of(tmp_path / name / "checkpoint.pth") for name in ("1", "2"))
    for ours, theirs in zip(one, two, strict=True):
        for name, value in ours.items():
            torch.testing.assert_close(value, theirs[name], atol=1e-5, rtol=1e-4, msg=name)


# ---- layers at rates of their own ------------------------------------------------------------------------------------


def test_layer_decay_of_a_vit_is_timms():
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32)
    expected = {}
    for group in param_groups_layer_decay(theirs, layer_decay=0.7):
        expected |= {id(parameter): group["lr_scale"] for parameter in group["params"]}
    names = {name: expected[id(parameter)] for name, parameter in theirs.named_parameters()}
    found = lr_scales(theirs, 0.7, "")
    assert set(found) == set(names)
    for name, factor in names.items():  # timm without a classifier has the last norm and block together, at 1
        assert found[name] == pytest.approx(1 if name.startswith("norm.") else 0.7 * factor), name


def test_layer_decay_of_a_resnet_is_per_residual_block():
    found = lr_scales(build_backbone("resnet18"), 0.5)
    assert found["backbone.conv1.weight"] == found["backbone.bn1.bias"] == 0.5**9
    assert found["backbone.layer1.0.conv2.weight"] == 0.5**8
    assert found["backbone.layer2.0.downsample.0.weight"] == found["backbone.layer2.0.conv1.weight"] == 0.5**6
    assert found["backbone.layer4.1.bn2.weight"] == 0.5
    assert sorted(set(lr_scales(build_backbone("resnet8", width=4), 0.5).values())) == [0.5**n for n in (4, 3, 2, 1)]
    assert len(set(lr_scales(build_backbone("convnext_atto"), 0.5).values())) == 1 + 12 + 3 + 1  # stem, blocks, ...


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lars"])
def test_each_group_steps_at_its_rate(optimizer, folder, tmp_path):
    run = main_cplearn.build_run(parsed(folder, tmp_path, layer_decay=0.5, optimizer=optimizer, **VIT))
    run.lock.close()
    main_cplearn.set_schedules(run, 7)
    rates = {name: group["lr"] for group in run.optimizer.param_groups for name in group["names"]}
    top = rates["objective.head.linear.weight"]
    assert rates["backbone.norm.weight"] == top == run.optimizer.param_groups[0]["lr"] > 0
    for block in range(4):
        assert rates[f"backbone.blocks.{block}.mlp.fc1.weight"] == pytest.approx(top * 0.5 ** (4 - block))
    assert rates["backbone.pos_embed"] == rates["backbone.patch_embed.proj.weight"] == pytest.approx(top * 0.5**5)
    assert set(rates) == {name for name, p in run.model.named_parameters() if p.requires_grad}
    decays = {name for group in run.optimizer.param_groups if group["decayed"] for name in group["names"]}
    assert decays == set(parameter_groups(run.model)[0]["names"])
    said = describe_groups(run.optimizer.param_groups)
    assert said.startswith("1 objective, norm; 0.5 blocks.3; 0.25 blocks.2;") or said.startswith("1 norm, objective;")
    assert said.endswith("0.0312 patch_embed, cls_token, pos_embed")


# ---- k-NN before the first step --------------------------------------------------------------------------------------


def test_knn_before_the_first_step_is_that_of_the_file(folder, tmp_path, monkeypatch, capsys):
    torch.manual_seed(3)
    torch.save(build_backbone("vit_mini", 32, 8).state_dict(), tmp_path / "vit.pth")
    given = {"init_from": tmp_path / "vit.pth", "knn_every": 1, "epochs": 1} | VIT | {"drop_path_rate": 0}
    main_cplearn.train(parsed(folder, tmp_path / "run", **given))
    first, *_, last = read_log(tmp_path / "run" / "log.txt")
    rows = []
    monkeypatch.setattr(eval_knn.evaluation, "report", lambda name, found, *more, **counts: rows.extend(found))
    words = ["--checkpoint", tmp_path / "vit.pth", "--data_path", folder, "--dataset", "imagefolder", "--device", "cpu"]
    eval_knn.main([str(word) for word in [*words, "--img_size", 32, "--num_workers", 0, "--nb_knn", 20]])
    assert (first["kind"], first["step"], first["knn_top1"]) == ("start", 0, rows[0]["top1"])
    assert 0 < first["knn_top1"] < 100 or rows[0]["top1"] == 100
    assert last["kind"] == "epoch" and last["knn_top1"] >= 0
    assert f"(before the first step: {first['knn_top1']:.2f} %)" in capsys.readouterr().out
    main_cplearn.train(parsed(folder, tmp_path / "without", **given | {"knn_every": 0}))
    assert_same_checkpoint(tmp_path / "run" / "checkpoint.pth", tmp_path / "without" / "checkpoint.pth")


@pytest.mark.slow
def test_a_run_killed_before_its_first_checkpoint_measures_again(folder, tmp_path, monkeypatch):
    step = main_cplearn.train_one_step

    def killed(run, batches, at):
        raise KeyboardInterrupt

    given = {"knn_every": 1, "epochs": 1}
    monkeypatch.setattr(main_cplearn, "train_one_step", killed)
    with pytest.raises(KeyboardInterrupt):
        main_cplearn.train(parsed(folder, tmp_path, **given))
    monkeypatch.setattr(main_cplearn, "train_one_step", step)
    main_cplearn.train(parsed(folder, tmp_path, **given))
    assert [line["kind"] for line in read_log(tmp_path / "log.txt")].count("start") == 1


# ---- what cannot be --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"layer_decay": 0}, "--layer_decay 0: expected a number above 0 and of at most 1"),
        ({"layer_decay": 1.1}, "--layer_decay 1.1: expected a number above 0 and of at most 1"),
        ({"freeze_backbone_epochs": -1}, "--freeze_backbone_epochs -1: expected a whole number of at least 0"),
        ({"freeze_backbone_epochs": 0.5}, "--freeze_backbone_epochs 0.5: expected a whole number of at least 0"),
        ({"freeze_backbone_epochs": 1, "bare_head": True}, "has no parameters beside the backbone's; use 0"),
    ],
)
def test_what_cannot_be_is_one_line(given, message, folder, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main_cplearn.main([str(word) for word in flags(folder, tmp_path, **{"out_dim": 16} | given)])
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert stop.value.code == 2 and len(errors) == 1 and message in errors[0], errors
