"""The networks: a U-Net for both generators, and a small convolutional one for the judge and the classifier.

Images are (batch, 1, 8, 8). The generators work within -1..1, the other two look at ink within 0..1.
Normalisation is within a row (GroupNorm), so that no row depends on those beside it.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn.functional import silu

SIDE = 8
PIXELS = SIDE * SIDE
CLASSES = 10
_GROUPS = 4


class _Block(nn.Module):
    """Two convolutions beside a shortcut; the condition scales and shifts what lies between them."""

    def __init__(self, before: int, after: int, condition: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(_GROUPS, before)
        self.conv1 = nn.Conv2d(before, after, 3, padding=1)
        self.condition = nn.Linear(condition, 2 * after)
        self.norm2 = nn.GroupNorm(_GROUPS, after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1)
        self.shortcut = nn.Conv2d(before, after, 1) if before != after else nn.Identity()

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        scale, shift = self.condition(condition)[:, :, None, None].chunk(2, 1)
        h = self.conv1(silu(self.norm1(x)))
        h = self.conv2(silu(self.norm2(h) * (1 + scale) + shift))
        mixed: torch.Tensor = self.shortcut(x) + h
        return mixed


class UNet(nn.Module):
    """From an image, an angle within 0..pi/2 and a label to an image of the same shape.

    `wide` channels at 8x8 and `deep` ones at 4x4; the angle is (batch,), the label (batch,) within 0..9.
    """

    def __init__(self, wide: int, deep: int, *, condition: int = 64) -> None:
        super().__init__()
        self.labels = nn.Embedding(CLASSES, condition)
        self.times = nn.Sequential(nn.Linear(16, condition), nn.SiLU())
        self.mix = nn.Linear(condition, condition)
        self.inlet = nn.Conv2d(1, wide, 3, padding=1)
        self.down1 = _Block(wide, wide, condition)
        self.shrink = nn.Conv2d(wide, deep, 2, stride=2)
        self.down2 = _Block(deep, deep, condition)
        self.middle = _Block(deep, deep, condition)
        self.grow = nn.ConvTranspose2d(deep, wide, 2, stride=2)
        self.up1 = _Block(2 * wide, wide, condition)
        self.last = nn.GroupNorm(_GROUPS, wide)
        self.outlet = nn.Conv2d(wide, 1, 3, padding=1)

    def forward(self, x: torch.Tensor, angle: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        powers = torch.arange(8, device=x.device, dtype=torch.float32)
        turns = angle[:, None] * torch.exp2(powers * 0.75)
        waves = torch.cat([torch.sin(turns), torch.cos(turns)], 1)
        condition = silu(self.mix(self.times(waves) + self.labels(label)))
        wide = self.down1(self.inlet(x), condition)
        deep = self.down2(self.shrink(wide), condition)
        deep = self.middle(deep, condition)
        both = torch.cat([self.grow(deep), wide], 1)
        image: torch.Tensor = self.outlet(silu(self.last(self.up1(both, condition))))
        return image


class Recogniser(nn.Module):
    """Convolutions, then `features` numbers, then `answers` logits: the classifier, and the judge.

    `forward` takes ink (batch, 1, 8, 8) within 0..1 and returns logits (batch, answers).
    """

    def __init__(self, wide: int, deep: int, features: int, answers: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, wide, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(wide, wide, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(wide, deep, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(deep, deep, 3, padding=1),
            nn.SiLU(),
            nn.Flatten(1),
            nn.Linear(deep * (SIDE // 2) ** 2, features),
            nn.SiLU(),
        )
        self.head = nn.Linear(features, answers)

    def features(self, ink: torch.Tensor) -> torch.Tensor:
        """What the last layer sees, (batch, features)."""
        seen: torch.Tensor = self.body(2 * ink - 1)
        return seen

    def forward(self, ink: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.features(ink))
        return logits


def parameters_of(module: nn.Module) -> int:
    """The number of a module's weights."""
    return sum(math.prod(each.shape) for each in module.parameters())
