"""What the objective costs: CPU seconds per optimizer step, epochs with the frozen-prefix cache, peak memory.

    OMP_NUM_THREADS=1 python scripts/benchmark_training.py --output recipes/results/training_cost.json

`steps`: CPU time (the machine may be shared) of an optimizer step as a ratio to the plain Trainer on the same model,
data and batch. Short trainings take turns, each after one of the plain Trainer; the figure is the median of these
pairs' ratios. `cache`: the demo's model, an epoch after the first without against with the cache (needs
`python scripts/fetch_data.py`). `memory`: loss and gradients of a model with 128,000 words at 2 x 1,024 tokens, peak
resident memory above that of its body alone, each from a process of its own.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    MixtralForSequenceClassification,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_moecal import MoECalArguments, MoECalTrainer
from hf_moecal.model.freezing import set_trainable
from hf_moecal.model.lora import LORA_ALPHA, LORA_R, add_lora
from hf_moecal.training.losses import LossComputer


ROOT = Path(__file__).resolve().parents[1]
PARTS = ("steps", "cache", "memory")


class Row(NamedTuple):
    """A line of the table."""

    case: str
    found: float
    wanted: str
    met: bool
    more: dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--turns", type=int, default=7, help="turns that all methods take")
    parser.add_argument("--sentences", type=int, default=256, help="sentences of an epoch with and without the cache")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # one figure of `memory`, in a process of its own
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.measure:
        print(json.dumps(MEASURES[options.measure]()))
        return
    parts = {"steps": lambda: steps(options.turns), "cache": lambda: cache(options.sentences), "memory": memory}
    rows = []
    for name in options.only:
        for row in parts[name]():
            rows.append(row)
            verdict = "" if not row.wanted else "met" if row.met else "missed"
            print(f"{row.case:72s}{row.found:9.3g}   {row.wanted:9s} {verdict}", flush=True)
            if options.output:
                write(rows, options.output)


def write(rows: list[Row], path: Path) -> None:
    where = {"machine": platform.processor() or platform.machine(), "threads": 1, "torch": torch.__version__}
    where["transformers"] = transformers.__version__
    path.write_text(json.dumps({"where": where, "rows": [row._asdict() for row in rows]}, indent=1) + "\n")


# ---------------------------------------------------------------- optimizer steps


class Method(NamedTuple):
    """What is compared with the plain Trainer; `most` is the ratio that it should not exceed."""

    name: str
    most: float | None
    settings: dict[str, Any]


ROBUST, THROUGH, FILTERED = (
    {"objective": "robust"},
    {"objective": "robust", "detach_weights": False},
    {"objective": "robust_filtered"},
)
TWO_PASS, STREAMING = {"normalizer": "two_pass"}, {"normalizer": "streaming"}
GROUPS = {  # what trains, accumulation steps -> methods
    ("all", 1): [
        Method("erm", 1.03, {"objective": "erm"}),
        Method("robust", 1.03, ROBUST),
        Method("robust, through weights", 1.03, THROUGH),
        Method("robust_filtered", 1.03, FILTERED),
        Method("robust, router aux loss on", None, ROBUST | {"router_aux_loss_coef": 0.001}),
    ],
    ("all", 8): [
        Method("robust, two passes", 1.30, ROBUST | TWO_PASS),
        Method("robust, streaming", 1.05, ROBUST | STREAMING),
    ],
    ("lora", 8): [
        Method("robust, streaming", 1.05, ROBUST | STREAMING),
        Method("robust through weights, streaming", 1.05, THROUGH | STREAMING),
        Method("robust_filtered, streaming", 1.05, FILTERED | STREAMING),
        Method("robust_filtered, two passes", 1.30, FILTERED | TWO_PASS),
    ],
    ("last_moe_layer", 8): [
        Method("robust, streaming", 1.05, ROBUST | STREAMING),
        Method("robust through weights, streaming", 1.05, THROUGH | STREAMING),
        Method("robust_filtered, streaming", 1.05, FILTERED | STREAMING),
    ],
}
DATA = [
    {"input_ids": ids, "labels": int(ids[0]) % 2}
    for ids in torch.randint(3, 1000, (32, 64), generator=torch.Generator().manual_seed(0))
]


def steps(turns: int) -> Iterator[Row]:
    """Ratios of every method to the plain Trainer: median over the turns, with their range."""
    for (train, accumulation), methods in GROUPS.items():
        ratios: dict[str, list[float]] = {method.name: [] for method in methods}
        for _ in range(turns):
            for method in methods:
                plain = step_seconds(train, accumulation, None)
                ratios[method.name].append(step_seconds(train, accumulation, method.settings) / plain)
        for method in methods:
            each = sorted(ratios[method.name])
            found, most = statistics.median(each), method.most
            wanted = "" if most is None else f"<= {most:.2f}"
            case = f"step, train={train}, accumulation {accumulation}: {method.name}"
            met, more = most is None or found <= most, {"range": [each[0], each[-1]], "turns": turns}
            yield Row(case, found, wanted, met, more)


class Clock(TrainerCallback):
    """CPU seconds from the end of one optimizer step to that of the next, data loading included."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last: float | None = None

    def on_step_end(self, args, state, control, **kwargs):
        last, self._last = self._last, time.process_time()
        self.seconds += [] if last is None else [self._last - last]


