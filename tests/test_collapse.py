"""Each number against numpy, scipy, scikit-learn or a formula in float64; planted collapses are named, healthy features
are not accused."""

import math

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
import torch
from sklearn.metrics.pairwise import cosine_similarity

from cplearn_head import CPLearnHead, code_temperature, cplearn_loss, rademacher_codes
from dictionary import Dictionary, hadamard_matrix
from evaluation import collapse
from evaluation.clustering import kmeans_of_scikit_learn
from monitor import feature_statistics, rankme


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def clusters(num, within, count=1500, dim=384, seed=1):
    """Points around `num` centres of unit variance, and which centre each has."""
    groups = torch.randint(num, (count,), generator=torch.Generator().manual_seed(seed))
    return normal(num, dim, seed=seed + 1)[groups] + within * normal(count, dim, seed=seed + 2), groups


# ---- spectrum --------------------------------------------------------------------------------------------------------


def test_spectrum_against_numpy():
    x = normal(500, 30) * torch.logspace(0, -2, 30) + 100  # a mean that float32 sums would lose digits to
    centred = x.double().numpy() - x.double().numpy().mean(axis=0)
    expected = np.linalg.svd(centred, compute_uv=False) ** 2 / 499
    np.testing.assert_allclose(collapse.covariance_eigenvalues(x), expected, rtol=1e-9)
    np.testing.assert_allclose(collapse.covariance(x, rows=7), np.cov(x.double().numpy(), rowvar=False), rtol=1e-9)


def test_effective_rank_is_rankme_of_centred_features():
    x = normal(300, 20) * torch.logspace(0, -2, 20) + 5
    found = collapse.effective_rank(collapse.covariance_eigenvalues(x))
    assert found == pytest.approx(rankme((x.double() - x.double().mean(dim=0)).float()), rel=1e-4)
    assert found > 2 * rankme(x)  # the mean counts as a direction there


def test_power_law_exponent_against_numpy_s_fit():
    ranks = np.arange(1, 201)
    assert collapse.power_law_exponent(torch.from_numpy(7.0 * ranks**-1.3)) == pytest.approx(1.3)
    eigenvalues = np.sort(np.random.default_rng(0).gamma(1, size=200) / ranks)[::-1].copy()
    used = slice(11, 100)  # ranks 12 to 100
    slope = np.polyfit(np.log(ranks[used]), np.log(eigenvalues[used]), 1, w=ranks[used] ** -0.5)[0]
    assert collapse.power_law_exponent(torch.from_numpy(eigenvalues)) == pytest.approx(-slope)
    slope = np.polyfit(np.log(ranks[11:54]), np.log(eigenvalues[11:54]), 1, w=ranks[11:54] ** -0.5)[0]
    assert collapse.power_law_exponent(torch.from_numpy(eigenvalues[:64])) == pytest.approx(-slope)
    assert collapse.power_law_exponent(torch.ones(30, dtype=torch.float64)) is None
    assert collapse.power_law_exponent(torch.tensor([1.0] * 15 + [0.0] * 85, dtype=torch.float64)) is None


def test_cosines_against_scikit_learn():
    x = normal(80, 6) + 1
    values = cosine_similarity(x.numpy())[np.triu_indices(80, 1)]
    found = collapse.cosines(x, bins=20)
    assert found["mean"] == pytest.approx(values.mean(), rel=1e-5)
    assert found["std"] == pytest.approx(values.std(ddof=1), rel=1e-5)
    np.testing.assert_allclose(found["density"], np.histogram(values, 20, (-1, 1), density=True)[0], rtol=1e-5)
    assert collapse.cosines(torch.ones(5, 3))["mean"] == pytest.approx(1)


def test_samples_are_seeded_and_without_replacement():
    rows = collapse.some_indices(1000, 50, seed=3)
    assert len(rows.unique()) == 50 and torch.equal(rows, rows.sort().values)
    assert torch.equal(rows, collapse.some_indices(1000, 50, seed=3))
    assert not torch.equal(rows, collapse.some_indices(1000, 50, seed=4))
    assert torch.equal(collapse.some_indices(10, 50, seed=3), torch.arange(10))


# ---- clusters --------------------------------------------------------------------------------------------------------


