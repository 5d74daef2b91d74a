"""The benchmarks of the loss's forms, the objectives and the step: tables, what cannot run, the parts of a step."""

import json
import math
import re
import sys
from itertools import repeat
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data
import main_cplearn
from benchmarks import gpu_hours, head, objectives
from benchmarks import step as step_benchmark
from experiments import ROOT as EXPERIMENTS
from experiments import read_experiment
from main_cplearn import OBJECTIVES

SMALL = ["--batch_size", "4", "--dim", "24", "--num_codes", "96", "192", "--repeats", "2"]


@pytest.fixture
def run(monkeypatch):
    def run(*flags):
        head.main(head.get_parser().parse_args([*SMALL, *flags]))

    monkeypatch.setattr(head, "memory_in_own_process", lambda name, num_codes: 1.25)
    monkeypatch.setattr(head, "compiled", lambda loss: loss)  # takes minutes
    threads = torch.get_num_threads()
    yield run
    torch.set_num_threads(threads)


def test_every_form_has_a_row_with_small_errors(run, capsys):
    forms = ["authors' form, fp32", "dense, fp32", "dense, fp32, compiled", "tiled, fp32", "hadamard, fp32"]
    run("--forms", "authors", "dense, fp32", "tiled, fp32", "hadamard")
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if "1.2 |" in line]
    assert {row[0].removeprefix("| ") for row in rows} >= set(forms)
    for row in rows:
        assert all(float(e.removesuffix(" |")) < 1e-4 for e in row[-2:]), row
        assert re.fullmatch(r"[1-9]\d{2,}|[1-9]\d\.\d|[1-9]\.\d\d|0\.0*[1-9]\d\d", row[2]), row[2]  # three digits


def test_a_form_that_fails_says_so_and_the_others_go_on(run, capsys, monkeypatch, tmp_path):
    def fail(*args, **kwargs):
        raise RuntimeError("out of registers")

    monkeypatch.setattr(head, "fused_cplearn_loss", fail)
    run("--forms", "dense, fp32", "tiled, fp32", "--plot", str(tmp_path / "head.png"))
    said = capsys.readouterr().out
    assert said.count("tiled, fp32 failed: RuntimeError: out of registers") == 2  # once for each K
    assert len(re.findall(r"\| dense, fp32 \| [\d.]+ \|.*e-0\d \|", said)) == 2
    assert (tmp_path / "head.png").stat().st_size > 1000


def test_what_a_failing_process_said_is_shown():
    with pytest.raises(RuntimeError, match="exit code 3\nno memory left"):
        head.output_of([sys.executable, "-c", "import sys; print('no memory left', file=sys.stderr); sys.exit(3)"])


def test_on_a_gpu_its_time_is_compared_and_drawn():
    assert head.shown_time("cpu") == ("cpu_ms", "CPU time, ms")
    assert head.shown_time("cuda") == ("wall_ms", "time on the GPU, ms")
    assert [head.three_digits(x) for x in (1454.2, 983.4, 9.834, 0.09834, 0)] == ["1454", "983", "9.83", "0.0983", "0"]


# ---- objectives ------------------------------------------------------------------------------------------------------

TINY = ["--batch_size", "4", "--dim", "24", "--repeats", "1"]


@pytest.fixture
def costs(monkeypatch, tmp_path):
    """{K: {form: figures}} and the table's rows, without the processes that measure memory."""

    def costs(capsys, *flags):
        path = tmp_path / "costs.json"
        objectives.main(objectives.get_parser().parse_args([*TINY, *flags, "--output", str(path)]))
        rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
        return json.loads(path.read_text())["results"], rows

    monkeypatch.setattr(objectives, "peaks_mb", lambda args, names, num_codes: dict.fromkeys(names, 1.25))
    threads = torch.get_num_threads()
    yield costs
    torch.set_num_threads(threads)


def step_of(name, num_codes=96):
    return objectives.Step(objectives.get_parser().parse_args(TINY), name, num_codes)


def test_every_objective_is_measured():
    assert {flags.split()[1] for flags in objectives.FORMS.values()} == OBJECTIVES.keys()


