"""What one forward of a language model says about its judged tokens: columns of the predictions table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..labels import labelled
from ..objectives import example_losses
from ..probes import RoutingRecord
from ..probes.agreement import among
from ..readouts.attached import AttachedReadout, Member, logits_of
from ..readouts.mixture import Mixed, Mixture, mixed_agreement
from ..table import ABSENT_LOGIT
from ..tasks.options import OptionTargets, WordTargets
from ..tasks.targets import Targets
from ..tasks.targets import token_figures as figures_of
from .classifier import routing_columns


_SEQUENCE = ("confidence", "correct", "nll", "brier", "sequence_confidence")
_ROUTING = ("routing_entropy", "routing_margin", "disagreement", "regret")
Value = Callable[[slice, Tensor], Tensor]


def _read(
    attached: AttachedReadout, targets: OptionTargets | Targets, output: Any, value: Value
) -> tuple[Tensor, dict[str, Tensor]]:
    """`value` of each judged row, `[n, f]`, and the routing figures of each labelled example."""
    first = attached.members[0]
    if len(attached.members) > 1:
        return attached.together(output, value), {}
    if first.mixture is not None:
        return _read_mixture(first.mixture, targets, value)
    rows = first.selector.reduced(logits_of(output), value)
    if first.probe is None or not targets.num_examples:
        return rows, {}
    record = first.probe.record[targets.tokens]
    with first.selecting(None):  # the probe calls the head on rows of its own choice
        agreement = targets.probed(first.probe)
    means = [targets.mean_by_example(values) for values in (record.entropy, record.margin)]
    return rows, dict(zip(_ROUTING, [*means, *agreement], strict=True))


def _read_mixture(
    mixture: Mixture, targets: OptionTargets | Targets, value: Value
) -> tuple[Tensor, dict[str, Tensor]]:
    def reduce(part: slice, mixed: Mixed) -> Tensor:
        narrow, labels = targets.narrowed(part, mixed)
        record = RoutingRecord(mixed.expert_ids, mixed.shares, (len(labels), 1))
        routing = [record.entropy, record.margin, *mixed_agreement(narrow, labels)]
        own = value(part, mixed.log_probs)
        return torch.cat([torch.stack(routing, 1).to(own.dtype), own.reshape(len(labels), -1)], 1)

    found = mixture.reduced(targets.tokens, reduce)
    routing = found[:, : len(_ROUTING)].unbind(1) if targets.num_examples else ()
    named = {name: targets.mean_by_example(column) for name, column in zip(_ROUTING, routing, strict=False)}
    return found[:, len(_ROUTING) :].squeeze(1), named


def _routed(attached: AttachedReadout, tokens: Tensor) -> dict[str, Tensor]:
    """The experts of each token and their weights, if anything watches the only model."""
    first = attached.members[0]
    if len(attached.members) > 1 or first.probe is None:
        return {}
    if first.mixture is not None:
        return dict(zip(("expert_ids", "expert_weights"), first.mixture.shares(tokens), strict=True))
    record = first.probe.record[tokens]
    return {"expert_ids": record.expert_ids, "expert_weights": record.weights.float()}


def option_figures(attached: AttachedReadout, targets: OptionTargets, output: Any) -> dict[str, Tensor]:
    """Columns for whole options, one entry for each example; routing figures over the right option's tokens."""

    def value(part: slice, logits: Tensor) -> Tensor:
        return targets.row_values(part, logits, example_losses)

    rows, routing = _read(attached, targets, output, value)
    known = labelled(targets.right)
    return {**_decided(targets.scores(rows), targets.right), **_spread(attached, routing, known)}


