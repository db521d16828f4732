"""A checkpoint that predicts by another readout than its own logits: recorded beside it, attached on loading."""

from __future__ import annotations

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
from ..calibration.record import FILE_NAME
from ..probes import find_moe_layers
from .committee import ATTACHED, MEMBERS_FILE, count_members, load_members
from .forward import ReadoutForward
from .mixture import Readout


def record_readout(model_dir: str | Path, readout: Readout) -> None:
    """Writes into a checkpoint's `calibration.json` what predicts; a calibration of the same readout stays.

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
    if recorded_readout(model_dir) != readout:
        write_record(model_dir, CalibrationRecord(method="none", parameters={}, readout=readout.record()))


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
