"""The monitor on files: formats, bad rows, sequences, labels, exit codes, and being killed."""

import io
import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from hf_moecal.drift import log_reader
from hf_moecal.drift.monitor import monitor
from tests.drift.helpers import REFERENCE, make_log, read_jsonl, rounded, rows_of, write_jsonl, write_parquet


def test_every_format_gives_the_same_windows(tmp_path, monkeypatch):
    log = make_log(900, shift=1, seed=2)
    jsonl = write_jsonl(tmp_path / "log.jsonl", rows_of(log))
    parquet = write_parquet(tmp_path / "log.parquet", log, row_group_size=130)
    folder = tmp_path / "folder"
    folder.mkdir()
    for i, part in enumerate(np.array_split(np.arange(900), 3)):
        piece = {name: [values[j] for j in part] for name, values in log.items()}
        write_parquet(folder / f"{i}.parquet", piece) if i else write_jsonl(folder / "0.jsonl", rows_of(piece))
    settings = {"window": 250, "features": ["language"]}
    wanted = monitor(REFERENCE, log, **settings).to_dict()
    assert [w["sequences"] for w in wanted["windows"]] == [250, 250, 250, 150]
    assert [w["complete"] for w in wanted["windows"]] == [True, True, True, False]
    monkeypatch.setattr(log_reader, "CHUNK_ROWS", 97)
    for source in (jsonl, parquet, folder):
        found = monitor(REFERENCE, str(source), **settings).to_dict()
        # KS, counts and their tests are whole numbers underneath; only means depend on the order of summation.
        assert json.dumps(rounded(found)) == json.dumps(rounded(wanted)), source
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(jsonl.read_bytes())))
    assert rounded(monitor(REFERENCE, "-", **settings).to_dict()) == rounded(wanted)


def test_exit_codes_and_what_drifted(tmp_path):
    fine = monitor(REFERENCE, make_log(800, seed=3), features=["language"])
    assert (fine.exit_code, fine.windows[0].drift) == (0, False)
    drifted = monitor(REFERENCE, make_log(800, shift=1, seed=3), features=["language"])
    assert drifted.exit_code == 1
    moved = {f.feature for f in drifted.windows[0].features if f.drift}
    assert {"confidence", "routing_entropy", "disagreement"} <= moved and "language" not in moved
    assert "DRIFT in" in str(drifted.windows[0])


def test_probabilities_stand_for_confidence_and_prediction():
    rng = np.random.default_rng(0)
    probs = rng.dirichlet([3, 1], 400)
    by_hand = {"confidence": probs.max(axis=1).tolist(), "prediction": probs.argmax(axis=1).tolist()}
    given = monitor({"probs": probs.tolist()}, {"probs": probs.tolist()}).to_dict()
    assert given == monitor(by_hand, by_hand).to_dict()


def test_tokens_of_a_sequence_are_one_observation(tmp_path):
    rng = np.random.default_rng(0)

    def tokens(sequences):
        level = rng.normal(size=sequences)
        lengths = rng.integers(1, 30, sequences)
        owner = np.repeat(np.arange(sequences), lengths)
        return {
            "doc": [f"d{i}" for i in owner],
            "entropy": (level[owner] + 0.1 * rng.normal(size=len(owner))).tolist(),
            "token": rng.integers(0, 3, len(owner)).astype(str).tolist(),
        }

    reference, current = tokens(400), tokens(90)
    settings = {"features": ["entropy", "token"], "sequence": "doc", "window": 40}
    whole = monitor(reference, current, **settings)
    assert [w.sequences for w in whole.windows] == [40, 40, 10]
    assert sum(w.rows for w in whole.windows) == len(current["doc"])
    by_doc = [np.mean(list(g)) for g in _groups(current["doc"], current["entropy"])]
    means = [np.mean(list(g)) for g in _groups(reference["doc"], reference["entropy"])]
    from scipy import stats

    entropy = next(f for f in whole.windows[0].features if f.feature == "entropy")
    assert entropy.effect == pytest.approx(stats.ks_2samp(means, by_doc[:40]).statistic)


def _groups(keys, values):
    from itertools import groupby

    return (
        [value for _, value in group] for _, group in groupby(zip(keys, values, strict=True), lambda pair: pair[0])
    )


