"""Checked input: what a user hands in becomes plain float64 rows, or a one-sentence error that says the remedy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from .rounding import ROUNDING, check_row_sums, coarseness, renormalized


IGNORED_LABEL = -100
MODES = ("top_label", "classwise", "positive_class")
_CHUNK = 1 << 18  # elements per chunk: small enough for the second-level cache, large enough to hide numpy's overhead


class Rows(NamedTuple):
    """One batch after reduction; every array has one entry per labelled example.

    `event` is what the confidence speaks of: "the prediction is right" (top-label, classwise) or "the class is 1"
    (positive-class); a fraction in [0, 1] for soft references. `scores` and `events` ([N, C]) exist in classwise mode
    only, `weight` where rows count differently.
    """

    confidence: np.ndarray
    event: np.ndarray
    nll: np.ndarray
    brier: np.ndarray
    scores: np.ndarray | None = None
    events: np.ndarray | None = None
    weight: np.ndarray | None = None

    def take(self, index: Any) -> Rows:
        """The rows of a slice, a mask or an index array."""
        return Rows(*(None if array is None else array[index] for array in self))

    @classmethod
    def concatenate(cls, parts: Sequence[Rows]) -> Rows:
        if any(part.weight is not None for part in parts):
            parts = [p if p.weight is not None else p._replace(weight=np.ones(len(p.confidence))) for p in parts]
        return cls(*(None if arrays[0] is None else np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def as_array(name: str, value: Any, *, ndim: tuple[int, ...] = (1,)) -> np.ndarray:
    """A numeric numpy array of the wanted number of dimensions from a list, array, tensor or column.

    Raises:
        ValueError: `value` is not a rectangular numeric array on the CPU without masked or missing entries.
    """
    if type(value).__module__.split(".")[0] == "torch":
        value = _from_torch(name, value)
    if isinstance(value, np.ma.MaskedArray):
        raise ValueError(
            f"{name} is a masked array; its mask would be lost: pass {name}.compressed() or drop those rows."
        )
    if isinstance(value, str | bytes | Mapping) or not (hasattr(value, "__len__") or hasattr(value, "__array__")):
        raise ValueError(f"{name} must be a list, array or tensor of numbers, got {type(value).__name__}.")
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise ValueError(
            f"{name} has rows of different lengths; every row needs the same number of entries."
        ) from error
    if array.dtype.name == "bfloat16":  # from ml_dtypes; numpy itself has no such type
        array = array.astype(np.float32)
    if array.dtype.kind not in "fiub":
        raise ValueError(
            f"{name} holds {_kind(array)}, not numbers; convert it first, for example numpy.asarray({name}, float)."
        )
    if array.dtype.itemsize > 8:
        array = array.astype(np.float64)
    if array.size == 0:
        raise ValueError(f"{name} is empty; there is nothing to measure.")
    if array.ndim not in ndim:
        wanted = " or ".join(f"{n}-D" for n in ndim)
        raise ValueError(f"{name} must be {wanted}, got shape {array.shape}.")
    return array


def _from_torch(name: str, tensor: Any) -> np.ndarray:
    if tensor.device.type != "cpu":
        raise ValueError(f"{name} is a tensor on {tensor.device}; move it to the CPU first: {name}.cpu().")
    if str(tensor.layout) != "torch.strided":
        raise ValueError(f"{name} is a sparse tensor; make it dense first: {name}.to_dense().")
    tensor = tensor.detach()
    return (tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor).numpy()


def _kind(array: np.ndarray) -> str:
    kinds = {"O": "objects", "U": "strings", "S": "bytes", "c": "complex numbers", "M": "dates", "m": "durations"}
    return kinds.get(array.dtype.kind, str(array.dtype))


def check_length(name: str, array: np.ndarray | Sequence, n: int, other: str) -> None:
    if len(array) != n:
        raise ValueError(f"{name} has {len(array)} rows but {other} has {n}; give one entry per example to both.")


def check_count(name: str, value: Any, *, least: int) -> int:
    """A whole number that is not a bool and not below `least`."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}.")
    return int(value)


def check_choice(name: str, value: Any, choices: Sequence[str]) -> str:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}.")
    return value


