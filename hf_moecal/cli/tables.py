"""The tables that a command is given: read from files or samples, with the columns that its options name."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from datasets import Dataset

LABELS_HELP = "class of each label, as in negative=0 positive=1, or all in order: negative,positive"


def read_given(path: str, options: argparse.Namespace) -> Dataset:
    """The predictions table of a file or folder.

    With `renormalize` each row of its `probs` is made to sum to one; with `labels` the columns `label` and
    `prediction` may hold names.
    """
    from ..metrics import renormalized_table
    from ..model.labels import class_numbers, read_mapping
    from ..table import read_table

    table = renormalized_table(read_table(path)) if options.renormalize else read_table(path)
    for column in ("label", "prediction"):
        if options.labels is not None and column in table.column_names and isinstance(table[column][0], str):
            mapping = read_mapping(options.labels, {})
            numbers = class_numbers(table[column][:], {}, mapping=mapping, where=f"column {column!r}")
            table = table.remove_columns(column).add_column(column, numbers)
    return table


def add_reading(command: argparse.ArgumentParser) -> None:
    """Options that say how a table is to be read."""
    command.add_argument("--renormalize", action="store_true", help="divide each row of rounded probs by its sum")
    command.add_argument("--labels", nargs="+", metavar="LABEL=CLASS", help=LABELS_HELP)


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
    return read_given(options.table, options)


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


def without_calibration(table: Dataset) -> Dataset:
    """The table as the model gives it, before the calibration that its column `calibration` names."""
    from ..calibration.temperature import IdentityCalibrator

    return IdentityCalibrator.from_parameters({}).apply(table).remove_columns("calibration")
