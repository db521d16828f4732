"""The report as one HTML file: no network, no script, readable on a phone, in the dark and on paper."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from io import StringIO
from typing import TYPE_CHECKING, Any

from . import figures
from .routing import CONFIGURATION
from .text import BEYOND_CHANCE, HEADINGS, HOW_TO_READ, cells, heading, sections, worst_group


if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Colours that the drawing uses -> the variable of the style sheet, which also has one for the dark.
_VARIABLES = {
    figures.INK: "--ink",
    figures.MUTED: "--muted",
    figures.FAINT: "--line",
    figures.PAPER: "--paper",
    **{color: f"--c{i}" for i, color in enumerate(figures.PALETTE)},
}
_STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1f2328; --muted: #59636e; --line: #d0d7de; --best: #dafbe1;
  --off: #a63600; --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #cc79a7; --c4: #e69f00; --c5: #56b4e9; }
@media (prefers-color-scheme: dark) { :root { --paper: #0d1117; --ink: #e6edf3; --muted: #9198a1; --line: #3d444d;
  --best: #12361f; --off: #ff9d5c;
  --c0: #4aa8e0; --c1: #ff8c42; --c2: #2ec79a; --c3: #e39cc6; --c4: #f2b63c; --c5: #7cc7f2; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 64rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; } h2 { margin-top: 2.5rem; font-size: 1.25rem; }
h3 { margin: 1.5rem 0 .4rem; font-size: 1rem; }
p, li { max-width: 46rem; } .note { color: var(--muted); font-size: .875rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .875rem; }
th, td { padding: .3rem .65rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap;
  font-variant-numeric: tabular-nums; }
th { font-weight: 600; } th:first-child, td:first-child, .text { text-align: left; }
td.long { text-align: left; white-space: normal; min-width: 20rem; overflow-wrap: anywhere; }
tbody th { padding-top: 1rem; } .best { background: var(--best); font-weight: 600; }
.off { color: var(--off); }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(16rem, 1fr)); gap: 1rem; }
.wide { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(19rem, 100%), 1fr)); gap: 1rem; }
figure { margin: 0; } figcaption { font-size: .875rem; } figcaption b { display: block; }
svg { display: block; width: 100%; height: auto; max-width: 26rem; } .load svg { max-width: 44rem; }
svg text { font-family: system-ui, "Segoe UI", "DejaVu Sans", sans-serif !important; }
@media print { :root { color-scheme: light; --paper: #ffffff; --ink: #1f2328; --muted: #59636e; --line: #d0d7de;
  --best: #dafbe1; --off: #a63600; --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #cc79a7; --c4: #e69f00;
  --c5: #56b4e9; }
  body { max-width: none; padding: 0; font-size: 11pt; } figure, tr, h2, h3 { break-inside: avoid; }
  h2, h3 { break-after: avoid; } .grid { grid-template-columns: repeat(3, 1fr); } table { font-size: 8.5pt; }
  .scroll { overflow: visible; } th, td { padding: .2rem .4rem; } }
"""


def render(data: Mapping[str, Any], routing: Mapping[str, Any]) -> str:
    """The whole page.

    Args:
        data: what [`~hf_moecal.report.data.collect`] returned.
        routing: what [`~hf_moecal.report.routing.collect_routing`] returned.

    Returns:
        HTML text.
    """
    body = [f"<h1>{escape(data['title'])}</h1>", f"<p>{escape(worst_group(data['rows']))}</p>", _headline(data)]
    body += [f'<p class="note">{_emphasised(HOW_TO_READ)}</p>', *_diagrams(data), *_configuration(routing)]
    body += [*_hard_against_soft(routing), *_load(routing), *_fragile(routing)]
    body.append(
        f'<p class="note">{data["bins"]} equal-width, right-closed bins of the top-label confidence. '
        f"{escape(BEYOND_CHANCE)}.</p>"
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(data['title'])}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def _emphasised(text: str) -> str:
    text = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", escape(text))
    return re.sub(r"\*(.+?)\*", r"<i>\1</i>", text)


def _table(head: Sequence[str], rows: Sequence[str], *, text: int = 1) -> str:
    top = "".join(f"<th{' class=text' if i < text else ''}>{escape(name)}</th>" for i, name in enumerate(head))
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _headline(data: Mapping[str, Any]) -> str:
    rows = []
    for (name, subset), members in sections(data["rows"]):
        rows.append(f'<tr><th colspan="{len(HEADINGS) + 1}">{escape(heading(name, subset))}</th></tr>')
        for row in members:
            marked = "".join(_figure(cell) for cell in cells(row, members, "**"))
            rows.append(f"<tr><td>{escape(row['method'])}</td>{marked}</tr>")
    return _table(["", *HEADINGS.values()], rows)


def _figure(cell: str) -> str:
    best, off = cell.startswith("**"), "†" in cell
    kinds = " ".join(name for name, holds in (("best", best), ("off", off)) if holds)
    return f'<td class="{kinds}">{cell.strip("*")}</td>' if kinds else f"<td>{cell}</td>"


