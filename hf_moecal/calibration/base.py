"""What every calibrator shares: reading the predictions table, writing calibrated probabilities, saving, loading."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from hf_moecal.calibration.record import CalibrationRecord, read_record, write_record
from hf_moecal.metrics.inputs import check_row_sums
from hf_moecal.table import IGNORED_LABEL, columns, names


if TYPE_CHECKING:
    from datasets import Dataset
    from typing_extensions import Self

    Table = Dataset | Mapping[str, Any]

TABLE_CALIBRATOR = "moecal_table_calibrator"
"""Attribute under which a loaded model carries a calibrator that needs the routing: `predict` applies it."""

CALIBRATED = "moecal_calibrated_logits"
"""Attribute of a loaded model whose logits come calibrated: the method. `predict` says so in the column below."""
CALIBRATION = "calibration"
"""Column of a predictions table whose logits are calibrated already: by which method."""

_SMALLEST = np.finfo(np.float32).tiny  # a probability of zero in a float32 log is at most this


class Rows:
    """The labelled rows of a predictions table, columns read when they are asked for."""

    def __init__(self, table: Table, *, labelled: bool) -> None:
        self.table = table
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

    def column(self, name: str) -> np.ndarray:
        """A column of these rows."""
        return columns(self.table, name)[name][self.keep]

    @cached_property
    def logits(self) -> np.ndarray:
        """Scores before softmax `[n, C]`: the column `logits`, else the logarithm of `probs`."""
        return read_logits(self.table)[self.keep]

    def _check_range(self) -> None:
        classes = self.logits.shape[1]
        wrong = self.labels[(self.labels < 0) | (self.labels >= classes)]
        if len(wrong):
            raise ValueError(
                f"Label {wrong[0]} is out of range: the table has {classes} classes, so labels are 0 to "
                f"{classes - 1}, or {IGNORED_LABEL} for a row without one."
            )


def read_logits(table: Table) -> np.ndarray:
    """`logits [n, C]` of a table, or `log(probs)` where it has only those.

    Raises:
        ValueError: neither column is there, a value is not finite, or probabilities do not sum to one.
    """
    name = "logits" if "logits" in names(table) else "probs"
    values = columns(table, name)[name]
    if values.ndim != 2 or values.shape[1] < 2 or values.dtype.kind not in "fiu":
        raise ValueError(
            f"Column {name!r} must hold one number per class, [n, C] with C >= 2; got shape {values.shape} of "
            f"{values.dtype}. For a binary score p give [1 - p, p]."
        )
    if not np.isfinite(values).all():
        row = int(np.flatnonzero(~np.isfinite(values).all(axis=1))[0])
        raise ValueError(f"Column {name!r} has a value that is not finite in row {row}; drop or repair that row.")
    if name == "logits":
        return values
    if (values < 0).any():
        raise ValueError("Column 'probs' has negative values; if these are scores before softmax, name it 'logits'.")
    check_row_sums(name, values.sum(axis=1, dtype=np.float64), values.dtype.itemsize)
    return np.log(np.maximum(values, _SMALLEST, dtype=np.float64))


def _labels(table: Table) -> np.ndarray:
    labels = columns(table, "label")["label"]
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise ValueError(f"Column 'label' must hold one class number per row; got {labels.dtype} {labels.shape}.")
    return labels.astype(np.int64)


class Calibrator:
    """Turns a model's probabilities into better ones, fitted on a predictions table; the model is not touched.

    A subclass says its `method`, fits itself in `_fit(rows)`, gives log-probabilities in `_log_probs(rows)`, and
    reads and writes its `parameters` as JSON values.
    """

    method: ClassVar[str]
    reads: tuple[str, ...] = ()
    """Columns that it needs besides `logits` (or `probs`) and `label`."""

    warnings: tuple[str, ...] = ()
    """What the last fit had to say, one sentence each."""

    fitted: bool = False

    def fit(self, table: Table, *, training_ids: Collection[str] | None = None) -> Self:
        """Fits on the labelled rows of a predictions table; rows with label -100 are ignored.

        What it does to rows that it has not seen, [`~hf_moecal.calibration.selection.calibrate_table`] reports.

        Args:
            table: predictions with `logits` or `probs`, `label`, and the columns in `reads`.
            training_ids: ids of the rows that the model was trained on (see `hf_moecal.hub.load_training_ids`).

        Raises:
            ValueError: the table does not fit the method, or holds rows that the model was trained on.
        """
        refuse_training_rows(table, training_ids)
        rows = Rows(table, labelled=True)
        self.warnings = ()
        self._fit(rows)
        self.fitted = True
        for sentence in self.warnings:
            warnings.warn(sentence, stacklevel=2)
        return self

    def apply(self, table: Table) -> Table:
        """The same table with calibrated `probs`, `prediction` and `confidence`; other columns are kept as they are.

        `logits` too stay the model's own (a table that has only `probs` gets their logarithms), so that applying
        twice gives what applying once gives.
        """
        self.require_fitted()
        rows = Rows(table, labelled=False)
        probs = np.exp(self._log_probs(rows))
        fresh = {} if "logits" in names(table) else {"logits": rows.logits}
        return _with_columns(table, {**fresh, **_decided(probs / probs.sum(axis=1, keepdims=True))})

    def save(self, path: str | Path) -> Path:
        """Writes the method and its parameters as `calibration.json` (JSON only) and returns the file's path."""
        self.require_fitted()
        return write_record(path, CalibrationRecord(method=self.method, parameters=self.parameters()))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads what `save` wrote; called on `Calibrator` it gives whichever method the file names."""
        from hf_moecal.calibration import from_record

        calibrator = from_record(read_record(path))
        if not isinstance(calibrator, cls):
            raise ValueError(
                f"{Path(path).name!r} holds method {calibrator.method!r}, not {cls.method!r}; "
                "use Calibrator.load to take any."
            )
        return calibrator

    def require_fitted(self) -> None:
        """Raises when there are no parameters yet."""
        if not self.fitted:
            raise ValueError(f"This {type(self).__name__} has no parameters yet: call fit(table) or load(path).")

    def parameters(self) -> dict[str, Any]:
        """The fitted parameters as JSON values."""
        raise NotImplementedError

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, Any]) -> Self:
        """A fitted calibrator from checked parameters."""
        raise NotImplementedError

    def _fit(self, rows: Rows) -> None:
        raise NotImplementedError

    def _log_probs(self, rows: Rows) -> np.ndarray:
        raise NotImplementedError

    def _warn(self, sentence: str) -> None:
        self.warnings = (*self.warnings, sentence)


def refuse_training_rows(table: Table, training_ids: Collection[str] | None) -> None:
    """Raises when rows of the table were in the training data.

    Only text ids are compared: a number usually is a row's position, and position 0 exists in every file.
    """
    if training_ids is None or "id" not in names(table):
        return
    seen = [key for key in columns(table, "id")["id"].tolist() if isinstance(key, str) and key in training_ids]
    if seen:
        raise ValueError(
            f"{len(seen)} rows of the table (such as id {seen[0]!r}) are in the model's training data, on which it is "
            "more confident than it should be on new data; fit on rows that it was not trained on."
        )


def _decided(probs: np.ndarray) -> dict[str, np.ndarray]:
    return {"probs": probs, "prediction": probs.argmax(axis=1), "confidence": probs.max(axis=1)}


def _with_columns(table: Table, fresh: Mapping[str, np.ndarray]) -> Table:
    if isinstance(table, Mapping):
        return {**table, **fresh}
    order = list(dict.fromkeys([*table.column_names, *fresh]))
    table = table.remove_columns([name for name in fresh if name in table.column_names])
    for name, values in fresh.items():
        table = table.add_column(name, _arrow_lists(values) if values.ndim == 2 else values)
    return table.select_columns(order)


def _arrow_lists(values: np.ndarray) -> Any:
    import pyarrow as pa

    offsets = np.arange(len(values) + 1, dtype=np.int64) * values.shape[1]
    return pa.LargeListArray.from_arrays(offsets, values.ravel())
