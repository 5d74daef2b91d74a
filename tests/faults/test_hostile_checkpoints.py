"""Checkpoints that are damaged, lie about their sizes, hold the wrong things or try to run code, through every loader.

    python -m pytest tests/faults/test_hostile_checkpoints.py                # a few of them
    python -m pytest tests/faults/test_hostile_checkpoints.py -m slow        # hundreds for each loader

A loader may read the file and work, or refuse it in one line. It never runs what the file holds, fails in another way,
takes memory that the file's size does not explain, or changes the file.
"""

import argparse
import collections
import importlib
import io
import json
import math
import os
import pickle
import random
import shutil
import socket
import struct
import subprocess
import timeit
import zipfile
from functools import cache, partial, reduce
from operator import methodcaller
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from hostile import (
    MOST_MEMORY_MB,
    RUBBISH,
    assert_no_faults,
    canary_command,
    drawn,
    legacy,
    mutants,
    survey,
    tarred,
    zipped,
)
from PIL import Image

import checkpoint
import eval_linear
import evaluation
import export_backbone
import hubconf
import main_cplearn
import pretrained
from checkpoint import load_checkpoint
from utils import RunFailed, UserError

RUN = [
    "--dataset", "imagefolder", "--img_size", "32", "--arch", "resnet8", "--width", "16", "--out_dim", "64",
    "--batch_size_per_gpu", "4", "--max_steps", "3", "--warmup_epochs", "0", "--precision", "fp32", "--device", "cpu",
    "--num_workers", "0", "--log_every", "1", "--saveckp_freq", "0",
]  # fmt: skip


# ---- the files, as they should be ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """images/, ours.pth, dino.pth, head.pth, timm/model.safetensors and timm/config.json"""
    root = tmp_path_factory.mktemp("hostile")
    write_images(root / "images")
    main_cplearn.train(main_cplearn.get_args_parser().parse_args(run_flags(root, root / "run")))
    state = load_checkpoint(root / "run" / "checkpoint.pth")
    torch.save(state | {"step": 2}, root / "ours.pth")  # one step is left to do
    torch.save(dino_state(state), root / "dino.pth")
    eval_linear.main(head_flags(root, root / "ours.pth", root / "linear"))
    kept = load_checkpoint(root / "linear" / eval_linear.KEPT)
    torch.save(kept | {"epoch": 1}, root / "head.pth")
    write_timm(root / "timm")
    return root


def write_images(folder):
    draws = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 4)):
        for number in range(count):
            path = folder / split / f"class{number % 2}" / f"{number:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draws.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)


def run_flags(root, output_dir, *more):
    return [*RUN, "--data_path", str(root / "images"), "--output_dir", str(output_dir), *map(str, more)]


def head_flags(root, model, output_dir, *more):
    return ["--protocol", "dino", "--epochs", "2", "--batch_size", "4", "--dataset", "imagefolder", "--device", "cpu",
            "--num_workers", "0", "--data_path", str(root / "images"), "--checkpoint", str(model),
            "--output_dir", str(output_dir), *map(str, more)]  # fmt: skip


def dino_state(ours):
    """In DINO's form: argparse.Namespace, its head, its loss's center."""
    backbone = {k: v for k, v in ours["student"].items() if k.startswith("backbone.")}
    draws = torch.Generator().manual_seed(0)
    shapes = {"mlp.0.weight": (24, 16), "mlp.0.bias": (24,), "mlp.2.weight": (8, 24), "mlp.2.bias": (8,),
              "last_layer.weight_g": (32, 1), "last_layer.weight_v": (32, 8)}  # fmt: skip
    weights = backbone | {f"head.{name}": torch.randn(shape, generator=draws) for name, shape in shapes.items()}
    return {
        "student": {f"module.{name}": tensor for name, tensor in weights.items()},
        "teacher": weights,
        "optimizer": ours["optimizer"],
        "epoch": 3,
        "args": argparse.Namespace(arch="resnet8", patch_size=16, out_dim=np.float64(32), lr=5e-4),
        "dino_loss": {"center": torch.zeros(1, 32)},
    }


