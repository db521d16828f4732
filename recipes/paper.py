"""The small setting of arXiv:2606.20544 on scikit-learn's digits: four linear experts, mixed by probability.

    python recipes/paper.py --output recipes/results/paper.json        # under two minutes on one core

A shared backbone, four linear experts, a soft router, p = sum_k r_k p_k; eta = 2 after an ERM warm-up of 40 % of the
steps, batches of 128, tau_r = 1e-6, tau_d = 0.01, ECE over 15 equal-width right-closed bins. A quarter of the training
rows are hard: a noisy image with a random label in two of five cases, half an image, or two digits in one with the
label of either. Of the shifted test set three quarters are hard: the mix changes, P(label | image) does not.
Nothing is chosen on test data; temperatures are fitted on validation data like the training data.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import stats
from sklearn.datasets import load_digits
from torch import Tensor, nn

from hf_moecal.calibration import PerExpertTemperatureCalibrator, TemperatureCalibrator
from hf_moecal.metrics import calibration_report
from hf_moecal.objectives import erm, example_losses, robust, robust_filtered, routing_relevance
from hf_moecal.readouts.mixture import Mixed, log_mixture, mixed_agreement


ETA, WARM_UP, BATCH, STEPS, EXPERTS, CLASSES = 2.0, 0.4, 128, 800, 4, 10
HARD_SHARE = {"train": 0.25, "validation": 0.25, "test": 0.25, "shifted": 0.75}
ROWS = {"train": 5000, "validation": 1000, "test": 3000, "shifted": 3000}
SPLITS = {"train": (0, 900), "validation": (900, 1200), "test": (1200, 1797), "shifted": (1200, 1797)}
FIGURES = ("accuracy", "ece", "ece_debiased", "nll", "brier", "signed_gap")


class Method(NamedTuple):
    objective: str
    detach: bool = True


METHODS = {
    "ERM": Method("erm"),
    "label smoothing": Method("label_smoothing"),
    "focal": Method("focal"),
    "Robust, detached": Method("robust"),
    "Robust, through weights": Method("robust", detach=False),
    "Filtered, detached": Method("robust_filtered"),
    "Filtered, through weights": Method("robust_filtered", detach=False),
}
POSTHOC = {"temperature": TemperatureCalibrator, "per-expert temperature": PerExpertTemperatureCalibrator}


# ---------------------------------------------------------------- data


class Rows(NamedTuple):
    """Images `[n, 64]` in [0, 1], labels `[n]`, and which rows are hard `[n]`."""

    images: Tensor
    labels: Tensor
    hard: Tensor


def make_sets(seed: int, *, train_rows: int = ROWS["train"]) -> dict[str, Rows]:
    """Training, validation, test and shifted rows; no image of one split is part of another (but the tests share)."""
    images, labels = load_digits(return_X_y=True)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(images))
    images, labels = images[order] / 16, labels[order]
    sets = {}
    for name, count in {**ROWS, "train": train_rows}.items():
        part = slice(*SPLITS[name])
        sets[name] = _draw(images[part], labels[part], count, hard_share=HARD_SHARE[name], rng=rng)
    return sets


def _draw(images: np.ndarray, labels: np.ndarray, n: int, *, hard_share: float, rng: np.random.Generator) -> Rows:
    """Rows drawn with replacement; a hard one is spoiled in one of three ways that can be seen."""
    (chosen, other), hard = rng.integers(0, len(images), (2, n)), rng.random(n) < hard_share
    kind = np.where(hard, rng.integers(0, 3, n), -1)
    noisy, cut, both = (kind == k for k in range(3))
    x, y = images[chosen], labels[chosen]
    y = np.where(noisy & (rng.random(n) < 0.4), rng.integers(0, CLASSES, n), y)
    x = np.where(noisy[:, None], np.clip(x + rng.normal(0, 0.3, x.shape), 0, 1), x)
    half = (np.arange(64) % 8 < 4) == (rng.random(n) < 0.5)[:, None]
    x = np.where(cut[:, None] & half, 0.0, x)
    x = np.where(both[:, None], (x + images[other]) / 2, x)
    y = np.where(both & (rng.random(n) < 0.5), labels[other], y)
    return Rows(torch.tensor(x, dtype=torch.float32), torch.tensor(y), torch.tensor(hard))


# ---------------------------------------------------------------- model and training


class SmallMoE(nn.Module):
    """A shared layer, linear experts on it, and a router that mixes their probabilities."""

    def __init__(self, width: int = 64):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(64, width), nn.ReLU())
        self.experts = nn.Linear(width, EXPERTS * CLASSES)
        self.router = nn.Linear(width, EXPERTS)

    def forward(self, images: Tensor) -> Mixed:
        hidden = self.backbone(images)
        alone = self.experts(hidden).unflatten(-1, (EXPERTS, CLASSES)).log_softmax(-1)
        shares = self.router(hidden).softmax(-1)
        everyone = torch.arange(EXPERTS).expand(len(images), -1)
        return Mixed(log_mixture(alone, shares), alone, shares, everyone)


def objective(method: Method, mixed: Mixed, labels: Tensor, *, eta: float) -> Tensor:
    """The objective over one batch, from the package's losses, filter and tilt; `eta` of 0 is the warm-up."""
    losses = example_losses(mixed.log_probs, labels, objective=method.objective)
    if eta == 0 or method.objective not in ("robust", "robust_filtered"):
        return erm(losses)
    if method.objective == "robust":
        return robust(losses, eta=eta, detach_weights=method.detach)
    disagreement, regret = mixed_agreement(mixed, labels)
    return robust_filtered(losses, routing_relevance(regret, disagreement), eta=eta, detach_weights=method.detach)


