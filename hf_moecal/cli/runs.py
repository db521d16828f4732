"""Carries out a recipe: trains its model, predicts its sets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import PartialState

from ..model.loading import load_classifier, load_language_model
from ..model.prefix_cache import PrefixCache
from ..predictions import predict
from ..predictions.supervised import collate_supervised, encode_supervised
from ..readouts.committee import ATTACHED
from ..readouts.recorded import load_committee, recorded_readout
from ..tasks.choice import ChoiceCollator
from ..training.arguments import MoECalArguments
from ..training.methods import chosen
from ..training.trainer import MoECalTrainer
from .recipe import Recipe, expand, load_set


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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
        raise ValueError(f"Unknown arguments: {' '.join(unknown)}; fields are those of hf_moecal.MoECalArguments.")
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
        classes = max(_num_classes(dataset["label"][:]) for dataset in loaded.values())
        model, tokenizer = load_classifier(recipe.model, classes, **precise)
    else:
        model, tokenizer = load_language_model(recipe.model, **precise)
    encoded = {name: _encode(dataset, tokenizer, recipe) for name, dataset in loaded.items()}
    trainer = MoECalTrainer(
        model=model,
        args=arguments,
        train_dataset=encoded.pop("train"),
        eval_dataset=encoded or None,
        processing_class=tokenizer,
        data_collator=_collator(recipe, tokenizer),
    )
    _keep_trained_exact(trainer)
    trainer.train(resume_from_checkpoint=_last_checkpoint(arguments) if resume else None)
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
) -> Dataset:
    """The predictions table of a model on the recipe's sets; the column `group` names the set.

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

    Raises:
        ValueError: the recipe has no such set, or none, or the sets have columns of one name and different types.
    """
    wanted = _wanted_sets(recipe, sets)
    settings = recipe.arguments
    if readout is None and isinstance(model, str) and recorded_readout(model).is_mixture:
        readout, readout_experts = recorded_readout(model).kind, recorded_readout(model).experts
    elif readout is None and not hasattr(model, ATTACHED):
        readout = settings.get("readout", "native") if isinstance(model, str) else chosen(settings, "readout")
        readout_experts = settings.get("readout_experts") if readout_experts is None else readout_experts
    dataset = _together({name: load_set(name, spec, recipe) for name, spec in wanted.items()}, recipe)
    model, tokenizer = _loaded(recipe, model)
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


def _wanted_sets(recipe: Recipe, sets: Sequence[str] | None) -> dict[str, dict[str, Any]]:
    known = {"train": recipe.train, "validation": recipe.validation, **recipe.groups}
    known = {name: spec for name, spec in known.items() if spec is not None}
    wanted = list(recipe.groups) if sets is None else list(sets)
    missing = [name for name in wanted if name not in known]
    if missing or not wanted:
        raise ValueError(f"The recipe has no set {missing or 'at all'}; it has {list(known)}.")
    return {name: known[name] for name in wanted}


def _num_classes(labels: list[int] | list[list[float]]) -> int:
    return len(labels[0]) if isinstance(labels[0], list) else 1 + max(labels)


def _together(sets: Mapping[str, Dataset], recipe: Recipe) -> Dataset:
    """One dataset of all sets, whose column `group` names the set of each row."""
    from datasets import Value, concatenate_datasets

    grouped = []
    for name, dataset in sets.items():
        kept = dataset.remove_columns([column for column in ("group",) if column in dataset.column_names])
        single = "label" in recipe.columns and not hasattr(dataset.features["label"], "feature")  # no list of shares
        if single and dataset.features["label"] != Value("int64"):
            kept = kept.cast_column("label", Value("int64"))
        grouped.append(kept.add_column("group", [name] * len(kept)))
    try:
        return concatenate_datasets(grouped)
    except ValueError as error:
        raise ValueError(
            f"The sets {', '.join(sets)} have columns of one name and different types, so they make no one table; "
            f"predict them one by one with --sets. ({error})"
        ) from error


def _loaded(recipe: Recipe, model: str | PreTrainedModel) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if not isinstance(model, str):
        from transformers import AutoTokenizer

        return model, AutoTokenizer.from_pretrained(recipe.model)
    load = load_classifier if recipe.task == "classification" else load_language_model
    loaded, tokenizer = load(model, dtype=recipe.dtype)
    load_committee(loaded, model, recorded_readout(model), {})
    return loaded.to(PartialState().device), tokenizer


def _encode(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> Dataset:
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
    return kept.map(function, batched=True, remove_columns=texts, desc="tokenize")


def _collator(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Callable[..., Any] | None:
    """What makes batches; Trainer's own for a classifier."""
    if recipe.task == "choice":
        return ChoiceCollator(tokenizer, scoring=recipe.scoring, max_length=recipe.max_length)
    return collate_supervised if recipe.task == "lm" else None


def _last_checkpoint(arguments: MoECalArguments) -> str | None:
    from transformers.trainer_utils import get_last_checkpoint

    return get_last_checkpoint(arguments.output_dir) if Path(arguments.output_dir).is_dir() else None
