"""Models, data and independent loops that the tests of training share."""

import math

import torch
import torch.nn.functional as F
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    MixtralForSequenceClassification,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from hf_moecal import MoECalArguments, MoECalTrainer


def balance_of(model, batch):
    """transformers' function on the scores that the base model gives."""
    base = model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_router_logits=True)
    return load_balancing_loss_func(base.router_logits, 4, 2, batch["attention_mask"])


VOCABULARY, CLASSES, ETA, PAD = 48, 3, 2.0, 0
WORDS = {f"w{i}": 5 + i for i in range(VOCABULARY - 5)}


SPECIAL = {"<pad>": 0, "<unk>": 1, "</s>": 2, "<user>": 3, "<bot>": 4}


TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}<user> {{ message['content'] }} "
    "{% else %}<bot> {% generation %}{{ message['content'] }} </s>{% endgeneration %} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<bot> {% endif %}"
)


QUESTIONS = ["w1 w2 w3", "w4", "w5 w6", "w7 w8 w9 w10", "w11", "w12 w13", "w14 w15", "w3 w1"]


ANSWERS = ["w20 w21", "w22", "w23 w24 w25", "w26 w27", "w28 w29", "w30", "w31 w32", "w33 w34 w35 w36"]


def tokenizer():
    raw = Tokenizer(models.WordLevel({**SPECIAL, **WORDS}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    found = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", unk_token="<unk>", eos_token="</s>")
    found.add_special_tokens({"additional_special_tokens": ["<user>", "<bot>"]})
    found.chat_template = TEMPLATE
    return found


def ids(text):
    return [{**SPECIAL, **WORDS}[word] for word in text.split()]


def row(ignored, judged):
    """Token ids and labels by hand: what SFTTrainer has to make of a text."""
    labels = [-100] * len(ids(ignored)) + ids(judged)
    return {"input_ids": torch.tensor(ids(f"{ignored} {judged}")), "labels": torch.tensor(labels)}


def chat(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


PAIRS = list(zip(QUESTIONS, ANSWERS, strict=True))


DATA = {  # rows as users have them, arguments, and the tokens that are judged
    "text": ([{"text": f"{q} {a}"} for q, a in PAIRS], {}, [row("", f"{q} {a} </s>") for q, a in PAIRS]),
    "completion": (
        [{"prompt": f"{q} ", "completion": a} for q, a in PAIRS],
        {},
        [row(q, f"{a} </s>") for q, a in PAIRS],
    ),
    "whole": (
        [{"prompt": f"{q} ", "completion": a} for q, a in PAIRS],
        {"completion_only_loss": False},
        [row("", f"{q} {a} </s>") for q, a in PAIRS],
    ),
    "assistant": (
        [{"messages": chat(q, a)} for q, a in PAIRS],
        {"assistant_only_loss": True},
        [row(f"<user> {q} <bot>", f"{a} </s>") for q, a in PAIRS],
    ),
}


def config(folder, kind=None, **changes):
    from hf_moecal.training.sft import MoECalSFTConfig  # which needs TRL, and most tests of training do not

    kind = kind or MoECalSFTConfig
    settings = dict(
        learning_rate=1e-3, max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=4, bf16=False,
        report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=True, max_grad_norm=0.0, logging_steps=1,
        optim="sgd", router_aux_loss_coef=0.0,
    )  # fmt: skip
    if kind is MoECalSFTConfig:
        settings |= dict(eta=2.0, robust_warmup_ratio=0.0, normalizer="two_pass", tau_regret=0.4)
    else:
        settings |= dict(gradient_checkpointing=None, activation_checkpointing=True)  # the default's new name
    return kind(str(folder), **{**settings, **changes})


def trainer_of(folder, data="completion", *, model=None, seen=None, kind=None, **changes):
    from trl import SFTConfig

    from hf_moecal.training.sft import MoECalSFTConfig, MoECalSFTTrainer

    kind = kind or MoECalSFTTrainer
    rows, settings, _ = DATA[data]
    keys = {"peft_config", "eval_dataset"}
    given = {key: changes.pop(key) for key in keys & set(changes)}
    cls = MoECalSFTConfig if kind is MoECalSFTTrainer else SFTConfig
    return kind(
        model=model or language_model(), args=config(folder, cls, **settings, **changes), processing_class=tokenizer(),
        train_dataset=Dataset.from_list(rows), callbacks=[seen] if seen else None, **given,
    )  # fmt: skip


def trained(folder, data="completion", **changes):
    seen = Gradients()
    trainer = trainer_of(folder, data, seen=seen, **changes)
    trainer.train()
    return seen.found, trainer


def tiny_config(**changes):
    settings = dict(
        vocab_size=VOCABULARY, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, num_labels=CLASSES, pad_token_id=PAD, initializer_range=0.3,
        router_jitter_noise=0.0, attention_dropout=0.0,
    )  # fmt: skip
    return MixtralConfig(**{**settings, **changes})


def classification_model(**changes):
    torch.manual_seed(0)
    return MixtralForSequenceClassification(tiny_config(**changes))


def language_model(**changes):
    torch.manual_seed(0)
    return MixtralForCausalLM(tiny_config(**changes))


def sequences(count, *, seed=1):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 9, (count,), generator=generator).tolist()
    return [torch.randint(1, VOCABULARY, (n,), generator=generator) for n in lengths]


def classification_data(count=8):
    return [{"input_ids": ids, "labels": i % CLASSES} for i, ids in enumerate(sequences(count))]


def language_data(count=8):
    rows = []
    for ids in sequences(count):
        labels = ids.clone()
        labels[:1] = -100
        labels[2] = -100
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def collate(rows):
    def pad(values, fill):
        return torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=fill)

    ids = [row["input_ids"] for row in rows]
    mask = [torch.ones_like(i) for i in ids]
    batch = {"input_ids": pad(ids, PAD), "attention_mask": pad(mask, 0)}
    if isinstance(rows[0]["labels"], int):
        batch["labels"] = torch.tensor([row["labels"] for row in rows])
    else:
        batch["labels"] = pad([row["labels"] for row in rows], -100)
    return batch


def arguments(folder, **changes):
    settings = dict(
        objective="robust_filtered", eta=ETA, learning_rate=1e-3, max_steps=1, per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        robust_warmup_ratio=0.0, report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=True,
        max_grad_norm=0.0, logging_steps=1, remove_unused_columns=False, optim="sgd", router_aux_loss_coef=0.0,
        normalizer="two_pass",
    )  # fmt: skip
    return MoECalArguments(str(folder), **{**settings, **changes})


class Gradients(TrainerCallback):
    """Copies the gradients as the optimizer sees them."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def trained_gradients(model, data, args, trainer_class=MoECalTrainer, **kwargs):
    seen = Gradients()
    trainer = trainer_class(
        model=model, args=args, train_dataset=data, data_collator=collate, callbacks=[seen], **kwargs
    )
    trainer.train()
    return seen.found, trainer


def losses_one_by_one(model, rows, per_token):
    """Loss of each example, each sequence forwarded alone."""
    losses = []
    for row in rows:
        logits = model(input_ids=row["input_ids"][None]).logits[0]
        if isinstance(row["labels"], int):
            losses.append(F.cross_entropy(logits[None], torch.tensor([row["labels"]])))
            continue
        keep = row["labels"][1:] != -100
        token_losses = F.cross_entropy(logits[:-1][keep], row["labels"][1:][keep], reduction="none")
        losses += list(token_losses) if per_token else [token_losses.mean()]
    return torch.stack(losses)


def measures_one_by_one(model, rows, per_token):
    """Regret and disagreement of each example, by overriding the last layer's routing in a whole forward."""
    experts = model.model.layers[-1].mlp.experts
    original, calls = type(experts).forward, []

    def probability(ids, position, chosen=None):
        def forward(hidden, index, weights):
            if chosen is None:
                calls[:] = [(index[position], weights[position])]
                return original(experts, hidden, index, weights)
            index, weights = index.clone(), weights.clone()
            weights[position] = torch.tensor([weights[position].sum(), 0.0])
            index[position] = torch.stack([calls[0][0][chosen], calls[0][0][1 - chosen]])
            return original(experts, hidden, index, weights)

        experts.forward = forward
        try:
            logits = model(input_ids=ids[None]).logits[0]
        finally:
            del experts.forward
        return torch.softmax(logits if logits.dim() == 1 else logits[position], -1)

    found = []
    with torch.no_grad():
        for row in rows:
            ids, labels = row["input_ids"], row["labels"]
            single = isinstance(labels, int)
            positions = [len(ids) - 1] if single else [p for p in range(len(ids) - 1) if labels[p + 1] != -100]
            measures = []
            for position in positions:
                label = labels if single else labels[position + 1]
                p = probability(ids, position)
                shares = calls[0][1] / calls[0][1].sum()
                alone = [probability(ids, position, chosen) for chosen in range(2)]
                regret = max(0.0, max(math.log(q[label] / p[label]) for q in alone))
                spread = sum(float(r * (q - p).square().sum()) for r, q in zip(shares, alone, strict=True))
                measures.append((regret, spread))
            if not single and not per_token:
                measures = [tuple(sum(column) / len(measures) for column in zip(*measures, strict=True))]
            found += measures
    return found


def relevance(measures, args):
    return torch.tensor([r > args.tau_regret or d > args.tau_disagreement for r, d in measures])


def objective_of(losses, measures, args):
    """The objective's value, with gradient, from all losses; the measures are those of each example, if it filters."""
    if args.objective == "erm":
        return losses.mean()
    relevant = torch.ones(len(losses), dtype=torch.bool)
    if args.objective == "robust_filtered":
        relevant = relevance(measures, args)
        assert relevant.any() and not relevant.all(), "the filter must bite, or the test shows nothing"
    chosen = losses[relevant]
    weights = torch.softmax(args.eta * (chosen.detach() if args.detach_weights else chosen), 0)
    tilted = (weights * chosen).sum()
    return tilted if args.objective == "robust" else losses.mean() + tilted


def objective_reference(model, rows, args):
    per_token = args.example == "token"
    measures = measures_one_by_one(model, rows, per_token) if args.objective == "robust_filtered" else None
    return objective_of(losses_one_by_one(model, rows, per_token), measures, args)


def reference_gradients(model, rows, args):
    model.zero_grad()
    objective_reference(model, rows, args).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def relative_error(found, expected):
    assert found.keys() >= expected.keys()
    scale = math.sqrt(sum(float(g.double().square().sum()) for g in expected.values()))
    off = math.sqrt(sum(float((found[n].double() - g.double()).square().sum()) for n, g in expected.items()))
    return off / scale


TASKS = {
    "classification": (classification_model, classification_data, dict(tau_regret=0.05)),
    "sequence": (language_model, language_data, dict(task="lm", example="sequence", tau_regret=0.4)),
    "token": (language_model, language_data, dict(task="lm", example="token", tau_regret=0.4)),
}


OBJECTIVES = {
    "erm": dict(objective="erm"),
    "robust": dict(objective="robust"),
    "robust-through": dict(objective="robust", detach_weights=False),
    "filtered": dict(objective="robust_filtered", tau_disagreement=0.05),
}


def checkpointing(folder, **changes):
    settings = dict(
        objective="robust", max_steps=4, num_train_epochs=4, save_strategy="steps", save_steps=2, optim="adamw_torch"
    )
    return arguments(folder, **{**settings, **changes})
