"""Committees of last MoE layers against as many models of their own, each with one member's weights."""

from contextlib import nullcontext

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification

from hf_moecal import MoECalTrainer, predict
from hf_moecal.model.freezing import set_trainable
from hf_moecal.model.prefix_cache import PrefixCache
from hf_moecal.readouts.attached import AttachedReadout
from hf_moecal.readouts.committee import (
    CONTAINER,
    MEMBERS_FILE,
    add_members,
    count_members,
    load_members,
    member_models,
    member_names,
    save_members,
)
from hf_moecal.readouts.mixture import Readout
from hf_moecal.versions import cache_name, given_cache
from tests.readouts.helpers import MEMBERS, READOUTS, committee
from tests.training.helpers import (
    OBJECTIVES,
    TASKS,
    arguments,
    classification_data,
    classification_model,
    collate,
    language_model,
    relative_error,
    trained_gradients,
)


ALL_READOUTS = {"native": {}, **READOUTS}


def alone(model, number, build=classification_model, **changes):
    """A model of its own with the weights of one member."""
    single = build(**changes)
    if number:
        own = {name: dict(model.named_parameters())[key] for key, name in member_names(model).items()
               if key.startswith(f"{CONTAINER}.{number}/")}  # fmt: skip
        assert len(own) >= 5
        single.load_state_dict({**single.state_dict(), **own})
    return single


def separate(found, number):
    """The gradients of one member, by the names that they have in a model of its own."""
    if not number:
        return {name: gradient for name, gradient in found.items() if not name.startswith(f"{CONTAINER}.")}
    start = f"{CONTAINER}.{number}/"
    return {k.removeprefix(start).replace("/", "."): g for k, g in found.items() if k.startswith(start)}


def test_members_differ_and_share_everything_before_the_last_block():
    model = committee()
    others = member_models(model)
    assert [count_members(m) for m in (model, classification_model())] == [3, 1] and len(others) == 2
    assert others[0].model.layers[0] is model.model.layers[0]
    assert others[0].model.layers[1].self_attn is model.model.layers[1].self_attn
    for a, b in [(model, others[0]), (model, others[1]), (others[0], others[1])]:
        assert not torch.equal(a.score.weight, b.score.weight)
        assert not torch.equal(a.model.layers[1].mlp.gate.weight, b.model.layers[1].mlp.gate.weight)
    ids = torch.arange(1, 9)[None]
    for number, member in enumerate([model, *others]):
        assert torch.equal(member.eval()(input_ids=ids).logits, alone(model, number).eval()(input_ids=ids).logits)
    again = committee()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


CASES = [
    ("classification", "native", "erm", False),
    ("classification", "native", "filtered", True),
    ("classification", "mixture", "robust-through", False),
    ("classification", "soft", "filtered", True),
    ("sequence", "native", "filtered", False),
    ("sequence", "soft", "filtered", True),
    ("token", "native", "robust", True),
    ("token", "soft of 3", "robust", False),
]


@pytest.mark.parametrize(("task", "readout", "objective", "cached"), CASES)
def test_gradients_are_those_of_separate_runs(tmp_path, task, readout, objective, cached):
    build, data, settings = TASKS[task]
    changes = {**settings, **OBJECTIVES[objective], **ALL_READOUTS[readout], "train": "last_moe_layer"}
    if readout != "native":
        changes["expert_loss_weight"] = 0.5
    if cached:
        changes["prefix_cache"] = str(tmp_path / "states")
    changes |= dict(per_device_train_batch_size=3, gradient_accumulation_steps=3)
    model = committee(build)
    singles = [alone(model, number, build) for number in range(MEMBERS)]
    found, trainer = trained_gradients(model, data(), arguments(tmp_path, readout_members=MEMBERS, **changes))
    total = 0.0
    for number, single in enumerate(singles):
        expected, run = trained_gradients(single, data(), arguments(tmp_path, **changes))
        own = separate(found, number)
        assert own.keys() == expected.keys() and relative_error(own, expected) <= 1e-5
        total += run.state.log_history[0]["loss"]
    assert trainer.state.log_history[0]["loss"] == pytest.approx(total, rel=1e-5)
    assert set(found) == {*separate(found, 0), *member_names(model)}


