"""The method against formulas written out by hand in float64, autograd, and the joined batch of several processes."""

import math

import numpy as np
import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

import objective
from cplearn_head import (
    CPLearn,
    CPLearnHead,
    code_temperature,
    cplearn_loss,
    least_hard_prior,
    loss_lower_bound,
    nearest_code,
)
from dictionary import rademacher_codes
from fused_loss import fused_cplearn_loss
from monitor import read_together, within_code_variance
from utils import UserError, all_reduce_mean

B, D, F, K = 12, 20, 24, 37


def projector_by_hand(x, weight, bias, gamma, shift, activation, n):
    """Eq. 1, entry by entry as written in the paper; float64."""
    u = x @ weight.T + bias
    b = (u - u.mean(0)) / torch.sqrt(((u - u.mean(0)) ** 2).mean(0) + 1e-5) * gamma + shift
    if activation == "tanh":
        return torch.tanh(b)
    return b / torch.sqrt((b**2).sum(1, keepdim=True)) * math.sqrt(b.shape[1] / n)


def loss_by_hand(hs, codes, tau, beta, prior):
    """Eq. 2 and Appendix N with explicit sums over images, codes and ordered pairs; float64."""
    ps = []
    for h in hs:
        e = torch.exp(h @ codes / tau)
        ps.append(e / e.sum(1, keepdim=True))
    pairs, invariance = 0, 0.0
    for a in range(2):
        for v in range(len(hs)):
            if v != a:
                invariance = invariance - (ps[a] * torch.log(ps[v])).sum() / len(hs[0])
                pairs += 1
    priors = 0.0
    for a in range(2):
        pbar = ps[a].sum(0) / len(hs[0])
        num_codes = codes.shape[1]
        priors = priors + (
            (pbar * torch.log(num_codes * pbar)).sum() if prior == "kl" else -torch.log(pbar).sum() / num_codes
        )
    return beta * invariance / pairs + priors / 2


@pytest.mark.parametrize("num_views", [2, 4])
@pytest.mark.parametrize("prior", ["kl", "ce"])
@pytest.mark.parametrize("activation", ["l2", "tanh"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_loss_and_gradients_equal_the_formulas_in_float64(num_views, prior, activation, dtype, tolerance):
    torch.manual_seed(0)
    head = CPLearnHead(D, K, F, activation, batch_size=7).to(dtype)
    torch.nn.init.uniform_(head.bn.weight, 0.5, 2)
    torch.nn.init.normal_(head.bn.bias)
    features = [torch.randn(B, D, dtype=torch.float64) for _ in range(num_views)]
    parameters = [p.detach().double().requires_grad_() for p in head.parameters()]
    inputs = [x.clone().requires_grad_() for x in features]

    tau = F / (math.sqrt(7) * math.log((1 - 1e-8 * (K - 1)) / 1e-8))
    hs = [projector_by_hand(x, *parameters, activation, 7) for x in inputs]
    expected = loss_by_hand(hs, head.codes.double(), tau, 0.3, prior)
    expected_grads = torch.autograd.grad(expected, [*inputs, *parameters])

    ours = [x.to(dtype).requires_grad_() for x in features]
    loss, terms = CPLearn(head, beta=0.3, prior=prior)(ours)
    grads = torch.autograd.grad(loss, [*ours, *head.parameters()])

    assert loss.dtype == dtype
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    assert (0.3 * terms["invariance"] + terms["prior"]).item() == pytest.approx(expected.item(), rel=tolerance)
    scale = max(g.abs().max() for g in expected_grads)
    for got, want in zip(grads, expected_grads, strict=True):
        # the linear bias has no gradient through batch norm, so errors are measured against the largest gradient
        assert (got.double() - want).abs().max() <= tolerance * scale


def bare_by_hand(x, activation, n):
    return torch.tanh(x) if activation == "tanh" else x / torch.sqrt((x**2).sum(1, keepdim=True) * n / x.shape[1])


@pytest.mark.parametrize("loss_function", [cplearn_loss, fused_cplearn_loss])
@pytest.mark.parametrize("dictionary", ["rademacher", "hadamard"])
@pytest.mark.parametrize("activation", ["l2", "tanh"])
def test_a_bare_head_is_the_activation_of_the_features(activation, dictionary, loss_function):
    torch.manual_seed(0)
    head = CPLearnHead(D, 24, None, activation, batch_size=7, dictionary=dictionary, bare=True)
    assert list(head.parameters()) == []
    features = [3 * torch.randn(B, D, dtype=torch.float64).abs() for _ in range(3)]
    inputs, ours = ([x.clone().requires_grad_() for x in features] for _ in range(2))
    hs = [bare_by_hand(x, activation, 7) for x in inputs]
    expected = loss_by_hand(hs, head.codes.double(), head.tau, 0.3, "kl")
    loss, _ = CPLearn(head, beta=0.3, loss_function=loss_function)(ours)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-10)
    grads = zip(torch.autograd.grad(loss, ours), torch.autograd.grad(expected, inputs), strict=True)
    for got, want in grads:
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-12)
    for h, by_hand in zip(map(head, features), hs, strict=True):
        torch.testing.assert_close(h, by_hand)
    assert head(features[0].to(torch.bfloat16)).dtype == torch.float32
    for x in features:  # each image for itself, in training too
        torch.testing.assert_close(head(x[:1]), head(x)[:1])


