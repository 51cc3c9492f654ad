"""The model of gateway_cost.py, for a worker on the CPU, which imports it from the folder of its file.

Sums of a sixteenth of the input each: exact for inputs of small whole numbers, in any order and any batch.
"""

from __future__ import annotations

import torch
from torch import nn

SUMS = 16


class Sums(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(len(x), SUMS, -1).sum(2)
