"""Streaming two-sample Kolmogorov-Smirnov test."""

from __future__ import annotations

import numpy as np
from scipy import stats

from .correlation import Correlation
from .feature import FeatureDrift, psi


# Points at which a reference distribution is kept: D is exact up to 1 / MAX_POINTS, and exact below that many values.
MAX_POINTS = 10_000


class NumberDrift:
    """Streaming two-sample Kolmogorov-Smirnov test against a fixed reference.

    Between two neighbouring reference values the reference distribution is flat, so D is attained at a reference
    value, just before it or at it. The window therefore needs only two counts per reference value: memory does not
    grow with its rows.

    Args:
        name: name of the feature.
        reference: [n] finite values, one per sequence.
        clustering: reference values that are worth one independent value.
        correlated: whether neighbouring values may resemble each other, which is then estimated.
    """

    def __init__(self, name: str, reference: np.ndarray, *, clustering: float = 1.0, correlated: bool = False) -> None:
        reference = np.asarray(reference, np.float64)
        values = np.sort(reference)
        self.name, self.clustering, self.reference_n = name, clustering, len(values)
        self.mean, self.scale = float(values.mean()), float(values.std())
        keep = np.unique(np.linspace(0, len(values) - 1, min(len(values), MAX_POINTS)).round().astype(np.int64))
        self.points = np.unique(values[keep])
        self.at = np.searchsorted(values, self.points, "right") / len(values)
        self.before = np.searchsorted(values, self.points, "left") / len(values)
        self.deciles = np.unique(np.searchsorted(self.at, np.arange(1, 10) / 10))
        self.correlation = None
        if correlated:
            ranks = np.concatenate([[0.0], self.at])[np.searchsorted(self.points, reference, "right")]
            self.correlation = Correlation(ranks[:, None])
        self.reset()

    def fixed(self) -> tuple[np.ndarray, ...]:
        """What identifies the reference."""
        return self.points, self.at

    def reset(self) -> None:
        """Empties the window."""
        self.window = {
            "n": np.zeros(1),
            "total": np.zeros(1),
            "at": np.zeros(len(self.points), np.int64),
            "before": np.zeros(len(self.points), np.int64),
        }

    def update(self, values: np.ndarray) -> None:
        """Adds [n] values, one per sequence, to the window."""
        ordered = np.sort(np.asarray(values, np.float64))
        self.window["n"] += len(ordered)
        self.window["total"] += ordered.sum()
        self.window["at"] += np.searchsorted(ordered, self.points, "right")
        self.window["before"] += np.searchsorted(ordered, self.points, "left")

    def results(self, *, clustering: float = 1.0) -> list[FeatureDrift]:
        """Tests the window.

        Args:
            clustering: values of the window that are worth one independent value.
        """
        n, m = float(self.window["n"][0]), self.reference_n
        at, before = self.window["at"] / n, self.window["before"] / n
        reference_n = m / self.clustering
        if self.correlation:
            # The mean of the reference's distribution function over the window, from the counts alone.
            rank = float((np.diff(self.at, prepend=0.0) * (1 - before)).sum())
            clustering = max(clustering, self.correlation.push(np.array([rank]), n))
            reference_n = m / max(self.clustering, self.correlation.reference(m))
        effective = n / clustering
        d = float(max(np.abs(at - self.at).max(), np.abs(before - self.before).max()))
        pairs = max(1.0, np.round(effective * reference_n / (effective + reference_n)))
        p = float(np.clip(stats.kstwo.sf(d, pairs), 0, 1)) if d > 0 else 1.0
        shift = (float(self.window["total"][0]) / n - self.mean) / self.scale if self.scale > 0 else None
        cells = [np.diff(np.concatenate([[0.0], share[self.deciles], [1.0]])) for share in (self.at, at)]
        return [FeatureDrift(self.name, "ks", d, d, shift, psi(*cells, m, n), p, effective)]
