"""Groups of examples: read from columns, crossed, made from routing, compared."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from ..table import columns, names
from .figures import ERRORS
from .inputs import as_array, check_count, check_length
from .uncertainty import LEVEL


Key = tuple[tuple[str, Any], ...]  # one (column, value) for a group, two for an intersection
SPREAD = (*ERRORS, "signed_gap", "accuracy", "confidence", "nll", "brier")


def group_columns(groups: Any, n: int) -> dict[str, list]:
    """Group columns by name: `""` for a plain sequence, the mapping's own names otherwise.

    Raises:
        ValueError: a column has the wrong length or holds missing or unhashable values.
    """
    if groups is None:
        return {}
    if isinstance(groups, str | bytes):
        raise ValueError(f"groups must hold one group name per example, got the single string {groups!r}.")
    columns = dict(groups) if isinstance(groups, Mapping) else {"": groups}
    if not columns:
        raise ValueError("groups is an empty mapping; leave it out, or give at least one column.")
    read = {
        str(name): _group_values(f"groups[{name!r}]" if name else "groups", column) for name, column in columns.items()
    }
    for name, column in read.items():
        check_length(f"groups[{name!r}]" if name else "groups", column, n, "the data")
    return read


def _group_values(name: str, column: Any) -> list:
    if isinstance(column, np.ma.MaskedArray):
        raise ValueError(f"{name} is a masked array; give every example a group name.")
    if not hasattr(column, "__len__") or isinstance(column, str | bytes):
        raise ValueError(f"{name} must hold one group name per example, got {type(column).__name__}.")
    values = column.tolist() if hasattr(column, "tolist") else list(column)
    kinds = set(map(type, values))
    if any(issubclass(kind, np.generic) for kind in kinds):
        values = [value.item() if isinstance(value, np.generic) else value for value in values]
        kinds = set(map(type, values))
    if kinds <= {str} or kinds <= {int, bool}:
        return values
    if kinds <= {str, int, bool}:
        raise ValueError(f"{name} mixes strings and numbers; group names must be all strings or all whole numbers.")
    row, value = next((i, value) for i, value in enumerate(values) if not isinstance(value, str | int))
    raise ValueError(f"{name} holds {value!r} in row {row}; every example needs a string or a whole number.")


class GroupIndex:
    """Which values each group column has taken so far, as small integers; `names` fixes them beforehand."""

    def __init__(self, names: Any = None, *, intersections: bool = False) -> None:
        self.fixed = names is not None
        self.intersections = intersections
        named = names if isinstance(names, Mapping) else {"": names} if self.fixed else {}
        self.known: dict[str, dict[Any, int]] = {
            str(column): encoding(_group_values("group_names", values)) for column, values in named.items()
        }
        self._started = self.fixed

    def encode(self, given: Mapping[str, Sequence]) -> dict[str, np.ndarray]:
        """Codes of one batch; new values get the next numbers.

        Raises:
            ValueError: the columns differ from those of earlier batches, or a value is not one of the fixed names.
        """
        if self._started and set(given) != set(self.known):
            raise ValueError(
                f"this batch has the group columns {sorted(given)} but the earlier ones, or group_names, have "
                f"{sorted(self.known)}; give the same columns with every batch."
            )
        for column, values in given.items():
            self._check(column, set(values))
        self._started = True
        for column, values in given.items():
            known = self.known.setdefault(column, {})
            for value in dict.fromkeys(values):
                known.setdefault(value, len(known))
        return {
            column: np.fromiter(map(self.known[column].__getitem__, values), dtype=np.int32, count=len(values))
            for column, values in given.items()
        }

    def _check(self, column: str, values: set) -> None:
        known = self.known.get(column, {})
        unknown = values - known.keys()
        if self.fixed and unknown:
            raise ValueError(f"unknown group {min(map(str, unknown))!r}; the groups are {list(map(str, known))}.")
        if len({isinstance(value, str) for value in [*unknown, *known]}) > 1:
            raise ValueError(
                f"groups mix strings and numbers across batches: {sorted(map(str, {*values, *known}))}; use one type."
            )

    def members(self, codes: Mapping[str, np.ndarray]) -> dict[Key, np.ndarray]:
        """Rows of every group; of every non-empty crossing of two columns too, if asked for."""
        found: dict[Key, np.ndarray] = {}
        for column, known in self.known.items():
            parts = _split(codes[column], len(known))
            found |= {((column, value),): parts[code] for value, code in known.items()}
        for a, b in combinations(self.known, 2) if self.intersections else ():
            width = len(self.known[b])
            parts = _split(codes[a] * width + codes[b], len(self.known[a]) * width)
            for x, i in self.known[a].items():
                for y, j in self.known[b].items():
                    if len(parts[i * width + j]):
                        found[((a, x), (b, y))] = parts[i * width + j]
        return found

    def ordered(self, keys: Iterable[Key]) -> list[Key]:
        """In the order of the fixed names, else sorted, so that the order of batches does not show."""
        if self.fixed:
            return sorted(keys, key=lambda key: (len(key), [self.known[column][value] for column, value in key]))
        return sorted(keys, key=lambda key: (len(key), key))


def encoding(values: Sequence) -> dict[Any, int]:
    if not values:
        raise ValueError("group_names is empty; name the groups that exist, or leave it out.")
    return {value: code for code, value in enumerate(dict.fromkeys(values))}


def name_of(key: Key) -> str:
    return " & ".join(f"{column}={value}" if column else str(value) for column, value in key)


def _split(codes: np.ndarray, count: int) -> list[np.ndarray]:
    order = np.argsort(codes, kind="stable")
    return np.split(order, np.searchsorted(codes[order], np.arange(1, count)))


def compare_groups(groups: Mapping[str, dict]) -> dict[str, Any]:
    """The worst group, the p-values of all, corrected for how many there are, and the spread of each figure."""
    some = {name: found for name, found in groups.items() if found["n"]}
    adjusted = holm({name: found["calibrated_p"] for name, found in some.items()})
    worst = next(iter(miscalibrated(some)), None)
    spread = {key: max(f[key] for f in some.values()) - min(f[key] for f in some.values()) for key in SPREAD}
    return {
        "worst_group": worst,
        "worst_group_ece": None if worst is None else some[worst]["ece"],
        "group_p": adjusted,
        "group_spread": spread,
    }


def miscalibrated(groups: Mapping[Any, Mapping[str, Any]]) -> list:
    """Names of the groups whose miscalibration chance does not explain, the worst first.

    A group counts where its `calibrated_p`, corrected by Holm for the number of groups, is below .05; the worst is the
    one whose interval starts highest. So where nothing is wrong a group is named in 5 % of cases at most, and neither
    the smallest group nor one of many wins by noise.
    """
    adjusted = holm({name: found["calibrated_p"] for name, found in groups.items()})
    certain = [name for name, p in adjusted.items() if p < LEVEL]
    return sorted(certain, key=lambda name: (-groups[name]["ece_interval"][0], -groups[name]["ece"]))


def holm(p_values: Mapping[Any, float | None]) -> dict[Any, float]:
    """Holm's correction of p-values for their number; those that are not known (None or NaN) count as one."""
    known = {name: 1.0 if p is None or np.isnan(p) else float(p) for name, p in p_values.items()}
    adjusted, least = dict.fromkeys(known, 1.0), 0.0
    for rank, name in enumerate(sorted(known, key=known.__getitem__)):
        least = max(least, min(1.0, (len(known) - rank) * known[name]))
        adjusted[name] = least
    return adjusted


