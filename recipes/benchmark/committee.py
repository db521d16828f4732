"""A committee trained at once, against one member and against runs apart; then distilled into one native model.

    python recipes/benchmark/committee.py --task reviews-out --seeds 0 1
    python recipes/benchmark/committee.py --method erm --members 4 --noise 0.3

Prints NLL and ECE in-domain and on the unseen set. Here the members train in one run and start from one specialised
model, apart by noise; the benchmark's committees are runs of different seeds.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets import Dataset


ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "recipes"), str(ROOT / "scripts")]

from benchmark import scoring  # noqa: E402
from benchmark.data import Sets, load_task  # noqa: E402
from benchmark.model import draw, specialise, upcycled  # noqa: E402
from benchmark.settings import FULL, METHODS, TASKS  # noqa: E402
from benchmark.training import predictions, train  # noqa: E402

from hf_moecal import distill  # noqa: E402
from hf_moecal.readouts import committee  # noqa: E402
from hf_moecal.readouts.committee import CONTAINER, add_members, drop_members  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=TASKS, default="reviews-out")
    parser.add_argument("--method", choices=METHODS, default="robust_filtered-eta-1")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--members", type=int, default=2)
    parser.add_argument("--noise", type=float, default=committee.SPREAD, help="on router and experts of a member")
    parser.add_argument("--states", default=str(ROOT / "runs" / "benchmark" / "states"), help="cache of frozen states")
    options = parser.parse_args()
    datasets.disable_progress_bars()
    committee.SPREAD = options.noise
    task, model = TASKS[options.task], upcycled(FULL)
    sets = load_task(task, FULL)
    for seed in options.seeds:
        for members in (1, options.members):
            start(model, task, sets, seed, members, options.states)
            method = METHODS[options.method]
            method = dataclasses.replace(method, arguments={**method.arguments, "readout_members": members})
            train(model, sets, method, "soft_mixture", FULL, cache=options.states, seed=seed)
            show(f"seed {seed}, members {members}", predictions(model, sets, "soft_mixture", cache=options.states))
        native = judged_native(model, sets, options.states)
        show(f"seed {seed}, its first member's native readout", native)
        unlabelled = sets.train.remove_columns("label")
        found = distill(
            model,
            unlabelled,
            learning_rate=3e-4,
            batch_size=FULL.batch,
            seed=seed,
            prefix_cache=options.states,
            progress=False,
        )
        print(f"seed {seed}: KL {found.divergence[0]:.4f} -> {found.divergence[1]:.4f} nats")
        show(f"seed {seed}, distilled", predictions(model, sets, "native", cache=options.states))


def start(model: Any, task: Any, sets: Sets, seed: int, members: int, states: str) -> None:
    """The model before a method trains it: specialists, and further members made of them."""
    drop_members(model)
    draw(model, experts=task.experts, neurons=FULL.neurons, num_labels=sets.num_labels, seed=seed)
    specialise(model, task, sets, FULL, cache=states, seed=seed)
    if members > 1:
        add_members(model, members, seed=seed)


def judged_native(model: Any, sets: Sets, states: str) -> Dataset:
    """What the first member alone predicts natively."""
    container = getattr(model, CONTAINER)
    drop_members(model)
    try:
        return predictions(model, sets, "native", cache=states)
    finally:
        model.add_module(CONTAINER, container)


def show(name: str, table: Dataset) -> None:
    rows = scoring.score(scoring.read(table), {})
    cells = {f"{row['test']}{' hard' * (row['subset'] == 'hard')}": row for row in rows}
    print(
        name + ": " + "; ".join(f"{cell} {row['nll']:.3f} / {row['ece']:.3f}" for cell, row in cells.items()),
        flush=True,
    )


if __name__ == "__main__":
    torch.manual_seed(0)
    np.random.seed(0)
    main()
