"""Everything before the last MoE block, computed once per judged token, kept on disk, replayed in the model's forward.

When only the last MoE block and what follows it train, all that comes before is the same in every epoch, for every
objective and every seed, and only its value at the judged tokens matters: the pooled one of a sequence classifier, the
supervised ones of a language model. [`PrefixCache`] keeps that: each later forward runs the judged tokens alone
through the block, the final norm and the head. A sequence is known by its tokens, so any dataset and collator work.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from tqdm.auto import tqdm

from ..probes.replay import without_checkpointing
from ..probes.tail import patched
from .freezing import check_frozen, last_moe_site
from .head import RowSelector, pooled_positions
from .precision import float_parameters, widest_precision
from .prefix_keys import fingerprint, state_key, tokens_and_mask
from .state_store import StateStore


_FLUSH_EVERY = 1024  # sequences: what a killed run computes again at most
_VERIFIED = 8  # judged tokens of the first batch that are computed without the cache as well, to compare
_INPUT = "layer input"
_EXACT, _ROUNDED = 1e-5, 0.2  # accepted error of a replayed forward, in the model's precision and in a lower one


class _Leaf(NamedTuple):
    """Of one token: shape and precision of a tensor that a module gives."""

    shape: torch.Size
    dtype: torch.dtype


class _Recorded(Exception):
    """Ends a recording forward once everything before the block is known."""


class PrefixCache:
    """Replays what comes before the last MoE block of a model; on exit the model is as it was.

    Within `with cache.replaying(batch) as short`, a forward on `short` gives the logits of the whole model on `batch`
    at the judged tokens, one token per sequence.
    On the first batch that is checked, so a model that cannot be replayed (its last MoE block is not in its last
    layer, or later modules read more from earlier ones) is refused.

    Args:
        model (`PreTrainedModel`): a sequence classifier or a causal language model; everything before its last MoE
            block is frozen.
        folder (`str` or `Path`): where the states are kept, each set of frozen weights and each precision in a folder
            of its own; several runs may share it.
        dtype (`str`, *optional*): precision in which the frozen part runs, for example `"bfloat16"`; the model's own
            if unset. Another precision takes a copy of the model.

    Raises:
        ValueError: something before the block trains or is random in training mode (dropout, router jitter), or the
            model cannot be replayed.

    Example:

    ```python
    >>> import tempfile, torch
    >>> from transformers import MixtralConfig, MixtralForSequenceClassification
    >>> from hf_moecal.model.freezing import set_trainable
    >>> from hf_moecal.model.prefix_cache import PrefixCache
    >>> config = MixtralConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=3,
    ...     num_attention_heads=2, num_key_value_heads=2, num_local_experts=4, pad_token_id=0)
    >>> model = MixtralForSequenceClassification(config)
    >>> _ = set_trainable(model, "last_moe_layer")
    >>> with tempfile.TemporaryDirectory() as folder, PrefixCache(model, folder) as cache:
    ...     for epoch in range(2):
    ...         with cache.replaying({"input_ids": torch.tensor([[5, 6, 7]])}) as short:
    ...             _ = model(**short)
    ...     cache.computed, cache.replayed
    (1, 2)

    ```
    """

    def __init__(self, model: nn.Module, folder: str | Path, *, dtype: str | None = None):
        self._model, self._folder = model, Path(folder)
        self._site = last_moe_site(model)
        if self._site.index == 0:
            raise ValueError("The last MoE block is in the model's first layer: nothing before it is worth caching.")
        self._frozen = frozen = [model.get_input_embeddings(), *self._site.before, *self._site.siblings.values()]
        check_frozen(frozen)
        self._asked = None if dtype is None else _dtype(dtype)
        self._dtype = self._asked or widest_precision([*frozen, self._site.block])
        self._identity = f"{fingerprint(frozen, model.config)}-{str(self._dtype).removeprefix('torch.')}"
        self._pad = model.config.get_text_config().pad_token_id
        self._layout: dict[str, tuple[Any, list[_Leaf | None]]] = {}
        self._found: dict[str, Any] | None = None
        self._verified = False
        self.computed = self.replayed = 0

    def __enter__(self) -> PrefixCache:
        self._store = StateStore(self._folder / self._identity, dtype=self._dtype)
        self._runner = self._model
        if self._asked is not None and any(p.dtype != self._asked for p in float_parameters(self._frozen)):
            self._runner = copy.deepcopy(self._model).to(self._asked)
        modules = {_INPUT: self._site.before[-1], **self._site.siblings}
        stubs = {module: self._stub(name, module.forward) for name, module in modules.items()}
        stubs |= {module: self._stub(None, module.forward) for module in self._site.before[:-1]}
        self._exit = ExitStack()
        self._exit.enter_context(patched(stubs))
        self._exit.callback(self._store.close)
        return self

    def __exit__(self, *exception: object) -> None:
        self._exit.close()

    @contextmanager
    def replaying(self, inputs: Mapping[str, Any], tokens: Tensor | None = None) -> Iterator[dict[str, Any]]:
        """Gives the judged tokens as a batch; forwards on it within the block start at the MoE block.

        Args:
            inputs (`Mapping`): `input_ids` `[B, S]` and `attention_mask` of a batch, and whatever else goes with it.
            tokens (`Tensor` of shape `[n]`, *optional*): flat indices into the B*S positions; the one per sequence
                that a sequence classifier pools if unset.

        Yields:
            `dict`: the same with `input_ids` and `attention_mask` of shape `[n, 1]`.

        Raises:
            ValueError: the hidden states depend on more than ids and mask, or the model cannot be replayed.
        """
        ids, mask = tokens_and_mask(inputs)
        if tokens is None:
            tokens = self._pooled(ids)
        judged = ids.reshape(-1)[tokens][:, None]
        short = {**inputs, "input_ids": judged, "attention_mask": torch.ones_like(judged)}
        with torch.no_grad(), torch.random.fork_rng(devices=[] if ids.device.type == "cpu" else [ids.device]):
            vectors = self._vectors(ids, mask, tokens)
            if not self._verified:
                self._verify(ids, mask, tokens[:_VERIFIED], vectors[:_VERIFIED])
                self._verified = True
            found = self._unpacked(vectors)
        self.replayed += len(tokens)
        with self._giving(found):
            yield short

    def fill(self, sequences: Iterable[Sequence[int]], *, batch_tokens: int = 2048, progress: bool = True) -> None:
        """Computes what is not stored yet at the pooled tokens, in batches of similar length.

        Args:
            sequences (`Iterable[Sequence[int]]`): token ids without padding.
            batch_tokens (`int`, *optional*, defaults to 2048): tokens per forward.
            progress (`bool`, *optional*, defaults to `True`): whether to show a progress bar.
        """
        self._store.refresh()
        if self._pad is None:
            raise ValueError("The model has no padding token; set model.config.pad_token_id = tokenizer.pad_token_id.")
        rows = map(torch.tensor, sequences)
        ends = ((ids, int(pooled_positions(ids[None], self._pad)[0])) for ids in rows)
        waiting = {state_key(ids, torch.ones_like(ids).bool(), end): ids for ids, end in ends}
        waiting = sorted((ids for key, ids in waiting.items() if key not in self._store), key=len)
        device = next(self._model.parameters()).device
        with tqdm(total=len(waiting), desc="frozen layers", unit="seq", disable=not progress, delay=1) as bar:
            while waiting:
                count = max(1, batch_tokens // len(waiting[-1]))
                batch = waiting[-count:]
                del waiting[-count:]
                ids = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True, padding_value=self._pad)
                lengths = torch.tensor([len(row) for row in batch])
                mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
                with torch.no_grad():
                    self._vectors(ids.to(device), mask.to(device), self._pooled(ids).to(device))
                bar.update(len(batch))
        self._store.flush()

    @contextmanager
    def _giving(self, found: dict[str, Any]) -> Iterator[None]:
        self._found = found
        try:
            with without_checkpointing(self._model.modules()):
                yield
        finally:
            self._found = None

    def _pooled(self, ids: Tensor) -> Tensor:
        if self._model.get_output_embeddings() is not None:
            raise ValueError("A language model pools no token; say which are judged with replaying(batch, tokens).")
        return torch.arange(len(ids), device=ids.device) * ids.shape[1] + pooled_positions(ids, self._pad)

    def _vectors(self, ids: Tensor, mask: Tensor, tokens: Tensor) -> Tensor:
        """One stored vector per judged token, `[n, D]`; those that are not stored yet are computed."""
        rows, positions = (tokens // ids.shape[1]).tolist(), (tokens % ids.shape[1]).tolist()
        pairs = list(zip(ids.cpu(), mask.cpu().bool(), strict=True))
        keys = [state_key(*pairs[row], position) for row, position in zip(rows, positions, strict=True)]
        if not all(key in self._store for key in keys):
            self._store.refresh()
        vectors = [self._store.get(key) for key in keys]
        missing = [place for place, vector in enumerate(vectors) if vector is None]
        if missing or not self._layout:  # the layout of a filled store is learnt from the first batch
            places = missing or [0]
            needed = sorted({rows[place] for place in places})
            within = torch.tensor([needed.index(rows[place]) for place in places], device=ids.device)
            at = torch.tensor([positions[place] for place in places], device=ids.device)
            for place, vector in zip(places, self._record(ids[needed], mask[needed], within, at), strict=True):
                vectors[place] = vector
                self._store.put(keys[place], vector)
            before, self.computed = self.computed, self.computed + len(missing)
            if before // _FLUSH_EVERY != self.computed // _FLUSH_EVERY:
                self._store.flush()
        return torch.stack([vector.to(ids.device) for vector in vectors])

    def _unpacked(self, vectors: Tensor) -> dict[str, Any]:
        found, start = {}, 0
        for name, (structure, leaves) in self._layout.items():
            states = []
            for leaf in leaves:
                if leaf is None:
                    states.append(None)
                    continue
                own = vectors[:, start : start + leaf.shape.numel()].to(leaf.dtype)
                states.append(own.reshape(len(vectors), 1, *leaf.shape))
                start += leaf.shape.numel()
            found[name] = tree_unflatten(states, structure)
        return found

    def _stub(self, name: str | None, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A forward that gives what was found under a name (its own input for `None`) while a batch is replayed."""

        @functools.wraps(forward)
        def stub(*args: Any, **kwargs: Any) -> Any:
            if self._found is None or (name is not None and name not in self._found):
                return forward(*args, **kwargs)
            hidden = args[0] if args else kwargs["hidden_states"]
            if name is None:
                return hidden
            # A probe that certifies itself runs the first token alone.
            return tree_map(lambda leaf: None if leaf is None else leaf[: len(hidden)], self._found[name])

        return stub

    def _record(self, ids: Tensor, mask: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
        """Runs what comes before the block and keeps it at the judged tokens: `[n, D]`."""
        site, outputs = last_moe_site(self._runner), {}

        def keep(name: str, output: Any) -> None:
            leaves, structure = tree_flatten(output)
            of_tokens = [isinstance(leaf, Tensor) and leaf.shape[:-1] == ids.shape for leaf in leaves]
            if not of_tokens[0]:
                raise ValueError(
                    f"{name!r} of {type(self._model).__name__} gives no state per token, so it cannot be replayed; "
                    "leave `prefix_cache` unset."
                )
            # What comes beside the states (attention weights of the eager implementation) is nobody's input: if it
            # were, the comparison with a whole forward would tell.
            pairs = zip(leaves, of_tokens, strict=True)
            outputs[name] = structure, [leaf[rows, positions] if kept else None for leaf, kept in pairs]

        def stop(module: nn.Module, args: tuple) -> None:
            raise _Recorded

        with ExitStack() as hooks:
            for name, module in {_INPUT: site.before[-1], **site.siblings}.items():
                hook = module.register_forward_hook(lambda m, args, output, name=name: keep(name, output))
                hooks.callback(hook.remove)
            hooks.callback(site.block.register_forward_pre_hook(stop).remove)
            with suppress(_Recorded):
                _run(self._runner, input_ids=ids, attention_mask=mask, use_cache=False)
        # Of a copy in another precision the states go on in that of the model's own.
        dtype = None if self._runner is self._model else self._model.get_input_embeddings().weight.dtype
        self._layout = {
            name: (structure, [None if one is None else _Leaf(one.shape[1:], dtype or one.dtype) for one in kept])
            for name, (structure, kept) in outputs.items()
        }
        states = [state for _, kept in outputs.values() for state in kept if state is not None]
        return torch.cat([state.flatten(1).to(self._dtype) for state in states], dim=1)

    def _verify(self, ids: Tensor, mask: Tensor, tokens: Tensor, vectors: Tensor) -> None:
        """Compares a whole with a replayed forward, in evaluation mode."""
        rows, within = (tokens // ids.shape[1]).unique(return_inverse=True)
        chosen = within * ids.shape[1] + tokens % ids.shape[1]
        judged = ids.reshape(-1)[tokens][:, None]
        training = self._model.training
        self._model.eval()
        computed = self._logits(ids[rows], mask[rows], chosen)
        with self._giving(self._unpacked(vectors)):
            replayed = self._logits(judged, torch.ones_like(judged), torch.arange(len(tokens), device=ids.device))
        self._model.train(training)
        error = ((computed - replayed).abs().max() / computed.abs().max().clamp(min=1e-30)).item()
        exact = max(_EXACT, *(10 * torch.finfo(p.dtype).eps for p in float_parameters([self._model])))
        if not error <= (exact if self._runner is self._model else _ROUNDED):
            raise ValueError(
                f"Replaying what comes before the last MoE block of {type(self._model).__name__} changes its logits "
                f"by {error:.1e} of their scale; leave `prefix_cache` unset for this model."
            )

    def _logits(self, ids: Tensor, mask: Tensor, tokens: Tensor) -> Tensor:
        """The model's logits at flat positions, `[n, C]`."""
        if self._model.get_output_embeddings() is None:
            return _run(self._model, input_ids=ids, attention_mask=mask)["logits"][tokens // ids.shape[1]]
        with RowSelector(self._model) as selector, selector.selecting(tokens):
            return _run(self._model, input_ids=ids, attention_mask=mask, use_cache=False)["logits"][0]


def _run(model: nn.Module, **inputs: Any) -> Any:
    """A forward in the weights' own precision, also where accelerate has wrapped the model's in autocast."""
    with torch.autocast(next(model.parameters()).device.type, enabled=False):
        return getattr(model, "_original_forward", model)(**inputs)


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"`dtype` must name a floating-point type such as 'bfloat16' or 'float32', got {name!r}.")
    return dtype
