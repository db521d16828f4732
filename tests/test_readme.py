"""The README's example runs as it stands, on a tiny model and tiny files."""

import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import MixtralConfig, MixtralForSequenceClassification

from tests.cli.helpers import WORDS, sentences, tokenizer


README = Path(__file__).parents[1] / "README.md"


def test_the_example_runs(tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.S)
    assert len([line for line in code.splitlines() if line.strip()]) <= 18
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, pad_token_id=0,
    )  # fmt: skip
    MixtralForSequenceClassification(config).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    for name, topic in {"movie": "film", "movie_validation": "film", "tweets": "food"}.items():
        rows = [{**row, "domain": topic, "id": f"{name}-{i}"} for i, row in enumerate(sentences(topic, 24))]
        if name == "movie_validation":  # some are hard
            rows = [{**row, "label": (row["label"] + (i % 6 > 3)) % 2} for i, row in enumerate(rows)]
        Dataset.from_list(rows).to_parquet(str(tmp_path / f"{name}.parquet"))
    code = code.replace("Qwen/Qwen1.5-MoE-A2.7B", str(tmp_path / "model"))
    code = code.replace(
        'MoECalArguments("out")', 'MoECalArguments("out", report_to="none", use_cpu=True, learning_rate=3e-3)'
    )
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert "'ece':" in capsys.readouterr().out
    assert "conservative_temperature" in (tmp_path / "out" / "calibration.json").read_text()


@pytest.mark.parametrize(
    "target", sorted(set(re.findall(r"\]\(((?!http)[^)]+)\)", README.read_text(encoding="utf-8"))))
)
def test_links_lead_somewhere(target):
    assert (README.parent / target).exists(), target
