"""Operators' models that are hard on a worker: one that branches on its data, one that breaks CUDA."""

from __future__ import annotations

import torch
from torch import nn


class _Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)
        with torch.no_grad():
            self.linear.weight.copy_(torch.arange(8.0).reshape(2, 4))
            self.linear.bias.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear(x)
        return y * 2 if bool((y > 0).any()) else y  # needs the data on the host: no graph can


def branching_net() -> nn.Module:
    return _Branching().eval()


class _ReadingOutside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Fine for what is made up in preparation (below 1), an illegal address for what is not.
        return self.table[(x > 1).long() * 100_000_000] + x


def reading_outside() -> nn.Module:
    return _ReadingOutside().eval()
