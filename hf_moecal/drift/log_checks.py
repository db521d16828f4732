"""Checks the rows of a log, column by column, and sets aside those that cannot be used, each with its reason."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import numpy as np

from .logs import DERIVED, Schema, bucket, encode, key_texts


if TYPE_CHECKING:
    import pyarrow as pa

MAX_SECONDS = 1e11  # the year 5138: a larger number counts milliseconds


@dataclass(frozen=True)
class Rejected:
    """A row that was set aside.

    Args:
        source: file name, or `-` for standard input.
        position: row of a Parquet file, or byte at which the line of a JSONL file begins.
        reason: kind of fault, with the column (`"missing confidence"`), as it is counted.
        detail: the fault in words.
        content: the row, or the text of the line.
    """

    source: str
    position: int
    reason: str
    detail: str
    content: Any

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Piece:
    """Checked rows of one source, those set aside with their places among all of these rows, and the position after
    them."""

    source: str
    rows: dict[str, np.ndarray]
    rejected: list[Rejected]
    places: np.ndarray
    position: dict[str, Any]


class Faults:
    """The first fault of each row."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.found: dict[int, tuple[str, str]] = {}

    def flag(self, mask: np.ndarray, reason: str, detail: str | Callable[[int], str]) -> None:
        """Gives the rows of `mask` a fault, unless they have one."""
        for row in np.flatnonzero(mask).tolist():
            self.found.setdefault(row, (reason, detail if isinstance(detail, str) else detail(row)))

    def places(self) -> np.ndarray:
        """Rows with a fault, in order."""
        return np.array(sorted(self.found), np.int64)

    def clean(self) -> np.ndarray:
        """Mask of the rows without a fault."""
        mask = np.ones(self.n, bool)
        mask[list(self.found)] = False
        return mask


def check(columns: Mapping[str, pa.Array], schema: Schema, faults: Faults) -> dict[str, np.ndarray]:
    """The columns of the schema as numpy arrays, without the rows that have a fault (which are added to `faults`).

    Args:
        columns: the columns that the source has, of equal length.
        schema: what every row must hold.
        faults: faults found before.

    Raises:
        ValueError: a column has a type that no row of it can have.
    """
    columns = {name: _combined(values) for name, values in columns.items()}
    rows: dict[str, np.ndarray] = {}
    if "probs" in columns and not set(DERIVED) <= set(columns):
        rows.update(_from_probs(columns["probs"], faults))
    for name in schema.numbers:
        if name in columns:
            rows[name] = _numbers(name, columns[name], faults)
        if name == "confidence":
            outside = ~((rows[name] >= 0) & (rows[name] <= 1))
            faults.flag(outside, f"out of range: {name}", lambda row: f"confidence is {rows['confidence'][row]}")
    for name, values in schema.categories.items():
        if name in columns:
            rows[name] = _categories(name, columns[name], values, faults)
        else:
            rows[name] = encode(rows[name].tolist(), values)
    if schema.experts:
        rows["expert_ids"] = _experts(columns["expert_ids"], schema, faults)
    for name in {schema.sequence, "id"} & set(columns):
        if name == schema.sequence:
            faults.flag(_nulls(columns[name]), f"missing {name}", f"{name} is missing")
        rows[name] = _keys(name, columns[name])
    if "time" in columns:
        rows["time"] = _seconds(columns["time"])
        if schema.timed:
            faults.flag(np.isnan(rows["time"]), "unusable time", "time is missing, or neither ISO 8601 nor seconds")
    kept = faults.clean()
    return {name: values[kept] for name, values in rows.items()}


def _combined(values: Any) -> pa.Array:
    return values.combine_chunks() if hasattr(values, "combine_chunks") else values


def _nulls(values: pa.Array) -> np.ndarray:
    return values.is_null().to_numpy(zero_copy_only=False)


def _keys(name: str, values: pa.Array) -> np.ndarray:
    """Keys as text; empty where missing."""
    import pyarrow as pa

    if pa.types.is_floating(values.type):
        texts = np.full(len(values), "", object)
        there = ~_nulls(values)
        texts[there] = key_texts(name, values.filter(pa.array(there)).to_numpy(zero_copy_only=False))
        return texts
    return values.cast(pa.string()).fill_null("").to_numpy(zero_copy_only=False)


def _seconds(values: pa.Array) -> np.ndarray:
    """Seconds since 1970 (of times without a zone: in UTC); NaN for what is no time."""
    import pyarrow as pa

    if pa.types.is_timestamp(values.type):
        whole = values.cast(pa.timestamp("us", values.type.tz), safe=False).cast(pa.int64())
        return whole.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False) / 1e6
    return np.array([_second(value) for value in values.to_pylist()], np.float64)


