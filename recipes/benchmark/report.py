"""benchmark.parquet becomes the tables of recipes/RESULTS.md and the figure of curves.

python recipes/benchmark/report.py                  # prints Markdown, writes recipes/results/benchmark_curves.png
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "recipes"))

from benchmark.scoring import TEMPERATURES, read_rows  # noqa: E402
from benchmark.settings import SENSITIVITY_TASKS, TASKS  # noqa: E402


BASELINE = ("erm", "native", 1, "temperature")
CELLS = ("in-domain", "in-domain hard", "shifted", "shifted hard")
Key = tuple[str, str, int, str]
"""Method, readout, members, calibrator."""
Curves = dict[str, list[float]]
Run = tuple[str, str, str, int, int]  # task, method, readout, members, seed
"""NLL of each set, `"name/subset"`, over the temperatures."""


def cell_of(test: str, subset: str) -> str:
    """In which of `CELLS` a set and subset count."""
    where = "in-domain" if test == "in-domain" else "shifted"
    return where if subset == "all" else f"{where} hard"


class Figures:
    """The rows by task, key and seed; the unseen sets of a task are averaged under "shifted"."""

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        self._found: dict[tuple[str, Key, int], dict[str, list[dict[str, Any]]]] = {}
        for row in rows:
            key = (row["method"], row["readout"], row["members"], row["posthoc"])
            run = self._found.setdefault((row["task"], key, row["seed"]), {})
            run.setdefault(cell_of(row["test"], row["subset"]), []).append(row)
        self.tasks = list(dict.fromkeys(row["task"] for row in rows))
        self.keys = list(dict.fromkeys(key for _, key, _ in self._found))

    def seeds(self, task: str, key: Key) -> list[int]:
        return sorted(seed for name, other, seed in self._found if (name, other) == (task, key))

    def value(self, task: str, key: Key, seed: int, cell: str, figure: str) -> float:
        """Mean of a figure over the sets of a cell; NaN where there is none."""
        rows = self._found.get((task, key, seed), {}).get(cell, [])
        return float(np.mean([row[figure] for row in rows])) if rows else float("nan")

    def mean(self, task: str, key: Key, cell: str, figure: str, seeds: Sequence[int] | None = None) -> float:
        seeds = self.seeds(task, key) if seeds is None else seeds
        return float(np.mean([self.value(task, key, seed, cell, figure) for seed in seeds])) if seeds else float("nan")

    def sets(self, task: str, key: Key) -> list[tuple[str, str]]:
        first = self._found[task, key, self.seeds(task, key)[0]]
        return list(dict.fromkeys((row["test"], row["subset"]) for rows in first.values() for row in rows))

    def on_set(self, task: str, key: Key, test: str, subset: str, figure: str, seeds: Sequence[int]) -> float:
        """Mean over the seeds on one set."""
        rows = [row for seed in seeds for cell in self._found[task, key, seed].values() for row in cell]
        return float(np.mean([row[figure] for row in rows if (row["test"], row["subset"]) == (test, subset)]))

    def common(self, task: str, key: Key) -> list[int]:
        """The seeds that both the method and the baseline have, over which they are compared."""
        return sorted(set(self.seeds(task, key)) & set(self.seeds(task, BASELINE)))


def verdicts(figures: Figures, keys: Iterable[Key], tasks: Sequence[str] | None = None) -> list[list[str]]:
    """Each method against ERM with a converged temperature, over the tasks (all, if unset) that both ran on."""
    lines = []
    for key in keys:
        seeds = {task: figures.common(task, key) for task in (figures.tasks if tasks is None else tasks)}
        seeds = {task: found for task, found in seeds.items() if found}
        if seeds:
            lines.append(verdict(figures, key, seeds))
    return lines


def verdict(figures: Figures, key: Key, seeds: Mapping[str, Sequence[int]]) -> list[str]:
    """One line: means over the tasks of the ratios to the baseline of the same seeds, and of the gain in accuracy."""

    def pair(task: str, *what: str) -> tuple[float, float]:
        return tuple(figures.mean(task, kind, *what, seeds[task]) for kind in (key, BASELINE))

    def ratio(figure: str, cell: str) -> str:
        found = [own / base for own, base in (pair(task, cell, figure) for task in seeds)]
        return f"{np.nanmean(found):.3f}"

    on_sets = [
        np.divide(*(figures.on_set(task, kind, *where, "nll", seeds[task]) for kind in (key, BASELINE)))
        for task in seeds
        for where in figures.sets(task, key)
    ]
    gained = np.mean([own - base for own, base in (pair(task, "in-domain", "accuracy") for task in seeds)])
    return [
        *(name_of(key), f"{len(seeds)} / {sum(map(len, seeds.values()))}", f"{100 * gained:+.1f}"),
        *(ratio("nll", cell) for cell in CELLS),
        *(f"{sum(value <= 1 for value in on_sets)} of {len(on_sets)}", f"{max(on_sets):.3f}"),
        *(ratio("ece", cell) for cell in CELLS[2:]),
    ]


def sensitivity(figures: Figures, keys: Iterable[Key]) -> list[list[str]]:
    """Robust Filtered with other eta and warm-up, raw, on the tasks and seeds that all of these ran on."""
    names = ("robust_filtered-detached", "robust_filtered-eta-", "robust_filtered-warm-up-")
    varied = [key for key in keys if key[0].startswith(names) and key[1:] == ("soft_mixture", 1, "none")]
    seeds = {}
    for task in SENSITIVITY_TASKS:
        shared = set.intersection(*(set(figures.common(task, key)) for key in varied)) if varied else set()
        seeds |= {task: sorted(shared)} if shared else {}
    return [verdict(figures, key, seeds) for key in varied] if seeds else []


VERDICT_HEAD = (
    "method", "tasks / runs", "accuracy, points", *(f"NLL {cell}" for cell in CELLS), "sets at or below 1",
    "worst set", "ECE shifted", "ECE shifted hard",
)  # fmt: skip


def per_task(figures: Figures, keys: Sequence[Key], task: str) -> list[list[str]]:
    """Accuracy, ECE and NLL in each cell, means over the seeds; the difference in NLL to the baseline is paired."""
    lines = []
    for key in keys:
        if not figures.seeds(task, key):
            continue
        line = [name_of(key), str(len(figures.seeds(task, key)))]
        for cell in CELLS:
            shown = [figures.mean(task, key, cell, figure) for figure in CELL_FIGURES]
            line.append("" if np.isnan(shown[0]) else cell_text(shown))
        lines.append([*line, paired(figures, task, key, "shifted", "nll")])
    return lines


def cell_text(values: Iterable[float]) -> str:
    return " / ".join(f"{value:.3f}".lstrip("0") for value in values)


CELL_FIGURES = ("accuracy", "ece", "nll")
TASK_HEAD = ("method", "seeds", *CELLS, "shifted NLL - baseline's")


def paired(figures: Figures, task: str, key: Key, cell: str, figure: str) -> str:
    """Mean difference to the baseline over the seeds, with its 95 % t-interval."""
    from scipy import stats

    seeds = figures.common(task, key)
    found = [figures.value(task, key, s, cell, figure) - figures.value(task, BASELINE, s, cell, figure) for s in seeds]
    if len(found) < 2:
        return f"{found[0]:+.3f}" if found else ""
    half = stats.t.ppf(0.975, len(found) - 1) * np.std(found, ddof=1) / np.sqrt(len(found))
    return f"{np.mean(found):+.3f} ± {half:.3f}"


def equal_in_domain(runs: dict[Run, Curves]) -> list[list[str]]:
    """Hard and shifted NLL at the temperature where each method is as good in-domain as ERM at its best, as ratios.

    The temperature is the largest at which the method's in-domain NLL is not above ERM's lowest; a method that never
    gets there has none. ERM itself is at its best temperature.
    """
    lines, kinds = [], dict.fromkeys(run[1:4] for run in runs)
    for kind in kinds:
        of_kind = [(own, (key[0], *BASELINE[:3], key[4])) for key, own in runs.items() if key[1:4] == kind]
        pairs = [(own, runs[base]) for own, base in of_kind if base in runs]
        ratios: dict[str, list[float]] = {cell: [] for cell in CELLS}
        for own, base in pairs:
            places = np.flatnonzero(relative(own, base, "in-domain") <= 1 + 1e-6)
            for cell, values in ratios.items():
                relation = relative(own, base, cell)
                if len(places) and relation is not None:
                    values.append(relation[places[-1]])
        reached = f"{len(ratios['in-domain'])} of {len(pairs)}"
        shown = [f"{np.mean(ratios[cell]):.3f}" if ratios[cell] else "" for cell in CELLS[1:]]
        lines.append([name_of((*kind, "")), reached, *shown])
    return lines


def relative(own: Curves, base: Curves, cell: str) -> np.ndarray | None:
    """A run's mean NLL on the sets of a cell over the temperatures, as ratios to the baseline's at its best: `[T]`.

    `None` where the cell has no set.
    """
    sets = [name for name in own if cell_of(*name.rsplit("/", 1)) == cell]
    if not sets:
        return None
    best = int(np.argmin(base["in-domain/all"]))
    return np.mean([own[name] for name in sets], axis=0) / np.mean([base[name][best] for name in sets])


EQUAL_HEAD = ("method", "runs that get there", *(f"NLL {cell}" for cell in CELLS[1:]))


DRAWN = (
    ("erm", "native", 1), ("label_smoothing", "native", 1), ("robust_filtered-detached", "native", 1),
    ("erm", "soft_mixture", 1), ("erm", "soft_mixture", 4), ("label_smoothing", "soft_mixture", 4),
    ("robust_filtered-eta-1-no-warm-up", "soft_mixture", 4),
)  # fmt: skip


def draw_curves(curves: dict[Run, Curves], path: Path) -> None:
    """Methods as curves over temperature: in-domain NLL against hard and shifted NLL, as ratios to ERM at its best.

    Means over the tasks and seeds that all of them have; a dot marks temperature 1.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    runs: dict[tuple, dict[tuple, dict]] = {}
    for (task, *kind, seed), nll in curves.items():
        runs.setdefault(tuple(kind), {})[task, seed] = nll
    drawn = [kind for kind in DRAWN if kind in runs]
    common = sorted(set.intersection(*(set(runs[kind]) for kind in drawn)))
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.8), sharex=True, layout="constrained")
    one = int(np.argmin(abs(TEMPERATURES - 1)))
    for kind in drawn:
        found = {cell: [relative(runs[kind][run], runs[BASELINE[:3]][run], cell) for run in common] for cell in CELLS}
        means = {cell: np.mean([one for one in ones if one is not None], axis=0) for cell, ones in found.items()}
        for axis, cell in zip(axes, CELLS[1:], strict=True):
            (line,) = axis.plot(means["in-domain"], means[cell], label=name_of((*kind, "")), lw=1.6)
            axis.plot(means["in-domain"][one], means[cell][one], "o", color=line.get_color(), ms=6)
    for axis, cell in zip(axes, CELLS[1:], strict=True):
        axis.set(xlim=(0.96, 1.12), ylim=(0.9, 1.1), xlabel="in-domain NLL", title=f"{cell} NLL")
        axis.axhline(1, color="0.8", lw=0.8, zorder=0)
        axis.axvline(1, color="0.8", lw=0.8, zorder=0)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.suptitle("Over temperature, relative to ERM at its best temperature; lower and further left is better")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def name_of(key: Key) -> str:
    method, readout, members, posthoc = key
    parts = [
        method,
        *(["soft mixture"] if readout == "soft_mixture" else []),
        *([f"committee of {members}"] if members > 1 else []),
    ]
    return ", ".join(parts) + (f" + {posthoc}" if posthoc not in ("", "none") else "")


