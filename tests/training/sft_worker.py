"""One process of the distributed test of supervised fine-tuning: a step for each objective, gradients in a file."""

import json
import sys
from pathlib import Path

import torch

from tests.training.helpers import OBJECTIVES, trained


def main(folder: Path, objectives: list[str]) -> None:
    for objective in objectives:
        found, trainer = trained(folder, gradient_accumulation_steps=2, **OBJECTIVES[objective])
        assert trainer.accelerator.num_processes == 2
        if trainer.accelerator.is_main_process:
            tokens = trainer.state.log_history[0]["num_tokens"]
            torch.save({"gradients": found, "num_tokens": tokens}, folder / f"{objective}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
