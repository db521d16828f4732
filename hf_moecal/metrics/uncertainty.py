"""How far the binned errors of a sample may be from those of the population: a p-value of calibration, and intervals.

The error meant is `sum_b P(b) |E[confidence - event | b]|` of the population under the bins at hand; `ece` and
`ece_debiased` both estimate it. Nothing here is random.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from .chance import FEW, STEPS_SHOW, Bins, merged, tail


LEVEL = 0.05
_Z = 1.959963984540054  # normal quantile that leaves out half of LEVEL
_SURE = 1.5  # standard errors by which a bin's gap is shortened before its sign is believed
_HALVINGS = 3
_STEPS = 50
_normal = np.vectorize(lambda z: 0.5 * math.erfc(-z / math.sqrt(2.0)), otypes=[float])


def evidence(bins: Bins, p_binned: float | None = None) -> list[tuple[Bins, float]]:
    """What is tested, each with the chance that a calibrated model would show as much: the bins, and all as one.

    The one has more power where a model is too sure, or not sure enough, throughout. Over three classes and more the
    gaps add up to nothing, and there is the first alone. `p_binned` is its p-value where other means have found it.
    """
    tested = [bins] if bins.shared > 1.0 else [bins, merged(bins)]
    known = [p_binned, None]
    return [
        (part, tail(part, part.confidence, np.zeros(len(part.share)), part.error) if p is None else p)
        for part, p in zip(tested, known, strict=False)
    ]


def calibrated_p(tested: list[tuple[Bins, float]]) -> float:
    """Chance that a calibrated model would show as much against itself, by whichever of the tests."""
    return min(1.0, len(tested) * min(p for _, p in tested))


def error_interval(tested: list[tuple[Bins, float]]) -> list[float]:
    """95 % interval of the true error; it starts above zero exactly where [`calibrated_p`] is below .05."""
    bins = tested[0][0]
    low = max(_lower(part, p, len(tested)) for part, p in tested)
    above = max(_upper(bins) - bins.error, 0.0)
    return [low, bins.error + math.sqrt(above**2 + _Z**2 * _between(bins))]


def _lower(bins: Bins, p: float, tests: int) -> float:
    """The smallest error, on the way from calibrated to what was seen, that would show this much often enough.

    At zero only this end can miss, so it takes the whole 5 %; further on it shares them with the upper end. Noise
    adds to an error only where it may turn a bin's sign: a bin counts as far from zero as it surely is.
    """
    error, gap = bins.error, bins.confidence - bins.accuracy
    sure = np.sign(gap) * np.maximum(np.abs(gap) - _SURE * _deviation(bins, bins.accuracy, floor=True), 0.0)
    between = _between(bins)

    def excess(t: float) -> float:
        noise = float((bins.share**2 * _deviation(bins, bins.confidence - t * gap) ** 2).sum()) * bins.shared
        wider = math.sqrt(1.0 + t * t * between / noise) if noise > 0 else 1.0
        chance = tail(bins, bins.confidence - t * gap, t * sure, (1.0 - t) * error / wider)
        return _rarity(LEVEL) - _rarity(chance * tests / (1.0 - 0.5 * t))

    low, high = (0.0, _rarity(LEVEL) - _rarity(p * tests)), (1.0, _rarity(LEVEL) - _rarity(0.5))
    if low[1] >= 0.0:
        return 0.0
    for _ in range(_HALVINGS):
        middle = 0.5 * (low[0] + high[0])
        value = excess(middle)
        low, high = ((middle, value), high) if value < 0 else (low, (middle, value))
    return error * (low[0] + low[1] / (low[1] - high[1]) * (high[0] - low[0]))


def _rarity(chance: float) -> float:
    """A scale on which normal tails are nearly straight, so that a point between two can be read off."""
    return math.sqrt(-2.0 * math.log(min(chance, 1.0)))


def _upper(bins: Bins) -> float:
    """The largest error that would still show as little as this, were it spread so that it shows least.

    For a given sum, gaps that are the same multiple of their standard error hide best behind the noise. Towards one
    half there is more noise to hide behind; but where wrong answers are rare, one of them hides that the model is
    too modest.
    """
    sides = np.where(bins.confidence > 0.5, -1.0, 1.0)
    found = _upper_on(bins, sides)
    rare = bins.rows * float(bins.share @ np.minimum(bins.confidence, 1.0 - bins.confidence)) < 2.0 * STEPS_SHOW
    return max(found, _upper_on(bins, -sides)) if rare else found


def _upper_on(bins: Bins, side: np.ndarray) -> float:
    """The same with each bin's truth on one side of its confidence; on the side that it surely is on, where it is."""
    gap = bins.confidence - bins.accuracy
    known = np.abs(gap) > _Z * _deviation(bins, bins.confidence)
    side = np.where(known, -np.sign(gap), side)

    def truth(multiple: np.ndarray | float) -> np.ndarray:
        return _score_limit(bins.confidence, bins.count, multiple, side, bins.spread)

    even = np.minimum(*(bins.count * rate * (1.0 - rate) for rate in (bins.confidence, bins.accuracy)))
    if bins.share[even < 25.0].sum() <= 0.05 or len(bins.share) > FEW:
        return _upper_of_many(bins, truth)

    def chance(multiple: float) -> float:
        at = truth(multiple)
        most = bins.error - float(bins.share @ np.abs(bins.confidence - at))
        found = tail(bins, at, bins.confidence - at, most, below=True)
        return math.sqrt(found) if bins.shared > 1.0 else found  # one wrong answer shows in two classes at once

    low, high = 0.0, 2.0
    while chance(high) > 0.5 * LEVEL and high < 1e3:
        low, high = high, 2.0 * high
    for _ in range(8):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if chance(middle) > 0.5 * LEVEL else (low, middle)
    return float(bins.share @ np.abs(bins.confidence - truth(high)))


