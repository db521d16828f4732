"""What a report says about routing, as plain data: calibration by configuration, expert load, fragile examples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ..metrics import calibration_report
from ..table import names
from .data import outcomes, plain, scores, select


if TYPE_CHECKING:
    from .data import Table

CONFIGURATION = {"routing_entropy": "routing entropy", "disagreement": "disagreement of the experts"}
_FRAGILE = ("confidence", "disagreement", "regret")
_SHOWN = ("id", "text")


def collect_routing(
    tables: Mapping[str, Table],
    *,
    hard_routed: Mapping[str, Table] | None = None,
    parts: int = 5,
    examples: int = 10,
) -> dict[str, Any]:
    """Every section about routing that the columns of the tables allow.

    Args:
        tables: method -> predictions table.
        hard_routed: method -> predictions of the same model with hard routing (see `hf_moecal.hard_routing`).
        parts: equally large parts into which the rows are split by a routing feature.
        examples: number of fragile examples.

    Returns:
        `configuration`: feature -> method -> parts; `load`: method -> set -> share of each expert; `fragile`:
        method -> rows; `hard_against_soft`: rows. Empty where a column is missing.

    Raises:
        ValueError: `hard_routed` names a method that `tables` does not have.
    """
    foreign = set(hard_routed or ()) - set(tables)
    if foreign:
        raise ValueError(f"hard_routed has {sorted(foreign)}, which is not among the methods {list(tables)}.")
    present = {method: names(table) for method, table in tables.items()}
    return {
        "configuration": {
            feature: {
                method: by_configuration(table, feature, parts=parts)
                for method, table in tables.items()
                if feature in present[method]
            }
            for feature in CONFIGURATION
        },
        "load": {m: expert_load(table) for m, table in tables.items() if "expert_ids" in present[m]},
        "fragile": {m: fragile(t, examples=examples) for m, t in tables.items() if "disagreement" in present[m]},
        "hard_against_soft": [
            row
            for method, table in (hard_routed or {}).items()
            for row in _hard_against_soft(method, tables[method], table)
        ],
    }


def by_configuration(table: Table, feature: str, *, parts: int = 5) -> list[dict[str, Any]]:
    """Calibration of equally large parts of the rows, from the lowest to the highest value of a routing feature.

    Args:
        table: predictions table with labels and the column `feature`.
        feature: `routing_entropy`, `disagreement` or another number.
        parts: number of parts; ties stay together, so there may be fewer.

    Returns:
        Per part `value` (mean of the feature), `n`, `confidence`, `accuracy`, `gap` (their difference) and its 95 %
        interval `low`, `high`.
    """
    found = outcomes(table, feature)
    values = np.asarray(found[feature], np.float64)
    cuts = np.unique(np.quantile(values, np.arange(1, parts) / parts))
    part = np.searchsorted(cuts, values, "left")
    rows = []
    for i in np.unique(part):
        mine = select(found, part == i)
        given = calibration_report(confidence=mine["confidence"], correct=mine["correct"], ranked=False)
        rows.append(
            {
                "value": values[part == i].mean(),
                **{name: given[name] for name in ("n", "confidence", "accuracy")},
                "gap": given["signed_gap"],
                "low": given["signed_gap_interval"][0],
                "high": given["signed_gap_interval"][1],
            }
        )
    return plain(rows)


def expert_load(table: Table) -> dict[str, list[float]]:
    """Share of all selections that each expert got, per evaluation set: they sum to one."""
    more = ["group"] if "group" in names(table) else []
    found = outcomes(table, "expert_ids", *more)
    ids = found["expert_ids"].reshape(len(found["row"]), -1)
    sets = found.get("group", np.full(len(ids), "all"))
    return {
        str(name): plain(np.bincount(ids[sets == name].ravel(), minlength=ids.max() + 1) / ids[sets == name].size)
        for name in dict.fromkeys(sets.tolist())
    }


def fragile(table: Table, *, examples: int = 10) -> list[dict[str, Any]]:
    """The wrong answers that rank highest in confidence, disagreement and regret together (mean of the ranks)."""
    extra = [
        name for name in (*_FRAGILE[1:], *_SHOWN, "group", "expert_ids", "expert_weights") if name in names(table)
    ]
    found = outcomes(table, *extra)
    wrong = select(found, found["correct"] < 1)
    used = [name for name in _FRAGILE if name in wrong]
    rank = np.mean([np.argsort(np.argsort(wrong[name])) for name in used], axis=0)
    order = np.argsort(-rank, kind="stable")[:examples]
    shown = [
        name
        for name in (*_SHOWN, "group", "label", "prediction", *used, "expert_ids", "expert_weights")
        if name in wrong
    ]
    return [{name: plain(wrong[name][i]) for name in shown} for i in order]


def _hard_against_soft(method: str, soft: Table, hard: Table) -> list[dict[str, Any]]:
    rows = []
    for routing, table in (("soft", soft), ("hard", hard)):
        found = outcomes(table, *(["group"] if "group" in names(table) else []))
        sets = found.get("group", np.full(len(found["row"]), "all"))
        for name in dict.fromkeys(sets.tolist()):
            figures = scores(select(found, sets == name))
            rows.append({"method": method, "set": str(name), "routing": routing, **figures})
    order = list(dict.fromkeys(row["set"] for row in rows))
    return sorted(rows, key=lambda row: order.index(row["set"]))
