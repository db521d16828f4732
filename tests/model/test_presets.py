"""What trains under each preset: found in every family, trained with the exact gradient, saved and loaded."""

import copy
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import MixtralForSequenceClassification

from hf_moecal import (
    MoECalArguments,
    MoECalTrainer,
    TemperatureCalibrator,
    UnsupportedMoEError,
    find_moe_layers,
    from_pretrained,
)
from hf_moecal.cli.plan import make_plan
from hf_moecal.cli.recipe import Recipe
from hf_moecal.hub import write_calibration
from hf_moecal.model.freezing import set_trainable, what_trains
from hf_moecal.model.lora import add_lora, lora_config
from hf_moecal.probes import router as routers_of
from hf_moecal.probes.router import find_routers
from hf_moecal.probes.routing import bind_experts
from tests.model.helpers import randomise_adapter
from tests.tiny_moe import families, tiny_batch, tiny_config, tiny_model
from tests.training.helpers import (
    CLASSES,
    Gradients,
    arguments,
    checkpointing,
    classification_data,
    classification_model,
    collate,
    language_data,
    language_model,
    reference_gradients,
    relative_error,
)


FEW = ["mixtral", "gpt_oss", "gemma4_text", "zaya", "longcat_flash", "axk2", "dbrx"]
UNSUPPORTED = {"doge", "jetmoe", "llama4_text"}
SELECTION_ONLY = ("correction_bias", "expert_bias")  # added to scores to choose experts, never differentiated
EVERY_FAMILY = [
    pytest.param(name, marks=() if name in FEW else pytest.mark.slow) for name in families() if name not in UNSUPPORTED
]
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for it


