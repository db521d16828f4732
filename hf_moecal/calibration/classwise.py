"""Calibrators with parameters per class: vector and matrix scaling; Platt and isotonic through scikit-learn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from hf_moecal.calibration.base import Calibrator
from hf_moecal.calibration.parameters import checked_matrix, checked_vector
from hf_moecal.calibration.rows import Rows
from hf_moecal.calibration.solver import log_softmax, shrunk_temperature


if TYPE_CHECKING:
    from typing_extensions import Self

_ROWS_PER_PARAMETER = 50
_ROWS_OF_OTHERS = 10  # than the most frequent class, for a fit with a ridge
_LARGEST_MATRIX = 64  # classes
_LEAST_LOG = float(np.log(np.finfo(np.float32).tiny))  # a class that a row does not have must not drown the others
_LARGEST_ODDS = 50.0
_ROWS_FOR_ISOTONIC = 1000  # per class; below that scikit-learn's own guide expects overfitting


class PerClass(Calibrator):
    """Shared by the calibrators that know how many classes they were fitted on."""

    rows_per_class: int
    ridged: ClassVar[bool] = False
    """Whether a ridge holds what too few rows leave open."""

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

    def misfit(self, rows: Rows) -> str | None:
        counts = rows.class_counts
        if self.ridged:
            others = int(counts.sum() - counts.max())
            if others >= _ROWS_OF_OTHERS:
                return None
            return (
                f"All but {others} labelled rows are of class {int(counts.argmax())}; {self.method} needs about "
                f"{_ROWS_OF_OTHERS} of other classes. A single temperature needs far fewer."
            )
        if counts.min() >= self.rows_per_class:
            return None
        return (
            f"Class {int(counts.argmin())} has {int(counts.min())} labelled rows; {self.method} needs about "
            f"{self.rows_per_class} per class. A single temperature needs far fewer."
        )


class _Affine(PerClass):
    """A scale and a shift per class."""

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
    """Scales and shifts the log-probability of each class: `softmax((1 + v) * log p / T + b)`.

    T is the temperature that the rows speak for (`ShrunkTemperatureCalibrator`), and a ridge on v and b, of the
    strength C (the number of classes) over n, draws the rest towards it: few rows give a temperature, many a scale and
    a shift of each class. It can change the prediction.

    Source: structured vector scaling of Berta et al., "Structured Matrix Scaling for Multi-Class Calibration",
    arXiv:2511.03685; without the ridge, vector scaling of Guo et al., arXiv:1706.04599, section 4.2.
    """

    method = "vector"
    ridged = True

    def _fit(self, rows: Rows) -> None:
        scores, temperature = _tempered(rows)
        classes = scores.shape[1]

        def affine(theta: np.ndarray) -> tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]:
            moved = (1 + theta[:classes]) * scores + theta[classes:]
            return moved, lambda residual: np.concatenate([(residual * scores).sum(0), residual.sum(0)])

        theta = _ridge_fit(rows, affine, np.full(2 * classes, 2.0 * classes))
        self.scale, self.bias = (1 + theta[:classes]) / temperature, theta[classes:]

    def _class_log_probs(self, log_probs: np.ndarray) -> np.ndarray:
        return log_softmax(self.scale * log_probs + self.bias)


class MatrixCalibrator(PerClass):
    """Mixes the log-probabilities of the classes: `softmax((I + W) log p / T + b)`, for a model that confuses them.

    As [`VectorCalibrator`], with a ridge of C (C - 1) over n on the entries of W beside the diagonal.

    Source: structured matrix scaling of Berta et al., arXiv:2511.03685.
    """

    method = "matrix"
    ridged = True

    weight: np.ndarray
    bias: np.ndarray

    def _num_classes(self) -> int:
        return len(self.bias)

    def _fit(self, rows: Rows) -> None:
        scores, temperature = _tempered(rows)
        classes = scores.shape[1]
        if classes > _LARGEST_MATRIX:
            raise ValueError(
                f"A matrix of {classes} classes has {classes**2:,} entries; it is fitted for up to {_LARGEST_MATRIX}."
            )

        def affine(theta: np.ndarray) -> tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]:
            moved = scores + scores @ theta[classes:].reshape(classes, classes).T + theta[:classes]
            return moved, lambda residual: np.concatenate([residual.sum(0), (residual.T @ scores).ravel()])

        ridge = np.full((classes, classes), 2.0 * classes * (classes - 1))
        np.fill_diagonal(ridge, 2.0 * classes)
        theta = _ridge_fit(rows, affine, np.concatenate([np.full(classes, 2.0 * classes), ridge.ravel()]))
        self.weight = (np.eye(classes) + theta[classes:].reshape(classes, classes)) / temperature
        self.bias = theta[:classes]

    def _class_log_probs(self, log_probs: np.ndarray) -> np.ndarray:
        return log_softmax(np.maximum(log_probs, _LEAST_LOG) @ self.weight.T + self.bias)

    def parameters(self) -> dict[str, Any]:
        return {"weight": self.weight.tolist(), "bias": self.bias.tolist()}

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, Any]) -> MatrixCalibrator:
        calibrator = cls()
        calibrator.bias = checked_vector(parameters.get("bias"), "bias")
        rows = checked_matrix(parameters.get("weight"), "weight")
        if {len(row) for row in rows} != {len(calibrator.bias)} or len(rows) != len(calibrator.bias):
            raise ValueError("Parameter 'weight' must be a square matrix with a row for each entry of 'bias'.")
        calibrator.weight = np.stack(rows)
        calibrator.fitted = True
        return calibrator


class PlattCalibrator(_Affine):
    """A logistic curve per class against the rest, on the class's log-odds; the classes are then normalised.

    The curve is scikit-learn's `LogisticRegression`. It can change the prediction.
    """

    method = "platt"
    rows_per_class = 2 * _ROWS_PER_PARAMETER

    def _fit(self, rows: Rows) -> None:
        from sklearn.linear_model import LogisticRegression

        odds = _log_odds(log_softmax(rows.logits))
        self.scale, self.bias = np.zeros(odds.shape[1]), np.zeros(odds.shape[1])
        counted = np.ones(len(rows)) if rows.weights is None else rows.weights
        for index in range(odds.shape[1]):
            is_class = rows.labels == index
            positive = float(counted @ is_class)
            if min(positive, rows.total - positive) <= 0:  # no curve through one kind of row: the rule of succession
                self.bias[index] = np.log((positive + 1) / (rows.total - positive + 1))
                continue
            curve = LogisticRegression(C=1.0, max_iter=1000, tol=1e-8)
            curve.fit(odds[:, index, None], is_class, sample_weight=rows.weights)
            self.scale[index], self.bias[index] = curve.coef_[0, 0], curve.intercept_[0]

    def _class_log_probs(self, log_probs: np.ndarray) -> np.ndarray:
        score = self.scale * _log_odds(log_probs) + self.bias
        return _normalised(-np.logaddexp(0.0, -score))


class IsotonicCalibrator(PerClass):
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

        probs = np.exp(log_softmax(rows.logits))
        floor = 1.0 / (rows.total + 2)
        curves = []
        for index, column in enumerate(probs.T):
            curve = IsotonicRegression(y_min=floor, y_max=1 - floor, out_of_bounds="clip")
            curves.append(curve.fit(column, rows.labels == index, sample_weight=rows.weights))
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


def _tempered(rows: Rows) -> tuple[np.ndarray, float]:
    """Log-probabilities at the temperature that the rows speak for, and that temperature."""
    temperature, _ = shrunk_temperature(rows.logits, rows.labels, weights=rows.weights, fit=rows.plain_fit)
    return np.maximum(log_softmax(rows.logits), _LEAST_LOG) / temperature, temperature


def _ridge_fit(
    rows: Rows,
    affine: Callable[[np.ndarray], tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]],
    ridge: np.ndarray,
) -> np.ndarray:
    """Parameters with the least loss plus `ridge / 2` times their squares.

    Args:
        affine: of the parameters, the scores `[n, C]` and what makes the parameters' gradient of the scores'.
        ridge: one for each parameter, in nats over all rows.
    """
    from scipy.optimize import minimize

    everyone = np.arange(len(rows))
    counts = np.ones(len(rows)) if rows.weights is None else rows.weights

    def loss(theta: np.ndarray) -> tuple[float, np.ndarray]:
        moved, gradient_of = affine(theta)
        log_probs = log_softmax(moved)
        residual = np.exp(log_probs)
        residual[everyone, rows.labels] -= 1.0
        value = 0.5 * ridge @ theta**2 - counts @ log_probs[everyone, rows.labels]
        return value / rows.total, (gradient_of(counts[:, None] * residual) + ridge * theta) / rows.total

    options = {"maxiter": 2000, "ftol": 0, "gtol": 1e-8}
    return minimize(loss, np.zeros(len(ridge)), jac=True, method="L-BFGS-B", options=options).x
