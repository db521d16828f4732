"""What the tests of adapters share."""

import torch


def randomise_adapter(model):
    """Adapters begin with no effect, and half of their weights with no gradient."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
