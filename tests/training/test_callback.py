"""The training callback: figures against routing_statistics, what reporters receive, warnings."""

import math

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_moecal.probes import find_moe_layers, probe_experts, routing_statistics
from hf_moecal.training.callback import MoECalCallback


def tiny_model(seed=0, **changes):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4}
    return MixtralForCausalLM(MixtralConfig(**{**sizes, **heads, **changes}))


def rows(n=16, length=6):
    ids = torch.randint(0, 64, (n, length), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in ids]


class Reporter(TrainerCallback):
    """Stands for wandb or tensorboard: keeps what it is given at on_log."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))


def train(tmp_path, callback, model=None, **settings):
    options = {"learning_rate": 0.0, "logging_steps": 1, "max_steps": 2, "per_device_train_batch_size": 16}
    arguments = TrainingArguments(tmp_path, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True,
                                  **{**options, **settings})  # fmt: skip
    reporter = Reporter()
    trainer = Trainer(
        model or tiny_model(), arguments, train_dataset=rows(), eval_dataset=rows(4), callbacks=[reporter]
    )
    if callback:
        callback.attach(trainer)
    trainer.train()
    return trainer, reporter


def test_figures_are_those_of_the_routing_statistics(tmp_path):
    trainer, reporter = train(tmp_path, MoECalCallback())
    wanted = routing_statistics(trainer.model, rows())
    logged = reporter.seen[0]
    for layer in wanted:
        assert logged[f"moe/{layer.index}/load_max"] == pytest.approx(float(layer.load.max()) * 4, rel=1e-6)
        assert logged[f"moe/{layer.index}/entropy"] == pytest.approx(layer.entropy / math.log(2), rel=1e-5)
        dead = int((layer.load < 0.1 / 4).sum())
        assert logged[f"moe/{layer.index}/dead_experts"] == dead
    assert reporter.seen[1]["moe/0/load_max"] == pytest.approx(logged["moe/0/load_max"])  # sums start anew


def test_reporters_and_the_history_get_them_and_evaluations_do_not(tmp_path):
    trainer, reporter = train(tmp_path, MoECalCallback(), eval_strategy="steps", eval_steps=1)
    with_figures = [log for log in reporter.seen if "moe/0/entropy" in log]
    assert len(with_figures) == 2 and all("loss" in log for log in with_figures)
    assert sum("moe/0/entropy" in log for log in trainer.state.log_history) == 2
    assert not any("moe/0/entropy" in log for log in reporter.seen if "eval_loss" in log)


def test_accumulation_and_checkpointing_count_every_token_alike(tmp_path):
    checkpointed = tiny_model()
    renamed = getattr(checkpointed, "activation_checkpointing_enable", None)  # its name in newer transformers
    (renamed or checkpointed.gradient_checkpointing_enable)({"use_reentrant": False})
    split = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
    plain = train(tmp_path, MoECalCallback())[1].seen[0]
    found = train(tmp_path, MoECalCallback(), model=checkpointed, **split)[1].seen[0]
    for key in ("moe/0/load_max", "moe/1/entropy", "moe/1/dead_experts"):
        assert found[key] == pytest.approx(plain[key], rel=1e-5)


def test_training_is_left_as_it_was(tmp_path):
    settings = {"learning_rate": 1e-2, "max_steps": 3}
    watched = train(tmp_path, MoECalCallback(probe_batch={"input_ids": rows()[0]["input_ids"][None]}), **settings)[0]
    alone = train(tmp_path, None, **settings)[0]
    for (name, a), (_, b) in zip(watched.model.named_parameters(), alone.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert not any(layer.module._forward_hooks for layer in find_moe_layers(watched.model))


def test_disagreement_on_a_probe_batch(tmp_path):
    ids = torch.stack([row["input_ids"] for row in rows(2)])
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    callback = MoECalCallback(probe_batch={"input_ids": ids, "attention_mask": mask}, disagreement_layers=[0, -1])
    trainer, reporter = train(tmp_path, callback)
    model = trainer.model.eval()
    for layer in (0, 1):
        with torch.no_grad(), probe_experts(model, layer) as probe:
            model(input_ids=ids, attention_mask=mask)
            wanted = probe.disagreement(torch.tensor([5, 6 + 3])).mean()
        assert reporter.seen[0][f"moe/{layer}/disagreement"] == pytest.approx(float(wanted), rel=1e-5)


def test_a_collapsed_router_warns(tmp_path, caplog):
    model = tiny_model(num_local_experts=8)
    with torch.no_grad():  # all tokens of layer 1 to experts 0 and 1
        gate = model.model.layers[1].mlp.gate.weight
        gate.zero_()
        gate[:2] = torch.eye(32)[0] * 5
        model.model.layers[1].post_attention_layernorm.weight.zero_()[0] = 1
        model.model.embed_tokens.weight[:, 0] = 9
        model.model.layers[0].post_attention_layernorm.weight[0] = 0  # which layer 0 does not see
    with caplog.at_level("WARNING", logger="hf_moecal.training.callback"):
        train(tmp_path, MoECalCallback(warn_load=3.0), model=model)
    messages = [record.getMessage() for record in caplog.records]
    assert any("collapse at step 1 in MoE layer 1" in text and "6 of 8 experts are dead" in text for text in messages)
    assert not any("MoE layer 0" in text for text in messages)


def test_a_healthy_router_does_not_warn(tmp_path, caplog):
    with caplog.at_level("WARNING", logger="hf_moecal.training.callback"):
        train(tmp_path, MoECalCallback())
    assert not caplog.records


def test_it_must_be_attached(tmp_path):
    arguments = TrainingArguments(tmp_path, report_to=[], use_cpu=True, max_steps=1)
    trainer = Trainer(tiny_model(), arguments, train_dataset=rows(), callbacks=[MoECalCallback()])
    with pytest.raises(ValueError, match="attach"):
        trainer.train()


def test_a_dense_model_is_refused(tmp_path):
    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=1)  # fmt: skip
    trainer = Trainer(LlamaForCausalLM(config), TrainingArguments(tmp_path, report_to=[], use_cpu=True))
    with pytest.raises(ValueError, match="MoE"):
        MoECalCallback().attach(trainer)


@pytest.mark.parametrize("setting", [{"warn_load": 1}, {"warn_dead": 2}, {"dead_below": -1}])
def test_bad_settings(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        MoECalCallback(**setting)