def batches(rows: Rows, seed: int, steps: int) -> Iterator[tuple[float, Tensor, Tensor]]:
    """eta, images and labels of each step."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        chosen = torch.randperm(len(rows.labels), generator=generator)[:BATCH]
        yield (0.0 if step < WARM_UP * steps else ETA), rows.images[chosen], rows.labels[chosen]


def train(method: Method, rows: Rows, seed: int, *, steps: int = STEPS) -> SmallMoE:
    torch.manual_seed(seed)
    model = SmallMoE()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for eta, images, labels in batches(rows, seed, steps):
        optimizer.zero_grad()
        objective(method, model(images), labels, eta=eta).backward()
        optimizer.step()
    return model


# ---------------------------------------------------------------- judging


@torch.no_grad()
def predictions(model: SmallMoE, rows: Rows) -> dict[str, np.ndarray]:
    """The predictions table of a set, with what the experts say."""
    mixed = model(rows.images)
    return {
        "label": rows.labels.numpy(),
        "hard": rows.hard.numpy(),
        "logits": mixed.log_probs.numpy(),
        "probs": mixed.log_probs.double().softmax(-1).numpy(),
        "expert_logits": mixed.expert_log_probs.numpy(),
        "expert_weights": mixed.shares.numpy(),
        "expert_ids": mixed.expert_ids.numpy(),
    }


def figures(table: dict[str, np.ndarray], keep: np.ndarray | slice) -> dict[str, float]:
    found = calibration_report(table["label"][keep], probs=table["probs"][keep], intervals=False, ranked=False)
    return {name: found[name] for name in FIGURES}


def judge(model: SmallMoE, sets: dict[str, Rows]) -> dict[str, dict[str, dict[str, float]]]:
    """Figures by post-hoc calibrator and set; the hard set is that of the shifted rows."""
    tables = {name: predictions(model, rows) for name, rows in sets.items()}
    found = {}
    for posthoc in ("none", *POSTHOC):
        calibrator = None if posthoc == "none" else POSTHOC[posthoc]().fit(tables["validation"])
        done = {name: tables[name] if calibrator is None else calibrator.apply(tables[name]) for name in SPLITS}
        found[posthoc] = {name: figures(done[name], slice(None)) for name in ("test", "shifted")}
        for name in ("test", "shifted"):
            found[posthoc][f"{name}, hard"] = figures(done[name], tables[name]["hard"])
    return found


# ---------------------------------------------------------------- over seeds


def run(seeds: int, train_rows: int, steps: int) -> list[dict[str, Any]]:
    """One row for each method, calibrator, seed and set."""
    rows = []
    for seed in range(seeds):
        sets = make_sets(seed, train_rows=train_rows)
        for name, method in METHODS.items():
            judged = judge(train(method, sets["train"], seed, steps=steps), sets)
            for posthoc, found in judged.items():
                rows += [
                    {"method": name, "posthoc": posthoc, "seed": seed, "set": where, **values}
                    for where, values in found.items()
                ]
    return rows


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half width of its 95 % t interval."""
    spread = stats.sem(values) if len(values) > 1 else math.nan
    return float(np.mean(values)), float(stats.t.ppf(0.975, max(len(values) - 1, 1)) * spread)


def column(rows: list[dict[str, Any]], method: str, posthoc: str, where: str, figure: str) -> list[float]:
    """A figure of one method and set, seed by seed."""
    wanted = {"method": method, "posthoc": posthoc, "set": where}
    return [row[figure] for row in rows if wanted.items() <= row.items()]


def against(rows: list[dict[str, Any]], method: str, posthoc: str, other: tuple[str, str], figure: str) -> str:
    """Ratio of a figure on the hard shifted rows to that of another method, paired by seed: `mean [low, high]`."""
    ours = column(rows, method, posthoc, "shifted, hard", figure)
    theirs = column(rows, *other, "shifted, hard", figure)
    mean, half = interval([math.log(a / b) for a, b in zip(ours, theirs, strict=True)])
    return f"{math.exp(mean):.2f} [{math.exp(mean - half):.2f}, {math.exp(mean + half):.2f}]"


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: ECE and NLL of every method (mean and half of the 95 % interval), and the hard rows' ratios."""
    sets = ("test", "shifted", "shifted, hard")
    head = ["method", "accuracy, test", *(f"{kind}, {where}" for where in sets for kind in ("ECE", "NLL"))]
    head += ["hard ECE to ERM's", "to ERM + temperature's", "hard NLL to ERM + temperature's"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    shown = [
        (name, posthoc) for name in METHODS for posthoc in ("none", *POSTHOC) if posthoc == "none" or name == "ERM"
    ]
    shown += [(name, "temperature") for name in METHODS if name != "ERM"]
    for name, posthoc in shown:
        cells = [name if posthoc == "none" else f"{name} + {posthoc}"]
        for where, figure in [("test", "accuracy"), *((where, kind) for where in sets for kind in ("ece", "nll"))]:
            mean, half = interval(column(rows, name, posthoc, where, figure))
            cells.append(f"{mean:.3f} ± {half:.3f}")
        cells.append(against(rows, name, posthoc, ("ERM", "none"), "ece"))
        cells += [against(rows, name, posthoc, ("ERM", "temperature"), figure) for figure in ("ece", "nll")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--train-rows", type=int, default=ROWS["train"])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    start = time.process_time()
    rows = run(options.seeds, options.train_rows, options.steps)
    print(table(rows))
    print(
        f"\n{options.seeds} seeds, {options.train_rows} training rows, {time.process_time() - start:.0f} CPU seconds"
    )
    if options.output:
        options.output.write_text(json.dumps({"train_rows": options.train_rows, "rows": rows}) + "\n")


if __name__ == "__main__":
    main()
