"""A model predicts by a readout, alone or as a committee: what training, prediction and loaded checkpoints share."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..model.head import CHUNK_ELEMENTS, RowSelector, same_length
from ..probes import ExpertProbe, expert_probe
from ..probes.routing import upcast
from .committee import Shared, member_models
from .mixture import Mixed, Mixture, Readout, alone, joined


@dataclass(frozen=True)
class Member:
    """One model of a committee, or the only one, and what watches it."""

    model: nn.Module
    probe: ExpertProbe | None
    mixture: Mixture | None
    selector: RowSelector | None

    def selecting(self, tokens: Tensor | None) -> AbstractContextManager[None]:
        """Within the block a language model computes logits at `tokens` only, where the readout has a use for them."""
        if self.selector is None:
            return nullcontext()
        # A mixture has no use for the model's own logits, but the model's forward cannot do without any.
        return self.selector.selecting(tokens if self.mixture is None or tokens is None else tokens[:1])

    def log_probs(self, output: Any, tokens: Tensor, part: slice) -> Tensor:
        """Of a language model's prediction at a slice of the tokens that were selected: `[c, V]`."""
        if self.mixture is not None:
            return self.mixture.log_probs(tokens[part])
        return upcast(self.selector.at(logits_of(output), part)).log_softmax(-1)


class AttachedReadout:
    """Makes a model predict by a readout. A context manager: it leaves no hook.

    Each forward of the model within it also runs the further members of its committee, if it has any. A classifier
    then gives the log-probabilities of the whole as its `logits`; a language model is asked at chosen tokens:

    ```python
    with AttachedReadout(model, Readout("soft_mixture"), rows=True) as attached, attached.at(tokens):
        output = model(**batch)
        log_probs = attached.together(output, lambda part, log_probs: log_probs)
    ```

    Args:
        model (`nn.Module`): a sequence classifier, or a causal language model.
        readout ([`~hf_moecal.readouts.mixture.Readout`], *optional*): what each member predicts by; native if unset.
        probed (`bool`, *optional*, defaults to `False`): whether the experts are asked with the native readout too.
        layer (`int`, *optional*, defaults to -1): which MoE layer is probed.
        rows (`bool`, *optional*, defaults to `False`): whether it is a language model, asked at chosen tokens.
    """

    def __init__(
        self,
        model: nn.Module,
        readout: Readout | None = None,
        *,
        probed: bool = False,
        layer: int = -1,
        rows: bool = False,
    ):
        others = member_models(model)
        self._model, self.readout = model, replace(readout or Readout(), members=1 + len(others))
        self._probed, self._layer, self._rows = probed or self.readout.is_mixture, layer, rows
        config = getattr(model, "config", None)  # a module of the user's own has none, and predicts natively
        self._pad = None if config is None else config.get_text_config().pad_token_id
        self._tokens: Tensor | None = None
        self._outputs: list[Any] = []
        self._quiet = False
        self.members = [self._member(number, each) for number, each in enumerate([model, *others])]
        self._shared = Shared(model, others) if others else None
        self.parts: list[Mixed] = []
        """Of each member of a classifier, in the last forward."""

    def _member(self, number: int, model: nn.Module) -> Member:
        probe = expert_probe(model, layer=self._layer) if self._probed else None
        mixture = Mixture(probe, self.readout, member=number) if self.readout.is_mixture else None
        return Member(model, probe, mixture, RowSelector(model, quiet=self.quiet) if self._rows else None)

    def __enter__(self) -> AttachedReadout:
        self._thread = threading.get_ident()
        with ExitStack() as stack:
            stack.enter_context(same_length(self._model, unless=lambda: self.is_quiet))
            for member in self.members:
                stack.enter_context(nullcontext() if member.probe is None else member.probe.watching())
                stack.enter_context(member.selector or nullcontext())
            stack.enter_context(self._shared or nullcontext())
            if self._shared is not None or (self.readout.is_mixture and not self._rows):
                stack.callback(self._model.register_forward_hook(self._see, with_kwargs=True).remove)
            self._exit = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._exit.close()

    def forget(self) -> None:
        """Lets go of what the last forward left behind."""
        self._outputs, self.parts = [], []
        for member in self.members:
            if member.probe is not None:
                member.probe.forget()

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Forwards inside this context are nobody's: they run no further member and leave no record."""
        before, self._quiet = self._quiet, True
        try:
            with ExitStack() as stack:
                for member in self.members:
                    if member.probe is not None:
                        stack.enter_context(member.probe.paused())
                yield
        finally:
            self._quiet = before

    @property
    def is_quiet(self) -> bool:
        """Whether a forward now is nobody's, such as a replay."""
        return self._quiet or any(member.probe is not None and member.probe.is_paused for member in self.members)

    @property
    def mixed(self) -> Mixed:
        """What a classifier's last prediction is made of, over all members."""
        return joined(self.parts)

    @contextmanager
    def at(self, tokens: Tensor | None) -> Iterator[None]:
        """Within the block a language model is read at `tokens` (flat indices into B*S)."""
        before, self._tokens = self._tokens, tokens
        try:
            with ExitStack() as stack:
                for member in self.members:
                    stack.enter_context(member.selecting(tokens))
                yield
        finally:
            self._tokens = before

    def outputs(self, output: Any) -> list[Any]:
        """Every member's output of the forward that gave `output`."""
        return [output, *self._outputs]

    def together(self, output: Any, reduce: Callable[[slice, Tensor], Tensor]) -> Tensor:
        """`reduce(part, log_probs [c, V])` of the whole committee over chunks of a language model's tokens, joined."""
        tokens, outputs = self._tokens, self.outputs(output)
        width = self._model.config.get_text_config().vocab_size
        size = -(-CHUNK_ELEMENTS // width)
        found = []
        for start in range(0, len(tokens), size):
            part = slice(start, start + size)
            pairs = zip(self.members, outputs, strict=True)
            parts = [alone(member.log_probs(given, tokens, part)) for member, given in pairs]
            found.append(reduce(part, joined(parts).log_probs))
        return torch.cat(found)

    def _see(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        others = threading.get_ident() != self._thread  # a forward of another thread is not of this context
        return output if others or self.is_quiet else self.read(args, kwargs, output)

    def read(self, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """The output of the model's forward with these arguments, read: a classifier's holds the log-probabilities."""
        self._outputs = [] if self._shared is None else self._shared.run(args, kwargs)
        if self._rows:
            if self._model.training:  # what DDP does not find in the output it takes for unused
                output["members"] = [logits_of(given) for given in self._outputs]
            return output
        self.parts = [self._pooled(*pair) for pair in zip(self.members, self.outputs(output), strict=True)]
        output["logits"] = self.mixed.log_probs
        return output

    def _pooled(self, member: Member, output: Any) -> Mixed:
        if member.mixture is not None:
            return member.mixture.pooled(self._pad)
        return alone(upcast(output["logits"]).log_softmax(-1))


def logits_of(output: Any) -> Tensor:
    """The logits of a model's output, named or not."""
    return output["logits"] if isinstance(output, dict) else output[0]
