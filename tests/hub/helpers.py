"""Saved checkpoints that the tests of the Hub share."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from hf_moecal.calibration import (
    TemperatureCalibrator,
)
from tests.tiny_moe import tiny_config


def temperature(value: float = 1.7) -> TemperatureCalibrator:
    return TemperatureCalibrator.from_parameters({"temperature": value})


def saved(folder, *, causal: bool = False, **config) -> str:
    torch.manual_seed(0)
    auto = AutoModelForCausalLM if causal else AutoModelForSequenceClassification
    auto.from_config(tiny_config("mixtral", num_labels=3, **config)).save_pretrained(folder)
    return str(folder)


def tokenizer(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [
        "<pad>",
        "<s>",
        "</s>",
        "<unk>",
        *"the plot is thin yet two leads carry it with ease and not good bad".split(),
    ]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", eos_token="</s>")
    fast.save_pretrained(folder)
    return fast
