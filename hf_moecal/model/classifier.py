"""A sequence-classification head for families that transformers gives none: its own generic one, under their names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

HEAD = "ForSequenceClassification"


def register_classifier(config: PreTrainedConfig) -> None:
    """Makes `AutoModelForSequenceClassification` take a configuration whose family has no such head in transformers.

    The class that is made is transformers' own `GenericForSequenceClassification` (the hidden state of the last token
    that is not padding, through a linear layer `score`) over the family's base model. Its parameters are called as in
    the family's language model, so it loads from a language model's checkpoint, and as in the heads that transformers
    has, so a later transformers with a head for the family loads what was saved with this one. Where there is a head
    already, or the checkpoint brings code of its own for one, nothing changes.

    Args:
        config (`PreTrainedConfig`): of a causal language model, or of a model with one inside.

    Raises:
        ValueError: transformers knows no causal language model for the configuration.

    Example:

    ```python
    >>> from transformers import AutoModelForSequenceClassification, OlmoeConfig
    >>> from hf_moecal.model.classifier import register_classifier
    >>> config = OlmoeConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
    ...     num_attention_heads=2, num_key_value_heads=2, num_experts=4, pad_token_id=0, num_labels=3)
    >>> register_classifier(config)
    >>> model = AutoModelForSequenceClassification.from_config(config)
    >>> type(model).__name__, model.score.weight.shape
    ('OlmoeForSequenceClassification', torch.Size([3, 16]))

    ```
    """
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
        AutoModelForSequenceClassification,
    )

    family = type(config)
    brings_code = AutoModelForSequenceClassification.__name__ in (getattr(config, "auto_map", None) or {})
    if brings_code or family in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        return
    if family not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"transformers has neither a sequence classifier nor a causal language model for {family.__name__}, so "
            "there is nothing to put a classification head on; load a text model."
        )
    made = _over(MODEL_FOR_CAUSAL_LM_MAPPING[family])
    for one in (family, made.config_class):  # which differ where the configuration holds that of the text model
        if one not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
            # `exist_ok`: without it transformers passes over what is registered for its own configurations.
            MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.register(one, made, exist_ok=True)


def label_arguments(config: PreTrainedConfig, num_labels: int) -> dict[str, Any]:
    """What tells `from_pretrained` of [`register_classifier`]'s model how many labels there are.

    Where the configuration holds that of a text model, of which the classifier is made, `num_labels` alone would be
    set on the whole and lost.
    """
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    text = config.get_text_config()
    if text is config or MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)].config_class is not type(text):
        return {"num_labels": num_labels}
    text.num_labels = num_labels
    if getattr(config, "quantization_config", None) is not None:
        text.quantization_config = config.quantization_config
    return {"config": text}


def is_added(architecture: str, model_type: str) -> bool:
    """Whether an architecture that a checkpoint names is a classifier that transformers alone cannot load."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as NAMES

    return architecture.endswith(HEAD) and model_type not in NAMES


def _over(language_model: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The generic classifier over the base model of a causal language model's class."""
    from transformers import MODEL_MAPPING
    from transformers.modeling_layers import GenericForSequenceClassification

    base = MODEL_MAPPING[language_model.config_class]
    common = next(parent for parent in language_model.__mro__ if issubclass(base, parent))
    name = language_model.__name__.removesuffix("ForCausalLM").removesuffix("LMHeadModel") + HEAD
    # Where the language model keeps its base: what it ties its head to says so, its `base_model_prefix` nearly always.
    tied = next(iter((language_model._tied_weights_keys or {}).values()), language_model.base_model_prefix)
    # The module is the family's since transformers converts the names in checkpoints for its own modules only.
    own = {"__module__": language_model.__module__, "base_model_prefix": tied.partition(".")[0]}
    return type(name, (GenericForSequenceClassification, common), {**own, "config_class": language_model.config_class})
