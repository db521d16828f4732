"""Hidden states of frozen layers: computed once per sequence, kept on disk, replayed in the model's own forward.

When everything before a decoder layer is frozen, that layer's input is the same in every epoch, for every objective
and every seed. [`PrefixCache`] reads through: a batch whose sequences are all known skips the frozen layers, any
other runs them and is stored. A sequence is known by its tokens, so any dataset and any collator work.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .freezing import decoder_layer_of
from .probes import find_moe_layers
from .state_store import StateStore


_FLUSH_EVERY = 1024  # sequences: what a killed run computes again at most
_LABELS = ("_name_or_path", "architectures", "id2label", "label2id", "problem_type", "transformers_version")
_RANDOM = ("dropout", "jitter", "layerdrop")
_SHAPING = ("position_ids", "inputs_embeds", "token_type_ids", "past_key_values")


class PrefixCache:
    """Skips the frozen layers of a model within a `with` block; on exit every layer is as it was.

    The layers before the last MoE layer's decoder layer are replayed. On the first batch the replayed logits are
    compared with the computed ones, so a model whose later layers need more from the earlier ones than their hidden
    states is refused.

    Args:
        model (`nn.Module`): a transformers model, its first layers and input embeddings frozen.
        folder (`str` or `Path`): where the states are kept. States of other weights or another precision are dropped.
        dtype (`str`, *optional*): precision of the frozen layers' computation and of the states, for example
            `"bfloat16"`; the model's own if unset.

    Raises:
        ValueError: a layer before the last MoE layer trains, is random in training mode (dropout, router jitter), or
            cannot be replayed exactly.

    Example:

    ```python
    >>> import tempfile, torch
    >>> from transformers import MixtralConfig, MixtralForSequenceClassification
    >>> from hf_moecal.freezing import set_trainable
    >>> from hf_moecal.prefix_cache import PrefixCache
    >>> config = MixtralConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=3,
    ...     num_attention_heads=2, num_key_value_heads=2, num_local_experts=4, pad_token_id=0)
    >>> model = MixtralForSequenceClassification(config)
    >>> _ = set_trainable(model, "last_moe_layer")
    >>> with tempfile.TemporaryDirectory() as folder, PrefixCache(model, folder) as cache:
    ...     for epoch in range(2):
    ...         _ = model(input_ids=torch.tensor([[5, 6, 7]]))
    ...     cache.computed, cache.replayed
    (1, 2)

    ```
    """

    def __init__(self, model: nn.Module, folder: str | Path, *, dtype: str | None = None):
        place = decoder_layer_of(model, find_moe_layers(model)[-1].name)
        if place.index == 0:
            raise ValueError("The last MoE layer is in the model's first layer: nothing before it to be cached.")
        self._model, self._layers = model, list(place.layers)[: place.index]
        self._frozen = [model.get_input_embeddings(), *self._layers]
        _check_frozen(self._frozen)
        own = next(self._layers[0].parameters()).dtype
        self._dtype = own if dtype is None else _dtype(dtype)
        self._recast = self._dtype != own
        self._folder = Path(folder)
        self._found: Tensor | None = None
        self._verified = self._forced = False
        self.computed = self.replayed = 0

    def __enter__(self) -> PrefixCache:
        identity = {"weights": fingerprint(self._frozen, self._model.config), "dtype": str(self._dtype)}
        writer = str(torch.distributed.get_rank()) if torch.distributed.is_initialized() else "0"
        self._store = StateStore(self._folder, identity=identity, dtype=self._dtype, writer=writer)
        self._handle = self._model.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        for index, layer in enumerate(self._layers):
            run = copy.deepcopy(layer).to(self._dtype).forward if self._recast else layer.forward
            layer.forward = self._replaying(run, first=index == 0, last=index == len(self._layers) - 1)
        return self

    def __exit__(self, *exception: object) -> None:
        self._handle.remove()
        for layer in self._layers:
            del layer.forward  # the instance attribute; the class's own method shows again
        self._store.close()

    def _replaying(self, run: Callable[..., Any], *, first: bool, last: bool) -> Callable[..., Any]:
        """A layer's forward that hands on its input while the batch is replayed; the last one gives the states."""

        @functools.wraps(run)
        @torch.no_grad()
        def forward(*args: Any, **kwargs: Any) -> Tensor:
            hidden = args[0] if args else kwargs["hidden_states"]
            if first:
                self._outer_dtype = hidden.dtype
            if self._found is not None:
                return self._found.to(hidden.device, hidden.dtype) if last else hidden
            if self._recast:
                args, kwargs = _cast(args, self._dtype), _cast(kwargs, self._dtype)
            state = run(*args, **kwargs)
            if not isinstance(state, Tensor):
                raise ValueError(
                    f"The decoder layers of {type(self._model).__name__} return more than hidden states, which the "
                    "prefix cache cannot replay; leave `prefix_cache` unset."
                )
            if last:
                self._keep(state)
                return state.to(self._outer_dtype)
            return state

        return forward

    def _before_forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        ids, mask = _tokens(args, kwargs)
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        self._rows = [row.nonzero().squeeze(1) for row in real.cpu()]
        self._keys = [_key(row[kept], kept) for row, kept in zip(ids.cpu(), self._rows, strict=True)]
        if not self._verified:
            self._verified = True  # first: the comparison runs the model, and so this hook
            self._verify(args, kwargs)
        self._found = self._look_up(ids.shape)
        if self._found is not None:
            self.replayed += len(self._keys)

    def _look_up(self, shape: torch.Size) -> Tensor | None:
        if not all(key in self._store for key in self._keys):
            self._store.refresh()
        states = [self._store.get(key) for key in self._keys]
        if self._forced or any(state is None for state in states):
            return None
        found = states[0].new_zeros(*shape, *states[0].shape[1:])
        for row, kept, state in zip(found, self._rows, states, strict=True):
            row[kept] = state
        return found

    def _keep(self, states: Tensor) -> None:
        states = states.cpu()
        for key, kept, state in zip(self._keys, self._rows, states, strict=True):
            self._store.put(key, state[kept])
        before, self.computed = self.computed, self.computed + len(self._keys)
        if before // _FLUSH_EVERY != self.computed // _FLUSH_EVERY:
            self._store.flush()

    def _verify(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """Compares a computed with a replayed forward, in evaluation mode; leaves the random state alone."""
        training = self._model.training
        self._model.eval()
        with torch.no_grad(), torch.random.fork_rng():
            self._forced = True
            computed = self._model(*args, **kwargs)["logits"]
            self._forced = False
            replayed = self._model(*args, **kwargs)["logits"]
        self._model.train(training)
        self.replayed = 0
        error = ((computed - replayed).abs().max() / computed.abs().max().clamp(min=1e-30)).item()
        if not error <= 1e-5:
            raise ValueError(
                f"Replaying the hidden states before the last MoE layer of {type(self._model).__name__} changes its "
                f"logits by {error:.1e} of their scale: later layers read more from the earlier ones. Leave "
                "`prefix_cache` unset for this model."
            )


def fingerprint(modules: list[nn.Module], config: Any) -> str:
    """Hash of the weights of modules, and of the configuration that says how they are used."""
    digest = hashlib.blake2b(digest_size=16)
    settings = {name: value for name, value in config.to_diff_dict().items() if name not in _LABELS}
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for module in modules:
        for name, tensor in module.state_dict().items():
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _key(ids: Tensor, positions: Tensor) -> str:
    content = torch.stack([ids, positions]).contiguous().numpy().tobytes()
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _tokens(args: tuple, kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
    """Token ids and mask of a forward; raises where the hidden states depend on anything else."""
    ids = args[0] if args else kwargs.get("input_ids")
    mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
    other = [name for name in _SHAPING if kwargs.get(name) is not None]
    if ids is None or other or len(args) > 2 or (mask is not None and mask.dim() != 2):
        raise ValueError(
            "The prefix cache knows sequences by `input_ids` and a [B, S] `attention_mask`, but this batch has "
            f"{other or 'another form'}; leave `prefix_cache` unset."
        )
    return ids, mask


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, tuple):
        return tuple(_cast(item, dtype) for item in value)
    if isinstance(value, dict):
        return {name: _cast(item, dtype) for name, item in value.items()}
    return value


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"`dtype` must name a floating-point type such as 'bfloat16' or 'float32', got {name!r}.")
    return dtype


def _check_frozen(modules: list[nn.Module]) -> None:
    for module in modules:
        trains = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
        if trains:
            raise ValueError(
                f"The prefix cache replays frozen layers, but {len(trains)} of their parameters train (first: "
                f"{trains[0]!r}); set train='last_moe_layer' or leave `prefix_cache` unset."
            )
        for child in module.modules():
            random = {
                name: value
                for name, value in {**vars(child), **({"p": child.p} if isinstance(child, nn.Dropout) else {})}.items()
                if (name == "p" or any(word in name for word in _RANDOM)) and isinstance(value, float) and value > 0
            }
            if random:
                raise ValueError(
                    f"The prefix cache replays layers that must not be random, but {type(child).__name__} has "
                    f"{random}; set these to 0 in the model's config, or leave `prefix_cache` unset."
                )
