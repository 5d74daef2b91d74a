"""Processes and what they agree on, devices, errors, seeds and schedules."""

import contextlib
import ctypes
import os
import socket
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

import utils
from optimizer import parameter_groups
from test_batch_norm import network
from utils import (
    UNFINISHED,
    Agreement,
    ArgumentParser,
    RunFailed,
    TryAgain,
    UserError,
    all_gather_rows,
    boolean,
    choose_device,
    choose_precision,
    command_line,
    init_distributed,
    is_lost_peer,
    is_restart,
    name_of_this_start,
    on_rank_zero,
    seed_everything,
)

ROOT = Path(utils.__file__).parent


def gather_and_agree(rank):
    rows = all_gather_rows(torch.full((2, 3), float(rank)))
    agreement = Agreement()
    answers = [agreement.vote(choice) for choice in ([0, 2, 0, 0] if rank == 1 else [0, 0, 0, 1])]
    return rows.tolist(), [*answers, agreement.settle()]


def test_gather_and_agreement(run_in_processes):
    for rows, answers in run_in_processes(gather_and_agree):
        assert rows == [[0.0] * 3] * 2 + [[1.0] * 3] * 2
        assert answers == [0, 0, 2, 0, 1]  # one call later, the largest choice of all


def test_parameter_groups_cover_everything_once():
    groups = parameter_groups(network())
    assert groups[0]["names"] == ["0.weight", "4.weight"]
    assert sorted(groups[1]["names"]) == ["0.bias", "1.bias", "1.weight", "4.bias", "5.bias", "5.weight"]
    assert groups[1]["weight_decay"] == 0


def test_seeding_is_a_function_of_its_numbers():
    def draw(*numbers):
        seed_everything(*numbers)
        return torch.rand(3).tolist() + np.random.rand(3).tolist()

    first = draw(1, 2, 3)
    assert draw(1, 2, 4) != first and draw(1, 3, 2) != first
    assert draw(1, 2, 3) == first


def test_user_error_is_one_line_and_exit_code_2(capsys):
    @command_line
    def script():
        raise UserError("--k 0: expected at least 1")

    with pytest.raises(SystemExit) as caught:
        script()
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: --k 0: expected at least 1\n"


def test_a_lost_peer_is_known_and_other_errors_are_not():
    gloo = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:545] Connection closed by peer [127.0.0.1]:1"
    assert is_lost_peer(RuntimeError(gloo)) and is_lost_peer(torch.distributed.DistBackendError("NCCL"))
    assert not is_lost_peer(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


REFUSALS = (
    UserError("folder taken"), RunFailed("no room"), TryAgain("port"), OSError(28, "No space left", "a"), KeyError("x"),
    None,
)  # fmt: skip


def refuse_on_rank_zero(rank):
    """What each of the REFUSALS becomes in this process: exit code and line."""
    return [outcome(on_rank_zero, refuse, error) for error in REFUSALS]


def refuse(error):
    assert torch.distributed.get_rank() == 0
    if error is not None:
        raise error
    return "done"


def outcome(function, *args):
    try:
        return function(*args)
    except Exception as error:
        return getattr(error, "exit_code", 1), str(error)


def test_what_rank_zero_refuses_all_refuse_with_its_exit_code(run_in_processes):
    zero, one = run_in_processes(refuse_on_rank_zero)
    shared = [(2, "folder taken"), (1, "no room"), (75, "port"), (1, "[Errno 28] No space left: 'a'")]
    assert zero == [*shared, (1, "'x'"), "done"]
    assert one == [*shared, (1, "rank 0: KeyError: 'x'"), None]


# ---- the environment and the device ----------------------------------------------------------------------------------

MEETING = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"WORLD_SIZE": "4"}, "the environment has WORLD_SIZE and no RANK, MASTER_ADDR, MASTER_PORT: start"),
        ({"RANK": "0"}, "the environment has RANK and no WORLD_SIZE, MASTER_ADDR, MASTER_PORT: start"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "no MASTER_ADDR, MASTER_PORT"),
        (MEETING | {"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2: expected a whole number of at least 0 and of at most 1"),
        (MEETING | {"RANK": "-1", "WORLD_SIZE": "2"}, "RANK=-1: expected a whole number"),
        (MEETING | {"RANK": "", "WORLD_SIZE": "2"}, "has WORLD_SIZE, MASTER_ADDR, MASTER_PORT and no RANK"),
        (MEETING | {"RANK": "0", "WORLD_SIZE": "two"}, "WORLD_SIZE=two: expected a whole number of at least 1"),
        (MEETING | {"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE=0: expected a whole number of at least 1"),
        (
            MEETING | {"RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "http"},
            "MASTER_PORT=http: expected a whole number",
        ),
        ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "", "MASTER_PORT": "29500"}, "no MASTER_ADDR: start"),
    ],
)
def test_variables_that_do_not_fit_together_are_one_line(monkeypatch, capsys, changes, said):
    set_group(monkeypatch, changes)
    with pytest.raises(SystemExit) as caught:
        command_line(init_distributed)("cpu")
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.count("\n") == 1 and said in error
    assert not torch.distributed.is_initialized()


