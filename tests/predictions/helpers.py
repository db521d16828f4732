"""Data that the tests of predictions share."""

import numpy as np

from tests.tasks.helpers import examples


def quiz(count=9, *, words=False, few_shot=20, seed=5):
    """Rows whose prompts begin with the same tokens; one has no label."""
    shared = np.random.default_rng(seed).integers(1, 48, few_shot).tolist()
    rows = examples(count, words=words, seed=seed)
    for row in rows:
        row["prompt_ids"] = shared + row["prompt_ids"]
    return [*rows[:2], {**rows[2], "label": -100}, *rows[3:]]


def lists(rows):
    return [{name: values.tolist() for name, values in row.items()} for row in rows]
