"""The first latents of a request: normal numbers that follow from its seed alone.

An integer hash makes them, with torch's own operations on the device. torch's generators have a state that is
shared by a batch, so a row's noise would depend on its place, and a CUDA graph would repeat what it recorded.
The integers are the same everywhere; logarithm and cosine differ in the last bits between devices.
"""

from __future__ import annotations

import math

import torch

_LOW_32 = 0xFFFFFFFF
#: Tells the two uniform numbers of a pair apart.
_STREAMS = (0x9E3779B9, 0x85EBCA6B)


def normal(seed: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Standard normal numbers (batch, *shape), float32; row i follows from `seed[i]`, int64 (batch,).

    Box and Muller's method. All 64 bits of a seed count.
    """
    count = math.prod(shape)
    pairs = torch.arange(-(-count // 2), dtype=torch.int64, device=seed.device)
    low, high = seed & _LOW_32, (seed >> 32) & _LOW_32
    key = _mixed(low ^ _mixed(high ^ _STREAMS[0]))[:, None]
    first, second = (
        # 24 bits: as many as a float32 holds exactly, so that no uniform number is rounded up to 1.
        (_mixed(_mixed(pairs ^ stream)[None, :] ^ key) >> 8).to(torch.float32)
        for stream in _STREAMS
    )
    radius = (-2.0 * ((first + 0.5) * 2.0**-24).log()).sqrt()
    angle = second * (2.0 * math.pi * 2.0**-24)
    both = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)
    return both[:, :count].reshape(-1, *shape)


def _mixed(value: torch.Tensor) -> torch.Tensor:
    """A bijection of 32-bit numbers (lowbias32, by C. Wellons), held in int64: products wrap, as intended."""
    value = value ^ (value >> 16)
    value = (value * 0x7FEB352D) & _LOW_32
    value = value ^ (value >> 15)
    value = (value * 0x846CA68B) & _LOW_32
    return value ^ (value >> 16)
