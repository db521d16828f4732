"""Reduction of a batch to one (confidence, event, score) per example, and of group columns to small integers."""

from __future__ import annotations

from typing import Any

import numpy as np

from .inputs import (
    IGNORED_LABEL,
    Rows,
    as_array,
    check_length,
    probability_chunks,
    read_correct,
    read_labels,
    read_weights,
    top_of_probs,
    unit_interval,
)


def reduce_batch(
    labels: Any,
    *,
    probs: Any = None,
    logits: Any = None,
    confidence: Any = None,
    correct: Any = None,
    predictions: Any = None,
    nll: Any = None,
    brier: Any = None,
    mode: str = "top_label",
    renormalize: bool = False,
    sample_weight: Any = None,
) -> tuple[Rows, np.ndarray]:
    """One batch as [`Rows`], and the mask of the examples that had a label and a weight (the others are left out).

    Raises:
        ValueError: the combination of arguments, a shape, a type or a value is wrong.
    """
    given = {"probs": probs, "logits": logits, "confidence": confidence, "correct": correct}
    rows, kept = _unweighted(
        labels, **given, predictions=predictions, nll=nll, brier=brier, mode=mode, renormalize=renormalize
    )
    if sample_weight is None:
        return rows, kept
    weight = read_weights(sample_weight, len(kept))
    heavy = weight > 0
    return keep(rows._replace(weight=weight[kept]), heavy[kept]), kept & heavy


def _unweighted(
    labels: Any,
    *,
    probs: Any,
    logits: Any,
    confidence: Any,
    correct: Any,
    predictions: Any,
    nll: Any,
    brier: Any,
    mode: str,
    renormalize: bool,
) -> tuple[Rows, np.ndarray]:
    given = [
        name for name, value in (("probs", probs), ("logits", logits), ("confidence", confidence)) if value is not None
    ]
    if len(given) != 1:
        raise ValueError(
            f"give exactly one of probs, logits and confidence, got {', '.join(given) or 'none of them'}."
        )
    if given == ["confidence"]:
        return _with_scores(*_from_confidence(labels, confidence, correct, predictions, mode), nll, brier)
    only = {"correct": correct, "predictions": predictions, "nll": nll, "brier": brier}
    extra = [name for name, value in only.items() if value is not None]
    if extra:
        raise ValueError(f"{extra[0]} goes with confidence, not with {given[0]}; give labels instead.")
    if labels is None:
        raise ValueError(f"labels are missing; {given[0]} needs the reference class of each row.")
    scores = as_array(given[0], probs if logits is None else logits, ndim=(1, 2) if mode == "positive_class" else (2,))
    if mode == "positive_class":
        return _positive_class(labels, given[0], scores, renormalize)
    if scores.shape[1] < 2:
        raise ValueError(
            f"{given[0]} has one column; two classes or more are needed, or mode='positive_class' with a 1-D array."
        )
    return _multiclass(labels, given[0], scores, mode, renormalize)


