"""A tested window, and how long windows are."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from .feature import FeatureDrift


_SECONDS = {"s": 1, "min": 60, "h": 3600, "d": 86400}


def window_seconds(window: int | str | None) -> int | None:
    """Seconds of a window by time (`"15min"`), or `None` for one of a number of sequences.

    Raises:
        ValueError: the window is neither.

    Example:

    ```python
    >>> from hf_moecal.drift.window import window_seconds
    >>> window_seconds("15min"), window_seconds(1000)
    (900, None)

    ```
    """
    if window is None or isinstance(window, int):
        if window is not None and window < 1:
            raise ValueError(f"window is a number of sequences, at least 1, got {window}.")
        return None
    found = re.fullmatch(r"([1-9]\d*)(s|min|h|d)", window)
    if not found:
        raise ValueError(f"window is a number of sequences, or a time as in 30s, 15min, 1h or 1d; got {window!r}.")
    return int(found[1]) * _SECONDS[found[2]]


@dataclass(frozen=True)
class Window:
    """One tested window.

    Args:
        index: its number, from 0.
        sequences: observations in it.
        rows: rows in it (more than `sequences` where a sequence has several).
        rejected: rows that were set aside meanwhile.
        complete: `False` for what was left over at the end of a log.
        first_id: `id` of the row with which its first sequence began (the sequence's own where rows have none).
        last_id: the same of its last sequence.
        first_time: when the first of its sequences began (ISO 8601, UTC); `None` where the log has no time.
        last_time: when the last of them began.
        features: [`~hf_moecal.drift.feature.FeatureDrift`] per test, drifted and largest first.
        estimate: label-free accuracy and calibration (see [`~hf_moecal.drift.label_free`]); `None` without a labelled
            reference.
    """

    index: int
    sequences: int
    rows: int
    rejected: int
    complete: bool
    first_id: str | None
    last_id: str | None
    first_time: str | None
    last_time: str | None
    features: list[FeatureDrift]
    estimate: dict[str, float] | None

    @property
    def drift(self) -> bool:
        return any(feature.drift for feature in self.features)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {**plain, "drift": self.drift, "features": [feature.to_dict() for feature in self.features]}

    def __str__(self) -> str:
        moved = [str(feature) for feature in self.features if feature.drift]
        when = f" from {self.first_time}" if self.first_time else ""
        line = f"window {self.index}{when}: {self.sequences:,} sequences, " + (
            f"DRIFT in {', '.join(moved)}" if moved else "no drift"
        )
        if self.estimate:
            e = self.estimate
            line += (
                f"; estimated accuracy {e['accuracy']:.3f} ± {1.96 * e['accuracy_se']:.3f}, gap {e['signed_gap']:+.3f}"
            )
        return line


def iso(seconds: float | None) -> str | None:
    """Seconds since 1970 as ISO 8601 in UTC."""
    return None if seconds is None else datetime.fromtimestamp(seconds, timezone.utc).isoformat()
