"""A model loaded with its calibration is saved with all that it was loaded with; what is stale is refused."""

from __future__ import annotations

import copy
import pickle
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from hf_moecal import MoECalTrainer, from_pretrained, load_calibration, predict
from hf_moecal.calibration import (
    PerExpertTemperatureCalibrator,
    RoutingTemperatureCalibrator,
    VectorCalibrator,
    read_record,
)
from hf_moecal.calibration.base import TABLE_CALIBRATOR
from hf_moecal.hub import calibrate, push, write_calibration
from hf_moecal.hub.bake import bake
from hf_moecal.hub.checkpoint_files import write_evaluation
from hf_moecal.hub.publish import publishable
from hf_moecal.hub.saving import keep_on_save
from hf_moecal.model.weight_files import MEMBERS_FILE, weights_fingerprint
from hf_moecal.readouts.committee import save_members
from hf_moecal.readouts.mixture import Readout
from hf_moecal.readouts.recorded import record_readout, recorded_readout
from tests.calibration.helpers import drawn, routed
from tests.hub.helpers import saved, temperature
from tests.readouts.helpers import committee
from tests.training.helpers import arguments, classification_data, classification_model, collate


IDS = torch.arange(3, 13)[None]
EXPERTS = PerExpertTemperatureCalibrator.from_parameters(
    {"temperature": 1.5, "shared": 1.0, "experts": {str(k): 0.5 + 0.25 * k for k in range(4)}}
)


def vector():
    logits, label = drawn(400, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return VectorCalibrator().fit({"logits": logits * [1, 2, 3], "label": label})


def made(kind: str, folder: Path) -> Path:
    """A checkpoint folder of each kind that `from_pretrained` loads."""
    if kind in ("adapter", "adapter of a mixture"):
        base = AutoModelForSequenceClassification.from_pretrained(saved(folder.with_name("base")))
        config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, task_type="SEQ_CLS")
        get_peft_model(base, config).save_pretrained(folder)
    elif kind.startswith("committee"):
        model = committee()
        model.save_pretrained(folder)
        save_members(model, folder)
    else:
        saved(folder)
    readouts = {
        "committee": Readout(members=3),
        "committee of mixtures": Readout("soft_mixture", members=3),
        "mixture": Readout("soft_mixture", 2),
        "experts' temperatures": Readout("soft_mixture"),
        "adapter of a mixture": Readout("soft_mixture"),
    }
    if kind in readouts:
        record_readout(folder, readouts[kind])
    calibrators = {"vector": vector, "experts' temperatures": lambda: EXPERTS}
    if kind not in ("committee of mixtures", "mixture"):
        write_calibration(folder, calibrators.get(kind, temperature)(), data={"name": "held-out"})
    if kind == "baked":
        bake(folder, output_dir=folder.with_name("baked"))
        return folder.with_name("baked")
    return folder


KINDS = (
    *("temperature", "vector", "baked", "mixture", "experts' temperatures", "committee", "committee of mixtures"),
    *("adapter", "adapter of a mixture"),
)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's own use of it
@pytest.mark.parametrize("kind", KINDS)
def test_a_round_trip_loses_nothing(tmp_path, kind):
    source = made(kind, tmp_path / "checkpoint")
    model = from_pretrained(source)
    expected = model(input_ids=IDS).logits.detach()
    first, second = tmp_path / "first", tmp_path / "second"
    model.save_pretrained(first)
    model.save_pretrained(second, max_shard_size="100KB")
    for folder in (first, second):
        assert (folder / MEMBERS_FILE).is_file() == (source / MEMBERS_FILE).is_file()
        assert read_record(folder) == read_record(source)  # with a fingerprint that does not depend on the sharding
        assert torch.equal(from_pretrained(folder)(input_ids=IDS).logits, expected)
    again = from_pretrained(first)
    again.save_pretrained(second)  # over what is there
    assert torch.equal(from_pretrained(second)(input_ids=IDS).logits, expected)


def test_a_calibrator_of_the_table_is_saved_with_the_model(tmp_path):
    folder = saved(tmp_path / "checkpoint")
    write_calibration(folder, RoutingTemperatureCalibrator().fit(routed(2000)))
    from_pretrained(folder).save_pretrained(tmp_path / "again")
    assert getattr(from_pretrained(tmp_path / "again"), TABLE_CALIBRATOR).method == "routing_temperature"
    assert read_record(tmp_path / "again") == read_record(folder)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_saves_itself(tmp_path, copied):
    record = read_record(made("temperature", tmp_path / "checkpoint"))
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "checkpoint")
    keep_on_save(model, record)
    other = copied(model)
    other.save_pretrained(tmp_path / "again")
    assert read_record(tmp_path / "again") == record
    with torch.no_grad():
        other.score.weight.zero_()
    with pytest.warns(UserWarning, match="changed after it was loaded"):
        other.save_pretrained(tmp_path / "again")
    assert not load_file(tmp_path / "again" / "model.safetensors")["score.weight"].any()


def test_a_model_that_was_trained_does_not_keep_its_calibration(tmp_path):
    model = from_pretrained(made("experts' temperatures", tmp_path / "checkpoint"))
    with torch.no_grad():
        model.score.weight.add_(0.1)
    write_calibration(saved(tmp_path / "again"), temperature())
    with pytest.warns(UserWarning, match="changed after it was loaded, so its calibration is not saved"):
        model.save_pretrained(tmp_path / "again")
    record = read_record(tmp_path / "again")
    assert record.method == "none" and recorded_readout(tmp_path / "again") == Readout("soft_mixture")
    from_pretrained(tmp_path / "again")


def test_a_smaller_model_over_a_committee_leaves_no_members(tmp_path):
    folder = made("committee", tmp_path / "committee")
    from_pretrained(made("temperature", tmp_path / "single")).save_pretrained(folder)
    assert not (folder / MEMBERS_FILE).exists() and read_record(folder).readout is None


def test_a_full_disk_leaves_the_members_that_were_there(tmp_path, monkeypatch):
    folder = made("committee", tmp_path)
    before = (folder / MEMBERS_FILE).read_bytes()

    def full(tensors, path, metadata=None):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_members(committee(), folder)
    assert (folder / MEMBERS_FILE).read_bytes() == before and not list(folder.glob(".members*"))