def unit_interval(name: str, array: np.ndarray, *, hint: str = "") -> np.ndarray:
    """The array in float64 within [0, 1]; rounding noise is clipped, anything else is an error."""
    if array.dtype.kind != "f":
        array = array.astype(np.float64)
    low, high = (array.min(), array.max()) if array.size else (0.0, 0.0)
    if not (low >= 0.0 and high <= 1.0):  # also true for NaN
        bad = ~((array >= -ROUNDING) & (array <= 1.0 + ROUNDING))
        bad[bad] = array[bad] > 1.0 + coarseness(array[bad][:, None])[1]
        bad |= np.isnan(array) | (array < -ROUNDING)
        if bad.any():
            row = int(np.flatnonzero(bad.reshape(len(array), -1).any(1))[0])
            value = float(array[row].ravel()[bad.reshape(len(array), -1)[row]][0])
            raise ValueError(f"{name} must lie in [0, 1], but row {row} holds {value:g}.{hint}")
        array = np.clip(array, 0.0, 1.0)
    return array.astype(np.float64, copy=False)


def read_correct(correct: Any, n: int) -> np.ndarray:
    """`correct` as bool [N], or as float64 [N] where it holds fractions of raters."""
    array = as_array("correct", correct)
    check_length("correct", array, n, "confidence")
    if array.dtype == bool:
        return array
    hint = " It says for each row whether the prediction is right: 0 or 1, or the fraction of raters who agree."
    fractions = unit_interval("correct", array, hint=hint)
    hits = fractions == 1.0
    return hits if array.dtype.kind in "iu" or bool(np.all(hits | (fractions == 0.0))) else fractions


def read_labels(labels: Any, *, n: int, classes: int | None, what: str, renormalize: bool = False) -> np.ndarray:
    """Class indices as int64 [N], or a float64 [N, C] distribution of raters (not where `classes` is unknown)."""
    _refuse_names(labels)
    array = as_array("labels", labels, ndim=(1,) if classes is None else (1, 2))
    check_length("labels", array, n, what)
    if array.ndim == 2:
        return _soft_labels(array, classes, renormalize)
    if array.dtype.kind == "f":
        raise ValueError(
            "labels must be whole numbers, got floats; use labels.astype(int) for classes, "
            "or a 2-D array [N, C] with the fraction of raters for each class."
        )
    array = array.astype(np.int64)
    bad = (array < 0) & (array != IGNORED_LABEL)
    if classes is not None:
        bad |= array >= classes
    if bad.any():
        row, span = int(np.flatnonzero(bad)[0]), "at least 0" if classes is None else f"in 0..{classes - 1}"
        raise ValueError(f"labels must be {span} ({IGNORED_LABEL} means no label), but row {row} is {array[row]}.")
    return array


def _refuse_names(labels: Any) -> None:
    first = labels[0] if hasattr(labels, "__getitem__") and hasattr(labels, "__len__") and len(labels) else None
    if isinstance(first, str):
        raise ValueError(
            f"labels are names ({str(first)!r}), not numbers of classes; map them, for example with the model's "
            "config.label2id, or name the classes in the order of the columns: --labels negative,positive."
        )


def _soft_labels(array: np.ndarray, classes: int, renormalize: bool) -> np.ndarray:
    if array.shape[1] != classes:
        raise ValueError(
            f"labels has {array.shape[1]} columns but there are {classes} classes; give one column per class."
        )
    array = unit_interval("labels", array, hint=" A 2-D reference holds the fraction of raters for each class.")
    if renormalize:
        return renormalized("labels", array)
    check_row_sums("labels", array.sum(1), array)
    return array


