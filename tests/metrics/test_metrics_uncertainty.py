"""Intervals and p-values against exact enumeration, draws of labels, and populations whose truth is known."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from hf_moecal.metrics import CalibrationAccumulator, calibration_report, expected_calibration_error, reliability_bins
from hf_moecal.metrics.binning import make_edges
from hf_moecal.metrics.chance import gamma_tail
from hf_moecal.metrics.groups import holm, miscalibrated
from hf_moecal.metrics.uncertainty import score_interval


def report(confidence, correct, **options):
    return calibration_report(confidence=confidence, correct=correct, ranked=False, **options)


# ---- where nothing varies -------------------------------------------------------------------------------------------


def test_twenty_sure_answers_that_are_all_right_prove_nothing():
    found = report(np.full(20, 0.99), np.ones(20, bool))
    assert found["calibrated_p"] == 1.0
    assert found["ece_interval"][0] == 0.0 and 0.15 < found["ece_interval"][1] < 0.18  # 0.832^20 = .025
    low, high = found["signed_gap_interval"]
    assert low <= -0.01 < 0 < 0.12 < high
    wrong = report(np.full(20, 0.99), [0] * 4 + [1] * 16)
    assert wrong["calibrated_p"] < 1e-3 and 0.03 < wrong["ece_interval"][0] < 0.19


@pytest.mark.parametrize("correct", [[1, 1, 1], [0, 0, 0], [1, 0, 1]])
def test_a_band_of_few_rows_is_wide(correct):
    found = reliability_bins([0.95] * 3, correct, bins=10)
    assert found["band_high"][9] - found["band_low"][9] > 0.6
    assert found["band_low"][9] <= found["accuracy"][9] <= found["band_high"][9]
    assert math.isnan(found["band_low"][0])


def test_bands_cover_at_every_rate():
    """Exact: the chance of each number of right answers, summed where its band holds the rate."""
    rates = np.linspace(0.001, 0.999, 500)
    for n in (1, 2, 3, 5, 10, 30, 100):
        k = np.arange(n + 1)
        low, high = score_interval(k / n, np.full(n + 1, n))
        choose = np.array([math.comb(n, i) for i in k], float)
        chance = choose * rates[:, None] ** k * (1 - rates[:, None]) ** (n - k)
        held = (low <= rates[:, None]) & (rates[:, None] <= high)
        assert (chance * held).sum(1).min() >= 0.94


def test_certain_and_impossible_confidences():
    assert report([1.0] * 30, [1] * 30)["calibrated_p"] == 1.0
    assert report([1.0] * 30, [1] * 29 + [0])["calibrated_p"] < 1e-9
    low, high = report([1.0] * 30, [1] * 29 + [0])["ece_interval"]
    assert 0 < low < 1 / 30 < high
    assert report([0.0] * 5, [0] * 5)["ece_interval"][0] == 0.0


# ---- exact twins ----------------------------------------------------------------------------------------------------


def test_p_is_that_of_all_outcomes():
    """Four bins of equal confidences: every outcome enumerated, with its chance and its two statistics."""
    counts, levels, hits = [3, 4, 5, 6], [0.1, 0.45, 0.7, 0.95], [1, 2, 1, 6]
    confidence = np.repeat(levels, counts)
    correct = np.concatenate([np.arange(n) < k for n, k in zip(counts, hits, strict=True)])
    found = report(confidence, correct)
    as_much = np.zeros(1)
    rates = np.array(levels)
    overall = 0.0
    mean = float(confidence.mean())
    for outcome in itertools.product(*(range(n + 1) for n in counts)):
        chance = math.prod(
            math.comb(n, k) * c**k * (1 - c) ** (n - k) for n, k, c in zip(counts, outcome, levels, strict=True)
        )
        error = np.abs(np.array(counts) * rates - outcome).sum() / sum(counts)
        as_much += chance * (error >= found["ece"] - 1e-9)
    for k in range(sum(counts) + 1):  # the gap's test takes all rows for one binomial
        chance = math.comb(sum(counts), k) * mean**k * (1 - mean) ** (sum(counts) - k)
        overall += chance * (abs(mean - k / sum(counts)) >= abs(found["signed_gap"]) - 1e-9)
    assert found["calibrated_p"] == pytest.approx(min(1.0, 2 * min(float(as_much[0]), overall)), rel=0.02)


@pytest.mark.parametrize("n, low", [(60, 0.35), (400, 0.35), (400, 0.9)])
def test_p_is_the_share_of_drawn_labels(n, low):
    """Labels drawn at the model's own confidences, which differ within bins."""
    rng = np.random.default_rng(1)
    confidence = rng.uniform(low, 1.0, n)
    correct = rng.random(n) < confidence - 0.05 * (1 - low) - 0.01
    found = report(confidence, correct)
    drawn = rng.random((4000, n)) < confidence
    index = np.clip(np.ceil(confidence * 15) - 1, 0, 14).astype(int)
    inside = index[:, None] == np.arange(15)
    errors = np.abs((confidence - drawn) @ inside).sum(1) / n
    gaps = np.abs((confidence - drawn).mean(1))
    p = 2 * min((errors >= found["ece"] - 1e-12).mean(), (gaps >= abs(found["signed_gap"]) - 1e-12).mean())
    assert 0 < p and found["calibrated_p"] == pytest.approx(min(p, 1.0), rel=0.25, abs=0.004)


