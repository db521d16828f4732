"""What a checkpoint says of itself, as strict JSON beside the weights: how it was trained, on what, how it did."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from ..calibration.record import is_number, is_plain, read_versioned, strict, write_json
from ..readouts.recorded import stale, weights_record
from .card_sources import published_name


TRAINING_FILE, EVALUATION_FILE = "moecal_training.json", "moecal_evaluation.json"
_TRAINING = {"kind": "hf_moecal.training", "version": 1, "max_bytes": 256 * 2**20}
_EVALUATION = {"kind": "hf_moecal.evaluation", "version": 1}
_NUMBERS = ("ece", "ece_debiased", "ece_noise_floor", "nll", "brier", "accuracy", "signed_gap")


class TrainingIds:
    """The ids of the rows that a model was trained on, kept as 64-bit hashes: `"id" in training_ids`.

    A hash says whether an id was there without telling the ids; two ids clash once in 2**64 / n.
    """

    def __init__(self, hashes: np.ndarray) -> None:
        self._hashes = np.sort(hashes)

    def __contains__(self, key: object) -> bool:
        if not isinstance(key, str):
            return False
        wanted = _hash(key)
        place = int(np.searchsorted(self._hashes, wanted))
        return place < len(self._hashes) and self._hashes[place] == wanted

    def __len__(self) -> int:
        return len(self._hashes)

    def __iter__(self) -> Iterable[str]:
        raise TypeError("Training ids are kept as hashes and cannot be listed; ask `key in training_ids`.")


def write_training_record(model_dir: str | Path, *, settings: Mapping[str, Any], ids: Iterable[str] = ()) -> Path:
    """Writes `moecal_training.json`: how the checkpoint was trained, and hashes of the ids of its training rows.

    The file is published: of a setting that is a local path only the last part is written.

    Args:
        model_dir: folder of the checkpoint.
        settings: plain values such as `objective`, `eta`, `base_model`, `dataset`, `dataset_revision`, `seed`.
        ids: text ids of the training rows. Row numbers are not ids: they mean another row in every file.

    Raises:
        ValueError: a setting is not a plain value, or an id is not text.
    """
    if not is_plain(dict(settings)):
        raise ValueError("settings must be texts, numbers, and lists or mappings of them.")
    hashes = np.unique(np.array([_hash(key) for key in ids], dtype="<u8"))
    settings = {name: published_name(value) for name, value in settings.items()}
    content = {"settings": settings, "ids": base64.b64encode(hashes.tobytes()).decode("ascii")}
    return _write(Path(model_dir) / TRAINING_FILE, _TRAINING, content)


def load_training_settings(model_dir: str | Path) -> dict[str, Any]:
    """The settings in `moecal_training.json`; empty if there is no such file."""
    return _read_training(model_dir).get("settings", {})


def load_training_ids(model_dir: str | Path) -> TrainingIds | None:
    """The ids that the checkpoint was trained on, or `None` when it does not say.

    Give them to `fit(table, training_ids=...)`, which then refuses a table with such rows.
    """
    text = _read_training(model_dir).get("ids", "")
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise ValueError(f"{TRAINING_FILE!r} has 'ids' that are not base64.") from error
    if len(raw) % 8:
        raise ValueError(f"{TRAINING_FILE!r} has 'ids' of {len(raw)} bytes; each id takes 8.")
    return TrainingIds(np.frombuffer(raw, dtype="<u8")) if raw else None


def write_evaluation(
    model_dir: str | Path,
    sets: Mapping[str, Mapping[str, Any]],
    *,
    calibrated: Mapping[str, Mapping[str, Any]] | None = None,
    dataset: Mapping[str, str] | None = None,
) -> Path:
    """Writes `moecal_evaluation.json`, from which `push` makes the card's table and its `model-index`.

    The file says of which weights it is, and is not published with others.

    Args:
        model_dir: folder of the checkpoint.
        sets: for each evaluation set, what `calibration_report` gave of the checkpoint's own probabilities;
            `report["groups"]` is such a mapping.
        calibrated: the same of its probabilities after the calibration in `calibration.json`.
        dataset: `id` (on the Hub, if it is there), `revision`, `split`, as far as known; with the `task_id` of a
            benchmark on the Hub and one set, `push` enters its accuracy there as well.

    Raises:
        ValueError: a set lacks `ece` or `n`, or a value is not plain.
    """
    both = {"sets": sets, **({} if calibrated is None else {"calibrated": calibrated})}
    content = {kind: {name: dict(figures) for name, figures in found.items()} for kind, found in both.items()}
    weights = weights_record(model_dir)
    content = strict({**content, "dataset": dict(dataset or {}), **({"weights": weights} if weights else {})})
    _check_evaluation(content)
    return _write(Path(model_dir) / EVALUATION_FILE, _EVALUATION, content)


def fresh_evaluation(model_dir: str | Path) -> dict[str, Any] | None:
    """The same as [`load_evaluation`] gives, if it is of the weights in the folder.

    Raises:
        ValueError: the weights were changed after the evaluation.
    """
    found = load_evaluation(model_dir)
    reason = None if found is None else stale(found.get("weights"), model_dir)
    if reason is not None:
        raise ValueError(
            f"{EVALUATION_FILE} is not of this checkpoint: {reason}. Evaluate it anew (`push --table`, or "
            f"push(evaluation=...)), or delete {EVALUATION_FILE}."
        )
    return found


def load_evaluation(model_dir: str | Path) -> dict[str, Any] | None:
    """`sets`, `calibrated` and `dataset` of `moecal_evaluation.json`, or `None` if there is no such file."""
    path = Path(model_dir) / EVALUATION_FILE
    if not path.exists():
        return None
    content = read_versioned(path, **_EVALUATION)
    _check_evaluation(content)
    return content


def _check_evaluation(content: Mapping[str, Any]) -> None:
    sets, dataset = content.get("sets"), content.get("dataset", {})
    after = content.get("calibrated", {})
    is_whole = all(isinstance(part, dict) and is_plain(part) for part in (sets, after, content.get("weights", {})))
    if not sets or not is_whole or set(content) - {"sets", "calibrated", "dataset", "weights"}:
        raise ValueError(
            "An evaluation needs 'sets' (name: figures) with plain values, and may have 'calibrated' ones and a "
            "'dataset'."
        )
    for name, figures in [*sets.items(), *after.items()]:
        if not isinstance(figures, dict) or not {"ece", "n"} <= set(figures):
            raise ValueError(f"Evaluation set {name[:60]!r} needs at least 'ece' and 'n'; use calibration_report.")
        if type(figures["n"]) is not int or not all(_is_figure(figures.get(key)) for key in _NUMBERS):
            raise ValueError(f"Evaluation set {name[:60]!r} must have a whole 'n' and numbers as figures.")
        if not all(_is_interval(figures.get(key)) for key in ("ece_interval", "signed_gap_interval")):
            raise ValueError(f"Evaluation set {name[:60]!r} must have intervals of two numbers.")
    if not isinstance(dataset, dict) or not all(isinstance(value, str) for value in dataset.values()):
        raise ValueError("'dataset' of an evaluation must map 'id', 'revision', 'split' to texts.")


def _is_figure(value: Any) -> bool:
    return value is None or is_number(value)


def _is_interval(value: Any) -> bool:
    return value is None or (isinstance(value, list) and len(value) == 2 and all(map(_is_figure, value)))


def _read_training(model_dir: str | Path) -> dict[str, Any]:
    path = Path(model_dir) / TRAINING_FILE
    if not path.exists():
        return {}
    content = read_versioned(path, **_TRAINING)
    settings = content.get("settings")
    if not isinstance(settings, dict) or not is_plain(settings) or set(content) - {"settings", "ids"}:
        raise ValueError(f"{path.name!r} must have 'settings' with plain values, and 'ids'.")
    return content


def _write(path: Path, kind: Mapping[str, Any], content: Mapping[str, Any]) -> Path:
    return write_json(path, {"format": kind["kind"], "version": kind["version"], **content})


def _hash(key: str) -> np.uint64:
    if not isinstance(key, str):
        raise ValueError(f"Training ids must be text; got {key!r}, which means another row in every file.")
    return np.frombuffer(blake2b(key.encode("utf-8"), digest_size=8).digest(), dtype="<u8")[0]
