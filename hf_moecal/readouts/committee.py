"""A committee: several last MoE layers, each with its own final norm and head, on one frozen prefix.

Member 0 is the model itself. What the others have of their own are parameters, kept in one container on the model, so
that optimizers, devices and processes see them; structure they have none: a member is the model with these parameters
in place of its own ([`member_models`]), and shares all other modules with it.
"""

from __future__ import annotations

import copy
import hashlib
import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..model.freezing import CONTAINER, head_modules, last_moe_site
from ..model.weight_files import MEMBERS_FILE
from ..probes.capture import autocast_state
from ..probes.certify import evaluating
from ..probes.routing import hooked, upcast
from ..probes.tail import patched
from ..versions import CACHE_NAMES, cache_name, given_cache


ATTACHED = "moecal_reading"
"""Attribute of a loaded model that predicts by a readout for good: its `ReadoutForward`."""
CALIBRATED_READOUT = "moecal_calibrated_readout"
"""Attribute under which a loaded model says which readout its calibration is of, where that is not attached."""
SPREAD, HEAD_SPREAD, LANGUAGE_SPREAD = 0.5, 1.0, 0.1
"""Noise on the matrices of a further member's block and head, in units of each matrix's own root mean square.

A classifier's members need much to differ (recipes/readout.md has the numbers), and learn again what it costs together
with their new heads. In a language model more than a tenth costs experts what they know, and the head gets none."""
_EXACT = 1e-5


class Members(nn.Module):
    """The parameters of members 1, 2, ... by member and by their names in the model. It computes nothing."""

    def __init__(self, own: list[dict[str, Tensor]]):
        super().__init__()
        for number, tensors in enumerate(own, 1):
            for name, tensor in tensors.items():
                self.register_parameter(f"{number}/{name.replace('.', '/')}", nn.Parameter(tensor))

    def by_member(self) -> list[dict[str, nn.Parameter]]:
        """Each further member's parameters, by their names in the model."""
        found: dict[str, dict[str, nn.Parameter]] = {}
        for key, parameter in self._parameters.items():
            number, _, name = key.partition("/")
            found.setdefault(number, {})[name.replace("/", ".")] = parameter
        return list(found.values())


def count_members(model: nn.Module) -> int:
    """How many members a model predicts with; 1 for any model without further ones."""
    container = getattr(model, CONTAINER, None)
    return 1 if container is None else 1 + len(container.by_member())


def member_names(model: nn.Module) -> dict[str, str]:
    """Names of the further members' parameters in the model, and of the parameters in whose place they stand."""
    container = getattr(model, CONTAINER, None)
    keys = [] if container is None else container.state_dict()
    return {f"{CONTAINER}.{key}": key.partition("/")[2].replace("/", ".") for key in keys}


@torch.no_grad()
def add_members(model: nn.Module, count: int, *, seed: int) -> None:
    """Makes a committee of a model: further members for all that trains in it, in place.

    A member starts from the model's weights with noise of its own on every matrix of router and experts: `SPREAD` in
    a classifier, with `HEAD_SPREAD` on its head, and `LANGUAGE_SPREAD` in a language model. A language model's head,
    and vectors (norms, biases), start equal.

    Args:
        model (`PreTrainedModel`): with what trains chosen by `set_trainable(model, "last_moe_layer")`.
        count (`int`): members in all, 2 or more.
        seed (`int`): of the noise.

    Raises:
        ValueError: the model has another number of members already, or something before its last MoE layer trains.
    """
    if count_members(model) > 1:
        if count_members(model) != count:
            raise ValueError(f"The model has {count_members(model)} members already, so it cannot train {count}.")
        return
    own = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    block, new = (SPREAD, HEAD_SPREAD) if model.get_output_embeddings() is None else (LANGUAGE_SPREAD, 0.0)
    spread = dict.fromkeys(own, block)
    for head in head_modules(model):
        spread |= {name: new for name in own if name.startswith(f"{head}.")}
    members = range(1, count)
    attach_members(
        model, [{k: _noisy(p, spread[k], f"{seed} {number} {k}") for k, p in own.items()} for number in members]
    )


