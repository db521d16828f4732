"""See through an MoE model: the routing of every token, and what each selected expert would have predicted alone.

```python
with probe_experts(model) as probe:
    model(**batch)
probe.disagreement(tokens)
```
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .agreement import among, disagreement, disagreement_and_regret, first_order_regret, losses, regret
from .capture import Recorder, model_parts
from .certify import Certificate
from .counterfactual import Counterfactuals
from .routing import (
    MoELayer,
    RoutingRecord,
    UnsupportedMoEError,
    choose_layers,
    find_moe_layers,
    pick_layer,
)
from .routing_load import RoutingStatistics, routing_statistics
from .strongest import hard_routing


Layer = int | str | None
Experts = Literal["selected", "all"] | int


class ExpertProbe:
    """Records each forward of a model and answers what its experts would have predicted. See [`probe_experts`].

    Every method takes `tokens`, flat indices `[n]` into the batch's B * S positions or a boolean mask `[B, S]`, and
    `layer`, the index or name of a probed layer, needed only where several are probed. All results carry gradients
    unless the forward or the call ran under `torch.no_grad()`. Logits exist for a chunk of tokens at a time; with
    gradient, each of several chunks is computed again in the backward pass.
    """

    def __init__(self, recorder: Recorder) -> None:
        self.layers = recorder.layers
        self._answers = Counterfactuals(recorder)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Forwards inside this context are recorded; it can be entered again.

        Raises:
            ValueError: a layer is being probed already; the model is compiled already.
        """
        recorder = self._answers.recorder
        _refuse_compiled(recorder.parts.model)
        for chosen in self.layers:
            if any(
                getattr(hook, "__module__", None) == Recorder.__module__
                for hook in chosen.module._forward_hooks.values()
            ):
                raise ValueError(f"{chosen.name} is being probed already; leave that probe first, or use it.")
        with recorder.attached():
            yield

    def forget(self) -> None:
        """Lets go of what the last forward left behind."""
        self._answers.recorder.capture = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Forwards inside this context leave no record; the last one stays."""
        with self._answers.recorder.paused():
            yield

    @property
    def is_paused(self) -> bool:
        """Whether forwards leave no record now, as in a replay of the probe's own."""
        return self._answers.recorder.muted

    @property
    def inputs(self) -> dict[str, Any]:
        """Arguments of the base model in the last forward."""
        return self._answers.capture.inputs

    def keep_step(self) -> None:
        """Replays for no token of one's own: where weights are sharded, other processes wait for it."""
        if self._answers.in_step:
            self.disagreement(torch.zeros(1, dtype=torch.long))

    # Routing

    @property
    def record(self) -> RoutingRecord:
        """The routing of the last forward ([`RoutingRecord`]) of the one probed layer."""
        return self.record_of(None)

    def record_of(self, layer: Layer) -> RoutingRecord:
        """The routing of the last forward at one of several probed layers."""
        call = self._answers.call(self._layer(layer))
        return RoutingRecord(call.index, call.weights, self._answers.capture.batch_shape)

    def entropy(self, tokens: Tensor, *, layer: Layer = None) -> Tensor:
        """Entropy of the routing shares in nats: `[n]`."""
        return self.record_of(layer)[self._flat(tokens)].entropy

    def margin(self, tokens: Tensor, *, layer: Layer = None) -> Tensor:
        """Largest routing share minus the second largest: `[n]`."""
        return self.record_of(layer)[self._flat(tokens)].margin

    def router_shares(self, tokens: Tensor, *, layer: Layer = None) -> Tensor:
        """The router's distribution over all experts, also those that it did not select: `[n, E]`.

        What the layer makes of its router's scores is found once, by the weights of many tokens (of a forward of
        random ones, where the last forward had few), and then stands on the certificate.

        Raises:
            UnsupportedMoEError: no scores of the layer explain the weights that the model used.
        """
        return self._answers.shares(self._layer(layer))[self._flat(tokens)]

    # Predictions

    @property
    def certificate(self) -> Certificate:
        """The path that the counterfactual logits take and its error against brute force ([`Certificate`])."""
        return self.certificate_of(None)

    def certificate_of(self, layer: Layer) -> Certificate:
        """The certificate of one of several probed layers; computed once for each mode of the model."""
        return self._answers.certificate(self._layer(layer))

    def expert_outputs(self, tokens: Tensor, *, experts: Experts = "selected", layer: Layer = None) -> Tensor:
        """E_k, what each expert alone puts out with weight one: `[n, k, H]`; `experts` as in `expert_logits`."""
        flat = self._flat(tokens)
        return self._answers.outputs(self._layer(layer), flat, self._ids(flat, experts, layer))

    def logits(self, tokens: Tensor) -> Tensor:
        """What the model itself predicted at the tokens, through its own head: `[n, V]` or `[n, num_labels]`."""
        return self._answers.logits(self._flat(tokens))

    def expert_logits(self, tokens: Tensor, *, experts: Experts = "selected", layer: Layer = None) -> Tensor:
        """What the model would have predicted with each expert alone: `[n, k, V]` or `[n, k, num_labels]`.

        The token's whole routing mass goes to the one expert; everything else, also all other tokens, stays.

        Args:
            tokens (`Tensor`): flat indices `[n]` or a boolean mask `[B, S]`.
            experts (`str` or `int`): "selected", the k of the router, in its order; "all" of the layer, in theirs; or
                the number of those to which the router gives most, selected or not.
            layer (`int` or `str`, *optional*): which of several probed layers.
        """
        return self.reduced(tokens, lambda part, alone: alone, experts=experts, layer=layer)

    def reduced(
        self,
        tokens: Tensor,
        reduce: Callable[[slice, Tensor], Tensor],
        *,
        experts: Experts | Tensor = "selected",
        layer: Layer = None,
    ) -> Tensor:
        """`reduce(part, expert_logits [c, k, V])` over chunks of the tokens, joined, for logits too many to hold.

        Args:
            tokens (`Tensor`): flat indices `[n]` or a boolean mask `[B, S]`.
            reduce (`Callable`): maps a slice of the tokens and their experts' logits to one row for each token.
            experts (`str`, `int` or `LongTensor` of shape `[n, k]`): as in `expert_logits`, or each token's own.
            layer (`int` or `str`, *optional*): which of several probed layers.
        """
        flat = self._flat(tokens)
        ids = experts if isinstance(experts, Tensor) else self._ids(flat, experts, layer)
        return self._answers.reduced(self._layer(layer), flat, ids, lambda part, own, alone: reduce(part, alone))

    def disagreement(self, tokens: Tensor, *, layer: Layer = None) -> Tensor:
        """sum_k r_k ||p^(k) - p||^2 over the class probabilities (arXiv:2606.20544): `[n]`, between 0 and 2."""
        flat = self._flat(tokens)
        record = self.record_of(layer)[flat]

        def reduce(part: slice, own: Callable[[], Tensor], alone: Tensor) -> Tensor:
            return disagreement(own(), alone, record.shares[part])

        return self._answers.reduced(self._layer(layer), flat, record.expert_ids, reduce)

    def regret(self, tokens: Tensor, labels: Tensor, *, layer: Layer = None) -> Tensor:
        """relu(l - min_k l^(k)) in nats, how much the best selected expert alone would have saved: `[n]`.

        Args:
            tokens (`Tensor`): flat indices `[n]` or a boolean mask `[B, S]`.
            labels (`LongTensor` of shape `[n]`): the class that the prediction *at* each token is about; for a causal
                model the id of the next token.
            layer (`int` or `str`, *optional*): which of several probed layers.

        Raises:
            ValueError: a label is no class of the model, or there is not one per token.
        """
        return self.disagreement_and_regret(tokens, labels, layer=layer)[1]

    def disagreement_and_regret(
        self, tokens: Tensor, labels: Tensor, *, candidates: Tensor | None = None, layer: Layer = None
    ) -> tuple[Tensor, Tensor]:
        """Both for the price of one: `[n]` and `[n]`.

        Args:
            tokens, labels, layer: as in `regret`.
            candidates (`LongTensor` of shape `[n, C]`, *optional*): the classes among which the token predicts, with
                -100 for none; labels are then positions among them.
        """
        flat = self._flat(tokens)
        labels, record = self._labels(flat, labels), self.record_of(layer)[flat]

        def reduce(part: slice, own: Callable[[], Tensor], alone: Tensor) -> Tensor:
            both = own(), alone
            if candidates is not None:
                both = [among(logits, candidates[part]) for logits in both]
            return torch.stack(disagreement_and_regret(*both, record.shares[part], labels[part]), -1)

        disagreements, regrets = self._answers.reduced(self._layer(layer), flat, record.expert_ids, reduce).unbind(-1)
        return disagreements, regrets

    def first_order_regret(self, tokens: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """An estimate of the regret at every probed layer from one backward pass: `[n]` by name of the layer.

        relu(max_k -g . (S E_k - y)), with g the gradient of the summed losses of `tokens` with respect to the experts'
        output, so no forward per layer and expert. At the last layer of a model with norms before its blocks it ranks
        tokens nearly as the exact regret does; the further below, or with norms after the blocks, the less
        (`recipes/probing.md` has the rank correlations). With several tokens of one sequence, g also holds what the
        earlier ones do to the losses of the later ones.

        Raises:
            ValueError: the forward recorded no gradients.
        """
        flat, capture = self._flat(tokens), self._answers.capture
        labels = self._labels(flat, labels)
        outputs = [capture.call(layer.name).output for layer in self.layers]
        if not all(output.requires_grad for output in outputs):
            raise ValueError(
                "first_order_regret needs the gradient of the loss: run the forward without torch.no_grad(), with at "
                "least one parameter up to the probed layers that requires a gradient."
            )
        with torch.enable_grad():
            total = losses(self._answers.logits(flat), labels).sum()
        gradients = torch.autograd.grad(total, outputs, retain_graph=True)
        with torch.no_grad():
            return {
                layer.name: self._first_order(layer, flat, gradient)
                for layer, gradient in zip(self.layers, gradients, strict=True)
            }

    def _first_order(self, layer: MoELayer, flat: Tensor, gradient: Tensor) -> Tensor:
        route = self._answers.route(layer, flat, self._answers.call(layer).index[flat])
        return first_order_regret(gradient.reshape(-1, gradient.shape[-1])[flat], route.alone - route.together)

    # What was asked

    def _ids(self, flat: Tensor, experts: Experts, layer: Layer) -> Tensor:
        count = self._layer(layer).num_experts
        if experts == "selected":
            return self._answers.call(self._layer(layer)).index[flat]
        if experts == "all":
            return torch.arange(count, device=flat.device).expand(len(flat), -1)
        if isinstance(experts, int) and 1 <= experts <= count:
            return self.router_shares(flat, layer=layer).topk(experts, dim=-1).indices
        raise ValueError(f'experts is "selected", "all" or a number from 1 to {count}; got {experts!r}.')

    def _labels(self, flat: Tensor, labels: Tensor) -> Tensor:
        if labels.shape != flat.shape:
            raise ValueError(f"regret needs one label per token, got {tuple(labels.shape)} for {flat.numel()} tokens.")
        return labels.to(flat.device)

    def _layer(self, layer: Layer) -> MoELayer:
        if layer is None:
            if len(self.layers) == 1:
                return self.layers[0]
            raise ValueError(f"Several layers are probed; say layer= one of {[item.name for item in self.layers]}.")
        if isinstance(layer, int) and -len(self.layers) <= layer < 0:
            return self.layers[layer]
        return pick_layer(self.layers, layer, [item.index for item in self.layers])

    def _flat(self, tokens: Tensor) -> Tensor:
        batch, length = self._answers.capture.batch_shape
        if tokens.dtype == torch.bool:
            if tuple(tokens.shape) != (batch, length):
                raise ValueError(
                    f"A token mask has the shape of the batch, {(batch, length)}; got {tuple(tokens.shape)}."
                )
            tokens = tokens.reshape(-1).nonzero().squeeze(-1)
        if tokens.dim() != 1 or tokens.is_floating_point():
            raise ValueError(
                "tokens are flat indices [n] or a boolean mask [B, S]; "
                f"got {tokens.dtype} of shape {tuple(tokens.shape)}."
            )
        if tokens.numel() == 0:
            raise ValueError("No token to probe: `tokens` is empty.")
        if not 0 <= int(tokens.min()) <= int(tokens.max()) < batch * length:
            raise ValueError(
                f"tokens lie in 0 to {batch * length - 1} (batch {batch} x length {length}); "
                f"got {int(tokens.min())} to {int(tokens.max())}."
            )
        return tokens.to(self._answers.capture.last_hidden.device)


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
    probe = expert_probe(model, layer)
    with probe.watching():
        yield probe


def expert_probe(model: nn.Module, layer: int | str | Sequence[int | str] = -1) -> ExpertProbe:
    """A probe that watches nothing yet; see [`probe_experts`] for the arguments and [`ExpertProbe.watching`]."""
    layers = choose_layers(find_moe_layers(model), layer)
    return ExpertProbe(Recorder(model_parts(model, layers), layers, replayed={chosen.name for chosen in layers}))


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
    "RoutingStatistics",
    "UnsupportedMoEError",
    "disagreement",
    "find_moe_layers",
    "hard_routing",
    "probe_experts",
    "regret",
    "routing_statistics",
]
