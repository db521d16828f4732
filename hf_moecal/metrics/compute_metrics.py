"""Calibration figures for the `compute_metrics` of any Trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .accumulator import CalibrationAccumulator
from .binning import DEFAULT_BINS
from .inputs import check_length


FLAT = ("ece", "ece_debiased", "nll", "brier", "accuracy", "signed_gap", "n")


def calibration_metrics(*, bins: int = DEFAULT_BINS, strategy: str = "equal_width") -> Callable[..., dict[str, float]]:
    """A `compute_metrics` for any `Trainer`: calibration next to the loss, without changing how you train.

    The model's first output is taken as the logits [N, C] and `label_ids` as the classes [N] (-100 for none). It also
    serves `batch_eval_metrics=True`.

    Returns:
        `Callable`: gives `ece`, `ece_debiased`, `nll`, `brier`, `accuracy`, `signed_gap` and `n`.

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
    pending = [CalibrationAccumulator()]

    def compute_metrics(prediction: Any, compute_result: bool = True) -> dict[str, float]:
        logits, labels = (
            prediction if isinstance(prediction, tuple) else (prediction.predictions, prediction.label_ids)
        )
        logits = logits[0] if isinstance(logits, tuple | list) else logits
        pending[0].add(_labels_of(labels, logits), logits=logits)
        if not compute_result:
            return {}
        accumulator, pending[0] = pending[0], CalibrationAccumulator()
        report = accumulator.report(bins=bins, strategy=strategy, bootstrap=0, ranked=False)
        return {name: float(report[name]) for name in FLAT}

    return compute_metrics


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
