"""What binned errors would be by chance: exact distributions of the right answers in each bin, added up.

Given the confidences, the number of right answers in a bin is a sum of independent draws. It is taken for a binomial
with the bin's mean, and its distribution is worked out, never estimated from the spread of the few rows at hand:
twenty rows at .99, all right, do not prove that the model is always right. Nothing here is random.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np


_GRID = 2048  # cells on which distributions of bins are added up
_REACH = 6.5  # standard deviations of a binomial that are looked at; beyond lie 1e-10
_NORMAL = 20.0  # standard deviation, in examples, from which a binomial is taken for normal
FEW = 64  # bins up to which their distributions are added up; of more, the first three moments are
STEPS_SHOW = 10.0  # variance, in examples, below which single answers show
_LEAST = 1e-12  # the smallest chance that is told apart from none
_LATTICE = np.linspace(-_REACH, _REACH, 131)
_WEIGHTS = np.exp(-0.5 * _LATTICE**2) / np.exp(-0.5 * _LATTICE**2).sum()


class Bins(NamedTuple):
    """The filled bins, of all classes: arrays [B]. `count` are effective rows; `share` sums to one."""

    share: np.ndarray
    count: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray
    spread: np.ndarray  # variance of the events, given the confidences, against that of a binomial
    residual: np.ndarray  # variance of confidence minus event
    rows: float  # effective rows of the whole
    shared: float  # by how much the variance of the sum exceeds that of independent bins

    @classmethod
    def of(cls, moments: np.ndarray) -> Bins:
        """From moments [7, K, B, 2], see [`cells`]. Of two classes one says all: the other is its mirror image."""
        moments = moments[:, 1:] if moments.shape[1] == 2 else moments
        classes = moments.shape[1]
        some = moments[0].sum(-1) > 0
        weight, mass, hits, mass2, cross, squares, weight2 = moments.sum(-1)[:, some]
        mean, count = mass / weight, weight**2 / weight2
        even = weight * mean * (1.0 - mean)
        with np.errstate(invalid="ignore", divide="ignore"):
            spread = np.where(even > 0, np.clip((mass - mass2) / even, 0.0, 1.0), 1.0)
        spread[count * mean * (1.0 - mean) < STEPS_SHOW] = 1.0  # where every single answer shows, keep whole steps
        spread *= soft_spread(moments)
        share = weight / weight.sum()
        rows = weight.sum() ** 2 / weight2.sum() / classes
        rate = np.clip(hits / weight, 0.0, 1.0)
        residual = np.maximum((mass2 - 2.0 * cross + squares) / weight - (mean - rate) ** 2, 0.0)
        return cls(share, count, mean, rate, spread, residual, rows, 2.0 if classes > 2 else 1.0)

    @property
    def error(self) -> float:
        return float(np.abs(self.share * (self.confidence - self.accuracy)).sum())


def soft_spread(moments: np.ndarray) -> float:
    """Variance of the events inside bins against that of events of 0 or 1: below one for shares of raters."""
    weight, _, hits, _, _, squares, weight2 = moments.sum(-1)
    some = weight > 0
    if hits.sum() - squares.sum() <= 1e-9 * weight.sum():
        return 1.0
    even = hits[some] - hits[some] ** 2 / weight[some]
    free = 1.0 - weight2[some] / weight[some] ** 2  # a bin of one row shows no variance
    left = squares[some] - hits[some] ** 2 / weight[some]
    return float(np.clip(left.sum() / max((even * free).sum(), 1e-300), 0.0, 1.0)) if (free > 0).any() else 1.0


def merged(bins: Bins) -> Bins:
    """All bins as one: its error is the size of the signed gap, which the error of more bins never falls below."""
    share, count = bins.share, bins.rows
    mean = float(share @ bins.confidence)
    even = mean * (1.0 - mean)
    within = float(share @ (bins.spread * bins.confidence * (1.0 - bins.confidence)))
    spread = min(1.0, within / even) if count * even >= STEPS_SHOW else 1.0
    rate = float(share @ bins.accuracy)
    gaps = bins.confidence - bins.accuracy
    residual = float(share @ (bins.residual + gaps**2)) - (mean - rate) ** 2
    one = [np.array([x]) for x in (1.0, count, mean, rate, spread, max(residual, 0.0))]
    return Bins(*one, bins.rows, 1.0)


def tail(bins: Bins, truth: np.ndarray, gap: np.ndarray, value: float, *, below: bool = False) -> float:
    """P(sum share (|gap - noise| - |gap|) >= value), or <= where `below`, if the bins' accuracy is `truth`."""
    if len(bins.share) > FEW or (bins.shared > 1.0 and not below):
        return _by_moments(bins, truth, gap, value, below)
    noise, chance = _atoms(bins.count, truth, bins.spread)
    parts = bins.share[:, None] * (np.abs(gap[:, None] - noise) - np.abs(gap)[:, None])
    low = np.where(chance > 0, parts, np.inf).min(1)
    size = len(bins.share)
    step = float((np.where(chance > 0, parts, -np.inf).max(1) - low).sum()) / (_GRID - size)
    if step < 1e-15:
        met = value >= low.sum() - 1e-12 if below else value <= low.sum() + 1e-12
        return 1.0 if met else _LEAST
    index = np.clip(np.rint((parts - low[:, None]) / step), 0, _GRID - 1).astype(np.intp)
    index += np.arange(size)[:, None] * _GRID
    mass = np.bincount(index.ravel(), chance.ravel(), size * _GRID).reshape(size, _GRID)
    total = np.fft.irfft(np.fft.rfft(mass, axis=1).prod(0), _GRID)
    place, rounding = (value - low.sum()) / step, math.sqrt(size)
    part = total[: max(math.floor(place + rounding) + 1, 0)] if below else total[max(math.ceil(place - rounding), 0) :]
    return float(np.clip(part.sum(), _LEAST, 1.0))


