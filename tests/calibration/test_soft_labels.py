"""Fits on soft labels: one-hot ones give what classes give, votes what a weighted row for each rater gives."""

import numpy as np
import pytest

from hf_moecal.calibration import METHODS, TemperatureCalibrator
from tests.calibration.helpers import drawn, routed


FITTED = sorted(name for name in METHODS if name != "none")


def probs_of(method, table, rows):
    return np.asarray(METHODS[method]().fit(table).apply(rows)["probs"])


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("method", FITTED)
def test_one_hot_distributions_give_what_classes_give(method):
    table = routed(400)
    shares = {**table, "label": np.eye(4)[table["label"]]}
    expected = probs_of(method, table, table)
    assert np.abs(expected - np.exp(table["logits"]) / np.exp(table["logits"]).sum(1, keepdims=True)).max() > 0.01
    np.testing.assert_allclose(probs_of(method, shares, table), expected, rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("method", ["temperature", "isotonic"])
def test_votes_give_what_a_weighted_row_for_each_rater_gives(method):
    logits, _ = drawn(300)
    rng = np.random.default_rng(1)
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    votes = np.stack([rng.multinomial(5, p) for p in probs])
    rows, classes = votes.nonzero()
    raters = {"logits": 2 * logits[rows], "label": classes, "sample_weight": votes[rows, classes] / 5}
    table = {"logits": 2 * logits, "label": votes / 5}
    np.testing.assert_allclose(probs_of(method, table, table), probs_of(method, raters, table), rtol=0, atol=1e-6)


def test_rows_are_counted_once_in_errors_and_bad_distributions_are_named():
    logits, label = drawn(300)
    one_hot = np.eye(4)[label]
    one_hot[0] = -100  # no label
    table = {"logits": logits, "label": one_hot}
    found = TemperatureCalibrator().fit(table)
    expected = TemperatureCalibrator().fit({"logits": logits[1:], "label": label[1:]})
    assert found.temperature == pytest.approx(expected.temperature, rel=1e-9)
    assert found.parameters()["interval"] == pytest.approx(expected.parameters()["interval"], rel=1e-9)
    with pytest.raises(ValueError, match="labels has 3 columns but there are 4 classes"):
        TemperatureCalibrator().fit({"logits": logits, "label": np.full((300, 3), 1 / 3)})
    with pytest.raises(ValueError, match="sum"):
        TemperatureCalibrator().fit({"logits": logits, "label": np.full((300, 4), 0.5)})
    impossible = logits.copy()
    impossible[3, 1] = -np.inf
    with pytest.raises(ValueError, match="impossible"):
        TemperatureCalibrator().fit({"logits": impossible, "label": np.full((300, 4), 0.25)})
