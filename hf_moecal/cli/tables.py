"""The tables that a command is given: read from files or samples, with the columns that its options name."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from datasets import Dataset


def read_given(path: str, *, renormalize: bool) -> Dataset:
    """The predictions table of a file or folder; with `renormalize` each row of its `probs` sums to one."""
    from ..metrics import renormalized_table
    from ..table import read_table

    return renormalized_table(read_table(path)) if renormalize else read_table(path)


def add_samples(command: argparse.ArgumentParser) -> None:
    """Options that name samples of lm-evaluation-harness instead of a table."""
    samples = "a --log_samples file of lm-evaluation-harness, or a folder of them, instead of a table"
    runs = "how the date of a run begins (default: each task's newest)"
    command.add_argument("--lm-eval-samples", metavar="PATH", help=samples)
    command.add_argument("--run", dest="date", metavar="DATE", help=runs)
    command.add_argument("--filter", metavar="NAME", help="one of the harness's filters, if there are several")


def given(options: argparse.Namespace) -> Dataset:
    """The predictions table, or the samples of lm-evaluation-harness as one."""
    from ..predictions.lm_eval import NEWEST, read_lm_eval_samples

    if (options.table is None) == (options.lm_eval_samples is None):
        raise ValueError("give either a predictions table or --lm-eval-samples PATH.")
    if options.lm_eval_samples is not None:
        return read_lm_eval_samples(options.lm_eval_samples, run=options.date or NEWEST, filter=options.filter)
    if options.date is not None or options.filter is not None:
        raise ValueError("--run and --filter choose among --lm-eval-samples; a table has neither.")
    return read_given(options.table, renormalize=options.renormalize)


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