def test_costs_have_a_row_for_each_form_and_number_of_codes(costs, capsys):
    forms = [name for name in objectives.FORMS if "8192" not in name]  # takes seconds
    results, rows = costs(capsys, "--num_codes", "96", "192", "--forms", *forms)
    found = {name: [row[1].strip() for row in rows if row[0] == name] for name in forms}
    assert found.pop("visreg") == found.pop("barlow_twins, 2048 wide") == found.pop("lejepa") == [""]
    assert found.pop("vicreg, 2048 wide") == [""]
    assert set(map(tuple, found.values())) == {("96", "192")}
    assert results["96"].keys() == set(forms)  # the middle K, the lower of two
    assert results["192"]["cplearn, tiled"]["ratio"] == 1 and results["192"]["dino"]["ratio"] > 0


def test_a_form_can_have_a_largest_number_of_codes(monkeypatch):
    monkeypatch.setattr(objectives, "MOST_CODES", {"dino": 96})
    args = objectives.get_parser().parse_args(["--num_codes", "96", "192", "--forms", "dino"])
    assert objectives.chosen_forms(args, 96) == ["cplearn, tiled", "dino"]
    assert objectives.chosen_forms(args, 192) == ["cplearn, tiled"]


def test_sizes_are_those_of_the_tensors():
    def megabytes(*shapes):
        return sum(4 * math.prod(shape) for shape in shapes) / 1e6

    found = objectives.sizes_mb(step_of("dino").objective)
    trained = megabytes((24 + 1, 2048), (2048 + 1, 2048), (2048 + 1, 256), (96, 256))
    length, centre, window = megabytes((96, 1)), megabytes((96,)), megabytes((96,), (4096,), (2,))
    assert found["trained_mb"] == pytest.approx(trained)  # length 1 is not trained
    assert found["held_mb"] == found["checkpoint_mb"] == pytest.approx(4 * trained + 2 * length + centre + window)
    found = objectives.sizes_mb(step_of("cplearn, tiled", 4096).objective)
    trained, rest = megabytes((24 + 1, 24), (2, 24)), megabytes((2, 24), (2,), (2 * 4096,), (2,))
    assert found["held_mb"] == pytest.approx(3 * trained + rest + 24 * 4096 / 1e6)  # a byte for each sign
    assert found["checkpoint_mb"] == pytest.approx(3 * trained + rest + 24 * 4096 / 8e6, abs=1e-4)  # a bit


@pytest.mark.parametrize("name", ["swav", "dino", "gedi", "self_classifier, mlp"])
def test_in_a_step_nothing_is_frozen(name):
    step = step_of(name)
    step()
    parameters = [p for p in step.objective.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in parameters) and all(row.grad.any() for row in step.rows)
    step.forget_gradients()
    assert all(t.grad is None for t in (*parameters, *step.rows))


def test_a_step_has_what_follows_an_update():
    step = step_of("dino")
    head, teacher = step.objective.head.last_layer, step.objective.teacher["head"].last_layer
    head.weight_v.data.mul_(2)  # as if by an update
    before = teacher.weight_v.clone()
    step()
    assert not torch.equal(teacher.weight_v, before)


def test_the_peak_of_a_step_is_counted_and_what_was_there_is_not():
    class Step(list):
        def __call__(self):
            torch.ones(10_000_000)

        def forget_gradients(self):
            self.append(torch.ones(15_000_000))

    assert 35 < objectives.peak_of_process(Step()) < 55


# ---- the step and its parts ------------------------------------------------------------------------------------------

TINY_IMAGES = ["--img_size", "32", "--num_workers", "0", "--local_crops_size", "16"]
SMALL_STEP = ["--arch", "vit_tiny", "--img_size", "32", "--batch_size_per_gpu", "4", "--out_dim", "64"]


@pytest.fixture
def started(tmp_path):
    """A run before its first step, and one step's batches."""

    def started(*words):
        args = step_benchmark.get_parser().parse_args(["--", *SMALL_STEP, "--num_workers", "0", *words])
        step_benchmark.fit_to_device(args)
        opened.append(step_benchmark.started(args, [], tmp_path))
        return opened[0], next(opened[0].loader.steps(0))

    opened = []
    yield started
    main_cplearn.close(opened[0])
    dist.destroy_process_group()


