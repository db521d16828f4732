"""The calibration section of a model card: rendered from plain data, merged into a card that others write too."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from .card_sources import published_name, without_local_links, without_local_paths, without_placeholders


if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

    from ..calibration import CalibrationRecord

_SECTION = re.compile(r"<!-- hf_moecal:begin outside=([0-9a-f]{16}) -->.*?<!-- hf_moecal:end -->\n?", re.S)
_FRONT_MATTER = re.compile(r"\A\s*---[ \t]*\r?\n.*?\n---[ \t]*(?:\r?\n|\Z)", re.S)
_METRICS = {"ece": "ECE", "nll": "NLL", "brier_score": "Brier score", "accuracy": "Accuracy"}
_KEYS = {"brier_score": "brier"}
_MARK = " (hf_moecal)"  # ends the names of our model-index entries, so that the next push replaces them and no others
_TAGS = ("hf_moecal", "calibration", "mixture-of-experts")


def render_section(
    *,
    record: CalibrationRecord | None,
    training: Mapping[str, Any],
    evaluation: Mapping[str, Any] | None,
    figures: Sequence[str],
    repo_id: str,
) -> str:
    """Markdown of the calibration section.

    Args:
        record: from `calibration.json`, if there is one.
        training: settings from `moecal_training.json`; may be empty.
        evaluation: `sets` and `dataset` from `moecal_evaluation.json`, if there is one.
        figures: paths of the reliability diagrams in the repository.
        repo_id: where the model is published.
    """
    parts = ["## Calibration", "How far this model's confidence can be trusted, measured with `hf_moecal`."]
    if training:
        parts += ["### Training", _bullets({name: published_name(value) for name, value in training.items()})]
    if evaluation:
        parts += ["### Calibration per evaluation set", *_evaluated(evaluation, record)]
    if record is not None and record.readout is not None:
        parts += ["### Readout", *_readout(record.readout, repo_id)]
    parts += ["### Recalibration", *_recalibration(record, repo_id)]
    if figures:
        parts += ["### Reliability diagrams", *(f"![Reliability diagram]({path})" for path in figures)]
    parts += ["### Limits", *_limits(record, evaluation)]
    return "\n\n".join(parts) + "\n"


def merge_card(
    *,
    local: str | None,
    remote: str | None,
    section: str,
    results: Sequence[EvalResult],
    model_name: str,
    defaults: Mapping[str, str],
) -> str:
    """The card to publish: our section in a card whose other text is kept.

    Of the local and the published card the published one is kept, because a user may have edited it on the Hub;
    unless its text is exactly as we left it (its section carries a hash of the text around it), when the local one,
    such as Trainer's latest, is newer. Metadata are joined, the published values winning; `defaults` are entered where
    neither has any. What a template left unfilled, and names that are paths of this machine, are not published.
    """
    from huggingface_hub import ModelCardData

    base = local if remote is None or (local is not None and _as_we_left_it(remote)) else remote
    body = f"# {_inline(model_name)}" if base is None else _body(base)
    if base is local and base is not None:
        body = without_local_links(without_placeholders(body))
    text, place = _SECTION.sub("", body).strip(), _SECTION.search(body)
    ours = f"<!-- hf_moecal:begin outside={_stamp(text)} -->\n{section}<!-- hf_moecal:end -->\n"
    body = body[: place.start()] + ours + body[place.end() :] if place else f"{text}\n\n{ours}"
    metadata: dict[str, Any] = {}
    entries: dict[tuple, EvalResult] = {}
    for card in filter(None, (local, remote)):
        data = _metadata(card)
        entries |= {_identity(result): result for result in data.eval_results or [] if not _is_ours(result)}
        found = {key: value for key, value in data.to_dict().items() if key not in ("model-index", "model_name")}
        tags = [*metadata.get("tags", []), *(found.get("tags") or [])]
        metadata = {**metadata, **found, "tags": tags}
    metadata = without_local_paths(metadata)
    metadata["tags"] = list(dict.fromkeys([*metadata.get("tags", []), *_TAGS]))
    metadata = {**defaults, **{name: value for name, value in metadata.items() if value is not None}}
    if "license" not in metadata:
        warnings.warn(
            "The card names no license, without which nobody may use the model: push with license=... (`--license`), "
            "or enter `license:` at the top of README.md."
        )
    every = [*entries.values(), *results] or None
    data = ModelCardData(**metadata, eval_results=every, model_name=model_name if every else None)
    return f"---\n{data.to_yaml()}\n---\n\n{body.strip()}\n"


def eval_results(evaluation: Mapping[str, Any] | None, *, task_type: str) -> list[EvalResult]:
    """`model-index` entries: ECE, NLL, Brier score and accuracy of each evaluation set, with n and the interval."""
    from huggingface_hub import EvalResult

    results = []
    evaluation = evaluation or {}
    dataset = evaluation.get("dataset", {})
    sets = [(name, figures, "") for name, figures in evaluation.get("sets", {}).items()]
    sets += [(name, figures, ", calibrated") for name, figures in evaluation.get("calibrated", {}).items()]
    for name, figures, kept in sets:
        for kind, title in _METRICS.items():
            value = figures.get(_KEYS.get(kind, kind))
            if value is None:
                continue
            extra = {"n": figures["n"]}
            interval = figures.get(f"{kind}_interval")
            if interval:
                extra["interval_95"] = [round(end, 6) for end in interval]
            results.append(
                EvalResult(
                    task_type=task_type,
                    dataset_type=_plain_text(dataset.get("id") or name),
                    dataset_name=_plain_text(name),
                    dataset_revision=dataset.get("revision"),
                    dataset_split=dataset.get("split"),
                    metric_type=kind,
                    metric_name=title + kept + _MARK,
                    metric_value=round(value, 6),
                    metric_args=extra,
                )
            )
    return results


def benchmark_entry(evaluation: Mapping[str, Any] | None) -> dict[str, bytes]:
    """The file of the Hub's newer format for results: a benchmark there, its task, one value.

    Only an accuracy is such a value, of one set that names the benchmark's `id` and `task_id`; calibration figures
    stay in the `model-index`.
    """
    dataset, sets = (evaluation or {}).get("dataset", {}), list((evaluation or {}).get("sets", {}).values())
    if not {"id", "task_id"} <= set(dataset) or len(sets) != 1 or sets[0].get("accuracy") is None:
        return {}
    import yaml

    named = {name: dataset[name] for name in ("id", "task_id", "revision") if name in dataset}
    notes = f"accuracy of {sets[0]['n']} rows; ECE {sets[0]['ece']:.4f} (hf_moecal)"
    entry = {"dataset": named, "value": round(sets[0]["accuracy"], 6), "notes": notes}
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{dataset['id'].split('/')[-1]}-{dataset['task_id']}")
    return {f".eval_results/{name}.yaml": yaml.safe_dump([entry], sort_keys=False).encode("utf-8")}


def _evaluated(evaluation: Mapping[str, Any], record: CalibrationRecord | None) -> list[str]:
    """The tables of the evaluation sets, which say whether they are of the calibrated probabilities."""
    applied = record is not None and record.method != "none" and record.baked is None
    after = evaluation.get("calibrated")
    if not applied:
        return [_sets_table(evaluation["sets"]), _LEGEND]
    said = "**Of the model's own probabilities, before the calibration below**"
    if not after:
        said += "; what it makes of them on these sets was not measured"
    parts = [f"{said}:", _sets_table(evaluation["sets"])]
    if after:
        parts += ["**With the calibration, as the model loads below:**", _sets_table(after)]
    return [*parts, _LEGEND]


_LEGEND = (
    "ECE: expected calibration error of the top-label confidence, 15 equal-width bins, 95 % interval. "
    "Debiased: without the part that a perfectly calibrated model of the same n would show by chance. "
    "Gap: mean confidence minus accuracy; positive is overconfident."
)


def _sets_table(sets: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [
        "| set | n | accuracy | ECE (95 % interval) | ECE, debiased | NLL | Brier | gap |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, figures in sets.items():
        ece, ends = _number(figures["ece"]), figures.get("ece_interval")
        if ends and None not in ends:
            ece += f" ({ends[0]:.3f} to {ends[1]:.3f})"
        cells = [_inline(name), f"{figures['n']:,}", _number(figures.get("accuracy")), ece]
        cells += [_number(figures.get(key)) for key in ("ece_debiased", "nll", "brier")]
        cells.append(_number(figures.get("signed_gap"), "+.3f"))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _readout(readout: Mapping[str, Any], repo_id: str) -> list[str]:
    experts, members = readout["experts"], readout["members"]
    chosen = "all experts" if experts is None else f"the {experts} likeliest experts"
    what = {
        "native": "predicts by its own logits",
        "mixture": "mixes the probabilities that the selected experts of its last mixture-of-experts layer give alone",
        "soft_mixture": f"mixes the probabilities that {chosen} of its last mixture-of-experts layer give alone, with "
        "the router's full distribution",
    }[readout["kind"]]
    if members > 1:
        what += f", and is a committee of {members} last layers in equal shares (`members.safetensors`)"
    return [
        f"This model {what}. **The figures here are of that readout.** Plain transformers reads the native one of the "
        "first member, for which they do not hold; this gives the model that was measured:",
        f'```python\nimport hf_moecal\n\nmodel = hf_moecal.from_pretrained("{repo_id}")\n```',
    ]


def _recalibration(record: CalibrationRecord | None, repo_id: str) -> list[str]:
    if record is None or record.method == "none":
        said = "No calibration was applied after training."
        return [
            said if record is None else f"{said} On held-out rows none was better than the model's own confidence."
        ]
    parts = [f"Method: `{_inline(record.method)}`. {_temperature(record)}{_fitted_on(record.data)}".rstrip()]
    if record.before and record.after:
        parts.append(_before_after(record.before, record.after))
    if record.baked is not None:
        parts.append(
            f"The calibration is part of the weights ({_inline(str(record.baked.get('into', '')))}): any runtime "
            "gives calibrated probabilities, and it must not be applied again."
        )
    else:
        parts.append("The weights are as trained; `calibration.json` holds the calibration:")
        parts.append(
            f'```python\nfrom hf_moecal.hub import from_pretrained\n\nmodel = from_pretrained("{repo_id}")\n```'
        )
    return parts


def _temperature(record: CalibrationRecord) -> str:
    value, ends = record.parameters.get("temperature"), record.parameters.get("interval")
    if not isinstance(value, int | float):
        return ""
    interval = f" (95 % interval {ends[0]:.3g} to {ends[1]:.3g})" if isinstance(ends, list) and len(ends) == 2 else ""
    return f"Temperature {value:.4g}{interval}. "


def _fitted_on(data: Mapping[str, Any]) -> str:
    name, revision, count = (data.get(key) for key in ("name", "revision", "n"))
    if not name and not count:
        return ""
    what = _inline(str(name)) if name else "held-out data"
    if revision:
        what += f" at revision {_inline(str(revision))}"
    return f"Fitted on {what}" + (f", {count:,} rows" if isinstance(count, int) else "") + "."


def _before_after(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    lines = ["| held-out rows | ECE | NLL | Brier | gap |", "|---|---:|---:|---:|---:|"]
    for title, figures in (("before", before), ("after", after)):
        cells = [_number(figures.get(key)) for key in ("ece", "nll", "brier")]
        lines.append(f"| {title} | " + " | ".join([*cells, _number(figures.get("signed_gap"), "+.3f")]) + " |")
    return "\n".join(lines)


def _limits(record: CalibrationRecord | None, evaluation: Mapping[str, Any] | None) -> list[str]:
    points = ["Calibration was measured on the sets above and says nothing about data that differ from all of them."]
    if not evaluation:
        points = ["No evaluation set was recorded with this checkpoint: its calibration on any data is unknown."]
    for name, figures in (evaluation or {}).get("sets", {}).items():
        floor = figures.get("ece_noise_floor")
        if floor is not None and figures["ece"] is not None and figures["ece"] <= floor:
            points.append(
                f"{_inline(name)}: with {figures['n']:,} rows a perfectly calibrated model would show an ECE of about "
                f"{floor:.3f}, so this set cannot tell the two apart."
            )
    if record is not None and record.method not in ("none",):
        points.append(
            "A calibration fitted on one kind of data can make another kind worse; compare before and after on yours."
        )
    points += [_inline(sentence) for sentence in (record.warnings if record else [])]
    return ["\n".join(f"- {point}" for point in points)]


def _bullets(values: Mapping[str, Any]) -> str:
    return "\n".join(f"- {_inline(key.replace('_', ' '))}: {_inline(str(value))}" for key, value in values.items())


def _number(value: Any, style: str = ".3f") -> str:
    return format(value, style) if isinstance(value, int | float) else "n/a"


def _plain_text(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:200]


def _inline(text: str) -> str:
    """Text of others as Markdown that stays in its cell: no markup, links, HTML or table bars."""
    return re.sub(r"([\\`*_{}\[\]<>|#!])", r"\\\1", _plain_text(text)).replace("\\<", "&lt;").replace("\\>", "&gt;")


def _body(card: str) -> str:
    return _FRONT_MATTER.sub("", card, count=1)


def _outside(card: str) -> str:
    """A card's text without its metadata and our section."""
    return _SECTION.sub("", _body(card)).strip()


def _stamp(text: str) -> str:
    return sha256("\n".join(text.split()).encode("utf-8")).hexdigest()[:16]


def _as_we_left_it(card: str) -> bool:
    found = _SECTION.search(_body(card))
    return found is not None and found.group(1) == _stamp(_outside(card))


def metadata_of(card: str) -> dict[str, Any]:
    """The metadata at the top of a card; empty where there are none."""
    return _metadata(card).to_dict()


def _metadata(card: str) -> ModelCardData:
    from huggingface_hub import ModelCard, ModelCardData

    if not _FRONT_MATTER.match(card):
        return ModelCardData()
    try:
        return ModelCard(card, ignore_metadata_errors=True).data
    except Exception as error:  # the YAML reader has errors of its own kind
        raise ValueError("The metadata at the top of README.md are not valid YAML; repair or remove them.") from error


def _identity(result: EvalResult) -> tuple:
    return (result.unique_identifier, result.metric_type, result.metric_name)


def _is_ours(result: EvalResult) -> bool:
    return bool(result.metric_name) and result.metric_name.endswith(_MARK)