def test_classwise_p_of_few_rows_is_the_share_of_drawn_labels():
    rng = np.random.default_rng(0)
    probs = rng.dirichlet([0.3] * 3, 40)
    labels = (rng.random((40, 1)) > np.cumsum(probs**0.5 / (probs**0.5).sum(1, keepdims=True), 1)[:, :-1]).sum(1)
    found = calibration_report(labels, probs=probs, mode="classwise", ranked=False)
    below = np.cumsum(probs, 1)[:, :-1]
    errors = [
        calibration_report((rng.random((40, 1)) > below).sum(1), probs=probs, mode="classwise", intervals=False)["ece"]
        for _ in range(120)
    ]
    assert found["calibrated_p"] == pytest.approx(np.mean(np.array(errors) >= found["ece"]), abs=0.1)


def test_gamma_tail_has_the_moments_of_a_chi_square():
    for value, p in ((11.070, 0.05), (15.086, 0.01), (20.515, 0.001)):  # chi-square of five degrees of freedom
        assert gamma_tail(value, 5.0, 10.0, 40.0) == pytest.approx(p, rel=0.12)


def test_the_interval_starts_above_zero_exactly_where_p_is_below_five_percent():
    rng = np.random.default_rng(0)
    seen = set()
    for n in (20, 60, 300):
        for shift in (0.0, 0.05, 0.1, 0.2):
            for _ in range(6):
                confidence = rng.uniform(0.4, 1.0, n)
                found = report(confidence, rng.random(n) < confidence - shift)
                assert (found["ece_interval"][0] > 0) == (found["calibrated_p"] < 0.05)
                assert found["ece_interval"][0] <= found["ece"] <= found["ece_interval"][1]
                assert found["ece_interval"][0] <= found["ece_debiased"] + 1e-9 or found["calibrated_p"] < 0.05
                seen.add(found["calibrated_p"] < 0.05)
    assert seen == {True, False}


# ---- coverage, where the truth is known (the large simulation is scripts/benchmark_intervals.py) --------------------

SCALES = (1.0, 0.6, 1.7)  # calibrated, overconfident, underconfident


def population(sharp, scale, classes=3, size=60_000):
    rng = np.random.default_rng(0)
    logits = (0.3 if sharp else 1.6) * rng.standard_normal((size, classes))
    if sharp:
        logits[np.arange(size), rng.integers(0, classes, size)] += rng.uniform(4, 7, size)
    both = [np.exp(s * logits) for s in (1.0, scale)]
    return [part / part.sum(1, keepdims=True) for part in both]


def true_error(confidence, rate, edges):
    index = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, len(edges) - 2)
    return np.abs(np.bincount(index, confidence - rate)).sum() / len(confidence)


def holds(ends, value):
    return ends[0] <= value + 1e-12 and value <= ends[1] + 1e-12


KINDS = [("equal_width", "top_label"), ("equal_mass", "top_label"), ("equal_width", "classwise")]


