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
KINDS = ("probabilities", "probabilities, rounded", "logits")
SHOWN = (
    *("ece", "ece_interval", "calibrated_p", "ece_noise_floor", "ece_debiased", "smooth_ece"),
    *("signed_gap", "signed_gap_interval", "accuracy", "nll", "n_zero_probability", "brier", "n"),
)
_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?|[+-]?inf(?:inity)?|nan"


def read_matrix(text: str) -> list[list[float]]:
    """One row per pair of innermost brackets, or where there are none one per line; any separators.

    Raises:
        ValueError: something is not a number, or rows are of different lengths.
    """
    rows = re.findall(r"[\[(]([^\[\]()]*)[\])]", text) if re.search(r"[\[(]", text) else text.splitlines()
    matrix = [[float(number) for number in re.findall(_NUMBER, row, re.IGNORECASE)] for row in rows if row.strip()]
    left = re.sub(_NUMBER, " ", text, flags=re.IGNORECASE)
    strange = re.search(r"[^\s,;|\[\]()]+", left)
    if strange:
        raise ValueError(f"{strange.group()!r} is not a number; paste one row per line, or rows in brackets.")
    if len({len(row) for row in matrix}) > 1:
        sizes = ", ".join(str(len(row)) for row in matrix[:6])
        raise ValueError(f"the rows hold {sizes} numbers; every row needs one number per class.")
    return matrix


def read_labels(text: str) -> list[int]:
    """The numbers of the classes, in whatever brackets, lines and separators."""
    numbers = [number for row in read_matrix(re.sub(r"[\[\]()\s,;]+", " ", text)) for number in row]
    if any(number != int(number) for number in numbers if np.isfinite(number)) or not np.isfinite(numbers).all():
        raise ValueError("labels are the numbers of the classes: 0, 1, 2, ...")
    return [int(number) for number in numbers]


def measure(text: str, labels: str, kind: str) -> tuple[list[list[str]], Figure | None, str]:
    """The table of figures, the diagram and what is wrong for the pasted text: figures never outlive their input."""
    try:
        matrix, references = read_matrix(text), read_labels(labels)
        given = {"logits" if kind == "logits" else "probs": matrix, "renormalize": kind == KINDS[1]}
        report = calibration_report(references, **given)
        drawn = diagram(*_winners(np.asarray(matrix), np.asarray(references), kind))
    except ValueError as error:
        return [], None, f"**Not measured:** {_for_the_page(str(error))}"
    return [[name, _show(report[name])] for name in SHOWN], drawn, _verdict(report)


def _winners(scores: np.ndarray, labels: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Confidence and correctness of the labelled rows."""
    if kind == "logits":
        scores = np.exp(scores - scores.max(1, keepdims=True))
    if kind != KINDS[0]:
        scores = scores / scores.sum(1, keepdims=True)
    kept = labels != -100
    return np.minimum(scores.max(1), 1.0)[kept], (scores.argmax(1) == labels)[kept]


def _for_the_page(message: str) -> str:
    """The remedy in terms of what the page offers."""
    message = message.replace("pass them as logits", f"choose “{KINDS[2]}” above")
    return message.replace("pass renormalize=True (--renormalize)", f"choose “{KINDS[1]}” above")


def _verdict(report: dict) -> str:
    p = report["calibrated_p"]
    if p >= 0.05:
        return f"A calibrated model would show as much by chance (p = {p:.2g}): no evidence against it."
    return f"**Miscalibrated beyond chance** (p = {p:.2g})."


def _show(value: float | list[float]) -> str:
    return " to ".join(f"{v:.3f}" for v in value) if isinstance(value, list) else f"{value:.4g}"


def diagram(confidence: np.ndarray, correct: np.ndarray) -> Figure:
    """Accuracy against confidence with its 95 % interval, and the number of examples below."""
    bins = {key: np.asarray(value, float) for key, value in reliability_bins(confidence, correct, bins=10).items()}
    middle = (bins["edges"][:-1] + bins["edges"][1:]) / 2
    figure = Figure(figsize=(5, 5.6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    top.plot([0, 1], [0, 1], "--", color="grey", label="perfectly calibrated")
    top.bar(middle, np.nan_to_num(bins["accuracy"]), width=0.09, color="#4c72b0", alpha=0.8, label="accuracy")
    top.vlines(bins["confidence"], bins["band_low"], bins["band_high"], color="#333333", label="95 % interval")
    top.plot(bins["confidence"], bins["accuracy"], "o", color="#c44e52", label="at the mean confidence")
    top.set(ylabel="accuracy", xlim=(0, 1), ylim=(0, 1), title="Reliability diagram")
    top.legend(loc="upper left")
    bottom.bar(middle, bins["count"], width=0.09, color="grey")
    bottom.set(xlabel="confidence", ylabel="examples")
    return figure


def page() -> gradio.Blocks:
    with gradio.Blocks(title="Calibration error") as blocks:
        gradio.Markdown(
            "# Can these probabilities be trusted?\n"
            "Paste one row per line (or rows in brackets), one number per class, and the labels."
        )
        with gradio.Row():
            with gradio.Column():
                kind = gradio.Radio(list(KINDS), value=KINDS[0], label="The numbers are", elem_id="kind")
                probs = gradio.Textbox(EXAMPLE_PROBS, lines=8, label="Numbers", elem_id="probs")
                labels = gradio.Textbox(EXAMPLE_LABELS, lines=2, label="Labels", elem_id="labels")
                button = gradio.Button("Measure", variant="primary", elem_id="measure")
                verdict = gradio.Markdown(elem_id="verdict")
                table = gradio.Dataframe(headers=["figure", "value"], label="Figures", elem_id="figures")
            plot = gradio.Plot(show_label=False, elem_id="diagram")
        button.click(measure, [probs, labels, kind], [table, plot, verdict])
    return blocks


if __name__ == "__main__":
    page().launch()
