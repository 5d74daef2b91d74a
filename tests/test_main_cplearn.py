"""Training as a user runs it: the run resumed equals the run undisturbed, wrong things stop with one line."""

import contextlib
import json
import math
import multiprocessing
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import accumulation
import main_cplearn
import monitor
from backbones import build_backbone
from checkpoint import load_checkpoint
from cplearn_head import CPLearn
from evaluation import probes
from main_cplearn import get_args_parser, train
from monitor import NonFiniteLoss, read_log
from pretrained import load_pretrained
from running.files import lock_folder
from runs import assert_same_checkpoint, logged, write_pictures
from utils import UserError

ROOT = Path(main_cplearn.__file__).parent
NUM_IMAGES, BATCH = 96, 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """96 train and 24 val images of 32 px in 3 classes, each class with a colour of its own."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, count in (("train", NUM_IMAGES), ("val", 24)):
        for i in range(count):
            path = root / split / f"class{i % 3}" / f"{i:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 120, (32, 32, 3))
            pixels[..., i % 3] += 100
            Image.fromarray(pixels.astype(np.uint8)).save(path)
    return root


def flags(folder, output_dir, **changes):
    """A small run: 12 steps an epoch, on a ViT with stochastic depth."""
    values = {
        "dataset": "imagefolder", "data_path": folder, "img_size": 32, "arch": "vit_tiny", "patch_size": 16,
        "drop_path_rate": 0.1, "out_dim": 64, "batch_size_per_gpu": BATCH, "epochs": 2, "warmup_epochs": 1,
        "precision": "fp32", "device": "cpu", "num_workers": 0, "log_every": 5, "saveckp_freq": 0,
        "output_dir": output_dir,
    } | changes  # fmt: skip
    words = []
    for name, value in values.items():
        words += (
            [f"--{name}"] if value is True else [f"--{name}", *map(str, value if isinstance(value, tuple) else [value])]
        )
    return words


def run(*args, **changes):
    return train(get_args_parser().parse_args(flags(*args, **changes)))


def start(words, processes=1, **env):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = (torchrun if processes > 1 else [sys.executable]) + ["main_cplearn.py", *words]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | env,
    )  # fmt: skip


def finish(process, timeout=900):
    output, _ = process.communicate(timeout=timeout)
    return process.returncode, output


# ---- the main path ---------------------------------------------------------------------------------------------------


def test_a_run_learns_and_writes_everything(folder, tmp_path, capsys):
    steps = run(folder, tmp_path, epochs=4, knn_every=2, saveckp_freq=2, local_crops_number=2, local_crops_size=16)
    assert steps == 48
    lines = read_log(tmp_path / "log.txt")
    epochs = [line for line in lines if line["kind"] == "epoch"]
    assert [line["epoch"] for line in epochs] == [0, 1, 2, 3]
    assert {"train_loss", "train_lr", "train_wd", "epoch"} <= epochs[0].keys()  # DINO's names
    assert epochs[-1]["train_loss"] < epochs[0]["train_loss"]
    assert epochs[1]["knn_top1"] > 60 and epochs[3]["knn_top1"] > 60  # three colours; chance is 33
    step = next(line for line in lines if line["kind"] == "step")
    assert step["train_loss"] == pytest.approx(0.25 * step["train_invariance"] + step["train_prior"], rel=1e-5)
    assert step["least_hard_prior"] == pytest.approx(math.log(64 / BATCH))
    assert step["information"] == pytest.approx(math.log(64) - step["train_prior"] - step["train_entropy"], rel=1e-5)
    assert 1 <= step["rankme"] <= 2 * BATCH and 0 <= step["data_wait"] <= 1
    names = {p.name for p in tmp_path.iterdir()}
    assert {"checkpoint.pth", "checkpoint0002.pth", "checkpoint0004.pth", "log.txt", "loss.png"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    said = capsys.readouterr().out
    assert (
        "effective batch 8 = 8 x 1; lr 3.13e-05 = 0.001 x 8 / 256" in said
        and "l2, tau 3.685, beta 0.25" in said
        and "loss: dense, float32" in said
    )


def test_checkpoint_opens_with_plain_torch_load_and_as_dino_does(folder, tmp_path):
    run(folder, tmp_path, max_steps=2)
    state = torch.load(tmp_path / "checkpoint.pth")
    assert state["epoch"] == 0 and state["step"] == 2 and state["args"]["arch"] == "vit_tiny"
    for key in ("student", "teacher"):  # what DINO's load_pretrained_weights does
        weights = {k.replace("module.", "").replace("backbone.", ""): v for k, v in state[key].items()}
        backbone = build_backbone("vit_tiny", 32, 16, 3)
        missing, unexpected = backbone.load_state_dict(weights, strict=False)
        assert missing == [] and all(name.startswith("head.") for name in unexpected)
    size = (tmp_path / "checkpoint.pth").stat().st_size
    parameters = sum(v.numel() for k, v in state["student"].items() if v.is_floating_point())
    assert size < 4 * 3 * parameters * 1.05  # weights and two moments; student and teacher stored once


# ---- nothing is lost -------------------------------------------------------------------------------------------------


SMALL = {"arch": "resnet8", "width": 32, "drop_path_rate": 0.0}


@pytest.mark.parametrize("backbone", [{}, SMALL], ids=["a ViT", "channels last"])
def test_resumed_run_is_the_undisturbed_run_bit_for_bit(folder, tmp_path, monkeypatch, backbone):
    run(folder, tmp_path / "whole", **backbone)

    original = main_cplearn.train_one_step
    save = main_cplearn.save

    def disturbed(current, batch, step):
        if step == 17:
            save(current, step)
            raise KeyboardInterrupt
        return original(current, batch, step)

    monkeypatch.setattr(main_cplearn, "train_one_step", disturbed)
    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path / "cut", **backbone)
    assert load_checkpoint(tmp_path / "cut" / "checkpoint.pth")["step"] == 17
    monkeypatch.undo()
    run(folder, tmp_path / "cut", num_workers=2, **backbone)
    assert_same_checkpoint(tmp_path / "whole" / "checkpoint.pth", tmp_path / "cut" / "checkpoint.pth")
    assert logged(tmp_path / "whole") == logged(tmp_path / "cut")


@pytest.mark.parametrize("where", ["main_cplearn.open_dataset", "main_cplearn.train_one_step"])
def test_an_error_lets_the_folder_go(folder, tmp_path, monkeypatch, where):
    """Though its traceback, here the test's, still holds all that there was."""
    locks = []
    monkeypatch.setattr(main_cplearn, "lock_folder", lambda folder: locks.append(lock_folder(folder)) or locks[-1])
    monkeypatch.setattr(where, lambda *args, **settings: 1 / 0)
    with pytest.raises(ZeroDivisionError) as held:
        run(folder, tmp_path)
    assert held.tb and [lock.closed for lock in locks] == [True]


