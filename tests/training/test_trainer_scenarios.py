"""What people do with `transformers.Trainer`, on a tiny mixture with objective="erm": it works here too."""

import json
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from torch.utils.data import IterableDataset
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

from hf_moecal import MoECalTrainer
from tests.training.helpers import (
    arguments,
    classification_data,
    classification_model,
    collate,
    language_data,
    language_model,
    reference_gradients,
    relative_error,
    trained_gradients,
)


def run(folder, *, rows=None, model=None, callbacks=None, train=True, resume=None, **changes):
    given = {name: changes.pop(name) for name in ("eval_dataset", "data_collator") if name in changes}
    args = arguments(folder, **{"objective": "erm", "max_steps": -1, "num_train_epochs": 1, **changes})
    trainer = MoECalTrainer(
        model=model or classification_model(), args=args, callbacks=callbacks,
        train_dataset=classification_data() if rows is None else rows, **{"data_collator": collate, **given},
    )  # fmt: skip
    if train:
        trainer.train(resume_from_checkpoint=resume)
    return trainer


def losses(trainer):
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def same_weights(one, other, **tolerance):
    for (name, a), b in zip(one.model.named_parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name, **(tolerance or dict(rtol=1e-5, atol=1e-6)))


@pytest.mark.parametrize("split", [(8, 1), (4, 2), (1, 8)])
def test_accumulation_is_one_large_batch_whatever_the_number_of_tokens(tmp_path, split):
    rows, (batch, steps) = language_data(), split
    args = arguments(
        tmp_path, task="lm", objective="erm", example="token", per_device_train_batch_size=batch,
        gradient_accumulation_steps=steps,
    )  # fmt: skip
    found, _ = trained_gradients(language_model(), rows, args)
    assert relative_error(found, reference_gradients(language_model().train(), rows, args)) <= 2e-5


def test_one_batch_is_what_the_stock_trainer_does(tmp_path):
    """Where that is right: one process, one accumulation step."""
    settings = dict(per_device_train_batch_size=2, gradient_accumulation_steps=1, optim="adamw_torch")
    ours = run(tmp_path, **settings)
    plain = TrainingArguments(
        str(tmp_path), learning_rate=1e-3, num_train_epochs=1, report_to="none", save_strategy="no", use_cpu=True,
        max_grad_norm=0.0, logging_steps=1, remove_unused_columns=False, disable_tqdm=True, **settings,
    )  # fmt: skip
    stock = Trainer(
        model=classification_model(), args=plain, train_dataset=classification_data(), data_collator=collate
    )
    stock.train()
    assert losses(ours) == pytest.approx(losses(stock), rel=1e-5)
    same_weights(ours, stock)


class Events(TrainerCallback):
    def __init__(self):
        self.seen = []

    def __getattribute__(self, name):
        if name.startswith("on_"):
            return lambda args, state, control, **kwargs: self.seen.append(name[3:])
        return super().__getattribute__(name)


def test_callbacks_come_in_order(tmp_path):
    events = Events()
    run(tmp_path, callbacks=[events], eval_dataset=classification_data(4), eval_strategy="epoch")
    seen = [name for name in events.seen if name not in ("log", "prediction_step")]
    substeps = ["step_begin", *["substep_end"] * 3, "pre_optimizer_step", "optimizer_step", "step_end"]
    assert seen == ["init_end", "train_begin", "epoch_begin", *substeps, "epoch_end", "evaluate", "train_end"]


def test_early_stopping(tmp_path):
    trainer = run(
        tmp_path, callbacks=[EarlyStoppingCallback(early_stopping_patience=2)], eval_dataset=classification_data(4),
        eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True,
        metric_for_best_model="ece", num_train_epochs=9, learning_rate=0.0,
    )  # fmt: skip
    assert trainer.state.global_step == 3 and trainer.state.best_global_step == 1


def test_save_limits_keep_the_newest_and_the_best(tmp_path):
    settings = dict(save_strategy="steps", save_steps=1, num_train_epochs=4)
    run(tmp_path / "a", save_total_limit=2, **settings)
    assert sorted(path.name for path in (tmp_path / "a").glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]
    trainer = run(
        tmp_path / "b", save_total_limit=1, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True,
        metric_for_best_model="nll", learning_rate=1.0, eval_dataset=classification_data(4), **settings,
    )  # fmt: skip
    left = [path.name for path in (tmp_path / "b").glob("checkpoint-*")]
    assert left == [f"checkpoint-{trainer.state.best_global_step}"]
    run(tmp_path / "c", save_only_model=True, **settings)
    assert not list((tmp_path / "c").rglob("optimizer.pt"))


class Stream(IterableDataset):
    def __iter__(self):
        yield from classification_data(16)


