"""Watches the router of a model while it trains: expert load, entropy, dead experts and disagreement per MoE layer."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from ..probes import UnsupportedMoEError, find_moe_layers, probe_experts


if TYPE_CHECKING:
    from transformers import Trainer

    from ..probes import MoELayer

logger = logging.getLogger(__name__)


class _Watch:
    """Sums of one layer since the last log, on the layer's device: no step waits for them."""

    def __init__(self, layer: MoELayer) -> None:
        self.layer = layer
        self.sums: Tensor | None = None

    def see(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> None:
        """A forward hook of the experts module; keeps [E + 2] numbers: selections, entropy and tokens."""
        if not module.training or not torch.is_grad_enabled():
            return
        index, weights = (kwargs.get(name, args[i] if len(args) > i else None) for i, name in _ARGUMENTS)
        shares = weights.detach().float()
        shares = shares / shares.sum(dim=-1, keepdim=True).clamp_min(1e-20)
        entropy = -(shares * shares.clamp_min(1e-20).log()).sum().reshape(1)
        load = torch.bincount(index.flatten(), minlength=self.layer.num_experts)[: self.layer.num_experts]
        seen = torch.cat([load.double(), entropy.double(), entropy.new_full((1,), len(shares)).double()])
        self.sums = seen if self.sums is None else self.sums + seen

    def take(self) -> Tensor | None:
        """The sums so far; starts anew."""
        sums, self.sums = self.sums, None
        return sums


_ARGUMENTS = ((1, "top_k_index"), (2, "top_k_weights"))


class MoECalCallback(TrainerCallback):
    """Logs how a model routes while any `Trainer` trains it, and warns when the router collapses.

    At every logging step, for each MoE layer `i`: `moe/<i>/load_max` (share of the busiest expert times the number of
    experts: 1 is even), `moe/<i>/dead_experts` (experts that get less than `dead_below` of an even share),
    `moe/<i>/entropy` (of the shares of a token, divided by log k: 1 is an even mixture, 0 is hard routing) and, with
    `probe_batch`, `moe/<i>/disagreement` of the layers in `disagreement_layers`.

    Use [`attach`], not `callbacks=[...]`: a Trainer calls its own reporters before the callbacks that it is given, so
    these could no longer add to what wandb, trackio or tensorboard receive.

    Args:
        warn_load (`float`): warns when an expert gets this many times an even share.
        warn_dead (`float`): warns when more than this share of a layer's experts is dead.
        dead_below (`float`): an expert with less than this part of an even share is dead.
        probe_batch (`dict`, *optional*): a batch of model inputs on which disagreement is measured at each logging
            step, at its last tokens. Costs one forward and the experts' counterfactuals.
        disagreement_layers (`Iterable[int]`): MoE layers for the disagreement.

    Example:

    ```python
    >>> from hf_moecal.training.callback import MoECalCallback
    >>> callback = MoECalCallback(warn_dead=0.25)  # MoECalCallback(...).attach(trainer), then trainer.train()

    ```
    """

    def __init__(
        self,
        *,
        warn_load: float = 4.0,
        warn_dead: float = 0.25,
        dead_below: float = 0.1,
        probe_batch: dict[str, Tensor] | None = None,
        disagreement_layers: Iterable[int] = (-1,),
    ) -> None:
        if warn_load <= 1:
            raise ValueError(f"warn_load is a multiple of an even share and must be above 1, got {warn_load}.")
        for name, value in (("warn_dead", warn_dead), ("dead_below", dead_below)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} is a share between 0 and 1, got {value}.")
        self.warn_load, self.warn_dead, self.dead_below = warn_load, warn_dead, dead_below
        self.probe_batch, self.disagreement_layers = probe_batch, list(disagreement_layers)
        self._watches: list[_Watch] = []
        self._hooks = ExitStack()
        self._attached = False

    def attach(self, trainer: Trainer) -> MoECalCallback:
        """Adds the callback to a Trainer, ahead of its reporters.

        Args:
            trainer (`Trainer`): any Trainer whose model has MoE layers.

        Returns:
            The callback itself.

        Raises:
            UnsupportedMoEError: the model has no MoE layers.
        """
        if any(layer.scales_inputs for layer in find_moe_layers(trainer.model)):
            raise UnsupportedMoEError(
                "MoECalCallback reads weights that scale what experts put out, not their inputs."
            )
        trainer.callback_handler.callbacks.insert(0, self)
        self._attached = True
        return self

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: Any = None, **kwargs: Any) -> None:
        if not self._attached:
            raise ValueError(
                "Add the callback with MoECalCallback(...).attach(trainer), so that reporters get its figures."
            )
        self._hooks.close()
        self._watches = [_Watch(layer) for layer in find_moe_layers(model)]
        for watch in self._watches:
            self._hooks.callback(watch.layer.module.register_forward_hook(watch.see, with_kwargs=True).remove)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._hooks.close()

    def on_log(
        self, args: Any, state: Any, control: Any, *, logs: dict[str, float], model: Any = None, **kwargs: Any
    ) -> None:
        if "loss" not in logs:  # an evaluation, or the summary at the end
            return
        figures: dict[str, float] = {}
        for watch in self._watches:
            sums = watch.take()
            if sums is not None:
                figures |= self._figures(watch.layer, _over_ranks(sums))
        if not figures:
            logger.warning("No forward of an MoE layer was seen; attach the callback before the model is compiled.")
        if self.probe_batch is not None:
            figures |= self._disagreement(model)
        logs.update(figures)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(figures)  # the Trainer recorded its copy already
        if state.is_world_process_zero:
            self._warn(figures, state.global_step)

    def _figures(self, layer: MoELayer, sums: list[float]) -> dict[str, float]:
        *load, entropy, tokens = sums
        even = sum(load) / len(load)
        k = max(round(sum(load) / tokens), 1)
        key = f"moe/{layer.index}"
        return {
            f"{key}/load_max": max(load) / even,
            f"{key}/dead_experts": float(sum(count < self.dead_below * even for count in load)),
            f"{key}/entropy": entropy / tokens / math.log(k) if k > 1 else 0.0,
        }

    @torch.no_grad()
    def _disagreement(self, model: Any) -> dict[str, float]:
        device = next(model.parameters()).device
        inputs = {name: value.to(device) for name, value in (self.probe_batch or {}).items() if name != "labels"}
        batch, length = inputs["input_ids"].shape
        mask = inputs.get("attention_mask", torch.ones(batch, length, device=device))
        last = length - 1 - mask.flip(1).argmax(dim=1) + torch.arange(batch, device=device) * length
        training, found = model.training, {}
        model.eval()
        try:
            for index in self.disagreement_layers:
                with probe_experts(model, index) as probe:
                    model(**inputs)
                    value = float(probe.disagreement(last).mean())
                found[f"moe/{range(len(self._watches))[index]}/disagreement"] = value
        finally:
            model.train(training)
        return found

    def _warn(self, figures: dict[str, float], step: int) -> None:
        for watch in self._watches:
            key, experts = f"moe/{watch.layer.index}", watch.layer.num_experts
            load, dead = figures.get(f"{key}/load_max", 0.0), figures.get(f"{key}/dead_experts", 0.0)
            if load > self.warn_load or dead > self.warn_dead * experts:
                logger.warning(
                    "Router collapse at step %d in MoE layer %d: the busiest expert has %.1f times an even share, "
                    "%d of %d experts are dead; raise router_aux_loss_coef or lower the router's learning rate.",
                    step, watch.layer.index, load, dead, experts,
                )  # fmt: skip


def _over_ranks(sums: Tensor) -> list[float]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(sums)
    return sums.tolist()
