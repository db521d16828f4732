"""The calibration of a set of predictions in one call."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np

from ..table import columns, names
from .accumulator import CalibrationAccumulator
from .binning import DEFAULT_BINS, equal_mass, equal_width, gap_sums
from .groups import column_groups
from .inputs import as_array, check_choice, read_correct, read_weights, unit_interval
from .rounding import renormalized
from .rows import top_label


def calibration_report(
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
    group_names: Any = None,
    intersections: bool = False,
    bins: int = DEFAULT_BINS,
    mode: str = "top_label",
    strategy: str = "equal_width",
    intervals: bool = True,
    ranked: bool = True,
    renormalize: bool = False,
    sample_weight: Any = None,
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
        nll, brier (`[N]`): with `confidence`, scores of each row that were computed where the whole distribution was.
        groups (`[N]`, or a mapping of such columns): name of each row's group.
        group_names (`list`, or a mapping of lists): the groups that exist, see [`CalibrationAccumulator`].
        intersections (`bool`): also every combination of two group columns.
        bins (`int`): number of bins.
        mode (`str`): `"top_label"` (is the winner right as often as it says?), `"classwise"` (the same for every
            class, averaged), or `"positive_class"` (two classes: does class 1 occur as often as it says?).
        strategy (`str`): `"equal_width"` or `"equal_mass"` bins.
        intervals (`bool`): also intervals and p-values. They are worked out, not drawn: there is no seed.
        ranked (`bool`): also the figures that need sorting (`aurc`, `auroc`, `smooth_ece`).
        renormalize (`bool`): divide each row of `probs` (and of soft labels) by its sum: for values that were written
            with few decimals. Those of bfloat16 and float16 are taken as they are, in whatever type they come.
        sample_weight (`[N]`): how much each row counts in every figure, as if it were there that many times; rows of
            weight 0 are ignored and counted. Intervals and p-values count rows, not weights: they are those of
            `(sum w)^2 / sum w^2` rows.

    Returns:
        `dict`: plain numbers, lists and dicts. `ece`; `ece_l2`, `ece_max`; `ece_debiased`, `ece_l2_debiased`;
        `ece_interval`, 95 % for the error that `ece` and `ece_debiased` estimate, that of the population under these
        bins; `calibrated_p`, the chance that a calibrated model would show as much against itself; `ece_noise_floor`,
        what it would score on average; `signed_gap` (confidence minus accuracy) and `signed_gap_interval`;
        `accuracy`, `confidence`, `nll` (nats), `n_zero_probability` (labels that had probability 0: `nll` is infinite
        then), `brier` (sum over the classes, 0 to 2; in positive-class mode of class 1, 0 to 1),
        `brier_decomposition` (Murphy's terms, in the same units), `aurc`, `auroc`, `n`, `n_ignored`. With groups also
        `groups` (the same by name), `group_p` (`calibrated_p` corrected by Holm for the number of groups),
        `worst_group` (of those below .05 the one whose interval starts highest, `None` where no group stands out),
        `worst_group_ece`, `group_spread`. Of equal maxima the first class is the winner. Figures that the input
        cannot give are NaN.

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
        nll=nll,
        brier=brier,
        groups=groups,
        renormalize=renormalize,
        sample_weight=sample_weight,
    )
    return accumulator.report(bins=bins, strategy=strategy, intervals=intervals, ranked=ranked)


def expected_calibration_error(
    labels: Any = None,
    *,
    probs: Any = None,
    logits: Any = None,
    confidence: Any = None,
    correct: Any = None,
    bins: int = DEFAULT_BINS,
    strategy: str = "equal_width",
    renormalize: bool = False,
    sample_weight: Any = None,
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
        kept = np.ones(len(confidence), dtype=bool)
    else:
        confidence, event, kept = top_label(labels, probs, logits, renormalize=renormalize)
    if strategy == "equal_mass":
        confidence = unit_interval("confidence", confidence)
    weight, total = None, len(confidence)
    if sample_weight is not None:
        weight = read_weights(sample_weight, len(kept))[kept]
        confidence, event, weight = confidence[weight > 0], event[weight > 0], weight[weight > 0]
        total = weight.sum()
    edges = equal_width(bins) if strategy == "equal_width" else equal_mass(confidence, bins, weight)
    return float(np.abs(gap_sums(confidence, event, edges, weight, check=True)).sum() / total)


def table_report(
    table: Any,
    *,
    groups: str | Sequence[str] | None = None,
    routing: Sequence[str] = (),
    routing_bins: int = 4,
    **options: Any,
) -> dict[str, Any]:
    """The calibration of a predictions table, by its groups and by how its examples were routed.

    Args:
        table (`datasets.Dataset` or mapping of columns): predictions, see `hf_moecal.table`.
        groups (`str` or list): group columns; by default the column `group` if there is one.
        routing (list of `str`): also group by these, see [`routing_groups`].
        routing_bins (`int`): groups for each numeric routing column.
        **options: further arguments of [`calibration_report`], such as `bins` or `mode`.

    Returns:
        `dict`: as [`calibration_report`]. From `probs`, else from `logits`, else from `confidence` with `correct` or
        `prediction`; see [`table_scores`].

    Raises:
        ValueError: the table lacks a column, or holds a value that is not usable.

    Example:

    ```python
    >>> from hf_moecal.metrics import table_report
    >>> table = {"label": [0, 1], "probs": [[0.9, 0.1], [0.2, 0.8]], "disagreement": [0.0, 0.3]}
    >>> list(table_report(table, routing=["disagreement"], routing_bins=2)["groups"])
    ['disagreement=1/2: 0 to 0', 'disagreement=2/2: 0.3 to 0.3']

    ```
    """
    given, kept = table_scores(table)
    grouped = column_groups(table, groups, routing, routing_bins)
    grouped = None if grouped is None else {name: list(compress(values, kept)) for name, values in grouped.items()}
    if grouped and list(grouped) == ["group"]:
        grouped = grouped["group"]
    report = calibration_report(**given, groups=grouped, **options)
    return {**report, "n_ignored": report["n_ignored"] + int(len(kept) - kept.sum())}


def renormalized_table(table: Any) -> Any:
    """The table with each row of its `probs` divided by its sum, which writing them with few decimals has moved.

    Raises:
        ValueError: there is no column `probs`, or rounding does not explain how far a sum is from one.

    Example:

    ```python
    >>> from hf_moecal.metrics import renormalized_table
    >>> renormalized_table({"label": [0], "probs": [[0.2, 0.79]]})["probs"].round(3).tolist()
    [[0.202, 0.798]]

    ```
    """
    probs = renormalized("probs", as_array("probs", columns(table, "probs")["probs"], ndim=(2,)))
    if hasattr(table, "add_column"):
        return table.remove_columns("probs").add_column("probs", probs.tolist())
    return {**{name: table[name] for name in names(table)}, "probs": probs}


def table_scores(table: Any) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """What [`calibration_report`] is given of a predictions table, and the mask of the rows that this is about.

    These are `probs`, else `logits`, with `label`; else `confidence` with `correct` (NaN where that is not known), or
    with `prediction` and `label`, and with the `nll` and `brier` of each row where the table has both. Its
    `sample_weight` goes along.

    Raises:
        ValueError: a column is missing, or for no row it is known whether the prediction is right.
    """
    present = names(table)
    source = next((name for name in ("probs", "logits") if name in present), None)
    weight = ["sample_weight"] if "sample_weight" in present else []
    if source:
        read = columns(table, "label", source, *weight)
        return {"labels": read.pop("label"), **read}, np.ones(len(columns(table, "label")["label"]), dtype=bool)
    scores = [*row_scores(table), *weight]
    wanted = ["correct"] if "correct" in present else ["prediction", "label"]
    read = columns(table, "confidence", *wanted, *scores)
    kept = np.ones(len(read["confidence"]), dtype=bool)
    if "correct" in read:
        correct = as_array("correct", read["correct"])
        kept = ~np.isnan(correct) if correct.dtype.kind == "f" else kept
        if not kept.any():
            raise ValueError(
                "For no row of the table it is known whether it is `correct`: there is nothing to measure."
            )
        read = {name: values[kept] for name, values in read.items()}
    called = {"prediction": "predictions", "label": "labels"}
    return {called.get(name, name): values for name, values in read.items()}, kept


def row_scores(table: Any) -> list[str]:
    """The columns with scores of each row's whole distribution: both, or none (one alone may be of something else)."""
    both = ["nll", "brier"]
    return both if set(both) <= set(names(table)) else []


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
