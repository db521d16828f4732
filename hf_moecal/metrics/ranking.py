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
    if rows.scores is None:
        smooth = smooth_ece(rows.confidence, event)
    else:
        smooth = float(np.mean([smooth_ece(c, y) for c, y in zip(rows.scores.T, rows.events.T, strict=True)]))
    return {
        "aurc": area_under_risk_coverage(sure, hit),
        "auroc": auroc(rows.confidence, event),
        "smooth_ece": smooth,
    }


def smooth_ece(confidence: np.ndarray, event: np.ndarray) -> float:
    """Calibration error without bins (Blasiok & Nakkiran 2023).

    Residuals are smoothed with a reflected Gaussian whose width equals the resulting error.
    The reflected Gaussian on [0, 1] acts on the k-th cosine as a factor exp(-(pi k width)^2 / 2), so one Fourier
    transform serves every width.
    """
    if not len(confidence):
        return float("nan")
    cell = np.minimum((confidence * _GRID).astype(np.intp), _GRID - 1)
    upper = confidence * _GRID - cell
    residual = (confidence - event) / len(confidence)
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
