"""Tables of answer options, sequences and tokens, against twins that run every sequence alone, without a cache."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import DynamicCache

from hf_moecal import predict, probe_experts
from hf_moecal.model.freezing import set_trainable
from hf_moecal.model.prefix_cache import PrefixCache
from tests.predictions.helpers import lists, quiz
from tests.tasks.helpers import examples, measures_one_by_one, scores_one_by_one, word_tokenizer
from tests.tiny_moe import tiny_model
from tests.training.helpers import language_data, language_model


FAMILIES = ["mixtral", "olmoe", "qwen2_moe", "gpt_oss", "deepseek_v3"]
PLAIN = {"mixtral": {"sliding_window": None}, "gpt_oss": {"sliding_window": 128}}
ROUTING = ("routing_entropy", "routing_margin", "disagreement", "regret")


def table_of(model, rows, **settings):
    data = rows if isinstance(rows, Dataset) else Dataset.from_list(rows)
    return predict(model, data, progress=False, **settings)


def tokens_run(model, run):
    """How many tokens the model's embedding sees."""
    seen = []
    handle = model.get_input_embeddings().register_forward_hook(lambda m, args, out: seen.append(args[0].numel()))
    try:
        found = run()
    finally:
        handle.remove()
    return found, sum(seen)


def routing_of_tokens(model, ids, judged):
    """Entropy, margin, disagreement and regret at (position, next token) pairs of one sequence: `[4][n]`."""
    positions, labels = torch.tensor([p for p, _ in judged]), torch.tensor([t for _, t in judged])
    with torch.no_grad(), probe_experts(model) as probe:
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, positions]
        alone = probe.expert_logits(positions).softmax(-1)
        shares = probe.record.weights[positions] / probe.record.weights[positions].sum(-1, keepdim=True)
    own = logits.softmax(-1)
    largest = shares.sort(-1, descending=True).values
    spread = (shares * (alone - own[:, None]).square().sum(-1)).sum(-1)
    likeliest = alone[torch.arange(len(labels)), :, labels].amax(-1)
    regret = (likeliest.log() - own[torch.arange(len(labels)), labels].log()).clamp_min(0)
    return -(shares * shares.log()).sum(-1), largest[:, 0] - largest[:, 1], spread, regret


@pytest.mark.parametrize("family", FAMILIES)
def test_options_equal_whole_sequences(family):
    model, rows = tiny_model(family, **PLAIN.get(family, {})), quiz()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = table_of(model, rows, task="choice", batch_size=8)
        _, cost = tokens_run(model, lambda: table_of(model, rows, task="choice", batch_size=8, layer=None))
    whole = sum(len(row["prompt_ids"]) + len(option) for row in rows for option in row["option_ids"])
    assert cost < 0.8 * whole  # with the rows that are read twice, to compare
    assert table["label"][:] == [row["label"] for row in rows] and table["options"][:] == [r["options"] for r in rows]
    assert "prompt_ids" not in table.column_names and "option_ids" not in table.column_names
    for found, row in zip(table, rows, strict=True):
        with torch.no_grad():
            expected = scores_one_by_one(model, row, "per_token")
        count = len(expected)
        scale = float(expected.abs().max())
        assert found["logits"][:count] == pytest.approx(expected.tolist(), abs=1e-5 * scale)
        assert len(found["logits"]) == 4 and found["logits"][count:] == [-1e30] * (4 - count)
        assert found["probs"] == pytest.approx(expected.softmax(-1).tolist() + [0.0] * (4 - count), abs=1e-5)
        assert found["prediction"] == int(expected.argmax()) and found["confidence"] == max(found["probs"])
        if row["label"] == -100:
            assert all(math.isnan(found[name]) for name in ROUTING)
            continue
        right, start = row["option_ids"][row["label"]], len(row["prompt_ids"]) - 1
        judged = [(start + i, token) for i, token in enumerate(right)]
        for name, values in zip(ROUTING, routing_of_tokens(model, row["prompt_ids"] + right, judged), strict=True):
            assert found[name] == pytest.approx(float(values.mean()), abs=2e-5), name


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_label_words_have_every_column(family):
    model, rows = tiny_model(family, **PLAIN.get(family, {})), quiz(words=True)
    table = table_of(model, rows, task="choice", scoring="label_word", batch_size=4)
    for found, row in zip(table, rows, strict=True):
        words = [word for (word,) in row["option_ids"]]
        with torch.no_grad(), probe_experts(model) as probe:
            logits = model(input_ids=torch.tensor([row["prompt_ids"]]), use_cache=False).logits[0, -1, words]
            last = torch.tensor([len(row["prompt_ids"]) - 1])
            alone, record = probe.expert_logits(last)[0][:, words], probe.record[last]
        assert found["logits"][: len(words)] == pytest.approx(logits.tolist(), abs=1e-5)
        for own, expected in zip(found["expert_logits"], alone, strict=True):
            assert own[: len(words)] == pytest.approx(expected.tolist(), abs=2e-5)
        assert found["expert_ids"] == record.expert_ids[0].tolist()
        assert found["expert_weights"] == pytest.approx(record.weights[0].tolist(), abs=1e-6)
        p, q = logits.softmax(-1), alone.softmax(-1)
        spread = float((record.shares[0] * (q - p).square().sum(-1)).sum())
        assert found["disagreement"] == pytest.approx(spread, abs=1e-5)
        if row["label"] == -100:
            assert math.isnan(found["regret"])
        else:
            saved = float((q[:, row["label"]].max() / p[row["label"]]).log().clamp_min(0))
            assert found["regret"] == pytest.approx(saved, abs=2e-5)


