"""After training: a temperature fitted on validation rows and written beside the weights, for whoever loads them."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from ..hub import calibrate
from ..model.prefix_cache import PrefixCache
from ..predictions import predict
from ..probes import find_moe_layers
from ..tasks.choice import SCORINGS


if TYPE_CHECKING:
    from datasets import Dataset

    from ..calibration.selection import CalibrationResult
    from .trainer import MoECalMixin


def calibrate_trained(
    trainer: MoECalMixin, dataset: Dataset, *, method: str | None = None
) -> CalibrationResult | None:
    """Saves a trainer's model and fits a calibration of its predictions; see [`MoECalTrainer.calibrate`]."""
    args = trainer.args
    if args.task == "lm":
        raise ValueError(
            "task='lm' keeps no distributions over the vocabulary to fit a temperature on; calibrate its answers with "
            "`predict_answers`, or options with task='choice'."
        )
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise ValueError(
            "Calibration runs the model outside its sharded wrapper; save it, then run `moecal predict` on the "
            "validation rows and `moecal calibrate` on the table."
        )
    trainer.save_model(_internal_call=True)
    trainer.save_training_record()
    result = None
    if trainer.is_world_process_zero():
        table = _predicted(trainer, _labelled(dataset))
        result = calibrate(args.output_dir, table, method=method or args.calibration_method)
    trainer.accelerator.wait_for_everyone()
    return result


def _labelled(dataset: Dataset) -> Dataset:
    names = dataset.column_names
    return dataset.rename_column("labels", "label") if "labels" in names and "label" not in names else dataset


def _predicted(trainer: MoECalMixin, dataset: Dataset) -> Dataset:
    """The predictions that the saved checkpoint will make, by the model in memory and its cache."""
    args, cached = trainer.args, nullcontext()
    if args.prefix_cache is not None:
        cached = PrefixCache(trainer.model, args.prefix_cache, dtype=args.prefix_cache_dtype)
    with cached as prefix:
        return predict(
            trainer.model,
            dataset,
            task=args.task,
            processing_class=trainer.processing_class,
            batch_size=args.per_device_eval_batch_size,
            max_length=getattr(trainer.data_collator, "max_length", None),
            scoring=getattr(trainer.data_collator, "scoring", SCORINGS[0]),
            layer=-1 if _is_probed(trainer.model) else None,
            readout=args.readout,
            readout_experts=args.readout_experts,
            prefix=prefix,
            progress=not args.disable_tqdm,
        )


def _is_probed(model: Any) -> bool:
    try:
        return bool(find_moe_layers(model))
    except ValueError:
        return False