def set_group(monkeypatch, changes):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in changes.items():
        monkeypatch.setenv(name, value)


def test_a_master_address_alone_is_nobody_s_group(monkeypatch):
    set_group(monkeypatch, MEETING)
    assert command_line(init_distributed)("cpu") == torch.device("cpu")


def test_a_mistake_is_told_whatever_the_environment_says(monkeypatch, capsys):
    set_group(monkeypatch, {"WORLD_SIZE": "4"})
    utils.print_error("--x: bad")
    set_group(monkeypatch, {"WORLD_SIZE": "many", "RANK": "a\nb"})
    utils.print_error("--x: bad")
    assert capsys.readouterr().err == "error (rank ?): --x: bad\nerror (rank a b): --x: bad\n"


def test_a_port_in_use_is_said_and_another_start_may_cure_it(monkeypatch, capsys):
    with socket.create_server(("", 0), family=socket.AF_INET) as server:
        port = str(server.getsockname()[1])
        set_group(monkeypatch, {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
        with pytest.raises(SystemExit) as caught:
            command_line(init_distributed)("cpu")
    error = capsys.readouterr().err
    assert caught.value.code == UNFINISHED and f"error (rank 0): MASTER_PORT {port}: the port is in use on" in error


def test_a_network_that_does_not_connect_is_an_error_of_its_own(monkeypatch, capsys):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no_such_interface")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    set_group(monkeypatch, {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
    with pytest.raises(SystemExit) as caught:
        command_line(init_distributed)("cpu")
    error = capsys.readouterr().err
    assert caught.value.code == 1 and error.count("\n") == 1
    assert "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME" in error and f"127.0.0.1:{port}" in error


def test_two_processes_with_one_gpu_are_told_so(monkeypatch, capsys):
    """In nccl's words, as two processes on one H200 met them; the network is not to blame."""
    monkeypatch.setenv("LOCAL_RANK", "1")

    def meet():
        with utils.reaching_peers():
            raise torch.distributed.DistBackendError(
                "NCCL error in: NCCLUtils.cpp:93, invalid usage\nLast error:\n"
                "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 60"
            )

    with pytest.raises(SystemExit) as caught:
        command_line(meet)()
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.count("\n") == 1
    assert "LOCAL_RANK 1: several processes have one GPU" in error and "IFNAME" not in error


@pytest.fixture
def nvidia(tmp_path, monkeypatch):
    """A machine with an NVIDIA GPU that torch does not see."""
    monkeypatch.setattr(utils, "NVIDIA_DRIVER", tmp_path)
    monkeypatch.setattr(utils, "DEVICES", tmp_path)
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path


def test_auto_does_not_fall_back_to_the_cpu_beside_a_gpu(nvidia, monkeypatch):
    for built, said in (("13.0", "is built for CUDA 13.0"), (None, "is built for CPUs only")):
        monkeypatch.setattr(torch.version, "cuda", built)
        with pytest.raises(UserError, match=f"--device auto: .* NVIDIA GPU .*{said}.*--device cpu"):
            choose_device("auto")
    assert choose_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("hidden", ["", "-1", "NoDevFiles"])
def test_a_gpu_that_the_user_hides_is_not_asked_for(nvidia, monkeypatch, hidden):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert choose_device("auto") == torch.device("cpu")


def test_a_container_without_the_machine_s_gpu_is_a_cpu(nvidia):
    (nvidia / "nvidia0").unlink()
    assert choose_device("auto") == torch.device("cpu")


@pytest.mark.parametrize(
    "local_rank, processes, visible, index",
    [("3", "8", 8, 3), ("3", "8", 1, 0), ("0", "1", 1, 0), ("3", "8", 2, None), ("1", "0", 1, None)],
)
def test_each_process_takes_its_own_gpu(monkeypatch, local_rank, processes, visible, index):
    set_group(monkeypatch, {"LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": processes})
    if index is None:
        with pytest.raises(UserError, match=f"LOCAL_RANK {local_rank}: this process sees {visible} GPUs"):
            utils.own_gpu(visible)
    else:
        assert utils.own_gpu(visible) == index


def test_precision_needs_no_private_operator(monkeypatch):
    monkeypatch.setattr(torch.ops, "mkldnn", types.SimpleNamespace())
    assert choose_precision("auto", torch.device("cpu")) == "fp32"
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert choose_precision("auto", torch.device("cpu")) == "fp32"
    assert choose_precision("auto", torch.device("mps")) == "fp32"


def test_a_script_of_several_processes_ends_without_taking_the_interpreter_apart():
    """gloo's threads outlive their group; one that meets the interpreter's end aborts the process, now and then."""
    program = (
        "import atexit, utils, torch.distributed as dist; atexit.register(print, 'taken apart')\n"
        "@utils.command_line\n"
        "def main():\n"
        "    utils.init_distributed('cpu'); dist.barrier(); print('done')\n"
        "main()\n"
    )
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as server:
        port = server.getsockname()[1]
    group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            env=os.environ | group | {"RANK": str(r), "LOCAL_RANK": str(r)},
            stdout=subprocess.PIPE,
            cwd=Path(utils.__file__).parent,
            text=True,
        )
        for r in range(2)
    ]
    for process in processes:
        assert (process.communicate(timeout=120)[0], process.returncode) == ("done\n", 0)


