"""The format of recipes: columns, scores, conditions, precision."""

import sys

import pytest
import torch
import yaml
from datasets import Dataset
from safetensors.torch import save_file
from tiny_moe import tiny_config
from transformers import AutoModelForSequenceClassification

from hf_moecal.recipe import Recipe, load_recipe, load_set
from hf_moecal.runs import load_classifier


COMMENTS = [
    {"id": 0, "comment": "you fool", "toxicity": 0.8, "male": 1.0, "black": None, "split": "train"},
    {"id": 1, "comment": "nice day", "toxicity": 0.0, "male": None, "black": 0.5, "split": "train"},
    {"id": 2, "comment": "so so", "toxicity": 0.5, "male": 0.4, "black": 0.0, "split": "test"},
    {"id": 3, "comment": "fine", "toxicity": 0.49, "male": 0.5, "black": 1.0, "split": "val"},
]


@pytest.fixture
def comments(tmp_path):
    Dataset.from_list(COMMENTS).to_parquet(str(tmp_path / "comments.parquet"))
    return {"path": str(tmp_path / "comments.parquet")}


CIVIL = Recipe("model", text="comment", label="toxicity", threshold=0.5)


def rows(spec, recipe=CIVIL, **where):
    return load_set("set", {**spec, "where": where} if where else spec, recipe)


def test_a_score_becomes_classes(comments):
    dataset = rows(comments)
    assert dataset["label"] == [1, 0, 1, 0]
    assert dataset["toxicity"] == [0.8, 0.0, 0.5, 0.49]  # kept for the predictions table
    named = rows(comments, Recipe("model", text="comment", label="toxicity", threshold=0.1))
    assert named["label"] == [1, 0, 1, 1]


def test_a_score_in_the_column_label(tmp_path):
    Dataset.from_dict({"text": ["a", "b"], "label": [0.2, 0.9]}).to_json(str(tmp_path / "scores.jsonl"))
    dataset = load_set("set", {"path": str(tmp_path / "scores.jsonl")}, Recipe("model", threshold=0.5))
    assert dataset["label"] == [0, 1] and dataset.features["label"].dtype == "int64"


@pytest.mark.parametrize(
    "where, expected",
    [
        ({"split": "train"}, [0, 1]),
        ({"split": ["train", "val"]}, [0, 1, 3]),
        ({"male": {">=": 0.5}}, [0, 3]),
        ({"male": {">": 0.4, "<": 1.0}}, [3]),
        ({"male": {"<=": 0.4}}, [2]),
        ({"male": {"!=": None}}, [0, 2, 3]),
        ({"black": {"!=": 0.5}}, [0, 2, 3]),
        ({"male": {">=": 0.5}, "split": "val"}, [3]),
    ],
)
def test_conditions(comments, where, expected):
    assert rows(comments, **where)["id"] == expected


@pytest.mark.parametrize(
    "recipe, where, message",
    [
        (CIVIL, {"male": {">=>": 1}}, "unknown key '>=>'; did you mean '>='"),
        (CIVIL, {"split": {">=": 0.5}}, "does not fit the column"),
        (CIVIL, {"female": {">=": 0.5}}, "no column 'female'"),
        (CIVIL, {"male": {">": 1.0}}, "is empty"),
        (Recipe("model", text="comment", label="male", threshold=0.5), {}, "1 of 4 rows have no number in 'male'"),
        (Recipe("model", text="comment", label="split", threshold=0.5), {}, "4 of 4 rows have no number"),
        (Recipe("model", text="text", label="toxicity"), {}, "in the set"),
    ],
)
def test_sets_that_cannot_be(comments, recipe, where, message):
    with pytest.raises(ValueError, match=message):
        rows(comments, recipe, **where)


def test_columns_of_one_set(comments, tmp_path):
    Dataset.from_dict({"title": ["t"], "content": ["good"], "stars": [4]}).to_csv(str(tmp_path / "reviews.csv"))
    spec = {"path": str(tmp_path / "reviews.csv"), "text": "content", "label": "stars", "threshold": 3}
    dataset = load_set("amazon", spec, CIVIL)
    assert dataset["comment"] == ["good"] and dataset["label"] == [1]
    plain = load_set("amazon", {**spec, "threshold": None}, CIVIL)
    assert plain["label"] == [4]


def test_a_file_on_the_hub(monkeypatch):
    """`hf://` reaches datasets as a file of its kind; no local file is looked for."""
    asked = {}

    def load_dataset(kind, **kwargs):
        asked.update(kwargs, kind=kind)
        return Dataset.from_list(COMMENTS)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    spec = {"path": "hf://datasets/org/name/all.csv", "where": {"split": "val"}}
    assert rows(spec)["id"] == [3]
    assert asked == {"kind": "csv", "data_files": "hf://datasets/org/name/all.csv", "split": "train"}
    with pytest.raises(ValueError, match="a file has no revision"):
        rows({**spec, "revision": "main"})


def test_dtype_is_one_of_two(tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"model": "m", "dtype": "bfloat16", "output_dir": "o"}))
    assert load_recipe(tmp_path / "recipe.yaml").dtype == "bfloat16"
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"model": "m", "dtype": "fp8", "output_dir": "o"}))
    with pytest.raises(ValueError, match="float32, bfloat16"):
        load_recipe(tmp_path / "recipe.yaml")


def tokenizer(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "good": 2}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_model_is_loaded_in_the_precision_asked_for(tmp_path, dtype):
    AutoModelForSequenceClassification.from_config(tiny_config("mixtral")).save_pretrained(tmp_path)
    tokenizer(tmp_path)
    model, _ = load_classifier(str(tmp_path), 2, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}
    assert model.config.num_labels == 2


def test_a_quantized_checkpoint_is_dequantized(tmp_path, monkeypatch):
    """gpt-oss is stored in MXFP4: pairs of 4-bit numbers in `blocks`, powers of two in `scales`."""
    config = tiny_config("gpt_oss", num_labels=2)
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.bfloat16)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    one = 0x22  # twice the number 1.0
    for name in [name for name in state if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inner, outer = state.pop(name).shape
        state[f"{name}_blocks"] = torch.full((experts, outer, inner // 32, 16), one, dtype=torch.uint8)
        state[f"{name}_scales"] = torch.full((experts, outer, inner // 32), 126, dtype=torch.uint8)  # 2 ** -1
    config.quantization_config = {"quant_method": "mxfp4", "modules_to_not_convert": ["score", "self_attn"]}
    config.save_pretrained(tmp_path)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    tokenizer(tmp_path)
    kind = sys.modules["transformers"].AutoModelForSequenceClassification
    asked, load = [], kind.from_pretrained
    monkeypatch.setattr(kind, "from_pretrained", lambda *a, **k: (asked.append(k), load(*a, **k))[1])
    model, _ = load_classifier(str(tmp_path), 2, dtype="bfloat16")
    assert asked[0]["quantization_config"].dequantize is True  # else a GPU would keep the weights in 4 bits
    experts = model.model.layers[-1].mlp.experts
    assert experts.gate_up_proj.dtype == torch.bfloat16 and (experts.gate_up_proj == 0.5).all()
    model(input_ids=torch.tensor([[2, 2]])).logits.sum().backward()
    assert experts.down_proj.grad.any()