def test_a_sequence_may_lie_across_pieces_and_restarts(tmp_path, monkeypatch):
    log = {"doc": [f"d{i // 7}" for i in range(700)], "x": np.random.default_rng(0).normal(size=700).tolist()}
    reference = {"doc": list(range(300)), "x": np.random.default_rng(1).normal(size=300).tolist()}
    path = write_jsonl(tmp_path / "log.jsonl", rows_of(log))
    settings = {"features": ["x"], "sequence": "doc", "window": 30, "sequence_span": 50}
    wanted = monitor(reference, path, **settings).to_dict()["windows"][:3]
    monkeypatch.setattr(log_reader, "CHUNK_ROWS", 11)
    text = path.read_text().splitlines(keepends=True)
    found = []
    for upto in (100, 333, 700):  # the file grows, in the middle of a sequence
        path.write_text("".join(text[:upto]))
        found += monitor(reference, path, state=tmp_path / "state", **settings).to_dict()["windows"]
    assert rounded(found) == rounded(wanted)


def test_several_layers_are_watched_apart():
    rng = np.random.default_rng(0)

    def layers(n, favourite):
        first = np.argsort(rng.random((n, 4)), axis=1)[:, :2]
        second = np.argsort(rng.random((n, 4)) - favourite * (np.arange(4) == 3), axis=1)[:, :2]
        return {"expert_ids": np.stack([first, second], axis=1).tolist()}

    result = monitor(layers(1000, 0), layers(500, 0.6))
    assert {f.feature: f.drift for f in result.windows[0].features if f.test == "chi2"} == {
        "expert_load[0]": False,
        "expert_load[1]": True,
    }


BAD = {
    "truncated": ('{"id": "r1", "confidence": 0.', "not JSON", "Expecting|delimiter|digit|column"),
    "not an object": ("[1, 2]", "not an object", "list"),
    "two objects": ('{"a": 1},{"b": 2}', "not JSON", "Extra data"),
    "missing": ({"confidence": None}, "missing confidence", "confidence is missing"),
    "nan": ({"disagreement": float("nan")}, "not finite: disagreement", "nan"),
    "inf": ({"routing_entropy": float("inf")}, "not finite: routing_entropy", "inf"),
    "range": ({"confidence": 1.7}, "out of range: confidence", "1.7"),
    "type": ({"confidence": "high"}, "wrong type: confidence", "high"),
    "unknown expert": ({"expert_ids": [0, 9]}, "unknown expert", "expert 9"),
    "negative expert": ({"expert_ids": [0, -1]}, "unknown expert", "expert -1"),
    "too many experts": ({"expert_ids": [0, 1, 2]}, "malformed expert_ids", "list of 2"),
    "no experts": ({"expert_ids": None}, "malformed expert_ids", "missing"),
    "no prediction": ({"prediction": None}, "missing prediction", "missing"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_is_set_aside_with_its_reason(case, tmp_path):
    fault, reason, detail = BAD[case]
    rows = rows_of(make_log(200, seed=4))
    lines = [json.dumps(row) for row in rows]
    lines[17] = fault if isinstance(fault, str) else json.dumps({**rows[17], **fault})
    path = tmp_path / "log.jsonl"
    path.write_text("\n".join(lines) + "\n\n")  # an empty line is no row
    result = monitor(REFERENCE, path, output_dir=tmp_path / "out")
    assert result.totals["rejected"] == {reason: 1}
    assert result.windows[0].rows == 199
    (aside,) = read_jsonl(tmp_path / "out" / "rejected.jsonl")
    assert aside["reason"] == reason and aside["content"] == lines[17]
    assert aside["position"] == len("\n".join(lines[:17])) + 1
    import re

    assert re.search(detail, aside["detail"])


def test_bad_rows_of_parquet(tmp_path):
    log = make_log(100, seed=5)
    log["confidence"][3], log["disagreement"][4], log["expert_ids"][5] = None, float("nan"), [0, 77]
    log["expert_ids"][6] = [0, 1, 2]
    path = write_parquet(tmp_path / "log.parquet", log)
    result = monitor(REFERENCE, path, output_dir=tmp_path)
    assert result.windows[0].rows == 96
    aside = {row["position"]: row["reason"] for row in read_jsonl(tmp_path / "rejected.jsonl")}
    assert aside == {
        3: "missing confidence",
        4: "not finite: disagreement",
        5: "unknown expert",
        6: "malformed expert_ids",
    }


def test_probabilities_that_are_none_are_set_aside(tmp_path):
    reference = {"probs": np.random.default_rng(0).dirichlet([3, 1], 100).tolist()}
    rows = [
        {"probs": [0.9, 0.1]},
        {"probs": [2.0, -1.0]},
        {"probs": [0.5, 0.2]},
        {"probs": [1.0]},
        {"probs": [0.4, 0.6]},
    ]
    result = monitor(reference, write_jsonl(tmp_path / "log.jsonl", rows))
    assert result.windows[0].rows == 2 and result.totals["rejected"] == {"malformed probs": 3}


def test_a_new_class_is_drift_and_no_bad_row():
    reference = {"prediction": [0, 1] * 200, "confidence": [0.9] * 400}
    result = monitor(reference, {"prediction": [0, 1, 7, 7] * 50, "confidence": [0.9] * 200})
    found = {f.feature: f for f in result.windows[0].features}
    assert not result.totals["rejected"] and found["prediction"].drift
    assert found["prediction"].effect == pytest.approx(0.5)
    share = found["prediction/share"]
    assert share.drift and share.category == "(new)" and share.effect == 1
    assert (share.reference_share, share.statistic) == (0, pytest.approx(0.5))


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_a_missing_column_is_named(ending, tmp_path):
    log = make_log(50)
    del log["routing_entropy"]
    path = tmp_path / f"log.{ending}"
    write_jsonl(path, rows_of(log)) if ending == "jsonl" else write_parquet(path, log)
    with pytest.raises(ValueError, match="has no column 'routing_entropy'"):
        monitor(REFERENCE, path)


def test_a_column_of_another_type_is_named(tmp_path):
    log = {**make_log(50), "confidence": ["high"] * 50}
    with pytest.raises(ValueError, match="'confidence' of the log holds string"):
        monitor(REFERENCE, write_parquet(tmp_path / "log.parquet", log))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"current": "nowhere.parquet"}, "No log at"),
        ({"current": __file__}, "Cannot read"),
        ({"reference": "nowhere.parquet"}, "No predictions table"),
        ({"reference": {"text": ["a"]}}, "no feature"),
        ({"reference": {"confidence": [0.5, float("nan")]}}, "not finite in 1 of 2 rows, first in row 1"),
        ({"features": ["length"]}, "no column 'length'"),
        ({"features": ["probs"], "reference": {"confidence": [0.5], "probs": [[0.5, 0.5]]}}, "holds lists"),
        ({"window": 0}, "at least 1"),
        ({"alpha": 2}, "alpha"),
        ({"current": "-", "labels": {"id": [], "label": []}}, "cannot be read again"),
        ({"reference": {"confidence": [0.5], "expert_ids": [[-1]]}}, "expert numbers of 0 or more"),
    ],
)
def test_bad_input_says_what_to_do(arguments, message):
    with pytest.raises(ValueError, match=message):
        monitor(**{"reference": REFERENCE, "current": make_log(10), **arguments})