def test_entropy_of_one_gaussian_is_the_formula_s():
    x = normal(4000, 5) * torch.tensor([0.1, 1, 2, 3, 10]) - 7
    expected = 0.5 * np.log(2 * np.pi * np.e * x.double().numpy().var(axis=0)).sum()
    numbers, _ = collapse.mixture_entropy(x, 1)
    assert numbers["entropy"] == pytest.approx(expected, abs=0.05)
    isotropic, _ = collapse.mixture_entropy(3 * normal(4000, 5), 1)
    assert isotropic["entropy_per_dimension"] == pytest.approx(scipy.stats.norm.entropy(), abs=0.01)


def test_entropy_of_separated_clusters_adds_that_of_the_choice():
    x, groups = clusters(8, 0.01, count=4000, dim=4)
    share = np.bincount(groups) / len(groups)
    expected = scipy.stats.entropy(share) + 4 * scipy.stats.norm(scale=0.01).entropy()
    numbers, found = collapse.mixture_entropy(x, 8, seed=1)
    assert len(torch.stack([groups, found]).unique(dim=1).T) == 8  # one to one
    assert numbers["entropy"] == pytest.approx(expected, abs=0.1)


def test_entropy_and_scale():
    x, _ = clusters(5, 0.3, count=600, dim=3)
    one, two = (collapse.mixture_entropy(s * x + m, 10)[0] for s, m in ((1, 0), (100, 40)))
    assert two["entropy"] - one["entropy"] == pytest.approx(3 * math.log(100), abs=0.1)
    assert two["entropy_per_dimension"] == pytest.approx(one["entropy_per_dimension"], abs=0.03)
    assert collapse.mixture_entropy(x, 10)[0] == one  # seeded


def test_mixtures_start_from_the_clusters_moments():
    x, groups = clusters(4, 0.5, count=200, dim=3)
    groups[groups == 2] = 1  # leaves 2 empty
    start = collapse.moments(x, groups, 6)
    for c in (0, 1, 3):
        own = x[groups == c].double().numpy()
        assert start["weights_init"][c] == pytest.approx(len(own) / 200)
        np.testing.assert_allclose(start["means_init"][c], own.mean(axis=0), rtol=1e-6)
        np.testing.assert_allclose(1 / start["precisions_init"][c], own.var(axis=0) + 1e-6, rtol=1e-6)
    assert all(start["weights_init"][c] < 1e-15 for c in (2, 4, 5)) and np.isfinite(start["precisions_init"]).all()


@pytest.mark.filterwarnings("error")
def test_entropy_of_fewer_points_than_components():
    x = normal(20, 3).repeat(30, 1)
    numbers, groups = collapse.mixture_entropy(x, 50)
    narrow = scipy.stats.norm(scale=math.sqrt(collapse.LEAST_VARIANCE) * float(x.std(dim=0).mean())).entropy()
    assert numbers["entropy"] == pytest.approx(math.log(20) + 3 * narrow, abs=0.5)
    assert len(groups.unique()) == 20


@pytest.mark.parametrize("rate", [0.0, 0.3, 2.0, 20.0])
def test_gaussian_distortion_solves_the_water_filling(rate):
    values = np.array([5.0, 2.0, 2.0, 0.5, 0.01])

    def excess(level):
        return np.maximum(0, np.log(values / level) / 2).sum() - rate

    level = scipy.optimize.brentq(excess, 1e-12, 5.0) if rate else 5.0
    found = collapse.gaussian_distortion(torch.tensor([*values, 0.0], dtype=torch.float64), rate)
    assert found == pytest.approx(np.minimum(level, values).sum())


def test_tightness_is_the_formula_s():
    x, groups = clusters(9, 0.8, count=60, dim=4)
    groups[:3] = torch.tensor([20, 21, 22])  # alone in their groups
    within = {c: np.var(x[groups == c].double().numpy(), axis=0, ddof=1).sum() for c in range(9)}
    rate = scipy.stats.entropy(np.unique(groups, return_counts=True)[1])
    least = collapse.gaussian_distortion(collapse.covariance_eigenvalues(x), rate)
    expected = np.quantile([within[int(c)] / least for c in groups[3:]], 0.1)
    assert collapse.tightness(x, groups) == pytest.approx(expected)
    assert collapse.tightness(0.01 * x + 3, groups) == pytest.approx(expected, rel=1e-3)
    assert math.isnan(collapse.tightness(x, torch.arange(60)))
    assert math.isnan(collapse.tightness(torch.ones(60, 4), groups))


