"""The router's distribution over all experts, of which a sparse layer uses only the largest entries."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .routing import RoutingRecord, UnsupportedMoEError, upcast


# What families make of a router's scores before they weight the experts; normalised over the selected ones.
_LINKS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda scores: scores.softmax(-1),
    "sigmoid": torch.sigmoid,
    "identity": lambda scores: scores.clamp_min(0),
    "sqrtsoftplus": lambda scores: torch.nn.functional.softplus(scores).sqrt(),
}


def full_shares(candidates: list[Tensor], record: RoutingRecord, num_experts: int, real: Tensor) -> Tensor:
    """Shares of all experts, `[T, E]`, each row summing to one.

    The scores are looked for among what the layer's modules computed before its experts ran, and taken only with a
    link under which they give the very weights that the model used.

    Args:
        candidates (`list[Tensor]`): outputs with one column per expert.
        record (`RoutingRecord`): the weights that the model used.
        num_experts (`int`): E.
        real (`LongTensor`): flat positions of the tokens on which to check.

    Raises:
        UnsupportedMoEError: no candidate explains the weights.
    """
    tokens = len(record.expert_ids)
    checked = record[real]
    for scores in candidates:
        if scores.numel() != tokens * num_experts:
            continue
        tolerance = 1e-4 if scores.dtype in (torch.float32, torch.float64) else 16 * torch.finfo(scores.dtype).eps
        for link in _LINKS.values():
            values = link(upcast(scores.reshape(tokens, num_experts)))
            if _explains(values[real].detach(), checked, tolerance):
                return values / values.sum(-1, keepdim=True)
    raise UnsupportedMoEError(
        f"No module gives scores over all {num_experts} experts that explain the routing weights, so the router's "
        'full distribution is unknown; use experts="selected" or "all".'
    )


def _explains(values: Tensor, record: RoutingRecord, tolerance: float) -> bool:
    chosen, shares = values.gather(-1, record.expert_ids), record.shares.detach()
    if shares.shape[-1] > 1:
        return bool(((chosen / chosen.sum(-1, keepdim=True)) - shares).abs().max() <= tolerance)
    # One expert has all of the share; its weight must then be one multiple of the value everywhere.
    ratio = upcast(record.weights.detach()) / chosen
    return len(ratio) > 1 and bool((ratio.max() - ratio.min()) <= tolerance * ratio.abs().max())
