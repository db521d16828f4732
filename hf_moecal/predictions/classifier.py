"""Sequence classifiers: columns of the predictions table for a batch of token sequences."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..labels import VOTES, check_labels, labelled, read_labels
from ..model.head import pooled_positions
from ..model.labels import class_numbers
from ..model.loading import label_names
from ..model.prefix_cache import PrefixCache
from ..probes import RoutingRecord
from ..probes.agreement import disagreement, regret
from ..readouts.attached import AttachedReadout
from ..readouts.committee import ATTACHED
from ..readouts.mixture import Readout
from ..table import IGNORED_LABEL
from ..tasks.targets import real_tokens, without_empty


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


class Tokenized(NamedTuple):
    """One example in tokens."""

    ids: list[int]
    label: int | list[float]
    count = 1

    @property
    def length(self) -> int:
        return len(self.ids)


class ClassifierReader:
    """Reads a classifier's predictions and routing. A context manager: it leaves no hook; see [`predict`]."""

    inputs = ("input_ids", "attention_mask", "token_type_ids", "labels")

    def __init__(
        self,
        model: nn.Module,
        *,
        tokenizer: PreTrainedTokenizerBase | None,
        max_length: int | None,
        text_column: str,
        layer: int | None,
        readout: Readout,
        prefix: PrefixCache | None,
    ) -> None:
        self._model, self._tokenizer, self._max_length, self._text = model, tokenizer, max_length, text_column
        self._layer, self._readout, self._prefix = layer, readout, prefix

    def __enter__(self) -> ClassifierReader:
        layer = -1 if self._layer is None else self._layer
        self._exit = ExitStack()
        if hasattr(self._model, ATTACHED):
            attached = getattr(self._model, ATTACHED).held()
        else:
            attached = AttachedReadout(self._model, self._readout, probed=self._layer is not None, layer=layer)
        self._attached = self._exit.enter_context(attached)
        return self

    def __exit__(self, *exception: object) -> None:
        self._exit.close()

    @property
    def readout(self) -> Readout:
        """What predicts, also of how many members."""
        return self._attached.readout

    def encode(self, rows: Dataset) -> list[Tokenized]:
        """The rows in tokens."""
        tokens = tokenized(rows, self._tokenizer, self._text, self._max_length)
        labels = known_labels(rows, label_names(self._model.config))
        return [Tokenized(ids, label) for ids, label in zip(tokens, labels, strict=True)]

    def truncated(self, rows: Dataset, examples: Sequence[Tokenized]) -> list[bool] | None:
        """Which examples are not the whole text; `None` where nothing is cut."""

        def whole(near: list[int]) -> list[int]:
            return list(map(len, tokenized(rows.select(near), self._tokenizer, self._text, None)))

        return cut_short([example.length for example in examples], self._max_length, whole)

    def begin(self, examples: Sequence[Tokenized], *, progress: bool) -> None:
        """What is done once for examples that are read in batches afterwards."""
        if self._prefix is not None:
            self._prefix.fill([example.ids for example in examples], progress=progress)

    def read(self, examples: Sequence[Tokenized]) -> list[list[dict[str, Any]]]:
        """One row of the table for each example."""
        labels = torch.tensor([example.label for example in examples])
        routing = None if self._layer is None else self._routing
        found = _predict_batch(self._model, routing, self._prefix, [ids for ids, _ in examples], labels)
        return [[{name: values[row] for name, values in found.items()}] for row in range(len(examples))]

    def _routing(self, tokens: Tensor, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Columns from the pooled tokens' flat indices, logits `[B, C]` and labels, of the last forward."""
        if not self.readout.is_plain:
            mixed = self._attached.mixed
            return routing_columns(logits, labels, mixed.expert_log_probs, mixed.shares, mixed.expert_ids)
        probe = self._attached.members[0].probe
        record, alone = probe.record[tokens], probe.expert_logits(tokens)
        columns = routing_columns(logits, labels, alone, record.shares, record.expert_ids)
        return {**columns, "expert_weights": record.weights.float()}

    def named(self, ids: list[Any], made: dict[str, list]) -> dict[str, list]:
        """The rows' names."""
        return {"id": ids}


Routing = Callable[[Tensor, Tensor, Tensor], dict[str, Tensor]]


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
    batch = padded(sequences, pad, device)
    with nullcontext(batch) if prefix is None else prefix.replaying(batch) as batch:
        logits = model(**batch)["logits"].float()
        check_labels(labels[labelled(labels)], logits.shape[-1])
        probs = logits.double().softmax(-1)
        confidence, prediction = probs.max(-1)
        found = {"label": labels, "logits": logits, "probs": probs, "prediction": prediction, "confidence": confidence}
        if routing is not None:
            short = batch["input_ids"]
            pooled = torch.arange(len(short), device=device) * short.shape[1] + pooled_positions(short, pad)
            found |= routing(pooled, logits, labels.to(device))
    return {name: values.tolist() for name, values in found.items()}


def padded(sequences: list[list[int]], pad: int | None, device: torch.device) -> dict[str, Tensor]:
    """Token ids and mask of some sequences, padded on the right."""
    rows = [torch.tensor(sequence) for sequence in sequences]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=0 if pad is None else pad).to(device)
    lengths = torch.tensor([len(sequence) for sequence in sequences], device=device)
    return {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1], device=device) < lengths[:, None]).long()}


