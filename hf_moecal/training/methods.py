"""Methods by name: which objective, readout, committee and temperature belong together.

A method fills those fields of [`MoECalArguments`] that are left unset. Where a part of it cannot run, what it filled
in (never what the user set) falls back: to fewer members, to the model's own prediction, at last to plain ERM.

| method | objective | eta | warm-up | readout | members | trains | temperature afterwards |
|---|---|---|---|---|---|---|---|
| `"recommended"` | Robust Filtered | 1 | none | soft mixture | 4 | last MoE layer | conservative |
| `"paper"` | Robust Filtered | 2 | .4 | native | 1 | all | none |
| `"erm"` | ERM | | | native | 1 | all | fitted on validation rows |
| `"custom"` | yours | 2 | .4 | native | 1 | all | conservative |
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..model.freezing import head_modules, last_moe_site
from ..probes import find_moe_layers


if TYPE_CHECKING:
    from .arguments import MoECalArguments

RECOMMENDED, CUSTOM = "recommended", "custom"
_ALONE = {"readout": "native", "readout_members": 1}
_NATIVE = {**_ALONE, "train": "all"}
METHODS: dict[str, dict[str, Any]] = {
    RECOMMENDED: {
        "objective": "robust_filtered",
        "eta": 1.0,
        "robust_warmup_ratio": 0.0,
        "readout": "soft_mixture",
        "readout_members": 4,
        "train": "last_moe_layer",
        "calibration_method": "conservative_temperature",
    },
    "paper": {
        "objective": "robust_filtered",
        "eta": 2.0,
        "robust_warmup_ratio": 0.4,
        **_NATIVE,
        "calibration_method": "none",
    },
    "erm": {
        "objective": "erm",
        "eta": 0.0,
        "robust_warmup_ratio": 0.0,
        **_NATIVE,
        "calibration_method": "temperature",
    },
    CUSTOM: {
        "objective": "robust_filtered",
        "eta": 2.0,
        "robust_warmup_ratio": 0.4,
        **_NATIVE,
        "calibration_method": "conservative_temperature",
    },
}


def fill(args: MoECalArguments) -> None:
    """Gives the unset fields of a method their values, falling back where fields that the user set exclude one.

    Sets `args.filled`, the names of these fields, and `args.fell_back`, what was changed and why.

    Args:
        args ([`MoECalArguments`]): with `method`, or an `objective` of the user's own, or neither.

    Raises:
        ValueError: no such method.
    """
    if args.method is None:
        args.method = RECOMMENDED if args.objective is None else CUSTOM
    if args.method not in METHODS:
        raise ValueError(f"`method` must be one of {', '.join(METHODS)}, got {args.method!r}.")
    args.filled = [name for name in METHODS[args.method] if getattr(args, name) is None]
    args.fell_back = []
    for name in args.filled:
        setattr(args, name, METHODS[args.method][name])
    for changes, reason in _excluded(args):
        _fall_back(args, changes, reason)


def chosen(settings: Mapping[str, Any], name: str) -> Any:
    """What a recipe's settings give a field that a method may fill."""
    method = settings.get("method") or (CUSTOM if settings.get("objective") else RECOMMENDED)
    return settings.get(name) if settings.get(name) is not None else METHODS[method][name]


def settle(args: MoECalArguments, model: Any, *, sharded: bool, adapted: bool = False) -> str:
    """Falls back where a part of the method cannot run on this model, in this run; says what is done and why.

    Args:
        args ([`MoECalArguments`]): changed in place, in fields that [`fill`] filled in.
        model (`nn.Module` or `str`): before anything is frozen.
        sharded (`bool`): whether FSDP or DeepSpeed will shard the weights; see [`is_sharded`].
        adapted (`bool`, *optional*, defaults to `False`): whether something else already chose what trains.

    Returns:
        `str`: one line: the method's fields, then each that fell back, with the reason.
    """
    for changes, reason in _obstacles(args, model, sharded=sharded, adapted=adapted):
        _fall_back(args, changes, reason)
    fields = ", ".join(f"{name}={getattr(args, name)!r}" for name in METHODS[args.method])
    return "; ".join([f"method={args.method}: {fields}", *args.fell_back])


def _fall_back(args: MoECalArguments, changes: Mapping[str, Any], reason: str) -> None:
    """Changes what the method filled in, and nothing that the user set."""
    made = {name: new for name, new in changes.items() if name in args.filled and getattr(args, name) != new}
    for name, value in made.items():
        setattr(args, name, value)
    if made:
        shown = ", ".join(f"{name}={value!r}" for name, value in made.items())
        args.fell_back.append(f"fell back to {shown}, since {reason}")


def _excluded(args: MoECalArguments) -> Iterator[tuple[dict[str, Any], str]]:
    """What fields of the user's exclude; each sees what the ones before it changed."""
    if args.train != "last_moe_layer" and args.readout_members > 1:
        yield {"readout_members": 1}, f"a committee trains copies of the last MoE layer, not train={args.train!r}"
    if args.router_aux_loss_coef and args.readout_members > 1:
        weight = f"router_aux_loss_coef={args.router_aux_loss_coef}"
        yield {"readout_members": 1}, f"{weight} balances one member's routers only"
    if args.probe_layer != -1:
        yield _ALONE, f"mixtures are of the last MoE layer, not probe_layer={args.probe_layer}"
    if args.torch_compile:
        yield _ALONE, "mixtures are not compiled"


def _obstacles(
    args: MoECalArguments, model: Any, *, sharded: bool, adapted: bool
) -> Iterator[tuple[dict[str, Any], str]]:
    """What the model and the launch exclude; each sees what the ones before it changed."""
    if (adapted or hasattr(model, "peft_config")) and args.train != "all":
        yield {"train": "all", "readout_members": 1}, "an adapter chose what trains already"
    if sharded:
        yield _ALONE, "experts that run again outside their layer would lose sharded weights"
    if not isinstance(model, nn.Module):
        yield {"train": "all", "readout_members": 1}, "a model that is given by its name is not there to be frozen"
        return
    if obstacle := _unsupported(model):
        yield {**_NATIVE, "objective": "erm", "eta": 0.0}, obstacle
    if args.readout_members > 1 and (fitting := members_that_fit(model, args)) < args.readout_members:
        yield {"readout_members": fitting}, "more members would not fit into the device's free memory"


def _unsupported(model: nn.Module) -> str | None:
    """Why the experts of a model cannot be asked, if they cannot."""
    try:
        find_moe_layers(model)
        last_moe_site(model)
    except ValueError as error:  # an UnsupportedMoEError is one
        return str(error).split(";")[0].rstrip(".")
    return None


def is_sharded(args: MoECalArguments) -> bool:
    """Whether FSDP or DeepSpeed will shard the weights, by the arguments or by `accelerate launch`."""
    launched = any(os.environ.get(f"ACCELERATE_USE_{kind}", "false") == "true" for kind in ("FSDP", "DEEPSPEED"))
    return bool(launched or args.fsdp or args.deepspeed)


def members_that_fit(model: nn.Module, args: MoECalArguments) -> int:
    """How many of the members fit into an accelerator's free memory: weight, gradient and two moments in float32.

    A CPU's memory is not looked at. Half of what is free is left for activations.
    """
    if args.device.type != "cuda":
        return args.readout_members
    modules = [last_moe_site(model).block, *head_modules(model).values()]
    own = sum(parameter.numel() for module in modules for parameter in module.parameters())
    free, _ = torch.cuda.mem_get_info(args.device)
    return max(1, min(args.readout_members, int(free / 2 // (16 * own))))
