"""Figures of the order of the confidences: area under the risk-coverage curve, AUROC, smooth calibration error."""

from __future__ import annotations

import numpy as np

from .inputs import Rows


_GRID = 4096  # cells of the grid that smooths residuals
_STEPS = 24  # halvings of the bandwidth's range


def ranking_figures(rows: Rows, mode: str) -> dict[str, float]:
    """`aurc`, `auroc` and `smooth_ece` of some rows; in classwise mode `smooth_ece` is the mean over classes."""
    event = rows.event.astype(np.float64)
    sure, hit = rows.confidence, event
    if mode == "positive_class":
        sure = np.maximum(rows.confidence, 1.0 - rows.confidence)
        hit = np.where(rows.confidence > 0.5, event, 1.0 - event)
    weight = rows.weight
    if rows.scores is None:
        smooth = smooth_ece(rows.confidence, event, weight)
    else:
        pairs = zip(rows.scores.T, rows.events.T, strict=True)
        smooth = float(np.mean([smooth_ece(c, y, weight) for c, y in pairs]))
    return {
        "aurc": area_under_risk_coverage(sure, hit, weight),
        "auroc": auroc(rows.confidence, event, weight),
        "smooth_ece": smooth,
    }


def smooth_ece(confidence: np.ndarray, event: np.ndarray, weight: np.ndarray | None = None) -> float:
    """Calibration error without bins (Blasiok & Nakkiran 2023).

    Residuals are smoothed with a reflected Gaussian whose width equals the resulting error.
    The reflected Gaussian on [0, 1] acts on the k-th cosine as a factor exp(-(pi k width)^2 / 2), so one Fourier
    transform serves every width.
    """
    if not len(confidence):
        return float("nan")
    cell = np.minimum((confidence * _GRID).astype(np.intp), _GRID - 1)
    upper = confidence * _GRID - cell
    share = 1.0 / len(confidence) if weight is None else weight / weight.sum()
    residual = (confidence - event) * share
    mass = np.bincount(cell, residual * (1.0 - upper), _GRID + 1)
    mass += np.bincount(cell + 1, residual * upper, _GRID + 1)
    mass[[0, -1]] *= 2.0  # the even extension holds the inner nodes twice and the outer ones once
    spectrum = np.fft.rfft(np.concatenate([mass, mass[-2:0:-1]]))
    frequency = np.pi * np.arange(len(spectrum))

    def error(width: float) -> float:
        smooth = np.fft.irfft(spectrum * np.exp(-0.5 * (frequency * width) ** 2))[: _GRID + 1]
        smooth[[0, -1]] *= 0.5
        return float(np.abs(smooth).sum())

    low, high = 0.0, 1.0
    for _ in range(_STEPS):
        width = 0.5 * (low + high)
        low, high = (width, high) if error(width) > width else (low, width)
    return error(high)


def _by_value(confidence: np.ndarray, event: np.ndarray, weight: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Number of examples and sum of events for each distinct confidence, in rising order."""
    order = np.argsort(confidence, kind="stable")
    ordered = confidence[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    if weight is None:
        return np.diff(np.append(starts, len(ordered))).astype(np.float64), np.add.reduceat(event[order], starts)
    return np.add.reduceat(weight[order], starts), np.add.reduceat((weight * event)[order], starts)


def auroc(confidence: np.ndarray, event: np.ndarray, weight: np.ndarray | None = None) -> float:
    """Chance that an example with the event has the higher confidence; ties count half. NaN if one side is missing."""
    if not len(confidence):
        return float("nan")
    count, hits = _by_value(confidence, event, weight)
    misses = np.maximum(count - hits, 0.0)
    pairs = hits.sum() * misses.sum()
    below = np.cumsum(misses) - misses
    return float((hits * (below + 0.5 * misses)).sum() / pairs) if pairs > 0 else float("nan")


def area_under_risk_coverage(confidence: np.ndarray, hit: np.ndarray, weight: np.ndarray | None = None) -> float:
    """Mean error rate among the k most confident, over k = 1..n; ties in random order (their expectation).

    A block of w equal confidences after W others, of which E are wrong, adds sum_j (E + j e / w) / (W + j) for
    j = 1..w. Written with the digamma function that holds for weights as well.
    """
    if not len(confidence):
        return float("nan")
    count, hits = _by_value(confidence, hit, weight)
    count, errors = count[::-1], (count - hits)[::-1]
    before, wrong = np.cumsum(count) - count, np.cumsum(errors) - errors
    rate = errors / count
    inverse = _digamma(before + count + 1.0) - _digamma(before + 1.0)
    return float(((wrong - before * rate) * inverse + errors).sum() / count.sum())


def _digamma(x: np.ndarray) -> np.ndarray:
    """Derivative of log gamma for x of 1 or more."""
    shifted = x + 8.0
    square = 1.0 / shifted**2
    series = square * (1 / 12 - square * (1 / 120 - square * (1 / 252 - square * (1 / 240 - square / 132))))
    return np.log(shifted) - 0.5 / shifted - series - sum(1.0 / (x + k) for k in range(8))
