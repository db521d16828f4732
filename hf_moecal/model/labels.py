"""Labels as people write them, numbers or names, become the classes of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..labels import read_labels
from ..table import IGNORED_LABEL


def class_numbers(
    values: Sequence[Any],
    names: Mapping[str, int],
    *,
    mapping: Mapping[Any, int] | None = None,
    where: str = "Column 'label'",
) -> list[int] | list[list[float]]:
    """The class of each label; lists with the share of each class stay such lists.

    A label is the number of a class, or its name in `names`; upper and lower case and outer white space count only
    where names differ by nothing else. Where a number is a name too, and of another class ("1" to "5" for the classes
    0 to 4), it is the reading that fits all labels; if both fit, an error.

    Args:
        values (`Sequence`): whole numbers, or texts; -100 for a row without a label.
        names (`Mapping[str, int]`): class of each name, as in a config's `label2id`.
        mapping (`Mapping`, *optional*): class of each label as the user says it; nothing else is then read.
        where (`str`): what the messages call the labels.

    Raises:
        ValueError: a label is missing, is neither a class nor a name, or could be two classes.

    Example:

    ```python
    >>> from hf_moecal.model.labels import class_numbers
    >>> class_numbers(["happy", "Unhappy", "happy"], {"unhappy": 0, "happy": 1})
    [1, 0, 1]

    ```
    """
    if any(isinstance(value, list) for value in values):
        return read_labels(values, "label")
    labels = [_plain(value, row, where) for row, value in enumerate(values)]
    kinds = [type(label) for label in labels]
    odd = next((row for row, kind in enumerate(kinds) if kind is not kinds[0]), None)
    if odd is not None:
        raise ValueError(
            f"{where} mixes numbers and texts: row {odd} (from 0) holds {values[odd]!r}, the rows before are like "
            f"{values[0]!r}; make all of one kind."
        )
    if mapping is not None:
        said = {_text(label): number for label, number in mapping.items()}
        found = _named(labels, said)
        if found is None:
            raise ValueError(_unknown(labels, said, where, f"`labels` says {_listed(said)}"))
        return found
    as_numbers, as_names = _numbers(labels), _named(labels, names)
    if as_names is None and as_numbers is not None:
        return as_numbers
    if as_names is None:
        known = f"the model's classes are {_listed(names)}" if names else "the model's classes have no names"
        raise ValueError(_unknown(labels, names, where, known))
    classes = set(names.values()) | {IGNORED_LABEL}
    if as_numbers is not None and as_numbers != as_names and set(as_numbers) <= classes:
        raise ValueError(
            f"{where} holds numbers that are classes, and other classes' names too ({_listed(names)}). Say which: "
            + _option({str(label): "?" for label in dict.fromkeys(labels)})
        )
    return as_names


def read_mapping(items: Sequence[str], names: Mapping[str, int]) -> dict[str, int]:
    """The mapping that `LABEL=CLASS` items say, or one item with all labels in order, separated by commas.

    A class is a number or one of the model's names.

    Raises:
        ValueError: an item has no class, names an unknown one, or a label comes twice.
    """
    found: dict[str, int] = {}
    if len(items) == 1 and "=" not in items[0] and "," in items[0]:
        items = [f"{label.strip()}={number}" for number, label in enumerate(items[0].split(","))]
    for item in items:
        label, sign, wanted = item.rpartition("=")
        if not sign or not label or not (wanted.isdecimal() or wanted in names):
            known = f"or one of the model's names ({_listed(names)})" if names else "such as 0"
            raise ValueError(
                f"--labels takes LABEL=CLASS, and a class is a number {known}; got {item!r}, as in negative=0."
            )
        if label in found:
            raise ValueError(f"--labels says twice what {label!r} is.")
        found[label] = names[wanted] if wanted in names else int(wanted)
    return found


def _plain(value: Any, row: int, where: str) -> int | str:
    value = value.item() if hasattr(value, "item") else value
    if value is None or value != value:
        raise ValueError(
            f"{where}: row {row} (from 0) has no label ({value}); leave such rows out, or give them "
            f"{IGNORED_LABEL}, which is 'no label'."
        )
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, bool):
        return _text(value)
    if not isinstance(value, (int, str)):
        raise ValueError(
            f"{where}: row {row} (from 0) holds {value!r}, which is no class: a label is a whole number or a name. Of "
            "scores make classes with `threshold`."
        )
    return value


def _numbers(labels: Sequence[int | str]) -> list[int] | None:
    if all(isinstance(label, int) or label.strip().isdecimal() for label in labels):
        return [int(label) for label in labels]
    return None


def _named(labels: Sequence[int | str], names: Mapping[str, int]) -> list[int] | None:
    """The labels read as names, if all of them are some."""
    loose: dict[str, set[int]] = {}
    for name, number in names.items():
        loose.setdefault(name.strip().casefold(), set()).add(number)
    found = []
    for label in labels:
        near = loose.get(str(label).strip().casefold(), set())
        if label == IGNORED_LABEL:
            found.append(IGNORED_LABEL)
        elif str(label) in names:
            found.append(names[str(label)])
        elif len(near) == 1:
            found.extend(near)
        else:
            return None
    return found


def _text(label: Any) -> str:
    """A label as it is compared: YAML reads `true` and `1` as no texts."""
    return str(label).lower() if isinstance(label, bool) else str(label)


def _unknown(labels: Sequence[int | str], names: Mapping[str, int], where: str, known: str) -> str:
    distinct = list(dict.fromkeys(str(label) for label in labels))
    filled = {label: (found[0] if (found := _named([label], names)) else "?") for label in distinct[:12]}
    more = f", and {len(distinct) - 12} more" if len(distinct) > 12 else ""
    return (
        f"{where} holds {', '.join(map(repr, distinct[:12]))}{more}, and {known}. Say which class each is, its number "
        f"in place of ?: {_option(filled)}"
    )


def _option(mapping: Mapping[str, Any]) -> str:
    import shlex

    items = " ".join(shlex.quote(f"{label}={number}") for label, number in mapping.items())
    entries = ", ".join(f"{label!r}: {number}" for label, number in mapping.items())
    return f"--labels {items} (in a recipe, `labels: {{{entries}}}` under `data:`; in Python, give numbers)"


def _listed(names: Mapping[str, int]) -> str:
    return ", ".join(f"{number}: {name}" for name, number in sorted(names.items(), key=lambda item: item[1])[:12])
