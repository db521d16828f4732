"""A [`CalibrationAccumulator`] as bytes and back, to send it from one process to another (no pickle)."""

from __future__ import annotations

import io
import json

import numpy as np

from .accumulator import CalibrationAccumulator
from .inputs import Rows


def to_bytes(accumulator: CalibrationAccumulator) -> bytes:
    """Everything that an accumulator without `fold_bins` has collected."""
    rows = [Rows.concatenate(accumulator.rows)] if accumulator.rows else []
    arrays = {f"row_{name}": values for part in rows for name, values in part._asdict().items() if values is not None}
    arrays |= {f"codes_{i}": np.concatenate(parts) for i, parts in enumerate(accumulator.codes.values()) if parts}
    head = {
        "mode": accumulator.mode,
        "n_ignored": accumulator.n_ignored,
        "groups": [[column, list(known)] for column, known in accumulator.groups.known.items()],
    }
    buffer = io.BytesIO()
    np.savez(buffer, head=np.frombuffer(json.dumps(head).encode(), np.uint8), **arrays)
    return buffer.getvalue()


def from_bytes(data: bytes) -> CalibrationAccumulator:
    """The accumulator that [`to_bytes`] wrote."""
    with np.load(io.BytesIO(data), allow_pickle=False) as stored:
        head = json.loads(stored["head"].tobytes())
        accumulator = CalibrationAccumulator(mode=head["mode"])
        accumulator.n_ignored = head["n_ignored"]
        rows = {name: stored[f"row_{name}"] for name in Rows._fields if f"row_{name}" in stored}
        if rows:
            accumulator.rows.append(Rows(**rows))
            accumulator.groups.encode(dict(head["groups"]))
            accumulator.codes = {column: [stored[f"codes_{i}"]] for i, (column, _) in enumerate(head["groups"])}
    return accumulator
