"""The probe on a language model that sees images, in batches whose rows hold different ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageTextToText, Qwen3VLMoeConfig

from hf_moecal import UnsupportedMoEError, find_moe_layers, probe_experts
from hf_moecal.readouts.mixture import Readout
from hf_moecal.readouts.recorded import attach_readout
from tests.rerouting import brute_force
from tests.tiny_moe import randomise


IMAGE, START = 120, 121
TOKENS = torch.tensor([3, 8, 17])


def model_of(**changes) -> nn.Module:
    text = {
        "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_experts": 8,
        "num_experts_per_tok": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                                                      "mrope_section": [3, 3, 2]},
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "patch_size": 4, "out_hidden_size": 64,
        "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    config = Qwen3VLMoeConfig(
        text_config={**text, **changes}, vision_config=vision, image_token_id=IMAGE, vision_start_token_id=START
    )
    torch.manual_seed(0)
    return randomise(AutoModelForImageTextToText.from_config(config, attn_implementation="eager")).float().eval()


def batch_of(images: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Two rows, with so many images in each; an image is one token of four patches."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 100, (2, 9), generator=generator)
    for row, count in enumerate(images):
        for image in range(count):
            ids[row, 1 + 2 * image : 3 + 2 * image] = torch.tensor([START, IMAGE])
    total = sum(images)
    return {
        "input_ids": ids,
        "mm_token_type_ids": (ids == IMAGE).int(),
        "pixel_values": torch.randn(4 * total, 3 * 2 * 4 * 4, generator=generator),
        "image_grid_thw": torch.tensor([[1, 2, 2]] * total),
        "use_cache": False,
    }


@pytest.mark.parametrize("images", [(1, 1), (2, 0), (1, 2)])
@torch.no_grad()
def test_rows_with_images(images: tuple[int, int]) -> None:
    model, inputs = model_of(), batch_of(images)
    layer = find_moe_layers(model)[-1]
    with probe_experts(model) as probe:
        plain = model(**inputs).logits
    found = probe.expert_logits(TOKENS)
    truth = brute_force(model, layer, inputs, TOKENS, probe.record.expert_ids[TOKENS])
    assert (found - truth).abs().max() <= 1e-5 * truth.abs().max()
    torch.testing.assert_close(probe.logits(TOKENS), plain.flatten(0, 1)[TOKENS], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("images", [(1, 1), (2, 0)])
@torch.no_grad()
def test_layers_after_which_images_come_in_again_are_refused(images: tuple[int, int]) -> None:
    model = model_of()
    with probe_experts(model, 0) as probe:
        model(**batch_of(images))
        with pytest.raises(UnsupportedMoEError, match="may see pixel_values again"):
            probe.expert_logits(TOKENS)
        text = {"input_ids": batch_of((0, 0))["input_ids"], "use_cache": False}
        model(**text)
        found = probe.expert_logits(TOKENS)
        truth = brute_force(model, probe.layers[0], text, TOKENS, probe.record.expert_ids[TOKENS])
        assert (found - truth).abs().max() <= 1e-5 * truth.abs().max()
        model(**batch_of(images))
        with pytest.raises(UnsupportedMoEError, match="may see pixel_values again"):
            probe.expert_logits(TOKENS)


@torch.no_grad()
def test_a_mixture_of_a_model_that_sees_images() -> None:
    model, inputs = model_of(), batch_of((1, 1))
    layer = find_moe_layers(model)[-1]
    with probe_experts(model) as probe:
        model(**inputs)
    alone = brute_force(model, layer, inputs, TOKENS, torch.arange(8).expand(3, -1)).log_softmax(-1)
    expected = (alone + probe.router_shares(TOKENS).log().unsqueeze(-1)).logsumexp(1)
    attach_readout(model, Readout("soft_mixture"))
    found = model(**inputs).logits.flatten(0, 1)[TOKENS]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