def test_code_usage_by_hand():
    usage = collapse.code_usage(torch.tensor([7, 7, 7, 1, 1, 4]), 10)
    assert usage["counts"] == [3, 2, 1] and usage["codes_used"] == 3 and usage["largest_share"] == 0.5
    assert usage["perplexity"] == pytest.approx(math.exp(scipy.stats.entropy([3, 2, 1])))


def test_tsne_of_separated_clusters_separates_them():
    x, groups = clusters(3, 0.1, count=90, dim=60)
    positions, rows = collapse.tsne(x, 60, seed=2)
    assert positions.shape == (60, 2)
    centres = np.stack([positions[groups[rows] == c].mean(axis=0) for c in range(3)])
    nearest = ((positions[:, None] - centres) ** 2).sum(axis=2).argmin(axis=1)
    assert (nearest == groups[rows].numpy()).all()


# ---- theory ----------------------------------------------------------------------------------------------------------


def test_embeddings_are_the_head_s_in_eval_mode():
    torch.manual_seed(0)
    head, x = CPLearnHead(6, 16), normal(50, 6)
    head(x)  # running statistics other than at the start
    expected = head.eval()(x)
    torch.testing.assert_close(collapse.embed(head.train(), x, torch.device("cpu"), rows=7), expected)


def test_alignment_of_codes_is_one_and_chance_is_not_zero():
    codes = rademacher_codes(16, 64)
    k = torch.randint(64, (300,), generator=torch.Generator().manual_seed(0))
    h = codes[:, k].T.float() * torch.linspace(0.1, 5, 300)[:, None]
    found = collapse.alignment(h, k, Dictionary.of(codes))
    assert found["mean"] == pytest.approx(1) and found["quantile_5"] == pytest.approx(1)
    best = cosine_similarity(np.random.default_rng(0).normal(size=(4000, 16)), codes.T.numpy()).max(axis=1).mean()
    assert found["chance"] == pytest.approx(best, abs=0.02)


def test_alignment_against_scikit_learn():
    codes, h = rademacher_codes(12, 40), normal(200, 12)
    cosines = cosine_similarity(h.numpy(), codes.T.numpy())
    found = collapse.alignment(h, torch.from_numpy(cosines.argmax(axis=1)), Dictionary.of(codes))
    assert found["mean"] == pytest.approx(cosines.max(axis=1).mean(), rel=1e-6)
    assert found["quantile_5"] == pytest.approx(np.quantile(cosines.max(axis=1), 0.05), rel=1e-6)


def test_off_diagonal_mass():
    h = normal(300, 8)
    moment = collapse.second_moment(h)
    assert moment.diagonal().mean() == pytest.approx(1)
    h = h - h.mean(dim=0)  # then it is Pearson's correlation
    squares = np.corrcoef(h.double().numpy(), rowvar=False) ** 2
    expected = 1 - np.trace(squares) / squares.sum()
    assert collapse.off_diagonal_mass(collapse.second_moment(h)) == pytest.approx(expected, rel=1e-5)
    same = normal(300, 1) * torch.tensor([1.0, -3, 10, 0.1])
    assert collapse.off_diagonal_mass(collapse.second_moment(same)) == pytest.approx(3 / 4)
    assert collapse.off_diagonal_mass(torch.diag(torch.tensor([1.0, 5.0, 9.0]))) == pytest.approx(0, abs=1e-7)


def test_block_cosines_against_scikit_learn():
    h, codes = normal(45, 6), torch.arange(45) % 7
    cosine, same = np.abs(cosine_similarity(h.numpy())), (codes[:, None] == codes).numpy()
    off_diagonal = ~np.eye(45, dtype=bool)
    found = collapse.block_cosines(h, codes, rows=8)
    assert found["within"] == pytest.approx(cosine[same & off_diagonal].mean(), rel=1e-5)
    assert found["between"] == pytest.approx(cosine[~same].mean(), rel=1e-5)
    chance = np.abs(cosine_similarity(normal(1000, 6).numpy())[np.triu_indices(1000, 1)]).mean()
    assert found["chance"] == pytest.approx(chance, rel=0.1)
    assert collapse.block_cosines(h, torch.arange(45))["within"] is None
    assert collapse.block_cosines(h, torch.zeros(45))["between"] is None


