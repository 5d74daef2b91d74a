"""What README.md and docs/ tell one to type works: every flag is known, every file is there, and what can run on a CPU
runs as it is printed, with a few steps on small data in place of days on large."""

import contextlib
import importlib
import os
import re
import shlex
import subprocess
import sys

import pytest
import torch
from PIL import Image
from torch.distributed.run import get_args_parser as torchrun_parser

import eval_knn
import main_cplearn
from backbones import build_backbone
from commands import PAGES, ROOT, SCRIPTS, commands, parser_of, text_of
from cplearn_head import CPLearnHead
from utils import UserError

TORCHRUN = {word for action in torchrun_parser()._actions for word in action.option_strings}
OTHERS = {"--help", "--version", "--signal", "--gpus-per-task", "--shm-size"}  # of any program, SLURM, docker
NOT_OURS = {"torchrun", "-c", "pip", "venv"}


# ---- every command, read --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", commands([*PAGES, *SCRIPTS]), ids=str)
def test_every_flag_of_a_command_is_known(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    torchrun_flags = {word.split("=")[0] for word in command.launcher[1:] if word.startswith("--")}
    assert torchrun_flags <= TORCHRUN
    if command.program == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M)
        assert {word for word in command.words if "=" not in word} <= set(targets)
    elif command.program == "pytest":
        assert all((ROOT / word.split("::")[0]).exists() for word in command.words if "/" in word)
    elif command.program not in NOT_OURS:
        assert (ROOT / command.program).exists() or parser_of(command.program), "no such script"
        assert_words_are_known(command)


def assert_words_are_known(command):
    parser, words = parser_of(command.program), command.words
    if command.program == "run_with_submitit.py":  # what it does not know goes to the script
        own, words = parser.parse_known_args(words)
        parser = importlib.import_module(own.script).get_args_parser()
    if parser is None or "--help" in words:
        return
    known = {flag for action in parser._actions for flag in action.option_strings}
    own = words[: words.index("--")] if "--" in words else words
    assert {word.split("=")[0] for word in own if word.startswith("--") and " " not in word} <= known
    if command.whole:
        try:
            parser.parse_args(words)
        except (SystemExit, UserError) as error:
            pytest.fail(str(error))


def test_no_command_escapes_the_search():
    """A line of a page that looks like one of our commands is one that was found."""
    found = {command.program for command in commands(PAGES)}
    for page in PAGES:
        named = re.findall(r"^ *(?:python|torchrun).*?\b(\w+\.py|-m \w+\.\w+)", text_of(page), re.M)
        assert {name.removeprefix("-m ") for name in named} <= found | {"cluster.py"}
    assert len(commands(PAGES)) > 20


def all_flags():
    flags = set(main_cplearn.DINO_ONLY) | TORCHRUN | OTHERS
    for path in SCRIPTS:
        with contextlib.suppress(AttributeError):
            for action in parser_of(str(path.relative_to(ROOT)))._actions:
                flags |= set(action.option_strings)
    return flags


def test_every_flag_that_a_page_names_is_one_of_some_script():
    flags = all_flags()
    for page in PAGES:
        spans = " ".join(re.findall(r"`[^`]+`", text_of(page)))
        named = re.findall(r"[ `](--[a-z][\w-]*)", spans)
        assert {name for name in named if name not in flags} == set(), page.name


def test_every_file_that_a_page_names_is_there():
    ours = {path.name for pattern in ("*", "*/*", "*/*/*") for path in ROOT.glob(pattern) if ".venv" not in path.parts}
    for page in PAGES:
        text = text_of(page)
        for target in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", text):
            assert (page.parent / target).exists(), f"{page.name}: ({target})"
        for name in re.findall(r"[\w./*-]+\.(?:py|cpp|md|toml|sbatch|sh)\b", text):
            there = any(ROOT.glob(name)) if "/" in name and not name.startswith(("/", "..")) else name in ours
            assert there or (page.parent / name).exists() or name.startswith("/"), f"{page.name}: {name}"


# ---- and run --------------------------------------------------------------------------------------------------------

