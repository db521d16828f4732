"""Killed at any moment, training resumes from the last complete checkpoint as if nothing had happened."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_moecal import MoECalTrainer
from hf_moecal.model.lora import add_lora
from tests.training.helpers import checkpointing, classification_data, classification_model, collate
from tests.training.resume_worker import make_trainer, outcome


HERE = Path(__file__).parent
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for it


def launch(folder, *runs, processes=1):
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--rdzv_backend", "c10d"]
        command += ["--rdzv_endpoint", "127.0.0.1:0"]
    command += [str(HERE / "resume_worker.py"), str(folder), json.dumps(runs)]
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def assert_same(found, expected):
    assert len(expected["losses"]) == 6 and len({loss for loss, _ in expected["losses"]}) == 6
    assert found["losses"] == expected["losses"]
    assert found["weights"].keys() == expected["weights"].keys()
    for name, weight in expected["weights"].items():
        assert torch.equal(found["weights"][name], weight), name


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "kill", "left"), [
    ("all", "weights", 2), ("all", "after", 4), ("lora", "state", 2),
])  # fmt: skip
def test_killed_and_resumed_is_never_killed(tmp_path, preset, kill, left):
    """In one process; bit for bit, in the losses, the gradients' norms and the final weights."""
    whole = make_trainer(tmp_path / "whole", preset)
    whole.train()
    done = launch(tmp_path, dict(folder="killed", preset=preset, kill=kill, step=4, name="never"))
    assert done.returncode == -9 and not (tmp_path / "never.pt").exists(), done.stderr[-3000:]
    assert (tmp_path / "killed" / "checkpoint-4").is_dir()
    resumed = make_trainer(tmp_path / "killed", preset)
    seen = []
    training_step = resumed.training_step
    resumed.training_step = lambda *args: (seen.append(resumed.state.global_step), training_step(*args))[1]
    resumed.train(resume_from_checkpoint=True)
    assert seen[0] == left, "resumed from another checkpoint than the last complete one"
    assert_same(outcome(resumed), outcome(whole))


@pytest.mark.slow
def test_two_processes_killed_and_resumed(tmp_path):
    presets = {"all": "state", "lora": "after"}
    whole = launch(tmp_path, *(dict(folder=f"whole-{p}", preset=p, name=f"whole-{p}") for p in presets), processes=2)
    assert whole.returncode == 0, whole.stderr[-3000:]
    for preset, kill in presets.items():
        run = dict(folder=preset, preset=preset, kill=kill, step=4, name="never")
        assert launch(tmp_path, run, processes=2).returncode != 0
        assert (tmp_path / preset / "checkpoint-4").is_dir() and not (tmp_path / "never.pt").exists()
    runs = [dict(folder=preset, preset=preset, resume=True, name=preset) for preset in presets]
    resumed = launch(tmp_path, *runs, processes=2)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    for preset in presets:
        assert_same(torch.load(tmp_path / f"{preset}.pt"), torch.load(tmp_path / f"whole-{preset}.pt"))


def test_checkpoints_that_were_cut_short_are_named(tmp_path):
    trainer = make_trainer(tmp_path / "a", "all", max_steps=4)
    with pytest.raises(ValueError, match="holds no complete checkpoint to resume from; start anew"):
        trainer.train(resume_from_checkpoint=True)
    trainer.train()
    state = tmp_path / "a" / "checkpoint-4" / "trainer_state.json"
    state.write_text(state.read_text()[:50])
    with pytest.raises(ValueError, match=r"checkpoint-4' has no readable trainer_state.json.*resume from '.*point-2'"):
        trainer.train(resume_from_checkpoint=str(state.parent))


def test_the_best_adapter_is_exactly_that_of_the_best_checkpoint(tmp_path):
    rows = classification_data()
    args = checkpointing(
        tmp_path, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True, learning_rate=0.3, max_steps=6,
        num_train_epochs=6, metric_for_best_model="eval_tweets_ece", train="lora", lora_r=4, lora_alpha=8,
        lr_scheduler_type="constant_with_warmup", warmup_steps=6,  # the further, the worse
    )  # fmt: skip
    trainer = MoECalTrainer(
        model=classification_model(), args=args, train_dataset=rows, data_collator=collate,
        eval_dataset={"tweets": rows},
    )  # fmt: skip
    trainer.train()
    values = [log["eval_tweets_ece"] for log in trainer.state.log_history if "eval_tweets_ece" in log]
    assert trainer.state.best_metric == min(values) < values[-1], "the last checkpoint is the best: nothing is loaded"
    best = add_lora(classification_model(), r=4, alpha=8)
    best.load_adapter(trainer.state.best_model_checkpoint, "default", is_trainable=True)
    for (name, one), other in zip(trainer.model.state_dict().items(), best.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize(("first", "then", "message"), [
    (dict(readout_members=2), dict(readout_members=1), "with readout_members=2, this run has readout_members=1; "),
    (dict(readout_members=1), dict(readout_members=2), "with readout_members=1, this run has readout_members=2"),
    (dict(readout="soft_mixture"), dict(), "with readout='soft_mixture', this run has readout='native'"),
    (dict(train="last_moe_layer"), dict(train="routers"), "with train='last_moe_layer', this run has train='routers'"),
    (dict(), dict(gradient_accumulation_steps=4), r"of 4 rows \(2 a device x 2 steps x 1 proc.*this run has 8 rows"),
    (dict(), dict(per_device_train_batch_size=1), r"this run has 2 rows \(1 a device x 2 steps x 1 pro"),
    (dict(), dict(per_device_train_batch_size=1, gradient_accumulation_steps=4), None),
])  # fmt: skip
def test_a_run_that_differs_from_its_checkpoint_is_named(tmp_path, first, then, message):
    settings = dict(train="last_moe_layer", max_steps=2, save_steps=1, gradient_accumulation_steps=2)
    checkpoints = []
    for changes in (first, then):
        args = checkpointing(tmp_path, **{**settings, **changes})
        trainer = MoECalTrainer(
            model=classification_model(), args=args, train_dataset=classification_data(16), data_collator=collate
        )
        if message and checkpoints:
            with pytest.raises(ValueError, match=message):
                trainer.train(resume_from_checkpoint=True)
        else:
            trainer.train(resume_from_checkpoint=checkpoints[0] if checkpoints else None)
            checkpoints.append(str(tmp_path / "checkpoint-1"))


def test_a_head_in_another_precision_is_not_rounded(tmp_path):
    """Neither as training resumes, nor as the best model is loaded."""

    def build():
        model = classification_model().to(torch.bfloat16)
        model.score.float().register_forward_pre_hook(lambda module, args: (args[0].float(),))
        return model

    args = checkpointing(
        tmp_path, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True, metric_for_best_model="nll",
        learning_rate=0.3,
    )  # fmt: skip
    found = []
    for resume in (None, str(tmp_path / "checkpoint-2")):
        trainer = MoECalTrainer(
            model=build(), args=args, train_dataset=classification_data(), eval_dataset=classification_data(),
            data_collator=collate,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        found.append(trainer)
    (whole, resumed) = found
    assert_equal(whole.model, resumed.model)
    best = load_file(Path(whole.state.best_model_checkpoint) / "model.safetensors")
    assert torch.equal(best["score.weight"], whole.model.score.weight)
    assert not torch.equal(best["score.weight"], best["score.weight"].bfloat16().float()), "nothing to round"
    assert whole.model.model.norm.weight.dtype == torch.bfloat16


def assert_equal(one, other):
    for (name, tensor), twin in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(tensor, twin), name
