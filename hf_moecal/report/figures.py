"""Draws the plain data of [`hf_moecal.report.data`] on given matplotlib axes; computes nothing.

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
    """Draws accuracy against confidence per bin, with their 95 % intervals and the diagonal of perfect calibration.

    Args:
        ax: axes to draw on.
        data: what [`~hf_moecal.report.data.reliability`] returned.
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
    """Draws how many examples each confidence bin holds, the wrong ones in grey, each bar with its number."""
    edges, count = np.asarray(data["edges"], float), np.asarray(data["count"], float)
    filled = _filled(data)
    right = count * np.nan_to_num(np.asarray(data["accuracy"], float))
    bars = {"width": np.diff(edges), "align": "edge", "linewidth": 0.6, "edgecolor": PAPER}
    ax.bar(edges[:-1], right, color=color, alpha=0.55, **bars)
    ax.bar(edges[:-1], count - right, bottom=right, color=MUTED, **bars)
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
        panels: name of the panel -> data of [`~hf_moecal.report.data.reliability`].
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
        note = "below the dashed line: overconfident · above it: underconfident · grey bars: wrong answers"
        figure.supxlabel(note, fontsize=7.5, color=MUTED)
        figure.suptitle(title, fontsize=11, fontweight="bold", x=0.01, ha="left")
    return figure


def _crowded(panels: Mapping[str, Mapping[str, Any]]) -> bool:
    return any(_filled(data).sum() > 9 for data in panels.values())


def reliability_panel(data: Mapping[str, Any], *, color: str, like: Sequence[Mapping[str, Any]]) -> Figure:
    """One reliability diagram with its counts and without a title, on the axes range of `like`."""
    import matplotlib.pyplot as plt

    with style():
        figure, (top, bottom) = plt.subplots(2, 1, figsize=(3.1, 3.6), sharex=True, height_ratios=[2.8, 1])
        figure.subplots_adjust(left=0.16, right=0.98, top=0.98, bottom=0.12, hspace=0.06)
        draw_reliability(top, data, color=color, limits=False)
        draw_counts(bottom, data, color=color)
        set_limits([top], like)
        tallest = max(max(each["count"]) for each in like)
        bottom.set_ylim(0, tallest * (1.9 if _crowded(dict(enumerate(like))) else 1.4))
        top.set_ylabel("accuracy")
        bottom.set_xlabel("confidence")
    return figure


def draw_configuration(ax: Axes, methods: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Draws confidence minus accuracy against a routing feature, one line per method, with 95 % intervals.

    Args:
        ax: axes to draw on.
        methods: method -> parts of [`~hf_moecal.report.routing.by_configuration`].
    """
    ax.axhline(0, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    for (name, parts), color in zip(methods.items(), colours(list(methods)).values(), strict=True):
        x, gap, low, high = (np.array([part[key] for part in parts]) for key in ("value", "gap", "low", "high"))
        ax.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0)
        ax.plot(x, gap, color=color, marker="o", markersize=4, linewidth=1.4, label=name)
    ax.set_ylabel("confidence − accuracy")
    ax.margins(x=0.04)
    ax.locator_params(axis="x", nbins=5)


def configuration_figure(methods: Mapping[str, Sequence[Mapping[str, Any]]], *, label: str) -> Figure:
    """The figure of one routing feature."""
    import matplotlib.pyplot as plt

    with style():
        figure, ax = plt.subplots(figsize=(4.2, 3.1), layout="constrained")
        draw_configuration(ax, methods)
        ax.set_xlabel(f"{label} (fifths of the examples)")
        if len(methods) > 1:
            figure.legend(loc="outside upper left", ncols=2, frameon=False, fontsize=7.5, handlelength=1.4)
    return figure


def draw_load(ax: Axes, load: Mapping[str, Sequence[float]]) -> None:
    """Draws the share of selections per expert (columns) and evaluation set (rows), with numbers up to 16 experts.

    Args:
        ax: axes to draw on.
        load: set -> shares, see [`~hf_moecal.report.routing.expert_load`].
    """
    width = max(map(len, load.values()))
    shares = np.array([[*row, *[0.0] * (width - len(row))] for row in load.values()])
    top = max(shares.max(), 2 / width)
    ax.pcolormesh(shares, cmap="Blues", vmin=0, vmax=top, edgecolor=PAPER, linewidth=1 if width <= 32 else 0)
    for (i, j), share in np.ndenumerate(shares) if width <= 16 else ():
        ax.text(j + 0.5, i + 0.5, f"{share:.2f}".lstrip("0"), ha="center", va="center", fontsize=7.5,
                color="#fefefe" if share > 0.6 * top else "#111418")  # fmt: skip
    ax.set_yticks(np.arange(len(shares)) + 0.5, list(load))
    step = 1 if width <= 16 else -(-width // 8)
    ax.set_xticks(np.arange(0, width, step) + 0.5, np.arange(0, width, step))
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.invert_yaxis()
    ax.set_xlabel("expert")


def load_figure(load: Mapping[str, Sequence[float]]) -> Figure:
    """The expert load of one method."""
    import matplotlib.pyplot as plt

    with style():
        width = min(max(0.45 * max(map(len, load.values())) + 1.4, 3.1), 7.5)
        figure, ax = plt.subplots(figsize=(width, 0.34 * len(load) + 0.75), layout="constrained")
        draw_load(ax, load)
    return figure
