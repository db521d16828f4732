"""The Trainer's gradients against one full-batch autograd reference that shares no code with it."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from transformers import MixtralForSequenceClassification, Trainer

from hf_moecal import MoECalArguments, MoECalTrainer
from tests.training.helpers import (
    CLASSES,
    ETA,
    OBJECTIVES,
    TASKS,
    arguments,
    checkpointing,
    classification_data,
    classification_model,
    collate,
    language_data,
    language_model,
    losses_one_by_one,
    measures_one_by_one,
    reference_gradients,
    relative_error,
    relevance,
    tiny_config,
    trained_gradients,
)


@pytest.mark.parametrize(("batch", "accumulation"), [(8, 1), (2, 4), (1, 8)])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("task", TASKS)
def test_gradients_equal_one_full_batch(tmp_path, task, objective, batch, accumulation):
    build, data, settings = TASKS[task]
    rows = data()
    args = arguments(
        tmp_path,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        **settings,
        **OBJECTIVES[objective],
    )
    found, _ = trained_gradients(build(), rows, args)
    expected = reference_gradients(build().train(), rows, args)
    assert relative_error(found, expected) <= (2e-5 if task == "token" else 1e-5)


@pytest.mark.parametrize("objective", ["robust", "filtered"])
def test_uneven_last_batch_and_sequences_without_labels(tmp_path, objective):
    rows = classification_data(7)  # micro-batches of 2, 2, 2 and 1
    rows[3]["labels"] = -100
    args = arguments(tmp_path, tau_regret=0.15, **{**OBJECTIVES[objective], "tau_disagreement": 0.1})
    found, _ = trained_gradients(classification_model(), rows, args)
    kept = [row for row in rows if row["labels"] != -100]
    assert relative_error(found, reference_gradients(classification_model(), kept, args)) <= 1e-5


def test_clipping_scales_the_exact_gradient(tmp_path):
    args = arguments(tmp_path, objective="robust", max_grad_norm=0.01)
    found, _ = trained_gradients(classification_model(), classification_data(), args)
    expected = reference_gradients(classification_model(), classification_data(), args)
    norm = math.sqrt(sum(float(g.square().sum()) for g in expected.values()))
    assert norm > 0.01
    assert relative_error(found, {n: g * 0.01 / norm for n, g in expected.items()}) <= 1e-5


def test_label_smoothing_and_focal_equal_torch(tmp_path):
    rows = classification_data()
    logits = torch.cat([classification_model()(input_ids=row["input_ids"][None]).logits for row in rows])
    labels = torch.tensor([row["labels"] for row in rows])
    p = F.softmax(logits, -1).gather(1, labels[:, None])[:, 0]
    expected = {
        "label_smoothing": F.cross_entropy(logits, labels, label_smoothing=0.1).item(),
        "focal": (-((1 - p) ** 2) * p.log()).mean().item(),
    }
    for objective, value in expected.items():
        _, trainer = trained_gradients(classification_model(), rows, arguments(tmp_path, objective=objective))
        assert trainer.state.log_history[0]["objective"] == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("noise", [dict(attention_dropout=0.3), dict(router_jitter_noise=0.3)])
def test_both_passes_see_the_same_noise(tmp_path, noise):
    """With one example per micro-batch the loss seen with gradient must be the loss that was weighed."""
    seen = []

    class Recording(MoECalTrainer):
        def _objective_loss(self, outputs, labels, num_items_in_batch=None):
            losses = F.cross_entropy(outputs["logits"], labels, reduction="none")
            seen.append((self._measuring, torch.is_grad_enabled(), losses.item()))
            return super()._objective_loss(outputs, labels, num_items_in_batch)

    args = arguments(
        tmp_path, objective="robust", max_steps=2, per_device_train_batch_size=1, gradient_accumulation_steps=4
    )
    trained_gradients(classification_model(**noise), classification_data(), args, Recording)
    for step in (seen[:7], seen[7:]):
        measured = {index: loss for index, grad, loss in step if not grad}
        replayed = {index: loss for index, grad, loss in step if grad}
        assert set(measured) == {1, 2, 3} and set(replayed) == {0, 1, 2, 3}
        for index, loss in measured.items():
            assert replayed[index] == pytest.approx(loss, abs=2e-6)
    # and fresh noise from window to window
    model = classification_model(**noise).train()
    row = classification_data(1)[0]
    torch.manual_seed(0)
    assert model(input_ids=row["input_ids"][None]).logits.ne(model(input_ids=row["input_ids"][None]).logits).any()


def test_random_numbers_are_never_used_twice(tmp_path):
    states = []

    class Recording(MoECalTrainer):
        def compute_loss(self, *args, **kwargs):
            states.append(torch.get_rng_state())
            return super().compute_loss(*args, **kwargs)

    args = arguments(tmp_path, objective="robust", max_steps=3, num_train_epochs=3)
    trained_gradients(classification_model(attention_dropout=0.3), classification_data(), args, Recording)
    assert len(states) == 12
    assert len({bytes(state.numpy()) for state in states}) == 12


def test_warm_up_and_ramp():
    args = MoECalArguments("out", objective="robust", eta=2.0, robust_warmup_ratio=0.4, eta_ramp_ratio=0.2)
    assert [args.eta_at(p) for p in (0.0, 0.39, 0.5, 0.6, 1.0)] == pytest.approx([0, 0, 1.0, 2.0, 2.0])
    assert MoECalArguments("out", objective="erm").eta_at(1.0) == 0.0


def test_warm_up_is_erm(tmp_path):
    args = arguments(tmp_path, objective="robust", robust_warmup_ratio=0.5)
    found, trainer = trained_gradients(classification_model(), classification_data(), args)
    expected = reference_gradients(classification_model(), classification_data(), arguments(tmp_path, objective="erm"))
    assert relative_error(found, expected) <= 1e-5
    log = trainer.state.log_history[0]
    assert log["effective_sample_size"] == pytest.approx(8) and log["objective"] == pytest.approx(log["mean_loss"])


@pytest.mark.parametrize("detach", [True, False])
def test_what_is_logged(tmp_path, detach):
    args = arguments(tmp_path, tau_regret=0.05, tau_disagreement=0.05, detach_weights=detach)
    _, trainer = trained_gradients(classification_model(), classification_data(), args)
    log = trainer.state.log_history[0]
    model, rows = classification_model(), classification_data()
    losses = losses_one_by_one(model, rows, per_token=False).detach()
    relevant = relevance(measures_one_by_one(model, rows, per_token=False), args)
    weights = torch.softmax(ETA * losses[relevant], 0)
    assert log["objective"] == pytest.approx((losses.mean() + (weights * losses[relevant]).sum()).item(), rel=1e-4)
    assert log["loss"] == pytest.approx(log["objective"], rel=1e-5)
    assert log["mean_loss"] == pytest.approx(losses.mean().item(), rel=1e-4)
    assert log["effective_sample_size"] == pytest.approx(1 / weights.square().sum().item(), rel=1e-3)
    assert log["largest_weight"] == pytest.approx(weights.max().item(), rel=1e-4)
    assert log["relevant_share"] == pytest.approx(relevant.double().mean().item())
    assert log["disagreement"] > 0 and log["regret"] > 0


def test_evaluation_over_named_sets(tmp_path):
    rows = classification_data(12)
    sets = {"movie": rows[:8], "tweets": rows[8:]}
    args = arguments(tmp_path, objective="robust", eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=3)
    _, trainer = trained_gradients(classification_model(), rows[:8], args, eval_dataset=sets)
    log = next(log for log in trainer.state.log_history if "eval_tweets_ece" in log)
    logits = torch.cat([trainer.model.eval()(input_ids=row["input_ids"][None]).logits for row in sets["tweets"]])
    labels = torch.tensor([row["labels"] for row in sets["tweets"]])
    assert log["eval_tweets_nll"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-4)
    accuracy = (logits.argmax(-1) == labels).double().mean().item()
    assert log["eval_tweets_accuracy"] == pytest.approx(accuracy)
    assert set(log) >= {"eval_tweets_ece", "eval_tweets_nll", "eval_tweets_brier", "eval_tweets_signed_gap"}


@pytest.mark.parametrize("task", ["sequence", "token"])
def test_evaluation_of_a_language_model(tmp_path, task):
    build, data, settings = TASKS[task]
    rows = data(6)
    args = arguments(tmp_path, objective="focal", per_device_eval_batch_size=6, **settings)
    trainer = MoECalTrainer(model=build(), args=args, train_dataset=rows, eval_dataset=rows, data_collator=collate)
    expected = losses_one_by_one(build().eval(), rows, per_token=task == "token").mean().item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)  # cross-entropy, whatever trains


def all_equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize("task", ["classification", "sequence"])
def test_resume_gives_the_same_trajectory(tmp_path, task):
    build, data, settings = TASKS[task]
    rows = data()
    model = build(attention_dropout=0.2)
    _, whole = trained_gradients(model, rows, checkpointing(tmp_path / "a", **settings))
    resumed = MoECalTrainer(
        model=build(attention_dropout=0.2), args=checkpointing(tmp_path / "a", **settings), train_dataset=rows,
        data_collator=collate,
    )  # fmt: skip
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert all_equal(whole.model, resumed.model)
    losses = [[log["loss"] for log in t.state.log_history if "loss" in log] for t in (whole, resumed)]
    assert losses[0] == losses[1]


def test_stock_trainer_loses_expert_weights_on_resume(tmp_path):
    """When this fails, upstream is fixed and `checkpoints.restore_weights` can go."""
    model, rows = classification_model(), classification_data()
    trained_gradients(model, rows, checkpointing(tmp_path))
    other = MixtralForSequenceClassification(tiny_config())
    stock = Trainer(model=other, args=checkpointing(tmp_path), train_dataset=rows, data_collator=collate)
    stock._load_from_checkpoint(str(tmp_path / "checkpoint-4"))
    wrong = [
        n for (n, a), b in zip(model.named_parameters(), other.parameters(), strict=True) if not torch.equal(a, b)
    ]
    assert wrong and all("mlp" in name for name in wrong)


def test_best_model_is_exactly_the_best_checkpoint(tmp_path):
    rows = classification_data()
    args = checkpointing(
        tmp_path, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True, learning_rate=0.3,
        metric_for_best_model="eval_tweets_ece",
    )  # fmt: skip
    _, trainer = trained_gradients(classification_model(), rows, args, eval_dataset={"tweets": rows})
    best = MixtralForSequenceClassification.from_pretrained(trainer.state.best_model_checkpoint)
    assert all_equal(best, trainer.model)
    values = [log["eval_tweets_ece"] for log in trainer.state.log_history if "eval_tweets_ece" in log]
    assert trainer.state.best_metric == min(values[:2])


def test_last_moe_layer_trains_alone_and_the_prefix_cache_changes_nothing(tmp_path):
    rows = classification_data()
    settings = dict(tau_regret=0.05, train="last_moe_layer", max_steps=6, num_train_epochs=6, optim="adamw_torch")
    start = classification_model()
    _, plain = trained_gradients(classification_model(), rows, arguments(tmp_path, **settings))
    cached_settings = dict(settings, prefix_cache=str(tmp_path / "cache"))
    _, cached = trained_gradients(
        classification_model(), rows, arguments(tmp_path, **cached_settings), eval_dataset={"movie": rows}
    )
    for (name, before), one, other in zip(
        start.named_parameters(), plain.model.parameters(), cached.model.parameters(), strict=True
    ):
        frozen = not (name.startswith(("model.layers.1.mlp.", "model.norm.", "score.")))
        assert torch.equal(before, one) == frozen, name
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    losses = [[log["loss"] for log in t.state.log_history if "loss" in log] for t in (plain, cached)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert plain.evaluate({"movie": rows})["eval_movie_nll"] == pytest.approx(cached.evaluate()["eval_movie_nll"])
    assert not any("forward" in vars(module) for module in cached.model.model.layers.modules())
    assert plain.trains.startswith("train=last_moe_layer: 9,")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(objective="hinge"), "Unknown objective 'hinge'; choose one of erm, robust"),
        (dict(eta=-1.0), "`eta` must be a finite number at least 0, got -1.0"),
        (dict(eta=float("nan")), "`eta` must be a finite number"),
        (dict(robust_warmup_ratio=1.5), "between 0 and 1, got 1.5"),
        (dict(relevance_quantile=0.0), r"must lie in \(0, 1\], got 0.0"),
        (dict(task="regression"), "`task` must be one of classification, choice, lm"),
        (dict(example="word"), "`example` must be one of sequence, token"),
        (dict(train="head"), "`train` must be one of all, last_moe_layer"),
        (dict(label_smoothing_factor=0.1), "has no effect on objective='robust_filtered'"),
        (dict(metric_for_best_model="eval_tweets_signed_gap"), "cannot be a signed gap"),
        (dict(prefix_cache="x", train="all"), "`prefix_cache` needs frozen first layers, but train='all'"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        MoECalArguments("out", **changes)


def test_bad_datasets_and_models_are_named(tmp_path):
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForSequenceClassification, TrainingArguments

    from hf_moecal import UnsupportedMoEError

    rows, model, args = classification_data(), classification_model(), arguments(tmp_path)
    for data, message in [
        ({"train_dataset": []}, "Dataset 'train_dataset' is empty"),
        ({"train_dataset": rows, "eval_dataset": {"tweets": []}}, "Dataset 'tweets' is empty"),
        ({"train_dataset": Dataset.from_dict({"text": ["a"]})}, r"has no `label` column, only \['text'\]"),
        ({"train_dataset": rows, "compute_loss_func": len}, "`compute_loss_func` would replace the objective"),
    ]:
        with pytest.raises(ValueError, match=message):
            MoECalTrainer(model=model, args=args, data_collator=collate, **data)
    with pytest.raises(ValueError, match="must be a hf_moecal.MoECalArguments, got TrainingArguments"):
        MoECalTrainer(model=model, args=TrainingArguments(str(tmp_path), report_to="none"), train_dataset=rows)
    dense = LlamaForSequenceClassification(LlamaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1,
        intermediate_size=8, num_attention_heads=2))  # fmt: skip
    with pytest.raises(UnsupportedMoEError):
        MoECalTrainer(model=dense, args=args, train_dataset=rows)
    rows[0]["labels"] = CLASSES
    with pytest.raises(ValueError, match="Label 3 is out of range for 3 classes"):
        trained_gradients(model, rows, arguments(tmp_path))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for it
def test_an_adapter_is_not_trained_past(tmp_path):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(classification_model(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="would train weights that an adapter does not save"):
        MoECalTrainer(
            model=model, args=arguments(tmp_path, train="last_moe_layer"), train_dataset=classification_data()
        )


@pytest.mark.parametrize("settings", [{}, dict(batch_eval_metrics=True), dict(eval_accumulation_steps=1)])
def test_figures_of_tokens_and_sequences(tmp_path, settings):
    rows = language_data(7)  # batches of 3, 3 and 1, of different lengths
    rows[4]["labels"] = torch.full_like(rows[4]["labels"], -100)
    args = arguments(tmp_path, task="lm", objective="erm", per_device_eval_batch_size=3, **settings)
    trainer = MoECalTrainer(model=language_model(), args=args, eval_dataset={"a": rows}, data_collator=collate)
    figures = []
    for row in rows:
        with torch.no_grad():
            probs = trainer.model.eval()(input_ids=row["input_ids"][None]).logits[0, :-1].softmax(-1).double()
        own = [(p, int(label)) for p, label in zip(probs, row["labels"][1:], strict=True) if label != -100]
        figures.append(
            [
                (p.max(), p.argmax() == y, -p[y].log(), (p - F.one_hot(torch.tensor(y), len(p))).square().sum())
                for p, y in own
            ]
        )
    tokens = torch.tensor([list(map(float, token)) for sequence in figures for token in sequence]).double()
    sequences = torch.stack([torch.tensor([list(map(float, t)) for t in s]).double().mean(0) for s in figures if s])
    found = trainer.evaluate()
    for prefix, expected in (("", tokens), ("sequence_", sequences)):
        confidence, correct, nll, brier = expected.T
        bins = [(confidence > k / 15) & (confidence <= (k + 1) / 15) for k in range(15)]
        ece = sum(abs(float((confidence - correct)[b].sum())) for b in bins) / len(expected)
        assert found[f"eval_a_{prefix}ece"] == pytest.approx(ece, rel=1e-4)
        assert found[f"eval_a_{prefix}accuracy"] == pytest.approx(correct.mean().item())
        assert found[f"eval_a_{prefix}nll"] == pytest.approx(nll.mean().item(), rel=1e-4)
        assert found[f"eval_a_{prefix}brier"] == pytest.approx(brier.mean().item(), rel=1e-4)
        assert found[f"eval_a_{prefix}n"] == len(expected)
    predicted = trainer.predict(rows)
    assert predicted.predictions["nll"].shape[0] == 7 and (predicted.predictions["confidence"][4] == -100).all()


def test_losses_that_are_nan_stop_training(tmp_path):
    model = classification_model()
    torch.nn.init.constant_(model.score.weight, float("nan"))
    with pytest.raises(ValueError, match="8 of 8 losses are NaN or infinite"):
        trained_gradients(model, classification_data(), arguments(tmp_path, objective="robust"))


def test_arguments_survive_a_round_trip(tmp_path):
    from transformers import HfArgumentParser

    args = arguments(tmp_path, objective="robust", eta=1.5, relevance_quantile=0.3)
    (tmp_path / "args.json").write_text(json.dumps({"output_dir": "x", "objective": "robust", "eta": 1.5}))
    (parsed,) = HfArgumentParser(MoECalArguments).parse_json_file(str(tmp_path / "args.json"))
    assert (parsed.objective, parsed.eta) == (args.objective, args.eta)
    (parsed,) = HfArgumentParser(MoECalArguments).parse_args_into_dataclasses(
        ["--output_dir", "x", "--objective", "focal", "--relevance_quantile", "0.3", "--detach_weights", "false"]
    )
    assert (parsed.objective, parsed.relevance_quantile, parsed.detach_weights) == ("focal", 0.3, False)
