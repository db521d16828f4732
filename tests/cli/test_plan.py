"""The dry run against what real tiny models hold, save and take."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.dataclasses import get_module_class_from_name
from accelerate.utils.launch import prepare_multi_gpu_env
from datasets import Dataset
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, LlamaConfig, ViTConfig

from hf_moecal import MoECalArguments, MoECalTrainer, find_moe_layers
from hf_moecal.cli.commands import main
from hf_moecal.cli.plan import Launch, make_plan, plan_batch, read_launch
from hf_moecal.cli.plan_memory import (
    activation_memory,
    count_parameters,
    decoder_layers,
    logits_memory,
    state_memory,
    weights_of,
)
from hf_moecal.cli.recipe import Recipe
from hf_moecal.model.freezing import set_trainable
from tests.tiny_moe import tiny_config, tiny_model


FAMILIES = ["mixtral", "qwen3_moe", "gpt_oss", "olmoe", "deepseek_v3"]
ACCELERATE = Path(__file__).parents[2] / "recipes" / "accelerate"


def real(family, preset="all", **changes):
    model = tiny_model(family, **changes).train()
    set_trainable(model, preset)
    return model


def weights(model, itemsize=4):
    return weights_of(model, find_moe_layers(model), itemsize=itemsize)


def total_bytes(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


# Parameters


@pytest.mark.parametrize("family", FAMILIES)
def test_active_parameters_are_those_that_one_token_reads(family):
    """What no token reads gets no gradient."""
    model = real(family, experts="eager")
    seen = {}

    def record(name):
        return lambda module, args, output: seen.update({name: args[1]})

    for layer in find_moe_layers(model):
        layer.module.register_forward_hook(record(layer.name))
    model(input_ids=torch.tensor([[5]]), use_cache=False).logits.sum().backward()
    counts = count_parameters(weights(model))
    unread = 0
    for layer in find_moe_layers(model):
        idle = set(range(layer.num_experts)) - set(seen[layer.name].flatten().tolist())
        for parameter in layer.module.parameters():
            for expert in idle:
                assert parameter.grad is None or not parameter.grad[expert].any()
            unread += parameter[0].numel() * len(idle)
    assert counts.total == sum(p.numel() for p in model.parameters()) == counts.trained
    assert counts.active == counts.total - unread < counts.total


def test_active_parameters_of_mixtral_by_hand():
    hidden, inner, heads, kv, head, vocabulary, experts = 64, 96, 4, 2, 16, 128, 8
    attention = hidden * head * (heads + 2 * kv) + heads * head * hidden
    layer = attention + 2 * hidden + experts * hidden + 2 * 3 * hidden * inner
    by_hand = 2 * layer + hidden + 2 * vocabulary * hidden
    assert count_parameters(weights(real("mixtral"))).active == by_hand


# Weights, gradients, optimizer


@pytest.mark.parametrize("preset", ["all", "last_moe_layer"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_states_are_the_bytes_of_a_real_step(family, dtype, preset):
    model = real(family, preset).to(dtype)
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    model(input_ids=torch.arange(3, 120)[None], use_cache=False).logits.float().square().mean().backward()
    optimizer.step()
    found = state_memory(weights(model, dtype.itemsize), Launch())
    assert found.weights == total_bytes(model.parameters())
    assert found.gradients == total_bytes(p.grad for p in model.parameters() if p.grad is not None) > 0
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert found.optimizer == total_bytes(moments)
    assert found.gathered == 0
    ddp = state_memory(weights(model, dtype.itemsize), Launch(4, "ddp"))
    assert (ddp.weights, ddp.gradients) == (found.weights, 2 * found.gradients)  # DDP's buckets


SHARDED = """
import json, sys, torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from tests.tiny_moe import tiny_model
from hf_moecal.model.freezing import set_trainable
from hf_moecal.cli.plan_memory import decoder_layers

dist.init_process_group("gloo")
model = tiny_model("mixtral", num_local_experts=3).to(torch.bfloat16).train()
set_trainable(model, sys.argv[1])
for parameter in model.parameters():  # as accelerate does under mixed precision
    if parameter.requires_grad:
        parameter.data = parameter.data.float()
mesh = init_device_mesh("cpu", (2,))
policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
for layer in decoder_layers(model):
    fully_shard(layer, mesh=mesh, mp_policy=policy)
