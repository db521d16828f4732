"""Replays of a model whose weights are shared out over processes, which have to run in step.

Whoever runs a module of such a model takes part in gathering its weights, so every process has to make the same
replays in the same order, whatever its own batch holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._pytree import tree_map


if TYPE_CHECKING:
    from .capture import ModelParts


@contextmanager
def unsharded(parts: ModelParts, called: nn.Module) -> Iterator[None]:
    """Whole weights where FSDP2 shards them, for a module that a replay calls outside the forward of its unit.

    A module that is a unit itself, or that holds some, gathers their weights by its own hooks.
    """
    around = [module for module in _shared(parts) if _is_unit(module) and called in module.modules()]
    unit = around[-1] if around else called  # outer ones come first
    if unit is called:
        yield
        return
    unit.unshard()
    try:
        yield
    finally:
        unit.reshard()


def is_sharded(parts: ModelParts) -> bool:
    """Whether running a module is a joint act of all processes: under FSDP2, and under DeepSpeed ZeRO-3."""
    return any(
        _is_unit(module) or any(hasattr(p, "ds_id") for p in module._parameters.values()) for module in _shared(parts)
    )


def _shared(parts: ModelParts) -> Iterable[nn.Module]:
    """The modules whose weights processes may share out; none in one process, as every replay would walk them."""
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    return parts.model.modules() if several else ()


def most(count: int, device: torch.device) -> int:
    """The largest of all processes' counts."""
    largest = torch.tensor(count, device=device)
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
    return int(largest)


def of_first_process(inputs: Any, device: torch.device) -> Any:
    """The inputs that the first process has, on every process."""
    shared = [_moved(inputs, torch.device("cpu"))]
    torch.distributed.broadcast_object_list(shared, src=0, device=device)
    return _moved(shared[0], device)


def _is_unit(module: nn.Module) -> bool:
    return hasattr(module, "unshard") and hasattr(module, "reshard")


def _moved(value: Any, device: torch.device) -> Any:
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf, value)
