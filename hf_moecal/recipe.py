"""Recipes: one YAML file that says what is trained on what, and on which sets it is judged.

```yaml
model: Qwen/Qwen1.5-MoE-A2.7B            # a Hub id or a folder
data:
  text: text                             # column to tokenize
  label: label                           # column with the class
  max_length: 128
  train: {path: imdb, split: train}      # a Hub id, or a .parquet, .jsonl or .csv file
  validation: {path: imdb, split: test}
groups:                                  # evaluation sets, by name
  tweets: {path: tweets.parquet, where: {split: test}}
objective: robust_filtered               # every other key is a field of MoECalArguments
```

`${NAME}` in a path is an environment variable; `MOECAL_CACHE` falls back to the folder where the data scripts write.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from .table import FILE_KINDS
from .training_args import MoECalArguments


if TYPE_CHECKING:
    from datasets import Dataset

_SET_KEYS = ("path", "name", "split", "where", "revision")
_DATA_KEYS = ("text", "label", "max_length", "train", "validation")


@dataclass(frozen=True)
class Recipe:
    """What a recipe file says, checked.

    Attributes:
        model (`str`): Hub id or folder of the model.
        train, validation (`dict`, *optional*): where these sets come from; see [`load_set`].
        groups (`dict[str, dict]`): evaluation sets by name.
        text, label (`str`): columns.
        max_length (`int`, *optional*): tokens after which a text is cut.
        arguments (`dict`): fields of [`MoECalArguments`].
    """

    model: str
    train: dict[str, Any] | None = None
    validation: dict[str, Any] | None = None
    groups: dict[str, dict[str, Any]] = field(default_factory=dict)
    text: str = "text"
    label: str = "label"
    max_length: int | None = None
    arguments: dict[str, Any] = field(default_factory=dict)


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
    _check_keys(path.name, content, ("model", "data", "groups", *fields))
    if not isinstance(content.get("model"), str):
        raise ValueError(f"{path.name} has no `model`; give a Hub id or a folder.")
    data = content.get("data") or {}
    _check_keys(f"{path.name}: data", data, _DATA_KEYS)
    groups = content.get("groups") or {}
    for name, spec in [("train", data.get("train")), ("validation", data.get("validation")), *groups.items()]:
        if spec is not None:
            _check_keys(f"{path.name}: {name}", spec, _SET_KEYS)
    return Recipe(
        model=expand(content["model"]),
        groups={str(name): spec for name, spec in groups.items()},
        arguments={key: value for key, value in content.items() if key in fields},
        **data,
    )


def load_set(name: str, spec: Mapping[str, Any], recipe: Recipe) -> Dataset:
    """Loads one set: `path` (a Hub id or a file), `name`, `split`, `revision`, `where` (column: value).

    Raises:
        ValueError: the set cannot be loaded, is empty, or lacks a column that the recipe names.
    """
    from datasets import load_dataset

    if "path" not in spec:
        raise ValueError(f"Set {name!r} has no `path`; give a Hub id or a file.")
    path, split = expand(spec["path"]), spec.get("split", "train")
    kind = FILE_KINDS.get(Path(path).suffix)
    if kind is not None and not Path(path).is_file():
        raise ValueError(f"Set {name!r}: no file at {path!r}; fetch it first, or correct the path.")
    given = [key for key in ("split", "name", "revision") if key in spec]
    if kind is not None and given:
        raise ValueError(
            f"Set {name!r}: a file has no {', '.join(given)}; choose rows with `where: {{column: value}}`."
        )
    if kind is not None:
        dataset = load_dataset(kind, data_files=path, split="train")
    else:
        dataset = load_dataset(path, spec.get("name"), split=split, revision=spec.get("revision"))
    for column, wanted in (spec.get("where") or {}).items():
        if column not in dataset.column_names:
            raise ValueError(f"Set {name!r} has no column {column!r}, only {dataset.column_names}.")
        values = dataset[column][:]
        dataset = dataset.select([row for row, value in enumerate(values) if value == wanted])
    if len(dataset) == 0:
        raise ValueError(f"Set {name!r} is empty: no row of {path!r} has {dict(spec.get('where') or {})}.")
    for column in (recipe.text, recipe.label):
        if column not in dataset.column_names:
            raise ValueError(
                f"Set {name!r} has no column {column!r}, only {dataset.column_names}; name the columns with `text:` "
                "and `label:` under `data:`."
            )
    return dataset if recipe.label == "label" else dataset.rename_column(recipe.label, "label")


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
