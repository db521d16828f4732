"""Carry a calibration with its checkpoint: beside the weights, into a pipeline, and to the Hub."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..calibration import CalibrationRecord, Calibrator, from_record, read_record, write_record
from ..calibration.base import CALIBRATION, TABLE_CALIBRATOR, TOKEN_SCORING, is_left_to_table, with_columns
from ..calibration.record import FILE_NAME, MAX_BYTES
from ..calibration.rows import Rows, scoring_of
from ..calibration.selection import AUTO, CalibrationResult, calibrate_table
from ..calibration.temperature import IdentityCalibrator, TemperatureCalibrator
from ..model.conditions import CONDITIONS, conditions_of, differences, from_text
from ..model.labels import class_numbers
from ..model.loading import HUB_ARGUMENTS, language_vocabulary, load_model, own_labels
from ..readouts.committee import ATTACHED
from ..readouts.mixture import Readout
from ..readouts.recorded import (
    attach_readout,
    check_fresh,
    load_committee,
    recorded_readout,
    weights_record,
    with_calibration,
)
from ..table import SCORINGS, columns, names
from .checkpoint_files import load_training_ids
from .publish import PublishError, push
from .saving import keep_on_save


__all__ = [
    "PublishError",
    "attach_calibrator",
    "before_and_after",
    "calibrate",
    "find_record",
    "from_pretrained",
    "load_calibration",
    "push",
    "write_calibration",
]

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from ..calibration.base import Table


_STATED_VERSIONS = ("hf_moecal", "transformers", "torch", "numpy", "scikit-learn")


def write_calibration(
    model_dir: str | Path,
    calibrator: Calibrator,
    *,
    data: Mapping[str, Any] | None = None,
    before: Mapping[str, Any] | None = None,
    after: Mapping[str, Any] | None = None,
    comparison: Sequence[Mapping[str, Any]] = (),
    warnings: Sequence[str] | None = None,
    readout: Readout | None = None,
    conditions: Mapping[str, str] | None = None,
) -> Path:
    """Writes `calibration.json` beside the weights in `model_dir`; the weights stay as they are.

    The file says of which weights it is, by a fingerprint of the folder's: whoever changes these afterwards has to
    calibrate anew, since [`from_pretrained`] and [`push`] refuse the two together.

    Args:
        model_dir: folder of the checkpoint.
        calibrator: fitted.
        data: what it was fitted on: `name`, `revision`, `n`, `seed` and so on.
        before, after: figures of [`~hf_moecal.metrics.calibration_report`] on held-out rows without and with it.
        comparison: the methods that were compared, as `calibrate_table` gives them.
        warnings: what a user should know. Default: what the calibrator said when it was fitted.
        readout: whose predictions the calibrator was fitted on. Default: the one that the folder says.
        conditions: under what they were made (see [`~hf_moecal.model.conditions.conditions_of`]); a model that is
            loaded under others says so. Default: unknown.

    Returns:
        The path of the file.

    Raises:
        ValueError: the folder does not exist, the calibrator is not fitted, or the calibration that is there already
            is part of the weights.
    """
    model_dir = Path(model_dir)
    if not model_dir.is_dir():
        raise ValueError(f"{str(model_dir)!r} is not a folder; give the folder of a saved checkpoint.")
    calibrator.require_fitted()
    if (model_dir / FILE_NAME).exists() and read_record(model_dir).baked is not None:
        raise ValueError(
            "This checkpoint has a temperature in its weights, and a second calibration would hide that; "
            "calibrate the checkpoint that it was baked from."
        )
    record = CalibrationRecord(
        method=calibrator.method,
        parameters=calibrator.parameters(),
        data=dict(data or {}),
        before=None if before is None else dict(before),
        after=None if after is None else dict(after),
        comparison=[dict(entry) for entry in comparison],
        warnings=list(calibrator.warnings if warnings is None else warnings),
        versions=_versions(),
        readout=(recorded_readout(model_dir) if readout is None else readout).record(),
        scoring=calibrator.scoring,
        zero=calibrator.zero,
        weights=weights_record(model_dir),
        conditions=None if conditions is None else dict(conditions),
    )
    return write_record(model_dir, record)


def calibrate(
    model_dir: str | Path,
    table: Table,
    *,
    method: str | Calibrator = AUTO,
    data: Mapping[str, Any] | None = None,
    folds: int = 5,
    seed: int = 0,
    progress: bool = False,
) -> CalibrationResult:
    """Fits a calibration on a checkpoint's predictions, writes it beside the weights, and says what it does.

    Args:
        model_dir: folder of the checkpoint whose predictions these are.
        table: predictions on labelled data that the model was not trained on. Labels may be the texts that the
            checkpoint's config has for its classes (`id2label`).
        method, folds, seed, progress: see [`~hf_moecal.calibration.selection.calibrate_table`].
        data: `name` and `revision` of the data, for the record and the model card.

    Returns:
        What was compared and chosen, with figures on held-out rows before and after.

    Raises:
        ValueError: the table cannot be used, holds rows that the checkpoint's record names as training data, mixes
            predictions of different kinds, is of a committee that the checkpoint is not, or does not say what a
            language model's scores are of.
    """
    _refuse_calibrated(table)
    readout, conditions = _readout_of(table, model_dir), _only(table, CONDITIONS)
    table = _numbered(table, Path(model_dir))
    _check_scores(table, Path(model_dir))
    settings = {"method": method, "folds": folds, "seed": seed, "progress": progress}
    result = calibrate_table(table, training_ids=load_training_ids(model_dir), **settings)
    write_calibration(
        model_dir,
        result.calibrator,
        data={**(data or {}), **result.data},
        before=result.before,
        after=result.after,
        comparison=result.comparison,
        warnings=result.warnings,
        readout=readout,
        conditions=None if conditions is None else from_text(conditions),
    )
    return result


def _refuse_calibrated(table: Table) -> None:
    """Raises for calibrated probabilities without the model's own logits beside them."""
    if CALIBRATION in names(table) and "logits" not in names(table):
        raise ValueError(
            f"The table's probabilities are calibrated already (by {_only(table, CALIBRATION)!r}): the model was "
            "loaded with its calibration. Predict with the plain checkpoint (`moecal predict --raw`, or load it with "
            "transformers)."
        )


