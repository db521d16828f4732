"""What a command is, what it hands back, and what all of them say alike."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any


Options = argparse.Namespace


@dataclass
class Outcome:
    """What a command found.

    Attributes:
        data (`dict`): all of it, printed by `--json`.
        lines (`list[str]`): for a person.
        exit_code (`int`): 0, or 1 where `monitor` found drift.
    """

    data: dict[str, Any]
    lines: list[str] = field(default_factory=list)
    exit_code: int = 0


@dataclass(frozen=True)
class Command:
    """One command of `moecal`.

    Attributes:
        name (`str`): what is typed.
        about (`str`): one sentence.
        example (`str`): a command line that shows it.
        add (`Callable`): gives the parser its options.
        run (`Callable`): does it.
        kept (`Callable`): after Ctrl-C, one sentence: what is kept and how to go on.
        overrides (`bool`): whether further options override fields of a recipe.
        more_help (`Callable`, *optional*): what `--help` says at its end.
    """

    name: str
    about: str
    example: str
    add: Callable[[argparse.ArgumentParser], None]
    run: Callable[[Options], Outcome]
    kept: Callable[[Options], str] = lambda options: "Nothing was written; run it again."
    overrides: bool = False
    more_help: Callable[[], str] | None = None


def nearest(given: str, known: Sequence[str]) -> str:
    """A question that names the nearest of the known words, if one is near."""
    close = difflib.get_close_matches(given.partition("=")[0], known, n=1)
    return f"did you mean {close[0]}? " if close else ""


def named_files(items: Sequence[str], example: str) -> dict[str, str]:
    """The files that `NAME=FILE` items name.

    Raises:
        ValueError: an item is not of this form, or a name comes twice.
    """
    found: dict[str, str] = {}
    for item in items:
        name, sign, path = item.partition("=")
        if not name or not sign or not path:
            raise ValueError(f"tables and sets are given as NAME=FILE, as in {example}; got {item!r}.")
        if name in found:
            raise ValueError(f"the name {name!r} is given twice, for {found[name]} and {path}; name one of them anew.")
        found[name] = path
    return found