def step_seconds(train: str, accumulation: int, settings: dict[str, Any] | None) -> float:
    """Median CPU seconds of the steps of one short training, the first not counted; plain without settings."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=1000, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, num_local_experts=4, num_experts_per_tok=2, num_labels=2, pad_token_id=0,
    )  # fmt: skip
    model, clock = MixtralForSequenceClassification(config), Clock()
    count = 1 + (8 if accumulation == 1 else 3)
    common = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": accumulation, "max_steps": count}
    gc.collect()
    with tempfile.TemporaryDirectory() as folder:
        if settings is None:
            prepared = add_lora(model, r=LORA_R, alpha=LORA_ALPHA) if train == "lora" else model
            set_trainable(prepared, train)
            trainer = Trainer(
                prepared, TrainingArguments(folder, **common, **QUIET), train_dataset=DATA, callbacks=[clock]
            )
        else:
            own = {"robust_warmup_ratio": 0.0, "router_aux_loss_coef": 0.0, "train": train, **settings}
            args = MoECalArguments(folder, **common, **QUIET, **own)
            trainer = MoECalTrainer(model=model, args=args, train_dataset=DATA, callbacks=[clock])
            trainer.accelerator.print = lambda *lines: None
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return statistics.median(clock.seconds)


QUIET = {
    "report_to": "none", "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True, "use_cpu": True,
    "dataloader_pin_memory": False,
}  # fmt: skip


# ---------------------------------------------------------------- the frozen prefix


class Epochs(TrainerCallback):
    """CPU seconds of each epoch, and the losses of its steps."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.losses: list[float] = []

    def on_epoch_begin(self, args, state, control, **kwargs):
        self._start = time.process_time()

    def on_epoch_end(self, args, state, control, **kwargs):
        self.seconds.append(time.process_time() - self._start)

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.losses += [logs["mean_loss"]] if "mean_loss" in logs else []


def cache(sentences: int) -> list[Row]:
    """The demo's training on some of its sentences, with and without the cache."""
    from demo import upcycle

    from hf_moecal.cli.recipe import load_recipe

    recipe = load_recipe(ROOT / "recipes" / "quickstart.yaml")
    upcycle(recipe)
    with tempfile.TemporaryDirectory() as folder:
        without, cached = (two_epochs(recipe, sentences, states) for states in (None, folder))
    ratio = without.seconds[1] / cached.seconds[1]
    gap = max(abs(a - b) for a, b in zip(without.losses, cached.losses, strict=True))
    more = {"sentences": sentences, "epoch_without": without.seconds, "epoch_with": cached.seconds}
    return [
        Row("cache: an epoch after the first, without / with", ratio, ">= 8", ratio >= 8, more),
        Row("cache: largest difference of a step's mean loss", gap, "<= 1e-5", gap <= 1e-5, {"losses": cached.losses}),
    ]


