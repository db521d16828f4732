"""A calibration beside its checkpoint: files, calibrated models and pipelines, and what hostile files do."""

from __future__ import annotations

import json
import os
import pickle
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, pipeline

from hf_moecal.calibration import (
    Calibrator,
    IdentityCalibrator,
    RoutingTemperatureCalibrator,
    TemperatureCalibrator,
    VectorCalibrator,
    read_record,
)
from hf_moecal.calibration.selection import CANDIDATES
from hf_moecal.hub import (
    TABLE_CALIBRATOR,
    attach_calibrator,
    calibrate,
    from_pretrained,
    load_calibration,
    write_calibration,
)
from hf_moecal.hub.checkpoint_files import (
    load_evaluation,
    load_training_ids,
    load_training_settings,
    write_evaluation,
    write_training_record,
)
from tests.calibration.helpers import drawn, routed
from tests.hub.helpers import saved, temperature, tokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("checkpoint"))


def test_written_and_read_back(tmp_path):
    table = routed()
    calibrator = TemperatureCalibrator().fit(table)
    figures = {"ece": np.float64(0.1), "worst": float("nan"), "ece_interval": np.array([0.05, 0.2])}
    path = write_calibration(tmp_path, calibrator, data={"name": "movies", "n": 800}, before=figures, after=figures)
    record = read_record(tmp_path)
    assert path.name == "calibration.json" and record.data == {"name": "movies", "n": 800}
    assert record.before == {"ece": 0.1, "worst": None, "ece_interval": [0.05, 0.2]}
    assert record.versions["transformers"] and record.baked is None
    loaded = load_calibration(tmp_path)
    assert loaded.temperature == calibrator.temperature and loaded.interval == calibrator.interval
    assert sorted(os.listdir(tmp_path)) == ["calibration.json"]  # no temporary file is left


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    write_calibration(tmp_path, temperature(2.0))
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_calibration(tmp_path, temperature(3.0))
    assert load_calibration(tmp_path).temperature == 2.0 and os.listdir(tmp_path) == ["calibration.json"]


def test_the_model_gives_calibrated_logits_in_evaluation_only(checkpoint, tmp_path):
    write_calibration(checkpoint, temperature())
    plain = AutoModelForSequenceClassification.from_pretrained(checkpoint).eval()
    model = from_pretrained(checkpoint)
    ids = torch.arange(3, 13)[None]
    torch.testing.assert_close(model(input_ids=ids).logits, plain(input_ids=ids).logits / 1.7)
    assert torch.equal(model.train()(input_ids=ids).logits, plain.train()(input_ids=ids).logits)
    with pytest.raises(ValueError, match="return_dict=True"):
        model.eval()(input_ids=ids, return_dict=False)
    with pytest.raises(ValueError, match="calibrated already"):
        attach_calibrator(model, temperature())
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(again(input_ids=ids).logits, plain.eval()(input_ids=ids).logits)  # the weights are as they were


def test_a_text_classification_pipeline_gives_calibrated_probabilities(tmp_path):
    folder = saved(tmp_path, vocab_size=32)
    words = tokenizer(folder)
    logits, label = drawn(400, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        vector = VectorCalibrator().fit({"logits": logits * [1, 2, 3], "label": label})
    plain = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    texts = ["the plot is thin", "two leads carry it with ease and not bad"]
    for calibrator in (temperature(0.2), vector):
        write_calibration(folder, calibrator)
        classify = pipeline("text-classification", model=from_pretrained(folder), tokenizer=words, top_k=None)
        for text, scores in zip(texts, classify(texts), strict=True):
            raw = plain(**words(text, return_tensors="pt")).logits.detach().numpy()
            expected = calibrator.apply({"logits": raw})["probs"][0]
            got = {entry["label"]: entry["score"] for entry in scores}
            assert [got[f"LABEL_{i}"] for i in range(3)] == pytest.approx(expected, abs=1e-5)


def test_methods_that_need_the_table_are_left_to_it(tmp_path):
    folder = saved(tmp_path)
    calibrator = RoutingTemperatureCalibrator().fit(routed(2000))
    write_calibration(folder, calibrator)
    model, plain = from_pretrained(folder), AutoModelForSequenceClassification.from_pretrained(folder).eval()
    ids = torch.arange(3, 13)[None]
    assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)
    assert getattr(model, TABLE_CALIBRATOR).method == "routing_temperature"
    write_calibration(folder, IdentityCalibrator.from_parameters({}))
    assert torch.equal(from_pretrained(folder)(input_ids=ids).logits, plain(input_ids=ids).logits)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's own use of it
