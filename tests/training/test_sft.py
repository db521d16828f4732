"""Supervised fine-tuning: gradients against one full-batch autograd reference, figures against TRL's own."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import HfArgumentParser
from trl import SFTConfig, SFTTrainer

from hf_moecal import MoECalArguments
from hf_moecal.training.sft import MoECalSFTConfig, MoECalSFTTrainer
from tests.training.helpers import (
    DATA,
    OBJECTIVES,
    VOCABULARY,
    Gradients,
    config,
    language_model,
    losses_one_by_one,
    reference_gradients,
    relative_error,
    tokenizer,
    trained,
    trainer_of,
)


pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for it
HERE = Path(__file__).parent


@pytest.mark.parametrize(("batch", "accumulation"), [(8, 1), (2, 4)])
@pytest.mark.parametrize("objective", ["erm", "robust", "filtered"])
@pytest.mark.parametrize("data", DATA)
def test_gradients_equal_one_full_batch(tmp_path, data, objective, batch, accumulation):
    split = dict(per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation)
    found, trainer = trained(tmp_path, data, **split, **OBJECTIVES[objective])
    expected = reference_gradients(language_model().train(), DATA[data][2], trainer.args)
    assert relative_error(found, expected) <= 1e-5


@pytest.mark.parametrize("checkpointed", [False, True])
def test_an_adapter_by_peft_config(tmp_path, checkpointed):
    lora = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], target_parameters=["mlp.experts.down_proj"], init_lora_weights=False
    )
    seen = Gradients()
    trainer = trainer_of(
        tmp_path, seen=seen, peft_config=lora, objective="robust", activation_checkpointing=checkpointed
    )
    twin = get_peft_model(language_model(), lora)
    twin.load_state_dict(trainer.model.state_dict())
    trainer.train()
    expected = reference_gradients(twin.train(), DATA["completion"][2], trainer.args)
    assert expected and all("lora" in name for name in expected)
    assert relative_error(seen.found, expected) <= 1e-5


def test_what_trains_is_chosen_once(tmp_path):
    _, trainer = trained(tmp_path, train="lora", objective="robust")
    assert all("lora" in name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad)
    with pytest.raises(ValueError, match="both choose what trains"):
        trainer_of(tmp_path, train="routers", peft_config=LoraConfig(target_modules=["q_proj"]))


FIGURES = ("entropy", "mean_token_accuracy", "num_tokens")


@pytest.mark.parametrize("data", ["text", "completion"])
@pytest.mark.parametrize("changes", [{}, {"normalizer": "streaming"}, {"objective": "erm"}])
def test_figures_are_those_of_the_stock_trainer(tmp_path, data, changes):
    """Each token counts once, though two passes look at it; nothing is learned, so both see the same model."""
    still = dict(learning_rate=0.0, max_steps=3, num_train_epochs=3)
    stock, ours = (
        trainer_of(tmp_path, data, kind=kind, **still, **(changes if kind is MoECalSFTTrainer else {}))
        for kind in (SFTTrainer, MoECalSFTTrainer)
    )
    logs = []
    for trainer in (stock, ours):
        trainer.train()
        logs.append([{name: log[name] for name in FIGURES} for log in trainer.state.log_history if "loss" in log])
    assert len(logs[0]) == 3 and logs[0][2]["num_tokens"] == 3 * logs[0][0]["num_tokens"] > 0
    for expected, found in zip(*logs, strict=True):
        assert found == pytest.approx(expected, rel=1e-5)


def test_forward_passes_are_those_of_the_objective(tmp_path, monkeypatch):
    """SFTTrainer's own loss would run the model once more for each micro-batch."""
    calls = []
    model = language_model()
    model.model.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    trainer_of(tmp_path, model=model, objective="robust", activation_checkpointing=False).train()
    assert sorted(calls) == [False] * 3 + [True] * 4


def test_large_vocabularies_go_chunk_by_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_moecal.model.head.CHUNK_ELEMENTS", 2 * VOCABULARY)
    test_gradients_equal_one_full_batch(tmp_path, "text", "filtered", 2, 4)
    test_figures_are_those_of_the_stock_trainer(tmp_path, "text", {})


