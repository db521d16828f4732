"""LoRA on the attention and on the fused experts of any supported mixture, chosen by structure."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import nn

from ..probes import UnsupportedMoEError, find_moe_layers
from ..probes.routing import forward_parameters
from .freezing import attention_modules, head_modules


if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

LORA_R, LORA_ALPHA = 16, 32
# Wherever modules of these names are, peft takes them for routers and experts from before experts were fused.
_TAKEN_FOR_EXPERTS = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")


def lora_config(model: nn.Module, *, r: int = LORA_R, alpha: int = LORA_ALPHA) -> LoraConfig:
    """The `peft.LoraConfig` that adapts a mixture's attention projections and the experts of all its MoE layers.

    Experts are reached through `target_parameters`; the head of a classifier trains whole, in `modules_to_save`.
    Routers stay as they are.

    Args:
        model (`PreTrainedModel`): a causal language model or sequence classifier with fused experts.
        r (`int`, *optional*, defaults to 16): rank, of each projection and of each expert.
        alpha (`int`, *optional*, defaults to 32): the update is scaled by alpha / r.

    Raises:
        ImportError: peft is not installed.
        UnsupportedMoEError: the model has no MoE layer, or its experts are not fused into three-dimensional weights.

    Example:

    ```python
    >>> from transformers import MixtralConfig, MixtralForSequenceClassification
    >>> from hf_moecal.model.lora import lora_config
    >>> config = MixtralConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    ...     num_attention_heads=2, num_key_value_heads=1, num_local_experts=4)
    >>> found = lora_config(MixtralForSequenceClassification(config))
    >>> sorted(found.target_parameters)
    ['mlp.experts.down_proj', 'mlp.experts.gate_up_proj']
    >>> sorted(found.target_modules)
    ['self_attn.k_proj', 'self_attn.o_proj', 'self_attn.q_proj', 'self_attn.v_proj']

    ```
    """
    try:
        from peft import LoraConfig, TaskType
    except ImportError as error:
        raise ImportError("train='lora' needs peft; install it with `pip install 'hf_moecal[peft]'`.") from error
    weights = [name for name, _ in model.named_parameters()]
    modules = [name for name, _ in model.named_modules()]
    projections = _shortened(_projections(model), modules)
    mistaken = [name for name in projections if name.rpartition(".")[2] in _TAKEN_FOR_EXPERTS]
    classifies = model.get_output_embeddings() is None
    return LoraConfig(
        task_type=TaskType.SEQ_CLS if classifies else TaskType.CAUSAL_LM,
        r=r,
        lora_alpha=alpha,
        target_modules=[name for name in projections if name not in mistaken],
        target_parameters=[*_shortened(_expert_weights(model), weights), *(f"{name}.weight" for name in mistaken)],
        modules_to_save=list(head_modules(model)) if classifies else None,
    )


def add_lora(model: nn.Module, *, r: int = LORA_R, alpha: int = LORA_ALPHA) -> PeftModel:
    """The model with the adapter of [`lora_config`] on it.

    Raises:
        ImportError: peft is not installed.
        ValueError: the model has an adapter already, or cannot be adapted.
    """
    if hasattr(model, "peft_config"):
        raise ValueError("The model has an adapter already; set train='all' to train that one instead of a new one.")
    config = lora_config(model, r=r, alpha=alpha)
    from peft import get_peft_model

    return get_peft_model(model, config)


def _projections(model: nn.Module) -> list[str]:
    """The linear layers of the attention modules, without those that only choose which positions are attended to.

    These, such as the indexer of sparse attention, take the attention mask as attention itself does; no gradient
    reaches them. A subclass of `nn.Linear` in a model's own code computes something else than an adapter expects.
    """
    found = []
    for name, attention in attention_modules(model).items():
        choosing = [child for child, module in attention.named_modules() if child and _takes_mask(module)]
        for child, module in attention.named_modules():
            own = type(module).__module__.startswith("transformers.models.")
            chooses = any(f"{child}.".startswith(f"{other}.") for other in choosing)
            if isinstance(module, nn.Linear) and not own and not chooses:
                found.append(f"{name}.{child}")
    return found


def _takes_mask(module: nn.Module) -> bool:
    return "attention_mask" in forward_parameters(module)


def _expert_weights(model: nn.Module) -> list[str]:
    found = []
    for layer in find_moe_layers(model):
        own = [name for name, weight in layer.module.named_parameters(recurse=False) if weight.dim() == 3]
        if not own:
            raise UnsupportedMoEError(
                f"The experts {layer.name} hold no fused weights of shape [experts, out, in], so an adapter cannot "
                "reach them; set train='last_moe_layer' or train='all'."
            )
        found += [f"{layer.name}.{name}" for name in own]
    return found


def _shortened(wanted: Iterable[str], known: list[str]) -> list[str]:
    """Names from the decoder layer on, which hold for all layers, unless these also fit what is not wanted."""
    short = sorted({re.sub(r"^.*?\.\d+\.", "", name) for name in wanted})
    fitting = {name for name in known if name.endswith(tuple(f".{end}" for end in short))}
    return short if fitting == set(wanted) else list(wanted)
