"""Models and loops over experts that the tests of readouts share."""

import functools

import torch
import torch.nn.functional as F

from hf_moecal.model.freezing import set_trainable
from hf_moecal.readouts.committee import (
    add_members,
)
from tests.training.helpers import (
    TASKS,
    classification_model,
)


READOUTS = {
    "mixture": dict(readout="mixture"),
    "soft": dict(readout="soft_mixture"),
    "soft of 3": dict(readout="soft_mixture", readout_experts=3),
}


def loop(model, ids, position, settings):
    """log p [C] and each expert's log p_k [m, C] with shares [m], from the definition, with gradient."""
    experts, gate = model.model.layers[-1].mlp.experts, model.model.layers[-1].mlp.gate
    original, seen = type(experts).forward, {}

    def logits(expert=None):
        def forward(hidden, index, weights):
            if expert is None:
                seen["index"], seen["weights"] = index[position], weights[position]
                seen["scores"] = F.linear(hidden[position], gate.weight)
                return original(experts, hidden, index, weights)
            one = torch.full_like(index[position], expert)
            one[1:] = (expert + 1) % experts.num_experts
            mass = torch.cat([weights[position].sum()[None], weights.new_zeros(index.shape[1] - 1)])
            row = torch.arange(len(index))[:, None] == position
            return original(experts, hidden, torch.where(row, one, index), torch.where(row, mass, weights))

        experts.forward = forward
        try:
            found = model(input_ids=ids[None], use_cache=False).logits[0]
        finally:
            del experts.forward
        return found if found.dim() == 1 else found[position]

    logits()
    if settings["readout"] == "mixture":
        chosen, shares = seen["index"].tolist(), seen["weights"] / seen["weights"].sum()
    else:
        full = seen["scores"].softmax(-1)
        chosen = full.argsort(descending=True)[: settings.get("readout_experts")].tolist()
        shares = full[chosen] / full[chosen].sum()
    alone = torch.stack([logits(expert).log_softmax(-1) for expert in chosen])
    return torch.logsumexp(shares.log()[:, None] + alone, 0), alone, shares


def judged(row):
    ids, labels = row["input_ids"], row["labels"]
    if isinstance(labels, int):
        return [(len(ids) - 1, labels)]
    return [(p, int(labels[p + 1])) for p in range(len(ids) - 1) if labels[p + 1] != -100]


@functools.cache
def examples_of(task, readout):
    """The model and every example's [loss, regret, disagreement, mean loss of its experts alone], with graph."""
    build, data, settings = TASKS[task]
    model, examples = build().train(), []
    for row in data():
        found = []
        for position, label in judged(row):
            own, alone, shares = loop(model, row["input_ids"], position, READOUTS[readout])
            regret = (alone[:, label].max() - own[label]).detach().clamp_min(0)
            spread = (shares * (alone.exp() - own.exp()).square().sum(-1)).sum().detach()
            single = -(shares.detach() * alone[:, label]).sum()
            found.append(torch.stack([-own[label], regret, spread, single]))
        examples += found if settings.get("example") == "token" else [torch.stack(found).mean(0)]
    return model, torch.stack(examples)


def between(values):
    """A threshold that half of the values pass, far from all of them."""
    ordered = values.sort().values
    middle = len(ordered) // 2
    return float((ordered[middle - 1] + ordered[middle]) / 2)


def reference(examples, args):
    """The objective's value, with gradient."""
    losses, regret, spread, single = examples.unbind(1)
    value = losses.mean()
    if args.objective != "erm":
        relevant = torch.ones(len(losses), dtype=torch.bool)
        if args.objective == "robust_filtered":
            relevant = (regret > args.tau_regret) | (spread > args.tau_disagreement)
            assert relevant.any() and not relevant.all(), "the filter must bite, or the test shows nothing"
        chosen = losses[relevant]
        weights = torch.softmax(args.eta * (chosen.detach() if args.detach_weights else chosen), 0)
        tilted = (weights * chosen).sum()
        value = tilted if args.objective == "robust" else value + tilted
    return value + args.expert_loss_weight * single.mean()


MEMBERS = 3


def committee(build=classification_model, members=MEMBERS, **changes):
    model = build(**changes)
    set_trainable(model, "last_moe_layer")
    add_members(model, members, seed=1)
    return model