fully_shard(model, mesh=mesh, mp_policy=policy)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
model(input_ids=torch.arange(3, 120)[None], use_cache=False).logits.float().square().mean().backward()
optimizer.step()
size = lambda tensors: sum(t.to_local().numel() * t.element_size() for t in tensors)
if dist.get_rank() == 0:
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    found = [size(model.parameters()), size(p.grad for p in model.parameters() if p.grad is not None), size(moments)]
    print(json.dumps(found))
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["all", "last_moe_layer"])
def test_fsdp2_states_are_the_bytes_of_a_real_sharded_step(tmp_path, preset):
    """Three experts on two devices: the first holds two."""
    (tmp_path / "worker.py").write_text(SHARDED)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
    command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "127.0.0.1:0", str(tmp_path / "worker.py"), preset]
    path = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    model = real("mixtral", preset, num_local_experts=3).to(torch.bfloat16)
    planned = state_memory(weights(model, 2), Launch(2, "fsdp2", "bf16"))
    assert [planned.weights, planned.gradients, planned.optimizer] == found


def test_sharding_divides_and_experts_that_do_not_divide_cost():
    model = real("mixtral").to(torch.bfloat16)
    one, many = (state_memory(weights(model, 2), Launch(count, "fsdp2", "bf16")) for count in (1, 8))
    assert one.weights == 4 * sum(p.numel() for p in model.parameters())  # what trains is kept in float32
    assert one.optimizer == 8 * many.optimizer
    experts = [weight for weight in weights(model, 2) if weight.active < 1]
    eight, sixteen = (state_memory(experts, Launch(count, "fsdp2", "bf16")) for count in (8, 16))
    assert eight.weights == sixteen.weights  # eight experts fill eight of sixteen devices
    kept = state_memory(weights(model, 2), Launch(8, "fsdp2", "bf16", reshard=False))
    assert kept.gathered == many.gathered  # two layers: with the next one gathered ahead both are whole anyway
    deep = weights(real("mixtral", num_hidden_layers=3).to(torch.bfloat16), 2)
    assert (
        state_memory(deep, Launch(8, "fsdp2", "bf16", reshard=False)).gathered
        > state_memory(deep, Launch(8, "fsdp2", "bf16")).gathered
    )


def test_zero_is_deepspeeds_formula():
    """18 bytes a parameter shared out, and 4 for each of the largest layer (estimate_zero3_model_states_mem_needs)."""
    model = real("mixtral")
    count, layer = (sum(p.numel() for p in m.parameters()) for m in (model, decoder_layers(model)[0]))
    third = state_memory(weights(model), Launch(4, "zero3", "bf16"))
    assert third.total == pytest.approx(18 * count / 4 + 4 * layer, abs=4)
    second, first = (state_memory(weights(model), Launch(4, f"zero{stage}", "bf16")) for stage in (2, 1))
    assert second.weights == 2 * count + count and second.gradients == count and second.optimizer == 2 * count
    assert first.gradients == 4 * count and first.optimizer == 2 * count


# Activations


