"""Drift statistics against scipy, a plain Hotelling-style twin, and their error rate."""

import numpy as np
import pytest
from scipy import sparse, stats

from hf_moecal.drift.count_test import CountDrift, _pool_rare
from hf_moecal.drift.number_test import NumberDrift
from hf_moecal.drift.statistics import DriftDetector, adjust


def one_hot(codes, categories):
    n = len(codes)
    return sparse.csr_array((np.ones(n), (np.arange(n), codes)), shape=(n, categories))


def choose_experts(rng, weights, n, k):
    """[n, experts] shares of k different experts each, drawn by Gumbel top-k."""
    ids = np.argpartition(-(np.log(weights) + rng.gumbel(size=(n, len(weights)))), k - 1, axis=1)[:, :k]
    return sparse.csr_array((np.full(n * k, 1 / k), ids.ravel(), np.arange(0, n * k + 1, k)), shape=(n, len(weights)))


@pytest.mark.parametrize("decimals", [1, 2, 12], ids=["heavy ties", "ties", "no ties"])
@pytest.mark.parametrize(("n", "m"), [(40, 7), (1000, 300), (300, 5000)])
def test_ks_in_pieces_is_scipys(n, m, decimals):
    rng = np.random.default_rng(n + decimals)
    reference, window = rng.beta(5, 1, n).round(decimals), rng.beta(4, 1, m).round(decimals)
    test = NumberDrift("confidence", reference)
    for part in np.array_split(window, 5):
        test.update(part)
    found, wanted = test.results()[0], stats.ks_2samp(reference, window, method="asymp")
    assert found.effect == pytest.approx(wanted.statistic, abs=1e-14)
    assert found.p_value == pytest.approx(wanted.pvalue, rel=1e-9)
    assert found.shift == pytest.approx((window.mean() - reference.mean()) / reference.std())


def test_ks_of_a_long_reference_is_exact_to_its_resolution():
    rng = np.random.default_rng(0)
    reference, window = rng.normal(size=200_000), rng.normal(0.1, 1, 3000)
    test = NumberDrift("x", reference)
    test.update(window)
    assert test.results()[0].effect == pytest.approx(stats.ks_2samp(reference, window).statistic, abs=1 / 10_000)
    assert len(test.points) <= 10_000


def test_constant_reference_has_no_shift_but_a_test():
    test = NumberDrift("x", np.ones(100))
    test.update(np.zeros(100))
    found = test.results()[0]
    assert (found.effect, found.shift) == (1.0, None) and found.p_value < 1e-20


def test_one_count_per_sequence_gives_pearsons_chi_square():
    rng = np.random.default_rng(0)
    reference, window = rng.integers(0, 5, 900), rng.choice(5, 200, p=[0.3, 0.2, 0.2, 0.2, 0.1])
    test = CountDrift("prediction", one_hot(reference, 5))
    test.update(one_hot(window, 5))
    table = [np.bincount(codes, minlength=5) for codes in (reference, window)]
    wanted = stats.chi2_contingency(table, correction=False)
    found = test.results()[0]
    assert found.statistic == pytest.approx(wanted.statistic, rel=1e-10)
    assert found.p_value == pytest.approx(wanted.pvalue, rel=1e-8)
    shares = [counts / counts.sum() for counts in table]
    assert found.effect == pytest.approx(np.abs(shares[0] - shares[1]).sum() / 2)


def test_dependent_counts_against_a_plain_twin():
    rng = np.random.default_rng(1)
    weights = np.array([0.4, 0.3, 0.2, 0.1])
    reference, window = choose_experts(rng, weights, 800, 2), choose_experts(rng, weights[::-1], 300, 2)
    test = CountDrift("expert_load", reference)
    test.update(window[:100])
    test.update(window[100:])
    a, b = reference.toarray(), window.toarray()
    both = np.concatenate([a, b])
    covariance = np.cov(both.T, bias=True) * (1 / len(a) + 1 / len(b))
    difference = b.mean(axis=0) - a.mean(axis=0)
    assert test.results()[0].statistic == pytest.approx(difference @ np.linalg.pinv(covariance) @ difference, rel=1e-8)


