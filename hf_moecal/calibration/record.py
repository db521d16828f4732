"""`calibration.json`: what was done to a checkpoint's probabilities, as plain, strictly checked JSON.

The file may come from anyone. It is read as bounded JSON and nothing else: no pickle, no code, and no path that it
names is opened.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hf_moecal.table import SCORINGS


FILE_NAME = "calibration.json"
FORMAT, VERSION = "hf_moecal.calibration", 1
MAX_BYTES = 32 * 2**20
MAX_DEPTH = 8
_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}\Z")


@dataclass(frozen=True)
class CalibrationRecord:
    """The contents of `calibration.json`.

    Args:
        method: name of the calibrator, such as `"temperature"`.
        parameters: what the calibrator needs to be rebuilt.
        data: where it was fitted: `name`, `revision`, `n`, `seed`, `folds`; whatever is known.
        before, after: calibration figures on held-out rows without and with the calibrator.
        comparison: one entry per method that was compared.
        warnings: what the user should know about the fit.
        versions: of the libraries that wrote the file.
        baked: how the calibration became part of the weights (then it must not be applied again), or `None`.
        readout: what predicts, where that is not the checkpoint's own logits: `kind`, `experts`, `members` (see
            [`~hf_moecal.readouts.mixture.Readout`]); the method's parameters are of its predictions.
        scoring: how the answer options were scored whose scores the method calibrates, one of
            [`~hf_moecal.table.SCORINGS`]; `None` where it calibrates the model's own logits.
        zero: what probabilities that rounding had made zero were taken for in the fit.
        weights: of what weights it is: `fingerprint` of the checkpoint's own, and of an adapter's `base` (see
            [`~hf_moecal.model.weight_files.weights_fingerprint`]).
        conditions: under what the predictions were made that it was fitted on: `dtype`, `attention`, `experts`,
            `quantization`.
    """

    method: str
    parameters: dict[str, Any]
    data: dict[str, Any] = field(default_factory=dict)
    before: dict[str, Any] | None = None
    after: dict[str, Any] | None = None
    comparison: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    baked: dict[str, Any] | None = None
    readout: dict[str, Any] | None = None
    scoring: str | None = None
    zero: float | None = None
    weights: dict[str, str] | None = None
    conditions: dict[str, str] | None = None


def read_record(path: str | Path) -> CalibrationRecord:
    """Reads and checks a calibration record; `path` is the file or the folder that holds it.

    Raises:
        ValueError: the file is missing, too large, not strict JSON, or not a calibration record.
    """
    path = _file_in(path)
    where = repr(path.name)
    fields = read_versioned(path, kind=FORMAT, version=VERSION)
    for name, check in _FIELDS.items():
        if name in fields and not check(fields[name]):
            raise ValueError(f"{where} has a wrong {name!r}: got {_shown(fields[name])}.")
    unknown = sorted(set(fields) - set(_FIELDS))
    if unknown or not {"method", "parameters"} <= set(fields):
        raise ValueError(f"{where} must have 'method' and 'parameters' and no unknown entry; got {_shown(unknown)}.")
    return CalibrationRecord(**fields)


def read_versioned(path: Path, *, kind: str, version: int, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """Entries of a strict JSON object that names its format and version, without these two.

    Raises:
        ValueError: it is not strict JSON, not of this kind, or of another version.
    """
    content = read_json(path, max_bytes=max_bytes)
    if not isinstance(content, dict) or content.pop("format", None) != kind:
        raise ValueError(f"{path.name!r} is not of the right kind: its 'format' must be {kind!r}.")
    found = content.pop("version", None)
    if type(found) is not int or found != version:
        raise ValueError(
            f"{path.name!r} has version {_shown(found)}; this hf_moecal reads version {version}. "
            "Use the hf_moecal that wrote it, or make the file anew."
        )
    return content


def write_record(path: str | Path, record: CalibrationRecord) -> Path:
    """Writes a calibration record so that a reader sees the whole file or the old one, never a part."""
    path = Path(path)
    path = path / FILE_NAME if path.is_dir() else path
    content = {"format": FORMAT, "version": VERSION, **{k: v for k, v in asdict(record).items() if v is not None}}
    return write_json(path, content)


def write_json(path: Path, content: dict[str, Any]) -> Path:
    """Writes strict JSON (a number that is not finite becomes null) through a temporary file beside `path`."""
    return write_text(path, json.dumps(strict(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> Path:
    """Writes a text through a temporary file beside `path`: a full disk or a kill leaves the old file."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def read_json(path: Path, *, max_bytes: int = MAX_BYTES) -> Any:
    """Reads bounded, strict JSON: regular file, UTF-8, finite numbers, no repeated key, at most 8 levels deep.

    Raises:
        ValueError: any of these does not hold.
    """
    where = f"{path.name!r}"
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ValueError(f"{where} is not a regular file.")
            raw = file.read(max_bytes + 1)
    except OSError as error:
        raise ValueError(f"{where} cannot be read: {error.strerror}.") from error
    if len(raw) > max_bytes:
        raise ValueError(f"{where} is larger than {max_bytes >> 20} MiB, which no file of this kind is.")
    try:
        content = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_refuse,
            parse_float=_finite,
            parse_int=_bounded,
        )
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deep" if isinstance(error, RecursionError) else str(error)[:200]
        raise ValueError(f"{where} is not strict JSON: {reason}.") from error
    if _depth_exceeds(content, MAX_DEPTH):
        raise ValueError(f"{where} is nested deeper than {MAX_DEPTH} levels.")
    return content


