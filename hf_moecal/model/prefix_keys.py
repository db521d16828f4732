"""What a state of the frozen layers is known by: their weights and settings, and all tokens that it depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..versions import CACHE_NAMES


_UNRELATED = (  # settings that no hidden state depends on
    *("_name_or_path", "architectures", "id2label", "label2id", "problem_type", "transformers_version"),
    *("use_cache", "output_router_logits", "router_aux_loss_coef"),
)
_SHAPING = ("position_ids", "inputs_embeds", "token_type_ids", *CACHE_NAMES)


def fingerprint(modules: list[nn.Module], config: Any) -> str:
    """Hash of the weights of modules, and of the configuration that says how they are used."""
    digest = hashlib.blake2b(digest_size=16)
    settings = {name: value for name, value in config.to_diff_dict().items() if name not in _UNRELATED}
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for module in modules:
        for name, tensor in module.state_dict().items():
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def state_key(ids: Tensor, mask: Tensor, position: int) -> str:
    """Name of what one row gives at a position: all that attention sees up to there, and where it sees it.

    Args:
        ids (`Tensor` of shape `[S]`): the row, with padding.
        mask (`Tensor` of shape `[S]`, bool): the tokens that are attended to.
        position (`int`): of the judged token.
    """
    if not mask.any():
        raise ValueError("A sequence of the batch has no token (an empty text?); drop such rows.")
    start, end = (
        int(mask.int().argmax()),
        len(mask) - int(mask.flip(0).int().argmax()),
    )  # left padding shifts positions
    # Left padding shifts positions, which rounding tells apart.
    content = f"{start} {position - start} ".encode() + ids[mask].numpy().tobytes()
    if not mask[start:end].all():  # with holes inside, the same tokens stand elsewhere
        content += b" holes " + mask[start:end].numpy().tobytes()
    if not mask[position]:
        content += f" judged {int(ids[position])}".encode()
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def tokens_and_mask(inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Token ids and mask of a batch; raises where the hidden states depend on anything else."""
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    other = [name for name in _SHAPING if inputs.get(name) is not None]
    if ids is None or other or (mask is not None and mask.shape != ids.shape):
        raise ValueError(
            "The prefix cache knows sequences by `input_ids` and an `attention_mask` of the same shape, but this "
            f"batch has {other or 'another form'}; leave `prefix_cache` unset."
        )
    return ids, torch.ones_like(ids) if mask is None else mask
