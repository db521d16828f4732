"""What a log of predictions must hold to be compared with a reference, and the features of its rows."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse

from ..table import columns, names


NUMBERS = ("confidence", "routing_entropy", "routing_margin", "disagreement")
# Codes for categories that the reference does not have.
OTHERS = 256
# Columns that a log may have probabilities for instead, and those that are carried along where it has them.
DERIVED = ("confidence", "prediction")
OPTIONAL = ("id", "time")


@dataclass(frozen=True)
class Schema:
    """What a log must hold to be compared with a reference.

    Args:
        numbers: columns of numbers.
        categories: columns of categories, each with the values that the reference has (any other is new).
        experts: shape of a row's `expert_ids`, `(k,)` or `(layers, k)`; `None` without routing.
        num_experts: experts per layer.
        sequence: column that names the sequence (request, conversation, user) of a row.
        timed: whether every row needs its `time`.
    """

    numbers: tuple[str, ...]
    categories: Mapping[str, tuple[Any, ...]]
    experts: tuple[int, ...] | None = None
    num_experts: int = 0
    sequence: str | None = None
    timed: bool = False

    @property
    def needed(self) -> list[str]:
        """Columns that every row needs."""
        routing = ["expert_ids"] if self.experts else []
        place = [*([self.sequence] if self.sequence else []), *(["time"] if self.timed else [])]
        return [*self.numbers, *self.categories, *routing, *place]


def read_reference(
    table: Any,
    *,
    features: Sequence[str] = (),
    sequence: str | None = None,
    num_experts: int | None = None,
    timed: bool = False,
) -> tuple[Schema, dict[str, np.ndarray]]:
    """The schema that a reference table sets, and its columns.

    Args:
        table: predictions table.
        features: the user's own columns to watch besides those of the predictions table; numbers or categories.
        sequence: column that names the sequence of a row, or `None` where a row is a sequence.
        num_experts: experts per layer; by default one more than the largest id of the reference.
        timed: whether the rows of the log need a `time`.

    Returns:
        The schema; and the columns that it needs with `label` where the table has it, categories as positions in the
        schema's list of them.

    Raises:
        ValueError: a column is missing, holds missing or non-finite values, or has no usable type.
    """
    present = names(table)
    table = {name: table[name][:] for name in present}  # a datasets column read row by row takes 400 times as long
    derived = {}
    if "probs" in present and not {"confidence", "prediction"} <= set(present):
        probs = columns(table, "probs")["probs"]
        derived = {"confidence": probs.max(axis=1), "prediction": probs.argmax(axis=1)}
    known = [name for name in (*NUMBERS, "prediction", "expert_ids") if name in present or name in derived]
    wanted = [*dict.fromkeys([*known, *features, *([sequence] if sequence else [])])]
    if not set(wanted) - {sequence}:
        raise ValueError(f"There is no feature to watch in the columns {present}; name some in `features`.")
    extra = [name for name in ("label",) if name in present]
    found = {**columns(table, *(name for name in [*wanted, *extra] if name not in derived)), **derived}
    if sequence:
        found[sequence] = key_texts(sequence, found[sequence])
    numbers, categories = [], {}
    for name in [name for name in wanted if name not in ("expert_ids", sequence)]:
        if found[name].ndim != 1:
            raise ValueError(f"Feature {name!r} holds lists; only a column of single values can be watched.")
        if name != "prediction" and found[name].dtype.kind in "fiu":
            _require_finite(name, found[name])
            numbers.append(name)
        else:
            categories[name] = tuple(np.unique(found[name]).tolist())
    ids = found.get("expert_ids")
    if ids is not None and (ids.dtype.kind not in "iu" or ids.min() < 0):
        raise ValueError("Column 'expert_ids' of the reference must hold expert numbers of 0 or more.")
    experts = None if ids is None else ids.shape[1:]
    count = 0 if ids is None else (num_experts or int(ids.max()) + 1)
    schema = Schema(tuple(numbers), categories, experts, count, sequence, timed)
    return schema, {**found, **{name: encode(found[name].tolist(), values) for name, values in categories.items()}}


def key_texts(name: str, values: np.ndarray) -> np.ndarray:
    """Keys (ids, sequences) as text, by which they are compared.

    Raises:
        ValueError: whole numbers were read as floats and lost digits.
    """
    values = np.asarray(values)
    if values.dtype.kind != "f":
        return values.astype(str).astype(object)
    if not (np.isfinite(values) & (np.abs(values) < 2**53) & (values == np.floor(values))).all():
        raise ValueError(
            f"Column {name!r} holds numbers that were read as floats, and two keys may have become one; store its "
            "keys as text or as 64-bit integers without gaps."
        )
    return values.astype(np.int64).astype(str).astype(object)


def bucket(value: Any) -> int:
    """Number from 0 to OTHERS - 1 of a category, the same in every process."""
    return zlib.crc32(str(value).encode()) % OTHERS


def encode(values: Sequence[Any], categories: Sequence[Any]) -> np.ndarray:
    """Position of each value in `categories`; for any other, one of the OTHERS codes after them."""
    position = {value: i for i, value in enumerate(categories)}
    known = len(position)
    codes = (position[v] if v in position else known + bucket(v) for v in values)
    return np.fromiter(codes, np.int64, len(values))


def _require_finite(name: str, values: np.ndarray) -> None:
    bad = np.flatnonzero(~np.isfinite(np.asarray(values, np.float64)))
    if len(bad):
        raise ValueError(
            f"Column {name!r} of the reference is not finite in {len(bad)} of {len(values)} rows, first in row "
            f"{bad[0]}; a reference must be clean: drop those rows or leave the feature out."
        )


def row_features(rows: Mapping[str, np.ndarray], schema: Schema) -> dict[str, np.ndarray | sparse.csr_array]:
    """Features of each row: its numbers, and the shares of its categories and experts.

    Args:
        rows: checked rows.
        schema: what the columns mean.

    Returns:
        feature -> [rows] numbers, or [rows, categories] sparse shares. `expert_load` has one entry per layer where the
        log records several (`expert_load[0]`, ...).
    """
    n = len(rows[schema.needed[0]])
    features: dict[str, np.ndarray | sparse.csr_array] = {
        name: np.asarray(rows[name], np.float64) for name in schema.numbers
    }
    for name, values in schema.categories.items():
        features[name] = _shares(rows[name][:, None], len(values) + OTHERS)
    if schema.experts:
        ids = rows["expert_ids"].reshape(n, int(np.prod(schema.experts[:-1])), schema.experts[-1])
        for layer in range(ids.shape[1]):
            name = "expert_load" if len(schema.experts) == 1 else f"expert_load[{layer}]"
            features[name] = _shares(ids[:, layer], schema.num_experts)
    return features


def _shares(codes: np.ndarray, categories: int) -> sparse.csr_array:
    """Share of each category among the k codes of each row: [rows, categories]."""
    n, k = codes.shape
    shares = sparse.csr_array(
        (np.full(n * k, 1 / k), codes.ravel(), np.arange(0, n * k + 1, k)), shape=(n, categories)
    )
    shares.sum_duplicates()
    return shares
