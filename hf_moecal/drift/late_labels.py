"""True calibration of logged predictions once their labels arrive, joined by `id`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..metrics import calibration_report
from ..table import IGNORED_LABEL, columns, read_table
from .log_reader import read_log
from .logs import Schema
from .statistics import DriftDetector


_FIGURES = ("n", "accuracy", "confidence", "signed_gap", "ece", "ece_interval", "ece_debiased", "ece_noise_floor")


def score_labels(
    reference: Mapping[str, np.ndarray],
    current: Any,
    labels: Any,
    *,
    alpha: float = 0.01,
    minimum_effect: float = 0.1,
) -> dict[str, Any]:
    """Joins labels to a log by `id` and compares its calibration with that of a reference.

    Drift is tested on the residual, confidence minus correctness of each row, as any other number is: it moves when
    the model becomes less accurate at the same confidence, and when it becomes more confident at the same accuracy.

    Args:
        reference: columns `confidence` and `correct` of the reference.
        current: the log, as for [`~hf_moecal.drift.monitor.monitor`]; it needs `id`, and standard input cannot be read
        again. labels: table, or path of a table, with `id` and `label`.
        alpha: chance of a false alarm.
        minimum_effect: least difference in probability that counts as drift.

    Returns:
        The figures of the joined rows (`n`, `accuracy`, `ece`, `ece_interval`, ...), the same of the `reference`,
        `drift` (the test of the residual), and what did not join: `labels_without_row`, `rows_without_label`.

    Raises:
        ValueError: the log has no `id`, an id is labelled twice, or nothing joins.
    """
    known = columns(read_table(labels) if isinstance(labels, (str, Path)) else labels, "id", "label")
    keys, label = known["id"].astype(str), known["label"]
    order = np.argsort(keys)
    keys, label = keys[order], label[order]
    twice = keys[1:][keys[1:] == keys[:-1]]
    if len(twice):
        raise ValueError(f"{len(twice)} ids are labelled twice, first '{twice[0]}'; keep one label per id.")
    found, used, without = _join(current, keys, label)
    if not len(found["confidence"]):
        raise ValueError("No row of the log has the id of a label; check that both name the same examples.")
    detector = DriftDetector(
        {"residual": reference["confidence"] - reference["correct"]}, alpha=alpha, minimum_effect=minimum_effect
    )
    detector.update({"residual": found["confidence"] - found["correct"]})
    return {
        **_figures(found),
        "reference": _figures(reference),
        "drift": detector.close()[0].to_dict(),
        "labels_without_row": int((~used).sum()),
        "rows_without_label": without,
    }


def _join(current: Any, keys: np.ndarray, label: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray, int]:
    """Confidence and correctness of the rows that have a label, which labels were used, and how many rows have
    none."""
    used, without = np.zeros(len(keys), bool), 0
    confidence, correct = [], []
    for piece in read_log(current, Schema(numbers=("confidence", "prediction"), categories={})):
        if "id" not in piece.rows:
            raise ValueError(
                f"{piece.source!r} has no column 'id', by which labels are joined; log the id of each row."
            )
        ids = piece.rows["id"].astype(str)
        place = np.minimum(np.searchsorted(keys, ids), len(keys) - 1)
        hit = (keys[place] == ids) & (label[place] != IGNORED_LABEL)
        used[place[hit]] = True
        without += int((~hit).sum())
        confidence.append(piece.rows["confidence"][hit])
        correct.append(piece.rows["prediction"][hit] == label[place[hit]])
    joined = {"confidence": confidence, "correct": correct}
    return {name: np.concatenate(parts) if parts else np.zeros(0) for name, parts in joined.items()}, used, without


def _figures(rows: Mapping[str, np.ndarray]) -> dict[str, Any]:
    report = calibration_report(confidence=rows["confidence"], correct=rows["correct"], ranked=False)
    return {name: report[name] for name in _FIGURES}
