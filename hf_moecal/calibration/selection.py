"""Which calibrator, if any: compared by the log-likelihood of rows that it was not fitted on."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_moecal.calibration import (
    METHODS,
    GroupedTemperatureCalibrator,
    RobustTemperatureCalibrator,
)
from hf_moecal.calibration.base import Calibrator, Rows, refuse_training_rows
from hf_moecal.table import IGNORED_LABEL, columns, names


if TYPE_CHECKING:
    from datasets import Dataset

    Table = Dataset | Mapping[str, Any]

_FIGURES = (
    *("ece", "ece_interval", "ece_debiased", "ece_noise_floor", "signed_gap", "signed_gap_interval"),
    *("accuracy", "confidence", "nll", "brier", "n"),
)
AUTO = "auto"
"""Method name that compares every calibrator that the table has the columns for."""

CANDIDATES: dict[str, Callable[[], Calibrator]] = {
    "none": METHODS["none"],
    "temperature": METHODS["temperature"],
    "conservative_temperature": METHODS["conservative_temperature"],
    "robust_temperature": METHODS["robust_temperature"],
    "filtered_robust_temperature": lambda: RobustTemperatureCalibrator(filtered=True),
    "grouped_temperature": METHODS["grouped_temperature"],
    "expert_usage_temperature": lambda: GroupedTemperatureCalibrator(by="expert_usage"),
    "per_expert_temperature": METHODS["per_expert_temperature"],
    "routing_temperature": METHODS["routing_temperature"],
    "platt": METHODS["platt"],
    "vector": METHODS["vector"],
    "isotonic": METHODS["isotonic"],
}
"""Every method by name, simplest first: the order in which `"auto"` prefers them."""


@dataclass(frozen=True)
class CalibrationResult:
    """What [`calibrate_table`] found.

    Args:
        calibrator: the chosen one, fitted on all labelled rows.
        comparison: one entry per method, simplest first: `method`, `nll`, `error` (standard error of the difference
            to no calibration), `gain` (what it saves against no calibration, in nats), `chosen`, and, for a method
            that could not be used, `skipped` with the reason.
        before, after: figures of `calibration_report` on held-out rows, without and with the chosen calibrator.
        data: `n`, `folds`, `held_out` (`"groups"` or `"rows"`), `seed`.
        warnings: what a user should know.
    """

    calibrator: Calibrator
    comparison: list[dict[str, Any]]
    before: dict[str, Any]
    after: dict[str, Any]
    data: dict[str, Any]
    warnings: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The comparison for a terminal, one line per method and a last one with the choice."""
        lines = [f"{'method':<26}{'held-out NLL':>14}{'gain':>10}{'+-':>9}"]
        for entry in self.comparison:
            if "skipped" in entry:
                lines.append(f"{entry['method']:<26}{'-':>14}  {entry['skipped']}")
                continue
            mark = " *" if entry["chosen"] else ""
            lines.append(
                f"{entry['method']:<26}{entry['nll']:>14.4f}{entry['gain']:>10.4f}{entry['error']:>9.4f}{mark}"
            )
        if self.calibrator.method == "none":
            lines.append("No calibration is best: none of these beats the model's own probabilities on held-out rows.")
        else:
            lines.append(f"Chosen: {self.calibrator.method}, held out by {self.data['held_out']}.")
        return lines


def calibrate_table(
    table: Table,
    *,
    method: str | Calibrator = AUTO,
    folds: int = 5,
    seed: int = 0,
    training_ids: Collection[str] | None = None,
) -> CalibrationResult:
    """Fits a calibrator on a predictions table and says what it does to rows that it has not seen.

    With `"auto"` the simplest method wins unless another has a lower held-out negative log-likelihood by more than
    the standard error of the difference; "no calibration" is the simplest of all. Rows are held out by whole groups
    when the table has a column `group` with two values or more, so that a method is judged on a group it never saw.

    Args:
        table: predictions with `logits` or `probs`, and `label`.
        method: a name of [`CANDIDATES`], `"auto"`, or a calibrator with its own settings.
        folds: number of cross-validation folds (at most one per group).
        seed: of the folds.
        training_ids: ids that the model was trained on; see [`~hf_moecal.calibration.Calibrator.fit`].

    Raises:
        ValueError: unknown method, or a table that the method cannot be fitted on.

    Example:

    ```python
    >>> import numpy as np
    >>> from hf_moecal.calibration.selection import calibrate_table
    >>> rng = np.random.default_rng(0)
    >>> logits = rng.normal(size=(1000, 3))
    >>> label = (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)
    >>> calibrate_table({"logits": logits, "label": label}).calibrator.method
    'none'
    >>> calibrate_table({"logits": 4 * logits, "label": label}).calibrator.method
    'temperature'

    ```
    """
    refuse_training_rows(table, training_ids)
    builders = _builders(method)
    reads = {name for build in builders.values() for name in build().reads}
    table = _labelled(table, reads)
    rows = Rows(table, labelled=True)
    # A temperature per known group cannot be judged on a group that it never saw.
    groups = None if method != AUTO and "group" in reads else _groups(table)
    assignment = _folds(len(rows), groups, folds, seed)
    held_out: dict[str, np.ndarray] = {}
    skipped: dict[str, str] = {}
    for name, build in builders.items():
        try:
            held_out[name] = _held_out_probs(build, table, assignment)
        except ValueError as error:
            if method != AUTO:
                raise
            skipped[name] = str(error).split(". ")[0].split("; ")[0]
    losses = {name: -np.log(_at(probs, rows.labels)) for name, probs in held_out.items()}
    chosen = _simplest_good(losses, groups) if method == AUTO else list(builders)[-1]
    calibrator = _quietly(builders[chosen]().fit, table)
    return CalibrationResult(
        calibrator=calibrator,
        comparison=_comparison(builders, losses, skipped, groups, chosen),
        before=_report(rows.labels, held_out["none"], table, seed),
        after=_report(rows.labels, held_out[chosen], table, seed),
        data={
            "n": len(rows),
            "folds": int(assignment.max()) + 1,
            "held_out": "rows" if groups is None else "groups",
            "seed": seed,
        },
        warnings=list(calibrator.warnings),
    )


