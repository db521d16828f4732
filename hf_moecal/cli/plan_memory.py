"""How much memory a training step takes on each device, from shapes alone: nothing is loaded and nothing trains.

Weights, gradients and AdamW states are counted parameter by parameter, as the launch configuration shards them.
Activations are what autograd keeps in a forward of the model itself on fake tensors, so whatever the model's code does
(eager attention, merged adapters, frozen first layers) is in them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..model.freezing import head_modules
from ..model.head import CHUNK_ELEMENTS
from ..probes import MoELayer
from ..readouts.mixture import AUTO
from .plan_launch import Launch


if TYPE_CHECKING:
    from ..training.arguments import MoECalArguments


GIB = 2**30


class Weight(NamedTuple):
    """One parameter of a model.

    Attributes:
        numel (`int`): its elements.
        rows (`int`): length of its first dimension, along which FSDP2 cuts it.
        itemsize (`int`): bytes of an element as loaded.
        trains (`bool`): whether it gets a gradient.
        block (`int`, *optional*): index of the decoder layer that holds it; `None` outside.
        active (`float`): share of it that one token uses: k of E experts, 1 elsewhere.
    """

    numel: int
    rows: int
    itemsize: int
    trains: bool
    block: int | None = None
    active: float = 1.0


class Counts(NamedTuple):
    """Parameters of a model: `total`, `active` per token (embeddings included) and `trained`."""

    total: int
    active: int
    trained: int


@dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
        weights (`int`): the device's share of the weights, with the float32 copies that train under mixed precision.
        gathered (`int`): whole layers that sharding puts together for a moment, and their gradients.
        gradients, optimizer (`int`): gradients (with DDP's buckets) and AdamW's two moments.
        activations (`int`): what a forward keeps for the backward pass, without the logits.
        logits (`int`): logits at the judged positions with their probabilities and gradients.
    """

    weights: int
    gathered: int
    gradients: int
    optimizer: int
    activations: int = 0
    logits: int = 0

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


def weights_of(model: nn.Module, layers: Sequence[MoELayer], *, itemsize: int) -> list[Weight]:
    """The model's parameters, each once.

    Args:
        model (`nn.Module`): on any device, also with adapters.
        layers (`Sequence[MoELayer]`): its MoE layers; of their parameters a token uses the k of E experts' share.
        itemsize (`int`): bytes per element of the precision in which the checkpoint is loaded.
    """
    share = {}
    for layer in layers:
        used = 1.0 if layer.top_k is None else layer.top_k / layer.num_experts
        share |= {id(parameter): used for parameter in layer.module.parameters()}
    blocks = {id(p): index for index, block in enumerate(decoder_layers(model)) for p in block.parameters()}
    return [
        Weight(
            numel=parameter.numel(),
            rows=parameter.shape[0] if parameter.dim() else 1,
            itemsize=max(itemsize, parameter.dtype.itemsize),
            trains=parameter.requires_grad,
            block=blocks.get(id(parameter)),
            active=share.get(id(parameter), 1.0),
        )
        for parameter in model.parameters()
    ]


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The elements of the module list that holds most parameters; empty where the model has none."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return list(max(lists, key=lambda found: sum(p.numel() for p in found.parameters()), default=[]))


def count_parameters(weights: Sequence[Weight]) -> Counts:
    """Sums over the parameters.

    Example:

    ```python
    >>> from hf_moecal.cli.plan_memory import Weight, count_parameters
    >>> experts = Weight(numel=800, rows=8, itemsize=2, trains=True, block=0, active=2 / 8)
    >>> count_parameters([experts, Weight(numel=100, rows=10, itemsize=2, trains=False)])
    Counts(total=900, active=300, trained=800)

    ```
    """
    return Counts(
        total=sum(w.numel for w in weights),
        active=round(sum(w.numel * w.active for w in weights)),
        trained=sum(w.numel for w in weights if w.trains),
    )