def test_an_empty_log_and_one_of_bad_rows_only(tmp_path):
    with pytest.raises(ValueError, match="no usable row .it is empty"):
        monitor(REFERENCE, write_jsonl(tmp_path / "log.jsonl", []))
    rows = [{**row, "confidence": 3} for row in rows_of(make_log(5))]
    with pytest.raises(ValueError, match="set aside: .*out of range"):
        monitor(REFERENCE, write_jsonl(tmp_path / "log.jsonl", rows))


def test_a_growing_log_is_read_once(tmp_path):
    rows = rows_of(make_log(500, seed=6))
    path, state, out = tmp_path / "log.jsonl", tmp_path / "state", tmp_path / "out"
    settings = {"window": 100, "state": state, "output_dir": out}
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text[:20_000])  # ends in the middle of a line
    first = monitor(REFERENCE, path, **settings)
    assert first.open_sequences > 0 and not first.totals["rejected"]
    path.write_text(text)
    second = monitor(REFERENCE, path, **settings)
    assert len(first.windows) + len(second.windows) == 5 and second.open_sequences == 0
    third = monitor(REFERENCE, path, **settings)
    assert not third.windows and third.exit_code == 0 and third.totals["rows"] == 500
    wanted = monitor(REFERENCE, path, window=100).to_dict()["windows"]
    assert rounded(read_jsonl(out / "windows.jsonl")) == rounded(wanted)


