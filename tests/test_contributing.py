"""What CONTRIBUTING.md says to do works: its snippets run, its paths exist, its tables have those lines."""

import re
from pathlib import Path

import numpy as np

from hf_moecal import calibration, objectives
from hf_moecal.calibration import CalibrationRecord, from_record
from hf_moecal.readouts import mixture
from hf_moecal.training import methods


ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "CONTRIBUTING.md").read_text()


def test_a_calibrator_in_ten_lines(monkeypatch):
    names = {}
    for snippet in re.findall(r"```python\n(.*?)```", GUIDE, re.S):
        exec(snippet, names)
    kind = names["ShrinkCalibrator"]
    monkeypatch.setitem(calibration.METHODS, kind.method, kind)
    loaded = from_record(CalibrationRecord(method="shrink", parameters={"share": 0.5}))
    found = loaded.apply({"logits": np.log([[0.9, 0.1]]), "label": np.array([0])})
    np.testing.assert_allclose(found["probs"], [[0.7, 0.3]])


def test_what_is_named_is_there():
    for path in re.findall(r"`((?:calibration|predictions|readouts|training|drift|cli)/\w+\.py)`", GUIDE):
        assert (ROOT / "hf_moecal" / path).is_file(), path
    for path in re.findall(r"`((?:recipes|scripts|tests)/[\w./]*)`", GUIDE):
        assert (ROOT / path).exists(), path
    assert {"METHODS", "OBJECTIVES", "READOUTS"} <= {*vars(calibration), *vars(objectives), *vars(mixture)}
    assert "METHODS" in vars(methods)


def test_the_guide_is_short():
    assert GUIDE.count("\n") < 150
