"""Post-hoc calibrators: fitted on a predictions table, applied to one, saved as JSON; the model is not touched."""

from __future__ import annotations

from hf_moecal.calibration.base import Calibrator
from hf_moecal.calibration.classwise import IsotonicCalibrator, MatrixCalibrator, PlattCalibrator, VectorCalibrator
from hf_moecal.calibration.record import CalibrationRecord, read_record, write_record
from hf_moecal.calibration.routed import (
    GroupedTemperatureCalibrator,
    PerExpertTemperatureCalibrator,
    RoutingTemperatureCalibrator,
)
from hf_moecal.calibration.temperature import (
    ConservativeTemperatureCalibrator,
    IdentityCalibrator,
    RobustTemperatureCalibrator,
    ShrunkTemperatureCalibrator,
    TemperatureCalibrator,
)


__all__ = [
    "CalibrationRecord",
    "Calibrator",
    "ConservativeTemperatureCalibrator",
    "GroupedTemperatureCalibrator",
    "IdentityCalibrator",
    "IsotonicCalibrator",
    "METHODS",
    "MatrixCalibrator",
    "PerExpertTemperatureCalibrator",
    "PlattCalibrator",
    "RobustTemperatureCalibrator",
    "RoutingTemperatureCalibrator",
    "ShrunkTemperatureCalibrator",
    "TemperatureCalibrator",
    "VectorCalibrator",
    "from_record",
    "read_record",
    "write_record",
]

METHODS: dict[str, type[Calibrator]] = {
    kind.method: kind
    for kind in (  # simplest first: the order in which a tie is broken
        IdentityCalibrator,
        ShrunkTemperatureCalibrator,
        TemperatureCalibrator,
        ConservativeTemperatureCalibrator,
        RobustTemperatureCalibrator,
        GroupedTemperatureCalibrator,
        PerExpertTemperatureCalibrator,
        RoutingTemperatureCalibrator,
        PlattCalibrator,
        VectorCalibrator,
        MatrixCalibrator,
        IsotonicCalibrator,
    )
}


def from_record(record: CalibrationRecord) -> Calibrator:
    """The fitted calibrator that a record describes.

    Raises:
        ValueError: the method is unknown, a parameter is out of range, or the calibration is already in the weights.
    """
    if record.baked is not None:
        raise ValueError(
            "This calibration is already part of the checkpoint's weights: its logits are calibrated as they are, "
            "and applying it again would distort them."
        )
    if record.method not in METHODS:
        raise ValueError(f"Unknown calibration method {record.method!r}; known are {', '.join(sorted(METHODS))}.")
    calibrator = METHODS[record.method].from_parameters(record.parameters)
    calibrator.scoring, calibrator.zero = record.scoring, record.zero
    return calibrator