def test_a_bare_head_has_the_width_of_the_backbone():
    assert CPLearnHead(D, K, D, bare=True).codes.shape == (D, K)
    with pytest.raises(UserError, match=rf"proj_dim {F}: a bare head has the backbone's width, {D}; leave --proj_dim"):
        CPLearnHead(D, K, F, bare=True)


def test_loss_passes_gradcheck():
    torch.manual_seed(1)
    views = [torch.randn(4, 6, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    codes = rademacher_codes(6, 9)
    for prior in ("kl", "ce"):
        assert torch.autograd.gradcheck(lambda *v, p=prior: cplearn_loss(list(v), codes, 1.3, 0.7, p)[0], views)


def test_authors_symmetrised_form_for_two_views():
    """The authors' code: 1/2 [prior_1 + prior_2] + beta/2 [CE(p1, p2) + CE(p2, p1)], through torch's cross entropy."""
    torch.manual_seed(2)
    views = [torch.randn(B, F) for _ in range(2)]
    codes = rademacher_codes(F, K)
    logits = [h @ codes.float() / 2.0 for h in views]
    p1, p2 = (s.softmax(1) for s in logits)
    cross_entropy = torch.nn.functional.cross_entropy
    invariance = (cross_entropy(logits[1], p1) + cross_entropy(logits[0], p2)) / 2
    uniform = torch.full((K,), 1 / K)
    prior = sum(cross_entropy(p.mean(0).log()[None], uniform[None]) for p in (p1, p2)) / 2
    loss, _ = cplearn_loss(views, codes, 2.0, beta=0.4, prior="ce")
    torch.testing.assert_close(loss, 0.4 * invariance + prior)


def test_local_crops_are_predicted_but_never_targets():
    torch.manual_seed(3)
    views = [torch.randn(B, F, dtype=torch.float64) for _ in range(4)]
    codes = rademacher_codes(F, K)
    loss, _ = cplearn_loss(views, codes, 2.0)
    swapped, _ = cplearn_loss([views[1], views[0], views[3], views[2]], codes, 2.0)
    mixed, _ = cplearn_loss([views[0], views[2], views[1], views[3]], codes, 2.0)
    torch.testing.assert_close(loss, swapped)
    assert (loss - mixed).abs() > 1e-6


def test_unbounded_logits_stay_finite():
    views = [torch.full((3, F), 500.0, requires_grad=True) for _ in range(2)]
    for prior in ("kl", "ce"):
        loss, _ = cplearn_loss(views, rademacher_codes(F, K), 0.1, prior=prior)
        gradients = torch.autograd.grad(loss, views)
        assert torch.isfinite(loss) and all(torch.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize("bad", ["prior", "shape", "one view"])
def test_wrong_input_is_refused(bad):
    views, prior = [torch.randn(4, F), torch.randn(4, F)], "kl"
    if bad == "prior":
        prior = "reverse"
    if bad == "shape":
        views[1] = torch.randn(4, F + 1)
    if bad == "one view":
        views = views[:1]
    with pytest.raises(ValueError, match="expected"):
        cplearn_loss(views, rademacher_codes(F, K), 1.0, prior=prior)


# ---- several processes -----------------------------------------------------------------------------------------------


def joined_batch(views):
    torch.manual_seed(4)
    return [torch.randn(2 * B, D, dtype=torch.float64) for _ in range(views)]


def build(prior, scope):
    torch.manual_seed(5)
    head = CPLearnHead(D, K, F).double()
    return CPLearn(head, beta=0.3, prior=prior, prior_scope=scope)


def step_on_a_share(rank, prior, scope):
    objective = DistributedDataParallel(build(prior, scope), broadcast_buffers=False)
    loss, _ = objective([x[rank * B : (rank + 1) * B] for x in joined_batch(3)])
    loss.backward()
    head = objective.module.head
    mean_loss = all_reduce_mean(loss.detach())
    state = [mean_loss, head.bn.running_mean, head.bn.running_var, objective.module.usage, objective.module.recent]
    return [t.double().numpy() for t in state + [p.grad for p in objective.parameters()]]


@pytest.mark.parametrize("prior", ["kl", "ce"])
def test_two_processes_equal_one_on_the_joined_batch(run_in_processes, prior):
    one = build(prior, "global")
    loss, _ = one(joined_batch(3))
    loss.backward()
    state = [loss.detach(), one.head.bn.running_mean, one.head.bn.running_var, one.usage, one.recent]
    expected = [t.double().numpy() for t in state + [p.grad for p in one.parameters()]]
    for shares in run_in_processes(step_on_a_share, prior, "global"):
        for i, (got, want) in enumerate(zip(shares, expected, strict=True)):
            tolerance = 1e-5 if i == 3 else 1e-12  # usage is a float32 statistic
            np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


def without_assignments(*args):
    """As the Triton kernels do, which do not look for the highest logit's code."""
    loss, terms = fused_cplearn_loss(*args)
    del terms["assignments"]
    return loss, terms


AVERAGED = ("loss", "invariance", "prior", "entropy")


def step_with_sharded_codes(rank, prior, dictionary, num_codes, loss_function):
    torch.manual_seed(5)
    head = CPLearnHead(D, num_codes, F, shard=(rank, 2), dictionary=dictionary).double()
    objective = CPLearn(head, 0.3, prior, loss_function=loss_function)
    wrapped = DistributedDataParallel(objective, broadcast_buffers=False)
    views = [x[rank * B : (rank + 1) * B] for x in joined_batch(3)]
    loss, _ = wrapped(views)
    loss.backward()
    objective.share_statistics()
    statistics = read_together(objective.statistics(joined_batch(3)[0], dict.fromkeys(AVERAGED, 0.5)))
    state = [loss.detach(), objective.usage, objective.recent, *(p.grad for p in objective.parameters())]
    return [t.double().numpy() for t in state], statistics


@pytest.mark.parametrize(
    ("prior", "dictionary", "num_codes", "loss_function"),
    [
        ("kl", "rademacher", 128, fused_cplearn_loss),
        ("ce", "rademacher", 64, without_assignments),
        ("kl", "hadamard", 96, fused_cplearn_loss),
    ],
)
def test_codes_shared_by_two_processes_equal_one(run_in_processes, prior, dictionary, num_codes, loss_function):
    torch.manual_seed(5)
    one = CPLearn(CPLearnHead(D, num_codes, F, dictionary=dictionary).double(), 0.3, prior)
    loss, _ = one(joined_batch(3))
    loss.backward()
    expected = [loss.detach(), one.usage, one.recent, *(p.grad for p in one.parameters())]
    expected_statistics = read_together(one.statistics(joined_batch(3)[0], dict.fromkeys(AVERAGED, 0.5)))
    for state, statistics in run_in_processes(step_with_sharded_codes, prior, dictionary, num_codes, loss_function):
        for i, (got, want) in enumerate(zip(state, expected, strict=True)):
            tolerance = 1e-5 if i == 1 else 1e-10  # usage is a float32 statistic
            np.testing.assert_allclose(got, want.double().numpy(), rtol=tolerance, atol=tolerance)
        for name, value in statistics.items():
            assert value == pytest.approx(expected_statistics[name], rel=1e-5), name


def test_local_prior_is_another_objective(run_in_processes):
    local = run_in_processes(step_on_a_share, "kl", "local")[0]
    joined = run_in_processes(step_on_a_share, "kl", "global")[0]
    assert abs(local[0] - joined[0]) > 1e-3
    # by hand: the mean over processes of each one's own loss, with the joined batch norm
    objective = build("kl", "local")
    hs = [objective.head(x) for x in joined_batch(3)]
    halves = [[h[:B] for h in hs], [h[B:] for h in hs]]
    expected = sum(loss_by_hand(h, objective.head.codes.double(), objective.head.tau, 0.3, "kl") for h in halves) / 2
    assert local[0] == pytest.approx(expected.item(), rel=1e-10)


# ---- temperature, certificate ----------------------------------------------------------------------------------------


def test_temperature_makes_a_code_as_sure_as_lemma_1_wants():
    """An embedding equal to a code has logit kappa there; against K - 1 orthogonal codes p is 1 - eps (K - 1)."""
    num_codes, dim, n = 65536, 384, 64
    tau = code_temperature(num_codes, dim, n)
    code = rademacher_codes(dim, 1).double()[:, 0]
    h = code / code.norm() * math.sqrt(dim / n)
    kappa = (h @ code).item() / tau
    assert kappa == pytest.approx(18.42, abs=0.005)  # method.md; the paper's K = 65536
    p = math.exp(kappa) / (math.exp(kappa) + num_codes - 1)
    q = 1 - 1e-8 * (num_codes - 1)
    assert math.log(q / 1e-8) == pytest.approx(kappa, rel=1e-12)
    assert p == pytest.approx(q / (q + 1e-8 * (num_codes - 1)), rel=1e-12)


def test_too_many_codes_are_refused():
    with pytest.raises(UserError, match="out_dim 100000001"):
        code_temperature(100_000_001, 384, 64)
    assert code_temperature(99_999_999, 384, 64) > 0


@pytest.mark.parametrize("prior", ["kl", "ce"])
def test_bound_is_reached_by_the_minimiser_and_by_nothing_below(prior):
    """Lemma 1's minimiser: every p is 1 - e (K - 1) at one code and e elsewhere, codes equally used."""
    num_codes, eps, beta = 8, 1e-3, 0.25
    p = torch.full((num_codes, num_codes), eps, dtype=torch.float64)
    p.fill_diagonal_(1 - eps * (num_codes - 1))
    logits = p.log()  # one image per code; an identity dictionary makes these the logits
    loss, _ = cplearn_loss([logits, logits], torch.eye(num_codes), 1.0, beta, prior)
    assert loss.item() == pytest.approx(loss_lower_bound(num_codes, beta, prior, eps), rel=1e-12)
    torch.manual_seed(6)
    for scale in (0.1, 1.0, math.log(p[0, 0] / eps) / 2):  # logits whose p stays above eps
        other = torch.randn(num_codes, num_codes, dtype=torch.float64).clamp(-1, 1) * scale
        assert cplearn_loss([other, other], torch.eye(num_codes), 1.0, beta, prior)[0] > loss


def test_least_hard_prior_is_that_of_distinct_hard_codes_and_soft_ones_go_below():
    p = torch.zeros(16, 128, dtype=torch.float64)
    p[torch.arange(16), torch.arange(16)] = 1
    logits = (p + 1e-300).log()
    _, terms = cplearn_loss([logits, logits], torch.eye(128), 1.0)
    assert terms["prior"].item() == pytest.approx(least_hard_prior(128, 16), rel=1e-12) == pytest.approx(math.log(8))
    assert least_hard_prior(16, 128) == 0
    soft = torch.full((16, 128), -300.0, dtype=torch.float64)
    soft[torch.arange(128) // 8, torch.arange(128)] = 0  # eight codes for each image
    _, terms = cplearn_loss([soft, soft], torch.eye(128), 1.0)
    assert terms["prior"].item() == pytest.approx(0, abs=1e-9)
    assert terms["entropy"].item() == pytest.approx(math.log(8))  # what the soft p have more than the hard ones


# ---- the checkpoint -------------------------------------------------------------------------------


def test_state_dict_holds_bits_and_restores_every_logit():
    torch.manual_seed(7)
    head = CPLearnHead(D, 131, F, batch_size=64, seed=1).eval()
    state = head.state_dict()
    assert state["codes"].dtype == torch.uint8 and state["codes"].numel() == F * 17
    other = CPLearnHead(D, 131, F, batch_size=512, seed=2).eval()
    other.load_state_dict(state)
    x = torch.randn(B, D)
    assert torch.equal(head.logits(head(x)), other.logits(other(x)))
    assert torch.equal(head.assign(x), other.assign(x))


@pytest.mark.parametrize("storage", ["int8", "bits", "seed"])
def test_every_storage_gives_the_same_logits_and_loads_every_other(storage):
    torch.manual_seed(7)
    x = torch.randn(B, D)
    first = CPLearnHead(D, 131, F, seed=1).eval()
    state = CPLearnHead(D, 131, F, seed=1, storage=storage).state_dict() | {
        k: v for k, v in first.state_dict().items() if k not in ("codes", "seed")
    }
    assert ("codes" in state) == (storage != "seed")
    for other in ("int8", "bits", "seed"):
        head = CPLearnHead(D, 131, F, seed=2, storage=other).eval()
        head.load_state_dict(state)
        assert torch.equal(head.logits(head(x)), first.logits(first(x)))
        assert torch.equal(head.assign(x), first.assign(x))


def test_a_head_is_built_from_what_its_state_dict_tells():
    for settings in ({}, {"storage": "seed"}, {"dictionary": "hadamard"}):
        head = CPLearnHead(D, 131, F, "tanh", seed=3, **settings).eval()
        other = CPLearnHead.from_state_dict(D, head.state_dict(), "tanh").eval()
        other.load_state_dict(head.state_dict())
        assert other.dictionary.kind == head.dictionary.kind
        x = torch.randn(B, D)
        assert torch.equal(head.logits(head(x)), other.logits(other(x)))


def test_a_bare_head_is_built_only_where_the_settings_say_so():
    head = CPLearnHead(D, 131, None, "tanh", seed=3, bare=True)
    state, x = head.state_dict(), torch.randn(B, D)
    assert state.keys() == {"scale", "seed", "codes"}
    other = CPLearn.head_from_state_dict(D, state, {"activation": "tanh", "bare_head": True})
    other.load_state_dict(state)
    assert torch.equal(head.logits(head(x)), other.logits(other(x)))
    for said in ({}, {"bare_head": False}):  # a head that has lost its layers is no bare one
        assert CPLearn.head_from_state_dict(D, state, {"activation": "tanh"} | said) is None
    with pytest.raises(UserError, match="its dictionary is"):
        CPLearn.head_from_state_dict(D + 1, state, {"activation": "tanh", "bare_head": True})


def test_dictionaries_of_two_kinds_are_not_mixed_up():
    state = CPLearnHead(D, 128, F, dictionary="hadamard").state_dict()
    with pytest.raises(RuntimeError, match="hadamard, K 128 in the file; rademacher"):
        CPLearnHead(D, 128, F).load_state_dict(state)


@pytest.mark.parametrize("storage", ["bits", "seed"])
def test_paper_sized_dictionary_takes_at_most_4_megabytes_in_a_file(tmp_path, storage):
    """F = 2048, K = 16384 takes 134 MB in the paper's Table 8."""
    head = CPLearnHead(8, 16384, 2048, storage=storage)
    torch.save({k: v for k, v in head.state_dict().items() if k in ("codes", "seed", "scale")}, tmp_path / "file")
    assert (tmp_path / "file").stat().st_size <= 4.2e6


@pytest.mark.parametrize(("name", "value"), [("seed", None), ("scale", None), ("out_dim", 132)])
def test_head_of_another_shape_is_refused(name, value):
    state = CPLearnHead(D, 131, F).state_dict()
    if name != "out_dim":
        del state[name]
    other = CPLearnHead(D, value or 131, F)
    with pytest.raises(RuntimeError, match="codes" if name == "out_dim" else name):
        other.load_state_dict(state)


@pytest.mark.parametrize("activation", ["l2", "tanh"])
def test_logits_do_not_depend_on_the_batch(activation):
    torch.manual_seed(8)
    head = CPLearnHead(D, K, F, activation)
    head(torch.randn(64, D))
    head.eval()
    x = torch.randn(B, D)
    whole = head.logits(head(x))
    for i in range(B):
        torch.testing.assert_close(head.logits(head(x[i : i + 1]))[0], whole[i])


def test_assign_uses_running_statistics_and_leaves_the_mode():
    torch.manual_seed(9)
    head = CPLearnHead(D, K, F)
    head(torch.randn(64, D) * 3 + 1)
    before = head.bn.running_mean.clone()
    x = torch.randn(B, D)
    codes = head.assign(x)
    assert head.training and torch.equal(head.bn.running_mean, before)
    assert torch.equal(torch.cat([head.assign(x[i : i + 1]) for i in range(B)]), codes)


@pytest.mark.parametrize("tile", [1, 10, 37, 100])
def test_nearest_code_is_the_argmax_of_the_logits(tile):
    torch.manual_seed(12)
    head = CPLearnHead(D, K, F)
    h = head(torch.randn(B, D)).detach()
    assert torch.equal(nearest_code(h, head.codes, tile), head.logits(h).argmax(dim=1))


def test_codes_of_images_are_found_in_float32_under_autocast():
    head = CPLearnHead(64, 4096)
    x = torch.randn(256, 64)
    with torch.autocast("cpu", torch.bfloat16):
        codes = head.assign(x)
    assert torch.equal(codes, head.assign(x))


def test_head_is_float32_under_autocast():
    head = CPLearnHead(D, K, F)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = CPLearn(head)([torch.randn(B, D, dtype=torch.bfloat16) for _ in range(2)])
    assert loss.dtype == torch.float32


def test_statistics_of_the_window_by_hand(monkeypatch):
    monkeypatch.setattr(objective, "WINDOW", (20, 20))
    torch.manual_seed(11)
    method = CPLearn(CPLearnHead(D, K, F))
    codes, mean = [], torch.zeros(K)
    for _ in range(5):
        features = [torch.randn(B, D) for _ in range(3)]
        loss, terms = method(features)
        with torch.no_grad():
            p = [method.head.logits(method.head(x)).softmax(1) for x in features[:2]]
        codes += p[0].argmax(1).tolist()
        decay = math.exp(-B / 20)
        mean = decay * mean + (1 - decay) * (p[0].mean(0) + p[1].mean(0)) / 2
    averages = {name: value.item() for name, value in terms.items()} | {"loss": loss.item()}
    numbers = read_together(method.statistics(features[0], averages))
    assert 5 * B > 20 and numbers["images_counted"] == 20
    assert numbers["codes_used"] == len(set(codes[-20:])) != len(set(codes))
    mean /= mean.sum()
    assert numbers["perplexity"] == pytest.approx(torch.exp(-(mean * mean.log()).sum()).item(), rel=1e-5)
    assert numbers["within_code"] == pytest.approx(
        float(within_code_variance(features[0], p[0].argmax(1))), nan_ok=True
    )
    entropy = np.mean([-(q * q.log()).sum(1).mean().item() for q in p])
    prior = np.mean([(q.mean(0) * (K * q.mean(0)).log()).sum().item() for q in p])
    assert numbers["entropy_share"] == pytest.approx(entropy / math.log(K), rel=1e-5)
    assert numbers["information"] == pytest.approx(math.log(K) - prior - entropy, rel=1e-4)
    assert numbers["batch_perplexity"] == pytest.approx(K * math.exp(-prior), rel=1e-5)
    assert numbers["gap"] == pytest.approx(loss.item() - loss_lower_bound(K, 0.25), rel=1e-9)


@pytest.mark.parametrize(("state", "share"), [("uniform", 1), ("one code", 4), ("bound", 0)])
def test_the_gap_as_a_share_of_the_better_trivial_state(state, share):
    """beta 0.25: uniform p, the better trivial state, has the gap beta log K, one code log K, and the bound 0."""
    p = torch.full((64, 64), 1e-8, dtype=torch.float64)
    p[torch.arange(64), torch.arange(64) if state == "bound" else 0] = 1 - 63e-8
    p = torch.full_like(p, 1 / 64) if state == "uniform" else p
    loss, terms = cplearn_loss([p.log(), p.log()], torch.eye(64), 1.0)
    objective = CPLearn(CPLearnHead(D, 64, F))
    objective([torch.randn(B, D), torch.randn(B, D)])
    averages = {name: terms[name].item() for name in ("invariance", "prior", "entropy")} | {"loss": loss.item()}
    numbers = objective.statistics(torch.randn(B, D), averages)
    assert numbers["gap_share"] == pytest.approx(share, abs=1e-4)
    assert numbers["information"] == pytest.approx(math.log(64) if state == "bound" else 0, abs=1e-4)


def test_an_older_checkpoints_counts_of_an_epoch_are_left_behind():
    objective = CPLearn(CPLearnHead(D, K, F))
    objective([torch.randn(B, D), torch.randn(B, D)])
    state = {k: v for k, v in objective.state_dict().items() if k not in ("recent", "seen")}
    state |= {"counts": torch.ones(K, dtype=torch.int32), "usage": torch.ones(K)}
    objective.load_state_dict(state)
    assert objective.seen == 0 and objective.usage.sum() == 0
    assert "counts" not in objective.state_dict()


def test_beta_above_one_is_said_before_the_first_step():
    def notes(beta):
        return [line for line in CPLearn(CPLearnHead(D, K, F), beta).describe() if line.startswith("note: --beta")]

    assert len(notes(1.25)) == 1 and notes(1.0) == []


def test_within_code_variance():
    torch.manual_seed(10)
    labels = torch.arange(40).repeat(50)
    centres = torch.randn(40, 8) * 10
    assert within_code_variance(torch.randn(2000, 8), labels) == pytest.approx(1, abs=0.05)  # labels say nothing
    assert within_code_variance(centres[labels], labels) == pytest.approx(0, abs=1e-6)
    assert math.isnan(within_code_variance(torch.randn(40, 8), torch.arange(40)))
