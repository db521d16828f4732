"""Reads the files that people have: Parquet, JSON, JSON lines, and text in columns; each is checked here alone."""

from __future__ import annotations

import csv
import io
import json
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

FILE_KINDS = (".csv", ".json", ".jsonl", ".parquet", ".tsv")
_SEPARATORS = {".csv": ",", ".tsv": "\t"}
_OTHER_SEPARATORS = (",", ";", "\t", "|")
_MISSING = frozenset(("", "na", "nan", "n/a", "null", "none"))  # in a column of numbers; elsewhere they are texts
_BYTE_ORDER_MARKS = {b"\xff\xfe\x00\x00": "utf-32", b"\x00\x00\xfe\xff": "utf-32",
                     b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}  # fmt: skip


def read_rows(path: str | Path) -> Dataset:
    """The rows of a file, or of a folder of Parquet files.

    Text is UTF-8, or UTF-16 with its byte order mark. Columns are separated by what the ending says (`.csv` a comma,
    `.tsv` a tab), or by the one other separator that gives every line as many fields as the header. A column of text
    files is of whole numbers, numbers or booleans where all its values are, else of texts exactly as they stand;
    numbers with leading zeros are texts. A whole number of more than 64 bits is kept as text.

    Args:
        path (`str` or `Path`): ends in one of `FILE_KINDS`.

    Returns:
        `datasets.Dataset`: text files and JSON in memory, Parquet from the disk.

    Raises:
        ValueError: there is no such file, its kind is unknown, it has no row, or it is broken; with the line at fault.

    Example:

    ```python
    >>> import tempfile, pathlib
    >>> from hf_moecal.files import read_rows
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder, "reviews.csv")
    ...     _ = path.write_text("review;stars\\nnot bad, really;4\\n")
    ...     read_rows(path)[0]
    {'review': 'not bad, really', 'stars': 4}

    ```
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"No file at {str(path)!r}; correct the path, or fetch the file first.")
    kind = ".parquet" if path.is_dir() else path.suffix.lower()
    if kind not in FILE_KINDS:
        raise ValueError(
            f"Cannot read {str(path)!r}: a file ends in {', '.join(FILE_KINDS)}; save it as one of these."
        )
    if kind == ".parquet":
        return _parquet(path)
    from datasets import Dataset
    from datasets.table import InMemoryTable

    text = _text(path)
    columns = _objects(text, path) if kind.startswith(".json") else _separated(text, path, _SEPARATORS[kind])
    import pyarrow as pa

    return Dataset(InMemoryTable(pa.table(columns)))


def _parquet(path: Path) -> Dataset:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Dataset

    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"No .parquet file in the folder {str(path)!r}; name a file, or the folder that has them.")
    rows = 0
    for file in files:
        try:
            rows += pq.read_metadata(file).num_rows
        except pa.ArrowInvalid as error:
            raise ValueError(
                f"{str(file)!r} is not a whole Parquet file ({error}); was it cut short, or is it of another kind?"
            ) from error
    if not rows:
        raise ValueError(f"{str(path)!r} holds no row.")
    return Dataset.from_parquet(list(map(str, files)))


def _text(path: Path) -> str:
    raw = path.read_bytes()
    if not raw.strip():
        raise ValueError(f"{str(path)!r} is empty.")
    encoding = next((name for mark, name in _BYTE_ORDER_MARKS.items() if raw.startswith(mark)), "utf-8-sig")
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        at = error.start
        better = shlex.quote(str(path.with_name(f"{path.stem}.utf8{path.suffix}")))
        raise ValueError(
            f"{str(path)!r}, line {raw.count(bytes([10]), 0, at) + 1}: byte 0x{raw[at]:02x} is not {encoding[:5]}. "
            f"Save the file as UTF-8; if it is Windows or Latin-1 text: iconv -f WINDOWS-1252 -t UTF-8 "
            f"{shlex.quote(str(path))} > {better}"
        ) from error
    if "\0" in text:
        raise ValueError(f"{str(path)!r} has zero bytes, so it is no UTF-8 text; save it as UTF-8.")
    return text


def _objects(text: str, path: Path) -> dict[str, pa.Array]:
    """Columns of JSON lines, or of one list of objects."""
    found = list(_listed(text, path) if text.lstrip()[0] == "[" and path.suffix == ".json" else _lines(text, path))
    if not found:
        raise ValueError(f"{str(path)!r} holds no row.")
    for place, row in found:
        if not isinstance(row, dict):
            kind = {list: "a list", str: "a text"}.get(type(row), repr(row))
            raise ValueError(f'{str(path)!r}, {place} holds {kind}, not an object {{"column": value, ...}}.')
    places, rows = [place for place, _ in found], [row for _, row in found]
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: _array(name, [row.get(name) for row in rows], places, path) for name in names}


def _lines(text: str, path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: a text may hold U+2028
        if line.strip():
            yield f"line {number}", _json(line, path, number)


def _listed(text: str, path: Path) -> Iterator[tuple[str, Any]]:
    rows = _json(text, path, 1)
    return ((f"row {number}", row) for number, row in enumerate(rows, 1))


def _json(text: str, path: Path, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {line + error.lineno - 1}"
        raise ValueError(
            f"{str(path)!r}, {where} is not JSON ({error.msg} at character {error.colno}); a .jsonl file has "
            "one object per line."
        ) from error


def _array(name: str, values: list[Any], places: Sequence[str], path: Path) -> pa.Array:
    import pyarrow as pa

    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
        if all(value is None or type(value) is int for value in values):
            return pa.array([None if value is None else str(value) for value in values])
        kinds = [_kind(value) for value in values]
        first = next(kind for kind in kinds if kind)
        odd = next((row for row, kind in enumerate(kinds) if kind not in (None, first)), None)
        if odd is None:
            raise ValueError(f"{str(path)!r}: column {name!r} holds values of different types ({error}).") from error
        raise ValueError(
            f"{str(path)!r}, {places[odd]}: column {name!r} holds {kinds[odd]} here ({values[odd]!r:.60}) and {first} "
            "before; make all rows of one type."
        ) from error


def _kind(value: Any) -> str | None:
    if value is None:
        return None
    kinds: Mapping[type, str] = {bool: "a truth value", int: "a number", float: "a number", str: "a text"}
    return kinds.get(type(value), f"a {type(value).__name__}")


def _separated(text: str, path: Path, own: str) -> dict[str, pa.Array]:
    """Columns of a text whose first line names them."""
    import pyarrow as pa

    records, fault = _records(text, path, own)
    if fault or len(records[0]) == 1:
        others = [_records(text, path, sign) for sign in _OTHER_SEPARATORS if sign != own]
        fitting = [found for found, wrong in others if not wrong and len(found[0]) > 1]
        if len(fitting) == 1:
            records, fault = fitting[0], None
    if fault:
        raise ValueError(fault)
    header = [name.strip() or f"Unnamed: {place}" for place, name in enumerate(records[0])]
    twice = next((name for name in header if header.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{str(path)!r} has two columns {twice!r}; rename one in the first line.")
    if len(records) == 1:
        raise ValueError(f"{str(path)!r} has a header ({', '.join(header)}) and holds no row.")
    columns = zip(*records[1:], strict=True)
    return {name: pa.array(_typed(values)) for name, values in zip(header, columns, strict=True)}


def _records(text: str, path: Path, separator: str) -> tuple[list[list[str]], str | None]:
    """The lines in fields, and what is wrong with the first line that does not fit the header."""
    records: list[list[str]] = []
    limit = csv.field_size_limit(sys.maxsize)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        for record in reader:
            if records and record and len(record) != len(records[0]):
                return records, (
                    f"{str(path)!r}, line {reader.line_num} has {len(record)} fields, the first {len(records[0])} "
                    f"(separated by {separator!r}); a text that holds {separator!r} or a line break must stand in "
                    "double quotes."
                )
            if record:
                records.append(record)
    except csv.Error as error:
        return records or [
            [""]
        ], f"{str(path)!r}, line {reader.line_num}: {error}; check the double quotes up to there."
    finally:
        csv.field_size_limit(limit)
    return records, None


def _typed(values: Sequence[str]) -> list[Any]:
    """The values as whole numbers, numbers or booleans, if all are; else as they stand, and `None` where empty."""
    known = [None if value.strip().lower() in _MISSING else value.strip() for value in values]
    some = [value for value in known if value is not None]
    if some and all(map(_is_whole, some)):
        numbers = [None if value is None else int(value) for value in known]
        return numbers if all(x is None or -(1 << 63) <= x < 1 << 63 for x in numbers) else known
    if some and all(map(_is_number, some)):
        return [None if value is None else float(value) for value in known]
    truth = {"true": True, "false": False}
    if some and all(value.lower() in truth for value in some):
        return [None if value is None else truth[value.lower()] for value in known]
    return [value or None for value in values]


def _is_whole(value: str) -> bool:
    digits = value.removeprefix("-")
    return digits.isascii() and digits.isdigit() and (digits == "0" or digits[0] != "0")


def _is_number(value: str) -> bool:
    digits = value.lstrip("+-")
    if len(digits) > 1 and digits[0] == "0" and digits[1].isdigit():  # 007 is a name
        return False
    try:
        float(value)
    except ValueError:
        return False
    return value.isascii() and "_" not in value