def test_a_lora_adapter_is_loaded_on_its_base(tmp_path):
    from peft import LoraConfig, get_peft_model

    base = saved(tmp_path / "base", causal=True)
    model = AutoModelForCausalLM.from_pretrained(base)
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    write_calibration(tmp_path / "adapter", temperature())
    ids = torch.arange(3, 13)[None]
    loaded = from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(loaded(input_ids=ids).logits, adapted(input_ids=ids).logits / 1.7)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_a_classifier_adapter_says_how_many_classes_there_are(tmp_path):
    from peft import LoraConfig, get_peft_model

    base = AutoModelForSequenceClassification.from_pretrained(saved(tmp_path / "base", causal=True), num_labels=5)
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, task_type="SEQ_CLS")
    adapted = get_peft_model(base, config).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    write_calibration(tmp_path / "adapter", temperature())
    ids = torch.arange(3, 13)[None]
    loaded = from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(loaded(input_ids=ids).logits, adapted(input_ids=ids).logits / 1.7)


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_nothing_is_unpickled(tmp_path):
    folder = tmp_path / "model"
    saved(folder)
    write_calibration(folder, temperature())
    (folder / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "adapter_model.bin", "training_args.bin", "calibration.pkl"):
        (folder / name).write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    with pytest.raises(OSError, match="safetensors"):
        from_pretrained(folder)
    assert not (tmp_path / "sprung").exists()


def test_calibrate_fits_writes_and_refuses_training_rows(tmp_path):
    table = routed()
    result = calibrate(tmp_path, table, data={"name": "movies", "revision": "1a2b"})
    record = read_record(tmp_path)
    assert record.method == result.calibrator.method == "shrunk_temperature"
    assert record.data == {"name": "movies", "revision": "1a2b", "n": 800, "folds": 3, "held_out": "groups", "seed": 0}
    assert record.before["ece"] == result.before["ece"] > record.after["ece"]
    assert record.comparison == result.comparison
    write_training_record(tmp_path, settings={}, ids=["row-7"])
    with pytest.raises(ValueError, match="such as id 'row-7'"):
        calibrate(tmp_path, table)


def test_no_calibration_is_an_error_that_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="moecal calibrate"):
        from_pretrained(saved(tmp_path))
    with pytest.raises(ValueError, match="is not a folder"):
        write_calibration(tmp_path / "nowhere", temperature())


def record_text(**changes) -> str:
    content = {
        "format": "hf_moecal.calibration",
        "version": 1,
        "method": "temperature",
        "parameters": {"temperature": 1.7, "interval": [1.5, 1.9]},
    }
    return json.dumps({key: value for key, value in {**content, **changes}.items() if value != "absent"})


