"""Soft labels: what is computed of them is the mean over the raters, bit by bit that of a class where they agree."""

import math

import pytest
import torch
import torch.nn.functional as F

from hf_moecal.labels import at_labels, check_labels, read_label, shares_of_votes
from hf_moecal.objectives import example_losses
from hf_moecal.probes.agreement import regret
from hf_moecal.readouts.mixture import Mixed, mean_expert_loss


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


VOTES = torch.tensor([[3, 1, 0, 0], [0, 0, 5, 0], [1, 1, 1, 1], [0, 2, 0, 6]])
OBJECTIVES = ("erm", "label_smoothing", "focal")


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_class_and_all_raters_of_that_class_are_the_same(objective):
    logits, labels = drawn(6, 4).requires_grad_(), torch.tensor([0, 3, 2, 1, 1, 0])
    losses = [example_losses(logits, q, objective=objective) for q in (labels, F.one_hot(labels).float())]
    gradients = [torch.autograd.grad((loss * drawn(6)).sum(), logits)[0] for loss in losses]
    assert torch.equal(*losses) and torch.equal(*gradients)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_votes_cost_what_the_raters_cost_on_average(objective):
    logits = drawn(4, 4).double().requires_grad_()
    found = example_losses(logits, shares_of_votes(VOTES).double(), objective=objective)
    expected = []
    for row, votes in zip(logits, VOTES.tolist(), strict=True):
        raters = torch.tensor([c for c, count in enumerate(votes) for _ in range(count)])
        expected.append(example_losses(row.expand(len(raters), -1), raters, objective=objective).mean())
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-6, atol=1e-7)
    ours, theirs = (torch.autograd.grad(loss.sum(), logits)[0] for loss in (found, torch.stack(expected)))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_cross_entropy_is_that_of_torch():
    logits, shares = drawn(4, 4), shares_of_votes(VOTES)
    torch.testing.assert_close(example_losses(logits, shares), F.cross_entropy(logits, shares, reduction="none"))
    smoothed = F.cross_entropy(logits, shares, label_smoothing=0.1, reduction="none")
    torch.testing.assert_close(example_losses(logits, shares, objective="label_smoothing"), smoothed)


def test_regret_is_against_the_expert_that_serves_all_raters_best():
    """Of two raters with different favourites among the experts, neither's own favourite has to be the best."""
    p = torch.tensor([[0.5, 0.5]])
    experts = torch.tensor([[[0.9, 0.1], [0.1, 0.9], [0.6, 0.4]]])
    own = 0.5 * math.log(2) + 0.5 * math.log(2)
    best = min(-0.5 * math.log(a) - 0.5 * math.log(b) for a, b in experts[0].tolist())
    found = regret(p.log(), experts.log(), torch.tensor([[0.5, 0.5]]))
    assert found.item() == pytest.approx(max(0.0, own - best), abs=1e-6) and best > own
    found = regret(p.log(), experts.log(), torch.tensor([[0.75, 0.25]]))
    best = min(-0.75 * math.log(a) - 0.25 * math.log(b) for a, b in experts[0].tolist())
    assert found.item() == pytest.approx(own - best, rel=1e-5) and own > best
    labels = torch.tensor([1, 0, 3])
    hard, soft = (regret(drawn(3, 4), drawn(3, 2, 4, seed=1), q) for q in (labels, F.one_hot(labels, 4).float()))
    assert torch.equal(hard, soft) and hard.max() > 0


def test_experts_alone_are_judged_by_all_raters():
    each, shares = drawn(4, 2, 4).log_softmax(-1), torch.tensor([[0.7, 0.3]]).expand(4, 2)
    mixed = Mixed(each[:, 0], each, shares, torch.zeros(4, 2, dtype=torch.long), 2)
    found = mean_expert_loss(mixed, shares_of_votes(VOTES))
    expected = -(shares[..., None] * each * shares_of_votes(VOTES)[:, None]).sum((1, 2))
    torch.testing.assert_close(found, expected)


def test_an_impossible_class_without_votes_costs_nothing():
    logits = torch.tensor([[0.0, float("-inf"), 0.0]], requires_grad=True)
    loss = example_losses(logits, torch.tensor([[0.5, 0.0, 0.5]]), objective="focal")
    loss.sum().backward()
    assert loss.item() == pytest.approx(0.25 * math.log(2)) and torch.isfinite(logits.grad).all()


@pytest.mark.parametrize(
    "labels, message",
    [
        (torch.tensor([[1.0, 1.0, 0.0]]), "sum to one, got .1.0, 1.0, 0.0.*multi-label"),
        (torch.tensor([[1.5, -0.5, 0.0]]), "at least 0"),
        (torch.tensor([[float("nan"), 0.5, 0.5]]), "sum to one"),
        (torch.tensor([[0.5, 0.5]]), "needs 3 of them, got 2"),
        (torch.tensor([[1, 0, 1]]), "counts of raters belong in a column `votes`"),
        (torch.tensor([3]), "Label 3 is out of range"),
    ],
)
def test_what_is_no_label_is_named(labels, message):
    with pytest.raises(ValueError, match=message):
        check_labels(labels, 3)


def test_votes_become_shares():
    found = shares_of_votes(torch.tensor([[3, 1], [0, 0]]))
    assert found.tolist() == [[0.75, 0.25], [-100.0, -100.0]]
    with pytest.raises(ValueError, match="whole numbers"):
        shares_of_votes(torch.tensor([[0.5, 0.5]]))
    with pytest.raises(ValueError, match="how many raters chose each class"):
        shares_of_votes(torch.tensor([1, 0]))
    assert read_label({"votes": [1, 3]}) == [0.25, 0.75] and read_label({"label": 1, "votes": [1, 3]}) == 1
    assert read_label({"votes": 17}) == read_label({"votes": [0, 0]}) == -100  # a number of votes is no label


def test_values_at_labels():
    values = drawn(2, 3, 4)
    labels = torch.tensor([1, 2])
    assert torch.equal(at_labels(values, labels), torch.stack([values[0, :, 1], values[1, :, 2]]))
