"""A model and a dataset become the predictions table that everything else reads; see [`hf_moecal.table`]."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .calibration.base import TABLE_CALIBRATOR
from .objectives import check_labels
from .prefix_cache import PrefixCache
from .probes import ExpertProbe, RoutingRecord, probe_experts
from .probes.agreement import disagreement, regret
from .readout import ClassifierReadout, Mixture, Readout
from .table import COLUMNS, IGNORED_LABEL
from .tasks import pooled_positions, real_tokens, without_empty


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def predict(
    model: nn.Module,
    dataset: Dataset,
    *,
    processing_class: PreTrainedTokenizerBase | None = None,
    text_column: str = "text",
    group: str | None = None,
    batch_size: int = 32,
    max_length: int | None = None,
    layer: int | None = -1,
    readout: str = "native",
    readout_experts: int | None = None,
    prefix: PrefixCache | None = None,
    progress: bool = True,
) -> Dataset:
    """Predicts every example of a dataset, with its routing.

    The model stays as it is; it runs in evaluation mode, in batches of similar length, without gradient.

    Args:
        model (`PreTrainedModel`): a mixture-of-experts model with a sequence-classification head.
        dataset (`datasets.Dataset`): has `input_ids`, or the text column. A column `label` (or `labels`) is optional
            and gives `label` and `regret`. All other columns are kept, under their names.
        processing_class (`PreTrainedTokenizerBase`, *optional*): tokenizer; needed for text.
        text_column (`str`, *optional*, defaults to `"text"`): the column to tokenize.
        group (`str`, *optional*): value of the column `group` for all rows, for example the set's name.
        batch_size (`int`, *optional*, defaults to 32): sequences per forward.
        max_length (`int`, *optional*): tokens after which a text is cut.
        layer (`int`, *optional*, defaults to -1): MoE layer whose routing is recorded; `None` records none, and
            works for dense models too.
        readout (`str`, *optional*, defaults to `"native"`): what predicts, see [`~hf_moecal.readout.Readout`]. Of a
            mixture the table's experts are those that are mixed, with their shares as `expert_weights`, and a
            column `readout` names it.
        readout_experts (`int`, *optional*): with `readout="soft_mixture"`, mix only so many.
        prefix ([`~hf_moecal.prefix_cache.PrefixCache`], *optional*): entered cache through which the model runs.
        progress (`bool`, *optional*, defaults to `True`): whether to show a progress bar.

    Returns:
        `datasets.Dataset`: the predictions table, in the order of `dataset`. `id` is the row number unless the dataset
        has that column; rows without a label have `label` -100 and `regret` NaN.

    Raises:
        ValueError: the dataset is empty or has neither tokens nor text, or a label is out of range.

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from transformers import MixtralConfig, MixtralForSequenceClassification
    >>> from hf_moecal import predict
    >>> config = MixtralConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
    ...     num_attention_heads=2, num_key_value_heads=2, num_local_experts=4, num_labels=2, pad_token_id=0)
    >>> data = Dataset.from_dict({"input_ids": [[4, 5, 6], [7, 8]], "label": [0, 1]})
    >>> table = predict(MixtralForSequenceClassification(config), data, group="movie", progress=False)
    >>> table.column_names[:6], len(table["expert_ids"][0])
    (['id', 'label', 'logits', 'probs', 'prediction', 'confidence'], 2)

    ```
    """
    from datasets import Dataset

    dataset = dataset.with_format(None)
    tokens = _tokenized(dataset, processing_class, text_column, max_length)
    labels = _labels(dataset)
    if prefix is not None:
        prefix.fill(tokens, progress=progress)
    order = sorted(range(len(tokens)), key=lambda row: -len(tokens[row]))
    rows: list[dict[str, Any] | None] = [None] * len(tokens)
    training = model.training
    model.eval()
    wanted = Readout(readout, readout_experts)
    watching = _watching(model, layer, wanted)
    try:
        with (
            torch.no_grad(),
            watching as routing,
            tqdm(
                total=len(tokens), desc=f"predict {group or ''}".strip(), unit="seq", disable=not progress, delay=1
            ) as bar,
        ):
            for start in range(0, len(order), batch_size):
                chosen = order[start : start + batch_size]
                batch_labels = torch.tensor([labels[row] for row in chosen])
                found = _predict_batch(model, routing, prefix, [tokens[row] for row in chosen], batch_labels)
                for position, row in enumerate(chosen):
                    rows[row] = {name: values[position] for name, values in found.items()}
                bar.update(len(chosen))
    finally:
        model.train(training)
    table = Dataset.from_dict(_assemble(dataset, rows, {"group": group, "readout": wanted.name}))
    calibrator = getattr(model, TABLE_CALIBRATOR, None)  # a method that needs the routing, carried by the checkpoint
    return table if calibrator is None else calibrator.apply(table)


Routing = Callable[[Tensor, Tensor, Tensor], dict[str, Tensor]]
"""Columns from the pooled tokens' flat indices, logits `[B, C]` and labels, for the last forward."""


@contextmanager
def _watching(model: nn.Module, layer: int | None, readout: Readout) -> Iterator[Routing | None]:
    """Within the block the model predicts by the readout; gives what reads the routing, if anything does."""
    if readout.is_mixture and layer != -1:
        raise ValueError(f"readout={readout.kind!r} is that of the last MoE layer, got layer={layer}; leave it at -1.")
    if layer is None:
        yield None
        return
    with probe_experts(model, layer=layer) as probe:
        if not readout.is_mixture:
            yield partial(_routing, probe)
            return
        with ClassifierReadout(model, Mixture(probe, readout)) as classifier:
            yield lambda tokens, logits, labels: _columns(logits, labels, *classifier.mixed[1:])


def _predict_batch(
    model: nn.Module,
    routing: Routing | None,
    prefix: PrefixCache | None,
    sequences: list[list[int]],
    labels: Tensor,
) -> dict[str, list]:
    """Columns of the predictions table for one batch of token sequences."""
    device = next(model.parameters()).device
    pad = model.config.get_text_config().pad_token_id
    ids = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(sequence) for sequence in sequences], batch_first=True, padding_value=0 if pad is None else pad
    ).to(device)
    lengths = torch.tensor([len(sequence) for sequence in sequences], device=device)
    mask = (torch.arange(ids.shape[1], device=device) < lengths[:, None]).long()
    batch = {"input_ids": ids, "attention_mask": mask}
    with nullcontext(batch) if prefix is None else prefix.replaying(batch) as batch:
        logits = model(**batch)["logits"].float()
        check_labels(labels[labels != IGNORED_LABEL], logits.shape[-1])
        probs = logits.double().softmax(-1)
        confidence, prediction = probs.max(-1)
        found = {"label": labels, "logits": logits, "probs": probs, "prediction": prediction, "confidence": confidence}
        if routing is not None:
            short = batch["input_ids"]
            pooled = torch.arange(len(short), device=device) * short.shape[1] + pooled_positions(short, pad)
            found |= routing(pooled, logits, labels.to(device))
    return {name: values.tolist() for name, values in found.items()}


def _routing(probe: ExpertProbe, tokens: Tensor, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    record, alone = probe.record[tokens], probe.expert_logits(tokens)
    columns = _columns(logits, labels, alone, record.shares, record.expert_ids)
    return {**columns, "expert_weights": record.weights.float()}


def _columns(logits: Tensor, labels: Tensor, alone: Tensor, shares: Tensor, ids: Tensor) -> dict[str, Tensor]:
    """What the table says about the experts `ids` `[B, k]`, which alone predict `[B, k, C]`."""
    record = RoutingRecord(ids, shares, (len(ids), 1))
    known = labels != IGNORED_LABEL
    regrets = logits.new_full((len(labels),), float("nan"))
    if known.any():
        regrets[known] = regret(logits[known], alone[known], labels[known])
    return {
        "routing_entropy": record.entropy,
        "routing_margin": record.margin,
        "expert_logits": alone,
        "disagreement": disagreement(logits, alone, shares),
        "regret": regrets,
        "expert_ids": ids,
        "expert_weights": shares,
    }


def _assemble(dataset: Dataset, rows: list[dict[str, Any]], constant: dict[str, str | None]) -> dict[str, list]:
    made = {name: [row[name] for row in rows] for name in rows[0]}
    kept = {name: dataset[name][:] for name in dataset.column_names if name not in (*made, *_INPUTS, "labels")}
    kept.setdefault("id", list(range(len(rows))))
    kept |= {name: [value] * len(rows) for name, value in constant.items() if value is not None}
    both = {**made, **kept}
    first = [name for name in COLUMNS if name in both]
    return {name: both[name] for name in [*first, *(name for name in both if name not in first)]}


def _tokenized(dataset: Dataset, processing_class: Any, text_column: str, max_length: int | None) -> list[list[int]]:
    if len(dataset) == 0:
        raise ValueError("The dataset is empty: there is nothing to predict. Check how it was filtered.")
    if "input_ids" in dataset.column_names:
        return [ids[:max_length] for ids in real_tokens(dataset)]
    if text_column not in dataset.column_names:
        raise ValueError(
            f"The dataset has neither `input_ids` nor a column {text_column!r}, only {dataset.column_names}; name the "
            "text column with text_column=."
        )
    if processing_class is None:
        raise ValueError("Text needs a tokenizer: pass processing_class=AutoTokenizer.from_pretrained(...).")
    encoded = processing_class(list(dataset[text_column]), truncation=max_length is not None, max_length=max_length)
    return without_empty(encoded["input_ids"])


def _labels(dataset: Dataset) -> list[int]:
    name = next((name for name in ("label", "labels") if name in dataset.column_names), None)
    if name is None:
        return [IGNORED_LABEL] * len(dataset)
    labels = list(dataset[name])
    wrong = next((label for label in labels if isinstance(label, bool) or not isinstance(label, int)), None)
    if wrong is not None:
        raise ValueError(
            f"Column {name!r} must hold integer classes, found {wrong!r}; use dataset.class_encode_column."
        )
    return labels
