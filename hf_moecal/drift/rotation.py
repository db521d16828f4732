"""Finds the files of a log again after they were rotated, as `tail -F` does.

A file is known by what was read of it: the bytes just before the place where the reading stopped. If the file of that
name holds other bytes there (it was renamed and begun anew, or copied and truncated, whatever its length now), the
rest of what was read is looked for in the files beside it whose name begins alike (`log.jsonl.1`,
`log-20250101.jsonl`), and the new file is read from its beginning.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any


logger = logging.getLogger(__name__)

MARK_BYTES = 1024
Position = dict[str, Any]  # `done` (rows of a Parquet file, else bytes), `mark` (hash of what comes before)


def mark_of(content: bytes) -> str:
    """Hash of the last bytes that were read."""
    return hashlib.sha256(content[-MARK_BYTES:]).hexdigest()


def before(path: Path, done: int) -> bytes:
    """The bytes before `done`, at most MARK_BYTES."""
    with path.open("rb") as file:
        start = max(0, done - MARK_BYTES)
        file.seek(start)
        return file.read(done - start)


def is_continued(path: Path, position: Position) -> bool:
    """Whether the file is the one that was read up to this position."""
    done = position["done"]
    return path.is_file() and path.stat().st_size >= done and mark_of(before(path, done)) == position["mark"]


def follow_rotation(folder: Path, sources: list[Path], position: dict[str, Position]) -> list[Path]:
    """Renames the entries of `position` whose files were rotated.

    Args:
        folder: where the log lies.
        sources: its JSON lines files as they are now.
        position: file name -> where its reading stopped; changed in place.

    Returns:
        The files to read, rotated ones first; each from its `position`, or from its beginning.
    """
    moved = {name: entry for name, entry in position.items() if not is_continued(folder / name, entry)}
    for name in moved:
        del position[name]
    current = {path.name for path in sources}
    for name, entry in moved.items():
        beside = (path for path in sorted(folder.iterdir()) if path.name.startswith(Path(name).stem))
        free = (path for path in beside if path.name != name and path.name not in position)
        found = next((path for path in free if is_continued(path, entry)), None)
        if found:
            position[found.name] = entry
        elif name in current:
            logger.warning(
                "%s was replaced, and no file beside it goes on from what was read (byte %d): rows that were written "
                "after the last look are lost. Keep the rotated file uncompressed until the next look.",
                name,
                entry["done"],
            )
    rotated = [folder / name for name in position if name not in current]
    return [*rotated, *sources]