def routing_columns(logits: Tensor, labels: Tensor, alone: Tensor, shares: Tensor, ids: Tensor) -> dict[str, Tensor]:
    """What the table says about the experts `ids` `[B, k]`, which alone predict `[B, k, C]`."""
    record = RoutingRecord(ids, shares, (len(ids), 1))
    known = labelled(labels)
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


def tokenized(dataset: Dataset, processing_class: Any, text_column: str, max_length: int | None) -> list[list[int]]:
    """Token ids of every row, from `input_ids` or the text."""
    if "input_ids" in dataset.column_names:
        return [ids[:max_length] for ids in real_tokens(dataset)]
    if text_column not in dataset.column_names:
        raise ValueError(
            f"The dataset has neither `input_ids` nor a column {text_column!r}, only {dataset.column_names}; name the "
            "text column with text_column=."
        )
    if processing_class is None:
        raise ValueError("Text needs a tokenizer: pass processing_class=AutoTokenizer.from_pretrained(...).")
    texts = list(dataset[text_column])
    wrong = next((row for row, text in enumerate(texts) if not isinstance(text, str)), None)
    if wrong is not None:
        raise ValueError(
            f"Column {text_column!r}: row {wrong} holds {texts[wrong]!r}, which is no text; name the text column, or "
            "leave such rows out."
        )
    encoded = processing_class(texts, truncation=max_length is not None, max_length=max_length, verbose=False)
    return without_empty(encoded["input_ids"])


def cut_short(
    lengths: Sequence[int], max_length: int | None, whole: Callable[[list[int]], list[int]]
) -> list[bool] | None:
    """Which rows lost tokens to `max_length`; `whole` gives the uncut lengths of the rows that it is asked for."""
    if max_length is None:
        return None
    near = [row for row, length in enumerate(lengths) if length >= max_length - 1]  # a label word is not counted
    uncut = dict(zip(near, whole(near), strict=True)) if near else {}
    return [uncut.get(row, 0) > length for row, length in enumerate(lengths)]


def known_labels(dataset: Dataset, names: Mapping[str, int]) -> list[int] | list[list[float]]:
    """The label of each row: a class by number or name, or the share of each class; -100 where there are none."""
    name = next((name for name in ("label", "labels", VOTES) if name in dataset.column_names), None)
    if name is None:
        return [IGNORED_LABEL] * len(dataset)
    values = list(dataset[name])
    return read_labels(values, name) if name == VOTES else class_numbers(values, names, where=f"Column {name!r}")