@pytest.mark.parametrize("ends", ["well", "by an error"])
def test_a_run_s_data_workers_end_with_it(folder, tmp_path, monkeypatch, ends):
    """Whoever holds the run, here this test: with pinned batches PyTorch waits five seconds for each at the end."""
    held = []

    def fails(run, step):
        held.append(run)
        if ends == "by an error":
            raise NonFiniteLoss("nan")
        return original(run, step)

    original = main_cplearn.finish_epoch
    monkeypatch.setattr(main_cplearn, "finish_epoch", fails)
    with contextlib.nullcontext() if ends == "well" else pytest.raises(NonFiniteLoss):
        run(folder, tmp_path, num_workers=2, epochs=2)
    assert held and multiprocessing.active_children() == []


def losses(folder):
    return [line["train_loss"] for line in read_log(folder / "log.txt")]


@pytest.mark.parametrize("dictionary", ["rademacher", "hadamard"])
def test_tiled_run_follows_the_dense_run_and_resumes(folder, tmp_path, dictionary):
    """The same 60 steps; then the tiled run again, cut at the end of its first epoch and resumed."""
    settings = SMALL | {"dictionary": dictionary, "log_every": 1, "lr": 5e-3, "epochs": 5}
    run(folder, tmp_path / "dense", head_impl="dense", **settings)
    run(folder, tmp_path / "tiled", head_impl="tiled", saveckp_freq=1, **settings)
    np.testing.assert_allclose(losses(tmp_path / "tiled"), losses(tmp_path / "dense"), rtol=1e-4)
    first = tmp_path / "tiled" / "checkpoint0001.pth"
    run(folder, tmp_path / "cut", head_impl="tiled", resume=first, **settings)
    assert_same_checkpoint(tmp_path / "tiled" / "checkpoint.pth", tmp_path / "cut" / "checkpoint.pth")