def saved_bytes(model, inputs):
    """What autograd saves in a real forward of the model without its head."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model.model(**inputs, use_cache=False)
    assert output.last_hidden_state.requires_grad
    return sum(size for size, _ in saved.values())


def padded(batch=2, length=24):
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, -3:] = 0
    return {"input_ids": torch.arange(batch * length).reshape(batch, length) % 100 + 3, "attention_mask": mask}


def planned_activations(family, preset, **settings):
    changes = settings.pop("changes", {})
    with FakeTensorMode():
        model = AutoModelForCausalLM.from_config(tiny_config(family, **changes), dtype=torch.bfloat16).train()
        set_trainable(model, preset)
        return activation_memory(model, batch=2, length=24, **settings)


@pytest.mark.parametrize("preset", ["all", "last_moe_layer"])
@pytest.mark.parametrize("family", FAMILIES)
def test_activations_are_what_a_real_forward_saves(family, preset):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(family), dtype=torch.bfloat16).train()
    set_trainable(model, preset)
    assert planned_activations(family, preset) == pytest.approx(saved_bytes(model, padded()), rel=0.02)


def test_checkpointed_activations_are_inputs_and_one_layer():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config("mixtral"), dtype=torch.bfloat16).train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    kept = saved_bytes(model, padded())  # a checkpoint shows hooks around it what it keeps, not what is saved inside
    shallow, deep = (planned_activations("mixtral", "all", changes={"num_hidden_layers": count}) for count in (4, 5))
    found = planned_activations("mixtral", "all", checkpointing=True)
    assert found == pytest.approx(kept + (deep - shallow), rel=0.02)
    assert found < planned_activations("mixtral", "all")


def test_activations_in_float32_double_the_narrow_ones():
    narrow, wide = (planned_activations("mixtral", "all", itemsize=size) for size in (2, 4))
    assert 1.2 * narrow < wide < 2 * narrow


def test_logits_are_bounded_by_one_chunk():
    assert logits_memory(10, 1000, itemsize=2) == 10 * 1000 * 14
    assert logits_memory(900, 128_000, itemsize=2) == logits_memory(66, 128_000, itemsize=2) < 120e6


# Steps


@pytest.mark.parametrize("rows, accumulation, epochs", [(10, 2, 3), (16, 4, 1), (3, 4, 2)])
def test_steps_and_forwards_are_those_of_a_real_training(tmp_path, rows, accumulation, epochs):
    data = Dataset.from_dict(
        {"input_ids": [[4 + i % 5, 5, 6] for i in range(rows)], "label": [i % 2 for i in range(rows)]}
    )
    args = MoECalArguments(
        str(tmp_path), objective="robust", gradient_accumulation_steps=accumulation, num_train_epochs=epochs,
        per_device_train_batch_size=2, robust_warmup_ratio=0.5, use_cpu=True, report_to="none", disable_tqdm=True,
        save_strategy="no",
    )  # fmt: skip
    model = tiny_model("mixtral", classifier=True)
    forwards = []
    model.register_forward_hook(lambda *_: forwards.append(1))
    trainer = MoECalTrainer(model=model, args=args, train_dataset=data)
    trainer.train()
    planned = plan_batch(args, devices=1, rows=rows)
    assert planned.steps == trainer.state.global_step
    assert planned.examples == 2 * accumulation
    batches = epochs * -(-rows // 2)
    windows = planned.robust_steps * planned.extra_forwards
    assert batches < len(forwards) <= batches + windows  # the last window of an epoch may be shorter
    if rows % (2 * accumulation) == 0:
        assert len(forwards) == batches + windows


def test_no_extra_forwards_for_a_mean():
    args = MoECalArguments("out", objective="erm", gradient_accumulation_steps=8, max_steps=10, use_cpu=True)
    planned = plan_batch(args, devices=4, rows=None)
    assert (planned.extra_forwards, planned.steps, planned.robust_steps, planned.examples) == (0, 10, 0, 256)


# Launch configurations


@pytest.mark.parametrize(
    "name, expected",
    [
        ("ddp", Launch(8, "ddp", "bf16")),
        ("fsdp2_lora", Launch(8, "fsdp2", "bf16")),
        ("fsdp2_full", Launch(8, "fsdp2", "bf16")),
        ("zero3", Launch(8, "zero3", "bf16")),
    ],
)
def test_the_shipped_configurations(name, expected):
    assert read_launch(ACCELERATE / f"{name}.yaml") == expected


def test_every_configuration_is_tested():
    assert {path.stem for path in ACCELERATE.glob("*")} == {"ddp", "fsdp2_lora", "fsdp2_full", "zero3"}


@pytest.mark.parametrize("name, kind", [("fsdp2_lora", "FULL"), ("fsdp2_full", "SHARDED")])
def test_accelerate_launch_hands_fsdp_over_as_written(monkeypatch, name, kind):
    """From the file through the launcher's environment to the plugin that a training process makes."""
    arguments = launch_command_parser().parse_args(["--config_file", str(ACCELERATE / f"{name}.yaml"), "script.py"])
    arguments, _, _ = _validate_launch_command(arguments)
    for key, value in prepare_multi_gpu_env(arguments).items():
        if key.startswith(("FSDP_", "ACCELERATE_")):
            monkeypatch.setenv(key, value)
    plugin = FullyShardedDataParallelPlugin()
    assert os.environ["ACCELERATE_USE_FSDP"] == "true" and os.environ["ACCELERATE_MIXED_PRECISION"] == "bf16"
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert plugin.cpu_ram_efficient_loading and not plugin.activation_checkpointing
    assert plugin.state_dict_type.name == f"{kind}_STATE_DICT"
    model = tiny_model("qwen3_moe")
    plugin.set_auto_wrap_policy(model)
    assert plugin.auto_wrap_policy.keywords["transformer_layer_cls"] == {type(decoder_layers(model)[0])}


