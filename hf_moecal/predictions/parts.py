"""A table in the making: part files that survive a kill, know what they were made from, and become one file."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from accelerate import PartialState
    from datasets import Dataset
    from pyarrow import Table

_KEY = b"hf_moecal"


def digest(rows: Dataset, examples: Sequence[Any]) -> str:
    """Hash of the rows' content and of the tokens that were made from it."""
    import pyarrow as pa

    table, sink = rows.with_format("arrow")[:].combine_chunks(), pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema.remove_metadata()) as stream:
        stream.write_table(table.replace_schema_metadata(None))
    found = hashlib.blake2b(sink.getvalue(), digest_size=16)
    found.update(repr(list(examples)).encode())
    return found.hexdigest()


class Parts:
    """The parts of one table, each with the stamp of what it was made from.

    Args:
        output (`Path`): the file that the parts become; they lie in a folder beside it until then.
        settings (`Mapping`): what all parts depend on, and a resumed run must have in common with the killed one.
        resume (`bool`): whether parts may be there already.
        state (`PartialState`): the processes that share the parts.

    Raises:
        ValueError: parts of an earlier run are there and `resume` is not set; or, later, parts are of other settings
            or other data.
    """

    def __init__(self, output: Path, settings: Mapping[str, Any], *, resume: bool, state: PartialState) -> None:
        self._output, self._settings, self._state = output, dict(settings), state
        self._folder = output.with_name(f"{output.name}.parts")
        begun = any(self._folder.glob("part-*.parquet"))  # an empty folder has nothing to lose
        if begun and not resume:
            raise ValueError(
                f"{self._folder} holds the parts of a run that did not end; go on with it (resume=True, or --resume), "
                "or delete that folder."
            )
        self.finished = resume and output.is_file() and not begun
        """Whether a resumed run has nothing to do but check."""
        state.wait_for_everyone()  # until each has looked
        if not self.finished:
            self._folder.mkdir(parents=True, exist_ok=True)

    def has(self, number: int, content: str) -> bool:
        """Whether the part is there, made from this content under these settings."""
        path = self._path(number)
        if not path.is_file():
            return False
        self._compare(path, content)
        return True

    def check(self, contents: Sequence[str]) -> None:
        """Compares the finished file with the contents of the parts that it should have been made from."""
        self._compare(self._output, _joined(contents))

    def write(self, number: int, table: Table, content: str) -> None:
        """Writes a part; whole, or not at all."""
        import pyarrow.parquet as pq

        partial = self._folder / f"{number}.partial"
        pq.write_table(self._stamped(table, content), partial)
        os.replace(partial, self._path(number))

    def join(self, count: int) -> None:
        """Makes the file of all parts, on the main process, when every process is done."""
        self._state.wait_for_everyone()
        if self._state.is_main_process:
            self._join([self._path(number) for number in range(count)])
        self._state.wait_for_everyone()

    def _join(self, paths: Sequence[Path]) -> None:
        import pyarrow.parquet as pq

        files = [pq.read_schema(path) for path in paths]
        some = [path for path in paths if pq.read_metadata(path).num_rows] or paths[:1]
        schema = pq.read_schema(some[0])
        content = _joined([json.loads(file.metadata[_KEY])["data"] for file in files])
        partial = self._output.with_name(f"{self._output.name}.partial")
        with pq.ParquetWriter(partial, self._stamped(schema.empty_table(), content).schema) as writer:
            for path in some:
                writer.write_table(pq.read_table(path).cast(writer.schema))
        os.replace(partial, self._output)
        shutil.rmtree(self._folder)

    def _path(self, number: int) -> Path:
        return self._folder / f"part-{number:06d}.parquet"

    def _stamped(self, table: Table, content: str) -> Table:
        stamp = json.dumps({"settings": self._settings, "data": content}).encode()
        return table.replace_schema_metadata({**(table.schema.metadata or {}), _KEY: stamp})

    def _compare(self, path: Path, content: str) -> None:
        import pyarrow.parquet as pq

        stamp = json.loads((pq.read_schema(path).metadata or {}).get(_KEY, b"{}"))
        known = stamp.get("settings", {})
        other = [f"{name} {known.get(name)!r}, now {value!r}" for name, value in self._settings.items()
                 if known.get(name, ...) != value]  # fmt: skip
        if stamp.get("data") != content:
            other.append("other data")
        if other:
            raise ValueError(
                f"{path} was made with {'; '.join(other)}. Resume with what it was begun with, or start again under "
                "another name."
            )


def _joined(contents: Sequence[str]) -> str:
    return hashlib.blake2b("".join(contents).encode(), digest_size=16).hexdigest()
