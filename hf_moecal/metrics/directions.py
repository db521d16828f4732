"""Which way each figure is better: the one table that says so."""

from __future__ import annotations


LOWER, HIGHER, NEITHER = "lower", "higher", "neither"

DIRECTIONS = {
    **dict.fromkeys(("ece", "ece_l2", "ece_max", "mce", "ece_debiased", "ece_l2_debiased", "smooth_ece"), LOWER),
    **dict.fromkeys(("loss", "nll", "brier", "reliability", "within_bins", "aurc", "group_spread"), LOWER),
    "n_zero_probability": LOWER,
    **dict.fromkeys(("accuracy", "auroc", "resolution"), HIGHER),
    # Best at 0, or at the accuracy, or said by the data alone.
    **dict.fromkeys(("signed_gap", "confidence", "ece_noise_floor", "uncertainty", "n", "n_ignored"), NEITHER),
    "calibrated_p": NEITHER,  # evidence, which more rows make stronger
}
"""The better side of every figure that a report or a metric gives: lower, higher, or neither."""


def direction_of(name: str) -> str | None:
    """The better side of a figure, by its name or the end of it; `None` for a figure that is not ours.

    Example:

    ```python
    >>> from hf_moecal.metrics.directions import direction_of
    >>> direction_of("eval_tweets_sequence_ece"), direction_of("accuracy"), direction_of("eval_f1")
    ('lower', 'higher', None)

    ```
    """
    ends = [key for key in DIRECTIONS if f"_{name}".endswith(f"_{key}")]
    return DIRECTIONS[max(ends, key=len)] if ends else None
