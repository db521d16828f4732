import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    MixtralForSequenceClassification,
    Qwen2MoeConfig,
    Qwen2MoeForSequenceClassification,
)

from hf_moecal.model.freezing import set_trainable
from hf_moecal.model.prefix_cache import PrefixCache
from hf_moecal.model.state_store import StateStore
from tests.tiny_moe import tiny_model


SETTINGS = dict(
    vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
    num_key_value_heads=2, num_labels=3, pad_token_id=0, initializer_range=0.3,
)  # fmt: skip


def mixtral(**changes):
    torch.manual_seed(0)
    model = MixtralForSequenceClassification(MixtralConfig(**{**SETTINGS, "num_local_experts": 4, **changes}))
    set_trainable(model, "last_moe_layer")
    return model


def mixed():
    """Dense layers first, a shared expert in the last: the demo's architecture."""
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        **SETTINGS, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, shared_expert_intermediate_size=1,
        mlp_only_layers=[0, 1],
    )  # fmt: skip
    model = Qwen2MoeForSequenceClassification(config)
    set_trainable(model, "last_moe_layer")
    return model


BATCHES = {
    "right": {"input_ids": [[5, 6, 7, 8], [9, 3, 0, 0]], "attention_mask": [[1, 1, 1, 1], [1, 1, 0, 0]]},
    "left": {"input_ids": [[5, 6, 7, 8], [0, 0, 9, 3]], "attention_mask": [[1, 1, 1, 1], [0, 0, 1, 1]]},
    "no mask": {"input_ids": [[5, 6, 7, 8], [9, 3, 2, 1]]},
}


def batch(name):
    return {key: torch.tensor(value) for key, value in BATCHES[name].items()}


@pytest.mark.parametrize("build", [mixtral, mixed])
@pytest.mark.parametrize("name", BATCHES)
def test_logits_and_gradients_are_those_of_the_whole_model(tmp_path, build, name):
    model, inputs = build(), batch(name)
    before = {n: type(m).forward for n, m in model.named_modules()}
    whole = model(**inputs).logits
    whole.square().sum().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    for _ in range(2):
        model.zero_grad()
        with PrefixCache(model, tmp_path) as cache, cache.replaying(inputs) as short:
            assert short["input_ids"].shape == (2, 1)
            logits = model(**short).logits
            logits.square().sum().backward()
        torch.testing.assert_close(logits, whole, rtol=1e-5, atol=1e-6)
        for name, parameter in model.named_parameters():
            if name in expected:
                torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)
    assert all("forward" not in vars(m) and type(m).forward is before[n] for n, m in model.named_modules())


def language_model():
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**SETTINGS, num_local_experts=4))
    set_trainable(model, "last_moe_layer")
    return model


@pytest.mark.parametrize("name", BATCHES)
def test_judged_tokens_of_a_language_model(tmp_path, name):
    model, inputs, tokens = language_model(), batch(name), torch.tensor([1, 3, 6])
    whole = model(**inputs).logits.flatten(0, 1)[tokens]
    whole.square().sum().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    for computed in (3, 0):
        model.zero_grad()
        with PrefixCache(model, tmp_path) as cache, cache.replaying(inputs, tokens) as short:
            assert short["input_ids"].shape == (3, 1) and cache.computed == computed
            logits = model(**short).logits[:, 0]
            logits.square().sum().backward()
        torch.testing.assert_close(logits, whole, rtol=1e-5, atol=1e-6)
        for parameter_name, gradient in expected.items():
            parameter = model.get_parameter(parameter_name)
            assert (parameter.grad - gradient).abs().max() <= 1e-5 * gradient.abs().max()
    with PrefixCache(model, tmp_path) as cache, pytest.raises(ValueError, match="language model pools no token"):
        with cache.replaying(inputs):
            pass


