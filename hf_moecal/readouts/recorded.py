"""A checkpoint that predicts by another readout than its own logits: recorded beside it, attached on loading."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
from ..table import IGNORED_LABEL
from .attached import ATTACHED, AttachedReadout
from .committee import MEMBERS_FILE, count_members, load_members
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
    attached = AttachedReadout(model, readout, rows=language, training=False)
    attached.__enter__()  # never left: it belongs to the model now
    if language:
        serving = _LanguageModel(attached)
        model.register_forward_pre_hook(serving.ask, with_kwargs=True)
    model.register_forward_hook(serving.answer if language else _with_loss, with_kwargs=True)
    setattr(model, ATTACHED, attached)


def _with_loss(model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    labels = kwargs.get("labels")
    if not model.training and labels is not None:
        output["loss"] = F.nll_loss(output["logits"], labels.view(-1), ignore_index=IGNORED_LABEL)
    return output


class _LanguageModel:
    """Between a language model's caller and its readout: positions are asked for before a forward, answered after."""

    def __init__(self, attached: AttachedReadout) -> None:
        self._attached = attached
        self._asked: tuple[Any, tuple[int, int], Tensor | None] | None = None

    def ask(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        self._asked = None
        if model.training or self._attached.is_quiet:
            return None
        given = args[0] if args else kwargs.get("input_ids")
        given = kwargs.get("inputs_embeds") if given is None else given
        batch, length = given.shape[:2]
        everywhere = torch.arange(batch * length, device=given.device).view(batch, length)
        kept = kwargs.get("logits_to_keep", 0)
        tokens = everywhere[:, kept] if isinstance(kept, Tensor) else everywhere[:, -kept:]
        labels = kwargs.get("labels")
        if labels is not None and tokens.shape != everywhere.shape:
            raise ValueError("A loss needs every position; leave `logits_to_keep` or `labels` unset.")
        attached = self._attached.at(tokens.reshape(-1))
        attached.__enter__()
        self._asked = attached, tuple(tokens.shape), labels
        return args, {name: value for name, value in kwargs.items() if name not in ("logits_to_keep", "labels")}

    def answer(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        if self._asked is None or self._attached.is_quiet:
            return output
        (attached, shape, labels), self._asked = self._asked, None
        found = self._attached.together(output, lambda part, log_probs: log_probs)
        attached.__exit__(None, None, None)
        output["logits"] = found.unflatten(0, shape)
        if labels is not None:
            output["loss"] = F.nll_loss(output["logits"][:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return output
