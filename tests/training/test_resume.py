"""Killed at any moment, training resumes from the last complete checkpoint as if nothing had happened."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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
