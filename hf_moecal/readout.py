"""Another prediction from the same model: the experts' *probabilities* are mixed, not their hidden states.

An MoE layer blends its experts' hidden states and the model predicts once, from the blend. Here each expert of the
last MoE layer makes a prediction of its own, through the model's own norm and head, and the predictions are mixed with
the router's shares: p = sum_k r_k p_k (arXiv:2606.20544). Of several models that share their first layers (a
committee), the mixtures are mixed once more, in equal shares.

| readout | experts | shares r_k |
|---|---|---|
| `"native"` | the model's own prediction | |
| `"mixture"` | those that the router selected | the weights that the model used, summing to one |
| `"soft_mixture"` | all, or the `experts` largest | the router's full distribution, over these summing to one |
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .probes import ExpertProbe
from .probes.agreement import disagreement_and_regret
from .probes.routing import upcast
from .tasks import pooled_positions


READOUTS = ("native", "mixture", "soft_mixture")


@dataclass(frozen=True)
class Readout:
    """How the last MoE layer's experts make a prediction.

    Args:
        kind (`str`, *optional*, defaults to `"native"`): `"native"`, `"mixture"` or `"soft_mixture"`.
        experts (`int`, *optional*): with `"soft_mixture"`, mix the experts with the largest shares only; all if unset.
        temperatures (`tuple[float]`, *optional*): one per expert of the layer; each expert's logits are divided by
            its own before they are mixed.

    Raises:
        ValueError: no such readout, or a setting that it does not have.
    """

    kind: str = "native"
    experts: int | None = None
    temperatures: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.kind not in READOUTS:
            raise ValueError(f"`readout` must be one of {', '.join(READOUTS)}, got {self.kind!r}.")
        if self.experts is not None and self.kind != "soft_mixture":
            raise ValueError(
                f"`readout_experts={self.experts}` has no effect on readout={self.kind!r}; set readout='soft_mixture' "
                "or leave it unset."
            )
        if self.experts is not None and not (isinstance(self.experts, int) and self.experts >= 1):
            raise ValueError(f"`readout_experts` must be a positive whole number, got {self.experts!r}.")
        if self.temperatures is not None and self.kind == "native":
            raise ValueError("Temperatures per expert need readout='mixture' or 'soft_mixture'.")
        if self.temperatures is not None and not all(0 < t < math.inf for t in self.temperatures):
            raise ValueError(f"Temperatures are finite and above 0, got {self.temperatures}.")

    @property
    def name(self) -> str | None:
        """What a predictions table says about it; nothing for the native one."""
        kind = None if self.kind == "native" else self.kind
        return kind if self.experts is None else f"{kind} of {self.experts}"

    @property
    def is_mixture(self) -> bool:
        return self.kind != "native"


class Mixed(NamedTuple):
    """A mixture and what it is made of, for `n` tokens.

    Attributes:
        log_probs (`Tensor` of shape `[n, C]`): of the mixture, at least float32.
        expert_log_probs (`Tensor` of shape `[n, m, C]`): of each expert alone.
        shares (`Tensor` of shape `[n, m]`): r_k, summing to one.
        expert_ids (`LongTensor` of shape `[n, m]`): which experts these are.
    """

    log_probs: Tensor
    expert_log_probs: Tensor
    shares: Tensor
    expert_ids: Tensor


def log_mixture(expert_log_probs: Tensor, shares: Tensor) -> Tensor:
    """log p = logsumexp_k (log r_k + log p_k), the experts' probabilities mixed in log space: `[n, C]`.

    Args:
        expert_log_probs (`Tensor` of shape `[n, m, C]`): each expert's own.
        shares (`Tensor` of shape `[n, m]`): r_k, summing to one over the experts.

    Example:

    ```python
    >>> import torch
    >>> from hf_moecal.readout import log_mixture
    >>> experts = torch.tensor([[[0.9, 0.1], [0.5, 0.5]]]).log()
    >>> log_mixture(experts, torch.tensor([[0.25, 0.75]])).exp()
    tensor([[0.6000, 0.4000]])

    ```
    """
    # Where a share, or all experts' probability of a class, is exactly zero, the gradient of logsumexp would be NaN.
    alone = expert_log_probs.clamp_min(torch.finfo(expert_log_probs.dtype).min / 2)
    log_shares = shares.clamp_min(torch.finfo(shares.dtype).tiny).log()
    return torch.logsumexp(log_shares.unsqueeze(-1) + alone, dim=1)


def mean_expert_loss(mixed: Mixed, labels: Tensor) -> Tensor:
    """sum_k r_k l^(k), the loss of an expert drawn by its share: `[n]`.

    The gradient is that of the experts alone: through the shares it would only make the router pick one of them.

    Args:
        mixed ([`Mixed`]): of `n` tokens.
        labels (`LongTensor` of shape `[n]`): the right classes.
    """
    own = labels[:, None, None].expand(-1, mixed.expert_log_probs.shape[1], 1)
    return -(mixed.shares.detach() * mixed.expert_log_probs.gather(-1, own).squeeze(-1)).sum(-1)


@torch.no_grad()
def mixed_agreement(mixed: Mixed, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Disagreement sum_k r_k ||p^(k) - p||^2 and regret relu(l - min_k l^(k)) of a mixture: `[n]` each.

    They run over all experts that are mixed. The regret is above zero wherever these differ, as a mixture is never
    better than the best of its parts.
    """
    return disagreement_and_regret(mixed.log_probs, mixed.expert_log_probs, mixed.shares, labels)


