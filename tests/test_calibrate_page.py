"""The page on calibration runs as it stands, on a tiny model and files of its columns; nothing is published."""

import re
from pathlib import Path

import torch
from datasets import Dataset
from transformers import MixtralConfig, MixtralForSequenceClassification

import hf_moecal.hub
from tests.cli.helpers import WORDS, sentences, tokenizer


PAGE = Path(__file__).parents[1] / "recipes" / "calibrate.md"


def test_the_page_runs(tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    MixtralForSequenceClassification(config).save_pretrained(tmp_path / "my-checkpoint")
    tokenizer().save_pretrained(tmp_path / "my-checkpoint")
    for name in ("validation", "test"):
        rows = [{**row, "language": "en" if i % 3 else "de"} for i, row in enumerate(sentences("film", 120))]
        Dataset.from_list(rows).remove_columns(["id", "split"]).to_csv(str(tmp_path / f"{name}.csv"))
    published = []
    monkeypatch.setattr(hf_moecal.hub, "push", lambda *folder, **given: published.append(given))
    monkeypatch.chdir(tmp_path)
    names = {}
    for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S):
        exec(compile(code, PAGE.name, "exec"), names)
    assert "held-out NLL" in capsys.readouterr().out
    assert {"evaluation", "calibrated"} <= set(published[0]) and set(published[0]["calibrated"]) == {"test"}