def test_what_the_terminal_cannot_show_is_escaped():
    """A file's name in a Latin-1 or ASCII terminal, and one that is not UTF-8 at all."""
    program = "import utils; utils.command_line(lambda: print('\\u4e2d \\udcff'))()"
    for encoding in ("latin-1", "ascii", "utf-8"):
        env = os.environ | {"PYTHONIOENCODING": encoding}
        done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=env, capture_output=True)
        assert done.returncode == 0 and b"\\udcff" in done.stdout, done.stderr


# ---- starts ----------------------------------------------------------------------------------------------------------


def meet(store, size):
    """The names that `size` processes of one start agree on, as threads."""
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(lambda r: name_of_this_start(store, r, size), reversed(range(size))))


def test_every_start_has_a_name_of_its_own_though_the_store_remembers_the_last(tmp_path):
    store = torch.distributed.HashStore()
    first, second = meet(store, 3), meet(store, 3)
    assert len(set(first)) == len(set(second)) == 1 and first[0] != second[0]
    assert meet(store, 1)[0] not in (first[0], second[0])


@pytest.mark.parametrize("name", ["TORCHELASTIC_RESTART_COUNT", "CPLEARN_RESTART_COUNT"])
def test_a_restart_is_known(monkeypatch, name):
    monkeypatch.setenv("RANK", "0")
    assert not is_restart()
    monkeypatch.setenv(name, "0")
    assert not is_restart()
    monkeypatch.setenv(name, "1")
    assert is_restart()


def test_the_count_of_another_job_is_not_believed(monkeypatch):
    """A shell of a job that was requeued hands these on, to a job that it submits as well."""
    for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT", "SLURM_JOB_ID", "SLURM_PROCID"):
        monkeypatch.setenv(name, "3")
    assert not is_restart()


