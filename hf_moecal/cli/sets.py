"""The sets of a recipe: where they come from, which rows and columns they give."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from string import Formatter
from typing import TYPE_CHECKING, Any

from ..files import FILE_KINDS, read_rows
from ..labels import VOTES, read_labels
from ..model.labels import class_numbers
from .recipe import COLUMN_KEYS, Recipe, check_keys, expand


if TYPE_CHECKING:
    from datasets import Dataset

_COMPARE = {">=": operator.ge, ">": operator.gt, "<=": operator.le, "<": operator.lt, "!=": operator.ne}


def load_set(name: str, spec: Mapping[str, Any], recipe: Recipe) -> Dataset:
    """Loads one set, with what the task reads in the columns `recipe.columns`; all others are kept.

    The labels of a classification stay as they are unless `labels` or `threshold` says their classes.

    Args:
        name (`str`): of the set, for messages.
        spec (`Mapping`): `path` (a Hub id or a file), `name`, `split`, `revision`, `where`, and `text`, `label` and so
            on where they differ from the recipe's.
        recipe ([`Recipe`]): names the task and the columns.

    Raises:
        ValueError: the set cannot be loaded, is empty, lacks a column, or has rows without a text, a label or a score
            to compare.
    """
    dataset = _where(name, _load(name, spec), spec.get("where") or {})
    if len(dataset) == 0:
        raise ValueError(f"Set {name!r} is empty: no row of {spec['path']!r} has {dict(spec.get('where') or {})}.")
    own = {key: spec.get(key, getattr(recipe, key)) for key in COLUMN_KEYS}
    if recipe.task == "classification":
        _check_columns(name, dataset, [own["text"], own["label"]])
        _check_texts(name, dataset, own["text"])
        dataset = _labelled(name, dataset, own)
        return dataset if own["text"] == recipe.text else dataset.rename_column(own["text"], recipe.text)
    from datasets import Dataset, concatenate_datasets

    made, renamed = {}, set()
    for column in recipe.columns:
        source = own["text" if column == recipe.text else column]
        renamed |= {source} if isinstance(source, str) else set()
        made[column] = (
            _answers(name, dataset, own, made["options"]) if column == "label" else _values(name, dataset, source)
        )
    kept = [column for column in dataset.column_names if column not in {*renamed, *made}]
    new = Dataset.from_dict(made)
    return concatenate_datasets([dataset.select_columns(kept), new], axis=1) if kept else new


def _labelled(name: str, dataset: Dataset, own: Mapping[str, Any]) -> Dataset:
    if own["threshold"] is not None:
        return _classes(name, dataset, own["label"], float(own["threshold"]))
    if own["label"] == VOTES:
        dataset = dataset.remove_columns([column for column in ("label",) if column in dataset.column_names])
        return dataset.add_column("label", read_labels(dataset[VOTES][:], VOTES))
    dataset = dataset if own["label"] == "label" else dataset.rename_column(own["label"], "label")
    if own["labels"] is None:
        return dataset
    where = f"Set {name!r}: column {own['label']!r}"
    return with_classes(dataset, class_numbers(dataset["label"][:], {}, mapping=own["labels"], where=where))


def with_classes(dataset: Dataset, numbers: Sequence[int]) -> Dataset:
    """The set with these classes as its `label`."""
    return dataset.remove_columns("label").add_column("label", list(numbers))


def _check_columns(name: str, dataset: Dataset, wanted: Sequence[str]) -> None:
    for column in wanted:
        if column not in dataset.column_names:
            raise ValueError(
                f"Set {name!r} has no column {column!r}, only {dataset.column_names}; name the columns (`text:`, "
                "`label:`, `prompt:` and so on) under `data:` or in the set."
            )


def _check_texts(name: str, dataset: Dataset, column: str) -> None:
    empty = sum(value is None for value in dataset[column][:])
    if empty:
        raise ValueError(
            f"Set {name!r}: {empty} of {len(dataset)} rows have no text in {column!r}; leave them out with "
            f'`where: {{{column}: {{"!=": null}}}}`.'
        )


def _values(name: str, dataset: Dataset, source: str | list[str]) -> list[Any]:
    """A column, also one inside another; or the same list, or a text with columns in braces, for every row."""
    if isinstance(source, list):
        return [list(map(str, source))] * len(dataset)
    if "{" in source:
        used = sorted({field.split(".")[0].split("[")[0] for _, field, _, _ in Formatter().parse(source) if field})
        _check_columns(name, dataset, used)
        for column in used:
            _check_texts(name, dataset, column)
        return [source.format(**row) for row in dataset.select_columns(used)]
    if source in dataset.column_names:
        _check_texts(name, dataset, source)
        return dataset[source][:]
    outer, *inner = source.split(".")
    _check_columns(name, dataset, [outer if inner else source])
    values = dataset[outer][:]
    for key in inner:
        if not all(isinstance(value, Mapping) and key in value for value in values):
            raise ValueError(f"Set {name!r}: column {outer!r} has no {key!r} in every row, got {values[0]!r}.")
        values = [value[key] for value in values]
    return values


def _answers(name: str, dataset: Dataset, own: Mapping[str, Any], options: Sequence[Sequence[str]]) -> list:
    """The index of each row's right option, given as such, as the option's text, or as its letter; or shares."""
    column = own["label"]
    _check_columns(name, dataset, [column])
    labels, where = dataset[column][:], f"Set {name!r}: column {column!r}"
    if isinstance(labels[0], list):
        return read_labels(labels, VOTES if column == VOTES else "label")
    if own["labels"] is not None:
        return class_numbers(labels, {}, mapping=own["labels"], where=where)
    pairs = list(zip(labels, options, strict=True))
    readings = [[read(label, texts) for label, texts in pairs] for read in (_index, _text_of, _letter)]
    known = [reading for reading in readings if None not in reading]
    if not known:
        wrong = next(row for row, found in enumerate(zip(*readings, strict=True)) if found.count(None) == len(found)
                     or row == len(labels) - 1)  # fmt: skip
        raise ValueError(
            f"{where}: a choice's label is an index into its options (0 for the first), the option's text, or its "
            f"letter (A for the first), the same in all rows; found {labels[wrong]!r} in row {wrong} for "
            f"{list(options[wrong])[:6]!r}."
        )
    if any(reading != known[0] for reading in known):
        raise ValueError(
            f"{where} could be the options' texts or their numbers or letters, which differ; say which with `labels: "
            "{label: index}` (--labels LABEL=INDEX)."
        )
    return known[0]


def _index(label: Any, texts: Sequence[str]) -> int | None:
    whole = isinstance(label, int) and not isinstance(label, bool)
    return int(label) if whole or (isinstance(label, str) and label.strip().isdecimal()) else None


def _text_of(label: Any, texts: Sequence[str]) -> int | None:
    same = [index for index, text in enumerate(texts) if isinstance(label, str) and text.strip() == label.strip()]
    return same[0] if len(same) == 1 else None


def _letter(label: Any, texts: Sequence[str]) -> int | None:
    text = label.strip().upper() if isinstance(label, str) else ""
    index = ord(text) - ord("A") if len(text) == 1 else -1
    return index if 0 <= index < len(texts) else None


def _load(name: str, spec: Mapping[str, Any]) -> Dataset:
    if "path" not in spec:
        raise ValueError(f"Set {name!r} has no `path`; give a Hub id or a file.")
    path, split = expand(spec["path"]), spec.get("split", "train")
    suffix, local = Path(path).suffix.lower(), "://" not in path
    from datasets import load_dataset

    if suffix not in FILE_KINDS and not (local and Path(path).exists()):
        return load_dataset(path, spec.get("name"), split=split, revision=spec.get("revision"))
    given = [key for key in ("split", "name", "revision") if key in spec]
    if given:
        raise ValueError(
            f"Set {name!r}: a file has no {', '.join(given)}; choose rows with `where: {{column: value}}`."
        )
    if not local:
        kind = {".jsonl": "json", ".tsv": "csv"}.get(suffix, suffix[1:])
        return load_dataset(kind, data_files=path, split="train", **({"sep": "\t"} if suffix == ".tsv" else {}))
    try:
        return read_rows(path)
    except ValueError as error:
        raise ValueError(f"Set {name!r}: {error}") from error


def _where(name: str, dataset: Dataset, conditions: Mapping[str, Any]) -> Dataset:
    for column, condition in conditions.items():
        if column not in dataset.column_names:
            raise ValueError(f"Set {name!r} has no column {column!r}, only {dataset.column_names}.")
        meets = _condition(f"Set {name!r}: where: {column}", condition)
        values = dataset[column][:]
        try:
            dataset = dataset.select([row for row, value in enumerate(values) if meets(value)])
        except TypeError as error:
            raise ValueError(
                f"Set {name!r}: where: {column}: {condition!r} does not fit the column: {error}."
            ) from error
    return dataset


def _condition(where: str, condition: Any) -> Callable[[Any], bool]:
    if isinstance(condition, list):
        return lambda value: value in condition
    if not isinstance(condition, Mapping):
        return lambda value: value == condition
    check_keys(where, condition, tuple(_COMPARE))

    def meets(value: Any) -> bool:
        present = value is not None
        return all((present or sign == "!=") and _COMPARE[sign](value, wanted) for sign, wanted in condition.items())

    return meets


def _classes(name: str, dataset: Dataset, column: str, threshold: float) -> Dataset:
    scores = dataset[column][:]
    missing = sum(not isinstance(score, (int, float)) or score != score for score in scores)
    if missing:
        raise ValueError(
            f"Set {name!r}: {missing} of {len(scores)} rows have no number in {column!r} to compare with `threshold: "
            f"{threshold}`; leave them out with `where`."
        )
    kept = dataset.remove_columns([column] if column == "label" else [])
    return kept.add_column("label", [int(score >= threshold) for score in scores])
