"""Which experts a model consults for each token, and with which weights.

Layers are found by the contract that their experts keep, never by class or family: one module that computes
`experts(hidden_states [T, H], top_k_index [T, k], top_k_weights [T, k]) -> [T, H]`.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


_CONTRACT = ("hidden_states", "top_k_index", "top_k_weights")
_DECORATED = ("has_gate", "is_transposed")  # set by transformers' `@use_experts_implementation`
_OTHER_MODALITIES = ("vision", "visual", "image", "audio", "speech", "video")
_NUM_EXPERTS_NAMES = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_TOP_K_NAMES = ("top_k", "num_experts_per_tok", "moe_top_k", "moe_topk", "top_k_experts", "moe_k")


class UnsupportedMoEError(ValueError):
    """The model has no MoE layer whose experts can be consulted one by one; the message says why."""


def upcast(values: Tensor) -> Tensor:
    """At least float32."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


@dataclass(frozen=True)
class MoELayer:
    """One MoE layer of a model.

    Args:
        name (`str`): qualified name of the experts module; under PEFT of the outermost wrapper.
        index (`int`): position among the model's MoE layers (dense layers are not counted).
        num_experts (`int`): experts that the router chooses from; shared experts are not counted.
        top_k (`int`, *optional*): experts per token, `None` where the model states it nowhere.
        module (`nn.Module`): the experts module, called as `module(hidden_states, top_k_index, top_k_weights)`.
        scales_inputs (`bool`): whether the weights scale what the experts read instead, as in Llama 4: the module is
            called with every token once for each expert, times its weight.
    """

    name: str
    index: int
    num_experts: int
    top_k: int | None
    module: nn.Module = field(repr=False, compare=False)
    scales_inputs: bool = field(default=False, repr=False)


@dataclass(frozen=True)
class RoutingRecord:
    """What the router of one layer decided: `k` experts and their weights per token.

    Args:
        expert_ids (`LongTensor` of shape `[T, k]`): selected experts, in the router's order.
        weights (`Tensor` of shape `[T, k]`): weights w_k that multiply the experts' outputs; they need not sum to one.
        batch_shape (`tuple[int, int]`): batch size B and sequence length S; T = B * S, row-major.
    """

    expert_ids: Tensor
    weights: Tensor
    batch_shape: tuple[int, int]

    @property
    def mass(self) -> Tensor:
        """Total routing mass S = sum_k w_k, shape `[T]`."""
        return self.weights.sum(-1)

    @property
    def shares(self) -> Tensor:
        """r_k = w_k / S, shape `[T, k]`, at least float32; zero where the mass is zero."""
        weights = upcast(self.weights)
        mass = weights.sum(-1, keepdim=True)
        return weights / mass.masked_fill(mass == 0, 1)

    @property
    def entropy(self) -> Tensor:
        """Entropy of the shares in nats, shape `[T]`: 0 for one expert, log k when all count the same."""
        shares = self.shares
        return -torch.special.xlogy(shares, shares).sum(-1)

    @property
    def margin(self) -> Tensor:
        """Largest share minus the second largest, shape `[T]`; 1 for a single expert."""
        if self.weights.shape[-1] == 1:
            return torch.ones_like(self.shares[..., 0])
        first, second = self.shares.topk(2, dim=-1).values.unbind(-1)
        return first - second

    @property
    def by_position(self) -> RoutingRecord:
        """The same record with leading dimensions `[B, S]`: `record.by_position.weights[batch, position]`."""
        shape = (*self.batch_shape, -1)
        return RoutingRecord(self.expert_ids.reshape(shape), self.weights.reshape(shape), self.batch_shape)

    def __getitem__(self, tokens: Any) -> RoutingRecord:
        """The record of some tokens (any index into the leading dimension)."""
        return RoutingRecord(self.expert_ids[tokens], self.weights[tokens], self.batch_shape)

    def __repr__(self) -> str:
        batch, length = self.batch_shape
        return f"RoutingRecord(batch={batch}, length={length}, top_k={self.expert_ids.shape[-1]})"


