"""A dry run of a recipe: what trains, what each device needs, what a step costs. Nothing but the config is downloaded.

The model is built from its configuration on fake tensors, which have shapes and no content.

What the numbers leave out: buffers that exist only inside one operation, the expert probe's record of one layer,
memory that the allocator holds but does not use, CUDA's own (about 1 GiB) and evaluation. Leave a tenth or more of the
device free. AdamW is assumed, and micro-batches that are full and padded to `max_length`. Where weights loaded in
float32 run under autocast (mixed precision without sharding) activations are counted in float32, an upper bound.
`scripts/gpu_check.py` measures on a real device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..files import FILE_KINDS
from ..model.classifier import register_classifier
from ..model.freezing import set_trainable
from ..model.lora import add_lora
from ..probes import MoELayer, UnsupportedMoEError, find_moe_layers
from ..readouts.committee import attach_members
from ..training.methods import settle
from .plan_launch import Launch, read_launch
from .plan_memory import (
    GIB,
    Asked,
    Counts,
    Memory,
    activation_memory,
    asked_of_experts,
    count_parameters,
    logits_memory,
    state_memory,
    weights_of,
)
from .recipe import Recipe
from .runs import parse_arguments
from .sets import load_set


if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel
    from transformers import PreTrainedModel

    from ..training.arguments import MoECalArguments


_USUAL_OPTIONS = 4  # of a multiple-choice question whose set is not at hand


@dataclass(frozen=True)
class Batch:
    """One optimizer step: what the objective is taken over, and what it costs.

    Attributes:
        per_device, accumulation, devices (`int`): the batch and how it is split.
        sequences (`int`): sequences that the model reads for one example: the most options that a row has, where whole
            options are scored.
        examples (`int`): their product; the objective is a function of that many losses.
        extra_forwards (`int`): forwards without gradient that a robust step takes beyond those of plain training.
        steps, robust_steps (`int`, *optional*): steps in all, and those after the warm-up; `None` where the number of
            training rows is not known.
    """

    per_device: int
    accumulation: int
    devices: int
    extra_forwards: int
    steps: int | None
    robust_steps: int | None
    sequences: int = 1

    @property
    def examples(self) -> int:
        return self.per_device * self.accumulation * self.devices


@dataclass(frozen=True)
class Plan:
    """What [`make_plan`] found.

    Attributes:
        model (`str`): Hub id or folder.
        counts ([`~hf_moecal.cli.plan_memory.Counts`]): of one member: parameters in all, active per
            token, and those that train.
        method (`str`): its fields, and what of it cannot run and falls back.
        trains (`str`): one line that says what trains.
        layers (`list[MoELayer]`): the MoE layers.
        unsupported (`str`, *optional*): why the experts cannot be probed; such a model trains with every objective but
            `robust_filtered`.
        launch ([`~hf_moecal.cli.plan_launch.Launch`]): devices, sharding, precision.
        batch ([`Batch`]): the optimizer batch.
        memory ([`~hf_moecal.cli.plan_memory.Memory`]): bytes on the fullest device.
    """

    model: str
    counts: Counts
    method: str
    trains: str
    layers: list[MoELayer]
    unsupported: str | None
    launch: Launch
    batch: Batch
    memory: Memory
    asked: Asked | None = None

    def to_dict(self) -> dict[str, Any]:
        """The plan for `--json`; memory in bytes."""
        layers = [{"name": x.name, "num_experts": x.num_experts, "top_k": x.top_k} for x in self.layers]
        return {
            "model": self.model,
            "parameters": self.counts._asdict(),
            "method": self.method,
            "trains": self.trains,
            "moe_layers": layers,
            "unsupported": self.unsupported,
            "launch": asdict(self.launch),
            "batch": {**asdict(self.batch), "examples": self.batch.examples},
            "memory": {**asdict(self.memory), "total": self.memory.total},
            "asked": None if self.asked is None else asdict(self.asked),
        }

    def lines(self) -> list[str]:
        """The plan for people."""
        counts, batch, memory = self.counts, self.batch, asdict(self.memory)
        told = [
            ("model", f"{self.model}: {counts.total / 1e9:.2f} B parameters, {counts.active / 1e9:.2f} B per token"),
            ("method", self.method.removeprefix("method=")),
            ("trains", self.trains),
            ("experts", self._experts()),
            *([] if self.asked is None else [("judging", str(self.asked))]),
            ("devices", str(self.launch)),
            (
                "batch",
                f"{batch.per_device} x {batch.accumulation} accumulated x {batch.devices} devices = {batch.examples} "
                f"examples, over all of which the objective is taken{self._options()}",
            ),
            ("steps", _steps(batch)),
            ("memory", "GiB on the fullest device, an estimate"),
        ]
        shown = [f"{name:<10}{text}" for name, text in told]
        shown += [f"  {name:<14}{size / GIB:8.2f}" for name, size in memory.items()]
        return [*shown, f"  {'total':<14}{self.memory.total / GIB:8.2f}"]

    def _options(self) -> str:
        return f"; each of up to {self.batch.sequences} options" if self.batch.sequences > 1 else ""

    def _experts(self) -> str:
        if self.unsupported is not None:
            return f"not probed: {self.unsupported}"
        last = self.layers[-1]
        return (
            f"{len(self.layers)} MoE layers, the last with {last.num_experts} experts of which a token uses "
            f"{last.top_k}; they keep the contract of the probe, which certifies its path on the first batch"
        )


def make_plan(
    recipe: Recipe,
    *,
    overrides: Sequence[str] = (),
    launch: Launch | None = None,
    rows: int | None = None,
    judged: int | None = None,
) -> Plan:
    """Plans the training that a recipe asks for.

    Args:
        recipe ([`~hf_moecal.cli.recipe.Recipe`]): what to train on what; its data needs a `max_length`.
        overrides (`Sequence[str]`): command-line arguments that override fields of the recipe.
        launch ([`Launch`], *optional*): from [`read_launch`]; one process if unset.
        rows (`int`, *optional*): training rows, where the set is not a local file.
        judged (`int`, *optional*): positions of a sequence that have a label; all of a language model's if unset.

    Raises:
        ValueError: the recipe, a field or the configuration of the model is wrong, or the recipe has no `max_length`.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    launch = launch or Launch()
    args = parse_arguments(recipe, [*overrides, "--use_cpu", "True"])  # bf16 is refused where no GPU is at hand
    recipe = replace(recipe, arguments={**recipe.arguments, "task": args.task})
    if recipe.max_length is None:
        raise ValueError("The recipe has no `max_length` under `data:`, so the length of a batch is unknown; add it.")
    launch = _with_precision(launch, args)
    loaded = getattr(torch, recipe.dtype).itemsize
    computes = 2 if launch.precision != "no" and launch.sharding not in ("none", "ddp") else loaded
    sequences = _sequences(recipe, args)
    positions = args.per_device_train_batch_size * sequences * _judged(recipe, args, judged or recipe.max_length)
    cached = args.prefix_cache is not None  # then the judged tokens alone run through what trains
    with FakeTensorMode():
        model = _build(recipe, args)
        method = settle(args, model, sharded=launch.sharding not in ("none", "ddp"))
        if args.train == "lora":
            model = _adapted(model, args)
        trains = set_trainable(model, args.train)
        layers, unsupported = _moe_layers(model, args)
        counts = count_parameters(weights_of(model, layers, itemsize=loaded))
        if args.readout_members > 1:
            own = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
            attach_members(model, [dict(own)] * (args.readout_members - 1))
        weights = weights_of(model, layers, itemsize=loaded)
        activations = activation_memory(
            model,
            batch=positions if cached else args.per_device_train_batch_size * sequences,
            length=1 if cached else recipe.max_length,
            checkpointing=bool(args.gradient_checkpointing) or launch.checkpointing,
            itemsize=computes,
        )
        asked = asked_of_experts(model, layers, args, counts.active)
    states = state_memory(weights, launch)
    config = model.config.get_text_config()
    classes = model.config.num_labels if args.task == "classification" else config.vocab_size
    logits = logits_memory(positions, classes, itemsize=computes)
    return Plan(
        model=recipe.model,
        counts=counts,
        method=method,
        trains=trains,
        layers=layers,
        unsupported=unsupported,
        launch=launch,
        batch=replace(
            plan_batch(args, devices=launch.processes, rows=_rows(recipe) if rows is None else rows),
            sequences=sequences,
        ),
        memory=Memory(**{**asdict(states), "activations": activations, "logits": logits}),
        asked=asked,
    )


