"""One optimizer batch, split over micro-batches and processes: its losses, and the coefficients they get.

The objective is a function of all losses of the optimizer batch. [`OptimizerBatch`] keeps what each micro-batch
measured, gathers it from every process, and hands each micro-batch the coefficients c_i of sum_i c_i l_i. It also
keeps the random state of each micro-batch, so that the pass with gradient sees the same dropout and router noise as
the pass that measured.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.data_loader import DataLoaderDispatcher
from torch import Tensor, nn

from ..objectives import Objective, evaluate_objective, routing_relevance
from ..table import IGNORED_LABEL
from .arguments import MoECalArguments


class ExampleLosses(NamedTuple):
    """Per-example figures of one micro-batch, each of shape `[n, M]` for M members, float64 and detached."""

    losses: Tensor
    regret: Tensor
    disagreement: Tensor


class BatchSummary(NamedTuple):
    """What is logged about one optimizer batch."""

    objective: float
    mean_loss: float
    effective_sample_size: float
    largest_weight: float
    relevant_share: float
    disagreement: float
    regret: float
    router_aux_loss: float = float("nan")


class OptimizerBatch:
    """State of one optimizer batch on this process.

    This one knows its coefficients before the first micro-batch is back-propagated: they are 1/N, or all losses are
    measured first. Those of `streaming.py` run every micro-batch once.

    Args:
        batches (`list`): the micro-batches, as the data loader gave them.
        args ([`MoECalArguments`]): which objective.
        accelerator (`Accelerator`): the processes that share the optimizer batch.
        eta (`float`, *optional*, defaults to 0.0): tilt of this optimizer batch.
    """

    measures_first = True

    def __init__(self, batches: list, *, args: MoECalArguments, accelerator: Accelerator, eta: float = 0.0):
        self.batches, self.eta = batches, eta
        self.args, self.accelerator = args, accelerator
        self.position = -1
        self.measured: list[ExampleLosses | None] = [None] * len(batches)
        self.random_states: list[RandomState | None] = [None] * len(batches)
        self.balances: list[Tensor] = []
        self.frontier: RandomState | None = None
        self.coefficients: list[Tensor] | None = None
        self.losses: Tensor | None = None  # of all processes, [N, M]
        self.summary: BatchSummary | None = None
        self.share = 0.0
        """1/N: what a mean over the examples of the whole optimizer batch gives each of them."""
        self._constant = 0.0

    @property
    def size(self) -> int:
        return len(self.batches)

    @property
    def at_end(self) -> bool:
        return self.position == self.size - 1

    def loss(self, losses: Tensor, alone: Tensor | None = None, balance: Tensor | None = None) -> Tensor:
        """What to back-propagate of the current micro-batch; over the batch the values add up to F, and the rest.

        Args:
            losses (`Tensor` of shape `[n, M]`): of each member of a committee (M is 1 without one), with gradient.
            alone (`Tensor` of shape `[n, M]`, *optional*): the experts' own losses, outside the tilt.
            balance (`Tensor`, *optional*): the routers' load-balancing loss, with its weight.
        """
        if self.coefficients is None:
            self.weigh()
        constant = self._constant if self.position == 0 else 0.0
        return self._sum(self.coefficients[self.position], losses, alone, balance) + constant

    def known(self, index: int) -> ExampleLosses | None:
        """What a micro-batch measured before the batch was weighed; after that a probe has nothing to tell."""
        return None if self.losses is None else self.measured[index]

    @property
    def is_empty(self) -> bool:
        """Whether no process has an example with a label in it; known once it is weighed."""
        return self.losses is not None and len(self.losses) == 0

    def settle(self, parameters: Iterable[nn.Parameter]) -> bool:
        """Completes the gradients after the last backward pass; `False` if the batch must be run again."""
        return True

    def weigh(self) -> None:
        """Gathers every process's measurements and sets the coefficients of this process's micro-batches.

        Raises:
            ValueError: a loss is NaN or infinite.
        """
        own = torch.stack([torch.cat(column) for column in zip(*self.measured, strict=True)], dim=1)
        rows, start = gather_rows(own, self.accelerator)
        self.losses = rows[:, 0]
        if self.is_empty:
            self.coefficients = [measured.losses for measured in self.measured]  # none at all
            self.summary = None
            return
        results, summaries = zip(*map(self._weighed, rows.unbind(2)), strict=True)
        coefficients = torch.stack([result.coefficients for result in results], dim=1)
        self.share = 1 / len(rows)
        self.coefficients = list(coefficients[start : start + len(own)].split([len(m.losses) for m in self.measured]))
        self.summary = _joint(summaries)
        self._constant = self.summary.objective - (coefficients * self.losses).sum().item()

    def _weighed(self, rows: Tensor) -> tuple[Objective, BatchSummary]:
        """The objective over one member's measurements `[N, 3]` of the whole optimizer batch."""
        losses, regret, disagreement = rows.unbind(1)
        args, relevant = self.args, None
        if args.objective == "robust_filtered":
            relevant = routing_relevance(
                regret,
                disagreement,
                tau_regret=args.tau_regret,
                tau_disagreement=args.tau_disagreement,
                quantile=args.relevance_quantile,
            )
        tilted = args.is_robust and self.eta > 0
        result = evaluate_objective(
            args.objective if tilted else "erm",
            losses,
            relevant=relevant,
            eta=self.eta,
            detach_weights=args.detach_weights,
        )
        return result, _summarise(result, losses, relevant, regret, disagreement)

    def weigh_equally(self, counts: list[int]) -> None:
        """Gives each of the batch's examples the coefficient 1/N: what a mean needs, with no first pass."""
        own = torch.tensor(counts, dtype=torch.float64, device=self.accelerator.device)
        self.share = 1 / self.accelerator.gather(own.sum()[None]).sum().clamp(min=1).item()
        self.coefficients = [torch.full((n, 1), self.share, dtype=own.dtype, device=own.device) for n in counts]

    def _sum(self, weights: Tensor, losses: Tensor, alone: Tensor | None, balance: Tensor | None) -> Tensor:
        total = (weights.to(losses.dtype) * losses).sum()
        if alone is not None:
            total = total + self.args.expert_loss_weight * self.share * alone.sum()
        total = self.accelerator.num_processes * total  # gradients are averaged over processes
        return total if balance is None else total + balance

    def mean_balance(self) -> float:
        """Mean load-balancing loss of this process's micro-batches; NaN where it is off."""
        return torch.stack(self.balances).mean().item() if self.balances else float("nan")


