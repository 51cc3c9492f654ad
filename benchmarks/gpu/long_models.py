"""Models of a chosen exec time: one request stands for many images, made of the one that it brings.

Factories for a worker's file. Weights are random, and drawn from a seed: also the head of ViT-L, which
torchvision leaves at zero, so that all its answers would be the same.
"""

from __future__ import annotations

import torch
from torch import nn

_SEED = 11
#: Random numbers that weights repeat: a prime, so that no two rows of a matrix are the same.
_PATTERN = 65_537


class Images(nn.Module):
    """The mean of `net`'s answers to `images` variations of the image, each of another brightness."""

    brightness: torch.Tensor

    def __init__(self, net: nn.Module, images: int) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("brightness", torch.linspace(0.5, 1.5, images))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        many = image.unsqueeze(1) * self.brightness.to(image.dtype).reshape(-1, 1, 1, 1)
        answers: torch.Tensor = self.net(many.flatten(0, 1))
        return answers.reshape(*many.shape[:2], -1).mean(dim=1)


def vit_l() -> nn.Module:
    """ViT-L/16."""
    from torchvision.models import vit_l_16

    with torch.device("meta"):
        model: nn.Module = vit_l_16()
    model.to_empty(device="cpu")
    fill(model)
    return model


def fill(model: nn.Module) -> None:
    """Weights of the usual size, in a fraction of the time that a draw of each takes."""
    pattern = torch.randn(_PATTERN, generator=torch.Generator().manual_seed(_SEED))
    with torch.no_grad():
        for name, values in model.named_parameters():
            if values.ndim == 1:
                values.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            size = values.shape[1:].numel() ** -0.5
            repeats = -(-values.numel() // _PATTERN)
            values.copy_((size * pattern).repeat(repeats)[: values.numel()].reshape(values.shape))


def _resnet50() -> nn.Module:
    from torchvision.models import resnet50

    torch.manual_seed(_SEED)
    model: nn.Module = resnet50()
    return model


def short() -> nn.Module:
    """About 2 ms on an H200."""
    return Images(_resnet50(), 24)


def middle() -> nn.Module:
    """About 9 ms on an H200."""
    return Images(vit_l(), 28)


def long() -> nn.Module:
    """About 50 ms on an H200."""
    return Images(vit_l(), 160)


def huge() -> nn.Module:
    """About 200 ms on an H200."""
    return Images(vit_l(), 640)
