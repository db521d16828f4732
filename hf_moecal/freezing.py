"""What trains and what stays: found by the model's structure, never by a family's names."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from .probes import find_moe_layers


class DecoderLayer(NamedTuple):
    """Place of a decoder layer in a model: the list that holds it, the list's name, and its index there."""

    layers: nn.ModuleList
    name: str
    index: int


def decoder_layer_of(model: nn.Module, module_name: str) -> DecoderLayer:
    """The decoder layer that holds a module: the outermost `ModuleList` element on the module's path.

    Raises:
        ValueError: the module is not inside a list of layers.
    """
    path = module_name.split(".")
    current = model
    for depth, part in enumerate(path):
        if isinstance(current, nn.ModuleList):
            return DecoderLayer(current, ".".join(path[:depth]), int(part))
        current = getattr(current, part)
    raise ValueError(
        f"Module {module_name!r} of {type(model).__name__} is not inside a list of layers, so there is no frozen "
        "prefix to find; use train='all'."
    )


def set_trainable(model: nn.Module, preset: str) -> str:
    """Selects the parameters that train, in place.

    Args:
        model (`nn.Module`): a transformers model.
        preset (`str`): `"all"` (leaves `requires_grad` as it is) or `"last_moe_layer"` (the decoder layer that
            holds the last MoE layer, and everything after it, the head included).

    Returns:
        `str`: one line that says what trains.

    Raises:
        ValueError: nothing would train.
    """
    if preset == "last_moe_layer":
        _train_from(model, decoder_layer_of(model, find_moe_layers(model)[-1].name))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    if trained == 0:
        raise ValueError(f"Nothing trains: train={preset!r} leaves every parameter frozen; unfreeze some of them.")
    return f"train={preset}: {trained:,} of {total:,} parameters ({trained / total:.1%})"


def _train_from(model: nn.Module, layer: DecoderLayer) -> None:
    """Freezes what runs before the layer. Modules are registered in the order in which they run."""
    first = f"{layer.name}.{layer.index}."
    embeddings = {id(p) for p in model.get_input_embeddings().parameters()}  # a tied head stays frozen with them
    started = False
    for name, parameter in model.named_parameters():
        started = started or name.startswith(first)
        parameter.requires_grad_(started and id(parameter) not in embeddings)
