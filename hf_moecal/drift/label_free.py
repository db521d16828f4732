"""Accuracy and calibration of unlabelled predictions, estimated from a labelled reference by its routing
configurations.

A window without labels is scored as if only the *mix* had changed: every cell of (confidence bin, third of the routing
features) keeps the accuracy that it has in the reference, and the cells are weighted as they occur in the window.
That is the shift under which soft routing loses its calibration, and the only one that can be seen without labels.
When the accuracy *within* a cell changes too (new topics, new label meaning), the estimate is too optimistic and only
labels show it; `uncovered` is the share of the window in cells that the reference never saw.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from scipy import sparse

from ..metrics.binning import DEFAULT_BINS, bin_index, equal_width


ROUTING = ("disagreement", "routing_entropy")
# Cases by which a cell is drawn to its confidence bin, and a bin to the whole: small cells know little.
PRIOR = 10.0


class LabelFreeEstimate:
    """Streaming label-free estimate of a window's accuracy and calibration.

    Args:
        reference: columns `confidence`, `correct` and those of [`ROUTING`] that exist, [n] each.
        bins: number of equal-width confidence bins.
    """

    def __init__(self, reference: Mapping[str, np.ndarray], *, bins: int = DEFAULT_BINS) -> None:
        self.edges, self.bins = equal_width(bins), bins
        self.cuts = {
            name: np.unique(np.quantile(reference[name], [1 / 3, 2 / 3])) for name in ROUTING if name in reference
        }
        self.thirds = int(np.prod([len(cut) + 1 for cut in self.cuts.values()]))
        correct = np.asarray(reference["correct"], np.float64)
        cell, size = self._cell(reference), self.bins * self.thirds
        self.reference = np.bincount(cell, minlength=size)
        right = np.bincount(cell, correct, size)
        self.overall = float(correct.mean())
        per_bin = (self._by_bin(right) + PRIOR * self.overall) / (self._by_bin(self.reference) + PRIOR)
        self.accuracy = (right + PRIOR * np.repeat(per_bin, self.thirds)) / (self.reference + PRIOR)
        self.reset()

    def _cell(self, rows: Mapping[str, np.ndarray]) -> np.ndarray:
        cell = bin_index(np.asarray(rows["confidence"], np.float64), self.edges)
        for name, cut in self.cuts.items():
            cell = cell * (len(cut) + 1) + np.searchsorted(cut, rows[name], "left")
        return cell

    def _by_bin(self, cells: np.ndarray) -> np.ndarray:
        return cells.reshape(self.bins, self.thirds).sum(axis=1)

    def reset(self) -> None:
        """Empties the window."""
        self.window = {"count": np.zeros(self.bins * self.thirds), "confidence": np.zeros(self.bins)}

    def cells(self, rows: Mapping[str, np.ndarray]) -> dict[str, sparse.csr_array]:
        """What each row (columns `confidence` and the routing features of the reference) adds to a window.

        Returns:
            `count` [rows, cells] and `confidence` [rows, bins].
        """
        cell, n = self._cell(rows), len(rows["confidence"])
        ends = np.arange(n + 1)
        return {
            "count": sparse.csr_array((np.ones(n), cell, ends), shape=(n, self.bins * self.thirds)),
            "confidence": sparse.csr_array((rows["confidence"], cell // self.thirds, ends), shape=(n, self.bins)),
        }

    def update(self, parts: Mapping[str, sparse.csr_array]) -> None:
        """Adds what [`cells`] gave, or sums of it, to the window."""
        for name, values in parts.items():
            self.window[name] += np.asarray(values.sum(axis=0)).ravel()

    def result(self) -> dict[str, float]:
        """The estimate for the window.

        Returns:
            `accuracy` with its standard error `accuracy_se` (sampling only: it does not cover a broken assumption),
            `reference_accuracy`, mean `confidence`, `signed_gap` (confidence minus accuracy), `ece`, and `uncovered`.
        """
        count = self.window["count"]
        n = count.sum()
        share = count / n
        accuracy = float((share * self.accuracy).sum())
        confidence = float(self.window["confidence"].sum() / n)
        noise = self.accuracy * (1 - self.accuracy) / (self.reference + PRIOR)
        gaps = self.window["confidence"] - self._by_bin(count * self.accuracy)
        return {
            "accuracy": accuracy,
            "accuracy_se": float(np.sqrt((share**2 * noise).sum() + accuracy * (1 - accuracy) / n)),
            "reference_accuracy": self.overall,
            "confidence": confidence,
            "signed_gap": confidence - accuracy,
            "ece": float(np.abs(gaps).sum() / n),
            "uncovered": float(share[self.reference == 0].sum()),
        }
