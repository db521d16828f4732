"""False alarms and detection power of the monitor on simulated traffic, through its public call alone.

    python scripts/monitor_scenarios.py [--windows 200] [--seeds 3] [--output scenarios.json]

Conversations overlap as on a server: each has `length` rows scattered over `span` rows of the log, and any two rows of
one conversation correlate by `rho` in every feature. Run it with another version of the package on `PYTHONPATH` to
compare the two.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from hf_moecal.drift.monitor import monitor


Log = dict[str, np.ndarray]
REFERENCE = 5000


def conversations(
    rows: int, rng: np.random.Generator, *, length: int = 10, span: int = 200, rho: float = 0.8, shift: float = 0.0
) -> Log:
    """Rows of interleaved conversations; `shift` moves every number by that many standard deviations."""
    count = (rows + 2 * span) // length + 1
    owner = np.repeat(np.arange(count), length)
    begin = rng.uniform(-span, rows + span, count)
    offset = np.tile(np.arange(length) / 1000, count) if span <= length else rng.uniform(0, span, len(owner))
    order = np.argsort(begin[owner] + offset, kind="stable")
    owner = owner[order][span : span + rows] if span > length else owner[order][:rows]

    def correlated(columns: int) -> np.ndarray:
        level, own = rng.normal(size=(count, columns)), rng.normal(size=(len(owner), columns))
        return np.sqrt(rho) * level[owner] + np.sqrt(1 - rho) * own

    numbers, classes, experts = correlated(3) + shift, correlated(1)[:, 0], correlated(8)
    return {
        "conversation": owner,
        "confidence": stats.norm.cdf(numbers[:, 0]),
        "routing_entropy": numbers[:, 1],
        "disagreement": numbers[:, 2],
        "prediction": np.searchsorted([-0.7, 0.0, 0.7], classes),
        "expert_ids": np.argsort(-experts, axis=1)[:, :2],
    }


def independent(rows: int, rng: np.random.Generator, *, classes: int = 4, experts: int = 8, **_: Any) -> Log:
    """Independent rows."""
    return {
        "confidence": rng.beta(8, 1, rows),
        "routing_entropy": rng.normal(size=rows),
        "prediction": rng.integers(0, classes, rows),
        "expert_ids": np.argsort(rng.random((rows, experts)), axis=1)[:, :2],
    }


def alarm_rate(reference: Log, current: Log, **settings: Any) -> tuple[int, int]:
    """Windows that alarm, and whole windows."""
    found = [w for w in monitor(reference, current, **settings).windows if w.complete]
    return sum(w.drift for w in found), len(found)


SHORT, LONG = {"length": 10, "span": 200}, {"length": 50, "span": 500}
QUIET = {
    "independent rows, windows of 200": (independent, {}, {"window": 200}, 1),
    "independent rows, windows of 1,000": (independent, {}, {"window": 1000}, 1),
    "conversations of 10, adjacent, windows of 200": (
        conversations, {"length": 10, "span": 0}, {"window": 200, "sequence": "conversation"}, 10),
    "10 over 200 rows, windows of 200": (conversations, SHORT, {"window": 200, "sequence": "conversation"}, 10),
    "10 over 200 rows, windows of 1,000": (conversations, SHORT, {"window": 1000, "sequence": "conversation"}, 10),
    "50 over 500 rows, windows of 200": (conversations, LONG, {"window": 200, "sequence": "conversation"}, 50),
    "10 over 200 rows, windows of 200, no sequence": (conversations, SHORT, {"window": 200}, 1),
    "10 over 200 rows, windows of 1,000, no sequence": (conversations, SHORT, {"window": 1000}, 1),
    "50 over 500 rows, windows of 200, no sequence": (conversations, LONG, {"window": 200}, 1),
    "50 over 500 rows, windows of 1,000, no sequence": (conversations, LONG, {"window": 1000}, 1),
    "8 requests of 20 tokens at a time, windows of 200": (
        conversations, {"length": 20, "span": 160}, {"window": 200, "sequence": "conversation"}, 20),
    "150 classes, windows of 200": (independent, {"classes": 150}, {"window": 200}, 1),
    "200 classes, windows of 200": (independent, {"classes": 200}, {"window": 200}, 1),
    "400 classes, windows of 200": (independent, {"classes": 400}, {"window": 200}, 1),
    "2,000 classes, windows of 200": (independent, {"classes": 2000}, {"window": 200}, 1),
}  # fmt: skip


def false_alarms(*, windows: int, seeds: int, only: str = "") -> dict[str, float]:
    """Share of windows that alarm although nothing changes: `windows` in all, over `seeds` references and logs."""
    found = {}
    for name, (make, how, settings, length) in QUIET.items():
        if only not in name:
            continue
        alarms = total = 0
        for seed in range(seeds):
            rng = np.random.default_rng(seed)
            reference = make(2000 if "classes" in name else REFERENCE * (1 if length == 1 else 3), rng, **how)
            rows = int(windows / seeds * settings["window"]) * min(length, 10)
            drifted, whole = alarm_rate(reference, make(rows, rng, **how), **settings)
            alarms, total = alarms + drifted, total + whole
        found[name] = alarms / max(total, 1)
        print(f"{name}: {found[name]:.3f} of {total}", flush=True)
    return found


def dead_expert(rng: np.random.Generator) -> tuple[Log, Log]:
    log = independent(20_000, rng, experts=64)
    scores = rng.random((20_000, 64))
    scores[:, 17] = -1
    return independent(REFERENCE, rng, experts=64), {**log, "expert_ids": np.argsort(-scores, axis=1)[:, :2]}


def new_class(rng: np.random.Generator) -> tuple[Log, Log]:
    log = independent(4_000, rng)
    return independent(REFERENCE, rng), {**log, "prediction": np.where(rng.random(4_000) < 0.05, 7, log["prediction"])}


def half_rejected(rng: np.random.Generator) -> tuple[Log, Log]:
    log = independent(4_000, rng)
    numbers = np.where(rng.random(4_000) < 0.5, np.nan, log["routing_entropy"])
    return independent(REFERENCE, rng), {**log, "routing_entropy": numbers}


SHIFTS = {
    "one of 64 experts dies, windows of 1,000": (dead_expert, {"window": 1000}),
    "a class never seen takes 5 %, windows of 200": (new_class, {"window": 200}),
    "half of all rows are not finite, windows of 200": (half_rejected, {"window": 200}),
}


def power(*, seeds: int) -> dict[str, float]:
    """Share of windows that alarm where something did change."""
    found = {}
    for name, (make, settings) in SHIFTS.items():
        pairs = [alarm_rate(*make(np.random.default_rng(seed)), **settings) for seed in range(seeds)]
        found[name] = sum(a for a, _ in pairs) / max(sum(n for _, n in pairs), 1)
        print(f"{name}: {found[name]:.3f}", flush=True)
    for sequence in ("conversation", None):
        for shift in (0.5, 1.0):
            pairs = []
            for seed in range(seeds):
                rng = np.random.default_rng(seed)
                reference, log = conversations(15_000, rng), conversations(20_000, rng, shift=shift)
                settings = {"window": 200, "sequence": sequence}
                pairs.append(alarm_rate(reference, log, **settings))
            name = f"10 over 200 rows, all numbers {shift} sd higher" + ("" if sequence else ", no sequence")
            found[name] = sum(a for a, _ in pairs) / max(sum(n for _, n in pairs), 1)
            print(f"{name}: {found[name]:.3f}", flush=True)
    found["late labels: accuracy .82 -> .74 at the same confidence"] = late_labels(seeds=seeds)
    return found


def late_labels(*, seeds: int) -> float:
    """Share of runs whose exit code tells of 20,000 labels in which accuracy fell by .08."""
    heard = 0
    for seed in range(seeds):
        rng = np.random.default_rng(seed)

        def rows(n: int, drop: float, rng: np.random.Generator = rng) -> Log:
            confidence = rng.beta(9, 2, n)
            correct = rng.random(n) < confidence - drop
            return {"id": np.arange(n), "confidence": confidence, "prediction": np.zeros(n, int),
                    "label": (~correct).astype(int)}  # fmt: skip

        log = rows(20_000, 0.08)
        labels = {name: log[name] for name in ("id", "label")}
        heard += monitor(rows(20_000, 0), log, window=1000, labels=labels).exit_code
    print(f"late labels: {heard / seeds:.3f}", flush=True)
    return heard / seeds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=200, help="windows per false-alarm rate")
    parser.add_argument("--seeds", type=int, default=4, help="references and logs over which they are spread")
    parser.add_argument("--only", default="", help="part of the name of the false-alarm scenarios to run")
    parser.add_argument("--output", type=Path, help="JSON file for all figures")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable()
    start = time.perf_counter()
    results = {"false_alarms": false_alarms(windows=arguments.windows, seeds=arguments.seeds, only=arguments.only)}
    if not arguments.only:
        results["power"] = power(seeds=arguments.seeds)
    print(f"{time.perf_counter() - start:.0f} s")
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