class Mixture:
    """Reads a mixture off the last forward that a probe saw, of its one probed layer.

    Args:
        probe ([`~hf_moecal.probes.ExpertProbe`]): watches the model.
        readout ([`Readout`]): `"mixture"` or `"soft_mixture"`.
    """

    def __init__(self, probe: ExpertProbe, readout: Readout) -> None:
        (layer,) = probe.layers
        self.probe, self._readout = probe, readout
        if readout.experts is not None and readout.experts > layer.num_experts:
            raise ValueError(f"readout_experts={readout.experts}, but {layer.name} has {layer.num_experts} experts.")
        given = readout.temperatures
        if given is not None and len(given) != layer.num_experts:
            raise ValueError(
                f"{layer.name} has {layer.num_experts} experts, but {len(given)} temperatures were given."
            )

    def shares(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The experts that are mixed, `[n, m]`, the largest share first, and their shares, `[n, m]`."""
        if self._readout.kind == "mixture":
            record = self.probe.record[tokens]
            return record.expert_ids, record.shares
        shares = self.probe.router_shares(tokens)
        count = self._readout.experts or shares.shape[-1]
        largest = shares.topk(count, dim=-1)
        kept = largest.values
        return largest.indices, kept if count == shares.shape[-1] else kept / kept.sum(-1, keepdim=True)

    def log_probs(self, tokens: Tensor) -> Tensor:
        """Log-probabilities at the tokens (flat indices): `[n, V]` or `[n, num_labels]`."""
        return self.reduced(tokens, lambda part, mixed: mixed.log_probs)

    def pooled(self, pad_token_id: int | None) -> Mixed:
        """The mixture at the token that a sequence classifier reads, for each sequence of the batch."""
        ids = self.probe.inputs.get("input_ids")
        if ids is None:
            raise ValueError("The mixture readout of a classifier finds its last tokens by `input_ids`; give those.")
        batch, length = ids.shape
        tokens = torch.arange(batch, device=ids.device) * length + pooled_positions(ids, pad_token_id)
        experts, shares = self.shares(tokens)
        return self._mix(self.probe.reduced(tokens, lambda part, logits: logits, experts=experts), shares, experts)

    def reduced(self, tokens: Tensor, reduce: Callable[[slice, Mixed], Tensor]) -> Tensor:
        """`reduce(part, mixed)` over chunks of the tokens, joined: `[n, ...]`.

        With gradient and several chunks, each is computed again in the backward pass.

        Args:
            tokens (`LongTensor` of shape `[n]`): flat indices.
            reduce (`Callable`): maps a slice of the tokens and their [`Mixed`] to one row for each.
        """
        experts, shares = self.shares(tokens)

        def mixed(part: slice, logits: Tensor) -> Tensor:
            return reduce(part, self._mix(logits, shares[part], experts[part]))

        return self.probe.reduced(tokens, mixed, experts=experts)

    def _mix(self, logits: Tensor, shares: Tensor, experts: Tensor) -> Mixed:
        logits = upcast(logits)
        if self._readout.temperatures is not None:
            own = logits.new_tensor(self._readout.temperatures)[experts]
            logits = logits / own.unsqueeze(-1)
        alone = logits.log_softmax(-1)
        return Mixed(log_mixture(alone, shares), alone, shares, experts)


class ClassifierReadout:
    """Makes a sequence classifier give the mixture's log-probabilities as its logits. A context manager.

    Args:
        model (`nn.Module`): the classifier as it is called, also under PEFT.
        mixture ([`Mixture`]): of a probe that watches it.
    """

    def __init__(self, model: nn.Module, mixture: Mixture) -> None:
        self._model, self._mixture = model, mixture
        self._pad = model.config.get_text_config().pad_token_id
        self.mixed: Mixed | None = None
        """Of the last forward."""

    def __enter__(self) -> ClassifierReadout:
        self._handle = self._model.register_forward_hook(self._read)
        return self

    def __exit__(self, *exception: object) -> None:
        self._handle.remove()

    def _read(self, model: nn.Module, args: tuple, output: Any) -> Any:
        if self._mixture.probe.is_paused:  # a replay
            return output
        self.mixed = self._mixture.pooled(self._pad)
        output.logits = self.mixed.log_probs
        return output
