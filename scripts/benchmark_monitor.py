"""Measures the monitor: false alarms, detection of a real shift, delay on a slow ramp, throughput and memory.

    python scripts/benchmark_monitor.py [--data DIR] [--tables DIR] [--output results.json]

Predictions come from `--tables` (one predictions table per domain, `movie.parquet`, `tweets.parquet`, ..., as a run
leaves them), or from a soft mixture of four linear experts over TF-IDF that is trained here on movie sentences in a
few seconds. The article's listing (`ks_2samp` per feature on all rows, alarm at p < 0.05) is the baseline. Its
threshold is its own; the monitor runs at alpha 0.05 here so that both claim the same rate.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from hf_moecal.drift.logs import encode, read_reference
from hf_moecal.drift.monitor import monitor
from hf_moecal.drift.windows import WindowStream


DOMAINS = ("movie", "tweets", "reviews", "editorials")
ALPHA = 0.05
Log = dict[str, np.ndarray]


def text_mixture(folder: Path, *, experts: int = 4, seed: int = 0) -> dict[str, Log]:
    """Predictions of a soft mixture of linear experts, trained on half of the movie sentences, on all other
    sentences."""
    import pandas
    from sklearn.cluster import KMeans
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    frames = {name: pandas.read_parquet(folder / f"{name}.parquet") for name in DOMAINS}
    chosen = np.random.default_rng(seed).permutation(len(frames["movie"]))
    train, frames["movie"] = (
        frames["movie"].iloc[chosen[: len(chosen) // 2]],
        frames["movie"].iloc[chosen[len(chosen) // 2 :]],
    )
    words = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True).fit(train.text)
    topics = TruncatedSVD(50, random_state=seed).fit(words.transform(train.text))
    router = KMeans(experts, n_init=4, random_state=seed).fit(topics.transform(words.transform(train.text)))

    def routing(text: Any) -> np.ndarray:
        distance = router.transform(topics.transform(words.transform(text))) ** 2
        logits = -distance / 0.02
        shares = np.exp(logits - logits.max(axis=1, keepdims=True))
        return shares / shares.sum(axis=1, keepdims=True)

    shares = routing(train.text)
    heads = [
        LogisticRegression(C=20, max_iter=300).fit(
            words.transform(train.text), train.label, sample_weight=shares[:, k]
        )
        for k in range(experts)
    ]
    return {name: _mix(frame, words, routing(frame.text), heads) for name, frame in frames.items()}


def _mix(frame: Any, words: Any, shares: np.ndarray, heads: list) -> Log:
    each = np.stack([head.predict_proba(words.transform(frame.text)) for head in heads], axis=1)
    probs = np.einsum("nk,nkc->nc", shares, each)
    ordered = np.sort(shares, axis=1)
    return {
        "confidence": probs.max(axis=1),
        "prediction": probs.argmax(axis=1),
        "label": frame.label.to_numpy(),
        "routing_entropy": -(shares * np.log(shares + 1e-300)).sum(axis=1),
        "routing_margin": ordered[:, -1] - ordered[:, -2],
        "disagreement": (shares * ((each - probs[:, None]) ** 2).sum(axis=2)).sum(axis=1),
        "expert_ids": np.argsort(-shares, axis=1)[:, :2],
    }


def read_tables(folder: Path) -> dict[str, Log]:
    """Predictions tables of a run, one file per domain."""
    from hf_moecal.table import columns, names, read_table

    wanted = ("confidence", "prediction", "label", "routing_entropy", "routing_margin", "disagreement", "expert_ids")
    tables = {name: read_table(folder / f"{name}.parquet") for name in DOMAINS}
    return {name: columns(table, *[c for c in wanted if c in names(table)]) for name, table in tables.items()}


def draw(log: Log, n: int, rng: np.random.Generator) -> Log:
    """n rows, with replacement."""
    rows = rng.integers(0, len(log["confidence"]), n)
    return {name: values[rows] for name, values in log.items()}


def draw_tokens(log: Log, sequences: int, rng: np.random.Generator, *, tokens: int = 20, rho: float = 0.9) -> Log:
    """Sequences of tokens: every feature keeps its distribution over all tokens; two of a sequence correlate by
    rho."""
    owner = np.repeat(np.arange(sequences), tokens)
    level = rng.normal(size=sequences)[owner]
    rank = stats.norm.cdf(np.sqrt(rho) * level + np.sqrt(1 - rho) * rng.normal(size=len(owner)))
    order = np.argsort(log["confidence"], kind="stable")
    rows = order[np.minimum((rank * len(order)).astype(int), len(order) - 1)]
    return {"sequence": owner, **{name: values[rows] for name, values in log.items()}}


def article_alarm(reference: Log, window: Log) -> bool:
    """The article's listing: any feature with p < 0.05, every row an observation."""
    numbers = [
        name for name in ("confidence", "routing_entropy", "routing_margin", "disagreement") if name in reference
    ]
    return any(stats.ks_2samp(reference[name], window[name]).pvalue < 0.05 for name in numbers)


