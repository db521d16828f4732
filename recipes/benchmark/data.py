"""The tasks' sets, tokenized: what is trained on, what a temperature is fitted on, what is judged."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from benchmark.settings import HARD_BELOW, Budget, Task
from datasets import Dataset, concatenate_datasets
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hf_moecal.cli.recipe import expand


MAX_LENGTH = {"sentiment": 64, "topics": 64, "newsgroups": 32}
_CLUSTERS = 6
_KEPT = ("input_ids", "label", "domain", "id", "hard")


class Sets(NamedTuple):
    """The rows of a task, each with `input_ids`, `label`, `domain`, `id` and `hard` (`None` where nobody knows).

    Attributes:
        train, validation, test (`datasets.Dataset`): of the sources.
        unseen (`dict[str, datasets.Dataset]`): by name.
        num_labels (`int`): classes.
    """

    train: Dataset
    validation: Dataset
    test: Dataset
    unseen: dict[str, Dataset]
    num_labels: int


def load_task(task: Task, budget: Budget) -> Sets:
    """Reads the sets of a task; rows are drawn with a seed of their own, the same for all runs."""
    whole = _read(task.data)
    domains = np.asarray(whole["domain"])
    sources = whole.select(np.flatnonzero(np.isin(domains, task.sources)).tolist())
    splits = {name: _split(sources, name) for name in ("train", "validation", "test")}
    splits["train"] = _spread(splits["train"], min(len(task.sources), 3) * budget.train, task.sources)
    splits |= {
        name: _sample(splits[name], count) for name, count in (("validation", budget.unseen), ("test", budget.unseen))
    }
    unseen = {name: whole.select(np.flatnonzero(domains == name).tolist()) for name in task.unseen}
    if task.data == "newsgroups":  # many small ones: judged as one set
        unseen = {"unseen newsgroups": concatenate_datasets(list(unseen.values()))}
    unseen = {name: _sample(rows, budget.unseen // len(unseen)) for name, rows in unseen.items()}
    return Sets(
        **{name: _encode(rows, task.data) for name, rows in splits.items()},
        unseen={name: _encode(rows, task.data) for name, rows in unseen.items()},
        num_labels=1 + max(whole["label"]),
    )


def source_of(rows: Dataset, task: Task) -> list[int]:
    """The source of each row, among at most `experts - 1`: domains are grouped where there are more."""
    if task.data == "newsgroups":  # by what their names begin with, so that a specialist sees several subjects
        stems = sorted({name.split(".")[0] for name in task.sources})
        place = {stem: number % (task.experts - 1) for number, stem in enumerate(stems)}
        return [place[name.split(".")[0]] for name in rows["domain"]]
    place = {name: number % (task.experts - 1) for number, name in enumerate(task.sources)}
    return [place[name] for name in rows["domain"]]


@cache
def _read(family: str) -> Dataset:
    names = ("movie", "tweets", "reviews", "editorials") if family == "sentiment" else (family,)
    parts = [Dataset.from_parquet(str(Path(expand("${MOECAL_CACHE}")) / "data" / f"{name}.parquet")) for name in names]
    whole = concatenate_datasets(parts)
    agreement = np.asarray(whole["agreement"], dtype=float)
    hard = [None if np.isnan(value) else bool(value < HARD_BELOW) for value in agreement]
    whole = whole.remove_columns("agreement").add_column("hard", hard)
    if family == "topics":
        whole = whole.remove_columns("domain").add_column("domain", _clusters(whole["text"][:]))
    return whole


def _clusters(texts: Sequence[str]) -> list[str]:
    """Topics by k-means on latent semantics (no label is looked at), named "0" to "5" from the largest on."""
    from sklearn.cluster import KMeans
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.preprocessing import normalize

    words = TfidfVectorizer(min_df=5, max_df=0.5, stop_words="english", sublinear_tf=True).fit_transform(texts)
    points = normalize(TruncatedSVD(50, random_state=0).fit_transform(words))
    found = KMeans(_CLUSTERS, n_init=4, random_state=0).fit_predict(points)
    rank = np.argsort(np.argsort(-np.bincount(found, minlength=_CLUSTERS), kind="stable"), kind="stable")
    return [str(rank[cluster]) for cluster in found]


def _split(rows: Dataset, name: str) -> Dataset:
    return rows.select([number for number, split in enumerate(rows["split"]) if split == name])


def _sample(rows: Dataset, count: int) -> Dataset:
    order = np.random.default_rng(0).permutation(len(rows))[:count]
    return rows.select(np.sort(order).tolist())


def _spread(rows: Dataset, count: int, sources: Sequence[str]) -> Dataset:
    """At most `count` rows, equally many of each source as far as it has them."""
    domains, rng, chosen = np.asarray(rows["domain"]), np.random.default_rng(0), []
    for source in sources:
        chosen += rng.permutation(np.flatnonzero(domains == source))[: count // len(sources)].tolist()
    return rows.select(sorted(chosen))


def _encode(rows: Dataset, family: str) -> Dataset:
    encoded = tokenizer()(rows["text"][:], truncation=True, max_length=MAX_LENGTH[family])["input_ids"]
    kept = rows.select_columns([name for name in _KEPT if name in rows.column_names])
    return kept.add_column("input_ids", encoded)


@cache
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(expand("${MOECAL_CACHE}/models/SmolLM2-135M-Instruct"))
