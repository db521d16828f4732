"""Does it work? Trains every method on every shift, judges all of them, writes recipes/results/benchmark.parquet.

    python scripts/fetch_data.py && python scripts/fetch_data.py topics newsgroups
    python scripts/run_benchmark.py                       # everything; a second call goes on where the first stopped
    python scripts/run_benchmark.py --tasks reviews-out --seeds 0 1
    python scripts/run_benchmark.py --smoke               # two tasks and a model of two layers, to see that it runs

Each run leaves a predictions table under `runs/benchmark/`, named after its settings. The figures are made from these
tables alone; `--score` makes them without training.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import datasets
import torch
from datasets import Dataset
from tqdm.auto import tqdm


ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "recipes"), str(ROOT / "scripts")]

from benchmark import scoring  # noqa: E402
from benchmark.data import Sets, load_task  # noqa: E402
from benchmark.model import draw, specialise, upcycled  # noqa: E402
from benchmark.settings import FULL, METHODS, SMOKE, SMOKE_TASKS, TASKS, Budget, Method, Task  # noqa: E402
from benchmark.training import predictions, restore, state, train  # noqa: E402

from hf_moecal.calibration.selection import CANDIDATES  # noqa: E402
from hf_moecal.model.prefix_cache import PrefixCache  # noqa: E402


VERSION = 1  # raise it whenever the code of the benchmark would train or predict otherwise
DENSE = Method("dense", dict(objective="erm"), ("native",))
HARD_ROUTED = "erm-hard_routing"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS)
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, DENSE.name])
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument(
        "--runs", type=Path, default=ROOT / "runs" / "benchmark", help="folder of the predictions tables"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "recipes" / "results", help="folder of the figures")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--score", action="store_true", help="only make the figures of the runs that are there")
    options = parser.parse_args()
    datasets.disable_progress_bars()
    budget = SMOKE if options.smoke else FULL
    tasks = [TASKS[name] for name in options.tasks or (SMOKE_TASKS if options.smoke else TASKS)]
    if not options.score:
        seeds = budget.seeds if options.seeds is None else tuple(options.seeds)
        benchmark = Benchmark(budget, options.runs)
        for seed in seeds:
            for task in tasks:
                benchmark.run(task, seed, only=options.methods)
    write(tasks, budget, options.runs, options.output)


class Benchmark:
    """Trains what is not there yet; one model serves all runs."""

    def __init__(self, budget: Budget, folder: Path) -> None:
        self.budget, self.folder = budget, folder
        self.cache = str(folder / "states")
        self.model = upcycled(budget)
        self._sets: dict[str, Sets] = {}

    def run(self, task: Task, seed: int, *, only: list[str] | None = None) -> None:
        """All methods of a task with one seed."""
        wanted = [(method, readout) for method, readout in runs_of(task) if only is None or method.name in only]
        missing = [run for run in wanted if not self.path(task, *run, seed).is_file()]
        if not missing:
            return
        sets = self._load(task)
        start = None
        for method, readout in missing:
            began = time.perf_counter()
            if method is DENSE:
                self._draw(task, sets, seed, experts=1, neurons=self.model.config.intermediate_size)
            else:
                if start is None:
                    start = self._start(task, sets, seed)
                self._draw(task, sets, seed)
                restore(self.model, start)
            epochs = self.budget.epochs + (
                self.budget.specialise_epochs if method is DENSE or not task.specialised else 0
            )
            budget = dataclasses.replace(self.budget, epochs=epochs)
            train(self.model, sets, method, readout, budget, cache=self.cache, seed=seed)
            save(predictions(self.model, sets, readout, cache=self.cache), self.path(task, method, readout, seed))
            if method.name == "erm" and readout == "native":
                routed = predictions(self.model, sets, readout, cache=self.cache, hard_top_k=1)
                save(routed, self.path(task, Method(HARD_ROUTED), readout, seed))
            seconds = time.perf_counter() - began
            print(f"{task.name} {method.name} {readout} seed {seed}: {seconds:.0f} s", flush=True)

    def path(self, task: Task, method: Method, readout: str, seed: int) -> Path:
        return table_path(self.folder, self.budget, task, method, readout, seed)

    def _load(self, task: Task) -> Sets:
        if task.name not in self._sets:
            self._sets[task.name] = sets = load_task(task, self.budget)
            self._draw(task, sets, 0)
            with PrefixCache(self.model, self.cache) as prefix:
                for rows in (sets.train, sets.validation, sets.test, *sets.unseen.values()):
                    prefix.fill(rows["input_ids"][:], progress=True)
        return self._sets[task.name]

    def _draw(
        self, task: Task, sets: Sets, seed: int, *, experts: int | None = None, neurons: int | None = None
    ) -> None:
        shape = {"experts": experts or task.experts, "neurons": neurons or self.budget.neurons}
        draw(self.model, **shape, num_labels=sets.num_labels, seed=seed)

    def _start(self, task: Task, sets: Sets, seed: int) -> dict[str, torch.Tensor]:
        """What every method of a task and seed starts from."""
        self._draw(task, sets, seed)
        if task.specialised:
            began = time.perf_counter()
            specialise(self.model, task, sets, self.budget, cache=self.cache, seed=seed)
            print(f"{task.name} specialists seed {seed}: {time.perf_counter() - began:.0f} s", flush=True)
        return state(self.model)


def runs_of(task: Task) -> Iterator[tuple[Method, str]]:
    """The methods of a task with their readouts, the baseline first."""
    yield METHODS["erm"], "native"
    yield DENSE, "native"
    for method in METHODS.values():
        for readout in method.readouts:
            if (method.name, readout) != ("erm", "native") and (method.tasks is None or task.name in method.tasks):
                yield method, readout


def table_path(folder: Path, budget: Budget, task: Task, method: Method, readout: str, seed: int) -> Path:
    """Where the predictions of a run are: a name for people, and a hash of all settings that they depend on."""
    shared = {name: value for name, value in dataclasses.asdict(budget).items() if name != "seeds"}
    shift = {name: value for name, value in dataclasses.asdict(task).items() if name not in ("name", "shift")}
    settings = {"version": VERSION, **shared, "task": shift, "method": method.arguments}
    stamp = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]
    return folder / task.name / f"{method.name}.{readout}.{seed}.{stamp}.parquet"


def save(table: Dataset, path: Path) -> None:
    """Writes the table whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    table.to_parquet(str(partial))
    os.replace(partial, path)


