"""Carry a calibration with its checkpoint: beside the weights, into a pipeline, and to the Hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from hf_moecal.calibration import CalibrationRecord, Calibrator, read_record, write_record


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
) -> Path:
    """Writes `calibration.json` beside the weights in `model_dir`; the weights stay as they are.

    Args:
        model_dir: folder of the checkpoint.
        calibrator: fitted.
        data: what it was fitted on: `name`, `revision`, `n`, `seed` and so on.
        before, after: figures of [`~hf_moecal.metrics.calibration_report`] on held-out rows without and with it.
        comparison: the methods that were compared, as `calibrate_table` gives them.
        warnings: what a user should know. Default: what the calibrator said when it was fitted.

    Returns:
        The path of the file.

    Raises:
        ValueError: the folder does not exist or the calibrator is not fitted.
    """
    model_dir = Path(model_dir)
    if not model_dir.is_dir():
        raise ValueError(f"{str(model_dir)!r} is not a folder; give the folder of a saved checkpoint.")
    calibrator.require_fitted()
    record = CalibrationRecord(
        method=calibrator.method,
        parameters=calibrator.parameters(),
        data=dict(data or {}),
        before=None if before is None else dict(before),
        after=None if after is None else dict(after),
        comparison=[dict(entry) for entry in comparison],
        warnings=list(calibrator.warnings if warnings is None else warnings),
        versions=_versions(),
    )
    return write_record(model_dir, record)


def load_calibration(model_dir: str | Path) -> Calibrator:
    """The calibrator that a checkpoint carries in its `calibration.json`; call its `apply` on a predictions table.

    Raises:
        ValueError: there is no such file, it is malformed, or the calibration is already part of the weights.
    """
    from hf_moecal.calibration import from_record

    return from_record(read_record(model_dir))


def _versions() -> dict[str, str]:
    found = {}
    for name in _STATED_VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
