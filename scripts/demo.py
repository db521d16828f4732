"""The whole path on real data: upcycle a small model, fine-tune it twice, judge both under shift, write a report.

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
from pathlib import Path

import torch
from datasets import Dataset

from hf_moecal import TemperatureCalibrator, predict
from hf_moecal.calibration import IdentityCalibrator
from hf_moecal.cli.recipe import Recipe, expand, load_recipe, load_set
from hf_moecal.cli.runs import predict_recipe, train_recipe
from hf_moecal.hub import write_calibration
from hf_moecal.metrics import calibration_report
from hf_moecal.model.loading import load_classifier
from hf_moecal.report import format_table, write_report


ROOT = Path(__file__).resolve().parents[1]
OBJECTIVES = {"erm": "ERM", "robust_filtered": "Robust Filtered"}
HARD_BELOW = 0.8  # share of the human raters on the majority's side
DENSE = "${MOECAL_CACHE}/models/SmolLM2-135M-Instruct"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes" / "quickstart.yaml")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "demo")
    options = parser.parse_args()
    start = time.perf_counter()
    recipe = load_recipe(options.recipe)
    upcycle(recipe)
    stamp = hashlib.sha256(json.dumps(dataclasses.asdict(recipe), sort_keys=True).encode()).hexdigest()[:16]
    tables = {}
    for objective, name in OBJECTIVES.items():
        train(recipe, objective, options.output / objective, stamp)
        tables[name] = predictions(recipe, options.output / objective, stamp)
    tables = calibrate(tables, options.output)
    shown = {name: with_hard_column(table).filter(in_test, desc="select") for name, table in tables.items()}
    print("\nwriting the report")
    report = write_report(shown, options.output, title="Calibration under shift, before and after", hard="hard")
    metrics = json.loads((options.output / "metrics.json").read_text())
    print("\n" + format_table(metrics))
    difference = plain_difference(recipe, options.output / "robust_filtered", tables["Robust Filtered"])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"\nThe saved checkpoint, loaded and run without the cache, gives these probabilities within {difference:.0e}."
        f"\n{(time.perf_counter() - start) / 60:.1f} minutes, peak memory {peak:.1f} GiB."
        f"\nLook at {os.path.relpath(report)} and the PNG files beside it."
    )


def upcycle(recipe: Recipe) -> None:
    """Makes the mixture-of-experts checkpoint that the recipe starts from; does nothing where it stands already.

    Fifteen layers, of which only the last has experts: the frozen ones run once per sentence.
    """
    script, target = ROOT / "scripts" / "upcycle.py", expand(recipe.model)
    options = ["--family", "qwen2_moe", "--experts", "4", "--top-k", "2", "--layers", "15"]
    subprocess.run([sys.executable, str(script), expand(DENSE), target, *options], check=True)


def train(recipe: Recipe, objective: str, folder: Path, stamp: str) -> None:
    if _stamp_of(folder) == stamp:
        print(f"{objective}: trained already, in {os.path.relpath(folder)}")
        return
    print(f"\n{objective}: training")
    overrides = ["--objective", objective, "--output_dir", str(folder)]
    train_recipe(recipe, overrides=overrides)
    (folder / "stamp.json").write_text(json.dumps({"recipe": stamp}))  # last: an interrupted run has none


def predictions(recipe: Recipe, folder: Path, stamp: str) -> Dataset:
    """The predictions table on the validation set and all groups, from disk if it was made before."""
    path = folder / "predictions.parquet"
    if not path.is_file() or path.stat().st_mtime < (folder / "stamp.json").stat().st_mtime:
        table = predict_recipe(recipe, model=str(folder), sets=["validation", *recipe.groups], batch_size=64)
        partial = path.with_suffix(".partial")
        table.to_parquet(str(partial))
        os.replace(partial, path)
    return Dataset.from_parquet(str(path))


def calibrate(tables: dict[str, Dataset], output: Path) -> dict[str, Dataset]:
    """Adds ERM with a temperature fitted on the validation set, and writes both checkpoints' calibration.json."""
    erm = tables["ERM"]
    validation = erm.filter(in_validation, desc="select")
    temperature = TemperatureCalibrator().fit(validation)
    untouched = IdentityCalibrator().fit(tables["Robust Filtered"].filter(in_validation, desc="select"))
    fitted = {"erm": ("ERM", temperature), "robust_filtered": ("Robust Filtered", untouched)}
    for folder, (name, calibrator) in fitted.items():
        table = tables[name]
        test = table.filter(in_domain, desc="select")
        write_calibration(
            output / folder,
            calibrator,
            data={"name": "hutto_ICWSM_2014 movie reviews, validation split", "n": len(validation)},
            before=_figures(test),
            after=_figures(calibrator.apply(test)),
        )
    return {"ERM": erm, "ERM + temperature": temperature.apply(erm), "Robust Filtered": tables["Robust Filtered"]}


def with_hard_column(table: Dataset) -> Dataset:
    return table.add_column("hard", [value < HARD_BELOW for value in table["agreement"]])


def in_validation(row: dict) -> bool:
    return row["group"] == "validation"


def in_test(row: dict) -> bool:
    return row["group"] != "validation"


def in_domain(row: dict) -> bool:
    return row["group"] == "movie"


def plain_difference(recipe: Recipe, folder: Path, table: Dataset, count: int = 64) -> float:
    """Largest difference in probability between the table and the checkpoint loaded and run by itself."""
    model, tokenizer = load_classifier(str(folder))
    sample = load_set("movie", recipe.groups["movie"], recipe).select(range(count))
    alone = predict(model, sample, processing_class=tokenizer, max_length=recipe.max_length, layer=None)
    recorded = dict(zip(table["id"], table["probs"], strict=True))
    rows = [torch.tensor(recorded[key]) for key in alone["id"]]
    return (torch.stack(rows) - torch.tensor(alone["probs"][:])).abs().max().item()


def _figures(table: Dataset) -> dict:
    report = calibration_report(table["label"], probs=table["probs"])
    return {name: report[name] for name in ("n", "accuracy", "ece", "ece_debiased", "nll", "brier", "signed_gap")}


def _stamp_of(folder: Path) -> str | None:
    path = folder / "stamp.json"
    return json.loads(path.read_text())["recipe"] if path.is_file() else None


if __name__ == "__main__":
    main()
