"""Calibration figures for the `compute_metrics` of any Trainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from .accumulator import CalibrationAccumulator
from .binning import DEFAULT_BINS
from .inputs import IGNORED_LABEL, Rows, check_length
from .iteration import current_iteration


FLAT = ("ece", "ece_debiased", "nll", "n_zero_probability", "brier", "accuracy", "signed_gap", "n")


def calibration_metrics(*, bins: int = DEFAULT_BINS, strategy: str = "equal_width") -> Callable[..., dict[str, float]]:
    """A `compute_metrics` for any `Trainer`: calibration next to the loss, without changing how you train.

    The model's first output is taken as the logits [N, C] and `label_ids` as the classes [N] (-100 for none). It also
    serves `batch_eval_metrics=True`, `eval_do_concat_batches=False`, and what [`MoECalTrainer`] collects of a language
    model: `confidence` (of the most likely token), `correct`, `nll` and `brier`, [N, S] each, -100 where nothing is
    supervised, and `sequence`, a number for each of the sequences that share a row.

    Returns:
        `Callable`: gives `ece`, `ece_debiased`, `nll`, `n_zero_probability`, `brier`, `accuracy`, `signed_gap`, `n`.
        For a language model these are over tokens; `sequence_ece` and so on are over sequences, of which each counts
        once, with the means over its tokens: mean confidence against the share of tokens that are right.

    Example:

    ```python
    >>> import numpy as np
    >>> from hf_moecal.metrics import calibration_metrics
    >>> compute_metrics = calibration_metrics()  # Trainer(..., compute_metrics=compute_metrics)
    >>> found = compute_metrics((np.array([[2.0, 0.0], [0.0, 1.0]]), np.array([0, 1])))
    >>> found["accuracy"]
    1.0

    ```
    """
    pending: dict[str, CalibrationAccumulator] = {}
    iteration: list | None = None

    def compute_metrics(prediction: Any, compute_result: bool = True) -> dict[str, float]:
        nonlocal iteration
        if iteration is not current_iteration():
            pending.clear()  # left over from an evaluation that was interrupted
        iteration = current_iteration()
        try:
            for logits, labels in _sets(prediction):
                _add(pending, logits, labels)
            return _flat(pending, dict(bins=bins, strategy=strategy)) if compute_result else {}
        except ValueError:
            compute_result = True
            raise
        finally:
            if compute_result:
                pending.clear()

    compute_metrics.takes_figures = True
    return compute_metrics


def _sets(prediction: Any) -> list[tuple[Any, Any]]:
    """Logits and labels: one pair, or one for each batch where Trainer did not join them."""
    logits, labels = prediction if isinstance(prediction, tuple) else (prediction.predictions, prediction.label_ids)
    apart = isinstance(labels, list) and len(labels) > 0 and np.ndim(_on_cpu(labels[0])) > 0
    return list(zip(logits, labels, strict=True)) if apart else [(logits, labels)]


def _add(pending: dict[str, CalibrationAccumulator], logits: Any, labels: Any) -> None:
    """Adds a batch, or a whole set, to what is pending under each prefix."""
    if isinstance(logits, Mapping):
        tokens, sequences = _token_rows(logits)
        pending.setdefault("", CalibrationAccumulator()).add_rows(tokens)
        pending.setdefault("sequence_", CalibrationAccumulator()).add_rows(sequences)
    else:
        logits = _on_cpu(logits[0] if isinstance(logits, tuple | list) else logits)
        pending.setdefault("", CalibrationAccumulator()).add(_labels_of(_on_cpu(labels), logits), logits=logits)


def _flat(pending: Mapping[str, CalibrationAccumulator], settings: Mapping[str, Any]) -> dict[str, float]:
    reports = {prefix: rows.report(**settings, intervals=False, ranked=False) for prefix, rows in pending.items()}
    return {prefix + name: float(report[name]) for prefix, report in reports.items() for name in FLAT}


def _on_cpu(value: Any) -> Any:
    """Trainer hands over the device's tensors where it evaluates batch by batch."""
    return value.cpu() if hasattr(value, "cpu") else value


def _token_rows(figures: Mapping[str, Any]) -> tuple[Rows, Rows]:
    """Rows of the supervised tokens, and of the sequences that have any."""
    confidence, correct, nll, brier = (
        np.asarray(_on_cpu(figures[name]), np.float64) for name in ("confidence", "correct", "nll", "brier")
    )
    judged = confidence != IGNORED_LABEL
    rows, places = judged.nonzero()
    if "sequence" in figures:  # several may share a row
        shared = np.asarray(_on_cpu(figures["sequence"]))[rows, places]
        rows = np.unique(np.stack([rows, shared]), axis=1, return_inverse=True)[1].reshape(-1)
    else:
        rows = np.unique(rows, return_inverse=True)[1]
    tokens = [values[judged] for values in (confidence, correct, nll, brier)]
    count = np.bincount(rows)
    means = [np.bincount(rows, weights=values) / count for values in tokens]
    return Rows(tokens[0], tokens[1] == 1, *tokens[2:]), Rows(*means)


def _labels_of(labels: Any, logits: Any) -> Any:
    if labels is None:
        raise ValueError("the evaluation set has no labels; give the Trainer a dataset with a label column.")
    if np.ndim(logits) == 3:
        raise ValueError(
            f"logits of shape {tuple(logits.shape)} are one row per token; reduce them to [N, C] and the labels "
            "to [N] with Trainer(preprocess_logits_for_metrics=...), shifting by one for a causal language model."
        )
    check_length("labels", labels, len(logits), "logits")
    return labels
