"""The routers' load-balancing loss against transformers' own, on values and gradients, and added exactly once."""

import pytest
import torch

from hf_moecal import MoECalTrainer
from hf_moecal.training.aux_loss import RouterBalance, balance_coefficient
from tests.tiny_moe import families, tiny_batch, tiny_model
from tests.training.helpers import (
    TASKS,
    Gradients,
    arguments,
    balance_of,
    classification_data,
    classification_model,
    collate,
    language_data,
    language_model,
    objective_reference,
    relative_error,
)


COEFFICIENT = 0.5
FEW = {"mixtral": 0.001, "gpt_oss": 0.001, "dbrx": 0.01, "olmoe": 0.01, "deepseek_v3": None, "inkling_text": None}
UNSUPPORTED = {"doge", "jetmoe"}
EVERY_FAMILY = [
    pytest.param(name, marks=() if name in FEW else pytest.mark.slow) for name in families() if name not in UNSUPPORTED
]


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_it_is_the_models_own(family):
    model = tiny_model(family)
    if balance_coefficient(model, None) == 0.0:
        with pytest.raises(ValueError, match="has no load-balancing loss .families that balance by a bias"):
            balance_coefficient(model, 0.1)
        assert FEW.get(family) is None
        return
    assert FEW.get(family) in (None, balance_coefficient(model, None))
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for padding in (None, "left", "right"):
        batch = tiny_batch(padding=padding)
        with RouterBalance(model) as balance, balance.watching(batch):
            own = model(**batch, use_cache=False, output_router_logits=True).aux_loss
            found = balance.loss()
        torch.testing.assert_close(found, own, rtol=0, atol=0)
        gradients = torch.autograd.grad(found, weights, allow_unused=True, retain_graph=True)
        expected = torch.autograd.grad(own, weights, allow_unused=True)
        for one, other in zip(gradients, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)


def trained(model, rows, args):
    seen = Gradients()
    trainer = MoECalTrainer(model=model, args=args, train_dataset=rows, data_collator=collate, callbacks=[seen])
    trainer.train()
    return seen.found, trainer


@pytest.mark.parametrize("objective", ["erm", "robust", "robust_filtered"])
@pytest.mark.parametrize("task", TASKS)
def test_it_is_added_once_outside_the_tilt(tmp_path, task, objective):
    """One backward pass of F plus the mean over the micro-batches, which here hold 3, 3 and 2 unequal sequences."""
    build, data, settings = TASKS[task]
    args = arguments(
        tmp_path, objective=objective, per_device_train_batch_size=3, router_aux_loss_coef=COEFFICIENT,
        tau_disagreement=0.05, train_sampling_strategy="sequential", **settings,
    )  # fmt: skip
    rows = data()
    found, trainer = trained(build(), rows, args)
    twin = build().train()
    own = objective_reference(twin, rows, args)
    twin.zero_grad()
    balance = torch.stack([balance_of(twin, collate(rows[i : i + 3])) for i in (0, 3, 6)]).mean()
    (own + COEFFICIENT * balance).backward()
    expected = {name: p.grad.clone() for name, p in twin.named_parameters() if p.grad is not None}
    assert relative_error(found, expected) <= (2e-5 if task == "token" else 1e-5)
    log = trainer.state.log_history[0]
    assert log["router_aux_loss"] == pytest.approx(balance.item(), rel=1e-5)
    assert log["objective"] == pytest.approx(own.item(), rel=1e-4)
    assert log["loss"] == pytest.approx((own + COEFFICIENT * balance).item(), rel=1e-4)
    twin.zero_grad()
    objective_reference(twin, rows, args).backward()  # the test would show nothing if the share were small
    without = {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}
    assert relative_error(found, without) > 1e-3


def test_it_survives_checkpointing_and_the_models_own_switch(tmp_path):
    """A checkpointed layer runs twice; a causal model with `output_router_logits` computes the loss itself as well."""
    rows, settings = language_data(), dict(task="lm", objective="robust", router_aux_loss_coef=COEFFICIENT)
    plain, _ = trained(language_model(), rows, arguments(tmp_path, **settings))
    for changes, more in [
        ({}, dict(activation_checkpointing=True)),
        ({"output_router_logits": True, "router_aux_loss_coef": COEFFICIENT}, dict(router_aux_loss_coef=None)),
    ]:
        found, trainer = trained(language_model(**changes), rows, arguments(tmp_path, **{**settings, **more}))
        assert relative_error(found, plain) <= 1e-6
        assert f"router aux loss times {COEFFICIENT}" in trainer.trains


def test_it_is_on_where_a_router_trains():
    model = classification_model(router_aux_loss_coef=0.02)
    assert [balance_coefficient(model, asked) for asked in (None, 0.0, 0.3)] == [0.02, 0.0, 0.3]
    assert balance_coefficient(model, None, cached=True) == 0.0
    for layer in model.model.layers:
        layer.mlp.gate.requires_grad_(False)
    assert [balance_coefficient(model, asked) for asked in (None, 0.0, 0.3)] == [0.0, 0.0, 0.3]


@pytest.mark.parametrize("train", ["last_moe_layer", "routers", "lora"])
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for it
def test_presets_say_whether_it_is_on(tmp_path, train):
    args = arguments(tmp_path, train=train, router_aux_loss_coef=None, objective="robust")
    trainer = MoECalTrainer(
        model=classification_model(), args=args, train_dataset=classification_data(), data_collator=collate
    )
    expected = "; no router aux loss" if train == "lora" else "; router aux loss times 0.001"
    assert trainer.trains.endswith(expected)


def test_what_cannot_be_balanced_is_refused(tmp_path):
    rows = classification_data()

    def train(model=None, **settings):
        args = arguments(tmp_path, **{"objective": "robust", "router_aux_loss_coef": None, **settings})
        MoECalTrainer(
            model=model or classification_model(), args=args, train_dataset=rows, data_collator=collate
        ).train()

    with pytest.raises(ValueError, match="With `prefix_cache` the routers see the judged tokens only"):
        train(train="last_moe_layer", prefix_cache=str(tmp_path / "cache"), router_aux_loss_coef=0.1)
    with pytest.raises(ValueError, match="`router_aux_loss_coef` must be a finite number at least 0, got -1"):
        train(router_aux_loss_coef=-1)
    reentrant = classification_model()
    reentrant.activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="The routers run without gradient inside a forward with gradient"):
        train(reentrant)


def test_it_leaves_no_hook():
    model = classification_model()
    with RouterBalance(model):
        assert all(layer.mlp.gate._forward_hooks for layer in model.model.layers)
    assert not any(layer.mlp.gate._forward_hooks for layer in model.model.layers)
