"""The probe's independent twin: full forwards in which one token's routing is overridden."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_moecal import MoELayer


@contextmanager
def rerouted(layer: MoELayer, token: int, expert: int) -> Iterator[None]:
    """One token's whole routing mass goes to one expert."""

    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        hidden, index, weights = (*args, *kwargs.values())
        index, weights = index.clone(), weights.clone()
        mass = weights[token].sum()
        index[token], weights[token] = expert, 0
        weights[token, 0] = mass
        return (hidden, index, weights), {}

    def scaled_hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        rows = args[0].clone().unflatten(0, (layer.num_experts, -1))
        scaled = rows[:, token].sum(0)  # the token's hidden state times all of its weights
        rows[:, token] = 0
        rows[expert, token] = scaled
        return (rows.flatten(0, 1),), {}

    chosen = scaled_hook if layer.scales_inputs else hook
    handle = layer.module.register_forward_pre_hook(chosen, with_kwargs=True)
    yield
    handle.remove()


def brute_force(model: nn.Module, layer: MoELayer, inputs: dict, tokens: Tensor, ids: Tensor) -> Tensor:
    """Logits `[n, k, V]` from one full forward per token and expert."""
    rows = []
    for token, experts in zip(tokens.tolist(), ids.tolist(), strict=True):
        for expert in experts:
            with rerouted(layer, token, expert):
                logits = model(**inputs).logits
            pooled = logits.dim() == 2
            rows.append(logits[token // inputs["input_ids"].shape[1]] if pooled else logits.flatten(0, 1)[token])
    return torch.stack(rows).unflatten(0, ids.shape)
