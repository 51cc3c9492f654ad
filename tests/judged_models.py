"""A light model with a judge, and a heavy one, for the tests of cascades; also judges that cannot be served.

What they compute is exact, so that answers can be compared byte by byte whatever batch they ran in.
"""

from __future__ import annotations

import torch
from torch import nn

WIDTH = 6


class Light(nn.Module):
    """Its score is the first value of the input; of a negative one the judge cannot tell."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.arange(1.0, WIDTH + 1))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        first = x[:, 0]
        if bool((first > 99).any()):
            raise ValueError("the judge gives up")
        score = torch.where(first < 0, torch.nan, first)
        return {"score": score, "answer": x * self.scale}


class Heavy(nn.Module):
    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"answer": x * 3}


class Words(nn.Module):
    """Answers of an odd number of bytes, beside a score of the shape (1,) in a tuple."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return x > 0, x[:, :1] / 2, x.sum(1).to(torch.int64)


class Tokens(nn.Module):
    """Lengths vary, and the score does not."""

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        seen = ids * mask
        return {"twice": seen * 2, "score": seen.sum(1) / 1000, "each": seen.float() / 4}


class Whole(nn.Module):
    """Its score is an integer."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"answer": x * 2, "score": (x[:, 0] * 10).to(torch.int64)}