def _only(table: Table, name: str) -> str | None:
    """The one value of a column that says how the predictions were made; `None` where the table does not say."""
    found = set(columns(table, name)[name].tolist()) if name in names(table) else {None}
    if len(found) > 1:
        raise ValueError(
            f"The table mixes predictions by {sorted(map(str, found))} (column {name!r}); calibrate one {name} at a "
            "time."
        )
    return found.pop()


def _readout_of(table: Table, model_dir: str | Path) -> Readout:
    """What a table's predictions are by; the checkpoint then is calibrated for that."""
    readout, own = Readout.named(_only(table, "readout")), recorded_readout(model_dir)
    if readout.members != own.members:
        raise ValueError(
            f"The table's predictions are by {readout.name or 'native'!r}, but the checkpoint is to be read by "
            f"{own.name or 'native'!r}; predict with the checkpoint itself."
        )
    return readout


def _numbered(table: Table, model_dir: Path) -> Table:
    """The table with the numbers of its labels, where these are text that the checkpoint's config has numbers for."""
    labels = columns(table, "label")["label"]
    if labels.dtype.kind not in "OUS" or not len(labels):
        return table
    numbers = class_numbers(labels.tolist(), own_labels(model_dir) or {})
    return with_columns(table, {"label": np.array(numbers)})


def _check_scores(table: Table, model_dir: Path) -> None:
    """Raises when a table's scores are not the checkpoint's, or nobody knows what they are of."""
    vocabulary = language_vocabulary(model_dir)
    scoring, width = scoring_of(table), Rows(table, labelled=False).logits.shape[1]
    if vocabulary is None and scoring is not None and (model_dir / "config.json").exists():
        raise ValueError(
            f"The table is of answer options scored by {scoring!r}, and the checkpoint is a classifier; give the "
            "table that hf_moecal.predict makes with the checkpoint."
        )
    if vocabulary is not None and scoring is None and width != vocabulary:
        raise ValueError(
            f"The table has {width} scores per row and does not say what they are of, and the checkpoint is a "
            f"language model of {vocabulary} tokens. Add a column 'scoring' with one of "
            f"{', '.join(map(repr, SCORINGS))} (see hf_moecal.table), or make the table with hf_moecal.predict."
        )


