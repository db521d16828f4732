"""Multiple choice against a twin that forwards every option alone and shares no code with the library."""

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset

from hf_moecal import ChoiceCollator, MoECalTrainer
from hf_moecal.tasks.prompts import encode_continuations
from tests.tasks.helpers import examples, losses_one_by_one, reference_gradients, scores_one_by_one, word_tokenizer
from tests.training.helpers import OBJECTIVES, Gradients, arguments, language_model, relative_error


def trained(model, rows, args, scoring, **kwargs):
    seen = Gradients()
    collator = ChoiceCollator(scoring=scoring)
    trainer = MoECalTrainer(
        model=model, args=args, train_dataset=rows, data_collator=collator, callbacks=[seen], **kwargs
    )
    trainer.train()
    return seen.found, trainer


FILTER = {"per_token": (0.30, 0.035), "label_word": (0.30, 0.08)}


@pytest.mark.parametrize(("batch", "accumulation"), [(8, 1), (3, 3)])
@pytest.mark.parametrize("objective", ["erm", "robust-through", "filtered"])
@pytest.mark.parametrize("scoring", FILTER)
def test_gradients_equal_one_full_batch(tmp_path, scoring, objective, batch, accumulation):
    rows = examples(words=scoring == "label_word")
    regret, spread = FILTER[scoring]
    settings = {**OBJECTIVES[objective], "task": "choice", "tau_regret": regret, "tau_disagreement": spread}
    args = arguments(tmp_path, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, **settings)
    found, trainer = trained(language_model(), rows, args, scoring)
    value, expected = reference_gradients(language_model().train(), rows, args, scoring)
    assert relative_error(found, expected) <= 1e-5
    assert trainer.state.log_history[0]["loss"] == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("scoring", ["total", "per_byte"])
def test_the_other_normalisations(tmp_path, scoring):
    rows = examples()
    args = arguments(tmp_path, task="choice", objective="robust")
    found, _ = trained(language_model(), rows, args, scoring)
    _, expected = reference_gradients(language_model(), rows, args, scoring)
    assert relative_error(found, expected) <= 1e-5


def test_label_smoothing_spreads_over_the_options_of_the_example(tmp_path):
    rows = examples()
    args = arguments(tmp_path, task="choice", objective="label_smoothing")
    _, trainer = trained(language_model(), rows, args, "per_token")
    scores = [scores_one_by_one(language_model(), row, "per_token") for row in rows]
    expected = [
        F.cross_entropy(s[None], torch.tensor([row["label"]]), label_smoothing=0.1)
        for s, row in zip(scores, rows, strict=True)
    ]
    assert trainer.state.log_history[0]["loss"] == pytest.approx(torch.stack(expected).mean().item(), rel=1e-5)


@pytest.mark.parametrize("scoring", ["per_token", "label_word"])
def test_examples_without_label_are_left_out_of_the_loss(tmp_path, scoring):
    rows = examples(words=scoring == "label_word")
    rows[2]["label"] = -100
    del rows[5]["label"]
    args = arguments(tmp_path, task="choice", objective="robust")
    found, _ = trained(language_model(), rows, args, scoring)
    kept = [row for row in rows if row.get("label", -100) != -100]
    assert len(kept) == 6
    assert relative_error(found, reference_gradients(language_model(), kept, args, scoring)[1]) <= 1e-5


@pytest.mark.parametrize("scoring", ["per_token", "total", "label_word"])
def test_evaluation_and_prediction(tmp_path, scoring):
    """Also that padding with options that are not there changes no figure, over sets and uneven batches."""
    rows = examples(11, words=scoring == "label_word")
    args = arguments(tmp_path, task="choice", objective="erm", per_device_eval_batch_size=3)
    trainer = MoECalTrainer(
        model=language_model(), args=args, eval_dataset={"quiz": rows}, data_collator=ChoiceCollator(scoring=scoring)
    )
    with torch.no_grad():
        scores = [scores_one_by_one(trainer.model.eval(), row, scoring) for row in rows]
    probs = [s.softmax(-1).double() for s in scores]
    nll = [-p[row["label"]].log().item() for p, row in zip(probs, rows, strict=True)]
    brier = [
        (p - F.one_hot(torch.tensor(row["label"]), len(p))).square().sum().item()
        for p, row in zip(probs, rows, strict=True)
    ]
    found = trainer.evaluate()
    assert found["eval_quiz_nll"] == pytest.approx(sum(nll) / 11, rel=1e-4)
    assert found["eval_quiz_brier"] == pytest.approx(sum(brier) / 11, rel=1e-4)
    accuracy = sum(int(p.argmax()) == row["label"] for p, row in zip(probs, rows, strict=True)) / 11
    assert found["eval_quiz_accuracy"] == pytest.approx(accuracy)
    assert found["eval_quiz_loss"] > 0 and found["eval_quiz_n"] == 11
    predicted = trainer.predict(rows)
    for logits, p in zip(torch.tensor(predicted.predictions), probs, strict=True):
        torch.testing.assert_close(logits.double().softmax(-1)[: len(p)], p, rtol=1e-4, atol=1e-6)
        assert logits.double().softmax(-1)[len(p) :].sum() < 1e-30
    assert predicted.label_ids.tolist() == [row["label"] for row in rows]


def test_the_boundary_is_that_of_the_harness():
    """A space at the end of the prompt belongs to the option's first token."""
    tokenizer = word_tokenizer()
    inside, outside = encode_continuations(
        tokenizer, ["The film was", "The film was "], [[" good", " very bad"], ["good", "very bad"]]
    )
    assert inside == outside == [([3, 4, 5, 6], 3), ([3, 4, 5, 12, 7], 3)]
    # what the naive way gives: tokens that the model has hardly seen in this place
    assert tokenizer("The film was ")["input_ids"] + tokenizer("good")["input_ids"] == [3, 4, 5, 8, 9]
    assert encode_continuations(tokenizer, ["The:"], [["good"]]) == [[([3, 11, 9], 2)]]


