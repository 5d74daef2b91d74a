"""The recipes' arithmetic against hand counts, published figures and what really happens; the page against its code."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode

import main_cplearn
from accumulation import FirstHalf
from backbones import build_backbone
from benchmarks import recipes
from benchmarks import step as step_benchmark
from benchmarks.recipes import A100, REACHED, Counter, Step, fused_attention, least_seconds
from checkpoint import load_checkpoint
from cplearn_head import CPLearn, CPLearnHead
from optimizer import default_lr
from utils import UserError

PAGE = Path(main_cplearn.__file__).parent / "docs" / "recipes.md"
TOKENS, PATCH = 197, 3 * 16 * 16  # of an image of 224 px: 14 x 14 patches and the class token; values in a patch


@pytest.fixture(scope="module")
def step():
    return Step("vit_tiny", 1024)


def forward_by_hand(dim, depth=12, only_cls=True):
    """Multiply-adds of a ViT's products with weights, and of attention's two products. only_cls: of the last block's
    tokens but the first, queries, keys and values are made, and no more."""
    others = only_cls * (TOKENS - 1)
    weights = (TOKENS * depth * (3 + 1 + 4 + 4) - others * (1 + 4 + 4)) * dim**2
    return weights, 2 * (TOKENS * depth - others) * TOKENS * dim


@pytest.mark.parametrize(("arch", "published"), [("vit_tiny", 1.3e9), ("vit_small", 4.6e9), ("vit_base", 17.6e9)])
def test_forward_multiply_adds_are_those_published(arch, published):
    """Table 6 of arXiv 2012.12877 (DeiT) and timm's tables, in multiply-adds: 2 FLOP each."""
    operations = count_backbone(arch, batch=1, train=False)
    dim = build_backbone(arch).embed_dim
    counted = operations[:, :2].sum() / 2
    assert counted == sum(forward_by_hand(dim, only_cls=False)) + (TOKENS - 1) * PATCH * dim
    assert counted == pytest.approx(published, rel=0.04)


def count_backbone(arch, batch, train=True):
    """Of a ViT whose last block works for all tokens, as in what was published: it has the patches' mean to make."""
    with torch.device("meta"):
        backbone = build_backbone(arch)
    backbone.global_pool = "avg"
    with FakeTensorMode(allow_non_fake_inputs=True):
        backbone, images = backbone.to_empty(device="cpu"), torch.empty(batch, 3, 224, 224)
        optimizer = torch.optim.SGD(backbone.parameters(), lr=0.1, momentum=0.9)
        with Counter() as counter:
            with torch.autocast("cpu", torch.bfloat16):
                features = backbone(images)
            if train:
                features.float().sum().backward()
                optimizer.step()
    return np.array(counter.operations)


def test_training_flops_by_hand(step):
    """Products with weights three times but for the pixels' gradient; fused attention computes 2 products, then 5."""
    dim, codes, views = 192, 1024, 2
    weights, attention = forward_by_hand(dim)
    backbone = 3 * weights + 2 * (TOKENS - 1) * PATCH * dim + attention * (2 + 5) / 2
    loss = views * 2 * dim * codes  # the codes are frozen
    per_image = 2 * (views * (backbone + 3 * dim**2) + loss)
    assert step.counted(2)[0][:, :2].sum() == pytest.approx(2 * per_image, rel=1e-6)
    assert recipes.loss_flops(dim, codes, views) == 2 * loss


def test_products_of_the_backbone_are_bf16_those_of_the_head_float32(step):
    tensor, single, _ = step.counted(2)[0].sum(axis=0) / 2
    assert single == pytest.approx(2 * 2 * 3 * 192**2 + recipes.loss_flops(192, 1024, 2), rel=1e-6)
    assert tensor > 100 * single


def test_activations_are_those_really_saved_at_another_batch(step):
    saved = [bytes_saved(batch) for batch in (2, 4)]
    per_image = (saved[1] - saved[0]) / 2
    waiting = 2 * 3 * 224**2 * 4 + recipes.count_augmentation(0)[1]  # the next views, and what making them needs
    # beside what is saved: views, and what the peak needs for a moment
    assert per_image < step.slope - waiting < 1.2 * per_image


