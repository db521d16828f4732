"""The story of recipes/theory.py: its premises in exact fractions, its figures against closed forms and twins."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import minimize

from hf_moecal.metrics import calibration_report
from tests.real_data import RECIPES, load_script


theory = load_script("theory", RECIPES)

WORLD, TRAINING = theory.WORLD, theory.TRAINING
SCORE = Fraction(3, 4)
PAGE = (RECIPES / "theory.md").read_text(encoding="utf-8")


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def robust_probability(truth: float, eta: float) -> float:
    odds = (truth / (1 - truth)) ** (1 / (1 + eta))
    return odds / (1 + odds)


# ---------------------------------------------------------------- the premises


def test_the_third_configuration_of_the_article_is_not_three_quarters():
    f = Fraction
    assert f("0.9") * f("0.75") + f("0.1") * f("0.75") == SCORE
    assert f("0.5") * f("0.9") + f("0.5") * f("0.6") == SCORE
    assert f("0.3") * f("0.5") + f("0.7") * f("0.89") == f("0.773")
    assert f("0.3") * f("0.5") + f("0.7") * f(6, 7) == SCORE
    assert [name for name in WORLD if WORLD[name].soft == SCORE] == ["A", "B", "C"]


def test_the_training_mix_is_a_hundred_examples():
    assert sum(TRAINING.values()) == 1
    examples = theory.population()
    assert len(examples.names) == 100
    for name, configuration in WORLD.items():
        mine = [label for key, label in zip(examples.names, examples.labels.tolist(), strict=True) if key == name]
        assert len(mine) == 100 * configuration.mass and Fraction(sum(mine), len(mine)) == configuration.truth


@pytest.mark.parametrize("reader", list(theory.READERS))
def test_everyone_is_calibrated_in_training(reader):
    says = theory.READERS[reader]
    for value in {says(c) for c in WORLD.values()}:
        mine = [c for c in WORLD.values() if says(c) == value]
        assert sum(c.mass * c.truth for c in mine) / sum(c.mass for c in mine) == value


def test_the_selected_expert_is_right_in_every_configuration():
    for c in WORLD.values():
        selected = max(range(2), key=lambda k: (c.shares[k], k))
        assert c.truth == c.experts[selected] == c.hard


def test_the_mixture_of_the_package_gives_the_scores():
    found = theory.mixed(list(WORLD), unselected=True).log_probs.exp()[:, 1]
    assert found.tolist() == pytest.approx([float(c.soft) for c in WORLD.values()], abs=1e-15)


# ---------------------------------------------------------------- the shift


def test_the_error_of_the_blend_has_its_closed_form_under_random_mixes():
    rng = np.random.default_rng(0)
    largest = Fraction(0)
    for _ in range(30):
        counts = rng.integers(0, 40, len(WORLD)) * rng.integers(0, 2, len(WORLD))
        counts[0] += 1
        mix = {name: Fraction(int(k), int(counts.sum())) for name, k in zip(WORLD, counts, strict=True)}
        soft, hard = ({name: getattr(c, kind) for name, c in WORLD.items()} for kind in ("soft", "hard"))
        exact = abs(Fraction(3, 20) * mix["B"] - Fraction(3, 28) * mix["C"])
        assert theory.closed_form_ece(mix, soft) == exact and theory.closed_form_ece(mix, hard) == 0
        assert theory.measured_ece(mix, soft) == pytest.approx(float(exact), abs=1e-12)
        assert theory.measured_ece(mix, hard) == pytest.approx(0, abs=1e-12)
        largest = max(largest, exact)
    assert 0.05 < largest <= Fraction(3, 20)


def test_an_expert_that_is_asked_where_it_is_not_selected_breaks_too():
    says = {name: c.experts[0] for name, c in WORLD.items()}
    assert theory.measured_ece(theory.MIXES["only B"], says) == pytest.approx(0.3, abs=1e-12)


def test_sampled_labels_give_the_expectation():
    mix = theory.towards("B", Fraction(1, 2))
    rng = np.random.default_rng(0)
    drawn = rng.choice(len(WORLD), size=200_000, p=[float(mass) for mass in mix.values()])
    soft, truth = (np.array([float(getattr(c, kind)) for c in WORLD.values()]) for kind in ("soft", "truth"))
    label = (rng.random(len(drawn)) < truth[drawn]).astype(int)
    report = calibration_report(confidence=soft[drawn], correct=label, mode="positive_class", ranked=False)
    low, high = report["ece_interval"]
    assert low < 0.075 < high and high - low < 0.01


def test_the_first_figure_shows_the_closed_form():
    left, right = theory.shift_figure().axes
    shares = np.arange(21) / 20
    b, b_dots, c, c_dots, hard = (np.asarray(line.get_ydata(), float) for line in left.lines)
    for found, exact in ((b, 0.15), (b_dots, 0.15), (c, 3 / 28), (c_dots, 3 / 28), (hard, 0)):
        assert found == pytest.approx(exact * shares, abs=1e-12)
    group = 0.4 * (1 - shares) + shares
    for line, truth in zip(right.lines, (0.6, 6 / 7), strict=False):
        assert np.asarray(line.get_ydata(), float) == pytest.approx((0.3 * (1 - shares) + truth * shares) / group)


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("sees", list(theory.SEES))
@pytest.mark.parametrize("eta", [0.0, 0.5, 2.0, 4.0])
def test_detached_robust_is_a_temperature_of_one_plus_eta(sees, eta):
    learned = theory.train(theory.METHODS["Robust, detached"], sees, eta=eta)
    for name, c in WORLD.items():
        truth = float(c.soft if sees == "score" else c.truth)
        assert learned[name] == pytest.approx(robust_probability(truth, eta), abs=1e-9)
        assert theory.tilted_probability(truth, eta) == pytest.approx(robust_probability(truth, eta), abs=1e-12)


def test_robust_through_the_weights_is_nearly_a_temperature():
    learned = theory.train(theory.METHODS["Robust, through weights"], "configuration")
    ratios = {
        n: math.log(float(c.truth / (1 - c.truth))) / math.log(learned[n] / (1 - learned[n])) for n, c in WORLD.items()
    }
    assert ratios["B"] == pytest.approx(4.688, abs=1e-3) == min(ratios.values())
    assert ratios["D"] == pytest.approx(4.717, abs=1e-3) == max(ratios.values())


def relevant_rows(unselected: bool) -> list[bool]:
    """Regret above 1e-6 nats or disagreement above 0.01, example by example."""
    rows = []
    for c in WORLD.values():
        asked = [k for k in range(2) if unselected or c.shares[k] > 0]
        spread = sum(2 * float(r) * float(f - c.soft) ** 2 for r, f in zip(c.shares, c.experts, strict=True))
        ones = round(100 * c.mass * c.truth)
        for label in [1] * ones + [0] * (round(100 * c.mass) - ones):
            loss = -math.log(c.soft if label else 1 - c.soft)
            best = min(-math.log(c.experts[k] if label else 1 - c.experts[k]) for k in asked)
            rows.append(loss - best > 1e-6 or spread > 0.01)
    return rows


@pytest.mark.parametrize(("unselected", "count"), [(False, 24), (True, 30)])
def test_the_filter_is_the_definition(unselected, count):
    found = theory.relevant(unselected=unselected).tolist()
    assert found == relevant_rows(unselected) and sum(found) == count


def potential(method: str, losses: np.ndarray, names: list[str], eta: float) -> float:
    """What the method minimises: for detached weights the maximum-entropy adversary's value."""

    def adversary(values: np.ndarray) -> float:
        return math.log(np.mean(np.exp(eta * values))) / eta

    if method == "Robust, through weights":
        weights = np.exp(eta * losses) / np.exp(eta * losses).sum()
        return float(weights @ losses)
    if method == "tilt of configurations":
        return adversary(np.array([np.mean([losses[j] for j in range(100) if names[j] == name]) for name in names]))
    if method.strip() in ("Filtered, detached", "regret over all experts"):
        return losses.mean() + adversary(losses[relevant_rows(method.startswith(" "))])
    return adversary(losses) if method == "Robust, detached" else losses.mean()


