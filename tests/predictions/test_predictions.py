import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import MixtralConfig, MixtralForSequenceClassification

from hf_moecal import TemperatureCalibrator, predict
from hf_moecal.hub import attach_calibrator
from hf_moecal.model.freezing import set_trainable
from hf_moecal.model.prefix_cache import PrefixCache
from hf_moecal.table import COLUMNS


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, num_labels=3, pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    return MixtralForSequenceClassification(config)


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(1, 40, (3 + i % 7,), generator=generator).tolist() for i in range(23)]
    labels = [i % 3 if i % 5 else -100 for i in range(23)]
    return Dataset.from_dict({"input_ids": ids, "label": labels, "agreement": [i / 23 for i in range(23)]})


def test_equals_one_example_at_a_time(model, data):
    training = model.training
    table = predict(model, data, group="movie", batch_size=4, progress=False)
    assert model.training == training
    generated = {"sequence", "position", "correct", "nll", "brier", "sequence_confidence", "num_tokens"}
    generated |= {"sample_weight"}  # a column of the user's
    assert set(table.column_names) == {*COLUMNS, "agreement", "conditions"} - generated
    assert table["id"][:] == list(range(23)) and set(table["group"]) == {"movie"}
    for row, example in zip(table, data, strict=True):
        with torch.no_grad():
            logits = model.eval()(input_ids=torch.tensor([example["input_ids"]])).logits[0]
        assert row["logits"] == pytest.approx(logits.tolist(), abs=1e-5)
        assert row["probs"] == pytest.approx(logits.softmax(-1).tolist(), abs=1e-6)
        assert row["prediction"] == int(logits.argmax()) and row["confidence"] == pytest.approx(max(row["probs"]))
        shares = [w / sum(row["expert_weights"]) for w in row["expert_weights"]]
        assert row["routing_entropy"] == pytest.approx(-sum(r * math.log(r) for r in shares), abs=1e-5)
        alone = torch.tensor(row["expert_logits"]).softmax(-1)
        spread = sum(
            r * (q - torch.tensor(row["probs"])).square().sum().item() for r, q in zip(shares, alone, strict=True)
        )
        assert row["disagreement"] == pytest.approx(spread, abs=1e-5)
        if example["label"] == -100:
            assert math.isnan(row["regret"])
        else:
            best = -math.log(max(q[example["label"]].item() for q in alone))
            assert row["regret"] == pytest.approx(max(0.0, -math.log(row["probs"][example["label"]]) - best), abs=1e-5)


def test_the_prefix_cache_changes_no_prediction(model, data, tmp_path):
    plain = predict(model, data, progress=False)
    requires = [p.requires_grad for p in model.parameters()]
    set_trainable(model, "last_moe_layer")
    for run in range(2):  # the second run reads from disk
        with PrefixCache(model, tmp_path) as prefix:
            cached = predict(model, data, prefix=prefix, progress=False)
            assert prefix.computed == (23 if run == 0 else 0)
        for name in ("logits", "disagreement", "routing_entropy"):
            torch.testing.assert_close(
                torch.tensor(cached[name][:]), torch.tensor(plain[name][:]), rtol=1e-4, atol=1e-5
            )
        assert cached["expert_ids"][:] == plain["expert_ids"][:]
    for parameter, before in zip(model.parameters(), requires, strict=True):
        parameter.requires_grad_(before)


def test_padding_in_the_dataset_and_tensor_format(model, data):
    expected = predict(model, data, progress=False, layer=None)["logits"][:]
    padded = [[0] * (12 - len(ids)) + ids for ids in data["input_ids"]]
    masks = [[0] * (12 - len(ids)) + [1] * len(ids) for ids in data["input_ids"]]
    left = Dataset.from_dict({"input_ids": padded, "attention_mask": masks, "label": data["label"]})
    for dataset in (left, data.with_format("torch")):
        torch.testing.assert_close(
            torch.tensor(predict(model, dataset, progress=False, layer=None)["logits"][:]), torch.tensor(expected)
        )


def test_a_calibration_that_needs_the_table_is_applied(model, data):
    class ReadsRouting(TemperatureCalibrator):
        reads = ("routing_entropy",)

    table = predict(model, data, progress=False)
    calibrator = ReadsRouting().fit(table)
    try:
        attach_calibrator(model, calibrator)
        calibrated = predict(model, data, progress=False)
    finally:
        del model.moecal_table_calibrator
    expected = (torch.tensor(table["logits"][:]).double() / calibrator.temperature).softmax(-1)
    torch.testing.assert_close(torch.tensor(calibrated["probs"][:]).double(), expected, rtol=1e-5, atol=1e-6)


def test_bad_input_is_named(model):
    text = Dataset.from_dict({"sentence": ["a"]})
    for dataset, message, kwargs in [
        (Dataset.from_dict({"input_ids": []}), "The dataset is empty", {}),
        (Dataset.from_dict({"input_ids": [[1], []]}), r"Row 1 has no token \(an empty text\?\)", {}),
        (text, r"neither `input_ids` nor a column 'text', only \['sentence'\]", {}),
        (text, "Text needs a tokenizer", {"text_column": "sentence"}),
        (Dataset.from_dict({"input_ids": [[1]], "label": ["good"]}), "Say which class each is, .*'good=.'", {}),
        (Dataset.from_dict({"input_ids": [[1]], "label": [3]}), "Label 3 is out of range for 3 classes", {}),
    ]:
        with pytest.raises(ValueError, match=message):
            predict(model, dataset, progress=False, **kwargs)


@pytest.mark.parametrize("kind", ["parquet", "csv", "pandas"])
def test_tables_come_as_people_write_them(tmp_path, kind):
    import pandas as pd

    from hf_moecal.metrics import table_report
    from hf_moecal.table import read_table

    rng = np.random.default_rng(0)
    probs, labels = rng.dirichlet([1, 1, 1], 30), rng.integers(0, 3, 30)
    frame = pd.DataFrame({"label": labels, "probs": probs.tolist()})
    path = tmp_path / f"table.{kind}"
    if kind == "pandas":
        table = frame
    else:
        getattr(frame, f"to_{kind}")(path, index=False)
        table = read_table(path)
    truth = table_report({"label": labels, "probs": probs}, intervals=False)
    assert table_report(table, intervals=False)["nll"] == pytest.approx(truth["nll"], abs=1e-12)


def test_tables_without_rows_are_refused_by_name(tmp_path):
    import pandas as pd

    from hf_moecal.table import read_table

    pd.DataFrame({"label": [], "probs": []}).to_parquet(tmp_path / "none.parquet")
    (tmp_path / "none.csv").touch()
    (tmp_path / "odd.csv").write_text('label,probs\n0,"[high, low]"\n')
    for name, message in (("none.parquet", "holds no row"), ("none.csv", "is empty"), ("odd.csv", "in row 0; write")):
        with pytest.raises(ValueError, match=message):
            read_table(tmp_path / name)