def test_the_step_has_a_table_and_each_form_one_of_its_parts(capsys, tmp_path):
    words = ["--device", "cpu", "--repeats", "1", "--forms", "plain", "triton", "--output", str(tmp_path / "step.json")]
    words += ["--", *SMALL_STEP, "--num_workers", "1", "--accum_steps", "2"]
    step_benchmark.main(step_benchmark.get_parser().parse_args(words))
    said = capsys.readouterr().out
    rows = re.findall(r"^\| (.*) \|(?: [\d.]+ \|){6}$", said, re.MULTILINE)
    assert rows == ["vit_tiny, plain"]  # triton: on a GPU
    result = json.loads((tmp_path / "step.json").read_text())["results"]["vit_tiny, plain"]
    table = said[said.index("plain: part") :].splitlines()[2:13]
    assert [line.split(" | ")[0][2:] for line in table] == [*step_benchmark.PARTS, "step", step_benchmark.FLOOR]
    assert 0 < result["floor"]["cpu_ms"] < sum(figures["cpu_ms"] for figures in result["parts"].values())
    assert (result["flags"]["accum_steps"], result["flags"]["out_dim"]) == (2, 64)
    assert result["step_ms"] > 0 and result["images_per_s"] > 0 and result["memory_mb"] > 0
    assert result["parts"]["backward"]["wall_ms"] > result["parts"]["transfer"]["wall_ms"]


def test_sizes_are_flags_and_each_network_has_a_row(capsys, monkeypatch):
    counts = {part: {"launches": 0, "operations": 0} for part in step_benchmark.PARTS}
    monkeypatch.setattr(step_benchmark, "profiled", lambda run, batches: (counts, 0))  # takes seconds
    words = (
        "--device cpu --arch resnet8 vit_tiny --batch_size 2 --local_crops 1 --out_dim 32 --precision fp32 --repeats 1"
    )
    step_benchmark.main(step_benchmark.get_parser().parse_args([*words.split(), "--", *TINY_IMAGES]))
    said = capsys.readouterr().out
    assert re.findall(r"^\| (\w+), plain \|", said, re.MULTILINE) == ["resnet8", "vit_tiny"]


