"""The whole path on real data: upcycle a small model, fine-tune it in three ways, judge all under shift, report.

Needs `python scripts/fetch_data.py` first. Everything is left under `runs/demo/`; what is there already, whole and
made by the same recipe, is used again.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoTokenizer

from hf_moecal import from_pretrained, load_calibration, predict
from hf_moecal.cli.recipe import Recipe, expand, load_recipe
from hf_moecal.cli.runs import predict_recipe, train_recipe
from hf_moecal.cli.sets import load_set
from hf_moecal.report import format_table, write_report


ROOT = Path(__file__).resolve().parents[1]
METHODS = {"erm": "ERM", "paper": "Robust Filtered (paper)", "recommended": "Recommended"}
RECOMMENDED = METHODS["recommended"]
HARD_BELOW = 0.8  # share of the human raters on the majority's side
DENSE = "${MOECAL_CACHE}/models/SmolLM2-135M-Instruct"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes" / "quickstart.yaml")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "demo")
    options = parser.parse_args()
    recipe, steps = in_faster_precision(load_recipe(options.recipe)), Steps()
    with steps.timed("mixture of experts from the dense model"):
        upcycle(recipe)
    stamp = hashlib.sha256(json.dumps(dataclasses.asdict(recipe), sort_keys=True).encode()).hexdigest()[:16]
    tables = {}
    for method, name in METHODS.items():
        with steps.timed(f"{name}: training and calibration"):
            train(recipe, method, options.output / method, stamp)
        with steps.timed(f"{name}: predictions"):
            tables[name] = predictions(recipe, options.output / method, stamp)
    shown = {name: with_hard_column(table) for name, table in tables.items()}
    shown = calibrated(shown, options.output)
    with steps.timed("report"):
        report = write_report(shown, options.output, title="Calibration under shift, before and after", hard="hard")
    metrics = json.loads((options.output / "metrics.json").read_text())
    with steps.timed("the recommended checkpoint, loaded by itself"):
        difference = plain_difference(recipe, options.output / "recommended", shown[RECOMMENDED])
    print("\n" + format_table(metrics))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"\nThe recommended checkpoint, loaded by hf_moecal.from_pretrained, gives these probabilities within "
        f"{difference:.0e}.\n\n{steps}\npeak memory {peak:.1f} GiB."
        f"\nLook at {os.path.relpath(report)} and the PNG files beside it."
    )


class Steps:
    """Which step took what."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        print(f"\n{name}")
        start = time.perf_counter()
        yield
        self._seconds[name] = time.perf_counter() - start

    def __str__(self) -> str:
        lines = [f"{seconds / 60:5.1f}  {name}" for name, seconds in self._seconds.items()]
        return "\n".join([f"{sum(self._seconds.values()) / 60:5.1f} minutes, of which", *lines])


def in_faster_precision(recipe: Recipe) -> Recipe:
    """The recipe with its frozen layers in bfloat16 where this processor multiplies faster in it (not all do)."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        left, right = torch.ones(512, 576, dtype=dtype), torch.ones(576, 1536, dtype=dtype)
        times = []
        for _ in range(5):
            start = time.perf_counter()
            left @ right
            times.append(time.perf_counter() - start)
        seconds[dtype] = min(times)
    ratio = seconds[torch.float32] / seconds[torch.bfloat16]
    print(f"bfloat16 is {ratio:.2f} times as fast as float32 here: the frozen layers run in", end=" ")
    print("bfloat16" if ratio > 1.2 else "float32")
    if ratio <= 1.2:
        return recipe
    return dataclasses.replace(recipe, arguments={**recipe.arguments, "prefix_cache_dtype": "bfloat16"})


def upcycle(recipe: Recipe) -> None:
    """Makes the mixture-of-experts checkpoint that the recipe starts from; does nothing where it stands already.

    Fifteen layers, of which only the last has experts: the frozen ones run once per sentence.
    """
    script, target = ROOT / "scripts" / "upcycle.py", expand(recipe.model)
    options = ["--family", "qwen2_moe", "--experts", "4", "--top-k", "2", "--layers", "15"]
    subprocess.run([sys.executable, str(script), expand(DENSE), target, *options], check=True)


def train(recipe: Recipe, method: str, folder: Path, stamp: str) -> None:
    if _stamp_of(folder) == stamp:
        print(f"trained already, in {os.path.relpath(folder)}")
        return
    train_recipe(recipe, overrides=["--method", method, "--output_dir", str(folder)])
    (folder / "stamp.json").write_text(json.dumps({"recipe": stamp}))  # last: an interrupted run has none


def predictions(recipe: Recipe, folder: Path, stamp: str) -> Dataset:
    """The predictions table on all groups, from disk if it was made before."""
    path = folder / "predictions.parquet"
    if not path.is_file() or path.stat().st_mtime < (folder / "stamp.json").stat().st_mtime:
        table = predict_recipe(recipe, model=str(folder), sets=list(recipe.groups), batch_size=64, raw=True)
        partial = path.with_suffix(".partial")
        table.to_parquet(str(partial))
        os.replace(partial, path)
    return Dataset.from_parquet(str(path))


def calibrated(tables: dict[str, Dataset], output: Path) -> dict[str, Dataset]:
    """ERM raw and with its temperature, the paper's method raw, the recommended one as it is loaded."""
    erm, paper, recommended = tables.values()
    return {
        METHODS["erm"]: erm,
        "ERM + temperature": load_calibration(output / "erm").apply(erm),
        METHODS["paper"]: paper,
        RECOMMENDED: load_calibration(output / "recommended").apply(recommended),
    }


def with_hard_column(table: Dataset) -> Dataset:
    return table.add_column("hard", [value < HARD_BELOW for value in table["agreement"]])


def plain_difference(recipe: Recipe, folder: Path, table: Dataset, count: int = 64) -> float:
    """Largest difference in probability between the table and the checkpoint loaded and run by itself."""
    model, tokenizer = from_pretrained(str(folder)), AutoTokenizer.from_pretrained(str(folder))
    sample = load_set("movie", recipe.groups["movie"], recipe).select(range(count))
    alone = predict(model, sample, processing_class=tokenizer, max_length=recipe.max_length)
    recorded = dict(zip(table["id"], table["probs"], strict=True))
    rows = [torch.tensor(recorded[key]) for key in alone["id"]]
    return (torch.stack(rows) - torch.tensor(alone["probs"][:])).abs().max().item()


def _stamp_of(folder: Path) -> str | None:
    path = folder / "stamp.json"
    return json.loads(path.read_text())["recipe"] if path.is_file() else None


if __name__ == "__main__":
    main()
