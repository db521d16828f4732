"""The cross-validated choice of a calibrator."""

from __future__ import annotations

import json
from contextlib import contextmanager

import numpy as np
import pytest
from datasets import Dataset

from hf_moecal.calibration import GroupedTemperatureCalibrator, TemperatureCalibrator, solver
from hf_moecal.calibration import rows as rows_module
from hf_moecal.calibration import temperature as temperature_module
from hf_moecal.calibration.selection import CANDIDATES, calibrate_table
from hf_moecal.calibration.solver import log_softmax
from tests.calibration.helpers import drawn, routed


pytestmark = pytest.mark.filterwarnings("ignore:.*labelled rows")


def test_the_comparison_is_plain_data_and_complete():
    result = calibrate_table(routed())
    assert [entry["method"] for entry in result.comparison] == list(CANDIDATES)
    assert sum(entry["chosen"] for entry in result.comparison) == 1
    assert result.calibrator.method == "shrunk_temperature" and result.data["held_out"] == "groups"
    assert json.loads(json.dumps(result.comparison)) == result.comparison
    assert "shrunk_temperature " in result.lines()[2] and result.lines()[2].endswith("*")
    assert result.before["ece"] > 2 * result.after["ece"] and set(result.after["groups"]) == {"a", "b", "c"}


def test_held_out_loss_is_what_a_plain_loop_gives():
    logits, label = drawn(90)
    result = calibrate_table({"logits": 3 * logits, "label": label}, method="temperature", folds=3, seed=5)
    folds = np.random.default_rng(5).permutation(90) % 3
    losses = []
    for fold in range(3):
        train, test = folds != fold, folds == fold
        fitted = TemperatureCalibrator().fit({"logits": 3 * logits[train], "label": label[train]})
        probs = fitted.apply({"logits": 3 * logits[test]})["probs"]
        losses += [-np.log(p[y]) for p, y in zip(probs, label[test], strict=True)]
    assert result.comparison[1]["nll"] == pytest.approx(np.mean(losses), abs=1e-12)
    assert result.after["nll"] == pytest.approx(np.mean(losses), abs=1e-9)


def test_a_group_is_judged_unseen():
    # Each group needs its own temperature: a method that knows the group looks perfect on rows and useless on groups.
    logits, label = drawn(4000)
    scale = np.repeat([0.5, 1.0, 2.0, 8.0], 1000)
    table = {"logits": logits * scale[:, None], "label": label, "group": np.repeat(list("abcd"), 1000)}
    auto = {entry["method"]: entry for entry in calibrate_table(table).comparison}
    assert auto["grouped_temperature"]["nll"] == pytest.approx(auto["temperature"]["nll"], abs=1e-12)
    known = calibrate_table(table, method="grouped_temperature")
    assert known.data["held_out"] == "rows" and known.after["nll"] < auto["temperature"]["nll"] - 0.05
    assert calibrate_table(table, method=GroupedTemperatureCalibrator()).after["nll"] == known.after["nll"]


def test_no_calibration_wins_when_a_group_would_be_spoilt():
    # In-domain data ask for a sharper model; the unseen group is hurt by it more than the others gain.
    logits, label = drawn(3000, spread=1)
    scale = np.repeat([0.7, 0.7, 2.2], 1000)
    table = {"logits": logits * scale[:, None], "label": label, "group": np.repeat(["in", "near", "far"], 1000)}
    result = calibrate_table(table)
    assert result.calibrator.method == "none" and "No calibration is best" in result.lines()[-2]
    assert result.before == result.after
    by_rows = calibrate_table({name: table[name] for name in ("logits", "label")})
    assert by_rows.calibrator.method != "none"


def test_a_richer_method_must_earn_its_place():
    chosen = [
        calibrate_table({"logits": 2 * logits, "label": label}).calibrator.method
        for logits, label in (drawn(400, 3, seed=seed) for seed in range(10))
    ]
    assert chosen.count("shrunk_temperature") >= 8
    logits, label = drawn(3000, 3)
    tilted = {"logits": logits * [1, 3, 6] + [0, 2, -1], "label": label}
    assert calibrate_table(tilted).calibrator.method in {"vector", "matrix", "platt"}


def test_own_settings_and_columns_are_used():
    table = {**routed(), "domain": np.repeat(["x", "y"], 400)}
    result = calibrate_table(table, method=GroupedTemperatureCalibrator(by="domain"))
    assert set(result.calibrator.groups) == {"x", "y"}
    label = table["label"].copy()
    label[::7] = -100
    dataset = Dataset.from_dict({**table, "label": label})
    assert calibrate_table(dataset, method="per_expert_temperature").data["n"] == int((label >= 0).sum())


@pytest.mark.parametrize(
    "arguments, said",
    [
        ({"method": "magic"}, "Unknown method 'magic'"),
        ({"folds": 1}, "folds must be 2 or more"),
        ({"training_ids": {"row-1"}}, "training data"),
        ({"method": "filtered_robust_temperature"}, "no column 'regret'"),
    ],
)
def test_bad_arguments_are_refused(arguments, said):
    table = {name: column for name, column in routed().items() if name != "regret"}
    with pytest.raises(ValueError, match=said):
        calibrate_table(table, **arguments)