def test_routing_is_what_the_trainer_measures():
    """By overriding the routing in whole forwards, as for the trainer."""
    model = language_model().eval()
    for scoring in ("per_token", "label_word"):
        rows = examples(words=scoring == "label_word")
        for found, row in zip(table_of(model, rows, task="choice", scoring=scoring), rows, strict=True):
            regret, spread = measures_one_by_one(model, row, scoring)
            assert (found["regret"], found["disagreement"]) == pytest.approx((regret, spread), abs=1e-5)


@pytest.mark.parametrize("scoring", ["total", "per_byte"])
def test_the_other_scores(scoring):
    model, rows = language_model().eval(), examples()
    for found, row in zip(table_of(model, rows, task="choice", scoring=scoring, layer=None), rows, strict=True):
        with torch.no_grad():
            expected = scores_one_by_one(model, row, scoring).tolist()
        assert found["logits"][: len(expected)] == pytest.approx(expected, abs=1e-5)
    assert "disagreement" not in found


def test_a_sliding_window_that_a_shared_beginning_would_break_is_noticed():
    model, rows = tiny_model("mixtral", sliding_window=24), quiz(30, few_shot=30)
    with pytest.warns(UserWarning, match="what all prompts begin with is off by .* read again for every") as caught:
        table, cost = tokens_run(model, lambda: table_of(model, rows, task="choice", batch_size=8, layer=None))
    assert len([warning for warning in caught if "Going on" in str(warning.message)]) == 1
    assert cost < 0.8 * sum(len(r["prompt_ids"]) + len(o) for r in rows for o in r["option_ids"])  # each row's own
    for found, row in zip(table, rows, strict=True):
        with torch.no_grad():
            expected = scores_one_by_one(model, row, "per_token").tolist()
        assert found["logits"][: len(expected)] == pytest.approx(expected, abs=1e-5)


def test_a_cache_that_cannot_be_copied_is_not_used(monkeypatch):
    model, rows = language_model().eval(), quiz()

    def refuse(cache, rows):
        raise NotImplementedError("no reordering")

    monkeypatch.setattr(DynamicCache, "reorder_cache", refuse)
    with pytest.warns(UserWarning, match=r"fails \(NotImplementedError: no reordering\)"):
        table = table_of(model, rows, task="choice")
    for found, row in zip(table, rows, strict=True):
        with torch.no_grad():
            expected = scores_one_by_one(model, row, "per_token").tolist()
        assert found["logits"][: len(expected)] == pytest.approx(expected, abs=1e-5)


