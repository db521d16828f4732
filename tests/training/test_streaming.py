"""Without an extra forward, the gradients are those of one full batch all the same."""

import re
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from torch.utils.data import SequentialSampler

from hf_moecal import MoECalArguments, MoECalTrainer
from hf_moecal.model.freezing import set_trainable
from hf_moecal.training.optimizer_batch import OptimizerBatch
from hf_moecal.training.streaming import HeldBatch, ScaledBatch, choose_batch_type
from tests.training.helpers import (
    OBJECTIVES,
    TASKS,
    arguments,
    classification_data,
    classification_model,
    language_data,
    language_model,
    losses_one_by_one,
    reference_gradients,
    relative_error,
    trained_gradients,
)


TILTED = {
    **{name: settings for name, settings in OBJECTIVES.items() if name != "erm"},
    "filtered-through": dict(OBJECTIVES["filtered"], detach_weights=False),
}


def streaming(folder, **changes):
    return arguments(folder, **{"normalizer": "streaming", **changes})


class Counting(MoECalTrainer):
    """Takes the rows in order and keeps the losses of each forward."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen = []

    def _get_train_sampler(self, *args):
        return SequentialSampler(self.train_dataset)

    def _objective_loss(self, *args, **kwargs):
        loss = super()._objective_loss(*args, **kwargs)
        self.seen.append((self._measuring, self._optimizer_batch.measured[self._measuring].losses.flatten().tolist()))
        return loss


@pytest.mark.parametrize(("batch", "accumulation"), [(2, 4), (1, 8)])
@pytest.mark.parametrize("objective", TILTED)
@pytest.mark.parametrize("task", TASKS)
def test_gradients_equal_one_full_batch(tmp_path, task, objective, batch, accumulation):
    build, data, settings = TASKS[task]
    rows, split = data(), dict(per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation)
    args = streaming(tmp_path, **split, **settings, **TILTED[objective])
    found, trainer = trained_gradients(build(), rows, args, Counting)
    expected = reference_gradients(build().train(), rows, args)
    assert relative_error(found, expected) <= (2e-5 if task == "token" else 1e-5)
    assert [position for position, _ in trainer.seen] == list(range(accumulation)), "a micro-batch ran twice"


@pytest.mark.parametrize("objective", ["robust", "filtered"])
@pytest.mark.parametrize("unlabelled", [[3], [0, 1], [5, 6]])
def test_uneven_last_batch_and_sequences_without_labels(tmp_path, objective, unlabelled):
    rows = classification_data(7)  # micro-batches of 2, 2, 2 and 1
    for index in unlabelled:
        rows[index]["labels"] = -100
    settings = {**TILTED[objective], "tau_regret": 0.15, "tau_disagreement": 0.1}
    args = streaming(tmp_path, **settings)
    found, _ = trained_gradients(classification_model(), rows, args, Counting)
    kept = [row for row in rows if row["labels"] != -100]
    assert relative_error(found, reference_gradients(classification_model(), kept, args)) <= 1e-5


@pytest.mark.parametrize("changes", [
    dict(objective="robust", max_grad_norm=0.01),
    dict(objective="robust_filtered", tau_regret=0.05, max_grad_norm=0.01),
    dict(objective="robust", activation_checkpointing=True),
    dict(objective="robust_filtered", tau_regret=0.05, activation_checkpointing=True),
    dict(objective="robust_filtered", relevance_quantile=0.3),
    dict(objective="robust", router_aux_loss_coef=0.5),
    dict(objective="robust_filtered", router_aux_loss_coef=0.5, readout="soft_mixture", expert_loss_weight=0.5),
])  # fmt: skip
def test_gradients_and_figures_are_those_of_two_passes(tmp_path, changes):
    found = {}
    for way in ("two_pass", "streaming"):
        args = arguments(tmp_path, normalizer=way, **changes)
        gradients, trainer = trained_gradients(classification_model(), classification_data(), args)
        found[way] = gradients, trainer.state.log_history[0]
    (one, log), (other, expected) = found["streaming"], found["two_pass"]
    assert relative_error(one, other) <= 1e-5
    assert log.keys() == expected.keys()
    for name, value in expected.items():
        assert log[name] == pytest.approx(value, rel=1e-5), name


@pytest.mark.parametrize("changes", [dict(objective="robust"), dict(objective="robust", detach_weights=False)])
def test_low_precision_costs_no_more_than_in_two_passes(tmp_path, changes):
    """Both ways are as far from the gradient in float32 as bfloat16 on this machine makes them."""
    rows, off = classification_data(), {}
    args = arguments(tmp_path, **changes)
    exact = reference_gradients(classification_model().train(), rows, args)
    for way in ("two_pass", "streaming"):
        args = arguments(tmp_path, normalizer=way, bf16=True, **changes)
        off[way] = relative_error(trained_gradients(classification_model(), rows, args)[0], exact)
    assert 0 < off["two_pass"] and off["streaming"] <= 3 * off["two_pass"]


@pytest.mark.parametrize("objective", TILTED)
@pytest.mark.parametrize("task", TASKS)
def test_trajectories_are_those_of_two_passes(tmp_path, task, objective):
    build, data, settings = TASKS[task]
    ended = []
    for way in ("two_pass", "streaming"):
        args = arguments(
            tmp_path, normalizer=way, max_steps=10, num_train_epochs=10, robust_warmup_ratio=0.2, eta_ramp_ratio=0.4,
            **{**settings, **TILTED[objective]},
        )  # fmt: skip
        _, trainer = trained_gradients(build(), data(10), args)
        ended.append((dict(trainer.model.named_parameters()), [log.get("loss") for log in trainer.state.log_history]))
    (weights, losses), (expected, expected_losses) = ended
    for name, parameter in weights.items():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-5, atol=1e-5)
    assert losses[:-1] == pytest.approx(expected_losses[:-1], rel=1e-4)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for it
@pytest.mark.parametrize("objective", ["robust", "filtered"])
def test_an_adapter_trains_exactly(tmp_path, objective):
    from peft import LoraConfig, get_peft_model

    def build():
        torch.manual_seed(1)
        names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        config = LoraConfig(r=4, target_modules=["q_proj"], target_parameters=names, init_lora_weights=False)
        return get_peft_model(language_model(), config)

    settings = {**TASKS["sequence"][2], **TILTED[objective]}
    found = [trained_gradients(build(), language_data(), arguments(tmp_path, normalizer=way, **settings))[0]
             for way in ("two_pass", "streaming")]  # fmt: skip
    assert found[0] and relative_error(found[1], found[0]) <= 1e-5


@pytest.mark.parametrize("noise", [{}, dict(attention_dropout=0.3, router_jitter_noise=0.3)])
def test_a_weight_that_would_overflow(tmp_path, noise):
    """The window is run again, and sees the noise that it saw."""
    rows = classification_data()
    losses = losses_one_by_one(classification_model(), rows, per_token=False).tolist()
    rows = [row for _, row in sorted(zip(losses, rows, strict=True), key=lambda pair: pair[0])]
    args = streaming(tmp_path, objective="robust", eta=60.0)
    found, trainer = trained_gradients(classification_model(**noise), rows, args, Counting)
    positions = [position for position, _ in trainer.seen]
    assert positions == [0, 1, 2, 3, 0, 1, 2, 3], "no loss was far above those of the first micro-batch"
    for (_, first), (_, again) in zip(trainer.seen[:4], trainer.seen[4:], strict=True):
        assert first == pytest.approx(again, abs=2e-6)
    if not noise:
        assert relative_error(found, reference_gradients(classification_model(), rows, args)) <= 1e-5


@pytest.mark.parametrize("changes", [
    dict(objective="robust"), dict(objective="robust", eta=60.0), dict(objective="robust_filtered", tau_regret=0.05)
])  # fmt: skip
def test_random_numbers_are_never_used_twice(tmp_path, changes):
    states = set()

    class Recording(MoECalTrainer):
        def compute_loss(self, *args, **kwargs):
            states.add(bytes(torch.get_rng_state().numpy()))
            return super().compute_loss(*args, **kwargs)

    args = streaming(tmp_path, max_steps=3, num_train_epochs=3, **changes)
    trained_gradients(classification_model(attention_dropout=0.3), classification_data(), args, Recording)
    assert len(states) == 12


def test_losses_that_are_nan_stop_training(tmp_path):
    for objective in ("robust", "robust_filtered"):
        model = classification_model()
        torch.nn.init.constant_(model.score.weight, float("nan"))
        with pytest.raises(ValueError, match="losses are NaN or infinite|reach nan"):
            trained_gradients(model, classification_data(), streaming(tmp_path, objective=objective))


def test_a_batch_without_labels_is_named(tmp_path):
    rows = [{**row, "labels": -100} for row in classification_data()]
    with pytest.raises(ValueError, match="No example has a label .* in any of the 1 optimizer batches"):
        trained_gradients(classification_model(), rows, streaming(tmp_path, objective="robust"))


def accelerator(kind=DistributedType.NO, *, precision="no", each=False):
    state = SimpleNamespace(plugin_kwargs={"sync_each_batch": each})
    return SimpleNamespace(distributed_type=kind, mixed_precision=precision, gradient_state=state)


def late():
    model = classification_model()
    set_trainable(model, "last_moe_layer")
    return model


ONE = accelerator()
FSDP2 = accelerator(DistributedType.FSDP)
FP16 = accelerator(precision="fp16")
DEEPSPEED = accelerator(DistributedType.DEEPSPEED)


@pytest.mark.parametrize(("build", "settings", "where", "window", "line"), [
    (classification_model, dict(objective="erm"), ONE, OptimizerBatch, "^$"),
    (classification_model, dict(objective="robust", gradient_accumulation_steps=1), ONE, OptimizerBatch, "^$"),
    (classification_model, dict(objective="robust"), ONE, ScaledBatch, "=streaming, no extra forward: the weights'"),
    (classification_model, dict(objective="robust"), FP16, OptimizerBatch, "3 extra .* overflow in"),
    (classification_model, dict(objective="robust"), DEEPSPEED, OptimizerBatch, "DEEPSPEED keeps"),
    (classification_model, dict(objective="robust"), FSDP2, ScaledBatch, ""),
    (classification_model, dict(), ONE, OptimizerBatch, "holds the activations of 4 micro-batches"),
    (classification_model, dict(objective="robust", detach_weights=False), ONE, OptimizerBatch, "holds the activ"),
    (late, dict(objective="robust"), ONE, ScaledBatch, "=streaming, no extra forward: the weights'"),
    (late, dict(), ONE, HeldBatch, "the graphs held are those of the last layers"),
    (late, dict(), accelerator(each=True), OptimizerBatch, "`sync_each_batch` expects"),
])  # fmt: skip
def test_what_auto_chooses(tmp_path, build, settings, where, window, line):
    args = arguments(tmp_path, normalizer="auto", **settings)
    found, said = choose_batch_type(build(), args, accelerator=where)
    assert found is window
    beside, _ = choose_batch_type(build(), args, accelerator=where, balanced=True)
    assert beside is not ScaledBatch, "what is outside the tilt has another factor"
    assert re.search(line, said)


def test_streaming_that_is_not_exact_is_refused(tmp_path):
    for settings, where, message in [
        (dict(objective="robust"), accelerator(precision="fp16"), "not exact here: weights before their division"),
        (dict(), accelerator(DistributedType.DEEPSPEED), "DEEPSPEED keeps the gradients to itself; set normalizer="),
        (dict(), accelerator(DistributedType.MULTI_GPU, each=True), "`sync_each_batch` expects"),
    ]:
        with pytest.raises(ValueError, match=message):
            choose_batch_type(classification_model(), streaming(tmp_path, **settings), accelerator=where)
    with pytest.raises(ValueError, match="`normalizer` must be one of auto, two_pass, streaming"):
        MoECalArguments("out", normalizer="online")


def test_the_choice_is_printed_once(tmp_path, capsys):
    args = arguments(tmp_path, objective="robust", normalizer="auto", max_steps=2)
    trained_gradients(classification_model(), classification_data(), args)
    assert capsys.readouterr().out.count("normalizer=streaming, no extra forward") == 1
