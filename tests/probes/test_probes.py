"""The probe's answers, their gradients, and the settings in which people run MoE models."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from hf_moecal import (
    RoutingRecord,
    UnsupportedMoEError,
    find_moe_layers,
    hard_routing,
    probe_experts,
    routing_statistics,
)
from hf_moecal.versions import cache_name, given_cache
from tests.rerouting import brute_force
from tests.tiny_moe import VOCABULARY, tiny_batch, tiny_model


TOKENS = torch.tensor([4, 8, 17])
LABELS = torch.tensor([7, 11, 90])
PATHS = {"mixtral": "delta", "flex_olmo": "gather", "inkling_text": "prefix"}


def twin(model: nn.Module, inputs: dict, tokens: Tensor, labels: Tensor, index: int = -1) -> tuple[Tensor, Tensor]:
    """Disagreement and regret from full forwards and the formulas of the paper, differentiable."""
    layer = find_moe_layers(model)[index]
    seen: dict[str, Tensor] = {}

    def keep(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        _, seen["ids"], seen["weights"] = (*args, *kwargs.values())

    handle = layer.module.register_forward_pre_hook(keep, with_kwargs=True)
    logits = model(**inputs).logits.flatten(0, 1)[tokens]
    handle.remove()
    weights = seen["weights"][tokens]
    experts = brute_force(model, layer, inputs, tokens, seen["ids"][tokens])
    gaps = (experts.softmax(-1) - logits.softmax(-1)[:, None]).square().sum(-1)
    disagreement = (weights / weights.sum(-1, keepdim=True) * gaps).sum(-1)
    losses = torch.stack([F.cross_entropy(experts[:, k], labels, reduction="none") for k in range(experts.shape[1])])
    regret = (F.cross_entropy(logits, labels, reduction="none") - losses.amin(0)).clamp_min(0)
    return disagreement, regret


def gradients(model: nn.Module, value: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    value.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same_gradients(found: dict[str, Tensor], truth: dict[str, Tensor], tolerance: float = 5e-7) -> None:
    """The gradients of all parameters as one vector, relative to its length."""
    gaps = [found.get(name, torch.zeros_like(true)) - true for name, true in truth.items()]
    gaps += [gradient for name, gradient in found.items() if name not in truth]
    length = torch.stack([true.double().norm() for true in truth.values()]).norm()
    gap = torch.stack([each.double().norm() for each in gaps]).norm()
    assert length > 0
    assert gap <= tolerance * length, f"relative gap {gap / length:.2g}"


def checkpoint(model: nn.Module, *, reentrant: bool) -> None:
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})


def value_of(disagreement: Tensor, regret: Tensor) -> Tensor:
    return disagreement.sum() + regret.sum()


def check_gradients(model: nn.Module, inputs: dict, *, double: bool = True, index: int = -1) -> str:
    """In float64, because in float32 two orders of the same sums differ by up to 3e-6."""
    if double:
        model.double()
    tolerance = 5e-7 if double else 5e-6
    with probe_experts(model, index) as probe:
        model(**inputs)
        disagreement, regret = probe.disagreement(TOKENS), probe.regret(TOKENS, LABELS)
        found = gradients(model, value_of(disagreement, regret))
    true_disagreement, true_regret = twin(model, inputs, TOKENS, LABELS, index)
    torch.testing.assert_close(disagreement, true_disagreement, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(regret, true_regret, rtol=1e-4, atol=1e-5)
    assert_same_gradients(found, gradients(model, value_of(true_disagreement, true_regret)), tolerance)
    return probe.certificate.path


@pytest.mark.parametrize("model_type", PATHS)
def test_gradients_equal_brute_force_on_each_path(model_type: str) -> None:
    assert check_gradients(tiny_model(model_type, experts="eager"), tiny_batch()) == PATHS[model_type]


@pytest.mark.parametrize("model_type", PATHS)
@pytest.mark.parametrize("experts", ["eager", "batched_mm", "grouped_mm"])
def test_gradients_in_float32(model_type: str, experts: str) -> None:
    check_gradients(tiny_model(model_type, experts=experts), tiny_batch(), double=False)


@torch.no_grad()
def test_a_scaled_residual_is_measured() -> None:
    model = tiny_model("granitemoe", residual_multiplier=0.22)
    with probe_experts(model) as probe:
        model(**tiny_batch())
    assert probe.certificate.path == "delta"
    assert probe.certificate.coefficient == pytest.approx(0.22, rel=1e-5)


def test_gradients_at_a_middle_layer() -> None:
    assert check_gradients(tiny_model("qwen3_moe", experts="eager"), tiny_batch(), index=0) == "prefix"


@pytest.mark.parametrize("model_type", PATHS)
@pytest.mark.parametrize("padding", ["left", "right"])
def test_padding(model_type: str, padding: str) -> None:
    check_gradients(tiny_model(model_type), tiny_batch(padding=padding), double=False)


@pytest.mark.parametrize("model_type", [*PATHS, "gpt_oss"])
def test_checkpointing_keeps_the_gradients(model_type: str) -> None:
    model = tiny_model(model_type, experts="eager").train()
    checkpoint(model, reentrant=False)
    inputs = {**tiny_batch(), "use_cache": False}
    with probe_experts(model.double()) as probe:
        model(**inputs)
        found = gradients(model, value_of(probe.disagreement(TOKENS), probe.regret(TOKENS, LABELS)))
    assert all(block.gradient_checkpointing for block in model.model.layers)
    for block in model.model.layers:
        block.gradient_checkpointing = False
    assert_same_gradients(found, gradients(model, value_of(*twin(model, inputs, TOKENS, LABELS))))


def test_reentrant_checkpointing_is_refused() -> None:
    model = tiny_model("mixtral").train()
    checkpoint(model, reentrant=True)
    model.enable_input_require_grads()
    with probe_experts(model), pytest.raises(ValueError, match="non-reentrant"):
        model(**tiny_batch(), use_cache=False)


@pytest.mark.parametrize("model_type", PATHS)
def test_autocast(model_type: str) -> None:
    model, inputs = tiny_model(model_type), tiny_batch()
    with probe_experts(model) as probe:
        with torch.autocast("cpu", torch.bfloat16):
            own = model(**inputs).logits
        assert torch.equal(probe.logits(TOKENS), own.flatten(0, 1)[TOKENS]) and own.dtype == torch.bfloat16
        found = gradients(model, value_of(probe.disagreement(TOKENS), probe.regret(TOKENS, LABELS)))
    with torch.autocast("cpu", torch.bfloat16):
        truth = gradients(model, value_of(*twin(model, inputs, TOKENS, LABELS)))
    assert probe.certificate.path == PATHS[model_type]
    ours, theirs = (torch.cat([g[name].flatten() for name in truth]) for g in (found, truth))
    assert F.cosine_similarity(ours, theirs, dim=0) > 0.98  # bfloat16 keeps eight bits


@pytest.mark.parametrize("model_type", PATHS)
@torch.no_grad()
def test_bfloat16_weights_take_the_same_path(model_type: str) -> None:
    model = tiny_model(model_type).bfloat16()
    with probe_experts(model) as probe:
        model(**tiny_batch())
    assert probe.certificate.path == PATHS[model_type]
    assert torch.isfinite(probe.disagreement(TOKENS)).all()


@pytest.mark.parametrize("model_type", PATHS)
@torch.no_grad()
def test_experts_that_agree_do_not_certify_a_wrong_path(model_type: str) -> None:
    model = tiny_model(model_type)
    for parameter in find_moe_layers(model)[-1].module.parameters():
        parameter.copy_(parameter[:1].expand_as(parameter))
    with probe_experts(model) as probe:
        model(**tiny_batch())
    assert probe.certificate.path == PATHS[model_type]
    assert probe.certificate.effect > 1e-2 * probe.certificate.scale
    assert probe.disagreement(TOKENS).max() < 1e-9


LORA = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "experts": {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    "router": {"target_modules": [], "target_parameters": ["mlp.gate.weight"]},
}


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("place", LORA)
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT asks for it
def test_lora(model_type: str, place: str) -> None:
    from peft import LoraConfig, get_peft_model

    settings = copy.deepcopy(LORA[place])
    if model_type == "gpt_oss" and place == "router":
        settings["target_parameters"] = ["mlp.router.weight"]
    config = LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, task_type="CAUSAL_LM", **settings)
    model = get_peft_model(tiny_model(model_type, experts="eager"), config).eval()
    check_gradients(model, tiny_batch())
    with probe_experts(model) as probe, torch.no_grad():
        plain = model.get_base_model()(**tiny_batch()).logits
        assert torch.allclose(probe.logits(TOKENS), plain.flatten(0, 1)[TOKENS], atol=1e-5)


@torch.no_grad()
def test_offloaded_weights() -> None:
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_submodules

    model, inputs = tiny_model("mixtral"), tiny_batch()
    with probe_experts(model) as probe:
        model(**inputs)
    truth = probe.expert_logits(TOKENS)
    cpu_offload(model, execution_device=torch.device("cpu"))
    with probe_experts(model) as probe:
        model(**inputs)
        found = probe.expert_logits(TOKENS)
    remove_hook_from_submodules(model)
    torch.testing.assert_close(found, truth)


@pytest.mark.parametrize("name", sorted({cache_name(), "past_key_values"}))  # newer transformers take both
@pytest.mark.parametrize(("model_type", "index"), [("mixtral", -1), ("flex_olmo", -1), ("qwen3_moe", 0)])
@pytest.mark.filterwarnings("ignore:.*past_key_values:FutureWarning")
@torch.no_grad()
def test_decoding_with_a_cache(model_type: str, index: int, name: str) -> None:
    model, ids = tiny_model(model_type), tiny_batch()["input_ids"]
    cache = given_cache(model(input_ids=ids[:, :-1], use_cache=True))
    with probe_experts(model, index) as probe:
        step = model(input_ids=ids[:, -1:], **{name: cache}, use_cache=True)
    length = cache.get_seq_length()
    found = probe.expert_logits(torch.tensor([0, 1]))
    assert cache.get_seq_length() == length == ids.shape[1]
    with probe_experts(model, index) as whole:
        full = model(input_ids=ids, use_cache=False)
    assert torch.allclose(step.logits[:, -1], full.logits[:, -1], atol=1e-5)
    last = torch.tensor([8, 17])
    assert torch.allclose(found, whole.expert_logits(last), atol=2e-5)


@torch.no_grad()
def test_generation_leaves_the_last_step() -> None:
    model = tiny_model("olmoe")
    with probe_experts(model) as probe:
        model.generate(**tiny_batch(), max_new_tokens=3, do_sample=False)
    assert probe.record.batch_shape == (2, 1)
    assert probe.disagreement(torch.tensor([0, 1])).shape == (2,)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_after_the_probe_is_attached(backend: str) -> None:
    torch._dynamo.reset()
    model, inputs = tiny_model("mixtral", experts="grouped_mm"), tiny_batch()
    with probe_experts(model) as probe:
        model(**inputs)
        truth = gradients(model, value_of(probe.disagreement(TOKENS), probe.regret(TOKENS, LABELS)))
        compiled = torch.compile(model, backend=backend)
        for _ in range(2):
            compiled(**inputs)
            found = gradients(model, value_of(probe.disagreement(TOKENS), probe.regret(TOKENS, LABELS)))
            assert_same_gradients(found, truth, tolerance=1e-5)
        with pytest.raises(ValueError, match="compiled"), probe_experts(compiled, 0):
            pass
    torch._dynamo.reset()


def test_nested_probes_on_one_layer_are_refused() -> None:
    model = tiny_model("mixtral")
    with probe_experts(model, 0), probe_experts(model, 1):
        with pytest.raises(ValueError, match="probed already"), probe_experts(model, "all"):
            pass


def test_a_head_that_is_called_on_chosen_positions() -> None:
    model, inputs = tiny_model("mixtral"), tiny_batch()
    with torch.no_grad(), probe_experts(model) as probe:
        model(**inputs)
        truth = probe.expert_logits(TOKENS)
        chosen = torch.zeros(inputs["input_ids"].shape, dtype=torch.bool)
        chosen[0, 4] = chosen[1, 8] = True
        handle = model.lm_head.register_forward_pre_hook(lambda module, args: (args[0][chosen],))
        assert model(**inputs).logits.shape == (2, VOCABULARY)
        assert torch.equal(probe.expert_logits(TOKENS), truth)
        handle.remove()
        if hasattr(transformers.modeling_utils, "slice_logits_to_keep"):  # else no boolean mask
            assert model(**inputs, logits_to_keep=chosen).logits.shape == (2, VOCABULARY)
            assert torch.equal(probe.expert_logits(TOKENS), truth)


def test_many_forwards_and_ignored_ones() -> None:
    model, first, second = tiny_model("mixtral"), tiny_batch(), tiny_batch(seed=5)
    with torch.no_grad(), probe_experts(model) as probe:
        model(**first)
        kept = probe.record
        with probe.paused():
            model(**second)
        assert probe.record.weights is kept.weights
        model(**second)
        assert not torch.equal(probe.record.weights, kept.weights)
    model(**first)
    assert probe.record.batch_shape == (2, 9)


def test_the_random_state_is_left_alone() -> None:
    model, inputs = tiny_model("qwen3_moe", attention_dropout=0.5).train(), {**tiny_batch(), "use_cache": False}
    with probe_experts(model, 0) as probe:
        model(**inputs)
        state = torch.get_rng_state()
        probe.disagreement(TOKENS)
        assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())


@torch.no_grad()
def test_chunks_of_tokens_give_the_same_and_bound_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("mixtral")
    with probe_experts(model) as probe:
        model(**tiny_batch())
    everything = torch.arange(18)
    whole = probe.disagreement(everything), probe.regret(everything, everything)
    monkeypatch.setattr("hf_moecal.probes.counterfactual._CHUNK_ELEMENTS", 4 * 2 * VOCABULARY)
    rows: list[int] = []
    handle = model.lm_head.register_forward_hook(lambda module, args, output: rows.append(output[..., 0].numel()))
    parts = probe.disagreement(everything), probe.regret(everything, everything)
    handle.remove()
    torch.testing.assert_close(parts, whole)
    assert max(rows) <= 4 * 2


@torch.no_grad()
def test_a_mask_names_the_same_tokens_as_indices() -> None:
    model = tiny_model("mixtral")
    with probe_experts(model) as probe:
        model(**tiny_batch())
    mask = torch.zeros(2, 9, dtype=torch.bool)
    mask.view(-1)[TOKENS] = True
    assert torch.equal(probe.disagreement(mask), probe.disagreement(TOKENS))
    assert torch.equal(probe.entropy(mask), probe.record.entropy[TOKENS])


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.tensor([18]), "0 to 17"),
        (torch.tensor([-1]), "0 to 17"),
        (torch.tensor([1.0]), "flat indices"),
        (torch.tensor([[1]]), "flat indices"),
        (torch.ones(9, 2, dtype=torch.bool), "shape of the batch"),
        (torch.tensor([], dtype=torch.long), "empty"),
    ],
)
@torch.no_grad()
def test_wrong_tokens(tokens: Tensor, message: str) -> None:
    model = tiny_model("mixtral")
    with probe_experts(model) as probe:
        model(**tiny_batch())
    with pytest.raises(ValueError, match=message):
        probe.disagreement(tokens)


@torch.no_grad()
def test_wrong_labels_layers_and_order() -> None:
    model = tiny_model("mixtral")
    with pytest.raises(ValueError, match="No MoE layer 7"), probe_experts(model, 7):
        pass
    with pytest.raises(ValueError, match="No MoE layer 'x'"), probe_experts(model, "x"):
        pass
    with probe_experts(model, [0, 1]) as probe:
        with pytest.raises(ValueError, match="seen no forward"):
            probe.logits(TOKENS)
        model(**tiny_batch())
    with pytest.raises(ValueError, match="Several layers"):
        probe.disagreement(TOKENS)
    for labels, message in [([1, 2], "one label per token"), ([1, 2, -100], "classes 0 to 127"), ([1, 2, 128], "127")]:
        with pytest.raises(ValueError, match=message):
            probe.regret(TOKENS, torch.tensor(labels), layer=0)
    assert probe.disagreement(TOKENS, layer=0).shape == (3,)


def test_records_by_position_and_their_features() -> None:
    weights = torch.tensor([[0.5, 0.5], [0.9, 0.3], [0.0, 0.0], [1.0, 0.0]])
    record = RoutingRecord(torch.tensor([[0, 1]] * 4), weights, (2, 2))
    assert torch.allclose(record.mass, torch.tensor([1.0, 1.2, 0.0, 1.0]))
    assert torch.allclose(record.shares[1], torch.tensor([0.75, 0.25]))
    assert record.entropy[0].item() == pytest.approx(math.log(2)) and record.entropy[3] == 0
    assert torch.allclose(record.margin, torch.tensor([0.0, 0.5, 0.0, 1.0]))
    assert torch.equal(record.by_position.weights[1, 1], weights[3])
    assert torch.equal(record.by_position.mass.flatten(), record.mass)
    single = RoutingRecord(torch.tensor([[3]]), torch.tensor([[0.4]]), (1, 1))
    assert single.margin.item() == 1 and single.entropy.item() == 0


@pytest.mark.parametrize("model_type", ["mixtral", "dbrx", "longcat_flash", "gpt_oss"])
@torch.no_grad()
def test_hard_routing_keeps_the_mass_and_only_the_strongest(model_type: str) -> None:
    model, inputs = tiny_model(model_type), tiny_batch()
    with probe_experts(model) as probe:
        soft = model(**inputs).logits
        mass = probe.record.mass
        with hard_routing(model):
            hard = model(**inputs).logits
        record = probe.record
        assert torch.equal((record.weights > 0).sum(-1), torch.ones(18, dtype=torch.long))
        assert probe.disagreement(TOKENS).max() < 1e-9  # the one kept expert is the model
        with hard_routing(model, top_k=64):
            assert torch.equal(model(**inputs).logits, soft)
    assert not torch.allclose(hard, soft)
    assert record.mass.shape == mass.shape
    assert torch.equal(model(**inputs).logits, soft)
    with pytest.raises(ValueError, match="at least one"), hard_routing(model, top_k=0):
        pass


@torch.no_grad()
def test_hard_routing_of_one_layer_is_the_strongest_experts_counterfactual() -> None:
    model, inputs = tiny_model("qwen3_moe", mlp_only_layers=[0]), tiny_batch()
    with probe_experts(model) as probe:
        model(**inputs)
        strongest = probe.record.weights[TOKENS].argmax(-1)
        alone = probe.expert_logits(TOKENS)[torch.arange(3), strongest]
        with probe.paused(), hard_routing(model):
            hard = model(**inputs).logits
    torch.testing.assert_close(alone, hard.flatten(0, 1)[TOKENS], rtol=1e-4, atol=1e-5)


def test_chunks_with_gradient_are_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("flex_olmo")
    with probe_experts(model) as probe:
        model(**tiny_batch())
        whole = gradients(model, value_of(probe.disagreement(TOKENS), probe.regret(TOKENS, LABELS)))
        monkeypatch.setattr("hf_moecal.probes.counterfactual._CHUNK_ELEMENTS", 2 * VOCABULARY)
        model(**tiny_batch())
        value = value_of(probe.disagreement(TOKENS), probe.regret(TOKENS, LABELS))
        model(**tiny_batch(seed=5))  # a later forward does not change what is computed again
        parts = gradients(model, value)
    assert_same_gradients(parts, whole, tolerance=5e-6)


@pytest.mark.parametrize("model_type", ["mixtral", "flex_olmo", "inkling_text", "deepseek_v3", "dbrx", "zaya"])
@torch.no_grad()
def test_other_experts_than_the_selected_ones(model_type: str) -> None:
    model, inputs = tiny_model(model_type), {**tiny_batch(), "use_cache": False}
    with probe_experts(model) as probe:
        model(**inputs)
    layer = probe.layers[0]
    everyone = torch.arange(layer.num_experts).expand(len(TOKENS), -1)
    truth = brute_force(model, layer, inputs, TOKENS, everyone)
    found = probe.expert_logits(TOKENS, experts="all")
    assert (found - truth).abs().max() <= 1e-5 * truth.abs().max()
    selected = probe.record.expert_ids[TOKENS]
    own = found.gather(1, selected.unsqueeze(-1).expand(-1, -1, VOCABULARY))
    torch.testing.assert_close(own, probe.expert_logits(TOKENS), rtol=1e-4, atol=1e-5)
    assert probe.expert_outputs(TOKENS, experts="all").shape[:2] == (3, layer.num_experts)
    with pytest.raises(ValueError, match="from 1 to"):
        probe.expert_logits(TOKENS, experts=0)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "gpt_oss", "olmoe"])
@torch.no_grad()
def test_the_routers_full_distribution(model_type: str) -> None:
    model = tiny_model(model_type)
    layer = find_moe_layers(model)[-1]
    seen: list[Tensor] = []
    handle = layer.module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with probe_experts(model) as probe:
        model(**tiny_batch())
    handle.remove()
    block = model.get_submodule(layer.name.rpartition(".")[0])
    router = getattr(block, "gate", None) or block.router
    scores = F.linear(seen[0], router.weight, getattr(router, "bias", None))[TOKENS]
    shares = probe.router_shares(TOKENS)
    torch.testing.assert_close(shares, scores.softmax(-1))
    ids = shares.topk(3, dim=-1).indices
    expected = probe.expert_logits(TOKENS, experts="all").gather(1, ids.unsqueeze(-1).expand(-1, -1, VOCABULARY))
    torch.testing.assert_close(probe.expert_logits(TOKENS, experts=3), expected, rtol=1e-4, atol=1e-5)


def test_the_full_distribution_carries_gradients_to_the_router() -> None:
    model = tiny_model("mixtral")
    with probe_experts(model) as probe:
        model(**tiny_batch())
        probe.router_shares(TOKENS)[:, 0].sum().backward()
    assert model.model.layers[-1].mlp.gate.weight.grad.abs().max() > 0


@torch.no_grad()
def test_scores_that_do_not_explain_the_weights_are_refused() -> None:
    model = tiny_model("mixtral")
    with probe_experts(model) as probe, hard_routing(model):
        model(**tiny_batch())
        with pytest.raises(UnsupportedMoEError, match="explain the routing weights"):
            probe.router_shares(TOKENS)


def ranks(values: Tensor) -> Tensor:
    return values.argsort().argsort().double()


def test_first_order_regret_ranks_as_the_exact_one() -> None:
    # One probed token per sequence: then nothing but its own loss depends on its routing.
    model, batch = tiny_model("qwen3_moe"), tiny_batch(batch=64, length=6)
    with torch.no_grad():  # experts of a usual size beside the residual stream
        for layer in find_moe_layers(model):
            layer.module.down_proj.mul_(0.3)
    tokens, labels = torch.arange(64) * 6 + 5, torch.arange(64) + 3
    with probe_experts(model, "all") as probe:
        model(**batch)
        estimates = probe.first_order_regret(tokens, labels)
        for layer in probe.layers:
            exact = probe.regret(tokens, labels, layer=layer.index).detach()
            assert torch.corrcoef(torch.stack([ranks(estimates[layer.name]), ranks(exact)]))[0, 1] > 0.9
    with torch.no_grad(), probe_experts(model, "all") as probe:
        model(**batch)
        with pytest.raises(ValueError, match="no_grad"):
            probe.first_order_regret(tokens, labels)


def test_first_order_regret_is_the_limit_of_the_exact_one() -> None:
    model = tiny_model("mixtral").double()
    model.set_experts_implementation("eager")
    tokens, labels = torch.tensor([8, 17]), torch.tensor([40, 80])
    with torch.no_grad():
        for layer in find_moe_layers(model):
            layer.module.down_proj.mul_(1e-3)
    with probe_experts(model, "all") as probe:
        model(**tiny_batch())
        for name, estimate in probe.first_order_regret(tokens, labels).items():
            exact = probe.regret(tokens, labels, layer=name)
            torch.testing.assert_close(estimate, exact.to(estimate.dtype), rtol=1e-2, atol=1e-9)


@torch.no_grad()
def test_statistics_equal_a_plain_loop() -> None:
    model = tiny_model("qwen3_moe")
    rows = [{"input_ids": tiny_batch(batch=1, length=n, seed=n)["input_ids"][0]} for n in (5, 9, 3, 7, 4)]
    statistics = routing_statistics(model.train(), rows, batch_size=2)
    assert all(module.training for module in model.modules())
    model.eval()
    for layer, found in zip(find_moe_layers(model), statistics, strict=True):
        both, share, entropy = torch.zeros(8, 8), torch.zeros(8), 0.0
        for row in rows:
            with probe_experts(model, layer.index) as probe:
                model(input_ids=row["input_ids"][None])
            for ids, shares in zip(probe.record.expert_ids, probe.record.shares, strict=True):
                for one, r in zip(ids, shares, strict=True):
                    share[one] += r
                    entropy -= float(r * r.log())
                    for other in ids:
                        both[one, other] += 1
        assert found.tokens == 28 and found.name == layer.name
        torch.testing.assert_close(found.co_activation.float(), both / 28)
        torch.testing.assert_close(found.load.float(), both.diagonal() / 56)
        torch.testing.assert_close(found.share.float(), share / 28)
        assert found.entropy == pytest.approx(entropy / 28, rel=1e-5)
        assert found.to_dict()["load"] == found.load.tolist()
    loader = torch.utils.data.DataLoader([{"input_ids": torch.arange(3, 9)}] * 4, batch_size=3)
    assert routing_statistics(model, loader)[0].tokens == 24
    for bad, message in [([], "empty"), ([{"text": "x"}], "reads input_ids")]:
        with pytest.raises(ValueError, match=message):
            routing_statistics(model, bad)


def test_weights_that_fsdp_shards(tmp_path: Path) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        mesh, inputs = init_device_mesh("cpu", (1,)), {**tiny_batch(), "use_cache": False}
        for model_type, index in [("mixtral", -1), ("flex_olmo", -1), ("qwen3_moe", 0)]:
            model = tiny_model(model_type, experts="eager").train()
            with torch.no_grad(), probe_experts(model, index) as probe:
                model(**inputs)
                truth = probe.disagreement_and_regret(TOKENS, LABELS)
            for block in model.model.layers:
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
            with probe_experts(model, index) as probe:
                loss = model(**inputs, labels=inputs["input_ids"]).loss
                with torch.no_grad():
                    torch.testing.assert_close(probe.disagreement_and_regret(TOKENS, LABELS), truth)
                loss.backward()
    finally:
        dist.destroy_process_group()
