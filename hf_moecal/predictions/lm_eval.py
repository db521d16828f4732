"""Reads what lm-evaluation-harness writes with `--log_samples` into a predictions table.

A multiple-choice task is scored by the log-likelihood of each choice. Their softmax over the choices is the model's
distribution over the answers, the one that the harness's `acc` takes the argmax of; that is what gets calibrated.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..table import ABSENT_LOGIT, IGNORED_LABEL


if TYPE_CHECKING:
    from datasets import Dataset


def read_lm_eval_samples(path: str | Path) -> Dataset:
    """Turns logged samples of multiple-choice tasks into a predictions table, one row per question.

    Args:
        path (`str` or `Path`): a `samples_<task>_<date>.jsonl` file, or a folder of them.

    Returns:
        `datasets.Dataset`: `id` (task and document number), `label`, `logits` (log-likelihood of each choice, in
        nats), `probs`, `prediction`, `confidence` and `group` (the task). Questions with fewer choices than the
        longest one are padded with choices of probability zero, which changes no figure.

    Raises:
        ValueError: there is no such file, or a line is not a sample of a multiple-choice task with one right answer,
            or it contradicts the `acc` that the harness computed.

    Example:

    ```python
    >>> import json, tempfile, pathlib
    >>> from hf_moecal.predictions.lm_eval import read_lm_eval_samples
    >>> file = pathlib.Path(tempfile.mkdtemp()) / "samples_arc_easy_2025-01-01T00-00-00.jsonl"
    >>> sample = {"doc_id": 0, "target": "1", "filtered_resps": [["-2.0", "False"], ["-1.0", "True"]]}
    >>> _ = file.write_text(json.dumps(sample))
    >>> read_lm_eval_samples(file)["prediction"][:], read_lm_eval_samples(file)["group"][:]
    ([1], ['arc_easy'])

    ```
    """
    from datasets import Dataset

    rows = [row for file in _files(Path(path)) for row in _read_file(file)]
    width = max(len(row["logits"]) for row in rows)
    logits = np.full((len(rows), width), ABSENT_LOGIT)
    for row, padded in zip(rows, logits, strict=True):
        padded[: len(row["logits"])] = row["logits"]
    probs = np.exp(logits - logits.max(1, keepdims=True))
    probs /= probs.sum(1, keepdims=True)
    return Dataset.from_dict(
        {
            "id": [row["id"] for row in rows],
            "label": [row["label"] for row in rows],
            "logits": logits,
            "probs": probs,
            "prediction": logits.argmax(1),
            "confidence": probs.max(1),
            "group": [row["group"] for row in rows],
        }
    )


def _files(path: Path) -> list[Path]:
    files = sorted(path.glob("samples_*.jsonl")) if path.is_dir() else [path] if path.is_file() else []
    if not files:
        raise ValueError(
            f"No logged samples at {str(path)!r}; run the harness with --log_samples and give its samples_*.jsonl."
        )
    return files


def _read_file(file: Path) -> Iterator[dict[str, Any]]:
    task = file.stem.removeprefix("samples_")
    task = task.rpartition("_")[0] or task  # the harness ends the name with the date of the run
    seen: dict[Any, Any] = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{file.name}, line {number}"
        try:
            sample = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where} is not JSON ({error.msg}); the file may be cut off.") from error
        document = sample.get("doc_id", number - 1) if isinstance(sample, dict) else None
        if document in seen:
            raise ValueError(
                f"{where} repeats document {document!r} (filters {seen[document]!r} and {sample.get('filter')!r}); "
                "keep the lines of one filter of one run."
            )
        row = _read_sample(sample, where)
        seen[document] = sample.get("filter")
        yield {"id": f"{task}/{document}", "group": task, **row}
    if not seen:
        raise ValueError(f"{file.name} holds no samples; the task may have been run with --limit 0.")


def _read_sample(sample: Any, where: str) -> dict[str, Any]:
    if not isinstance(sample, dict) or "target" not in sample or "filtered_resps" not in sample:
        raise ValueError(f"{where} has no 'target' and 'filtered_resps'; give a file written with --log_samples.")
    scores = _log_likelihoods(sample["filtered_resps"], where)
    if "acc_mutual_info" in (sample.get("metrics") or ()) or "acc_mutual_info" in sample:
        scores = scores[: len(scores) // 2]  # the second half is the choices without the question
    label = _label(sample, len(scores), where)
    prediction = int(np.argmax(scores))
    if label != IGNORED_LABEL and isinstance(sample.get("acc"), int | float):
        if float(sample["acc"]) != float(prediction == label):
            raise ValueError(
                f"{where}: choice {prediction} is the likeliest and {label} is right, but the harness logged acc="
                f"{sample['acc']}; this task scores its choices in another way and cannot be read."
            )
    return {"logits": scores, "label": label}


def _log_likelihoods(responses: Any, where: str) -> list[float]:
    try:
        scores = [float(score) for score, _ in responses]
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{where} has no log-likelihood for each choice; generated text cannot be read, only multiple choice."
        ) from error
    if len(scores) < 2:
        raise ValueError(f"{where} has {len(scores)} choice; a calibration needs two or more.")
    bad = [i for i, score in enumerate(scores) if not math.isfinite(score) or score > 1e-6]
    if bad:
        raise ValueError(f"{where}: {scores[bad[0]]} is not a log-likelihood (choice {bad[0]}); run that task again.")
    return scores


def _label(sample: dict[str, Any], choices: int, where: str) -> int:
    target = sample["target"]
    try:
        label = target if isinstance(target, int) else int(str(target).strip())
    except ValueError:
        return _label_of_text(sample, str(target), choices, where)
    if label != IGNORED_LABEL and not 0 <= label < choices:
        raise ValueError(f"{where}: target {label} is none of the choices 0..{choices - 1}.")
    return label


def _label_of_text(sample: dict[str, Any], target: str, choices: int, where: str) -> int:
    """The position of the choice whose text is the target; the harness logs either."""
    texts = [_continuation(argument) for argument in _arguments(sample)][:choices]
    matches = [i for i, text in enumerate(texts) if text is not None and text.strip() == target.strip()]
    if len(matches) != 1:
        raise ValueError(
            f"{where}: target {target!r} is neither the number of a choice nor the text of exactly one of them; "
            "questions with several right answers cannot be read."
        )
    return matches[0]


def _arguments(sample: dict[str, Any]) -> list[Any]:
    arguments = sample.get("arguments") or []
    if isinstance(arguments, dict):  # newer files: {"gen_args_0": {"arg_0": context, "arg_1": continuation}, ...}
        return [arguments[f"gen_args_{i}"] for i in range(len(arguments)) if f"gen_args_{i}" in arguments]
    return list(arguments)


def _continuation(argument: Any) -> str | None:
    text = argument.get("arg_1") if isinstance(argument, dict) else argument[1] if len(argument) > 1 else None
    return text if isinstance(text, str) else None