def trained_names(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def experts_calls(model, batch):
    calls, handles = [], []
    for layer in find_moe_layers(model):
        hook = layer.module.register_forward_hook(
            lambda module, args, kwargs, output: calls.append(bind_experts(module, args, kwargs)), with_kwargs=True
        )
        handles.append(hook)
    with torch.no_grad():
        model(**batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return calls


def backpropagate(model):
    model(**tiny_batch(length=16), use_cache=False).logits.square().mean().backward()


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_routers_are_what_the_routing_depends_on_and_nothing_before(family):
    model, batch = tiny_model(family), tiny_batch()
    found = find_routers(model)
    layers = find_moe_layers(model)
    assert len(found) == len(layers)
    before = experts_calls(model, batch)
    with torch.no_grad():
        for parameter in list(found.values())[-1].parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    after = experts_calls(model, batch)
    for one, other in zip(before[:-1], after[:-1], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    torch.testing.assert_close(before[-1][0], after[-1][0])  # what reaches the experts
    assert not (torch.equal(before[-1][1], after[-1][1]) and torch.equal(before[-1][2], after[-1][2]))


@pytest.mark.parametrize("family", [name for name in FEW if name != "zaya"])  # whose router has an entry for no expert
def test_routers_are_found_where_a_model_declares_nothing(family, monkeypatch):
    model = tiny_model(family)
    expected = list(find_routers(model))
    monkeypatch.setattr(routers_of, "declared_classes", lambda model, output: set())
    if family == "gemma4_text":  # its router is beside its attention
        assert list(find_routers(model)) == expected
        model.model.layers[0].self_attn.q_proj = torch.nn.Linear(64, find_moe_layers(model)[0].num_experts)
        with pytest.raises(UnsupportedMoEError, match="router of model.layers.0.experts cannot be told"):
            find_routers(model)
    else:
        assert list(find_routers(model)) == expected


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_router_training_reaches_every_router_and_nothing_else(family):
    model = tiny_model(family).train()
    line = set_trainable(model, "routers")
    inside = {
        f"{name}.{rest}" for name, router in find_routers(model).items() for rest, _ in router.named_parameters()
    }
    assert trained_names(model) == inside
    assert "experts 0," in line and "attention 0," in line and "routers 0," not in line
    backpropagate(model)
    untouched = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert all(name.endswith(SELECTION_ONLY) for name in untouched)


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_an_adapter_reaches_attention_and_experts(family):
    if family == "dbrx":
        with pytest.raises(UnsupportedMoEError, match="hold no fused weights"):
            lora_config(tiny_model(family))
        return
    plain = tiny_model(family)
    model = add_lora(tiny_model(family), r=2, alpha=4).train()
    names = [layer.name for layer in find_moe_layers(model)]
    assert names == [f"base_model.model.{layer.name}" for layer in find_moe_layers(plain)]  # the outermost wrappers
    backpropagate(model)
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name and gradient is not None for name, gradient in trained.items())
    assert all(gradient.any() for name, gradient in trained.items() if "lora_B" in name)
    for name in names:
        assert sum(key.startswith(f"{name}.") for key in trained) == 4  # two matrices for each of two weights
    assert any(not key.startswith(tuple(names)) for key in trained)


@pytest.mark.parametrize("objective", ["robust", "robust_filtered"])
@pytest.mark.parametrize("preset", ["routers", "lora"])
@pytest.mark.parametrize("task", ["classification", "lm"])
def test_gradients_equal_one_full_batch(tmp_path, task, preset, objective):
    classifies = task == "classification"
    rows = classification_data() if classifies else language_data()
    changes = dict(tau_regret=0.05) if classifies else dict(tau_regret=0.4, task="lm")
    args = arguments(tmp_path, objective=objective, train=preset, tau_disagreement=0.05, **changes)
    seen = Gradients()
    trainer = MoECalTrainer(
        model=classification_model() if classifies else language_model(), args=args, train_dataset=rows,
        data_collator=collate, callbacks=[seen],
    )  # fmt: skip
    randomise_adapter(trainer.model)
    twin = copy.deepcopy(trainer.model)
    inner = twin.base_model.model if preset == "lora" else twin
    trainer.train()
    expected = reference_gradients(inner.train(), rows, args)
    found = {name.removeprefix("base_model.model."): gradient for name, gradient in seen.found.items()}
    assert found.keys() == expected.keys()
    assert relative_error(found, expected) <= 1e-5


@pytest.fixture
def base(tmp_path):
    classification_model().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_an_adapter_resumes_exactly_and_loads_by_itself(tmp_path, base):
    def trainer():
        model = MixtralForSequenceClassification.from_pretrained(base)
        args = checkpointing(tmp_path / "out", train="lora", lora_r=4, lora_alpha=8, learning_rate=0.05)
        return MoECalTrainer(model=model, args=args, train_dataset=classification_data(), data_collator=collate)

    whole, resumed = trainer(), trainer()
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    start = add_lora(MixtralForSequenceClassification.from_pretrained(base), r=4, alpha=8)
    for (name, one), other, first in zip(
        whole.model.named_parameters(), resumed.model.parameters(), start.parameters(), strict=True
    ):
        assert torch.equal(one, other), name
        assert torch.equal(one, first) != one.requires_grad, name
    losses = [[log["loss"] for log in t.state.log_history if "loss" in log] for t in (whole, resumed)]
    assert losses[0] == losses[1]

    whole.save_model(str(tmp_path / "adapter"))
    write_calibration(tmp_path / "adapter", TemperatureCalibrator.from_parameters({"temperature": 2.0}))
    loaded = from_pretrained(tmp_path / "adapter")
    batch = {"input_ids": torch.tensor([[3, 4, 5, 6]])}
    with torch.no_grad():
        expected = whole.model.eval()(**batch).logits / 2
        torch.testing.assert_close(loaded(**batch).logits, expected, rtol=0, atol=0)
    assert loaded.config.num_labels == CLASSES


def test_the_line_counts_by_kind_and_is_printed_once(tmp_path, capsys):
    trainer = MoECalTrainer(
        model=classification_model(), args=arguments(tmp_path, objective="robust", train="routers"),
        train_dataset=classification_data(), data_collator=collate,
    )  # fmt: skip
    trainer.train()
    # two layers of 4 x 24 scores; 24 x 3 of the head; 2 (4 x 2 x 32 x 24 + 4 x 32 x 24) and 2 x 4 x 24 x 24 frozen
    counts = "264 of 24,576 parameters (1.1%): experts 0, routers 192, attention 0, head 72, other 0"
    assert trainer.trains == f"train=routers: {counts}; no router aux loss"
    assert capsys.readouterr().out.count("train=routers") == 1


def test_what_has_no_experts_is_counted_too():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, intermediate_size=8, num_attention_heads=2)
    assert what_trains(LlamaForCausalLM(config), "all").endswith("attention 256, head 72, other 288")


def test_presets_that_cannot_be_are_refused(tmp_path, monkeypatch):
    rows = classification_data()

    def train(model, **settings):
        MoECalTrainer(model=model, args=arguments(tmp_path, **settings), train_dataset=rows, data_collator=collate)

    adapted = get_peft_model(classification_model(), LoraConfig(target_modules=["q_proj"], task_type="SEQ_CLS"))
    with pytest.raises(ValueError, match="has an adapter already; set train='all'"):
        train(adapted, train="lora")
    with pytest.raises(ValueError, match="train='routers' would train weights that an adapter does not save"):
        train(adapted, train="routers")
    with pytest.raises(ValueError, match="give the model itself, loaded with from_pretrained, not 'some/model'"):
        train("some/model", train="routers")
    quantized = classification_model()
    gate = quantized.model.layers[0].mlp.gate
    gate.weight = torch.nn.Parameter(gate.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ValueError, match="'model.layers.0.mlp.gate.weight', which is quantized"):
        train(quantized, train="routers")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"needs peft; install it with `pip install 'hf_moecal\[peft\]'`"):
        train(classification_model(), train="lora")


@pytest.mark.parametrize("name", ["lora_r", "lora_alpha"])
def test_ranks_are_for_adapters_alone(name):
    with pytest.raises(ValueError, match=f"`{name}` has no effect on train='all'"):
        MoECalArguments("out", train="all", **{name: 4})
    with pytest.raises(ValueError, match=f"`{name}` must be a finite number at least 1, got 0"):
        MoECalArguments("out", train="lora", **{name: 0})


def test_names_are_given_whole_where_their_ends_fit_other_modules():
    config = lora_config(tiny_model("kimi_linear"))  # linear attention has projections of the same names
    assert all(name.startswith("model.layers.1.self_attn.") for name in config.target_modules)
    assert {name.rpartition(".")[0] for name in config.target_parameters} == {"mlp.experts"}


def test_a_plan_knows_the_adapter(tmp_path):
    tiny_config("mixtral").save_pretrained(tmp_path)
    settings = {"output_dir": "out", "task": "lm", "train": "lora", "lora_r": 4}
    plan = make_plan(Recipe(model=str(tmp_path), max_length=16, arguments=settings), rows=8)
    model = add_lora(tiny_model("mixtral"), r=4)
    assert plan.counts.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert plan.counts.total == sum(p.numel() for p in model.parameters())