def write_timm(folder):
    folder.mkdir()
    model = timm.create_model("test_vit", num_classes=0)
    safetensors.torch.save_file(model.state_dict(), folder / "model.safetensors")
    images = {"input_size": [3, 160, 160], "mean": [0.5] * 3, "std": [0.5] * 3}
    (folder / "config.json").write_text(
        json.dumps({"architecture": "test_vit", "pretrained_cfg": images, "dataset": None})
    )


# ---- the tests -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [7, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("loader", ["resume", "resume_flag", "evaluate", "export", "hub", "head", "head_weights"])
def test_no_file_breaks_a_loader(root, loader, most):
    """Mutants of every format that the loader is for, drawn by the loader's name."""
    cases = [
        (str(root), loader, form, number, name)
        for form, loaders in LOADERS_OF.items()
        if loader in loaders
        for number, (name, _) in enumerate(mutants_of(str(root), form))
    ]
    verdicts = survey(attempt, drawn(cases, most, seed=loader))
    count = collections.Counter(verdict.outcome for verdict in verdicts)
    slowest, largest = max(v.seconds for v in verdicts), max(v.memory_mb for v in verdicts)
    print(f"{loader}: {len(verdicts)} files, {dict(count)}; at most {slowest:.1f} s, {largest:.0f} MB")
    assert_no_faults(verdicts)


def test_the_files_as_they_are_load_in_every_loader(root):
    cases = [(str(root), loader, form, -1, "as it is") for form, loaders in LOADERS_OF.items() for loader in loaders]
    assert [f"{v.case[1:3]}: {v.text}" for v in survey(attempt, cases) if v.outcome != "worked"] == []


def test_a_checkpoint_loads_as_it_was_saved_or_not_at_all(root, tmp_path):
    """No flipped bit is trained on; where one is in no tensor and no number, nothing changes."""
    original, path = (root / "ours.pth").read_bytes(), tmp_path / "damaged.pth"
    undamaged, refused = saved(load_checkpoint(root / "ours.pth")), 0
    for place in random.Random(0).sample(range(len(original)), 60):
        path.write_bytes(original[:place] + bytes([original[place] ^ 1]) + original[place + 1 :])
        try:
            assert saved(load_checkpoint(path)) == undamaged, f"byte {place} of {len(original)}"
        except UserError:
            refused += 1
    assert refused > 40


def attempt(case):
    """Write the mutant into a folder of its own and load it there."""
    root, loader, form, number, _ = case
    folder = Path(root) / f"case_{os.getpid()}"
    files = originals(root)[form] if number == -1 else mutants_of(root, form)[number][1]
    files = {name: content() if callable(content) else content for name, content in files.items()}
    canary = canary_of(root)
    refuse_network()
    try:
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        try:
            return LOADERS[loader](Path(root), folder)
        except UserError as error:
            of_file = any(name in str(error) for name in files) or isinstance(error, RunFailed)
            assert of_file, f"names no file: {error}"
            assert {name: (folder / name).read_bytes() for name in files} == files, "the file was changed"
            raise
        finally:
            assert not canary.exists(), "the file's code was run"
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        canary.unlink(missing_ok=True)


def canary_of(root):
    return Path(root) / f"canary_{os.getpid()}"


def refuse_network():
    def refuse(*args, **kwargs):
        raise AssertionError(f"a loader went to the network: {args[:2]}")

    socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse


def resume(root, folder):
    return main_cplearn.train(main_cplearn.get_args_parser().parse_args(run_flags(root, folder)))


def resume_flag(root, folder):
    words = run_flags(root, folder / "new", "--resume", folder / "checkpoint.pth")
    return main_cplearn.train(main_cplearn.get_args_parser().parse_args(words))


