"""The Space's page: paste probabilities and labels, see the calibration error and the reliability diagram."""

from __future__ import annotations

import re

import gradio
import matplotlib
import numpy as np

from hf_moecal.metrics import calibration_report, reliability_bins


matplotlib.use("Agg")

from matplotlib.figure import Figure


EXAMPLE_PROBS = "0.95 0.05\n0.90 0.10\n0.85 0.15\n0.20 0.80\n0.35 0.65\n0.70 0.30\n0.60 0.40\n0.10 0.90"
EXAMPLE_LABELS = "0 0 1 1 0 0 1 1"
SHOWN = (
    "ece",
    "ece_interval",
    "ece_noise_floor",
    "ece_debiased",
    "smooth_ece",
    "signed_gap",
    "accuracy",
    "nll",
    "brier",
    "n",
)


def read_matrix(text: str) -> list[list[float]]:
    """One row per line; numbers separated by blanks, commas or semicolons; brackets are ignored."""
    rows = [re.split(r"[\s,;]+", re.sub(r"[\[\]()]", " ", line).strip(" ,;\t")) for line in text.strip().splitlines()]
    try:
        return [[float(number) for number in row] for row in rows if row != [""]]
    except ValueError as error:
        raise gradio.Error(f"Not a number: {error}. Paste one row of probabilities per line.") from error


def measure(probs: str, labels: str) -> tuple[list[list[str]], Figure]:
    """The table of figures and the diagram for the pasted text."""
    matrix, flat = read_matrix(probs), [number for row in read_matrix(labels) for number in row]
    if any(number != int(number) for number in flat):
        raise gradio.Error("Labels are the numbers of the classes: 0, 1, 2, ...")
    try:
        report = calibration_report([int(number) for number in flat], probs=matrix)
    except ValueError as error:
        raise gradio.Error(str(error)) from error
    kept = [i for i, label in enumerate(flat) if label != -100]
    winners = np.asarray(matrix)[kept]
    correct = winners.argmax(1) == np.asarray(flat, dtype=int)[kept]
    return [[name, _show(report[name])] for name in SHOWN], diagram(winners.max(1), correct)


def _show(value: float | list[float]) -> str:
    return " to ".join(f"{v:.3f}" for v in value) if isinstance(value, list) else f"{value:.4g}"


def diagram(confidence: np.ndarray, correct: np.ndarray) -> Figure:
    """Accuracy against confidence, with the number of examples below."""
    bins = reliability_bins(np.minimum(confidence, 1.0), correct, bins=10)
    middle = [(low + high) / 2 for low, high in zip(bins["edges"][:-1], bins["edges"][1:], strict=True)]
    figure = Figure(figsize=(5, 5.6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    top.plot([0, 1], [0, 1], "--", color="grey", label="perfectly calibrated")
    top.bar(middle, np.nan_to_num(bins["accuracy"]), width=0.09, color="#4c72b0", alpha=0.8, label="accuracy")
    top.plot(bins["confidence"], bins["accuracy"], "o", color="#c44e52", label="at the mean confidence")
    top.set(ylabel="accuracy", xlim=(0, 1), ylim=(0, 1), title="Reliability diagram")
    top.legend(loc="upper left")
    bottom.bar(middle, bins["count"], width=0.09, color="grey")
    bottom.set(xlabel="confidence", ylabel="examples")
    return figure


def page() -> gradio.Blocks:
    with gradio.Blocks(title="Calibration error") as blocks:
        gradio.Markdown(
            "# Can these probabilities be trusted?\nPaste one row of class probabilities per line, and the labels."
        )
        with gradio.Row():
            with gradio.Column():
                probs = gradio.Textbox(EXAMPLE_PROBS, lines=8, label="Probabilities", elem_id="probs")
                labels = gradio.Textbox(EXAMPLE_LABELS, lines=2, label="Labels", elem_id="labels")
                button = gradio.Button("Measure", variant="primary", elem_id="measure")
                table = gradio.Dataframe(headers=["figure", "value"], label="Figures", elem_id="figures")
            plot = gradio.Plot(show_label=False, elem_id="diagram")
        button.click(measure, [probs, labels], [table, plot])
    return blocks


if __name__ == "__main__":
    page().launch()
