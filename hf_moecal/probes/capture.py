"""What one forward of a model leaves behind: the calls of its experts and what a replay needs besides."""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..versions import given_cache, with_cache
from .experts import ExpertCall
from .routing import MoELayer, UnsupportedMoEError, hooked


class _Replays(threading.local):
    """How many replays of a model's own forward surround what this thread does: they are no forwards of the user's."""

    depth = 0


replays = _Replays()


@dataclass(frozen=True)
class Site:
    """Where an MoE layer stands in its model.

    Args:
        blocks (`list`): the decoder layers, of which `position` holds the MoE layer; empty in a model without a list.
        siblings (`list`): modules inside that decoder layer that hold no expert of the layer, as coarse as possible.
    """

    blocks: list[nn.Module]
    position: int
    siblings: list[nn.Module]

    @property
    def earlier(self) -> list[nn.Module]:
        return self.blocks[: self.position]


@dataclass(frozen=True)
class ModelParts:
    """The parts of a transformers model that a replay touches.

    Args:
        model (`nn.Module`): as it was given: the outer model, or what wraps it.
        outer (`nn.Module`): the model with its head.
        base (`nn.Module`): what the outer model calls to get `last_hidden_state`.
        experts (`list`): the experts modules of the MoE layers.
        tops (`list`): modules beside the decoder layers, among them the final norm.
        sites (`dict`): by name of the MoE layer.
    """

    model: nn.Module
    outer: nn.Module
    base: nn.Module
    experts: list[nn.Module]
    tops: list[nn.Module]
    sites: dict[str, Site]

    @cached_property
    def checkpointable(self) -> list[nn.Module]:
        """Modules of the outer model that have a switch for activation checkpointing."""
        return [module for module in self.outer.modules() if hasattr(module, "gradient_checkpointing")]


def model_parts(model: nn.Module, layers: list[MoELayer]) -> ModelParts:
    """Finds the outer model, its base, and where the MoE layers stand in it."""
    from transformers import PreTrainedModel

    outer = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if outer is None:
        raise UnsupportedMoEError(
            f"{type(model).__name__} holds no transformers model; the probe replays its forward."
        )
    sites, owners = {}, {}
    for layer in layers:
        path = _path(model, layer.name)
        depth = next((i for i, module in enumerate(path) if isinstance(module, nn.ModuleList)), None)
        if depth is None:
            sites[layer.name] = Site([], 0, [])
            continue
        owners[path[depth - 1]] = path[depth]
        blocks = list(path[depth])
        sites[layer.name] = Site(blocks, blocks.index(path[depth + 1]), _siblings(path[depth + 1 :]))
    tops = [child for owner, blocks in owners.items() for child in owner.children() if child is not blocks]
    base = base_of(outer)
    return ModelParts(model, outer, base, [layer.module for layer in layers], tops, sites)


def base_of(outer: nn.Module) -> nn.Module:
    """What a transformers model calls to get `last_hidden_state`; itself where it has no head."""
    from transformers import PreTrainedModel

    base = getattr(outer, outer.base_model_prefix, outer)
    if base is outer and outer.get_output_embeddings() is not None:  # a prefix that names no module, as in Llama 4
        base = next((child for child in outer.children() if isinstance(child, PreTrainedModel)), outer)
    return base


def _path(model: nn.Module, name: str) -> list[nn.Module]:
    path = [model]
    for part in name.split("."):
        path.append(path[-1]._modules[part])
    return path


def _siblings(chain: list[nn.Module]) -> list[nn.Module]:
    """Children of the modules from the decoder layer to the experts' parent that are not on that way themselves."""
    found, queue = [], [child for module in chain[:-1] for child in module.children() if child not in chain]
    for module in queue:
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)):  # never called itself
            queue.extend(module.children())
        else:
            found.append(module)
    return found


