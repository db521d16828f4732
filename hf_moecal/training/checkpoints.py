"""Finds the checkpoints that are complete, and loads their weights whole, also where Trainer leaves some as they are.

A process can be killed while it writes a checkpoint. Trainer writes `trainer_state.json` last, so a checkpoint is
complete if that file can be read.

Checkpoints on disk hold one tensor per expert, models in memory one fused tensor for all. Trainer's resume and
best-model loading match names without that conversion and skip what does not match; `from_pretrained` converts.
"""

from __future__ import annotations

import json
from pathlib import Path

from torch import nn
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..model.freezing import CONTAINER
from ..readouts.committee import MEMBERS_FILE, count_members, load_members


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
    loaded, problems = type(model).from_pretrained(checkpoint, dtype=model.dtype, output_loading_info=True)
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
