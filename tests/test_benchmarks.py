"""The benchmark of the loss's forms: its table, and what it does where a form cannot run."""

import re
import sys

import pytest
import torch

from benchmarks import head

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
