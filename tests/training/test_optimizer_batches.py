"""Streams that end inside an optimizer batch, batches without labels, models of the user's own, searches."""

import importlib.util

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import IterableDataset
from transformers import TrainerCallback
from transformers.trainer_utils import HPSearchBackend

from hf_moecal import ChoiceCollator, MoECalTrainer
from tests.tasks.helpers import examples, losses_one_by_one
from tests.training.helpers import (
    Gradients,
    arguments,
    classification_data,
    classification_model,
    collate,
    language_model,
    reference_gradients,
    relative_error,
)


class Stream(IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        yield from self.rows


class AllGradients(TrainerCallback):
    """Of each optimizer step."""

    def __init__(self):
        self.found = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


@pytest.mark.parametrize("objective", ["erm", "robust", "robust_filtered"])
@pytest.mark.parametrize("normalizer", ["two_pass", "streaming"])
def test_a_stream_that_ends_inside_an_optimizer_batch(tmp_path, normalizer, objective):
    """Five micro-batches of two rows, four a step: the one that is left begins the next batch. Nothing is learned."""
    rows, seen = classification_data(10), AllGradients()
    args = arguments(
        tmp_path, objective=objective, normalizer=normalizer, max_steps=3, learning_rate=0.0, tau_regret=0.05,
        tau_disagreement=0.05,
    )  # fmt: skip
    trainer = MoECalTrainer(
        model=classification_model(), args=args, train_dataset=Stream(rows), data_collator=collate, callbacks=[seen]
    )
    trainer.train()
    taken = [[*range(8)], [8, 9, *range(6)], [6, 7, 8, 9, 0, 1, 2, 3]]
    assert len(seen.found) == 3 and trainer.state.global_step == 3
    for found, places in zip(seen.found, taken, strict=True):
        expected = reference_gradients(classification_model(), [rows[i] for i in places], args)
        assert relative_error(found, expected) <= 1e-5
    assert len([log for log in trainer.state.log_history if "objective" in log]) == 3


def test_a_stream_shorter_than_one_optimizer_batch_is_named(tmp_path):
    args = arguments(tmp_path, objective="robust", max_steps=3)
    trainer = MoECalTrainer(
        model=classification_model(), args=args, train_dataset=Stream(classification_data(6)), data_collator=collate
    )
    with pytest.raises(ValueError, match="ends after 3 micro-batches, before one .* gradient_accumulation_steps=4 is"):
        trainer.train()


def test_an_epoch_that_is_stopped_early_leaves_no_gradients(tmp_path):
    class Stop(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            control.should_epoch_stop = state.global_step == 0 and not hasattr(self, "done")
            self.done = True

    rows, seen = classification_data(), AllGradients()
    args = arguments(tmp_path, objective="robust", normalizer="streaming", num_train_epochs=2, max_steps=-1)
    MoECalTrainer(
        model=classification_model(), args=args, train_dataset=rows, data_collator=collate, callbacks=[Stop(), seen]
    ).train()
    assert relative_error(seen.found[0], reference_gradients(classification_model(), rows, args)) <= 1e-5


@pytest.mark.parametrize("scoring", ["per_token", "label_word"])
@pytest.mark.parametrize("changes", [
    dict(objective="erm"), dict(objective="robust"), dict(objective="robust", normalizer="streaming"),
    dict(objective="robust_filtered", normalizer="streaming", tau_regret=0.0),
    dict(objective="robust", readout="soft_mixture"),
])  # fmt: skip
def test_a_micro_batch_of_options_without_labels(tmp_path, scoring, changes):
    rows = examples(4, words=scoring == "label_word")
    rows[2]["label"] = -100
    seen, given = Gradients(), dict(changes)
    args = arguments(tmp_path, task="choice", per_device_train_batch_size=1, gradient_accumulation_steps=4, **given)
    MoECalTrainer(
        model=language_model(), args=args, train_dataset=rows, data_collator=ChoiceCollator(scoring=scoring),
        callbacks=[seen],
    ).train()  # fmt: skip
    assert seen.found
    if "readout" in changes or args.objective == "robust_filtered":
        return
    model = language_model().train()
    losses = losses_one_by_one(model, [*rows[:2], rows[3]], scoring)
    weights = torch.softmax(args.eta * losses.detach(), 0) if args.objective == "robust" else torch.full((3,), 1 / 3)
    (weights * losses).sum().backward()
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert relative_error(seen.found, expected) <= 1e-5


class InOrder(MoECalTrainer):
    def _get_train_sampler(self, *args):
        return torch.utils.data.SequentialSampler(self.train_dataset)


@pytest.mark.parametrize("changes", [
    dict(objective="erm"), dict(objective="robust"), dict(objective="robust", normalizer="streaming"),
    dict(objective="robust_filtered", normalizer="streaming"), dict(objective="robust", router_aux_loss_coef=0.5),
    dict(objective="robust", readout_members=2, train="last_moe_layer"),
])  # fmt: skip
def test_a_batch_without_labels_is_skipped_and_counted(tmp_path, changes):
    """The optimizer, with momentum and weight decay, passes over it as if it had not been."""
    settings = dict(
        optim="adamw_torch", weight_decay=0.5, num_train_epochs=1, max_steps=-1, logging_steps=3,
        lr_scheduler_type="constant", gradient_accumulation_steps=2, learning_rate=0.01,
    )  # fmt: skip
    weights, rows = [], classification_data(12)
    for kept in ([*range(12)], [*range(4), *range(8, 12)]):
        some = [dict(rows[i], labels=-100) if 4 <= i < 8 else rows[i] for i in kept]
        trainer = InOrder(
            model=classification_model(), args=arguments(tmp_path, **{**settings, **changes}), train_dataset=some,
            data_collator=collate,
        )  # fmt: skip
        trainer.train()
        weights.append(trainer.model.state_dict())
        skipped = [log["skipped_steps"] for log in trainer.state.log_history if "skipped_steps" in log]
        assert skipped == ([1] if len(kept) == 12 else [])
    for (name, one), other in zip(weights[0].items(), weights[1].values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6, msg=name)


def test_training_without_any_label_is_refused(tmp_path):
    rows = [{**row, "labels": -100} for row in classification_data(16)]
    args = arguments(tmp_path, objective="robust", max_steps=4, num_train_epochs=4, logging_steps=2)
    trainer = MoECalTrainer(model=classification_model(), args=args, train_dataset=rows, data_collator=collate)
    with pytest.raises(ValueError, match=r"No example has a label \(all are -100\) in any of the 4 optimizer batches"):
        trainer.train()


class Plain(nn.Module):
    """A mixture of two linear experts without a configuration."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.router, self.experts = nn.Linear(4, 2), nn.ModuleList(nn.Linear(4, 3) for _ in range(2))

    def forward(self, x, labels=None):
        shares = self.router(x).softmax(-1)
        return {"logits": sum(shares[:, k, None] * expert(x) for k, expert in enumerate(self.experts))}


@pytest.mark.parametrize("objective", ["erm", "robust"])
def test_a_model_without_a_configuration(tmp_path, objective):
    torch.manual_seed(1)
    rows = [{"x": torch.randn(4), "labels": i % 3} for i in range(8)]
    seen, args = Gradients(), arguments(tmp_path, objective=objective)
    trainer = MoECalTrainer(model=Plain(), args=args, train_dataset=rows, eval_dataset=rows[:5], callbacks=[seen])
    trainer.train()
    model = Plain()
    labels = torch.tensor([row["labels"] for row in rows])
    losses = F.cross_entropy(model(torch.stack([row["x"] for row in rows]))["logits"], labels, reduction="none")
    weights = torch.softmax(args.eta * losses.detach(), 0) if objective == "robust" else torch.full((8,), 1 / 8)
    (weights * losses).sum().backward()
    assert relative_error(seen.found, {name: p.grad for name, p in model.named_parameters()}) <= 1e-5
    assert trainer.evaluate()["eval_n"] == 5
    trainer.save_model(str(tmp_path / "saved"))


@pytest.mark.parametrize("optimizer", ["lomo", "adalomo"])
def test_optimizers_that_step_in_the_backward_pass_are_refused(tmp_path, optimizer):
    with pytest.raises(ValueError, match=f"optim='{optimizer}' updates parameters inside each backward pass"):
        MoECalTrainer(model=classification_model(), args=arguments(tmp_path, optim=optimizer))


def search(folder, trials, **changes):
    """Runs trials as `hyperparameter_search` does, with values instead of a study."""
    built = []

    def model_init():
        built.append(classification_model())
        return built[-1]

    args = arguments(folder, objective="robust", max_steps=2, num_train_epochs=2, learning_rate=0.1, **changes)
    trainer = MoECalTrainer(
        model_init=model_init, args=args, train_dataset=classification_data(), eval_dataset=classification_data(),
        data_collator=collate,
    )  # fmt: skip
    trainer.hp_search_backend, trainer.hp_space = HPSearchBackend.OPTUNA, lambda trial: trial.params
    for params in trials:
        trial = type("Trial", (), {"params": params, "number": 0, "set_user_attr": lambda *a: None})()
        trainer.train(trial=trial)
        yield trainer, trial


def test_each_trial_trains_a_fresh_model(tmp_path, monkeypatch):
    batches = dict(gradient_accumulation_steps=1, per_device_train_batch_size=8)
    trials = [dict(eta=0.5), dict(eta=3.0, **batches), dict(eta=0.5)]
    monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: trial.params)
    found = []
    for trainer, _ in search(tmp_path, trials, train="last_moe_layer"):
        found.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
        alone = MoECalTrainer(
            model=classification_model(), args=trainer.args, train_dataset=classification_data(), data_collator=collate
        )
        alone.train()
        for (name, one), other in zip(trainer.model.named_parameters(), alone.model.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6, msg=name)
            assert one.requires_grad == other.requires_grad
    assert len({*map(tuple, found)}) > 1


def test_what_makes_the_model_cannot_vary_over_trials(tmp_path):
    with pytest.raises(ValueError, match="readout_members decide how the model is made, before a trial sets them"):
        list(search(tmp_path, [dict(readout_members=2)], train="last_moe_layer"))
    with pytest.raises(ValueError, match="`eta` must be a finite number at least 0, got -1.0"):
        list(search(tmp_path, [dict(eta=-1.0)]))


@pytest.mark.skipif(importlib.util.find_spec("optuna") is None, reason="needs optuna")
def test_a_search_with_optuna(tmp_path):
    args = arguments(tmp_path, objective="robust", max_steps=2, num_train_epochs=2)
    rows = classification_data()
    trainer = MoECalTrainer(
        model_init=lambda: classification_model(), args=args, train_dataset=rows, eval_dataset=rows,
        data_collator=collate,
    )  # fmt: skip
    best = trainer.hyperparameter_search(
        hp_space=lambda trial: {"eta": trial.suggest_float("eta", 0.1, 4.0)}, n_trials=3, backend="optuna",
        compute_objective=lambda metrics: metrics["eval_nll"], direction="minimize",
    )  # fmt: skip
    assert 0.1 <= best.hyperparameters["eta"] <= 4.0