LOADERS = {
    "rows": dict(rows=classification_data(16)),
    "workers": dict(rows=classification_data(16), dataloader_num_workers=1),
    "stream": dict(rows=Stream(), max_steps=4),
    "arrow": dict(rows=Dataset.from_list([{k: v.tolist() if k == "input_ids" else v for k, v in r.items()}
                                          for r in classification_data(16)]).with_format("torch"),
                  data_collator=lambda rows: collate([{**r, "labels": int(r["labels"])} for r in rows])),
    "by length": dict(rows=classification_data(16), train_sampling_strategy="group_by_length"),
    "in order": dict(rows=classification_data(16), train_sampling_strategy="sequential"),
}  # fmt: skip


@pytest.mark.parametrize("loader", LOADERS)
def test_resuming_with_every_kind_of_loader(tmp_path, loader):
    settings = dict(
        save_strategy="steps", save_steps=1, num_train_epochs=2, optim="adamw_torch", learning_rate=0.01,
        **LOADERS[loader],
    )  # fmt: skip
    whole = run(tmp_path / "a", model=classification_model(attention_dropout=0.2), **settings)
    model, checkpoint = classification_model(attention_dropout=0.2), str(tmp_path / "a" / "checkpoint-1")
    resumed = run(tmp_path / "b", model=model, resume=checkpoint, **settings)
    assert len(losses(whole)) == 4
    assert losses(resumed) == losses(whole)
    same_weights(resumed, whole, rtol=0, atol=0)


@pytest.mark.parametrize("changes", [
    dict(eval_accumulation_steps=1), dict(batch_eval_metrics=True), dict(eval_do_concat_batches=False),
    dict(per_device_eval_batch_size=1), dict(prediction_loss_only=True), dict(eval_on_start=True),
    dict(include_for_metrics=["loss"]), dict(dataloader_drop_last=False, bf16_full_eval=False),
])  # fmt: skip
def test_evaluation_is_the_same_in_all_ways(tmp_path, changes):
    rows = classification_data(7)
    settings = dict(eval_dataset=rows, per_device_eval_batch_size=3, train=False)
    expected = run(tmp_path, **settings).evaluate()
    found = run(tmp_path, **{**settings, **changes}).evaluate()
    for name in expected.keys() & found.keys() - {"eval_runtime"}:
        if "second" not in name and "time" not in name:
            assert found[name] == pytest.approx(expected[name], rel=1e-6), name
    assert "eval_loss" in found and ("eval_ece" in found) == ("prediction_loss_only" not in changes)


def test_noisy_embeddings(tmp_path):
    """NEFTune: noise while it trains, none in evaluation, no hook left."""
    quiet, noisy = run(tmp_path, learning_rate=0.0), run(tmp_path, learning_rate=0.0, neftune_noise_alpha=5.0)
    assert losses(quiet) != pytest.approx(losses(noisy), rel=1e-4)
    rows = classification_data(4)
    assert quiet.evaluate(rows)["eval_loss"] == pytest.approx(noisy.evaluate(rows)["eval_loss"], rel=1e-6)
    assert not noisy.model.get_input_embeddings()._forward_hooks


@pytest.mark.slow
def test_compiled(tmp_path):
    settings = dict(learning_rate=0.01, num_train_epochs=2)
    plain = run(tmp_path, **settings)
    compiled = run(tmp_path, torch_compile=True, torch_compile_backend="eager", **settings)
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-4)


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "all_checkpoints", "end"])
def test_hub_strategies(tmp_path, monkeypatch, strategy):
    """What goes up while a run goes on, told from the calls that would send it."""
    sent = []

    def start(trainer, **kwargs):
        trainer.hub_model_id, trainer.push_in_progress = "me/model", None

    def upload(*args, **kwargs):
        sent.append(kwargs.get("path_in_repo") or "run")
        return SimpleNamespace(done=lambda: True, result=lambda: None)

    monkeypatch.setattr(Trainer, "init_hf_repo", start)
    monkeypatch.setattr("hf_moecal.hub.push", lambda folder, **kwargs: sent.append("published"))
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: SimpleNamespace(upload_folder=upload), raising=False)
    monkeypatch.setattr("transformers.trainer.upload_folder", upload, raising=False)  # as older versions call it
    trainer = run(
        tmp_path, push_to_hub=True, hub_strategy=strategy, hub_model_id="me/model", hub_token="none",
        save_strategy="steps", save_steps=1, num_train_epochs=2,
    )  # fmt: skip
    expected = {
        "every_save": ["run", "run"], "checkpoint": ["run", "last-checkpoint"] * 2,
        "all_checkpoints": ["run", "checkpoint-1", "run", "checkpoint-2"], "end": [],
    }[strategy]  # fmt: skip
    assert sent == expected
    trainer.push_to_hub()
    assert sent[-1] == "published" and len(sent) == len(expected) + 1


def test_log_and_state_are_plain_json(tmp_path):
    trainer = run(tmp_path, save_strategy="steps", save_steps=1, objective="robust_filtered")
    state = json.loads((tmp_path / "checkpoint-1" / "trainer_state.json").read_text())
    assert (
        state["global_step"] == 1 and state["log_history"][0]["objective"] == trainer.state.log_history[0]["objective"]
    )
