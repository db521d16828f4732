"""What [`MoECalMixin`] adds to the evaluation of a Trainer: one mean over examples, predictions of the readout."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn


class MeanLoss:
    """Mean loss of an evaluation over its examples, however they fell into batches and processes.

    A data loader repeats rows at its end to give every process as many; they count once.

    Args:
        accelerator (`Accelerator`): the processes that share the evaluation.
    """

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator
        self._sums: Tensor | None = None

    def add(self, rows: Tensor, *, packed: bool) -> None:
        """Adds a batch of this process, by its rows.

        Args:
            rows (`Tensor` of shape `[B, 2]`): sum of the losses of each row's examples, and how many these are.
            packed (`bool`): whether a row of the batch holds several rows of the dataset.

        Raises:
            ValueError: the batch holds repeated rows, and which cannot be known.
        """
        state = self._accelerator.gradient_state
        if packed and self._accelerator.num_processes > 1 and state.end_of_dataloader and state.remainder > 0:
            raise ValueError(
                f"The last batch of this packed evaluation set is filled up with rows that came before, and over "
                f"{self._accelerator.num_processes} processes nobody can tell which; set per_device_eval_batch_size=1."
            )
        sums = self._accelerator.gather_for_metrics(rows).sum(0)
        self._sums = sums if self._sums is None else self._sums + sums

    @property
    def value(self) -> float:
        """The mean; NaN where no example has a label."""
        if self._sums is None:
            return float("nan")
        total, count = self._sums.tolist()
        return total / count if count else float("nan")


class EvaluationMixin:
    """The evaluation of [`MoECalMixin`], which has the loss computer."""

    _mean_loss: MeanLoss | None = None

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """Serves `evaluate` and `predict`; over a dict of sets `evaluate` gives `eval_<set>_ece` and the like."""
        with self._judged():
            self._mean_loss = MeanLoss(self.accelerator)
            try:
                found = super().evaluation_loop(
                    dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
                )
                if f"{metric_key_prefix}_loss" in found.metrics:  # Trainer's is a mean over batches
                    found.metrics[f"{metric_key_prefix}_loss"] = self._mean_loss.value
                return found
            finally:
                self._mean_loss = None

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Tensor | None]:
        """As `Trainer` does it, by the readout also where nothing has a label, inside a running loop or by itself."""
        inputs = self._with_labels(inputs)
        with self._judged():
            if self.args.task == "lm" and inputs.get("labels") is None:
                return None, None if prediction_loss_only else self._unlabelled(model, inputs), None
            found = self._predicted(model, inputs, prediction_loss_only, ignore_keys)
            if self._mean_loss is not None and found[0] is not None:
                self._mean_loss.add(**self._loss_computer.evaluated)
            return found

    def _predicted(self, *args: Any) -> tuple[Tensor | None, Any, Tensor | None]:
        return super().prediction_step(*args)

    @torch.no_grad()
    def _unlabelled(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """What a language model predicts at all positions of a batch without labels, `[B, S, V]`."""
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager(), self._loss_computer.batch(inputs, whole=True) as batch:
            return self._loss_computer.whole(model(**batch))