def find_moe_layers(model: nn.Module) -> list[MoELayer]:
    """Lists the MoE layers of a model's language model, in the order of its modules.

    Experts of a vision tower, and those of a language model that see image tokens only, are left out.

    Args:
        model (`nn.Module`): a transformers model, also wrapped by PEFT, accelerate or DistributedDataParallel.

    Returns:
        `list[MoELayer]`: at least one layer.

    Raises:
        UnsupportedMoEError: the model is dense, or its experts keep another contract.

    Example:

    ```python
    >>> from transformers import MixtralConfig, MixtralForCausalLM
    >>> from hf_moecal import find_moe_layers
    >>> config = MixtralConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    ...     num_attention_heads=2, num_key_value_heads=1, num_local_experts=4)
    >>> find_moe_layers(MixtralForCausalLM(config))[-1]
    MoELayer(name='model.layers.1.mlp.experts', index=1, num_experts=4, top_k=2)

    ```
    """
    modules = dict(model.named_modules())
    names = _of_language(model, [name for name, module in modules.items() if _keeps_contract(module)])
    # PEFT's `target_parameters` nests wrappers around the experts: only the outermost applies every LoRA.
    names = list(dict.fromkeys(_outermost(name) for name in names))
    if not names:
        raise UnsupportedMoEError(_why_unsupported(model))
    for name in names:
        _refuse_split(model, name, _innermost(modules[name]))
    return [
        MoELayer(
            name,
            index,
            _num_experts(modules[name]),
            _top_k(modules, name),
            modules[name],
            scales_inputs=not _weights_outputs(_innermost(modules[name])),
        )
        for index, name in enumerate(names)
    ]


def _of_language(model: nn.Module, names: list[str]) -> list[str]:
    """Those that text passes, of the names of some modules; all if none is left."""

    def sees_text(name: str) -> bool:
        return not any(part.startswith(_OTHER_MODALITIES) for part in name.split("."))

    return [name for name in names if sees_text(name)] or names


def _refuse_split(model: nn.Module, name: str, experts: nn.Module) -> None:
    """Raises where the experts of a layer are shared out over processes, so that one process cannot ask them all."""
    local, config = getattr(experts, "num_experts", None), getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    counts = [getattr(config, each, None) for each in _NUM_EXPERTS_NAMES]
    whole = [each for each in counts if isinstance(each, int) and isinstance(local, int) and each > local > 0]
    if getattr(experts, "_is_expert_parallel", False) or any(each % local == 0 for each in whole):
        raise UnsupportedMoEError(
            f"{name} holds {local} of {max(whole, default='more')} experts: expert parallelism shares them out over "
            "processes, and a probe asks each of them in its own. Load the model without expert parallelism (FSDP2 or "
            "device_map shares out the weights too)."
        )


def _keeps_contract(module: nn.Module) -> bool:
    return _weights_outputs(module) or _scales_inputs(module)


def _scales_inputs(module: nn.Module) -> bool:
    """Whether an experts module has one input, and weights with one matrix per expert."""
    weights = [parameter for parameter in module.parameters(recurse=False) if parameter.dim() == 3]
    if len(weights) < 2 or forward_parameters(module) != _CONTRACT[:1]:
        return False
    return all(len(parameter) == getattr(module, "num_experts", None) for parameter in weights)


def _weights_outputs(module: nn.Module) -> bool:
    if all(name in vars(module) for name in _DECORATED) and hasattr(type(module), "_apply_gate"):
        return len(forward_parameters(module)) >= len(_CONTRACT)
    return forward_parameters(module)[: len(_CONTRACT)] == _CONTRACT


def forward_parameters(module: nn.Module) -> tuple[str, ...]:
    """Names of the parameters that a module's own class gives its forward, without `self`."""
    return tuple(inspect.signature(inspect.unwrap(type(module).forward)).parameters)[1:]


def _outermost(name: str) -> str:
    while name.endswith(".base_layer"):
        name = name.removesuffix(".base_layer")
    return name


