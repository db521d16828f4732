"""The words and cells of a report, shared by terminal, Markdown and HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


HEADINGS = {
    "accuracy": "accuracy",
    "ece": "ECE [95 %]",
    "ece_debiased": "debiased",
    "nll": "NLL",
    "brier": "Brier",
    "signed_gap": "gap",
    "n": "n",
}
BEYOND_CHANCE = "† miscalibrated beyond chance: p < .05, corrected for the number of sets"
HOW_TO_READ = """\
**How to read it.** A model is calibrated when it is right as often as it says it will be: points on the dashed
diagonal. Below it the model is overconfident, above it underconfident. The shaded band is the 95 % interval
of each bin's accuracy: where it touches the diagonal, the bin is no evidence of miscalibration. The bars count the
examples per bin, the wrong answers in grey. *gap* is mean confidence minus accuracy (positive: overconfident). A
calibrated model's ECE is above zero by chance alone: *debiased* takes that chance out. Read ECE together with NLL
and Brier, which also fall when the model knows more; lower is better for all of them.
"""


def format_table(metrics: Mapping[str, Any]) -> str:
    """One table of all figures that a person can read in a terminal.

    Args:
        metrics: what [`~hf_moecal.report.data.collect`] returned, or the content of `metrics.json`.

    Returns:
        The table; the best ECE, NLL and Brier of each set and subset carry a `*`.
    """
    table, titles = [["", *HEADINGS.values()]], {}
    for (name, subset), rows in sections(metrics["rows"]):
        titles[len(table)] = heading(name, subset)
        table += [["  " + row["method"], *cells(row, rows, "*")] for row in rows]
    lines = []
    for i, line in enumerate(_aligned(table)):
        lines += ["", titles[i], line] if i in titles else [line]
    return "\n".join([*lines, "", "* best of the set; gap = confidence - accuracy; intervals: 95 %", BEYOND_CHANCE])


def sections(rows: Sequence[Mapping[str, Any]]) -> list[tuple[tuple[str, str], list[Mapping[str, Any]]]]:
    """The rows of each (set, subset), in order."""
    keys = dict.fromkeys((row["set"], row["subset"]) for row in rows)
    return [(key, [row for row in rows if (row["set"], row["subset"]) == key]) for key in keys]


def heading(name: str, subset: str) -> str:
    """Title of a set and subset."""
    return name if subset == "all" else f"{name}, {subset} subset"


def cells(row: Mapping[str, Any], rivals: Sequence[Mapping[str, Any]], mark: str) -> list[str]:
    """The cells of one row; the best among its rivals carries the mark (`**` on both sides, any other behind)."""
    found = []
    for key in HEADINGS:
        value = row[key]
        if value is None:
            text = "∞" if key == "nll" and row.get("n_zero_probability") else "–"
        elif key == "n":
            text = f"{value:,}"
        else:
            text = f"{value:+.3f}" if key == "signed_gap" else f"{value:.3f}"
        if key == "ece" and value is not None and row.get("ece_interval"):
            text += " [{:.3f}, {:.3f}]".format(*row["ece_interval"]) + (" †" if row.get("miscalibrated") else "")
        others = [rival[key] for rival in rivals if rival[key] is not None]
        best = key in ("ece", "nll", "brier") and len(others) > 1 and value == min(others)
        found.append(f"{mark}{text}{mark}" if best and mark == "**" else f"{text} {mark}" if best else text)
    return found


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    # Numbers end in one column, with the mark hanging out to the right.
    hang = [max(cell.endswith(" *") for cell in column) for column in zip(*rows, strict=True)]
    padded = [
        [cell if not out or cell.endswith(" *") else f"{cell}  " for cell, out in zip(row, hang, strict=True)]
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*padded, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in padded
    ]


def worst_group(rows: Sequence[Mapping[str, Any]]) -> str:
    """One sentence: for each method the set and subset that is miscalibrated beyond chance and most, if there is."""
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        worst = next((row for row in rows if row["method"] == method and row["worst"]), None)
        if worst is None:
            lines.append(f"{method}: no set stands out")
            continue
        low, high = worst["ece_interval"]
        where = heading(worst["set"], worst["subset"])
        lines.append(
            f"{method}: {where}, ECE {worst['ece']:.3f} [{low:.3f}, {high:.3f}], gap {worst['signed_gap']:+.3f}"
        )
    return "Least calibrated, beyond chance: " + "; ".join(lines) + "."
