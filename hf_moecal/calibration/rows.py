"""The rows of a predictions table as calibrators read them: scores, labels, weights, each checked."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.optimize import minimize_scalar

from hf_moecal.calibration.solver import TemperatureFit, fit_temperature, row_losses
from hf_moecal.metrics.rounding import check_row_sums
from hf_moecal.table import ABSENT_LOGIT, IGNORED_LABEL, SCORINGS, columns, names


if TYPE_CHECKING:
    from datasets import Dataset

    Table = Dataset | Mapping[str, Any]

_SCORES = ("logits", "probs")
_SMALLEST = float(np.finfo(np.float32).tiny)  # a probability of zero in a float32 log is at most this
_ROUNDED = 1e-9  # a table with zeros and nothing between them and this has been rounded
_LARGEST_FLOOR = 1e-3  # of a table that has only zeros and ones


class Rows:
    """The rows of a predictions table (with `labelled` those that have a label), columns read when asked for."""

    def __init__(self, table: Table, *, labelled: bool, zero: float | None = None) -> None:
        self.table = table
        self.zero = zero
        """What a probability of zero is taken for; found in a fit where labels have one."""
        self.start: float | None = None  # a temperature that is near the best
        self.keep: np.ndarray | slice = slice(None)
        if labelled:
            labels = _labels(table)
            self.keep = labels != IGNORED_LABEL
            self.labels = labels[self.keep]
            if not len(self.labels):
                raise ValueError(
                    f"The predictions table has no labelled row (all of its {len(labels)} labels are "
                    f"{IGNORED_LABEL}); a calibrator is fitted on rows with a 'label'."
                )
            self._check_range()

    def __len__(self) -> int:
        return len(self.logits)

    def part(self, index: np.ndarray | slice) -> Rows:
        """Some of these labelled rows, which are not read and checked again."""
        part = object.__new__(Rows)
        part.table = {name: self.column(name)[index] for name in names(self.table) if name not in _SCORES}
        part.keep, part.start = slice(None), self.start
        part.labels, part.logits, part.zero = self.labels[index], self.logits[index], self.zero
        part.labels_on_zero = 0  # said of the whole
        return part

    def column(self, name: str) -> np.ndarray:
        """A column of these rows."""
        return columns(self.table, name)[name][self.keep]

    @cached_property
    def logits(self) -> np.ndarray:
        """Scores before softmax `[n, C]`: the column `logits`, else the logarithm of `probs`."""
        found = read_logits(self.table, self.zero)[self.keep]
        if not hasattr(self, "labels") or not self.labels_on_zero:
            return found
        self.zero, found = _likeliest_zero(found, self.column("probs") <= 0, self.labels)
        return found

    @cached_property
    def weights(self) -> np.ndarray | None:
        """How many rows each row counts as, `[n]`, from the column `sample_weight`; `None` where there is none.

        Raises:
            ValueError: a weight is negative or not finite, or all are zero.
        """
        if "sample_weight" not in names(self.table):
            return None
        weights = self.column("sample_weight")
        numbers = weights.ndim == 1 and weights.dtype.kind in "fiu"
        if not numbers or not np.isfinite(weights).all() or (weights < 0).any() or not (weights > 0).any():
            raise ValueError(
                "Column 'sample_weight' must hold one finite number per row, none negative and not all of them zero; "
                "a row of weight 2 counts as two rows."
            )
        return weights.astype(np.float64)

    @property
    def total(self) -> float:
        """The number of rows, each counted by its weight."""
        return float(len(self)) if self.weights is None else float(self.weights.sum())

    @cached_property
    def class_counts(self) -> np.ndarray:
        """Labelled rows of each class, `[C]`; those of weight zero are none."""
        counted = self.labels if self.weights is None else self.labels[self.weights > 0]
        return np.bincount(counted, minlength=self.logits.shape[1])

    @cached_property
    def plain_fit(self) -> TemperatureFit:
        """The best temperature, from which many a calibrator starts."""
        return fit_temperature(self.logits, self.labels, weights=self.weights, start=self.start)

    @cached_property
    def labels_on_zero(self) -> int:
        """How many labels have a probability of zero in a column `probs`, as rounding makes it."""
        if "logits" in names(self.table):
            return 0
        return int((np.take_along_axis(self.column("probs"), self.labels[:, None], axis=1) <= 0).sum())

    def _check_range(self) -> None:
        classes = self.logits.shape[1]
        wrong = self.labels[(self.labels < 0) | (self.labels >= classes)]
        if len(wrong):
            raise ValueError(
                f"Label {wrong[0]} is out of range: the table has {classes} classes, so labels are 0 to "
                f"{classes - 1}, or {IGNORED_LABEL} for a row without one."
            )
        of_labels = np.take_along_axis(self.logits, self.labels[:, None], axis=1)[:, 0].astype(np.float64)
        absent = of_labels <= ABSENT_LOGIT / 2
        if absent.any():
            row = int(np.flatnonzero(absent)[0])
            raise ValueError(
                f"{int(absent.sum())} labels (the first in labelled row {row}: class {self.labels[row]}) are of a "
                "class whose logit says that it is impossible (-inf, or an option that the row does not have). "
                f"Correct those labels, or set them to {IGNORED_LABEL}."
            )


def read_logits(table: Table, zero: float | None = None) -> np.ndarray:
    """`logits [n, C]` of a table, or `log(probs)` where it has only those.

    A logit of -inf, as of a masked word, becomes that of a class which the row does not have. A probability of zero is
    taken for `zero`, by default for half the smallest one of the table where rounding has made it.

    Raises:
        ValueError: neither column is there, a value is not a finite number, or probabilities do not sum to one.
    """
    name = "logits" if "logits" in names(table) else "probs"
    values = columns(table, name)[name]
    if values.ndim != 2 or values.shape[1] < 2 or values.dtype.kind not in "fiu":
        raise ValueError(
            f"Column {name!r} must hold one number per class, [n, C] with C >= 2; got shape {values.shape} of "
            f"{values.dtype}. For a binary score p give [1 - p, p]."
        )
    if name == "logits":
        values = _without_masked(values)
    if not np.isfinite(values).all():
        row = int(np.flatnonzero(~np.isfinite(values).all(axis=1))[0])
        raise ValueError(f"Column {name!r} has a value that is not finite in row {row}; drop or repair that row.")
    if name == "logits":
        return values
    if (values < 0).any():
        raise ValueError("Column 'probs' has negative values; if these are scores before softmax, name it 'logits'.")
    check_row_sums(name, values.sum(axis=1, dtype=np.float64), values)
    return np.log(np.maximum(values, _floor(values) if zero is None else zero, dtype=np.float64))


def _without_masked(logits: np.ndarray) -> np.ndarray:
    """Logits with a finite number for -inf, where a row has another class."""
    masked = np.isneginf(logits)
    if not masked.any():
        return logits
    if masked.all(axis=1).any():
        row = int(np.flatnonzero(masked.all(axis=1))[0])
        raise ValueError(f"Column 'logits' is -inf for every class of row {row}; drop that row.")
    return np.where(masked, ABSENT_LOGIT, logits.astype(np.float64))


def _floor(probs: np.ndarray) -> float:
    """What a probability of zero may have been before it was rounded."""
    if not len(probs) or probs.min() > 0:
        return _SMALLEST
    smallest = float(np.min(probs, where=probs > 0, initial=1.0))
    return min(smallest / 2, _LARGEST_FLOOR) if smallest > _ROUNDED else _SMALLEST


def _likeliest_zero(logits: np.ndarray, zeros: np.ndarray, labels: np.ndarray) -> tuple[float, np.ndarray]:
    """What zeros that labels sit on may have been before they were rounded, and the scores with that.

    A temperature makes much of small probabilities, so a wrong guess decides it. How often labels sit on zeros says
    what they were: the value is fitted with the temperature, at most half the smallest probability of the table.
    """

    def loss(log_zero: float) -> float:
        scores = np.where(zeros, log_zero, logits)
        return float(row_losses(scores, labels, 1 / fit_temperature(scores, labels).temperature)[0].mean())

    ends = (np.log(_SMALLEST), float(logits[zeros].max()))
    found = minimize_scalar(loss, bounds=ends, method="bounded", options={"xatol": 0.02}).x
    best = min((found, ends[1]), key=loss)
    return float(np.exp(best)), np.where(zeros, best, logits)


def scoring_of(table: Table) -> str | None:
    """How the answer options of a table are scored, where its column `scoring` says so.

    Raises:
        ValueError: several ways are mixed.
    """
    found = set(columns(table, "scoring")["scoring"].tolist()) if "scoring" in names(table) else set()
    if not found & set(SCORINGS):
        return None  # a column of the user's own
    if len(found) > 1:
        raise ValueError(
            f"The table mixes options scored by {', '.join(sorted(map(str, found)))}; calibrate one scoring at a time."
        )
    return found.pop()


def _labels(table: Table) -> np.ndarray:
    labels = columns(table, "label")["label"]
    if labels.dtype.kind in "OUS" and len(labels):
        raise ValueError(
            f"Column 'label' holds text such as {str(labels[0])[:30]!r}, and a calibrator needs the number of each "
            "class in the order of the scores: [model.config.label2id[name] for name in table['label']]. "
            "(`moecal calibrate` does this where the checkpoint's config names its classes.)"
        )
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise ValueError(f"Column 'label' must hold one class number per row; got {labels.dtype} {labels.shape}.")
    return labels.astype(np.int64)
