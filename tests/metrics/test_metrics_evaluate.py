"""hf_moecal's metric where users meet it: evaluate.load, a plain Trainer, the Space."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch

import hf_moecal
from hf_moecal.metrics import calibration_metrics, calibration_report


PATH = hf_moecal.metric_path("ece")
CERTAIN = {"predictions": [[1.0, 0.0], [1.0, 0.0]], "references": [0, 1]}


def draw(n=300, classes=3, seed=0):
    rng = np.random.default_rng(seed)
    return rng.dirichlet(np.ones(classes), n), rng.integers(0, classes, n)


@pytest.fixture(scope="module")
def metric():
    return evaluate.load(PATH)


def test_load_by_installed_and_relative_path_and_as_a_space_folder(tmp_path, monkeypatch):
    assert evaluate.load(PATH).compute(**CERTAIN)["ece"] == 0.5
    shutil.copytree(PATH, tmp_path / "metrics" / "ece", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.chdir(tmp_path)
    for path in ("metrics/ece", "./metrics/ece/ece.py"):
        assert evaluate.load(path).compute(**CERTAIN)["ece"] == 0.5
    assert {"README.md", "app.py", "ece.py", "requirements.txt"} <= set(os.listdir("metrics/ece"))


def test_compute_equals_the_direct_call(metric, tmp_path):
    probs, labels = draw()
    groups = np.random.default_rng(1).choice(["a", "b"], 300)
    found = metric.compute(predictions=probs, references=labels, groups=groups, bins=10, strategy="equal_mass")
    assert found == calibration_report(labels, probs=probs, groups=groups, bins=10, strategy="equal_mass")
    assert list(found)[0] == "ece"
    logits = np.log(probs)
    again = metric.compute(predictions=logits.tolist(), references=labels.tolist(), from_logits=True)
    assert again["ece"] == pytest.approx(calibration_report(labels, probs=probs)["ece"], abs=1e-12)
    saved = evaluate.save(tmp_path / "result.json", **found)
    assert json.loads(Path(saved).read_text())["ece"] == found["ece"]


def test_batches_and_single_examples(metric):
    probs, labels = draw()
    for piece in np.array_split(np.arange(299), 7):
        metric.add_batch(predictions=torch.from_numpy(probs[piece]), references=labels[piece])
    metric.add(prediction=probs[299], reference=labels[299])
    assert len(metric) == 300
    assert metric.compute() == calibration_report(labels, probs=probs)
    assert len(metric) == 0
    metric.add_batch(predictions=probs[:100], references=labels[:100], groups=["a"] * 100)
    found = metric.compute(
        predictions=probs[100:], references=labels[100:], groups=["b"] * 200, group_names=["a", "b", "c"]
    )
    assert [g["n"] for g in found["groups"].values()] == [100, 200, 0]


def test_modes():
    probs, labels = draw(classes=2)
    classwise = evaluate.load(PATH, "classwise").compute(predictions=probs, references=labels)
    assert classwise == calibration_report(labels, probs=probs, mode="classwise")
    positive = evaluate.load(PATH).compute(predictions=probs[:, 1], references=labels, mode="positive_class")
    assert positive == calibration_report(labels, probs=probs[:, 1], mode="positive_class")


def test_combine_hands_on_everything():
    combined = evaluate.combine([evaluate.load(PATH), evaluate.load(PATH, "classwise")])
    probs, labels = draw()
    whole = combined.compute(predictions=probs, references=labels)
    for piece in np.array_split(np.arange(300), 3):
        combined.add_batch(predictions=probs[piece], references=labels[piece])
    streamed = combined.compute()
    combined.add(prediction=[1.0, 0.0], reference=0)
    assert combined.compute()["ece_0_accuracy"] == 1.0
    assert whole["ece_0_ece"] != whole["ece_1_ece"]
    for key in ("ece_0_ece", "ece_1_ece", "ece_0_nll"):
        assert streamed[key] == pytest.approx(whole[key], abs=1e-12)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m: m.compute(**CERTAIN, n_bins=3), "unknown keyword 'n_bins'"),
        (lambda m: m.compute(**CERTAIN, average="macro"), "unknown keyword 'average'"),
        (lambda m: m.add_batch(**CERTAIN, bins=3), "unknown keyword 'bins'"),
        (lambda m: m.add(prediction=[1.0, 0.0], reference=0, weight=2), "unknown keyword 'weight'"),
        (lambda m: m.compute(predictions=[[0.5, 0.5]]), "references are missing"),
        (lambda m: m.compute(references=[1]), "predictions are missing"),
        (lambda m: m.compute(), "nothing to compute"),
        (lambda m: m.compute(groups=["a"]), "describe predictions"),
        (lambda m: m.compute(**CERTAIN, from_logits="yes"), "from_logits must be True or False"),
        (lambda m: m.compute(**CERTAIN, mode="top"), "mode must be one of"),
        (lambda m: m.compute(predictions=[[2.0, 3.0]], references=[0]), "pass them as logits"),
        (lambda m: evaluate.load(PATH, nbins=3), "unknown keyword 'nbins'"),
        (lambda m: evaluate.load(PATH, "top"), "config_name must be one of"),
    ],
)
def test_bad_calls(metric, call, message):
    with pytest.raises(ValueError, match=message):
        call(metric)
    assert len(metric) == 0


def test_what_was_added_survives_a_failed_compute(metric):
    metric.add_batch(**CERTAIN)
    with pytest.raises(ValueError, match="bins"):
        metric.compute(predictions=[[1.0, 0.0]], references=[0], bins=0)
    with pytest.raises(ValueError, match="one mode for all"):
        metric.compute(mode="classwise")
    assert len(metric) == 2 and metric.compute()["ece"] == 0.5


def process(rank, folder, results):
    probs, labels = draw()
    metric = evaluate.load(
        PATH, num_process=3, process_id=rank, experiment_id="together", cache_dir=str(folder), timeout=60
    )
    if rank < 2:  # the last process has no data of its own
        rows = np.arange(300)[rank::2]
        metric.add_batch(predictions=probs[rows], references=labels[rows], groups=[f"g{i % 5}" for i in rows])
    results.put((rank, metric.compute()))


def test_several_processes_give_the_result_of_one(tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["evaluate", "hf_moecal.metrics"])  # imported once, not three times
    results = context.Queue()
    running = [context.Process(target=process, args=(rank, tmp_path, results)) for rank in range(3)]
    for worker in running:
        worker.start()
    found = dict(results.get(timeout=240) for _ in running)
    for worker in running:
        worker.join(60)
    probs, labels = draw()
    whole = calibration_report(labels, probs=probs, groups=[f"g{i % 5}" for i in range(300)])
    assert found[1] is None and found[2] is None
    assert found[0]["n"] == 300 and list(found[0]["groups"]) == list(whole["groups"])
    for key in ("ece", "nll", "brier", "aurc", "auroc", "smooth_ece", "ece_debiased"):
        assert found[0][key] == pytest.approx(whole[key], abs=1e-12)
    assert not list(tmp_path.rglob("*.arrow"))


def tiny_classifier():
    from transformers import MixtralConfig, MixtralForSequenceClassification

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        num_labels=3,
        pad_token_id=0,
        max_position_embeddings=16,
    )
    return MixtralForSequenceClassification(config)


@pytest.mark.parametrize("batched", [False, True])
def test_plain_trainer(tmp_path, batched):
    from transformers import Trainer, TrainingArguments

    rng = np.random.default_rng(0)
    data = [{"input_ids": rng.integers(1, 32, 6).tolist(), "labels": int(rng.integers(0, 3))} for _ in range(22)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), per_device_eval_batch_size=8, report_to=[], use_cpu=True, batch_eval_metrics=batched
    )
    model = tiny_classifier()
    trainer = Trainer(model=model, args=arguments, eval_dataset=data, compute_metrics=calibration_metrics(bins=10))
    found = trainer.evaluate()
    with torch.no_grad():
        logits = model(torch.tensor([row["input_ids"] for row in data])).logits
    truth = calibration_report([row["labels"] for row in data], logits=logits, bins=10)
    for key in ("ece", "ece_debiased", "nll", "brier", "accuracy", "signed_gap", "n"):
        assert found[f"eval_{key}"] == pytest.approx(truth[key], abs=1e-6), key
    assert found["eval_nll"] == pytest.approx(found["eval_loss"], abs=1e-5)
    assert trainer.evaluate()["eval_n"] == 22  # nothing is left over from the first evaluation


def test_card_examples_run_and_metadata_is_complete():
    import doctest

    import yaml

    card = (Path(PATH) / "README.md").read_text(encoding="utf-8")
    metadata = yaml.safe_load(card.split("---")[1])
    assert {"title", "sdk", "sdk_version", "app_file", "tags"} <= set(metadata)
    assert metadata["sdk"] == "gradio" and {"evaluate", "metric"} <= set(metadata["tags"])
    examples = doctest.DocTestParser().get_doctest(card, {}, "README.md", "README.md", 0)
    assert len(examples.examples) >= 6
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    runner.run(examples)
    assert runner.failures == 0


def space_app():
    pytest.importorskip("gradio", reason="needs gradio")
    import importlib.util

    spec = importlib.util.spec_from_file_location("space_app", Path(PATH) / "app.py")
    app = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(app)
    return app


@pytest.mark.parametrize(
    "text",
    [
        "0.9 0.1\n0.2 0.8",
        "[[0.9, 0.1], [0.2, 0.8]]",
        "[0.9, 0.1], [0.2, 0.8]",
        "(0.9; .1)\n(2e-1; 0.8)",
        "[0.9 0.1]\n[0.2 0.8]",
    ],
)
def test_the_page_reads_a_matrix_as_it_is_pasted(text):
    app = space_app()
    assert app.read_matrix(text) == [[0.9, 0.1], [0.2, 0.8]]
    assert app.read_labels("[0, 1]") == app.read_labels("0\n1") == [0, 1]
    table, figure, verdict = app.measure(text, "0 1", "probabilities")
    assert dict(table)["n"] == "2" and figure is not None and "chance" in verdict


@pytest.mark.parametrize(
    "text, labels, kind, message",
    [
        ("0.9 0.1 0.2 0.8", "0 1", "probabilities", "labels has 2 rows but probs has 1"),
        ("0.9 0.1\n0.2", "0 1", "probabilities", "the rows hold 2, 1 numbers"),
        ("0.9 x", "0", "probabilities", "'x' is not a number"),
        ("2 1", "0", "probabilities", "choose “logits” above"),
        ("0.33 0.33 0.33", "0", "probabilities", "choose “probabilities, rounded” above"),
        ("0.9 0.1", "0.5", "probabilities", "numbers of the classes"),
        ("", "", "probabilities", "empty"),
    ],
)
def test_the_page_says_what_is_wrong_and_shows_nothing_else(text, labels, kind, message):
    table, figure, verdict = space_app().measure(text, labels, kind)
    assert (table, figure) == ([], None) and message in verdict
    assert "pass " not in verdict and "renormalize" not in verdict


def test_the_page_measures_logits_and_rounded_probabilities():
    app = space_app()
    table, _, _ = app.measure("2 1\n0 3", "0 1", "logits")
    truth = calibration_report([0, 1], logits=[[2.0, 1.0], [0.0, 3.0]])
    assert dict(table)["nll"] == f"{truth['nll']:.4g}"
    assert dict(app.measure("0.33 0.33 0.33", "0", "probabilities, rounded")[0])["nll"] == "1.099"


def test_an_evaluation_that_was_interrupted_leaves_nothing_behind(tmp_path):
    from transformers import Trainer, TrainingArguments

    class Stumbling(torch.utils.data.Dataset):
        stumbles = True

        def __len__(self):
            return 22

        def __getitem__(self, i):
            if self.stumbles and i == 20:
                raise OSError("the disk is gone")
            return {"input_ids": [1 + i % 7] * 6, "labels": i % 3}

    data = Stumbling()
    arguments = TrainingArguments(
        output_dir=str(tmp_path), per_device_eval_batch_size=4, report_to=[], use_cpu=True, batch_eval_metrics=True
    )
    trainer = Trainer(
        model=tiny_classifier(), args=arguments, eval_dataset=data, compute_metrics=calibration_metrics(bins=10)
    )
    with pytest.raises(OSError, match="the disk is gone"):
        trainer.evaluate()
    data.stumbles = False
    assert trainer.evaluate()["eval_n"] == 22


def test_batches_of_an_interrupted_loop_are_forgotten_but_those_of_an_earlier_one_are_not(metric):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    loaders = [
        accelerator.prepare(torch.utils.data.DataLoader(torch.arange(8.0) / 10, batch_size=2)) for _ in range(3)
    ]

    def add(batch):
        metric.add_batch(predictions=torch.stack([1 - batch, batch], 1), references=[0] * len(batch))

    for i, batch in enumerate(loaders[0]):
        add(batch)
        if i == 1:
            break
    assert len(metric) == 4
    for loader in loaders[1:]:  # two sets, measured together
        for batch in loader:
            add(batch)
    assert metric.compute()["n"] == 16
    metric.add_batch(**CERTAIN)
    metric.reset()
    assert len(metric) == 0


def test_options_of_the_metric_reach_the_report(metric):
    rounded = [[0.33, 0.33, 0.33], [0.5, 0.25, 0.25]]
    found = metric.compute(predictions=rounded, references=[0, 1], renormalize=True, sample_weight=[1.0, 3.0])
    assert found == calibration_report([0, 1], probs=rounded, renormalize=True, sample_weight=[1.0, 3.0])


@pytest.mark.slow
def test_space_page_in_a_browser(tmp_path):
    """A user pastes probabilities and labels, and sees the figures and the diagram."""
    pytest.importorskip("gradio", reason="needs gradio")
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs Chromium")
    blocks = space_app().page()
    _, url, _ = blocks.launch(prevent_thread_lock=True, server_name="127.0.0.1", quiet=True, inbrowser=False)
    try:
        with sync_api.sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1200, "height": 900})
            page.goto(url)
            page.locator("#probs textarea").fill("[1.0, 0.0],\n[1.0, 0.0]")
            page.locator("#labels textarea").fill("0, 1")
            page.locator("#measure").click()
            page.locator("#diagram img").wait_for(timeout=60_000)
            page.wait_for_timeout(500)
            page.screenshot(path=str(tmp_path / "page.png"))
            text = page.locator("#figures").inner_text()
            assert "ece" in text and "0.5" in text
            page.locator("#probs textarea").fill("2.0 1.0\n1.0 0.0")
            page.locator("#measure").click()
            page.locator("#verdict").get_by_text("choose “logits” above").wait_for(timeout=60_000)
            assert "0.5" not in page.locator("#figures").inner_text()  # nothing of the former input is left
            assert page.locator("#diagram img").count() == 0
            page.screenshot(path=str(tmp_path / "wrong.png"))
            page.get_by_label("logits", exact=True).check()
            page.locator("#measure").click()
            page.locator("#diagram img").wait_for(timeout=60_000)
            assert "n_zero_probability" in page.locator("#figures").inner_text()
            assert "Not measured" not in page.locator("#verdict").inner_text()
            page.screenshot(path=str(tmp_path / "logits.png"))
            browser.close()
    finally:
        blocks.close()
