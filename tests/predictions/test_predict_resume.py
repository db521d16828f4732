"""Tables that are written as they are made: killed, resumed, shared by processes."""

import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset

from hf_moecal import predict, predictions
from hf_moecal.table import read_table
from tests.predictions.helpers import lists, quiz
from tests.training.helpers import language_data, language_model


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(predictions, "PART_ROWS", 4)


ROWS = {"choice": quiz(14), "lm": lists(language_data(14))}
DIES = """
    import os, signal, sys
    sys.path.insert(0, {tests!r})
    from tests.predictions.test_predict_resume import run
    from hf_moecal import predictions
    predictions.PART_ROWS = 4
    forwards = []
    def die(module, args):
        forwards.append(0)
        if len(forwards) > {forwards}:
            os.kill(os.getpid(), signal.SIGKILL)
    from tests.training.helpers import language_model
    model = language_model()
    model.get_input_embeddings().register_forward_pre_hook(die)
    run({output!r}, {task!r}, model=model)
"""


def run(output, task="choice", *, model=None, rows=None, **settings):
    data = Dataset.from_list(ROWS[task] if rows is None else rows)
    settings = {"batch_size": 3, "progress": False, "layer": None, **settings}
    return predict(language_model() if model is None else model, data, task=task, output=output, **settings)


def killed(output, task, *, forwards):
    script = textwrap.dedent(DIES).format(
        tests=str(Path(__file__).parents[2]), forwards=forwards, output=str(output), task=task
    )
    ended = subprocess.run([sys.executable, "-c", script], timeout=120, capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr


@pytest.mark.parametrize(("task", "example"), [("choice", "sequence"), ("lm", "sequence"), ("lm", "token")])
def test_written_part_by_part_is_what_is_made_at_once(tmp_path, task, example):
    written = run(tmp_path / "table.parquet", task, example=example)
    at_once = run(None, task, example=example)
    assert written.column_names == at_once.column_names
    assert str(written[:]) == str(at_once[:])  # NaN too
    assert [path.name for path in tmp_path.iterdir()] == ["table.parquet"]


@pytest.mark.parametrize("task", ["choice", "lm"])
def test_a_killed_run_goes_on_and_ends_in_the_same_file(tmp_path, task):
    whole, halted = tmp_path / "whole.parquet", tmp_path / "halted.parquet"
    run(whole, task)
    killed(halted, task, forwards={"choice": 20, "lm": 3}[task])
    parts = halted.with_name("halted.parquet.parts")
    done = sorted(path.name for path in parts.glob("part-*.parquet"))
    assert 1 <= len(done) < 4 and not halted.exists()
    with pytest.raises(ValueError, match=r"holds the parts of a run that did not end; go on with it \(resume=True"):
        run(halted, task)
    kept = {name: (parts / name).stat().st_mtime_ns for name in done}
    model, seen = language_model(), []
    model.register_forward_pre_hook(
        lambda module, args: seen.append({n: (parts / n).stat().st_mtime_ns for n in done})
    )
    run(halted, task, model=model, resume=True)
    assert seen[-1] == kept  # finished parts were not made again
    assert halted.read_bytes() == whole.read_bytes()
    assert not parts.exists()
    forwards = len(seen)
    run(halted, task, model=model, resume=True)  # nothing left to do
    assert len(seen) == forwards


def test_what_differs_is_named(tmp_path):
    halted = tmp_path / "halted.parquet"
    killed(halted, "choice", forwards=20)
    other = language_model()
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1e-3
    changed = [dict(row) for row in ROWS["choice"]]
    changed[0] = {**changed[0], "options": ["y" for _ in changed[0]["options"]]}
    for settings, message in [
        ({"batch_size": 2}, "was made with batch_size 3, now 2. Resume with what it was begun with"),
        ({"scoring": "total"}, "scoring 'per_token', now 'total'"),
        ({"hard_top_k": 1}, "hard_top_k None, now 1"),
        ({"model": other}, "made with model '"),
        ({"rows": changed}, "made with other data"),
        ({"rows": ROWS["choice"][1:]}, "made with other data"),
    ]:
        with pytest.raises(ValueError, match=message):
            run(halted, resume=True, **settings)
    run(halted, resume=True)
    with pytest.raises(ValueError, match="halted.parquet was made with batch_size 3, now 2"):
        run(halted, resume=True, batch_size=2)
    run(halted, batch_size=2)  # without resume the table is made anew
    assert b'"batch_size": 2' in pq.read_schema(halted).metadata[b"hf_moecal"]


def test_bad_rows_are_named_by_their_place(tmp_path):
    rows = [dict(row) for row in ROWS["choice"]]
    rows[9] = {**rows[9], "label": 7}
    with pytest.raises(ValueError, match=r"Counted from row 8 of the dataset: Row 1: label 7 is no index"):
        run(tmp_path / "table.parquet", rows=rows)


@pytest.mark.slow
def test_two_processes_share_the_parts(tmp_path):
    script = tmp_path / "shared.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(Path(__file__).parents[2])!r})\n"
        "from accelerate import PartialState\n"
        "PartialState(cpu=True)\n"
        "from hf_moecal import predictions\n"
        "from tests.predictions.test_predict_resume import run\n"
        "predictions.PART_ROWS = 4\n"
        f"table = run({str(tmp_path / 'two.parquet')!r})\n"
        "assert len(table) == 14 and PartialState().num_processes == 2\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    ended = subprocess.run(command, timeout=300, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    run(tmp_path / "one.parquet")
    assert (tmp_path / "two.parquet").read_bytes() == (tmp_path / "one.parquet").read_bytes()
    assert read_table(tmp_path / "two.parquet")["id"][:] == list(range(14))
