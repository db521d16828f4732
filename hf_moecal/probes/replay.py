"""What the model would have predicted had one token been routed to one expert alone.

The counterfactual of expert k at one MoE layer gives it the token's whole routing mass: S E_k instead of
y = sum_j w_j E_j. Three ways lead from there to the logits, each exact for some models:

- "delta": the change S E_k - y, times a constant, is added to what the final norm received;
- "gather": the decoder layer runs again on the probed tokens alone, as sequences of length one, whose modules that had
  finished before the experts give what they gave;
- "prefix": the decoder layer and all later ones run again on whole sequences.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..versions import CACHE_NAMES, given_cache, with_cache
from .capture import Capture, ModelParts, replays
from .experts import ExpertCall, as_output, consult, run_experts
from .routing import MoELayer, UnsupportedMoEError, uncompiled
from .sharding import unsharded
from .tail import patched


OTHER_INPUTS = ("pixel_", "image_", "video_", "audio_", "input_features", "input_values", "second_per_grid")


@contextmanager
def without_checkpointing(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within the block no layer is checkpointed: the backward pass would run it again when a replay is over."""
    checkpointed = [module for module in modules if vars(module).get("gradient_checkpointing", False)]
    try:
        for module in checkpointed:
            module.gradient_checkpointing = False
        yield
    finally:
        for module in checkpointed:
            module.gradient_checkpointing = True


@contextmanager
def replaying(parts: ModelParts, autocast: dict[str, Any]) -> Iterator[None]:
    """The setting of every replay: no checkpointing, no compiled code, the random state kept, chosen positions off."""
    with ExitStack() as stack:
        replays.depth += 1
        stack.callback(_leave)
        stack.enter_context(without_checkpointing(parts.checkpointable))
        stack.enter_context(uncompiled())
        if parts.outer.training:
            stack.enter_context(torch.random.fork_rng(devices=_accelerators(parts.outer)))
        stack.enter_context(torch.autocast(**autocast))
        stack.enter_context(_muted_head(parts.outer))
        yield


def _leave() -> None:
    replays.depth -= 1


def _accelerators(model: nn.Module) -> list[torch.device]:
    if not torch.cuda.is_initialized():
        return []
    return sorted({p.device for p in model.parameters() if p.device.type == "cuda"}, key=str)


@contextmanager
def _muted_head(outer: nn.Module) -> Iterator[None]:
    """Mutes hooks on the output embedding that choose positions for the model's own forward.

    Hooks of the libraries that place the weights stay: without them the head may have none.
    """
    head = outer.get_output_embeddings()
    hooks = {} if head is None else head._forward_pre_hooks
    libraries = ("torch", "accelerate", "deepspeed", "peft", "transformers")
    muted = {key: hook for key, hook in hooks.items() if _origin(hook).split(".")[0] not in libraries}
    order = list(hooks)
    for key in muted:
        del hooks[key]
    try:
        yield
    finally:
        hooks.update(muted)
        for key in order:
            hooks.move_to_end(key)


def _origin(hook: Callable) -> str:
    return getattr(hook, "__module__", None) or type(hook).__module__


@dataclass(frozen=True)
class Reroute:
    """Tokens and what the experts put out for each when one expert gets the whole routing mass S.

    Args:
        tokens (`LongTensor` of shape `[n]`): flat positions.
        alone (`Tensor` of shape `[n, m, H]`): S E_k.
        together (`Tensor` of shape `[n, 1, H]`): y = sum_k w_k E_k, which the model used.
    """

    tokens: Tensor
    alone: Tensor
    together: Tensor

    @classmethod
    def to(
        cls, parts: ModelParts, layer: MoELayer, call: ExpertCall, tokens: Tensor, ids: Tensor, *, columns: int
    ) -> Reroute:
        """Reroutes the tokens to the experts `ids`, `[n, m]`.

        y is computed, never taken from the forward: some blocks add to the experts' output in place.
        """
        index, weights = call.index[tokens], call.weights[tokens]
        if layer.scales_inputs:
            alone = consult(parts, layer, call, tokens, ids, columns=columns, mass=weights.sum(-1))
            return cls(tokens, alone, run_experts(parts, layer, call.hidden[tokens], index, weights).unsqueeze(1))
        outputs = consult(parts, layer, call, tokens, ids, columns=columns)
        scale = weights.unsqueeze(-1).to(outputs.dtype)
        where = (index.unsqueeze(-1) == ids.unsqueeze(1)).byte()
        if where.any(-1).all():  # all that the model used are among them
            place = where.argmax(-1).unsqueeze(-1).expand(-1, -1, outputs.shape[-1])
            together = (scale * outputs.gather(1, place)).sum(1, keepdim=True)
        else:
            together = run_experts(parts, layer, call.hidden[tokens], index, weights).unsqueeze(1)
        return cls(tokens, scale.sum(1, keepdim=True) * outputs, together)


