"""What people do with TRL's `SFTTrainer`: with objective="erm" over tokens both train alike, one batch a step."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from hf_moecal.training.sft import MoECalSFTConfig, MoECalSFTTrainer
from tests.training.helpers import DATA, PAIRS, WORDS, chat, config, language_model, tokenizer


pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning", "ignore:.*(adding|acking|ttention implementation)"
)
OTHER = (
    "{% for message in messages %}{{ message['content'] }} {% if message['role'] == 'assistant' %}</s> {% endif %}"
    "{% endfor %}"
)
SCENARIOS = {  # rows, fields of the configuration, and what else the trainer is given
    "text": (DATA["text"][0], {}, {}),
    "prompt-completion": (DATA["completion"][0], {}, {}),
    "completion_only": (DATA["completion"][0], dict(completion_only_loss=True), {}),
    "whole texts": (DATA["completion"][0], dict(completion_only_loss=False), {}),
    "conversations": (DATA["assistant"][0], {}, {}),
    "assistant_only": (DATA["assistant"][0], dict(assistant_only_loss=True), {}),
    "conversational prompts": (
        [{"prompt": chat(q, a)[:1], "completion": chat(q, a)[1:]} for q, a in PAIRS],
        dict(completion_only_loss=True), {},
    ),
    "end token": (DATA["text"][0], dict(eos_token="w9"), {}),
    "cut": (DATA["text"][0], dict(max_length=4), {}),
    "another column": ([{"content": row["text"]} for row in DATA["text"][0]], dict(dataset_text_field="content"), {}),
    "formatting function": (
        [{"q": q, "a": a} for q, a in PAIRS], {}, dict(formatting_func=lambda row: f"{row['q']} {row['a']}")
    ),
    "tokens": ([{"input_ids": [WORDS[w] for w in f"{q} {a}".split()]} for q, a in PAIRS], {}, {}),
    "adapter": (
        DATA["text"][0], {},
        dict(peft_config=LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="gaussian")),
    ),
    "noisy embeddings": (DATA["text"][0], dict(neftune_noise_alpha=5.0), {}),
    "padding_free": (DATA["text"][0], dict(padding_free=True, max_length=None), {}),
    "packing": (DATA["text"][0], dict(packing=True, max_length=16), {}),
    "wrapped": (DATA["text"][0], dict(packing=True, packing_strategy="wrapped", max_length=8), {}),
}  # fmt: skip


def train(folder, name, kind, **changes):
    rows, settings, given = SCENARIOS[name]
    settings = dict(
        num_train_epochs=1, max_steps=-1, per_device_train_batch_size=4, gradient_accumulation_steps=1,
        learning_rate=0.01, **{**settings, **changes},
    )  # fmt: skip
    own = dict(objective="erm", example="token") if kind is MoECalSFTTrainer else dict(loss_type="nll")
    args = config(folder, MoECalSFTConfig if kind is MoECalSFTTrainer else SFTConfig, **{**settings, **own})
    coder = tokenizer()
    trainer = kind(
        model=language_model(), args=args, processing_class=coder,
        train_dataset=Dataset.from_list(rows), **given,
    )  # fmt: skip
    trainer.train()
    return trainer


def assert_alike(ours, stock):
    both = [[log["loss"] for log in trainer.state.log_history if "loss" in log] for trainer in (ours, stock)]
    assert both[0] == pytest.approx(both[1], rel=1e-4) and both[0]
    for (name, one), other in zip(ours.model.named_parameters(), stock.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("name", SCENARIOS)
def test_both_trainers_train_alike(tmp_path, name):
    ours, stock = (train(tmp_path, name, kind) for kind in (MoECalSFTTrainer, SFTTrainer))
    assert_alike(ours, stock)


def test_another_chat_template(tmp_path):
    (tmp_path / "template.jinja").write_text(OTHER)
    changes = dict(chat_template_path=str(tmp_path / "template.jinja"))
    ours, stock = (train(tmp_path, "conversations", kind, **changes) for kind in (MoECalSFTTrainer, SFTTrainer))
    assert_alike(ours, stock)
    assert ours.processing_class.chat_template == OTHER


def test_a_stream(tmp_path):
    both = []
    for kind in (MoECalSFTTrainer, SFTTrainer):
        own = dict(objective="erm", example="token") if kind is MoECalSFTTrainer else dict(loss_type="nll")
        args = config(
            tmp_path, MoECalSFTConfig if kind is MoECalSFTTrainer else SFTConfig, max_steps=2, learning_rate=0.01,
            per_device_train_batch_size=4, gradient_accumulation_steps=1, **own,
        )  # fmt: skip
        stream = Dataset.from_list(DATA["text"][0]).to_iterable_dataset()
        trainer = kind(model=language_model(), args=args, processing_class=tokenizer(), train_dataset=stream)
        trainer.train()
        both.append(trainer)
    assert_alike(*both)
