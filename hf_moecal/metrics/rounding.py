"""How far rounding may move a probability and the sum of a row: one rule for metrics, calibrators and tables."""

from __future__ import annotations

import numpy as np


ROUNDING = 1e-6  # how far outside [0, 1] a probability may lie by rounding; it is then clipped
_SUM_TOLERANCE = 1e-4  # of a row's sum, for values of single precision or better
_COARSE = ((0x1FFF, 1e-2, 2.0**-10), (0xFFFF, 2e-2, 2.0**-7))  # fp16, bf16: empty bits of a float32, sum, above one
_DECIMALS = 0.005  # what writing a probability with two decimals may change


def coarseness(array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How far the sum of each row may be from one, and a value above one, given how finely its values are written.

    The values themselves say it: those of bfloat16 or float16 leave the last bits of a float32 empty, and still do so
    once a tensor was made wider, as numpy makes it necessary for bfloat16.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        single = np.ascontiguousarray(array, np.float32)
    exact = (single == array).all(1)
    sums, above = np.full(len(array), _SUM_TOLERANCE), np.full(len(array), ROUNDING)
    for bits, of_sum, of_value in _COARSE:
        fits = exact & ~(single.view(np.uint32) & bits).any(1)
        sums[fits], above[fits] = of_sum, of_value
    return sums, above


def check_row_sums(name: str, sums: np.ndarray, array: np.ndarray, first_row: int = 0) -> None:
    """Refuses rows whose sum is further from one than the precision of their values explains.

    Raises:
        ValueError: says which row, its sum, and what may have happened to it.
    """
    suspect = np.flatnonzero(~(np.abs(sums - 1.0) <= _SUM_TOLERANCE))  # NaN too
    if not len(suspect):
        return
    bad = suspect[~(np.abs(sums[suspect] - 1.0) <= coarseness(array[suspect])[0])]
    if len(bad):
        row = int(bad[0])
        raise ValueError(
            f"rows of {name} must sum to 1, but row {first_row + row} sums to {float(sums[row]):.6g}; "
            + ("if these are scores before the softmax, pass them as logits; " if name == "probs" else "")
            + "if they were rounded, pass renormalize=True (--renormalize)."
        )


def renormalized(name: str, array: np.ndarray, first_row: int = 0) -> np.ndarray:
    """Probabilities [N, C] in float64, each row divided by its sum, which rounding may have moved from one.

    Raises:
        ValueError: a value is negative or not finite, or a sum is further from one than two decimals can put it.

    Example:

    ```python
    >>> import numpy as np
    >>> from hf_moecal.metrics.rounding import renormalized
    >>> renormalized("probs", np.array([[0.33, 0.33, 0.33]])).sum()
    np.float64(1.0)

    ```
    """
    array = array.astype(np.float64)
    if not array.min(initial=0.0) >= -ROUNDING:  # NaN too
        row = int(np.flatnonzero(~(array.min(1) >= -ROUNDING))[0])
        raise ValueError(
            f"{name} must lie in [0, 1], but row {first_row + row} holds {float(array[row].min()):g}; "
            "if these are scores before the softmax, pass them as logits."
        )
    array = np.maximum(array, 0.0)
    sums = array.sum(1)
    most = min(max(_DECIMALS * array.shape[1], 0.02), 0.5)
    bad = np.flatnonzero(~(np.abs(sums - 1.0) <= most))
    if len(bad):
        raise ValueError(
            f"rows of {name} may be off 1 by {most:g} (two decimals of {array.shape[1]} classes), but row "
            f"{first_row + int(bad[0])} sums to {float(sums[bad[0]]):.6g}; rounding does not explain that."
        )
    return array / sums[:, None]
