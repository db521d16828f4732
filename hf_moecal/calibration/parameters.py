"""Checks of parameters that come from a file: types, lengths and ranges before any array is made."""

from __future__ import annotations

from typing import Any

import numpy as np

from hf_moecal.calibration.record import is_number
from hf_moecal.calibration.solver import MAX_TEMPERATURE, MIN_TEMPERATURE


_LARGEST = 1e6


def checked_number(value: Any, name: str, *, low: float = -_LARGEST, high: float = _LARGEST) -> float:
    """A number within `[low, high]`."""
    if not is_number(value) or not low <= value <= high:
        raise ValueError(f"Parameter {name!r} must be a number from {low:g} to {high:g}; got {str(value)[:30]}.")
    return float(value)


def checked_temperature(value: Any, name: str = "temperature") -> float:
    """A temperature within the range that a fit can give."""
    return checked_number(value, name, low=MIN_TEMPERATURE, high=MAX_TEMPERATURE)


def checked_vector(
    value: Any, name: str, *, length: int | None = None, low: float = -_LARGEST, high: float = _LARGEST
) -> np.ndarray:
    """A list of numbers within `[low, high]`, of the given length (or of any but zero)."""
    if not isinstance(value, list) or not value or (length is not None and len(value) != length):
        wanted = "at least one number" if length is None else f"{length} numbers"
        raise ValueError(f"Parameter {name!r} must be a list of {wanted}; got {str(value)[:30]}.")
    return np.array([checked_number(item, name, low=low, high=high) for item in value])


def checked_matrix(value: Any, name: str, *, low: float = -_LARGEST, high: float = _LARGEST) -> list[np.ndarray]:
    """A list of vectors, each with numbers within `[low, high]`."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"Parameter {name!r} must be a list of lists of numbers; got {str(value)[:30]}.")
    return [checked_vector(row, name, low=low, high=high) for row in value]