def test_half_a_parquet_file_in_a_folder_waits(tmp_path):
    folder = tmp_path / "logs"
    folder.mkdir()
    whole = write_parquet(folder / "0.parquet", make_log(100)).read_bytes()
    (folder / "1.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="'1.parquet' is not a whole Parquet file"):
        monitor(REFERENCE, folder, window=50)
    settings = {"window": 50, "state": tmp_path / "state"}
    assert len(monitor(REFERENCE, folder, **settings).windows) == 2
    (folder / "1.parquet").write_bytes(whole)
    assert len(monitor(REFERENCE, folder, **settings).windows) == 2


def test_a_state_of_another_reference_or_broken_is_refused(tmp_path):
    state = tmp_path / "state"
    log = write_jsonl(tmp_path / "log.jsonl", rows_of(make_log(30)))
    monitor(REFERENCE, log, window=10, state=state)
    for arguments in ({"reference": make_log(2000, seed=9)}, {"window": 20}, {"alpha": 0.05}):
        with pytest.raises(ValueError, match="another reference or other settings"):
            monitor(**{"reference": REFERENCE, "current": log, "window": 10, "state": state, **arguments})
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(ValueError, match="unreadable"):
        monitor(REFERENCE, log, window=10, state=state)


_WATCH = """
import sys, time
from hf_moecal.drift import log_reader
from hf_moecal.drift.monitor import monitor
from tests.drift.helpers import REFERENCE, make_log, read_jsonl, rounded, rows_of, write_jsonl, write_parquet
log_reader.CHUNK_ROWS = 50
slow = lambda window: time.sleep(0.04)
monitor(sys.argv[1], sys.argv[2], window=20, state=sys.argv[3], output_dir=sys.argv[4], on_window=slow)
"""


def _size(path):
    return path.stat().st_size if path.exists() else 0


def test_a_killed_monitor_loses_and_repeats_nothing(tmp_path):
    """Killed again and again at any moment, it leaves the very windows and bad rows of an undisturbed run."""
    rows = rows_of(make_log(700, seed=7))
    for i in range(0, 700, 40):
        rows[i]["confidence"] = 5.0
    log = write_jsonl(tmp_path / "log.jsonl", rows)
    reference = write_parquet(tmp_path / "reference.parquet", REFERENCE)
    calm = tmp_path / "calm"
    monitor(reference, log, window=20, state=tmp_path / "calm.state", output_dir=calm)
    out, rng = tmp_path / "out", np.random.default_rng(0)
    command = [sys.executable, "-c", _WATCH, str(reference), str(log), str(tmp_path / "state"), str(out)]
    for _ in range(3):
        before = _size(out / "windows.jsonl")
        process = subprocess.Popen(command)
        limit = time.monotonic() + 60
        while process.poll() is None and _size(out / "windows.jsonl") <= before and time.monotonic() < limit:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.2))
        assert process.poll() is None, "finished before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(command, check=True)
    for name in ("windows.jsonl", "rejected.jsonl"):
        assert rounded(read_jsonl(out / name)) == rounded(read_jsonl(calm / name))


def test_lines_beyond_the_state_are_cut(tmp_path):
    log = write_jsonl(tmp_path / "log.jsonl", rows_of(make_log(30)))
    settings = {"window": 10, "state": tmp_path / "state", "output_dir": tmp_path}
    monitor(REFERENCE, log, **settings)
    before = (tmp_path / "windows.jsonl").read_text()
    with (tmp_path / "windows.jsonl").open("a") as file:
        file.write('{"index": 3, "half a li')
    monitor(REFERENCE, log, **settings)
    assert (tmp_path / "windows.jsonl").read_text() == before


def test_metrics_are_prometheus_text(tmp_path):
    parser = pytest.importorskip("prometheus_client.parser", reason="prometheus_client is not installed")
    log = make_log(300, shift=1, seed=8)
    log["confidence"][0] = 7.0
    monitor(REFERENCE, log, window=100, output_dir=tmp_path)
    text = (tmp_path / "metrics.prom").read_text()
    families = {family.name: family for family in parser.text_string_to_metric_families(text)}
    sample = {name: {tuple(s.labels.values()): s.value for s in family.samples} for name, family in families.items()}
    assert sample["moecal_windows"][()] == 3 and sample["moecal_drifted_windows"][()] == 3
    assert sample["moecal_rejected_rows"] == {("out of range: confidence",): 1}
    assert sample["moecal_drift"][("confidence",)] == 1 and sample["moecal_drift_effect"][("confidence",)] > 0.1
    assert 0 < sample["moecal_estimated_accuracy"][()] < 1
    assert families["moecal_windows"].type == "counter" and families["moecal_drift"].type == "gauge"


