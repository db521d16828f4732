"""What of `transformers.Trainer` cannot be combined with an objective over the whole batch: refused, never ignored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import IterableDatasetShard
from torch import nn
from torch.utils.data import IterableDataset
from transformers import Trainer

from ..probes import find_moe_layers
from .arguments import MoECalArguments


def check_arguments(args: Any, kwargs: Mapping[str, Any]) -> None:
    """Raises a `ValueError` where the training arguments, or what else a trainer is given, cannot take effect."""
    if not isinstance(args, MoECalArguments):
        raise ValueError(f"`args` must be a hf_moecal.MoECalArguments, got {type(args).__name__}.")
    if kwargs.get("compute_loss_func") is not None:
        raise ValueError(
            "`compute_loss_func` would replace the objective; choose one with MoECalArguments(objective=...), or use "
            "transformers.Trainer."
        )
    if "inputs" in args.include_for_metrics and args.task == "choice":
        raise ValueError(
            "include_for_metrics=['inputs'] joins the inputs of all batches, which for task='choice' have options of "
            "different numbers and lengths; leave it out: `predictions` are in the order of the dataset's rows."
        )
    if args.optim in ("lomo", "adalomo") and args.gradient_accumulation_steps > 1:
        raise ValueError(
            f"optim={str(args.optim.value)!r} updates parameters inside each backward pass, before an optimizer batch "
            f"of gradient_accumulation_steps={args.gradient_accumulation_steps} micro-batches is complete; set it to "
            "1, or take another optimizer."
        )
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


def label_name(args: MoECalArguments) -> str:
    """The column of the labels; raises a `ValueError` where `label_names` is not one name."""
    names = ["labels"] if args.label_names is None else list(args.label_names)
    if len(names) != 1:
        raise ValueError(
            f"An example has one label here, got label_names={names}; name the column of it, or leave it unset."
        )
    return names[0]


def check_datasets(train_dataset: Any, eval_dataset: Any, *, labels: set[str] | None) -> None:
    """Raises a `ValueError` for a dataset that is empty or, if it has to be labelled, has no column of labels.

    Args:
        train_dataset: of the trainer.
        eval_dataset: of the trainer, one or several by name.
        labels (`set[str]`): names that a column of labels may have beside the usual ones; `None` asks for no labels.
    """
    evaluation = eval_dataset if isinstance(eval_dataset, Mapping) else {"eval_dataset": eval_dataset}
    for name, dataset in {"train_dataset": train_dataset, **evaluation}.items():
        if hasattr(dataset, "__len__") and len(dataset) == 0:
            raise ValueError(f"Dataset {name!r} is empty; leave it out, or check how it was filtered.")
        columns = getattr(dataset, "column_names", None)
        if labels is not None and columns and not (labels | {"label", "labels", "label_ids"}) & set(columns):
            raise ValueError(
                f"Dataset {name!r} has no `label` column, only {list(columns)}; rename it with "
                "dataset.rename_column(..., 'label'), or name it with label_names=[...]."
            )


def check_model(model: nn.Module, args: MoECalArguments) -> None:
    """Raises a `ValueError` where the objective cannot be that of the model."""
    config = getattr(model, "config", None)
    kind = getattr(config, "problem_type", None)
    if args.task == "classification" and (kind not in (None, "single_label_classification")):
        raise ValueError(
            f"problem_type={kind!r} has no one right class for each example, which the objective and the calibration "
            "figures are about; use transformers.Trainer, or a classifier of single labels."
        )
    if args.task == "classification" and getattr(config, "num_labels", 2) == 1:
        raise ValueError(
            "The model has one output (num_labels=1), so it is a regression; load it with num_labels=2 or more."
        )
    if args.objective == "robust_filtered" or args.readout != "native":
        find_moe_layers(model)  # refuses a model without mixtures now, not after the warm-up
    prompts = [c for c in getattr(model, "peft_config", {}).values() if getattr(c, "is_prompt_learning", False)]
    kinds = [str(getattr(c.peft_type, "value", c.peft_type)) for c in prompts]
    if set(kinds) - {"PREFIX_TUNING"}:
        raise ValueError(
            f"{kinds[0]} puts virtual tokens before each sequence, so that no prediction stands where its token does; "
            "train='lora', or PEFT's prefix tuning, leaves the positions as they are."
        )
    if kinds and (args.objective == "robust_filtered" or args.readout != "native"):
        raise ValueError(
            f"{kinds[0]} gives each layer a cache that trains, which experts cannot be asked with again; set "
            "objective='robust' (or 'erm') and readout='native', or train='lora'."
        )


def check_carried(batches: list, args: MoECalArguments, *, started: bool) -> None:
    """Raises a `ValueError` for a stream that ends before its first optimizer batch is full."""
    if batches and not started:
        raise ValueError(
            f"The stream of training data ends after {len(batches)} micro-batches, before one optimizer batch of "
            f"gradient_accumulation_steps={args.gradient_accumulation_steps} is full; lower that, or the batch size."
        )


def check_optimizer(optimizer: torch.optim.Optimizer | None, model: nn.Module, args: MoECalArguments) -> None:
    """Raises a `ValueError` where an optimizer that was passed leaves out what the arguments chose to train."""
    if optimizer is None or (args.train == "all" and args.readout_members == 1):
        return
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in held]
    if missing:
        raise ValueError(
            f"The optimizer that was passed leaves out {len(missing)} parameters that train={args.train!r} and "
            f"readout_members={args.readout_members} train (first: {missing[0]!r}); make it of them, after "
            "set_trainable, add_lora or add_members, or leave `optimizers` out."
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
    sizes = {"Tensor": trainer.get_tp_size(), "Context": trainer.get_cp_size(), "Sequence": trainer.get_sp_size()}
    for kind, size in sizes.items():
        if size > 1:
            raise ValueError(
                f"{kind} parallelism lets {size} processes share one example, which the objective would not count "
                "rightly; use data parallelism (DDP, FSDP2 or ZeRO)."
            )
    if getattr(trainer, "is_distributed_loading_by_transformers", False):
        raise ValueError(
            "The model was sharded as it was loaded (`distributed_config`), where its experts cannot be consulted; "
            "load it whole and let accelerate shard it (fsdp=True)."
        )
    if trainer.is_fsdp_enabled and not trainer.accelerator.is_fsdp2:
        raise ValueError("FSDP1 hides the weights that experts are consulted with; set `fsdp_version: 2`.")


def checked_loader(loader: Any, accelerator: Accelerator) -> Any:
    """The loader; raises a `ValueError` if processes would get unequal numbers of batches, or rows twice unnoticed."""
    if accelerator.num_processes == 1:
        return loader
    dataset = getattr(loader, "dataset", None)
    if isinstance(dataset, IterableDatasetShard) and not dataset.drop_last:
        raise ValueError(
            "With accelerator_config={'dispatch_batches': False} an iterable dataset repeats rows at its end, and "
            "which they are is unknown; set dataloader_drop_last=True, or leave `dispatch_batches` unset."
        )
    count = len(loader) if hasattr(loader, "__len__") and not isinstance(dataset, IterableDataset) else 0
    counts = accelerator.gather(torch.tensor([count], device=accelerator.device)).tolist()
    if len(set(counts)) > 1:
        raise ValueError(
            f"The processes have {counts} micro-batches, so one would wait for ever; leave `even_batches` of "
            "accelerator_config at True (the rows that it repeats do not count), or set dataloader_drop_last=True."
        )
    return loader


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