@pytest.mark.parametrize("sees", list(theory.SEES))
@pytest.mark.parametrize("title", list(theory.METHODS))
def test_training_ends_where_the_definition_is_least(title, sees):
    examples = theory.population()
    keys = [WORLD[name].soft if sees == "score" else name for name in examples.names]
    free = list(dict.fromkeys(keys))
    where, sign = np.array([free.index(key) for key in keys]), 1 - 2 * examples.labels.numpy()

    def value(theta: np.ndarray) -> float:
        return potential(title, np.log1p(np.exp(sign * theta[where])), examples.names, 2.0)

    learned = theory.train(theory.METHODS[title], sees)
    start = np.full(len(free), 0.3)
    best = minimize(value, start, method="BFGS", options={"gtol": 1e-7, "maxiter": 500})
    found = [sigmoid(theta) for theta in best.x]
    ours = [learned[examples.names[keys.index(key)]] for key in free]
    assert ours == pytest.approx(found, abs=2e-4)
    ours = np.array([math.log(p / (1 - p)) for p in ours])
    assert value(ours) <= best.fun + 1e-9  # at least as deep as the twin's minimum


def test_no_number_for_three_configurations_is_calibrated_under_all_mixes():
    limit = (6 / 7 - 0.6) / 2
    for method in theory.METHODS.values():
        assert theory.worst_mix_ece(theory.train(method, "score")) >= limit


