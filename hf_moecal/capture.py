"""What one forward of a model leaves behind: the calls of its experts and the way to its logits."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .routing import MoELayer, UnsupportedMoEError, bind_experts, hooked


@dataclass(frozen=True)
class Anatomy:
    """The parts of a transformers model that a replay touches.

    Args:
        outer (`nn.Module`): the model with its head.
        base (`nn.Module`): what the outer model calls to get `last_hidden_state`.
        tops (`list`): modules beside the decoder layers, among them the final norm.
    """

    outer: nn.Module
    base: nn.Module
    tops: list[nn.Module]


def anatomy(model: nn.Module) -> Anatomy:
    """Finds the outer model, its base and the modules beside the decoder layers."""
    from transformers import PreTrainedModel

    outer = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if outer is None:
        raise UnsupportedMoEError(
            f"{type(model).__name__} holds no transformers model; the probe replays its forward."
        )
    base = getattr(outer, outer.base_model_prefix, outer)
    backbones = [module for module in base.modules() if any(isinstance(c, nn.ModuleList) for c in module.children())]
    tops = [c for module in backbones[:1] for c in module.children() if not isinstance(c, nn.ModuleList)]
    return Anatomy(outer, base, tops)


@dataclass
class ExpertCall:
    """One call of an experts module: its three inputs and its output."""

    hidden: Tensor
    index: Tensor
    weights: Tensor
    output: Tensor


@dataclass
class Capture:
    """What one forward of the base model left behind."""

    inputs: dict[str, Any]
    autocast: dict[str, Any]
    grad: bool
    calls: dict[str, ExpertCall] = field(default_factory=dict)
    tops: dict[nn.Module, tuple[Tensor, Any]] = field(default_factory=dict)
    output: Any = None

    @property
    def last_hidden(self) -> Tensor:
        return self.output.last_hidden_state

    @property
    def batch_shape(self) -> tuple[int, int]:
        return tuple(self.last_hidden.shape[:2])


class Recorder:
    """Hooks that keep what the last forward of the base model left behind."""

    def __init__(self, parts: Anatomy, layers: list[MoELayer]) -> None:
        self.parts = parts
        self.layers = layers
        self.capture: Capture | None = None
        self._open: Capture | None = None
        self._muted = False

    @contextmanager
    def attached(self) -> Iterator[None]:
        """The hooks are there inside this context only; compiled code that still calls them later records nothing."""
        handles: list[torch.utils.hooks.RemovableHandle] = []
        with hooked(handles):
            handles.append(self.parts.base.register_forward_pre_hook(self._begin, with_kwargs=True))
            for top in self.parts.tops:
                handles.append(top.register_forward_hook(self._see_top))
            for layer in self.layers:
                handles.append(layer.module.register_forward_hook(self._see_experts(layer.name), with_kwargs=True))
            handles.append(self.parts.base.register_forward_hook(self._end))
            try:
                yield
            finally:
                self._muted = True

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Forwards inside this context leave nothing behind."""
        before, self._muted = self._muted, True
        try:
            yield
        finally:
            self._muted = before

    def _begin(self, base: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self._muted:
            return
        names = inspect.signature(base.forward).parameters
        inputs = {**dict(zip(names, args, strict=False)), **kwargs}
        self._open = Capture(inputs, autocast_state(base), torch.is_grad_enabled())

    def _see_experts(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> None:
            # Outside a forward of the base model: a replay, or the recomputation of a checkpointed layer.
            if self._muted or self._open is None:
                return
            if name in self._open.calls:
                raise UnsupportedMoEError(f"{name} runs twice in one forward, so no record of it is unique.")
            if self._open.grad and not torch.is_grad_enabled():
                raise ValueError(
                    "The probed layer runs without gradient inside a forward with gradient, as under reentrant "
                    "checkpointing, which would give silently wrong gradients; call "
                    'model.gradient_checkpointing_enable({"use_reentrant": False}).'
                )
            self._open.calls[name] = ExpertCall(*bind_experts(module, args, kwargs), output)

        return hook

    def _see_top(self, module: nn.Module, args: tuple, output: Any) -> None:
        if self._open is not None and not self._muted and args:
            self._open.tops[module] = (args[0], output)

    def _end(self, base: nn.Module, args: tuple, output: Any) -> None:
        if self._open is not None and not self._muted:
            self._open.output = output
            self.capture, self._open = self._open, None


def autocast_state(module: nn.Module) -> dict[str, Any]:
    """Arguments of the `torch.autocast` that is active for the module's device."""
    device = next(module.parameters()).device.type
    device = "cpu" if device == "meta" else device
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return {"device_type": device, "dtype": dtype, "enabled": enabled, "cache_enabled": False}