def delta_hidden(parts: ModelParts, capture: Capture, route: Reroute, coefficient: float) -> Tensor:
    """Last hidden states `[n, m, H]` through the final norm alone."""
    norm, before = final_norm(parts, capture)
    hidden = before.flatten(0, 1)[route.tokens].unsqueeze(1) + coefficient * (route.alone - route.together)
    with unsharded(parts, norm):
        return norm(hidden.flatten(0, 1).unsqueeze(1)).reshape(route.alone.shape)


def final_norm(parts: ModelParts, capture: Capture) -> tuple[nn.Module, Tensor]:
    """The module that gave `last_hidden_state`, and what it was given."""
    last = capture.last_hidden
    for module, (given, result) in reversed(capture.tops.items()):  # the last that ran, where several agree
        if not isinstance(result, Tensor) or result.shape != last.shape:
            continue
        if result is last or torch.equal(result, last):
            return module, given
    raise UnsupportedMoEError(f"{type(parts.base).__name__} ends in no module that gives its last hidden state.")


def gather_hidden(parts: ModelParts, capture: Capture, layer: MoELayer, route: Reroute) -> Tensor:
    """Last hidden states `[n, m, H]` through the layer's own decoder layer on, on the probed tokens alone."""
    repeated = route.tokens.repeat_interleave(route.alone.shape[1])

    def select(value: Tensor) -> Tensor:
        return _at_tokens(value, capture.batch_shape, repeated)

    names = ("input_ids", "inputs_embeds", "position_ids")
    inputs = {name: select(value) for name, value in capture.inputs.items() if name in names and value is not None}
    hidden = _replay(parts, capture, layer, inputs, select, route.alone.flatten(0, 1).unsqueeze(1))
    return hidden.reshape(route.alone.shape)


def prefix_hidden(parts: ModelParts, capture: Capture, layer: MoELayer, route: Reroute) -> Tensor:
    """Last hidden states `[n, m, H]`: whole sequences from the layer's own decoder layer on, per token and expert."""
    call, (batch, length) = capture.call(layer.name), capture.batch_shape
    site, others = parts.sites[layer.name], of_other_modalities(capture.inputs)
    if others and site.position + 1 < len(site.blocks):
        raise UnsupportedMoEError(
            f"Later layers than that of {layer.name} may see {others[0]} again, and nothing says which row it is of; "
            "probe the last MoE layer, or give text alone."
        )
    repeated = route.tokens.repeat_interleave(route.alone.shape[1])
    rows, place = repeated // length, torch.arange(len(repeated), device=repeated.device) * length + repeated % length

    def select(value: Tensor) -> Tensor:
        return _at_rows(value, (batch, length), rows)

    experts = select(run_experts(parts, layer, call.hidden, call.index, call.weights)).to(route.alone.dtype)
    experts = experts.index_copy(0, place, route.alone.flatten(0, 1)).unflatten(0, (-1, length))
    hidden = _replay(parts, capture, layer, take_rows(capture.inputs, batch, rows), select, experts)
    return hidden.flatten(0, 1)[place].reshape(route.alone.shape)


def _replay(
    parts: ModelParts,
    capture: Capture,
    layer: MoELayer,
    inputs: dict[str, Any],
    select: Callable[[Tensor], Tensor],
    experts: Tensor,
) -> Tensor:
    """The base model's last hidden state for an experts' output `[R, L, H]`, all before the experts as it was."""
    site = parts.sites[layer.name]
    stubs = {block: _giving([select_all(capture.blocks[block], select)], block) for block in site.earlier}
    for sibling, outputs in capture.before.get(layer.name, {}).items():
        stubs[sibling] = _giving([select_all(output, select) for output in outputs], sibling)
    output = as_output(layer, experts, capture.call(layer.name).output)
    stubs[layer.module] = _giving([output], layer.module)
    with unsharded(parts, parts.base), patched(stubs):
        return parts.base(**own_cache(fresh(inputs))).last_hidden_state


