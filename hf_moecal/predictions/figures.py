"""What one forward of a language model says about its judged tokens: columns of the predictions table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..objectives import example_losses
from ..probes import RoutingRecord
from ..probes.agreement import among
from ..readouts.mixture import Mixed, Mixture, mixed_agreement
from ..readouts.reading import Member, Reading, logits_of
from ..table import ABSENT_LOGIT, IGNORED_LABEL
from ..tasks.choice import OptionSupervision, WordSupervision
from ..tasks.supervision import Supervision
from ..tasks.supervision import token_figures as figures_of
from .classifier import routing_columns


_SEQUENCE = ("confidence", "correct", "nll", "brier", "sequence_confidence")
_ROUTING = ("routing_entropy", "routing_margin", "disagreement", "regret")
Value = Callable[[slice, Tensor], Tensor]


def _read(
    reading: Reading, supervision: OptionSupervision | Supervision, output: Any, value: Value
) -> tuple[Tensor, dict[str, Tensor]]:
    """`value` of each judged row, `[n, f]`, and the routing figures of each labelled example."""
    first = reading.members[0]
    if len(reading.members) > 1:
        return reading.together(output, value), {}
    if first.mixture is not None:
        return _read_mixture(first.mixture, supervision, value)
    rows = first.selector.reduced(logits_of(output), value)
    if first.probe is None or not supervision.num_examples:
        return rows, {}
    record = first.probe.record[supervision.tokens]
    with first.selecting(None):  # the probe calls the head on rows of its own choice
        agreement = supervision.probed(first.probe)
    means = [supervision.mean_by_example(values) for values in (record.entropy, record.margin)]
    return rows, dict(zip(_ROUTING, [*means, *agreement], strict=True))


def _read_mixture(
    mixture: Mixture, supervision: OptionSupervision | Supervision, value: Value
) -> tuple[Tensor, dict[str, Tensor]]:
    def reduce(part: slice, mixed: Mixed) -> Tensor:
        narrow, labels = supervision.narrowed(part, mixed)
        record = RoutingRecord(mixed.expert_ids, mixed.shares, (len(labels), 1))
        routing = [record.entropy, record.margin, *mixed_agreement(narrow, labels)]
        own = value(part, mixed.log_probs)
        return torch.cat([torch.stack(routing, 1).to(own.dtype), own.reshape(len(labels), -1)], 1)

    found = mixture.reduced(supervision.tokens, reduce)
    routing = found[:, : len(_ROUTING)].unbind(1) if supervision.num_examples else ()
    named = {name: supervision.mean_by_example(column) for name, column in zip(_ROUTING, routing, strict=False)}
    return found[:, len(_ROUTING) :].squeeze(1), named


def _routed(reading: Reading, tokens: Tensor) -> dict[str, Tensor]:
    """The experts of each token and their weights, if anything watches the only model."""
    first = reading.members[0]
    if len(reading.members) > 1 or first.probe is None:
        return {}
    if first.mixture is not None:
        return dict(zip(("expert_ids", "expert_weights"), first.mixture.shares(tokens), strict=True))
    record = first.probe.record[tokens]
    return {"expert_ids": record.expert_ids, "expert_weights": record.weights.float()}


def option_figures(reading: Reading, supervision: OptionSupervision, output: Any) -> dict[str, Tensor]:
    """Columns for whole options, one entry for each example; routing figures over the right option's tokens."""

    def value(part: slice, logits: Tensor) -> Tensor:
        return supervision.row_values(part, logits, example_losses)

    rows, routing = _read(reading, supervision, output, value)
    known = supervision.right != IGNORED_LABEL
    return {**_decided(supervision.scores(rows), supervision.right), **_spread(reading, routing, known)}


def word_figures(reading: Reading, supervision: WordSupervision, output: Any) -> dict[str, Tensor]:
    """Columns for label words, one entry for each example; the experts' own predictions are over the options too."""
    tokens, candidates, first = supervision.tokens, supervision.candidates, reading.members[0]

    def own(part: slice, logits: Tensor) -> Tensor:
        return among(logits, candidates[part])

    def both(part: slice, mixed: Mixed) -> Tensor:
        return among(torch.cat([mixed.log_probs.unsqueeze(1), mixed.expert_log_probs], 1), candidates[part])

    routed = _routed(reading, tokens)
    if not routed:
        scores = reading.together(output, own) if len(reading.members) > 1 else _own(first, output, own)
        return _decided(scores, supervision.right)
    if first.mixture is not None:
        found = first.mixture.reduced(tokens, both)
        scores, alone, shares = found[:, 0], found[:, 1:], routed["expert_weights"]
    else:
        scores, shares = _own(first, output, own), first.probe.record[tokens].shares
        with first.selecting(None):
            alone = first.probe.reduced(tokens, own)
    columns = routing_columns(scores.float(), supervision.right, alone.float(), shares, routed["expert_ids"])
    return {**_decided(scores, supervision.right), **columns, **routed}


def _own(member: Member, output: Any, value: Value) -> Tensor:
    return member.selector.reduced(logits_of(output), value)


def sequence_figures(reading: Reading, supervision: Supervision, output: Any, sequences: int) -> dict[str, Tensor]:
    """Columns for whole sequences: means over their supervised tokens, NaN for a sequence that has none."""
    rows, routing = _read(reading, supervision, output, _figures_of(supervision))
    nll, confidence, prediction, brier = rows.unbind(-1)
    values = {
        "confidence": confidence,
        "correct": (prediction == supervision.labels).double(),
        "nll": nll,
        "brier": brier,
    }
    means = {name: supervision.mean_by_example(column.double()) for name, column in values.items()}
    means["sequence_confidence"] = (-means["nll"]).exp()
    count = torch.bincount(supervision.rows, minlength=sequences)
    return {**_spread(reading, {**means, **routing}, count > 0), "num_tokens": count}


def nothing_supervised(reading: Reading, sequences: int, device: torch.device) -> dict[str, Tensor]:
    """[`sequence_figures`] of sequences of which none has a supervised token."""
    count = torch.zeros(sequences, dtype=torch.long, device=device)
    none = dict.fromkeys(_SEQUENCE, torch.zeros(0, dtype=torch.float64, device=device))
    return {**_spread(reading, none, count > 0), "num_tokens": count}


def token_figures(reading: Reading, supervision: Supervision, output: Any) -> dict[str, Tensor]:
    """Columns for supervised tokens, one entry for each."""
    rows, routing = _read(reading, supervision, output, _figures_of(supervision))
    nll, confidence, prediction, brier = rows.unbind(-1)
    found = {"label": supervision.labels, "prediction": prediction.long(), "confidence": confidence.double()}
    return {**found, "nll": nll, "brier": brier, **routing, **_routed(reading, supervision.tokens)}


def _figures_of(supervision: Supervision) -> Value:
    return lambda part, logits: figures_of(logits, supervision.labels[part])


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


def _spread(reading: Reading, found: dict[str, Tensor], known: Tensor) -> dict[str, Tensor]:
    """Figures of the labelled examples among all, NaN for the others."""
    routed = len(reading.members) == 1 and reading.members[0].probe is not None
    names = list(dict.fromkeys([*found, *(_ROUTING if routed else ())]))
    spread = {name: known.new_full((len(known),), float("nan"), dtype=torch.float64) for name in names}
    for name, values in found.items():
        spread[name][known] = values.double()
    return spread
