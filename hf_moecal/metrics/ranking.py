"""Figures of the order of the confidences: area under the risk-coverage curve, AUROC, smooth calibration error."""

from __future__ import annotations

import numpy as np

from .inputs import Rows


def ranking_figures(rows: Rows, mode: str) -> dict[str, float]:
    event = rows.event.astype(np.float64)
    sure, hit = rows.confidence, event
    if mode == "positive_class":
        sure = np.maximum(rows.confidence, 1.0 - rows.confidence)
        hit = np.where(rows.confidence > 0.5, event, 1.0 - event)
    return {"aurc": area_under_risk_coverage(sure, hit), "auroc": auroc(rows.confidence, event)}


def _by_value(confidence: np.ndarray, event: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number of examples and sum of events for each distinct confidence, in rising order."""
    order = np.argsort(confidence, kind="stable")
    ordered = confidence[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    return np.diff(np.append(starts, len(ordered))).astype(np.float64), np.add.reduceat(event[order], starts)


def auroc(confidence: np.ndarray, event: np.ndarray) -> float:
    """Chance that an example with the event has the higher confidence; ties count half. NaN if one side is missing."""
    if not len(confidence):
        return float("nan")
    count, hits = _by_value(confidence, event)
    misses = count - hits
    pairs = hits.sum() * misses.sum()
    below = np.cumsum(misses) - misses
    return float((hits * (below + 0.5 * misses)).sum() / pairs) if pairs > 0 else float("nan")


def area_under_risk_coverage(confidence: np.ndarray, hit: np.ndarray) -> float:
    """Mean error rate among the k most confident, over k = 1..n; ties in random order (their expectation)."""
    if not len(confidence):
        return float("nan")
    count, hits = _by_value(confidence, hit)
    count, errors = count[::-1], (count - hits)[::-1]
    before, wrong = np.cumsum(count) - count, np.cumsum(errors) - errors
    rank = np.arange(1.0, len(confidence) + 1.0)
    block = np.repeat(np.arange(len(count)), count.astype(np.int64))
    expected = wrong[block] + (rank - before[block]) * (errors / count)[block]
    return float((expected / rank).mean())
