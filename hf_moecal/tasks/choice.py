"""Answer options scored by a causal language model: the batches, and the scores from which probabilities come.

Two ways to score. Where every option is one token (*label words*), the scores are their logits at the last token of
the prompt. Otherwise an option's score is the log-likelihood of its tokens after the prompt, divided by their number
(or by the option's bytes, or by nothing). Either way the probabilities are the softmax of the scores over the options.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..labels import read_label
from ..table import IGNORED_LABEL, SCORINGS
from .prompts import Continued, encode_continuations


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHOICE_COLUMNS = ("prompt", "options", "prompt_ids", "option_ids", "votes")
BATCH_COLUMNS = ("input_ids", "attention_mask", "option_mask", "option_lengths", "candidates", "labels")


class EncodedChoice(NamedTuple):
    """One example in tokens.

    Attributes:
        options (`list[Continued]`): tokens of the prompt with each option.
        lengths (`list[float]`): what each option's log-likelihood is divided by.
        label (`int` or `list[float]`): index of the right option, or each option's share; -100 for none.
    """

    options: list[Continued]
    lengths: list[float]
    label: int | list[float]

    def after(self, cut: int) -> EncodedChoice:
        """What is left without the first tokens of each option's sequence."""
        return self._replace(options=[Continued(ids[cut:], start - cut) for ids, start in self.options])


