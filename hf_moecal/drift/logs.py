"""What a log of predictions must hold to be compared with a reference, and its rows as one value per sequence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse

from ..table import columns, names


NUMBERS = ("confidence", "routing_entropy", "routing_margin", "disagreement")
MAX_CATEGORIES = 512
# Columns that a log may have probabilities for instead, and those that are carried along where it has them.
DERIVED = ("confidence", "prediction")
OPTIONAL = ("id", "label")


@dataclass(frozen=True)
class Schema:
    """What a log must hold to be compared with a reference.

    Args:
        numbers: columns of numbers.
        categories: columns of categories, each with the values that the reference has (any other is "other").
        experts: shape of a row's `expert_ids`, `(k,)` or `(layers, k)`; `None` without routing.
        num_experts: experts per layer.
        sequence: column that names the sequence of a row; rows of a sequence follow each other.
    """

    numbers: tuple[str, ...]
    categories: Mapping[str, tuple[Any, ...]]
    experts: tuple[int, ...] | None = None
    num_experts: int = 0
    sequence: str | None = None

    @property
    def needed(self) -> list[str]:
        """Columns that every row needs."""
        routing = ["expert_ids"] if self.experts else []
        return [*self.numbers, *self.categories, *routing, *([self.sequence] if self.sequence else [])]


def read_reference(
    table: Any, *, features: Sequence[str] = (), sequence: str | None = None, num_experts: int | None = None
) -> tuple[Schema, dict[str, np.ndarray]]:
    """The schema that a reference table sets, and its columns.

    Args:
        table: predictions table.
        features: the user's own columns to watch besides those of the predictions table; numbers or categories.
        sequence: column that names the sequence of a row, or `None` where a row is a sequence.
        num_experts: experts per layer; by default one more than the largest id of the reference.

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
    numbers, categories = [], {}
    for name in [name for name in wanted if name not in ("expert_ids", sequence)]:
        if found[name].ndim != 1:
            raise ValueError(f"Feature {name!r} holds lists; only a column of single values can be watched.")
        if name != "prediction" and found[name].dtype.kind in "fiu":
            _require_finite(name, found[name])
            numbers.append(name)
        else:
            values, counts = np.unique(found[name], return_counts=True)
            categories[name] = tuple(values[np.argsort(-counts, kind="stable")][:MAX_CATEGORIES].tolist())
    ids = found.get("expert_ids")
    if ids is not None and (ids.dtype.kind not in "iu" or ids.min() < 0):
        raise ValueError("Column 'expert_ids' of the reference must hold expert numbers of 0 or more.")
    experts = None if ids is None else ids.shape[1:]
    count = 0 if ids is None else (num_experts or int(ids.max()) + 1)
    schema = Schema(tuple(numbers), categories, experts, count, sequence)
    return schema, {**found, **{name: encode(found[name], values) for name, values in categories.items()}}


def encode(values: np.ndarray, categories: Sequence[Any]) -> np.ndarray:
    """Position of each value in `categories`; one past the end for any other."""
    position = {value: i for i, value in enumerate(categories)}
    return np.fromiter((position.get(value, len(position)) for value in values.tolist()), np.int64, len(values))


def _require_finite(name: str, values: np.ndarray) -> None:
    bad = np.flatnonzero(~np.isfinite(np.asarray(values, np.float64)))
    if len(bad):
        raise ValueError(
            f"Column {name!r} of the reference is not finite in {len(bad)} of {len(values)} rows, first in row "
            f"{bad[0]}; a reference must be clean: drop those rows or leave the feature out."
        )


def to_sequences(rows: Mapping[str, np.ndarray], schema: Schema) -> dict[str, np.ndarray | sparse.csr_array]:
    """Features of each sequence: means of its numbers, shares of its categories and experts.

    Args:
        rows: checked rows; rows of one sequence follow each other.
        schema: what the columns mean.

    Returns:
        feature -> [sequences] numbers, or [sequences, categories] sparse shares. `expert_load` has one entry per layer
        where the log records several (`expert_load[0]`, ...).
    """
    starts = sequence_starts(rows, schema)
    n = len(rows[schema.needed[0]])
    lengths = np.diff(np.append(starts, n))
    features: dict[str, np.ndarray | sparse.csr_array] = {}
    for name in schema.numbers:
        values = np.asarray(rows[name], np.float64)
        features[name] = values if len(starts) == n else np.add.reduceat(values, starts) / lengths
    for name, values in schema.categories.items():
        features[name] = _shares(rows[name][:, None], lengths, len(values) + 1)
    if schema.experts:
        ids = rows["expert_ids"].reshape(n, -1, schema.experts[-1])
        for layer in range(ids.shape[1]):
            name = "expert_load" if len(schema.experts) == 1 else f"expert_load[{layer}]"
            features[name] = _shares(ids[:, layer], lengths, schema.num_experts)
    return features


def sequence_starts(rows: Mapping[str, np.ndarray], schema: Schema) -> np.ndarray:
    """First row of each sequence."""
    n = len(rows[schema.needed[0]])
    if schema.sequence is None or n == 0:
        return np.arange(n)
    key = rows[schema.sequence]
    return np.flatnonzero(np.concatenate([[True], key[1:] != key[:-1]]))


def _shares(codes: np.ndarray, lengths: np.ndarray, categories: int) -> sparse.csr_array:
    """Share of each category among the [rows, k] codes of a sequence: [sequences, categories]."""
    k = codes.shape[1]
    weights = np.repeat(1.0 / (lengths * k), lengths * k)
    ends = np.concatenate([[0], np.cumsum(lengths * k)])
    shares = sparse.csr_array((weights, codes.ravel(), ends), shape=(len(lengths), categories))
    shares.sum_duplicates()
    return shares
