"""Pictures, undisturbed runs to compare with, and a guard that leaves no process behind."""

import pytest

import runs


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return runs.write_pictures(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="session")
def undisturbed(folder, tmp_path_factory):
    """undisturbed(processes=1, **changes): the folder of a small run that nothing happened to; each is made once."""
    known = {}

    def run(processes=1, **changes):
        key = (processes, *sorted((name, str(value)) for name, value in changes.items()))
        if key not in known:
            known[key] = tmp_path_factory.mktemp("undisturbed")
            values = {"folder": folder, "output_dir": known[key], "processes": processes} | changes
            runs.run_to_end(runs.flags(**values), tmp_path_factory.mktemp("output"), processes)
        return known[key]

    return run


@pytest.fixture
def launch(tmp_path):
    """runs.launch with its output in the test's folder; what still runs at the test's end is killed."""
    jobs = []

    def start(words, **options):
        jobs.append(runs.launch(words, tmp_path, **options))
        return jobs[-1]

    yield start
    for job in jobs:
        job.kill()