def _innermost(module: nn.Module) -> nn.Module:
    while "base_layer" in module._modules:
        module = module._modules["base_layer"]
    return module


def _num_experts(wrapped: nn.Module) -> int:
    experts = _innermost(wrapped)
    for name in ("total_experts", "num_experts"):
        if isinstance(getattr(experts, name, None), int):
            return getattr(experts, name)
    return next(parameter.shape[0] for parameter in experts.parameters() if parameter.dim() == 3)


def _top_k(modules: dict[str, nn.Module], name: str) -> int | None:
    block = modules[name.rpartition(".")[0]]
    places = [block, *block.children(), getattr(block, "config", None), getattr(modules[""], "config", None)]
    for place in places:
        for attribute in _TOP_K_NAMES:
            value = getattr(place, attribute, None)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    return None


def _why_unsupported(model: nn.Module) -> str:
    def suspicious(module: nn.Module) -> bool:
        named = " ".join([type(module).__name__, *module._modules]).lower()
        return any(word in named for word in ("expert", "router", "moe")) and "layers" not in module._modules

    suspects = {
        type(module).__name__: forward_parameters(module)
        for module in model.modules()
        if suspicious(module) and not hasattr(module, "base_model_prefix")
    }
    if not suspects:
        return f"{type(model).__name__} has no MoE layer: give a sparse Mixture-of-Experts model."
    if any(isinstance(module._modules.get("experts"), nn.ModuleList) for module in model.modules()):
        return (
            f"The experts of {type(model).__name__} are a list of modules, as in remote code, so "
            f"no call of one module consults them. {_remedy(model)}"
        )
    found = "; ".join(f"{name}({', '.join(parameters)})" for name, parameters in suspects.items())
    return (
        f"The experts of {type(model).__name__} cannot be consulted one by one: none of its modules computes "
        f"experts({', '.join(_CONTRACT)}), which weights the experts' outputs. Found instead: {found}."
    )


def _remedy(model: nn.Module) -> str:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind in CONFIG_MAPPING_NAMES:
        return (
            f"transformers has {kind!r} itself, with experts in one module: load the checkpoint without "
            "trust_remote_code=True."
        )
    return (
        f"transformers does not have the type {kind!r} itself; where it has the architecture under another name "
        "(many are deepseek_v3), set `model_type` in config.json to that and load it without trust_remote_code=True."
    )


@contextmanager
def hooked(handles: list[torch.utils.hooks.RemovableHandle]) -> Iterator[None]:
    """Removes the handles on exit, also those that are appended in between."""
    try:
        yield
    finally:
        while handles:
            handles.pop().remove()


def bind_experts(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """The three tensors of one call of an experts module, however they were passed."""
    names = forward_parameters(_innermost(module))[: len(_CONTRACT)]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    return tuple(given[name] for name in names)


@contextmanager
def uncompiled() -> Iterator[None]:
    """Compiled code runs as it was written inside this context: it would ignore hooks that came later."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def pick_layer(layers: Sequence[MoELayer], wanted: int | str, indices: Sequence[int]) -> MoELayer:
    """The one of some layers that an index or a name means."""
    for layer in layers:
        if wanted == layer.name or (isinstance(wanted, int) and wanted == layer.index):
            return layer
    raise ValueError(
        f"No MoE layer {wanted!r}: give an index among {list(indices)} or one of {[layer.name for layer in layers]}."
    )


def choose_layers(found: list[MoELayer], layer: int | str | Sequence[int | str]) -> list[MoELayer]:
    """Those of a model's layers that indices or names mean, in the model's order."""
    if layer == "all":
        return found
    wanted = [layer] if isinstance(layer, (int, str)) else list(layer)
    wanted = [item + len(found) if isinstance(item, int) and item < 0 else item for item in wanted]
    chosen = {pick_layer(found, item, range(-len(found), len(found))).name for item in wanted}
    if not chosen:
        raise ValueError("No layer to probe: give an index, a name, a list of them, or 'all'.")
    return [item for item in found if item.name in chosen]