def is_number(value: Any) -> bool:
    """A JSON number (a bool is none)."""
    return type(value) in (int, float)


def _file_in(path: str | Path) -> Path:
    path = Path(path)
    file = path / FILE_NAME if path.is_dir() else path
    if not file.exists():
        raise ValueError(f"There is no {FILE_NAME} at {str(path)!r}: fit one with `moecal calibrate`.")
    return file


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # a named pipe must not make the reader wait


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key appears twice")
    return result


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not a number in JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:20]} is out of range")
    return value


def _bounded(text: str) -> int:
    if len(text) > 19:
        raise ValueError(f"the number {text[:20]}... is out of range")
    return int(text)


def _depth_exceeds(value: Any, allowed: int) -> bool:
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return allowed < 0 or any(_depth_exceeds(child, allowed - 1) for child in children)


def strict(value: Any) -> Any:
    """The value as JSON can hold it: numpy becomes plain, a number that is not finite becomes null."""
    if isinstance(value, dict):
        return {str(key): strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict(item) for item in value]
    if hasattr(value, "tolist"):  # numpy scalars and arrays
        return strict(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "..."


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 2000


def is_plain(value: Any) -> bool:
    """Scalars, short texts, and lists or named groups of them: figures, not structures."""
    if isinstance(value, dict):
        return all(len(key) <= 500 and is_plain(item) for key, item in value.items())
    if isinstance(value, list):
        return all(is_plain(item) for item in value)
    return value is None or isinstance(value, bool) or is_number(value) or _is_text(value)


def _is_texts(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_text, value.values()))


def _is_figures(value: Any) -> bool:
    return value is None or isinstance(value, dict) and is_plain(value)


_FIELDS = {
    "method": lambda value: isinstance(value, str) and bool(_NAME.match(value)),
    "parameters": lambda value: isinstance(value, dict),
    "data": lambda value: isinstance(value, dict) and is_plain(value),
    "before": _is_figures,
    "after": _is_figures,
    "comparison": lambda value: isinstance(value, list) and all(isinstance(v, dict) and is_plain(v) for v in value),
    "warnings": lambda value: isinstance(value, list) and all(map(_is_text, value)),
    "versions": _is_texts,
    "baked": _is_figures,
    "readout": _is_figures,
    "scoring": lambda value: value is None or value in SCORINGS,
    "zero": lambda value: value is None or (is_number(value) and 0 < value < 1),
    "weights": _is_texts,
    "conditions": _is_texts,
}
