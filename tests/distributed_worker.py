"""One process of the distributed tests: trains a step for each case and leaves rank 0's gradients in a file."""

import json
import sys
from pathlib import Path

import torch
from test_trainer import OBJECTIVES, TASKS, arguments, trained_gradients


def main(folder: Path, cases: list) -> None:
    for number, (task, objective, batch, accumulation, count) in enumerate(cases):
        build, data, settings = TASKS[task]
        args = arguments(
            folder,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            **settings,
            **OBJECTIVES[objective],
        )
        found, trainer = trained_gradients(build(), data(count), args)
        if trainer.accelerator.is_main_process:
            logged = {name: value for name, value in trainer.state.log_history[0].items() if name != "epoch"}
            assert trainer.accelerator.num_processes == 2
            torch.save({"gradients": found, "log": logged}, folder / f"{number}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
