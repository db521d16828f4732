"""Reports people read: one table, reliability diagrams before and after, Markdown for model cards.

Computing ([`hf_moecal.report_data`]) and drawing ([`hf_moecal.figures`]) are separate; this module joins and writes.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .figures import draw_reliability, reliability_figure
from .report_data import collect, reliability


if TYPE_CHECKING:
    from .report_data import Table


__all__ = ["collect", "draw_reliability", "format_table", "reliability", "write_report"]

_HEADINGS = {
    "accuracy": "accuracy",
    "ece": "ECE [95 %]",
    "ece_debiased": "debiased",
    "nll": "NLL",
    "brier": "Brier",
    "signed_gap": "gap",
    "n": "n",
}
_HOW_TO_READ = """\
**How to read it.** A model is calibrated when it is right as often as it says it will be: points on the dashed
diagonal. Below it the model is overconfident, above it underconfident. The shaded band is the 95 % bootstrap interval
of each bin's accuracy: where it touches the diagonal, the bin is no evidence of miscalibration. The bars count the
examples per bin. *gap* is mean confidence minus accuracy (positive: overconfident). A calibrated model's ECE is above
zero by chance alone: *debiased* takes that chance out. Read ECE together with NLL and Brier, which also fall when the
model knows more; lower is better for all of them.
"""


def write_report(
    tables: Mapping[str, Table],
    output_dir: str | Path,
    *,
    title: str,
    hard: str | None = None,
    bins: int = 15,
    bootstrap: int = 1000,
    seed: int = 0,
) -> Path:
    """Writes `report.md`, `metrics.json` and one PNG of reliability diagrams per evaluation set and subset.

    Args:
        tables: method -> predictions table, in the order in which they are shown (before, after). The `group` column
            names the evaluation set of each row.
        output_dir: folder to write to; made if absent.
        title: title of the report.
        hard: boolean column that marks the hard subset of each set, or `None`.
        bins: number of equal-width bins.
        bootstrap: number of resamples for intervals and bands.
        seed: seed of the resampling.

    Returns:
        Path of `report.md`.

    Raises:
        ValueError: there is no table, or a table lacks a needed column.
    """
    data = collect(tables, title=title, hard=hard, bins=bins, bootstrap=bootstrap, seed=seed)
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    pictures = _save_diagrams(data, folder)
    rows = [{key: value for key, value in row.items() if key != "diagram"} for row in data["rows"]]
    metrics = {**data, "rows": rows}
    _write(folder / "metrics.json", json.dumps(metrics, indent=1, allow_nan=False) + "\n")
    return _write(folder / "report.md", _markdown(metrics, pictures))


def format_table(metrics: Mapping[str, Any]) -> str:
    """One table of all figures that a person can read in a terminal.

    Args:
        metrics: what [`collect`] returned, or the content of `metrics.json`.

    Returns:
        The table; the best ECE, NLL and Brier of each set and subset carry a `*`.
    """
    cells, titles = [["", *_HEADINGS.values()]], {}
    for (name, subset), rows in _sections(metrics["rows"]):
        titles[len(cells)] = _heading(name, subset)
        cells += [["  " + row["method"], *_cells(row, rows, "*")] for row in rows]
    lines = []
    for i, line in enumerate(_aligned(cells)):
        lines += ["", titles[i], line] if i in titles else [line]
    return "\n".join([*lines, "", "* best of the set; gap = confidence - accuracy; intervals: 95 % bootstrap"])


def _sections(rows: Sequence[Mapping[str, Any]]) -> list[tuple[tuple[str, str], list[Mapping[str, Any]]]]:
    keys = dict.fromkeys((row["set"], row["subset"]) for row in rows)
    return [(key, [row for row in rows if (row["set"], row["subset"]) == key]) for key in keys]


def _heading(name: str, subset: str) -> str:
    return name if subset == "all" else f"{name}, {subset} subset"


def _cells(row: Mapping[str, Any], rivals: Sequence[Mapping[str, Any]], mark: str) -> list[str]:
    cells = []
    for key in _HEADINGS:
        value = row[key]
        if value is None:
            text = "–"
        elif key == "n":
            text = f"{value:,}"
        else:
            text = f"{value:+.3f}" if key == "signed_gap" else f"{value:.3f}"
        if key == "ece" and value is not None and row.get("ece_interval"):
            text += " [{:.3f}, {:.3f}]".format(*row["ece_interval"])
        others = [rival[key] for rival in rivals if rival[key] is not None]
        best = key in ("ece", "nll", "brier") and len(others) > 1 and value == min(others)
        cells.append(f"{mark}{text}{mark}" if best and mark == "**" else f"{text} {mark}" if best else text)
    return cells


def _aligned(cells: Sequence[Sequence[str]]) -> list[str]:
    # Numbers end in one column, with the mark hanging out to the right.
    hang = [max(cell.endswith(" *") for cell in column) for column in zip(*cells, strict=True)]
    padded = [
        [cell if not out or cell.endswith(" *") else f"{cell}  " for cell, out in zip(row, hang, strict=True)]
        for row in cells
    ]
    widths = [max(map(len, column)) for column in zip(*padded, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in padded
    ]


def _save_diagrams(data: Mapping[str, Any], folder: Path) -> dict[tuple[str, str], str]:
    import matplotlib.pyplot as plt

    pictures = {}
    for (name, subset), rows in _sections(data["rows"]):
        panels = {row["method"]: {**row["diagram"], "scores": row} for row in rows if row["diagram"]}
        if not panels:
            continue
        figure = reliability_figure(panels, title=_heading(name, subset))
        slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "set"
        file = f"reliability_{slug}{'' if subset == 'all' else '_' + subset}.png"
        if file in pictures.values():
            raise ValueError(f"Two evaluation sets would both be drawn in {file!r}; rename the group {name!r}.")
        figure.savefig(folder / file, dpi=200)
        plt.close(figure)
        pictures[name, subset] = file
    return pictures


def _markdown(metrics: Mapping[str, Any], pictures: Mapping[tuple[str, str], str]) -> str:
    lines = [f"# {metrics['title']}", "", _HOW_TO_READ]
    for (name, subset), rows in _sections(metrics["rows"]):
        lines += [f"## {_heading(name, subset)}", ""]
        lines += ["| method | " + " | ".join(_HEADINGS.values()) + " |", "|---|" + "---:|" * len(_HEADINGS)]
        lines += [f"| {row['method']} | " + " | ".join(_cells(row, rows, "**")) + " |" for row in rows]
        if (name, subset) in pictures:
            methods = ", ".join(row["method"] for row in rows)
            lines += ["", f"![Reliability diagrams on {_heading(name, subset)}: {methods}]({pictures[name, subset]})"]
        lines.append("")
    lines.append(
        f"{metrics['bins']} equal-width, right-closed bins of the top-label confidence; "
        f"{metrics['bootstrap']:,} bootstrap resamples. Bold: best of the set."
    )
    return "\n".join(lines) + "\n"


def _write(path: Path, text: str) -> Path:
    # Written beside and renamed, so that a killed run leaves no half file.
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
    return path
