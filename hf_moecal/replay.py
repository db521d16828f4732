"""What the model would have predicted had one token been routed to one expert alone.

The counterfactual of expert k at one MoE layer gives it the token's whole routing mass: S E_k instead of
y = sum_j w_j E_j. Three exact ways lead from there to the logits; [`certify`] compares them with brute force on the
model at hand and takes the cheapest that agrees.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .capture import Anatomy, Capture, ExpertCall, Recorder
from .routing import MoELayer, UnsupportedMoEError, bind_experts, hooked


_MISSING = object()
_TOLERANCE = 1e-5  # of the logits' scale, in float32


@contextmanager
def patched(forwards: dict[nn.Module, Callable]) -> Iterator[None]:
    """Replaces the forward of module instances and restores exactly what was there."""
    before = {module: vars(module).get("forward", _MISSING) for module in forwards}
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module, forward in before.items():
            if forward is _MISSING:
                vars(module).pop("forward", None)
            else:
                module.forward = forward


@contextmanager
def replaying(parts: Anatomy, autocast: dict[str, Any]) -> Iterator[None]:
    """The setting of every replay: no checkpointing, no compiled code, the random state kept, chosen positions off."""
    with ExitStack() as stack:
        checkpointed = [m for m in parts.outer.modules() if vars(m).get("gradient_checkpointing", False)]
        for module in checkpointed:
            module.gradient_checkpointing = False
            stack.callback(setattr, module, "gradient_checkpointing", True)
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        if parts.outer.training:
            stack.enter_context(torch.random.fork_rng(devices=_accelerators(parts.outer)))
        stack.enter_context(torch.autocast(**autocast))
        stack.enter_context(_muted_head(parts.outer))
        yield


def _accelerators(model: nn.Module) -> list[torch.device]:
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


def tail(parts: Anatomy, capture: Capture, hidden: Tensor) -> Tensor:
    """Logits `[R, V]` of final hidden states `[R, 1, H]`, through the outer model's own forward."""
    if parts.base is parts.outer:
        raise ValueError(
            f"{type(parts.outer).__name__} has no head, so its experts predict nothing; "
            "load the model with AutoModelForCausalLM or AutoModelForSequenceClassification."
        )
    # A classification head without padding token refuses batches.
    rows = (
        1 if parts.outer.config.get_text_config().pad_token_id is None and not _has_vocabulary(parts) else len(hidden)
    )
    return torch.cat([_tail(parts, capture, part) for part in hidden.split(rows)])


def _tail(parts: Anatomy, capture: Capture, hidden: Tensor) -> Tensor:
    tokens = torch.full(hidden.shape[:2], _real_token(parts.outer), dtype=torch.long, device=hidden.device)

    def stub(*args: Any, **kwargs: Any) -> Any:
        return type(capture.output)(last_hidden_state=hidden)

    with patched({parts.base: stub}):
        logits = parts.outer(input_ids=tokens, use_cache=False).logits
    return logits.reshape(hidden.shape[0], -1)


def _has_vocabulary(parts: Anatomy) -> bool:
    return parts.outer.get_output_embeddings() is not None


def _real_token(outer: nn.Module) -> int:
    """A token id that no sequence-classification head takes for padding."""
    return 1 if outer.config.get_text_config().pad_token_id == 0 else 0


def consult(experts: nn.Module, call: ExpertCall, tokens: Tensor, index: Tensor, *, columns: int = 1) -> Tensor:
    """E_k of some tokens: `[n]` flat positions and `[n, k]` expert ids to `[n, k, H]`, in one call of the experts."""
    rows, k = index.shape
    hidden = call.hidden[tokens].repeat_interleave(k, dim=0)
    weights = call.weights.new_zeros(rows * k, columns)
    weights[:, 0] = 1
    return experts(hidden, index.reshape(-1, 1).expand(-1, columns), weights).reshape(rows, k, -1)


@dataclass(frozen=True)
class Certificate:
    """How the counterfactual logits of one layer are computed, and how well that agrees with brute force.

    Args:
        path (`str`): "delta", "gather" or "prefix", from cheap to dear.
        error (`float`): largest absolute difference from the logits of full forwards with the token rerouted.
        scale (`float`): largest absolute logit among them.
        effect (`float`): largest absolute change that the rerouting makes to a logit.
        layer (`str`): name of the MoE layer.
        coefficient (`float`): what the final hidden state receives of a change of the experts' output ("delta" only).
    """

    path: str
    error: float
    scale: float
    effect: float
    layer: str
    coefficient: float = 1.0


def delta_hidden(parts: Anatomy, capture: Capture, tokens: Tensor, change: Tensor, coefficient: float) -> Tensor:
    """Final hidden states `[n * k, 1, H]` when the experts' output changes by `[n, k, H]` before the norm."""
    norm, before = final_norm(parts, capture)
    hidden = before.flatten(0, 1)[tokens].unsqueeze(1) + coefficient * change
    return norm(hidden.flatten(0, 1).unsqueeze(1))


def final_norm(parts: Anatomy, capture: Capture) -> tuple[nn.Module, Tensor]:
    """The module that gave `last_hidden_state`, and what it was given."""
    last = capture.last_hidden
    for module, (given, result) in capture.tops.items():
        if isinstance(result, Tensor) and (
            result is last or (result.shape == last.shape and torch.equal(result, last))
        ):
            return module, given
    raise UnsupportedMoEError(f"{type(parts.base).__name__} ends in no module that gives its last hidden state.")