def state_memory(weights: Sequence[Weight], launch: Launch) -> Memory:
    """Weights, gradients and AdamW states on the fullest device.

    What trains is kept in float32 under mixed precision, and what is frozen in the precision in which it was loaded.

    - *one process, DDP*: everything whole; DDP's buckets hold the gradients once more.
    - *FSDP2*: each parameter is cut along its first dimension, so 8 experts on 16 devices fill 8 of them. Two layers
      (the one that runs and the next) and what lies outside the layers are whole for a moment in the precision that
      computes, all layers with `reshard_after_forward: false`; so are the gradients of one layer.
    - *ZeRO*: 2 bytes a weight, and for one that trains 4 of the float32 copy, 4 of its gradient and 8 of its moments;
      stage 1 shards copy and moments, stage 2 gradients too, stage 3 everything, with one layer and its gradients
      whole (DeepSpeed's own formula).

    Args:
        weights (`Sequence[Weight]`): from [`weights_of`].
        launch ([`Launch`]): how many processes, what they shard, and the precision.
    """
    trained = [w for w in weights if w.trains]
    if launch.sharding == "fsdp2":
        return _fsdp2(weights, trained, launch)
    if launch.sharding.startswith("zero"):
        return _zero(weights, trained, launch)
    gradients = sum(w.numel * _stored(w, launch) for w in trained)
    return Memory(
        weights=sum(w.numel * _stored(w, launch) for w in weights),
        gathered=0,
        gradients=gradients * (1 if launch.processes == 1 else 2),
        optimizer=2 * gradients,
    )


def _stored(weight: Weight, launch: Launch) -> int:
    return 4 if weight.trains and launch.precision != "no" else weight.itemsize


