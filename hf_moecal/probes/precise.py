"""Which paths are exact by the model's structure: compared in float32, where rounding hides nothing.

In a precision of eight bits a wrong path can be as near to brute force as a right one. What comes after the experts of
the last decoder layer is small, so a copy of it in float32 can be asked: everything that ran before is given.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .capture import Capture, ModelParts, Site
from .replay import Reroute, gather_hidden, prefix_hidden
from .routing import MoELayer, hooked


_EXACT = 1e-4  # of the hidden states' scale, in float32; a wrong path is off by a tenth of a percent at least


def exact_paths(
    parts: ModelParts, capture: Capture, layer: MoELayer, route: Reroute, norm: nn.Module | None
) -> dict[str, float | None]:
    """The paths that agree with "prefix" in float32, with the coefficient of "delta".

    Args:
        capture ([`~hf_moecal.probes.capture.Capture`]): of a forward in evaluation mode, with all that is replayed.
        route ([`~hf_moecal.probes.replay.Reroute`]): rerouted tokens of that forward, whose effect is not small.
        norm (`nn.Module`, *optional*): the model's final norm, if it ends in one.

    Raises:
        Exception: whatever code that is not made for float32 raises.
    """
    site = parts.sites[layer.name]
    if site.position + 1 < len(site.blocks):  # later layers mix tokens, and are too large to copy
        return {"prefix": None}
    wide_parts, twins = _widened(parts, layer)
    wide = _wide_capture(capture, layer, twins)
    route = Reroute(route.tokens, route.alone.float(), route.together.float().expand_as(route.alone))
    with torch.autocast(capture.autocast["device_type"], enabled=False):
        truth, after = _prefix(wide_parts, wide, layer, route, twins.get(norm))
        found = {"gather": (None, gather_hidden(wide_parts, wide, layer, route))}
        if after is not None and after.shape == truth.shape:
            _, before = _prefix(wide_parts, wide, layer, replace(route, alone=route.together), twins[norm])
            change = route.alone - route.together
            coefficient = projection(change, after - before)
            hidden = twins[norm]((before + coefficient * change).flatten(0, 1).unsqueeze(1)).reshape(truth.shape)
            found["delta"] = coefficient, hidden
    scale = _EXACT * truth.abs().max()
    exact = {path: own for path, (own, hidden) in found.items() if (hidden - truth).abs().max() <= scale}
    return {**exact, "prefix": None}


def _prefix(
    parts: ModelParts, capture: Capture, layer: MoELayer, route: Reroute, norm: nn.Module | None
) -> tuple[Tensor, Tensor | None]:
    """Last hidden states `[n, m, H]`, and what the final norm was given for them."""
    given: list[Tensor] = []
    handles = [] if norm is None else [norm.register_forward_pre_hook(lambda module, args: given.append(args[0]))]
    with hooked(handles):
        hidden = prefix_hidden(parts, capture, layer, route)
    if not given:
        return hidden, None
    own = given[-1].unflatten(0, route.alone.shape[:2])
    tokens = route.tokens % capture.batch_shape[1]
    return hidden, own[torch.arange(len(tokens), device=tokens.device), :, tokens]


def projection(change: Tensor, changes: Tensor) -> float:
    """How much of `change` is in `changes`, in the least-squares sense; 1 where there is nothing to tell it by."""
    if changes.shape != change.shape or not change.any():
        return 1.0
    change, changes = change.double(), changes.double()
    coefficient = float((change * changes).sum() / change.square().sum())
    return 1.0 if abs(coefficient - 1) < 1e-4 else coefficient


def _widened(parts: ModelParts, layer: MoELayer) -> tuple[ModelParts, dict[nn.Module, nn.Module]]:
    """The model's parts with a float32 copy of what runs after the experts, and the copy of each copied module."""
    site = parts.sites[layer.name]
    block, embeddings = site.blocks[-1], parts.base.get_input_embeddings()
    whole = [m for top in (block, *parts.tops) if top is not embeddings for m in top.modules()]
    shared = set(layer.module.modules())
    around = [m for m in parts.base.modules() if block in m.modules()]  # the base, what holds the layers, their list
    copied = {m for m in [*whole, *around] if m not in shared}
    memo: dict[int, Any] = {id(m): m for m in parts.base.modules() if m not in copied}
    for module in copied:
        memo |= {id(vars(module)[name]): OrderedDict() for name in ("_forward_hooks", "_forward_pre_hooks")}
        memo |= {id(v): v for v in vars(module).values() if hasattr(v, "to_diff_dict")}  # configurations
    base = copy.deepcopy(parts.base, memo)
    twins = {module: memo[id(module)] for module in copied}
    for module in twins.values():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor.is_floating_point():
                    wide = tensor.detach().float()
                    tensors[name] = nn.Parameter(wide, requires_grad=False) if name in module._parameters else wide
    blocks = [*site.blocks[:-1], twins[block]]
    siblings = [twins.get(sibling, sibling) for sibling in site.siblings]
    sites = {layer.name: Site(blocks, site.position, siblings)}
    return replace(parts, base=base, sites=sites), twins


def _wide_capture(capture: Capture, layer: MoELayer, twins: dict[nn.Module, nn.Module]) -> Capture:
    def wide(value: Any) -> Any:
        return tree_map(lambda v: v.float() if isinstance(v, Tensor) and v.is_floating_point() else v, value)

    before = {
        name: {twins.get(module, module): wide(outputs) for module, outputs in seen.items()}
        for name, seen in capture.before.items()
    }
    blocks = {module: wide(output) for module, output in capture.blocks.items()}
    call = capture.call(layer.name)
    weights = next((p.dtype for p in layer.module.parameters() if p.is_floating_point()), call.hidden.dtype)
    call = replace(call, hidden=call.hidden.to(weights))
    return replace(capture, inputs=wide(capture.inputs), blocks=blocks, before=before, calls={layer.name: call})
