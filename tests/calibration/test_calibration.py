"""Post-hoc calibrators against independent optimisers and plain loops."""

from __future__ import annotations

import warnings
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import trapezoid
from scipy.optimize import minimize_scalar
from scipy.stats import norm, ttest_rel
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression

from hf_moecal import TemperatureCalibrator
from hf_moecal.calibration import (
    METHODS,
    Calibrator,
    ConservativeTemperatureCalibrator,
    GroupedTemperatureCalibrator,
    IsotonicCalibrator,
    MatrixCalibrator,
    PerExpertTemperatureCalibrator,
    PlattCalibrator,
    RobustTemperatureCalibrator,
    RoutingTemperatureCalibrator,
    ShrunkTemperatureCalibrator,
    VectorCalibrator,
)
from hf_moecal.calibration.routed import shrunk_temperatures
from hf_moecal.calibration.solver import TemperatureFit, fit_temperature, row_losses
from tests.calibration.helpers import drawn, routed


pytestmark = pytest.mark.filterwarnings("ignore:.*labelled rows")


def nll_by_loop(logits: np.ndarray, labels: np.ndarray, temperature: float) -> np.ndarray:
    tensor = torch.nn.functional.cross_entropy(
        torch.from_numpy(logits / temperature), torch.from_numpy(labels), reduction="none"
    )
    return tensor.numpy()


def best_temperature(objective) -> float:
    found = minimize_scalar(lambda u: objective(np.exp(u)), bounds=(-6, 6), method="bounded", options={"xatol": 1e-10})
    return float(np.exp(found.x))


@pytest.mark.parametrize("true", [0.1, 0.3, 1.0, 2.7, 20.0])
def test_temperature_is_the_optimum_and_recovers_a_known_scale(true):
    logits, label = drawn(20_000, 10)
    base = TemperatureCalibrator().fit({"logits": logits, "label": label}).temperature
    fitted = TemperatureCalibrator().fit({"logits": true * logits, "label": label})
    assert fitted.temperature == pytest.approx(true * base, rel=1e-9)
    assert abs(base - 1) < 0.03  # sampling error of 20,000 labels
    oracle = best_temperature(lambda t: nll_by_loop(true * logits, label, t).mean())
    assert fitted.temperature == pytest.approx(oracle, rel=1e-5)
    low, high = fitted.interval
    assert low < true < high and high / low < 1.06


def test_temperature_of_exact_frequencies_is_exact():
    # Each of 7 score rows is repeated with labels in exactly the proportions of softmax(z / T): T is the optimum.
    rng, true = np.random.default_rng(0), 3.7
    counts = rng.integers(1, 200, size=(7, 5))
    scores = true * np.log(counts)
    logits = np.repeat(scores, counts.sum(axis=1), axis=0)
    label = np.concatenate([np.repeat(np.arange(5), row) for row in counts])
    assert TemperatureCalibrator().fit({"logits": logits, "label": label}).temperature == pytest.approx(true, abs=1e-9)


def test_temperature_takes_few_passes(monkeypatch):
    logits, label = drawn(20_000, 10)
    seen = []

    def counting(scores, *arguments):
        seen.append(len(scores))
        return row_losses(scores, *arguments)

    monkeypatch.setattr("hf_moecal.calibration.solver.row_losses", counting)
    fit_temperature(5 * logits, label)
    assert sum(seen) < 6 * 20_000


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 6), st.floats(0.05, 15), st.sampled_from([0.0, 0.5, 2.0]))
def test_fit_is_stationary_for_any_scale(seed, classes, scale, eta):
    logits, label = drawn(200, classes, seed=seed)
    relevant = np.random.default_rng(seed).random(200) < 0.4
    for mask in (None, relevant) if eta else (None,):
        fit = fit_temperature(scale * logits, label, eta=eta, relevant=mask)
        if fit.identified:

            def objective(t, mask=mask):
                losses = nll_by_loop(scale * logits, label, t)
                if not eta:
                    return losses.mean()
                chosen = losses if mask is None else losses[mask]
                tilted = np.log(np.mean(np.exp(eta * (chosen - chosen.max())))) / eta + chosen.max()
                return tilted if mask is None else losses.mean() + tilted

            here = objective(fit.temperature)
            for other in (0.9, 0.999, 1.001, 1.1):
                assert here <= objective(other * fit.temperature) + 1e-12


