"""Every objective, in whole steps of the real loop: processes, micro-batches, kills, 16 bits, and what a run says."""

import functools
import math

import pytest

import main_cplearn
import runs
from checkpoint import load_checkpoint
from joint_steps import assert_near, over_processes, steps_in_float64
from monitor import read_log
from runs import assert_same_checkpoint, launch, write_pictures
from test_accumulation import CROPS, signal_inside_a_micro_batch, words
from utils import UserError

SIZES = {
    "out_dim": 32, "proj_dim": 16, "hidden_dim": 24, "num_directions": 20, "sgld_steps": 3, "replay_size": 32,
    "queue_length": 16, "epoch_queue_starts": 0, "freeze_prototypes_epochs": 0, "warmup_teacher_temp_epochs": 1,
    "teacher_temp": 0.07,
}  # fmt: skip
FORMS = {name: {"objective": name} for name in main_cplearn.OBJECTIVES} | {
    "frozen_codes": {"objective": "self_classifier", "head": "frozen_codes"},
    "neighbours": {"objective": "self_classifier", "more_classes": 40, "nn_queue": 24},  # full after 2 steps of 16
}
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"), 48)


def sized(form, **changes):
    """The form's flags with small sizes; epochs are of 3 steps."""
    flags = main_cplearn.OBJECTIVES[form["objective"]].flags
    sizes = {name: value for name, value in SIZES.items() if name in flags}
    if form.get("head") == "frozen_codes":
        del sizes["hidden_dim"]
    return {"head_impl": None, "out_dim": None} | sizes | form | changes


# GEDI's samples and noise are draws of a process or micro-batch: the next test is its
@pytest.mark.parametrize("form", [pytest.param(form, id=name) for name, form in FORMS.items() if name != "gedi"])
def test_four_micro_batches_are_the_joint_batch(folder, tmp_path, form):
    changes = sized(form, **CROPS)
    expected = steps_in_float64(0, words(folder, tmp_path / "joint", 16, 1, **changes), 4)
    found = steps_in_float64(0, words(folder, tmp_path / "parts", 4, 4, **changes), 4)
    assert_near(found, expected)


@every_form
def test_micro_batches_are_processes(folder, tmp_path, form, run_in_processes):
    changes = sized(form, **CROPS)
    two = run_in_processes(steps_in_float64, words(folder, tmp_path / "two", 4, 2, 2, **changes), 4)
    alone = steps_in_float64(0, words(folder, tmp_path / "one", 4, 4, **changes), 4)
    assert_near(alone, over_processes(two))


@pytest.mark.slow
@every_form
def test_a_killed_run_goes_on_as_if_nothing_had_been(folder, tmp_path, form):
    settings = sized(form, optimizer="adamw", lr=1e-3, max_steps=10, save_every_minutes=0, log_every=1)
    start = functools.partial(launch, where=tmp_path)
    undisturbed = start(words(folder, tmp_path / "undisturbed", 8, 2, **settings))
    assert undisturbed.wait() == [0], undisturbed.output()
    faults = {0: functools.partial(signal_inside_a_micro_batch, 5)}
    stopped = start(words(folder, tmp_path / "stopped", 8, 2, **settings), faults=faults)
    stopped.wait()
    step = load_checkpoint(tmp_path / "stopped" / "checkpoint.pth")["step"]
    assert 5 < step < 10, stopped.output()
    again = start(words(folder, tmp_path / "stopped", 8, 2, **settings))
    assert again.wait() == [0], again.output()
    assert f"resuming at step {step}" in again.output()
    assert_same_checkpoint(*(tmp_path / name / "checkpoint.pth" for name in ("stopped", "undisturbed")))
    lines = [read_log(tmp_path / name / "log.txt") for name in ("stopped", "undisturbed")]
    timed = ("images_per_s", "data_wait", "memory_mb")
    for ours, theirs in zip(*lines, strict=True):
        assert {k: v for k, v in ours.items() if k not in timed} == {k: v for k, v in theirs.items() if k not in timed}


