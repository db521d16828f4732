"""The output embedding of a language model, at chosen positions and in chunks.

Full logits of a long batch over a large vocabulary take gigabytes; those of the supervised positions do not, and where
most positions are supervised only one chunk of them exists at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..probes.capture import autocast_state, base_of
from ..probes.tail import patched


# Logits of one chunk, rounded up to whole rows: 32 MiB in float32, twice as much with their log-probabilities. Blocks
# below that size the C library keeps when they are freed, and cannot use again for the next chunk (malloc's largest
# mmap threshold): memory then grows as if the chunks were one.
CHUNK_ELEMENTS = 2**23


class RowSelector:
    """Makes a language model compute logits at the chosen positions only. A context manager: it leaves no hook.

    A pre-hook on `model.get_output_embeddings()` selects rows of the hidden states, so the model's own forward (with
    its soft-capping or scaling) does the rest and `outputs.logits` comes out as `[1, n, V]`. Where that is more than
    [`CHUNK_ELEMENTS`], the forward computes one row, and `reduced` the others, chunk by chunk, again through the
    model's own forward with its body stubbed; each chunk is computed again in the backward pass.

    Args:
        model (`nn.Module`): a causal language model.
        quiet (`Callable`, *optional*): makes a context in which forwards leave no trace in whoever watches the model.

    Raises:
        ValueError: the model has no output embedding.
    """

    def __init__(self, model: nn.Module, *, quiet: Callable[[], AbstractContextManager[None]] = nullcontext):
        self._head = model.get_output_embeddings()
        if self._head is None:
            raise ValueError(
                f"{type(model).__name__} has no output embedding; task='lm' needs an AutoModelForCausalLM."
            )
        self._outer = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
        self._base = base_of(self._outer)
        self._vocabulary = self._outer.config.get_text_config().vocab_size
        self._quiet = quiet
        self._tokens: Tensor | None = None
        self._rows: Tensor | None = None
        self._fired = False
        self._due = self._base is self._outer

    def __enter__(self) -> RowSelector:
        self._handles = [
            self._head.register_forward_pre_hook(self._select),
            self._base.register_forward_hook(self._keep),
        ]
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def selecting(self, tokens: Tensor | None) -> Iterator[None]:
        """Within the block, forwards compute logits at `tokens` (flat indices into B*S) only; all if `None`."""
        before = self._tokens, self._rows, self._fired
        self._tokens, self._rows, self._fired = tokens, None, False
        try:
            yield
        finally:
            self._tokens, self._rows, self._fired = before

    def reduced(self, logits: Tensor, reduce: Callable[[slice, Tensor], Tensor]) -> Tensor:
        """`reduce(part, logits [c, V])` over chunks of the chosen positions, joined: `[n, ...]`.

        Args:
            logits (`Tensor`): of the forward inside this `selecting` block.
            reduce (`Callable`): maps a slice of the positions and their logits to one row for each.

        Raises:
            ValueError: the forward ignored the selector's hook.
        """
        self._ensure_fired()
        rows = self._rows
        if rows is None:
            return reduce(slice(None), self.at(logits, slice(None)))
        size = -(-CHUNK_ELEMENTS // self._vocabulary)
        parts = [slice(start, start + size) for start in range(0, len(rows), size)]

        def answer(part: slice, hidden: Tensor) -> Tensor:
            return reduce(part, self._logits(hidden))

        if not torch.is_grad_enabled():
            return torch.cat([answer(part, rows[part]) for part in parts])
        return torch.cat([checkpoint(answer, part, rows[part], use_reentrant=False) for part in parts])

    def at(self, logits: Tensor, part: slice) -> Tensor:
        """Logits `[c, V]` of a slice of the chosen positions; `logits` are those of the forward."""
        self._ensure_fired()
        return logits[0, part] if self._rows is None else self._logits(self._rows[part])

    def _logits(self, hidden: Tensor) -> Tensor:
        def stub(*args: Any, **kwargs: Any) -> ModelOutput:
            return self._output_type(last_hidden_state=hidden[None])

        tokens = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
        autocast = torch.autocast(**self._autocast)
        with self._quiet(), self.selecting(None), autocast, patched({self._base: stub}):
            return self._outer(input_ids=tokens, use_cache=False).logits[0]

    def _ensure_fired(self) -> None:
        if self._tokens is not None and not self._fired:
            raise ValueError(
                "The forward ignored the hook that selects positions, as a model does that was compiled before the "
                "hook was there; attach the selector first, then call torch.compile."
            )

    def _chunked(self) -> bool:
        many = self._tokens is not None and len(self._tokens) * self._vocabulary > CHUNK_ELEMENTS
        return many and self._base is not self._outer

    def _keep(self, module: nn.Module, args: tuple, output: Any) -> None:
        self._due = True
        if self._chunked():
            hidden = output.last_hidden_state
            self._output_type, self._autocast = type(output), autocast_state(module)
            self._rows = hidden.reshape(-1, hidden.shape[-1])[self._tokens]

    def _select(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if self._tokens is None or not self._due:
            return None
        self._fired = True
        self._due = self._base is self._outer  # another model may share this head
        hidden, tokens = args[0], self._tokens[:1] if self._chunked() else self._tokens
        return (hidden.reshape(-1, hidden.shape[-1])[tokens].unsqueeze(0), *args[1:])


@contextmanager
def same_length(model: nn.Module, *, unless: Callable[[], bool]) -> Iterator[None]:
    """Within the block, forwards that make a sequence longer than its `input_ids` raise a `ValueError`.

    Positions are counted in `input_ids`; with virtual tokens before them each would be read at another token's place.

    Args:
        model (`nn.Module`): as it is called.
        unless (`Callable`): whether a forward now is a replay, in which nothing is counted.
    """
    outer = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    base = None if outer is None else getattr(outer, outer.base_model_prefix, outer)
    given: list[torch.Size] = []
    own = threading.get_ident()  # a forward of another thread is not of this context

    def note(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if threading.get_ident() != own:
            return
        ids = kwargs.get("input_ids", args[0] if args else None)
        given[:] = [ids.shape] if isinstance(ids, Tensor) and not unless() else []

    def compare(module: nn.Module, args: tuple, output: Any) -> None:
        hidden = getattr(output, "last_hidden_state", None)
        ours = threading.get_ident() == own and bool(given) and hidden is not None and not unless()
        if ours and hidden.shape[:2] != given.pop():
            raise ValueError(
                f"{type(model).__name__} makes sequences of {hidden.shape[1]} positions of its `input_ids`, as with "
                "virtual tokens before them, so that no prediction stands where its token does; use an adapter that "
                "leaves the positions as they are, such as LoRA."
            )

    handles = [model.register_forward_pre_hook(note, with_kwargs=True)]
    if base is not None:
        handles.append(base.register_forward_hook(compare))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def pooled_positions(ids: Tensor, pad_token_id: int | None) -> Tensor:
    """Position that sequence-classification heads read, per sequence: the rightmost token that is not padding."""
    batch, length = ids.shape
    if pad_token_id is None:
        if batch > 1:
            raise ValueError(
                "The model has no padding token, so a batch of sequences has no defined last token; set "
                "model.config.pad_token_id = tokenizer.pad_token_id."
            )
        return ids.new_full((batch,), length - 1)
    return (torch.arange(length, device=ids.device, dtype=torch.int32) * (ids != pad_token_id)).argmax(-1)
