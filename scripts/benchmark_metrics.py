"""Measures the calibration metrics against other libraries: one thread, medians of interleaved runs, ratios.

    OMP_NUM_THREADS=1 python scripts/benchmark_metrics.py [--rows 10000000] [--repeat 5] [--only CASE ...]

Every ratio is of medians taken in this one run. torchmetrics, netcal and scikit-learn are left out with a note where
they are not installed. Peak memory is what numpy allocates beyond the input (tracemalloc).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import sys
import time
import tracemalloc
import warnings
from collections.abc import Callable


os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from hf_moecal.metrics import calibration_report, expected_calibration_error, metric_path
from hf_moecal.metrics.binning import cells, equal_width
from hf_moecal.metrics.chance import Bins
from hf_moecal.metrics.uncertainty import error_interval, evidence


def timed(functions: dict[str, Callable[[], object]], repeat: int) -> dict[str, float]:
    """Median seconds of each function; the runs are interleaved, so that a busy machine slows all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeat):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def peak_megabytes(function: Callable[[], object]) -> float:
    tracemalloc.start()
    function()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 1e6


def have(*names: str) -> bool:
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        print(f"left out: {', '.join(missing)} is not installed", file=sys.stderr)
    return not missing


def confidences(rows: int, repeat: int) -> dict[str, float]:
    """Equal-width bins over [N] confidences, in float64."""
    rng = np.random.default_rng(0)
    confidence = rng.beta(5, 2, rows)
    correct = rng.random(rows) < confidence
    whole = correct.astype(np.int64)
    functions: dict[str, Callable[[], object]] = {
        "ours": lambda: expected_calibration_error(confidence=confidence, correct=correct),
        "reading both arrays": lambda: (confidence.sum(), whole.sum()),
    }
    if have("torchmetrics"):
        import torch
        from torchmetrics.functional.classification import binary_calibration_error

        torch.set_num_threads(1)
        pair = torch.from_numpy(confidence), torch.from_numpy(whole)
        functions["torchmetrics"] = lambda: binary_calibration_error(*pair, n_bins=15)
    if have("sklearn"):
        from sklearn.calibration import calibration_curve

        functions["scikit-learn"] = lambda: calibration_curve(whole, confidence, n_bins=15)
    found = timed(functions, repeat)
    ratios = {f"{name} / ours": found[name] / found["ours"] for name in found if name not in ("ours",)}
    ratios["ours / reading both arrays"] = 1.0 / ratios.pop("reading both arrays / ours")
    return {
        "ours, seconds": found["ours"],
        **ratios,
        "peak extra MB": peak_megabytes(functions["ours"]),
    }


def equal_mass(rows: int, repeat: int) -> dict[str, float]:
    """Equal-mass bins over [N] confidences."""
    rng = np.random.default_rng(0)
    confidence = rng.beta(5, 2, rows)
    correct = rng.random(rows) < confidence

    def ours() -> float:
        return expected_calibration_error(confidence=confidence, correct=correct, strategy="equal_mass")

    functions: dict[str, Callable[[], object]] = {"ours": ours}
    if have("netcal"):
        from netcal.metrics import ECE

        functions["netcal"] = lambda: ECE(bins=15, equal_intervals=False).measure(confidence, correct.astype(int))
    found = timed(functions, repeat)
    ratios = {f"{name} / ours": found[name] / found["ours"] for name in found if name != "ours"}
    return {"ours, seconds": found["ours"], **ratios, "peak extra MB": peak_megabytes(ours)}


def matrix(rows: int, repeat: int) -> dict[str, float]:
    """Probabilities [N, 1000] in float32, checked and reduced, against a plain sum over them."""
    rng = np.random.default_rng(0)
    probs = rng.random((rows, 1000), dtype=np.float32)
    probs /= probs.sum(1, keepdims=True)
    labels = rng.integers(0, 1000, rows)
    found = timed(
        {
            "ours": lambda: expected_calibration_error(labels, probs=probs),
            "sum": probs.sum,
            "argmax": lambda: probs.argmax(1),
        },
        repeat,
    )
    return {
        "ours, seconds": found["ours"],
        "ours / plain sum": found["ours"] / found["sum"],
        "argmax alone / plain sum": found["argmax"] / found["sum"],
    }


def through_evaluate(rows: int, repeat: int) -> dict[str, float]:
    """The evaluate module against the direct call, [N, 10]."""
    import evaluate

    rng = np.random.default_rng(0)
    probs, labels = rng.dirichlet(np.ones(10), rows), rng.integers(0, 10, rows)
    metric = evaluate.load(metric_path("ece"))
    found = timed(
        {
            "direct": lambda: calibration_report(labels, probs=probs),
            "evaluate": lambda: metric.compute(predictions=probs, references=labels),
        },
        repeat,
    )
    return {"direct, seconds": found["direct"], "evaluate / direct": found["evaluate"] / found["direct"]}


def intervals(rows: int, repeat: int) -> dict[str, float]:
    """Interval and p-value of each of 20 groups against one plain pass over each group."""
    rng = np.random.default_rng(0)
    confidence = rng.beta(5, 2, rows)
    groups = rng.integers(0, 20, rows)
    found = {}
    for name, gap in (("calibrated", 0.0), ("wrong by .05", 0.05)):
        correct = rng.random(rows) < confidence - gap
        parts = [(confidence[groups == group], correct[groups == group]) for group in range(20)]
        summed = [Bins.of(cells(c, y, equal_width(15))) for c, y in parts]
        seconds = timed(
            {
                "intervals": lambda summed=summed: [error_interval(evidence(bins)) for bins in summed],
                "plain": lambda parts=parts: [expected_calibration_error(confidence=c, correct=y) for c, y in parts],
            },
            repeat,
        )
        found[f"{name}: intervals / one plain pass per group"] = seconds["intervals"] / seconds["plain"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000, help="rows of the one-dimensional cases")
    parser.add_argument("--repeat", type=int, default=5, help="runs of each; the median counts")
    parser.add_argument("--only", nargs="*", help="names of the cases to run")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    cases: dict[str, tuple[Callable[[int, int], dict[str, float]], int]] = {
        "confidences": (confidences, options.rows),
        "equal_mass": (equal_mass, options.rows),
        "matrix": (matrix, options.rows // 10),
        "through_evaluate": (through_evaluate, options.rows // 10),
        "intervals": (intervals, options.rows // 10),
    }
    for name, (case, rows) in cases.items():
        if not options.only or name in options.only:
            figures = {key: float(f"{value:.4g}") for key, value in case(rows, options.repeat).items()}
            print(json.dumps({"case": name, "rows": rows, **figures}), flush=True)


if __name__ == "__main__":
    main()
