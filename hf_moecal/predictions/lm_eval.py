"""Reads what lm-evaluation-harness writes with `--log_samples` into a predictions table.

A multiple-choice task is scored by the log-likelihood of each choice. Their softmax over the choices is the model's
distribution over the answers, the one that the harness's `acc` takes the argmax of; that is what gets calibrated.
"""

from __future__ import annotations

import ast
import json
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..table import ABSENT_LOGIT, IGNORED_LABEL


if TYPE_CHECKING:
    from datasets import Dataset

NEWEST = "newest"


class _GeneratedText(ValueError):
    """The samples are of a task whose answers are written, not chosen."""


def read_lm_eval_samples(path: str | Path, *, run: str = NEWEST, filter: str | None = None) -> Dataset:
    """Turns logged samples of multiple-choice tasks into a predictions table, one row per question.

    What was read is compared with the `acc` and `acc_norm` that the harness logged. A target that could be the number
    or the text of a choice is taken for its text, unless only the number agrees with them over the whole file.

    Args:
        path (`str` or `Path`): a `samples_<task>_<date>.jsonl` file, or a folder of them. In a folder, tasks with
            generated answers are left out with a warning.
        run (`str`, *optional*, defaults to `"newest"`): which of a task's runs in a folder is read: `"newest"`, or how
            the date of one begins, such as `"2025-03-01"`. The others are named in a warning.
        filter (`str`, *optional*): which of the harness's filters, where samples were logged for several.

    Returns:
        `datasets.Dataset`: `id` (task and document number), `label`, `logits` (log-likelihood of each choice, in
        nats), `probs`, `prediction`, `confidence`, `group` (the task) and `scoring` (`"total"`). Questions with fewer
        choices than the longest one are padded with choices of probability zero, which changes no figure. Of several
        right choices the likeliest is the label: accuracy and calibration error are exact then, the
        negative log-likelihood and the Brier score are those of the likeliest alone.

    Raises:
        ValueError: there is no such file or run, a line is not a sample of a multiple-choice task, several filters
            were logged and none is named, or the right choice contradicts what the harness computed.

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

    path = Path(path)
    rows = [row for file in _files(path, run) for row in _read_file(file, filter, skip=path.is_dir())]
    if not rows:
        raise ValueError(f"No multiple-choice task among the samples at {str(path)!r}; generated text cannot be read.")
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
            "scoring": ["total"] * len(rows),
        }
    )


def _files(path: Path, run: str) -> list[Path]:
    """The file, or of a folder one run of each task."""
    files = sorted(path.glob("samples_*.jsonl")) if path.is_dir() else [path] if path.is_file() else []
    if not files:
        raise ValueError(
            f"No logged samples at {str(path)!r}; run the harness with --log_samples and give its samples_*.jsonl."
        )
    runs: dict[str, dict[str, Path]] = {}
    for file in files:
        task, date = _named(file)
        runs.setdefault(task, {})[date] = file
    if not path.is_dir():
        return files
    chosen = []
    for task, dated in runs.items():
        dates = sorted(date for date in dated if run == NEWEST or date.startswith(run))
        if not dates or (run != NEWEST and len(dates) > 1):
            raise ValueError(
                f"{len(dates)} runs of {task} in {str(path)!r} begin with {run!r}; those that are there: "
                f"{', '.join(sorted(dated))}."
            )
        chosen.append(dated[dates[-1]])
        others = sorted(file.name for date, file in dated.items() if date != dates[-1])
        if others:
            warnings.warn(
                f"{task} was run several times: {chosen[-1].name} is read, {', '.join(others)} is not.", stacklevel=3
            )
    return chosen


def _named(file: Path) -> tuple[str, str]:
    """Task and date in a file's name: the harness ends it with the date of the run."""
    name = file.stem.removeprefix("samples_")
    task, _, date = name.rpartition("_")
    return (task, date) if task and date[:4].isdigit() else (name, "")