HOSTILE = {
    "empty": "",
    "no json": "\x80\x04K*.",
    "a list": "[]",
    "not utf-8": b"\xff\xfe{}",
    "truncated": record_text()[:40],
    "other format": record_text(format="other"),
    "later version": record_text(version=2),
    "version is a bool": record_text(version=True),
    "unknown method": record_text(method="exec"),
    "method is a path": record_text(method="../../etc/passwd"),
    "method is a list": record_text(method=["temperature"]),
    "unknown entry": record_text(command="rm"),
    "no parameters": record_text(parameters="absent"),
    "parameters are a list": record_text(parameters=[1.7]),
    "temperature is text": record_text(parameters={"temperature": "1.7"}),
    "temperature is true": record_text(parameters={"temperature": True}),
    "temperature is missing": record_text(parameters={}),
    "temperature is zero": record_text(parameters={"temperature": 0}),
    "temperature is negative": record_text(parameters={"temperature": -1}),
    "temperature is huge": record_text(parameters={"temperature": 1e300}),
    "temperature overflows": record_text().replace("1.7", "1e999"),
    "temperature has 5000 digits": record_text().replace("1.7", "9" * 5000),
    "temperature is NaN": record_text().replace("1.7", "NaN"),
    "temperature is Infinity": record_text().replace("1.7", "-Infinity"),
    "interval of three": record_text(parameters={"temperature": 1.7, "interval": [1, 2, 3]}),
    "interval of text": record_text(parameters={"temperature": 1.7, "interval": ["a", "b"]}),
    "a key twice": record_text()[:-1] + ', "method": "none"}',
    "nested deep": record_text(data={}).replace('"data": {}', '"data": ' + '{"a":' * 50 + "1" + "}" * 50),
    "nested very deep": "[" * 200_000 + "]" * 200_000,
    "warnings are numbers": record_text(warnings=[1]),
    "a very long text": record_text(warnings=["x" * 5000]),
    "before is a number": record_text(before=3),
    "versions are numbers": record_text(versions={"torch": 2}),
    "comparison of texts": record_text(comparison=["temperature"]),
    "vectors of two lengths": record_text(method="vector", parameters={"scale": [1, 1], "bias": [1]}),
    "a vector of lists": record_text(method="vector", parameters={"scale": [[1], [1]], "bias": [1, 1]}),
    "an empty vector": record_text(method="vector", parameters={"scale": [], "bias": []}),
    "a falling curve": record_text(method="isotonic", parameters={"thresholds": [[0, 1]], "values": [[1, 0.5]]}),
    "a curve outside": record_text(method="isotonic", parameters={"thresholds": [[0, 1]], "values": [[0, 2]]}),
    "experts by name": record_text(
        method="per_expert_temperature", parameters={"temperature": 1, "shared": 1, "experts": {"x": 1}}
    ),
    "groups without centres": record_text(
        method="grouped_temperature", parameters={"by": "expert_usage", "temperature": 1, "groups": {}}
    ),
    "too few coefficients": record_text(
        method="routing_temperature", parameters={"coefficients": [1], "mean": [1], "spread": [1], "log_range": [0, 1]}
    ),
    "a range turned round": record_text(
        method="routing_temperature",
        parameters={"coefficients": [0] * 5, "mean": [0] * 4, "spread": [1] * 4, "log_range": [1, 0]},
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_records_are_refused(name, tmp_path):
    content = HOSTILE[name]
    (tmp_path / "calibration.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError) as caught:
        load_calibration(tmp_path)
    message = str(caught.value)
    assert len(message) < 500 and "\n" not in message


WILD = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def places(value, path=()):
    """Every place in a JSON value, as a path of keys and indices."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


@pytest.fixture(scope="module")
def records():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fitted = [build().fit(routed(200)) for build in CANDIDATES.values()]
    base = {"format": "hf_moecal.calibration", "version": 1}
    return [json.dumps({**base, "method": c.method, "parameters": c.parameters()}) for c in fitted]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_record_changed_anywhere_is_refused_or_harmless(data, records, tmp_path_factory):
    content = json.loads(data.draw(st.sampled_from(records)))
    *path, last = data.draw(st.sampled_from([place for place in places(content) if place]))
    inner = content
    for key in path:
        inner = inner[key]
    inner[last] = data.draw(WILD)
    file = tmp_path_factory.mktemp("record") / "calibration.json"
    file.write_text(json.dumps(content))
    try:
        calibrator = Calibrator.load(file)
        probs = calibrator.apply(routed(20))["probs"]
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        assert np.isfinite(probs).all() and np.allclose(probs.sum(axis=1), 1)


def test_the_untouched_record_is_accepted(tmp_path):
    (tmp_path / "calibration.json").write_text(record_text())  # what every hostile one was made from
    assert load_calibration(tmp_path).temperature == 1.7


def test_a_file_of_one_gigabyte_is_not_read(tmp_path):
    path = tmp_path / "calibration.json"
    with open(path, "wb") as file:
        file.truncate(2**30)
    with pytest.raises(ValueError, match="larger than 32 MiB"):
        Calibrator.load(path)


def test_a_named_pipe_or_folder_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "calibration.json")
    with pytest.raises(ValueError, match="not a regular file"):
        load_calibration(tmp_path)
    (tmp_path / "sub" / "calibration.json").mkdir(parents=True)
    with pytest.raises(ValueError, match="cannot be read|not a regular file"):
        load_calibration(tmp_path / "sub")


def test_training_rows_are_remembered_without_naming_them(tmp_path):
    assert load_training_ids(tmp_path) is None and load_training_settings(tmp_path) == {}
    write_training_record(tmp_path, settings={"objective": "robust", "eta": 2.0}, ids=["row-3", "row-4", "row-3"])
    ids = load_training_ids(tmp_path)
    assert len(ids) == 2 and "row-3" in ids and "row-5" not in ids and 3 not in ids
    assert "row-3" not in (tmp_path / "moecal_training.json").read_text()
    assert load_training_settings(tmp_path) == {"objective": "robust", "eta": 2.0}
    with pytest.raises(ValueError, match="2 rows of the table"):
        TemperatureCalibrator().fit(routed(), training_ids=ids)
    with pytest.raises(ValueError, match="must be text"):
        write_training_record(tmp_path, settings={}, ids=[0, 1])
    text = (tmp_path / "moecal_training.json").read_text()
    for bad in ("!", "AAAA", 7):
        (tmp_path / "moecal_training.json").write_text(json.dumps({**json.loads(text), "ids": bad}))
        with pytest.raises(ValueError, match="moecal_training.json"):
            load_training_ids(tmp_path)


def test_an_evaluation_is_checked_on_the_way_in_and_out(tmp_path):
    assert load_evaluation(tmp_path) is None
    sets = {"tweets": {"ece": np.float64(0.03), "n": 300, "ece_interval": [0.01, 0.05], "nll": float("nan")}}
    write_evaluation(tmp_path, sets, dataset={"id": "org/tweets"})
    assert load_evaluation(tmp_path)["sets"]["tweets"]["nll"] is None
    for bad in ({}, {"a": {"n": 3}}, {"a": {"ece": "low", "n": 3}}, {"a": {"ece": 0.1, "n": 1.5}}):
        with pytest.raises(ValueError):
            write_evaluation(tmp_path, bad)