def test_row_losses_match_autograd():
    logits, label = drawn(50, 5)
    inverse = torch.full((50,), 0.7, dtype=torch.float64, requires_grad=True)
    loss = torch.nn.functional.cross_entropy(
        torch.from_numpy(logits) * inverse[:, None], torch.from_numpy(label), reduction="none"
    )
    (first,) = torch.autograd.grad(loss.sum(), inverse, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), inverse)
    expected = np.stack([loss.detach(), first.detach(), second.detach()])
    np.testing.assert_allclose(row_losses(logits, label, 0.7), expected, atol=1e-12)


def test_large_tables_are_worked_in_blocks(monkeypatch):
    logits, label = drawn(1000, 7)
    whole = row_losses(logits, label, 0.5)
    monkeypatch.setattr("hf_moecal.calibration.solver._BLOCK", 50)
    np.testing.assert_array_equal(row_losses(logits, label, 0.5), whole)


def test_interval_covers_the_truth():
    covered = 0
    for seed in range(200):
        logits, label = drawn(300, 3, seed=seed)
        low, high = fit_temperature(2 * logits, label).interval
        covered += low <= 2 <= high
    assert 182 <= covered <= 198  # binomial(200, .95): .91 to .99


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_low_precision_logits_are_worked_on_in_float64(dtype):
    logits, label = drawn(500)
    rounded = (100 * logits).astype(dtype)
    expected = fit_temperature(rounded.astype(np.float64), label).temperature
    assert fit_temperature(rounded, label).temperature == pytest.approx(expected, rel=1e-12)
    table = TemperatureCalibrator().fit({"logits": rounded, "label": label}).apply({"logits": rounded})
    assert table["probs"].dtype == np.float64
    np.testing.assert_allclose(table["probs"].sum(axis=1), 1, atol=1e-14)


def test_apply_keeps_everything_else_and_twice_is_once():
    logits, label = drawn(100)
    label[:5] = -100
    table = Dataset.from_dict(
        {"note": list("ab") * 50, "logits": 3 * logits, "label": label, "confidence": [0.0] * 100}
    )
    calibrator = TemperatureCalibrator().fit(table)
    once = calibrator.apply(table)
    assert once.column_names == ["note", "logits", "label", "confidence", "probs", "prediction"]
    assert once["note"][:] == table["note"][:] and once["logits"][:] == table["logits"][:]
    probs = np.array(once["probs"])
    np.testing.assert_allclose(
        probs, torch.softmax(torch.from_numpy(3 * logits / calibrator.temperature), 1), atol=1e-12
    )
    assert once["prediction"][:] == probs.argmax(axis=1).tolist() == logits.argmax(axis=1).tolist()
    assert once["confidence"][:] == probs.max(axis=1).tolist()
    assert np.array(calibrator.apply(once)["probs"]).tolist() == probs.tolist()
    mapping = calibrator.apply({"logits": 3 * logits})
    assert mapping["probs"].tolist() == probs.tolist()


def test_probs_alone_give_what_logits_give():
    logits, label = drawn(300)
    probs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    one = TemperatureCalibrator().fit({"logits": logits, "label": label})
    other = TemperatureCalibrator().fit({"probs": probs, "label": label})
    assert one.temperature == pytest.approx(other.temperature, rel=1e-12)
    applied = other.apply({"probs": probs})
    assert other.apply(applied)["probs"].tolist() == applied["probs"].tolist()
    np.testing.assert_allclose(applied["logits"], np.log(probs), atol=1e-12)
    zero = TemperatureCalibrator().fit({"probs": np.array([[1.0, 0.0]] * 9 + [[0.6, 0.4]]), "label": [0] * 9 + [1]})
    assert np.isfinite(zero.apply({"probs": [[0.0, 1.0]]})["probs"]).all()


def test_ignored_labels_do_not_count():
    logits, label = drawn(400)
    kept = TemperatureCalibrator().fit({"logits": logits[:300], "label": label[:300]}).temperature
    label[300:] = -100
    assert TemperatureCalibrator().fit({"logits": logits, "label": label}).temperature == kept


