"""The load-balancing loss of the routers, taken from their scores while a batch runs, whatever the model's head.

transformers adds it for causal language models only, and only with `output_router_logits`. Here it is the same
function of the same scores, for every head: with f_e the share of the real tokens that are routed to expert e and P_e
the mean softmax score of that expert, both over all MoE layers, E * sum_e f_e P_e. It is top_k where the load is even.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from ..probes import UnsupportedMoEError, find_moe_layers
from ..probes.capture import has_columns
from ..probes.router import find_routers
from ..probes.routing import hooked


_COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")


def balance_coefficient(model: nn.Module, asked: float | None, *, cached: bool = False) -> float:
    """The weight of the load-balancing loss, 0 where it is off.

    Args:
        model (`nn.Module`): the model as it will train.
        asked (`float`, *optional*): unset takes the model's own coefficient if a router of it trains on all tokens.
        cached (`bool`, *optional*, defaults to `False`): whether a prefix cache keeps the routers from most tokens.

    Raises:
        ValueError: a positive weight where the model has no load-balancing loss, or its routers do not see all tokens.
    """
    own = _own_coefficient(model)
    if asked and own is None:
        raise ValueError(
            f"router_aux_loss_coef={asked}, but {type(_outer(model)).__name__} has no load-balancing loss (families "
            "that balance by a bias on the scores have none); leave it unset or set it to 0."
        )
    if asked and cached:
        raise ValueError(
            "With `prefix_cache` the routers see the judged tokens only, so the load over all tokens, which the "
            f"router aux loss balances, is unknown; got router_aux_loss_coef={asked}, leave it unset or set it to 0."
        )
    unset = own if own and not cached and _any_router_trains(model) else 0.0
    return unset if asked is None else asked


class RouterBalance:
    """Gives the load-balancing loss of a forward. A context manager: it leaves no hook.

    Args:
        model (`nn.Module`): a model for which [`balance_coefficient`] is positive.

    Raises:
        UnsupportedMoEError: the routers of the model cannot be found.

    Example:

    ```python
    >>> import torch
    >>> from transformers import MixtralConfig, MixtralForSequenceClassification
    >>> from hf_moecal.training.aux_loss import RouterBalance
    >>> config = MixtralConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    ...     num_attention_heads=2, num_key_value_heads=1, num_local_experts=4, pad_token_id=0)
    >>> model = MixtralForSequenceClassification(config)
    >>> batch = {"input_ids": torch.tensor([[1, 2, 3]])}
    >>> with RouterBalance(model) as balance, balance.watching(batch):
    ...     outputs = model(**batch)
    ...     loss = balance.loss()
    >>> loss.requires_grad, 1 < loss < 4
    (True, tensor(True))

    ```
    """

    def __init__(self, model: nn.Module):
        self._layers = find_moe_layers(model)
        self._routers = find_routers(model)
        self._formula = _formula(model)
        self._scores: dict[str, Tensor] | None = None
        self._mask: Tensor | None = None
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> RouterBalance:
        for layer, (name, router) in zip(self._layers, self._routers.items(), strict=True):
            self._handles.append(router.register_forward_hook(self._see(name, layer.num_experts)))
        return self

    def __exit__(self, *exception: object) -> None:
        with hooked(self._handles):
            pass

    @contextmanager
    def watching(self, inputs: Mapping[str, Any]) -> Iterator[None]:
        """Within the block, the first forward with gradient is the one whose loss is asked for.

        Args:
            inputs (`Mapping`): of that forward; tokens that its `attention_mask` `[B, S]` leaves out do not count.
        """
        self._mask = inputs.get("attention_mask")
        self._scores = {} if torch.is_grad_enabled() else None
        try:
            yield
        finally:
            self._scores = self._mask = None

    def loss(self) -> Tensor:
        """The loss of the forward inside this `watching` block, with gradient."""
        scores = tuple(self._scores.values())
        mask = self._mask
        if mask is not None and (mask.dim() != 2 or mask.numel() != len(scores[0])):
            mask = None  # not one of tokens: such a mask keeps sequences apart, and every token counts
        return self._formula(scores, scores[0].shape[-1], self._layers[0].top_k, mask)

    def _see(self, name: str, num_experts: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            if self._scores is None or name in self._scores:  # a replay, or a checkpointed layer computed again
                return
            if not torch.is_grad_enabled():
                raise ValueError(
                    "The routers run without gradient inside a forward with gradient, as under reentrant "
                    "checkpointing, so they cannot be balanced; set gradient_checkpointing_kwargs="
                    '{"use_reentrant": False}, or router_aux_loss_coef=0.'
                )
            scores = next(leaf for leaf in tree_leaves(output) if has_columns(leaf, num_experts))
            self._scores[name] = scores.reshape(-1, num_experts)

        return hook


def _outer(model: nn.Module) -> nn.Module:
    return next((module for module in model.modules() if isinstance(module, PreTrainedModel)), model)


def _formula(model: nn.Module) -> Callable[..., Tensor] | None:
    """The function by which the model's own code balances its routers."""
    homes = (sys.modules.get(kind.__module__) for kind in type(_outer(model)).__mro__)
    return next((home.load_balancing_loss_func for home in homes if hasattr(home, "load_balancing_loss_func")), None)


def _own_coefficient(model: nn.Module) -> float | None:
    """Of the model or its configuration, which also a classifier has; `None` without a formula."""
    if _formula(model) is None:
        return None
    outer = _outer(model)
    places = [outer, outer.config.get_text_config()]
    found = (getattr(place, name, None) for place in places for name in _COEFFICIENTS)
    return next((value for value in found if isinstance(value, (int, float))), 0.0)


def _any_router_trains(model: nn.Module) -> bool:
    try:
        routers = find_routers(model).values()
    except UnsupportedMoEError:
        return False
    return any(parameter.requires_grad for router in routers for parameter in router.parameters())
