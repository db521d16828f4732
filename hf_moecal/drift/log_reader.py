"""Reads logs of predictions piece by piece: Parquet, JSON lines, a folder of them that grows, or standard input."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from ..table import names
from .log_checks import Faults, Piece, Rejected, check
from .logs import DERIVED, OPTIONAL, Schema
from .rotation import MARK_BYTES, Position, before, follow_rotation, mark_of


if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger(__name__)

CHUNK_ROWS = 1 << 16
# Lines of a live source from which a column that none of them has is an error; fewer are bad rows.
FEW_LINES = 100
STDIN = "-"
_SUFFIXES = (".parquet", ".jsonl")


def read_log(
    log: str | Path | Any, schema: Schema, *, position: dict[str, Position] | None = None, growing: bool = False
) -> Iterator[Piece]:
    """Reads what is new in a log.

    Args:
        log: a `.parquet` or `.jsonl` file, a folder of them (read in the order of their names), or `"-"` for JSON
            lines on standard input; or a predictions table in memory.
        schema: what every row must hold.
        position: file name -> what was read of it before; entries of rotated files are renamed in place.
        growing: a last JSONL line without its end, or a Parquet file that is not whole yet, is left for the next call
            instead of being a bad row or an error.

    Yields:
        Pieces of at most `CHUNK_ROWS` rows; of standard input, what is there.

    Raises:
        ValueError: there is no such log, a file cannot be read, or a whole source lacks a column.
    """
    position = {} if position is None else position
    if not isinstance(log, (str, Path)):
        yield from _table_pieces(log, schema)
    elif str(log) == STDIN:
        yield from _json_pieces(STDIN, _lines_there(sys.stdin.buffer), schema, b"", 0, live=True)
    else:
        path = Path(log)
        sources = _sources(path, known=bool(growing and position))
        lines = {name: entry for name, entry in position.items() if not name.endswith(".parquet")}
        folder = path if path.is_dir() else path.parent
        known = set(lines)
        found = follow_rotation(folder, [s for s in sources if s.suffix != ".parquet"], lines)
        for name in known - set(lines):
            del position[name]
        position.update(lines)
        for source in sorted(found, key=lambda file: (file in sources, file.name)):
            yield from _file_pieces(source, schema, position.get(source.name), growing=growing)
        for source in sources:
            if source.suffix == ".parquet":
                yield from _parquet_pieces(source, schema, position.get(source.name), growing=growing)


def _sources(log: Path, *, known: bool) -> list[Path]:
    if log.is_dir():
        return sorted(path for path in log.iterdir() if path.suffix in _SUFFIXES and path.is_file())
    if log.suffix not in _SUFFIXES and log.is_file():
        raise ValueError(f"Cannot read {log.name!r}: a log ends in {' or '.join(_SUFFIXES)}, or is '-' for stdin.")
    if not log.is_file():
        if known:  # between its rotation and its new beginning
            return []
        raise ValueError(f"No log at {str(log)!r}; give a {' or '.join(_SUFFIXES)} file, a folder of them, or '-'.")
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


def _parquet_pieces(path: Path, schema: Schema, known: Position | None, *, growing: bool) -> Iterator[Piece]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    stat = f"{path.stat().st_size} {path.stat().st_mtime_ns}"
    if known and known.get("stat") == stat:
        return
    try:
        file = pq.ParquetFile(path, pre_buffer=False)
    except (pa.ArrowInvalid, OSError) as error:
        if growing:  # a file gets its footer last
            return
        raise ValueError(f"{path.name!r} is not a whole Parquet file: {error}") from error
    with file:
        present = file.schema_arrow.names
        _require_columns(path.name, schema, present)
        wanted = _wanted(schema, present)
        done = known["done"] if known else 0
        if done and not any(_row_mark(row) == known["mark"] for row in _batches(file, wanted, done - 1, done)):
            logger.warning("%s was replaced since it was read; it is read from its beginning", path.name)
            done = 0
        row = done
        for batch in _batches(file, wanted, done, file.metadata.num_rows):
            end = row + batch.num_rows
            position = {"done": end, "mark": _row_mark(batch.slice(batch.num_rows - 1))}
            if end == file.metadata.num_rows:
                position["stat"] = stat
            yield _parquet_piece(path.name, batch, schema, row, position)
            row = end


def _batches(file: Any, wanted: list[str], begin: int, end: int) -> Iterator[pa.RecordBatch]:
    """Rows begin to end of a Parquet file."""
    metadata = file.metadata
    ends = np.cumsum([metadata.row_group(i).num_rows for i in range(file.num_row_groups)], dtype=np.int64)
    groups = np.flatnonzero(ends > begin).tolist()
    row = int(ends[groups[0] - 1]) if groups and groups[0] else 0
    for batch in file.iter_batches(CHUNK_ROWS, row_groups=groups, columns=wanted) if groups else ():
        first, last = max(begin - row, 0), min(end - row, batch.num_rows)
        row += batch.num_rows
        if first < last:
            yield batch.slice(first, last - first)
        if row >= end:
            return


def _row_mark(row: pa.RecordBatch) -> str:
    return mark_of(repr(row.to_pylist()).encode())


def _table_pieces(table: Any, schema: Schema) -> Iterator[Piece]:
    import pyarrow as pa

    _require_columns("the table", schema, names(table))
    wanted = _wanted(schema, names(table))
    whole = pa.table({name: _plain(table[name], key=name in ("id", schema.sequence)) for name in wanted})
    row = 0
    for batch in whole.to_batches(CHUNK_ROWS):
        yield _parquet_piece("table", batch, schema, row, {})
        row += batch.num_rows


def _plain(values: Any, *, key: bool) -> list[Any]:
    if key and isinstance(values, (list, tuple)):  # an array would round whole numbers above 64 bits
        return [None if value is None else str(value) for value in values]
    values = np.asarray(values)
    return (values.astype("datetime64[us]") if values.dtype.kind == "M" else values).tolist()


def _parquet_piece(source: str, batch: pa.RecordBatch, schema: Schema, first: int, position: Position) -> Piece:
    faults = Faults(batch.num_rows)
    rows = check(dict(zip(batch.schema.names, batch.columns, strict=True)), schema, faults)
    rejected = [
        Rejected(source, first + row, reason, detail, batch.slice(row, 1).to_pylist()[0])
        for row, (reason, detail) in sorted(faults.found.items())
    ]
    return Piece(source, rows, rejected, faults.places(), position)


def _file_pieces(path: Path, schema: Schema, known: Position | None, *, growing: bool) -> Iterator[Piece]:
    done = known["done"] if known else 0
    tail = before(path, done)
    with path.open("rb") as stream:
        stream.seek(done)
        yield from _json_pieces(path.name, _whole_lines(stream, growing=growing), schema, tail, done, live=growing)


def _whole_lines(stream: IO[bytes], *, growing: bool) -> Iterator[list[bytes]]:
    while lines := list(islice(stream, CHUNK_ROWS)):
        if growing and not lines[-1].endswith(b"\n"):
            lines.pop()
        if not lines:
            return
        yield lines


def _lines_there(stream: IO[bytes]) -> Iterator[list[bytes]]:
    """The lines of a live stream as they come: waiting for more of them would keep a window from being tested."""
    rest = b""
    while data := stream.read1(1 << 20):
        *lines, rest = (rest + data).split(b"\n")
        if lines:
            yield [line + b"\n" for line in lines]
    if rest:
        yield [rest]


def _json_pieces(
    source: str, chunks: Iterator[list[bytes]], schema: Schema, tail: bytes, done: int, *, live: bool
) -> Iterator[Piece]:
    first = done == 0
    for lines in chunks:
        whole = first and not (live and len(lines) < FEW_LINES)
        position = {
            "done": done + sum(map(len, lines)),
            "mark": mark_of(tail := (tail + b"".join(lines))[-MARK_BYTES:]),
        }
        yield _json_piece(source, lines, schema, done, position, whole=whole)
        done, first = position["done"], False


def _json_piece(
    source: str, lines: list[bytes], schema: Schema, begin: int, position: Position, *, whole: bool
) -> Piece:
    starts = begin + np.concatenate([[0], np.cumsum([len(line) for line in lines])])
    places = [i for i, line in enumerate(lines) if line.strip()]
    lines = [lines[i] for i in places]
    faults = Faults(len(lines))
    parsed = _parse(lines, faults)
    present = [*dict.fromkeys(name for row in parsed for name in row)]
    if whole and present:
        _require_columns(source, schema, present)
    wanted = [
        *dict.fromkeys(
            [*_wanted(schema, present), *(n for n in schema.needed if n not in DERIVED or "probs" not in present)]
        )
    ]
    columns = {
        name: _arrow([row.get(name) for row in parsed], _arrow_type(name, schema), name, faults) for name in wanted
    }
    rows = check(columns, schema, faults)
    rejected = [
        Rejected(source, int(starts[places[row]]), reason, detail, lines[row].decode("utf-8", "replace").rstrip("\n"))
        for row, (reason, detail) in sorted(faults.found.items())
    ]
    return Piece(source, rows, rejected, faults.places(), position)


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
    return None


def _arrow(values: list[Any], kind: pa.DataType | None, name: str, faults: Faults) -> pa.Array:
    """The values as an Arrow array; those of another type become null and a fault."""
    import pyarrow as pa

    if kind is None:  # keys and times: numbers or text, as they are written
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
