"""A model that predicts by a readout for good: in threads, copied, compiled, called in every way."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from hf_moecal.calibration import TemperatureCalibrator
from hf_moecal.hub import attach_calibrator
from hf_moecal.readouts.attached import AttachedReadout
from hf_moecal.readouts.mixture import Readout
from hf_moecal.readouts.recorded import attach_readout
from tests.readouts.helpers import committee
from tests.tiny_moe import tiny_batch, tiny_model
from tests.training.helpers import language_model


CASES = {
    "classifier": lambda: (tiny_model("mixtral", classifier=True), Readout("soft_mixture")),
    "delta": lambda: (tiny_model("qwen3_moe"), Readout("mixture")),
    "gather": lambda: (tiny_model("flex_olmo"), Readout("soft_mixture")),
    "committee": lambda: (committee(language_model).eval(), Readout("soft_mixture")),
    "committee of classifiers": lambda: (committee().eval(), Readout()),
}
TEMPERATURE = 2.0


def batches(count=24):
    """Of many lengths, with few token ids."""
    made = [tiny_batch(length=3 + i % 5, seed=i) for i in range(count)]
    return [{**batch, "input_ids": batch["input_ids"] % 24 + 1} for batch in made]


@torch.no_grad()
def expected(model, readout, batch):
    """By an attached readout of its own, left after one forward, and a temperature."""
    language = model.get_output_embeddings() is not None
    tokens = torch.arange(batch["input_ids"].numel())
    with AttachedReadout(model, readout, rows=language) as attached, attached.at(tokens if language else None):
        output = model(**batch)
        if not language:
            return output["logits"] / TEMPERATURE
        found = attached.together(output, lambda part, log_probs: log_probs)
    return found.unflatten(0, tuple(batch["input_ids"].shape)) / TEMPERATURE


def loaded(case, count=24):
    """A model that predicts by a readout, some batches, and what it shall answer."""
    model, readout = CASES[case]()
    answers = [expected(model, readout, batch) for batch in batches(count)]
    attach_readout(model, readout)
    attach_calibrator(model, TemperatureCalibrator.from_parameters({"temperature": TEMPERATURE}))
    return model, batches(count), answers


def assert_answers(model, given, answers):
    for batch, answer in zip(given, answers, strict=True):
        torch.testing.assert_close(model(**batch).logits, answer, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_threads_get_the_answers_that_one_thread_gets(case):
    model, given, answers = loaded(case)

    @torch.no_grad()
    def call(batch):
        return model(**batch).logits

    with ThreadPoolExecutor(4) as pool:
        for found, answer in zip(pool.map(call, given), answers, strict=True):
            torch.testing.assert_close(found, answer, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert_answers(model, given[:3], answers[:3])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@torch.no_grad()
def test_copies_are_models_of_their_own(case, copied):
    model, given, answers = loaded(case, 2)
    model(**given[0])
    twin = copied(model)
    assert_answers(twin, given, answers)
    for parameter in model.parameters():
        parameter.zero_()
    assert_answers(twin, given, answers)
    assert (model(**given[0]).logits - answers[0]).abs().max() > 1e-3


@pytest.mark.parametrize("case", ["classifier", "gather"])
@torch.no_grad()
def test_compiled_code_leaves_it_as_it_is(case):
    torch._dynamo.reset()
    model, given, answers = loaded(case, 3)
    compiled = torch.compile(model, backend="eager")
    assert_answers(compiled, given, answers)
    assert_answers(model, given, answers)
    torch._dynamo.reset()


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_embeddings_and_tuples(case):
    model, (batch, *_), (answer, *_) = loaded(case, 1)
    embedded = {"inputs_embeds": model.get_input_embeddings()(batch["input_ids"])}
    torch.testing.assert_close(model(**embedded).logits, answer, rtol=1e-4, atol=1e-5)
    positional = model(batch["input_ids"], batch["attention_mask"])
    torch.testing.assert_close(positional.logits, answer, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_tuple_where_one_is_asked_for():
    model, readout = CASES["classifier"]()
    attach_readout(model, readout)
    batch = batches(1)[0]
    found = model(**batch, return_dict=False)
    assert isinstance(found, tuple) and torch.equal(found[0], model(**batch).logits)


@pytest.mark.parametrize("case", ["classifier", "gather", "committee"])
@torch.no_grad()
def test_a_call_that_fails_leaves_nothing_behind(case):
    model, given, answers = loaded(case, 2)
    hooks = [len(module._forward_hooks) for module in model.modules()]
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.tensor([[10**6]]))
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert_answers(model, given, answers)


def test_training_and_the_models_own_forward():
    model, readout = CASES["classifier"]()
    batch = batches(1)[0]
    plain = model(**batch).logits
    attach_readout(model, readout)
    assert torch.equal(model.train()(**batch).logits, plain)
    assert not torch.allclose(model.eval()(**batch).logits, plain, atol=1e-2)
    model.moecal_reading.detach()
    assert torch.equal(model(**batch).logits, plain) and "forward" not in vars(model)
