"""One temperature for all rows: the plain one, the one a robust objective asks for, and the most cautious one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.optimize import brentq
from scipy.special import stdtrit

from hf_moecal.calibration.base import Calibrator
from hf_moecal.calibration.parameters import checked_number, checked_temperature
from hf_moecal.calibration.rows import Rows
from hf_moecal.calibration.solver import (
    MAX_TEMPERATURE,
    TemperatureFit,
    fit_temperature,
    log_softmax,
    row_losses,
    shrunk_temperature,
)


WIDE_INTERVAL = 1.5  # ratio of the interval's ends above which the sample is called too small


def require_identified(fit: TemperatureFit, count: int) -> TemperatureFit:
    """Raises when the loss has no minimum at a finite temperature."""
    if fit.identified:
        return fit
    if fit.temperature == 1:
        reason = f"The scores of these {count} rows are the same for all classes, so T changes nothing"
    elif fit.temperature < 1:
        reason = f"All {count} rows are classified right, so the loss only falls as T goes to 0"
    else:
        reason = f"On these {count} rows the scores say nothing about the labels, so T goes to infinity"
    raise ValueError(f"{reason}: no temperature is best. Fit on more rows, or check that labels and logits match.")


def small_sample_warning(fit: TemperatureFit, count: int) -> str | None:
    """One sentence when the interval of T is wide, else nothing."""
    low, high = fit.interval
    if high / low <= WIDE_INTERVAL:
        return None
    return (
        f"{count} labelled rows are few for a temperature: T = {fit.temperature:.3g}, "
        f"95 % interval {low:.3g} to {high:.3g}."
    )


class IdentityCalibrator(Calibrator):
    """Leaves the probabilities as they are: what is recorded when no calibration is best."""

    method = "none"

    def _fit(self, rows: Rows) -> None:
        pass

    def _log_probs(self, rows: Rows) -> np.ndarray:
        return log_softmax(rows.logits)

    def parameters(self) -> dict[str, Any]:
        return {}

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, Any]) -> IdentityCalibrator:
        calibrator = cls()
        calibrator.fitted = True
        return calibrator


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
        return rows.plain_fit

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


class ShrunkTemperatureCalibrator(TemperatureCalibrator):
    """The temperature that the rows speak for, and 1 where they do not: what few rows can be trusted with.

    The mean of log T after the rows were seen, when before them T was 1 (the model is calibrated) with probability
    2/3, and else log T normal around 0 with standard deviation 1. It is the best temperature where the rows say that
    the model is not calibrated, 1 where they say that it is, and in between where they are too few to say. It exists
    for any rows, also where all are classified right. After the fit, `evidence` is the probability that T is not 1.

    Example:

    ```python
    >>> import numpy as np
    >>> from hf_moecal.calibration import ShrunkTemperatureCalibrator
    >>> rng = np.random.default_rng(0)
    >>> logits = rng.normal(size=(100, 3))
    >>> label = (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)  # drawn from softmax(logits)
    >>> abs(ShrunkTemperatureCalibrator().fit({"logits": logits, "label": label}).temperature - 1) < 0.05
    True
    >>> ShrunkTemperatureCalibrator().fit({"logits": 4 * logits, "label": label}).temperature > 3
    True

    ```

    Source: a spike-and-slab prior, as of Mitchell and Beauchamp, "Bayesian Variable Selection in Linear Regression",
    JASA 83 (1988), on the logarithm of one temperature. Measured by scripts/benchmark_calibrators.py.
    """

    method = "shrunk_temperature"

    evidence: float

    def _fit(self, rows: Rows) -> None:
        given = {"weights": rows.weights, "fit": rows.plain_fit}
        self.temperature, self.evidence = shrunk_temperature(rows.logits, rows.labels, **given)
        self.interval = None

    def parameters(self) -> dict[str, Any]:
        return {"temperature": self.temperature, "evidence": self.evidence}

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, Any]) -> ShrunkTemperatureCalibrator:
        calibrator = cls()
        calibrator.evidence = checked_number(parameters.get("evidence"), "evidence", low=0.0, high=1.0)
        calibrator._take(parameters)
        return calibrator


class RobustTemperatureCalibrator(TemperatureCalibrator):
    """The temperature that a robust objective asks for: it fits the hard rows, not the average row.

    It minimises the tilted loss `(1/eta) log mean exp(eta l)` over T, or with `filtered` the plain mean plus the
    tilted mean over the routing-relevant rows (columns `regret` and `disagreement`). It gives up some calibration on
    data like the fitted rows for calibration on harder data, so compare both before use.

    Args:
        eta: tilt in 1/nat.
        filtered: tilt the routing-relevant rows only.

    Source: the objectives of arXiv:2606.20544, with the model held fixed.
    """

    method = "robust_temperature"

    def __init__(self, *, eta: float = 1.0, filtered: bool = False) -> None:
        self.eta = checked_number(eta, "eta", low=0.0, high=100.0)
        self.filtered = bool(filtered)
        self.reads = ("regret", "disagreement") if filtered else ()

    def _solve(self, rows: Rows) -> TemperatureFit:
        relevant = self._relevant(rows)
        given = {"weights": rows.weights, "start": rows.plain_fit.temperature if rows.plain_fit.identified else None}
        return fit_temperature(rows.logits, rows.labels, eta=self.eta, relevant=relevant, **given)

    def _relevant(self, rows: Rows) -> np.ndarray | None:
        if not self.filtered:
            return None
        import torch

        from hf_moecal.objectives import routing_relevance

        regret, disagreement = (torch.from_numpy(rows.column(name)) for name in self.reads)
        relevant = routing_relevance(regret, disagreement).numpy()
        if not relevant.any():
            self._warn("No row is routing-relevant, so the filtered temperature is the plain one.")
        return relevant

    def parameters(self) -> dict[str, Any]:
        return {**super().parameters(), "eta": self.eta, "filtered": self.filtered}

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, Any]) -> RobustTemperatureCalibrator:
        if type(parameters.get("filtered")) is not bool:
            raise ValueError("Parameter 'filtered' must be true or false.")
        calibrator = cls(eta=checked_number(parameters.get("eta"), "eta"), filtered=parameters["filtered"])
        calibrator._take(parameters)
        return calibrator


class ConservativeTemperatureCalibrator(TemperatureCalibrator):
    """The highest temperature that the fitted rows do not speak against: insurance that costs nothing measurable.

    A shift nearly always leaves a model too sure, hardly ever not sure enough. The loss is flat around its best
    temperature, so labelled rows only tell a range of temperatures. This takes its upper end: the highest T that
    raises their mean loss by no more than `tolerance`, and at which a one-sided paired t-test of the rows' losses
    against those at the best T does not reject at `level`. With few rows the tolerance decides, with many the test.
    After the fit, `temperature` is that T and `optimum` the best one.

    Args:
        level: of the test, above 0 and at most 0.5, which gives the best temperature itself.
        tolerance: share of the mean loss, above 0.

    Raises:
        ValueError: in `fit`, rows that tell no temperature from any other.

    Example:

    ```python
    >>> import numpy as np
    >>> from hf_moecal import ConservativeTemperatureCalibrator
    >>> rng = np.random.default_rng(0)
    >>> logits = rng.normal(size=(2000, 3))
    >>> label = (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)  # drawn from softmax(logits)
    >>> calibrator = ConservativeTemperatureCalibrator().fit({"logits": logits, "label": label})
    >>> calibrator.optimum < calibrator.temperature < 1.2 * calibrator.optimum
    True

    ```

    Source: our own; in the spirit of the one-standard-error rule of Breiman et al., "Classification and Regression
    Trees" (1984), section 3.4.3. Measured in recipes/RESULTS.md, "The benchmark".
    """

    method = "conservative_temperature"

    optimum: float

    def __init__(self, *, level: float = 0.05, tolerance: float = 0.01) -> None:
        self.level = checked_number(level, "level", low=1e-6, high=0.5)
        self.tolerance = checked_number(tolerance, "tolerance", low=1e-6)

    def _fit(self, rows: Rows) -> None:
        super()._fit(rows)
        self.optimum, self.interval = self.temperature, None
        self.temperature = self._highest(rows)

    def _highest(self, rows: Rows) -> float:
        """Where the first of the two begins to speak against, found on the logarithm of T."""
        best = row_losses(rows.logits, rows.labels, 1 / self.optimum)[0]
        share = np.full(len(rows), 1 / len(rows)) if rows.weights is None else rows.weights / rows.weights.sum()
        count = int((share > 0).sum())
        allowed = self.tolerance * (share @ best)
        critical = stdtrit(max(count - 1, 1), 1 - self.level)

        def excess(log_temperature: float) -> float:
            """Above zero where the mean loss rises by more than is allowed, or by more than chance would have it."""
            lost = row_losses(rows.logits, rows.labels, np.exp(-log_temperature))[0] - best
            mean = share @ lost
            error = np.sqrt((share**2 @ (lost - mean) ** 2) * count / (count - 1)) if count > 1 else np.inf
            statistic = mean / error if error > 0 else 0.0  # no difference at all, at the optimum
            return max(mean / allowed - 1, statistic - critical)

        low, end = np.log(self.optimum), np.log(MAX_TEMPERATURE)
        while low < end:
            high = min(low + 0.1, end)
            if excess(high) > 0:
                return float(np.exp(brentq(excess, low, high, xtol=1e-10)))
            low = high
        raise ValueError(
            f"These {len(rows)} rows do not tell the best temperature, {self.optimum:.3g}, from one of "
            f"{MAX_TEMPERATURE:g}: the scores say next to nothing about the labels. Check that they match."
        )

    def parameters(self) -> dict[str, Any]:
        settings = {"level": self.level, "tolerance": self.tolerance}
        return {"temperature": self.temperature, "optimum": self.optimum, **settings}

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, Any]) -> ConservativeTemperatureCalibrator:
        calibrator = cls(level=parameters.get("level"), tolerance=parameters.get("tolerance"))
        calibrator.optimum = checked_temperature(parameters.get("optimum"), "optimum")
        calibrator._take(parameters)
        return calibrator
