"""Logs of predictions, and their files."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


EXPERTS = 4


def make_log(n, *, shift=0.0, seed=0, experts=EXPERTS):
    """A log of which `shift` moves confidence, routing and correctness."""
    rng = np.random.default_rng(seed)
    confidence = rng.beta(8 - 4 * shift, 1, n)
    prediction = rng.integers(0, 2, n)
    correct = rng.random(n) < confidence - 0.2 * shift
    return {
        "id": [f"r{i}" for i in range(n)],
        "confidence": confidence.tolist(),
        "prediction": prediction.tolist(),
        "label": np.where(correct, prediction, 1 - prediction).tolist(),
        "routing_entropy": rng.gamma(2 + shift, 0.2, n).tolist(),
        "disagreement": rng.gamma(1 + shift, 0.02, n).tolist(),
        "expert_ids": np.argsort(rng.random((n, experts)) + 0.1 * np.arange(experts), axis=1)[:, :2].tolist(),
        "language": rng.choice(["en", "de"], n).tolist(),
    }


def rows_of(log):
    return [dict(zip(log, values, strict=True)) for values in zip(*log.values(), strict=True)]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_parquet(path, log, **options):
    pq.write_table(pa.table(log), path, **options)
    return path


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def rounded(value):
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.9g}") if isinstance(value, float) else value


REFERENCE = make_log(2000, seed=1)
