"""How a batch is judged while a model trains: run as short as it can be, it gives losses, regret and disagreement."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..model.prefix_cache import PrefixCache
from ..objectives import example_losses
from ..readouts.attached import AttachedReadout, Member, logits_of
from ..readouts.mixture import Mixed, Readout, mean_expert_loss, mixed_agreement
from ..table import IGNORED_LABEL
from ..tasks.choice import OptionTargets, WordTargets, choice_targets, flat_inputs
from ..tasks.targets import (
    Loss,
    Targets,
    class_targets,
    classification_targets,
    lm_targets,
    real_tokens,
    token_figures,
)
from .arguments import MoECalArguments
from .aux_loss import RouterBalance
from .optimizer_batch import ExampleLosses


AnyTargets = Targets | OptionTargets | WordTargets


class LossComputer:
    """Attaches to a model what its arguments need (row selector, prefix cache, expert probe) and reads its forwards.

    The members of a committee are judged each by itself while they train, and together in evaluation.

    ```python
    with LossComputer(model, args) as computer, computer.batch(inputs) as batch:
        losses = computer.losses(model(**batch))
    ```

    Args:
        model (`nn.Module`): the model, not yet wrapped for distribution.
        args ([`MoECalArguments`]): which task, which objective.
        balanced (`bool`, *optional*, defaults to `False`): whether `balance` is asked for.
    """

    def __init__(self, model: nn.Module, args: MoECalArguments, *, balanced: bool = False):
        self._model, self._args = model, args
        self._routers = RouterBalance(model) if balanced else None
        self._prefix: PrefixCache | None = None
        self._attached: AttachedReadout | None = None
        self._targets: AnyTargets | None = None
        self._alone: list[dict[str, Tensor]] = []
        self._is_whole = False
        self._whole: Tensor | None = None
        self.evaluated: dict[str, Any] = {}
        """Of the last `evaluate`, what [`MeanLoss.add`] takes."""

    def __enter__(self) -> LossComputer:
        with ExitStack() as stack:
            if self._args.prefix_cache is not None:
                cache = PrefixCache(self._model, self._args.prefix_cache, dtype=self._args.prefix_cache_dtype)
                self._prefix = stack.enter_context(cache)
            if self._routers is not None:
                stack.enter_context(self._routers)
            args = self._args
            attached = AttachedReadout(
                self._model,
                Readout(args.readout, args.readout_experts),
                probed=args.objective == "robust_filtered",
                layer=args.probe_layer,
                rows=args.task != "classification",
            )
            self._attached = stack.enter_context(attached)
            self._instruments = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._instruments.close()

    def prepare(self, dataset: Any) -> None:
        """Fills the prefix cache with a classifier's tokenized dataset in batches of similar length."""
        columns = getattr(dataset, "column_names", None) or ()
        filled = self._prefix is not None and self._args.task == "classification"
        if filled and "input_ids" in columns and hasattr(dataset, "__len__"):
            self._prefix.fill(real_tokens(dataset, broken="drop"), progress=not self._args.disable_tqdm)

    def targets(self, inputs: Mapping[str, Any]) -> AnyTargets:
        """The judged rows of a batch."""
        if self._args.task == "choice":
            return choice_targets(inputs)
        if self._args.task == "lm":
            return lm_targets(inputs, per_token=self._args.example == "token")
        config = getattr(self._model, "config", None)
        if config is None:  # a module of the user's own: its outputs are judged as they are
            return class_targets(inputs)
        return classification_targets(inputs, config.get_text_config().pad_token_id, config.num_labels)

    @contextmanager
    def batch(self, inputs: Mapping[str, Any], *, whole: bool = False) -> Iterator[dict[str, Any]]:
        """Gives the batch to run, as short as it can be; within the block a forward of it can be judged.

        Args:
            inputs (`Mapping`): the batch, as its collator made it.
            whole (`bool`, *optional*, defaults to `False`): whether a language model is asked at all positions, also
                of rows without labels; see [`whole`].
        """
        self._is_whole, self._whole = whole, None
        if whole:
            self._targets = None if inputs.get("labels") is None else self.targets(inputs)
            asked = torch.arange(inputs["input_ids"].numel(), device=inputs["input_ids"].device)
            alone = len(self._attached.members) == 1 and self._attached.members[0].mixture is None
            self._shape = inputs["input_ids"].shape
            self._positions = None if self._targets is None else self._targets.tokens
            with self._attached.at(None if alone else asked):
                yield dict(inputs)
            return
        self._targets = self.targets(inputs)
        self._positions = self._targets.tokens
        self._shape = inputs.get("input_ids", inputs["labels"]).shape
        inputs = flat_inputs(inputs) if self._args.task == "choice" else inputs
        watched = nullcontext() if self._routers is None else self._routers.watching(inputs)
        with self._replaying(inputs) as batch, self._attached.at(self._targets.tokens), watched:
            yield batch

    @contextmanager
    def _replaying(self, inputs: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The judged tokens alone, each a sequence, where all that comes before the last MoE block is cached."""
        judged = self._targets.tokens
        if self._prefix is None or not len(judged):
            yield dict(inputs)
        elif self._args.task == "classification":  # one token of every sequence, also of those without a label
            with self._prefix.replaying(inputs) as short:
                self._targets = self.targets(short)
                yield short
        else:
            alone = torch.arange(len(judged), device=judged.device)
            with self._prefix.replaying(inputs, judged) as short:
                self._targets = self._targets._replace(tokens=alone)
                yield short

    def balance(self) -> Tensor | None:
        """Load-balancing loss of the forward, with gradient; `None` where it is off or the forward has no gradient."""
        return None if self._routers is None or not torch.is_grad_enabled() else self._routers.loss()

    def losses(self, outputs: Any) -> Tensor:
        """The objective's own loss of each example for each member, `[num_examples, M]`, with gradient.

        Args:
            outputs (`Any`): of the forward.
        """
        targets, args = self._targets, self._args
        own = {"objective": args.objective, "label_smoothing": args.label_smoothing_factor}
        loss = partial(example_losses, **own, focal_gamma=args.focal_gamma)
        self._alone, columns = [], []
        for number, output in enumerate(self._attached.outputs(outputs)):
            rows, alone = self._rows(number, output, loss)
            columns.append(targets.example_losses(rows, loss))
            self._alone.append(alone)
        return torch.stack(columns, dim=1)

    def evaluate(self, outputs: Any) -> Tensor:
        """Mean cross-entropy of what all members predict together, over the batch's examples; with gradient."""
        targets = self._targets
        rows = self._together(outputs, lambda part, logits: targets.row_values(part, logits, example_losses))
        losses = targets.example_losses(rows, example_losses)
        row_of = targets.batch_rows(
            targets.rows if self._args.task == "classification" else self._positions // self._shape[-1]
        )
        values = torch.stack([losses.detach().double(), torch.ones_like(losses, dtype=torch.float64)], dim=1)
        by_row = values.new_zeros(self._shape[0], 2).index_add(0, row_of, values)
        self.evaluated = {"rows": by_row, "packed": self._is_packed()}
        return losses.mean()

    def expert_losses(self) -> Tensor:
        """Loss of each example's experts on their own, `[num_examples, M]`, with gradient; of the last `losses`."""
        return torch.stack([alone["expert_loss"] for alone in self._alone], dim=1)

    @torch.no_grad()
    def measure(self, losses: Tensor, *, known: ExampleLosses | None = None) -> ExampleLosses:
        """The losses with each example's regret and disagreement, NaN where nothing probes; or those known already."""
        if known is not None:
            return known._replace(losses=losses.detach().double())
        regret = torch.full_like(losses, float("nan"), dtype=torch.float64)
        disagreement = regret.clone()
        for number, (member, alone) in enumerate(zip(self._attached.members, self._alone, strict=True)):
            if "regret" in alone:
                disagreement[:, number], regret[:, number] = alone["disagreement"], alone["regret"]
            elif member.probe is not None and member.mixture is None:
                with member.selecting(None):  # the probe calls the head on rows of its own choice
                    if len(losses):
                        disagreement[:, number], regret[:, number] = self._targets.probed(member.probe)
                    else:
                        member.probe.keep_step()
        return ExampleLosses(losses.detach().double(), regret, disagreement)

    @torch.no_grad()
    def predictions(self, outputs: Any) -> Any:
        """What evaluation collects of a forward: a classifier's outputs as they are; log-probabilities `[B, O]` of
        answer options; figures `[B, S]` of a language model's supervised tokens, -100 at other positions.
        """
        targets = self._targets
        if self._args.task == "choice":
            rows = self._together(outputs, lambda part, logits: targets.row_values(part, logits, example_losses))
            # Trainer pads batches of fewer options with -100, which among log-probabilities is as good as zero.
            return {"logits": targets.scores(rows).log_softmax(-1)}
        if self._args.task == "lm":
            if self._is_whole:
                return {"logits": self.whole(outputs)}
            nll, confidence, prediction, brier = self.row_figures(outputs, token_figures).unbind(-1)
            correct = (prediction == targets.labels).float()
            return {"logits": self._spread(nll=nll, confidence=confidence, correct=correct, brier=brier)}
        return outputs

    @torch.no_grad()
    def row_figures(self, outputs: Any, figures: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """`figures(logits [c, V], labels [c])` over chunks of a language model's supervised tokens, joined."""
        labels = self._targets.labels
        return self._together(outputs, lambda part, logits: figures(logits, labels[part]))

    def whole(self, outputs: Any) -> Tensor:
        """What a language model predicts at all positions, `[B, S, V]`: its own logits, or the log-probabilities of a
        mixture or committee; of a forward in a block of `batch(..., whole=True)`.
        """
        if self._whole is None and len(self._attached.members) == 1 and self._attached.members[0].mixture is None:
            self._whole = logits_of(outputs)
        elif self._whole is None:
            self._whole = self._attached.together(outputs, lambda part, log_probs: log_probs)
            self._whole = self._whole.unflatten(0, tuple(self._shape))
        return self._whole

    def _is_packed(self) -> bool:
        """Whether a row of the batch holds several sequences."""
        targets = self._targets
        if not isinstance(targets, Targets) or self._args.task != "lm":
            return False
        return len(targets.rows.unique()) > len((self._positions // self._shape[1]).unique())

    def _spread(self, **figures: Tensor) -> dict[str, Tensor]:
        """Figures of the judged positions, laid out like the batch, with the sequence that each belongs to."""
        figures["sequence"] = self._targets.rows.to(next(iter(figures.values())).dtype)
        spread = {}
        for name, values in figures.items():
            spread[name] = values.new_full(self._shape, IGNORED_LABEL)
            spread[name].view(-1)[self._positions] = values
        return spread

    def _rows(self, number: int, output: Any, loss: Loss) -> tuple[Tensor, dict[str, Tensor]]:
        """The targets' row values of one member, and what its experts are asked on their own, by example."""
        targets, wanted = self._targets, self._asked_of_experts()

        def values(part: slice, logits: Tensor) -> Tensor:
            return targets.row_values(part, logits, loss)

        if not (wanted and len(targets.tokens)):
            rows = self._reduced(number, output, values)
            return rows, {name: rows.new_zeros(0) for name in wanted}

        def with_experts(part: slice, mixed: Mixed) -> Tensor:
            narrow, labels = targets.narrowed(part, mixed)
            alone = list(mixed_agreement(narrow, labels)) if "regret" in wanted else []
            alone += [mean_expert_loss(narrow, labels)] if "expert_loss" in wanted else []
            own = values(part, mixed.log_probs).reshape(len(labels), -1)
            return torch.cat([torch.stack(alone, dim=1), own], dim=1)

        found = self._mixed(number, with_experts)
        alone = found[:, : len(wanted)].unbind(1)
        asked = {name: targets.mean_by_example(column) for name, column in zip(wanted, alone, strict=True)}
        return found[:, len(wanted) :].squeeze(1), asked

    def _asked_of_experts(self) -> list[str]:
        """What a mixture's experts are asked on their own."""
        if self._args.readout == "native":
            return []
        filtered = ["disagreement", "regret"] if self._args.objective == "robust_filtered" else []
        return filtered + (["expert_loss"] if self._args.expert_loss_weight else [])

    def _mixed(self, number: int, reduce: Callable[[slice, Mixed], Tensor]) -> Tensor:
        """`reduce` over chunks of the judged rows of a member's mixture; a classifier's was made in its forward."""
        if self._attached.parts:
            return reduce(slice(None), self._attached.parts[number].rows(self._targets.rows))
        return self._attached.members[number].mixture.reduced(self._targets.tokens, reduce)

    def _reduced(self, number: int, output: Any, reduce: Callable[[slice, Tensor], Tensor]) -> Tensor:
        """`reduce` over chunks of a member's logits at the judged rows."""
        member: Member = self._attached.members[number]
        if self._attached.parts or (member.mixture is not None and len(self._targets.tokens)):
            return self._mixed(number, lambda part, mixed: reduce(part, mixed.log_probs))
        if member.selector is not None:
            return member.selector.reduced(logits_of(output), reduce)
        return reduce(slice(None), logits_of(output)[self._targets.rows])

    def _together(self, outputs: Any, reduce: Callable[[slice, Tensor], Tensor]) -> Tensor:
        """`reduce` over chunks of what all members predict together at the judged rows."""
        if self._is_whole:
            return reduce(slice(None), self.whole(outputs).flatten(0, 1)[self._targets.tokens])
        if len(self._attached.members) == 1:
            return self._reduced(0, outputs, reduce)
        if self._args.task == "classification":
            return reduce(slice(None), logits_of(outputs)[self._targets.rows])
        return self._attached.together(outputs, reduce)
