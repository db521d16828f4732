import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_moecal import erm, robust, robust_filtered, routing_relevance
from hf_moecal.objectives import OBJECTIVES, coefficients, evaluate_objective, example_losses, tilt


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


def twin(name, losses, relevant, eta, detach):
    """Plain Python: value and gradient of each objective, from the definitions, with no autograd."""
    n = len(losses)
    mean, mean_gradient = sum(losses) / n, [1 / n] * n
    if name == "erm":
        return mean, mean_gradient
    chosen = range(n) if name == "robust" else [i for i in range(n) if relevant[i]]
    if not list(chosen):
        return 2 * mean, [2 / n] * n
    top = max(losses[i] for i in chosen)
    raw = {i: math.exp(eta * (losses[i] - top)) for i in chosen}
    weights = {i: raw[i] / sum(raw.values()) for i in chosen}
    tilted = sum(weights[i] * losses[i] for i in chosen)
    gradient = [0.0] * n
    for i in chosen:
        gradient[i] = weights[i] if detach else weights[i] * (1 + eta * (losses[i] - tilted))
    if name == "robust":
        return tilted, gradient
    return mean + tilted, [a + b for a, b in zip(mean_gradient, gradient, strict=True)]


def ours(name, losses, relevant, eta, detach):
    result = evaluate_objective(name, losses, relevant=relevant, eta=eta, detach_weights=detach)
    return result.value, result.coefficients


loss_lists = st.lists(st.floats(0, 60), min_size=1, max_size=24)


@settings(deadline=None, max_examples=150)
@given(loss_lists, st.floats(0, 8), st.booleans(), st.randoms(use_true_random=False))
@pytest.mark.parametrize("name", ["erm", "robust", "robust_filtered"])
def test_values_and_gradients_equal_the_plain_loop(name, losses, eta, detach, random):
    relevant = [random.random() < 0.5 for _ in losses]
    value, gradient = twin(name, losses, relevant, eta, detach)
    got_value, got_gradient = ours(name, vector(*losses), torch.tensor(relevant), eta, detach)
    assert got_value == pytest.approx(value, rel=1e-12, abs=1e-12)
    torch.testing.assert_close(got_gradient, vector(*gradient), rtol=1e-9, atol=1e-11)


def test_hand_computed_numbers():
    losses = vector(0.0, math.log(3))  # eta 1: weights 1/4, 3/4
    assert robust(losses, eta=1.0).item() == pytest.approx(0.75 * math.log(3))
    assert robust_filtered(losses, torch.tensor([False, True]), eta=1.0).item() == pytest.approx(1.5 * math.log(3))
    through = coefficients(partial(robust, eta=1.0, detach_weights=False), losses)[1]
    expected = [0.25 * (1 - 0.75 * math.log(3)), 0.75 * (1 + 0.25 * math.log(3))]
    torch.testing.assert_close(through, vector(*expected))
    assert coefficients(partial(robust, eta=3.0, detach_weights=False), losses)[1][0] < 0  # the confidence penalty


def test_detached_gradient_is_that_of_the_log_mean_exponential():
    losses = torch.rand(7, dtype=torch.float64, requires_grad=True)
    (true,) = torch.autograd.grad(torch.logsumexp(2.5 * losses, 0) / 2.5, losses)
    torch.testing.assert_close(coefficients(partial(robust, eta=2.5), losses)[1], true)


@settings(deadline=None, max_examples=60)
@given(loss_lists, st.floats(0, 5), st.booleans(), st.floats(-100, 100))
def test_properties(losses, eta, detach, shift):
    losses = vector(*losses)
    torch.testing.assert_close(robust(losses, eta=0.0, detach_weights=detach), erm(losses))
    torch.testing.assert_close(tilt(losses + shift, eta=eta), tilt(losses, eta=eta), rtol=1e-9, atol=1e-12)
    order = torch.randperm(len(losses))
    one = coefficients(partial(robust, eta=eta, detach_weights=detach), losses)[1]
    other = coefficients(partial(robust, eta=eta, detach_weights=detach), losses[order])[1]
    torch.testing.assert_close(one[order], other)
    assert erm(losses) - 1e-9 <= robust(losses, eta=eta) <= losses.max() + 1e-9