def _second(value: Any) -> float:
    if isinstance(value, datetime):
        return (value if value.tzinfo else value.replace(tzinfo=timezone.utc)).timestamp()
    try:
        found = float(value)
    except TypeError:
        return np.nan
    except ValueError:
        try:
            return _second(datetime.fromisoformat(value.replace("Z", "+00:00")))
        except ValueError:
            return np.nan
    return found if 0 <= found < MAX_SECONDS else np.nan  # milliseconds are no seconds


def _numbers(name: str, values: pa.Array, faults: Faults) -> np.ndarray:
    import pyarrow as pa

    if not (pa.types.is_integer(values.type) or pa.types.is_floating(values.type) or pa.types.is_null(values.type)):
        raise ValueError(f"Column {name!r} of the log holds {values.type}, the reference holds numbers; log numbers.")
    missing = _nulls(values)
    numbers = values.cast(pa.float64()).to_numpy(zero_copy_only=False)
    faults.flag(missing, f"missing {name}", f"{name} is missing")
    faults.flag(~np.isfinite(numbers) & ~missing, f"not finite: {name}", lambda row: f"{name} is {numbers[row]}")
    return numbers


def _categories(name: str, values: pa.Array, known: tuple[Any, ...], faults: Faults) -> np.ndarray:
    import pyarrow as pa
    import pyarrow.compute as pc

    faults.flag(_nulls(values), f"missing {name}", f"{name} is missing")
    wanted = pa.array(known)
    try:
        positions = pc.index_in(values.cast(wanted.type), value_set=wanted)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ValueError(
            f"Column {name!r} of the log holds {values.type}, the reference holds {wanted.type}; log the same type."
        ) from error
    unknown = _nulls(positions)
    codes = positions.fill_null(len(known)).to_numpy(zero_copy_only=False).astype(np.int64)
    others = [bucket(value) for value in values.filter(pa.array(unknown)).to_pylist()]
    codes[unknown] += np.array(others, np.int64)
    return codes


def _from_probs(values: pa.Array, faults: Faults) -> dict[str, np.ndarray]:
    """Confidence and prediction of each row's probabilities."""
    probs, whole = _matrix(values, None)
    faults.flag(~whole, "malformed probs", "probs is missing or has another length than in the other rows")
    total = probs.sum(axis=1)
    off = ~((np.abs(total - 1) < 1e-3) & (probs >= 0).all(axis=1))
    faults.flag(off & whole, "malformed probs", lambda row: f"probs sum to {total[row]:.6g} or are negative")
    return {"confidence": np.where(whole, probs.max(axis=1), 0.0), "prediction": probs.argmax(axis=1)}


def _experts(values: pa.Array, schema: Schema, faults: Faults) -> np.ndarray:
    ids, whole = _matrix(values, schema.experts)
    shape = " x ".join(map(str, schema.experts or ()))
    faults.flag(~whole, "malformed expert_ids", f"expert_ids is missing or not a list of {shape} numbers")
    unknown = ~((ids >= 0) & (ids < schema.num_experts))
    faults.flag(
        unknown.any(axis=1) & whole,
        "unknown expert",
        lambda row: f"expert {ids[row][unknown[row]][0]:.0f}; the reference has experts 0 to {schema.num_experts - 1}",
    )
    known = np.where(unknown, 0, ids).astype(np.int64)
    return known.reshape(-1, *(schema.experts or ()))


def _matrix(values: pa.Array, shape: tuple[int, ...] | None) -> tuple[np.ndarray, np.ndarray]:
    """Rows of a (nested) list column as one float matrix, zero where a row has not `shape`, and the mask of those
    that do.

    Without `shape`, the most frequent length is taken.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    kinds = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    if not any(kind(values.type) for kind in kinds):
        raise ValueError(f"A list column of the log holds {values.type}; log lists of numbers.")
    lengths = pc.list_value_length(values).fill_null(-1).to_numpy(zero_copy_only=False)
    shape = shape or (int(np.bincount(lengths[lengths > 0]).argmax()) if (lengths > 0).any() else 1,)
    whole = lengths == shape[0]
    inner = values.filter(pa.array(whole)).flatten()
    if len(shape) == 2:
        widths = pc.list_value_length(inner).fill_null(-1).to_numpy(zero_copy_only=False)
        good = (widths.reshape(-1, shape[0]) == shape[1]).all(axis=1)
        whole[np.flatnonzero(whole)[~good]] = False
        inner = values.filter(pa.array(whole)).flatten().flatten()
    matrix = np.zeros((len(values), int(np.prod(shape))))
    matrix[whole] = inner.cast(pa.float64()).to_numpy(zero_copy_only=False).reshape(-1, matrix.shape[1])
    return matrix, whole
