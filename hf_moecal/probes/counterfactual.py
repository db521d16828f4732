"""Answers about the last forward that a recorder saw: certified, a chunk of tokens at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .capture import Capture, Recorder
from .certify import Certificate, certify, columns_of, counterfactual_logits, observe_random, real_tokens
from .experts import ExpertCall, consult
from .replay import Reroute, replaying
from .router import RouterLink, find_link, full_shares
from .routing import MoELayer, RoutingRecord
from .sharding import is_sharded, most
from .tail import tail


_CHUNK_ELEMENTS = 2**24  # logits, or hidden states of whole sequences, of one chunk of tokens

_MANY = 256  # tokens that tell what a router's scores are made into


class Counterfactuals:
    """The model's and its experts' predictions at flat token positions of the recorder's last forward."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.parts = recorder.parts
        self._columns: dict[str, int] = {}
        self._links: dict[str, RouterLink] = {}
        self._certificates: dict[tuple, Certificate] = {}

    @property
    def capture(self) -> Capture:
        """The last forward."""
        return self.recorder.seen()

    @property
    def in_step(self) -> bool:
        """Whether every process has to make the same replays."""
        return is_sharded(self.parts)

    def call(self, layer: MoELayer) -> ExpertCall:
        """The layer's call in the last forward."""
        return self.capture.call(layer.name)

    def certificate(self, layer: MoELayer) -> Certificate:
        """Computed once for each mode of the model, on the last forward's inputs."""
        mode = (layer.name, self.parts.outer.training, *map(str, self.capture.autocast.values()))
        if mode not in self._certificates:
            columns = self._columns_of(layer)
            with self.recorder.paused():
                certificate = self._certificates[mode] = certify(self.parts, layer, self.capture, columns)
            if certificate.path == "delta":
                self.recorder.replayed.discard(layer.name)
            else:
                self.recorder.replayed.add(layer.name)
        link = self._links.get(layer.name)
        return replace(self._certificates[mode], link=None if link is None else link.link)

    def link(self, layer: MoELayer) -> RouterLink:
        """What the layer makes of its router's scores; found once, on many tokens."""
        if layer.name not in self._links:
            capture = self._telling(layer)
            call, real = capture.call(layer.name), real_tokens(capture)
            record = RoutingRecord(call.index, call.weights, capture.batch_shape)[real]
            count = len(call.index)
            scores = {
                source: each.reshape(count, -1)[real]
                for source, each in capture.scores.get(layer.name, {}).items()
                if each.numel() == count * layer.num_experts
            }
            self._links[layer.name] = find_link(scores, record, layer.num_experts)
        return self._links[layer.name]

    def _telling(self, layer: MoELayer) -> Capture:
        """The last forward, or one of random tokens where it had few."""
        few = len(real_tokens(self.capture)) < _MANY
        if not few or self.in_step:  # else all processes would have to join in
            return self.capture
        try:
            with self._replay(self.capture):
                more = observe_random(self.parts, layer, _MANY)
        except Exception:  # a model that takes more than token ids
            return self.capture
        # Where a cache gives what comes before the layer, it gives no more than it has.
        return max(more, self.capture, key=lambda capture: len(real_tokens(capture)))

    def shares(self, layer: MoELayer) -> Tensor:
        """The router's distribution over all experts at every token of the last forward: `[T, E]`."""
        call, capture = self.call(layer), self.capture
        record = RoutingRecord(call.index, call.weights, capture.batch_shape)
        scores = capture.scores.get(layer.name, {})
        return full_shares(scores, self.link(layer), record, layer.num_experts, real_tokens(capture))

    def logits(self, flat: Tensor) -> Tensor:
        """The model's own logits `[n, V]`."""
        return self._logits(self.capture, flat)

    def outputs(self, layer: MoELayer, flat: Tensor, ids: Tensor) -> Tensor:
        """E_k of the experts `ids` `[n, m]`: `[n, m, H]`."""
        call, columns = self.call(layer), self._columns_of(layer)
        with self._replay(self.capture):
            return consult(self.parts, layer, call, flat, ids, columns=columns)

    def route(self, layer: MoELayer, flat: Tensor, ids: Tensor) -> Reroute:
        """What the experts put out when each of `ids` `[n, m]` has the token to itself."""
        return self._route(self.capture, layer, flat, ids, self._columns_of(layer))

    def reduced(
        self,
        layer: MoELayer,
        flat: Tensor,
        ids: Tensor,
        reduce: Callable[[slice, Callable[[], Tensor], Tensor], Tensor],
    ) -> Tensor:
        """`reduce(part, logits () -> [c, V], expert_logits [c, m, V])` chunk by chunk of the tokens, joined.

        With gradient and several chunks, each is computed again in the backward pass. The model's own logits are
        computed only if they are asked for. Where weights are sharded every process replays as many chunks.
        """
        certificate, columns, capture = self.certificate(layer), self._columns_of(layer), self.capture
        self.call(layer)
        if certificate.path != "delta" and layer.name not in capture.replayed:
            raise ValueError("The model changed its mode after the last forward; run the forward again.")
        size = max(1, _CHUNK_ELEMENTS // (ids.shape[1] * self._width(certificate)))
        parts = [slice(start, start + size) for start in range(0, len(flat), size)]

        def answer(part: slice) -> Tensor:  # of this forward, also when it runs again after the next one
            route = self._route(capture, layer, flat[part], ids[part], columns)
            with self._replay(capture):
                alone = counterfactual_logits(self.parts, capture, layer, route, certificate)
            return reduce(part, lambda: self._logits(capture, flat[part]), alone)

        if self.in_step:
            for _ in range(most(len(parts), flat.device) - len(parts)):
                answer(parts[-1])
        if len(parts) == 1 or not torch.is_grad_enabled():
            return torch.cat([answer(part) for part in parts])
        return torch.cat([checkpoint(answer, part, use_reentrant=False) for part in parts])

    def _width(self, certificate: Certificate) -> int:
        config, head = self.parts.outer.config, self.parts.outer.get_output_embeddings()
        width = config.num_labels if head is None else config.get_text_config().vocab_size
        sequence = self.capture.last_hidden.shape[-1] * self.capture.batch_shape[1]
        return max(width, sequence) if certificate.path == "prefix" else width

    def _route(self, capture: Capture, layer: MoELayer, flat: Tensor, ids: Tensor, columns: int) -> Reroute:
        with self._replay(capture):
            return Reroute.to(self.parts, layer, capture.call(layer.name), flat, ids, columns=columns)

    def _logits(self, capture: Capture, flat: Tensor) -> Tensor:
        hidden = capture.last_hidden.flatten(0, 1)[flat].unsqueeze(1)
        with self._replay(capture):
            return tail(self.parts, capture, hidden)

    @contextmanager
    def _replay(self, capture: Capture) -> Iterator[None]:
        with self.recorder.paused(), replaying(self.parts, capture.autocast):
            yield

    def _columns_of(self, layer: MoELayer) -> int:
        if layer.name not in self._columns:
            with self.recorder.paused():
                self._columns[layer.name] = columns_of(self.parts, layer, self.capture)
        return self._columns[layer.name]