@pytest.mark.parametrize("task", ["classification", "sequence", "token"])
@pytest.mark.parametrize("objective", ["erm", "filtered"])
def test_trained_gradients_are_those_without_the_cache(tmp_path, task, objective):
    from tests.training.helpers import OBJECTIVES, TASKS, arguments, relative_error, trained_gradients

    build, data, settings = TASKS[task]
    found = []
    for cache in (None, str(tmp_path / "prefix"), str(tmp_path / "prefix")):
        changes = dict(train="last_moe_layer", prefix_cache=cache, **settings, **OBJECTIVES[objective])
        found.append(trained_gradients(build(), data(), arguments(tmp_path, **changes))[0])
    assert relative_error(found[1], found[0]) <= 1e-5 and relative_error(found[2], found[0]) <= 1e-5


def test_outside_the_block_the_model_is_whole(tmp_path):
    model, inputs = mixtral().eval(), batch("right")
    expected = model(**inputs).logits
    with PrefixCache(model, tmp_path) as cache:
        with cache.replaying(inputs):
            pass
        assert torch.equal(model(**inputs).logits, expected)


def test_lower_precision_is_close_and_kept_apart(tmp_path):
    model, inputs = mixtral().eval(), batch("right")
    expected = model(**inputs).logits
    with PrefixCache(model, tmp_path, dtype="bfloat16") as cache, cache.replaying(inputs) as short:
        error = (model(**short).logits - expected).abs().max() / expected.abs().max()
    assert 0 < error < 0.1
    with PrefixCache(model, tmp_path) as cache, cache.replaying(inputs) as short:
        assert cache.computed == 2  # not the states of the other precision
        torch.testing.assert_close(model(**short).logits, expected, rtol=1e-5, atol=1e-6)


def test_other_weights_do_not_share_states(tmp_path):
    with PrefixCache(mixtral(), tmp_path) as cache, cache.replaying(batch("right")):
        assert cache.computed == 2
    with PrefixCache(mixtral(), tmp_path) as cache, cache.replaying(batch("right")):
        assert cache.computed == 0
    other = mixtral()
    with torch.no_grad():
        other.model.layers[0].self_attn.q_proj.weight[0, 0] += 1
    with PrefixCache(other, tmp_path) as cache, cache.replaying(batch("right")):
        assert cache.computed == 2


def test_fill_computes_once(tmp_path):
    sequences = [[5, 6, 7], [8, 9], [5, 6, 7], [1]]
    with PrefixCache(mixtral(), tmp_path) as cache:
        cache.fill(sequences, progress=False)
        assert cache.computed == 3
        cache.fill(sequences, progress=False)
        assert cache.computed == 3


def test_rows_that_end_in_the_padding_token(tmp_path):
    """The model reads the rightmost other token, also where the mask says that the last one is real."""
    model = mixtral().eval()
    inputs = {"input_ids": torch.tensor([[5, 6, 7], [8, 9, 0]]), "attention_mask": torch.ones(2, 3, dtype=torch.long)}
    with PrefixCache(model, tmp_path) as cache:
        cache.fill([[5, 6, 7], [8, 9, 0]], progress=False)
        with cache.replaying(inputs) as short:
            replayed = model(**short).logits
        assert cache.computed == 2
    torch.testing.assert_close(replayed, model(**inputs).logits, rtol=1e-5, atol=1e-6)


def test_two_runs_share_a_folder_at_once(tmp_path):
    first, other = mixtral(), mixtral()
    with torch.no_grad():
        other.model.layers[0].self_attn.q_proj.weight[0, 0] += 1
    expected = [model.eval()(**batch("right")).logits for model in (first, other)]
    with PrefixCache(first, tmp_path) as one, PrefixCache(other, tmp_path) as two:
        for cache, model, logits in ((one, first, expected[0]), (two, other, expected[1]), (one, first, expected[0])):
            with cache.replaying(batch("right")) as short:
                torch.testing.assert_close(model(**short).logits, logits, rtol=1e-5, atol=1e-6)


def test_bf16_autocast_of_the_trainer_is_no_error(tmp_path):
    from hf_moecal import MoECalTrainer
    from tests.training.helpers import arguments, classification_data, classification_model, collate

    settings = dict(train="last_moe_layer", prefix_cache=str(tmp_path / "p"), bf16=True, objective="robust")
    trainer = MoECalTrainer(
        model=classification_model(), args=arguments(tmp_path, **settings), train_dataset=classification_data(),
        data_collator=collate,
    )  # fmt: skip
    assert trainer.train().global_step == 1


