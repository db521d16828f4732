"""Interleaved sequences, correlated rows, many classes, and what must be heard."""

import numpy as np
import pytest
from scipy import sparse, stats

from hf_moecal.drift import log_reader
from hf_moecal.drift.correlation import Correlation
from hf_moecal.drift.logs import bucket, key_texts
from hf_moecal.drift.monitor import monitor
from hf_moecal.drift.sequences import clustering
from tests.drift.helpers import REFERENCE, make_log, read_jsonl, rounded, rows_of, write_jsonl


def interleaved(rows, seed, *, length=10, span=200, rho=0.8, named=True):
    """Conversations whose rows are scattered over `span` rows of the log and resemble each other."""
    rng = np.random.default_rng(seed)
    count = (rows + 2 * span) // length + 1
    owner = np.repeat(np.arange(count), length)
    place = rng.uniform(-span, rows + span, count)[owner] + rng.uniform(0, span, len(owner))
    owner = owner[np.argsort(place)][span : span + rows]
    values = np.sqrt(rho) * rng.normal(size=count)[owner] + np.sqrt(1 - rho) * rng.normal(size=len(owner))
    kind = np.searchsorted([-0.5, 0.5], np.sqrt(rho) * rng.normal(size=count)[owner] + rng.normal(size=len(owner)))
    log = {"x": values, "kind": kind.astype(str)}
    return {"user": [f"u{i}" for i in owner], **log} if named else log


FEATURES = {"features": ["x", "kind"]}


def gathered(users, values, span):
    """The plain loop: means of the rows that come within `span` rows of a sequence's first, in that order."""
    found, current = [], {}
    for row, (user, value) in enumerate(zip(users, values, strict=True)):
        if user not in current or row >= current[user]["first"] + span:
            current[user] = {"first": row, "values": []}
            found.append(current[user])
        current[user]["values"].append(value)
    return [np.mean(sequence["values"]) for sequence in found]


@pytest.mark.parametrize("span", [60, 10_000])
def test_interleaved_rows_are_gathered_as_by_a_plain_loop(span):
    reference, log = interleaved(1500, 0), interleaved(1200, 1)
    result = monitor(reference, log, sequence="user", window=40, sequence_span=span, **FEATURES)
    before = gathered(reference["user"], reference["x"], span)
    means = gathered(log["user"], log["x"], span)
    assert sum(window.sequences for window in result.windows) == len(means)
    assert sum(window.rows for window in result.windows) == 1200
    for window in result.windows:
        x = next(feature for feature in window.features if feature.feature == "x")
        part = means[40 * window.index : 40 * (window.index + 1)]
        assert x.effect == pytest.approx(stats.ks_2samp(before, part).statistic, abs=1e-12)


def test_windows_do_not_depend_on_how_the_log_is_cut(tmp_path, monkeypatch):
    reference, log = interleaved(1500, 0), interleaved(1200, 1)
    log = {
        **log,
        "x": [None if i % 50 == 7 else x for i, x in enumerate(log["x"].tolist())],
        "kind": log["kind"].tolist(),
    }
    path = write_jsonl(tmp_path / "log.jsonl", rows_of(log))
    settings = {"sequence": "user", "window": 30, "sequence_span": 150, **FEATURES}
    wanted = rounded(monitor(reference, path, **settings).to_dict()["windows"])
    assert sum(window["rejected"] for window in wanted) == 24
    text = path.read_text().splitlines(keepends=True)
    for chunk in (61, 160):
        monkeypatch.setattr(log_reader, "CHUNK_ROWS", chunk)
        assert rounded(monitor(reference, path, **settings).to_dict()["windows"]) == wanted
        out = tmp_path / str(chunk)
        for upto in (300, 301, 777, 1200):  # and with a restart at each of these rows
            path.write_text("".join(text[:upto]))
            monitor(reference, path, state=out / "state", output_dir=out, **settings)
        found = rounded(read_jsonl(out / "windows.jsonl"))
        assert len(found) >= 3 and found == wanted[: len(found)]


def alarms(reference, log, **settings):
    found = [w for w in monitor(reference, log, **FEATURES, **settings).windows if w.complete]
    return sum(window.drift for window in found), len(found)


@pytest.mark.parametrize(("length", "span"), [(10, 200), (50, 500)])
def test_interleaved_conversations_do_not_alarm(length, span):
    how = {"length": length, "span": span}
    counts = [
        alarms(
            interleaved(6000, seed, **how),
            interleaved(15 * 40 * length, 100 + seed, **how),
            sequence="user",
            window=40,
        )
        for seed in range(3)
    ]
    drifted, whole = np.sum(counts, axis=0)
    assert whole > 30 and drifted <= stats.binom.ppf(0.9999, whole, 0.01)
    shifted = interleaved(4000, 9, **how)
    shifted["x"] = shifted["x"] + 1.5
    drifted, whole = alarms(interleaved(6000, 0, **how), shifted, sequence="user", window=40)
    assert drifted == whole > 0


def test_correlated_rows_without_a_sequence_do_not_alarm():
    drifted = whole = independent = 0
    for seed in range(3):
        reference, log = interleaved(5000, seed, named=False), interleaved(40 * 200, 100 + seed, named=False)
        result = monitor(reference, log, window=200, **FEATURES)
        assert 3 < result.correlation["x"]["rows_per_observation"] < 30 and 0 < result.correlation["x"]["lag1"] < 0.2
        drifted, whole = drifted + sum(w.drift for w in result.windows), whole + len(result.windows)
        parts = np.split(log["x"], 40)
        independent += sum(stats.ks_2samp(reference["x"], part).pvalue < 0.01 for part in parts)
    assert whole == 120 and drifted <= 5 and independent > 20


