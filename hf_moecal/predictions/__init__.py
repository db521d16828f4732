"""A model and a dataset become the predictions table that everything else reads; see [`hf_moecal.table`]."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from torch import nn
from tqdm.auto import tqdm

from ..calibration import Calibrator, TemperatureCalibrator
from ..calibration.base import CALIBRATION, TABLE_CALIBRATOR, left_to_table
from ..model.conditions import CONDITIONS, as_text, conditions_of
from ..model.prefix_cache import PrefixCache, fingerprint
from ..probes import hard_routing
from ..probes.certify import evaluating
from ..readouts.committee import ATTACHED, CALIBRATED_READOUT, count_members
from ..readouts.mixture import Readout
from ..table import COLUMNS, SCORINGS, read_table
from ..tasks import TASKS
from .classifier import ClassifierReader
from .language import LanguageReader
from .parts import Parts, digest


if TYPE_CHECKING:
    from datasets import Dataset
    from pyarrow import Table
    from transformers import PreTrainedTokenizerBase

Reader = ClassifierReader | LanguageReader
PART_ROWS = 1024  # of the dataset: what is sorted by length, held in memory, and lost in a kill at most


def predict(
    model: nn.Module,
    dataset: Dataset,
    *,
    task: str = TASKS[0],
    processing_class: PreTrainedTokenizerBase | None = None,
    text_column: str = "text",
    group: str | None = None,
    batch_size: int = 32,
    max_length: int | None = None,
    scoring: str = SCORINGS[0],
    example: str = "sequence",
    layer: int | None = -1,
    readout: str | None = None,
    readout_experts: int | str | None = None,
    hard_top_k: int | None = None,
    prefix: PrefixCache | None = None,
    output: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
) -> Dataset:
    """Predicts every example of a dataset, with its routing.

    The model stays as it is; it runs in evaluation mode, in batches of similar length, without gradient.

    | `task` | a row of the dataset has | the table has |
    |---|---|---|
    | `"classification"` | `text_column` or `input_ids`; `label` | `probs` over the classes |
    | `"choice"` | `prompt`, `options` (or `prompt_ids`, `option_ids`); `label` | `probs` over the row's options |
    | `"lm"` | `prompt`, `completion`; or `input_ids`, `labels`; or `text_column` | a row per sequence, or per token |

    The prompts of language models are read once: all options of a row go on from its keys and values, as do all rows
    from what their prompts begin with in common (the examples of a few-shot prompt). That is compared with whole
    sequences on two rows of every 1,024, and not done, with a warning, where it is not the same.

    Args:
        model (`PreTrainedModel`): a mixture of experts: a sequence classifier, else a causal language model.
        dataset (`datasets.Dataset`): columns as above; the label is optional (-100 for none), and may be a list of
            shares, or be in `votes` (recipes/classifiers.md). All other columns are kept, under their names, except
            token ids and those that the table makes itself; a table of tokens leaves the texts out.
        task (`str`, *optional*, defaults to `"classification"`): as in [`MoECalArguments`].
        processing_class (`PreTrainedTokenizerBase`, *optional*): tokenizer; needed for text.
        text_column (`str`, *optional*, defaults to `"text"`): the column to tokenize.
        group (`str`, *optional*): value of the column `group` for all rows, for example the set's name.
        batch_size (`int`, *optional*, defaults to 32): sequences per forward; every option counts.
        max_length (`int`, *optional*): tokens after which a text, or the beginning of a prompt, is cut; the column
            `truncated` then says where.
        scoring (`str`, *optional*, defaults to `"per_token"`): for `"choice"`, see [`ChoiceCollator`].
        example (`str`, *optional*, defaults to `"sequence"`): for `"lm"`, whether the table has one row per
            `"sequence"` or per supervised `"token"`.
        layer (`int`, *optional*, defaults to -1): MoE layer whose routing is recorded; `None` records none, and
            works for dense models too.
        readout (`str`, *optional*): what predicts, see [`~hf_moecal.readouts.mixture.Readout`]; unset it is
            `"native"`, or what a classifier loaded by [`~hf_moecal.from_pretrained`] predicts by. Of a mixture the
            table's experts are those that are mixed, with their shares as `expert_weights`, and a column `readout`
            names it.
        readout_experts (`int` or `"auto"`, *optional*): with `readout="soft_mixture"`, mix only so many.
        hard_top_k (`int`, *optional*): predict under [`~hf_moecal.hard_routing`] with this many experts per token.
        prefix ([`~hf_moecal.model.prefix_cache.PrefixCache`], *optional*): entered cache through which the model runs.
        output (`str` or `Path`, *optional*): Parquet file. Finished rows go to `<output>.parts/` as they come, so that
            memory stays bounded, and become the file at the end. The processes of `accelerate launch` share the work.
        resume (`bool`, *optional*, defaults to `False`): with `output`, go on where a run that was killed stopped.
        progress (`bool`, *optional*, defaults to `True`): whether to show a progress bar.

    Returns:
        `datasets.Dataset`: the predictions table, in the order of `dataset`; its columns are in [`hf_moecal.table`].
        The column `conditions` says under what dtype, attention and experts implementation, and quantization, they
        were predicted, for the calibration that is fitted on them.
        `id` is the row number unless the dataset has that column.

    Raises:
        ValueError: the dataset is empty or has not what the task needs, a label is out of range, the model has another
            head; or what was begun in `output` is of another model, other data or other settings.

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from transformers import MixtralConfig, MixtralForCausalLM
    >>> from hf_moecal import predict
    >>> config = MixtralConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
    ...     num_attention_heads=2, num_key_value_heads=2, num_local_experts=4, pad_token_id=0)
    >>> data = Dataset.from_dict({"prompt_ids": [[4, 5, 6]], "option_ids": [[[7], [8, 9]]], "label": [0]})
    >>> table = predict(MixtralForCausalLM(config), data, task="choice", group="quiz", progress=False)
    >>> table.column_names[:6], len(table["probs"][0])
    (['id', 'label', 'logits', 'probs', 'prediction', 'confidence'], 2)

    ```
    """
    if len(dataset) == 0:
        raise ValueError("The dataset is empty: there is nothing to predict. Check how it was filtered.")
    wanted = _readout(model, task, readout, readout_experts)
    _check(model, task, example, wanted, layer, hard_top_k, prefix, output, resume)
    calibrator = _calibrator(model, task, scoring, wanted)
    given = {"tokenizer": processing_class, "max_length": max_length, "text_column": text_column}
    watched = {"layer": layer, "readout": wanted, "prefix": prefix}
    settings = {"task": task, "batch_size": batch_size, "scoring": scoring, "example": example, "layer": layer}
    settings |= {"readout": wanted.name, "hard_top_k": hard_top_k, "group": group, "prefix_cache": prefix is not None}
    settings |= {"max_length": max_length, "calibration": _stated(calibrator)}
    dataset = dataset.with_format(None)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(evaluating(model))
        if hard_top_k is not None:
            stack.enter_context(hard_routing(model, top_k=hard_top_k))
        if task == "classification":
            reader = ClassifierReader(model, **given, **watched)
        else:
            reader = LanguageReader(model, dataset, task=task, scoring=scoring, example=example, **given, **watched)
        stack.enter_context(reader)
        constant = {"group": group, "readout": reader.readout.name}
        constant["scoring"] = scoring if task == "choice" else None
        constant[CONDITIONS] = as_text(conditions_of(model))
        if calibrator is not None:
            constant[CALIBRATION] = calibrator.method
            stack.enter_context(left_to_table(model))
        made = _Making(model, dataset, reader, batch_size, constant, calibrator, progress)
        if output is None:
            return made.in_memory()
        return made.in_file(Path(output), settings, resume)


class _Making:
    """The table of one dataset, part by part."""

    def __init__(
        self,
        model: nn.Module,
        dataset: Dataset,
        reader: Reader,
        batch_size: int,
        constant: dict[str, str | None],
        calibrator: Calibrator | None,
        progress: bool,
    ) -> None:
        self._model, self._dataset, self._reader = model, dataset, reader
        self._batch_size, self._calibrator, self._progress = batch_size, calibrator, progress
        self._constant = {name: value for name, value in constant.items() if value is not None}
        self._starts = range(0, len(dataset), PART_ROWS)

    def in_memory(self) -> Dataset:
        with self._bar() as bar:
            tables = [self._part(start, rows, examples, bar) for start, rows, examples in self._encoded()]
        return _dataset(tables)

    def in_file(self, output: Path, settings: dict[str, Any], resume: bool) -> Dataset:
        state = PartialState()
        settings = {**settings, "model": fingerprint([self._model], self._model.config)}
        parts = Parts(output, settings, resume=resume, state=state)
        if parts.finished:
            parts.check([digest(rows, examples) for _, rows, examples in self._encoded()])
            return read_table(output)
        with self._bar(disable=not state.is_local_main_process) as bar:
            for number, (start, rows, examples) in enumerate(self._encoded()):
                mine = number % state.num_processes == state.process_index
                if not mine or parts.has(number, content := digest(rows, examples)):
                    bar.update(len(rows))
                else:
                    parts.write(number, self._part(start, rows, examples, bar), content)
        parts.join(len(self._starts))
        return read_table(output)

    def _encoded(self) -> Iterator[tuple[int, Dataset, list[Any]]]:
        """Part by part the number of its first row, its rows, and these in tokens."""
        for start in self._starts:
            rows = self._dataset.select(range(start, min(start + PART_ROWS, len(self._dataset))))
            try:
                examples = self._reader.encode(rows)
            except ValueError as error:
                raise (
                    error if not start else ValueError(f"Counted from row {start} of the dataset: {error}")
                ) from error
            yield start, rows, examples

    def _bar(self, disable: bool = False) -> tqdm:
        name = f"predict {self._constant.get('group', '')}".strip()
        hidden = disable or not self._progress
        return tqdm(total=len(self._dataset), desc=name, unit="row", disable=hidden, delay=1)

    def _part(self, start: int, rows: Dataset, examples: Sequence[Any], bar: tqdm) -> Table:
        self._reader.begin(examples, progress=self._progress)
        found: list[list[dict[str, Any]]] = [[] for _ in examples]
        for chosen in batches(examples, self._batch_size):
            for row, made in zip(chosen, self._reader.read([examples[row] for row in chosen]), strict=True):
                found[row] = made
            bar.update(len(chosen))
        table = self._assemble(start, rows, found, self._reader.truncated(rows, examples))
        if self._calibrator is None:
            return table
        return self._calibrator.apply(_dataset([table])).with_format("arrow")[:]

    def _assemble(
        self, start: int, rows: Dataset, found: list[list[dict[str, Any]]], truncated: list[bool] | None
    ) -> Table:
        """What was made of each row, beside the row's own columns."""
        import pyarrow as pa
        from datasets import Dataset, Features

        index = [row for row, made in enumerate(found) for _ in made]
        flat = [values for made in found for values in made]
        made = {name: [values[name] for values in flat] for name in (flat[0] if flat else ())}
        ids = rows["id"] if "id" in rows.column_names else range(start, start + len(rows))
        made |= self._reader.named([ids[row] for row in index], made)
        made |= {name: [value] * len(index) for name, value in self._constant.items()}
        if truncated is not None:
            made["truncated"] = [truncated[row] for row in index]
        new = Dataset.from_dict(made)
        kept = [name for name in rows.column_names if name not in made and name not in self._reader.inputs]
        old = rows.select_columns(kept).select(index)
        both = {name: part.with_format("arrow")[:][name] for part in (new, old) for name in part.column_names}
        order = [*(name for name in COLUMNS if name in both), *(name for name in both if name not in COLUMNS)]
        features = Features({**new.features, **old.features})
        return pa.table({name: both[name] for name in order}).replace_schema_metadata(features.arrow_schema.metadata)


def batches(examples: Sequence[Any], size: int) -> Iterator[list[int]]:
    """Rows of similar length, the longest first, with at most `size` sequences together (or one row)."""
    chosen: list[int] = []
    count = 0
    for row in sorted(range(len(examples)), key=lambda row: -examples[row].length):
        if chosen and count + examples[row].count > size:
            yield chosen
            chosen, count = [], 0
        chosen.append(row)
        count += examples[row].count
    yield chosen


def _dataset(tables: Sequence[Table]) -> Dataset:
    import pyarrow as pa
    from datasets import Dataset
    from datasets.table import InMemoryTable

    whole = [table for table in tables if len(table)] or tables[:1]
    return Dataset(InMemoryTable(pa.concat_tables(whole)))


def _readout(model: nn.Module, task: str, kind: str | None, experts: int | str | None) -> Readout:
    attached = getattr(model, ATTACHED, None)
    if attached is None:
        return Readout(kind or "native", experts, members=count_members(model))
    if kind is not None or task != "classification":
        raise ValueError(
            f"The model was loaded to predict by {attached.readout.name!r}; leave `readout` unset for that (another "
            "readout, or a language model: load the checkpoint with transformers, name the readout, and apply "
            "hf_moecal.hub.load_calibration(folder) to the table)."
        )
    return attached.readout


def _calibrator(model: nn.Module, task: str, scoring: str, readout: Readout) -> Calibrator | None:
    """What a loaded model's table is calibrated by; nothing where its own logits are calibrated already."""
    calibrator: Calibrator | None = getattr(model, TABLE_CALIBRATOR, None)
    if calibrator is None:
        return None
    remedy = "load the checkpoint with transformers to predict without its calibration"
    fitted_on = getattr(model, CALIBRATED_READOUT, Readout(members=readout.members))
    if readout != fitted_on and not hasattr(model, ATTACHED):
        raise ValueError(
            f"The model's calibration is of its {fitted_on.name or 'native'} readout, and would distort "
            f"{readout.kind!r}; leave `readout` unset, or {remedy}."
        )
    if task == "choice":
        calibrator.check_scoring(scoring)
    of_tokens = calibrator.scoring is None and isinstance(calibrator, TemperatureCalibrator)
    if task == "lm" and not of_tokens:
        raise ValueError(
            f"The model's calibration ({calibrator.method!r}) is of answer options, and task='lm' asks for tokens; "
            f"use task='choice', or {remedy}."
        )
    return None if task != "classification" and of_tokens else calibrator


def _stated(calibrator: Calibrator | None) -> dict[str, Any] | None:
    return None if calibrator is None else {"method": calibrator.method, **calibrator.parameters()}


def _check(
    model: nn.Module,
    task: str,
    example: str,
    readout: Readout,
    layer: int | None,
    hard_top_k: int | None,
    prefix: PrefixCache | None,
    output: str | Path | None,
    resume: bool,
) -> None:
    if task not in TASKS:
        raise ValueError(f"`task` must be one of {', '.join(TASKS)}, got {task!r}.")
    if example not in ("sequence", "token"):
        raise ValueError(f"`example` must be 'sequence' or 'token', got {example!r}.")
    has_vocabulary = model.get_output_embeddings() is not None
    if has_vocabulary == (task == "classification"):
        auto = "AutoModelForCausalLM" if task != "classification" else "AutoModelForSequenceClassification"
        raise ValueError(
            f"task={task!r} needs {'a language model' if task != 'classification' else 'a sequence classifier'}, and "
            f"{type(model).__name__} is none; load the model with {auto}, or choose another task."
        )
    if readout.is_mixture and layer != -1:
        raise ValueError(f"readout={readout.kind!r} is that of the last MoE layer, got layer={layer}; leave it at -1.")
    if hard_top_k is not None and prefix is not None:
        raise ValueError("Hard routing changes the cached layers too; leave `prefix` or `hard_top_k` unset.")
    if output is not None and Path(output).suffix != ".parquet":
        raise ValueError(f"`output` is a Parquet file, got {str(output)!r}; end its name in .parquet.")
    if resume and output is None:
        raise ValueError("`resume` goes on with the file `output`; name it.")


__all__ = ["predict"]
