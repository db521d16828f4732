"""How experts' own predictions differ from the model's (arXiv:2606.20544): pure functions on logits."""

from __future__ import annotations

import torch
from torch import Tensor

from ..labels import at_labels, check_labels
from ..table import ABSENT_LOGIT, IGNORED_LABEL
from .routing import upcast


def disagreement(logits: Tensor, expert_logits: Tensor, shares: Tensor) -> Tensor:
    """sum_k r_k ||p^(k) - p||^2 over class probabilities, between 0 and 2.

    Args:
        logits (`Tensor` of shape `[n, C]`): the model's.
        expert_logits (`Tensor` of shape `[n, k, C]`): each expert's own.
        shares (`Tensor` of shape `[n, k]`): r_k, summing to one over k.

    Returns:
        `Tensor` of shape `[n]`.

    Example:

    ```python
    >>> import torch
    >>> from hf_moecal.probes.agreement import disagreement
    >>> experts = torch.tensor([[[9.0, -9.0], [-9.0, 9.0]]])  # two experts, each sure of another class
    >>> round(disagreement(torch.zeros(1, 2), experts, torch.tensor([[0.5, 0.5]])).item(), 6)
    0.5

    ```
    """
    return _disagreement(_log_probs(logits), _log_probs(expert_logits), shares)


def _disagreement(log_probs: Tensor, expert_log_probs: Tensor, shares: Tensor) -> Tensor:
    gap = expert_log_probs.exp() - log_probs.exp().unsqueeze(1)
    return (shares * gap.square().sum(-1)).sum(-1)


def regret(logits: Tensor, expert_logits: Tensor, labels: Tensor) -> Tensor:
    """relu(l - min_k l^(k)) in nats: what the best expert alone would have saved.

    Args:
        logits (`Tensor` of shape `[n, C]`): the model's.
        expert_logits (`Tensor` of shape `[n, k, C]`): each expert's own.
        labels (`Tensor` of shape `[n]`, int, or `[n, C]`, float): the true classes, or shares that sum to one. The
            loss of a soft label is -sum_c q_c log p_c, and the best expert that of all its raters together.

    Returns:
        `Tensor` of shape `[n]`.

    Raises:
        ValueError: a label is no class and no distribution.
    """
    return _regret(_log_probs(logits), _log_probs(expert_logits), labels)


def _regret(log_probs: Tensor, expert_log_probs: Tensor, labels: Tensor) -> Tensor:
    return (_losses(log_probs, labels) + at_labels(expert_log_probs, labels).amax(-1)).relu()


def disagreement_and_regret(
    logits: Tensor, expert_logits: Tensor, shares: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """[`disagreement`] and [`regret`], `[n]` each, with one softmax for both."""
    log_probs, expert_log_probs = _log_probs(logits), _log_probs(expert_logits)
    return _disagreement(log_probs, expert_log_probs, shares), _regret(log_probs, expert_log_probs, labels)


def among(logits: Tensor, candidates: Tensor) -> Tensor:
    """The logits of some classes of each row.

    Args:
        logits (`Tensor` of shape `[n, V]` or `[n, k, V]`): of all classes.
        candidates (`LongTensor` of shape `[n, C]`): the classes; -100 stands for none, and has probability zero.

    Returns:
        `Tensor` of shape `[n, C]` or `[n, k, C]`.
    """
    if logits.dim() == 3:
        candidates = candidates[:, None].expand(-1, logits.shape[1], -1)
    absent = candidates == IGNORED_LABEL
    return upcast(logits.gather(-1, candidates.masked_fill(absent, 0))).masked_fill(absent, ABSENT_LOGIT)


def losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy in nats of logits `[n, C]` and labels `[n]` (soft: `[n, C]`): `[n]`."""
    return _losses(_log_probs(logits), labels)


def _losses(log_probs: Tensor, labels: Tensor) -> Tensor:
    if labels.dim() == 2:
        check_labels(labels, log_probs.shape[-1])
    elif not 0 <= int(labels.min()) <= int(labels.max()) < log_probs.shape[-1]:
        raise ValueError(
            f"Labels are classes 0 to {log_probs.shape[-1] - 1}, got {int(labels.min())} to {int(labels.max())}; "
            "leave out the tokens that have no label."
        )
    return -at_labels(log_probs, labels)


def first_order_regret(gradient: Tensor, change: Tensor) -> Tensor:
    """relu(max_k -g . (S E_k - y)): the regret as far as the loss is linear in the experts' output.

    Args:
        gradient (`Tensor` of shape `[n, H]`): g, of the loss with respect to the experts' output.
        change (`Tensor` of shape `[n, k, H]`): S E_k - y.

    Returns:
        `Tensor` of shape `[n]`, in nats.
    """
    return -torch.einsum("nh,nkh->nk", upcast(gradient), upcast(change)).amin(-1).clamp_max(0)


def _log_probs(logits: Tensor) -> Tensor:
    if logits.shape[-1] < 2:
        raise ValueError(
            "The probe compares class probabilities, and a model with one output has none; set num_labels >= 2."
        )
    return upcast(logits).log_softmax(-1)
