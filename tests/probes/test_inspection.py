"""One text under the probe."""

from __future__ import annotations

import json

import pytest
import torch

from hf_moecal import probe_experts
from hf_moecal.probes.inspection import format_probe, probe_text
from tests.tiny_moe import tiny_model


class Letters:
    """A tokenizer of one token per letter."""

    def __call__(self, text: str, return_tensors: str) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor([[ord(letter) for letter in text]])}

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(index) for index in ids)


@torch.no_grad()
def test_a_causal_model_is_probed_where_it_predicts_the_last_token() -> None:
    model = tiny_model("qwen3_moe").train()
    report = probe_text(model, Letters(), "moecal")
    assert all(module.training for module in model.modules())
    assert report["label"] == "l" and [layer["index"] for layer in report["layers"]] == [0, 1]
    assert json.loads(json.dumps(report)) == report
    ids = torch.tensor([[ord(letter) for letter in "moecal"]])
    with probe_experts(model.eval()) as probe:
        probs = model(input_ids=ids).logits[0, -2].softmax(-1)
    assert report["confidence"] == pytest.approx(float(probs.max()), rel=1e-5)
    assert report["prediction"] == chr(int(probs.argmax()))
    last, token = report["layers"][-1], torch.tensor([4])
    assert last["regret"] == pytest.approx(float(probe.regret(token, ids[0, -1:])), abs=1e-6)
    assert [expert["id"] for expert in last["experts"]] == probe.record.expert_ids[4].tolist()
    alone = probe.expert_logits(token)[0].softmax(-1).max(-1)
    assert [expert["confidence"] for expert in last["experts"]] == pytest.approx(alone.values.tolist(), rel=1e-5)
    table = format_probe(report).splitlines()
    assert len(table) == 3 + 2 * 2 and "the label is 'l'" in table[0]


@torch.no_grad()
def test_a_classifier_names_its_labels() -> None:
    model = tiny_model("mixtral", classifier=True)
    model.config.id2label = {0: "bad", 1: "fair", 2: "good"}
    report = probe_text(model, Letters(), "moecal", layer=-1)
    assert report["prediction"] in {"bad", "fair", "good"}
    assert report["label"] is None and report["layers"][0]["regret"] is None
    assert len(report["layers"]) == 1
    labelled = probe_text(model, Letters(), "moecal", label=2, layer=-1)
    assert labelled["label"] == "good" and labelled["layers"][0]["regret"] >= 0


def test_one_token_is_too_short_for_a_causal_model() -> None:
    with pytest.raises(ValueError, match="two tokens"):
        probe_text(tiny_model("mixtral"), Letters(), "m")
