"""Bins: which one a confidence falls into, and the moments of each. Right-closed; the outer ends are closed."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .inputs import as_array, check_choice, check_count, read_correct, unit_interval


STRATEGIES = ("equal_width", "equal_mass")
DEFAULT_BINS = 15
MOMENTS = 6  # count, sum c, sum y, sum c^2, sum c*y, sum y^2 of confidence c and event y
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


def equal_mass(confidence: np.ndarray, bins: int) -> Edges:
    """Edges that split the examples evenly; equal confidences stay together, so ties give fewer bins."""
    bins = check_count("bins", bins, least=1)
    n = len(confidence)
    if n == 0:
        return Edges(np.array([0.0, 1.0]))
    last = np.unique(-(-np.arange(1, bins + 1) * n // bins) - 1)  # ceil(k n / bins) - 1: last row of each bin
    upper = np.unique(np.sort(confidence)[last].astype(np.float64))
    return Edges(np.concatenate([[0.0], upper[:-1], [1.0]]))


def make_edges(strategy: str, confidence: np.ndarray, bins: int) -> Edges:
    check_choice("strategy", strategy, STRATEGIES)
    return equal_width(bins) if strategy == "equal_width" else equal_mass(confidence, bins)


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


def cells(
    confidence: np.ndarray, event: np.ndarray, edges: Edges, codes: np.ndarray | None = None, groups: int = 1
) -> np.ndarray:
    """Moments [6, groups, bins, 2] of the examples by group, bin and whether the event is the likelier outcome.

    For hard references the last axis is the event itself, so the moments hold all that a resampling of rows needs.
    """
    total = np.zeros((MOMENTS, groups * edges.bins * 2))
    for start in range(0, len(confidence), _CHUNK):
        part = slice(start, start + _CHUNK)
        c, y = confidence[part].astype(np.float64, copy=False), event[part]
        index = bin_index(c, edges)
        if codes is not None:
            index += codes[part].astype(np.intp) * edges.bins
        index *= 2
        index += y if y.dtype == bool else y >= 0.5
        _add_moments(total, index, c, y)
    total = total.reshape(MOMENTS, groups, edges.bins, 2)
    if event.dtype == bool:
        total[2, ..., 1] = total[5, ..., 1] = total[0, ..., 1]
        total[4, ..., 1] = total[1, ..., 1]
    return total


def _add_moments(total: np.ndarray, index: np.ndarray, c: np.ndarray, y: np.ndarray) -> None:
    size = total.shape[1]
    total[0] += np.bincount(index, minlength=size)
    total[1] += np.bincount(index, c, size)
    total[3] += np.bincount(index, c * c, size)
    if y.dtype != bool:
        for row, weight in ((2, y), (4, c * y), (5, y * y)):
            total[row] += np.bincount(index, weight, size)


def gap_sums(confidence: np.ndarray, event: np.ndarray, edges: Edges, *, check: bool = False) -> np.ndarray:
    """Sum of confidence minus event in each bin: all that an L1 error needs, in one pass."""
    total = np.zeros(edges.bins)
    for start in range(0, len(confidence), _CHUNK):
        part = slice(start, start + _CHUNK)
        c = unit_interval("confidence", confidence[part]) if check else confidence[part].astype(np.float64, copy=False)
        total += np.bincount(bin_index(c, edges), c - event[part], edges.bins)
    return total


def reliability_bins(
    confidence: Any,
    correct: Any,
    *,
    bins: int = DEFAULT_BINS,
    strategy: str = "equal_width",
    bootstrap: int = 0,
    seed: int = 0,
) -> dict[str, list]:
    """The numbers behind a reliability diagram, as plain lists.

    Args:
        confidence (`[N]`): probability that the event happens, in [0, 1].
        correct (`[N]`): whether it did (0 or 1), or the fraction of raters who say so.
        bins (`int`): number of bins.
        strategy (`str`): `"equal_width"` or `"equal_mass"`.
        bootstrap (`int`): resamples for a 95 % band around each accuracy; 0 for none.
        seed (`int`): seed of the resampling.

    Returns:
        `dict`: `edges` (bins + 1 numbers), and per bin `count`, `confidence` (mean), `accuracy` (mean of `correct`);
        with `bootstrap` also `band_low` and `band_high`. Means of empty bins are NaN.

    Raises:
        ValueError: shapes, types or values are wrong.

    Example:

    ```python
    >>> from hf_moecal.metrics import reliability_bins
    >>> reliability_bins([0.9, 0.8, 0.3], [1, 0, 0], bins=2)["accuracy"]
    [0.0, 0.5]

    ```
    """
    confidence = unit_interval("confidence", as_array("confidence", confidence))
    event = read_correct(correct, len(confidence))
    edges = make_edges(strategy, confidence, bins)
    moments = cells(confidence, event, edges)[:, 0]
    count, mass, hits = moments[:3].sum(-1)
    with np.errstate(invalid="ignore"):
        found = {"confidence": mass / count, "accuracy": hits / count}
    if check_count("bootstrap", bootstrap, least=0):
        found |= _bands(moments, bootstrap, seed)
    lists = {name: values.tolist() for name, values in found.items()}
    return {"edges": edges.edges.tolist(), "count": count.astype(np.int64).tolist(), **lists}


def _bands(moments: np.ndarray, bootstrap: int, seed: int) -> dict[str, np.ndarray]:
    from .figures import resample

    draws, sums = resample(moments, moments[2], moments[5], bootstrap, seed)
    with np.errstate(invalid="ignore"):
        drawn = np.clip(sums / draws, 0.0, 1.0)
    low, high = (np.full(moments.shape[1], np.nan) for _ in range(2))
    some = moments[0].sum(-1) > 0
    low[some], high[some] = np.nanquantile(drawn[:, some], [0.025, 0.975], axis=0)
    return {"band_low": low, "band_high": high}
