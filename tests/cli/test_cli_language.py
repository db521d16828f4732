"""Multiple choice and language modelling from recipes and the command line, end to end on a tiny model."""

import json

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from transformers import AutoModelForCausalLM

from hf_moecal.cli.commands import main
from hf_moecal.cli.plan import make_plan
from hf_moecal.cli.recipe import Recipe, load_recipe
from hf_moecal.cli.runs import parse_arguments
from hf_moecal.cli.sets import load_set
from hf_moecal.metrics import table_report
from hf_moecal.table import read_table
from tests.tasks.helpers import scores_one_by_one, word_tokenizer
from tests.training.helpers import language_model


def questions(count, start=0):
    rows = []
    for i in range(start, start + count):
        endings = [" good", " very bad", " bad"][: 2 + i % 2]
        row = {
            "id": f"q{i}",
            "film": "The film",
            "answer": {"texts": endings, "note": "x"},
            "gold": i % 2,
            "reply": "good",
        }
        rows.append({**row, "kind": ["a", "b"][i % 2]})
    return rows


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    language_model().save_pretrained(folder / "model")
    word_tokenizer().save_pretrained(folder / "model")
    Dataset.from_list(questions(8)).to_parquet(str(folder / "train.parquet"))
    Dataset.from_list(questions(5, 8)).to_parquet(str(folder / "one.parquet"))
    two = [
        {"ask": "The film was", "words": [" good", " bad"], "gold": str(i % 2), "said": "very bad"} for i in range(3)
    ]
    Dataset.from_list(two).to_json(str(folder / "two.jsonl"))
    Dataset.from_list(two).remove_columns("gold").to_json(str(folder / "said.jsonl"))
    return folder


def recipe_of(home, name, **changes):
    content = {
        "model": str(home / "model"),
        "task": "choice",
        "data": {
            "train": {"path": str(home / "train.parquet")},
            "validation": {"path": str(home / "one.parquet"), "where": {"kind": "a"}},
            "prompt": "{film} was",
            "options": "answer.texts",
            "label": "gold",
            "max_length": 16,
        },
        "groups": {
            "one": {"path": str(home / "one.parquet")},
            "two": {"path": str(home / "two.jsonl"), "prompt": "ask", "options": "words"},
        },
        "objective": "robust",
        "robust_warmup_ratio": 0.0,
        "output_dir": str(home / name),
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        **changes,
    }
    path = home / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def predicted(home, path, *more):
    table = path.with_suffix(".parquet")
    model = ["--model", str(home / path.stem), "--config", str(path)]
    assert main(["predict", *model, "--output", str(table), "--batch-size", "3", *more]) == 0
    return read_table(table)


