"""Predictions tables become rows of figures: each set, all and hard, raw and recalibrated, alone and in committees."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from benchmark.settings import COMMITTEES

from hf_moecal.calibration.selection import CANDIDATES, calibrate_table
from hf_moecal.calibration.solver import fit_temperature, log_softmax
from hf_moecal.metrics import calibration_report
from hf_moecal.table import columns


FIGURES = ("n", "accuracy", "ece", "ece_debiased", "smooth_ece", "nll", "brier", "signed_gap", "aurc")
DECIMALS = 5
TEMPERATURES = np.exp(np.linspace(np.log(0.5), np.log(4.0), 25))
ORACLE = "oracle_temperature"
_READ = ("id", "label", "logits", "group", "hard")
_ROUTING = (
    "routing_entropy",
    "routing_margin",
    "disagreement",
    "regret",
    "expert_ids",
    "expert_weights",
    "expert_logits",
)

Table = dict[str, np.ndarray]


def read(table: Any, *, routing: bool = False) -> Table:
    """The columns that scoring needs, as arrays; `logits` are log-probabilities."""
    found = columns(table, *_READ[:-1], *(_ROUTING if routing else ()))
    found["hard"] = np.array([value is True for value in table["hard"][:]])
    found["logits"] = log_softmax(found["logits"].astype(float))
    return found


def committee(members: Sequence[Table]) -> Table:
    """The members' probabilities in equal shares."""
    first = members[0]
    if any(not np.array_equal(first["id"], other["id"]) for other in members):
        raise ValueError("The members' tables hold other rows, or in another order; predict the same sets with each.")
    mixed = np.logaddexp.reduce([member["logits"] for member in members], axis=0) - np.log(len(members))
    return {name: first[name] for name in _READ} | {"logits": mixed}


def subsets(table: Table) -> Iterator[tuple[str, str, np.ndarray]]:
    """Name of the set, name of the subset, and the rows, of all sets but the validation set."""
    for name in dict.fromkeys(table["group"].tolist()):
        here = table["group"] == name
        if name == "validation":
            continue
        yield name, "all", here
        if (here & table["hard"]).any():
            yield name, "hard", here & table["hard"]