@pytest.mark.parametrize("head_impl", ["dense", "tiled"])
def test_how_codes_are_kept_changes_nothing_and_may_change_on_the_way(folder, tmp_path, head_impl):
    settings = SMALL | {"head_impl": head_impl}
    run(folder, tmp_path / "int8", **settings)
    run(folder, tmp_path / "seed", codes_storage="seed", saveckp_freq=1, **settings)
    run(folder, tmp_path / "bits", codes_storage="bits", resume=tmp_path / "seed" / "checkpoint0001.pth", **settings)
    states = [load_checkpoint(tmp_path / name / "checkpoint.pth")["student"] for name in ("int8", "bits", "seed")]
    assert torch.equal(states[0]["head.codes"], states[1]["head.codes"]) and "head.codes" not in states[2]
    for name in states[2]:
        assert all(torch.equal(state[name], states[2][name]) for state in states), name


@pytest.mark.parametrize("codes", [{"codes_storage": "seed"}, {"dictionary": "hadamard"}], ids=str)
def test_a_run_with_a_bare_head_names_the_codes_of_the_features_themselves(folder, tmp_path, codes, capsys):
    run(
        folder,
        tmp_path,
        **(SMALL | {"max_steps": 3, "bare_head": True, "head_impl": "tiled", "accum_steps": 2} | codes),
    )
    assert "beta 0.25, bare: the activation of the features themselves" in capsys.readouterr().out
    state = load_checkpoint(tmp_path / "checkpoint.pth")
    assert not any(name.startswith(("head.linear", "head.bn")) for name in state["student"])
    model = load_pretrained(tmp_path / "checkpoint.pth")
    images = torch.randn(40, 3, 32, 32) + 3 * torch.randn(40, 3, 1, 1)  # of colours far apart
    features = model(images)
    expected = (F.normalize(features, dim=1) @ model.head.codes.float()).argmax(dim=1)
    assert len(expected.unique()) > 1
    assert torch.equal(model.assign(images), expected)
    assert all(torch.equal(value, state["student"][f"head.{name}"]) for name, value in model.head.state_dict().items())
    with pytest.raises(UserError, match="--bare_head True -> False"):
        run(folder, tmp_path, **(SMALL | {"max_steps": 3, "head_impl": "tiled", "accum_steps": 2} | codes))


