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

With `experts="auto"` a soft mixture takes, for each token, the fewest experts that hold .99 of the router's mass. No
probability is then further than .01 from that of the mixture of all.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..model.head import pooled_positions
from ..probes import ExpertProbe
from ..probes.agreement import disagreement_and_regret
from ..probes.routing import upcast


READOUTS = ("native", "mixture", "soft_mixture")
AUTO, AUTO_MASS = "auto", 0.99


def parse_experts(text: str | None) -> int | str | None:
    """How many experts a soft mixture takes, from text: `"3"` is 3; everything else stays as it is."""
    return int(text) if isinstance(text, str) and text.isdecimal() else text


@dataclass(frozen=True)
class Readout:
    """How the last MoE layer's experts make a prediction.

    Args:
        kind (`str`, *optional*, defaults to `"native"`): `"native"`, `"mixture"` or `"soft_mixture"`.
        experts (`int` or `"auto"`, *optional*): with `"soft_mixture"`, mix so many experts, those with the largest
            shares, or for each token as many as hold .99 of its shares; all if unset.
        temperatures (`tuple[float]`, *optional*): one per expert of the layer, those of each further member after
            that; each expert's logits are divided by its own before they are mixed.
        members (`int`, *optional*, defaults to 1): how many last MoE layers predict, mixed in equal shares; a
            property of the model, see [`hf_moecal.readouts.committee`].

    Raises:
        ValueError: no such readout, or a setting that it does not have.
    """

    kind: str = "native"
    experts: int | str | None = None
    temperatures: tuple[float, ...] | None = None
    members: int = 1

    def __post_init__(self) -> None:
        if self.kind not in READOUTS:
            raise ValueError(f"`readout` must be one of {', '.join(READOUTS)}, got {self.kind!r}.")
        if self.experts is not None and self.kind != "soft_mixture":
            raise ValueError(
                f"`readout_experts={self.experts}` has no effect on readout={self.kind!r}; set readout='soft_mixture' "
                "or leave it unset."
            )
        if self.experts not in (None, AUTO) and not (isinstance(self.experts, int) and self.experts >= 1):
            raise ValueError(f"`readout_experts` must be a positive whole number or 'auto', got {self.experts!r}.")
        if self.temperatures is not None and self.kind == "native":
            raise ValueError("Temperatures per expert need readout='mixture' or 'soft_mixture'.")
        if self.temperatures is not None and not all(0 < t < math.inf for t in self.temperatures):
            raise ValueError(f"Temperatures are finite and above 0, got {self.temperatures}.")

        if not (isinstance(self.members, int) and self.members >= 1):
            raise ValueError(f"`readout_members` must be a whole number, 1 or more, got {self.members!r}.")

    @property
    def name(self) -> str | None:
        """What a predictions table says about it; nothing for the native one of a single model."""
        name = self.kind if self.experts is None else f"{self.kind} of {self.experts}"
        if self.members > 1:
            return f"{name}, committee of {self.members}"
        return name if self.is_mixture else None

    @classmethod
    def named(cls, name: str | None) -> Readout:
        """The readout that a predictions table names.

        Raises:
            ValueError: no readout has that name.

        Example:

        ```python
        >>> from hf_moecal.readouts.mixture import Readout
        >>> Readout.named("soft_mixture of 3, committee of 2")
        Readout(kind='soft_mixture', experts=3, temperatures=None, members=2)

        ```
        """
        if name is None:
            return cls()
        found = re.fullmatch(r"(\w+?)(?: of (\d+|auto))?(?:, committee of (\d+))?", name)
        if found is None:
            raise ValueError(f"No readout is named {name!r}; names are like 'soft_mixture of 3, committee of 2'.")
        kind, experts, members = found.groups()
        return cls(kind, parse_experts(experts), members=int(members or 1))

    def record(self) -> dict[str, Any] | None:
        """How `calibration.json` keeps it; nothing for what plain transformers predicts."""
        return None if self.is_plain else {"kind": self.kind, "experts": self.experts, "members": self.members}

    @classmethod
    def from_record(cls, values: Mapping[str, Any] | None) -> Readout:
        """What [`record`] gave.

        Raises:
            ValueError: an entry is missing, unknown or out of range.
        """
        if values is None:
            return cls()
        if set(values) != {"kind", "experts", "members"}:
            raise ValueError(f"A readout has 'kind', 'experts' and 'members'; got {sorted(values)}.")
        return cls(**values)

    @property
    def is_plain(self) -> bool:
        """Whether it is what the checkpoint predicts in plain transformers."""
        return self.name is None

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
        num_experts (`int`): how many there are to choose from.
    """

    log_probs: Tensor
    expert_log_probs: Tensor
    shares: Tensor
    expert_ids: Tensor
    num_experts: int = 1

    def rows(self, chosen: Tensor) -> Mixed:
        """The mixture of some of the tokens."""
        return Mixed(*(values[chosen] for values in self[:4]), self.num_experts)


def log_mixture(expert_log_probs: Tensor, shares: Tensor) -> Tensor:
    """log p = logsumexp_k (log r_k + log p_k), the experts' probabilities mixed in log space: `[n, C]`.

    Args:
        expert_log_probs (`Tensor` of shape `[n, m, C]`): each expert's own.
        shares (`Tensor` of shape `[n, m]`): r_k, summing to one over the experts.

    Example:

    ```python
    >>> import torch
    >>> from hf_moecal.readouts.mixture import log_mixture
    >>> experts = torch.tensor([[[0.9, 0.1], [0.5, 0.5]]]).log()
    >>> log_mixture(experts, torch.tensor([[0.25, 0.75]])).exp()
    tensor([[0.6000, 0.4000]])

    ```
    """
    # Where a share, or all experts' probability of a class, is exactly zero, the gradient of logsumexp would be NaN.
    alone = expert_log_probs.clamp_min(torch.finfo(expert_log_probs.dtype).min / 2)
    log_shares = shares.clamp_min(torch.finfo(shares.dtype).tiny).log()
    return torch.logsumexp(log_shares.unsqueeze(-1) + alone, dim=1)


def fewest(shares: Tensor, mass: float) -> tuple[Tensor, Tensor]:
    """The fewest experts that hold a part of each token's shares, and their shares, which again sum to one.

    Args:
        shares (`Tensor` of shape `[n, E]`): summing to one.
        mass (`float`): the part, below one.

    Returns:
        `tuple[Tensor, Tensor]`: `[n, m]` each, the largest share first, m being the most that any token needs; a token
        that needs fewer has its first expert again, with a share of zero.

    Example:

    ```python
    >>> import torch
    >>> from hf_moecal.readouts.mixture import fewest
    >>> fewest(torch.tensor([[0.75, 0.0, 0.25], [0.0, 1.0, 0.0]]), 0.99)
    (tensor([[0, 2],
            [1, 1]]), tensor([[0.7500, 0.2500],
            [1.0000, 0.0000]]))

    ```
    """
    largest, experts = shares.sort(dim=-1, descending=True, stable=True)
    before = largest.detach().cumsum(-1) - largest.detach()
    needed = before < mass
    needed[:, 0] = True
    count = int(needed.sum(-1).max())
    largest, experts, needed = largest[:, :count], experts[:, :count], needed[:, :count]
    kept = largest * needed
    return torch.where(needed, experts, experts[:, :1]), kept / kept.sum(-1, keepdim=True)


def alone(log_probs: Tensor) -> Mixed:
    """One prediction `[n, C]` as a mixture of itself."""
    shares = log_probs.new_ones(len(log_probs), 1)
    return Mixed(log_probs, log_probs.unsqueeze(1), shares, shares.long() - 1)


def joined(parts: list[Mixed]) -> Mixed:
    """The mixture of a committee's mixtures, in equal shares.

    Expert k of member j is number j * E + k, with E experts in each (one, where the members are not mixtures).

    Example:

    ```python
    >>> import torch
    >>> from hf_moecal.readouts.mixture import alone, joined
    >>> members = [alone(torch.tensor([[0.9, 0.1]]).log()), alone(torch.tensor([[0.5, 0.5]]).log())]
    >>> joined(members).log_probs.exp(), joined(members).expert_ids
    (tensor([[0.7000, 0.3000]]), tensor([[0, 1]]))

    ```
    """
    if len(parts) == 1:
        return parts[0]
    experts = torch.cat([part.expert_log_probs for part in parts], dim=1)
    shares = torch.cat([part.shares for part in parts], dim=1) / len(parts)
    ids = torch.cat([part.expert_ids + number * part.num_experts for number, part in enumerate(parts)], dim=1)
    return Mixed(log_mixture(experts, shares), experts, shares, ids, len(parts) * parts[0].num_experts)


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
        member (`int`, *optional*, defaults to 0): number of the watched model in its committee.
    """

    def __init__(self, probe: ExpertProbe, readout: Readout, *, member: int = 0) -> None:
        (layer,) = probe.layers
        self.probe, self._readout = probe, readout
        self._temperatures: tuple[float, ...] | None = None
        if isinstance(readout.experts, int) and readout.experts > layer.num_experts:
            raise ValueError(f"readout_experts={readout.experts}, but {layer.name} has {layer.num_experts} experts.")
        given = readout.temperatures
        if given is not None:
            if len(given) != readout.members * layer.num_experts:
                raise ValueError(
                    f"{readout.members} x {layer.name} have {readout.members * layer.num_experts} experts, but "
                    f"{len(given)} temperatures were given."
                )
            self._temperatures = given[member * layer.num_experts : (member + 1) * layer.num_experts]

    def shares(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The experts that are mixed, `[n, m]`, the largest share first, and their shares, `[n, m]`."""
        if self._readout.kind == "mixture":
            record = self.probe.record[tokens]
            return record.expert_ids, record.shares
        shares = self.probe.router_shares(tokens)
        if self._readout.experts == AUTO:
            return fewest(shares, AUTO_MASS)
        count = self._readout.experts or shares.shape[-1]
        largest = shares.topk(count, dim=-1)
        kept = largest.values
        return largest.indices, kept if count == shares.shape[-1] else kept / kept.sum(-1, keepdim=True)

    def log_probs(self, tokens: Tensor) -> Tensor:
        """Log-probabilities at the tokens (flat indices): `[n, V]` or `[n, num_labels]`."""
        return self.reduced(tokens, lambda part, mixed: mixed.log_probs)

    def pooled(self, pad_token_id: int | None) -> Mixed:
        """The mixture at the token that a sequence classifier reads, for each sequence of the batch."""
        ids, (batch, length) = self.probe.inputs.get("input_ids"), self.probe.record.batch_shape
        if ids is None:  # embeddings show no padding: transformers reads the last position
            last = torch.full((batch,), length - 1, device=self.probe.record.weights.device)
        else:
            last = pooled_positions(ids, pad_token_id)
        tokens = torch.arange(batch, device=last.device) * length + last
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
        if self._temperatures is not None:
            own = logits.new_tensor(self._temperatures)[experts]
            logits = logits / own.unsqueeze(-1)
        each = logits.log_softmax(-1)
        return Mixed(log_mixture(each, shares), each, shares, experts, self.probe.layers[0].num_experts)