def two_epochs(recipe: Any, sentences: int, states: str | None) -> Epochs:
    from hf_moecal.cli.recipe import expand
    from hf_moecal.cli.runs import parse_arguments
    from hf_moecal.cli.sets import load_set
    from hf_moecal.model.loading import load_classifier

    model, tokenizer = load_classifier(expand(recipe.model), 2, seed=0)
    rows = load_set("train", recipe.train, recipe).select(range(sentences))
    data = rows.map(lambda row: tokenizer(row["text"], truncation=True, max_length=recipe.max_length))
    args, epochs = parse_arguments(recipe), Epochs()
    args.prefix_cache, args.num_train_epochs, args.logging_steps, args.disable_tqdm = states, 2, 1, True
    args.router_aux_loss_coef = 0.0  # which the cache cannot have
    trainer = MoECalTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer, callbacks=[epochs])
    trainer.train()
    return epochs


# ---------------------------------------------------------------- memory


LENGTH, BATCH, VOCABULARY = 1024, 2, 128_000


def language_model() -> MixtralForCausalLM:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, attn_implementation="sdpa",
    )  # fmt: skip
    return MixtralForCausalLM(config)


def batch(supervised: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, : LENGTH - supervised] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def peak() -> float:
    """MiB; `ru_maxrss` would begin with the peak of the process that started this one."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1)) / 1024


def body_alone() -> dict[str, Any]:
    """Peak MiB of a forward and backward pass without the output embedding, whose weights are there."""
    model, inputs = language_model().train(), batch(16)
    del inputs["labels"]
    model.model(**inputs, use_cache=False).last_hidden_state.square().mean().backward()
    return {"peak": peak()}


def ours(supervised: int) -> dict[str, Any]:
    """The same with the losses of the supervised positions; also the loss, and norms of gradients."""
    model = language_model().train()
    args = MoECalArguments("unused", objective="robust", task="lm", **QUIET)
    with LossComputer(model, args) as judge, judge.batch(batch(supervised)) as inputs:
        del inputs["labels"]  # as Trainer does
        judge.losses(model(**inputs, use_cache=False)).mean().backward()
    return {"peak": peak(), **figures(model)}


def whole(supervised: int) -> dict[str, Any]:
    """The same from whole logits."""
    model, inputs = language_model().train(), batch(supervised)
    labels = inputs.pop("labels")[:, 1:]
    logits = model(**inputs, use_cache=False).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    del logits
    (losses.sum(1) / (labels != -100).sum(1)).mean().backward()
    return {"peak": peak(), **figures(model)}


def figures(model: torch.nn.Module) -> dict[str, Any]:
    """A random projection of each gradient, from which any difference shows."""
    generator, found = torch.Generator().manual_seed(2), {}
    for name, parameter in model.named_parameters():
        direction = torch.randn(parameter.shape, generator=generator)
        found[name] = [float((parameter.grad * direction).sum()), float(parameter.grad.norm())]
    return {"gradients": found}


MEASURES = {"body": body_alone} | {
    f"{name}-{count}": lambda measure=measure, count=count: measure(count)
    for name, measure in {"ours": ours, "whole": whole}.items()
    for count in (16, 900)
}


def measured() -> dict[str, Any]:
    """Every measure, taken in a process of its own."""

    def measure(name: str) -> Any:
        done = subprocess.run([sys.executable, __file__, "--measure", name], check=True, stdout=subprocess.PIPE)
        return json.loads(done.stdout.splitlines()[-1])

    return {name: measure(name) for name in MEASURES}


def memory() -> list[Row]:
    found = measured()
    body, rows = found["body"]["peak"], []
    for count, most in ((16, 120), (900, 300)):
        mine, reference = found[f"ours-{count}"], found[f"whole-{count}"]
        above, error = mine["peak"] - body, 0.0
        for name, (projection, norm) in reference["gradients"].items():
            error = max(error, abs(mine["gradients"][name][0] - projection) / norm)
        more = {"body_mib": body, "whole_logits_mib": reference["peak"] - body}
        title = f"{count} supervised positions per sequence"
        rows.append(Row(f"memory above the body, MiB: {title}", above, f"<= {most}", above <= most, more))
        rows.append(Row(f"gradients against whole logits: {title}", error, "<= 1e-5", error <= 1e-5, {}))
    return rows


if __name__ == "__main__":
    main()