def test_corollaries_hold_where_embeddings_are_orthogonal_codes():
    """K = F, W^T W = F I, each code twice: H^T H is the identity, H H^T block-diagonal, and the loss Lemma 1's."""
    codes = hadamard_matrix(16)
    k = torch.arange(32) // 2
    tau = code_temperature(16, 16, batch_size=32, eps=1e-4)
    h = codes[:, k].T.double() / math.sqrt(32)
    torch.testing.assert_close(collapse.second_moment(h), torch.eye(16, dtype=torch.float64))
    blocks = collapse.block_cosines(h, k)
    assert blocks["within"] == pytest.approx(1) and blocks["between"] == pytest.approx(0, abs=1e-12)
    for prior in ("kl", "ce"):
        found = collapse.certificate(h, codes, tau, 0.5, prior, eps=1e-4)
        assert found["gap"] == pytest.approx(0, abs=1e-9) and found["gap_share"] == pytest.approx(0, abs=1e-9)
        assert found["information"] == pytest.approx(math.log(16), abs=0.02)  # p is hard but for eps
        assert found["mean_perplexity"] == pytest.approx(16)


@pytest.mark.parametrize("prior", ["kl", "ce"])
def test_certificate_is_the_loss_of_identical_views(prior, monkeypatch):
    monkeypatch.setattr(collapse, "LOGITS_AT_ONCE", 1000)  # batches of 15 images, the last of 7
    h, codes = normal(82, 12).double(), rademacher_codes(12, 64)
    expected, terms = cplearn_loss([h, h], codes, tau=2.5, beta=0.3, prior=prior)
    found = collapse.certificate(h, codes, 2.5, 0.3, prior, eps=1e-6)
    assert found["loss"] == pytest.approx(float(expected), rel=1e-10)
    assert found["entropy"] == pytest.approx(float(terms["invariance"]), rel=1e-10)
    if prior == "kl":
        assert found["information"] == pytest.approx(math.log(64) - found["prior"] - found["entropy"], rel=1e-10)
    assert found["prior"] == pytest.approx(float(terms["prior"]), rel=1e-10)
    mean = torch.softmax(h @ codes.double() / 2.5, dim=1).mean(dim=0)
    assert found["mean_perplexity"] == pytest.approx(math.exp(scipy.stats.entropy(mean)))
    single = collapse.certificate(h.float(), codes, 2.5, 0.3, prior, eps=1e-6)
    assert single["gap"] == pytest.approx(found["gap"], rel=1e-5)


def test_fewer_images_than_codes_leave_a_floor():
    codes = hadamard_matrix(32)
    h = codes[:, :8].T.double()  # 8 images, each on a code of its own
    found = collapse.certificate(h, codes, 0.1, 0.25, "kl", eps=1e-8)
    assert found["prior"] == pytest.approx(math.log(4)) and found["least_hard_prior"] == math.log(4)
    assert collapse.certificate(h, codes, 0.1, 0.25, "ce", eps=1e-8)["least_hard_prior"] == math.log(32)


@pytest.mark.parametrize("beta", [0.25, 1.0, 3.0])
def test_a_trivial_state_has_all_of_the_trivial_gap_and_no_information(beta):
    codes = rademacher_codes(16, 64)
    uniform = collapse.certificate(torch.zeros(50, 16).double(), codes, 0.1, beta, "kl", eps=1e-8)
    single = collapse.certificate(codes[:, :1].T.double().repeat(50, 1), codes, 0.1, beta, "kl", eps=1e-8)
    assert min(uniform["gap_share"], single["gap_share"]) == pytest.approx(1, abs=1e-4)
    assert uniform["information"] == pytest.approx(0, abs=1e-9) == single["information"]
    assert collapse.certificate(torch.zeros(50, 16).double(), codes, 0.1, 0, "kl", eps=1e-8)["gap_share"] is None


