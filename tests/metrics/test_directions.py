"""Every figure that is returned says which way it is better, and the choice of a checkpoint follows."""

import numpy as np
import pytest

from hf_moecal import MoECalArguments
from hf_moecal.metrics import calibration_metrics, calibration_report
from hf_moecal.metrics.directions import DIRECTIONS, direction_of
from hf_moecal.metrics.ece.ece import ECE


LABELS, PROBS = [0, 1, 1, 0], np.array([[0.8, 0.2], [0.3, 0.7], [0.6, 0.4], [0.9, 0.1]])


def numbers(report):
    """Names of the plain numbers of a report, also those that lie deeper."""
    for name, value in report.items():
        if name in ("groups", "group_p", "reliability_diagram", "bins"):
            continue
        if isinstance(value, dict):
            yield from numbers(value)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield name


def test_every_figure_has_a_direction():
    found = set(numbers(calibration_report(LABELS, probs=PROBS, groups=["a", "b", "a", "b"])))
    found |= set(calibration_metrics()((np.log(PROBS), np.array(LABELS))))
    found |= set(numbers(ECE().compute(predictions=PROBS, references=LABELS)))
    assert len(found) > 15
    assert not [name for name in found if direction_of(name) is None]


@pytest.mark.parametrize(("metric", "greater"), [
    ("eval_tweets_mce", False), ("aurc", False), ("eval_smooth_ece", False), ("eval_ece_max", False),
    ("eval_sequence_brier", False), ("loss", False), ("auroc", True), ("eval_movie_accuracy", True), ("f1", True),
])  # fmt: skip
def test_the_better_checkpoint_is_the_better_one(metric, greater):
    args = MoECalArguments("out", metric_for_best_model=metric, report_to="none", use_cpu=True)
    assert args.greater_is_better is greater
    asked = MoECalArguments("out", metric_for_best_model=metric, greater_is_better=True, report_to="none")
    assert asked.greater_is_better is True


def test_figures_without_a_better_side_are_refused():
    with pytest.raises(ValueError, match="'eval_confidence'` has no better side; choose the ece or nll"):
        MoECalArguments("out", metric_for_best_model="eval_confidence")
    assert set(DIRECTIONS.values()) == {"lower", "higher", "neither"}
