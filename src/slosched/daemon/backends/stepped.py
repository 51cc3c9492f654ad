"""Models that run in equal steps: diffusion, or any iteration whose number of steps is fixed.

A model says so by deriving from `Stepped`. On a CUDA device each of its three parts is a CUDA graph for each
class, and the graph of `step` is launched `steps` times, so that a run can be interrupted between two steps and
its time is predicted by the step. Elsewhere `forward` runs all of it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

#: What is carried from part to part: tensors (batch, ...) on the device, the same shapes and dtypes throughout.
State = Sequence[torch.Tensor]


class Stepped(nn.Module):
    """A model whose answer is `finish(step(... step(begin(inputs))))`, with `steps` equal steps.

    What differs between steps (the time of a diffusion step, say) is a number in the state, by which `step`
    looks it up on the device: the host is not asked between two steps. No part may write its arguments, but for
    tensors of the state that `step` changes in place and gives back as they are (caches of attention, say):
    these are not copied.
    """

    steps: int

    @abstractmethod
    def begin(self, *args: torch.Tensor, **inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The state before the first step, of inputs (batch, ...): one by position, several by name."""

    @abstractmethod
    def step(self, *state: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The state after one step."""

    @abstractmethod
    def finish(self, *state: torch.Tensor) -> Any:
        """The outputs, as `forward` returns them."""

    def forward(self, *args: torch.Tensor, **inputs: torch.Tensor) -> Any:
        """All of it, for devices that do not run the parts one by one."""
        state = self.begin(*args, **inputs)
        for _ in range(self.steps):
            state = self.step(*state)
        return self.finish(*state)
