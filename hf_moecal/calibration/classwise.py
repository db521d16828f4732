"""Calibrators with parameters per class: vector scaling, and Platt and isotonic through scikit-learn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_moecal.calibration.base import Calibrator, Rows
from hf_moecal.calibration.parameters import checked_matrix, checked_vector
from hf_moecal.calibration.solver import fit_temperature, log_softmax


if TYPE_CHECKING:
    from typing_extensions import Self

_ROWS_PER_PARAMETER = 50
_LARGEST_ODDS = 50.0
_ROWS_FOR_ISOTONIC = 1000  # per class; below that scikit-learn's own guide expects overfitting


class _PerClass(Calibrator):
    """Shared by the calibrators that know how many classes they were fitted on."""

    rows_per_class: int

    def _num_classes(self) -> int:
        raise NotImplementedError

    def _log_probs(self, rows: Rows) -> np.ndarray:
        classes = rows.logits.shape[1]
        if classes != self._num_classes():
            raise ValueError(
                f"The table has {classes} classes, but the {self.method} calibrator was fitted on "
                f"{self._num_classes()}; apply it to the same task."
            )
        return self._class_log_probs(log_softmax(rows.logits))

    def _class_log_probs(self, log_probs: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def _warn_if_few(self, rows: Rows) -> None:
        counts = np.bincount(rows.labels, minlength=rows.logits.shape[1])
        if counts.min() < self.rows_per_class:
            self._warn(
                f"Class {int(counts.argmin())} has {int(counts.min())} labelled rows; {self.method} needs about "
                f"{self.rows_per_class} per class. A single temperature needs far fewer."
            )


class _Affine(_PerClass):
    """A scale and a shift per class."""

    rows_per_class = 2 * _ROWS_PER_PARAMETER

    scale: np.ndarray
    bias: np.ndarray

    def _num_classes(self) -> int:
        return len(self.scale)

    def parameters(self) -> dict[str, Any]:
        return {"scale": self.scale.tolist(), "bias": self.bias.tolist()}

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, Any]) -> Self:
        calibrator = cls()
        calibrator.scale = checked_vector(parameters.get("scale"), "scale")
        calibrator.bias = checked_vector(parameters.get("bias"), "bias", length=len(calibrator.scale))
        calibrator.fitted = True
        return calibrator


class VectorCalibrator(_Affine):
    """Scales and shifts the log-probability of each class: `softmax(scale * log p + bias)`.

    The fit is the maximum of the posterior with a unit Gaussian prior around the single temperature, which matters
    only for classes with next to no rows. It can change the prediction.

    Source: Guo et al., "On Calibration of Modern Neural Networks", arXiv:1706.04599, section 4.2.
    """

    method = "vector"

    def _fit(self, rows: Rows) -> None:
        from scipy.optimize import minimize

        self._warn_if_few(rows)
        scores, labels = log_softmax(rows.logits), rows.labels
        count, classes = scores.shape
        start = fit_temperature(scores, labels)
        inverse = 1 / start.temperature if start.identified else 1.0
        prior = np.concatenate([np.full(classes, inverse), np.zeros(classes)])
        target = np.zeros_like(scores)
        target[np.arange(count), labels] = 1.0

        def loss(theta: np.ndarray) -> tuple[float, np.ndarray]:
            log_probs = log_softmax(theta[:classes] * scores + theta[classes:])
            residual = np.exp(log_probs) - target
            gradient = np.concatenate([(residual * scores).sum(axis=0), residual.sum(axis=0)])
            value = -log_probs[target > 0].sum() + 0.5 * ((theta - prior) ** 2).sum()
            return value / count, (gradient + theta - prior) / count

        found = minimize(loss, prior, jac=True, method="L-BFGS-B", options={"maxiter": 2000, "ftol": 0, "gtol": 1e-8})
        self.scale, self.bias = found.x[:classes], found.x[classes:]

    def _class_log_probs(self, log_probs: np.ndarray) -> np.ndarray:
        return log_softmax(self.scale * log_probs + self.bias)


class PlattCalibrator(_Affine):
    """A logistic curve per class against the rest, on the class's log-odds; the classes are then normalised.

    The curve is scikit-learn's `LogisticRegression`. It can change the prediction.
    """

    method = "platt"

    def _fit(self, rows: Rows) -> None:
        from sklearn.linear_model import LogisticRegression

        self._warn_if_few(rows)
        odds = _log_odds(log_softmax(rows.logits))
        self.scale, self.bias = np.zeros(odds.shape[1]), np.zeros(odds.shape[1])
        for index in range(odds.shape[1]):
            is_class = rows.labels == index
            if is_class.all() or not is_class.any():  # no curve through one kind of row: the rule of succession
                self.bias[index] = np.log((is_class.sum() + 1) / ((~is_class).sum() + 1))
                continue
            curve = LogisticRegression(C=1.0, max_iter=1000, tol=1e-8).fit(odds[:, index, None], is_class)
            self.scale[index], self.bias[index] = curve.coef_[0, 0], curve.intercept_[0]

    def _class_log_probs(self, log_probs: np.ndarray) -> np.ndarray:
        score = self.scale * _log_odds(log_probs) + self.bias
        return _normalised(-np.logaddexp(0.0, -score))


class IsotonicCalibrator(_PerClass):
    """A rising step-wise curve per class against the rest; the classes are then normalised.

    The curve is scikit-learn's `IsotonicRegression`, kept within `1/(n+2)` of 0 and 1: a probability of exactly zero
    makes one surprise infinitely costly. It can change the prediction.
    """

    method = "isotonic"
    rows_per_class = _ROWS_FOR_ISOTONIC

    thresholds: list[np.ndarray]
    values: list[np.ndarray]

    def _fit(self, rows: Rows) -> None:
        from sklearn.isotonic import IsotonicRegression

        self._warn_if_few(rows)
        probs = np.exp(log_softmax(rows.logits))
        floor = 1.0 / (len(rows) + 2)
        curves = [
            IsotonicRegression(y_min=floor, y_max=1 - floor, out_of_bounds="clip").fit(column, rows.labels == index)
            for index, column in enumerate(probs.T)
        ]
        self.thresholds = [curve.X_thresholds_ for curve in curves]
        self.values = [curve.y_thresholds_ for curve in curves]

    def _num_classes(self) -> int:
        return len(self.thresholds)

    def _class_log_probs(self, log_probs: np.ndarray) -> np.ndarray:
        probs = np.exp(log_probs)
        curves = zip(probs.T, self.thresholds, self.values, strict=True)
        return _normalised(np.log(np.stack([np.interp(*curve) for curve in curves], axis=1)))

    def parameters(self) -> dict[str, Any]:
        return {"thresholds": [v.tolist() for v in self.thresholds], "values": [v.tolist() for v in self.values]}

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, Any]) -> IsotonicCalibrator:
        calibrator = cls()
        calibrator.thresholds = checked_matrix(parameters.get("thresholds"), "thresholds", low=0.0, high=1.0)
        calibrator.values = checked_matrix(parameters.get("values"), "values", low=1e-12, high=1.0)
        shapes = [len(row) for row in calibrator.thresholds]
        rising = all((np.diff(row) >= 0).all() for row in [*calibrator.thresholds, *calibrator.values])
        if shapes != [len(row) for row in calibrator.values] or not rising:
            raise ValueError("'thresholds' and 'values' must be rising curves with as many points each.")
        calibrator.fitted = True
        return calibrator


def _log_odds(log_probs: np.ndarray) -> np.ndarray:
    """log p - log(1 - p), where the top class's complement is summed from the others so that it keeps its digits."""
    top = log_probs.argmax(axis=1)[:, None]
    others = log_probs.copy()
    np.put_along_axis(others, top, -np.inf, axis=1)
    with np.errstate(divide="ignore"):
        rest = np.log(-np.expm1(log_probs))
    np.put_along_axis(rest, top, np.logaddexp.reduce(others, axis=1, keepdims=True), axis=1)
    return np.clip(log_probs - rest, -_LARGEST_ODDS, _LARGEST_ODDS)


def _normalised(log_scores: np.ndarray) -> np.ndarray:
    return log_scores - np.logaddexp.reduce(log_scores, axis=1, keepdims=True)
