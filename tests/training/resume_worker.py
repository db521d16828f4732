"""Trains as the resume tests ask, and may be killed at it; by itself or under torchrun."""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from transformers import TrainerCallback, TrainerState

from hf_moecal import MoECalTrainer
from tests.model.helpers import randomise_adapter
from tests.training.helpers import checkpointing, classification_data, classification_model, collate


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class KillAfter(TrainerCallback):
    """Kills the first process once the checkpoint of a step is there."""

    def __init__(self, step: int):
        self.step = step

    def on_save(self, args, state, control, **kwargs):
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        if state.global_step == self.step and state.is_world_process_zero:
            kill()


def kill_while_writing(trainer: MoECalTrainer, what: str, step: int) -> None:
    """Kills the process that writes a file of the checkpoint of a step when half of it is on disk."""
    if what == "weights":
        save = trainer._save

        def cut_short(output_dir=None, state_dict=None):
            save(output_dir, state_dict)
            if trainer.state.global_step == step:
                path = next(Path(output_dir).glob("*.safetensors"))
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
                kill()

        trainer._save = cut_short
    else:
        write = TrainerState.save_to_json

        def cut_state(state, path):
            write(state, path)
            if state.global_step == step:
                Path(path).write_text(Path(path).read_text()[:100])
                kill()

        TrainerState.save_to_json = cut_state


def make_trainer(folder: Path, preset: str, *, seed: int = 0, **changes) -> MoECalTrainer:
    """Six steps with noise, a warm-up, a filter and a schedule; the checkpoints lie inside an epoch."""
    settings = dict(
        max_steps=6, num_train_epochs=6, objective="robust_filtered", tau_regret=0.1, learning_rate=0.02,
        robust_warmup_ratio=0.2, gradient_accumulation_steps=2, per_device_train_batch_size=2, train=preset,
        lr_scheduler_type="cosine",
    )  # fmt: skip
    model = classification_model(attention_dropout=0.2, router_jitter_noise=0.1)
    torch.manual_seed(0)
    trainer = MoECalTrainer(
        model=model, args=checkpointing(folder, **{**settings, **changes}), train_dataset=classification_data(18),
        data_collator=collate,
    )  # fmt: skip
    randomise_adapter(trainer.model)
    return trainer


def outcome(trainer: MoECalTrainer) -> dict:
    """What a trajectory leaves behind: the loss of each step and the final weights."""
    losses = [(log["loss"], log["grad_norm"]) for log in trainer.state.log_history if "loss" in log]
    return {"losses": losses, "weights": trainer.model.state_dict()}


def main(folder: Path, runs: list) -> None:
    for run in runs:
        trainer = make_trainer(folder / run["folder"], run["preset"])
        if run.get("kill") == "after":
            trainer.add_callback(KillAfter(run["step"]))
        elif run.get("kill"):
            kill_while_writing(trainer, run["kill"], run["step"])
        trainer.train(resume_from_checkpoint=run.get("resume"))
        if trainer.accelerator.is_main_process:
            torch.save(outcome(trainer), folder / f"{run['name']}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
