"""Rows of text for a language model: their tokens, and which of them are supervised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..table import IGNORED_LABEL
from ..tasks.prompts import encode_continuations
from .classifier import tokenized


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

LM_COLUMNS = ("input_ids", "attention_mask", "token_type_ids", "labels")


class Supervised(NamedTuple):
    """One sequence.

    Attributes:
        ids (`list[int]`): its tokens.
        labels (`list[int]`): the same where a token is supervised, -100 elsewhere.
    """

    ids: list[int]
    labels: list[int]

    @property
    def judged(self) -> int:
        """Index of the first position whose prediction is judged; the last one where nothing is supervised."""
        known = (at for at, label in enumerate(self.labels) if at and label != IGNORED_LABEL)
        return next(known, len(self.ids)) - 1

    def after(self, cut: int) -> Supervised:
        """What is left without the first tokens."""
        return Supervised(self.ids[cut:], self.labels[cut:])


def encode_supervised(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    text_column: str = "text",
    max_length: int | None = None,
) -> list[Supervised]:
    """The rows in tokens: of `input_ids` and `labels`, of `prompt` and `completion`, or of a text.

    Of a completion all tokens are supervised, of a text all but the first. The completion begins where
    [`~hf_moecal.tasks.prompts.encode_continuations`] finds it; of a prompt that is too long the beginning is cut, of
    anything else the end.

    Raises:
        ValueError: the columns are missing, or `labels` do not fit the tokens.
    """
    names = rows.column_names
    if "input_ids" not in names and {"prompt", "completion"} <= set(names):
        if tokenizer is None:
            raise ValueError("Text needs a tokenizer: pass processing_class=AutoTokenizer.from_pretrained(...).")
        completions = [[text] for text in rows["completion"]]
        found = encode_continuations(tokenizer, list(rows["prompt"]), completions, max_length=max_length)
        return [Supervised(ids, [IGNORED_LABEL] * start + ids[start:]) for ((ids, start),) in found]
    if "input_ids" not in names and text_column not in names:
        raise ValueError(
            f"task='lm' needs `prompt` and `completion`, `input_ids` and `labels`, or a text column, found {names}; "
            "rename the columns, or name the text column with text_column=."
        )
    ids = tokenized(rows, tokenizer, text_column, max_length)
    if "input_ids" not in names or "labels" not in names:
        return [Supervised(own, list(own)) for own in ids]
    masks = rows["attention_mask"] if "attention_mask" in names else [[1] * len(own) for own in rows["input_ids"]]
    labels = list(rows["labels"])
    for row, (own, mask) in enumerate(zip(labels, masks, strict=True)):
        if not hasattr(own, "__len__") or len(own) != len(mask):
            raise ValueError(
                f"Row {row}: `labels` must be one token id ({IGNORED_LABEL} for none) per token of `input_ids`, "
                f"{len(mask)} of them, got {len(own) if hasattr(own, '__len__') else own}."
            )
    kept = [[label for label, real in zip(*both, strict=True) if real] for both in zip(labels, masks, strict=True)]
    return [Supervised(own, label[:max_length]) for own, label in zip(ids, kept, strict=True)]


def pad_supervised(examples: Sequence[Supervised]) -> dict[str, Tensor]:
    """Tensors `[B, L]` of a batch."""
    columns: dict[str, tuple[Sequence[list[int]], int]] = {
        "input_ids": ([example.ids for example in examples], 0),
        "attention_mask": ([[1] * len(example.ids) for example in examples], 0),
        "labels": ([example.labels for example in examples], IGNORED_LABEL),
    }
    return {name: pad_sequence([torch.tensor(row) for row in values], batch_first=True, padding_value=fill)
            for name, (values, fill) in columns.items()}  # fmt: skip


def collate_supervised(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """A batch of rows with `input_ids` and `labels`, for a Trainer."""
    return pad_supervised([Supervised(list(row["input_ids"]), list(row["labels"])) for row in rows])
