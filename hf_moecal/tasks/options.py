"""What a batch of answer options is judged on: the options' tokens, or their label words, and the right one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..labels import at_labels, check_labels, is_soft, labelled
from ..objectives import example_losses
from ..probes.agreement import among
from ..table import ABSENT_LOGIT, IGNORED_LABEL
from .choice import BATCH_COLUMNS
from .targets import Loss, Mixture


if TYPE_CHECKING:
    from ..probes import ExpertProbe


class OptionTargets(NamedTuple):
    """The judged rows of a batch of whole options, one for each token of each option.

    Attributes:
        tokens (`Tensor` of shape `[n]`, int64): flat indices into the positions of [`flat_inputs`].
        labels (`Tensor` of shape `[n]`, int64): the option's token that comes next.
        option (`Tensor` of shape `[n]`, int64): the option, an index into B*O.
        lengths (`Tensor` of shape `[B, O]`): what each option's log-likelihood is divided by; 0 where there is none.
        right (`Tensor` of shape `[B]`, int64, or `[B, O]`, float): index of the right option, or each option's share;
            -100 for none.
    """

    tokens: Tensor
    labels: Tensor
    option: Tensor
    lengths: Tensor
    right: Tensor

    @property
    def num_examples(self) -> int:
        return int(labelled(self.right).sum())

    def batch_rows(self, rows: Tensor) -> Tensor:
        """The row of the batch that each labelled example stands in, `[num_examples]`."""
        return labelled(self.right).nonzero().squeeze(1)

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
        """Disagreement and regret of each labelled example: means over the tokens of its right option.

        Of a soft label these are the means of the options' means, each with its share.
        """
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
        if is_soft(self.right):
            return (self.right.reshape(-1)[self.option] > 0).nonzero().squeeze(1)
        return (self.right[self.option // width] == self.option % width).nonzero().squeeze(1)

    def _mean(self, values: Tensor, rows: Tensor) -> Tensor:
        if is_soft(self.right):
            count = torch.bincount(self.option, minlength=self.right.numel())
            total = values.new_zeros(self.right.numel()).index_add(0, self.option[rows], values)
            known = labelled(self.right)
            means = (total / count.clamp_min(1)).view_as(self.right)
            return (means * self.right.to(means.dtype)).sum(1)[known]
        member = torch.unique(self.option[rows] // self.lengths.shape[1], return_inverse=True)[1]
        count = torch.bincount(member)
        return values.new_zeros(len(count)).index_add(0, member, values) / count


class WordTargets(NamedTuple):
    """The judged rows of a batch of label words, one for each example.

    Attributes:
        tokens (`Tensor` of shape `[B]`, int64): flat index of each prompt's last token.
        candidates (`Tensor` of shape `[B, O]`, int64): the options' tokens; -100 where there is none.
        right (`Tensor` of shape `[B]`, int64, or `[B, O]`, float): index of the right option, or each option's share;
            -100 for none.
    """

    tokens: Tensor
    candidates: Tensor
    right: Tensor

    @property
    def num_examples(self) -> int:
        return int(labelled(self.right).sum())

    def batch_rows(self, rows: Tensor) -> Tensor:
        """The row of the batch that each labelled example stands in, `[num_examples]`."""
        return labelled(self.right).nonzero().squeeze(1)

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
        return mixed._replace(log_probs=own, expert_log_probs=alone), _any_label(self.right[part])

    def mean_by_example(self, values: Tensor) -> Tensor:
        """The rows with a label: `[n]` -> `[num_examples]`."""
        return values[labelled(self.right)]

    def probed(self, probe: ExpertProbe) -> tuple[Tensor, Tensor]:
        """Disagreement and regret of each labelled example, over the distribution of its options."""
        known = labelled(self.right)
        return probe.disagreement_and_regret(self.tokens[known], self.right[known], candidates=self.candidates[known])


def choice_targets(inputs: Mapping[str, Any]) -> OptionTargets | WordTargets:
    """What a batch of [`ChoiceCollator`] is judged on.

    Raises:
        ValueError: the batch comes from another collator, or a label is no option.
    """
    other = sorted(set(inputs) - set(BATCH_COLUMNS))
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
        right (`Tensor` of shape `[B]`, int64, or `[B, O]`, float): index of the right option, or each option's share;
            -100 leaves an example out.
        loss (`Callable`): losses `[n]` of scores `[n, C]` and labels `[n]` or `[n, C]`.
    """
    counts = present.sum(1).masked_fill(~labelled(right), 0)
    rows = [(counts == count).nonzero().squeeze(1) for count in counts[counts > 0].unique().tolist()]
    if not rows:
        return scores.flatten()[:0]  # none, and yet a function of the parameters, which every process has to have
    # Label smoothing spreads over the options that an example has, so those with equally many go together.
    parts = [(some, slice(int(counts[some[0]]))) for some in rows]
    losses = torch.cat([loss(scores[some][:, own], _of_options(right[some], own)) for some, own in parts])
    return losses[torch.cat(rows).argsort()]


def _of_options(right: Tensor, own: slice) -> Tensor:
    return right[:, own] if is_soft(right) else right


def _any_label(right: Tensor) -> Tensor:
    """The labels, with the first option's for rows that have none."""
    if not is_soft(right):
        return right.clamp_min(0)
    first = torch.zeros_like(right).index_fill(1, torch.tensor([0], device=right.device), 1.0)
    return torch.where(labelled(right)[:, None], right, first)


def _check_right(right: Tensor, present: Tensor) -> None:
    known = labelled(right)
    check_labels(right[known], present.shape[1])
    if (at_labels((~present[known]).double(), right[known]) > 0).any():
        raise ValueError("A label of the batch is none of its example's options; labels are indices into `options`.")