@dataclass
class Capture:
    """What one forward of the base model left behind.

    Args:
        inputs (`dict`): arguments of the base model; a cache that was not empty is a copy from before the forward.
        autocast (`dict`): arguments of the `torch.autocast` that was active.
        grad (`bool`): whether gradients were recorded.
        replayed (`frozenset`): the MoE layers for which `blocks` and `before` were kept.
        calls (`dict`): by name of the MoE layer.
        tops (`dict`): first input and output of the modules beside the decoder layers.
        blocks (`dict`): outputs of the decoder layers.
        scores (`dict`): per MoE layer, what its siblings gave with one column per expert, such as the router's scores,
            by sibling and position in its output.
        given (`dict`): input of the block of each MoE layer whose weights scale what its experts read.
        before (`dict`): per MoE layer, outputs of its siblings that had finished before its experts ran.
        output (`ModelOutput`): of the base model.
    """

    inputs: dict[str, Any]
    autocast: dict[str, Any]
    grad: bool
    replayed: frozenset[str]
    calls: dict[str, ExpertCall] = field(default_factory=dict)
    tops: dict[nn.Module, tuple[Tensor, Any]] = field(default_factory=dict)
    blocks: dict[nn.Module, Any] = field(default_factory=dict)
    scores: dict[str, dict[tuple[nn.Module, int], Tensor]] = field(default_factory=dict)
    given: dict[str, Tensor] = field(default_factory=dict)
    before: dict[str, dict[nn.Module, list[Any]]] = field(default_factory=dict)
    output: Any = None

    def call(self, name: str) -> ExpertCall:
        """The call of an MoE layer.

        Raises:
            UnsupportedMoEError: the layer did not run as a module, or on some of the tokens only.
        """
        if name not in self.calls:
            raise UnsupportedMoEError(
                f"{name} did not run in the last forward, or its hook was ignored: the input may need other experts "
                "(name the layer whose experts it needs), the model may have been compiled before the hook was there "
                "(attach it before torch.compile), or its block may call the experts in another way than as a module, "
                "as MXFP4 kernels do (load the model with quantization_config=Mxfp4Config(dequantize=True))."
            )
        call, tokens = self.calls[name], self.last_hidden.shape[:-1].numel()
        if len(call.index) != tokens:
            raise UnsupportedMoEError(
                f"{name} saw {len(call.index)} of the {tokens} tokens and does not say which (as experts for one "
                "modality do), so nobody can tell whose routing it is; give inputs whose tokens all pass it."
            )
        return call

    @property
    def last_hidden(self) -> Tensor:
        return self.output.last_hidden_state

    @property
    def batch_shape(self) -> tuple[int, int]:
        return tuple(self.last_hidden.shape[:2])