def probability_chunks(
    probs: np.ndarray | None, logits: np.ndarray | None, *, renormalize: bool = False
) -> Iterator[tuple[slice, np.ndarray, np.ndarray | None, np.ndarray]]:
    """Yields (rows, probabilities, log-probabilities or None, argmax) over cache-sized pieces, checked."""
    array = probs if probs is not None else logits
    step = max(1, _CHUNK // array.shape[1])
    for start in range(0, len(array), step):
        rows = slice(start, min(start + step, len(array)))
        if probs is not None:
            chunk, top = _checked_probs(
                renormalized("probs", array[rows], start) if renormalize else array[rows], start
            )
            yield rows, chunk, None, top
        else:
            logs = _log_softmax(array[rows], start)
            yield rows, np.exp(logs), logs, logs.argmax(1)


def top_of_probs(probs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Largest probability and its class of each row, checked, in one pass over memory."""
    n, classes = probs.shape
    if probs.dtype not in (np.float32, np.float64) or not probs.flags.c_contiguous:
        tops = [(chunk[np.arange(len(top)), top], top) for _, chunk, _, top in probability_chunks(probs, None)]
        return tuple(np.concatenate(parts) for parts in zip(*tops, strict=True))
    confidence, sums = np.empty(n, probs.dtype), np.empty(n, probs.dtype)
    winner = np.empty(n, np.intp)
    step = max(1, _CHUNK // classes)
    firsts, ones = np.arange(step) * classes, np.ones(classes, probs.dtype)
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        chunk, top = probs[rows], winner[rows]
        sums[rows] = _row_sums(chunk, ones)
        _argmax(chunk, top)
        confidence[rows] = chunk.ravel()[top + firsts[: len(top)]]
    check_row_sums("probs", sums, probs)
    for row in np.flatnonzero(np.signbit(confidence)):
        chunk, top = _checked_probs(probs[row : row + 1], row)
        winner[row], confidence[row] = top[0], chunk[0, top[0]]
    return confidence, winner


def _row_sums(chunk: np.ndarray, ones: np.ndarray) -> np.ndarray:
    """Sums of rows; a matrix product is the fastest way, but too coarse in float32 for very many columns."""
    return chunk @ ones if chunk.shape[1] <= 4096 else chunk.sum(1)


def _argmax(chunk: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """Argmax of rows, where a negative entry beats any other.

    As unsigned integers, non-negative floats keep their order and negative ones are the largest of all, so one pass
    finds both the winner and any negative entry.
    """
    return chunk.view(f"u{chunk.itemsize}").argmax(1, out=out)


def _checked_probs(chunk: np.ndarray, start: int) -> tuple[np.ndarray, np.ndarray]:
    wide = chunk.dtype.itemsize == 8 or chunk.dtype.kind != "f"
    chunk = np.ascontiguousarray(chunk, dtype=np.float64 if wide else np.float32)
    check_row_sums("probs", _row_sums(chunk, np.ones(chunk.shape[1], chunk.dtype)), chunk, start)
    top = _argmax(chunk)
    if np.signbit(chunk[np.arange(len(chunk)), top]).any():
        if chunk.min() < -ROUNDING:
            row = int(np.flatnonzero(chunk.min(1) < -ROUNDING)[0])
            raise ValueError(
                f"probs must lie in [0, 1], but row {start + row} holds {float(chunk[row].min()):g}; "
                "if these are scores before the softmax, pass them as logits."
            )
        chunk = np.maximum(chunk, 0.0)
        top = chunk.argmax(1)
    return chunk, top


def _log_softmax(chunk: np.ndarray, start: int) -> np.ndarray:
    """Log-probabilities; a logit of minus infinity is a class that the row excludes."""
    chunk = chunk.astype(np.float64)
    peak = chunk.max(1, keepdims=True)
    bad = np.isnan(chunk).any(1) | ~np.isfinite(peak[:, 0])
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        what = "only -inf" if peak[row, 0] == -np.inf else "NaN or +inf"
        raise ValueError(f"logits must be finite, or -inf for excluded classes, but row {start + row} holds {what}.")
    chunk -= peak
    chunk -= np.log(np.exp(chunk).sum(1, keepdims=True))
    return chunk


def read_weights(sample_weight: Any, n: int) -> np.ndarray:
    """`sample_weight` as float64 [N]: finite, none below zero, not all zero."""
    weight = as_array("sample_weight", sample_weight).astype(np.float64)
    check_length("sample_weight", weight, n, "the data")
    bad = np.flatnonzero(~(np.isfinite(weight) & (weight >= 0)))
    if len(bad):
        raise ValueError(
            f"sample_weight must be finite numbers of 0 or more, but row {bad[0]} holds {weight[bad[0]]:g}."
        )
    return weight
