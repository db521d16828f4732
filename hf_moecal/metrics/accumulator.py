"""Streaming: batches are reduced as they come, can be merged across processes, and their order does not matter."""

from __future__ import annotations

from itertools import compress
from typing import Any

import numpy as np

from .binning import DEFAULT_BINS, STRATEGIES, equal_width, make_edges
from .groups import GroupIndex, Key, compare_groups, group_columns, name_of
from .inputs import MODES, Rows, check_choice, check_count
from .ranking import ranking_figures
from .rows import reduce_batch
from .tally import Tally


_EVERYTHING: Key = ()


class CalibrationAccumulator:
    """Collects predictions batch by batch and reports every calibration figure at the end.

    A batch is reduced to a few numbers per example, so probabilities over a large vocabulary are never kept (classwise
    mode keeps them, because it needs them all). With `fold_bins` not even these are kept: memory stays constant.

    Args:
        mode (`str`): `"top_label"`, `"classwise"` or `"positive_class"`.
        intersections (`bool`): also report every combination of two group columns.
        group_names (`list`, or `dict` of lists by column): the groups that exist. One without examples is then
            reported with `n = 0`, and any other name is an error. By default the groups are those that occur.
        fold_bins (`int`): fold examples into this many equal-width bins at once. Memory is then constant, and the
            figures that need sorting (`aurc`, `auroc`, `smooth_ece`) and equal-mass bins are not available.

    Raises:
        ValueError: an argument is not one of those above.

    Example:

    ```python
    >>> from hf_moecal.metrics import CalibrationAccumulator
    >>> first, second = CalibrationAccumulator(), CalibrationAccumulator()
    >>> first.add([0, 1], probs=[[0.9, 0.1], [0.4, 0.6]], groups=["tweets", "movies"])
    >>> second.add([1], probs=[[0.8, 0.2]], groups=["tweets"])
    >>> first.merge(second)
    >>> first.report()["groups"]["tweets"]["accuracy"]
    0.5

    ```
    """

    def __init__(
        self,
        *,
        mode: str = "top_label",
        intersections: bool = False,
        group_names: Any = None,
        fold_bins: int | None = None,
    ) -> None:
        self.mode = check_choice("mode", mode, MODES)
        self.fold_bins = None if fold_bins is None else check_count("fold_bins", fold_bins, least=1)
        self.n_ignored = 0
        self.groups = GroupIndex(group_names, intersections=intersections)
        self.rows: list[Rows] = []
        self.codes: dict[str, list[np.ndarray]] = {column: [] for column in self.groups.known}
        self.tallies: dict[Key, Tally] = {}

    def __len__(self) -> int:
        folded = self.tallies[_EVERYTHING].n if self.tallies else 0
        return folded + sum(len(rows.confidence) for rows in self.rows)

    def add(
        self,
        labels: Any = None,
        *,
        probs: Any = None,
        logits: Any = None,
        confidence: Any = None,
        correct: Any = None,
        predictions: Any = None,
        nll: Any = None,
        brier: Any = None,
        groups: Any = None,
        renormalize: bool = False,
        sample_weight: Any = None,
    ) -> None:
        """Adds one batch; the arguments are those of [`calibration_report`]. A batch that raises leaves no trace.

        Raises:
            ValueError: the batch is not usable, or its group columns differ from those of earlier batches.
        """
        given = {"probs": probs, "logits": logits, "confidence": confidence, "correct": correct}
        rows, kept = reduce_batch(
            labels,
            **given,
            predictions=predictions,
            nll=nll,
            brier=brier,
            mode=self.mode,
            renormalize=renormalize,
            sample_weight=sample_weight,
        )
        columns = group_columns(groups, len(kept))
        if not kept.all():
            columns = {name: list(compress(values, kept)) for name, values in columns.items()}
        self._append(rows, self.groups.encode(columns))
        self.n_ignored += int(len(kept) - kept.sum())

    def add_rows(self, rows: Rows) -> None:
        """Adds examples that are reduced already, without groups."""
        self._append(rows, {})

    def _append(self, rows: Rows, codes: dict[str, np.ndarray]) -> None:
        if self.fold_bins is not None:
            edges = [equal_width(self.fold_bins)]
            for key, index in {_EVERYTHING: slice(None), **self.groups.members(codes)}.items():
                before = self.tallies.get(key)
                tally = Tally.of(rows.take(index), edges, self.mode)
                self.tallies[key] = tally if before is None else before + tally
            return
        self.rows.append(rows)
        for column, values in codes.items():
            self.codes.setdefault(column, []).append(values)

    def merge(self, other: CalibrationAccumulator) -> None:
        """Adds everything that another accumulator has collected.

        Raises:
            ValueError: the two were set up differently.
        """
        for setting in ("mode", "fold_bins"):
            mine, theirs = getattr(self, setting), getattr(other, setting)
            if mine != theirs:
                raise ValueError(f"cannot merge {setting}={theirs!r} into {mine!r}; use one setting everywhere.")
        if len(other):
            recode = self.groups.encode({column: list(known) for column, known in other.groups.known.items()})
            for column, table in recode.items():
                self.codes.setdefault(column, []).extend(table[codes] for codes in other.codes.get(column, []))
        self.rows.extend(other.rows)
        for key, tally in other.tallies.items():
            self.tallies[key] = self.tallies[key] + tally if key in self.tallies else tally
        self.n_ignored += other.n_ignored

    def report(
        self,
        *,
        bins: int | None = None,
        strategy: str = "equal_width",
        intervals: bool = True,
        ranked: bool = True,
    ) -> dict[str, Any]:
        """The report on all that was added; see [`calibration_report`] for its keys.

        Raises:
            ValueError: nothing with a label was added, or a setting is wrong.
        """
        bins = (self.fold_bins or DEFAULT_BINS) if bins is None else check_count("bins", bins, least=1)
        check_choice("intervals", intervals, (True, False))
        check_choice("strategy", strategy, STRATEGIES)
        if self.fold_bins is not None and (bins != self.fold_bins or strategy != "equal_width"):
            raise ValueError(
                f"examples were folded into {self.fold_bins} equal-width bins; leave bins and strategy out."
            )
        if not len(self):
            raise ValueError(
                f"there is no example with a label ({self.n_ignored} ignored); add some before asking for a report."
            )
        if self.fold_bins is not None:
            found = {key: tally.figures(intervals) for key, tally in self.tallies.items()}
        else:
            found = self._report_rows(bins, strategy, intervals, ranked)
        report = found.pop(_EVERYTHING)
        report |= {"n_ignored": self.n_ignored, "mode": self.mode, "strategy": strategy, "bins": bins}
        if found:
            groups = {name_of(key): found[key] for key in self.groups.ordered(found)}
            if len(groups) < len(found):
                raise ValueError("two groups have the same name once columns are crossed; rename a column or a group.")
            report |= {"groups": groups, **compare_groups(groups)}
        return report

    def _report_rows(self, bins: int, strategy: str, intervals: bool, ranked: bool) -> dict[Key, dict]:
        if len(self.rows) > 1:
            self.rows = [Rows.concatenate(self.rows)]
            self.codes = {column: [np.concatenate(parts)] for column, parts in self.codes.items()}
        members = self.groups.members({column: parts[0] for column, parts in self.codes.items()})
        found = {}
        for key, index in {_EVERYTHING: slice(None), **members}.items():
            rows = self.rows[0].take(index)
            scores = [rows.confidence] if rows.scores is None else list(rows.scores.T)
            edges = [
                make_edges(strategy, c, bins, rows.weight)
                for c in (scores if strategy == "equal_mass" else scores[:1])
            ]
            found[key] = Tally.of(rows, edges, self.mode, drawn=intervals).figures(intervals)
            if ranked:
                found[key] |= ranking_figures(rows, self.mode)
        return found