@pytest.mark.slow
def test_two_processes_with_sharded_codes_follow_two_without_and_resume(folder, tmp_path):
    settings = {"log_every": 1, "lr": 5e-3, "batch_size_per_gpu": BATCH // 2, "saveckp_freq": 1}
    runs = {"whole": {}, "sharded": {"shard_codes": True}}
    runs["cut"] = runs["sharded"] | {"resume": tmp_path / "sharded" / "checkpoint0001.pth"}
    for name, more in runs.items():
        code, output = finish(start(flags(folder, tmp_path / name, **settings, **more), processes=2))
        assert code == 0, output
    np.testing.assert_allclose(losses(tmp_path / "sharded"), losses(tmp_path / "whole"), rtol=1e-4)
    assert_same_checkpoint(tmp_path / "sharded" / "checkpoint.pth", tmp_path / "cut" / "checkpoint.pth")
    usage = [load_checkpoint(tmp_path / n / "checkpoint.pth")["objective"]["usage"] for n in ("whole", "sharded")]
    torch.testing.assert_close(*usage, rtol=1e-2, atol=1e-4)  # every process's part of it is in the file


def test_no_resume_keeps_the_earlier_run(folder, tmp_path):
    run(folder, tmp_path, max_steps=3)
    first = (tmp_path / "checkpoint.pth").read_bytes()
    run(folder, tmp_path, max_steps=2, **{"no-resume": True})
    assert (tmp_path / "checkpoint.pth.old1").read_bytes() == first
    assert (tmp_path / "log.txt.old1").exists()
    assert load_checkpoint(tmp_path / "checkpoint.pth")["step"] == 2


def test_a_restart_by_the_launcher_goes_on_whatever_no_resume_says(folder, tmp_path, monkeypatch):
    run(folder, tmp_path, epochs=1)
    monkeypatch.setenv("CPLEARN_RESTART_COUNT", "1")
    assert run(folder, tmp_path, epochs=1, **{"no-resume": True}) == 12
    assert not list(tmp_path.glob("*.old*"))


def test_a_copy_that_a_killed_run_could_not_keep_is_made_at_the_next_start(folder, tmp_path):
    run(folder, tmp_path, saveckp_freq=2)
    kept = (tmp_path / "checkpoint0002.pth").read_bytes()
    (tmp_path / "checkpoint0002.pth").unlink()
    run(folder, tmp_path, saveckp_freq=2)
    assert (tmp_path / "checkpoint0002.pth").read_bytes() == kept


def test_resume_from_a_path(folder, tmp_path):
    run(folder, tmp_path / "a", saveckp_freq=1)
    run(folder, tmp_path / "b", resume=tmp_path / "a" / "checkpoint0001.pth")
    assert_same_checkpoint(tmp_path / "a" / "checkpoint.pth", tmp_path / "b" / "checkpoint.pth")
    before = (tmp_path / "b" / "checkpoint.pth").stat().st_mtime_ns
    assert run(folder, tmp_path / "b", resume=tmp_path / "a" / "checkpoint0001.pth") == 24  # goes on from its own end
    assert (tmp_path / "b" / "checkpoint.pth").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="no such file"):
        run(folder, tmp_path / "c", resume=tmp_path / "nothing.pth")


@pytest.mark.parametrize(
    ("change", "said"), [({"beta": 0.5}, "--beta 0.25 -> 0.5"), ({"batch_size_per_gpu": 4}, "effective batch 8 -> 4")]
)
def test_changed_flags_are_named(folder, tmp_path, change, said):
    run(folder, tmp_path, max_steps=2)
    before = (tmp_path / "checkpoint.pth").read_bytes()
    with pytest.raises(UserError, match=said):
        run(folder, tmp_path, max_steps=2, **change)
    assert (tmp_path / "checkpoint.pth").read_bytes() == before
    if "beta" in change:
        assert run(folder, tmp_path, max_steps=2, allow_changed_flags=True, **change) == 2


def test_weights_that_do_not_fit_are_one_line(folder, tmp_path):
    run(folder, tmp_path, max_steps=2)
    with pytest.raises(UserError, match="does not fit this run") as caught:
        run(folder, tmp_path, max_steps=2, out_dim=65, allow_changed_flags=True)
    assert "\n" not in str(caught.value)


