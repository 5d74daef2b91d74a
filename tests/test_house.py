"""The plan of the house: which file may import which, and that README's map is the list of files that are there."""

import ast
import functools
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {"main_cplearn", "eval_linear", "eval_knn", "eval_cluster", "eval_collapse", "visualize_attention"}
SCRIPTS |= {"export_backbone", "hubconf", "run_with_submitit", "run_experiments", "make_report"}
SCRIPTS |= {"extract_features", "eval_dense"}
PACKAGES = ("images", "fused_loss", "evaluation", "baselines", "experiments", "exports", "report", "running")
LEVELS = [  # a room imports from rooms below it, and from rooms on its own level as long as there is no circle
    {"utils", "augmentation", "vision_transformer", "optimizer"},
    {"images", "dictionary", "checkpoint", "running", "monitor", "backbones", "objective"}
    | {"accumulation", "batch_norm"},
    {"data"},
    {"cplearn_head"},
    {"baselines"},
    {"fused_loss"},  # the fast loss stands on the definition, never the reverse
    {"pretrained", "weight_layouts"},
    {"evaluation", "exports"},
    {"experiments", "report"},
    SCRIPTS,
]
PROGRAMS = {"experiments/supervised.py", "experiments/planted.py"}  # start scripts' own functions, as benchmarks do
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}


def files():
    return sorted([*ROOT.glob("*.py"), *(path for package in PACKAGES for path in ROOT.glob(f"{package}/*.py"))])


def room_of(path):
    return path.stem if path.parent == ROOT else path.parent.name


@functools.cache
def imports(path):
    """Names of our own rooms that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        found |= {name.split(".")[0] for name in names} & LEVEL.keys()
    return found


def arrows():
    rooms = [path for path in files() if str(path.relative_to(ROOT)) not in PROGRAMS]
    return {(room_of(path), target) for path in rooms for target in imports(path)} - {(r, r) for r in LEVEL}


def test_every_room_has_a_level_and_there_are_at_most_28():
    assert {room_of(path) for path in files()} == LEVEL.keys()
    assert len(list(ROOT.glob("*.py"))) <= 28


def test_imports_point_downwards():
    assert [(a, b) for a, b in arrows() if LEVEL[b] > LEVEL[a]] == []


def test_no_script_imports_a_script():
    assert [(a, b) for a, b in arrows() if b in SCRIPTS] == []


def test_no_circles():
    left = arrows()
    while left:  # take away rooms from which no arrow leads
        ends = {b for _, b in left} - {a for a, _ in left}
        assert ends, f"a circle among {sorted(left)}"
        left = {(a, b) for a, b in left if b not in ends}


def test_inside_a_package_there_is_no_circle_either():
    for package in PACKAGES:
        left = set()
        for path in ROOT.glob(f"{package}/*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == package:
                    names = [node.module] if "." in node.module else [f"{package}.{a.name}" for a in node.names]
                    left |= {(path.stem, name.split(".")[1]) for name in names}
        left = {(a, b) for a, b in left if a != "__init__" and (ROOT / package / f"{b}.py").exists()}
        while left:
            ends = {b for _, b in left} - {a for a, _ in left}
            assert ends, f"a circle among {sorted(left)}"
            left = {(a, b) for a, b in left if b not in ends}


READ_BY_OTHERS = {  # flags whose own file does not name them in code
    "knn_every": "probes.py puts it together, of a name and _every",
    "linear_every": "probes.py puts it together, of a name and _every",
    "log_to": "loggers.py is given its value",
    "device": "of all evaluations, by pretrained.py; each script gives it to utils.py",
}


def defined_and_read(path):
    """(flags that a file defines, names that it reads: attributes of args, and words that may be given to getattr)."""
    defined, read, inside = set(), set(), set()
    nodes = list(ast.walk(ast.parse(path.read_text())))
    for call in nodes:
        words = [a.value for a in call.args if isinstance(a, ast.Constant)] if isinstance(call, ast.Call) else []
        flags = [word for word in words if isinstance(word, str) and word.startswith("--")]
        if flags and getattr(call.func, "id", getattr(call.func, "attr", "")) in ("add", "add_argument"):
            given = {key.arg: key.value for key in call.keywords}
            defined.add(given["dest"].value if "dest" in given else flags[0][2:].replace("-", "_"))
            inside |= set(ast.walk(call))
    for node in nodes:
        if isinstance(node, ast.Attribute):
            owner = getattr(node.value, "attr", getattr(node.value, "id", ""))
            read |= {node.attr} if owner in ("args", "own") else set()
        elif isinstance(node, ast.Constant) and node not in inside:
            read.add(node.value)
    return defined, read


def test_a_flag_stands_in_a_file_that_reads_it():
    found = {str(path.relative_to(ROOT)): defined_and_read(path) for path in files()}
    assert len({flag for defined, _ in found.values() for flag in defined}) > 100
    strangers = {flag: name for name, (defined, read) in found.items() for flag in defined - read}
    assert strangers.keys() == READ_BY_OTHERS.keys(), strangers


def test_no_file_is_longer_than_620_lines():
    every = [*files(), *ROOT.glob("tests/**/*.py"), *ROOT.glob("benchmarks/*.py")]
    assert {str(path): n for path in every if (n := len(path.read_text().splitlines())) > 620} == {}


def test_readmes_map_names_every_file():
    text = (ROOT / "README.md").read_text()
    plan = text[text.index("## Map of the files") :]
    named = set(re.findall(r"\b([a-z_0-9]+)\.py\b", plan)) | set(re.findall(r"\b([a-z_]+)/", plan))
    assert named >= {room_of(path) for path in files()} | {p.stem for p in files() if p.stem != "__init__"}
    assert set(re.findall(r"\b([a-z_0-9]+)\.py\b", plan)) <= {p.stem for p in files()}


ELLIPTIC = re.compile(r"\bas there\b(?! (is|are))|\b[Tt]hose of\b|\b[Tt]he same (of|without)\b")


def test_docstrings_repeat_the_noun():
    for path in [*files(), *ROOT.glob("benchmarks/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                found = ELLIPTIC.search(ast.get_docstring(node) or "")
                assert found is None, f"{path.name}, {getattr(node, 'name', 'module')}: {found[0]}"


def test_no_two_test_files_have_one_name():
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(set(names)) == len(names)
