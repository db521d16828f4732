"""Answers of a language model against a plain loop: token by token, one prompt at a time, without padding."""

import pytest
import torch
from datasets import Dataset

from hf_moecal.metrics import table_report
from hf_moecal.predictions.answers import predict_answers
from tests.training.helpers import PAIRS, ids, language_model, tokenizer


def answer_one_by_one(model, prompt, limit, end):
    """The greedy answer and its probability."""
    tokens, probability = list(prompt), 1.0
    for _ in range(limit):
        probs = model(input_ids=torch.tensor([tokens])).logits[0, -1].softmax(-1)
        tokens.append(int(probs.argmax()))
        probability *= probs.max().item()
        if tokens[-1] == end:
            break
    return tokens[len(prompt) :], probability


def questions(**more):
    return Dataset.from_list([{"prompt": question, **more} for question, _ in PAIRS])


@torch.no_grad()
@pytest.mark.parametrize("end", ["</s>", "frequent"])
def test_answers_are_those_of_a_plain_loop(end):
    model, reader = language_model().eval(), tokenizer()
    stop = reader.eos_token_id
    if end == "frequent":  # a token with which some answers end early, and others do not
        stop = answer_one_by_one(model, ids(PAIRS[0][0]), 6, stop)[0][2]
        model.generation_config.eos_token_id = stop
    expected = [answer_one_by_one(model, ids(question), 6, stop) for question, _ in PAIRS]
    texts = [reader.decode(tokens, skip_special_tokens=True) for tokens, _ in expected]
    right = [i % 3 == 0 for i in range(len(texts))]
    asked = questions(topic="a").add_column(
        "completion", [t if r else "w1" for t, r in zip(texts, right, strict=True)]
    )
    model.train()
    table = predict_answers(
        model, asked, processing_class=reader, max_new_tokens=6, batch_size=3, group="quiz", progress=False
    )
    assert model.training
    assert table["answer"][:] == texts and table["topic"][0] == "a" and table["prompt"][:] == asked["prompt"][:]
    assert table["confidence"][:] == pytest.approx([p for _, p in expected], rel=1e-5)
    assert table["num_tokens"][:] == [len(tokens) for tokens, _ in expected]
    assert table["finished"][:] == [tokens[-1] == stop for tokens, _ in expected]
    assert table["label"][:] == [int(r) for r in right]
    if end == "frequent":
        assert len(set(table["finished"])) == 2
    report = table_report(table, intervals=False)
    assert report["accuracy"] == pytest.approx(3 / 8)
    assert report["signed_gap"] == pytest.approx(sum(p for _, p in expected) / 8 - 3 / 8)
    assert set(report["groups"]) == {"quiz"} and len(table["routing_entropy"]) == 8


def test_chats_and_unknown_answers():
    model, reader = language_model(), tokenizer()
    texts = [
        {"prompt": [{"role": "user", "content": question}], "completion": [{"role": "assistant", "content": answer}]}
        for question, answer in PAIRS
    ]
    seen = []
    table = predict_answers(
        model,
        Dataset.from_list(texts),
        processing_class=reader,
        is_right=lambda answer, reference: seen.append(reference) or True,
        max_new_tokens=2,
        layer=None,
        progress=False,
    )
    assert seen == [answer for _, answer in PAIRS] and table["label"][:] == [1] * 8
    plain = questions().select([3])
    plain = plain.map(lambda row: {"prompt": f"<user> {row['prompt']} <bot>"})
    same = predict_answers(model, plain, processing_class=reader, max_new_tokens=2, layer=None, progress=False)
    assert same["answer"][0] == table["answer"][3] and same["confidence"][0] == pytest.approx(table["confidence"][3])
    assert same["label"][:] == [-100]


def test_what_cannot_be_answered():
    with pytest.raises(ValueError, match="column `prompt`"):
        predict_answers(language_model(), Dataset.from_dict({"text": ["w1"]}), processing_class=tokenizer())
