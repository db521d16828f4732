"""Checkpoints that were trained apart on the same frozen layers become one committee."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..calibration.record import FILE_NAME as CALIBRATION_FILE
from ..model.freezing import set_trainable
from ..model.loading import ADAPTER_CONFIG, load_model
from ..readouts.committee import attach_members, save_members
from ..readouts.mixture import Readout
from ..readouts.recorded import record_readout, recorded_readout
from .checkpoint_files import EVALUATION_FILE, TRAINING_FILE


_OF_ONE_MEMBER = ("checkpoint-*", CALIBRATION_FILE, EVALUATION_FILE)


def join_committee(members: Sequence[str | Path], output: str | Path) -> Path:
    """Writes one checkpoint folder that predicts as a committee of several, in equal shares.

    Each was trained with `train="last_moe_layer"` from the same checkpoint, with a seed of its own. What makes them
    worth mixing is that they start apart, as with a new head each: runs that differ in the order of the data alone
    are together no better than one (recipes/readout.md).

    Args:
        members (`Sequence[str or Path]`): folders of the checkpoints; the first is what plain transformers loads.
        output (`str` or `Path`): folder to write; must not exist.

    Returns:
        `Path`: the folder, for [`~hf_moecal.from_pretrained`]. It says nothing of calibration or evaluation, since
        the numbers of its members are not its own.

    Raises:
        ValueError: fewer than two members, an adapter, a committee, other readouts, or layers before the last MoE
            layer that differ.

    Example:

    ```python
    folder = join_committee(["runs/seed0", "runs/seed1", "runs/seed2", "runs/seed3"], "runs/committee")
    model = hf_moecal.from_pretrained(folder)
    ```
    """
    folders, output = [Path(folder) for folder in members], Path(output)
    readout = _common_readout(folders)
    if output.exists():
        raise ValueError(f"{output} exists; give another folder, or remove it.")
    model = load_model(folders[0])
    set_trainable(model, "last_moe_layer")
    attach_members(model, [_own_parameters(model, folders[0], folder) for folder in folders[1:]])
    shutil.copytree(folders[0], output, ignore=shutil.ignore_patterns(*_OF_ONE_MEMBER))
    save_members(model, output)
    record_readout(output, replace(readout, members=len(folders)))
    records = {(f / TRAINING_FILE).read_bytes() if (f / TRAINING_FILE).exists() else b"" for f in folders}
    if len(records) > 1:
        warnings.warn(
            f"The members were not trained alike; {TRAINING_FILE} of the committee is that of {folders[0]} alone.",
            stacklevel=2,
        )
    return output


def _common_readout(folders: Sequence[Path]) -> Readout:
    if len(folders) < 2:
        raise ValueError(f"A committee has two members or more, got {len(folders)}.")
    wrong = next((folder for folder in folders if not (folder / "config.json").is_file()), None)
    if wrong is not None or any((folder / ADAPTER_CONFIG).exists() for folder in folders):
        what = "an adapter is among them" if wrong is None else f"{wrong} is no checkpoint folder"
        raise ValueError(f"Members are folders of whole checkpoints, but {what}; save them with trainer.save_model.")
    readouts = [recorded_readout(folder) for folder in folders]
    if readouts[0].members > 1 or any(found != readouts[0] for found in readouts):
        names = [found.name or "native" for found in readouts]
        raise ValueError(f"Members predict by one and the same readout and are no committees, got {names}.")
    return readouts[0]


@torch.no_grad()
def _own_parameters(model: nn.Module, first: Path, folder: Path) -> dict[str, Tensor]:
    """What a member has in place of the trained parameters of the model."""
    other = dict(load_model(folder).named_parameters())
    own = {}
    for name, parameter in model.named_parameters():
        if name not in other or other[name].shape != parameter.shape:
            raise ValueError(
                f"{folder} is another model than {first}: it has no {name!r} of {tuple(parameter.shape)}."
            )
        if parameter.requires_grad:
            own[name] = other[name].detach()
        elif not torch.equal(parameter, other[name]):
            raise ValueError(
                f"{folder} differs from {first} in {name!r}, before the last MoE layer: members share all that comes "
                "before it; train them with train='last_moe_layer' from one checkpoint."
            )
    return own
