"""A Trainer whose objective is exact over the whole optimizer batch, on one process or many.

[`MoECalMixin`] goes in front of `Trainer` or a subclass of it. At the first micro-batch of an optimizer step it
measures the losses of all others without gradient, gathers them from every process, and gives each example i its
coefficient c_i = dF/dl_i; each micro-batch then back-propagates sum_i c_i l_i.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from ..metrics import calibration_metrics
from ..model.freezing import CONTAINER, what_trains
from ..readouts.committee import member_names
from ..tasks.choice import CHOICE_COLUMNS, ChoiceCollator
from .arguments import MoECalArguments
from .aux_loss import balance_coefficient
from .checkpoints import CheckpointMixin, check_resumed, checkpoint_to_resume
from .compatibility import (
    check_arguments,
    check_carried,
    check_datasets,
    check_distribution,
    check_model,
    check_optimizer,
    checked_loader,
    label_name,
)
from .evaluation import EvaluationMixin
from .losses import LossComputer
from .methods import is_sharded, settle
from .optimizer_batch import BatchSummary, OptimizerBatch, RandomState, average_summaries, without_repeats
from .prepared import MADE_WITH, check_trial, named_arguments, prepared_model
from .publishing import PublishingMixin
from .streaming import choose_batch_type


_PATIENCE = 10  # optimizer batches without any label, from the first on, after which a run is refused


class MoECalMixin(EvaluationMixin, CheckpointMixin, PublishingMixin):
    """Makes the Trainer behind it optimise `args.objective` over the whole optimizer batch; see [`MoECalTrainer`]."""

    loss_is_scaled_for_ga = True  # the coefficients are derivatives over the whole optimizer batch
    needs_labels = True  # in the datasets; a trainer that makes the labels itself needs none

    def __init__(
        self, model: nn.Module | None = None, args: MoECalArguments | None = None, *given: Any, **kwargs: Any
    ):
        kwargs = named_arguments(super().__init__, given, kwargs)
        check_arguments(args, kwargs)
        self._label_name = label_name(args)
        sets = kwargs.get("train_dataset"), kwargs.get("eval_dataset")
        check_datasets(*sets, labels={self._label_name} if self.needs_labels else None)
        adapted = kwargs.get("peft_config") is not None
        self.method = "" if model is None else settle(args, model, sharded=is_sharded(args), adapted=adapted)
        model = prepared_model(model, args)
        if args.task == "choice" and kwargs.get("data_collator") is None:
            kwargs["data_collator"] = ChoiceCollator(kwargs.get("processing_class"))
        self._running: ExitStack | None = None
        self._loss_computer: LossComputer | None = None
        super().__init__(model=model, args=args, **kwargs)
        check_distribution(self)
        check_optimizer(self.optimizer, self.model, args)
        self.label_names = ["labels"]
        self._settle()
        self._optimizer_batch: OptimizerBatch | None = None
        self._measuring: int | None = None
        self._start_over()
        self.compute_loss_func = self._objective_loss
        own = self.compute_metrics is not None or self.preprocess_logits_for_metrics is not None
        self._gives_logits = own and not getattr(self.compute_metrics, "takes_figures", False)
        if self.compute_metrics is None:
            self.compute_metrics = calibration_metrics()

    def _settle(self) -> None:
        """Settles what depends on the model and the arguments, of which a search may change both for each trial."""
        args = self.args
        check_model(self.model, args)
        cached = args.prefix_cache is not None or args.readout_members > 1
        self._balance = balance_coefficient(self.model, args.router_aux_loss_coef, cached=cached)
        balanced = f"router aux loss times {self._balance:g}" if self._balance else "no router aux loss"
        self.trains = f"{what_trains(self.model, args.train)}; {balanced}"
        self._batch_type, self.normalizes = choose_batch_type(
            self.model, args, accelerator=self.accelerator, balanced=self._balance > 0
        )

    def _start_over(self) -> None:
        """Forgets the optimizer batches of a run."""
        self._summaries: list[BatchSummary] = []
        self._steps = {"trained": 0, "skipped": 0, "skipped since the last log": 0}
        self._carried: list = []

    # What Trainer calls, in the order in which it calls them.

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Trains as `Trainer.train` does; `resume_from_checkpoint=True` takes the newest complete checkpoint."""
        if resume_from_checkpoint:
            resume_from_checkpoint = checkpoint_to_resume(resume_from_checkpoint, self.args.output_dir)
            check_resumed(resume_from_checkpoint, self.args)
        self._start_over()
        with ExitStack() as self._running:
            try:
                if self.model_init is None:
                    self._begin()
                return super().train(resume_from_checkpoint, *args, **kwargs)
            finally:
                self._running = None

    def call_model_init(self, trial: Any = None) -> nn.Module:
        made = super().call_model_init(trial)
        self.method = settle(self.args, made, sharded=is_sharded(self.args))
        self._made_with = {name: getattr(self.args, name) for name in MADE_WITH}
        return prepared_model(made, self.args)

    def _begin(self) -> None:
        """Attaches to the model, until training ends, what gives its losses."""
        if self.model_init is not None:
            check_trial(self.args, self._made_with)
            self._settle()
        self.accelerator.print(self.method)
        self.accelerator.print(self.trains)
        self._running.enter_context(self._judged())
        self._loss_computer.prepare(self.train_dataset)
        if self.normalizes and self.args.normalizer == "auto":
            self.accelerator.print(self.normalizes)

    def get_train_dataloader(self) -> Any:
        if self._running is not None and self._loss_computer is None:  # a model that was only made by now
            self._begin()
        return checked_loader(super().get_train_dataloader(), self.accelerator)

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, *args: Any) -> tuple[list, Any]:
        carried, self._carried = self._carried, []
        taken = (without_repeats(self._with_labels(batch), self.accelerator) for batch in epoch_iterator)
        batches, count = super().get_batch_samples(taken, num_batches - len(carried), *args)
        batches = carried + batches
        if len(batches) < num_batches:  # a stream has ended inside of an optimizer batch, which the next epoch fills
            self._carried = batches
            check_carried(batches, self.args, started=self.state.global_step > 0)
            return [], count
        eta = self.args.eta_at(self.state.global_step / self.state.max_steps)
        batch_type = self._batch_type if eta > 0 and len(batches) > 1 else OptimizerBatch
        self._optimizer_batch = batch_type(batches, args=self.args, accelerator=self.accelerator, eta=eta)
        if self.state.global_step == 0:
            self._start_over()  # a run may start again with a smaller batch
        return batches, count

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        batch, device = self._optimizer_batch, self.args.device
        batch.position += 1
        if batch.position == 0:
            model.zero_grad()  # an epoch that was stopped early leaves gradients of a batch that made no step
            self._first_pass(model)
        self._set_random_state()
        with self._measuring_batch(batch.position):
            loss = super().training_step(model, inputs, num_items_in_batch)
        if batch.position == 0 and batch.measured[-1] is not None:  # the others will draw their numbers again
            batch.frontier = RandomState.current(device)
        if batch.at_end:
            self._close(model)
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        # Without the count, Trainer does not multiply by the world size: our mean is over the whole batch already.
        with self._judged(), self._batch(inputs, return_outputs) as inputs:
            found = super().compute_loss(model, inputs, return_outputs=return_outputs)
            return (found[0], self._loss_computer.predictions(found[1])) if return_outputs else found

    def _batch(self, inputs: dict[str, Any], return_outputs: bool) -> AbstractContextManager[dict[str, Any]]:
        whole = self.args.task == "lm" and return_outputs and self._gives_logits and self._measuring is None
        return self._loss_computer.batch(self._with_labels(inputs), whole=whole)

    def _with_labels(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The batch with its labels under the name that everything reads, if `label_names` gives them another."""
        if self._label_name == "labels" or self._label_name not in inputs:
            return inputs
        return {"labels" if name == self._label_name else name: value for name, value in inputs.items()}

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self._summaries:
            logs = {**logs, **average_summaries(self._summaries, accelerator=self.accelerator)}
            self._summaries = []
        skipped = self._steps["skipped"]
        if not self._steps["trained"] and skipped >= (1 if "train_loss" in logs else _PATIENCE):
            raise ValueError(
                f"No example has a label (all are -100) in any of the {skipped} optimizer batches so far; check the "
                "labels of the dataset."
            )
        if "loss" in logs and self._steps["skipped since the last log"]:
            logs = {**logs, "skipped_steps": self._steps["skipped since the last log"]}
            self._steps["skipped since the last log"] = 0
        super().log(logs, *args, **kwargs)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        read = CHOICE_COLUMNS if self.args.task == "choice" else ()  # by the collator, not by the model
        self._signature_columns = list(dict.fromkeys([*self._signature_columns, *read, self._label_name]))

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """A further member's parameters decay as member 0's do."""
        names = {name for name in super().get_decay_parameter_names(model) if not name.startswith(f"{CONTAINER}.")}
        return [*names, *(key for key, name in member_names(model).items() if name in names)]

    def _first_pass(self, model: nn.Module) -> None:
        """Measures the losses of micro-batches 1, 2, ... without gradient, where the coefficients depend on them."""
        batch = self._optimizer_batch
        if batch.eta == 0:
            if batch.size > 1:
                prepared = map(self._prepare_inputs, batch.batches)
                counts = [self._loss_computer.targets(inputs).num_examples for inputs in prepared]
                batch.weigh_equally(counts)
        elif batch.measures_first:
            model.train()
            for index in range(1, batch.size):
                batch.random_states[index] = RandomState.current(self.args.device)
                with torch.no_grad():
                    self._forward(model, index)

    def _forward(self, model: nn.Module, index: int) -> Tensor:
        """Loss of a micro-batch, unseen by a subclass whose own metrics count the other time that it runs."""
        inputs = self._prepare_inputs(self._optimizer_batch.batches[index])
        with self._measuring_batch(index), self.compute_loss_context_manager():
            with self._loss_computer.batch(inputs) as inputs:
                return Trainer.compute_loss(self, model, inputs)

    @contextmanager
    def _measuring_batch(self, index: int) -> Iterator[None]:
        """Within the block, losses are those of a micro-batch of training, not of evaluation."""
        self._measuring = index
        try:
            yield
        finally:
            self._measuring = None

    def _objective_loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        batch = self._optimizer_batch
        if self._measuring is None:  # evaluation
            return self._loss_computer.evaluate(outputs)
        balance = self._loss_computer.balance()  # before the replays of what follows
        losses = self._loss_computer.losses(outputs)
        batch.measured[self._measuring] = self._loss_computer.measure(losses, known=batch.known(self._measuring))
        if not torch.is_grad_enabled():
            return losses.sum()
        if balance is not None:
            batch.balances.append(balance.detach())
            balance = self._balance / batch.size * balance
        return batch.loss(
            losses, self._loss_computer.expert_losses() if self.args.expert_loss_weight else None, balance
        )

    def _set_random_state(self) -> None:
        """A micro-batch draws the same random numbers whenever it runs."""
        batch, device = self._optimizer_batch, self.args.device
        if batch.random_states[batch.position] is None:
            batch.random_states[batch.position] = RandomState.current(device)
        else:
            batch.random_states[batch.position].restore(device)

    def _close(self, model: nn.Module) -> None:
        batch = self._optimizer_batch
        if batch.losses is None:
            batch.weigh()
        if batch.is_empty:
            self._skip(model)
            return
        if not batch.settle(self.model.parameters()):
            model.zero_grad()
            for position in range(batch.size):
                batch.position = position
                self._set_random_state()
                self.accelerator.backward(self._forward(model, position))
        self._steps["trained"] += 1
        self._summaries.append(batch.summary._replace(router_aux_loss=batch.mean_balance()))
        if batch.frontier is not None:  # replays went back in time: the next batch must not reuse these numbers
            batch.frontier.restore(self.args.device)

    def _skip(self, model: nn.Module) -> None:
        """Lets the optimizer pass over a batch in which no process has a label: to parameters without gradient it
        does nothing, where zeros would still decay and move them.
        """
        if self.is_deepspeed_enabled or self.accelerator.scaler is not None:
            raise ValueError(
                "No example of this optimizer batch has a label (all are -100), and its step cannot be skipped under "
                "DeepSpeed or fp16; drop rows without labels, or train in bf16."
            )
        model.zero_grad()
        self._steps["skipped"] += 1
        self._steps["skipped since the last log"] += 1

    @contextmanager
    def _judged(self) -> Iterator[None]:
        """Attaches to the model what gives its losses; entered again, as training evaluates, does nothing."""
        if self._loss_computer is not None:
            yield
            return
        with LossComputer(self.model, self.args, balanced=self._balance > 0) as self._loss_computer:
            try:
                yield
            finally:
                self._loss_computer = None


class MoECalTrainer(MoECalMixin, Trainer):
    """`transformers.Trainer` with objectives that keep a mixture's confidence honest under shift.

    The objective (`args.objective`: ERM, Robust, Robust Filtered, or a baseline) is a function of the losses of the
    whole optimizer batch, all processes and all accumulation steps; its gradient is the same however the batch is
    split. All of Trainer's arguments work; `args` must be [`MoECalArguments`].

    Over a dict of evaluation sets, `evaluate` gives `eval_<set>_ece`, `eval_<set>_nll` and so on, so that
    `metric_for_best_model="eval_tweets_ece"` works; `eval_<set>_loss` is the mean cross-entropy over the examples. For
    a language model these are the figures of its supervised tokens, and `eval_<set>_sequence_ece` and so on those of
    its sequences, see [`calibration_metrics`]; `predict` gives them per token. With `compute_metrics` or
    `preprocess_logits_for_metrics` of your own, and for rows without labels, it gives logits over the vocabulary
    instead (of a mixture or committee log-probabilities), as Trainer does. Each logging step reports the objective's
    value, the mean loss, the effective sample size and largest weight of the adversary, the share of routing-relevant
    examples, and mean disagreement and regret; `skipped_steps` counts optimizer batches without any label, which make
    no step.

    Args:
        model (`PreTrainedModel`): a mixture-of-experts model with a sequence-classification or language-model head.
        args ([`MoECalArguments`]): training arguments.
        kwargs: everything else that `Trainer` takes.

    Raises:
        ValueError: the arguments, the model or a dataset cannot be trained on; the message names the remedy.

    Example:

    ```python
    >>> import torch
    >>> from transformers import MixtralConfig, MixtralForSequenceClassification
    >>> from hf_moecal import MoECalArguments, MoECalTrainer
    >>> config = MixtralConfig(
    ...     vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
    ...     num_key_value_heads=2, num_local_experts=4, num_labels=2, pad_token_id=0,
    ... )
    >>> data = [{"input_ids": torch.tensor([1, 2, 3 + i % 5]), "label": i % 2} for i in range(16)]
    >>> args = MoECalArguments("out", max_steps=2, report_to="none", save_strategy="no", disable_tqdm=True)
    >>> trainer = MoECalTrainer(model=MixtralForSequenceClassification(config), args=args, train_dataset=data)
    >>> result = trainer.train()
    method=recommended: objective='robust_filtered', eta=1.0, ...
    train=last_moe_layer: ...
    >>> result.global_step
    2

    ```
    """