def word_figures(attached: AttachedReadout, targets: WordTargets, output: Any) -> dict[str, Tensor]:
    """Columns for label words, one entry for each example; the experts' own predictions are over the options too."""
    tokens, candidates, first = targets.tokens, targets.candidates, attached.members[0]

    def own(part: slice, logits: Tensor) -> Tensor:
        return among(logits, candidates[part])

    def both(part: slice, mixed: Mixed) -> Tensor:
        return among(torch.cat([mixed.log_probs.unsqueeze(1), mixed.expert_log_probs], 1), candidates[part])

    routed = _routed(attached, tokens)
    if not routed:
        scores = attached.together(output, own) if len(attached.members) > 1 else _own(first, output, own)
        return _decided(scores, targets.right)
    if first.mixture is not None:
        found = first.mixture.reduced(tokens, both)
        scores, alone, shares = found[:, 0], found[:, 1:], routed["expert_weights"]
    else:
        scores, shares = _own(first, output, own), first.probe.record[tokens].shares
        with first.selecting(None):
            alone = first.probe.reduced(tokens, own)
    columns = routing_columns(scores.float(), targets.right, alone.float(), shares, routed["expert_ids"])
    return {**_decided(scores, targets.right), **columns, **routed}


def _own(member: Member, output: Any, value: Value) -> Tensor:
    return member.selector.reduced(logits_of(output), value)


def sequence_figures(attached: AttachedReadout, targets: Targets, output: Any, sequences: int) -> dict[str, Tensor]:
    """Columns for whole sequences: means over their supervised tokens, NaN for a sequence that has none."""
    rows, routing = _read(attached, targets, output, _figures_of(targets))
    nll, confidence, prediction, brier = rows.unbind(-1)
    values = {
        "confidence": confidence,
        "correct": (prediction == targets.labels).double(),
        "nll": nll,
        "brier": brier,
    }
    means = {name: targets.mean_by_example(column.double()) for name, column in values.items()}
    means["sequence_confidence"] = (-means["nll"]).exp()
    count = torch.bincount(targets.rows, minlength=sequences)
    return {**_spread(attached, {**means, **routing}, count > 0), "num_tokens": count}


def nothing_supervised(attached: AttachedReadout, sequences: int, device: torch.device) -> dict[str, Tensor]:
    """[`sequence_figures`] of sequences of which none has a supervised token."""
    count = torch.zeros(sequences, dtype=torch.long, device=device)
    none = dict.fromkeys(_SEQUENCE, torch.zeros(0, dtype=torch.float64, device=device))
    return {**_spread(attached, none, count > 0), "num_tokens": count}


def token_figures(attached: AttachedReadout, targets: Targets, output: Any) -> dict[str, Tensor]:
    """Columns for supervised tokens, one entry for each."""
    rows, routing = _read(attached, targets, output, _figures_of(targets))
    nll, confidence, prediction, brier = rows.unbind(-1)
    found = {"label": targets.labels, "prediction": prediction.long(), "confidence": confidence.double()}
    return {**found, "nll": nll, "brier": brier, **routing, **_routed(attached, targets.tokens)}


def _figures_of(targets: Targets) -> Value:
    return lambda part, logits: figures_of(logits, targets.labels[part])


def _decided(scores: Tensor, right: Tensor) -> dict[str, Tensor]:
    scores = scores.double().masked_fill(scores < ABSENT_LOGIT / 2, ABSENT_LOGIT)  # exactly, also after float32
    probs = scores.softmax(-1)
    confidence, prediction = probs.max(-1)
    return {
        "label": right,
        "logits": scores,
        "probs": probs,
        "prediction": prediction,
        "confidence": confidence,
    }


def _spread(attached: AttachedReadout, found: dict[str, Tensor], known: Tensor) -> dict[str, Tensor]:
    """Figures of the labelled examples among all, NaN for the others."""
    routed = len(attached.members) == 1 and attached.members[0].probe is not None
    names = list(dict.fromkeys([*found, *(_ROUTING if routed else ())]))
    spread = {name: known.new_full((len(known),), float("nan"), dtype=torch.float64) for name in names}
    for name, values in found.items():
        spread[name][known] = values.double()
    return spread
