"""True accuracy and calibration of logged predictions once their labels arrive, joined by `id`, window by window."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from ..metrics import calibration_report
from ..metrics.binning import DEFAULT_BINS, bin_index, equal_width
from ..table import IGNORED_LABEL, columns, read_table
from .correlation import Correlation
from .count_test import quadratic_form
from .log_reader import read_log
from .logs import Schema, key_texts
from .sequences import clustering
from .statistics import adjust


# Least change of accuracy, or of the calibration error, that counts as drift: two points.
MINIMUM_CHANGE = 0.02
_FIGURES = ("n", "accuracy", "confidence", "signed_gap", "ece", "ece_interval", "ece_debiased", "ece_noise_floor")
Rows = Mapping[str, np.ndarray]


def score_labels(
    reference: Rows,
    current: Any,
    labels: Any,
    *,
    window: int | None = None,
    sequence: str | None = None,
    alpha: float = 0.01,
    correction: str = "holm",
) -> dict[str, Any]:
    """Joins labels to a log by `id` and compares its accuracy and calibration with those of a reference.

    Two mean vectors are tested, with their covariance: whether a row is right; and its residual, confidence minus
    correctness, in its confidence bin, which moves when the model becomes less accurate at the same confidence,
    anywhere. Rows of one sequence count as one observation; without sequences the correlation of neighbouring rows is
    estimated.

    Args:
        reference: columns `confidence` and `correct` of the reference, and `sequence` where rows have one.
        current: the log, as for [`~hf_moecal.drift.monitor.monitor`]; it needs `id`, and standard input cannot be read
            again.
        labels: table, or path of a table, with `id` and `label`.
        window: labelled sequences (rows, without `sequence`) per window; `None` for one window.
        sequence: column of the log that names the sequence of a row.
        alpha: chance of a false alarm per window.
        correction: how the two tests share alpha.

    Returns:
        The figures of the joined rows (`n`, `accuracy`, `ece`, `ece_interval`, ...) and `tests`, the same of each of
        the `windows` with its place in the log, and of the `reference`; `drift`, whether any window drifted, or all
        together; and what did not join: `labels_without_row`, `rows_without_label`.

    Raises:
        ValueError: the log has no `id`, an id is labelled twice, or nothing joins.
    """
    keys, label = _read_labels(labels)
    order = np.argsort(keys)
    keys, label = keys[order], label[order]
    twice = keys[1:][keys[1:] == keys[:-1]]
    if len(twice):
        raise ValueError(f"{len(twice)} ids are labelled twice, first '{twice[0]}'; keep one label per id.")
    found, used, without = _join(current, keys, label, sequence)
    n = len(found["confidence"])
    if not n:
        raise ValueError("No row of the log has the id of a label; check that both name the same examples.")
    test = _Test(reference, alpha=alpha, correction=correction)
    owner = found["sequence"] if sequence else np.arange(n)
    _, begins, which = np.unique(owner, return_index=True, return_inverse=True)
    slot = np.argsort(np.argsort(begins))[which] // (window or n)
    windows = [{"index": i, **test(_rows(found, slot == i))} for i in range(int(slot.max()) + 1)] if window else []
    whole = test(found)
    return {
        **{name: value for name, value in whole.items() if not name.startswith(("first_", "last_"))},
        "drift": whole["drift"] or any(part["drift"] for part in windows),
        "windows": windows,
        "reference": _figures(reference),
        "labels_without_row": int((~used).sum()),
        "rows_without_label": without,
    }


def label_line(labelled: Mapping[str, Any]) -> str:
    """What late labels showed, in a line."""
    moved = [
        f"{test['feature']} (change {test['effect']:.3f}, p {test['p_adjusted']:.1e})"
        for test in labelled["tests"]
        if test["drift"]
    ]
    alarms = [str(part["index"]) for part in labelled["windows"] if part["drift"]]
    if alarms:
        moved.append(
            f"windows of labels {', '.join(alarms)}" if len(alarms) < 10 else f"{len(alarms)} windows of labels"
        )
    reference = labelled["reference"]
    return (
        f"{labelled['n']:,} labels: accuracy {reference['accuracy']:.3f} -> {labelled['accuracy']:.3f}, "
        f"ECE {reference['ece']:.3f} -> {labelled['ece']:.3f}, "
        + (f"DRIFT in {', '.join(moved)}" if moved else "no drift")
    )


class _Test:
    """Accuracy and calibration of labelled rows against those of the reference."""

    def __init__(self, reference: Rows, *, alpha: float, correction: str) -> None:
        self.alpha, self.correction, self.edges = alpha, correction, equal_width(DEFAULT_BINS)
        self.reference = self._vectors(reference)
        self.n = len(reference["confidence"])
        if "sequence" in reference:
            self.n_effective, self.correlation = self.n / clustering(reference["sequence"]), None
        else:
            residual = reference["confidence"] - reference["correct"]
            self.correlation = Correlation(residual[:, None])
            self.n_effective = self.n / self.correlation.reference(self.n)

    def _vectors(self, rows: Rows) -> dict[str, np.ndarray]:
        residual, place = rows["confidence"] - rows["correct"], bin_index(rows["confidence"], self.edges)
        binned = np.zeros((len(residual), DEFAULT_BINS))
        binned[np.arange(len(residual)), place] = residual
        return {"accuracy": np.asarray(rows["correct"], np.float64)[:, None], "calibration": binned}

    def __call__(self, rows: Rows) -> dict[str, Any]:
        n = len(rows["confidence"])
        if self.correlation:
            mean = np.array([(rows["confidence"] - rows["correct"]).mean()])
            effective = n / self.correlation.push(mean, n)
        else:
            effective = n / clustering(rows["sequence"])
        tests = [self._compare(name, vectors, effective) for name, vectors in self._vectors(rows).items()]
        adjusted = adjust([test["p_value"] for test in tests], correction=self.correction)
        for test, p in zip(tests, adjusted, strict=True):
            test |= {"p_adjusted": float(p), "drift": bool(p <= self.alpha and test["effect"] >= MINIMUM_CHANGE)}
        figures = _figures(rows)
        half = 1.96 * np.sqrt(figures["accuracy"] * (1 - figures["accuracy"]) / effective)
        return {
            **figures,
            "accuracy_interval": [max(0.0, figures["accuracy"] - half), min(1.0, figures["accuracy"] + half)],
            "effective_n": effective,
            "first_id": str(rows["id"][0]),
            "last_id": str(rows["id"][-1]),
            "tests": tests,
            "drift": any(test["drift"] for test in tests),
        }

    def _compare(self, name: str, window: np.ndarray, effective: float) -> dict[str, Any]:
        reference, n = self.reference[name], len(window)
        difference = window.mean(axis=0) - reference.mean(axis=0)
        second = (reference.T @ reference + window.T @ window) / (self.n + n)
        mean = (reference.sum(axis=0) + window.sum(axis=0)) / (self.n + n)
        covariance = (second - np.outer(mean, mean)) * (1 / self.n_effective + 1 / effective)
        statistic, freedom = quadratic_form(difference, covariance)
        p = float(stats.chi2.sf(statistic, freedom)) if freedom else 1.0
        return {"feature": name, "effect": float(np.abs(difference).sum()), "p_value": p}


def _read_labels(labels: Any) -> tuple[np.ndarray, np.ndarray]:
    if isinstance(labels, (str, Path)):
        labels = read_table(labels)
    label = columns(labels, "id", "label")["label"]
    if label.ndim == 2:
        raise ValueError("Column 'label' holds the share of each class; labels that come later are single classes.")
    ids = labels["id"][:]
    texts = [str(value) for value in ids] if isinstance(ids, list) else key_texts("id", np.asarray(ids))
    return np.asarray(texts, str), label


def _join(
    current: Any, keys: np.ndarray, label: np.ndarray, sequence: str | None
) -> tuple[dict[str, np.ndarray], np.ndarray, int]:
    """Confidence and correctness of the rows that have a label, which labels were used, and how many rows have
    none."""
    used, without = np.zeros(len(keys), bool), 0
    parts: dict[str, list[np.ndarray]] = {"confidence": [], "correct": [], "id": [], "sequence": []}
    schema = Schema(numbers=("confidence", "prediction"), categories={}, sequence=sequence)
    for piece in read_log(current, schema):
        if "id" not in piece.rows:
            raise ValueError(
                f"{piece.source!r} has no column 'id', by which labels are joined; log the id of each row."
            )
        ids = piece.rows["id"].astype(str)
        place = np.minimum(np.searchsorted(keys, ids), len(keys) - 1)
        hit = (keys[place] == ids) & (label[place] != IGNORED_LABEL)
        used[place[hit]] = True
        without += int((~hit).sum())
        parts["confidence"].append(piece.rows["confidence"][hit])
        parts["correct"].append(piece.rows["prediction"][hit] == label[place[hit]])
        parts["id"].append(ids[hit])
        if sequence:
            parts["sequence"].append(piece.rows[sequence][hit].astype(str))
    found = {name: np.concatenate(values) if values else np.zeros(0) for name, values in parts.items()}
    return found, used, without


def _rows(rows: Rows, some: np.ndarray) -> dict[str, np.ndarray]:
    return {name: values[some] for name, values in rows.items() if len(values)}


def _figures(rows: Rows) -> dict[str, Any]:
    report = calibration_report(confidence=rows["confidence"], correct=rows["correct"], ranked=False)
    return {name: report[name] for name in _FIGURES}
