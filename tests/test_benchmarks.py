"""The benchmarks of the loss's forms and of the objectives: their tables, and what is done where a form cannot run."""

import json
import math
import re
import sys

import pytest
import torch

from benchmarks import head, objectives
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