def write(tasks: list[Task], budget: Budget, folder: Path, output: Path) -> None:
    """Scores the runs that are there: `benchmark.parquet` (one row per set and subset), curves, routing."""
    rows, curves, routing = [], [], []
    for task in tqdm(tasks, desc="score"):
        for method, readout in [*runs_of(task), (Method(HARD_ROUTED), "native")]:
            paths = {seed: table_path(folder, budget, task, method, readout, seed) for seed in budget.seeds}
            tables = {seed: Dataset.from_parquet(str(path)) for seed, path in paths.items() if path.is_file()}
            names = {"task": task.name, "train": "+".join(task.sources), "method": method.name, "readout": readout}
            if method.name == "erm":
                figures = {seed: scoring.routing_figures(table, task.experts) for seed, table in tables.items()}
                routing += [{**names, "seed": seed, **found} for seed, found in figures.items()]
            read = {seed: scoring.read(table, routing=method.name == "erm") for seed, table in tables.items()}
            alone = [(1, seed, table) for seed, table in read.items()]
            for members, seed, table in [*alone, *scoring.committees(read)]:
                run = {**names, "members": members, "seed": seed}
                for posthoc in posthoc_of(method, readout, members):
                    try:
                        shown = scoring.calibrated(table, posthoc)
                    except ValueError as error:  # a handful of rows, in the smoke run
                        print(f"{task.name} {method.name} seed {seed}: no {posthoc}: {error}")
                        continue
                    rows += scoring.score(shown, {**run, "posthoc": posthoc})
                curves += [{**run, "set": name, "nll": nll} for name, nll in scoring.curve(table).items()]
    output.mkdir(parents=True, exist_ok=True)
    for name, content in (("benchmark", rows), ("benchmark_curves", curves), ("benchmark_routing", routing)):
        scoring.write_rows(content, output / f"{name}.parquet")
    print(f"{len(rows):,} rows: {output / 'benchmark.parquet'}")


def posthoc_of(method: Method, readout: str, members: int) -> tuple[str, ...]:
    """The calibrators that a method is judged with: all for plain ERM, else a temperature, the best and the highest.

    A temperature for each group is out: an unseen group has none.
    """
    if (method.name, readout, members) == ("erm", "native", 1):
        return (*(name for name in CANDIDATES if name != "grouped_temperature"), "auto", scoring.ORACLE)
    further = {("erm", "soft_mixture", 1): ("per_expert_temperature",), ("erm", "soft_mixture", 4): (scoring.ORACLE,)}
    usual = ("none", "temperature", "conservative_temperature")
    return (*usual, *further.get((method.name, readout, members), ()))


if __name__ == "__main__":
    main()
