"""The format of recipes (columns, scores, conditions, precision), and the recipes for the Hub run in small."""

import dataclasses
import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_moecal.cli.plan import make_plan, read_launch
from hf_moecal.cli.recipe import Recipe, load_recipe
from hf_moecal.cli.runs import predict_recipe, train_recipe
from hf_moecal.cli.sets import load_set
from hf_moecal.model.loading import load_classifier
from hf_moecal.training.arguments import MoECalArguments
from tests.tiny_moe import tiny_config


COMMENTS = [
    {"id": 0, "comment": "you fool", "toxicity": 0.8, "male": 1.0, "black": None, "split": "train", "note": "x"},
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
        (Recipe("model", text="note", label="id"), {}, "3 of 4 rows have no text in 'note'"),
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


def test_a_set_of_nothing_but_what_the_task_reads(tmp_path):
    columns = {"question": ["why"], "answers": [["so", "no"]], "right": [1]}
    Dataset.from_dict(columns).to_parquet(str(tmp_path / "quiz.parquet"))
    recipe = Recipe("m", prompt="question", options="answers", label="right", arguments={"task": "choice"})
    found = load_set("quiz", {"path": str(tmp_path / "quiz.parquet")}, recipe)
    assert found[:] == {"prompt": ["why"], "options": [["so", "no"]], "label": [1]}


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


WORDS = ("[PAD]", "[UNK]", "good", "[END]", "negative", "positive", "A", "B", "C", "D", "Answer", "number")


def tokenizer(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "[END]"}
    PreTrainedTokenizerFast(tokenizer_object=raw, **special).save_pretrained(folder)


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


# The recipes for the Hub

HUB = Path(__file__).parents[2] / "recipes" / "hub"
CONFIGS = {  # what the config.json of these repositories says that differs from the family's defaults
    "mistralai/Mixtral-8x7B-v0.1": ("mixtral", {"max_position_embeddings": 32768, "sliding_window": None}),
    "openai/gpt-oss-20b": (
        "gpt_oss",
        {"num_hidden_layers": 24, "num_local_experts": 32, "quantization_config": {"quant_method": "mxfp4"}},
    ),
    "allenai/OLMoE-1B-7B-0924": (
        "olmoe",
        {"hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 16, "num_attention_heads": 16}
        | {"num_key_value_heads": 16, "num_experts": 64, "num_experts_per_tok": 8, "vocab_size": 50304},
    ),
    "Qwen/Qwen3-30B-A3B": (
        "qwen3_moe",
        {"vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48}
        | {"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "moe_intermediate_size": 768}
        | {"num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True, "max_position_embeddings": 40960},
    ),
}
BILLIONS = {"mixtral": (46.70, 12.88), "gpt_oss": (20.91, 4.19), "olmoe": (6.92, 1.28), "qwen3_moe": (30.53, 3.35)}


def header(name):
    """The comment above a recipe, by its keys."""
    lines = re.split(r'\nmodel:|\n"""', (HUB / name).read_text())[0].splitlines()
    found, key = {}, None
    for line in lines:
        match = re.match(r"# (\w+): +(.*)", line)
        key = match[1] if match else key if line.startswith("#  ") else None
        if key is not None:
            found[key] = f"{found.get(key, '')} {match[2] if match else line.strip('# ')}".strip()
    return found


def reviews(count, text="text"):
    return Dataset.from_list([{text: f"good number {i}", "label": i % 2} for i in range(count)])


def civil_comments(count=48):
    identities = ("male", "female", "LGBTQ", "christian", "muslim", "other_religions", "black", "white")
    return Dataset.from_list(
        [
            {"comment_text": f"good number {i}", "toxicity": (i % 5) / 4, "split": ("train", "val", "test")[i % 3]}
            | {name: (i + k) % 5 / 4 if i % 7 else None for k, name in enumerate(identities)}
            for i in range(count)
        ]
    )


def quiz():
    subjects = sorted(
        subject for group in load_recipe(HUB / "mmlu.yaml").groups.values() for subject in group["where"]["subject"]
    )
    assert len(subjects) == len(set(subjects)) == 57
    rows = [
        {
            "question": f"good number {i}",
            "subject": subjects[i],
            "choices": ["one", "two", "good", "four"],
            "answer": i % 4,
        }
        for i in range(57)
    ]
    return Dataset.from_list(rows)


def trivia():
    answers = {"aliases": ["good", "Good!"], "normalized_aliases": ["good"], "value": "good"}
    return Dataset.from_list(
        [{"question": f"good number {i}", "question_id": str(i), "answer": answers} for i in range(8)]
    )


def same_schema(path, name=None, *, split=None, data_files=None, **_):
    """Rows with the columns of the sets that the recipes name; slices of a split are what datasets makes of them."""
    whole = {
        "stanfordnlp/imdb": lambda: reviews(24),
        "fancyzhx/yelp_polarity": lambda: reviews(8),
        "fancyzhx/amazon_polarity": lambda: reviews(8, "content").add_column("title", ["t"] * 8),
        "hf://datasets/shlomihod/civil-comments-wilds/all_data_with_identities.csv": civil_comments,
        "cais/mmlu": quiz,
        "mandarjoshi/trivia_qa": trivia,
        "google-research-datasets/nq_open": lambda: Dataset.from_list([{"question": "good", "answer": ["x", "good"]}]),
        "stanfordnlp/web_questions": lambda: Dataset.from_list([{"url": "", "question": "good", "answers": ["x"]}]),
    }
    assert re.fullmatch(r"train|(\w+(\[-?\d*:-?\d*\])?\+?)+", split)
    return whole[data_files or path]()


def test_the_models_are_known():
    assert {load_recipe(path).model for path in HUB.glob("*.yaml")} <= set(CONFIGS)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for it
@pytest.mark.parametrize("name", sorted(path.stem for path in HUB.glob("*.yaml")))
def test_the_header_says_what_the_plan_says(name, tmp_path):
    path, told = HUB / f"{name}.yaml", header(f"{name}.yaml")
    assert {"command", "hardware", "memory", "hours", "expect"} <= set(told)
    assert f"--config recipes/hub/{name}.yaml" in told["command"].replace("\\ ", "")
    assert "estimate" in told["hours"] and "not yet run" in told["expect"]
    files = re.findall(r"recipes/accelerate/\w+.yaml", told["command"])
    launch = read_launch(HUB.parents[1] / files[0]) if files else None
    recipe = load_recipe(path)
    family, fields = CONFIGS[recipe.model]
    CONFIG_MAPPING[family](**fields).save_pretrained(tmp_path)
    judged = re.search(r"--judged (\d+)", told["memory"])
    plan = make_plan(
        dataclasses.replace(recipe, model=str(tmp_path)), launch=launch, judged=int(judged[1]) if judged else None
    )
    config = CONFIG_MAPPING[family](**fields)
    classifies = recipe.arguments.get("task") is None
    head = config.vocab_size * config.hidden_size / 1e9 if classifies else 0  # a classifier has another
    adapter = plan.counts.trained / 1e9 if recipe.arguments.get("train") == "lora" else 0
    assert plan.counts.total / 1e9 + head - adapter == pytest.approx(BILLIONS[family][0], abs=0.01)
    active = plan.counts.active / 1e9 + head  # of an adapter a token reads no more than what trains of it
    assert BILLIONS[family][1] - 0.01 <= active <= BILLIONS[family][1] + adapter + 0.01
    assert told["memory"].split()[0] == str(round(plan.memory.total / 2**30)), plan.lines()
    size = int(re.search(r"GPUs? of (\d+) GB", told["hardware"])[1])
    assert plan.memory.total < 0.9 * size * 1e9


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for it
@pytest.mark.parametrize("name", sorted(path.stem for path in HUB.glob("*.yaml")))
def test_the_recipe_runs(name, tmp_path, monkeypatch):
    """Two steps and the predictions of every group, on a tiny model of the family and rows of the same columns."""
    monkeypatch.setattr("datasets.load_dataset", same_schema)
    monkeypatch.setenv("MOECAL_CACHE", str(tmp_path / "cache"))
    recipe = load_recipe(HUB / f"{name}.yaml")
    family = CONFIGS[recipe.model][0]
    kind = AutoModelForSequenceClassification if recipe.arguments.get("task") is None else AutoModelForCausalLM
    kind.from_config(tiny_config(family, num_labels=2)).save_pretrained(tmp_path / "model")
    tokenizer(tmp_path / "model")
    recipe = dataclasses.replace(recipe, model=str(tmp_path / "model"))
    tiny = {
        "max_steps": 2,
        "use_cpu": True,
        "disable_tqdm": True,
        "output_dir": tmp_path / "out",
        "save_strategy": "no",
    }
    overrides = [f"--{key}={value}" for key, value in {**tiny, "per_device_train_batch_size": 4}.items()]
    trainer = train_recipe(recipe, overrides=overrides)
    assert trainer.state.global_step == 2
    trained = {parameter.dtype for parameter in trainer.model.parameters() if parameter.requires_grad}
    assert trained == {torch.float32}
    table = predict_recipe(recipe, model=str(tmp_path / "out"), batch_size=4)
    assert set(table["group"]) == set(recipe.groups)
    assert all(0 < value <= 1 for value in table["confidence"])


def short_answers():
    spec = importlib.util.spec_from_file_location("short_answers", HUB / "short_answers.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_the_script_for_short_answers(tmp_path, monkeypatch, capsys):
    """Its header says what the plan says; then two steps and the answers of every group."""
    script, told = short_answers(), header("short_answers.py")
    family, fields = CONFIGS[script.MODEL]
    CONFIG_MAPPING[family](**fields).save_pretrained(tmp_path / "whole")
    known = {field.name for field in dataclasses.fields(MoECalArguments)}
    arguments = {key: value for key, value in script.SETTINGS.items() if key in known}
    arguments |= {"task": "lm", "bf16": True, "activation_checkpointing": True}  # SFTConfig's defaults
    length = script.SETTINGS["max_length"]
    recipe = Recipe(str(tmp_path / "whole"), dtype="bfloat16", max_length=length, arguments=arguments)
    plan = make_plan(recipe)
    assert told["memory"].split()[0] == str(round(plan.memory.total / 2**30)), plan.lines()
    assert "estimate" in told["hours"] and "not yet run" in told["expect"]
    assert plan.memory.total < 0.9 * 1e9 * int(re.search(r"GPU of (\d+) GB", told["hardware"])[1])

    monkeypatch.setattr(script, "load_dataset", same_schema)
    AutoModelForCausalLM.from_config(tiny_config(family)).save_pretrained(tmp_path / "model")
    tokenizer(tmp_path / "model")
    tiny = {"max_steps": 2, "use_cpu": True, "disable_tqdm": True, "output_dir": tmp_path / "out"}
    tiny |= {"per_device_train_batch_size": 2, "eval_strategy": "no"}
    script.main([f"--{key}={value}" for key, value in tiny.items()], str(tmp_path / "model"))
    table = Dataset.from_parquet(str(tmp_path / "out" / "answers.parquet"))
    assert list(dict.fromkeys(table["group"])) == list(script.GROUPS) and set(table["label"]) <= {0, 1}
    assert "natural: accuracy" in capsys.readouterr().out


def test_spellings_that_are_right():
    script = short_answers()
    assert script.is_right("The Beatles!", ["beatles", "x"]) and not script.is_right("Beatle", ["beatles"])


def test_a_family_without_a_head_trains_on_votes(tmp_path):
    tiny_config("olmoe", vocab_size=64).save_pretrained(tmp_path / "base")
    AutoModelForCausalLM.from_config(tiny_config("olmoe", vocab_size=64)).save_pretrained(tmp_path / "base")
    tokenizer(tmp_path / "base")
    votes = [[i % 3, 1, 4] for i in range(8)]
    Dataset.from_dict({"text": ["good film"] * 8, "votes": votes}).to_parquet(str(tmp_path / "rated.parquet"))
    spec = {"path": str(tmp_path / "rated.parquet")}
    settings = {"objective": "erm", "train": "last_moe_layer", "max_steps": 1, "output_dir": str(tmp_path / "out")}
    recipe = Recipe(
        str(tmp_path / "base"), label="votes", train=spec, groups={"rated": spec},
        arguments={**settings, "report_to": "none", "eval_strategy": "no", "use_cpu": True},
    )  # fmt: skip
    trainer = train_recipe(recipe)
    assert type(trainer.model).__name__ == "OlmoeForSequenceClassification" and trainer.model.config.num_labels == 3
    table = predict_recipe(recipe, model=str(tmp_path / "out"))
    assert table["label"][0] == pytest.approx([0.0, 0.2, 0.8]) and table["votes"][:] == votes
    assert table["label"][1] == pytest.approx([1 / 6, 1 / 6, 4 / 6])
