"""One sentence about a model's confidence: whether it can be trusted, and for whom not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


_SHOWN = 3


def verdict(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the figures of one method say.

    Args:
        rows: of [`~hf_moecal.report.collect`], for one method and the whole of each group.

    Returns:
        `dict`: `sentence`; `not_trusted`, the groups that are miscalibrated beyond chance (p < .05, corrected for
        their number), the largest error first; `trusted`, the others.
    """
    known = [row for row in rows if row["n"]]
    wrong = sorted((row for row in known if row["miscalibrated"]), key=lambda row: -row["ece"])
    fine = [row for row in known if not row["miscalibrated"]]
    return {
        "sentence": _sentence(wrong, fine),
        "not_trusted": [row["set"] for row in wrong],
        "trusted": [row["set"] for row in fine],
    }


def _sentence(wrong: Sequence[Mapping[str, Any]], fine: Sequence[Mapping[str, Any]]) -> str:
    if not wrong:
        n = sum(row["n"] for row in fine)
        worst = max((row["ece_interval"][1] for row in fine if row["ece_interval"]), default=None)
        seen = "" if worst is None else f"; an error of up to {worst:.2f} would fit what they show"
        return f"Nothing speaks against the confidence: no group is miscalibrated beyond chance ({n:,} rows{seen})."
    told = ", ".join(_described(row) for row in wrong[:_SHOWN])
    more = f", and {len(wrong) - _SHOWN} more groups" if len(wrong) > _SHOWN else ""
    if not fine:
        where = "" if len(wrong) == 1 else " for any group"
        return f"Do not trust the confidence{where}: {told}{more}."
    others = ", ".join(row["set"] for row in fine[:_SHOWN]) + (" and others" if len(fine) > _SHOWN else "")
    return f"Do not trust the confidence for {told}{more}; nothing speaks against it for {others}."


def _described(row: Mapping[str, Any]) -> str:
    gap = row["signed_gap"]
    low, high = row["signed_gap_interval"] or (0.0, 0.0)
    if low > 0 or high < 0:
        kind = f"{abs(gap):.2f} too {'sure' if gap > 0 else 'unsure'} on average"
    else:
        kind = f"off by {row['ece']:.2f}, in both directions"
    p = row["calibrated_p"]
    chance = "p < .001" if p < 0.001 else f"p = {p:.3f}".replace("0.", ".")
    return f"{row['set']} ({kind}: it says {row['confidence']:.2f} and is right in {row['accuracy']:.2f}; {chance})"
