"""One run of the benchmark: a start, a method, a seed; what comes out is a predictions table."""

from __future__ import annotations

import tempfile
from contextlib import nullcontext

import torch
from benchmark.data import Sets, tokenizer
from benchmark.model import parameter_groups
from benchmark.settings import Budget, Method
from datasets import Dataset, concatenate_datasets
from torch import Tensor
from transformers import PreTrainedModel

from hf_moecal import MoECalArguments, MoECalTrainer, hard_routing, predict
from hf_moecal.model.prefix_cache import PrefixCache


def state(model: PreTrainedModel) -> dict[str, Tensor]:
    """Copies of what trains."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def restore(model: PreTrainedModel, start: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.copy_(start[name])


def train(
    model: PreTrainedModel, sets: Sets, method: Method, readout: str, budget: Budget, *, cache: str, seed: int
) -> None:
    """Trains the last layer with the method, in place."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = MoECalArguments(
            folder,
            readout=readout,
            train="last_moe_layer",
            prefix_cache=cache,
            per_device_train_batch_size=budget.batch,
            num_train_epochs=budget.epochs,
            learning_rate=budget.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=10,
            max_grad_norm=1.0,
            router_aux_loss_coef=0.0,
            seed=seed,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
            **method.arguments,
        )
        optimizer = torch.optim.AdamW(parameter_groups(model, budget.learning_rate), fused=True)
        trainer = MoECalTrainer(
            model=model,
            args=arguments,
            train_dataset=sets.train,
            processing_class=tokenizer(),
            optimizers=(optimizer, None),
        )
        trainer.train()


def predictions(
    model: PreTrainedModel, sets: Sets, readout: str, *, cache: str, hard_top_k: int | None = None
) -> Dataset:
    """The predictions table on the sources' validation and test rows and on the unseen sets; `group` names the set."""
    model.eval()
    judged = {"validation": sets.validation, "in-domain": sets.test, **sets.unseen}
    routed = nullcontext() if hard_top_k is None else hard_routing(model, top_k=hard_top_k)
    with routed, PrefixCache(model, cache) as prefix:
        tables = [
            predict(model, rows, group=name, readout=readout, prefix=prefix, batch_size=256, progress=False)
            for name, rows in judged.items()
        ]
    return concatenate_datasets(tables)