def mixture_of_tokens(model, ids, positions):
    """Probabilities `[n, V]` of the experts' own predictions, mixed by the router's softmax, in probability space."""
    seen = {}
    gate = model.model.layers[-1].mlp.gate
    handle = gate.register_forward_hook(lambda module, args, output: seen.update(hidden=args[0]))
    positions = torch.tensor(positions)
    try:
        with torch.no_grad(), probe_experts(model) as probe:
            model(input_ids=torch.tensor([ids]), use_cache=False)
            alone = probe.expert_logits(positions, experts="all").double().softmax(-1)
    finally:
        handle.remove()
    hidden = seen["hidden"].detach().reshape(-1, seen["hidden"].shape[-1])[positions]
    shares = F.linear(hidden, gate.weight.detach()).double().softmax(-1)
    return (shares[..., None] * alone).sum(1)


def test_a_mixture_predicts_options_and_tokens():
    model, rows = language_model().eval(), quiz()
    table = table_of(model, rows, task="choice", readout="soft_mixture", batch_size=8)
    assert set(table["readout"]) == {"soft_mixture"}
    for found, row in zip(table, rows, strict=True):
        start = len(row["prompt_ids"]) - 1
        for score, option in zip(found["logits"], row["option_ids"], strict=False):
            mixed = mixture_of_tokens(model, row["prompt_ids"] + option, range(start, start + len(option)))
            expected = mixed[range(len(option)), option].log().mean()
            assert score == pytest.approx(float(expected), abs=1e-5)
    data = language_data(5)
    table = table_of(model, lists(data), task="lm", example="token", readout="soft_mixture")
    judged = [(row, at) for row in data for at in range(1, len(row["input_ids"])) if row["labels"][at] != -100]
    for found, (row, at) in zip(table, judged, strict=True):
        mixed = mixture_of_tokens(model, row["input_ids"].tolist(), [at - 1])[0]
        assert found["confidence"] == pytest.approx(float(mixed.max()), abs=1e-6)
        assert found["nll"] == pytest.approx(-float(mixed[row["labels"][at]].log()), abs=1e-5)
        assert len(found["expert_ids"]) == len(found["expert_weights"]) == 4
        assert sum(found["expert_weights"]) == pytest.approx(1)


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_tokens_and_sequences_equal_one_at_a_time(family):
    model, rows = tiny_model(family), [{**row, "source": f"s{i}"} for i, row in enumerate(lists(language_data(7)))]
    rows[3]["labels"] = [-100] * len(rows[3]["labels"])
    tokens = iter(table_of(model, rows, task="lm", example="token", batch_size=3))
    sequences = table_of(model, rows, task="lm", batch_size=3, group="books")
    assert "probs" not in sequences.column_names and "labels" not in sequences.column_names
    assert set(sequences["group"]) == {"books"} and sequences["source"][:] == [f"s{i}" for i in range(7)]
    for number, (row, whole) in enumerate(zip(rows, sequences, strict=True)):
        judged = [(at - 1, label) for at, label in enumerate(row["labels"]) if at and label != -100]
        assert whole["num_tokens"] == len(judged)
        if not judged:
            assert all(math.isnan(whole[name]) for name in ("confidence", "correct", "nll", "brier", *ROUTING))
            continue
        with torch.no_grad():
            probs = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].double().softmax(-1)
        routing = routing_of_tokens(model, row["input_ids"], judged)
        kept = []
        for i, (position, label) in enumerate(judged):
            found, p = next(tokens), probs[position]
            assert found["id"] == f"{number}:{position + 1}" and found["sequence"] == number
            assert (found["position"], found["label"], found["source"]) == (position + 1, label, f"s{number}")
            assert found["prediction"] == int(p.argmax())
            expected = [
                float(p.max()),
                -math.log(p[label]),
                float((p - F.one_hot(torch.tensor(label), 128)).square().sum()),
            ]
            assert [found[name] for name in ("confidence", "nll", "brier")] == pytest.approx(expected, abs=1e-5)
            assert [found[name] for name in ROUTING] == pytest.approx([float(r[i]) for r in routing], abs=2e-5)
            assert len(found["expert_ids"]) == 2
            kept.append([*expected, float(found["prediction"] == label)])
        means = [sum(column) / len(kept) for column in zip(*kept, strict=True)]
        assert [whole[n] for n in ("confidence", "nll", "brier", "correct")] == pytest.approx(means, abs=1e-5)
        assert whole["sequence_confidence"] == pytest.approx(math.exp(-means[1]), abs=1e-5)
        assert [whole[name] for name in ROUTING] == pytest.approx([float(r.mean()) for r in routing], abs=2e-5)
    assert next(tokens, None) is None


