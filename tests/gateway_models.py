"""Models for the gateway's tests whose answers are exact: the same bytes in a batch of any size and class."""

from __future__ import annotations

import torch
from torch import nn


class SumAndDifference(nn.Module):
    """Two inputs, two outputs, as Triton's own example `simple`."""

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"sum": a + b, "difference": a - b}


class Seen(nn.Module):
    """The tokens that a mask shows, summed up as they come, and their number: of any length."""

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"seen": (ids * mask).cumsum(1), "shown": mask.sum(1)}


class Shouts(nn.Module):
    """Texts to texts, and their sizes."""

    def forward(self, texts: list[list[bytes]]) -> dict[str, object]:
        return {
            "loud": [[text.upper() for text in row] for row in texts],
            "sizes": torch.tensor([[len(text) for text in row] for row in texts]),
        }


class Halves(nn.Module):
    """Half of each element of an image."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image * 0.5
