"""Everything that a binned figure needs to know of a set of examples, as sums that can be added up."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .binning import MOMENTS, Edges, bin_index, cells
from .figures import BRIER_TERMS, ERRORS, brier_decomposition, covering_interval, errors, interval
from .inputs import Rows


BLOCKS = 64  # classwise resampling draws blocks of rows, because one row takes part in every class
_CHUNK = 1 << 15
TOTALS = ("n", "confidence", "event", "hit", "nll", "brier", "gap2")


@dataclass
class Tally:
    """Sums over examples: `moments` [6, K, B, 2] (see [`cells`]), `totals` (named by `TOTALS`) and, in classwise mode,
    `blocks` [64, K, B] of summed gaps and `block_sizes` [64]."""

    moments: np.ndarray
    totals: np.ndarray
    blocks: np.ndarray | None = None
    block_sizes: np.ndarray | None = None

    @classmethod
    def of(cls, rows: Rows, edges: list[Edges], mode: str, *, first_row: int = 0) -> Tally:
        """The tally of some rows under one set of edges per class; `first_row` continues the numbering of blocks."""
        n = len(rows.confidence)
        event = rows.event.astype(np.float64)
        hit = event
        if mode == "positive_class":
            hit = np.where(rows.confidence > 0.5, event, 1.0 - event)
        gap = rows.confidence - event
        sums = (array.sum() for array in (rows.confidence, event, hit, rows.nll, rows.brier, gap * gap))
        totals = np.array([n, *sums], dtype=np.float64)
        if rows.scores is None:
            return cls(cells(rows.confidence, rows.event, edges[0]), totals)
        classes, bins = rows.scores.shape[1], max(edge.bins for edge in edges)
        moments = np.zeros((MOMENTS, classes, bins, 2))
        for k in range(classes):
            edge = edges[k % len(edges)]
            moments[:, k, : edge.bins] = cells(rows.scores[:, k], rows.events[:, k], edge)[:, 0]
        return cls(moments, totals, *_blocks(rows, edges, first_row))

    def __add__(self, other: Tally) -> Tally:
        if self.blocks is None:
            return Tally(self.moments + other.moments, self.totals + other.totals)
        return Tally(
            self.moments + other.moments,
            self.totals + other.totals,
            self.blocks + other.blocks,
            self.block_sizes + other.block_sizes,
        )

    def figures(self, bootstrap: int, seed: int) -> dict:
        """Every figure that bins and sums can give; NaN where there are no examples."""
        with np.errstate(invalid="ignore"):
            mean = dict(zip(TOTALS, (self.totals / self.totals[0]).tolist(), strict=True))
        n = int(self.totals[0])
        gap = mean["confidence"] - mean["event"]
        margin = 1.96 * np.sqrt(max(mean["gap2"] - gap * gap, 0.0) / max(n - 1, 1)) if n else np.nan
        return {
            **(errors(self.moments) if n else dict.fromkeys(ERRORS, np.nan)),
            "ece_interval": self._interval(bootstrap, seed) if n and bootstrap else [np.nan, np.nan],
            "signed_gap": gap,
            "signed_gap_interval": [float(gap - margin), float(gap + margin)],
            "accuracy": mean["hit"],
            "confidence": mean["confidence"],
            "nll": mean["nll"],
            "brier": mean["brier"],
            "brier_decomposition": self._decomposition() if n else dict.fromkeys(BRIER_TERMS, np.nan),
            "n": n,
        }

    def _decomposition(self) -> dict[str, float]:
        per_class = [brier_decomposition(self.moments[:, k]) for k in range(self.moments.shape[1])]
        return {name: float(np.sum([terms[name] for terms in per_class])) for name in per_class[0]}

    def _interval(self, bootstrap: int, seed: int) -> list[float]:
        if self.blocks is None:
            return interval(self.moments[:, 0], bootstrap, seed)
        rng = np.random.default_rng(seed)
        some = np.flatnonzero(self.block_sizes)
        draws = rng.multinomial(len(some), np.full(len(some), 1 / len(some)), size=bootstrap).astype(np.float64)
        sizes = draws @ self.block_sizes[some]
        classes = self.blocks.shape[1]
        drawn, noise = np.zeros(bootstrap), np.zeros(bootstrap)
        for k in range(classes):
            sums = draws @ self.blocks[some, k]
            drawn += np.abs(sums).sum(1) / sizes / classes
            noise += np.abs(sums - self.blocks[some, k].sum(0)).sum(1) / sizes / classes
        return covering_interval(errors(self.moments)["ece"], drawn, noise)


def _blocks(rows: Rows, edges: list[Edges], first_row: int) -> tuple[np.ndarray, np.ndarray]:
    """Gaps summed by block, class and bin. A multiplicative hash of its number gives each row a block."""
    n, classes = rows.scores.shape
    bins = max(edge.bins for edge in edges)
    number = np.arange(first_row, first_row + n, dtype=np.uint64)
    block = ((number * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(58)).astype(np.intp)
    total = np.zeros((BLOCKS, classes, bins))
    for k in range(classes):
        for start in range(0, n, _CHUNK):
            part = slice(start, start + _CHUNK)
            c = rows.scores[part, k]
            index = block[part] * bins + bin_index(c, edges[k % len(edges)])
            total[:, k] += np.bincount(index, c - rows.events[part, k], BLOCKS * bins).reshape(BLOCKS, bins)
    return total, np.bincount(block, minlength=BLOCKS).astype(np.float64)
