"""Which experts a model consults for each token, and with which weights.

Layers are found by the contract that their experts keep, never by class or family: one module that computes
`experts(hidden_states [T, H], top_k_index [T, k], top_k_weights [T, k]) -> [T, H]`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


_CONTRACT = ("hidden_states", "top_k_index", "top_k_weights")
_DECORATED = ("has_gate", "is_transposed")  # set by transformers' `@use_experts_implementation`
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
    """

    name: str
    index: int
    num_experts: int
    top_k: int | None
    module: nn.Module = field(repr=False, compare=False)


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
    """Lists the MoE layers of a model, in the order of its modules.

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
    names = [name for name, module in modules.items() if _keeps_contract(module)]
    # PEFT's `target_parameters` nests wrappers around the experts: only the outermost applies every LoRA.
    names = list(dict.fromkeys(_outermost(name) for name in names))
    if not names:
        raise UnsupportedMoEError(_why_unsupported(model))
    return [
        MoELayer(name, index, _num_experts(modules[name]), _top_k(modules, name), modules[name])
        for index, name in enumerate(names)
    ]


def _keeps_contract(module: nn.Module) -> bool:
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
    found = "; ".join(f"{name}({', '.join(parameters)})" for name, parameters in suspects.items())
    return (
        f"The experts of {type(model).__name__} cannot be consulted one by one: none of its modules computes "
        f"experts({', '.join(_CONTRACT)}), which weights the experts' outputs. Found instead: {found}."
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
def hard_routing(model: nn.Module, *, top_k: int = 1) -> Iterator[None]:
    """Routes every token to its strongest experts only, for the hard against soft comparison on any model.

    The weights of the others become zero and the kept ones are scaled so that each token keeps its routing mass.

    Args:
        model (`nn.Module`): a supported MoE model; it is restored on exit.
        top_k (`int`): experts that each token keeps.

    Raises:
        ValueError: `top_k` is not a positive integer.
        UnsupportedMoEError: the model's experts cannot be weighted.

    Example:

    ```python
    >>> import torch
    >>> from transformers import MixtralConfig, MixtralForCausalLM
    >>> from hf_moecal import hard_routing
    >>> config = MixtralConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    ...     num_attention_heads=2, num_key_value_heads=1, num_local_experts=4)
    >>> model = MixtralForCausalLM(config).eval()
    >>> with torch.no_grad(), hard_routing(model):
    ...     hard = model(input_ids=torch.tensor([[1, 2, 3]])).logits

    ```
    """
    if not isinstance(top_k, int) or top_k < 1:
        raise ValueError(f"hard_routing keeps at least one expert per token, got top_k={top_k!r}.")
    handles: list[torch.utils.hooks.RemovableHandle] = []
    with hooked(handles):
        for layer in find_moe_layers(model):
            hook = layer.module.register_forward_pre_hook(_keep_strongest(top_k), with_kwargs=True)
            handles.append(hook)
        yield


def _keep_strongest(top_k: int) -> Callable[..., tuple[tuple, dict]]:
    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        hidden, index, weights = bind_experts(module, args, kwargs)
        return (hidden, index, strongest_weights(weights, top_k)), {}

    return hook


def strongest_weights(weights: Tensor, top_k: int) -> Tensor:
    """The `top_k` largest weights of each row scaled to the row's mass, zero elsewhere; shape `[T, k]`."""
    if top_k >= weights.shape[-1]:
        return weights
    kept = torch.zeros_like(weights).scatter(-1, weights.topk(top_k, dim=-1).indices, 1.0)
    kept = kept * weights
    total = kept.sum(-1, keepdim=True)
    return kept * (weights.sum(-1, keepdim=True) / total.masked_fill(total == 0, 1))
