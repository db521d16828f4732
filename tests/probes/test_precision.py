"""The probe in bfloat16 and under autocast, on a sample of families: the paths and answers of float32."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from hf_moecal import RoutingRecord, UnsupportedMoEError, find_moe_layers, probe_experts
from hf_moecal.probes import certify
from hf_moecal.probes.router import find_link
from tests.rerouting import brute_force
from tests.tiny_moe import tiny_batch, tiny_model


# Whose cheapest exact path is: delta, gather (after norms behind the experts, hyper-connections) or prefix.
PATHS = {
    "mixtral": "delta",
    "gpt_oss": "delta",
    "granitemoe": "delta",
    "deepseek_v3": "delta",
    "gemma4_text": "gather",
    "hy_v4": "gather",
    "zaya": "gather",
    "flex_olmo": "gather",
    "deepseek_v4": "gather",
    "qwen4_exp_text": "gather",
    "inkling_text": "prefix",
}
FAST = ("mixtral", "gemma4_text", "hy_v4")
SAMPLE = [pytest.param(name, marks=[pytest.mark.slow] * (name not in FAST)) for name in PATHS]
TOKENS = torch.tensor([3, 8, 17])


def lowered(model: nn.Module, kind: str):
    """The model, or the context to run it in, in eight bits."""
    if kind == "autocast":
        return torch.autocast("cpu", torch.bfloat16)
    model.bfloat16()
    return nullcontext()


@pytest.mark.parametrize("kind", ["bfloat16", "autocast"])
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("model_type", SAMPLE)
@torch.no_grad()
def test_eight_bits_take_the_path_that_is_exact(model_type: str, seed: int, kind: str) -> None:
    model = tiny_model(model_type, seed=seed)
    layer, inputs = (
        find_moe_layers(model)[-1],
        {"input_ids": tiny_batch(seed=seed + 1)["input_ids"], "use_cache": False},
    )
    exact = model(**inputs).logits.flatten(0, 1)[TOKENS]
    with lowered(model, kind), probe_experts(model) as probe:
        rounding = (model(**inputs).logits.flatten(0, 1)[TOKENS] - exact).abs().max()
        found = probe.expert_logits(TOKENS)
        truth = brute_force(model, layer, inputs, TOKENS, probe.record.expert_ids[TOKENS])
        path, error = probe.certificate.path, probe.certificate.error
    assert path == PATHS[model_type]
    assert max((found - truth).abs().max(), error) <= 2 * rounding


@torch.no_grad()
def test_where_float32_cannot_tell_the_nearest_path_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object) -> None:
        raise RuntimeError("code that is not made for float32")

    monkeypatch.setattr(certify, "exact_paths", fails)
    model = tiny_model("gemma4_text").bfloat16()
    with probe_experts(model) as probe:
        model(**tiny_batch())
    assert probe.certificate.path == "gather"


@torch.no_grad()
def test_certifying_leaves_the_model_as_it_is() -> None:
    model = tiny_model("deepseek_v4").bfloat16()
    before = {name: (parameter, parameter.clone()) for name, parameter in model.named_parameters()}
    with probe_experts(model) as probe:
        model(**tiny_batch())
        assert probe.certificate.path == "gather"
    for name, parameter in model.named_parameters():
        assert parameter is before[name][0] and torch.equal(parameter, before[name][1])
        assert parameter.dtype == torch.bfloat16
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


SIGMOID = {"minimax_m2": "num_local_experts", "deepseek_v3": "n_routed_experts", "glm4_moe": "n_routed_experts"}


@pytest.mark.parametrize("model_type", SIGMOID)
@torch.no_grad()
def test_one_token_in_eight_bits_does_not_make_a_softmax_of_a_sigmoid(model_type: str) -> None:
    model = tiny_model(model_type, **{SIGMOID[model_type]: 40}).bfloat16()
    layer, seen = find_moe_layers(model)[-1], []
    handle = layer.module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    gate = model.get_submodule(layer.name.rpartition(".")[0]).gate
    apart = 0.0
    with probe_experts(model) as probe:
        for seed in range(8):
            seen.clear()
            model(input_ids=tiny_batch(seed=seed)["input_ids"][:1, :1], use_cache=False)
            scores = seen[0].float() @ gate.weight.float().T
            found, truth = probe.router_shares(torch.tensor([0])), scores.sigmoid() / scores.sigmoid().sum()
            assert (found - truth).abs().sum() / 2 < 0.02
            apart = max(apart, float((scores.softmax(-1) - truth).abs().sum() / 2))
    handle.remove()
    assert probe.certificate.link == "sigmoid" and apart > 0.1


@torch.no_grad()
def test_what_merely_has_a_column_per_expert_is_no_score() -> None:
    model = tiny_model("mixtral", num_local_experts=64)  # as many as the hidden states have columns
    layer, seen = find_moe_layers(model)[-1], []
    handle = layer.module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with probe_experts(model.bfloat16()) as probe:
        model(**tiny_batch())
        scores = seen[0].float() @ model.get_submodule(layer.name.rpartition(".")[0]).gate.weight.float().T
        handle.remove()
        found = probe.router_shares(TOKENS)
    assert (found - scores.softmax(-1)[TOKENS]).abs().max() < 0.02
    assert probe.certificate.link == "softmax"


def test_two_explanations_that_differ_are_none() -> None:
    ids = torch.tensor([[0, 1]])
    scores = torch.tensor([[2.0, 2.0, 0.0, -3.0]])  # equal scores have equal weights under every link
    record = RoutingRecord(ids, torch.tensor([[0.5, 0.5]]), (1, 1))
    with pytest.raises(UnsupportedMoEError, match="hardly better than by"):
        find_link({(nn.Identity(), 0): scores}, record, 4)
