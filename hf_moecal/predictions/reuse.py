"""Keys and values of what several sequences begin with, computed once; a forward goes on from them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..versions import cache_name, given_cache


Forward = Callable[..., Any]


class Beginning(NamedTuple):
    """What `B` sequences begin with.

    Attributes:
        cache (`Cache`): its keys and values, or whatever else the model's layers go on from.
        mask (`Tensor` of shape `[B, C]`): which of its positions hold tokens.
    """

    cache: Any
    mask: Tensor

    def copied(self) -> Beginning:
        """The same, since a selection and a forward change the cache that they are given."""
        return Beginning(copy.deepcopy(self.cache), self.mask)

    def select(self, rows: Tensor) -> Beginning:
        """The beginnings of other sequences: row by row one of these."""
        self.cache.reorder_cache(rows)  # which every kind of layer has, also recurrent ones
        return Beginning(self.cache, self.mask[rows])

    def follow(self, inputs: dict[str, Tensor]) -> dict[str, Any]:
        """Inputs `[B, S]` of a forward that goes on from here."""
        mask = torch.cat([self.mask, inputs["attention_mask"]], 1)
        positions = _positions(mask)[:, self.mask.shape[1] :]
        return {**inputs, "attention_mask": mask, "position_ids": positions, cache_name(): self.cache}


def begin(
    forward: Forward, tokens: Sequence[Sequence[int]], device: torch.device, after: Beginning | None
) -> Beginning:
    """Runs the beginnings of some sequences, each perhaps after a beginning of its own.

    They are padded on the left, so that what follows comes right behind them: a sliding window counts positions of the
    cache.
    """
    flipped = [torch.tensor(list(ids)[::-1], dtype=torch.long) for ids in tokens]
    ids = pad_sequence(flipped, batch_first=True).flip(1).to(device)
    lengths = torch.tensor([len(row) for row in tokens], device=device)
    mask = (torch.arange(ids.shape[1], device=device) >= ids.shape[1] - lengths[:, None]).long()
    inputs = {"input_ids": ids, "attention_mask": mask}
    inputs = {**inputs, "position_ids": _positions(mask)} if after is None else after.follow(inputs)
    return Beginning(given_cache(forward(**inputs, use_cache=True)), inputs["attention_mask"])


def _positions(mask: Tensor) -> Tensor:
    """Each token's place among those of its sequence that are no padding."""
    return (mask.cumsum(1) - 1).clamp_min(0)


def common_length(sequences: Sequence[Sequence[int]], most: int) -> int:
    """How many tokens all sequences begin with in common, but at most `most`."""
    first, last = min(sequences), max(sequences)  # all others lie between these in the order of their tokens
    differ = (i for i, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1])
    return min(next(differ, min(len(first), len(last))), most)
