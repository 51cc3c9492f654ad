"""Models as people write them, and as they should not: for the tests of the CPU's answers."""

from __future__ import annotations

import sys

import torch
from torch import nn


class Slice(nn.Module):
    """Answers with a view of its input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, 1:4]


class InPlace(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x += 1
        return x.relu_()


class Counter(nn.Module):
    """Its buffer counts its runs, and the answer shows it."""

    runs: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("runs", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.runs += 1
        return x * 2 + self.runs


class Replaces(nn.Module):
    """Puts a new tensor in its buffer's place."""

    runs: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("runs", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.runs = self.runs + 1
        return x * 2


class Weights(nn.Module):
    """Answers with a view of its own weights, which it changes: every answer is the loaded ones."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.arange(64.0).reshape(64, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.table[:] += 1
        return self.table[: len(x)] - self.table[: len(x)] + x[:, :1]


class Several(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x, x * 2


class Swapped(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.transpose(0, 1)


class Squeezed(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * 2).squeeze()


class Centred(nn.Module):
    """Depends on the whole batch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(0)


class Noisy(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.rand_like(x)


class Exits(nn.Module):
    """Wants to end its process for inputs above 1, which none that is made up holds."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if bool((x > 1).any()):
            sys.exit(3)
        return x * 2


def training() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