def changed(tmp_path, name, **changes):
    content = yaml.safe_load((ACCELERATE / f"{name}.yaml").read_text())
    for key, value in changes.items():
        section = content["fsdp_config"] if key.startswith("fsdp_") else content.get("deepspeed_config", content)
        section = content if key in content or key == "num_gpus" else section
        section.pop(key, None)
        if value is not None:
            section[key] = value
    path = tmp_path / "launch.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "qwen3_moe", "gpt_oss"])
def test_leaf_modules_of_zero3_are_named_as_the_models_have_them(tmp_path, family):
    model = AutoModelForCausalLM.from_config(tiny_config(family))
    (kind,) = {type(layer.module).__name__ for layer in find_moe_layers(model)}
    assert get_module_class_from_name(model, kind) is not None  # as accelerate looks for it
    assert kind in re.findall(r"\w+Experts", (ACCELERATE / "zero3.yaml").read_text())
    assert read_launch(changed(tmp_path, "zero3", deepspeed_moe_layer_cls_names=kind)).sharding == "zero3"


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("ddp", {"num_gpus": 2}, "unknown keys"),
        ("fsdp2_lora", {"fsdp_reshard": True}, "did you mean 'fsdp_reshard_after_forward'"),
        ("fsdp2_lora", {"fsdp_version": None}, "fsdp_version: 2"),
        ("fsdp2_lora", {"fsdp_version": 1}, "fsdp_version: 2"),
        ("fsdp2_full", {"fsdp_offload_params": True}, "offloading"),
        ("zero3", {"zero3_stage": 3}, "accelerate would ignore"),
        ("zero3", {"offload_param_device": "cpu"}, "offloading"),
        ("zero3", {"deepspeed_config_file": "ds.json"}, "deepspeed_config_file"),
        ("ddp", {"distributed_type": "MEGATRON_LM"}, "a plan knows"),
    ],
)
def test_wrong_configurations(tmp_path, name, changes, message):
    with pytest.raises(ValueError, match=message):
        read_launch(changed(tmp_path, name, **changes))


def test_no_configuration(tmp_path):
    with pytest.raises(ValueError, match="recipes/accelerate"):
        read_launch(tmp_path / "absent.yaml")


# The plan


def recipe(folder, config=None, **changes):
    (config or tiny_config("mixtral")).save_pretrained(folder / "model")  # and no weights
    arguments = {"output_dir": str(folder / "out"), "report_to": "none", **changes.pop("arguments", {})}
    return Recipe(model=str(folder / "model"), **{"max_length": 16, "arguments": arguments, **changes})


def test_a_committee_takes_the_memory_of_its_members(tmp_path):
    one, four = (make_plan(recipe(tmp_path, arguments={"readout_members": count})) for count in (1, 4))
    assert four.memory.optimizer == 4 * one.memory.optimizer and four.counts == one.counts
    assert four.lines()[1].startswith("method    recommended: objective='robust_filtered', eta=1.0")


def test_what_a_launch_excludes_is_planned_without(tmp_path):
    plan = make_plan(recipe(tmp_path), launch=Launch(2, "fsdp2"))
    assert "fell back to readout='native', readout_members=1, since experts that run again" in plan.method
    assert (
        plan.memory.optimizer
        == make_plan(recipe(tmp_path, arguments={"readout_members": 1}), launch=Launch(2, "fsdp2")).memory.optimizer
    )


def test_plan_from_a_config_alone(tmp_path):
    asked = {"task": "lm", "train": "last_moe_layer", "gradient_accumulation_steps": 4, "bf16": True}
    plan = make_plan(recipe(tmp_path, arguments=asked, dtype="bfloat16"), launch=Launch(2, "fsdp2"), rows=1000)
    model = real("mixtral", "last_moe_layer")
    assert plan.counts.total == sum(p.numel() for p in model.parameters())
    assert plan.counts.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert plan.launch == Launch(2, "fsdp2", "bf16")
    assert [layer.name for layer in plan.layers] == [layer.name for layer in find_moe_layers(model)]
    assert (plan.batch.examples, plan.batch.extra_forwards, plan.batch.steps) == (64, 3, 48)
    assert plan.memory.activations == planned_activations_of(plan) and plan.memory.logits == 8 * 16 * 128 * 14
    text = "\n".join(plan.lines())
    assert "64 examples" in text and "train=last_moe_layer" in text and "8 experts of which a token uses 2" in text
    assert not (tmp_path / "out").exists()


