"""Small models for machines without a GPU, and for tests: their time is chosen, and they compute something."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from slosched.clock import sleep_ns
from slosched.daemon.backends.eager.building import built
from slosched.daemon.backends.eager.model import EagerModel, dtype_of, generator
from slosched.share_spec import Job, tiny_layers
from slosched.units import NS_PER_MS

_WIDTH = 16
#: Ticks of a GPU's clock in a millisecond, about: torch.cuda._sleep counts those.
_TICKS_PER_MS = 1_700_000
_cuda: Any = torch.cuda


class _Layer(nn.Module):
    """A linear layer that takes `ms` more: asleep on the CPU, in a kernel that waits on a GPU."""

    def __init__(self, ms: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(_WIDTH, _WIDTH))
        self.ms = ms

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.ms and x.is_cuda:
            _cuda._sleep(int(self.ms * _TICKS_PER_MS))
        elif self.ms:
            sleep_ns(round(self.ms * NS_PER_MS))
        return torch.tanh(x @ self.weight)


class Tiny(EagerModel):
    """`tiny:LAYERS:MS`: layers that take the given time each; 8 and 0.5 ms unless the name says others."""

    note = "layers of a chosen time"

    def __init__(self, job: Job, device: torch.device, seed: int, *, small: bool = False) -> None:
        layers, ms = tiny_layers(job.model)
        dtype = dtype_of(job.dtype, torch.float32)
        self.module = nn.Sequential(*[_Layer(ms) for _ in range(layers)])
        numbers = generator(1)
        with torch.no_grad():
            for weight in self.module.parameters():
                weight.normal_(std=_WIDTH**-0.5, generator=numbers)
        self.module.to(device, dtype).eval()
        self._device = device
        self._input = torch.randn(job.batch, _WIDTH, generator=generator(seed)).to(dtype)

    def run(self, between: Callable[[], None]) -> Sequence[torch.Tensor]:
        return [self.module(self._input.to(self._device))]


class TinyConv(EagerModel):
    """Four convolutions on pictures of 32 x 32, and one number for each of ten classes."""

    note = "four small convolutions"

    def __init__(self, job: Job, device: torch.device, seed: int, *, small: bool = False) -> None:
        dtype = dtype_of(job.dtype, torch.float32)
        height, width = job.size if job.size != (0, 0) else (32, 32)
        self.module = built("tiny-conv", _convolutions, device, dtype)
        self._device = device
        shape = (job.batch, 3, height, width)
        self._input = torch.rand(shape, generator=generator(seed)).to(dtype)

    def run(self, between: Callable[[], None]) -> Sequence[torch.Tensor]:
        return [self.module(self._input.to(self._device))]


def _convolutions() -> nn.Module:
    layers: list[nn.Module] = []
    for inputs in (3, 8, 8, 8):
        layers += [nn.Conv2d(inputs, 8, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
