"""Measures the intervals and p-values of the calibration figures by simulation, where the truth is known.

    OMP_NUM_THREADS=1 python scripts/benchmark_intervals.py [--draws 1000] [--only coverage groups] [--rows 20 50 ...]

Coverage: samples of models whose confidences are sharp (near 1) or wide, and that are calibrated, overconfident or
underconfident. The true error is that of the population (400,000 examples) under the bins of the sample. Groups: how
often a group is named where none is wrong, and where one is. Prints JSON lines, then Markdown tables.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple


os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from hf_moecal.metrics import calibration_report, reliability_bins
from hf_moecal.metrics.binning import Edges, equal_mass, equal_width


ROWS = (20, 50, 200, 1000, 10_000)
POPULATION = 400_000
SCALES = {"calibrated": 1.0, "overconfident": 0.6, "underconfident": 1.7}  # of the logits of the truth
BINS = 15


class World(NamedTuple):
    """What a model says of each member of a population (`probs` [P, C]) and what is true of it (`truth` [P, C])."""

    probs: np.ndarray
    truth: np.ndarray

    def top(self) -> tuple[np.ndarray, np.ndarray]:
        """Confidence, and the chance to be right."""
        at = np.arange(len(self.probs)), self.probs.argmax(1)
        return self.probs[at], self.truth[at]


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def world(shape: str, honesty: str, classes: int = 4) -> World:
    """Logits of a wide model are normal; a sharp one is sure of one class by 4 to 7 nats, as fine-tuned models are."""
    rng = np.random.default_rng(0)
    logits = 1.6 * rng.standard_normal((POPULATION, classes))
    if shape == "sharp":
        logits *= 0.2
        logits[np.arange(POPULATION), rng.integers(0, classes, POPULATION)] += rng.uniform(4.0, 7.0, POPULATION)
    return World(softmax(logits), softmax(SCALES[honesty] * logits))


class Truth:
    """Errors of a population under any bins, from sums over its sorted confidences."""

    def __init__(self, confidence: np.ndarray, rate: np.ndarray) -> None:
        order = np.argsort(confidence)
        self.confidence = confidence[order]
        self.gaps = np.concatenate([[0.0], np.cumsum((confidence - rate)[order])])
        self.hits = np.concatenate([[0.0], np.cumsum(rate[order])])

    def of(self, edges: np.ndarray) -> tuple[float, np.ndarray]:
        """The binned error, and the accuracy of each bin."""
        ends = np.searchsorted(self.confidence, edges[1:-1], side="right")
        ends = np.concatenate([[0], ends, [len(self.confidence)]])
        with np.errstate(invalid="ignore", divide="ignore"):
            return float(np.abs(np.diff(self.gaps[ends])).sum() / ends[-1]), np.diff(self.hits[ends]) / np.diff(ends)


def draw(source: World, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities and labels of a sample."""
    rows = rng.integers(0, len(source.probs), n)
    below = np.cumsum(source.truth[rows], 1)
    labels = (rng.random((n, 1)) * below[:, -1:] > below[:, :-1]).sum(1)
    return source.probs[rows], labels


def sample_edges(strategy: str, scores: np.ndarray) -> Edges:
    return equal_width(BINS) if strategy == "equal_width" else equal_mass(scores, BINS)


def coverage(shape: str, honesty: str, n: int, draws: int, seed: int) -> Iterator[dict]:
    """Shares of samples whose intervals hold the truth, for each kind of bins; and of false alarms."""
    source = world(shape, honesty)
    confidence, rate = source.top()
    top, gap = Truth(confidence, rate), float((confidence - rate).mean())
    classes = [Truth(p, q) for p, q in zip(source.probs.T, source.truth.T, strict=True)]
    found: dict[str, list] = {}

    def note(key: str, value: float) -> None:
        found.setdefault(key, []).append(float(value))

    for seeds in np.random.SeedSequence(seed).spawn(draws):
        probs, labels = draw(source, n, np.random.default_rng(seeds))
        sure, right = probs.max(1), probs.argmax(1) == labels
        for strategy in ("equal_width", "equal_mass"):
            for mode in ("top_label", "classwise"):
                report = calibration_report(labels, probs=probs, strategy=strategy, mode=mode, ranked=False)
                low, high = report["ece_interval"]
                if mode == "top_label":
                    edges = sample_edges(strategy, sure).edges
                    truth, rates = top.of(edges)
                    bins = reliability_bins(sure, right, strategy=strategy)
                    filled = np.array(bins["count"]) > 0
                    ends = np.array([bins["band_low"], bins["band_high"]])[:, filled]
                    note(f"bins {strategy}", ((ends[0] <= rates[filled]) & (rates[filled] <= ends[1])).mean())
                    mean = np.array(bins["confidence"])[filled]
                    note(f"diagonal {strategy}", ((mean < ends[0]) | (mean > ends[1])).mean())
                else:
                    truth = np.mean(
                        [t.of(sample_edges(strategy, p).edges)[0] for t, p in zip(classes, probs.T, strict=True)]
                    )
                kind = f"{mode} {strategy}"
                note(f"covered {kind}", low <= truth + 1e-12 and truth <= high)
                note(f"above {kind}", low > truth + 1e-12)
                note(f"width {kind}", high - low)
                note(f"error {kind}", truth)
                note(f"p {kind}", report["calibrated_p"] < 0.05)
                if kind == "top_label equal_width":
                    ends = report["signed_gap_interval"]
                    note("covered gap", ends[0] <= gap <= ends[1])
                    note("width gap", ends[1] - ends[0])
                    note("gap excludes 0", not ends[0] <= 0 <= ends[1])
    yield {"shape": shape, "honesty": honesty, "n": n} | {key: float(np.mean(v)) for key, v in found.items()}