def test_evaluation_per_group(tmp_path):
    rows, _, judged = DATA["completion"]
    sets = {"law": Dataset.from_list(rows[:5]), "medicine": Dataset.from_list(rows[5:])}
    trainer = trainer_of(tmp_path, eval_dataset=sets, objective="robust", per_device_eval_batch_size=2)
    found = trainer.evaluate()
    model = language_model().eval()
    confidence, correct, losses = [], [], []
    for row in judged[5:]:
        logits = model(input_ids=row["input_ids"][None]).logits[0, :-1]
        keep = row["labels"][1:] != -100
        probs, labels = logits[keep].softmax(-1), row["labels"][1:][keep]
        confidence.append(probs.max(-1).values)
        correct.append((probs.argmax(-1) == labels).float())
        losses.append(F.cross_entropy(logits[keep], labels, reduction="none"))
    tokens = torch.cat(losses)
    assert found["eval_medicine_loss"] == pytest.approx(
        torch.stack([one.mean() for one in losses]).mean().item(), rel=1e-5
    )
    assert found["eval_medicine_nll"] == pytest.approx(tokens.mean().item(), rel=1e-5)
    assert (found["eval_medicine_n"], found["eval_medicine_sequence_n"]) == (len(tokens), 3)
    gaps = [(c.mean() - a.mean()).item() for c, a in zip(confidence, correct, strict=True)]
    assert found["eval_medicine_sequence_signed_gap"] == pytest.approx(sum(gaps) / 3, abs=1e-6)
    bins = [int(c.mean() * 15) for c in confidence]
    ece = sum(abs(sum(g for g, b in zip(gaps, bins, strict=True) if b == one)) for one in set(bins)) / 3
    assert found["eval_medicine_sequence_ece"] == pytest.approx(ece, abs=1e-6)
    assert "eval_law_ece" in found
    fresh = trainer.evaluate(Dataset.from_list(rows[5:]))  # text that the trainer has not seen before
    assert fresh["eval_nll"] == pytest.approx(found["eval_medicine_nll"], rel=1e-5)
    logged = [log for log in trainer.state.log_history if "eval_entropy" in log]
    assert logged[-1]["eval_mean_token_accuracy"] == pytest.approx(found["eval_medicine_accuracy"], abs=1e-6)


def test_label_smoothing(tmp_path):
    found, _ = trained(tmp_path, objective="label_smoothing")
    model = language_model()
    losses = []
    for row in DATA["completion"][2]:
        keep = row["labels"][1:] != -100
        logits = model(input_ids=row["input_ids"][None]).logits[0, :-1][keep]
        losses.append(F.cross_entropy(logits, row["labels"][1:][keep], label_smoothing=0.1))
    torch.stack(losses).mean().backward()
    assert relative_error(found, {name: p.grad for name, p in model.named_parameters()}) <= 1e-5


def test_the_balancing_loss_counts_once_and_not_in_the_models_forward(tmp_path):
    in_order = dict(train_sampling_strategy="sequential")  # a micro-batch is balanced by itself
    found, trainer = trained(tmp_path, objective="erm", router_aux_loss_coef=0.1, **in_order)
    assert not trainer.model.config.output_router_logits
    model, rows = language_model(output_router_logits=True, router_aux_loss_coef=0.1), DATA["completion"][2]
    loss = losses_one_by_one(model, rows, per_token=False).mean()
    for batch in trainer.get_train_dataloader():
        loss = loss + 0.1 / 4 * model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).aux_loss
    loss.backward()
    assert trainer.state.log_history[0]["router_aux_loss"] > 1
    assert relative_error(found, {name: p.grad for name, p in model.named_parameters()}) <= 1e-5


def test_one_config_from_the_command_line_and_from_yaml(tmp_path):
    parser = HfArgumentParser(MoECalSFTConfig)
    line = ["--output_dir", "out", "--eta", "1.5", "--max_length", "64", "--completion_only_loss", "true"]
    (args,) = parser.parse_args_into_dataclasses([*line, "--use_cpu", "--report_to", "none"])
    assert (args.eta, args.max_length, args.completion_only_loss, args.task) == (1.5, 64, True, "lm")
    file = {"output_dir": "out", "objective": "robust", "example": "token", "assistant_only_loss": True}
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(file | {"use_cpu": True, "report_to": "none"}))
    (args,) = parser.parse_yaml_file(str(tmp_path / "sft.yaml"))
    assert (args.objective, args.example, args.assistant_only_loss) == ("robust", "token", True)
    defaults = {field.name: field.default for field in dataclasses.fields(SFTConfig)}
    names = ("learning_rate", "logging_steps", "max_length")
    assert [getattr(args, name) for name in names] == [defaults[name] for name in names]
    assert args.activation_checkpointing and args.bf16 and isinstance(args, MoECalArguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss_type": "dft"}, "set loss_type='nll'"),
        ({"loss_type": "chunked_nll"}, "set loss_type='nll'"),
        ({"activation_offloading": True}, "not supported"),
        ({"task": "choice"}, "stays 'lm'"),
        ({"eta": -1.0}, "`eta` must be"),
    ],
)
def test_what_cannot_be_combined(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **changes)


