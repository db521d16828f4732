"""Computes what a report shows, as plain JSON-able data; draws and writes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ..metrics import calibration_report, reliability_bins
from ..metrics.groups import miscalibrated
from ..metrics.report import row_scores, table_scores
from ..metrics.rows import softmax
from ..table import IGNORED_LABEL, columns, names


if TYPE_CHECKING:
    from datasets import Dataset

    Table = Dataset | Mapping[str, Any]

SCORES = (
    *("n", "accuracy", "confidence", "signed_gap", "signed_gap_interval", "ece", "ece_interval", "ece_debiased"),
    *("calibrated_p", "nll", "n_zero_probability", "brier"),
)


def outcomes(table: Table, *more: str) -> dict[str, np.ndarray]:
    """Confidence and correctness of the labelled rows, with their probabilities where the table has them.

    Args:
        table: predictions table with `label` and `probs` or `logits`; or with `confidence` and `correct`, or `label`
            and `prediction`.
        more: further columns to carry along.

    Returns:
        `confidence`, `correct`, `row` (position in the table) [n]; `label` [n], `probs` [n, C], `nll`, `brier` and
        `sample_weight` [n] as far as they are there; and `more`.

    Raises:
        ValueError: a needed column is missing, or no row has a label.
    """
    present = names(table)
    more = (*more, *(["sample_weight"] if "sample_weight" in present and "sample_weight" not in more else []))
    if not {"probs", "logits"} & set(present) and "correct" in present:
        return _judged_outcomes(table, *more)
    given = next((name for name in ("probs", "logits") if name in present), None)
    wanted = (given,) if given else ("confidence", "prediction", *row_scores(table))
    found = columns(table, "label", *wanted, *more)
    row = np.flatnonzero(found["label"] != IGNORED_LABEL)
    if not len(row):
        raise ValueError(
            f"No row of the predictions table has a label (all are {IGNORED_LABEL}); join the labels by `id` first."
        )
    found = {name: values[row] for name, values in found.items()}
    if given == "logits":
        found["probs"] = softmax(found.pop("logits"))
    if "probs" in found:
        found["confidence"], found["prediction"] = found["probs"].max(axis=1), found["probs"].argmax(axis=1)
    return {**found, "correct": found["prediction"] == found["label"], "row": row}


def _judged_outcomes(table: Table, *more: str) -> dict[str, np.ndarray]:
    """The same of a table that says itself what is right, perhaps in part."""
    _, kept = table_scores(table)
    found = columns(table, "confidence", "correct", *row_scores(table), *more)
    return {**{name: values[kept] for name, values in found.items()}, "row": np.flatnonzero(kept)}


def select(found: Mapping[str, np.ndarray], mask: np.ndarray) -> dict[str, np.ndarray]:
    """The rows of `found` where `mask` holds."""
    return {name: values[mask] for name, values in found.items()}


def scores(found: Mapping[str, np.ndarray], *, bins: int = 15) -> dict[str, Any]:
    """[`~hf_moecal.metrics.calibration_report`] of what [`outcomes`] returned, as plain numbers."""
    given = ("probs",) if "probs" in found else ("confidence", "correct", *({"nll", "brier"} & set(found)))
    report = calibration_report(
        found["label"] if "probs" in found else None,
        **{name: found[name] for name in given},
        sample_weight=found.get("sample_weight"),
        bins=bins,
    )
    return {name: plain(report.get(name)) for name in SCORES}


def plain(value: Any) -> Any:
    """Numpy numbers and arrays as Python's own, nan as `None`."""
    if isinstance(value, (list, tuple, np.ndarray)):
        return [plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not np.isfinite(value) else value


def reliability(table: Table, *, bins: int = 15) -> dict[str, Any]:
    """The data of a reliability diagram: accuracy and confidence per bin, each accuracy with its 95 % interval.

    Args:
        table: predictions table with `label` and `probs` or `logits`, or with `label`, `prediction` and `confidence`.
        bins: number of equal-width, right-closed bins.

    Returns:
        `edges` [bins + 1]; `count`, `confidence`, `accuracy`, `low`, `high` [bins], `None` in an empty bin (see
        [`~hf_moecal.metrics.reliability_bins`]); and `scores`, the figures of
        [`~hf_moecal.metrics.calibration_report`].

    Raises:
        ValueError: a needed column is missing, or no row has a label.

    Example:

    ```python
    >>> from hf_moecal.report import reliability
    >>> data = reliability({"label": [0, 0, 1], "probs": [[0.85, 0.15]] * 3}, bins=10)
    >>> data["count"][8], round(data["accuracy"][8], 3), round(data["confidence"][8], 3)
    (3, 0.667, 0.85)

    ```
    """
    return diagram(outcomes(table), bins=bins)


def diagram(found: Mapping[str, np.ndarray], *, bins: int = 15) -> dict[str, Any]:
    """[`reliability`] of what [`outcomes`] returned."""
    binned = plain(
        reliability_bins(found["confidence"], found["correct"], bins=bins, sample_weight=found.get("sample_weight"))
    )
    low, high = binned.pop("band_low"), binned.pop("band_high")
    return {**binned, "low": low, "high": high, "scores": scores(found, bins=bins)}


def collect(
    tables: Mapping[str, Table],
    *,
    title: str,
    hard: str | None = None,
    bins: int = 15,
) -> dict[str, Any]:
    """Everything a report shows, per evaluation set x subset x method.

    Args:
        tables: method -> predictions table; the `group` column names the evaluation set of each row (without it
            there is one set, "all").
        title: title of the report.
        hard: boolean column that marks the hard subset of each set, or `None`.
        bins: number of bins.

    Returns:
        `title`, `bins`, `hard`, and `rows`: dictionaries with `set`, `subset` ("all" or "hard"), `method`, the scores,
        `miscalibrated` (beyond chance, corrected for the sets and subsets of the method; `worst` is the worst of
        them), and `diagram`, the bins of the reliability diagram (`None` where the subset is empty).

    Raises:
        ValueError: there is no table, or a table lacks a needed column.
    """
    if not tables:
        raise ValueError("A report needs at least one predictions table, got none; pass {method name: table}.")
    rows = []
    for method, table in tables.items():
        more = [name for name in ("group", hard) if name and (name == hard or name in names(table))]
        found = outcomes(table, *more)
        sets = found.get("group", np.full(len(found["row"]), "all"))
        for name in dict.fromkeys(sets.tolist()):
            for subset in ("all", "hard") if hard else ("all",):
                mask = (sets == name) & (found[hard].astype(bool) if subset == "hard" else True)
                data = diagram(select(found, mask), bins=bins) if mask.any() else None
                figures = data.pop("scores") if data else {**dict.fromkeys(SCORES), "n": 0}
                rows.append({"set": str(name), "subset": subset, "method": method, **figures, "diagram": data})
    order = {key: i for i, key in enumerate(dict.fromkeys(row["set"] for row in rows))}
    rows.sort(key=lambda row: (row["subset"] == "hard", order[row["set"]]))
    for method in tables:
        mine = {i: row for i, row in enumerate(rows) if row["method"] == method}
        certain = miscalibrated({i: row for i, row in mine.items() if row["n"]})
        for i, row in mine.items():
            row |= {"miscalibrated": i in certain, "worst": certain[:1] == [i]}
    return {"title": title, "bins": bins, "hard": hard, "rows": rows}