def routing_groups(table: Any, by: str, *, bins: int = 4) -> list[str]:
    """Groups of a predictions table by how its examples were routed.

    If confidence means the same whatever the routing, all these groups have the same calibration.

    Args:
        table (`datasets.Dataset` or mapping of columns): predictions with routing features.
        by (`str`): a routing column such as `"routing_entropy"`, `"routing_margin"`, `"disagreement"` or `"regret"`,
            cut into `bins` groups of equal size; or `"dominant_expert"`, the expert with the largest routing weight.
        bins (`int`): number of groups for a numeric column; equal values stay together, so there may be fewer.

    Returns:
        `list[str]`: the name of each row's group, for `groups=` of [`calibration_report`].

    Raises:
        ValueError: the table lacks the column, or it is not a finite number per row.

    Example:

    ```python
    >>> from hf_moecal.metrics import routing_groups
    >>> routing_groups({"routing_entropy": [0.1, 0.2, 0.6, 0.7]}, "routing_entropy", bins=2)
    ['1/2: 0.1 to 0.2', '1/2: 0.1 to 0.2', '2/2: 0.6 to 0.7', '2/2: 0.6 to 0.7']

    ```
    """
    if by == "dominant_expert":
        read = columns(table, "expert_ids", "expert_weights")
        ids = as_array("expert_ids", read["expert_ids"], ndim=(2,))
        weights = as_array("expert_weights", read["expert_weights"], ndim=(2,))
        if ids.shape != weights.shape:
            raise ValueError(f"expert_ids has shape {ids.shape} but expert_weights {weights.shape}; they must agree.")
        winners = ids[np.arange(len(ids)), weights.argmax(1)]
        digits = len(str(int(winners.max())))
        return [f"expert {winner:0{digits}d}" for winner in winners]
    value = as_array(by, columns(table, by)[by])
    bad = np.flatnonzero(~np.isfinite(value))
    if len(bad):
        raise ValueError(f"{by} holds NaN or infinity in row {bad[0]}; drop those rows.")
    return _quantile_names(value.astype(np.float64), check_count("bins", bins, least=1))


def _quantile_names(value: np.ndarray, bins: int) -> list[str]:
    last = np.unique(-(-np.arange(1, bins + 1) * len(value) // bins) - 1)
    upper = np.unique(np.sort(value)[last])
    index = np.searchsorted(upper, value, side="left")
    digits = len(str(len(upper)))
    labels = [
        f"{i + 1:0{digits}d}/{len(upper)}: {value[index == i].min():.4g} to {value[index == i].max():.4g}"
        for i in range(len(upper))
    ]
    return [labels[i] for i in index]


def column_groups(table: Any, groups: str | Sequence[str] | None, routing: Sequence[str], bins: int) -> dict | None:
    """The group columns of a predictions table, by name: its own, and those made from routing."""
    own = [groups] if isinstance(groups, str) else list(groups if groups is not None else _default(table))
    found: dict[str, Any] = dict(columns(table, *own))
    found |= {by: routing_groups(table, by, bins=bins) for by in routing}
    return found or None


def _default(table: Any) -> list[str]:
    return ["group"] if "group" in names(table) else []