def evaluate(root, folder):
    model = pretrained.load_pretrained(model_in(folder))
    return model(images_for(model)).shape, model.assign(images_for(model)), evaluation.fingerprint(model)


def export(root, folder):
    words = ["--checkpoint", str(model_in(folder)), "--output_dir", str(folder / "exported"), "--device", "cpu"]
    export_backbone.main.__wrapped__(words)
    return pretrained.load_pretrained(folder / "exported" / "model.safetensors").settings


def hub(root, folder):
    return hubconf.cplearn_backbone(str(model_in(folder)))(torch.zeros(1, 3, 32, 32)).shape


def head(root, folder):
    eval_linear.main.__wrapped__(head_flags(root, root / "ours.pth", folder))


def head_weights(root, folder):
    weights = ("--linear_weights", folder / eval_linear.KEPT)
    eval_linear.main.__wrapped__(head_flags(root, root / "ours.pth", folder / "new", *weights))


def model_in(folder):
    return next(path for path in (folder / "checkpoint.pth", folder / "model.safetensors") if path.exists())


def images_for(model):
    side = model.settings["img_size"] or 32
    return torch.zeros(2, model.settings["in_chans"] or 3, side, side)


LOADERS = {function.__name__: function for function in (resume, resume_flag, evaluate, export, hub, head, head_weights)}
LOADERS_OF = {
    "ours": ("resume", "resume_flag", "evaluate", "export", "hub"),
    "dino": ("evaluate", "export", "hub"),
    "timm": ("evaluate", "export"),
    "head": ("head", "head_weights"),
}


@cache
def originals(root):
    """{format: {file name: content}}"""
    root = Path(root)
    return {
        "ours": {"checkpoint.pth": (root / "ours.pth").read_bytes()},
        "dino": {"checkpoint.pth": (root / "dino.pth").read_bytes()},
        "timm": {name: (root / "timm" / name).read_bytes() for name in ("model.safetensors", "config.json")},
        "head": {eval_linear.KEPT: (root / "head.pth").read_bytes()},
    }


@cache
def mutants_of(root, form):
    """[(name, {file name: content})]; the same in every process, but for the canary."""
    files = originals(root)[form]
    if form == "timm":
        return list(timm_mutants(files))
    ((file_name, content),) = files.items()
    values = {"ours": VALUES_OF_OURS | VALUES_OF_TEACHER, "dino": VALUES_OF_DINO, "head": VALUES_OF_HEAD}[form]
    state = load_checkpoint(Path(root) / f"{form}.pth")
    found = [
        *mutants(content, 140 if form == "ours" else 28, seed=form, regions=REGIONS),
        *code_mutants(content, canary_of(root)),
        *lying_mutants(content),
        *((name, saved(other)) for name, other in edits(state, values)),
        *((f"rubbish: {rubbish[:20]!r}", rubbish) for rubbish in RUBBISH),
        *(bombs(content) if form == "ours" else ()),
    ]
    return [(name, {file_name: content}) for name, content in found]


def timm_mutants(files):
    weights, config = files["model.safetensors"], files["config.json"]
    for name, content in mutants(weights, 42, seed="weights", regions=((0.0, 0.01), (0.0, 0.0001), (0.0, 1.0))):
        yield name, files | {"model.safetensors": content}
    for length in (0, 2**63, 2**64 - 1, len(weights), 100_000_001):
        yield f"header of {length}", files | {"model.safetensors": struct.pack("<Q", length) + weights[8:]}
    for name, content in mutants(config, 42, seed="config"):
        yield f"config {name}", files | {"config.json": content}
    for name, content in edits(json.loads(config), VALUES_OF_CONFIG):
        yield f"config {name}", files | {"config.json": json.dumps(content).encode()}
    for rubbish in (*RUBBISH, b"[" * 100_000, b"1" * 10_000, b'"\\ud800"', b"NaN", b"[1]"):
        yield f"config {rubbish[:20]!r}", files | {"config.json": rubbish}