def _builders(method: str | Calibrator) -> dict[str, Callable[[], Calibrator]]:
    """Makers of fresh calibrators, simplest first; "none" is always there to compare with."""
    if isinstance(method, Calibrator):
        return {"none": CANDIDATES["none"], method.method: lambda: deepcopy(method)}
    if method == AUTO:
        return dict(CANDIDATES)
    if method not in CANDIDATES:
        raise ValueError(f"Unknown method {method!r}; choose {AUTO!r} or one of {', '.join(map(repr, CANDIDATES))}.")
    return {"none": CANDIDATES["none"], method: CANDIDATES[method]}


def _labelled(table: Table, reads: Collection[str]) -> dict[str, np.ndarray]:
    """The labelled rows as plain arrays, read once for all methods."""
    keep = columns(table, "label")["label"] != IGNORED_LABEL
    if not keep.any():
        Rows(table, labelled=True)  # raises with the reason
    scores = "logits" if "logits" in names(table) else "probs"
    wanted = ["label", scores, *(name for name in {"group", "scoring", *reads} if name in names(table))]
    return {name: column[keep] for name, column in columns(table, *wanted).items()}


def _groups(table: Mapping[str, np.ndarray]) -> np.ndarray | None:
    if "group" not in table:
        return None
    codes = np.unique(table["group"], return_inverse=True)[1]
    return codes if codes.max() > 0 else None


def _folds(count: int, groups: np.ndarray | None, folds: int, seed: int) -> np.ndarray:
    """Fold number of each row; rows of one group share a fold."""
    if folds < 2:
        raise ValueError(f"folds must be 2 or more to hold rows out; got {folds}.")
    rng = np.random.default_rng(seed)
    units = count if groups is None else int(groups.max()) + 1
    if units < 2:
        raise ValueError(f"{count} labelled row is too few to hold any out; give a larger table.")
    of_unit = rng.permutation(units) % min(folds, units)
    return of_unit if groups is None else of_unit[groups]


def _held_out_probs(
    build: Callable[[], Calibrator], table: Mapping[str, np.ndarray], assignment: np.ndarray
) -> np.ndarray:
    """Probabilities of each row by a calibrator that was fitted on the other folds."""
    result: np.ndarray | None = None
    for fold in range(int(assignment.max()) + 1):
        inside = assignment == fold
        calibrator = _quietly(build().fit, {name: column[~inside] for name, column in table.items()})
        probs = calibrator.apply({name: column[inside] for name, column in table.items()})["probs"]
        result = np.empty((len(assignment), probs.shape[1])) if result is None else result
        result[inside] = probs
    return result


def _quietly(fit: Callable[[Any], Calibrator], table: Mapping[str, np.ndarray]) -> Calibrator:
    """Fits; its warnings stay on the calibrator, from where the result takes those of the final fit."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return fit(table)


def _at(probs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return np.maximum(np.take_along_axis(probs, labels[:, None], axis=1)[:, 0], np.finfo(np.float64).tiny)


def _simplest_good(losses: Mapping[str, np.ndarray], groups: np.ndarray | None) -> str:
    """The method that no more complex one beats by more than the standard error of the difference."""
    order = list(losses)
    chosen = order[0]
    for name in order[1:]:
        gain, error = _difference(losses[chosen] - losses[name], groups)
        if gain > error:
            chosen = name
    return chosen


def _difference(saved: np.ndarray, groups: np.ndarray | None) -> tuple[float, float]:
    """Mean of a per-row difference and its standard error, over groups where rows of a group hang together."""
    gain = float(saved.mean())
    if groups is None:
        return gain, float(saved.std(ddof=1) / np.sqrt(len(saved)))
    sums = np.bincount(groups, saved - gain)
    return gain, float(np.sqrt((sums**2).sum() * len(sums) / (len(sums) - 1)) / len(saved))


def _comparison(
    builders: Iterable[str],
    losses: Mapping[str, np.ndarray],
    skipped: Mapping[str, str],
    groups: np.ndarray | None,
    chosen: str,
) -> list[dict[str, Any]]:
    entries = []
    for name in builders:
        if name in skipped:
            entries.append({"method": name, "skipped": skipped[name], "chosen": False})
            continue
        gain, error = _difference(losses["none"] - losses[name], groups)
        nll = float(losses[name].mean())
        entries.append({"method": name, "nll": nll, "gain": gain, "error": error, "chosen": name == chosen})
    return entries


def _report(labels: np.ndarray, probs: np.ndarray, table: Mapping[str, np.ndarray], seed: int) -> dict[str, Any]:
    from hf_moecal.metrics import calibration_report

    report = calibration_report(labels, probs=probs, groups=table.get("group"), seed=seed, ranked=False)
    result = {name: report[name] for name in _FIGURES}
    if "groups" in report:
        result["groups"] = {key: {name: group[name] for name in _FIGURES} for key, group in report["groups"].items()}
    return result
