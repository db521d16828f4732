"""Calibration errors, their noise and their uncertainty, all from the moments of each bin."""

from __future__ import annotations

import math

import numpy as np


ERRORS = ("ece", "ece_l2", "ece_max", "ece_debiased", "ece_l2_debiased", "ece_noise_floor")
BRIER_TERMS = ("brier", "reliability", "resolution", "uncertainty", "within_bins")


def errors(moments: np.ndarray) -> dict[str, float]:
    """L1, L2, largest and debiased calibration errors of one group.

    Args:
        moments (`[7, K, B, 2]`): see [`cells`]; K is the number of classes in classwise mode, else 1. Errors are means
            over classes (`ece_max` is the maximum, L2 figures are the root of the mean square).
    """
    weight, mass, hits, _, _, squares, weight2 = moments.sum(-1)
    n = weight.sum(-1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        count = np.where(weight > 0, weight**2 / weight2, 0.0)
        gap = np.where(weight > 0, (mass - hits) / weight, 0.0)
        variance = np.maximum(squares - hits**2 / weight, 0.0) / (weight * (count - 1.0))
        share = weight / n
    several = count > 1.0 + 1e-9
    variance = np.where(several, variance, 0.0)
    unbiased = np.where(several, gap**2 - variance, 0.0)
    return {
        "ece": _mean(np.abs(mass - hits).sum(-1) / n[:, 0]),
        "ece_l2": math.sqrt(_mean((share * gap**2).sum(-1))),
        "ece_max": float(np.abs(gap).max()),
        "ece_debiased": max(0.0, _mean((share * (np.abs(gap) - _folded_bias(gap, variance))).sum(-1))),
        "ece_l2_debiased": math.sqrt(max(0.0, _mean((share * unbiased).sum(-1)))),
        "ece_noise_floor": _mean((share * expected_gap(moments)).sum(-1)),
    }


def _mean(values: np.ndarray) -> float:
    return float(values.mean())


def _folded_bias(gap: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """How much larger |gap + noise| is than |gap| on average, for normal noise of the given variance."""
    size, spread = np.abs(gap), np.sqrt(variance)
    with np.errstate(invalid="ignore", divide="ignore"):
        z = np.where(spread > 0, size / spread, np.inf)
    erf = np.vectorize(math.erf, otypes=[float])(z / math.sqrt(2.0))
    return spread * math.sqrt(2.0 / math.pi) * np.exp(-0.5 * z * z) + size * erf - size


def expected_gap(moments: np.ndarray) -> np.ndarray:
    """Mean |gap| of each bin if every confidence were right.

    Hard references: De Moivre's mean deviation of a binomial, scaled to the variance of unequal confidences. Soft
    references: normal noise with the spread of the residuals in the bin.
    """
    weight, mass, hits, mass2, cross, squares, weight2 = moments.sum(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        count = np.where(weight > 0, weight**2 / weight2, 0.0)
        mass, hits, mass2, cross, squares = (value * count / weight for value in (mass, hits, mass2, cross, squares))
        mean = mass / count
        even = count * mean * (1.0 - mean)
        shrink = np.sqrt(np.clip((mass - mass2) / even, 0.0, 1.0))
        hard = np.where(even > 0, _binomial_deviation(count, mean) * shrink / count, 0.0)
        residual = np.maximum(mass2 - 2 * cross + squares - (mass - hits) ** 2 / count, 0.0) / (count - 1.0)
        soft = np.where(count > 1, np.sqrt(2.0 / math.pi * residual / count), 0.0)
    return np.where(hits - squares > 1e-9 * np.maximum(count, 1.0), soft, hard)


def _binomial_deviation(count: np.ndarray, p: np.ndarray) -> np.ndarray:
    """E|X - np| of a binomial: 2 (m + 1) C(n, m + 1) p^(m+1) (1-p)^(n-m) with m = floor(np)."""
    lgamma = np.vectorize(math.lgamma, otypes=[float])
    n, p = np.where(count > 0, count, 1.0), np.where((p > 0) & (p < 1), p, 0.5)
    m = np.minimum(np.floor(n * p), n - 1)
    logs = lgamma(n + 1) - lgamma(m + 1) - lgamma(n - m) + (m + 1) * np.log(p) + (n - m) * np.log1p(-p)
    return 2.0 * np.exp(logs)


def brier_decomposition(moments: np.ndarray) -> dict[str, float]:
    """Murphy's terms of the squared error of the confidence, with the spread inside bins (Stephenson et al. 2008).

    `brier = reliability - resolution + uncertainty + within_bins`, exactly.
    """
    count, mass, hits, mass2, cross, _, _ = moments.sum(-1)
    n = count.sum()
    some = count > 0
    count, mass, hits = count[some], mass[some], hits[some]
    rate = hits.sum() / n
    within = (mass2.sum() - (mass**2 / count).sum() - 2 * (cross.sum() - (mass * hits / count).sum())) / n
    terms = {
        "brier": (mass2.sum() - 2 * cross.sum() + hits.sum()) / n,
        "reliability": ((mass - hits) ** 2 / count).sum() / n,
        "resolution": (count * (hits / count - rate) ** 2).sum() / n,
        "uncertainty": rate * (1.0 - rate),
        "within_bins": within,
    }
    return {name: float(value) for name, value in terms.items()}
