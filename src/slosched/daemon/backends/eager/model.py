"""What an eager model is, for the lane that runs it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import nn

from slosched.daemon.backends.formats import TORCH_DTYPES, dtype_named


class EagerModel(ABC):
    """One model on its device, with the one input of all its requests, which follows from the job's seed.

    `module` is hooked at its leaves, for boundaries. `note` says what differs from the published model.
    """

    note: str = ""
    module: nn.Module

    @abstractmethod
    def run(self, between: Callable[[], None]) -> Sequence[torch.Tensor]:
        """One request: its answer on the device, tensors of the same shapes each time.

        `between` is called between two steps, where the request may be interrupted. The input is copied to the
        device, as a service does.
        """


def dtype_of(name: str, published: torch.dtype) -> torch.dtype:
    """The dtype of a job that says `name`; `published` if it says none. Raises InvalidConfig."""
    return TORCH_DTYPES[dtype_named(name)] if name else published


def generator(seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Random numbers of `seed` on `device`, apart from torch's global ones."""
    return torch.Generator(device=device).manual_seed(seed % 2**63)