class Recorder:
    """Hooks that keep what the last forward of the base model left behind.

    `replayed` holds the names of the layers for which it also keeps references to the outputs of decoder layers and
    siblings, which only the paths "gather" and "prefix" need.
    """

    def __init__(self, parts: ModelParts, layers: list[MoELayer], *, replayed: set[str]) -> None:
        self.parts = parts
        self.layers = layers
        self.replayed = replayed
        self.capture: Capture | None = None
        self._open: Capture | None = None
        self.muted = True

    @contextmanager
    def attached(self) -> Iterator[None]:
        """The hooks are there inside this context only; compiled code that still calls them later records nothing."""
        handles: list[torch.utils.hooks.RemovableHandle] = []
        self.muted, self._depth = False, replays.depth
        with hooked(handles):
            handles.append(self.parts.base.register_forward_pre_hook(self._begin, with_kwargs=True))
            for top in self.parts.tops:
                handles.append(top.register_forward_hook(self._see_top))
            for block in dict.fromkeys(b for layer in self.layers for b in self.parts.sites[layer.name].earlier):
                handles.append(block.register_forward_hook(self._see_block))
            for layer in self.layers:
                for sibling in self.parts.sites[layer.name].siblings:
                    handles.append(sibling.register_forward_hook(self._see_sibling(layer)))
                handles.append(layer.module.register_forward_hook(self._see_experts(layer), with_kwargs=True))
                if layer.scales_inputs:
                    handles.append(self._block(layer).register_forward_pre_hook(self._see_input(layer.name)))
            handles.append(self.parts.base.register_forward_hook(self._end))
            try:
                yield
            finally:
                self.muted, self._open = True, None

    def seen(self) -> Capture:
        """What the last forward left behind.

        Raises:
            ValueError: there was none.
        """
        if self.capture is None:
            raise ValueError(
                "The probe has seen no forward: run the model inside `with probe_experts(model)`. Where it was "
                "compiled, attach the probe before torch.compile, which ignores hooks that come later."
            )
        return self.capture

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Forwards inside this context leave nothing behind."""
        before, self.muted = self.muted, True
        try:
            yield
        finally:
            self.muted = before

    @property
    def _recording(self) -> Capture | None:
        """Nothing outside a forward of the base model: a replay, or the recomputation of a checkpointed layer."""
        return None if self.muted else self._open

    def _begin(self, base: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self.muted or replays.depth != self._depth:
            return
        names = inspect.signature(base.forward).parameters
        inputs = {**dict(zip(names, args, strict=False)), **kwargs}
        if given_cache(inputs) is not None:
            inputs = with_cache(inputs, self._cache_before(given_cache(inputs)))
        self._open = Capture(inputs, autocast_state(base), torch.is_grad_enabled(), frozenset(self.replayed))

    def _cache_before(self, cache: Any) -> Any:
        """A copy of a cache that holds earlier steps, where a replay may need it."""
        return copy.deepcopy(cache) if self.replayed and cache.get_seq_length() > 0 else None

    def _see_top(self, module: nn.Module, args: tuple, output: Any) -> None:
        if self._recording is not None and args:
            self._recording.tops[module] = (args[0], output)

    def _see_block(self, module: nn.Module, args: tuple, output: Any) -> None:
        if self._recording is not None and self._recording.replayed:
            self._recording.blocks[module] = output

    def _see_sibling(self, layer: MoELayer) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            capture, name = self._recording, layer.name
            if capture is None or name in capture.calls:
                return
            for place, leaf in enumerate(tree_leaves(output)):
                if has_columns(leaf, layer.num_experts):
                    capture.scores.setdefault(name, {}).setdefault((module, place), leaf)
            if name in capture.replayed:
                capture.before.setdefault(name, {}).setdefault(module, []).append(output)

        return hook

    def _block(self, layer: MoELayer) -> nn.Module:
        return self.parts.model.get_submodule(layer.name.rpartition(".")[0])

    def _see_input(self, name: str) -> Callable[..., None]:
        def hook(block: nn.Module, args: tuple) -> None:
            if self._recording is not None:
                self._recording.given.setdefault(name, args[0])

        return hook

    def _see_experts(self, layer: MoELayer) -> Callable[..., None]:
        name = layer.name

        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> None:
            capture = self._recording
            if capture is None:
                return
            if name in capture.calls:
                raise UnsupportedMoEError(f"{name} runs twice in one forward, so no record of it is unique.")
            if capture.grad and not torch.is_grad_enabled():
                raise ValueError(
                    "The probed layer runs without gradient inside a forward with gradient, as under reentrant "
                    "checkpointing, which would give silently wrong gradients; make it non-reentrant: "
                    '{"use_reentrant": False} among the checkpointing arguments.'
                )
            given, scores = capture.given.get(name), capture.scores.get(name, {})
            capture.calls[name] = ExpertCall.of(layer, args, kwargs, output, given, scores)

        return hook

    def _end(self, base: nn.Module, args: tuple, output: Any) -> None:
        if self._recording is not None:
            self._recording.output = output
            self.capture, self._open = self._open, None


def autocast_state(module: nn.Module) -> dict[str, Any]:
    """Arguments of the `torch.autocast` that is active for the module's device."""
    device = next(module.parameters()).device.type
    device = "cpu" if device == "meta" else device
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return {"device_type": device, "dtype": dtype, "enabled": enabled, "cache_enabled": False}


def has_columns(value: Any, columns: int) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() >= 2 and value.shape[-1] == columns
