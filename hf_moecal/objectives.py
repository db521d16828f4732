"""Training objectives robust to reweighting, as functions of the vector of per-example losses.

Every objective is a scalar F(l_1 ... l_N) of the losses of the *whole* optimizer batch, so its gradient is
sum_i c_i grad l_i with the coefficients c = dF/dl. [`coefficients`] gives F and c; the Trainer back-propagates
sum_i c_i l_i micro-batch by micro-batch, which is exact however the batch is split.

Source: "Toward Calibrated Mixture-of-Experts Under Distribution Shift" (arXiv:2606.20544).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .labels import at_labels, check_labels


OBJECTIVES = ("erm", "robust", "robust_filtered", "label_smoothing", "focal")
"""Names taken by `MoECalArguments(objective=...)`. Label smoothing and focal loss are the baselines: they change
the per-example loss and then take the mean."""

TAU_REGRET = 1e-6
TAU_DISAGREEMENT = 0.01


class Objective(NamedTuple):
    """Value of an objective and what it does to each example.

    Attributes:
        value (`float`): F(l).
        coefficients (`Tensor` of shape `[N]`, float64): dF/dl_i.
        weights (`Tensor` of shape `[N]`, float64): the adversary's weights w_i, which sum to one; uniform for ERM,
            zero outside the relevant examples for Robust Filtered.
    """

    value: float
    coefficients: Tensor
    weights: Tensor

    @property
    def effective_sample_size(self) -> float:
        """1 / sum_i w_i^2: how many examples the adversary looks at, from 1 to N."""
        return 1.0 / self.weights.square().sum().item()


def erm(losses: Tensor) -> Tensor:
    """Empirical risk: mean_i l_i.

    Args:
        losses (`Tensor` of shape `[N]`): per-example losses in nats.

    Returns:
        `Tensor`: a scalar.

    Raises:
        ValueError: `losses` is not a non-empty vector of finite numbers.

    Example:

    ```python
    >>> import torch
    >>> from hf_moecal import erm
    >>> erm(torch.tensor([1.0, 3.0])).item()
    2.0

    ```
    """
    return _checked(losses).mean()


def robust(losses: Tensor, *, eta: float, detach_weights: bool = True) -> Tensor:
    """Robust objective: sum_i w_i l_i with w = softmax(eta l), the exponentially tilted batch.

    With detached weights its gradient is that of (1/eta) log mean_i exp(eta l_i), the maximum-entropy adversary's
    true gradient, and every coefficient is positive. With gradient through the weights (`detach_weights=False`, as
    the paper's code does) the coefficient is w_i (1 + eta (l_i - sum_j w_j l_j)), which is *negative* for easy
    examples and thus a confidence penalty.

    Args:
        losses (`Tensor` of shape `[N]`): per-example losses in nats.
        eta (`float`): tilt, at least 0; 0 is ERM.
        detach_weights (`bool`, *optional*, defaults to `True`): whether the weights are constants for autograd.

    Returns:
        `Tensor`: a scalar.

    Raises:
        ValueError: bad losses, or a negative or non-finite `eta`.

    Example:

    ```python
    >>> import torch
    >>> from hf_moecal import robust
    >>> losses = torch.tensor([0.0, 1.0], dtype=torch.float64)
    >>> round(robust(losses, eta=2.0).item(), 4)  # exp(2) / (1 + exp(2))
    0.8808

    ```
    """
    losses = _checked(losses)
    return (tilt(losses, eta=eta, detach=detach_weights) * losses).sum()


def robust_filtered(losses: Tensor, relevant: Tensor, *, eta: float, detach_weights: bool = True) -> Tensor:
    """Robust Filtered objective: mean_i l_i + sum_{i in R} softmax_R(eta l)_i l_i, R the routing-relevant examples.

    If R is empty the second term is mean_i l_i.

    Args:
        losses (`Tensor` of shape `[N]`): per-example losses in nats.
        relevant (`Tensor` of shape `[N]`, bool): membership in R, as given by [`routing_relevance`].
        eta (`float`): tilt, at least 0.
        detach_weights (`bool`, *optional*, defaults to `True`): see [`robust`].

    Returns:
        `Tensor`: a scalar.

    Raises:
        ValueError: bad losses or `eta`, or a `relevant` that is not a boolean vector of the losses' length.

    Example:

    ```python
    >>> import torch
    >>> from hf_moecal import robust_filtered
    >>> losses = torch.tensor([0.0, 1.0, 5.0], dtype=torch.float64)
    >>> relevant = torch.tensor([True, True, False])
    >>> round(robust_filtered(losses, relevant, eta=2.0).item(), 4)  # mean 2.0 + tilt over the first two
    2.8808

    ```
    """
    losses = _checked(losses)
    if relevant.dtype != torch.bool or relevant.shape != losses.shape:
        raise ValueError(
            f"`relevant` must be a boolean vector of shape {tuple(losses.shape)} like `losses`, got {relevant.dtype} "
            f"of shape {tuple(relevant.shape)}; make it with routing_relevance(regret, disagreement)."
        )
    mean = losses.mean()
    if not relevant.any():
        return mean + mean
    return mean + robust(losses[relevant], eta=eta, detach_weights=detach_weights)


def tilt(losses: Tensor, *, eta: float, detach: bool = True) -> Tensor:
    """The adversary's weights w = softmax(eta l) over a vector of losses; shift-invariant and free of overflow."""
    if not 0 <= eta < float("inf"):
        raise ValueError(f"`eta` must be a finite number of at least 0, got {eta}; the paper uses 2.0, and 0 is ERM.")
    return torch.softmax(eta * (losses.detach() if detach else losses), dim=0)


def routing_relevance(
    regret: Tensor,
    disagreement: Tensor,
    *,
    tau_regret: float = TAU_REGRET,
    tau_disagreement: float = TAU_DISAGREEMENT,
    quantile: float | None = None,
) -> Tensor:
    """Which examples are routing-relevant: the blend loses to its best expert, or the experts disagree.

    Args:
        regret (`Tensor` of shape `[N]`): relu(l_i - min_k l_i^(k)) in nats; of a soft label with the mean losses over
            the raters, l = -sum_c q_c log p_c: what the best expert alone would have saved them all together.
        disagreement (`Tensor` of shape `[N]`): sum_k r_k ||p_i^(k) - p_i||^2.
        tau_regret (`float`, *optional*, defaults to 1e-6): regret above it is relevant.
        tau_disagreement (`float`, *optional*, defaults to 0.01): disagreement above it is relevant.
        quantile (`float`, *optional*): instead of the thresholds, the share of the batch (0 < q <= 1) with the
            largest regret together with the share with the largest disagreement. A value of zero is never relevant.

    Returns:
        `Tensor` of shape `[N]`, bool.

    Raises:
        ValueError: shapes differ, values are not finite, or `quantile` is outside (0, 1].

    Example:

    ```python
    >>> import torch
    >>> from hf_moecal import routing_relevance
    >>> routing_relevance(torch.tensor([0.0, 0.2, 0.0]), torch.tensor([0.0, 0.0, 0.5])).tolist()
    [False, True, True]

    ```
    """
    if regret.shape != disagreement.shape or regret.dim() != 1:
        raise ValueError(
            f"`regret` and `disagreement` must be vectors of one length, got shapes {tuple(regret.shape)} and "
            f"{tuple(disagreement.shape)}; pass one value per example."
        )
    if not (torch.isfinite(regret).all() and torch.isfinite(disagreement).all()):
        raise ValueError("`regret` and `disagreement` must be finite; the experts' predictions hold NaN or infinity.")
    if quantile is None:
        return (regret > tau_regret) | (disagreement > tau_disagreement)
    if not 0 < quantile <= 1:
        raise ValueError(f"`quantile` must lie in (0, 1], got {quantile}; 0.3 keeps the top 30 % of each measure.")
    return _top_share(regret, quantile) | _top_share(disagreement, quantile)


def _top_share(values: Tensor, share: float) -> Tensor:
    if values.numel() == 0:
        return torch.zeros_like(values, dtype=torch.bool)
    return (values >= torch.quantile(values.double(), 1 - share)) & (values > 0)


def coefficients(objective: Callable[[Tensor], Tensor], losses: Tensor) -> tuple[float, Tensor]:
    """Value F(l) and coefficients dF/dl of an objective at a vector of losses, in float64.

    Args:
        objective (`Callable`): maps the loss vector to a scalar, for example `functools.partial(robust, eta=2.0)`.
        losses (`Tensor` of shape `[N]`): losses of the whole optimizer batch; detached here.

    Returns:
        `tuple[float, Tensor]`: the value and the coefficients, of shape `[N]`.

    Raises:
        ValueError: bad losses.

    Example:

    ```python
    >>> import torch
    >>> from hf_moecal.objectives import coefficients, erm
    >>> value, c = coefficients(erm, torch.tensor([1.0, 3.0]))
    >>> value, c.tolist()
    (2.0, [0.5, 0.5])

    ```
    """
    leaf = _checked(losses.detach().double()).requires_grad_(True)
    with torch.enable_grad():
        value = objective(leaf)
        (gradient,) = torch.autograd.grad(value, leaf)
    return value.item(), gradient


def evaluate_objective(
    name: str,
    losses: Tensor,
    *,
    relevant: Tensor | None = None,
    eta: float = 0.0,
    detach_weights: bool = True,
) -> Objective:
    """Value, coefficients and adversary's weights of the named objective over one optimizer batch.

    `label_smoothing` and `focal` are means of their own per-example losses, so here they equal `erm`.
    """
    losses = losses.detach().double()
    if name == "robust":
        value, c = coefficients(lambda v: robust(v, eta=eta, detach_weights=detach_weights), losses)
        weights = tilt(losses, eta=eta)
    elif name == "robust_filtered":
        if relevant is None:
            raise ValueError(
                "`robust_filtered` needs `relevant`; make it with routing_relevance(regret, disagreement)."
            )
        value, c = coefficients(lambda v: robust_filtered(v, relevant, eta=eta, detach_weights=detach_weights), losses)
        weights = torch.zeros_like(losses)
        chosen = relevant if relevant.any() else torch.ones_like(relevant)
        weights[chosen] = tilt(losses[chosen], eta=eta if relevant.any() else 0.0)
    elif name in OBJECTIVES:
        value, c = coefficients(erm, losses)
        weights = c
    else:
        raise unknown_objective(name)
    return Objective(value, c, weights)


def unknown_objective(name: object) -> ValueError:
    return ValueError(f"Unknown objective {name!r}; choose one of {', '.join(OBJECTIVES)}.")


def example_losses(
    logits: Tensor,
    labels: Tensor,
    *,
    objective: str = "erm",
    label_smoothing: float = 0.1,
    focal_gamma: float = 2.0,
) -> Tensor:
    """Per-example loss whose batch objective is then taken: cross-entropy, or the baselines' own loss.

    That of a soft label is the mean of what each rater's label would cost: -sum_c q_c log p_c for the cross-entropy.

    Args:
        logits (`Tensor` of shape `[N, C]`): class scores; upcast to float32.
        labels (`Tensor` of shape `[N]`, int, or `[N, C]`, float): classes in [0, C), or shares that sum to one.
        objective (`str`, *optional*, defaults to `"erm"`): `"label_smoothing"` mixes the one-hot target with the
            uniform distribution; `"focal"` is -(1 - p_y)^gamma log p_y; all others are cross-entropy.
        label_smoothing (`float`, *optional*, defaults to 0.1): share of the uniform distribution.
        focal_gamma (`float`, *optional*, defaults to 2.0): focusing exponent.

    Returns:
        `Tensor` of shape `[N]`: losses in nats, with gradient.

    Raises:
        ValueError: unknown objective, mismatched shapes, or labels out of range.

    Example:

    ```python
    >>> import torch
    >>> from hf_moecal.objectives import example_losses
    >>> example_losses(torch.zeros(1, 2), torch.tensor([1])).item()  # log 2
    0.6931...

    ```
    """
    if objective not in OBJECTIVES:
        raise unknown_objective(objective)
    if logits.dim() != 2 or labels.dim() not in (1, 2) or len(labels) != len(logits):
        raise ValueError(
            f"`logits` must be [N, C] and `labels` [N] or [N, C], got {tuple(logits.shape)} and "
            f"{tuple(labels.shape)}; flatten tokens first and drop those with label -100."
        )
    check_labels(labels, logits.shape[1])
    log_probs = F.log_softmax(logits.float(), dim=-1)
    nll = -at_labels(log_probs, labels)
    if objective == "label_smoothing":
        return (1 - label_smoothing) * nll - label_smoothing * log_probs.mean(dim=-1)
    if objective == "focal":
        if labels.dim() == 2:
            each = torch.where(labels > 0, -log_probs, 1.0)  # a class without a share has no gradient to spoil
            return at_labels(_focal(each, focal_gamma), labels)
        return _focal(nll, focal_gamma)
    return nll


def _focal(nll: Tensor, gamma: float) -> Tensor:
    return (-torch.expm1(-nll)).clamp(min=0) ** gamma * nll  # 1 - p_y without cancellation near p_y = 1


def _checked(losses: Tensor) -> Tensor:
    if losses.dim() != 1 or losses.numel() == 0:
        raise ValueError(
            f"`losses` must be a non-empty vector of per-example losses, got shape {tuple(losses.shape)}; "
            "use reduction='none'."
        )
    if not torch.isfinite(losses.detach()).all():
        count = int((~torch.isfinite(losses.detach())).sum())
        raise ValueError(
            f"{count} of {losses.numel()} losses are NaN or infinite; lower the learning rate, check the inputs, or "
            "train in bf16 or fp32 instead of fp16."
        )
    return losses
