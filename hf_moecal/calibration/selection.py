"""Which calibrator, if any: compared by the log-likelihood of rows that it was not fitted on."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_moecal.calibration import (
    METHODS,
    GroupedTemperatureCalibrator,
    IdentityCalibrator,
    RobustTemperatureCalibrator,
    ShrunkTemperatureCalibrator,
)
from hf_moecal.calibration.base import Calibrator, refuse_training_rows
from hf_moecal.calibration.classwise import PerClass
from hf_moecal.calibration.judging import LARGEST_LOSS, NLL, held_out, row_losses
from hf_moecal.calibration.rows import Rows
from hf_moecal.table import IGNORED_LABEL, columns, names


if TYPE_CHECKING:
    from datasets import Dataset

    Table = Dataset | Mapping[str, Any]

_FIGURES = (
    *("ece", "ece_interval", "ece_debiased", "ece_noise_floor", "signed_gap", "signed_gap_interval"),
    *("accuracy", "confidence", "nll", "brier", "n"),
)
_SHRUNK = "shrunk_temperature"
_SINGLE = ("temperature", "conservative_temperature", "robust_temperature", "filtered_robust_temperature")
_CAUTIOUS = _SINGLE[1:]
_EVIDENCE = 0.2  # above this a temperature is taken, so much drawn to 1 as the evidence is weak
_ERRORS, _ERRORS_OF_SINGLE = 1.5, 2.0  # standard errors by which another method must be better
_MOST_CLASSES = 256  # for the methods with parameters per class

AUTO = "auto"
"""Method name that compares every calibrator that the table has the columns for."""

CANDIDATES: dict[str, Callable[[], Calibrator]] = {
    "none": METHODS["none"],
    "shrunk_temperature": METHODS["shrunk_temperature"],
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
    "matrix": METHODS["matrix"],
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
        lines += [f"Warning: {sentence}" for sentence in self.warnings]
        if not isinstance(self.calibrator, PerClass):
            lines.append(
                "If data of another kind are to come, label about 100 rows of them and fit 'vector' on these: a scale "
                "and a shift per class mend what no temperature can."
            )
        return lines


def calibrate_table(
    table: Table,
    *,
    method: str | Calibrator = AUTO,
    folds: int = 5,
    seed: int = 0,
    training_ids: Collection[str] | None = None,
    intervals: bool = True,
    progress: bool = False,
) -> CalibrationResult:
    """Fits a calibrator on a predictions table and says what it does to rows that it has not seen.

    With `"auto"` a temperature drawn to 1 is taken where the rows are evidence that the model is not calibrated; a
    richer method must have a lower held-out negative log-likelihood by 1.5 standard errors of the difference. Methods
    that the rows do not bear are not compared, and the result says why. Rows are held out by whole groups when the
    table has a column `group` with two values or more, so that a method is judged on a group it never saw. Rows may
    have a weight in a column `sample_weight`: the losses that are compared are weighted, the figures before and after
    count every row once.

    Args:
        table: predictions with `logits` or `probs`, and `label`.
        method: a name of [`CANDIDATES`], `"auto"`, or a calibrator with its own settings.
        folds: number of cross-validation folds (at most one per group).
        seed: of the folds.
        training_ids: ids that the model was trained on; see [`~hf_moecal.calibration.Calibrator.fit`].
        intervals: whether the figures before and after have intervals.
        progress: whether to show a progress bar where it takes more than a second.

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
    'shrunk_temperature'

    ```
    """
    refuse_training_rows(table, training_ids)
    builders = _builders(method)
    reads = {name for build in builders.values() for name in build().reads}
    rows = Rows(_labelled(table, reads), labelled=True)
    rows.start = rows.plain_fit.temperature if rows.plain_fit.identified else None
    # A temperature per known group cannot be judged on a group that it never saw.
    groups = None if method != AUTO and "group" in reads else _groups(rows.table)
    assignment = _folds(len(rows), groups, folds, seed)
    skipped = _misfits(builders, rows, by_groups=groups is not None) if method == AUTO else {}
    judged = held_out(builders, rows, assignment, skipped, strict=method != AUTO, progress=progress)
    losses = {name: np.minimum(figures[NLL], LARGEST_LOSS) for name, figures in judged.items()}
    weights = np.ones(len(rows)) if rows.weights is None else rows.weights
    compare = partial(_difference, groups=groups, weights=weights)
    if method == AUTO:
        chosen, calibrator = _best_fit(builders, rows, losses, compare, skipped, by_groups=groups is not None)
    else:
        chosen = list(builders)[-1]
        calibrator = builders[chosen]().fit_rows(rows)
    comparison = _comparison(builders, losses, skipped, compare, weights, chosen)
    return CalibrationResult(
        calibrator=calibrator,
        comparison=comparison,
        before=_report(judged["none"], rows.table, intervals),
        after=_report(judged[chosen], rows.table, intervals),
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
    further = {"group", "scoring", "sample_weight", *reads}
    wanted = ["label", scores, *(name for name in further if name in names(table))]
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


def _misfits(builders: Mapping[str, Callable[[], Calibrator]], rows: Rows, *, by_groups: bool) -> dict[str, str]:
    """The methods that these rows do not bear, and why, before any time is spent on them."""
    classes, present, found = rows.logits.shape[1], names(rows.table), {}
    for name, build in builders.items():
        calibrator = build()
        if missing := [column for column in calibrator.reads if column not in present]:
            found[name] = f"the table has no column {', '.join(map(repr, missing))}"
        elif isinstance(calibrator, PerClass) and classes > _MOST_CLASSES:
            found[name] = f"{classes:,} classes; compared up to {_MOST_CLASSES}, or when it is named"
        elif classes > _MOST_CLASSES and name in _CAUTIOUS and not by_groups:
            found[name] = f"{classes:,} classes; only held-out groups could speak for it"
        elif misfit := calibrator.misfit(rows):
            found[name] = misfit.rstrip(".").split(". ")[0]
    return found


def _best_fit(
    builders: Mapping[str, Callable[[], Calibrator]],
    rows: Rows,
    losses: Mapping[str, np.ndarray],
    compare: Callable[[np.ndarray], tuple[float, float]],
    skipped: dict[str, str],
    *,
    by_groups: bool,
) -> tuple[str, Calibrator]:
    """The method to take, fitted on all rows; one that then answers the same to everything is taken out."""
    left = dict(losses)
    shrunk = ShrunkTemperatureCalibrator().fit_rows(rows)
    saved = float(compare(row_losses(IdentityCalibrator().fit_rows(rows), rows) - row_losses(shrunk, rows))[0])
    known = {"evidence": shrunk.evidence, "saved": saved, "by_groups": by_groups}
    while True:
        chosen = _simplest_good(left, compare, **known)
        calibrator = builders[chosen]().fit_rows(rows)
        if not _says_nothing(calibrator, rows):
            return chosen, calibrator
        skipped[chosen] = "it would give the same answer to every row"
        del left[chosen]


def _says_nothing(calibrator: Calibrator, rows: Rows) -> bool:
    """Whether all predictions become one that were not one before."""
    if not isinstance(calibrator, PerClass) or len(np.unique(rows.logits.argmax(axis=1))) == 1:
        return False
    return len(np.unique(calibrator.log_probs(rows).argmax(axis=1))) == 1


def _simplest_good(
    losses: Mapping[str, np.ndarray],
    compare: Callable[[np.ndarray], tuple[float, float]],
    *,
    evidence: float,
    saved: float,
    by_groups: bool,
) -> str:
    """A temperature where the rows speak for one, then a richer method where held-out rows clearly do.

    The evidence for a temperature is a likelihood's, far sharper than a difference of held-out losses: with a hundred
    rows the error of that hides what a temperature of 2 saves. Where groups are held out it must also save more on the
    groups that are there than it loses on one that it never saw. The other single temperatures differ from it in
    what they do to data of another kind, so only held-out groups can speak for them.
    """
    chosen = "none"
    if _SHRUNK in losses and evidence > _EVIDENCE:
        unseen = compare(losses["none"] - losses[_SHRUNK])[0] if by_groups else 0.0
        chosen = _SHRUNK if saved + unseen > 0 else chosen
    for name in losses:
        if name in ("none", _SHRUNK) or (name in _SINGLE and not by_groups):
            continue
        gain, error = compare(losses[chosen] - losses[name])
        if gain > (_ERRORS_OF_SINGLE if name in _SINGLE else _ERRORS) * error:
            chosen = name
    return chosen


def _difference(saved: np.ndarray, *, groups: np.ndarray | None, weights: np.ndarray) -> tuple[float, float]:
    """Mean of a per-row difference and its standard error, over groups where rows of a group hang together."""
    gain = float(weights @ saved / weights.sum())
    sums = weights * (saved - gain)
    if groups is not None:
        sums = np.bincount(groups, sums)
    return gain, float(np.sqrt((sums**2).sum() * len(sums) / (len(sums) - 1)) / weights.sum())


def _comparison(
    builders: Iterable[str],
    losses: Mapping[str, np.ndarray],
    skipped: Mapping[str, str],
    compare: Callable[[np.ndarray], tuple[float, float]],
    weights: np.ndarray,
    chosen: str,
) -> list[dict[str, Any]]:
    entries = []
    for name in builders:
        if name in skipped:
            entries.append({"method": name, "skipped": skipped[name], "chosen": False})
            continue
        gain, error = compare(losses["none"] - losses[name])
        nll = float(weights @ losses[name] / weights.sum())
        entries.append({"method": name, "nll": nll, "gain": gain, "error": error, "chosen": name == chosen})
    return entries


def _report(judged: np.ndarray, table: Mapping[str, np.ndarray], intervals: bool) -> dict[str, Any]:
    from hf_moecal.metrics import calibration_report

    confidence, correct, nll, brier = judged
    figures = {"confidence": confidence, "correct": correct.astype(bool), "nll": nll, "brier": brier}
    groups = table.get("group")
    report = calibration_report(**figures, groups=groups, ranked=False, intervals=intervals)
    result = {name: report[name] for name in _FIGURES if name in report}
    if "groups" in report:
        result["groups"] = {key: {name: group[name] for name in result} for key, group in report["groups"].items()}
    return result
