"""Tensors on disk, found by key: append-only, memory-mapped, checked, shared by processes, safe against a kill."""

from __future__ import annotations

import json
import os
import uuid
import zlib
from pathlib import Path
from typing import BinaryIO, NamedTuple, TextIO

import numpy as np
import torch
from torch import Tensor


class _Record(NamedTuple):
    states: Path
    offset: int
    shape: tuple[int, ...]
    checksum: int


class StateStore:
    """A folder of tensors of one dtype, each under a key.

    Every store object appends to files of its own and reads everybody's, so any number of processes and runs can share
    a folder. An index line follows its bytes: what a killed run leaves half-written is never taken for whole, and a
    tensor whose checksum is wrong counts as absent.

    Args:
        folder (`Path`): made if missing. All that the tensors depend on belongs into its name.
        dtype (`torch.dtype`): of every tensor.
    """

    def __init__(self, folder: Path, *, dtype: torch.dtype):
        self._folder, self._dtype = folder, dtype
        folder.mkdir(parents=True, exist_ok=True)
        writer = f"{os.getpid()}-{uuid.uuid4().hex[:12]}"
        self._states, self._index = folder / f"states-{writer}.bin", folder / f"index-{writer}.jsonl"
        self._data: BinaryIO | None = None
        self._lines: TextIO | None = None
        self._records: dict[str, _Record] = {}
        self._read_to: dict[Path, int] = {}
        self._maps: dict[Path, np.memmap] = {}
        self.refresh()

    def __contains__(self, key: str) -> bool:
        return key in self._records

    def __len__(self) -> int:
        return len(self._records)

    def get(self, key: str) -> Tensor | None:
        """The tensor under a key, or `None` where there is none or its bytes are damaged."""
        record = self._records.get(key)
        if record is None:
            return None
        size = int(np.prod(record.shape)) * self._dtype.itemsize
        if size == 0:
            return torch.empty(record.shape, dtype=self._dtype)
        data = self._mapped(record.states, record.offset + size)[record.offset : record.offset + size]
        if len(data) < size or zlib.crc32(data) != record.checksum:
            del self._records[key]
            return None
        return torch.frombuffer(bytearray(data), dtype=self._dtype).reshape(record.shape)

    def put(self, key: str, tensor: Tensor) -> None:
        """Stores a tensor; a key that is there already keeps its tensor."""
        if key in self._records:
            return
        if self._data is None or self._lines is None:  # a run that stores nothing leaves no files
            self._data = open(self._states, "xb")
            self._lines = open(self._index, "x", encoding="utf-8")
        data = tensor.detach().to("cpu", self._dtype).contiguous().view(torch.uint8).numpy().tobytes()
        record = _Record(self._states, self._data.tell(), tuple(tensor.shape), zlib.crc32(data))
        self._data.write(data)
        self._lines.write(json.dumps([key, record.offset, record.shape, record.checksum]) + "\n")
        self._records[key] = record

    def flush(self) -> None:
        """Makes what was stored visible to other processes: the bytes first, then their index lines."""
        if self._data is not None and self._lines is not None:
            self._data.flush()
            self._lines.flush()
            self._read_to[self._index] = self._index.stat().st_size

    def close(self) -> None:
        if self._data is not None and self._lines is not None:
            self.flush()
            self._data.close()
            self._lines.close()
        self._maps.clear()

    def refresh(self) -> None:
        """Learns what other processes have stored since the last call."""
        for index in sorted(self._folder.glob("index-*.jsonl")):
            start = self._read_to.get(index, 0)
            if index.stat().st_size <= start:
                continue
            with open(index, "rb") as file:
                file.seek(start)
                content = file.read()
            whole = content[: content.rfind(b"\n") + 1]
            self._read_to[index] = start + len(whole)
            states = index.with_name(index.name.replace("index-", "states-").replace(".jsonl", ".bin"))
            for line in whole.splitlines():
                key, offset, shape, checksum = json.loads(line)
                self._records[key] = _Record(states, offset, tuple(shape), checksum)  # the newest, if one was damaged

    def _mapped(self, states: Path, end: int) -> np.memmap | bytes:
        current = self._maps.get(states)
        if current is None or len(current) < end:
            if states == self._states and self._data is not None:
                self._data.flush()
            if states.stat().st_size == 0:
                return b""
            current = self._maps[states] = np.memmap(states, dtype=np.uint8, mode="r")
        return current
