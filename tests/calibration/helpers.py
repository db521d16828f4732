"""Drawn tables that the tests of calibrators share."""

from __future__ import annotations

import numpy as np


def drawn(count: int, classes: int = 4, *, seed: int = 0, spread: float = 1.5) -> tuple[np.ndarray, np.ndarray]:
    """Logits and labels drawn from their softmax, so that the true temperature is one."""
    rng = np.random.default_rng(seed)
    logits = spread * rng.normal(size=(count, classes))
    return logits, (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)


def routed(count: int = 800, *, seed: int = 0) -> dict[str, np.ndarray]:
    """A table with every column that a calibrator can read."""
    rng = np.random.default_rng(seed)
    logits, label = drawn(count, seed=seed)
    weights = rng.dirichlet([1, 1], count)
    return {
        "id": np.array([f"row-{i}" for i in range(count)]),
        "logits": 2 * logits,
        "label": label,
        "group": rng.choice(["a", "b", "c"], count),
        "expert_ids": np.stack([rng.choice(6, 2, replace=False) for _ in range(count)]),
        "expert_weights": weights,
        "expert_logits": 2 * logits[:, None] + rng.normal(size=(count, 2, 4)),
        "routing_entropy": -(weights * np.log(weights)).sum(axis=1),
        "routing_margin": np.abs(weights[:, 0] - weights[:, 1]),
        "disagreement": 0.1 * rng.random(count),
        "regret": np.maximum(0, rng.normal(size=count)),
    }