def before_and_after(model_dir: str | Path, table: Table) -> tuple[Table, Table | None]:
    """A checkpoint's predictions as its own probabilities, and calibrated by what it carries.

    Args:
        model_dir: folder of the checkpoint.
        table: its predictions, calibrated already or not.

    Returns:
        The table with its own probabilities, and the calibrated one; `None` where there is nothing to apply: no
        calibration, one that is part of the weights, or a table without distributions.

    Raises:
        ValueError: the calibration is of other weights, needs columns that the table lacks, or is in its logits.
    """
    _refuse_calibrated(table)
    own = IdentityCalibrator.from_parameters({}).apply(table) if {"logits", "probs"} & set(names(table)) else table
    if own is table or not (Path(model_dir) / FILE_NAME).exists():
        return own, None
    record = read_record(model_dir)
    if record.baked is not None or record.method == "none":
        return own, None
    return own, load_calibration(model_dir).apply(table)


def load_calibration(model_dir: str | Path, **hub: Any) -> Calibrator:
    """The calibrator that a checkpoint carries in its `calibration.json`; call its `apply` on a predictions table.

    Args:
        model_dir: folder, or a repository on the Hub.
        hub: `revision`, `token`, `cache_dir`, `local_files_only` for a repository.

    Raises:
        ValueError: there is no such file, it is malformed, of other weights than those in the folder, or already part
            of them.
    """
    record, folder = _record_of(model_dir, hub)
    if Path(model_dir).is_dir():
        check_fresh(record, folder)
    return from_record(record)


def from_pretrained(model_dir: str | Path, **kwargs: Any) -> PreTrainedModel:
    """A model that gives calibrated probabilities, in a `transformers` pipeline too.

    In evaluation mode the model's logits are replaced: first by the log-probabilities of the readout that the
    checkpoint was trained or calibrated for, if that is a mixture or a committee (with the temperatures of its
    experts, where these were fitted; see [`~hf_moecal.readouts.recorded.attach_readout`]); then by logits / T for a
    temperature, by calibrated log-probabilities for the other methods that need logits only (sequence
    classification). A loss that the model computes from `labels` is that of the readout before its calibration. A
    method that needs the routing, and any that was fitted on the scores of whole answer options, works on the
    predictions table alone: [`~hf_moecal.predict`] applies it, and the model's logits stay its own. A temperature of
    label words is one of the logits, fitted on these words only. What is baked into the weights is left as it is.

    `save_pretrained` and `push_to_hub` of the model write what it was loaded with as well: `calibration.json` and the
    members of a committee. Once its weights have been trained the calibration is not theirs any more: it is left out,
    with a warning.

    Args:
        model_dir: folder or repository with a checkpoint and its `calibration.json`.
        kwargs: for `from_pretrained` of transformers, such as `revision`, `token`, `dtype`, `device_map`.

    Raises:
        ValueError: the checkpoint has no calibration, a malformed one, or one of other weights.

    Warns:
        UserWarning: the calibration was fitted under another dtype, attention or experts implementation, or
            quantization than the model now has.
    """
    hub = {key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs}
    record, folder = _record_of(model_dir, hub)
    if Path(model_dir).is_dir():
        check_fresh(record, folder)  # before anything large is loaded
    model, readout = load_model(model_dir, **kwargs), Readout.from_record(record.readout)
    load_committee(model, model_dir, readout, hub)
    if not Path(model_dir).is_dir():
        check_fresh(record, folder)  # the weights have been fetched beside it now
    changed = differences(record.conditions or {}, conditions_of(model))
    if changed and record.method != "none":
        warnings.warn(
            f"The calibration was fitted on predictions with {changed}: under other conditions probabilities may be "
            "off. Load the model as it was then, or predict and calibrate as you serve it."
        )
    if record.baked is None:
        readout, calibrator = with_calibration(model, readout, from_record(record))
        if not readout.is_plain:
            attach_readout(model, readout)
        attach_calibrator(model, calibrator)
    keep_on_save(model, record)
    return model


