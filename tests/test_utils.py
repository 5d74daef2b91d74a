"""Batch norm against torch's on the joined batch, checkpoints that survive, files that are refused."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn

from utils import (
    Agreement,
    ArgumentParser,
    UserError,
    all_gather_rows,
    all_reduce_mean,
    boolean,
    command_line,
    convert_sync_batchnorm,
    is_lost_peer,
    is_restart,
    name_of_this_start,
    on_rank_zero,
    parameter_groups,
    seed_everything,
)


def network():
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5), nn.BatchNorm1d(5)
    )
    layers(torch.randn(4, 3, 6, 6))
    return layers.double()


def loss_of(outputs):
    return (outputs * torch.arange(5)).sin().mean()


def train_on_a_share(rank, images):
    model = convert_sync_batchnorm(network())
    outputs = model(torch.from_numpy(images)[rank * 6 : rank * 6 + 6])
    all_reduce_mean(loss_of(outputs)).backward()
    for parameter in model.parameters():  # what DDP does; the loss above is the global one on every rank
        parameter.grad = all_reduce_mean(parameter.grad)
    model.eval()
    after = model(torch.from_numpy(images))
    return outputs.detach().numpy(), after.detach().numpy(), [p.grad.numpy() for p in model.parameters()]


def test_sync_batchnorm_is_torchs_batchnorm_on_the_joined_batch(run_in_processes):
    images = np.random.default_rng(0).normal(size=(12, 3, 6, 6))
    reference = network()
    outputs = reference(torch.from_numpy(images))
    loss_of(outputs).backward()
    reference.eval()
    after = reference(torch.from_numpy(images)).detach().numpy()  # running statistics
    shares = run_in_processes(train_on_a_share, images)
    np.testing.assert_allclose(np.concatenate([s[0] for s in shares]), outputs.detach().numpy(), rtol=1e-12, atol=1e-12)
    for _, after_share, grads in shares:
        np.testing.assert_allclose(after_share, after, rtol=1e-12, atol=1e-12)
        for got, parameter in zip(grads, reference.parameters(), strict=True):
            np.testing.assert_allclose(got, parameter.grad.numpy(), rtol=1e-10, atol=1e-13)


def gather_and_agree(rank):
    rows = all_gather_rows(torch.full((2, 3), float(rank)))
    agreement = Agreement()
    answers = [agreement.vote(choice) for choice in ([0, 2, 0, 0] if rank == 1 else [0, 0, 0, 1])]
    return rows.tolist(), [*answers, agreement.settle()]


def test_gather_and_agreement(run_in_processes):
    for rows, answers in run_in_processes(gather_and_agree):
        assert rows == [[0.0] * 3] * 2 + [[1.0] * 3] * 2
        assert answers == [0, 0, 2, 0, 1]  # one call later, the largest choice of all


def test_conversion_keeps_names_types_and_timms_activation():
    reference, converted = network(), convert_sync_batchnorm(network())
    assert reference.state_dict().keys() == converted.state_dict().keys()
    assert converted[1].weight.dtype == torch.float64
    timms = BatchNormAct2d(3, act_layer=nn.SiLU)
    images = torch.randn(2, 3, 4, 4)
    expected = timms(images)
    torch.testing.assert_close(convert_sync_batchnorm(nn.Sequential(timms))(images), expected)


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


def refuse_on_rank_zero(rank, message):
    def function():
        assert rank == 0
        if message:
            raise UserError(message)
        return "done"

    try:
        return on_rank_zero(function)
    except UserError as error:
        return f"refused: {error}"


def test_what_rank_zero_refuses_all_refuse(run_in_processes):
    assert run_in_processes(refuse_on_rank_zero, "folder taken") == ["refused: folder taken"] * 2
    assert run_in_processes(refuse_on_rank_zero, None) == ["done", None]


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
