"""What people feed in: rounded and masked scores, weights of rows, labels as text, rows that say nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.calibration import _TemperatureScaling as ScikitLearnTemperature

from hf_moecal.calibration import METHODS, Calibrator, TemperatureCalibrator
from hf_moecal.calibration.rows import Rows
from tests.calibration.helpers import drawn, routed


pytestmark = pytest.mark.filterwarnings("ignore:.*labelled rows")


def rounded(scale, how, classes=4):
    """Probabilities that rounding made zero in places, the labels, and the temperature of the exact ones."""
    logits, label = drawn(2000, classes, spread=2)
    probs = torch.softmax(torch.from_numpy(scale * logits), 1).numpy()
    kept = probs.astype(np.float16).astype(float) if how == "float16" else np.round(probs, how)
    return kept, label, TemperatureCalibrator().fit({"logits": scale * logits, "label": label}).temperature


@pytest.mark.parametrize("scale, how", [(10.0, "float16"), (2.0, 3), (4.0, 4), (10.0, 3)])
def test_zeros_from_rounding_do_not_decide_the_temperature(scale, how, tmp_path):
    kept, label, exact = rounded(scale, how)
    zeros = int((kept[np.arange(2000), label] == 0).sum())
    table = {"probs": kept / kept.sum(axis=1, keepdims=True), "label": label}
    with pytest.warns(UserWarning, match=f"{zeros} of 2000 labels have a probability of zero"):
        calibrator = TemperatureCalibrator().fit(table)
    others = [
        1 / ScikitLearnTemperature().fit(np.log(table["probs"] + eps), label).beta_
        for eps in (np.finfo(np.float32).eps, np.finfo(np.float64).eps)
    ]
    off = abs(np.log(calibrator.temperature / exact))
    assert zeros > 10 and off < min(abs(np.log(other / exact)) for other in others)
    applied = calibrator.apply(table)
    again = Calibrator.load(calibrator.save(tmp_path / "calibration.json"))
    np.testing.assert_array_equal(again.apply(table)["probs"], applied["probs"])


def test_masked_logits_are_classes_that_a_row_does_not_have():
    logits, label = drawn(500, 4)
    masked = np.column_stack([logits, np.full(500, -np.inf)])
    plain, found = (TemperatureCalibrator().fit({"logits": scores, "label": label}) for scores in (logits, masked))
    assert found.temperature == pytest.approx(plain.temperature, rel=1e-12)
    for method in ("temperature", "vector", "matrix", "platt", "isotonic"):
        probs = METHODS[method]().fit({"logits": masked, "label": label}).apply({"logits": masked})["probs"]
        np.testing.assert_allclose(probs.sum(axis=1), 1, atol=1e-12)
        assert np.isfinite(probs).all() and probs[:, 4].max() < 0.01
    with pytest.raises(ValueError, match="1 labels .the first in labelled row 3: class 4. are of a class"):
        TemperatureCalibrator().fit({"logits": masked, "label": np.where(np.arange(500) == 3, 4, label)})
    with pytest.raises(ValueError, match="-inf for every class of row 0"):
        TemperatureCalibrator().fit({"logits": np.full((2, 3), -np.inf), "label": [0, 1]})
    with pytest.raises(ValueError, match="not finite in row 0"):
        TemperatureCalibrator().fit({"logits": [[np.inf, 0.0]], "label": [0]})


def test_rows_that_say_nothing_get_one_true_sentence():
    with pytest.raises(ValueError, match="scores of these 3 rows are the same for all classes, so T changes nothing"):
        TemperatureCalibrator().fit({"logits": np.ones((3, 2)), "label": [0, 1, 0]})
    for wrong, said in (
        (["positive", "negative"], "holds text such as 'positive'.*label2id"),
        ([0.5, 1.0], "class number"),
    ):
        with pytest.raises(ValueError, match=said):
            TemperatureCalibrator().fit({"logits": np.eye(2), "label": wrong})


REPEATED = ["none", "temperature", "shrunk_temperature", "robust_temperature", "vector", "matrix", "platt", "isotonic",
            "routing_temperature"]  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_a_row_of_weight_two_counts_as_two_rows(method):
    table = routed(600)
    weights = np.random.default_rng(1).integers(0, 4, 600)
    repeated = {name: np.repeat(column, weights, axis=0) for name, column in table.items()}
    kept = {name: column[weights > 0] for name, column in table.items()}

    def fitted(rows, own=None):
        extra = {} if own is None else {"sample_weight": own}
        return METHODS[method]().fit({**rows, **extra}).apply(table)["probs"]

    # Those that look at errors count independent rows, so that only ratios of weights matter to them.
    pairs = [(fitted(table, weights), fitted(kept, weights[weights > 0]))]
    if method in REPEATED:
        pairs.append((fitted(table, weights), fitted(repeated)))
    else:
        pairs.append((fitted(table, np.full(600, 2.5)), fitted(table)))
    for found, expected in pairs:
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)
    if method != "none":
        assert np.abs(fitted(table, weights) - fitted(table)).max() > 1e-4


@pytest.mark.parametrize("weights", [[-1.0, 1.0], [0.0, 0.0], [np.nan, 1.0], ["a", "b"]])
def test_weights_that_are_none_are_refused(weights):
    with pytest.raises(ValueError, match="'sample_weight' must hold one finite number per row"):
        Rows({"logits": np.eye(2), "label": [0, 1], "sample_weight": weights}, labelled=True).weights  # noqa: B018
