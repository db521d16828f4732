"""See through an MoE model: the routing of every token, and what each selected expert would have predicted alone.

```python
with probe_experts(model) as probe:
    model(**batch)
probe.disagreement(tokens)
```
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .capture import Capture, ExpertCall, Recorder, anatomy
from .certify import Certificate, certify, columns_of, counterfactual_logits
from .replay import Reroute, consult, replaying, tail
from .routing import MoELayer, RoutingRecord, UnsupportedMoEError, find_moe_layers, hard_routing, upcast


_CHUNK_ELEMENTS = 2**24  # logits of one chunk of tokens and experts


class ExpertProbe:
    """Records each forward of a model and answers what its experts would have predicted. See [`probe_experts`].

    Every method takes `tokens`, flat indices `[n]` into the batch's B * S positions or a boolean mask `[B, S]`, and
    `layer`, the index or name of a probed layer, needed only where several are probed. All results carry gradients
    unless the forward or the call ran under `torch.no_grad()`.
    """

    def __init__(self, recorder: Recorder) -> None:
        self.layers = recorder.layers
        self._parts = recorder.parts
        self._recorder = recorder
        self._columns: dict[str, int] = {}
        self._certificates: dict[tuple, Certificate] = {}

    # What the user asks

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Forwards inside this context leave no record; the last one stays."""
        with self._recorder.paused():
            yield

    @property
    def record(self) -> RoutingRecord:
        """The routing of the last forward ([`RoutingRecord`]) of the one probed layer."""
        return self.record_of(None)

    def record_of(self, layer: int | str | None) -> RoutingRecord:
        """The routing of the last forward at one of several probed layers."""
        capture, call = self._last(), self._call(layer)
        return RoutingRecord(call.index, call.weights, capture.batch_shape)

    @property
    def certificate(self) -> Certificate:
        """The path that the counterfactual logits take and its error against brute force ([`Certificate`])."""
        return self.certificate_of(None)

    def certificate_of(self, layer: int | str | None) -> Certificate:
        """The certificate of one of several probed layers; computed once for each mode of the model."""
        chosen, capture = self._layer(layer), self._last()
        mode = (chosen.name, self._parts.outer.training, *map(str, capture.autocast.values()))
        if mode not in self._certificates:
            with self.paused():
                certificate = certify(self._parts, chosen, capture, self._columns_of(chosen))
            self._certificates[mode] = certificate
            (self._recorder.replayed.discard if certificate.path == "delta" else self._recorder.replayed.add)(
                chosen.name
            )
        return self._certificates[mode]

    def expert_outputs(self, tokens: Tensor, *, layer: int | str | None = None) -> Tensor:
        """E_k, what each selected expert alone puts out with weight one: `[n, k, H]`."""
        return self._outputs(self._layer(layer), self._flat(tokens))

    def logits(self, tokens: Tensor) -> Tensor:
        """What the model itself predicted at the tokens, through its own head: `[n, V]` or `[n, num_labels]`."""
        tokens = self._flat(tokens)
        with self._replay():
            return self._logits(tokens)

    def expert_logits(self, tokens: Tensor, *, layer: int | str | None = None) -> Tensor:
        """What the model would have predicted with each selected expert alone: `[n, k, V]` or `[n, k, num_labels]`.

        The token's whole routing mass goes to the one expert; everything else, also all other tokens, stays.
        """
        flat = self._flat(tokens)
        return torch.cat([expert_logits for _, _, expert_logits in self._predictions(flat, layer)])

    def entropy(self, tokens: Tensor, *, layer: int | str | None = None) -> Tensor:
        """Entropy of the routing shares in nats: `[n]`."""
        return self.record_of(layer)[self._flat(tokens)].entropy

    def margin(self, tokens: Tensor, *, layer: int | str | None = None) -> Tensor:
        """Largest routing share minus the second largest: `[n]`."""
        return self.record_of(layer)[self._flat(tokens)].margin

    def disagreement(self, tokens: Tensor, *, layer: int | str | None = None) -> Tensor:
        """sum_k r_k ||p^(k) - p||^2 over the class probabilities (arXiv:2606.20544): `[n]`, between 0 and 2."""
        flat = self._flat(tokens)
        shares = self.record_of(layer)[flat].shares
        return torch.cat(
            [
                disagreement(logits, expert_logits, shares[part])
                for part, logits, expert_logits in self._predictions(flat, layer)
            ]
        )

    def regret(self, tokens: Tensor, labels: Tensor, *, layer: int | str | None = None) -> Tensor:
        """relu(l - min_k l^(k)) in nats, how much the best selected expert alone would have saved: `[n]`.

        Args:
            tokens (`Tensor`): flat indices `[n]` or a boolean mask `[B, S]`.
            labels (`LongTensor` of shape `[n]`): the class that the prediction *at* each token is about; for a causal
                model the id of the next token.
            layer (`int` or `str`, *optional*): which of several probed layers.

        Raises:
            ValueError: a label is no class of the model, or there is not one per token.
        """
        flat = self._flat(tokens)
        if labels.shape != flat.shape:
            raise ValueError(f"regret needs one label per token, got {tuple(labels.shape)} for {flat.numel()} tokens.")
        labels = labels.to(flat.device)
        return torch.cat(
            [
                regret(logits, expert_logits, labels[part])
                for part, logits, expert_logits in self._predictions(flat, layer)
            ]
        )

    # How it is answered

    def _predictions(self, flat: Tensor, layer: int | str | None) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Chunk by chunk of the tokens: their slice, the model's logits `[c, V]` and the experts' `[c, k, V]`."""
        chosen, call, certificate = self._layer(layer), self._call(layer), self.certificate_of(layer)
        columns = self._columns_of(chosen)
        if certificate.path != "delta" and chosen.name not in self._last().replayed:
            raise ValueError("The model changed its mode after the last forward; run the forward again.")
        k, width, start = call.index.shape[-1], None, 0
        if flat.numel() == 0:
            raise ValueError("No token to probe: `tokens` is empty.")
        while start < flat.numel():
            rows = 1 if width is None else max(1, _CHUNK_ELEMENTS // (k * width))
            part = slice(start, min(start + rows, flat.numel()))
            with self._replay():
                logits = self._logits(flat[part])
                route = Reroute.to(chosen.module, call, flat[part], call.index[flat[part]], columns=columns)
                expert_logits = counterfactual_logits(self._parts, self._last(), chosen, route, certificate)
            yield part, logits, expert_logits
            start, width = part.stop, logits.shape[-1]

    def _outputs(self, layer: MoELayer, flat: Tensor) -> Tensor:
        call, columns = self._call(layer.name), self._columns_of(layer)
        with self._replay():
            return consult(layer.module, call, flat, call.index[flat], columns=columns)

    def _columns_of(self, layer: MoELayer) -> int:
        if layer.name not in self._columns:
            with self.paused():
                self._columns[layer.name] = columns_of(self._parts, layer, self._last())
        return self._columns[layer.name]

    def _logits(self, flat: Tensor) -> Tensor:
        hidden = self._last().last_hidden.flatten(0, 1)[flat]
        return tail(self._parts, self._last(), hidden.unsqueeze(1))

    @contextmanager
    def _replay(self) -> Iterator[None]:
        with self.paused(), replaying(self._parts, self._last().autocast):
            yield

    def _layer(self, layer: int | str | None) -> MoELayer:
        if layer is None:
            if len(self.layers) == 1:
                return self.layers[0]
            raise ValueError(
                f"Several layers are probed; say layer= one of {[chosen.name for chosen in self.layers]}."
            )
        return _pick(self.layers, layer, [chosen.index for chosen in self.layers])

    def _last(self) -> Capture:
        if self._recorder.capture is None:
            raise ValueError(
                "The probe has seen no forward: run the model inside `with probe_experts(model)`. Where it was "
                "compiled, attach the probe before torch.compile, which ignores hooks that come later."
            )
        return self._recorder.capture

    def _call(self, layer: int | str | None) -> ExpertCall:
        chosen, capture = self._layer(layer), self._last()
        if chosen.name not in capture.calls:
            raise ValueError(
                f"{chosen.name} did not run in the last forward, or its hook was ignored; attach the probe before "
                "torch.compile."
            )
        return capture.calls[chosen.name]

    def _flat(self, tokens: Tensor) -> Tensor:
        batch, length = self._last().batch_shape
        device = self._last().last_hidden.device
        if tokens.dtype == torch.bool:
            if tuple(tokens.shape) != (batch, length):
                raise ValueError(
                    f"A token mask has the shape of the batch, {(batch, length)}; got {tuple(tokens.shape)}."
                )
            return tokens.reshape(-1).nonzero().squeeze(-1).to(device)
        if tokens.dim() != 1 or tokens.is_floating_point():
            raise ValueError(
                "tokens are flat indices [n] or a boolean mask [B, S]; "
                f"got {tokens.dtype} of shape {tuple(tokens.shape)}."
            )
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < batch * length:
            raise ValueError(
                f"tokens lie in 0 to {batch * length - 1} (batch {batch} x length {length}); "
                f"got {int(tokens.min())} to {int(tokens.max())}."
            )
        return tokens.to(device)


def disagreement(logits: Tensor, expert_logits: Tensor, shares: Tensor) -> Tensor:
    """sum_k r_k ||p^(k) - p||^2 from logits `[n, C]` and `[n, k, C]` and shares `[n, k]`: `[n]`."""
    _check_classes(logits)
    gap = upcast(expert_logits).softmax(-1) - upcast(logits).softmax(-1).unsqueeze(1)
    return (shares * gap.square().sum(-1)).sum(-1)


def regret(logits: Tensor, expert_logits: Tensor, labels: Tensor) -> Tensor:
    """relu(l - min_k l^(k)) from logits `[n, C]` and `[n, k, C]` and labels `[n]`: `[n]`, in nats."""
    _check_classes(logits)
    if not 0 <= int(labels.min()) <= int(labels.max()) < logits.shape[-1]:
        raise ValueError(
            f"Labels are classes 0 to {logits.shape[-1] - 1}, got {int(labels.min())} to {int(labels.max())}; "
            "leave out the tokens that have no label."
        )
    losses = -upcast(logits).log_softmax(-1).gather(-1, labels[:, None])
    chosen = labels[:, None, None].expand(-1, expert_logits.shape[1], 1)
    expert_losses = -upcast(expert_logits).log_softmax(-1).gather(-1, chosen).squeeze(-1)
    return (losses.squeeze(-1) - expert_losses.amin(-1)).relu()


def _check_classes(logits: Tensor) -> None:
    if logits.shape[-1] < 2:
        raise ValueError(
            "The probe compares class probabilities, and a model with one output has none; set num_labels >= 2."
        )


def _pick(layers: Sequence[MoELayer], wanted: int | str, indices: Sequence[int]) -> MoELayer:
    for layer in layers:
        if wanted == layer.name or (isinstance(wanted, int) and wanted == layer.index):
            return layer
    raise ValueError(
        f"No MoE layer {wanted!r}: give an index among {list(indices)} or one of {[layer.name for layer in layers]}."
    )


def _choose(found: list[MoELayer], layer: int | str | Sequence[int | str]) -> list[MoELayer]:
    if layer == "all":
        return found
    wanted = [layer] if isinstance(layer, (int, str)) else list(layer)
    wanted = [item + len(found) if isinstance(item, int) and item < 0 else item for item in wanted]
    chosen = {_pick(found, item, range(-len(found), len(found))).name for item in wanted}
    if not chosen:
        raise ValueError("No layer to probe: give an index, a name, a list of them, or 'all'.")
    return [item for item in found if item.name in chosen]


@contextmanager
def probe_experts(model: nn.Module, layer: int | str | Sequence[int | str] = -1) -> Iterator[ExpertProbe]:
    """Watches the forwards of a model and answers what each selected expert alone would have predicted.

    Outputs, gradients and signature of the model are unchanged. Every forward inside the context replaces the record
    of the one before; a forward inside `probe.paused()` leaves it. The answers stay available after the context.

    Args:
        model (`nn.Module`): a transformers model with a language-modelling or classification head, also under PEFT or
            inside DistributedDataParallel.
        layer (`int`, `str`, list or `"all"`): MoE layers to watch, by index among the MoE layers or by name.

    Raises:
        UnsupportedMoEError: the model's experts cannot be consulted.
        ValueError: no such layer; the layer is being probed already; the model is compiled already.

    Example:

    ```python
    >>> import torch
    >>> from transformers import MixtralConfig, MixtralForCausalLM
    >>> from hf_moecal import probe_experts
    >>> config = MixtralConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    ...     num_attention_heads=2, num_key_value_heads=1, num_local_experts=4)
    >>> model = MixtralForCausalLM(config).eval()
    >>> with torch.no_grad(), probe_experts(model) as probe:
    ...     outputs = model(input_ids=torch.tensor([[1, 2, 3]]))
    ...     expert_logits = probe.expert_logits(torch.tensor([2]))
    >>> expert_logits.shape, probe.certificate.path
    (torch.Size([1, 2, 64]), 'delta')

    ```
    """
    layers = _choose(find_moe_layers(model), layer)
    _refuse_compiled(model)
    for chosen in layers:
        if any(
            getattr(hook, "__module__", None) == Recorder.__module__ for hook in chosen.module._forward_hooks.values()
        ):
            raise ValueError(f"{chosen.name} is being probed already; leave that probe first, or use it.")
    recorder = Recorder(anatomy(model, layers), layers, replayed={chosen.name for chosen in layers})
    with recorder.attached():
        yield ExpertProbe(recorder)


def _refuse_compiled(model: nn.Module) -> None:
    if any(hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) for m in model.modules()):
        raise ValueError(
            "The model is compiled, and compiled code ignores hooks that come later; attach the probe first, then "
            "call torch.compile inside the context."
        )


__all__ = [
    "Certificate",
    "ExpertProbe",
    "MoELayer",
    "RoutingRecord",
    "UnsupportedMoEError",
    "find_moe_layers",
    "hard_routing",
    "probe_experts",
]