def test_changed_data_is_named(folder, tmp_path):
    run(folder, tmp_path, max_steps=2)
    other = folder.parent / "others"
    if not other.exists():
        for i in range(16):
            (other / "train").mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32), (i, 0, 0)).save(other / "train" / f"{i}.png")
    with pytest.raises(UserError, match="data set's content"):
        run(other, tmp_path, max_steps=2)


def test_temperature_outlives_another_batch_size(folder, tmp_path):
    """tanh's tau depends on the batch it was built for; the same effective batch on more processes keeps it."""
    run(folder, tmp_path, max_steps=2, activation="tanh")
    state = load_checkpoint(tmp_path / "checkpoint.pth")
    changes = {"batch_size_per_gpu": 4, "allow_changed_flags": True}
    built = main_cplearn.build_run(
        get_args_parser().parse_args(flags(folder, tmp_path, max_steps=2, activation="tanh", **changes))
    )
    assert built.model.objective.head.tau != state["student"]["head.scale"][0]
    main_cplearn.resume(built)
    assert built.model.objective.head.tau == state["student"]["head.scale"][0]


def test_nan_stops_before_it_is_saved(folder, tmp_path, monkeypatch):
    run(folder, tmp_path, epochs=1)
    good = (tmp_path / "checkpoint.pth").read_bytes()
    (tmp_path / "checkpoint.pth").rename(tmp_path / "kept.pth")
    forward = CPLearn.forward
    weights = {}

    def poisoned(self, *rows):
        loss, terms = forward(self, *rows)
        poisoned.calls += 1
        if poisoned.calls == 8:
            weights["then"] = {k: v.clone() for k, v in self.state_dict().items() if "linear" in k}
            terms = terms | {"invariance": terms["invariance"] * math.nan}
            loss = terms["invariance"] + terms["prior"]
        if poisoned.calls == 9:
            weights["next"] = {k: v.clone() for k, v in self.state_dict().items() if "linear" in k}
        return loss, terms

    poisoned.calls = 0
    monkeypatch.setattr(CPLearn, "forward", poisoned)
    with pytest.raises(NonFiniteLoss, match="step 7: invariance is nan") as caught:
        run(folder, tmp_path, epochs=1)
    assert caught.value.exit_code == 1
    assert all(torch.equal(weights["then"][k], weights["next"][k]) for k in weights["then"])  # the step was not taken
    assert not (tmp_path / "checkpoint.pth").exists()
    assert (tmp_path / "kept.pth").read_bytes() == good


class CountWaits(TorchDispatchMode):
    """Counts the operations that make the host wait for a device: .item(), .tolist(), results sized by data."""

    WAITS = ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.equal", "aten._unique2")

    def __init__(self):
        super().__init__()
        self.waits = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if str(func).startswith(self.WAITS):
            self.waits.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("augmentation", ["dino", "small"])
def test_a_step_never_waits_for_the_device(folder, tmp_path, augmentation, monkeypatch):
    changes = {"augmentation": augmentation, "local_crops_number": 2, "local_crops_size": 16}
    built = main_cplearn.build_run(get_args_parser().parse_args(flags(folder, tmp_path, **changes)))
    built.log, built.watch = main_cplearn.RunLog(tmp_path, 0, 10), main_cplearn.Watch(())
    batches = built.loader.steps(0)
    main_cplearn.train_one_step(built, next(batches), 0)  # the first one draws a figure
    with CountWaits() as counter:
        features = main_cplearn.train_one_step(built, next(batches), 1)
    assert counter.waits == []
    reads, tolist = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: reads.append(self.shape) or tolist(self))
    with CountWaits() as counter:
        main_cplearn.log_step(built, 2, features, main_cplearn.Clock())
    assert counter.waits == [] and len(reads) == 2  # the recorder's numbers, and all others together
    with CountWaits() as counter:
        float(torch.ones(()))
    assert len(counter.waits) == 1  # the counter counts


