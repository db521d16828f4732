"""What of `transformers.Trainer` cannot be combined with an objective over the whole batch: refused, never ignored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import Trainer

from .training_args import MoECalArguments


def check_arguments(args: Any, kwargs: Mapping[str, Any]) -> None:
    """Raises a `ValueError` where the training arguments, or what else a trainer is given, cannot take effect."""
    if not isinstance(args, MoECalArguments):
        raise ValueError(f"`args` must be a hf_moecal.MoECalArguments, got {type(args).__name__}.")
    if kwargs.get("compute_loss_func") is not None:
        raise ValueError(
            "`compute_loss_func` would replace the objective; choose one with MoECalArguments(objective=...), or use "
            "transformers.Trainer."
        )
    if kwargs.get("model_init") is not None:
        raise ValueError("`model_init` is not supported; pass `model=` and build a trainer for each trial.")
    if args.use_liger_kernel:
        raise ValueError(
            "`use_liger_kernel=True` replaces the model's forward by one that may give no logits to judge; set it to "
            "False. Logits exist in chunks anyway."
        )
    if not args.average_tokens_across_devices:
        raise ValueError(
            "`average_tokens_across_devices=False` has no effect: the objective is over the examples of all devices; "
            "leave it at True."
        )
    if args.gradient_checkpointing and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
        raise ValueError(
            "Reentrant checkpointing gives wrong gradients where the first layers are frozen, or experts or routers "
            'are watched; set gradient_checkpointing_kwargs={"use_reentrant": False}.'
        )


def check_datasets(train_dataset: Any, eval_dataset: Any, *, labelled: bool) -> None:
    """Raises a `ValueError` for a dataset that is empty or, if it has to be `labelled`, has no column of labels."""
    evaluation = eval_dataset if isinstance(eval_dataset, Mapping) else {"eval_dataset": eval_dataset}
    for name, dataset in {"train_dataset": train_dataset, **evaluation}.items():
        if hasattr(dataset, "__len__") and len(dataset) == 0:
            raise ValueError(f"Dataset {name!r} is empty; leave it out, or check how it was filtered.")
        columns = getattr(dataset, "column_names", None)
        if labelled and columns and not {"label", "labels", "label_ids"} & set(columns):
            raise ValueError(
                f"Dataset {name!r} has no `label` column, only {list(columns)}; rename it with "
                "dataset.rename_column(..., 'label')."
            )


def check_distribution(trainer: Trainer) -> None:
    """Raises a `ValueError` where a batch is spread in a way that hides its losses."""
    if trainer.args.n_gpu > 1:
        raise ValueError(
            f"One process drives {trainer.args.n_gpu} GPUs (DataParallel), which hides the batch's losses; start "
            "with `accelerate launch`, or show one GPU with CUDA_VISIBLE_DEVICES=0."
        )
    if trainer.args.readout != "native" or trainer.args.readout_members > 1:
        _check_mixture(trainer)
    parallelism = getattr(trainer.accelerator, "parallelism_config", None)
    if parallelism is not None and (parallelism.cp_enabled or getattr(parallelism, "sp_enabled", False)):
        raise ValueError(
            "Context or sequence parallelism splits a sequence over processes, which the objective does not support; "
            "use data parallelism (DDP, FSDP2 or ZeRO)."
        )


def _check_mixture(trainer: Trainer) -> None:
    """A mixture, and a committee, train modules outside the model's own forward, which not every wrapper sees."""
    args = trainer.args
    what = f"readout_members={args.readout_members}" if args.readout == "native" else f"readout={args.readout!r}"
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise ValueError(
            f"{what} sends gradients through experts that run again outside their layer, where sharded weights (FSDP, "
            "DeepSpeed) would lose them; train with DDP, or with readout='native' and readout_members=1."
        )
    if trainer.args.torch_compile:
        raise ValueError(f"{what} cannot be compiled; set torch_compile=False.")
