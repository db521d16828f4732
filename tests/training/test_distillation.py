"""Distilling a mixture into the native readout, against a loop that shares no code with it."""

import copy
import shutil

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification

from hf_moecal import distill, predict
from hf_moecal.cli.commands import main
from hf_moecal.hub.checkpoint_files import load_training_settings
from hf_moecal.metrics import calibration_report
from hf_moecal.model.freezing import set_trainable
from hf_moecal.model.weight_files import MEMBERS_FILE
from hf_moecal.readouts.committee import count_members, save_members
from hf_moecal.readouts.mixture import Readout
from hf_moecal.readouts.recorded import record_readout, recorded_readout
from tests.hub.helpers import tokenizer
from tests.readouts.helpers import READOUTS, committee, loop
from tests.training.helpers import VOCABULARY, classification_model, language_model, relative_error


def sequences(count, seed=3):
    generator = np.random.default_rng(seed)
    return [generator.integers(1, VOCABULARY, length).tolist() for length in generator.integers(3, 9, count)]


@pytest.mark.parametrize("cached", [False, True])
def test_each_step_is_that_of_the_divergence_from_the_loop(tmp_path, cached):
    rows, settings = sequences(10), READOUTS["soft of 3"]
    twin = classification_model()
    set_trainable(twin, "last_moe_layer")
    twin.eval()
    ids = [torch.tensor(row) for row in rows]
    teacher = torch.stack([loop(twin, row, len(row) - 1, settings)[0] for row in ids]).detach()
    trained = [p for p in twin.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    steps = [torch.randperm(10, generator=g).split(4) for g in [torch.Generator().manual_seed(7)] for _ in range(2)]
    steps = [part for epoch in steps for part in epoch]
    for step, part in enumerate(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 + np.cos(np.pi * step / len(steps))) / 2
        own = torch.cat([twin(input_ids=ids[row][None]).logits for row in part]).log_softmax(-1)
        (teacher[part].exp() * (teacher[part] - own)).sum(-1).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model = classification_model()
    before = copy.deepcopy(model.state_dict())
    changes = dict(prefix_cache=str(tmp_path)) if cached else {}
    distill(model, Dataset.from_dict({"input_ids": rows}), epochs=2, learning_rate=1e-2, batch_size=4, seed=7,
            progress=False, **settings, **changes)  # fmt: skip
    moved = {name: (tensor - before[name]) for name, tensor in model.state_dict().items()}
    expected = {name: (tensor - before[name]) for name, tensor in twin.state_dict().items()}
    assert relative_error(moved, expected) <= 2e-3  # AdamW makes much of gradients that are zero but for rounding
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name, p in twin.named_parameters() if p.requires_grad}
    assert not model._forward_hooks


def test_a_committee_teaches_its_first_member(tmp_path):
    data = Dataset.from_dict({"input_ids": sequences(48)})
    test = Dataset.from_dict({"input_ids": sequences(30, seed=4), "label": [i % 3 for i in range(30)]})
    model = committee()
    native = copy.deepcopy(model)
    teacher = predict(model, test, readout="soft_mixture", progress=False)
    found = distill(model, data, test=test, epochs=15, learning_rate=5e-3, batch_size=16, progress=False)
    assert count_members(model) == 1 and found.divergence[1] < 0.3 * found.divergence[0]
    assert list(found.figures) == ["native before", "teacher", "distilled"]
    first = classification_model()
    first.load_state_dict({k: v for k, v in native.state_dict().items() if not k.startswith("moecal_members")})
    tables = [predict(first, test, progress=False), teacher, predict(model, test, progress=False)]
    for figures, table in zip(found.figures.values(), tables, strict=True):
        report = calibration_report(table["label"], probs=table["probs"])
        assert all(figures[name] == pytest.approx(report[name], rel=1e-4) for name in ("nll", "ece", "brier", "n"))
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    np.testing.assert_allclose(
        predict(again, test, progress=False)["probs"][:], tables[2]["probs"][:], rtol=1e-4, atol=1e-6
    )


def test_from_the_shell(tmp_path, capsys):
    model = committee(vocab_size=32)
    model.save_pretrained(tmp_path / "model")
    save_members(model, tmp_path / "model")
    tokenizer(tmp_path / "model")
    record_readout(tmp_path / "model", Readout("soft_mixture", members=3))
    shutil.copytree(tmp_path / "model", tmp_path / "out")  # of an earlier committee nothing may stay
    texts = ["the plot is thin", "two leads carry it with ease", "not good", "and bad with ease", "yet not bad"]
    data = Dataset.from_dict({"text": texts, "label": [0, 1, 2, 0, 1], "id": list("abcde")})
    data.to_parquet(str(tmp_path / "data.parquet"))
    command = ["distill", "--model", str(tmp_path / "model"), "--data", str(tmp_path / "data.parquet")]
    command += ["--test", str(tmp_path / "data.parquet"), "--output", str(tmp_path / "out"), "--learning-rate", "1e-3"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("KL(mixture || native)", "native before", "teacher", "distilled"))
    assert load_training_settings(tmp_path / "out")["teacher"] == "soft_mixture, committee of 3"
    assert recorded_readout(tmp_path / "out") == Readout() and not (tmp_path / "out" / MEMBERS_FILE).exists()
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert main([*command[:-4], "--output", str(tmp_path / "model")]) == 2
    assert "would overwrite its teacher" in capsys.readouterr().err


def test_what_cannot_be_distilled_is_refused():
    data = Dataset.from_dict({"input_ids": sequences(4)})
    with pytest.raises(ValueError, match="nothing to learn from itself"):
        distill(classification_model(), data, readout="native")
    with pytest.raises(ValueError, match="MixtralForCausalLM is a language model"):
        distill(language_model(), data)
    with pytest.raises(ValueError, match="`epochs` must be above 0, got 0"):
        distill(classification_model(), data, epochs=0)
    with pytest.raises(ValueError, match="No row of `test` has a label"):
        distill(classification_model(), data, test=data, progress=False)
