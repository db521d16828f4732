"""The probe on every MoE family of the installed transformers, against full forwards with a token rerouted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hf_moecal import UnsupportedMoEError, find_moe_layers, probe_experts
from tests.probes.helpers import TOLERANCE, UNSUPPORTED
from tests.rerouting import brute_force
from tests.tiny_moe import classifier_families, families, tiny_batch, tiny_model


TOKENS = torch.tensor([3, 8, 17])


def state_of(model: nn.Module) -> dict[str, tuple]:
    """What a probe could leave behind: attributes and hooks of every module."""
    return {
        name: (
            sorted(vars(module)),
            vars(module).get("forward"),
            module.training,
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
        )
        for name, module in model.named_modules()
    }


def check(model: nn.Module, inputs: dict, tokens: Tensor, index: int) -> None:
    before, plain = state_of(model), model(**inputs).logits
    layer = find_moe_layers(model)[index]
    seen: list[Tensor] = []
    handle = layer.module.register_forward_hook(lambda module, args, output: seen.append(output.clone()))
    with probe_experts(model, index) as probe:
        probed = model(**inputs).logits
    handle.remove()
    assert torch.equal(probed, plain)

    record, width = probe.record, probe.expert_outputs(tokens).shape[-1]
    assert record.expert_ids.shape == (inputs["input_ids"].numel(), layer.top_k)
    assert int(record.expert_ids.max()) < layer.num_experts
    if not layer.scales_inputs:
        mixed = (probe.expert_outputs(tokens) * record.weights[tokens].unsqueeze(-1)).sum(1)
        output = seen[0].reshape(-1, width)[tokens]
        assert (mixed - output).abs().max() <= TOLERANCE * output.abs().max()

    truth = brute_force(model, layer, inputs, tokens, record.expert_ids[tokens])
    found = probe.expert_logits(tokens)
    assert (found - truth).abs().max() <= TOLERANCE * truth.abs().max()
    own = plain[tokens // inputs["input_ids"].shape[1]] if plain.dim() == 2 else plain.flatten(0, 1)[tokens]
    assert (probe.logits(tokens) - own).abs().max() <= TOLERANCE * own.abs().max()
    assert probe.certificate.error <= TOLERANCE * probe.certificate.scale
    assert state_of(model) == before


def implementations(model_type: str) -> list[str | None]:
    return [None] if model_type in {"dbrx", "longcat_flash"} else ["eager", "batched_mm", "grouped_mm"]


CASES = [
    pytest.param(name, experts, marks=[pytest.mark.slow] * (experts in ("eager", "batched_mm")))
    for name in families()
    if name not in UNSUPPORTED
    for experts in implementations(name)
]


@pytest.mark.parametrize(("model_type", "experts"), CASES)
@torch.no_grad()
def test_every_family_at_the_last_and_at_an_earlier_layer(model_type: str, experts: str | None) -> None:
    model = tiny_model(model_type, every_layer=True)
    if experts is not None and not model._can_set_experts_implementation():
        pytest.skip("transformers offers no other experts implementation for this family")
    if experts is not None:
        model.set_experts_implementation(experts)
    assert len(find_moe_layers(model)) == 2
    inputs = {"input_ids": tiny_batch()["input_ids"], "use_cache": False}
    check(model, inputs, TOKENS, -1)
    check(model, inputs, TOKENS, 0)


@pytest.mark.parametrize("model_type", [name for name in classifier_families() if name not in UNSUPPORTED])
@torch.no_grad()
def test_every_classifier(model_type: str) -> None:
    model = tiny_model(model_type, classifier=True)
    inputs = tiny_batch(padding="left")
    check(model, inputs, torch.tensor([8, 17]), -1)


def test_as_many_families_as_transformers_has() -> None:
    assert len(families()) >= 40 and {"mixtral", "olmoe", "qwen3_moe", "gpt_oss"} <= set(families())
    assert UNSUPPORTED <= set(families())


@pytest.mark.parametrize("model_type", sorted(UNSUPPORTED))
def test_unsupported_families_say_why(model_type: str) -> None:
    with pytest.raises(UnsupportedMoEError, match="cannot be consulted one by one.*Found instead"):
        find_moe_layers(tiny_model(model_type))


def test_a_dense_model_has_no_experts() -> None:
    with pytest.raises(UnsupportedMoEError, match="no MoE layer"):
        find_moe_layers(tiny_model("llama"))
