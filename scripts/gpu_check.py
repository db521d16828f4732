"""Exactness and cost of the Trainer on one accelerator: step time, memory, loss gap between the passes, probe cost.

    python scripts/gpu_check.py --output gpu_check.json            # a Mixtral of about 1B parameters, bf16
    python scripts/gpu_check.py --tiny --device cpu                # the same code on a toy, to see that it runs

Ratios are medians over optimizer steps of one run, against the plain Trainer on the same model, data and batch.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import MixtralConfig, MixtralForCausalLM, Trainer, TrainerCallback, TrainingArguments

from hf_moecal import MoECalArguments, MoECalTrainer, probe_experts


FULL = dict(
    vocab_size=32000, hidden_size=1024, intermediate_size=2048, num_hidden_layers=16, num_attention_heads=16,
    num_key_value_heads=4, num_local_experts=8, num_experts_per_tok=2, max_position_embeddings=2048,
)  # fmt: skip
TINY = dict(
    vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2, max_position_embeddings=2048,
)  # fmt: skip
WARM_UP = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--supervised", type=int, default=64, help="supervised tokens at the end of each sequence")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--accumulation", type=int, default=8)
    options = parser.parse_args()
    found = {"where": where(options), "exactness": exactness(options.device)}
    print(json.dumps(found, indent=1), flush=True)
    found["training"] = training(options)
    found["probe"] = probe_cost(options)
    text = json.dumps(found, indent=1)
    print(text)
    if options.output:
        options.output.write_text(text + "\n")


def where(options: argparse.Namespace) -> dict[str, Any]:
    cuda = options.device == "cuda"
    model = build(options)
    return {
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(model.dtype),
        "length": options.length,
        "supervised_per_sequence": options.supervised,
    }


def build(options: argparse.Namespace) -> MixtralForCausalLM:
    torch.manual_seed(0)
    config = MixtralConfig(**(TINY if options.tiny else FULL), use_cache=False)
    with torch.device(options.device):
        model = MixtralForCausalLM(config)
    if options.device == "cuda":
        model = model.to(torch.bfloat16)
        model.set_experts_implementation("grouped_mm")
    return model


def rows(count: int, length: int, vocabulary: int, supervised: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in range(count):
        ids = torch.randint(3, vocabulary, (length,), generator=generator)
        labels = ids.clone()
        labels[:-supervised] = -100
        made.append({"input_ids": ids, "labels": labels})
    return made


# ---------------------------------------------------------------- exactness, in float32


def exactness(device: str) -> dict[str, float]:
    """Relative error of the gradient after one optimizer step against one full-batch autograd reference."""
    errors = {}
    for name, settings in {
        "erm": {"objective": "erm"},
        "robust": {"objective": "robust"},
        "robust_through": {"objective": "robust", "detach_weights": False},
        "robust_streaming": {"objective": "robust", "normalizer": "streaming"},
        "robust_through_streaming": {"objective": "robust", "detach_weights": False, "normalizer": "streaming"},
    }.items():
        torch.manual_seed(0)
        model = MixtralForCausalLM(MixtralConfig(**TINY, initializer_range=0.1)).to(device)
        data = rows(16, 64, TINY["vocab_size"], 16)
        reference = full_batch_gradient(model, data, settings, device)
        model.zero_grad()
        seen = KeepGradients()
        with tempfile.TemporaryDirectory() as folder:
            args = arguments(
                folder, device, robust_warmup_ratio=0.0, max_steps=1, max_grad_norm=0.0, optim="sgd",
                per_device_train_batch_size=4, gradient_accumulation_steps=4, router_aux_loss_coef=0.0, **settings,
            )  # fmt: skip
            MoECalTrainer(model=model, args=args, train_dataset=data, callbacks=[seen]).train()
        off = sum(float((seen.found[n] - g).double().square().sum()) for n, g in reference.items())
        errors[name] = (off / sum(float(g.double().square().sum()) for g in reference.values())) ** 0.5
    return errors


def full_batch_gradient(model: Any, data: list, settings: dict, device: str) -> dict[str, torch.Tensor]:
    ids = torch.stack([row["input_ids"] for row in data]).to(device)
    labels = torch.stack([row["labels"] for row in data]).to(device)
    logits = model(input_ids=ids).logits[:, :-1]
    target = labels[:, 1:]
    token = torch.nn.functional.cross_entropy(logits.transpose(1, 2), target.clamp(min=0), reduction="none")
    kept = target != -100
    losses = (token * kept).sum(1) / kept.sum(1)
    if settings["objective"] == "erm":
        value = losses.mean()
    else:
        basis = losses if settings.get("detach_weights") is False else losses.detach()
        value = (torch.softmax(2.0 * basis, 0) * losses).sum()
    value.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


class KeepGradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


# ---------------------------------------------------------------- cost of training


class Clock(TrainerCallback):
    """Seconds of each optimizer step, the device's work included."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        synchronize()
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        synchronize()
        self.seconds.append(time.perf_counter() - self.start)


