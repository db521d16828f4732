"""A calibration is of one kind of scores: fitted, shipped, loaded and predicted, it gives the calibrated table."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from datasets import Dataset

from hf_moecal import from_pretrained, predict
from hf_moecal.calibration import METHODS, Calibrator, TemperatureCalibrator, read_record
from hf_moecal.hub import calibrate, load_calibration, write_calibration
from hf_moecal.hub.bake import bake
from hf_moecal.readouts.committee import save_members
from hf_moecal.readouts.mixture import Readout
from hf_moecal.readouts.recorded import record_readout
from hf_moecal.table import SCORINGS
from tests.readouts.helpers import committee
from tests.tasks.helpers import examples
from tests.training.helpers import classification_model, language_model


pytestmark = [
    pytest.mark.filterwarnings("ignore:.*labelled rows"),
    pytest.mark.filterwarnings("ignore:No row is routing-relevant"),
]
TASKS = [("classification", None), *(("choice", scoring) for scoring in SCORINGS)]
MEMBERS = {"native": 1, "mixture": 1, "soft_mixture": 1, "committee": 2}


def questions(scoring, count=60):
    """Rows of the same three options, and their labels."""
    rows = [row for row in examples(3 * count, words=scoring == "label_word") if len(row["option_ids"]) == 3][:count]
    return Dataset.from_list([{**row, "label": i % 3, "group": "ab"[i % 2]} for i, row in enumerate(rows)])


def texts(count=60):
    rng = np.random.default_rng(0)
    ids = [rng.integers(1, 48, 4 + i % 3).tolist() for i in range(count)]
    return Dataset.from_dict({"input_ids": ids, "label": [i % 3 for i in range(count)], "group": ["a", "b"] * 30})


def checkpoint(folder, task, readout):
    """A saved model, what it predicts by, and its data's settings."""
    build = classification_model if task == "classification" else language_model
    model = (committee(build, 2) if readout == "committee" else build()).eval()
    kind = "native" if readout == "committee" else readout
    model.save_pretrained(folder)
    save_members(model, folder)
    record_readout(folder, Readout(kind, members=MEMBERS[readout]))
    return model, {"readout": None if kind == "native" else kind}


@pytest.mark.parametrize("readout", MEMBERS)
@pytest.mark.parametrize("task, scoring", TASKS)
def test_shipped_calibrations_give_the_calibrated_table_or_say_why_not(tmp_path, task, scoring, readout):
    settings = {"task": task, "progress": False, **({} if scoring is None else {"scoring": scoring})}
    data = texts() if scoring is None else questions(scoring)
    model, asked = checkpoint(tmp_path, task, readout)
    probs = np.array(predict(model, data, layer=None if not asked else -1, **settings, **asked)["probs"])
    drawn = [int(np.random.default_rng(row).choice(3, p=p / p.sum())) for row, p in enumerate(probs**0.6)]
    data = data.remove_columns("label").add_column("label", drawn)  # a temperature above one is best
    table = predict(model, data, **settings, **asked)
    for method, kind in METHODS.items():
        calibrator = kind()
        if missing := [name for name in calibrator.reads if name not in table.column_names]:
            with pytest.raises(ValueError, match=f"no column '{missing[0]}'"):
                calibrator.fit(table)
            continue
        write_calibration(tmp_path, calibrator.fit(table))
        expected = np.array(calibrator.apply(table)["probs"])
        assert read_record(tmp_path).scoring == scoring
        loaded = from_pretrained(tmp_path)
        try:
            found = predict(loaded, data, **settings)
        except ValueError as error:  # a language model that predicts by a mixture or a committee
            assert task == "choice" and readout in ("mixture", "soft_mixture", "committee")
            assert "load_calibration(folder)" in str(error)
            found = load_calibration(tmp_path).apply(table)  # what the error says
        np.testing.assert_allclose(found["probs"], expected, rtol=0, atol=1e-6)
        assert found["prediction"][:] == expected.argmax(1).tolist()
        if task == "classification" and not calibrator.reads and method != "none":
            with torch.no_grad():
                logits = loaded(input_ids=torch.tensor([data["input_ids"][0]])).logits
            np.testing.assert_allclose(logits.softmax(-1)[0], expected[0], rtol=0, atol=2e-6)
        bakeable = isinstance(calibrator, TemperatureCalibrator) and readout == "native"
        if bakeable and scoring not in (None, "label_word"):
            with pytest.raises(ValueError, match=f"whole answer options scored by '{scoring}'"):
                bake(tmp_path, output_dir=tmp_path / "baked")


