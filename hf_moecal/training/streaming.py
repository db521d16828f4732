"""Optimizer batches that run each micro-batch once, though its coefficients depend on those that follow.

[`ScaledBatch`] back-propagates each micro-batch at once and divides the gradient at the end by what was unknown:
for free, but only one common factor may be unknown. [`HeldBatch`] keeps the graph of every micro-batch and
back-propagates them together at the end: exact for every objective, at the price of memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from ..model.freezing import last_moe_site
from .arguments import MoECalArguments
from .optimizer_batch import OptimizerBatch


LARGEST_EXPONENT = 40.0  # e^40 times a gradient is far below the largest number of float32 and bfloat16


class ScaledBatch(OptimizerBatch):
    """Back-propagates with weights exp(eta (l - r)) and divides the reduced gradient by their sum Z.

    That is softmax(eta l), the Robust objective with detached weights. The reference r, the largest loss of the first
    micro-batch over all processes, cancels, and makes Z at least one. If a later loss is so much larger that its
    weight would overflow, the batch is run again with the coefficients, which are known by then.
    """

    measures_first = False

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._reference: Tensor | None = None

    def loss(self, losses: Tensor, alone: Tensor | None = None, balance: Tensor | None = None) -> Tensor:
        if self.coefficients is not None:
            return super().loss(losses)
        measured = self.measured[self.position].losses
        if self._reference is None:
            self._reference = self._largest(measured)
        weights = measured if self._reference is None else self._exponents(measured).clamp(max=LARGEST_EXPONENT).exp()
        term = self._sum(weights, losses, alone, balance)  # the last two are none: see `choose_batch_type`
        value = 0.0
        if self.at_end:
            self.weigh()
            value = 0.0 if self.is_empty else self.summary.objective
        return term - term.detach() + value  # the gradient of the term; values that add up to F

    @torch.no_grad()
    def settle(self, parameters: Iterable[nn.Parameter]) -> bool:
        exponents = self._exponents(self.losses)
        if exponents.max() > LARGEST_EXPONENT:
            return False
        factor = 1 / exponents.exp().sum().item()
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(factor)
        return True

    def _exponents(self, losses: Tensor) -> Tensor:
        return self.eta * (losses - self._reference)

    def _largest(self, own: Tensor) -> Tensor | None:
        """The largest loss of all processes' micro-batches, `None` where none of them has a labelled example."""
        largest = own.max() if len(own) else own.new_tensor(float("-inf"))
        largest = self.accelerator.gather(largest[None]).max()
        return None if largest.isneginf() else largest


class HeldBatch(OptimizerBatch):
    """Holds the graphs of all micro-batches until the last losses are known, then back-propagates them at once.

    Gradients come from one backward pass, so whatever wraps the model reduces them once.
    """

    measures_first = False

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._held: list[tuple[Tensor | None, ...]] = []

    def loss(self, losses: Tensor, alone: Tensor | None = None, balance: Tensor | None = None) -> Tensor:
        self._held.append((losses, alone, balance))
        if not self.at_end:
            return losses.new_zeros((), requires_grad=True)  # a leaf, so that Trainer has what to back-propagate
        self.weigh()
        every, alone, balances = zip(*self._held, strict=True)
        balance = None if balance is None else sum(balances)
        alone = None if alone[0] is None else torch.cat(alone)
        return self._sum(torch.cat(self.coefficients), torch.cat(every), alone, balance) + self._constant


def choose_batch_type(
    model: nn.Module, args: MoECalArguments, *, accelerator: Accelerator, balanced: bool = False
) -> tuple[type[OptimizerBatch], str]:
    """How the optimizer batches of a run get their coefficients.

    Args:
        model (`nn.Module`): with what trains chosen.
        args ([`MoECalArguments`]): of the run.
        accelerator (`Accelerator`): of the run.
        balanced (`bool`, *optional*, defaults to `False`): whether the routers' load-balancing loss is added.

    Returns:
        `tuple[type[OptimizerBatch], str]`: the kind of batch, and one line that says which it is and why; empty where
        every micro-batch runs once in any case.

    Raises:
        ValueError: `args.normalizer="streaming"` is not exact in this run.
    """
    if not args.is_robust or args.gradient_accumulation_steps == 1:
        return OptimizerBatch, ""
    beside = balanced or args.expert_loss_weight > 0  # is not divided by the weights' sum
    one_factor = args.objective == "robust" and args.detach_weights and not beside and args.readout_members == 1
    streaming = ScaledBatch if one_factor else HeldBatch
    obstacle = _obstacle(streaming, accelerator)
    if args.normalizer == "streaming":
        if obstacle:
            raise ValueError(f"normalizer='streaming' is not exact here: {obstacle}; set normalizer='two_pass'.")
        return streaming, "normalizer=streaming, as asked"
    if args.normalizer == "two_pass":
        return OptimizerBatch, "normalizer=two_pass, as asked"
    extra = args.gradient_accumulation_steps - 1
    if obstacle:
        return OptimizerBatch, f"normalizer=two_pass, {extra} extra forwards per step: {obstacle}"
    if one_factor:
        return streaming, "normalizer=streaming, no extra forward: the weights' sum is divided out at the end"
    if _trains_late(model):
        return streaming, "normalizer=streaming, no extra forward: the graphs held are those of the last layers"
    return OptimizerBatch, (
        f"normalizer=two_pass, {extra} extra forwards per step: normalizer='streaming' needs none, but holds the "
        f"activations of {extra + 1} micro-batches"
    )


def _obstacle(batch_type: type[OptimizerBatch], accelerator: Accelerator) -> str | None:
    """Why a kind of batch would not be exact, if it would not."""
    kind = accelerator.distributed_type
    if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM, DistributedType.XLA):
        return f"{kind.value} keeps the gradients to itself"
    if batch_type is ScaledBatch and accelerator.mixed_precision == "fp16":
        return "weights before their division overflow in fp16 (bf16 is fine)"
    if batch_type is HeldBatch and accelerator.gradient_state.plugin_kwargs.get("sync_each_batch"):
        return "`sync_each_batch` expects a backward pass after every forward"
    return None


def _trains_late(model: nn.Module) -> bool:
    """Whether nothing trains before the last MoE layer's decoder layer, so that a graph begins there."""
    try:
        site = last_moe_site(model)
    except ValueError:  # no mixture, or not in a list of layers
        return False
    for name, parameter in model.named_parameters():  # registered in the order in which they run
        if name.startswith(f"{site.layers_name}.{site.index}."):
            return True
        if parameter.requires_grad:
            return False
    return False
