"""Drift of a window of predictions against a reference: per-sequence tests with effect sizes and one error rate.

Three rules keep it from crying wolf. One *sequence* is one observation: tokens of a sequence resemble each other,
and a test that counts them as independent rejects almost always. All features of a window share one error rate
(Holm or Benjamini-Hochberg). And a difference must be large as well as certain: with a million rows everything is
significant.

The effect size of every feature is on one scale, the largest difference in probability that reference and window
give to an event: for numbers to an event "below x" (the Kolmogorov-Smirnov D), for counts to any set of categories
(total variation).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import sparse, stats


# Points at which a reference distribution is kept: D is exact up to 1 / MAX_POINTS, and exact below that many values.
MAX_POINTS = 10_000
# Pearson's rule: a category pooled from cells with fewer expected cases has no chi-square distribution.
MIN_EXPECTED = 5.0
CORRECTIONS = ("holm", "benjamini-hochberg")


@dataclass(frozen=True)
class FeatureDrift:
    """One feature of one window.

    Args:
        feature: name of the feature.
        test: `ks` (two-sample Kolmogorov-Smirnov) or `chi2` (chi-square, robust to dependence within a sequence).
        statistic: value of the test statistic (D, or chi-square).
        effect: largest difference in probability, in [0, 1].
        shift: for numbers, the change of the mean in standard deviations of the reference; for counts `None`.
        psi: population stability index, in nats (over reference deciles for numbers).
        p_value: p-value of this test alone.
        p_adjusted: p-value corrected for all features of the window.
        drift: whether the feature drifted: `p_adjusted <= alpha` and `effect >= minimum_effect`.
    """

    feature: str
    test: str
    statistic: float
    effect: float
    shift: float | None
    psi: float
    p_value: float
    p_adjusted: float = float("nan")
    drift: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


class NumberDrift:
    """Streaming two-sample Kolmogorov-Smirnov test against a fixed reference.

    Between two neighbouring reference values the reference distribution is flat, so D is attained at a reference
    value, just before it or at it. The window therefore needs only two counts per reference value: memory does not
    grow with its rows.

    Args:
        name: name of the feature.
        reference: [n] finite values, one per sequence.
    """

    def __init__(self, name: str, reference: np.ndarray) -> None:
        values = np.sort(np.asarray(reference, np.float64))
        self.name, self.reference_n = name, len(values)
        self.mean, self.scale = float(values.mean()), float(values.std())
        keep = np.unique(np.linspace(0, len(values) - 1, min(len(values), MAX_POINTS)).round().astype(np.int64))
        self.points = np.unique(values[keep])
        self.at = np.searchsorted(values, self.points, "right") / len(values)
        self.before = np.searchsorted(values, self.points, "left") / len(values)
        self.deciles = np.unique(np.searchsorted(self.at, np.arange(1, 10) / 10))
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

    def result(self) -> FeatureDrift:
        """Tests the window."""
        n, m = float(self.window["n"][0]), self.reference_n
        at, before = self.window["at"] / n, self.window["before"] / n
        d = float(max(np.abs(at - self.at).max(), np.abs(before - self.before).max()))
        p = float(np.clip(stats.kstwo.sf(d, np.round(n * m / (n + m))), 0, 1)) if d > 0 else 1.0
        shift = (float(self.window["total"][0]) / n - self.mean) / self.scale if self.scale > 0 else None
        cells = [np.diff(np.concatenate([[0.0], share[self.deciles], [1.0]])) for share in (self.at, at)]
        return FeatureDrift(self.name, "ks", d, d, shift, _psi(*cells, m, n), p)


class CountDrift:
    """Streaming two-sample chi-square test on shares of categories, valid when a sequence has several, dependent
    counts.

    A sequence gives one vector of shares over the categories (the load of each expert, or a one at the predicted
    class). The statistic is the score test of equal mean vectors with the covariance estimated *between sequences*;
    with one count per sequence it is Pearson's chi-square. A plain chi-square on all counts would take tokens for
    independent, and the k experts of a token, which are never equal, too.

    Args:
        name: name of the feature.
        reference: [n, categories] sparse shares, each row summing to one.
    """

    def __init__(self, name: str, reference: sparse.csr_array) -> None:
        self.name = name
        self.categories = reference.shape[1]
        self.reset()
        self.update(reference)
        self.reference = self.window
        self.reset()

    def fixed(self) -> tuple[np.ndarray, ...]:
        """What identifies the reference."""
        return self.reference["n"], self.reference["total"]

    def reset(self) -> None:
        """Empties the window."""
        k = self.categories
        self.window = {"n": np.zeros(1), "total": np.zeros(k), "used": np.zeros(k), "second": np.zeros((k, k))}

    def update(self, shares: sparse.csr_array) -> None:
        """Adds [n, categories] sparse shares, one row per sequence, to the window."""
        self.window["n"] += shares.shape[0]
        self.window["total"] += np.asarray(shares.sum(axis=0)).ravel()
        self.window["used"] += np.bincount(shares.indices, minlength=self.categories)
        self.window["second"] += (shares.T @ shares).toarray()

    def result(self) -> FeatureDrift:
        """Tests the window."""
        pooled = {key: self.reference[key] + self.window[key] for key in self.window}
        m, n, both = (float(part["n"][0]) for part in (self.reference, self.window, pooled))
        groups = _pool_rare(pooled["used"] * n / both)
        merge = np.zeros((groups.max() + 1, self.categories))
        merge[groups, np.arange(self.categories)] = 1
        reference, window = merge @ self.reference["total"] / m, merge @ self.window["total"] / n
        mean = merge @ pooled["total"] / both
        covariance = merge @ (pooled["second"] / both) @ merge.T - np.outer(mean, mean)
        statistic, freedom = _quadratic_form(window - reference, covariance * (1 / m + 1 / n))
        p = float(stats.chi2.sf(statistic, freedom)) if freedom else 1.0
        effect = float(np.abs(window - reference).sum() / 2)
        return FeatureDrift(self.name, "chi2", statistic, effect, None, _psi(reference, window, m, n), p)


def _pool_rare(expected: np.ndarray) -> np.ndarray:
    """Group of each category such that every group expects MIN_EXPECTED cases: the rarest are joined with each
    other."""
    order = np.argsort(expected, kind="stable")
    groups, group, mass = np.zeros(len(expected), np.int64), 0, 0.0
    for category in order:
        groups[category] = group
        mass += expected[category]
        if mass >= MIN_EXPECTED:
            group, mass = group + 1, 0.0
    if 0 < mass < MIN_EXPECTED and group > 0:
        groups[groups == group] = group - 1
    return groups


def _quadratic_form(difference: np.ndarray, covariance: np.ndarray) -> tuple[float, int]:
    """d' pinv(C) d and the rank of C."""
    values, vectors = np.linalg.eigh(covariance)
    kept = values > 1e-9 * max(values.max(initial=0.0), 1e-300)
    projected = vectors[:, kept].T @ difference
    return float((projected**2 / values[kept]).sum()), int(kept.sum())