class Alarm:
    """The monitor's test of one window after another against one reference."""

    def __init__(self, reference: Log, *, sequence: str | None = None, **settings: Any) -> None:
        self.schema, rows = read_reference(reference, sequence=sequence)
        self.stream = WindowStream(self.schema, rows, alpha=ALPHA, **settings)

    def __call__(self, window: Log) -> bool:
        classes = self.schema.categories["prediction"]
        rows = {**window, "prediction": encode(window["prediction"].tolist(), classes)}
        if self.schema.sequence:
            rows[self.schema.sequence] = rows[self.schema.sequence].astype(str)
        list(self.stream.add(rows))
        (found,) = self.stream.finish()
        return found.drift


def false_alarms(log: Log, *, windows: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Share of windows that alarm although reference and window come from one distribution, each pair drawn anew."""
    found = []
    for kind, make, sequence in (("sentences", draw, None), ("tokens of sequences", draw_tokens, "sequence")):
        for size in (200, 1000) if sequence is None else (200,):
            alarms = {"article": 0, "monitor, minimum effect 0": 0, "monitor": 0}
            for _ in range(windows):
                reference, window = make(log, 3000 if sequence is None else 1000, rng), make(log, size, rng)
                alarms["article"] += article_alarm(reference, window)
                alarms["monitor, minimum effect 0"] += Alarm(reference, sequence=sequence, minimum_effect=0)(window)
                alarms["monitor"] += Alarm(reference, sequence=sequence)(window)
            rates = {name: count / windows for name, count in alarms.items()}
            found.append({"data": kind, "window": size, "windows": windows, **rates})
            print(found[-1], flush=True)
    return found


def detection(logs: dict[str, Log], *, windows: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Share of windows of each shifted domain that alarm."""
    alarm, reference = Alarm(logs["movie"]), logs["movie"]
    found = []
    for name in DOMAINS[1:]:
        for size in (200, 1000):
            drawn = [draw(logs[name], size, rng) for _ in range(windows)]
            rates = {
                "article": np.mean([article_alarm(reference, w) for w in drawn]),
                "monitor": np.mean([alarm(w) for w in drawn]),
            }
            found.append({"shift": f"movie -> {name}", "window": size, **{k: float(v) for k, v in rates.items()}})
            print(found[-1], flush=True)
    return found


def ramp(logs: dict[str, Log], *, runs: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Ten quiet windows, then tweets rise from 0 to 100 % over 40: alarms before the ramp, and the share at the
    first."""
    found = []
    shares = np.concatenate([np.zeros(10), np.arange(1, 41) / 40])
    for size in (200, 1000):
        early = {"article": 0, "monitor": 0}
        first: dict[str, list[float]] = {"article": [], "monitor": []}
        for _ in range(runs):
            reference = draw(logs["movie"], 3000, rng)
            alarm = Alarm(reference)
            windows = [_blend(logs, size, share, rng) for share in shares]
            for name, test in (("article", lambda w, r=reference: article_alarm(r, w)), ("monitor", alarm)):
                alarms = [test(window) for window in windows]
                early[name] += any(alarms[:10])
                first[name].append(next((s for s, a in zip(shares[10:], alarms[10:], strict=True) if a), np.inf))
        found.append(
            {"window": size, **{f"{n}: runs with an alarm before the ramp": early[n] / runs for n in early}}
            | {f"{n}: share of tweets at the first alarm": float(np.median(first[n])) for n in first}
        )
        print(found[-1], flush=True)
    return found


def _blend(logs: dict[str, Log], size: int, share: float, rng: np.random.Generator) -> Log:
    tweets = rng.binomial(size, share)
    parts = [draw(logs["tweets"], tweets, rng), draw(logs["movie"], size - tweets, rng)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def estimates(logs: dict[str, Log]) -> list[dict[str, Any]]:
    """The label-free estimate against the truth, for each shifted domain."""
    found = []
    for name in DOMAINS[1:]:
        result = monitor(logs["movie"], logs[name]).windows[0]
        truth = float((logs[name]["prediction"] == logs[name]["label"]).mean())
        keep = ("reference_accuracy", "accuracy", "accuracy_se", "signed_gap", "uncovered")
        found.append(
            {"shift": f"movie -> {name}", **{key: result.estimate[key] for key in keep}, "true_accuracy": truth}
        )
        print(
            {key: value if isinstance(value, str) else round(value, 3) for key, value in found[-1].items()}, flush=True
        )
    return found


_MEASURE = """
import json, re, sys, time
import pyarrow.parquet, scipy.stats, datasets
from hf_moecal.drift.monitor import monitor
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read()).group(1))
before = peak()
start = time.perf_counter()
result = monitor(sys.argv[1], sys.argv[2], window=int(sys.argv[3]), features=[f"x{i}" for i in range(4)], alpha=0.01)
seconds = time.perf_counter() - start
found = {"seconds": seconds, "windows": len(result.windows)}
print(json.dumps({**found, "mib_over_imports": (peak() - before) / 1024, "peak_mib": peak() / 1024}))
"""


def throughput() -> list[dict[str, Any]]:
    """Rows per second and memory over the imports, for ten features: eight numbers, class mix, expert load."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        reference = Path(folder) / "reference.parquet"
        _write_log(reference, 20_000, seed=0)
        for rows, ending, window in ((1_000_000, "parquet", 1_000_000), (4_000_000, "parquet", 1_000_000),
                                     (1_000_000, "parquet", 10_000), (200_000, "jsonl", 200_000)):  # fmt: skip
            log = Path(folder) / f"log.{ending}"
            _write_log(log, rows, seed=1)
            command = [sys.executable, "-c", _MEASURE, str(reference), str(log), str(window)]
            measured = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            found.append({"rows": rows, "format": ending, "window": window, **measured})
            found[-1]["rows_per_second"] = rows / measured["seconds"]
            print(found[-1], flush=True)
    return found


