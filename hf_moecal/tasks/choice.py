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

from ..objectives import check_labels, example_losses
from ..probes.agreement import among
from ..table import ABSENT_LOGIT, IGNORED_LABEL, SCORINGS
from .prompts import Continued, encode_continuations
from .targets import Loss, Mixture


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..probes import ExpertProbe

CHOICE_COLUMNS = ("prompt", "options", "prompt_ids", "option_ids")
_INPUTS = ("input_ids", "attention_mask", "option_mask", "option_lengths", "candidates", "labels")


class EncodedChoice(NamedTuple):
    """One example in tokens.

    Attributes:
        options (`list[Continued]`): tokens of the prompt with each option.
        lengths (`list[float]`): what each option's log-likelihood is divided by.
        label (`int`): index of the right option; -100 for none.
    """

    options: list[Continued]
    lengths: list[float]
    label: int

    def after(self, cut: int) -> EncodedChoice:
        """What is left without the first tokens of each option's sequence."""
        return self._replace(options=[Continued(ids[cut:], start - cut) for ids, start in self.options])


class ChoiceCollator:
    """Makes batches of multiple-choice examples for `MoECalArguments(task="choice")`.

    An example has `prompt` (text), `options` (list of texts, which may differ in number) and `label` (index of the
    right one; -100 or absent for none), or the tokens themselves as `prompt_ids` and `option_ids`. Prompt and option
    are joined as they are: write the space between them, at the end of the prompt or before the options.

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
        labels = torch.tensor([example.label for example in examples])
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
        label = next((row[name] for name in ("label", "labels") if row.get(name) is not None), IGNORED_LABEL)
        if len(options) < 2:
            raise ValueError(f"Row {number} has {len(options)} options; a choice needs two or more.")
        if int(label) != label or not (label == IGNORED_LABEL or 0 <= label < len(options)):
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
        return EncodedChoice(options, lengths, int(label))


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


class OptionTargets(NamedTuple):
    """The judged rows of a batch of whole options, one for each token of each option.

    Attributes:
        tokens (`Tensor` of shape `[n]`, int64): flat indices into the positions of [`flat_inputs`].
        labels (`Tensor` of shape `[n]`, int64): the option's token that comes next.
        option (`Tensor` of shape `[n]`, int64): the option, an index into B*O.
        lengths (`Tensor` of shape `[B, O]`): what each option's log-likelihood is divided by; 0 where there is none.
        right (`Tensor` of shape `[B]`, int64): index of the right option, or -100.
    """

    tokens: Tensor
    labels: Tensor
    option: Tensor
    lengths: Tensor
    right: Tensor

    @property
    def num_examples(self) -> int:
        return int((self.right != IGNORED_LABEL).sum())

    def batch_rows(self, rows: Tensor) -> Tensor:
        """The row of the batch that each labelled example stands in, `[num_examples]`."""
        return (self.right != IGNORED_LABEL).nonzero().squeeze(1)

    def row_values(self, part: slice, logits: Tensor, loss: Loss) -> Tensor:
        """Log-probabilities `[c]` of a slice of the rows, whatever the examples' loss is."""
        return -example_losses(logits, self.labels[part])

    def scores(self, rows: Tensor) -> Tensor:
        """Scores `[B, O]` from the rows' log-probabilities `[n]`; options that are not there get a very low one."""
        absent = self.lengths.reshape(-1) == 0
        total = rows.new_zeros(absent.numel()).index_add(0, self.option, rows)
        scores = total / self.lengths.reshape(-1).to(rows.dtype).masked_fill(absent, 1)
        return scores.masked_fill(absent, ABSENT_LOGIT).view_as(self.lengths)

    def example_losses(self, rows: Tensor, loss: Loss) -> Tensor:
        """Loss over the options of each labelled example, `[num_examples]`, with gradient."""
        return choice_losses(self.scores(rows), self.lengths > 0, self.right, loss)

    def probed(self, probe: ExpertProbe) -> tuple[Tensor, Tensor]:
        """Disagreement and regret of each labelled example: means over the tokens of its right option."""
        chosen = self._right_rows
        found = probe.disagreement_and_regret(self.tokens[chosen], self.labels[chosen])
        return tuple(self._mean(values, chosen) for values in found)

    def narrowed(self, part: slice, mixed: Mixture) -> tuple[Mixture, Tensor]:
        """The mixture of a slice of the rows, and the options' tokens there."""
        return mixed, self.labels[part]

    def mean_by_example(self, values: Tensor) -> Tensor:
        """Mean of per-row values over the right option of each labelled example: `[n]` -> `[num_examples]`."""
        return self._mean(values[self._right_rows], self._right_rows)

    @property
    def _right_rows(self) -> Tensor:
        width = self.lengths.shape[1]
        return (self.right[self.option // width] == self.option % width).nonzero().squeeze(1)

    def _mean(self, values: Tensor, rows: Tensor) -> Tensor:
        member = torch.unique(self.option[rows] // self.lengths.shape[1], return_inverse=True)[1]
        count = torch.bincount(member)
        return values.new_zeros(len(count)).index_add(0, member, values) / count


class WordTargets(NamedTuple):
    """The judged rows of a batch of label words, one for each example.

    Attributes:
        tokens (`Tensor` of shape `[B]`, int64): flat index of each prompt's last token.
        candidates (`Tensor` of shape `[B, O]`, int64): the options' tokens; -100 where there is none.
        right (`Tensor` of shape `[B]`, int64): index of the right option, or -100.
    """

    tokens: Tensor
    candidates: Tensor
    right: Tensor

    @property
    def num_examples(self) -> int:
        return int((self.right != IGNORED_LABEL).sum())

    def batch_rows(self, rows: Tensor) -> Tensor:
        """The row of the batch that each labelled example stands in, `[num_examples]`."""
        return (self.right != IGNORED_LABEL).nonzero().squeeze(1)

    def row_values(self, part: slice, logits: Tensor, loss: Loss) -> Tensor:
        """The candidates' logits `[c, O]` of a slice of the rows."""
        return among(logits, self.candidates[part])

    def scores(self, rows: Tensor) -> Tensor:
        """Scores `[B, O]`: the rows as they are."""
        return rows

    def example_losses(self, rows: Tensor, loss: Loss) -> Tensor:
        """Loss over the options of each labelled example, `[num_examples]`, with gradient."""
        return choice_losses(rows, self.candidates != IGNORED_LABEL, self.right, loss)

    def narrowed(self, part: slice, mixed: Mixture) -> tuple[Mixture, Tensor]:
        """The mixture of a slice of the rows over their candidates, and the right one; any for rows without label."""
        own, alone = (
            among(logits, self.candidates[part]).log_softmax(-1)
            for logits in (mixed.log_probs, mixed.expert_log_probs)
        )
        return mixed._replace(log_probs=own, expert_log_probs=alone), self.right[part].clamp_min(0)

    def mean_by_example(self, values: Tensor) -> Tensor:
        """The rows with a label: `[n]` -> `[num_examples]`."""
        return values[self.right != IGNORED_LABEL]

    def probed(self, probe: ExpertProbe) -> tuple[Tensor, Tensor]:
        """Disagreement and regret of each labelled example, over the distribution of its options."""
        known = self.right != IGNORED_LABEL
        return probe.disagreement_and_regret(self.tokens[known], self.right[known], candidates=self.candidates[known])


def choice_targets(inputs: Mapping[str, Any]) -> OptionTargets | WordTargets:
    """What a batch of [`ChoiceCollator`] is judged on.

    Raises:
        ValueError: the batch comes from another collator, or a label is no option.
    """
    other = sorted(set(inputs) - set(_INPUTS))
    if other or inputs.get("labels") is None or ("candidates" in inputs) == ("option_mask" in inputs):
        raise ValueError(
            f"task='choice' needs batches of hf_moecal.ChoiceCollator, got one with {sorted(inputs)}; pass "
            "data_collator=ChoiceCollator(tokenizer)."
        )
    right = inputs["labels"]
    if "candidates" in inputs:
        candidates = inputs["candidates"]
        _check_right(right, candidates != IGNORED_LABEL)
        mask = inputs["attention_mask"]
        rows = torch.arange(len(mask), device=mask.device)
        return WordTargets(rows * mask.shape[1] + mask.sum(1) - 1, candidates, right)
    lengths = inputs["option_lengths"]
    _check_right(right, lengths > 0)
    here = lengths > 0
    after = inputs["option_mask"][here][:, 1:].reshape(-1)  # position s predicts the token at s + 1
    width = inputs["option_mask"].shape[-1]
    option = here.reshape(-1).nonzero().squeeze(1)
    found = after.nonzero().squeeze(1)
    sequence, position = found // (width - 1), found % (width - 1)
    labels = inputs["input_ids"][here][sequence, position + 1]
    return OptionTargets(sequence * width + position, labels, option[sequence], lengths, right)


def flat_inputs(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """What the model is run on: `input_ids` and `attention_mask` `[S, L]`, one sequence per option or prompt."""
    names = ("input_ids", "attention_mask")
    if "candidates" in inputs:
        return {name: inputs[name] for name in (*names, "labels")}
    here = inputs["option_lengths"] > 0
    return {**{name: inputs[name][here] for name in names}, "labels": inputs["labels"]}


def choice_losses(scores: Tensor, present: Tensor, right: Tensor, loss: Loss) -> Tensor:
    """Loss of each labelled example over its own options.

    Args:
        scores (`Tensor` of shape `[B, O]`): with gradient.
        present (`Tensor` of shape `[B, O]`, bool): the options that exist, before those that do not.
        right (`Tensor` of shape `[B]`, int64): index of the right option; -100 leaves an example out.
        loss (`Callable`): losses `[n]` of scores `[n, C]` and labels `[n]`.
    """
    counts = present.sum(1).masked_fill(right == IGNORED_LABEL, 0)
    rows = [(counts == count).nonzero().squeeze(1) for count in counts[counts > 0].unique().tolist()]
    if not rows:
        return scores.flatten()[:0]  # none, and yet a function of the parameters, which every process has to have
    # Label smoothing spreads over the options that an example has, so those with equally many go together.
    losses = torch.cat([loss(scores[some][:, : int(counts[some[0]])], right[some]) for some in rows])
    return losses[torch.cat(rows).argsort()]


def _check_right(right: Tensor, present: Tensor) -> None:
    known = right != IGNORED_LABEL
    check_labels(right[known], present.shape[1])
    if not present[known].gather(1, right[known][:, None]).all():
        raise ValueError("A label of the batch is none of its example's options; labels are indices into `options`.")
