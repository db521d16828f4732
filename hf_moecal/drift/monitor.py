"""Watches a log of predictions window by window: tests, label-free estimates, alarms, and a state that survives a
kill."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..table import read_table
from .late_labels import label_line, score_labels
from .log_checks import Piece
from .log_reader import STDIN, read_log
from .logs import read_reference
from .monitor_files import MonitorFiles
from .window import Window, window_seconds
from .windows import WindowStream, reference_outcome


logger = logging.getLogger(__name__)


@dataclass
class MonitorResult:
    """What a call of [`monitor`] found.

    Args:
        windows: the windows closed by this call.
        open_sequences: sequences in the window that is still open (kept in the state).
        totals: `windows`, `drifted`, `rows` and `rejected` (reason -> rows), over all calls with the same state.
        correlation: per feature how neighbouring rows of the reference are correlated, where they are and no column
            names their sequence: `lag1`, and `rows_per_observation`, how many rows are worth one independent row.
        labelled: what [`~hf_moecal.drift.late_labels.score_labels`] found, where labels were given.
    """

    windows: list[Window] = field(default_factory=list)
    open_sequences: int = 0
    totals: dict[str, Any] = field(default_factory=dict)
    correlation: dict[str, dict[str, float]] = field(default_factory=dict)
    labelled: dict[str, Any] | None = None

    @property
    def exit_code(self) -> int:
        """1 if a window of this call, or what the labels showed, drifted; else 0. (Bad input raises: 2 in the
        shell.)"""
        return int(any(window.drift for window in self.windows) or bool(self.labelled and self.labelled["drift"]))

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "exit_code": self.exit_code,
            "windows": [window.to_dict() for window in self.windows],
            "open_sequences": self.open_sequences,
            "totals": self.totals,
            "correlation": self.correlation,
            "labelled": self.labelled,
        }


def monitor(
    reference: Any,
    current: Any,
    *,
    window: int | str | None = None,
    features: Sequence[str] = (),
    sequence: str | None = None,
    sequence_span: int = 10_000,
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
        window: sequences per window; or a time, as in `"1h"` (units s, min, h, d; from midnight UTC), by the column
            `time` of the log (ISO 8601, or seconds since 1970); `None` makes the whole log one window.
        features: further columns to watch, numbers or categories, besides `confidence`, `routing_entropy`,
            `routing_margin`, `disagreement`, `prediction` and `expert_ids`.
        sequence: column that names the sequence of a row (its request, conversation or user), where the log has
            several rows of one, wherever they fall: each is one observation. Without it the correlation of rows that
            follow each other is estimated, from the reference (if its rows are in the order of their log) and from the
            windows of the log so far (from the ninth on).
        sequence_span: rows of the log within which a sequence gathers its rows, counted from its first; it is tested
            then, and later rows of it are a new one. At least as many as lie between the ends of most sequences.
        num_experts: experts per layer; by default one more than the largest id of the reference.
        alpha: chance of a false alarm per window, over all its features.
        correction: `"holm"` or `"benjamini-hochberg"`.
        minimum_effect: least difference in probability, in [0, 1], that counts as drift.
        labels: table, or its path, with `id` and `label`, for the true calibration of the rows that they join.
        output_dir: folder for `windows.jsonl`, `rejected.jsonl` (bad rows with the reason) and `metrics.prom`; lines
            of earlier calls stay.
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
    timed = window_seconds(window) is not None
    if window is None and (state is not None or follow is not None):
        raise ValueError(
            "A log that is followed, or read on from a state, has no end, so one window of all of it would never be "
            "tested; give `window`: a number of sequences, or a time as in '1h'."
        )
    if sequence_span < 1:
        raise ValueError(f"sequence_span is a number of rows, at least 1, got {sequence_span}.")
    if labels is not None and str(current) == STDIN:
        raise ValueError("Standard input cannot be read again to join labels; write the log to a file.")
    how = {"features": features, "sequence": sequence, "num_experts": num_experts, "timed": timed}
    schema, rows = read_reference(read_table(reference) if isinstance(reference, (str, Path)) else reference, **how)
    settings: dict[str, Any] = {"alpha": alpha, "correction": correction, "minimum_effect": minimum_effect}
    stream = WindowStream(schema, rows, size=window, span=sequence_span, **settings)
    outcome = reference_outcome(schema, rows)
    if labels is not None and outcome is None:
        raise ValueError("Labels can be compared only with a labelled reference; add a `label` column to it.")
    watch = _Watch(stream, MonitorFiles(output_dir, state), on_window)
    watch.resume({**settings, "window": window, "sequence": sequence, "sequence_span": sequence_span})
    try:
        while True:
            for piece in read_log(current, schema, position=watch.position, growing=bool(state or follow)):
                watch.consume(piece)
            if follow is None or str(current) == STDIN:
                break
            time.sleep(follow)
    except KeyboardInterrupt:
        logger.info("interrupted; the open window is %s", "kept in the state" if state else "dropped")
    if state is None and (follow is None or str(current) == STDIN):
        watch.finish()
    result = watch.result
    result.open_sequences = stream.open_sequences
    if labels is not None:
        size = window if isinstance(window, int) else None
        by = {"window": size, "sequence": sequence, "alpha": alpha, "correction": correction}
        result.labelled = score_labels(outcome, current, labels, **by)
        logger.log(logging.WARNING if result.labelled["drift"] else logging.INFO, "%s", label_line(result.labelled))
        watch.write_metrics()
    return result


class _Watch:
    """A stream of windows, its files, and what was found so far."""

    def __init__(self, stream: WindowStream, files: MonitorFiles, on_window: Callable[[Window], None] | None) -> None:
        self.stream, self.files, self.on_window = stream, files, on_window
        totals = {"windows": 0, "drifted": 0, "rows": 0, "rejected": Counter()}
        self.result = MonitorResult(totals=totals, correlation=stream.detector.correlations())
        self.position: dict[str, Any] = {}
        self.last: dict[str, Any] | None = None
        self.warned = bool(self.result.correlation)
        if stream.schema.sequence is None:
            self._say_correlation()

    def _say_correlation(self) -> None:
        for name, found in self.result.correlation.items():
            logger.warning(
                "%s: rows that follow each other in the reference are correlated (%.2f at lag 1); %.1f rows count as "
                "one observation. Name the column of their conversation or user in `sequence` for sharper tests.",
                name,
                found["lag1"],
                found["rows_per_observation"],
            )
        if not self.result.correlation:
            logger.info(
                "rows that follow each other in the reference are not correlated; if it is not in the order of its "
                "log, the first 8 windows of a correlated log may alarm without drift: name its `sequence` column"
            )

    def _warn_of_correlation(self) -> None:
        found = {} if self.warned else self.stream.detector.learnt()
        if found:
            self.warned = True
            logger.warning(
                "rows that follow each other in the log are correlated, those of the reference are not (%s rows count "
                "as one observation from now on; alarms of earlier windows may be false): name the column of their "
                "conversation or user in `sequence`",
                ", ".join(f"{name}: {rows:.1f}" for name, rows in found.items()),
            )

    def resume(self, settings: dict[str, Any]) -> None:
        saved = self.files.resume(self.stream.fingerprint(settings))
        if saved is None:
            self.save()  # from here on, lines that no state counts are cut off
            return
        plain, arrays = saved
        self.stream.load(plain["stream"], arrays)
        self.position, self.last = plain["position"], plain["last"]
        self.result.totals.update({**plain["totals"], "rejected": Counter(plain["totals"]["rejected"])})

    def save(self) -> None:
        plain, arrays = self.stream.state()
        totals = self.result.totals
        self.files.save({"stream": plain, "totals": totals, "position": self.position, "last": self.last}, arrays)

    def consume(self, piece: Piece) -> None:
        if piece.rejected:
            first = piece.rejected[0]
            self.result.totals["rejected"].update(row.reason for row in piece.rejected)
            self.files.set_aside(piece.rejected)
            logger.warning("%s: set aside %d rows, first: %s", piece.source, len(piece.rejected), first.detail)
        for closed in self.stream.add(piece.rows, piece.places):
            self._record(closed)
        if piece.rejected:
            self.write_metrics()
        self.position[piece.source] = piece.position
        self.save()

    def finish(self) -> None:
        for closed in self.stream.finish():
            self._record(closed)
        if not self.result.windows:
            rejected = dict(self.result.totals["rejected"])
            raise ValueError(f"The log has no usable row ({f'set aside: {rejected}' if rejected else 'it is empty'}).")

    def write_metrics(self) -> None:
        self.files.metrics(self.last, self.result.totals, self.result.labelled)

    def _record(self, window: Window) -> None:
        self.result.windows.append(window)
        totals = self.result.totals
        totals["windows"], totals["drifted"] = totals["windows"] + 1, totals["drifted"] + window.drift
        totals["rows"] += window.rows
        self.last = window.to_dict()
        self._warn_of_correlation()
        self.files.record(self.last)
        self.write_metrics()
        logger.log(logging.WARNING if window.drift else logging.INFO, "%s", window)
        if self.on_window:
            self.on_window(window)
