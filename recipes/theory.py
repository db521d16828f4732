"""Why a mixture's confidence breaks under shift, in a world of a hundred examples where every number is exact.

    python recipes/theory.py        # prints the tables and draws the two figures, in seconds

Two experts, a router and five routing configurations. Three of them give the same score of 0.75. Everything is
computed by the package's own metrics and objectives on the whole population, so there is no sampling noise;
`closed_form_ece` and `tilted_probability` say what must come out. The page theory.md tells the story.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import softplus

from hf_moecal.metrics import calibration_report
from hf_moecal.objectives import evaluate_objective, routing_relevance
from hf_moecal.readouts.mixture import Mixed, log_mixture, mixed_agreement
from hf_moecal.report.figures import MUTED, PALETTE, style


RESULTS = Path(__file__).resolve().parent / "results"
ETA = 2.0


class Configuration(NamedTuple):
    """One state of the mixture, for two classes.

    Attributes:
        shares (`tuple`): routing weights r_1, r_2.
        experts (`tuple`): each expert's probability of class 1.
        truth (`Fraction`): P(Y = 1) there, which no shift changes.
        mass (`Fraction`): its probability in training.
    """

    shares: tuple[Fraction, Fraction]
    experts: tuple[Fraction, Fraction]
    truth: Fraction
    mass: Fraction

    @property
    def soft(self) -> Fraction:
        """sum_k r_k f_k."""
        return sum(r * f for r, f in zip(self.shares, self.experts, strict=True))

    @property
    def hard(self) -> Fraction:
        """The prediction of the expert with the largest weight; of two equal ones, of the second."""
        return self.experts[0] if self.shares[0] > self.shares[1] else self.experts[1]


def _configuration(r1: str, experts: tuple[str, str], truth: str, mass: str) -> Configuration:
    f1, f2 = map(Fraction, experts)
    return Configuration((Fraction(r1), 1 - Fraction(r1)), (f1, f2), Fraction(truth), Fraction(mass))


WORLD = {
    "A": _configuration("0.9", ("0.75", "0.75"), "0.75", "0.16"),
    "B": _configuration("0.5", ("0.9", "0.6"), "0.6", "0.10"),
    "C": _configuration("0.3", ("0.5", "6/7"), "6/7", "0.14"),
    "D": _configuration("0", ("0.9", "0.975"), "0.975", "0.40"),
    "E": _configuration("0", ("0.5", "0.25"), "0.25", "0.20"),
}
"""The truth is what the selected expert says, so hard routing is calibrated in every configuration. The masses are
such that each expert, asked about all inputs, is calibrated in training too, and so is the blend."""

TRAINING = {name: configuration.mass for name, configuration in WORLD.items()}
MIXES = {
    "training": TRAINING,
    "half of C turns into B": TRAINING | {"B": Fraction("0.17"), "C": Fraction("0.07")},
    "all of C turns into B": TRAINING | {"B": Fraction("0.24"), "C": Fraction(0)},
    "all of B turns into C": TRAINING | {"B": Fraction(0), "C": Fraction("0.24")},
    "only B": {"B": Fraction(1)},
    "only C": {"C": Fraction(1)},
}
READERS = {
    "blend": lambda c: c.soft,
    "hard routing": lambda c: c.hard,
    "expert 1": lambda c: c.experts[0],
    "expert 2": lambda c: c.experts[1],
}


# ---------------------------------------------------------------- the shift


def towards(name: str, share: Fraction) -> dict[str, Fraction]:
    """The training mix, of which a share has moved to one configuration."""
    return {key: (1 - share) * mass + (share if key == name else 0) for key, mass in TRAINING.items()}


def closed_form_ece(mix: Mapping[str, Fraction], says: Mapping[str, Fraction | float]) -> Fraction | float:
    """sum over scores c of |sum over configurations s with score c of P(s) (c - P(Y = 1 | s))|."""
    gaps: dict[Fraction | float, Fraction | float] = {}
    for name, mass in mix.items():
        gaps[says[name]] = gaps.get(says[name], 0) + mass * (says[name] - WORLD[name].truth)
    return sum(map(abs, gaps.values()))


def measured_ece(mix: Mapping[str, Fraction], says: Mapping[str, Fraction | float]) -> float:
    """The package's calibration error of P(Y = 1) on a population of that mix.

    Its rows carry P(Y = 1 | s) as the reference, so the figure is the exact expectation. As many equal bins as keep
    different scores apart.
    """
    common = int(np.lcm.reduce([mass.denominator for mass in mix.values()]))
    rows = [name for name, mass in mix.items() for _ in range(int(mass * common))]
    confidence = np.array([float(says[name]) for name in rows])
    truth = np.array([float(WORLD[name].truth) for name in rows])
    settings = {"mode": "positive_class", "bins": 1000, "intervals": False, "ranked": False}
    return calibration_report(confidence=confidence, correct=truth, **settings)["ece"]


def right_at(score: Fraction, mix: Mapping[str, Fraction]) -> Fraction:
    """P(Y = 1) among the examples to which the blend gives this score."""
    mine = {name: mass for name, mass in mix.items() if WORLD[name].soft == score}
    return sum(mass * WORLD[name].truth for name, mass in mine.items()) / sum(mine.values())


def shift_table() -> str:
    """How calibrated each reader of the mixture is under each mix: measured, and of the blend also in closed form."""
    lines = [f"{'mix':24s}{'right at .75':>13s}{'closed form':>13s}" + "".join(f"{name:>14s}" for name in READERS)]
    for title, mix in MIXES.items():
        said = {reader: {name: says(WORLD[name]) for name in mix} for reader, says in READERS.items()}
        errors = "".join(f"{measured_ece(mix, values):14.4f}" for values in said.values())
        right, exact = float(right_at(Fraction("0.75"), mix)), float(closed_form_ece(mix, said["blend"]))
        lines.append(f"{title:24s}{right:13.4f}{exact:13.4f}{errors}")
    return "\n".join(lines)


# ---------------------------------------------------------------- training


class Population(NamedTuple):
    """The hundred examples of the training mix, each outcome as often as it happens.

    Attributes:
        names (`list[str]`): the configuration of each example.
        labels (`LongTensor` of shape `[100]`): 0 or 1.
        averages (`Tensor` of shape `[100, 100]`): takes losses to the mean loss of their configuration.
    """

    names: list[str]
    labels: Tensor
    averages: Tensor


@cache
def population() -> Population:
    names, labels = [], []
    for name, configuration in WORLD.items():
        count, ones = 100 * configuration.mass, 100 * configuration.mass * configuration.truth
        names += [name] * int(count)
        labels += [1] * int(ones) + [0] * int(count - ones)
    same = torch.tensor([[one == other for other in names] for one in names]).double()
    return Population(names, torch.tensor(labels), same / same.sum(dim=1))


def mixed(names: Sequence[str], *, unselected: bool) -> Mixed:
    """The package's mixture in these configurations; unless `unselected`, of the experts with a share alone."""
    shares = torch.tensor([[float(r) for r in WORLD[name].shares] for name in names], dtype=torch.float64)
    ones = torch.tensor([[float(f) for f in WORLD[name].experts] for name in names], dtype=torch.float64)
    if not unselected:
        ones = torch.where(shares > 0, ones, ones.flip(1))  # the other expert in its place
    alone = torch.stack([1 - ones, ones], dim=-1).log()
    return Mixed(log_mixture(alone, shares), alone, shares, torch.tensor([[0, 1]] * len(names)))


