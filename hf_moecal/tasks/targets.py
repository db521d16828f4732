"""What a batch is judged on: which positions predict, what is right there, and which of them form one example."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..model.head import pooled_positions
from ..objectives import check_labels
from ..table import IGNORED_LABEL


if TYPE_CHECKING:
    from ..probes import ExpertProbe

Loss = Callable[[Tensor, Tensor], Tensor]


class Mixture(Protocol):
    """What targets need of a mixture of experts' predictions: a named tuple whose first two fields are these."""

    log_probs: Tensor
    expert_log_probs: Tensor

    def _replace(self, **fields: Tensor) -> Mixture: ...


class Targets(NamedTuple):
    """The judged rows of one batch.

    Attributes:
        tokens (`Tensor` of shape `[n]`, int64): flat indices into the batch's B*S positions whose prediction is
            judged.
        labels (`Tensor` of shape `[n]`, int64): the right class or next token.
        example (`Tensor` of shape `[n]`, int64): the example that the row belongs to, in [0, num_examples).
        rows (`Tensor` of shape `[n]`, int64): the sequence of the batch that the row belongs to.
        num_examples (`int`): how many examples the batch holds.
    """

    tokens: Tensor
    labels: Tensor
    example: Tensor
    rows: Tensor
    num_examples: int

    def row_values(self, part: slice, logits: Tensor, loss: Loss) -> Tensor:
        """Losses `[c]` of a slice of the rows, with gradient."""
        return loss(logits, self.labels[part])

    def narrowed(self, part: slice, mixed: Mixture) -> tuple[Mixture, Tensor]:
        """The mixture of a slice of the rows over the classes that it is judged on, and their labels."""
        return mixed, self.labels[part]

    def example_losses(self, rows: Tensor, loss: Loss) -> Tensor:
        """Losses `[num_examples]` from those of the rows `[n]`."""
        return self.mean_by_example(rows)

    def batch_rows(self, rows: Tensor) -> Tensor:
        """The row of the batch that each example stands in, `[num_examples]`, from those of the judged rows `[n]`."""
        return rows.new_zeros(self.num_examples).scatter(0, self.example, rows)

    def probed(self, probe: ExpertProbe) -> tuple[Tensor, Tensor]:
        """Disagreement and regret of each example: means over its rows."""
        found = probe.disagreement_and_regret(self.tokens, self.labels)
        return tuple(self.mean_by_example(values.double()) for values in found)

    def mean_by_example(self, values: Tensor) -> Tensor:
        """Mean of per-row values over each example: `[n]` -> `[num_examples]`, differentiable."""
        if self.num_examples == len(values):  # one row per example, in order
            return values
        total = values.new_zeros(self.num_examples).index_add(0, self.example, values)
        return total / torch.bincount(self.example, minlength=self.num_examples)


def classification_targets(inputs: Mapping[str, Any], pad_token_id: int | None, num_labels: int) -> Targets:
    """Rows of a sequence-classification batch: the last token that is not padding, as transformers pools.

    Args:
        inputs (`Mapping`): `input_ids` `[B, S]` and `labels` `[B]`; label -100 leaves a sequence out.
        pad_token_id (`int`, *optional*): the model's padding token.
        num_labels (`int`): classes of the head.

    Raises:
        ValueError: no labels, labels of another shape or out of range, or no padding token for a batch.
    """
    ids, labels = _ids_and_labels(inputs)
    batch, length = ids.shape
    if labels.shape != (batch,):
        raise ValueError(
            f"Classification needs one integer label per sequence, got labels of shape {tuple(labels.shape)} for "
            f"{batch} sequences; for token labels set task='lm'."
        )
    targets = class_targets(inputs)
    check_labels(targets.labels, num_labels)
    tokens = torch.arange(batch, device=ids.device) * length + pooled_positions(ids, pad_token_id)
    return targets._replace(tokens=tokens[targets.rows])


def class_targets(inputs: Mapping[str, Any]) -> Targets:
    """Rows of a classification batch of any model: `labels` `[B]`, of which -100 leaves one out, whatever else it has.

    Raises:
        ValueError: no labels, or not one for each row.
    """
    labels = inputs.get("labels")
    if labels is None or labels.dim() != 1:
        raise ValueError(
            f"Classification needs `labels` with one class per row, got "
            f"{sorted(inputs) if labels is None else f'labels of shape {tuple(labels.shape)}'}."
        )
    keep = (labels != IGNORED_LABEL).nonzero().squeeze(1)
    return Targets(keep, labels[keep], torch.arange(len(keep), device=labels.device), keep, len(keep))


