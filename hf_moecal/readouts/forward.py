"""The forward of a model that predicts by a readout for good: nothing of a call stays on the model."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..table import IGNORED_LABEL
from .attached import AttachedReadout
from .committee import ATTACHED
from .mixture import Readout


class ReadoutForward:
    """Stands in place of a model's `forward`: the same call, in evaluation mode answered by a readout.

    The hooks of the readout are on the model during a call only, and one call at a time has the model: further threads
    wait. A copy of the model, also by pickle, is a model of its own. Compiled code runs it uncompiled.

    Args:
        model (`nn.Module`): a sequence classifier or a causal language model, with its committee.
        readout ([`~hf_moecal.readouts.mixture.Readout`]): what it predicts by.
    """

    def __init__(self, model: nn.Module, readout: Readout) -> None:
        self._set_up(model, readout, vars(model).get("forward"))
        self.readout = self._reader.readout  # also of how many members

    def _set_up(self, model: nn.Module, readout: Readout, replaced: Callable[..., Any] | None) -> None:
        self._model, self.readout, self._replaced = model, readout, replaced
        functools.update_wrapper(self, self._plain)
        self._lock, self._thread = threading.Lock(), None
        self._call = torch.compiler.disable(self._answer)

    def __getstate__(self) -> tuple[Any, ...]:
        return self._model, self.readout, self._replaced

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self._set_up(*state)

    @property
    def _plain(self) -> Callable[..., Any]:
        return self._replaced or MethodType(type(self._model).forward, self._model)

    @functools.cached_property
    def _reader(self) -> AttachedReadout:
        return AttachedReadout(self._model, self.readout, rows=self._is_language_model)

    @property
    def _is_language_model(self) -> bool:
        return self._model.get_output_embeddings() is not None

    @property
    def _is_mine(self) -> bool:
        """Whether the model is this thread's: the call is one of the readout's own."""
        return self._thread == threading.get_ident()

    @property
    def is_quiet(self) -> bool:
        """Whether this thread is in a replay of the readout's own."""
        return self._reader.is_quiet and self._is_mine

    def detach(self) -> None:
        """Gives the model its own forward back."""
        delattr(self._model, ATTACHED)
        if self._replaced is None:
            del self._model.forward
        else:
            self._model.forward = self._replaced

    @contextmanager
    def held(self) -> Iterator[AttachedReadout]:
        """This thread has the model to itself, and reads forwards by what this gives; others wait."""
        with self._lock:
            self._thread = threading.get_ident()
            try:
                with self._reader as reader:
                    yield reader
            finally:
                self._thread = None
                self._reader.forget()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._plain(*args, **kwargs) if self._model.training else self._call(args, kwargs)

    def _answer(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        if self._is_mine:
            return self._plain(*args, **kwargs)
        named = kwargs.pop("return_dict", None)
        named = getattr(self._model.config, "return_dict", True) if named is None else named
        with self.held() as reader:
            answer = self._read_language if self._is_language_model else self._read_classes
            output = answer(reader, args, {**kwargs, "return_dict": True})
        return output if named else output.to_tuple()

    def _read_classes(self, reader: AttachedReadout, args: tuple, kwargs: dict[str, Any]) -> Any:
        output = reader.read(args, kwargs, self._plain(*args, **kwargs))
        labels = kwargs.get("labels")
        if labels is not None:
            output["loss"] = F.nll_loss(output["logits"], labels.view(-1), ignore_index=IGNORED_LABEL)
        return output

    def _read_language(self, reader: AttachedReadout, args: tuple, kwargs: dict[str, Any]) -> Any:
        labels, kept = kwargs.pop("labels", None), kwargs.pop("logits_to_keep", 0)
        tokens = _asked(args, kwargs, kept)
        if labels is not None and tokens.shape != labels.shape:
            raise ValueError("A loss needs every position; leave `logits_to_keep` or `labels` unset.")
        with reader.at(tokens.reshape(-1)):
            output = reader.read(args, kwargs, self._plain(*args, **kwargs))
            found = reader.together(output, lambda part, log_probs: log_probs)
        output["logits"] = found.unflatten(0, tuple(tokens.shape))
        if labels is not None:
            output["loss"] = F.nll_loss(output["logits"][:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return output


def _asked(args: tuple, kwargs: dict[str, Any], kept: int | Tensor) -> Tensor:
    """Flat indices `[B, n]` of the positions that a language model is asked for."""
    given = args[0] if args else kwargs.get("input_ids")
    given = kwargs.get("inputs_embeds") if given is None else given
    batch, length = given.shape[:2]
    everywhere = torch.arange(batch * length, device=given.device).view(batch, length)
    return everywhere[:, kept] if isinstance(kept, Tensor) else everywhere[:, -kept:]
