"""Watches a log of predictions window by window: tests, label-free estimates, alarms, and a state that survives a
kill."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..table import IGNORED_LABEL, read_table
from .label_free import LabelFreeEstimate
from .late_labels import score_labels
from .log_reader import STDIN, read_log
from .logs import Schema, read_reference, sequence_starts, to_sequences
from .monitor_files import MonitorFiles
from .statistics import DriftDetector, FeatureDrift


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Window:
    """One tested window.

    Args:
        index: its number, from 0.
        sequences: observations in it.
        rows: rows in it (more than `sequences` where a sequence has several).
        complete: `False` for what was left over at the end of a log.
        drift: whether any feature drifted.
        features: one [`~hf_moecal.drift.statistics.FeatureDrift`] per feature, drifted and largest first.
        estimate: label-free accuracy and calibration (see [`~hf_moecal.drift.label_free`]); `None` without a labelled
        reference.
    """

    index: int
    sequences: int
    rows: int
    complete: bool
    features: list[FeatureDrift]
    estimate: dict[str, float] | None

    @property
    def drift(self) -> bool:
        return any(feature.drift for feature in self.features)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "index": self.index,
            "sequences": self.sequences,
            "rows": self.rows,
            "complete": self.complete,
            "drift": self.drift,
            "features": [feature.to_dict() for feature in self.features],
            "estimate": self.estimate,
        }

    def __str__(self) -> str:
        moved = [f"{f.feature} (effect {f.effect:.3f}, p {f.p_adjusted:.1e})" for f in self.features if f.drift]
        line = f"window {self.index}: {self.sequences:,} sequences, " + (
            f"DRIFT in {', '.join(moved)}" if moved else "no drift"
        )
        if self.estimate:
            e = self.estimate
            line += (
                f"; estimated accuracy {e['accuracy']:.3f} ± {1.96 * e['accuracy_se']:.3f}, gap {e['signed_gap']:+.3f}"
            )
        return line


@dataclass
class MonitorResult:
    """What a call of [`monitor`] found.

    Args:
        windows: the windows closed by this call.
        open_sequences: sequences in the window that is still open (kept in the state).
        totals: `windows`, `drifted`, `rows` and `rejected` (reason -> rows), over all calls with the same state.
        labelled: what [`~hf_moecal.drift.late_labels.score_labels`] found, where labels were given.
    """

    windows: list[Window] = field(default_factory=list)
    open_sequences: int = 0
    totals: dict[str, Any] = field(default_factory=dict)
    labelled: dict[str, Any] | None = None

    @property
    def exit_code(self) -> int:
        """1 if a window of this call, or the labelled calibration, drifted; else 0. (Bad input raises: 2 in the
        shell.)"""
        return int(
            any(window.drift for window in self.windows) or bool(self.labelled and self.labelled["drift"]["drift"])
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "exit_code": self.exit_code,
            "windows": [window.to_dict() for window in self.windows],
            "open_sequences": self.open_sequences,
            "totals": self.totals,
            "labelled": self.labelled,
        }


class WindowStream:
    """Fills windows from checked rows and tests each when it is full.

    Args:
        schema: what the rows hold.
        reference: rows of the reference, with `label` for the label-free estimate.
        size: sequences per window; `None` for one window.
        settings: `alpha`, `correction`, `minimum_effect` of [`~hf_moecal.drift.statistics.DriftDetector`].
    """

    def __init__(
        self, schema: Schema, reference: Mapping[str, np.ndarray], *, size: int | None = None, **settings: Any
    ) -> None:
        self.schema, self.size = schema, size
        self.detector = DriftDetector(to_sequences(reference, schema), **settings)
        outcome = reference_outcome(schema, reference)
        self.estimate = LabelFreeEstimate(outcome) if outcome else None
        self.index, self.sequences, self.rows = 0, 0, 0
        self.held: dict[str, np.ndarray] = {}

    def add(self, rows: Mapping[str, np.ndarray]) -> Iterator[Window]:
        """Adds rows; yields each window that they fill. The last sequence is held back: it may go on."""
        rows = {name: rows[name] for name in self.schema.needed}
        if self.held:
            rows = {name: np.concatenate([self.held[name], rows[name]]) for name in rows}
        starts = sequence_starts(rows, self.schema)
        if self.schema.sequence and len(starts):
            self.held = {name: values[starts[-1] :] for name, values in rows.items()}
            rows = {name: values[: starts[-1]] for name, values in rows.items()}
            starts = starts[:-1]
        yield from self._fill(rows, starts)

    def finish(self) -> Iterator[Window]:
        """Tests what is left."""
        if self.held:
            held, self.held = self.held, {}
            yield from self._fill(held, np.zeros(1, np.int64))
        if self.sequences:
            yield self._close(complete=self.size is None)

    def _fill(self, rows: Mapping[str, np.ndarray], starts: np.ndarray) -> Iterator[Window]:
        ends = np.append(starts, len(rows[self.schema.needed[0]]))
        done = 0
        while done < len(starts):
            take = len(starts) - done if self.size is None else min(self.size - self.sequences, len(starts) - done)
            part = {name: values[ends[done] : ends[done + take]] for name, values in rows.items()}
            self.detector.update(to_sequences(part, self.schema))
            if self.estimate:
                self.estimate.update(part)
            self.rows += int(ends[done + take] - ends[done])
            self.sequences, done = self.sequences + take, done + take
            if self.sequences == self.size:
                yield self._close(complete=True)

    def _close(self, *, complete: bool) -> Window:
        estimate = self.estimate.result() if self.estimate else None
        window = Window(self.index, self.sequences, self.rows, complete, self.detector.close(), estimate)
        if self.estimate:
            self.estimate.reset()
        self.index, self.sequences, self.rows = self.index + 1, 0, 0
        return window

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """The open window as plain data and arrays."""
        held = {name: values.tolist() for name, values in self.held.items()}
        plain = {"index": self.index, "sequences": self.sequences, "rows": self.rows, "held": held}
        estimate = self.estimate.window if self.estimate else {}
        return plain, {**self.detector.arrays(), **{f"estimate/{key}": values for key, values in estimate.items()}}

    def load(self, plain: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
        """Continues from what [`state`] gave."""
        self.index, self.sequences, self.rows = plain["index"], plain["sequences"], plain["rows"]
        self.held = {name: np.asarray(values) for name, values in plain["held"].items()}
        self.detector.load(arrays)
        if self.estimate:
            self.estimate.window = {key: np.array(arrays[f"estimate/{key}"]) for key in self.estimate.window}


def reference_outcome(schema: Schema, reference: Mapping[str, np.ndarray]) -> dict[str, np.ndarray] | None:
    """Numbers and `correct` of the labelled rows of a reference; `None` where it has no labels."""
    if "label" not in reference or "prediction" not in schema.categories or "confidence" not in reference:
        return None
    labelled = reference["label"] != IGNORED_LABEL
    if not labelled.any():
        return None
    values = np.asarray([*schema.categories["prediction"], IGNORED_LABEL])
    correct = values[reference["prediction"]] == reference["label"]
    return {
        name: values[labelled] for name, values in [*((n, reference[n]) for n in schema.numbers), ("correct", correct)]
    }


def monitor(
    reference: Any,
    current: Any,
    *,
    window: int | None = None,
    features: Sequence[str] = (),
    sequence: str | None = None,
    num_experts: int | None = None,
    alpha: float = 0.01,
    correction: str = "holm",
    minimum_effect: float = 0.1,
    labels: Any = None,
    output_dir: str | Path | None = None,
    state: str | Path | None = None,
    follow: float | None = None,
    on_window: Callable[[Window], None] | None = None,
) -> MonitorResult:
    """Compares a log with a reference, window by window.

    Args:
        reference: predictions table of a time when all was well, or its path; with labels it also gives the label-free
            estimate of accuracy and calibration.
        current: the log: a `.parquet` or `.jsonl` file, a folder of them, `"-"` for JSON lines on standard input, or a
            predictions table.
        window: sequences per window; `None` makes the whole log one window.
        features: further columns to watch, numbers or categories, besides `confidence`, `routing_entropy`,
            `routing_margin`, `disagreement`, `prediction` and `expert_ids`.
        sequence: column that names the sequence of a row, where the log has a row per token; rows of a sequence follow
            each other. Without it every row is an observation of its own.
        num_experts: experts per layer; by default one more than the largest id of the reference.
        alpha: chance of a false alarm per window, over all its features.
        correction: `"holm"` or `"benjamini-hochberg"`.
        minimum_effect: least difference in probability, in [0, 1], that counts as drift.
        labels: table, or its path, with `id` and `label`, for the true calibration of the rows that they join.
        output_dir: folder for `windows.jsonl`, `rejected.jsonl` (bad rows with the reason) and `metrics.prom`.
        state: file that keeps what was read and the open window, so that a later call goes on from there. Without it
            what is left at the end of the log is tested as a shorter window.
        follow: seconds between looks at a growing file or folder; runs until interrupted. `None` reads once.
        on_window: called with each closed window.

    Returns:
        The windows closed by this call, the totals, and `exit_code` (0 fine, 1 drift).

    Raises:
        ValueError: a setting, the reference or the log is unusable; the message names the column or the remedy.

    Example:

    ```python
    >>> import numpy as np
    >>> from hf_moecal.drift.monitor import monitor
    >>> rng = np.random.default_rng(0)
    >>> reference = {"confidence": rng.beta(8, 1, 5000), "prediction": rng.integers(0, 2, 5000)}
    >>> current = {"confidence": rng.beta(4, 1, 1000), "prediction": rng.integers(0, 2, 1000)}
    >>> result = monitor(reference, current)
    >>> result.exit_code, [feature.feature for feature in result.windows[0].features if feature.drift]
    (1, ['confidence'])

    ```
    """
    if window is not None and window < 1:
        raise ValueError(f"window is a number of sequences, at least 1, got {window}.")
    if labels is not None and str(current) == STDIN:
        raise ValueError("Standard input cannot be read again to join labels; write the log to a file.")
    table = read_table(reference) if isinstance(reference, (str, Path)) else reference
    schema, rows = read_reference(table, features=features, sequence=sequence, num_experts=num_experts)
    settings = {"alpha": alpha, "correction": correction, "minimum_effect": minimum_effect}
    stream = WindowStream(schema, rows, size=window, **settings)
    files = MonitorFiles(output_dir, state)
    result = MonitorResult(totals={"windows": 0, "drifted": 0, "rows": 0, "rejected": Counter()})
    position = files.resume(stream, result.totals, settings={**settings, "window": window, "sequence": sequence})
    try:
        while True:
            for piece in read_log(current, schema, position=position, growing=bool(state or follow)):
                _consume(piece, stream, files, result, on_window)
                position[piece.source] = piece.position
                files.save(stream, result.totals, position)
            if follow is None or str(current) == STDIN:
                break
            time.sleep(follow)
    except KeyboardInterrupt:
        logger.info("interrupted; the open window is %s", "kept in the state" if state else "dropped")
    if state is None and follow is None:
        for closed in stream.finish():
            _record(closed, files, result, on_window)
        _require_rows(result)
    result.open_sequences = stream.sequences
    if labels is not None:
        outcome = reference_outcome(schema, rows)
        if outcome is None:
            raise ValueError("Labels can be compared only with a labelled reference; add a `label` column to it.")
        result.labelled = score_labels(outcome, current, labels, alpha=alpha, minimum_effect=minimum_effect)
    return result


def _consume(piece: Any, stream: WindowStream, files: MonitorFiles, result: MonitorResult, on_window: Any) -> None:
    if piece.rejected:
        result.totals["rejected"].update(row.reason for row in piece.rejected)
        files.set_aside(piece.rejected)
        logger.warning("%s: set aside %d rows, first: %s", piece.source, len(piece.rejected), piece.rejected[0].detail)
    for closed in stream.add(piece.rows):
        _record(closed, files, result, on_window)


def _record(window: Window, files: MonitorFiles, result: MonitorResult, on_window: Any) -> None:
    result.windows.append(window)
    totals = result.totals
    totals["windows"], totals["drifted"] = totals["windows"] + 1, totals["drifted"] + window.drift
    totals["rows"] += window.rows
    files.record(window.to_dict(), totals)
    logger.log(logging.WARNING if window.drift else logging.INFO, "%s", window)
    if on_window:
        on_window(window)


def _require_rows(result: MonitorResult) -> None:
    if not result.windows:
        rejected = dict(result.totals["rejected"])
        raise ValueError(f"The log has no usable row ({f'set aside: {rejected}' if rejected else 'it is empty'}).")
