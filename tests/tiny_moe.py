"""Tiny random models of every MoE family that the installed transformers knows.

Families are enumerated from transformers' auto mappings and its modelling code; the tables below only say how to make
a configuration small. A family without an entry gets the common fields, so that a new one is tried, not skipped.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, model_type_to_module_name
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from hf_moecal.model.classifier import register_classifier


VOCABULARY = 128

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "d_model": 64,
    "intermediate_size": 96,
    "dense_intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "n_layers": 2,
    "num_layers": 2,
    "max_position_embeddings": 256,
    "max_seq_len": 256,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 0,
    "num_mtp_layers": 0,
    "num_nextn_predict_layers": 0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_EXPERTS = {
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "top_k_experts": 2,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "shared_experts_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "moe_layer_start_index": 1,
    "moe_layer_interval": 1,
    "router_jitter_noise": 0.0,
    "input_jitter_noise": 0.0,
}
_ATTENTION = {
    "num_attention_heads": 4,
    "n_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "kv_lora_rank": 16,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "index_topk": 64,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "sliding_window": 32,
    "sliding_window_size": 32,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 16,
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_d_state": 16,
    "mamba_chunk_size": 16,
    "use_mamba_kernels": False,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_head_dim": 16,
    "linear_num_heads": 4,
}
_COMMON = {**_SIZES, **_EXPERTS, **_ATTENTION}

_LATENT = {"num_key_value_heads": 4}
_ONE_GROUP = {"n_group": 1}
_DENSE_SPARSE = {"mlp_layer_types": ["dense", "sparse"]}
_LINEAR_FULL = {"layer_types": ["linear_attention", "full_attention"]}
_SLIDING_FULL = {"layer_types": ["sliding_attention", "full_attention"]}
_FAMILIES: dict[str, dict[str, Any]] = {
    "aria_text": {"intermediate_size": 32},
    "axk1": _LATENT,
    "axk2": {**_LATENT, "n_group": None, "topk_group": None, "index_head_dim": 16, "gated_norm_rank": 4},
    "bailing_hybrid": {**_LATENT, "layer_group_size": 2},
    "beam": _DENSE_SPARSE,
    "cohere2_moe": {
        **_SLIDING_FULL,
        "mlp_layer_types": ["sparse", "sparse"],
        "num_shared_experts": 1,
        "sliding_window_pattern": 2,
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 8, "moe_top_k": 2, "hidden_size": 64},
    },
    "deepseek_v2": {**_LATENT, "n_group": None, "topk_group": None},
    "deepseek_v3": _LATENT,
    "deepseek_v32": _LATENT,
    "deepseek_v4": {
        "num_key_value_heads": 1,
        "o_groups": 2,
        "o_lora_rank": 8,
        "hc_mult": 2,
        "mlp_layer_types": ["moe", "moe"],
        "layer_types": ["sliding_attention", "sliding_attention"],
    },
    "doge": {"is_moe": True, "num_experts": 16, "num_experts_per_tok": 4},
    "dots1": _ONE_GROUP,
    "dots3_note_text": {**_LATENT, **_ONE_GROUP, "head_dim": 16},
    "flint": {"mlp_only_layers": [0]},
    "gemma4_text": {**_SLIDING_FULL, "enable_moe_block": True, "global_head_dim": 16},
    "glm4_moe_lite": {**_LATENT, **_ONE_GROUP, "head_dim": 8},
    "glm_moe_dsa": {**_LATENT, **_ONE_GROUP},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"],
        "mamba_expand": 2,
        "mamba_d_head": 32,
        "mamba_n_heads": 4,
    },
    "hy_v3": _DENSE_SPARSE,
    "hy_v4": {**_LATENT, **_ONE_GROUP, **_DENSE_SPARSE, "hc_mult": 2},
    "inkling2_text": {
        **_SLIDING_FULL,
        "d_rel": 4,
        "rel_extent": 32,
        "unpadded_vocab_size": VOCABULARY,
        "n_layers_per_attn_res_block": 1,
    },
    "inkling_text": {
        **_SLIDING_FULL,
        **_DENSE_SPARSE,
        "d_rel": 4,
        "rel_extent": 32,
        "unpadded_vocab_size": VOCABULARY,
        "n_shared_experts": 1,
        "logits_mup_width_multiplier": 2.0,
    },
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 0,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_dt_rank": 4,
    },
    "jetmoe": {"kv_channels": 16, "num_key_value_heads": 2},
    "kimi_linear": {**_LATENT, **_ONE_GROUP, **_DENSE_SPARSE, **_LINEAR_FULL},
    "laguna": _DENSE_SPARSE,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "llama4_text": {"intermediate_size_mlp": 96, "num_experts_per_tok": 2, "head_dim": 16, "intermediate_size": 32},
    "longcat_flash": {
        **_LATENT,
        "ffn_hidden_size": 64,
        "expert_ffn_hidden_size": 32,
        "zero_expert_num": 2,
        "head_dim": 8,
        "qk_head_dim": 16,
        "intermediate_size": 64,
        "moe_topk": 3,
    },
    "mimo_v2_flash": {**_ONE_GROUP, "head_dim": 16},
    "minimax": {**_LINEAR_FULL, "block_size": 16},
    "minimax_m3_vl_text": {**_DENSE_SPARSE, "rotary_dim": 8, "index_block_size": 8, "index_topk_blocks": 16},
    "mistral4": {**_LATENT, **_ONE_GROUP},
    "nemotron_h": {
        **_ONE_GROUP,
        "layers_block_type": ["mamba", "moe", "attention", "moe"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 16,
        "n_groups": 2,
        "chunk_size": 16,
    },
    "qwen3_5_moe_text": _LINEAR_FULL,
    "qwen3_next": _LINEAR_FULL,
    "qwen4_exp_text": {
        **_LINEAR_FULL,
        "hc_count": 2,
        "hc_lowrank": 8,
        "ngram_vocab_size_base": 64,
        "make_ngram_vocab_size_divisible_by": 8,
        "split_ngram_parts": 4,
        "heads_per_ngram": 2,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 32,
        "indexer_compress_ratio": 4,
    },
    "zaya": {"router_hidden_size": 16, "num_experts_per_tok": 1},
}
# Composite configurations whose text part is listed under its own name, and one that mentions experts but has none.
_NOT_OWN = {"bamba", "gemma4", "llama4", "dots3_note", "qwen3_5_moe", "qwen4_exp"}
_EVERY_LAYER = {
    "first_k_dense_replace": 0,
    "num_dense_layers": 0,
    "moe_layer_start_index": 0,
    "mlp_only_layers": [],
    "mlp_layer_types": ["sparse", "sparse"],
    "expert_layer_period": 1,
    "expert_layer_offset": 0,
}
_MENTIONS_EXPERTS = re.compile(r"num_experts|n_routed_experts|num_local_experts|top_k_index")


@functools.cache
def families() -> tuple[str, ...]:
    """Model types of every causal-LM MoE family of the installed transformers."""
    return tuple(name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in _NOT_OWN and _is_moe(name))


def headless_families() -> tuple[str, ...]:
    """Those that have no sequence-classification head in transformers."""
    return tuple(name for name in families() if name not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES)


def _is_moe(model_type: str) -> bool:
    folder = Path(transformers.__file__).parent / "models" / model_type_to_module_name(model_type)
    return any(_MENTIONS_EXPERTS.search(path.read_text(encoding="utf-8")) for path in folder.glob("modeling_*.py"))


def tiny_config(model_type: str, *, every_layer: bool = False, **changes: Any) -> PreTrainedConfig:
    """A configuration of the family with the common fields that it has, its own, and `changes`.

    Where the family starts with a dense layer `every_layer` makes that one sparse as well.
    """
    cls = CONFIG_MAPPING[model_type]
    names = _fields(cls)
    values = {name: value for name, value in _COMMON.items() if name in names}
    for alias, target in (cls.attribute_map or {}).items():
        if alias in values and target in values:
            del values[alias]
    own = _FAMILIES.get(model_type, {})
    if every_layer and model_type != "deepseek_v4":  # which has no dense layer and its own word for a sparse one
        own = {**own, **{name: value for name, value in _EVERY_LAYER.items() if name in names}}
    return cls(**{**values, **own, **changes})


def _fields(cls: type) -> set[str]:
    if dataclasses.is_dataclass(cls):
        return {field.name for field in dataclasses.fields(cls)}
    special = {"pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings"}
    return set(inspect.signature(cls.__init__).parameters) | special


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights of unit scale: with the usual small ones no expert moves a logit by more than rounding."""
    generator = torch.Generator().manual_seed(seed)
    embedding = model.get_input_embeddings()
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if embedding is not None and parameter is embedding.weight:
            parameter.copy_(noise)
        elif parameter.dim() >= 2:
            parameter.copy_(noise / parameter.shape[-1] ** 0.5)
        else:
            parameter.add_(0.1 * noise)
    return model


def tiny_model(
    model_type: str,
    *,
    classifier: bool = False,
    experts: str | None = None,
    every_layer: bool = False,
    seed: int = 0,
    **changes: Any,
) -> PreTrainedModel:
    """A tiny random model in evaluation mode, float32, with the default or another experts implementation."""
    auto = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    torch.manual_seed(seed)
    labels = {"num_labels": 3} if classifier else {}
    config = tiny_config(model_type, every_layer=every_layer, **labels, **changes)
    if classifier:
        register_classifier(config)
    model = auto.from_config(config, attn_implementation="eager")
    if experts is not None:
        model.set_experts_implementation(experts)
    return randomise(model, seed).float().eval()


def tiny_batch(
    *, batch: int = 2, length: int = 9, padding: str | None = None, seed: int = 1
) -> dict[str, torch.Tensor]:
    """Token ids without special tokens; with `padding` "left" or "right" the first row is three tokens shorter."""
    ids = torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    if padding is not None:
        mask[0, :3] = 0
        if padding == "right":
            mask = mask.flip(-1)
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}