def test_what_is_not_said_follows_the_device(monkeypatch):
    def filled(*words):
        args = step_benchmark.get_parser().parse_args(words)
        step_benchmark.fit_to_device(args)
        return args.device, args.batch_size, args.repeats, args.forms

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert filled() == ("cuda", 256, 30, list(step_benchmark.FORMS))
    assert filled("--device", "cpu") == ("cpu", 8, 5, ["plain"])
    assert filled("--batch_size", "64", "--forms", "tiled") == ("cuda", 64, 30, ["tiled"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert filled()[0] == "cpu"


def test_products_are_those_of_forward_and_backward(started):
    run, batches = started("--device", "cpu", "--precision", "fp32", "--drop_path_rate", "0", "--head_impl", "dense")
    found = step_benchmark.products(run, batches)
    images, tokens, width, codes = 4, 5, 192, 64  # two views of 32 px: 4 patches and the class token
    others = tokens - 1  # of them the last block makes queries, keys and values alone
    weights = (12 * 12 * tokens - 9 * others) * width**2  # multiply-adds of one image
    attention = 2 * (12 * tokens - others) * tokens * width
    patches = 4 * 3 * 16**2 * width  # the pixels have no gradient
    head = width**2
    codes *= width  # frozen: no gradient
    per_image = 3 * (weights + attention + head) + 2 * patches + 2 * codes
    assert found.flop == 2 * images * 2 * per_image


def test_the_floor_calls_the_products_as_the_step_did(started):
    run, batches = started("--device", "cpu", "--accum_steps", "2")
    found = step_benchmark.products(run, batches)
    with step_benchmark.Products(lambda: True) as again:
        times, gflop = step_benchmark.timed_products(run, found, 1)
    assert again.calls == 2 * found.calls  # one untimed round
    assert again.flop == 2 * found.flop == 2e9 * gflop and times["operations"] == len(found.calls) > 200
    assert {sketch.dtype for sketch in tree_leaves(found.calls) if isinstance(sketch, step_benchmark.Sketch)} == {
        torch.bfloat16, torch.float32
    }  # fmt: skip


def test_a_sketch_has_the_memory_of_its_tensor():
    for tensor in (torch.ones(3, 5).T, torch.ones(4, 1).expand(4, 6), torch.ones(0, 3), torch.ones(2, 8)[:, ::2]):
        sketch = step_benchmark.Sketch.of(tensor.to(torch.bfloat16))
        assert step_benchmark.Sketch.of(sketch.tensor()) == sketch


def test_a_part_that_sleeps_is_longer_and_no_other(started, monkeypatch):
    run, _ = started("--accum_steps", "2", "--objective", "dino")
    now, calls = [0.0], dict.fromkeys(step_benchmark.PARTS, 0)
    clock = SimpleNamespace(perf_counter=lambda: now[0], process_time=lambda: now[0] / 4)
    monkeypatch.setattr(step_benchmark, "time", clock)

    def sleep(part):
        calls[part] += 1
        now[0] += 2.0 ** step_benchmark.PARTS.index(part)

    def put_to_sleep(part, owner, name):
        function = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: sleep(part) or function(*args, **kwargs))

    objective = run.model.objective
    put_to_sleep("data wait", run.loader, "note_bad_images")
    put_to_sleep("transfer", step_benchmark, "transferred")
    put_to_sleep("augmentation", data, "make_views")
    put_to_sleep("teacher, samples", objective.teacher["backbone"], "forward")
    put_to_sleep("backbone forward", run.model.backbone, "forward")
    put_to_sleep("head and loss", objective.head, "forward")
    run.model.backbone.norm.weight.register_hook(lambda grad: sleep("backward"))
    put_to_sleep("clip and update", run.optimizer, "step")
    put_to_sleep("rest", run.recorder, "record")
    found = step_benchmark.timed_parts(run, run.loader.steps(0), 1)
    for place, part in enumerate(step_benchmark.PARTS):
        assert found[part] == {"wall_ms": 1e3 * calls[part] * 2**place, "cpu_ms": 250 * calls[part] * 2**place}
    # two micro-batches, one of them augmented and passed through the backbone twice
    assert list(calls.values()) == [2, 3, 3, 2, 3, 1, 2, 1, 1]


class Operations(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.namespace == "aten" and not function.is_view
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("words", [[], ["--accum_steps", "2", "--precision", "fp32"]])
def test_operations_of_the_parts_are_those_of_the_step(started, words):
    run, batches = started(*words)
    main_cplearn.train_one_step(run, batches, 1)  # the first one makes the optimizer's state
    parts, _ = step_benchmark.profiled(run, repeat(batches))
    total = sum(figures["operations"] for figures in parts.values())
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        main_cplearn.train_one_step(run, batches, 1)
    assert total == pytest.approx(sum(map(step_benchmark.is_operation, profiler.events())), abs=0.1)
    with Operations() as dispatched:
        main_cplearn.train_one_step(run, batches, 1)
    assert total == pytest.approx(dispatched.count, rel=0.01)
    assert parts["data wait"]["operations"] == parts["transfer"]["operations"] == 0
    assert all(
        parts[part]["operations"] > 50 for part in ("augmentation", "backbone forward", "head and loss", "backward")
    )


def test_an_operation_is_neither_a_view_nor_made_of_others():
    names = ["aten::linear", "aten::t", "aten::reshape", "aten::to", "addmm", "MulBackward0", "aten::no_such_thing"]
    assert not any(map(step_benchmark.is_kernel, names))
    assert all(
        map(step_benchmark.is_kernel, ["aten::addmm", "aten::_to_copy", "aten::copy_", "aten::sum", "aten::add_"])
    )


def test_gpu_hours_grow_with_steps_seeds_and_processes():
    experiment = read_experiment(EXPERIMENTS / "beta.toml", "smoke")
    (column,), row = experiment.columns(), experiment.rows()[0]
    column["flags"] |= {"width": 8, "img_size": 8, "batch_size_per_gpu": 4}
    once = gpu_hours.hours_of(experiment, row, column, 1)
    assert once["steps"] == 4 and once["seeds"] == 1 and 0 < once["ms"] < 100
    assert once["column"] == "CIFAR-10"
    experiment.at_budget["flags"]["max_steps"] = 3_600_000
    many = gpu_hours.hours_of(experiment, row, column, 1)
    assert many["steps"] == 100 * (50_000 // 4)  # --epochs' default ends it first
    assert many["GPU hours"] == pytest.approx(many["steps"] * many["ms"] / 3.6e6, rel=0.05)
    assert many["least"] < many["GPU hours"] < many["most"]
