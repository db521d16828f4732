"""One process of the distributed tests: trains a step for each case and leaves what it saw in files.

`python -m torch.distributed.run ... distributed_worker.py KIND FOLDER CASES`; rank 0 writes `FOLDER/<number>.pt`.
"""

import json
import sys
from pathlib import Path

import torch
from torch.utils.data import SequentialSampler

from hf_moecal import ChoiceCollator, MoECalTrainer
from tests.model.helpers import randomise_adapter
from tests.tasks.helpers import examples
from tests.training.helpers import TASKS, Gradients, arguments, collate


SHARDED = dict(fsdp=True, fsdp_config={"version": 2, "transformer_layer_cls_to_wrap": ["MixtralDecoderLayer"]})


def shard_on_cpu() -> None:
    """Makes accelerate take FSDP2 on the CPU, which it otherwise leaves at DDP without a word."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    torch.distributed.init_process_group("gloo")
    PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))


class Witness(MoECalTrainer):
    """Takes the rows in order; keeps every micro-batch that runs with gradient, and the losses of all."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.batches, self.replayed = [], []

    def _get_train_sampler(self, *args):
        return SequentialSampler(self.train_dataset)

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.batches.append({"inputs": dict(inputs), "random": torch.get_rng_state()})
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _objective_loss(self, *args, **kwargs):
        loss = super()._objective_loss(*args, **kwargs)
        measured = self._optimizer_batch.measured[self._measuring]
        self.replayed.append(
            (self._measuring, torch.is_grad_enabled(), [column.flatten().tolist() for column in measured])
        )
        return loss


class WholeGradients(Gradients):
    """The gradients as the optimizer sees them, put together where they are sharded."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        super().on_pre_optimizer_step(args, state, control, model=model, **kwargs)
        self.sharded = {n for n, g in self.found.items() if hasattr(g, "full_tensor")}
        self.found = {n: g.full_tensor() if n in self.sharded else g for n, g in self.found.items()}


def run(kind: str, folder: Path, case: dict) -> dict:
    task = case["task"]
    choice = task == "choice"
    build, data, settings = (TASKS["sequence"][0], examples, dict(task="choice")) if choice else TASKS[task]
    rows = data(case["count"])
    for index in case.get("unlabelled", ()):
        rows[index]["labels"] = -100
    args = arguments(folder, **{**settings, **(SHARDED if kind == "fsdp2" else {}), **case["settings"]})
    seen = WholeGradients()
    torch.manual_seed(torch.distributed.get_rank() if torch.distributed.is_initialized() else 0)
    trainer = Witness(
        model=build(**case.get("model", {})), args=args, train_dataset=rows, callbacks=[seen],
        data_collator=ChoiceCollator(scoring="per_token") if choice else collate,
    )  # fmt: skip
    start = None
    if args.train == "lora":
        randomise_adapter(trainer.model)
        start = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.train()
    logs = [{k: v for k, v in log.items() if k != "epoch"} for log in trainer.state.log_history]
    own = {"batches": trainer.batches, "replayed": trainer.replayed}
    everyone = [own]
    if torch.distributed.is_initialized():
        everyone = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, own)
    return {
        "gradients": {name.removeprefix("module."): gradient for name, gradient in seen.found.items()},
        "sharded": seen.sharded, "log": logs[0], "start": start, "ranks": everyone, "normalizes": trainer.normalizes,
        "kind": str(trainer.accelerator.distributed_type), "processes": trainer.accelerator.num_processes,
    }  # fmt: skip


def main(kind: str, folder: Path, cases: list) -> None:
    if kind == "fsdp2":
        shard_on_cpu()
    for number, case in enumerate(cases):
        try:
            found = run(kind, folder, case)
        except Exception as error:
            if not (case.get("refused") and isinstance(error, ValueError)):
                error.add_note(f"in case {number}: {case}")
                raise
            found = {"refused": str(error)}
        if torch.distributed.get_rank() == 0:
            torch.save(found, folder / f"{number}.pt")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), json.loads(Path(sys.argv[3]).read_text()))
