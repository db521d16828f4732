"""The calibration of a set of predictions in one call."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .accumulator import DEFAULT_BOOTSTRAP, CalibrationAccumulator
from .binning import DEFAULT_BINS, equal_mass, equal_width, gap_sums
from .inputs import as_array, check_choice, check_length, read_correct, unit_interval
from .rows import top_label


FLAT = ("ece", "ece_debiased", "nll", "brier", "accuracy", "signed_gap", "n")


def calibration_report(
    labels: Any = None,
    *,
    probs: Any = None,
    logits: Any = None,
    confidence: Any = None,
    correct: Any = None,
    predictions: Any = None,
    groups: Any = None,
    group_names: Any = None,
    intersections: bool = False,
    bins: int = DEFAULT_BINS,
    mode: str = "top_label",
    strategy: str = "equal_width",
    bootstrap: int = DEFAULT_BOOTSTRAP,
    seed: int = 0,
    ranked: bool = True,
) -> dict[str, Any]:
    """Says whether predicted probabilities can be trusted: every calibration figure, overall and for each group.

    Args:
        labels (`[N]` or `[N, C]`): reference class of each row (-100 for none: ignored and counted), or the fraction
            of raters for each class.
        probs (`[N, C]`): probabilities that sum to one; in positive-class mode also `[N]`, the probability of class 1.
        logits (`[N, C]`): scores before the softmax, instead of `probs`; in positive-class mode also `[N]`.
        confidence (`[N]`): probability of the predicted class (in positive-class mode: of class 1), instead of
            `probs`. It goes with `correct`, or with `labels` and `predictions`.
        correct (`[N]`): 0 or 1, or the fraction of raters who agree.
        predictions (`[N]`): predicted class, to compare with `labels`.
        groups (`[N]`, or a mapping of such columns): name of each row's group.
        group_names (`list`, or a mapping of lists): the groups that exist, see [`CalibrationAccumulator`].
        intersections (`bool`): also every combination of two group columns.
        bins (`int`): number of bins.
        mode (`str`): `"top_label"` (is the winner right as often as it says?), `"classwise"` (the same for every
            class, averaged), or `"positive_class"` (two classes: does class 1 occur as often as it says?).
        strategy (`str`): `"equal_width"` or `"equal_mass"` bins.
        bootstrap (`int`): resamples for the interval; 0 for none.
        seed (`int`): seed of the resampling.
        ranked (`bool`): also the figures that need sorting (`aurc`, `auroc`, `smooth_ece`).

    Returns:
        `dict`: plain numbers, lists and dicts. `ece`; `ece_l2`, `ece_max`; `ece_debiased`, `ece_l2_debiased`;
        `ece_interval` (95 %); `ece_noise_floor` (what a perfectly calibrated model would score with as many rows);
        `signed_gap` (confidence minus accuracy) and `signed_gap_interval`; `accuracy`, `confidence`, `nll` (nats),
        `brier`, `brier_decomposition`, `aurc`, `auroc`, `n`, `n_ignored`. With groups also `groups` (the same by
        name), `worst_group`, `worst_group_ece`, `group_spread`. Figures that the input cannot give are NaN.

    Raises:
        ValueError: input of a wrong shape, type or value; the message says which and what to do.

    Example:

    ```python
    >>> from hf_moecal.metrics import calibration_report
    >>> report = calibration_report([0, 1, 1], probs=[[0.8, 0.2], [0.3, 0.7], [0.6, 0.4]])
    >>> round(report["ece"], 3), report["n"]
    (0.367, 3)

    ```
    """
    accumulator = CalibrationAccumulator(mode=mode, intersections=intersections, group_names=group_names)
    accumulator.add(
        labels,
        probs=probs,
        logits=logits,
        confidence=confidence,
        correct=correct,
        predictions=predictions,
        groups=groups,
    )
    return accumulator.report(bins=bins, strategy=strategy, bootstrap=bootstrap, seed=seed, ranked=ranked)


def expected_calibration_error(
    labels: Any = None,
    *,
    probs: Any = None,
    logits: Any = None,
    confidence: Any = None,
    correct: Any = None,
    bins: int = DEFAULT_BINS,
    strategy: str = "equal_width",
) -> float:
    """Only the top-label calibration error (`ece` of [`calibration_report`]), nearly as fast as the data can be read.

    Example:

    ```python
    >>> from hf_moecal.metrics import expected_calibration_error
    >>> expected_calibration_error(confidence=[1.0, 1.0], correct=[1, 0])
    0.5

    ```
    """
    check_choice("strategy", strategy, ("equal_width", "equal_mass"))
    if confidence is not None:
        confidence = as_array("confidence", confidence)
        event = read_correct(correct, len(confidence))
    else:
        confidence, event = top_label(labels, probs, logits)
    if strategy == "equal_mass":
        confidence = unit_interval("confidence", confidence)
    edges = equal_width(bins) if strategy == "equal_width" else equal_mass(confidence, bins)
    return float(np.abs(gap_sums(confidence, event, edges, check=True)).sum() / len(confidence))


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


def metric_path(name: str = "ece") -> str:
    """Path of an installed metric for `evaluate.load`.

    Raises:
        ValueError: there is no metric of that name.

    Example:

    ```python
    >>> from hf_moecal.metrics import metric_path
    >>> metric_path("ece").endswith("ece")
    True

    ```
    """
    folder = Path(__file__).parent / str(name)
    if not (folder / f"{name}.py").is_file():
        raise ValueError(f"no metric {name!r}; there is 'ece'.")
    return str(folder)
