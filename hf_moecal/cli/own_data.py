"""Own data without a recipe: what the options of `check`, `predict` and `train` say, as a recipe would."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import FILE_KINDS
from .command import Options
from .tables import LABELS_HELP


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Options that say what is in the columns of a person's data."""
    data = parser.add_argument_group("own data")
    data.add_argument("--text", metavar="COLUMN", help="column with the text (default: text)")
    data.add_argument("--label", metavar="COLUMN", help="column with the label, a class or its name (default: label)")
    data.add_argument("--labels", nargs="+", metavar="LABEL=CLASS", help=LABELS_HELP)
    data.add_argument("--task", choices=["classification", "choice", "lm"], help="default: classification")
    data.add_argument("--prompt", help='of --task choice or lm: a column, or a text as in "{question} Answer:"')
    data.add_argument("--options", nargs="+", metavar="OPTION", help="of choice: a column, or the options of all rows")
    data.add_argument("--completion", help="of lm: what follows the prompt, a column or a text as in --prompt")
    data.add_argument("--scoring", help="of choice: per_token (default), total, per_byte or label_word")
    data.add_argument("--max-length", type=int, metavar="TOKENS", help="cut longer texts there")
    data.add_argument("--dtype", choices=["float32", "bfloat16"], help="of the loaded weights (default: float32)")


def given_data_options(options: Options) -> list[str]:
    """The options above that a command line has, as they were typed."""
    names = ("text", "label", "labels", "prompt", "options", "completion", "scoring", "max_length", "dtype")
    return [f"--{name.replace('_', '-')}" for name in names if getattr(options, name) is not None]


def own_recipe(options: Options, *, groups: Mapping[str, str], train: str | None = None) -> dict[str, Any]:
    """The content of the recipe that the options describe.

    Args:
        options: with those of [`add_data_options`], and `model`.
        groups: evaluation sets by name, each a file or `ID:SPLIT` of the Hub.
        train: the same for the training set, if there is one.

    Raises:
        ValueError: an option does not fit the task, a data set of the Hub comes without its split, or the labels are
            not given as `LABEL=CLASS`.
    """
    task = options.task or "classification"
    _check_options(options, task)
    columns = {name: getattr(options, name) for name in ("text", "label", "prompt", "completion", "max_length")}
    if options.options is not None:
        columns["options"] = options.options[0] if len(options.options) == 1 else list(options.options)
    if options.labels is not None:
        columns["labels"] = _mapping(options)
    data: dict[str, Any] = {name: value for name, value in columns.items() if value is not None}
    if train is not None:
        data["train"] = _set(train)
    if getattr(options, "validation", None) is not None:
        data["validation"] = _set(options.validation)
    by = {} if getattr(options, "group", None) is None else {"group": options.group}
    content: dict[str, Any] = {"model": _absolute(options.model), "task": task}
    content |= {name: getattr(options, name) for name in ("scoring", "dtype") if getattr(options, name) is not None}
    return {**content, "data": data, "groups": {name: {**_set(given), **by} for name, given in groups.items()}}


def _check_options(options: Options, task: str) -> None:
    of_task = {
        "classification": ("text", "label", "labels"),
        "choice": ("prompt", "options", "scoring", "label", "labels"),
        "lm": ("text", "prompt", "completion"),
    }
    for other, names in of_task.items():
        wrong = [name for name in names if name not in of_task[task] and getattr(options, name) is not None]
        if wrong:
            raise ValueError(f"--{wrong[0]} belongs to --task {other}, and the task is {task}; say --task {other}.")
    missing = [name for name in ("prompt", "options") if task == "choice" and getattr(options, name) is None]
    if missing:
        raise ValueError(
            f"--task choice needs --{missing[0]}, as in --prompt \"{{question}} Answer:\" --options ' no' ' yes'."
        )


def _mapping(options: Options) -> dict[str, int]:
    from ..model.labels import read_mapping
    from ..model.loading import own_labels

    return read_mapping(options.labels, own_labels(options.model) or {})


def _set(given: str) -> dict[str, Any]:
    """A file, or `ID:SPLIT` of the Hub."""
    if Path(given).exists() or Path(given).suffix.lower() in FILE_KINDS or "://" in given:
        return {"path": _absolute(given)}
    name, sign, split = given.rpartition(":")
    if not sign:
        raise ValueError(
            f"there is no file {given!r}; if it is a data set of the Hub, say which split, as in {given}:test."
        )
    return {"path": name, "split": split}


def _absolute(path: str) -> str:
    """So that a recipe means the same from everywhere; what is of the Hub stays as it is."""
    return str(Path(path).absolute()) if Path(path).exists() else path


def set_name(given: str) -> str:
    """What a set is called that nobody named: as its file."""
    return Path(given.partition("://")[2] or given).stem.partition(":")[0]


def overridden(recipe: Any, overrides: Sequence[str]) -> dict[str, Any]:
    """The fields that a command line overrides, with their values, for a recipe that repeats it.

    Raises:
        ValueError: a field does not exist or its value is out of range.
    """
    from .runs import parse_arguments

    arguments = parse_arguments(recipe, overrides)
    names = [item[2:].partition("=")[0].replace("-", "_") for item in overrides if item.startswith("--")]
    found = {name.removeprefix("no_") if not hasattr(arguments, name) else name for name in names}
    return {name: _plain(getattr(arguments, name)) for name in sorted(found)}


def _plain(value: Any) -> Any:
    value = getattr(value, "value", value)  # of an enumeration
    return value if isinstance(value, (bool, int, float, str, list, dict, type(None))) else str(value)
