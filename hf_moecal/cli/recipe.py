"""Recipes: one YAML file that says what is trained on what, and on which sets it is judged.

```yaml
model: Qwen/Qwen1.5-MoE-A2.7B            # a Hub id or a folder
dtype: bfloat16                          # of the loaded weights (float32 if unset); `bf16: true` trains in float32
data:
  text: text                             # column to tokenize
  label: label                           # column with the class or shares of classes; `votes` with raters' counts
  max_length: 128
  train: {path: imdb, split: train}      # a Hub id, or a .parquet, .jsonl, .csv or .tsv file, also hf://datasets/...
  validation: {path: imdb, split: test}
groups:                                  # evaluation sets, by name
  tweets: {path: tweets.parquet, where: {split: test}}
  amazon: {path: fancyzhx/amazon_polarity, split: "test[:10000]", text: content}   # its own column names
objective: robust_filtered               # every other key is a field of MoECalArguments
```

`group: language` in a set names a column whose values are the groups of its rows, instead of the set's name.

Labels are numbers of classes or names that the model has for them; `labels: {negative: 0, positive: 1}` beside
`label:` says it for others. A model without a head gets one whose classes are the training set's names, sorted.

Where the label is a score, `threshold: 0.5` beside `label: toxicity` makes the classes: 1 from that score on, 0 below.
`where` keeps the rows that meet every condition: `column: value`, `column: [one, of, these]`, or a comparison,
`column: {">=": 0.5}` with `>=`, `>`, `<=`, `<` or `!=`; a missing value meets `!=` only.

With `task: choice` a row has a prompt, options and the right one (its index, its text, or its letter, A for the
first); with `task: lm` a prompt and its completion, or only a text:

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
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..table import SCORINGS
from ..tasks import TASKS
from ..training.arguments import MoECalArguments


COLUMN_KEYS = ("text", "label", "labels", "threshold", "prompt", "options", "completion")
_SET_KEYS = ("path", "name", "split", "where", "revision", "group", *COLUMN_KEYS)
_DATA_KEYS = (*COLUMN_KEYS, "max_length", "train", "validation")
_DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Recipe:
    """What a recipe file says, checked.

    Attributes:
        model (`str`): Hub id or folder of the model.
        train, validation (`dict`, *optional*): where these sets come from; see [`~hf_moecal.cli.sets.load_set`].
        groups (`dict[str, dict]`): evaluation sets by name.
        text, label (`str`): columns.
        labels (`dict`, *optional*): class of each value of the label column.
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
    labels: dict[Any, int] | None = None
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
        """The columns that the task reads, in the sets as [`~hf_moecal.cli.sets.load_set`] gives them."""
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
    return read_recipe(path.name, content)


def read_recipe(name: str, content: Mapping[str, Any]) -> Recipe:
    """The recipe that a mapping holds; `name` is what messages call it.

    Raises:
        ValueError: a key does not exist, or `model` is missing.
    """
    fields = [f.name for f in dataclasses.fields(MoECalArguments) if f.init]
    check_keys(name, content, ("model", "dtype", "scoring", "data", "groups", *fields))
    if not isinstance(content.get("model"), str):
        raise ValueError(f"{name} has no `model`; give a Hub id or a folder.")
    dtype = content.get("dtype", _DTYPES[0])
    if dtype not in _DTYPES:
        raise ValueError(f"{name}: `dtype` must be one of {', '.join(_DTYPES)}, got {dtype!r}.")
    scoring = content.get("scoring", SCORINGS[0])
    if scoring not in SCORINGS:
        raise ValueError(f"{name}: `scoring` must be one of {', '.join(SCORINGS)}, got {scoring!r}.")
    data = content.get("data") or {}
    check_keys(f"{name}: data", data, _DATA_KEYS)
    groups = content.get("groups") or {}
    for group, spec in [("train", data.get("train")), ("validation", data.get("validation")), *groups.items()]:
        if spec is not None:
            check_keys(f"{name}: {group}", spec, _SET_KEYS)
    return Recipe(
        model=expand(content["model"]),
        dtype=dtype,
        scoring=scoring,
        groups={str(group): spec for group, spec in groups.items()},
        arguments={key: value for key, value in content.items() if key in fields},
        **data,
    )


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


def check_keys(where: str, content: Any, allowed: tuple[str, ...]) -> None:
    if not isinstance(content, Mapping):
        raise ValueError(f"{where} must be a mapping of keys to values, got {content!r}.")
    for key in content:
        if key not in allowed:
            close = difflib.get_close_matches(str(key), allowed, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known keys are {', '.join(allowed[:8])} and so on."
            raise ValueError(f"{where} has an unknown key {key!r}; {hint}")