def calibrated(table: Table, method: str) -> Table:
    """The table as a calibrator leaves it that was fitted on its validation rows; `"none"` and `ORACLE` fit none.

    Raises:
        ValueError: it cannot be fitted on them.
    """
    if method == "none":
        return table
    if method == ORACLE:
        return with_oracle(table)
    validation = {name: values[table["group"] == "validation"] for name, values in table.items() if name != "hard"}
    validation = {name: values for name, values in validation.items() if name != "group"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if method == "auto":
            fitted = calibrate_table(validation).calibrator
        else:
            fitted = CANDIDATES[method]().fit(validation)
        probs = fitted.apply({name: values for name, values in table.items() if name != "hard"})["probs"]
    return {**table, "logits": np.log(np.clip(np.asarray(probs, dtype=float), 1e-30, None))}


def with_oracle(table: Table) -> Table:
    """Each set at the temperature that its own labels ask for, which no method may know: the best that one can do."""
    logits = table["logits"].copy()
    for name in dict.fromkeys(table["group"].tolist()):
        here = table["group"] == name
        logits[here] /= fit_temperature(logits[here], table["label"][here]).temperature
    return {**table, "logits": log_softmax(logits)}


def write_rows(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Rows of figures as small Parquet: numbers are decimals of [`DECIMALS`] places, null where not finite."""
    table = pa.Table.from_pylist([_decimals(row) for row in rows])
    table = table.cast(pa.schema([(field.name, _narrow(field.type)) for field in table.schema]))
    leaves = {name: "BYTE_STREAM_SPLIT" for name in table.column_names if pa.types.is_decimal(table[name].type)}
    leaves |= {f"{name}.list.element": "DELTA_BINARY_PACKED" for name in table.column_names if _is_curve(table[name])}
    pq.write_table(
        table,
        path,
        compression="zstd",
        compression_level=19,
        store_decimal_as_integer=True,
        use_dictionary=[name for name in table.column_names if not any(leaf.startswith(name) for leaf in leaves)],
        column_encoding=leaves or None,
    )


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows that [`write_rows`] wrote, decimals as floats."""
    return [_floats(row) for row in pq.read_table(path).to_pylist()]


def _is_curve(column: pa.ChunkedArray) -> bool:
    return pa.types.is_list(column.type) and pa.types.is_decimal(column.type.value_type)


def _narrow(kind: pa.DataType) -> pa.DataType:
    """A type whose decimals fit 32 bits."""
    if pa.types.is_decimal(kind):
        return pa.decimal128(9, DECIMALS)
    if pa.types.is_list(kind):
        return pa.list_(_narrow(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, _narrow(field.type)) for field in kind])
    return kind


def _decimals(value: Any) -> Any:
    if isinstance(value, float):
        return Decimal(f"{value:.{DECIMALS}f}") if math.isfinite(value) else None
    if isinstance(value, list):
        return [_decimals(item) for item in value]
    return {name: _decimals(item) for name, item in value.items()} if isinstance(value, Mapping) else value


def _floats(value: Any) -> Any:
    """Decimals as floats, and no entries that only other rows have."""
    if isinstance(value, Decimal):
        return float(value)
    if isinstance(value, list):
        return [_floats(item) for item in value]
    if isinstance(value, dict):
        return {name: _floats(item) for name, item in value.items() if item is not None}
    return value


def score(table: Table, names: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row of figures for each set and subset."""
    rows = []
    for test, subset, chosen in subsets(table):
        report = calibration_report(table["label"][chosen], logits=table["logits"][chosen], intervals=False)
        figures = {name: report[name] if name == "n" else round(report[name], DECIMALS) for name in FIGURES}
        rows.append({**names, "test": test, "subset": subset, **figures})
    return rows


def curve(table: Table) -> dict[str, list[float]]:
    """NLL of each set and subset over `TEMPERATURES`."""
    found = {}
    for test, subset, chosen in subsets(table):
        logits, labels = table["logits"][chosen], table["label"][chosen]
        own = [-log_softmax(logits / t)[np.arange(len(labels)), labels].mean() for t in TEMPERATURES]
        found[f"{test}/{subset}"] = [round(float(value), DECIMALS) for value in own]
    return found


def committees(tables: Mapping[int, Table]) -> Iterator[tuple[int, int, Table]]:
    """Size, first seed and mixture of every committee: of the runs with the next seeds, around the circle."""
    seeds = sorted(tables)
    for size in COMMITTEES:
        if size <= len(seeds):
            for place, seed in enumerate(seeds):
                chosen = [seeds[(place + step) % len(seeds)] for step in range(size)]
                yield size, seed, committee([tables[one] for one in chosen])


def routing_figures(table: Any, num_experts: int) -> dict[str, Any]:
    """How the router routes: entropy of its shares (nats), load of the experts, what the domain says of the expert.

    Mutual information is that of the domain and an expert drawn by its share, in nats, on the in-domain test rows;
    `uniform` marks a router whose mean entropy is within 2 % of its largest.
    """
    found = columns(table, "expert_ids", "expert_weights", "routing_entropy", "group", "domain")
    shares = np.zeros((len(found["group"]), num_experts))
    weights = found["expert_weights"] / found["expert_weights"].sum(1, keepdims=True)
    np.put_along_axis(shares, found["expert_ids"], weights, axis=1)
    result: dict[str, Any] = {"entropy": {}, "load": {}}
    for name in dict.fromkeys(found["group"].tolist()):
        here = found["group"] == name
        result["entropy"][name] = round(float(found["routing_entropy"][here].mean()), 4)
        result["load"][name] = [round(float(value), 4) for value in shares[here].mean(0)]
    here = found["group"] == "in-domain"
    domains, place = np.unique(found["domain"][here], return_inverse=True)
    joint = np.stack([shares[here][place == index].sum(0) for index in range(len(domains))]) / here.sum()
    expected = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    positive = joint > 0
    result["mutual_information"] = round(
        float((joint[positive] * np.log(joint[positive] / expected[positive])).sum()), 4
    )
    largest = np.log(found["expert_ids"].shape[1])
    result["uniform"] = bool(result["entropy"]["in-domain"] > 0.98 * largest)
    return result
