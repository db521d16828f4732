"""The routers, and their distribution over all experts, of which a sparse layer uses only the largest entries."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .routing import MoELayer, RoutingRecord, UnsupportedMoEError, find_moe_layers, upcast


# What families make of a router's scores before they weight the experts; normalised over the selected ones.
_LINKS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda scores: scores.softmax(-1),
    "sigmoid": torch.sigmoid,
    "identity": lambda scores: scores.clamp_min(0),
    "sqrtsoftplus": lambda scores: torch.nn.functional.softplus(scores).sqrt(),
}


def find_routers(model: nn.Module) -> dict[str, nn.Module]:
    """The router of each MoE layer, by its qualified name, in the order of the layers.

    It is the module beside the experts that holds what the model's class declares as the source of its
    `router_logits`, or, where the class declares nothing, a matrix with one row per expert.

    Args:
        model (`nn.Module`): a transformers MoE model, also under PEFT.

    Raises:
        UnsupportedMoEError: the model has no MoE layer, or the router of one cannot be told from its neighbours.

    Example:

    ```python
    >>> from transformers import MixtralConfig, MixtralForCausalLM
    >>> from hf_moecal.probes.router import find_routers
    >>> config = MixtralConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    ...     num_attention_heads=2, num_key_value_heads=1, num_local_experts=4)
    >>> list(find_routers(MixtralForCausalLM(config)))
    ['model.layers.0.mlp.gate', 'model.layers.1.mlp.gate']

    ```
    """
    declared = tuple(declared_classes(model, "router_logits"))
    return dict(_find_router(model, layer, declared) for layer in find_moe_layers(model))


def declared_classes(model: nn.Module, output: str) -> set[type]:
    """Classes of a model's own from whose modules transformers takes an output, such as `"attentions"`."""
    found = set()
    for module in model.modules():
        source = (getattr(type(module), "_can_record_outputs", None) or {}).get(output)
        for recorder in source if isinstance(source, list) else [source]:
            found.add(getattr(recorder, "target_class", recorder))
    return {kind for kind in found if isinstance(kind, type) and not kind.__module__.startswith("torch.")}


def _find_router(model: nn.Module, layer: MoELayer, declared: tuple[type, ...]) -> tuple[str, nn.Module]:
    def scores_experts(module: nn.Module) -> bool:
        if declared:
            return isinstance(module, declared)
        return any(p.dim() == 2 and len(p) == layer.num_experts for p in module.parameters(recurse=False))

    block = layer.name.rpartition(".")[0]
    while block:
        children = model.get_submodule(block).named_children()
        near = [(f"{block}.{name}", child) for name, child in children]
        near = [(name, child) for name, child in near if not f"{layer.name}.".startswith(f"{name}.")]
        found = [(name, child) for name, child in near if any(map(scores_experts, child.modules()))]
        if len(found) == 1:
            return found[0]
        if found or not declared:  # a matrix of this shape further from the experts may be anything
            break
        block = block.rpartition(".")[0]
    raise UnsupportedMoEError(
        f"The router of {layer.name} cannot be told from the modules beside it, so routers cannot be trained alone or "
        "balanced; choose another `train` preset and set router_aux_loss_coef=0."
    )


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
        'full distribution is unknown; use experts="selected" or "all", or readout="mixture".'
    )


def _explains(values: Tensor, record: RoutingRecord, tolerance: float) -> bool:
    chosen, shares = values.gather(-1, record.expert_ids), record.shares.detach()
    if shares.shape[-1] > 1:
        return bool(((chosen / chosen.sum(-1, keepdim=True)) - shares).abs().max() <= tolerance)
    # One expert has all of the share; its weight must then be one multiple of the value everywhere.
    ratio = upcast(record.weights.detach()) / chosen
    return len(ratio) > 1 and bool((ratio.max() - ratio.min()) <= tolerance * ratio.abs().max())
