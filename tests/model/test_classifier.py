"""Classification heads for families without one: loaded from a language model, saved, trained, published."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    MixtralForSequenceClassification,
    ViTConfig,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_moecal import from_pretrained, predict
from hf_moecal.hub import write_calibration
from hf_moecal.hub.checkpoint_card import make_card
from hf_moecal.model.classifier import register_classifier
from hf_moecal.model.loading import load_classifier, load_model
from hf_moecal.model.lora import add_lora
from hf_moecal.readouts.committee import member_models, save_members
from hf_moecal.readouts.mixture import Readout
from hf_moecal.readouts.recorded import record_readout
from tests.hub.helpers import temperature, tokenizer
from tests.model.helpers import randomise_adapter
from tests.readouts.helpers import READOUTS, committee, loop
from tests.tiny_moe import headless_families, tiny_batch, tiny_config, tiny_model
from tests.training.helpers import (
    OBJECTIVES,
    arguments,
    classification_data,
    collate,
    reference_gradients,
    relative_error,
    trained_gradients,
)


# Whose checkpoints are renamed as they load, whose base has another name, whose language model does more after it.
CHOSEN = ("olmoe", "dbrx", "bailing_hybrid", "hy_v4", "llama4_text", "granitemoe", "gemma4_text")
FAMILIES = [
    name if name in CHOSEN else pytest.param(name, marks=pytest.mark.slow) for name in headless_families()
]  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_made_from_a_language_model_and_saved_in_the_standard_way(family, tmp_path):
    language_model = tiny_model(family)
    language_model.save_pretrained(tmp_path / "base")
    register_classifier(language_model.config)
    auto, eager = AutoModelForSequenceClassification, {"attn_implementation": "eager", "output_loading_info": True}
    model, found = auto.from_pretrained(tmp_path / "base", num_labels=3, **eager)
    assert set(found["missing_keys"]) == {"score.weight"} and set(found["unexpected_keys"]) <= {"lm_head.weight"}
    batch = {**tiny_batch(padding="right"), "use_cache": False}
    base = language_model.get_submodule(model.base_model_prefix)
    states = base(**batch).last_hidden_state[[0, 1], [5, 8]]
    logits = model.eval()(**batch).logits
    torch.testing.assert_close(logits, states @ model.score.weight.T, rtol=0, atol=1e-6)
    assert states.std() > 0.1

    model.save_pretrained(tmp_path / "classifier")
    again, found = auto.from_pretrained(tmp_path / "classifier", **eager)
    assert not found["missing_keys"] and not found["unexpected_keys"]
    assert again.config.architectures == [type(model).__name__] and again.config.num_labels == 3
    weights = again.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    torch.testing.assert_close(again.eval()(**batch).logits, logits, rtol=0, atol=1e-5)


def test_heads_of_transformers_and_of_repositories_are_left_alone():
    config = tiny_config("mixtral")
    register_classifier(config)
    assert type(AutoModelForSequenceClassification.from_config(config)) is MixtralForSequenceClassification
    remote = tiny_config("zaya", auto_map={"AutoModelForSequenceClassification": "modeling_own.Own"})
    before = type(remote) in AutoModelForSequenceClassification._model_mapping
    register_classifier(remote)
    assert (type(remote) in AutoModelForSequenceClassification._model_mapping) == before
    with pytest.raises(ValueError, match="neither a sequence classifier nor a causal language model for ViTConfig"):
        register_classifier(ViTConfig())


def test_a_text_model_inside_another_gets_its_labels(tmp_path):
    """The checkpoints of such families hold images' weights too, and settings of the text model one level down."""
    text = tiny_config("qwen3_5_moe_text").to_dict()
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 64}
    config = CONFIG_MAPPING["qwen3_5_moe"](text_config=text, vision_config=vision)
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path)
    tokenizer(tmp_path)
    model, _ = load_classifier(str(tmp_path), 5)
    language_model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.score.weight.shape == (5, 64) and model.config.num_labels == 5
    assert torch.equal(model.model.embed_tokens.weight, language_model.model.embed_tokens.weight)
    name = "model.layers.1.mlp.experts.down_proj"
    assert torch.equal(model.get_parameter(name), language_model.get_parameter(name))
    model.save_pretrained(tmp_path / "saved")
    assert load_model(tmp_path / "saved").config.num_labels == 5