def attach_calibrator(model: PreTrainedModel, calibrator: Calibrator) -> None:
    """Makes a model in evaluation mode give calibrated logits, or marks it for its predictions table.

    Raises:
        ValueError: the model has a calibrator already.
    """
    if getattr(model, "_moecal_calibrated", False):
        raise ValueError("This model is calibrated already; load it anew to calibrate it in another way.")
    model._moecal_calibrated = True
    if isinstance(calibrator, IdentityCalibrator):
        return
    setattr(model, TABLE_CALIBRATOR, calibrator)
    if not _is_of_logits(model, calibrator):
        return

    model.register_forward_hook(partial(_calibrate, calibrator))


def _calibrate(calibrator: Calibrator, module: torch.nn.Module, arguments: tuple, output: Any) -> Any:
    attached = getattr(module, ATTACHED, None)  # a copy of the model has its own
    if module.training or is_left_to_table(module):
        return output
    if attached is not None and attached.is_quiet:  # the readout's own forwards
        return output
    if not hasattr(output, "logits"):
        raise ValueError("A calibrated model returns named outputs; call it with return_dict=True.")
    output.logits = _calibrated(output.logits, calibrator)
    return output


def _is_of_logits(model: PreTrainedModel, calibrator: Calibrator) -> bool:
    """Whether the calibration can be applied to what the model's forward gives, not only to a predictions table."""
    if isinstance(calibrator, TemperatureCalibrator):
        return calibrator.scoring in (None, TOKEN_SCORING)
    return not calibrator.reads and calibrator.scoring is None and _classifies(model)


def _classifies(model: PreTrainedModel) -> bool:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return type(base).__name__.endswith("ForSequenceClassification")


def _calibrated(logits: torch.Tensor, calibrator: Calibrator) -> torch.Tensor:
    if isinstance(calibrator, TemperatureCalibrator):
        return logits / calibrator.temperature
    import torch

    flat = logits.detach().float().reshape(-1, logits.shape[-1]).cpu().numpy()
    probs = torch.from_numpy(calibrator.apply({"logits": flat})["probs"])
    return probs.clamp_min(torch.finfo(torch.float32).tiny).log().to(logits).reshape(logits.shape)


def find_record(model_dir: str | Path) -> CalibrationRecord | None:
    """The calibration that a folder or repository carries; `None` where it has none, or nobody can ask."""
    if Path(model_dir).exists():
        return read_record(model_dir) if (Path(model_dir) / FILE_NAME).exists() else None
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return _record_of(model_dir, {})[0]
    except ValueError as error:
        if isinstance(error.__cause__, EntryNotFoundError):  # absent, also from the cache of who is offline
            return None
        raise


def _record_of(model_dir: str | Path, hub: Mapping[str, Any]) -> tuple[CalibrationRecord, Path]:
    """The record of a folder, or of a repository after its size was asked for, and the local folder that holds it."""
    if Path(model_dir).exists():
        return read_record(model_dir), Path(model_dir)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError

    try:
        size = hf_hub_download(str(model_dir), FILE_NAME, dry_run=True, **hub).file_size
        if size is not None and size > MAX_BYTES:
            raise ValueError(f"{FILE_NAME!r} of {model_dir} has {size >> 20} MiB, which no calibration record has.")
        path = hf_hub_download(str(model_dir), FILE_NAME, **hub)
    except LocalEntryNotFoundError as error:
        raise ValueError(f"{FILE_NAME} of {model_dir} is neither in the cache nor can the Hub be reached.") from error
    except RemoteEntryNotFoundError as error:
        raise ValueError(
            f"{model_dir} has no {FILE_NAME}: load it with transformers, or fit a calibration with `moecal calibrate`."
        ) from error
    return read_record(path), Path(path).parent


def _versions() -> dict[str, str]:
    found = {}
    for name in _STATED_VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
