"""Bins: which one a confidence falls into, and the moments of each. Right-closed; the outer ends are closed."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .chance import soft_spread
from .inputs import as_array, check_choice, check_count, read_correct, read_weights, unit_interval
from .uncertainty import score_interval


STRATEGIES = ("equal_width", "equal_mass")
DEFAULT_BINS = 15
MOMENTS = 7  # sums of w, w c, w y, w c^2, w c y, w y^2, w^2 of weight w, confidence c and event y
_CHUNK = 1 << 15  # rows per chunk; a few such arrays fit into the second-level cache
_FEW = 64
_NEAR = 1e-9  # distance from a bin edge, in bins, below which the multiplication by the number of bins is not trusted


class Edges(NamedTuple):
    """`edges` has one entry more than there are bins; `width` is the number of bins where they are equally wide."""

    edges: np.ndarray
    width: int | None = None

    @property
    def bins(self) -> int:
        return len(self.edges) - 1


def equal_width(bins: int) -> Edges:
    """Edges k / bins, each the float64 nearest to the fraction."""
    bins = check_count("bins", bins, least=1)
    return Edges(np.arange(bins + 1) / bins, bins)


def equal_mass(confidence: np.ndarray, bins: int, weight: np.ndarray | None = None) -> Edges:
    """Edges that split the examples evenly; equal confidences stay together, so ties give fewer bins."""
    bins = check_count("bins", bins, least=1)
    n = len(confidence)
    if n == 0:
        return Edges(np.array([0.0, 1.0]))
    if weight is None:
        last = np.unique(-(-np.arange(1, bins + 1) * n // bins) - 1)  # ceil(k n / bins) - 1: last row of each bin
        upper = np.unique(np.sort(confidence)[last].astype(np.float64))
    else:
        order = np.argsort(confidence, kind="stable")
        reached = np.cumsum(weight[order])
        wanted = np.arange(1, bins + 1) / bins * reached[-1] * (1.0 - 1e-12)  # rounding must not reach the next row
        last = np.minimum(np.searchsorted(reached, wanted, side="left"), n - 1)
        upper = np.unique(confidence[order][last].astype(np.float64))
    return Edges(np.concatenate([[0.0], upper[:-1], [1.0]]))


def make_edges(strategy: str, confidence: np.ndarray, bins: int, weight: np.ndarray | None = None) -> Edges:
    check_choice("strategy", strategy, STRATEGIES)
    return equal_width(bins) if strategy == "equal_width" else equal_mass(confidence, bins, weight)


def bin_index(confidence: np.ndarray, edges: Edges) -> np.ndarray:
    """Bin of each confidence (float64 in [0, 1]): exactly `searchsorted(edges, c, side="left") - 1`, but faster."""
    if edges.width is None:
        return _search(confidence, edges)
    scaled = confidence * edges.width
    upper = np.ceil(scaled)
    index = upper.astype(np.intp)
    np.subtract(upper, scaled, out=scaled)
    if scaled.min(initial=0.5) < _NEAR or scaled.max(initial=0.5) > 1.0 - _NEAR:
        near = (scaled < _NEAR) | (scaled > 1.0 - _NEAR)
        index[near] = _search(confidence[near], edges) + 1
    index -= 1
    return index


def _search(confidence: np.ndarray, edges: Edges) -> np.ndarray:
    inner = edges.edges[1:-1]
    if len(inner) > _FEW:
        return np.searchsorted(inner, confidence, side="left")
    index = np.zeros(len(confidence), dtype=np.uint8)  # few edges: comparing with each is faster than a search
    for edge in inner:
        index += (confidence > edge).view(np.uint8)
    return index.astype(np.intp)


def cells(confidence: np.ndarray, event: np.ndarray, edges: Edges, weight: np.ndarray | None = None) -> np.ndarray:
    """Moments [7, 1, bins, 2] of the examples by bin and whether the event is the likelier outcome."""
    total = np.zeros((MOMENTS, edges.bins * 2))
    for start in range(0, len(confidence), _CHUNK):
        part = slice(start, start + _CHUNK)
        c, y = confidence[part].astype(np.float64, copy=False), event[part]
        index = bin_index(c, edges)
        index *= 2
        index += y if y.dtype == bool else y >= 0.5
        _add_moments(total, index, c, y, None if weight is None else weight[part])
    total = total.reshape(MOMENTS, 1, edges.bins, 2)
    if event.dtype == bool:
        total[2, ..., 1] = total[5, ..., 1] = total[0, ..., 1]
        total[4, ..., 1] = total[1, ..., 1]
    if weight is None:
        total[6] = total[0]
    return total


def _add_moments(total: np.ndarray, index: np.ndarray, c: np.ndarray, y: np.ndarray, w: np.ndarray | None) -> None:
    size = total.shape[1]
    mass = c if w is None else w * c
    total[0] += np.bincount(index, w, size)
    total[1] += np.bincount(index, mass, size)
    total[3] += np.bincount(index, mass * c, size)
    if w is not None:
        total[6] += np.bincount(index, w * w, size)
    if y.dtype != bool:
        hits = y if w is None else w * y
        for row, value in ((2, hits), (4, c * hits), (5, y * hits)):
            total[row] += np.bincount(index, value, size)


def gap_sums(
    confidence: np.ndarray, event: np.ndarray, edges: Edges, weight: np.ndarray | None = None, *, check: bool = False
) -> np.ndarray:
    """Sum of confidence minus event in each bin: all that an L1 error needs, in one pass."""
    total = np.zeros(edges.bins)
    for start in range(0, len(confidence), _CHUNK):
        part = slice(start, start + _CHUNK)
        c = unit_interval("confidence", confidence[part]) if check else confidence[part].astype(np.float64, copy=False)
        gap = c - event[part]
        total += np.bincount(bin_index(c, edges), gap if weight is None else gap * weight[part], edges.bins)
    return total


def reliability_bins(
    confidence: Any,
    correct: Any,
    *,
    bins: int = DEFAULT_BINS,
    strategy: str = "equal_width",
    sample_weight: Any = None,
) -> dict[str, list]:
    """The numbers behind a reliability diagram, as plain lists.

    Args:
        confidence (`[N]`): probability that the event happens, in [0, 1].
        correct (`[N]`): whether it did (0 or 1), or the fraction of raters who say so.
        bins (`int`): number of bins.
        strategy (`str`): `"equal_width"` or `"equal_mass"`.
        sample_weight (`[N]`): how much each row counts.

    Returns:
        `dict`: `edges` (bins + 1 numbers), and per bin `count`, `confidence` (mean), `accuracy` (mean of `correct`),
        and `band_low` and `band_high`, the 95 % interval of that accuracy: wide where there are few rows, also when
        these are all right. Means and bands of empty bins are NaN.

    Raises:
        ValueError: shapes, types or values are wrong.

    Example:

    ```python
    >>> from hf_moecal.metrics import reliability_bins
    >>> found = reliability_bins([0.9, 0.8, 0.3], [1, 0, 0], bins=2)
    >>> found["accuracy"]
    [0.0, 0.5]
    >>> [round(end, 2) for end in (found["band_low"][0], found["band_high"][0])]
    [0.0, 0.95]

    ```
    """
    confidence = unit_interval("confidence", as_array("confidence", confidence))
    event = read_correct(correct, len(confidence))
    weight = None if sample_weight is None else read_weights(sample_weight, len(confidence))
    edges = make_edges(strategy, confidence, bins, weight)
    moments = cells(confidence, event, edges, weight)
    total, mass, hits, *_, squares = moments[:, 0].sum(-1)
    count = np.bincount(bin_index(confidence, edges), minlength=edges.bins)
    with np.errstate(invalid="ignore", divide="ignore"):
        found = {"confidence": mass / total, "accuracy": hits / total}
        spread = soft_spread(moments)
        found["band_low"], found["band_high"] = score_interval(found["accuracy"], total**2 / squares, spread)
    lists = {name: values.tolist() for name, values in found.items()}
    return {"edges": edges.edges.tolist(), "count": count.tolist(), **lists}