@pytest.mark.parametrize("scoring", ["per_token", "label_word"])
def test_choice_from_a_recipe(home, capsys, scoring):
    words = {"options": [" good", " bad"]} if scoring == "label_word" else {}
    path = recipe_of(home, f"choice_{scoring}", scoring=scoring)
    content = yaml.safe_load(path.read_text())
    content["data"] |= words
    path.write_text(yaml.safe_dump(content))
    assert main(["train", "--config", str(path)]) == 0
    table = predicted(home, path)
    assert table["group"][:] == ["one"] * 5 + ["two"] * 3
    assert table["id"][:5] == [f"q{i}" for i in range(8, 13)] and table["label"][5:] == [0, 1, 0]
    model = AutoModelForCausalLM.from_pretrained(home / path.stem).eval()
    good, bad, very_bad = [6], [7], [12, 7]
    sets = [[good, very_bad, bad][: 2 + i % 2] if not words else [good, bad] for i in range(8, 13)]
    for found, options in zip(table, [*sets, *[[good, bad]] * 3], strict=True):
        row = {"prompt_ids": [3, 4, 5], "option_ids": options, "options": [""] * len(options)}
        with torch.no_grad():
            expected = scores_one_by_one(model, row, scoring)
        assert found["probs"][: len(options)] == pytest.approx(expected.softmax(-1).tolist(), abs=1e-5)
    report = table_report(table, intervals=False)
    assert main(["evaluate", str(path.with_suffix(".parquet")), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out.split("parquet\n")[-1])
    assert set(printed["groups"]) == {"one", "two"} and printed["n"] == 8
    assert (
        printed["nll"]
        == pytest.approx(report["nll"])
        == pytest.approx(-np.mean([np.log(row["probs"][row["label"]]) for row in table]))
    )
    assert main(["evaluate", str(path.with_suffix(".parquet"))]) == 0
    assert "two" in capsys.readouterr().out


@pytest.mark.parametrize("example", ["sequence", "token"])
def test_a_language_model_from_a_recipe(home, capsys, example):
    path = recipe_of(home, f"lm_{example}", task="lm", example=example)
    content = yaml.safe_load(path.read_text())
    data = {"completion": " {reply}"}, {"prompt": "ask", "completion": " {said}"}
    content["data"] = {k: v for k, v in content["data"].items() if k not in ("options", "label")} | data[0]
    content["groups"]["two"] = {"path": str(home / "said.jsonl"), **data[1]}
    path.write_text(yaml.safe_dump(content))
    assert main(["train", "--config", str(path)]) == 0
    table = predicted(home, path)
    model = AutoModelForCausalLM.from_pretrained(home / path.stem).eval()
    with torch.no_grad():
        probs = model(input_ids=torch.tensor([[3, 4, 5, 12, 7]])).logits[0].double().softmax(-1)
    one = [(probs[2], 6)]  # " good" after "The film was"
    two = [(probs[2], 12), (probs[3], 7)]
    judged = [*[one] * 5, *[two] * 3]
    confidence = [[float(p.max()) for p, _ in tokens] for tokens in judged]
    nll = [[-float(p[token].log()) for p, token in tokens] for tokens in judged]
    right = [[int(p.argmax()) == token for p, token in tokens] for tokens in judged]
    merge = (lambda rows: [x for row in rows for x in row]) if example == "token" else (lambda r: [*map(np.mean, r)])
    assert table["confidence"][:] == pytest.approx(merge(confidence), abs=1e-5)
    capsys.readouterr()
    assert main(["evaluate", str(path.with_suffix(".parquet")), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["nll"] == pytest.approx(np.mean(merge(nll)), abs=1e-5)
    assert printed["accuracy"] == pytest.approx(np.mean(merge(right)))
    assert printed["signed_gap"] == pytest.approx(np.mean(merge(confidence)) - np.mean(merge(right)), abs=1e-5)
    assert set(printed["groups"]) == {"one", "two"}
    assert main(["evaluate", str(path.with_suffix(".parquet"))]) == 0
    assert f"{np.mean(merge(nll)[5:]):.3f}" in capsys.readouterr().out
    if example == "sequence":
        columns = ["--confidence", "sequence_confidence", "--correct", "correct"]
        assert main(["evaluate", str(path.with_suffix(".parquet")), *columns, "--json"]) == 0
        printed = json.loads(capsys.readouterr().out)
        assert printed["confidence"] == pytest.approx(np.mean(np.exp(-np.array(merge(nll)))), abs=1e-5)
        assert main(["evaluate", str(path.with_suffix(".parquet")), "--confidence", "sure"]) == 2
        assert "the table has no column 'sure'" in capsys.readouterr().err


def test_texts_and_resuming_from_the_shell(home, capsys):
    path = recipe_of(home, "texts", task="lm")
    content = yaml.safe_load(path.read_text())
    content["data"] = {"text": "ask", "train": {"path": str(home / "two.jsonl")}}
    content["groups"] = {"two": {"path": str(home / "two.jsonl")}}
    path.write_text(yaml.safe_dump(content))
    assert main(["train", "--config", str(path)]) == 0
    table = predicted(home, path)
    assert table["num_tokens"][:] == [2] * 3  # "The film was", but for its first token
    assert predicted(home, path, "--resume")["nll"][:] == table["nll"][:]
    arguments = ["predict", "--model", str(home / "texts"), "--config", str(path), "--resume", "--output"]
    capsys.readouterr()
    assert main([*arguments, str(path.with_suffix(".parquet")), "--batch-size", "2"]) == 2
    assert "was made with batch_size 3, now 2" in capsys.readouterr().err


def test_a_row_without_supervised_tokens_is_left_out_and_counted():
    table = {
        "confidence": [0.5, float("nan"), 0.75],
        "correct": [0.5, float("nan"), 1.0],
        "nll": [1.0, float("nan"), 0.5],
        "brier": [0.2, float("nan"), 0.1],
        "group": ["a", "b", "a"],
    }
    report = table_report(table, intervals=False)
    assert (report["n"], report["n_ignored"], report["nll"], report["accuracy"]) == (2, 1, 0.75, 0.75)
    assert report["brier"] == pytest.approx(0.15) and list(report["groups"]) == ["a"]
    for change, message in [
        ({"correct": [float("nan")] * 3}, "For no row of the table it is known whether it is `correct`"),
        ({"nll": [1.0, 0.0, -0.5]}, "nll must be numbers of 0 or more, but row 1 holds -0.5"),
        ({"correct": [0.5, 2.0, 1.0]}, "must lie in"),
    ]:
        with pytest.raises(ValueError, match=message):
            table_report({**table, **change}, intervals=False)
    with pytest.raises(ValueError, match="no column 'prediction', 'label'"):
        table_report({"confidence": [0.5]})


def test_the_plan_counts_the_options(home):
    whole = make_plan(load_recipe(recipe_of(home, "plan", objective="erm")))
    word = make_plan(load_recipe(recipe_of(home, "plan", objective="erm", scoring="label_word")))
    assert (whole.batch.sequences, word.batch.sequences) == (3, 1)
    assert "each of up to 3 options" in "\n".join(whole.lines())
    assert whole.memory.activations == pytest.approx(3 * word.memory.activations, rel=0.05)
    assert whole.memory.logits == 3 * 16 * word.memory.logits
    texts = {"text": "film", "max_length": 16, "train": {"path": str(home / "train.parquet")}}
    assert make_plan(load_recipe(recipe_of(home, "plan", task="lm", objective="erm", data=texts))).batch.sequences == 1


def test_sets_that_cannot_be(home):
    one, two = {"path": str(home / "one.parquet")}, {"path": str(home / "two.jsonl")}
    choice = {"task": "choice"}
    for spec, settings, message in [
        (one, {}, "no column 'prompt', only"),
        (one, {"prompt": "{movie} was"}, "no column 'movie'"),
        (one, {"prompt": "film", "options": "answer.words"}, "column 'answer' has no 'words' in every row"),
        (one, {"prompt": "film", "options": "answer.texts"}, "no column 'label'"),
        (one, {"prompt": "film", "options": ["a", "b"], "label": "film"}, "is an index into its .* found .* in row 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_set("x", spec, Recipe("m", arguments=choice, **settings))
    with pytest.raises(ValueError, match="no column 'completion'"):
        load_set("x", two, Recipe("m", prompt="ask", completion="completion", arguments={"task": "lm"}))
    recipe = load_recipe(recipe_of(home, "overridden"))
    assert recipe.task == "choice" and parse_arguments(recipe).task == "choice"
    with pytest.raises(ValueError, match="`scoring` must be one of per_token"):
        load_recipe(recipe_of(home, "overridden", scoring="sum"))
