"""Fills windows with sequences, in the order in which these begin, and tests each window when it is full."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from scipy import sparse

from ..table import IGNORED_LABEL
from .count_test import compare_counts
from .feature import FeatureDrift
from .label_free import LabelFreeEstimate
from .logs import Schema, row_features
from .sequences import Gatherer, Sequences, clustering
from .statistics import DriftDetector
from .window import Window, iso, window_seconds


logger = logging.getLogger(__name__)

# Share of rows set aside from which a window alarms: the reference has none.
MAX_REJECTED = 0.05
# Ids by which repeated sequences of one window are known; those beyond are taken for distinct.
MAX_KEYS = 1_000_000


class WindowStream:
    """Fills windows from checked rows and tests each when it is full.

    Args:
        schema: what the rows hold.
        reference: rows of the reference, with `label` for the label-free estimate.
        size: sequences per window, a time as in `"1h"`, or `None` for one window.
        span: rows of the log within which a sequence gathers its rows.
        settings: `alpha`, `correction`, `minimum_effect` of [`~hf_moecal.drift.statistics.DriftDetector`].
    """

    def __init__(
        self,
        schema: Schema,
        reference: Mapping[str, np.ndarray],
        *,
        size: int | str | None = None,
        span: int = 10_000,
        **settings: Any,
    ) -> None:
        self.schema, self.seconds = schema, window_seconds(size)
        self.size = size if isinstance(size, int) else None
        self.whole = size is None
        outcome = reference_outcome(schema, reference)
        self.estimate = LabelFreeEstimate(outcome) if outcome else None
        gatherer = Gatherer(schema, span=span)
        features, n = row_features(reference, schema), len(reference[schema.needed[0]])
        parts = [*gatherer.add(reference, features, np.arange(n), n), *gatherer.finish()]
        means, self.reference_rows = _joined([part.means(features) for part in parts]), n
        self.clustering = clustering(np.concatenate([part.key for part in parts])) if schema.sequence else 1.0
        self.detector = DriftDetector(
            means,
            categories=schema.categories,
            clustering=self.clustering,
            correlated=schema.sequence is None,
            **settings,
        )
        self.gatherer, self.row, self.index, self.slot = Gatherer(schema, span=span), 0, 0, -1
        self.pending = np.zeros(0, np.int64)  # rows set aside that no window has counted yet
        self._reset()

    def _reset(self) -> None:
        self.counts = {"sequences": 0, "rows": 0, "rejected": 0}
        self.place: dict[str, Any] = dict.fromkeys(("first_id", "last_id", "first_time", "last_time"))
        self.keys = np.zeros(0, np.uint64)

    @property
    def open_sequences(self) -> int:
        """Sequences in the open window, and those that are not closed yet."""
        return self.counts["sequences"] + (len(self.gatherer.open) if self.gatherer.open is not None else 0)

    def add(self, rows: Mapping[str, np.ndarray], rejected: np.ndarray | None = None) -> Iterator[Window]:
        """Adds the next rows of the log; yields each window that they fill.

        Args:
            rows: checked rows.
            rejected: places of the rows that were set aside, among all of these rows.
        """
        rejected = np.zeros(0, np.int64) if rejected is None else rejected
        total = len(rows[self.schema.needed[0]]) + len(rejected)
        places = np.setdiff1d(np.arange(total), rejected) + self.row
        self.pending = np.append(self.pending, rejected + self.row)
        self.row += total
        features = row_features(rows, self.schema)
        if self.estimate:
            features |= {f"estimate/{key}": values for key, values in self.estimate.cells(rows).items()}
        for closed in self.gatherer.add(rows, features, places, self.row):
            yield from self._fill(closed)
        yield from self._fill(None)

    def finish(self) -> Iterator[Window]:
        """Tests what is left."""
        for closed in self.gatherer.finish():
            yield from self._fill(closed)
        yield from self._fill(None)
        if self.counts["sequences"]:
            yield self._close(complete=self.whole)

    def _fill(self, closed: Sequences | None) -> Iterator[Window]:
        """Adds closed sequences, and the rows set aside before them; without any, all that none can come before."""
        opened = self.gatherer.open
        horizon = int(opened.first[0]) if opened is not None and len(opened) else self.row
        first = closed.first if closed is not None else np.zeros(0, np.int64)
        if closed is not None:
            horizon = min(horizon, int(first[-1]) + 1) if len(first) else 0
        gone, self.pending = self.pending[self.pending < horizon], self.pending[self.pending >= horizon]
        slots = self._slots(closed) if closed is not None and self.seconds else None
        while True:
            cut, full = self._cut(first, gone, slots)
            taken, lost = int(np.searchsorted(first, cut)), int(np.searchsorted(gone, cut))
            if taken:
                self._take(closed[:taken])
            self.counts["rejected"] += lost
            if slots is not None and taken:
                self.slot = int(slots[taken - 1])
            if not full:
                return
            yield self._close(complete=True)
            if slots is not None:
                slots = slots[taken:]
                self.slot = int(slots[0])
            first, gone, closed = first[taken:], gone[lost:], closed[taken:] if closed is not None else None

    def _slots(self, closed: Sequences) -> np.ndarray:
        """Number of the time window of each sequence; late ones go into the window that is open."""
        return np.maximum.accumulate(np.maximum((closed.time // self.seconds).astype(np.int64), self.slot))

    def _cut(self, first: np.ndarray, gone: np.ndarray, slots: np.ndarray | None) -> tuple[float, bool]:
        """Row of the log before which the open window ends, and whether it ends here."""
        if slots is not None and len(slots):
            begun = self.slot if self.slot >= 0 else int(slots[0])
            after = int(np.searchsorted(slots, begun, "right"))
            return (float(first[after]), True) if after < len(slots) else (np.inf, False)
        if self.size is None:
            return np.inf, False
        ends = [
            int(places[self.size - counted - 1]) + 1
            for places, counted in ((first, self.counts["sequences"]), (gone, self.counts["rejected"]))
            if len(places) >= self.size - counted
        ]
        return (min(ends), True) if ends else (np.inf, False)

    def _take(self, part: Sequences) -> None:
        self.detector.update(part.means(self.detector.tests))
        if self.estimate:
            self.estimate.update({key: part.sums[f"estimate/{key}"] for key in self.estimate.window})
        self.counts["sequences"] += len(part)
        self.counts["rows"] += int(part.rows.sum())
        if self.schema.sequence and len(self.keys) < MAX_KEYS:
            self.keys = np.append(self.keys, part.key)
        begun = self.place["first_id"] is not None
        self.place["last_id"] = str(part.name[-1])
        self.place["first_id"] = self.place["first_id"] if begun else str(part.name[0])
        if not np.isnan(part.time).all():
            low, high = float(np.nanmin(part.time)), float(np.nanmax(part.time))
            before = (self.place["first_time"], self.place["last_time"])
            self.place["first_time"] = low if before[0] is None else min(low, before[0])
            self.place["last_time"] = high if before[1] is None else max(high, before[1])

    def _close(self, *, complete: bool) -> Window:
        counts, place = self.counts, self.place
        features = []
        if counts["sequences"]:
            repeated = clustering(self.keys)
            if repeated > max(1.5, 1.5 * self.clustering):
                logger.warning(
                    "window %d: ids come again after their sequence was closed, so it is worth %d observations; "
                    "raise sequence_span",
                    self.index,
                    counts["sequences"] / repeated,
                )
            features = self.detector.close(clustering=repeated)
        features.append(self._rejected())
        features.sort(key=lambda feature: not feature.drift)
        estimate = self.estimate.result() if self.estimate and counts["sequences"] else None
        named = {name: place[name] or None for name in ("first_id", "last_id")}
        times = {name: iso(place[name]) for name in ("first_time", "last_time")}
        window = Window(
            self.index, **counts, complete=complete, **named, **times, features=features, estimate=estimate
        )
        if self.estimate:
            self.estimate.reset()
        self.index += 1
        self._reset()
        return window

    def _rejected(self) -> FeatureDrift:
        lost, rows = self.counts["rejected"], self.counts["rows"] + self.counts["rejected"]
        p = float(compare_counts(np.array([float(lost)]), np.zeros(1), rows, self.reference_rows)[0]) if lost else 1.0
        share = lost / rows if rows else 0.0
        drift = share >= MAX_REJECTED and p <= self.detector.alpha
        return FeatureDrift(
            "rejected",
            "share",
            statistic=share,
            effect=float(lost > 0),
            shift=None,
            psi=None,
            p_value=p,
            effective_n=rows,
            category="rows set aside",
            reference_share=0.0,
            p_adjusted=p,
            drift=drift,
        )

    def fingerprint(self, settings: Mapping[str, Any]) -> str:
        """Hash of the reference and the settings."""
        digest = hashlib.sha256(json.dumps([settings, self.schema.needed], sort_keys=True).encode())
        for test in self.detector.tests.values():
            for values in test.fixed():
                digest.update(np.ascontiguousarray(values).tobytes())
        return digest.hexdigest()

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """The open window and the open sequences as plain data and arrays."""
        plain = {name: getattr(self, name) for name in ("index", "row", "slot", "counts", "place")}
        arrays = {"keys": self.keys, "pending": self.pending}
        if self.estimate:
            arrays |= {f"estimate/{key}": values for key, values in self.estimate.window.items()}
        if self.gatherer.open is not None:
            arrays |= {f"open/{key}": values for key, values in self.gatherer.open.arrays().items()}
        return plain, {**arrays, **{f"test/{key}": values for key, values in self.detector.arrays().items()}}

    def load(self, plain: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
        """Continues from what [`state`] gave."""
        for name, value in plain.items():
            setattr(self, name, value)
        self.keys, self.pending = arrays["keys"], arrays["pending"]
        opened = {key.removeprefix("open/"): values for key, values in arrays.items() if key.startswith("open/")}
        self.gatherer.open = Sequences.of(opened) if opened else None
        tests = {key.removeprefix("test/"): values for key, values in arrays.items() if key.startswith("test/")}
        self.detector.load(tests)
        if self.estimate:
            self.estimate.window = {key: np.array(arrays[f"estimate/{key}"]) for key in self.estimate.window}


def _joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        name: sparse.csr_array(sparse.vstack([part[name] for part in parts], format="csr"))
        if sparse.issparse(values)
        else np.concatenate([part[name] for part in parts])
        for name, values in parts[0].items()
    }


def reference_outcome(schema: Schema, reference: Mapping[str, np.ndarray]) -> dict[str, np.ndarray] | None:
    """Numbers, `correct` and `sequence` of the labelled rows of a reference; `None` where it has no labels."""
    if "label" not in reference or "prediction" not in schema.categories or "confidence" not in reference:
        return None
    labelled = reference["label"] != IGNORED_LABEL
    if not labelled.any():
        return None
    values = np.asarray([*schema.categories["prediction"], IGNORED_LABEL])
    correct = values[reference["prediction"]] == reference["label"]
    kept = {**{name: reference[name] for name in schema.numbers}, "correct": correct}
    if schema.sequence:
        kept["sequence"] = reference[schema.sequence].astype(str)
    return {name: values[labelled] for name, values in kept.items()}
