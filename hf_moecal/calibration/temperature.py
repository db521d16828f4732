"""One temperature for all rows: the plain one, and the one that a robust objective asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from hf_moecal.calibration.base import Calibrator, Rows
from hf_moecal.calibration.record import is_number
from hf_moecal.calibration.solver import MAX_TEMPERATURE, MIN_TEMPERATURE, TemperatureFit, fit_temperature, log_softmax


WIDE_INTERVAL = 1.5  # ratio of the interval's ends above which the sample is called too small


def require_identified(fit: TemperatureFit, count: int) -> TemperatureFit:
    """Raises when the loss has no minimum at a finite temperature."""
    if fit.identified:
        return fit
    if fit.temperature < 1:
        reason = f"All {count} rows are classified right, so the loss only falls as T goes to 0"
    else:
        reason = f"On these {count} rows the scores say nothing about the labels, so T goes to infinity"
    raise ValueError(f"{reason}: no temperature is best. Fit on more rows, or check that labels and logits match.")


def checked_temperature(value: Any, name: str = "temperature") -> float:
    """A temperature from a file, within the range that a fit can give."""
    if not is_number(value) or not MIN_TEMPERATURE <= value <= MAX_TEMPERATURE:
        raise ValueError(
            f"{name!r} must be a number from {MIN_TEMPERATURE} to {MAX_TEMPERATURE}; got {str(value)[:30]}."
        )
    return float(value)


def small_sample_warning(fit: TemperatureFit, count: int) -> str | None:
    """One sentence when the interval of T is wide, else nothing."""
    low, high = fit.interval
    if high / low <= WIDE_INTERVAL:
        return None
    return (
        f"{count} labelled rows are few for a temperature: T = {fit.temperature:.3g}, "
        f"95 % interval {low:.3g} to {high:.3g}."
    )


class TemperatureCalibrator(Calibrator):
    """Divides the logits by one temperature, the one with the least negative log-likelihood on the fitted rows.

    The fit is a Newton iteration to convergence in float64. After it, `temperature` and `interval` (95 %) are set.

    Example:

    ```python
    >>> import numpy as np
    >>> from hf_moecal import TemperatureCalibrator
    >>> rng = np.random.default_rng(0)
    >>> logits = rng.normal(size=(2000, 3))
    >>> label = (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)  # drawn from softmax(logits)
    >>> overconfident = {"logits": 3 * logits, "label": label}
    >>> calibrator = TemperatureCalibrator().fit(overconfident)
    >>> abs(calibrator.temperature - 3) < 0.3
    True
    >>> calibrator.apply(overconfident)["probs"].shape
    (2000, 3)

    ```

    Source: Guo et al., "On Calibration of Modern Neural Networks", arXiv:1706.04599, section 4.2.
    """

    method = "temperature"

    temperature: float
    interval: tuple[float, float] | None = None

    def _fit(self, rows: Rows) -> None:
        fit = require_identified(self._solve(rows), len(rows))
        self.temperature, self.interval = fit.temperature, fit.interval
        sentence = small_sample_warning(fit, len(rows))
        if sentence:
            self._warn(sentence)

    def _solve(self, rows: Rows) -> TemperatureFit:
        return fit_temperature(rows.logits, rows.labels)

    def _log_probs(self, rows: Rows) -> np.ndarray:
        return log_softmax(np.divide(rows.logits, self.temperature, dtype=np.float64))

    def parameters(self) -> dict[str, Any]:
        return {"temperature": self.temperature, "interval": None if self.interval is None else list(self.interval)}

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, Any]) -> TemperatureCalibrator:
        calibrator = cls()
        calibrator._take(parameters)
        return calibrator

    def _take(self, parameters: Mapping[str, Any]) -> None:
        self.temperature = checked_temperature(parameters.get("temperature"))
        interval = parameters.get("interval")
        if interval is not None:
            if not isinstance(interval, list) or len(interval) != 2:
                raise ValueError(f"'interval' must be two numbers; got {str(interval)[:30]}.")
            self.interval = (
                checked_temperature(interval[0], "interval"),
                checked_temperature(interval[1], "interval"),
            )
        self.fitted = True
