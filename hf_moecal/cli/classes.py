"""The classes that a classifier is trained on: those of its own head, or of the training set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..model.labels import class_numbers
from ..model.loading import own_labels
from ..table import IGNORED_LABEL
from .recipe import Recipe, expand
from .sets import with_classes


if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Classes:
    """The classes of a model to be trained.

    Attributes:
        names (`dict[str, int]`): class of each name; empty where labels are numbers.
        count (`int`): how many there are.
        column (`str`): of the labels, for messages.
        fresh (`bool`): whether the model's config is to learn the names.
    """

    names: Mapping[str, int]
    count: int
    column: str
    fresh: bool

    def resolve(self, set_name: str, dataset: Dataset) -> Dataset:
        """The set with classes as labels.

        Raises:
            ValueError: a label is none of the classes.
        """
        where = f"Set {set_name!r}: column {self.column!r}"
        numbers = class_numbers(dataset["label"][:], self.names, where=where)
        if isinstance(numbers[0], list):
            return with_classes(dataset, numbers)
        wrong = next((number for number in numbers if not 0 <= number < self.count and number != IGNORED_LABEL), None)
        if wrong is not None:
            raise ValueError(
                f"{where} holds class {wrong}, and the model has {self.count}, 0 to {self.count - 1}; map them with "
                "`labels` (--labels LABEL=CLASS), or start from a checkpoint without this head."
            )
        return with_classes(dataset, numbers)

    def name_in(self, config: Any) -> None:
        """Writes the names into a model's config, if it has none yet."""
        if self.fresh and sorted(self.names.values()) == list(range(self.count)):
            config.id2label = {number: name for name, number in self.names.items()}
            config.label2id = dict(self.names)


def classes_of(recipe: Recipe, sets: Mapping[str, Dataset]) -> Classes:
    """The classes of a recipe's model, else those that its sets show.

    Names come from the recipe's `labels`, or, where the training set's labels are texts, from these in their order.

    Raises:
        ValueError: labels are missing, or texts and numbers are mixed.
    """
    path, column = expand(recipe.model), recipe.label
    own = own_labels(path)
    if own is not None:
        return Classes(own, own_count(path), column, fresh=False)
    if recipe.labels is not None:
        said = {str(label): number for label, number in recipe.labels.items()}
        return Classes(said, 1 + max(said.values()), column, fresh=True)
    labels = sets["train"]["label"][:]
    if isinstance(labels[0], list):  # the share of each class
        return Classes({}, len(labels[0]), column, fresh=True)
    texts = sorted({label for label in labels if isinstance(label, str) and not label.strip().isdecimal()})
    if texts:
        return Classes({text: number for number, text in enumerate(texts)}, len(texts), column, fresh=True)
    every = [n for name, dataset in sets.items() for n in class_numbers(
        dataset["label"][:], {}, where=f"Set {name!r}: column {column!r}")]  # fmt: skip
    return Classes({}, 1 + max(every), column, fresh=True)


def own_count(path: str) -> int:
    """Number of classes of a saved classifier."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(path).num_labels