class ChoiceCollator:
    """Makes batches of multiple-choice examples for `MoECalArguments(task="choice")`.

    An example has `prompt` (text), `options` (list of texts, which may differ in number) and `label` (index of the
    right one; -100 or absent for none), or the tokens themselves as `prompt_ids` and `option_ids`. Where raters
    differ, `label` is a list with the share of each option, or there is no `label` and `votes` says how many chose
    each. Prompt and option are joined as they are: write the space between them, at the end of the prompt or before
    the options.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): the model's.
        scoring (`str`, *optional*, defaults to `"per_token"`): what an option's score is:
            - `"per_token"`: the mean log-probability of its tokens;
            - `"total"`: their sum, the log-likelihood (`acc` of lm-evaluation-harness);
            - `"per_byte"`: the sum over the bytes of the option in UTF-8 without white space around it (`acc_bytes`;
              for ASCII the same as `acc_norm`, which counts characters);
            - `"label_word"`: the logit of its one token. One forward per example instead of one per option.
        max_length (`int`, *optional*): tokens after which the beginning of a prompt is cut.

    Raises:
        ValueError: `scoring` is unknown, or an example cannot be scored in this way; the message names it.

    Example:

    ```python
    >>> from hf_moecal.tasks.choice import ChoiceCollator
    >>> collate = ChoiceCollator(scoring="label_word")
    >>> batch = collate([{"prompt_ids": [5, 6], "option_ids": [[7], [8]], "label": 1}])
    >>> batch["candidates"].tolist(), batch["labels"].tolist()
    ([[7, 8]], [1])

    ```
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        scoring: str = SCORINGS[0],
        max_length: int | None = None,
    ):
        if scoring not in SCORINGS:
            raise ValueError(f"`scoring` must be one of {', '.join(SCORINGS)}, got {scoring!r}.")
        self.tokenizer, self.scoring, self.max_length = tokenizer, scoring, max_length

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Tensors of a batch: `input_ids` and `attention_mask` `[B, O, L]`, or `[B, L]` for label words."""
        return self.batch(self.encode(rows))

    def batch(self, examples: Sequence[EncodedChoice]) -> dict[str, Tensor]:
        """The same for examples that are tokens already."""
        labels = _labels(examples)
        if self.scoring == "label_word":
            prompts = [example.options[0].ids[: example.options[0].start] for example in examples]
            words = [[ids[start] for ids, start in example.options] for example in examples]
            batch = {
                "input_ids": _padded(prompts, 0),
                "attention_mask": _padded([[1] * len(ids) for ids in prompts], 0),
            }
            return {**batch, "candidates": _padded(words, IGNORED_LABEL), "labels": labels}
        count = max(len(example.options) for example in examples)
        absent = Continued([], 0)
        options = [o for e in examples for o in [*e.options, *[absent] * (count - len(e.options))]]
        columns = {
            "input_ids": [ids for ids, _ in options],
            "attention_mask": [[1] * len(ids) for ids, _ in options],
            "option_mask": [[0] * start + [1] * (len(ids) - start) for ids, start in options],
        }
        batch = {name: _padded(values, 0).unflatten(0, (-1, count)) for name, values in columns.items()}
        return {**batch, "option_lengths": _padded([e.lengths for e in examples], 0.0), "labels": labels}

    def encode(self, rows: Sequence[Mapping[str, Any]]) -> list[EncodedChoice]:
        """The examples in tokens; see [`EncodedChoice`]."""
        if all(row.get("prompt_ids") is not None and row.get("option_ids") is not None for row in rows):
            found = [_joined(row["prompt_ids"], row["option_ids"]) for row in rows]
        else:
            prompts, options = self._texts(rows)
            found = encode_continuations(self.tokenizer, prompts, options, max_length=self.max_length)
        return [
            self._example(row, number, options) for number, (row, options) in enumerate(zip(rows, found, strict=True))
        ]

    def _texts(self, rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
        missing = next((row for row in rows if row.get("prompt") is None or row.get("options") is None), None)
        if missing is not None:
            raise ValueError(
                "A multiple-choice example needs `prompt` and `options` (or `prompt_ids` and `option_ids`), got "
                f"{sorted(missing)}; rename its columns."
            )
        if self.tokenizer is None:
            raise ValueError("Texts need a tokenizer: ChoiceCollator(AutoTokenizer.from_pretrained(...)).")
        return [row["prompt"] for row in rows], [list(row["options"]) for row in rows]

    def _example(self, row: Mapping[str, Any], number: int, options: list[Continued]) -> EncodedChoice:
        try:
            label = read_label(row, len(options))
        except ValueError as error:
            raise ValueError(f"Row {number}: {error}") from error
        if len(options) < 2:
            raise ValueError(f"Row {number} has {len(options)} options; a choice needs two or more.")
        if isinstance(label, int) and not (label == IGNORED_LABEL or 0 <= label < len(options)):
            raise ValueError(
                f"Row {number}: label {label!r} is no index into its {len(options)} options (0 to {len(options) - 1}; "
                f"{IGNORED_LABEL} for none)."
            )
        lengths = [float(len(ids) - start) for ids, start in options]
        if self.scoring == "label_word":
            _check_words(options, number)
        if self.scoring in ("total", "label_word"):
            lengths = [1.0] * len(options)
        if self.scoring == "per_byte":
            lengths = _byte_lengths(row.get("options"), number)
        return EncodedChoice(options, lengths, label)


def _labels(examples: Sequence[EncodedChoice]) -> Tensor:
    """Of a batch: `[B]`, or `[B, O]` where a label of it is soft."""
    labels = [example.label for example in examples]
    if all(isinstance(label, int) for label in labels):
        return torch.tensor(labels)
    shares = torch.zeros(len(labels), max(len(example.options) for example in examples))
    for row, label in zip(shares, labels, strict=True):
        if isinstance(label, list):
            row[: len(label)] = torch.tensor(label)
        elif label == IGNORED_LABEL:
            row.fill_(IGNORED_LABEL)
        else:
            row[label] = 1.0
    return shares


def _joined(prompt: Sequence[int], options: Sequence[Sequence[int]]) -> list[Continued]:
    if not len(prompt) or not all(len(option) for option in options):
        raise ValueError("`prompt_ids` and each of `option_ids` need a token; drop examples with empty ones.")
    return [Continued([*prompt, *option], len(prompt)) for option in options]


def _byte_lengths(texts: Sequence[str] | None, number: int) -> list[float]:
    lengths = [float(len(text.strip().encode())) for text in texts or ()]
    if not lengths or not all(lengths):
        raise ValueError(
            f"Row {number}: scoring='per_byte' counts the bytes of the texts in `options`, and "
            f"{'there are none' if not lengths else 'one is empty'}; use scoring='per_token'."
        )
    return lengths


def _check_words(options: list[Continued], number: int) -> None:
    counts = [len(ids) - start for ids, start in options]
    if set(counts) != {1}:
        raise ValueError(
            f"Row {number}: scoring='label_word' needs options of one token after the prompt, got {counts} tokens; "
            "choose other words (the space before one is part of it), or scoring='per_token'."
        )
    if len({tuple(ids[:start]) for ids, start in options}) > 1 or len({ids[-1] for ids, _ in options}) < len(options):
        raise ValueError(
            f"Row {number}: two options are the same token, or change how the prompt before them is tokenized; use "
            "scoring='per_token'."
        )


def _padded(rows: Sequence[Sequence[float]], fill: float) -> Tensor:
    return pad_sequence([torch.tensor(row, dtype=_dtype(fill)) for row in rows], batch_first=True, padding_value=fill)


def _dtype(fill: float) -> torch.dtype:
    return torch.float32 if isinstance(fill, float) else torch.long
