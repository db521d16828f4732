"""What trains and what stays: found by the model's structure, never by a family's names."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import NamedTuple

from torch import nn
from transformers import PreTrainedModel

from ..probes import UnsupportedMoEError, find_moe_layers
from ..probes.capture import base_of
from ..probes.router import declared_classes, find_routers


CONTAINER = "moecal_members"
"""Module in which a committee's further members keep their parameters; see [`hf_moecal.readouts.committee`]."""

_RANDOM = ("dropout", "jitter", "layerdrop")


class Site(NamedTuple):
    """Where the last MoE block sits.

    Attributes:
        before (`list[nn.Module]`): the decoder layers before the block's own.
        siblings (`dict[str, nn.Module]`): the other modules of the block's decoder layer, by name.
        block (`nn.Module`): the module of the decoder layer that holds router and experts.
        block_name (`str`): its name in the model.
        layers_name (`str`): name of the list of decoder layers.
        index (`int`): of the block's decoder layer in that list.
    """

    before: list[nn.Module]
    siblings: dict[str, nn.Module]
    block: nn.Module
    block_name: str
    layers_name: str
    index: int


def last_moe_site(model: nn.Module) -> Site:
    """Finds the last MoE block: the child of a decoder layer (an element of the outermost `ModuleList`) around it.

    Raises:
        ValueError: the model has no MoE layer, or the last one is not inside a list of layers.
    """
    path = find_moe_layers(model)[-1].name.split(".")
    current = model
    for depth, part in enumerate(path):
        if isinstance(current, nn.ModuleList):
            layer, child = current[int(part)], path[depth + 1]
            siblings = {name: module for name, module in layer.named_children() if name != child}
            names = ".".join(path[: depth + 2]), ".".join(path[:depth])
            return Site(list(current)[: int(part)], siblings, getattr(layer, child), *names, int(part))
        current = getattr(current, part)
    raise ValueError(
        f"The last MoE layer {'.'.join(path)!r} of {type(model).__name__} is not inside a list of decoder layers; "
        "use train='all'."
    )


def set_trainable(model: nn.Module, preset: str) -> str:
    """Selects the parameters that train, in place.

    Args:
        model (`nn.Module`): a transformers model; for `"lora"` one that [`~hf_moecal.model.lora.add_lora`] gave.
        preset (`str`): `"last_moe_layer"` (router and experts of the last MoE layer, and all modules after the decoder
            layers: the final norm and the head), `"routers"` (those of all MoE layers, and the head of a classifier),
            or `"all"` and `"lora"`, which leave `requires_grad` as it is.

    Returns:
        `str`: one line that says what trains, see [`what_trains`].

    Raises:
        ValueError: nothing would train, or the preset does not fit the model.
    """
    if preset in ("last_moe_layer", "routers"):
        if hasattr(model, "peft_config"):
            raise ValueError(
                f"train={preset!r} would train weights that an adapter does not save; choose what trains with "
                "LoraConfig(target_modules=..., target_parameters=..., modules_to_save=...) and set train='all'."
            )
        chosen = _last_moe_layer(model) if preset == "last_moe_layer" else _routers(model)
        for name, parameter in model.named_parameters():
            trains = id(parameter) in chosen
            if trains and not (parameter.is_floating_point() and parameter.element_size() > 1):
                raise ValueError(
                    f"train={preset!r} would train {name!r}, which is quantized ({parameter.dtype}); set train='lora' "
                    "or load the model without quantization."
                )
            parameter.requires_grad_(trains)
    return what_trains(model, preset)


def _last_moe_layer(model: nn.Module) -> set[int]:
    """Modules are registered in the order in which they run, so what comes after the layers' names runs after them."""
    site = last_moe_site(model)
    embeddings = {id(p) for p in model.get_input_embeddings().parameters()}  # a tied head stays frozen with them
    seen_layers, chosen = False, set()
    for name, parameter in model.named_parameters():
        in_layers = name.startswith(f"{site.layers_name}.")
        seen_layers = seen_layers or in_layers
        if name.startswith(f"{site.block_name}.") or (seen_layers and not in_layers):
            chosen.add(id(parameter))
    return chosen - embeddings


def _routers(model: nn.Module) -> set[int]:
    heads = [] if model.get_output_embeddings() is not None else head_modules(model).values()
    return {id(p) for module in [*find_routers(model).values(), *heads] for p in module.parameters()}


def what_trains(model: nn.Module, preset: str) -> str:
    """One line: how many parameters train, in all and of the routers, experts, attention, head and others.

    Raises:
        ValueError: none does.
    """
    weights = list(model.parameters())
    trained = sum(p.numel() for p in weights if p.requires_grad)
    total = sum(p.numel() for p in weights)
    if trained == 0:
        raise ValueError(f"Nothing trains: train={preset!r} leaves every parameter frozen; unfreeze some of them.")
    counts = {kind: sum(p.numel() for p in found if p.requires_grad) for kind, found in _by_kind(model).items()}
    kinds = ", ".join(f"{kind} {count:,}" for kind, count in counts.items())
    return f"train={preset}: {trained:,} of {total:,} parameters ({trained / total:.1%}): {kinds}"


def _by_kind(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Every parameter under the first kind that it is of; routers and experts only where they can be found."""
    modules: dict[str, Iterable[nn.Module]] = {}
    with suppress(UnsupportedMoEError):  # any model trains with an objective that needs no probe
        modules["experts"] = [layer.module for layer in find_moe_layers(model)]
        modules["routers"] = find_routers(model).values()
    modules["attention"] = attention_modules(model).values()
    modules["head"] = head_modules(model).values()
    if hasattr(model, CONTAINER):
        modules["further members"] = [getattr(model, CONTAINER)]
    remaining = {id(p): p for p in model.parameters()}
    kinds = {
        kind: [remaining.pop(id(p)) for module in found for p in module.parameters() if id(p) in remaining]
        for kind, found in modules.items()
    }
    return {**kinds, "other": list(remaining.values())}


def attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that compute attention weights, by name: those of the classes that the model declares for them."""
    declared = tuple(declared_classes(model, "attentions"))
    return {name: module for name, module in model.named_modules() if isinstance(module, declared)}


def head_modules(model: nn.Module) -> dict[str, nn.Module]:
    """What the model puts on top of its base, by name: the output embedding, or a classifier's last layers."""
    outer = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), model)
    base = base_of(outer) if isinstance(outer, PreTrainedModel) else outer
    beside = {name: module for name, module in outer.named_children() if name != CONTAINER}
    return {name: module for name, module in beside.items() if module is not base and base is not outer}


def check_frozen(modules: list[nn.Module]) -> None:
    """Raises a `ValueError` where one of the modules trains, or draws random numbers in training mode."""
    for module in modules:
        trains = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
        if trains:
            raise ValueError(
                f"The prefix cache replays frozen modules, but {len(trains)} of their parameters train (first: "
                f"{trains[0]!r}); set train='last_moe_layer' or leave `prefix_cache` unset."
            )
        for child in module.modules():
            random = {name: value for name, value in vars(child).items() if _is_random(child, name) and value}
            if random:
                raise ValueError(
                    f"The prefix cache replays modules that must not be random, but {type(child).__name__} has "
                    f"{random}; set these to 0 in the model's config, or leave `prefix_cache` unset."
                )


def _is_random(module: nn.Module, name: str) -> bool:
    """Whether an attribute is a probability or strength of noise: `p` of a dropout module, `attention_dropout`, ..."""
    if not isinstance(vars(module)[name], (int, float)):
        return False
    return (name == "p" and isinstance(module, nn.Dropout)) or any(word in name for word in _RANDOM)
