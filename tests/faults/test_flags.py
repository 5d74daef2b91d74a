"""Flags at random: every command line runs, or is refused in one line with exit code 2. Never a traceback.

    python -m pytest tests/faults/test_flags.py                # a hundred command lines
    python -m pytest tests/faults/test_flags.py -m slow        # hundreds more, and pairs of flags

The values are made from the parsers themselves: a flag that is new tomorrow is tried tomorrow.
"""

import argparse
import importlib
import itertools
import os
import random
import resource
import shutil
import signal
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hostile import LONGEST_LINE, status_mb
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import main_cplearn
from utils import Number, UserError
from vision_transformer import vit_tiny

# a step takes a tenth of a second with these; a flag drawn at random replaces its own
SMALL = {
    "dataset": "imagefolder", "data_path": "images", "img_size": "32", "arch": "resnet8", "width": "16",
    "out_dim": "64", "batch_size_per_gpu": "4", "max_steps": "1", "num_workers": "0", "device": "cpu",
    "output_dir": "run", "precision": "fp32", "max_bad_images": "0.5",
}  # fmt: skip
ODD_TEXTS = ("", " ", "x" * 5000, "\u00e9\u4e2d\U0001f600", "\udcff", "a\nb", "\x1b[2J", "--", "nan", "/dev/null", "..")
ODD_NUMBERS = ("0", "-1", "1", "2", "3", "1e300", "-1e300", "1e-300", "nan", "inf", "-inf", "0.5", "1.5", "7", "-0.0",
               "1" + "0" * 30, "-1" + "0" * 30, "9" * 5000, "0x10", "1_0", "", "text", " 5 ", "\u0665")  # fmt: skip
# What a laptop has no memory or time for is left out, by name: it is asked for, not mistyped. Each is tried up to here.
MOST = {
    "img_size": 256, "local_crops_size": 256, "local_crops_number": 8, "out_dim": 4096, "proj_dim": 4096, "width": 64,
    "batch_size_per_gpu": 64, "num_workers": 2, "max_steps": 2, "batch_size": 64, "in_chans": 16, "num_permutations": 5,
}  # fmt: skip
FAR_TOO_MUCH = 10**9  # nobody's memory; has to be refused again. Not of workers and steps: a test of their own
KEPT = ("images", "list.txt", "full", "resnet8.pth", "vit.pth")  # in the folder of the tests, from run to run
NAMES_OF_ARCHS = ("resnet8", "resnet18", "vit_tiny", "test_vit", "test_resnet", "resnet", "hf-hub:a/b", *ODD_TEXTS)
MOST_ADDRESSES_MB = 8000
SECONDS_PER_LINE = 120


# ---- what is drawn ---------------------------------------------------------------------------------------------------


def flags_of(parser):
    """{name of the flag without dashes: its action}, but for --help."""
    return {action.option_strings[0].lstrip("-"): action for action in parser._actions if action.dest != "help"}


def words_for(name, action):
    """A strategy for the command line's words of one flag: good, borderline and absurd values."""
    if isinstance(action, argparse.BooleanOptionalAction) or action.nargs == 0:
        return st.sampled_from([(option,) for option in action.option_strings] + [(action.option_strings[0] + "=x",)])
    values = st.sampled_from(values_for(name, action))
    counts = {None: (1, 1), "?": (0, 1), "+": (0, 3), "*": (0, 3)}.get(action.nargs, (action.nargs, action.nargs))
    several = st.lists(values, min_size=counts[0], max_size=counts[1])
    return several.map(lambda words: joined(action.option_strings[0], words))


def joined(option, words):
    return (f"{option}={words[0]}",) if len(words) == 1 else (option, *words)  # "=" lets a value begin with a dash


def values_for(name, action):
    if action.choices is not None:
        return [*map(str, action.choices), "", "text"]
    if action.dest == "arch":
        return list(NAMES_OF_ARCHS)
    if action.type in (int, float) or isinstance(action.type, Number):
        most = MOST.get(action.dest)
        return [text for text in (*ODD_NUMBERS, str(most or 5)) if affordable(text, most)]
    return [*ODD_TEXTS, "images", "images/train", "list.txt", "run", "no/such/place", "full"]