def test_a_merge_across_the_boundary_counts_to_the_option():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(["a", "b", "c", "ab"])}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocabulary, [("a", "b")])))
    assert encode_continuations(tokenizer, ["ca"], [["b", "c", "bc"]]) == [
        [([2, 3], 1), ([2, 0, 2], 2), ([2, 3, 2], 1)]
    ]


def test_special_tokens_come_first_once():
    from tokenizers import processors

    tokenizer = word_tokenizer(bos_token="<s>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A <pad>", special_tokens=[("<s>", 1), ("<pad>", 0)]
    )
    assert tokenizer("The film")["input_ids"] == [1, 3, 4, 0]
    assert encode_continuations(tokenizer, ["The"], [[" film"]]) == [[([1, 3, 4], 2)]]
    assert encode_continuations(tokenizer, ["<s>The"], [[" film"]]) == [[([1, 3, 4], 2)]]
    assert encode_continuations(tokenizer, [""], [["The film"]]) == [[([1, 3, 4], 1)]]
    cut = encode_continuations(tokenizer, ["The film was"], [[" good", " very bad"]], max_length=4)
    assert cut == [[([1, 5, 6], 2), ([1, 5, 12, 7], 2)]]  # the same prompt for both
    with pytest.raises(ValueError, match=r"Row 0: what follows the prompt leaves no room .* raise it to 6"):
        encode_continuations(tokenizer, ["The film was"], [[" good", " very bad"]], max_length=2)


def test_texts_through_a_trainer_that_removes_unused_columns(tmp_path):
    rows = [
        {"prompt": "The film was", "options": [" good", " very bad"], "label": 0, "source": "a"},
        {"prompt": "The ", "options": ["film", "film was good", "bad"], "label": 2, "source": "b"},
    ]
    tokenizer = word_tokenizer()
    args = arguments(
        tmp_path, task="choice", objective="erm", remove_unused_columns=True, gradient_accumulation_steps=1
    )
    trainer = MoECalTrainer(
        model=language_model(), args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    trainer.train()
    tokens = [
        {"prompt_ids": [3, 4, 5], "option_ids": [[6], [12, 7]], "options": ["", ""], "label": 0},
        {"prompt_ids": [3], "option_ids": [[4], [4, 5, 6], [7]], "options": ["", "", ""], "label": 2},
    ]
    expected = losses_one_by_one(language_model(), tokens, "per_token").mean().item()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-5)


def test_bad_examples_are_named():
    tokenizer = word_tokenizer()
    good = {"prompt": "The film was", "options": [" good", " bad"], "label": 0}
    for change, message, kwargs in [
        ({"options": [" good"]}, "Row 1 has 1 options; a choice needs two or more", {}),
        ({"label": 2}, r"Row 1: label 2 is no index into its 2 options \(0 to 1; -100", {}),
        ({"label": 0.5}, "Row 1: label 0.5 is no index", {}),
        ({"options": [" good", ""]}, "Row 1: '' adds no token to its prompt, which ends in 'The film was'", {}),
        ({"prompt": ""}, "Row 1: nothing comes before ' good'", {}),
        ({"options": None}, r"needs `prompt` and `options` \(or", {}),
        (
            {"options": [" good", " very bad"]},
            r"Row 1: scoring='label_word' .* got \[1, 2\]",
            {"scoring": "label_word"},
        ),
        ({"options": [" good", " good"]}, "two options are the same token", {"scoring": "label_word"}),
        ({"options": [" good", "  "]}, "counts the bytes .* one is empty", {"scoring": "per_byte"}),
    ]:
        with pytest.raises(ValueError, match=message):
            ChoiceCollator(tokenizer, **kwargs)([good, {**good, **change}])
    with pytest.raises(ValueError, match="Texts need a tokenizer"):
        ChoiceCollator()([good])
    with pytest.raises(ValueError, match="`scoring` must be one of per_token, total, per_byte, label_word, got 'sum'"):
        ChoiceCollator(tokenizer, scoring="sum")
    with pytest.raises(ValueError, match="`prompt_ids` and each of `option_ids` need a token"):
        ChoiceCollator()([{"prompt_ids": [1], "option_ids": [[2], []], "label": 0}])


def test_batches_of_another_collator_are_refused(tmp_path):
    from tests.training.helpers import collate, language_data

    args = arguments(tmp_path, task="choice")
    trainer = MoECalTrainer(model=language_model(), args=args, train_dataset=language_data(), data_collator=collate)
    with pytest.raises(ValueError, match="needs batches of hf_moecal.ChoiceCollator, got one with"):
        trainer.train()


@pytest.mark.parametrize("scoring", ["per_token", "label_word"])
def test_the_prefix_cache_changes_nothing(tmp_path, scoring):
    rows = examples(words=scoring == "label_word")
    settings = dict(task="choice", objective="robust", train="last_moe_layer", max_steps=4, num_train_epochs=4)
    _, plain = trained(language_model(), rows, arguments(tmp_path, **settings), scoring)
    cached = arguments(tmp_path, prefix_cache=str(tmp_path / "cache"), **settings)
    _, cached = trained(language_model(), rows, cached, scoring)
    losses = [[log["loss"] for log in t.state.log_history if "loss" in log] for t in (plain, cached)]
    assert len(losses[0]) == 4 and losses[0] == pytest.approx(losses[1], rel=1e-5)
