"""Every bad input gets one sentence that says what came and what to do; nothing is guessed or swallowed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_moecal.metrics import (
    CalibrationAccumulator,
    calibration_metrics,
    calibration_report,
    expected_calibration_error,
    metric_path,
    reliability_bins,
    renormalized_table,
    routing_groups,
    table_report,
)


P = [[0.9, 0.1], [0.2, 0.8]]
L = [0, 1]
NAN, INF = float("nan"), float("inf")

BAD = {
    "nothing": ({}, "exactly one of probs, logits and confidence, got none"),
    "two sources": ({"labels": L, "probs": P, "logits": P}, "exactly one of .* got probs, logits"),
    "no labels": ({"probs": P}, "labels are missing"),
    "one dimension": ({"labels": L, "probs": [0.9, 0.2]}, r"probs must be 2-D, got shape \(2,\)"),
    "three dimensions": ({"labels": L, "probs": [P, P]}, r"probs must be 2-D, got shape \(2, 2, 2\)"),
    "a scalar": ({"labels": L, "probs": 0.5}, "must be a list, array or tensor of numbers, got float"),
    "one column": ({"labels": [0], "probs": [[1.0]]}, "one column; two classes or more"),
    "ragged rows": ({"labels": L, "probs": [[0.9, 0.1], [1.0]]}, "rows of different lengths"),
    "strings": ({"labels": L, "probs": [["a", "b"], ["c", "d"]]}, "probs holds strings, not numbers"),
    "one string": ({"labels": L, "probs": "probs.npy"}, "list, array or tensor of numbers, got str"),
    "a mapping": ({"labels": L, "probs": {"a": 1}}, "got dict"),
    "objects": ({"labels": L, "probs": np.array(P, dtype=object)}, "probs holds objects"),
    "missing entry": ({"labels": L, "probs": [[0.9, None], [0.2, 0.8]]}, "probs holds objects"),
    "complex": ({"labels": L, "probs": np.array(P, dtype=complex)}, "complex numbers"),
    "masked": ({"labels": L, "probs": np.ma.array(P, mask=[[0, 0], [1, 1]])}, "masked array; its mask would be lost"),
    "other device": ({"labels": L, "probs": torch.empty(2, 2, device="meta")}, r"tensor on meta; move it .*\.cpu\(\)"),
    "sparse": ({"labels": L, "probs": torch.tensor(P).to_sparse()}, r"sparse tensor; .*to_dense"),
    "empty": ({"labels": [], "probs": np.empty((0, 2))}, "probs is empty"),
    "empty confidence": ({"confidence": [], "correct": []}, "confidence is empty"),
    "NaN": ({"labels": L, "probs": [[NAN, 0.1], [0.2, 0.8]]}, "must sum to 1, but row 0 sums to nan"),
    "infinity": ({"labels": L, "probs": [[0.9, 0.1], [INF, 0.8]]}, "must sum to 1, but row 1 sums to inf"),
    "rows not summing to one": (
        {"labels": L, "probs": [[0.9, 0.1], [0.2, 0.7]]},
        "row 1 sums to 0.9; if these .*renormalize=True",
    ),
    "logits as probs": (
        {"labels": L, "probs": [[2.0, -1.0], [3.0, -2.0]]},
        "must lie in .*; if .* pass them as logits",
    ),
    "logits as probs, sums off": (
        {"labels": L, "probs": [[2.0, 1.0], [3.0, 2.0]]},
        "sums to 3; .* pass them as logits",
    ),
    "percent": (
        {"confidence": [90.0, 80.0], "correct": [1, 0]},
        r"confidence must lie in \[0, 1\], but row 0 holds 90",
    ),
    "negative confidence": ({"confidence": [0.5, -0.1], "correct": [1, 0]}, "row 1 holds -0.1"),
    "NaN confidence": ({"confidence": [NAN, 0.1], "correct": [1, 0]}, "row 0 holds nan"),
    "infinite confidence": ({"confidence": [0.3, INF], "correct": [1, 0]}, "row 1 holds inf"),
    "NaN logits": ({"labels": L, "logits": [[NAN, 1], [0, 1]]}, "logits must be finite, or -inf .* but row 0"),
    "infinite logits": ({"labels": L, "logits": [[0, 1], [INF, 1]]}, "logits must be finite, or -inf .* but row 1"),
    "labels out of range": (
        {"labels": [0, 2], "probs": P},
        r"labels must be in 0..1 \(-100 means no label\).* row 1 is 2",
    ),
    "negative labels": ({"labels": [-1, 1], "probs": P}, "row 0 is -1"),
    "float labels": ({"labels": [0.0, 1.0], "probs": P}, "labels must be whole numbers, got floats"),
    "string labels": ({"labels": ["a", "b"], "probs": P}, "labels are names .*label2id, or name the classes"),
    "labels too few": ({"labels": [0], "probs": P}, "labels has 1 rows but probs has 2"),
    "labels too many": ({"labels": [0, 1, 1], "probs": P}, "labels has 3 rows but probs has 2"),
    "all labels ignored": ({"labels": [-100, -100], "probs": P}, r"no example with a label \(2 ignored\)"),
    "soft labels of other width": ({"labels": [[1.0], [1.0]], "probs": P}, "labels has 1 columns but there are 2"),
    "soft labels not summing": ({"labels": [[0.5, 0.1], [1, 0]], "probs": P}, "rows of labels must sum to 1"),
    "soft labels negative": ({"labels": [[1.5, -0.5], [1, 0]], "probs": P}, "fraction of raters for each class"),
    "correct missing": ({"confidence": [0.5]}, "confidence alone says nothing"),
    "correct too short": ({"confidence": [0.5, 0.6], "correct": [1]}, "correct has 1 rows but confidence has 2"),
    "correct as class": ({"confidence": [0.5, 0.6], "correct": [1, 2]}, "0 or 1, or the fraction of raters"),
    "correct with probs": (
        {"labels": L, "probs": P, "correct": [1, 1]},
        "correct goes with confidence, not with probs",
    ),
    "correct and labels": ({"labels": L, "confidence": [0.5, 0.6], "correct": [1, 1]}, "either correct, or labels"),
    "confidence and labels only": ({"labels": L, "confidence": [0.5, 0.6]}, "or predictions .* mode='positive_class'"),
    "float predictions": ({"labels": L, "confidence": [0.5, 0.6], "predictions": [0.1, 0.2]}, "must be class indices"),
    "predictions with probs": ({"labels": L, "probs": P, "predictions": L}, "predictions goes with confidence"),
    "classwise of confidence": (
        {"confidence": [0.5], "correct": [1], "mode": "classwise"},
        "needs the probability of every class",
    ),
    "positive class of three": (
        {"labels": [0], "probs": [[0.2, 0.3, 0.5]], "mode": "positive_class"},
        "is for two classes, but probs has 3 columns",
    ),
    "positive class with label 2": ({"labels": [0, 2], "probs": [0.1, 0.9], "mode": "positive_class"}, r"0\.\.1"),
    "positive class of logits": (
        {"labels": [0, 1], "probs": [-3.0, 4.0], "mode": "positive_class"},
        "before the sigmoid go into logits",
    ),
    "unknown mode": ({"labels": L, "probs": P, "mode": "toplabel"}, "mode must be one of 'top_label'"),
    "unknown strategy": ({"labels": L, "probs": P, "strategy": "quantile"}, "strategy must be one of 'equal_width'"),
    "zero bins": ({"labels": L, "probs": P, "bins": 0}, "bins must be a whole number of at least 1, got 0"),
    "fractional bins": ({"labels": L, "probs": P, "bins": 1.5}, "bins must be a whole number"),
    "boolean bins": ({"labels": L, "probs": P, "bins": True}, "bins must be a whole number"),
    "intervals as a number": ({"labels": L, "probs": P, "intervals": 1000}, "intervals must be one of True, False"),
    "weight too short": ({"labels": L, "probs": P, "sample_weight": [1.0]}, "sample_weight has 1 rows"),
    "negative weight": ({"labels": L, "probs": P, "sample_weight": [1.0, -0.5]}, "row 1 holds -0.5"),
    "NaN weight": ({"labels": L, "probs": P, "sample_weight": [NAN, 1.0]}, "row 0 holds nan"),
    "no weight": ({"labels": L, "probs": P, "sample_weight": [0, 0]}, r"no example with a label \(2 ignored"),
    "groups too short": ({"labels": L, "probs": P, "groups": ["a"]}, "groups has 1 rows but the data has 2"),
    "one group name": ({"labels": L, "probs": P, "groups": "tweets"}, "got the single string 'tweets'"),
    "missing group": ({"labels": L, "probs": P, "groups": ["a", None]}, "holds None in row 1"),
    "NaN group": ({"labels": L, "probs": P, "groups": [1.0, NAN]}, "holds 1.0 in row 0"),
    "mixed groups": ({"labels": L, "probs": P, "groups": ["a", 1]}, "mixes strings and numbers"),
    "no group column": ({"labels": L, "probs": P, "groups": {}}, "empty mapping"),
    "masked groups": ({"labels": L, "probs": P, "groups": np.ma.array([0, 1])}, "masked array"),
    "unknown group": ({"labels": L, "probs": P, "groups": ["a", "c"], "group_names": ["a", "b"]}, "unknown group 'c'"),
    "group names, no groups": ({"labels": L, "probs": P, "group_names": ["a"]}, "same columns with every batch"),
    "no group names": ({"labels": L, "probs": P, "groups": ["a", "b"], "group_names": []}, "group_names is empty"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_with_its_remedy(case):
    arguments, message = BAD[case]
    arguments = dict(arguments)
    with pytest.raises(ValueError, match=message) as error:
        calibration_report(arguments.pop("labels", None), **arguments)
    text = str(error.value)
    assert text.endswith((".", ")")) and "\n" not in text


def test_unknown_keyword_is_never_swallowed():
    with pytest.raises(TypeError, match="n_bins"):
        calibration_report(L, probs=P, n_bins=10)


@pytest.mark.parametrize(
    "confidence, correct, message",
    [
        ([1.1], [1], "row 0 holds 1.1"),
        ([0.5, NAN], [1, 1], "holds nan"),
        ([[0.5]], [1], "must be 1-D"),
        ([0.5], [1, 1], "correct has 2 rows"),
        ([0.5], [3], "0 or 1"),
    ],
)
def test_the_fast_paths_check_as_well(confidence, correct, message):
    for strategy in ("equal_width", "equal_mass"):
        with pytest.raises(ValueError, match=message):
            expected_calibration_error(confidence=confidence, correct=correct, strategy=strategy)
    with pytest.raises(ValueError, match=message):
        reliability_bins(confidence, correct)


@pytest.mark.parametrize("row", [[1.2, -0.2, 0.0], [0.5, 0.5, 0.5], [NAN, 0.5, 0.5], [2.0, -3.0, 2.0]])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_single_bad_row_in_a_long_matrix_is_found(row, dtype):
    probs = np.full((5000, 3), 1 / 3, dtype)
    probs[4321] = row
    with pytest.raises(ValueError, match="row 4321"):
        expected_calibration_error(np.zeros(5000, int), probs=probs)
    with pytest.raises(ValueError, match="row 4321"):
        calibration_report(np.zeros(5000, int), probs=probs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("classes", [2, 3, 1000])
def test_the_precision_that_came_in_says_how_far_a_sum_may_be_off(dtype, classes):
    logits = 3 * torch.randn(300, classes, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(300, dtype=torch.long)
    exact = calibration_report(labels, logits=logits, intervals=False)
    probs = logits.to(dtype).softmax(-1)
    assert (probs.double().sum(-1) - 1).abs().max() > 1e-4
    step = 2 * torch.finfo(dtype).eps
    for given in (
        probs,
        probs.float(),
        probs.double(),
        probs.float().numpy(),
        probs.tolist(),
    ):
        found = calibration_report(labels, probs=given, intervals=False)
        assert expected_calibration_error(labels, probs=given) == pytest.approx(found["ece"], abs=1e-6)
        assert found["confidence"] == pytest.approx(exact["confidence"], abs=step)
    spoiled = probs.clone()
    spoiled[7, 0] += 0.25
    with pytest.raises(ValueError, match="row 7 sums to 1.2"):
        calibration_report(labels, probs=spoiled)
    raters = probs.float().numpy()
    assert calibration_report(raters, probs=probs, intervals=False)["n"] == 300


def test_a_value_of_low_precision_may_round_above_one():
    above = torch.tensor([1.0078125, 0.5], dtype=torch.bfloat16)
    assert calibration_report(confidence=above, correct=[1, 1], intervals=False)["confidence"] == 0.75
    with pytest.raises(ValueError, match="row 0 holds 1.0079"):
        calibration_report(confidence=[1.0079, 0.5], correct=[1, 1])


@pytest.mark.parametrize("decimals, classes", [(2, 3), (3, 20), (4, 1000)])
def test_rounded_probabilities_are_renormalized_when_asked(decimals, classes):
    rng = np.random.default_rng(0)
    exact = rng.dirichlet(np.full(classes, 0.3), 200)
    probs, labels = exact.round(decimals), rng.integers(0, classes, 200)
    with pytest.raises(ValueError, match=r"renormalize=True \(--renormalize\)"):
        calibration_report(labels, probs=probs)
    rows = probs / probs.sum(1, keepdims=True)
    for mode in ("top_label", "classwise"):
        found = calibration_report(labels, probs=probs, renormalize=True, mode=mode, intervals=False)
        plain = calibration_report(labels, probs=rows, mode=mode, intervals=False)
        assert {k: found[k] for k in ("ece", "nll", "brier")} == {k: plain[k] for k in ("ece", "nll", "brier")}
    table = renormalized_table({"label": labels, "probs": probs, "id": np.arange(200)})
    np.testing.assert_allclose(table["probs"], rows, rtol=0, atol=1e-15)
    assert expected_calibration_error(labels, probs=probs, renormalize=True) == pytest.approx(
        table_report(table, intervals=False)["ece"], abs=1e-12
    )
    from datasets import Dataset

    stored = renormalized_table(Dataset.from_dict({"label": labels, "probs": probs.tolist()}))
    np.testing.assert_allclose(stored["probs"][:], rows, rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    "row, message",
    [
        ([2.0, 1.0], "rounding does not explain that"),
        ([0.5, 0.4], "may be off 1 by 0.02"),
        ([1.2, -0.2], "must lie in"),
        ([NAN, 0.5], "holds nan"),
    ],
)
def test_renormalizing_never_turns_scores_into_probabilities(row, message):
    for call in (calibration_report, expected_calibration_error):
        with pytest.raises(ValueError, match=message) as error:
            call(L, probs=[[0.5, 0.5], row], renormalize=True)
        assert "row 1" in str(error.value)


def test_excluded_classes_have_a_logit_of_minus_infinity():
    logits = np.array([[1.0, -INF, 0.5], [-INF, 0.0, -INF]])
    finite = np.where(np.isfinite(logits), logits, -1e30)
    for mode in ("top_label", "classwise"):
        found = calibration_report([0, 1], logits=logits, mode=mode, ranked=False)
        assert found == calibration_report([0, 1], logits=finite, mode=mode, ranked=False)
    assert calibration_report([1, 1], logits=logits, intervals=False)["nll"] == INF
    for row, message in (([-INF] * 3, "only -inf"), ([INF, 0.0, 0.0], r"NaN or \+inf"), ([NAN, 0.0, 0.0], "NaN")):
        with pytest.raises(ValueError, match=f"row 1 holds {message}"):
            calibration_report([0, 1], logits=[[0.0, 0.0, 0.0], row])


def test_a_batch_that_raises_leaves_no_trace():
    accumulator = CalibrationAccumulator()
    accumulator.add(L, probs=P, groups=["a", "b"])
    for bad in ({"groups": ["a"]}, {"groups": {"x": ["a", "b"]}}, {"groups": [1, 2]}, {}):
        with pytest.raises(ValueError):
            accumulator.add(L, probs=P, **bad)
    assert len(accumulator) == 2 and list(accumulator.report()["groups"]) == ["a", "b"]


def test_accumulators_that_differ_do_not_merge():
    for a, b in (({"mode": "classwise"}, {}), ({"fold_bins": 10}, {"fold_bins": 15})):
        with pytest.raises(ValueError, match="cannot merge"):
            CalibrationAccumulator(**a).merge(CalibrationAccumulator(**b))
    folded = CalibrationAccumulator(fold_bins=10)
    folded.add(L, probs=P)
    with pytest.raises(ValueError, match="folded into 10 equal-width bins"):
        folded.report(bins=15)


def test_tables_and_paths():
    with pytest.raises(ValueError, match="no column 'prediction'"):
        table_report({"label": L, "confidence": [0.5, 0.5]})
    with pytest.raises(ValueError, match="routing_entropy holds NaN"):
        routing_groups({"routing_entropy": [0.1, NAN]}, "routing_entropy")
    with pytest.raises(ValueError, match="no metric 'mce'"):
        metric_path("mce")


def test_compute_metrics_refuses_what_it_cannot_read():
    compute_metrics = calibration_metrics()
    with pytest.raises(ValueError, match="one row per token"):
        compute_metrics((np.zeros((2, 3, 4)), np.zeros((2, 3), int)))
    with pytest.raises(ValueError, match="no labels"):
        compute_metrics((np.zeros((2, 3)), None))