def test_a_language_model_is_not_calibrated_by_scores_of_unknown_kind(tmp_path):
    model, _ = checkpoint(tmp_path, "choice", "native")
    table = predict(model, questions("total"), task="choice", scoring="total", progress=False)
    with pytest.raises(ValueError, match="3 scores per row and does not say what they are of.*48 tokens.*'scoring'"):
        calibrate(tmp_path, table.remove_columns("scoring"), method="temperature")
    calibrate(tmp_path, table, method="vector", folds=2)
    assert read_record(tmp_path).scoring == "total"
    mixed = table.remove_columns("scoring").add_column("scoring", ["total", "per_byte"] * 30)
    with pytest.raises(ValueError, match="mixes options scored by per_byte, total"):
        calibrate(tmp_path, mixed)
    tokens = {"logits": np.random.default_rng(0).normal(size=(200, 48)), "label": np.arange(200) % 48}
    calibrate(tmp_path, tokens, method="none", folds=2)
    assert read_record(tmp_path).scoring is None
    classification_model().save_pretrained(tmp_path / "classifier")
    with pytest.raises(ValueError, match="answer options scored by 'total', and the checkpoint is a classifier"):
        calibrate(tmp_path / "classifier", table)


def test_a_calibration_is_not_used_on_scores_of_another_kind(tmp_path):
    checkpoint(tmp_path, "choice", "native")
    data = questions("label_word")
    for scoring, others in {"label_word": ("total",), "total": ("label_word", "per_token")}.items():
        calibrator = TemperatureCalibrator.from_parameters({"temperature": 2.0})
        calibrator.scoring = scoring
        write_calibration(tmp_path, calibrator)
        model = from_pretrained(tmp_path)
        for other in others:
            with pytest.raises(ValueError, match=f"scored by '{scoring}', and these are scored by '{other}'"):
                predict(model, data, task="choice", scoring=other, progress=False)
        with pytest.raises(ValueError, match="is of answer options, and task='lm' asks for tokens"):
            predict(model, data, task="lm", progress=False)
        with pytest.raises(ValueError, match="of its native readout, and would distort 'soft_mixture'"):
            predict(model, data, task="choice", scoring=scoring, readout="soft_mixture", progress=False)
    table = {"logits": np.eye(2), "label": [0, 1], "scoring": ["per_byte"] * 2}
    with pytest.raises(ValueError, match="scored by 'total', and these are scored by 'per_byte'"):
        Calibrator.load(calibrator.save(tmp_path / "calibration.json")).apply(table)
    assert calibrator.apply({**table, "scoring": ["good", "bad"]})["probs"].shape == (2, 2)  # a column of the user's
    record = json.loads((tmp_path / "calibration.json").read_text())
    (tmp_path / "calibration.json").write_text(json.dumps({**record, "scoring": "by ear"}))
    with pytest.raises(ValueError, match="wrong 'scoring'"):
        read_record(tmp_path)


def test_a_temperature_of_tokens_is_in_every_score(tmp_path):
    model, _ = checkpoint(tmp_path, "choice", "native")
    write_calibration(tmp_path, TemperatureCalibrator.from_parameters({"temperature": 2.0}))
    loaded, scaled = from_pretrained(tmp_path), language_model().eval()
    scaled.load_state_dict(model.state_dict())
    scaled.lm_head.register_forward_hook(lambda module, args, output: output / 2)
    data = questions("total", 6)
    settings = {"task": "choice", "scoring": "total", "layer": None, "progress": False}
    expected, found = (np.array(predict(one, data, **settings)["logits"]) for one in (scaled, loaded))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(expected - np.array(predict(model, data, **settings)["logits"])).max() > 0.1


def test_labels_may_be_the_texts_that_the_checkpoint_names(tmp_path):
    model = classification_model()
    model.config.id2label, model.config.label2id = dict(enumerate("xyz")), {name: i for i, name in enumerate("xyz")}
    model.save_pretrained(tmp_path)
    logits, label = np.random.default_rng(0).normal(size=(90, 3)), np.arange(90) % 3
    by_text = calibrate(tmp_path, {"logits": logits, "label": np.array(list("xyz"))[label]}, method="vector", folds=2)
    by_number = calibrate(tmp_path, {"logits": logits, "label": label}, method="vector", folds=2)
    np.testing.assert_array_equal(by_text.calibrator.scale, by_number.calibrator.scale)
    with pytest.raises(ValueError, match=r"'label' holds 'w', .* the model's classes are 0: x, 1: y, 2: z\."):
        calibrate(tmp_path, {"logits": logits, "label": np.array(list("wyz"))[label]})
