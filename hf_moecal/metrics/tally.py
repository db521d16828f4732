"""Everything that a binned figure needs to know of a set of examples, as sums that can be added up."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .binning import MOMENTS, Edges, bin_index, cells
from .chance import Bins, gamma_tail
from .figures import BRIER_TERMS, ERRORS, brier_decomposition, errors
from .inputs import Rows
from .uncertainty import calibrated_p, error_interval, evidence, gap_interval


TOTALS = ("weight", "weight2", "confidence", "event", "hit", "nll", "brier", "gap2", "within")
_DRAWN_ROWS = 500  # up to here classwise errors of a calibrated model are drawn; of more rows their moments will do
_DRAWS = 500


@dataclass
class Tally:
    """Sums over examples: `moments` [7, K, B, 2] (see [`cells`]) and `totals` (named by `TOTALS`, weighted); how many
    rows there were, and how many whose label had probability zero; over how many outcomes of the event a Brier score
    sums up (that of the winner: right or wrong); `null`, classwise errors of a calibrated model."""

    moments: np.ndarray
    totals: np.ndarray
    n: int
    zero: float
    outcomes: int = 1
    null: np.ndarray | None = None

    @classmethod
    def of(cls, rows: Rows, edges: list[Edges], mode: str, *, drawn: bool = False) -> Tally:
        """The tally of some rows under one set of edges per class; `drawn` prepares the p-value of classwise mode."""
        event = rows.event.astype(np.float64)
        hit = event
        if mode == "positive_class":
            hit = np.where(rows.confidence > 0.5, event, 1.0 - event)
        gap, within = rows.confidence - event, rows.confidence * (1.0 - rows.confidence)
        weight = np.ones(len(event)) if rows.weight is None else rows.weight
        values = (weight, rows.confidence, event, hit, rows.nll, rows.brier, gap * gap, within)
        totals = np.array([weight.sum(), *(_sum(value, rows.weight) for value in values)])
        zero = np.nan if np.isnan(rows.nll).any() else float(np.isinf(rows.nll).sum())
        if rows.scores is None:
            moments = cells(rows.confidence, rows.event, edges[0], rows.weight)
            return cls(moments, totals, len(event), zero, 2 if mode == "top_label" else 1)
        classes, bins = rows.scores.shape[1], max(edge.bins for edge in edges)
        moments = np.zeros((MOMENTS, classes, bins, 2))
        for k in range(classes):
            edge = edges[k % len(edges)]
            moments[:, k, : edge.bins] = cells(rows.scores[:, k], rows.events[:, k], edge, rows.weight)[:, 0]
        return cls(moments, totals, len(event), zero, null=_null_errors(rows, edges) if drawn else None)

    def __add__(self, other: Tally) -> Tally:
        added = (getattr(self, name) + getattr(other, name) for name in ("moments", "totals", "n", "zero"))
        return Tally(*added, self.outcomes)

    def figures(self, intervals: bool) -> dict:
        """Every figure that bins and sums can give; NaN where there are no examples."""
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = dict(zip(TOTALS, (self.totals / self.totals[0]).tolist(), strict=True))
        n = self.n
        return {
            **(errors(self.moments) if n else dict.fromkeys(ERRORS, np.nan)),
            **self._uncertainty(mean, intervals and n > 0),
            "signed_gap": mean["confidence"] - mean["event"],
            "accuracy": mean["hit"],
            "confidence": mean["confidence"],
            "nll": mean["nll"],
            "n_zero_probability": int(self.zero) if np.isfinite(self.zero) else np.nan,
            "brier": mean["brier"],
            "brier_decomposition": self._decomposition() if n else dict.fromkeys(BRIER_TERMS, np.nan),
            "n": n,
        }

    def _uncertainty(self, mean: dict[str, float], wanted: bool) -> dict:
        if not wanted:
            unknown = [np.nan, np.nan]
            return {"ece_interval": unknown, "calibrated_p": np.nan, "signed_gap_interval": list(unknown)}
        tested = evidence(Bins.of(self.moments), None if self.null is None else self._drawn_p())
        p = calibrated_p(tested)
        count = self.totals[0] ** 2 / self.totals[1]
        within = min(mean["within"], mean["confidence"] * (1 - mean["confidence"]))
        gap = gap_interval(mean["confidence"], mean["event"], mean["gap2"], within, count)
        return {"ece_interval": error_interval(tested), "calibrated_p": p, "signed_gap_interval": gap}

    def _drawn_p(self) -> float:
        error = errors(self.moments)["ece"]
        as_large = int((self.null >= error - 1e-12).sum())
        if as_large >= 10:
            return (1 + as_large) / (1 + len(self.null))
        mean = self.null.mean()
        central = self.null - mean
        tail = gamma_tail(error, float(mean), float((central**2).mean()), float((central**3).mean()))
        return min(tail, 10 / len(self.null))

    def _decomposition(self) -> dict[str, float]:
        per_class = [brier_decomposition(self.moments[:, k]) for k in range(self.moments.shape[1])]
        return {name: self.outcomes * float(np.sum([terms[name] for terms in per_class])) for name in per_class[0]}


def _sum(value: np.ndarray, weight: np.ndarray | None) -> float:
    return float(value.sum() if weight is None else (value * weight).sum())


def _null_errors(rows: Rows, edges: list[Edges]) -> np.ndarray | None:
    """Classwise errors [R] of the same rows with labels drawn from their own probabilities.

    One row takes part in every class, and in a few rows a single wrong answer moves two of them: nothing simpler
    will do. Two classes mirror each other and need none of this.
    """
    n, classes = rows.scores.shape
    if classes < 3 or not 0 < n <= _DRAWN_ROWS or rows.events.dtype != bool or rows.weight is not None:
        return None
    bins = max(edge.bins for edge in edges)
    places = np.stack([bin_index(rows.scores[:, k], edges[k % len(edges)]) + k * bins for k in range(classes)], 1)
    mass = np.bincount(places.ravel(), rows.scores.ravel(), classes * bins)
    below = np.cumsum(rows.scores, 1)
    drawn = np.random.default_rng(0).random((_DRAWS, n)) * below[:, -1]
    labels = np.zeros((_DRAWS, n), np.intp)
    for k in range(classes - 1):
        labels += drawn > below[:, k]
    index = places[np.arange(n), labels] + np.arange(_DRAWS)[:, None] * (classes * bins)
    hits = np.bincount(index.ravel(), minlength=_DRAWS * classes * bins).reshape(_DRAWS, -1)
    return np.abs(mass - hits).sum(1) / (n * classes)
