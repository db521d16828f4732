"""A model that was loaded with its calibration is saved with it, by the same `save_pretrained` as any other."""

from __future__ import annotations

import inspect
import warnings
from dataclasses import replace
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..calibration import CalibrationRecord, write_record
from ..readouts.committee import save_members
from ..readouts.mixture import Readout
from ..readouts.recorded import record_readout, weights_record
from .publish import push


_CARRIED = "moecal_carried"
_SAMPLES = 1024  # elements of each tensor: a step of training changes nearly all of them
_PUSHED_WITH = ("token", "private", "revision", "commit_message")


class _Carried(NamedTuple):
    """What a model was loaded with, and a hash of its parameters at that time."""

    record: CalibrationRecord
    parameters: str


def keep_on_save(model: nn.Module, record: CalibrationRecord) -> None:
    """Makes `save_pretrained` and `push_to_hub` of this one model write its members and `calibration.json` too."""
    setattr(model, _CARRIED, _Carried(record, _parameters_hash(model)))
    # A partial of a plain function, unlike a closure, is copied and pickled together with the model that it names.
    model.save_pretrained = partial(_save_pretrained, model)


def _save_pretrained(model: nn.Module, save_directory: str | Path, *args: Any, **kwargs: Any) -> Any:
    """Saves the model as its class does, and beside it the members of its committee and its calibration."""
    save = type(model).save_pretrained
    given = inspect.signature(save).bind(model, save_directory, *args, **kwargs)
    published = given.arguments.pop("push_to_hub", False)
    extra = given.arguments.get("kwargs", {})
    wanted = {name: extra[name] for name in ("repo_id", *_PUSHED_WITH) if name in extra} if published else {}
    wanted |= {"token": given.arguments["token"]} if published and given.arguments.get("token") else {}
    given.arguments["kwargs"] = {name: value for name, value in extra.items() if name not in wanted}
    result = save(*given.args, **given.kwargs)
    if given.arguments.get("is_main_process", True):
        folder = Path(save_directory)
        save_members(model, folder)
        _write_record(model, folder)
        if published:  # when everything is there
            push(folder, repo_id=wanted.pop("repo_id", folder.name), **wanted)
    return result


def _write_record(model: nn.Module, folder: Path) -> None:
    record, parameters = getattr(model, _CARRIED)
    if _parameters_hash(model) == parameters:
        write_record(folder, replace(record, weights=weights_record(folder) if record.weights else None))
        return
    if record.method != "none":
        warnings.warn(
            "The model was changed after it was loaded, so its calibration is not saved with it; predict with it and "
            "fit one anew (`moecal calibrate`)."
        )
    record_readout(folder, Readout.from_record(record.readout))


@torch.no_grad()
def _parameters_hash(model: nn.Module) -> str:
    """Of some elements of every parameter and buffer, wherever they are, but not of those that are offloaded."""
    found = blake2b(digest_size=16)
    for name, tensor in model.state_dict(keep_vars=True).items():
        found.update(name.encode())
        if isinstance(tensor, Tensor) and not tensor.is_meta:
            found.update(_sampled(tensor.detach()))
    return found.hexdigest()


def _sampled(tensor: Tensor) -> bytes:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor  # of a sharded tensor what is here
    flat = local.flatten()
    chosen = flat[:: -(-flat.numel() // _SAMPLES) or 1].cpu().contiguous()
    return chosen.view(torch.uint8).numpy().tobytes()