def _write_log(path: Path, rows: int, *, seed: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(seed)
    numbers = {"confidence": rng.beta(8, 1, rows)}
    numbers |= {name: rng.random(rows) for name in ("routing_entropy", "routing_margin", "disagreement")}
    numbers |= {f"x{i}": rng.normal(size=rows) for i in range(4)}
    first = rng.integers(0, 64, rows)
    ids = np.stack([first, (first + rng.integers(1, 64, rows)) % 64], axis=1)
    lists = pa.FixedSizeListArray.from_arrays(pa.array(ids.ravel()), 2)
    table = pa.table({**numbers, "prediction": rng.integers(0, 4, rows), "expert_ids": lists})
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path.home() / ".cache" / "hf_moecal" / "data", help="sentences")
    parser.add_argument("--tables", type=Path, help="predictions tables of a run instead")
    parser.add_argument("--windows", type=int, default=1000, help="simulated windows per false-alarm rate")
    parser.add_argument("--output", type=Path, help="JSON file for all figures")
    arguments = parser.parse_args()
    rng, start = np.random.default_rng(0), time.perf_counter()
    logs = read_tables(arguments.tables) if arguments.tables else text_mixture(arguments.data)
    print(
        {
            name: f"{len(log['label'])} rows, accuracy {(log['prediction'] == log['label']).mean():.3f}"
            for name, log in logs.items()
        }
    )
    results = {
        "throughput": throughput(),
        "detection": detection(logs, windows=200, rng=rng),
        "estimates": estimates(logs),
        "ramp": ramp(logs, runs=20, rng=rng),
        "false_alarms": false_alarms(logs["movie"], windows=arguments.windows, rng=rng),
    }
    print(f"{time.perf_counter() - start:.0f} s in all")
    if arguments.output:
        arguments.output.write_text(json.dumps({"alpha": ALPHA, **results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