def bytes_saved(batch):
    """What autograd keeps of a real forward pass, weights left out."""
    backbone = build_backbone("vit_tiny", drop_path_rate=None)
    objective = CPLearn(CPLearnHead(192, 1024))
    model, first_half = main_cplearn.Model(backbone, objective), FirstHalf(backbone, objective, "bf16")
    ours = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ours:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with fused_attention(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss, _ = objective(first_half([torch.randn(batch, 3, 224, 224) for _ in range(2)]))
    assert loss.requires_grad  # all that was packed is alive until here
    return sum(kept.values())


@pytest.mark.slow
def test_other_batches_lie_on_the_line(step):
    first = recipes.SIZES[0]
    assert step.memory(24) == pytest.approx(step.memory(first) + 1.1 * (24 - first) * step.slope, rel=0.002)


def test_largest_batch_fits_and_the_next_does_not(step):
    batch = step.largest_batch(4e9)
    assert step.memory(batch, 8) < 4e9 < step.memory(batch + 8, 8)


def test_checkpointing_saves_memory_and_costs_a_forward_pass(step):
    checkpointed = Step("vit_tiny", 1024, recomputes=True)
    assert checkpointed.counted(32)[1] < 0.5 * step.counted(32)[1]
    weights, attention = forward_by_hand(192)
    weights -= 4 * TOKENS * 192**2  # the first block drops no path, and nothing needs its last product again
    more = checkpointed.counted(32)[0][:, :2].sum() - step.counted(32)[0][:, :2].sum()
    assert more == pytest.approx(32 * 2 * 2 * (weights + attention), rel=1e-6)


def test_micro_batches_cost_a_forward_pass_and_save_the_graphs_of_all_but_one(step):
    flops = {parts: step.counted(32, parts)[0][:, :2].sum() for parts in (1, 2)}
    again = 2 * 2 * 32 * (sum(forward_by_hand(192)) + (TOKENS - 1) * PATCH * 192)
    assert flops[2] == pytest.approx(2 * flops[1] + again, rel=1e-6)
    one, two, three = (step.counted(32, parts)[1] for parts in (1, 2, 3))
    assert one < two <= three < 1.1 * one < 0.5 * step.counted(96)[1]


def test_tensors_are_alive_until_they_are_freed():
    with Counter() as counter:
        kept = torch.ones(1000)
        kept + 1
        view = kept[10:]
        del kept
        assert (counter.alive, counter.peak) == (4000, 8000)
        del view
    assert (counter.alive, counter.peak) == (0, 8000)


def test_on_a_gpu_the_same_is_alive_after_the_forward_pass(monkeypatch):
    """The whole step is counted with a CPU's fake tensors, as autograd's threads of a GPU need a GPU; autocast and
    attention are a GPU's here."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args: True)
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    alive = {"cpu": alive_after_forward("cpu")}
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda q, k, v: flash(q, k, v)[0])
    alive["cuda"] = alive_after_forward("cuda")
    assert alive["cuda"] == pytest.approx(alive["cpu"], rel=0.001) and alive["cuda"] > 100e6


def alive_after_forward(device):
    with torch.device("meta"):
        backbone = build_backbone("vit_tiny", drop_path_rate=None)
    with fused_attention(), FakeTensorMode(allow_non_fake_inputs=True), torch.device(device):
        backbone = backbone.to_empty(device=device)
        first_half = FirstHalf(backbone, CPLearn(CPLearnHead(192, 1024)), "bf16")
        with Counter() as counter:
            rows = first_half([torch.empty(8, 3, size, size) for size in (224, 224, 96, 96)])
        assert all(row.requires_grad for row in rows)  # their graph is alive
        return counter.alive


# FLOP/s of half-precision products with float32 sums, and bytes/s, from NVIDIA's GA102 whitepaper; images/s and batch
# from timm's results/benchmark-train-amp-nhwc-pt112-cu113-rtx3090.csv
RTX_3090 = recipes.Gpu(71e12, 35.6e12, 936e9)
PUBLISHED = {"vit_tiny": (2299.56, 512), "vit_small": (1057.92, 384), "vit_base": (392.99, 192)}


@pytest.mark.parametrize(("arch", "reached"), [("vit_tiny", 0.58), ("vit_small", 0.72), ("vit_base", 0.81)])
def test_published_speeds_reach_the_share_of_the_bound_that_is_said(arch, reached):
    images_per_s, batch = PUBLISHED[arch]
    bound = batch / least_seconds(count_backbone(arch, batch), RTX_3090)
    assert images_per_s / bound == pytest.approx(reached, abs=0.03)
    assert min(REACHED) < images_per_s / bound < 1


def test_an_operation_is_bound_by_arithmetic_by_memory_or_by_its_launch():
    operations = np.array([[312e12, 0, 1], [0, 19.5e12, 1], [1, 0, 1555e9], [0, 0, 1]])
    assert [least_seconds(row[None], A100) for row in operations] == pytest.approx([1, 1, 1, recipes.LAUNCH])


def test_gradients_are_all_reduced_in_float32(step):
    moved = 2 * 7 / 8 * (4 * step.parameters + 4 * 4 * step.num_codes)  # pbar of two views and its gradient
    assert step.all_reduce(64, 8) == pytest.approx(moved / 200e9)
    assert step.all_reduce(64, 1) == 0
    assert step.all_reduce(64, 16) > step.all_reduce(64, 8)


def test_a_slow_loader_is_the_limit(step, monkeypatch):
    monkeypatch.setattr(recipes, "CORES", 1)
    args = recipes.get_parser().parse_args(["--epochs", "10000"])
    row = recipes.plan(args, "vit_tiny", 1024, 5120, 512, 8)
    assert (row["limit"], row["images/s"]) == ("loader", 8 * 300)
    assert row["hours"] == round(10000 * 5120 / 2400 / 3600, 1)
    assert row["lr at peak"] == 1e-3


@pytest.mark.parametrize(
    ("card", "flags", "found"),
    [
        (80, [], (False, 64, 1)),
        (80, ["--grad_checkpointing"], (True, 64, 1)),
        (40, [], (False, 32, 2)),  # costs a sixth more
        (20, [], (False, 16, 4)),  # a quarter more
        (6, [], (True, 64, 1)),  # 16 micro-batches would cost 4.10 s, recomputing costs 4.01
        (3, [], (False, 2, 32)),
        (1.5, [], (True, 16, 4)),
    ],
)
def test_the_quickest_that_fits_is_chosen(monkeypatch, card, flags, found):
    """An image takes a GB, recomputed 0.09; a forward pass 1 s for all images, a micro-batch 0.01 s more."""
    monkeypatch.setattr(
        Step, "memory", lambda step, batch, num_gpus, parts: 1e9 * batch * (0.09 if step.recomputes else 1)
    )
    seconds = lambda step, batch, num_gpus, parts: 3 + step.recomputes + (parts - 1) / parts + 0.01 * parts  # noqa: E731
    monkeypatch.setattr(Step, "seconds", seconds)
    args = recipes.get_parser().parse_args(["--card", str(card), *flags])
    step, *sizes = recipes.arrange(args, "vit_tiny", 1024, 64, 1)
    assert (step.recomputes, *sizes) == found


def test_where_auto_would_take_tiles_a_line_says_that_dense_is_computed(capsys):
    args = recipes.get_parser().parse_args(["--card", "1e6"])
    for num_codes, said in ((2**22, True), (2**22 - 1, False)):
        recipes.plan(args, "vit_tiny", num_codes, 1000, 64, 1)
        assert ("auto would take tiles" in capsys.readouterr().err) == said


def test_a_model_that_fits_nowhere_is_refused():
    args = recipes.get_parser().parse_args(["--card", "1"])
    with pytest.raises(UserError, match=r"--card 1: not even two images of vit_tiny at once fit on it; see --budget"):
        recipes.arrange(args, "vit_tiny", 1024, 2, 1)


@pytest.mark.slow
def test_the_budget_by_hand(capsys):
    words = ["--budget", "--arch", "vit_tiny", "--out_dim", "1024", "--card", "1.5"]
    recipes.main(recipes.get_parser().parse_args(words))
    where, ways = tables_of(capsys.readouterr().out)
    parameters = (5.52e6 + 192**2) / 1e9
    assert where[0]["weights"] == where[0]["gradients (DDP's buckets)"] == round(4 * parameters, 2)
    assert where[0]["AdamW's moments"] == round(8 * parameters, 2) and where[0]["codes"] == 0
    assert where[0]["of it FSDP2 on 8 GPUs saves"] == pytest.approx(1.1 * 14 * parameters, abs=0.1)
    assert where[0]["needs FSDP2 on 1.5 GB"] == "yes"
    assert [row["flags"] for row in ways] == [
        "none", "--accum_steps 4", "--grad_checkpointing", "--grad_checkpointing --accum_steps 4"
    ]  # fmt: skip
    assert ways[0]["GB"] > ways[1]["GB"] > ways[3]["GB"] and ways[0]["time"] == 1 < ways[2]["time"] < 1.4


def test_checkpoint_has_the_size_that_is_said(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(2):
        Image.new("RGB", (32, 32), (i, 0, 0)).save(tmp_path / "images" / f"{i}.png")
    words = f"""--dataset imagefolder --data_path {tmp_path}/images --img_size 32 --arch vit_tiny --out_dim 4096
        --batch_size_per_gpu 2 --max_steps 1 --num_workers 0 --device cpu --precision fp32 --saveckp_freq 0
        --output_dir {tmp_path}/run"""
    main_cplearn.train(main_cplearn.get_args_parser().parse_args(words.split()))
    path = tmp_path / "run" / "checkpoint.pth"
    weights = load_checkpoint(path)["student"]
    parameters = sum(w.numel() for name, w in weights.items() if "head." not in name) + 192 * 192 + 3 * 192
    said = recipes.checkpoint_bytes(parameters, 192, 4096)
    assert 0 < path.stat().st_size - said < 0.01 * said  # names, shapes and the flags


# ---- the page --------------------------------------------------------------------------------------------------------


def page_commands():
    text = PAGE.read_text().replace("\\\n", " ")
    return [line.strip() for line in text.splitlines() if line.startswith("    ")]


def script_flags(command):
    """The flags that reach main_cplearn.py, from a command of any launcher."""
    words = shlex.split(command)
    if "run_with_submitit.py" in words:
        from run_with_submitit import get_args_parser

        return get_args_parser().parse_known_args(words[words.index("run_with_submitit.py") + 1 :])
    if "main_cplearn.py" in words:
        return None, words[words.index("main_cplearn.py") + 1 :]
    return None, None


def test_commands_of_the_page_parse_and_fit_its_tables():
    rows = dict(zip(("in100", "in1k"), page_tables()[:2], strict=True))
    seen = 0
    for command in page_commands():
        launch, flags = script_flags(command)
        if flags is None:
            program, *words = command.split("#")[0].split("python -m benchmarks.")[1].split()
            {"recipes": recipes, "step": step_benchmark}[program].get_parser().parse_args(words)
            continue
        args = main_cplearn.get_args_parser().parse_args(flags)
        per_node = re.search(r"nproc_per_node=(\d+)", command)
        num_gpus = launch.nodes * launch.ngpus if launch else int(per_node[1]) if per_node else 1
        row = next(row for row in rows[Path(args.output_dir).name] if row["GPUs"] == num_gpus)
        assert args.batch_size_per_gpu == row["batch per GPU"]
        args.lr = args.lr or default_lr(224)
        assert args.lr * args.batch_size_per_gpu * args.accum_steps * num_gpus / 256 == row["lr at peak"]
        assert args.epochs == row["epochs"] and args.out_dim == row["K"]
        assert args.grad_checkpointing == (row["recomputed"] == "yes") and args.accum_steps == row["accum_steps"]
        seen += 1
    assert seen == 6


def page_tables():
    return tables_of(PAGE.read_text())


def tables_of(text):
    """Tables of a page: lists of {column: number or word}."""
    tables = []
    for block in re.findall(r"(?:^\|.*\n)+", text, re.M):
        header, _, *rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in block.splitlines()]
        tables.append([dict(zip(header, map(number, row), strict=True)) for row in rows])
    return tables


def number(cell):
    try:
        return float(cell.replace(",", ""))
    except ValueError:
        return cell


@pytest.mark.slow
def test_tables_of_the_page_are_what_the_command_prints(tmp_path):
    recipes.main(recipes.get_parser().parse_args(["--json", str(tmp_path / "all.json")]))
    written = json.loads((tmp_path / "all.json").read_text())
    for name, tables in (("runs", page_tables()[:2]), ("models", page_tables()[2:3])):
        rows = [row for table in tables for row in table]
        assert len(rows) == len(written[name])
        for row, computed in zip(rows, written[name], strict=True):
            # torch's versions differ a little in what they save and launch; the page's figures are rounded
            near = {key: pytest.approx(x, rel=0.05, abs=0.11) if isinstance(x, float) else x for key, x in row.items()}
            assert {key: computed[key] for key in near} == near


@pytest.mark.slow
def test_the_budget_of_the_page_is_what_its_command_prints(capsys):
    [command] = [command for command in page_commands() if "--budget" in command]
    recipes.main(recipes.get_parser().parse_args(command.split()[3:]))
    for said, printed in zip(page_tables()[3:5], tables_of(capsys.readouterr().out), strict=True):
        for row, computed in zip(said, printed, strict=True):
            near = {key: pytest.approx(x, rel=0.05, abs=0.11) if isinstance(x, float) else x for key, x in row.items()}
            assert computed == near


def test_what_was_measured_stands_beside_what_is_computed(tmp_path, capsys):
    flags = {"arch": "vit_tiny", "out_dim": 1024, "local_crops_number": 0, "grad_checkpointing": False,
             "batch_size_per_gpu": 4, "accum_steps": 1, "head_impl": "auto"}  # fmt: skip
    row = {
        "flags": flags,
        "memory_mb": 100,
        "gflop": 56,
        "parts": {"rest": {"cpu_ms": 250}, "backward": {"cpu_ms": 750}},
    }
    slower = row | {"parts": {"rest": {"cpu_ms": 2000}}}
    other = row | {"flags": flags | {"head_impl": "triton"}}
    results = {"a": row, "b": slower, "c": other}
    (tmp_path / "a.json").write_text(json.dumps({"device": "cpu", "machine": {}, "results": results}))
    first, second = recipes.compare([tmp_path / "a.json"])
    assert "passed over: c: --head_impl triton" in capsys.readouterr().err
    _, alive, parameters, _ = Step("vit_tiny", 1024, on_gpu=False).counted(4)
    assert first["computed"] == round(1.1 * (alive + 8 * parameters) / 1e6 + 100)
    assert first["off by"] == f"{first['computed'] - 100:+d}%"
    assert (first["time measured"], second["time measured"], second["time by GFLOP"]) == (1, 2, 1)
    assert first["GFLOP computed"] == pytest.approx(56, abs=1)
    assert first["share reached"] == ""  # of a CPU
    record = {"device": "cuda", "machine": {"gpu": "NVIDIA H200"}, "results": {"a": row | {"step_ms": 50.0}}}
    (tmp_path / "b.json").write_text(json.dumps(record))
    (on_gpu,) = recipes.compare([tmp_path / "b.json"])
    card = recipes.Gpu(989e12, 67e12, 4.8e12)  # the data sheet's H200
    step = Step("vit_tiny", 1024)
    bound = least_seconds(step.counted(4)[0], card) + least_seconds(recipes.count_augmentation(0)[0] * 4, card)
    assert on_gpu["bound"] == pytest.approx(1e3 * bound, abs=0.06) and on_gpu["ms"] == 50
    assert on_gpu["share reached"] == pytest.approx(1e3 * bound / 50, abs=0.006)