@pytest.mark.parametrize("readout", ALL_READOUTS)
@pytest.mark.parametrize("cached", [False, True])
def test_evaluate_and_predict_mix_the_members(tmp_path, readout, cached):
    settings, rows = ALL_READOUTS[readout], classification_data()
    dataset = Dataset.from_list([{"input_ids": row["input_ids"].tolist(), "label": row["labels"]} for row in rows])
    model = committee()
    tables = [predict(alone(model, number), dataset, progress=False, **settings) for number in range(MEMBERS)]
    expected = torch.stack([table.with_format("torch")["probs"][:] for table in tables]).mean(0)
    changes = dict(prefix_cache=str(tmp_path / "states")) if cached else {}
    args = arguments(tmp_path, train="last_moe_layer", readout_members=MEMBERS, per_device_eval_batch_size=3,
                     objective="robust_filtered", **settings, **changes)  # fmt: skip
    trainer = MoECalTrainer(model=model, args=args, train_dataset=rows, eval_dataset=rows, data_collator=collate)
    assert torch.from_numpy(trainer.predict(rows).predictions).exp().sub(expected).abs().max() < 1e-6
    found = trainer.evaluate()
    nll = -expected[range(len(rows)), [row["labels"] for row in rows]].log().mean().item()
    assert found["eval_nll"] == pytest.approx(nll, rel=1e-5) and found["eval_loss"] == pytest.approx(nll, rel=1e-5)
    with PrefixCache(model, tmp_path / "states") if cached else nullcontext() as prefix:
        table = predict(model, dataset, prefix=prefix, progress=False, **settings).with_format("torch")
    torch.testing.assert_close(table["probs"][:].double(), expected.double(), rtol=1e-5, atol=1e-6)
    mixed = (table["expert_weights"][:][..., None] * table["expert_logits"][:].softmax(-1)).sum(1)
    torch.testing.assert_close(mixed, expected.float(), rtol=1e-4, atol=1e-6)
    assert set(table["readout"][:]) == {Readout(*settings.values(), members=MEMBERS).name}
    experts = 1 if readout == "native" else 4
    assert int(table["expert_ids"][:].max()) < MEMBERS * experts and not model._forward_hooks


@pytest.mark.parametrize("readout", ["native", "soft"])
@pytest.mark.parametrize("task", ["sequence", "token"])
def test_language_models_evaluate_the_whole_committee(tmp_path, task, readout, monkeypatch):
    build, data, settings = TASKS[task]
    monkeypatch.setattr("hf_moecal.model.head.CHUNK_ELEMENTS", 200)
    monkeypatch.setattr("hf_moecal.readouts.attached.CHUNK_ELEMENTS", 200)
    model, rows = committee(build), data()
    args = arguments(tmp_path, train="last_moe_layer", readout_members=MEMBERS, **settings, **ALL_READOUTS[readout])
    trainer = MoECalTrainer(model=model, args=args, train_dataset=rows, eval_dataset=rows, data_collator=collate)
    found, losses = trainer.evaluate(), []
    for row in rows:
        parts = []
        for number in range(MEMBERS):
            single, tokens = alone(model, number, build).eval(), torch.arange(len(row["input_ids"]))
            with (
                torch.no_grad(),
                AttachedReadout(single, Readout(*ALL_READOUTS[readout].values()), rows=True) as attached,
            ):
                with attached.at(tokens):
                    output = single(input_ids=row["input_ids"][None])
                    parts.append(attached.together(output, lambda part, log_probs: log_probs))
        together = torch.stack(parts).logsumexp(0)[:-1] - torch.tensor(MEMBERS).log()
        keep = row["labels"][1:] != -100
        losses.append(-together[keep].gather(1, row["labels"][1:][keep][:, None]).squeeze(1))
    expected = torch.cat(losses).mean()
    assert found["eval_nll"] == pytest.approx(expected.item(), rel=1e-5)


