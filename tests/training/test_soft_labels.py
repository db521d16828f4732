"""Training on votes and distributions: one-hot ones change no bit, votes are what repeated rows are."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset

from hf_moecal import ChoiceCollator, MoECalTrainer, predict
from hf_moecal.calibration import TemperatureCalibrator
from hf_moecal.metrics import calibration_report
from tests.readouts.helpers import READOUTS, committee, loop, reference
from tests.tasks.helpers import examples
from tests.training.helpers import (
    CLASSES,
    OBJECTIVES,
    Gradients,
    arguments,
    classification_data,
    classification_model,
    collate,
    language_model,
    relative_error,
    trained_gradients,
)


def soft(rows):
    return [{**row, "labels": F.one_hot(torch.tensor(row["labels"]), CLASSES).float()} for row in rows]


SETTINGS = {
    "filtered": OBJECTIVES["filtered"],
    "focal": dict(objective="focal"),
    "mixture": dict(readout="soft_mixture", expert_loss_weight=0.5, tau_disagreement=0.05),
}


@pytest.mark.parametrize("settings", SETTINGS)
def test_one_hot_distributions_change_nothing(tmp_path, settings):
    rows = classification_data(7)
    rows[3]["labels"] = -100
    args = dict(tau_regret=0.05, **SETTINGS[settings])
    hard, first = trained_gradients(classification_model(), rows, arguments(tmp_path, **args))
    shares = soft([{**row, "labels": max(row["labels"], 0)} for row in rows])
    shares[3]["labels"] = torch.full((CLASSES,), -100.0)
    found, second = trained_gradients(classification_model(), shares, arguments(tmp_path, **args))
    assert hard.keys() == found.keys() and all(torch.equal(hard[name], found[name]) for name in hard)
    a, b = (dict(trainer.state.log_history[0]) for trainer in (first, second))
    same = [name for name in a if "runtime" not in name and "second" not in name and "flos" not in name]
    assert {name: a[name] for name in same} == {name: b[name] for name in same}
    figures = [
        trainer.evaluate([row for row in data if torch.as_tensor(row["labels"]).max() >= 0])
        for trainer, data in ((first, rows), (second, shares))
    ]
    for name in ("eval_loss", "eval_ece", "eval_nll", "eval_brier", "eval_accuracy", "eval_n"):
        assert figures[0][name] == pytest.approx(figures[1][name], rel=1e-6)


VOTES = [[3, 1, 0], [0, 4, 0], [1, 1, 2], [2, 0, 2]]


def test_votes_train_as_repeated_rows_do(tmp_path):
    rows = [row["input_ids"].tolist() for row in classification_data(4)]
    votes = Dataset.from_dict({"input_ids": rows, "votes": VOTES})
    each = [(ids, c) for ids, counts in zip(rows, VOTES, strict=True) for c, n in enumerate(counts) for _ in range(n)]
    repeated = Dataset.from_dict({"input_ids": [ids for ids, _ in each], "label": [label for _, label in each]})

    def pad(batch):
        name = "votes" if "votes" in batch[0] else "label"
        ids = [{"input_ids": torch.tensor(row["input_ids"]), "labels": 0} for row in batch]
        values = torch.tensor([row[name] for row in batch])
        return {**collate(ids), "labels": None} | {"labels" if name == "label" else name: values}

    gradients = {}
    for name, data, size in (("votes", votes, 2), ("repeated", repeated, 8)):
        seen = Gradients()
        args = arguments(tmp_path, objective="erm", per_device_train_batch_size=size, gradient_accumulation_steps=2)
        trainer = MoECalTrainer(
            model=classification_model(), args=args, train_dataset=data, data_collator=pad, callbacks=[seen]
        )
        trainer.train()
        gradients[name] = seen.found
    assert relative_error(gradients["votes"], gradients["repeated"]) <= 1e-5


def test_the_filter_reads_distributions(tmp_path):
    """Losses, regret and disagreement from one whole forward per expert, from their definitions."""
    shares = torch.tensor(VOTES * 2) / 4
    rows = [{**row, "labels": q} for row, q in zip(classification_data(), shares, strict=True)]
    settings = dict(readout="soft_mixture", tau_regret=0.2, tau_disagreement=0.1, expert_loss_weight=0.5)
    args = arguments(tmp_path, **settings)
    found, _ = trained_gradients(classification_model(), rows, args)
    model, examples = classification_model().train(), []
    for row in rows:
        ids, q = row["input_ids"], row["labels"]
        own, alone, weights = loop(model, ids, len(ids) - 1, READOUTS["soft"])
        regret = ((alone * q).sum(-1).max() - (own * q).sum()).detach().clamp_min(0)
        spread = (weights * (alone.exp() - own.exp()).square().sum(-1)).sum().detach()
        single = -(weights.detach() * (alone * q).sum(-1)).sum()
        examples.append(torch.stack([-(own * q).sum(), regret, spread, single]))
    reference(torch.stack(examples), args).backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert relative_error(found, expected) <= 1e-5


@pytest.mark.parametrize("settings", [{}, dict(readout="soft_mixture")])
@pytest.mark.parametrize("scoring", ["per_token", "label_word"])
def test_options_with_one_hot_distributions_change_nothing(tmp_path, scoring, settings):
    rows = examples(words=scoring == "label_word")
    rows[2] = {**rows[2], "label": -100}

    def shared(row):
        label = [float(i == row["label"]) for i in range(len(row["options"]))]
        return {**row, "label": None if row["label"] == -100 else label}

    found, logs = [], []
    for data in (rows, [shared(row) for row in rows]):
        seen, collator = Gradients(), ChoiceCollator(scoring=scoring)
        args = arguments(tmp_path, task="choice", tau_regret=0.3, tau_disagreement=0.05, **settings)
        trainer = MoECalTrainer(
            model=language_model(), args=args, train_dataset=data, data_collator=collator, callbacks=[seen]
        )
        trainer.train()
        found.append(seen.found)
        logs.append([trainer.state.log_history[0][name] for name in ("objective", "loss", "regret", "disagreement")])
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0]) and logs[0] == logs[1]


def test_options_with_votes_cost_what_their_raters_cost(tmp_path):
    rows = examples(4)
    votes = [{**row, "label": None, "votes": [1 + (i + k) % 3 for k in range(len(row["options"]))]}
             for i, row in enumerate(rows)]  # fmt: skip
    args = arguments(tmp_path, task="choice", objective="erm", per_device_train_batch_size=4,
                     gradient_accumulation_steps=1)  # fmt: skip
    trainer = MoECalTrainer(model=language_model(), args=args, train_dataset=votes)
    figures = trainer.evaluate(votes)
    each = [{**row, "label": k} for row in votes for k, n in enumerate(row["votes"]) for _ in range(n)]
    weights = [1 / sum(row["votes"]) for row in votes for n in row["votes"] for _ in range(n)]
    losses = [trainer.evaluate([row])["eval_loss"] for row in each]
    expected = float(np.average(losses, weights=weights))
    assert figures["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert figures["eval_nll"] == pytest.approx(expected, rel=1e-5)


def test_votes_go_through_predictions_figures_and_fits():
    ids = [row["input_ids"].tolist() for row in classification_data()]
    votes = Dataset.from_dict({"input_ids": ids, "votes": VOTES * 2})
    model = committee(members=2)
    table = predict(model, votes, readout="soft_mixture", progress=False)
    shares = np.array(VOTES * 2) / 4
    np.testing.assert_allclose(np.array(table["label"]), shares, atol=1e-7)
    alone, probs = np.array(table["expert_logits"]), np.array(table["probs"])
    log_alone = torch.tensor(alone).log_softmax(-1).numpy()
    best = (log_alone * shares[:, None]).sum(-1).max(-1)
    np.testing.assert_allclose(table["regret"], np.maximum(best - (np.log(probs) * shares).sum(-1), 0), atol=1e-5)
    report = calibration_report(table["label"], probs=table["probs"])
    assert report["nll"] == pytest.approx(-(np.log(probs) * shares).sum(-1).mean(), rel=1e-6)

    repeated = [(row, c) for row, counts in enumerate(VOTES * 2) for c, n in enumerate(counts) for _ in range(n)]
    rows = table.select([row for row, _ in repeated]).to_dict()
    rows["label"] = [c for _, c in repeated]
    ours, theirs = (TemperatureCalibrator().fit(one) for one in (table, rows))
    assert ours.temperature == pytest.approx(theirs.temperature, rel=1e-6)
