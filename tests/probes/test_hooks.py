"""Contexts that depend on a hook: right, or refused, where the hook does not fire or fires for part of the tokens."""

from __future__ import annotations

import types

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageTextToText, AutoModelForQuestionAnswering, Ernie4_5_VLMoeConfig

from hf_moecal import UnsupportedMoEError, find_moe_layers, hard_routing, probe_experts, routing_statistics
from hf_moecal.model.freezing import last_moe_site
from hf_moecal.model.head import RowSelector
from tests.tiny_moe import randomise, tiny_batch, tiny_config, tiny_model


TOKENS = torch.tensor([4, 8, 17])


def routed_around(model: nn.Module) -> nn.Module:
    """The model, whose blocks call something else of the experts than the module, as MXFP4 kernels do."""
    for layer in model.model.layers:
        experts = layer.mlp.experts
        experts.forward_routed = types.MethodType(type(experts).forward, experts)

        def forward(block: nn.Module, hidden: torch.Tensor) -> tuple:
            flat = hidden.reshape(-1, hidden.shape[-1])
            weights, index = block.router(flat)[1:]
            return block.experts.forward_routed(flat, index, weights).reshape(hidden.shape), weights

        layer.mlp.forward = types.MethodType(forward, layer.mlp)
    return model


@torch.no_grad()
def test_experts_that_do_not_run_as_a_module() -> None:
    model, inputs = routed_around(tiny_model("gpt_oss")), tiny_batch()
    model(**inputs)
    with hard_routing(model), pytest.raises(UnsupportedMoEError, match="does not run as a module.*dequantize"):
        model(**inputs)
    with probe_experts(model) as probe:
        model(**inputs)
        for ask in (lambda: probe.record, lambda: probe.certificate, lambda: probe.expert_logits(TOKENS)):
            with pytest.raises(UnsupportedMoEError, match="did not run.*MXFP4"):
                ask()
    with pytest.raises(UnsupportedMoEError, match="did not run.*MXFP4"):
        routing_statistics(model, [{"input_ids": [1, 2, 3]}])


@torch.no_grad()
def test_code_that_was_compiled_before_the_hooks() -> None:
    torch._dynamo.reset()
    model, inputs = tiny_model("mixtral", experts="grouped_mm"), tiny_batch()
    rows = [{"input_ids": inputs["input_ids"][0].tolist()}]
    plain = model(**inputs).logits
    with hard_routing(model):
        truth = model(**inputs).logits
    expected = routing_statistics(model, rows)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(**inputs).logits, plain)
    with hard_routing(model):
        torch.testing.assert_close(compiled(**inputs).logits, truth)
    torch.testing.assert_close(compiled(**inputs).logits, plain)
    assert not torch.allclose(truth, plain, atol=1e-2)
    with RowSelector(model) as selector, selector.selecting(TOKENS):
        logits = compiled(**inputs).logits
        if logits.shape[1] != len(TOKENS):
            with pytest.raises(ValueError, match="ignored the hook"):
                selector.at(logits, slice(None))
    model.model.layers[-1].compile(backend="eager")
    model(**inputs)
    found = routing_statistics(model, rows)
    assert [each.load.tolist() for each in found] == [each.load.tolist() for each in expected]
    torch._dynamo.reset()


@torch.no_grad()
def test_a_selector_whose_hook_did_not_fire_says_so() -> None:
    model = tiny_model("mixtral")
    with RowSelector(model) as selector, selector.selecting(TOKENS):
        logits = model.lm_head.weight.new_zeros(1, 18, 128)
        for ask in (lambda: selector.at(logits, slice(None)), lambda: selector.reduced(logits, lambda _, rows: rows)):
            with pytest.raises(ValueError, match="ignored the hook"):
                ask()


