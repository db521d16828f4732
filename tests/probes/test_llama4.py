"""Llama 4, whose weights scale what its experts read: y = sum_k E_k(w_k h)."""

from __future__ import annotations

import pytest
import torch

from hf_moecal import find_moe_layers, hard_routing, probe_experts, routing_statistics
from tests.probes.test_probes import LABELS, TOKENS, assert_same_gradients, gradients, value_of
from tests.rerouting import brute_force
from tests.tiny_moe import tiny_batch, tiny_model


def inputs() -> dict:
    return {**tiny_batch(), "use_cache": False}


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("index", [0, -1])
@torch.no_grad()
def test_every_expert_equals_brute_force(top_k: int, index: int) -> None:
    model = tiny_model("llama4_text", num_experts_per_tok=top_k)
    layer = find_moe_layers(model)[index]
    with probe_experts(model, index) as probe:
        model(**inputs())
    truth = brute_force(model, layer, inputs(), TOKENS, torch.arange(8).expand(3, -1))
    found = probe.expert_logits(TOKENS, experts="all")
    assert (found - truth).abs().max() <= 1e-5 * truth.abs().max()
    shares = probe.router_shares(TOKENS)  # the router's sigmoids, also of experts that were not selected
    assert probe.certificate.link == "sigmoid" and (shares > 0).all()
    if top_k == 1:  # the one selected expert is the model
        assert probe.disagreement(TOKENS).max() < 1e-9
    else:
        assert probe.disagreement(TOKENS).min() > 1e-4


def test_gradients_equal_brute_force() -> None:
    model = tiny_model("llama4_text").double()
    with probe_experts(model) as probe:
        model(**inputs())
        found = gradients(model, value_of(probe.disagreement(TOKENS), probe.regret(TOKENS, LABELS)))
        record = probe.record[TOKENS]
    own = model(**inputs()).logits.flatten(0, 1)[TOKENS].log_softmax(-1)
    alone = brute_force(model, find_moe_layers(model)[-1], inputs(), TOKENS, record.expert_ids).log_softmax(-1)
    shares = record.shares.detach()
    with probe_experts(model) as again:  # with the gradient of the shares
        model(**inputs())
        shares = again.record[TOKENS].shares
    apart = (shares * (alone.exp() - own.exp()[:, None]).square().sum(-1)).sum(-1)
    rows = torch.arange(3)
    regret = (alone[rows, :, LABELS].amax(-1) - own[rows, LABELS]).clamp_min(0)
    assert_same_gradients(found, gradients(model, value_of(apart, regret)))


@torch.no_grad()
def test_statistics_and_hard_routing() -> None:
    model = tiny_model("llama4_text", num_experts_per_tok=1)
    rows = [{"input_ids": tiny_batch()["input_ids"][0].tolist()}]
    with probe_experts(model) as probe:
        model(input_ids=torch.tensor([rows[0]["input_ids"]]))
        counts = probe.record.expert_ids.flatten().bincount(minlength=8)
    torch.testing.assert_close(routing_statistics(model, rows)[-1].load, counts / counts.sum(), check_dtype=False)
    plain = model(**inputs()).logits
    with hard_routing(model):
        assert torch.equal(model(**inputs()).logits, plain)
    with (
        pytest.raises(ValueError, match="scale what its experts read|scale what"),
        hard_routing(tiny_model("llama4_text", num_experts_per_tok=2)),
    ):
        pass