def affordable(text, most):
    try:
        value = int(text)
    except ValueError:
        return True
    return most is None or value <= most or (value >= FAR_TOO_MUCH and most > 2)


def command_lines(parser, most_flags=6):
    """Lists of words in which up to so many flags have values at random; each flag once."""
    flags = flags_of(parser)
    names = st.lists(st.sampled_from(sorted(flags)), max_size=most_flags, unique=True)
    return names.flatmap(lambda chosen: st.tuples(*(words_for(name, flags[name]) for name in chosen))).map(
        lambda parts: tuple(itertools.chain.from_iterable(parts))
    )


def with_small(words):
    """The words, and the small defaults before them: the last of a flag's values counts."""
    return [f"--{name}={value}" for name, value in SMALL.items() if not needless(name, words)] + list(words)


def needless(name, words):
    """resnet8's width, where another backbone is asked for."""
    return name == "width" and any(word.startswith("--arch") for word in words)


# ---- what must come of it --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The current folder: images/, list.txt, a file called full; and the address space is bounded."""
    place, here = tmp_path_factory.mktemp("flags"), os.getcwd()
    draws = np.random.default_rng(0)
    for split, number in itertools.product(("train", "val"), range(8)):
        path = place / "images" / split / f"class{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draws.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    (place / "list.txt").write_text("".join(f"images/train/class{n % 2}/{n}.png\n" for n in range(8)))
    (place / "full").write_text("")
    limits = resource.getrlimit(resource.RLIMIT_AS)
    most = int((status_mb("VmSize") + MOST_ADDRESSES_MB) * 2**20)
    resource.setrlimit(resource.RLIMIT_AS, (most, limits[1]))
    os.chdir(place)
    yield place
    os.chdir(here)
    resource.setrlimit(resource.RLIMIT_AS, limits)


def check(main, words, capsys):
    """main(words) returns, or ends with 2 (or 1, for a loss that is not finite) and one line on stderr."""
    warnings.simplefilter("ignore")
    capsys.readouterr()
    code = 0
    signal.signal(signal.SIGALRM, lambda number, frame: pytest.fail(f"took {SECONDS_PER_LINE} s: {words}"))
    signal.alarm(SECONDS_PER_LINE)
    try:
        main(words)
    except SystemExit as ended:
        code = ended.code
    finally:
        signal.alarm(0)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    shown = f"exit code {code}, {said}, for {' '.join(map(repr, words))[-800:]}"
    assert code in (0, 1, 2), shown
    assert len(said) == (code != 0), shown
    assert code != 1 or any(word in said[0] for word in ("is nan", "is inf", "is -inf")), shown
    assert all(len(line) <= LONGEST_LINE and line.isprintable() for line in said), shown
    return code


def pretrain(words, capsys):
    try:
        check(main_cplearn.main, with_small(words), capsys)
    finally:
        clean_up()


# ---- pretraining -----------------------------------------------------------------------------------------------------

PRETRAINING = main_cplearn.get_args_parser()
FLAGS = flags_of(PRETRAINING)
QUICK = settings(
    max_examples=15, derandomize=True, deadline=None, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
SLOW = settings(QUICK, max_examples=120)


def test_the_small_run_itself_runs(place, capsys):
    assert check(main_cplearn.main, with_small([]), capsys) == 0
    assert Path("run/checkpoint.pth").exists()
    clean_up()


@pytest.mark.parametrize("name", sorted(FLAGS))
def test_each_flag(place, capsys, name):
    """One value of each, drawn from its own."""
    values = values_of(name)
    for words in random.Random(name).sample(values, 1):
        pretrain(words, capsys)


def test_a_billion_workers_are_refused_before_they_are_started(place):
    with pytest.raises(UserError, match="num_workers"):
        PRETRAINING.parse_args(with_small([f"--num_workers={FAR_TOO_MUCH}"]))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(FLAGS))