def _by_moments(bins: Bins, truth: np.ndarray, gap: np.ndarray, value: float, below: bool) -> float:
    """The same from mean, variance and skewness of the sum, by a gamma distribution (Wilson & Hilferty)."""
    cumulants = np.zeros(3)
    width = np.sqrt(bins.count * truth * (1.0 - truth))
    for part in np.array_split(np.argsort(width), max(1, len(width) // FEW)):
        noise, chance = _atoms(bins.count[part], truth[part], bins.spread[part])
        size = np.abs(gap[part])[:, None]
        parts = bins.share[part][:, None] * (np.abs(gap[part][:, None] - noise) - size)
        mean = (chance * parts).sum(1)
        central = parts - mean[:, None]
        cumulants += mean.sum(), (chance * central**2).sum(), (chance * central**3).sum()
    tail = gamma_tail(value, cumulants[0], cumulants[1] * bins.shared, cumulants[2] * bins.shared**1.5)
    return max(1.0 - tail, _LEAST) if below else tail


def gamma_tail(value: float, mean: float, variance: float, third: float) -> float:
    """P(X >= value) of a shifted gamma distribution with the given mean, variance and third central moment."""
    if variance <= 1e-30:
        return 1.0 if value <= mean + 1e-12 else _LEAST
    z, skew = (value - mean) / math.sqrt(variance), third / variance**1.5
    if skew > 1e-6:
        shape = 4.0 / skew**2
        ratio = max(1.0 + z / math.sqrt(shape), 0.0)
        z = (ratio ** (1 / 3) - 1.0 + 1.0 / (9.0 * shape)) * 3.0 * math.sqrt(shape)
    return max(0.5 * math.erfc(z / math.sqrt(2.0)), _LEAST)


def _atoms(count: np.ndarray, truth: np.ndarray, spread: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values and chances [B, W] of accuracy minus `truth` of each bin."""
    count = np.maximum(np.rint(count), 1.0)[:, None]
    truth, scale = np.clip(truth, 0.0, 1.0)[:, None], np.sqrt(spread)[:, None]
    deviation = np.sqrt(count * truth * (1.0 - truth))
    if deviation.min() > _NORMAL:
        return _LATTICE * scale * deviation / count, np.broadcast_to(_WEIGHTS, (len(count), len(_WEIGHTS)))
    reach = np.ceil(_REACH * np.minimum(deviation, _NORMAL)) + 8.0
    width = int(reach.max())
    offset = np.arange(-width, width + 1.0)
    right = np.rint(count * truth) + offset
    inside = (right >= 0) & (right <= count)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = (count - right) / (right + 1.0) * (truth / (1.0 - truth))  # of the next to this one
        steps = np.where((right >= 0) & (right < count), np.log(ratio), 0.0)
    logs = np.concatenate([np.zeros((len(count), 1)), np.cumsum(steps, 1)[:, :-1]], 1)
    logs = np.where(inside, logs, -np.inf)
    certain = (truth <= 0.0) | (truth >= 1.0)
    logs = np.where(certain, np.where(offset == 0, 0.0, -np.inf), logs)
    noise = right / count - truth
    large = deviation > _NORMAL
    if large.any():
        z = offset * (_REACH / width)
        logs = np.where(large, -0.5 * z * z, logs)
        noise = np.where(large, z * deviation / count, noise)
    chance = np.exp(logs - logs.max(1, keepdims=True))
    return noise * scale, chance / chance.sum(1, keepdims=True)