@pytest.mark.parametrize("strategy, mode", KINDS)
@pytest.mark.parametrize("n", [20, 50, 200, 1000])
def test_intervals_cover_the_truth_and_calibrated_models_are_believed(n, strategy, mode):
    covered, gaps, alarms, bins = [], [], [], []
    for sharp, scale in itertools.product((True, False), SCALES):
        probs, truth = population(sharp, scale)
        at = np.arange(len(probs)), probs.argmax(1)
        top = [(probs[at], truth[at])]
        scores = top if mode == "top_label" else list(zip(probs.T, truth.T, strict=True))
        for seed in range(10):
            rng = np.random.default_rng([seed, n])
            rows = rng.integers(0, len(probs), n)
            labels = (rng.random((n, 1)) > np.cumsum(truth[rows], 1)[:, :-1]).sum(1)
            found = calibration_report(labels, probs=probs[rows], strategy=strategy, mode=mode, ranked=False)
            edges = [make_edges(strategy, c[rows], 15).edges for c, _ in scores]
            error = np.mean([true_error(c, r, each) for (c, r), each in zip(scores, edges, strict=True)])
            covered.append(holds(found["ece_interval"], error))
            gaps.append(mode != "top_label" or holds(found["signed_gap_interval"], (top[0][0] - top[0][1]).mean()))
            if scale == 1.0:
                alarms.append(found["calibrated_p"] < 0.05)
                diagram = reliability_bins(probs[at][rows], probs[rows].argmax(1) == labels, strategy=strategy)
                bands = zip(diagram["band_low"], diagram["band_high"], strict=True)
                bins += [holds(band, c) for band, c in zip(bands, diagram["confidence"], strict=True) if c == c]
    # of 60 and of 20 samples: what .93 and .05 fall short of or exceed in one of a thousand tests
    assert sum(covered) >= 50 and sum(gaps) >= 50
    assert sum(alarms) <= 5 and np.mean(bins) >= 0.93


# ---- groups ---------------------------------------------------------------------------------------------------------


def grouped(sizes, wrong, seed, low=0.4):
    rng = np.random.default_rng(seed)
    confidence = rng.uniform(low, 1.0, sum(sizes))
    groups = np.repeat(np.arange(len(sizes)), sizes)
    correct = rng.random(len(confidence)) < confidence - 0.05 * (groups == wrong)
    return report(confidence, correct, groups=groups)


def test_where_nothing_is_wrong_no_group_stands_out():
    found = [grouped([50] * 20, None, seed) for seed in range(8)]
    assert sum(each["worst_group"] is not None for each in found) <= 3
    assert all((each["worst_group_ece"] is None) == (each["worst_group"] is None) for each in found)


@pytest.mark.parametrize("low", [0.4, 0.97])
def test_a_large_group_that_is_wrong_is_named_among_small_ones_that_are_not(low):
    found = [grouped([30] * 20 + [2000], 20, seed, low) for seed in range(8)]
    assert sum(each["worst_group"] == "20" for each in found) >= 5
    named = next(each for each in found if each["worst_group"] == "20")
    assert named["group_p"]["20"] < 0.05 and named["groups"]["20"]["ece_interval"][0] > 0


def test_holm_by_hand():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": None}) == {"a": 0.04, "b": 0.09, "c": 0.09, "d": 1.0}
    certain = {
        "small": {"calibrated_p": 0.001, "ece_interval": [0.01, 0.5], "ece": 0.3},
        "large": {"calibrated_p": 0.002, "ece_interval": [0.04, 0.06], "ece": 0.05},
        "fine": {"calibrated_p": 0.4, "ece_interval": [0.0, 0.06], "ece": 0.02},
    }
    assert miscalibrated(certain) == ["large", "small"]
    assert report([0.9], [1], groups=["only"], intervals=False)["worst_group"] is None


# ---- weights --------------------------------------------------------------------------------------------------------

COUNTED = (
    *("ece", "ece_l2", "ece_max", "smooth_ece", "signed_gap", "accuracy", "confidence", "nll", "brier"),
    *("aurc", "auroc"),
)


@pytest.mark.parametrize("mode", ["top_label", "classwise", "positive_class"])
@pytest.mark.parametrize("strategy", ["equal_width", "equal_mass"])
def test_a_weight_is_how_often_a_row_is_there(mode, strategy):
    rng = np.random.default_rng(0)
    classes = 2 if mode == "positive_class" else 4
    probs, labels = rng.dirichlet(np.ones(classes), 150).round(2), rng.integers(0, classes, 150)
    probs[:, -1] = 1 - probs[:, :-1].sum(1)
    probs = np.abs(probs)
    probs /= probs.sum(1, keepdims=True)
    weight, group = rng.integers(0, 4, 150), rng.choice(["a", "b"], 150)
    options = {"mode": mode, "strategy": strategy}
    found = calibration_report(labels, probs=probs, sample_weight=weight, groups=group, **options)
    rows = np.repeat(np.arange(150), weight)
    twin = calibration_report(labels[rows], probs=probs[rows], groups=group[rows], **options)
    for mine, theirs in ((found, twin), (found["groups"]["a"], twin["groups"]["a"])):
        for key in COUNTED:
            assert mine[key] == pytest.approx(theirs[key], abs=1e-9), key
        for key, value in theirs["brier_decomposition"].items():
            assert mine["brier_decomposition"][key] == pytest.approx(value, abs=1e-12)
    assert found["n"] == (weight > 0).sum() and found["n_ignored"] == (weight == 0).sum()
    if mode == "top_label":
        fast = expected_calibration_error(labels, probs=probs, sample_weight=weight, strategy=strategy)
        assert fast == pytest.approx(found["ece"], abs=1e-12)


