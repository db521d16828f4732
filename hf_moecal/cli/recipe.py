"""Recipes: one YAML file that says what is trained on what, and on which sets it is judged.

```yaml
model: Qwen/Qwen1.5-MoE-A2.7B            # a Hub id or a folder
dtype: bfloat16                          # of the loaded weights (float32 if unset); `bf16: true` trains in float32
data:
  text: text                             # column to tokenize
  label: label                           # column with the class or shares of classes; `votes` with raters' counts
  max_length: 128
  train: {path: imdb, split: train}      # a Hub id, or a .parquet, .jsonl or .csv file, also hf://datasets/...
  validation: {path: imdb, split: test}
groups:                                  # evaluation sets, by name
  tweets: {path: tweets.parquet, where: {split: test}}
  amazon: {path: fancyzhx/amazon_polarity, split: "test[:10000]", text: content}   # its own column names
objective: robust_filtered               # every other key is a field of MoECalArguments
```

Where the label is a score, `threshold: 0.5` beside `label: toxicity` makes the classes: 1 from that score on, 0 below.
`where` keeps the rows that meet every condition: `column: value`, `column: [one, of, these]`, or a comparison,
`column: {">=": 0.5}` with `>=`, `>`, `<=`, `<` or `!=`; a missing value meets `!=` only.

With `task: choice` a row has a prompt, options and the index of the right one; with `task: lm` a prompt and its
completion, or only a text:

```yaml
task: choice
scoring: label_word                           # see ChoiceCollator; per_token if unset
data:
  prompt: "Question: {question}\nAnswer: "    # a column, or a text with columns in braces
  options: choices.text                       # a column, perhaps inside another; or for all rows [" no", " yes"]
  label: answer
---
task: lm
example: token                                # what one example is; sequence if unset
data: {prompt: question, completion: " {answer}"}
```

`${NAME}` in a path is an environment variable; `MOECAL_CACHE` falls back to the folder where the data scripts write.
"""

from __future__ import annotations

import dataclasses
import difflib
import operator
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import Formatter
from typing import TYPE_CHECKING, Any

import yaml

from ..labels import VOTES, read_labels
from ..table import FILE_KINDS, SCORINGS
from ..tasks import TASKS
from ..training.arguments import MoECalArguments


if TYPE_CHECKING:
    from datasets import Dataset

_COLUMN_KEYS = ("text", "label", "threshold", "prompt", "options", "completion")
_SET_KEYS = ("path", "name", "split", "where", "revision", *_COLUMN_KEYS)
_DATA_KEYS = (*_COLUMN_KEYS, "max_length", "train", "validation")
_DTYPES = ("float32", "bfloat16")
_COMPARE = {">=": operator.ge, ">": operator.gt, "<=": operator.le, "<": operator.lt, "!=": operator.ne}


@dataclass(frozen=True)
class Recipe:
    """What a recipe file says, checked.

    Attributes:
        model (`str`): Hub id or folder of the model.
        train, validation (`dict`, *optional*): where these sets come from; see [`load_set`].
        groups (`dict[str, dict]`): evaluation sets by name.
        text, label (`str`): columns.
        prompt, completion (`str`): columns, or texts with columns in braces.
        options (`str` or `list[str]`): a column, or the options of all rows.
        scoring (`str`): how options are scored, see [`ChoiceCollator`].
        threshold (`float`, *optional*): score of the label column from which on the class is 1; classes if unset.
        max_length (`int`, *optional*): tokens after which a text is cut.
        dtype (`str`): precision in which the model's weights are loaded.
        arguments (`dict`): fields of [`MoECalArguments`].
    """

    model: str
    train: dict[str, Any] | None = None
    validation: dict[str, Any] | None = None
    groups: dict[str, dict[str, Any]] = field(default_factory=dict)
    text: str = "text"
    label: str = "label"
    threshold: float | None = None
    prompt: str = "prompt"
    options: str | list[str] = "options"
    completion: str | None = None
    scoring: str = SCORINGS[0]
    max_length: int | None = None
    dtype: str = "float32"
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def task(self) -> str:
        """What is trained and predicted: one of [`TASKS`]."""
        return self.arguments.get("task", TASKS[0])

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that the task reads, in the sets as [`load_set`] gives them."""
        if self.task == "choice":
            return ("prompt", "options", "label")
        if self.task == "lm":
            return (self.text,) if self.completion is None else ("prompt", "completion")
        return (self.text, "label")


def load_recipe(path: str | Path) -> Recipe:
    """Reads a recipe file.

    Raises:
        ValueError: the file is absent or no YAML mapping, a key does not exist, or `model` is missing.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"No recipe at {str(path)!r}; see recipes/quickstart.yaml for one.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must be a mapping of keys to values, got {type(content).__name__}.")
    fields = [f.name for f in dataclasses.fields(MoECalArguments) if f.init]
    _check_keys(path.name, content, ("model", "dtype", "scoring", "data", "groups", *fields))
    if not isinstance(content.get("model"), str):
        raise ValueError(f"{path.name} has no `model`; give a Hub id or a folder.")
    dtype = content.get("dtype", _DTYPES[0])
    if dtype not in _DTYPES:
        raise ValueError(f"{path.name}: `dtype` must be one of {', '.join(_DTYPES)}, got {dtype!r}.")
    scoring = content.get("scoring", SCORINGS[0])
    if scoring not in SCORINGS:
        raise ValueError(f"{path.name}: `scoring` must be one of {', '.join(SCORINGS)}, got {scoring!r}.")
    data = content.get("data") or {}
    _check_keys(f"{path.name}: data", data, _DATA_KEYS)
    groups = content.get("groups") or {}
    for name, spec in [("train", data.get("train")), ("validation", data.get("validation")), *groups.items()]:
        if spec is not None:
            _check_keys(f"{path.name}: {name}", spec, _SET_KEYS)
    return Recipe(
        model=expand(content["model"]),
        dtype=dtype,
        scoring=scoring,
        groups={str(name): spec for name, spec in groups.items()},
        arguments={key: value for key, value in content.items() if key in fields},
        **data,
    )


