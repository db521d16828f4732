"""Which pass over a dataloader is under way, so that rows of one that was interrupted do not leak into the next."""

from __future__ import annotations

import sys


def current_iteration() -> list | None:
    """accelerate's list of the dataloaders that are being iterated over: a new object whenever one starts or ends."""
    module = sys.modules.get("accelerate.state")
    return None if module is None else getattr(module.GradientState(), "_dataloader_references_ref", None)


def abandoned(before: list | None, now: list | None) -> bool:
    """Whether a dataloader that was under way `before` was left without reaching its end, and another one started."""
    return before is not None and now is not None and now is not before and len(now) > len(before)