PACKED = {
    "packing": dict(packing=True, max_length=16, per_device_train_batch_size=1, gradient_accumulation_steps=4),
    "padding_free": dict(padding_free=True, max_length=None),
}


@pytest.mark.filterwarnings("ignore:.*(Padding-free|Packing|packing|attention implementation)")
@pytest.mark.parametrize("objective", ["robust", "filtered"])
@pytest.mark.parametrize("how", PACKED)
def test_packed_answers_stay_examples_of_their_own(tmp_path, how, objective):
    """In training against the loop over single answers, in evaluation against rows of their own."""
    rows, _, judged = DATA["completion"]
    settings = {**PACKED[how], **OBJECTIVES[objective]}
    sets = Dataset.from_list(rows[:7])
    found, trainer = trained(tmp_path, eval_dataset=sets, per_device_eval_batch_size=3, **settings)
    assert "position_ids" in next(iter(trainer.get_train_dataloader()))
    expected = reference_gradients(language_model().train(), judged, trainer.args)
    assert relative_error(found, expected) <= 1e-5
    one = trainer_of(tmp_path, eval_dataset=sets, objective="robust", learning_rate=0.0, model=trainer.model)
    whole, apart = trainer.evaluate(), one.evaluate()
    for name in ("loss", "nll", "ece", "n", "sequence_nll", "sequence_ece", "sequence_n"):
        assert whole[f"eval_{name}"] == pytest.approx(apart[f"eval_{name}"], rel=1e-5), name


@pytest.mark.parametrize("preset", ["last_moe_layer", "routers", "lora"])
def test_a_folder_with_any_preset(tmp_path, preset):
    language_model().save_pretrained(tmp_path / "model")
    settings = dict(objective="robust", train=preset, learning_rate=0.0)
    found, trainer = trained(tmp_path, model=str(tmp_path / "model"), **settings)
    expected, _ = trained(tmp_path, model=language_model(), **settings)
    assert found.keys() == expected.keys() and found
    if preset != "lora":  # whose start is random
        assert relative_error(found, expected) <= 1e-5


def test_another_config_is_refused(tmp_path):
    with pytest.raises(ValueError, match="MoECalSFTConfig, got SFTConfig"):
        MoECalSFTTrainer(model=language_model(), args=config(tmp_path, SFTConfig))
    with pytest.raises(ValueError, match="images"):
        rows = [{"image": 0, "text": "w1 w2"}]
        trainer = Dataset.from_list(rows)
        MoECalSFTTrainer(
            model=language_model(), args=config(tmp_path), processing_class=tokenizer(), train_dataset=trainer
        )


def test_without_trl(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.delitem(sys.modules, "hf_moecal.training.sft")
    with pytest.raises(ImportError, match=r"pip install 'hf_moecal\[trl\]'"):
        import hf_moecal.training.sft  # noqa: F401


def test_two_steps_resume_bit_for_bit(tmp_path):
    settings = dict(objective="robust", max_steps=4, num_train_epochs=4, save_strategy="steps", save_steps=2)
    _, whole = trained(tmp_path, model=language_model(attention_dropout=0.2), **settings)
    resumed = trainer_of(tmp_path, model=language_model(attention_dropout=0.2), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for (name, one), other in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.slow
def test_two_processes_equal_one_full_batch(tmp_path):
    cases = ["robust", "filtered"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d"]
    command += ["--rdzv_endpoint", "127.0.0.1:0", str(HERE / "sft_worker.py"), str(tmp_path), json.dumps(cases)]
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for objective in cases:
        found = torch.load(tmp_path / f"{objective}.pt")
        args = config(tmp_path, **OBJECTIVES[objective])
        expected = reference_gradients(language_model().train(), DATA["completion"][2], args)
        gradients = {name.removeprefix("module."): gradient for name, gradient in found["gradients"].items()}
        assert relative_error(gradients, expected) <= 1e-5
        assert found["num_tokens"] == sum(len(row["input_ids"]) for row in DATA["completion"][2])


@pytest.mark.parametrize("readout", ["native", "soft_mixture"])
def test_members_run_their_own_forward(tmp_path, readout):
    """SFTTrainer gives the model a forward that calls the model itself; a copy of it would too."""
    changes = dict(method="recommended", readout=readout, readout_members=3, max_steps=2)
    trainer = trainer_of(tmp_path, **changes)
    trainer.train()
    plain = language_model()
    before = dict(plain.named_parameters())
    for name, parameter in trainer.model.named_parameters():
        if "experts" in name and "layers.1" in name and "members" not in name:
            assert not torch.equal(parameter, before[name])
    moved = [key for key, member in trainer.model.moecal_members.named_parameters() if "experts" in key]
    assert len(moved) == 4  # two more members, two matrices each
