"""What is found of one feature of one window, and the measures that all tests share."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class FeatureDrift:
    """One feature of one window.

    Args:
        feature: name of the feature; with `/share` for the test of single shares.
        test: `ks` (two-sample Kolmogorov-Smirnov), `chi2` (chi-square, robust to dependence within a sequence) or
            `share` (the one category whose share changed most surely).
        statistic: value of the test statistic (D, or chi-square; for `share` the share in the window).
        effect: for `ks` and `chi2` the largest difference in probability, in [0, 1]; for `share` the relative change:
            0.5 for a share that halved or doubled, 1 for one that vanished or is new.
        shift: for numbers, the change of the mean in standard deviations of the reference; for counts `None`.
        psi: population stability index, in nats (over reference deciles for numbers); for `share` `None`.
        p_value: p-value of this test alone.
        effective_n: independent observations that the window is worth.
        category: for `share`, the category; `"(new)"` stands for all that the reference never had.
        reference_share: for `share`, its share in the reference.
        p_adjusted: p-value corrected for all features of the window.
        drift: whether the feature drifted: `p_adjusted <= alpha` and the effect is large enough.
    """

    feature: str
    test: str
    statistic: float
    effect: float
    shift: float | None
    psi: float | None
    p_value: float
    effective_n: float
    category: Any = None
    reference_share: float | None = None
    p_adjusted: float = float("nan")
    drift: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def __str__(self) -> str:
        if self.test == "share":
            change = f"{self.category}: {self.reference_share:.2%} -> {self.statistic:.2%}"
            return f"{self.feature} ({change}, p {self.p_adjusted:.1e})"
        return f"{self.feature} (effect {self.effect:.3f}, p {self.p_adjusted:.1e})"


def psi(reference: np.ndarray, window: np.ndarray, reference_n: float, window_n: float) -> float:
    """Population stability index of two vectors of shares, in nats; half a case per cell keeps an empty one
    finite."""
    cells = len(reference)
    p = (reference * reference_n + 0.5) / (reference_n + 0.5 * cells)
    q = (window * window_n + 0.5) / (window_n + 0.5 * cells)
    return float(((q - p) * np.log(q / p)).sum())
