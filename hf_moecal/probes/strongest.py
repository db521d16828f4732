"""Each token routed to its strongest experts only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .routing import MoELayer, UnsupportedMoEError, bind_experts, find_moe_layers, hooked, uncompiled


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
    with hooked(handles), uncompiled():
        for layer in find_moe_layers(model):
            if layer.scales_inputs and layer.top_k is not None and layer.top_k <= top_k:
                continue  # each token has so few experts anyway
            if layer.scales_inputs:
                raise UnsupportedMoEError(
                    f"The weights of {layer.name} scale what its experts read; hard_routing changes what they put out."
                )
            ran: set[nn.Module] = set()
            hook = layer.module.register_forward_pre_hook(_keep_strongest(top_k, ran), with_kwargs=True)
            block = model.get_submodule(layer.name.rpartition(".")[0])
            handles += [hook, block.register_forward_hook(_ensure_ran(layer, ran))]
        yield


def _ensure_ran(layer: MoELayer, ran: set[nn.Module]) -> Callable[..., None]:
    """A hook on the block around an experts module: in each of its forwards the experts' own hook has to fire."""

    def hook(block: nn.Module, args: tuple, output: Any) -> None:
        stubbed = getattr(vars(block).get("forward"), "__module__", "").startswith(__package__.partition(".")[0])
        if layer.module not in ran and not stubbed:  # by a replay, which gives what the block gave
            raise UnsupportedMoEError(
                f"{layer.name} does not run as a module, as with MXFP4 kernels, so its weights cannot be changed; "
                "load the model with quantization_config=Mxfp4Config(dequantize=True)."
            )
        ran.clear()

    return hook


def _keep_strongest(top_k: int, ran: set[nn.Module]) -> Callable[..., tuple[tuple, dict]]:
    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        ran.add(module)
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