def lm_targets(inputs: Mapping[str, Any], *, per_token: bool) -> Targets:
    """Rows of a language-modelling batch: position s predicts the label at s + 1 wherever that is not -100.

    In a packed batch a sequence begins wherever `position_ids` are 0, and none predicts the next one's first token.

    Args:
        inputs (`Mapping`): `input_ids` and `labels`, both `[B, S]`; `position_ids` of that shape if it is packed.
        per_token (`bool`): whether a token or a sequence (the mean over its supervised tokens) is one example.

    Raises:
        ValueError: no labels, or labels of another shape.
    """
    ids, labels = _ids_and_labels(inputs)
    if labels.shape != ids.shape:
        raise ValueError(
            f"Language modelling needs labels of the input's shape {tuple(ids.shape)}, got {tuple(labels.shape)}; "
            "for one label per sequence set task='classification'."
        )
    starts = _starts(inputs)
    labels = torch.where(starts, IGNORED_LABEL, labels)
    shifted = torch.nn.functional.pad(labels, (0, 1), value=IGNORED_LABEL)[:, 1:]
    tokens = (shifted.reshape(-1) != IGNORED_LABEL).nonzero().squeeze(1)
    rows = starts.reshape(-1).cumsum(0)[tokens] - 1
    if per_token:
        example = torch.arange(len(tokens), device=ids.device)
    else:
        example = torch.unique(rows, return_inverse=True)[1]
    count = int(example.max()) + 1 if len(example) else 0
    return Targets(tokens, shifted.reshape(-1)[tokens], example, rows, count)


def _starts(inputs: Mapping[str, Any]) -> Tensor:
    """Where a sequence begins, `[B, S]`: in the first column, and inside packed rows."""
    ids, positions = inputs["input_ids"], inputs.get("position_ids")
    packed = positions is not None and positions.shape == ids.shape
    starts = positions == 0 if packed else torch.zeros_like(ids, dtype=torch.bool)
    return torch.cat([torch.ones_like(starts[:, :1]), starts[:, 1:]], dim=1)


def token_figures(logits: Tensor, labels: Tensor) -> Tensor:
    """What is kept of each supervised token's distribution over the vocabulary, `[n, 4]`, float32.

    The columns are the label's negative log-likelihood (nats), the probability of the most likely token, that token,
    and the Brier score sum_v (p_v - [v = label])^2.

    Args:
        logits (`Tensor` of shape `[n, V]`): of the tokens' positions.
        labels (`Tensor` of shape `[n]`, int64): the tokens that came.
    """
    check_labels(labels, logits.shape[-1])
    log_probs = logits.float().log_softmax(-1)
    probs = log_probs.exp()
    own = log_probs.gather(1, labels[:, None]).squeeze(1)
    confidence, prediction = probs.max(-1)
    return torch.stack([-own, confidence, prediction, probs.square().sum(-1) - 2 * own.exp() + 1], dim=-1)


def real_tokens(dataset: Any, *, broken: str = "refuse") -> list[list[int]]:
    """Token ids of every row of a dataset, without what its `attention_mask` (if it has one) marks as padding.

    Args:
        dataset (`datasets.Dataset`): with a column `input_ids`.
        broken (`str`, *optional*, defaults to `"refuse"`): what becomes of rows whose mask leaves out tokens between
            others, which stand elsewhere without these: `"refuse"` raises, `"drop"` leaves the rows out.

    Raises:
        ValueError: a row has no token, or a mask with holes.
    """
    rows = [list(map(int, ids)) for ids in dataset["input_ids"]]
    if "attention_mask" in dataset.column_names:
        masks = [list(map(bool, mask)) for mask in dataset["attention_mask"]]
        whole = [_is_unbroken(mask) for mask in masks]
        if broken == "refuse" and not all(whole):
            raise ValueError(
                f"Row {whole.index(False)} has an `attention_mask` that leaves out tokens between others; drop these "
                "tokens, or such rows: padding belongs before or behind a sequence."
            )
        rows = [
            [token for token, kept in zip(ids, mask, strict=True) if kept]
            for ids, mask, one in zip(rows, masks, whole, strict=True)
            if one
        ]
    return without_empty(rows)


def _is_unbroken(mask: list[bool]) -> bool:
    first = mask.index(True) if any(mask) else 0
    return all(mask[first : first + sum(mask)])


def without_empty(rows: list[list[int]]) -> list[list[int]]:
    """The rows, if each has a token; raises a `ValueError` that names the first that has none."""
    empty = next((index for index, ids in enumerate(rows) if not ids), None)
    if empty is not None:
        raise ValueError(f"Row {empty} has no token (an empty text?); drop such rows.")
    return rows


def _ids_and_labels(inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    for name in ("input_ids", "labels"):
        if inputs.get(name) is None:
            raise ValueError(
                f"The batch has no `{name}`, only {sorted(inputs)}; give the dataset a column `{name}` "
                "(a `label` column is renamed by the default collator)."
            )
    if inputs["input_ids"].dim() != 2:
        raise ValueError(f"`input_ids` must be [B, S], got {tuple(inputs['input_ids'].shape)}.")
    return inputs["input_ids"], inputs["labels"]
