"""Own files on the command line, without a recipe: what comes out, and what is refused."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    MixtralForSequenceClassification,
)

from hf_moecal.cli.commands import COMMANDS, main
from tests.cli.helpers import WORDS, sentences, tokenizer


PAGE = Path(__file__).parents[2] / "recipes" / "own_data.md"
TINY = ["--use_cpu", "True", "--report_to", "none", "--save_strategy", "no", "--disable_tqdm", "True"]
TINY += ["--num_train_epochs", "3", "--per_device_train_batch_size", "8", "--learning_rate", "0.03"]


def tiny_config(**changes):
    return MixtralConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, pad_token_id=0, initializer_range=0.3, **changes,
    )  # fmt: skip


def reviews(topic, count, names=("unhappy", "happy")):
    return [{"review": row["text"], "mood": names[row["label"]], "topic": topic} for row in sentences(topic, count)]


def write_csv(path, rows, sep=","):
    lines = [sep.join(rows[0]), *(sep.join(map(str, row.values())) for row in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a classifier whose names are not in the order of the alphabet, a language model, and files."""
    folder = tmp_path_factory.mktemp("own")
    torch.manual_seed(0)
    names = {0: "unhappy", 1: "happy"}
    config = tiny_config(id2label=names, label2id={name: number for number, name in names.items()})
    MixtralForSequenceClassification(config).save_pretrained(folder / "classifier")
    MixtralForCausalLM(tiny_config()).save_pretrained(folder / "language")
    for name in ("classifier", "language"):
        tokenizer().save_pretrained(folder / name)
    write_csv(folder / "reviews.csv", reviews("film", 60) + reviews("food", 60))
    write_csv(folder / "other.csv", reviews("food", 40))
    return folder


@pytest.fixture(autouse=True)
def at_home(home, monkeypatch):
    monkeypatch.chdir(home)


def run(line, *more):
    return main([*shlex.split(line)[1:], *more])