def _adapted(model: PreTrainedModel, args: MoECalArguments) -> PeftModel:
    """The model with its adapter. PEFT moves what it makes, which fake tensors refuse and tensors on meta allow."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with unset_fake_temporarily():
        _replace_parameters(model, device="meta")
        model = add_lora(model, r=args.lora_r, alpha=args.lora_alpha)
    _replace_parameters(model, device="cpu")
    return model


def _replace_parameters(model: nn.Module, *, device: str) -> None:
    made: dict[nn.Parameter, nn.Parameter] = {}  # tied ones stay tied
    for module in model.modules():
        for name, old in module.named_parameters(recurse=False):
            if old not in made:
                new = torch.empty(old.shape, dtype=old.dtype, device=device)
                made[old] = nn.Parameter(new, requires_grad=old.requires_grad)
            module.register_parameter(name, made[old])


def plan_batch(args: MoECalArguments, *, devices: int, rows: int | None) -> Batch:
    """The optimizer batch and its steps, as Trainer counts them."""
    accumulation, robust = args.gradient_accumulation_steps, args.is_robust and args.eta > 0
    steps = args.max_steps if args.max_steps > 0 else None
    if steps is None and rows is not None:
        batches = math.ceil(math.ceil(rows / args.per_device_train_batch_size) / devices)
        steps = math.ceil(args.num_train_epochs * max(1, math.ceil(batches / accumulation)))
    return Batch(
        per_device=args.per_device_train_batch_size,
        accumulation=accumulation,
        devices=devices,
        extra_forwards=accumulation - 1 if robust else 0,
        steps=steps,
        robust_steps=None if steps is None else sum(args.eta_at(step / steps) > 0 for step in range(steps)),
    )


def _steps(batch: Batch) -> str:
    extra = f"{batch.extra_forwards} forwards without gradient more than plain training"
    if batch.steps is None:
        return f"{extra} in each after the warm-up; how many steps is not known without the data: give --rows"
    if batch.robust_steps == 0:
        return f"{batch.steps:,}, none of them with extra forwards"
    return f"{batch.steps:,}, of which {batch.robust_steps:,} after the warm-up; each of these takes {extra}"


def _build(recipe: Recipe, args: MoECalArguments) -> PreTrainedModel:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    config = AutoConfig.from_pretrained(recipe.model)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # training needs the weights in full
    kind = AutoModelForCausalLM
    if args.task == "classification":
        register_classifier(config)
        kind = AutoModelForSequenceClassification
    if type(config) not in kind._model_mapping:
        raise ValueError(
            f"{config.model_type} has no {kind.__name__.removeprefix('AutoModelFor')} head in transformers; choose "
            "another `task` or model (recipes/families.md)."
        )
    return kind.from_config(config, dtype=torch.bfloat16).train()


def _moe_layers(model: PreTrainedModel, args: MoECalArguments) -> tuple[list[MoELayer], str | None]:
    try:
        return find_moe_layers(model), None
    except UnsupportedMoEError as reason:
        if args.objective == "robust_filtered":
            raise
        return [], str(reason)


def _with_precision(launch: Launch, args: MoECalArguments) -> Launch:
    own = "bf16" if args.bf16 else "fp16" if args.fp16 else launch.precision
    return Launch(**{**asdict(launch), "precision": own})


def _judged(recipe: Recipe, args: MoECalArguments, positions: int) -> int:
    words = args.task == "choice" and recipe.scoring == "label_word"
    return 1 if args.task == "classification" or words else positions


def _sequences(recipe: Recipe, args: MoECalArguments) -> int:
    """Sequences of one example: options that are scored whole, as many as a local file has, or as is usual."""
    if args.task != "choice" or recipe.scoring == "label_word":
        return 1
    options = (recipe.train or {}).get("options", recipe.options)
    if isinstance(options, list):
        return len(options)
    local = _local_train(recipe)
    return _USUAL_OPTIONS if local is None else max(map(len, local["options"]))


def _rows(recipe: Recipe) -> int | None:
    """Training rows of a local file."""
    local = _local_train(recipe)
    return None if local is None else len(local)


def _local_train(recipe: Recipe) -> Dataset | None:
    """The training set if it is a local file; one on the Hub is not downloaded."""
    from pathlib import Path

    from .recipe import expand

    spec = recipe.train or {}
    path = expand(spec.get("path", ""))
    local = Path(path).suffix in FILE_KINDS and Path(path).is_file()
    return load_set("train", spec, recipe) if local else None


__all__ = ["Batch", "Launch", "Plan", "make_plan", "plan_batch", "read_launch"]
