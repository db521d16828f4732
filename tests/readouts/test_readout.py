"""Mixtures of experts' predictions against a loop over the experts: whole forwards with one token rerouted."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset

from hf_moecal import MoECalTrainer, predict, probe_experts
from hf_moecal.model.prefix_cache import PrefixCache
from hf_moecal.readouts.mixture import Mixture, Readout, log_mixture
from tests.readouts.helpers import READOUTS, between, examples_of, loop, reference
from tests.tiny_moe import tiny_batch, tiny_model
from tests.training.helpers import (
    OBJECTIVES,
    TASKS,
    arguments,
    classification_data,
    classification_model,
    collate,
    relative_error,
    trained_gradients,
)


def test_mixing_is_that_of_probabilities():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 3, 7, generator=generator)
    shares = torch.rand(5, 3, generator=generator).softmax(-1)
    found = log_mixture(logits.log_softmax(-1), shares)
    expected = sum(shares[:, k, None].double() * logits[:, k].double().softmax(-1) for k in range(3))
    assert (found.exp() - expected).abs().max() < 1e-6
    assert (found.exp().sum(-1) - 1).abs().max() < 1e-6


def test_a_share_of_zero_neither_counts_nor_spoils_the_gradient():
    logits = torch.tensor([[[1.0, 2.0], [5.0, -5.0]]], requires_grad=True)
    shares = torch.tensor([[1.0, 0.0]], requires_grad=True)
    found = log_mixture(logits.log_softmax(-1), shares)
    assert torch.equal(found[0], logits[0, 0].log_softmax(-1))
    found[0, 0].backward()
    assert torch.isfinite(logits.grad).all() and torch.isfinite(shares.grad).all()
    assert logits.grad[0, 1].abs().max() < 1e-30


def test_classes_of_probability_zero_leave_the_others_their_gradient():
    logits = torch.tensor([[[1.0, 2.0, -torch.inf], [5.0, -5.0, -torch.inf]]], requires_grad=True)
    found = log_mixture(logits.log_softmax(-1), torch.tensor([[0.5, 0.5]]))
    assert found[0, 2].exp() == 0
    found[0, 0].backward()
    assert torch.isfinite(logits.grad).all() and logits.grad[0, :, :2].any()


# The twin: one sequence alone, one forward per expert, everything written out.


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize("task", TASKS)
def test_gradients_equal_the_loop_over_experts(tmp_path, task, readout, objective):
    build, data, settings = TASKS[task]
    twin, examples = examples_of(task, readout)
    changes = {**settings, **OBJECTIVES[objective], **READOUTS[readout]}
    changes["tau_regret"] = between(examples[:, 1].detach())
    changes["tau_disagreement"] = float(examples[:, 2].detach().quantile(0.8))
    if objective == "robust":
        changes["expert_loss_weight"] = 0.5
    args = arguments(tmp_path, per_device_train_batch_size=3, gradient_accumulation_steps=3, **changes)
    found, trainer = trained_gradients(build(), data(), args)
    value = reference(examples, args)
    twin.zero_grad()
    value.backward(retain_graph=True)
    expected = {n: p.grad.clone() for n, p in twin.named_parameters() if p.grad is not None}
    assert relative_error(found, expected) <= (3e-5 if task == "token" else 1e-5)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(value.item(), rel=1e-5)


@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize("cached", [False, True])
def test_evaluate_and_predict_read_the_mixture(tmp_path, readout, cached):
    settings = READOUTS[readout]
    rows = classification_data()
    dataset = Dataset.from_list([{"input_ids": row["input_ids"].tolist(), "label": row["labels"]} for row in rows])
    model = classification_model().eval()
    expected = torch.stack([loop(model, row["input_ids"], len(row["input_ids"]) - 1, settings)[0] for row in rows])
    labels = torch.tensor([row["labels"] for row in rows])
    changes = dict(train="last_moe_layer", prefix_cache=str(tmp_path / "states")) if cached else {}
    args = arguments(tmp_path, objective="robust_filtered", per_device_eval_batch_size=3, **settings, **changes)
    trainer = MoECalTrainer(model=model, args=args, train_dataset=rows, eval_dataset=rows, data_collator=collate)
    unlabelled = [{**row, "labels": -100} for row in rows]
    found = trainer.predict(unlabelled[:1] + rows[1:])
    assert torch.from_numpy(found.predictions).sub(expected).abs().max() < 1e-5
    assert trainer.evaluate()["eval_nll"] == pytest.approx(F.nll_loss(expected, labels).item(), rel=1e-5)
    with PrefixCache(model, tmp_path / "states") if cached else nullcontext() as prefix:
        table = predict(model, dataset, prefix=prefix, progress=False, **settings).with_format("torch")
    torch.testing.assert_close(table["logits"][:], expected, rtol=1e-5, atol=1e-5)
    mixed = (table["expert_weights"][:][..., None] * table["expert_logits"][:].softmax(-1)).sum(1)
    torch.testing.assert_close(mixed, expected.exp(), rtol=1e-4, atol=1e-6)
    name = settings["readout"] + (" of 3" if "readout_experts" in settings else "")
    assert set(table["readout"][:]) == {name} and not model._forward_hooks
    assert set(predict(model, dataset, progress=False).column_names).isdisjoint({"readout"})


@pytest.mark.parametrize("experts", [8, 40])
@torch.no_grad()
def test_auto_takes_the_fewest_experts_that_hold_the_routers_mass(experts):
    model, inputs = tiny_model("qwen3_moe", num_experts=experts), {**tiny_batch(), "use_cache": False}
    tokens = torch.arange(18)
    with probe_experts(model) as probe:
        model(**inputs)
        shares, alone = probe.router_shares(tokens), probe.expert_logits(tokens, experts="all").softmax(-1)
        found, counts = Mixture(probe, Readout("soft_mixture", "auto")).log_probs(tokens).exp(), []
        first = Mixture(probe, Readout("soft_mixture", "auto")).log_probs(tokens[:1]).exp()
    for token in tokens.tolist():
        order = sorted(range(experts), key=lambda k, token=token: -shares[token, k])
        while sum(shares[token, k] for k in order[:-1]) >= 0.99:
            order.pop()
        kept = sum(shares[token, k] for k in order)
        expected = sum(shares[token, k] / kept * alone[token, k] for k in order)
        whole = (shares[token, :, None] * alone[token]).sum(0)
        torch.testing.assert_close(found[token], expected, rtol=1e-4, atol=1e-6)
        assert (expected - whole).abs().max() <= 0.01
        counts.append(len(order))
    assert min(counts) < max(counts) and sum(counts) < 18 * experts
    torch.testing.assert_close(first[0], found[0], rtol=1e-4, atol=1e-6)  # whatever others need


def test_auto_is_a_readout_like_the_others():
    readout = Readout("soft_mixture", "auto", members=2)
    assert Readout.named(readout.name) == readout and Readout.from_record(readout.record()) == readout
    with pytest.raises(ValueError, match="whole number or 'auto'"):
        Readout("soft_mixture", "all")