def _upper_of_many(bins: Bins, truth: Callable[[np.ndarray], np.ndarray]) -> float:
    """The same where noise is as good as normal."""
    multiples = np.linspace(0.0, 1.0, _STEPS + 1)[:, None] ** 2 * (8.0 + 1.2 * _largest(bins))
    rate = truth(multiples)
    far = np.abs(bins.confidence - rate)
    mean, variance = _folded(far, _deviation(bins, rate))
    noise = (bins.share**2 * variance).sum(1) * bins.shared
    least = np.maximum.accumulate((bins.share * mean).sum(1) - _Z * np.sqrt(noise))
    return float(np.interp(bins.error, least, (bins.share * far).sum(1)))


def _largest(bins: Bins) -> float:
    """The largest gap in standard errors, both of the calibrated model and of what was seen."""
    gap = np.abs(bins.confidence - bins.accuracy)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = gap / _deviation(bins, bins.accuracy, floor=True)
    return float(np.nan_to_num(ratio, posinf=0.0).max(initial=0.0))


def _between(bins: Bins) -> float:
    """Variance of the error over draws of the confidences: what each adds to it varies, in its bin and between bins.

    It is the variance of what each example adds, less that of the events inside bins; a bin of one shows none of that.
    """
    gap = bins.confidence - bins.accuracy
    each = float((bins.share * (bins.residual + gap**2)).sum()) - bins.error**2
    seen = float((bins.share * np.maximum(1.0 - 1.0 / bins.count, 0.0)).sum())
    rate = float(bins.share @ bins.accuracy)
    inside = float((bins.share * bins.accuracy * (1.0 - bins.accuracy)).sum()) / seen if seen > 0.1 else None
    return max(each - (rate * (1.0 - rate) if inside is None else inside), 0.0) / bins.rows


def _deviation(bins: Bins, truth: np.ndarray, *, floor: bool = False) -> np.ndarray:
    """Standard error of each bin's accuracy; `floor` adds two cases of either kind, for where no variance is seen."""
    if floor:
        truth = (truth * bins.count + 2.0) / (bins.count + 4.0)
    return np.sqrt(np.maximum(bins.spread * truth * (1.0 - truth), 0.0) / bins.count)


def _folded(far: np.ndarray, deviation: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of |far + noise| for normal noise."""
    with np.errstate(divide="ignore", invalid="ignore"):
        z = np.where(deviation > 0, far / deviation, np.inf)
        mean = 2.0 * deviation * np.exp(-0.5 * z * z) / math.sqrt(2.0 * math.pi) + far * (2.0 * _normal(z) - 1.0)
    return mean, np.maximum(far**2 + deviation**2 - mean**2, 0.0)


def _score_limit(rate: np.ndarray, count: np.ndarray, z: Any, side: Any, spread: Any) -> np.ndarray:
    """The rate that lies `z` of its own standard errors above (`side` 1) or below (-1) the given one (Wilson)."""
    square = z * z * spread / count
    middle = (rate + 0.5 * square) / (1.0 + square)
    half = np.sqrt(np.maximum(square * rate * (1.0 - rate) + 0.25 * square**2, 0.0)) / (1.0 + square)
    return np.clip(middle + side * half, 0.0, 1.0)


def score_interval(rate: np.ndarray, count: np.ndarray, spread: np.ndarray | float = 1.0) -> np.ndarray:
    """95 % intervals [2, B] of rates: Wilson's corrected for continuity, which hardly ever cover less than .945."""
    rate, count = np.asarray(rate, float), np.asarray(count, float)
    with np.errstate(divide="ignore", invalid="ignore"):
        ends = []
        for side in (-1.0, 1.0):
            end = _score_limit(np.clip(rate + side * 0.5 / count, 0.0, 1.0), count, _Z, side, spread)
            ends.append(np.where(rate == (side > 0), rate, end))
    return np.stack(ends)


def gap_interval(confidence: float, event: float, gap2: float, within: float, count: float) -> list[float]:
    """95 % interval of mean confidence minus mean event: that of the event, with the variance the confidences leave.

    Args:
        confidence, event: their means.
        gap2: mean square of confidence minus event.
        within: mean of confidence (1 - confidence), or what soft references leave of it.
        count: effective number of examples.
    """
    even = confidence * (1.0 - confidence)
    spread = min(1.0, within / even) if even > 0 and count * even >= STEPS_SHOW else 1.0
    low, high = score_interval(np.array([event]), np.array([count]), spread)[:, 0]
    gap = confidence - event
    margin = _Z * math.sqrt(max(gap2 - gap * gap, 0.0) / max(count - 1.0, 1.0))
    return [float(min(confidence - high, gap - margin)), float(max(confidence - low, gap + margin))]
