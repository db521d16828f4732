"""What trains and what stays: found by the model's structure, never by a family's names."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from .probes import find_moe_layers


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
        model (`nn.Module`): a transformers model.
        preset (`str`): `"all"` (leaves `requires_grad` as it is) or `"last_moe_layer"` (router and experts of the
            last MoE layer, and all modules after the decoder layers: the final norm and the head).

    Returns:
        `str`: one line that says what trains.

    Raises:
        ValueError: nothing would train.
    """
    if preset == "last_moe_layer" and hasattr(model, "peft_config"):
        raise ValueError(
            "train='last_moe_layer' would train weights that an adapter does not save; choose what trains with "
            "LoraConfig(target_modules=..., target_parameters=..., modules_to_save=...) and set train='all'."
        )
    if preset == "last_moe_layer":
        _train_last_moe_layer(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    if trained == 0:
        raise ValueError(f"Nothing trains: train={preset!r} leaves every parameter frozen; unfreeze some of them.")
    return f"train={preset}: {trained:,} of {total:,} parameters ({trained / total:.1%})"


def _train_last_moe_layer(model: nn.Module) -> None:
    """Modules are registered in the order in which they run, so what comes after the layers' names runs after them."""
    site = last_moe_site(model)
    embeddings = {id(p) for p in model.get_input_embeddings().parameters()}  # a tied head stays frozen with them
    seen_layers = False
    for name, parameter in model.named_parameters():
        in_layers = name.startswith(f"{site.layers_name}.")
        seen_layers = seen_layers or in_layers
        trains = name.startswith(f"{site.block_name}.") or (seen_layers and not in_layers)
        parameter.requires_grad_(trains and id(parameter) not in embeddings)


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
