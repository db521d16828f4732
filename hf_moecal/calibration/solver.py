"""The temperature that minimises a (tilted) negative log-likelihood, to convergence, in float64.

With `beta = 1 / T` the loss of row i is `l_i(beta) = logsumexp(beta z_i) - beta z_iy`, convex in beta. Its mean, its
tilted mean `(1/eta) log mean exp(eta l_i)` and their sum are convex too, so the optimum is the one root of an
increasing derivative: a Newton step inside a bracket cannot miss it. (LBFGS with a fixed small step, the widely copied
way, can.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.special import logsumexp


MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-3, 1e3
_ROUGH_ROWS = 1000
_SLAB, _PRIOR_ODDS = 1.0, 0.5  # of a temperature other than one: the spread of log T, and the odds
_WIDE = np.linspace(-4.0, 4.0, 33)  # log T where the rows hardly say
_STEPS = np.linspace(-5.0, 5.0, 13)  # log T in standard errors around the best
_BLOCK = 1 << 21  # float64 elements worked on at once: keeps a vocabulary-sized table out of memory


@dataclass(frozen=True)
class TemperatureFit:
    """A fitted temperature with the standard error of its logarithm."""

    temperature: float
    log_error: float
    identified: bool

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the temperature, symmetric on the log scale, cut at the search range."""
        factor = np.exp(min(1.96 * self.log_error, 50.0))
        low, high = self.temperature / factor, self.temperature * factor
        return float(max(low, MIN_TEMPERATURE)), float(min(high, MAX_TEMPERATURE))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities of `logits [..., C]` in float64."""
    shifted = np.asarray(logits, dtype=np.float64)
    shifted = shifted - shifted.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def row_losses(logits: np.ndarray, labels: np.ndarray, inverse: np.ndarray | float) -> np.ndarray:
    """Loss of each row and its first two derivatives in the inverse temperature.

    Args:
        logits: `[n, C]`.
        labels: `[n]`, each in `0 .. C-1`.
        inverse: inverse temperature, one for all rows or `[n]`.

    Returns:
        `[3, n]` float64: `l_i` in nats, `l_i'` and `l_i''`.
    """
    count, classes = logits.shape
    inverse = np.broadcast_to(np.asarray(inverse, dtype=np.float64), (count,))
    result = np.empty((3, count))
    step = max(1, _BLOCK // classes)
    for start in range(0, count, step):
        rows = slice(start, start + step)
        centred = np.subtract(logits[rows], logits[rows].max(axis=1, keepdims=True), dtype=np.float64)
        at_label = np.take_along_axis(centred, labels[rows, None], axis=1)[:, 0]
        mass = np.exp(centred * inverse[rows, None])
        total = mass.sum(axis=1)
        mean = np.einsum("ij,ij->i", mass, centred) / total
        np.square(centred, out=centred)
        square = np.einsum("ij,ij->i", mass, centred) / total
        result[0, rows] = np.log(total) - inverse[rows] * at_label
        result[1, rows] = mean - at_label
        result[2, rows] = np.maximum(square - mean**2, 0.0)
    return result


def fit_temperature(
    logits: np.ndarray,
    labels: np.ndarray,
    *,
    weights: np.ndarray | None = None,
    eta: float = 0.0,
    relevant: np.ndarray | None = None,
    start: float | None = None,
) -> TemperatureFit:
    """The temperature that minimises the weighted, or the exponentially tilted, mean loss.

    Args:
        logits: `[n, C]`, finite.
        labels: `[n]`, each in `0 .. C-1`.
        weights: `[n]`, not negative; how much each row counts. Default: all the same.
        eta: tilt in 1/nat. 0 is the plain mean; else `(1/eta) log mean exp(eta l)`.
        relevant: `[n]` bool. With it the loss is the mean over all rows plus the tilted mean over these rows (over
            all rows, untilted, if there are none): the filtered objective.
        start: a temperature near the optimum, where one is known: fewer passes over the rows, the same optimum.

    Returns:
        The optimum in `[1e-3, 1e3]` with the sandwich standard error of its logarithm. `identified` is false when
        the optimum lies on the edge of that range, as with rows that are all classified right.

    Source: the objectives of arXiv:2606.20544 with the model held fixed and only T free.
    """
    base = np.ones(len(labels)) if weights is None else np.asarray(weights, dtype=np.float64)
    base = base / base.sum()
    if relevant is not None and not relevant.any():
        eta, relevant = 0.0, None

    def derivatives(inverse: float) -> tuple[float, float, np.ndarray]:
        losses, slopes, curves = row_losses(logits, labels, inverse)
        share = _row_shares(losses, base, eta, relevant)
        gradient = sum(part @ slopes for part in share)
        curvature = sum(part @ curves for part in share)
        if eta:  # the tilted part also bends because its weights move
            tilted = share[-1]
            centre = tilted @ slopes
            curvature += eta * (tilted @ (slopes - centre) ** 2)
        return gradient, curvature, sum(share) * slopes

    low, high = 1.0 / MAX_TEMPERATURE, 1.0 / MIN_TEMPERATURE
    if not _spread(logits, base):
        return TemperatureFit(1.0, np.inf, False)
    if _all_right(logits, labels, base):
        return TemperatureFit(MIN_TEMPERATURE, np.inf, False)
    near = _rough_inverse(logits, labels, base, eta) if start is None else 1.0 / start
    inverse = _increasing_root(derivatives, low, high, start=near)
    _, curvature, influence = derivatives(inverse)
    inside = low < inverse < high and curvature > 0
    error = np.inf
    if inside:
        influence = influence - influence.mean()
        error = np.sqrt((influence**2).sum()) / curvature
        if not eta:  # with a handful of rows the empirical variance can vanish by accident; the model's does not
            error = max(error, np.sqrt((base**2).sum() / curvature))
        error = error / inverse
    return TemperatureFit(float(1.0 / inverse), float(error), bool(inside))


def shrunk_temperature(
    logits: np.ndarray, labels: np.ndarray, *, weights: np.ndarray | None = None, fit: TemperatureFit | None = None
) -> tuple[float, float]:
    """A temperature drawn to 1 by how little the rows say against it, and the probability that it is not 1.

    The posterior mean of log T under a prior that is 1 with probability 2/3, and else log-normal around 1 (see
    `ShrunkTemperatureCalibrator`). The integral is a sum over a grid that is laid around the best temperature, where
    there is one.

    Args:
        logits, labels, weights: as in [`fit_temperature`]; a row of weight 2 counts as two rows.
        fit: what [`fit_temperature`] makes of them, where that is known.
    """
    fit = fit_temperature(logits, labels, weights=weights) if fit is None else fit
    counts = np.ones(len(labels)) if weights is None else weights
    grid = np.log(fit.temperature) + fit.log_error * _STEPS if fit.log_error < 0.5 else _WIDE
    at_one, *losses = (counts @ row_losses(logits, labels, np.exp(-u))[0] for u in (0.0, *grid))
    likelihood = at_one - np.array(losses)  # relative to T = 1, in nats
    log_mass = likelihood - 0.5 * (grid / _SLAB) ** 2 + np.log((grid[1] - grid[0]) / (_SLAB * np.sqrt(2 * np.pi)))
    log_odds = logsumexp(log_mass) + np.log(_PRIOR_ODDS)
    evidence = float(np.exp(-np.logaddexp(0.0, -log_odds)))
    mean = float(np.exp(log_mass - logsumexp(log_mass)) @ grid)
    return float(np.clip(np.exp(evidence * mean), MIN_TEMPERATURE, MAX_TEMPERATURE)), evidence


def _row_shares(
    losses: np.ndarray, base: np.ndarray, eta: float, relevant: np.ndarray | None
) -> tuple[np.ndarray, ...]:
    """Weights of the rows in the gradient, one array per term of the objective; the tilted term is the last."""
    if not eta:
        return (base,)
    if relevant is None:
        return (_tilt(losses, base, eta),)
    return (base, _tilt(losses, np.where(relevant, base, 0.0), eta))


def _tilt(losses: np.ndarray, base: np.ndarray, eta: float) -> np.ndarray:
    with np.errstate(divide="ignore"):
        score = eta * losses + np.log(base)
    return np.exp(score - logsumexp(score))


def _spread(logits: np.ndarray, base: np.ndarray) -> bool:
    """Whether any row tells one class from another."""
    return bool((logits.max(axis=1) > logits.min(axis=1))[base > 0].any())


def _all_right(logits: np.ndarray, labels: np.ndarray, base: np.ndarray) -> bool:
    at_label = np.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
    return bool((at_label == logits.max(axis=1))[base > 0].all())


def _rough_inverse(logits: np.ndarray, labels: np.ndarray, base: np.ndarray, eta: float) -> float:
    """A starting point from a thousand rows, which makes a large table cost three passes instead of ten."""
    if len(labels) < 4 * _ROUGH_ROWS:
        return 1.0
    rows = slice(None, None, len(labels) // _ROUGH_ROWS)
    if not base[rows].sum() > 0:
        return 1.0
    return 1.0 / fit_temperature(logits[rows], labels[rows], weights=base[rows], eta=eta).temperature


def _increasing_root(derivatives: Callable[[float], tuple], low: float, high: float, *, start: float) -> float:
    """Root of an increasing function on `[low, high]` by Newton on the logarithm, bisecting where Newton leaves."""
    ends = (low, high)
    point = float(np.clip(start, low, high))
    for turn in range(200):
        gradient, curvature, _ = derivatives(point)
        low, high = (point, high) if gradient < 0 else (low, point)
        step = -gradient / (curvature * point) if curvature > 0 else -np.inf * gradient
        following = point * np.exp(np.clip(step, -3.0, 3.0)) if gradient else point
        if abs(np.log(following / point)) < 1e-8:  # Newton is quadratic: the next point is exact to rounding
            return float(np.clip(following, *ends))
        slow = turn > 12 and turn % 2  # far out the loss is exponential and Newton crawls
        if slow or not low < following < high:
            following = np.sqrt(low * high)
        if high / low < 1 + 1e-9:  # the root is not inside: the optimum lies on an end of the range
            return min(ends, key=lambda end: abs(np.log(end / following)))
        point = following
    return point