@pytest.mark.parametrize(
    ("words", "expected"),
    [([], False), (["--pool"], True), (["--pool", "true"], True), (["--pool", "False"], False), (["--pool=1"], True),
     (["--pool", "--other", "3"], True)],
)  # fmt: skip
def test_a_boolean_takes_dino_s_spelling(words, expected):
    parser = ArgumentParser("x.py", "")
    parser.add_argument("--pool", type=boolean, nargs="?", const=True, default=False, help="average")
    parser.add_argument("--other", type=int)
    assert parser.parse_args(words).pool is expected
    with pytest.raises(UserError, match=r"--pool.*maybe: expected true or false"):
        parser.parse_args(["--pool", "maybe"])


TAKE_AGAIN = """
import resource, torch, utils
utils.init_distributed("cpu")
def pages_of(megabytes):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = torch.ones(megabytes * 2**18)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print([pages_of(100) for _ in range(20)][-1])
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
@pytest.mark.parametrize(("setting", "kept"), [({}, True), ({"MALLOC_TRIM_THRESHOLD_": "131072"}, False)])
def test_freed_memory_is_kept_unless_malloc_has_been_told_otherwise(setting, kept):
    """A page that is taken anew is a minor fault; 100 MB are 25,600 pages of 4 KiB. The first times leave holes."""
    environment = {name: value for name, value in os.environ.items() if "MALLOC" not in name} | setting
    found = subprocess.run([sys.executable, "-c", TAKE_AGAIN], env=environment, capture_output=True, check=True)
    assert (int(found.stdout) < 20) == kept


def test_results_that_a_runner_writes_make_no_other_commit_of_the_code(tmp_path, monkeypatch):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    cell = tmp_path / "experiments" / "results" / "cell.json"
    cell.parent.mkdir(parents=True)
    for path in (tmp_path / "utils.py", cell):
        path.write_text("1\n")
    monkeypatch.setattr(utils, "__file__", str(tmp_path / "utils.py"))
    assert utils.commit.__wrapped__() == "unknown"
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "a"]):
        subprocess.run([*git, *words], check=True, timeout=60)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
    cell.write_text("2\n")
    assert utils.commit.__wrapped__() == head[:12]
    (tmp_path / "utils.py").write_text("2\n")
    assert utils.commit.__wrapped__() == f"{head[:12]}-dirty"


PRINTS = """
import sys
from monitor import RunLog
from utils import command_line
@command_line
def main():
    log = RunLog(sys.argv[1], 0, 3)
    for number in range(3):
        {}
    print("went on", file=sys.stderr)
main()
"""


@pytest.mark.parametrize("to", ["full disk", "closed pipe"])
@pytest.mark.parametrize("call", ["print(number)", "log.print('text')"])
def test_a_stdout_that_cannot_be_written(call, to, tmp_path):
    """One line, and of a run no more than a warning."""
    if to == "full disk":
        stdout = os.open("/dev/full", os.O_WRONLY)
    else:
        unread, stdout = os.pipe()
        os.close(unread)
    words = [sys.executable, "-c", PRINTS.format(call), tmp_path]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(words, cwd=ROOT, env=env, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=300)
    os.close(stdout)
    first, *others = done.stderr.splitlines()
    if call == "log.print('text')":
        assert (done.returncode, others) == (0, ["went on"])
        assert first.startswith("warning: stdout cannot be written (")
    else:
        assert (done.returncode, others) == (1, [])
        assert first.startswith("error: stdout cannot be written: ")


@pytest.mark.parametrize("call", ["print(number)", "log.print('text')"])
def test_without_a_stdout(call, tmp_path):
    words = ["sh", "-c", 'exec "$@" >&-', "sh", sys.executable, "-c", PRINTS.format(call), tmp_path]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stderr.endswith("went on\n") and "Traceback" not in done.stderr


def test_a_missing_file_is_not_a_stdout(capsys):
    with pytest.raises(FileNotFoundError):
        command_line(Path("/nowhere/at all").read_text)()
    assert capsys.readouterr().out == ""