class Watched(MoECalTrainer):
    """Records how far the losses of the pass with gradient are from those that were weighed."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.gaps: list[float] = []

    def _objective_loss(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        index, window = self._measuring, self._optimizer_batch
        weighed = None if index is None else window.measured[index]
        loss = super()._objective_loss(outputs, labels, num_items_in_batch)
        if weighed is not None:
            self.gaps += (window.measured[index].losses - weighed.losses).abs().flatten().tolist()
        return loss


OBJECTIVES = [("plain", None), ("erm", None), ("robust", None), ("robust_filtered", None)]
ACCUMULATED = [
    *OBJECTIVES[:2],
    *((name, way) for name in ("robust", "robust_filtered") for way in ("two_pass", "streaming")),
]
"""Objectives, and over several accumulation steps how their weights are normalised."""


def training(options: argparse.Namespace) -> list[dict[str, Any]]:
    results = []
    for accumulation, methods in ((1, OBJECTIVES), (options.accumulation, ACCUMULATED)):
        plain = None
        for name, normalizer in methods:
            try:
                found = one_training(options, name, accumulation, normalizer)
            except torch.OutOfMemoryError:
                if normalizer != "streaming":  # which may hold the activations of all micro-batches
                    raise
                found = {"method": name, "accumulation": accumulation, "normalizer": normalizer, "out_of_memory": True}
            else:
                plain = plain or found
                found["time_ratio"] = found["median_s"] / plain["median_s"]
            results.append(found)
            print(json.dumps(found), flush=True)
    return results


def one_training(options: argparse.Namespace, name: str, accumulation: int, normalizer: str | None) -> dict[str, Any]:
    gc.collect()  # trainer and model of the last one refer to each other
    if options.device == "cuda":
        torch.cuda.empty_cache()
    model, clock = build(options), Clock()
    batch = 2 if options.tiny else 4
    data = rows(batch * accumulation * 2, options.length, model.config.vocab_size, options.supervised)
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        settings = dict(
            max_steps=options.steps, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation
        )
        if name == "plain":
            args, kind = arguments(folder, options.device, plain=True, **settings), Trainer
        else:
            # As in the plain Trainer, which adds the routers' balance loss only where the config asks for it.
            settings |= {"robust_warmup_ratio": 0.0, "router_aux_loss_coef": 0.0}
            settings |= {} if normalizer is None else {"normalizer": normalizer}
            args, kind = arguments(folder, options.device, objective=name, **settings), Watched
        trainer = kind(model=model, args=args, train_dataset=data, callbacks=[clock])
        trainer.train()
    gaps = getattr(trainer, "gaps", [])
    return {
        "method": name,
        "batch": batch,
        "accumulation": accumulation,
        "normalizer": normalizer,
        "median_s": statistics.median(clock.seconds[WARM_UP:]),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if options.device == "cuda" else None,
        "pass_gap_mean": statistics.fmean(gaps) if gaps else None,
        "pass_gap_max": max(gaps, default=None),
    }


def arguments(folder: str, device: str, *, plain: bool = False, **settings: Any) -> TrainingArguments:
    common = dict(
        learning_rate=1e-5, report_to="none", save_strategy="no", disable_tqdm=True, logging_strategy="no",
        use_cpu=device == "cpu", remove_unused_columns=False, dataloader_pin_memory=False,
    )  # fmt: skip
    if plain:
        return TrainingArguments(folder, **{**common, **settings})
    return MoECalArguments(folder, task="lm", **{**common, **settings})


# ---------------------------------------------------------------- cost of the probe


def probe_cost(options: argparse.Namespace) -> dict[str, float]:
    """Forward and backward with the probe, as a ratio to without, at the last and at all supervised tokens."""
    model = build(options).train()
    data = rows(4, options.length, model.config.vocab_size, options.supervised)
    batch = {key: torch.stack([row[key] for row in data]).to(options.device) for key in data[0]}
    ends = torch.arange(1, 5, device=options.device) * options.length - 2
    many = (batch["labels"].roll(-1, 1) != -100).reshape(-1).nonzero().squeeze(1)
    labels = batch["input_ids"].roll(-1, 1).reshape(-1)

    def step(tokens: torch.Tensor | None) -> float:
        synchronize()
        start = time.perf_counter()
        loss = model(**batch).loss
        if tokens is not None:
            with torch.no_grad():
                probe.disagreement(tokens)
                probe.regret(tokens, labels[tokens])
        loss.backward()
        model.zero_grad()
        synchronize()
        return time.perf_counter() - start

    plain = [step(None) for _ in range(12)][WARM_UP:]
    results = {"plain_s": statistics.median(plain)}
    with probe_experts(model) as probe:
        for name, tokens in {"hooks": None, "last_token": ends, "supervised_tokens": many}.items():
            seconds = [step(tokens) for _ in range(12)][WARM_UP:]
            results[f"{name}_ratio"] = statistics.median(seconds) / results["plain_s"]
        results["certificate_path"] = probe.certificate.path
        results["certificate_error"] = probe.certificate.error
    return results


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
