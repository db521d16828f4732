"""How a batch is judged while a model trains: run as short as it can be, it gives losses, regret and disagreement."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .aux_loss import RouterBalance
from .choice import OptionSupervision, WordSupervision, flat_inputs, supervise_choice
from .head import RowSelector
from .objectives import example_losses
from .prefix_cache import PrefixCache
from .probes import ExpertProbe, probe_experts
from .readout import ClassifierReadout, Mixed, Mixture, Readout, mean_expert_loss, mixed_agreement
from .table import IGNORED_LABEL
from .tasks import Loss, Supervision, real_tokens, supervise_classification, supervise_lm, token_figures
from .training_args import MoECalArguments
from .window import Measurement


Judged = Supervision | OptionSupervision | WordSupervision


class Judge:
    """Attaches to a model what its arguments need (row selector, prefix cache, expert probe) and reads its forwards.

    ```python
    with Judge(model, args) as judge, judge.batch(inputs) as batch:
        losses = judge.losses(model(**batch))
    ```

    Args:
        model (`nn.Module`): the model, not yet wrapped for distribution.
        args ([`MoECalArguments`]): which task, which objective.
        balanced (`bool`, *optional*, defaults to `False`): whether `balance` is asked for.
    """

    def __init__(self, model: nn.Module, args: MoECalArguments, *, balanced: bool = False):
        self._model, self._args = model, args
        self._routers = RouterBalance(model) if balanced else None
        self._selector: RowSelector | None = None
        self._probe: ExpertProbe | None = None
        self._prefix: PrefixCache | None = None
        self._mixture: Mixture | None = None
        self._classifier: ClassifierReadout | None = None
        self._supervision: Judged | None = None
        self._alone: dict[str, Tensor] = {}

    def __enter__(self) -> Judge:
        with ExitStack() as stack:
            if self._args.prefix_cache is not None:
                cache = PrefixCache(self._model, self._args.prefix_cache, dtype=self._args.prefix_cache_dtype)
                self._prefix = stack.enter_context(cache)
            if self._routers is not None:
                stack.enter_context(self._routers)
            if self._args.objective == "robust_filtered" or self._args.readout != "native":
                self._probe = stack.enter_context(probe_experts(self._model, layer=self._args.probe_layer))
            if self._args.readout != "native":
                self._mixture = Mixture(self._probe, Readout(self._args.readout, self._args.readout_experts))
            if self._mixture is not None and self._args.task == "classification":
                self._classifier = stack.enter_context(ClassifierReadout(self._model, self._mixture))
            if self._args.task != "classification":
                quiet = nullcontext if self._probe is None else self._probe.paused
                self._selector = stack.enter_context(RowSelector(self._model, quiet=quiet))
            self._instruments = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._instruments.close()

    def prepare(self, dataset: Any) -> None:
        """Fills the prefix cache with a classifier's tokenized dataset in batches of similar length."""
        columns = getattr(dataset, "column_names", None) or ()
        filled = self._prefix is not None and self._args.task == "classification"
        if filled and "input_ids" in columns and hasattr(dataset, "__len__"):
            self._prefix.fill(real_tokens(dataset), progress=not self._args.disable_tqdm)

    def supervise(self, inputs: Mapping[str, Any]) -> Judged:
        """The judged rows of a batch."""
        if self._args.task == "choice":
            return supervise_choice(inputs)
        if self._args.task == "lm":
            return supervise_lm(inputs, per_token=self._args.example == "token")
        config = self._model.config.get_text_config()
        return supervise_classification(inputs, config.pad_token_id, self._model.config.num_labels)

    @contextmanager
    def batch(self, inputs: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Gives the batch to run, as short as it can be; within the block a forward of it can be judged."""
        self._supervision = self.supervise(inputs)
        self._positions, self._shape = self._supervision.tokens, inputs["input_ids"].shape
        inputs = flat_inputs(inputs) if self._args.task == "choice" else inputs
        watched = nullcontext() if self._routers is None else self._routers.watching(inputs)
        judged = self._supervision.tokens
        # A mixture has no use for the model's own logits, but the model's forward cannot do without any.
        selected = judged if self._mixture is None else judged[:1]
        with self._replaying(inputs) as batch, self._selecting(selected), watched:
            yield batch

    @contextmanager
    def _replaying(self, inputs: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The judged tokens alone, each a sequence, where all that comes before the last MoE block is cached."""
        judged = self._supervision.tokens
        if self._prefix is None or not len(judged):
            yield dict(inputs)
        elif self._args.task == "classification":  # one token of every sequence, also of those without a label
            with self._prefix.replaying(inputs) as short:
                self._supervision = self.supervise(short)
                yield short
        else:
            alone = torch.arange(len(judged), device=judged.device)
            with self._prefix.replaying(inputs, judged) as short:
                self._supervision = self._supervision._replace(tokens=alone)
                yield short

    def balance(self) -> Tensor | None:
        """Load-balancing loss of the forward, with gradient; `None` where it is off or the forward has no gradient."""
        return None if self._routers is None or not torch.is_grad_enabled() else self._routers.loss()

    def losses(self, outputs: Any, *, plain: bool = False) -> Tensor:
        """Loss of each example, `[num_examples]`, with gradient; plain cross-entropy, or the objective's own."""
        supervision, args = self._supervision, self._args
        own = {"objective": args.objective, "label_smoothing": args.label_smoothing_factor}
        loss = partial(example_losses, **({} if plain else {**own, "focal_gamma": args.focal_gamma}))
        wanted = self._asked_of_experts()
        if wanted and len(supervision.tokens):
            rows = self._rows_with_experts(wanted, loss)
        else:
            rows = self._reduced(outputs, lambda part, logits: supervision.row_values(part, logits, loss))
            self._alone = {name: rows.new_zeros(0) for name in wanted}
        return supervision.example_losses(rows, loss)

    def expert_losses(self) -> Tensor:
        """Loss of each example's experts on their own, `[num_examples]`, with gradient; of the last `losses`."""
        return self._alone["expert_loss"]

    @torch.no_grad()
    def measure(self, losses: Tensor) -> Measurement:
        """The losses with each example's regret and disagreement, NaN where nothing probes."""
        regret = disagreement = torch.full_like(losses, float("nan"), dtype=torch.float64)
        if "regret" in self._alone:
            disagreement, regret = (self._alone[name].double() for name in ("disagreement", "regret"))
        elif self._probe is not None and self._mixture is None and len(losses):
            with self._selecting(None):  # the probe calls the head on rows of its own choice
                disagreement, regret = (values.double() for values in self._supervision.probed(self._probe))
        return Measurement(losses.detach().double(), regret, disagreement)

    @torch.no_grad()
    def predictions(self, outputs: Any) -> Any:
        """What evaluation collects of a forward: a classifier's outputs as they are; log-probabilities `[B, O]` of
        answer options; figures `[B, S]` of a language model's supervised tokens, -100 at other positions.
        """
        supervision = self._supervision
        if self._args.task == "choice":
            rows = self._reduced(outputs, lambda part, logits: supervision.row_values(part, logits, example_losses))
            # Trainer pads batches of fewer options with -100, which among log-probabilities is as good as zero.
            return {"logits": supervision.scores(rows).log_softmax(-1)}
        if self._args.task == "lm":
            nll, confidence, prediction, brier = self.row_figures(outputs, token_figures).unbind(-1)
            correct = (prediction == supervision.labels).float()
            return {"logits": self._spread(nll=nll, confidence=confidence, correct=correct, brier=brier)}
        return outputs

    @torch.no_grad()
    def row_figures(self, outputs: Any, figures: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """`figures(logits [c, V], labels [c])` over chunks of a language model's supervised tokens, joined."""
        labels = self._supervision.labels
        return self._reduced(outputs, lambda part, logits: figures(logits, labels[part]))

    def _spread(self, **figures: Tensor) -> dict[str, Tensor]:
        """Figures of the judged positions, laid out like the batch."""
        spread = {}
        for name, values in figures.items():
            spread[name] = values.new_full(self._shape, IGNORED_LABEL)
            spread[name].view(-1)[self._positions] = values
        return spread

    def _asked_of_experts(self) -> list[str]:
        """What a mixture's experts are asked on their own."""
        if self._mixture is None:
            return []
        filtered = ["disagreement", "regret"] if self._args.objective == "robust_filtered" else []
        return filtered + (["expert_loss"] if self._args.expert_loss_weight else [])

    def _rows_with_experts(self, wanted: list[str], loss: Loss) -> Tensor:
        """The supervision's row values of the mixture; what its experts do on their own is kept."""
        supervision = self._supervision

        def reduce(part: slice, mixed: Mixed) -> Tensor:
            narrow, labels = supervision.narrowed(part, mixed)
            alone = list(mixed_agreement(narrow, labels)) if "regret" in wanted else []
            alone += [mean_expert_loss(narrow, labels)] if "expert_loss" in wanted else []
            values = supervision.row_values(part, mixed.log_probs, loss)
            return torch.cat([torch.stack(alone, dim=1), values.reshape(len(labels), -1)], dim=1)

        found = self._mixed(reduce)
        alone = found[:, : len(wanted)].unbind(1)
        self._alone = {name: supervision.mean_by_example(column) for name, column in zip(wanted, alone, strict=True)}
        return found[:, len(wanted) :].squeeze(1)

    def _mixed(self, reduce: Callable[[slice, Mixed], Tensor]) -> Tensor:
        """`reduce` over chunks of the judged rows of a mixture; a classifier's was made in its forward."""
        if self._classifier is None:
            return self._mixture.reduced(self._supervision.tokens, reduce)
        return reduce(slice(None), Mixed(*(values[self._supervision.rows] for values in self._classifier.mixed)))

    def _reduced(self, outputs: Any, reduce: Callable[[slice, Tensor], Tensor]) -> Tensor:
        if self._mixture is not None and len(self._supervision.tokens):
            return self._mixed(lambda part, mixed: reduce(part, mixed.log_probs))
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
        if self._selector is not None:
            return self._selector.reduced(logits, reduce)
        return reduce(slice(None), logits[self._supervision.rows])

    def _selecting(self, tokens: Tensor | None) -> AbstractContextManager[None]:
        return nullcontext() if self._selector is None else self._selector.selecting(tokens)