def test_values_of_each_flag(place, capsys, name):
    values = values_of(name)
    for words in random.Random(f"more {name}").sample(values, min(6, len(values))):
        pretrain(words, capsys)


def values_of(name):
    """Command lines that give one flag each of its values, as often as it takes them; and none, and one too many."""
    action = FLAGS[name]
    option = action.option_strings[0]
    if isinstance(action, argparse.BooleanOptionalAction) or action.nargs == 0:
        return [(option,), (f"{option}=x",), (option, "x"), *((other,) for other in action.option_strings[1:])]
    count = action.nargs if isinstance(action.nargs, int) else 1
    values = values_for(name, action)
    counts = {count, 3 if action.nargs in ("+", "*") else count}
    repeated = [joined(option, [value] * n) for value in values for n in counts]
    return [(option,), (option, *[values[0]] * (count + 1)), *repeated]


def test_flags_together(place, capsys):
    property_of(QUICK, command_lines(PRETRAINING), lambda words: pretrain(words, capsys))


@pytest.mark.slow
def test_many_flags_together(place, capsys):
    property_of(SLOW, command_lines(PRETRAINING), lambda words: pretrain(words, capsys))


@pytest.mark.slow
def test_pairs_of_flags(place, capsys):
    """A value each for a twentieth of all pairs."""
    draws = random.Random(0)
    pairs = list(itertools.combinations(sorted(FLAGS), 2))
    for pair in draws.sample(pairs, len(pairs) // 20):
        pretrain(sum((draws.choice(values_of(name)) for name in pair), ()), capsys)


def property_of(how_many, strategy, check_one):
    """hypothesis looks for an example that fails, and then for the smallest one."""
    how_many(given(strategy)(check_one))()


# ---- evaluations -----------------------------------------------------------------------------------------------------

# flags of a script without which nothing runs, or it takes long
SCRIPTS = {
    "eval_knn": {"num_workers": "0"},
    "eval_linear": {"num_workers": "0", "epochs": "2"},
    "eval_cluster": {"num_workers": "0", "num_permutations": "2"},
    "eval_collapse": {"num_workers": "0", "tsne_samples": "0"},
    "export_backbone": {"output_dir": "exported"},
    "visualize_attention": {"image_path": "images/train", "output_dir": "pictures"},
}


@pytest.fixture(scope="module")
def models(place):
    """resnet8.pth, as a run leaves it, and vit.pth, beside the images."""
    main_cplearn.train(PRETRAINING.parse_args(with_small([])))
    shutil.move("run/checkpoint.pth", "resnet8.pth")
    torch.manual_seed(0)
    torch.save(vit_tiny(patch_size=16, img_size=32).state_dict(), "vit.pth")


@pytest.mark.parametrize("script", list(SCRIPTS))
def test_flags_of_a_script(place, models, capsys, script):
    evaluate_with(settings(QUICK, max_examples=1), script, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("script", list(SCRIPTS))
def test_many_flags_of_a_script(place, models, capsys, script):
    evaluate_with(settings(QUICK, max_examples=15), script, capsys)


def evaluate_with(how_many, script, capsys):
    module = importlib.import_module(script)

    def run(words):
        try:
            check(module.main, [*needed(script), *words], capsys)
        finally:
            clean_up()

    run(())
    property_of(how_many, command_lines(module.get_args_parser(), most_flags=4), run)


def needed(script):
    values = {"checkpoint": "vit.pth" if script == "visualize_attention" else "resnet8.pth", "device": "cpu"}
    values |= {} if script in ("export_backbone", "visualize_attention") else {"data_path": "images", "batch_size": "8"}
    return [f"--{name}={value}" for name, value in (values | SCRIPTS[script]).items()]


def clean_up():
    for path in Path().iterdir():
        if path.name not in KEPT:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
