"""Gathers the rows of each sequence wherever they fall in a log: one sequence is one observation.

Servers interleave their requests, and users come back. A sequence gathers the rows that come within `span` rows of its
first one, and is then closed; a later row of the same id begins a new one. So sequences close in the order in which
they began, each a fixed number of rows after its beginning, and never more than `span` of them are open: memory is
bounded, and a window is the same however the log is cut into pieces. Ids that come again within a window are counted,
so that the window is worth fewer observations ([`clustering`]).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse

from .logs import Schema


Columns = dict[str, "np.ndarray | sparse.csr_array"]


@dataclass
class Sequences:
    """Some sequences, in the order of their first rows.

    Args:
        key: [n] hash of the id.
        first: [n] number of the first row in the log, rows set aside included.
        rows: [n] rows gathered.
        time: [n] seconds since 1970 of the first row; NaN where the log has none.
        name: [n] `id` of the first row (the sequence's where rows have none), as text; empty if there is neither.
        sums: feature -> [n] or sparse [n, categories], sums over the rows.
    """

    key: np.ndarray
    first: np.ndarray
    rows: np.ndarray
    time: np.ndarray
    name: np.ndarray
    sums: Columns

    def __len__(self) -> int:
        return len(self.first)

    def __getitem__(self, some: Any) -> Sequences:
        sums = {name: values[some] for name, values in self.sums.items()}
        return Sequences(self.key[some], self.first[some], self.rows[some], self.time[some], self.name[some], sums)

    def means(self, names: Any) -> Columns:
        """Means of the named features over the rows of each sequence."""
        if (self.rows == 1).all():
            return {name: self.sums[name] for name in names}
        return {name: _mean(self.sums[name], self.rows) for name in names}

    def arrays(self) -> dict[str, np.ndarray]:
        """As named arrays."""
        found = {"key": self.key, "first": self.first, "rows": self.rows, "time": self.time}
        found["name"] = self.name.astype(str)
        for name, values in self.sums.items():
            if sparse.issparse(values):
                parts = {"data": values.data, "indices": values.indices, "indptr": values.indptr}
                found |= {f"sums/{name}/{part}": array for part, array in parts.items()}
                found[f"sums/{name}/shape"] = np.array(values.shape)
            else:
                found[f"sums/{name}"] = values
        return found

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray]) -> Sequences:
        """From what [`arrays`] gave."""
        sums: Columns = {}
        for name in [name.removeprefix("sums/") for name in arrays if name.startswith("sums/")]:
            if name.endswith("/shape"):
                name = name.removesuffix("/shape")
                parts = tuple(arrays[f"sums/{name}/{part}"] for part in ("data", "indices", "indptr"))
                sums[name] = sparse.csr_array(parts, shape=tuple(arrays[f"sums/{name}/shape"]))
            elif not name.endswith(("/data", "/indices", "/indptr")):
                sums[name] = arrays[f"sums/{name}"]
        plain = (arrays[name] for name in ("key", "first", "rows", "time"))
        return cls(*plain, arrays["name"].astype(object), sums)


def _mean(values: Any, rows: np.ndarray) -> Any:
    if sparse.issparse(values):
        return sparse.csr_array(sparse.diags_array(1 / rows) @ values)
    # The sum of equal numbers is not exactly their multiple; without rounding, ties with the reference break.
    part, exponent = np.frexp(values / rows)
    return np.ldexp(np.round(part * 2**40) / 2**40, exponent)


def clustering(keys: np.ndarray) -> float:
    """How many sequences are worth one independent one, if those of the same id are worth one together (Kish)."""
    counts = np.unique(keys, return_counts=True)[1].astype(np.float64)
    return float((counts**2).sum() / counts.sum()) if len(counts) else 1.0


class Gatherer:
    """Gathers rows to sequences.

    Args:
        schema: what the rows hold.
        span: rows of the log within which a sequence gathers its rows.
    """

    def __init__(self, schema: Schema, *, span: int) -> None:
        self.schema, self.span = schema, span
        self.open: Sequences | None = None

    def add(self, rows: Mapping[str, np.ndarray], features: Columns, places: np.ndarray, end: int) -> list[Sequences]:
        """Adds rows.

        Args:
            rows: checked rows.
            features: their features.
            places: [n] number of each row in the log.
            end: rows of the log until here.

        Returns:
            The sequences that were closed, in the order of their first rows.
        """
        if self.schema.sequence is None:
            return [_each(rows, features, places)]
        keys = _hashes(rows[self.schema.sequence])
        rows = {name: rows.get(name, rows[self.schema.sequence]) for name in {*rows, "id"}}
        closed = []
        begin = 0
        while begin < len(places):  # a block shorter than the span has at most two sequences of an id
            stop = int(np.searchsorted(places, places[begin] + self.span))
            part = slice(begin, stop)
            block = _each({n: rows[n][part] for n in rows}, {n: f[part] for n, f in features.items()}, places[part])
            block.key = keys[part]
            closed.append(self._merge(block, int(places[stop]) if stop < len(places) else end))
            begin = stop
        if not len(places) and self.open is not None:
            closed.append(self._close(end))
        return closed

    def finish(self) -> list[Sequences]:
        """Closes every sequence."""
        left, self.open = self.open, None
        return [] if left is None else [left]

    def _merge(self, block: Sequences, end: int) -> Sequences:
        opened = block[:0] if self.open is None else self.open
        # Of the open sequences of an id, the last may go on.
        order = np.lexsort((opened.first, opened.key))
        last = np.flatnonzero(np.append(opened.key[order][1:] != opened.key[order][:-1], True)[: len(order)])
        live = order[last]
        place = np.minimum(np.searchsorted(opened.key[live], block.key), max(len(live) - 1, 0))
        owner = np.full(len(block), -1)
        if len(live):
            hit = (opened.key[live][place] == block.key) & (block.first < opened.first[live][place] + self.span)
            owner[hit] = live[place[hit]]
        fresh = np.flatnonzero(owner < 0)
        _, begins, which = np.unique(block.key[fresh], return_index=True, return_inverse=True)
        rank = np.argsort(np.argsort(begins))
        owner[fresh] = len(opened) + rank[which]
        total = len(opened) + len(begins)
        into = sparse.csr_array((np.ones(len(block)), (owner, np.arange(len(block)))), shape=(total, len(block)))
        heads = block[fresh[np.sort(begins)]]
        joined = {name: np.concatenate([getattr(opened, name), getattr(heads, name)])
                  for name in ("key", "first", "time", "name")}  # fmt: skip
        rows = np.append(opened.rows, np.zeros(len(begins), np.int64)) + np.bincount(owner, block.rows, total)
        sums = {name: _added(opened.sums[name], into @ block.sums[name], total) for name in block.sums}
        self.open = Sequences(**joined, rows=rows.astype(np.int64), sums=sums)
        return self._close(end)

    def _close(self, end: int) -> Sequences:
        done = int(np.searchsorted(self.open.first, end - self.span, "right"))
        closed, self.open = self.open[:done], self.open[done:]
        return closed


def _added(opened: Any, more: Any, total: int) -> Any:
    if not sparse.issparse(more):
        return np.append(opened, np.zeros(total - len(opened))) + more
    padding = sparse.csr_array((total - opened.shape[0], opened.shape[1]))
    return sparse.csr_array(sparse.vstack([opened, padding], format="csr") + more)


def _each(rows: Mapping[str, np.ndarray], features: Columns, places: np.ndarray) -> Sequences:
    """Every row as a sequence of its own."""
    n = len(places)
    time = rows.get("time", np.full(n, np.nan))
    name = rows["id"] if "id" in rows else np.full(n, "", object)
    return Sequences(np.zeros(n, np.uint64), places, np.ones(n, np.int64), time, name, features)


def _hashes(keys: np.ndarray) -> np.ndarray:
    """64-bit hash of each key, the same in every process."""
    seen, which = np.unique(keys.astype(str), return_inverse=True)
    digests = (hashlib.blake2b(key.encode(), digest_size=8).digest() for key in seen.tolist())
    return np.frombuffer(b"".join(digests), np.uint64)[which] if len(seen) else np.zeros(0, np.uint64)
