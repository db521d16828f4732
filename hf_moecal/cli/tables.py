"""Predictions tables as the options of a command name them."""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from datasets import Dataset


def read_given(path: str, options: Namespace) -> Dataset:
    """The predictions table of a file or folder.

    With `renormalize` each row of its `probs` is made to sum to one; with `labels`, names of the classes, separated by
    commas, in the order of the columns of `probs`, the columns `label` and `prediction` may hold names.
    """
    from ..metrics import renormalized_table
    from ..table import read_table

    table = renormalized_table(read_table(path)) if options.renormalize else read_table(path)
    for column in ("label", "prediction"):
        if options.labels is not None and column in table.column_names and isinstance(table[column][0], str):
            table = _numbered(table, column, [name.strip() for name in options.labels.split(",")])
    return table


def _numbered(table: Dataset, column: str, classes: list[str]) -> Dataset:
    """The table with the names in a column as numbers of classes."""
    number = {name: i for i, name in enumerate(classes)}
    names = table[column][:]
    unknown = sorted({str(name) for name in names} - set(number))
    if unknown:
        raise ValueError(f"column {column!r} holds {unknown[0]!r}, but --labels names {', '.join(classes)}.")
    return table.remove_columns(column).add_column(column, [number[name] for name in names])


def grouped_by(table: Dataset, column: str) -> Dataset:
    """The table with the named column as its `group`."""
    if column == "group":
        return table if "group" in table.column_names else table.add_column("group", ["all"] * len(table))
    if column not in table.column_names:
        raise ValueError(f"the table has no column {column!r}; it has {table.column_names}.")
    kept = table.remove_columns("group") if "group" in table.column_names else table
    return kept.rename_column(column, "group")


def judged_by(table: Dataset, confidence: str | None, correct: str | None) -> Dataset:
    """The table with the named columns as its `confidence` and `correct`, without what else could be judged."""
    if confidence is None and correct is None:
        return table
    named = {"confidence": confidence or "confidence", "correct": correct or "correct"}
    missing = [name for name in named.values() if name not in table.column_names]
    if missing:
        raise ValueError(f"the table has no column {missing[0]!r}; it has {table.column_names}.")
    judged = table.select_columns([name for name in ("group", "sample_weight") if name in table.column_names])
    for name, column in named.items():
        judged = judged.add_column(name, [float("nan") if value is None else value for value in table[column]])
    return judged
