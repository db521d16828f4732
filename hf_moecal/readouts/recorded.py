"""A checkpoint that predicts by another readout than its own logits: recorded beside it, attached on loading."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from ..calibration import (
    CalibrationRecord,
    Calibrator,
    PerExpertTemperatureCalibrator,
    TemperatureCalibrator,
    read_record,
    write_record,
)
from ..calibration.record import FILE_NAME, read_json
from ..model.loading import ADAPTER_CONFIG
from ..model.weight_files import MEMBERS_FILE, weights_fingerprint
from ..probes import find_moe_layers
from .committee import ATTACHED, count_members, load_members
from .forward import ReadoutForward
from .mixture import Readout


def record_readout(model_dir: str | Path, readout: Readout) -> None:
    """Writes into a checkpoint's `calibration.json` what predicts; call it when the weights are written.

    A calibration that is there stays if it is of the same readout and of these weights. Any other is of a checkpoint
    that the folder no longer holds: it goes, with a warning.

    Args:
        model_dir: folder of the checkpoint.
        readout: what its predictions are by.

    Example:

    ```python
    >>> import tempfile
    >>> from hf_moecal.calibration import read_record
    >>> from hf_moecal.readouts.recorded import record_readout
    >>> from hf_moecal.readouts.mixture import Readout
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     record_readout(folder, Readout("soft_mixture"))
    ...     read_record(folder).readout
    {'kind': 'soft_mixture', 'experts': None, 'members': 1}

    ```
    """
    path = Path(model_dir) / FILE_NAME
    record = read_record(path) if path.exists() else None
    if record is not None:
        reason = stale(record.weights, model_dir)
        if Readout.from_record(record.readout) == readout and reason is None:
            return
        if record.method != "none":
            reason = reason or f"it is of the readout {Readout.from_record(record.readout).name or 'native'!r}"
            warnings.warn(f"The calibration in {str(path)!r} is dropped: {reason}. Fit it anew (`moecal calibrate`).")
    if not readout.is_plain:
        write_record(model_dir, CalibrationRecord(method="none", parameters={}, readout=readout.record()))
    elif record is not None:
        path.unlink()


def weights_record(model_dir: str | Path) -> dict[str, str] | None:
    """Which weights a record written now is of, for its `weights`; `None` where the folder has none in safetensors.

    Of an adapter that is its own and, if it lies on this machine, its base model's.
    """
    own = weights_fingerprint(model_dir)
    if own is None:
        return None
    base = _base_folder(Path(model_dir))
    of_base = None if base is None else weights_fingerprint(base)
    return {"fingerprint": own, **({} if of_base is None else {"base": of_base})}


def stale(weights: Mapping[str, str] | None, model_dir: str | Path) -> str | None:
    """Why what says of which `weights` it is, is not of those in a folder; `None` if it is, or none can tell."""
    found = weights_record(model_dir) if weights else None
    if found is None:
        return None
    if found["fingerprint"] != weights.get("fingerprint"):
        return "the weights beside it have changed since it was made"
    if "base" in found and found["base"] != weights.get("base", found["base"]):
        return "the adapter's base model has other weights than when it was made"
    return None


def check_fresh(record: CalibrationRecord, model_dir: str | Path) -> None:
    """Refuses a record that is of other weights than those beside it.

    Raises:
        ValueError: the weights were changed after the record was made.
    """
    reason = stale(record.weights, model_dir)
    if reason is not None:
        raise ValueError(
            f"{FILE_NAME} in {str(model_dir)!r} is not of this checkpoint: {reason}. Predict on held-out data and fit "
            f"it anew (`moecal predict`, `moecal calibrate`), or delete {FILE_NAME} and load with transformers."
        )
    if record.weights is None and record.method != "none" and weights_fingerprint(model_dir) is not None:
        warnings.warn(
            f"{FILE_NAME} does not say of which weights it is, so nobody can tell whether it is of these; fit it anew "
            "with this version of hf_moecal."
        )


def _base_folder(model_dir: Path) -> Path | None:
    """Where the base model of an adapter lies on this machine: a folder, or the Hub's cache."""
    if not (model_dir / ADAPTER_CONFIG).is_file():
        return None
    adapter = read_json(model_dir / ADAPTER_CONFIG)
    base, revision = adapter.get("base_model_name_or_path"), adapter.get("revision")
    if not base or Path(base).is_dir():
        return Path(base) if base else None
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(base, "config.json", revision=revision)
    except ValueError:  # no name of a repository: a folder of another machine
        return None
    return Path(found).parent if isinstance(found, str) else None


