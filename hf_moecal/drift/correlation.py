"""How many rows that follow each other are worth one independent row, where no column names their sequence.

Rows of one user resemble each other, and traffic interleaves its users: row t resembles t + 1 a little, and a hundred
later ones as little. What matters for a window is the sum over all lags, the *design effect*: the variance of a mean
over that of as many independent rows. It is estimated twice, and the larger counts:

- from the reference, in the order of its rows, by the variance of overlapping block means;
- from the log, by how much the means of its windows differ from those one, two, four and eight windows before. The
  median of the differences is used, so that one jump (what is looked for) changes nothing.

A reference that is not in the order in which it was logged shows no correlation; then the first eight windows of a
correlated log are tested as if their rows were independent.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import sparse


MAX_ROWS = 20_000  # of the reference, from which block means are taken
DIMENSIONS = 32  # to which a long vector of shares is projected
MEMORY = 64  # window means that are kept
LAGS = (1, 2, 4, 8)
FEWEST = 8  # differences of window means from which a median is taken
BLOCKS = 8  # blocks that must fit into the reference
CERTAINTY = 2.5  # standard errors above independence from which rows count as correlated


class Correlation:
    """The design effect of one feature.

    Args:
        rows: [n, d] values or sparse shares of the reference, in the order of its log.
    """

    def __init__(self, rows: np.ndarray | sparse.csr_array) -> None:
        width = rows.shape[1]
        self.basis = None
        if width > DIMENSIONS:
            signs = np.random.default_rng(0).choice([-1.0, 1.0], (width, DIMENSIONS))
            self.basis = signs / np.sqrt(DIMENSIONS)
        values = self._project(rows[:MAX_ROWS])
        values = values - values.mean(axis=0)
        covariance = values.T @ values / len(values)
        self.unit = float(np.trace(covariance))
        squares = float((covariance**2).sum())
        self.freedom = self.unit**2 / squares if squares > 0 else 1.0
        self.blocks = self._block_effects(values)
        self.lag1 = float((values[1:] * values[:-1]).sum() / (values**2).sum()) if self.unit > 0 else 0.0
        self.known = any(d > 1 + CERTAINTY * self._error(b) for b, d in self.blocks.items())
        self.size = len(values)
        self.means, self.counts = np.zeros((0, values.shape[1])), np.zeros(0)

    def _project(self, rows: Any) -> np.ndarray:
        if self.basis is not None:
            return np.asarray(rows @ self.basis)
        return rows.toarray() if sparse.issparse(rows) else np.asarray(rows, np.float64)

    def _block_effects(self, values: np.ndarray) -> dict[int, float]:
        self.size, block, found = len(values), 2, {}
        sums = np.concatenate([np.zeros((1, values.shape[1])), np.cumsum(values, axis=0)])
        while block <= self.size // BLOCKS and self.unit > 0:
            means = (sums[block:] - sums[:-block]) / block
            spread = float((means**2).sum(axis=1).mean()) * self.size / (self.size - block)
            found[block] = block * spread / self.unit
            block *= 2
        return found

    def _error(self, block: int) -> float:
        """Relative standard error of a block's effect (overlapping blocks of independent rows)."""
        return float(np.sqrt(4 * block / (3 * self.size)))

    def reference(self, n: float) -> float:
        """Design effect of the mean of n rows, from the reference."""
        if not self.known:
            return 1.0
        found, before = [1.0], 1.0
        for block, effect in self.blocks.items():
            within = effect if n <= self.size / BLOCKS else max(effect, 2 * effect - before)
            found.append(within * (1 + self._error(block)))
            before = effect
            if block >= n:
                break
        return max(found)

    def log(self) -> float:
        """Design effect of a window, from the windows of the log so far."""
        found = [1.0]
        median = self.freedom * (1 - 2 / (9 * self.freedom)) ** 3 / self.freedom
        for lag in LAGS:
            pairs = len(self.means) - lag
            if pairs < FEWEST or self.unit == 0:
                break
            squared = ((self.means[lag:] - self.means[:-lag]) ** 2).sum(axis=1)
            spread = squared / (self.unit * (1 / self.counts[lag:] + 1 / self.counts[:-lag]))
            effect = float(np.median(spread)) / median
            if effect > 1 + 6.0 / np.sqrt(pairs * self.freedom):
                found.append(effect)
        return max(found)

    def push(self, mean: np.ndarray, n: float) -> float:
        """Notes the mean of a closed window; returns the design effect at which to test it, at most n / 2."""
        mean = mean @ self.basis if self.basis is not None else mean
        self.means = np.concatenate([self.means, mean[None]])[-MEMORY:]
        self.counts = np.append(self.counts, n)[-MEMORY:]
        return max(1.0, min(max(self.reference(n), self.log()), n / 2))
