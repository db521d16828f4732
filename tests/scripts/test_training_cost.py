"""The scripts that measure the cost of training run, and what they compare is comparable."""

import json
import sys

import pytest

from hf_moecal.tasks.targets import Targets
from tests.real_data import load_script
from tests.training.helpers import (
    arguments,
    classification_data,
    classification_model,
    relative_error,
    trained_gradients,
)


@pytest.mark.slow
def test_gpu_check_runs_on_the_cpu(tmp_path, monkeypatch, capsys):
    script, output = load_script("gpu_check"), tmp_path / "found.json"
    options = [
        "--tiny",
        "--device",
        "cpu",
        "--length",
        "48",
        "--supervised",
        "8",
        "--steps",
        "4",
        "--accumulation",
        "2",
    ]
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", *options, "--output", str(output)])
    script.main()
    found = json.loads(output.read_text())
    assert set(found["exactness"]) >= {"robust_streaming", "robust_through_streaming"}
    assert all(error < 1e-5 for error in found["exactness"].values())
    assert found["probe"]["certificate_error"] < 1e-4
    runs = {(run["method"], run["accumulation"], run["normalizer"]): run for run in found["training"]}
    assert {("robust_filtered", 2, "streaming"), ("robust", 2, "two_pass")} < set(runs)
    two_pass, streaming = (runs["robust", 2, way] for way in ("two_pass", "streaming"))
    assert two_pass["pass_gap_max"] == 0  # a CPU gives the second pass the losses of the first
    assert streaming["pass_gap_max"] is None  # there is one pass


@pytest.fixture
def benchmark(monkeypatch):
    script = load_script("benchmark_training")
    monkeypatch.setattr(script, "LENGTH", 24)
    monkeypatch.setattr(script, "VOCABULARY", 400)
    return script


def test_the_memory_benchmark_compares_equal_gradients(benchmark, monkeypatch):
    from hf_moecal.model import head

    for supervised, chunk in ((4, head.CHUNK_ELEMENTS), (20, 400 * 7)):
        monkeypatch.setattr(head, "CHUNK_ELEMENTS", chunk)
        mine, whole = (measure(supervised)["gradients"] for measure in (benchmark.ours, benchmark.whole))
        assert set(mine) == set(whole)
        for name, (projection, norm) in whole.items():
            assert norm > 0 and abs(mine[name][0] - projection) <= 1e-5 * norm, name
    other = benchmark.whole(4)["gradients"]
    assert any(abs(other[name][0] - whole[name][0]) > 1e-3 * whole[name][1] for name in whole)  # it can tell


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for it
def test_the_clock_counts_whole_steps_of_every_method(benchmark):
    for train, accumulation, settings in (("lora", 2, None), ("last_moe_layer", 2, {"objective": "robust"})):
        assert benchmark.step_seconds(train, accumulation, settings) > 0


@pytest.mark.slow
def test_chunks_of_a_large_vocabulary_take_the_memory_of_one(monkeypatch):
    """Peak resident memory of processes of their own, at 128,000 words and 1,800 supervised positions."""
    script = load_script("benchmark_training")
    monkeypatch.setattr(script, "MEASURES", {"body": None, "ours-900": None})
    found = script.measured()
    assert found["ours-900"]["peak"] - found["body"]["peak"] <= 300


def test_an_optimizer_batch_is_probed_once(tmp_path, monkeypatch):
    """In two passes too: what the first one measured holds for the second."""
    trained, probed, original = [], [], Targets.probed
    monkeypatch.setattr(Targets, "probed", lambda self, probe: probed.append(1) or original(self, probe))
    for normalizer in ("two_pass", "streaming"):
        args = arguments(tmp_path, objective="robust_filtered", gradient_accumulation_steps=4, normalizer=normalizer)
        gradients, _ = trained_gradients(classification_model(), classification_data(8), args)
        trained.append(gradients)
        assert len(probed) == 4
        probed.clear()
    assert relative_error(*trained) <= 1e-5