def recorded_readout(model_dir: str | Path) -> Readout:
    """What a checkpoint's `calibration.json` says that predicts; the native readout where it says nothing."""
    if not (Path(model_dir) / FILE_NAME).exists():
        return Readout()
    return Readout.from_record(read_record(model_dir).readout)


def load_committee(model: nn.Module, model_dir: str | Path, readout: Readout, hub: Mapping[str, Any]) -> None:
    """Gives the model the further members of a checkpoint, if it is one of a committee.

    Raises:
        ValueError: their file is missing, or holds another number of members.
    """
    if readout.members == 1:
        return
    file = Path(model_dir) / MEMBERS_FILE
    if not Path(model_dir).exists():
        from huggingface_hub import hf_hub_download

        file = Path(hf_hub_download(str(model_dir), MEMBERS_FILE, **hub))
    if not file.is_file():
        raise ValueError(f"{FILE_NAME} says {readout.name!r}, but there is no {MEMBERS_FILE} beside it.")
    load_members(model, file)
    if count_members(model) != readout.members:
        raise ValueError(
            f"{FILE_NAME} says {readout.name!r}, but {MEMBERS_FILE} makes {count_members(model)} members."
        )


def with_calibration(model: nn.Module, readout: Readout, calibrator: Calibrator) -> tuple[Readout, Calibrator]:
    """The readout with the temperatures of its experts, where the calibrator has some, and what is left to apply.

    Temperatures that were fitted on a distribution over answer options stay with the predictions table: a mixture over
    the vocabulary, cut down to the options, is another one than a mixture over the options.
    """
    of_classes = readout.is_mixture and calibrator.scoring is None
    if not (of_classes and isinstance(calibrator, PerExpertTemperatureCalibrator)):
        return readout, calibrator
    experts = readout.members * find_moe_layers(model)[-1].num_experts
    rest = TemperatureCalibrator.from_parameters({"temperature": calibrator.temperature})
    return replace(readout, temperatures=calibrator.temperatures(experts)), rest


def attach_readout(model: nn.Module, readout: Readout) -> None:
    """Makes a model in evaluation mode give the readout's log-probabilities as its logits, for good.

    A loss that is computed from `labels` is of these too. A language model gives them at the positions that
    `logits_to_keep` asks for (all, if it says nothing): the answer itself takes their number times the vocabulary,
    and beside it one chunk of 2^23 logits for each expert exists at a time.

    Args:
        model: a sequence classifier or a causal language model, with its committee.
        readout: what it predicts by.

    Raises:
        ValueError: the model has a readout already, or predicts no classes.
    """
    if hasattr(model, ATTACHED):
        raise ValueError("This model has a readout already; load it anew to read it in another way.")
    language = model.get_output_embeddings() is not None
    kinds = (None, "single_label_classification")
    if not language and (model.config.num_labels < 2 or model.config.problem_type not in kinds):
        raise ValueError(
            f"A readout mixes probabilities of classes, and {type(model).__name__} with num_labels="
            f"{model.config.num_labels} and problem_type={model.config.problem_type!r} has none."
        )
    forward = ReadoutForward(model, readout)
    model.forward = forward
    setattr(model, ATTACHED, forward)
