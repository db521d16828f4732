"""What chance alone does to binned errors: a p-value of calibration, and intervals that cover where nothing varies.

Given the confidences, the number of right answers in a bin is a sum of independent draws. It is taken for a binomial
with the bin's mean, and its distribution is worked out exactly, never estimated from the spread of the few rows that
are there: twenty rows at .99, all right, do not prove that the model is always right. Nothing here is random.

The error meant is that of the population under the bins at hand: `sum_b P(b) |E[confidence - event | b]|`; `ece` and
`ece_debiased` both estimate it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np


LEVEL = 0.05
_Z = 1.959963984540054  # normal quantile that leaves out half of LEVEL
_GRID = 2048  # cells on which distributions of bins are added up
_REACH = 6.5  # standard deviations of a binomial that are looked at; beyond lie 1e-10
_NORMAL = 20.0  # standard deviation, in examples, from which a binomial is taken for normal
_FEW = 64  # bins up to which their distributions are added up; of more, the first three moments are
_SURE = 1.5  # standard errors by which a bin's gap is shortened before its sign is believed
_STEPS_SHOW = 10.0  # variance, in examples, below which single answers show
_HALVINGS = 4
_STEPS = 50
_LEAST = 1e-12  # the smallest chance that is told apart from none
_LATTICE = np.linspace(-_REACH, _REACH, 131)
_WEIGHTS = np.exp(-0.5 * _LATTICE**2) / np.exp(-0.5 * _LATTICE**2).sum()
_normal = np.vectorize(lambda z: 0.5 * math.erfc(-z / math.sqrt(2.0)), otypes=[float])


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
        spread[count * mean * (1.0 - mean) < _STEPS_SHOW] = 1.0  # where every single answer shows, keep whole steps
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
    spread = min(1.0, within / even) if count * even >= _STEPS_SHOW else 1.0
    rate = float(share @ bins.accuracy)
    gaps = bins.confidence - bins.accuracy
    residual = float(share @ (bins.residual + gaps**2)) - (mean - rate) ** 2
    one = [np.array([x]) for x in (1.0, count, mean, rate, spread, max(residual, 0.0))]
    return Bins(*one, bins.rows, 1.0)


def evidence(bins: Bins, p_binned: float | None = None) -> list[tuple[Bins, float]]:
    """What is tested, each with the chance that a calibrated model would show as much: the bins, and all as one.

    The one has more power where a model is too sure, or not sure enough, throughout. Over three classes and more the
    gaps add up to nothing, and there is the first alone. `p_binned` is its p-value where other means have found it.
    """
    tested = [bins] if bins.shared > 1.0 else [bins, merged(bins)]
    known = [p_binned, None]
    return [
        (part, _tail(part, part.confidence, np.zeros(len(part.share)), part.error) if p is None else p)
        for part, p in zip(tested, known, strict=False)
    ]


def calibrated_p(tested: list[tuple[Bins, float]]) -> float:
    """Chance that a calibrated model would show as much against itself, by whichever of the tests."""
    return min(1.0, len(tested) * min(p for _, p in tested))


def error_interval(tested: list[tuple[Bins, float]]) -> list[float]:
    """95 % interval of the true error; it starts above zero exactly where [`calibrated_p`] is below .05."""
    bins = tested[0][0]
    low = max(_lower(part, p, len(tested)) for part, p in tested)
    return [low, max(_upper(bins), bins.error + _Z * math.sqrt(_between(bins)))]


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
        chance = _tail(bins, bins.confidence - t * gap, t * sure, (1.0 - t) * error / wider)
        return math.log(chance * (1.0 + (tests - 1.0) * (1.0 - t)) / (LEVEL * (1.0 - 0.5 * t)))

    low, high = (0.0, math.log(p * tests / LEVEL)), (1.0, math.log(1.0 / LEVEL))
    if low[1] >= 0.0:
        return 0.0
    for _ in range(_HALVINGS):
        middle = 0.5 * (low[0] + high[0])
        value = excess(middle)
        low, high = ((middle, value), high) if value < 0 else (low, (middle, value))
    return error * (low[0] + low[1] / (low[1] - high[1]) * (high[0] - low[0]))


def _upper(bins: Bins) -> float:
    """The largest error that would still show as little as this, were it spread so that it shows least.

    For a given sum, gaps that are the same multiple of their standard error hide best behind the noise. Towards one
    half there is more noise to hide behind; but where wrong answers are rare, one of them hides that the model is
    too modest.
    """
    sides = np.where(bins.confidence > 0.5, -1.0, 1.0)
    found = _upper_on(bins, sides)
    rare = bins.rows * float(bins.share @ np.minimum(bins.confidence, 1.0 - bins.confidence)) < 2.0 * _STEPS_SHOW
    return max(found, _upper_on(bins, -sides)) if rare else found


def _upper_on(bins: Bins, side: np.ndarray) -> float:
    """The same with each bin's truth on one side of its confidence; on the side that it surely is on, where it is."""
    gap = bins.confidence - bins.accuracy
    known = np.abs(gap) > _Z * _deviation(bins, bins.confidence)
    side = np.where(known, -np.sign(gap), side)

    def truth(multiple: np.ndarray | float) -> np.ndarray:
        return _score_limit(bins.confidence, bins.count, multiple, side, bins.spread)

    smallest = min((bins.count * rate * (1.0 - rate)).min() for rate in (bins.confidence, bins.accuracy))
    if smallest >= 25.0 or len(bins.share) > _FEW:
        return _upper_of_many(bins, truth)
    between = _between(bins)

    def chance(multiple: float) -> float:
        at = truth(multiple)
        noise = float((bins.share**2 * _deviation(bins, at) ** 2).sum()) * bins.shared
        wider = math.sqrt(1.0 + between / noise) if noise > 0 else 1.0
        least = bins.error - float(bins.share @ np.abs(bins.confidence - at))
        found = _tail(bins, at, bins.confidence - at, least / wider if least < 0 else least, below=True)
        return math.sqrt(found) if bins.shared > 1.0 else found  # one wrong answer shows in two classes at once

    low, high = 0.0, 2.0
    while chance(high) > 0.5 * LEVEL and high < 1e3:
        low, high = high, 2.0 * high
    for _ in range(2 * _HALVINGS):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if chance(middle) > 0.5 * LEVEL else (low, middle)
    return float(bins.share @ np.abs(bins.confidence - truth(high)))


