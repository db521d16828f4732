"""Methods by name: what they fill in, what of a user's stays, and how they fall back."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification

import hf_moecal
from hf_moecal import MoECalArguments, MoECalTrainer, predict
from hf_moecal.readouts.committee import count_members
from hf_moecal.training import methods
from hf_moecal.training.methods import METHODS, chosen, members_that_fit
from tests.tiny_moe import tiny_model
from tests.training.helpers import CLASSES, classification_model, collate, language_model


QUIET = dict(report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no", max_steps=2, logging_steps=1)


def arguments(folder="out", **changes):
    return MoECalArguments(str(folder), **{**QUIET, **changes})


def rows(count=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 40, (count, 6), generator=generator).tolist()
    return Dataset.from_dict({
        "id": [f"{seed}-{i}" for i in range(count)], "input_ids": ids, "label": [sum(row) % CLASSES for row in ids],
    })  # fmt: skip


def trainer_of(folder, model=None, **changes):
    model = classification_model() if model is None else model
    return MoECalTrainer(
        model, arguments(folder, **changes), train_dataset=rows(), data_collator=changes.get("collator")
    )


@pytest.mark.parametrize("name", list(METHODS))
def test_a_method_is_its_fields(name):
    found = asdict(arguments(method=name))
    assert {field: found[field] for field in METHODS[name]} == METHODS[name]


def test_the_best_is_what_one_gets_without_asking():
    assert arguments().method == "recommended" and arguments().readout_members == 4
    own = arguments(objective="focal")  # an objective of one's own is judged on the model's own prediction
    assert (own.method, own.readout, own.readout_members, own.train) == ("custom", "native", 1, "all")


def test_every_field_can_be_overridden():
    found = arguments(method="recommended", objective="erm", eta=3.0, readout_members=2)
    assert (found.objective, found.eta, found.readout_members, found.readout) == ("erm", 3.0, 2, "soft_mixture")
    assert set(found.filled) == {"robust_warmup_ratio", "readout", "train", "calibration_method"}


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="`method` must be one of recommended, paper, erm, custom, got 'best'"):
        arguments(method="best")


def test_recipes_read_what_the_arguments_give():
    for settings in ({}, {"method": "paper"}, {"objective": "erm"}, {"method": "recommended", "readout": "mixture"}):
        found = arguments(**settings)
        assert all(chosen(settings, name) == getattr(found, name) for name in METHODS["paper"])


@pytest.mark.parametrize(("changes", "readout", "members", "reason"), [
    (dict(train="all"), "soft_mixture", 1, "a committee trains copies of the last MoE layer, not train='all'"),
    (dict(router_aux_loss_coef=0.01), "soft_mixture", 1, "router_aux_loss_coef=0.01 balances one member's routers"),
    (dict(probe_layer=0), "native", 1, "mixtures are of the last MoE layer, not probe_layer=0"),
])  # fmt: skip
def test_falls_back_and_says_so(tmp_path, changes, readout, members, reason, capsys):
    trainer = trainer_of(tmp_path, **changes)
    trainer.train()
    assert (trainer.args.readout, trainer.args.readout_members) == (readout, members)
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("method=recommended: objective='robust_filtered', eta=1.0") and reason in first


def test_where_nothing_is_excluded_nothing_falls_back(tmp_path):
    trainer = trainer_of(tmp_path)
    assert "fell back" not in trainer.method and count_members(trainer.model) == 4


def test_what_the_user_set_is_refused_not_changed(tmp_path):
    with pytest.raises(ValueError, match="readout_members=3 trains copies of the last MoE layer"):
        arguments(tmp_path, readout_members=3, train="all")


def test_sharded_weights_train_the_native_prediction(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    args, model = arguments(tmp_path), classification_model()
    said = methods.settle(args, model, sharded=methods.is_sharded(args))  # before a process group exists
    assert (args.objective, args.eta, args.readout, args.readout_members) == ("robust_filtered", 1.0, "native", 1)
    assert "fell back to readout='native', readout_members=1, since experts that run again" in said


def test_a_model_whose_experts_cannot_be_asked_trains_by_erm(tmp_path):
    model = tiny_model("doge")
    args = arguments(tmp_path, task="lm")
    said = methods.settle(args, model, sharded=False)
    assert (args.objective, args.readout, args.readout_members, args.train) == ("erm", "native", 1, "all")
    assert "fell back to" in said and "objective='erm'" in said
    asked = arguments(tmp_path, task="lm", method="recommended", objective="robust_filtered")
    methods.settle(asked, model, sharded=False)
    assert asked.objective == "robust_filtered"  # and the trainer refuses it


def test_members_are_as_many_as_memory_holds(monkeypatch):
    args, model = arguments(), classification_model()
    assert members_that_fit(model, args) == 4
    monkeypatch.setattr(MoECalArguments, "device", torch.device("cuda", 0))
    own = sum(p.numel() for n, p in model.named_parameters() if n.startswith(("model.layers.1.mlp", "score")))
    for free, members in ((2 * 16 * own * 2.5, 2), (2 * 16 * own * 9, 4), (1, 1)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 0))
        assert members_that_fit(model, args) == members


def test_trained_then_calibrated_is_what_is_loaded(tmp_path):
    """train, calibrate, from_pretrained: the loaded model gives the calibrated probabilities."""
    validation, fresh = rows(60, seed=1), rows(20, seed=2)
    trainer = trainer_of(tmp_path)
    trainer.train()
    answers = np.array(predict(trainer.model, validation, readout="soft_mixture", progress=False)["probs"]).argmax(1)
    noisy = np.where(np.arange(60) % 5 < 2, validation["label"][:], answers)  # right more often than not
    validation = validation.remove_columns("label").add_column("label", noisy)
    result = trainer.calibrate(validation)
    assert json.loads((tmp_path / "calibration.json").read_text())["method"] == "conservative_temperature"
    raw = predict(trainer.model, fresh, readout="soft_mixture", progress=False)
    loaded = hf_moecal.from_pretrained(tmp_path)
    found = predict(loaded, fresh, progress=False)
    torch.testing.assert_close(
        torch.tensor(found["probs"][:]), torch.tensor(result.calibrator.apply(raw)["probs"][:]), atol=2e-6, rtol=0
    )
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path)  # transformers alone: member 0
    assert plain.num_labels == CLASSES


def test_rows_that_were_trained_on_are_refused(tmp_path):
    trainer = trainer_of(tmp_path, method="erm")
    trainer.train()
    with pytest.raises(ValueError, match="train"):
        trainer.calibrate(rows())


def test_a_language_model_has_no_distributions_to_fit(tmp_path):
    args = arguments(tmp_path, task="lm", method="erm")
    data = [{"input_ids": torch.arange(3, 9), "labels": torch.arange(3, 9)} for _ in range(4)]
    trainer = MoECalTrainer(language_model(), args, train_dataset=data, data_collator=collate)
    with pytest.raises(ValueError, match="keeps no distributions"):
        trainer.calibrate(rows())