@every_form
@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_every_objective_falls_and_says_what_it_does(folder, tmp_path, form, precision, capsys):
    settings = sized(form, optimizer="adamw", lr=2e-3, clip_grad=3, epochs=8, max_steps=None, precision=precision)
    settings |= CROPS | {"log_every": 3}
    main_cplearn.train(
        main_cplearn.get_args_parser().parse_args(list(map(str, words(folder, tmp_path, 16, 1, **settings))))
    )
    steps = [line for line in read_log(tmp_path / "log.txt") if line["kind"] == "step"]
    assert all(math.isfinite(line["train_loss"]) for line in steps)
    said = capsys.readouterr().out
    assert said.count("\n") > 8 and "loss:" in said
    if form["objective"] not in ("gedi", "dino"):  # these two have no loss that must fall
        assert min(line["train_loss"] for line in steps[4:]) < steps[0]["train_loss"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            "--momentum_teacher 0.99",
            "--momentum_teacher 0.99: --objective cplearn has no such flag; it belongs to dino",
        ),
        ("--objective vicreg --beta 1", "--beta 1.0: --objective vicreg has no such flag; it belongs to cplearn"),
        ("--objective barlow_twins --shard_codes", "--shard_codes True: --objective barlow_twins has no such flag"),
        (
            "--objective lejepa --lambd 0.1",
            "--lambd 0.1: --objective lejepa has no such flag; it belongs to barlow_twins",
        ),
        ("--objective simclr", "--objective"),
    ],
)
def test_flags_of_another_objective_are_refused(flags, said):
    with pytest.raises(UserError) as caught:
        main_cplearn.get_args_parser().parse_args(flags.split())
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"out_dim": 90_000_000, "proj_dim": 1_000_000},
            "--out_dim 90000000 --proj_dim 1000000: a head",
        ),
        (
            {"objective": "dino", "out_dim": 90_000_000, "proj_dim": 10**4},
            "does not fit in memory",
        ),
        ({"objective": "vicreg", "hidden_dim": 9 * 10**18}, "--hidden_dim 9000000000000000000"),
        ({"objective": "vicreg", "hidden_dim": 10**30}, f"--hidden_dim {10**30}: expected a whole number"),
        ({"objective": "gedi", "replay_size": 10**10}, "--replay_size 10000000000: a head of these sizes"),
    ],
)
def test_sizes_beyond_memory_are_one_line(folder, tmp_path, changes, said):
    settings = {"head_impl": None, "out_dim": None} | changes
    with pytest.raises(UserError) as caught:
        steps_in_float64(0, words(folder, tmp_path, 16, 1, **settings))
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_number_that_is_no_size_may_be_large():
    assert main_cplearn.get_args_parser().parse_args(["--lr", "1e30"]).lr == 1e30


def test_help_shows_every_objectives_flags_with_their_defaults(capsys):
    with pytest.raises(SystemExit):
        main_cplearn.get_args_parser().parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name, objective in main_cplearn.OBJECTIVES.items():
        assert f"--objective {name}: reads {', '.join(f'--{flag}' for flag in objective.flags)}" in text
        for flag, default in objective.flags.items():
            assert f"--{flag} " in text, flag
            assert f"{name}: {default}" in text, (name, flag)
    for name in ("out_dim", "beta", "objective"):
        assert (
            getattr(main_cplearn.get_args_parser().parse_args([]), name)
            == ({"objective": "cplearn"} | main_cplearn.OBJECTIVES["cplearn"].flags)[name]
        )


def test_a_run_cannot_go_on_under_another_objective(folder, tmp_path):
    for objective in ("vicreg", "barlow_twins"):
        settings = sized({"objective": objective}, max_steps=2)
        args = main_cplearn.get_args_parser().parse_args(list(map(str, words(folder, tmp_path, 16, 1, **settings))))
        if objective == "vicreg":
            assert main_cplearn.train(args) == 2
        else:
            with pytest.raises(UserError, match="--objective 'vicreg' -> barlow_twins"):
                main_cplearn.train(args)


def test_a_flag_that_came_later_has_its_default_in_older_checkpoints(folder, tmp_path):
    settings = sized({"objective": "self_classifier"}, max_steps=2)
    parse = main_cplearn.get_args_parser().parse_args
    given = list(map(str, words(folder, tmp_path, 16, 1, **settings)))
    main_cplearn.train(parse(given))
    state = load_checkpoint(tmp_path / "checkpoint.pth")
    del state["args"]["nn_queue"]
    runs.torch.save(state, tmp_path / "checkpoint.pth")
    assert main_cplearn.train(parse(given)) == 2
    del state["args"]["out_dim"]  # its default is not what this command gives
    runs.torch.save(state, tmp_path / "checkpoint.pth")
    with pytest.raises(UserError, match="--out_dim 1000 -> 32"):
        main_cplearn.train(parse(given))


def test_older_checkpoints_are_cplearns(folder, tmp_path):
    """They name no objective, no micro-batches and no other system's flags."""
    args = main_cplearn.get_args_parser().parse_args(list(map(str, runs.flags(folder, tmp_path, max_steps=2))))
    main_cplearn.train(args)
    path = tmp_path / "checkpoint.pth"
    state = load_checkpoint(path)
    newer = {name for name in state["args"] if name in ("objective", "accum_steps")}
    newer |= {name for o in main_cplearn.OBJECTIVES.values() for name in o.flags} - set(main_cplearn.CPLearn.flags)
    state["args"] = {name: value for name, value in state["args"].items() if name not in newer}
    del state["batch_size"]
    runs.torch.save(state, path)
    args = main_cplearn.get_args_parser().parse_args(list(map(str, runs.flags(folder, tmp_path, max_steps=2))))
    assert main_cplearn.train(args) == 2