def _noisy(parameter: Tensor, spread: float, key: str) -> Tensor:
    if parameter.dim() < 2 or not spread:
        return parameter.detach().clone()
    digest = hashlib.blake2b(key.encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
    noise = torch.randn(parameter.shape, generator=generator).to(parameter)
    return parameter + spread * parameter.float().square().mean().sqrt().to(parameter) * noise


def attach_members(model: nn.Module, own: list[dict[str, Tensor]]) -> None:
    """Gives a model further members, by what each has in place of the model's own parameters."""
    model.add_module(CONTAINER, Members(own))
    model._keys_to_ignore_on_save = {*(getattr(model, "_keys_to_ignore_on_save", None) or ()), *member_names(model)}


def drop_members(model: nn.Module) -> None:
    """Makes a committee its first member alone again."""
    if count_members(model) > 1:
        model._keys_to_ignore_on_save = set(model._keys_to_ignore_on_save) - set(member_names(model))
        delattr(model, CONTAINER)


def save_members(model: nn.Module, folder: str | Path) -> Path | None:
    """Writes `members.safetensors` beside the checkpoint of member 0; `None` for a model without further members.

    Such a file of an earlier committee goes, since it would be published with a checkpoint that it is no part of.
    """
    from safetensors.torch import save_file

    path = Path(folder) / MEMBERS_FILE
    if count_members(model) == 1:
        path.unlink(missing_ok=True)
        return None
    tensors = getattr(model, CONTAINER).state_dict()
    partial = path.with_name(f".{path.name}.partial")
    try:
        save_file({name: t.cpu().contiguous() for name, t in tensors.items()}, partial, metadata={"format": "pt"})
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


@torch.no_grad()
def load_members(model: nn.Module, file: str | Path) -> None:
    """Gives a model the further members in a file that [`save_members`] wrote, in place of those that it may have.

    Raises:
        ValueError: their parameters are not those of the model, or of the members that it has.
    """
    from safetensors.torch import load_file

    stored = load_file(Path(file))
    named, container = dict(model.named_parameters()), getattr(model, CONTAINER, None)
    own: dict[str, dict[str, Tensor]] = {}
    for key, tensor in stored.items():
        number, _, name = key.partition("/")
        name = name.replace("/", ".")
        if name not in named or named[name].shape != tensor.shape:
            raise ValueError(
                f"{Path(file).name!r} does not fit {type(model).__name__}: it has {name!r} of shape "
                f"{tuple(tensor.shape)}; load the members with the checkpoint that they were saved with."
            )
        own.setdefault(number, {})[name] = tensor.to(named[name])
    if container is None:  # in the model's order, in which optimizers number their states
        order = {name: place for place, name in enumerate(named)}
        attach_members(
            model, [dict(sorted(own[n].items(), key=lambda item: order[item[0]])) for n in sorted(own, key=int)]
        )
        return
    if set(stored) != set(container.state_dict()):
        raise ValueError(f"{Path(file).name!r} holds another committee than the model's; load the one it was made of.")
    container.load_state_dict(stored)


def member_models(model: nn.Module) -> list[nn.Module]:
    """The further members as models of their own, which share with `model` all modules in which nothing differs."""
    container = getattr(model, CONTAINER, None)
    return [] if container is None else [_member_model(model, own) for own in container.by_member()]


def _member_model(model: nn.Module, own: Mapping[str, nn.Parameter]) -> nn.Module:
    swapped = {id(parameter): own.get(name, parameter) for name, parameter in model.named_parameters()}
    replaced = {key for key, parameter in swapped.items() if id(parameter) != key}
    memo: dict[int, Any] = dict(swapped)
    for module in model.modules():
        if replaced.isdisjoint(map(id, module.parameters())):
            memo[id(module)] = module
        for value in vars(module).values():
            if hasattr(value, "to_diff_dict"):  # configurations
                memo[id(value)] = value
    memo[id(getattr(model, CONTAINER))] = None
    whole = ("_forward_hooks", "_forward_pre_hooks")  # of the committee, not of a member
    memo |= {id(vars(model)[name]): OrderedDict() for name in whole}
    member = copy.deepcopy(model, memo)
    if ATTACHED in vars(member):
        getattr(member, ATTACHED).detach()
    vars(member).pop("forward", None)  # put there by a trainer, perhaps as a closure that still calls the model
    return member


class Shared:
    """Runs further members on what the frozen layers gave in the model's own forward. A context manager.

    The decoder layer with the last MoE block runs again for each member, and all that comes after it. On the first
    forward that is compared with running each whole.

    Args:
        model (`nn.Module`): member 0.
        others (`list[nn.Module]`): the further members, of [`member_models`].
    """

    def __init__(self, model: nn.Module, others: list[nn.Module]):
        self._model, self.others = model, others
        self._site = last_moe_site(model)
        self._given: Any = None
        self._autocast: dict[str, Any] | None = None
        self._verified = self._site.index == 0

    def __enter__(self) -> Shared:
        handles = [layer.register_forward_hook(self._keep) for layer in self._site.before[-1:]]
        handles.append(self._site.block.register_forward_pre_hook(self._note))
        self._exit = ExitStack()
        self._exit.enter_context(hooked(handles))
        return self

    def __exit__(self, *exception: object) -> None:
        self._given = None
        self._exit.close()

    def run(self, args: tuple, kwargs: dict[str, Any]) -> list[Any]:
        """The further members' outputs for the arguments of the model's last forward.

        Args:
            args (`tuple`): positional arguments of that forward.
            kwargs (`dict`): its keyword arguments.

        Raises:
            ValueError: the forward continues from a cache, or a member needs more than the frozen layers' outputs.
        """
        cache = given_cache(kwargs)
        if cache is not None and cache.get_seq_length() > 0:
            raise ValueError(
                "A committee reads whole sequences: only its first member has a cache. Call it without "
                f"`{cache_name()}`, or generate with the plain checkpoint."
            )
        kwargs = {name: value for name, value in kwargs.items() if name not in ("labels", *CACHE_NAMES)}
        if not self._verified:
            self._verify(args, kwargs)
            self._verified = True
        outputs = []
        for member in self.others:
            member.train(self._model.training)
            with torch.autocast(**self._autocast), self._replaying():
                outputs.append(member(*args, **kwargs))
        return outputs

    @contextmanager
    def _replaying(self) -> Iterator[None]:
        """Within the block the frozen layers pass on what they are given, and the last of them gives what it gave."""
        given = self._given
        stubs: dict[nn.Module, Any] = dict.fromkeys(self._site.before[:-1], _pass_on)
        stubs |= {layer: lambda *args, **kwargs: given for layer in self._site.before[-1:]}
        with patched(stubs):
            yield

    def _keep(self, layer: nn.Module, args: tuple, output: Any) -> None:
        self._given = output

    def _note(self, block: nn.Module, args: tuple) -> None:
        self._autocast = autocast_state(block)

    @torch.no_grad()
    def _verify(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """In evaluation mode, as the members are there too."""
        given, member = self._given, self.others[0]
        with evaluating(self._model), evaluating(member), torch.autocast(**self._autocast):
            whole = member(*args, **kwargs).logits
            with self._replaying():
                replayed = member(*args, **kwargs).logits
        self._given = given
        error = upcast(whole - replayed).abs().max() / upcast(whole).abs().max().clamp_min(1e-30)
        if not error <= max(_EXACT, 10 * torch.finfo(whole.dtype).eps):
            raise ValueError(
                f"Replaying the frozen layers of {type(self._model).__name__} changes a member's logits by "
                f"{error:.1e} of their scale: its last layer reads more than they give. Leave `readout_members` at 1."
            )


def _pass_on(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return hidden_states