# of a file of torch's: all of it, its beginning (data.pkl), its end (the central directory)
REGIONS = ((0.0, 1.0), (0.0, 0.05), (0.9, 1.0))


# ---- what is done to them --------------------------------------------------------------------------------------------


class Call:
    """Pickled, it is a call; called, it is one whose function is the result of another."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call

    def __call__(self):
        """So that pickle takes it for a function."""


def payloads(canary):
    """{name: what runs a command or writes a file when a careless reader unpickles it}"""
    command, evil = canary_command(canary), Path(canary).with_name("evil.py")
    code = f"__import__('os').system({command!r})"
    evil.write_text(code)
    inner = pickle.dumps(Call(os.system, command))
    module = Call(importlib.import_module, "os")
    dtype = Call(np.dtype, "O")
    scalar = importlib.import_module("numpy._core.multiarray").scalar
    return {
        "os.system": Call(os.system, command),
        "subprocess": Call(subprocess.call, ["touch", str(canary)]),
        "Popen": Call(subprocess.Popen, ["touch", str(canary)]),
        "eval": Call(eval, code),
        "exec": Call(exec, code),
        "open": Call(open, str(canary), "w"),
        "getattr chain": Call(Call(getattr, module, "system"), command),
        "methodcaller": Call(methodcaller("system", command), module),
        "partial": Call(partial(os.system, command)),
        "reduce": Call(reduce, getattr, [module, "system"]),
        "map": Call(list, Call(map, os.system, [command])),
        "touch": Call(Path.touch, Path(canary)),
        "timeit": Call(timeit.timeit, code),
        "runpy": Call(importlib.import_module("runpy").run_path, str(evil)),
        "pickle in pickle": Call(pickle.loads, inner),
        "torch.load": Call(torch.load, io.BytesIO(legacy(Call(os.system, command))), None, None),
        "load_from_bytes": Call(torch.storage._load_from_bytes, legacy(Call(os.system, command))),
        "hub": Call(torch.hub.load, str(evil.parent), "evil", "local"),
        "numpy object scalar": Call(scalar, dtype, inner),
        "numpy object of a call": Call(scalar, dtype, Call(os.system, command)),
        "in a rebuilt tensor": Call(torch._tensor._rebuild_from_type_v2, eval, torch.Tensor, (code,), {}),
        "in a rebuilt parameter": Call(torch._utils._rebuild_parameter, Call(eval, code), True, {}),
        "in a tensor's hooks": Call(torch._utils._rebuild_parameter, torch.zeros(1), True, Call(eval, code)),
        "in a Namespace": argparse.Namespace(arch=Call(os.system, command)),
        "in a dict's key": {Call(os.system, command): 1},
        "deep down": [{"a": ({"b": [argparse.Namespace(c=[Call(os.system, command)])]},)}],
    }


# opcodes that pickle.dumps does not write any more; %s is a shell command
RAW_PICKLES = {
    "protocol 0": b"cos\nsystem\n(S'%s'\ntR.",
    "INST": b"(S'%s'\nios\nsystem\n.",
    "OBJ": b"(cos\nsystem\nS'%s'\no.",
    "NEWOBJ": b"\x80\x02cos\nsystem\n(S'%s'\nt\x81.",
    "STACK_GLOBAL": b"\x80\x04\x8c\x02os\x8c\x06system\x93(S'%s'\ntR.",
    "dotted name": b"\x80\x04\x8c\x08argparse\x8c\x0c_sys.modules\x93(S'%s'\ntR.",
    "persistent id": b"\x80\x02(X\x07\x00\x00\x00storagecos\nsystem\nS'%s'\nX\x03\x00\x00\x00cpuK\x01tQ.",
    "builtins.globals": b'c__builtin__\neval\n(S\'__import__("os").system("%s")\'\ntR.',
}
NAMESPACE = b"\x80\x02cargparse\nNamespace\n)\x81"
ODD_PICKLES = {  # not code: deep, self-containing, huge when it is written out, or a state that only C code would set
    "deep list": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
    "deep tuple": b"\x80\x02)" + b"\x85" * 100_000 + b".",
    "deep dict": b"\x80\x02" + b"}K\x01" * 50_000 + b"}" + b"s" * 50_000 + b".",
    "list in itself": b"\x80\x02]q\x00h\x00a.",
    "Namespace in itself": NAMESPACE + b"q\x00}X\x04\x00\x00\x00argsh\x00sb.",
    "laughs": b"\x80\x02]q\x00" + b"".join(
        b"0]q%c(" % n + (b"h%c" % (n - 1)) * 10 + b"e" for n in range(1, 12)) + b".",
    "string of 2 GB": b"\x80\x02X\xff\xff\xff\x7fabc.",
    "bytes of 8 EB": b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7fabc.",
    "far memo": b"\x80\x02]r\xff\xff\xff\x7fj\xff\xff\xff\x7f.",
    "no object": b"\x80\x02.",
    "pops too much": b"\x80\x02000.",
    "unknown opcode": b"\x80\x02\xfe.",
    "protocol 255": b"\x80\xff}.",
    "empty": b"",
    "dtype with a rubbish state": b"\x80\x02cnumpy\ndtype\nX\x02\x00\x00\x00V8K\x00K\x01\x87R(K\x03X\x01\x00\x00\x00|N"
    b"X\x01\x00\x00\x00aX\x01\x00\x00\x00bJ\xff\xff\xff\x7fJ\xff\xff\xff\x7fK?tb.",
    "dtype of 2 GB": b"\x80\x02cnumpy\ndtype\nX\x0b\x00\x00\x00V2000000000K\x00K\x01\x87R.",
}  # fmt: skip


def code_mutants(base, canary):
    """(name, content): files that would run a command."""
    for name, payload in payloads(canary).items():
        with_args = pickle.dumps({"format": checkpoint.FORMAT, "args": payload}, protocol=2)
        yield f"code: {name}", zipped(base, with_args)
        if name in ("os.system", "eval", "in a Namespace"):
            yield f"code, legacy: {name}", legacy(payload)
            yield f"code, legacy magic: {name}", legacy({}, magic=payload)
            yield f"code, legacy system: {name}", legacy({}, system=payload)
            yield f"code, legacy keys: {name}", legacy({}, keys=[payload])
            yield f"code, plain pickle: {name}", pickle.dumps(payload)
            yield f"code, tar: {name}", tarred(payload)
            yield f"code, TorchScript: {name}", zipped(base, b"", **{"version": pickle.dumps(payload)})
    for name, raw in RAW_PICKLES.items():
        content = raw % canary_command(canary).replace("'", "").encode()
        yield f"code: {name}", zipped(base, content)
        yield f"code, legacy: {name}", legacy(0)[:-1] + content


# what a tensor's place in the file says of it: (elements of its storage, offset, size, strides, where it was, type)
TERA = 2**40
LIES = {
    "storage of 4 TB": (TERA, 0, (16,), (1,)),
    "storage of 1 GB": (2**28, 0, (16,), (1,)),
    "storage of 2^64": (2**64, 0, (16,), (1,)),
    "storage of -1": (-1, 0, (16,), (1,)),
    "storage of text": ("16", 0, (16,), (1,)),
    "size of 4 TB": (16, 0, (TERA,), (1,)),
    "size of 4 TB by stride 0": (16, 0, (TERA,), (0,)),
    "size that overflows": (16, 0, (2**32, 2**32), (0, 0)),
    "size of -1": (16, 0, (-1,), (1,)),
    "stride of -1": (16, 0, (16,), (-1,)),
    "stride of 4 TB": (16, 0, (2,), (TERA,)),
    "offset of 4 TB": (16, TERA, (16,), (1,)),
    "offset of -1": (16, -1, (16,), (1,)),
    "more strides than sizes": (16, 0, (16,), (1, 1, 1)),
    "100,000 sizes": (16, 0, (1,) * 100_000, (1,) * 100_000),
    "on cuda:99": (16, 0, (16,), (1,), "cuda:99"),
    "on meta": (16, 0, (16,), (1,), "meta"),
    "on nothing known": (16, 0, (16,), (1,), "x" * 5000),
    "of another type": (16, 0, (16,), (1,), "cpu", torch.DoubleStorage),
    "of quantised type": (16, 0, (16,), (1,), "cpu", torch.QInt8Storage),
    "of no type": (16, 0, (16,), (1,), "cpu", argparse.Namespace),
}


class Storage(tuple):
    """A storage by what the file says of it."""


class LyingPickler(pickle._Pickler):
    def persistent_id(self, thing):
        if not isinstance(thing, Storage):
            return None
        numel, where, kind = thing
        return "storage", kind, "0", where, numel


def lying_mutants(base):
    for name, (numel, offset, size, stride, *rest) in LIES.items():
        where, kind = [*rest, *("cpu", torch.FloatStorage)[len(rest) :]]
        rebuild = torch._utils._rebuild_tensor_v2
        tensor = Call(rebuild, Storage((numel, where, kind)), offset, size, stride, False, collections.OrderedDict())
        written = io.BytesIO()
        LyingPickler(written, 2).dump({"format": checkpoint.FORMAT, "teacher": {"backbone.a.weight": tensor}})
        yield f"lie: {name}", zipped(base, written.getvalue(), **{"data/0": bytes(64)})
    for name, raw in ODD_PICKLES.items():
        yield f"odd: {name}", zipped(base, raw)
        if raw.endswith(b".") and raw[-2:] != b"\x02.":
            yield f"odd args: {name}", zipped(base, b"\x80\x02}X\x04\x00\x00\x00args" + raw[2:-1] + b"s.")


def bombs(base):
    """Small files of compressed zeros: more than the test's bound on memory. Made when they are needed."""
    for name in ("data.pkl", "data/0", "version"):
        yield f"bomb: {name}", partial(inflated, base, name)


