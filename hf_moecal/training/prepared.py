"""A trainer is given its arguments and its model: taken by name, with what trains chosen, fresh for each trial."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ..model.freezing import set_trainable
from ..model.lora import add_lora
from ..readouts.committee import add_members, count_members
from .arguments import MoECalArguments


MADE_WITH = ("train", "lora_r", "lora_alpha", "readout_members")
"""Arguments by which the model that `model_init` gives is prepared."""


def check_trial(args: MoECalArguments, made_with: Mapping[str, Any]) -> None:
    """Raises a `ValueError` where a trial of a hyperparameter search set what the model was made by before it."""
    args.check()
    changed = [name for name, value in made_with.items() if getattr(args, name) != value]
    if changed:
        raise ValueError(
            f"{', '.join(changed)} decide how the model is made, before a trial sets them; search over other "
            "arguments, with a trainer for each value of these."
        )


def named_arguments(init: Callable[..., None], given: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a trainer is given behind model and arguments, by name, where its own `init` takes it by position too."""
    inspect.signature(init).bind_partial(None, None, *given, **kwargs)  # a TypeError says what is too much
    names = list(inspect.signature(init).parameters)[2:]
    return {**dict(zip(names, given, strict=False)), **kwargs}


def prepared_model(model: Any, args: MoECalArguments) -> Any:
    """The model with what trains chosen as `args.train` says."""
    if args.train == "all" or model is None:  # then `model_init` makes it
        return model
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"train={args.train!r} chooses parameters of the model, so give the model itself, loaded with "
            f"from_pretrained, not {model!r}."
        )
    if args.train == "lora":
        return add_lora(model, r=args.lora_r, alpha=args.lora_alpha)
    set_trainable(model, args.train)
    if args.readout_members > 1 or count_members(model) > 1:
        add_members(model, args.readout_members, seed=args.seed)
    return model
