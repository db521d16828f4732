"""Sentences and a tokenizer that the tests of the command line share."""

WORDS = ["[PAD]", "[UNK]", "good", "bad", "film", "food", "very", "not", "the", "was"]


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]")


def sentences(topic, count, offset=0):
    rows = []
    for i in range(offset, offset + count):
        label = i % 2
        text = f"the {topic} was {'very ' * (i % 3)}{'good' if label else 'bad'}"
        label = 1 - label if i % 8 == 3 else label  # noise, so that certainty is wrong
        rows.append({"text": text, "label": label, "id": f"{topic}-{i}", "split": "train" if i < 24 else "test"})
    return rows