def inflated(base, bomb):
    zeros, written = bytes(2**24), io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(base)) as old, zipfile.ZipFile(written, "w", zipfile.ZIP_DEFLATED, True, 1) as new:
        for name in old.namelist():
            with new.open(name, "w") as member:
                member.write(old.read(name))
                for _ in range(MOST_MEMORY_MB // 12 if name.endswith(bomb) else 0):
                    member.write(zeros)
    return written.getvalue()


MISSING = object()
LONG, LINES, ESCAPES = "x" * 1_000_000, "one\ntwo\r\nthree", "\x1b[2J\x07\u202e\udcff"
TEXTS = (LONG, LINES, ESCAPES, "", "\0")
ANYTHING = (MISSING, None, "text", -1, 2.5, [], {}, torch.zeros(2))
NUMBERS = (0, -1, 10**30, math.nan, math.inf, True)
VALUES_OF_OURS = {
    "step": (*ANYTHING, *NUMBERS, 3, 10**9, "2", torch.tensor(2)),
    "format": ("cplearn 1", LINES, None, []),
    "world_size": (*ANYTHING, *NUMBERS),
    "effective_batch": (*ANYTHING, *NUMBERS),
    "fingerprint": (*ANYTHING, *TEXTS),
    "student": ANYTHING,
    "teacher": ANYTHING,
    "student/backbone.block1.conv1.weight": (*ANYTHING, torch.full((16, 3, 3, 3), math.nan), torch.zeros(16, 3, 3)),
    "student/head.scale": (*ANYTHING, torch.full((3,), math.nan), torch.tensor([0.0, 1, 64]), torch.ones(4)),
    "student/head.seed": (*ANYTHING, torch.tensor([7, 0]), torch.tensor([0, -1]), torch.tensor([0.5, math.nan])),
    "student/head.codes": (*ANYTHING, torch.zeros(16, 8), torch.zeros(16, 8, dtype=torch.int64), torch.zeros(0, 8)),
    "student/extra": (torch.zeros(1), None),
    "objective": ANYTHING,
    "objective/usage": (*ANYTHING, torch.full((64,), math.nan), torch.zeros(64, dtype=torch.complex64)),
    "optimizer": ANYTHING,
    "optimizer/state": ANYTHING,
    "optimizer/state/0": (*ANYTHING, {"step": "x"}),
    "optimizer/state/0/step": (*ANYTHING, *NUMBERS, torch.tensor(-5.0), torch.tensor(math.nan)),
    "optimizer/state/0/exp_avg": (
        *ANYTHING, torch.zeros(0), torch.zeros(16, 3, 3), torch.zeros(1).expand(2**20, 2**20),
        torch.zeros(1, dtype=torch.float16).expand(2**14, 2**15), torch.zeros(16, 3, 3, 3).to_sparse(),
        torch.zeros(16, 3, 3, 3, device="meta"), torch.zeros(16, 3, 3, 3, dtype=torch.complex64),
    ),
    "optimizer/param_groups": (*ANYTHING, [{}], [{}, {}]),
    "optimizer/param_groups/0": ANYTHING,
    "optimizer/param_groups/0/params": (*ANYTHING, [0], list(range(10**5))),
    "optimizer/param_groups/0/betas": (*ANYTHING, (math.nan, 2.0), (0.9,)),
    "optimizer/param_groups/0/eps": (*ANYTHING, *NUMBERS),
    "optimizer/param_groups/0/decayed": (MISSING, "text"),
    "optimizer/param_groups/0/amsgrad": (True,),
    "fp16_scaler": ANYTHING,
    "recorder": ANYTHING,
    "recorder/line": ANYTHING,
    "recorder/line/count": (*ANYTHING, *NUMBERS),
    "recorder/epoch/sums": (*ANYTHING, {"loss": "text"}, {"loss": None}, {1: 2.0}, {"loss": math.nan}),
    "recorder/epoch/take": (None,),
    "args": (*ANYTHING, argparse.Namespace(arch="resnet8")),
    "args/batch_size_per_gpu": (*ANYTHING, *NUMBERS),
    "args/arch": (*ANYTHING, *TEXTS, "vit_small", "hf-hub:user/model", "local-dir:/", "vit_gigantic", "resnet50"),
    "args/lr": (*TEXTS, math.nan, 10**5000, [[]] * 10**5),
    "args/img_size": (*ANYTHING, *NUMBERS, 10**6),
    "args/in_chans": (*ANYTHING, *NUMBERS, 10**9),
    "args/patch_size": (*ANYTHING, *NUMBERS),
    "args/mean": (*ANYTHING, *TEXTS, [math.nan] * 3, [1], ["a"] * 3, [[0.5]] * 3),
    "args/dataset": (*ANYTHING, *TEXTS),
    "args/activation": (*ANYTHING, *TEXTS),
    "epoch": (*ANYTHING, *NUMBERS),
}  # fmt: skip
# the head that an evaluation builds is as large as the file says
VALUES_OF_TEACHER = {
    "teacher/head.scale": tuple(torch.tensor([1.0, 1.0, float(k)]) for k in (0, -1, 5e7, 1e12, math.nan, math.inf)),
    "teacher/head.linear.weight": (*ANYTHING, torch.zeros(()), torch.zeros(0, 16), torch.zeros(16, 17)),
    "teacher/head.codes": (MISSING, torch.zeros(0, 8), None),
    "teacher/backbone.block1.conv1.weight": (
        *ANYTHING, torch.zeros(()), torch.zeros(1).expand(2**40, 3, 3, 3), torch.zeros(16, 3, 3, 3, device="meta"),
        torch.zeros(16, 3, 3, 3).to_sparse(), torch.zeros(16, 3, 3, 3, dtype=torch.complex64),
        torch.full((16, 3, 3, 3), math.nan),
    ),
    "teacher/backbone.patch_embed.proj.weight": (torch.zeros(192, 3, 1, 1), torch.zeros(192, 0, 0, 0)),
    "teacher/5": (torch.zeros(1),),
}  # fmt: skip
VALUES_OF_DINO = {
    "epoch": VALUES_OF_OURS["epoch"],
    "args": (*ANYTHING, {"arch": "resnet8"}, argparse.Namespace(arch=LINES), argparse.Namespace(arch=3)),
    "teacher/head.mlp.0.weight": (*ANYTHING, torch.zeros(24, 17), torch.zeros(())),
    "teacher/head.mlp.2.weight": (MISSING, torch.zeros(8, 25), torch.zeros(2**20).expand(8, 2**20)),
    "teacher/head.last_layer.weight_v": (*ANYTHING, torch.zeros(()), torch.zeros(1).expand(2**40, 8)),
    "teacher/head.last_layer.weight_g": (*ANYTHING, torch.zeros(32)),
    f"teacher/{LINES}.weight": (torch.zeros(1),),
    f"teacher/{LONG}.weight": (torch.zeros(1),),
}  # fmt: skip
VALUES_OF_HEAD = {
    "epoch": (*ANYTHING, *NUMBERS, 2, 10**9),
    "state_dict": ANYTHING,
    "state_dict/module.linear.weight": (*ANYTHING, torch.zeros(()), torch.zeros(2, 17), torch.zeros(3, 16)),
    "state_dict/module.linear.bias": (*ANYTHING, torch.zeros(3), torch.zeros(2, device="meta")),
    "optimizer": ANYTHING,
    "optimizer/state/0/momentum_buffer": (*ANYTHING, torch.zeros(7)),
    "optimizer/param_groups/0/lr": (*ANYTHING, *NUMBERS),
    "scheduler": ANYTHING,
    "scheduler/last_epoch": (*ANYTHING, *NUMBERS),
    "scheduler/T_max": (0, None),
    "scheduler/get_lr": (None,),
    "log": (*ANYTHING, [1], [{"test_acc1": "text"}], [{"test_acc1": 5, 5: 6}], [{"a": torch.zeros(1)}]),
    "settings": ANYTHING,
    "settings/lr": TEXTS,
}
VALUES_OF_CONFIG = {
    "architecture": (*ANYTHING[:-1], *TEXTS, "hf-hub:user/model", "local-dir:/", "eva_giant_patch14_224", "resnet8"),
    "pretrained_cfg": ANYTHING[:-1],
    "pretrained_cfg/input_size": (*ANYTHING[:-1], *NUMBERS, [3, -1, -1], [0, 0, 0], [10**9, 8, 8], [3, 10**6, 10**6],
                                  ["a"] * 3, [None] * 3, [3, 1e300, 1e300]),
    "pretrained_cfg/mean": (*ANYTHING[:-1], *TEXTS, [math.nan] * 3, ["a"] * 3),
    "dataset": (*ANYTHING[:-1], *TEXTS),
}  # fmt: skip


def edited(state, path, value):
    """A copy of nested dicts, lists and Namespaces with another value at path, such as optimizer/state/0/step."""
    first, _, rest = path.partition("/")
    if isinstance(state, argparse.Namespace):
        return argparse.Namespace(**edited(vars(state), path, value))
    key = int(first) if isinstance(state, list) or int_key(state, first) else first
    copy = state.copy()
    if rest:
        copy[key] = edited(state[key], rest, value)
    elif value is MISSING:
        del copy[key]
    else:
        copy[key] = value
    return copy


def int_key(state, key):
    return key.isdigit() and key not in state


def edits(state, values):
    """(name, edited state)"""
    for path, alternatives in values.items():
        for number, value in enumerate(alternatives):
            what = "missing" if value is MISSING else type(value).__name__
            yield f"value {number}: {path[:60]!r} {what}", edited(state, path, value)


def saved(state):
    written = io.BytesIO()
    torch.save(state, written)
    return written.getvalue()
