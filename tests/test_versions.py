"""The range of versions: what setup.py states is what is tested, and what differs within it has one place."""

import re
from pathlib import Path

import pytest

from hf_moecal.versions import CACHE_NAMES, cache_name, given_cache, with_cache


ROOT = Path(__file__).parents[1]


def pins(file: str) -> dict[str, str]:
    lines = [line.split("==") for line in (ROOT / file).read_text().lower().splitlines() if "==" in line]
    return {name.replace("-", "_"): version for name, version in lines}


def test_stated_floors_are_the_tested_ones():
    stated = re.findall(r'"([A-Za-z_-]+)>=([0-9.]+)', (ROOT / "setup.py").read_text().split("install_requires")[1])
    floors = pins("constraints-floor.txt")
    assert {"transformers", "huggingface_hub", "tqdm", "datasets"} <= {name for name, _ in stated}
    for name, version in stated:
        if name != "torch":  # constraints-floor.txt says why
            assert floors[name.replace("-", "_")].startswith(version), (name, version)


def test_the_pinned_versions_lie_within_the_stated_ones():
    lowest, highest = re.search(r'"transformers>=([0-9.]+),<([0-9.]+)"', (ROOT / "setup.py").read_text()).groups()
    number = lambda text: tuple(map(int, text.split(".")))  # noqa: E731
    assert number(lowest) <= number(pins("constraints.txt")["transformers"]) < number(highest)


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_a_cache_is_found_and_replaced_under_either_name(name):
    assert cache_name() in CACHE_NAMES and given_cache({}) is None and given_cache({name: None}) is None
    assert given_cache({"input_ids": 1, name: "mine"}) == "mine"
    assert with_cache({name: "mine", "labels": 2}, "other") == {name: "other", "labels": 2}
    assert with_cache({}, "new") == {cache_name(): "new"}
