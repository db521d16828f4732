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
    RobustTemperatureCalibrator,
    ShrunkTemperatureCalibrator,
)
from hf_moecal.calibration.base import Calibrator, refuse_training_rows
from hf_moecal.calibration.classwise import PerClass
from hf_moecal.calibration.rows import Rows
from hf_moecal.metrics.rows import reduce_batch
from hf_moecal.table import IGNORED_LABEL, columns, names


if TYPE_CHECKING:
    from datasets import Dataset

    Table = Dataset | Mapping[str, Any]

_FIGURES = (
    *("ece", "ece_interval", "ece_debiased", "ece_noise_floor", "signed_gap", "signed_gap_interval"),
    *("accuracy", "confidence", "nll", "brier", "n"),
)
_NLL = 2  # among the figures of each row
_LARGEST_LOSS = -float(np.log(np.finfo(np.float64).tiny))
_SHRUNK = "shrunk_temperature"
_ERRORS = 1.0  # standard errors by which a richer method must be better
_MOST_CLASSES = 256  # for the methods with parameters per class
_ELEMENTS = 1 << 21  # probabilities in memory at once

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
        return lines


def calibrate_table(
    table: Table,
    *,
    method: str | Calibrator = AUTO,
    folds: int = 5,
    seed: int = 0,
    training_ids: Collection[str] | None = None,
    progress: bool = False,
) -> CalibrationResult:
    """Fits a calibrator on a predictions table and says what it does to rows that it has not seen.

    With `"auto"` a temperature drawn to 1 is taken where the rows are evidence that the model is not calibrated and it
    saves something on held-out rows; a richer method must have a lower held-out negative log-likelihood by more than
    the standard error of the difference. Methods that the rows do not bear are not compared, and the result says why.
    Rows are held out by whole groups when the table has a column `group` with two values or more, so that a method is
    judged on a group it never saw. Rows may have a weight in a column `sample_weight`: the losses that are compared
    are weighted, the figures before and after count every row once.

    Args:
        table: predictions with `logits` or `probs`, and `label`.
        method: a name of [`CANDIDATES`], `"auto"`, or a calibrator with its own settings.
        folds: number of cross-validation folds (at most one per group).
        seed: of the folds.
        training_ids: ids that the model was trained on; see [`~hf_moecal.calibration.Calibrator.fit`].
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
    skipped = _misfits(builders, rows) if method == AUTO else {}
    judged = _held_out(builders, rows, assignment, skipped, strict=method != AUTO, progress=progress)
    losses = {name: np.minimum(figures[_NLL], _LARGEST_LOSS) for name, figures in judged.items()}
    weights = np.ones(len(rows)) if rows.weights is None else rows.weights
    compare = partial(_difference, groups=groups, weights=weights)
    if method == AUTO:
        chosen, calibrator = _best_fit(builders, rows, losses, compare, skipped)
    else:
        chosen = list(builders)[-1]
        calibrator = builders[chosen]().fit_rows(rows)
    comparison = _comparison(builders, losses, skipped, compare, weights, chosen)
    return CalibrationResult(
        calibrator=calibrator,
        comparison=comparison,
        before=_report(judged["none"], rows.table, seed),
        after=_report(judged[chosen], rows.table, seed),
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


def _misfits(builders: Mapping[str, Callable[[], Calibrator]], rows: Rows) -> dict[str, str]:
    """The methods that these rows do not bear, and why, before any time is spent on them."""
    classes, present, found = rows.logits.shape[1], names(rows.table), {}
    for name, build in builders.items():
        calibrator = build()
        if missing := [column for column in calibrator.reads if column not in present]:
            found[name] = f"the table has no column {', '.join(map(repr, missing))}"
        elif isinstance(calibrator, PerClass) and classes > _MOST_CLASSES:
            found[name] = f"{classes:,} classes; compared up to {_MOST_CLASSES}, or when it is named"
        elif misfit := calibrator.misfit(rows):
            found[name] = misfit.rstrip(".").split(". ")[0]
    return found


def _held_out(
    builders: Mapping[str, Callable[[], Calibrator]],
    rows: Rows,
    assignment: np.ndarray,
    skipped: dict[str, str],
    *,
    strict: bool,
    progress: bool,
) -> dict[str, np.ndarray]:
    """Figures of each row, `[4, n]`, by each method fitted on the other folds; what fails is noted in `skipped`."""
    from tqdm.auto import tqdm

    judged = {name: np.empty((4, len(rows))) for name in builders if name not in skipped}
    folds = int(assignment.max()) + 1
    with tqdm(total=folds * len(judged), desc="calibrate", unit="fit", disable=not progress, delay=1) as bar:
        for fold in range(folds):
            inside = assignment == fold
            fitting, held_out = rows.part(~inside), rows.part(inside)
            for name in list(judged):
                try:
                    judged[name][:, inside] = _judged(builders[name]().fit_rows(fitting), held_out)
                except ValueError as error:
                    if strict:
                        raise
                    skipped[name] = str(error).split(". ")[0].split("; ")[0]
                    del judged[name]
                bar.update()
    return judged


def _judged(calibrator: Calibrator, rows: Rows) -> np.ndarray:
    """Confidence, whether the prediction is right, loss and Brier score of each row, `[4, n]`, in pieces."""
    result = np.empty((4, len(rows)))
    step = max(1, _ELEMENTS // rows.logits.shape[1])
    for start in range(0, len(rows), step):
        part = rows.part(slice(start, start + step))
        probs = np.exp(calibrator.log_probs(part))
        found, _ = reduce_batch(part.labels, probs=probs / probs.sum(axis=1, keepdims=True))
        result[:, start : start + step] = found.confidence, found.event, found.nll, found.brier
    return result


def _best_fit(
    builders: Mapping[str, Callable[[], Calibrator]],
    rows: Rows,
    losses: Mapping[str, np.ndarray],
    compare: Callable[[np.ndarray], tuple[float, float]],
    skipped: dict[str, str],
) -> tuple[str, Calibrator]:
    """The method to take, fitted on all rows; one that then answers the same to everything is taken out."""
    left = dict(losses)
    while True:
        chosen = _simplest_good(left, compare, ShrunkTemperatureCalibrator().fit_rows(rows).evidence)
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
    losses: Mapping[str, np.ndarray], compare: Callable[[np.ndarray], tuple[float, float]], evidence: float
) -> str:
    """A temperature where the rows speak for one and it does no harm held out; a richer method where it is better.

    The evidence for a temperature is a likelihood's, which is far sharper than a difference of held-out losses: with a
    hundred rows their error hides what a temperature of 2 saves.
    """
    chosen = "none"
    if evidence > 0.5 and _SHRUNK in losses and compare(losses["none"] - losses[_SHRUNK])[0] > 0:
        chosen = _SHRUNK
    for name in losses:
        if name in ("none", _SHRUNK):
            continue
        gain, error = compare(losses[chosen] - losses[name])
        if gain > _ERRORS * error:
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


def _report(judged: np.ndarray, table: Mapping[str, np.ndarray], seed: int) -> dict[str, Any]:
    from hf_moecal.metrics import calibration_report

    confidence, correct, nll, brier = judged
    figures = {"confidence": confidence, "correct": correct.astype(bool), "nll": nll, "brier": brier}
    report = calibration_report(**figures, groups=table.get("group"), seed=seed, ranked=False)
    result = {name: report[name] for name in _FIGURES}
    if "groups" in report:
        result["groups"] = {key: {name: group[name] for name in _FIGURES} for key, group in report["groups"].items()}
    return result