@cache
def relevant(*, unselected: bool) -> Tensor:
    """Which of the hundred Robust Filtered tilts, by the package's default thresholds."""
    examples = population()
    disagreement, regret = mixed_agreement(mixed(examples.names, unselected=unselected), examples.labels)
    return routing_relevance(regret, disagreement)


SEES = {"score": lambda name: WORLD[name].soft, "configuration": lambda name: name}
"""What a model may base its probability on: the blend's score alone, or the whole configuration."""


class Method(NamedTuple):
    """An objective of the package.

    Attributes:
        objective (`str`): its name.
        detach (`bool`): whether the adversary's weights are constants for the gradient.
        unselected (`bool`): whether the regret looks at experts to which the router gives no share.
        grouped (`bool`): whether losses are averaged within a configuration before the tilt.
    """

    objective: str
    detach: bool = True
    unselected: bool = False
    grouped: bool = False


METHODS = {
    "ERM": Method("erm"),
    "Robust, detached": Method("robust"),
    "Robust, through weights": Method("robust", detach=False),
    "Filtered, detached": Method("robust_filtered"),
    "  regret over all experts": Method("robust_filtered", unselected=True),
    "tilt of configurations": Method("robust", grouped=True),
}


def train(method: Method, sees: str, *, eta: float = ETA) -> dict[str, float]:
    """P(Y = 1) that a model with one free number for each thing that it sees learns, for each configuration.

    Gradient descent on the whole population, each number's step scaled by how many examples it serves, until the
    gradient is zero. It starts at what ERM learns, as after a warm-up.

    Raises:
        RuntimeError: the descent does not settle.
    """
    examples = population()
    keys = [SEES[sees](name) for name in examples.names]
    seen = list(dict.fromkeys(keys))
    index = torch.tensor([seen.index(key) for key in keys])
    served = torch.bincount(index).double()
    theta = torch.logit(torch.bincount(index, examples.labels.double()) / served)
    for _ in range(5_000):
        gradient = objective_gradient(method, theta, index, eta=eta)
        if gradient.abs().max() < 1e-12:
            return dict(zip(examples.names, torch.sigmoid(theta[index]).tolist(), strict=True))
        theta = theta - len(keys) / served / (1 + eta) * gradient
    raise RuntimeError(f"{method} with eta={eta} did not settle.")