def top_label(
    labels: Any, probs: Any, logits: Any = None, *, renormalize: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Confidence and correctness of the winner alone, and which rows had a label, in one pass over the data."""
    name, scores = ("probs", probs) if logits is None else ("logits", logits)
    scores = as_array(name, scores, ndim=(2,))
    references = read_labels(labels, n=len(scores), classes=scores.shape[1], what=name, renormalize=renormalize)
    if logits is None and not renormalize:
        confidence, winner = top_of_probs(scores)
    else:
        tops = [(chunk[np.arange(len(top)), top], top) for _, chunk, _, top in _chunks(name, scores, renormalize)]
        confidence, winner = (np.concatenate(parts) for parts in zip(*tops, strict=True))
    np.minimum(confidence, 1.0, out=confidence)
    if references.ndim == 2:
        return confidence, references[np.arange(len(winner)), winner], np.ones(len(winner), dtype=bool)
    event = winner == references
    kept = references != IGNORED_LABEL
    return (confidence, event, kept) if kept.all() else (confidence[kept], event[kept], kept)


def softmax(logits: Any) -> np.ndarray:
    """Probabilities [N, C] in float64 of logits [N, C], checked."""
    scores = as_array("logits", logits, ndim=(2,))
    return np.concatenate([chunk for _, chunk, _, _ in probability_chunks(None, scores)])


def _chunks(name: str, scores: np.ndarray, renormalize: bool):
    return probability_chunks(*((scores, None) if name == "probs" else (None, scores)), renormalize=renormalize)


def _multiclass(labels: Any, name: str, scores: np.ndarray, mode: str, renormalize: bool) -> tuple[Rows, np.ndarray]:
    n, classes = scores.shape
    references = read_labels(labels, n=n, classes=classes, what=name, renormalize=renormalize)
    confidence, event, nll, brier = (np.empty(n) for _ in range(4))
    table = np.empty((n, classes)) if mode == "classwise" else None
    for rows, chunk, logs, top in _chunks(name, scores, renormalize):
        chunk = chunk.astype(np.float64, copy=False)
        reference = references[rows]
        confidence[rows] = np.minimum(chunk[np.arange(len(top)), top], 1.0)
        with np.errstate(divide="ignore"):
            logs = np.log(chunk) if logs is None and reference.ndim == 2 else logs
        event[rows], nll[rows], cross = _scores_of_chunk(chunk, logs, reference, top)
        brier[rows] = np.einsum("ij,ij->i", chunk, chunk) - 2.0 * cross + 1.0
        if table is not None:
            table[rows] = np.minimum(chunk, 1.0)
    kept = np.ones(n, dtype=bool) if references.ndim == 2 else references != IGNORED_LABEL
    events = None
    if table is not None:
        events = references if references.ndim == 2 else references[:, None] == np.arange(classes)
    rows = Rows(confidence, event if references.ndim == 2 else event.astype(bool), nll, brier, table, events)
    return keep(rows, kept), kept


def _scores_of_chunk(
    chunk: np.ndarray, logs: np.ndarray | None, reference: np.ndarray, top: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Event, negative log-likelihood, and the probability given to the reference (its mean over raters)."""
    at = np.arange(len(top))
    if reference.ndim == 2:  # the mean over the raters of what each rater's label would have scored
        nll = -np.where(reference > 0.0, reference * np.where(reference > 0.0, logs, 0.0), 0.0).sum(1)
        return reference[at, top], nll, np.einsum("ij,ij->i", chunk, reference)
    known = np.where(reference == IGNORED_LABEL, 0, reference)
    cross = chunk[at, known]
    with np.errstate(divide="ignore"):
        nll = -np.log(cross) if logs is None else -logs[at, known]
    return top == reference, nll, cross


def _positive_class(labels: Any, name: str, scores: np.ndarray, renormalize: bool) -> tuple[Rows, np.ndarray]:
    if scores.ndim == 2 and scores.shape[1] != 2:
        raise ValueError(
            f"mode='positive_class' is for two classes, but {name} has {scores.shape[1]} columns; "
            "use mode='top_label' or mode='classwise', or pass the column of one class."
        )
    if scores.ndim == 1 and name == "logits":
        scores = np.stack([np.zeros(len(scores)), scores.astype(np.float64)], 1)
    if scores.ndim == 2:
        rows, kept = _multiclass(labels, name, scores, "classwise", renormalize)
        event = rows.events[:, 1]
        return Rows(rows.scores[:, 1].copy(), event.copy(), rows.nll, rows.brier / 2.0), kept
    confidence = unit_interval(name, scores, hint=" Scores before the sigmoid go into logits.")
    return _binary(labels, confidence, name)


def _binary(labels: Any, confidence: np.ndarray, what: str) -> tuple[Rows, np.ndarray]:
    references = read_labels(labels, n=len(confidence), classes=2, what=what)
    if references.ndim == 2:
        event, kept = references[:, 1], np.ones(len(confidence), dtype=bool)
    else:
        event, kept = references == 1, references != IGNORED_LABEL
    return keep(_binary_rows(confidence, event), kept), kept


def _binary_rows(confidence: np.ndarray, event: np.ndarray) -> Rows:
    with np.errstate(divide="ignore"):
        hit, miss = np.log(confidence), np.log1p(-confidence)
    nll = -(np.where(event > 0, event * np.where(event > 0, hit, 0.0), 0.0))
    nll -= np.where(event < 1, (1.0 - event) * np.where(event < 1, miss, 0.0), 0.0)
    return Rows(confidence, event, nll, confidence**2 - 2.0 * confidence * event + event)


def _from_confidence(
    labels: Any, confidence: Any, correct: Any, predictions: Any, mode: str
) -> tuple[Rows, np.ndarray]:
    if mode == "classwise":
        raise ValueError(
            "mode='classwise' needs the probability of every class; give probs or logits, not confidence."
        )
    confidence = unit_interval("confidence", as_array("confidence", confidence))
    n = len(confidence)
    if correct is not None:
        if labels is not None or predictions is not None:
            raise ValueError("correct already says what is right; give either correct, or labels, not both.")
        event = read_correct(correct, n)
        if mode == "positive_class":
            return _binary_rows(confidence, event), np.ones(n, dtype=bool)
        return _confidence_rows(confidence, event), np.ones(n, dtype=bool)
    if labels is None:
        raise ValueError("confidence alone says nothing about calibration; give correct, or labels and predictions.")
    if mode == "positive_class":
        if predictions is not None:
            raise ValueError("mode='positive_class' needs no predictions: confidence is the probability of class 1.")
        return _binary(labels, confidence, "confidence")
    if predictions is None:
        raise ValueError(
            "top-label confidence needs correct, or predictions to compare with labels; "
            "if confidence is the probability of class 1, say mode='positive_class'."
        )
    winner = as_array("predictions", predictions)
    check_length("predictions", winner, n, "confidence")
    if winner.dtype.kind == "f" or winner.min() < 0:
        raise ValueError("predictions must be class indices of 0 or more; probabilities go into probs.")
    references = read_labels(labels, n=n, classes=None, what="confidence")
    kept = references != IGNORED_LABEL
    return keep(_confidence_rows(confidence, winner == references), kept), kept


def _with_scores(rows: Rows, kept: np.ndarray, nll: Any, brier: Any) -> tuple[Rows, np.ndarray]:
    """The rows with the scores that whoever had the whole distribution computed from it."""
    given = {"nll": nll, "brier": brier}
    for name, value in given.items():
        if value is None:
            continue
        scores = as_array(name, value)
        check_length(name, scores, len(kept), "confidence")
        scores = scores[kept].astype(np.float64)
        if not (scores >= 0).all():  # NaN too
            row = int(np.flatnonzero(kept)[np.flatnonzero(~(scores >= 0))[0]])
            raise ValueError(f"{name} must be numbers of 0 or more, but row {row} holds {value[row]}.")
        rows = rows._replace(**{name: scores})
    return rows, kept


def _confidence_rows(confidence: np.ndarray, event: np.ndarray) -> Rows:
    unknown = np.full(len(confidence), np.nan)  # the likelihood of the reference needs the whole distribution
    return Rows(confidence, event, unknown, unknown)


def keep(rows: Rows, mask: np.ndarray) -> Rows:
    """The rows of a mask; the very same arrays where the mask keeps everything."""
    return rows if mask.all() else rows.take(mask)
