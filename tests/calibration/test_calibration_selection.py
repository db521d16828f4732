"""The cross-validated choice of a calibrator."""

from __future__ import annotations

import json

import numpy as np
import pytest
from datasets import Dataset

from hf_moecal.calibration import GroupedTemperatureCalibrator, TemperatureCalibrator
from hf_moecal.calibration.selection import CANDIDATES, calibrate_table
from tests.calibration.helpers import drawn, routed


pytestmark = pytest.mark.filterwarnings("ignore:.*labelled rows")


def test_the_comparison_is_plain_data_and_complete():
    result = calibrate_table(routed())
    assert [entry["method"] for entry in result.comparison] == list(CANDIDATES)
    assert sum(entry["chosen"] for entry in result.comparison) == 1
    assert result.calibrator.method == "temperature" and result.data["held_out"] == "groups"
    assert json.loads(json.dumps(result.comparison)) == result.comparison
    assert "temperature " in result.lines()[2] and result.lines()[2].endswith("*")
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
    assert result.calibrator.method == "none" and "No calibration is best" in result.lines()[-1]
    assert result.before == result.after
    by_rows = calibrate_table({name: table[name] for name in ("logits", "label")})
    assert by_rows.calibrator.method != "none"


def test_a_richer_method_must_earn_its_place():
    chosen = [
        calibrate_table({"logits": 2 * logits, "label": label}).calibrator.method
        for logits, label in (drawn(400, 3, seed=seed) for seed in range(10))
    ]
    assert chosen.count("temperature") >= 8
    logits, label = drawn(3000, 3)
    tilted = {"logits": logits * [1, 3, 6] + [0, 2, -1], "label": label}
    assert calibrate_table(tilted).calibrator.method in {"vector", "platt"}


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
    result = calibrate_table({"logits": logits, "label": label})
    skipped = {entry["method"]: entry["skipped"] for entry in result.comparison if "skipped" in entry}
    assert set(skipped) == {
        "filtered_robust_temperature",
        "grouped_temperature",
        "expert_usage_temperature",
        "per_expert_temperature",
        "routing_temperature",
    }
    assert "routing_entropy" in skipped["routing_temperature"]