@torch.no_grad()
def test_two_probes_at_once_do_not_disturb_each_other() -> None:
    model, inputs = tiny_model("qwen3_moe"), tiny_batch()
    truth = {}
    for index in (0, 1):
        with probe_experts(model, index) as probe:
            model(**inputs)
            truth[index] = probe.expert_logits(TOKENS)
    with probe_experts(model, 0) as first, probe_experts(model, 1) as second:
        model(**inputs)
        for _ in range(2):
            torch.testing.assert_close(first.expert_logits(TOKENS), truth[0])
            torch.testing.assert_close(second.expert_logits(TOKENS), truth[1])
        assert first.record.batch_shape == second.record.batch_shape == (2, 9)


def ernie() -> nn.Module:
    text = {
        "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "moe_intermediate_size": [32, 32], "moe_k": 2,
        "moe_num_experts": 8, "moe_num_shared_experts": 1, "mlp_layer_types": ["dense", "sparse"],
        "pad_token_id": 0, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]},
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "patch_size": 14}
    config = Ernie4_5_VLMoeConfig(text_config=text, vision_config=vision)
    torch.manual_seed(0)
    return randomise(AutoModelForImageTextToText.from_config(config, attn_implementation="eager")).eval()


@torch.no_grad()
def test_experts_of_one_modality() -> None:
    model, inputs = ernie(), {**tiny_batch(), "use_cache": False}
    assert [layer.name.split(".")[-2] for layer in find_moe_layers(model)] == ["text_moe"]
    assert last_moe_site(model).index == 1
    with probe_experts(model) as probe:
        own = model(**inputs).logits
    torch.testing.assert_close(probe.logits(TOKENS), own.flatten(0, 1)[TOKENS], rtol=1e-4, atol=1e-4)
    kinds = torch.zeros(2, 9, dtype=torch.int)
    kinds[0, 2:5] = 1  # three image tokens
    with probe_experts(model) as probe:
        model(**inputs, moe_mm_token_type_ids=kinds, mm_token_type_ids=kinds)
    for ask in (lambda: probe.record, lambda: probe.expert_logits(TOKENS), lambda: probe.router_shares(TOKENS)):
        with pytest.raises(UnsupportedMoEError, match="saw 15 of the 18 tokens"):
            ask()


def test_experts_that_are_shared_out_over_processes_are_refused() -> None:
    marked = tiny_model("mixtral")
    marked.model.layers[1].mlp.experts._is_expert_parallel = True
    halved = tiny_model("qwen3_moe")
    halved.model.layers[1].mlp.experts.num_experts = 4
    for model in (marked, halved):
        with pytest.raises(UnsupportedMoEError, match="expert parallelism"):
            find_moe_layers(model)


class OwnBlock(nn.Module):
    """A block as remote code has it."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(64, experts), nn.ModuleList(nn.Linear(64, 64) for _ in range(experts))


@pytest.mark.parametrize(
    ("kind", "remedy"), [("deepseek_v3", "without trust_remote_code=True"), ("kimi_k9", "under another name")]
)
def test_a_list_of_experts_is_refused_with_the_remedy(kind: str, remedy: str) -> None:
    model = tiny_model("llama")
    model.config.model_type = kind
    for layer in model.model.layers:
        layer.mlp = OwnBlock(4)
    with pytest.raises(UnsupportedMoEError, match=f"list of modules.*{kind}.*{remedy}"):
        find_moe_layers(model)


@torch.no_grad()
def test_a_head_without_logits_is_refused() -> None:
    config = tiny_config("mixtral")
    model = randomise(AutoModelForQuestionAnswering.from_config(config, attn_implementation="eager")).eval()
    with probe_experts(model) as probe:
        model(**tiny_batch())
        assert probe.record.batch_shape == (2, 9)
        for ask in (lambda: probe.expert_logits(TOKENS), lambda: probe.logits(TOKENS)):
            with pytest.raises(UnsupportedMoEError, match="question answering"):
                ask()


@torch.no_grad()
def test_tuples_instead_of_outputs() -> None:
    model, inputs = tiny_model("mixtral"), tiny_batch()
    with probe_experts(model) as probe:
        model(**inputs)
        truth = probe.expert_logits(TOKENS)
        model(**inputs, return_dict=False)
        torch.testing.assert_close(probe.expert_logits(TOKENS), truth)
