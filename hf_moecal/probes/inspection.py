"""One text under the probe, layer by layer, as plain data and as a table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import ExpertProbe, probe_experts
from .certify import evaluating
from .routing import MoELayer


@torch.no_grad()
def probe_text(
    model: nn.Module,
    tokenizer: Any,
    text: str,
    *,
    label: int | None = None,
    layer: int | str | Sequence[int | str] = "all",
) -> dict[str, Any]:
    """Shows what each selected expert would have predicted for one text, at each MoE layer.

    A classifier is probed at the token that it reads; a causal model where it predicts the text's last token, which
    then is the label.

    Args:
        model (`nn.Module`): a supported MoE model with a head.
        tokenizer: the model's tokenizer.
        text (`str`): for a causal model at least two tokens long.
        label (`int`, *optional*): the true class, for the regret of a classifier.
        layer (`int`, `str`, list or `"all"`): MoE layers, as in [`probe_experts`].

    Returns:
        `dict`: `text`, `prediction` and `confidence` of the model, `label`, and `layers`, each with `name`, `index`,
        `path`, `entropy` and `regret` in nats, `margin`, `disagreement` and `experts`, each of which has `id`,
        `weight`, `share`, `prediction` and `confidence`. Only numbers, strings and `None`.

    Raises:
        ValueError: the text is too short, or the label is no class.
    """
    device = next(model.parameters()).device
    ids = tokenizer(text, return_tensors="pt")["input_ids"].to(device)
    with evaluating(model), probe_experts(model, layer=layer) as probe:
        outputs = model(input_ids=ids, use_cache=False)
        causal = outputs.logits.dim() == 3
        if causal and ids.shape[1] < 2:
            raise ValueError("A causal model predicts a token from earlier ones: give a text of two tokens or more.")
        position = ids.shape[1] - (2 if causal else 1)
        label = int(ids[0, -1]) if causal else label
        tokens = torch.tensor([position], device=device)
        name = _namer(model, tokenizer if causal else None)
        prediction, confidence = _top(probe.logits(tokens)[0], name)
        return {
            "text": text,
            "prediction": prediction,
            "confidence": confidence,
            "label": None if label is None else name(label),
            "layers": [_layer(probe, item, tokens, label, name) for item in probe.layers],
        }


def _layer(
    probe: ExpertProbe, layer: MoELayer, tokens: Tensor, label: int | None, name: Callable[[int], str]
) -> dict[str, Any]:
    where = {"layer": layer.name}
    record, alone = probe.record_of(layer.name)[tokens], probe.expert_logits(tokens, **where)[0]
    labels = None if label is None else torch.tensor([label], device=tokens.device)
    experts = []
    for k, expert in enumerate(record.expert_ids[0].tolist()):
        prediction, confidence = _top(alone[k], name)
        weight, share = float(record.weights[0, k]), float(record.shares[0, k])
        experts.append(
            {"id": expert, "weight": weight, "share": share, "prediction": prediction, "confidence": confidence}
        )
    return {
        "name": layer.name,
        "index": layer.index,
        "path": probe.certificate_of(layer.name).path,
        "entropy": float(record.entropy),
        "margin": float(record.margin),
        "disagreement": float(probe.disagreement(tokens, **where)),
        "regret": None if labels is None else float(probe.regret(tokens, labels, **where)),
        "experts": experts,
    }


def _namer(model: nn.Module, tokenizer: Any | None) -> Callable[[int], str]:
    if tokenizer is not None:
        return lambda index: tokenizer.decode([index])
    names = getattr(model.config, "id2label", None) or {}
    return lambda index: str(names.get(index, index))


def _top(logits: Tensor, name: Callable[[int], str]) -> tuple[str, float]:
    confidence, index = logits.float().softmax(-1).max(-1)
    return name(int(index)), float(confidence)


def format_probe(report: dict[str, Any]) -> str:
    """The result of [`probe_text`] as a table for the terminal.

    Example:

    ```python
    >>> from hf_moecal.probes.inspection import format_probe
    >>> expert = {"id": 3, "weight": 1.0, "share": 1.0, "prediction": "yes", "confidence": 0.75}
    >>> layer = {"name": "model.layers.0.mlp.experts", "index": 0, "path": "delta", "entropy": 0.0, "margin": 1.0,
    ...     "disagreement": 0.0, "regret": None, "experts": [expert]}
    >>> print(format_probe(
    ...     {"text": "Is it?", "prediction": "yes", "confidence": 0.75, "label": None, "layers": [layer]}
    ... ))
    The model predicts 'yes' (0.750).
    <BLANKLINE>
    layer  disagreement  regret  entropy  expert  weight  share  predicts  confidence
    0            0.0000       -    0.000       3   1.000  1.000  'yes'          0.750

    ```
    """
    head = f"The model predicts {report['prediction']!r} ({report['confidence']:.3f})"
    head += "." if report["label"] is None else f"; the label is {report['label']!r}."
    columns = "layer disagreement regret entropy expert weight share predicts confidence".split()
    rows = [columns]
    for layer in report["layers"]:
        regret = "-" if layer["regret"] is None else f"{layer['regret']:.4f}"
        own = [str(layer["index"]), f"{layer['disagreement']:.4f}", regret, f"{layer['entropy']:.3f}"]
        for expert in layer["experts"]:
            numbers = [str(expert["id"]), f"{expert['weight']:.3f}", f"{expert['share']:.3f}"]
            rows.append([*own, *numbers, repr(expert["prediction"]), f"{expert['confidence']:.3f}"])
            own = [""] * len(own)
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    lines = [
        "  ".join(_cell(row[i], widths[i], left=columns[i] in ("layer", "predicts")) for i in range(len(columns)))
        for row in rows
    ]
    return "\n".join([head, "", *(line.rstrip() for line in lines)])


def _cell(text: str, width: int, *, left: bool) -> str:
    return text.ljust(width) if left else text.rjust(width)
