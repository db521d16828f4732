"""Reads logs of predictions piece by piece: Parquet, JSON lines, a folder of them that grows, or standard input."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from ..table import names
from .log_checks import Faults, Piece, Rejected, check
from .logs import DERIVED, OPTIONAL, Schema


if TYPE_CHECKING:
    import pyarrow as pa

CHUNK_ROWS = 1 << 16
STDIN = "-"
_SUFFIXES = (".parquet", ".jsonl")


def read_log(
    log: str | Path | Any, schema: Schema, *, position: Mapping[str, int] | None = None, growing: bool = False
) -> Iterator[Piece]:
    """Reads what is new in a log.

    Args:
        log: a `.parquet` or `.jsonl` file, a folder of them (read in the order of their names), or `"-"` for JSON
        lines
            on standard input; or a predictions table in memory.
        schema: what every row must hold.
        position: per source what was read before (rows of a Parquet file, bytes of a JSONL file).
        growing: a last JSONL line without its end, or a Parquet file that is not whole yet, is left for the next call
            instead of being a bad row or an error.

    Yields:
        Pieces of at most `CHUNK_ROWS` rows.

    Raises:
        ValueError: there is no such log, a file cannot be read, or a whole source lacks a column.
    """
    position = position or {}
    if not isinstance(log, (str, Path)):
        yield from _table_pieces(log, schema)
        return
    if str(log) == STDIN:
        yield from _json_pieces(STDIN, sys.stdin.buffer, schema, 0, growing=False)
        return
    for path in _sources(Path(log)):
        done = position.get(path.name, 0)
        if path.suffix == ".parquet":
            yield from _parquet_pieces(path, schema, done, growing=growing)
            continue
        if path.stat().st_size < done:
            raise ValueError(
                f"{path.name!r} is shorter than when it was read before; a log may grow, not be rewritten."
            )
        with path.open("rb") as stream:
            stream.seek(done)
            yield from _json_pieces(path.name, stream, schema, done, growing=growing)


def _sources(log: Path) -> list[Path]:
    if log.is_dir():
        return sorted(path for path in log.iterdir() if path.suffix in _SUFFIXES and path.is_file())
    if not log.is_file():
        raise ValueError(f"No log at {str(log)!r}; give a {' or '.join(_SUFFIXES)} file, a folder of them, or '-'.")
    if log.suffix not in _SUFFIXES:
        raise ValueError(f"Cannot read {log.name!r}: a log ends in {' or '.join(_SUFFIXES)}, or is '-' for stdin.")
    return [log]


def _require_columns(source: str, schema: Schema, present: list[str]) -> None:
    missing = [name for name in schema.needed if name not in present and not (name in DERIVED and "probs" in present)]
    if missing:
        raise ValueError(
            f"{source!r} has no column {', '.join(map(repr, missing))}, which the reference has (it has {present}); "
            "log it, or leave the feature out of the reference."
        )


def _wanted(schema: Schema, present: list[str]) -> list[str]:
    lacking = [name for name in schema.needed if name not in present]
    return [name for name in (*schema.needed, *OPTIONAL, *(["probs"] if lacking else [])) if name in present]


def _parquet_pieces(path: Path, schema: Schema, done: int, *, growing: bool) -> Iterator[Piece]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path, pre_buffer=False)
    except (pa.ArrowInvalid, OSError) as error:
        if growing:  # a file gets its footer last
            return
        raise ValueError(f"{path.name!r} is not a whole Parquet file: {error}") from error
    with file:
        present = file.schema_arrow.names
        _require_columns(path.name, schema, present)
        ends = np.cumsum([file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)], dtype=np.int64)
        if len(ends) and ends[-1] < done:
            raise ValueError(
                f"{path.name!r} has fewer rows than when it was read before; write new rows to a new file."
            )
        groups = np.flatnonzero(ends > done).tolist()
        row = int(ends[groups[0] - 1]) if groups and groups[0] else 0
        batches = file.iter_batches(CHUNK_ROWS, row_groups=groups, columns=_wanted(schema, present)) if groups else ()
        for batch in batches:
            first = max(done, row)
            row += batch.num_rows
            if row > first:
                yield _parquet_piece(path.name, batch.slice(batch.num_rows - (row - first)), schema, first)


def _table_pieces(table: Any, schema: Schema) -> Iterator[Piece]:
    import pyarrow as pa

    _require_columns("the table", schema, names(table))
    wanted = _wanted(schema, names(table))
    whole = pa.table({name: np.asarray(table[name]).tolist() for name in wanted})
    row = 0
    for batch in whole.to_batches(CHUNK_ROWS):
        yield _parquet_piece("table", batch, schema, row)
        row += batch.num_rows


def _parquet_piece(source: str, batch: pa.RecordBatch, schema: Schema, first: int) -> Piece:
    faults = Faults(batch.num_rows)
    rows = check(dict(zip(batch.schema.names, batch.columns, strict=True)), schema, faults)
    rejected = [
        Rejected(source, first + row, reason, detail, batch.slice(row, 1).to_pylist()[0])
        for row, (reason, detail) in sorted(faults.found.items())
    ]
    return Piece(source, rows, rejected, first + batch.num_rows)


def _json_pieces(source: str, stream: IO[bytes], schema: Schema, position: int, *, growing: bool) -> Iterator[Piece]:
    first = position == 0
    while lines := list(islice(stream, CHUNK_ROWS)):
        if growing and not lines[-1].endswith(b"\n"):
            lines.pop()
        if not lines:
            return
        yield _json_piece(source, lines, schema, position, first=first)
        position, first = position + sum(map(len, lines)), False


def _json_piece(source: str, lines: list[bytes], schema: Schema, position: int, *, first: bool) -> Piece:
    starts = position + np.concatenate([[0], np.cumsum([len(line) for line in lines])])
    places = [i for i, line in enumerate(lines) if line.strip()]
    lines = [lines[i] for i in places]
    faults = Faults(len(lines))
    parsed = _parse(lines, faults)
    present = [*dict.fromkeys(name for row in parsed for name in row)]
    if first and present:
        _require_columns(source, schema, present)
    wanted = [*dict.fromkeys([*_wanted(schema, present), *(n for n in schema.needed if n not in DERIVED)])]
    columns = {
        name: _arrow([row.get(name) for row in parsed], _arrow_type(name, schema), name, faults) for name in wanted
    }
    rows = check(columns, schema, faults)
    rejected = [
        Rejected(source, int(starts[places[row]]), reason, detail, lines[row].decode("utf-8", "replace").rstrip("\n"))
        for row, (reason, detail) in sorted(faults.found.items())
    ]
    return Piece(source, rows, rejected, int(starts[-1]))


def _parse(lines: list[bytes], faults: Faults) -> list[dict[str, Any]]:
    """One object per line, empty where a line is none (a fault)."""
    try:
        parsed = json.loads(b"[" + b",".join(lines) + b"]")  # all at once is three times as fast
        if len(parsed) == len(lines) and all(isinstance(row, dict) for row in parsed):
            return parsed
    except ValueError:
        pass
    parsed = []
    for i, line in enumerate(lines):
        try:
            row = json.loads(line)
        except ValueError as error:
            faults.found[i] = ("not JSON", str(error))
            row = {}
        if not isinstance(row, dict):
            faults.found[i] = ("not an object", f"the line holds a {type(row).__name__}")
            row = {}
        parsed.append(row)
    return parsed


def _arrow_type(name: str, schema: Schema) -> pa.DataType | None:
    import pyarrow as pa

    if name in schema.numbers:
        return pa.float64()
    if name in schema.categories:
        return pa.array(schema.categories[name]).type
    if name == "expert_ids":
        return pa.list_(pa.int64()) if len(schema.experts or ()) == 1 else pa.list_(pa.list_(pa.int64()))
    if name == "probs":
        return pa.list_(pa.float64())
    return pa.int64() if name == "label" else None


def _arrow(values: list[Any], kind: pa.DataType | None, name: str, faults: Faults) -> pa.Array:
    """The values as an Arrow array; those of another type become null and a fault."""
    import pyarrow as pa

    if kind is None:  # keys: numbers or text, compared as they are written
        return pa.array([None if value is None else str(value) for value in values], pa.string())
    try:
        return pa.array(values, kind)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        usable = []
        for i, value in enumerate(values):
            try:
                usable.append(pa.scalar(value, kind).as_py())
            except (pa.ArrowInvalid, pa.ArrowTypeError):
                usable.append(None)
                faults.found.setdefault(i, (f"wrong type: {name}", f"{name} is {value!r:.80}"))
        return pa.array(usable, kind)
