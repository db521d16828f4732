"""The numbers of hf_moecal.metrics against values worked out by hand, exact fractions and other libraries."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hf_moecal.metrics import (
    CalibrationAccumulator,
    calibration_report,
    expected_calibration_error,
    reliability_bins,
    routing_groups,
    table_report,
)
from hf_moecal.metrics.binning import bin_index, equal_mass, equal_width
from hf_moecal.metrics.rows import top_label


def report(confidence, correct, **options):
    return calibration_report(confidence=confidence, correct=correct, **{"intervals": False, **options})


def draw(n=400, classes=3, seed=0):
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet(np.ones(classes), n)
    return probs, rng.integers(0, classes, n)


def assert_same(a, b, *, skip=(), path=""):
    assert set(a) == set(b), path
    for key in a:
        if key in skip:
            continue
        if isinstance(a[key], dict):
            assert_same(a[key], b[key], skip=skip, path=f"{path}/{key}")
        elif isinstance(a[key], str):
            assert a[key] == b[key], f"{path}/{key}"
        else:
            np.testing.assert_allclose(a[key], b[key], rtol=0, atol=1e-12, err_msg=f"{path}/{key}")


def test_import_needs_numpy_only():
    heavy = ("torch", "transformers", "evaluate", "datasets", "scipy", "sklearn", "matplotlib")
    code = f"import sys, hf_moecal.metrics; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


# ---- the cases that well-known libraries get wrong, worked out by hand ----------------------------------------------


def test_confidence_of_exactly_one_counts():
    assert report([1.0, 1.0], [1, 0])["ece"] == 0.5
    assert expected_calibration_error(confidence=[1.0, 1.0], correct=[True, False]) == 0.5


def test_rounding_above_one_is_clipped_and_changes_nothing_else():
    assert report([1.0 + 1e-7, 0.25], [1, 0])["ece"] == pytest.approx(0.125, abs=1e-15)
    found = calibration_report([0, 1], probs=[[1 + 1e-7, -1e-7], [0.25, 0.75]], intervals=False)
    assert found["ece"] == pytest.approx(0.125, abs=1e-15)


def test_confidence_zero_belongs_to_the_first_bin():
    assert report([0.0, 0.0], [0, 1])["ece"] == 0.5
    assert reliability_bins([0.0], [1], bins=3)["count"] == [1, 0, 0]


def test_edges_are_right_closed():
    for bins in (2, 3, 7, 10, 15, 49, 100):
        edges = [k / bins for k in range(1, bins + 1)]
        assert bin_index(np.array(edges), equal_width(bins)).tolist() == list(range(bins))
        above = np.nextafter(np.array(edges[:-1]), 2.0)
        assert bin_index(above, equal_width(bins)).tolist() == list(range(1, bins))


def test_ignored_labels_are_counted_and_left_out():
    probs = [[0.9, 0.1], [0.9, 0.1], [0.2, 0.8]]
    found = calibration_report(
        [0, -100, 1], probs=probs, groups=["a", "b", "a"], group_names=["a", "b"], intervals=False
    )
    assert (found["n"], found["n_ignored"], found["accuracy"]) == (2, 1, 1.0)
    assert found["groups"]["b"]["n"] == 0 and math.isnan(found["groups"]["b"]["ece"])
    assert_same(
        {k: v for k, v in found.items() if k in ("ece", "nll", "brier")},
        {
            k: v
            for k, v in calibration_report([0, 1], probs=[probs[0], probs[2]], intervals=False).items()
            if k in ("ece", "nll", "brier")
        },
    )


def test_empty_group_is_nan_with_n_zero():
    found = calibration_report([0], probs=[[0.7, 0.3]], groups=["a"], group_names=["a", "b"])["groups"]["b"]
    assert found["n"] == 0
    assert all(math.isnan(found[key]) for key in ("ece", "accuracy", "nll", "ece_noise_floor", "auroc", "aurc"))


def test_one_label_present_and_one_sided_auroc():
    found = report([0.9, 0.8], [1, 1])
    assert found["ece"] == pytest.approx(0.15) and math.isnan(found["auroc"])


def test_ties_stay_together_in_equal_mass_bins():
    confidence = np.array([0.5] * 6 + [0.9] * 2)
    correct = np.array([1, 1, 1, 0, 0, 0, 1, 1])
    found = report(confidence, correct, strategy="equal_mass", bins=4)
    assert found["ece"] == pytest.approx(0.25 * 0.1, abs=1e-15)
    assert equal_mass(confidence, 4).bins == 2
    shuffled = np.random.default_rng(0).permutation(8)
    assert report(confidence[shuffled], correct[shuffled], strategy="equal_mass", bins=4)["ece"] == found["ece"]


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "bfloat16"])
def test_low_precision_is_upcast(dtype):
    probs = torch.tensor([[0.75, 0.25], [0.5, 0.5]], dtype=getattr(torch, dtype))
    found = calibration_report(torch.tensor([0, 1]), probs=probs, intervals=False)
    assert found["ece"] == 0.375 and found["confidence"] == 0.625
    assert found["nll"] == pytest.approx(-(math.log(0.75) + math.log(0.5)) / 2, abs=1e-12)


def test_more_rows_than_float32_can_count():
    n = 2**24 + 10
    confidence, correct = np.ones(n, np.float32), np.ones(n, bool)
    correct[-3:] = False
    assert expected_calibration_error(confidence=confidence, correct=correct) == pytest.approx(3 / n, rel=1e-12)


def test_positive_class_is_another_question_than_top_label():
    probs = np.array([[0.9, 0.1]] * 9 + [[0.1, 0.9]])
    labels = np.array([0] * 9 + [0])
    assert calibration_report(labels, probs=probs, intervals=False)["ece"] == pytest.approx(0.0, abs=1e-12)
    positive = calibration_report(labels, probs=probs, mode="positive_class", intervals=False)
    assert positive["ece"] == pytest.approx(0.9 * 0.1 + 0.1 * 0.9, abs=1e-12)
    assert positive["accuracy"] == 0.9 and positive["confidence"] == pytest.approx(0.18)
    one_column = calibration_report(labels, probs=probs[:, 1], mode="positive_class", intervals=False)
    assert_same(positive, one_column)


def test_a_perfectly_calibrated_group_of_100_scores_noise_and_the_floor_says_so():
    rng = np.random.default_rng(0)
    found = []
    for _ in range(200):
        confidence = np.maximum(rng.beta(5, 2, 100), 0.3)
        found.append(report(confidence, rng.random(100) < confidence, ranked=False))
    mean = {key: np.mean([f[key] for f in found]) for key in ("ece", "ece_noise_floor", "ece_debiased")}
    assert mean["ece"] > 0.08
    assert mean["ece_noise_floor"] == pytest.approx(mean["ece"], rel=0.05)
    assert mean["ece_debiased"] < 0.65 * mean["ece"]


def test_certain_and_wrong_has_infinite_nll():
    assert calibration_report([1], probs=[[1.0, 0.0]])["nll"] == math.inf
    assert calibration_report([1], logits=[[2000.0, 0.0]])["nll"] == 2000.0


# ---- twins ----------------------------------------------------------------------------------------------------------


def twin_ece(confidence, correct, edges):
    """Exact rational arithmetic over right-closed bins with the given edges."""
    gaps = [Fraction(0)] * (len(edges) - 1)
    for c, y in zip(confidence, correct, strict=True):
        place = next(k for k in range(len(gaps)) if k == len(gaps) - 1 or Fraction(c) <= Fraction(edges[k + 1]))
        gaps[place] += Fraction(c) - Fraction(y)
    return float(sum(map(abs, gaps)) / len(confidence))


pairs = st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=60)


@given(pairs, st.integers(1, 40))
@example([(k / 15, k % 2 == 0) for k in range(16)], 15)
@example([(1.0, True)] * 5 + [(0.0, False)], 15)
@settings(deadline=None, max_examples=150)
def test_ece_is_that_of_exact_fractions(rows, bins):
    confidence, correct = map(list, zip(*rows, strict=True))
    edges = [k / bins for k in range(bins + 1)]
    found = report(confidence, correct, bins=bins, ranked=False)
    assert found["ece"] == pytest.approx(twin_ece(confidence, correct, edges), abs=1e-12)
    assert expected_calibration_error(confidence=confidence, correct=correct, bins=bins) == pytest.approx(
        found["ece"], abs=1e-12
    )
    bounds = [*equal_mass(np.array(confidence), bins).edges]
    mass = report(confidence, correct, bins=bins, strategy="equal_mass", ranked=False)["ece"]
    assert mass == pytest.approx(twin_ece(confidence, correct, bounds), abs=1e-12)


@given(pairs)
@settings(deadline=None, max_examples=80)
def test_ranking_figures_are_those_of_plain_loops(rows):
    confidence, correct = map(list, zip(*rows, strict=True))
    found = report(confidence, correct)
    scores = [
        Fraction(1) if a > b else Fraction(1, 2) if a == b else Fraction(0)
        for a, y in rows
        if y
        for b, z in rows
        if not z
    ]
    if scores:
        assert found["auroc"] == pytest.approx(float(sum(scores) / len(scores)), abs=1e-12)
    # expected number of errors among the k most confident, ties in random order
    risks = []
    for k in range(1, len(rows) + 1):
        threshold = sorted(confidence)[-k]
        above = [y for c, y in rows if c > threshold]
        tied = [y for c, y in rows if c == threshold]
        errors = above.count(False) + Fraction(tied.count(False), len(tied)) * (k - len(above))
        risks.append(Fraction(errors, k))
    assert found["aurc"] == pytest.approx(float(sum(risks) / len(risks)), abs=1e-12)


@pytest.mark.parametrize("strategy", ["equal_width", "equal_mass"])
def test_other_errors_and_the_brier_decomposition_in_plain_loops(strategy):
    rng = np.random.default_rng(3)
    confidence = rng.beta(4, 2, 300)
    correct = rng.random(300) < confidence**2
    found = report(confidence, correct, strategy=strategy)
    edges = reliability_bins(confidence, correct, strategy=strategy)["edges"]
    n, l2, largest, unbiased, reliability, resolution = 300, 0.0, 0.0, 0.0, 0.0, 0.0
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        inside = (confidence > low) & (confidence <= high)
        m = inside.sum()
        if not m:
            continue
        c, y = confidence[inside].mean(), correct[inside].mean()
        l2 += m / n * (c - y) ** 2
        largest = max(largest, abs(c - y))
        unbiased += m / n * ((c - y) ** 2 - y * (1 - y) / (m - 1)) if m > 1 else 0.0
        reliability += m / n * (c - y) ** 2
        resolution += m / n * (y - correct.mean()) ** 2
    assert found["ece_l2"] == pytest.approx(math.sqrt(l2), abs=1e-12)
    assert found["ece_max"] == pytest.approx(largest, abs=1e-12)
    assert found["ece_l2_debiased"] == pytest.approx(math.sqrt(max(unbiased, 0)), abs=1e-12)
    terms = found["brier_decomposition"]
    assert terms["reliability"] == pytest.approx(2 * reliability, abs=1e-12)
    assert terms["resolution"] == pytest.approx(2 * resolution, abs=1e-12)
    assert terms["brier"] == pytest.approx(2 * ((confidence - correct) ** 2).mean(), abs=1e-12)
    total = terms["reliability"] - terms["resolution"] + terms["uncertainty"] + terms["within_bins"]
    assert total == pytest.approx(terms["brier"], abs=1e-12)
    assert found["signed_gap"] == pytest.approx(confidence.mean() - correct.mean(), abs=1e-12)


def test_classwise_is_the_mean_of_the_positive_class_of_each():
    probs, labels = draw()
    for strategy in ("equal_width", "equal_mass"):
        whole = calibration_report(labels, probs=probs, mode="classwise", strategy=strategy, intervals=False)
        each = [
            calibration_report(
                (labels == k).astype(int), probs=probs[:, k], mode="positive_class", strategy=strategy, intervals=False
            )
            for k in range(3)
        ]
        for key in ("ece", "ece_debiased", "ece_noise_floor", "smooth_ece"):
            assert whole[key] == pytest.approx(np.mean([e[key] for e in each]), abs=1e-12)
        assert whole["ece_l2"] == pytest.approx(math.sqrt(np.mean([e["ece_l2"] ** 2 for e in each])), abs=1e-12)
        assert whole["ece_max"] == max(e["ece_max"] for e in each)
        assert whole["brier"] == pytest.approx(sum(e["brier"] for e in each), abs=1e-12)
        assert whole["brier_decomposition"]["brier"] == pytest.approx(whole["brier"], abs=1e-12)


def test_logits_equal_probs():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(50, 4)), rng.integers(0, 4, 50)
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    for mode in ("top_label", "classwise"):
        a = calibration_report(labels, logits=logits, mode=mode)
        assert_same(a, calibration_report(labels, probs=probs, mode=mode))
    two = logits[:, :2]
    a = calibration_report(labels % 2, logits=two, mode="positive_class")
    assert_same(a, calibration_report(labels % 2, logits=two[:, 1] - two[:, 0], mode="positive_class"))


def test_hard_references_are_the_special_case_of_soft_ones():
    probs, labels = draw()
    soft = np.eye(3)[labels]
    for mode in ("top_label", "classwise"):
        a = calibration_report(labels, probs=probs, mode=mode)
        assert_same(a, calibration_report(soft, probs=probs, mode=mode))


def test_soft_references_are_the_mean_over_raters():
    probs, _ = draw(40)
    raters = np.random.default_rng(1).integers(0, 3, (40, 10))
    soft = np.stack([(raters == k).mean(1) for k in range(3)], 1)
    found = calibration_report(soft, probs=probs, intervals=False)
    each = [calibration_report(raters[:, r], probs=probs, intervals=False) for r in range(10)]
    for key in ("accuracy", "nll", "brier", "signed_gap"):
        assert found[key] == pytest.approx(np.mean([e[key] for e in each]), abs=1e-12)
    assert found["brier_decomposition"]["brier"] == pytest.approx(
        np.mean([e["brier_decomposition"]["brier"] for e in each]), abs=1e-12
    )
    assert report([0.8, 0.6], [0.7, 0.7])["ece"] == pytest.approx(0.1, abs=1e-12)


def test_confidence_with_predictions_equals_probs():
    probs, labels = draw()
    a = calibration_report(labels, probs=probs)
    b = calibration_report(labels, confidence=probs.max(1), predictions=probs.argmax(1))
    assert_same(a, b, skip=("nll", "brier", "n_zero_probability"))
    assert math.isnan(b["nll"]) and math.isnan(b["brier"])


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_fast_reduction_equals_the_plain_one(dtype):
    probs, labels = draw(3000, 7)
    probs = probs.astype(dtype)
    probs[10] = [0.5, 0, 0.5, 0, 0, 0, -0.0]
    confidence, event, kept = top_label(labels, probs)
    assert kept.all() and (confidence == probs.max(1)).all() and (event == (probs.argmax(1) == labels)).all()
    again = top_label(labels, np.asfortranarray(probs))
    assert (again[0] == confidence).all() and (again[1] == event).all()


# ---- groups, streaming, uncertainty ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["top_label", "classwise"])
@pytest.mark.parametrize("strategy", ["equal_width", "equal_mass"])
def test_a_group_is_the_report_of_its_rows(mode, strategy):
    probs, labels = draw(500)
    domain = np.random.default_rng(1).choice(["movie", "tweet"], 500)
    lang = np.random.default_rng(2).integers(0, 3, 500)
    options = {"mode": mode, "strategy": strategy}
    found = calibration_report(
        labels, probs=probs, groups={"domain": domain, "lang": lang}, intersections=True, **options
    )
    assert list(found["groups"])[:5] == ["domain=movie", "domain=tweet", "lang=0", "lang=1", "lang=2"]
    assert len(found["groups"]) == 5 + 6
    for name, rows in {
        "domain=tweet": domain == "tweet",
        "lang=2": lang == 2,
        "domain=movie & lang=1": (domain == "movie") & (lang == 1),
    }.items():
        alone = calibration_report(labels[rows], probs=probs[rows], **options)
        assert_same(found["groups"][name], {key: alone[key] for key in found["groups"][name]})
    assert found["group_spread"]["accuracy"] == pytest.approx(
        max(g["accuracy"] for g in found["groups"].values()) - min(g["accuracy"] for g in found["groups"].values())
    )
    assert json.loads(json.dumps(found))["n"] == 500


@pytest.mark.parametrize("mode", ["top_label", "classwise", "positive_class"])
@pytest.mark.parametrize("fold", [None, 15])
def test_streaming_merging_and_order_change_nothing(mode, fold):
    probs, labels = draw(600, 2 if mode == "positive_class" else 3)
    domain = np.random.default_rng(1).choice(["a", "b", "c"], 600)
    rows = np.random.default_rng(2).permutation(600)
    parts = [CalibrationAccumulator(mode=mode, fold_bins=fold) for _ in range(3)]
    for number, piece in enumerate(np.array_split(rows, 11)):
        parts[number % 3].add(labels[piece], probs=probs[piece], groups=domain[piece])
    for part in parts[1:]:
        parts[0].merge(part)
    whole = calibration_report(labels, probs=probs, groups=domain, mode=mode, ranked=fold is None)
    skip = ("ece_interval", "calibrated_p", "worst_group", "worst_group_ece", "group_p") if mode == "classwise" else ()
    assert_same(whole, parts[0].report(), skip=skip)


def test_folding_keeps_memory_constant():
    accumulator = CalibrationAccumulator(fold_bins=15)
    for seed in range(5):
        probs, labels = draw(seed=seed)
        accumulator.add(labels, probs=probs)
    assert len(accumulator) == 2000 and not accumulator.rows
    assert sum(tally.moments.size for tally in accumulator.tallies.values()) == 7 * 15 * 2


def test_small_group_does_not_win_by_noise():
    rng = np.random.default_rng(5)
    big = np.maximum(rng.beta(5, 2, 20000), 0.3)
    small = np.maximum(rng.beta(5, 2, 80), 0.3)
    correct = np.concatenate([rng.random(20000) < big - 0.05, rng.random(80) < small])
    found = report(np.concatenate([big, small]), correct, groups=["big"] * 20000 + ["small"] * 80, intervals=True)
    assert found["groups"]["small"]["ece"] > found["groups"]["big"]["ece"]
    assert found["worst_group"] == "big"


def test_classwise_interval_knows_that_classes_share_rows():
    """With two classes both errors are the same number, so the interval is that of one class, not narrower."""
    rng = np.random.default_rng(0)
    p = rng.uniform(0.2, 0.8, 4000)
    labels = (rng.random(4000) < np.clip(p + 0.1, 0, 1)).astype(int)
    probs = np.stack([1 - p, p], 1)
    one = calibration_report(labels, probs=probs, mode="positive_class")["ece_interval"]
    both = calibration_report(labels, probs=probs, mode="classwise")["ece_interval"]
    assert (both[1] - both[0]) == pytest.approx(one[1] - one[0], rel=0.35)


def test_noise_floor_is_the_mean_of_simulations():
    rng = np.random.default_rng(0)
    confidence = rng.beta(6, 1, 150)
    floor = report(confidence, confidence > 0.5)["ece_noise_floor"]
    drawn = [
        expected_calibration_error(confidence=confidence, correct=rng.random(150) < confidence) for _ in range(4000)
    ]
    assert floor == pytest.approx(np.mean(drawn), rel=0.03)


def test_reliability_bins_with_a_band():
    probs, labels = draw(400)
    confidence, correct = probs.max(1), probs.argmax(1) == labels
    found = reliability_bins(confidence, correct, bins=10)
    assert len(found["edges"]) == 11 and sum(found["count"]) == 400
    assert all(isinstance(value, list) for value in found.values())
    shares = zip(found["count"], found["confidence"], found["accuracy"], strict=True)
    ece = sum(n / 400 * abs(c - a) for n, c, a in shares if n)
    assert ece == pytest.approx(report(confidence, correct, bins=10)["ece"], abs=1e-12)
    for n, low, mean, high in zip(*(found[k] for k in ("count", "band_low", "accuracy", "band_high")), strict=True):
        assert (n == 0 and math.isnan(low)) or low <= mean <= high


def test_routing_groups_and_table_report():
    probs, labels = draw(200)
    rng = np.random.default_rng(0)
    table = {
        "label": labels,
        "probs": probs,
        "group": np.where(np.arange(200) < 50, "a", "b"),
        "routing_entropy": rng.random(200),
        "expert_ids": rng.permuted(np.tile(np.arange(12), (200, 1)), axis=1)[:, :2],
        "expert_weights": rng.dirichlet([1, 1], 200),
    }
    assert list(table_report(table)["groups"]) == ["a", "b"]
    found = table_report(table, routing=["routing_entropy", "dominant_expert"], intervals=False)["groups"]
    assert [g["n"] for name, g in found.items() if name.startswith("routing_entropy=")] == [50] * 4
    assert sum(g["n"] for name, g in found.items() if name.startswith("dominant_expert=")) == 200
    assert {"group=a", "group=b"} <= set(found)
    winner = table["expert_ids"][np.arange(200), table["expert_weights"].argmax(1)]
    assert routing_groups(table, "dominant_expert") == [f"expert {w:02d}" for w in winner]
    assert len(set(routing_groups({"regret": [0.0] * 9 + [1.0]}, "regret"))) == 2
    from datasets import Dataset

    as_lists = {name: np.asarray(column).tolist() for name, column in table.items()}
    assert_same(table_report(Dataset.from_dict(as_lists)), table_report(table))
    del table["probs"]
    table |= {"confidence": probs.max(1), "prediction": probs.argmax(1)}
    assert table_report(table)["ece"] == pytest.approx(calibration_report(labels, probs=probs)["ece"])


# ---- other libraries, where their conventions coincide --------------------------------------------------------------


def test_agrees_with_scikit_learn():
    from sklearn.metrics import brier_score_loss, log_loss, roc_auc_score

    probs, labels = draw(500)
    found = calibration_report(labels, probs=probs, intervals=False)
    assert found["nll"] == pytest.approx(log_loss(labels, probs), abs=1e-12)
    correct = probs.argmax(1) == labels
    assert found["auroc"] == pytest.approx(roc_auc_score(correct, probs.max(1)), abs=1e-12)
    assert found["brier_decomposition"]["brier"] == pytest.approx(
        2 * brier_score_loss(correct, probs.max(1)), abs=1e-12
    )


@pytest.mark.parametrize("norm, key", [("l1", "ece"), ("l2", "ece_l2"), ("max", "ece_max")])
def test_agrees_with_torchmetrics(norm, key):
    functional = pytest.importorskip("torchmetrics.functional.classification")
    probs, labels = draw(500)
    theirs = functional.multiclass_calibration_error(
        torch.from_numpy(probs), torch.from_numpy(labels), num_classes=3, n_bins=15, norm=norm
    )
    assert calibration_report(labels, probs=probs, intervals=False)[key] == pytest.approx(float(theirs), abs=1e-6)


def test_agrees_with_netcal():
    metrics = pytest.importorskip("netcal.metrics")
    probs, labels = draw(450)
    confidence, correct = probs.max(1), (probs.argmax(1) == labels).astype(int)
    theirs = metrics.ECE(bins=15).measure(confidence, correct)
    assert report(confidence, correct)["ece"] == pytest.approx(float(theirs), abs=1e-12)


def test_smooth_ece_agrees_with_relplot():
    relplot = pytest.importorskip("relplot")
    rng = np.random.default_rng(0)
    for n, shift in ((60, 0.0), (1000, 0.05), (1000, 0.2)):
        confidence = rng.beta(4, 2, n)
        correct = (rng.random(n) < np.clip(confidence - shift, 0, 1)).astype(float)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = relplot.smECE(confidence, correct)
        assert report(confidence, correct)["smooth_ece"] == pytest.approx(theirs, abs=2e-3)  # their grid of bandwidths
    assert report([1.0, 1.0], [1, 0])["smooth_ece"] == pytest.approx(0.5, abs=1e-9)


def test_debiased_errors_agree_with_the_authors_library():
    calibration = pytest.importorskip("calibration")
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.02, 1.0, 900)
    correct = (rng.random(900) < confidence - 0.08).astype(int)
    edges = [k / 15 for k in range(1, 16)]
    binned = calibration.utils.bin(list(zip(confidence, correct, strict=True)), edges)
    found = report(confidence, correct)
    assert found["ece_l2_debiased"] ** 2 == pytest.approx(calibration.utils.unbiased_square_ce(binned), abs=1e-12)
    np.random.seed(0)
    theirs = calibration.utils.normal_debiased_ce(binned, power=1, resamples=4000)
    assert found["ece_debiased"] == pytest.approx(theirs, abs=2e-3)
