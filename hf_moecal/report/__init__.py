"""Reports people read: a table for the terminal, one HTML file, and the same as Markdown and PNG for model cards.

Computing ([`hf_moecal.report.data`]) and drawing ([`hf_moecal.report.figures`]) are separate; here they are joined
and written.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .data import collect, reliability
from .figures import configuration_figure, draw_reliability, reliability_figure
from .html import render
from .routing import CONFIGURATION, collect_routing
from .text import BEYOND_CHANCE, HEADINGS, HOW_TO_READ, cells, format_table, heading, sections, worst_group


if TYPE_CHECKING:
    from .data import Table


__all__ = ["collect", "draw_reliability", "format_table", "reliability", "write_report"]

_PICTURE = re.compile(r"!\[[^\]]*\]\(((?:reliability|gap_by)_[\w-]+\.png)\)")


def write_report(
    tables: Mapping[str, Table],
    output_dir: str | Path,
    *,
    title: str,
    hard: str | None = None,
    hard_routed: Mapping[str, Table] | None = None,
    bins: int = 15,
) -> Path:
    """Writes `report.html` (one file that needs nothing else), `report.md` with its PNGs, and `metrics.json`.

    Of an earlier report in the folder nothing stays: the pictures that its `report.md` shows go.

    The sections about routing (calibration by configuration, expert load, fragile examples) appear where the tables
    have the columns for them: `routing_entropy`, `disagreement`, `regret`, `expert_ids`, and `text` to show examples.

    Args:
        tables: method -> predictions table, in the order in which they are shown (before, after). The `group` column
            names the evaluation set of each row.
        output_dir: folder to write to; made if absent.
        title: title of the report.
        hard: boolean column that marks the hard subset of each set, or `None`.
        hard_routed: method -> predictions of the same model under `hf_moecal.hard_routing`, to be set against its own.
        bins: number of equal-width bins.

    Returns:
        Path of `report.md`.

    Raises:
        ValueError: there is no table, or a table lacks a needed column.
    """
    data = collect(tables, title=title, hard=hard, bins=bins)
    routing = collect_routing(tables, hard_routed=hard_routed)
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    earlier = _pictures_of(folder / "report.md")
    pictures = _save_diagrams(data, folder)
    rows = [{key: value for key, value in row.items() if key != "diagram"} for row in data["rows"]]
    metrics = {
        **data,
        "rows": rows,
        "routing": {key: routing[key] for key in ("configuration", "load", "hard_against_soft")},
    }
    _write(folder / "metrics.json", json.dumps(metrics, indent=1, allow_nan=False) + "\n")
    _write(folder / "report.html", render(data, routing))
    configuration = _save_configuration(routing, folder)
    for name in earlier - {*pictures.values(), *configuration.values()}:
        (folder / name).unlink(missing_ok=True)
    return _write(folder / "report.md", _markdown(metrics, pictures, configuration))


def _pictures_of(report: Path) -> set[str]:
    """The files that a report of ours shows, in its own folder."""
    return set(_PICTURE.findall(report.read_text(encoding="utf-8"))) if report.is_file() else set()


def _save_diagrams(data: Mapping[str, Any], folder: Path) -> dict[tuple[str, str], str]:
    import matplotlib.pyplot as plt

    pictures = {}
    for (name, subset), rows in sections(data["rows"]):
        panels = {row["method"]: {**row["diagram"], "scores": row} for row in rows if row["diagram"]}
        if not panels:
            continue
        figure = reliability_figure(panels, title=heading(name, subset))
        slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "set"
        file = f"reliability_{slug}{'' if subset == 'all' else '_' + subset}.png"
        if file in pictures.values():
            raise ValueError(f"Two evaluation sets would both be drawn in {file!r}; rename the group {name!r}.")
        figure.savefig(folder / file, dpi=200)
        plt.close(figure)
        pictures[name, subset] = file
    return pictures


def _save_configuration(routing: Mapping[str, Any], folder: Path) -> dict[str, str]:
    import matplotlib.pyplot as plt

    pictures = {}
    for feature, methods in routing["configuration"].items():
        if methods:
            figure = configuration_figure(methods, label=CONFIGURATION[feature])
            figure.savefig(folder / f"gap_by_{feature}.png", dpi=200)
            plt.close(figure)
            pictures[CONFIGURATION[feature]] = f"gap_by_{feature}.png"
    return pictures


def _markdown(
    metrics: Mapping[str, Any], pictures: Mapping[tuple[str, str], str], configuration: Mapping[str, str]
) -> str:
    lines = [f"# {metrics['title']}", "", worst_group(metrics["rows"]), "", HOW_TO_READ]
    for (name, subset), rows in sections(metrics["rows"]):
        lines += [f"## {heading(name, subset)}", ""]
        lines += ["| method | " + " | ".join(HEADINGS.values()) + " |", "|---|" + "---:|" * len(HEADINGS)]
        lines += [f"| {_cell(row['method'])} | " + " | ".join(cells(row, rows, "**")) + " |" for row in rows]
        if (name, subset) in pictures:
            methods = ", ".join(row["method"] for row in rows)
            lines += ["", f"![Reliability diagrams on {heading(name, subset)}: {methods}]({pictures[name, subset]})"]
        lines.append("")
    lines += _routing_markdown(metrics["routing"], configuration)
    lines.append(
        f"{metrics['bins']} equal-width, right-closed bins of the top-label confidence. Bold: best of the set. "
        f"{BEYOND_CHANCE}."
    )
    return "\n".join(lines) + "\n"


def _routing_markdown(routing: Mapping[str, Any], configuration: Mapping[str, str]) -> list[str]:
    lines = []
    if configuration:
        lines += ["## Calibration by routing configuration", ""]
        lines += [f"![Confidence minus accuracy by {label}]({file})" for label, file in configuration.items()] + [""]
    if routing["hard_against_soft"]:
        lines += [
            "## Hard against soft routing",
            "",
            "| set | method | routing | " + " | ".join(HEADINGS.values()) + " |",
        ]
        lines += ["|---|---|---|" + "---:|" * len(HEADINGS)]
        for row in routing["hard_against_soft"]:
            lines.append(
                f"| {row['set']} | {row['method']} | {row['routing']} | {' | '.join(cells(row, [row], '**'))} |"
            )
        lines.append("")
    for method, load in routing["load"].items():
        experts = max(map(len, load.values()))
        if experts <= 16:  # wider tables are in the HTML report only
            lines += [
                f"## Expert load per set: {method}",
                "",
                "| set | " + " | ".join(map(str, range(experts))) + " |",
            ]
            lines += ["|---|" + "---:|" * experts]
            lines += [
                f"| {_cell(name)} | " + " | ".join(f"{share:.2f}" for share in row) + " |"
                for name, row in load.items()
            ]
            lines.append("")
    return lines


def _cell(name: str) -> str:
    return name.replace("|", "\\|")


def _write(path: Path, text: str) -> Path:
    # Written beside and renamed, so that a killed run leaves no half file.
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
    return path