def _upper_of_many(bins: Bins, truth: Callable[[np.ndarray], np.ndarray]) -> float:
    """The same where noise is as good as normal."""
    multiples = np.linspace(0.0, 1.0, _STEPS + 1)[:, None] ** 2 * (8.0 + 1.2 * _largest(bins))
    rate = truth(multiples)
    far = np.abs(bins.confidence - rate)
    mean, variance = _folded(far, _deviation(bins, rate))
    noise = (bins.share**2 * variance).sum(1) * bins.shared + _between(bins)
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


def _score_limit(
    rate: np.ndarray, count: np.ndarray, z: np.ndarray, side: np.ndarray, spread: np.ndarray
) -> np.ndarray:
    """The rate that lies `z` of its own standard errors above (`side` 1) or below (-1) the given one (Wilson)."""
    square = z * z * spread / count
    middle = (rate + 0.5 * square) / (1.0 + square)
    half = np.sqrt(np.maximum(square * rate * (1.0 - rate) + 0.25 * square**2, 0.0)) / (1.0 + square)
    return np.clip(middle + side * half, 0.0, 1.0)


def score_interval(rate: np.ndarray, count: np.ndarray, spread: np.ndarray | float = 1.0) -> np.ndarray:
    """95 % intervals [2, B] of rates: Wilson's with correction for continuity, which never cover less than .945."""
    rate, count = np.asarray(rate, float), np.asarray(count, float)
    with np.errstate(divide="ignore", invalid="ignore"):
        step = 0.5 / count
        square = _Z * _Z * spread / count
        ends = []
        for side in (-1.0, 1.0):
            shifted = rate + side * step
            root = np.maximum(0.25 * square**2 + square * shifted * (1.0 - shifted), 0.0)
            end = (shifted + 0.5 * square + side * np.sqrt(root)) / (1.0 + square)
            ends.append(np.where(rate == (side > 0), rate, np.clip(end, 0.0, 1.0)))
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
    spread = min(1.0, within / even) if even > 0 and count * even >= _STEPS_SHOW else 1.0
    low, high = score_interval(np.array([event]), np.array([count]), spread)[:, 0]
    gap = confidence - event
    margin = _Z * math.sqrt(max(gap2 - gap * gap, 0.0) / max(count - 1.0, 1.0))
    return [float(min(confidence - high, gap - margin)), float(max(confidence - low, gap + margin))]


def _tail(bins: Bins, truth: np.ndarray, gap: np.ndarray, value: float, *, below: bool = False) -> float:
    """P(sum share (|gap - noise| - |gap|) >= value), or <= where `below`, if the bins' accuracy is `truth`."""
    if len(bins.share) > _FEW or (bins.shared > 1.0 and not below):
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
    for part in np.array_split(np.argsort(width), max(1, len(width) // _FEW)):
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
