"""Draws the plain data of [`hf_moecal.report_data`] on given matplotlib axes; computes nothing.

Colours are the Okabe-Ito ones, which stay apart for colour-blind readers and in grey print.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import numpy as np


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
INK, MUTED, FAINT, PAPER = "#1f2328", "#6e7781", "#d0d7de", "#ffffff"
_STYLE = {
    "font.size": 9,
    "font.family": "DejaVu Sans",
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "savefig.facecolor": PAPER,
}


def style() -> AbstractContextManager[None]:
    """The look of all figures, as a matplotlib context."""
    import matplotlib

    return matplotlib.rc_context(_STYLE)


def colours(names: Sequence[str]) -> dict[str, str]:
    """One colour per name, in order."""
    return {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(names)}


def _filled(data: Mapping[str, Any]) -> np.ndarray:
    return np.asarray(data["count"]) > 0


def short_count(count: int) -> str:
    """`873`, `1.2k`, `45k`, `1.3M`: four characters at most."""
    for size, suffix in ((1_000_000, "M"), (1_000, "k")):
        if count >= size:
            value = count / size
            return f"{value:.1f}{suffix}" if value < 9.95 else f"{value:.0f}{suffix}"
    return str(count)


def draw_reliability(ax: Axes, data: Mapping[str, Any], *, color: str = PALETTE[0], limits: bool = True) -> None:
    """Draws accuracy against confidence per bin, with the bootstrap band and the diagonal of perfect calibration.

    Args:
        ax: axes to draw on.
        data: what [`~hf_moecal.report_data.reliability`] returned.
        color: colour of the curve.
        limits: fits the axes to the data; `False` leaves them (shared axes).
    """
    filled = _filled(data)
    x, y, low, high = (np.asarray(data[key], float)[filled] for key in ("confidence", "accuracy", "low", "high"))
    weight = np.asarray(data["count"], float)[filled]
    ax.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    ax.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0, zorder=2)
    ax.vlines(x, low, high, color=color, alpha=0.5, linewidth=1, zorder=2)
    ax.plot(x, y, color=color, linewidth=1.4, zorder=3)
    ax.scatter(x, y, s=14 + 46 * np.sqrt(weight / max(weight.max(initial=1), 1)), color=color, linewidth=0.8,
               edgecolor=PAPER, zorder=4)  # fmt: skip
    if limits:
        set_limits([ax], [data])


def set_limits(axes: Sequence[Axes], panels: Sequence[Mapping[str, Any]]) -> None:
    """One range for all panels, from the lowest filled bin to 1; bands may run out of it, points never do."""
    left, bottom = 0.9, 0.9
    for data in panels:
        filled = _filled(data)
        left = min([left, *np.asarray(data["edges"], float)[:-1][filled]])
        bottom = min([bottom, *np.asarray(data["accuracy"], float)[filled]])
    bottom = np.floor(min(bottom, left + 0.1) * 10 + 1e-9) / 10
    for ax in axes:
        ax.set_xlim(left, 1 + 0.03 * (1 - left))
        ax.set_ylim(bottom - 0.03 * (1 - bottom), 1 + 0.03 * (1 - bottom))


def draw_counts(ax: Axes, data: Mapping[str, Any], *, color: str = PALETTE[0]) -> None:
    """Draws how many examples each confidence bin holds, each bar with its number."""
    edges, count = np.asarray(data["edges"], float), np.asarray(data["count"])
    filled = _filled(data)
    ax.bar(
        edges[:-1], count, width=np.diff(edges), align="edge", color=color, alpha=0.55, linewidth=0.6, edgecolor=PAPER
    )
    text = {"ha": "center", "va": "bottom", "fontsize": 6.5, "color": INK, "rotation": 90 if filled.sum() > 9 else 0}
    for i in np.flatnonzero(filled):
        above = ((edges[i] + edges[i + 1]) / 2, count[i])
        ax.annotate(short_count(int(count[i])), above, (0, 2), textcoords="offset points", **text)
    ax.set_yticks([])
    ax.spines["left"].set_visible(False)


def panel_title(name: str, data: Mapping[str, Any]) -> str:
    """Method, ECE with its interval, signed gap and n, in three short lines."""
    scores = data["scores"]
    low, high = scores["ece_interval"]
    return (
        f"{name}\nECE {scores['ece']:.3f} [{low:.3f}, {high:.3f}]\n"
        f"gap {scores['signed_gap']:+.3f} · n {scores['n']:,}".replace("-", "−")
    )


def reliability_figure(panels: Mapping[str, Mapping[str, Any]], *, title: str) -> Figure:
    """Reliability diagrams side by side on shared axes, with the bin counts below.

    Args:
        panels: name of the panel -> data of [`~hf_moecal.report_data.reliability`].
        title: title of the figure.

    Returns:
        The figure; the caller saves and closes it.
    """
    import matplotlib.pyplot as plt

    with style():
        width = max(2.45 * len(panels) + 0.65, 3.8)
        figure, axes = plt.subplots(
            2, len(panels), figsize=(width, 4.15), sharex=True, sharey="row", squeeze=False,
            height_ratios=[3.4, 1], layout="constrained",
        )  # fmt: skip
        figure.get_layout_engine().set(w_pad=0.06, h_pad=0.04, hspace=0.02, wspace=0.02)
        for (top, bottom), (name, data), color in zip(
            axes.T, panels.items(), colours(list(panels)).values(), strict=True
        ):
            draw_reliability(top, data, color=color, limits=False)
            draw_counts(bottom, data, color=color)
            top.set_title(panel_title(name, data), linespacing=1.35)
            bottom.set_xlabel("confidence")
        set_limits(axes[0], list(panels.values()))
        tallest = max(max(data["count"], default=0) for data in panels.values())
        axes[1, 0].set_ylim(0, max(tallest, 1) * (1.9 if _crowded(panels) else 1.4))
        axes[0, 0].set_ylabel("accuracy")
        axes[1, 0].set_ylabel("examples")
        note = "below the dashed line: overconfident · above it: underconfident"
        figure.supxlabel(note, fontsize=7.5, color=MUTED)
        figure.suptitle(title, fontsize=11, fontweight="bold", x=0.01, ha="left")
    return figure


def _crowded(panels: Mapping[str, Mapping[str, Any]]) -> bool:
    return any(_filled(data).sum() > 9 for data in panels.values())
