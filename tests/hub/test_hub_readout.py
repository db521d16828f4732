"""Checkpoints that predict by a mixture or a committee: written, loaded, calibrated, published."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments, pipeline

from hf_moecal import MoECalTrainer, from_pretrained, join_committee, predict
from hf_moecal.calibration import PerExpertTemperatureCalibrator, read_record
from hf_moecal.hub import calibrate, write_calibration
from hf_moecal.hub.bake import bake
from hf_moecal.hub.checkpoint_card import make_card
from hf_moecal.hub.publish import publishable
from hf_moecal.model.freezing import set_trainable
from hf_moecal.readouts.committee import MEMBERS_FILE, save_members
from hf_moecal.readouts.mixture import Readout
from hf_moecal.readouts.recorded import attach_readout, record_readout, recorded_readout
from tests.hub.helpers import tokenizer
from tests.readouts.helpers import READOUTS, committee, loop
from tests.training.helpers import arguments, classification_data, classification_model, collate, language_model


def rows_and_data():
    rows = classification_data()
    return rows, Dataset.from_list([{"input_ids": r["input_ids"].tolist(), "label": r["labels"]} for r in rows])


def saved(model, folder, readout):
    model.save_pretrained(folder)
    save_members(model, folder)
    record_readout(folder, readout)
    return str(folder)


@pytest.mark.parametrize(
    "readout", [Readout("mixture"), Readout("soft_mixture", 3), Readout("soft_mixture", members=3), Readout(members=3)]
)
def test_a_loaded_classifier_predicts_by_its_readout(tmp_path, readout):
    rows, data = rows_and_data()
    model = committee() if readout.members > 1 else classification_model()
    expected = predict(model, data, readout=readout.kind, readout_experts=readout.experts, progress=False)
    expected = expected.with_format("torch")["logits"][:]
    model, folder = model.eval(), saved(model, tmp_path / "checkpoint", readout)
    loaded, plain = from_pretrained(folder), AutoModelForSequenceClassification.from_pretrained(folder).eval()
    batch = collate(rows)
    with torch.no_grad():
        output = loaded(**batch)
        torch.testing.assert_close(output.logits, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(output.loss, F.nll_loss(expected, batch["labels"]), rtol=1e-5, atol=1e-5)
        assert (output.logits.exp().sum(-1) - 1).abs().max() < 1e-6
        assert torch.equal(plain(**batch).logits, model(**batch).logits)
        assert torch.equal(loaded.train()(**batch).logits, plain.train()(**batch).logits)
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True)
    found = Trainer(loaded, args, data_collator=collate).predict(rows)
    np.testing.assert_allclose(found.predictions, expected, rtol=1e-5, atol=1e-5)
    assert found.metrics["test_loss"] == pytest.approx(F.nll_loss(expected, batch["labels"]).item(), rel=1e-5)
    with pytest.raises(ValueError, match="has a readout already"):
        attach_readout(loaded, readout)


def test_a_pipeline_reads_the_mixture(tmp_path):
    model = classification_model(vocab_size=32)
    folder = saved(model, tmp_path, Readout("soft_mixture"))
    words = tokenizer(folder)
    classify = pipeline("text-classification", model=from_pretrained(folder), tokenizer=words, top_k=None)
    text = "the plot is thin yet two leads carry it"
    ids = words(text, return_tensors="pt")["input_ids"][0]
    expected = loop(model.eval(), ids, len(ids) - 1, READOUTS["soft"])[0].exp()
    got = {entry["label"]: entry["score"] for entry in classify(text)[0]}
    assert [got[f"LABEL_{i}"] for i in range(3)] == pytest.approx(expected.tolist(), abs=1e-5)


@pytest.mark.parametrize("members", [1, 2])
@pytest.mark.parametrize("kept", [0, 2, torch.tensor([0, 3])])
def test_a_loaded_language_model_predicts_where_it_is_asked(tmp_path, members, kept, monkeypatch):
    monkeypatch.setattr("hf_moecal.readouts.attached.CHUNK_ELEMENTS", 100)
    model = committee(language_model, members) if members > 1 else language_model()
    ids = torch.arange(1, 11).view(2, 5)
    loaded = from_pretrained(saved(model.eval(), tmp_path, Readout("soft_mixture", members=members)))
    found = loaded(input_ids=ids, **({} if isinstance(kept, int) and not kept else {"logits_to_keep": kept})).logits
    positions = torch.arange(5)[-kept:] if isinstance(kept, int) else kept
    singles = [language_model().eval() for _ in range(members)]
    for number, single in enumerate(singles[1:], 1):
        own = {k.partition("/")[2].replace("/", "."): v for k, v in model.state_dict().items() if f"s.{number}/" in k}
        single.load_state_dict({**single.state_dict(), **own})
    expected = torch.stack(
        [
            torch.stack([torch.stack([loop(single, row, p, READOUTS["soft"])[0] for p in positions]) for row in ids])
            for single in singles
        ]
    )
    expected = expected.logsumexp(0) - np.log(members)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    if isinstance(kept, int) and not kept:
        loss = loaded(input_ids=ids, labels=ids).loss
        torch.testing.assert_close(loss, F.nll_loss(expected[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))


@pytest.mark.parametrize("members", [1, 2])
def test_temperatures_of_the_experts_are_applied_in_the_forward(tmp_path, members):
    rows, data = rows_and_data()
    readout = Readout("soft_mixture", members=members)
    model = committee(members=members) if members > 1 else classification_model()
    table = predict(model, data, readout="soft_mixture", progress=False)
    experts = {str(k): 0.5 + 0.25 * k for k in range(4 * members)}
    calibrator = PerExpertTemperatureCalibrator.from_parameters(
        {"temperature": 1.5, "shared": 1.0, "experts": experts}
    )
    folder = saved(model, tmp_path, readout)
    write_calibration(folder, calibrator)
    assert recorded_readout(folder) == readout
    with torch.no_grad():
        found = from_pretrained(folder)(**collate(rows)).logits.softmax(-1)
    np.testing.assert_allclose(found, calibrator.apply(table)["probs"][:], rtol=1e-4, atol=1e-6)


def test_calibrating_on_a_mixtures_table_makes_it_the_readout(tmp_path):
    model = classification_model()
    model.save_pretrained(tmp_path)
    generator = np.random.default_rng(0)
    data = Dataset.from_dict(
        {"input_ids": generator.integers(1, 48, (60, 6)).tolist(), "label": generator.integers(0, 3, 60).tolist()}
    )
    table = predict(model, data, readout="soft_mixture", readout_experts=2, progress=False)
    calibrate(tmp_path, table, method="none", folds=2)
    assert recorded_readout(tmp_path) == Readout("soft_mixture", 2)
    calibrate(tmp_path, predict(model, data, progress=False), method="none", folds=2)
    assert recorded_readout(tmp_path) == Readout()
    with pytest.raises(
        ValueError, match="'soft_mixture, committee of 3', but the checkpoint is to be read by 'native'"
    ):
        calibrate(tmp_path, predict(committee(), data, readout="soft_mixture", progress=False), method="none")


def test_training_writes_the_readout_with_every_checkpoint(tmp_path):
    rows = classification_data()
    args = arguments(tmp_path, train="last_moe_layer", readout="soft_mixture", readout_experts=3, readout_members=2,
                     save_strategy="steps", save_steps=1)  # fmt: skip
    trainer = MoECalTrainer(model=classification_model(), args=args, train_dataset=rows, data_collator=collate)
    trainer.train()
    loaded = from_pretrained(tmp_path / "checkpoint-1")
    assert recorded_readout(tmp_path / "checkpoint-1") == Readout("soft_mixture", 3, members=2)
    with torch.no_grad():
        found = loaded(**collate(rows)).logits
    np.testing.assert_allclose(found, trainer.predict(rows).predictions, rtol=1e-5, atol=1e-5)
    fitted = PerExpertTemperatureCalibrator.from_parameters({"temperature": 2.0, "shared": 1.0, "experts": {}})
    write_calibration(tmp_path / "checkpoint-1", fitted)
    trainer.save_model(str(tmp_path / "checkpoint-1"))
    assert read_record(tmp_path / "checkpoint-1").method == "per_expert_temperature"


def test_published_with_all_files_and_a_card_that_says_so(tmp_path):
    folder = tmp_path / "checkpoint"
    saved(committee(), folder, Readout("soft_mixture", members=3))
    assert {"model.safetensors", MEMBERS_FILE, "calibration.json"} <= set(publishable(folder))
    card = make_card(folder, repo_id="org/model", published=None)
    assert "a committee of 3 last layers" in card and "**The figures here are of that readout.**" in card
    with pytest.raises(ValueError, match="no weights of one model give"):
        bake(folder, output_dir=tmp_path / "baked")
    (folder / MEMBERS_FILE).unlink()
    for refused in (publishable, from_pretrained):
        with pytest.raises(ValueError, match=f"{MEMBERS_FILE}"):
            refused(folder)


def test_malformed_readouts_are_refused(tmp_path):
    record_readout(tmp_path, Readout("soft_mixture", 3))
    text = (tmp_path / "calibration.json").read_text()
    for wrong in ('"kind": "hard"', '"kind": 3', '"kind": "mixture"'):
        (tmp_path / "calibration.json").write_text(text.replace('"kind": "soft_mixture"', wrong))
        with pytest.raises(ValueError, match="readout"):
            recorded_readout(tmp_path)
    (tmp_path / "calibration.json").write_text(text.replace('"members"', '"member"'))
    with pytest.raises(ValueError, match="'kind', 'experts' and 'members'"):
        recorded_readout(tmp_path)


def test_predict_reads_a_loaded_model_by_what_it_was_loaded_for(tmp_path):
    _, data = rows_and_data()
    model = committee()
    folder = saved(model, tmp_path, Readout("soft_mixture", members=3))
    expected = predict(model, data, readout="soft_mixture", progress=False)
    loaded = from_pretrained(folder)
    found = predict(loaded, data, progress=False)
    assert found.column_names == expected.column_names and found["readout"][:] == expected["readout"][:]
    for name in ("probs", "expert_logits", "disagreement", "regret"):
        np.testing.assert_allclose(found[name][:], expected[name][:], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="was loaded to predict by 'soft_mixture, committee of 3'"):
        predict(loaded, data, readout="native", progress=False)


def test_checkpoints_trained_apart_become_one_committee(tmp_path):
    folders, expected, ids = [], [], torch.arange(1, 9)[None]
    for number in range(3):
        model = classification_model().eval()
        set_trainable(model, "last_moe_layer")
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
        folders.append(tmp_path / str(number))
        model.save_pretrained(folders[-1])
        expected.append(model(input_ids=ids).logits.double().softmax(-1))
    joined = join_committee(folders, tmp_path / "committee")
    found = from_pretrained(joined)(input_ids=ids).logits
    assert (found.double().exp() - sum(expected) / 3).abs().max() < 1e-6
    plain = AutoModelForSequenceClassification.from_pretrained(joined).eval()
    assert (plain(input_ids=ids).logits.double().softmax(-1) - expected[0]).abs().max() < 1e-6

    for folder in folders:
        record_readout(folder, Readout("soft_mixture"))
    mixed = from_pretrained(join_committee(folders, tmp_path / "mixed"))(input_ids=ids).logits.double().exp()
    alone = [from_pretrained(folder)(input_ids=ids).logits.double().exp() for folder in folders]
    assert (mixed - sum(alone) / 3).abs().max() < 1e-6


def test_what_makes_no_committee_is_named(tmp_path):
    for name in ("a", "b"):
        classification_model().save_pretrained(tmp_path / name)
    other = classification_model()
    with torch.no_grad():
        other.model.layers[0].self_attn.q_proj.weight.add_(1)
    other.save_pretrained(tmp_path / "c")
    a, b, c = (tmp_path / name for name in "abc")
    with pytest.raises(ValueError, match="two members or more"):
        join_committee([a], tmp_path / "out")
    with pytest.raises(ValueError, match="differs from .* before the last MoE layer"):
        join_committee([a, c], tmp_path / "out")
    with pytest.raises(ValueError, match="no checkpoint folder"):
        join_committee([a, tmp_path / "none"], tmp_path / "out")
    with pytest.raises(ValueError, match="exists"):
        join_committee([a, b], a)
    record_readout(b, Readout("soft_mixture"))
    with pytest.raises(ValueError, match="one and the same readout"):
        join_committee([a, b], tmp_path / "out")
