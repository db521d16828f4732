"""Language models: columns of the predictions table for answer options, sequences and tokens."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..model.prefix_cache import PrefixCache
from ..readouts.attached import AttachedReadout
from ..readouts.mixture import Readout
from ..table import ABSENT_LOGIT
from ..tasks.choice import ChoiceCollator, EncodedChoice
from ..tasks.options import OptionTargets, WordTargets, choice_targets, flat_inputs
from ..tasks.targets import Targets, lm_targets
from .classifier import cut_short
from .figures import nothing_supervised, option_figures, sequence_figures, token_figures, word_figures
from .reuse import Beginning, begin, common_length
from .supervised import LM_COLUMNS, Supervised, encode_supervised, pad_supervised


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

AnyTargets = Targets | OptionTargets | WordTargets
_LEAST_SHARED = 16  # tokens that all rows have to begin with in common, for it to be worth a forward
_WORTH = 0.8  # of the tokens that a batch takes without reading its prompts first
_EXACT = 1e-5  # largest difference that going on from a cache may make, relative to the scale of the scores


class Example(NamedTuple):
    """One row of the dataset in tokens.

    Attributes:
        sequences (`list[list[int]]`): what the model is run on: the prompt with each option, the prompt of label
            words, or the text.
        judged (`int`): the first position whose prediction is judged, in any of them.
        content (`EncodedChoice` or `Supervised`): what the batch is made from.
    """

    sequences: list[list[int]]
    judged: int
    content: EncodedChoice | Supervised

    @property
    def length(self) -> int:
        return max(map(len, self.sequences))

    @property
    def count(self) -> int:
        return len(self.sequences)

    @property
    def stem(self) -> int:
        """Length of what the sequences begin with in common before anything is judged."""
        return common_length(self.sequences, self.judged) if self.count > 1 else self.judged


class Reuse(NamedTuple):
    """Which beginnings of the sequences are computed once."""

    shared: bool  # that of all rows
    stems: bool  # those of each row's options


_NOTHING = Reuse(False, False)


class LanguageReader:
    """Reads what a language model predicts of answer options or of tokens. A context manager; see [`predict`]."""

    def __init__(
        self,
        model: nn.Module,
        dataset: Dataset,
        *,
        task: str,
        scoring: str,
        example: str,
        tokenizer: PreTrainedTokenizerBase | None,
        max_length: int | None,
        text_column: str,
        layer: int | None,
        readout: Readout,
        prefix: PrefixCache | None,
    ) -> None:
        self._model, self._task, self._per_token = model, task, task == "lm" and example == "token"
        self._layer, self._readout, self._prefix = layer, readout, prefix
        self._tokenizer, self._text = tokenizer, text_column
        self._collate = ChoiceCollator(tokenizer, scoring=scoring, max_length=max_length)
        self._width = _most_options(dataset) if task == "choice" else 0
        self._device = next(model.parameters()).device
        self._shared: list[int] = []
        self._shared_run: Beginning | None = None
        self._verified: dict[Reuse, bool] = {}
        self._warned: set[Reuse] = set()
        self.inputs = ("prompt_ids", "option_ids", "labels") if task == "choice" else LM_COLUMNS
        if self._per_token:
            self.inputs = (*self.inputs, "prompt", "completion", text_column)

    def __enter__(self) -> LanguageReader:
        layer = -1 if self._layer is None else self._layer
        self._attached = AttachedReadout(
            self._model, self._readout, probed=self._layer is not None, layer=layer, rows=True
        )
        self._attached.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._attached.__exit__(*exception)

    @property
    def readout(self) -> Readout:
        """What predicts, also of how many members."""
        return self._attached.readout

    def encode(self, rows: Dataset) -> list[Example]:
        """The rows in tokens."""
        return self._encode(rows, self._collate)

    def truncated(self, rows: Dataset, examples: Sequence[Example]) -> list[bool] | None:
        """Which examples are not the whole text or prompt; `None` where nothing is cut."""
        uncut = ChoiceCollator(self._tokenizer, scoring=self._collate.scoring)

        def whole(near: list[int]) -> list[int]:
            return [example.length for example in self._encode(rows.select(near), uncut)]

        return cut_short([example.length for example in examples], self._collate.max_length, whole)

    def _encode(self, rows: Dataset, collate: ChoiceCollator) -> list[Example]:
        if self._task == "lm":
            found = encode_supervised(rows, self._tokenizer, text_column=self._text, max_length=collate.max_length)
            return [Example([content.ids], content.judged, content) for content in found]
        encoded = collate.encode(list(rows))
        if collate.scoring == "label_word":
            prompts = [content.options[0] for content in encoded]
            return [Example([ids[:start]], start - 1, c) for (ids, start), c in zip(prompts, encoded, strict=True)]
        return [Example([ids for ids, _ in c.options], min(s for _, s in c.options) - 1, c) for c in encoded]

    def begin(self, examples: Sequence[Example], *, progress: bool) -> None:
        """What is done once for examples that are read in batches afterwards."""
        self._shared_run, self._verified = None, {}
        self._shortest = min(examples, key=lambda example: example.length)
        firsts = [example.sequences[0] for example in examples]
        length = common_length(firsts, min(example.stem for example in examples)) if len(examples) > 1 else 0
        self._shared = firsts[0][:length] if length >= _LEAST_SHARED else []

    def read(self, examples: Sequence[Example]) -> list[list[dict[str, Any]]]:
        """The rows of the table for each example."""
        reuse = Reuse(bool(self._shared), self._worth(examples))
        for tried in dict.fromkeys([reuse, Reuse(False, reuse.stems), _NOTHING]):
            if self._prefix is not None or len(self._attached.members) > 1 or tried == _NOTHING:
                break  # a committee reads whole sequences
            if tried not in self._verified:
                self._verified[tried] = self._verify(tried, [examples[0], self._shortest])
            if self._verified[tried]:
                return self._rows(examples, tried)
        return self._rows(examples, _NOTHING)

    def named(self, ids: list[Any], made: dict[str, list]) -> dict[str, list]:
        """The rows' names."""
        if not self._per_token:
            return {"id": ids}
        return {"id": [f"{row}:{at}" for row, at in zip(ids, made.get("position", ()), strict=True)], "sequence": ids}

    # What sequences begin with

    def _worth(self, examples: Sequence[Example]) -> bool:
        """Whether reading the prompts first saves tokens."""
        if all(example.count == 1 for example in examples):
            return False
        skipped = len(self._shared)
        whole = sum(len(ids) - skipped for example in examples for ids in example.sequences)
        parts = sum(e.stem - skipped + sum(len(ids) - e.stem for ids in e.sequences) for e in examples)
        return parts <= _WORTH * whole

    def _verify(self, reuse: Reuse, examples: Sequence[Example]) -> bool:
        """Whether it gives what whole sequences give, on a long and a short row."""
        expected = self._figures(examples, _NOTHING)
        scale = max(1.0, *map(_largest, _floats(expected)))
        dtype = next(self._model.parameters()).dtype
        bound = scale * (_EXACT if dtype in (torch.float32, torch.float64) else 8 * torch.finfo(dtype).eps)
        try:
            found = self._figures(examples, reuse)
        except Exception as failure:  # whatever the caches of unknown models raise
            why = f"fails ({type(failure).__name__}: {failure})"
        else:
            gaps = [(a - b).nan_to_num(0.0).abs().max() for a, b in zip(*map(_floats, (found, expected)), strict=True)]
            gap = float(torch.stack([gap.double() for gap in gaps]).max())
            if gap <= bound:
                return True
            why = f"is off by {gap:.2g}, with scores up to {scale:.2g}"
        self._warn(f"{why} with {type(self._model).__name__}", reuse)
        return False

    def _warn(self, why: str, reuse: Reuse) -> None:
        if reuse not in self._warned:
            self._warned.add(reuse)
            what = "what all prompts begin with" if reuse.shared else "a row's prompt"
            warnings.warn(
                f"Going on from the cache of {what} {why}, so that is read again for every sequence: the same "
                "figures, in more time.",
                stacklevel=2,
            )

    def _beginning(self, examples: Sequence[Example], reuse: Reuse) -> Beginning | None:
        """That of every sequence of the batch."""
        if reuse == _NOTHING:
            return None
        found = None
        if reuse.shared:
            if self._shared_run is None:
                self._shared_run = begin(self._forward, [self._shared], self._device, None)
            found = self._shared_run.copied()
        skipped = len(self._shared) if reuse.shared else 0
        if reuse.stems:
            stems = [example.sequences[0][skipped : example.stem] for example in examples]
            after = None if found is None else found.select(self._zeros(len(stems)))
            found = begin(self._forward, stems, self._device, after)
            rows = [row for row, example in enumerate(examples) for _ in example.sequences]
            return found.select(torch.tensor(rows, device=self._device))
        return found.select(self._zeros(sum(example.count for example in examples)))

    def _zeros(self, count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.long, device=self._device)

    def _forward(self, **inputs: Any) -> Any:
        """A forward for the cache alone, of which nobody takes note."""
        with self._attached.quiet(), self._attached.members[0].selecting(self._zeros(1)):
            return self._model(**inputs)

    # What a batch says

    def _figures(self, examples: Sequence[Example], reuse: Reuse) -> dict[str, Tensor]:
        """Columns of the table, one entry for each example, or for each supervised token."""
        skipped = len(self._shared) if reuse.shared else 0
        cuts = [example.stem if reuse.stems else skipped for example in examples]
        inputs = {name: values.to(self._device) for name, values in self._batch(examples, cuts).items()}
        if self._task == "lm":
            targets = lm_targets(inputs, per_token=self._per_token)
        else:
            targets, inputs = choice_targets(inputs), flat_inputs(inputs)
        length = inputs["input_ids"].shape[1]
        rows, positions = targets.tokens // length, targets.tokens % length
        inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        beginning = self._beginning(examples, reuse)
        with self._replaying(inputs, targets) as (batch, targets):
            tokens = targets.tokens
            if not len(tokens):
                return {} if self._per_token else nothing_supervised(self._attached, len(examples), self._device)
            batch = {**(batch if beginning is None else beginning.follow(batch)), "use_cache": beginning is not None}
            with self._attached.at(tokens):
                output = self._model(**batch)
                if self._task == "choice":
                    figures = word_figures if isinstance(targets, WordTargets) else option_figures
                    return figures(self._attached, targets, output)
                if not self._per_token:
                    return sequence_figures(self._attached, targets, output, len(examples))
                place = {"row": rows, "position": positions + 1 + torch.tensor(cuts, device=self._device)[rows]}
                return {**place, **token_figures(self._attached, targets, output)}

    @contextmanager
    def _replaying(
        self, inputs: dict[str, Tensor], targets: AnyTargets
    ) -> Iterator[tuple[dict[str, Tensor], AnyTargets]]:
        """The judged tokens alone, each a sequence, where what comes before the last MoE block is cached."""
        if self._prefix is None or not len(targets.tokens):
            yield inputs, targets
            return
        with self._prefix.replaying(inputs, targets.tokens) as short:
            alone = torch.arange(len(targets.tokens), device=self._device)
            yield short, targets._replace(tokens=alone)

    def _batch(self, examples: Sequence[Example], cuts: Sequence[int]) -> dict[str, Tensor]:
        """Tensors of the examples without their first tokens."""
        left = [example.content.after(cut) for example, cut in zip(examples, cuts, strict=True)]
        return pad_supervised(left) if self._task == "lm" else self._collate.batch(left)

    def _rows(self, examples: Sequence[Example], reuse: Reuse) -> list[list[dict[str, Any]]]:
        figures = {name: values.tolist() for name, values in self._figures(examples, reuse).items()}
        if not self._per_token:
            for name, fill in (("logits", ABSENT_LOGIT), ("probs", 0.0), ("expert_logits", ABSENT_LOGIT)):
                if name in figures:
                    figures[name] = [_widened(values, self._width, fill) for values in figures[name]]
            if figures.get("label") and isinstance(figures["label"][0], list):  # shares, or -100 for none
                figures["label"] = [_widened(own, self._width, min(own[-1], 0.0)) for own in figures["label"]]
            return [[{name: values[row] for name, values in figures.items()}] for row in range(len(examples))]
        found: list[list[dict[str, Any]]] = [[] for _ in examples]
        for at, row in enumerate(figures.pop("row", ())):
            found[row].append({name: values[at] for name, values in figures.items()})
        return found


def _floats(figures: dict[str, Tensor]) -> list[Tensor]:
    return [values for values in figures.values() if values.is_floating_point()]


def _largest(values: Tensor) -> float:
    """Of the scores of what is there."""
    return float(values.nan_to_num(0.0).masked_fill(values < ABSENT_LOGIT / 2, 0.0).abs().max())


def _widened(values: list, width: int, fill: float) -> list:
    """A row's scores over as many options as the longest row of the dataset has, those that it lacks filled in."""
    if values and isinstance(values[0], list):
        return [_widened(own, width, fill) for own in values]
    return values + [fill] * (width - len(values))


def _most_options(dataset: Dataset) -> int:
    """Options of the row that has most."""
    import pyarrow.compute as pc

    name = next((name for name in ("option_ids", "options") if name in dataset.column_names), None)
    if name is None:
        raise ValueError(
            f"task='choice' needs `prompt` and `options` (or `prompt_ids` and `option_ids`), found "
            f"{dataset.column_names}; rename the columns."
        )
    blocks = dataset.select_columns([name]).with_format("arrow").iter(10_000)
    return max(pc.max(pc.list_value_length(block[name])).as_py() or 0 for block in blocks)