def test_equal_weights_change_nothing_and_uneven_ones_widen_intervals():
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.4, 1, 400)
    correct = rng.random(400) < confidence - 0.1
    plain, same = report(confidence, correct), report(confidence, correct, sample_weight=np.full(400, 0.5))
    for key in ("ece", "ece_debiased", "ece_noise_floor", "calibrated_p", "ece_interval", "signed_gap_interval"):
        assert same[key] == pytest.approx(plain[key], abs=1e-9)
    few = report(confidence, correct, sample_weight=np.where(np.arange(400) < 40, 50.0, 1e-3))
    wide = few["signed_gap_interval"][1] - few["signed_gap_interval"][0]
    assert wide > 2.5 * (plain["signed_gap_interval"][1] - plain["signed_gap_interval"][0])


def test_weights_in_batches_and_in_bins():
    rng = np.random.default_rng(0)
    confidence, correct, weight = rng.random(90), rng.random(90) < 0.5, rng.integers(1, 4, 90)
    for fold in (None, 15):
        parts = CalibrationAccumulator(fold_bins=fold)
        for piece in np.array_split(np.arange(90), 4):
            parts.add(confidence=confidence[piece], correct=correct[piece], sample_weight=weight[piece])
        whole = report(confidence, correct, sample_weight=weight)
        found = parts.report(ranked=False)
        for key in ("ece", "ece_debiased", "signed_gap", "calibrated_p", "n"):
            assert found[key] == pytest.approx(whole[key], abs=1e-12)
    rows = np.repeat(np.arange(90), weight)
    mine = reliability_bins(confidence, correct, sample_weight=weight)
    twin = reliability_bins(confidence[rows], correct[rows])
    for key in ("edges", "accuracy", "confidence"):
        np.testing.assert_allclose(mine[key], twin[key], atol=1e-12)


# ---- conventions ----------------------------------------------------------------------------------------------------


def test_of_equal_maxima_the_first_class_wins():
    found = calibration_report([0, 1, 2], probs=[[0.4, 0.4, 0.2]] * 3, intervals=False)
    assert found["accuracy"] == pytest.approx(1 / 3)
    assert (
        found["accuracy"] == calibration_report([0, 1, 2], logits=[[1.0, 1.0, 0.0]] * 3, intervals=False)["accuracy"]
    )
    half = calibration_report([0, 1], probs=[0.5, 0.5], mode="positive_class", intervals=False)
    assert half["accuracy"] == 0.5  # at one half exactly, the answer is class 0


def test_labels_of_probability_zero_are_counted():
    found = calibration_report([1, 0, 0], probs=[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], groups=["a", "b", "a"])
    assert found["nll"] == math.inf and found["n_zero_probability"] == 2
    assert [found["groups"][name]["n_zero_probability"] for name in "ab"] == [2, 0]
    assert math.isnan(report([0.9], [1])["n_zero_probability"])  # not known without the whole distribution


@pytest.mark.parametrize("mode", ["top_label", "positive_class", "classwise"])
def test_the_brier_score_is_what_its_terms_add_up_to_for_two_classes(mode):
    rng = np.random.default_rng(0)
    probs, labels = rng.dirichlet([1, 1], 80), rng.integers(0, 2, 80)
    found = calibration_report(labels, probs=probs, mode=mode, intervals=False)
    terms = found["brier_decomposition"]
    assert terms["brier"] == pytest.approx(found["brier"], abs=1e-12)
    total = terms["reliability"] - terms["resolution"] + terms["uncertainty"] + terms["within_bins"]
    assert total == pytest.approx(found["brier"], abs=1e-12)
