"""How the experts of a layer are called, in both forms that models have.

| weights scale | the module computes | y |
|---|---|---|
| outputs | `experts(hidden [T, H], index [T, k], weights [T, k]) -> [T, H]` | sum_k w_k E_k(h) |
| inputs (Llama 4) | `experts(rows [E * T, H]) -> [E * T, H]` | sum_k E_k(w_k h) |

In the second form the rows are every token's hidden state h for each expert, times its weight: an expert that was not
selected is given zeros, and gives zeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .routing import MoELayer, UnsupportedMoEError, bind_experts
from .sharding import unsharded


if TYPE_CHECKING:
    from .capture import ModelParts


@dataclass
class ExpertCall:
    """One call of a layer's experts: what they read, flat over the tokens, and their output as it came."""

    hidden: Tensor
    index: Tensor
    weights: Tensor
    output: Tensor

    @classmethod
    def of(
        cls, layer: MoELayer, args: tuple, kwargs: dict[str, Any], output: Tensor, given: Tensor | None, scores: Any
    ) -> ExpertCall:
        """From what a hook on the experts is given; `given` is the input of their block, `scores` as in `Capture`."""
        if not layer.scales_inputs:
            hidden, index, weights = bind_experts(layer.module, args, kwargs)
            return cls(hidden.reshape(-1, hidden.shape[-1]), index, weights, output)
        (rows,) = (*args, *kwargs.values())
        hidden = given.reshape(-1, given.shape[-1])
        for candidate in scores.values():
            shares = candidate.reshape(-1, layer.num_experts)
            if len(shares) == len(hidden) and torch.equal(_scaled(hidden, shares), rows):
                weights, index = shares.topk(layer.top_k, dim=-1)
                return cls(hidden, index, weights, output)
        raise UnsupportedMoEError(
            f"What {layer.name} was given is not its block's input times the router's scores, so the routing weights "
            "are unknown."
        )


def _scaled(hidden: Tensor, shares: Tensor) -> Tensor:
    """Every token `[T, H]` times its share for every expert, `[T, E]`, expert by expert: `[E * T, H]`."""
    return hidden.repeat(shares.shape[1], 1) * shares.transpose(0, 1).reshape(-1, 1)


def together(layer: MoELayer, output: Tensor) -> Tensor:
    """y `[T, H]` of what an experts module put out."""
    flat = output.reshape(-1, output.shape[-1])
    return flat.unflatten(0, (layer.num_experts, -1)).sum(0) if layer.scales_inputs else flat


def as_output(layer: MoELayer, mixed: Tensor, like: Tensor) -> Tensor:
    """What an experts module has to put out for y to be `mixed`, `[R, L, H]`."""
    flat = mixed.flatten(0, 1)
    if layer.scales_inputs:
        return torch.cat([flat, flat.new_zeros((layer.num_experts - 1) * len(flat), flat.shape[-1])])
    return flat if like.dim() == 2 else mixed


def replaced_at(layer: MoELayer, output: Tensor, token: Tensor, alone: Tensor) -> Tensor:
    """An experts module's output with `alone` `[H]` as y of one token."""
    flat = output.reshape(-1, output.shape[-1])
    if layer.scales_inputs:
        per_expert = flat.unflatten(0, (layer.num_experts, -1)).clone()
        per_expert[:, token] = 0
        per_expert[0, token] = alone.to(flat.dtype)
        return per_expert.flatten(0, 1)
    return flat.index_copy(0, token[None], alone[None].to(flat.dtype)).reshape(output.shape)


def run_experts(parts: ModelParts, layer: MoELayer, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """The experts' weighted output y, `[T, H]`."""
    with unsharded(parts, layer.module):
        if not layer.scales_inputs:
            return layer.module(hidden, index, weights).reshape(len(hidden), -1)
        shares = weights.new_zeros(len(hidden), layer.num_experts).scatter(-1, index, weights)
        return together(layer, layer.module(_scaled(hidden, shares)))


def consult(
    parts: ModelParts,
    layer: MoELayer,
    call: ExpertCall,
    tokens: Tensor,
    index: Tensor,
    *,
    columns: int,
    mass: Tensor | None = None,
) -> Tensor:
    """What experts put out for tokens that each has to itself: `[n, m, H]`, in one call of the experts.

    Args:
        tokens (`LongTensor` of shape `[n]`): flat positions.
        index (`LongTensor` of shape `[n, m]`): experts.
        columns (`int`): how many an index of one expert needs.
        mass (`Tensor` of shape `[n]`, *optional*): the weight that each has where weights scale inputs; one if unset.
    """
    rows, count = index.shape
    hidden = call.hidden[tokens]
    if layer.scales_inputs:  # all experts at once, as the module does it
        scale = call.weights.new_ones(rows) if mass is None else mass
        with unsharded(parts, layer.module):
            outputs = layer.module(_scaled(hidden, scale.unsqueeze(-1).expand(-1, layer.num_experts)))
        return outputs.unflatten(0, (layer.num_experts, rows))[index, torch.arange(rows, device=index.device)[:, None]]
    weights = call.weights.new_zeros(rows * count, columns)
    weights[:, 0] = 1
    ids = index.reshape(-1, 1).expand(-1, columns)
    return run_experts(parts, layer, hidden.repeat_interleave(count, dim=0), ids, weights).reshape(rows, count, -1)
