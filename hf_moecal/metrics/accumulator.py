"""Streaming: batches are reduced as they come, can be merged across processes, and their order does not matter."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np

from .binning import DEFAULT_BINS, STRATEGIES, make_edges
from .inputs import MODES, Rows, check_choice, check_count
from .ranking import ranking_figures
from .rows import encode, group_columns, reduce_batch
from .tally import ERRORS, Tally


DEFAULT_BOOTSTRAP = 1000
SPREAD = (*ERRORS, "signed_gap", "accuracy", "confidence", "nll", "brier")


class CalibrationAccumulator:
    """Collects predictions batch by batch and reports every calibration figure at the end.

    A batch is reduced to a few numbers per example, so probabilities of a large vocabulary are never kept (classwise
    mode keeps them: it needs them all).

    Args:
        mode (`str`): `"top_label"`, `"classwise"` or `"positive_class"`.
        intersections (`bool`): also report every combination of two group columns.
        group_names (`list` or `dict` of lists by column): the groups that exist. One without examples is then reported
            with `n = 0`, and any other name is an error. By default the groups are those that occur.

    Example:

    ```python
    >>> from hf_moecal.metrics import CalibrationAccumulator
    >>> first, second = CalibrationAccumulator(), CalibrationAccumulator()
    >>> first.add([0, 1], probs=[[0.9, 0.1], [0.4, 0.6]], groups=["tweets", "movies"])
    >>> second.add([1], probs=[[0.8, 0.2]], groups=["tweets"])
    >>> first.merge(second)
    >>> round(first.report()["groups"]["tweets"]["accuracy"], 3)
    0.5

    ```
    """

    def __init__(self, *, mode: str = "top_label", intersections: bool = False, group_names: Any = None) -> None:
        self.mode = check_choice("mode", mode, MODES)
        self.intersections = intersections
        self.n_ignored = 0
        self._fixed = group_names is not None
        named = group_names if isinstance(group_names, dict) else {"": group_names} if self._fixed else {}
        self._known: dict[str, dict[Any, int]] = {
            column: {value: code for code, value in enumerate(values)} for column, values in named.items()
        }
        self._rows: list[Rows] = []
        self._codes: dict[str, list[np.ndarray]] = {column: [] for column in self._known}

    def add(
        self,
        labels: Any = None,
        *,
        probs: Any = None,
        logits: Any = None,
        confidence: Any = None,
        correct: Any = None,
        predictions: Any = None,
        groups: Any = None,
    ) -> None:
        """Adds one batch; the arguments are those of [`calibration_report`].

        Raises:
            ValueError: the batch is not usable, or its group columns differ from those of earlier batches.
        """
        given = {"probs": probs, "logits": logits, "confidence": confidence, "correct": correct}
        rows, kept = reduce_batch(labels, **given, predictions=predictions, mode=self.mode)
        columns = group_columns(groups, len(kept))
        self._check_columns(columns)
        for column, values in columns.items():
            values = values if kept.all() else [value for value, use in zip(values, kept, strict=True) if use]
            codes = encode(values, self._known.setdefault(column, {}), fixed=self._fixed)
            self._codes.setdefault(column, []).append(codes)
        self._rows.append(rows)
        self.n_ignored += int(len(kept) - kept.sum())

    def _check_columns(self, columns: dict[str, list]) -> None:
        if (self._rows or self._fixed) and set(columns) != set(self._known):
            raise ValueError(
                f"this batch has the group columns {sorted(columns)} but the earlier ones or group_names have "
                f"{sorted(self._known)}; give the same columns with every batch."
            )

    def merge(self, other: CalibrationAccumulator) -> None:
        """Adds everything that another accumulator has collected.

        Raises:
            ValueError: the two were set up differently.
        """
        if other.mode != self.mode:
            raise ValueError(f"cannot merge mode {other.mode!r} into {self.mode!r}; use one mode in every process.")
        if other._rows:
            self._check_columns(dict.fromkeys(other._known))
        for column, known in other._known.items():
            mine = self._known.setdefault(column, {})
            names = list(known)
            recode = encode(names, mine, fixed=self._fixed)
            self._codes.setdefault(column, []).extend(recode[codes] for codes in other._codes[column])
        self._rows.extend(other._rows)
        self.n_ignored += other.n_ignored

    def report(
        self,
        *,
        bins: int = DEFAULT_BINS,
        strategy: str = "equal_width",
        bootstrap: int = DEFAULT_BOOTSTRAP,
        seed: int = 0,
        ranked: bool = True,
    ) -> dict[str, Any]:
        """The report on all that was added; see [`calibration_report`] for its keys.

        Raises:
            ValueError: nothing with a label was added, or a setting is wrong.
        """
        check_count("bins", bins, least=1)
        check_count("bootstrap", bootstrap, least=0)
        check_count("seed", seed, least=0)
        check_choice("strategy", strategy, STRATEGIES)
        rows = self._all_rows()
        if rows is None or not len(rows.confidence):
            raise ValueError(
                f"there is no example with a label ({self.n_ignored} ignored); add some before asking for a report."
            )
        options = {"bins": bins, "strategy": strategy, "bootstrap": bootstrap, "seed": seed, "ranked": ranked}
        report = self._figures(rows, **options)
        report |= {"n_ignored": self.n_ignored, "mode": self.mode, "strategy": strategy, "bins": bins}
        if self._known:
            groups = {
                name: self._figures(Rows(*(None if a is None else a[index] for a in rows)), **options)
                for name, index in self._group_indices().items()
            }
            report |= {"groups": groups, **compare_groups(groups)}
        return report

    def _all_rows(self) -> Rows | None:
        if len(self._rows) > 1:
            self._rows = [
                Rows(*(None if parts[0] is None else np.concatenate(parts) for parts in zip(*self._rows, strict=True)))
            ]
        return self._rows[0] if self._rows else None

    def _figures(self, rows: Rows, *, bins: int, strategy: str, bootstrap: int, seed: int, ranked: bool) -> dict:
        if rows.scores is None or strategy == "equal_width":
            edges = [make_edges(strategy, rows.confidence, bins)]
        else:
            edges = [make_edges(strategy, rows.scores[:, k], bins) for k in range(rows.scores.shape[1])]
        found = Tally.of(rows, edges, self.mode).figures(bootstrap, seed)
        return found | (ranking_figures(rows, self.mode) if ranked else {})

    def _group_indices(self) -> dict[str, np.ndarray]:
        """Rows of each group, by name in sorted order, so that the order of batches does not show."""
        codes = {column: np.concatenate([np.empty(0, np.int32), *parts]) for column, parts in self._codes.items()}
        found: dict[str, np.ndarray] = {}
        for column, known in self._known.items():
            members = _split(codes[column], len(known))
            found |= {_name(column, value): members[known[value]] for value in self._ordered(known)}
        if self.intersections:
            for a, b in combinations(self._known, 2):
                for x in self._ordered(self._known[a]):
                    for y in self._ordered(self._known[b]):
                        both = (codes[a] == self._known[a][x]) & (codes[b] == self._known[b][y])
                        if both.any():
                            found[f"{_name(a, x)} & {_name(b, y)}"] = np.flatnonzero(both)
        return found

    def _ordered(self, known: dict[Any, int]) -> list:
        return list(known) if self._fixed else sorted(known)


def _name(column: str, value: Any) -> str:
    return f"{column}={value}" if column else str(value)


def _split(codes: np.ndarray, count: int) -> list[np.ndarray]:
    order = np.argsort(codes, kind="stable")
    return np.split(order, np.searchsorted(codes[order], np.arange(1, count)))


def compare_groups(groups: dict[str, dict]) -> dict[str, Any]:
    """The worst group and the spread of each figure.

    The worst is the one with the largest *debiased* L2 error, so that a small group does not win by noise.
    """
    some = {name: found for name, found in groups.items() if found["n"]}
    worst = max(some, key=lambda name: (some[name]["ece_l2_debiased"], some[name]["ece"]))
    spread = {key: max(f[key] for f in some.values()) - min(f[key] for f in some.values()) for key in SPREAD}
    return {"worst_group": worst, "worst_group_ece": some[worst]["ece"], "group_spread": spread}