def objective_gradient(method: Method, theta: Tensor, index: Tensor, *, eta: float) -> Tensor:
    """sum_i c_i grad l_i with the package's coefficients c; example i has the logit theta[index[i]]."""
    examples = population()
    theta = theta.clone().requires_grad_(True)
    losses = softplus((1 - 2 * examples.labels) * theta[index])  # cross-entropy of two classes
    if method.grouped:
        losses = examples.averages @ losses
    mask = relevant(unselected=method.unselected)
    found = evaluate_objective(method.objective, losses, relevant=mask, eta=eta, detach_weights=method.detach)
    (found.coefficients @ losses).backward()
    return theta.grad


def tilted_probability(truth: Fraction | float, eta: float) -> float:
    """What detached Robust learns where the truth is `truth`: its logit divided by 1 + eta.

    It minimises q p^-eta + (1 - q) (1 - p)^-eta in each cell, so that p / (1 - p) = (q / (1 - q))^(1 / (1 + eta)).
    """
    return float(torch.sigmoid(torch.logit(torch.tensor(float(truth), dtype=torch.float64)) / (1 + eta)))


def worst_mix_ece(says: Mapping[str, float]) -> float:
    """The largest calibration error over all mixes: that of the one configuration where it is most wrong."""
    return max(abs(says[name] - float(WORLD[name].truth)) for name in WORLD)


def worst_mix_loss(says: Mapping[str, float]) -> float:
    """The largest mean loss (nats) over all mixes, that of one configuration: what an adversary of the data wants."""
    truth = {name: float(configuration.truth) for name, configuration in WORLD.items()}
    return max(-q * math.log(says[name]) - (1 - q) * math.log(1 - says[name]) for name, q in truth.items())