def read_curves(path: Path) -> dict[Run, Curves]:
    """NLL over temperatures by set, of each task, method, readout, committee and seed."""
    curves: dict[Run, Curves] = {}
    for row in read_rows(path):
        run = (row["task"], row["method"], row["readout"], row["members"], row["seed"])
        curves.setdefault(run, {})[row["set"]] = row["nll"]
    return curves


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=ROOT / "recipes" / "results")
    options = parser.parse_args()
    figures = Figures(read_rows(options.results / "benchmark.parquet"))
    curves = read_curves(options.results / "benchmark_curves.parquet")
    ordered = sorted(figures.keys, key=lambda key: (key[2], key[1], key[3] != "none"))
    confirming = [name for name in figures.tasks if TASKS[name].shift.startswith("confirmation")]
    usual = [name for name in figures.tasks if name not in confirming and TASKS[name].experts == 4]
    print("### Against ERM + converged temperature\n\n" + markdown(VERDICT_HEAD, verdicts(figures, ordered, usual)))
    print("\n### The same, on the shifts that were kept to confirm it\n")
    print(markdown(VERDICT_HEAD, verdicts(figures, ordered, confirming)))
    print("\n### How much depends on eta and warm-up, on the seeds that all have\n")
    print(markdown(VERDICT_HEAD, sensitivity(figures, ordered)))
    print("\n### At ERM's in-domain NLL\n\n" + markdown(EQUAL_HEAD, equal_in_domain(curves)))
    for task in figures.tasks:
        print(f"\n### {task}\n\n" + markdown(TASK_HEAD, per_task(figures, ordered, task)))
    draw_curves(curves, options.results / "benchmark_curves.png")


if __name__ == "__main__":
    main()
