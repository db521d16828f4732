"""How a batch is judged while a model trains: run as short as it can be, it gives losses, regret and disagreement."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .choice import OptionSupervision, WordSupervision, flat_inputs, supervise_choice
from .head import RowSelector
from .objectives import example_losses
from .prefix_cache import PrefixCache
from .probes import ExpertProbe, probe_experts
from .table import IGNORED_LABEL
from .tasks import Supervision, real_tokens, supervise_classification, supervise_lm, token_figures
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
    """

    def __init__(self, model: nn.Module, args: MoECalArguments):
        self._model, self._args = model, args
        self._selector: RowSelector | None = None
        self._probe: ExpertProbe | None = None
        self._prefix: PrefixCache | None = None
        self._supervision: Judged | None = None

    def __enter__(self) -> Judge:
        with ExitStack() as stack:
            if self._args.prefix_cache is not None:
                cache = PrefixCache(self._model, self._args.prefix_cache, dtype=self._args.prefix_cache_dtype)
                self._prefix = stack.enter_context(cache)
            if self._args.objective == "robust_filtered":
                self._probe = stack.enter_context(probe_experts(self._model, layer=self._args.probe_layer))
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
        with self._replaying(inputs) as batch, self._selecting(self._supervision.tokens):
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

    def losses(self, outputs: Any, *, plain: bool = False) -> Tensor:
        """Loss of each example, `[num_examples]`, with gradient; plain cross-entropy, or the objective's own."""
        supervision, args = self._supervision, self._args
        own = {"objective": args.objective, "label_smoothing": args.label_smoothing_factor}
        loss = partial(example_losses, **({} if plain else {**own, "focal_gamma": args.focal_gamma}))
        rows = self._reduced(outputs, lambda part, logits: supervision.row_values(part, logits, loss))
        return supervision.example_losses(rows, loss)

    @torch.no_grad()
    def measure(self, losses: Tensor) -> Measurement:
        """The losses with each example's regret and disagreement, NaN where nothing probes."""
        regret = disagreement = torch.full_like(losses, float("nan"), dtype=torch.float64)
        if self._probe is not None and len(losses):
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
            found = self._reduced(outputs, lambda part, logits: token_figures(logits, supervision.labels[part]))
            nll, confidence, prediction, brier = found.unbind(-1)
            correct = (prediction == supervision.labels).float()
            return {"logits": self._spread(nll=nll, confidence=confidence, correct=correct, brier=brier)}
        return outputs

    def _spread(self, **figures: Tensor) -> dict[str, Tensor]:
        """Figures of the judged positions, laid out like the batch."""
        spread = {}
        for name, values in figures.items():
            spread[name] = values.new_full(self._shape, IGNORED_LABEL)
            spread[name].view(-1)[self._positions] = values
        return spread

    def _reduced(self, outputs: Any, reduce: Callable[[slice, Tensor], Tensor]) -> Tensor:
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
        if self._selector is not None:
            return self._selector.reduced(logits, reduce)
        return reduce(slice(None), logits[self._supervision.rows])

    def _selecting(self, tokens: Tensor | None) -> AbstractContextManager[None]:
        return nullcontext() if self._selector is None else self._selector.selecting(tokens)