# what a page's words stand for here; each is looked for in the pages, so that none is left over
STANDS_FOR = {
    "/data/imagenet": "{here}/imagenet",
    "~/pictures": "{here}/imagenet/train",
    "/shared/runs/": "{here}/runs/",
    "/runs/": "{here}/runs/",
    "--nproc_per_node=8": "--nproc_per_node=2",
    "benchmarks/": "{here}/",  # where results are kept: not over those of this checkout
}
FEW = ["--device", "cpu", "--num_workers", "0", "--batch_size_per_gpu", "2", "--max_steps", "2", "--img_size", "64"]
SMALL = ["--device", "cpu", "--num_workers", "0", "--data_path", "{here}/imagenet", "--img_size", "32"]
MORE = {  # what is added to a command, so that it takes seconds
    "main_cplearn.py": FEW,
    "run_with_submitit.py": ["--dry_run"],
    "eval_knn.py": [*SMALL, "--nb_knn", "5"],
    "eval_linear.py": [*SMALL, "--epochs", "2"],
    "eval_cluster.py": [*SMALL, "--match_k", "3", "--kmeans", "3"],
    "eval_collapse.py": [*SMALL, "--tsne_samples", "0", "--gmm_components", "2"],
    "visualize_attention.py": ["--device", "cpu"],
    "export_backbone.py": [],
    "-c": [],
    "benchmarks.sharding": [],
    "benchmarks.accumulation": ["--images", "16", "--batch", "8", "--parts", "1", "2", "--repeats", "1"],
}
NOT_RUN = {  # and why
    r"^make ": "run by .ci/run, or by people: minutes, and an environment of its own",
    r"^(python -m )?pytest": "the tests themselves, run by .ci/run",
    r"benchmarks\.(head|dictionaries|requeue|step|recipes)": "minutes to an hour; test_recipes.py runs the last one",
    r"benchmarks\.(border|crops|layouts|against|report)": "minutes; the last one wants the repository's history",
    r"tests/slurm/cluster\.py": "a cluster of its own; tests/slurm runs it",
    r"--rdzv_endpoint": "needs several machines",
    r"torchrun --max-restarts$": "no whole command",
    r"--dataset fashion_mnist|--patch_size 7": "Fashion-MNIST, which is not everywhere; make demo runs it",
    r"pip install|-m venv": "installs",
    r"--in_chans 5": "images of 5 channels; test_channels.py makes some and runs it",
    r"evaluation\.summary|experiments\.(tables|figures|pages)": "read what others wrote; test_results.py",
    r"data_path (/data/(shards|birds)|photos\.zip|hf://|scans\.h5)": "test_shards.py makes such files and trains",
    r"/data/drawings:0\.5": "three folders; test_roots.py",
    r"VOCdevkit": "images with masks; test_eval_dense.py makes some",
    r"--replay": "needs a run that failed; test_replay.py makes one",
    r"run_experiments\.py|experiments\.(supervised|planted)": "hours; test_run_experiments.py runs it",
}


def reason_not_to_run(command):
    return next((reason for pattern, reason in NOT_RUN.items() if re.search(pattern, command.text)), None)


def test_what_stands_for_something_stands_in_a_page():
    text = "".join(map(text_of, PAGES))
    assert [word for word in STANDS_FOR if word not in text] == []


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """train and val, with ImageNet-100's classes."""
    root = tmp_path_factory.mktemp("pictures")
    names = (ROOT / "imagenet100_classes.txt").read_text().split()
    for split, count in (("train", 200), ("val", 100)):
        for i in range(count):
            path = root / split / names[i % 100] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 32), (i % 100 * 2, i % 7 * 30, i % 11 * 20)).save(path)
    return root


@pytest.fixture
def here(pictures, tmp_path):
    """A folder that looks like a fresh clone, with images and photos beside it."""
    for path in ROOT.iterdir():
        if path.name not in ("runs", "results", "features", ".git", ".venv"):
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / "imagenet").symlink_to(pictures)
    (tmp_path / "photos").symlink_to(next(iter((pictures / "val").iterdir())))
    return tmp_path


def make_given_files(command, here):
    """What a command reads and another one would have written."""
    checkpoints = {word.partition(":")[0] for word in command.words if ".pth" in word}
    for seed, name in enumerate(sorted(checkpoints)):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        torch.save(a_dino_checkpoint() if name.startswith("dino") else a_checkpoint(seed), here / name)
    if command.program == "make_report.py":
        for name in [word for word in command.words if word.startswith("runs")]:
            folder = here / name / ("cplearn" if name == "runs" else "")
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "log.txt").write_text('{"kind": "step", "step": 50, "train_loss": 2.5, "train_lr": 0.001}\n')
    if "--results" in command.words:
        words = ["--checkpoint", *(str(here / name) for name in checkpoints), "--output_dir", str(here / "results")]
        eval_knn.main([*words, *(word.replace("{here}", str(here)) for word in MORE["eval_knn.py"])])


def a_checkpoint(seed):
    torch.manual_seed(seed)
    backbone, head = build_backbone("vit_tiny", img_size=32, patch_size=8), CPLearnHead(192, out_dim=64)
    head(torch.randn(64, 192))
    state = {f"backbone.{k}": v for k, v in backbone.state_dict().items()}
    state |= {f"head.{k}": v for k, v in head.state_dict().items()}
    args = {"arch": "vit_tiny", "patch_size": 8, "img_size": 32, "in_chans": 3, "mean": [0.5] * 3, "std": [0.25] * 3}
    args |= {"dataset": "imagefolder", "activation": "l2", "beta": 0.25, "prior": "kl"}
    return {"format": "cplearn 2", "student": state, "teacher": state, "args": args}


def a_dino_checkpoint():
    state = build_backbone("vit_tiny", img_size=32, patch_size=8).state_dict()
    networks = {"student": {f"module.backbone.{k}": v for k, v in state.items()}}
    return networks | {"teacher": {f"backbone.{k}": v for k, v in state.items()}, "epoch": 1}


def arranged(command, here):
    """The words of a command as they are run here."""
    words = [*command.launcher, command.program, *command.words, *MORE.get(command.program, [])]
    for name, stand_in in STANDS_FOR.items():
        words = [re.sub(rf"(?<![\w}}]){re.escape(name)}", stand_in, word) for word in words]
    words = [word.replace("{here}", str(here)) for word in words]
    if command.launcher:
        return [sys.executable, "-m", "torch.distributed.run", *words[1:]]
    return [sys.executable, *(["-m"] if command.program.startswith("benchmarks.") else []), *words]


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in commands(PAGES) if c.whole and not reason_not_to_run(c)], ids=str)
def test_a_command_runs_as_it_is_printed(command, here):
    make_given_files(command, here)
    environment = os.environ | command.variables | {"HOME": str(here), "OMP_NUM_THREADS": "1"}
    words = arranged(command, here)
    done = subprocess.run(words, cwd=here, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