@pytest.mark.slow
def test_full_disk_leaves_the_old_checkpoint_whole(folder, tmp_path):
    """RLIMIT_FSIZE stands in for a full disk: the file cannot grow beyond 1 MB."""
    run(folder, tmp_path, max_steps=20, epochs=1)
    good = (tmp_path / "checkpoint.pth").read_bytes()
    script = (
        "import resource, signal, main_cplearn;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6));"
        "main_cplearn.main()"
    )
    words = flags(folder, tmp_path, epochs=3, allow_changed_flags=True, save_every_minutes=0)
    result = subprocess.run(
        [sys.executable, "-c", script, *words], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 1, result.stderr
    assert "going on, the earlier checkpoint is whole" in result.stdout  # after the second epoch
    assert "could not be written" in result.stderr and "Traceback" not in result.stderr  # at the end it is an error
    assert (tmp_path / "checkpoint.pth").read_bytes() == good
    assert not list(tmp_path.glob(".*.tmp"))


def test_bad_images_are_counted_and_too_many_end_the_run(folder, tmp_path, capsys):
    import shutil

    copy = tmp_path / "images"
    shutil.copytree(folder, copy)
    broken = copy / "train" / "class0" / "000.png"
    broken.write_bytes(broken.read_bytes()[:300])
    run(copy, tmp_path / "some", max_bad_images=0.02)
    said = capsys.readouterr().out
    assert said.count("class0/000.png") == 1  # named once, in two epochs
    assert [line["bad_images"] for line in read_log(tmp_path / "some" / "log.txt") if line["kind"] == "step"][-1] == 1
    with pytest.raises(UserError, match="max_bad_images"):
        run(copy, tmp_path / "none", max_bad_images=0)


# ---- wrong things stop with one line ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"out_dim": 100_000_000}, "--out_dim 100000000: expected a whole number of at least 2 and below 1e+08"),
        ({"out_dim": 0}, "--out_dim 0"),
        ({"dictionary": "hadamard", "proj_dim": 100}, "nearest orders are 96 and 112"),
        ({"dictionary": "hadamard", "codes_storage": "seed"}, "storage is 'seed'"),
        ({"bare_head": True, "proj_dim": 96}, "proj_dim 96: a bare head has the backbone's width, 192"),
        ({"bare_head": True, "objective": "swav"}, "--bare_head True: --objective swav has no such flag"),
        ({"head_impl": "triton"}, "needs a GPU"),
        ({"shard_codes": True, "prior_scope": "local"}, "--prior_scope local: with --shard_codes"),
        ({"shard_codes": True, "head_impl": "dense"}, "--head_impl dense: --shard_codes needs"),
        ({"lr": -1}, "--lr -1"),
        ({"lr": math.nan}, "--lr nan"),
        ({"batch_size_per_gpu": 97}, "96 images do not fill one batch of 97"),
        ({"patch_size": 5}, "--img_size 32 is not a multiple of --patch_size 5"),
        ({"arch": "vit_smal"}, "vit_small"),
        ({"local_crops_number": 2, "local_crops_size": 15}, "--local_crops_size 15: --arch vit_tiny cannot take"),
        ({"data_path": "/no/such/folder"}, "/no/such/folder"),
        ({"precision": "fp16"}, "fp16"),
        ({"activation": "relu"}, "invalid choice: 'relu'"),
        ({"output_dir": "/proc/nothing"}, "--output_dir /proc/nothing"),
    ],
)
def test_mistakes_are_one_line(folder, tmp_path, changes, said):
    with pytest.raises(UserError) as caught:
        run(folder, **({"output_dir": tmp_path} | changes))
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("flag", ["--use_fp16", "--batch_size=8"])
def test_dino_only_flags_say_why(flag):
    with pytest.raises(UserError, match="no meaning"):
        get_args_parser().parse_args([flag, "1"])


