"""What is right about a row: one class, or a distribution over the classes, such as the shares of raters' votes.

Everywhere a label is an integer tensor `[n]`, or a float tensor `[n, C]` whose rows sum to one: a *soft label*. What
is computed of a soft label is the mean of what each rater's label would give. -100 (in a soft label in all classes)
leaves a row out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .table import IGNORED_LABEL


VOTES = "votes"
"""Column with the number of raters that chose each class."""

_ROUNDING = 1e-5  # of a sum of shares in float32


def is_soft(labels: Tensor) -> bool:
    """Whether labels are distributions over the classes."""
    return labels.dim() == 2 and labels.is_floating_point()


def labelled(labels: Tensor) -> Tensor:
    """Which rows have a label, `[n]`, bool."""
    return (labels[:, 0] if labels.dim() == 2 else labels) != IGNORED_LABEL


def at_labels(values: Tensor, labels: Tensor) -> Tensor:
    """Of values of every class those of the labels; for soft labels the mean over the raters.

    Args:
        values (`Tensor` of shape `[n, C]` or `[n, k, C]`): such as log-probabilities; differentiable.
        labels (`Tensor` of shape `[n]`, int, or `[n, C]`, float): each with a label.

    Returns:
        `Tensor` of shape `[n]` or `[n, k]`.

    Example:

    ```python
    >>> import torch
    >>> from hf_moecal.labels import at_labels
    >>> values = torch.tensor([[1.0, 3.0]])
    >>> at_labels(values, torch.tensor([1])).item(), at_labels(values, torch.tensor([[0.5, 0.5]])).item()
    (3.0, 2.0)

    ```
    """
    if labels.dim() == 1:
        index = labels.view(-1, *[1] * (values.dim() - 1)).expand(*values.shape[:-1], 1)
        return values.gather(-1, index).squeeze(-1)
    shares = labels.to(values.dtype)
    if values.dim() == 3:
        shares = shares.unsqueeze(1)
    return torch.where(shares > 0, shares * values, 0.0).sum(-1)  # a class without a share may be impossible


def check_labels(labels: Tensor, num_classes: int) -> None:
    """Raises a `ValueError` that names the first label outside [0, num_classes), or that is no distribution."""
    if labels.dim() == 2:
        _check_shares(labels, num_classes)
        return
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(
            f"`labels` must be integers in [0, {num_classes}), got {labels.dtype}; cast class ids to int64."
        )
    if labels.numel() == 0:
        return
    low, high = labels.aminmax()
    if low < 0 or high >= num_classes:
        wrong = low.item() if low < 0 else high.item()
        raise ValueError(
            f"Label {wrong} is out of range for {num_classes} classes; labels must be integers in [0, {num_classes}), "
            "and the model's `num_labels` must cover them."
        )


def _check_shares(labels: Tensor, num_classes: int) -> None:
    if not labels.is_floating_point():
        raise ValueError(
            f"A label with one entry per class is a distribution of floats that sum to one, got {labels.dtype}; "
            "counts of raters belong in a column `votes`, and several right classes (multi-label) are not supported."
        )
    if labels.shape[1] != num_classes:
        raise ValueError(
            f"A label with one entry per class needs {num_classes} of them, got {labels.shape[1]}; the model's "
            "`num_labels` must be the number of classes that raters chose from."
        )
    if not len(labels):
        return
    wrong = ~((labels >= 0).all(1) & ((labels.double().sum(1) - 1).abs() <= _ROUNDING))  # NaN too
    if wrong.any():
        first = [round(share, 6) for share in labels[wrong][0].tolist()]
        raise ValueError(
            f"A soft label must be shares of at least 0 that sum to one, got {first}; divide by the sum, or give "
            "counts of raters in a column `votes`. (Several right classes, multi-label, are not supported.)"
        )


def shares_of_votes(votes: Tensor) -> Tensor:
    """Soft labels `[n, C]` from how many raters chose each class, `[n, C]`; without any vote there is no label.

    Raises:
        ValueError: votes are not counts, one for each class.
    """
    if votes.dim() != 2 or votes.dtype == torch.bool:
        raise ValueError(
            f"`votes` must hold for each row how many raters chose each class, got shape {tuple(votes.shape)} of "
            f"{votes.dtype}; classes themselves belong in a column `label`."
        )
    if not (votes >= 0).all() or not torch.equal(votes, votes.round()):  # NaN too
        row = int((~((votes >= 0) & (votes == votes.round()))).any(1).nonzero()[0])
        raise ValueError(
            f"`votes` must be counts, whole numbers of at least 0, but a row has {votes[row].tolist()}; shares belong "
            "in a column `label`."
        )
    total = votes.double().sum(1, keepdim=True)
    return torch.where(total > 0, votes / total.clamp_min(1), float(IGNORED_LABEL)).float()


def with_labels(inputs: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A batch whose labels, under whatever name, are `labels`; votes become shares."""
    if name == "labels" or name not in inputs:
        return dict(inputs)
    found = shares_of_votes(inputs[name]) if name == VOTES else inputs[name]
    return {**{other: value for other, value in inputs.items() if other not in (name, "labels")}, "labels": found}


def read_label(row: Any, classes: int | None = None) -> int | list[float]:
    """The label of one row of a data set, from its `label` (or `labels`), else its `votes`; -100 for none.

    Args:
        row (`Mapping`): the row.
        classes (`int`, *optional*): how many classes it has, where that is known.

    Raises:
        ValueError: it is neither a class nor a distribution.
    """
    label = next((row[name] for name in ("label", "labels") if row.get(name) is not None), None)
    votes = row.get(VOTES)
    if label is None and isinstance(votes, Sequence | Tensor) and not isinstance(votes, str):
        label = shares_of_votes(torch.as_tensor(votes)[None])[0].tolist()
        if label[0] == IGNORED_LABEL:
            return IGNORED_LABEL
    if label is None:
        return IGNORED_LABEL
    if hasattr(label, "tolist"):  # an array or a tensor
        label = label.tolist()
    if isinstance(label, list):
        check_labels(torch.tensor([label]), len(label) if classes is None else classes)
        return label
    if isinstance(label, bool) or int(label) != label:
        raise ValueError(
            f"label {label!r} is no index of a class (or option), and no list with the share of each; give either."
        )
    return int(label)


def read_labels(values: Sequence[Any], name: str) -> list[int] | list[list[float]]:
    """The labels in a column of that name: all of them classes, or all of them shares."""
    labels = [read_label({name: value}) for value in values]
    soft = next((label for label in labels if isinstance(label, list)), None)
    if soft is None:
        return labels
    return [label if isinstance(label, list) else [float(IGNORED_LABEL)] * len(soft) for label in labels]