def test_rare_categories_are_pooled_until_each_expects_five():
    expected = np.array([100.0, 0.0, 4.0, 3.0, 50.0, 1.0])
    groups = _pool_rare(expected)
    assert np.bincount(groups, expected).min() >= 5
    assert groups[0] != groups[4]
    assert _pool_rare(np.array([1.0, 2.0])).tolist() == [0, 0]


@pytest.mark.parametrize(("experts", "k", "n"), [(4, 2, 200), (64, 2, 200), (64, 8, 1000)])
def test_expert_load_keeps_its_level(experts, k, n):
    rng = np.random.default_rng(0)
    weights = rng.dirichlet(np.full(experts, 0.7))
    p_values = []
    for _ in range(15):
        test = CountDrift("expert_load", choose_experts(rng, weights, 3000, k))
        for _ in range(20):
            test.update(choose_experts(rng, weights, n, k))
            p_values.append(test.results()[0].p_value)
            test.reset()
    alarms = int((np.array(p_values) <= 0.05).sum())
    assert alarms <= stats.binom.ppf(0.999, len(p_values), 0.05)
    assert alarms >= 3  # the level is used, not merely kept by a test that never rejects


def test_a_plain_chi_square_on_all_counts_would_not_keep_it():
    """The experts of a token are never equal, tokens of a sequence resemble each other: counting them apart fails."""
    rng = np.random.default_rng(0)
    weights, alarms = np.array([0.4, 0.3, 0.2, 0.1]), {"counts": 0, "sequences": 0}
    for _ in range(100):
        # 20 tokens per sequence, each sequence with its own preferences
        draws = [rng.dirichlet(8 * weights, size=m)[:, None] for m in (300, 200)]
        counts = [rng.multinomial(20, draw[:, 0]) for draw in draws]
        test = CountDrift("expert_load", sparse.csr_array(counts[0] / 20))
        test.update(sparse.csr_array(counts[1] / 20))
        alarms["sequences"] += test.results()[0].p_value <= 0.05
        alarms["counts"] += stats.chi2_contingency([c.sum(axis=0) for c in counts]).pvalue <= 0.05
    assert alarms["counts"] >= 40 and alarms["sequences"] <= 12


def test_holm_by_hand_and_benjamini_hochberg():
    assert adjust([0.01, 0.04, 0.03, 0.005]).tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert adjust([0.9, 0.8]).tolist() == [1.0, 1.0]
    bh = adjust([0.01, 0.04, 0.03, 0.005], correction="benjamini-hochberg")
    assert bh.tolist() == pytest.approx([0.02, 0.04, 0.04, 0.02])


def test_drift_needs_certainty_and_size():
    rng = np.random.default_rng(0)
    reference = {"small": rng.normal(size=20_000), "large": rng.normal(size=20_000), "none": rng.normal(size=20_000)}
    detector = DriftDetector(reference, alpha=0.01, minimum_effect=0.1)
    detector.update(
        {"small": rng.normal(0.1, 1, 20_000), "large": rng.normal(1, 1, 20_000), "none": rng.normal(size=20_000)}
    )
    found = {feature.feature: feature for feature in detector.close()}
    assert found["large"].drift and not found["none"].drift
    assert found["small"].p_adjusted < 1e-9 and not found["small"].drift


def test_a_window_can_be_taken_up_again():
    rng = np.random.default_rng(0)
    reference = {"x": rng.normal(size=500), "y": one_hot(rng.integers(0, 3, 500), 3)}
    chunk = {"x": rng.normal(size=80), "y": one_hot(rng.integers(0, 3, 80), 3)}
    whole, first, second = (DriftDetector(reference) for _ in range(3))
    for _ in range(2):
        whole.update(chunk)
    first.update(chunk)
    second.load(first.arrays())
    second.update(chunk)
    assert second.close() == whole.close()


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"alpha": 0}, "alpha"), ({"minimum_effect": 1.5}, "minimum_effect"), ({"correction": "sidak"}, "holm")],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        DriftDetector({"x": np.arange(5.0)}, **settings)


def test_no_feature():
    with pytest.raises(ValueError, match="no feature"):
        DriftDetector({})
