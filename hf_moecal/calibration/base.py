"""What every calibrator shares: reading the predictions table, writing calibrated probabilities, saving, loading."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from hf_moecal.calibration.record import CalibrationRecord, read_record, write_record
from hf_moecal.calibration.rows import Rows, scoring_of
from hf_moecal.table import columns, names


if TYPE_CHECKING:
    from datasets import Dataset
    from typing_extensions import Self

    Table = Dataset | Mapping[str, Any]

TABLE_CALIBRATOR = "moecal_table_calibrator"
"""Attribute under which a loaded model carries its calibrator, which `predict` applies to the table."""

TOKEN_SCORING = "label_word"
"""The one way of scoring options in which a temperature of their scores is one of the model's own logits."""

CALIBRATION = "calibration"
"""Column of a predictions table whose probabilities are calibrated already: by which method."""

_left_to_table: ContextVar[frozenset[int]] = ContextVar("left_to_table", default=frozenset())


@contextmanager
def left_to_table(model: Any) -> Iterator[Calibrator | None]:
    """Within the block, and in this thread, a loaded model gives its own logits: its calibrator works on the table."""
    before = _left_to_table.set(_left_to_table.get() | {id(model)})
    try:
        yield getattr(model, TABLE_CALIBRATOR, None)
    finally:
        _left_to_table.reset(before)


def is_left_to_table(model: Any) -> bool:
    """Whether a forward now is inside [`left_to_table`]."""
    return id(model) in _left_to_table.get()


class Calibrator:
    """Turns a model's probabilities into better ones, fitted on a predictions table; the model is not touched.

    A subclass says its `method`, fits itself in `_fit(rows)`, gives log-probabilities in `_log_probs(rows)`, and
    reads and writes its `parameters` as JSON values.

    Rows may have a weight, in a column `sample_weight` (such as importance weights before a shift): a row of weight 2
    counts as two rows, except in errors and intervals, for which it is one.
    """

    method: ClassVar[str]
    reads: tuple[str, ...] = ()
    """Columns that it needs besides `logits` (or `probs`) and `label`."""

    warnings: tuple[str, ...] = ()
    """What the last fit had to say, one sentence each."""

    fitted: bool = False

    zero: float | None = None
    """What probabilities of zero were taken for in the fit, where labels had one."""

    scoring: str | None = None
    """How the options were scored that it was fitted on; `None` for the model's own logits (classes, tokens)."""

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
        self.fit_rows(Rows(table, labelled=True))
        for sentence in self.warnings:
            warnings.warn(sentence, stacklevel=2)
        return self

    def fit_rows(self, rows: Rows) -> Self:
        """Fits on rows that are read and checked already; what it has to say stays in `warnings`."""
        self.warnings, self.scoring, self.zero = (), scoring_of(rows.table), rows.zero
        if misfit := self.misfit(rows):
            self._warn(misfit)
        if rows.labels_on_zero:
            self._warn(
                f"{rows.labels_on_zero} of {len(rows)} labels have a probability of zero, as rounding makes it; "
                f"zeros are taken for {rows.zero:.2g}, which fits best. Fit on logits, or on exact probabilities."
            )
        self._fit(rows)
        self.fitted = True
        return self

    def misfit(self, rows: Rows) -> str | None:
        """Why the rows do not bear the method, if they do not: then `"auto"` does not choose it."""
        return None

    def log_probs(self, rows: Rows) -> np.ndarray:
        """Calibrated log-probabilities `[n, C]`."""
        self.require_fitted()
        return self._log_probs(rows)

    def apply(self, table: Table) -> Table:
        """The same table with calibrated `probs`, `prediction` and `confidence`; other columns are kept as they are.

        `logits` too stay the model's own (a table that has only `probs` gets their logarithms), so that applying
        twice gives what applying once gives.

        Raises:
            ValueError: it is not fitted, or the table's options are scored in another way than those of the fit.
        """
        self.require_fitted()
        self.check_scoring(scoring_of(table))
        rows = Rows(table, labelled=False, zero=self.zero)
        probs = np.exp(self._log_probs(rows))
        fresh = {} if "logits" in names(table) else {"logits": rows.logits}
        return with_columns(table, {**fresh, **_decided(probs / probs.sum(axis=1, keepdims=True))})

    def save(self, path: str | Path) -> Path:
        """Writes the method and its parameters as `calibration.json` (JSON only) and returns the file's path."""
        self.require_fitted()
        of_scores = {"scoring": self.scoring, "zero": self.zero}
        record = CalibrationRecord(method=self.method, parameters=self.parameters(), **of_scores)
        return write_record(path, record)

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

    def check_scoring(self, scoring: str | None) -> None:
        """Raises when options are scored in another way than those that it was fitted on, as far as both are known."""
        if None not in (scoring, self.scoring) and scoring != self.scoring and self.method != "none":
            raise ValueError(
                f"This calibration was fitted on options scored by {self.scoring!r}, and these are scored by "
                f"{scoring!r}: other numbers, which need a calibration of their own. Predict with "
                f"scoring={self.scoring!r}, or fit again."
            )

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


def with_columns(table: Table, fresh: Mapping[str, np.ndarray]) -> Table:
    """The table with these columns, in place of its own of the same names."""
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
