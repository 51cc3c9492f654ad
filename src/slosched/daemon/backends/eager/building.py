"""Networks with random weights, made on the device itself: 6 billion numbers take the CPU minutes."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

Network = TypeVar("Network", bound=nn.Module)

#: The default dtype and the seed are of the process: lanes of several threads build one after the other.
_BUILDING = threading.Lock()


def built(
    name: str, make: Callable[[], Network], device: torch.device, dtype: torch.dtype
) -> Network:
    """What `make` makes, in eval mode, on `device` and in `dtype`, with weights from a seed made of `name`.

    Tensors that `make` makes without a dtype have `dtype` at once. torch's generators are left unchanged.
    """
    devices = [device] if device.type == "cuda" else []
    with (
        _BUILDING,
        torch.inference_mode(False),
        torch.random.fork_rng(devices=devices),
        _default_dtype(dtype),
        torch.device(device),
    ):
        torch.manual_seed(zlib.crc32(name.encode()))
        network = make()
    # What is there already does not move: `to` is for weights of libraries that name a dtype or a device.
    network = nn.Module.to(network, device, dtype)
    return network.requires_grad_(False).eval()


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