def test_one_folder_holds_the_committee_and_member_0_is_a_plain_checkpoint(tmp_path):
    model = committee()
    model.save_pretrained(tmp_path)
    save_members(model, tmp_path)
    ids = torch.arange(1, 9)[None]
    plain, report = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(plain.eval()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
    load_members(plain, tmp_path / MEMBERS_FILE)
    pairs = zip(member_models(plain), member_models(model), strict=True)
    assert all(torch.equal(a.eval()(input_ids=ids).logits, b.eval()(input_ids=ids).logits) for a, b in pairs)
    with pytest.raises(ValueError, match="does not fit MixtralForSequenceClassification"):
        load_members(classification_model(intermediate_size=16), tmp_path / MEMBERS_FILE)
    with pytest.raises(ValueError, match="another committee"):
        load_members(committee(members=2), tmp_path / MEMBERS_FILE)


def test_resuming_and_the_best_checkpoint_restore_every_member(tmp_path):
    rows = classification_data()
    settings = dict(train="last_moe_layer", readout_members=2, readout="soft_mixture", optim="adamw_torch",
                    weight_decay=0.1, learning_rate=1e-2, save_strategy="steps", save_steps=2, eval_strategy="steps",
                    eval_steps=2, per_device_train_batch_size=4, gradient_accumulation_steps=1)  # fmt: skip

    def run(folder, steps, resume=None, **changes):
        args = arguments(tmp_path / folder, **{**settings, "max_steps": steps, **changes})
        model = classification_model()
        trainer = MoECalTrainer(model=model, args=args, train_dataset=rows, eval_dataset=rows, data_collator=collate)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run("whole", 4).model.state_dict()
    assert len(whole) > len(classification_model().state_dict())
    resumed = run("resumed", 4, resume=str(tmp_path / "whole" / "checkpoint-2"))
    assert all(torch.equal(tensor, whole[name]) for name, tensor in resumed.model.state_dict().items())
    best = run("best", 4, load_best_model_at_end=True, metric_for_best_model="eval_nll", greater_is_better=True)
    assert best.state.best_model_checkpoint.endswith("checkpoint-2")

    kept = AutoModelForSequenceClassification.from_pretrained(tmp_path / "best" / "checkpoint-2")
    load_members(kept, tmp_path / "best" / "checkpoint-2" / MEMBERS_FILE)
    assert all(torch.equal(a, b) for a, b in zip(best.model.parameters(), kept.parameters(), strict=True))


def test_members_decay_as_the_first_one_does(tmp_path):
    args = arguments(tmp_path, train="last_moe_layer", readout_members=2, weight_decay=0.1)
    trainer = MoECalTrainer(model=classification_model(), args=args, train_dataset=classification_data())
    decays = set(trainer.get_decay_parameter_names(trainer.model))
    for key, name in member_names(trainer.model).items():
        assert (key in decays) == (name in decays) == ("norm" not in name)


def test_what_a_committee_cannot_do_is_refused(tmp_path):
    with pytest.raises(ValueError, match="set train='last_moe_layer'"):
        arguments(tmp_path, readout_members=2)
    with pytest.raises(ValueError, match="1 or more, got 0"):
        arguments(tmp_path, readout_members=0)
    with pytest.raises(ValueError, match="would balance the routers of the first member only"):
        arguments(tmp_path, readout_members=2, train="last_moe_layer", router_aux_loss_coef=0.1)
    with pytest.raises(ValueError, match="has 3 members already, so it cannot train 2"):
        add_members(committee(), 2, seed=0)
    model = committee(language_model).eval()
    ids = torch.arange(1, 6)[None]
    cache = given_cache(model(input_ids=ids[:, :3], use_cache=True))
    with AttachedReadout(model, rows=True) as attached, attached.at(torch.tensor([1])):
        with pytest.raises(ValueError, match="only its first member has a cache"):
            model(input_ids=ids[:, 3:], **{cache_name(): cache})


def test_an_optimizer_that_leaves_members_out_is_refused(tmp_path):
    model = classification_model()
    set_trainable(model, "last_moe_layer")
    early = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    args = arguments(tmp_path, readout_members=2, train="last_moe_layer")
    with pytest.raises(ValueError, match="leaves out .* parameters"):
        MoECalTrainer(model=model, args=args, train_dataset=classification_data(), optimizers=(early, None))
    late = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    MoECalTrainer(model=model, args=args, train_dataset=classification_data(), optimizers=(late, None))
