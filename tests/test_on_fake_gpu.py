"""A step on a GPU, without one: the host waits nowhere between logged lines. Tensors are as in fake_gpu.py."""

import collections
import contextlib

import numpy as np
import pytest
import torch

import augmentation
import main_cplearn
from fake_gpu import CUDA, AsIfOnGPU, Waits, fake_gpu
from runs import flags, write_pictures
from test_accumulation import CROPS, VIT, words
from test_baselines import FORMS, sized


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"), 48)


# ---- the counter sees what it should ---------------------------------------------------------------------------------

ON_GPU = {"device": "cuda"}
WAITING = {
    "item": lambda x: x[0, 0].item(),
    "float": lambda x: float(x.sum()),
    "if": lambda x: 1 if x[0, 0] > 0 else 0,
    "tolist": lambda x: x[0, 0].tolist(),
    "cpu": lambda x: x.cpu(),
    "to the host": lambda x: x.to("cpu"),
    "numpy": lambda x: x.detach().cpu().numpy(),
    "copied to the host": lambda x: torch.empty(2, 3).copy_(x),
    "a mask": lambda x: x[x > 0],
    "a mask of rows": lambda x: x[torch.ones(2, dtype=torch.bool, **ON_GPU)],
    "a mask assigned to": lambda x: x.__setitem__(x > 0, x[0]),
    "masked_select": lambda x: x.masked_select(x > 0),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "unique": lambda x: x.unique(),
    "bincount": lambda x: x[0].long().bincount(),
    "repeats": lambda x: x[0].repeat_interleave(x[0].long()),
    "equal": lambda x: torch.equal(x, x),
    "eigenvalues": lambda x: torch.linalg.eigvalsh(x @ x.T),
    "indices of the host": lambda x: x[torch.tensor([1, 0])],
    "from a list": lambda x: x + torch.tensor([1.0, 2.0, 3.0], **ON_GPU),
    "from an array": lambda x: x + torch.from_numpy(np.ones(3, np.float32)).to(x.device),
    "from pageable memory": lambda x: x + torch.ones(3).to(x.device, non_blocking=True),
    "from pinned memory, blocking": lambda x: x + torch.ones(3).pin_memory().to(x.device),
}
NOT_WAITING = {
    "pinned": lambda x: x + torch.ones(3).pin_memory().to(x.device, non_blocking=True),
    "sent": lambda x: x + augmentation.send(np.ones(3, np.float32), x.device),
    "a number": lambda x: (x + 3).clamp(0, 1) * x.new_full((), 7),
    "chosen": lambda x: torch.where(x > 0, x, 0.0)[torch.arange(2, **ON_GPU), :2],
    "to the host, not waited for": lambda x: x.to("cpu", non_blocking=True),
    "on the host": lambda x: torch.ones(3)[torch.tensor([True, False, True])].sum().item(),
}


@pytest.mark.parametrize("kind", [*WAITING, *NOT_WAITING])
def test_the_counter_sees_every_kind_of_wait_and_says_where(kind):
    with AsIfOnGPU(), Waits() as waits, contextlib.suppress(NotImplementedError, RuntimeError, TypeError):
        x = torch.empty(2, 3, **ON_GPU)
        assert x.device == CUDA and x.is_cuda
        (WAITING | NOT_WAITING)[kind](x)
    assert bool(waits.found) == (kind in WAITING), waits.found
    assert all("at tests/test_on_fake_gpu.py:" in text or "at augmentation.py" in text for text in waits.found)


# ---- a whole step ----------------------------------------------------------------------------------------------------


def waits_of_a_step(words, processes):
    with fake_gpu(words, processes) as (run, batches), Waits() as waits:
        features = main_cplearn.train_one_step(run, batches, 1)
        run.model.objective.statistics(features, collections.defaultdict(lambda: 1.0))
    assert waits.operations > 500
    return waits.found


CPLEARN = {
    "dense": {"head_impl": "dense"},
    "tiled": {"head_impl": "tiled"},
    "tiled, bf16": {"head_impl": "tiled", "precision": "bf16"},
    "sharded": {"head_impl": "tiled", "shard_codes": True, "out_dim": 128},
    "local prior": {"head_impl": "dense", "prior_scope": "local"},
    "drop path": VIT | {"head_impl": "dense", "drop_path_rate": 0.3},
    "small": {"head_impl": "dense", "augmentation": "small"},
}


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("form", CPLEARN.values(), ids=CPLEARN)
def test_a_step_never_waits_for_the_gpu(folder, tmp_path, form, processes):
    """DDP itself is left out."""
    settings = CROPS | {"optimizer": "adamw" if processes == 2 else "sgd"} | form
    assert waits_of_a_step(words(folder, tmp_path, 8 // processes, 2, processes, **settings), processes) == []


@pytest.mark.parametrize("form", [pytest.param(form, id=name) for name, form in FORMS.items() if name != "cplearn"])
def test_a_step_of_any_objective_never_waits_for_the_gpu(folder, tmp_path, form):
    settings = sized(form, **CROPS)
    assert waits_of_a_step(words(folder, tmp_path, 4, 2, 2, **settings), 2) == []


def test_lars_waits_once_a_step_as_its_line_says(folder, tmp_path):
    """Whether the gradient is finite: timm's LARS has no switch for it."""
    (found,) = waits_of_a_step(words(folder, tmp_path, 16, 1, optimizer="lars"), 1)
    assert found.startswith("_local_scalar_dense at main_cplearn.py:")


@pytest.mark.parametrize(
    ("changes", "before"),
    [({}, 1725), ({"drop_path_rate": 0}, 1615), (CROPS, 2758)],
    ids=["drop path", "no drop path", "local crops"],
)
def test_a_step_takes_no_more_operations_than_it_did(folder, tmp_path, monkeypatch, changes, before):
    """Counted at commit 32031cd, without the making of views; each is a launch or more."""
    settings = {"arch": "vit_tiny", "width": None, "patch_size": 8, "head_impl": "dense", "accum_steps": 1}
    with fake_gpu(flags(folder, tmp_path, **settings | changes)) as (run, batches):
        views = run.loader.augment(batches[0], run.device)
        monkeypatch.setattr(run.loader, "augment", lambda batch, device: views)
        with Waits() as step:
            main_cplearn.train_one_step(run, batches, 1)
    assert 0.5 * before < step.operations < 1.1 * before


def test_what_a_size_of_views_needs_goes_to_the_gpu_in_few_copies(folder, tmp_path, monkeypatch):
    """Which images an operation changes and by how much, in two for all operations; and mean and std."""
    sent, send = [], augmentation.send
    monkeypatch.setattr(augmentation, "send", lambda array, device: sent.append(array.dtype) or send(array, device))
    with fake_gpu(flags(folder, tmp_path, **CROPS)) as (run, batches):
        run.loader.augment(batches[0], run.device)
    assert sent == 2 * [np.float32, np.int64, np.float32, np.float32]
