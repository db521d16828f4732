"""What a monitor leaves on disk: its windows, the rows set aside, Prometheus metrics, and the state to go on from.

Lines are appended and forced to disk before the state that counts them is renamed into place. A monitor that is killed
in between finds lines beyond the state when it starts again; it cuts them off and reads the same rows once more. So
every row is counted once and every window is reported once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

import numpy as np

from .exposition import exposition


if TYPE_CHECKING:
    from .log_checks import Rejected

WINDOWS, REJECTED, METRICS = "windows.jsonl", "rejected.jsonl", "metrics.prom"


class MonitorFiles:
    """Writes the files of a monitor.

    Args:
        folder: folder for windows, rejected rows and metrics, or `None` for none of them.
        state: path of the state file, or `None` for none.
    """

    def __init__(self, folder: str | Path | None, state: str | Path | None) -> None:
        self.folder = Path(folder) if folder is not None else None
        self.state = Path(state) if state is not None else None
        self.fingerprint = ""
        for path in (self.folder, self.state and self.state.parent):
            if path:
                path.mkdir(parents=True, exist_ok=True)

    def resume(self, fingerprint: str) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
        """What the last call with this state saved, or `None` if there is none yet.

        Args:
            fingerprint: hash of all that the state depends on.

        Returns:
            What was given to [`save`].

        Raises:
            ValueError: the state is unreadable, or was made with another reference or other settings.
        """
        self.fingerprint = fingerprint
        if self.state is None or not self.state.exists():
            return None  # what other runs left in the folder stays; new lines go after it
        try:
            with np.load(self.state, allow_pickle=False) as saved:
                arrays = dict(saved)
            plain = json.loads(arrays.pop("plain").item())
        except (OSError, ValueError, KeyError, BadZipFile) as error:
            raise ValueError(
                f"The monitor state {self.state.name!r} is unreadable ({error}); delete it to start anew."
            ) from error
        if plain["fingerprint"] != self.fingerprint:
            raise ValueError(
                f"The monitor state {self.state.name!r} was made with another reference or other settings, or by "
                "another version; use those, or another state file."
            )
        self._cut(plain["lengths"])
        return plain["saved"], arrays

    def save(self, saved: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
        """Writes the state, in one step."""
        if self.state is None:
            return
        plain = {"fingerprint": self.fingerprint, "lengths": self._lengths(), "saved": saved}
        partial = self.state.with_name(self.state.name + ".partial")
        with partial.open("wb") as file:
            np.savez(file, plain=np.array(json.dumps(plain)), **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, self.state)

    def record(self, window: Mapping[str, Any]) -> None:
        """Appends a window."""
        self._append(WINDOWS, [window])

    def metrics(
        self, window: Mapping[str, Any] | None, totals: Mapping[str, Any], labelled: Mapping[str, Any] | None
    ) -> None:
        """Rewrites the metrics: the last window, the totals, and what late labels showed."""
        if self.folder is not None:
            partial = self.folder / (METRICS + ".partial")
            partial.write_text(exposition(window, totals, labelled), encoding="utf-8")
            os.replace(partial, self.folder / METRICS)

    def set_aside(self, rows: Sequence[Rejected]) -> None:
        """Appends bad rows with their reasons."""
        self._append(REJECTED, [row.to_dict() for row in rows])

    def _append(self, name: str, items: Sequence[Mapping[str, Any]]) -> None:
        if self.folder is None:
            return
        with (self.folder / name).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(item, default=str) + "\n" for item in items)
            file.flush()
            os.fsync(file.fileno())

    def _lengths(self) -> dict[str, int]:
        files = {name: self.folder / name for name in (WINDOWS, REJECTED)} if self.folder else {}
        return {name: path.stat().st_size if path.exists() else 0 for name, path in files.items()}

    def _cut(self, lengths: Mapping[str, int]) -> None:
        for name, length in lengths.items() if self.folder else ():
            if (self.folder / name).exists():
                os.truncate(self.folder / name, length)
