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
        ([sample(0, [-1.0, -2.0], 5, acc=0.0)], r"target 5 is none of the choices 0\.\.1"),
        ([sample(0, [-1.0, -2.0], "[0, 1]")], "several right answers"),
        ([sample(0, [-1.0, -2.0], "elsewhere")], "text of exactly one"),
        ([sample(0, [-1.0, -2.0], 0, acc=0.0)], "the harness logged acc=0.0"),
        ([sample(0, [float("nan"), -2.0], 1)], "not a log-likelihood"),
        ([sample(0, [3.0, -2.0], 0)], "not a log-likelihood"),
        ([sample(0, [-1.0], 0)], "has 1 choice"),
        ([sample(0, [-1.0, -2.0], 0), sample(0, [-1.0, -2.0], 0, filter="other")], "repeats document 0"),
        ([], "holds no samples"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        read_lm_eval_samples(write(tmp_path / NAME, rows))


def test_files_that_are_missing_or_cut_off(tmp_path):
    with pytest.raises(ValueError, match="No logged samples"):
        read_lm_eval_samples(tmp_path / NAME)
    (tmp_path / NAME).write_text(json.dumps(sample(0, [-1.0, -2.0], 0))[:-20])
    with pytest.raises(ValueError, match="line 1 is not JSON"):
        read_lm_eval_samples(tmp_path / NAME)
