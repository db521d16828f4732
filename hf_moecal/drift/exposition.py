"""The state of a monitor in Prometheus' text format, for the textfile collector of the node exporter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def exposition(
    window: Mapping[str, Any] | None, totals: Mapping[str, Any], labelled: Mapping[str, Any] | None = None
) -> str:
    """Renders the last window, the totals, and what late labels showed.

    Args:
        window: the last closed window (`Window.to_dict()`), or `None` before the first.
        totals: `windows`, `drifted`, `rows`, and `rejected` (reason -> rows).
        labelled: what [`~hf_moecal.drift.late_labels.score_labels`] found, where labels were given.

    Returns:
        Text in the exposition format 0.0.4.
    """
    rejected = [({"reason": reason}, count) for reason, count in sorted(totals["rejected"].items())]
    families = [
        ("moecal_windows_total", "counter", "Windows tested.", [({}, totals["windows"])]),
        ("moecal_drifted_windows_total", "counter", "Windows with drift.", [({}, totals["drifted"])]),
        ("moecal_rows_total", "counter", "Rows counted in windows.", [({}, totals["rows"])]),
        ("moecal_rejected_rows_total", "counter", "Rows set aside, by reason.", rejected),
    ]
    if window:
        families += _window_families(window)
    if labelled:
        families.append(
            ("moecal_labelled_drift", "gauge", "1 if accuracy or calibration drifted.", [({}, labelled["drift"])])
        )
        for key in ("n", "accuracy", "ece", "signed_gap"):
            families.append((f"moecal_labelled_{key}", "gauge", f"Of labelled rows: {key}.", [({}, labelled[key])]))
    return "".join(_family(*family) for family in families)


def _window_families(window: Mapping[str, Any]) -> list[tuple[str, str, str, list]]:
    def per_feature(key: str) -> list:
        return [({"feature": f["feature"]}, f[key]) for f in window["features"] if f[key] is not None]

    families = [
        ("moecal_window_index", "gauge", "Number of the last window, from 0.", [({}, window["index"])]),
        ("moecal_window_sequences", "gauge", "Sequences in the last window.", [({}, window["sequences"])]),
        ("moecal_window_drift", "gauge", "1 if anything drifted in the last window.", [({}, window["drift"])]),
        ("moecal_window_rejected_rows", "gauge", "Rows set aside in the last window.", [({}, window["rejected"])]),
        ("moecal_drift", "gauge", "1 if the feature drifted in the last window.", per_feature("drift")),
        (
            "moecal_drift_effect",
            "gauge",
            "Difference in probability to the reference, or change of a share.",
            per_feature("effect"),
        ),
        ("moecal_drift_psi", "gauge", "Population stability index in nats.", per_feature("psi")),
        ("moecal_drift_p_adjusted", "gauge", "Corrected p-value.", per_feature("p_adjusted")),
        ("moecal_mean_shift", "gauge", "Change of the mean in standard deviations.", per_feature("shift")),
    ]
    for key, value in (window["estimate"] or {}).items():
        text = f"Estimated without labels: {key.replace('_', ' ')}."
        families.append((f"moecal_estimated_{key}", "gauge", text, [({}, value)]))
    return families


def _family(name: str, kind: str, text: str, samples: Iterable[tuple[Mapping[str, str], float]]) -> str:
    lines = [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
    for labels, value in samples:
        inner = ",".join(f'{key}="{_escape(text)}"' for key, text in labels.items())
        lines.append(f"{name}{{{inner}}} {float(value)!r}" if inner else f"{name} {float(value)!r}")
    return "\n".join(lines) + "\n"


def _escape(text: str) -> str:
    return str(text).replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
