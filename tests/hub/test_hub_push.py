"""Publishing, end to end: the real Hub client against a server on 127.0.0.1, with every step failing once."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, constants, hf_api
from huggingface_hub.utils import _http
from transformers import AutoModelForSequenceClassification

from hf_moecal.calibration.selection import calibrate_table
from hf_moecal.hub import PublishError, from_pretrained, push, write_calibration
from hf_moecal.hub.checkpoint_files import write_training_record
from hf_moecal.hub.model_card import benchmark_entry, merge_card
from hf_moecal.metrics import calibration_report
from tests.calibration.helpers import drawn
from tests.hub.helpers import saved, temperature, tokenizer
from tests.hub.loopback_hub import READ_ONLY_TOKEN, TOKEN, serve


SETS = {
    "movies": {"ece": 0.02, "ece_interval": [0.01, 0.04], "ece_debiased": 0.01, "nll": 0.3, "brier": 0.1, "n": 1200},
    "tweets | <b>x</b>": {"ece": 0.08, "ece_noise_floor": 0.09, "accuracy": 0.8, "signed_gap": -0.03, "n": 90},
}


@pytest.fixture
def hub(monkeypatch):
    with serve() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(hf_api.api, "endpoint", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nonexistent")
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr(_http.time, "sleep", lambda _: None)  # the client waits before it tries again
        yield server


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original")
    saved(folder, vocab_size=32)
    tokenizer(folder)
    write_calibration(folder, temperature(), data={"name": "movies", "revision": "1a2b", "n": 500})
    write_training_record(
        folder, settings={"objective": "robust_filtered", "eta": 2.0, "base_model": "org/base"}, ids=["a"]
    )
    (folder / "reliability_movies.png").write_bytes(b"\x89PNG")
    (folder / "training_args.bin").write_bytes(b"pickled " + TOKEN.encode())
    (folder / "optimizer.pt").write_bytes(b"pickled")
    return folder


@pytest.fixture
def checkpoint(original, tmp_path):
    return Path(shutil.copytree(original, tmp_path / "checkpoint"))


def test_pushed_and_loaded_from_the_hub_into_a_fresh_cache(hub, checkpoint, tmp_path):
    url = push(checkpoint, repo_id="org/model", evaluation=SETS, token=TOKEN)
    commit = hub.head("org/model")[0]
    assert url == f"{hub.url}/org/model/commit/{commit}"
    files = hub.files("org/model")
    assert {"model.safetensors", "config.json", "tokenizer.json", "calibration.json", "README.md"} <= set(files)
    assert not {"training_args.bin", "optimizer.pt"} & set(files)
    assert not any(TOKEN.encode() in content for content in files.values())
    # A process of its own, with nothing but the server's address and an empty cache.
    script = (
        "import torch, sys\n"
        "from hf_moecal.hub import from_pretrained\n"
        "model = from_pretrained('org/model')\n"
        "torch.save([dict(model.state_dict()), model(input_ids=torch.arange(3, 13)[None]).logits], sys.argv[1])\n"
    )
    environment = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "fresh"),
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "OMP_NUM_THREADS": "1",
        "PATH": "/usr/bin:/bin",
    }
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", script, tmp_path / "got.pt"], check=True, env=environment, cwd=root)
    tensors, logits = torch.load(tmp_path / "got.pt")
    plain = AutoModelForSequenceClassification.from_pretrained(checkpoint).eval()
    assert tensors.keys() == plain.state_dict().keys()
    assert all(torch.equal(tensors[name], value) for name, value in plain.state_dict().items())
    torch.testing.assert_close(logits, plain(input_ids=torch.arange(3, 13)[None]).logits / 1.7)


def test_the_card_says_what_was_measured(hub, checkpoint):
    push(checkpoint, repo_id="org/model", evaluation=SETS, token=TOKEN)
    text = hub.files("org/model")["README.md"].decode()
    assert text == (checkpoint / "README.md").read_text()
    for said in (
        "- objective: robust\\_filtered",
        "- eta: 2.0",
        "| movies | 1,200 | n/a | 0.020 (0.010 to 0.040) | 0.010 | 0.300 | 0.100 | n/a |",
        "| tweets \\| &lt;b&gt;x&lt;/b&gt; | 90 | 0.800 | 0.080 |",
        "Temperature 1.7. Fitted on movies at revision 1a2b, 500 rows.",
        "![Reliability diagram](reliability_movies.png)",
        "this set cannot tell the two apart",
        'from_pretrained("org/model")',
    ):
        assert said in text
    data = ModelCard(text).data
    assert {"hf_moecal", "calibration"} <= set(data.tags) and data.library_name == "transformers"
    ece = {result.dataset_name: result for result in data.eval_results if result.metric_type == "ece"}
    assert ece["movies"].metric_value == 0.02 and ece["movies"].metric_args == {"n": 1200, "interval_95": [0.01, 0.04]}
    assert len(ece) == 2 and len(data.eval_results) == 5


def test_figures_of_the_metrics_module_can_be_published(hub, checkpoint):
    logits, label = drawn(300, 3)
    result = calibrate_table({"logits": logits, "label": label, "group": ["x", "y", "z"] * 100}, method="temperature")
    write_calibration(checkpoint, result.calibrator, before=result.before, after=result.after, data=result.data)
    report = calibration_report(label, logits=logits, groups=["x", "y", "z"] * 100)
    push(checkpoint, repo_id="org/model", evaluation=report["groups"], token=TOKEN)
    text = hub.files("org/model")["README.md"].decode()
    assert f"| before | {result.before['ece']:.3f} | {result.before['nll']:.3f}" in text and "| x | 100 |" in text


def test_a_second_push_keeps_what_others_wrote(hub, checkpoint):
    (checkpoint / "README.md").write_text("---\nlicense: mit\ntags: [mine]\n---\n# By Trainer\n\nEpoch 1.\n")
    push(checkpoint, repo_id="org/model", evaluation=SETS, token=TOKEN)
    first = hub.files("org/model")["README.md"].decode()
    assert "license: mit" in first and "Epoch 1." in first
    # Nobody touched the published text: Trainer's newer card is taken.
    (checkpoint / "README.md").write_text("---\nlibrary_name: transformers\n---\n# By Trainer\n\nEpoch 2.\n")
    push(checkpoint, repo_id="org/model", token=TOKEN)
    second = hub.files("org/model")["README.md"].decode()
    assert "Epoch 2." in second and "Epoch 1." not in second and "license: mit" in second
    # A user edits on the Hub, text and metadata: both stay, although Trainer writes its card again.
    edited = second.replace("Epoch 2.", "Read this first.").replace("license: mit", "license: apache-2.0")
    edited += "\nMy own last words.\n"
    hub.edit("org/model", "README.md", edited.encode())
    (checkpoint / "README.md").write_text("# By Trainer\n\nEpoch 3.\n")
    changed = {"movies": {**SETS["movies"], "ece": 0.5}}
    push(checkpoint, repo_id="org/model", evaluation=changed, token=TOKEN)
    third = hub.files("org/model")["README.md"].decode()
    assert "Read this first." in third and "My own last words." in third and "Epoch 3." not in third
    assert "license: apache-2.0" in third and "mine" in ModelCard(third).data.tags
    assert third.count("hf_moecal:begin") == 1 and third.index("Read this") < third.index("## Calibration")
    assert third.index("## Calibration") < third.index("My own last words.")
    ece = [result for result in ModelCard(third).data.eval_results if result.metric_type == "ece"]
    assert [result.metric_value for result in ece] == [0.5]  # replaced, not added
    # Edits to the local copy of a card that nobody touched on the Hub are published too.
    (checkpoint / "README.md").write_text(third.replace("Read this first.", "Read that first."))
    push(checkpoint, repo_id="org/model", token=TOKEN)
    hub.edit("org/model", "notes.txt", b"unrelated")
    before = len(hub.repositories["org/model"]["main"])
    push(checkpoint, repo_id="org/model", token=TOKEN)
    assert len(hub.repositories["org/model"]["main"]) == before  # nothing changed: no commit


def test_results_of_others_in_the_model_index_stay(hub, checkpoint):
    index = (
        "---\nmodel-index:\n- name: model\n  results:\n  - task: {type: text-classification}\n"
        "    dataset: {name: GLUE, type: glue}\n    metrics: [{type: accuracy, value: 0.9}]\n---\n# Card\n"
    )
    (checkpoint / "README.md").write_text(index)
    for _ in range(2):
        push(checkpoint, repo_id="org/model", evaluation=SETS, token=TOKEN)
    results = ModelCard(hub.files("org/model")["README.md"].decode()).data.eval_results
    assert [r.metric_value for r in results if r.dataset_name == "GLUE"] == [0.9] and len(results) == 6


def test_old_weights_and_branches(hub, checkpoint):
    push(checkpoint, repo_id="org/model", token=TOKEN)
    hub.edit("org/model", "model-00001-of-00002.safetensors", b"an earlier, larger model")
    hub.edit("org/model", "onnx/model.safetensors", b"of the user")
    push(checkpoint, repo_id="org/model", token=TOKEN)
    assert "model-00001-of-00002.safetensors" not in hub.files("org/model")
    assert hub.files("org/model")["onnx/model.safetensors"] == b"of the user"
    write_calibration(checkpoint, temperature(3.0))
    push(checkpoint, repo_id="org/model", revision="trial", token=TOKEN)
    assert json.loads(hub.files("org/model", "trial")["calibration.json"])["parameters"]["temperature"] == 3.0
    assert json.loads(hub.files("org/model")["calibration.json"])["parameters"]["temperature"] == 1.7


STEPS = ["create", "info", "tree", "resolve", "validate", "preupload", "lfs", "upload", "verify", "commit", "paths"]


QUICK = [("commit", "drop after"), ("commit", "drop"), ("upload", 503), ("resolve", 503), ("paths", 400)]
FAULTS = [(step, kind) for step in STEPS for kind in (400, 503, "drop", "drop after")]


@pytest.mark.parametrize(
    "step, kind", [fault if fault in QUICK else pytest.param(*fault, marks=pytest.mark.slow) for fault in FAULTS]
)
def test_a_fault_at_any_step_leaves_nothing_half_done(hub, checkpoint, step, kind):
    push(checkpoint, repo_id="org/model", token=TOKEN)  # there is an older state that must stay whole
    old = hub.files("org/model")
    torch.manual_seed(1)
    AutoModelForSequenceClassification.from_config(
        AutoModelForSequenceClassification.from_pretrained(checkpoint).config
    ).save_pretrained(checkpoint)
    write_calibration(checkpoint, temperature(2.5))
    wanted = {name: (checkpoint / name).read_bytes() for name in ("model.safetensors", "calibration.json")}
    hub.requests.clear()
    hub.fault = (step, kind, 100)
    try:
        push(checkpoint, repo_id="org/model", token=TOKEN)
    except PublishError as error:
        assert "\n" not in str(error) and "X-Amz-Signature" not in str(error) and TOKEN not in str(error)
        assert error.__cause__ is None
        now = hub.files("org/model")
        landed = {name: now[name] for name in wanted} == wanted
        assert landed or now == old  # the old model or the new one, never a part
    else:
        # The commit's answer was lost, but the repository was found to hold exactly the new files.
        assert (step, kind) == ("commit", "drop after")
        assert {name: hub.files("org/model")[name] for name in wanted} == wanted
    assert step in hub.requests
    hub.fault = None
    push(checkpoint, repo_id="org/model", token=TOKEN)
    assert {name: hub.files("org/model")[name] for name in wanted} == wanted


def test_metadata_that_the_hub_refuses_are_named(hub, checkpoint):
    hub.metadata_error = '"base_model" must be a repository'
    with pytest.raises(PublishError, match='Invalid metadata in README.md. - "base_model" must be a repository'):
        push(checkpoint, repo_id="org/model", token=TOKEN)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_an_adapter_is_published_and_loaded_on_its_base(hub, tmp_path):
    from peft import LoraConfig, get_peft_model

    base = AutoModelForSequenceClassification.from_pretrained(saved(tmp_path / "base"))
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, task_type="SEQ_CLS")
    adapted = get_peft_model(base, config).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    write_calibration(tmp_path / "adapter", temperature())
    with pytest.warns(UserWarning, match="local folder"):
        push(tmp_path / "adapter", repo_id="org/adapter", token=TOKEN)
    names = {"adapter_config.json", "adapter_model.safetensors", "calibration.json", "README.md", ".gitattributes"}
    assert set(hub.files("org/adapter")) == names
    loaded = from_pretrained("org/adapter", cache_dir=tmp_path / "cache", token=TOKEN)
    ids = torch.arange(3, 13)[None]
    torch.testing.assert_close(loaded(input_ids=ids).logits, adapted(input_ids=ids).logits / 1.7)


def test_what_was_sent_is_not_sent_twice(hub, checkpoint):
    hub.fault = ("commit", 503, 100)
    with pytest.raises(PublishError, match="publishing"):
        push(checkpoint, repo_id="org/model", token=TOKEN)
    hub.fault = None
    hub.requests.clear()
    push(checkpoint, repo_id="org/model", token=TOKEN)
    assert "upload" not in hub.requests and "commit" in hub.requests


def test_a_short_outage_is_ridden_out(hub, checkpoint):
    hub.fault = ("upload", 503, 2)
    push(checkpoint, repo_id="org/model", token=TOKEN)
    assert "model.safetensors" in hub.files("org/model")


def test_a_change_in_between_is_not_overwritten(hub, checkpoint, monkeypatch):
    from hf_moecal.hub import publish

    push(checkpoint, repo_id="org/model", token=TOKEN)
    honest = publish.published_card

    def meanwhile(*arguments):
        card = honest(*arguments)
        hub.edit("org/model", "README.md", b"# Edited at the same moment\n")
        return card

    write_calibration(checkpoint, temperature(2.5))
    with monkeypatch.context() as patch:
        patch.setattr(publish, "published_card", meanwhile)
        with pytest.raises(PublishError, match="changed meanwhile; push again"):
            push(checkpoint, repo_id="org/model", token=TOKEN)
    push(checkpoint, repo_id="org/model", token=TOKEN)
    assert "# Edited at the same moment" in hub.files("org/model")["README.md"].decode()


def test_token_errors_are_one_clear_sentence(hub, checkpoint, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    with pytest.raises(PublishError, match="No access token.*hf auth login"):
        push(checkpoint, repo_id="org/model")
    wrong = "hf_" + "wrongwrong" * 4
    with pytest.raises(PublishError, match="does not accept the access token"):
        push(checkpoint, repo_id="org/model", token=wrong)
    with pytest.raises(PublishError, match="may not write|write permission"):
        push(checkpoint, repo_id="org/model", token=READ_ONLY_TOKEN)
    assert hub.repositories == {}
    push(checkpoint, repo_id="org/model", token=TOKEN)
    out = "".join(capfd.readouterr()) + caplog.text
    assert not any(token in out for token in (TOKEN, wrong, READ_ONLY_TOKEN))


def test_a_token_in_a_file_is_not_published(hub, checkpoint):
    record = json.loads((checkpoint / "calibration.json").read_text())
    for secret in (TOKEN, "hf_" + "Another1Token" * 3):
        (checkpoint / "calibration.json").write_text(json.dumps({**record, "warnings": [f"logged in with {secret}"]}))
        with pytest.raises(ValueError, match="calibration.json holds an access token") as caught:
            push(checkpoint, repo_id="org/model", token=TOKEN)
        assert secret not in str(caught.value)
    (checkpoint / "calibration.json").write_text(json.dumps(record))
    (checkpoint / "README.md").write_text(f"Use {TOKEN}")
    with pytest.raises(ValueError, match="README.md holds an access token"):
        push(checkpoint, repo_id="org/model", token=TOKEN)
    assert "org/model" not in hub.repositories or TOKEN.encode() not in b"".join(hub.files("org/model").values())


def test_only_whole_checkpoints_are_published(hub, checkpoint, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ValueError, match="no checkpoint to publish"):
        push(tmp_path / "empty", repo_id="org/model", token=TOKEN)
    first, second = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
    (checkpoint / "model.safetensors").rename(checkpoint / first)
    index = {"metadata": {}, "weight_map": {"a": first, "b": second}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="names 'model-00002-of-00002.safetensors'"):
        push(checkpoint, repo_id="org/model", token=TOKEN)
    (checkpoint / first).rename(checkpoint / "model.safetensors")
    (checkpoint / "calibration.json").write_text('{"format": "x"}')
    with pytest.raises(ValueError, match="calibration.json"):
        push(checkpoint, repo_id="org/model", token=TOKEN)
    assert hub.requests == []


def test_hostile_text_stays_text(hub, checkpoint):
    evil = "<!-- hf_moecal:end --> [x](javascript:1) | `rm` \n# Title\x00"
    write_calibration(checkpoint, temperature(), data={"name": evil, "n": 5}, warnings=[evil])
    for _ in range(2):
        push(checkpoint, repo_id="org/model", evaluation={evil: {"ece": 0.1, "n": 5}}, token=TOKEN)
    text = hub.files("org/model")["README.md"].decode()
    text = text.split("---\n", 2)[2]  # in the metadata it is quoted
    assert text.count("<!-- hf_moecal:end -->") == 1 and "\n# Title" not in text and "[x](" not in text


def test_a_huge_record_on_the_hub_is_not_fetched(hub, checkpoint, tmp_path):
    push(checkpoint, repo_id="org/model", token=TOKEN)
    hub.edit("org/model", "calibration.json", b" " * (33 << 20))
    cache = tmp_path / "cache"
    with pytest.raises(ValueError, match="33 MiB"):
        from_pretrained("org/model", cache_dir=cache, token=TOKEN)
    assert not list(cache.rglob("calibration.json"))
    del hub.head("org/model")[1]["calibration.json"]
    with pytest.raises(ValueError, match="has no calibration.json"):
        from_pretrained("org/model", cache_dir=cache, token=TOKEN)


def test_the_trainer_publishes_with_its_record(hub, tmp_path):
    from datasets import Dataset

    from hf_moecal import MoECalArguments, MoECalTrainer

    folder = tmp_path / "run"
    folder.mkdir()
    model, data = saved(folder, vocab_size=32), {"input_ids": [[4, 5, 6], [7, 8, 9]], "label": [0, 1]}
    args = MoECalArguments(
        str(folder), push_to_hub=True,
        hub_model_id="org/run", hub_token=TOKEN, objective="erm", max_steps=1, report_to="none",
        save_strategy="no", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    train = Dataset.from_dict({**data, "id": ["row-1", "row-2"]})
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    trainer = MoECalTrainer(model=model, args=args, train_dataset=train)
    trainer.train()
    trainer.save_model()
    write_calibration(folder, temperature())
    url = trainer.push_to_hub()
    assert url.startswith(hub.url) and "org/run" in url
    files = hub.files("org/run")
    assert {"model.safetensors", "calibration.json", "moecal_training.json", "README.md"} <= set(files)
    assert not any(name.endswith(".bin") for name in files) and TOKEN.encode() not in b"".join(files.values())
    loaded = AutoModelForSequenceClassification.from_pretrained("org/run", cache_dir=tmp_path / "cache", token=TOKEN)
    for one, other in zip(trainer.model.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_trainer_s_evaluation_is_on_the_card(hub, tmp_path):
    from datasets import Dataset

    from hf_moecal import MoECalArguments, MoECalTrainer

    folder = tmp_path / "run"
    base = saved(tmp_path / "base", vocab_size=32)
    rows = Dataset.from_dict({"input_ids": [[4, 5, 6], [7, 8, 9]] * 4, "label": [0, 1] * 4})
    args = MoECalArguments(
        str(folder), hub_model_id="org/run", hub_token=TOKEN, objective="erm", max_steps=1, report_to="none",
        save_strategy="no", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    model = AutoModelForSequenceClassification.from_pretrained(base)
    trainer = MoECalTrainer(model=model, args=args, train_dataset=rows, eval_dataset={"a": rows, "b": rows})
    before = trainer.evaluate()
    trainer.train()  # which makes those figures another model's
    after = trainer.evaluate({"b": rows})
    assert before["eval_b_ece"] != after["eval_b_ece"]
    trainer.push_to_hub(license="mit")
    files = hub.files("org/run")
    card = files["README.md"].decode()
    assert f"| b | 8 | {after['eval_b_accuracy']:.3f} | {after['eval_b_ece']:.3f} |" in card and "| a |" not in card
    assert "No evaluation set" not in card and "ore information needed" not in card
    data = ModelCard(card).data
    assert (data.license, data.pipeline_tag, data.library_name) == ("mit", "text-classification", "transformers")
    for content in (files["README.md"], files["moecal_training.json"]):
        assert str(tmp_path).encode() not in content
    trainer.model.score.weight.data.add_(1)
    trainer.state.global_step += 1
    with pytest.warns(UserWarning, match="figures in moecal_evaluation.json are dropped: the weights"):
        trainer.push_to_hub(license="mit")
    assert "No evaluation set was recorded" in hub.files("org/run")["README.md"].decode()


def test_figures_say_whether_they_are_calibrated(hub, checkpoint, tmp_path, monkeypatch):
    from datasets import Dataset

    from hf_moecal.cli.commands import main

    push(checkpoint, repo_id="org/raw", evaluation=SETS, token=TOKEN, license="mit")
    raw = hub.files("org/raw")["README.md"].decode()
    assert "before the calibration below**; what it makes of them on these sets was not measured:" in raw
    logits, label = drawn(300, 3)
    table = Dataset.from_dict({"logits": 2.0 * logits, "label": label, "group": ["x", "y", "z"] * 100})
    table = temperature().apply(table)  # applied already: the logits stay those of the model
    table.to_parquet(tmp_path / "table.parquet")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    push_it = ["push", "--model", str(checkpoint), "--repo-id", "org/both", "--license", "mit"]
    assert main([*push_it, "--table", str(tmp_path / "table.parquet")]) == 0
    card = hub.files("org/both")["README.md"].decode()
    for part, scale in (("before the calibration below**:", 1.0), ("as the model loads below:**", 1.7)):
        expected = calibration_report(label, logits=2.0 * logits / scale, groups=["x", "y", "z"] * 100)["groups"]["x"]
        section = card.split(part)[1]
        assert f"| x | 100 | {expected['accuracy']:.3f} | {expected['ece']:.3f} " in section
    names = {result.metric_name for result in ModelCard(card).data.eval_results}
    assert {"ECE (hf_moecal)", "ECE, calibrated (hf_moecal)"} <= names
    calibrated = table.remove_columns("logits").add_column("calibration", ["temperature"] * 300)
    calibrated.to_parquet(tmp_path / "table.parquet")
    assert main([*push_it, "--table", str(tmp_path / "table.parquet")]) == 2  # nothing tells the model's own any more


def test_an_evaluation_of_other_weights_is_refused(hub, checkpoint):
    (checkpoint / "calibration.json").unlink()
    push(checkpoint, repo_id="org/model", evaluation=SETS, token=TOKEN, license="mit")
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint)
    model.score.weight.data.add_(1)
    model.save_pretrained(checkpoint)
    with pytest.raises(ValueError, match="moecal_evaluation.json is not of this checkpoint: the weights"):
        push(checkpoint, repo_id="org/model", token=TOKEN)
    push(checkpoint, repo_id="org/model", evaluation=SETS, token=TOKEN)  # the remedy


@pytest.mark.parametrize("full", ["card", "evaluation", "download"])
def test_a_full_disk_stops_before_anything_is_published(hub, checkpoint, monkeypatch, full):
    """And leaves the local files as they were."""
    push(checkpoint, repo_id="org/model", evaluation=SETS, token=TOKEN, license="mit")
    before, head = (checkpoint / "README.md").read_bytes(), hub.head("org/model")
    (checkpoint / "reliability_new.png").write_bytes(b"\x89PNG")
    name = {"card": ".README.md.", "evaluation": ".moecal_evaluation.json.", "download": None}[full]
    original = os.fdopen

    def out_of_space(*_, **__):
        raise OSError(28, "No space left on device")

    def fdopen(handle, *args, **kwargs):
        file = original(handle, *args, **kwargs)
        if name is not None and any(path.name.startswith(name) for path in checkpoint.iterdir()):
            file.write = out_of_space
        return file

    monkeypatch.setattr(os, "fdopen", fdopen)
    if full == "download":
        monkeypatch.setattr("huggingface_hub.HfApi.hf_hub_download", out_of_space)
    with pytest.raises((OSError, PublishError), match="No space left on device") as caught:
        push(checkpoint, repo_id="org/model", evaluation=SETS, token=TOKEN)
    if full != "evaluation":
        assert "nothing was published" in str(caught.value) or "Nothing half-done" in str(caught.value)
    assert (checkpoint / "README.md").read_bytes() == before and hub.head("org/model") == head
    assert not [path.name for path in checkpoint.iterdir() if path.name.startswith(".")]


def test_what_a_folder_held_before_is_not_published(hub, checkpoint):
    shutil.copy(checkpoint / "model.safetensors", checkpoint / "model-00001-of-00002.safetensors")
    (checkpoint / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}'
    )
    push(checkpoint, repo_id="org/model", token=TOKEN, license="mit")
    weights = [name for name in hub.files("org/model") if "safetensors" in name]
    assert weights == ["model.safetensors"]
    shutil.copy(checkpoint / "model.safetensors", checkpoint / "members.safetensors")
    with pytest.raises(ValueError, match="of other|the weights beside it|is of a committee"):
        push(checkpoint, repo_id="org/model", token=TOKEN)


def test_a_license_is_that_of_the_base_or_asked_for(hub, checkpoint, tmp_path):
    with pytest.warns(UserWarning, match="names no license, .*`--license`"):
        push(checkpoint, repo_id="org/none", token=TOKEN)
    write_training_record(checkpoint, settings={"base_model": "org/base"})
    shutil.copytree(checkpoint, tmp_path / "published-base")
    (tmp_path / "published-base" / "README.md").write_text("---\nlicense: bsd-3-clause\n---\n# Base\n")
    push(tmp_path / "published-base", repo_id="org/base", token=TOKEN)
    push(checkpoint, repo_id="org/model", token=TOKEN)
    assert ModelCard(hub.files("org/model")["README.md"].decode()).data.license == "bsd-3-clause"


def test_a_card_without_placeholders_and_paths():
    trainer = (
        "---\nbase_model: /home/me/base\ntags:\n- base_model:adapter:/home/me/base\n- mine\n---\n"
        "# run\n\nThis model is a fine-tuned version of [/home/me/base](https://huggingface.co//home/me/base) on "
        "text.\n\n"
        "## Model description\n\nMore information needed\n\n## Training and evaluation data\n\nTweets, by hand.\n\n"
        "## Bias\n\n<!-- what -->\n\n### Recommendations\n\n[More Information Needed]\n\n"
        "- **Who:** [More Information Needed]\n\n"
        "## Uses\n\n<!-- unfilled -->\n\n### Direct Use\n\nSentences.\n\n[More Information Needed]\n"
    )
    card = merge_card(
        local=trainer, remote=None, section="ours\n", results=[], model_name="run", defaults={"license": "mit"}
    )
    assert "/home/me" not in card and "nformation" not in card and "Bias" not in card and "description" not in card
    for kept in (
        "version of a local checkpoint on text.",
        "Tweets, by hand.",
        "## Uses",
        "Sentences.",
        "- mine",
        "ours",
    ):
        assert kept in card
    edited = merge_card(
        local=None, remote=trainer, section="ours\n", results=[], model_name="run", defaults={"license": "mit"}
    )
    assert "More information needed" in edited  # what stands on the Hub is its owner's


def test_a_benchmark_s_result_has_a_file_of_its_own():
    from huggingface_hub import parse_eval_result_entries

    figures = {"accuracy": 0.75, "ece": 0.0412, "n": 400}
    dataset = {"id": "org/quiz", "task_id": "hard", "revision": "1a2b"}
    ((name, content),) = benchmark_entry({"sets": {"quiz": figures}, "dataset": dataset}).items()
    (entry,) = parse_eval_result_entries(yaml.safe_load(content))
    assert name == ".eval_results/quiz-hard.yaml" and (entry.value, entry.dataset_id) == (0.75, "org/quiz")
    assert (entry.task_id, entry.dataset_revision) == ("hard", "1a2b") and "ECE 0.0412" in entry.notes
    assert not benchmark_entry({"sets": {"quiz": figures}, "dataset": {"id": "org/quiz"}})
    assert not benchmark_entry({"sets": {"a": figures, "b": figures}, "dataset": dataset}) and not benchmark_entry(
        None
    )


def test_the_command_line_publishes(hub, original, tmp_path, monkeypatch, capsys):
    from hf_moecal.cli.commands import main

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert main(["push", "--model", str(original), "--repo-id", "org/cli"]) == 0
    assert "org/cli" in capsys.readouterr().out and "calibration.json" in hub.files("org/cli")
    monkeypatch.delenv("HF_TOKEN")
    assert main(["push", "--model", str(original), "--repo-id", "org/other"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("moecal push: ") and error.count("\n") == 1
