"""Carries out a recipe: trains its model, predicts its sets."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import PartialState

from ..hub import attach_calibrator, find_record, load_calibration
from ..model.labels import class_numbers
from ..model.loading import label_names, load_classifier, load_language_model
from ..model.prefix_cache import PrefixCache
from ..predictions import predict
from ..predictions.classifier import cut_short
from ..predictions.supervised import collate_supervised, encode_supervised
from ..readouts.committee import ATTACHED, CALIBRATED_READOUT
from ..readouts.mixture import Readout
from ..readouts.recorded import load_committee, recorded_readout
from ..tasks.choice import ChoiceCollator
from ..training.arguments import MoECalArguments
from ..training.methods import chosen
from ..training.trainer import MoECalTrainer
from .classes import classes_of
from .command import nearest
from .interrupted import last_complete, room_for
from .recipe import Recipe, expand
from .sets import load_set, with_classes


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..calibration import CalibrationRecord


def parse_arguments(recipe: Recipe, overrides: Sequence[str] = ()) -> MoECalArguments:
    """The recipe's [`MoECalArguments`], with fields overridden as on a command line (`["--eta", "1.0"]`).

    Raises:
        ValueError: a field does not exist or its value is out of range.
    """
    from transformers import HfArgumentParser

    parser = HfArgumentParser(MoECalArguments)
    parser.set_defaults(**recipe.arguments)
    arguments, unknown = parser.parse_args_into_dataclasses(args=list(overrides), return_remaining_strings=True)
    if unknown:
        fields = [f"--{field.name}" for field in dataclasses.fields(MoECalArguments) if field.init]
        raise ValueError(
            f"Unknown arguments: {' '.join(unknown)}; {nearest(unknown[0], fields)}fields are those of "
            "hf_moecal.MoECalArguments."
        )
    if arguments.prefix_cache is not None:
        arguments.prefix_cache = expand(arguments.prefix_cache)
    return arguments


def train_recipe(recipe: Recipe, *, overrides: Sequence[str] = (), resume: bool = False) -> MoECalTrainer:
    """Trains as the recipe says and saves the model in `output_dir`.

    Args:
        recipe ([`Recipe`]): what to train on what.
        overrides (`Sequence[str]`): command-line arguments that override fields.
        resume (`bool`): go on from the last checkpoint in `output_dir`.

    Returns:
        [`MoECalTrainer`]: after training.

    Raises:
        ValueError: the recipe has no training set, or an argument is wrong.
    """
    if recipe.train is None:
        raise ValueError("The recipe has no training set; add `train: {path: ...}` under `data:`.")
    arguments = parse_arguments(recipe, overrides)
    sets = {"train": recipe.train, **({"validation": recipe.validation} if recipe.validation else {})}
    sets |= recipe.groups if arguments.eval_strategy != "no" else {}
    recipe = replace(recipe, arguments={**recipe.arguments, "task": arguments.task})
    loaded = {name: load_set(name, spec, recipe) for name, spec in sets.items()}
    precise = {"seed": arguments.seed, "dtype": recipe.dtype}
    if arguments.task == "classification":
        classes = classes_of(recipe, loaded)
        loaded = {name: classes.resolve(name, dataset) for name, dataset in loaded.items()}
        model, tokenizer = load_classifier(recipe.model, classes.count, **precise)
        classes.name_in(model.config)
    else:
        model, tokenizer = load_language_model(recipe.model, **precise)
    encoded = {name: _encode(name, dataset, tokenizer, recipe) for name, dataset in loaded.items()}
    trainer = MoECalTrainer(
        model=model,
        args=arguments,
        train_dataset=encoded.pop("train"),
        eval_dataset=encoded or None,
        processing_class=tokenizer,
        data_collator=_collator(recipe, tokenizer),
    )
    _keep_trained_exact(trainer)
    with room_for(arguments.output_dir, trainer.model):
        trainer.train(resume_from_checkpoint=last_complete(arguments.output_dir) if resume else None)
        if trainer.is_fsdp_enabled:  # sharded checkpoints resume; what is published is whole
            trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        _save(trainer, encoded.get("validation"))
    return trainer


def _save(trainer: MoECalTrainer, validation: Dataset | None) -> None:
    """Saves the model, with the calibration that its method ends with where there are validation rows for it."""
    args = trainer.args
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    if validation is None or args.calibration_method == "none" or args.task == "lm" or sharded:
        trainer.save_model()
        trainer.save_training_record()
        return
    try:
        result = trainer.calibrate(validation)
    except ValueError as error:  # the model is saved by then, and training must not be lost for a temperature
        print(f"no calibration.json: {error}")
        return
    if result is not None:
        print(f"calibration.json: {result.calibrator.method}, fitted on {len(validation):,} validation rows")


def _keep_trained_exact(trainer: MoECalTrainer) -> None:
    """Under mixed precision what trains is kept in float32, since AdamW's steps vanish in bfloat16's 8 bits.

    Accelerate does the same for FSDP2, and DeepSpeed for ZeRO.
    """
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    if trainer.accelerator.mixed_precision != "no" and not sharded:
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()


def predict_recipe(
    recipe: Recipe,
    *,
    model: str | PreTrainedModel,
    sets: Sequence[str] | None = None,
    batch_size: int = 32,
    hard_top_k: int | None = None,
    readout: str | None = None,
    readout_experts: int | str | None = None,
    output: str | Path | None = None,
    resume: bool = False,
    raw: bool = False,
) -> Dataset:
    """The predictions table of a model on the recipe's sets; the column `group` names the set.

    The calibration that a checkpoint carries is applied, and a column `calibration` names it.

    Args:
        recipe ([`Recipe`]): where the sets come from; its `prefix_cache` is used.
        model (`str` or `PreTrainedModel`): Hub id, folder, or a model whose tokenizer is the recipe's.
        sets (`Sequence[str]`, *optional*): names among the groups, `"train"` and `"validation"`; all groups if unset.
        batch_size (`int`): sequences per forward.
        hard_top_k (`int`, *optional*): predict under [`~hf_moecal.hard_routing`] with this many experts per token.
        readout (`str`, *optional*): what predicts, see [`~hf_moecal.readouts.mixture.Readout`]; if unset what the
            checkpoint's `calibration.json` names, else the recipe's.
        readout_experts (`int` or `"auto"`, *optional*): with `readout="soft_mixture"`, mix only so many.
        output, resume: as in [`predict`].
        raw (`bool`): leave the calibration out that the checkpoint carries.

    Raises:
        ValueError: the recipe has no such set, or none, the sets have columns of one name and different types, or the
            calibration is of another readout.
    """
    wanted = _wanted_sets(recipe, sets)
    settings = recipe.arguments
    record = find_record(model) if isinstance(model, str) else None
    readout, readout_experts = _readout_of(settings, model, None if raw else record, readout, readout_experts)
    loaded = {name: load_set(name, spec, recipe) for name, spec in wanted.items()}
    model, tokenizer = _loaded(recipe, model, record if not raw else None)
    dataset = _together(loaded, recipe, label_names(model.config) if recipe.task == "classification" else {})
    cached = nullcontext()
    if settings.get("prefix_cache") is not None and hard_top_k is None:  # hard routing changes earlier layers too
        model.requires_grad_(False)
        cached = PrefixCache(model, expand(settings["prefix_cache"]), dtype=settings.get("prefix_cache_dtype"))
    with cached as prefix:
        return predict(
            model,
            dataset,
            task=recipe.task,
            processing_class=tokenizer,
            text_column=recipe.text,
            batch_size=batch_size,
            max_length=recipe.max_length,
            scoring=recipe.scoring,
            example=settings.get("example", "sequence"),
            layer=settings.get("probe_layer", -1),
            readout=readout,
            readout_experts=readout_experts,
            hard_top_k=hard_top_k,
            prefix=prefix,
            output=output,
            resume=resume,
        )


def _readout_of(
    settings: Mapping[str, Any],
    model: str | PreTrainedModel,
    record: CalibrationRecord | None,
    kind: str | None,
    experts: int | None,
) -> tuple[str | None, int | None]:
    """What is to predict: as asked, else as the checkpoint records it, else as the recipe says."""
    own = recorded_readout(model) if isinstance(model, str) else Readout()
    own = own if record is None else Readout.from_record(record.readout)
    if kind is None and own.is_mixture:
        return own.kind, own.experts
    if kind is None and not hasattr(model, ATTACHED):
        kind = settings.get("readout", "native") if isinstance(model, str) else chosen(settings, "readout")
        experts = settings.get("readout_experts") if experts is None else experts
    if kind is not None and carries_calibration(record) and (kind, experts) != (own.kind, own.experts):
        raise ValueError(
            f"The checkpoint's calibration is of its {own.name or 'native'} readout, not of {kind!r}; leave the "
            "readout unset, or predict without the calibration (--raw)."
        )
    return kind, experts


def _wanted_sets(recipe: Recipe, sets: Sequence[str] | None) -> dict[str, dict[str, Any]]:
    known = {"train": recipe.train, "validation": recipe.validation, **recipe.groups}
    known = {name: spec for name, spec in known.items() if spec is not None}
    wanted = list(recipe.groups) if sets is None else list(sets)
    missing = [name for name in wanted if name not in known]
    if missing or not wanted:
        raise ValueError(f"The recipe has no set {missing or 'at all'}; it has {list(known)}.")
    return {name: known[name] for name in wanted}


def _together(sets: Mapping[str, Dataset], recipe: Recipe, names: Mapping[str, int]) -> Dataset:
    """One dataset of all sets, whose column `group` names the set of each row, with classes as labels."""
    from datasets import concatenate_datasets

    grouped = []
    for name, dataset in sets.items():
        kept = dataset.remove_columns([column for column in ("group",) if column in dataset.column_names])
        if "label" in recipe.columns:
            where = f"Set {name!r}: column {recipe.label!r}"
            kept = with_classes(kept, class_numbers(dataset["label"][:], names, where=where))
        column = recipe.groups.get(name, {}).get("group")
        if column is not None and column not in dataset.column_names:
            raise ValueError(f"Set {name!r} has no column {column!r} to group by, only {dataset.column_names}.")
        groups = [name] * len(kept) if column is None else list(map(str, dataset[column][:]))
        grouped.append(kept.add_column("group", groups))
    try:
        return concatenate_datasets(grouped)
    except ValueError as error:
        raise ValueError(
            f"The sets {', '.join(sets)} have columns of one name and different types, so they make no one table; "
            f"predict them one by one with --sets. ({error})"
        ) from error


def carries_calibration(record: CalibrationRecord | None) -> bool:
    """Whether there is something to apply: a calibration, and not one that is part of the weights."""
    return record is not None and record.method != "none" and record.baked is None


def _loaded(
    recipe: Recipe, model: str | PreTrainedModel, record: CalibrationRecord | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if not isinstance(model, str):
        from transformers import AutoTokenizer

        return model, AutoTokenizer.from_pretrained(recipe.model)
    load = load_classifier if recipe.task == "classification" else load_language_model
    loaded, tokenizer = load(model, dtype=recipe.dtype)
    load_committee(loaded, model, recorded_readout(model), {})
    if carries_calibration(record):
        attach_calibrator(loaded, load_calibration(model))
        setattr(loaded, CALIBRATED_READOUT, Readout.from_record(record.readout))
    return loaded.to(PartialState().device), tokenizer


def _encode(name: str, dataset: Dataset, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> Dataset:
    """What the collator needs of a set: tokens, or of a choice the texts."""
    from datasets import Dataset

    kept = dataset.select_columns([*recipe.columns, *({"id"} & set(dataset.column_names))])
    if recipe.task == "choice":
        return kept
    texts = [name for name in recipe.columns if name != "label"]

    def encode(batch: dict[str, list]) -> dict[str, list]:
        return tokenizer(batch[recipe.text], truncation=recipe.max_length is not None, max_length=recipe.max_length)

    def supervise(batch: dict[str, list]) -> dict[str, list]:
        rows = encode_supervised(
            Dataset.from_dict(dict(batch)), tokenizer, text_column=recipe.text, max_length=recipe.max_length
        )
        return {"input_ids": [row.ids for row in rows], "labels": [row.labels for row in rows]}

    function = encode if recipe.task == "classification" else supervise
    encoded = kept.map(function, batched=True, remove_columns=texts, desc="tokenize")
    _say_truncated(name, kept, encoded, tokenizer, recipe)
    return encoded


def _say_truncated(
    name: str, texts: Dataset, encoded: Dataset, tokenizer: PreTrainedTokenizerBase, recipe: Recipe
) -> None:
    def whole(near: list[int]) -> list[int]:
        uncut = replace(recipe, max_length=None)
        rows = [dict(row) for row in texts.select(near)]
        joined = [row[recipe.text] if uncut.completion is None else row["prompt"] + row["completion"] for row in rows]
        return list(map(len, tokenizer(joined, verbose=False)["input_ids"]))

    cut = cut_short(list(map(len, encoded["input_ids"])), recipe.max_length, whole)
    if cut and any(cut):
        PartialState().print(truncated_line(name, sum(cut), len(cut), recipe.max_length))


def truncated_line(name: str, cut: int, rows: int, max_length: int | None) -> str:
    """What a person is told about rows that do not fit."""
    where = f"{name}: " if name else ""
    return f"{where}{cut:,} of {rows:,} texts are longer than max_length ({max_length} tokens) and were cut"


def _collator(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Callable[..., Any] | None:
    """What makes batches; Trainer's own for a classifier."""
    if recipe.task == "choice":
        return ChoiceCollator(tokenizer, scoring=recipe.scoring, max_length=recipe.max_length)
    return collate_supervised if recipe.task == "lm" else None
