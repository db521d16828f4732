"""What a card inherits from those who wrote it before: their placeholders, and paths that mean nothing elsewhere."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any


_HEADING = re.compile(r"(?m)^(#{1,6}) .*$")
_PLACEHOLDER = re.compile(r"(?im)^.*\[?more information needed\]?\.?[ \t]*$\n?")
_COMMENT = re.compile(r"(?s)<!--.*?-->")
_FILLERS = (  # sentences of the templates around their placeholders
    "Use the code below to get started with the model.",
    "Carbon emissions can be estimated using the",
    "Users (both direct and downstream) should be made aware of the risks",
)
_LINK = re.compile(r"\[([^\]\n]+)\]\(https?://[^)\s]*\)")


def without_placeholders(text: str) -> str:
    """A card's text without the sections of a template that nobody filled in, such as "More information needed".

    Example:

    ```python
    >>> from hf_moecal.hub.card_sources import without_placeholders
    >>> without_placeholders("# Name\\n\\n## Uses\\n\\nMore information needed\\n\\n## Results\\n\\nGood.\\n")
    '# Name\\n\\n## Results\\n\\nGood.\\n'

    ```
    """
    places = [match.start() for match in _HEADING.finditer(text)]
    if not places or not _PLACEHOLDER.search(text):
        return text
    sections = [text[start:end] for start, end in zip(places, [*places[1:], len(text)], strict=True)]
    kept: list[str] = []
    deeper_dropped = 0  # level of a dropped section that the next one before it may be the empty parent of
    for section in reversed(sections):
        heading, _, body = section.partition("\n")
        level, rest = len(heading) - len(heading.lstrip("#")), _PLACEHOLDER.sub("", body)
        is_empty = not _said(rest)
        was_template = rest != body or deeper_dropped > level
        if level > 1 and is_empty and was_template and not (kept and _level(kept[-1]) > level):
            deeper_dropped = level
            continue
        kept.append(f"{heading}\n{rest}" if rest != body else section)
        deeper_dropped = 0
    return text[: places[0]] + "".join(reversed(kept))


def _said(body: str) -> str:
    """What a section says beside comments and the template's own sentences."""
    lines = _COMMENT.sub("", body).splitlines()
    return "".join(line.strip() for line in lines if not line.strip().startswith(_FILLERS))


def _level(section: str) -> int:
    return len(section) - len(section.lstrip("#"))


def is_local_path(value: str) -> bool:
    """Whether a model is named by a path of somebody's machine, and not by its name on the Hub."""
    is_path = value.startswith((".", "~", "/")) or "\\" in value or value.count("/") > 1
    return is_path or Path(value).is_dir()


def published_name(value: Any) -> Any:
    """A setting as it can be published: of a local path the last part only."""
    return Path(value).name if isinstance(value, str) and "/" in value and is_local_path(value) else value


def without_local_paths(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """A card's metadata without base models and tags that name a local path."""
    kept = dict(metadata)
    base = kept.pop("base_model", None)
    bases = [name for name in ([base] if isinstance(base, str) else base or []) if not is_local_path(str(name))]
    if bases:
        kept["base_model"] = bases[0] if isinstance(base, str) else bases
    if kept.get("tags"):
        kept["tags"] = [tag for tag in kept["tags"] if not _names_local_base(str(tag))]
    return kept


def _names_local_base(tag: str) -> bool:
    return tag.startswith("base_model:") and is_local_path(tag.rpartition(":")[2])


def without_local_links(text: str) -> str:
    """A card's text in which links that are named by a local path say what they are of."""
    return _LINK.sub(lambda link: "a local checkpoint" if is_local_path(link[1]) and "/" in link[1] else link[0], text)