def test_empty_relevance_falls_back_to_the_mean():
    losses = vector(1.0, 2.0, 6.0)
    nothing = torch.zeros(3, dtype=torch.bool)
    assert robust_filtered(losses, nothing, eta=2.0).item() == 6.0
    result = evaluate_objective("robust_filtered", losses, relevant=nothing, eta=2.0)
    torch.testing.assert_close(result.coefficients, torch.full_like(losses, 2 / 3))
    assert result.effective_sample_size == pytest.approx(3)


def test_huge_losses_do_not_overflow():
    result = evaluate_objective("robust", vector(1e6, 1e6 - 1, 0.0), eta=50.0)
    assert result.value == pytest.approx(1e6)
    assert torch.isfinite(result.coefficients).all()
    assert result.effective_sample_size == pytest.approx(1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("function", [erm, partial(robust, eta=1.0)])
def test_losses_that_are_not_finite_raise(function, bad):
    with pytest.raises(ValueError, match="1 of 2 losses are NaN or infinite"):
        function(vector(1.0, bad))


def test_relevance_by_thresholds_and_by_quantile():
    regret = vector(0.0, 1e-7, 1e-5, 0.5, 0.0)
    disagreement = vector(0.0, 0.0, 0.0, 0.0, 0.02)
    assert routing_relevance(regret, disagreement).tolist() == [False, False, True, True, True]
    top = routing_relevance(regret, disagreement, quantile=0.2)
    assert top.tolist() == [False, False, False, True, True]
    zeros = torch.zeros(5, dtype=torch.float64)
    assert not routing_relevance(zeros, zeros, quantile=0.5).any()  # an agreeing model has no fragile example


def test_losses_of_the_baselines_equal_torch():
    torch.manual_seed(0)
    logits = torch.randn(40, 5, requires_grad=True)
    labels = torch.randint(0, 5, (40,))
    smooth = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1, reduction="none")
    torch.testing.assert_close(example_losses(logits, labels, objective="label_smoothing"), smooth)
    p = torch.softmax(logits.double(), -1)[torch.arange(40), labels]
    focal = -((1 - p) ** 2) * p.log()
    torch.testing.assert_close(example_losses(logits, labels, objective="focal").double(), focal, rtol=1e-5, atol=1e-5)
    sure = torch.tensor([[60.0, -60.0]], requires_grad=True)
    example_losses(sure, torch.tensor([0]), objective="focal").sum().backward()
    assert torch.isfinite(sure.grad).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: robust(vector(1.0), eta=-1), "`eta` must be a finite number of at least 0, got -1"),
        (lambda: robust(vector(1.0), eta=float("inf")), "`eta` must be a finite number"),
        (lambda: erm(torch.zeros(0)), r"non-empty vector of per-example losses, got shape \(0,\)"),
        (lambda: erm(torch.tensor(1.0)), r"got shape \(\); use reduction='none'"),
        (lambda: robust_filtered(vector(1.0), torch.ones(2) > 0, eta=1), "boolean vector of shape"),
        (lambda: robust_filtered(vector(1.0), torch.ones(1), eta=1), "boolean vector"),
        (lambda: routing_relevance(vector(1.0), vector(1.0, 2.0)), "vectors of one length"),
        (lambda: routing_relevance(vector(float("nan")), vector(1.0)), "must be finite"),
        (lambda: routing_relevance(vector(1.0), vector(1.0), quantile=0.0), r"must lie in \(0, 1\], got 0.0"),
        (lambda: evaluate_objective("minimax", vector(1.0)), "Unknown objective 'minimax'; choose one of erm"),
        (lambda: evaluate_objective("robust_filtered", vector(1.0), eta=1.0), "needs `relevant`"),
        (lambda: example_losses(torch.zeros(1, 2), torch.tensor([2])), "Label 2 is out of range for 2 classes"),
        (lambda: example_losses(torch.zeros(1, 2), torch.tensor([-1])), "Label -1 is out of range"),
        (lambda: example_losses(torch.zeros(1, 2), torch.tensor([0.5])), "must be integers"),
        (lambda: example_losses(torch.zeros(1, 2, 2), torch.tensor([0])), r"must be \[N, C\]"),
        (lambda: example_losses(torch.zeros(1, 2), torch.tensor([0]), objective="hinge"), "Unknown objective 'hinge'"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_every_named_objective_has_a_value():
    relevant = torch.tensor([True, False])
    values = {n: evaluate_objective(n, vector(1.0, 2.0), relevant=relevant, eta=1.0).value for n in OBJECTIVES}
    assert values["erm"] == values["focal"] == values["label_smoothing"] == 1.5
    assert values["robust"] > 1.5 and values["robust_filtered"] == 2.5
