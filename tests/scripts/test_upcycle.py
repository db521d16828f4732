"""Upcycling: exact copies, experts that differ as documented, plain checkpoints, and refusals."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from hf_moecal import find_moe_layers
from tests.real_data import dense_model, domain, load_script, moe_model


upcycle = load_script("upcycle")

WORDS = "the film was a slow and tender story about two brothers who never speak".split()
LAYERS = 4


def tiny_dense(**changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    fields = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS}
    fields |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5}
    fields |= {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}, "tie_word_embeddings": True}
    fields |= {"initializer_range": 0.3, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 1}
    return LlamaForCausalLM(LlamaConfig(**fields | changes)).eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: number for number, word in enumerate(["<unk>", "<pad>", "<s>", *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", pad_token="<pad>", bos_token="<s>")


@pytest.fixture
def inputs() -> list[dict[str, torch.Tensor]]:
    texts = [" ".join(WORDS[start : start + length]) for start, length in ((0, 5), (3, 9), (6, 2), (1, 12), (4, 7))]
    return upcycle.batches(texts, tiny_tokenizer(), size=2)


def sparse(dense: LlamaForCausalLM, *, noise: float = 0.0, seed: int = 0, **shape) -> torch.nn.Module:
    config = upcycle.moe_config(dense.config, **shape)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    upcycle.fill(model, dense, noise=noise, moe_layers=shape.get("moe_layers", 1), seed=seed)
    return model


# ---------------------------------------------------------------- exactness


@pytest.mark.parametrize("family", upcycle.FAMILIES)
@pytest.mark.parametrize(("experts", "top_k", "moe_layers"), [(4, 2, 1), (3, 1, 2), (2, 2, LAYERS)])
@pytest.mark.parametrize("changes", [{}, {"head_dim": 16, "tie_word_embeddings": False}])
def test_copies_compute_what_the_dense_model_does(family, experts, top_k, moe_layers, changes, inputs):
    dense = tiny_dense(**changes)
    model = sparse(dense, family=family, experts=experts, top_k=top_k, moe_layers=moe_layers)
    for one in inputs:
        torch.testing.assert_close(model(**one).logits, dense(**one).logits, rtol=1e-5, atol=1e-5)


def test_only_the_qwen2_moe_prefix_is_dense():
    dense = tiny_dense()
    for family, first in (("mixtral", 0), ("qwen2_moe", LAYERS - 2)):
        model = sparse(dense, family=family, moe_layers=2)
        with_experts = [number for number, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "experts")]
        assert with_experts == list(range(first, LAYERS))
        assert len(find_moe_layers(model)) == LAYERS - first


@pytest.mark.parametrize("family", upcycle.FAMILIES)
def test_noise_scales_neurons_of_the_last_layers_only(family):
    dense = tiny_dense(intermediate_size=512)
    model = sparse(dense, family=family, noise=0.2, moe_layers=2)
    for number, layer in enumerate(model.model.layers):
        source = dense.model.layers[number].mlp
        if not hasattr(layer.mlp, "experts"):
            assert torch.equal(layer.mlp.down_proj.weight, source.down_proj.weight)
            continue
        for expert in range(4):
            gate, up = layer.mlp.experts.gate_up_proj[expert].chunk(2)
            assert torch.equal(gate, source.gate_proj.weight) and torch.equal(up, source.up_proj.weight)
        factors = layer.mlp.experts.down_proj / source.down_proj.weight
        if number < LAYERS - 2:
            assert torch.equal(layer.mlp.experts.down_proj, source.down_proj.weight.expand(4, -1, -1))
        else:
            torch.testing.assert_close(factors, factors[:, :1].expand_as(factors))  # one factor for each neuron
            assert factors[:, 0].mean().item() == pytest.approx(1, abs=0.02)
            assert factors[:, 0].std().item() == pytest.approx(0.2, abs=0.02)
            assert torch.corrcoef(factors[:, 0]).fill_diagonal_(0).abs().max() < 0.2  # each expert its own


def test_noise_makes_experts_differ_and_the_seed_decides(inputs):
    dense = tiny_dense()
    spread = {noise: upcycle.expert_spread(sparse(dense, noise=noise), inputs[0]) for noise in (0.0, 0.1, 0.4)}
    assert spread[0.0] < 1e-6 < 0.02 < spread[0.1] < spread[0.4]
    first, again, other = (sparse(dense, noise=0.1, seed=seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(
        first[f"model.layers.{LAYERS - 1}.mlp.gate.weight"], other[f"model.layers.{LAYERS - 1}.mlp.gate.weight"]
    )


@pytest.mark.parametrize("family", upcycle.FAMILIES)
def test_experts_and_router_train_and_the_shared_expert_stays_zero(family, inputs):
    model = sparse(tiny_dense(), family=family, noise=0.1).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for one in inputs:
        model(**one, labels=one["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    last = f"model.layers.{LAYERS - 1}.mlp"
    for name in ("experts.gate_up_proj", "experts.down_proj", "gate.weight"):
        assert not torch.equal(model.state_dict()[f"{last}.{name}"], before[f"{last}.{name}"])
    shared = [value for name, value in model.state_dict().items() if ".shared_expert." in name]
    assert len(shared) == (3 if family == "qwen2_moe" else 0) and not any(value.any() for value in shared)


# ---------------------------------------------------------------- checks


def test_perplexity_is_that_of_a_plain_loop(inputs):
    dense = tiny_dense()
    losses = []
    for one in inputs:
        for ids, mask in zip(one["input_ids"], one["attention_mask"], strict=True):
            ids = ids[mask.bool()]
            logs = dense(input_ids=ids[None]).logits[0].log_softmax(-1)
            losses += [-logs[place, token].item() for place, token in enumerate(ids[1:])]
    expected = math.exp(sum(losses) / len(losses))
    assert upcycle.perplexity(upcycle.logits_of(dense, inputs, "dense"), inputs) == pytest.approx(expected, rel=1e-4)


def test_a_wrong_copy_is_not_accepted(inputs, monkeypatch):
    fill = upcycle.fill

    def broken(model, dense, **options):
        fill(model, dense, **options)
        model.model.layers[0].mlp.experts.down_proj.data[0] *= 1.5

    monkeypatch.setattr(upcycle, "fill", broken)
    with pytest.raises(ValueError, match="without noise the logits differ"):
        upcycle.upcycle(tiny_dense(), inputs, noise=0.1, seed=0, family="mixtral", experts=4, top_k=2, moe_layers=1)


# ---------------------------------------------------------------- the command


@pytest.fixture
def dense_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "dense"
    tiny_dense().to(torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    pq.write_table(pa.table({"text": [" ".join(WORDS), " ".join(WORDS[3:])]}), tmp_path / "texts.parquet")
    return folder


def command(folder: Path, *options: str, target: str = "moe") -> int:
    texts = ["--texts", str(folder.parent / "texts.parquet")]
    return upcycle.main([str(folder), str(folder.parent / target), *texts, *options])


@pytest.mark.parametrize("family", upcycle.FAMILIES)
def test_checkpoint_is_a_plain_one(family, dense_folder: Path, capsys):
    assert command(dense_folder, "--layers", "3", "--experts", "3", "--family", family) == 0
    printed = capsys.readouterr().out
    assert "reloads as saved" in printed and "perplexity: dense" in printed and "cut to 3 of 4 layers" in printed
    folder = dense_folder.parent / "moe"
    assert {"config.json", "model.safetensors", "tokenizer.json", "upcycle.json"} <= {p.name for p in folder.iterdir()}
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert (model.config.model_type, model.config.num_hidden_layers, model.dtype) == (family, 3, torch.bfloat16)
    dense = upcycle.load_dense(dense_folder, layers=3)
    expected = sparse(dense, family=family, experts=3, noise=0.3).to(torch.bfloat16).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert AutoTokenizer.from_pretrained(folder)("the film").input_ids == tiny_tokenizer()("the film").input_ids
    head = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    assert head.config.pad_token_id == 1 and torch.equal(head.model.norm.weight, model.model.norm.weight)


def test_second_run_does_nothing_and_other_arguments_replace(dense_folder: Path, capsys):
    target = dense_folder.parent / "moe"
    assert command(dense_folder) == 0
    stamp = (target / "model.safetensors").stat().st_mtime_ns
    assert command(dense_folder) == 0
    assert "is there already" in capsys.readouterr().out
    assert (target / "model.safetensors").stat().st_mtime_ns == stamp
    assert command(dense_folder, "--noise", "0") == 0
    assert json.loads((target / "upcycle.json").read_text())["made_from"]["noise"] == 0
    assert sorted(path.name for path in target.parent.iterdir()) == ["dense", "moe", "texts.parquet"]


def test_a_killed_run_leaves_no_checkpoint(dense_folder: Path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(upcycle.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            command(dense_folder)
    assert not (dense_folder.parent / "moe").exists()
    assert command(dense_folder) == 0
    assert not (dense_folder.parent / ".moe.partial").exists()


def test_folders_of_others_are_never_overwritten(dense_folder: Path, capsys):
    assert command(dense_folder, target="dense") == 1
    assert "was not made by this script" in capsys.readouterr().err
    assert command(dense_folder) == 0
    tuned = AutoModelForCausalLM.from_pretrained(dense_folder.parent / "moe")
    tuned.model.norm.weight.data += 1
    tuned.save_pretrained(dense_folder.parent / "moe")
    for options in ([], ["--seed", "1"]):
        assert command(dense_folder, *options) == 1
        assert "was changed after this script made it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layers", "9"], "--layers 9: choose 1 to 4"),
        (["--moe-layers", "0"], "--moe-layers 0: choose 1 to 4"),
        (["--layers", "2", "--moe-layers", "3"], "--moe-layers 3: choose 1 to 2"),
        (["--experts", "1", "--top-k", "1"], "give at least 2 experts"),
        (["--top-k", "5"], "4 experts with top-k 5"),
        (["--noise", "-0.1"], "--noise -0.1: it is a standard deviation"),
        (["--texts", "nowhere.parquet"], "no sentences at nowhere.parquet: run scripts/fetch_data.py"),
    ],
)
def test_bad_arguments_are_one_sentence(options, message, dense_folder: Path, capsys):
    assert command(dense_folder, *options) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert message in line
    assert not (dense_folder.parent / "moe").exists()


def test_other_sources_are_refused(dense_folder: Path, tmp_path: Path, capsys):
    assert upcycle.main([str(tmp_path / "none"), str(tmp_path / "moe")]) == 1
    assert "no checkpoint at" in capsys.readouterr().err
    tiny_dense(attention_bias=True).save_pretrained(tmp_path / "biased")
    with pytest.raises(ValueError, match="give a dense 'llama' one without biases"):
        upcycle.load_dense(tmp_path / "biased")
    with pytest.raises(ValueError, match="Unknown family 'olmoe': choose from mixtral, qwen2_moe"):
        upcycle.moe_config(tiny_dense().config, family="olmoe")


# ---------------------------------------------------------------- the real model


@pytest.mark.slow
def test_real_checkpoint_has_the_dense_prefix_and_four_experts():
    folder = moe_model()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    dense = upcycle.load_dense(dense_model(), layers=15)
    texts = domain("movie", split="test")["text"].to_pylist()[:4]
    one = upcycle.batches(texts, AutoTokenizer.from_pretrained(folder))[0]
    real = one["attention_mask"].bool()
    with torch.no_grad():
        ours, theirs = (m.model(**one, output_hidden_states=True).hidden_states for m in (model, dense))
    for place in range(15):  # embeddings and what enters each of the fifteen layers
        difference = (ours[place] - theirs[place])[real].abs().max()
        assert difference <= 1e-5 * theirs[place][real].abs().max()
    assert upcycle.expert_spread(model, one) > 0.1
    assert model.config.num_local_experts == 4 and model.config.num_experts_per_tok == 2
