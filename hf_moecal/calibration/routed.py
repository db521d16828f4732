"""Calibrators that look at the routing: a temperature per expert, per group, or as a function of routing features."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from hf_moecal.calibration.base import Calibrator
from hf_moecal.calibration.parameters import (
    checked_matrix,
    checked_number,
    checked_temperature,
    checked_vector,
)
from hf_moecal.calibration.rows import Rows
from hf_moecal.calibration.solver import TemperatureFit, fit_temperature, log_softmax, row_losses
from hf_moecal.calibration.temperature import require_identified, small_sample_warning


_ROWS_PER_SLOPE = 100
_LARGEST_LOG_T = np.log(1e3)


def shrunk_temperatures(fits: Mapping[Any, TemperatureFit], centre: float) -> dict[Any, float]:
    """Temperatures drawn towards `centre`, each by how little its rows say: an empirical-Bayes mean of log T.

    A fit with standard error s keeps the share `v / (v + s^2)` of its distance, with v the variance between the
    fits beyond what their errors explain (the moment estimate of DerSimonian and Laird). s^2 falls as 1/n.
    """
    known = {key: fit for key, fit in fits.items() if fit.identified and np.isfinite(fit.log_error)}
    distance = np.array([np.log(fit.temperature / centre) for fit in known.values()])
    square = np.array([fit.log_error**2 for fit in known.values()])
    between = _variance_between(distance, square) if len(known) > 1 else 0.0
    share = between / (between + square) if len(known) else square
    result = dict.fromkeys(fits, centre)
    for key, log_ratio in zip(known, share * distance, strict=True):
        result[key] = float(centre * np.exp(log_ratio))
    return result


def _variance_between(distance: np.ndarray, square: np.ndarray) -> float:
    weight = 1.0 / square
    mean = weight @ distance / weight.sum()
    excess = weight @ (distance - mean) ** 2 - (len(distance) - 1)
    return max(0.0, float(excess / (weight.sum() - (weight**2).sum() / weight.sum())))


class GroupedTemperatureCalibrator(Calibrator):
    """One temperature per group of rows, drawn towards the global one by how few rows the group has.

    Groups are the values of a column, or, where no column is known, clusters of expert usage (columns `expert_ids`
    and `expert_weights`) as pseudo-domains. A group that was not seen in the fit gets the global temperature.

    Args:
        by: the column that names the group, or `"expert_usage"`.
        clusters: number of clusters for `"expert_usage"`.
        seed: of the clustering.
    """

    method = "grouped_temperature"

    temperature: float
    groups: dict[str, float]

    def __init__(self, *, by: str = "group", clusters: int = 4, seed: int = 0) -> None:
        self.by, self.clusters, self.seed = by, clusters, seed
        self.reads = ("expert_ids", "expert_weights") if by == "expert_usage" else (by,)
        self.centres: np.ndarray | None = None

    def _fit(self, rows: Rows) -> None:
        if self.by == "expert_usage":
            self.centres = self._cluster(rows)
        keys = self._keys(rows)
        total = require_identified(rows.plain_fit, len(rows))
        self.temperature = total.temperature
        fits = {}
        for key in np.unique(keys):
            mine = keys == key
            if rows.weights is None:
                fits[str(key)] = fit_temperature(rows.logits[mine], rows.labels[mine])
            elif (mine := mine & (rows.weights > 0)).any():
                fits[str(key)] = fit_temperature(rows.logits[mine], rows.labels[mine], weights=rows.weights[mine])
        self.groups = shrunk_temperatures(fits, total.temperature)
        sentence = small_sample_warning(total, len(rows))
        if sentence:
            self._warn(sentence)

    def _cluster(self, rows: Rows) -> np.ndarray:
        from sklearn.cluster import KMeans

        usage = _expert_usage(rows)
        if self.clusters > len(usage):
            raise ValueError(f"Cannot make {self.clusters} clusters of {len(usage)} rows; ask for fewer clusters.")
        clusters = KMeans(self.clusters, n_init=4, random_state=self.seed)
        return clusters.fit(usage, sample_weight=rows.weights).cluster_centers_

    def _keys(self, rows: Rows) -> np.ndarray:
        if self.centres is None:
            return rows.column(self.by).astype(str)
        usage = _expert_usage(rows)
        width = max(usage.shape[1], self.centres.shape[1])  # an expert may turn up that the fit never saw
        usage, centres = (np.pad(a, ((0, 0), (0, width - a.shape[1]))) for a in (usage, self.centres))
        distance = ((usage[:, None, :] - centres[None]) ** 2).sum(axis=2)
        return distance.argmin(axis=1).astype(str)

    def _log_probs(self, rows: Rows) -> np.ndarray:
        temperatures = np.array([self.groups.get(key, self.temperature) for key in self._keys(rows).tolist()])
        return log_softmax(rows.logits / temperatures[:, None])

    def parameters(self) -> dict[str, Any]:
        return {
            "by": self.by,
            "temperature": self.temperature,
            "groups": self.groups,
            "centres": None if self.centres is None else self.centres.tolist(),
        }

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, Any]) -> GroupedTemperatureCalibrator:
        by, groups = parameters.get("by"), parameters.get("groups")
        if not isinstance(by, str) or not isinstance(groups, dict):
            raise ValueError("A grouped temperature needs 'by' (a column's name) and 'groups' (name: temperature).")
        calibrator = cls(by=by)
        calibrator.temperature = checked_temperature(parameters.get("temperature"))
        calibrator.groups = {key: checked_temperature(value, "groups") for key, value in groups.items()}
        if parameters.get("centres") is not None:
            centres = checked_matrix(parameters["centres"], "centres", low=0.0, high=1.0)
            if len({len(row) for row in centres}) != 1:
                raise ValueError("Parameter 'centres' must have rows of one length.")
            calibrator.centres = np.stack(centres)
        if (calibrator.centres is not None) != (by == "expert_usage"):
            raise ValueError("A grouped temperature has 'centres' exactly when it is by 'expert_usage'.")
        calibrator.fitted = True
        return calibrator


class PerExpertTemperatureCalibrator(Calibrator):
    """A temperature per expert, then one for the mixture: calibrated experts, as in MoCaE.

    Reads `expert_logits` `[k, C]` per row (what each selected expert predicts alone), `expert_weights` `[k]` and
    `expert_ids` `[k]`. Each expert's temperature is fitted on the rows that it serves, weighted by its share r_k, and
    drawn towards the common one by how few they are. The result is `log sum_k r_k softmax(z_k / T_k)`, divided by an
    aggregate temperature: it replaces the model's own prediction by the mixture of its experts' predictions.

    Fitted on the predictions of a mixture readout, whose table holds the experts that are mixed and their shares, it
    is that mixture of calibrated experts, and a model that reads the mixture applies it in its forward.

    Source: Oksuz et al., "MoCaE: Mixture of Calibrated Experts", arXiv:2309.14976; the baseline of arXiv:2606.20544.
    """

    method = "per_expert_temperature"
    reads = ("expert_logits", "expert_weights", "expert_ids")

    temperature: float
    shared: float
    experts: dict[int, float]

    def _fit(self, rows: Rows) -> None:
        logits, shares, ids = _experts(rows)
        labels = np.repeat(rows.labels, ids.shape[1], axis=0)
        counted = shares if rows.weights is None else shares * rows.weights[:, None]
        flat, weights, chosen = logits.reshape(-1, logits.shape[-1]), counted.ravel(), ids.ravel()
        self.shared = require_identified(fit_temperature(flat, labels, weights=weights), len(rows)).temperature
        fits = {}
        for expert in np.unique(chosen).tolist():
            mine = (chosen == expert) & (weights > 0)
            if mine.any():
                fits[expert] = fit_temperature(flat[mine], labels[mine], weights=weights[mine])
        self.experts = shrunk_temperatures(fits, self.shared)
        aggregate = fit_temperature(self._mixture(logits, shares, ids), rows.labels, weights=rows.weights)
        self.temperature = require_identified(aggregate, len(rows)).temperature
        sentence = small_sample_warning(aggregate, len(rows))
        if sentence:
            self._warn(sentence)

    def temperatures(self, count: int) -> tuple[float, ...]:
        """One for each of `count` experts; the common one for those that served no row of the fit."""
        return tuple(self.experts.get(expert, self.shared) for expert in range(count))

    def _mixture(self, logits: np.ndarray, shares: np.ndarray, ids: np.ndarray) -> np.ndarray:
        temperatures = np.array(self.temperatures(int(ids.max()) + 1))[ids]
        with np.errstate(divide="ignore"):
            weighted = np.log(shares)[..., None] + log_softmax(logits / temperatures[..., None])
        return np.logaddexp.reduce(weighted, axis=1)

    def _log_probs(self, rows: Rows) -> np.ndarray:
        return log_softmax(self._mixture(*_experts(rows)) / self.temperature)

    def parameters(self) -> dict[str, Any]:
        experts = {str(key): value for key, value in self.experts.items()}
        return {"temperature": self.temperature, "shared": self.shared, "experts": experts}

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, Any]) -> PerExpertTemperatureCalibrator:
        experts = parameters.get("experts")
        if not isinstance(experts, dict) or not all(key.isdecimal() and len(key) < 10 for key in experts):
            raise ValueError("Parameter 'experts' must map expert numbers to temperatures.")
        calibrator = cls()
        calibrator.temperature = checked_temperature(parameters.get("temperature"))
        calibrator.shared = checked_temperature(parameters.get("shared"), "shared")
        calibrator.experts = {int(key): checked_temperature(value, "experts") for key, value in experts.items()}
        calibrator.fitted = True
        return calibrator


class RoutingTemperatureCalibrator(Calibrator):
    """A temperature that depends on the routing: log T is linear in entropy, margin, disagreement and confidence.

    The features are standardised, the slopes have a unit Gaussian prior, and log T is kept within the range that the
    fitted rows span, so that a row unlike any of them cannot get an absurd temperature.
    """

    method = "routing_temperature"
    reads = ("routing_entropy", "routing_margin", "disagreement")

    coefficients: np.ndarray
    mean: np.ndarray
    spread: np.ndarray
    log_range: tuple[float, float]

    def _fit(self, rows: Rows) -> None:
        from scipy.optimize import minimize

        raw = self._features(rows)
        counts = np.ones(len(rows)) if rows.weights is None else rows.weights
        self.mean = np.average(raw, axis=0, weights=counts)
        spread = np.sqrt(np.average((raw - self.mean) ** 2, axis=0, weights=counts))
        self.spread = np.where(spread > 1e-9 * (1 + np.abs(self.mean)), spread, 1.0)
        design = self._design(raw)
        start = require_identified(rows.plain_fit, len(rows))

        def loss(theta: np.ndarray) -> tuple[float, np.ndarray]:
            log_t = design @ theta
            inverse = np.exp(-np.clip(log_t, -_LARGEST_LOG_T, _LARGEST_LOG_T))
            losses, slopes, _ = row_losses(rows.logits, rows.labels, inverse)
            prior = np.concatenate([[0.0], theta[1:]])
            gradient = design.T @ (-inverse * slopes * counts) + prior
            return (counts @ losses + 0.5 * prior @ prior) / rows.total, gradient / rows.total

        first = np.zeros(design.shape[1])
        first[0] = np.log(start.temperature)
        found = minimize(loss, first, jac=True, method="L-BFGS-B", options={"maxiter": 500, "ftol": 0, "gtol": 1e-8})
        self.coefficients = found.x
        fitted = (design @ found.x)[counts > 0]
        self.log_range = (float(fitted.min()), float(fitted.max()))

    def misfit(self, rows: Rows) -> str | None:
        coefficients = len(self.reads) + 2
        if len(rows) >= _ROWS_PER_SLOPE * coefficients:
            return None
        return f"{len(rows)} labelled rows are few for {coefficients} coefficients of the routing."

    def _features(self, rows: Rows) -> np.ndarray:
        routing = [rows.column(name).astype(np.float64) for name in self.reads]
        raw = np.stack([*routing, np.exp(log_softmax(rows.logits).max(axis=1))], axis=1)
        if not np.isfinite(raw).all():
            raise ValueError(f"Columns {', '.join(self.reads)} must be finite; drop rows without routing features.")
        return raw

    def _design(self, raw: np.ndarray) -> np.ndarray:
        return np.concatenate([np.ones((len(raw), 1)), (raw - self.mean) / self.spread], axis=1)

    def _log_probs(self, rows: Rows) -> np.ndarray:
        log_t = np.clip(self._design(self._features(rows)) @ self.coefficients, *self.log_range)
        return log_softmax(rows.logits * np.exp(-log_t)[:, None])

    def parameters(self) -> dict[str, Any]:
        return {
            "coefficients": self.coefficients.tolist(),
            "mean": self.mean.tolist(),
            "spread": self.spread.tolist(),
            "log_range": list(self.log_range),
        }

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, Any]) -> RoutingTemperatureCalibrator:
        calibrator, features = cls(), len(cls.reads) + 1
        calibrator.coefficients = checked_vector(parameters.get("coefficients"), "coefficients", length=features + 1)
        calibrator.mean = checked_vector(parameters.get("mean"), "mean", length=features)
        calibrator.spread = checked_vector(parameters.get("spread"), "spread", length=features, low=1e-12)
        ends = checked_vector(parameters.get("log_range"), "log_range", length=2, low=-10.0, high=10.0)
        calibrator.log_range = (checked_number(ends[0].item(), "log_range", high=ends[1].item()), ends[1].item())
        calibrator.fitted = True
        return calibrator


def _experts(rows: Rows) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Experts' logits `[n, k, C]`, shares `[n, k]` that sum to one, and expert numbers `[n, k]`."""
    logits, weights, ids = (rows.column(name) for name in PerExpertTemperatureCalibrator.reads)
    if logits.ndim != 3 or weights.shape != logits.shape[:2] or ids.shape != weights.shape:
        raise ValueError(
            f"Per row 'expert_logits' must be [k, C] with 'expert_weights' and 'expert_ids' [k]; got shapes "
            f"{logits.shape}, {weights.shape} and {ids.shape}."
        )
    if not np.isfinite(logits).all():
        raise ValueError("Column 'expert_logits' has a value that is not finite; drop or repair that row.")
    return logits, _shares(weights), ids.astype(np.int64)


def _shares(weights: np.ndarray) -> np.ndarray:
    total = weights.sum(axis=-1, keepdims=True, dtype=np.float64)
    if not np.isfinite(weights).all() or (weights < 0).any() or not (total > 0).all():
        raise ValueError("Column 'expert_weights' must be finite, not negative, and not all zero in a row.")
    return weights / total


def _expert_usage(rows: Rows) -> np.ndarray:
    """Share of the routing mass that each expert gets, `[n, E]`."""
    ids, weights = rows.column("expert_ids"), rows.column("expert_weights")
    if ids.shape != weights.shape or ids.ndim != 2 or (ids < 0).any():
        raise ValueError(
            f"Columns 'expert_ids' and 'expert_weights' must be [k] per row; got {ids.shape}, {weights.shape}."
        )
    usage = np.zeros((len(ids), int(ids.max()) + 1))
    np.add.at(usage, (np.arange(len(ids))[:, None], ids), _shares(weights))
    return usage