def group_cases() -> dict[str, tuple[list[int], int | None]]:
    """Sizes of the groups, and which of them is wrong."""
    return {
        "20 of 50, none wrong": ([50] * 20, None),
        "20 of 30 and one of 2,000, none wrong": ([30] * 20 + [2000], None),
        "20 of 30 and one of 2,000, that one wrong by .05": ([30] * 20 + [2000], 20),
        "100 of 200, none wrong": ([200] * 100, None),
        "100 of 200, one wrong by .15": ([200] * 100, 0),
    }


def named(shape: str, sizes: list[int], wrong: int | None, error: float, rng: np.random.Generator) -> str | None:
    low = 0.97 if shape == "sharp" else 0.4
    confidence = rng.uniform(low, 1.0, sum(sizes))
    groups = np.repeat(np.arange(len(sizes)), sizes)
    chance = confidence - error * (groups == wrong if wrong is not None else np.zeros(len(groups)))
    correct = rng.random(len(confidence)) < chance
    return calibration_report(confidence=confidence, correct=correct, groups=groups, ranked=False)["worst_group"]


def compare_groups(shape: str, case: str, draws: int, seed: int) -> dict:
    sizes, wrong = group_cases()[case]
    error = 0.15 if ".15" in case else 0.05
    found = [
        named(shape, sizes, wrong, error, np.random.default_rng(seeds))
        for seeds in np.random.SeedSequence(seed).spawn(draws)
    ]
    right = sum(name == str(wrong) for name in found) / draws if wrong is not None else None
    return {"shape": shape, "case": case, "none named": found.count(None) / draws, "right one named": right}


def table(rows: list[dict], figures: dict[str, tuple[str, Callable]], only: Callable[[dict], bool]) -> str:
    """One line per figure, one column per n: the worst of the worlds."""
    sizes = sorted({row["n"] for row in rows})
    lines = ["| | " + " | ".join(f"n = {n:,}" for n in sizes) + " |", "|---|" + "---:|" * len(sizes)]
    for label, (key, worst) in figures.items():
        cells = [worst(row[key] for row in rows if row["n"] == n and only(row)) for n in sizes]
        lines.append(f"| {label} | " + " | ".join(f"{cell:.3f}" for cell in cells) + " |")
    return "\n".join(lines)


def tables(rows: list[dict]) -> str:
    kinds = {
        "ECE, equal width": "top_label equal_width",
        "ECE, equal mass": "top_label equal_mass",
        "classwise, equal width": "classwise equal_width",
        "classwise, equal mass": "classwise equal_mass",
    }
    covered: dict[str, tuple[str, Callable]] = {name: (f"covered {kind}", min) for name, kind in kinds.items()}
    covered |= {"signed gap": ("covered gap", min)}
    covered |= {f"bins, {s.replace('_', ' ')}": (f"bins {s}", min) for s in ("equal_width", "equal_mass")}
    alarms: dict[str, tuple[str, Callable]] = {name: (f"p {kind}", max) for name, kind in kinds.items()}
    alarms |= {"signed gap's interval excludes 0": ("gap excludes 0", max)}
    alarms |= {
        f"a bin's band excludes its confidence, {s}": (f"diagonal {s}", max) for s in ("equal_width", "equal_mass")
    }
    honest = [row for row in rows if row["honesty"] == "calibrated"]
    text = ["Coverage of the 95 % intervals, the worst of the worlds:", table(rows, covered, lambda row: True)]
    if honest:
        text += [
            "Calibrated models called miscalibrated, the worst of the worlds:",
            table(honest, alarms, lambda row: True),
        ]
    return "\n\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, nargs="*", default=ROWS)
    parser.add_argument("--only", nargs="*", default=("coverage", "groups"), choices=("coverage", "groups"))
    options = parser.parse_args()
    rows = []
    for n in options.rows if "coverage" in options.only else ():
        for shape in ("sharp", "wide"):
            for honesty in SCALES:
                rows += coverage(shape, honesty, n, options.draws, options.seed)
                print(
                    json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in rows[-1].items()}),
                    flush=True,
                )
    for case in group_cases() if "groups" in options.only else ():
        for shape in ("sharp", "wide"):
            print(json.dumps(compare_groups(shape, case, options.draws, options.seed)), flush=True)
    if rows:
        print(tables(rows))


if __name__ == "__main__":
    main()
