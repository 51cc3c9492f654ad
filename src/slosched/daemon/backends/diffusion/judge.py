"""The judge of a light model: how likely its image is a real one, as a score of 0..1.

DiffServe's judge is EfficientNetV2-S with two classes, fake and real, on images of 224 pixels. It resizes PIL
images, with antialiasing; this one resizes on the device, bilinear and without antialiasing. The weights are
random here, so its time is right and its score means nothing.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from slosched.daemon.backends.diffusion.weights import filled
from slosched.errors import MissingPackage

_PIXELS, _TINY_PIXELS = 224, 8
_MEAN, _DEVIATION = 0.5074, 0.2551
_CLASSES = 2
_REAL = 1
#: The weight of the norms that end blocks.
_CALM = 0.6


class Judge(nn.Module):
    """`classifier` on images resized to `pixels`."""

    def __init__(self, classifier: nn.Module, pixels: int) -> None:
        super().__init__()
        self.classifier, self.pixels = classifier, pixels

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """P(real) of `images` (batch, 3, height, width) within 0..1: float32 (batch,)."""
        resized = functional.interpolate(
            images, size=(self.pixels, self.pixels), mode="bilinear", align_corners=False
        )
        classes = self.classifier((resized - _MEAN) / _DEVIATION)
        scores: torch.Tensor = classes.float().softmax(dim=1)[:, _REAL]
        return scores


def large_judge(name: str) -> Judge:
    """EfficientNetV2-S of torchvision. Raises MissingPackage."""
    try:
        make: Callable[..., nn.Module] = importlib.import_module(
            "torchvision.models"
        ).efficientnet_v2_s
    except (
        ImportError,
        RuntimeError,
        AttributeError,
    ) as error:  # RuntimeError: built for another torch
        raise MissingPackage(
            f"the judge of {name} is torchvision's EfficientNetV2-S, and torchvision is not installed or does "
            f"not fit this torch ({error}): install the torchvision of this torch's release, or serve "
            f"{name.removesuffix('+judge')}, which has no judge"
        ) from None
    with torch.device("meta"):
        classifier = make(weights=None, num_classes=_CLASSES)
    return Judge(_calm(filled(classifier, f"{name} judge", gain=2.0)), _PIXELS).eval()


def _calm(classifier: nn.Module) -> nn.Module:
    # He's gain makes up for the activations, and there is none behind the last convolution of a block. Without
    # trained statistics nothing else holds the scale over 40 blocks, and float16 would overflow.
    for block in classifier.modules():
        if (
            isinstance(block, nn.Sequential)
            and len(block) == 2
            and isinstance(block[1], nn.BatchNorm2d)
        ):
            nn.init.constant_(block[1].weight, _CALM)
    return classifier


def tiny_judge(name: str) -> Judge:
    """Three layers, for small images."""
    with torch.device("meta"):
        classifier = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(1),
            nn.Linear(8, _CLASSES),
        )
    return Judge(filled(classifier, f"{name} judge", gain=2.0), _TINY_PIXELS).eval()
