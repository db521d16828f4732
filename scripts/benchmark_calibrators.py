"""How much `auto` loses against the best single method, and how often it harms a model that is calibrated already.

Labels are drawn from known distributions, models are these distorted in a known way: calibrated, over- and
underconfident by one temperature, by a temperature per group, by a shift per class. Every loss is the expected one on
fresh rows (the cross-entropy with the true distribution), so that no difference is chance of the test rows.

    python scripts/benchmark_calibrators.py --runs 40 --output calibrators.json
    python scripts/benchmark_calibrators.py --cost
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np

from hf_moecal.calibration import TemperatureCalibrator
from hf_moecal.calibration.selection import CANDIDATES, calibrate_table
from hf_moecal.calibration.solver import log_softmax


COUNTS = (50, 100, 300, 1_000, 10_000)
CLASSES = (2, 4, 20)
FAULTS = ("calibrated", "T 0.5", "T 2", "T 4", "group T", "class bias")
FIXED = ("none", "shrunk_temperature", "temperature", "conservative_temperature", "platt", "vector", "matrix")
GROUP_TEMPERATURES = (0.7, 1.0, 1.5, 2.0, 3.0)
FRESH, SPREAD = 2_000, 2.0


@dataclass(frozen=True)
class Cell:
    """One kind of model and a number of labelled rows."""

    fault: str
    classes: int
    count: int


def draw(cell: Cell, rng: np.random.Generator, count: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """A predictions table, and the true distribution of each row's label."""
    truth = SPREAD * rng.standard_normal((count, cell.classes))
    label = (truth + rng.gumbel(size=truth.shape)).argmax(axis=1)
    table = {"label": label, "logits": truth}
    if cell.fault.startswith("T "):
        table["logits"] = truth * float(cell.fault[2:])
    elif cell.fault == "group T":
        group = rng.integers(len(GROUP_TEMPERATURES), size=count)
        table["logits"] = truth * np.array(GROUP_TEMPERATURES)[group][:, None]
        table["group"] = np.array(list("abcde"))[group]
    elif cell.fault == "class bias":
        table["logits"] = truth + np.random.default_rng(cell.classes).standard_normal(cell.classes)
    return table, np.exp(log_softmax(truth))


def run(cell: Cell, seed: int) -> dict[str, float]:
    """Fresh loss above the least possible one, in nats, of `auto` and of each fixed method; and what auto chose."""
    rng = np.random.default_rng([seed, cell.classes, cell.count])
    table, _ = draw(cell, rng, cell.count)
    fresh, truth = draw(cell, np.random.default_rng(10**6 + seed), FRESH)
    least = -(truth * np.log(truth)).sum(axis=1).mean()

    def excess(calibrator) -> float:
        probs = np.maximum(calibrator.apply(fresh)["probs"], 1e-300)
        return float(-(truth * np.log(probs)).sum(axis=1).mean() - least)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        auto = calibrate_table(table, intervals=False).calibrator
        found = {"auto": excess(auto), "choice": auto.method}
        for name in FIXED:
            try:
                found[name] = excess(CANDIDATES[name]().fit(table))
            except ValueError:  # no temperature is best
                found[name] = excess(CANDIDATES["none"]().fit(table))
    return found


def summary(runs: list[dict[str, float]]) -> dict[str, float | str]:
    """Means over the runs of one cell."""
    means = {name: float(np.mean([one[name] for one in runs])) for name in ("auto", *FIXED)}
    best = min(FIXED, key=means.__getitem__)
    harm = [one["auto"] - one["none"] > 0.01 for one in runs]
    choices, times = np.unique([one["choice"] for one in runs], return_counts=True)
    chosen = ", ".join(f"{choices[i]} {times[i]}" for i in np.argsort(-times))
    return {
        **means,
        "best": best,
        "lost": means["auto"] - means[best],
        "harmed": float(np.mean(harm)),
        "chosen": chosen,
    }


def cells(counts: Iterable[int]) -> Iterator[Cell]:
    """The grid."""
    return (Cell(*values) for values in product(FAULTS, CLASSES, counts))


def benchmark(counts: Iterable[int], runs: int) -> dict[Cell, dict[str, float | str]]:
    """The summary of each cell, printed as it comes."""
    from tqdm.auto import tqdm

    found = {}
    for cell in tqdm(list(cells(counts)), desc="cells"):
        few = runs if cell.count < 10_000 else max(2, runs // 8)
        found[cell] = summary([run(cell, seed) for seed in range(few)])
    return found


def lines(found: dict[Cell, dict[str, float | str]]) -> list[str]:
    """A Markdown table, and what it comes to."""
    rows = [
        "| model | classes | rows | auto | best fixed | lost to it | worse than none by .01 | chosen |",
        "|---" * 8 + "|",
    ]
    for cell, one in found.items():
        where = f"| {cell.fault} | {cell.classes} | {cell.count:,} | {one['auto']:.4f} "
        best = f"| {one['best']} {one[one['best']]:.4f} | {one['lost']:+.4f} "
        rows.append(f"{where}{best}| {one['harmed']:.3f} | {one['chosen']} |")
    means = {name: np.mean([one[name] for one in found.values()]) for name in ("auto", *FIXED)}
    rows += ["", "mean over all cells: " + ", ".join(f"{name} {value:.4f}" for name, value in means.items())]
    lost, harmed = ([one[name] for one in found.values()] for name in ("lost", "harmed"))
    rows.append(
        f"lost to the best of each cell: mean {np.mean(lost):+.4f}, largest {max(lost):+.4f}; "
        f"worse than none by .01: {np.mean(harmed):.4f} of all runs, {max(harmed):.3f} in the worst cell"
    )
    return rows


def cost(classes: int, count: int) -> str:
    """How many fits of one temperature `auto` takes."""
    rng = np.random.default_rng(0)
    truth = rng.standard_normal((count, classes), dtype=np.float32) * 3
    table = {"logits": 2 * truth, "label": (truth + rng.gumbel(size=truth.shape)).argmax(axis=1)}

    def seconds(function) -> float:
        start = time.process_time()
        function()
        return time.process_time() - start

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        one = min(seconds(lambda: TemperatureCalibrator().fit(table)) for _ in range(3))
        whole = seconds(lambda: calibrate_table(table))
    return (
        f"{classes:,} classes, {count:,} rows: one temperature {one:.2f} s, auto {whole:.2f} s, {whole / one:.1f} fits"
    )


def main() -> None:
    """Runs the benchmark, or with --cost measures the time."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=40, help="per cell; an eighth of it at 10,000 rows")
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS)
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    parser.add_argument("--cost", action="store_true")
    options = parser.parse_args()
    if options.cost:
        for classes, count in ((4, 1_000), (1_000, 1_000), (50_000, 200)):
            print(cost(classes, count))
        return
    found = benchmark(options.counts, options.runs)
    print("\n".join(lines(found)))
    if options.output is not None:
        records = [{"fault": c.fault, "classes": c.classes, "count": c.count, **one} for c, one in found.items()]
        options.output.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