def _giving(outputs: list[Any], module: nn.Module) -> Callable:
    """A forward that gives the recorded outputs one by one and then computes again."""
    waiting, forward = list(outputs), module.forward

    def stub(*args: Any, **kwargs: Any) -> Any:
        return waiting.pop(0) if waiting else forward(*args, **kwargs)

    return stub


def select_all(value: Any, select: Callable[[Tensor], Tensor]) -> Any:
    """Applies `select` to every tensor of a nested output."""
    return tree_map(lambda leaf: select(leaf) if isinstance(leaf, Tensor) else leaf, value)


def _at_tokens(value: Tensor, batch_shape: tuple[int, int], tokens: Tensor) -> Tensor:
    """The tokens of a tensor `[B, S, ...]` as sequences of length one, or of a tensor `[B * S, ...]`."""
    batch, length = batch_shape
    if value.shape[:2] == batch_shape:
        return value.flatten(0, 1)[tokens].unsqueeze(1)
    return value[tokens] if value.dim() and value.shape[0] == batch * length else value


def _at_rows(value: Tensor, batch_shape: tuple[int, int], rows: Tensor) -> Tensor:
    """The sequences of a tensor `[B, ...]`, or of a tensor `[B * S, ...]`."""
    batch, length = batch_shape
    if value.dim() and value.shape[0] == batch:
        return value[rows]
    if value.dim() and value.shape[0] == batch * length:
        return value.unflatten(0, batch_shape)[rows].flatten(0, 1)
    return value


def of_other_modalities(inputs: dict[str, Any]) -> list[str]:
    """Names of the inputs that are images, videos or sounds: nothing in them says to which row they belong."""
    return [name for name, value in inputs.items() if name.startswith(OTHER_INPUTS) and value is not None]


def take_rows(inputs: dict[str, Any], batch: int, rows: Tensor) -> dict[str, Any]:
    """The inputs of some batch rows; what has no batch dimension stays, images and the like are left out."""

    def take(value: Any, name: str) -> Any:
        if isinstance(value, dict):
            return {key: take(item, key) for key, item in value.items()}
        if name in CACHE_NAMES and value is not None:
            return _cache_rows(value, batch, rows)
        if not isinstance(value, Tensor) or value.dim() < 2:
            return value
        if name == "position_ids" and value.dim() == 3 and value.shape[1] == batch:
            return value[:, rows]
        return value[rows] if value.shape[0] == batch else value

    others = of_other_modalities(inputs)
    return {name: take(value, name) for name, value in inputs.items() if name not in others}


def _cache_rows(cache: Any, batch: int, rows: Tensor) -> Any:
    """A copy of a cache with some of its rows, also where its layers offer no selection (static, linear ones)."""
    cache = copy.deepcopy(cache)
    for layer in cache.layers:
        for name, value in vars(layer).items():
            if name == "max_batch_size":
                setattr(layer, name, len(rows))
            else:
                setattr(layer, name, tree_map(lambda leaf: _leading_rows(leaf, batch, rows), value))
    return cache


def _leading_rows(value: Any, batch: int, rows: Tensor) -> Any:
    if not isinstance(value, Tensor) or value.dim() < 2:
        return value
    if value.shape[0] == batch:
        return value[rows.to(value.device)]
    # Positions of several kinds, one set for each.
    return value[:, rows.to(value.device)] if value.dim() == 3 and value.shape[1] == batch else value


def own_cache(inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs with a copy of their cache, which a forward changes."""
    cache = given_cache(inputs)
    return inputs if cache is None else with_cache(inputs, copy.deepcopy(cache))


def fresh(inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs of a base model for another forward: no new cache, no outputs besides the hidden state."""
    dropped = (
        "use_cache",
        "labels",
        "output_hidden_states",
        "output_attentions",
        "output_router_logits",
        "return_dict",
    )
    given = {name: value for name, value in inputs.items() if value is not None and name not in dropped}
    return {**given, "use_cache": False}