def test_exposition_escapes():
    from hf_moecal.drift.exposition import exposition

    text = exposition(None, {"windows": 0, "drifted": 0, "rows": 0, "rejected": {'a"b\\c\nd': 2}})
    assert r'reason="a\"b\\c\nd"' in text


def test_labels_that_arrive_later_give_the_true_calibration(tmp_path):
    log = make_log(3000, shift=1, seed=9)
    labels = {"id": log["id"][:1200] + ["nobody"], "label": log["label"][:1200] + [0]}
    unlabelled = {name: values for name, values in log.items() if name != "label"}
    result = monitor(REFERENCE, write_parquet(tmp_path / "log.parquet", unlabelled), labels=labels)
    confidence = np.array(log["confidence"][:1200])
    correct = np.equal(log["prediction"][:1200], log["label"][:1200])
    found = result.labelled
    assert found["n"] == 1200 and found["accuracy"] == pytest.approx(correct.mean())
    assert found["signed_gap"] == pytest.approx(confidence.mean() - correct.mean())
    assert (found["labels_without_row"], found["rows_without_label"]) == (1, 1800)
    assert found["drift"] and abs(found["reference"]["signed_gap"]) < 0.03


def test_label_joins_that_cannot_work():
    log = make_log(20)
    for labels, message in (
        ({"id": ["r1", "r1"], "label": [0, 1]}, "labelled twice, first 'r1'"),
        ({"id": ["x"], "label": [0]}, "No row of the log"),
        ({"label": [0]}, "no column 'id'"),
    ):
        with pytest.raises(ValueError, match=message):
            monitor(REFERENCE, log, labels=labels)
    with pytest.raises(ValueError, match="no column 'id'"):
        monitor(REFERENCE, {n: v for n, v in log.items() if n != "id"}, labels={"id": ["r1"], "label": [0]})
    with pytest.raises(ValueError, match="only with a labelled reference"):
        monitor({n: v for n, v in REFERENCE.items() if n != "label"}, log, labels={"id": ["r1"], "label": [0]})


def test_the_label_free_estimate_follows_a_new_mix():
    """Where only the mix of configurations changes, the estimate finds what labels would show."""
    rng = np.random.default_rng(0)

    def mixed(n, share):
        fragile = rng.random(n) < share
        confidence = rng.uniform(0.6, 1, n)
        correct = rng.random(n) < np.where(fragile, confidence - 0.3, np.minimum(confidence + 0.1, 1))
        disagreement = np.where(fragile, rng.uniform(0.2, 0.3, n), rng.uniform(0, 0.1, n))
        return {"confidence": confidence, "prediction": np.zeros(n, int), "label": 1 - correct.astype(int),
                "disagreement": disagreement}, correct  # fmt: skip

    (reference, _), (current, correct) = mixed(20_000, 1 / 3), mixed(20_000, 0.8)
    window = monitor(reference, {**current, "label": [-100] * 20_000}).windows[0]
    estimate = window.estimate
    assert estimate["accuracy"] == pytest.approx(correct.mean(), abs=4 * estimate["accuracy_se"] + 0.005)
    assert estimate["signed_gap"] == pytest.approx(current["confidence"].mean() - correct.mean(), abs=0.02)
    assert estimate["reference_accuracy"] - estimate["accuracy"] > 0.1
    assert estimate["uncovered"] == 0


def test_a_configuration_never_seen_is_reported():
    reference = make_log(2000, seed=1)
    reference["confidence"] = np.clip(reference["confidence"], 0.5, 1).tolist()
    current = make_log(100)
    current["confidence"] = [0.1] * 25 + [0.9] * 75
    assert monitor(reference, current).windows[0].estimate["uncovered"] == pytest.approx(0.25)


def test_following_a_log_until_interrupted(tmp_path):
    log = write_jsonl(tmp_path / "log.jsonl", rows_of(make_log(100)))

    def grow(window):
        if window.index == 1:
            raise KeyboardInterrupt
        with log.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows_of(make_log(100, seed=1)))

    settings = {"window": 100, "state": tmp_path / "state", "output_dir": tmp_path}
    result = monitor(REFERENCE, log, follow=0.01, on_window=grow, **settings)
    assert [window.index for window in result.windows] == [0, 1]
    again = monitor(REFERENCE, log, **settings)  # interrupted before window 1 was in the state: it comes once more
    assert [window.index for window in again.windows] == [1]
    assert [window["index"] for window in read_jsonl(tmp_path / "windows.jsonl")] == [0, 1]
