"""What is promised of other packages' versions is what `make` installs, and the tests run on both ends of it."""

import importlib.metadata
import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PINNED_IN = {".venv": "constraints.txt", ".venv-oldest": "constraints-oldest.txt"}


def lines_of(name):
    lines = [line.split(" #")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    return [line for line in lines if line and not line.startswith(("#", "-r "))]


def requirements(*names):
    return {canonicalize_name(r.name): r for name in names for r in map(Requirement, lines_of(name))}


def pins(name):
    """{package: version}; each line pins one."""
    assert all(re.fullmatch(r'[\w.-]+==[\w.]+(; python_version (>=|<) "3\.\d+")?', line) for line in lines_of(name))
    return {package: next(iter(r.specifier)).version for package, r in requirements(name).items()}


@pytest.mark.parametrize(
    ("constraints", "files"),
    [
        ("constraints.txt", ("requirements.txt", "requirements-dev.txt")),
        ("constraints-oldest.txt", ("requirements.txt",)),
    ],
)
def test_every_requirement_is_pinned_within_its_range(constraints, files):
    pinned = pins(constraints)
    outside = {n: pinned.get(n) for n, r in requirements(*files).items() if pinned.get(n, "0") not in r.specifier}
    assert outside == {}


def test_the_oldest_pin_is_the_lower_end_of_the_range():
    """To the minor version: a range may say 1.4 and the pin 1.4.2."""
    oldest = pins("constraints-oldest.txt")
    for name, requirement in requirements("requirements.txt").items():
        lower = next(s.version for s in requirement.specifier if s.operator == ">=")
        assert Version(oldest[name]).release[: len(Version(lower).release)] == Version(lower).release


def test_no_file_names_a_host_or_a_path():
    for path in [*ROOT.glob("requirements*.txt"), *ROOT.glob("constraints*.txt")]:
        assert not re.search(r"://|index-url|find-links|@|file:", path.read_text())


@pytest.mark.skipif(Path(sys.prefix).name not in PINNED_IN, reason="not an environment made by make")
def test_these_tests_run_on_the_pinned_versions():
    # what is imported: the first on the path, not the copies that setuptools carries and puts at its end
    installed = {canonicalize_name(d.name): d.version for d in reversed([*importlib.metadata.distributions()])}
    pinned = requirements(PINNED_IN[Path(sys.prefix).name]).items()
    pinned = {n: r.specifier for n, r in pinned if r.marker is None or r.marker.evaluate()}
    assert {n: v for n, v in installed.items() if n in pinned and v not in pinned[n]} == {}