def _psi(reference: np.ndarray, window: np.ndarray, reference_n: float, window_n: float) -> float:
    # Half a case per cell keeps an empty cell finite.
    cells = len(reference)
    p = (reference * reference_n + 0.5) / (reference_n + 0.5 * cells)
    q = (window * window_n + 0.5) / (window_n + 0.5 * cells)
    return float(((q - p) * np.log(q / p)).sum())


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
    ) -> None:
        if not 0 < alpha < 1:
            raise ValueError(f"alpha is a false-alarm rate between 0 and 1, got {alpha}.")
        if not 0 <= minimum_effect < 1:
            raise ValueError(f"minimum_effect is a difference in probability in [0, 1), got {minimum_effect}.")
        adjust(np.ones(1), correction=correction)
        if not reference:
            raise ValueError("There is no feature to test; name columns of the reference in `features`.")
        self.alpha, self.correction, self.minimum_effect = alpha, correction, minimum_effect
        self.tests = {
            name: CountDrift(name, values) if sparse.issparse(values) else NumberDrift(name, values)
            for name, values in reference.items()
        }

    def update(self, chunk: Mapping[str, np.ndarray | sparse.csr_array]) -> None:
        """Adds one value per sequence and feature to the open window."""
        for name, test in self.tests.items():
            test.update(chunk[name])

    def close(self) -> list[FeatureDrift]:
        """Tests the open window, most drifted feature first, and opens the next."""
        found = [test.result() for test in self.tests.values()]
        adjusted = adjust(np.array([feature.p_value for feature in found]), correction=self.correction)
        for test in self.tests.values():
            test.reset()
        called = [
            FeatureDrift(
                **{
                    **feature.to_dict(),
                    "p_adjusted": float(p),
                    "drift": bool(p <= self.alpha and feature.effect >= self.minimum_effect),
                }
            )
            for feature, p in zip(found, adjusted, strict=True)
        ]
        return sorted(called, key=lambda feature: (not feature.drift, -feature.effect))

    def arrays(self) -> dict[str, np.ndarray]:
        """The open window as named arrays, to be kept across a restart."""
        return {f"{name}/{key}": values for name, test in self.tests.items() for key, values in test.window.items()}

    def load(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Continues the window that [`arrays`] gave."""
        for name, test in self.tests.items():
            test.window = {key: np.array(arrays[f"{name}/{key}"]) for key in test.window}
