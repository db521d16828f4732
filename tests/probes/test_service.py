"""A sample of families as they run in service: mixtures behind a pool of threads, and decoding with a cache."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import StaticCache

from hf_moecal import find_moe_layers, probe_experts
from hf_moecal.readouts.mixture import Readout
from hf_moecal.readouts.recorded import attach_readout
from tests.rerouting import brute_force
from tests.tiny_moe import tiny_batch, tiny_model


SAMPLE = (
    "mixtral", "qwen3_moe", "gpt_oss", "olmoe", "deepseek_v3", "flex_olmo", "gemma4_text", "jamba", "lfm2_moe",
    "qwen3_next", "granitemoehybrid", "llama4_text",
)  # fmt: skip
FAST = ("mixtral", "jamba")
FAMILIES = [pytest.param(name, marks=[pytest.mark.slow] * (name not in FAST)) for name in SAMPLE]


@pytest.mark.parametrize("model_type", FAMILIES)
@torch.no_grad()
def test_a_pool_of_threads(model_type: str) -> None:
    model = tiny_model(model_type)
    attach_readout(model, Readout("mixture"))
    given = [{**tiny_batch(length=3 + i % 3, seed=i), "use_cache": False, "logits_to_keep": 1} for i in range(9)]
    answers = [model(**batch).logits for batch in given]

    @torch.no_grad()
    def call(batch: dict) -> torch.Tensor:
        return model(**batch).logits

    with ThreadPoolExecutor(3) as pool:
        for found, answer in zip(pool.map(call, given), answers, strict=True):
            assert torch.equal(found, answer)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("model_type", FAMILIES)
@torch.no_grad()
def test_decoding_with_a_cache(model_type: str, static: bool) -> None:
    model, ids = tiny_model(model_type), tiny_batch()["input_ids"]
    kind = {"past_key_values": StaticCache(config=model.config, max_cache_len=16)} if static else {}
    cache = model(input_ids=ids[:, :-1], use_cache=True, **kind).past_key_values
    with probe_experts(model) as probe:
        step = model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True)
    found, last = probe.expert_logits(torch.tensor([0, 1])), torch.tensor([8, 17])
    whole = {"input_ids": ids, "use_cache": False}
    truth = brute_force(model, find_moe_layers(model)[-1], whole, last, probe.record.expert_ids)
    torch.testing.assert_close(step.logits[:, -1], model(**whole).logits[:, -1], rtol=1e-4, atol=1e-4)
    assert (found - truth).abs().max() <= 5e-5 * truth.abs().max()
    assert cache.get_seq_length() == 9  # the replays left it alone