def _read_file(file: Path, wanted: str | None, *, skip: bool) -> list[dict[str, Any]]:
    task = _named(file)[0]
    try:
        samples = _samples(file, wanted)
    except _GeneratedText as error:
        if not skip:
            raise
        warnings.warn(f"{file.name} is left out: {error}", stacklevel=3)
        return []
    ways = {name: [_right(sample, *order) for sample in samples] for name, order in _WAYS.items()}
    for found in ways.values():
        wrong = [sample for sample, right in zip(samples, found, strict=True) if not sample.agrees(right)]
        if not wrong:
            several = sum(len(right or ()) > 1 for right in found)
            if several:
                which = f"{several} questions in {file.name} have several right choices"
                warnings.warn(f"{which}; the likeliest of them is the label.", stacklevel=3)
            labels = [sample.label(right) for sample, right in zip(samples, found, strict=True)]
            return [
                {"id": f"{task}/{sample.document}", "group": task, "logits": sample.scores, "label": label}
                for sample, label in zip(samples, labels, strict=True)
            ]
    raise ValueError(_complaint(samples, ways))


def _complaint(samples: Sequence[_Sample], ways: dict[str, list[set[int] | None]]) -> str:
    """What is wrong with the first sample that no way of reading its target makes sense of, else with the file."""
    for number, sample in enumerate(samples):
        found = [right[number] for right in ways.values()]
        if not any(map(sample.agrees, found)):
            known = [right for right in found if right]
            if not known:
                return (
                    f"{sample.where}: target {sample.target!r} is neither the number of a choice (0 to "
                    f"{len(sample.scores) - 1}) nor the text of exactly one of them."
                )
            return (
                f"{sample.where}: choice {sample.prediction} is the likeliest and {min(known[0])} is right, but the "
                f"harness logged {', '.join(f'{name}={value}' for name, value in sample.logged.items())}; this task "
                "scores its choices in another way and cannot be read."
            )
    return (
        f"{samples[0].where}: some targets of this file agree with the logged acc only as numbers of choices, others "
        "only as their texts; it cannot be read."
    )


def _samples(file: Path, wanted: str | None) -> list[_Sample]:
    found: dict[Any, _Sample] = {}
    filters: set[str] = set()
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{file.name}, line {number}"
        try:
            raw = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where} is not JSON ({error.msg}); the file may be cut off.") from error
        if not isinstance(raw, dict) or "target" not in raw or "filtered_resps" not in raw:
            raise ValueError(f"{where} has no 'target' and 'filtered_resps'; give a file written with --log_samples.")
        filters.add(str(raw.get("filter")))
        if wanted is not None and raw.get("filter") != wanted:
            continue
        sample = _Sample.read(raw, where, raw.get("doc_id", number - 1))
        if sample.document in found:
            several = f"; choose one of its filters with filter= or --filter: {', '.join(sorted(filters))}"
            raise ValueError(
                f"{where} repeats document {sample.document!r}"
                f"{several if len(filters) > 1 else ' of the same run and filter; log the samples anew'}."
            )
        found[sample.document] = sample
    if not found and not filters:
        raise ValueError(f"{file.name} holds no samples; the task may have been run with --limit 0.")
    if not found:
        raise ValueError(f"{file.name} holds no samples of filter {wanted!r}; its filters are {sorted(filters)}.")
    return list(found.values())


