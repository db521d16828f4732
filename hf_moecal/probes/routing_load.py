"""How a model routes a whole dataset, layer by layer: load, entropy, margin and co-activation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from .capture import Recorder, model_parts
from .certify import evaluating, real_tokens
from .routing import MoELayer, RoutingRecord, find_moe_layers, uncompiled


@dataclass(frozen=True)
class RoutingStatistics:
    """How one layer routed a dataset.

    Args:
        name (`str`): of the layer.
        index (`int`): among the MoE layers.
        num_experts (`int`): E.
        tokens (`int`): real tokens seen; padding is left out.
        load (`Tensor` of shape `[E]`): share of all selections that each expert got; 1 / E each when balanced.
        share (`Tensor` of shape `[E]`): mean routing share of each expert, also summing to one.
        entropy (`float`): mean entropy of the shares per token, in nats.
        margin (`float`): mean of the largest share minus the second largest.
        mass (`float`): mean of the total routing weight.
        co_activation (`Tensor` of shape `[E, E]`): share of the tokens that selected both experts; its diagonal is
            the share that selected the one.
    """

    name: str
    index: int
    num_experts: int
    tokens: int
    load: Tensor
    share: Tensor
    entropy: float
    margin: float
    mass: float
    co_activation: Tensor

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, for JSON."""
        return {key: value.tolist() if isinstance(value, Tensor) else value for key, value in vars(self).items()}


class _Tally:
    """Sums over tokens of one layer, in float64 and int64."""

    def __init__(self, layer: MoELayer) -> None:
        self.layer, self.tokens = layer, 0
        self.both = torch.zeros(layer.num_experts, layer.num_experts, dtype=torch.int64)
        self.share = torch.zeros(layer.num_experts, dtype=torch.float64)
        self.sums = torch.zeros(3, dtype=torch.float64)

    def add(self, record: RoutingRecord) -> None:
        ids, shares = record.expert_ids.cpu(), record.shares.double().cpu()
        used = torch.zeros(len(ids), self.layer.num_experts, dtype=torch.float64)
        used.scatter_(-1, ids, 1.0)
        self.tokens += len(ids)
        self.both += (used.T @ used).round().long()
        self.share.index_add_(0, ids.flatten(), shares.flatten())
        self.sums += torch.stack(
            [value.double().cpu().sum() for value in (record.entropy, record.margin, record.mass)]
        )

    def statistics(self) -> RoutingStatistics:
        selected = self.both.diagonal().double()
        entropy, margin, mass = (self.sums / self.tokens).tolist()
        return RoutingStatistics(
            name=self.layer.name,
            index=self.layer.index,
            num_experts=self.layer.num_experts,
            tokens=self.tokens,
            load=selected / selected.sum(),
            share=self.share / self.share.sum(),
            entropy=entropy,
            margin=margin,
            mass=mass,
            co_activation=self.both.double() / self.tokens,
        )


@torch.no_grad()
def routing_statistics(
    model: nn.Module,
    dataset: Iterable[Mapping[str, Any]],
    *,
    batch_size: int = 8,
    collate: Callable[[list[Mapping[str, Any]]], Mapping[str, Any]] | None = None,
) -> list[RoutingStatistics]:
    """Shows which experts a model uses on a dataset, how evenly and how decidedly, at each MoE layer.

    The model runs once over the data in evaluation mode; only sums are kept.

    Args:
        model (`nn.Module`): a transformers MoE model.
        dataset (`Iterable`): rows with `input_ids` (and `attention_mask`), or batches of tensors, as a `DataLoader`
            gives them.
        batch_size (`int`): rows per forward; batches of tensors stay as they are.
        collate (`Callable`, *optional*): makes a batch of rows; by default `input_ids` and `attention_mask` are padded
            on the right.

    Returns:
        `list[RoutingStatistics]`: one per MoE layer.

    Raises:
        ValueError: the dataset is empty, or its rows hold no token ids.

    Example:

    ```python
    >>> from transformers import MixtralConfig, MixtralForCausalLM
    >>> from hf_moecal import routing_statistics
    >>> config = MixtralConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    ...     num_attention_heads=2, num_key_value_heads=1, num_local_experts=4)
    >>> rows = [{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5]}]
    >>> layers = routing_statistics(MixtralForCausalLM(config), rows)
    >>> layers[-1].tokens, round(layers[-1].load.sum().item(), 6)
    (5, 1.0)

    ```
    """
    layers = find_moe_layers(model)
    recorder = Recorder(model_parts(model, layers), layers, replayed=set())
    tallies = [_Tally(layer) for layer in layers]
    device = next(model.parameters()).device
    with recorder.attached(), uncompiled(), evaluating(model):
        for batch in _batches(dataset, batch_size, collate or _padded):
            model(**{name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()})
            capture = recorder.seen()
            real = real_tokens(capture)
            for tally in tallies:
                call = capture.call(tally.layer.name)
                tally.add(RoutingRecord(call.index[real], call.weights[real], capture.batch_shape))
    if not tallies[0].tokens:
        raise ValueError("The dataset is empty: give rows with input_ids.")
    return [tally.statistics() for tally in tallies]


def _batches(dataset: Iterable, batch_size: int, collate: Callable) -> Iterator[Mapping[str, Any]]:
    rows = iter(dataset)
    while chunk := list(islice(rows, 1)):
        ids = chunk[0].get("input_ids")
        if ids is None:
            raise ValueError(
                f"routing_statistics reads input_ids, got {sorted(chunk[0])}; tokenise the dataset first."
            )
        if isinstance(ids, Tensor) and ids.dim() == 2:
            yield {name: value for name, value in chunk[0].items() if name != "labels"}
        else:
            yield collate(chunk + list(islice(rows, batch_size - 1)))


def _padded(rows: list[Mapping[str, Any]]) -> dict[str, Tensor]:
    ids = [torch.as_tensor(row["input_ids"]) for row in rows]
    masks = [torch.as_tensor(row.get("attention_mask", torch.ones_like(i))) for row, i in zip(rows, ids, strict=True)]
    pad = torch.nn.utils.rnn.pad_sequence
    return {"input_ids": pad(ids, batch_first=True), "attention_mask": pad(masks, batch_first=True)}