def load_set(name: str, spec: Mapping[str, Any], recipe: Recipe) -> Dataset:
    """Loads one set, with what the task reads in the columns `recipe.columns`; all others are kept.

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
    own = {key: spec.get(key, getattr(recipe, key)) for key in _COLUMN_KEYS}
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
        made[column] = _indices(name, dataset, source) if column == "label" else _values(name, dataset, source)
    kept = [column for column in dataset.column_names if column not in {*renamed, *made}]
    new = Dataset.from_dict(made)
    return concatenate_datasets([dataset.select_columns(kept), new], axis=1) if kept else new


def _labelled(name: str, dataset: Dataset, own: Mapping[str, Any]) -> Dataset:
    if own["threshold"] is not None:
        return _classes(name, dataset, own["label"], float(own["threshold"]))
    if own["label"] == VOTES:
        dataset = dataset.remove_columns([column for column in ("label",) if column in dataset.column_names])
        return dataset.add_column("label", read_labels(dataset[VOTES][:], VOTES))
    return dataset if own["label"] == "label" else dataset.rename_column(own["label"], "label")


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


def _indices(name: str, dataset: Dataset, column: str) -> list[int] | list[list[float]]:
    _check_columns(name, dataset, [column])
    labels = dataset[column][:]
    if isinstance(labels[0], list):
        return read_labels(labels, VOTES if column == VOTES else "label")
    wrong = next((x for x in labels if not isinstance(x, int) and not (isinstance(x, str) and x.isdecimal())), None)
    if wrong is not None:
        raise ValueError(
            f"Set {name!r}: the label of a choice is an index into its options (0 for the first), found {wrong!r} in "
            f"{column!r}; map it to one beforehand."
        )
    return list(map(int, labels))


def _load(name: str, spec: Mapping[str, Any]) -> Dataset:
    from datasets import load_dataset

    if "path" not in spec:
        raise ValueError(f"Set {name!r} has no `path`; give a Hub id or a file.")
    path, split = expand(spec["path"]), spec.get("split", "train")
    kind = FILE_KINDS.get(Path(path).suffix)
    if kind is None:
        return load_dataset(path, spec.get("name"), split=split, revision=spec.get("revision"))
    if "://" not in path and not Path(path).is_file():
        raise ValueError(f"Set {name!r}: no file at {path!r}; fetch it first, or correct the path.")
    given = [key for key in ("split", "name", "revision") if key in spec]
    if given:
        raise ValueError(
            f"Set {name!r}: a file has no {', '.join(given)}; choose rows with `where: {{column: value}}`."
        )
    return load_dataset(kind, data_files=path, split="train")


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
    _check_keys(where, condition, tuple(_COMPARE))

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


def expand(value: str) -> str:
    """Replaces `${NAME}` by the environment variable and `~` by the home folder.

    Raises:
        ValueError: the variable is not set.
    """

    def variable(match: re.Match[str]) -> str:
        name = match.group(1)
        if name == "MOECAL_CACHE":
            return os.environ.get(name) or str(cache_folder())
        if name not in os.environ:
            raise ValueError(f"The recipe uses ${{{name}}}, which is not set; export {name}=... first.")
        return os.environ[name]

    return os.path.expanduser(re.sub(r"\$\{(\w+)\}", variable, value))


def cache_folder() -> Path:
    """Where fetched data and models are kept: `MOECAL_CACHE`, else a folder in the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(os.environ.get("MOECAL_CACHE") or os.path.join(base, "hf_moecal"))


def _check_keys(where: str, content: Any, allowed: tuple[str, ...]) -> None:
    if not isinstance(content, Mapping):
        raise ValueError(f"{where} must be a mapping of keys to values, got {content!r}.")
    for key in content:
        if key not in allowed:
            close = difflib.get_close_matches(str(key), allowed, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known keys are {', '.join(allowed[:8])} and so on."
            raise ValueError(f"{where} has an unknown key {key!r}; {hint}")