class _Sample(NamedTuple):
    """One question, as far as its right choice is not decided yet."""

    where: str
    document: Any
    target: Any
    scores: list[float]
    texts: list[str | None]
    contexts: list[str | None]
    logged: dict[str, float]

    @classmethod
    def read(cls, raw: dict[str, Any], where: str, document: Any) -> _Sample:
        scores = _log_likelihoods(raw["filtered_resps"], where)
        metrics = {*(raw.get("metrics") or ()), *raw}
        if "acc_mutual_info" in metrics:
            scores = scores[: len(scores) // 2]  # the second half is the choices without the question
        pairs = [_texts(argument) for argument in _arguments(raw)][: len(scores)]
        pairs += [(None, None)] * (len(scores) - len(pairs))
        logged = {name: raw[name] for name in ("acc", "acc_norm") if isinstance(raw.get(name), int | float)}
        contexts, texts = ([pair[side] for pair in pairs] for side in (0, 1))
        return cls(where, document, raw["target"], scores, texts, contexts, logged)

    @property
    def prediction(self) -> int:
        return int(np.argmax(self.scores))

    @property
    def is_of_contexts(self) -> bool:
        """Whether one text follows different contexts, which then are the choices (as in winogrande)."""
        return None not in self.texts and len(set(self.texts)) == 1 and len(set(self.contexts)) == len(self.contexts)

    def label(self, right: set[int]) -> int:
        return max(right, key=lambda choice: self.scores[choice]) if right else IGNORED_LABEL

    def agrees(self, right: set[int] | None) -> bool:
        """Whether the harness's own figures are those of these right choices; none are when nobody knows any."""
        if right is None:
            return False
        expected = {"acc": {self.prediction}, "acc_norm": self._likeliest_by_length()}
        return not right or all(
            float(value) in {float(choice in right) for choice in expected[name]} or not expected[name]
            for name, value in self.logged.items()
        )

    def _likeliest_by_length(self) -> set[int]:
        """By length of the choices, which are logged with the delimiter before them, if there is one."""
        if None in self.texts or self.is_of_contexts:
            return set()
        spaces = min(len(text) - len(text.lstrip()) for text in self.texts)
        lengths = [np.array([len(text) - taken for text in self.texts], float) for taken in range(spaces + 1)]
        return {int(np.argmax(np.array(self.scores) / length)) for length in lengths if (length > 0).all()}


def _by_text(sample: _Sample) -> set[int] | None:
    """The choices whose texts are the target, or its parts."""
    known = [None if text is None else text.strip() for text in sample.texts]
    found = [[i for i, text in enumerate(known) if text == str(part).strip()] for part in _parts(sample.target)]
    return {i for matches in found for i in matches} if all(len(matches) == 1 for matches in found) else None


def _by_number(sample: _Sample) -> set[int] | None:
    """The choices whose numbers are the target, or its parts."""
    try:
        found = {int(str(part).strip()) for part in _parts(sample.target)}
    except ValueError:
        return None
    return found if all(0 <= choice < len(sample.scores) for choice in found) else None


def _right(sample: _Sample, *ways: Callable[[_Sample], set[int] | None]) -> set[int] | None:
    """The right choices by the first way that finds any; none of them for a question without an answer."""
    if str(sample.target).strip() == str(IGNORED_LABEL):
        return set()
    if sample.is_of_contexts and len(sample.scores) == 2 and "acc" in sample.logged:
        return {sample.prediction if sample.logged["acc"] else 1 - sample.prediction}
    return next((found for way in ways if (found := way(sample)) is not None), None)


_WAYS = {"text": (_by_text, _by_number), "number": (_by_number, _by_text)}  # which comes first, in a whole file


def _parts(target: Any) -> list[Any]:
    """Several right targets, which the harness logs as the text of a list."""
    if isinstance(target, str) and target.strip()[:1] == "[":
        try:
            target = ast.literal_eval(target.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return [target]
    return list(target) if isinstance(target, list) and target else [target]


def _log_likelihoods(responses: Any, where: str) -> list[float]:
    try:
        scores = [float(score) for score, _ in responses]
    except (TypeError, ValueError) as error:
        raise _GeneratedText(
            f"{where} has no log-likelihood for each choice; generated text cannot be read, only multiple choice."
        ) from error
    if len(scores) < 2:
        raise _GeneratedText(f"{where} has {len(scores)} choice; a calibration needs two or more.")
    bad = [i for i, score in enumerate(scores) if not math.isfinite(score) or score > 1e-6]
    if bad:
        raise ValueError(f"{where}: {scores[bad[0]]} is not a log-likelihood (choice {bad[0]}); run that task again.")
    return scores


def _arguments(sample: dict[str, Any]) -> list[Any]:
    arguments = sample.get("arguments") or []
    if isinstance(arguments, dict):  # newer files: {"gen_args_0": {"arg_0": context, "arg_1": continuation}, ...}
        return [arguments[f"gen_args_{i}"] for i in range(len(arguments)) if f"gen_args_{i}" in arguments]
    return list(arguments)


def _texts(argument: Any) -> tuple[str | None, str | None]:
    """Context and continuation of a choice."""
    values = [argument.get("arg_0"), argument.get("arg_1")] if isinstance(argument, dict) else list(argument)[:2]
    context, text = (value if isinstance(value, str) else None for value in [*values, None, None][:2])
    return context, text
