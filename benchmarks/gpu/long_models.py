"""Models of a chosen exec time: one request stands for many images, made of the one that it brings.

Factories for a worker's file. Weights are random, and drawn from a seed: also the head of ViT-L, which
torchvision leaves at zero, so that all its answers would be the same.
"""

from __future__ import annotations

import torch
from torch import nn

_SEED = 11


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

    torch.manual_seed(_SEED)
    model: nn.Module = vit_l_16()
    nn.init.normal_(model.heads.head.weight, std=0.05)  # type: ignore[union-attr, arg-type]
    return model


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