# ---- verdicts --------------------------------------------------------------------------------------------------------


def judged(x, codes=None, num_codes=512, **more):
    """What eval_collapse.py does: the least tightness of k-means groups and of codes."""
    eigenvalues = collapse.covariance_eigenvalues(x)
    groupings = [torch.from_numpy(kmeans_of_scikit_learn(x, k, restarts=1, seed=0)) for k in (10, 20, 50, 100)]
    usage = None
    if codes is not None:
        groupings.append(codes)
        usage = collapse.code_usage(codes, num_codes)
    tightness = min(collapse.tightness(x, groups, eigenvalues) for groups in groupings)
    return collapse.judge(feature_statistics(x), eigenvalues, tightness, usage, len(x), **more)


def random_codes(num_codes, count=1500):
    return torch.randint(num_codes, (count,), generator=torch.Generator().manual_seed(9))


HEALTHY = normal(1500, 384)
LINE = normal(1500, 1) @ normal(1, 384, seed=5)
NESTED, NESTED_GROUPS = clusters(300, 1e-3)
CASES = {
    "Gaussian": (HEALTHY, None, []),
    "Gaussian with random codes": (HEALTHY, random_codes(512), []),
    "Gaussian far from zero": (HEALTHY + 30, random_codes(512), []),
    "Gaussian of falling spectrum": (HEALTHY * torch.arange(1, 385) ** -0.5, None, []),
    "heavy tails": (HEALTHY * (0.7 * normal(1500, 1, seed=6)).exp(), None, []),
    "rectified": (HEALTHY.relu(), None, []),
    "20 clusters of real width": (clusters(20, 0.3)[0], None, []),
    "300 clusters of real width, one code each": (*clusters(300, 0.3), []),
    "constant": (torch.ones(1500, 384) + 1e-4 * HEALTHY, random_codes(512), ["representation"]),
    "constant, and so one code": (torch.ones(1500, 384), torch.zeros(1500, dtype=torch.int64), ["representation"]),
    "rank 3": (normal(1500, 3) @ normal(3, 384, seed=7), random_codes(512), ["dimensional"]),
    "a line, codes its intervals": (LINE, (LINE[:, 0].argsort().argsort() // 5), ["dimensional"]),
    "two codes for everything": (HEALTHY, random_codes(2), ["cluster"]),
    "one code for nearly everything": (HEALTHY, random_codes(400).clamp_min(396) - 396, ["cluster"]),
    "20 tight clusters": (clusters(20, 1e-3)[0], None, ["intracluster"]),
    "300 tight clusters, more than k-means looks for": (NESTED, NESTED_GROUPS, ["intracluster"]),
    "half of the images in tight clusters": (
        torch.cat([HEALTHY[:750], clusters(20, 1e-3, count=750)[0]]), None, ["intracluster"],
    ),
    "5 points": (clusters(5, 1e-4)[0], None, ["dimensional", "intracluster"]),  # which span 4 directions
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_planted_collapses_and_only_they_are_named(case):
    x, codes, expected = CASES[case]
    sentences, found = judged(x, codes)
    assert found == expected
    assert list(sentences) == ["representation", "dimensional", "cluster", "intracluster"]
    for kind, sentence in sentences.items():
        assert sentence.startswith("YES") == (kind in expected)
    assert sentences["cluster"].startswith("not known") == (codes is None)


def test_what_representation_collapse_implies_is_said():
    sentences, _ = judged(*CASES["constant"][:2])
    assert all("part of representation collapse" in sentences[kind] for kind in ("dimensional", "cluster"))


def test_verdicts_hold_their_numbers():
    sentences, _ = judged(HEALTHY, random_codes(2))
    assert sentences["cluster"].startswith("YES; 2 of 512 codes in use, perplexity 2.0, the largest holds 5")
    assert "of 384" in sentences["dimensional"]


def test_uniform_predictions_are_a_saddle_and_not_a_collapse():
    sentences, found = judged(HEALTHY, random_codes(2), entropy=0.999 * math.log(512))
    assert found == ["saddle"] and "99.9 % of log K" in sentences["saddle"]
    assert "saddle" not in judged(HEALTHY, random_codes(512), entropy=2.0)[0]
