"""Under what a model computes, besides its weights: it moves logits a little, or with quantized weights a lot."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from torch import nn

CONDITIONS = "conditions"
"""Column of the predictions table that says under what its rows were predicted."""

_ARGUMENTS = {
    "dtype": "dtype",
    "attention": "attn_implementation",
    "experts": "experts_implementation",
    "quantization": "quantization_config",
}
"""Each condition, and the argument of `from_pretrained` that sets it."""


def conditions_of(model: nn.Module) -> dict[str, str]:
    """The model's `dtype`, `attention` and `experts` implementation, and `quantization`; `"none"` where it has none.

    Example:

    ```python
    >>> from transformers import MixtralConfig, MixtralForCausalLM
    >>> from hf_moecal.model.conditions import conditions_of
    >>> config = MixtralConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
    ...     num_attention_heads=2, num_key_value_heads=2, num_local_experts=4, attn_implementation="eager")
    >>> conditions_of(MixtralForCausalLM(config))["attention"]
    'eager'

    ```
    """
    text = model.config.get_text_config()
    found = {
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": getattr(text, "_attn_implementation", None),
        "experts": getattr(text, "_experts_implementation", None),
        "quantization": _quantization(getattr(model.config, "quantization_config", None)),
    }
    return {name: str(value or "none") for name, value in found.items()}


def _quantization(config: Any) -> str | None:
    if config is None:
        return None
    fields = config if isinstance(config, Mapping) else config.to_dict()
    method = fields.get("quant_method")
    kind = fields.get("bnb_4bit_quant_type") if fields.get("load_in_4bit") else None
    kind = kind or ("int8" if fields.get("load_in_8bit") else fields.get("bits") or fields.get("quant_type"))
    return " ".join(str(part) for part in (getattr(method, "value", method), kind) if part)


def as_text(conditions: Mapping[str, str]) -> str:
    """Conditions as one text, such as `"dtype=bfloat16, attention=sdpa"`."""
    return ", ".join(f"{name}={value}" for name, value in conditions.items())


def from_text(text: str) -> dict[str, str]:
    """Conditions from the text that [`as_text`] made of them."""
    return dict(part.split("=", 1) for part in text.split(", "))  # a value has no comma: they are names and numbers


def differences(then: Mapping[str, str], now: Mapping[str, str]) -> str:
    """What differs, with the argument of `from_pretrained` that sets it; empty where nothing does."""
    wrong = [name for name in _ARGUMENTS if name in then and then[name] != now.get(name)]
    return "; ".join(f"{name} {then[name]!r}, now {now.get(name)!r} (`{_ARGUMENTS[name]}`)" for name in wrong)