@pytest.mark.parametrize(
    "table, said",
    [
        ({"logits": [[1.0, 2.0]]}, "no column 'label'"),
        ({"label": [0]}, "no column 'probs'"),
        ({"logits": [[1.0, np.nan]], "label": [0]}, "not finite in row 0"),
        ({"logits": [[1.0, 2.0]], "label": [2]}, "out of range"),
        ({"logits": [[1.0, 2.0]], "label": [-1]}, "out of range"),
        ({"logits": [[1.0, 2.0]], "label": [-100]}, "no labelled row"),
        ({"logits": [[1.0, 2.0]], "label": [0.5]}, "class number"),
        ({"logits": [1.0, 2.0], "label": [0, 1]}, "one number per class"),
        ({"logits": [[1.0]], "label": [0]}, "C >= 2"),
        ({"probs": [[0.5, 0.2]], "label": [0]}, "sum to 1"),
        ({"probs": [[1.5, -0.5]], "label": [0]}, "negative"),
        ({"logits": np.eye(3), "label": [0, 1, 2]}, "classified right"),
        ({"logits": np.eye(3), "label": [1, 2, 0]}, "say nothing"),
    ],
)
def test_bad_tables_are_refused(table, said):
    with pytest.raises(ValueError, match=said):
        TemperatureCalibrator().fit(table)