def test_command_line_exit_codes(tmp_path):
    code, output = finish(start(["--out_dim", "many", "--output_dir", str(tmp_path)]))
    assert code == 2 and output.startswith("error: --out_dim many: expected a whole number") and output.count("\n") == 1
    code, output = finish(start(["--help"]))
    assert code == 0 and "if code usage falls, lower it" in output


@pytest.mark.slow
def test_two_processes_train_on_real_size(tmp_path):
    """The issue's own command, for two steps, with and without local crops."""
    for local in (0, 2):
        words = (
            "--dataset fashion_mnist --arch vit_small --patch_size 7 --img_size 28 --out_dim 131072 --device cpu "
            f"--batch_size_per_gpu 16 --max_steps 2 --log_every 1 --local_crops_number {local}"
        ).split()
        code, output = finish(start([*words, "--output_dir", str(tmp_path / str(local))], processes=2), timeout=600)
        assert code == 0, output
        lines = [json.loads(line) for line in (tmp_path / str(local) / "log.txt").read_text().splitlines()]
        assert lines[-1]["step"] == 2 and math.isfinite(lines[-1]["train_loss"])


@pytest.mark.slow
def test_a_million_codes_train_on_a_cpu(tmp_path):
    words = shlex.split(
        "--dataset fashion_mnist --arch resnet8 --width 64 --out_dim 1048576 --device cpu --log_every 1 --max_steps 4 "
        "--batch_size_per_gpu 64 --codes_storage bits --num_workers 0"
    )
    code, output = finish(start([*words, "--output_dir", str(tmp_path)]), timeout=600)
    assert code == 0, output
    assert "loss: tiled" in output and "8.00 MiB in memory (bits)" in output
    losses = [line["train_loss"] for line in read_log(tmp_path / "log.txt") if line["kind"] == "step"]
    assert len(losses) == 4 and all(map(math.isfinite, losses)) and losses[-1] < losses[0]


# ---- what a run says of itself ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "kinds"),
    [
        ({"beta": 0.25}, []),
        ({"beta": 4}, ["cluster collapse"]),
        ({"beta": 0.25, "lr": 1e-9, "proj_dim": 8192}, ["the saddle of uniform p"]),  # so wide, p begins uniform
    ],
)
def test_runs_that_learn_collapse_and_rest_are_told_apart(tmp_path_factory, tmp_path, capsys, changes, kinds):
    pictures = tmp_path_factory.getbasetemp() / "pictures"
    if not pictures.exists():
        write_pictures(pictures, 192)
    values = {"arch": "resnet8", "width": 16, "drop_path_rate": 0, "batch_size_per_gpu": 64, "lr": 1e-2, "epochs": 8}
    run(pictures, tmp_path, **values | {"log_every": 3} | changes)
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert len(warnings) == len(kinds) and all(kind in w for kind, w in zip(kinds, warnings, strict=True)), warnings


def test_the_window_of_codes_knows_no_epochs(folder, tmp_path):
    run(folder, tmp_path, epochs=3, log_every=4)
    lines = [line for line in read_log(tmp_path / "log.txt") if line["kind"] == "step"]
    counted = [line["images_counted"] for line in lines]
    assert counted == [32, 64, 96, 128, 160, 192, 224, 256, 288]  # through two borders
    used = [line["codes_used"] for line in lines]
    assert used == sorted(used)  # nothing has left the window yet


