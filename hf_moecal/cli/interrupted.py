"""What is kept when a command is stopped, by a person or by a full disk, and how to go on."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from torch import nn

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_ROOM_TEXTS = ("No space left on device", "Disk quota exceeded", "File too large")
_NO_ROOM_TEXTS += ("PytorchStreamWriter failed", "iostream error", "unexpected pos")  # all that torch.save says


class NoRoomError(OSError):
    """The disk is full; the message says what is kept."""


def is_no_room(error: BaseException) -> bool:
    """Whether the disk is full; the writers of weights and of tables have errors of their own."""
    known = isinstance(error, OSError) and error.errno in _NO_ROOM
    return known or any(text in str(error) for text in _NO_ROOM_TEXTS)


@contextmanager
def room_for(output_dir: str, model: nn.Module) -> Iterator[None]:
    """Within the block a full disk ends with what was to be written, what it takes, and what is kept.

    The checkpoint that was begun and cannot be used is removed.

    Raises:
        NoRoomError: the disk is full.
    """
    before = set(Path(output_dir).glob("checkpoint-*"))
    try:
        yield
    except Exception as error:
        if not is_no_room(error):
            raise
        free = shutil.disk_usage(output_dir).free
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        states = sum(2 * p.numel() * 4 for p in model.parameters() if p.requires_grad)
        newest = max(Path(output_dir).glob("checkpoint-*"), key=lambda path: path.stat().st_mtime, default=None)
        name = output_dir if newest is None else newest
        if newest is not None and newest not in before and str(newest) != last_complete(output_dir):
            shutil.rmtree(newest, ignore_errors=True)
        raise NoRoomError(
            f"the disk is full: writing {name} takes up to {_size(weights + states)} (weights {_size(weights)}), and "
            f"{_size(free)} are free ({error}). {kept_by_training(output_dir)}"
        ) from error


def last_complete(output_dir: str) -> str | None:
    """The newest checkpoint of a run that was written to its end."""
    from ..training.checkpoints import checkpoint_to_resume

    try:
        return checkpoint_to_resume(True, output_dir)
    except ValueError:
        return None


def kept_by_training(output_dir: str) -> str:
    """The last complete checkpoint of a folder, and how to go on from it."""
    last = last_complete(output_dir)
    if last is None:
        return f"No checkpoint in {output_dir} is complete yet: the training starts anew (save_steps says how often)."
    return f"{last} is complete; go on from it with the same command and --resume."


def kept_by_predicting(output: str | Path) -> str:
    """The finished parts of a table, and how to go on with them."""
    folder = Path(f"{output}.parts")
    parts = len(list(folder.glob("part-*.parquet"))) if folder.is_dir() else 0
    if not parts:
        return "Nothing was finished yet."
    return f"{folder} keeps {parts} finished part{'s' * (parts > 1)}; go on with the same command and --resume."


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