def svg(figure: Figure, label: str) -> str:
    """A figure as inline SVG with real text, in the colours of the style sheet; the figure is closed."""
    import matplotlib
    import matplotlib.pyplot as plt

    buffer = StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    plt.close(figure)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    names = "figure|axes|patch|text|line2d|matplotlib|xtick|ytick|legend|[A-Z][A-Za-z]*Collection|QuadMesh"
    text = re.sub(rf'\sid="(?:{names})[\w.]*"', "", text)  # the same in every figure; nothing refers to them
    for color, variable in _VARIABLES.items():
        text = text.replace(color.lower(), f"var({variable})")
    size = re.search(r'viewBox="([^"]+)"', text)
    opened = f'<svg viewBox="{size.group(1) if size else ""}" role="img" aria-label="{escape(label)}"'
    opened += ' xmlns:xlink="http://www.w3.org/1999/xlink">'
    return opened + text[text.index(">") + 1 :]


def _diagrams(data: Mapping[str, Any]) -> list[str]:
    body = ["<h2>Reliability diagrams and confidence histograms</h2>"]
    for (name, subset), rows in sections(data["rows"]):
        drawn = [row for row in rows if row["diagram"]]
        title, like = heading(name, subset), [row["diagram"] for row in drawn]
        palette = figures.colours([row["method"] for row in drawn])
        body.append(f'<h3>{escape(title)}</h3><div class="grid">')
        for row in drawn:
            color, method = palette[row["method"]], row["method"]
            _, ece, gap = figures.panel_title("", {"scores": row}).split("\n")
            panel = figures.reliability_panel(row["diagram"], color=color, like=like)
            caption = f"<b>{escape(method)}</b>{escape(ece)}<br>{escape(gap)}"
            picture = svg(panel, f"Reliability diagram: {title}, {method}")
            body.append(f"<figure><figcaption>{caption}</figcaption>{picture}</figure>")
        body.append("</div>")
    return body


def _configuration(routing: Mapping[str, Any]) -> list[str]:
    drawn = {feature: methods for feature, methods in routing["configuration"].items() if methods}
    if not drawn:
        return []
    pictures = []
    for feature, methods in drawn.items():
        figure = figures.configuration_figure(methods, label=CONFIGURATION[feature])
        pictures.append(f"<figure>{svg(figure, f'Confidence minus accuracy by {CONFIGURATION[feature]}')}</figure>")
    return [
        "<h2>Calibration by routing configuration</h2>",
        "<p>Confidence minus accuracy of five equally large parts of all examples. A flat line at zero is what a "
        "shift of the routing cannot break; a slope means that more fragile inputs change the calibration.</p>",
        f'<div class="wide">{"".join(pictures)}</div>',
    ]


def _hard_against_soft(routing: Mapping[str, Any]) -> list[str]:
    rows = routing["hard_against_soft"]
    if not rows:
        return []
    lines = [
        "<tr>"
        + "".join(f"<td{' class=text' if i < 3 else ''}>{escape(cell)}</td>" for i, cell in enumerate(line))
        + "</tr>"
        for line in ([row["set"], row["method"], row["routing"], *cells(row, [row], "**")] for row in rows)
    ]
    return [
        "<h2>Hard against soft routing</h2>",
        "<p>The same model, once mixing its experts and once with the best-weighted expert alone.</p>",
        _table(["set", "method", "routing", *HEADINGS.values()], lines, text=3),
    ]


def _load(routing: Mapping[str, Any]) -> list[str]:
    if not routing["load"]:
        return []
    parts = [
        f'<figure class="load"><figcaption><b>{escape(method)}</b></figcaption>'
        f"{svg(figures.load_figure(load), f'Expert load: {method}')}</figure>"
        for method, load in routing["load"].items()
    ]
    intro = (
        "<p>Share of all selections that each expert gets. Rows that differ mean that the shift moves the routing.</p>"
    )
    return ["<h2>Expert load per set</h2>", intro, f'<div class="wide">{"".join(parts)}</div>']


def _fragile(routing: Mapping[str, Any]) -> list[str]:
    body = []
    for method, rows in routing["fragile"].items():
        if rows:
            texts = sum(name in ("id", "text", "group") for name in rows[0])
            lines = [
                "<tr>" + "".join(_fragile_cell(name, value) for name, value in row.items()) + "</tr>" for row in rows
            ]
            head = [name.replace("_", " ") for name in rows[0]]
            body += [f"<h3>{escape(method)}</h3>", _table(head, lines, text=texts)]
    if not body:
        return []
    intro = "<p>Wrong answers that rank highest in confidence, in the disagreement of the experts and in regret.</p>"
    return ["<h2>Most fragile examples</h2>", intro, *body]


def _fragile_cell(name: str, value: Any) -> str:
    if isinstance(value, list):
        text = ", ".join(f"{item:.2f}" if isinstance(item, float) else str(item) for item in value)
    else:
        text = f"{value:.3f}" if isinstance(value, float) else str(value)
    if name == "text":
        return f'<td class="long">{escape(text if len(text) <= 240 else text[:239] + "…")}</td>'
    return f"<td{' class=text' if name in ('id', 'group') else ''}>{escape(text)}</td>"