def test_an_evaluation_never_costs_a_checkpoint(folder, tmp_path, monkeypatch, capsys):
    run(folder, tmp_path / "whole", knn_every=1)

    def broken(run, step):
        raise ValueError("no neighbours today")

    monkeypatch.setitem(probes.PROBES, "knn", broken)
    run(folder, tmp_path / "broken", knn_every=1)
    assert "k-NN failed: ValueError: no neighbours today; going on" in capsys.readouterr().out
    assert_same_checkpoint(tmp_path / "whole" / "checkpoint.pth", tmp_path / "broken" / "checkpoint.pth")

    def killed(run, step):
        if step:
            raise KeyboardInterrupt
        return probes.knn(run, step)

    monkeypatch.setitem(probes.PROBES, "knn", killed)
    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path / "cut", knn_every=1)
    assert load_checkpoint(tmp_path / "cut" / "checkpoint.pth")["step"] == 12
    monkeypatch.undo()
    run(folder, tmp_path / "cut", knn_every=1)  # begins with the evaluation that was cut off
    assert_same_checkpoint(tmp_path / "whole" / "checkpoint.pth", tmp_path / "cut" / "checkpoint.pth")
    assert logged(tmp_path / "whole") == logged(tmp_path / "cut")


@pytest.mark.parametrize(
    "error", [ValueError("no such backend"), OSError(28, "No space left on device"), KeyError("x")]
)
def test_a_figure_that_fails_is_a_warning(folder, tmp_path, monkeypatch, capsys, error):
    def broken(*args, **kwargs):
        raise error

    monkeypatch.setattr(monitor, "pyplot", broken)
    monkeypatch.setattr(accumulation, "plot_views", broken)
    run(folder, tmp_path, max_steps=2)
    said = capsys.readouterr().out
    assert said.count("warning: step") == 2 and "loss.png" in said and "views.png" in said
    assert load_checkpoint(tmp_path / "checkpoint.pth")["step"] == 2


def test_a_notebooks_backend_is_no_fault(folder, tmp_path):
    words = flags(folder, tmp_path, max_steps=2)
    code, output = finish(start(words, MPLBACKEND="module://matplotlib_inline.backend_that_is_not_installed"))
    assert code == 0 and "warning" not in output and (tmp_path / "loss.png").exists(), output


def test_speed_counts_the_steps_since_the_start_and_not_those_of_the_checkpoint(folder, tmp_path, monkeypatch):
    """Ten steps are in the line that the restored averages end; five of them were made in this start."""
    built = main_cplearn.build_run(get_args_parser().parse_args(flags(folder, tmp_path)))
    built.log, built.watch = main_cplearn.RunLog(tmp_path, 0, 100), main_cplearn.Watch(())
    clock = main_cplearn.Clock()
    for step, batches in enumerate(clock.waiting(built.loader.steps(0))):
        features = main_cplearn.train_one_step(built, batches, step)
        if step == 4:
            clock = main_cplearn.Clock()
            clock.steps = 0
        if step == 9:
            break
    clock.steps = 5
    monkeypatch.setattr(clock, "elapsed", lambda: 2.0)
    main_cplearn.log_step(built, 10, features, clock)
    (line,) = read_log(tmp_path / "log.txt")
    assert line["images_per_s"] == 5 * BATCH / 2.0


def test_auto_may_choose_another_form_on_other_processes(folder, tmp_path):
    """1 process: 2^20 logits, tiled; the checkpoint is then another number of processes' whose choice is dense."""
    run(folder, tmp_path, max_steps=3, head_impl="tiled", epochs=1)
    state = load_checkpoint(tmp_path / "checkpoint.pth")
    state["step"], state["args"]["head_impl"] = 2, "auto"
    torch.save(state, tmp_path / "checkpoint.pth")
    assert run(folder, tmp_path, max_steps=3, head_impl="dense", epochs=1) == 3


def test_a_checkpoint_of_another_version_is_said(folder, tmp_path, capsys):
    run(folder, tmp_path, max_steps=2)
    run(folder, tmp_path, max_steps=2)
    assert "was written by commit" not in capsys.readouterr().out
    state = load_checkpoint(tmp_path / "checkpoint.pth")
    torch.save(state | {"commit": "0123456789ab"}, tmp_path / "checkpoint.pth")
    run(folder, tmp_path, max_steps=2)
    assert "checkpoint.pth was written by commit '0123456789ab', this is" in capsys.readouterr().out
