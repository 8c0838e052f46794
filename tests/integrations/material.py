"""What the tests of other trainers share."""

import torch


def randomised(model):
    """Give every parameter random values: zeros and ones would hide what is left out."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def gradients(model):
    """Return the gradient of all trained parameters as one vector."""
    found = [p.grad.flatten().float() for p in model.parameters() if p.requires_grad and p.grad is not None]
    return torch.cat(found).clone()


def distance(one, other):
    """Return how far two gradients are from each other, relative to the second."""
    return float((one - other).norm() / other.norm())
