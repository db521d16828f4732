"""The precisions of a model's parameters, of which it may have several."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator

import torch
from torch import nn


def float_parameters(modules: Iterable[nn.Module]) -> Iterator[nn.Parameter]:
    """All floating-point parameters of the modules that are not quantized."""
    return (p for module in modules for p in module.parameters() if p.is_floating_point() and p.element_size() > 1)


def widest_precision(modules: Iterable[nn.Module]) -> torch.dtype:
    """A precision that holds what any of the modules' parameters holds, unrounded."""
    found = {parameter.dtype for parameter in float_parameters(modules)}
    return functools.reduce(torch.promote_types, found or {torch.get_default_dtype()})
