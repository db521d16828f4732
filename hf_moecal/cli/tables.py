"""Predictions tables as the options of a command name them."""

from __future__ import annotations

from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from datasets import Dataset


def read_given(path: str, *, renormalize: bool) -> Dataset:
    """The predictions table of a file or folder; with `renormalize` each row of its `probs` sums to one."""
    from ..metrics import renormalized_table
    from ..table import read_table

    return renormalized_table(read_table(path)) if renormalize else read_table(path)


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
    judged = table.select_columns(["group"])
    for name, column in named.items():
        judged = judged.add_column(name, [float("nan") if value is None else value for value in table[column]])
    return judged


def without_calibration(table: Dataset) -> Dataset:
    """The table as the model gives it, before the calibration that its column `calibration` names."""
    from ..calibration.temperature import IdentityCalibrator

    return IdentityCalibrator.from_parameters({}).apply(table).remove_columns("calibration")
