"""A temperature in the weights: the same answer from any runtime, or a refusal with the reason."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from hf_moecal.calibration import IdentityCalibrator, RobustTemperatureCalibrator, VectorCalibrator
from hf_moecal.hub import from_pretrained, load_calibration, write_calibration
from hf_moecal.hub.bake import bake
from hf_moecal.model.classifier import register_classifier
from tests.hub.helpers import saved, temperature, tokenizer
from tests.tiny_moe import families, tiny_config


NAMED = ["mixtral", "qwen3_moe", "olmoe", "granitemoe", "gpt_oss", "gemma4_text", "phimoe", "deepseek_v3"]
PLACES = {"granitemoe": "config.logits_scaling", "cohere2_moe": "config.logit_scale"}
IDS = torch.arange(3, 23)[None]


def randomised(model, seed: int = 0):
    """Every tensor away from its initial value, so that a norm of ones or a bias of zeros hides nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def checkpoint(folder, family: str, auto=AutoModelForCausalLM, value: float = 1.7, **config):
    torch.manual_seed(0)
    config = tiny_config(family, **config)
    if auto is AutoModelForSequenceClassification:
        register_classifier(config)
    model = randomised(auto.from_config(config))
    model.save_pretrained(folder)
    write_calibration(folder, temperature(value))
    return folder


def checked(folder, output, auto, value: float = 1.7) -> dict:
    """Bakes, then compares the two checkpoints as plain transformers loads them."""
    bake(folder, output_dir=output)
    with torch.no_grad():
        before, after = (auto.from_pretrained(path).eval()(input_ids=IDS).logits for path in (folder, output))
    assert before.std() > 1e-3
    torch.testing.assert_close(after, before / value, rtol=0, atol=1e-5 * float(before.abs().max()))
    assert torch.equal(after.argmax(-1), before.argmax(-1))
    return json.loads((output / "calibration.json").read_text())["baked"]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", NAMED)
def test_language_models(family, tied, tmp_path):
    folder = checkpoint(tmp_path / "model", family, tie_word_embeddings=tied)
    baked = checked(folder, tmp_path / "baked", AutoModelForCausalLM)
    assert baked["into"].startswith(PLACES.get(family, "final norm"))
    assert baked["largest_difference"] <= 1e-5


@pytest.mark.parametrize("family", NAMED)
def test_classifiers(family, tmp_path):
    auto = AutoModelForSequenceClassification
    folder = checkpoint(tmp_path / "model", family, auto, value=0.4, num_labels=3)
    checked(folder, tmp_path / "baked", auto, value=0.4)


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in families() if name not in NAMED])
def test_every_family_is_exact_or_refused(family, tmp_path):
    folder = checkpoint(tmp_path / "model", family)
    try:
        checked(folder, tmp_path / "baked", AutoModelForCausalLM)
    except ValueError as error:
        assert "cannot be baked exactly" in str(error) and not (tmp_path / "baked").exists()


def test_a_norm_that_stores_one_less_is_found(tmp_path):
    folder = checkpoint(tmp_path / "model", "qwen3_next")
    assert checked(folder, tmp_path / "baked", AutoModelForCausalLM)["into"] == "final norm (1 + weight)"


def test_a_head_bias_is_scaled_with_the_norm(tmp_path):
    folder = checkpoint(tmp_path / "model", "phimoe", lm_head_bias=True)
    baked = checked(folder, tmp_path / "baked", AutoModelForCausalLM)
    assert baked["tensors"] == ["model.norm.weight", "model.norm.bias", "lm_head.bias"]


def test_a_softcap_is_refused_however_small_the_logits(tmp_path):
    folder = checkpoint(tmp_path / "model", "gemma4_text", final_logit_softcapping=1e4)
    with pytest.raises(ValueError, match="capped at 10000 after the head"):
        bake(folder, output_dir=tmp_path / "baked")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]  # nothing, not even a temporary folder


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2e-2), (torch.float16, 5e-3)])
def test_half_precision_is_as_exact_as_its_weights(dtype, tolerance, tmp_path):
    model = randomised(AutoModelForCausalLM.from_config(tiny_config("mixtral"))).to(dtype)
    model.save_pretrained(tmp_path / "model")
    write_calibration(tmp_path / "model", temperature())
    bake(tmp_path / "model", output_dir=tmp_path / "baked")
    baked = json.loads((tmp_path / "baked" / "calibration.json").read_text())["baked"]
    assert 0 < baked["largest_difference"] <= tolerance == baked["tolerance"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "baked", dtype="auto").dtype == dtype
    with pytest.raises(ValueError, match="nothing was written"):
        bake(tmp_path / "model", output_dir=tmp_path / "strict", tolerance=1e-6)
    assert not (tmp_path / "strict").exists()


def test_a_baked_temperature_is_never_applied_again(tmp_path):
    folder = checkpoint(tmp_path / "model", "mixtral", AutoModelForSequenceClassification, num_labels=3)
    output = bake(folder, output_dir=tmp_path / "baked")
    plain = AutoModelForSequenceClassification.from_pretrained(output).eval()
    assert torch.equal(from_pretrained(output)(input_ids=IDS).logits, plain(input_ids=IDS).logits)
    for again in (
        lambda: load_calibration(output),
        lambda: bake(output, output_dir=tmp_path / "twice"),
        lambda: write_calibration(output, temperature(2.0)),
    ):
        with pytest.raises(ValueError, match="weights"):
            again()


def test_real_text_and_the_tokenizer_go_along(tmp_path):
    folder = saved(tmp_path / "model", vocab_size=32)
    words = tokenizer(folder)
    (tmp_path / "model" / "training_args.bin").write_bytes(b"pickle")
    write_calibration(
        folder, RobustTemperatureCalibrator.from_parameters({"temperature": 2, "eta": 1, "filtered": False})
    )
    output = bake(folder, output_dir=tmp_path / "baked", texts=["the plot is thin", "good"])
    assert json.loads((output / "calibration.json").read_text())["baked"]["sequences"] == 2
    names = {path.name for path in output.iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "config.json"} <= names and "training_args.bin" not in names
    assert type(words).from_pretrained(output)("the plot")["input_ids"] == words("the plot")["input_ids"]


def test_what_is_no_single_factor_is_refused(tmp_path):
    folder = saved(tmp_path / "model")
    vector = VectorCalibrator.from_parameters({"scale": [1.0, 2.0, 3.0], "bias": [0.0, 0.0, 0.0]})
    for calibrator in (vector, IdentityCalibrator.from_parameters({})):
        write_calibration(folder, calibrator)
        with pytest.raises(ValueError, match=f"Method '{calibrator.method}' cannot become part"):
            bake(folder, output_dir=tmp_path / "baked")
    write_calibration(folder, temperature())
    with pytest.raises(ValueError, match="not an empty folder"):
        bake(folder, output_dir=folder)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    write_calibration(tmp_path / "adapter", temperature())
    with pytest.raises(ValueError, match="merge it into its base model"):
        bake(tmp_path / "adapter", output_dir=tmp_path / "baked")
