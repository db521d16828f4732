"""The benchmark: what it scores and compares, against the definitions; and all of it once, on little."""

import os
import subprocess
import sys
from itertools import product

import numpy as np
import pytest
from datasets import Dataset

from hf_moecal import TemperatureCalibrator
from tests.real_data import RECIPES, SCRIPTS, dense_model, load_script


settings, scoring, report = (load_script(f"benchmark.{name}", RECIPES) for name in ("settings", "scoring", "report"))


def table(seed, *, rows=400, classes=3):
    fixed, generator = np.random.default_rng(0), np.random.default_rng(seed)
    truth = 2 * fixed.normal(size=(rows, classes))
    logits = scoring.log_softmax(3 * (truth + generator.normal(size=(rows, classes))))
    group = np.repeat(["validation", "in-domain", "there"], [rows // 2, rows // 4, rows - rows // 2 - rows // 4])
    return {
        "id": np.arange(rows),
        "label": (truth + fixed.gumbel(size=truth.shape)).argmax(1),
        "logits": logits,
        "group": group,
        "hard": fixed.random(rows) < 0.3,
    }


def test_a_committee_mixes_probabilities():
    members = [table(seed) for seed in range(3)]
    mixed = scoring.committee(members)
    expected = sum(np.exp(member["logits"]) for member in members) / 3
    assert np.abs(np.exp(mixed["logits"]) - expected).max() < 1e-12
    moved = {**members[1], "id": members[1]["id"][::-1]}
    with pytest.raises(ValueError, match="other rows"):
        scoring.committee([members[0], moved])


def test_committees_go_around_the_seeds():
    tables = {seed: table(seed) for seed in range(5)}
    found = list(scoring.committees(tables))
    assert [(size, seed) for size, seed, _ in found] == [(size, seed) for size in (2, 4) for seed in range(5)]
    expected = (np.exp(tables[4]["logits"]) + np.exp(tables[0]["logits"])) / 2
    assert np.abs(np.exp(found[4][2]["logits"]) - expected).max() < 1e-12


def test_figures_of_a_set_are_those_of_its_rows():
    one = table(0)
    rows = {(row["test"], row["subset"]): row for row in scoring.score(one, {"seed": 0})}
    assert set(rows) == {("in-domain", "all"), ("in-domain", "hard"), ("there", "all"), ("there", "hard")}
    here = (one["group"] == "there") & one["hard"]
    nll = -one["logits"][here, one["label"][here]].mean()
    assert rows["there", "hard"]["nll"] == pytest.approx(nll, abs=1e-5) and rows["there", "hard"]["n"] == here.sum()
    at = int(np.argmin(abs(scoring.TEMPERATURES - 1)))
    curve = scoring.curve(one)["there/hard"]
    t = scoring.TEMPERATURES[at]
    cooled = scoring.log_softmax(one["logits"][here] / t)
    assert curve[at] == pytest.approx(-cooled[np.arange(here.sum()), one["label"][here]].mean(), abs=1e-5)


def test_a_calibrator_sees_validation_rows_alone():
    one, other = table(0), table(0)
    other["label"] = np.where(other["group"] == "validation", other["label"], 0)
    found, same = (scoring.calibrated(t, "temperature")["logits"] for t in (one, other))
    assert np.array_equal(found, same) and not np.allclose(found, one["logits"])


@pytest.mark.filterwarnings("ignore:.*labelled rows")
def test_the_oracle_gives_each_set_its_own_temperature():
    one = table(0)
    found = scoring.with_oracle(one)
    for name in ("in-domain", "there"):
        here = one["group"] == name
        best = TemperatureCalibrator().fit({k: one[k][here] for k in ("logits", "label")}).temperature
        assert np.abs(found["logits"][here] - scoring.log_softmax(one["logits"][here] / best)).max() < 1e-12


def test_ratios_are_to_the_baseline_of_the_same_task():
    names = {"task": "t", "readout": "native", "members": 1, "accuracy": 0.5, "ece": 0.1, "test": "in-domain"}
    rows = [
        {**names, "method": "erm", "posthoc": "temperature", "seed": seed, "subset": subset, "nll": 1.0 + seed}
        for seed in (0, 1) for subset in ("all", "hard")
    ]  # fmt: skip
    rows += [
        {**row, "method": "ours", "posthoc": "none", "nll": 0.5 * row["nll"], "ece": 0.05, "test": test}
        for row in rows for test in ("in-domain", "there")
    ]  # fmt: skip
    rows += [{**row, "test": "there"} for row in rows if row["method"] == "erm"]
    figures = report.Figures(rows)
    (line,) = report.verdicts(figures, [("ours", "native", 1, "none")])
    assert line[3:] == ["0.500"] * 4 + ["4 of 4", "0.500", "0.500", "0.500"]
    assert report.verdicts(figures, [("ours", "native", 1, "none")], []) == [], "no task is not all tasks"
    assert report.paired(figures, "t", ("ours", "native", 1, "none"), "shifted", "nll").startswith("-0.750")


def test_at_equal_in_domain_loss():
    """A method whose curve is another's at other temperatures gains nothing; a better one gains its factor."""
    falling = np.abs(np.linspace(-1, 1, len(scoring.TEMPERATURES))) + 1
    curve = {"in-domain/all": falling.tolist(), "there/all": (falling + 1).tolist()}
    better = {"in-domain/all": (0.9 * falling).tolist(), "there/all": (falling + 1).tolist()}
    runs = {("t", name, "native", 1, 0): nll for name, nll in (("erm", curve), ("same", curve), ("better", better))}
    lines = {line[0]: line for line in report.equal_in_domain(runs)}
    assert lines["same"][1:] == ["1 of 1", "", "1.000", ""]
    assert lines["better"][1] == "1 of 1" and float(lines["better"][3]) > 1, "more hedged at the same in-domain loss"


def test_the_full_path_is_judged_from_tables_alone(tmp_path, monkeypatch, capsys):
    one = {name: column for name, column in table(0).items() if name != "hard"}
    agreement = np.where(np.arange(len(one["label"])) % 4, 1.0, 0.6)
    Dataset.from_dict({**one, "agreement": agreement}).to_parquet(str(tmp_path / "one.parquet"))
    command = ["full_path.py", f"erm={tmp_path / 'one.parquet'}", "--output", str(tmp_path / "rows.parquet")]
    monkeypatch.setattr(sys, "argv", command)
    load_script("benchmark.full_path", RECIPES).main()
    rows = scoring.read_rows(tmp_path / "rows.parquet")
    raw = {(row["test"], row["subset"]): row for row in rows if row["posthoc"] == "none"}
    here = (one["group"] == "there") & (agreement < 0.8)
    nll = -one["logits"][here, one["label"][here]].mean()
    assert raw["there", "hard"]["nll"] == pytest.approx(nll, abs=1e-5) and raw["there", "hard"]["n"] == here.sum()
    assert "| erm + conservative_temperature | " in capsys.readouterr().out


def test_routing_figures_of_a_router_that_knows_the_domain():
    table = {
        "expert_ids": np.array([[0, 1], [0, 1], [1, 0], [1, 0]]),
        "expert_weights": np.array([[1.0, 0.0]] * 4),
        "routing_entropy": np.zeros(4),
        "group": np.array(["in-domain"] * 4),
        "domain": np.array(["a", "a", "b", "b"]),
    }
    found = scoring.routing_figures(table, 2)
    assert found["mutual_information"] == pytest.approx(np.log(2), abs=1e-4) and not found["uniform"]
    table["expert_weights"], table["routing_entropy"] = np.full((4, 2), 0.5), np.full(4, np.log(2))
    found = scoring.routing_figures(table, 2)
    assert found["mutual_information"] == pytest.approx(0, abs=1e-4) and found["uniform"]


def test_tasks_hold_out_what_they_say():
    for task in settings.TASKS.values():
        assert not set(task.sources) & set(task.unseen), task.name
    assert {"erm", "label_smoothing", "focal", "robust-detached", "robust-through"} <= set(settings.METHODS)


def test_the_name_of_a_table_says_all_that_it_depends_on(tmp_path):
    path = load_script("run_benchmark").table_path
    tasks = [settings.TASKS[name] for name in ("reviews-out", "tweets-out")]
    methods = [settings.Method("m", {"eta": eta}) for eta in (1.0, 2.0)]
    budgets = settings.FULL, settings.SMOKE
    paths = {path(tmp_path, *what, "native", 0) for what in product(budgets, tasks, methods)}
    assert len(paths) == 8


@pytest.mark.slow
def test_all_of_it_on_little(tmp_path):
    dense_model()  # fetches it where it is not there yet
    command = [sys.executable, str(SCRIPTS / "run_benchmark.py"), "--smoke", "--tasks", "from-movie"]
    command += ["--methods", "erm", "robust_filtered-detached", "--runs", str(tmp_path / "runs")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = [*command, "--output", str(tmp_path)]
    first = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=400)
    assert first.returncode == 0, first.stderr[-3000:]
    rows = scoring.read_rows(tmp_path / "benchmark.parquet")
    wanted = {"task", "train", "test", "subset", "method", "readout", "members", "posthoc", "seed", "n", "nll"}
    assert wanted <= set(rows[0]) and {row["members"] for row in rows} == {1, 2}
    assert {row["method"] for row in rows} == {"erm", "erm-hard_routing", "robust_filtered-detached"}
    assert all(np.isfinite(row["nll"]) for row in rows)
    tables = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*.parquet")}
    again = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=400)
    assert again.returncode == 0 and scoring.read_rows(tmp_path / "benchmark.parquet") == rows
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*.parquet")} == tables
