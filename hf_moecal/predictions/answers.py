"""A language model's own answers: how probable each is to the model, and whether it is right.

What fine-tuned models are asked for is an answer, not a token. Its confidence is the probability that the model gives
to the whole of it, and it is honest where answers of confidence c are right in a share c of the cases.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..probes.certify import evaluating
from ..table import IGNORED_LABEL
from . import predict


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


def same_text(answer: str, reference: str) -> bool:
    """Whether two texts are the same up to white space.

    Example:

    ```python
    >>> same_text(" in  Paris", "in Paris"), same_text("Paris", "paris")
    (True, False)

    ```
    """
    return answer.split() == reference.split()


def predict_answers(
    model: nn.Module,
    dataset: Dataset,
    *,
    processing_class: PreTrainedTokenizerBase,
    is_right: Callable[[str, Any], bool] = same_text,
    max_new_tokens: int = 64,
    batch_size: int = 32,
    layer: int | None = -1,
    group: str | None = None,
    progress: bool = True,
) -> Dataset:
    """Has a language model answer every prompt; each answer becomes a row of a predictions table.

    Answers are generated without sampling, otherwise as `model.generation_config` says. Then the model reads each of
    them once more, so that its probability is exact however it was generated.

    Args:
        model (`PreTrainedModel`): a causal language model.
        dataset (`datasets.Dataset`): a column `prompt` (text, or a list of messages for the chat template) and, where
            it is known, `completion` (the right answer in the same form, or whatever `is_right` takes; `None` if
            unknown). All other columns are kept.
        processing_class (`PreTrainedTokenizerBase`): its tokenizer.
        is_right (`Callable`, *optional*): says of an answer's text and a row's `completion` (of messages the last
            one's text) whether the answer is right; by default, whether both are the same up to white space.
        max_new_tokens (`int`, *optional*, defaults to 64): where answers are cut; see the column `finished`.
        batch_size (`int`, *optional*, defaults to 32): answers per forward.
        layer (`int`, *optional*, defaults to -1): MoE layer whose routing is recorded, `None` for none.
        group (`str`, *optional*): value of the column `group` for all rows.
        progress (`bool`, *optional*, defaults to `True`): whether to show progress bars.

    Returns:
        `datasets.Dataset`: with the columns `confidence` (probability of the answer and its end), `label` (1 if it is
        right, 0 if not, -100 if nobody knows) and `prediction` (1: it is always claimed to be right), so that
        [`~hf_moecal.metrics.table_report`], `moecal evaluate` and `moecal report` read it; `answer` (text), `finished`
        (whether it ends), `num_tokens`, `nll` (nats, mean over them), and the means of the routing figures.

    Raises:
        ValueError: the dataset is empty or has no column `prompt`.

    Example:

    ```python
    table = predict_answers(trainer.model, questions, processing_class=tokenizer, group="medicine")
    table_report(table)["signed_gap"]  # above 0: more confident than right
    ```
    """
    if len(dataset) == 0 or "prompt" not in dataset.column_names:
        raise ValueError(
            f"Answers need rows with a column `prompt`, got {len(dataset)} rows of {dataset.column_names}; rename the "
            "column of the questions."
        )
    dataset = dataset.with_format(None)
    prompts = [_prompt_ids(processing_class, prompt) for prompt in dataset["prompt"]]
    answers = _generate(model, prompts, processing_class, max_new_tokens, batch_size, progress)
    read = dataset.remove_columns([name for name in ("input_ids", "labels") if name in dataset.column_names])
    read = read.add_column("input_ids", [p + a for p, a in zip(prompts, answers, strict=True)])
    read = read.add_column("labels", [[IGNORED_LABEL] * len(p) + a for p, a in zip(prompts, answers, strict=True)])
    table = predict(model, read, task="lm", batch_size=batch_size, layer=layer, group=group, progress=progress)
    texts = [processing_class.decode(ids, skip_special_tokens=True).strip() for ids in answers]
    references = dataset["completion"] if "completion" in dataset.column_names else [None] * len(texts)
    ends = _ends(model, processing_class)
    made = {
        "label": [_judged(is_right, text, reference) for text, reference in zip(texts, references, strict=True)],
        "prediction": [1] * len(texts),
        "confidence": [
            min(1.0, math.exp(-nll * count)) for nll, count in zip(table["nll"], table["num_tokens"], strict=True)
        ],
        "answer": texts,
        "finished": [ids[-1] in ends for ids in answers],
    }
    # Of the tokens: the confidence in each, and whether it is the most likely one, which an answer's own mostly are.
    dropped = {"correct", "brier", "sequence_confidence", *made} & set(table.column_names)
    table = table.remove_columns(sorted(dropped))
    for name, values in made.items():
        table = table.add_column(name, values)
    return table


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str | Sequence[Mapping[str, Any]]) -> list[int]:
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    return list(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"])


def _ends(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end an answer."""
    found = model.generation_config.eos_token_id
    found = tokenizer.eos_token_id if found is None else found
    return set(found) if isinstance(found, Sequence) else {found}


@torch.no_grad()
def _generate(
    model: nn.Module,
    prompts: list[list[int]],
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    batch_size: int,
    progress: bool,
) -> list[list[int]]:
    """Tokens of each prompt's answer, with the one that ends it, if any does."""
    ends, device = _ends(model, tokenizer), next(model.parameters()).device
    pad = next(token for token in (tokenizer.pad_token_id, *ends) if token is not None)
    order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
    answers: list[list[int]] = [[] for _ in prompts]
    with evaluating(model), tqdm(total=len(prompts), desc="answer", unit="row", disable=not progress, delay=1) as bar:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = _left_padded([prompts[row] for row in rows], pad)
            found = model.generate(
                **{name: values.to(device) for name, values in batch.items()},
                do_sample=False,
                max_new_tokens=max_new_tokens,
                eos_token_id=sorted(ends),
                pad_token_id=pad,
            )
            for row, ids in zip(rows, found[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
                end = next((at for at, token in enumerate(ids) if token in ends), len(ids))
                answers[row] = ids[: end + 1]
            bar.update(len(rows))
    return answers


def _left_padded(rows: list[list[int]], pad: int) -> dict[str, Tensor]:
    length = max(map(len, rows))
    ids = [[pad] * (length - len(row)) + row for row in rows]
    mask = [[0] * (length - len(row)) + [1] * len(row) for row in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def _judged(is_right: Callable[[str, Any], bool], answer: str, reference: Any) -> int:
    if reference is None:
        return IGNORED_LABEL
    messages = isinstance(reference, Sequence) and reference and isinstance(reference[-1], Mapping)
    return int(is_right(answer, reference[-1]["content"] if messages else reference))
