"""Which parameters decay, how the rate goes, and what each optimizer does with a gradient."""

import math

import numpy as np
import pytest
import torch

import main_cplearn
from main_cplearn import get_args_parser
from monitor import read_log
from runs import flags, write_pictures
from utils import cosine_schedule


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"))


def test_decay_spares_biases_norms_and_positions(folder, tmp_path):
    built = main_cplearn.build_run(get_args_parser().parse_args(flags(folder, tmp_path, arch="vit_tiny", width=None)))
    plain = next(g for g in built.optimizer.param_groups if not g["decayed"])
    for name in ("backbone.cls_token", "backbone.pos_embed", "backbone.norm.weight", "objective.head.linear.bias"):
        assert name in plain["names"]
    assert "objective.head.linear.weight" not in plain["names"] and plain["weight_decay"] == 0


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lars"])
def test_every_optimizer_reduces_the_loss(folder, tmp_path, optimizer):
    lr = {"adamw": 5e-3, "sgd": 3.0, "lars": 30.0}[optimizer]
    main_cplearn.train(get_args_parser().parse_args(flags(folder, tmp_path, optimizer=optimizer, lr=lr)))
    losses = [line["train_loss"] for line in read_log(tmp_path / "log.txt") if line["kind"] == "epoch"]
    assert losses[-1] < losses[0] - 0.01


def test_schedule_is_dinos():
    """DINO's cosine_scheduler, as its arrays: linspace warm-up, then half a cosine over the remaining steps."""
    warmup, total, base, final = 20, 100, 5e-4, 1e-6
    rest = np.arange(total - warmup)
    cosine = final + 0.5 * (base - final) * (1 + np.cos(np.pi * rest / len(rest)))
    expected = np.concatenate([np.linspace(0, base, warmup), cosine])
    np.testing.assert_allclose(
        [cosine_schedule(s, total, base, final, warmup) for s in range(total)], expected, rtol=1e-12
    )


@pytest.mark.parametrize("clip_grad", [0.0, 0.01])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lars"])
def test_two_steps_of_each_optimizer_by_hand(folder, tmp_path, optimizer, clip_grad):
    """In float64, with weight decay on matrices alone; the gradient is the loss's of the first layer's weights."""
    values = {"optimizer": optimizer, "clip_grad": clip_grad}
    built = main_cplearn.build_run(get_args_parser().parse_args(flags(folder, tmp_path, **values)))
    model, lr, decay = built.model, 0.03, 0.2
    for group in built.optimizer.param_groups:
        group["lr"], group["weight_decay"] = lr, decay * group["decayed"]
    by_hand = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    moments = {name: [torch.zeros_like(p), torch.zeros_like(p)] for name, p in by_hand.items()}
    torch.manual_seed(0)
    for step in (1, 2):
        grads = {name: torch.randn_like(p) for name, p in model.named_parameters()}
        for name, p in model.named_parameters():
            p.grad = grads[name].clone()
        norm = torch.cat([g.double().flatten() for g in grads.values()]).norm()
        assert main_cplearn.update_weights(built, 1).item() == pytest.approx(norm.item(), rel=1e-5)
        scale = min(1.0, clip_grad / (norm.item() + 1e-6)) if clip_grad else 1.0
        for name, p in by_hand.items():
            g, (m, v) = grads[name].double() * scale, moments[name]
            wd = decay if p.ndim > 1 else 0.0
            if optimizer == "adamw":  # Loshchilov and Hutter 2019, Algorithm 2
                p *= 1 - lr * wd
                m.lerp_(g, 0.1)
                v.lerp_(g * g, 0.001)
                p -= lr * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
            elif optimizer == "sgd":
                m.mul_(0.9).add_(g + wd * p)
                p -= lr * m
            else:  # You et al. 2017; timm leaves parameters without decay unscaled
                trust = 0.001 * p.norm() / (g.norm() + wd * p.norm() + 1e-8) if wd else 1.0
                m.mul_(0.9).add_((g + wd * p) * trust)
                p -= lr * m
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.double(), by_hand[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lars"])
def test_an_infinite_gradient_of_a_finite_loss_changes_nothing(folder, tmp_path, optimizer, first):
    built, undisturbed = (
        main_cplearn.build_run(get_args_parser().parse_args(flags(folder, tmp_path / name, optimizer=optimizer)))
        for name in ("a", "b")
    )
    for current, finite in (
        (built, (False, True) if first else (True, False, True)),
        (undisturbed, (True,) * (2 - first)),
    ):
        for group in current.optimizer.param_groups:
            group["lr"] = 0.1
        for is_finite in finite:
            for p in current.model.parameters():
                p.grad = torch.full_like(p, 1.0 if is_finite else math.inf)
            main_cplearn.update_weights(current, 0)
    for (name, p), q in zip(built.model.named_parameters(), undisturbed.model.parameters(), strict=True):
        assert torch.equal(p, q), name