def test_prompts_with_completions_and_texts():
    model, tokenizer = language_model().eval(), word_tokenizer()
    rows = [
        {"prompt": "The film was", "completion": " very bad"},
        {"prompt": "The ", "completion": "film"},
    ]
    tokens = [
        {"input_ids": [3, 4, 5, 12, 7], "labels": [-100, -100, -100, 12, 7]},
        {"input_ids": [3, 4], "labels": [-100, 4]},
    ]
    found, expected = table_of(model, rows, task="lm", processing_class=tokenizer), table_of(model, tokens, task="lm")
    assert found["nll"][:] == expected["nll"][:] and found["completion"][:] == [" very bad", "film"]
    by_token = table_of(model, rows, task="lm", processing_class=tokenizer, example="token")
    assert by_token["label"][:] == [12, 7, 4] and not {"prompt", "completion"} & set(by_token.column_names)
    texts = table_of(model, [{"say": "The film was good"}], task="lm", processing_class=tokenizer, text_column="say")
    whole = table_of(model, [{"input_ids": [3, 4, 5, 6]}], task="lm")
    assert texts["nll"][:] == whole["nll"][:] and texts["num_tokens"][:] == [3]


def test_the_prefix_cache_changes_no_prediction(tmp_path):
    model = language_model().eval()
    data = {"choice": quiz(), "lm": lists(language_data(6))}
    set_trainable(model, "last_moe_layer")
    for task, rows in data.items():
        plain = table_of(model, rows, task=task)
        with PrefixCache(model, tmp_path) as prefix:
            cached = table_of(model, rows, task=task, prefix=prefix)
        for name in ("logits", *ROUTING) if task == "choice" else ("nll", "confidence", *ROUTING):
            torch.testing.assert_close(
                torch.tensor(cached[name][:]), torch.tensor(plain[name][:]), rtol=1e-5, atol=1e-5, equal_nan=True
            )


def test_bad_input_is_named():
    model, rows = language_model(), quiz(3)
    tokens = [{"input_ids": [1, 2], "labels": [1]}]
    for data, message, settings in [
        (rows, "`task` must be one of classification, choice, lm, got 'quiz'", {"task": "quiz"}),
        (rows, "task='classification' needs a sequence classifier, and MixtralForCausalLM is none", {}),
        (tokens, "task='choice' needs `prompt` and `options`", {"task": "choice"}),
        ([{"a": 1}], "task='lm' needs `prompt` and `completion`", {"task": "lm"}),
        (tokens, r"Row 0: `labels` must be one token id .* 2 of them, got 1", {"task": "lm"}),
        ([{"input_ids": [1], "labels": 1}], "Row 0: `labels` must be .* got 1", {"task": "lm"}),
        ([{"prompt": "a", "completion": "b"}], "Text needs a tokenizer", {"task": "lm"}),
        (rows, "`example` must be 'sequence' or 'token'", {"task": "choice", "example": "row"}),
        (rows, "`scoring` must be one of", {"task": "choice", "scoring": "mean"}),
        (rows, "`output` is a Parquet file", {"task": "choice", "output": "table.csv"}),
        (rows, "`resume` goes on with the file", {"task": "choice", "resume": True}),
        (rows, "readout='mixture' is that of the last", {"task": "choice", "readout": "mixture", "layer": 0}),
    ]:
        with pytest.raises(ValueError, match=message):
            table_of(model, data, **settings)