def test_what_judging_a_token_asks_of_the_experts(tmp_path):
    def asked(**changes):
        return make_plan(recipe(tmp_path, arguments={"task": "lm", "train": "last_moe_layer", **changes})).asked

    model = real("mixtral", "last_moe_layer")
    experts = model.model.layers[-1].mlp.experts
    each = sum(p.numel() for p in experts.parameters()) / 8 + model.lm_head.weight.numel()
    idle = 6 / 8 * sum(p.numel() for layer in model.model.layers for p in layer.mlp.experts.parameters())
    active = sum(p.numel() for p in model.parameters()) - idle
    for settings, count in [({}, 8), ({"readout_experts": 3}, 3), ({"readout_experts": "auto"}, 8)]:
        found = asked(readout="soft_mixture", **settings)
        assert found.experts == count and found.forwards == pytest.approx(count * each / active, rel=1e-6)
        assert found.at_most == ("auto" in settings.values())
    assert asked(readout="mixture").experts == asked(objective="robust_filtered").experts == 2
    assert asked(objective="erm") is None
    plan = make_plan(recipe(tmp_path, arguments={"task": "lm", "train": "all", "readout": "soft_mixture"}))
    assert "each judged token asks 8 experts" in "\n".join(plan.lines()) and plan.to_dict()["asked"]["experts"] == 8


def planned_activations_of(plan):
    with FakeTensorMode():
        model = AutoModelForCausalLM.from_config(tiny_config("mixtral"), dtype=torch.bfloat16).train()
        set_trainable(model, "last_moe_layer")
        return activation_memory(model, batch=8, length=16)


def test_checkpointing_is_read_from_the_recipe_and_the_launch(tmp_path):
    plain = make_plan(recipe(tmp_path, arguments={"method": "erm"}))
    asked = make_plan(recipe(tmp_path, arguments={"method": "erm"}), overrides=["--activation_checkpointing", "True"])
    launched = make_plan(recipe(tmp_path, arguments={"method": "erm"}), launch=Launch(1, "fsdp2", checkpointing=True))
    assert asked.memory.activations == launched.memory.activations < plain.memory.activations


def test_a_dense_model_trains_but_not_filtered(tmp_path):
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0
    )
    plan = make_plan(recipe(tmp_path, config, arguments={"objective": "robust"}))
    assert plan.layers == [] and "no MoE layer" in plan.unsupported and plan.counts.active == plan.counts.total
    with pytest.raises(ValueError, match="no MoE layer"):
        make_plan(recipe(tmp_path, config, arguments={"objective": "robust_filtered"}))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"max_length": None}, "max_length"),
        ({"config": ViTConfig()}, "neither a sequence classifier nor a causal language model for ViTConfig"),
        ({"arguments": {"eta": -1.0}}, "eta"),
    ],
)
def test_plans_that_cannot_be(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        make_plan(recipe(tmp_path, **changes))


def test_plan_from_the_shell(tmp_path, capsys):
    tiny_config("mixtral").save_pretrained(tmp_path / "model")
    Dataset.from_dict({"text": ["good"] * 21, "label": [1] * 21}).to_parquet(str(tmp_path / "train.parquet"))
    content = {
        "model": str(tmp_path / "model"),
        "data": {"train": {"path": str(tmp_path / "train.parquet")}, "max_length": 16},
        "output_dir": str(tmp_path / "out"),
        "per_device_train_batch_size": 2,
        "num_train_epochs": 1,
        "report_to": "none",
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    command = ["plan", "--config", str(tmp_path / "recipe.yaml")]
    assert main([*command, "--json", "--gradient_accumulation_steps", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["batch"]["steps"], found["batch"]["examples"], found["batch"]["extra_forwards"]) == (6, 4, 1)
    assert found["memory"]["total"] == sum(size for name, size in found["memory"].items() if name != "total")
    assert main([*command, "--accelerate", str(ACCELERATE / "fsdp2_lora.yaml"), "--rows", "800"]) == 0
    assert "FSDP2, 8 devices" in capsys.readouterr().out
    assert main([*command, "--accelerate", "absent.yaml"]) == 2
    assert "No accelerate configuration" in capsys.readouterr().err
    assert main([*command, "--etta", "2"]) == 2
