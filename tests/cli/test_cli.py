"""The command line and recipes, end to end on a tiny model and text that it can learn."""

import json
import subprocess
import sys

import pytest
import torch
import yaml
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, MixtralConfig, MixtralForSequenceClassification

from hf_moecal.cli.commands import main
from hf_moecal.cli.recipe import Recipe, expand, load_recipe
from hf_moecal.cli.runs import parse_arguments
from hf_moecal.cli.sets import load_set
from tests.cli.helpers import WORDS, sentences, tokenizer


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a model, data and a recipe."""
    folder = tmp_path_factory.mktemp("home")
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, num_labels=2, pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    MixtralForSequenceClassification(config).save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    Dataset.from_list(sentences("film", 40)).to_parquet(str(folder / "film.parquet"))
    Dataset.from_list(sentences("food", 20, offset=24)).to_json(str(folder / "food.jsonl"))
    film = {"path": "${DATA}/film.parquet"}
    recipe = {
        "model": "${DATA}/model",
        "data": {
            "train": {**film, "where": {"split": "train"}},
            "validation": {**film, "where": {"split": "test"}},
        },
        "groups": {"film": {**film, "where": {"split": "test"}}, "food": {"path": "${DATA}/food.jsonl"}},
        "objective": "robust_filtered",
        "train": "last_moe_layer",
        "prefix_cache": "${DATA}/prefix",
        "output_dir": str(folder / "out"),
        "num_train_epochs": 4,
        "per_device_train_batch_size": 8,
        "learning_rate": 0.03,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@pytest.fixture(autouse=True)
def data_variable(monkeypatch, request):
    if "home" in request.fixturenames:
        monkeypatch.setenv("DATA", str(request.getfixturevalue("home")))


@pytest.fixture(scope="module")
def trained(home):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DATA", str(home))
        assert main(["train", "--config", str(home / "recipe.yaml"), "--eta", "1.5"]) == 0
        table = home / "table.parquet"
        arguments = ["--model", str(home / "out"), "--config", str(home / "recipe.yaml"), "--output", str(table)]
        assert main(["predict", *arguments]) == 0
        assert main(["predict", *arguments[:-1], str(home / "validation.parquet"), "--sets", "validation"]) == 0
    return home


def test_train_predict_evaluate(trained, capsys):
    AutoModelForSequenceClassification.from_pretrained(trained / "out")
    record = json.loads((trained / "out" / "moecal_training.json").read_text())
    assert record["settings"]["objective"] == "robust_filtered" and record["settings"]["eta"] == 1.5
    assert main(["evaluate", str(trained / "table.parquet"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report["groups"]) == {"film", "food"}
    assert report["groups"]["film"]["accuracy"] == 0.875
    assert main(["evaluate", str(trained / "table.parquet"), "--group", "split", "--bins", "5"]) == 0
    printed = capsys.readouterr().out
    assert "ECE" in printed and "test" in printed


def test_predict_by_a_mixture(trained, capsys):
    config = ["--model", str(trained / "out"), "--config", str(trained / "recipe.yaml")]
    made = trained / "mixture.parquet"
    mixed = ["--readout", "soft_mixture", "--readout-experts", "3"]
    assert main(["predict", *config, *mixed, "--output", str(made)]) == 2
    assert "The checkpoint's calibration is of its native readout, not of 'soft_mixture'" in capsys.readouterr().err
    assert main(["predict", *config, *mixed, "--raw", "--output", str(made)]) == 0
    row = Dataset.from_parquet(str(made))[0]
    assert row["readout"] == "soft_mixture of 3"
    alone = torch.tensor(row["expert_logits"]).double().softmax(-1)
    mixed = torch.tensor(row["expert_weights"]).double() @ alone
    assert row["probs"] == pytest.approx(mixed.tolist(), abs=1e-6)
    assert main(["predict", *config, "--readout", "blend", "--raw", "--output", str(made)]) == 2
    assert "`readout` must be one of native, mixture, soft_mixture, got 'blend'" in capsys.readouterr().err


def test_calibrate_refuses_training_rows_and_writes_beside_the_weights(trained, capsys):
    model = ["--model", str(trained / "out")]
    assert main(["calibrate", str(trained / "validation.parquet"), *model, "--method", "temperature"]) == 0
    assert (trained / "out" / "calibration.json").is_file()
    recipe = ["--config", str(trained / "recipe.yaml"), "--sets", "train"]
    assert main(["predict", *model, *recipe, "--output", str(trained / "train.parquet")]) == 0
    capsys.readouterr()
    assert main(["calibrate", str(trained / "train.parquet"), *model]) == 2
    assert "trained on" in capsys.readouterr().err
    assert main(["bake", *model, "--output", str(trained / "baked")]) == 0
    AutoModelForSequenceClassification.from_pretrained(trained / "baked")


def test_report_monitor_and_probe(trained, capsys):
    table = str(trained / "table.parquet")
    hard = str(trained / "hard.parquet")
    made = ["--config", str(trained / "recipe.yaml"), "--output", hard, "--hard-routing", "1"]
    assert main(["predict", "--model", str(trained / "out"), *made]) == 0
    sets = ["report", f"ours={table}", "--hard-routed", f"ours={hard}"]
    assert main([*sets, "--output", str(trained / "report")]) == 0
    assert json.loads((trained / "report" / "metrics.json").read_text())["routing"]["hard_against_soft"]
    assert (trained / "report" / "report.html").is_file()
    capsys.readouterr()
    assert main(["monitor", "--reference", table, "--current", table, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["exit_code"] == 0
    confident = Dataset.from_dict({"confidence": [0.999] * 60, "prediction": [1] * 60})
    unsure = Dataset.from_dict({"confidence": [0.6] * 60, "prediction": [1] * 60})
    for name, log in {"before": confident, "after": unsure}.items():
        log.to_parquet(str(trained / f"{name}.parquet"))
    both = ["--reference", str(trained / "before.parquet"), "--current", str(trained / "after.parquet")]
    assert main(["monitor", *both, "--correction", "benjamini-hochberg", "--output", str(trained / "watch")]) == 1
    assert "drift" in capsys.readouterr().out.lower() and (trained / "watch" / "metrics.prom").is_file()
    assert main(["probe", "--model", str(trained / "out"), "--text", "the film was good", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["layers"]) == 2 and len(found["layers"][0]["experts"]) == 2
    assert main(["probe", "--model", str(trained / "out"), "--text", "the film was good"]) == 0
    assert "The model predicts 'LABEL_1'" in capsys.readouterr().out


@pytest.mark.slow
def test_accelerate_launch_on_two_processes(home):
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "hf_moecal.cli", "train",
        "--config", str(home / "recipe.yaml"), "--output_dir", str(home / "two"), "--prefix_cache", str(home / "p2"),
    ]  # fmt: skip
    subprocess.run(command, check=True, timeout=300, capture_output=True)
    AutoModelForSequenceClassification.from_pretrained(home / "two")


def test_bad_commands_end_with_one_sentence(trained, capsys, tmp_path):
    (tmp_path / "bad.yaml").write_text("model: x\nobjectve: erm\n")
    (tmp_path / "list.yaml").write_text("- 1\n")
    for arguments, message in [
        (["train", "--config", "nowhere.yaml"], "No recipe at 'nowhere.yaml'"),
        (["train", "--config", str(tmp_path / "bad.yaml")], "unknown key 'objectve'; did you mean 'objective'?"),
        (["train", "--config", str(tmp_path / "list.yaml")], "must be a mapping"),
        (["train", "--config", str(trained / "recipe.yaml"), "--etaa", "1"], "Unknown arguments: --etaa 1"),
        (["train", "--config", str(trained / "recipe.yaml"), "--eta", "-1"], "`eta` must be a finite number"),
        (["evaluate"], "give either a predictions table or"),
        (["evaluate", "nowhere.parquet"], "No predictions table at 'nowhere.parquet'"),
        (["evaluate", str(trained / "table.parquet"), "--group", "sex"], "the table has no column 'sex'"),
        (["report", "x.parquet", "--output", "o"], "given as NAME=FILE, as in ERM=erm.parquet"),
        (
            ["predict", "--model", "m", "--config", str(trained / "recipe.yaml"), "--sets", "x", "--output", "o"],
            "has no set ['x']",
        ),
    ]:
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
    with pytest.raises(SystemExit):
        main(["evaluate", "t.parquet", "--unknown"])


def test_recipe_sets_are_checked(home, monkeypatch):
    recipe = load_recipe(home / "recipe.yaml")
    film = {"path": "${DATA}/film.parquet"}
    for spec, message in [
        ({"split": "train"}, "Set 'x' has no `path`"),
        ({"path": "${DATA}/none.parquet"}, "No file at"),
        ({**film, "split": "test"}, "Set 'x': a file has no split; choose rows with `where"),
        ({**film, "where": {"split": "dev"}}, "Set 'x' is empty"),
        ({**film, "where": {"fold": 1}}, "Set 'x' has no column 'fold'"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_set("x", spec, recipe)
    with pytest.raises(ValueError, match="Set 'x' has no column 'sentence'"):
        load_set("x", film, Recipe(model="m", text="sentence"))
    renamed = load_set("x", film, Recipe(model="m", label="label", text="text"))
    assert set(renamed.column_names) >= {"text", "label"}
    monkeypatch.delenv("DATA")
    with pytest.raises(ValueError, match=r"\$\{DATA\}, which is not set"):
        expand("${DATA}/x")
    monkeypatch.setenv("MOECAL_CACHE", "/somewhere")
    assert expand("${MOECAL_CACHE}/x") == "/somewhere/x"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("objective: erm", "has no `model`"),
        ("model: x\ndata: {trian: {path: y}}", "data has an unknown key 'trian'; did you mean 'train'"),
        ("model: x\ngroups: {a: {file: y}}", "a has an unknown key 'file'"),
        ("model: x\ngroups: {a: y}", "a must be a mapping"),
        ("model: [x", "is not valid YAML"),
    ],
)
def test_recipe_keys_are_checked(tmp_path, content, message):
    (tmp_path / "r.yaml").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_recipe(tmp_path / "r.yaml")


def test_overrides_beat_the_recipe(home):
    arguments = parse_arguments(load_recipe(home / "recipe.yaml"), ["--eta", "0.5", "--objective", "robust"])
    assert (arguments.eta, arguments.objective, arguments.learning_rate) == (0.5, "robust", 0.03)
    assert arguments.prefix_cache == str(home / "prefix")


def test_the_shipped_recipe_is_valid():
    from pathlib import Path

    recipe = load_recipe(Path(__file__).parents[2] / "recipes" / "quickstart.yaml")
    arguments = parse_arguments(recipe)
    assert arguments.objective == "robust_filtered" and set(recipe.groups) == {
        "movie",
        "tweets",
        "reviews",
        "editorials",
    }


def test_import_stays_light():
    code = "import sys, hf_moecal; print(sorted({'evaluate', 'datasets', 'matplotlib', 'peft'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
