"""Logs as servers leave them: rotated, live, begun again, by time; and the exit code in each case."""

import gzip
import io
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from hf_moecal.cli.commands import main
from hf_moecal.drift.monitor import monitor
from tests.drift.helpers import REFERENCE, make_log, read_jsonl, rounded, rows_of, write_jsonl, write_parquet


ROWS = rows_of(make_log(1000, seed=2))


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def renamed(path):
    path.rename(path.with_name(path.name + ".1"))


def renamed_by_date(path):
    path.rename(path.with_name("log-20250101.jsonl"))


def copied_and_truncated(path):
    shutil.copy(path, path.with_name(path.name + ".1"))
    os.truncate(path, 0)


@pytest.mark.parametrize("rotate", [renamed, renamed_by_date, copied_and_truncated])
@pytest.mark.parametrize("successor", [30, 600], ids=["shorter than before", "longer than before"])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_rotated_log_is_read_to_its_end_and_on(rotate, successor, kind, tmp_path):
    folder = tmp_path / "logs"
    folder.mkdir()
    log, out = folder / "log.jsonl", tmp_path / "out"
    settings = {"window": 50, "state": out / "state", "output_dir": out}
    source = log if kind == "file" else folder
    log.write_text(lines(ROWS[:200]))
    monitor(REFERENCE, source, **settings)
    with log.open("a") as file:
        file.write(lines(ROWS[200:300]))  # not read before the rotation
    rotate(log)
    with log.open("a") as file:
        file.write(lines(ROWS[300 : 300 + successor]))
    monitor(REFERENCE, source, **settings)
    result = monitor(REFERENCE, source, **settings)  # nothing is read twice
    assert not result.windows
    end = 300 + successor
    assert result.totals["rows"] + result.open_sequences == end
    wanted = monitor(REFERENCE, make_log(1000, seed=2), window=50).to_dict()["windows"][: end // 50]
    assert rounded(read_jsonl(out / "windows.jsonl")) == rounded(wanted)


def test_a_log_rotated_twice(tmp_path):
    log, settings = tmp_path / "log.jsonl", {"window": 50, "state": tmp_path / "state"}
    for begin in range(0, 500, 100):
        log.write_text(lines(ROWS[begin : begin + 70]))
        monitor(REFERENCE, log, **settings)
        with log.open("a") as file:
            file.write(lines(ROWS[begin + 70 : begin + 100]))
        if (tmp_path / "log.jsonl.1").exists():
            (tmp_path / "log.jsonl.1").rename(tmp_path / f"log.jsonl.{2 + begin // 100}")
        log.rename(tmp_path / "log.jsonl.1")
        result = monitor(REFERENCE, log, **settings)  # while there is no log.jsonl
    assert result.totals["rows"] == 500


def test_a_rest_that_is_gone_is_said(tmp_path, caplog):
    log, settings = tmp_path / "log.jsonl", {"window": 50, "state": tmp_path / "state"}
    log.write_text(lines(ROWS[:200]))
    monitor(REFERENCE, log, **settings)
    (tmp_path / "log.jsonl.1.gz").write_bytes(gzip.compress(log.read_bytes()))
    log.write_text(lines(ROWS[200:300]))
    result = monitor(REFERENCE, log, **settings)
    assert result.totals["rows"] == 300 and "log.jsonl was replaced" in caplog.text


def test_a_parquet_file_of_the_same_name_is_another(tmp_path, caplog):
    log, settings = tmp_path / "log.parquet", {"window": 50, "state": tmp_path / "state"}
    write_parquet(log, make_log(100, seed=3))
    monitor(REFERENCE, log, **settings)
    write_parquet(log, make_log(250, seed=4))
    result = monitor(REFERENCE, log, **settings)
    assert result.totals["rows"] == 350 and "was replaced" in caplog.text
    grown = {
        name: values + more
        for (name, values), more in zip(make_log(250, seed=4).items(), make_log(50).values(), strict=True)
    }
    write_parquet(log, grown)
    assert monitor(REFERENCE, log, **settings).totals["rows"] == 400


@pytest.mark.parametrize("setting", ["state", "follow"])
def test_a_log_without_end_needs_windows(setting, tmp_path):
    value = {"state": tmp_path / "state", "follow": 1.0}[setting]
    with pytest.raises(ValueError, match="give `window`"):
        monitor(REFERENCE, make_log(10), **{setting: value})


def test_a_live_stream_is_tested_while_it_lives(tmp_path):
    """The window of the first 100 lines comes although the writer neither ends nor writes 65,536 lines."""
    reference = write_parquet(tmp_path / "reference.parquet", REFERENCE)
    command = [sys.executable, "-m", "hf_moecal.cli", "monitor", "--reference", reference, "--current", "-"]
    process = subprocess.Popen(
        [*map(str, command), "--window", "100"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    process.stdin.write(lines(ROWS[:110]))
    process.stdin.flush()
    assert process.stdout.readline().startswith("window 0: 100 sequences, no drift")
    rest, _ = process.communicate()
    assert rest.startswith("window 1: 10 sequences") and process.returncode == 0


def test_one_bad_first_line_of_a_live_stream_is_a_bad_row(monkeypatch):
    content = b'{"confidence": 0.5}\n' + lines(ROWS[:300]).encode()
    raw = io.BytesIO(content)
    raw.read1 = lambda size=-1, read=raw.read: read(40)  # forty bytes at a time
    monkeypatch.setattr(sys, "stdin", type("Stdin", (), {"buffer": raw}))
    result = monitor(REFERENCE, "-", window=100)
    assert [w.sequences for w in result.windows] == [100, 100, 100] and sum(result.totals["rejected"].values()) == 1


def test_lines_of_earlier_calls_stay(tmp_path):
    for seed in (2, 3):
        monitor(REFERENCE, make_log(100, seed=seed), window=50, output_dir=tmp_path)
    assert [window["index"] for window in read_jsonl(tmp_path / "windows.jsonl")] == [0, 1, 0, 1]
    log = write_jsonl(tmp_path / "log.jsonl", ROWS[:100])
    monitor(REFERENCE, log, window=50, output_dir=tmp_path, state=tmp_path / "state")
    assert len(read_jsonl(tmp_path / "windows.jsonl")) == 6


@pytest.mark.parametrize("kind", ["iso", "seconds", "parquet"])
def test_windows_by_time_carry_time_and_ids(kind, tmp_path):
    rng = np.random.default_rng(0)
    begin = 1_735_689_600  # 2025-01-01, midnight UTC
    seconds = np.sort(rng.uniform(begin, begin + 3 * 3600, 600))
    seconds[300] -= 4000  # a late row goes into the window that is open
    iso = [str(np.datetime64(int(s * 1e6), "us")) + "Z" for s in seconds]
    log = make_log(600, seed=2)
    if kind == "parquet":
        source = write_parquet(tmp_path / "log.parquet", {**log, "time": (seconds * 1e6).astype("datetime64[us]")})
    else:
        source = write_jsonl(
            tmp_path / "log.jsonl", rows_of({**log, "time": iso if kind == "iso" else seconds.tolist()})
        )
    result = monitor(REFERENCE, source, window="1h")
    slots = np.maximum.accumulate((seconds - begin) // 3600)
    assert [window.sequences for window in result.windows] == np.bincount(slots.astype(int)).tolist()
    assert [window.complete for window in result.windows] == [True, True, False]
    first, second = result.windows[:2]
    assert (
        first.first_id == "r0"
        and first.last_id == f"r{first.sequences - 1}"
        and second.first_id == f"r{first.sequences}"
    )
    assert first.first_time.startswith("2025-01-01T00:") and second.last_time.startswith("2025-01-01T01:")


def test_rows_without_a_usable_time_are_set_aside(tmp_path):
    times = [1e9, None, "yesterday", 1.7e12, "2025-01-01T00:00:00+01:00"]
    rows = [{**row, "time": time} for row, time in zip(ROWS, times, strict=False)]
    result = monitor(REFERENCE, write_jsonl(tmp_path / "log.jsonl", rows), window="1d")
    assert result.totals["rejected"] == {"unusable time": 3} and sum(w.sequences for w in result.windows) == 2
    with pytest.raises(ValueError, match="no column 'time'"):
        monitor(REFERENCE, make_log(10), window="1d")
    with pytest.raises(ValueError, match="15min"):
        monitor(REFERENCE, make_log(10), window="an hour")


def labelled(n, drop, seed):
    rng = np.random.default_rng(seed)
    confidence = rng.beta(9, 2, n)
    correct = rng.random(n) < confidence - drop
    return {"id": list(range(n)), "confidence": confidence, "prediction": np.zeros(n, int), "label": (~correct) * 1}


def test_late_labels_alarm_with_a_line_and_metrics(tmp_path, capsys):
    reference, log = labelled(5000, 0, 0), labelled(4000, 0.08, 1)
    later = labelled(2000, 0, 2)
    log = {name: np.concatenate([log[name], later[name]]) for name in log}
    log["id"] = 2**63 + np.arange(6000, dtype=object)  # beyond 64 bits with a sign
    paths = [write_parquet(tmp_path / "reference.parquet", reference)]
    rows = [{"id": int(i), "confidence": float(c), "prediction": int(p)}
            for i, c, p in zip(log["id"], log["confidence"], log["prediction"], strict=True)]  # fmt: skip
    paths += [write_jsonl(tmp_path / "log.jsonl", rows)]
    labels = [{"id": int(i), "label": int(y)} for i, y in zip(log["id"], log["label"], strict=True)]
    paths += [write_jsonl(tmp_path / "labels.jsonl", labels)]
    options = [f"--{name}={path}" for name, path in zip(("reference", "current", "labels"), paths, strict=True)]
    assert main(["monitor", *options, "--window", "1000", "--output", str(tmp_path / "out")]) == 1
    text = capsys.readouterr().out
    assert "no drift" in text and "6,000 labels: accuracy" in text and "DRIFT in accuracy" in text
    metrics = (tmp_path / "out" / "metrics.prom").read_text()
    assert "moecal_labelled_drift 1.0" in metrics and "moecal_labelled_accuracy 0.7" in metrics
    found = monitor(reference, paths[1], labels=paths[2], window=1000).labelled
    assert [part["drift"] for part in found["windows"]] == [True] * 4 + [False] * 2
    assert found["windows"][1]["first_id"] == str(2**63 + 1000) and found["windows"][0]["n"] == 1000
    low, high = found["windows"][0]["accuracy_interval"]
    assert low < found["windows"][0]["accuracy"] < high and found["rows_without_label"] == 0


def test_labels_of_the_same_model_do_not_alarm():
    reference, drifted = labelled(5000, 0, 0), 0
    for seed in range(1, 16):
        log = labelled(2000, 0, seed)
        found = monitor(reference, log, labels={name: log[name] for name in ("id", "label")}, window=500).labelled
        drifted += sum(part["drift"] for part in found["windows"])
    assert drifted <= 4  # of 60, at 0.01


def test_labels_of_interleaved_conversations_do_not_alarm():
    """Correctness that whole conversations share: 20 conversations are not 1,000 rows."""

    def conversations(n, seed):
        rng = np.random.default_rng(seed)
        owner = rng.permutation(np.repeat(np.arange(n), 50))
        correct = np.where(rng.random(n) < 0.8, 1, 0)[owner] ^ (rng.random(len(owner)) < 0.02)
        return {"id": np.arange(len(owner)), "user": owner.astype(str), "confidence": np.full(len(owner), 0.79),
                "prediction": np.zeros(len(owner), int), "label": 1 - correct}  # fmt: skip

    drifted = 0
    for seed in range(10):
        log = conversations(20, 100 + seed)
        labels = {name: log[name] for name in ("id", "label")}
        drifted += monitor(conversations(200, seed), log, labels=labels, sequence="user").labelled["drift"]
    assert drifted <= 2


@pytest.mark.parametrize("broken", ["reference", "labels", "crash"])
def test_what_breaks_ends_with_2(broken, tmp_path, monkeypatch, capsys):
    paths = {
        "reference": write_jsonl(tmp_path / "reference.jsonl", ROWS),
        "current": write_jsonl(tmp_path / "log.jsonl", ROWS),
    }
    paths["labels"] = write_jsonl(tmp_path / "labels.jsonl", ROWS)
    if broken == "crash":
        monkeypatch.setattr("hf_moecal.drift.monitor.monitor", lambda *_, **__: 1 / 0)
    else:
        paths[broken].write_text('{"id": 3, "confid\n{{{')
    assert main(["monitor", *(f"--{name}={path}" for name, path in paths.items())]) == 2
    assert ("ZeroDivisionError" in capsys.readouterr().err) == (broken == "crash")
