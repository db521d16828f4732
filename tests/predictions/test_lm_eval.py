"""Samples in the form that lm-evaluation-harness logs them, read into a predictions table."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from hf_moecal.metrics import table_report
from hf_moecal.predictions.lm_eval import read_lm_eval_samples


NAME = "samples_arc_easy_2025-03-01T10-00-00.123456.jsonl"


def sample(number, scores, target, **more):
    """One line as the harness writes it: numbers as text, arguments as a mapping of mappings."""
    prediction = scores.index(max(scores))
    return {
        "doc_id": number,
        "doc": {"question": f"q{number}"},
        "target": str(target),
        "arguments": {f"gen_args_{i}": {"arg_0": f"q{number}", "arg_1": f" choice {i}"} for i in range(len(scores))},
        "resps": [[[str(score), "False"]] for score in scores],
        "filtered_resps": [[str(score), "False"] for score in scores],
        "filter": "none",
        "metrics": ["acc", "acc_norm"],
        "acc": float(str(prediction) == str(target) or f"choice {prediction}" == target),
        **more,
    }


def write(path, samples):
    path.write_text("".join(json.dumps(row) + "\n" for row in samples), encoding="utf-8")
    return path


def test_a_task_becomes_a_table(tmp_path):
    rows = [sample(0, [-1.0, -2.0, -3.0], 0), sample(1, [-4.0, -1.5, -2.5], 2), sample(2, [-2.0, -9.0], "choice 1")]
    table = read_lm_eval_samples(write(tmp_path / NAME, rows))
    assert table["id"][:] == ["arc_easy/0", "arc_easy/1", "arc_easy/2"]
    assert table["group"][:] == ["arc_easy"] * 3
    assert table["label"][:] == [0, 2, 1] and table["prediction"][:] == [0, 1, 0]
    weights = [math.exp(s) for s in (-1.0, -2.0, -3.0)]
    np.testing.assert_allclose(table["probs"][0], np.array(weights) / sum(weights), rtol=1e-12)
    assert table["probs"][2][2] == 0.0 and table["confidence"][2] == pytest.approx(1 / (1 + math.exp(-7)))
    report = table_report(table, intervals=False)
    assert report["accuracy"] == pytest.approx(1 / 3) and report["n"] == 3
    nll = [-math.log(table["probs"][i][label]) for i, label in enumerate([0, 2, 1])]
    assert report["nll"] == pytest.approx(np.mean(nll), abs=1e-12)


def test_numbers_as_numbers_and_arguments_as_lists(tmp_path):
    row = sample(0, [-1.0, -2.0], 0)
    row |= {"target": 0, "filtered_resps": [[-1.0, False], [-2.0, True]], "arguments": [["q", " a"], ["q", " b"]]}
    assert read_lm_eval_samples(write(tmp_path / NAME, [row]))["label"][:] == [0]
    row |= {"target": "b", "acc": 0.0}
    assert read_lm_eval_samples(write(tmp_path / NAME, [row]))["label"][:] == [1]


def test_mutual_information_takes_the_conditional_half(tmp_path):
    row = sample(0, [-1.0, -2.0, -0.5, -0.1], 0, metrics=["acc", "acc_mutual_info"], acc=1.0, acc_mutual_info=0.0)
    assert read_lm_eval_samples(write(tmp_path / NAME, [row]))["logits"][0] == [-1.0, -2.0]


def test_a_folder_gives_one_group_per_task(tmp_path):
    write(tmp_path / NAME, [sample(0, [-1.0, -2.0], 0)])
    write(tmp_path / NAME.replace("arc_easy", "piqa"), [sample(0, [-1.0, -2.0, -3.0], 1)])
    (tmp_path / "results_2025.json").write_text("{}")
    table = read_lm_eval_samples(tmp_path)
    assert table["group"][:] == ["arc_easy", "piqa"]
    assert set(table_report(table)["groups"]) == {"arc_easy", "piqa"}


def test_a_question_without_an_answer_is_ignored(tmp_path):
    rows = [sample(0, [-1.0, -2.0], 0), sample(1, [-1.0, -2.0], -100, acc=0.0)]
    report = table_report(read_lm_eval_samples(write(tmp_path / NAME, rows)))
    assert (report["n"], report["n_ignored"]) == (1, 1)


@pytest.mark.parametrize(
    "rows, message",
    [
        ([{"doc_id": 0}], "line 1 has no 'target' and 'filtered_resps'"),
        ([[1, 2]], "no 'target'"),
        ([sample(0, [-1.0, -2.0], 0) | {"filtered_resps": ["The answer is 4"]}], "generated text cannot be read"),
        ([sample(0, [-1.0, -2.0], 5, acc=0.0)], "target '5' is neither the number of a choice .0 to 1. nor"),
        ([sample(0, [-1.0, -2.0], "[0, 5]")], "target '.0, 5.' is neither the number"),
        ([sample(0, [-1.0, -2.0], "[0, 1]", acc=0.0)], "the harness logged acc=0.0"),
        ([sample(0, [-1.0, -2.0], 0, acc_norm=0.0)], "the harness logged acc=1.0, acc_norm=0.0"),
        ([sample(0, [-1.0, -2.0], "elsewhere")], "text of exactly one"),
        ([sample(0, [-1.0, -2.0], 0, acc=0.0)], "the harness logged acc=0.0"),
        ([sample(0, [float("nan"), -2.0], 1)], "not a log-likelihood"),
        ([sample(0, [3.0, -2.0], 0)], "not a log-likelihood"),
        ([sample(0, [-1.0], 0)], "has 1 choice"),
        ([sample(0, [-1.0, -2.0], 0), sample(0, [-1.0, -2.0], 0)], "repeats document 0 of the same run"),
        ([], "holds no samples"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        read_lm_eval_samples(write(tmp_path / NAME, rows))


def numerals(number, texts, scores, target, acc, **more):
    arguments = {f"gen_args_{i}": {"arg_0": "q", "arg_1": f" {text}"} for i, text in enumerate(texts)}
    return sample(number, scores, target, **{"arguments": arguments, "acc": acc, **more})


def test_choices_that_are_numerals(tmp_path):
    texts, scores = ["3", "1", "2", "0"], [-1.0, -2.0, -3.0, -4.0]
    as_text = [numerals(0, texts, scores, "3", 1.0), numerals(1, texts, scores[::-1], "3", 0.0)]
    assert read_lm_eval_samples(write(tmp_path / NAME, as_text))["label"][:] == [0, 0]
    as_number = [numerals(0, texts, scores, "3", 0.0), numerals(1, texts, scores[::-1], "3", 1.0)]
    assert read_lm_eval_samples(write(tmp_path / NAME, as_number))["label"][:] == [3, 3]
    both = [numerals(0, texts, scores, "3", 1.0), numerals(1, texts, scores[::-1], "3", 1.0)]
    with pytest.raises(ValueError, match="only as numbers of choices, others only as their texts"):
        read_lm_eval_samples(write(tmp_path / NAME, both))
    by_length = [numerals(0, texts, scores, "3", None, acc_norm=0.0)]  # all of one length: choice 0 is the likeliest
    assert read_lm_eval_samples(write(tmp_path / NAME, by_length))["label"][:] == [3]


def test_two_runs_of_a_task_are_not_mixed(tmp_path):
    scores = [[-1.0, -2.0], [-2.0, -1.0]]
    for date, own in zip(("2025-03-01", "2025-04-01"), scores, strict=True):
        write(tmp_path / f"samples_arc_easy_{date}T10-00-00.1.jsonl", [sample(0, own, 0)])
    write(tmp_path / "samples_piqa_2025-03-01T10-00-00.1.jsonl", [sample(0, scores[0], 0)])
    with pytest.warns(
        UserWarning, match="samples_arc_easy_2025-04-01T10-00-00.1.jsonl is read, samples_arc_easy_2025"
    ):
        table = read_lm_eval_samples(tmp_path)
    assert table["id"][:] == ["arc_easy/0", "piqa/0"] and table["prediction"][:] == [1, 0]
    with pytest.warns(UserWarning, match="was run several times"):
        assert read_lm_eval_samples(tmp_path, run="2025-03-01")["prediction"][:] == [0, 0]
    with pytest.raises(ValueError, match="0 runs of arc_easy .* begin with '2024'; those that are there: 2025-03-01T"):
        read_lm_eval_samples(tmp_path, run="2024")


def test_a_generative_task_in_a_folder_is_left_out(tmp_path):
    write(tmp_path / NAME, [sample(0, [-1.0, -2.0], 0)])
    generated = write(tmp_path / NAME.replace("arc_easy", "gsm8k"), [sample(0, [-1.0], 0, filtered_resps=["4"])])
    with pytest.warns(UserWarning, match="gsm8k.*is left out.*generated text cannot be read"):
        assert read_lm_eval_samples(tmp_path)["group"][:] == ["arc_easy"]
    (tmp_path / NAME).unlink()
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="No multiple-choice task among"):
        read_lm_eval_samples(tmp_path)
    with pytest.raises(ValueError, match="generated text cannot be read"):
        read_lm_eval_samples(generated)


def test_one_of_several_filters_is_read(tmp_path):
    rows = [sample(0, [-1.0, -2.0], 0, filter="none"), sample(0, [-2.0, -1.0], 0, acc=0.0, filter="other")]
    write(tmp_path / NAME, rows)
    with pytest.raises(ValueError, match="repeats document 0; choose one of its filters.*none, other"):
        read_lm_eval_samples(tmp_path / NAME)
    for name, expected in (("none", 0), ("other", 1)):
        assert read_lm_eval_samples(tmp_path / NAME, filter=name)["prediction"][:] == [expected]
    with pytest.raises(ValueError, match="no samples of filter 'third'; its filters are"):
        read_lm_eval_samples(tmp_path / NAME, filter="third")


def test_contexts_that_are_the_choices(tmp_path):
    def winogrande(number, scores, acc):  # the same text follows each filled-in sentence
        arguments = {f"gen_args_{i}": {"arg_0": f"the {name}", "arg_1": " fell."} for i, name in enumerate("ab")}
        return sample(number, scores, "fell.", arguments=arguments, acc=acc, metrics=["acc"])

    rows = [winogrande(0, [-1.0, -2.0], 1.0), winogrande(1, [-1.0, -2.0], 0.0), winogrande(2, [-2.0, -1.0], 1.0)]
    assert read_lm_eval_samples(write(tmp_path / NAME, rows))["label"][:] == [0, 1, 1]


def test_several_right_choices(tmp_path):
    rows = [sample(0, [-3.0, -1.0, -2.0], "[0, 2]", acc=0.0), sample(1, [-3.0, -2.0, -1.0], "[0, 2]", acc=1.0)]
    rows.append(sample(2, [-3.0, -2.0, -1.0], "['choice 1', 'choice 2']", acc=1.0))
    with pytest.warns(UserWarning, match="3 questions .* have several right choices; the likeliest"):
        table = read_lm_eval_samples(write(tmp_path / NAME, rows))
    assert table["label"][:] == [2, 2, 2] and table_report(table, intervals=False)["accuracy"] == pytest.approx(2 / 3)


def test_files_that_are_missing_or_cut_off(tmp_path):
    with pytest.raises(ValueError, match="No logged samples"):
        read_lm_eval_samples(tmp_path / NAME)
    (tmp_path / NAME).write_text(json.dumps(sample(0, [-1.0, -2.0], 0))[:-20])
    with pytest.raises(ValueError, match="line 1 is not JSON"):
        read_lm_eval_samples(tmp_path / NAME)
