"""Operators' models that are hard on a worker: in place, with own state, branching on data, breaking CUDA."""

from __future__ import annotations

import os

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


class _ZerosHead(nn.Module):
    """A network whose last layer is zeros: every answer is the bias."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(11)
        self.body = nn.Conv2d(3, 32, 3)
        self.head = nn.Linear(32, 10)
        nn.init.zeros_(self.head.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.head(torch.relu(self.body(x)).mean((2, 3)))
        return y


def zeros_head() -> nn.Module:
    return _ZerosHead().eval()


class _InPlace(nn.Module):
    """Works on its input in place, and answers with a view of it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x.mul_(2).sub_(0.5).relu_()
        return x.view(len(x), -1)[:, :200]


def in_place() -> nn.Module:
    return _InPlace().eval()


class _Counting(nn.Module):
    """Adds a counter of its runs to the answer: each run must find it as it was loaded."""

    runs: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(12)
        self.linear = nn.Linear(64, 32)
        self.register_buffer("runs", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.runs += 1
        y: torch.Tensor = self.linear(x)
        return y + self.runs


def counting() -> nn.Module:
    return _Counting().eval()


class _Remembering(nn.Module):
    """Keeps a table for the last batch size that it saw, in an attribute, as rotary embeddings do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(13)
        self.linear = nn.Linear(64, 64)
        self.table: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.table is None or len(self.table) != len(x):
            self.table = torch.cos(torch.arange(64.0, device=x.device)).repeat(len(x), 1)
        y: torch.Tensor = self.linear(x) * self.table
        return y


def remembering() -> nn.Module:
    return _Remembering().eval()


class _Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(14)
        self.lstm = nn.LSTM(32, 64, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        states, _ = self.lstm(x)
        last: torch.Tensor = states[:, -1]
        return last


def recurrent() -> nn.Module:
    return _Recurrent().eval()


class _Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(15)
        layer = nn.TransformerEncoderLayer(128, 4, 256, batch_first=True, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.embedding = nn.Embedding(1000, 128)
        self.places = nn.Parameter(torch.randn(24, 128))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.encoder(self.embedding(tokens) + self.places)
        return y[:, 0]


def transformer() -> nn.Module:
    return _Transformer().eval()


class _Several(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(16)
        self.linear = nn.Linear(64, 16)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.linear(x)
        return {"hidden": y, "scores": torch.softmax(y, -1), "kept": x}


def several() -> nn.Module:
    return _Several().eval()


class _MixedRows(nn.Module):
    """Normalises over the batch: what it answers one request depends on the others."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(0)


def mixed_rows() -> nn.Module:
    return _MixedRows().eval()


def aborting() -> nn.Module:
    return _Aborting().eval()


class _Aborting(nn.Module):
    """Ends its process for inputs above 1, which none that is made up holds."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if bool((x > 1).any()):  # needs the data on the host: it is run by plain execution
            os.abort()
        return x * 2
