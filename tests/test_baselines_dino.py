"""DINO: its step written out by hand, over processes and micro-batches, stopped and resumed, and its authors' files."""

import argparse
import copy
import functools
import math
import signal
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import accumulation
import eval_cluster
import eval_collapse
import main_cplearn
import runs
import visualize_attention
from backbones import build_backbone
from baselines.dino import DINO, DINOHead, dino_loss, next_center
from checkpoint import load_checkpoint
from evaluation import probes
from joint_steps import assert_near, over_processes, steps_in_float64
from monitor import read_log
from pretrained import load_pretrained
from runs import launch, write_pictures
from test_main_cplearn import CountWaits
from utils import UserError

CROPS = {"local_crops_number": 2, "local_crops_size": 16}
VIT = {"arch": "vit_tiny", "width": None, "patch_size": 16, "drop_path_rate": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"), 48)


def words(folder, output, processes=1, **changes):
    """6 steps an epoch of 8 images; a small head."""
    values = {"objective": "dino", "out_dim": 24, "hidden_dim": 16, "proj_dim": 8, "epochs": 2, "width": 8}
    return list(map(str, runs.flags(folder, output, processes, **(values | changes))))


def parsed(words):
    return main_cplearn.get_args_parser().parse_args(words)


# ---- the loss --------------------------------------------------------------------------------------------------------


def scores_of_the_known_values():
    g = torch.Generator().manual_seed(11)
    common, own = (torch.randn(*size, 12, 24, generator=g, dtype=torch.float64) for size in ((), (4,)))
    student = list(0.3 * common + 0.1 * own)
    g = torch.Generator().manual_seed(17)
    teacher = 0.3 * torch.randn(2, 2, 12, 24, generator=g, dtype=torch.float64)
    return student, teacher, 0.1 * torch.randn(1, 24, generator=g, dtype=torch.float64)


def test_known_values():
    """Of the authors' code, run in float64."""
    student, teacher, center = scores_of_the_known_values()
    known = ((6.706548708740135, 0.4973730170166423), (6.756393996593015, 0.44015309220137844))
    for scores, (expected, length) in zip(teacher, known, strict=True):
        loss, _ = dino_loss(student[:2], list(scores), center)
        center = next_center(center, list(scores))
        assert loss.item() == pytest.approx(expected, rel=1e-12)
        assert center.norm().item() == pytest.approx(length, rel=1e-12)


@pytest.mark.parametrize("num_views", [2, 4])
def test_gradient_and_entropy(num_views):
    student, teacher, center = scores_of_the_known_values()
    student, teacher = student[:num_views], list(teacher[0])
    leaves = [s[:3].clone().requires_grad_() for s in student]
    assert torch.autograd.gradcheck(lambda *s: dino_loss(list(s), [t[:3] for t in teacher], center)[0], leaves)
    naive = []  # sums over images and prototypes, one number at a time
    for a, v in [(a, v) for a in range(2) for v in range(num_views) if v != a]:
        targets = [[math.exp((t - c) / 0.04) for t, c in zip(row, center[0].tolist(), strict=True)]
                   for row in teacher[a].tolist()]  # fmt: skip
        for target, row in zip(targets, student[v].tolist(), strict=True):
            total = math.log(sum(math.exp(s / 0.1) for s in row))
            naive.append(-sum(t / sum(target) * (s / 0.1 - total) for t, s in zip(target, row, strict=True)))
    loss, terms = dino_loss(student, teacher, center)
    assert loss.item() == pytest.approx(np.mean(naive), rel=1e-12)
    targets = [((t - center) / 0.04).softmax(1) for t in teacher]
    _, terms_of_same = dino_loss([t.log() * 0.1 for t in targets], targets, torch.zeros(1, 24), teacher_temp=1e9)
    assert terms_of_same["entropy"].item() == pytest.approx(math.log(24))  # uniform targets
    assert terms["entropy"].item() == pytest.approx(-sum((t * t.log()).sum(1).mean().item() for t in targets) / 2)
    assert terms["entropy"] < loss


# ---- the head --------------------------------------------------------------------------------------------------------


def their_head(in_dim, hidden, bottleneck, num_prototypes, norm_last_layer=True):
    """DINO's head as its paper describes it, with torch's own weight norm, whose names are in DINO's files."""
    head = nn.Module()
    head.mlp = nn.Sequential(nn.Linear(in_dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(),
                             nn.Linear(hidden, bottleneck))  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        head.last_layer = nn.utils.weight_norm(nn.Linear(bottleneck, num_prototypes, bias=False))
    head.last_layer.weight_g.data.fill_(1).requires_grad_(not norm_last_layer)
    head.last_layer.weight_g.requires_grad = not norm_last_layer
    return head


@pytest.mark.parametrize("norm_last_layer", [True, False])
def test_the_head_is_dinos(norm_last_layer):
    torch.manual_seed(0)
    theirs = their_head(12, 16, 8, 24, norm_last_layer)
    ours = DINOHead(12, 24, (16, 16, 8), norm_last_layer)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [n for n, p in ours.named_parameters() if p.requires_grad] == [
        n for n, p in theirs.named_parameters() if p.requires_grad
    ]
    if not norm_last_layer:
        theirs.last_layer.weight_g.data.uniform_(0.5, 2)
    ours.load_state_dict(theirs.state_dict())
    ours = copy.deepcopy(ours)  # torch's own cannot be copied
    x = torch.randn(5, 12)
    expected = theirs.last_layer(F.normalize(theirs.mlp(x), dim=-1))
    torch.testing.assert_close(ours(x), expected)
    (ours(x).cos().sum()).backward()
    expected.cos().sum().backward()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, msg=name)
    assert torch.equal(ours.train().assign(x), expected.argmax(dim=1)) and ours.training


def test_weights_begin_as_dinos():
    torch.manual_seed(0)
    head = DINOHead(384, 4096)
    assert all(not layer.bias.any() for layer in head.mlp if isinstance(layer, nn.Linear))
    assert head.mlp[0].weight.std().item() == pytest.approx(0.02, rel=0.02)
    v = head.last_layer.weight_v  # uniform in +-1/16, as torch draws a layer of 256 inputs
    assert v.abs().max() <= 1 / 16 and v.std().item() == pytest.approx(1 / 16 / math.sqrt(3), rel=0.02)
    assert torch.equal(head.last_layer.weight_g, torch.ones(4096, 1))


# ---- whole steps -----------------------------------------------------------------------------------------------------


class ByHand:
    """DINO's update in plain operations: a student, a teacher, a centre, AdamW. Of ours: positions are not decayed."""

    def __init__(self, run):
        self.args = run.args
        self.networks = [copy.deepcopy(run.model.backbone), copy.deepcopy(run.model.backbone).requires_grad_(False)]
        head = {name: p.detach().clone() for name, p in run.model.objective.head.named_parameters()}
        self.heads = [head, {name: p.clone() for name, p in head.items()}]
        for name, p in head.items():
            p.requires_grad_(name != "last_layer.weight_g" or not run.args.norm_last_layer)
        self.center = torch.zeros(1, run.args.out_dim, dtype=torch.float64)
        self.kept, self.clipped, self.rounding = {}, [], set()
        self.steps_per_epoch, self.total = run.loader.steps_per_epoch, run.total_steps

    def parameters(self, which):
        return {f"backbone.{n}": p for n, p in self.networks[which].named_parameters()} | {
            f"head.{n}": p for n, p in self.heads[which].items()
        }

    def scores(self, which, views):
        """Crops of one size go through the backbone together (timm interpolates in float32), all through the head."""
        p = self.heads[which]
        x = torch.cat([self.networks[which](torch.cat(part)) for part in (views[:2], views[2:]) if part])
        layers = (0, 3, 6) if self.args.use_bn_in_head else (0, 2, 4)
        for i in layers:
            x = x @ p[f"mlp.{i}.weight"].T + p[f"mlp.{i}.bias"]
            if i == layers[-1]:
                break
            if self.args.use_bn_in_head:
                x = (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()
                x = x * p[f"mlp.{i + 1}.weight"] + p[f"mlp.{i + 1}.bias"]
            x = x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
        x = x / x.norm(dim=1, keepdim=True)
        v = p["last_layer.weight_v"]
        return (x @ (p["last_layer.weight_g"] * v / v.norm(dim=1, keepdim=True)).T).split(len(views[0]))

    def cosine(self, step, start, end, first=0):
        share = (step - first) / (self.total - first)
        return end + (start - end) * (1 + math.cos(math.pi * share)) / 2

    def step(self, step, views):
        args, epoch = self.args, step // self.steps_per_epoch
        warmup = args.warmup_epochs * self.steps_per_epoch
        peak = args.lr * len(views[0]) / 256
        lr = peak * step / (warmup - 1) if step < warmup else self.cosine(step, peak, args.min_lr, warmup)
        decay = self.cosine(step, args.weight_decay, args.weight_decay_end)
        temp = np.linspace(args.warmup_teacher_temp, args.teacher_temp, args.warmup_teacher_temp_epochs)
        temp = temp[epoch] if epoch < len(temp) else args.teacher_temp
        student = self.scores(0, views)
        with torch.no_grad():
            teacher = self.scores(1, views[:2])
            targets = [torch.softmax((t - self.center) / temp, dim=1) for t in teacher]
            self.center = 0.9 * self.center + 0.1 * torch.cat(teacher).mean(0, keepdim=True)
        pairs = [(a, v) for a in range(2) for v in range(len(views)) if a != v]
        loss = sum(torch.sum(-targets[a] * torch.log_softmax(student[v] / 0.1, 1), 1).mean() for a, v in pairs)
        trained = {n: p for n, p in self.parameters(0).items() if p.requires_grad}
        gradients = dict(zip(trained, torch.autograd.grad(loss / len(pairs), trained.values()), strict=True))
        with torch.no_grad():
            for name, p in trained.items():
                if "last_layer" in name and epoch < args.freeze_last_layer:
                    continue
                if gradients[name].norm() < 1e-12:  # a bias before batch norm: AdamW makes a step of rounding
                    self.rounding.add(name)
                factor = args.clip_grad / (gradients[name].norm() + 1e-6)
                self.clipped.append(bool(factor < 1))
                still = p.ndim < 2 or name.endswith(("cls_token", "pos_embed"))
                self.adamw(name, p, gradients[name] * min(1.0, float(factor)), lr, 0.0 if still else decay)
            m = self.cosine(step, args.momentum_teacher, 1.0)
            for name, p in self.parameters(1).items():
                p.copy_(m * p + (1 - m) * self.parameters(0)[name])
        return loss.item() / len(pairs)

    def adamw(self, name, p, gradient, lr, decay):
        m, v, count = self.kept.get(name, (torch.zeros_like(p), torch.zeros_like(p), 0))
        m, v, count = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2, count + 1
        self.kept[name] = m, v, count
        p.mul_(1 - lr * decay)
        p.sub_(lr * (m / (1 - 0.9**count)) / ((v / (1 - 0.999**count)).sqrt() + 1e-8))


SETTINGS = {
    "two crops": {},
    "local crops, a ViT, trained gain": VIT | CROPS | {"norm_last_layer": "false", "clip_grad": 0.3},
    "local crops, batch norm": CROPS | {"use_bn_in_head": True},
}


@pytest.mark.parametrize("changes", SETTINGS.values(), ids=SETTINGS)
def test_three_steps_by_hand(folder, tmp_path, changes, monkeypatch):
    """Two steps of a frozen last layer, then one; in the second epoch the teacher has another temperature."""
    few = {"batch_size_per_gpu": 24, "epochs": 4, "lr": 0.05, "warmup_epochs": 1, "clip_grad": 0.02}
    few |= {"warmup_teacher_temp": 0.03, "teacher_temp": 0.07, "warmup_teacher_temp_epochs": 3}
    few |= {"momentum_teacher": 0.8, "weight_decay": 0.3}
    run = main_cplearn.build_run(parsed(words(folder, tmp_path, **(few | changes))))
    assert (run.loader.steps_per_epoch, run.total_steps) == (2, 8)
    run.model.double()
    run.log, run.watch = main_cplearn.RunLog(tmp_path, 0, 8), main_cplearn.Watch(())
    g = torch.Generator().manual_seed(1)
    sizes = (32, 32, 16, 16) if "local_crops_number" in changes else (32, 32)
    views = [[torch.randn(24, 3, s, s, generator=g, dtype=torch.float64) for s in sizes] for _ in range(3)]
    monkeypatch.setattr(accumulation, "views_of", lambda run, batches, step, m: views[step])
    by_hand = ByHand(run)
    before = {name: p.clone() for name, p in by_hand.parameters(0).items()}
    for step in range(3):
        run.model.train()
        main_cplearn.train_one_step(run, [SimpleNamespace(num_failed=0)], step)
        loss = by_hand.step(step, views[step])
        run.recorder.read(())
        last = run.recorder.line.take()["loss"]
        assert last == pytest.approx(loss, rel=1e-6)  # the recorder's numbers are float32
        moved = {n for n, p in by_hand.parameters(0).items() if not torch.equal(p, before[n])}
        assert ("head.last_layer.weight_v" in moved) == (step == 2)
    objective = run.model.objective
    ours = {f"backbone.{n}": p for n, p in run.model.backbone.named_parameters()}
    ours |= {f"head.{n}": p for n, p in objective.head.named_parameters()}
    for found, expected in ((ours, by_hand.parameters(0)), (dict(objective.teacher.named_parameters()),
                                                            by_hand.parameters(1))):  # fmt: skip
        assert found.keys() == expected.keys()
        for name in found.keys() - by_hand.rounding:
            p = found[name]
            torch.testing.assert_close(p, expected[name], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(objective.dino_loss.center, by_hand.center, rtol=1e-10, atol=1e-10)
    assert len(by_hand.rounding) <= 4 * run.args.use_bn_in_head
    assert {True, False} == set(by_hand.clipped)  # the clip binds for some tensors
    assert not torch.equal(ours["head.last_layer.weight_v"], dict(objective.teacher.named_parameters())[
        "head.last_layer.weight_v"])  # fmt: skip


def test_clipping_is_per_tensor_and_returns_the_global_norm():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(3, 3))
    for p in [*layers[0].parameters(), *layers[1].parameters()]:
        p.grad = torch.randn_like(p)
    layers[1].bias.grad *= 1e-3
    before = [p.grad.clone() for p in layers.parameters() if p.grad is not None]
    norm = DINO.clip_gradients(None, layers.parameters(), 0.5)
    assert norm.item() == pytest.approx(torch.cat([g.flatten() for g in before]).norm().item())
    after = [p.grad for p in layers.parameters() if p.grad is not None]
    for old, new in zip(before, after, strict=True):
        torch.testing.assert_close(new, old * min(1.0, 0.5 / (old.norm().item() + 1e-6)))
    kept = [g.clone() for g in after]
    DINO.clip_gradients(None, layers.parameters(), math.inf)  # --clip_grad 0
    assert all(torch.equal(a, b) for a, b in zip(after, kept, strict=True))


# ---- processes and micro-batches -------------------------------------------------------------------------------------

JOINT = {
    "local crops": CROPS | {"norm_last_layer": "false"},
    "batch norm in the head": {"use_bn_in_head": True},
}


def joint_words(folder, output, batch, parts, processes=1, **changes):
    values = {"max_steps": 4, "warmup_epochs": 0, "optimizer": "sgd", "lr": 1.0, "save_every_minutes": 60}
    values |= {"freeze_last_layer": 0, "momentum_teacher": 0.7, "batch_size_per_gpu": batch, "accum_steps": parts}
    return words(folder, output, **(values | changes))


@pytest.mark.parametrize("changes", JOINT.values(), ids=JOINT)
def test_micro_batches_and_processes_are_the_joint_batch(folder, tmp_path, changes, run_in_processes):
    """Gradients, centre, teacher, usage of prototypes, over three steps."""
    expected = steps_in_float64(0, joint_words(folder, tmp_path / "joint", 16, 1, **changes), 3)
    assert any(name.startswith("state objective.teacher") for name in expected[0])
    found = steps_in_float64(0, joint_words(folder, tmp_path / "parts", 4, 4, **changes), 3)
    assert_near(found, expected)
    found = run_in_processes(steps_in_float64, joint_words(folder, tmp_path / "two", 4, 2, **changes), 3)
    assert_near(over_processes(found), expected)


def test_the_teacher_drops_no_paths_and_follows_batch_norms(folder, tmp_path):
    run = main_cplearn.build_run(parsed(words(folder, tmp_path, **(VIT | {"drop_path_rate": 0.5}))))
    run.model.train()
    objective, x = run.model.objective, torch.randn(8, 3, 32, 32)
    assert torch.equal(*(objective.prepare(None, [x], None)[0] for _ in range(2)))
    with torch.no_grad():
        assert not torch.equal(run.model.backbone(x), run.model.backbone(x))
        assert torch.equal(objective.prepare(None, [x], None)[0], run.model.backbone.eval()(x))
    run.lock.close()
    run = main_cplearn.build_run(parsed(words(folder, tmp_path / "b", arch="resnet18", width=None)))
    run.model.train()
    teacher = run.model.objective.teacher.backbone
    features = run.model.objective.prepare(None, [x, x + 1], None)
    student = copy.deepcopy(run.model.backbone)
    torch.testing.assert_close(torch.cat(features), student(torch.cat([x, x + 1])))  # by the batch's statistics
    for (name, ours), theirs in zip(teacher.named_buffers(), student.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)
    run.model.eval()
    assert not any(module.training for module in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())


def test_a_step_never_waits_for_the_device(folder, tmp_path):
    run = main_cplearn.build_run(parsed(words(folder, tmp_path, **CROPS)))
    run.log, run.watch = main_cplearn.RunLog(tmp_path, 0, 12), main_cplearn.Watch(())
    batches = run.loader.steps(0)
    main_cplearn.train_one_step(run, next(batches), 0)  # the first one draws a figure
    with CountWaits() as counter:
        for step in (1, 6):  # with the last layer frozen, and not
            main_cplearn.train_one_step(run, next(batches), step)
    assert counter.waits == []


def test_nearest_neighbours_are_the_teachers(tmp_path, monkeypatch):
    """As in a checkpoint: without a hint of the student, whose features DINO never evaluates."""
    for split in ("train", "val"):
        write_pictures(tmp_path / "images" / split, 24)
    seen, extract = [], probes.extract_features
    monkeypatch.setattr(probes, "extract_features", lambda model, *rest: seen.append(model) or extract(model, *rest))
    run = main_cplearn.build_run(parsed(words(tmp_path / "images", tmp_path, epochs=1, knn_every=1)))
    run.log, run.watch = main_cplearn.RunLog(tmp_path, 0, 3), main_cplearn.Watch(())
    assert probes.knn(run, 1) >= 0
    assert len(seen) == 2 and all(model is run.model.objective.teacher.backbone for model in seen)


# ---- what a run leaves -----------------------------------------------------------------------------------------------


def test_a_killed_run_goes_on_bit_for_bit(folder, tmp_path):
    """Killed in the epoch of the frozen last layer and after it; accumulation, a rising temperature."""
    settings = CROPS | {"batch_size_per_gpu": 4, "accum_steps": 2, "lr": 1e-3}
    settings |= {"teacher_temp": 0.07, "warmup_teacher_temp_epochs": 2, "use_bn_in_head": True}
    runs.run_to_end(words(folder, tmp_path / "whole", **settings), tmp_path)
    for step in (3, 8):
        job = launch(
            words(folder, tmp_path / "cut", **settings), tmp_path, faults={0: functools.partial(runs.kill_at, step)}
        )
        assert job.wait() == [-signal.SIGKILL], job.output()
        assert load_checkpoint(tmp_path / "cut" / "checkpoint.pth")["step"] == step
    said = runs.run_to_end(words(folder, tmp_path / "cut", **settings), tmp_path)
    assert "resuming at step 8" in said
    assert "K 24 prototypes of length 1" in said and "0.04 -> 0.07 over 2 epochs" in said
    runs.assert_same_run(tmp_path / "cut", tmp_path / "whole")
    line = next(line for line in read_log(tmp_path / "whole" / "log.txt") if line["kind"] == "step")
    assert line["kl"] == pytest.approx(line["train_loss"] - line["train_entropy"], abs=1e-6) and line["kl"] > 0
    assert line["entropy_share"] == pytest.approx(line["train_entropy"] / math.log(24)) and line["center_norm"] > 0


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """A run on a ViT, with the checkpoint of its first epoch kept."""
    output = tmp_path_factory.mktemp("trained")
    main_cplearn.main(words(folder, output, **VIT, saveckp_freq=1, lr=1e-2, knn_every=0))
    return output


def test_a_checkpoint_is_one_of_dinos(trained):
    state = torch.load(trained / "checkpoint.pth")
    assert state["dino_loss"].keys() == {"center"} and state["dino_loss"]["center"].shape == (1, 24)
    assert state["objective"].keys() == {"usage", "recent", "seen"}
    head = list(their_head(192, 16, 8, 24).state_dict())
    for key in ("student", "teacher"):  # what DINO's load_pretrained_weights does
        weights = {k.replace("module.", "").replace("backbone.", ""): v for k, v in state[key].items()}
        missing, unexpected = build_backbone("vit_tiny", 32, 16, 3).load_state_dict(weights, strict=False)
        assert missing == [] and unexpected == [f"head.{name}" for name in head]
    name = "backbone.blocks.3.attn.qkv.weight"
    assert not torch.equal(state["student"][name], state["teacher"][name])


def as_dinos(path, **changes):
    """A checkpoint of ours as main_dino.py would have written it: plain torch, its optimizer made and numbered anew."""
    ours = load_checkpoint(path)
    with_gain = ours["args"]["norm_last_layer"] is False
    student = nn.ModuleDict({"backbone": build_backbone("vit_tiny", 32, 16, 3),
                             "head": their_head(192, 16, 8, 24, not with_gain)})  # fmt: skip
    student.load_state_dict(ours["student"])
    wrapped = nn.ModuleDict({"module": student})
    trained = [(n, p) for n, p in wrapped.named_parameters() if p.requires_grad]
    plain = [p for n, p in trained if n.endswith(".bias") or p.ndim == 1]
    decayed = [p for n, p in trained if not (n.endswith(".bias") or p.ndim == 1)]
    optimizer = torch.optim.AdamW([{"params": decayed}, {"params": plain, "weight_decay": 0.0}])
    names = {id(p): n.removeprefix("module.").replace("head.", "objective.head.", n.startswith("module.head"))
             for n, p in trained}  # fmt: skip
    numbers = [name for group in ours["optimizer"]["param_groups"] for name in group["names"]]
    for p in decayed + plain:
        if numbers.index(names[id(p)]) in ours["optimizer"]["state"]:
            optimizer.state[p] = dict(ours["optimizer"]["state"][numbers.index(names[id(p)])])
    args = argparse.Namespace(
        arch="vit_tiny", patch_size=16, out_dim=24, optimizer="adamw", lr=np.float64(0.01), output_dir=Path("/there"),
        norm_last_layer=not with_gain, batch_size_per_gpu=8, world_size=1, use_fp16=False, dist_url="env://", seed=3,
        global_crops_scale=(0.4, 1.0), epochs=2,
    )  # fmt: skip
    return {
        "student": wrapped.state_dict(),
        "teacher": ours["teacher"],
        "optimizer": optimizer.state_dict(),
        "epoch": ours["epoch"],
        "args": args,
        "dino_loss": ours["dino_loss"],
    } | changes


def test_a_run_goes_on_from_dinos_checkpoint(folder, trained, tmp_path, capsys):
    """Ours, written as DINO does, gives the undisturbed run: weights, teacher, centre, moments, each in its place."""
    torch.save(as_dinos(trained / "checkpoint0001.pth"), tmp_path / "dino.pth")
    again = words(folder, tmp_path / "b", **VIT, saveckp_freq=1, lr=1e-2, resume=tmp_path / "dino.pth")
    main_cplearn.main(again)
    said = [line for line in capsys.readouterr().out.splitlines() if "DINO's checkpoint" in line]
    assert len(said) == 1 and said[0].endswith("goes on at epoch 1, step 6; all flags in common are the same")
    ours, theirs = (load_checkpoint(place / "checkpoint.pth") for place in (tmp_path / "b", trained))
    for name in ("student", "teacher", "dino_loss", "optimizer"):
        found, expected = runs.tensors(ours[name]), runs.tensors(theirs[name])
        assert found.keys() == expected.keys() and len(found) > 0
        assert [n for n in found if not torch.equal(found[n], expected[n])] == []
    assert len(ours["optimizer"]["state"]) > 150 and ours["step"] == 12
    main_cplearn.main(again)  # its own folder comes first
    assert "DINO's checkpoint" not in capsys.readouterr().out


def test_dinos_checkpoint_in_the_way_is_not_written_over(folder, trained, tmp_path):
    path = tmp_path / "checkpoint.pth"
    torch.save(as_dinos(trained / "checkpoint0001.pth"), path)
    before = path.read_bytes()
    with pytest.raises(UserError, match="not a checkpoint of this program, and it would be written over"):
        main_cplearn.train(main_cplearn.get_args_parser().parse_args(words(folder, tmp_path, **VIT)))
    assert path.read_bytes() == before


def test_flags_that_differ_are_said(folder, trained, tmp_path, capsys):
    torch.save(as_dinos(trained / "checkpoint0001.pth"), tmp_path / "dino.pth")
    changes = {"lr": 0.02, "epochs": 3, "batch_size_per_gpu": 4, "max_steps": 13}
    main_cplearn.main(words(folder, tmp_path / "b", **(VIT | changes), resume=tmp_path / "dino.pth"))
    said = next(line for line in capsys.readouterr().out.splitlines() if "DINO's checkpoint" in line)
    assert said.endswith("flags that differ: --epochs 2 -> 3; --lr 0.01 -> 0.02; effective batch 8 -> 4")


def lars(state):
    kept = {number: {"mu": torch.zeros(2)} for number in state["optimizer"]["state"]}
    return {"optimizer": state["optimizer"] | {"state": kept}, "args": argparse.Namespace(optimizer="lars")}


REFUSED = {
    "lars": (lars, {}, "its optimizer is lars, which keeps mu, this run's adamw"),
    "sgd here": (lambda state: {}, {"optimizer": "sgd", "lr": 0.01}, "its optimizer is adamw, this run's sgd"),
    "other sizes": (lambda state: {}, {"out_dim": 32}, "head.last_layer.weight_g 24x1 in the file, 32x1 here"),
    "another width": (lambda state: {}, {"proj_dim": 16}, "head.last_layer.weight_v 24x8 in the file, 24x16 here"),
    "a trained gain": (
        lambda state: {},
        {"norm_last_layer": "false"},
        "this model 56 + 102; look at --norm_last_layer",
    ),
    "no centre": (lambda state: {"dino_loss": {}}, {}, "dino_loss.center"),
    "another objective": (lambda state: {}, {"objective": "cplearn"}, "DINO's under --objective dino"),
    "no epoch": (lambda state: {"epoch": "3"}, {}, "does not fit this run: ValueError its epoch is 3"),
    "after the end": (lambda state: {"epoch": 3}, {}, "its step is 18 of 12"),
}


@pytest.mark.parametrize(("spoil", "changes", "said"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_taken_over_is_one_line(folder, trained, tmp_path, spoil, changes, said, capsys):
    state = as_dinos(trained / "checkpoint0001.pth")
    torch.save(state | spoil(state), tmp_path / "dino.pth")
    if changes.get("objective") == "cplearn":
        changes = changes | {"hidden_dim": None}
    with pytest.raises(SystemExit) as caught:
        main_cplearn.main(words(folder, tmp_path / "b", **(VIT | changes), resume=tmp_path / "dino.pth"))
    assert caught.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ") and said in line


def test_a_file_without_an_entry_is_neither(folder, trained, tmp_path, capsys):
    state = as_dinos(trained / "checkpoint0001.pth")
    del state["optimizer"]
    torch.save(state, tmp_path / "dino.pth")
    with pytest.raises(SystemExit):
        main_cplearn.main(words(folder, tmp_path / "b", **VIT, resume=tmp_path / "dino.pth"))
    assert "neither a checkpoint of this program nor DINO's: it has no optimizer" in capsys.readouterr().err


# ---- flags -----------------------------------------------------------------------------------------------------------


def test_flags_have_dinos_names_and_defaults():
    args = parsed(["--objective", "dino"])
    assert (args.out_dim, args.hidden_dim, args.proj_dim, args.norm_last_layer) == (65536, 2048, 256, True)
    assert (args.momentum_teacher, args.freeze_last_layer, args.use_bn_in_head) == (0.996, 1, False)
    assert (args.teacher_temp, args.warmup_teacher_temp, args.warmup_teacher_temp_epochs) == (0.04, 0.04, 0)
    spelled = ["--norm_last_layer", "false", "--use_bn_in_head", "true", "--warmup_teacher_temp_epochs", "30"]
    args = parsed(["--objective", "dino", *spelled, "--momentum_teacher", "0.9995"])
    assert (args.norm_last_layer, args.use_bn_in_head, args.momentum_teacher) == (False, True, 0.9995)
    assert parsed(["--objective", "dino", "--use_bn_in_head"]).use_bn_in_head is True


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--momentum_teacher", "1.5"], "--momentum_teacher 1.5: expected a number of at least 0 and of at most 1"),
        (["--teacher_temp", "0"], "--teacher_temp 0: expected a number above 0"),
        (["--norm_last_layer", "maybe"], "--norm_last_layer maybe: expected true or false"),
        (["--beta", "1"], "--objective dino has no such flag"),
    ],
)
def test_mistakes_are_one_line(flags, said):
    with pytest.raises(main_cplearn.UserError) as caught:
        parsed(["--objective", "dino", *flags])
    assert said in str(caught.value)


@pytest.mark.parametrize(("epochs", "expected"), [(0, [0.07] * 4), (1, [0.04, 0.07, 0.07]), (3, [0.04, 0.055, 0.07])])
def test_temperature_of_the_teacher(folder, tmp_path, epochs, expected):
    changes = {"warmup_teacher_temp": 0.04, "teacher_temp": 0.07, "warmup_teacher_temp_epochs": epochs}
    objective = main_cplearn.build_run(parsed(words(folder, tmp_path, **changes))).model.objective
    for epoch, temp in enumerate(expected):
        for step in (6 * epoch, 6 * epoch + 5):
            objective.before_step(step, None)
            assert objective.teacher_temp == pytest.approx(temp)


# ---- evaluations -----------------------------------------------------------------------------------------------------


def test_evaluations_take_the_teacher_and_its_head(folder, trained, tmp_path, capsys):
    model = load_pretrained(trained / "checkpoint.pth")
    state = load_checkpoint(trained / "checkpoint.pth")
    assert (model.settings["objective"], model.settings["checkpoint_key"]) == ("dino", "teacher")
    assert all(torch.equal(model.head.state_dict()[n.removeprefix("head.")], t) for n, t in state["teacher"].items()
               if n.startswith("head."))  # fmt: skip
    x = torch.randn(6, 192)
    theirs = their_head(192, 16, 8, 24)
    theirs.load_state_dict(model.head.state_dict())
    assert torch.equal(model.assign_features(x), theirs.last_layer(F.normalize(theirs.mlp(x), dim=1)).argmax(1))
    assert capsys.readouterr().err == ""  # all of the file was taken

    common = ["--checkpoint", trained / "checkpoint.pth", "--data_path", folder, "--split", "train", "--device", "cpu",
              "--num_workers", 0]  # fmt: skip
    common = list(map(str, common))
    eval_cluster.main([*common, "--kmeans", "3", "--match_k", "2"])
    assert "codes" in capsys.readouterr().out
    eval_collapse.main([*common, "--gmm_components", "2"])
    said = capsys.readouterr()
    assert "of 24 codes in use" in said.out and "Lemma 1" not in said.out
    assert "trained by --objective dino: what is measured against CPLearn's dictionary" in said.err


def test_attention_of_a_dino_run_can_be_drawn(folder, trained, tmp_path):
    picture = next(iter(sorted(Path(folder).rglob("*.png"))))
    visualize_attention.main(["--checkpoint", str(trained / "checkpoint.pth"), "--image_path", str(picture), "--device",
                              "cpu", "--output_dir", str(tmp_path)])  # fmt: skip
    assert list(tmp_path.glob("*.png"))
