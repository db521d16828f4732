"""Examples and scores one by one that the tests of answer options share."""

import math

import numpy as np
import torch
import torch.nn.functional as F


def examples(count=8, *, words=False, seed=3):
    """Prompts of 2 to 6 tokens with 2 to 4 options of 1 to 4 tokens."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        options = 2 + int(rng.integers(3))
        lengths = [1] * options if words else rng.integers(1, 5, options).tolist()
        rows.append(
            {
                "prompt_ids": rng.integers(1, 48, 2 + int(rng.integers(5))).tolist(),
                "option_ids": [
                    rng.choice(np.arange(12 * k + 1, 12 * k + 12), n).tolist() for k, n in enumerate(lengths)
                ],
                "options": ["x" * (1 + 3 * k) for k in range(options)],
                "label": i % options,
            }
        )
    return rows


def scores_one_by_one(model, row, scoring):
    prompt = row["prompt_ids"]
    if scoring == "label_word":
        logits = model(input_ids=torch.tensor([prompt])).logits[0, -1]
        return torch.stack([logits[word] for (word,) in row["option_ids"]])
    scores = []
    for option, text in zip(row["option_ids"], row["options"], strict=True):
        logits = model(input_ids=torch.tensor([prompt + option])).logits[0]
        log_probs = [F.log_softmax(logits[len(prompt) + i - 1], -1)[token] for i, token in enumerate(option)]
        scores.append(sum(log_probs) / {"per_token": len(option), "total": 1, "per_byte": len(text)}[scoring])
    return torch.stack(scores)


def losses_one_by_one(model, rows, scoring):
    scores = [scores_one_by_one(model, row, scoring) for row in rows]
    return torch.stack([-F.log_softmax(s, -1)[row["label"]] for s, row in zip(scores, rows, strict=True)])


def measures_one_by_one(model, row, scoring):
    """Regret and disagreement of one example, by overriding the last layer's routing in whole forwards."""
    experts = model.model.layers[-1].mlp.experts
    original, seen = type(experts).forward, {}
    right = row["option_ids"][row["label"]]
    ids = torch.tensor([row["prompt_ids"] + ([] if scoring == "label_word" else right)])

    def distribution(position, chosen=None):
        def forward(hidden, index, weights):
            if chosen is None:
                seen["index"], seen["weights"] = index[position], weights[position]
                return original(experts, hidden, index, weights)
            index, weights = index.clone(), weights.clone()
            weights[position] = torch.stack([weights[position].sum(), torch.tensor(0.0)])
            index[position] = torch.stack([seen["index"][chosen], seen["index"][1 - chosen]])
            return original(experts, hidden, index, weights)

        experts.forward = forward
        try:
            logits = model(input_ids=ids).logits[0, position]
        finally:
            del experts.forward
        if scoring == "label_word":
            logits = torch.stack([logits[word] for (word,) in row["option_ids"]])
        return F.softmax(logits, -1)

    start = len(row["prompt_ids"]) - 1
    judged = [(start, row["label"])] if scoring == "label_word" else [(start + i, t) for i, t in enumerate(right)]
    found = []
    with torch.no_grad():
        for position, label in judged:
            p = distribution(position)
            shares = seen["weights"] / seen["weights"].sum()
            alone = [distribution(position, chosen) for chosen in range(2)]
            regret = max(0.0, max(math.log(q[label] / p[label]) for q in alone))
            spread = sum(float(r * (q - p).square().sum()) for r, q in zip(shares, alone, strict=True))
            found.append((regret, spread))
    return [sum(column) / len(found) for column in zip(*found, strict=True)]


def reference_gradients(model, rows, args, scoring):
    losses = losses_one_by_one(model, rows, scoring)
    relevant = torch.ones(len(losses), dtype=torch.bool)
    if args.objective == "robust_filtered":
        measures = [measures_one_by_one(model, row, scoring) for row in rows]
        relevant = torch.tensor([r > args.tau_regret or d > args.tau_disagreement for r, d in measures])
        assert relevant.any() and not relevant.all(), "the filter must bite, or the test shows nothing"
    chosen = losses[relevant]
    weights = torch.softmax(args.eta * (chosen.detach() if args.detach_weights else chosen), 0)
    value = losses.mean() if args.objective != "robust" else 0.0
    value = value if args.objective == "erm" else value + (weights * chosen).sum()
    value.backward()
    return value.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def word_tokenizer(**special):
    """One token per word, with the space before it: as byte-level BPE does on common words."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [
        "<pad>",
        "<s>",
        "?",
        "The",
        " film",
        " was",
        " good",
        " bad",
        " ",
        "good",
        "bad",
        ":",
        " very",
        "film",
        "s",
    ]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="?"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?\w+| |:"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", unk_token="?", **special)
