"""Carries out a recipe: trains its model, predicts its sets."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import PartialState

from .predictions import predict
from .prefix_cache import PrefixCache
from .probes import hard_routing
from .recipe import Recipe, expand, load_set
from .trainer import MoECalTrainer
from .training_args import MoECalArguments


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


def load_classifier(
    path: str, num_labels: int | None = None, *, seed: int = 0, dtype: str = "float32"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A sequence-classification model and its tokenizer; a head that the checkpoint lacks is drawn from `seed`."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed

    set_seed(seed)
    changes = {} if num_labels is None else {"num_labels": num_labels}
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForSequenceClassification.from_pretrained(path, **_precision(path, dtype), **changes)
    if model.config.get_text_config().pad_token_id is None:
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def _precision(path: str, dtype: str) -> dict[str, Any]:
    """Arguments of `from_pretrained` that give plain weights, also where the checkpoint stores them quantized."""
    from transformers import AutoConfig
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    stored = getattr(AutoConfig.from_pretrained(path), "quantization_config", None)
    if stored is None:
        return {"dtype": dtype}
    kind = AUTO_QUANTIZATION_CONFIG_MAPPING[stored["quant_method"]]
    if "dequantize" not in inspect.signature(kind.__init__).parameters:
        return {"dtype": dtype}
    return {"dtype": dtype, "quantization_config": kind.from_dict({**stored, "dequantize": True})}


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
    loaded = {name: load_set(name, spec, recipe) for name, spec in sets.items()}
    classes = 1 + max(max(dataset["label"]) for dataset in loaded.values())
    model, tokenizer = load_classifier(recipe.model, classes, seed=arguments.seed, dtype=recipe.dtype)
    encoded = {name: _encode(dataset, tokenizer, recipe) for name, dataset in loaded.items()}
    trainer = MoECalTrainer(
        model=model,
        args=arguments,
        train_dataset=encoded.pop("train"),
        eval_dataset=encoded or None,
        processing_class=tokenizer,
    )
    _keep_trained_exact(trainer)
    trainer.train(resume_from_checkpoint=_last_checkpoint(arguments) if resume else None)
    if trainer.is_fsdp_enabled:  # sharded checkpoints resume; what is published is whole
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model()
    trainer.save_training_record()
    return trainer


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
    readout_experts: int | None = None,
) -> Dataset:
    """The predictions table of a model on the recipe's sets; the column `group` names the set.

    Args:
        recipe ([`Recipe`]): where the sets come from; its `prefix_cache` is used.
        model (`str` or `PreTrainedModel`): Hub id, folder, or a model whose tokenizer is the recipe's.
        sets (`Sequence[str]`, *optional*): names among the groups, `"train"` and `"validation"`; all groups if unset.
        batch_size (`int`): sequences per forward.
        hard_top_k (`int`, *optional*): predict under [`~hf_moecal.hard_routing`] with this many experts per token.
        readout (`str`, *optional*): what predicts, see [`~hf_moecal.readout.Readout`]; the recipe's if unset.
        readout_experts (`int`, *optional*): with `readout="soft_mixture"`, mix only so many.

    Raises:
        ValueError: the recipe has no such set, or none.
    """
    from datasets import concatenate_datasets

    known = {"train": recipe.train, "validation": recipe.validation, **recipe.groups}
    known = {name: spec for name, spec in known.items() if spec is not None}
    wanted = list(recipe.groups) if sets is None else list(sets)
    missing = [name for name in wanted if name not in known]
    if missing or not wanted:
        raise ValueError(f"The recipe has no set {missing or 'at all'}; it has {list(known)}.")
    if isinstance(model, str):
        model, tokenizer = load_classifier(model, dtype=recipe.dtype)
        model.to(PartialState().device)
    else:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(recipe.model)
    settings = recipe.arguments
    if readout is None:
        readout = settings.get("readout", "native")
        readout_experts = settings.get("readout_experts") if readout_experts is None else readout_experts
    cached = nullcontext()
    if settings.get("prefix_cache") is not None and hard_top_k is None:  # hard routing changes earlier layers too
        model.requires_grad_(False)
        cached = PrefixCache(model, expand(settings["prefix_cache"]), dtype=settings.get("prefix_cache_dtype"))
    hard = nullcontext() if hard_top_k is None else hard_routing(model, top_k=hard_top_k)
    with cached as prefix, hard:
        tables = [
            predict(
                model,
                load_set(name, known[name], recipe),
                processing_class=tokenizer,
                text_column=recipe.text,
                group=name,
                batch_size=batch_size,
                max_length=recipe.max_length,
                layer=settings.get("probe_layer", -1),
                readout=readout,
                readout_experts=readout_experts,
                prefix=prefix,
            )
            for name in wanted
        ]
    return concatenate_datasets(tables)


def _encode(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> Dataset:
    def encode(batch: dict[str, list]) -> dict[str, list]:
        return tokenizer(batch[recipe.text], truncation=recipe.max_length is not None, max_length=recipe.max_length)

    kept = dataset.select_columns([recipe.text, "label", *({"id"} & set(dataset.column_names))])
    return kept.map(encode, batched=True, remove_columns=[recipe.text], desc="tokenize")


def _last_checkpoint(arguments: MoECalArguments) -> str | None:
    from transformers.trainer_utils import get_last_checkpoint

    return get_last_checkpoint(arguments.output_dir) if Path(arguments.output_dir).is_dir() else None