@pytest.mark.parametrize("eta", [0.5, 8.0])
def test_a_model_that_sees_the_configuration_needs_no_tilt_and_survives_one_of_configurations(eta):
    for title in ("ERM", "tilt of configurations"):
        says = theory.train(theory.METHODS[title], "configuration", eta=eta)
        assert theory.worst_mix_ece(says) < 1e-9
    assert theory.worst_mix_ece(theory.train(theory.METHODS["Robust, detached"], "configuration", eta=eta)) > 0.08


def test_the_second_figure_shows_the_closed_form():
    left, right = theory.robust_figure().axes
    curves = [line for line in left.lines if len(line.get_xdata()) > 2]
    for line, truth in zip(curves, (0.75, 0.75, 0.6, 0.6, 6 / 7, 6 / 7), strict=True):
        exact = [robust_probability(truth, eta) for eta in line.get_xdata()]
        assert np.asarray(line.get_ydata()) == pytest.approx(exact, abs=1e-9)
    for line, mix in zip(right.lines, (TRAINING, {"B": 1}, {"C": 1}), strict=True):
        for eta, error in zip(line.get_xdata(), line.get_ydata(), strict=True):
            said = {name: robust_probability(float(c.soft), eta) for name, c in WORLD.items()}
            groups = [[name for name in mix if name in group] for group in ("ABC", "D", "E")]
            gaps = [sum(float(mix[name]) * (said[name] - WORLD[name].truth) for name in group) for group in groups]
            assert error == pytest.approx(sum(map(abs, gaps)), abs=1e-9)


# ---------------------------------------------------------------- what is printed


def test_the_page_shows_what_the_recipe_prints():
    blocks = re.findall(r"```\n(.*?)\n```", PAGE, re.S)
    assert theory.shift_table() in blocks and theory.training_table() in blocks


def test_the_recipe_draws_its_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["theory.py", "--output", str(tmp_path)])
    theory.main()
    assert theory.shift_table() in capsys.readouterr().out
    assert sorted(path.name for path in Path(tmp_path).iterdir()) == ["theory_robust.png", "theory_shift.png"]