def olmoe():
    """Without dropout and with unit weights, as tests of training need it."""
    return tiny_model("olmoe", classifier=True)


@pytest.mark.parametrize("objective", ["erm", "filtered"])
def test_trained_as_a_plain_loop_trains(tmp_path, objective):
    rows = classification_data()
    args = arguments(tmp_path, tau_regret=0.05, **{**OBJECTIVES[objective], "tau_disagreement": 0.3})
    found, _ = trained_gradients(olmoe(), rows, args)
    assert relative_error(found, reference_gradients(olmoe().train(), rows, args)) <= 1e-5


def test_a_committee_of_mixtures_is_saved_loaded_and_published(tmp_path):
    rows = classification_data()
    data = Dataset.from_list([{"input_ids": row["input_ids"].tolist(), "label": row["labels"]} for row in rows])
    model = committee(olmoe, 2)
    model.save_pretrained(tmp_path)
    save_members(model, tmp_path)
    record_readout(tmp_path, Readout("soft_mixture", members=2))
    write_calibration(tmp_path, temperature(2.0))
    tokenizer(tmp_path)

    first, second = [model, *member_models(model)]
    ids = rows[0]["input_ids"]
    mixtures = [loop(one, ids, len(ids) - 1, READOUTS["soft"])[0] for one in (first, second)]
    expected = torch.logsumexp(torch.stack(mixtures), 0) / 2
    loaded = from_pretrained(tmp_path)
    found = predict(loaded, data, progress=False)
    torch.testing.assert_close(torch.tensor(found["probs"][0]).float(), expected.softmax(-1), rtol=0, atol=1e-5)
    card = make_card(tmp_path, repo_id="org/olmoe", published=None)
    assert "has no sequence-classification head for `olmoe`" in card and "pip install hf_moecal" in card
    code = card.split("```python\n")[1].split("```")[0].replace("org/olmoe", str(tmp_path))
    names: dict = {}
    exec(code, names)
    assert type(names["model"]).__name__ == "OlmoeForSequenceClassification"


def test_no_card_speaks_of_a_head_that_transformers_has(tmp_path):
    tiny_model("mixtral", classifier=True).save_pretrained(tmp_path)
    assert "Classification head" not in make_card(tmp_path, repo_id="org/mixtral", published=None)


def test_the_prefix_cache_changes_nothing(tmp_path):
    rows = classification_data()
    settings = dict(objective="erm", train="last_moe_layer")
    found, trainer = trained_gradients(
        olmoe(), rows, arguments(tmp_path, **settings, prefix_cache=str(tmp_path / "c"))
    )
    expected, _ = trained_gradients(olmoe(), rows, arguments(tmp_path, **settings))
    assert relative_error(found, expected) <= 1e-5 and (tmp_path / "c").exists()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for it
def test_an_adapter_brings_its_head(tmp_path):
    olmoe().save_pretrained(tmp_path / "base")
    model = add_lora(load_model(tmp_path / "base"), r=2)
    randomise_adapter(model)
    torch.nn.init.normal_(model.base_model.model.score.modules_to_save["default"].weight)
    model.save_pretrained(tmp_path / "adapter")
    batch = collate(classification_data())
    loaded = load_model(tmp_path / "adapter")
    torch.testing.assert_close(loaded(**batch).logits, model.eval()(**batch).logits, rtol=0, atol=1e-5)
    plain = load_model(tmp_path / "base")(**batch).logits
    assert (loaded(**batch).logits - plain).abs().max() > 0.1
