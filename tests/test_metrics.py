"""The numbers of hf_moecal.metrics against values worked out by hand or by a plain-Python twin."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest

from hf_moecal.metrics import calibration_report, expected_calibration_error


def test_import_needs_numpy_only():
    code = (
        "import sys, hf_moecal.metrics;"
        "print([m for m in ('torch', 'transformers', 'evaluate', 'datasets', 'scipy', 'matplotlib') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_certain_and_half_right():
    report = calibration_report(confidence=[1.0, 1.0], correct=[1, 0])
    assert report["ece"] == 0.5
    assert expected_calibration_error(confidence=[1.0, 1.0], correct=[True, False]) == 0.5
    assert math.isnan(report["nll"])


def test_logits_equal_probs():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(50, 4)), rng.integers(0, 4, 50)
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    a, b = calibration_report(labels, logits=logits), calibration_report(labels, probs=probs)
    for name in ("ece", "nll", "brier", "accuracy", "ece_debiased", "auroc", "aurc"):
        assert a[name] == pytest.approx(b[name], abs=1e-12)