def test_the_page_runs_as_it_stands(home, capsys, monkeypatch):
    """Each command of the page, on a tiny checkpoint and files of the page's columns."""
    write_csv(home / "train.csv", reviews("film", 40))
    write_csv(home / "validation.csv", reviews("film", 40))
    questions = [{"question": row["text"], "answer": "AB"[row["label"]]} for row in sentences("film", 24)]
    write_csv(home / "questions.csv", questions)
    blocks = re.findall(r"```console\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    commands = [c for block in blocks for c in re.split(r"^\$ ", block.replace("\\\n", " "), flags=re.M) if c.strip()]
    assert [command.split()[1] for command in commands[:3]] == ["check", "calibrate", "check"]
    for command in commands:
        command = command.replace("my-checkpoint", "classifier").replace("my-language-model", "language")
        more = TINY if command.startswith("moecal train") else []
        assert run(command.split("#")[0], *more) == 0, capsys.readouterr().err
    assert "calibrated" in capsys.readouterr().out
    assert (home / "moecal-check" / "report.html").is_file()


def test_check_judges_each_group_and_maps_names(home, capsys):
    line = "moecal check --model classifier --data reviews.csv --text review --label mood --group topic --raw"
    assert run(line, "--output", "checked", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    table = Dataset.from_parquet(found["predictions"])
    assert [row["set"] for row in found["rows"]] == ["film", "food"] and set(table["group"]) == {"film", "food"}
    assert table["label"][:] == [{"unhappy": 0, "happy": 1}[row["mood"]] for row in reviews("film", 60)] * 2
    assert set(found["trusted"]) | set(found["not_trusted"]) == {"film", "food"}
    right = sum(a == b for a, b in zip(table["label"][:60], table["prediction"][:60], strict=True)) / 60
    assert found["rows"][0]["accuracy"] == pytest.approx(right)
    assert run(line, "--output", "checked") == 0
    assert found["sentence"] in capsys.readouterr().out


def test_every_kind_of_file_gives_the_same_table(home, tmp_path, capsys):
    rows = reviews("film", 24)
    write_csv(tmp_path / "a.csv", rows)
    write_csv(tmp_path / "b.csv", rows, ";")
    write_csv(tmp_path / "c.tsv", rows, "\t")
    (tmp_path / "d.csv").write_bytes((tmp_path / "a.csv").read_text().encode("utf-16"))
    (tmp_path / "e.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "f.json").write_text(json.dumps(rows))
    Dataset.from_list(rows).to_parquet(str(tmp_path / "g.parquet"))
    files = sorted(tmp_path.iterdir())
    line = "moecal predict --model classifier --text review --label mood --max-length 4 --output all.parquet --data"
    assert run(line, *map(str, files)) == 0
    assert "texts are longer than max_length (4 tokens) and were cut" in capsys.readouterr().out
    table = Dataset.from_parquet("all.parquet")
    first = table.select(range(24))
    for number, file in enumerate(files):
        part = table.select(range(24 * number, 24 * number + 24))
        assert set(part["group"]) == {file.stem}
        assert part["logits"][:] == first["logits"][:] and part["label"][:] == first["label"][:]
        assert part["truncated"][:] == [len(row["review"].split()) > 4 for row in rows]


def test_predict_applies_what_the_checkpoint_carries(home, capsys):
    line = "moecal predict --model classifier --data reviews.csv --text review --label mood --output"
    assert run(line, "raw.parquet", "--raw") == 0
    assert run("moecal calibrate raw.parquet --model classifier --method temperature --json") == 0
    assert run(line, "applied.parquet") == 0
    assert "Calibrated by temperature, which the checkpoint carries (--raw leaves it out)" in capsys.readouterr().out
    raw, applied = Dataset.from_parquet("raw.parquet"), Dataset.from_parquet("applied.parquet")
    temperature = json.loads((home / "classifier" / "calibration.json").read_text())["parameters"]["temperature"]
    assert abs(temperature - 1) > 0.05
    expected = (torch.tensor(raw["logits"][:]).double() / temperature).softmax(-1)
    torch.testing.assert_close(torch.tensor(applied["probs"][:]).double(), expected, rtol=0, atol=1e-6)
    assert applied["logits"][:] == raw["logits"][:] and set(applied["calibration"]) == {"temperature"}
    assert "calibration" not in raw.column_names
    with pytest.raises(SystemExit):
        run("moecal predict --model classifier --dat x --output y")
    assert "did you mean --data?" in capsys.readouterr().err
    (home / "classifier" / "calibration.json").unlink()


def test_train_writes_the_recipe_that_repeats_it(home, capsys):
    line = "moecal train --model language --data reviews.csv --text review --label mood --eval food=other.csv --output"
    assert run(line, "fresh", *TINY) == 0
    printed = capsys.readouterr().out
    assert "food" in printed and "ECE" in printed
    config = AutoModelForSequenceClassification.from_pretrained("fresh").config
    assert config.id2label == {0: "happy", 1: "unhappy"}  # a new head, with the training set's names
    recipe = yaml.safe_load(Path("fresh/recipe.yaml").read_text())
    assert recipe["learning_rate"] == 0.03 and recipe["data"]["train"] == {"path": str(home / "reviews.csv")}
    table = Dataset.from_parquet("fresh/predictions.parquet")
    assert table["label"][:] == [config.label2id[row["mood"]] for row in reviews("food", 40)]
    assert run(line, "fresh", *TINY, "--learning_rate", "0.01") == 2
    assert "is the recipe of another run" in capsys.readouterr().err
    assert run("moecal train --config fresh/recipe.yaml --output_dir again") == 0
    first, again = (AutoModelForSequenceClassification.from_pretrained(name) for name in ("fresh", "again"))
    for one, other in zip(first.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_answers_are_indices_texts_or_letters(home, capsys):
    labels = {"index": "01", "letter": "AB", "text": ("bad", "good")}
    for name, kind in labels.items():
        rows = [{"question": row["text"], "answer": kind[row["label"]]} for row in sentences("film", 12)]
        write_csv(home / f"{name}.csv", rows)
    line = "moecal predict --model language --task choice --prompt '{question} not' --options ' bad' ' good'"
    assert run(f"{line} --label answer --output choice.parquet --data index.csv letter.csv text.csv") == 0
    found = Dataset.from_parquet("choice.parquet")["label"][:]
    assert found[:12] == found[12:24] == found[24:] == [row["label"] for row in sentences("film", 12)]


MOODS = "--data reviews.csv --text review --label mood"
REFUSED = [
    (f"--model language {MOODS}", "language has no score.weight: it is a checkpoint without a classification head"),
    (f"--model classifier {MOODS} --task choice", "--text belongs to --task classification"),
    (f"--model classifier {MOODS} --text text", "has no column 'text', only ['review', 'mood', 'topic']"),
    ("--model classifier --data nowhere.csv --text review", "No file at"),
    ("--model classifier --data imdb --text review", "say which split, as in imdb:test"),
    (f"--model classifier {MOODS} --group sex", "has no column 'sex' to group by"),
    (f"--model classifier {MOODS} --labels happy=joyful", "--labels takes LABEL=CLASS"),
    (f"--model classifier {MOODS} --labels happy=1", "Say which class each is"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[message[:20] for _, message in REFUSED])
def test_what_is_refused_is_said_in_one_sentence(capsys, options, message):
    assert run(f"moecal check {options} --output refused") == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error, error
    assert not list(Path("refused").glob("*.parts/*"))  # so that the next one begins without --resume


def test_the_remedy_for_unknown_labels_works(home, capsys):
    write_csv(home / "german.csv", reviews("film", 24, names=("schlecht", "gut")))
    line = "moecal predict --model classifier --data german.csv --text review --label mood --output german.parquet"
    assert run(line) == 2
    error = capsys.readouterr().err
    assert "0: unhappy, 1: happy" in error
    option = re.search(r"--labels (\S+ \S+)", error).group(1)
    assert shlex.split(option) == ["schlecht=?", "gut=?"]
    assert run(line, "--labels", "schlecht=unhappy", "gut=happy") == 0
    assert Dataset.from_parquet("german.parquet")["label"][:] == [row["label"] for row in sentences("film", 24)]


def test_a_name_that_comes_twice_is_refused(capsys):
    assert run("moecal report a=x.parquet a=y.parquet --output r") == 2
    assert "the name 'a' is given twice, for x.parquet and y.parquet" in capsys.readouterr().err


@pytest.mark.parametrize("name", [command.name for command in COMMANDS])
def test_help_shows_an_example_that_the_parser_takes(capsys, name):
    with pytest.raises(SystemExit):
        main([name, "--help"])
    printed = capsys.readouterr().out
    command = next(command for command in COMMANDS if command.name == name)
    assert f"example:\n  {command.example}" in printed and "--json" in printed
    from hf_moecal.cli.commands import _parser

    options, rest = _parser().parse_known_args(shlex.split(command.example)[1:])
    assert options.command == name and (not rest or command.overrides)


def test_the_version_and_unknown_commands(capsys):
    import hf_moecal

    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0 and capsys.readouterr().out == f"moecal {hf_moecal.__version__}\n"
    with pytest.raises(SystemExit) as left:
        main(["evalute", "t.parquet"])
    assert left.value.code == 2 and "there is no command 'evalute'; did you mean evaluate?" in capsys.readouterr().err


def test_ctrl_c_says_what_is_kept(home, capsys, monkeypatch):
    import hf_moecal.predictions as predictions

    monkeypatch.setattr(predictions, "PART_ROWS", 50)
    real, calls = predictions._Making._part, []

    def stopped(self, *arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, *arguments)

    monkeypatch.setattr(predictions._Making, "_part", stopped)
    line = "moecal predict --model classifier --data reviews.csv --text review --label mood --output stopped.parquet"
    assert run(line) == 130
    error = capsys.readouterr().err
    assert "stopped.parquet.parts keeps 1 finished part; go on with the same command and --resume" in error
    monkeypatch.setattr(predictions._Making, "_part", real)
    assert run(line, "--resume") == 0
    assert len(Dataset.from_parquet("stopped.parquet")) == 120


def test_a_full_disk_names_the_file_and_what_is_kept(home, capsys, monkeypatch):
    import transformers.modeling_utils as modeling
    from safetensors import SafetensorError

    real, calls = modeling.safe_save_file, []

    def full(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        return real(*arguments, **options)

    monkeypatch.setattr(modeling, "safe_save_file", full)
    often = [*TINY, "--save_strategy", "steps", "--save_steps", "4"]
    line = "moecal train --model classifier --data reviews.csv --text review --label mood --output full"
    assert run(line, *often) == 2
    error = capsys.readouterr().err
    assert "the disk is full: writing full/checkpoint-8 takes up to" in error and "Traceback" not in error
    assert [path.name for path in Path("full").glob("checkpoint-*")] == ["checkpoint-4"]
    assert "full/checkpoint-4 is complete; go on from it with the same command and --resume." in error
    monkeypatch.setattr(modeling, "safe_save_file", real)
    assert run(line, *often, "--resume") == 0
    AutoModelForSequenceClassification.from_pretrained("full")
