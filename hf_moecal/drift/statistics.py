"""Drift of a window of predictions against a reference: per-sequence tests with effect sizes and one error rate.

Three rules keep it from crying wolf. One *sequence* is one observation: tokens of a sequence resemble each other,
and a test that counts them as independent rejects almost always (without sequences, rows are worth as many as their
correlation leaves). All features of a window share one error rate (Holm or Benjamini-Hochberg). And a difference must
be large as well as certain: with a million rows everything is significant.

Numbers and whole distributions are measured by the largest difference in probability that reference and window give to
an event: for numbers to an event "below x" (the Kolmogorov-Smirnov D), for counts to any set of categories (total
variation). One class or expert among many is measured by the ratio of its shares.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from scipy import sparse, stats

from .count_test import CountDrift
from .feature import FeatureDrift
from .number_test import NumberDrift


CORRECTIONS = ("holm", "benjamini-hochberg")
# Least relative change of one category's share that counts as drift: half as much, or twice as much.
MINIMUM_SHARE_CHANGE = 0.5


def adjust(p_values: np.ndarray, *, correction: str = "holm") -> np.ndarray:
    """Corrects p-values for the number of tests.

    Args:
        p_values: [n] p-values of one window.
        correction: `"holm"` bounds the chance of any false alarm (under any dependence); `"benjamini-hochberg"` bounds
            the expected share of false ones among the features that alarm.

    Returns:
        [n] adjusted p-values, to be compared with alpha.

    Raises:
        ValueError: the correction is unknown.

    Example:

    ```python
    >>> from hf_moecal.drift.statistics import adjust
    >>> adjust([0.01, 0.04, 0.03]).round(3).tolist()
    [0.03, 0.06, 0.06]

    ```
    """
    p_values = np.asarray(p_values, np.float64)
    if correction not in CORRECTIONS:
        raise ValueError(f"Unknown correction {correction!r}; choose one of {', '.join(CORRECTIONS)}.")
    if correction == "benjamini-hochberg":
        return stats.false_discovery_control(p_values, method="bh")
    order = np.argsort(p_values)
    stepped = np.maximum.accumulate(p_values[order] * np.arange(len(p_values), 0, -1))
    adjusted = np.empty_like(p_values)
    adjusted[order] = np.minimum(stepped, 1)
    return adjusted


class DriftDetector:
    """Tests windows of a stream against a reference, feature by feature.

    Args:
        reference: feature -> one value per sequence: [n] numbers, or [n, categories] sparse shares.
        alpha: chance of a false alarm per window (the error rate of all its features together).
        correction: how features share alpha, see [`adjust`].
        minimum_effect: least difference in probability, in [0, 1], that counts as drift.
        categories: feature -> names of its first categories, see [`~hf_moecal.drift.count_test.CountDrift`].
        clustering: reference sequences that are worth one independent one (more than 1 where ids come again).
        correlated: whether values that follow each other may resemble each other, which is then estimated.

    Raises:
        ValueError: a setting is out of range, or there is no feature.
    """

    def __init__(
        self,
        reference: Mapping[str, np.ndarray | sparse.csr_array],
        *,
        alpha: float = 0.01,
        correction: str = "holm",
        minimum_effect: float = 0.1,
        categories: Mapping[str, Sequence[Any]] | None = None,
        clustering: float = 1.0,
        correlated: bool = False,
    ) -> None:
        if not 0 < alpha < 1:
            raise ValueError(f"alpha is a false-alarm rate between 0 and 1, got {alpha}.")
        if not 0 <= minimum_effect < 1:
            raise ValueError(f"minimum_effect is a difference in probability in [0, 1), got {minimum_effect}.")
        adjust(np.ones(1), correction=correction)
        if not reference:
            raise ValueError("There is no feature to test; name columns of the reference in `features`.")
        self.alpha, self.correction, self.minimum_effect = alpha, correction, minimum_effect
        how: dict[str, Any] = {"clustering": clustering, "correlated": correlated}
        self.tests = {
            name: CountDrift(name, values, categories=(categories or {}).get(name), **how)
            if sparse.issparse(values)
            else NumberDrift(name, values, **how)
            for name, values in reference.items()
        }

    def update(self, chunk: Mapping[str, np.ndarray | sparse.csr_array]) -> None:
        """Adds one value per sequence and feature to the open window."""
        for name, test in self.tests.items():
            test.update(chunk[name])

    def close(self, *, clustering: float = 1.0) -> list[FeatureDrift]:
        """Tests the open window, most drifted feature first, and opens the next.

        Args:
            clustering: sequences of the window that are worth one independent one.
        """
        found: list[FeatureDrift] = []
        for test in self.tests.values():
            found += test.results(clustering=clustering)
            test.reset()
        adjusted = adjust(np.array([feature.p_value for feature in found]), correction=self.correction)
        called = [
            replace(
                feature, p_adjusted=float(p), drift=bool(p <= self.alpha and feature.effect >= self._least(feature))
            )
            for feature, p in zip(found, adjusted, strict=True)
        ]
        return sorted(called, key=lambda feature: (not feature.drift, -feature.effect))

    def _least(self, feature: FeatureDrift) -> float:
        # Without a least effect at all (0), any certain change of a share is drift too.
        return min(MINIMUM_SHARE_CHANGE, 5 * self.minimum_effect) if feature.test == "share" else self.minimum_effect

    def correlations(self) -> dict[str, dict[str, float]]:
        """feature -> `lag1`, the correlation of neighbouring reference rows, and `rows_per_observation`, how many rows
        are worth one independent row; of the features whose rows are known to be correlated."""
        found = {name: test.correlation for name, test in self.tests.items() if test.correlation}
        return {
            name: {"lag1": c.lag1, "rows_per_observation": c.reference(c.size)} for name, c in found.items() if c.known
        }

    def learnt(self) -> dict[str, float]:
        """feature -> how many rows of the log are worth one independent row, of those found correlated."""
        found = {name: test.correlation.log() for name, test in self.tests.items() if test.correlation}
        return {name: rows for name, rows in found.items() if rows > 1}

    def arrays(self) -> dict[str, np.ndarray]:
        """The open window, and what was learnt from the windows before, as named arrays, to be kept across a
        restart."""
        kept = {f"{name}/{key}": values for name, test in self.tests.items() for key, values in test.window.items()}
        for name, test in self.tests.items():
            if test.correlation:
                kept |= {f"{name}/means": test.correlation.means, f"{name}/counts": test.correlation.counts}
        return kept

    def load(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Continues the window that [`arrays`] gave."""
        for name, test in self.tests.items():
            test.window = {key: np.array(arrays[f"{name}/{key}"]) for key in test.window}
            if test.correlation:
                test.correlation.means = np.array(arrays[f"{name}/means"])
                test.correlation.counts = np.array(arrays[f"{name}/counts"])