def training_table() -> str:
    """What each method learns, how calibrated that is under some mixes, and its largest loss under any."""
    titles = [*WORLD, "training", "only B", "only C", "worst mix", "worst loss"]
    lines = []
    for sees in SEES:
        lines.append(f"\n{'sees the ' + sees:28s}" + "".join(f"{title:>11s}" for title in titles))
        for title, method in METHODS.items():
            says = train(method, sees)
            errors = [measured_ece(MIXES[mix], says) for mix in ("training", "only B", "only C")]
            numbers = [*(says[name] for name in WORLD), *errors, worst_mix_ece(says), worst_mix_loss(says)]
            lines.append(f"{title:28s}" + "".join(f"{number:11.3f}" for number in numbers))
    return "\n".join(lines).lstrip()


# ---------------------------------------------------------------- figures


def shift_figure() -> Figure:
    """Calibration error, and what 0.75 means, as the mix moves towards one configuration."""
    score, shares = Fraction("0.75"), [Fraction(k, 20) for k in range(21)]
    x = [float(share) for share in shares]
    with style():
        figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 3.2), layout="constrained")
        for name, color in zip("BC", PALETTE, strict=False):
            mixes = [towards(name, share) for share in shares]
            soft, hard = ({key: says(c) for key, c in WORLD.items()} for says in list(READERS.values())[:2])
            left.plot(x, [closed_form_ece(mix, soft) for mix in mixes], color=color, linewidth=1.2)
            left.plot(x, [measured_ece(mix, soft) for mix in mixes], "o", color=color, markersize=3.5,
                      label=f"blend, towards {name}")  # fmt: skip
            right.plot(x, [right_at(score, mix) for mix in mixes], color=color, label=f"towards {name}")
            if name == "C":
                left.plot(x, [measured_ece(mix, hard) for mix in mixes], "s", color=MUTED, markersize=3.5,
                          label="hard routing, either way")  # fmt: skip
        right.axhline(0.75, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        left.set_title("calibration error", loc="left")
        right.set_title("how often class 1 where the blend says 0.75", loc="left")
        for ax in (left, right):
            ax.set_xlabel("share of the mix that has moved")
            ax.legend(frameon=False, fontsize=7.5)
    return figure


def robust_figure() -> Figure:
    """What Robust learns as eta grows: per configuration, and the error of one number for three configurations."""
    etas, fine = np.array([0, 0.25, 0.5, 1, 1.5, 2, 3, 4]), np.linspace(0, 4, 81)
    with style():
        figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 3.2), layout="constrained")
        learned = {sees: [train(METHODS["Robust, detached"], sees, eta=eta) for eta in etas] for sees in SEES}
        for name, color in zip("ABC", PALETTE, strict=False):
            left.plot(fine, [tilted_probability(WORLD[name].truth, eta) for eta in fine], color=color, linewidth=1.2)
            left.plot(etas, [says[name] for says in learned["configuration"]], "o", color=color, markersize=3.5,
                      label=f"{name}, truth {float(WORLD[name].truth):.3g}")  # fmt: skip
        left.axhline(0.5, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        for title, color in zip(("training", "only B", "only C"), PALETTE[3:], strict=True):
            errors = [measured_ece(MIXES[title], says) for says in learned["score"]]
            right.plot(etas, errors, "o-", color=color, markersize=3.5, linewidth=1.2, label=f"mix: {title}")
        left.set_title("learned probability, configuration seen", loc="left")
        right.set_title("calibration error, score alone seen", loc="left")
        for ax in (left, right):
            ax.set_xlabel("tilt eta")
            ax.legend(frameon=False, fontsize=7.5)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the figures")
    folder = parser.parse_args().output
    print(f"Calibration error of P(Y = 1)\n\n{shift_table()}\n\nTrained with eta = {ETA:g}\n\n{training_table()}\n")
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in {"theory_shift": shift_figure(), "theory_robust": robust_figure()}.items():
        figure.savefig(folder / f"{name}.png", dpi=150)
        print(f"drew {name}.png")


if __name__ == "__main__":
    main()