def test_a_shuffled_reference_learns_from_the_log_and_still_hears_a_jump(caplog):
    reference = {"x": np.random.default_rng(0).normal(size=5000)}
    log = interleaved(40 * 200, 1, named=False)["x"]
    settings = {"features": ["x"], "window": 200}
    quiet = monitor(reference, {"x": log}, **settings)
    assert not quiet.correlation and caplog.text.count("rows that follow each other in the log are correlated") == 1
    assert sum(window.drift for window in quiet.windows[10:]) <= 2
    jumped = monitor(reference, {"x": np.where(np.arange(8000) < 4000, log, log + 2)}, **settings)
    assert all(window.drift for window in jumped.windows[20:]) and not all(w.drift for w in jumped.windows[10:20])


def test_independent_rows_are_worth_themselves():
    result = monitor(REFERENCE, make_log(2000, seed=3), window=200)
    assert not result.correlation
    assert {f.effective_n for w in result.windows for f in w.features if f.test == "ks"} == {200.0}


def test_the_design_effect_of_a_known_process():
    """Of x_t = 0.8 x_(t-1) + e_t it is (1 + 0.8) / (1 - 0.8) = 9."""
    rng = np.random.default_rng(0)
    values = np.zeros(20_000)
    for t in range(1, len(values)):
        values[t] = 0.8 * values[t - 1] + rng.normal()
    found = Correlation(values[:, None])
    assert found.lag1 == pytest.approx(0.8, abs=0.03)
    assert 8 < found.reference(500) < 13 and found.reference(1) < 3
    wide = Correlation(sparse.csr_array(np.eye(50)[rng.integers(0, 50, 5000)]))
    assert wide.reference(5000) == 1.0


def test_ids_that_come_again_are_worth_one():
    assert clustering(np.array([1, 1, 2, 3])) == pytest.approx(6 / 4)
    users = np.tile(np.arange(20), 50)  # twenty users, again and again
    level = np.random.default_rng(0).normal(size=(2, 20))
    reference, log = ({"user": users, "x": np.repeat(level[i][None], 50, 0).ravel()} for i in (0, 1))
    result = monitor(reference, log, features=["x"], sequence="user", sequence_span=20)
    assert result.windows[0].sequences == 1000
    assert result.windows[0].features[0].effective_n == pytest.approx(20) and not result.windows[0].drift


@pytest.mark.parametrize("classes", [150, 400, 2000])
def test_many_classes_do_not_alarm(classes):
    drifted = whole = 0
    for seed in range(3):
        rng = np.random.default_rng(seed)
        reference, log = ({"prediction": rng.integers(0, classes, n)} for n in (2000, 15 * 200))
        found = monitor(reference, log, window=200).windows
        drifted, whole = drifted + sum(w.drift for w in found), whole + len(found)
    assert drifted <= stats.binom.ppf(0.9999, whole, 0.01)


def test_one_dead_expert_of_64_is_heard_and_named():
    rng = np.random.default_rng(0)
    scores = rng.random((9000, 64))
    scores[5000:, 17] = -1
    ids = np.argsort(-scores, axis=1)[:, :2].tolist()
    result = monitor({"expert_ids": ids[:4000]}, {"expert_ids": ids[4000:]}, window=1000)
    assert [window.drift for window in result.windows] == [False, True, True, True, True]
    dead = next(f for f in result.windows[1].features if f.drift)
    assert (dead.feature, dead.category, dead.statistic, dead.effect) == ("expert_load/share", 17, 0, 1)
    assert "17: " in str(result.windows[1]) and "-> 0.00%" in str(result.windows[1])


def test_a_new_class_of_five_percent_is_heard_but_not_a_single_row():
    rng = np.random.default_rng(0)
    reference = {"prediction": rng.integers(0, 4, 2000)}
    log = rng.integers(0, 4, 200)
    assert not monitor(reference, {"prediction": np.where(np.arange(200) == 3, 9, log)}).windows[0].drift
    found = monitor(reference, {"prediction": np.where(np.arange(200) % 20 == 3, 9, log)}).windows[0]
    assert "(new): 0.00% -> 5.00%" in str(found)


def test_rows_set_aside_alarm_by_themselves():
    log = make_log(600, seed=3)
    log["disagreement"] = [float("nan") if i % 2 and i >= 200 else x for i, x in enumerate(log["disagreement"])]
    result = monitor(REFERENCE, log, window=100)
    assert [window.drift for window in result.windows] == [False, False, True, True, True]
    assert result.windows[2].rejected >= 99 and result.windows[2].features[0].feature == "rejected"
    assert "rows set aside: 0.00% -> 49.75%" in str(result.windows[2])


def test_a_log_of_bad_rows_only_closes_windows_that_alarm():
    log = {**make_log(250, seed=3), "confidence": [7.0] * 250}
    result = monitor(REFERENCE, log, window=100)
    assert [(w.sequences, w.rejected, w.drift) for w in result.windows] == [
        (0, 100, True)
    ] * 2 and result.exit_code == 1


def test_keys_are_compared_as_they_are_written(tmp_path):
    big = 2**63 + np.arange(300, dtype=object)
    log = {"user": [int(i) for i in big], "x": np.random.default_rng(0).normal(size=300).tolist()}
    reference = {"user": list(range(300)), "x": log["x"]}
    settings = {"features": ["x"], "sequence": "user"}
    for source in (log, write_jsonl(tmp_path / "log.jsonl", rows_of(log))):
        assert monitor(reference, source, **settings).windows[0].sequences == 300
    assert key_texts("id", np.array([1.0, 2.0])).tolist() == ["1", "2"]
    with pytest.raises(ValueError, match="read as floats"):
        key_texts("id", np.array([2.0**63, 1.0]))
    assert 0 <= bucket("a") == bucket("a") < 256
