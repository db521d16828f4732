"""Logits at chosen positions and in chunks give the losses and gradients of whole logits, in bounded memory."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from hf_moecal.model import head
from hf_moecal.model.head import RowSelector
from tests.tiny_moe import VOCABULARY, families, tiny_batch, tiny_model
from tests.training.helpers import (
    OBJECTIVES,
    arguments,
    language_data,
    language_model,
    reference_gradients,
    relative_error,
    trained_gradients,
)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", 3 * VOCABULARY)


def losses(model, batch, tokens, labels):
    with RowSelector(model) as selector, selector.selecting(tokens):
        logits = model(**batch, use_cache=False).logits
        found = selector.reduced(
            logits, lambda part, rows: F.cross_entropy(rows.float(), labels[part], reduction="none")
        )
    return found, logits.shape[1]


@pytest.mark.parametrize("family", families())
def test_chunks_give_the_losses_of_whole_logits(family, small_chunks):
    model, batch = tiny_model(family), tiny_batch()
    tokens = torch.tensor([0, 3, 4, 7, 8, 10, 11, 17])
    labels = torch.arange(len(tokens))
    with torch.no_grad():
        whole = model(**batch, use_cache=False).logits.flatten(0, 1)[tokens].float()
        found, computed = losses(model, batch, tokens, labels)
    assert computed == 1
    torch.testing.assert_close(found, F.cross_entropy(whole, labels, reduction="none"), rtol=1e-5, atol=1e-5)
    assert not model.get_output_embeddings()._forward_pre_hooks


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_training_in_chunks_equals_one_full_batch(tmp_path, small_chunks, objective, checkpointing):
    rows = language_data()
    settings = dict(task="lm", example="token", tau_regret=0.4, activation_checkpointing=checkpointing)
    args = arguments(tmp_path, **settings, **OBJECTIVES[objective])
    found, _ = trained_gradients(language_model(), rows, args)
    assert relative_error(found, reference_gradients(language_model().train(), rows, args)) <= 2e-5


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for value in output if isinstance(output, tuple | list) else [output]:
            if isinstance(value, torch.Tensor):
                self.largest = max(self.largest, value.numel())
        return output


def test_no_more_than_one_chunk_of_logits_exists(monkeypatch):
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", 2**14)
    model = language_model(vocab_size=4096, tie_word_embeddings=True)
    ids = torch.arange(1, 65).reshape(1, 64)
    tokens, seen = torch.arange(63), LargestTensor()
    with seen:
        found, computed = losses(model, {"input_ids": ids}, tokens, ids[0, 1:])
        found.sum().backward()
    weights = model.get_output_embeddings().weight.numel()
    assert computed == 1
    assert seen.largest <= max(weights, 2**14)


def test_a_dummy_row_takes_no_gradient(small_chunks):
    model, batch = language_model(), {"input_ids": torch.arange(1, 13)[None]}
    tokens, labels = torch.arange(11), batch["input_ids"][0, 1:]
    found, _ = losses(model, batch, tokens, labels)
    found.mean().backward()
    chunked = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    F.cross_entropy(model(**batch).logits[0, :-1], labels).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(chunked[name], parameter.grad, rtol=1e-4, atol=1e-6)