def _fsdp2(weights: Sequence[Weight], trained: Sequence[Weight], launch: Launch) -> Memory:
    mixed = launch.precision != "no"

    def whole(chosen: Sequence[Weight]) -> int:
        return sum(w.numel * (2 if mixed else w.itemsize) for w in chosen)

    def shard(weight: Weight) -> int:
        return -(-weight.rows // launch.processes) * (weight.numel // max(1, weight.rows)) * _stored(weight, launch)

    layers = _by_block(weights)
    outside = whole([w for w in weights if w.block is None])
    largest = max(layers, key=whole, default=[])
    kept = sum(map(whole, layers)) if not launch.reshard else 2 * whole(largest) if len(layers) > 1 else whole(largest)
    gradients = sum(shard(w) for w in trained)
    return Memory(
        weights=sum(shard(w) for w in weights),
        gathered=outside + kept + whole([w for w in largest if w.trains]),
        gradients=gradients,
        optimizer=2 * gradients,
    )


def _zero(weights: Sequence[Weight], trained: Sequence[Weight], launch: Launch) -> Memory:
    stage, count = int(launch.sharding[-1]), sum(w.numel for w in trained)
    size = 2 if launch.precision != "no" else 4
    copies = 4 * count if size == 2 else 0

    def shared(values: int, *, since: int) -> int:
        return -(-values // launch.processes) if stage >= since else values

    largest = max((sum(w.numel for w in layer) for layer in _by_block(weights)), default=0)
    return Memory(
        weights=shared(size * sum(w.numel for w in weights), since=3) + shared(copies, since=1),
        gathered=2 * size * largest if stage == 3 else 0,
        gradients=shared(4 * count, since=2),
        optimizer=shared(8 * count, since=1),
    )


def _by_block(weights: Sequence[Weight]) -> list[list[Weight]]:
    blocks: dict[int, list[Weight]] = {}
    for weight in weights:
        if weight.block is not None:
            blocks.setdefault(weight.block, []).append(weight)
    return list(blocks.values())


def logits_memory(positions: int, classes: int, *, itemsize: int) -> int:
    """Bytes of the logits at their peak, in the backward pass of the loss.

    The float32 log-probabilities, their gradient and that of the logits, and the logits in the precision that
    computes; of one chunk only where they exceed [`~hf_moecal.model.head.CHUNK_ELEMENTS`].
    """
    rows = -(-CHUNK_ELEMENTS // classes) if positions * classes > CHUNK_ELEMENTS else positions
    return rows * classes * (3 * 4 + itemsize)


def activation_memory(
    model: PreTrainedModel, *, batch: int, length: int, checkpointing: bool = False, itemsize: int = 2
) -> int:
    """Bytes that autograd keeps for the backward pass in a forward of the model without its head, which really runs.

    Args:
        model (`PreTrainedModel`): in bfloat16 and training mode, on a real device or, like this call, under a
            `FakeTensorMode`.
        batch, length (`int`): sequences and tokens of a micro-batch, padded, so that attention needs its mask.
        checkpointing (`bool`): whether each decoder layer keeps its input only and runs again in the backward pass.
        itemsize (`int`): bytes of an element in the precision that computes; what the forward kept in 16 bits is
            scaled to it.
    """
    kept = _Kept(model, scale=itemsize // 2)
    with ExitStack() as stack:
        for index, layer in enumerate(decoder_layers(model)):
            stack.callback(layer.register_forward_pre_hook(kept.entering(index), with_kwargs=True).remove)
            stack.callback(layer.register_forward_hook(kept.leave).remove)
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor))
        ids = torch.zeros(batch, length, dtype=torch.long)
        outer = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
        getattr(outer, outer.base_model_prefix, outer)(
            input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False
        )
    return kept.checkpointed() if checkpointing else sum(kept.sizes[key] for key in kept.owner)


class _Kept:
    """Storages that autograd saves, each counted for the decoder layer (or `None`) that first saved it."""

    def __init__(self, model: nn.Module, *, scale: int):
        self._parameters = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        self._scale = scale
        self._alive: list[Tensor] = []  # an address is unique only as long as its tensor lives
        self._layer: int | None = None
        self._inputs: dict[int, int] = {}
        self.sizes: dict[int, int] = {}
        self.owner: dict[int, int | None] = {}

    def pack(self, tensor: Tensor) -> Tensor:
        key = self._seen(tensor)
        if key not in self._parameters:
            self.owner.setdefault(key, self._layer)
        return tensor

    def entering(self, index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            self._layer, self._inputs[index] = index, self._seen(args[0] if args else kwargs["hidden_states"])

        return hook

    def leave(self, module: nn.Module, args: tuple, output: object) -> None:
        self._layer = None

    def checkpointed(self) -> int:
        """What stays when layers are checkpointed: inputs of those that saved something, and the largest of them."""
        layers = sorted({layer for layer in self.owner.values() if layer is not None})
        saved = {layer: [key for key, owner in self.owner.items() if owner == layer] for layer in (None, *layers)}
        largest = max(layers, key=lambda layer: sum(self.sizes[key] for key in saved[layer]), default=None)
        keys = {*saved[None], *saved[largest], *(self._inputs[layer] for layer in layers)}
        return sum(self.sizes[key] for key in keys)

    def _seen(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.sizes:
            self._alive.append(tensor)
            scale = self._scale if tensor.dtype in (torch.bfloat16, torch.float16) else 1
            self.sizes[storage._cdata] = storage.nbytes() * scale
        return storage._cdata


@dataclass(frozen=True)
class Asked:
    """What judging a token takes besides the model's forward.

    Args:
        experts (`int`): how many predict for it.
        forwards (`float`): the parameters that take part, the head's for each expert among them, in units of those
            that one token uses in the model's forward.
        at_most (`bool`): whether it may be fewer.
    """

    experts: int
    forwards: float
    at_most: bool = False

    def __str__(self) -> str:
        most = "up to " if self.at_most else ""
        hint = "; readout_experts=auto asks fewer" if self.forwards > 1 and not self.at_most else ""
        return f"each judged token asks {most}{self.experts} experts, {most}{self.forwards:.2g} forwards of one{hint}"


def asked_of_experts(
    model: PreTrainedModel, layers: list[MoELayer], args: MoECalArguments, active: float
) -> Asked | None:
    """What the readout, or the filter, asks of the last layer's experts."""
    probed = args.readout != "native" or args.objective == "robust_filtered"
    if not layers or not probed:
        return None
    last, soft = layers[-1], args.readout == "soft_mixture"
    wanted = args.readout_experts if isinstance(args.readout_experts, int) else last.num_experts
    experts = wanted if soft else last.top_k or last.num_experts
    head = sum(p.numel() for module in head_modules(model).values() for p in module.parameters())
    each = sum(p.numel() for p in last.module.parameters()) / last.num_experts + head
    return Asked(experts, experts * each / active, at_most=soft and args.readout_experts == AUTO)
