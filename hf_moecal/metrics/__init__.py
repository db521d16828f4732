"""Calibration figures of predicted probabilities. Needs numpy only."""

from __future__ import annotations

from .accumulator import CalibrationAccumulator
from .binning import reliability_bins
from .compute_metrics import calibration_metrics
from .groups import routing_groups
from .report import calibration_report, expected_calibration_error, metric_path, renormalized_table, table_report


__all__ = [
    "CalibrationAccumulator",
    "calibration_metrics",
    "calibration_report",
    "expected_calibration_error",
    "metric_path",
    "reliability_bins",
    "renormalized_table",
    "routing_groups",
    "table_report",
]
