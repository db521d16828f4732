"""From last hidden states to logits, through the outer model's own forward with its base stubbed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .capture import Capture, ModelParts
from .routing import UnsupportedMoEError
from .sharding import unsharded


_MISSING = object()


@contextmanager
def patched(forwards: dict[nn.Module, Callable]) -> Iterator[None]:
    """Replaces the forward of module instances and restores exactly what was there."""
    before = {module: vars(module).get("forward", _MISSING) for module in forwards}
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module, forward in before.items():
            if forward is _MISSING:
                vars(module).pop("forward", None)
            else:
                module.forward = forward


def tail(parts: ModelParts, capture: Capture, hidden: Tensor) -> Tensor:
    """Logits `[R, V]` of final hidden states `[R, 1, H]`, through the outer model's own forward."""
    if parts.base is parts.outer:
        raise ValueError(
            f"{type(parts.outer).__name__} has no head, so its experts predict nothing; "
            "load the model with AutoModelForCausalLM or AutoModelForSequenceClassification."
        )
    # A classification head without padding token refuses batches.
    rows = (
        1 if parts.outer.config.get_text_config().pad_token_id is None and not _has_vocabulary(parts) else len(hidden)
    )
    return torch.cat([_tail(parts, capture, part) for part in hidden.split(rows)])


def _tail(parts: ModelParts, capture: Capture, hidden: Tensor) -> Tensor:
    tokens = torch.full(hidden.shape[:2], _real_token(parts.outer), dtype=torch.long, device=hidden.device)

    def stub(*args: Any, **kwargs: Any) -> Any:
        return type(capture.output)(last_hidden_state=hidden)

    with unsharded(parts, parts.outer), patched({parts.base: stub}):
        logits = logits_of(parts.outer(input_ids=tokens, use_cache=False), parts)
    return logits.reshape(hidden.shape[0], -1)


def logits_of(output: Any, parts: ModelParts) -> Tensor:
    """The logits of an output of the outer model.

    Raises:
        UnsupportedMoEError: the model predicts something else than classes at its tokens.
    """
    if getattr(output, "logits", None) is None:
        raise UnsupportedMoEError(
            f"{type(parts.outer).__name__} gives no `logits` (as a head for question answering does not), so its "
            "experts predict no classes; load the model with AutoModelForCausalLM or "
            "AutoModelForSequenceClassification."
        )
    return output.logits


def _has_vocabulary(parts: ModelParts) -> bool:
    return parts.outer.get_output_embeddings() is not None


def _real_token(outer: nn.Module) -> int:
    """A token id that no sequence-classification head takes for padding."""
    return 1 if outer.config.get_text_config().pad_token_id == 0 else 0
