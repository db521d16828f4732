"""Finds the checkpoints that are complete, and loads their weights whole, also where Trainer leaves some as they are.

A process can be killed while it writes a checkpoint. Trainer writes `trainer_state.json` last, so a checkpoint is
complete if that file can be read.

Checkpoints on disk hold one tensor per expert, models in memory one fused tensor for all. Trainer's resume and
best-model loading match names without that conversion and skip what does not match; `from_pretrained` converts.
"""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..model.freezing import CONTAINER
from ..model.precision import widest_precision
from ..readouts.committee import MEMBERS_FILE, count_members, load_members, save_members
from ..readouts.mixture import Readout
from ..readouts.recorded import record_readout
from .arguments import MoECalArguments


_RUN_FILE = "moecal_run.json"
_SAME = ("train", "readout", "readout_experts", "readout_members")
_SPLIT = ("per_device_train_batch_size", "gradient_accumulation_steps", "processes")
_CHECKPOINTS = f"{PREFIX_CHECKPOINT_DIR}-*[0-9]"


def checkpoint_to_resume(asked: str | Path | bool, output_dir: str | Path) -> str:
    """The complete checkpoint from which training resumes.

    Args:
        asked (`str`, `Path` or `True`): a checkpoint folder, or `True` for the newest complete one in `output_dir`.
        output_dir (`str` or `Path`): of the run.

    Raises:
        ValueError: the checkpoint that is asked for, or every one in `output_dir`, is missing or was cut short.
    """
    found = {int(path.name.rpartition("-")[2]): str(path) for path in Path(output_dir).glob(_CHECKPOINTS)}
    complete = [path for _, path in sorted(found.items()) if _is_complete(path)]
    if asked is True:
        if not complete:
            raise ValueError(
                f"{str(output_dir)!r} holds no complete checkpoint to resume from; start anew with "
                "resume_from_checkpoint=None."
            )
        return complete[-1]
    if not _is_complete(asked):
        others = f"resume from {complete[-1]!r}" if complete else "start anew with resume_from_checkpoint=None"
        raise ValueError(
            f"Checkpoint {str(asked)!r} has no readable {TRAINER_STATE_NAME}, which is written last: it is no "
            f"checkpoint, or its writing was interrupted; {others}."
        )
    return str(asked)


def _is_complete(checkpoint: str | Path) -> bool:
    try:
        return isinstance(json.loads((Path(checkpoint) / TRAINER_STATE_NAME).read_text()), dict)
    except (OSError, ValueError):
        return False


def record_run(checkpoint: str | Path, args: MoECalArguments) -> None:
    """Writes into a checkpoint what the run that resumes from it has to have in common with this one."""
    (Path(checkpoint) / _RUN_FILE).write_text(json.dumps(_common(args), indent=2) + "\n")


def check_resumed(checkpoint: str | Path, args: MoECalArguments) -> None:
    """Raises a `ValueError` where a run differs from that of its checkpoint in what trains or in its batches.

    However an optimizer batch is split over processes and accumulation steps, it may be split otherwise; a checkpoint
    without a record (of `transformers.Trainer`, say) is taken as it is.
    """
    try:
        stored = json.loads((Path(checkpoint) / _RUN_FILE).read_text())
    except (OSError, ValueError):
        return
    current = _common(args)
    for name in _SAME:
        if name in stored and stored[name] != current[name]:
            raise ValueError(
                f"Checkpoint {str(checkpoint)!r} was trained with {name}={stored[name]!r}, this run has "
                f"{name}={current[name]!r}; set {name}={stored[name]!r} to resume, or start anew."
            )
    sizes = [[run.get(name) for name in _SPLIT] for run in (stored, current)]
    if None not in sizes[0] and prod(sizes[0]) != prod(sizes[1]) and not args.auto_find_batch_size:
        was, now = (
            f"{prod(size)} rows ({size[0]} a device x {size[1]} steps x {size[2]} processes)" for size in sizes
        )
        raise ValueError(
            f"Checkpoint {str(checkpoint)!r} was trained on optimizer batches of {was}, this run has {now}; change "
            "per_device_train_batch_size or gradient_accumulation_steps until they agree, or start anew."
        )


def _common(args: MoECalArguments) -> dict[str, Any]:
    return {name: getattr(args, name) for name in (*_SAME, *_SPLIT[:2])} | {"processes": args.world_size}


def restore_weights(model: nn.Module, checkpoint: str | Path) -> bool:
    """Loads every tensor of a checkpoint folder into a plain transformers model, and into its further members.

    Args:
        model (`PreTrainedModel`): takes the weights in place.
        checkpoint (`str` or `Path`): folder written by `save_pretrained`.

    Returns:
        `bool`: whether anything had to be loaded; `False` where the names on disk are those of the model, which
        Trainer then has loaded already, or where the folder holds no plain safetensors.

    Raises:
        ValueError: the checkpoint's tensors are not those of the model.
    """
    if count_members(model) > 1:
        load_members(model, Path(checkpoint) / MEMBERS_FILE)
    stored = tensor_names(Path(checkpoint))
    if not stored or stored >= set(_saved_names(model)):
        return False
    dtype = widest_precision([model])  # a head in float32 on a body in bfloat16 must not be rounded
    loaded, problems = type(model).from_pretrained(checkpoint, dtype=dtype, output_loading_info=True)
    wrong = [*problems["missing_keys"], *problems["mismatched_keys"], *problems["unexpected_keys"]]
    if wrong:
        raise ValueError(
            f"Checkpoint {str(checkpoint)!r} does not fit {type(model).__name__}: {len(wrong)} tensors differ (first: "
            f"{wrong[0]}); resume with the model that wrote it."
        )
    model.load_state_dict({**model.state_dict(), **loaded.state_dict()})
    return True


def tensor_names(folder: Path) -> set[str]:
    """Names of the tensors in a folder's safetensors files; empty if it has none."""
    from safetensors import safe_open

    if (folder / SAFE_WEIGHTS_INDEX_NAME).is_file():
        return set(json.loads((folder / SAFE_WEIGHTS_INDEX_NAME).read_text())["weight_map"])
    if not (folder / SAFE_WEIGHTS_NAME).is_file():
        return set()
    with safe_open(folder / SAFE_WEIGHTS_NAME, framework="pt") as file:
        return set(file.keys())


def _saved_names(model: nn.Module) -> list[str]:
    """Names of the model's tensors, one per tensor: a tied one is saved under one name only, members elsewhere."""
    seen: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not name.startswith(f"{CONTAINER}."):
            seen.setdefault(id(tensor), name)
    return list(seen.values())


class CheckpointMixin:
    """What [`MoECalMixin`] adds to the checkpoints of a Trainer: all weights, further members, what the run was."""

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder, args = output_dir or self.args.output_dir, self.args
            save_members(self.model, folder)
            record_readout(folder, Readout(args.readout, args.readout_experts, members=args.readout_members))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            record_run(output_dir, self.args)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # so that `trainer_state.json`, which is next, comes last of all files

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._restore(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._restore(self.state.best_model_checkpoint)
        self.keep_evaluations_of(self.state.best_model_checkpoint)

    def _restore(self, checkpoint: str) -> None:
        """Loads what Trainer leaves out of a plain checkpoint; sharded ones and adapters load whole by themselves."""
        if isinstance(self.model, PreTrainedModel) and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            restore_weights(self.model, checkpoint)
