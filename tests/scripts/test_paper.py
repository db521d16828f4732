"""The small setting of recipes/paper.py: its objectives against plain loops, step by step, and its finding."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
import torch

from tests.real_data import RECIPES, load_script


paper = load_script("paper", RECIPES)

ETA, TAU_REGRET, TAU_DISAGREEMENT = 2.0, 1e-6, 0.01


# ---------------------------------------------------------------- an independent twin


def plain_losses(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> list[tuple]:
    """Loss, regret and disagreement of each example, one number at a time."""
    rows = []
    for image, label in zip(images, labels.tolist(), strict=True):
        hidden = torch.relu(model.backbone[0].weight @ image + model.backbone[0].bias)
        scores = (model.experts.weight @ hidden + model.experts.bias).reshape(4, 10)
        gates = torch.exp(model.router.weight @ hidden + model.router.bias)
        r = [gates[k] / gates.sum() for k in range(4)]
        p = [torch.exp(scores[k]) / torch.exp(scores[k]).sum() for k in range(4)]
        blend = sum(r[k] * p[k] for k in range(4))
        loss = -torch.log(blend[label])
        regret = max(0.0, loss.item() - min(-math.log(p[k][label].item()) for k in range(4)))
        disagreement = sum(r[k].item() * ((p[k] - blend) ** 2).sum().item() for k in range(4))
        rows.append((loss, regret, disagreement))
    return rows


def plain_objective(name: str, rows: list[tuple], eta: float) -> torch.Tensor:
    """The definitions, with gradient through the weights."""
    mean = sum(loss for loss, _, _ in rows) / len(rows)
    if name == "erm" or eta == 0:
        return mean
    tilted = [loss for loss, r, d in rows if name == "robust" or r > TAU_REGRET or d > TAU_DISAGREEMENT]
    if not tilted:
        return 2 * mean
    total = sum(torch.exp(eta * loss) for loss in tilted)
    robust = sum(torch.exp(eta * loss) / total * loss for loss in tilted)
    return robust if name == "robust" else mean + robust


@pytest.mark.parametrize("name", ["erm", "robust", "robust_filtered"])
def test_training_is_the_definitions_step_by_step(name):
    """Losses and gradients of five steps, two of them ERM, by two optimizers that never meet."""
    rows = paper.make_sets(0)["train"]
    torch.manual_seed(0)
    ours = paper.SmallMoE()
    with torch.no_grad():
        ours.router.weight.mul_(100)  # so that some examples are one expert's, and the filter leaves them out
    theirs = copy.deepcopy(ours).double()
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.05) for model in (ours, theirs)]
    etas, shares = [], []
    for eta, images, labels in paper.batches(rows, 0, steps=5):
        images, labels = images[:16], labels[:16]
        value = paper.objective(paper.Method(name, detach=False), ours(images), labels, eta=eta)
        found = plain_losses(theirs, images.double(), labels)
        exact = plain_objective(name, found, eta)
        etas.append(eta)
        shares.append(np.mean([r > TAU_REGRET or d > TAU_DISAGREEMENT for _, r, d in found]))
        assert value.item() == pytest.approx(exact.item(), rel=1e-5)
        for optimizer, loss in zip(optimizers, (value, exact), strict=True):
            optimizer.zero_grad()
            loss.backward()
        mine, exact = (torch.cat([p.grad.flatten().double() for p in m.parameters()]) for m in (ours, theirs))
        assert (mine - exact).norm() < 1e-5 * exact.norm()
        for optimizer in optimizers:
            optimizer.step()
    assert etas == [0.0] * 2 + [ETA] * 3
    if name == "robust_filtered":
        assert any(0 < share < 1 for share in shares[2:])


def test_gradient_through_the_weights_differs_from_detached():
    rows = paper.make_sets(0)["train"]
    torch.manual_seed(0)
    model = paper.SmallMoE()
    gradients = []
    for detach in (True, False):
        loss = paper.objective(paper.Method("robust", detach), model(rows.images[:64]), rows.labels[:64], eta=ETA)
        gradients.append(torch.autograd.grad(loss, model.router.weight)[0])
    assert (gradients[0] - gradients[1]).norm() > 0.1 * gradients[0].norm()


# ---------------------------------------------------------------- the data


def test_sets_have_the_mix_that_they_say_and_share_no_image_with_training():
    sets = paper.make_sets(3)
    for name, rows in sets.items():
        assert rows.hard.float().mean().item() == pytest.approx(paper.HARD_SHARE[name], abs=0.03)
        assert 0 <= rows.images.min() and rows.images.max() <= 1 and len(rows.labels) == paper.ROWS[name]
    seen = {image.numpy().tobytes() for image in sets["train"].images}
    assert not any(image.numpy().tobytes() in seen for image in sets["test"].images)
    again = paper.make_sets(3)
    assert torch.equal(again["shifted"].images, sets["shifted"].images)


# ---------------------------------------------------------------- the finding


def test_robust_filtered_lowers_the_error_of_hard_rows_and_trains_nothing_else():
    sets = paper.make_sets(0)
    found = {
        name: paper.judge(paper.train(paper.METHODS[name], sets["train"], 0), sets)
        for name in ("ERM", "Filtered, detached")
    }
    plain, filtered = (judged["none"]["shifted, hard"] for judged in found.values())
    assert filtered["ece"] < 0.7 * plain["ece"] and filtered["nll"] < plain["nll"]
    temperature = found["ERM"]["temperature"]
    assert temperature["test"]["accuracy"] == found["ERM"]["none"]["test"]["accuracy"]
    assert temperature["shifted, hard"]["ece"] < plain["ece"]


def test_the_recipe_writes_every_row(tmp_path, monkeypatch, capsys):
    options = ["--seeds", "2", "--steps", "30", "--output", str(tmp_path / "paper.json")]
    monkeypatch.setattr("sys.argv", ["paper.py", *options])
    paper.main()
    rows = json.loads((tmp_path / "paper.json").read_text())["rows"]
    assert len(rows) == 2 * len(paper.METHODS) * (1 + len(paper.POSTHOC)) * 4
    assert "| Filtered, through weights + temperature |" in capsys.readouterr().out


def test_intervals_are_those_of_student():
    mean, half = paper.interval([1.0, 2.0, 3.0])
    assert mean == 2.0 and half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
