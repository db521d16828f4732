"""The predictions table: what flows between models, metrics, calibration, drift, reports and the Hub.

One row per example. A producer fills the columns that it has; a consumer asks for those that it needs with
[`columns`] and gets a clear error that names a missing one. Any further column is the user's own and is kept.

| column | per row | meaning |
|---|---|---|
| `id` | str or int | key that joins labels, ratings and routing later |
| `label` | int | reference class, or float [C]: the share of each class; -100 means "no label" |
| `logits` | float [C] | scores before softmax |
| `probs` | float [C] | probabilities, summing to one |
| `prediction` | int | argmax of `probs` |
| `confidence` | float | max of `probs` |
| `group` | str | evaluation set or shifted group |
| `sample_weight` | float | how much the row counts in figures and fits, such as an importance weight |
| `routing_entropy` | float | entropy of the shares r_k in nats |
| `routing_margin` | float | largest share minus second largest |
| `disagreement` | float | sum_k r_k ||p^(k) - p||^2 |
| `regret` | float | relu(l - min_k l^(k)), in nats |
| `expert_ids` | int [k] | selected experts, in the router's order |
| `expert_weights` | float [k] | their routing weights w_k |
| `expert_logits` | float [k, C] | what each would have predicted alone |
| `scoring` | str | of answer options: what `logits` are, one of [`SCORINGS`], the same in all rows |
| `truncated` | bool | whether the text was longer than `max_length`, where one was set |
| `readout` | str | what predicts, where that is a mixture or a committee, the same in all rows |
| `calibration` | str | the method by which the probabilities are calibrated already, where they are |
| `conditions` | str | dtype, attention and experts implementation, quantization under which it was predicted |

Of answer options (C of them; those that a row lacks have probability zero) `disagreement` and the other figures of the
routing are over the options where these are single label words. Whole options have many tokens: theirs are means over
the tokens of the right one, each over the vocabulary (NaN without a label), and there is no `expert_...`.

A language model's table has no distributions, and per sequence these columns instead, means over its supervised tokens
as `MoECalTrainer` reports them:

| column | per row | meaning |
|---|---|---|
| `confidence` | float | mean probability of the most likely token |
| `correct` | float | share of the tokens that are the most likely ones; NaN where no token is supervised |
| `nll`, `brier` | float | negative log-likelihood (nats) and Brier score over the vocabulary |
| `sequence_confidence` | float | exp(-nll): the geometric mean of the probabilities that the tokens had |
| `num_tokens` | int | supervised tokens |

Per token it has `label` (the token that came), `prediction`, `confidence`, `nll`, `brier`, the routing figures,
`expert_ids` and `expert_weights`, and its place: `sequence`, the id of the sequence, and `position`, the token's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .files import read_rows


if TYPE_CHECKING:
    from datasets import Dataset

COLUMNS = (
    "id",
    "sequence",
    "position",
    "label",
    "logits",
    "probs",
    "prediction",
    "confidence",
    "correct",
    "nll",
    "brier",
    "sequence_confidence",
    "num_tokens",
    "group",
    "sample_weight",
    "routing_entropy",
    "routing_margin",
    "disagreement",
    "regret",
    "expert_ids",
    "expert_weights",
    "expert_logits",
)
LISTS = ("logits", "probs", "expert_ids", "expert_weights")  # columns of numbers in lists
SCORINGS = ("per_token", "total", "per_byte", "label_word")
"""How answer options are scored: by mean or total log-likelihood, that per byte, or by the logit of one word."""

IGNORED_LABEL = -100
ABSENT_LOGIT = -1e30  # of a class that a row does not have: its probability is exactly zero


def names(table: Dataset | Mapping[str, Any]) -> list[str]:
    """Column names of a predictions table (a `datasets.Dataset` or a mapping of columns)."""
    return list(getattr(table, "column_names", None) or table.keys())


def columns(table: Dataset | Mapping[str, Any], *wanted: str) -> dict[str, np.ndarray]:
    """The wanted columns as numpy arrays; list columns of equal length become 2-D.

    Raises:
        ValueError: a column is missing or the rows of a list column differ in length.

    Example:

    ```python
    >>> from hf_moecal.table import columns
    >>> columns({"label": [0, 1], "probs": [[0.9, 0.1], [0.2, 0.8]]}, "probs")["probs"].shape
    (2, 2)

    ```
    """
    present = names(table)
    missing = [name for name in wanted if name not in present]
    if missing:
        raise ValueError(
            f"The predictions table has no column {', '.join(map(repr, missing))}; it has {present}. "
            "Make it with hf_moecal.predict(model, dataset), or rename the column of your log."
        )
    return {name: _as_array(name, table[name]) for name in wanted}


def _as_array(name: str, column: Any) -> np.ndarray:
    if type(column).__module__.split(".")[0] == "torch":
        column = column.detach().cpu()
        column = (column.float() if str(column.dtype) == "torch.bfloat16" else column).numpy()
    if hasattr(column, "to_numpy"):  # pandas, pyarrow
        column = column.to_numpy()
    values = (
        column if isinstance(column, np.ndarray) else column[:] if hasattr(column, "__getitem__") else list(column)
    )
    try:
        array = np.asarray(values)
        if (
            array.dtype == object
            and array.ndim == 1
            and len(array)
            and isinstance(array[0], list | tuple | np.ndarray)
        ):
            array = np.array([np.asarray(row) for row in array])  # pandas keeps the rows of a list column apart
    except ValueError as error:
        raise ValueError(
            f"Column {name!r} has rows of different lengths; pad them, or split the table by length."
        ) from error
    if array.dtype == object and len(array) and not isinstance(array[0], str):
        raise ValueError(f"Column {name!r} holds missing or mixed values; drop those rows or fill them in.")
    return array


def read_table(path: str | Path) -> Dataset:
    """Reads a predictions table from a file, or from a folder of Parquet files; see [`hf_moecal.files.read_rows`].

    List columns that a CSV file holds as text, such as `[0.9, 0.1]`, become lists of numbers.

    Raises:
        ValueError: the path does not exist, has an unknown ending, is broken, holds no row, or has a list that cannot
            be read.
    """
    if not Path(path).exists():
        raise ValueError(f"No predictions table at {str(path)!r}: give a file or a folder of .parquet files.")
    table = read_rows(path)
    return _with_lists(table) if Path(path).suffix.lower() in (".csv", ".tsv") else table


def _with_lists(table: Dataset) -> Dataset:
    for name in [name for name in LISTS if name in table.column_names]:
        cells = table[name][:]
        if isinstance(cells[0], str):
            rows = [_numbers(name, i, cell) for i, cell in enumerate(cells)]
            table = table.remove_columns(name).add_column(name, rows)
    return table


def _numbers(name: str, row: int, cell: Any) -> list[float]:
    try:
        found = [float(number) for number in str(cell).strip("[]() ").replace(",", " ").replace(";", " ").split()]
    except ValueError:
        found = []
    if not found:
        raise ValueError(f"Column {name!r} holds {str(cell)[:40]!r} in row {row}; write a list as [0.9, 0.1].")
    return [int(number) for number in found] if name == "expert_ids" else found
