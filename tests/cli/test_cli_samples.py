"""Samples of lm-evaluation-harness at the command line, in place of a table."""

from __future__ import annotations

import json

import numpy as np

from hf_moecal.calibration import read_record
from hf_moecal.cli.commands import main
from tests.training.helpers import language_model


def test_samples_are_evaluated_and_calibrated(tmp_path, capsys):
    rng = np.random.default_rng(0)
    rows = []
    for number, scores in enumerate(-3 * rng.gamma(2, size=(60, 3))):
        target = int((scores / 2 + rng.gumbel(size=3)).argmax())
        pairs = [[str(score), "False"] for score in scores]
        rows.append({"doc_id": number, "target": str(target), "filtered_resps": pairs, "filter": "none"})
    file = tmp_path / "samples_quiz_2025-03-01T10-00-00.1.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    language_model().save_pretrained(tmp_path / "model")
    model = ["--model", str(tmp_path / "model"), "--method", "temperature"]
    assert main(["calibrate", "--lm-eval-samples", str(tmp_path), "--filter", "none", *model]) == 0
    record = read_record(tmp_path / "model")
    assert record.scoring == "total" and record.data["name"] == tmp_path.name
    assert main(["evaluate", "--lm-eval-samples", str(file), "--json"]) == 0
    capsys.readouterr()
    for wrong in (["calibrate", *model], ["evaluate", str(file), "--filter", "none"]):
        assert main(wrong) == 2
    assert "give either a predictions table or --lm-eval-samples PATH" in capsys.readouterr().err