def test_the_methods_that_cannot_be_used_say_why():
    logits, label = drawn(200)
    result = calibrate_table({"logits": logits, "label": label}, intervals=False)
    skipped = {entry["method"]: entry["skipped"] for entry in result.comparison if "skipped" in entry}
    assert set(skipped) == {
        "filtered_robust_temperature",
        "grouped_temperature",
        "expert_usage_temperature",
        "per_expert_temperature",
        "routing_temperature",
        "platt",
        "isotonic",
    }
    assert "routing_entropy" in skipped["routing_temperature"]
    assert skipped["platt"] == f"Class 2 has {np.bincount(label)[2]} labelled rows; platt needs about 100 per class"
    assert any(line.startswith("platt ") and "labelled rows" in line for line in result.lines())
    named = calibrate_table({"logits": logits, "label": label}, method="platt", intervals=False)
    assert named.calibrator.method == "platt" and any("Warning: Class 2 has" in line for line in named.lines())


@pytest.mark.parametrize("rows, others", [(20, 0), (100, 0), (60, 3)])
def test_rows_of_one_class_make_no_calibrator_that_says_one_thing(rows, others):
    logits, _ = drawn(rows, 2)
    label = np.r_[np.zeros(rows - others, int), np.ones(others, int)]
    result = calibrate_table({"logits": logits, "label": label}, intervals=False)
    skipped = {entry["method"]: entry["skipped"] for entry in result.comparison if "skipped" in entry}
    assert {"platt", "vector", "matrix", "isotonic"} <= set(skipped)
    assert skipped["vector"].startswith(
        f"All but {others} labelled rows are of class 0; vector needs about 10 of other"
    )
    found = result.calibrator.apply({"logits": logits})["prediction"]
    np.testing.assert_array_equal(found, logits.argmax(axis=1))


def test_many_classes_take_few_fits():
    logits, label = drawn(400, 1000, spread=3)
    table = {"logits": 2 * logits.astype(np.float32), "label": label}
    with counted() as one:
        TemperatureCalibrator().fit(table)
    with counted() as whole:
        result = calibrate_table(table, intervals=False)
    assert 3 * one[0] < whole[0] < 20 * one[0]
    assert "up to 256" in next(entry["skipped"] for entry in result.comparison if entry["method"] == "vector")


@contextmanager
def counted():
    """Counts rows whose losses are computed: what a fit's time is made of."""
    seen, original = [0], solver.row_losses

    def counting(logits, *arguments):
        seen[0] += len(logits)
        return original(logits, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        for module in (solver, temperature_module, rows_module):
            patch.setattr(module, "row_losses", counting)
        yield seen


def excess(calibrator, scale, bias=0.0):
    """Expected loss on fresh rows above the least possible, in nats; the fresh rows' true temperature is one."""
    logits, _ = drawn(2000, 3, seed=10**6, spread=2)
    truth = np.exp(log_softmax(logits))
    probs = calibrator.apply({"logits": scale * logits + bias})["probs"]
    return float((truth * (np.log(truth) - np.log(probs))).sum(axis=1).mean())


@pytest.mark.parametrize("scale, shift", [(1.0, 0.0), (0.5, 0.0), (2.0, 0.0), (1.0, 1.5)])
def test_auto_is_not_worse_than_the_best_single_choice(scale, shift):
    bias, lost, harmed = np.array([shift, 0.0, -shift]), [], []
    for seed in range(12):
        logits, label = drawn(150, 3, seed=seed, spread=2)
        table = {"logits": scale * logits + bias, "label": label}
        found = [calibrate_table(table, intervals=False).calibrator]
        found += [CANDIDATES[name]().fit(table) for name in ("none", "shrunk_temperature", "vector")]
        lost.append([excess(calibrator, scale, bias) for calibrator in found])
        harmed.append(lost[-1][0] > lost[-1][1] + 0.01)
    means = np.mean(lost, axis=0)
    assert means[0] <= means[1:].min() + 0.006 and sum(harmed) <= 1


def test_groups_of_other_temperatures_still_get_one():
    # Five groups that are there: one temperature saves on them, though each is unlike the others.
    kept = 0
    for seed in range(8):
        logits, label = drawn(500, 4, seed=seed)
        group = np.random.default_rng(seed).integers(5, size=500)
        scale = np.array([0.7, 1.0, 1.5, 2.0, 3.0])[group]
        table = {"logits": logits * scale[:, None], "label": label, "group": np.array(list("abcde"))[group]}
        kept += calibrate_table(table, intervals=False).calibrator.method == "none"
    assert kept <= 2


def test_weights_of_rows_count_in_the_comparison():
    logits, label = drawn(300, 3)
    weights = np.random.default_rng(0).integers(0, 3, 300)
    table = {"logits": 2 * logits, "label": label}
    weighted = calibrate_table({**table, "sample_weight": weights}, method="temperature", folds=3, intervals=False)
    folds, losses = np.random.default_rng(0).permutation(300) % 3, np.empty(300)
    for fold in range(3):
        train = np.repeat(np.arange(300), np.where(folds == fold, 0, weights))
        fitted = TemperatureCalibrator().fit({name: column[train] for name, column in table.items()})
        probs = fitted.apply(table)["probs"][np.arange(300), label]
        losses[folds == fold] = -np.log(probs[folds == fold])
    assert weighted.comparison[1]["nll"] == pytest.approx(np.average(losses, weights=weights), abs=1e-9)
