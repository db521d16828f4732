"""Evaluation: one mean over examples, the readout's predictions, users' own metrics; against plain loops."""

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import MixtralForSequenceClassification

from hf_moecal import ChoiceCollator, MoECalTrainer
from hf_moecal.metrics import calibration_metrics
from tests.tasks.helpers import examples
from tests.tasks.helpers import losses_one_by_one as choice_losses
from tests.training.helpers import (
    CLASSES,
    arguments,
    classification_data,
    classification_model,
    collate,
    language_data,
    language_model,
    losses_one_by_one,
    trained_gradients,
)


def trainer_of(folder, model, rows, *, collator=collate, **changes):
    given = {
        name: changes.pop(name) for name in ("compute_metrics", "preprocess_logits_for_metrics") if name in changes
    }
    args = arguments(folder, **{"objective": "robust", "per_device_eval_batch_size": 4, **changes})
    return MoECalTrainer(model=model, args=args, eval_dataset=rows, data_collator=collator, **given)


@pytest.mark.parametrize("example", ["sequence", "token"])
def test_the_loss_is_a_mean_over_examples_of_a_language_model(tmp_path, example):
    rows = language_data(5)  # batches of four and of one
    rows[1]["labels"] = torch.full_like(rows[1]["labels"], -100)
    found = trainer_of(tmp_path, language_model(), rows, task="lm", example=example).evaluate()
    losses = losses_one_by_one(language_model().eval(), [*rows[:1], *rows[2:]], per_token=example == "token")
    assert found["eval_loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
    assert found["eval_loss"] != pytest.approx(0.8 * losses[:-1].mean().item() + 0.2 * losses[-1].item(), rel=1e-3)


def test_the_loss_is_a_mean_over_labelled_examples(tmp_path):
    rows = classification_data(7)
    for index in (0, 1, 2, 6):
        rows[index]["labels"] = -100
    losses = losses_one_by_one(classification_model().eval(), rows[3:6], per_token=False)
    for changes in ({}, dict(prediction_loss_only=True), dict(batch_eval_metrics=True)):
        found = trainer_of(tmp_path, classification_model(), rows, **changes).evaluate()
        assert found["eval_loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
    nothing = [{**row, "labels": -100} for row in rows]
    found = trainer_of(tmp_path, classification_model(), nothing, prediction_loss_only=True).evaluate()
    assert math.isnan(found["eval_loss"])


def test_the_loss_of_answer_options(tmp_path):
    rows = examples(5)
    trainer = trainer_of(tmp_path, language_model(), rows, task="choice", collator=ChoiceCollator())
    losses = choice_losses(language_model().eval(), rows, "per_token")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses.mean().item(), rel=1e-5)


READOUTS = {
    "native": {}, "mixture": dict(readout="soft_mixture"),
    "committee": dict(readout="soft_mixture", readout_members=2, train="last_moe_layer"),
}  # fmt: skip


@pytest.mark.parametrize("readout", READOUTS)
def test_rows_without_labels_are_predicted_by_the_readout(tmp_path, readout):
    """With labels at all positions the figures of the same predictions are known."""
    rows = [{**row, "labels": row["input_ids"]} for row in language_data(6)]
    trainer = trainer_of(tmp_path, language_model(), rows, task="lm", **READOUTS[readout])
    figures = trainer.predict(rows).predictions
    bare = [{"input_ids": row["input_ids"]} for row in rows]
    trainer.data_collator = lambda some: {k: v for k, v in collate([{**r, "labels": 0} for r in some]).items()
                                          if k != "labels"}  # fmt: skip
    found = trainer.predict(bare)
    assert found.label_ids is None and "test_loss" not in found.metrics
    probs = torch.tensor(found.predictions).softmax(-1)
    for number, row in enumerate(rows):
        nll = -probs[number, : len(row["input_ids"]) - 1].gather(1, row["input_ids"][1:, None]).log().squeeze(1)
        expected = torch.tensor(figures["nll"][number, : len(nll)])
        torch.testing.assert_close(nll, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("readout", READOUTS)
def test_metrics_of_the_users_own_get_logits(tmp_path, readout):
    """With the stock signatures, of all positions, as `transformers.Trainer` gives them."""
    rows, seen = language_data(6), {}

    def compute_metrics(prediction):
        logits, labels = prediction
        seen["shape"] = logits.shape
        rest = labels[:, 1:] != -100
        return {"hits": float((logits.argmax(-1)[:, :-1] == labels[:, 1:])[rest].mean())}

    trainer = trainer_of(
        tmp_path, language_model(), rows, task="lm", compute_metrics=compute_metrics, **READOUTS[readout]
    )
    stock = trainer_of(tmp_path, language_model(), rows, task="lm", **READOUTS[readout]).evaluate()
    found = trainer.evaluate()
    assert found["eval_hits"] == pytest.approx(stock["eval_accuracy"])
    assert found["eval_loss"] == pytest.approx(stock["eval_loss"], rel=1e-5)
    assert seen["shape"][-1] == 48
    best = trainer_of(
        tmp_path, language_model(), rows, task="lm", **READOUTS[readout],
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
        compute_metrics=lambda p: {"hits": float((p[0][:, :-1] == p[1][:, 1:])[p[1][:, 1:] != -100].mean())},
    )  # fmt: skip
    assert best.evaluate()["eval_hits"] == found["eval_hits"]
    ours = trainer_of(
        tmp_path, language_model(), rows, task="lm", compute_metrics=calibration_metrics(bins=5), **READOUTS[readout]
    )
    assert ours.evaluate()["eval_nll"] == pytest.approx(stock["eval_nll"], rel=1e-6)


@pytest.mark.parametrize("task", ["classification", "lm", "choice"])
def test_batches_that_are_not_joined(tmp_path, task):
    rows = {"classification": classification_data, "lm": language_data, "choice": examples}[task](6)
    model = classification_model if task == "classification" else language_model
    collator = ChoiceCollator() if task == "choice" else collate
    found = [
        trainer_of(tmp_path, model(), rows, task=task, collator=collator, eval_do_concat_batches=joined).evaluate()
        for joined in (True, False)
    ]
    names = ("eval_loss", "eval_ece", "eval_nll", "eval_accuracy", "eval_n")
    assert [found[0][name] for name in names] == pytest.approx([found[1][name] for name in names], rel=1e-6)


def test_inputs_of_options_cannot_be_joined(tmp_path):
    with pytest.raises(ValueError, match=r"include_for_metrics=\['inputs'\] joins the inputs of all batches"):
        trainer_of(tmp_path, language_model(), examples(4), task="choice", include_for_metrics=["inputs"])


@pytest.mark.parametrize("changes", [
    {}, dict(readout="soft_mixture"), dict(objective="robust_filtered", tau_regret=0.1), dict(objective="focal"),
])  # fmt: skip
def test_a_loss_outside_of_a_running_loop(tmp_path, changes):
    """As callbacks and subclasses ask for it: the mean cross-entropy, with gradient."""
    rows = classification_data(4)
    model = classification_model().eval()
    trainer = trainer_of(tmp_path, model, rows, **changes)
    loss, outputs = trainer.compute_loss(model, collate(rows), return_outputs=True)
    labels = torch.tensor([row["labels"] for row in rows])
    torch.testing.assert_close(loss, F.cross_entropy(outputs["logits"], labels))
    if not changes:
        torch.testing.assert_close(loss, losses_one_by_one(model, rows, per_token=False).mean())
    loss.backward()
    assert model.model.layers[0].mlp.gate.weight.grad.abs().sum() > 0
    again, logits, found = trainer.prediction_step(model, collate(rows), False)
    torch.testing.assert_close(again, loss.detach())
    assert logits.shape == (4, CLASSES) and found.tolist() == labels.tolist()
    assert not any("forward" in vars(module) for module in model.modules())


def test_labels_under_another_name(tmp_path):
    rows = classification_data(8)
    renamed = [{"input_ids": row["input_ids"], "y": row["labels"]} for row in rows]

    def collator(some):
        batch = collate([{"input_ids": row["input_ids"], "labels": row["y"]} for row in some])
        return {"y": batch.pop("labels"), **batch}

    args = dict(objective="robust", label_names=["y"])
    expected, usual = trained_gradients(classification_model(), rows, arguments(tmp_path, objective="robust"))
    trainer = MoECalTrainer(
        model=classification_model(), args=arguments(tmp_path, **args), train_dataset=renamed, eval_dataset=renamed,
        data_collator=collator,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(usual.state.log_history[0]["loss"], rel=1e-6)
    assert trainer.evaluate()["eval_nll"] == pytest.approx(usual.evaluate(rows)["eval_nll"], rel=1e-5)
    with pytest.raises(ValueError, match=r"one label here, got label_names=\['start', 'end'\]"):
        trainer_of(tmp_path, classification_model(), rows, label_names=["start", "end"])


def test_positional_arguments_as_trainer_takes_them(tmp_path):
    rows = classification_data()
    trainer = MoECalTrainer(classification_model(), arguments(tmp_path, objective="robust"), collate, rows, rows)
    assert trainer.train_dataset is rows and trainer.data_collator is collate
    assert trainer.train().global_step == 1
    with pytest.raises(TypeError, match="multiple values for argument 'data_collator'"):
        MoECalTrainer(classification_model(), arguments(tmp_path), collate, data_collator=collate)


def test_what_has_no_right_class_is_refused(tmp_path):
    for kind in ("regression", "multi_label_classification"):
        with pytest.raises(ValueError, match=f"problem_type='{kind}' has no one right class"):
            trainer_of(tmp_path, classification_model(problem_type=kind), classification_data())
    one = MixtralForSequenceClassification(classification_model(num_labels=1).config)
    with pytest.raises(ValueError, match=r"one output \(num_labels=1\), so it is a regression"):
        trainer_of(tmp_path, one, classification_data())
