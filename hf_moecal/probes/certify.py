"""Which way to the counterfactual logits is exact for the model at hand: each is compared with brute force."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .capture import Capture, ModelParts, Recorder
from .experts import replaced_at, run_experts, together
from .precise import exact_paths, projection
from .replay import (
    Reroute,
    delta_hidden,
    final_norm,
    fresh,
    gather_hidden,
    of_other_modalities,
    own_cache,
    prefix_hidden,
    replaying,
    take_rows,
)
from .routing import MoELayer, UnsupportedMoEError, hooked
from .sharding import is_sharded, of_first_process, unsharded
from .tail import logits_of, tail


_TOLERANCE = 1e-5  # of the logits' scale, in float32
_ROWS = 4  # of a batch with images, on which paths are compared
_NEAR = 2  # times the nearest path's own error, where only a low precision can tell


@dataclass(frozen=True)
class Certificate:
    """How the counterfactual logits of one layer are computed, and how well that agrees with brute force.

    Args:
        path (`str`): "delta", "gather" or "prefix", from cheap to dear.
        error (`float`): largest absolute difference from the logits of full forwards with the token rerouted.
        scale (`float`): largest absolute logit among them.
        effect (`float`): largest absolute change that the rerouting makes to a logit.
        layer (`str`): name of the MoE layer.
        coefficient (`float`, *optional*): what the final hidden state receives of a change of the experts' output;
            "delta" only.
        link (`str`, *optional*): what the layer makes of its router's scores, such as "softmax"; known once the
            router's distribution over all experts was asked for.
    """

    path: str
    error: float
    scale: float
    effect: float
    layer: str
    coefficient: float | None = None
    link: str | None = None


def columns_of(parts: ModelParts, layer: MoELayer, capture: Capture) -> int:
    """How many columns an index of one expert needs, checked by sum_k w_k E_k giving the experts' output.

    One is enough nearly everywhere; some experts take a second, of weight zero, to tell tokens from choices.

    Raises:
        UnsupportedMoEError: the experts' output is not the weighted sum of what each gives alone.
    """
    call, gap = capture.call(layer.name), float("nan")
    tokens = torch.unique(real_tokens(capture)[[0, -1]])
    with torch.no_grad(), replaying(parts, capture.autocast):
        if layer.scales_inputs:
            whole = together(layer, call.output)[tokens]
        else:
            whole = run_experts(parts, layer, call.hidden[tokens], call.index[tokens], call.weights[tokens])
        for columns in (1, 2):
            try:
                route = Reroute.to(parts, layer, call, tokens, call.index[tokens], columns=columns)
            except (IndexError, RuntimeError, ValueError):
                continue
            gap = float((route.together.squeeze(1) - whole).abs().max() / whole.abs().max())
            if gap <= _tolerance(whole.dtype, capture):
                return columns
    raise UnsupportedMoEError(
        f"The output of {layer.name} is not the weighted sum of what its experts put out alone (relative gap "
        f"{gap:.2g}), so no expert has a prediction of its own."
    )


def counterfactual_logits(
    parts: ModelParts, capture: Capture, layer: MoELayer, route: Reroute, certificate: Certificate
) -> Tensor:
    """Logits `[n, m, V]` of the rerouted tokens, by the path that the certificate names."""
    if certificate.path == "delta":
        hidden = delta_hidden(parts, capture, route, certificate.coefficient)
    else:
        path = {"gather": gather_hidden, "prefix": prefix_hidden}[certificate.path]
        hidden = path(parts, capture, layer, route)
    return tail(parts, capture, hidden.flatten(0, 1).unsqueeze(1)).reshape(*route.alone.shape[:2], -1)


def certify(parts: ModelParts, layer: MoELayer, capture: Capture, columns: int) -> Certificate:
    """Compares each path with full forwards in which tokens were rerouted, and takes the cheapest exact one.

    It runs in evaluation mode and without gradient, on one or two real tokens of one row of the captured batch; where
    weights are sharded, of that of the first process, so that all of them run the same forwards.

    Raises:
        UnsupportedMoEError: no path gives the logits of brute force.
    """
    with torch.no_grad(), evaluating(parts.outer), replaying(parts, capture.autocast):
        inputs = fresh(capture.inputs)
        if not of_other_modalities(inputs):  # else of the whole batch, as they do not say whose images they are
            longest = _mask(capture).sum(-1).argmax()[None]
            inputs = take_rows(inputs, capture.batch_shape[0], longest)
        if is_sharded(parts):
            inputs = of_first_process(inputs, capture.last_hidden.device)
        logits, seen = _observed(parts, layer, inputs)
        call, tokens = seen.call(layer.name), _certified_tokens(parts, seen, logits)
        route = Reroute.to(parts, layer, call, tokens, call.index[tokens], columns=columns)
        plain = tail(parts, seen, seen.last_hidden.flatten(0, 1)[tokens].unsqueeze(1)).unsqueeze(1)
        truth, changes = brute_force(parts, layer, seen, inputs, route)
        tolerance = _tolerance(truth.dtype, capture)
        if (truth - plain).abs().max() < 10 * tolerance * truth.abs().max():
            route = _pushed(parts, seen, route)
            truth, changes = brute_force(parts, layer, seen, inputs, route)
        scale, effect = float(truth.abs().max()), float((truth - plain).abs().max())
        coefficient = projection(route.alone - route.together, changes)
        untried = Certificate("", tolerance * scale, scale, effect, layer.name, coefficient)
        exact = None if tolerance == _TOLERANCE else _exact_paths(parts, seen, layer, route)
        return _cheapest(parts, seen, layer, route, truth, untried, exact)


def _exact_paths(parts: ModelParts, seen: Capture, layer: MoELayer, route: Reroute) -> dict[str, float | None] | None:
    """The paths that are exact in float32, or nothing where that cannot be found out."""
    try:
        norm = final_norm(parts, seen)[0]
    except UnsupportedMoEError:
        norm = None
    try:
        return None if is_sharded(parts) else exact_paths(parts, seen, layer, _pushed(parts, seen, route), norm)
    except Exception:  # whatever unknown code raises that was not made for float32
        return None


def _cheapest(
    parts: ModelParts,
    seen: Capture,
    layer: MoELayer,
    route: Reroute,
    truth: Tensor,
    untried: Certificate,
    exact: dict[str, float | None] | None,
) -> Certificate:
    """The first of the paths that are exact by structure, or that are nearly as near to brute force as the nearest."""
    tried, misses = [], []
    for path in ("delta", "gather", "prefix"):
        if exact is not None and path not in exact:
            misses.append(f"{path} is off in float32")
            continue
        coefficient = untried.coefficient if exact is None else exact[path]
        trial = replace(untried, path=path, coefficient=coefficient if path == "delta" else None)
        try:
            found = counterfactual_logits(parts, seen, layer, route, trial)
        except Exception as failure:  # whatever a replay of unknown code raises, it is no path for it
            misses.append(f"{path} fails ({type(failure).__name__}: {failure})")
            continue
        tried.append(replace(trial, error=float((found - truth).abs().max())))
    certified = [each for each in tried if each.error <= untried.error]
    if not certified:
        misses += [f"{each.path} is off by {each.error:.2g}" for each in tried]
        raise UnsupportedMoEError(
            f"No path gives the counterfactual logits of {layer.name}, which reach {untried.scale:.2g}: "
            f"{'; '.join(misses)}."
        )
    if exact is not None or untried.error <= _TOLERANCE * untried.scale:
        return certified[0]
    nearest = min(each.error for each in certified)
    return next(each for each in certified if each.error <= _NEAR * nearest)


def _tolerance(dtype: torch.dtype, capture: Capture) -> float:
    if capture.autocast["enabled"]:
        dtype = capture.autocast["dtype"]
    return _TOLERANCE if dtype in (torch.float32, torch.float64) else 8 * torch.finfo(dtype).eps


def _pushed(parts: ModelParts, seen: Capture, route: Reroute) -> Reroute:
    """The same tokens, pushed as hard as their hidden states are long.

    Experts that (still) agree, or a single one, move no logit by more than rounding, which would certify any path.
    """
    generator = torch.Generator().manual_seed(0)
    push = torch.randn(route.alone.shape, generator=generator).to(route.alone)
    hidden = torch.stack([_norm_input(parts, seen, token) for token in route.tokens])
    return replace(route, alone=route.alone + push * hidden.float().square().mean().sqrt())


def _observed(parts: ModelParts, layer: MoELayer, inputs: dict[str, Any]) -> tuple[Tensor, Capture]:
    recorder = Recorder(parts, [layer], replayed={layer.name})
    with recorder.attached(), unsharded(parts, parts.outer):
        logits = logits_of(parts.outer(**own_cache(inputs)), parts)
    return logits, recorder.capture


def observe_random(parts: ModelParts, layer: MoELayer, count: int) -> Capture:
    """What a forward of random tokens, in evaluation mode and without gradient, leaves behind of one layer."""
    vocabulary = parts.outer.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (1, count), generator=torch.Generator().manual_seed(0))
    recorder = Recorder(parts, [layer], replayed=set())
    with torch.no_grad(), evaluating(parts.outer), recorder.attached():
        parts.base(input_ids=ids.to(next(parts.base.parameters()).device), use_cache=False)
    return recorder.capture


def _mask(capture: Capture) -> Tensor:
    """Which positions `[B, S]` hold real tokens."""
    mask, length = capture.inputs.get("attention_mask"), capture.batch_shape[1]
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return mask[:, -length:].to(capture.last_hidden.device) != 0
    return torch.ones(capture.batch_shape, dtype=torch.bool, device=capture.last_hidden.device)


def real_tokens(capture: Capture) -> Tensor:
    """Flat positions of the tokens that are no padding."""
    return _mask(capture).flatten().nonzero().squeeze(-1)


def _certified_tokens(parts: ModelParts, seen: Capture, logits: Tensor) -> Tensor:
    """The last real token of the row and one in the middle; for a classifier the token that it reads."""
    if logits.dim() == 2:
        each = tail(parts, seen, seen.last_hidden[:1].transpose(0, 1))
        return (each - logits[:1]).abs().amax(-1).argmin()[None]
    real = real_tokens(seen)
    if not of_other_modalities(seen.inputs):
        return torch.unique(real[[len(real) // 2, -1]])
    rows = [real[real // seen.batch_shape[1] == row] for row in range(min(seen.batch_shape[0], _ROWS))]
    return torch.cat([own[[len(own) // 2, -1]].unique() for own in rows if len(own)])  # any may have the images


def brute_force(
    parts: ModelParts, layer: MoELayer, seen: Capture, inputs: dict[str, Any], route: Reroute
) -> tuple[Tensor, Tensor]:
    """One full forward per token and expert, with the experts' output replaced at that token.

    Returns:
        The logits `[n, m, V]`, and by how much the input of the final norm changed, `[n, m, H]`.
    """
    shape = route.alone.shape[:2]
    logits, changes = [], []
    for token, alone in zip(route.tokens.repeat_interleave(shape[1]), route.alone.flatten(0, 1), strict=True):
        found, after = _rerouted(parts, layer, seen, inputs, token, alone)
        logits.append(found)
        changes.append(_norm_input(parts, after, token) - _norm_input(parts, seen, token))
    return torch.stack(logits).unflatten(0, shape), torch.stack(changes).unflatten(0, shape)


def _rerouted(
    parts: ModelParts, layer: MoELayer, seen: Capture, inputs: dict[str, Any], token: Tensor, alone: Tensor
) -> tuple[Tensor, Capture]:
    def replace_output(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return replaced_at(layer, output, token, alone)

    handles = [layer.module.register_forward_hook(replace_output)]
    head = parts.outer.get_output_embeddings()
    if head is not None:  # never the logits of all positions
        place = token % seen.batch_shape[1]
        handles.append(head.register_forward_pre_hook(lambda _, args: (args[0][:, place[None]],)))
    with hooked(handles):
        logits, capture = _observed(parts, layer, inputs)
    row, place = token // capture.batch_shape[1], token % capture.batch_shape[1]
    if head is None:
        return (logits[row, place] if logits.dim() == 3 else logits[row]), capture
    return logits[row, -1], capture


def _norm_input(parts: ModelParts, capture: Capture, token: Tensor) -> Tensor:
    try:
        return final_norm(parts, capture)[1].flatten(0, 1)[token]
    except UnsupportedMoEError:
        return capture.last_hidden.flatten(0, 1)[token]


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
