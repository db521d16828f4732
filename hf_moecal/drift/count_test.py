"""Streaming tests of categories: of all their shares together (chi-square), and of the one that changed most."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import sparse, special, stats

from .correlation import Correlation
from .feature import FeatureDrift, psi
from .logs import OTHERS, bucket


# Pearson's rule: a category pooled from cells with fewer expected cases has no chi-square distribution.
MIN_EXPECTED = 5.0
# Above these many the categories of an open feature share the cells of the chi-square test by a hash of their name, as
# those that the reference never had do: which of them share one must not depend on the luck of the reference.
MAX_OWN_CELLS = OTHERS // 2
NEW = "(new)"


class CountDrift:
    """Streaming two-sample chi-square test on shares of categories, valid when a sequence has several, dependent
    counts; and a test of each category's share alone.

    A sequence gives one vector of shares over the categories (the load of each expert, or a one at the predicted
    class). The statistic is the score test of equal mean vectors with the covariance estimated *between sequences*;
    with one count per sequence it is Pearson's chi-square. A plain chi-square on all counts would take tokens for
    independent, and the k experts of a token, which are never equal, too.

    One expert of 64 that dies changes the shares together by 1/64, too little to count as drift; its own share changes
    by all of it. So the categories are tested one by one as well, each as a binomial (of as many cases as its variance
    between sequences is worth), with Bonferroni's factor. Categories that the reference never had are one, and what a
    reference would have of those is known from the categories that only one of its sequences had (Good and Turing).

    Args:
        name: name of the feature.
        reference: [n, categories] sparse shares, each row summing to one.
        categories: names of the first categories; the `OTHERS` columns beyond them are for what the reference never
            had, by [`~hf_moecal.drift.logs.bucket`]. By default every column is a category that can be, named by its
            number.
        clustering: reference rows that are worth one independent row.
        correlated: whether neighbouring rows may resemble each other, which is then estimated.
    """

    def __init__(
        self,
        name: str,
        reference: sparse.csr_array,
        *,
        categories: Sequence[Any] | None = None,
        clustering: float = 1.0,
        correlated: bool = False,
    ) -> None:
        self.name, self.clustering = name, clustering
        self.columns = reference.shape[1]
        self.categories = range(self.columns) if categories is None else categories
        known = len(self.categories)
        cells = np.arange(self.columns)
        if known < self.columns and known > MAX_OWN_CELLS:
            cells = np.append([bucket(value) for value in self.categories], np.arange(OTHERS))
        places = (np.arange(self.columns), cells)
        self.cells = sparse.csr_array((np.ones(self.columns), places), shape=(self.columns, int(cells.max()) + 1))
        self.order = np.random.default_rng(0).permutation(self.cells.shape[1])  # decides between cells that tie
        self.correlation = Correlation(reference) if correlated else None
        self.reset()
        self.update(reference)
        self.reference = self.window
        self.reset()

    def fixed(self) -> tuple[np.ndarray, ...]:
        """What identifies the reference."""
        return self.reference["n"], self.reference["total"]

    def reset(self) -> None:
        """Empties the window."""
        k, cells = self.columns, self.cells.shape[1]
        self.window = {
            "n": np.zeros(1),
            "total": np.zeros(k),
            "used": np.zeros(k),
            "square": np.zeros(k),
            "second": np.zeros((cells, cells)),
        }

    def update(self, shares: sparse.csr_array) -> None:
        """Adds [n, categories] sparse shares, one row per sequence, to the window."""
        self.window["n"] += shares.shape[0]
        self.window["total"] += np.asarray(shares.sum(axis=0)).ravel()
        self.window["used"] += np.bincount(shares.indices, minlength=self.columns)
        self.window["square"] += np.bincount(shares.indices, shares.data**2, self.columns)
        celled = shares @ self.cells
        self.window["second"] += (celled.T @ celled).toarray()

    def results(self, *, clustering: float = 1.0) -> list[FeatureDrift]:
        """Tests the window: all shares together, and the one that changed most surely.

        Args:
            clustering: rows of the window that are worth one independent row.
        """
        m, n = (float(part["n"][0]) for part in (self.reference, self.window))
        reference_n, effective = m / self.clustering, n / clustering
        if self.correlation:
            effective = min(effective, n / self.correlation.push(self.window["total"] / n, n))
            reference_n = min(reference_n, m / self.correlation.reference(m))
        return [self._together(reference_n, effective), self._single(reference_n, effective)]

    def _together(self, reference_n: float, effective: float) -> FeatureDrift:
        pooled = {key: self.reference[key] + self.window[key] for key in self.window}
        m, n, both = (float(part["n"][0]) for part in (self.reference, self.window, pooled))
        # Sums with weights: a row of a clustered window counts for less, in the mean of both as in its variance.
        groups = _pool_rare(self.cells.T @ pooled["used"] * effective / both, self.order)
        merge = np.zeros((groups.max() + 1, len(groups)))
        merge[groups, np.arange(len(groups))] = 1
        into = merge @ self.cells.T
        reference, window = into @ self.reference["total"] / m, into @ self.window["total"] / n
        mean = into @ pooled["total"] / both
        covariance = merge @ (pooled["second"] / both) @ merge.T - np.outer(mean, mean)
        statistic, freedom = quadratic_form(window - reference, covariance * (1 / reference_n + 1 / effective))
        p = float(stats.chi2.sf(statistic, freedom)) if freedom else 1.0
        effect = float(np.abs(window - reference).sum() / 2)
        stability = psi(reference, window, m, n)
        return FeatureDrift(self.name, "chi2", statistic, effect, None, stability, p, effective)

    def _single(self, reference_n: float, effective: float) -> FeatureDrift:
        m, n = float(self.reference["n"][0]), float(self.window["n"][0])
        known = len(self.categories)
        parts = {name: (part["total"][:known], part["square"][:known])
                 for name, part in (("reference", self.reference), ("window", self.window))}  # fmt: skip
        if known < self.columns:
            once, new = self.reference["used"] == 1, slice(known, None)
            unseen = {"reference": (self.reference, once), "window": (self.window, new)}
            for name, (part, where) in unseen.items():
                sums = zip(parts[name], ("total", "square"), strict=True)
                parts[name] = tuple(np.append(values, part[key][where].sum()) for values, key in sums)
        totals, squares = zip(parts["reference"], parts["window"], strict=True)
        share = (totals[0] + totals[1]) / (m + n)
        variance = (squares[0] + squares[1]) / (m + n) - share**2
        possible = np.flatnonzero((share > 0) & (variance > 1e-12))
        reference, window = totals[0] / m, totals[1] / n
        p = np.ones(len(share))
        # Cases of a Poisson count with the same variance: for one case per row, 1 / (1 - share) of each.
        worth = share[possible] / variance[possible]
        p[possible] = compare_counts(
            window[possible] * effective * worth, reference[possible] * reference_n * worth, effective, reference_n
        )
        low, high = np.minimum(reference, window), np.maximum(reference, window)
        effect = 1 - np.divide(low, high, out=np.ones_like(low), where=high > 0)
        # The surest of the large changes; Bonferroni's factor holds for any choice.
        chosen = int(np.lexsort((-effect, np.where(effect >= 0.5, p, p + 1)))[0])
        return FeatureDrift(
            self.name + "/share",
            "share",
            float(window[chosen]),
            float(effect[chosen]),
            None,
            None,
            float(min(1.0, p[chosen] * max(1, len(possible)))),
            effective,
            category=NEW if chosen == known else self.categories[chosen],
            reference_share=float(reference[chosen]),
        )


def compare_counts(x: np.ndarray, y: np.ndarray, n: float, m: float) -> np.ndarray:
    """p-values of x cases in n against y in m, given x + y: twice the smaller binomial tail, for real x and y."""
    total, share = x + y, n / (n + m)
    below = special.betainc(np.maximum(total - x, 1e-300), x + 1, 1 - share)
    below = np.where(y > 0, below, 1.0)
    above = np.where(x > 0, special.betainc(np.maximum(x, 1e-300), total - x + 1, share), 1.0)
    return np.minimum(1.0, 2 * np.minimum(below, above))


def _pool_rare(expected: np.ndarray, order: np.ndarray | None = None) -> np.ndarray:
    """Group of each category such that every group expects MIN_EXPECTED cases: the rarest are joined with each
    other, ties in the order of `order`."""
    ties = np.arange(len(expected)) if order is None else order
    groups, group, mass = np.zeros(len(expected), np.int64), 0, 0.0
    for category in np.lexsort((ties, expected)):
        groups[category] = group
        mass += expected[category]
        if mass >= MIN_EXPECTED:
            group, mass = group + 1, 0.0
    if 0 < mass < MIN_EXPECTED and group > 0:
        groups[groups == group] = group - 1
    return groups


def quadratic_form(difference: np.ndarray, covariance: np.ndarray) -> tuple[float, int]:
    """d' pinv(C) d and the rank of C."""
    values, vectors = np.linalg.eigh(covariance)
    kept = values > 1e-9 * max(values.max(initial=0.0), 1e-300)
    projected = vectors[:, kept].T @ difference
    return float((projected**2 / values[kept]).sum()), int(kept.sum())
