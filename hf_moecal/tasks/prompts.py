"""A prompt and what follows it become tokens, with the boundary between them where lm-evaluation-harness finds it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Continued(NamedTuple):
    """Tokens of a prompt and its continuation.

    Attributes:
        ids (`list[int]`): all of them.
        start (`int`): index of the continuation's first token.
    """

    ids: list[int]
    start: int


def encode_continuations(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    continuations: Sequence[Sequence[str]],
    *,
    max_length: int | None = None,
) -> list[list[Continued]]:
    """Tokens of every prompt with each of its continuations.

    Prompt and continuation are joined as they are and tokenized as one text, since a tokenizer may merge across the
    boundary. The continuation's tokens are those after the prompt's own, or from the first one that differs. White
    space at the end of the prompt counts to the continuation: `"Answer: "` + `"yes"` gives the token `" yes"`, which
    the model knows from its training, and not `" "` and `"yes"`. Tokens that the tokenizer puts before a text (BOS)
    come first, once; tokens that it puts behind one do not.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): the model's.
        prompts (`Sequence[str]`): one for each example.
        continuations (`Sequence[Sequence[str]]`): those of each example.
        max_length (`int`, *optional*): tokens after which the *beginning* of a prompt is cut, by the same amount for
            all continuations of an example.

    Returns:
        `list[list[Continued]]`: for each example, for each continuation.

    Raises:
        ValueError: a continuation has no token of its own, has nothing before it, or does not fit into `max_length`.
    """
    first = _tokens_before(tokenizer)
    alone = _encode(tokenizer, [prompt.rstrip() for prompt in prompts])
    joined = [prompt + text for prompt, texts in zip(prompts, continuations, strict=True) for text in texts]
    wholes = iter(_encode(tokenizer, joined))
    rows = []
    for row, (prompt, texts) in enumerate(zip(alone, continuations, strict=True)):
        found = [_continued(prompt, ids, first) for ids in islice(wholes, len(texts))]
        for text, (ids, start) in zip(texts, found, strict=True):
            if start == len(ids):
                raise ValueError(
                    f"Row {row}: {text!r} adds no token to its prompt, which ends in {prompts[row][-20:]!r}; start it "
                    "with a space, or leave it out if it is empty."
                )
            if start == 0:
                raise ValueError(
                    f"Row {row}: nothing comes before {text!r}, so that its first token has no probability; give a "
                    "prompt, or a tokenizer that begins texts with a BOS token."
                )
        rows.append(_cut(found, len(first), max_length, row))
    return rows


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []


def _tokens_before(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that the tokenizer puts before a text."""
    whole, alone = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    starts: Iterator[int] = (i for i in range(len(whole)) if whole[i : i + len(alone)] == alone)
    return whole[: next(starts, 0)]


def _continued(prompt: list[int], whole: list[int], first: list[int]) -> Continued:
    same = (i for i, pair in enumerate(zip(prompt, whole, strict=False)) if pair[0] != pair[1])
    start = next(same, min(len(prompt), len(whole)))
    if whole[: len(first)] != first or start < len(first):  # a chat template may have written them already
        whole, start = first + whole, start + len(first)
    return Continued(whole, start)


def _cut(found: list[Continued], first: int, max_length: int | None, row: int) -> list[Continued]:
    longest = max((len(ids) for ids, _ in found), default=0)
    surplus = 0 if max_length is None else max(0, longest - max_length)
    if surplus and any(start - surplus < max(1, first) for _, start in found):
        raise ValueError(
            f"Row {row}: what follows the prompt leaves no room for it within max_length={max_length}; raise it to "
            f"{longest} to keep everything."
        )
    return [Continued(ids[:first] + ids[first + surplus :], start - surplus) for ids, start in found]