def take_rows(inputs: dict[str, Any], batch: int, rows: Tensor) -> dict[str, Any]:
    """The inputs of some batch rows; what has no batch dimension stays."""

    def take(value: Any, name: str) -> Any:
        if isinstance(value, dict):
            return {key: take(item, key) for key, item in value.items()}
        if not isinstance(value, Tensor) or value.dim() < 2:
            return value
        if name == "position_ids" and value.dim() == 3 and value.shape[1] == batch:
            return value[:, rows]
        return value[rows] if value.shape[0] == batch else value

    return {name: take(value, name) for name, value in inputs.items()}


def counterfactual_logits(
    parts: Anatomy, capture: Capture, layer: MoELayer, tokens: Tensor, outputs: Tensor, certificate: Certificate
) -> Tensor:
    """Logits `[n, k, V]` of the tokens `[n]` when each expert's output `[n, k, H]` alone carries the routing mass."""
    call = capture.calls[layer.name]
    weights = call.weights[tokens].unsqueeze(-1).to(outputs.dtype)
    change = weights.sum(1, keepdim=True) * outputs - (weights * outputs).sum(1, keepdim=True)
    hidden = delta_hidden(parts, capture, tokens, change, certificate.coefficient)
    logits = tail(parts, capture, hidden)
    return logits.reshape(*outputs.shape[:2], -1)


def certify(parts: Anatomy, layer: MoELayer, capture: Capture) -> Certificate:
    """Compares each path with full forwards in which tokens were rerouted, and takes the cheapest exact one.

    It runs in evaluation mode and without gradient, on a few real tokens of one row of the captured batch.

    Raises:
        UnsupportedMoEError: no path gives the logits of brute force.
    """
    with torch.no_grad(), evaluating(parts.outer), replaying(parts, capture.autocast):
        row = _longest_row(capture)
        inputs = take_rows(_fresh(capture.inputs), capture.batch_shape[0], row[None])
        recorder = Recorder(parts, [layer])
        with recorder.attached():
            logits = parts.outer(**inputs).logits
        seen = recorder.capture
        tokens = _probed_tokens(parts, inputs, seen, logits)
        call = seen.calls[layer.name]
        outputs = consult(layer.module, call, tokens, call.index[tokens])
        truth = brute_force(parts, layer, seen, inputs, tokens)
        plain = tail(parts, seen, seen.last_hidden.flatten(0, 1)[tokens].unsqueeze(1)).unsqueeze(1)
        scale, effect = float(truth.abs().max()), float((truth - plain).abs().max())
        tolerance = _TOLERANCE * scale if truth.dtype == torch.float32 else 16 * torch.finfo(truth.dtype).eps * scale
        trial = Certificate("delta", 0.0, scale, effect, layer.name)
        error = float((counterfactual_logits(parts, seen, layer, tokens, outputs, trial) - truth).abs().max())
        if error <= tolerance:
            return replace(trial, error=error)
    raise UnsupportedMoEError(
        f"No path gives the counterfactual logits of {layer.name}: off by {error:.2g} on logits up to {scale:.2g}."
    )


def _fresh(inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs of a base model without what an earlier step or another output left in them."""
    dropped = ("past_key_values", "use_cache", "labels", "output_hidden_states", "output_attentions", "return_dict")
    given = {name: value for name, value in inputs.items() if value is not None and name not in dropped}
    return {**given, "use_cache": False}


def _longest_row(capture: Capture) -> Tensor:
    mask = capture.inputs.get("attention_mask")
    device = capture.last_hidden.device
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return mask.sum(-1).argmax().to(device)
    return torch.zeros((), dtype=torch.long, device=device)


def _probed_tokens(parts: Anatomy, inputs: dict[str, Any], seen: Capture, logits: Tensor) -> Tensor:
    """The last real token of the row and one in the middle; for a classifier the token that it reads."""
    if logits.dim() == 2:
        each = tail(parts, seen, seen.last_hidden.transpose(0, 1))
        return (each - logits).abs().amax(-1).argmin()[None]
    mask = inputs.get("attention_mask")
    real = torch.arange(seen.batch_shape[1], device=seen.last_hidden.device)
    if isinstance(mask, Tensor) and mask.dim() == 2:
        real = mask[0, -len(real) :].nonzero().squeeze(-1).to(real.device)
    return torch.unique(real[[len(real) // 2, -1]])


def brute_force(parts: Anatomy, layer: MoELayer, seen: Capture, inputs: dict[str, Any], tokens: Tensor) -> Tensor:
    """Logits `[n, k, V]` from one full forward per token and selected expert, with the token rerouted to it alone."""
    call = seen.calls[layer.name]
    rows = []
    for token in tokens.tolist():
        for expert in call.index[token].tolist():
            hook = _reroute(token, expert)
            handles = [layer.module.register_forward_pre_hook(hook, with_kwargs=True)]
            head = parts.outer.get_output_embeddings()
            if head is not None:
                handles.append(head.register_forward_pre_hook(lambda _, args, token=token: (args[0][:, [token]],)))
            with hooked(handles):
                logits = parts.outer(**inputs).logits
            rows.append(logits.reshape(-1, logits.shape[-1])[-1])
    return torch.stack(rows).reshape(len(tokens), -1, rows[0].shape[-1])


def _reroute(token: int, expert: int) -> Callable[..., tuple[tuple, dict]]:
    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        hidden, index, weights = bind_experts(module, args, kwargs)
        index, weights = index.clone(), weights.clone()
        index[token], mass = expert, weights[token].sum()
        weights[token] = 0
        weights[token, 0] = mass
        return (hidden, index, weights), {}

    return hook


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; on exit every module has its own mode again."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True
