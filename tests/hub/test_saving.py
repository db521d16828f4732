"""A model loaded with its calibration is saved with all that it was loaded with; what is stale is refused."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from datasets import Dataset, concatenate_datasets
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, Mxfp4Config

from hf_moecal import MoECalTrainer, from_pretrained, load_calibration, predict
from hf_moecal.calibration import (
    PerExpertTemperatureCalibrator,
    RoutingTemperatureCalibrator,
    VectorCalibrator,
    read_record,
)
from hf_moecal.calibration.base import TABLE_CALIBRATOR
from hf_moecal.hub import calibrate, write_calibration
from hf_moecal.hub.bake import bake
from hf_moecal.hub.publish import publishable
from hf_moecal.hub.saving import keep_on_save
from hf_moecal.model.conditions import as_text, conditions_of, differences, from_text
from hf_moecal.model.weight_files import MEMBERS_FILE, weights_fingerprint
from hf_moecal.readouts.committee import save_members
from hf_moecal.readouts.mixture import Readout
from hf_moecal.readouts.recorded import record_readout, recorded_readout
from tests.calibration.helpers import drawn, routed
from tests.hub.helpers import saved, temperature
from tests.readouts.helpers import committee
from tests.tiny_moe import tiny_config
from tests.training.helpers import arguments, classification_data, collate


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


def retrained(folder: Path) -> None:
    """What a plain Trainer, or save_pretrained, does to a folder: other weights, and the old files beside them."""
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        model.score.weight.add_(1e-3)
    model.save_pretrained(folder)


def test_a_calibration_of_other_weights_is_refused(tmp_path):
    folder = made("temperature", tmp_path / "checkpoint")
    retrained(folder)
    refused = (from_pretrained, load_calibration, publishable, lambda it: bake(it, output_dir=tmp_path / "baked"))
    for attempt in refused:
        with pytest.raises(ValueError, match="the weights beside it have changed .* `moecal calibrate`"):
            attempt(folder)
    assert not (tmp_path / "baked").exists()
    write_calibration(folder, temperature(3.0))  # the remedy
    assert from_pretrained(folder)(input_ids=IDS).logits.isfinite().all()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's own use of it
def test_an_adapter_on_another_base_is_refused(tmp_path):
    folder = made("adapter", tmp_path / "adapter")
    retrained(tmp_path / "base")
    with pytest.raises(ValueError, match="the adapter's base model has other weights"):
        from_pretrained(folder)


def test_training_into_a_calibrated_folder_drops_the_calibration(tmp_path):
    folder = made("mixture", tmp_path / "checkpoint")
    write_calibration(folder, EXPERTS)
    args = arguments(folder, train="last_moe_layer", readout="soft_mixture", readout_experts=2, learning_rate=1e-2)
    model, rows = AutoModelForSequenceClassification.from_pretrained(folder), classification_data()
    trainer = MoECalTrainer(model=model, args=args, train_dataset=rows, data_collator=collate)
    trainer.save_model()  # the same weights: it stays
    assert read_record(folder).method == "per_expert_temperature"
    trainer.train()
    with pytest.warns(UserWarning, match="dropped: the weights beside it have changed"):
        trainer.save_model()
    assert read_record(folder).method == "none" and recorded_readout(folder) == Readout("soft_mixture", 2)


def test_a_record_that_does_not_say_of_which_weights_it_is(tmp_path):
    folder = Path(saved(tmp_path))
    temperature().save(folder)
    with pytest.warns(UserWarning, match="does not say of which weights it is"):
        from_pretrained(folder)


def test_the_fingerprint_is_of_the_content(tmp_path):
    """Not of shards, order and names; and a change of one small tensor, or throughout a large one, shows."""
    tensors = {"norm": torch.randn(64), "large": torch.randn(256, 512).bfloat16(), "tied": torch.zeros(8)}
    paths = [tmp_path / name for name in "abcde"]
    for path in paths:
        path.mkdir()
    save_file(tensors, paths[0] / "model.safetensors")
    save_file({"model.tied": tensors["tied"], "norm": tensors["norm"]}, paths[1] / "model-1-of-2.safetensors")
    save_file({"large": tensors["large"], "again": tensors["tied"].clone()}, paths[1] / "model-2-of-2.safetensors")
    index = '{"weight_map": {"norm": "model-1-of-2.safetensors", "large": "model-2-of-2.safetensors"}}'
    (paths[1] / "model.safetensors.index.json").write_text(index)
    save_file({**tensors, "norm": tensors["norm"] * (1 + 1e-6)}, paths[2] / "model.safetensors")
    save_file({**tensors, "large": tensors["large"] * 1.01}, paths[3] / "model.safetensors")
    save_file({**tensors, "large": tensors["large"].view(torch.float16)}, paths[4] / "model.safetensors")
    found = [weights_fingerprint(path) for path in paths]
    assert found[0] == found[1] and len(set(found)) == 4
    (paths[1] / "model-2-of-2.safetensors").unlink()
    assert weights_fingerprint(paths[1]) is None
    whole = (paths[0] / "model.safetensors").read_bytes()
    for wrong in (whole[:-100], whole[:4], b"\xff" * 9):
        (paths[0] / "model.safetensors").write_bytes(wrong)
        with pytest.raises(ValueError, match="save the checkpoint again"):
            weights_fingerprint(paths[0])


def test_a_model_loaded_otherwise_than_it_was_calibrated_says_so_once(tmp_path):
    folder = saved(tmp_path / "checkpoint")
    data = Dataset.from_dict({"input_ids": torch.randint(3, 100, (40, 6)).tolist()})
    model = AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation="eager")
    found = predict(model, data, progress=False)["prediction"]
    labels = [(label + (row % 4 == 0)) % 3 for row, label in enumerate(found)]  # one in four is wrong
    table = predict(model, data.add_column("label", labels), progress=False)
    calibrate(folder, table, method="temperature", folds=2)
    assert read_record(folder).conditions == {
        "dtype": "float32", "attention": "eager", "experts": model.config._experts_implementation,
        "quantization": "none",
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        from_pretrained(folder, attn_implementation="eager")
    with pytest.warns(UserWarning) as said:
        from_pretrained(folder, dtype=torch.bfloat16)
    found = [str(entry.message) for entry in said if "under other conditions" in str(entry.message)]
    assert len(found) == 1 and "dtype 'float32', now 'bfloat16' (`dtype`)" in found[0]
    assert "attention 'eager', now 'sdpa' (`attn_implementation`)" in found[0] and "experts" not in found[0]
    other = concatenate_datasets([table, table.remove_columns("conditions").add_column("conditions", ["x"] * 40)])
    with pytest.raises(ValueError, match="mixes predictions .* 'conditions'"):
        calibrate(folder, other, method="temperature", folds=2)


@pytest.mark.parametrize(("config", "expected"), [
    ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "bitsandbytes nf4"),
    ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes int8"),
    ({"quant_method": "gptq", "bits": 4}, "gptq 4"),
    (Mxfp4Config(), "mxfp4"),
])  # fmt: skip
def test_a_quantized_base_is_named(config, expected):
    model = AutoModelForSequenceClassification.from_config(tiny_config("mixtral", num_labels=3))
    model.config.quantization_config = config
    found = conditions_of(model)
    assert found["quantization"] == expected and from_text(as_text(found)) == found
    told = differences(found, {**found, "quantization": "none"})
    assert told == f"quantization {expected!r}, now 'none' (`quantization_config`)"
