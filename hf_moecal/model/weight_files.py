"""Which weights lie in a checkpoint folder, told by their content without reading all of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO

from .loading import ADAPTER_CONFIG, ADAPTER_WEIGHTS


WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MEMBERS_FILE = "members.safetensors"
"""The further members of a committee: weights that transformers knows nothing of."""

_READ_WHOLE = 2**16  # bytes: a head, a norm, a small router; what a temperature is baked into is among these
_PIECES, _PIECE = 3, 2**12
_LARGEST_HEADER = 10**8  # as the safetensors format itself has it


def weight_files(folder: str | Path) -> list[Path]:
    """The safetensors files that a checkpoint folder is loaded from, without others that may lie beside them.

    Args:
        folder: with a model, whole or in shards, or with an adapter; and perhaps the members of a committee. A shard
            that the index names is listed whether it is there or not.

    Raises:
        ValueError: the index of a checkpoint in shards cannot be read.
    """
    folder = Path(folder)
    adapted, whole = (folder / ADAPTER_CONFIG).is_file(), (folder / WHOLE).is_file()  # as transformers chooses, too
    if not adapted and not whole and (folder / INDEX).is_file():
        found = [folder / name for name in shard_names(folder / INDEX)]
    else:
        found = [file for file in [folder / (ADAPTER_WEIGHTS if adapted else WHOLE)] if file.is_file()]
    return [*found, *(file for file in [folder / MEMBERS_FILE] if file.is_file())]


def shard_names(index: Path) -> list[str]:
    """Names of the files that the index of a sharded checkpoint lists.

    Raises:
        ValueError: it is no such index.
    """
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        raise ValueError(f"{index.name} is no index of a checkpoint; save the checkpoint again.") from error
    return sorted(names)


def weights_fingerprint(folder: str | Path) -> str | None:
    """A hash of the weights in a checkpoint folder; `None` where there are none in safetensors, or not all of them.

    It reads every small tensor whole and three pieces of 4 KiB of every large one: every step of training changes
    these, and a model of 60 GB takes seconds. It does not depend on how the tensors are spread over files, on their
    order or on their names, which change with versions of transformers; a tied tensor counts once.

    Args:
        folder: a local checkpoint folder.

    Raises:
        ValueError: a file is no safetensors file, or was cut short.

    Example:

    ```python
    >>> import tempfile, torch
    >>> from safetensors.torch import save_file
    >>> from hf_moecal.model.weight_files import weights_fingerprint
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     none = weights_fingerprint(folder)
    ...     save_file({"a": torch.zeros(3)}, f"{folder}/model.safetensors")
    ...     first = weights_fingerprint(folder)
    ...     save_file({"a": torch.ones(3)}, f"{folder}/model.safetensors")
    ...     none is None, first == weights_fingerprint(folder)
    (True, False)

    ```
    """
    files = weight_files(folder)
    if not all(file.is_file() for file in files):
        return None
    found = {digest for file in files for digest in _tensor_digests(file)}
    return blake2b(b"".join(sorted(found)), digest_size=16).hexdigest() if found else None


def _tensor_digests(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        header, start = _header(file, path)
        tensors = [entry for name, entry in header.items() if name != "__metadata__"]
        if path.stat().st_size < start + max((entry["data_offsets"][1] for entry in tensors), default=0):
            raise ValueError(f"{path.name} was cut short; save the checkpoint again.")
        for entry in tensors:
            begin, end = entry["data_offsets"]
            digest = blake2b(f"{entry['dtype']} {entry['shape']} ".encode(), digest_size=16)
            for offset, size in _pieces(end - begin):
                file.seek(start + begin + offset)
                digest.update(file.read(size))
            yield digest.digest()


def _header(file: BinaryIO, path: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file (eight bytes of its length before it), and where the tensors begin."""
    length = int.from_bytes(file.read(8), "little")
    try:
        if length > _LARGEST_HEADER:
            raise ValueError("its header is too long")
        return dict(json.loads(file.read(length))), 8 + length
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path.name} is no safetensors file ({error}); save the checkpoint again.") from error


def _pieces(size: int) -> Iterator[tuple[int, int]]:
    """Offset and length of what is read of a tensor of so many bytes."""
    if size <= _READ_WHOLE:
        yield 0, size
    else:
        yield from ((size * number // (_PIECES + 1), _PIECE) for number in range(1, _PIECES + 1))
