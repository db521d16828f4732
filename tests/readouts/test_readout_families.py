"""The mixtures on every MoE family, against full forwards with a token rerouted to one expert after the other."""

from __future__ import annotations

import pytest
import torch

from hf_moecal import UnsupportedMoEError, find_moe_layers, probe_experts
from hf_moecal.readouts.attached import AttachedReadout
from hf_moecal.readouts.mixture import Readout
from tests.probes.helpers import TOLERANCE, UNSUPPORTED
from tests.rerouting import brute_force
from tests.tiny_moe import families, tiny_batch, tiny_model


# Whose modules nowhere give scores over all experts that explain the weights which the model used.
SELECTED_ONLY = {"gemma4_text", "phimoe", "zaya"}
TOKENS = torch.tensor([8])


def read(model, inputs, kind):
    """log p [n, V] of the readout."""
    with AttachedReadout(model, Readout(kind), rows=True) as attached, attached.at(TOKENS):
        return attached.together(model(**inputs), lambda part, log_probs: log_probs)


def loop(model, inputs, kind):
    """The same from one whole forward per expert, and the largest logit among them."""
    layer = find_moe_layers(model)[-1]
    with probe_experts(model) as probe:
        model(**inputs)
        record = probe.record[TOKENS]
        ids, shares = record.expert_ids, record.shares
        if kind == "soft_mixture":
            full = probe.router_shares(TOKENS)
            restricted = full.gather(1, ids)  # to the selected experts: the weights that the model used
            assert (restricted / restricted.sum(-1, keepdim=True) - shares).abs().max() < 1e-5
            ids, shares = torch.arange(layer.num_experts)[None], full
    logits = brute_force(model, layer, inputs, TOKENS, ids)
    return torch.logsumexp(shares.log().unsqueeze(-1) + logits.log_softmax(-1), 1), logits.abs().max()


def gradients(model, log_probs):
    """Of the label's loss, for all that the last MoE layer's block holds and the head."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(-log_probs[0, 5], parameters, allow_unused=True)
    return torch.cat(
        [g.flatten() if g is not None else p.new_zeros(p.numel()) for g, p in zip(found, parameters, strict=True)]
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mixture", "soft_mixture"])
@pytest.mark.parametrize("model_type", [name for name in families() if name not in UNSUPPORTED])
def test_every_family_equals_the_loop_over_experts(model_type, kind):
    model = tiny_model(model_type)
    inputs = {"input_ids": tiny_batch(batch=1)["input_ids"], "use_cache": False}
    if kind == "soft_mixture" and model_type in SELECTED_ONLY:
        with pytest.raises(UnsupportedMoEError, match='full distribution is unknown.*readout="mixture"'):
            read(model, inputs, kind)
        return
    found, (expected, scale) = read(model, inputs, kind), loop(model, inputs, kind)
    assert (found - expected).abs().max() <= TOLERANCE * scale
    assert abs(found.exp().sum() - 1) <= 1e-6
    own, truth = gradients(model, found), gradients(model, expected)
    assert truth.norm() > 1e-3 and (own - truth).norm() <= 1e-4 * truth.norm()
