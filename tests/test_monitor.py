"""Planted collapses are each named rightly, a healthy matrix is not accused; log lines survive a kill."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from monitor import (
    PANELS,
    NonFiniteLoss,
    Recorder,
    RunLog,
    diagnose,
    drop_lines_after,
    feature_statistics,
    name_curves,
    panels_of,
    plot_log,
    plot_views,
    pyplot,
    rankme,
    read_log,
)

HEALTHY = {
    "entropy_share": 0.8,
    "batch_perplexity": 200.0,
    "images_per_mean": 256,
    "perplexity": 300.0,
    "codes_used": 200,
    "num_codes": 512,
    "images_counted": 50000,
    "within_code": 0.5,
}


def gaussian(rows=512, dim=384, rank=None):
    generator = torch.Generator().manual_seed(0)
    if rank is None:
        return torch.randn(rows, dim, generator=generator)
    return torch.randn(rows, rank, generator=generator) @ torch.randn(rank, dim, generator=generator)


def test_rankme_by_hand():
    """Singular values 3, 1, 1 of a diagonal matrix: exp(-(.6 ln .6 + 2 x .2 ln .2))."""
    matrix = torch.zeros(10, 4)
    matrix[0, 0], matrix[1, 1], matrix[2, 2] = 3, 1, 1
    assert rankme(matrix) == pytest.approx(math.exp(-(0.6 * math.log(0.6) + 0.4 * math.log(0.2))), rel=1e-5)
    assert rankme(torch.eye(7)) == pytest.approx(7, rel=1e-5)
    assert math.isnan(rankme(torch.zeros(4, 3))) and math.isnan(rankme(torch.full((4, 3), math.nan)))


def test_rankme_against_numpy():
    x = gaussian(100, 30)
    values = np.linalg.svd(x.double().numpy(), compute_uv=False)
    p = values / values.sum()
    assert rankme(x) == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-4)


def test_feature_statistics_against_numpy():
    x = gaussian(200, 8) * 2 + 3
    numbers, array = feature_statistics(x), x.double().numpy()
    assert numbers["feature_mean"] == pytest.approx(array.mean(), rel=1e-5)
    assert numbers["feature_std"] == pytest.approx(array.std(axis=0, ddof=1).mean(), rel=1e-5)
    spread = np.sqrt(((array - array.mean(0)) ** 2).sum() / (array**2).sum())
    assert numbers["spread"] == pytest.approx(spread, rel=1e-5)
    assert numbers["rankme_max"] == 8


@pytest.mark.parametrize(
    ("features", "numbers", "kinds"),
    [
        (gaussian(), {}, set()),
        (gaussian() + 3, {}, set()),
        (torch.ones(512, 384) + 1e-4 * gaussian(), {}, {"representation"}),
        (torch.zeros(512, 384), {}, {"representation"}),
        (gaussian(rank=3), {}, {"dimensional"}),
        (gaussian(), {"perplexity": 2.0}, {"cluster"}),
        (gaussian(), {"codes_used": 2}, {"cluster"}),
        (gaussian(), {"codes_used": 2, "images_counted": 2, "images_per_mean": 2, "batch_perplexity": 2.0}, set()),
        (gaussian(), {"entropy_share": 0.999, "perplexity": 512.0}, {"saddle"}),
        (gaussian(), {"batch_perplexity": 60.0}, {"cluster"}),  # below a quarter of 256 images
        (gaussian(), {"batch_perplexity": 65.0}, set()),
        (gaussian(), {"batch_perplexity": 3.3, "num_codes": 64}, {"cluster"}),  # of 64 codes
        (gaussian(), {"within_code": 1e-5}, {"intracluster"}),
        (gaussian(), {"within_code": math.nan}, set()),
    ],
)
def test_planted_collapses_are_named(features, numbers, kinds):
    found = diagnose(feature_statistics(features) | HEALTHY | numbers)
    assert {kind for kind, _ in found} == kinds


def record(recorder, *losses, start=0):
    for step, loss in enumerate(losses, start):
        prior = torch.tensor(loss)
        recorder.record(step, loss=prior + 1, prior=prior, grad_norm=torch.tensor(math.inf))


def test_recorder_averages_and_resumes():
    whole, cut = Recorder(), Recorder()
    record(whole, 1.0, 2.0, 6.0)
    whole.read(may_overflow=("grad_norm",))
    record(cut, 1.0)
    cut.read(may_overflow=("grad_norm",))
    resumed = Recorder()
    resumed.load_state_dict(json.loads(json.dumps(cut.state_dict())))  # plain data
    record(resumed, 2.0, 6.0, start=1)
    resumed.read(may_overflow=("grad_norm",))
    assert resumed.state_dict() == whole.state_dict()
    assert whole.line.take()["prior"] == 3.0 and whole.line.count == 0 and whole.epoch.take()["loss"] == 4.0


def test_first_bad_step_and_term_are_named():
    recorder = Recorder()
    record(recorder, 1.0, math.nan, math.nan, start=40)
    with pytest.raises(NonFiniteLoss, match="step 41: prior is nan"):
        recorder.read(may_overflow=("grad_norm",))
    recorder = Recorder()
    record(recorder, 1.0)
    with pytest.raises(NonFiniteLoss, match="step 0: grad_norm is inf"):
        recorder.read()


def test_log_lines_after_the_checkpoint_go_and_half_lines_too(tmp_path):
    path = tmp_path / "log.txt"
    lines = [{"kind": "step", "step": step} for step in (10, 20, 30)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "st')
    drop_lines_after(path, 20)
    assert read_log(path) == lines[:2]
    drop_lines_after(tmp_path / "none.txt", 5)
    assert not (tmp_path / "none.txt").exists()


def test_log_file_is_strict_json_and_figures_are_drawn(tmp_path, capsys):
    log = RunLog(tmp_path, 0, 100)
    for step in (10, 20):
        log.write({"kind": "step", "step": step, "epoch": 0, "train_loss": 2.0 / step, "train_lr": 1e-3,
                   "train_grad_norm": 1.0, "within_code": math.nan, "images_per_s": 5.0, "rankme": 7.0})  # fmt: skip
    log.write({"kind": "epoch", "step": 20, "epoch": 0, "train_loss": 0.1})
    log.draw(last=True)
    log.close()
    read = [json.loads(text, parse_constant=pytest.fail) for text in (tmp_path / "log.txt").read_text().splitlines()]
    assert read[0]["within_code"] is None and read[2]["kind"] == "epoch"
    assert "step 10/100" in capsys.readouterr().out
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "loss.png").unlink()
    plot_log(tmp_path / "log.txt", tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 10000


def test_a_legend_names_every_curve_and_hides_none():
    figure, axes = pyplot().subplots(1, 4, figsize=(14, 3.5))
    for axis, labels in zip(axes, (["loss"], ["a"], ["log K", "entropy"], list("abcde")), strict=True):
        for label in labels:
            axis.plot([0, 1], [1, 1], label=label)  # to the edges
        name_curves(axis, "loss, log K, entropy", labels)
    figure.draw_without_rendering()
    assert axes[0].get_legend() is None
    for axis, count in zip(axes[1:], (1, 2, 5), strict=True):
        legend, title = axis.get_legend().get_window_extent(), axis.title.get_window_extent()
        assert len(axis.get_legend().get_texts()) == count
        assert axis.bbox.y1 - 1 <= legend.y0 and legend.y1 <= title.y0  # pixels: axes below, title above


def test_a_figure_is_drawn_by_another_process_when_it_is_time_and_its_failure_is_heard(tmp_path, capsys):
    log = RunLog(tmp_path, 0, 100)
    log.write({"kind": "step", "step": 10, "epoch": 0, "train_loss": 2.0, "images_per_s": 5.0})
    log.draw()
    assert log.drawing is None  # the run has only begun
    log.drawn_at = -math.inf
    log.draw()
    assert log.drawing.wait() == 0 and (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "log.txt").unlink()
    (tmp_path / "log.txt").mkdir()
    log.drawn_at = -math.inf
    log.draw()
    log.drawing.wait()
    assert "warning" not in capsys.readouterr().out
    log.drawn_at = -math.inf
    log.draw()
    assert "warning: step 10: loss.png could not be written: RuntimeError: IsADirectoryError" in capsys.readouterr().out
    log.drawn_at = -math.inf
    log.draw()  # the process before has hardly begun
    log.stop_drawing()
    assert "warning" not in capsys.readouterr().out


def test_views_are_drawn_as_they_were_before_normalisation(tmp_path):
    images = torch.rand(3, 3, 8, 8)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    shift, scale = (torch.tensor(x).view(-1, 1, 1) for x in (mean, std))
    plot_views([(images - shift) / scale, torch.zeros(3, 3, 4, 4)], mean, std, tmp_path / "views.png")
    drawn = torch.from_numpy(np.array(Image.open(tmp_path / "views.png"))).permute(2, 0, 1) / 255
    zoom = 16
    first = drawn[:, 2 * zoom : 10 * zoom : zoom, 2 * zoom : 10 * zoom : zoom]
    torch.testing.assert_close(first, images[0], atol=0.5 / 255 + 1e-6, rtol=0)


def test_panels_are_those_that_an_objective_has_numbers_for():
    common = {"kind": "step", "step": 50, "train_loss": 2.0, "train_lr": 0.1, "train_wd": 0.1, "train_grad_norm": 1.0}
    common |= {"rankme": 3.0, "spread": 0.5}
    vicreg = common | {"train_variance": 0.7, "train_covariance": math.nan}
    dino = common | {"train_entropy": 1.0, "codes_used": 5, "perplexity": 4.0}
    cplearn = dino | {"train_invariance": 1.0, "train_prior": 0.5, "num_codes": 8, "information": 0.6, "gap": 1.5}
    gedi = cplearn | {"train_generative": 3.0}  # of which the loss is made too, by weights of its own
    del gedi["gap"]
    terms = "terms of the loss, before they are weighed"
    assert list(panels_of([vicreg]))[:3] == ["loss", terms, "effective rank of the features (RankMe)"]
    assert panels_of([vicreg])[terms][1].keys() == {"variance", "covariance"}
    assert panels_of([dino])[terms][1] == {"entropy": [(50, 1.0)]} and len(panels_of([dino])) == 6
    assert panels_of([cplearn]).keys() == PANELS.keys() == panels_of([]).keys()
    first, second, third, *_ = panels_of([gedi]).items()
    assert first == ("loss", (None, {"loss": [(50, 2.0)]}))
    assert (second[0], second[1][1].keys()) == (terms, {"invariance", "prior", "generative"})
    assert third[0].startswith("information =")
    assert third[1][1].keys() == {"log K", "entropy of p", "information", "prior"}


def test_the_terms_that_a_terminal_shows_add_up_to_the_loss(tmp_path, capsys):
    log = RunLog(tmp_path, 0, 100)
    line = {"kind": "step", "step": 10, "train_loss": 1.5, "train_invariance": 4.0, "train_prior": 0.5, "gap": 1.0}
    log.write(line | {"train_lr": 0.1, "images_per_s": 5.0})
    log.close()
    assert "loss 1.5  beta x invariance 1  prior 0.5  lr 0.1" in capsys.readouterr().out
