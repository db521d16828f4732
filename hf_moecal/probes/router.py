"""The routers, and their distribution over all experts, of which a sparse layer uses only the largest entries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

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
_FEW = 8  # times the error of many tokens is what few of them may have
_MARGIN = 3  # times worse every other explanation has to be,
_ALIKE = 0.01  # unless its distribution is this near, in total variation


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


Scores = dict[tuple[nn.Module, int], Tensor]
"""What a layer's modules gave with one column per expert, by module and position in its output."""


@dataclass(frozen=True)
class RouterLink:
    """Which output of which module scores the experts, and what the layer makes of the scores.

    Args:
        source (`tuple`): the module, and the position in its output.
        link (`str`): "softmax", "sigmoid", "identity" or "sqrtsoftplus", then normalised.
        multiple (`float`): of the scores after the link, what a single selected expert has for its weight.
        error (`float`): root mean square of the differences between the shares that the link gives and those used.
    """

    source: tuple[nn.Module, int]
    link: str
    multiple: float
    error: float


def find_link(candidates: Scores, record: RoutingRecord, num_experts: int) -> RouterLink:
    """The scores and the link under which they give the very weights that the model used: the best fit, by a margin.

    Args:
        candidates (`dict`): outputs with one column per expert.
        record (`RoutingRecord`): the weights that the model used, of many tokens.
        num_experts (`int`): E.

    Raises:
        UnsupportedMoEError: no candidate explains the weights, or two that differ explain them as well.
    """
    fits = []
    for source, scores in candidates.items():
        if scores.numel() == len(record.expert_ids) * num_experts:
            for name, link in _LINKS.items():
                values = link(upcast(scores.detach().reshape(-1, num_experts)))
                if not values.scatter(-1, record.expert_ids, 0.0).any():
                    continue  # the selected experts' alone
                multiple = float((upcast(record.weights.detach()) / values.gather(-1, record.expert_ids)).mean())
                fits.append((_misfit(values, record, multiple), RouterLink(source, name, multiple, 0.0), values))
    fits.sort(key=lambda fit: fit[0])
    if not fits or not fits[0][0] <= _precision(record.weights, candidates[fits[0][1].source]):
        raise UnsupportedMoEError(
            f"No module gives scores over all {num_experts} experts that explain the routing weights, so the router's "
            'full distribution is unknown; use experts="selected" or "all", or readout="mixture".'
        )
    error, best, values = fits[0]
    for other, rival, rivals in fits[1:]:
        differ = float((_normalised(values) - _normalised(rivals)).abs().sum(-1).mean()) / 2
        if other <= _MARGIN * max(error, torch.finfo(torch.float32).eps) and differ > _ALIKE:
            raise UnsupportedMoEError(
                f"The routing weights of {len(record.expert_ids)} tokens are explained by {best.link} (error "
                f"{error:.1e}) hardly better than by {rival.link} (error {other:.1e}), so the router's full "
                'distribution is unknown; use experts="selected" or "all", or readout="mixture".'
            )
    return replace(best, error=error)


def full_shares(candidates: Scores, link: RouterLink, record: RoutingRecord, num_experts: int, real: Tensor) -> Tensor:
    """Shares of all experts, `[T, E]`, each row summing to one.

    Args:
        candidates (`dict`): outputs with one column per expert, of the forward in question.
        link (`RouterLink`): of the layer.
        record (`RoutingRecord`): the weights that the model used.
        num_experts (`int`): E.
        real (`LongTensor`): flat positions of the tokens on which to check.

    Raises:
        UnsupportedMoEError: the link does not explain the weights of this forward.
    """
    scores = candidates.get(link.source)
    if scores is not None and scores.numel() == len(record.expert_ids) * num_experts:
        values = _LINKS[link.link](upcast(scores.reshape(-1, num_experts)))
        misfit = _misfit(values[real].detach(), record[real], link.multiple)
        if misfit <= _FEW * _precision(record.weights, scores):
            return _normalised(values)
    raise UnsupportedMoEError(
        f"The {link.link} of the router's scores does not explain the routing weights of this forward, as where they "
        'are changed on their way to the experts; use experts="selected" or "all", or readout="mixture".'
    )


def _normalised(values: Tensor) -> Tensor:
    return values / values.sum(-1, keepdim=True)


def _precision(*tensors: Tensor) -> float:
    """The root mean square error of many tokens' shares that the precision of scores and weights explains."""
    low = [torch.finfo(t.dtype).eps for t in tensors if t.dtype not in (torch.float32, torch.float64)]
    return max([1e-5, *low])


def _misfit(values: Tensor, record: RoutingRecord, multiple: float) -> float:
    """Root mean square difference between the shares of the selected experts by these values and those used."""
    chosen, shares = values.gather(-1, record.expert_ids), record.shares.detach()
    if shares.shape[-1] > 1:
        gap = _normalised(chosen) - shares
    else:  # One expert has all of the share; its weight must then be one multiple of the value everywhere.
        gap = upcast(record.weights.detach()) / (multiple * chosen) - 1
    error = float(gap.square().mean().sqrt())
    return error if error == error else float("inf")