def test_what_cannot_be_replayed_is_refused(tmp_path):
    unfrozen = mixtral()
    unfrozen.model.layers[0].self_attn.q_proj.weight.requires_grad_(True)
    first = mixtral(num_hidden_layers=1)
    for model, message in [
        (unfrozen, "1 of their parameters train"),
        (mixtral(attention_dropout=0.1), "must not be random, but MixtralAttention has {'attention_dropout': 0.1}"),
        (mixtral(router_jitter_noise=0.1), "has {'jitter_noise': 0.1}"),
        (first, "nothing before it is worth caching"),
    ]:
        with pytest.raises(ValueError, match=message):
            PrefixCache(model, tmp_path)
    with pytest.raises(ValueError, match="must name a floating-point type such as 'bfloat16'"):
        PrefixCache(mixtral(), tmp_path, dtype="int8")
    with PrefixCache(mixtral(), tmp_path) as cache, pytest.raises(ValueError, match="has \\['position_ids'\\]"):
        with cache.replaying({**batch("right"), "position_ids": torch.arange(4)[None]}):
            pass


def test_a_last_block_before_the_last_layer_is_refused(tmp_path):
    config = Qwen2MoeConfig(
        **{**SETTINGS, "num_hidden_layers": 4}, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
        shared_expert_intermediate_size=8, mlp_only_layers=[0, 3],
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen2MoeForSequenceClassification(config)
    set_trainable(model, "last_moe_layer")
    with PrefixCache(model, tmp_path) as cache, pytest.raises(ValueError, match="changes its logits by"):
        with cache.replaying(batch("right")):
            pass


def store(folder):
    return StateStore(folder, dtype=torch.float32)


def test_processes_share_a_store(tmp_path):
    one, two = store(tmp_path), store(tmp_path)
    one.put("x", torch.arange(3.0))
    assert two.get("x") is None
    one.flush()
    two.refresh()
    assert torch.equal(two.get("x"), torch.arange(3.0))
    two.put("y", torch.zeros(0))
    one.put("z", torch.ones(2))
    two.close()
    one.close()
    third = store(tmp_path)
    assert third.get("y").shape == (0,) and third.get("z").tolist() == [1, 1]
    third.close()
    assert len(list(tmp_path.iterdir())) == 4  # a store that stores nothing leaves nothing


def test_damaged_bytes_count_as_absent(tmp_path):
    first = store(tmp_path)
    first.put("x", torch.ones(64))
    first.put("y", torch.ones(64))
    first.close()
    (states,) = tmp_path.glob("states-*")
    with open(states, "r+b") as file:
        file.seek(10)
        file.write(b"\xff")
    again = store(tmp_path)
    assert again.get("x") is None and again.get("y").sum() == 64
    again.put("x", torch.zeros(2))
    assert again.get("x").tolist() == [0, 0]
    again.close()


def test_a_cut_index_line_is_not_taken_for_whole(tmp_path):
    first = store(tmp_path)
    first.put("x", torch.ones(4))
    first.put("y", torch.ones(4))
    first.close()
    (index,) = tmp_path.glob("index-*")
    index.write_bytes(index.read_bytes()[:-7])
    again = store(tmp_path)
    assert again.get("x") is not None and again.get("y") is None


def test_a_killed_writer_leaves_a_usable_store(tmp_path):
    script = f"""
        import torch
        from pathlib import Path
        from hf_moecal.model.state_store import StateStore
        store = StateStore(Path({str(tmp_path)!r}), dtype=torch.float32)
        for i in range(10**6):
            store.put(str(i), torch.full((500,), float(i)))
            if i == 200:
                store.flush()
                print("flushed", flush=True)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"flushed\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    again = store(tmp_path)
    assert len(again) > 200
    for key in list(again._records):
        found = again.get(key)
        assert found is None or torch.equal(found, torch.full((500,), float(key)))
    assert all(again.get(str(i)) is not None for i in range(201))


@pytest.mark.parametrize(("family", "window"), [("mixtral", 3), ("gpt_oss", None)])
def test_windows_and_eager_attention(tmp_path, family, window):
    """Attention weights come beside the states, and are nobody's input."""
    changes = dict(sliding_window=window) if window else {}
    model, inputs = tiny_model(family, classifier=True, num_hidden_layers=3, **changes), batch("right")
    set_trainable(model, "last_moe_layer")
    expected = model(**inputs).logits
    for computed in (2, 0):
        with PrefixCache(model, tmp_path) as cache, cache.replaying(inputs) as short:
            torch.testing.assert_close(model(**short).logits, expected, rtol=1e-5, atol=1e-6)
            assert cache.computed == computed


@pytest.mark.parametrize("mask", [[[1, 0, 1, 1], [1, 1, 1, 1]], [[0, 1, 0, 1], [1, 1, 0, 1]], [[1, 1, 1, 0]] * 2])
def test_a_mask_with_holes_is_part_of_the_key(tmp_path, mask):
    model = mixtral().eval()
    ids, mask = torch.tensor([[5, 6, 7, 8], [5, 9, 7, 8]]), torch.tensor(mask)
    with PrefixCache(model, tmp_path) as cache:
        for row in ids:
            cache.fill([row.tolist(), *(row[kept.bool()].tolist() for kept in mask)], progress=False)
        for inputs in ({"input_ids": ids, "attention_mask": mask}, {"input_ids": ids}):
            expected = model(**inputs).logits
            with cache.replaying(inputs) as short:
                torch.testing.assert_close(model(**short).logits, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("first", ["prefix", "block"])
def test_parts_in_different_precisions(tmp_path, first):
    """A block in float32 behind a prefix in bfloat16, a head in float32 behind a block in bfloat16."""
    model = mixtral()
    model.model.to(torch.bfloat16)
    if first == "prefix":
        model.model.layers[-1].mlp.float().register_forward_pre_hook(lambda m, args: (args[0].float(),))
    model.score.register_forward_pre_hook(lambda m, args: (args[0].float(),))
    inputs, found = batch("right"), []
    whole = model(**inputs).logits
    whole.square().sum().backward()
    expected = model.score.weight.grad.clone()
    for _ in range(2):
        model.zero_grad()
        with PrefixCache(model, tmp_path) as cache, cache.replaying(inputs) as short:
            logits = model(**short).logits
            logits.square().sum().backward()
            found.append(logits)
        torch.testing.assert_close(logits, whole, rtol=2e-2, atol=2e-2)  # other shapes round otherwise
        torch.testing.assert_close(model.score.weight.grad, expected, rtol=2e-2, atol=2e-2)
    assert torch.equal(*found), "what is stored is not what was computed"


@pytest.mark.parametrize("task", ["classification", "sequence"])
@pytest.mark.parametrize("changes", [
    dict(objective="erm"), dict(objective="robust_filtered", tau_regret=0.4),
    dict(objective="robust", readout="soft_mixture"), dict(objective="robust", readout_members=2),
])  # fmt: skip
def test_layers_are_not_checkpointed_while_they_are_replayed(tmp_path, task, changes):
    """The backward pass would run them when nothing is replayed any more."""
    from tests.training.helpers import TASKS, arguments, relative_error, trained_gradients

    build, data, settings = TASKS[task]
    found = []
    for own in ({}, dict(prefix_cache=str(tmp_path / "prefix"), activation_checkpointing=True)):
        args = arguments(tmp_path, train="last_moe_layer", **{**settings, **changes}, **own)
        gradients, trainer = trained_gradients(build(), data(), args)
        found.append(gradients)
    assert relative_error(found[1], found[0]) <= 1e-5
    assert all(m.gradient_checkpointing for m in trainer.model.modules() if hasattr(m, "gradient_checkpointing"))


def test_rows_with_holes_are_not_filled_and_not_predicted_otherwise_than_trained():
    from datasets import Dataset

    from hf_moecal.tasks.targets import real_tokens

    columns = {"input_ids": [[0, 5, 6], [5, 6, 7]], "attention_mask": [[0, 1, 1], [1, 0, 1]]}
    assert real_tokens(Dataset.from_dict(columns), broken="drop") == [[5, 6]]
    with pytest.raises(ValueError, match="Row 1 has an `attention_mask` that leaves out tokens between others"):
        real_tokens(Dataset.from_dict(columns))