def average_summaries(summaries: list[BatchSummary], *, accelerator: Accelerator) -> dict[str, float]:
    """Means over optimizer batches and, where these differ, processes; figures that a run does not have are out."""
    means = dict(zip(BatchSummary._fields, torch.tensor(summaries, dtype=torch.float64).nanmean(dim=0), strict=True))
    if not means["router_aux_loss"].isnan():
        means["router_aux_loss"] = accelerator.gather(means["router_aux_loss"].to(accelerator.device)[None]).mean()
    return {name: value.item() for name, value in means.items() if not value.isnan()}


def _summarise(
    result: Objective, losses: Tensor, relevant: Tensor | None, regret: Tensor, disagreement: Tensor
) -> BatchSummary:
    return BatchSummary(
        objective=result.value,
        mean_loss=losses.mean().item(),
        effective_sample_size=result.effective_sample_size,
        largest_weight=result.weights.max().item(),
        relevant_share=float("nan") if relevant is None else relevant.double().mean().item(),
        disagreement=disagreement.mean().item(),
        regret=regret.mean().item(),
    )


def _joint(summaries: tuple[BatchSummary, ...]) -> BatchSummary:
    """Of a committee: the sum of the members' objectives, which have no parameter in common, and means of the rest."""
    means = BatchSummary(*(sum(column) / len(summaries) for column in zip(*summaries, strict=True)))
    return means._replace(objective=sum(summary.objective for summary in summaries))


def without_repeats(batch: dict[str, Any], accelerator: Accelerator) -> dict[str, Any]:
    """Takes the labels off the rows that a data loader repeats at its end to give every process as many.

    Rows without label are no examples of the objective; their tokens still run, and count in the load of the routers.

    Args:
        batch (`dict`): the micro-batch that was just taken from the active data loader.
        accelerator (`Accelerator`): that prepared the loader.

    Raises:
        ValueError: the loader repeats rows, and which cannot be known.
    """
    loader = accelerator.gradient_state.active_dataloader
    at_end = getattr(loader, "end_of_dataloader", False)
    if accelerator.num_processes == 1 or not at_end or batch.get("labels") is None:
        return batch
    labels = batch["labels"].clone()
    rows = loader.remainder if isinstance(loader, DataLoaderDispatcher) else _rows_at_end(loader)
    if rows is not None:
        labels[max(rows - accelerator.process_index * len(labels), 0) :] = IGNORED_LABEL
    return {**batch, "labels": labels}


def _rows_at_end(loader: Any) -> int | None:
    """Rows of an epoch's last micro-batch, over all processes, before it was filled up; `None` if it was not."""
    sampler, shard = loader.batch_sampler, None
    while hasattr(sampler, "batch_sampler"):  # what skips the batches before a checkpoint, what shares them out
        shard = sampler if hasattr(sampler, "even_batches") else shard
        sampler = sampler.batch_sampler
    if shard is None or not shard.even_batches or shard.drop_last:
        return None
    if shard.batch_size is None:
        raise ValueError(
            f"{type(sampler).__name__} has no `batch_size`, so which rows are repeated is unknown; set "
            "accelerator_config={'even_batches': False} and give every process as many batches."
        )
    size = shard.batch_size * (1 if shard.split_batches else shard.num_processes)
    return len(getattr(sampler, "sampler", loader.dataset)) % size or size


def gather_rows(own: Tensor, accelerator: Accelerator) -> tuple[Tensor, int]:
    """Concatenates every process's rows in rank order, however many each has.

    Returns:
        `tuple[Tensor, int]`: all rows, and the index of this process's first row.
    """
    if accelerator.num_processes == 1:
        return own, 0
    counts = accelerator.gather(torch.tensor([len(own)], device=own.device))
    padded = own.new_zeros(int(counts.max()), *own.shape[1:])
    padded[: len(own)] = own
    everyone = accelerator.gather(padded[None])
    rows = torch.cat([block[:count] for block, count in zip(everyone, counts.tolist(), strict=True)])
    return rows, int(counts[: accelerator.process_index].sum())


class RandomState(NamedTuple):
    """Random state of the CPU and of the accelerator that the model runs on."""

    cpu: Tensor
    device: Tensor | None

    @classmethod
    def current(cls, device: torch.device) -> RandomState:
        on_device = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)
        return cls(torch.get_rng_state(), on_device)

    def restore(self, device: torch.device) -> None:
        torch.set_rng_state(self.cpu)
        if self.device is not None:
            torch.get_device_module(device).set_rng_state(self.device, device)
