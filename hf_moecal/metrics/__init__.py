"""Calibration figures of predicted probabilities. Needs numpy only."""

from __future__ import annotations

from .accumulator import CalibrationAccumulator
from .binning import reliability_bins
from .report import calibration_metrics, calibration_report, expected_calibration_error, metric_path


__all__ = [
    "CalibrationAccumulator",
    "calibration_metrics",
    "calibration_report",
    "expected_calibration_error",
    "metric_path",
    "reliability_bins",
]