def test_few_rows_warn_with_the_interval():
    logits, label = drawn(30, seed=1)
    with pytest.warns(UserWarning, match="30 labelled rows are few.*95 % interval"):
        calibrator = TemperatureCalibrator().fit({"logits": logits, "label": label})
    assert len(calibrator.warnings) == 1
    logits, label = drawn(3000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert calibrator.fit({"logits": logits, "label": label}).warnings == ()


def test_training_rows_are_refused():
    table = routed()
    with pytest.raises(ValueError, match="2 rows of the table .such as id 'row-3'"):
        TemperatureCalibrator().fit(table, training_ids={"row-3", "row-5", "elsewhere"})
    TemperatureCalibrator().fit(table, training_ids={"elsewhere"})
    numbered = {**table, "id": np.arange(800)}
    TemperatureCalibrator().fit(numbered, training_ids={"0"})  # a position says nothing about identity


def test_robust_temperature_fits_the_hard_rows():
    easy, hard = drawn(900), drawn(100, seed=1)
    logits = np.concatenate([1.2 * easy[0], 4 * hard[0]])
    label = np.concatenate([easy[1], hard[1]])
    plain = TemperatureCalibrator().fit({"logits": logits, "label": label}).temperature
    table = {
        "logits": logits,
        "label": label,
        "regret": np.r_[np.zeros(900), np.ones(100)],
        "disagreement": np.zeros(1000),
    }
    robust = RobustTemperatureCalibrator(eta=1.0).fit(table).temperature
    filtered = RobustTemperatureCalibrator(eta=1.0, filtered=True).fit(table).temperature
    assert plain < robust and plain < filtered
    oracle = best_temperature(lambda t: np.log(np.exp(nll_by_loop(logits, label, t)).mean()))
    assert robust == pytest.approx(oracle, rel=1e-5)

    def objective(t):
        losses = nll_by_loop(logits, label, t)
        return losses.mean() + np.log(np.exp(losses[900:]).mean())

    assert filtered == pytest.approx(best_temperature(objective), rel=1e-5)
    assert RobustTemperatureCalibrator(eta=0.0).fit(table).temperature == pytest.approx(plain, rel=1e-9)
    with pytest.warns(UserWarning, match="No row is routing-relevant"):
        nothing = RobustTemperatureCalibrator(filtered=True).fit({**table, "regret": np.zeros(1000)})
    assert nothing.temperature == pytest.approx(plain, rel=1e-9)


@pytest.mark.parametrize("level", [0.01, 0.05, 0.3])
def test_conservative_temperature_is_the_highest_that_a_paired_test_accepts(level):
    logits, label = drawn(1000)
    table = {"logits": 3 * logits, "label": label}
    fitted = ConservativeTemperatureCalibrator(level=level, tolerance=1.0).fit(table)
    plain = TemperatureCalibrator().fit(table).temperature
    assert fitted.optimum == plain < fitted.temperature
    best = nll_by_loop(3 * logits, label, plain)

    def p_value(temperature):
        return ttest_rel(nll_by_loop(3 * logits, label, temperature), best, alternative="greater").pvalue

    assert p_value(fitted.temperature) == pytest.approx(level, rel=1e-4)
    between = np.geomspace(plain, fitted.temperature, 50)[1:-1]
    assert all(p_value(temperature) > level for temperature in between)
    assert p_value(1.02 * fitted.temperature) < level


@pytest.mark.parametrize("tolerance", [0.001, 0.01])
def test_conservative_temperature_costs_no_more_than_it_may(tolerance):
    logits, label = drawn(80)
    fitted = ConservativeTemperatureCalibrator(level=0.01, tolerance=tolerance).fit({"logits": logits, "label": label})
    losses = [nll_by_loop(logits, label, t).mean() for t in (fitted.temperature, fitted.optimum)]
    assert losses[0] / losses[1] - 1 == pytest.approx(tolerance, rel=1e-6) and fitted.temperature > fitted.optimum


def test_conservative_temperature_nears_the_best_with_more_rows_and_is_it_at_one_half():
    logits, label = drawn(40_000)
    excess = []
    for count in (400, 4000, 40_000):
        fitted = ConservativeTemperatureCalibrator(tolerance=1.0).fit(
            {"logits": logits[:count], "label": label[:count]}
        )
        excess.append(np.log(fitted.temperature / fitted.optimum))
    assert excess[0] > 2 * excess[1] > 4 * excess[2] > 0  # falls as 1 / sqrt(n): by 3.2 each time
    half = ConservativeTemperatureCalibrator(level=0.5).fit({"logits": logits, "label": label})
    assert half.temperature == pytest.approx(half.optimum, rel=1e-3)


def test_conservative_temperature_refuses_settings_and_rows_that_bound_nothing():
    for setting in ({"level": 0}, {"level": 0.6}, {"level": "5%"}, {"tolerance": 0}, {"tolerance": -0.1}):
        (name,) = setting
        with pytest.raises(ValueError, match=f"'{name}' must be a number from 1e-06"):
            ConservativeTemperatureCalibrator(**setting)
    label = np.array([0, 1] * 50)
    logits = np.zeros((100, 2))
    logits[:51, 0] = 1e-3  # hardly anything
    with pytest.raises(ValueError, match="say nothing about the labels|do not tell the best temperature"):
        ConservativeTemperatureCalibrator().fit({"logits": logits, "label": label})


@pytest.mark.parametrize("kind", [VectorCalibrator, MatrixCalibrator])
def test_structured_scaling_matches_torch(kind):
    """The ridges of structured scaling as its authors' code has them, on the mean loss, with another optimiser."""
    count, classes = 600, 3
    logits, label = drawn(count, classes)
    logits = logits * [1.0, 2.0, 3.0] + [0.5, 0.0, -1.0]
    calibrator = kind().fit({"logits": logits, "label": label})
    temperature = ShrunkTemperatureCalibrator().fit({"logits": logits, "label": label}).temperature
    scores, target = torch.log_softmax(torch.from_numpy(logits), 1) / temperature, torch.from_numpy(label)
    delta = torch.zeros(classes, classes, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    settings = {"max_iter": 1000, "line_search_fn": "strong_wolfe", "tolerance_grad": 1e-10, "tolerance_change": 0}
    optimizer = torch.optim.LBFGS([delta, bias], **settings)
    diagonal = torch.eye(classes, dtype=torch.bool)

    def closure():
        optimizer.zero_grad()
        weight = delta * diagonal if kind is VectorCalibrator else delta
        loss = torch.nn.functional.cross_entropy(scores + torch.nn.functional.linear(scores, weight, bias), target)
        ridge = classes / count * (bias.square().sum() + weight[diagonal].square().sum())
        ridge = ridge + classes * (classes - 1) / count * weight[~diagonal].square().sum()
        (loss + ridge).backward()
        return loss + ridge

    optimizer.step(closure)
    expected = (torch.eye(classes) + delta.detach() * (diagonal if kind is VectorCalibrator else 1)) / temperature
    found = np.diag(calibrator.scale) if kind is VectorCalibrator else calibrator.weight
    np.testing.assert_allclose(found, expected, atol=1e-4)
    np.testing.assert_allclose(calibrator.bias, bias.detach(), atol=1e-4)


@pytest.mark.parametrize("count, scale", [(8, 2.0), (40, 1.0), (40, 2.0), (300, 1.1), (3000, 2.0)])
def test_shrunk_temperature_is_a_posterior_mean(count, scale):
    """The integral by a fine sum over log T, in probability space."""
    logits, label = drawn(count, 3)
    grid = np.linspace(-6, 6, 6001)
    likelihood = [-nll_by_loop(scale * logits, label, np.exp(u)).sum() for u in grid]
    at_one = -nll_by_loop(scale * logits, label, 1.0).sum()
    slab = np.exp(np.array(likelihood) - at_one) * norm.pdf(grid)
    mass = trapezoid(slab, grid)
    evidence = mass / 3 / (2 / 3 + mass / 3)
    expected = evidence * trapezoid(slab * grid, grid) / mass
    fitted = ShrunkTemperatureCalibrator().fit({"logits": scale * logits, "label": label})
    assert fitted.evidence == pytest.approx(evidence, abs=0.01)
    assert np.log(fitted.temperature) == pytest.approx(expected, abs=0.01)


def test_shrunk_temperature_exists_for_any_rows():
    for table in ({"logits": 9 * np.eye(3), "label": [0, 1, 2]}, {"logits": np.zeros((4, 2)), "label": [0, 1, 1, 1]}):
        fitted = ShrunkTemperatureCalibrator().fit(table)
        assert 0.3 < fitted.temperature <= 1.0
    wrong = ShrunkTemperatureCalibrator().fit({"logits": 9 * np.eye(3), "label": [1, 2, 0]})
    assert wrong.temperature > 3


def test_platt_and_isotonic_are_scikit_learns():
    logits, label = drawn(3000, 3)
    table = {"logits": 3 * logits, "label": label}
    probs = torch.softmax(torch.from_numpy(3 * logits), 1).numpy()
    isotonic, platt = [], []
    for index in range(3):
        curve = IsotonicRegression(y_min=1 / 3002, y_max=1 - 1 / 3002, out_of_bounds="clip")
        isotonic.append(curve.fit(probs[:, index], label == index).predict(probs[:, index]))
        odds = (np.log(probs[:, index]) - np.log1p(-probs[:, index]))[:, None]
        platt.append(LogisticRegression(tol=1e-8).fit(odds, label == index).predict_proba(odds)[:, 1])
    for calibrator, curves in ((IsotonicCalibrator(), isotonic), (PlattCalibrator(), platt)):
        expected = np.stack(curves, axis=1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            got = calibrator.fit(table).apply(table)["probs"]
        np.testing.assert_allclose(got, expected / expected.sum(axis=1, keepdims=True), atol=1e-6)


def test_a_class_without_labels_gets_no_infinity():
    logits, label = drawn(300, 3)
    label[label == 2] = 0
    for method in ("vector", "matrix", "platt", "isotonic"):
        warned = method in ("platt", "isotonic")
        said = pytest.warns(UserWarning, match="Class 2 has 0 labelled rows") if warned else nullcontext()
        with said:
            probs = METHODS[method]().fit({"logits": logits, "label": label}).apply({"logits": logits})["probs"]
        assert np.isfinite(np.log(probs)).all() and (probs[:, 2] < 0.25).all()
        with pytest.raises(ValueError, match="fitted on 3"):
            METHODS[method]().fit({"logits": logits, "label": label}).apply({"logits": logits[:, :2]})


def test_shrinkage_is_between_the_fit_and_the_centre():
    fits = {
        "large": TemperatureFit(2.0, 0.01, True),
        "small": TemperatureFit(2.0, 0.50, True),
        "other": TemperatureFit(0.7, 0.05, True),
        "none": TemperatureFit(1e-3, np.inf, False),
    }
    found = shrunk_temperatures(fits, 1.0)
    assert found["none"] == 1.0 and 1.99 < found["large"] < 2.0 and 1.0 < found["small"] < found["large"]
    alike = {key: TemperatureFit(1.5, 0.2, True) for key in "abc"}
    assert shrunk_temperatures(alike, 1.4) == dict.fromkeys("abc", 1.4)  # no more spread than their errors explain
    assert shrunk_temperatures({}, 1.4) == {}


def test_grouped_temperature_finds_each_group_and_falls_back():
    rng = np.random.default_rng(0)
    logits, label = drawn(6000)
    group = rng.choice(["calm", "bold"], 6000)
    table = {"logits": logits * np.where(group == "bold", 4, 1)[:, None], "label": label, "domain": group}
    calibrator = GroupedTemperatureCalibrator(by="domain").fit(table)
    assert calibrator.groups["calm"] == pytest.approx(1, rel=0.06)
    assert calibrator.groups["bold"] == pytest.approx(4, rel=0.06)
    new = calibrator.apply({"logits": logits[:1], "domain": ["unseen"]})["probs"]
    expected = torch.softmax(torch.from_numpy(logits[:1] / calibrator.temperature), 1)
    np.testing.assert_allclose(new, expected, atol=1e-12)


def test_expert_usage_stands_in_for_an_unknown_domain():
    rng = np.random.default_rng(0)
    logits, label = drawn(4000)
    bold = rng.random(4000) < 0.5
    table = {
        "logits": logits * np.where(bold, 4, 1)[:, None],
        "label": label,
        "expert_ids": np.where(bold[:, None], [[0, 1]], [[2, 3]]),
        "expert_weights": rng.dirichlet([5, 5], 4000),
    }
    calibrator = GroupedTemperatureCalibrator(by="expert_usage", clusters=2).fit(table)
    assert sorted(calibrator.groups.values()) == pytest.approx([1, 4], rel=0.08)
    wider = {**table, "expert_ids": table["expert_ids"] + np.where(np.arange(4000) == 0, 7, 0)[:, None]}
    assert np.isfinite(calibrator.apply(wider)["probs"]).all()  # experts that the fit never saw


def test_per_expert_temperature_finds_each_expert():
    rng = np.random.default_rng(0)
    truth = np.array([1.0, 3.0, 6.0])
    logits, label = drawn(9000, 3, spread=2)
    ids = np.stack([rng.permutation(3)[:2] for _ in range(9000)])
    table = {
        "logits": logits,
        "label": label,
        "expert_ids": ids,
        "expert_weights": rng.dirichlet([1, 1], 9000) * 2.5,  # mass that is not one, as with scaled routers
        "expert_logits": logits[:, None] * truth[ids][..., None],
    }
    calibrator = PerExpertTemperatureCalibrator().fit(table)
    assert [calibrator.experts[e] for e in range(3)] == pytest.approx(truth, rel=0.08)
    assert calibrator.temperature == pytest.approx(1, rel=0.08)
    shares = table["expert_weights"] / table["expert_weights"].sum(axis=1, keepdims=True)
    for row in range(5):  # a plain loop in probability space
        mixed = sum(
            shares[row, k]
            * torch.softmax(torch.tensor(table["expert_logits"][row, k] / calibrator.experts[ids[row, k]]), 0)
            for k in range(2)
        )
        expected = torch.softmax(torch.log(mixed) / calibrator.temperature, 0)
        np.testing.assert_allclose(calibrator.apply(table)["probs"][row], expected, atol=1e-12)


def test_routing_temperature_finds_a_dependence():
    rng = np.random.default_rng(0)
    logits, label = drawn(8000)
    entropy = rng.random(8000)
    table = {
        "logits": logits * np.exp(1.5 * entropy)[:, None],
        "label": label,
        "routing_entropy": entropy,
        "routing_margin": rng.random(8000),
        "disagreement": rng.random(8000),
    }
    calibrator = RoutingTemperatureCalibrator().fit(table)
    slopes = calibrator.coefficients[1:4] / calibrator.spread[:3]
    assert slopes == pytest.approx([1.5, 0, 0], abs=0.15)
    far = calibrator.apply({name: column[:2] for name, column in {**table, "routing_entropy": entropy + 1e3}.items()})
    near = calibrator.log_range[1]
    np.testing.assert_allclose(
        far["probs"], torch.softmax(torch.from_numpy(table["logits"][:2] * np.exp(-near)), 1), atol=1e-12
    )


@pytest.mark.parametrize("method", METHODS)
def test_saved_and_loaded_is_the_same(method, tmp_path):
    table = routed()
    calibrator = METHODS[method]().fit(table)
    path = calibrator.save(tmp_path / "calibration.json")
    again = Calibrator.load(path)
    assert type(again) is type(calibrator)
    assert again.apply(table)["probs"].tolist() == calibrator.apply(table)["probs"].tolist()
    other = TemperatureCalibrator if method != "temperature" else VectorCalibrator
    if not isinstance(again, other):
        with pytest.raises(ValueError, match="use Calibrator.load"):
            other.load(path)


def test_needs_a_fit_first(tmp_path):
    with pytest.raises(ValueError, match="call fit"):
        TemperatureCalibrator().apply({"logits": [[1.0, 2.0]]})
    with pytest.raises(ValueError, match="call fit"):
        TemperatureCalibrator().save(tmp_path / "calibration.json")
